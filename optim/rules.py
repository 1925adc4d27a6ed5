"""A user's decisions on single weights of a model."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import inf
from numbers import Real
from typing import Any

from .errors import CoverageError, nearest, require
from .norms import NORMS, Norm


@dataclass(frozen=True)
class Rule:
    """A user's decision on the parameters whose name matches; None leaves the default.

    pattern: as of file names, with * and ?. norm: a Norm, or a name in NORMS. mass: of each
    matching weight, beside the totals in MASSES. role: a key of MASSES, which brings its norm, or a
    name of your own. maps: how many maps the weight holds, each with a share of the role's mass, 3
    for fused queries, keys and values. Without a norm they are equal blocks of rows; a norm of your
    own has to have them. On a declared structure a rule changes norm, mass and the role's name.
    """

    pattern: str
    norm: Norm | str | None = None
    mass: float | None = None
    role: str | None = None
    maps: int | None = None

    def __post_init__(self) -> None:
        norm, mass, maps = self.norm, self.mass, self.maps
        typed, named = norm is None or isinstance(norm, str | Norm), not isinstance(norm, str)
        weighed = mass is None or (isinstance(mass, Real) and 0 <= mass < inf)
        whole = isinstance(maps, int) and not isinstance(maps, bool)
        counted = maps is None or (whole and maps >= 1)
        text = isinstance(self.pattern, str)
        nearest_norm = nearest(str(norm), NORMS, otherwise="one of those, or a Norm")
        for field, fine, allowed, fix in (
            ("pattern", text, "a text", "Rule('lm_head.weight', …)"),
            ("norm", typed, "a Norm, or a name in NORMS", "RMSToRMS(), with brackets, say"),
            ("norm", named or norm in NORMS, ", ".join(NORMS), nearest_norm),
            ("mass", weighed, "0 (never updated) or more", "Rule(…, mass=1)"),
            ("maps", counted, "1 or more", "Rule(…, maps=3)"),
        ):
            what, got = f"rule {self.pattern!r}", f"{field} {getattr(self, field)!r}"
            require(fine, what, got=got, allowed=allowed, fix=fix, error=CoverageError)
        if isinstance(norm, str):
            object.__setattr__(self, "norm", NORMS[norm]())

    def matches(self, *names: str) -> bool:
        """Return whether one of the names of a weight matches."""
        return any(name == self.pattern or fnmatchcase(name, self.pattern) for name in names)


def as_rule(rule: Any) -> Rule:
    """Return a rule that may be a mapping of its fields. Raises CoverageError for others."""
    if isinstance(rule, Rule):
        return rule
    fix = "Rule('lm_head.weight', role='head'), say"
    try:
        return Rule(**rule)
    except TypeError as error:
        allowed = f"a Rule, or a mapping of {', '.join(Rule.__dataclass_fields__)}"
        raise CoverageError("rule", got=repr(rule), allowed=allowed, fix=fix) from error


def check_rules(rules: list[Rule], names: list[str]) -> None:
    """Raise CoverageError for a rule that decides nothing."""
    left = list(names)
    for rule in rules:
        if not any(map(rule.matches, left)):
            shadowed = any(map(rule.matches, names))
            raise CoverageError(
                f"rule {rule.pattern!r}",
                got="a pattern that matches only parameters that earlier rules have taken"
                if shadowed
                else f"a pattern that matches no parameter{nearest_name(rule.pattern, names)}",
                allowed="one that decides something",
                fix="correct it, move it up, or leave it out",
            )
        left = [name for name in left if not rule.matches(name)]


def nearest_name(name: str, names: Iterable[str]) -> str:
    """Return the nearest of these names in words that follow the name, "" where none is near."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (nearest: {close[0]!r})" if close else ""
