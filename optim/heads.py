"""The heads of a model: maps whose outputs are logits."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .experts import routes
from .fused import ONE, SINGLE, divide, names_several
from .sites import Map, Readers, Site

ADAPTIVE = nn.AdaptiveLogSoftmaxWithLoss


def declared_head(model: nn.Module) -> Tensor | None:
    """Return the weight that a model of transformers declares as its head, if it does."""
    get: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    try:
        return getattr(get() if get is not None else None, "weight", None)
    except Exception:  # of a model that has none: it may raise anything
        return None


def guessed_heads(
    model: nn.Module,
    sites: Mapping[str, Site],
    maps: Mapping[str, Map | None],
    readers: Readers,
    *,
    declared: bool,
) -> dict[str, str]:
    """Return {name: why} of the maps that look like heads.

    They map to as many outputs as an embedding has rows or, in a model that declares no head, to
    outputs that no map of it reads. They are not the model's only map and no router of experts, and
    of a repeated layer they are the last map. readers: of all maps. declared: the model has a head.
    """
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    vocabularies = {table.num_embeddings for table in tables}
    of_paths = {sites[n].key: own for n, own in maps.items() if own is not None}
    linear = Readers({k: own for k, own in of_paths.items() if own.stored != "convolution"})
    heads = {}
    for name, own in maps.items():
        site = sites[name]
        if own is None or own.stored != "matrix":
            continue
        softmax = next((a for a, m in site.parents if isinstance(m, ADAPTIVE)), None)
        if softmax is not None and not linear.reads(own.O, below=softmax):
            heads[name] = ""
        elif not _may_be_head(site, own, linear, readers) or (
            len(of_paths) == 1 and not vocabularies
        ):
            continue
        elif own.O in vocabularies and not linear.reads(own.O, after=site.path):
            heads[name] = f"taken for a head: {own.O} outputs, as many as an embedding has rows"
        elif not declared and not _is_read(site, own, linear, readers):
            heads[name] = f"taken for a head: no map reads its {own.O} outputs"
    return heads


def _may_be_head(site: Site, own: Map, linear: Readers, readers: Readers) -> bool:
    """Return whether a map may be a head by where it stands, its name and its shape."""
    parts = site.path.split(".")
    first = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    if first is not None:  # in a list of layers, or of heads
        last = readers.is_last(site.path, ".".join(parts[: first + 1]))
        if not last or linear.reads(own.O):
            return False
    named = SINGLE.fullmatch(site.label) or names_several(site.label)
    return not (own.O == own.I or named or routes(site, own.O))


def _is_read(site: Site, own: Map, linear: Readers, readers: Readers) -> bool:
    """Return whether a map reads the outputs of another, or could.

    Reshaped outputs are read in parts, and a convolution that follows reads what was reshaped.
    """
    if divide(site, own, readers) != (ONE, ""):
        return True
    parts = any(own.O % n == 0 and linear.reads(own.O // n) for n in (1, 2, 3, 4))
    return parts or readers.last_convolution > readers.position(site.path)
