"""A speedrun study as one page and one picture: report.html and report.png, from results.json.

python -m studies.report runs/NAME
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .page import ReportError, write


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of the study whose folder is named. Return the exit code, 2 if refused."""
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["-h"], ["--help"]):
        print(
            "python -m studies.report runs/NAME: write report.html and report.png of a study anew"
        )
        return 0
    try:
        file = _results_file(argv)
        paths = write(json.loads(file.read_text(encoding="utf-8")), file.parent)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*paths, sep="\n")
    return 0


def _results_file(argv: Sequence[str]) -> Path:
    if len(argv) == 1 and (file := Path(argv[0]) / "results.json").is_file():
        return file
    raise ReportError(
        "python -m studies.report",
        got=" ".join(argv),
        allowed="the folder of a study, with its results.json",
        fix="runs/NAME",
    )
