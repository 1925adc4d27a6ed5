"""The demands of a step on each GPU: the optimizer's FLOPs, bytes and messages, and the model's.

Weights are placed by optim/placement.py as on w GPUs.

w: GPUs; s: shards of one copy of the weights, c = w/s copies. (w,): a number for each GPU, float64.
O: rows of a weight.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from model import GPT
from optim.placement import Shards
from optim.ranks import Ranks, bucketed
from optim.replicas import IN_FLIGHT, Replicas

from .hardware import GPU, NETWORK, NODE, NVLINK, direct_speed, ring_speed
from .optimizers import MUON_OWNED, MUON_PLAIN, OURS, ZERO, Weight

# ---- the optimizer


@dataclass
class Step:
    """The demands of an optimizer on each GPU in one step, beside the model: (w,) FLOPs and bytes.

    whole: of the FLOPs, those for weights that cannot be split. products: those of a direction's
    matrix products and roots. stepped: of the weights in memory, those that this GPU steps.
    buffers: of communication, at most at a time. exchanges: (sent, received) of each all-to-all.
    rings: (bytes that each GPU sends, bytes a second) of each ring collective.
    """

    whole: Tensor
    products: Tensor
    flops: Tensor
    stepped: Tensor
    state: Tensor
    buffers: Tensor
    exchanges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rings: list[tuple[float, float]] = field(default_factory=list)

    @property
    def sent(self) -> Tensor:
        """Return the bytes that each GPU sends, (w,)."""
        return sum((sent for sent, _ in self.exchanges), torch.zeros_like(self.flops)) + sum(
            sent for sent, _ in self.rings
        )

    def seconds(self, gpu: GPU) -> float:
        """Return the least time of the busiest GPU.

        FLOPs at peak, and stepped weights, gradients and state read, weights and state written,
        once.
        """
        return float((self.flops / gpu.flops + (3 * self.stepped + 2 * self.state) / gpu.hbm).max())

    def transfer_seconds(self, w: int) -> float:
        """Return the least time of communication.

        Each exchange waits for the GPU that sends or gets most.
        """
        direct = sum(float(torch.maximum(*both).max()) for both in self.exchanges) / direct_speed(w)
        return direct + sum(sent / speed for sent, speed in self.rings)


def step_of(optimizer: str, weights: list[Weight], parallel: str, w: int, s: int) -> Step | None:
    """Return a step of an optimizer; None where it is the same as another one."""
    N, owned = sum(x.p.nbytes for x in weights), optimizer in (OURS, MUON_OWNED)
    if parallel == "ddp":
        if owned:
            return owned_replicas(weights, w) if w > 1 else shared(weights, w, lambda x: (1.0, 1.0))
        if optimizer == ZERO and w == 1:
            return None
        step = shared(weights, w, lambda x: (1.0, 1 / w if optimizer == ZERO else 1.0))
        step.rings = [(2 * (w - 1) / w * N, ring_speed(w))]
        return step
    if owned:
        return owned_shards(weights, w, s)
    if optimizer == ZERO:
        return None
    rows = {n: held_rows(n, w, s) / n for n in {x.p.shape[0] for x in weights}}
    step = shared(weights, w, lambda x: (1.0, rows[x.p.shape[0]]))
    if optimizer == MUON_PLAIN:  # every GPU gathers all momenta, in the iteration's 16 bits
        momenta = [2 * x.p.numel() for x in weights if x.whole]
        step.rings = [((s - 1) / s * sum(momenta), ring_speed(s))]
        step.buffers += float(max(momenta, default=0))
    return step


def shared(
    weights: Iterable[Weight],
    w: int,
    share: Callable[[Weight], tuple[Tensor | float, Tensor | float]],
) -> Step:
    """Return a step without communication.

    share: of each weight, the parts (w,) of what needs it whole and of its entries that each GPU
    does.
    """
    whole, products, split, stepped, state = (torch.zeros(w, dtype=torch.float64) for _ in range(5))
    for weight in weights:
        works, rows = share(weight)
        takes_part = torch.as_tensor(rows) > 0
        whole += works * weight.whole
        products += rows * weight.products + takes_part * weight.roots
        split += rows * weight.split + takes_part * weight.roots
        stepped += rows * weight.p.nbytes
        state += rows * weight.state + takes_part * weight.common
    return Step(whole, products, whole + split, stepped, state, torch.zeros_like(whole))


def owned_replicas(weights: list[Weight], w: int) -> Step:
    """Return a step of replicas: gradients go to owners, weights come back (Replicas)."""
    replicas = Replicas(Ranks(None, 0, w))
    replicas.assign([(x.p, float(x.whole or x.split), x.by_rows) for x in weights])
    parts = {
        x.p: torch.tensor([b - a for a, b in replicas.spans[x.p]], dtype=torch.float64)
        / x.p.shape[0]
        for x in weights
    }
    step = shared(weights, w, lambda x: (parts[x.p], parts[x.p]))
    own, N = step.stepped, sum(x.p.nbytes for x in weights)
    step.exchanges = [(N - own, (w - 1) * own), ((w - 1) * own, N - own)]
    step.rings = [ring_of_sums(w, (x for x in weights if x.by_rows and parts[x.p].max() < 1))]
    # While gradients are on their way, a few buckets at a time: what leaves, a copy of the own
    # part, what comes; and (float32) sums, which stay for the step.
    reduced = own * max(1.0, 4 / weights[0].p.element_size())

    def most(buckets: list[list[Tensor]], kept: int) -> Tensor:
        """Return the most that a few buckets in a row hold. kept: copies of the own part."""
        live = [
            torch.stack([p.nbytes * (1 + (w - 2 + kept) * parts[p]) for p in bucket]).sum(0)
            for bucket in buckets
        ]
        starts = range(max(1, len(live) - IN_FLIGHT))
        return torch.stack([torch.stack(live[i : i + IN_FLIGHT + 1]).sum(0) for i in starts]).amax(
            0
        )

    publish = [most(bucketed(x.p for x in stack), 0) for stack in stacks(weights)]
    step.buffers = torch.maximum(most(replicas.buckets, 1), two_at_once(publish)) + reduced
    return step


def owned_shards(weights: list[Weight], w: int, s: int) -> Step:
    """Return a step of shards.

    Rows of the momentum go to owners, rows of the result back to all copies (Shards).
    """
    placement, c = Shards(Ranks(None, 0, w), _Mesh(w // s, s)), w // s
    placement.assign([(x.p, float(x.whole), x.by_rows) for x in weights])
    rows = {n: held_rows(n, w, s) for n in {x.p.shape[0] for x in weights}}
    owned = {
        x.p: torch.nn.functional.one_hot(torch.tensor(placement.owner[x.p]), w).double()
        for x in weights
    }
    step = shared(weights, w, lambda x: (owned[x.p], rows[x.p.shape[0]] / x.p.shape[0]))
    sent, received = (torch.zeros(w, dtype=torch.float64) for _ in range(2))
    buffers = [step.buffers]
    for stack in stacks(weights):
        if stack[0].by_rows:
            continue
        p = stack[0].p
        matrix = p.numel() * max(4, p.element_size())  # what is dualized has at least 32 bits
        piece = rows[p.shape[0]] / p.shape[0] * matrix
        owns = torch.stack([owned[x.p] for x in stack]).sum(0)
        near = owns.view(c, s).sum(1).repeat_interleave(s)  # of its copy, which gets its rows
        sent += (near - owns) * piece + owns * (c * matrix - piece)
        received += owns * (matrix - piece) + (len(stack) - owns) * piece
        buffers.append(
            torch.maximum(near * piece + owns * matrix, owns * c * matrix + len(stack) * piece)
        )
    step.exchanges, step.buffers = [(sent, received)], two_at_once(buffers)
    apart = [x for x in weights if rows[x.p.shape[0]].max() < x.p.shape[0]]
    step.rings = [ring_of_sums(w, apart)]
    for x in apart:  # ranks without rows take part
        none = rows[x.p.shape[0]] == 0
        step.state += none * x.common
        step.products += none * x.roots
        step.flops += none * x.roots
    return step


def ring_of_sums(w: int, weights: Iterable[Weight]) -> tuple[float, float]:
    """Return (bytes that each GPU sends, bytes a second) of a direction's sums over ranks."""
    return 2 * (w - 1) / w * sum(x.summed for x in weights), ring_speed(w)


def stacks(weights: Iterable[Weight]) -> list[list[Weight]]:
    """Return the stacks of weights as Dualized.step() makes and orders them."""
    by_key: dict[tuple[object, ...], list[Weight]] = {}
    for weight in weights:
        by_key.setdefault(weight.key, []).append(weight)
    return sorted(by_key.values(), key=lambda stack: not stack[0].by_rows)


def two_at_once(buffers: list[Tensor]) -> Tensor:
    """Return the largest sum of neighbours.

    While one stack is on its way, the next one is begun.
    """
    sums = [a + b for a, b in pairwise(buffers)] or buffers
    return torch.stack(sums).amax(0)


class _Mesh:
    """As much of a DeviceMesh as Shards asks for: c × s GPUs."""

    def __init__(self, copies: int, shards: int) -> None:
        self.shape, self.ndim = (copies, shards), 2

    def size(self, dimension: int) -> int:
        return self.shape[dimension]


def held_rows(rows: int, w: int, s: int) -> Tensor:
    """Return how many rows of a weight each GPU has of its copy, (w,).

    They are Shards' own spans, as fully_shard cuts.
    """
    shards = Shards(Ranks(None, 0, w), _Mesh(w // s, s))
    spans = [shards.span(rows, r) for r in range(s)]
    return torch.tensor([b - a for a, b in spans], dtype=torch.float64).repeat(w // s)


# ---- the model


@dataclass
class Around:
    """The model's share of a step.

    flops: of forward and backward, all GPUs. weights, grads, buffers: bytes a GPU, the buffers
    FSDP2's. rings: as in Step: gathers, the reduction of gradients within a copy, and over copies.
    """

    flops: float
    weights: float
    grads: float
    buffers: float
    rings: list[tuple[float, float]]


def around(model: GPT, tokens: float, parallel: str, w: int, s: int) -> Around:
    """Return the model's share, sharded as training/ranks.py does, in the weights' dtype.

    A group for each block is gathered in forward and in backward, and one for the rest once.
    """
    flops = float(model.flops_per_token()) * tokens

    def padded(params: Iterable[Tensor]) -> int:
        """Return the bytes of a group gathered: FSDP2 fills shards up to the first one's rows."""
        return sum(s * -(-p.shape[0] // s) * (p.nbytes // p.shape[0]) for p in params)

    if parallel == "ddp":
        N = sum(p.nbytes for p in model.parameters())
        return Around(flops, N, N, 0.0, [])
    blocks = [padded(block.parameters()) for block in model.blocks]
    inside = {id(p) for p in model.blocks.parameters()}
    root = padded(p for p in model.parameters() if id(p) not in inside)
    N, c = root + sum(blocks), w // s
    part = (s - 1) / s
    across = NVLINK if w <= NODE else NETWORK  # a copy is a node or more
    rings = [
        (part * (root + 2 * sum(blocks)), ring_speed(s)),
        (part * N, ring_speed(s)),
        (2 * (c - 1) / c * N / s, across),
    ]
    # The root stays, a block is in use and the next one on its way, and a block's gradients leave.
    return Around(flops, N / s, N / s, root + 3.0 * max(blocks), rings)
