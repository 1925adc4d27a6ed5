"""The order of a study: entries, budget, cost, trials, comparison, results."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import Any

import torch

from data.loader import DataConfig, Dataset

from .. import run_cost, runs, tuning
from ..evidence import Evidence, file_of
from .budget import estimate_steps, measure_steps, set_budget
from .entries import Entry, load
from .forecast import print_cost
from .options import check, read_options
from .power import known_noise, power_text
from .results import results
from .search import SearchSettings
from .study import Study
from .tables import text
from .trials import default_holdout, jobs_of, plan_trials, tune, write_tuned


def main(argv: list[str]) -> int:
    """Run a study and write its results; return the exit code."""
    options, config_options = read_options(argv)
    entries = load(options.configs, config_options, allow_different=options.allow_different)
    names = [e.name for e in entries]
    check(options, names)
    kind, value = set_budget(options.budget, entries)
    ranges = [tuning.parse(t, names) for t in options.tune]
    trial_values = tuning.trials_by_entry(ranges, names, options.trials)
    study = _study(options, entries)
    config = entries[0].config
    dataset = Dataset(DataConfig(config.data.dataset, verify=False))
    if options.power:
        from_entry = options.target_entry is not None
        noise, level = known_noise(study), options.level
        print(power_text(options.power, noise, len(entries), level=level, from_entry=from_entry))
        return 0
    if kind == "seconds" and not options.dry_run:
        measure_steps(entries, value, study.folder, study.places)
    speed = run_cost.measure_speed(config)
    if kind == "seconds" and options.dry_run:
        estimate_steps(entries, value, study.folder, dataset, speed)
    _require_grid_in_budget(options.grid, entries)
    trials = plan_trials(
        entries,
        trial_values,
        study.folder,
        steps=options.tune_steps,
        seeds=options.tune_seeds,
        holdout=options.holdout or default_holdout(dataset.manifest),
    )
    trial_jobs = jobs_of(trials)
    print_cost(study, trial_jobs, dataset, speed)
    if options.dry_run:
        if lines := Evidence(study.folder).count():
            print(f"{file_of(study.folder)}: the lines of {lines} runs, which are done")
        return 0
    if trial_jobs:
        runs.sweep(trial_jobs, study.folder, workers=study.places, dry_run=False)
        tune(entries, ranges, trials, study.folder)
    if options.tuned_into:
        write_tuned(entries, options.tuned_into)
    rule = study.judge()
    about = {
        "command": f"python -m studies.speedrun {shlex.join(argv)}",
        "name": study.folder.name,
        "dataset": config.data.dataset,
        "corpus_sha256": dataset.manifest.sha256,
        "track": options.track,
        "budget": {"kind": kind, "value": int(value) if value == int(value) else value},
        "workers": len(study.places),
        "threads": config.run.threads,
        "ranks": options.nproc,
    }
    _write(results(study, rule, about=about), study.folder)
    return 0


def _study(options: argparse.Namespace, entries: list[Entry]) -> Study:
    """Return the study that the options ask for."""
    names = "-".join(e.name for e in entries)
    return Study(
        folder=Path(entries[0].config.run.dir) / (options.name or f"speedrun-{names}"),
        entries=entries,
        seeds=list(range(options.first_seed, options.first_seed + options.seeds)),
        places=runs.places(options.workers, options.nproc, _gpus() if options.gpus else ()),
        target=options.target,
        target_entry=options.target_entry,
        search=SearchSettings(options.horizons, options.grid, options.longest, options.tries),
        sigma=options.sigma,
        threshold=options.threshold,
        level=options.level,
    )


def _gpus() -> list[str]:
    """Return the GPUs that this process sees, by the numbers that CUDA_VISIBLE_DEVICES takes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        [g for g in visible.split(",") if g]
        if visible is not None
        else [str(i) for i in range(torch.cuda.device_count())]
    )
    if not gpus or not torch.cuda.is_available():
        raise runs.StudyError("--gpus", got="no GPU", allowed="one or more", fix="--workers")
    return gpus


def _require_grid_in_budget(grid: int | None, entries: list[Entry]) -> None:
    """Raise StudyError for a grid that is coarser than the budget is long."""
    shortest = min(e.steps for e in entries)
    if grid and grid > shortest:
        raise runs.StudyError(
            "--grid",
            got=grid,
            allowed=f"1 to {shortest}, the steps of the budget",
            fix="another, or leave it out",
        )


def _write(content: dict[str, Any], folder: Path) -> None:
    """Write results.json and the report, and print the results."""
    path = folder / "results.json"
    runs.write_json(path, content)
    written = json.loads(path.read_text(encoding="utf-8"))
    print(text(written))
    from ..report import page as report  # matplotlib, after the runs

    for path in (*report.write(written, folder), file_of(folder)):
        print(f"written: {path}")
