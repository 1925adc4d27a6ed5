"""The geometry of a step: weights, gradients and steps in the norms of their tensors.

Measured at logged steps only, with the largest attention logit of each layer.

n: weights of one norm, shape and dtype, measured together as a stack (n, *shape).
(B, H, T, K) as in model.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, isnan, nan
from typing import Any

import torch
from torch import Tensor, nn

from model import Attention
from optim import Dualized, ModularNorm, Normalized
from optim.directions import DIRECTIONS
from optim.metrize import canonical
from optim.norms import Norm, Spectral
from optim.ranks import sharded

from .baseline import Baseline

# Entries of a stack at most, 256 MB: large models are measured in parts.
STACK = 2**26
QUANTITIES = (
    "step",
    "relative_step",
    "weight_norm",
    "grad_dual_norm",
    "orthogonality",
    "max_attention_logit",
)
# (quantity, names of the tensors, a number for each of them)
Measurement = tuple[str, Sequence[str], Tensor]


# ---- norms of stacks


def whole(p: Tensor) -> Tensor:
    """Return a weight, gathered where it is sharded."""
    return (p.full_tensor() if sharded(p) else p).detach()  # type: ignore[attr-defined]


def spectral(norm: Norm) -> bool:
    """Return whether a step of this norm is made of polar factors."""
    inner = getattr(norm, "inner", None)
    return isinstance(norm, Spectral) if inner is None else spectral(inner)


def lying_blocks(norm: Norm, W: Tensor) -> list[tuple[Tensor, float]]:
    """Return [(X (n, blocks, O, I), unit)], O <= I: the matrices in a stack of a spectral norm.

    unit: the singular values that dualize gives them.
    """
    return [(X if X.shape[-2] <= X.shape[-1] else X.mT, unit) for X, unit in norm.matrices(W)]


def by_eigenvalues(norm: Norm, W: Tensor) -> bool:
    """Return whether singular values come from LAPACK.

    On a CPU it takes a quarter to a half of the time of matrix products at width 512, and no more
    at 64.
    """
    return W.device.type == "cpu" and spectral(norm)


def singular_values(X: Tensor) -> Tensor:
    """Return (…, O) of (…, O, I), O <= I, from the eigenvalues of X Xᵀ.

    They are within √(rounding) of the largest.
    """
    largest = X.abs().amax(dim=(-2, -1), keepdim=True)
    X = X / torch.where(largest > 0, largest, 1)
    return torch.linalg.eigvalsh(X @ X.mT).clamp(min=0).sqrt() * largest[..., 0]


def primal_norm(norm: Norm, W: Tensor) -> Tensor:
    """Return ‖W‖ (n,) of a stack (n, *shape), within 1e-3."""
    if not by_eigenvalues(norm, W):
        return norm.size(W)
    return torch.stack(
        [singular_values(X).amax((1, 2)) / unit for X, unit in lying_blocks(norm, W)]
    ).amax(0)


def dual_norm(norm: Norm, G: Tensor) -> Tensor:
    """Return ‖G‖† (n,) of a stack (n, *shape).

    Of spectral norms it is within 1e-6 on a CPU. Elsewhere it is ⟨G, T⟩, T the schedule's polar
    factor polished, which is too small by a part of what singular values under 1e-4 ‖G‖_F add up
    to: 1 in 100 where they are spread evenly over six decades.
    """
    if by_eigenvalues(norm, G):
        return torch.stack(
            [singular_values(X.double()).sum((1, 2)) * unit for X, unit in lying_blocks(norm, G)]
        ).sum(0)
    return (G * norm.stiefel(G)).flatten(1).sum(-1) if spectral(norm) else norm.dual_norm(G)


def finite(measure: Callable[[Norm, Tensor], Tensor], norm: Norm, W: Tensor) -> Tensor:
    """Return measure(norm, W), NaN where a weight is not finite: LAPACK would raise."""
    ok = W.reshape(len(W), -1).isfinite().all(-1)
    return measure(norm, torch.where(ok.view(-1, *(1,) * norm.ndim), W, 0)).masked_fill(~ok, nan)


def residual(norm: Norm, U: Tensor) -> Tensor:
    """Return ‖PPᵀ − I‖_F / √m (n,) over the m rows of the polar factors P in U (n, *shape).

    That is the RMS of σ² − 1, all blocks together; columns take the place of rows in a tall P.
    """
    squares, sides = torch.zeros(len(U)).to(U), 0
    for X, unit in lying_blocks(norm, U):
        A = (X @ X.mT).div_(unit**2)
        A.diagonal(dim1=-2, dim2=-1).sub_(1)
        squares, sides = squares + A.square().sum((1, 2, 3)), sides + A.shape[1] * A.shape[2]
    return (squares / sides).sqrt()


def beside_decay(norm: Norm, moved: Tensor, old: Tensor, decay: Tensor) -> Tensor:
    """Return what a step did beside W ← W − decay · W.

    What did not move did not decay either: rows, or whole tensors, without a gradient.
    """
    return torch.where(norm.live(moved), moved + decay * old, 0)


def _precise(W: Tensor) -> Tensor:
    return W.to(torch.promote_types(W.dtype, torch.float32))


# ---- attention


@torch.no_grad()
def attention_logits(model: nn.Module, idx_BT: Tensor) -> dict[str, Tensor]:
    """Return {layer: the largest |scale · ⟨q, k⟩| over heads and causal pairs, 0-dim}.

    Computed without dropout, in the weights' precision. A model without model.py's Attention has
    none.
    """
    largest: dict[str, Tensor] = {}

    def watch(name: str, attention: Attention) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            q_BHTK, k_BHTK, _ = attention.heads(args[0], args[1])
            logits_BHTT = attention.scale * (q_BHTK.float() @ k_BHTK.float().mT)
            largest[name] = logits_BHTT.tril_().abs_().amax()

        return attention.register_forward_pre_hook(record)

    hooks = [watch(canonical(n), m) for n, m in model.named_modules() if isinstance(m, Attention)]
    training = model.training
    try:
        if hooks:
            model.eval()(idx_BT)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return largest


# ---- a step


@dataclass(frozen=True)
class Request:
    """A step as it was requested of the optimizer.

    size: lr · radius. decay: the share of the weight that decays. polar: whether the step of a
    spectral norm is `size` times polar factors.
    """

    size: float = 0.0
    decay: float = 0.0
    polar: bool = False


class Geometry:
    """Measures one step: call before(), optimizer.step(), after(); on all ranks if sharded.

    optimizer: any of torch's, or a Baseline. norm: has all trainable weights of the model. Together
    the two calls take as long as half a training step at width 64, and as one at width 512 (one
    core, 1,024 tokens a step).
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | Baseline, norm: ModularNorm
    ) -> None:
        self.model, self.norm = model, norm
        self.optimizer = optimizer.optimizer if isinstance(optimizer, Baseline) else optimizer
        self.weights = {canonical(n): p for n, p in model.named_parameters() if p.requires_grad}
        alike: dict[tuple[Any, ...], list[str]] = {}
        for name, p in self.weights.items():
            alike.setdefault((norm.norms[name], p.shape, p.dtype), []).append(name)
        self.stacks: list[tuple[Norm, list[str]]] = []
        for (each, shape, _), names in alike.items():
            most = max(1, STACK // shape.numel())
            self.stacks += [(each, names[i : i + most]) for i in range(0, len(names), most)]
        self.old: dict[str, Tensor] = {}
        self.grad_dual_norms: list[Tensor] = []  # of each stack

    @torch.no_grad()
    def before(self) -> None:
        """Copy the weights and measure their gradients, after the backward pass."""
        self.old = {n: p.detach().clone() for n, p in self.weights.items()}  # shards, if sharded
        self.grad_dual_norms = [
            finite(dual_norm, norm, self._gradients(names)) for norm, names in self.stacks
        ]

    @torch.no_grad()
    def after(self, idx_BT: Tensor | None = None) -> dict[str, Any]:
        """Measure the step. Return {quantity: {tensor: number}} and two totals.

        None stands for what is not defined or not finite, as 0/0. Sizes are within 1e-3.

        step: ‖ΔW‖ / (lr · radius), achieved over requested, of what the step did beside weight
            decay, a constraint's retraction included. 0 is what did not move. A direction with
            coordinates of its own ("factored") takes steps of the requested size there; carried
            back, those of matrices were 1.6 to 3.8 times it, in 60 steps of a GPT of width 64.
            Dualized and Normalized only, as no other step has a requested size.
        orthogonality: the residual of the polar factors P in that step, ΔW = lr · radius · scale ·
            P; see residual(). 0 is exact, a schedule whose band is [a, b] has at most max(1 − a²,
            b² − 1), and each direction that P lacks adds 1 to the mean of squares: rank r of m
            alone gives √(1 − r/m). Retractions and the rounding of 16-bit weights are in it.
            Dualized with spectral norms, unit scale and steps that are not carried back only.
        weight_norm: ‖W‖ after the step. relative_step: the whole change, decay included, over that.
        grad_dual_norm: ‖g‖† of p.grad before the step, 0 where there is none; where gradients are
            local, of this rank's share of the batch.
        modular_weight_norm, modular_grad_dual_norm: max ‖W‖ / radius, of weights that have one, and
            Σ radius · ‖g‖†.
        max_attention_logit: by layer, the largest |logit| over causal pairs of these sequences at
            the new weights, if they are given and the model has model.py's Attention.
        """
        requests = self._requests()
        measurements: list[Measurement] = []
        for (norm, names), dual in zip(self.stacks, self.grad_dual_norms, strict=True):
            measurements.append(("grad_dual_norm", names, dual))
            measurements += self._measure(norm, names, requests)
        self.old, self.grad_dual_norms = {}, []
        logits = attention_logits(self.model, idx_BT) if idx_BT is not None else {}
        measurements += [
            ("max_attention_logit", [name], logit.reshape(1)) for name, logit in logits.items()
        ]
        return self._tables(_read(measurements), requests)

    def _measure(
        self, norm: Norm, names: Sequence[str], requests: Mapping[str, Request]
    ) -> list[Measurement]:
        """Return the measurements of a stack's weights and of their step."""
        old = _precise(torch.stack([whole(self.old[n]) for n in names]))
        new = _precise(torch.stack([whole(self.weights[n]) for n in names]))
        step = new - old
        moved = achieved = finite(primal_norm, norm, step)
        measurements: list[Measurement] = [
            ("weight_norm", names, finite(primal_norm, norm, new)),
            ("moved", names, moved),
        ]
        if not requests:
            return measurements
        asked = [requests.get(n, Request()) for n in names]
        sizes, decay = (
            torch.tensor(column).to(old).view(-1, *(1,) * norm.ndim)
            for column in zip(*((r.size, r.decay) for r in asked), strict=True)
        )
        if any(r.decay for r in asked):
            step = beside_decay(norm, step, old, decay)
            achieved = finite(primal_norm, norm, step)
        measurements.append(("step", names, achieved))
        if spectral(norm) and all(r.polar for r in asked):
            measurements.append(("orthogonality", names, residual(norm, step / sizes)))
        return measurements

    def _gradients(self, names: Sequence[str]) -> Tensor:
        ps = [self.weights[n] for n in names]
        return _precise(
            torch.stack([whole(torch.zeros_like(p) if p.grad is None else p.grad) for p in ps])
        )

    def _requests(self) -> dict[str, Request]:
        """Return the requested step of each tensor whose optimizer has one."""
        o, requests = self.optimizer, {}
        if isinstance(o, Dualized | Normalized):
            unit = (o.step_size or 1.0) if isinstance(o, Dualized) else 1.0
            for group in o.param_groups:
                decay = group["weight_decay"] if isinstance(o, Dualized) else o.weight_decay
                if decay and isinstance(o, Dualized) and group["cautious"]:
                    continue  # which entries decayed is not known here
                polar = (
                    isinstance(o, Dualized)
                    and group["scale"] == "unit"
                    and not DIRECTIONS[group["direction"]].own_coordinates
                )
                for name in group["param_names"]:
                    size = float(group["lr"]) * unit * self.norm.radii[name]
                    requests[name] = Request(size, size * decay, polar)
        return requests

    def _tables(
        self, numbers: dict[str, dict[str, float]], requests: Mapping[str, Request]
    ) -> dict[str, Any]:
        """Return the tables of after(), tensors in the order of the network."""
        weights, radii, moved = numbers["weight_norm"], self.norm.radii, numbers.pop("moved")
        numbers["relative_step"] = {n: moved[n] / x if x else nan for n, x in weights.items()}
        for name, x in numbers.get("step", {}).items():
            # The rest of a weight that only decayed is rounding, some 1e-7 of it.
            dtype = torch.promote_types(self.weights[name].dtype, torch.float32)
            rounding = 4 * torch.finfo(dtype).eps * weights[name]
            size = requests[name].size if name in requests else 0.0
            numbers["step"][name] = 0.0 if not size or x <= rounding else x / size
        for name in numbers.get("orthogonality", {}):
            if not numbers["step"][name]:
                numbers["orthogonality"][name] = nan
        sizes = [x / radii[n] for n, x in weights.items() if radii[n]]
        totals = {
            "modular_weight_norm": nan if any(map(isnan, sizes)) else max(sizes, default=0.0),
            "modular_grad_dual_norm": sum(
                radii[n] * x for n, x in numbers["grad_dual_norm"].items()
            ),
        }
        tables = {
            quantity: {
                n: six_digits(numbers[quantity][n])
                for n in (*self.weights, *numbers[quantity])
                if n in numbers[quantity]
            }
            for quantity in QUANTITIES
            if quantity in numbers
        }
        return tables | {k: six_digits(v) for k, v in totals.items()}


def _read(measurements: Sequence[Measurement]) -> dict[str, dict[str, float]]:
    """Return {quantity: {tensor: number}}, read all at once: each reading waits for the device."""
    values = iter(torch.cat([v for *_, v in measurements]).tolist())
    tables: dict[str, dict[str, float]] = {}
    for quantity, names, _ in measurements:
        tables.setdefault(quantity, {}).update((n, next(values)) for n in names)
    return tables


def six_digits(x: float) -> float | None:
    """Return six digits of x, or None for what JSON has no number for."""
    return float(f"{x:.6g}") if isfinite(x) else None
