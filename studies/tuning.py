"""The trials of a comparison: values of configuration keys, all known before the first run.

    optim.lr=log(0.01,1,8)         8 values, evenly spaced in the logarithm, both ends included
    optim.beta=lin(0.9,0.98,5)     5 values, evenly spaced
    optim.direction={momentum,nesterov,soap}
    adamw:optim.lr=log(1e-4,1e-1,8)     for one entry; there it replaces what is said for all

One key is tried at exactly these points. Several are tried at the points of a scrambled Sobol sequence over their box (I. M. Sobol', 1967; A. B. Owen, 1998), as many as asked for that differ.
Trials depend on nothing that a trial found: they run side by side, a killed study goes on with them, and an equal number is an equal budget.
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
from training.config import Config

from .runs import StudyError

DIGITS = 4  # of a value: it is written in configurations and names
FURTHER = 64  # times as many Sobol points as trials are drawn at most, until so many trials differ
SEED = 0  # of the Sobol sequence's scrambling: entries with as many keys are tried at the same places of their boxes


@dataclass(frozen=True)
class Range:
    """What one --tune says. entry: None is all. scale: log and lin have their ends and a number of points as values, choice its values."""

    entry: str | None
    key: str
    scale: str
    values: tuple[Any, ...]

    @property
    def count(self) -> int:
        """Points of this key alone."""
        return len(self.values) if self.scale == "choice" else int(self.values[2])

    def at(self, place: float) -> Any:
        """The value at a place from 0 to 1 of the range, as the configuration has it."""
        if self.scale == "choice":
            return self.values[min(int(place * len(self.values)), len(self.values) - 1)]
        low, high, _ = self.values
        value = low * (high / low) ** place if self.scale == "log" else low + (high - low) * place
        return typed(self.key, f"{value:.{DIGITS}g}", whole=True)

    def points(self) -> list[Any]:
        """Of this key alone."""
        return (
            list(self.values)
            if self.scale == "choice"
            else [self.at(i / max(1, self.count - 1)) for i in range(self.count)]
        )

    def at_edge(self, value: Any, tried: Iterable[Any]) -> bool:
        """Whether a best value is the lowest or the highest that was tried, so that a better one may lie outside. Of choices only numbers have an edge."""
        return all(type(v) in (int, float) for v in self.values) and value in (
            min(tried := list(tried)),
            max(tried),
        )


def typed(key: str, text: str, *, whole: bool = False) -> Any:
    """A value as --section.key VALUE gives it. whole: of an integer's key the nearest one."""
    if whole and configuration.flat_hints(Config).get(key) is int:
        text = str(round(float(text)))
    return configuration.read_options([f"--{key}", text])[key]


def parse(text: str, entries: Sequence[str]) -> Range:
    """[ENTRY:]section.key=log(a,b,n) | lin(a,b,n) | {a,b,…}. Raises StudyError, and ConfigError for a key or a value that there is not."""
    bad = StudyError(
        "--tune",
        got=repr(text),
        allowed="[ENTRY:]section.key=log(a,b,n), lin(a,b,n) with n of 2 or more and finite a below b (log: above 0), or {a,b,…}",
        fix='--tune "optim.lr=log(0.01,1,8)"',
    )
    found = re.fullmatch(
        r"(?:(?P<entry>[^:=]+):)?(?P<key>[\w.-]+)=(?:(?P<scale>log|lin)\((?P<range>[^()]*)\)|\{(?P<choices>[^{}]*)\})",
        text,
    )
    if not found:
        raise bad
    entry, key = found["entry"], found["key"].replace("-", "_")
    if entry is not None and entry not in entries:
        raise StudyError(
            f"--tune {text}",
            got=entry,
            allowed=f"{', '.join(entries)}, the entries",
            fix="one of these before the colon",
        )
    sections = ("optim.", "schedule.", "baseline.", "model.")
    if not key.startswith(sections) or key == "model.block_size":
        raise StudyError(
            f"--tune {text}",
            got=key,
            allowed="optim.…, schedule.…, baseline.… and model.… but block_size: data, batch and budget"
            " are the same for all trials",
            fix="another key",
        )
    if found["choices"] is not None:
        choices = tuple(typed(key, c.strip()) for c in found["choices"].split(","))
        if len(set(choices)) < max(2, len(choices)):
            raise bad
        return Range(entry, key, "choice", choices)
    try:
        low, high, count = (
            kind(x) for kind, x in zip((float, float, int), found["range"].split(","), strict=True)
        )
    except ValueError as error:
        raise bad from error
    if count < 2 or not -math.inf < low < high < math.inf or (found["scale"] == "log" and low <= 0):
        raise bad
    made = Range(entry, key, found["scale"], (low, high, count))
    if len(set(made.points())) < count:
        raise StudyError(
            f"--tune {text}",
            got=made.points(),
            allowed=f"{count} values that differ",
            fix="a wider range, or fewer",
        )
    return made


def of(ranges: Sequence[Range], entry: str) -> list[Range]:
    """Those of one entry, a key once; its own before those for all, and the last one said of either."""
    return list(
        {
            r.key: r
            for r in sorted(
                (r for r in ranges if r.entry in (None, entry)), key=lambda r: r.entry is not None
            )
        }.values()
    )


def trials(ranges: Sequence[Range], count: int | None) -> list[dict[str, Any]]:
    """The values of each trial of one entry. count: of trials, which several keys need and one key may leave out."""
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
    sequence, found = qmc.Sobol(len(ranges), scramble=True, rng=SEED), {}
    for _ in range(FURTHER):  # several points may fall on the same values
        places = sequence.random(2 ** int(np.ceil(np.log2(count))))
        found |= dict.fromkeys(
            tuple(r.at(float(u)) for r, u in zip(ranges, place, strict=True)) for place in places
        )
        if len(found) >= count:
            break
    if len(found) < count:
        keys = ", ".join(r.key for r in ranges)
        raise StudyError(
            "--trials",
            got=f"{count} of {keys}",
            allowed=f"{len(found)}, as many as differ",
            fix=f"--trials {len(found)}, or wider ranges",
        )
    return [
        {r.key: v for r, v in zip(ranges, values, strict=True)} for values in list(found)[:count]
    ]


def schedule(
    ranges: Sequence[Range], entries: Sequence[str], count: int | None
) -> dict[str, list[dict[str, Any]]]:
    """The trials of each entry: as many for all that are tuned, or StudyError. An entry without a range has none."""
    found = {entry: trials(of(ranges, entry), count) for entry in entries}
    numbers = {entry: len(t) for entry, t in found.items() if t}
    if len({*numbers.values(), *([count] if count is not None and numbers else [])}) > 1:
        wanted = f", --trials {count}" if count is not None else ""
        raise StudyError(
            "--tune, --trials",
            got=f"{', '.join((f'{n} trials of {e}' for e, n in numbers.items()))}{wanted}",
            allowed="as many for every entry, which is what makes it fair",
            fix="the same number of points, and --trials that number where an entry has several keys",
        )
    return found
