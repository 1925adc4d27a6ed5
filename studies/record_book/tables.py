"""The tables of records: records/README.md, and README.md between its marks if it has them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from optim.errors import require

from ..runs import ROOT
from . import book
from .book import RecordError
from .tracks import TRACKS, Track

BEGIN, END = "<!-- records:begin -->", "<!-- records:end -->"
INTRODUCTION = """# Record book

`python -m studies.record_book tables` writes this page. `python -m studies.record_book --help` says
how to add a record, and how to check one by training it again.

- **Track.** A task with a fixed target loss. The target of pysource-cpu and of shakespeare-cpu is a
  mean end loss that was measured once; its noise counts in no record.
- **Steps to the target**, or **training seconds**: the record's figure, with its 95 % interval in
  brackets. Steps are those of the shortest full run whose mean end loss passes the rule.
- **End loss**: the mean over n seeds. A ✓ says that it passes the rule
  (target − mean) · √n ≥ threshold ([docs/speedrun.md](../docs/speedrun.md)).
- **Training s, wall s**: mean seconds of a run, without and with compilation and evaluation.
- **Entry**: a link to its code and log, in one file.
- **Trials**: how many runs tuned the entry: those of its study, and others that its author counted.

"""


def tables(*, relative_to: Path) -> str:
    """Return a table for each track, then the notes of its records.

    A row is an entry. The best figure comes first; entries without a figure come last.
    """
    return (
        "\n\n".join(
            part
            for name, track in TRACKS.items()
            for part in _track_parts(name, track, relative_to=relative_to)
        )
        + "\n"
    )


def _track_parts(name: str, track: Track, *, relative_to: Path) -> list[str]:
    """Return a track's heading, table and notes."""
    heading = f"**{name}** ({track.title}; target {track.target:g})"
    own = [
        (folder.relative_to(relative_to), record)
        for folder, record in book.records()
        if record["track"] == name
    ]
    rows = [(entry, folder, record) for folder, record in own for entry in record["entries"]]
    if not rows:
        return [heading, "No record yet."]

    def rank(row: tuple[dict[str, Any], Path, dict[str, Any]]) -> tuple[float, str, str]:
        entry, _, record = row
        figure = math.inf if entry["figure"] is None else entry["figure"]
        return figure, record["date"], entry["name"]

    unit = {"steps": "steps to the target", "seconds": "training seconds"}[track.figure]
    head = f"| {unit} | end loss | training s, wall s | entry | trials | date | record |"
    table = "\n".join(
        [head, "|---|---|---|---|---|---|---|", *(_row(*r) for r in sorted(rows, key=rank))]
    )
    notes = [
        f"[{record['title']}]({folder.as_posix()}/): {record['note']}"
        for folder, record in own
        if record.get("note")
    ]
    return [heading, table, *notes]


def _row(entry: dict[str, Any], folder: Path, record: dict[str, Any]) -> str:
    place = folder.as_posix()
    log = f"[{entry['name']}]({place}/{entry['log']})"
    by = f", {', '.join(record['by'])}" if record["by"] else ""
    title = f"[{record['title']}]({place}/){by}"
    title += " (not from a commit)" if record["dirty"] else ""
    if not entry["n"]:
        return f"| not run here | | | {log} | | {record['date']} | {title} |"
    loss = f"{entry['mean']:.4f} (n = {entry['n']}, {entry['steps']} steps)"
    cells = [
        _figure(entry, digits=0 if TRACKS[record["track"]].figure == "steps" else 2),
        loss + (" ✓" if entry["passes"] else ""),
        f"{entry['train_seconds']:.1f}, {entry['wall_seconds']:.1f}",
        log,
        "not counted" if entry["trials"] is None else str(entry["trials"]),
        record["date"],
        title,
    ]
    return f"| {' | '.join(cells)} |"


def _figure(entry: dict[str, Any], *, digits: int) -> str:
    """Return a figure with its interval, of which ? is a bound that is not known."""
    value, *bounds = (
        None if entry[key] is None else f"{entry[key]:.{digits}f}"
        for key in ("figure", "low", "high")
    )
    if value is None:
        return "not reached"
    return f"{value} [{', '.join(b or '?' for b in bounds)}]" if any(bounds) else value


def write_tables(*, check_only: bool) -> list[str]:
    """Write the tables and return the names of the files that changed.

    `check_only` returns the names of those that would change, and writes nothing. README.md has
    the tables only if it has the marks BEGIN and END. Raises RecordError for marks that do not
    enclose one place.
    """
    readme = ROOT / "README.md"
    contents = {book.BOOK / "README.md": INTRODUCTION + tables(relative_to=book.BOOK)}
    text = readme.read_text(encoding="utf-8")
    if BEGIN in text or END in text:
        require(
            text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END),
            "README.md",
            got="no place for the tables",
            allowed=f"{BEGIN} and {END}, once each, or neither",
            fix="put both in, or take both out",
            error=RecordError,
        )
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        contents[readme] = f"{before}{BEGIN}\n{tables(relative_to=ROOT)}{END}{after}"
    stale = {
        file: content
        for file, content in contents.items()
        if not file.is_file() or file.read_text(encoding="utf-8") != content
    }
    if not check_only:
        for file, content in stale.items():
            file.write_text(content, encoding="utf-8")
    return [str(file.relative_to(ROOT)) for file in stale]
