"""Learning-rate schedules: pure functions of the step, multipliers of lr in [0, 1]. Step 0 is the first of `total` steps."""

import math
from collections.abc import Callable


def wsd(step: int, total: int, *, warmup: int, cooldown: float) -> float:
    """Warm-up, stable, decay: linear to 1 over `warmup` steps, then 1, then linear to 0 over the last `cooldown` fraction of all steps (Hägele et al., arXiv 2405.18392)."""
    left = (total - step) / max(1, round(cooldown * total)) if cooldown else 1.0
    return max(0.0, min(1.0, (step + 1) / max(1, warmup), left))


def cosine(step: int, total: int, *, warmup: int, cooldown: float) -> float:
    """Linear warm-up, then half a cosine from 1 down to 1 − cooldown (Loshchilov, Hutter, arXiv 1608.03983)."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1 - cooldown * (1 - math.cos(math.pi * progress)) / 2


SCHEDULES: dict[str, Callable[..., float]] = {"wsd": wsd, "cosine": cosine}
