"""The modular norm: masses, sensitivities and norms of modules, composed [MN].

A module has a mass (its share of feature learning), a sensitivity (Lipschitz constant in its input)
and a norm on its weights. Atoms hold one weight; bonds hold none and have mass 0; compounds derive
theirs. Everything holds for well-normed modules: inputs of norm at most 1, weights of norm at most
1. Tuples carry the sum of their members' norms.
Sources: [MN] Large et al., arXiv 2405.14813, §3; [MD] arXiv 2410.21265, §5;
[OO] Bernstein, Newhouse, arXiv 2409.20325.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .errors import NonFiniteError, Refusal
from .norms import Norm

Sharpness = tuple[
    float, float, float
]  # (α, β, γ): bounds on second derivatives in (w, w), (w, x), (x, x) [MN, §3.3]
Rows = list[
    tuple[int, str, tuple[float, ...]]
]  # of a drawing: indentation, text, and the radius of every copy


@dataclass(frozen=True)
class Module:
    """A node of the tree. mass >= 0; sensitivity >= 0; typical: the sensitivity is the gain at
    unit-RMS Gaussian input, not a bound.

    sharpness: (α, β, γ), or None where a bond below does not declare its own; undeclared: the
    labels of those bonds. str() draws the tree in the order of the forward pass, with the radii of
    its weights.
    """

    mass: float = 0.0
    sensitivity: float = 1.0
    typical: bool = False
    sharpness: Sharpness | None = (0.0, 0.0, 0.0)
    undeclared: tuple[str, ...] = ()

    def __matmul__(self, inner: Module) -> Module:
        """self after inner."""
        return Composite.of(self, inner)

    def __add__(self, other: Module) -> Module:
        """The sum of the outputs. Use convex weights to stay in the unit ball."""
        return bond("add", sharpness=0) @ concat(self, other)

    def __mul__(self, scalar: float) -> Module:
        """The output times a scalar."""
        if scalar == 0:
            raise Refusal(
                "a module times 0",
                got="scalar 0",
                allowed="any other number",
                fix="leave the module out instead",
            )
        return bond(f"× {scalar:.4g}", sensitivity=abs(scalar), sharpness=0) @ self

    __rmul__ = __mul__

    def __pow__(self, times: int) -> Module:
        """The module after itself, `times` times; the i-th copy has its atoms' last "{}" filled
        with i, counted from the input."""
        if not isinstance(times, int) or times < 1:
            raise Refusal(
                "a module's power",
                got=repr(times),
                allowed="an integer of at least 1",
                fix="module ** 1 is the module itself",
            )
        return Power.of(self, times)

    def tare(self, mass: float) -> Module:
        """The same module with its total mass set to `mass`, shared as before."""
        if mass < 0 or (self.mass == 0 and mass > 0):
            raise Refusal(
                "tare",
                got=f"mass {mass:g} for a module of mass {self.mass:g}",
                allowed="mass >= 0, on a module that has some",
                fix="give its atoms a mass",
            )
        return self.scaled(mass / self.mass if mass else 0.0)

    def scaled(self, factor: float) -> Module:
        """Every mass below times factor."""
        return self.mapped(lambda leaf: replace(leaf, mass=leaf.mass * factor))

    def mapped(self, change: Callable[[Atom], Module]) -> Module:
        """The same tree with every atom replaced by change(atom)."""
        return self

    def unrolled(self) -> Module:
        """The same tree without powers, every atom by its full name."""
        return self

    def radii(self, target: float = 1.0) -> Iterator[tuple[Atom, float]]:
        """Each atom below with the radius that its update has when the whole module's has norm
        `target`."""
        return iter(())

    def rows(self, targets: tuple[float, ...] = (1.0,)) -> Rows:
        """The lines of the drawing, for these radii of the module's copies."""
        return [(0, type(self).__name__, ())]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(2 * depth + len(text) for depth, text, _ in rows)
        lines = [
            ("  " * depth + text).ljust(width) + (f"  radius {_range(radii)}" if radii else "")
            for depth, text, radii in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def svg(self) -> str:
        """The same drawing as a picture (SVG): a bar beside every weight is its radius."""
        from html import escape

        rows, line, em = self.rows(), 20, 7.3
        width = max(2 * depth + len(text) for depth, text, _ in rows) * em + 20
        top = max((max(radii) for *_, radii in rows if radii), default=1.0) or 1.0
        out = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 420:.0f}" height="{line * len(rows) + 20}" font-family="monospace" font-size="12">',
            '<rect width="100%" height="100%" fill="white"/>',
        ]
        for i, (depth, text, radii) in enumerate(rows):
            y = 10 + line * i
            out.append(f'<text x="{10 + 2 * depth * em:.0f}" y="{y + 14}">{escape(text)}</text>')
            if radii:
                length = 220 * max(radii) / top
                out.append(
                    f'<rect x="{width:.0f}" y="{y + 4}" width="{length:.1f}" height="12" fill="#4477aa"/>'
                )
                out.append(
                    f'<text x="{width + length + 6:.0f}" y="{y + 14}">{_range(radii)}</text>'
                )
        return "\n".join([*out, "</svg>\n"])


def _range(values: tuple[float, ...]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} … {high}"


@dataclass(frozen=True)
class Atom(Module):
    """One weight, by parameter name, with its norm."""

    name: str = ""
    norm: Norm = field(default_factory=Norm)
    role: str = ""

    def mapped(self, change: Callable[[Atom], Module]) -> Module:
        return change(self)

    def numbered(self, index: int) -> Atom:
        head, found, tail = self.name.rpartition("{}")
        return replace(self, name=head + str(index) + tail) if found else self

    def radii(self, target: float = 1.0) -> Iterator[tuple[Atom, float]]:
        yield self, target

    def rows(self, targets: tuple[float, ...] = (1.0,)) -> Rows:
        role = f", {self.role}" if self.role != self.name else ""
        return [(0, f"{self.name}: {self.norm}{role}, mass {self.mass:.4g}{_gain(self)}", targets)]


def atom(
    name: str, norm: Norm, *, mass: float = 1.0, sensitivity: float = 1.0, role: str = ""
) -> Atom:
    """A weight: parameter name ("{}" is a layer number, filled by **), norm, mass, sensitivity on
    the unit ball.

    It acts linearly in the weight: (α, β, γ) = (0, 1, 0). A bias, which does not see the input, has
    sensitivity 0 and (0, 0, 0).
    """
    if not 0 <= mass < math.inf or not 0 <= sensitivity < math.inf:
        what, got = ("mass", mass) if not 0 <= mass < math.inf else ("sensitivity", sensitivity)
        raise Refusal(
            f"{what} of {name}",
            got=f"{got:g}",
            allowed="0 or more (a weight of mass 0 is never updated)",
            fix=f"atom({name!r}, …, {what}=…)",
        )
    return Atom(
        mass,
        sensitivity,
        sharpness=(0.0, 1.0 if sensitivity else 0.0, 0.0),
        name=name,
        norm=norm,
        role=role or name,
    )


@dataclass(frozen=True)
class Bond(Module):
    """A map without weights."""

    label: str = "identity"

    def rows(self, targets: tuple[float, ...] = (1.0,)) -> Rows:
        return [(0, self.label + ("" if self.label.startswith("× ") else _gain(self)), ())]


def bond(
    label: str, *, sensitivity: float = 1.0, typical: bool = False, sharpness: float | None = None
) -> Bond:
    """A map without weights.

    sensitivity: its Lipschitz constant on the unit ball or, marked typical, its gain at unit-RMS
    Gaussian input.
    sharpness: γ, a bound on its second derivative there, 0 for linear maps; None where there is
    none, as for every typical bond.
    """
    if not sensitivity > 0 or (sharpness is not None and (typical or not sharpness >= 0)):
        raise Refusal(
            f"bond {label}",
            got=f"sensitivity {sensitivity:g}, sharpness {sharpness}, typical {typical}",
            allowed="sensitivity more than 0; sharpness 0 or more, or None; a typical bond has none",
            fix="bond(label, sensitivity=…, sharpness=…)",
        )
    if sharpness is None:
        return Bond(0.0, sensitivity, typical, None, (label,), label=label)
    return Bond(0.0, sensitivity, typical, (0.0, 0.0, float(sharpness)), label=label)


def attention() -> Bond:
    """Functional attention softmax(q kᵀ / d_head) v of (q, k, v), in the maximum over heads and
    tokens of RMS: 1 in each of q, k and v [MN].

    Its γ is (35 + 13√13)/54, the largest second derivative on the unit ball
    (tests/test_smoothness.py searches for it).
    """
    return bond("attention", sharpness=(35 + 13 * 13**0.5) / 54)


def _gain(node: Module) -> str:
    return (
        ""
        if node.sensitivity == 1
        else f", sensitivity {'≈ ' * node.typical}{node.sensitivity:.4g}"
    )


def _unite(*nodes: Module) -> tuple[str, ...]:
    return tuple(dict.fromkeys(label for n in nodes for label in n.undeclared))


def _after(outer: Module, inner: Module) -> Sharpness | None:
    """(α, β, γ) of outer ∘ inner [MN, Prop. 6]; 1 = inner, 2 = outer."""
    if outer.sharpness is None or inner.sharpness is None:
        return None
    (a1, b1, c1), (a2, b2, c2) = inner.sharpness, outer.sharpness
    mass = inner.mass + outer.mass
    p1, p2 = (inner.mass / mass, outer.mass / mass) if mass else (0.0, 0.0)
    q = (
        p1 / outer.sensitivity if p1 else 0.0
    )  # the input of the outer moves by this much under a step of norm 1
    return (
        p1 * q * a1 + p2 * p2 * a2 + 2 * p2 * q * b2 + q * q * c2,
        p1 * b1 + inner.sensitivity * (p2 * b2 + q * c2),
        outer.sensitivity * c1 + inner.sensitivity**2 * c2,
    )


@dataclass(frozen=True)
class Composite(Module):
    """outer after inner: m = m₁ + m₂, μ = μ₁ μ₂, ‖w‖ = max(μ₂ (m/m₁) ‖w₁‖, (m/m₂) ‖w₂‖), 1 = inner,
    2 = outer [MN, Def. 3]."""

    outer: Module = field(default_factory=Module)
    inner: Module = field(default_factory=Module)

    @staticmethod
    def of(outer: Module, inner: Module) -> Composite:
        if outer.sensitivity == 0 and inner.mass:
            raise Refusal(
                "a module after others",
                got="sensitivity 0, which no step of those before it can pass",
                allowed="more than 0",
                fix="a bias belongs beside its map: bond('add') @ concat(map, bias)",
            )
        typical = outer.typical or inner.typical
        gain = outer.sensitivity * inner.sensitivity
        return Composite(
            outer.mass + inner.mass,
            gain,
            typical,
            _after(outer, inner),
            _unite(inner, outer),
            outer=outer,
            inner=inner,
        )

    def mapped(self, change: Callable[[Atom], Module]) -> Module:
        return Composite.of(self.outer.mapped(change), self.inner.mapped(change))

    def unrolled(self) -> Module:
        return Composite.of(self.outer.unrolled(), self.inner.unrolled())

    def _targets(self, target: float) -> tuple[float, float]:
        """(of inner, of outer)."""
        share = target / self.mass if self.mass else 0.0
        return (
            share * self.inner.mass / self.outer.sensitivity if self.inner.mass else 0.0
        ), share * self.outer.mass

    def radii(self, target: float = 1.0) -> Iterator[tuple[Atom, float]]:
        inner, outer = self._targets(target)
        yield from self.inner.radii(inner)
        yield from self.outer.radii(outer)

    def rows(self, targets: tuple[float, ...] = (1.0,)) -> Rows:
        inner, outer = zip(*map(self._targets, targets), strict=True)
        first, second = self.inner.rows(inner), self.outer.rows(outer)
        if isinstance(self.outer, Bond):
            if isinstance(self.inner, Concat):  # "sum of" instead of "side by side", "add"
                label = "sum" if self.outer.label == "add" else second[0][1]
                return [(0, f"{label} of", ()), *first[1:]]
            if len(first) == 1 and not first[0][2]:  # two bonds on one line
                return [(0, f"{first[0][1]}, {second[0][1]}", ())]
        return first + second


@dataclass(frozen=True)
class Concat(Module):
    """Modules side by side on one input; the tuple of outputs has the sum norm: m = Σ m_k, μ = Σ
    μ_k, ‖w‖ = max (m/m_k) ‖w_k‖ [MN, Def. 4]."""

    children: tuple[Module, ...] = ()

    def mapped(self, change: Callable[[Atom], Module]) -> Module:
        return concat(*(c.mapped(change) for c in self.children))

    def unrolled(self) -> Module:
        return concat(*(c.unrolled() for c in self.children))

    def radii(self, target: float = 1.0) -> Iterator[tuple[Atom, float]]:
        for child in self.children:
            yield from child.radii(target * child.mass / self.mass if self.mass else 0.0)

    def rows(self, targets: tuple[float, ...] = (1.0,)) -> Rows:
        rows: Rows = [(0, "side by side", ())]
        for child in self.children:
            share = child.mass / self.mass if self.mass else 0.0
            below = child.rows(tuple(t * share for t in targets))
            first, *rest = below
            rows += [
                (1, f"┬ {first[1]}" if rest else f"─ {first[1]}", first[2]),
                *((d + 2, text, r) for d, text, r in rest),
            ]
        return rows


def concat(*children: Module) -> Concat:
    """The modules side by side on one input."""
    mass, sensitivity = sum(c.mass for c in children), sum(c.sensitivity for c in children)
    sharpness = None
    if all(c.sharpness is not None for c in children):
        parts = [(c.mass / mass if mass else 0.0, c.sharpness) for c in children]
        sharpness = (
            sum(p * p * s[0] for p, s in parts if s),
            sum(p * s[1] for p, s in parts if s),
            sum(s[2] for _, s in parts if s),
        )
    return Concat(
        mass,
        sensitivity,
        any(c.typical for c in children),
        sharpness,
        _unite(*children),
        children=children,
    )


@dataclass(frozen=True)
class Power(Module):
    """A module after itself, a number of times; copies are counted from the input."""

    block: Module = field(default_factory=Module)
    times: int = 1

    @staticmethod
    def of(block: Module, times: int) -> Power:
        unrolled = block
        for _ in range(times - 1):
            unrolled = Composite.of(block, unrolled)
        kept = (
            unrolled.mass,
            unrolled.sensitivity,
            unrolled.typical,
            unrolled.sharpness,
            unrolled.undeclared,
        )
        return Power(*kept, block=block, times=times)

    def mapped(self, change: Callable[[Atom], Module]) -> Module:
        return Power.of(self.block.mapped(change), self.times)

    def unrolled(self) -> Module:
        block = self.block.unrolled()
        found = block.mapped(lambda leaf: leaf.numbered(0))
        for i in range(1, self.times):
            found = Composite.of(block.mapped(lambda leaf, i=i: leaf.numbered(i)), found)
        return found

    def _targets(self, target: float) -> list[float]:
        """Of each copy: an equal share, magnified by the sensitivity of the copies after it."""
        if not self.mass:
            return [0.0] * self.times
        return [
            target / self.times / self.block.sensitivity ** (self.times - 1 - i)
            for i in range(self.times)
        ]

    def radii(self, target: float = 1.0) -> Iterator[tuple[Atom, float]]:
        for i, share in enumerate(self._targets(target)):
            for leaf, radius in self.block.radii(share):
                yield leaf.numbered(i), radius

    def rows(self, targets: tuple[float, ...] = (1.0,)) -> Rows:
        shares = tuple(share for t in targets for share in self._targets(t))
        return [
            (0, f"{self.times} times (mass {self.mass:.4g}{_gain(self)})", ()),
            *((d + 1, text, r) for d, text, r in self.block.rows(shares)),
        ]


def residual(block: Module, depth: int) -> Module:
    """(1 − 1/depth) x + (1/depth) block(x): `depth` of them in a row have sensitivity 1 where the
    block has 1, and at most exp(μ − 1) where it has μ [MN]."""
    if depth < 1:
        raise Refusal(
            "residual",
            got=f"depth {depth}",
            allowed="1 or more",
            fix="the number of residual blocks in a row",
        )
    return (
        block
        if depth == 1
        else (1 - 1 / depth) * bond("identity", sharpness=0) + (1 / depth) * block
    )


@dataclass(frozen=True)
class ModularNorm:
    """The modular norm, resolved: ‖w‖ = max_k ‖w_k‖_k / radius_k over named tensors.

    norms, radii: by parameter name. roles, masses, shapes, notes: for the receipt. Tensors left out
    of a mapping count as zero.
    tree: what it was resolved from; str(norm.tree) draws it.
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
        """Walk the tree once."""
        resolved = ModularNorm({}, {}, tree=tree)
        for node, radius in tree.radii():
            if node.name in resolved.norms:
                raise Refusal(
                    "names in a tree",
                    got=f"{node.name!r} twice",
                    allowed="once",
                    fix="'{}' in names under **",
                )
            resolved.norms[node.name], resolved.radii[node.name] = node.norm, radius
            resolved.roles[node.name], resolved.masses[node.name] = node.role, node.mass
        return resolved

    def __post_init__(self) -> None:
        odd = sorted(self.norms.keys() ^ self.radii.keys())
        bad = next((k for k, r in self.radii.items() if not 0 <= r < math.inf), None)
        if odd or bad is not None:
            got = (
                f"{odd[0]!r} with a norm or a radius alone"
                if odd
                else f"radius {self.radii[str(bad)]} of {bad!r}"
            )
            raise Refusal(
                "ModularNorm",
                got=got,
                allowed="a norm and a finite radius >= 0 for each name",
                fix="metrize(model), or both by name",
            )

    def norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """max_k ‖w_k‖_k / radius_k (0-dim); infinite where a tensor of radius 0 is not zero."""
        sizes = {k: self.norms[k].norm(w) for k, w in self._checked(tensors)}
        return (
            torch.stack(
                [torch.where(size > 0, size / self.radii[k], 0.0) for k, size in sizes.items()]
            ).amax()
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

    def normalize(
        self, updates: Mapping[str, Tensor], *, by_block: bool = False
    ) -> dict[str, Tensor]:
        """radius_k · u_k / ‖u_k‖_k: every tensor of any optimizer's update at its full share of
        modular norm 1 [MN]; 0 stays 0.

        by_block: every block of a norm that is a maximum over blocks (rows, heads, slices of a
        convolution) to its full size, as Modula's own code does.
        """
        out = {}
        for k, u in self._checked(updates):
            norm = self.norms[k]
            out[k] = (norm.sphere(u) if by_block else norm.normalize(u)) * self.radii[k]
        return out

    def unweighted(self) -> ModularNorm:
        """The plain maximum over tensors, every radius 1 (0 where it was 0): what older optimizers
        compose their norms by [OO]."""
        return replace(self, radii={k: float(r > 0) for k, r in self.radii.items()}, tree=None)

    def smoothness(self) -> Sharpness | None:
        """(α, β, γ): bounds on second derivatives of the network on the unit ball, in its own norms
        [MN, §3.3].

        None where a bond does not declare its own (`tree.undeclared` names them) or there is no
        tree. A loss that is σ-Lipschitz and τ-smooth in the output has a gradient that is (σα +
        τ)-Lipschitz in the modular norm.
        """
        return self.tree.sharpness if self.tree else None

    def receipt(self) -> str:
        """A table: parameter, shape, role, norm, mass, radius (its share of a step of modular norm
        1) and the RMS of that step's entries; then the notes."""
        rows = [("parameter", "shape", "role", "norm", "mass", "radius", "update RMS")]
        for name, norm in self.norms.items():
            shape = self.shapes.get(name)
            try:
                predicted = (
                    f"{self.radii[name] * norm.update_rms(shape):.4g}" if shape is not None else "?"
                )
            except NotImplementedError:
                predicted = "?"
            spelled = "?" if shape is None else "×".join(map(str, shape)) or "scalar"
            rows.append(
                (
                    name,
                    spelled,
                    self.roles.get(name, ""),
                    str(norm),
                    f"{self.masses.get(name, 0):.4g}",
                    f"{self.radii[name]:.4g}",
                    predicted,
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)]) + "\n"

    def _checked(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            if name not in self.norms:
                raise Refusal(
                    "a tensor without a norm", got=repr(name), allowed=", ".join(self.norms)
                )
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    name, got="entries that are not finite", allowed="finite numbers"
                )
            yield name, tensor
