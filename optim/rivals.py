"""The optimizers we are compared with, and [MN]'s normalized ones, behind what a training loop asks of Dualized."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import _muon

from .errors import NonFiniteError, PlacementError, Refusal
from .finite import are_finite
from .metrize import canonical
from .modular import ModularNorm
from .normalized import Normalized
from .polar import Polar, plain
from .ranks import Piece, Ranks, piece_of, ranks_of, sharded

Scaling = Literal["standard", "ntk", "modular"]


def coordinates(model: nn.Module, norm: ModularNorm, scaling: Scaling) -> dict[str, float]:
    """{name: s} of W = s · v: the coordinates v in which plain gradient descent has one learning rate for all weights, which is s² times it in W.

    standard: 1. ntk: 1/√I for matrices (O, I) and 1 for embeddings, gains and biases (Jacot et al., arXiv 1806.07572). modular: radius times the size of one entry
    of norm 1, so that a matrix moves by √(O/I), an embedding row by √D and a head row by 1/√I as Modula's weights do ([MN] §3); this is the scaling of
    maximal updates (Yang, Simon, Bernstein, arXiv 2310.17813).
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

    def scale(name: str, p: Tensor) -> float:
        if scaling == "ntk":
            return 1.0 if p.ndim < 2 or id(p) in embeddings else p[0].numel() ** -0.5
        if scaling == "modular":
            one = torch.zeros(p.shape)
            one.view(-1)[0] = 1
            return norm.radii[name] / float(norm.norms[name].norm(one))
        return 1.0

    return {canonical(n): scale(canonical(n), p) for n, p in _named(model)}


def adamw(
    model: nn.Module,
    norm: ModularNorm,
    *,
    lr: float,
    beta: float,
    beta2: float,
    weight_decay: float,
    **_: Any,
) -> torch.optim.Optimizer:
    """torch's, decay on matrices and embeddings alone, as nanoGPT groups them."""
    groups = [
        {
            "params": [(n, p) for n, p in _named(model) if (p.ndim >= 2) is decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=lr, betas=(beta, beta2), fused=_fused(model)
    )


# lr of AdamW's groups as multiples of Muon's, its betas, ε, and its weight decay as a multiple of Muon's: the optimization track's tuned baseline
# (modded-nanogpt, records/track_3_optimization/train_gpt_simple.py, 06/2026: 0.7, 0.004, 0.015 beside 0.025, decay 0.001 beside 0.05).
AUXILIARY = {
    "embedding": 0.7 / 0.025,
    "ngram": 0.7 / 0.025,
    "match": 0.7 / 0.025,
    "head": 0.004 / 0.025,
    "vectors": 0.015 / 0.025,
}
AUXILIARY_SETTINGS: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-10}
AUXILIARY_DECAY = 0.001 / 0.05


class Float32Muon(torch.optim.Muon):
    """torch.optim.Muon with its iteration in float32, for processors that emulate bfloat16: there it takes seven times as long."""

    def step(self, closure: Any = None) -> Any:
        theirs = _muon._zeropower_via_newtonschulz
        try:
            _muon._zeropower_via_newtonschulz = _newton_schulz
            with torch.no_grad():
                return inspect.unwrap(torch.optim.Muon.step)(
                    self, closure
                )  # without the hooks, which this class's own step has
        finally:
            _muon._zeropower_via_newtonschulz = theirs


def _newton_schulz(
    grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
) -> Tensor:
    """What torch.optim.Muon iterates, for one matrix, in its own dtype instead of bfloat16."""
    X = grad.mT if grad.shape[0] > grad.shape[1] else grad
    X = plain((X / X.norm().clamp(min=eps))[None], (ns_coefficients,) * ns_steps)[0]
    return X.mT if grad.shape[0] > grad.shape[1] else X


def muon_adamw(
    model: nn.Module,
    norm: ModularNorm,
    *,
    lr: float,
    beta: float,
    weight_decay: float,
    auxiliary_lr: float,
    polar: Polar | None = None,
    **_: Any,
) -> torch.optim.Optimizer:
    """torch.optim.Muon for the hidden matrices, AdamW for embeddings, head and vectors, grouped as the optimization track's baseline.

    lr, beta, weight_decay: Muon's. auxiliary_lr: a multiple of AdamW's learning rates, 1 is the track's beside lr. polar: its dtype "float32" is Float32Muon.
    """
    kinds: dict[str, list[tuple[str, Tensor]]] = {}
    for name, p in _named(model):
        role = norm.roles[canonical(name)]
        kinds.setdefault(
            "vectors" if p.ndim < 2 else role if role in AUXILIARY else "hidden", []
        ).append((name, p))
    muon = Float32Muon if polar is not None and polar.dtype == "float32" else torch.optim.Muon
    hidden = muon(kinds.pop("hidden"), lr=lr, momentum=beta, weight_decay=weight_decay)
    groups = [
        {"params": named, "lr_scale": auxiliary_lr * AUXILIARY[kind], "auxiliary": True}
        for kind, named in kinds.items()
    ]
    others = torch.optim.AdamW(
        groups,
        lr=lr,
        weight_decay=AUXILIARY_DECAY * weight_decay,
        fused=_fused(model),
        **AUXILIARY_SETTINGS,
    )
    return Several(hidden, others)


def sgd(
    model: nn.Module,
    norm: ModularNorm,
    *,
    lr: float,
    beta: float,
    weight_decay: float,
    scaling: Scaling = "standard",
    **_: Any,
) -> torch.optim.Optimizer:
    """torch's, momentum as an average (dampening = beta); one group a weight, as `scaling` gives each its own multiple of lr."""
    scales = coordinates(model, norm, scaling)
    groups = [{"params": [(n, p)], "lr_scale": scales[canonical(n)] ** 2} for n, p in _named(model)]
    return torch.optim.SGD(groups, lr=lr, momentum=beta, dampening=beta, weight_decay=weight_decay)


def normalized_adam(
    model: nn.Module,
    norm: ModularNorm,
    *,
    lr: float,
    beta: float,
    beta2: float,
    weight_decay: float,
    **_: Any,
) -> torch.optim.Optimizer:
    return Normalized(
        torch.optim.Adam(_named(model), betas=(beta, beta2)), norm, lr, weight_decay=weight_decay
    )


def normalized_sgd(
    model: nn.Module, norm: ModularNorm, *, lr: float, beta: float, weight_decay: float, **_: Any
) -> torch.optim.Optimizer:
    return Normalized(
        torch.optim.SGD(_named(model), momentum=beta, dampening=beta),
        norm,
        lr,
        weight_decay=weight_decay,
    )


def set_beta(group: dict[str, Any], beta: float) -> None:
    """The decay of the average of gradients of a parameter group, by whatever name its optimizer has it. Auxiliary groups keep theirs."""
    if "beta" in group:
        group["beta"] = beta
    elif "momentum" in group:
        group["momentum"] = beta
        if "dampening" in group:
            group["dampening"] = beta  # the momentum of RIVALS is an average
    elif not group.get("auxiliary"):
        group["betas"] = (beta, group["betas"][1])


class Several(torch.optim.Optimizer):
    """Several optimizers of different parameters as one, as far as Rival asks: their groups and states, one step of each."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers, self.defaults = optimizers, optimizers[0].defaults
        self.param_groups = [group for o in optimizers for group in o.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        return {p: s for o in self.optimizers for p, s in o.state.items()}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The groups' settings alone: buffers are in `state`."""
        return {
            "state": {},
            "param_groups": [g for o in self.optimizers for g in o.state_dict()["param_groups"]],
        }


def _fused(model: nn.Module) -> bool:
    return all(p.device.type in ("cpu", "cuda") for p in model.parameters())


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


RIVALS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "normalized_adam": normalized_adam,
    "normalized_sgd": normalized_sgd,
    "adamw": adamw,
    "muon_adamw": muon_adamw,
    "sgd": sgd,
}
UNNORMED = ("adamw", "muon_adamw", "sgd")  # whose steps have nothing to do with norms


class Rival:
    """A torch optimizer of named parameters as a training loop uses Dualized(grads="local"): gradients are averaged over ranks, gated where not finite, and its state
    is held as pieces. Every rank has all of it; sharded weights are refused.

    max_grad_norm: of all gradients together (2-norm), clipped in place. A group's lr_scale multiplies the lr that the loop sets.
    """

    step_size = None

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float | None = None,
        scaling: Scaling = "modular",
    ) -> None:
        """scaling: the coordinates in which it is gradient descent, for telemetry."""
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
        for group in self.param_groups:
            yield from zip(group["param_names"], group["params"], strict=True)

    def receipt(self) -> str:
        """Parameter, shape, the settings of its group."""
        rows = []
        for group in self.param_groups:
            keys = ("lr", "lr_scale", "betas", "momentum", "weight_decay")
            settings = ", ".join(
                f"{k} {group[k]:.6g}" if isinstance(group[k], float) else f"{k} {group[k]}"
                for k in keys
                if k in group
            )
            rows += [
                (n, str(tuple(p.shape)), settings)
                for n, p in zip(group["param_names"], group["params"], strict=True)
            ]
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        lines = [
            f"{n:<{widths[0]}}  {shape:<{widths[1]}}  {settings}" for n, shape, settings in rows
        ]
        title = " + ".join(
            type(o).__name__ for o in getattr(self.optimizer, "optimizers", [self.optimizer])
        )
        return "\n".join([title, *lines]) + "\n"

    def last_backward(self) -> Any:
        return nullcontext()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, *, loss: Tensor | None = None) -> None:
        """One step with the average of all ranks' gradients; one absent on some ranks is zero there, on all it is absent. Waits for the device. Where one or the loss is not finite nothing changes, and check_finite() says which."""
        self.check_finite()
        if self._ranks.size > 1:
            weights = [p for _, p in self._weights()]
            there = torch.tensor(
                [p.grad is not None for p in weights], dtype=torch.float32, device=weights[0].device
            )
            for p, somewhere in zip(weights, self._ranks.maximum(there).tolist(), strict=True):
                if somewhere:
                    p.grad = self._ranks.average(torch.zeros_like(p) if p.grad is None else p.grad)
        found = {n: p.grad for n, p in self._weights() if p.grad is not None}
        if loss is not None:
            found = {"the loss": self._ranks.average(loss.detach().clone()), **found}
        fine = torch.stack(are_finite(list(found.values()))).tolist()
        self._bad = next((n for n, x in zip(found, fine, strict=True) if not x), None)
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
        """Raise NonFiniteError if the last step met a loss or gradient that was not finite. That step changed nothing."""
        bad, self._bad = self._bad, None
        if bad is not None:
            raise NonFiniteError(
                f"{bad if bad == 'the loss' else f'the gradient of {bad}'} is not finite; the step was not taken"
            )

    def settings(self) -> list[dict[str, Any]]:
        return self.optimizer.state_dict()["param_groups"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Whether it is of these parameters: settings are the constructor's, and buffers are read into held()."""
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
        """Buffers for the parameters of these names, by a step of lr 0 and no gradient, which moves no weight."""
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
        """{"<parameter>.<buffer>": piece} of what the optimizer keeps; counters too, as tensors (1,)."""
        state = self.optimizer.state
        return {
            f"{n}.{k}": piece_of(b.view(1) if b.ndim == 0 else b)
            for n, p in self._weights()
            for k, b in state.get(p, {}).items()
            if isinstance(b, Tensor)
        }
