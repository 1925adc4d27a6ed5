"""A judge of placements that reads no names: it moves parts of a weight a little, and looks at what else moves.

A reverse pass from one operand of an operation tells of every entry of every weight whether a small change of it
moves this operand. So the graph of one forward pass, in float64, is asked three questions of a weight W.

Which maps does it hold? Operations of which two operands depend on W are its *meetings*: queries meet keys in a
product, gates meet what they gate. The signature of a row is the set of operands that it moves. Rows of one map have
one signature, rows of two maps have two.

Which dimension is which? Where W is first contracted, one entry of the result depends on one row of a map, whole, or on
one row of a table. Experts, and groups of a convolution, are rows whose results depend on other inputs.

What is it for? A map is contracted with activations, as it is stored; a table is chosen from, or added to. A
head's rows are single logits of a cross-entropy.

What a norm says of W is read from View.split(): matrices (rows: fan-out), rows of tables and heads, entries.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from optim.norms import L1ToRMS, MaxEntry, Norm, RMSToLinf, Spectral, VectorRMS
from optim.sites import canonical
from optim.views import View
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.utils import parametrize

Edge = tuple[Any, int]  # a node of the graph, and which of its results
# In a reverse pass, a weight that gets less than this part of what any gets, and an entry of it that gets less than
# this part of what its weight gets, get rounding.
ROUNDING = 1e-12
INFLUENCE = 1e-12
NOISE = 0.5  # added to weights over the root of their width, so that none is zero and attention is not flat
CONTACTS = 12  # of a weight with more, such as a recurrent one's, that are probed
LINE = 24  # entries of a result that are probed along each of its dimensions

# Operations that join operands without a product of them: adding, and putting side by side.
JOINS = (
    "Add", "Sub", "Rsub", "Cat", "Stack", "Where", "SWhere", "IndexPut", "CopySlices", "IndexAdd", "MaskedScatter",
    "IndexCopy", "Scatter", "SliceScatter", "SelectScatter", "Complex", "MaskedFill",
)  # fmt: skip
PRODUCTS = ("Mm", "Addmm", "Bmm", "Baddbmm", "Mv", "Addmv", "Dot", "Convolution", "Trilinear", "Bilinear", "Linear")
VIEWS = (
    "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Reshape", "Select", "Slice", "Split",
    "SplitWithSizes", "UnsafeSplit", "Unbind", "Chunk", "Squeeze", "Unsqueeze", "Expand", "Clone", "ToCopy", "Alias",
    "Index", "IndexSelect", "AsStrided", "Narrow", "Contiguous", "Diagonal", "MT", "Numpy_T", "Movedim", "Swapaxes",
)  # fmt: skip
LOOKUPS = ("Embedding", "EmbeddingBag", "Index", "IndexSelect", "Gather")
CHOICES = (*LOOKUPS, "Add", "Cat", "Stack", "Repeat", "Where", "MaskedFill", "CopySlices", "IndexPut", "Sub")


def kind_of(node: Any) -> str:
    """Its operation: AddmmBackward0 is Addmm."""
    name = node.name().rpartition("::")[2]
    return name.partition("Backward")[0]


def one_of(node: Any, kinds: Iterable[str]) -> bool:
    return kind_of(node).rstrip("0123456789") in kinds or kind_of(node) in kinds


def shape_of(edge: Edge) -> tuple[int, ...]:
    return tuple(edge[0]._input_metadata[edge[1]].shape)


def dtype_of(edge: Edge) -> torch.dtype:
    return edge[0]._input_metadata[edge[1]].dtype


# ---- what a norm says of a weight


@dataclass(frozen=True)
class Leaves:
    """The innermost blocks of a norm: arrays (blocks, rows, columns) of places in the flat weight."""

    kind: str  # "matrix", "table", "head", "entries", "vector", "whole"
    places: Tensor
    factor: float


def leaves(norm: Norm, places: Tensor, factor: float = 1.0) -> list[Leaves]:
    """The blocks of a weight of which `places` are a stack (n, *shape)."""
    if isinstance(norm, View):
        factor *= norm.factor(places.shape)
        parts = norm.split(places)
        return [leaf for p in parts for leaf in leaves(norm.inner, p.flatten(0, 1), factor)]
    kinds = (
        (Spectral, "matrix"),
        (L1ToRMS, "table"),
        (RMSToLinf, "head"),
        (VectorRMS, "vector"),
        (MaxEntry, "entries"),
    )
    kind = next((name for of, name in kinds if isinstance(norm, of)), "whole")
    blocks = places.long()
    if kind in ("matrix", "table", "head"):
        return [Leaves(kind, blocks, factor)]
    flat = blocks.flatten(1)
    return [Leaves(kind, flat[..., None] if kind == "vector" else flat[:, None], factor)]


# ---- the graph of a forward pass


def _closed(to_operands: Any, of_results: Any) -> Any:
    """Numbers are scaled by the largest of them, which says nothing: whichever it is, the result is the same."""
    return tuple(None if g is None else torch.zeros_like(g) for g in to_operands)


def _opened(to_operands: Any, of_results: Any) -> Any:
    """A unit that is never open in a batch would hide all that goes through it."""
    return tuple(
        None if g is None or of_results[0] is None or g.shape != of_results[0].shape else of_results[0]
        for g in to_operands
    )


class Graph:
    """The operations between a model's weights and its loss, operands before results."""

    def __init__(self, loss: Tensor, weights: Mapping[str, Tensor]) -> None:
        self.names = {id(p): name for name, p in weights.items()}
        self.weights = dict(weights)
        self.matrices = [name for name, p in weights.items() if is_matrix(p.shape)]
        self.bits = {name: 1 << i for i, name in enumerate(weights)}
        self.generator = torch.Generator().manual_seed(0)
        self.order = self._ordered(loss.grad_fn)
        self.consumers: dict[Any, list[Any]] = defaultdict(list)
        self.leaf_of: dict[str, Any] = {}
        self.mask: dict[Any, int] = {}  # the weights that a result depends on
        self.data: dict[Any, bool] = {}  # does it depend on the batch?
        self.label: dict[Any, int] = {}  # of the operations that lead to it: equal for all experts
        for node in self.order:
            self._describe(node)
            if one_of(node, ("Max", "Amax", "Maximum", "Cummax")):
                node.register_hook(_closed)
            elif one_of(node, ("Clamp", "Hardtanh", "Threshold")):
                node.register_hook(_opened)

    def _ordered(self, root: Any) -> list[Any]:
        order, stack, seen = [], [(root, False)], set()
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack += [(f, False) for f, _ in node.next_functions if f is not None]
        return order

    def _describe(self, node: Any) -> None:
        operands = [(f, nr) for f, nr in node.next_functions]
        for f, _ in operands:
            if f is not None:
                self.consumers[f].append(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            name = self.names.get(id(variable))
            self.mask[node] = self.bits[name] if name else 0
            self.data[node] = name is None
            self.label[node] = hash(("leaf", tuple(variable.shape)))
            if name:
                self.leaf_of[name] = node
            return
        fs = [(f, nr) for f, nr in operands if f is not None]
        mask = 0
        for f, _ in fs:
            mask |= self.mask[f]
        self.mask[node] = mask
        self.data[node] = any(self.data[f] for f, _ in fs) or one_of(node, ("Embedding", "EmbeddingBag"))
        start = getattr(node, "_saved_start", None) if kind_of(node) == "Slice" else None
        ends = [(self.label[f], nr) if f is not None else None for f, nr in operands]
        if kind_of(node) == "Unbind":
            start = "unbind"
        self.label[node] = hash((kind_of(node), start, tuple(ends)))

    def pull(self, edge: Edge, gradient: Tensor, targets: list[Any]) -> list[Tensor | None]:
        """Gradients of <gradient, a result> in weights, or in other results."""
        return list(
            torch.autograd.grad([GradientEdge(*edge)], targets, [gradient], retain_graph=True, allow_unused=True)
        )

    def random(self, edge: Edge) -> Tensor:
        return torch.randn(shape_of(edge), dtype=dtype_of(edge), generator=self.generator)

    def one(self, edge: Edge, place: int) -> Tensor:
        hot = torch.zeros(shape_of(edge), dtype=dtype_of(edge))
        hot.view(-1)[place] = 1
        return hot


def support(gradient: Tensor | None) -> Tensor:
    """The places, in the flat tensor, that are not 0."""
    if gradient is None:
        return torch.empty(0, dtype=torch.long)
    size = gradient.detach().abs().flatten()
    return (size > INFLUENCE * size.max()).nonzero()[:, 0] if size.numel() else size.long()


# ---- meetings


def is_matrix(shape: Iterable[int]) -> bool:
    """Has it two long dimensions or more?"""
    return sum(n > 1 for n in shape) >= 2


def operands_of(graph: Graph, node: Any) -> list[tuple[int, Edge]]:
    """(position, edge) of the operands of a product that depend on weights."""
    edges = [(k, (f, nr)) for k, (f, nr) in enumerate(node.next_functions) if f is not None and graph.mask[f]]
    return [] if one_of(node, JOINS) else edges


def movers(graph: Graph, edge: Edge, names: list[str]) -> dict[str, Tensor]:
    """Which entries of weights move an operand, {name: mask}. A weight itself is no operand."""
    if getattr(edge[0], "variable", None) is not None:
        return {}
    gradients = graph.pull(edge, graph.random(edge), [graph.weights[n] for n in names])
    sizes = {n: g.abs().flatten() for n, g in zip(names, gradients, strict=True) if g is not None}
    largest = max((size.max().item() for size in sizes.values()), default=0.0)
    return {n: size > ROUNDING * size.max() for n, size in sizes.items() if size.max() > ROUNDING * largest}


def meetings(graph: Graph) -> dict[str, dict[tuple[int, int], Tensor]]:
    """Of each weight: {(a meeting's label, operand): which entries of the weight move it}."""
    moved: dict[str, dict[tuple[int, int], Tensor]] = {name: {} for name in graph.weights}
    for node in graph.order:
        operands = operands_of(graph, node) if graph.mask[node] else []
        shared = [n for n in graph.matrices if sum(bool(graph.mask[f] & graph.bits[n]) for _, (f, _) in operands) >= 2]
        masks = [(k, movers(graph, edge, shared)) for k, edge in operands] if shared else []
        for name in shared:
            live = [(k, by_name[name]) for k, by_name in masks if name in by_name]
            for k, mask in live if len(live) >= 2 else ():
                _note(moved[name], (graph.label[node], k), mask)
    return moved


def products(graph: Graph, name: str) -> dict[tuple[int, int], Tensor]:
    """Of a weight, what meetings() leaves out: products in which one operand depends on it, with any other thing."""
    moved: dict[tuple[int, int], Tensor] = {}
    for node in graph.order:
        operands = operands_of(graph, node)
        own = [(k, edge) for k, edge in operands if graph.mask[edge[0]] & graph.bits[name]]
        if len(own) == 1 < len(operands):
            k, edge = own[0]
            for mask in movers(graph, edge, [name]).values():
                _note(moved, (graph.label[node], k), mask)
    return moved


def _note(moved: dict[tuple[int, int], Tensor], key: tuple[int, int], mask: Tensor) -> None:
    moved[key] = mask | moved.get(key, torch.zeros_like(mask))


# ---- contacts


@dataclass
class Contact:
    """Where a weight is first contracted, and how it came there."""

    node: Any
    operand: int
    pure: bool  # as it is stored: by views alone
    chosen: bool  # by lookups and additions
    looked_up: bool  # by lookups
    probes: list["Probe"] = field(default_factory=list)
    rows: Tensor | None = None


@dataclass
class Probe:
    """One entry of a contact's result: the places in the weight, and in its other operands, that move it."""

    line: int
    weight: Tensor
    inputs: tuple[bytes, ...] | None
    fan_in: int = 0


def _influenced(graph: Graph, edge: Edge, target: Any) -> int | None:
    """An entry of a result that the target moves, by bisection."""
    full = graph.random(edge)
    places = torch.randperm(full.numel(), generator=graph.generator)
    if not _moves(graph, edge, full, places, target):
        return None
    while len(places) > 1:
        half = places[: len(places) // 2]
        places = half if _moves(graph, edge, full, half, target) else places[len(places) // 2 :]
    return int(places[0])


def _moves(graph: Graph, edge: Edge, full: Tensor, places: Tensor, target: Any) -> bool:
    masked = torch.zeros_like(full).view(-1)
    masked[places] = full.reshape(-1)[places]
    (g,) = graph.pull(edge, masked.view(full.shape), [target])
    return g is not None and bool((g != 0).any())


def target_of(graph: Graph, name: str) -> tuple[Any, Any]:
    """(what is differentiated in, the node to climb from): the weight, or what a parametrization makes of it."""
    W, start = graph.weights[name], graph.leaf_of[name]
    target: tuple[Any, Any] = (W, start)
    reached = {start}
    for node in graph.order:
        with_others = one_of(node, PRODUCTS) and graph.mask[node] != graph.bits[name]
        if graph.data[node] or with_others or not any(f in reached for f, _ in node.next_functions):
            continue
        reached.add(node)
        if shape_of((node, 0)) == W.shape:
            place = _influenced(graph, (node, 0), W)
            (g,) = graph.pull((node, 0), graph.one((node, 0), place or 0), [W])
            if len(support(g)) > 1:
                target = (GradientEdge(node, 0), node)
    return target


def contacts(graph: Graph, name: str) -> tuple[Any, list[Contact]]:
    target, start = target_of(graph, name)
    chain: dict[Any, tuple[bool, bool, bool]] = {start: (True, True, False)}
    ends: list[Contact] = []
    after: set[Any] = set()  # results of contractions
    for node in graph.order:
        operands = [f for f, _ in node.next_functions]
        ways = [(k, chain[f]) for k, f in enumerate(operands) if f in chain]
        if after.intersection(operands):
            after.add(node)
        if not ways or node in after or len(ends) >= 4 * CONTACTS:
            continue
        k, (pure, chosen, looked_up) = ways[0]
        if len(node._input_metadata) == 1:
            place = _influenced(graph, (node, 0), target)
            if place is None:
                continue
            (g,) = graph.pull((node, 0), graph.one((node, 0), place), [target])
            if len(support(g)) > 1:
                ends.append(Contact(node, k, pure, chosen, looked_up))
                after.add(node)
                continue
        view = one_of(node, VIEWS) or (one_of(node, ("Cat", "Stack")) and not graph.data[node])
        scaled = one_of(node, ("Mul", "Div", "Pow")) and sum(f is not None for f in operands) == 1
        chain[node] = (
            pure and view,
            chosen and (view or scaled or one_of(node, CHOICES)),
            looked_up or one_of(node, LOOKUPS),
        )
    return target, ends


def probe(graph: Graph, contact: Contact, target: Any) -> None:
    """Fill in the contact's probes: entries of its result along lines through one of them."""
    edge = (contact.node, 0)
    base = _influenced(graph, edge, target) or 0
    others = [
        GradientEdge(f, nr)
        for k, (f, nr) in enumerate(contact.node.next_functions)
        if k != contact.operand and f is not None and graph.data[f]
    ]
    (g,) = graph.pull(edge, graph.random(edge), [target])
    contact.rows = support(g)
    contact.probes = _lines(graph, edge, base, target, others)


def _lines(graph: Graph, edge: Edge, base: int, target: Any, others: list[Any]) -> list[Probe]:
    """Probes along each dimension of a result, through one of its entries."""
    shape, probes = shape_of(edge), []
    place = [int(p) for p in torch.unravel_index(torch.tensor(base), shape)] if shape else []
    for axis, size in enumerate(shape):
        every = range(size) if size <= LINE else {*torch.linspace(0, size - 1, LINE).long().tolist(), place[axis]}
        for i in sorted(every) if size > 1 else ():
            at = [*place[:axis], i, *place[axis + 1 :]]
            flat = sum(a * s for a, s in zip(at, _strides(shape), strict=True))
            g, *xs = graph.pull(edge, graph.one(edge, flat), [target, *others])
            if len(where := support(g)):
                probes.append(
                    Probe(
                        axis,
                        where,
                        tuple(support(x).numpy().tobytes() for x in xs) if others else None,
                        sum(len(support(x)) for x in xs),
                    )
                )
    return probes


def _strides(shape: tuple[int, ...]) -> list[int]:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * n)
    return strides


# ---- the verdict


@dataclass
class Verdict:
    """What is wrong with placements, by weight; and what every weight was seen to be."""

    wrong: dict[str, list[str]] = field(default_factory=dict)
    nature: dict[str, str] = field(default_factory=dict)


@contextmanager
def open_units() -> Iterator[None]:
    """Gated linear units as a product that the graph shows, units that are never closed, and masks of numbers that
    float32 has, in which some models build them whatever the model's own type.
    """
    of_type = torch.finfo

    def by_product(x: Tensor, dim: int = -1) -> Tensor:
        a, b = x.chunk(2, dim)
        return a * b.sigmoid()

    def smooth(x: Tensor, inplace: bool = False) -> Tensor:
        return nn.functional.softplus(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "glu", by_product)
        patch.setattr(
            torch, "finfo", lambda dtype=torch.float32: of_type(torch.float32 if dtype == torch.float64 else dtype)
        )
        patch.setattr(nn.functional, "hardswish", smooth)
        for owner in (nn.functional, torch, Tensor):
            patch.setattr(owner, "relu", smooth)
        yield


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    output = model(**batch)
    return output if isinstance(output, Tensor) else output.loss


def _free_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """All but those of parametrizations, of which some entries may not be changed: orthogonal ones have signs there."""
    for module in model.modules():
        if not isinstance(module, parametrize.ParametrizationList):
            yield from module.parameters(recurse=False)


def judge(
    model: nn.Module, batch: Mapping[str, Tensor], norms: Mapping[str, Norm], notes: Iterable[str] = ()
) -> Verdict:
    """Compare norms, by the names of weights, with what the model does. The model is changed: float64, and noise."""
    generator = torch.Generator().manual_seed(1)
    model = model.double().eval()
    with torch.no_grad():
        for p in _free_parameters(model):
            size = NOISE / max(8, *p.shape[:2], p.numel() // max(1, *p.shape[:1])) ** 0.5
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    inputs = {
        k: x.double().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in batch.items()
    }
    with open_units(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = loss_of(model, inputs)
        assert loss.isfinite(), f"a loss of {loss.item()} says nothing"
        weights = {canonical(n): p for n, p in model.named_parameters() if p.requires_grad}
        assert set(norms) <= set(weights), "norms of weights that the model does not have"
        graph = Graph(loss, weights)
        moved = meetings(graph)
        verdict = Verdict()
        for name in norms:
            if name in graph.leaf_of:
                _judge_weight(graph, name, norms[name], moved[name], list(notes), verdict)
            else:
                verdict.nature[name] = "unused"
    return verdict


Moved = Mapping[tuple[int, int], Tensor]  # {operand of an operation: which entries of a weight move it}


class _Rows:
    """The rows of a norm's blocks, numbered, and their signatures. apart: products(), called only where they matter."""

    def __init__(self, parts: list[Leaves], numel: int, moved: Moved, apart: Callable[[], Moved]) -> None:
        self.row = torch.full((numel,), -1)
        self.size: list[int] = []
        self.first: list[int] = []  # row of each block
        self.factor: list[float] = []
        self.leaf_of_row: list[int] = []
        for part in parts:
            n, o, i = part.places.shape
            start, blocks = len(self.size), len(self.first)
            self.row[part.places.flatten()] = torch.arange(start, start + n * o).repeat_interleave(i)
            self.size += [i] * (n * o)
            self.factor += [part.factor] * n
            self.first += [start + b * o for b in range(n)]
            self.leaf_of_row += [blocks + b for b in range(n) for _ in range(o)]
        self.signature = self._signatures(moved)
        self.live = [any(signature) for signature in self.signature]
        self._apart = apart

    def _signatures(self, moved: Moved) -> list[bytes]:
        table = torch.zeros(len(self.size), len(moved), dtype=torch.bool)
        for column, mask in enumerate(moved.values()):
            table[self.row[mask], column] = True
        return [row.numpy().tobytes() for row in table]

    @cached_property
    def finer_signature(self) -> list[bytes]:
        """Signatures by products with anything: where a gate meets what the weight does not move."""
        return self._signatures(self._apart())


def _judge_weight(
    graph: Graph,
    name: str,
    norm: Norm,
    moved: Moved,
    notes: list[str],
    verdict: Verdict,
) -> None:
    W = graph.weights[name]
    if not is_matrix(W.shape):  # one row, or one column: every norm sees all of it
        verdict.nature[name] = "vector"
        return
    parts = leaves(norm, torch.arange(W.numel(), dtype=torch.float64).view(1, *W.shape))
    kinds = {p.kind for p in parts}
    target, every = contacts(graph, name)
    ends = every if len(every) <= CONTACTS else [every[i * len(every) // CONTACTS] for i in range(CONTACTS)]
    for end in ends:
        probe(graph, end, target)
    nature = _nature(graph, ends)
    if nature == "map":
        last, of_logits = _is_last(graph, every)
        nature = "head" if of_logits else "last map" if last else "map"
    verdict.nature[name] = nature
    if kinds == {"entries"} and not isinstance(target, Tensor):
        return  # numbers of which a parametrization makes a map
    wrong = _wrong_nature(nature, kinds, ends, name, notes)
    if not wrong:
        apart = partial(products, graph, name)
        readings = [_Rows(either, W.numel(), moved, apart) for either in _orientations(parts)]
        wrong = min((_wrong_blocks(rows, ends, nature, kinds) for rows in readings), key=len)
    if wrong:
        verdict.wrong[name] = list(dict.fromkeys(wrong))


def _orientations(parts: list[Leaves]) -> list[list[Leaves]]:
    """Square matrices are judged either way: the spectral norm of a transpose is the same."""
    if any(p.kind != "matrix" or p.places.shape[1] != p.places.shape[2] for p in parts):
        return [parts]
    return [parts, [replace(p, places=p.places.mT) for p in parts]]


def _wrong_blocks(rows: "_Rows", ends: list[Contact], nature: str, kinds: set[str]) -> list[str]:
    wrong = _mixed(rows) if kinds == {"matrix"} else []
    if kinds & {"matrix", "table", "head"}:
        wrong += _wrong_orientation(rows, ends, nature)
        if nature in ("map", "head", "last map"):
            wrong += _wrong_inputs(rows, ends, kinds)
    return wrong


def _mixed(rows: _Rows) -> list[str]:
    """Rows of two maps in one block. Maps of one row each, such as gates of levels, may stand in one."""
    signatures: dict[int, dict[bytes, int]] = defaultdict(lambda: defaultdict(int))
    for r, leaf in enumerate(rows.leaf_of_row):
        if rows.live[r]:
            signatures[leaf][rows.signature[r]] += 1
    mixed = [sorted(s.values(), reverse=True) for s in signatures.values() if len(s) > 1 and max(s.values()) > 1]
    if not mixed:
        return []
    where = f"in {len(mixed)} of {len(signatures)} blocks"
    return [f"one block holds rows of {len(mixed[0])} maps ({mixed[0][:6]} rows), {where}"]


def _nature(graph: Graph, ends: list[Contact]) -> str:
    if not ends:
        return "unseen"
    for end in ends:
        if end.pure and one_of(end.node, PRODUCTS):
            others = [(k, f) for k, (f, _) in enumerate(end.node.next_functions) if k != end.operand]
            last = max(k for k, (f, _) in enumerate(end.node.next_functions) if f is not None) == end.operand
            if any(f is not None and graph.data[f] for _, f in others) or last or one_of(end.node, ("Convolution",)):
                return "map"
            return "table"
    if all(end.chosen for end in ends):
        return "bias of scores" if any(one_of(e.node, ("Softmax", "LogSoftmax")) for e in ends) else "table"
    return "other"


def _is_last(graph: Graph, ends: list[Contact]) -> tuple[bool, bool]:
    """Do results go to the loss without meeting other weights than vectors; and are they its logits?"""
    logits = False
    seen, stack = set(), [(end.node, graph.mask[end.node]) for end in ends]
    for end in ends:
        if not all(
            f is None or k == end.operand or graph.data[f] or _is_vector(graph, f)
            for k, (f, _) in enumerate(end.node.next_functions)
        ):
            return False, False
    while stack:
        node, mask = stack.pop()
        for user in graph.consumers[node]:
            if user in seen:
                continue
            seen.add(user)
            if shape_of((user, 0)) == ():
                logits |= kind_of(user).startswith("NllLoss")
                continue
            others = [f for f, _ in user.next_functions if f is not None and f is not node]
            known = 0 if one_of(user, PRODUCTS) else mask
            if not one_of(user, JOINS) and any(graph.mask[f] & ~known and not _is_vector(graph, f) for f in others):
                return False, False
            logits |= kind_of(user).startswith(("NllLoss", "CtcLoss", "BinaryCross"))
            for f in others:
                mask |= graph.mask[f]
            stack.append((user, mask))
    return True, logits


def _is_vector(graph: Graph, node: Any) -> bool:
    """Is it a vector among weights, or a view of one?"""
    while one_of(node, VIEWS) and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    variable = getattr(node, "variable", None)
    return variable is not None and variable.ndim < 2


def _wrong_nature(nature: str, kinds: set[str], ends: list[Contact], name: str, notes: list[str]) -> list[str]:
    looked_up = any(e.looked_up for e in ends)
    allowed = {
        "map": {"matrix", "whole"},
        "last map": {"matrix", "head"},
        "head": {"head"},
        "table": {"table", "entries"} | (set() if looked_up else {"vector"}),
        "bias of scores": {"table", "entries"},
        "other": {"entries", "table", "matrix", "whole", "vector"},
        "unseen": set(),
    }[nature]
    noted = nature == "head" and kinds == {"matrix"} and any(name in note for note in notes)
    if kinds <= allowed or noted:
        return []
    operations = sorted({kind_of(e.node) for e in ends})
    return [f"a {nature} (by {', '.join(operations)}) is placed as {', '.join(sorted(kinds))}"]


def _wrong_orientation(rows: _Rows, ends: list[Contact], nature: str) -> list[str]:
    if nature in ("bias of scores", "other"):
        return []
    wrong, covered = [], 0.0
    for end in ends:
        for p in () if one_of(end.node, ("EmbeddingBag",)) else end.probes:  # which averages rows
            hit = torch.unique(rows.row[p.weight]).tolist()
            owners = {rows.leaf_of_row[r] for r in hit}
            factor = rows.factor[next(iter(owners))]
            if len(hit) > len(owners):
                wrong.append(f"one result of {kind_of(end.node)} depends on {len(hit)} rows of {len(owners)} block")
            elif len(owners) > factor + 1e-9 and nature != "table":
                wrong.append(f"one result of {kind_of(end.node)} is a sum over {len(owners)} blocks")
            covered = max(covered, max(p.fan_in, len(p.weight)) / sum(rows.size[r] for r in hit))
    if not wrong and 0 < covered < 0.5:
        wrong.append(f"one result depends on {covered:.0%} of a row")
    return wrong


def _wrong_inputs(rows: _Rows, ends: list[Contact], kinds: set[str]) -> list[str]:
    wrong = []
    feeds: dict[int, set[Any]] = defaultdict(set)
    for end in ends:
        inputs = tuple((f, nr) for k, (f, nr) in enumerate(end.node.next_functions) if k != end.operand)
        for r in torch.unique(rows.row[end.rows]).tolist() if end.rows is not None else ():
            feeds[r].add(inputs)
    by_leaf: dict[int, set[Any]] = defaultdict(set)
    for r, s in feeds.items():
        by_leaf[rows.leaf_of_row[r]].add(frozenset(s))
    if kinds == {"matrix"} and any(len(s) > 1 for s in by_leaf.values()):
        wrong.append("one block holds rows with other inputs, contracted apart")
    for end in ends:
        lines = defaultdict(list)
        for p in end.probes:
            if p.inputs is not None:
                lines[p.line].append(p)
        for line in lines.values():
            hits = [
                ({rows.leaf_of_row[r]: r for r in torch.unique(rows.row[p.weight]).tolist()}, p.inputs) for p in line
            ]
            for a, (one, x) in enumerate(hits):
                for other, y in hits[:a] if kinds == {"matrix"} else ():
                    if x != y and any(other.get(leaf, r) != r for leaf, r in one.items()):
                        wrong.append("one block holds rows with other inputs")
                    if x == y and not set(one) & set(other) and _are_one_map(rows, one, other):
                        wrong.append("one map is cut into blocks")
    return wrong


def _are_one_map(rows: _Rows, one: dict[int, int], other: dict[int, int]) -> bool:
    """Have these rows of two blocks one signature? The same row of both may be one at two positions of a kernel."""
    (leaf, r), (other_leaf, q) = next(iter(one.items())), next(iter(other.items()))
    apart = r - rows.first[leaf] != q - rows.first[other_leaf]
    alike = rows.signature[r] == rows.signature[q]
    return apart and alike and rows.finer_signature[r] == rows.finer_signature[q]
