"""Second derivatives of a loss in its weights: eigenvalues of the Hessian, and the largest
curvature of steps of modular norm 1.

g, H: gradient and Hessian at the weights' present values. d: a direction. All are {name: tensor} in
the shapes of the weights; n: their entries.
Units: the loss's per squared unit of the weights, or of the modular norm.
Sources: [GL] Golub, Van Loan, Matrix Computations, 4th ed., §10.1–10.3; [FW] Lacoste-Julien, arXiv
1607.00345; [MN] arXiv 2405.14813, §3.3; [OO] arXiv 2409.20325.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import NonFiniteError, Refusal
from .modular import ModularNorm

Direction = Mapping[str, Tensor]

ROUNDINGS = 10  # of Lanczos: a remainder of so many roundings of the largest eigenvalue is none; one more vector of noise would do no harm


class Hessian:
    """The Hessian of loss() in `weights`, as an operator: hessian(d) is H d, with every name; names
    left out of d count as zero.

    loss: () → scalar, on a fixed batch, without randomness. weights: float32 or float64, requiring
    gradients; those that the loss does not use get zeros. scales: coordinates v with w = scale · v,
    by name: numbers, or tensors of the weight's shape, 1 where left out. Then the gradient is S g
    and the operator S H S: the weights in another parametrization.
    value: the loss. gradient: by name. The graph of the gradient lives as long as this object;
    after a change of the weights make a new one. Raises ValueError, for two evaluations that differ
    too, and NonFiniteError, with the tensor's name.
    """

    def __init__(
        self,
        loss: Callable[[], Tensor],
        weights: Mapping[str, Tensor],
        scales: Mapping[str, float | Tensor] | None = None,
    ) -> None:
        self.weights, self.scales = dict(weights), {k: (scales or {}).get(k, 1.0) for k in weights}
        self._check(scales or {})
        value, grads = self._evaluate(loss, create_graph=True)
        self.value = float(value)
        self.gradient = {k: self.scales[k] * g.detach() for k, g in grads.items()}
        self._differentiable = {k: g for k, g in grads.items() if g.requires_grad}
        before = self._random_state()
        again, grads = self._evaluate(loss, create_graph=False)
        # With an output projection of zeros another batch may leave the loss as it is, but not the
        # gradient, and dropout both, but not random states. Sums in another order change far less
        # than √ε.
        change = {k: self.scales[k] * g - self.gradient[k] for k, g in grads.items()}
        rounding, far = torch.finfo(value.dtype).eps ** 0.5, _dot(change, change) ** 0.5
        drawn = any(
            not torch.equal(a, b) for a, b in zip(before, self._random_state(), strict=True)
        )
        if (
            drawn
            or abs(float(again) - self.value) > rounding * abs(self.value)
            or far > rounding * _dot(self.gradient, self.gradient) ** 0.5
        ):
            got = (
                "one that draws random numbers"
                if drawn
                else f"{self.value!r}, then {float(again)!r} with a gradient {far:.3g} away"
            )
            raise Refusal(
                "Hessian of a loss",
                got=got,
                allowed="a loss that gives the same twice",
                fix="model.eval(), so that dropout is off, and one fixed batch",
            )

    def _random_state(self) -> list[Tensor]:
        device = next(iter(self.weights.values())).device
        return [torch.get_rng_state()] + (
            [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        )

    def _check(self, scales: Mapping[str, float | Tensor]) -> None:
        kinds = {(w.dtype, w.device) for w in self.weights.values()}
        dtypes = {dtype for dtype, _ in kinds}
        constant = [k for k, w in self.weights.items() if not w.requires_grad]
        unknown = sorted(scales.keys() - self.weights.keys())
        odd = [
            k
            for k, s in scales.items()
            if isinstance(s, Tensor)
            and k in self.weights
            and s.shape not in ((), self.weights[k].shape)
        ]
        got = (
            "no weights"
            if not kinds
            else f"{constant[0]!r}, which requires no gradient"
            if constant
            else None
        )
        got = got or (f"a scale for {unknown[0]!r}, which is no weight" if unknown else None)
        got = got or (f"a scale of another shape than {odd[0]!r}" if odd else None)
        got = got or (
            f"weights of {', '.join(sorted(f'{t} on {d}' for t, d in kinds))}"
            if len(kinds) > 1 or not dtypes <= {torch.float32, torch.float64}
            else None
        )
        if got:
            raise Refusal(
                "Hessian",
                got=got,
                allowed="weights that require gradients, all float32 or all float64, on one device; scales of some of them",
                fix="dict(model.float().named_parameters())",
            )

    def _evaluate(
        self, loss: Callable[[], Tensor], *, create_graph: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with (
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):  # fused attention has no second derivative
            value = loss()
            if value.numel() != 1:
                raise Refusal(
                    "Hessian of a loss",
                    got=f"shape {tuple(value.shape)}",
                    allowed="a scalar",
                    fix="its mean",
                )
            if not torch.isfinite(value).all():
                raise NonFiniteError("the loss", got=value.item(), allowed="finite numbers")
            weights = list(self.weights.values())
            grads = (
                torch.autograd.grad(
                    value, weights, create_graph=create_graph, materialize_grads=True
                )
                if value.requires_grad
                else [torch.zeros_like(w) for w in weights]
            )
        return value.detach(), _finite("the gradient", dict(zip(self.weights, grads, strict=True)))

    def __call__(self, direction: Direction) -> dict[str, Tensor]:
        """H d."""
        for k, d in direction.items():
            if k not in self.weights or d.shape != self.weights[k].shape:
                allowed = (
                    tuple(self.weights[k].shape) if k in self.weights else ", ".join(self.weights)
                )
                raise Refusal(
                    f"direction {k!r}",
                    got=f"shape {tuple(d.shape)}",
                    allowed=allowed,
                    fix="the names and shapes of the weights",
                )
        moved = [k for k in self._differentiable if k in direction]
        if not moved:
            return {k: torch.zeros_like(w) for k, w in self.weights.items()}
        with sdpa_kernel(SDPBackend.MATH):  # checkpointed blocks run again
            out = torch.autograd.grad(
                [self._differentiable[k] for k in moved],
                list(self.weights.values()),
                [self.scales[k] * direction[k] for k in moved],
                retain_graph=True,
                materialize_grads=True,
            )
        return _finite(
            "the Hessian's product",
            {k: self.scales[k] * h for k, h in zip(self.weights, out, strict=True)},
        )

    def quadratic(self, direction: Direction) -> float:
        """dᵀ H d."""
        return _dot(direction, self(direction))

    def flat(self, direction: Direction) -> Tensor:
        """(n,)."""
        return torch.cat([direction[k].reshape(-1) for k in self.weights])

    def unflat(self, vector: Tensor) -> dict[str, Tensor]:
        """(n,) → by name: views."""
        parts = vector.split([w.numel() for w in self.weights.values()])
        return {
            k: part.view_as(w) for (k, w), part in zip(self.weights.items(), parts, strict=True)
        }

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A Gaussian direction, drawn on the generator's device."""
        vector = torch.randn(
            sum(w.numel() for w in self.weights.values()),
            generator=generator,
            device=generator.device,
        )
        return self.unflat(vector.to(next(iter(self.weights.values()))))


def _finite(what: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"{what} of {name}", got="entries that are not finite", allowed="finite numbers"
            )
    return tensors


def _dot(a: Direction, b: Direction) -> float:
    """⟨a, b⟩ over the names of a."""
    return sum(float(_sum(a[k].detach() * b[k])) for k in a)


def _sum(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float64)


def _length(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


@dataclass(frozen=True)
class Eigenvalues:
    """The algebraic ends of a Hessian's spectrum.

    Some eigenvalue is within largest_residual of largest, and likewise smallest. vector: unit
    eigenvector of largest, by name. steps: products.
    """

    largest: float
    smallest: float
    largest_residual: float
    smallest_residual: float
    vector: dict[str, Tensor]
    steps: int
    converged: bool


def eigenvalues(
    hessian: Hessian, *, generator: torch.Generator, steps: int = 100, tolerance: float = 1e-3
) -> Eigenvalues:
    """By Lanczos with full reorthogonalisation [GL, §10.3]. steps: at most so many products, each
    of which keeps a vector of n entries.

    converged, and stopped: largest_residual <= tolerance · |largest|, or the subspace is invariant.
    The error of `largest` is then far smaller: its residual squared over the gap to the next. Both
    ends are the subspace's, so never outside of the spectrum; a start that misses an eigenvector
    misses its eigenvalue.
    """
    q = hessian.flat(hessian.random(generator))
    basis: list[Tensor] = []
    T = torch.zeros(0, 0, dtype=torch.float64)
    beta = _length(q)
    while True:
        basis.append(q / beta)
        q = hessian.flat(hessian(hessian.unflat(basis[-1])))
        T = torch.nn.functional.pad(T, (0, 1, 0, 1))
        T[-1, -1] = _sum(basis[-1] * q)
        if len(basis) > 1:
            T[-1, -2] = T[-2, -1] = beta
        for p in 2 * basis:  # twice is enough (Parlett, The Symmetric Eigenvalue Problem, §6.9)
            q = q - _sum(p * q).to(q) * p
        beta = _length(q)
        found, vectors = torch.linalg.eigh(T)
        values, residuals = found.tolist(), (beta * vectors[-1].abs()).tolist()
        invariant = beta <= ROUNDINGS * torch.finfo(q.dtype).eps * max(
            values[-1], -values[0]
        ) or len(basis) == len(q)
        converged = invariant or residuals[-1] <= tolerance * abs(values[-1])
        if converged or len(basis) >= steps:
            top = torch.zeros_like(q)
            for share, p in zip(vectors[:, -1].tolist(), basis, strict=True):
                top.add_(p, alpha=share)
            return Eigenvalues(
                values[-1],
                values[0],
                residuals[-1],
                residuals[0],
                hessian.unflat(top),
                len(basis),
                converged,
            )


@dataclass(frozen=True)
class ModularSharpness:
    """A lower bound on max dᵀHd over the unit ball of a modular norm, never below 0, the value at d
    = 0.

    direction: the d that attains it. values: what the climb from each start reached, negative ones
    as 0. steps: products, of all climbs.
    converged: within the ball, nothing gains more than `tolerance` of the value over the direction,
    to first order: a local maximum at best.
    """

    value: float
    direction: dict[str, Tensor]
    values: tuple[float, ...]
    steps: int
    converged: bool

    @property
    def spread(self) -> float:
        """1 − lowest/highest value of the starts; 0 where all are 0."""
        return 1 - min(self.values) / max(self.values) if any(self.values) else 0.0


def modular_sharpness(
    hessian: Hessian,
    norm: ModularNorm,
    *,
    generator: torch.Generator,
    restarts: int = 2,
    steps: int = 30,
    tolerance: float = 1e-3,
    top: Eigenvalues | None = None,
) -> ModularSharpness:
    """max dᵀHd over ‖d‖ <= 1, from below: the best of climbs of at most `steps` products each.

    A climb moves d towards v = dualize(H d), the generalized power iteration [OO], to the best
    point of the segment between them, which a positive semidefinite H has at v and an indefinite
    one perhaps before [FW]: the value never falls. Starts: the dualized gradient, the eigenvector
    of `top` (computed, coarsely, if left out) scaled to norm 1, and `restarts` random directions,
    dualized. The bound is strict although polar factors are approximate: norm.stiefel polishes each
    v, which makes it almost exact, and the best d is divided by its norm where that still exceeds
    1, before its value is taken anew. Raises ValueError for a weight without a norm.
    """
    starts = [_extreme(norm, hessian.gradient)]
    vector = (top or eigenvalues(hessian, generator=generator, tolerance=0.1)).vector
    vector = {k: v * (norm.radii[k] > 0) for k, v in vector.items()}
    size = norm.norm(vector)
    starts += [{k: v / torch.where(size > 0, size, 1) for k, v in vector.items()}]
    starts += [_extreme(norm, hessian.random(generator)) for _ in range(restarts)]
    climbs = [_climb(hessian, norm, start, steps=steps, tolerance=tolerance) for start in starts]
    best = max(climbs, key=lambda climb: climb.value)
    size = norm.norm(best.d).clamp(min=1)
    direction = {k: d / size for k, d in best.d.items()}
    value = hessian.quadratic(direction)
    if value <= 0:
        value, direction = 0.0, {k: torch.zeros_like(d) for k, d in direction.items()}
    values = tuple(max(0.0, climb.value) for climb in climbs)
    return ModularSharpness(
        value, direction, values, 1 + sum(climb.steps for climb in climbs), best.converged
    )


@dataclass(frozen=True)
class _Climb:
    value: float
    d: dict[str, Tensor]
    steps: int
    converged: bool


def _climb(
    hessian: Hessian, norm: ModularNorm, d: dict[str, Tensor], *, steps: int, tolerance: float
) -> _Climb:
    Hd = hessian(d)
    value, converged, used = _dot(d, Hd), False, 1
    while used < steps and not converged:
        v = _extreme(norm, Hd)
        Hv = hessian(v)
        used += 1
        rise = _dot(v, Hd) - value
        bend = (
            _dot(v, Hv) - value - 2 * rise
        )  # the value at d + t (v − d) is value + 2 t rise + t² bend
        t = 1.0 if bend >= 0 else min(1.0, max(0.0, rise / -bend))
        gain = t * (2 * rise + t * bend)
        converged = max(2 * rise, gain) <= tolerance * abs(value)
        if gain > 0:
            d, Hd = ({k: torch.lerp(a[k], b[k], t) for k in a} for a, b in ((d, v), (Hd, Hv)))
            value += gain
    return _Climb(value, d, used, converged)


def _extreme(norm: ModularNorm, G: Direction) -> dict[str, Tensor]:
    """The d of modular norm 1 with the largest ⟨G, d⟩."""
    return {
        k: norm.radii[k] * norm.norms[k].stiefel(d) for k, d in norm.unweighted().dualize(G).items()
    }


@dataclass(frozen=True)
class Along:
    """The loss along d = dualize(g): curvature dᵀHd, dual_norm ‖g‖†, and stable_lr, beyond which a
    step −lr · d raises a quadratic loss."""

    curvature: float
    dual_norm: float
    stable_lr: float


def along(hessian: Hessian, norm: ModularNorm) -> Along:
    """Along the dualized gradient. stable_lr: 2‖g‖†/dᵀHd, in fact 2⟨g, d⟩/dᵀHd, where polar factors
    are approximate; infinite if dᵀHd <= 0."""
    d = norm.dualize(hessian.gradient)
    curvature = hessian.quadratic(d)
    stable = 2 * _dot(hessian.gradient, d) / curvature if curvature > 0 else math.inf
    return Along(curvature, float(norm.dual_norm(hessian.gradient)), stable)


def loss_smoothness(norm: ModularNorm, *, sigma: float = 2.0, tau: float = 1.0) -> float | None:
    """σα + τ: |dᵀHd| <= this for ‖d‖ <= 1, where weights and inputs are in their unit balls [MN,
    §3.3]; None where the tree has no α.

    The loss is σ-Lipschitz and τ-smooth in the network's output; the defaults are cross-entropy's,
    of logits in ℓ∞, whatever multiplies them before: a logit scale is a bond of the tree, and α
    counts it.
    """
    constants = norm.smoothness()
    return None if constants is None else sigma * constants[0] + tau
