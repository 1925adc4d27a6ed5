"""The clocks of a run: the training clock, and a stopwatch for a part of each step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .runtime import Runtime


class Clock:
    """The training clock. It waits for the device when it starts, pauses and is read."""

    def __init__(self, runtime: Runtime, seconds: float = 0.0) -> None:
        """Take the seconds that a resumed run has trained already."""
        self.runtime, self.before = runtime, seconds
        self.since: float | None = None

    def start(self) -> None:
        self.runtime.synchronize()
        self.since = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds of training so far."""
        if self.since is None:
            return self.before
        self.runtime.synchronize()
        return self.before + time.perf_counter() - self.since

    def stop(self) -> None:
        self.before, self.since = self.seconds(), None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing within the block. A clock that stood goes on standing."""
        running = self.since is not None
        self.stop()
        yield
        if running:
            self.start()


class Stopwatch:
    """Counts the device's seconds inside `with watch:` blocks, on mps the host's.

    A block does not wait for the device; seconds() and latest() do.
    """

    def __init__(self, runtime: Runtime, seconds: float = 0.0) -> None:
        """Take the seconds that a resumed run has counted already."""
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
        """Return the seconds of all blocks."""
        for start, end in self.pending:
            end.synchronize()
            self.last = start.elapsed_time(end) / 1e3
            self.total += self.last
        self.pending = []
        return self.total

    def latest(self) -> float:
        """Return the seconds of the last block."""
        self.seconds()
        return self.last
