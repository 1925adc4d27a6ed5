"""Known modules whose weights neither types, shapes nor common names tell apart: the one table.

Each row: the class of a module, the name of a weight below it, and the weight's place, which is
read from the module's own attributes. What is not here is placed by module_types.py and fused.py.
Source: the forward passes of transformers 5.23.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .norms import Norm, RMSToLinf, RMSToRMS
from .sites import Place, Site
from .views import Blocks, Experts, Transposed

MATRIX, LOGITS = RMSToRMS(), RMSToLinf()


def place_by_family(site: Site) -> Place | None:
    """Return the place that the table has for a weight, or for the weight that a bias belongs to.

    None where there is none, and where the module is not as the table knows it.
    """
    for path, module in site.parents[:3]:
        below = f"{site.path}.{site.own}"[len(path) + 1 if path else 0 :].lstrip(".")
        weight = below.removesuffix("bias") + "weight" if below.endswith(".bias") else below
        for kind, name, place in FAMILIES:
            if fnmatchcase(type(module).__name__, kind) and fnmatchcase(weight, name):
                try:
                    known = place(module)
                except AttributeError:  # another version of the family
                    continue
                if known is not None:
                    return known
    return None


def number(module: Any, *names: str) -> int | None:
    """Return the first of these attributes that a module or its config has as a whole number."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def heads(module: nn.Module) -> int:
    """Return the number of an attention's heads, 0 where it does not say it."""
    return number(module, "num_attention_heads", "num_heads", "n_heads", "n_head", "nheads") or 0


def fused(*rows: int, turns: int = 1) -> Place:
    """Return the place of maps of so many rows each, which come so many times in turn."""
    return Place("hidden", Blocks(MATRIX, rows, turns), len(rows))


def head_by_head(d: int, H: int) -> Place:
    """Return the place of queries, keys and values of each head in turn, d rows each."""
    return fused(d, d, d, turns=H)


def _falcon(m: Any) -> Place:
    H, K, d = m.num_heads, m.num_kv_heads, m.head_dim
    if m.new_decoder_architecture:
        return fused(H // K * d, d, d, turns=K)
    return fused(H * d, d, d) if m.multi_query else head_by_head(d, H)


def _bigcode(m: Any) -> Place:
    if m.is_cross_attention:
        return fused(m.embed_dim, m.embed_dim)
    kv = m.kv_dim
    return fused(m.embed_dim, kv, kv) if m.multi_query else head_by_head(m.head_dim, m.num_heads)


def _levit(m: Any) -> Place:
    d, d_v, H = m.key_dim, m.attention_ratio * m.key_dim, m.num_attention_heads
    return (
        fused(d, d, d_v, turns=H) if hasattr(m, "queries_keys_values") else fused(d, d_v, turns=H)
    )


def _gated_delta_net(m: Any) -> Place:
    k, v = m.head_k_dim, m.num_v_heads // m.num_k_heads * m.head_v_dim
    return fused(k, k, v, v, turns=m.num_k_heads)


def _gated_delta_net_scalars(m: Any) -> Place:
    each = m.num_v_heads // m.num_k_heads
    return fused(each, each, turns=m.num_k_heads)


def _gated_queries(m: Any) -> Place | None:
    H = heads(m)
    return fused(m.head_dim, m.head_dim, turns=H) if H else None


def _mamba_in(m: Any) -> Place | None:
    """Return the place of x and z; of Mamba2 of z, x, B, C and the time steps."""
    inner = number(m, "intermediate_size", "d_inner")
    states = number(m, "ssm_state_size", "d_state")
    if inner is None or states is None:
        return None
    groups = number(m, "n_groups", "ngroups")
    if groups is None:
        in_turn = hasattr(m, "n_mamba_heads")  # Zamba's, channel by channel
        return fused(1, 1, turns=inner) if in_turn else fused(inner, inner)
    states = groups * states
    return fused(inner, inner, states, states, number(m, "num_heads", "nheads") or 0)


def _mamba_x(m: Any) -> Place | None:
    rank, states = number(m, "time_step_rank", "dt_rank"), number(m, "ssm_state_size", "d_state")
    return fused(rank, states, states) if rank and states else None


def _mamba_x_of_heads(m: Any) -> Place | None:
    of_one = _mamba_x(m)
    return of_one and Place("hidden", Experts(of_one.norm), of_one.maps)


def _dbrx(stored: Norm) -> Callable[[Any], Place]:
    return lambda m: Place("hidden", Blocks(stored, m.moe_num_experts))


# Class of a module, weight below it, place. Patterns are those of file names.
FAMILIES: tuple[tuple[str, str, Callable[[Any], Place | None]], ...] = (
    ("FalconAttention", "query_key_value.weight", _falcon),
    ("CodeGenAttention", "qkv_proj.weight", lambda m: head_by_head(m.embed_dim // 4, 4)),
    ("GPTBigCodeAttention", "c_attn.weight", _bigcode),
    ("MiniMaxLightningAttention", "qkv_proj.weight", lambda m: head_by_head(m.head_dim, heads(m))),
    (
        "DisentangledSelfAttention",
        "in_proj.weight",
        lambda m: head_by_head(m.attention_head_size, heads(m)),
    ),
    ("LevitAttention*", "*keys_values.linear.weight", _levit),
    ("Qwen3Next*", "in_proj_qkvz.weight", _gated_delta_net),
    ("Qwen3Next*", "in_proj_ba.weight", _gated_delta_net_scalars),
    ("Qwen3*Attention", "q_proj.weight", _gated_queries),
    (
        "FocalNetModulation",
        "projection_in.weight",
        lambda m: fused(m.dim, m.dim, m.focal_level + 1),
    ),
    ("*", "in_proj.weight", _mamba_in),
    ("*", "x_proj.weight", _mamba_x),
    ("ZambaMambaMixer", "x_proj_weight", _mamba_x_of_heads),
    (
        "MobileViTV2LinearSelfAttention",
        "qkv_proj.convolution.weight",
        lambda m: fused(1, m.embed_dim, m.embed_dim),
    ),
    ("*", "*kv_a*.weight", lambda m: fused(m.kv_lora_rank, m.qk_rope_head_dim)),
    ("*", "*kv_b*.weight", lambda m: fused(m.qk_nope_head_dim, m.v_head_dim, turns=heads(m))),
    ("DbrxExpertGLU", "[wv]1", _dbrx(MATRIX)),
    ("DbrxExpertGLU", "w2", _dbrx(Transposed(MATRIX))),
    ("MobileBertLMPredictionHead", "dense.weight", lambda m: Place("head", Transposed(LOGITS))),
    ("WavLMAttention", "gru_rel_pos_linear.weight", lambda m: fused(4, 4)),
)
