"""What a whole study costs, estimated before its first run."""

from __future__ import annotations

from collections.abc import Sequence

from data.loader import Dataset

from .. import run_cost, runs
from .entries import Entry
from .study import Study


def print_cost(study: Study, trials: Sequence[runs.Job], dataset: Dataset, speed: float) -> None:
    """Print about what a study costs: runs, FLOPs and time. speed: FLOP/s of this machine.

    It is an estimate, because the horizons that are run depend on the losses.
    """
    jobs = [*trials, *(j for e in study.entries for j in _expected_jobs(study, e))]
    costs = [run_cost.cost(j.config, dataset, speed) for j in jobs]
    more = ""
    if any(_is_searched(study, e) for e in study.entries):
        more = "; more if the shortest of --horizons reaches the target"
        more += ", or the budget does not" if study.search.longest > 1 else ""
    workers = len(study.places)
    print(
        f"{study.folder}: about {len(jobs)} runs ({len(trials)} to tune),"
        f" {sum(flops for flops, _ in costs):.2g} FLOPs,"
        f" {run_cost.duration([seconds for _, seconds in costs], workers)} on this machine,"
        f" {workers} at a time{more}; what is done already is not run again"
    )


def _is_searched(study: Study, entry: Entry) -> bool:
    """Return whether the study searches for a horizon of this entry."""
    return study.target is not None or study.target_entry not in (None, entry.name)


def _expected_jobs(study: Study, entry: Entry) -> list[runs.Job]:
    """Return the runs of an entry: the budget, and horizons as long as a search may have."""
    fractions = [1.0]
    if _is_searched(study, entry):
        fractions += [*study.search.fractions, *[0.5] * study.search.tries]
    return [
        entry.judged_job(max(1, round(f * entry.steps)), s, study.folder)
        for f in fractions
        for s in study.seeds
    ]
