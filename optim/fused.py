"""Several maps stored as one weight: how its rows are divided, by names and shapes.

Names are those that many models share. Shapes tell more: the outputs of one map are read, whole, by
a map beside it; where only a half, a third or a quarter is, the weight holds so many maps.
O, I: fan-out and fan-in of the weight.
"""

import re

from .families import heads, number
from .sites import Map, Readers, Site

# Names of weights that hold several maps. A part of a name counts.
QUERIES_KEYS_VALUES = re.compile(r"qkv|query_key_value|queries_keys_values|c_attn")
HEAD_BY_HEAD = "query_key_value"  # GPT-NeoX's name, and that of the models that descend from it
KEYS_VALUES = re.compile(r"(^|_|to)kv(_|$)|keys?_values?")
GATED = re.compile(r"gate_(and_)?up|up_gate|w12|w13")
# Names of one map alone: queries, keys or values; and of a path around wider ones.
SINGLE = re.compile(r"(q|k|v|query|key|value|queries|keys|values)(_[ab])?(_(proj|linear|lin))?")
SHORTCUT = re.compile(r"downsample|shortcut|skip|residual")
FUSED = re.compile(r"fused|in_proj|packed|(^|_)qk(_|$)|x_proj|zx|xbc")

KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "num_heads_kv", "n_kv_heads", "kv_n_heads")
KEY_HEADS += ("n_kv_head", "n_local_heads", "n_query_groups", "kv_heads")

Division = tuple[int | tuple[int, ...], int]  # sizes and turns of Blocks
ONE: Division = (1, 1)


def divide(site: Site, own: Map, readers: Readers) -> tuple[Division, str] | None:
    """Return how the rows of a map are divided, and what of it was guessed.

    readers: of the model's maps. None where the name says that there are several maps, and nothing
    says in what order.
    """
    label, read = site.label, _read_beside(site, own.O, readers)
    if SINGLE.fullmatch(label) or SHORTCUT.search(site.path):
        return ONE, ""
    fused = QUERIES_KEYS_VALUES.search(label) or KEYS_VALUES.search(label)
    if (own.O == own.I and (fused or FUSED.search(label))) or (read == 1 and not fused):
        return ONE, ""
    if QUERIES_KEYS_VALUES.search(label):
        return _queries_keys_values(site, own, read)
    if KEYS_VALUES.search(label):
        return _keys_values(site, own, read)
    if GATED.search(label):
        return ((2, 1), _note(site, 2)) if own.O % 2 == 0 else None
    if read is not None and read > 1:
        width = own.O // read
        beside = f"{width} of its {own.O} outputs are read by a map that follows"
        if own.O > own.I:
            return (read, 1), f"{read} maps fused in one weight: {beside}"
        return ONE, f"one map, though {beside}"
    return None if FUSED.search(label) else (ONE, "")


def names_several(label: str) -> bool:
    """Return whether a name is one of weights that hold several maps."""
    kinds = QUERIES_KEYS_VALUES, KEYS_VALUES, GATED, FUSED
    return any(kind.search(label) for kind in kinds)


def _note(site: Site, maps: int, order: str = "") -> str:
    return f"{maps} maps fused in one weight, by its name ({site.label}){order}"


def _queries_keys_values(site: Site, own: Map, read: int | None) -> tuple[Division, str] | None:
    """Return the division of a weight that is named as queries, keys and values."""
    attention = site.parents[1][1] if len(site.parents) > 1 else site.module
    H, note = heads(attention), _note(site, 3)
    if site.label == HEAD_BY_HEAD:
        if H == 0 or own.O % (3 * H):
            return None
        return (3, H), _note(site, 3, f", head by head of {H}")
    K = number(attention, *KEY_HEADS)
    if H and K and H != K:
        d = number(attention, "head_dim", "head_size") or own.I // H
        whole = (H + 2 * K) * d == own.O
        return (((H * d, K * d, K * d), 1), note) if whole else None
    if own.O == 2 * own.I and site.label == "c_attn":  # GPT-2's keys and values, of another text
        return (2, 1), _note(site, 2)
    if own.O == 3 * own.I or (read == 3 and own.O % 3 == 0):
        return (3, 1), note
    return None


def _keys_values(site: Site, own: Map, read: int | None) -> tuple[Division, str] | None:
    """Return the division of a weight that is named as keys and values."""
    attention = site.parents[1][1] if len(site.parents) > 1 else site.module
    K = number(attention, *KEY_HEADS)
    d = number(attention, "head_dim", "kv_channels")
    if d == own.O:
        return ONE, ""
    if own.O % 2 == 0 and (own.O == 2 * own.I or read == 2 or (K and d and 2 * K * d == own.O)):
        return (2, 1), _note(site, 2)
    return None


def _read_beside(site: Site, rows: int, readers: Readers) -> int | None:
    """Return into how many equal parts the maps that follow a weight divide its outputs.

    1 is all of them, which a map before it may read as well. None where nothing near it reads a
    whole, a half, a third or a quarter of them.
    """
    key = site.path  # of a bias too
    for path, _ in site.parents[1:4]:
        if readers.reads(rows, below=path):
            return 1
        for parts in (2, 3, 4) if rows >= 4 else ():
            if rows % parts == 0 and readers.reads(rows // parts, below=path, after=key):
                return parts
    return None
