"""How many seeds a study takes to find an effect."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import runs, statistics
from ..statistics import Noise
from .study import Study


def known_noise(study: Study) -> Noise:
    """Return σ: given, or estimated from the runs at the budget that are done.

    Raises StudyError if neither tells it.
    """
    if study.sigma:
        return Noise(study.sigma)
    losses = [
        [
            runs.final_loss(path)
            for s in study.seeds
            if runs.finished(path := study.folder / e.run_name(e.steps, s))
        ]
        for e in study.entries
    ]
    noise = statistics.pooled([np.array(y) for y in losses])
    if noise is None:
        raise runs.StudyError(
            "--power",
            got="no σ",
            allowed="--sigma, or 2 runs of an entry at the budget that are there",
            fix="--sigma 0.002",
        )
    return noise


def power_text(
    effects: Sequence[float], noise: Noise, entries: int, *, level: float, from_entry: bool
) -> str:
    """Return in words how many seeds it takes to find effects of so many nats.

    entries: how many are compared. from_entry: the target is an entry's mean, of as many seeds.
    """
    target = "an entry's mean" if from_entry else "a number"
    lines = [
        f"σ = {noise.sigma:.2g}, level {level:g}, the target {target};"
        " seeds that find an effect with 80 % chance:"
    ]
    for effect in effects:
        seeds = statistics.seeds_for(
            effect, noise, entries=entries, level=level, from_entry=from_entry
        )
        by_rule, by_pairs = (str(n) if n else "over 1000" for n in seeds)
        lines.append(
            f"  {effect:g} nats: {by_rule} by the rule, {by_pairs} by the paired test of two"
            " entries (its σ√2 at most: seeds share their data)"
        )
    return "\n".join(lines)
