"""The receipt: a table of the norm, mass and radius that each weight was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .modular import ModularNorm


def receipt(norm: ModularNorm) -> str:
    """Return a table of a norm's weights, and its notes.

    Columns: parameter, shape, role, norm, mass, radius (the weight's share of a step of modular
    norm 1), and the RMS of the entries of that step.
    """
    rows: list[tuple[str, ...]] = [
        ("parameter", "shape", "role", "norm", "mass", "radius", "update RMS")
    ]
    for name, own in norm.norms.items():
        words = name, spelled(norm.shapes.get(name)), norm.roles.get(name, ""), str(own)
        numbers = norm.masses.get(name, 0), norm.radii[name], norm.update_rms(name)
        rows.append((*words, *map(figure, numbers)))
    return "\n".join([*aligned(rows), *(f"note: {note}" for note in norm.notes)]) + "\n"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return one line a row: cells in columns, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def spelled(shape: Sequence[int] | None) -> str:
    """Return a shape as a table spells it: "3072×768", "scalar", or "?" where it is not known."""
    return "?" if shape is None else "×".join(map(str, shape)) or "scalar"


def figure(value: float | None, digits: int = 4) -> str:
    """Return a number as a table spells it, or "?" where it is not known."""
    return "?" if value is None else f"{value:.{digits}g}"
