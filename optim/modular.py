"""The modular norm: masses, sensitivities and norms of modules, composed [MN].

A module has a mass (its share of feature learning), a sensitivity (Lipschitz constant in its input) and a norm on its weights.
Atoms hold one weight; bonds hold none and have mass 0; compounds derive theirs. Everything holds for well-normed modules: inputs of
norm at most 1, weights of norm at most 1. Sources: [MN] Large et al., arXiv 2405.14813, §3; [MD] arXiv 2410.21265, §5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .norms import Norm


@dataclass(frozen=True)
class Module:
    """A node of the tree. mass >= 0; sensitivity > 0; typical: the sensitivity is the gain at unit-RMS Gaussian input, not a bound."""

    mass: float = 0.0
    sensitivity: float = 1.0
    typical: bool = False

    def __matmul__(self, inner: Module) -> Module:
        """self after inner."""
        return Composite.of(self, inner)

    def __add__(self, other: Module) -> Module:
        """The sum of the outputs. Use convex weights to stay in the unit ball."""
        return bond("add") @ concat(self, other)

    def __mul__(self, scalar: float) -> Module:
        """The output times a scalar."""
        if scalar == 0:
            raise ValueError("a module times 0: got scalar 0; allowed: any other number; leave the module out instead")
        return bond(f"mul {scalar:g}", sensitivity=abs(scalar)) @ self

    __rmul__ = __mul__

    def __pow__(self, times: int) -> Module:
        """The module after itself, `times` times; the i-th copy has its atoms' last "{}" filled with i, counted from the input."""
        if not isinstance(times, int) or times < 1:
            raise ValueError(f"a module's power: got {times!r}; allowed: an integer of at least 1")
        power = self.numbered(0)
        for i in range(1, times):
            power = self.numbered(i) @ power
        return power

    def tare(self, mass: float) -> Module:
        """The same module with its total mass set to `mass`, shared as before."""
        if mass < 0 or (self.mass == 0 and mass > 0):
            raise ValueError(f"tare: got mass {mass:g} for a module of mass {self.mass:g}; allowed: mass >= 0, on a module that has some")
        return self.scaled(mass / self.mass if mass else 0.0)

    def scaled(self, factor: float) -> Module:
        """Every mass below times factor."""
        return replace(self, mass=self.mass * factor)

    def numbered(self, index: int) -> Module:
        return self

    def radii(self, target: float = 1.0) -> Iterator[tuple[Atom, float]]:
        """Each atom below with the radius that its update has when the whole module's has norm `target`."""
        return iter(())


@dataclass(frozen=True)
class Atom(Module):
    """One weight, by parameter name, with its norm."""

    name: str = ""
    norm: Norm = field(default_factory=Norm)
    role: str = ""

    def numbered(self, index: int) -> Atom:
        head, found, tail = self.name.rpartition("{}")
        return replace(self, name=head + str(index) + tail) if found else self

    def radii(self, target: float = 1.0) -> Iterator[tuple[Atom, float]]:
        yield self, target


def atom(name: str, norm: Norm, *, mass: float = 1.0, sensitivity: float = 1.0, role: str = "") -> Atom:
    """A weight: parameter name ("{}" is a layer number, filled by **), norm, mass, sensitivity on the unit ball."""
    if mass < 0:
        raise ValueError(f"mass of {name}: got {mass:g}; allowed: 0 (never updated) or more")
    return Atom(mass, sensitivity, name=name, norm=norm, role=role or name)


@dataclass(frozen=True)
class Bond(Module):
    """A map without weights."""

    label: str = "identity"


def bond(label: str, *, sensitivity: float = 1.0, typical: bool = False) -> Bond:
    """A map without weights: its Lipschitz constant on the unit ball or, marked typical, its gain at unit-RMS Gaussian input."""
    if not sensitivity > 0:
        raise ValueError(f"sensitivity of {label}: got {sensitivity:g}; allowed: more than 0")
    return Bond(0.0, sensitivity, typical, label)


@dataclass(frozen=True)
class Composite(Module):
    """outer after inner: m = m₁ + m₂, μ = μ₁ μ₂, ‖w‖ = max(μ₂ (m/m₁) ‖w₁‖, (m/m₂) ‖w₂‖), 1 = inner, 2 = outer [MN, Def. 3]."""

    outer: Module = field(default_factory=Module)
    inner: Module = field(default_factory=Module)

    @staticmethod
    def of(outer: Module, inner: Module) -> Composite:
        typical = outer.typical or inner.typical
        return Composite(outer.mass + inner.mass, outer.sensitivity * inner.sensitivity, typical, outer, inner)

    def scaled(self, factor: float) -> Module:
        return Composite.of(self.outer.scaled(factor), self.inner.scaled(factor))

    def numbered(self, index: int) -> Module:
        return Composite.of(self.outer.numbered(index), self.inner.numbered(index))

    def radii(self, target: float = 1.0) -> Iterator[tuple[Atom, float]]:
        share = target / self.mass if self.mass else 0.0
        yield from self.inner.radii(share * self.inner.mass / self.outer.sensitivity)
        yield from self.outer.radii(share * self.outer.mass)


@dataclass(frozen=True)
class Concat(Module):
    """Modules side by side on one input; the tuple of outputs has the sum norm: m = Σ m_k, μ = Σ μ_k, ‖w‖ = max (m/m_k) ‖w_k‖ [MN, Def. 4]."""

    children: tuple[Module, ...] = ()

    def scaled(self, factor: float) -> Module:
        return concat(*(c.scaled(factor) for c in self.children))

    def numbered(self, index: int) -> Module:
        return concat(*(c.numbered(index) for c in self.children))

    def radii(self, target: float = 1.0) -> Iterator[tuple[Atom, float]]:
        for child in self.children:
            yield from child.radii(target * child.mass / self.mass if self.mass else 0.0)


def concat(*children: Module) -> Concat:
    """The modules side by side on one input."""
    mass, sensitivity = sum(c.mass for c in children), sum(c.sensitivity for c in children)
    return Concat(mass, sensitivity, any(c.typical for c in children), children)


def residual(block: Module, depth: int) -> Module:
    """(1 − 1/depth) x + (1/depth) block(x): `depth` of them in a row have sensitivity 1 where the block has 1, and at most exp(μ − 1) where it has μ [MN]."""
    return block if depth == 1 else (1 - 1 / depth) * bond("identity") + (1 / depth) * block


@dataclass(frozen=True)
class ModularNorm:
    """The modular norm, resolved: ‖w‖ = max_k ‖w_k‖_k / radius_k over named tensors.

    norms, radii: by parameter name. roles, masses: for the receipt. Tensors left out of a mapping count as zero.
    """

    norms: dict[str, Norm]
    radii: dict[str, float]
    roles: dict[str, str] = field(default_factory=dict)
    masses: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @staticmethod
    def of(tree: Module) -> ModularNorm:
        """Walk the tree once."""
        resolved = ModularNorm({}, {})
        for node, radius in tree.radii():
            if node.name in resolved.norms:
                raise ValueError(f"the tree names {node.name!r} twice; allowed: once; use '{{}}' in names under **")
            resolved.norms[node.name], resolved.radii[node.name] = node.norm, radius
            resolved.roles[node.name], resolved.masses[node.name] = node.role, node.mass
        return resolved

    def norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """max_k ‖w_k‖_k / radius_k (0-dim); infinite where a tensor of radius 0 is not zero."""
        sizes = {k: self.norms[k].norm(w) for k, w in self._checked(tensors)}
        return (
            torch.stack([torch.where(size > 0, size / self.radii[k], 0.0) for k, size in sizes.items()]).amax()
            if sizes
            else torch.zeros(())
        )

    def dual_norm(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Σ_k radius_k ‖g_k‖_k† (0-dim)."""
        parts = [self.radii[k] * self.norms[k].dual_norm(g) for k, g in self._checked(grads)]
        return torch.stack(parts).sum() if parts else torch.zeros(())

    def dualize(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """radius_k · dualize_k(g_k): a step of modular norm 1 that attains the dual norm."""
        return {k: self.radii[k] * self.norms[k].dualize(g) for k, g in self._checked(grads)}

    def normalize(self, updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """radius_k · u_k / ‖u_k‖_k: every tensor of any optimizer's update at its full share of modular norm 1 [MN]; 0 stays 0."""
        out = {}
        for k, u in self._checked(updates):
            size = self.norms[k].norm(u)
            out[k] = u / torch.where(size > 0, size, 1).to(u.dtype) * self.radii[k]
        return out

    def receipt(self) -> str:
        """A table: parameter, shape, role, norm, mass, radius (the modular norm's share of one step at lr 1)."""
        rows = [("parameter", "shape", "role", "norm", "mass", "radius")]
        for name, norm in self.norms.items():
            shape = "×".join(map(str, self.shapes.get(name, ()))) or "?"
            rows.append((name, shape, self.roles.get(name, ""), str(norm), f"{self.masses.get(name, 0):.6g}", f"{self.radii[name]:.6g}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows) + "\n"

    def _checked(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            if name not in self.norms:
                raise ValueError(f"no norm for {name!r}; allowed: {', '.join(self.norms)}")
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"{name} has entries that are not finite; allowed: finite numbers")
            yield name, tensor


class NonFiniteError(ValueError):
    """A NaN or an infinity, with the name of its tensor."""
