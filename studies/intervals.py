"""An estimate between its bounds, and the mean of a few values as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95  # of every interval of a study


@dataclass(frozen=True)
class Interval:
    """An estimate between its bounds."""

    low: float
    value: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def json(self, key: str) -> dict[str, float]:
        """Return it as results.json holds it. key: of its value."""
        return {key: self.value, "low": self.low, "high": self.high}


def student(values: Sequence[float]) -> Interval:
    """Return the mean of independent values with its interval by Student's t.

    One value has no bounds.
    """
    x = np.asarray(values, dtype=np.float64)
    mean = float(x.mean())
    half = (
        float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5)
        if len(x) > 1
        else np.inf
    )
    return Interval(mean - half, mean, mean + half)
