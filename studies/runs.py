"""The trainings of a study: a few at a time, each with a run folder, and none of them twice.

A study's folder holds a run folder for each training. A training is done if its run folder has
summary.json, or failed.json where its numbers stopped being finite. Every other run folder is half
made: the next call deletes it, and begins that training anew. So a study can be killed at any
moment and called again. Its trainings end with it. Each training that ends gets a line in the
study's file (evidence.py), by which a study goes on where its run folders are missing.
"""

from __future__ import annotations

import json
import math
import platform
import re
import shutil
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.loader import Dataset
from optim.errors import require
from optim.plugins import digests
from training import config as configuration
from training.config import Config
from training.half_lives import displaced, half_lives
from training.provenance import git_state, hardware
from training.run_folder import is_locked_by_us

from . import processes
from .evidence import ROOT, Evidence, Say
from .jobs import Job, StudyError, changed_plugin, difference, from_flat
from .run_cost import cost, duration, measure_speed

# A study resumes none of its runs, and so keeps nothing of them but their figures.
QUIET = {"train.keep_checkpoints": 0, "train.sample_tokens": 0, "train.pictures": False}
# train_gpt.py's exit code and last words where a number was not finite.
NOT_FINITE = (1, re.compile(r"^error: .*(not finite|is -?(nan|inf)).*", re.MULTILINE))


STANDARD = {"model.residual": "plain", "model.logit_scale": 1.0}
# Each optimizer with the parametrization and the initialization in which it is compared.
METHODS: dict[str, dict[str, Any]] = {
    "dualized": {"optim.name": "dualized"},
    "modular-sgd": {"optim.name": "sgd", "baseline.scaling": "modular"},
    "normalized-adam": {"optim.name": "normalized_adam"},
    "normalized-sgd": {"optim.name": "normalized_sgd"},
    "adamw": {
        "optim.name": "adamw",
        "optim.beta2": 0.95,
        "optim.weight_decay": 0.1,
        "model.init": "gpt2",
        **STANDARD,
    },  # as nanoGPT
    "standard-sgd": {"optim.name": "sgd", "model.init": "fan_in", **STANDARD},
    "ntk": {"optim.name": "sgd", "baseline.scaling": "ntk", "model.init": "fan_in", **STANDARD},
}


def job(config: Config, name: str, folder: Path, **changes: Any) -> Job:
    """Return a job of `config` with some values changed; keys as "model.n_embd".

    The configuration is checked as train_gpt.py would check it.
    """
    own = {"run.name": name, "run.dir": str(folder)}
    unstated = half_lives(config).keys() | displaced(changes)
    kept = {k: v for k, v in configuration.flat(config).items() if k not in unstated}
    changed = from_flat({**kept, **own, **changes})
    changed.check()
    return Job(name, changed)


@dataclass(frozen=True)
class Place:
    """Where one training runs."""

    ranks: int = 1
    """Processes of one group, as torchrun starts them."""
    gpus: str | None = None
    """The GPUs that it sees, as CUDA_VISIBLE_DEVICES has them; None for all there are."""

    def environments(self) -> list[dict[str, str]]:
        """Return what each rank has in its environment."""
        seen = {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": self.gpus}
        if self.ranks == 1:
            return [seen]
        with closing(socket.create_server(("127.0.0.1", 0))) as server:
            port = str(server.getsockname()[1])
        seen |= {
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        return [seen | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(self.ranks)]


def places(workers: int, ranks: int = 1, gpus: Sequence[str] = ()) -> list[Place]:
    """Return a place for each training that runs at the same time.

    There are `workers` of them, or with GPUs as many as have one GPU a rank. Raises StudyError if
    there is none.
    """
    if not gpus:
        if workers < 1:
            raise StudyError(
                "--workers", got=workers, allowed="1 or more", fix="--workers 1, or leave it out"
            )
        return [Place(ranks)] * workers
    if len(gpus) < ranks:
        raise StudyError(
            "--gpus, --nproc",
            got=f"{len(gpus)} GPUs, {ranks} ranks a run",
            allowed="a GPU a rank",
            fix="fewer ranks",
        )
    return [
        Place(ranks, ",".join(gpus[i : i + ranks])) for i in range(0, len(gpus) - ranks + 1, ranks)
    ]


# ---- running


def sweep(
    jobs: Sequence[Job],
    folder: Path,
    *,
    workers: Sequence[Place],
    dry_run: bool,
    portable: bool = True,
) -> bool:
    """Print the cost of the jobs that are not done, and run them.

    The first seed of all jobs comes first, and small jobs before large ones. A dry run ends with
    the cost. portable: as execute() has it. Returns whether the jobs were run.
    """
    dataset, speed = Dataset(jobs[0].config.data), measure_speed(jobs[0].config)
    estimates = [(j, *cost(j.config, dataset, speed)) for j in jobs]
    estimates.sort(key=lambda e: (e[0].config.run.seed, e[2]))
    left = [e for e in estimates if not done(e[0], folder)]
    elsewhere = ""
    if portable:
        evidence, missing = Evidence(folder), len(left)
        left = [e for e in left if not evidence.line_of(e[0])]
        if missing > len(left):
            elsewhere = f" ({missing - len(left)} by {evidence.file})"
    print(
        f"{folder}: {len(jobs)} runs, {len(jobs) - len(left)} of them done{elsewhere};"
        f" {sum(flops for _, flops, _ in left):.2g} FLOPs to go,"
        f" about {duration([seconds for *_, seconds in left], len(workers))} on this machine"
        f" (a product of matrices: {speed / 1e9:.0f} GFLOP/s), {len(workers)} at a time"
    )
    if not dry_run:
        ordered, seconds = [j for j, *_ in estimates], [s for *_, s in estimates]
        execute(ordered, folder, workers=workers, costs=seconds, portable=portable)
    return not dry_run


def execute(
    jobs: Sequence[Job],
    folder: Path,
    *,
    workers: Sequence[Place],
    costs: Sequence[float],
    portable: bool = True,
    say: Say = print,
) -> None:
    """Run the jobs that are not done, one in each place at a time, in this order.

    costs: of each job, in any unit; they steer the progress bar alone. portable: their results
    count on any machine, so that each has its line in the study's file (evidence.py); False if
    this machine's clock or a checkpoint is wanted. Raises StudyError if a training fails for
    another reason than numbers that are not finite, and if another call is at work in the folder.
    """
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        evidence = Evidence(folder, say) if portable else None
        if evidence:
            _complete(evidence, jobs, say)
        waiting = [(j, c) for j, c in zip(jobs, costs, strict=True) if not done(j, folder)]
        if len(waiting) < len(jobs):
            say(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are there already")
        _run_all(waiting, folder, workers, evidence)


def _complete(evidence: Evidence, jobs: Sequence[Job], say: Say) -> None:
    """Append the lines of runs that have none, and restore the run folders that are missing."""
    evidence.mend()
    restored = 0
    for wanted in jobs:
        if done(wanted, evidence.folder):
            evidence.append(wanted)
        else:
            restored += evidence.restore(wanted)
    if restored:
        say(f"{restored} runs restored from {evidence.file}; without its line a run is trained")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with its process. Windows has none."""
    with open(folder / ".lock", "w") as file:
        require(
            is_locked_by_us(file.fileno()),
            folder,
            got="another call that is at work in it",
            allowed="one at a time",
            fix="wait for it, or another --name",
            error=StudyError,
        )
        yield


@dataclass
class _Training:
    """A training under way."""

    job: Job
    weight: float
    """Its part of the progress bar."""
    place: Place
    ranks: list[BaseProcess]

    def has_ended(self) -> bool:
        """Return whether all its ranks have. Where one failed, the others' watchdogs end them."""
        return all(p.exitcode is not None for p in self.ranks)


def _run_all(
    waiting: list[tuple[Job, float]],
    folder: Path,
    workers: Sequence[Place],
    evidence: Evidence | None,
) -> None:
    """Run the waiting jobs, and begin none after a failure.

    Each has its weight in the progress bar beside it. One that ends gets its line in the evidence.
    Raises StudyError for the first failure.
    """
    under_way: list[_Training] = []
    failures: list[str] = []
    free = list(workers)
    with tqdm(
        total=sum(c for _, c in waiting) or 1,
        unit="s",
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
    ) as bar:
        try:
            while under_way or (waiting and not failures):
                while waiting and free and not failures:
                    under_way.append(_begin(*waiting.pop(0), folder, free.pop(0)))
                if alive := [p.sentinel for t in under_way for p in t.ranks if p.is_alive()]:
                    wait(alive)
                for training in [t for t in under_way if t.has_ended()]:
                    under_way.remove(training)
                    free.append(training.place)
                    bar.update(min(training.weight, bar.total - bar.n))  # sums round
                    failure = _failure(training, folder)
                    failures += [failure] if failure else []
                    if evidence and not failure:
                        evidence.append(training.job)
                    bar.set_postfix_str(f"{len(waiting) + len(under_way)} runs to go")
        finally:
            processes.end([p for t in under_way for p in t.ranks])
    if failures:
        raise StudyError(
            "a run of the study failed",
            got=failures[0],
            allowed="runs that end",
            fix="see above, and call the study again: what is done stays",
        )


def _begin(wanted: Job, weight: float, folder: Path, place: Place) -> _Training:
    """Start a job anew: delete its half-made run folder, and write its configuration."""
    shutil.rmtree(folder / wanted.name, ignore_errors=True)
    config = folder / "configs" / f"{wanted.name}.toml"
    config.write_text(configuration.to_toml(wanted.config), encoding="utf-8")
    ranks = processes.start(ROOT / "train_gpt.py", config, place.environments())
    return _Training(wanted, weight, place, ranks)


def _failure(training: _Training, folder: Path) -> str | None:
    """Return how a training failed that has ended; None of one that has a result.

    Numbers that are not finite are a result too: failed.json is written.
    """
    name = training.job.name
    output = (folder / "configs" / f"{name}.log").read_text(errors="replace")
    codes = [p.exitcode for p in training.ranks if p.exitcode]
    if NOT_FINITE[0] in codes and (why := NOT_FINITE[1].search(output)):
        (commit, dirty), device = git_state(), "cpu"
        if configuration.of_file(folder / name / "config.toml").run.device == "cuda":
            device = torch.cuda.get_device_name()
        result = {
            "why": why.group(),
            "hardware": hardware(device),
            "torch": torch.__version__,
            "commit": commit,
            "dirty": dirty,
            "plugins": digests(training.job.config.run.plugins),
        }
        (folder / name / "failed.json").write_text(json.dumps(result) + "\n")
        return None
    return f"{name}: exit code {codes[0]}\n{output[-2000:]}" if codes else None


# ---- results


def done(wanted: Job, folder: Path) -> bool:
    """Return whether a job has a result, with this very configuration.

    Raises StudyError if the run of its name has another configuration, or another plugin.
    """
    path = folder / wanted.name
    if not finished(path):
        return False
    trained = configuration.flat(configuration.of_file(path / "config.toml"))
    values = configuration.flat(wanted.config)
    if key := difference(values, trained):
        raise StudyError(
            path,
            got=f"{key} = {values[key]!r}",
            allowed=f"{trained[key]!r}, as the run that is there had it",
            fix=f"another --name, or delete {path}",
        )
    if name := changed_plugin(wanted.config, summary(path) or {}):
        raise StudyError(
            path,
            got=f"another file of the plugin {name} than this run had",
            allowed="the file that it had",
            fix=f"another --name, or delete {path}",
        )
    return True


def finished(path: Path) -> bool:
    """Return whether a run folder has a result, of whatever configuration."""
    return any((path / name).is_file() for name in ("summary.json", "failed.json"))


def summary(path: Path) -> dict[str, Any] | None:
    """Return a run's summary.json; None for one that failed."""
    file = path / "summary.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def final_loss(path: Path) -> float:
    """Return a run's validation loss at its end; infinite if it diverged."""
    result = summary(path)
    return math.inf if result is None else result["val_loss"]


def metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl."""
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def machines(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return the machines that trained, by the runs' summaries; older ones do not name it."""
    names = dict.fromkeys(s.get("hardware") or "not known" for s in summaries)
    return ", ".join(names) or "not known"


def versions(summaries: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """Return the versions of the program and of torch that made the runs, by their summaries.

    note: which commit ran with which torch, if there is more than one pair, and which plugins
    changed between runs.
    """
    pairs = sorted({(s["commit"] or "no commit", bool(s["dirty"]), s["torch"]) for s in summaries})
    torches = [version for *_, version in pairs]
    commits = [
        f"{'commit ' if commit != 'no commit' else ''}{commit}{' (dirty)' if dirty else ''}"
        for commit, dirty, _ in pairs
    ]
    listed = "; ".join(f"{c} with torch {t}" for c, t in zip(commits, torches, strict=True))
    known = {commit for commit, *_ in pairs} - {"no commit"}
    notes = [f"the judged runs are of {len(pairs)} versions: {listed}"] if len(pairs) > 1 else []
    files = {item for s in summaries for item in s.get("plugins", {}).items()}
    counts = Counter(name for name, _ in files)
    notes += [
        f"the judged runs are of {count} versions of the plugin {name}"
        for name, count in sorted(counts.items())
        if count > 1
    ]
    return {
        "python": platform.python_version(),
        "torch": ", ".join(dict.fromkeys(torches)) or torch.__version__,
        "nanodual": ", ".join(dict.fromkeys(commits)) if known else None,
        "note": "; ".join(notes) or None,
    }


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, with null for numbers that are not finite, which JSON does not have."""

    def finite(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: finite(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [finite(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    path.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
