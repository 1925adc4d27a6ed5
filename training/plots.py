"""The pictures of a run: loss.png and geometry.png."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .run_folder import RunFolder

if TYPE_CHECKING:  # a run without pictures does not load matplotlib
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize

Point = tuple[float, float]


# ---- loss.png


def plot_losses(
    folder: RunFolder, compressors: Mapping[str, float], *, bytes_per_token: float
) -> None:
    """Draw loss.png: training and validation loss against tokens, beside compressors.

    compressors: bits per byte that each of them needs for the text of the validation split.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    records = folder.metrics()
    trained = [(r["tokens"], r["loss"]) for r in records if "loss" in r]
    validated = [(r["tokens"], r["val_loss"]) for r in records if "val_loss" in r]
    faint = {"color": "tab:blue", "alpha": 0.35, "linewidth": 1}
    axes.plot(*zip(*trained, strict=True), label="training, each logged batch", **faint)
    span = max(1, len(trained) // 10)
    if span > 1:
        means = running_means(trained, span)
        label = f"training, mean of {span} logged batches"
        axes.plot(*zip(*means, strict=True), color="tab:blue", linewidth=2, label=label)
    if validated:
        label = f"validation, {validated[-1][1]:.3f} at the end"
        axes.plot(*zip(*validated, strict=True), "o", color="tab:red", label=label)
    nats = math.log(2) * bytes_per_token
    for (name, bits), shade in zip(compressors.items(), ("0.7", "0.5", "0.3"), strict=False):
        label = f"{name} on the validation text, {bits * nats:.3f}"
        axes.axhline(bits * nats, color=shade, linestyle="--", linewidth=1, label=label)
    axes.set(
        xlabel="tokens trained on",
        ylabel="loss, nats per token (log scale)",
        title=f"Loss of {folder.path.name}",
        yscale="log",
    )
    axes.xaxis.set_major_formatter(EngFormatter())
    # The losses of a run span about a decade: even ticks tell more than powers of ten.
    axes.yaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder.path / "loss.png", dpi=120)


def running_means(points: Sequence[Point], span: int) -> list[Point]:
    """Return (x, mean of the last `span` values) from the first point that has so many."""
    return [
        (x, sum(y for _, y in points[i + 1 - span : i + 1]) / span)
        for i, (x, _) in enumerate(points)
        if i + 1 >= span
    ]


# ---- geometry.png


@dataclass(frozen=True)
class Panel:
    """A heat map of one quantity. scale: linear, log, or band, around what is normal."""

    quantity: str
    title: str
    caption: str
    scale: str


PANELS = (
    Panel("step", "Step size, achieved ÷ requested", "green is normal: {normal}", "band"),
    Panel(
        "relative_step",
        "Relative step ‖ΔW‖ / ‖W‖",
        "the change beside the weight, decay included",
        "log",
    ),
    Panel("weight_norm", "Weight norm ‖W‖", "after the step", "linear"),
    Panel(
        "grad_dual_norm",
        "Gradient, dual norm ‖g‖†",
        "nats that a step of norm 1 gains, to first order",
        "log",
    ),
    Panel(
        "orthogonality",
        "Distance of the step from orthogonal, ‖PPᵀ − I‖ / √m",
        "up to {residual:.2g} is normal, more where the gradient lacks directions",
        "linear",
    ),
    Panel(
        "max_attention_logit",
        "Largest attention logit, by layer",
        "over heads and causal pairs",
        "linear",
    ),
)
CAPTION = (
    "A row is a tensor: rows of a kind run from the first layer, on top, to the last."
    " A column is a measured step. Each norm is that of the tensor's role (receipt.txt).\n"
    "Grey: no step was taken, there was no gradient, or the number was not finite."
)
# Where no step is known to be made of polar factors.
FREE_STEPS = "1 is as requested; matrices differ that step in other coordinates, or by dual norms"
MARGIN = 0.25  # of a ratio: so far outside the normal range its colour is full
Grid = tuple[list[str], list[int], list[list[float]]]


def kind(name: str) -> str:
    """Return what a tensor is in every layer: "attention.q" of "blocks.3.attention.q.weight"."""
    return re.sub(r"\b\d+\b", "*", name.removesuffix(".weight")).split("*.")[-1]


def grid(records: Sequence[Mapping[str, Any]], quantity: str) -> Grid:
    """Return (tensors, steps, values [tensor][step]) of a quantity.

    Tensors are in the order of the network, those of one kind together. NaN stands for what there
    is no number for.
    """
    measured = {
        r["step"]: r["geometry"][quantity] for r in records if quantity in r.get("geometry", {})
    }
    names = list(dict.fromkeys(n for table in measured.values() for n in table))
    kinds = list(dict.fromkeys(kind(n) for n in names))
    names.sort(key=lambda n: kinds.index(kind(n)))
    rows = [[table.get(n) for table in measured.values()] for n in names]
    return names, list(measured), [[nan if x is None else x for x in row] for row in rows]


def plot_geometry(
    records: Sequence[Mapping[str, Any]], path: Path, *, band: tuple[float, float]
) -> None:
    """Draw heat maps, tensor × time, of the records that have "geometry"; none, if none has.

    There is a panel for each quantity; rows are ordered by kind of tensor and then by layer. band:
    where the polar schedule leaves singular values, so that steps of matrices that are polar
    factors are as much larger or smaller than requested.
    """
    from matplotlib.figure import Figure

    grids = [(panel, without_zeros(grid(records, panel.quantity), panel)) for panel in PANELS]
    shown = [(p, g) for p, g in grids if any(isfinite(x) for row in g[2] for x in row)]
    if not shown:
        return
    if all(panel.quantity != "orthogonality" for panel, _ in shown):
        shown = [
            (replace(p, scale="linear", caption=FREE_STEPS) if p.quantity == "step" else p, g)
            for p, g in shown
        ]
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    most_rows = max(len(names) for _, (names, _, _) in shown)
    height = min(6.5, max(2.8, 1 + 0.05 * most_rows)) + 0.3
    figure = Figure(figsize=(5 * across, height * down + 0.8), layout="constrained")
    all_axes = figure.subplots(down, across, squeeze=False).flatten()
    for axes in all_axes[len(shown) :]:
        axes.set_axis_off()
    for axes, (panel, (names, steps, values)) in zip(all_axes, shown, strict=False):
        colours, palette = colouring(panel.scale, values, band)
        axes.set_facecolor("0.8")
        image = axes.imshow(
            values, aspect="auto", interpolation="nearest", norm=colours, cmap=palette
        )
        bar = figure.colorbar(image, ax=axes, pad=0.01)
        bar.ax.tick_params(labelsize=7)
        for edge in band if panel.scale == "band" else ():
            bar.ax.axhline(edge, color="black", linewidth=0.8)
        label_panel(axes, panel, names, steps, band)
    figure.suptitle(f"Geometry of the steps of {path.parent.name}", fontsize=11)
    figure.supxlabel(CAPTION, fontsize=8)
    figure.savefig(path, dpi=120)


def without_zeros(table: Grid, panel: Panel) -> Grid:
    """Return a grid in which 0 is NaN: no step was taken, or there was no gradient.

    In a linear panel 0 is a number like others.
    """
    names, steps, values = table
    if panel.scale == "linear":
        return table
    return names, steps, [[x if x > 0 else nan for x in row] for row in values]


def colouring(
    scale: str, values: Sequence[Sequence[float]], band: tuple[float, float]
) -> tuple[Normalize, Colormap]:
    """Return how the numbers of a panel are mapped to colours."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    numbers = [x for row in values for x in row if isfinite(x)]
    if scale != "band":
        colours = (LogNorm if scale == "log" else Normalize)(min(numbers), max(numbers))
        return colours, colormaps["viridis"]
    low, high = band
    least, most = min(low - MARGIN, *numbers), max(high + MARGIN, *numbers)
    edges = [(x - least) / (most - least) for x in (low, high)]
    places = zip((0, *edges, 1), ("tab:blue", "#d9f0d3", "#d9f0d3", "tab:red"), strict=True)
    return Normalize(least, most), LinearSegmentedColormap.from_list("band", list(places), N=1024)


def label_panel(
    axes: Axes,
    panel: Panel,
    names: Sequence[str],
    steps: Sequence[int],
    band: tuple[float, float],
) -> None:
    """Write title, caption, kinds of tensors and steps around a heat map."""
    low, high = band
    normal = "1" if low == high else f"1, or {low:g} to {high:g} for matrices (polar schedule)"
    caption = panel.caption.format(normal=normal, residual=max(1 - low**2, high**2 - 1))
    axes.set_title(panel.title, fontsize=9, loc="left", pad=15)
    axes.annotate(caption, (0, 1), (0, 4), "axes fraction", "offset points", fontsize=7)
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        rows.setdefault(kind(name), []).append(i)
    axes.set_yticks([(at[0] + at[-1]) / 2 for at in rows.values()], list(rows), fontsize=7)
    for at in list(rows.values())[1:]:
        axes.axhline(at[0] - 0.5, color="black", linewidth=0.5)
    columns = sorted({round(i * (len(steps) - 1) / 4) for i in range(5)})
    axes.set_xticks(columns, [str(steps[i]) for i in columns], fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("training step", fontsize=7)
