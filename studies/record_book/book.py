"""Where records are, records/TRACK/DATE_SLUG/record.json, and how they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optim.errors import Refusal

from ..runs import ROOT

BOOK = ROOT / "records"


class RecordError(Refusal):
    """A record that cannot be written or read."""


def read_record(folder: Path) -> dict[str, Any]:
    """Return a record's record.json."""
    return json.loads((folder / "record.json").read_text(encoding="utf-8"))


def records() -> list[tuple[Path, dict[str, Any]]]:
    """Return every record's folder and content, by track and date."""
    folders = [file.parent for file in sorted(BOOK.glob("*/*/record.json"))]
    return [(folder, read_record(folder)) for folder in folders]
