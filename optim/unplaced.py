"""Names by patterns, and the one error for all weights that have no place."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import takewhile

from .errors import CoverageError
from .module_types import MASSES
from .receipt import spelled
from .sites import Map, Site


def by_pattern(names: Iterable[str]) -> dict[str, list[str]]:
    """Return {pattern: names}: layers are one pattern, with * where they have their numbers."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    return {pattern if len(g) > 1 else g[0]: g for pattern, g in groups.items()}


def by_kind(sites: Mapping[str, Site], every: Iterable[str]) -> dict[str, list[str]]:
    """Return {pattern: names} of weights: those that look alike have one pattern, if it can be.

    every: the names of all weights of the model. A pattern matches none that it does not stand for;
    where that cannot be, each name stands for itself.
    """
    kinds: dict[tuple[str, str, int], list[str]] = {}
    for name, site in sites.items():
        own = "" if site.own.isdigit() else site.own  # of a ParameterList
        kinds.setdefault((site.kind, f"{site.label}.{own}", len(site.shape)), []).append(name)

    def is_exact(pattern: str, names: list[str]) -> bool:
        return {n for n in every if fnmatchcase(n, pattern)} == set(names)

    groups: dict[str, list[str]] = {}
    for names in kinds.values():
        one = f"{_common_start(names)}*{_common_start(n[::-1] for n in names)[::-1]}"
        layers = by_pattern(names)
        if len(layers) > 1 and is_exact(one, names):
            layers = {one: names}
        for pattern, alike in layers.items():
            groups |= {pattern: alike} if is_exact(pattern, alike) else {n: [n] for n in alike}
    return groups


def _common_start(texts: Iterable[str]) -> str:
    columns = takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in columns)


def summary(notes: Mapping[str, str]) -> list[str]:
    """Return one line for every note of a pattern of names: {name: note} → "pattern: note"."""
    lines = dict.fromkeys(
        f"{pattern}: {notes[name]}"
        for pattern, names in by_pattern(notes).items()
        for name in names
    )
    return list(lines)


def unplaced(sites: Mapping[str, Site], maps: Mapping[str, Map | None]) -> CoverageError:
    """Return the error that names all weights without a place, each group with a rule for it.

    The rules work as they are printed; what else the weights might be stands beside them.
    """
    weights, rules = [], []
    for pattern, names in by_kind(sites, maps).items():
        site, several = sites[names[0]], len(names) > 1
        weights.append(f"{pattern}, {spelled(site.shape)}, of a {site.kind}")
        weights[-1] += f", {len(names)} of them" if several else ""
        table = len(site.shape) > 2 and site.shape[0] == 1
        role = "embedding" if table else "hidden"
        rules.append(f"Rule({pattern!r}, role={role!r}),  # {_alternatives(site, maps[names[0]])}")
    return CoverageError(
        f"no place for {len(sites)} weight{'s' * (len(sites) > 1)}",
        got="\n    ".join(["weights that no type, shape or name tells", *weights]),
        allowed=f"a rule for each; the roles are {', '.join(MASSES)}",
        fix="\n    ".join(["metrize(model, rules=[", *rules]) + "\n  ]), or requires_grad=False."
        " Norms are in nanodual.norms, their views (Blocks, Experts, Transposed) in nanodual.views",
    )


def _alternatives(site: Site, own: Map | None) -> str:
    """Return what the printed rule makes of a weight, and what it might be else."""
    ndim, fused = site.weight.ndim, "Blocks(RMSToRMS(), (rows of each, …))"
    if own is not None and own.stored == "matrix":
        fused = f"Transposed({fused})" if own.transposed else fused
        return f"one map; several: norm={fused}, maps=…, head by head with turns=heads"
    if ndim > 2 and site.shape[0] == 1:
        return "rows of a table; maps (out, in): role='hidden'"
    if ndim == 3:
        return (
            f"{site.shape[0]} maps (out, in), of experts or groups; stored (in, out):"
            " norm=Experts(Transposed(RMSToRMS())); rows of a table: role='embedding'"
        )
    return (
        "maps (out, in); stored (in, out): norm=Transposed(RMSToRMS()); rows of a table:"
        " role='embedding'; numbers that multiply or add one by one: role='gain', role='bias'"
    )
