"""What stands in a script for optim/modular.py, which a script needs no more than this of."""

from dataclasses import dataclass, field

from optim.norms import Norm


@dataclass(frozen=True)
class ModularNorm:
    """What a baseline asks of the modular norm: the norm, radius and role of each weight."""

    norms: dict[str, Norm] = field(default_factory=dict)
    radii: dict[str, float] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
