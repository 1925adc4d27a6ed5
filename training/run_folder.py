"""The folder of a run, runs/<name>/: its files, and the one process that may write into it.

config.toml, receipt.txt (norms), modular_norm.svg, metrics.jsonl, log.txt, checkpoints/, and at the
end summary.json (results, commit, machine), loss.png, geometry.png. A resumed run adds
resumed_<step>_config.toml and its kin. A run holds the lock of .lock, in which its machine's name
stands, while it lives: so a dead run can be told from a living one.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .errors import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PATIENCE = 5.0  # seconds that a resumed run waits for the lock of a process that is just ending


class RunFolder:
    """The folder of one run, as the process sees it that writes into it."""

    def __init__(self, path: Path, *, resume: bool, main: bool = True) -> None:
        """Check that the folder can be made, or resumed. Nothing is written yet.

        main: False for the ranks that write nothing. Raises RunError where a run of this name
        exists. The folder of a run that crashed without a result gives its name back.
        """
        self.path, self.resume, self.main = path, resume, main
        self.checkpoints = path / "checkpoints"
        self.crashed: Path | None = None  # where create() has put the folder of a crashed run
        self._lock: int | None = None
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
        if not resume and main and path.exists():
            with lock_of_crashed(path) as crashed:
                if not crashed:
                    raise RunError(
                        f"run folder {path} exists",
                        got="a run of this name",
                        allowed="a new name, or going on with this run",
                        fix="--run.name NAME, or --run.resume",
                    )

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def create(self) -> None:
        """Make the folder of a new run and lock it. Raises RunError if another was faster."""
        if not self.main:
            return
        if not self.resume:
            if self.path.is_dir():
                self.crashed = move_crashed(self.path)
            try:
                self.path.mkdir(parents=True)
            except FileExistsError as error:
                raise RunError(
                    f"run folder {self.path} exists",
                    got="a run that started a moment ago",
                    allowed="a new name",
                    fix="--run.name NAME",
                ) from error
            self.lock()
        self.checkpoints.mkdir(exist_ok=True)

    def lock(self) -> None:
        """Lock the folder for this process.

        Raises RunError where a living process of this machine has it. A lock that another machine
        holds is left aside: some network file systems keep it when its holder is gone.
        """
        if not self.main or fcntl is None:
            return
        file, end = self.path / ".lock", time.monotonic() + PATIENCE
        self._lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        while not is_locked_by_us(self._lock):
            if file.read_text(encoding="utf-8") not in ("", platform.node()):
                return
            if time.monotonic() > end:
                self.close()
                raise RunError(
                    f"run folder {self.path}",
                    got="another process that runs it now",
                    allowed="one process at a time",
                    fix="wait for its end, or --run.name NAME for a run of its own",
                )
            time.sleep(0.1)
        if file.read_text(encoding="utf-8") != platform.node():
            file.write_text(platform.node(), encoding="utf-8")

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def say(self, text: str = "") -> None:
        """Print a line, above a progress bar, and add it to log.txt."""
        if not self.main:
            return
        tqdm.write(text)
        sys.stdout.flush()
        with (self.path / "log.txt").open("a", encoding="utf-8") as f:
            f.write(text + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a whole file, atomically."""
        if not self.main:
            return
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path / name)

    def write_json(self, name: str, value: object) -> None:
        self.write(name, json.dumps(value, indent=1) + "\n")

    def log_metrics(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        if not self.main:
            return
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl, without a last line that a kill has cut."""
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
        """Drop the other records, for a resumed run, and the summary of an earlier end."""
        if not self.main:
            return
        kept = [record for record in self.metrics() if wanted(record)]
        self.write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        (self.path / "summary.json").unlink(missing_ok=True)


def is_locked_by_us(file: int) -> bool:
    """Try to lock a file, and return False where another process has it locked.

    Where the system or the file system has no locks the file counts as ours.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def lock_of_crashed(path: Path) -> Iterator[bool]:
    """Tell whether a run is dead and has saved nothing, and hold its lock meanwhile.

    A run that has a result keeps its name. A run counts as dead if it ran on this machine and its
    lock is free; where that cannot be known it counts as alive.
    """
    results = ("summary.json", "failed.json", "checkpoints/step_*")  # failed.json: a study's
    try:
        file = os.open(path / ".lock", os.O_RDWR)
    except OSError:
        yield False
        return
    try:
        yield (
            fcntl is not None
            and (path / ".lock").read_text(encoding="utf-8") == platform.node()
            and is_locked_by_us(file)
            and os.path.samestat(os.fstat(file), os.stat(path / ".lock"))
            and not any(any(path.glob(pattern)) for pattern in results)
        )
    finally:
        os.close(file)


def move_crashed(path: Path) -> Path | None:
    """Rename the folder of a crashed run, and return its new name; None if it has not crashed."""
    with lock_of_crashed(path) as crashed:
        if not crashed:
            return None
        aside = free_name(path.with_name(f"{path.name}.crashed"))
        path.rename(aside)
        return aside


def free_name(path: Path) -> Path:
    """Return the path, with the first number behind it that makes it new."""
    number = 1
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}{number}")
    return candidate


def listing(folder: Path) -> str:
    """Return the names of the runs in a folder, for a message."""
    names = sorted(p.parent.name for p in folder.glob("*/config.toml")) if folder.is_dir() else []
    return ", ".join(names) or f"nothing, {folder} holds no runs"
