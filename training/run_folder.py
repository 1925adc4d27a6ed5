"""The folder of a run, runs/<name>/: its files, and who may write into it.

config.toml, receipt.txt, metrics.jsonl, summary.json, loss.png, checkpoints/, log.txt. The run
holds a lock on log.txt while it lives, so that a dead run can be told from a running one.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .errors import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class RunFolder:
    """The folder of one run, as the process sees it that writes into it."""

    def __init__(self, path: Path, *, resume: bool, main: bool = True) -> None:
        """Check that the folder can be made, or resumed. Nothing is written yet.

        main: False for the ranks that write nothing. Raises RunError where a run of this name
        exists. The folder of a run that crashed before its first checkpoint gives its name back.
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
        if not resume and path.exists() and not has_crashed(path):
            raise RunError(
                f"run folder {path} exists",
                got="a run of this name",
                allowed="a new name, or going on with this run",
                fix="--run.name NAME, or --run.resume",
            )

    def create(self) -> None:
        """Make the folder and lock it. Raises RunError where another process was faster."""
        if not self.main:
            return
        if not self.resume and self.path.is_dir() and has_crashed(self.path):
            self.crashed = free_name(self.path.with_name(f"{self.path.name}.crashed"))
            self.path.rename(self.crashed)
        try:
            self.path.mkdir(parents=True, exist_ok=self.resume)
        except FileExistsError as error:
            raise RunError(
                f"run folder {self.path} exists",
                got="a run that started a moment ago",
                allowed="a new name",
                fix="--run.name NAME",
            ) from error
        self._lock = os.open(self.path / "log.txt", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        if not lock(self._lock):
            self.close()
            raise RunError(
                f"run folder {self.path}",
                got="another process that runs it now",
                allowed="one process at a time",
                fix="wait for its end, or --run.name NAME for a run of its own",
            )
        self.checkpoints.mkdir(exist_ok=True)

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


def has_crashed(path: Path) -> bool:
    """Return whether a run folder is of a run that is dead and has saved no checkpoint.

    A run that has a result keeps its name. One that lives holds the lock of its log.txt; where locks
    cannot be asked for, every run counts as alive.
    """
    log = path / "log.txt"
    results = ("summary.json", "failed.json", "checkpoints/step_*")  # failed.json: a study's
    saved = any(any(path.glob(pattern)) for pattern in results)
    if saved or fcntl is None or not log.is_file() or not (path / "config.toml").is_file():
        return False
    with log.open() as f:
        try:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def lock(file: int) -> bool:
    """Lock a file for this process, and return False where another one has it locked.

    Where the file system has no locks the file counts as locked for this process.
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
