"""The processes of a run and what they do together.

A rank is one process of a run, started alone or by torchrun, which sets RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. One process takes the same path as many:
its sums and lists are of one value.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous

from .errors import RankError, RunError
from .watchdog import Watchdog

if TYPE_CHECKING:
    from .runtime import RunConfig

T = TypeVar("T")


class Ranks:
    """This process among the processes of a run.

    rank, size: its number and how many there are; local_rank, local_size: on this machine. main:
    whether it is rank 0, which writes. parallel, shards: how weights are held. choices: what was
    chosen for the user, to be told.
    """

    def __init__(self, config: "RunConfig") -> None:
        """Read the environment. Raises RankError where torchrun's variables are incomplete."""
        self.choices: list[str] = []
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(self.size)))
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
                "run.parallel = ddp (one process: there is nothing to shard,"
                f" {config.parallel} would change nothing)"
            )
        self.shards = self._count_shards(config)
        self.control: Any = None  # the process group of small things between hosts
        self.watchdog: Watchdog | None = None
        self.signal = 0
        # The agreement on signals that is under way.
        self._stopping: tuple[Any, torch.Tensor] | None = None

    def _count_shards(self, config: "RunConfig") -> int:
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

    # ---- coming and leaving

    def connect(self, config: "RunConfig", device: torch.device) -> None:
        """Make the process groups, and compare what all ranks must have alike.

        Raises RunError where ranks differ in device, parallelism, shards or ranks on a machine.
        """
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, *_ = next(rendezvous("env://", timeout=timedelta(seconds=config.timeout)))
        # After a restart by torchrun the store still has the addresses of the dead.
        store = PrefixStore(f"nanodual {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # Later than the watchdog, which can say more.
        patience = timedelta(seconds=config.timeout + 60)
        kwargs: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
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
        self._compare((device.type, self.parallel, self.shards, self.local_size))
        machines = self.size // self.local_size
        backend = "nccl" if device.type == "cuda" else "gloo"
        shards = f" with {self.shards} shards" if self.parallel != "ddp" else ""
        self.choices.append(
            f"backend = {backend} for {self.size} ranks on {machines}"
            f" machine{'s' * (machines > 1)}, run.parallel = {self.parallel}{shards}"
        )

    def _compare(self, kind: tuple[str, str, int, int]) -> None:
        kinds = self.gather(kind)
        if len(set(kinds)) > 1:
            other = next(r for r, k in enumerate(kinds) if k != kinds[0])
            raise RunError(
                "ranks that differ",
                got="(device, run.parallel, shards, ranks on the machine)"
                f" {kinds[0]} on rank 0 and {kinds[other]} on rank {other}",
                allowed="the same on all",
                fix="--run.device, --run.shard-size, and as many processes on every machine",
            )

    def close(self) -> None:
        """Wait until every rank is here, then leave: one that leaves early aborts the others."""
        self.stop_watchdog()
        if self.size > 1:
            if self._stopping is not None:
                self._stopping[0].wait()
            dist.barrier(group=self.control)
            dist.destroy_process_group()

    # ---- values of all ranks

    def group(self) -> Any:
        """Return a process group of its own for the thread that writes checkpoints."""
        return dist.new_group(backend="gloo", timeout=timedelta(hours=1)) if self.size > 1 else None

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def together(self, f: Callable[[], T]) -> T:
        """Return f(), called on every rank. A ValueError on any of them is one on all."""
        value, own_error = None, None
        try:
            value = f()
        except ValueError as error:
            own_error = error
        errors = self.gather(None if own_error is None else str(own_error))
        if own_error is not None:
            raise own_error
        for rank, text in enumerate(errors):
            if text is not None:
                raise RunError(f"rank {rank}: {text}")
        return value  # type: ignore[return-value]

    def on_main(self, f: Callable[[], T]) -> T:
        """Return on all ranks what f() is on rank 0."""
        return self.gather(self.together(lambda: f() if self.main else None))[0]  # type: ignore[return-value]

    def total(self, *values: float) -> list[float]:
        """Return the sum of each value over ranks, added in their order."""
        return [sum(column) for column in zip(*self.gather(values), strict=True)]

    def shard(self, model: nn.Module, units: Iterable[nn.Module]) -> None:
        """Shard the weights of a model as run.parallel says: the units one by one, then the rest."""
        if self.parallel == "ddp":
            return
        shape, names = (
            ((self.size,), ("shard",))
            if self.parallel == "fsdp"
            else ((self.size // self.shards, self.shards), ("replicate", "shard"))
        )
        device = next(model.parameters()).device
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        for unit in (*units, model):
            fully_shard(unit, mesh=mesh)
        for unit in model.modules():
            # gloo has taken FSDP's average for a sum (pytorch#162338): sums are asked for, which
            # FSDP divides itself.
            if device.type == "cpu" and isinstance(unit, FSDPModule):
                unit.set_force_sum_reduction_for_comms(True)

    # ---- progress and signals

    def beat(self, step: int, doing: str) -> None:
        """Tell the watchdog that this rank goes on, and what it does now."""
        if self.watchdog is not None:
            self.watchdog.beat(step, doing)

    def stop_watchdog(self) -> None:
        """Watch nothing any more: what is left takes as long as it takes."""
        if self.watchdog is not None:
            self.watchdog.stop()

    def stop_wanted(self) -> int:
        """Return the signal (SIGTERM, SIGINT) that a rank got, the same on all ranks, or 0.

        It is called once a step. With several ranks a signal is known one step late.
        """
        if self.size == 1:
            return self.signal
        wanted = 0
        if self._stopping is not None:
            work, largest = self._stopping
            work.wait()
            wanted = int(largest.item())
        largest = torch.tensor([self.signal])
        work = dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control, async_op=True)
        self._stopping = work, largest
        return wanted

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Keep SIGTERM and SIGINT for stop_wanted() within the block.

        A SIGINT more than a second after the first signal interrupts at once. Earlier ones do not:
        torchrun passes on what a scheduler or a terminal has sent to its workers already.
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
