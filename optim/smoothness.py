"""Bounds on second derivatives of modules, composed: (α, β, γ) in (w, w), (w, x) and (x, x).

They hold in the modules' own norms, on the unit balls of weights w and inputs x.
Source: [MN] Large et al., arXiv 2405.14813, §3.3 and Prop. 6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .modular import Module

Sharpness = tuple[float, float, float]


def sharpness_after(outer: Module, inner: Module) -> Sharpness | None:
    """Return (α, β, γ) of outer ∘ inner, or None where one has none; 1 = inner, 2 = outer."""
    if outer.sharpness is None or inner.sharpness is None:
        return None
    (a1, b1, c1), (a2, b2, c2) = inner.sharpness, outer.sharpness
    mass = inner.mass + outer.mass
    p1, p2 = (inner.mass / mass, outer.mass / mass) if mass else (0.0, 0.0)
    q = p1 / outer.sensitivity if p1 else 0.0  # of the outer's input, under a step of norm 1
    return (
        p1 * q * a1 + p2 * p2 * a2 + 2 * p2 * q * b2 + q * q * c2,
        p1 * b1 + inner.sensitivity * (p2 * b2 + q * c2),
        outer.sensitivity * c1 + inner.sensitivity**2 * c2,
    )


def sharpness_beside(*children: Module) -> Sharpness | None:
    """Return (α, β, γ) of modules side by side on one input, or None where one has none."""
    mass = sum(child.mass for child in children)
    bounds = [(child.mass / mass if mass else 0.0, child.sharpness) for child in children]
    declared = [(p, *sharpness) for p, sharpness in bounds if sharpness is not None]
    if len(declared) < len(children):
        return None
    return (
        sum(p * p * a for p, a, _, _ in declared),
        sum(p * b for p, _, b, _ in declared),
        sum(c for *_, c in declared),
    )
