"""Training seconds of runs on more than one machine: whose clock compares two entries."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
ENOUGH = 2  # runs of each entry on one machine; fewer tell no deviation


@dataclass(frozen=True)
class Clock:
    """One machine's training seconds of two entries' runs, at the steps to the target of each."""

    machine: str | None
    """Its name; None of runs that do not tell it."""
    b: list[float]
    a: list[float]


def clock_of(b: Json, a: Json) -> Clock | None:
    """Return the clock that compares two entries of results.json that reached the target.

    It is that of all their runs if these are of one machine. Else it is that of the machine with
    the most runs of both, if each entry has ENOUGH there; None without one.
    """
    judged = [[r for r in e["runs"] if r["steps"] == e["to_target"]["steps"]] for e in (b, a)]
    counts = [Counter(r["hardware"] for r in entry_runs) for entry_runs in judged]
    shared = counts[0] & counts[1]
    machine = max(shared, key=lambda m: shared[m], default=None)
    if not shared or (len(counts[0] | counts[1]) > 1 and shared[machine] < ENOUGH):
        return None
    seconds = [[r["train_seconds"] for r in x if r["hardware"] == machine] for x in judged]
    return Clock(machine, *seconds)


def note_of_machines(entries: Sequence[Json]) -> str | None:
    """Return what a reader has to know where the judged runs are of more than one machine."""
    judged = [r for e in entries for r in e["runs"] if r["loss"] is not None]
    machines = dict.fromkeys(r["hardware"] or "not known" for r in judged)
    if len(machines) < 2:
        return None
    notes = [
        f"the judged runs are of {len(machines)} machines ({' | '.join(machines)}),"
        " over which mean seconds are taken"
    ]
    for b, a in itertools.combinations(entries, 2):
        if b["to_target"] and a["to_target"]:
            clock = clock_of(b, a)
            notes.append(
                f"the ratio of seconds of {b['name']} against {a['name']}: "
                + (
                    f"{clock.machine or 'not known'} alone"
                    if clock
                    else f"none has {ENOUGH} runs of each"
                )
            )
    return "; ".join(notes)
