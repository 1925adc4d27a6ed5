"""Every setting of a dualized step, declared once: its type, range, default, and what it does.

All other lists are derived from here: the signature and the checks of Dualized, the section [optim]
of a configuration and its --help, what a resumed run may change, what an exported script carries,
and docs/settings.md. To add a setting: declare it in StepSettings, and use it.
"""

import ast
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from functools import cache, partial
from itertools import pairwise
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from .directions import DIRECTIONS
from .errors import Refusal, nearest, require


@dataclass(frozen=True)
class Range:
    """The finite numbers from low up to high, high not included.

    above: low is not included either. closed: high is included.
    """

    low: float = 0
    high: float = math.inf
    above: bool = False
    closed: bool = False

    def __contains__(self, x: float) -> bool:
        over = x > self.low if self.above else x >= self.low
        return over and (x <= self.high if self.closed else x < self.high) and abs(x) < math.inf

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"a finite number {'>' if self.above else '>='} {self.low:g}"
        over, under = "<" if self.above else "<=", "<=" if self.closed else "<"
        mantissa, exponent = math.frexp(self.high)
        power = mantissa == 0.5 and exponent > 20  # 2**63 rather than 9.22337e+18
        high = f"2**{exponent - 1}" if power else f"{self.high:g}"
        return f"a number x with {self.low:g} {over} x {under} {high}"


@dataclass(frozen=True)
class OneOf:
    """The names in a registry. What is registered later counts."""

    registry: Mapping[str, Any] = field(hash=False)

    def __contains__(self, name: str) -> bool:
        return name in self.registry

    def __str__(self) -> str:
        return ", ".join(f'"{name}"' for name in self.registry)


@dataclass(frozen=True)
class Help:
    """The text of a setting that no text can stand under: of a parameter in a signature."""

    text: str


PLURALS = {"a finite number": "finite numbers", "a number": "numbers", "an integer": "integers"}
BY_ROLE = "by role"  # marks what [optim.roles.<role>] may set for the weights of one role
BUFFERS = "buffers"  # marks what decides which tensors a checkpoint has


@dataclass(kw_only=True)
class StepSettings:
    """How Dualized steps a group of parameters. Groups may differ in all but lr = "auto"."""

    lr: Annotated[float | Literal["auto"], Range(0)] = 1.0
    """Modular norm of one step, at the top of the schedule and before decay, in the coordinates of
    the direction. "auto" finds it while training (EscapeVelocity): a group's lr is then a
    multiplier of it. It is for runs of 500 steps or more: after 50 steps three of seven small
    models stood at 0.1. Baselines: their own lr."""

    direction: Annotated[str, OneOf(DIRECTIONS), BY_ROLE, BUFFERS] = "factored"
    """The direction that is dualized, by name (optim/directions.py, optim/whitening.py).
    "nesterov" is the average gradient, one step ahead. "factored" has it in coordinates in which
    rows and columns of gradients have equal mean squares, and keeps one buffer a weight."""

    beta: Annotated[float, Range(0, 1), BY_ROLE] = 0.95
    """Decay of the average of gradients, their momentum: 0.95 remembers about 20 steps."""

    beta2: Annotated[float, Range(0, 1), BY_ROLE] = 0.99
    """Decay of the average of squares in adam, soap, factored and whitened; of lion's average."""

    refresh_every: Annotated[int, Range(1)] = 10
    """Steps between two of soap's eigenbases, and of whitened's roots."""

    weight_decay: Annotated[float, Range(0), BY_ROLE] = 0.0
    """Decoupled and scaled by the radius: every weight tends to norm 1/weight_decay at most."""

    cautious: bool = False
    """Decay only the entries that the step makes smaller anyway (Chen et al., arXiv 2510.12402);
    the bound 1/weight_decay is then none."""

    constraint: Literal["ball", "sphere", "stiefel"] | None = None
    """Keep each weight at norm at most 1 ("ball"), at norm 1 ("sphere"), or all its singular values
    at full size ("stiefel", for spectral norms). Vectors and scalars are kept in the ball."""

    scale: Literal["unit", "dual"] = "unit"
    """"unit": steps of norm lr. "dual": that times each weight's dual norm, as steepest descent."""

    max_grad_norm: Annotated[float, Range(0, above=True)] | None = None
    """Clip the 2-norm of a group's raw gradients to this. Steps are never clipped."""

    momentum_dtype: Annotated[Literal["float32", "bfloat16"] | None, BUFFERS] = None
    """Dtype of buffers, by default the weight's. bfloat16 stalls beta above 0.99."""

    master_weights: Annotated[bool, BUFFERS] = True
    """Keep 16-bit weights in float32 besides, and step there."""


def settings_class(
    name: str,
    doc: str | None,
    declared: Mapping[str, tuple[Any, Any, str]],
    *,
    module: str,
    bases: tuple[type, ...] = (),
) -> type:
    """Return a class of settings, made of {setting: (type, default, help text)}.

    module: where it is made. bases: classes whose settings it has besides.
    """
    rows = [
        (key, Annotated[hint, Help(text)], field(default_factory=partial(copy, default)))
        if isinstance(default, list)
        else (key, Annotated[hint, Help(text)], field(default=default))
        for key, (hint, default, text) in declared.items()
    ]
    namespace = {"__doc__": doc, "__module__": module}
    return make_dataclass(name, rows, kw_only=True, bases=bases, namespace=namespace)


def extended(base: type, declared: Mapping[str, tuple[Any, Any, str]]) -> type:
    """Return a class of settings with those declared besides; the class itself if it has them."""
    names = {f.name for f in fields(base)}
    more = {key: row for key, row in declared.items() if key not in names}
    if not more:
        return base
    module, bases = base.__module__, (base,)
    return settings_class(base.__name__, base.__doc__, more, module=module, bases=bases)


def hints_of(cls: type) -> dict[str, Any]:
    """Return {setting: its type with range and marks}."""
    return get_type_hints(cls, include_extras=True)


def defaults_of(cls: type) -> dict[str, Any]:
    """Return {setting: default}, without those that have none."""
    return {
        f.name: f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc]
        for f in fields(cls)
        if f.default is not MISSING or f.default_factory is not MISSING
    }


def marked(cls: type, mark: str) -> list[str]:
    """Return the settings that have this mark."""
    return [k for k, hint in hints_of(cls).items() if mark in getattr(hint, "__metadata__", ())]


def by_role(cls: type = StepSettings) -> list[str]:
    """Return the settings that a role may have of its own."""
    return marked(cls, BY_ROLE)


def fits(hint: Any, value: Any) -> bool:
    """Return whether a value has the type, the range and the registry that a hint names."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind: Any = OneOf if isinstance(value, str) else Range
        marks: list[Any] = [m for m in args[1:] if isinstance(m, kind)]
        free = any(get_origin(a) is Literal for a in (args[0], *get_args(args[0])))
        named = isinstance(value, str) and free  # a word beside a number: "auto"
        return fits(args[0], value) and (named or all(value in m for m in marks))
    if origin in (Union, UnionType):
        return any(fits(a, value) for a in args)
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in args)
    numbers = {float: Real, int: Integral}  # NumPy's, too
    if hint in numbers:
        return (
            isinstance(value, numbers[hint]) and type(value) is not bool and abs(value) < math.inf
        )
    if origin is list:
        return isinstance(value, list) and all(fits(args[0], item) for item in value)
    return hint is Any or (isinstance(hint, type) and isinstance(value, hint))


def allowed(hint: Any) -> str:
    """Return what a hint allows, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        marks = [str(m) for m in args[1:] if isinstance(m, Range | OneOf)]
        words = [allowed(a) for a in get_args(args[0]) if get_origin(a) is Literal]
        text = " or ".join([*marks, *words]) if marks else allowed(args[0])
        for number in ("a finite number", "a number") if args[0] is int else ():
            text = text.replace(number, "an integer")
        return text
    if origin in (Union, UnionType):
        kinds = [a for a in args if a is not NoneType]
        words = [w for a in kinds for w in (("true", "false") if a is bool else (allowed(a),))]
        text = " or ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])
        if len(kinds) == len(args):
            return text
        return f"{text}; or left out" if "," in text or " or " in text else f"{text} or left out"
    if origin is Literal:
        return ", ".join(f'"{a}"' for a in args)
    if origin is list:
        items = allowed(args[0])
        for one, many in PLURALS.items():
            items = items.replace(one, many)
        return f"a list of {items}" + ', as ["a", "b"]' * (args[0] is str)
    words = {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}
    if not isinstance(hint, type):
        return "a type of TOML: float, int, bool, str, Literal, list[…]"
    return words.get(hint, "left out" if hint is NoneType else str(hint))


def wrong(cls: type, values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield (setting, value, what is allowed) of each value that its declaration in cls refuses."""
    for key, hint in hints_of(cls).items():
        if key in values and not fits(hint, values[key]):
            yield key, values[key], allowed(hint)


def choices(hint: Any) -> list[str]:
    """Return the names of the registry that a hint names, none where it names no registry."""
    marks = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, OneOf)]
    names = [name for m in marks for name in m.registry]
    return names + [name for part in get_args(hint) for name in choices(part)]


def nearest_choice(hint: Any, value: Any, *, otherwise: str) -> str:
    """Return how to fix a value that a hint refuses: the nearest name of its registry, if any."""
    return nearest(value, choices(hint), otherwise=otherwise) if type(value) is str else otherwise


def check(cls: type, values: Mapping[str, Any], *, owner: str) -> None:
    """Raise Refusal for the first value that cannot be. owner: whose argument it is, "Dualized"."""
    for key, value, words in wrong(cls, values):
        fix = nearest_choice(hints_of(cls)[key], value, otherwise=f"{owner}(…, {key}=…)")
        raise Refusal(f"{owner}: {key}", got=repr(value), allowed=words, fix=fix)


def known(owner: str, given: Iterable[str], names: Iterable[str]) -> None:
    """Raise Refusal for the first that is none of these names. owner: who was given it."""
    names = list(names)
    meant = {
        "rules": "norm=metrize(model, rules=…)",
        "momentum": "it is beta",
        "betas": "they are beta and beta2",
        "wd": "it is weight_decay",
    }
    for key in given:
        require(
            key in names,
            f"{owner}: {key}",
            got="no such setting",
            allowed=", ".join(names),
            fix=meant.get(key) or nearest(key, names, otherwise="leave it out"),
        )


@cache
def help_texts(cls: type) -> dict[str, str]:
    """Return {setting: the text under it, or its Help}, of a dataclass and its bases."""
    texts = {
        key: mark.text
        for key, hint in hints_of(cls).items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, Help)
    }
    for base in reversed(cls.__mro__[:-1]):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except OSError:  # a class that was made, and stands in no file
            continue
        body: list[ast.stmt] = tree.body  # type: ignore[attr-defined]
        for node, after in pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
                texts[ast.unparse(node.target)] = inspect.cleandoc(ast.literal_eval(after.value))
    return texts


def takes(cls: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a function of **settings the signature of a class of settings.

    inspect.signature() and help() then show each one's type and default; their ranges are checked
    where they are used.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        plain = inspect.signature(function)
        kept = [p for p in plain.parameters.values() if p.kind is not p.VAR_KEYWORD]
        declared = [
            inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v, annotation=hint)
            for (k, v), hint in zip(
                defaults_of(cls).items(), get_type_hints(cls).values(), strict=True
            )
            if k not in plain.parameters
        ]
        vars(function)["__signature__"] = plain.replace(parameters=[*kept, *declared])
        return function

    return decorate
