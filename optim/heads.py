"""The heads of a model: maps whose outputs are logits."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .fused import ONE, SINGLE, divide, names_several
from .sites import Map, Readers, Site

ADAPTIVE = nn.AdaptiveLogSoftmaxWithLoss


def declared_head(model: nn.Module) -> Tensor | None:
    """Return the weight that a model of transformers declares as its head, if it does."""
    get: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    try:
        return getattr(get() if get is not None else None, "weight", None)
    except (NotImplementedError, AttributeError):  # of a model that has none
        return None


def guessed_heads(
    model: nn.Module, sites: Mapping[str, Site], maps: Mapping[str, Map | None]
) -> dict[str, str]:
    """Return {name: why} of the maps that look like heads.

    They map to as many outputs as an embedding has rows or, in a model that declares no head, to
    outputs that no map of it reads, convolutions apart; they are in no layer that is repeated, and
    not the only map.
    """
    vocabularies = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = {n: m for n, m in maps.items() if m is not None and m.stored == "matrix"}
    alone = sum(own is not None for own in maps.values()) == 1 and not vocabularies
    kinds = {sites[n].key: m for n, m in maps.items() if m is not None}
    readers = Readers({key: own for key, own in kinds.items() if own.stored != "convolution"})
    heads = {}
    for name, own in matrices.items():
        site = sites[name]
        softmax = next((a for a, m in site.parents if isinstance(m, ADAPTIVE)), None)
        if softmax is not None and not readers.reads(own.O, below=softmax):
            heads[name] = ""
        inside = any(part.isdigit() for part in site.path.split(".")[:-1])
        square, single = own.O == own.I, SINGLE.fullmatch(site.label)
        if inside or alone or square or single or names_several(site.label):
            continue
        if own.O in vocabularies:
            heads[name] = f"taken for a head: {own.O} outputs, as many as an embedding has rows"
        elif (
            declared_head(model) is None
            and divide(site, own, readers) == (ONE, "")
            and not any(  # reshaped outputs are read in parts
                own.O % parts == 0 and readers.reads(own.O // parts) for parts in (1, 2, 3, 4)
            )
        ):
            heads[name] = f"taken for a head: no map reads its {own.O} outputs"
    return heads
