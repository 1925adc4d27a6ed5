"""Normalized: any base optimizer in the modular norm, its own update rescaled to a norm of lr [MN].

Source: [MN] Large et al., arXiv 2405.14813.
"""

from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CoverageError, NonFiniteError, require
from .finite import are_finite
from .metrize import canonical, metrize
from .modular import ModularNorm
from .ranks import sharded
from .state import by_name, members
from .update import copy_

zero_ = torch._foreach_zero_
needs = partial(require, what="Normalized", error=CoverageError)


class Normalized(torch.optim.Optimizer):
    """Any base optimizer in the modular norm: its update u, each tensor set to lr · radius · u /
    ‖u‖.

    base_optimizer: a torch optimizer of named parameters, Adam(model.named_parameters(), …), with
    weight_decay 0. Its groups and state are this optimizer's; their lr is the modular norm of a
    step.
    norm: the ModularNorm, or the model (see metrize). weight_decay: as in Dualized. by_block:
    rescale each block of a norm by itself.
    from_zero: the base steps from zero weights, with lr 1, so that u comes without rounding in any
    dtype; False for a base that reads the weights (Adafactor, LAMB): u is then the difference of
    the weights, with their rounding error. Where some groups' lr is 0, the base still counts the
    step.

    A gradient that is not finite raises NonFiniteError before anything changes, because the base
    cannot be masked on the device.
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        norm: ModularNorm | nn.Module,
        lr: float | Tensor,
        *,
        weight_decay: float = 0.0,
        by_block: bool = False,
        from_zero: bool = True,
    ) -> None:
        self.base, self.weight_decay = base_optimizer, weight_decay
        self.by_block, self.from_zero = by_block, from_zero
        self.norm = metrize(norm) if isinstance(norm, nn.Module) else norm
        needs(
            isinstance(lr, Tensor) or (not isinstance(lr, str) and 0 <= lr < inf),
            got=f"lr {lr!r}",
            allowed="a finite number >= 0",
            fix="Normalized(base, norm, lr=0.1)",
        )
        check_base(base_optimizer, from_zero=from_zero)
        check_parameters(base_optimizer, self.norm)
        for group in base_optimizer.param_groups:
            group["param_names"] = [canonical(n) for n in group["param_names"]]
            group["lr"] = lr
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults | {"lr": lr})
        # One truth: schedulers, GradScaler and checkpoints see the base's groups and state.
        self.param_groups, self.state = base_optimizer.param_groups, base_optimizer.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step. Returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [g for g in self.param_groups if float(g["lr"]) != 0]
        moving = [(g, n, p) for g, n, p in members(groups) if p.grad is not None]
        if not moving:
            return loss
        # One wait for the device, not one a weight.
        finite = torch.stack(
            are_finite([g for *_, p in moving if (g := p.grad) is not None])
        ).tolist()
        if not all(finite):
            raise NonFiniteError(
                f"the gradient of {moving[finite.index(False)][1]} is not finite; the step was not"
                " taken, weights and the base's state are as before"
            )
        for group, name, p, U in self._updates(moving):
            norm = self.norm.norms[name]
            U = norm.sphere(U[None])[0] if self.by_block else norm.normalize(U[None])[0]
            if self.weight_decay:
                U = torch.where((U != 0).any(), U + self.weight_decay * p, U)
            p.sub_(U * (group["lr"] * self.norm.radii[name]))
        return loss

    def _updates(
        self, moving: list[tuple[dict[str, Any], str, Tensor]]
    ) -> list[tuple[dict[str, Any], str, Tensor, Tensor]]:
        """Return (group, name, p, the base's update at lr 1) and leave the weights as they are."""
        weights = [p for *_, p in moving]
        old = [p.detach().clone() for p in weights]
        if self.from_zero:
            zero_(weights)
        lrs = [g["lr"] for g in self.param_groups]
        try:
            for group, lr in zip(self.param_groups, lrs, strict=True):
                group["lr"] = torch.ones_like(lr) if isinstance(lr, Tensor) else 1.0
            self.base.step()
            updates = [-p if self.from_zero else w - p for p, w in zip(weights, old, strict=True)]
        finally:
            for group, lr in zip(self.param_groups, lrs, strict=True):
                group["lr"] = lr
            copy_(weights, old)
        return [(*entry, U) for entry, U in zip(moving, updates, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        kept = ("base", "norm", "weight_decay", "by_block", "from_zero")
        return super().__getstate__() | {k: getattr(self, k) for k in kept}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a group once this is built: the base would not know it."""
        needs(
            not hasattr(self, "state") or self.state is not self.base.state,
            got="a group of parameters after construction",
            allowed="before",
            fix="add it to the base and build Normalized anew",
        )
        super().add_param_group({k: v for k, v in param_group.items() if k != "param_names"})

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the base's state, matched by parameter name."""
        names = [list(g["param_names"]) for g in self.param_groups]
        groups, state = by_name(state_dict, names, schema=None)
        self.base.load_state_dict({"state": state, "param_groups": groups})
        self.param_groups, self.state = self.base.param_groups, self.base.state


def check_base(base: torch.optim.Optimizer, *, from_zero: bool) -> None:
    """Raise CoverageError for a base whose update cannot be rescaled."""
    kind, groups = type(base).__name__, base.param_groups
    needs(
        kind not in ("LBFGS", "ASGD"),
        got=f"{kind}, which keeps weights or closures of its own",
        allowed="bases that turn gradients into an update",
        fix="another base",
    )
    needs(
        not from_zero or kind not in ("Adafactor", "Lamb", "LAMB"),
        got=f"{kind}, whose update depends on the weights",
        allowed="with from_zero=False",
        fix="pass it",
    )
    needs(
        len({float(g["lr"]) for g in groups}) <= 1,
        got="a base whose groups have different lr",
        allowed="one lr",
        fix="give all its groups one lr: radii are what differs by weight",
    )
    for group in groups:
        needs(
            not group.get("weight_decay"),
            got=f"a base with weight_decay {group.get('weight_decay') or 0:g}",
            allowed="0, or decay would be rescaled with the update",
            fix="weight_decay=0 in the base, and Normalized(…, weight_decay=…)",
        )
        needs(
            "param_names" in group,
            got=f"{kind} of parameters without names",
            allowed="named ones",
            fix=f"{kind}(model.named_parameters(), …)",
        )


def check_parameters(base: torch.optim.Optimizer, norm: ModularNorm) -> None:
    """Raise CoverageError unless the base and the norm have the same parameters, whole ones."""
    trained = {canonical(n): p for _, n, p in members(base.param_groups) if p.requires_grad}
    odd = sorted(trained.keys() ^ norm.norms.keys())
    needs(
        not odd,
        got=odd and f"{odd[0]!r} in {'the base' if odd[0] in trained else 'the norm'} alone",
        allowed="the same parameters in both",
        fix=f"{type(base).__name__}(model.named_parameters(), …)",
    )
    for name, p in trained.items():
        needs(
            not sharded(p),
            got=f"{name}, a sharded weight (DTensor)",
            allowed="whole ones",
            fix="Dualized, whose owners have whole weights",
        )
        wrong = norm.norms[name].check(p.shape)
        needs(
            not wrong,
            got=f"{name} of shape {tuple(p.shape)}",
            allowed=wrong,
            fix="metrize the model that the base was built for",
        )
