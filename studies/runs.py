"""Many trainings: train_gpt.py in processes of its own, a few at a time, each with a run folder, and none of them twice.

A study's folder holds one run folder for each of its runs. A run is done when its summary.json is there, or failed.json where it ended by numbers that were not
finite. Everything else is begun anew by the next call, so that a study can be killed at any moment and called again; its runs end with it.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import re
import runpy
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.loader import Dataset
from models import build_model_and_norm
from optim.baselines import BASELINES
from optim.errors import Refusal
from training import config as configuration
from training.config import Config
from training.runtime import RunConfig

ROOT = Path(__file__).parent.parent
PRELOADED = [
    "torch",
    "tqdm",
    "config",
    "checkpoint",
    "telemetry",
    "runtime",
    "model",
    "models",
    "data.loader",
    "optim",
    "matplotlib.pyplot",
]
FILLED_IN = {
    "run.device": "auto",
    "run.precision": "auto",
    "model.vocab_size": None,
    "optim.polar.dtype": "auto",
}  # by train_gpt.py
# What does not change the numbers that a study reads. run.threads does: sums in another order make another run (LOG.md).
NEUTRAL = (
    "run.name",
    "run.dir",
    "run.resume",
    "run.timeout",
    "data.verify",
    "train.log_every",
    "train.telemetry_every",
    "train.pictures",
    "train.keep_checkpoints",
    "train.sample_",
)
NOT_FINITE = (
    1,
    re.compile(r"^error: .*(not finite|is -?(nan|inf)).*", re.MULTILINE),
)  # train_gpt.py's exit code and last words


class StudyError(Refusal):
    """A study that cannot go on: what was got, what is allowed, how to fix it."""


STANDARD = {"model.residual": "plain", "model.logit_scale": 1.0}
# An optimizer with the parametrization and the initialization it is compared in.
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


@dataclass(frozen=True)
class Job:
    """One training: its name, which is its run folder's, and its whole configuration."""

    name: str
    config: Config


def job(config: Config, name: str, folder: Path, **changes: Any) -> Job:
    """A job of `config` with some values changed, keys as "model.n_embd". Checked as train_gpt.py would."""
    raw: dict[str, Any] = {}
    for key, value in {
        **configuration.flat(config),
        "run.name": name,
        "run.dir": str(folder),
        **changes,
    }.items():
        if value is not None:
            configuration.put(raw, key, value)
    made = configuration.from_dict(Config, raw)
    made.check()
    return Job(name, made)


@dataclass(frozen=True)
class Place:
    """Where one run runs: its ranks (processes of one group, as torchrun starts them) and the GPUs that it sees, None is all there are."""

    ranks: int = 1
    gpus: str | None = None

    def environments(self) -> list[dict[str, str]]:
        """What each rank has in its environment."""
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
    """One for each run at a time: `workers` of them, or with GPUs as many as have `ranks` GPUs, one a rank. Raises StudyError if there is none."""
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


def sweep(jobs: Sequence[Job], folder: Path, *, workers: Sequence[Place], dry_run: bool) -> bool:
    """Tell the cost of what is not done, and run it: the first seed of all first, small before large. Whether it was run: a dry run ends with the cost."""
    dataset, rate = Dataset(jobs[0].config.data), speed(jobs[0].config.run)
    costed = sorted(
        ((*cost(j.config, dataset, rate), j) for j in jobs),
        key=lambda c: (c[2].config.run.seed, c[1]),
    )
    left = [c for c in costed if not done(c[2], folder)]
    print(
        f"{folder}: {len(jobs)} runs, {len(jobs) - len(left)} of them done; {sum(c[0] for c in left):.2g} FLOPs to go, about {duration([c[1] for c in left], len(workers))} on this machine"
        f" (a product of matrices: {rate / 1e9:.0f} GFLOP/s), {len(workers)} at a time"
    )
    if not dry_run:
        execute([c[2] for c in costed], folder, workers=workers, costs=[c[1] for c in costed])
    return not dry_run


def execute(
    jobs: Sequence[Job],
    folder: Path,
    *,
    workers: Sequence[Place],
    costs: Sequence[float],
    say: Callable[[str], None] = print,
) -> None:
    """Run those that are not done, one in each place at a time, in this order. costs: of each, in any unit; they steer the progress bar alone.

    Raises StudyError if one fails for another reason than numbers that were not finite, and if another call is at work in the folder.
    """
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _execute(jobs, folder, workers, costs, say)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One call at a time; the lock ends with its process. Windows has none."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudyError(
                folder,
                got="another call that is at work in it",
                allowed="one at a time",
                fix="wait for it, or another --name",
            ) from error
        yield


def _execute(
    jobs: Sequence[Job],
    folder: Path,
    free: Sequence[Place],
    costs: Sequence[float],
    say: Callable[[str], None],
) -> None:
    todo = [(j, c) for j, c in zip(jobs, costs, strict=True) if not done(j, folder)]
    if len(todo) < len(jobs):
        say(f"{len(jobs) - len(todo)} of {len(jobs)} runs are there already")
    running: list[tuple[Job, float, Place, list[BaseProcess]]] = []
    failures: list[str] = []
    free = list(free)
    with tqdm(
        total=sum(c for _, c in todo) or 1,
        unit="s",
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
    ) as bar:
        try:
            while running or (todo and not failures):
                while todo and free and not failures:
                    j, cost = todo.pop(0)
                    shutil.rmtree(folder / j.name, ignore_errors=True)
                    place = free.pop(0)
                    running.append((j, cost, place, start(j, folder, place)))
                if alive := [
                    p.sentinel for *_, processes in running for p in processes if p.is_alive()
                ]:
                    wait(alive)
                for run in list(running):
                    j, cost, place, processes = run
                    if any(p.exitcode is None for p in processes):
                        continue  # where a rank failed, the others' watchdogs end them
                    running.remove(run)
                    free.append(place)
                    bar.update(min(cost, bar.total - bar.n))  # sums round
                    output = (folder / "configs" / f"{j.name}.log").read_text(errors="replace")
                    codes = [p.exitcode for p in processes if p.exitcode]
                    if NOT_FINITE[0] in codes and (why := NOT_FINITE[1].search(output)):
                        (folder / j.name / "failed.json").write_text(
                            json.dumps({"why": why.group()}) + "\n"
                        )
                    elif codes:
                        failures.append(f"{j.name}: exit code {codes[0]}\n{output[-2000:]}")
                    bar.set_postfix_str(f"{len(todo) + len(running)} runs to go")
        finally:
            left = [p for *_, processes in running for p in processes]
            for process in left:
                process.terminate()
            for process in left:
                process.join()
    if failures:
        raise StudyError(
            "a run of the study failed",
            got=failures[0],
            allowed="runs that end",
            fix="see above, and call the study again: what is done stays",
        )


def done(job: Job, folder: Path) -> bool:
    """Whether it has a result, of this very configuration. Another configuration under its name raises StudyError."""
    path = folder / job.name
    if not finished(path):
        return False
    there = configuration.flat(configuration.of_file(path / "config.toml"))
    for key, value in configuration.flat(job.config).items():
        if (
            value != there[key]
            and not key.startswith(NEUTRAL)
            and (key not in FILLED_IN or value != FILLED_IN[key])
        ):
            raise StudyError(
                path,
                got=f"{key} = {value!r}",
                allowed=f"{there[key]!r}, as the run that is there had it",
                fix=f"another --name, or delete {path}",
            )
    return True


def finished(path: Path) -> bool:
    """Whether a run folder has a result, of whatever configuration."""
    return any((path / name).is_file() for name in ("summary.json", "failed.json"))


def start(job: Job, folder: Path, place: Place = Place()) -> list[BaseProcess]:
    """train_gpt.py in processes of its own, one a rank; the first one's output goes to configs/<name>.log beside the configuration they read, others' to <name>.<rank>.log."""
    base = folder / "configs" / job.name
    base.with_name(f"{job.name}.toml").write_text(
        configuration.to_toml(job.config), encoding="utf-8"
    )
    processes = []
    for rank, environment in enumerate(place.environments()):
        log = base.with_name(f"{job.name}.{rank}.log" if rank else f"{job.name}.log")
        log.write_text("")
        process = _context().Process(
            target=_train, args=(str(ROOT / "train_gpt.py"), f"{base}.toml", str(log), environment)
        )
        process.start()
        processes.append(process)
    return processes


def _context() -> Any:
    """Processes forked from one that has torch imported, where the system can: a run then starts in a tenth of a second."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _train(script: str, config: str, log: str, environment: dict[str, str]) -> None:
    """In the child, which ends with its parent: one left behind would write where the next call begins anew."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    os.environ.update(environment)
    with open(log, "w", buffering=1) as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
        sys.argv = [script, config]
        runpy.run_path(script, run_name="__main__")


def summary(path: Path) -> dict[str, Any] | None:
    """A run's summary.json; None of one that failed."""
    file = path / "summary.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def metrics(path: Path) -> list[dict[str, Any]]:
    """A run's metrics.jsonl."""
    return [
        json.loads(line)
        for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def machines(told: Sequence[Mapping[str, Any]]) -> str:
    """Those that trained, by the runs' summaries; summaries of older commits do not tell."""
    return ", ".join(dict.fromkeys(s.get("hardware") or "not known" for s in told)) or "not known"


def versions(told: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """Of the program and torch, every one that made a judged run, by the runs' summaries. note: what goes with what, where there is more than one."""
    found = sorted({(s["commit"] or "no commit", bool(s["dirty"]), s["torch"]) for s in told})
    commits = [
        f"{'commit ' if commit != 'no commit' else ''}{commit}{' (dirty)' if dirty else ''}"
        for commit, dirty, _ in found
    ]
    made = "; ".join(
        f"{commit} with torch {torch}" for commit, (_, _, torch) in zip(commits, found, strict=True)
    )
    return {
        "python": platform.python_version(),
        "torch": ", ".join(dict.fromkeys(torch for _, _, torch in found)) or torch.__version__,
        "nanodual": None
        if {c for c, _, _ in found} <= {"no commit"}
        else ", ".join(dict.fromkeys(commits)),
        "note": f"the judged runs are of {len(found)} versions: {made}" if len(found) > 1 else None,
    }


def write_json(path: Path, content: Any) -> None:
    """Numbers that are not finite, which JSON has not, as null."""

    def finite(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: finite(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [finite(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    path.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


# ---- cost

OVERHEAD = 5e-3  # seconds a layer and step beside FLOPs, of one CPU thread: `python -m studies.transfer` at width 64 (LOG.md)
STARTUP = 1.0  # seconds a run


def speed(config: RunConfig) -> float:
    """FLOP/s of a float32 product of 512 × 512 matrices on a run's device and threads, the best of five."""
    device = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    if config.threads:
        torch.set_num_threads(config.threads)
    A = torch.ones(512, 512, device=device)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(4):
            B = A @ A
        B.sum().item()
        best = max(best, 4 * 2 * 512**3 / (time.perf_counter() - begin))
    return best


PRODUCTS = 60  # Hessian-vector products of one record of curvature, each about four times a gradient's FLOPs: `python -m studies.sharpness` (LOG.md)


def cost(config: Config, dataset: Dataset, flops_per_second: float) -> tuple[float, float]:
    """(FLOPs, seconds) of one run: forward, backward, optimizer, evaluations, curvature; Dualized's and Normalized's norms counted, other optimizers not."""
    c = config.train
    vocab_size = config.model.vocab_size or dataset.tokenizer.vocab_size
    shape = replace(config.model, vocab_size=vocab_size)
    with torch.device("meta"):
        model, norm = build_model_and_norm(replace(config, model=shape))
    dualize = sum(n.flops(model.get_parameter(k).shape) for k, n in norm.norms.items())
    baseline = BASELINES.get(config.optim.name)
    dualize *= baseline is None or baseline.normed
    step = model.flops_per_token() * c.batch_size * shape.block_size + dualize
    evaluations = 1 + (c.steps // c.eval_every if c.eval_every else 0)
    flops = c.steps * step + evaluations * model.flops_per_token() / 3 * (
        c.eval_tokens or dataset.manifest.splits["val"].tokens
    )
    if c.sharpness_every:
        flops += (
            (1 + c.steps // c.sharpness_every)
            * PRODUCTS
            * 4
            * model.flops_per_token()
            * c.sharpness_sequences
            * shape.block_size
        )
    return flops, STARTUP + flops / flops_per_second + c.steps * shape.n_layer * OVERHEAD


def duration(seconds: Sequence[float], workers: int) -> str:
    """How long runs of so many seconds take, `workers` at a time, as one says it."""
    total = max(sum(seconds) / workers, max(seconds, default=0))
    return (
        f"{total:.0f} s"
        if total < 90
        else f"{total / 60:.0f} min"
        if total < 5400
        else f"{total / 3600:.1f} h"
    )
