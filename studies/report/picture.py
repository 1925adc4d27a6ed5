"""The charts as matplotlib draws them: report.png, and an SVG for a page without script."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .charts import charts
from .palette import LIGHT, MARKERS, dash, marker
from .words import Json, as_target

# Inches of a panel.
PANEL = (5.2, 3.6)
# Characters in an inch, of the caption in 8 points and of the legend in 9.
CAPTION_CHARACTERS, KEY_CHARACTERS = 17, 11
# Characters of an entry's name that a legend has room for.
NAME = 40


def picture(results: Json, path: Path) -> None:
    """Draw report.png: loss against steps, tokens and seconds, and end losses if they vary."""
    by_id = {c["id"]: c for c in charts(results)}
    panels = [(by_id["curves"], column) for column in range(3)]
    if any(len(e["horizons"]) > 1 for e in results["entries"]):
        panels.append((by_id["horizons"], 0))
    with _settings():
        figure = _figure(panels, results["entries"], columns=3 if len(panels) == 3 else 2)
        shown = list({chart["id"]: chart for chart, _ in panels}.values())
        _add_caption(figure, [_caption(chart) for chart in shown])
        figure.savefig(path, dpi=120)


def static_svg(chart: Json, entries: Sequence[Json]) -> str:
    """Return a chart as an SVG element for a page without script.

    It has no declaration, no metadata, and no name spaces, which HTML knows.
    """
    panels = [(chart, column) for column in range(len(chart["x"]))]
    title = f"{chart['title']}. {chart['about']}"
    out = io.StringIO()
    with _settings(chart["id"]):
        figure = _figure(panels, entries, columns=1)
        metadata = {"Date": None, "Title": title}
        figure.savefig(out, format="svg", transparent=True, metadata=metadata)
    text = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r' (xmlns(:\w+)?|version)="[^"]*"|(?<=<g) id="[^"]*"', "", svg)


def _settings(salt: str = "") -> Any:
    """Draw text as it is, not as mathematics, and the same identifiers at each call, by salt."""
    from matplotlib import rc_context

    return rc_context(
        {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9}
    )


# ---- a figure


def _figure(panels: Sequence[tuple[Json, int]], entries: Sequence[Json], *, columns: int) -> Any:
    """Return a figure of panels (chart, axis of x), with a legend of the entries above them."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = math.ceil(len(panels) / columns)
    width, height = PANEL[0] * columns, PANEL[1] * rows + 0.4
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (chart, column) in zip(grid, panels, strict=False):
        _draw(axes, chart, column)
    for axes in grid[len(panels) :]:
        axes.remove()
    names = [_shortened(e["name"]) for e in entries]
    # A key takes as much room as 8 characters.
    in_a_row = int(KEY_CHARACTERS * width / (max(map(len, names)) + 8))
    figure.legend(
        [Line2D([], [], markersize=4, **_style(i)) for i in range(len(entries))],
        names,
        loc="outside upper center",
        ncols=max(1, min(len(names), in_a_row)),
        fontsize=9,
    )
    return figure


def _add_caption(figure: Any, paragraphs: Sequence[str]) -> None:
    """Write the caption below the panels, and make room for it."""
    width, height = figure.get_size_inches()
    lines = [s for text in paragraphs for s in textwrap.wrap(text, int(CAPTION_CHARACTERS * width))]
    figure.set_size_inches(width, height + 0.16 * len(lines))
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8)


def _caption(chart: Json) -> str:
    choices = ", ".join(f"{f['label']} {f['options'][0]}" for f in chart["filters"])
    return f"{chart['title']}{f' ({choices})' if choices else ''}: {chart['about']}"


def _shortened(name: str) -> str:
    return name if len(name) <= NAME else name[: NAME - 1] + "…"


def _style(entry: int) -> Json:
    return {
        "color": LIGHT[entry % len(LIGHT)],
        "linestyle": (0, dash(entry) or None),
        "marker": MARKERS[marker(entry)],
    }


# ---- a panel


def _draw(axes: Any, chart: Json, column: int) -> None:
    """Draw a chart's first view, against one of its axes of x."""
    first = [f["options"][0] for f in chart["filters"]]
    banded = {line["entry"] for line in chart["lines"] if line["kind"] == "band"}
    for line in chart["lines"]:
        if all(option in options for option, options in zip(first, line["within"], strict=True)):
            faint = line["entry"] in banded
            _draw_line(axes, line, column, loss=len(chart["x"]), faint=faint)
    for mark in chart["marks"]:
        colour = _style(mark["entry"])["color"]
        axes.plot(*mark["point"], "o", color=colour, fillstyle="none", markersize=10)
    if chart["target"] is not None:
        _draw_target(axes, chart["target"], above=chart["target"] < sum(chart["view"]) / 2)
    x = chart["x"][column]
    axes.set(
        xlabel=x["label"],
        ylabel=chart["y"],
        title=f"{chart['title']}: {x['name']}" if len(chart["x"]) > 1 else chart["title"],
        ylim=chart["view"],
        xscale="log" if x["log"] else "linear",
    )
    _set_ticks(axes, x, [p[column] for line in chart["lines"] for p in line["points"]])
    axes.grid(alpha=0.3)


def _draw_line(axes: Any, line: Json, column: int, *, loss: int, faint: bool) -> None:
    """Draw one line of a chart.

    loss: its place in a point. faint: a mean with a band stands for the lines of single seeds.
    """
    style = _style(line["entry"])
    colour, dashes, symbol = style["color"], style["linestyle"], style["marker"]
    points = [p for p in line["points"] if p[-1] is not None]
    x, y = [p[column] for p in points], [p[loss] for p in points]
    if line["kind"] == "band":
        low, high = ([p[k] for p in points] for k in (-2, -1))
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.6)
    elif line["kind"] == "line":
        strength = dict(linewidth=0.6, alpha=0.4) if faint else dict(linewidth=1, alpha=0.8)
        axes.plot(x, y, color=colour, linestyle="-" if faint else dashes, **strength)
        axes.plot(x[-1:], y[-1:], color=colour, marker=symbol, markersize=3, alpha=0.7)
    elif line["kind"] == "joined":
        axes.plot(x, y, color=colour, marker=symbol, linestyle=dashes, linewidth=1.2, markersize=5)
    else:
        axes.plot(x, y, color=colour, marker=symbol, linestyle="none", markersize=3, alpha=0.6)
    for point, bar in zip(line["points"], line["bars"], strict=False):
        if bar:
            axes.plot([point[column]] * 2, bar, color=colour, linewidth=1.2)
    diverged = [p[column] for p in line["points"] if p[-1] is None]
    if diverged:
        across = axes.get_xaxis_transform()
        axes.plot(diverged, [0.97] * len(diverged), "x", color=colour, transform=across)


def _draw_target(axes: Any, target: float, *, above: bool) -> None:
    """Draw the target's line, with its name above or below it."""
    axes.axhline(target, color="#555555", linestyle="--", linewidth=0.9)
    axes.annotate(
        f" target {as_target(target)}",
        (0, target),
        xycoords=axes.get_yaxis_transform(),
        va="bottom" if above else "top",
        fontsize=8,
    )


def _set_ticks(axes: Any, x: Json, values: Sequence[float]) -> None:
    """Label the axis of x: categories by name, a logarithmic axis at the values it has."""
    if x["categories"]:
        axes.set_xticks(range(len(x["categories"])), x["categories"])
        return
    if x["log"]:
        axes.minorticks_off()
        axes.set_xticks(_spaced(sorted(set(values))), minor=False)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _spaced(values: Sequence[float], gap: float = 0.12) -> list[float]:
    """Return those ascending values whose labels have room on a logarithmic axis.

    They are `gap` of its length apart, or more.
    """
    length, kept = math.log(values[-1] / values[0]) or 1.0, list(values[:1])
    for value in values[1:]:
        if math.log(value / kept[-1]) >= gap * length:
            kept.append(value)
    return kept
