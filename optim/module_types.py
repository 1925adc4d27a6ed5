"""The role, norm and maps of a weight, by its module's type or a vector's name."""

from dataclasses import dataclass

from torch import Tensor, nn

from .norms import L1ToRMS, MaxEntry, Norm, RMSToLinf, RMSToRMS, VectorRMS
from .views import Blocks, ConvRMSToRMS, Flattened, Transposed

# Masses of a model that declares no structure: each role's total, shared equally by its maps (fused
# queries, keys and values are three). As in model.py, what is between embedding and head has six
# times the mass of either.
MASSES = {"embedding": 1.0, "hidden": 6.0, "head": 1.0, "gain": 0.5, "bias": 0.5, "scalar": 0.1}
MATRICES = {"embedding": L1ToRMS(), "hidden": RMSToRMS(), "head": RMSToLinf()}  # norms by role
# Several maps stored as one weight, by the names that models give them: blocks of equal rows.
FUSED = {"c_attn": 3, "qkv": 3, "qkv_proj": 3, "Wqkv": 3, "gate_up_proj": 2}
# Queries, keys and values of each head in turn (GPT-NeoX, Bloom), in sizes that only the
# configuration tells.
INTERLEAVED = ("query_key_value",)
# 1-D weights of modules of unknown type, by name.
GAINS, BIASES = ("weight", "gamma", "gain", "scale", "g"), ("bias", "beta", "b")
GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}  # maps fused in one weight
NORMALIZATIONS = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase


@dataclass(frozen=True)
class Place:
    """Where a weight belongs: its role, its norm, and how many maps it holds.

    transposed: it is stored (I, O), as the norm of any other role must know. mass: by rule. note: a
    guess, which the receipt prints.
    """

    role: str
    norm: Norm
    maps: int = 1
    transposed: bool = False
    mass: float | None = None
    note: str = ""


def norm_of_role(role: str | None, p: Tensor, default: Place | None) -> Norm | None:
    """Return the default norm of a role that is not the module type's own."""
    if p.ndim == 2 and role in MATRICES:
        return Transposed(MATRICES[role]) if default and default.transposed else MATRICES[role]
    if role in ("gain", "scalar"):
        return MaxEntry(p.ndim)
    if role == "bias" and p.ndim:
        return _vector(p.ndim)
    return default.norm if default else None


def _vector(ndim: int) -> Norm:
    """Return the norm of a bias of so many dimensions."""
    return VectorRMS() if ndim == 1 else Flattened(VectorRMS(), ndim)


def place_by_type(module: nn.Module, own: str, label: str, p: Tensor) -> Place | None:
    """Return the place that a module's type or a vector's name tells; None where they tell none.

    own: the parameter's name in its module. label: the module's name in its parent.
    """
    stored_as_columns = type(module).__name__ == "Conv1D" and getattr(module.weight, "ndim", 0) == 2
    if own in ("weight", "bias") and (stored_as_columns or isinstance(module, nn.Linear)):
        return _linear(module, own, label, transposed=stored_as_columns)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Place("embedding", L1ToRMS())
    if isinstance(module, nn.modules.conv._ConvNd):
        dims, groups, transposed = len(module.kernel_size), module.groups, module.transposed
        norm = ConvRMSToRMS(dims=dims, groups=groups, transposed=transposed)
        return Place("hidden", norm) if own == "weight" else Place("bias", VectorRMS())
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        gates = next((n for kind, n in GATES.items() if isinstance(module, kind)), 1)
        return _of_maps(own, None if "_hr" in own else gates)
    if isinstance(module, nn.MultiheadAttention):
        if own.startswith("in_proj"):
            return _of_maps(own, 3)
        return Place("hidden", RMSToRMS()) if p.ndim == 2 else Place("bias", _vector(p.ndim))
    if p.ndim == 0:
        return Place("scalar", MaxEntry(0), note="a scalar")
    role = "gain" if own in GAINS else "bias" if own in BIASES else None
    known = isinstance(module, NORMALIZATIONS)
    if role is None or not (known or p.ndim == 1):
        return None
    guess = f"1-D and named {own}, of a {type(module).__name__}: taken for a {role}"
    norm = MaxEntry(p.ndim) if role == "gain" else _vector(p.ndim)
    return Place(role, norm, note="" if known else guess)


def _linear(module: nn.Module, own: str, label: str, *, transposed: bool) -> Place | None:
    """Return the place of a linear map's weight or bias, None where its name hides several maps."""
    shape: list[int] = list(module.weight.shape)  # type: ignore[union-attr, arg-type]
    columns, rows = shape if transposed else shape[::-1]  # transformers' GPT-2 stores (I, O)
    maps = FUSED.get(label)
    if maps == 3 and rows == columns:
        maps = None
    if maps is None:
        fused = "qkv" in label or label in ("kv", "to_kv", "kv_proj")
        unknown = fused and label not in FUSED and rows in (2 * columns, 3 * columns)
    else:
        unknown = rows % maps or (maps == 3 and rows != maps * columns)
    if unknown or label in INTERLEAVED:  # in an order that the name does not tell
        return None
    note = f"{maps} maps fused in one weight, by its name ({label})" if maps else ""
    return _of_maps(own, maps, transposed=transposed, note=note)


def _of_maps(own: str, maps: int | None, *, transposed: bool = False, note: str = "") -> Place:
    """Return the place of a weight or a bias of one map, or of so many that are stored as one."""
    vector, matrix = VectorRMS(), RMSToRMS()
    if maps is not None:
        vector, matrix = Blocks(vector, maps), Blocks(matrix, maps)
    if "bias" in own:
        return Place("bias", vector, maps or 1)
    norm = Transposed(matrix) if transposed else matrix
    return Place("hidden", norm, maps or 1, transposed=transposed, note=note)
