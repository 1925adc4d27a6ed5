"""From a model to its modular norm: the structure it declares, resolved onto its parameters, each assigned exactly once.

The receipt of the result is ModularNorm.receipt().
"""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import nn

from .modular import ModularNorm, Module

WRAPPERS = ("_orig_mod.", "module.", "_checkpoint_wrapped_module.")  # torch.compile, DataParallel, activation checkpointing


class CoverageError(ValueError):
    """A parameter without a place in the structure, or a place without a parameter."""


def canonical(name: str) -> str:
    """A parameter's name without the prefixes that torch's wrappers add."""
    parts = name.split(".")
    return ".".join(p for p in parts if f"{p}." not in WRAPPERS)


def check_distinct(names: Iterable[str]) -> None:
    """Raise CoverageError for a name that stands twice."""
    twice = [n for n, count in Counter(names).items() if count > 1]
    if twice:
        raise CoverageError(
            f"two parameters are named {twice[0]!r}\n  got: one name twice, wrappers' prefixes taken off\n  allowed: one name a parameter\n  fix: rename one"
        )


def metrize(model: nn.Module, structure: Module | None = None) -> ModularNorm:
    """The modular norm of a model, by canonical parameter names.

    structure: the tree; by default what model.structure() returns. Every trainable parameter must be named by exactly one atom.
    Raises CoverageError, and names it, for a parameter that is missing, tied to another, of the wrong number of dimensions or empty, and for an atom without a parameter.
    """
    if structure is None:
        declare: Callable[[], Module] | None = getattr(getattr(model, "_orig_mod", model), "structure", None)
        if declare is None:
            raise CoverageError(
                f"{type(model).__name__} declares no modular structure\n  got: no structure, and a model without a structure() method\n"
                "  allowed: a tree of atoms and bonds that names every trainable parameter once\n  fix: metrize(model, structure=tree)"
            )
        structure = declare()
    found = ModularNorm.of(structure)
    names = [canonical(n) for n, _ in model.named_parameters()]
    check_distinct(names)
    shapes: dict[str, tuple[int, ...]] = {}
    owner: dict[int, str] = {}
    for full_name, p in model.named_parameters(remove_duplicate=False):
        name = canonical(full_name)
        if p.data_ptr() and owner.setdefault(p.data_ptr(), name) != name:
            raise CoverageError(
                f"{name} shares its storage with {owner[p.data_ptr()]}\n  got: one tensor in two roles\n"
                "  allowed: one role a tensor\n  fix: untie them, or give each its own parameter"
            )
        if not p.requires_grad:
            continue
        norm = found.norms.get(name)
        if norm is None:
            raise CoverageError(
                f"{name} {tuple(p.shape)} has no place in the modular structure{_nearest(name, found.norms)}\n"
                "  allowed: every trainable parameter named by exactly one atom\n  fix: add an atom for it, or freeze it (requires_grad=False)"
            )
        if p.ndim != norm.ndim or not p.numel():
            raise CoverageError(f"{name}: got shape {tuple(p.shape)}; allowed by {norm}: {norm.ndim} dimensions, none of them 0")
        shapes[name] = tuple(p.shape)
    absent = sorted(found.norms.keys() - {canonical(n) for n, _ in model.named_parameters(remove_duplicate=False)})
    if absent:
        raise CoverageError(f"the structure names {absent[0]!r}, which the model does not have{_nearest(absent[0], names)}")
    kept = {f: {k: v for k, v in getattr(found, f).items() if k in shapes} for f in ("norms", "radii", "roles", "masses")}
    return replace(found, shapes=shapes, **kept)


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (nearest: {close[0]!r})" if close else ""
