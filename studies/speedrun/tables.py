"""The tables of results.json for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optim.receipt import aligned

from .entries import spelled

Json = Mapping[str, Any]


def text(results: Json) -> str:
    """Return a study's results in words and tables."""
    lines = [*_heading(results), "", *_entries_table(results)]
    if results["pairs"]:
        lines += ["", *_pairs_table(results)]
    if note := results["versions"]["note"]:
        lines += ["", f"note: {note}"]
    notes = [
        f"note: {e['name']}: {note}"
        for e in results["entries"]
        for note in e["note"].split("; ")
        if note
    ]
    return "\n".join([*lines, "", *notes]).rstrip()


def _heading(results: Json) -> list[str]:
    """Return what was compared, on what, and by which rule."""
    n, budget = len(results["seeds"]), results["budget"]
    lines = [
        f"{results['name']}: {results['dataset']}, {budget['kind']} {budget['value']:g}, n = {n};"
        " [95 % intervals]"
    ]
    if n == 1:
        lines.append("one seed: no intervals and no test; these are single runs")
    if results["target"] is not None:
        setter, rule = results["target_from"], results["rule"]
        origin = f"the mean of {setter} at the budget" if setter else "given"
        lines.append(
            f"target {results['target']:.4f} ({origin}); the rule: (target − mean)·√n ≥"
            f" {rule['threshold']:.3g}, {_sigma(rule)}"
        )
    return lines


def _sigma(rule: Json) -> str:
    """Return where σ and the threshold come from."""
    if rule["sigma"] is None:
        return "σ unknown" if not rule["threshold"] else "given"
    origin = (
        "given"
        if rule["sigma_from"] == "given"
        else f"from the runs at the budget, {rule['df']} degrees of freedom"
    )
    level = (
        f"; one-sided level {rule['test_level']:g}" if rule["test_level"] else "; threshold given"
    )
    return f"σ = {rule['sigma']:.2g} {origin}{level}"


def _entries_table(results: Json) -> list[str]:
    """Return the figures of each entry, and which budget they are of."""
    columns = (
        *("entry", "tuned", "steps", "loss there", "steps to the target", "tokens", "train s"),
        *("optimizer s", "wall s", "memory"),
    )
    rows = [
        _entry_row(e, sets_target=e["name"] == results["target_from"]) for e in results["entries"]
    ]
    legend = "(train s: to the target; optimizer s, wall s, memory: of the budget)"
    return [*aligned([columns, *rows]), legend]


def _entry_row(entry: Json, *, sets_target: bool) -> list[str]:
    """Return the figures of one entry."""
    at, to, memory = entry["at_budget"], entry["to_target"], entry["at_budget"]["peak_memory_bytes"]
    tuned = (entry["tuned"] or {}).items()
    return [
        entry["name"],
        ", ".join(f"{k.removeprefix('optim.')} {spelled(v)}" for k, v in tuned) or "no",
        str(at["steps"]),
        bounded(at["loss"], "mean", ".4f"),
        "" if to is None else steps_to_target(to, sets_target=sets_target),
        "" if to is None else f"{to['tokens']:,}",
        "" if to is None else f"{to['train_seconds']:.1f}",
        bounded(at["optimizer_seconds"], "mean", ".1f"),
        bounded(at["wall_seconds"], "mean", ".1f"),
        "" if memory is None else f"{memory / 2**20:.0f} MiB",
    ]


def steps_to_target(to: Json, *, sets_target: bool) -> str:
    """Return the horizon that was run, and the interpolated one with its interval.

    The interval need not hold the horizon that was run, which is the point of the grid above it.
    The steps of the entry that sets the target are its budget.
    """
    if sets_target:
        return f"{to['steps']} sets the target"
    interpolated = (
        f" (interpolated {bounded(to, 'interpolated', '.1f')})"
        if to["interpolated"] is not None
        else ""
    )
    return f"{to['steps']}{interpolated}{'' if to['confirmed'] else ' unconfirmed'}"


def _pairs_table(results: Json) -> list[str]:
    """Return the comparison of each pair of entries."""
    rows = [("pair", "loss difference", "p", "steps ratio", "train seconds ratio")]
    for pair in results["pairs"]:
        p = pair["loss_difference"]["p"]
        steps, seconds = (
            bounded(ratio, "value", ".3f") if (ratio := pair[key]) else ""
            for key in ("steps_ratio", "seconds_ratio")
        )
        difference = bounded(pair["loss_difference"], "mean", "+.4f")
        against = f"{pair['b']} against {pair['a']}"
        rows.append((against, difference, "" if p is None else f"{p:.2g}", steps, seconds))
    return aligned(rows)


def bounded(interval: Json, key: str, form: str) -> str:
    """Return a value with its bounds, which are left out if it has none.

    key: of the value. A value that a run did not reach because it diverged is named so.
    """
    value, low, high = interval[key], interval["low"], interval["high"]
    if value is None:
        return "diverged"  # what it measured has no mean
    if low is None and high is None:
        return f"{value:{form}}"
    lower = "−∞" if low is None else f"{low:{form}}"
    upper = "∞" if high is None else f"{high:{form}}"
    return f"{value:{form}} [{lower}, {upper}]"
