"""Where each weight of a model stands, what reads the outputs of its map, and its place.

O, I: fan-out and fan-in of a map.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .norms import Norm

# The parts of a name that torch.compile, DDP, checkpointing and FSDP add.
WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

# A map's weight, by its name; the latter two are of torch's older weight_norm and spectral_norm.
WEIGHTS = ("weight", "weight_v", "weight_orig")


def canonical(name: str) -> str:
    """Return a parameter's name without the prefixes that torch's wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@dataclass(frozen=True)
class Place:
    """Where a weight belongs: its role, its norm, and how many maps it holds.

    mass: by rule. note: what was guessed, which the receipt prints.
    """

    role: str
    norm: Norm
    maps: int = 1
    mass: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Site:
    """A weight where it stands in its model.

    path, own: of the module that has it, and its name there; of a parametrized weight those of the
    weight that it makes. part: "original", "original0", … of such a weight. parents: (path, module)
    from the module itself up to the model.
    """

    path: str
    own: str
    weight: Tensor
    parents: tuple[tuple[str, nn.Module], ...]
    part: str = ""

    @property
    def module(self) -> Any:
        """Return the module that has the weight."""
        return self.parents[0][1]

    @property
    def kind(self) -> str:
        """Return the class of the module."""
        return type(self.module).__name__

    @property
    def label(self) -> str:
        """Return the name of the module in its parent; in a list, the name of the list."""
        return next((part for part in self.path.split(".")[::-1] if not part.isdigit()), "")

    @property
    def key(self) -> str:
        """Return the module's path, with the weight's own name where it may have several maps."""
        return self.path if self.own in WEIGHTS else f"{self.path}.{self.own}"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)


@dataclass(frozen=True)
class Map:
    """A weight as one linear map, or a stack of them: fan-out, fan-in, and how it is stored.

    stored: "matrix" (O, I) or, transposed, (I, O); "stack" (E, O, I); "convolution"; "bilinear" (O,
    I₁, I₂); "gates", the weights of torch's recurrent and attention modules.
    """

    O: int  # noqa: E741
    I: int  # noqa: E741
    stored: str = "matrix"
    transposed: bool = False


def sites_of(model: nn.Module) -> dict[str, Site]:
    """Return {canonical name: site} of every parameter, each under the first of its names."""
    modules = dict(model.named_modules())
    sites = {}
    for full, module in modules.items():
        path, part = full, ""
        if isinstance(module, parametrize.ParametrizationList):
            path, _, weight = f".{full}".rpartition(".parametrizations.")
            path = path.removeprefix(".")
        for own, p in module._parameters.items():
            if p is None:
                continue
            name = canonical(f"{full}.{own}" if full else own)
            if isinstance(module, parametrize.ParametrizationList):
                own, part = weight, own
            parents = tuple((a, modules[a]) for a in _ancestors(path) if a in modules)
            sites[name] = Site(canonical(path), own, p, parents, part)
    return sites


def _ancestors(path: str) -> Iterator[str]:
    """Yield a module's path and those of the modules around it, the model's "" at last."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def is_vector(shape: tuple[int, ...]) -> bool:
    """Return whether at most one dimension is longer than 1."""
    return prod(shape) == max(shape, default=1)


class Readers:
    """The fan-ins of a model's maps, by the modules that have them below, in their order."""

    def __init__(self, maps: Mapping[str, Map]) -> None:
        """Note them. maps: by the path of the module, with the weight's name if it has several."""
        self._order = {path: index for index, path in enumerate(maps)}
        self.last_convolution = max(
            (self._order[k] for k, own in maps.items() if own.stored == "convolution"), default=-1
        )
        self._last: dict[str, dict[int, int]] = {}  # of each fan-in, the last map below that has it
        for path, own in maps.items():
            for above in _ancestors(path):
                self._last.setdefault(above, {})[own.I] = self._order[path]

    def has_one(self) -> bool:
        """Return whether the model has no other map."""
        return len(self._order) == 1

    def position(self, path: str) -> int:
        """Return the place of a map in the order of all."""
        return self._order[path]

    def is_last(self, path: str, below: str) -> bool:
        """Return whether no map below a module stands after the one at `path`."""
        return max(self._last[below].values()) <= self._order[path]

    def reads(self, width: int, *, below: str = "", after: str | None = None) -> bool:
        """Return whether a map below a module reads this many inputs, and stands after another."""
        last = self._last.get(below, {}).get(width, -1)
        return last > (-1 if after is None else self._order[after])
