"""The part of optim/modular.py that a script needs. It stands there for the whole file."""

from dataclasses import dataclass, field

from optim.norms import Norm


@dataclass(frozen=True)
class ModularNorm:
    """The modular norm as far as a baseline may ask: each weight's norm, radius and role."""

    norms: dict[str, Norm] = field(default_factory=dict)
    radii: dict[str, float] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
