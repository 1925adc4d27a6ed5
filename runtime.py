"""Around a run: device, precision, seeds, the run folder, metrics, clocks. Nothing here knows the model or the optimizer."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm


class RunError(ValueError):
    """A run that cannot start here: what was got, what is allowed, how to fix it."""


@dataclass
class RunConfig:
    """name: of the run folder, by default the configuration's name and the time. dir: where run folders live.

    device: auto takes cuda, then mps, then cpu. precision: bf16 is autocast; auto takes it where the hardware has it, found by running it.
    threads: of the CPU, by default torch's choice. resume: go on from the newest checkpoint of the named run.
    """

    name: str | None = None
    dir: str = "runs"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    threads: int | None = None
    resume: bool = False


# Dense bf16 peaks in FLOP/s, by the device's full name, from NVIDIA's data sheets (without sparsity).
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


class Runtime:
    """What a run computes on: torch device, precision, autocast, generators. `choices` says what was chosen for the user."""

    def __init__(self, config: RunConfig) -> None:
        self.choices: list[str] = []
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RunError(
                f"WORLD_SIZE: got {os.environ['WORLD_SIZE']}; allowed: 1, this version trains in one process\n  fix: start it without torchrun"
            )
        if config.threads is not None:
            if config.threads < 1:
                raise RunError(f"run.threads\n  got: {config.threads}\n  allowed: 1 or more\n  fix: leave it out")
            torch.set_num_threads(config.threads)
        self.device = torch.device(self._device(config))
        self.precision = self._precision(config)
        torch.manual_seed(config.seed)

    def _device(self, config: RunConfig) -> str:
        there = [
            d for d, found in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("cpu", True)) if found
        ]
        if config.device == "auto":
            self.choices.append(f"run.device = {there[0]} (found here: {', '.join(there)})")
            return there[0]
        if config.device not in there:
            raise RunError(f"run.device\n  got: {config.device}\n  allowed: {', '.join(there)}, found here\n  fix: --run.device auto")
        return config.device

    def _precision(self, config: RunConfig) -> Literal["fp32", "bf16"]:
        if config.precision != "auto":
            return config.precision
        gain = bf16_gain(self.device)
        precision = "bf16" if gain > 1.2 else "fp32"
        self.choices.append(f"run.precision = {precision} (a bf16 matrix product ran {gain:.1f}× as fast as fp32 here)")
        return precision

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def to_device(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        if self.device.type == "cuda":
            return [t.pin_memory().to(self.device, non_blocking=True) for t in tensors]
        return [t.to(self.device) for t in tensors]

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type}, {torch.get_num_threads()} threads"

    def peak_flops(self) -> float | None:
        """Of the device in bf16, FLOP/s; None where it is not known."""
        return PEAK_FLOPS.get(self.device_name()) if self.precision == "bf16" else None

    def peak_memory_bytes(self) -> int:
        """Most memory held: of the device's allocator, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def bf16_gain(device: torch.device, size: int = 512) -> float:
    """Seconds of an fp32 matrix product over those of a bf16 one, best of five; 0 where bf16 does not run."""

    def best(dtype: torch.dtype) -> float:
        a = torch.ones(size, size, dtype=dtype, device=device)
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            (a @ a).sum().item()
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    try:
        return best(torch.float32) / best(torch.bfloat16)
    except RuntimeError:
        return 0.0


class Clock:
    """The training clock. It reads the device as finished when it starts, pauses and is read."""

    def __init__(self, runtime: Runtime, seconds: float = 0.0) -> None:
        self.runtime, self.before, self.since = runtime, seconds, None

    def start(self) -> None:
        self.runtime.synchronize()
        self.since: float | None = time.perf_counter()

    def seconds(self) -> float:
        """So far."""
        if self.since is None:
            return self.before
        self.runtime.synchronize()
        return self.before + time.perf_counter() - self.since

    def stop(self) -> None:
        self.before, self.since = self.seconds(), None

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.stop()
        yield
        self.start()


class Stopwatch:
    """The device's seconds inside `with watch:` blocks, without waiting for it there; seconds() and latest() wait. On mps: the host's."""

    def __init__(self, runtime: Runtime, seconds: float = 0.0) -> None:
        self.cuda, self.total = runtime.device.type == "cuda", seconds
        self.last = 0.0
        self.pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self.cuda:
            self.pending.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.pending[-1][0].record()
        else:
            self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.pending[-1][1].record()
        else:
            self.last = time.perf_counter() - self.start
            self.total += self.last

    def seconds(self) -> float:
        """Of all blocks."""
        for start, end in self.pending:
            end.synchronize()
            self.last = start.elapsed_time(end) / 1e3
            self.total += self.last
        self.pending = []
        return self.total

    def latest(self) -> float:
        """Of the last block."""
        self.seconds()
        return self.last


class RunFolder:
    """runs/<name>/: config.toml, receipt.txt, metrics.jsonl, summary.json, loss.png, checkpoints/, log.txt."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path, self.resume = path, resume
        if path.parent.exists() and not path.parent.is_dir():
            raise RunError(
                f"run.dir\n  got: {path.parent}, a file\n  allowed: a folder, which is made where it is missing\n  fix: --run.dir FOLDER"
            )
        if resume and not path.is_dir():
            raise RunError(
                f"nothing to resume at {path}\n  got: no such run folder\n  allowed: {listing(path.parent)}\n  fix: --run.name, or leave out --run.resume"
            )
        if not resume and path.exists():
            raise RunError(
                f"run folder {path} exists\n  got: a run of this name\n  allowed: a new name, or going on with this run\n  fix: --run.name NAME, or --run.resume"
            )
        self.checkpoints = path / "checkpoints"

    def create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=self.resume)
        except FileExistsError as error:
            raise RunError(
                f"run folder {self.path} exists\n  got: a run that started a moment ago\n  allowed: a new name\n  fix: --run.name NAME"
            ) from error
        self.checkpoints.mkdir(exist_ok=True)

    def say(self, text: str = "") -> None:
        """To the terminal, above a progress bar, and to log.txt."""
        tqdm.write(text)
        sys.stdout.flush()
        with (self.path / "log.txt").open("a", encoding="utf-8") as f:
            f.write(text + "\n")

    def write(self, name: str, text: str) -> None:
        """A whole file, atomically."""
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path / name)

    def write_json(self, name: str, value: object) -> None:
        self.write(name, json.dumps(value, indent=1) + "\n")

    def log_metrics(self, record: dict[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        records = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:  # the last line of a killed process
                break
        return records

    def keep_metrics(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """For a resumed run: drop the other records, and the summary of an earlier end."""
        self.write("metrics.jsonl", "".join(json.dumps(r) + "\n" for r in self.metrics() if wanted(r)))
        (self.path / "summary.json").unlink(missing_ok=True)


def listing(folder: Path) -> str:
    names = sorted(p.parent.name for p in folder.glob("*/config.toml")) if folder.is_dir() else []
    return ", ".join(names) or f"nothing, {folder} holds no runs"


def git_state() -> tuple[str | None, bool | None]:
    """(commit, uncommitted changes) of this source tree, or (None, None) outside git."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None, None
