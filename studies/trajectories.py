"""The curvature of runs during training, and how much it differs between sizes.

A trajectory is that of train.sharpness_every in a run's metrics.jsonl; training/sharpness.py says
what is in it. Super consistency ([SC] arXiv 2402.17457), as a number: the standard deviation over
sizes of ln λ_max, averaged over time; once at equal steps, once at equal loss, over the losses that
all sizes and methods have passed. Intervals: t over seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import runs
from .intervals import Interval, student

# Quantities that have a trajectory, each with the flag that says it has converged. The others need
# none: the modular sharpness is a lower bound in any case.
QUANTITIES = {
    "lambda_max": "converged",
    "preconditioned": "preconditioned_converged",
    "modular_sharpness": None,
    "dual_norm": None,
    "gradient_norm": None,
}
LOSSES = 20  # points of the loss at which trajectories are compared


@dataclass(frozen=True)
class Curve:
    """One run's trajectory: steps, losses of the fixed batch, values of a quantity, (T,) each."""

    steps: np.ndarray
    losses: np.ndarray
    values: np.ndarray

    def at_losses(self, grid: np.ndarray) -> np.ndarray:
        """Return ln value where the loss first falls to each of `grid` (descending)."""
        new = self.losses < np.r_[np.inf, np.minimum.accumulate(self.losses)[:-1]]
        return np.interp(-grid, -self.losses[new], np.log(self.values[new]))


Curves = list[list[Curve]]  # of one method: [seed][size]


# ---- of one run


def records(path: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return (record, its curvature) where the curvature was measured."""
    return [(r, r["sharpness"]) for r in runs.metrics(path) if "sharpness" in r]


def read_curve(path: Path, quantity: str) -> Curve | None:
    """Return a run's trajectory where the quantity converged and is positive.

    None of a run that diverged or has no such value.
    """
    if runs.summary(path) is None:
        return None
    converged = QUANTITIES[quantity]
    rows = [
        (r["step"], s["loss"], s[quantity])
        for r, s in records(path)
        if (s.get(quantity) or 0) > 0 and (converged is None or s[converged])
    ]
    columns = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    return Curve(*columns) if rows else None


def margins(path: Path) -> list[tuple[int, float]]:
    """Return (step, share of the method's own threshold of stability); 1 is at the threshold.

    Of gradient descent λ_max, of AdamW the preconditioned one, over 2(1 + β)/((1 − β) lr); of
    dualized and normalized steps lr over stable_lr, momentum apart.
    """
    shares = []
    for r, s in records(path):
        if s["threshold"]:
            share = s.get("preconditioned", s["lambda_max"]) / s["threshold"]
        else:
            share = r["lr"] / s["stable_lr"] if s["stable_lr"] else 0.0
        shares.append((r["step"], share))
    return shares


# ---- over sizes


def spread_at_steps(curves: list[Curve]) -> float:
    """Return the standard deviation over sizes of ln value, averaged over the common steps."""
    steps = sorted(set.intersection(*({int(s) for s in c.steps} for c in curves)))
    logs = np.array([[math.log(c.values[list(c.steps).index(s)]) for s in steps] for c in curves])
    return float(logs.std(axis=0, ddof=1).mean())


def common_losses(curves: list[Curve]) -> np.ndarray | None:
    """Return losses that all curves pass, highest first; None if there are none."""
    high, low = min(c.losses[0] for c in curves), max(c.losses.min() for c in curves)
    return np.linspace(high, low, LOSSES) if high > low else None


def spread_at_losses(curves: list[Curve], grid: np.ndarray) -> float:
    """Return the standard deviation over sizes of ln value, averaged over losses."""
    return float(np.array([c.at_losses(grid) for c in curves]).std(axis=0, ddof=1).mean())


def drift(curves: list[Curve], sizes: list[int]) -> float:
    """Return the slope of ln value, averaged over time, against ln size: a power law's exponent."""
    return float(np.polyfit(np.log(sizes), [np.log(c.values).mean() for c in curves], 1)[0])


# ---- over seeds


def consistency(
    curves: dict[str, Curves], sizes: list[int]
) -> dict[str, dict[str, Interval | None]]:
    """Return {method: {"steps", "losses", "drift"}}, intervals over seeds.

    "losses": on one grid for all methods and sizes of a seed.
    """
    numbers: dict[str, dict[str, list[float]]] = {
        method: {"steps": [], "losses": [], "drift": []} for method in curves
    }
    for seed in range(min(map(len, curves.values()))):
        grid = common_losses([c for by_seed in curves.values() for c in by_seed[seed]])
        for method, by_seed in curves.items():
            by_size = by_seed[seed]
            numbers[method]["steps"].append(spread_at_steps(by_size))
            numbers[method]["drift"].append(drift(by_size, sizes))
            if grid is not None:
                numbers[method]["losses"].append(spread_at_losses(by_size, grid))
    return {
        method: {k: student(v) if v else None for k, v in of_method.items()}
        for method, of_method in numbers.items()
    }


def ratios(curves: dict[str, Curves], method: str, other: str) -> dict[str, Interval | None]:
    """Return how many times larger `other`'s spread is, at equal steps and at equal losses.

    Means of log ratios over seeds, with intervals; losses that these two have passed.
    """
    logs: dict[str, list[float]] = {"steps": [], "losses": []}
    for ours, theirs in zip(curves[method], curves[other], strict=True):
        logs["steps"].append(math.log(spread_at_steps(theirs) / spread_at_steps(ours)))
        grid = common_losses([*ours, *theirs])
        if grid is not None:
            ratio = spread_at_losses(theirs, grid) / spread_at_losses(ours, grid)
            logs["losses"].append(math.log(ratio))
    intervals = {k: student(v) if v else None for k, v in logs.items()}
    return {
        k: i and Interval(math.exp(i.low), math.exp(i.value), math.exp(i.high))
        for k, i in intervals.items()
    }
