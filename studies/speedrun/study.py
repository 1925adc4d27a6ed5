"""A study: what is fixed before the first run, and the runs of the comparison."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from .. import runs, statistics
from ..statistics import Noise, Rule
from .entries import Entry
from .search import Horizons, SearchSettings, search_horizons


@dataclass
class Study:
    """What is fixed before the first run, and the losses of the runs so far."""

    folder: Path
    entries: list[Entry]
    seeds: list[int]
    places: list[runs.Place]
    target: float | None
    """The target loss, if it is a given number."""
    target_entry: str | None
    """The entry whose mean loss at the budget is the target."""
    search: SearchSettings
    sigma: float | None
    """σ of a loss, if it is given."""
    threshold: float | None
    """The rule's threshold, if it is given."""
    level: float
    """One-sided level of the rule."""
    losses: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    """End losses by (entry, horizon), one for each seed."""

    def run(self, horizons: Mapping[str, Sequence[int]]) -> None:
        """Run these horizons of these entries with all seeds, and read their losses."""
        jobs = {
            (e.name, h): [e.judged_job(h, s, self.folder) for s in self.seeds]
            for e in self.entries
            for h in horizons.get(e.name, ())
        }
        if jobs:
            all_jobs = list(itertools.chain(*jobs.values()))
            runs.sweep(all_jobs, self.folder, workers=self.places, dry_run=False)
        for cell in jobs:
            self.losses[cell] = [runs.final_loss(self.folder / j.name) for j in jobs[cell]]

    def mean(self, name: str, steps: int) -> float:
        """Return an entry's mean loss at a horizon; infinite if a run diverged."""
        return float(np.mean(self.losses[name, steps]))

    def horizons(self, name: str) -> list[int]:
        """Return the horizons of an entry that were run, ascending."""
        return sorted(h for e, h in self.losses if e == name)

    def target_loss(self) -> float | None:
        """Return the target: given, or the mean loss at the budget of the entry that sets it."""
        if self.target_entry is None:
            return self.target
        steps = next(e.steps for e in self.entries if e.name == self.target_entry)
        if math.isinf(mean := self.mean(self.target_entry, steps)):
            raise runs.StudyError(
                "--target-entry",
                got=f"{self.target_entry}, of which a run diverged at the budget",
                allowed="one that ends",
                fix="tune it, or --target",
            )
        return mean

    def noise(self) -> Noise | None:
        """Return σ of a loss: given, or estimated from the losses at the budget.

        The estimate is pooled over the entries whose mean is at or under the target, which are
        those that the rule can pass; over all, if there is none. An entry that is far from the
        target may be far noisier. A deviation is independent of its mean, so that choosing by the
        mean keeps the rule's level.
        """
        target = self.target_loss()
        near = [
            e for e in self.entries if target is not None and self.mean(e.name, e.steps) <= target
        ] or self.entries
        noise = (
            Noise(self.sigma)
            if self.sigma
            else statistics.pooled([np.array(self.losses[e.name, e.steps]) for e in near])
        )
        if noise is None:
            return None
        finite = [
            [y for h in self.horizons(e.name) if np.isfinite(y := self.losses[e.name, h]).all()]
            for e in near
        ]
        return replace(noise, share=statistics.share_of_seeds([np.array(y) for y in finite if y]))

    def rule(self) -> Rule | None:
        """Return the rule by the runs at the budget; None without a target.

        If σ is unknown, its threshold is 0: a mean at or under the target passes.
        """
        target, n = self.target_loss(), len(self.seeds)
        if target is None:
            return None
        target_n = n if self.target_entry else None
        noise, threshold = self.noise(), self.threshold
        if threshold is None:
            threshold = (
                statistics.threshold_at(noise, n, level=self.level, target_n=target_n)
                if noise
                else 0.0
            )
        return Rule(target, threshold, target_n)

    def judge(self) -> Rule | None:
        """Run the whole comparison, and return its rule.

        The budget is run first, then round by round what each entry's search asks for.
        """
        self.run({e.name: [e.steps] for e in self.entries})
        rule = self.rule()
        if rule is None:
            return None
        n = len(self.seeds)
        searches = {
            e.name: search_horizons(e.steps, self.mean(e.name, e.steps), n, rule, self.search)
            for e in self.entries
            if e.name != self.target_entry
        }
        horizons = _next_round(searches, dict.fromkeys(searches))
        while horizons:
            self.run(horizons)
            means = {name: {h: self.mean(name, h) for h in horizons[name]} for name in horizons}
            horizons = _next_round(searches, means)
        return rule


def _next_round(
    searches: Mapping[str, Horizons], means: Mapping[str, dict[int, float] | None]
) -> dict[str, list[int]]:
    """Return the horizons that each search asks for next; a search that has ended asks for none.

    means: of the horizons that the search asked for before; None begins it.
    """
    horizons = {}
    for name, answer in means.items():
        with suppress(StopIteration):
            horizons[name] = searches[name].send(answer)
    return horizons
