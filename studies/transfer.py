r"""Does the best learning rate stay where it is as the model grows? A sweep, judged.

    python -m studies.transfer configs/transfer.toml \
        --widths 64 128 256 --lrs 2.83 4 5.66 8 11.3 --seeds 2
    python -m studies.transfer configs/transfer.toml \
        --depths 2 4 8 --lrs 0.001 0.002 0.004 0.008 0.016 --method adamw
    python -m studies.transfer configs/transfer.toml \
        --batch-sizes 8 16 32 --batch-rule sqrt --lrs 2.83 4 5.66 8 11.3 --seeds 2
    python -m studies.transfer configs/transfer.toml --widths 64 256 --coordinates 10

Axes: --widths (model.n_embd, at the configuration's width of a head), --depths (model.n_layer),
--contexts (model.block_size, at its tokens a step), --batches (train.batch_size), --horizons
(train.steps). Each is varied alone, the others as in the configuration; --grid takes their product
and judges each line of it. Other options, --section.key value, go to every run as train_gpt.py
takes them. A run is judged by its validation loss at the end.

--batch-sizes varies the batch at the tokens of the configuration's run: train.steps falls as the
batch grows. --lrs are the rates of the configuration's batch, and --batch-rule carries them to
others, so that a drift is one from where the rule puts the best rate. Losses need not fall with the
batch: they are shown, not judged.

The folder runs/NAME has a run folder for each training, results.json, verdict.txt and
transfer.png. The same call again resumes where it stopped, and adds what new sizes, learning rates
or seeds ask for. --coordinates K is the fast check before: K steps at one learning rate, and how
the change of every layer's activations grows with width.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optim.errors import Refusal, require
from training import config as configuration
from training.config import Config
from training.half_lives import half_lives

from . import runs
from .coordinates import print_coordinates
from .evidence import file_of
from .intervals import Interval
from .sizes import (
    AXES,
    BATCH,
    BATCH_RULES,
    Line,
    Size,
    base_size,
    lines_through,
    run_name,
    settings_at,
    with_equal_tokens,
)
from .verdict import Thresholds, Verdict, VerdictError, judge

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VIEW = 0.8  # nats above the lowest loss that the picture's axis shows at most


@dataclass(frozen=True)
class Sweep:
    """The runs of a study: every size of its lines, at every learning rate, with its seeds.

    lrs: those of the batch of `base`, which batch_rule carries to others.
    """

    base: Config
    folder: Path
    lines: list[Line]
    lrs: list[float]
    seeds: dict[Size, int]
    batch_rule: str = "constant"

    def rate(self, size: Size, lr: float) -> float:
        """Return the learning rate at a size, as the rule carries it from the batch of `base`."""
        return lr * BATCH_RULES[self.batch_rule](size[BATCH] / self.base.train.batch_size)

    def jobs(self) -> list[runs.Job]:
        """Return the runs; a size that two lines share runs once."""
        jobs = []
        for size, seeds in self.seeds.items():
            for seed, lr in itertools.product(range(seeds), self.lrs):
                rate = self.rate(size, lr)
                settings = settings_at(self.base, size) | {"optim.lr": rate, "run.seed": seed}
                name = run_name(size, rate, seed)
                jobs.append(runs.job(self.base, name, self.folder, **settings))
        return jobs

    def losses(self, line: Line) -> np.ndarray:
        """Return (sizes, learning rates, seeds): inf where a run diverged, NaN where none is."""
        most = max(self.seeds[size] for size in line.sizes)
        losses = np.full((len(line.sizes), len(self.lrs), most), np.nan)
        for (i, size), (k, lr) in itertools.product(enumerate(line.sizes), enumerate(self.lrs)):
            for seed in range(self.seeds[size]):
                name = run_name(size, self.rate(size, lr), seed)
                losses[i, k, seed] = runs.final_loss(self.folder / name)
        return losses


@dataclass(frozen=True)
class JudgedLine:
    """A line, its losses (sizes, learning rates, seeds), and what they say."""

    line: Line
    losses: np.ndarray
    verdict: Verdict

    def json(self) -> dict[str, Any]:
        """Return the line's entry of results.json."""
        losses = [[[_written(x) for x in cell] for cell in row] for row in self.losses.tolist()]
        return {
            "line": str(self.line),
            "axis": self.line.axis,
            "losses": losses,
            **self.verdict.json(),
        }


def _written(x: float) -> float | str | None:
    """Return a loss as results.json has it: null where there is no run."""
    return "diverged" if math.isinf(x) else None if math.isnan(x) else x


# ---- words


def batch_text(sweep: Sweep) -> str:
    """Return what a study over batch sizes keeps as the batch changes, in two lines."""
    batch, rule = sweep.base.train.batch_size, sweep.batch_rule
    carried = "at every batch" if rule == "constant" else f"times {rule}(batch / {batch})"
    return (
        f"learning rates: those of batch {batch}, {carried}\n"
        f"averages kept in tokens: {', '.join(half_lives(sweep.base)) or 'none'}"
    )


def loss_table(losses: np.ndarray, line: Line, lrs: list[float]) -> str:
    """Return the mean losses over seeds, a row for each size."""
    header = f"{line.axis:>9}" + "".join(f"{f'lr {lr:g}':>12}" for lr in lrs)
    rows = [
        f"{value:9d}" + "".join(f"{x:12.4f}" for x in row)
        for value, row in zip(line.values(), np.nanmean(losses, 2), strict=True)
    ]
    return "\n".join([header, *rows])


def verdict_text(line: Line, verdict: Verdict, thresholds: Thresholds) -> str:
    """Return the verdict on one line for a reader: a row for each size, a word for each rule."""
    v = verdict
    out = [
        f"{line}: {v.word}",
        f"{line.axis:>9}  {'best lr [95%]':<26} {'loss at it':<11} {'drift, octaves':<24}"
        " cost of the first's lr     against the one before",
    ]
    for s, size in enumerate(line.values()):
        row = f"{size:9d}  {v.best[s]!s:<26} {v.loss[s]:<11.4f}"
        if s:
            cost, worse = _percent(v.cost[s - 1]), _percent(v.worse[s - 1])
            row += f" {v.drift[s - 1]!s:<24} {cost:<26} {worse}"
        out.append(row + ("" if v.bracketed[s] else "  not bracketed"))
    out += [
        f"  drift of the best lr at most {thresholds.drift:g} octaves: {v.words['drift']}",
        f"  the first's best lr costs the largest at most {thresholds.cost:.2%} of loss:"
        f" {v.words['cost']}",
        "  against the one before: not judged, as nothing says that losses fall"
        if thresholds.worse is None
        else f"  larger is not worse at that lr (by more than {thresholds.worse:.2%}):"
        f" {v.words['worse']}",
    ]
    if v.noise:
        out.append(
            f"  noise of one run: {v.noise.residual:.4f} within a size,"
            f" {v.noise.seed:.4f} of its seed; {v.seeds} seeds, {v.noise.df} degrees of freedom"
        )
    notes = list(v.notes)
    if max(b / a for a, b in pairwise(v.lrs)) > 1.6:
        notes.append(
            "rates an octave apart: a parabola through three is drawn to a steep side;"
            " half octaves tell costs under 1%"
        )
    return "\n".join([*out, *(f"  note: {n}" for n in notes)])


def _percent(i: Interval) -> str:
    return f"{i.value:+.2%} [{i.low:+.2%}, {i.high:+.2%}]"


# ---- the picture


def plot(judged: list[JudgedLine], lrs: list[float], title: str, path: Path) -> None:
    """Draw loss against learning rate: a panel for each line, a curve for each of its sizes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(judged), 5), layout="constrained")
    panels = figure.subplots(1, len(judged), squeeze=False)
    for axes, entry in zip(panels[0], judged, strict=True):
        plot_line(axes, entry, lrs)
    figure.suptitle(f"Loss against learning rate: {title}", fontsize=11)
    figure.savefig(path, dpi=120)


def plot_line(axes: Axes, judged: JudgedLine, lrs: list[float]) -> None:
    """Draw the curves of one line, and a legend of its sizes and markers."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    line, verdict = judged.line, judged.verdict
    losses = np.where(np.isinf(judged.losses), np.nan, judged.losses)  # (sizes, lrs, seeds)
    lowest = min(np.nanmin(losses), *verdict.loss)
    top = min(np.nanmax(losses), lowest + VIEW)
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(line.sizes)))
    used = {".": "one seed; a curve is their mean", "D": "best rate, by the fitted parabola"}
    for s, (value, colour) in enumerate(zip(line.values(), colours, strict=True)):
        means = np.where(np.isinf(judged.losses[s]).any(1), np.nan, np.nanmean(judged.losses[s], 1))
        axes.plot(lrs, means, color=colour, label=f"{line.axis} {value}")
        seeds = losses.shape[2]
        dots = {"color": colour, "alpha": 0.5, "markersize": 5}
        axes.plot(np.repeat(lrs, seeds), losses[s].ravel(), ".", **dots)
        best = {"color": colour, "markeredgecolor": "black", "markersize": 7, "zorder": 3}
        axes.plot(verdict.best[s].value, verdict.loss[s], "D", **best)
        for marker, meaning, cells in (
            ("x", "a run diverged", np.isinf(judged.losses[s])),
            ("^", "a loss above this axis", losses[s] > top),
        ):
            rates = np.array(lrs)[cells.any(1)]
            if len(rates):
                used[marker] = meaning
                heights = np.full(len(rates), 0.97 - 0.04 * s)  # of the panel: sizes side by side
                at_edge = axes.get_xaxis_transform()
                axes.plot(rates, heights, marker, color=colour, transform=at_edge)
    axes.set(
        xscale="log",
        xlabel="learning rate (log scale)",
        ylabel="validation loss at the end, nats per token",
        title=f"transfer over {line.axis}: {verdict.word}",
    )
    axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs], minor=False)
    axes.minorticks_off()
    margin = 0.05 * (top - lowest) + 0.01
    axes.set_ylim(lowest - margin, top + margin)
    axes.grid(alpha=0.3)
    handles = axes.get_legend_handles_labels()[0]
    handles += [
        Line2D([], [], color="0.4", marker=marker, linestyle="", label=meaning)
        for marker, meaning in used.items()
    ]
    axes.legend(handles=handles, fontsize=8)


# ---- the command


def main(argv: list[str]) -> int:
    """Sweep, judge and draw, or do the coordinate check. Return the exit code."""
    options, settings = build_parser().parse_known_args(argv)
    base = configuration.load([options.config, *settings])
    method = options.method or base.optim.name
    folder = Path(base.run.dir) / (options.name or f"transfer-{Path(options.config).stem}-{method}")
    if options.method:
        kept = half_lives(base)  # rather than the decays of the method
        changes = {k: v for k, v in runs.METHODS[options.method].items() if k not in kept}
        base = runs.job(base, "base", folder, **changes).config
    check_options(options)
    if options.coordinates is not None:
        widths = sorted(set(options.widths))
        return print_coordinates(base, folder, widths, options.coordinates, options.workers)
    sweep = plan(options, base, folder)
    workers = runs.places(options.workers)
    if not runs.sweep(sweep.jobs(), folder, workers=workers, dry_run=options.dry_run):
        return 0
    report(sweep, options, argv, title=f"{method}, {base.data.dataset}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the study's own options."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", help="the smallest model: configs/transfer.toml")
    for axis in AXES.values():
        add(f"--{axis.option}", type=int, nargs="+", default=[], metavar="N")
    tokens = "the batch, at the tokens of the configuration's run"
    add("--batch-sizes", type=int, nargs="+", default=[], metavar="N", help=tokens)
    rule = "of the learning rate over --batch-sizes, by default constant"
    add("--batch-rule", choices=BATCH_RULES, default="constant", help=rule)
    lrs = "3 or more, half an octave apart, with the best one inside"
    add("--lrs", type=float, nargs="+", default=[], metavar="LR", help=lrs)
    add("--seeds", type=int, default=2, help="of every cell: 0 … seeds − 1")
    first = (
        "of the smallest size of each axis, which is cheap and which all others are compared with"
    )
    add("--first-seeds", type=int, help=first)
    add("--grid", action="store_true", help="the product of all axes")
    methods = (
        "an optimizer with its parametrization and initialization; by default the configuration's"
    )
    add("--method", choices=runs.METHODS, help=methods)
    add("--name", help="of the folder, runs/NAME; by default transfer-<config>-<method>")
    workers = "runs at a time; run.threads of each is the configuration's"
    add("--workers", type=int, default=os.cpu_count() or 1, help=workers)
    add("--dry-run", action="store_true", help="the cost alone")
    check = "the coordinate check over --widths, after K steps, instead"
    add("--coordinates", type=int, metavar="K", help=check)
    for key, value in vars(Thresholds()).items():
        add(f"--max-{key}", type=float, default=value, help=f"threshold, by default {value:g}")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise StudyError for a number below 1, and for options that exclude each other."""
    require(
        options.seeds >= 1 and options.workers >= 1,
        "--seeds, --workers",
        got=f"{options.seeds}, {options.workers}",
        allowed="1 or more",
        fix="leave them out",
        error=runs.StudyError,
    )
    require(
        options.coordinates is None or options.coordinates >= 1,
        "--coordinates",
        got=options.coordinates,
        allowed="1 step or more",
        fix="--coordinates 10",
        error=runs.StudyError,
    )
    require(
        not (options.batches and options.batch_sizes),
        "--batches, --batch-sizes",
        got="both",
        allowed="one: the batch at the configuration's steps, or at its tokens",
        fix="leave one out",
        error=runs.StudyError,
    )
    require(
        options.batch_sizes or options.batch_rule == "constant",
        "--batch-rule",
        got=f"{options.batch_rule} without --batch-sizes",
        allowed="constant",
        fix="--batch-sizes 8 16 32",
        error=runs.StudyError,
    )


def plan(options: argparse.Namespace, base: Config, folder: Path) -> Sweep:
    """Return the sweep that the options ask for. Raises StudyError for too few sizes or rates."""
    lrs = sorted(set(options.lrs))
    values = {a: getattr(options, axis.option) for a, axis in AXES.items()}
    values["batch"] = options.batch_sizes or values["batch"]
    configured = base_size(base)
    lines = lines_through(configured, values, grid=options.grid)
    if options.batch_sizes:
        lines = [with_equal_tokens(line, configured) for line in lines]
    if not lines or len(lrs) < 3 or lrs[0] <= 0:
        raise runs.StudyError(
            f"python -m studies.transfer {options.config}",
            got=f"{len(lines)} axes with two sizes or more,"
            f" --lrs {' '.join(f'{lr:g}' for lr in lrs)}",
            allowed="one or more, and 3 or more learning rates above 0",
            fix="--widths 64 128 256 --lrs 2.83 4 5.66 8 11.3",
        )
    smallest = {line.sizes[0] for line in lines}
    first_seeds = max(options.seeds, options.first_seeds or 0)
    seeds = {
        size: first_seeds if size in smallest else options.seeds
        for line in lines
        for size in line.sizes
    }
    return Sweep(base, folder, lines, lrs, seeds, options.batch_rule)


def report(sweep: Sweep, options: argparse.Namespace, argv: list[str], *, title: str) -> None:
    """Judge each line; write verdict.txt, results.json and transfer.png; print the verdicts."""
    thresholds = Thresholds(options.max_drift, options.max_cost, options.max_worse)
    judged: list[JudgedLine] = []
    texts = [f"{title}: python -m studies.transfer {' '.join(argv)}"]
    if options.batch_sizes:
        title = f"{title}\n{batch_text(sweep)}"
        texts.append(batch_text(sweep))
    for line in sweep.lines:
        claims = replace(thresholds, worse=None) if line.at_equal_tokens else thresholds
        losses = sweep.losses(line)
        means = loss_table(losses, line, sweep.lrs)
        try:
            verdict = judge(losses, line.values(), sweep.lrs, claims)
        except VerdictError as error:
            texts.append(f"{means}\n\n{line}: no verdict\n{error}")
            continue
        judged.append(JudgedLine(line, losses, verdict))
        texts.append(f"{means}\n\n{verdict_text(line, verdict, claims)}")
    text, picture = "\n\n".join(texts), sweep.folder / "transfer.png"
    (sweep.folder / "verdict.txt").write_text(text + "\n", encoding="utf-8")
    entries = [entry.json() for entry in judged]
    summaries = [s for j in sweep.jobs() if (s := runs.summary(sweep.folder / j.name))]
    results = {
        "command": argv,
        "thresholds": vars(thresholds),
        "hardware": runs.machines(summaries),
        "lines": entries,
    }
    if options.batch_sizes:
        batch = sweep.base.train.batch_size
        results |= {"batch_rule": {"rule": sweep.batch_rule, "from_batch": batch}}
    runs.write_json(sweep.folder / "results.json", results)
    print(f"{text}\n\nresults: {file_of(sweep.folder)}")
    if judged:
        plot(judged, sweep.lrs, title, picture)
        print(f"picture: {picture}")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
