"""The role, norm and maps of a weight, by its module's type, its shape and common names.

O, I: fan-out and fan-in; E: experts; K: kernel positions.
"""

import re
from dataclasses import replace
from typing import Any

from torch import nn

from .adapters import place_adapter
from .families import heads, place_by_family
from .fused import ONE, divide
from .norms import L1ToRMS, MaxEntry, Norm, RMSToLinf, RMSToRMS, VectorRMS
from .sites import WEIGHTS, Map, Place, Readers, Site, is_vector
from .views import Blocks, ConvRMSToRMS, Experts, Flattened, Transposed

# Masses of a model that declares no structure: each role's total, shared equally by its maps (fused
# queries, keys and values are three). As in model.py, what is between embedding and head has six
# times the mass of either.
MASSES = {"embedding": 1.0, "hidden": 6.0, "head": 1.0, "gain": 0.5, "bias": 0.5, "scalar": 0.1}
MATRICES = {"embedding": L1ToRMS(), "hidden": RMSToRMS(), "head": RMSToLinf()}  # norms by role
GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}  # maps fused in one weight
NORMALIZATIONS = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase
# Names that many models give to weights of modules of their own.
TABLE = re.compile(
    r"pos(ition|_|$)|token|embed|latent|quer(y|ies)$|probe|prompt|codevector|table|newline"
    r"|separator"
)
BIAS = re.compile(r"bias|(^|_)(beta|b)$")
ENTRIES = re.compile(r"A_log|(^|_)[DA]$|scale|gamma|lambda|decay|time_|ia3|^alpha|gate$")
EXPERTS = re.compile(r"expert|moe|switch", re.IGNORECASE)
NORMALIZES = re.compile(r"norm|GRN", re.IGNORECASE)
MATRIX = RMSToRMS()


def norm_of_role(
    role: str | None, site: Site, own: Map | None, default: Place | None
) -> Norm | None:
    """Return the norm of a role for a weight of any shape, None for a role that has none."""
    ndim = site.weight.ndim
    if role == "embedding":
        if own is not None and own.transposed and ndim == 2:
            return Transposed(L1ToRMS())
        return VectorRMS() if ndim == 1 else _stacked(L1ToRMS(), ndim - 2)
    if role in ("gain", "scalar"):
        return MaxEntry(ndim)
    if role == "bias" and ndim:
        return _vector(ndim)
    if role in MATRICES and ndim >= 2:
        norm: Norm = MATRICES[role]
        return _stacked(Transposed(norm) if own is not None and own.transposed else norm, ndim - 2)
    return default.norm if default else None


def _stacked(norm: Norm, times: int) -> Norm:
    """Return the norm of weights with so many leading dimensions, the maximum over them."""
    for _ in range(times):
        norm = Experts(norm)
    return norm


def _vector(ndim: int) -> Norm:
    """Return the norm of a bias of so many dimensions."""
    return VectorRMS() if ndim == 1 else Flattened(VectorRMS(), ndim)


# ---- maps


def map_of(site: Site) -> Map | None:
    """Return a weight as a map, where its module's type or its shape says that it is one."""
    module, shape, own = site.module, site.shape, site.own
    if isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention):
        return Map(shape[0], shape[1], "gates") if len(shape) == 2 else None
    if site.part == "original0" and _is_weight_norm(site):
        return None
    if own not in WEIGHTS:
        return _stack(site) if len(shape) == 3 and is_stack(site) else None
    if isinstance(module, nn.modules.conv._ConvNd):
        return Map(module.out_channels, module.in_channels, "convolution", module.transposed)
    if len(shape) == 2 and isinstance(module, nn.Linear):
        return Map(shape[0], shape[1])
    if len(shape) == 2 and site.kind.endswith("Conv1D"):  # transformers' GPT-2
        return Map(shape[1], shape[0], transposed=True)
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if len(shape) == 2 and shape in (sizes, sizes[::-1]):
        return Map(sizes[0], sizes[1], transposed=shape != sizes)  # type: ignore[arg-type]
    return _stack(site) if len(shape) == 3 and is_stack(site) else None


def is_stack(site: Site) -> bool:
    """Return whether a weight of a module of its own is a stack of experts (E, …)."""
    module, E = site.module, site.shape[0]
    counts = (getattr(module, n, None) for n in ("num_experts", "num_local_experts", "n_experts"))
    named = EXPERTS.search(site.kind) or EXPERTS.search(site.label) or EXPERTS.search(site.own)
    return bool(named) or E in counts


def experts_around(site: Site) -> int:
    """Return how many experts stand side by side in the list that a weight is in, else 1."""
    for path, module in site.parents[1:]:
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1:
            kinds = {type(m) for m in module.children()}
            label = path.rpartition(".")[2]
            named = EXPERTS.search(label) or EXPERTS.search(next(iter(kinds)).__name__)
            if len(kinds) == 1 and named:
                return len(module)
    return 1


def _stack(site: Site) -> Map | None:
    """Return a stack of experts as a map, None where nothing says which dimension is which."""
    _, a, b = site.shape
    transposed = getattr(site.module, "is_transposed", None)
    if transposed is None:
        transposed = False if a == b else _is_stored_as_columns(site)
    if transposed is None:
        return None
    return Map(b, a, "stack", True) if transposed else Map(a, b, "stack")


def _is_stored_as_columns(site: Site) -> bool | None:
    """Return whether a stack of experts is stored (E, in, out), None where nothing tells it.

    Told by the module's own sizes, by its other stacks, which read what this one writes or write
    what it reads (whole, or a gated half), and by the fan-in of a router with E outputs.
    """
    E, a, b = site.shape
    module, rows, columns = site.module, False, False
    for i, o in (("input_size", "output_size"), ("in_features", "out_features")):
        sizes = getattr(module, i, None), getattr(module, o, None)
        rows, columns = rows or sizes == (b, a), columns or sizes == (a, b)
    stacks = [n for n, p in module._parameters.items() if p is not None and p.ndim == 3]
    for n in stacks:
        c, d = module._parameters[n].shape[1:]
        if n != site.own:
            rows |= (b == c and a in (d, 2 * d)) or (d == a and c in (b, 2 * b))
            columns |= (a == d and b in (c, 2 * c)) or (c == b and d in (a, 2 * a))
    if rows == columns:
        maps = (p for _, m in site.parents[1:3] for p in m.parameters() if p.ndim == 2)
        widths = {p.shape[1] for p in maps if p.shape[0] == E}
        first, last = site.own == stacks[0], site.own == stacks[-1]  # of the module's two or three
        rows = (first and b in widths) or (not first and last and a in widths)
        columns = (first and a in widths) or (not first and last and b in widths)
    return None if rows == columns else columns


def _is_weight_norm(site: Site) -> bool:
    lists = getattr(site.module, "parametrizations", {})
    return site.own in lists and type(lists[site.own][0]).__name__ == "_WeightNorm"


def _place_map(site: Site, own: Map, readers: Readers) -> Place | None:
    """Return the place of a map, None where its maps cannot be told apart."""
    if own.stored == "convolution":
        return _place_convolution(site, own, readers)
    divided = _divide_stack(site, own) if own.stored == "stack" else divide(site, own, readers)
    if divided is None:
        return None
    (sizes, turns), note = divided
    n = sizes if isinstance(sizes, int) else len(sizes)
    norm: Norm = MATRIX if (sizes, turns) == ONE else Blocks(MATRIX, sizes, turns)
    norm = Transposed(norm) if own.transposed else norm
    return Place("hidden", Experts(norm) if own.stored == "stack" else norm, n, note=note)


def _divide_stack(site: Site, own: Map) -> tuple[Any, str] | None:
    """Return how the rows of every expert are divided: gates beside what they gate, or not."""
    module = site.module
    has_gate = getattr(module, "has_gate", None)
    if "gate_up" in site.own or (has_gate is None and "up_gate" in site.own):
        if getattr(module, "is_concatenated", True):
            known = has_gate is not None
            return (2, 1), "" if known else f"gates, then what they gate, by its name ({site.own})"
        return ((1, 1), own.O // 2), ""
    others = [p.shape for p in module._parameters.values() if p is not None and p.ndim == 3]
    fan_ins = {s[1] if own.transposed else s[2] for s in others if tuple(s) != site.shape}
    fan_ins |= {m.input_size for m in _beside(site) if hasattr(m, "input_size")}
    if own.O not in fan_ins and own.O % 2 == 0 and own.O // 2 in fan_ins:
        return (2, 1), f"2 maps fused in every expert: {own.O // 2} of its {own.O} outputs are read"
    return ONE, ""


def _beside(site: Site) -> list[Any]:
    """Return the modules of the same class in the module around a weight's own."""
    if len(site.parents) < 2:
        return []
    children = site.parents[1][1].children()
    return [m for m in children if type(m) is type(site.module) and m is not site.module]


def _place_convolution(site: Site, own: Map, readers: Readers) -> Place:
    conv = site.module
    dims, groups, transposed = len(conv.kernel_size), conv.groups, conv.transposed
    norm = ConvRMSToRMS(dims=dims, groups=groups, transposed=transposed)
    if groups == 1 and not transposed:
        divided = divide(site, own, readers)
        if divided is not None and divided[0] in ((2, 1), (3, 1)):
            n = divided[0][0]
            return Place("hidden", Blocks(norm, n), n, note=divided[1])  # type: ignore[arg-type]
    return Place("hidden", norm)


# ---- every weight


def place_by_type(
    site: Site, own: Map | None, readers: Readers, beside: Place | None = None
) -> Place | None:
    """Return the place that a module's type, a shape or a common name tells, None if none does.

    own: the weight as a map; for a bias that of the weight beside it. readers: of all maps. beside:
    the place of the weight beside a bias.
    """
    if (site.part == "original0" and _is_weight_norm(site)) or site.own == "weight_g":
        return Place("gain", MaxEntry(site.weight.ndim))
    if (adapter := place_adapter(site)) is not None:
        return adapter
    known = place_by_family(site)
    if known is not None and (fitting := _fitting(known, site, own)) is not None:
        return fitting
    module = site.module
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Place("embedding", L1ToRMS())
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        gates = next((n for kind, n in GATES.items() if isinstance(module, kind)), 1)
        return _of_gates(site, 1 if "_hr" in site.own else gates)
    if isinstance(module, nn.MultiheadAttention):
        return _of_gates(site, 3 if site.own.startswith("in_proj") else 1)
    if isinstance(module, nn.Bilinear) and site.own == "weight":
        return Place("hidden", Flattened(MATRIX, 3))  # of the outer product of its two inputs
    if own is not None and site.own.endswith("bias"):
        return _place_bias(site, own, readers, beside)
    if own is not None:
        return _place_map(site, own, readers)
    one_by_one = isinstance(module, NORMALIZATIONS) or is_vector(site.shape)
    return _place_vector(site) if one_by_one else _place_table(site)


def _fitting(known: Place, site: Site, own: Map | None) -> Place | None:
    """Return a known place as a weight, or its bias, is stored; None if it does not fit."""
    norm, shape = known.norm, site.shape
    if site.own.endswith("bias"):
        norm = replace(norm, inner=VectorRMS()) if isinstance(norm, Blocks) else _vector(len(shape))
        known = replace(known, role="bias", norm=norm)
    elif own is not None and own.transposed:
        known = replace(known, norm=Transposed(norm))
    return None if known.norm.check(shape) else known


def _of_gates(site: Site, n: int) -> Place:
    """Return the place of a weight or a bias of n maps of equal rows, as torch's modules have."""
    if "bias" in site.own:
        if site.weight.ndim > 1:  # bias_k and bias_v, one more key and value each
            return Place("bias", _vector(site.weight.ndim))
        return Place("bias", VectorRMS() if n == 1 else Blocks(VectorRMS(), n), n)
    return Place("hidden", MATRIX if n == 1 else Blocks(MATRIX, n), n)


def _place_bias(site: Site, own: Map, readers: Readers, beside: Place | None) -> Place | None:
    """Return the place of the bias of a map, in the blocks of its weight."""
    beside = beside or _place_map(site, own, readers)
    norm: Any = beside and beside.norm
    while norm is not None and not isinstance(norm, Blocks):
        norm = getattr(norm, "inner", None)
    if beside is None or norm is None:
        return beside and Place("bias", VectorRMS())
    vector = replace(norm, inner=VectorRMS())
    return None if vector.check(site.shape) else Place("bias", vector, beside.maps)


def _place_vector(site: Site) -> Place:
    """Return the place of a weight with one long dimension, or with none, by its name."""
    ndim, own, kind = site.weight.ndim, site.own, site.kind
    known = isinstance(site.module, NORMALIZATIONS | nn.PReLU) or NORMALIZES.search(kind)
    if ndim == 0:
        return Place("scalar", MaxEntry(0), note="a scalar")
    if not known and TABLE.search(own):
        norm = VectorRMS() if ndim == 1 else _stacked(L1ToRMS(), ndim - 2)
        return Place("embedding", norm, note="one row of a table, by its name")
    role = "bias" if BIAS.search(own) else "gain"
    norm = MaxEntry(ndim) if role == "gain" else _vector(ndim)
    shape = "1-D" if ndim == 1 else "a vector"
    note = f"{shape} and named {own}, of a {kind}: taken for a {role}"
    return Place(role, norm, note="" if known and own in ("weight", "bias") else note)


def _place_table(site: Site) -> Place | None:
    """Return the place of a weight with two long dimensions or more, by its name."""
    ndim, own, shape = site.weight.ndim, site.own, site.shape
    if is_stack(site) and BIAS.search(own) and ndim == 2:  # one of every expert
        halves = 2 if "gate_up" in own else 1
        norm = _expert_bias(site, halves)
        return Place("bias", Experts(norm), halves)
    if BIAS.search(own) and "table" not in own:
        return Place("bias", _vector(ndim), note=f"{ndim}-D and named {own}: taken for a bias")
    if TABLE.search(own):
        return Place(
            "embedding", _stacked(L1ToRMS(), ndim - 2), note="rows of a table, by its name"
        )
    if ENTRIES.search(own):
        return Place("gain", MaxEntry(ndim), note=f"named {own}: taken for gains")
    if own == "weight" and ndim == 2:
        return Place("hidden", MATRIX, note=f"a map, stored (out, in), of a {site.kind}")
    if ndim == 3 and heads(site.module) == shape[1]:
        note = f"a map, stored (in, heads, out of each), of a {site.kind}"
        return Place("hidden", Flattened(Transposed(MATRIX), 3), note=note)
    if ndim == 3 and shape[1] == shape[2]:
        note = f"{shape[0]} square maps side by side, of a {site.kind}"
        return Place("hidden", Experts(MATRIX), note=note)
    return None


def _expert_bias(site: Site, halves: int) -> Norm:
    if halves == 1:
        return VectorRMS()
    if getattr(site.module, "is_concatenated", True):
        return Blocks(VectorRMS(), 2)
    return Blocks(VectorRMS(), (1, 1), site.shape[1] // 2)
