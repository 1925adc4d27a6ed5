"""The charts of a report, as data that the script and matplotlib draw alike.

A chart has:
    id, title, about (its caption), y (the axis of losses)
    x: the axes to choose from, each with name, label, log, categories
    filters: choices of lines, each with label and options; the first option is shown first
    view: (low, high) of y at first
    target: a loss, or None
    lines: entry, label, kind, within (for each filter, the options it is shown at), points, bars
    marks: points with a ring, each with entry, point, label

A line's kind is "line", "dots", "joined" (dots with lines between them) or "band". A point is its
value on each axis of x, then y, None where a run diverged; a band's has mean, low and high for y.
bars are the (low, high) of each point, or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .words import Json, as_count, as_level

Point = list[float | None]
# The share of a run after which its curve is in the first view. Before it the loss falls so far
# that the view would show little else.
SETTLED = 0.3
AT_BUDGET, TO_TARGET, ALL = "at the budget", "to the target", "every horizon"
VALIDATION, TRAINING = "validation", "training batches"
DIVERGED = "A × at the top is a run that diverged."


def charts(results: Json) -> list[Json]:
    """Return the loss curves, the end losses, and a chart for each setting that was tuned."""
    trials = [trial for entry in results["entries"] for trial in entry["trials"]]
    tuned = dict.fromkeys(key for trial in trials for key in trial["values"])
    return [loss_curves(results), end_losses(results), *(tuning(results, key) for key in tuned)]


# ---- loss over training


def loss_curves(results: Json) -> Json:
    """Return a chart of the losses over each judged run, on validation text and on training
    batches."""
    lines, settled = [], []
    for i, entry in enumerate(results["entries"]):
        for run in entry["runs"]:
            for line in _lines_of_run(i, entry, run):
                lines.append(line)
                losses = [p[-1] for p in line["points"] if p[0] >= SETTLED * run["steps"]]
                settled += [loss for loss in losses if loss is not None]
        lines += _band(i, entry, results["rule"]["level"])
    several = any(len(e["horizons"]) > 1 for e in results["entries"])
    horizons = (AT_BUDGET, TO_TARGET, ALL) if several else (AT_BUDGET,)
    horizons = [h for h in horizons if any(h in line["within"][0] for line in lines)]
    sources = [s for s in (VALIDATION, TRAINING) if any(s in line["within"][1] for line in lines)]
    banded = any(line["kind"] == "band" for line in lines)
    view = _view(settled, results["target"])
    about = (
        f"Each {'thin ' if banded else ''}line is a seed, with a mark where its run ends.",
        "With three seeds or more, the thick line is their mean, and the band its "
        f"{as_level(results)} interval."
        if banded
        else "",
        DIVERGED if _any_diverged(lines) else "",
        "The first steps lie above the frame." if _any_above(lines, view[1]) else "",
        "Seconds are of the training clock: all work that looks at the data, "
        "no compilation, no evaluation.",
    )
    return {
        "id": "curves",
        "title": "Loss over training",
        "about": _sentences(about),
        "y": "loss, nats per token",
        "x": [_axis(name, f"training {name}") for name in ("steps", "tokens", "seconds")],
        "filters": [
            {"label": "runs", "options": horizons},
            {"label": "loss of", "options": sources},
        ],
        "view": view,
        "target": results["target"],
        "lines": lines,
        "marks": [],
    }


def _lines_of_run(i: int, entry: Json, run: Json) -> list[Json]:
    """Return a run's losses on validation text, and on training batches if the results have them.

    The results of the record book have none: they are in its logs.
    """
    steps, goal = run["steps"], entry["to_target"]
    horizons = [AT_BUDGET] * (steps == entry["at_budget"]["steps"])
    horizons += [TO_TARGET] * bool(goal and steps == goal["steps"])
    horizons.append(ALL)
    label = f"{entry['name']}, seed {run['seed']}, {as_count(steps)} steps"
    lines = []
    for source, raw in ((VALIDATION, run["curve"]), (TRAINING, run.get("training", []))):
        points = [_rounded(p) for p in raw]
        if run["loss"] is None:
            points = [p for p in points if p[-1] is not None]
            end = [steps, steps * entry["tokens_per_step"], run["train_seconds"] or 0.0]
            points.append([*(points[-1] if points else end)[:3], None])
        if points:
            lines.append(_line(i, label, "line", points, within=[horizons, [source]]))
    return lines


def _band(i: int, entry: Json, level: float) -> list[Json]:
    """Return mean and t interval of the seeds' validation losses, where all have an evaluation.

    There is no band of two seeds, whose interval of 12.7 standard errors hides the curves, nor if
    a run diverged.
    """
    from scipy import stats

    judged = [r for r in entry["runs"] if r["steps"] == entry["at_budget"]["steps"]]
    n = len(judged)
    if n < 3 or any(r["loss"] is None for r in judged):
        return []
    curves = [{p[0]: p for p in r["curve"]} for r in judged]
    quantile = float(stats.t.ppf((1 + level) / 2, n - 1))
    points = []
    for step in sorted(set.intersection(*(set(curve) for curve in curves))):
        rows = np.array([curve[step] for curve in curves], dtype=float)
        half = quantile * rows[:, 3].std(ddof=1) / math.sqrt(n)
        mean = rows.mean(0)
        points.append(_rounded([*mean.tolist(), float(mean[3] - half), float(mean[3] + half)]))
    if not points:
        return []
    label = f"{entry['name']}, mean of {entry['at_budget']['n']} seeds"
    return [_line(i, label, "band", points, within=[[AT_BUDGET], [VALIDATION]])]


# ---- end loss against horizon


def end_losses(results: Json) -> Json:
    """Return a chart of the loss at the end of each run against the number of steps of its
    schedule."""
    lines, marks, losses = [], [], []
    for i, entry in enumerate(results["entries"]):
        horizons = sorted(entry["horizons"], key=lambda h: h["steps"])
        means = [[h["steps"], h["mean"]] for h in horizons]
        bars = [[h["low"], h["high"]] if h["low"] is not None else None for h in horizons]
        if means:
            lines.append(_line(i, f"{entry['name']}, mean", "joined", means, bars=bars))
        for run in entry["runs"]:
            label = f"{entry['name']}, seed {run['seed']}"
            lines.append(_line(i, label, "dots", [[run["steps"], run["loss"]]]))
        marks += _interpolated_mark(i, entry, results)
        losses += [mean for _, mean in means] + [x for bar in bars if bar for x in bar]
        losses += [run["loss"] for run in entry["runs"]]
    bounded = any(bar for line in lines for bar in line["bars"])
    interval = f" with their {as_level(results)} interval" if bounded else ""
    about = (
        "Each mark is the end of a run with its full schedule.",
        f"Large marks are means{interval}, small marks are seeds.",
        "A ring is where the loss, interpolated in log steps, falls to what the rule needs: "
        "target − threshold/√n."
        if marks
        else "",
        DIVERGED if _any_diverged(lines) else "",
    )
    return {
        "id": "horizons",
        "title": "End loss against horizon",
        "about": _sentences(about),
        "y": "loss at the end, nats per token",
        "x": [_axis("steps", "horizon, steps", log=True)],
        "filters": [],
        "view": _view([loss for loss in losses if loss is not None], results["target"]),
        "target": results["target"],
        "lines": lines,
        "marks": marks,
    }


def _interpolated_mark(i: int, entry: Json, results: Json) -> list[Json]:
    """Return the ring at an entry's interpolated steps to the target, if it has them.

    The entry that sets the target has the budget by definition; results of schema 1 have an
    interpolated horizon for it.
    """
    goal = entry["to_target"]
    if not goal or goal["interpolated"] is None or entry["name"] == results["target_from"]:
        return []
    steps, n = goal["interpolated"], entry["at_budget"]["n"]
    needed = results["target"] - (results["rule"]["threshold"] or 0.0) / math.sqrt(n)
    return [_mark(i, [steps, needed], f"{entry['name']}: interpolated {steps:,.1f} steps")]


# ---- the trials of tuning


def tuning(results: Json, key: str) -> Json:
    """Return a chart of the losses of the trials against one of the tuned settings."""
    trials_of = [
        [trial for trial in entry["trials"] if key in trial["values"]]
        for entry in results["entries"]
    ]
    values = [trial["values"][key] for trials in trials_of for trial in trials]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    categories = None if numbers else sorted({str(v) for v in values})
    # A range of 8 or more is one that was scanned by factors.
    log = numbers and min(values) > 0 and max(values) / min(values) >= 8
    position: Callable[[Any], Any] = (
        (lambda v: v) if categories is None else (lambda v: categories.index(str(v)))
    )
    lines, marks, losses = [], [], []
    for i, (entry, trials) in enumerate(zip(results["entries"], trials_of, strict=True)):
        points = [[position(trial["values"][key]), trial["loss"]] for trial in trials]
        losses += [loss for _, loss in points if loss is not None]
        if trials:
            kind = "joined" if numbers and len(trials[0]["values"]) == 1 else "dots"
            label = f"{entry['name']}, {len(points)} trials"
            lines.append(_line(i, label, kind, sorted(points, key=lambda p: p[0])))
        marks += [
            _mark(i, point, f"{entry['name']}: chosen")
            for trial, point in zip(trials, points, strict=True)
            if entry["tuned"] == trial["values"] and trial["loss"] is not None
        ]
    about = (
        "Each mark is a trial: its loss on the split that tuning reads.",
        "A ring is the one that was chosen." if marks else "",
        DIVERGED if _any_diverged(lines) else "",
    )
    return {
        "id": f"trials-{key}",
        "title": f"Tuning: {key}",
        "about": _sentences(about),
        "y": "loss of a trial, nats per token",
        "x": [{**_axis(key, key, log=log), "categories": categories}],
        "filters": [],
        "view": _view(losses, None),
        "target": None,
        "lines": lines,
        "marks": marks,
    }


# ---- parts of a chart


def _line(
    entry: int,
    label: str,
    kind: str,
    points: Sequence[Any],
    *,
    within: Sequence[Sequence[str]] = (),
    bars: Sequence[Sequence[float] | None] = (),
) -> Json:
    return {
        "entry": entry,
        "label": label,
        "kind": kind,
        "within": list(within),
        "points": list(points),
        "bars": list(bars),
    }


def _mark(entry: int, point: Point, label: str) -> Json:
    return {"entry": entry, "point": point, "label": label}


def _axis(name: str, label: str, *, log: bool = False) -> Json:
    return {"name": name, "label": label, "log": log, "categories": None}


def _rounded(point: Sequence[float | None]) -> Point:
    return [None if v is None else round(v, 5) for v in point]


def _sentences(sentences: Sequence[str]) -> str:
    return " ".join(s for s in sentences if s)


def _any_diverged(lines: Sequence[Json]) -> bool:
    return any(point[-1] is None for line in lines for point in line["points"])


def _any_above(lines: Sequence[Json], high: float) -> bool:
    losses = [point[-1] for line in lines for point in line["points"]]
    return any(loss is not None and loss > high for loss in losses)


def _view(losses: Sequence[float], target: float | None) -> list[float]:
    """Return (low, high) around all losses and the target, with a margin."""
    losses = [*losses, *([] if target is None else [target])] or [0.0, 1.0]
    low, high = min(losses), max(losses)
    margin = 0.04 * (high - low) or 0.01 * abs(high) or 1.0
    return [low - margin, high + margin]
