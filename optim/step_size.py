"""Step sizes: schedules, and the escape velocity that needs no learning rate.

Schedules are pure functions of the step, multipliers of lr in [0, 1]; step 0 is the first of `total` steps. warmup: steps, or below 1 a fraction of all.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import Refusal


def wsd(step: int, total: int, *, warmup: float, cooldown: float, power: float = 1.0) -> float:
    """Warm-up, stable, decay: linear to 1 over `warmup` steps, then 1, then to 0 over the last `cooldown` fraction of all steps (Hägele et al., arXiv 2405.18392),
    as the power of what is left of it (1.2 is the optimization track's "PowerCool")."""
    left = (total - step) / max(1, round(cooldown * total)) if cooldown else 1.0
    return min(1.0, (step + 1) / max(1, _steps(warmup, total)), max(0.0, left) ** power)


def cosine(step: int, total: int, *, warmup: float, cooldown: float, power: float = 1.0) -> float:
    """Linear warm-up, then half a cosine from 1 down to 1 − cooldown (Loshchilov, Hutter, arXiv 1608.03983). power: of wsd alone."""
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
    """The decay of an average of gradients: from `low` up to beta over the first `warmup` fraction of all steps, and back over the last `cooldown` fraction, linearly."""
    if not warmup and not cooldown:
        return beta
    up = (step + 1) / (warmup * total) if warmup else 1.0
    down = (total - step) / (cooldown * total) if cooldown else 1.0
    return low + (beta - low) * min(1.0, up, down)


SCHEDULES: dict[str, Callable[..., float]] = {"wsd": wsd, "cosine": cosine}


@dataclass(frozen=True)
class EscapeVelocity:
    """A step size from the distance travelled: η ← max(η, factor · ⟨g, w₀ − w⟩ / ‖g‖†), in the modular dual norm of the whole network.

    g: the fresh gradient, not the direction, which correlates with its own past steps, whatever they were worth; w₀: the weights at the first step.
    initial: η before anything is known, more than 0. While the gradient keeps its direction η grows by 1 + factor a step; by Hölder
    η <= max(initial, factor · ‖w₀ − w‖). With the largest-entry norm, factor 1 and no momentum this is Prodigy's rule without averages
    (Mishchenko, Defazio, arXiv 2306.06101; Bernstein, Newhouse, arXiv 2409.20325).
    """

    initial: float = 0.1
    factor: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise Refusal(
                    f"EscapeVelocity.{name}",
                    got=repr(value),
                    allowed="a finite number more than 0",
                    fix=f"EscapeVelocity({name}=…)",
                )

    def grow(self, eta: Tensor, travelled: Tensor, dual_norm: Tensor) -> Tensor:
        """The next η (0-dim) from ⟨g, w₀ − w⟩ and ‖g‖†."""
        reached = self.factor * travelled / torch.where(dual_norm > 0, dual_norm, 1)
        return torch.maximum(eta, torch.where(torch.isfinite(reached), reached, 0).to(eta))
