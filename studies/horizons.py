r"""Does an advantage last as training grows longer? Entries at several horizons, paired by seed.

    python -m studies.horizons ours.toml muon.toml --against muon --horizons 100 400 1600 \
        --tuned-at 400 --lr-power 0.3 --seeds 5 --first-seed 100 --train.batch-size 8

An entry is a configuration, named by its file, as in studies.speedrun. Each is trained with its
whole schedule at every horizon and seed. All entries have the same seeds. optim.lr is the
configuration's at the horizon of --tuned-at, and is carried to the others by one rule for all:
lr · (tuned-at / horizon)^power. Other options, --section.key value, change every entry, as
train_gpt.py takes them.

The folder runs/NAME has a run folder for each training, results.json and horizons.png.
The same call again resumes where it stopped. docs/speedrun.md defines each figure.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optim.errors import Refusal, require
from optim.receipt import aligned

from . import runs, statistics
from .power_law import HORIZONS, ratios
from .report.palette import LIGHT, MARKERS, dash, marker
from .speedrun.entries import Entry, load, spelled
from .speedrun.tables import bounded
from .statistics import Array

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """The runs of a study: every entry at every horizon, with every seed."""

    folder: Path
    entries: list[Entry]
    reference: Entry
    """The entry that the others are compared with."""
    horizons: list[int]
    seeds: list[int]
    tuned_at: int
    """The horizon of the configurations' learning rates."""
    lr_power: float

    def lr(self, entry: Entry, steps: int) -> float:
        """Return the learning rate of an entry at a horizon."""
        return float(entry.config.optim.lr) * (self.tuned_at / steps) ** self.lr_power

    def jobs(self) -> list[runs.Job]:
        """Return all runs."""
        return [
            e.judged_job(h, s, self.folder, **{"optim.lr": self.lr(e, h)})
            for e in self.entries
            for h in self.horizons
            for s in self.seeds
        ]

    def losses(self, entry: Entry) -> Array:
        """Return an entry's end losses (seeds, horizons); infinite where a run diverged."""
        paths = [[self.folder / entry.run_name(h, s) for h in self.horizons] for s in self.seeds]
        return np.array([[runs.final_loss(path) for path in row] for row in paths])

    def summaries(self, entry: Entry, steps: int) -> list[dict[str, Any]]:
        """Return the summaries of an entry's runs at a horizon, without those that diverged."""
        paths = (self.folder / entry.run_name(steps, s) for s in self.seeds)
        return [s for path in paths if (s := runs.summary(path))]


# ---- results


def log_seconds_ratio(ours: Sequence[Json], theirs: Sequence[Json]) -> Array | None:
    """Return logarithms (n,) of the ratio of training seconds of runs, paired by seed.

    They are None unless all of them ended on one known machine.
    """
    machines = {s.get("hardware") for s in [*ours, *theirs]}
    if len(ours) != len(theirs) or len(machines) != 1 or None in machines:
        return None
    seconds = [[s["train_seconds"] for s in summaries] for summaries in (ours, theirs)]
    return np.log(seconds[0]) - np.log(seconds[1])


def results(study: Study, *, about: Json) -> dict[str, Any]:
    """Return results.json. about: what is known before the first run."""
    reference = study.losses(study.reference)
    summaries = [s for e in study.entries for h in study.horizons for s in study.summaries(e, h)]
    return {
        **about,
        "against": study.reference.name,
        "horizons": study.horizons,
        "seeds": study.seeds,
        "tuned_at": study.tuned_at,
        "lr_power": study.lr_power,
        "hardware": runs.machines(summaries),
        "versions": runs.versions(summaries),
        "entries": [_entry(study, e, reference) for e in study.entries],
    }


def _entry(study: Study, entry: Entry, reference: Array) -> dict[str, Any]:
    """Return what results.json holds of an entry. reference: losses (n, K)."""
    losses, compared = study.losses(entry), entry is not study.reference
    rows = []
    for k, steps in enumerate(study.horizons):
        values = losses[:, k].tolist()
        row = {
            "steps": steps,
            "lr": study.lr(entry, steps),
            "losses": values,
            "loss": statistics.mean_interval(values).json("mean"),
        }
        rows.append(row | (_comparison(study, entry, k, losses, reference) if compared else {}))
    return {
        "name": entry.name,
        "config_path": entry.path,
        "horizons": rows,
        "claim": claim(entry.name, study.reference.name, rows) if compared else None,
        "note": "; ".join(entry.notes),
    }


def _comparison(
    study: Study, entry: Entry, k: int, losses: Array, reference: Array
) -> dict[str, Any]:
    """Compare an entry with the reference at horizon k by their losses (n, K)."""
    steps, theirs = study.horizons[k], reference[:, k]
    difference, p = statistics.paired(theirs.tolist(), losses[:, k].tolist())
    timed = log_seconds_ratio(*(study.summaries(e, steps) for e in (entry, study.reference)))
    log_seconds = np.zeros(len(losses)) if timed is None else timed
    ratio = ratios(study.horizons, losses, theirs, log_seconds, steps)
    return {
        "difference": {**difference.json("mean"), "p": p},
        "steps_ratio": ratio and ratio.steps.json("value") | {"extrapolated": ratio.extrapolated},
        "seconds_ratio": ratio.seconds.json("value") if ratio and timed is not None else None,
    }


def claim(name: str, reference: str, rows: Sequence[Json]) -> str:
    """Return in words up to which horizon the whole interval of the steps ratio is below 1.

    rows: of the entry's horizons, ascending.
    """
    holds = [bool(row["steps_ratio"]) and row["steps_ratio"]["high"] < 1 for row in rows]
    steps = [f"{row['steps']:,}" for row in rows]
    shown = [s for s, is_shown in zip(steps, holds, strict=True) if is_shown]
    missing = [s for s, is_shown in zip(steps, holds, strict=True) if not is_shown]
    advantage = f"{name}: the advantage over {reference}"
    if not shown:
        return f"{advantage} is shown at no horizon"
    is_prefix = shown == steps[: len(shown)]
    where = f"up to {shown[-1]}" if is_prefix else f"at {' and '.join(shown)}"
    rest = f"; it is not shown at {' and '.join(missing)} steps" if missing else ""
    return f"{advantage} holds {where} steps{rest}"


def text(content: Json) -> str:
    """Return the table of results.json, and what is claimed, for a terminal."""
    header = ("entry", "steps", "lr", "loss", "difference", "p", "steps ratio", "seconds ratio")
    rows = [_row(e["name"], row) for e in content["entries"] for row in e["horizons"]]
    rule = f"lr · ({content['tuned_at']} / steps)^{content['lr_power']:g}"
    notes = [f"note: {e['name']}: {e['note']}" for e in content["entries"] if e["note"]]
    if note := content["versions"]["note"]:
        notes.append(f"note: {note}")
    lines = [
        f"{content['name']}: {content['dataset']}, n = {len(content['seeds'])}, {rule};"
        f" differences and ratios to {content['against']} [95 % intervals]",
        *aligned([header, *rows]),
        *(e["claim"] for e in content["entries"] if e["claim"]),
        *notes,
    ]
    return "\n".join(lines)


def _row(name: str, row: Json) -> list[str]:
    """Return one line of the table. A loss that is not reached has no ratio."""
    cells = [name, str(row["steps"]), spelled(row["lr"]), bounded(row["loss"], "mean", ".4f")]
    if "difference" not in row:
        return [*cells, "", "", "", ""]
    steps, seconds, p = row["steps_ratio"], row["seconds_ratio"], row["difference"]["p"]
    return [
        *cells,
        bounded(row["difference"], "mean", "+.4f"),
        "" if p is None else f"{p:.2g}",
        bounded(steps, "value", ".3f") + " extrapolated" * steps["extrapolated"]
        if steps
        else "none",
        bounded(seconds, "value", ".3f") if seconds else "",
    ]


# ---- the picture


def plot(content: Json, path: Path) -> None:
    """Draw against the horizon: the ratio of steps and the difference of losses, with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4), layout="constrained")
    reference, steps = content["against"], content["horizons"]
    panels = (
        ("steps_ratio", "value", 1, f"steps to {reference}'s loss ÷ its steps"),
        ("difference", "mean", 0, f"loss − {reference}'s, nats per token"),
    )
    compared = [e for e in content["entries"] if e["claim"]]
    for axes, (figure_of, key, level, label) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.axhline(level, color="#555555", linestyle="--", linewidth=0.9, label=reference)
        for i, entry in enumerate(compared):
            _draw(axes, entry, i, figure_of, key, shift=1.03 ** (i - (len(compared) - 1) / 2))
        axes.set(xscale="log", xlabel="horizon, steps (log scale)", ylabel=label)
        axes.set_xticks(steps, [f"{s:,}" for s in steps])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=len(compared) + 1, fontsize=9)
    title = f"{content['dataset']}: bars are 95 % intervals of {len(content['seeds'])} seeds"
    hollow = "; hollow: extrapolated, outside of the entry's own losses"
    shown = [row["steps_ratio"] for e in compared for row in e["horizons"]]
    figure.suptitle(title + hollow * any(r and r["extrapolated"] for r in shown), fontsize=10)
    figure.savefig(path, dpi=120)


def _draw(axes: Any, entry: Json, i: int, figure_of: str, key: str, *, shift: float) -> None:
    """Draw one figure of an entry's rows. shift: of horizons, so that bars stand side by side."""
    colour, symbol = LIGHT[i % len(LIGHT)], MARKERS[marker(i)]
    rows = [r for r in entry["horizons"] if r[figure_of] and r[figure_of][key] is not None]
    x, y = [r["steps"] * shift for r in rows], [r[figure_of][key] for r in rows]
    axes.plot(x, y, color=colour, linestyle=(0, dash(i) or None), label=entry["name"])
    for at, value, row in zip(x, y, rows, strict=True):
        interval = row[figure_of]
        fill = "none" if interval.get("extrapolated") else "full"
        axes.plot(at, value, symbol, color=colour, fillstyle=fill)
        if interval["low"] is not None and interval["high"] is not None:
            axes.plot([at] * 2, [interval["low"], interval["high"]], color=colour, linewidth=1.2)


# ---- the command


def main(argv: list[str]) -> int:
    """Run the study, write results.json and horizons.png, and print the table. Return 0."""
    options, settings = build_parser().parse_known_args(argv)
    entries = load(options.configs, settings, allow_different=False)
    study = plan(options, entries)
    workers = runs.places(options.workers)
    if not runs.sweep(study.jobs(), study.folder, workers=workers, dry_run=options.dry_run):
        return 0
    about = {
        "command": f"python -m studies.horizons {shlex.join(argv)}",
        "name": study.folder.name,
        "dataset": entries[0].config.data.dataset,
        "workers": options.workers,
        "threads": entries[0].config.run.threads,
    }
    path, picture = study.folder / "results.json", study.folder / "horizons.png"
    runs.write_json(path, results(study, about=about))
    written = json.loads(path.read_text(encoding="utf-8"))
    print(text(written))
    plot(written, picture)
    print(f"written: {path}\nwritten: {picture}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the study's own options."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.horizons",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("configs", nargs="+", help="one for each entry")
    add("--against", required=True, metavar="NAME", help="the entry that others are compared with")
    horizons = "steps of a whole schedule each, 3 or more"
    add("--horizons", type=int, nargs="+", required=True, metavar="N", help=horizons)
    add("--seeds", type=int, default=5, help="of every entry and horizon")
    add("--first-seed", type=int, default=0)
    tuned = "the horizon at which the configurations' learning rates were tuned"
    add("--tuned-at", type=int, required=True, metavar="N", help=tuned)
    power = "P of lr · (tuned-at / horizon)^P; 0: the same rate at all horizons"
    add("--lr-power", type=float, default=0.0, metavar="P", help=power)
    add("--name", help="of the folder, runs/NAME; horizons-<entries> if left out")
    workers = "runs at a time; run.threads of each is the configuration's"
    add("--workers", type=int, default=os.cpu_count() or 1, help=workers)
    add("--dry-run", action="store_true", help="the cost alone")
    return parser


def plan(options: argparse.Namespace, entries: list[Entry]) -> Study:
    """Return the study that the options ask for. Raises StudyError for what it cannot be."""
    by_name = {e.name: e for e in entries}
    horizons = sorted(set(options.horizons))
    lrs = {e.name: e.config.optim.lr for e in entries}
    numbers = "--seeds, --first-seed, --tuned-at, --lr-power"
    got = (options.seeds, options.first_seed, options.tuned_at, options.lr_power)
    least = "1, 0 and 1 or more, and a finite power"
    fine = options.seeds > 0 <= options.first_seed and options.tuned_at > 0
    of_horizons = f"{HORIZONS} or more, of 1 step or more"
    for names, value, is_allowed, allowed in (
        ("--against", options.against, options.against in by_name, ", ".join(by_name)),
        ("entries", list(by_name), len(entries) > 1, "2 or more"),
        ("--horizons", horizons, len(horizons) >= HORIZONS and horizons[0] > 0, of_horizons),
        (numbers, got, fine and math.isfinite(options.lr_power), least),
        ("optim.lr", lrs, "auto" not in lrs.values(), "a number, which --lr-power carries"),
    ):
        require(is_allowed, names, got=value, allowed=allowed, fix="--help", error=runs.StudyError)
    return Study(
        folder=Path(entries[0].config.run.dir) / (options.name or f"horizons-{'-'.join(by_name)}"),
        entries=entries,
        reference=by_name[options.against],
        horizons=horizons,
        seeds=list(range(options.first_seed, options.first_seed + options.seeds)),
        tuned_at=options.tuned_at,
        lr_power=options.lr_power,
    )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
