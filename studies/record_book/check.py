"""The check of a record: training its entries again, and comparing their losses."""

from __future__ import annotations

import math
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from data.shards import read_manifest
from optim.errors import require
from training import config as configuration
from training.config import Config
from training.provenance import git_state

from .. import runs
from . import book
from .book import RecordError

# Nats. The same processor, vector instructions, threads, versions and seeds give the same numbers,
# up to a few roundings of a float32 near 2. Where one of them differs, a run of 180 steps ends
# 0.001 to 0.007 apart (docs/log.md, 2026-11-27).
SAME = 1e-6
# Two-sided level at which means on different machines differ: one check in a hundred fails by
# chance.
DOUBT = 0.01

Json = dict[str, Any]


def check_record(
    folder: Path, *, entry: str | None, seeds: int | None, workers: int, out: Path | None
) -> bool:
    """Train a record's entries again with the present code, print PASS or FAIL, and return it.

    seeds: how many of each entry's seeds, the first ones; None for all.
    """
    record = _read_checkable(folder, entry=entry, seeds=seeds)
    commit, _ = git_state()
    out = out or Path("runs") / f"check-{folder.resolve().name}-{(commit or 'no-commit')[:8]}"
    passed = True
    for recorded in record["entries"]:
        if entry not in (None, recorded["name"]):
            continue
        file = folder / recorded["config"]
        if tomllib.loads(file.read_text(encoding="utf-8")).get("run", {}).get("plugins"):
            sys.path.insert(0, str(folder.resolve()))  # where a record keeps its plugins
        config = configuration.load([str(file)])
        corpus = read_manifest(Path(config.data.dataset)).sha256
        require(
            corpus == record["corpus_sha256"],
            f"the data of {config.data.dataset}",
            got=corpus,
            allowed=record["corpus_sha256"],
            fix="python -m data.prepare, with the versions of requirements.txt",
            error=RecordError,
        )
        name, wanted = recorded["name"], recorded["seeds"][:seeds]
        summaries = train_again(config, name, wanted, out=out, workers=workers)
        same = same_machine(record, recorded, summaries)
        fine, figures = compare(recorded, summaries, same=same)
        passed &= fine
        print(f"{name}: {figures}: {'PASS' if fine else 'FAIL'}")
    print(f"{folder}: {'PASS' if passed else 'FAIL'}")
    return passed


def _read_checkable(folder: Path, *, entry: str | None, seeds: int | None) -> Json:
    """Return record.json. Raise RecordError if there is none, or nothing to check in it."""
    if not (folder / "record.json").is_file():
        existing = ", ".join(str(f.relative_to(book.BOOK.parent)) for f, _ in book.records())
        raise RecordError(folder, got="no record.json in it", allowed=existing, fix="one of them")
    if seeds is not None and seeds < 1:
        fix = "leave it out, for all"
        raise RecordError("--seeds", got=seeds, allowed="1 or more", fix=fix)
    record = book.read_record(folder)
    if record["corpus_sha256"] is None:
        raise RecordError(
            folder,
            got="a script that was not run",
            allowed="a record with runs",
            fix="torchrun it where the data and the GPUs are",
        )
    names = [e["name"] for e in record["entries"]]
    if entry is not None and entry not in names:
        raise RecordError("--entry", got=entry, allowed=", ".join(names), fix="one of them")
    return record


def train_again(
    config: Config, name: str, seeds: Sequence[int], *, out: Path, workers: int
) -> list[Json | None]:
    """Train a configuration by each seed in `out` and return the summaries, None if one diverged.

    A run that exists counts if it is of the present commit, without changes. Raises RecordError
    otherwise. One that diverged does not say which code it is of, and is trained again.
    """
    state = commit, dirty = git_state()
    changes = runs.QUIET | {"data.dataset": str(Path(config.data.dataset).resolve())}
    jobs = [
        runs.job(config, f"{name}.seed{seed}", out, **{"run.seed": seed, **changes})
        for seed in seeds
    ]
    for path in (out / j.name for j in jobs):
        existing = runs.summary(path)
        if existing is None:
            shutil.rmtree(path, ignore_errors=True)
        elif dirty is not False or (existing["commit"], existing["dirty"]) != state:
            raise RecordError(
                path,
                got="a run that is there already, of code that is not known to be this",
                allowed=f"one of commit {commit}, without changes",
                fix="delete it, or another --out",
            )
    runs.sweep(jobs, out, workers=runs.places(workers), dry_run=False, portable=False)
    return [runs.summary(out / j.name) for j in jobs]


def same_machine(record: Json, recorded: Json, summaries: Sequence[Json | None]) -> bool:
    """Compare processor, torch and threads of a check with the record's."""
    present = {(s["torch"], s["device"], s["hardware"]) for s in summaries if s}
    return present == {(recorded["torch"], recorded["device"], record["hardware"])}


def compare(recorded: Json, summaries: Sequence[Json | None], *, same: bool) -> tuple[bool, str]:
    """Return whether a check agrees with the recorded entry, and its figures in words.

    On the same machine each seed's loss agrees within SAME. Between machines the means agree
    within Student's interval at level DOUBT, of the pooled deviation.
    """
    losses = [math.inf if s is None else s["val_loss"] for s in summaries]
    n, m = len(losses), recorded["n"]
    mean_seconds = np.mean([s["train_seconds"] for s in summaries if s] or [math.nan])
    seconds = (
        f"{mean_seconds:.1f} s of training here, "
        f"{recorded['train_seconds']:.1f} s recorded (not judged)"
    )
    if diverged := sum(not math.isfinite(x) for x in losses):
        return False, f"{diverged} of {n} runs diverged here, none of {m} recorded; {seconds}"
    mean = float(np.mean(losses))
    means = f"mean end loss {mean:.4f} here (n = {n}), {recorded['mean']:.4f} recorded (n = {m})"
    if same:
        apart = max(abs(a - b) for a, b in zip(losses, recorded["losses"], strict=False))
        limit = f"allowed {SAME:g} on the same machine and versions"
        return apart <= SAME, f"{means}; seed by seed at most {apart:.2g} apart, {limit}; {seconds}"
    df = n + m - 2
    if not df:
        reason = "one loss on either side tells no deviation, and machine or versions differ"
        return False, f"{means}; {reason}; {seconds}"
    squares = sum(
        float(((x := np.array(y)) - x.mean()) @ (x - x.mean()))
        for y in (losses, recorded["losses"])
    )
    deviation = math.sqrt(squares / df)
    allowed = float(stats.t.isf(DOUBT / 2, df)) * deviation * math.sqrt(1 / n + 1 / m)
    apart = abs(mean - recorded["mean"])
    limit = f"allowed {allowed:.4f} between machines ({1 - DOUBT:.0%})"
    return apart <= allowed, f"{means}; {apart:.4f} apart, {limit}; {seconds}"
