"""From AdamW's or Muon's settings to Dualized's: rates to try, and each layer's predicted step.

    python -m optim.convert adamw --model module:callable --lr 6e-4 --weight-decay 0.1
    python -m optim.convert muon --shapes wte=50304x768:embedding h.{0..11}.up=3072x768:hidden … \
        --lr 0.02 --weight-decay 0.01

With the wheel it is python -m nanodual.convert. A step is measured by its update RMS: the root mean
square of its entries, before decay, in the units of the weight.
Sources: [LI] Liu et al., Muon is scalable for LLM training, arXiv 2502.16982; [MU] Jordan et al.,
kellerjordan.github.io/posts/muon.
"""

import argparse
import importlib
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import nn

from .errors import CoverageError, Refusal, require
from .metrize import Rule, metrize
from .modular import ModularNorm
from .module_types import MASSES, MATRICES
from .norms import NORMS, SCALES, Norm, Spectral
from .plugins import load
from .receipt import aligned, figure, spelled

NAMES = {"adamw": "AdamW", "muon": "Muon"}
# The best rates of seven small models lay in it (docs/log.md, 2026-11-28, "Which learning rates for
# other people's models?"; python -m benchmarks.foreign rates).
RECOMMENDED = (0.125, 4.0)
SCAN = 4  # the factor between two rates of a scan, about
# torch.optim.Muon's adjust_lr_fn: the singular values of its step, in units of lr [MU; LI, §2.2].
ADJUST = {"original": SCALES["sqrt(max(1, O/I))"], "match_rms_adamw": SCALES["0.2 sqrt(max(O, I))"]}
FOOTER = """\
update RMS: root mean square of a step's entries, predicted, before decay. Matched, in the geometric
mean weighted by size: the steps of the rows marked yes, and their decay per step. The other rows
differ by design: their steps follow from the modular norm."""
HERE = """\
  here: --rule PATTERN,role=ROLE or --rule PATTERN,norm=NAME; a norm with arguments needs Python: \
convert(metrize(model, rules=…), …)"""
PARSED: dict[str, Callable[[str], Any]] = {"role": str, "mass": float, "maps": int, "norm": str}
DEFAULT = "by default %(default)s"
CALLABLE = (
    "--model package.module:callable, which is called without arguments and returns an nn.Module"
)


@dataclass(frozen=True)
class Setting:
    """A setting of a baseline: what it may be, its option on the command line, and whose it is."""

    allowed: str
    fine: Callable[[Any], bool]
    option: dict[str, Any]
    baselines: tuple[str, ...] = tuple(NAMES)


def _below(x: Any, high: float = math.inf) -> bool:
    return isinstance(x, int | float) and 0 <= x < high


SETTINGS = {
    "lr": Setting(
        "a finite number > 0", lambda x: _below(x) and x > 0, dict(type=float, required=True)
    ),
    "weight_decay": Setting("a finite number >= 0", _below, dict(type=float, required=True)),
    "betas": Setting(
        "two numbers, 0 <= beta < 1",
        lambda x: isinstance(x, tuple | list) and len(x) == 2 and all(_below(b, 1) for b in x),
        dict(type=float, nargs=2, default=(0.9, 0.999), metavar=("BETA1", "BETA2"), help=DEFAULT),
        ("adamw",),
    ),
    "momentum": Setting(
        "0 <= momentum < 1",
        lambda x: _below(x, 1),
        dict(type=float, default=0.95, help=DEFAULT),
        ("muon",),
    ),
    "nesterov": Setting(
        "True, False",
        lambda x: isinstance(x, bool),
        dict(action=argparse.BooleanOptionalAction, default=True),
        ("muon",),
    ),
    "adjust_lr_fn": Setting(
        ", ".join(ADJUST),
        lambda x: x in ADJUST,
        dict(choices=list(ADJUST), default="original", help=f"of torch.optim.Muon, {DEFAULT}"),
        ("muon",),
    ),
    "adamw_lr": Setting(
        "a finite number >= 0",
        _below,
        dict(type=float, help="of the AdamW for what Muon does not take"),
        ("muon",),
    ),
}


@dataclass(frozen=True)
class Row:
    """A parameter, and the predicted update RMS of its step.

    baseline, ours: None where it is not known. matched: lr and weight_decay were chosen on it.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    baseline: float | None
    ours: float | None
    matched: bool


@dataclass(frozen=True)
class Conversion:
    """Settings for Dualized, and the step of every parameter. str() is all of it, in words.

    lr: takes the baseline's steps. recommended: the lowest and the highest rate of a range that is
    the same for all models, and is measured. Scan between lr and it: the best is seldom lr itself.
    """

    baseline: str
    lr: float
    beta: float
    weight_decay: float
    direction: str
    rows: tuple[Row, ...]
    recommended: tuple[float, float] = RECOMMENDED

    @property
    def settings(self) -> dict[str, Any]:
        """Return what Dualized(model, **settings) takes, with the matched lr."""
        return {k: getattr(self, k) for k in ("lr", "direction", "beta", "weight_decay")}

    @property
    def scan(self) -> tuple[float, ...]:
        """Return the rates to try: from lr to the far end of the recommended range, in even ratios
        of about 4."""
        low, high = min(self.lr, self.recommended[0]), max(self.lr, self.recommended[1])
        count = max(1, round(math.log(high / low, SCAN)))
        return tuple(low * (high / low) ** (i / count) for i in range(count + 1))

    def __str__(self) -> str:
        step = f"update RMS {NAMES[self.baseline]}"
        cells: list[tuple[str, ...]] = [
            ("parameter", "shape", "role", step, "Dualized", "ratio", "matched")
        ]
        for row in self.rows:
            ratio = row.ours / row.baseline if row.ours is not None and row.baseline else None
            steps = (figure(x, 3) for x in (row.baseline, row.ours, ratio))
            matched = "yes" if row.matched else ""
            cells.append((row.name, spelled(row.shape), row.role, *steps, matched))
        return "\n".join([*self._advice(), "", *aligned(cells), "", FOOTER])

    def _advice(self) -> list[str]:
        """Return the settings in words, and the rates to scan."""
        others = ", ".join(
            f"{k}={v!r}" if isinstance(v, str) else f"{k}={v:.4g}"
            for k, v in self.settings.items()
            if k != "lr"
        )
        low, high = self.recommended
        return [
            f"Dualized(…, lr, {others})",
            f"lr {self.lr:.4g}: takes {NAMES[self.baseline]}'s steps (matched)",
            f"lr {low:g} to {high:g}: recommended, as the best of seven small models lay there",
            f"scan lr = {', '.join(f'{lr:.3g}' for lr in self.scan)}, falling to 0 in each run; "
            "then halve and double the best",
        ]


def convert(
    norm: ModularNorm,
    baseline: Literal["adamw", "muon"],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] | None = None,
    momentum: float | None = None,
    nesterov: bool | None = None,
    adjust_lr_fn: str | None = None,
    adamw_lr: float | None = None,
) -> Conversion:
    """Return Dualized's settings for a network that trains well with the baseline's.

    norm: of the network, from metrize(). AdamW: betas, by default (0.9, 0.999). Muon: momentum
    (0.95), nesterov (True) and adjust_lr_fn ("original"), all as in torch.optim.Muon; adamw_lr: of
    the AdamW that steps what Muon does not take (embedding, head, vectors, convolutions), only for
    the table. Raises Refusal for an impossible setting, one of the other baseline, and a network
    without a hidden weight to match.
    """
    given = dict(betas=betas, momentum=momentum, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn)
    _check(baseline, dict(lr=lr, weight_decay=weight_decay, adamw_lr=adamw_lr, **given))
    # β₂ has no counterpart: AdamW takes the sizes of entries from it, and the duality map decides
    # them here. torch.optim.Muon averages as we do, M ← β M + (1 − β) G, and looks ahead as our
    # "nesterov". A sum instead of an average has the same polar factor.
    if baseline == "adamw":
        beta, direction = betas[0] if betas else 0.9, "momentum"
        muon, adamw = None, lr * _adamw_rms(beta)
    else:
        beta = 0.95 if momentum is None else momentum
        direction = "momentum" if nesterov is False else "nesterov"
        size = ADJUST[adjust_lr_fn or "original"]
        # U Vᵀ of full rank has min(O, I) singular values 1, and O·I entries.
        muon = lambda O, I: lr * size(O, I) / max(O, I) ** 0.5  # noqa: E731, E741
        adamw = None if adamw_lr is None else adamw_lr * _adamw_rms(0.9)
    rows = [_row(norm, name, muon, adamw) for name in norm.norms]
    matched = [row for row in rows if row.matched]
    require(
        matched,
        f"convert from {NAMES[baseline]}",
        got=f"no hidden weight{' of 2 dimensions' * (baseline == 'muon')} that moves, "
        "so nothing to match",
        allowed="one or more",
        fix="name them, metrize(model, rules=[Rule(pattern, role='hidden')])",
    )
    scale = _ratio(matched, [row.baseline for row in matched], [row.ours for row in matched])
    # A step's decay is lr · weight_decay · W for both baselines (torch's Muon does not adjust it),
    # and ours lr · radius · weight_decay · W.
    radii = [scale * norm.radii[row.name] for row in matched]
    decay = weight_decay and _ratio(matched, [lr * weight_decay] * len(matched), radii)
    scaled = (replace(r, ours=None if r.ours is None else scale * r.ours) for r in rows)
    return Conversion(baseline, scale, beta, decay, direction, tuple(scaled))


def _row(
    norm: ModularNorm, name: str, muon: Callable[[int, int], float] | None, adamw: float | None
) -> Row:
    """Return a parameter's row, with our step at lr = 1.

    muon: the update RMS of Muon for the matrices that it takes. adamw: that of AdamW, for the rest.
    """
    require(
        name in norm.shapes,
        "convert",
        got=f"a modular norm without the shape of {name}",
        allowed="one with shapes",
        fix="metrize(model)",
    )
    shape, role, ours = norm.shapes[name], norm.roles.get(name, ""), norm.update_rms(name)
    taken = _hidden(role, norm.norms[name]) and (muon is None or len(shape) == 2)
    theirs = muon(*shape) if taken and muon else adamw
    return Row(name, shape, role, theirs, ours, bool(taken and ours))


def _adamw_rms(beta1: float) -> float:
    """Return AdamW's update RMS in units of lr.

    It is 0.2 at β₁ = 0.9, the low end of what training shows [LI, §2.2]. Elsewhere it is in
    proportion to √((1 − β₁) / (1 + β₁)), its value for gradients of nothing but noise, which is
    0.23 at 0.9.
    """
    return 0.2 * ((1 - beta1) / (1 + beta1) / (0.1 / 1.9)) ** 0.5


def _hidden(role: str, norm: Norm) -> bool:
    """Return whether a weight is hidden: by role or, where a structure has its own, by norm."""
    if role in MASSES:
        return role == "hidden"
    while isinstance(inner := getattr(norm, "inner", None), Norm):
        norm = inner
    return isinstance(norm, Spectral)


def _ratio(rows: list[Row], above: list[Any], below: list[Any]) -> float:
    """Return the geometric mean of above / below, weighted by the sizes of the rows."""
    sizes = [math.prod(row.shape) for row in rows]
    logs = (n * math.log(a / b) for n, a, b in zip(sizes, above, below, strict=True))
    return math.exp(sum(logs) / sum(sizes))


def _check(baseline: str, given: dict[str, Any]) -> None:
    """Raise Refusal for a setting that cannot be, or that the baseline does not have."""
    names = ", ".join(NAMES)
    require(
        baseline in NAMES,
        "convert: baseline",
        got=repr(baseline),
        allowed=names,
        fix="one of those",
    )
    for name, setting in SETTINGS.items():
        value = given[name]
        if value is None and not setting.option.get("required"):
            continue
        require(
            baseline in setting.baselines,
            f"convert: {name}",
            got=f"{value!r}, with {NAMES[baseline]}",
            allowed="only with the other baseline",
            fix="leave it out",
        )
        require(
            setting.fine(value),
            f"convert: {name}",
            got=repr(value),
            allowed=setting.allowed,
            fix=f"{name}=… as the baseline's run had it",
        )


# ---- the command


def build(spec: str) -> nn.Module:
    """Return what "module:callable" returns, on the meta device where that works."""
    path, _, name = spec.partition(":")
    require(path and name, "--model", got=repr(spec), allowed="module:callable", fix=CALLABLE)
    make = _tried(
        spec,
        lambda: reduce(getattr, name.split("."), importlib.import_module(path)),
        allowed="what Python can import from here",
    )
    note = None
    try:
        with torch.device("meta"):
            model = make()
    except Exception as error:  # it reads its weights while it is built, or is wrong on the CPU too
        note = f"note: built on the CPU; on the meta device: {type(error).__name__}: {error}"
        model = _tried(spec, make, allowed="a callable that works")
    got = f"a {type(model).__name__}"
    fine = isinstance(model, nn.Module)
    require(fine, f"--model {spec}", got=got, allowed="an nn.Module", fix=CALLABLE)
    if note:
        print(note, file=sys.stderr)
    return model


def _tried(spec: str, make: Callable[[], Any], *, allowed: str) -> Any:
    """Return make(), which is the user's code and may raise anything."""
    try:
        return make()
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise Refusal(f"--model {spec}", got=got, allowed=allowed, fix=CALLABLE) from error


def sketch(specs: list[str]) -> tuple[nn.Module, list[Rule]]:
    """Return a module of "name=OxI:role" parameters, on the meta device, and their roles' rules."""
    model, rules = nn.Module(), []
    for spec in specs:
        parts = re.fullmatch(r"([\w.]+)=(\d+(?:x\d+)*):(\w+)", spec)
        thin = parts is not None and parts[3] in MATRICES and "x" not in parts[2]
        if parts is None or parts[3] not in MASSES or thin or parts[1] in model._parameters:
            raise Refusal(
                "--shapes",
                got=repr(spec),
                allowed=f"name=OxI:role, each name once, role one of {', '.join(MASSES)}; "
                f"{', '.join(MATRICES)} of two dimensions or more",
                fix="for instance h.0.up=3072x768:hidden",
            )
        weight = torch.empty(*map(int, parts[2].split("x")), device="meta")
        model._parameters[parts[1]] = nn.Parameter(weight)  # its name may have dots
        rules.append(Rule(parts[1], role=parts[3]))
    return model, rules


def parsed(text: str) -> Rule:
    """Return the Rule of 'pattern,role=head,mass=2,norm=RMSToRMS,maps=3'."""
    pattern, *rest = text.split(",")
    pairs = dict(part.split("=", 1) for part in rest if "=" in part)
    known = pairs.keys() <= PARSED.keys() and len(pairs) == len(rest) > 0
    try:
        fields = {key: PARSED[key](value) for key, value in pairs.items()} if known else {}
    except ValueError:
        known = False
    require(
        known,
        "--rule",
        got=repr(text),
        allowed="pattern,key=value,… with the keys role, mass (a number), maps (an integer), "
        f"norm ({', '.join(NORMS)})",
        fix="for instance 'lm_head.weight,role=head'",
    )
    return Rule(pattern, **fields)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.convert",
        description="Settings of AdamW or Muon → those of Dualized.",
    )
    baselines = parser.add_subparsers(dest="baseline", required=True)
    for baseline, name in NAMES.items():
        about = f"{name}'s settings → Dualized's; the predicted step of every layer."
        own = baselines.add_parser(baseline, help=f"from {name}'s settings", description=about)
        network = own.add_mutually_exclusive_group(required=True)
        about = "called without arguments, on the meta device if that works; returns an nn.Module"
        network.add_argument("--model", metavar="MODULE:CALLABLE", help=about)
        about = f"the weights of a network without code; roles: {', '.join(MASSES)}"
        network.add_argument("--shapes", nargs="+", metavar="NAME=OxI:ROLE", help=about)
        about = "a module that registers norms for --rule; may be repeated"
        own.add_argument("--plugin", action="append", default=[], metavar="MODULE", help=about)
        about = "as metrize's rules: role, norm, mass, maps; may be repeated"
        where = "PATTERN,role=ROLE"
        own.add_argument("--rule", action="append", default=[], metavar=where, help=about)
        for key, setting in SETTINGS.items():
            if baseline in setting.baselines:
                own.add_argument(f"--{key.replace('_', '-')}", **setting.option)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the conversion that a command line asks for; return the exit code."""
    args = vars(_parser().parse_args(argv))
    spec, shapes, rules = args.pop("model"), args.pop("shapes"), args.pop("rule")
    try:
        load(args.pop("plugin"), option="--plugin")
        require(
            not (shapes and rules),
            "--rule",
            got="--shapes as well",
            allowed="with --model",
            fix="leave it out; --shapes names the roles",
        )
        model, rules = sketch(shapes) if shapes else (build(spec), [parsed(r) for r in rules])
        norm = metrize(model, rules=rules)
        print(convert(norm, args.pop("baseline"), **args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, CoverageError) and not shapes:
            print(HERE, file=sys.stderr)
        return 2
    for note in norm.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
