"""Does the best learning rate stay where it is as the model grows? A sweep over sizes and learning rates, judged.

    python -m studies.transfer configs/transfer.toml --widths 64 128 256 --lrs 2.83 4 5.66 8 11.3 --seeds 2
    python -m studies.transfer configs/transfer.toml --depths 2 4 8 --lrs 0.001 0.002 0.004 0.008 0.016 --method adamw
    python -m studies.transfer configs/transfer.toml --widths 64 256 --coordinates 10

Axes: --widths (model.n_embd, at the configuration's width of a head), --depths (model.n_layer), --contexts (model.block_size, at its tokens a step), --batches
(train.batch_size), --horizons (train.steps). Each is varied alone, the others as in the configuration; --grid takes their product, and judges each line of it. Other
options, --section.key value, go to every run as train_gpt.py takes them. Loss: of validation, at the end of a run.

The folder runs/NAME has a run folder for each training, results.json, verdict.txt and transfer.png. The same call again goes on where it stopped, and adds what
new sizes, learning rates or seeds ask for. --coordinates K: the fast check before; K steps at one learning rate, and how the change of every layer's
activations grows with width.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.loader import Dataset, validation_batches
from data.shards import DataError
from model import GPT
from models import build_model_and_norm
from training import checkpoint
from training import config as configuration
from training.config import Config, ConfigError
from training.runtime import RunError

from . import runs
from .verdict import Thresholds, Verdict, VerdictError, judge


@dataclass(frozen=True)
class Axis:
    """key: what --<option> varies. letter: in run names."""

    option: str
    key: str
    letter: str


AXES = {
    "width": Axis("widths", "model.n_embd", "w"),
    "depth": Axis("depths", "model.n_layer", "d"),
    "context": Axis("contexts", "model.block_size", "t"),
    "batch": Axis("batches", "train.batch_size", "b"),
    "horizon": Axis("horizons", "train.steps", "n"),
}
Size = tuple[int, ...]  # a value of each axis, in this order


def sized(base: Config, size: Size) -> dict[str, Any]:
    """What differs from `base` at this size."""
    width, depth, context, batch, steps = size
    tokens, head = base.model.block_size * batch, base.model.n_embd // base.model.n_head
    for what, value, divisor in (("--widths", width, head), ("--contexts", tokens, context)):
        if value % divisor:
            got = f"{width}" if what == "--widths" else f"{context}"
            allowed = (
                f"a multiple of {head}, the width of a head"
                if what == "--widths"
                else f"a divisor of {tokens}, the tokens of a step"
            )
            raise runs.StudyError(
                what, got=got, allowed=allowed, fix="other sizes, or another configuration"
            )
    return {
        "model.n_embd": width,
        "model.n_head": width // head,
        "model.n_layer": depth,
        "model.block_size": context,
        "train.batch_size": tokens // context,
        "train.steps": steps,
    }


def name_of(size: Size, lr: float, seed: int) -> str:
    sizes = ".".join(
        f"{axis.letter}{value}" for axis, value in zip(AXES.values(), size, strict=True)
    )
    return f"{sizes}.lr{lr:g}.s{seed}".replace("+", "")


@dataclass(frozen=True)
class Line:
    """Sizes that differ along one axis."""

    axis: str
    sizes: tuple[Size, ...]

    def values(self) -> list[int]:
        return [size[list(AXES).index(self.axis)] for size in self.sizes]

    def __str__(self) -> str:
        values = self.values()
        fixed = [f"{a} {v}" for a, v in zip(AXES, self.sizes[0], strict=True) if a != self.axis]
        return f"{self.axis} {values[0]} … {values[-1]} ({', '.join(fixed)})"


def lines(base: Size, wanted: dict[str, list[int]], *, grid: bool) -> list[Line]:
    """One line for each axis with two values or more; with grid, one for each combination of the others' values."""
    found = []
    for i, axis in enumerate(AXES):
        values = sorted(set(wanted[axis]))
        if len(values) < 2:
            continue
        # An axis with one value sets it for all.
        others = [
            [base[j]]
            if j == i
            else sorted(set(wanted[a]))
            if wanted[a] and (grid or len(wanted[a]) == 1)
            else [base[j]]
            for j, a in enumerate(AXES)
        ]
        for size in itertools.product(*others):
            found.append(Line(axis, tuple((*size[:i], v, *size[i + 1 :]) for v in values)))
    return found


def table(losses: np.ndarray, line: Line, lrs: list[float]) -> str:
    """Mean loss over seeds, a row for each size."""
    head = f"{line.axis:>9}" + "".join(f"{f'lr {lr:g}':>12}" for lr in lrs)
    rows = [
        f"{v:9d}" + "".join(f"{x:12.4f}" for x in row)
        for v, row in zip(line.values(), np.nanmean(losses, 2), strict=True)
    ]
    return "\n".join([head, *rows])


def text(line: Line, verdict: Verdict, thresholds: Thresholds) -> str:
    """What a reader is told of one line."""
    v = verdict
    out = [
        f"{line}: {v.word}",
        f"{line.axis:>9}  {'best lr [95%]':<26} {'loss at it':<11} drift, octaves           cost of the first's lr     against the one before",
    ]
    for s, size in enumerate(line.values()):
        row = f"{size:9d}  {v.best[s]!s:<26} {v.loss[s]:<11.4f}"
        if s:
            row += (
                f" {v.drift[s - 1]!s:<24} {_percent(v.cost[s - 1]):<26} {_percent(v.worse[s - 1])}"
            )
        out.append(row + ("" if v.bracketed[s] else "  not bracketed"))
    out += [
        f"  drift of the best lr at most {thresholds.drift:g} octaves: {v.words['drift']}",
        f"  the first's best lr costs the largest at most {thresholds.cost:.2%} of loss: {v.words['cost']}",
        f"  larger is not worse at that lr (by more than {thresholds.worse:.2%}): {v.words['worse']}",
    ]
    if v.noise:
        out.append(
            f"  noise of one run: {v.noise.residual:.4f} within a size, {v.noise.seed:.4f} of its seed; {v.seeds} seeds, {v.noise.df} degrees of freedom"
        )
    coarse = [
        "rates an octave apart: a parabola through three is drawn to a steep side; half octaves tell costs under 1%"
    ]
    notes = [*v.notes, *(coarse if max(b / a for a, b in pairwise(v.lrs)) > 1.6 else ())]
    return "\n".join([*out, *(f"  note: {n}" for n in notes)])


def _percent(i: Any) -> str:
    return f"{i.value:+.2%} [{i.low:+.2%}, {i.high:+.2%}]"


def plot(
    found: list[tuple[Line, np.ndarray, Verdict]], lrs: list[float], title: str, path: Path
) -> None:
    """Loss against learning rate, one curve for each size, one panel for each line: dots are seeds, a cross is the parabola's minimum."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(found), 4.2), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)
    for axes, (line, losses, verdict) in zip(panels[0], found, strict=True):
        colours = colormaps["viridis"](np.linspace(0, 0.9, len(line.sizes)))
        finite = losses[np.isfinite(losses)]
        for s, (value, colour) in enumerate(zip(line.values(), colours, strict=True)):
            y, mean = np.where(np.isfinite(losses[s]), losses[s], np.nan), np.nanmean(losses[s], 1)
            axes.plot(
                lrs,
                np.where(np.isfinite(mean), mean, np.nan),
                color=colour,
                label=f"{line.axis} {value}",
            )
            axes.plot(
                np.repeat(lrs, y.shape[1]), y.ravel(), ".", color=colour, alpha=0.5, markersize=4
            )
            axes.plot(verdict.best[s].value, verdict.loss[s], "x", color=colour)
        low = finite.min()
        axes.set(
            xscale="log",
            xlabel="learning rate",
            ylabel="validation loss, nats per token",
            title=f"{line.axis}: {verdict.word}",
        )
        axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs], minor=False)
        axes.minorticks_off()
        axes.set_ylim(low - 0.02, min(finite.max(), low + 0.8) + 0.02)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


# ---- the coordinate check


def coordinate_check(
    base: Config, folder: Path, widths: list[int], steps: int, workers: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """({layer: rms of the change of its output after `steps` steps, at each width}, {layer: slope of log change against log width}).

    Layers: the residual stream after the embedding and after each block, and the logits, of one fixed batch. A slope of 0 is transfer's condition
    (Yang et al., arXiv 2203.03466, Appendix D).
    """
    jobs = []
    size = base_size(base)
    for width in widths:
        changes = sized(base, (width, *size[1:])) | {
            "train.keep_checkpoints": 1,
            "train.checkpoint_every": 0,
        }
        # The schedule's first steps, not a schedule of so few steps.
        changes |= {
            "train.steps": steps,
            "schedule.cooldown": 0.0,
            "train.eval_tokens": base.train.eval_batch_size * base.model.block_size,
        }
        jobs.append(runs.job(base, f"coordinates.w{width}.n{steps}", folder, **changes))
    runs.execute(jobs, folder, workers=runs.places(workers), costs=[float(w) for w in widths])
    changes_of: dict[str, list[float]] = {}
    idx_BT, _ = next(
        validation_batches(
            Dataset(base.data).split("val"), block_size=base.model.block_size, batch_size=16
        )
    )
    for job in jobs:
        newest = checkpoint.newest_whole(folder / job.name / "checkpoints")[0]
        if newest is None:
            raise runs.StudyError(
                job.name,
                got="no checkpoint",
                allowed="a run that ended",
                fix=f"a smaller --optim.lr; see {folder}/configs/{job.name}.log",
            )
        config = configuration.from_dict(Config, checkpoint.read_state(newest)["config"])
        generator = torch.Generator().manual_seed(config.run.seed)
        model, _ = build_model_and_norm(config, generator)
        before = _activations(model, idx_BT)  # as train_gpt.py begins
        checkpoint.load_model(newest, model)
        for key, x in _activations(model, idx_BT).items():
            changes_of.setdefault(key, []).append((x - before[key]).square().mean().sqrt().item())
    x = np.log2(widths)
    return changes_of, {
        k: float(np.polyfit(x, np.log2(v), 1)[0]) if min(v) > 0 else math.nan
        for k, v in changes_of.items()
    }


def _activations(model: GPT, idx_BT: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            found[name] = output

        return hook

    watched = {"embedding": model.embedding} | {
        f"block {i}": block for i, block in enumerate(model.blocks)
    }
    hooks = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    with torch.no_grad():
        found["logits"] = model.eval()(idx_BT)[0]
    for hook in hooks:
        hook.remove()
    return found


def base_size(base: Config) -> Size:
    c, t = base.model, base.train
    return c.n_embd, c.n_layer, c.block_size, t.batch_size, t.steps


# ---- the command


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m studies.transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", help="the smallest model: configs/transfer.toml")
    for axis in AXES.values():
        parser.add_argument(f"--{axis.option}", type=int, nargs="+", default=[], metavar="N")
    parser.add_argument(
        "--lrs",
        type=float,
        nargs="+",
        default=[],
        metavar="LR",
        help="3 or more, half an octave apart, with the best one inside",
    )
    parser.add_argument("--seeds", type=int, default=2, help="of every cell: 0 … seeds − 1")
    parser.add_argument(
        "--first-seeds",
        type=int,
        help="of the smallest size of each axis, which is cheap and which all others are compared with",
    )
    parser.add_argument("--grid", action="store_true", help="the product of all axes")
    parser.add_argument(
        "--method",
        choices=runs.METHODS,
        help="an optimizer with its parametrization and initialization; the configuration's if left out",
    )
    parser.add_argument(
        "--name", help="of the folder, runs/NAME; transfer-<config>-<method> if left out"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="runs at a time; run.threads of each is the configuration's",
    )
    parser.add_argument("--dry-run", action="store_true", help="the cost alone")
    parser.add_argument(
        "--coordinates",
        type=int,
        metavar="K",
        help="the coordinate check over --widths, after K steps, instead",
    )
    for key, value in vars(Thresholds()).items():
        parser.add_argument(
            f"--max-{key}", type=float, default=value, help=f"threshold, {value:g} if left out"
        )
    options, rest = parser.parse_known_args(argv)
    base = configuration.load([options.config, *rest])
    method = options.method or base.optim.name
    folder = Path(base.run.dir) / (options.name or f"transfer-{Path(options.config).stem}-{method}")
    if options.method:
        base = runs.job(base, "base", folder, **runs.METHODS[options.method]).config
    thresholds = Thresholds(options.max_drift, options.max_cost, options.max_worse)
    if options.seeds < 1 or options.workers < 1:
        raise runs.StudyError(
            "--seeds, --workers",
            got=f"{options.seeds}, {options.workers}",
            allowed="1 or more",
            fix="leave them out",
        )
    if options.coordinates is not None:
        if options.coordinates < 1:
            raise runs.StudyError(
                "--coordinates",
                got=options.coordinates,
                allowed="1 step or more",
                fix="--coordinates 10",
            )
        return print_coordinates(
            base, folder, sorted(set(options.widths)), options.coordinates, options.workers
        )
    lrs = sorted(set(options.lrs))
    found = lines(
        base_size(base),
        {a: getattr(options, axis.option) for a, axis in AXES.items()},
        grid=options.grid,
    )
    if not found or len(lrs) < 3 or lrs[0] <= 0:
        raise runs.StudyError(
            f"python -m studies.transfer {options.config}",
            got=f"{len(found)} axes with two sizes or more, --lrs {' '.join(f'{lr:g}' for lr in lrs)}",
            allowed="one or more, and 3 or more learning rates above 0",
            fix="--widths 64 128 256 --lrs 2.83 4 5.66 8 11.3",
        )
    jobs = []
    sizes = dict.fromkeys(size for line in found for size in line.sizes)
    first = {line.sizes[0] for line in found}
    seeds = {
        size: max(options.seeds, options.first_seeds or 0) if size in first else options.seeds
        for size in sizes
    }
    for size in sizes:
        for seed in range(seeds[size]):
            for lr in lrs:
                jobs.append(
                    runs.job(
                        base,
                        name_of(size, lr, seed),
                        folder,
                        **sized(base, size),
                        **{"optim.lr": lr, "run.seed": seed},
                    )
                )
    if not runs.sweep(jobs, folder, workers=runs.places(options.workers), dry_run=options.dry_run):
        return 0
    report = []
    title = f"{method}, {base.data.dataset}"
    texts = [f"{title}: python -m studies.transfer {' '.join(argv)}"]
    for line in found:
        most = max(seeds[z] for z in line.sizes)
        losses = np.full((len(line.sizes), len(lrs), most), np.nan)
        for (i, z), (k, lr) in itertools.product(enumerate(line.sizes), enumerate(lrs)):
            losses[i, k, : seeds[z]] = [
                loss(folder / name_of(z, lr, seed)) for seed in range(seeds[z])
            ]
        try:
            verdict = judge(losses, line.values(), lrs, thresholds)
        except VerdictError as error:
            texts.append(f"{table(losses, line, lrs)}\n\n{line}: no verdict\n{error}")
            continue
        report.append((line, losses, verdict))
        texts.append(f"{table(losses, line, lrs)}\n\n{text(line, verdict, thresholds)}")
    (folder / "verdict.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    results = [
        {
            "line": str(line),
            "axis": line.axis,
            "losses": [[[_told(x) for x in cell] for cell in row] for row in losses.tolist()],
            **verdict.json(),
        }
        for line, losses, verdict in report
    ]
    runs.write_json(
        folder / "results.json", {"command": argv, "thresholds": vars(thresholds), "lines": results}
    )
    if report:
        plot(report, lrs, title, folder / "transfer.png")
    print("\n\n".join(texts))
    if report:
        print(f"\npicture: {folder / 'transfer.png'}")
    return 0


def _told(x: float) -> float | str | None:
    """A loss in results.json: null where there is no run."""
    return "diverged" if math.isinf(x) else None if math.isnan(x) else x


def loss(path: Path) -> float:
    """Of validation at the end; inf of a run that diverged."""
    found = runs.summary(path)
    return math.inf if found is None else found["val_loss"]


def print_coordinates(
    base: Config, folder: Path, widths: list[int], steps: int, workers: int
) -> int:
    if len(widths) < 2:
        raise runs.StudyError(
            "--coordinates",
            got="fewer than 2 --widths",
            allowed="2 or more",
            fix="--widths 64 128 256",
        )
    changes, slopes = coordinate_check(base, folder, widths, steps, workers)
    print(
        f"rms of the change of activations after {steps} steps, lr {base.optim.lr:g}, {base.optim.name}"
    )
    print(f"{'':12}" + "".join(f"{f'width {w}':>12}" for w in widths) + f"{'slope':>10}")
    for key, values in changes.items():
        print(f"{key:12}" + "".join(f"{v:12.4f}" for v in values) + f"{slopes[key]:10.3f}")
    worst = max(slopes, key=lambda k: abs(slopes[k]))
    print(
        f"largest slope of log change against log width: {slopes[worst]:+.3f} ({worst}); 0 is independence of width"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (
        ConfigError,
        DataError,
        RunError,
        checkpoint.CheckpointError,
        runs.StudyError,
        VerdictError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
