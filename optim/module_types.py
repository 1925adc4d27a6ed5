"""The role, norm and maps of a weight, by its module's type, its shape and common names.

O, I: fan-out and fan-in; E: experts; K: kernel positions.
"""

import re
from dataclasses import replace
from typing import Any

from torch import nn

from .adapters import place_adapter
from .experts import divide_stack, halves, is_stack, routes, stack
from .families import LOGITS, MATRIX, heads, place_by_family
from .fused import ONE, SINGLE, Division, divide
from .norms import L1ToRMS, MaxEntry, Norm, VectorRMS
from .sites import WEIGHTS, Map, Place, Readers, Site, is_vector
from .views import Blocks, ConvRMSToRMS, Experts, Flattened, Transposed

# Masses of a model that declares no structure: each role's total, shared equally by its maps (fused
# queries, keys and values are three). As in model.py, what is between embedding and head has six
# times the mass of either.
MASSES = {"embedding": 1.0, "hidden": 6.0, "head": 1.0, "gain": 0.5, "bias": 0.5, "scalar": 0.1}
MATRICES = {"embedding": L1ToRMS(), "hidden": MATRIX, "head": LOGITS}  # norms by role
GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}  # maps fused in one weight
NORMALIZATIONS = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase
# Names that many models give to weights of modules of their own, by their parts.
TABLE = re.compile(
    r"(^|_)(cls|pos|positions?|positional|tokens?|emb|embeds?|embeddings?|latents?|query|queries"
    r"|probe|prompts?|codevectors?|table|newline|separator)(_|$)"
)
NO_TABLE = re.compile(r"(proj|projection|mixer|mlp|weight|head|out|logits|const)$")
BIAS = re.compile(r"(^|_)(bias|biases|beta|shift|offset)(_|$)|^b(\d+|_?[qkvoih]|_\w{1,3})?$")
ENTRIES = re.compile(r"A_log|(^|_)[DA]$|scale|gamma|lambda|decay|time_|^alpha")
NORMALIZES = re.compile(r"norm|GRN", re.IGNORECASE)


def norm_of_role(
    role: str | None, site: Site, own: Map | None, default: Place | None
) -> Norm | None:
    """Return the norm of a role for a weight of any shape, None for a role that has none."""
    ndim = site.weight.ndim
    if own is not None and role in MATRICES and own.stored == "convolution":
        return _convolution(site, MATRICES[role])
    if own is not None and role in MATRICES and own.stored == "bilinear":
        return Flattened(MATRICES[role], 3)
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


def _convolution(site: Site, inner: Norm) -> Norm:
    conv = site.module
    dims, groups, transposed = len(conv.kernel_size), conv.groups, conv.transposed
    return ConvRMSToRMS(inner, dims, groups, transposed)


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
        return stack(site) if len(shape) == 3 and is_stack(site) else None
    if isinstance(module, nn.Bilinear):
        return Map(shape[0], shape[1] * shape[2], "bilinear")
    if isinstance(module, nn.modules.conv._ConvNd):
        return Map(module.out_channels, module.in_channels, "convolution", module.transposed)
    if len(shape) == 2 and isinstance(module, nn.Linear):
        return Map(shape[0], shape[1])
    if len(shape) == 2 and site.kind.endswith("Conv1D"):  # transformers' GPT-2
        return Map(shape[1], shape[0], transposed=True)
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if len(shape) == 2 and shape in (sizes, sizes[::-1]):
        return Map(sizes[0], sizes[1], transposed=shape != sizes)  # type: ignore[arg-type]
    return stack(site) if len(shape) == 3 and is_stack(site) else None


def _parametrization(site: Site) -> Any:
    """Return what makes a weight of its parameters, None where nothing does."""
    lists = getattr(site.module, "parametrizations", {})
    return lists[site.own][0] if site.own in lists else None


def _is_weight_norm(site: Site) -> bool:
    return type(_parametrization(site)).__name__ == "_WeightNorm"


def _is_householder(site: Site) -> bool:
    kind = getattr(_parametrization(site), "orthogonal_map", None)
    return getattr(kind, "name", "") == "householder"


def _place_map(site: Site, own: Map, readers: Readers) -> Place | None:
    """Return the place of a map, None where its maps cannot be told apart."""
    if own.stored == "bilinear":
        return Place("hidden", Flattened(MATRIX, 3))  # of the outer product of its two inputs
    divided = divide_stack(site, own) if own.stored == "stack" else divide(site, own, readers)
    if own.stored == "convolution" and (site.module.groups > 1 or own.transposed):
        divided = ONE, ""
    if divided is None:
        return None
    division, note = divided
    inner = _convolution(site, MATRIX) if own.stored == "convolution" else MATRIX
    norm = _blocks(inner, division)
    if own.stored != "convolution" and own.transposed:
        norm = Transposed(norm)
    single = SINGLE.fullmatch(site.label) or own.O <= own.I or readers.has_one()
    if division == ONE and own.stored == "matrix" and not (note or single or readers.reads(own.O)):
        note = f"one map, though no map reads its {own.O} outputs whole"
    norm = Experts(norm) if own.stored == "stack" else norm
    return Place("hidden", norm, _count(division), note=note)


def _blocks(inner: Norm, division: Division) -> Norm:
    return inner if division == ONE else Blocks(inner, *division)


def _count(division: Division) -> int:
    sizes, _ = division
    return sizes if isinstance(sizes, int) else len(sizes)


# ---- every weight


def place_by_type(
    site: Site, own: Map | None, readers: Readers, beside: Place | None = None
) -> Place | None:
    """Return the place that a module's type, a shape or a common name tells, None if none does.

    own: the weight as a map; for a bias that of the weight beside it. readers: of all maps. beside:
    the place of the weight beside a bias.
    """
    older = site.own.endswith("_g") and f"{site.own[:-1]}v" in site.module._parameters
    if (site.part == "original0" and _is_weight_norm(site)) or older:
        return Place("gain", MaxEntry(site.weight.ndim))
    if site.part and _is_householder(site):  # its diagonal holds signs, which a matrix's step moves
        note = "vectors of Householder reflections, entry by entry"
        return Place("gain", MaxEntry(site.weight.ndim), note=note)
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
    elif own is not None and own.stored == "convolution" and isinstance(norm, Blocks):
        known = replace(known, norm=replace(norm, inner=_convolution(site, norm.inner)))
    elif own is not None and own.transposed:
        known = replace(known, norm=Transposed(norm))
    return None if known.norm.check(shape) else known


def _of_gates(site: Site, n: int) -> Place:
    """Return the place of a weight or a bias of n maps of equal rows, as torch's modules have."""
    if "bias" in site.own:
        if site.weight.ndim > 1:  # bias_k and bias_v, one more key and value each
            return Place("bias", _vector(site.weight.ndim))
        return Place("bias", _blocks(VectorRMS(), (n, 1)), n)
    return Place("hidden", _blocks(MATRIX, (n, 1)), n)


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
    if not known and _is_table(own):
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
        division = halves(site, shape[1]) if "gate_up" in own else ONE
        return Place("bias", Experts(_blocks(VectorRMS(), division)), _count(division))
    if _is_table(own):
        norm = _stacked(L1ToRMS(), ndim - 2)
        return Place("embedding", norm, note="rows of a table, by its name")
    if "attention_bias" in own:  # of scores, one by one
        return Place("bias", MaxEntry(ndim), note=f"named {own}: added to scores")
    if BIAS.search(own):
        return Place("bias", _vector(ndim), note=f"{ndim}-D and named {own}: taken for a bias")
    if ndim == 2 and routes(site, shape[0]):
        return Place("hidden", MATRIX, note=f"a router, stored (experts, in), of a {site.kind}")
    if ENTRIES.search(own):
        return Place("gain", MaxEntry(ndim), note=f"named {own}: taken for gains")
    if own == "weight" and ndim == 2:
        bias = getattr(site.module, "bias", None)
        columns = getattr(bias, "shape", None) == shape[1:] != shape[:1]
        norm = Transposed(MATRIX) if columns else MATRIX
        order = "(in, out)" if columns else "(out, in)"
        return Place("hidden", norm, note=f"a map, stored {order}, of a {site.kind}")
    if ndim == 3 and heads(site.module) == shape[1]:
        note = f"a map, stored (in, heads, out of each), of a {site.kind}"
        return Place("hidden", Flattened(Transposed(MATRIX), 3), note=note)
    if ndim == 3 and shape[1] == shape[2] and shape[0] > 1:
        note = f"{shape[0]} square maps side by side, of a {site.kind}"
        return Place("hidden", Experts(MATRIX), note=note)
    return None


def _is_table(name: str) -> bool:
    """Return whether a name is one of rows: of positions, tokens, relative biases."""
    if name.endswith("table"):
        return True
    adds = BIAS.search(name) or ENTRIES.search(name) or NO_TABLE.search(name)
    return bool(TABLE.search(name)) and not adds
