"""Objects of a run as the code that makes them."""

import enum
import inspect
import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from optim.polar import Polar

from .specialise import ExportError


class Expressions:
    """Writes objects as code. named: what that code names, {name: its module}."""

    def __init__(self, polar: Polar) -> None:
        """Take the polar factor that the script has under the name POLAR."""
        self.polar, self.named = polar, {}

    def of(self, value: Any) -> str:
        """Return the code of an object: a literal, or an instance of a class, with options.

        Raises ExportError for what no such code makes.
        """
        if isinstance(value, float) and not math.isfinite(value):
            return f"float('{value}')"
        if value is None or type(value) in (bool, int, float, str, bytes):
            return repr(value)
        if type(value) in (tuple, list, set, frozenset, dict):
            return self._collection(value)
        if isinstance(value, torch.dtype):
            return repr(value)
        if isinstance(value, enum.Enum):
            return f"{self.name(type(value))}.{value.name}"
        if inspect.isclass(value) or inspect.isfunction(value):
            return self.name(value)
        return "POLAR" if alike(value, self.polar) else self._instance(value)

    def name(self, definition: Any) -> str:
        """Return the name of a class or a function, which is noted."""
        name, module = definition.__qualname__, definition.__module__
        if getattr(sys.modules[module], name, None) is not definition:
            raise ExportError(
                f"{module}.{name} in a script",
                got="a definition that does not stand at the top level of its file",
                allowed="def NAME or class NAME at the top level",
                fix="move it there, under the name that it has",
            )
        if self.named.setdefault(name, module) != module:
            got, allowed = f"one of {self.named[name]} and one of {module}", "one of a name"
            raise ExportError(f"{name} in a script", got=got, allowed=allowed, fix="rename one")
        return name

    def _collection(self, value: Any) -> str:
        if isinstance(value, dict):
            pairs = (f"{self.of(k)}: {self.of(v)}" for k, v in value.items())
            return f"{{{', '.join(pairs)}}}"
        parts, kind = [self.of(v) for v in value], type(value).__name__
        if isinstance(value, tuple):
            return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
        text = f"[{', '.join(parts)}]"
        return text if isinstance(value, list) else f"{kind}({text})"

    def _instance(self, value: Any) -> str:
        cls = type(value)
        options = arguments(value)
        try:
            again = cls(**options)
        except Exception as error:
            raise _unmade(value, f"{type(error).__name__}: {error}") from error
        if not alike(again, value):
            raise _unmade(value, "attributes that its constructor's arguments do not give it")
        code = ", ".join(f"{k}={self.of(v)}" for k, v in options.items())
        return f"{self.name(cls)}({code})"


def _unmade(value: Any, got: str) -> ExportError:
    """Return the error for an object that its class does not make again."""
    return ExportError(
        f"an object of {type(value).__module__}.{type(value).__qualname__} in a script",
        got=got,
        allowed="a frozen dataclass, or a class that keeps each argument under its own name",
        fix="keep the constructor's arguments as attributes, and set no others from outside",
    )


def arguments(value: Any) -> dict[str, Any]:
    """Return the arguments that make an object again, without those at their defaults.

    They are the fields of a dataclass. Of another class they are the attributes that have the names
    of the constructor's parameters.
    """
    if is_dataclass(value):
        defaults = {f.name: f.default for f in fields(value) if f.init}
    else:
        by_name = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = inspect.signature(type(value)).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.kind in by_name}
        defaults = {k: d for k, d in defaults.items() if k in vars(value)}
    given = {k: getattr(value, k) for k in defaults}
    return {k: v for k, v in given.items() if not _equal(v, defaults[k])}


def alike(a: Any, b: Any) -> bool:
    """Return whether two objects are of one type and have equal attributes."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(alike(v, b[k]) for k, v in a.items())
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(alike, a, b))
    if inspect.isclass(a) or inspect.isroutine(a) or not hasattr(a, "__dict__"):
        return _equal(a, b)
    return alike(vars(a), vars(b))


def _equal(a: Any, b: Any) -> bool:
    if a is MISSING or b is MISSING:
        return False
    try:
        return bool(a == b)
    except Exception:  # of a tensor, or of a comparison that is a user's own
        return a is b
