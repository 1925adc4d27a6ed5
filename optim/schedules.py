"""Learning rate and momentum over a run, decays by half-lives, and the escape velocity.

Schedules are pure functions of the step, multipliers of lr from 0 to 1. Step 0 is the first of
`total`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from .errors import require
from .settings import OneOf, Range, check, defaults_of, known, takes

SCHEDULES: dict[str, Callable[..., float]] = {}


def register_schedule(function: Callable[..., float]) -> Callable[..., float]:
    """Make a schedule known by its function's name, so that configurations can name it."""
    SCHEDULES[function.__name__] = function
    return function


@dataclass(kw_only=True)
class Schedule:
    """How the learning rate and the momentum change over a run."""

    shape: Annotated[str, OneOf(SCHEDULES)] = "wsd"
    """"wsd": linear warm-up, stable, linear cooldown (Hägele et al., arXiv 2405.18392). "cosine":
    linear warm-up, then half a cosine (Loshchilov, Hutter, arXiv 1608.03983)."""

    warmup: Annotated[float, Range(0)] = 0.0
    """Steps of the warm-up; below 1, a fraction of all steps."""

    cooldown: Annotated[float, Range(0, 1, closed=True)] = 0.5
    """wsd: the last fraction of all steps, over which lr falls to 0. cosine: the depth of its
    fall."""

    power: Annotated[float, Range(0, above=True)] = 1.0
    """wsd: the power of what is left of the cooldown; 1 is linear."""

    beta_low: Annotated[float, Range(0, 1)] = 0.85
    """Where beta starts and ends, if it is warmed up or cooled down."""

    beta_warmup: Annotated[float, Range(0, 1, closed=True)] = 0.0
    """The first fraction of all steps, over which beta rises from beta_low."""

    beta_cooldown: Annotated[float, Range(0, 1, closed=True)] = 0.0
    """The last fraction of all steps, over which beta falls to beta_low."""

    def lr_at(self, step: int, total: int) -> float:
        """Return the multiplier of lr at this step."""
        multiplier = SCHEDULES[self.shape]
        return multiplier(step, total, warmup=self.warmup, cooldown=self.cooldown, power=self.power)

    def beta_at(self, step: int, total: int, *, beta: float) -> float:
        """Return the decay of the average of gradients at this step, `beta` at the top."""
        return momentum_at(
            step,
            total,
            beta=beta,
            low=self.beta_low,
            warmup=self.beta_warmup,
            cooldown=self.beta_cooldown,
        )


@register_schedule
def wsd(step: int, total: int, *, warmup: float, cooldown: float, power: float = 1.0) -> float:
    """Return min(warm-up, what is left of the cooldown ** power); 1 between the two.

    power 1.2 is the NanoGPT speedrun's optimization track's.
    """
    left = (total - step) / max(1, round(cooldown * total)) if cooldown else 1.0
    return min(1.0, (step + 1) / max(1, _steps(warmup, total)), max(0.0, left) ** power)


@register_schedule
def cosine(step: int, total: int, *, warmup: float, cooldown: float, power: float = 1.0) -> float:
    """Return a linear warm-up, then half a cosine from 1 down to 1 − cooldown."""
    warmup = _steps(warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1 - cooldown * (1 - math.cos(math.pi * progress)) / 2


def _steps(warmup: float, total: int) -> int:
    return round(warmup * total if warmup < 1 else warmup)


def momentum_at(
    step: int, total: int, *, beta: float, low: float, warmup: float, cooldown: float
) -> float:
    """Return beta, or less: it rises from `low` over the first `warmup` fraction of all steps, and
    falls back to it over the last `cooldown` fraction, linearly."""
    if not warmup and not cooldown:
        return beta
    up = (step + 1) / (warmup * total) if warmup else 1.0
    down = (total - step) / (cooldown * total) if cooldown else 1.0
    return low + (beta - low) * min(1.0, up, down)


def half_life(tokens: float, *, per_step: float) -> float:
    """Return the decay, as beta and beta2 are, of an average whose parts halve in so many tokens.

    It is 0.5 ** (per_step / tokens), where a step has per_step tokens. Half-lives in tokens can
    stay as they are when the batch changes; decays cannot (Marek et al., arXiv 2507.07101).
    """
    for name, value in (("tokens", tokens), ("per_step", per_step)):
        require(
            0 < value < math.inf,
            f"half_life: {name}",
            got=value,
            allowed="a finite number > 0",
            fix="half_life(1e6, per_step=65536)",
        )
    return round(0.5 ** (per_step / tokens), 12)  # alike on machines whose powers differ a little


@takes(Schedule)
def schedule(optimizer: torch.optim.Optimizer, total_steps: int, **settings: Any) -> LambdaLR:
    """Return a torch scheduler of the learning rate: one step() of it after each of the
    optimizer's."""
    known("schedule", settings, defaults_of(Schedule))
    check(Schedule, settings, owner="schedule")
    shape = Schedule(**settings)
    return LambdaLR(optimizer, lambda step: shape.lr_at(min(step, total_steps - 1), total_steps))


@dataclass(frozen=True)
class EscapeVelocity:
    """A step size from the distance travelled: η ← max(η, factor · ⟨g, w₀ − w⟩ / ‖g‖†).

    ‖g‖† is the modular dual norm of the whole network. g: the fresh gradient, not the direction,
    which correlates with its own past steps, whatever they were worth. w₀: the weights at the first
    step. While the gradient keeps its direction η grows by 1 + factor a step, or about that where
    steps are dualized in coordinates of the direction's own; by Hölder η is at most max(initial,
    factor · ‖w₀ − w‖). With the largest-entry norm, factor 1 and no momentum this
    is Prodigy's rule without averages (Mishchenko, Defazio, arXiv 2306.06101; Bernstein, Newhouse,
    arXiv 2409.20325).

    Not for short runs: η grows only while gradients agree with the way travelled. Of seven small
    models three stood at `initial` after 50 steps, and six were within 11 % of the loss of the best
    rate after 500 (ResNet: within 0.001); the LSTM's was too large (docs/log.md, 2026-11-28, "Which
    learning rates for other people's models?").
    """

    initial: Annotated[float, Range(0, above=True)] = 0.1
    """The step size before anything is known."""

    factor: Annotated[float, Range(0, above=True)] = 0.5
    """How much of what was travelled a step may be."""

    def __post_init__(self) -> None:
        check(EscapeVelocity, vars(self), owner="EscapeVelocity")

    def grow(self, eta: Tensor, travelled: Tensor, dual_norm: Tensor) -> Tensor:
        """Return the next η (0-dim) from ⟨g, w₀ − w⟩ and ‖g‖†."""
        reached = self.factor * travelled / torch.where(dual_norm > 0, dual_norm, 1)
        return torch.maximum(eta, torch.where(torch.isfinite(reached), reached, 0).to(eta))
