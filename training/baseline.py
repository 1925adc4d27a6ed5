"""A torch optimizer behind what the training loop asks of Dualized."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from optim.baselines import Scaling
from optim.errors import NonFiniteError, PlacementError, Refusal
from optim.finite import are_finite
from optim.metrize import canonical
from optim.ranks import Piece, Ranks, piece_of, ranks_of, sharded
from optim.receipt import aligned
from optim.state import members


class Baseline:
    """A torch optimizer of named parameters as a training loop uses Dualized(grads="local").

    Gradients are averaged over ranks and gated where they are not finite, and its state is held as
    pieces. Every rank has all of it; sharded weights are refused. A group's lr_scale multiplies
    the lr that the loop sets.
    """

    step_size = None

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float | None,
        scaling: Scaling,
    ) -> None:
        """Take the optimizer's groups.

        max_grad_norm: of all gradients together (2-norm), clipped in place. scaling: the
        coordinates in which it is gradient descent, for telemetry.
        """
        self.optimizer, self.max_grad_norm, self.scaling = optimizer, max_grad_norm, scaling
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        for group in self.param_groups:
            group["param_names"] = [canonical(n) for n in group["param_names"]]
        for name, p in self._weights():
            if sharded(p):
                raise PlacementError(
                    name,
                    got=f"a sharded weight (DTensor) for {type(optimizer).__name__}",
                    allowed="whole ones",
                    fix="--run.parallel ddp, or Dualized",
                )
        self._ranks: Ranks = ranks_of([], local=True)
        self._bad: str | None = None

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for _, name, p in members(self.param_groups))

    def receipt(self) -> str:
        """Return a table: parameter, shape, the settings of its group."""
        rows = []
        for group in self.param_groups:
            keys = ("lr", "lr_scale", "betas", "momentum", "weight_decay")
            settings = ", ".join(
                f"{k} {group[k]:.6g}" if isinstance(group[k], float) else f"{k} {group[k]}"
                for k in keys
                if k in group
            )
            rows += [(n, str(tuple(p.shape)), settings) for _, n, p in members([group])]
        title = " + ".join(
            type(o).__name__ for o in getattr(self.optimizer, "optimizers", [self.optimizer])
        )
        return "\n".join([title, *aligned(rows)]) + "\n"

    def last_backward(self) -> Any:
        return nullcontext()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, *, loss: Tensor | None = None) -> None:
        """Take one step with the average of all ranks' gradients, and wait for the device.

        A gradient that is absent on some ranks is zero there; absent on all it stays so. Where a
        gradient or the loss is not finite nothing changes, and check_finite() says which.
        """
        self.check_finite()
        if self._ranks.size > 1:
            weights = [p for _, p in self._weights()]
            has_grad = torch.tensor(
                [p.grad is not None for p in weights], dtype=torch.float32, device=weights[0].device
            )
            for p, somewhere in zip(weights, self._ranks.maximum(has_grad).tolist(), strict=True):
                if somewhere:
                    p.grad = self._ranks.average(torch.zeros_like(p) if p.grad is None else p.grad)
        gated = {n: p.grad for n, p in self._weights() if p.grad is not None}
        if loss is not None:
            gated = {"the loss": self._ranks.average(loss.detach().clone()), **gated}
        finite = torch.stack(are_finite(list(gated.values()))).tolist()
        self._bad = next((n for n, x in zip(gated, finite, strict=True) if not x), None)
        if self._bad is not None:
            return
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for _, p in self._weights()], self.max_grad_norm)
        lrs = [g["lr"] for g in self.param_groups]
        try:
            for group in self.param_groups:
                group["lr"] = group["lr"] * group.get("lr_scale", 1.0)
            self.optimizer.step()
        finally:
            for group, lr in zip(self.param_groups, lrs, strict=True):
                group["lr"] = lr

    def check_finite(self) -> None:
        """Raise NonFiniteError if the last step met a loss or gradient that was not finite.

        That step changed nothing.
        """
        bad, self._bad = self._bad, None
        if bad is not None:
            what = bad if bad == "the loss" else f"the gradient of {bad}"
            raise NonFiniteError(f"{what} is not finite; the step was not taken")

    def settings(self) -> list[dict[str, Any]]:
        return self.optimizer.state_dict()["param_groups"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise Refusal unless it is of these parameters, and do nothing else.

        Settings are the constructor's, and buffers are read into held().
        """
        if [g["param_names"] for g in self.param_groups] != [
            g["param_names"] for g in state_dict["param_groups"]
        ]:
            raise Refusal(
                "optimizer state",
                got="other parameters",
                allowed="those of this model",
                fix="resume with the run's own configuration",
            )

    @torch.no_grad()
    def make_state(self, wanted: Callable[[str], bool]) -> None:
        """Make buffers for the parameters of these names.

        A step of lr 0 and no gradient does it, which moves no weight.
        """
        lrs = [g["lr"] for g in self.param_groups]
        for name, p in self._weights():
            p.grad = torch.zeros_like(p) if wanted(name) else None
        for group in self.param_groups:
            group["lr"] = 0.0
        getattr(self.optimizer, "base", self.optimizer).step()
        for group, lr in zip(self.param_groups, lrs, strict=True):
            group["lr"] = lr
        self.zero_grad()

    def held(self) -> dict[str, Piece]:
        """Return {"<parameter>.<buffer>": piece} of what it keeps, counters as tensors (1,)."""
        state = self.optimizer.state
        return {
            f"{n}.{k}": piece_of(b.view(1) if b.ndim == 0 else b)
            for n, p in self._weights()
            for k, b in state.get(p, {}).items()
            if isinstance(b, Tensor)
        }
