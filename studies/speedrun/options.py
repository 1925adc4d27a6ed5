"""The command line of a study: its options, and which values they may have."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import speedrun, statistics
from ..record_book.tracks import TRACKS
from ..runs import StudyError
from .search import FRACTIONS, TRIES
from .trials import FIRST_SEED


def read_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the study's options, and the rest, which is for the configurations."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.speedrun",
        description=speedrun.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("configs", nargs="+", help="one for each entry; every pair is compared")
    for title, declare in (
        ("the comparison", _declare_comparison),
        ("the rule", _declare_rule),
        ("the search for a horizon", _declare_search),
        ("tuning", _declare_tuning),
        ("the runs", _declare_runs),
    ):
        declare(parser.add_argument_group(title).add_argument)
    return parser.parse_known_args(argv)


Add = Callable[..., argparse.Action]


def _declare_comparison(add: Add) -> None:
    """Declare what is compared."""
    add("--seeds", type=int, default=4, help="of every entry and horizon")
    add("--first-seed", type=int, default=0)
    add("--target", type=float, metavar="L", help="loss, nats per token")
    add(
        "--target-entry",
        metavar="NAME",
        help="the target is this entry's mean loss at the budget; its own noise is accounted for",
    )
    add(
        "--budget",
        metavar="KIND=N",
        help="steps=400, tokens=1.6e6 or seconds=60 (of training);"
        " the configurations' train.steps if left out",
    )
    add(
        "--allow-different",
        action="store_true",
        help="data, context, tokens of a step and evaluation may differ between entries",
    )


def _declare_rule(add: Add) -> None:
    """Declare the rule, and how many seeds it takes."""
    add(
        "--sigma",
        type=float,
        help="of a run's loss; estimated from the runs at the budget if left out",
    )
    add("--threshold", type=float, help="of the rule; if left out, that of a test at --level")
    add("--level", type=float, default=statistics.RULE_LEVEL, help="one-sided, of the rule")
    add(
        "--power",
        type=float,
        nargs="+",
        default=[],
        metavar="X",
        help="how many seeds an effect of X nats takes, and nothing else",
    )


def _declare_search(add: Add) -> None:
    """Declare which horizons are run."""
    add(
        "--horizons",
        type=float,
        nargs="*",
        default=FRACTIONS,
        metavar="F",
        help="fractions of the budget that are run where that passes",
    )
    add(
        "--longest",
        type=float,
        default=1.0,
        metavar="F",
        help="where it does not pass: horizons of up to this many budgets",
    )
    add(
        "--grid",
        type=int,
        metavar="K",
        help="a horizon is a multiple of K steps; budget/80 if left out",
    )
    add(
        "--tries",
        type=int,
        default=TRIES,
        help="horizons that are run to confirm the interpolated one",
    )


def _declare_tuning(add: Add) -> None:
    """Declare the trials."""
    add(
        "--tune",
        nargs="+",
        action="extend",
        default=[],
        metavar="RANGE",
        help='"[ENTRY:]optim.lr=log(0.01,1,8)", lin(a,b,n), {a,b,c}',
    )
    add(
        "--trials", type=int, metavar="N", help="of every tuned entry, where several keys are tuned"
    )
    add("--tune-seeds", type=int, default=1, help=f"of every trial, from {FIRST_SEED} on")
    add("--tune-steps", type=int, help="of every trial; the budget if left out")
    add(
        "--holdout",
        type=float,
        help="fraction of the training split that trials are judged on and do not train on;"
        " as long as the validation split if left out",
    )
    add("--tuned-into", type=Path, metavar="DIR", help="write the tuned configurations there")


def _declare_runs(add: Add) -> None:
    """Declare where the runs are, and how many run at a time."""
    add("--name", help="of the folder, runs/NAME; speedrun-<entries> if left out")
    add("--track", help="of the record book, noted in results.json")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="runs at a time; run.threads of each is the configuration's",
    )
    add("--gpus", action="store_true", help="one run a GPU at a time, instead of --workers")
    add(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="ranks of every run, as torchrun starts them; with --gpus one GPU each",
    )
    add("--dry-run", action="store_true", help="the cost alone")


# ---- values


def _at_least(least: float) -> Callable[[float], bool]:
    """Return a check of numbers that may not be below `least`."""
    return lambda x: x >= least


# Each option's check and, in words, what it allows. One that is left out is not checked.
ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "--seeds": (_at_least(1), "1 or more"),
    "--first-seed": (_at_least(0), "0 or more"),
    "--nproc": (_at_least(1), "1 or more"),
    "--tries": (_at_least(1), "1 or more"),
    "--trials": (_at_least(1), "1 or more"),
    "--tune-seeds": (_at_least(1), "1 or more"),
    "--tune-steps": (_at_least(1), "1 or more"),
    "--grid": (_at_least(1), "1 step or more"),
    "--horizons": (
        lambda fractions: all(0 < f < 1 for f in fractions),
        "fractions of the budget, above 0 and below 1",
    ),
    "--longest": (lambda times: 1 <= times < math.inf, "1 or more"),
    "--target": (math.isfinite, "a loss"),
    "--track": (lambda name: name in TRACKS, ", ".join(TRACKS)),
    "--sigma": (lambda sigma: 0 < sigma < math.inf, "above 0"),
    "--threshold": (lambda x: 0 <= x < math.inf, "0 or more, and finite"),
    "--level": (lambda level: 0 < level < 0.5, "above 0 and below 0.5"),
    "--holdout": (lambda fraction: 0 < fraction < 1, "a fraction above 0 and below 1"),
    "--power": (lambda effects: all(0 < x < math.inf for x in effects), "above 0"),
}


def check(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise StudyError unless the options have values that are allowed. names: of the entries."""
    for flag, (is_allowed, allowed) in ALLOWED.items():
        value = getattr(options, flag.removeprefix("--").replace("-", "_"))
        _require(value is None or is_allowed(value), flag, value, allowed)
    setter = options.target_entry
    _require(setter in (None, *names), "--target-entry", setter, f"{', '.join(names)}, the entries")
    _require(
        setter is None or options.target is None,
        "--target-entry",
        setter,
        "one of --target and --target-entry",
    )
    _require(
        not options.power or options.threshold is None,
        "--power, --threshold",
        (options.power, options.threshold),
        "--level, which a threshold is made of",
    )
    _require(
        options.first_seed + options.seeds <= FIRST_SEED
        or options.first_seed >= FIRST_SEED + options.tune_seeds,
        "--first-seed, --seeds",
        (options.first_seed, options.seeds),
        f"seeds below {FIRST_SEED}, where those of tuning begin",
    )


def _require(fine: bool, flag: str, value: object, allowed: str) -> None:
    """Raise StudyError for an option's value unless it is fine."""
    if not fine:
        raise StudyError(flag, got=repr(value), allowed=allowed, fix="another, or leave it out")
