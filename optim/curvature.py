"""Second derivatives of a loss in its weights.

The eigenvalues of the Hessian, and the largest curvature of steps of modular norm 1.
g, H: gradient and Hessian at the weights' present values. d: a direction. All are {name: tensor} in
the shapes of the weights; n: their entries. Units: the loss's per squared unit of the weights, or
of the modular norm.
Sources: [GL] Golub, Van Loan, Matrix Computations, 4th ed., §10.1–10.3; [FW] Lacoste-Julien, arXiv
1607.00345; [MN] arXiv 2405.14813, §3.3; [OO] arXiv 2409.20325.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import NonFiniteError, require
from .modular import ModularNorm

Direction = Mapping[str, Tensor]

# Lanczos takes a remainder for zero if it is at most so many roundings of the largest eigenvalue.
# One more vector of noise would do no harm.
ROUNDINGS = 10


class Hessian:
    """The Hessian of loss() in `weights`, as an operator: hessian(d) is H d, with every name.

    Names left out of d count as zero. loss: () → scalar, on a fixed batch, without randomness.
    weights: float32 or float64, requiring gradients; those that the loss does not use get zeros.
    scales: coordinates v with w = scale · v, by name: numbers, or tensors of the weight's shape, 1
    where left out. Then the gradient is S g and the operator S H S: the weights in another
    parametrization.
    value: the loss. gradient: by name. The graph of the gradient lives as long as this object;
    after a change of the weights make a new one. Raises Refusal, for two evaluations that differ
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
        drawn = not all(map(torch.equal, before, self._random_state()))
        differs = abs(float(again) - self.value) > rounding * abs(self.value)
        differs |= far > rounding * _dot(self.gradient, self.gradient) ** 0.5
        values = f"{self.value!r}, then {float(again)!r} with a gradient {far:.3g} away"
        require(
            not (drawn or differs),
            "Hessian of a loss",
            got="one that draws random numbers" if drawn else values,
            allowed="a loss that gives the same twice",
            fix="model.eval(), so that dropout is off, and one fixed batch",
        )

    def _random_state(self) -> list[Tensor]:
        device = next(iter(self.weights.values())).device
        states = [torch.get_rng_state()]
        return states + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])

    def _check(self, scales: Mapping[str, float | Tensor]) -> None:
        """Raise Refusal for weights or scales of a wrong kind, with the first of them."""
        constant = [repr(k) for k, w in self.weights.items() if not w.requires_grad]
        unknown = [repr(k) for k in sorted(scales.keys() - self.weights.keys())]
        shapes = {k: (torch.Size(), w.shape) for k, w in self.weights.items()}
        misshapen = [
            repr(k)
            for k, scale in scales.items()
            if isinstance(scale, Tensor) and k in shapes and scale.shape not in shapes[k]
        ]
        kinds = {(w.dtype, w.device) for w in self.weights.values()}
        mixed = len(kinds) > 1 or not {t for t, _ in kinds} <= {torch.float32, torch.float64}
        wrong = [
            *(["no weights"] if not kinds else []),
            *(f"{k}, which requires no gradient" for k in constant),
            *(f"a scale for {k}, which is no weight" for k in unknown),
            *(f"a scale of another shape than {k}" for k in misshapen),
            *(
                [f"weights of {', '.join(sorted(f'{t} on {d}' for t, d in kinds))}"]
                if mixed
                else []
            ),
        ]
        require(
            not wrong,
            "Hessian",
            got=next(iter(wrong), None),
            allowed="weights that require gradients, all float32 or all float64, on one device; "
            "scales of some of them",
            fix="dict(model.float().named_parameters())",
        )

    def _evaluate(
        self, loss: Callable[[], Tensor], *, create_graph: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # Fused attention has no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            value = loss()
            require(
                value.numel() == 1,
                "Hessian of a loss",
                got=f"shape {tuple(value.shape)}",
                allowed="a scalar",
                fix="its mean",
            )
            if not torch.isfinite(value).all():
                raise NonFiniteError(f"the loss is {value.item()}, not a finite number")
            weights = list(self.weights.values())
            grads = [torch.zeros_like(w) for w in weights]
            if value.requires_grad:
                options: dict[str, Any] = dict(create_graph=create_graph, materialize_grads=True)
                grads = torch.autograd.grad(value, weights, **options)
        return value.detach(), _finite("the gradient", dict(zip(self.weights, grads, strict=True)))

    def __call__(self, direction: Direction) -> dict[str, Tensor]:
        """Return H d."""
        for k, d in direction.items():
            weight = self.weights.get(k)
            require(
                weight is not None and d.shape == weight.shape,
                f"direction {k!r}",
                got=f"shape {tuple(d.shape)}",
                allowed=", ".join(self.weights) if weight is None else tuple(weight.shape),
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
        product = {k: self.scales[k] * h for k, h in zip(self.weights, out, strict=True)}
        return _finite("the Hessian's product", product)

    def quadratic(self, direction: Direction) -> float:
        """Return dᵀ H d."""
        return _dot(direction, self(direction))

    def flat(self, direction: Direction) -> Tensor:
        """Return a direction as a vector (n,)."""
        return torch.cat([direction[k].reshape(-1) for k in self.weights])

    def unflat(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector (n,) by name, as views."""
        parts = vector.split([w.numel() for w in self.weights.values()])
        pairs = zip(self.weights.items(), parts, strict=True)
        return {k: part.view_as(w) for (k, w), part in pairs}

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return a Gaussian direction, drawn on the generator's device."""
        entries = sum(w.numel() for w in self.weights.values())
        vector = torch.randn(entries, generator=generator, device=generator.device)
        return self.unflat(vector.to(next(iter(self.weights.values()))))


def _finite(what: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{what} of {name} has entries that are not finite")
    return tensors


def _dot(a: Direction, b: Direction) -> float:
    """Return ⟨a, b⟩ over the names of a."""
    return sum(float(_sum(a[k].detach() * b[k])) for k in a)


def _sum(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float64)


def _length(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


@dataclass(frozen=True)
class Eigenvalues:
    """The algebraic ends of a Hessian's spectrum.

    Some eigenvalue is within largest_residual of largest, and likewise smallest. vector: the unit
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
    """Return the ends of the spectrum by Lanczos with full reorthogonalisation [GL, §10.3].

    steps: at most so many products, each of which keeps a vector of n entries. converged, and
    stopped: largest_residual <= tolerance · |largest|, or the subspace is invariant. The error of
    `largest` is then far smaller: its residual squared over the gap to the next. Both ends are the
    subspace's, so never outside of the spectrum; a start that misses an eigenvector misses its
    eigenvalue.
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
        ritz, vectors = torch.linalg.eigh(T)
        values, residuals = ritz.tolist(), (beta * vectors[-1].abs()).tolist()
        noise = ROUNDINGS * torch.finfo(q.dtype).eps * max(values[-1], -values[0])
        invariant = beta <= noise or len(basis) == len(q)
        converged = invariant or residuals[-1] <= tolerance * abs(values[-1])
        if converged or len(basis) >= steps:
            break
    top = torch.zeros_like(q)
    for share, p in zip(vectors[:, -1].tolist(), basis, strict=True):
        top.add_(p, alpha=share)
    return Eigenvalues(
        largest=values[-1],
        smallest=values[0],
        largest_residual=residuals[-1],
        smallest_residual=residuals[0],
        vector=hessian.unflat(top),
        steps=len(basis),
        converged=converged,
    )


@dataclass(frozen=True)
class ModularSharpness:
    """A lower bound on max dᵀHd over the unit ball of a modular norm, never below 0 (at d = 0).

    direction: the d that attains it. values: what the climb from each start reached, negative ones
    as 0. steps: products, of all climbs. converged: within the ball, nothing gains more than
    `tolerance` of the value over the direction, to first order: a local maximum at best.
    """

    value: float
    direction: dict[str, Tensor]
    values: tuple[float, ...]
    steps: int
    converged: bool

    @property
    def spread(self) -> float:
        """Return 1 − lowest/highest value of the starts; 0 where all are 0."""
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
    """Return max dᵀHd over ‖d‖ <= 1, from below: the best of climbs of at most `steps` products.

    A climb moves d towards v = dualize(H d), the generalized power iteration [OO], to the best
    point of the segment between them, which a positive semidefinite H has at v and an indefinite
    one perhaps before [FW]: the value never falls. Starts: the dualized gradient, the eigenvector
    of `top` (computed, coarsely, if left out) scaled to norm 1, and `restarts` random directions,
    dualized. The bound is strict although polar factors are approximate: norm.stiefel polishes each
    v, which makes it almost exact, and the best d is divided by its norm where that still exceeds
    1, before its value is taken anew. Raises Refusal for a weight without a norm.
    """
    starts = [_extreme(norm, hessian.gradient)]
    vector = (top or eigenvalues(hessian, generator=generator, tolerance=0.1)).vector
    vector = {k: v * (norm.radii[k] > 0) for k, v in vector.items()}
    size = norm.norm(vector)
    starts += [{k: v / torch.where(size > 0, size, 1) for k, v in vector.items()}]
    starts += [_extreme(norm, hessian.random(generator)) for _ in range(restarts)]
    climbs = [_climb(hessian, norm, start, steps=steps, tolerance=tolerance) for start in starts]
    best = max(climbs, key=lambda climb: climb.value)
    size = norm.norm(best.direction).clamp(min=1)
    direction = {k: d / size for k, d in best.direction.items()}
    value = hessian.quadratic(direction)
    if value <= 0:
        value, direction = 0.0, {k: torch.zeros_like(d) for k, d in direction.items()}
    values = tuple(max(0.0, climb.value) for climb in climbs)
    steps = 1 + sum(climb.steps for climb in climbs)
    return ModularSharpness(value, direction, values, steps, best.converged)


def _climb(
    hessian: Hessian, norm: ModularNorm, d: dict[str, Tensor], *, steps: int, tolerance: float
) -> ModularSharpness:
    """Return what one climb reaches from d. Its value may be negative."""
    Hd = hessian(d)
    value, converged, used = _dot(d, Hd), False, 1
    while used < steps and not converged:
        v = _extreme(norm, Hd)
        Hv = hessian(v)
        used += 1
        rise = _dot(v, Hd) - value
        # The value at d + t (v − d) is value + 2 t rise + t² bend.
        bend = _dot(v, Hv) - value - 2 * rise
        t = 1.0 if bend >= 0 else min(1.0, max(0.0, rise / -bend))
        gain = t * (2 * rise + t * bend)
        converged = max(2 * rise, gain) <= tolerance * abs(value)
        if gain > 0:
            d, Hd = ({k: torch.lerp(a[k], b[k], t) for k in a} for a, b in ((d, v), (Hd, Hv)))
            value += gain
    return ModularSharpness(value, d, (value,), used, converged)


def _extreme(norm: ModularNorm, G: Direction) -> dict[str, Tensor]:
    """Return the d of modular norm 1 with the largest ⟨G, d⟩."""
    steps = norm.unweighted().dualize(G)
    return {k: norm.radii[k] * norm.norms[k].stiefel(d) for k, d in steps.items()}


@dataclass(frozen=True)
class Along:
    """The loss along d = dualize(g): curvature dᵀHd and dual_norm ‖g‖†.

    Beyond stable_lr a step −lr · d raises a quadratic loss.
    """

    curvature: float
    dual_norm: float
    stable_lr: float


def along(hessian: Hessian, norm: ModularNorm) -> Along:
    """Return curvature, dual norm and stable learning rate along the dualized gradient.

    stable_lr is 2‖g‖†/dᵀHd, in fact 2⟨g, d⟩/dᵀHd, where polar factors are approximate; infinite if
    dᵀHd <= 0.
    """
    d = norm.dualize(hessian.gradient)
    curvature = hessian.quadratic(d)
    stable = 2 * _dot(hessian.gradient, d) / curvature if curvature > 0 else math.inf
    return Along(curvature, float(norm.dual_norm(hessian.gradient)), stable)


def loss_smoothness(norm: ModularNorm, *, sigma: float = 2.0, tau: float = 1.0) -> float | None:
    """Return σα + τ: |dᵀHd| <= this for ‖d‖ <= 1, where weights and inputs are in their unit balls.

    [MN, §3.3]. None where the tree has no α. The loss is σ-Lipschitz and τ-smooth in the network's
    output; the defaults are cross-entropy's, of logits in ℓ∞, whatever multiplies them before: a
    logit scale is a bond of the tree, and α counts it.
    """
    constants = norm.smoothness()
    return None if constants is None else sigma * constants[0] + tau
