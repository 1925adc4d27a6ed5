"""The dualized optimizer. Outside this repository its name is `nanodual`.

    from nanodual import Dualized, metrize

Norms are in nanodual.norms and nanodual.views, composition in nanodual.modular, schedules in
nanodual.schedules; docs/theory.md has the mathematics, README.md a map.
"""

from .baselines import register_baseline
from .directions import register_direction
from .dualized import Dualized
from .errors import NonFiniteError, Refusal
from .metrize import Rule, metrize
from .modular import ModularNorm
from .normalized import Normalized
from .norms import register_norm
from .schedules import EscapeVelocity, half_life, schedule

__all__ = [
    "Dualized",
    "EscapeVelocity",
    "ModularNorm",
    "NonFiniteError",
    "Normalized",
    "Refusal",
    "Rule",
    "half_life",
    "metrize",
    "register_baseline",
    "register_direction",
    "register_norm",
    "schedule",
]
