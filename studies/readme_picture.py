"""Draw docs/readme.png, the picture of README.md, from committed results.

    python -m studies.readme_picture

Left and middle: loss against learning rate, from the two sweeps over width that
docs/tutorial-transfer.md prints. Right: steps to the target, from the record's results.json.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
SWEEPS = ROOT / "docs/tutorial-transfer.md"
RESULTS = ROOT / "records/pysource-cpu/2026-11-23_nesterov-soap/results.json"
PICTURE = ROOT / "docs/readme.png"
LABELS = {"dualized": "dualized\n(ours)", "muon": "Muon + AdamW", "adamw": "AdamW"}
SPAN = 2**4.3  # right edge of a panel's rates over its left one: alike, so that slopes compare
COLORS = {"dualized": "#0f766e", "muon": "#b45309", "adamw": "#64748b"}


def read_sweep(page: str, name: str) -> tuple[list[float], dict[int, list[float]]]:
    """Return the learning rates of the sweep NAME that PAGE prints, and the losses of each width."""
    output = re.search(rf"--name {name}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert output is not None, f"{SWEEPS} prints no sweep with --name {name}"
    header, *lines = output[1].split("\n\n")[0].splitlines()
    rates = [float(rate) for rate in re.findall(r"lr ([\d.]+)", header)]
    rows = [line.split() for line in lines]
    return rates, {int(width): [float(loss) for loss in losses] for width, *losses in rows}


def draw_sweep(
    axes: "Axes",
    rates: Sequence[float],
    losses_by_width: Mapping[int, Sequence[float]],
    *,
    title: str,
) -> None:
    """Draw one curve for each width; a ring marks the lowest loss of each."""
    from matplotlib import colormaps
    from matplotlib.ticker import NullLocator

    for width, losses in losses_by_width.items():
        # The same width has the same colour in both panels: 64 … 1024 are 0 … 4 octaves.
        color = colormaps["viridis"](0.9 * (width.bit_length() - 7) / 4)
        best = min(range(len(rates)), key=losses.__getitem__)
        axes.plot(rates, losses, "o-", color=color, markersize=3, label=f"width {width}")
        axes.plot(rates[best], losses[best], "o", color=color, markersize=11, fillstyle="none")
    axes.plot([], [], "o", color="black", markersize=9, fillstyle="none", label="lowest loss")
    axes.set_xscale("log")
    middle = (rates[0] * rates[-1]) ** 0.5
    axes.set_xlim(middle / SPAN**0.5, middle * SPAN**0.5)
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(title=title, xlabel="learning rate", ylabel="validation loss (nats per character)")
    axes.set_ylim(1.84, 2.42)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper left" if len(losses_by_width) > 3 else "lower right")


def draw_steps(axes: "Axes", entries: Sequence[Mapping], *, target: float) -> None:
    """Draw a bar of steps to the target for each entry, with the interval of the horizon."""
    for row, entry in enumerate(reversed(entries)):
        name, to_target = entry["name"], entry["to_target"]
        steps, low, high = (to_target[key] for key in ("steps", "low", "high"))
        axes.barh(row, steps, color=COLORS[name], height=0.55)
        label = f"{steps} (sets the target)"
        if low < high:
            # The interval is that of the interpolated horizon, which the steps round up.
            middle = to_target["interpolated"]
            axes.errorbar(
                middle, row, xerr=[[middle - low], [high - middle]], color="black", capsize=5
            )
            label = f"{steps}  [{low:.0f}, {high:.0f}]"
        axes.text(5, row + 0.33, label, va="bottom", fontsize=10)
    axes.set_yticks(range(len(entries)), [LABELS[entry["name"]] for entry in reversed(entries)])
    axes.set_ylim(-0.5, len(entries) - 0.3)
    axes.set(
        title=f"Steps to a validation loss of {target:.4f}",
        xlabel="training steps; brackets: 95 % interval, 4 seeds",
    )
    axes.grid(axis="x", alpha=0.25)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write docs/readme.png."""
    argparse.ArgumentParser(prog="python -m studies.readme_picture").parse_args(arguments)
    from matplotlib.figure import Figure

    page = SWEEPS.read_text(encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    figure = Figure(figsize=(14.5, 4.6), layout="constrained")
    ours, adamw, steps = figure.subplots(1, 3)
    for axes, name, title in (
        (ours, "width-dualized", "Dualized: the best rate stays (mean of 2 seeds)"),
        (adamw, "width-adamw", "AdamW: the best rate moves (1 seed)"),
    ):
        draw_sweep(axes, *read_sweep(page, name), title=title)
    draw_steps(steps, results["entries"], target=results["target"])
    figure.savefig(PICTURE, dpi=100)
    print(f"written: {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
