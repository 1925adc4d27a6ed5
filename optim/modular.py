"""The modular norm: masses, sensitivities and norms of modules, composed [MN].

A module has a mass (its share of feature learning), a sensitivity (its Lipschitz constant in the
input) and a norm on its weights. Atoms hold one weight. Bonds hold none and have mass 0. Compounds
derive theirs. Everything holds for well-normed modules: inputs of norm at most 1, weights of norm
at most 1. Tuples carry the sum of their members' norms.
Sources: [MN] Large et al., arXiv 2405.14813, §3; [OO] Bernstein, Newhouse, arXiv 2409.20325.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .errors import NonFiniteError, require
from .norms import Norm
from .receipt import receipt
from .smoothness import Sharpness, sharpness_after, sharpness_beside


@dataclass(frozen=True, kw_only=True)
class Module:
    """A node of the tree. str() draws it in the order of the forward pass.

    mass: 0 or more. sensitivity: 0 or more. typical: the sensitivity is the gain at unit-RMS
    Gaussian input, and no bound. sharpness: (α, β, γ), or None where a bond below does not declare
    its own. undeclared: the labels of those bonds.
    """

    mass: float = 0.0
    sensitivity: float = 1.0
    typical: bool = False
    sharpness: Sharpness | None = (0.0, 0.0, 0.0)
    undeclared: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[Module, ...]:
        """Return the modules that this one is made of, in the order of the forward pass."""
        return ()

    def of_parts(self, *parts: Module) -> Module:
        """Return this compound of other parts."""
        return self

    def targets(self, target: float) -> tuple[float, ...]:
        """Return the norm of each part's update, where the whole module's has norm `target`."""
        return ()

    def mapped(self, change: Callable[[Atom], Module]) -> Module:
        """Return the same tree with every atom replaced by change(atom)."""
        return self.of_parts(*(part.mapped(change) for part in self.parts))

    def unrolled(self) -> Module:
        """Return the same tree without powers, every atom by its full name."""
        return self.of_parts(*(part.unrolled() for part in self.parts))

    def radii(self, target: float = 1.0) -> Iterator[tuple[Atom, float]]:
        """Yield each atom below with the norm of its update, where the whole's is `target`."""
        for part, share in zip(self.parts, self.targets(target), strict=True):
            yield from part.radii(share)

    def __matmul__(self, inner: Module) -> Module:
        """Return self after inner."""
        return Composite.of(self, inner)

    def __add__(self, other: Module) -> Module:
        """Return the sum of the outputs. Use convex weights to stay in the unit ball."""
        return bond("add", sharpness=0) @ concat(self, other)

    def __mul__(self, scalar: float) -> Module:
        """Return the output times a scalar."""
        require(
            scalar != 0,
            "a module times 0",
            got="scalar 0",
            allowed="any other number",
            fix="leave the module out instead",
        )
        return bond(f"× {scalar:.4g}", sensitivity=abs(scalar), sharpness=0) @ self

    __rmul__ = __mul__

    def __pow__(self, times: int) -> Module:
        """Return the module `times` times in a row; the i-th copy fills "{}" in names with i."""
        require(
            isinstance(times, int) and times >= 1,
            "a module's power",
            got=repr(times),
            allowed="an integer of at least 1",
            fix="module ** 1 is the module itself",
        )
        return Power.of(self, times)

    def tare(self, mass: float) -> Module:
        """Return the same module with its total mass set to `mass`, shared as before."""
        require(
            mass == 0 or (mass > 0 and self.mass),
            "tare",
            got=f"mass {mass:g} for a module of mass {self.mass:g}",
            allowed="mass >= 0, on a module that has some",
            fix="give its atoms a mass",
        )
        factor = mass / self.mass if mass else 0.0
        return self.mapped(lambda leaf: replace(leaf, mass=leaf.mass * factor))

    def __str__(self) -> str:
        from .drawing import text  # it imports the nodes that it draws

        return text(self)

    def svg(self) -> str:
        """Return the drawing as a picture (SVG): a bar beside every weight is its radius."""
        from .drawing import svg

        return svg(self)


def _inherited(*parts: Module) -> dict[str, Any]:
    """Return what every compound has of its parts, these in the order of the forward pass."""
    return {
        "mass": sum(part.mass for part in parts),
        "typical": any(part.typical for part in parts),
        "undeclared": tuple(dict.fromkeys(label for part in parts for label in part.undeclared)),
    }


@dataclass(frozen=True)
class Atom(Module):
    """One weight, by parameter name, with its norm."""

    name: str
    norm: Norm
    role: str = ""

    def mapped(self, change: Callable[[Atom], Module]) -> Module:
        return change(self)

    def radii(self, target: float = 1.0) -> Iterator[tuple[Atom, float]]:
        yield self, target

    def numbered(self, index: int) -> Atom:
        """Return the atom with the last "{}" of its name filled with a number."""
        head, braces, tail = self.name.rpartition("{}")
        return replace(self, name=f"{head}{index}{tail}") if braces else self


def atom(
    name: str, norm: Norm, *, mass: float = 1.0, sensitivity: float = 1.0, role: str = ""
) -> Atom:
    """Return a weight with its parameter name, norm, mass, and sensitivity on the unit ball.

    "{}" in the name is a layer number, filled by **. The atom acts linearly in its weight:
    (α, β, γ) = (0, 1, 0). A bias, which does not see the input, has sensitivity 0 and (0, 0, 0).
    """
    for what, value in (("mass", mass), ("sensitivity", sensitivity)):
        require(
            0 <= value < math.inf,
            f"{what} of {name}",
            got=f"{value:g}",
            allowed="0 or more (a weight of mass 0 is never updated)",
            fix=f"atom({name!r}, …, {what}=…)",
        )
    sharpness = (0.0, 1.0 if sensitivity else 0.0, 0.0)
    return Atom(name, norm, role or name, mass=mass, sensitivity=sensitivity, sharpness=sharpness)


@dataclass(frozen=True)
class Bond(Module):
    """A map without weights."""

    label: str = "identity"


def bond(
    label: str, *, sensitivity: float = 1.0, typical: bool = False, sharpness: float | None = None
) -> Bond:
    """Return a map without weights.

    sensitivity: its Lipschitz constant on the unit ball or, marked typical, its gain at unit-RMS
    Gaussian input. sharpness: γ, a bound on its second derivative there, 0 for linear maps; None
    where there is none, as for every typical bond.
    """
    require(
        sensitivity > 0 and (sharpness is None or (sharpness >= 0 and not typical)),
        f"bond {label}",
        got=f"sensitivity {sensitivity:g}, sharpness {sharpness}, typical {typical}",
        allowed="sensitivity more than 0; sharpness 0 or more, or None; a typical bond has none",
        fix="bond(label, sensitivity=…, sharpness=…)",
    )
    return Bond(
        label,
        sensitivity=sensitivity,
        typical=typical,
        sharpness=None if sharpness is None else (0.0, 0.0, float(sharpness)),
        undeclared=(label,) if sharpness is None else (),
    )


def attention() -> Bond:
    """Return functional attention softmax(q kᵀ / d_head) v of (q, k, v).

    Its sensitivity is 1 in each of q, k and v, in the maximum over heads and tokens of RMS [MN].
    Its γ is the largest second derivative on the unit ball (tests/test_smoothness.py looks for it).
    """
    return bond("attention", sharpness=(35 + 13 * 13**0.5) / 54)


@dataclass(frozen=True)
class Composite(Module):
    """outer after inner [MN, Def. 3].

    With 1 = inner and 2 = outer: m = m₁ + m₂, μ = μ₁ μ₂, ‖w‖ = max(μ₂ (m/m₁) ‖w₁‖, (m/m₂) ‖w₂‖).
    """

    outer: Module
    inner: Module

    @staticmethod
    def of(outer: Module, inner: Module) -> Composite:
        require(
            outer.sensitivity or not inner.mass,
            "a module after others",
            got="sensitivity 0, which no step of those before it can pass",
            allowed="more than 0",
            fix="a bias belongs beside its map: bond('add') @ concat(map, bias)",
        )
        return Composite(
            outer,
            inner,
            sensitivity=outer.sensitivity * inner.sensitivity,
            sharpness=sharpness_after(outer, inner),
            **_inherited(inner, outer),
        )

    @property
    def parts(self) -> tuple[Module, ...]:
        return self.inner, self.outer

    def of_parts(self, *parts: Module) -> Module:
        inner, outer = parts
        return Composite.of(outer, inner)

    def targets(self, target: float) -> tuple[float, ...]:
        share = target / self.mass if self.mass else 0.0
        before = share * self.inner.mass / self.outer.sensitivity if self.inner.mass else 0.0
        return before, share * self.outer.mass


@dataclass(frozen=True)
class Concat(Module):
    """Modules side by side on one input; the tuple of outputs has the sum norm [MN, Def. 4].

    m = Σ m_k, μ = Σ μ_k, ‖w‖ = max (m/m_k) ‖w_k‖.
    """

    children: tuple[Module, ...] = ()

    @property
    def parts(self) -> tuple[Module, ...]:
        return self.children

    def of_parts(self, *parts: Module) -> Module:
        return concat(*parts)

    def targets(self, target: float) -> tuple[float, ...]:
        mass = self.mass
        return tuple(target * child.mass / mass if mass else 0.0 for child in self.children)


def concat(*children: Module) -> Concat:
    """Return the modules side by side on one input."""
    return Concat(
        children,
        sensitivity=sum(child.sensitivity for child in children),
        sharpness=sharpness_beside(*children),
        **_inherited(*children),
    )


@dataclass(frozen=True)
class Power(Module):
    """A module after itself, a number of times; copies are counted from the input."""

    block: Module
    times: int

    @staticmethod
    def of(block: Module, times: int) -> Power:
        chain = reduce(lambda inner, _: block @ inner, range(times - 1), block)
        return Power(block, times, **{f.name: getattr(chain, f.name) for f in fields(Module)})

    @property
    def parts(self) -> tuple[Module, ...]:
        return (self.block,)

    def of_parts(self, *parts: Module) -> Module:
        (block,) = parts
        return Power.of(block, self.times)

    def unrolled(self) -> Module:
        block = self.block.unrolled()
        copies = (block.mapped(lambda leaf, i=i: leaf.numbered(i)) for i in range(self.times))
        return reduce(lambda inner, outer: outer @ inner, copies)

    def targets(self, target: float) -> tuple[float, ...]:
        """Return each copy's share: equal ones, magnified by the sensitivity of later copies."""
        if not self.mass:
            return (0.0,) * self.times
        share, gain = target / self.times, self.block.sensitivity
        return tuple(share / gain**later for later in reversed(range(self.times)))

    def radii(self, target: float = 1.0) -> Iterator[tuple[Atom, float]]:
        for i, share in enumerate(self.targets(target)):
            for leaf, radius in self.block.radii(share):
                yield leaf.numbered(i), radius


def residual(block: Module, depth: int) -> Module:
    """Return (1 − 1/depth) x + (1/depth) block(x).

    `depth` of them in a row have sensitivity at most exp(μ − 1) where the block has μ [MN].
    """
    require(
        depth >= 1,
        "residual",
        got=f"depth {depth}",
        allowed="1 or more",
        fix="the number of residual blocks in a row",
    )
    if depth == 1:
        return block
    return (1 - 1 / depth) * bond("identity", sharpness=0) + (1 / depth) * block


@dataclass(frozen=True)
class ModularNorm:
    """The modular norm, resolved: ‖w‖ = max_k ‖w_k‖_k / radius_k over named tensors.

    norms, radii: by parameter name. roles, masses, shapes, notes: for the receipt. Tensors left out
    of a mapping count as zero. tree: what it was resolved from; str(norm.tree) draws it.
    """

    norms: dict[str, Norm]
    radii: dict[str, float]
    roles: dict[str, str] = field(default_factory=dict)
    masses: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tree: Module | None = None

    @staticmethod
    def of(tree: Module) -> ModularNorm:
        """Return the norm of a tree, which is walked once."""
        resolved = ModularNorm({}, {}, tree=tree)
        for leaf, radius in tree.radii():
            require(
                leaf.name not in resolved.norms,
                "names in a tree",
                got=f"{leaf.name!r} twice",
                allowed="once",
                fix="'{}' in names under **",
            )
            resolved.norms[leaf.name], resolved.radii[leaf.name] = leaf.norm, radius
            resolved.roles[leaf.name], resolved.masses[leaf.name] = leaf.role, leaf.mass
        return resolved

    def __post_init__(self) -> None:
        alone = sorted(self.norms.keys() ^ self.radii.keys())
        wrong = [f"{name!r} with a norm or a radius alone" for name in alone]
        wrong += [f"radius {r} of {k!r}" for k, r in self.radii.items() if not 0 <= r < math.inf]
        require(
            not wrong,
            "ModularNorm",
            got=next(iter(wrong), None),
            allowed="a norm and a finite radius >= 0 for each name",
            fix="metrize(model), or both by name",
        )

    def norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return max_k ‖w_k‖_k / radius_k (0-dim); infinite where a tensor of radius 0 is not 0."""
        sizes = [(self.norms[k].norm(w), self.radii[k]) for k, w in self._checked(tensors)]
        shares = [torch.where(size > 0, size / radius, 0.0) for size, radius in sizes]
        return torch.stack(shares).amax() if shares else torch.zeros(())

    def dual_norm(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Return Σ_k radius_k ‖g_k‖_k† (0-dim)."""
        shares = [self.radii[k] * self.norms[k].dual_norm(g) for k, g in self._checked(grads)]
        return torch.stack(shares).sum() if shares else torch.zeros(())

    def dualize(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return radius_k · dualize_k(g_k): a step of norm 1 that attains the dual norm."""
        return {k: self.radii[k] * self.norms[k].dualize(g) for k, g in self._checked(grads)}

    def normalize(
        self, updates: Mapping[str, Tensor], *, by_block: bool = False
    ) -> dict[str, Tensor]:
        """Return radius_k · u_k / ‖u_k‖_k: any optimizer's update, every tensor at its radius [MN].

        0 stays 0. by_block: every block of a norm that is a maximum over blocks (rows, heads,
        slices of a convolution) at its full size, as in Modula's own code.
        """
        out = {}
        for k, u in self._checked(updates):
            norm = self.norms[k]
            out[k] = (norm.sphere(u) if by_block else norm.normalize(u)) * self.radii[k]
        return out

    def unweighted(self) -> ModularNorm:
        """Return the plain maximum over tensors [OO]: every radius 1, or 0 where it was 0."""
        return replace(self, radii={k: float(r > 0) for k, r in self.radii.items()}, tree=None)

    def smoothness(self) -> Sharpness | None:
        """Return (α, β, γ), bounds on the network's second derivatives on the unit ball [MN, §3.3].

        None where a bond does not declare its own (`tree.undeclared` names them) or there is no
        tree. A loss that is σ-Lipschitz and τ-smooth in the output has a gradient that is
        (σα + τ)-Lipschitz in the modular norm.
        """
        return self.tree.sharpness if self.tree else None

    def update_rms(self, name: str) -> float | None:
        """Return the RMS of a weight's entries in a step of modular norm 1, None if not known."""
        try:
            unit = self.norms[name].update_rms(self.shapes[name]) if name in self.shapes else None
        except NotImplementedError:  # a user's norm
            unit = None
        return None if unit is None else self.radii[name] * unit

    def receipt(self) -> str:
        """Return the table of parameters, shapes, roles, norms, masses, radii and update RMS."""
        return receipt(self)

    def _checked(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            require(
                name in self.norms,
                "a tensor without a norm",
                got=repr(name),
                allowed=", ".join(self.norms),
                fix="leave it out, or give it a norm and a radius",
            )
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"{name} has entries that are not finite")
            yield name, tensor
