r"""Does the curvature follow one curve at every size? λ_max during training, for several methods.

    python -m studies.sharpness configs/transfer.toml \
        --widths 64 128 256 --methods dualized=4 ntk=8 adamw=0.004 --seeds 4

METHODS: an optimizer, its parametrization and initialization, with the learning rate that all sizes
share. Each λ_max is that of the Hessian in the coordinates in which the method is gradient descent
(optim/baselines.py's coordinates; AdamW's weights are their own, with its preconditioner beside
it), on one batch for all runs. studies/trajectories.py says what is compared.

Other options, --section.key value, go to every run. The folder runs/NAME is as that of
studies.transfer, with sharpness-width.png or sharpness-depth.png.
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

from optim.errors import Refusal
from training import config as configuration
from training.config import Config

from . import runs
from .evidence import file_of
from .intervals import Interval
from .sizes import AXES, Line, Size, base_size, lines_through, run_name, settings_at
from .trajectories import QUANTITIES, Curves, consistency, margins, ratios, read_curve

# As a picture's axis names them. Where the loss is in nats, they are nats per unit of the step's
# size in the method's coordinates, or per unit squared.
LABELS = {
    "lambda_max": "λ_max, largest eigenvalue\nof the Hessian, nats",
    "preconditioned": "largest eigenvalue, preconditioned\nas AdamW does, nats",
    "modular_sharpness": "largest curvature\nin the modular norm, nats",
    "dual_norm": "dual norm of the gradient, nats",
    "gradient_norm": "length of the gradient, nats",
}
Margins = list[list[list[tuple[int, float]]]]  # of one method: [seed][size][time]


@dataclass(frozen=True)
class Study:
    """The runs of a study: every size of its lines, with every method and seed."""

    base: Config
    folder: Path
    lines: list[Line]
    rates: dict[str, float]  # of each method
    seeds: int
    quantity: str

    def jobs(self) -> list[runs.Job]:
        """Return the runs, the first seed of all methods and sizes first."""
        sizes = dict.fromkeys(size for line in self.lines for size in line.sizes)
        jobs = []
        for seed in range(self.seeds):
            for method, lr in self.rates.items():
                for size in sizes:
                    settings = {
                        **runs.METHODS[method],
                        **settings_at(self.base, size),
                        "optim.lr": lr,
                        "run.seed": seed,
                    }
                    name = self.path(method, size, seed).name
                    jobs.append(runs.job(self.base, name, self.folder, **settings))
        return jobs

    def path(self, method: str, size: Size, seed: int) -> Path:
        """Return the run folder of one training."""
        return self.folder / f"{method}.{run_name(size, self.rates[method], seed)}"

    def curves(self, line: Line) -> tuple[dict[str, Curves], list[str]]:
        """Return the curves of each method that has all of them, and what is left out."""
        curves: dict[str, Curves] = {}
        left_out = []
        for method in self.rates:
            by_seed = [
                [read_curve(self.path(method, z, s), self.quantity) for z in line.sizes]
                for s in range(self.seeds)
            ]
            whole = [[c for c in by_size if c] for by_size in by_seed]
            if all(len(by_size) == len(line.sizes) for by_size in whole):
                curves[method] = whole
            else:
                left_out.append(
                    f"{method}: left out over {line.axis},"
                    f" as a run diverged or has no {self.quantity}"
                )
        return curves, left_out

    def margins_of(self, line: Line, method: str) -> Margins:
        """Return how near each run of a method comes to its threshold of stability."""
        return [
            [margins(self.path(method, z, seed)) for z in line.sizes] for seed in range(self.seeds)
        ]


def read_methods(options: list[str]) -> dict[str, float]:
    """Return {method: lr} of ["dualized=4", …]. Raises StudyError for what is not METHOD=LR."""
    rates = {}
    for option in options:
        method, _, lr = option.partition("=")
        try:
            rates[method] = float(lr)
        except ValueError:
            rates[method] = math.nan
        if method not in runs.METHODS or not 0 < rates[method] < math.inf:
            raise runs.StudyError(
                "--methods",
                got=option,
                allowed=f"METHOD=LR, of {', '.join(runs.METHODS)}",
                fix="--methods dualized=4 ntk=8; studies.transfer finds the rates",
            )
    return rates


# ---- words


def spread_text(
    study: Study,
    line: Line,
    numbers: dict[str, dict[str, Interval | None]],
    compared: dict[str, dict[str, Interval | None]],
) -> str:
    """Return the spreads of one line for a reader, a row for each method."""
    rows = [
        f"{line}, {study.quantity}: standard deviation over {line.axis} of its logarithm,"
        f" averaged [95% over {study.seeds} seeds]",
        f"  {'method':<16} {'at equal steps':<26} {'at equal loss':<26} exponent of {line.axis}",
    ]
    rows += [
        f"  {method:<16} {n['steps']!s:<26} {n['losses']!s:<26} {n['drift']}"
        for method, n in numbers.items()
    ]
    rows += [
        f"  spread of {method} over that of dualized:"
        f" {r['steps']} at equal steps, {r['losses']} at equal loss"
        for method, r in compared.items()
    ]
    return "\n".join(rows)


def line_entry(
    study: Study,
    line: Line,
    numbers: dict[str, dict[str, Interval | None]],
    compared: dict[str, dict[str, Interval | None]],
) -> dict[str, Any]:
    """Return the entry of one line in results.json."""

    def plain(intervals: dict[str, Interval | None]) -> dict[str, Any]:
        return {k: i and vars(i) for k, i in intervals.items()}

    return {
        "line": str(line),
        "axis": line.axis,
        "sizes": line.values(),
        "quantity": study.quantity,
        **{method: plain(n) for method, n in numbers.items()},
        "ratios": {method: plain(r) for method, r in compared.items()},
    }


# ---- the picture


def plot(study: Study, line: Line, curves: dict[str, Curves], path: Path) -> None:
    """Draw a column for each method and a curve for each size, thin for further seeds.

    The rows: the quantity against steps, the quantity against loss, and the share of the method's
    own threshold of stability.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(curves) + 0.6, 9.5), layout="constrained")
    panels = figure.subplots(3, len(curves), squeeze=False)
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(line.sizes)))
    for (at_steps, at_losses, near), (method, by_seed) in zip(
        panels.T, curves.items(), strict=True
    ):
        shares = study.margins_of(line, method)
        for s, (size, colour) in enumerate(zip(line.values(), colours, strict=True)):
            for seed, by_size in enumerate(by_seed):
                style = {
                    "color": colour,
                    "alpha": 0.9 if seed == 0 else 0.35,
                    "linewidth": 1.4 if seed == 0 else 0.8,
                    "label": f"{line.axis} {size}" if seed == 0 else None,
                }
                c = by_size[s]
                at_steps.plot(c.steps, c.values, **style)
                at_losses.plot(c.losses, c.values, **style)
                near.plot(*zip(*shares[seed][s], strict=True), **style)
        at_steps.set(yscale="log", xlabel="training step", title=f"{method}, at equal steps")
        at_losses.set(yscale="log", xlabel="loss, nats per token", title=f"{method}, at equal loss")
        at_losses.invert_xaxis()
        near.axhline(1, color="black", linestyle="--", linewidth=1, label="unstable above")
        # Shares begin at 0 and AdamW's first ones are far above 1: both are seen.
        near.set_yscale("symlog", linthresh=0.1)
        near.yaxis.set_major_formatter("{x:g}")
        near.set(xlabel="training step", title=f"{method}, distance to instability")
        near.set_ylim(0, 1.3 * near.get_ylim()[1])
    for axes in panels.flatten():
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    share = "share of the threshold of stability"
    for axes, label in zip(panels[:, 0], (*(LABELS[study.quantity],) * 2, share), strict=True):
        axes.set_ylabel(label)
    figure.suptitle(f"Curvature during training on {study.base.data.dataset}\n{line}", fontsize=11)
    figure.supxlabel(
        "Bold: the first seed; thin: further seeds."
        " Loss and curvature are those of one fixed batch; loss falls to the right.",
        fontsize=8,
    )
    figure.savefig(path, dpi=120)


# ---- the command


def main(argv: list[str]) -> int:
    """Train, measure, compare and draw. Return the exit code."""
    options, settings = build_parser().parse_known_args(argv)
    base = configuration.load([options.config, *settings])
    base.train.sharpness_every = base.train.sharpness_every or max(1, base.train.steps // 10)
    rates = read_methods(options.methods)
    folder = Path(base.run.dir) / (options.name or f"sharpness-{Path(options.config).stem}")
    values = {a: getattr(options, x.option, []) for a, x in AXES.items()}
    lines = lines_through(base_size(base), values, grid=False)
    if not lines or options.seeds < 1:
        raise runs.StudyError(
            "python -m studies.sharpness",
            got=f"{len(lines)} axes, {options.seeds} seeds",
            allowed="1 or more",
            fix="--widths 64 128 256",
        )
    study = Study(base, folder, lines, rates, options.seeds, options.quantity)
    workers = runs.places(options.workers)
    if runs.sweep(study.jobs(), folder, workers=workers, dry_run=options.dry_run):
        report(study, argv)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the study's own options."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.sharpness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", help="the smallest model: configs/transfer.toml")
    for axis in ("width", "depth"):
        add(f"--{AXES[axis].option}", type=int, nargs="+", default=[], metavar="N")
    methods = ", ".join(runs.METHODS)
    add("--methods", nargs="+", default=["dualized=4"], metavar="METHOD=LR", help=methods)
    add("--seeds", type=int, default=2, help="of every run: 0 … seeds − 1")
    quantity = "of the records that training/sharpness.py describes"
    add("--quantity", default="lambda_max", choices=QUANTITIES, help=quantity)
    add("--name", help="of the folder, runs/NAME; by default sharpness-<config>")
    add("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time")
    add("--dry-run", action="store_true", help="the cost alone")
    return parser


def report(study: Study, argv: list[str]) -> None:
    """Compare the sizes of each line; write verdict.txt, results.json and pictures; print."""
    pictures: list[Path] = []
    entries = []
    texts = [f"{study.base.data.dataset}: python -m studies.sharpness {' '.join(argv)}"]
    for line in study.lines:
        curves, left_out = study.curves(line)
        texts += left_out
        if not curves:
            continue
        numbers = consistency(curves, line.values())
        others = [m for m in curves if m != "dualized"] if "dualized" in curves else []
        compared = {method: ratios(curves, "dualized", method) for method in others}
        texts.append(spread_text(study, line, numbers, compared))
        entries.append(line_entry(study, line, numbers, compared))
        pictures.append(study.folder / f"sharpness-{line.axis}.png")
        plot(study, line, curves, pictures[-1])
    text = "\n\n".join(texts)
    (study.folder / "verdict.txt").write_text(text + "\n", encoding="utf-8")
    summaries = [s for j in study.jobs() if (s := runs.summary(study.folder / j.name))]
    results = {"command": argv, "hardware": runs.machines(summaries), "lines": entries}
    runs.write_json(study.folder / "results.json", results)
    print(f"{text}\n\nresults: {file_of(study.folder)}")
    print("pictures: " + ", ".join(map(str, pictures)))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
