"""From AdamW's or Muon's settings to Dualized's, with the predicted step of every layer before and
after (python -m nanodual.convert with the wheel).

    python -m optim.convert adamw --model module:callable --lr 6e-4 --weight-decay 0.1 --betas 0.9
    0.95 python -m optim.convert muon --shapes wte=50304x768:embedding h.{0..11}.up=3072x768:hidden
    … --lr 0.02 --weight-decay 0.01

A step is measured by its update RMS: the root mean square of its entries, before decay, in the
units of the weight.
Sources: [LI] Liu et al., Muon is scalable for LLM training, arXiv 2502.16982; [MU] Jordan et al.,
kellerjordan.github.io/posts/muon.
"""

import argparse
import importlib
import math
import re
import sys
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
from torch import nn

from .errors import CoverageError, Refusal
from .metrize import MASSES, Rule, metrize
from .modular import ModularNorm
from .norms import NORMS, SCALES, Norm, Spectral

NAMES = {"adamw": "AdamW", "muon": "Muon"}
# torch.optim.Muon's adjust_lr_fn: the singular values of its step, in units of lr [MU; LI, §2.2].
ADJUST = {"original": SCALES["sqrt(max(1, O/I))"], "match_rms_adamw": SCALES["0.2 sqrt(max(O, I))"]}
FOOTER = """\
update RMS: root mean square of a step's entries, predicted, before decay. Matched, in the geometric mean weighted by size: the steps of the
rows marked yes, and their decay per step. The other rows differ by design: their steps follow from the modular norm.
None of this is measured: scan lr around the value by factors of 2."""


@dataclass(frozen=True)
class Row:
    """A parameter; rival, ours: predicted update RMS, None where it is not known. matched: lr and
    weight_decay were chosen on it."""

    name: str
    shape: tuple[int, ...]
    role: str
    rival: float | None
    ours: float | None
    matched: bool


@dataclass(frozen=True)
class Conversion:
    """Settings for Dualized, and the step of every parameter. str() is the table."""

    rival: str
    lr: float
    beta: float
    weight_decay: float
    direction: str
    rows: tuple[Row, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Dualized(model, **settings)."""
        return {k: getattr(self, k) for k in ("lr", "direction", "beta", "weight_decay")}

    def __str__(self) -> str:
        rival = NAMES[self.rival]
        cells = [
            ("parameter", "shape", "role", f"update RMS {rival}", "Dualized", "ratio", "matched")
        ]
        for r in self.rows:
            ratio = r.ours / r.rival if r.ours is not None and r.rival else None
            theirs, ours, ratio = (
                "?" if x is None else f"{x:.3g}" for x in (r.rival, r.ours, ratio)
            )
            cells.append(
                (
                    r.name,
                    "×".join(map(str, r.shape)) or "scalar",
                    r.role,
                    theirs,
                    ours,
                    ratio,
                    "yes" if r.matched else "",
                )
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        settings = ", ".join(
            f"{k}={v!r}" if isinstance(v, str) else f"{k}={v:.4g}" for k, v in self.settings.items()
        )
        return "\n".join([f"Dualized(…, {settings})", "", *lines, "", FOOTER])


def convert(
    norm: ModularNorm,
    rival: Literal["adamw", "muon"],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] | None = None,
    momentum: float | None = None,
    nesterov: bool | None = None,
    adjust_lr_fn: str | None = None,
    adamw_lr: float | None = None,
) -> Conversion:
    """Dualized's settings for a network that trains well with the rival's.

    norm: of the network, from metrize(). AdamW: betas, by default (0.9, 0.999). Muon: momentum
    (0.95), nesterov (True) and adjust_lr_fn ("original"), all as in torch.optim.Muon; adamw_lr: of
    the AdamW that steps what Muon does not take (embedding, head, vectors, convolutions), only for
    the table. Raises ValueError for an impossible setting, one of the other rival, and a network
    without a hidden weight to match.
    """
    settings = dict(
        betas=betas,
        momentum=momentum,
        nesterov=nesterov,
        adjust_lr_fn=adjust_lr_fn,
        adamw_lr=adamw_lr,
    )
    _validate(rival, lr=lr, weight_decay=weight_decay, **settings)
    beta1 = betas[0] if betas else 0.9
    unit: dict[str, float | None] = {}  # our update RMS at lr = 1
    theirs: dict[str, float | None] = {}
    matched: list[str] = []
    for name, own in norm.norms.items():
        shape = norm.shapes.get(name)
        if shape is None:
            raise Refusal(
                "convert",
                got=f"a modular norm without the shape of {name}",
                allowed="one with shapes",
                fix="metrize(model)",
            )
        try:
            unit[name] = norm.radii[name] * own.update_rms(shape)
        except NotImplementedError:  # a user's norm
            unit[name] = None
        taken = _hidden(norm.roles.get(name, ""), own) and (
            rival == "adamw" or len(shape) == 2
        )  # torch.optim.Muon takes matrices alone
        if rival == "adamw":
            theirs[name] = lr * _adamw_rms(beta1)
        elif taken:
            # U Vᵀ of full rank has min(O, I) singular values 1, and O·I entries.
            theirs[name] = lr * ADJUST[adjust_lr_fn or "original"](*shape) / max(shape) ** 0.5
        else:
            theirs[name] = None if adamw_lr is None else adamw_lr * _adamw_rms(0.9)
        if taken and unit[name]:
            matched.append(name)
    if not matched:
        raise Refusal(
            f"convert from {NAMES[rival]}",
            got=f"no hidden weight{' of 2 dimensions' * (rival == 'muon')} that moves, so nothing to match",
            allowed="one or more",
            fix="name them, metrize(model, rules=[Rule(pattern, role='hidden')])",
        )
    sizes = [math.prod(norm.shapes[n]) for n in matched]
    ours = _ratio(sizes, [theirs[n] for n in matched], [unit[n] for n in matched])
    # The decay of a step is lr · weight_decay · W for both rivals (torch's Muon does not adjust
    # it), and ours lr · radius · weight_decay · W.
    decay = weight_decay and _ratio(
        sizes, [lr * weight_decay for _ in matched], [ours * norm.radii[n] for n in matched]
    )
    if rival == "adamw":
        beta, direction = (
            beta1,
            "momentum",
        )  # what β₂ was for, the sizes of entries, is the duality map's
    else:
        # torch.optim.Muon averages as we do, M ← β M + (1 − β) G, and looks ahead as our
        # "nesterov". A sum instead of an average has the same polar factor.
        beta, direction = (
            0.95 if momentum is None else momentum,
            "momentum" if nesterov is False else "nesterov",
        )
    steps = {n: None if u is None else ours * u for n, u in unit.items()}
    rows = tuple(
        Row(n, norm.shapes[n], norm.roles.get(n, ""), theirs[n], step, n in matched)
        for n, step in steps.items()
    )
    return Conversion(rival, ours, beta, decay, direction, rows)


def _adamw_rms(beta1: float) -> float:
    """AdamW's update RMS in units of lr: 0.2 at β₁ = 0.9, the low end of what training shows [LI,
    §2.2].

    Elsewhere in proportion to √((1 − β₁) / (1 + β₁)), its value for gradients of nothing but noise,
    which is 0.23 at 0.9.
    """
    return 0.2 * ((1 - beta1) / (1 + beta1) / (0.1 / 1.9)) ** 0.5


def _hidden(role: str, norm: Norm) -> bool:
    """By role, or where a structure has roles of its own, by norm."""
    if role in MASSES:
        return role == "hidden"
    while isinstance(inner := getattr(norm, "inner", None), Norm):
        norm = inner
    return isinstance(norm, Spectral)


def _ratio(sizes: list[int], above: list[Any], below: list[Any]) -> float:
    """The geometric mean of above / below, weighted by sizes."""
    return math.exp(
        sum(n * math.log(a / b) for n, a, b in zip(sizes, above, below, strict=True)) / sum(sizes)
    )


def _validate(rival: str, **given: Any) -> None:
    def number(x: Any, low: float, high: float = math.inf) -> bool:
        return isinstance(x, int | float) and low <= x < high

    if rival not in NAMES:
        raise Refusal(
            "convert: rival", got=repr(rival), allowed=", ".join(NAMES), fix="one of those"
        )
    foreign = (
        ("betas",) if rival == "muon" else ("momentum", "nesterov", "adjust_lr_fn", "adamw_lr")
    )
    for what, allowed, fine in (
        ("lr", "a finite number > 0", lambda x: number(x, 0) and x > 0),
        ("weight_decay", "a finite number >= 0", lambda x: number(x, 0)),
        (
            "betas",
            "two numbers, 0 <= beta < 1",
            lambda x: (
                isinstance(x, tuple | list) and len(x) == 2 and all(number(b, 0, 1) for b in x)
            ),
        ),
        ("momentum", "0 <= momentum < 1", lambda x: number(x, 0, 1)),
        ("nesterov", "True, False", lambda x: isinstance(x, bool)),
        ("adjust_lr_fn", ", ".join(ADJUST), lambda x: x in ADJUST),
        ("adamw_lr", "a finite number >= 0", lambda x: number(x, 0)),
    ):
        value = given[what]
        if value is not None and what in foreign:
            raise Refusal(
                f"convert: {what}",
                got=f"{value!r}, with {NAMES[rival]}",
                allowed="only with the other rival",
                fix="leave it out",
            )
        if not (value is None and what not in ("lr", "weight_decay")) and not fine(value):
            raise Refusal(
                f"convert: {what}",
                got=repr(value),
                allowed=allowed,
                fix=f"{what}=… as the rival's run had it",
            )


def build(spec: str) -> nn.Module:
    """What "module:callable" returns, on the meta device where that works."""
    path, _, name = spec.partition(":")
    fix = "--model package.module:callable, which is called without arguments and returns an nn.Module"
    if not path or not name:
        raise Refusal("--model", got=repr(spec), allowed="module:callable", fix=fix)
    try:
        make: Any = reduce(getattr, name.split("."), importlib.import_module(path))
    except Exception as error:  # the user's module may raise anything
        raise Refusal(
            f"--model {spec}",
            got=f"{type(error).__name__}: {error}",
            allowed="what Python can import from here",
            fix=fix,
        ) from error
    note = None
    try:
        with torch.device("meta"):
            model = make()
    except (
        Exception
    ) as error:  # a model that reads its weights while it is built, or a mistake, which comes again
        note = f"note: built on the CPU; on the meta device: {type(error).__name__}: {error}"
        try:
            model = make()
        except Exception as again:
            raise Refusal(
                f"--model {spec}",
                got=f"{type(again).__name__}: {again}",
                allowed="a callable that works",
                fix=fix,
            ) from again
    if not isinstance(model, nn.Module):
        raise Refusal(
            f"--model {spec}", got=f"a {type(model).__name__}", allowed="an nn.Module", fix=fix
        )
    if note:
        print(note, file=sys.stderr)
    return model


def sketch(specs: list[str]) -> tuple[nn.Module, list[Rule]]:
    """A module of nothing but these "name=OxI:role" parameters, on the meta device, and the rules
    that place them."""
    model, rules = nn.Module(), []
    for spec in specs:
        found = re.fullmatch(r"([\w.]+)=(\d+(?:x\d+)*):(\w+)", spec)
        if found is None or found[3] not in MASSES or found[1] in model._parameters:
            raise Refusal(
                "--shapes",
                got=repr(spec),
                allowed=f"name=OxI:role, each name once, role one of {', '.join(MASSES)}",
                fix="for instance h.0.up=3072x768:hidden",
            )
        model._parameters[found[1]] = nn.Parameter(
            torch.empty(*map(int, found[2].split("x")), device="meta")
        )  # its name may have dots
        rules.append(Rule(found[1], role=found[3]))
    return model, rules


def parsed(text: str) -> Rule:
    """'pattern,role=head,mass=2,norm=RMSToRMS' → Rule."""
    pattern, *rest = text.split(",")
    pairs = dict(part.split("=", 1) for part in rest if "=" in part)
    try:
        mass = float(pairs["mass"]) if "mass" in pairs else None
    except ValueError:
        mass = math.nan
    if (
        not rest
        or len(pairs) < len(rest)
        or pairs.keys() - {"role", "mass", "norm"}
        or mass != mass
    ):
        raise Refusal(
            "--rule",
            got=repr(text),
            allowed=f"pattern,key=value,… with the keys role, mass (a number), norm ({', '.join(NORMS)})",
            fix="for instance 'lm_head.weight,role=head'",
        )
    return Rule(pattern, norm=pairs.get("norm"), mass=mass, role=pairs.get("role"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.convert",
        description="Settings of AdamW or Muon → those of Dualized.",
    )
    rivals = parser.add_subparsers(dest="rival", required=True)
    for rival, name in NAMES.items():
        own = rivals.add_parser(
            rival,
            help=f"from {name}'s settings",
            description=f"{name}'s settings → Dualized's; the predicted step of every layer.",
        )
        network = own.add_mutually_exclusive_group(required=True)
        network.add_argument(
            "--model",
            metavar="MODULE:CALLABLE",
            help="called without arguments, on the meta device if that works; returns an nn.Module",
        )
        network.add_argument(
            "--shapes",
            nargs="+",
            metavar="NAME=OxI:ROLE",
            help=f"the weights of a network without code; roles: {', '.join(MASSES)}",
        )
        own.add_argument(
            "--rule",
            action="append",
            default=[],
            metavar="PATTERN,role=ROLE",
            help="as metrize's rules: role, mass, norm; may be repeated",
        )
        own.add_argument("--lr", type=float, required=True)
        own.add_argument("--weight-decay", type=float, required=True)
        if rival == "adamw":
            own.add_argument(
                "--betas",
                type=float,
                nargs=2,
                default=(0.9, 0.999),
                metavar=("BETA1", "BETA2"),
                help="by default %(default)s",
            )
        else:
            own.add_argument("--momentum", type=float, default=0.95, help="by default %(default)s")
            own.add_argument("--nesterov", action=argparse.BooleanOptionalAction, default=True)
            own.add_argument(
                "--adjust-lr-fn",
                choices=list(ADJUST),
                default="original",
                help="of torch.optim.Muon, by default %(default)s",
            )
            own.add_argument(
                "--adamw-lr", type=float, help="of the AdamW for what Muon does not take"
            )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = vars(_parser().parse_args(argv))
    spec, shapes, rules = args.pop("model"), args.pop("shapes"), args.pop("rule")
    try:
        if shapes and rules:
            raise Refusal(
                "--rule",
                got="--shapes as well",
                allowed="with --model",
                fix="leave it out; --shapes names the roles",
            )
        model, rules = sketch(shapes) if shapes else (build(spec), [parsed(r) for r in rules])
        norm = metrize(model, rules=rules)
        print(convert(norm, args.pop("rival"), **args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, CoverageError) and not shapes:
            print(
                "  here: --rule PATTERN,role=ROLE or --rule PATTERN,norm=NAME; a norm with arguments needs Python: convert(metrize(model, rules=…), …)",
                file=sys.stderr,
            )
        return 2
    for note in norm.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
