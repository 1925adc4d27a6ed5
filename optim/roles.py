"""The roles of a GPT's weights: the norm of each role, and its share of feature learning.

A model names its roles in its structure, and takes their norms from RoleNorms. RoleMasses says how
much of a step each role gets, however many weights it has.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from .errors import require
from .modular import Atom, Module
from .norms import NORMS, Norm, Spectral
from .polar import Polar
from .settings import OneOf, Range, check
from .views import Blocks


class MatrixNorms(Mapping[str, Callable[..., Norm]]):
    """The registered norms of matrices, by name. What is registered later counts."""

    def __getitem__(self, name: str) -> Callable[..., Norm]:
        if name not in iter(self):
            raise KeyError(name)
        return NORMS[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, norm in NORMS.items() if norm().ndim == 2)

    def __len__(self) -> int:
        return len([*self])


MATRIX_NORMS = MatrixNorms()
Norms = dict[str, Norm]  # by role


@dataclass
class RoleNorms:
    """The norm of each role, by its name in optim.NORMS."""

    embedding: Annotated[str, OneOf(MATRIX_NORMS)] = "L1ToRMS"
    """Norm of the embedding, and of the rows for n-grams and matches."""

    attention: Annotated[str, OneOf(MATRIX_NORMS)] = "RMSToRMS"
    """Norm of queries, keys, values and the output projection."""

    mlp: Annotated[str, OneOf(MATRIX_NORMS)] = "RMSToRMS"
    """Norm of the matrices of an MLP."""

    head: Annotated[str, OneOf(MATRIX_NORMS)] = "RMSToLinf"
    """Norm of the head."""

    per_head: bool = False
    """Take queries, keys and values head by head: the maximum of the norms of their heads."""

    def roles(self) -> dict[str, str]:
        """Return the name of each role's norm."""
        return {role: name for role, name in vars(self).items() if isinstance(name, str)}

    def build(self, polar: Polar, n_head: int) -> Norms:
        """Return the norm of each role, and of queries, keys and values ("qkv")."""
        check(RoleNorms, vars(self), owner="RoleNorms")
        norms = {role: NORMS[name]() for role, name in self.roles().items()}
        norms = {
            role: replace(norm, polar=polar) if isinstance(norm, Spectral) else norm
            for role, norm in norms.items()
        }
        attention = norms["attention"]
        return norms | {"qkv": Blocks(attention, n_head) if self.per_head else attention}


@dataclass
class RoleMasses:
    """Each role's share of feature learning, all layers together; only ratios matter.

    A layer's six matrices have equal mass, as in Modula. Weights of mass 0 are never updated.
    """

    embedding: Annotated[float, Range(0)] = 1.0
    """Mass of the embedding."""

    ngram: Annotated[float, Range(0)] = 1.0
    """Mass of the table of n-grams, where the model has one."""

    match: Annotated[float, Range(0)] = 1.0
    """Mass of the rows for matches, where the model has them."""

    attention: Annotated[float, Range(0)] = 4.0
    """Mass of all attentions."""

    mlp: Annotated[float, Range(0)] = 2.0
    """Mass of all MLPs."""

    head: Annotated[float, Range(0)] = 1.0
    """Mass of the head."""

    gain: Annotated[float, Range(0)] = 0.5
    """Mass of all gains of norms, where the model has them."""

    bias: Annotated[float, Range(0)] = 0.5
    """Mass of all biases, where the model has them."""

    def check(self) -> None:
        """Raise Refusal for a mass that cannot be, and where all are 0."""
        check(RoleMasses, vars(self), owner="RoleMasses")
        require(
            any(vars(self).values()),
            "optim.masses",
            got="0 for every role",
            allowed="at least one above 0",
            fix="leave one of them out",
        )

    def share(self, structure: Module) -> Module:
        """Return the same structure, with the mass of each role in equal parts on its weights."""
        counts = Counter(leaf.role for leaf, _ in structure.radii())
        masses = vars(self)
        unknown = next((role for role in counts if role not in masses), None)
        require(
            unknown is None,
            "the role of a weight",
            got=repr(unknown),
            allowed=", ".join(masses),
            fix="name one of these in the structure, or add a field to RoleMasses",
        )

        def shared(leaf: Atom) -> Atom:
            return replace(leaf, mass=masses[leaf.role] / counts[leaf.role])

        return structure.mapped(shared)
