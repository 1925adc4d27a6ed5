"""The evidence of a study: a line for each run that ended, in a file that outlives its machine.

A study in the checkout's runs/NAME appends to studies/results/NAME.jsonl, which is committed. A
study in any other folder appends to runs.jsonl in that folder. A line has the run's name, the date
of its result, its settings and their SHA-256, its summary.json or failed.json, and the records of
its evaluations. Where a run folder is missing, it is restored from the line. Files of two machines
are merged by putting one behind the other. A run that stands there twice counts once: the first.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tomllib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data.shards import read_manifest
from training import config as configuration
from training.config import Config

from .jobs import FILLED_IN, NEUTRAL, Job, StudyError, changed_plugin, difference, from_flat

ROOT = Path(__file__).parent.parent
RESTORED = "restored.txt"  # in a run folder that was restored from its line
# Nats. One run ends 0.001 to 0.007 apart on two machines (docs/log.md, 2026-11-27).
APART = 0.01

Json = dict[str, Any]
Say = Callable[[str], None]


def file_of(folder: Path) -> Path:
    """Return the file that has the lines of the study in a folder, as a message has its path."""
    if folder.parent.resolve() != (ROOT / "runs").resolve():
        return folder / "runs.jsonl"
    file = ROOT / "studies/results" / f"{folder.name}.jsonl"
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


class Evidence:
    """The lines of a study, as they were read. Whoever appends holds the lock of its folder."""

    def __init__(self, folder: Path, say: Say = print) -> None:
        """Read the file. Raise StudyError for a line, but the last, that no study has written."""
        self.folder, self.file, self.say = folder, file_of(folder), say
        self._lines: dict[str, list[Json]] = {}
        content = self.file.read_bytes() if self.file.is_file() else b""
        *whole, self._rest = content.split(b"\n")  # the rest: a line whose end is missing
        self._whole_bytes = len(content) - len(self._rest)
        for number, text in enumerate(whole, 1):
            if not text.strip():
                continue
            if not (line := _parsed(text)):
                raise StudyError(
                    f"{self.file}, line {number}",
                    got=f"{text[:40].decode(errors='replace')}…",
                    allowed="a line as a study wrote it",
                    fix="delete it; git log -p has it as it was",
                )
            self._add(line)
        if line := _parsed(self._rest):
            self._add(line)

    def count(self) -> int:
        """Return the number of runs that have a line."""
        return len(self._lines)

    def _add(self, line: Json) -> None:
        self._lines.setdefault(line["run"], []).append(line)

    def line_of(self, wanted: Job) -> Json | None:
        """Return the first line of a job, None without one.

        Raises StudyError if the lines of its name have another configuration, or another plugin.
        """
        refusals = []
        for line in self._lines.get(wanted.name, ()):
            if refusal := self._refusal(wanted, line):
                refusals.append(refusal)
            else:
                return line
        if refusals:
            raise refusals[0]
        return None

    def _refusal(self, wanted: Job, line: Json) -> StudyError | None:
        """Return how a line is not of this job; None if it is."""
        values = configuration.flat(wanted.config) | {"data.dataset": _corpus(wanted.config)}
        trained = _trained(line)
        if key := difference(values, trained):
            got, allowed = f"{key} = {values[key]!r}", f"{trained[key]!r}, as that run had it"
        elif name := changed_plugin(wanted.config, _result(line)):
            got, allowed = f"another file of the plugin {name}", "the file that this run had"
        else:
            return None
        what = f"{self.file}, the line of {wanted.name}"
        return StudyError(what, got=got, allowed=allowed, fix="another --name, or delete the line")

    # ---- writing

    def mend(self) -> None:
        """Drop a last line that a kill has cut, or write the newline that a whole one lacks."""
        if not self._rest:
            return
        with self.file.open("r+b") as file:
            if _parsed(self._rest):
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
            else:
                file.truncate(self._whole_bytes)
                self.say(f"note: the last line of {self.file} was cut by a kill, and is dropped")
        self._rest = b""

    def append(self, ended: Job) -> None:
        """Append the line of a job whose run folder has a result, unless it stands there."""
        path = self.folder / ended.name
        kind = "summary" if (path / "summary.json").is_file() else "failed"
        result = path / f"{kind}.json"
        content = json.loads(result.read_text(encoding="utf-8"))
        if any(content == _result(line) for line in self._lines.get(ended.name, ())):
            return
        self.line_of(ended)  # refuses the name of another configuration
        trained = configuration.flat(configuration.of_file(path / "config.toml"))
        settings = _settings(ended.config)
        ended_at = datetime.fromtimestamp(result.stat().st_mtime, UTC)
        line = {
            "run": ended.name,
            "date": ended_at.isoformat(timespec="seconds"),
            "sha256": _digest(settings),
            kind: content,
            "dataset": Path(ended.config.data.dataset).name,
            "filled_in": {key: trained[key] for key in FILLED_IN},
            "records": _evaluations(path / "metrics.jsonl"),
            "settings": settings,
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as file:
            file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._add(line)
        self._compare(ended, line)

    def restore(self, wanted: Job) -> bool:
        """Make the run folder of a job from its line; return whether it has one."""
        line = self.line_of(wanted)
        if line is None:
            return False
        self._compare(wanted, line)
        values = configuration.flat(wanted.config) | line["filled_in"]
        kind = "summary" if "summary" in line else "failed"
        words = f"restored from {self.file}: a run that ended {line['date']}\n"
        texts = {
            "config.toml": configuration.to_toml(from_flat(values)),
            "metrics.jsonl": "".join(json.dumps(record) + "\n" for record in line["records"]),
            "log.txt": words,
            RESTORED: words,
            f"{kind}.json": json.dumps(line[kind], indent=1) + "\n",
        }
        new, path = self.folder / ".restoring", self.folder / wanted.name
        for folder in (new, path):
            shutil.rmtree(folder, ignore_errors=True)
        new.mkdir(parents=True)
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        new.rename(path)  # whole, or not at all
        return True

    def _compare(self, run: Job, line: Json) -> None:
        """Print a note if another line of a run has a loss that no other machine explains."""
        for other in self._lines[run.name]:
            losses = [_result(x).get("val_loss", math.inf) for x in (line, other)]
            same = losses[0] == losses[1] or abs(losses[0] - losses[1]) <= APART
            if not same and not self._refusal(run, other):
                each = " and ".join(f"{x:.4f}" for x in losses)
                self.say(
                    f"note: {run.name} ended at {each} by two lines of {self.file};"
                    " the first counts, or its run folder"
                )


def is_restored(path: Path) -> bool:
    """Return whether a run folder was restored from its line: it lacks what no line has."""
    return (path / RESTORED).is_file()


# ---- a line


def _parsed(text: bytes) -> Json | None:
    """Return a line; None of a text that is none, or whose settings do not have their hash."""
    try:
        line = json.loads(text)
        return line if line["run"] and line["sha256"] == _digest(line["settings"]) else None
    except (ValueError, TypeError, KeyError):
        return None


def _result(line: Json) -> Json:
    """Return what a run's summary.json has, or its failed.json."""
    return line.get("summary") or line["failed"]


def _settings(config: Config) -> Json:
    """Return the settings that the numbers of a run depend on, {"section.key": value}.

    They are those of its config.toml: without what plugins that it does not name declare.
    """
    written = _leaves(tomllib.loads(configuration.to_toml(config)))
    kept = {key: value for key, value in written.items() if not key.startswith(NEUTRAL)}
    return kept | {"data.dataset": _corpus(config)}


def _leaves(tables: Mapping[str, Any], prefix: str = "") -> Json:
    """Return the values of nested tables, by their keys with dots."""
    leaves: Json = {}
    for key, value in tables.items():
        inner = _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        leaves |= {f"{prefix}{key}": value} if inner is None else inner
    return leaves


def _corpus(config: Config) -> str:
    """Return the hash of a configuration's corpus, whatever its folder."""
    return read_manifest(Path(config.data.dataset)).sha256


def _trained(line: Json) -> Json:
    """Return the settings that a run had, by today's keys."""
    return configuration.flat(from_flat(line["settings"] | line["filled_in"]))


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _evaluations(metrics: Path) -> list[Json]:
    """Return the records of a run's evaluations and of its curvature; not of each logged step."""
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    return [
        {key: value for key, value in record.items() if key != "geometry"}
        for record in map(json.loads, lines)
        if "val_loss" in record or "sharpness" in record
    ]
