"""A speedrun study as one page and one picture: report.html and report.png, from its results.json.

    python -m studies.report runs/NAME

The page needs no network and no other file: style, script and data are inside it, and its content security policy allows nothing else. What it shows is computed
here; report.js draws the charts of `charts`, matplotlib the same charts where there is no script, and the picture. Text goes through Jinja2, which escapes it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optim.errors import Refusal

Json = dict[str, Any]
HERE = Path(__file__).parent
# Okabe & Ito's palette, which the colour-blind tell apart (jfly.uni-koeln.de/color), by brightness on each ground; entries differ in dash and marker too.
LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
DARK = ("#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#F0E442", "#AAAAAA")
DASHES = ((), (7, 3), (2, 2), (9, 3, 2, 3), (12, 4), (5, 2, 1, 2, 1, 2))
MARKERS = {
    "circle": "o",
    "square": "s",
    "triangle": "^",
    "diamond": "D",
    "cross": "P",
}  # report.js's name: matplotlib's
SETTLED = 0.3  # of a run: what comes before is above the first view of the curves, which would be about little else
OWN = ("run.name", "run.dir", "run.seed")  # of a run, not of an entry
AT_BUDGET, TO_TARGET, ALL = "at the budget", "to the target", "every horizon"


class ReportError(Refusal):
    """Results that no report can be of: what was got, what is allowed, how to fix it."""


def write(results: Json, folder: Path) -> list[Path]:
    """report.html and report.png in `folder`, of the content of a results.json. Not finite is as null there: a run that diverged."""
    results = json.loads(json.dumps(results), parse_constant=lambda _: None)
    schema = results.get("schema")
    if schema not in (1, 2) or (
        schema == 1 and any(run.get("training") for e in results["entries"] for run in e["runs"])
    ):
        raise ReportError(
            "results of a study",
            got=f"schema {schema!r}",
            allowed="2; 1 in the record book, without lines of training",
            fix="the study's command again, which runs nothing that is there, or the version of the program that wrote them",
        )
    page, image = folder / "report.html", folder / "report.png"
    page.write_text(html(results), encoding="utf-8")
    picture(results, image)
    return [page, image]


# ---- numbers as they are told


def count(x: float | None) -> str:
    return "–" if x is None else f"{x:,.0f}"


def loss(x: float | None) -> str:
    return "diverged" if x is None else f"{x:.4f}"


def seconds(x: float | None) -> str:
    return "–" if x is None else f"{x:,.0f} s" if x >= 1000 else f"{x:.1f} s"


def size(x: float | None) -> str:
    return "–" if x is None else f"{x / 2**30:.2f} GiB" if x >= 2**30 else f"{x / 2**20:.1f} MiB"


def ratio(x: float | None) -> str:
    return "–" if x is None else f"{x:.2f}"


def chance(p: float | None) -> str:
    return "–" if p is None else f"{p:.2g}"


def between(of: Json, form: Any) -> str:
    """[low, high], their unit left out; ∞ where one end has no bound, nothing where both have none, as of one seed."""
    ends = _ends(of)
    if ends is None:
        return ""
    return (
        "["
        + ", ".join(
            form(x).removesuffix(" s") if math.isfinite(x) else "−∞" if x < 0 else "∞" for x in ends
        )
        + "]"
    )


def _ends(of: Json) -> tuple[float, float] | None:
    low, high = of["low"], of["high"]
    return (
        None
        if low is None and high is None
        else (-math.inf if low is None else low, math.inf if high is None else high)
    )


def _holds(of: Json, x: float) -> bool:
    """Whether the interval is there and has x in it."""
    ends = _ends(of)
    return ends is not None and ends[0] <= x <= ends[1]


def exact(target: float) -> str:
    return f"{target:.5g}"


def interpolated(to_target: Json) -> str:
    """The interpolated horizon and its interval, which has not got to hold the point of the grid that was run above it."""
    x = to_target["interpolated"]
    return (
        "" if x is None else f"interpolated {x:,.1f} {between(to_target, '{:,.1f}'.format)}".strip()
    )


def budget(results: Json) -> str:
    kind, value = results["budget"]["kind"], results["budget"]["value"]
    return f"{value:g} s of training" if kind == "seconds" else f"{value:,.0f} {kind}"


# ---- the answers


def answer(results: Json, pair: Json) -> Json:
    """One pair in words: its figure (value, unit, interval), text, and settled: whether the figure excludes chance and rests on runs."""
    a, b = pair["a"], pair["b"]
    goals = {e["name"]: e["to_target"] for e in results["entries"]}
    target, steps, difference, sets = (
        results["target"],
        pair["steps_ratio"],
        pair["loss_difference"],
        results["target_from"],
    )
    told, doubted = [], []
    figure = {"value": "–", "interval": "", "unit": "no run of both to compare"}
    if difference["mean"] is not None:
        figure = {
            "value": f"{difference['mean']:+.4f}".replace("-", "−"),
            "interval": between(difference, _signed),
            "unit": f"loss of {b} − {a}",
        }
    if target is not None and steps:
        figure = {
            "value": ratio(steps["value"]),
            "interval": between(steps, ratio),
            "unit": f"× the steps of {a}",
        }
        judged = [name for name in (b, a) if name != sets]
        doubted = [name for name in judged if not goals[name]["confirmed"]]
        how = (
            f"not confirmed: {' and '.join(doubted)}"
            if doubted
            else f"{'both' if len(judged) == 2 else judged[0]} confirmed"
        )
        how += "" if len(judged) == 2 else f", {sets} sets the target"
        said = f"{b} reaches {exact(target)} in {_ratio(steps)} times the steps of {a} ({count(goals[b]['steps'])} against {count(goals[a]['steps'])}; {how})"
        if pair["seconds_ratio"]:
            said += f" and in {_ratio(pair['seconds_ratio'])} times its training seconds"
        told.append(said + (", which does not tell the two apart." if _holds(steps, 1) else "."))
    elif target is not None:
        for name in (b, a):
            goal = goals[name]
            if not goal:
                told.append(f"No horizon of {name} passes the rule for {exact(target)}.")
                continue
            how = (
                " and sets the target"
                if name == sets
                else ""
                if goal["confirmed"]
                else " (not confirmed)"
            )
            told.append(f"{name} reaches {exact(target)} in {count(goal['steps'])} steps{how}.")
    told.append(_loss_sentence(results, pair))
    of, same = (steps, 1) if target is not None and steps else (difference, 0)
    return {
        "a": a,
        "b": b,
        **figure,
        "text": " ".join(told),
        "settled": _ends(of) is not None and not _holds(of, same) and not doubted,
    }


def _loss_sentence(results: Json, pair: Json) -> str:
    a, b, d, at = pair["a"], pair["b"], pair["loss_difference"], f"At {budget(results)}"
    if d["mean"] is None:
        return f"{at}, losses cannot be compared: a run diverged."
    side = "lower" if d["mean"] < 0 else "higher"
    if d["low"] is None:
        return f"{at}, {b}'s loss is {abs(d['mean']):.4f} {side} than {a}'s; n = {pair['n']} gives no interval and no test, so this may be chance."
    ends = sorted((math.copysign(1, d["mean"]) * d["low"], math.copysign(1, d["mean"]) * d["high"]))
    seeds = f"p = {chance(d['p'])}, n = {pair['n']} seeds, paired"
    if _holds(d, 0):
        return f"{at}, no difference of loss can be told: {b} − {a} = {_signed(d['mean'])} {between(d, _signed)} ({seeds})."
    return f"{at}, {b}'s loss is {abs(d['mean']):.4f} [{ends[0]:.4f}, {ends[1]:.4f}] {side} than {a}'s ({seeds})."


def _ratio(of: Json) -> str:
    return f"{ratio(of['value'])} {between(of, ratio)}".strip()


def _signed(x: float) -> str:
    return f"{x:+.4f}".replace("-", "−")


def differences(
    entries: Sequence[Json],
) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """Rows (key, each entry's value) of the configurations' keys that differ, and (key, value) of those that do not."""
    keys = [
        k for k in dict.fromkeys(k for e in entries for k in e["config"]) if not k.startswith(OWN)
    ]
    rows = [
        (
            k,
            [
                json.dumps(e["config"][k], ensure_ascii=False) if k in e["config"] else "–"
                for e in entries
            ],
        )
        for k in sorted(keys)
    ]
    return [r for r in rows if len(set(r[1])) > 1], [
        (k, values[0]) for k, values in rows if len(set(values)) == 1
    ]


# ---- charts, as data: for report.js and for matplotlib
#
# id, title, about, y; x: axes to choose from, each with name, label, log, categories; filters: choices of lines, each with label and options; view: the first
# view's (low, high) of y; target; lines: entry, label, kind, within (for each filter, the options it is shown at), points; marks: points with a ring.
# kind: "line", "dots" (with bars, where there are), "joined" (both), "band". A point: its value on each axis of x, then y, null where diverged; of a band, then low and high.


def charts(results: Json) -> list[Json]:
    found = [curves(results), horizons(results)]
    keys = dict.fromkeys(
        key for e in results["entries"] for trial in e["trials"] for key in trial["values"]
    )
    return [*found, *(trials(results, key) for key in keys)]


def curves(results: Json) -> Json:
    """Loss over each judged run: validation and training batches, against steps, tokens and training seconds."""
    lines, settled = [], []
    for i, entry in enumerate(results["entries"]):
        at, goal = entry["at_budget"]["steps"], entry["to_target"]
        for run in entry["runs"]:
            within = (
                [AT_BUDGET] * (run["steps"] == at)
                + [TO_TARGET] * bool(goal and run["steps"] == goal["steps"])
                + [ALL]
            )
            label = f"{entry['name']}, seed {run['seed']}, {count(run['steps'])} steps"
            # The record book has no lines of training: they are in its logs.
            for loss_of, points in (
                ("validation", run["curve"]),
                ("training batches", run.get("training", [])),
            ):
                points = [_rounded(p) for p in points]
                if run["loss"] is None:
                    end = [
                        run["steps"],
                        run["steps"] * entry["tokens_per_step"],
                        run["train_seconds"] or 0.0,
                    ]
                    points = [p for p in points if p[-1] is not None]
                    points.append([*(points[-1] if points else end)[:3], None])
                if points:
                    lines.append(
                        {
                            "entry": i,
                            "label": label,
                            "kind": "line",
                            "within": [within, [loss_of]],
                            "points": points,
                        }
                    )
                settled += [
                    p[-1] for p in points if p[-1] is not None and p[0] >= SETTLED * run["steps"]
                ]
        band = _band([r for r in entry["runs"] if r["steps"] == at], results["rule"]["level"])
        if band:
            label = f"{entry['name']}, mean of {entry['at_budget']['n']} seeds"
            lines.append(
                {
                    "entry": i,
                    "label": label,
                    "kind": "band",
                    "within": [[AT_BUDGET], ["validation"]],
                    "points": band,
                }
            )
    shown, several = (
        [line["within"] for line in lines],
        any(len(e["horizons"]) > 1 for e in results["entries"]),
    )
    return {
        "id": "curves",
        "title": "Loss over training",
        "about": f"One line for each seed; with three or more, the band is the {_level(results)} interval of the mean. The first steps are above the first view. "
        "Seconds are of the training clock: all work that looks at the data, no compilation, no evaluation.",
        "y": "loss, nats per token",
        "x": [
            _axis("steps", "training steps"),
            _axis("tokens", "training tokens"),
            _axis("seconds", "training seconds"),
        ],
        "filters": [
            {
                "label": "runs",
                "options": [
                    o
                    for o in (AT_BUDGET, TO_TARGET, ALL)[: 3 if several else 1]
                    if any(o in w for w, _ in shown)
                ],
            },
            {
                "label": "loss of",
                "options": [
                    o for o in ("validation", "training batches") if any(o in of for _, of in shown)
                ],
            },
        ],
        "view": _view(settled, results["target"]),
        "target": results["target"],
        "lines": lines,
        "marks": [],
    }


def horizons(results: Json) -> Json:
    """End loss against the number of steps of the whole schedule."""
    lines, marks, values = [], [], []
    for i, entry in enumerate(results["entries"]):
        name, rows = entry["name"], sorted(entry["horizons"], key=lambda h: h["steps"])
        bars = [[h["low"], h["high"]] if h["low"] is not None else None for h in rows]
        points = [[h["steps"], h["mean"]] for h in rows]
        if points:
            lines.append(
                {
                    "entry": i,
                    "label": f"{name}, mean",
                    "kind": "joined",
                    "within": [],
                    "points": points,
                    "bars": bars,
                }
            )
        for run in entry["runs"]:
            label = f"{name}, seed {run['seed']}"
            lines.append(
                {
                    "entry": i,
                    "label": label,
                    "kind": "dots",
                    "within": [],
                    "points": [[run["steps"], run["loss"]]],
                }
            )
        # The entry that sets the target has the budget by definition; schema 1 tells an interpolated one.
        if (
            entry["to_target"]
            and entry["to_target"]["interpolated"] is not None
            and name != results["target_from"]
        ):
            at, n = entry["to_target"]["interpolated"], entry["at_budget"]["n"]
            needed = results["target"] - (results["rule"]["threshold"] or 0.0) / math.sqrt(n)
            marks.append(
                {
                    "entry": i,
                    "point": [at, needed],
                    "label": f"{name}: interpolated {at:,.1f} steps",
                }
            )
        values += (
            [y for _, y in points]
            + [y for b in bars if b for y in b]
            + [r["loss"] for r in entry["runs"]]
        )
    return {
        "id": "horizons",
        "title": "End loss against horizon",
        "about": "Each point is the end of runs with their full schedule: large ones are means with their "
        f"{_level(results)} interval, small ones seeds. A ring is where loss, interpolated in log steps, falls to what the rule needs: target − threshold/√n.",
        "y": "loss at the end, nats per token",
        "x": [_axis("steps", "horizon, steps", log=True)],
        "filters": [],
        "view": _view([y for y in values if y is not None], results["target"]),
        "target": results["target"],
        "lines": lines,
        "marks": marks,
    }


def trials(results: Json, key: str) -> Json:
    """Loss of the trials of tuning against one of the tuned keys."""
    found = [
        (i, e, [t for t in e["trials"] if key in t["values"]])
        for i, e in enumerate(results["entries"])
    ]
    tried = [t["values"][key] for _, _, of in found for t in of]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in tried)
    categories = None if numbers else sorted({str(v) for v in tried})
    log = (
        numbers and min(tried) > 0 and max(tried) / min(tried) >= 8
    )  # a range that one scans by factors
    place = (lambda v: v) if categories is None else (lambda v: categories.index(str(v)))
    lines, marks = [], []
    for i, entry, of in found:
        points = sorted(([place(t["values"][key]), t["loss"]] for t in of), key=lambda p: p[0])
        if points:
            kind = "joined" if numbers and len(of[0]["values"]) == 1 else "dots"
            lines.append(
                {
                    "entry": i,
                    "label": f"{entry['name']}, {len(points)} trials",
                    "kind": kind,
                    "within": [],
                    "points": points,
                }
            )
        for t in of:
            if entry["tuned"] == t["values"] and t["loss"] is not None:
                marks.append(
                    {
                        "entry": i,
                        "point": [place(t["values"][key]), t["loss"]],
                        "label": f"{entry['name']}: chosen",
                    }
                )
    losses = [t["loss"] for _, _, of in found for t in of if t["loss"] is not None]
    return {
        "id": f"trials-{key}",
        "title": f"Tuning: {key}",
        "about": "Loss of each trial, on the split that tuning reads. A ring: chosen. A cross at the top: diverged.",
        "y": "loss of a trial, nats per token",
        "x": [{**_axis(key, key, log=log), "categories": categories}],
        "filters": [],
        "view": _view(losses, None),
        "target": None,
        "lines": lines,
        "marks": marks,
    }


def _axis(name: str, label: str, *, log: bool = False) -> Json:
    return {"name": name, "label": label, "log": log, "categories": None}


def _rounded(point: Sequence[float | None]) -> list[float | None]:
    return [None if v is None else round(v, 5) for v in point]


def _level(results: Json) -> str:
    return f"{results['rule']['level']:.0%}"


def _view(values: Sequence[float], target: float | None) -> list[float]:
    """What all values and the target are in, with a margin."""
    values = [*values, *([] if target is None else [target])] or [0.0, 1.0]
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 0.01 * abs(high) or 1.0
    return [low - margin, high + margin]


def _band(judged: Sequence[Json], level: float) -> list[list[float | None]]:
    """Mean and t interval of the seeds' losses at the evaluations that all have; nothing where one diverged, nor of two seeds: 12.7 standard errors hide the curves."""
    from scipy import stats

    n = len(judged)
    if n < 3 or any(r["loss"] is None for r in judged):
        return []
    at = [{p[0]: p for p in r["curve"]} for r in judged]
    points = []
    for step in sorted(set.intersection(*(set(p) for p in at))):
        rows = np.array([p[step] for p in at], dtype=float)
        half = float(stats.t.ppf((1 + level) / 2, n - 1)) * rows[:, 3].std(ddof=1) / math.sqrt(n)
        mean = rows.mean(0)
        points.append(_rounded([*mean.tolist(), float(mean[3] - half), float(mean[3] + half)]))
    return points


# ---- the page


def html(results: Json) -> str:
    """The whole page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    found, entries = charts(results), results["entries"]
    script = (HERE / "report.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"signed": _signed} | {
        f.__name__: f
        for f in (count, loss, seconds, size, ratio, chance, between, exact, interpolated)
    }
    styles = [
        {
            "name": e["name"],
            "colour": i % len(LIGHT),
            "dash": DASHES[i % len(DASHES)],
            "marker": _marker(i),
        }
        for i, e in enumerate(entries)
    ]
    varied, shared = differences(entries)
    return environment.get_template("report.html.jinja").render(
        r=results,
        answers=[answer(results, pair) for pair in results["pairs"]],
        budget=budget(results),
        level=_level(results),
        charts=[(c, Markup(static(c, entries))) for c in found],
        data={"entries": styles, "charts": found},
        palettes=(LIGHT, DARK),
        styles=styles,
        varied=varied,
        shared=shared,
        css=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _marker(i: int) -> str:
    return list(MARKERS)[i % len(MARKERS)]


# ---- matplotlib


def draw(axes: Any, chart: Json, entries: Sequence[Json], column: int = 0) -> None:
    """A chart's first view, against one of its axes of x."""
    x, first = chart["x"][column], [f["options"][0] for f in chart["filters"]]
    top = dict(transform=axes.get_xaxis_transform(), clip_on=False, linestyle="none", marker="x")
    for line in chart["lines"]:
        if not all(option in within for option, within in zip(first, line["within"], strict=True)):
            continue
        i, banded = (
            line["entry"],
            any(
                other["kind"] == "band" and other["entry"] == line["entry"]
                for other in chart["lines"]
            ),
        )
        colour, dash, marker = (_style(i)[k] for k in ("color", "linestyle", "marker"))
        points = [p for p in line["points"] if p[-1] is not None]
        across, up = [p[column] for p in points], [p[len(chart["x"])] for p in points]
        if line["kind"] == "band":
            axes.fill_between(
                across,
                [p[-2] for p in points],
                [p[-1] for p in points],
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
            axes.plot(across, up, color=colour, linestyle=dash, linewidth=1.6)
        elif (
            line["kind"] == "line"
        ):  # beside a band, the seed's end alone: the lines are the band's
            if not banded:
                axes.plot(across, up, color=colour, linestyle=dash, linewidth=1, alpha=0.8)
            axes.plot(across[-1:], up[-1:], color=colour, marker=marker, markersize=3, alpha=0.7)
        else:
            joined = line["kind"] == "joined"
            line_style = (
                dict(linestyle=dash, linewidth=1.2, markersize=5)
                if joined
                else dict(linestyle="none", markersize=3, alpha=0.6)
            )
            axes.plot(across, up, color=colour, marker=marker, **line_style)
            for p, bar in zip(line["points"], line.get("bars", []), strict=False):
                if bar:
                    axes.plot([p[0], p[0]], bar, color=colour, linewidth=1.2)
        gone = [p[column] for p in line["points"] if p[-1] is None]
        if gone:
            axes.plot(gone, [0.98] * len(gone), color=colour, **top)
    for mark in chart["marks"]:
        axes.plot(
            *mark["point"],
            "o",
            color=_style(mark["entry"])["color"],
            fillstyle="none",
            markersize=10,
        )
    if chart["target"] is not None:
        axes.axhline(chart["target"], color="#555555", linestyle="--", linewidth=0.9)
        axes.annotate(
            f" target {exact(chart['target'])}",
            (0, chart["target"]),
            xycoords=axes.get_yaxis_transform(),
            va="bottom",
            fontsize=8,
        )
    title = f"{chart['title']}: {x['name']}" if len(chart["x"]) > 1 else chart["title"]
    axes.set(
        xlabel=x["label"],
        ylabel=chart["y"],
        title=title,
        ylim=chart["view"],
        xscale="log" if x["log"] else "linear",
    )
    values = [p[column] for line in chart["lines"] for p in line["points"]]
    if x["categories"]:
        axes.set_xticks(range(len(x["categories"])), x["categories"])
    elif x["log"]:
        axes.minorticks_off()
        axes.set_xticks(_apart(sorted(set(values))), minor=False)
    if not x["categories"]:
        axes.xaxis.set_major_formatter(
            lambda v, _: (
                f"{v:g}" if abs(v) < 1e4 else f"{v / 1e3:g}k" if abs(v) < 1e6 else f"{v / 1e6:g}M"
            )
        )
    axes.grid(alpha=0.3)


def _style(i: int) -> Json:
    """Of entry i."""
    return {
        "color": LIGHT[i % len(LIGHT)],
        "linestyle": (0, DASHES[i % len(DASHES)] or None),
        "marker": MARKERS[_marker(i)],
    }


def _apart(values: list[float], gap: float = 0.12) -> list[float]:
    """Of ascending positive values, those with room for a label on a logarithmic axis: `gap` of its length or more after the one before."""
    length, kept = math.log(values[-1] / values[0]) or 1.0, values[:1]
    for v in values[1:]:
        if math.log(v / kept[-1]) >= gap * length:
            kept.append(v)
    return kept


def _figure(found: Sequence[tuple[Json, int]], entries: Sequence[Json], columns: int) -> Any:
    """Panels (chart, axis of x) in so many columns, and a legend of the entries."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (chart, column) in zip(panels, found, strict=False):
        draw(axes, chart, entries, column)
    for axes in panels[len(found) :]:
        axes.remove()
    handles = [Line2D([], [], markersize=4, **_style(i)) for i in range(len(entries))]
    figure.legend(
        handles,
        [_short(e["name"]) for e in entries],
        loc="outside lower center",
        ncols=min(len(entries), 3),
        fontsize=9,
    )
    return figure


def _short(name: str) -> str:
    """A name with room for it in a picture."""
    return name if len(name) <= 40 else name[:39] + "…"


def _settings(salt: str = "") -> Any:
    """Text as it is, not as mathematics; the same identifiers at each call, others for each salt."""
    from matplotlib import rc_context

    return rc_context(
        {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9}
    )


def static(chart: Json, entries: Sequence[Json]) -> str:
    """A chart as an SVG element for a page without script: no declaration, no metadata, no name spaces, which HTML knows."""
    out = io.StringIO()
    with _settings(chart["id"]):
        figure = _figure([(chart, column) for column in range(len(chart["x"]))], entries, 1)
        figure.savefig(
            out,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Title": f"{chart['title']}. {chart['about']}"},
        )
    svg = re.sub(
        r"<metadata>.*?</metadata>",
        "",
        out.getvalue()[out.getvalue().index("<svg") :],
        flags=re.DOTALL,
    )
    return re.sub(r' (xmlns(:\w+)?|version)="[^"]*"|(?<=<g) id="[^"]*"', "", svg)


def picture(results: Json, path: Path) -> None:
    """report.png, for a README: the curves against steps, tokens and seconds, and end loss against horizon where there are two or more."""
    found = {c["id"]: c for c in charts(results)}
    panels = [(found["curves"], column) for column in range(3)]
    if any(len(e["horizons"]) > 1 for e in results["entries"]):
        panels.append((found["horizons"], 0))
    with _settings():
        figure = _figure(panels, results["entries"], 3 if len(panels) == 3 else 2)
        figure.savefig(path, dpi=120)


def main(argv: list[str]) -> int:
    file = Path(argv[0]) / "results.json" if len(argv) == 1 else None
    if file is None or not file.is_file():
        raise ReportError(
            "python -m studies.report",
            got=" ".join(argv),
            allowed="the folder of a study, with its results.json",
            fix="runs/NAME",
        )
    for path in write(json.loads(file.read_text(encoding="utf-8")), file.parent):
        print(path)
    return 0
