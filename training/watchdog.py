"""The watchdog of a run of several ranks: it ends a rank that waits in vain, and says for whom."""

import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from torch.distributed import Store

from .errors import RunError

HUNG = 124  # exit code, as timeout(1)'s


class Watchdog(threading.Thread):
    """A thread that ends its process with code HUNG after `timeout` seconds without progress.

    Every rank writes what it does into a store that all can read. The rank that ends says which
    rank the others wait for.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        super().__init__(daemon=True)
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.latest, self.since = (0, 0, "start"), time.monotonic()  # (beats, step, doing)
        self.ended = threading.Event()

    def beat(self, step: int, doing: str) -> None:
        """Note that the process goes on. The first beat starts the thread."""
        self.latest, self.since = (self.latest[0] + 1, step, doing), time.monotonic()
        if not self.is_alive() and not self.ended.is_set():
            self.start()

    def stop(self) -> None:
        """Watch no more."""
        self.ended.set()

    def run(self) -> None:
        """Publish this rank's progress every second, and end the process once there is none."""
        while not self.ended.wait(min(1.0, self.timeout / 10)):
            idle = time.monotonic() - self.since
            # The store may have gone with its rank: that is an error of the main thread's.
            with suppress(RuntimeError):
                self.store.set(str(self.rank), json.dumps([*self.latest, place_in_code(), idle]))
            if idle > self.timeout:
                print(self.report(), file=sys.stderr, flush=True)
                os._exit(HUNG)

    def report(self) -> str:
        """Return which ranks are behind all others, or are silent, and where each of them is.

        Where all are at the same point, all are named, each with its own place in the code.
        """
        progress: dict[int, tuple[int, int, str, str, float]] = {}

        def read() -> None:
            for rank in range(self.size):
                with suppress(RuntimeError):
                    if self.store.check([str(rank)]):
                        progress[rank] = tuple(json.loads(self.store.get(str(rank))))  # type: ignore[assignment]

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(10)
        _, step, doing = self.latest
        silent = [f"rank {r} (not heard of)" for r in range(self.size) if r not in progress]
        # A stopped process does not tell for how long it has been idle: what it told last is short.
        points = {r: (beats, idle > self.timeout / 2) for r, (beats, *_, idle) in progress.items()}
        behind = min(points.values(), default=None)
        late = silent or [
            f"rank {r} ({what} at step {at}, in {place})"
            for r, (_, at, what, place, _) in sorted(progress.items())
            if points[r] == behind
        ]
        self._wait_for_readers(len(late))
        refusal = RunError(
            f"no progress for {self.timeout:g} s",
            got=f"{', '.join(late)} behind the others; this is rank {self.rank}, {doing} at step"
            f" {step}, in {place_in_code()}",
            allowed="run.timeout seconds between two parts of a step",
            fix="look at that rank's machine and output; --run.timeout where parts take longer",
        )
        return f"error: {refusal}"

    def _wait_for_readers(self, late: int) -> None:
        """Wait until all but the late ranks have read the store, 10 s at most.

        The store may live in this process, and end with it.
        """
        end = time.monotonic() + 10
        with suppress(RuntimeError):
            self.store.add("readers", 1)
            expected = self.size - late or self.size
            while self.store.add("readers", 0) < expected and time.monotonic() < end:
                time.sleep(0.05)


def place_in_code() -> str:
    """Return file, line and function of the main thread's innermost Python frame."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "the end"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
