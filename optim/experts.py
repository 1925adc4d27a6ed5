"""Experts of a mixture: weights in a stack (E, …), and modules in a list.

E: experts; O, I: fan-out and fan-in of each.
"""

import re
from typing import Any

from torch import nn

from .families import number
from .fused import ONE, Division
from .sites import Map, Site

# Names of a module or a weight that may be a stack, of a list of modules, of the class of one.
STACKED = re.compile(r"expert|moe|switch", re.IGNORECASE)
LISTED = re.compile(r"experts?$", re.IGNORECASE)
ONE_EXPERT = re.compile(r"Expert(?!s)")


def is_stack(site: Site) -> bool:
    """Return whether a weight of a module of its own is a stack of experts (E, …)."""
    counts = number(site.module, "num_experts", "num_local_experts", "n_experts")
    names = site.kind, site.label, site.own
    return counts == site.shape[0] or any(STACKED.search(name) for name in names)


def experts_around(site: Site) -> int:
    """Return how many experts stand side by side in the list that a weight is in, else 1."""
    lists = (module for path, module in site.parents[1:] if is_list(path, module))
    return next((len(module) for module in lists), 1)  # type: ignore[arg-type]


def routes(site: Site, outputs: int) -> bool:
    """Return whether a map beside so many experts has one output for each: their router."""
    around = site.parents[1:3] if site.own == "weight" else site.parents[:2]
    for path, parent in around:
        for below, module in parent.named_modules(prefix=path):
            if is_list(below, module) and len(module) == outputs:  # type: ignore[arg-type]
                return True
            named = STACKED.search(type(module).__name__) or STACKED.search(
                below.rpartition(".")[2]
            )
            stacks = (p for p in module._parameters.values() if p is not None and p.ndim == 3)
            if named and any(len(p) == outputs for p in stacks):
                return True
    return False


def is_list(path: str, module: nn.Module) -> bool:
    """Return whether a module is a list of experts, by its name or that of their class."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or len(module) < 2:
        return False
    kind = type(next(iter(module.children())))
    named = LISTED.search(path) or ONE_EXPERT.search(kind.__name__)
    return bool(named) and all(type(child) is kind for child in module.children())


def stack(site: Site) -> Map | None:
    """Return a stack of experts as a map, None where nothing says which dimension is which."""
    _, a, b = site.shape
    transposed = getattr(site.module, "is_transposed", None)
    if transposed is None:
        transposed = _is_stored_as_columns(site)
    if transposed is None and a == b:
        transposed = False  # the norm of a square map is that of its transpose
    if transposed is None:
        return None
    return Map(b, a, "stack", True) if transposed else Map(a, b, "stack")


def _is_stored_as_columns(site: Site) -> bool | None:
    """Return whether a stack of experts is stored (E, in, out), None where nothing tells it.

    Told by the module's own sizes, by its other stacks, which read what this one writes or write
    what it reads (whole, or a gated half), and by the fan-in of a router with E outputs.
    """
    E, a, b = site.shape
    module, rows, columns = site.module, False, False
    for i, o in (("input_size", "output_size"), ("in_features", "out_features")):
        sizes = getattr(module, i, None), getattr(module, o, None)
        rows, columns = rows or sizes == (b, a), columns or sizes == (a, b)
    shapes = [tuple(p.shape[1:]) for p in _stacks(site).values()]
    others = list(shapes)
    others.remove((a, b))
    for c, d in others:
        rows |= (b == c and a in (d, 2 * d)) or (d == a and c in (b, 2 * b))
        columns |= (a == d and b in (c, 2 * c)) or (c == b and d in (a, 2 * a))
    if rows == columns and others:
        maps = (p for _, m in site.parents[1:3] for p in m.parameters() if p.ndim == 2)
        widths = {p.shape[1] for p in maps if p.shape[0] == E}
        # The last of two, and the odd one of three (w1, w2, w3), writes to the residual stream.
        last = list(_stacks(site))[-1] == site.own
        writes = shapes.count((a, b)) == 1 if len(set(shapes)) < len(shapes) else last
        rows, columns = (a in widths, b in widths) if writes else (b in widths, a in widths)
    return None if rows == columns else columns


def _stacks(site: Site) -> dict[str, Any]:
    """Return the stacks of weights of a weight's module, by name."""
    parameters = site.module._parameters.items()
    return {n: p for n, p in parameters if p is not None and p.ndim == 3}


def divide_stack(site: Site, own: Map) -> tuple[Division, str]:
    """Return how the rows of every expert are divided, and what of it was guessed."""
    if "gate_up" in site.own or "up_gate" in site.own:
        known = getattr(site.module, "has_gate", None) is not None
        note = f"gates, then what they gate, by its name ({site.own})"
        return halves(site, own.O), "" if known else note
    shapes = [p.shape for p in _stacks(site).values() if p is not site.weight]
    fan_ins = {shape[1] if own.transposed else shape[2] for shape in shapes}
    fan_ins |= {m.input_size for m in _beside(site) if hasattr(m, "input_size")}
    if own.O not in fan_ins and own.O % 2 == 0 and own.O // 2 in fan_ins:
        return (2, 1), f"2 maps fused in every expert: {own.O // 2} of its {own.O} outputs are read"
    return ONE, ""


def halves(site: Site, rows: int) -> Division:
    """Return how gates and what they gate stand in the rows of an expert."""
    return (2, 1) if getattr(site.module, "is_concatenated", True) else ((1, 1), rows // 2)


def _beside(site: Site) -> list[Any]:
    """Return the modules of the same class in the module around a weight's own."""
    if len(site.parents) < 2:
        return []
    children = site.parents[1][1].children()
    return [m for m in children if type(m) is type(site.module) and m is not site.module]
