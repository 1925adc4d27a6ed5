"""A torch optimizer behind what the training loop asks of Dualized."""

import inspect
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from optim import Dualized, ModularNorm
from optim.baselines import BASELINES, Scaling, average_decay
from optim.errors import NonFiniteError, PlacementError, Refusal, require
from optim.finite import are_finite
from optim.metrize import canonical
from optim.ranks import Piece, Ranks, piece_of, ranks_of, sharded
from optim.receipt import aligned
from optim.state import members

from .config import Config
from .errors import ConfigError
from .optimizer_state import Json, OptimizerState, parts_of
from .sections import set_it


def build_baseline(config: Config, model: nn.Module, norm: ModularNorm) -> "Baseline":
    """Build the optimizer that a configuration names, with the settings that it takes."""
    o, recipe = config.optim, BASELINES[config.optim.name]
    own = {k: v for k, v in vars(config.baseline).items() if k in recipe.own}
    optimizer = recipe(model, norm, lr=o.lr, polar=o.polar, **o.step_settings(), **own)
    moves = config.schedule.beta_warmup or config.schedule.beta_cooldown
    fixed = [g.get("auxiliary") or average_decay(g) is None for g in optimizer.param_groups]
    require(
        not moves or not all(fixed),
        "schedule.beta_warmup and schedule.beta_cooldown",
        got=f"a schedule of beta for {o.name}",
        allowed="0: no group of it has an average of gradients that decays by optim.beta",
        fix=set_it("schedule.beta_warmup"),
        error=ConfigError,
    )
    return Baseline(
        optimizer,
        model,
        max_grad_norm=o.max_grad_norm,
        scaling=own.get("scaling", recipe.scaling),
        saved=config.train.keep_checkpoints > 0,
    )


def evaluating(optimizer: "Dualized | Baseline") -> AbstractContextManager[None]:
    """Keep the weights that are evaluated, sampled from and saved in the model, for a while.

    They are those of training but for optimizers that have two sets, as schedule-free ones.
    """
    return optimizer.evaluating() if isinstance(optimizer, Baseline) else nullcontext()


class Baseline:
    """A torch optimizer as a training loop uses Dualized(grads="local").

    Gradients are averaged over ranks and gated where they are not finite, and its state is held as
    pieces. Every rank has all of it; sharded weights are refused. A group's lr_scale multiplies
    the lr that the loop sets.
    """

    step_size = None

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        max_grad_norm: float | None,
        scaling: Scaling | None,
        saved: bool = True,
    ) -> None:
        """Take the optimizer's groups, with the names of their parameters in the model.

        max_grad_norm: of all gradients together (2-norm), clipped in place. scaling: the
        coordinates in which it is gradient descent, for telemetry. saved: whether its state is for
        checkpoints, so that after the first step state is refused that these cannot hold.
        """
        self.optimizer, self.max_grad_norm, self.scaling = optimizer, max_grad_norm, scaling
        self.param_groups = optimizer.param_groups
        check_step(optimizer)
        name_parameters(optimizer, model)
        lr = share_lr(optimizer)
        self.defaults = {**optimizer.defaults, "lr": lr}
        # They have two sets of weights: one to take gradients at, one to evaluate.
        self.with_modes: list[Any] = [
            part
            for part in parts_of(optimizer)
            if callable(getattr(part, "train", None)) and callable(getattr(part, "eval", None))
        ]
        for part in self.with_modes:
            part.train()
        self.state = OptimizerState(optimizer, {p: n for n, p in self._weights()})
        self._saved = self._unchecked = saved
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
            self._join_ranks()
        gated = {n: p.grad for n, p in self._weights() if p.grad is not None}
        if loss is not None:
            gated = {"the loss": self._ranks.average(loss.detach().clone()), **gated}
        finite = torch.stack(are_finite(list(gated.values()))).tolist()
        self._bad = next((n for n, x in zip(gated, finite, strict=True) if not x), None)
        if self._bad is not None:
            return
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for _, p in self._weights()], self.max_grad_norm)
        self._update()
        if self._unchecked:
            self._unchecked = False
            self.state.pack()

    def _join_ranks(self) -> None:
        """Average the gradients of all ranks, and have all draw the same random numbers."""
        weights = [p for _, p in self._weights()]
        seed = int(torch.randint(2**24, ()))  # below it float32 has every integer
        values = [*(p.grad is not None for p in weights), seed]
        joined = torch.tensor(values, dtype=torch.float32, device=weights[0].device)
        *has_grad, seed = self._ranks.maximum(joined).tolist()
        for p, somewhere in zip(weights, has_grad, strict=True):
            if somewhere:
                p.grad = self._ranks.average(torch.zeros_like(p) if p.grad is None else p.grad)
        torch.manual_seed(int(seed))

    def _update(self) -> None:
        """Step with each group's own multiple of lr."""
        lrs = [g["lr"] for g in self.param_groups]
        try:
            for group in self.param_groups:
                group["lr"] = group["lr"] * group.get("lr_scale", 1.0)
            self.optimizer.step()
        except Exception as error:
            if "closure" in f"{error}".lower():
                raise closure_refused(self.optimizer, f"{error}") from error
            raise
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

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Keep the weights that are evaluated in the model; see the function of this name.

        Those of training are put back as they were, to the bit.
        """
        weights = [(p, p.detach().clone()) for _, p in self._weights() if self.with_modes]
        for part in self.with_modes:
            part.eval()
        try:
            yield
        finally:
            for part in self.with_modes:
                part.train()
            with torch.no_grad():
                for p, w in weights:
                    p.copy_(w)

    # ---- checkpoints

    def settings(self) -> list[dict[str, Any]]:
        """Return the groups' settings for a reader, of whatever JSON has no words for its repr."""
        return [
            {k: _as_json(v) for k, v in group.items() if k != "params"}
            for group in self.param_groups
        ]

    def packed(self) -> Json:
        """Return its state without the entries of tensors, which held() has."""
        return self.state.pack()[0]

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

    def make_state(
        self, packed: Json | None, saved: dict[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> None:
        """Make the state of a checkpoint, with buffers to read into; see held().

        packed: what packed() returned, None from before there was such. saved: the shape and type
        of the checkpoint's tensors.
        """
        self.state.make(self.state.packed_before(saved) if packed is None else packed)

    def held(self) -> dict[str, Piece]:
        """Return {"<parameter>.<buffer>": piece} of what it keeps, counters as tensors (1,)."""
        return {
            name: piece_of(b.detach().view(1) if b.ndim == 0 else b.detach())
            for name, b in self.state.pack(saved=self._saved)[1].items()
        }

    def training_weights(self) -> dict[str, Piece]:
        """Return the weights that gradients are taken at, where others are evaluated."""
        return {
            f"{n}.(training)": piece_of(p.detach()) for n, p in self._weights() if self.with_modes
        }


# ---- what an optimizer has to be


def check_step(optimizer: torch.optim.Optimizer) -> None:
    """Raise Refusal for an optimizer whose step needs arguments, as a closure."""
    needed = [
        p.name
        for p in inspect.signature(optimizer.step).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise closure_refused(optimizer, f"a step that needs {', '.join(needed)}")


def closure_refused(optimizer: torch.optim.Optimizer, got: str) -> Refusal:
    """Return the error for an optimizer whose step needs more than gradients."""
    return Refusal(
        f"{type(optimizer).__name__}.step",
        got=got,
        allowed="a step from gradients alone: the loop has one backward pass a step",
        fix="another optimizer",
    )


def name_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Give every group the names of its parameters in the model.

    Raises Refusal unless the optimizer has every trainable weight once and nothing else, all of
    them whole.
    """
    kind, groups = type(optimizer).__name__, optimizer.param_groups
    names = {id(p): canonical(n) for n, p in model.named_parameters()}
    listed = [p for group in groups for p in group["params"]]
    foreign = [tuple(p.shape) for p in listed if id(p) not in names]
    counts = Counter(names[id(p)] for p in listed if id(p) in names)
    missing = [
        canonical(n)
        for n, p in model.named_parameters()
        if p.requires_grad and canonical(n) not in counts
    ]
    twice = [n for n, count in counts.items() if count > 1]
    fix = f"{kind}(model.named_parameters(), …)"
    for wrong, got in (
        (missing, f"no {', '.join(missing)}"),
        (twice, f"twice {', '.join(twice)}"),
        (foreign, f"a tensor of shape {', '.join(map(str, foreign))} that is no weight"),
    ):
        allowed = "every trainable weight of the model, once"
        require(not wrong, f"{kind}: its parameters", got=got, allowed=allowed, fix=fix)
    for group in groups:
        group["param_names"] = [names[id(p)] for p in group["params"]]
    own = {id(group) for group in groups}
    require(
        all(id(g) in own for part in parts_of(optimizer) for g in part.param_groups),
        f"{kind}: its parameters",
        got="groups of an optimizer in it, whose learning rates it does not set",
        allowed="a wrapper whose param_groups are those of its base",
        fix=f"self.param_groups = self.base.param_groups, in {kind}",
    )
    for _, name, p in members(groups):
        require(
            not sharded(p),
            name,
            got=f"a sharded weight (DTensor) for {kind}",
            allowed="whole ones",
            fix="--run.parallel ddp, or Dualized",
            error=PlacementError,
        )


def share_lr(optimizer: torch.optim.Optimizer) -> float:
    """Give all groups one lr and return it, with an lr_scale where they had different ones."""
    kind, groups = type(optimizer).__name__, optimizer.param_groups
    for group in groups:
        lr: Any = group.get("lr")
        number: Any = lr.tolist() if isinstance(lr, Tensor) else lr
        require(
            isinstance(number, int | float) and math.isfinite(number),
            f"{kind}: the lr of a group",
            got=repr(lr),
            allowed="a finite number: the training loop sets the learning rate of every step",
            fix=f"{kind}(…, lr=lr)",
        )
        group["lr"] = float(number)
    lrs = [group["lr"] for group in groups]
    default = optimizer.defaults.get("lr", math.nan)
    shared = float(default) if default and default in lrs else max(lrs, key=abs)
    for group in groups:
        if group["lr"] != shared:
            group["lr_scale"] = group["lr"] / shared * group.get("lr_scale", 1.0)
        group["lr"] = shared
    return shared


def _as_json(value: Any) -> Any:
    value = value.tolist() if isinstance(value, Tensor) else value
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return repr(value)
    return value
