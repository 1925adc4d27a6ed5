"""The record book of the speedrun tracks, records/TRACK/DATE_SLUG/: add, list and check records.

    python -m studies.record_book add runs/STUDY --track pysource-cpu --slug dualized
        --title "…" --by NAME [--trials ENTRY=N …] [--note "…"]
    python -m studies.record_book add runs/a runs/b runs/c --track shakespeare-cpu --slug bigram
        (one configuration, one seed a run)
    python -m studies.record_book tables [--check-only]
    python -m studies.record_book check records/TRACK/DATE_SLUG [--entry NAME] [--seeds N]

A record has the configuration of each of its entries, and a log: the full code, as a script that
runs alone (studies/export), then the lines of every run that is judged. record.json says what is
claimed and by which rule. A study's results.json and report.png are kept with it.

`check` trains the entries again and compares losses. They must agree exactly where processor,
torch and threads are the same, and their means must agree elsewhere. Seconds are printed and not
judged. If an entry names plugins, their code, which the record's folder has, runs on your machine:
read it first.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from datetime import date
from pathlib import Path

from data.shards import DataError
from training.config import ConfigError
from training.errors import RunError

from ..export.specialise import ExportError
from ..runs import StudyError
from . import book
from .add import add_record
from .book import RecordError
from .check import check_record
from .tables import write_tables
from .tracks import TRACKS


def main(argv: list[str] | None = None) -> int:
    """Run one of the commands. Return its exit code: 1 if it disagrees, 2 if it is refused."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    try:
        if args.do == "add":
            return _add(args, command=shlex.join(["python", "-m", "studies.record_book", *argv]))
        if args.do == "tables":
            return _tables(check_only=args.check_only)
        passed = check_record(
            args.record, entry=args.entry, seeds=args.seeds, workers=args.workers, out=args.out
        )
        return 0 if passed else 1
    except (RecordError, ExportError, ConfigError, DataError, RunError, StudyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m studies.record_book",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="do", required=True)

    add = commands.add_parser("add", help="add a study, or runs of one configuration")
    add.add_argument("sources", nargs="+", type=Path, metavar="runs/NAME")
    add.add_argument("--track", required=True, choices=TRACKS)
    add.add_argument("--slug", required=True, help="of the folder's name")
    add.add_argument("--title", default="")
    add.add_argument("--by", nargs="+", default=[], metavar="NAME")
    add.add_argument("--date", default=date.today().isoformat())
    trials = 'of its tuning, all of them; if left out, those of a study, or "not counted" for runs'
    add.add_argument("--trials", nargs="+", default=[], metavar="[ENTRY=]N", help=trials)
    note = "what a reader has to know; it stands under the table"
    add.add_argument("--note", default="", help=note)
    dirty = "accept code that is in no commit; the record says so"
    add.add_argument("--allow-dirty", action="store_true", help=dirty)

    tables = commands.add_parser(
        "tables", help="write the tables of records/README.md, and of README.md if it has the marks"
    )
    only = "write nothing; exit with 1 if a table is not up to date"
    tables.add_argument("--check-only", action="store_true", help=only)

    runs_code = "Train a record again. The plugins in its folder, if its entries name any, are run."
    check = commands.add_parser("check", help="train a record again", description=runs_code)
    check.add_argument("record", type=Path, metavar="records/TRACK/DATE_SLUG")
    check.add_argument("--entry", help="check this one alone")
    check.add_argument("--seeds", type=int, help="how many, the first ones; all if left out")
    check.add_argument("--workers", type=int, default=1, help="runs at a time")
    out = "run folders; runs/check-DATE_SLUG-COMMIT if left out"
    check.add_argument("--out", type=Path, help=out)
    return parser


def _add(args: argparse.Namespace, *, command: str) -> int:
    folder = add_record(
        args.sources,
        args.track,
        args.slug,
        title=args.title,
        by=args.by,
        day=args.date,
        command=command,
        allow_dirty=args.allow_dirty,
        trials=args.trials,
        note=args.note,
    )
    print(folder.relative_to(book.BOOK.parent))
    return 0


def _tables(*, check_only: bool) -> int:
    stale = write_tables(check_only=check_only)
    state = "not up to date" if check_only else "written"
    print("\n".join(f"{name}: {state}" for name in stale) or "up to date")
    return 1 if stale and check_only else 0
