"""Around a run: processes, device, precision, seeds, the run folder, metrics, clocks. Nothing here knows the model or the optimizer.

A rank is one process of a run, started alone or by torchrun (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT).
"""

import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from optim.errors import Refusal
from optim.settings import Range

try:
    import resource
except ImportError:  # Windows
    resource = None

T = TypeVar("T")
HUNG = 124  # exit code, as timeout(1)'s


class RunError(Refusal):
    """A run that cannot start here: what was got, what is allowed, how to fix it."""


class RankError(RunError):
    """A RunError of one rank, before ranks can tell each other."""


@dataclass
class RunConfig:
    """Where a run is computed, by how many processes, and where its folder is."""

    name: str | None = None
    """Of the run folder; by default the configuration's name and the time."""

    dir: str = "runs"
    """Where run folders live."""

    seed: Annotated[int, Range(0, 2**63)] = 0
    """Of the initial weights, the order of the data and random masks."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes cuda, then mps, then cpu."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is autocast. auto takes it on GPUs that have it, and elsewhere where the model's own products
    are faster in it."""

    compile: bool = False
    """Compile the model with torch.compile, before any clock starts."""

    threads: Annotated[int, Range(1)] | None = None
    """Of the CPU; by default torch's choice."""

    resume: bool | Literal["auto"] = False
    """Resume the named run from its newest whole checkpoint. "auto" starts it where there is none."""

    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """With several processes: ddp has the weights on every one, fsdp shards them over all, hsdp over
    groups of shard_size neighbours, with a copy in each group."""

    shard_size: Annotated[int, Range(1)] | None = None
    """Processes of one group of hsdp; by default those of one machine."""

    timeout: Annotated[float, Range(0, above=True)] = 600.0
    """Seconds without progress until the run ends and names the process it waits for."""


# Dense bf16 peaks in FLOP/s, by the device's full name, from NVIDIA's data sheets (without sparsity).
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


class Runtime:
    """What a run computes on: ranks, torch device, precision, autocast, generators. `choices` says what was chosen for the user."""

    def __init__(self, config: RunConfig, product: tuple[int, int, int] | None = None) -> None:
        """product: (rows, inner, columns) of the model's MLP, the rows of all ranks together, by which precision = "auto" chooses on devices other than CUDA; without it fp32 is taken."""
        self.choices: list[str] = []
        self.rank, self.size = (
            int(os.environ.get("RANK", "0")),
            int(os.environ.get("WORLD_SIZE", "1")),
        )
        self.local_rank, self.local_size = (
            int(os.environ.get(k, d))
            for k, d in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", str(self.size)))
        )
        self.main = self.rank == 0
        missing = [k for k in ("RANK", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
        if self.size > 1 and missing:
            raise RankError(
                f"WORLD_SIZE {self.size}",
                got=f"no {', '.join(missing)}",
                allowed="one process without WORLD_SIZE, or all that torchrun sets",
                fix="torchrun --standalone --nproc_per_node=N train_gpt.py …",
            )
        self.parallel = config.parallel if self.size > 1 else "ddp"
        if self.parallel != config.parallel:
            self.choices.append(
                f"run.parallel = ddp (one process: there is nothing to shard, {config.parallel} would change nothing)"
            )
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.shards = self._shards(config)
        self.device = torch.device(self._device(config))
        self.control: Any = None  # small things between hosts
        self.watchdog: Watchdog | None = None
        self.signal = 0
        self._stopping: tuple[Any, torch.Tensor] | None = (
            None  # the agreement on signals that is under way
        )
        if self.size > 1:
            self._connect(config)
        self.precision: Literal["fp32", "bf16"] = self.on_main(
            lambda: self._precision(config, product)
        )  # type: ignore[assignment]
        torch.manual_seed(config.seed)

    # ---- ranks

    def _connect(self, config: RunConfig) -> None:
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        store, *_ = next(rendezvous("env://", timeout=timedelta(seconds=config.timeout)))
        # After a restart by torchrun the store still has the addresses of the dead.
        store = PrefixStore(f"nanodual {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # Later than the watchdog, which can say more.
        patience = timedelta(seconds=config.timeout + 60)
        kwargs: dict[str, Any] = {"device_id": self.device} if self.device.type == "cuda" else {}
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=self.rank,
            world_size=self.size,
            timeout=patience,
            **kwargs,
        )
        self.control = dist.new_group(backend="gloo", timeout=patience)
        self.watchdog = Watchdog(
            PrefixStore("watchdog", store), self.rank, self.size, config.timeout
        )
        self.beat(0, "start")
        kinds = self.gather((self.device.type, self.parallel, self.shards, self.local_size))
        if len(set(kinds)) > 1:
            rank = next(r for r, kind in enumerate(kinds) if kind != kinds[0])
            raise RunError(
                "ranks that differ",
                got=f"(device, run.parallel, shards, ranks on the machine) {kinds[0]} on rank 0 and {kinds[rank]} on rank {rank}",
                allowed="the same on all",
                fix="--run.device, --run.shard-size, and as many processes on every machine",
            )
        machines = self.size // self.local_size
        self.choices.append(
            f"backend = {'nccl' if self.device.type == 'cuda' else 'gloo'} for {self.size} ranks on {machines} machine{'s' * (machines > 1)},"
            f" run.parallel = {self.parallel}"
            + (f" with {self.shards} shards" if self.parallel != "ddp" else "")
        )

    def _shards(self, config: RunConfig) -> int:
        if self.parallel != "hsdp":
            return self.size if self.parallel == "fsdp" else 1
        shards = config.shard_size or self.local_size
        if not 1 <= shards <= self.size or self.size % shards:
            raise RunError(
                "run.shard_size",
                got=shards,
                allowed=f"a divisor of the {self.size} ranks",
                fix="--run.shard-size, or leave it out for one group a machine",
            )
        return shards

    def group(self) -> Any:
        """A process group of its own for the thread that writes checkpoints."""
        return dist.new_group(backend="gloo", timeout=timedelta(hours=1)) if self.size > 1 else None

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def together(self, f: Callable[[], T]) -> T:
        """f() on every rank. A ValueError on any of them is one on all."""
        value, error = None, None
        try:
            value = f()
        except ValueError as found:
            error = found
        errors = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(errors):
            if text is not None:
                raise RunError(f"rank {rank}: {text}")
        return value  # type: ignore[return-value]

    def on_main(self, f: Callable[[], T]) -> T:
        """f() on rank 0, its value on all."""
        return self.gather(self.together(lambda: f() if self.main else None))[0]  # type: ignore[return-value]

    def total(self, *values: float) -> list[float]:
        """Sums over ranks, in their order."""
        return [sum(column) for column in zip(*self.gather(values), strict=True)]

    def shard(self, model: nn.Module, units: Iterable[nn.Module]) -> None:
        """Shard the weights of a model, one unit after the other and the rest at last, as run.parallel says."""
        if self.parallel == "ddp":
            return
        shape, names = (
            ((self.size,), ("shard",))
            if self.parallel == "fsdp"
            else ((self.size // self.shards, self.shards), ("replicate", "shard"))
        )
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        for unit in (*units, model):
            fully_shard(unit, mesh=mesh)
        for unit in model.modules():
            # gloo has taken FSDP's average for a sum (pytorch#162338): sums are asked for, which FSDP divides itself.
            if self.device.type == "cpu" and isinstance(unit, FSDPModule):
                unit.set_force_sum_reduction_for_comms(True)

    def beat(self, step: int, doing: str) -> None:
        """This rank goes on: what it does now, for the watchdog."""
        if self.watchdog is not None:
            self.watchdog.beat(step, doing)

    def at_ease(self) -> None:
        """Nothing is watched any more: what is left takes as long as it takes."""
        if self.watchdog is not None:
            self.watchdog.stop()

    def stop_wanted(self) -> int:
        """The signal (SIGTERM, SIGINT) that a rank got, the same on all ranks; 0 for none. Called once a step; with several ranks, one step late."""
        if self.size == 1:
            return self.signal
        wanted = 0
        if self._stopping is not None:
            work, seen = self._stopping
            work.wait()
            wanted = int(seen.item())
        seen = torch.tensor([self.signal])
        self._stopping = (
            dist.all_reduce(seen, dist.ReduceOp.MAX, group=self.control, async_op=True),
            seen,
        )
        return wanted

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT are for stop_wanted() in here. A SIGINT more than a second after the first signal interrupts at once.

        Repeated ones do not: torchrun passes on what a scheduler or a terminal has sent to its workers already.
        """
        first = 0.0

        def note(number: int, _: object) -> None:
            nonlocal first
            if self.signal and number == signal.SIGINT and time.monotonic() > first + 1:
                raise KeyboardInterrupt
            if not self.signal:
                self.signal, first = number, time.monotonic()

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def seed(self, *numbers: int) -> None:
        """Seed torch's generators from the numbers alone, so that nothing depends on who draws, or on what was drawn before."""
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))

    def close(self) -> None:
        """Leave, when everybody has come here: a rank that leaves early aborts the others."""
        self.at_ease()
        if self.size > 1:
            if self._stopping is not None:
                self._stopping[0].wait()
            dist.barrier(group=self.control)
            dist.destroy_process_group()

    # ---- device

    def _device(self, config: RunConfig) -> str:
        there = [
            d
            for d, found in (
                ("cuda", torch.cuda.is_available()),
                ("mps", torch.backends.mps.is_available()),
                ("cpu", True),
            )
            if found
        ]
        device = config.device
        if device == "auto":
            device = there[0]
            self.choices.append(f"run.device = {device} (found here: {', '.join(there)})")
        if device not in there:
            error = RunError if self.size == 1 else RankError
            raise error(
                "run.device",
                got=device,
                allowed=f"{', '.join(there)}, found here",
                fix="--run.device auto",
            )
        if device == "mps" and self.size > 1:
            raise RunError(
                "run.device",
                got=f"mps and {self.size} ranks",
                allowed="cuda, cpu",
                fix="--run.device cpu, or one process",
            )
        if device == "cuda" and self.size > 1:
            if self.local_rank >= torch.cuda.device_count():
                raise RankError(
                    "LOCAL_RANK",
                    got=self.local_rank,
                    allowed=f"below {torch.cuda.device_count()}, the GPUs of this machine",
                    fix="torchrun --nproc_per_node=gpu",
                )
            torch.cuda.set_device(self.local_rank)
            return f"cuda:{self.local_rank}"
        return device

    def _precision(
        self, config: RunConfig, product: tuple[int, int, int] | None
    ) -> Literal["fp32", "bf16"]:
        if config.precision != "auto":
            return config.precision
        if self.device.type == "cuda":
            has = not bfloat16_is_emulated(self.device)
            fine, why = has, f"this GPU has {'' if has else 'no '}bf16"
        elif product is None:
            fine, why = False, "no product of a model to time"
        else:
            rows, inner, columns = product
            gain = bf16_gain(self.device, rows // self.size, inner, columns)
            fine, why = (
                gain > 1.2,
                f"in bf16 the MLP's product, casts and backward pass included, was {times(gain)} here",
            )
        precision = "bf16" if fine else "fp32"
        self.choices.append(f"run.precision = {precision} ({why})")
        return precision

    def autocast(self) -> AbstractContextManager[Any]:
        return (
            torch.autocast(self.device.type, torch.bfloat16)
            if self.precision == "bf16"
            else nullcontext()
        )

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

    def peak_memory_bytes(self) -> int | None:
        """Most memory held by this rank: of the device's allocator, or of the process on a CPU. None on Windows, which does not count it so."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if resource is None:
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


PROBE_FLOPS = 4e9  # of bf16_gain's product at most: a tenth of a second in fp32 on a slow core


def bf16_gain(device: torch.device, rows: int, inner: int, columns: int) -> float:
    """How many times as fast as in fp32 a linear map x (rows, inner) → (rows, columns) and its gradients are under bf16 autocast; 0 where it does not run.

    rows: cut so that the products stay below PROBE_FLOPS. Alternately, best of three, or of two where bf16 is ten times as slow: emulation is.
    """
    rows = max(1, min(rows, int(PROBE_FLOPS / (6 * inner * columns))))
    x = torch.ones(rows, inner, device=device, requires_grad=True)
    W = torch.ones(columns, inner, device=device, requires_grad=True)

    def seconds(dtype: torch.dtype) -> float:
        start = time.perf_counter()
        with torch.autocast(
            device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False
        ):
            loss = nn.functional.linear(x, W).sum()
        sum(g.sum() for g in torch.autograd.grad(loss, (x, W))).item()  # type: ignore[union-attr]
        return time.perf_counter() - start

    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    try:
        for dtype in best:
            seconds(dtype)  # the first ones are slower
        for turn in range(3):
            best = {dtype: min(before, seconds(dtype)) for dtype, before in best.items()}
            if turn and best[torch.bfloat16] > 10 * best[torch.float32]:
                break
    except RuntimeError:
        return 0.0
    return best[torch.float32] / best[torch.bfloat16]


def bfloat16_is_emulated(device: torch.device) -> bool:
    """Whether a device has no bfloat16 products of its own. Other than on CUDA that is found by timing products of 256³, which emulation on AVX2 makes 20 to 50 times
    slower than float32's, and hardware (AVX512-BF16) 2 to 3 times faster: 4 times slower is taken for emulation."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return bf16_gain(device, 256, 256, 256) < 1 / 4


def times(gain: float) -> str:
    """A ratio of speeds in words."""
    if gain <= 0:
        return "not possible"
    ratio = max(gain, 1 / gain)
    return f"{ratio:.{0 if ratio >= 10 else 1}f} × {'faster' if gain >= 1 else 'slower'}"


class Watchdog(threading.Thread):
    """Ends the process with code HUNG when it makes no progress for `timeout` seconds, and says which rank the others wait for."""

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        super().__init__(daemon=True)
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.latest, self.since = (0, 0, "start"), time.monotonic()  # (beats, step, doing)
        self.ended = threading.Event()

    def beat(self, step: int, doing: str) -> None:
        self.latest, self.since = (self.latest[0] + 1, step, doing), time.monotonic()
        if not self.is_alive() and not self.ended.is_set():
            self.start()

    def stop(self) -> None:
        self.ended.set()

    def run(self) -> None:
        while not self.ended.wait(min(1.0, self.timeout / 10)):
            idle = time.monotonic() - self.since
            with suppress(
                RuntimeError
            ):  # the store went with its rank: that is an error of the main thread's
                self.store.set(str(self.rank), json.dumps([*self.latest, where(), idle]))
            if idle > self.timeout:
                print(self.report(), file=sys.stderr, flush=True)
                os._exit(HUNG)

    def report(self) -> str:
        """Which ranks are behind all others, or have fallen silent; where all are at the same point, each one's own place in the code."""
        found: dict[int, tuple[int, int, str, str, float]] = {}

        def read() -> None:
            for rank in range(self.size):
                with suppress(RuntimeError):
                    if self.store.check([str(rank)]):
                        found[rank] = tuple(json.loads(self.store.get(str(rank))))  # type: ignore[assignment]

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(10)
        _, step, doing = self.latest
        silent = [f"rank {r} (not heard of)" for r in range(self.size) if r not in found]
        # A process that is stopped does not tell for how long it has been idle: what it told last is short.
        points = {r: (n, idle > self.timeout / 2) for r, (n, *_, idle) in found.items()}
        behind = min(points.values(), default=None)
        late = silent or [
            f"rank {r} ({what} at step {at}, in {place})"
            for r, (_, at, what, place, _) in sorted(found.items())
            if points[r] == behind
        ]
        self.leave_store(len(late))
        refusal = RunError(
            f"no progress for {self.timeout:g} s",
            got=f"{', '.join(late)} behind the others; this is rank {self.rank}, {doing} at step {step}, in {where()}",
            allowed="run.timeout seconds between two parts of a step",
            fix="look at that rank's machine and output; --run.timeout where parts take longer",
        )
        return f"error: {refusal}"

    def leave_store(self, late: int) -> None:
        """It may live in this process, and end with it: wait until all but the late ranks have read it, 10 s at most."""
        end = time.monotonic() + 10
        with suppress(RuntimeError):
            self.store.add("readers", 1)
            while (
                self.store.add("readers", 0) < (self.size - late or self.size)
                and time.monotonic() < end
            ):
                time.sleep(0.05)


def where() -> str:
    """Where the main thread is: file, line and function of its innermost Python frame."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return (
        "the end"
        if frame is None
        else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
    )


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
            self.pending.append(
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            )
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


def telling(
    stream: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    total: int,
    say: Callable[[str], None],
    every: float = 10.0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of an evaluation, and how far it is: a bar on a terminal, else a line every so many seconds. total: targets of all batches."""
    start = told = time.perf_counter()
    count = 0
    with tqdm(
        total=total,
        desc="validation",
        unit="tok",
        unit_scale=True,
        leave=False,
        disable=None,
        dynamic_ncols=True,
    ) as bar:
        for x_BT, y_BT in stream:
            yield x_BT, y_BT
            targets = int((y_BT >= 0).sum())
            count += targets
            bar.update(targets)
            now = time.perf_counter()
            if bar.disable and now - told >= every and count < total:
                told = now
                say(
                    f"validation: {count:,} of {total:,} tokens, {(now - start) * (total / count - 1):.0f} s left"
                )


class RunFolder:
    """runs/<name>/: config.toml, receipt.txt, metrics.jsonl, summary.json, loss.png, checkpoints/, log.txt."""

    def __init__(self, path: Path, *, resume: bool, main: bool = True) -> None:
        """main: False for the ranks that write nothing."""
        self.path, self.resume, self.main = path, resume, main
        if path.parent.exists() and not path.parent.is_dir():
            raise RunError(
                "run.dir",
                got=f"{path.parent}, a file",
                allowed="a folder, which is made where it is missing",
                fix="--run.dir FOLDER",
            )
        if resume and not path.is_dir():
            raise RunError(
                f"nothing to resume at {path}",
                got="no such run folder",
                allowed=listing(path.parent),
                fix="--run.name, or leave out --run.resume",
            )
        if not resume and path.exists():
            raise RunError(
                f"run folder {path} exists",
                got="a run of this name",
                allowed="a new name, or going on with this run",
                fix="--run.name NAME, or --run.resume",
            )
        self.checkpoints = path / "checkpoints"

    def create(self) -> None:
        if not self.main:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=self.resume)
        except FileExistsError as error:
            raise RunError(
                f"run folder {self.path} exists",
                got="a run that started a moment ago",
                allowed="a new name",
                fix="--run.name NAME",
            ) from error
        self.checkpoints.mkdir(exist_ok=True)

    def say(self, text: str = "") -> None:
        """To the terminal, above a progress bar, and to log.txt."""
        if not self.main:
            return
        tqdm.write(text)
        sys.stdout.flush()
        with (self.path / "log.txt").open("a", encoding="utf-8") as f:
            f.write(text + "\n")

    def write(self, name: str, text: str) -> None:
        """A whole file, atomically."""
        if not self.main:
            return
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path / name)

    def write_json(self, name: str, value: object) -> None:
        self.write(name, json.dumps(value, indent=1) + "\n")

    def log_metrics(self, record: dict[str, Any]) -> None:
        if not self.main:
            return
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
        if not self.main:
            return
        self.write(
            "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in self.metrics() if wanted(r))
        )
        (self.path / "summary.json").unlink(missing_ok=True)


def listing(folder: Path) -> str:
    names = sorted(p.parent.name for p in folder.glob("*/config.toml")) if folder.is_dir() else []
    return ", ".join(names) or f"nothing, {folder} holds no runs"


def git_state() -> tuple[str | None, bool | None]:
    """(commit, uncommitted changes) of this source tree, or (None, None) outside git."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def hardware(device: str) -> str:
    """The processor, the cores that this process may use, the vector instructions that torch takes there, and the device where it is another."""
    info = Path("/proc/cpuinfo")
    named = (
        re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)
        if info.is_file()
        else None
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"{named[1] if named else platform.processor() or platform.machine()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"
    return cpu if device.startswith("cpu") else f"{device} ({cpu})"
