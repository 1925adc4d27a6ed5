"""One training step, counted: compute, memory and communication for Dualized, AdamW and Muon.

    python -m studies.cost_model [--model 124M … | --config configs/x.toml] [--gpus 8 64 …]
        [--parallel ddp fsdp hsdp] [--tokens-per-step N] [--markdown]

Models have 124M … 1T weights, on 1 … 16,384 GPUs. Nothing here is measured: FLOPs and bytes are
those of the code, on weights without numbers (torch's meta device) that optim/placement.py places
as on so many GPUs; times are rooflines from data sheets. Assumptions, formulas and what is checked:
docs/scaling.md.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from model import GPT
from optim.errors import Refusal

from .cases import Case, family
from .hardware import GPUS, NODE
from .optimizers import ADAMW, MUON_PLAIN, OPTIMIZERS, OURS, Weight, weights_of
from .step import around, step_of
from .tables import TABLES, UNITS, Row, headline, table


def main(argv: list[str] | None = None) -> None:
    """Print the tables that the command line asks for."""
    args = build_parser().parse_args(argv)
    try:
        cases = (
            [Case.of_config(path) for path in args.config]
            if args.config
            else [family()[name] for name in args.model]
        )
        for line in report(cases, args):
            print(line)
    except ValueError as error:
        sys.exit(str(error))


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.cost_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", nargs="+", default=["124M"], choices=list(family()))
    which.add_argument("--config", type=Path, nargs="+", help="of a training run")
    add = parser.add_argument
    add("--gpus", nargs="+", type=int, default=[1, 8, 64, 512, 4096, 16384])
    modes = ("ddp", "fsdp", "hsdp")
    add("--parallel", nargs="+", default=["ddp", "fsdp"], choices=modes)
    add("--shards", type=int, default=NODE, help="of one copy, with hsdp")
    add("--optimizer", nargs="+", default=[OURS, ADAMW, MUON_PLAIN], choices=OPTIMIZERS)
    tokens = "by default those of the configuration or publication"
    add("--tokens-per-step", type=int, help=tokens)
    add("--gpu", default="H100", choices=list(GPUS))
    add("--table", nargs="+", default=list(TABLES), choices=list(TABLES))
    add("--markdown", action="store_true")
    return parser


def report(cases: Iterable[Case], args: argparse.Namespace) -> Iterator[str]:
    """Yield the headlines, and then the tables."""
    counted: list[Row] = []
    for case in cases:
        if args.tokens_per_step is not None:
            case = with_tokens(case, args.tokens_per_step)
        weights = {optimizer: weights_of(case, optimizer) for optimizer in {OURS, *args.optimizer}}
        yield ("- " if args.markdown else "") + headline(case, *weights[OURS], GPUS[args.gpu])
        counted += rows(case, weights, args)
    for name in args.table:
        title = f"{name}: {UNITS[name]} ({args.gpu})"
        yield f"\n**{title}**\n" if args.markdown else f"\n{title}\n"
        yield table(name, counted, markdown=args.markdown)
    if any(row.case.sequences < row.w for row in counted):
        star = "&ast;" if args.markdown else "*"
        yield f"\n{star} fewer sequences than GPUs: data parallelism alone cannot share them out"


def with_tokens(case: Case, tokens: int) -> Case:
    """Return the case with another batch. Raises Refusal where sequences do not divide it."""
    length = case.model.block_size
    if tokens < 1 or tokens % length:
        raise Refusal(
            "--tokens-per-step",
            got=tokens,
            allowed=f"a multiple of {case.name}'s {length} tokens a sequence",
            fix=length * max(1, tokens // length),
        )
    return replace(case, sequences=tokens // length)


def rows(
    case: Case, weights: dict[str, tuple[GPT, list[Weight]]], args: argparse.Namespace
) -> Iterator[Row]:
    """Yield the rows of a case. weights: what weights_of returned, by optimizer."""
    tokens = float(case.sequences * case.model.block_size)
    for w in args.gpus:
        if w < 1:
            raise Refusal("--gpus", got=w, allowed="1 or more", fix="--gpus 8")
        for mode in args.parallel if w > 1 else ["ddp"]:
            s = {"ddp": 1, "fsdp": w, "hsdp": min(w, args.shards)}[mode]
            if s < 1 or w % s:
                raise Refusal(
                    "--shards",
                    got=s,
                    allowed=f"a divisor of the {w} GPUs",
                    fix="another number of GPUs, or --shards",
                )
            for optimizer in args.optimizer:
                model, costs = weights[optimizer]
                step = step_of(optimizer, costs, mode, w, s)
                if step is not None:
                    shown, share = mode if w > 1 else "–", around(model, tokens, mode, w, s)
                    yield Row(case, w, shown, optimizer, share, step, GPUS[args.gpu])
