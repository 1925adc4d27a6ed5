"""The trials of a comparison: values of configuration keys, all known before the first run.

    optim.lr=log(0.01,1,8)         8 values, evenly spaced in the logarithm, both ends included
    optim.beta=lin(0.9,0.98,5)     5 values, evenly spaced
    optim.direction={momentum,nesterov,soap}
    adamw:optim.lr=log(1e-4,1e-1,8)     for one entry; it replaces a range for all entries

One key is tried at exactly these points. Several keys are tried at points of a scrambled Sobol
sequence over their box (I. M. Sobol', 1967; A. B. Owen, 1998), as many different ones as asked for.
No trial depends on the result of another. So trials run side by side, a killed study continues
with them, and an equal number of trials is an equal budget.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import qmc

from training import config as configuration

from .runs import StudyError

DIGITS = 4  # of a value, as it is written in configurations and names
FURTHER = 64  # batches of Sobol points that are drawn at most, until enough trials differ
# The seed of the Sobol sequence's scrambling. Entries with as many keys are tried at the same
# places of their boxes.
SEED = 0
SECTIONS = ("optim.", "schedule.", "baseline.", "model.")  # whose keys may be tuned
RANGE = re.compile(
    r"(?:(?P<entry>[^:=]+):)?(?P<key>[\w.-]+)="
    r"(?:(?P<scale>log|lin)\((?P<range>[^()]*)\)|\{(?P<choices>[^{}]*)\})"
)


@dataclass(frozen=True)
class Range:
    """The values of one key that one --tune asks for."""

    entry: str | None
    """The entry that it is for; None for all."""
    key: str
    scale: str
    """log, lin or choice."""
    values: tuple[Any, ...]
    """log and lin: both ends and the number of points. choice: the values."""

    @property
    def count(self) -> int:
        """Return the number of points where this key alone is tuned."""
        return len(self.values) if self.scale == "choice" else int(self.values[2])

    def at(self, place: float) -> Any:
        """Return the value at a place from 0 to 1 of the range, as the configuration has it."""
        if self.scale == "choice":
            return self.values[min(int(place * len(self.values)), len(self.values) - 1)]
        low, high, _ = self.values
        value = low * (high / low) ** place if self.scale == "log" else low + (high - low) * place
        return typed(self.key, f"{value:.{DIGITS}g}", whole=True)

    def points(self) -> list[Any]:
        """Return the values that are tried where this key alone is tuned."""
        if self.scale == "choice":
            return list(self.values)
        return [self.at(i / max(1, self.count - 1)) for i in range(self.count)]

    def at_edge(self, value: Any, tried: Iterable[Any]) -> bool:
        """Return whether a value is the lowest or the highest that was tried.

        If it is the best one, a better one may lie outside. Of choices only numbers have an edge.
        """
        tried = list(tried)
        numbers = all(type(v) in (int, float) for v in self.values)
        return numbers and value in (min(tried), max(tried))


def typed(key: str, text: str, *, whole: bool = False) -> Any:
    """Return a value as --section.key VALUE gives it.

    whole: round to the nearest integer if the key takes integers.
    """
    if whole and configuration.flat_hints(configuration.config_class()).get(key) is int:
        text = str(round(float(text)))
    return configuration.read_options([f"--{key}", text])[key]


def parse(text: str, entries: Sequence[str]) -> Range:
    """Read [ENTRY:]section.key=log(a,b,n) | lin(a,b,n) | {a,b,…}.

    Raises StudyError, and ConfigError for an unknown key or a wrong value.
    """
    match = RANGE.fullmatch(text)
    if not match:
        raise _malformed(text)
    entry, key = match["entry"], match["key"].replace("-", "_")
    _require_tunable(text, entry, key, entries)
    if match["choices"] is not None:
        choices = tuple(typed(key, c.strip()) for c in match["choices"].split(","))
        if len(set(choices)) < max(2, len(choices)):
            raise _malformed(text)
        return Range(entry, key, "choice", choices)
    try:
        low, high, count = (
            kind(x) for kind, x in zip((float, float, int), match["range"].split(","), strict=True)
        )
    except ValueError as error:
        raise _malformed(text) from error
    ordered = -math.inf < low < high < math.inf
    if count < 2 or not ordered or (match["scale"] == "log" and low <= 0):
        raise _malformed(text)
    parsed = Range(entry, key, match["scale"], (low, high, count))
    if len(set(parsed.points())) < count:
        raise StudyError(
            f"--tune {text}",
            got=parsed.points(),
            allowed=f"{count} values that differ",
            fix="a wider range, or fewer",
        )
    return parsed


def _malformed(text: str) -> StudyError:
    """Return the refusal of a text that is no range."""
    return StudyError(
        "--tune",
        got=repr(text),
        allowed="[ENTRY:]section.key=log(a,b,n), lin(a,b,n) with n of 2 or more and finite a"
        " below b (log: above 0), or {a,b,…}",
        fix='--tune "optim.lr=log(0.01,1,8)"',
    )


def _require_tunable(text: str, entry: str | None, key: str, entries: Sequence[str]) -> None:
    """Raise StudyError for an entry that does not take part, or a key that has to stay."""
    if entry is not None and entry not in entries:
        raise StudyError(
            f"--tune {text}",
            got=entry,
            allowed=f"{', '.join(entries)}, the entries",
            fix="one of these before the colon",
        )
    if not key.startswith(SECTIONS) or key == "model.block_size":
        raise StudyError(
            f"--tune {text}",
            got=key,
            allowed="optim.…, schedule.…, baseline.… and model.… but block_size: data, batch and"
            " budget are the same for all trials",
            fix="another key",
        )


def ranges_of(entry: str, ranges: Sequence[Range]) -> list[Range]:
    """Return the ranges of one entry, each key once.

    The entry's own range comes before one for all entries, and a later one before an earlier one.
    """
    for_all = [r for r in ranges if r.entry is None]
    own = [r for r in ranges if r.entry == entry]
    return list({r.key: r for r in (*for_all, *own)}.values())


def trials(ranges: Sequence[Range], count: int | None) -> list[dict[str, Any]]:
    """Return the values of each trial of one entry.

    count: of trials. Several keys need it, one key may leave it out.
    """
    if not ranges:
        return []
    if len(ranges) == 1:
        return [{ranges[0].key: value} for value in ranges[0].points()]
    if count is None:
        raise StudyError(
            "--trials",
            got=f"none, with {len(ranges)} keys to tune",
            allowed="how many trials every entry gets",
            fix="--trials 16",
        )
    keys = [r.key for r in ranges]
    sequence = qmc.Sobol(len(ranges), scramble=True, rng=SEED)
    points: dict[tuple[Any, ...], None] = {}  # a set that keeps its order
    for _ in range(FURTHER):  # several places may fall on the same values
        places = sequence.random(2 ** int(np.ceil(np.log2(count))))
        points |= dict.fromkeys(
            tuple(r.at(float(u)) for r, u in zip(ranges, place, strict=True)) for place in places
        )
        if len(points) >= count:
            break
    if len(points) < count:
        raise StudyError(
            "--trials",
            got=f"{count} of {', '.join(keys)}",
            allowed=f"{len(points)}, as many as differ",
            fix=f"--trials {len(points)}, or wider ranges",
        )
    return [dict(zip(keys, values, strict=True)) for values in list(points)[:count]]


def trials_by_entry(
    ranges: Sequence[Range], entries: Sequence[str], count: int | None
) -> dict[str, list[dict[str, Any]]]:
    """Return the trials of each entry; an entry without a range has none.

    Raises StudyError unless all entries that are tuned have the same number of trials.
    """
    planned = {entry: trials(ranges_of(entry, ranges), count) for entry in entries}
    numbers = {entry: len(t) for entry, t in planned.items() if t}
    if len({*numbers.values(), *([count] if count is not None and numbers else [])}) > 1:
        asked = f", --trials {count}" if count is not None else ""
        raise StudyError(
            "--tune, --trials",
            got=f"{', '.join((f'{n} trials of {e}' for e, n in numbers.items()))}{asked}",
            allowed="as many for every entry, which is what makes it fair",
            fix="the same number of points, and --trials that number where an entry has several"
            " keys",
        )
    return planned
