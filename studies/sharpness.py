"""Does the curvature of the loss follow one curve at every size? λ_max during training, for several scalings ([SC] arXiv 2402.17457).

    python -m studies.sharpness configs/transfer.toml --widths 64 128 256 --methods dualized=4 ntk=8 adamw=0.004 --seeds 4

METHODS: an optimizer, its parametrization and initialization, with the learning rate that all sizes share. Each λ_max is that of the Hessian in the coordinates
in which the method is gradient descent (optim/baselines.py's coordinates; AdamW's weights are their own, with its preconditioner beside it), on one batch for all runs. A size's
trajectory is that of train.sharpness_every in metrics.jsonl; telemetry.py says what is in it.

Super consistency, as a number: the standard deviation over sizes of ln λ_max, averaged over time; once at equal steps, once at equal loss, over the losses that all sizes and
methods have passed. Intervals: t over seeds. Other options, --section.key value, go to every run. The folder runs/NAME: as that of studies.transfer, with sharpness-width.png or sharpness-depth.png.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.shards import DataError
from training import config as configuration
from training.config import ConfigError
from training.runtime import RunError

from . import runs
from .intervals import Interval, student
from .transfer import AXES, Line, Size, base_size, lines, name_of, sized

# What curves can be of, and the flag that says it has converged; the rest needs none: the modular sharpness is a lower bound in any case.
QUANTITIES = {
    "lambda_max": "converged",
    "preconditioned": "preconditioned_converged",
    "modular_sharpness": None,
    "dual_norm": None,
    "gradient_norm": None,
}
LOSSES = 20  # points of the loss at which curves are compared


@dataclass(frozen=True)
class Curve:
    """One run's trajectory: steps, losses of the fixed batch, and the values of one quantity, (T,) each."""

    steps: np.ndarray
    losses: np.ndarray
    values: np.ndarray

    def at_losses(self, grid: np.ndarray) -> np.ndarray:
        """ln value where the loss first falls to each of `grid` (descending)."""
        new = self.losses < np.r_[np.inf, np.minimum.accumulate(self.losses)[:-1]]
        return np.interp(-grid, -self.losses[new], np.log(self.values[new]))


def curve(path: Path, quantity: str) -> Curve | None:
    """Where it converged and is positive. None of a run that diverged or has none."""
    if runs.summary(path) is None:
        return None
    sure = QUANTITIES[quantity]
    kept = [
        (r["step"], s["loss"], s[quantity])
        for r, s in records(path)
        if (s.get(quantity) or 0) > 0 and (sure is None or s[sure])
    ]
    return (
        Curve(*(np.array(column, dtype=np.float64) for column in zip(*kept, strict=True)))
        if kept
        else None
    )


def records(path: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(record, its curvature) where it was measured."""
    return [(r, r["sharpness"]) for r in runs.metrics(path) if "sharpness" in r]


def margins(path: Path) -> list[tuple[int, float]]:
    """(step, how far the run is to its method's own threshold of stability; 1 is at it): of gradient descent λ_max, of AdamW the preconditioned one, over
    2(1 + β)/((1 − β) lr); of dualized and normalized steps lr over stable_lr, momentum apart."""
    found = []
    for r, s in records(path):
        if s["threshold"]:
            found.append((r["step"], s.get("preconditioned", s["lambda_max"]) / s["threshold"]))
        else:
            found.append((r["step"], r["lr"] / s["stable_lr"] if s["stable_lr"] else 0.0))
    return found


def spread_at_steps(curves: list[Curve]) -> float:
    """Standard deviation over sizes of ln value, at the steps that all have, averaged."""
    steps = sorted(set.intersection(*({int(s) for s in c.steps} for c in curves)))
    logs = np.array([[math.log(c.values[list(c.steps).index(s)]) for s in steps] for c in curves])
    return float(logs.std(axis=0, ddof=1).mean())


def common_losses(curves: list[Curve]) -> np.ndarray | None:
    """Losses that all curves pass, highest first; None if there are none."""
    high, low = min(c.losses[0] for c in curves), max(c.losses.min() for c in curves)
    return np.linspace(high, low, LOSSES) if high > low else None


def spread_at_losses(curves: list[Curve], grid: np.ndarray) -> float:
    """The same at equal losses."""
    return float(np.array([c.at_losses(grid) for c in curves]).std(axis=0, ddof=1).mean())


def drift(curves: list[Curve], sizes: list[int]) -> float:
    """Slope of ln value, averaged over time, against ln size: the exponent of a power law."""
    return float(np.polyfit(np.log(sizes), [np.log(c.values).mean() for c in curves], 1)[0])


def consistency(
    found: dict[str, list[list[Curve]]], sizes: list[int]
) -> dict[str, dict[str, Interval | None]]:
    """{method: {"steps", "losses", "drift"}} from curves [method][seed][size]; intervals over seeds. "losses": on one grid for all methods and sizes of a seed."""
    out: dict[str, dict[str, list[float]]] = {
        m: {"steps": [], "losses": [], "drift": []} for m in found
    }
    for seed in range(min(map(len, found.values()))):
        grid = common_losses([c for by_seed in found.values() for c in by_seed[seed]])
        for method, by_seed in found.items():
            curves = by_seed[seed]
            out[method]["steps"].append(spread_at_steps(curves))
            out[method]["drift"].append(drift(curves, sizes))
            if grid is not None:
                out[method]["losses"].append(spread_at_losses(curves, grid))
    return {
        m: {k: student(v) if v else None for k, v in numbers.items()} for m, numbers in out.items()
    }


def ratios(
    found: dict[str, list[list[Curve]]], method: str, other: str
) -> dict[str, Interval | None]:
    """How many times larger `other`'s spread is, at equal steps and at equal losses of these two: means of log ratios over seeds, with intervals."""
    out: dict[str, list[float]] = {"steps": [], "losses": []}
    for ours, theirs in zip(found[method], found[other], strict=True):
        out["steps"].append(math.log(spread_at_steps(theirs) / spread_at_steps(ours)))
        grid = common_losses([*ours, *theirs])
        if grid is not None:
            out["losses"].append(
                math.log(spread_at_losses(theirs, grid) / spread_at_losses(ours, grid))
            )
    intervals = {k: student(v) if v else None for k, v in out.items()}
    return {
        k: i and Interval(math.exp(i.low), math.exp(i.value), math.exp(i.high))
        for k, i in intervals.items()
    }


def plot(
    line: Line,
    found: dict[str, list[list[Curve]]],
    near: dict[str, list[list[list[tuple[int, float]]]]],
    quantity: str,
    title: str,
    path: Path,
) -> None:
    """A column for each method, a curve for each size (thin: further seeds): the quantity against steps, against loss, and the margin to the method's own threshold."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(found), 9), layout="constrained")
    panels = figure.subplots(3, len(found), squeeze=False)
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(line.sizes)))
    for column, (method, by_seed) in zip(panels.T, found.items(), strict=True):
        for s, (size, colour) in enumerate(zip(line.values(), colours, strict=True)):
            for seed, curves in enumerate(by_seed):
                c = curves[s]
                style = {
                    "color": colour,
                    "alpha": 0.9 if seed == 0 else 0.35,
                    "linewidth": 1.4 if seed == 0 else 0.8,
                }
                column[0].plot(
                    c.steps, c.values, label=f"{line.axis} {size}" if seed == 0 else None, **style
                )
                column[1].plot(c.losses, c.values, **style)
                column[2].plot(*zip(*near[method][seed][s], strict=True), **style)
        column[0].set(yscale="log", xlabel="step", title=method)
        column[1].set(yscale="log", xlabel="loss of the fixed batch, nats per token")
        column[1].invert_xaxis()
        column[2].axhline(1, color="black", linestyle="--", linewidth=1)
        column[2].set(xlabel="step", ylim=(0, None))
        column[0].legend(fontsize=7)
        for axes in column:
            axes.grid(alpha=0.3)
    for axes, label in zip(
        panels[:, 0], (quantity, quantity, "share of the stability threshold"), strict=True
    ):
        axes.set_ylabel(label)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def read_methods(options: list[str]) -> dict[str, float]:
    """["dualized=4", …] → {method: lr}."""
    found = {}
    for option in options:
        method, _, lr = option.partition("=")
        try:
            found[method] = float(lr)
        except ValueError:
            found[method] = math.nan
        if method not in runs.METHODS or not 0 < found[method] < math.inf:
            raise runs.StudyError(
                "--methods",
                got=option,
                allowed=f"METHOD=LR, of {', '.join(runs.METHODS)}",
                fix="--methods dualized=4 ntk=8; studies.transfer finds the rates",
            )
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m studies.sharpness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", help="the smallest model: configs/transfer.toml")
    for axis in ("width", "depth"):
        parser.add_argument(f"--{AXES[axis].option}", type=int, nargs="+", default=[], metavar="N")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["dualized=4"],
        metavar="METHOD=LR",
        help=", ".join(runs.METHODS),
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--quantity",
        default="lambda_max",
        choices=QUANTITIES,
        help="of the records that telemetry.py describes",
    )
    parser.add_argument("--name", help="of the folder, runs/NAME; sharpness-<config> if left out")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dry-run", action="store_true", help="the cost alone")
    options, rest = parser.parse_known_args(argv)
    base = configuration.load([options.config, *rest])
    base.train.sharpness_every = base.train.sharpness_every or max(1, base.train.steps // 10)
    methods = read_methods(options.methods)
    folder = Path(base.run.dir) / (options.name or f"sharpness-{Path(options.config).stem}")
    found = lines(
        base_size(base), {a: getattr(options, x.option, []) for a, x in AXES.items()}, grid=False
    )
    if not found or options.seeds < 1:
        raise runs.StudyError(
            "python -m studies.sharpness",
            got=f"{len(found)} axes, {options.seeds} seeds",
            allowed="1 or more",
            fix="--widths 64 128 256",
        )

    def name(method: str, size: Size, seed: int) -> str:
        return f"{method}.{name_of(size, methods[method], seed)}"

    jobs = []
    for seed in range(options.seeds):
        for method, lr in methods.items():
            for size in dict.fromkeys(z for line in found for z in line.sizes):
                changes = {
                    **runs.METHODS[method],
                    **sized(base, size),
                    "optim.lr": lr,
                    "run.seed": seed,
                }
                jobs.append(runs.job(base, name(method, size, seed), folder, **changes))
    if not runs.sweep(jobs, folder, workers=runs.places(options.workers), dry_run=options.dry_run):
        return 0
    pictures: list[Path] = []
    results, texts = [], [f"{base.data.dataset}: python -m studies.sharpness {' '.join(argv)}"]
    for line in found:
        curves: dict[str, list[list[Curve]]] = {}
        for method in methods:
            all_seeds = [
                [curve(folder / name(method, z, s), options.quantity) for z in line.sizes]
                for s in range(options.seeds)
            ]
            whole = [[c for c in of_seed if c] for of_seed in all_seeds]
            if all(len(of_seed) == len(line.sizes) for of_seed in whole):
                curves[method] = whole
            else:
                texts.append(
                    f"{method}: left out over {line.axis}, as a run diverged or has no {options.quantity}"
                )
        if not curves:
            continue
        numbers = consistency(curves, line.values())
        rows = [
            f"{line}, {options.quantity}: standard deviation over {line.axis} of its logarithm, averaged [95% over {options.seeds} seeds]"
        ]
        rows += [
            f"  {'method':<16} {'at equal steps':<26} {'at equal loss':<26} exponent of {line.axis}"
        ]
        rows += [
            f"  {m:<16} {n['steps']!s:<26} {n['losses']!s:<26} {n['drift']}"
            for m, n in numbers.items()
        ]
        compared = (
            {m: ratios(curves, "dualized", m) for m in curves if m != "dualized"}
            if "dualized" in curves
            else {}
        )
        rows += [
            f"  spread of {m} over that of dualized: {r['steps']} at equal steps, {r['losses']} at equal loss"
            for m, r in compared.items()
        ]
        texts.append("\n".join(rows))
        results.append(
            {
                "line": str(line),
                "axis": line.axis,
                "sizes": line.values(),
                "quantity": options.quantity,
            }
        )
        results[-1] |= {m: {k: i and vars(i) for k, i in n.items()} for m, n in numbers.items()} | {
            "ratios": {m: {k: i and vars(i) for k, i in r.items()} for m, r in compared.items()}
        }
        near = {
            m: [
                [margins(folder / name(m, z, seed)) for z in line.sizes]
                for seed in range(options.seeds)
            ]
            for m in curves
        }
        pictures.append(folder / f"sharpness-{line.axis}.png")
        plot(line, curves, near, options.quantity, f"{base.data.dataset}, {line}", pictures[-1])
    (folder / "verdict.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    runs.write_json(folder / "results.json", {"command": argv, "lines": results})
    print("\n\n".join(texts))
    print("\npictures: " + ", ".join(map(str, pictures)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ConfigError, DataError, RunError, runs.StudyError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
