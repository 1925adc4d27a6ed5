"""One training step, counted: compute, memory and communication of 124M … 1T weights on 1 … 16,384 GPUs, for Dualized, AdamW and Muon.

    python -m studies.cost_model [--model 124M … | --config configs/x.toml] [--gpus 8 64 …] [--parallel ddp fsdp hsdp] [--tokens-per-step N] [--markdown]

Nothing here is measured: FLOPs and bytes are those of the code, on weights without numbers (torch's meta device) that optim/placement.py places as on
w GPUs; times are rooflines from data sheets. Assumptions, formulas and what is checked: docs/scaling.md.

w GPUs; s shards of one copy of the weights, c = w/s copies. (w,): a number for each GPU, float64. O: rows of a weight.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from model import GPT
from models import ModelConfig, build
from optim import Dualized
from optim.directions import DIRECTIONS
from optim.errors import Refusal
from optim.placement import OneProcess, Shards
from optim.polar import Polar
from optim.ranks import Ranks, bucketed
from optim.replicas import IN_FLIGHT, Replicas
from training.config import OptimConfig, load
from training.runtime import PEAK_FLOPS

ROOT = Path(__file__).parent.parent


# ---- hardware: bytes and FLOPs a second, each way, from data sheets


@dataclass(frozen=True)
class GPU:
    """flops: dense bf16 a second. memory: bytes. hbm: bytes a second to and from it."""

    flops: float
    memory: float
    hbm: float


GPUS = {
    "H100": GPU(
        PEAK_FLOPS["NVIDIA H100 80GB HBM3"], 80e9, 3.35e12
    ),  # NVIDIA H100 Tensor Core GPU data sheet, SXM
    "H200": GPU(
        PEAK_FLOPS["NVIDIA H200"], 141e9, 4.8e12
    ),  # NVIDIA H200 Tensor Core GPU data sheet, SXM
}
NODE = 8  # GPUs (NVIDIA DGX H100 data sheet)
NVLINK = 450e9  # a GPU to those of its node, one way: half of the 900 GB/s of the H100 data sheet, which counts both
NETWORK = 50e9  # a GPU to other nodes, one way: one 400 Gb/s ConnectX-7 port for each of the 8 (DGX H100 data sheet)


def ring_speed(ranks: int) -> float:
    """Bytes a second and GPU of a ring through neighbours. A byte enters a node once, and the 8 ports share the work: NCCL's rings do so."""
    return NVLINK if ranks <= NODE else min(NVLINK, NODE * NETWORK)


def direct_speed(ranks: int) -> float:
    """Of an all-to-all: its bytes have one receiver each, and those to other nodes pass the port of their own GPU."""
    return NVLINK if ranks <= NODE else NETWORK * (ranks - 1) / (ranks - NODE)


# ---- models


@dataclass(frozen=True)
class Case:
    """A model and one step of it. sequences: of block_size tokens, over all GPUs."""

    name: str
    model: ModelConfig
    sequences: int
    optim: OptimConfig = field(default_factory=OptimConfig)

    @staticmethod
    def of_config(path: Path, name: str | None = None) -> "Case":
        c = load([str(path)])
        o = c.optim
        for key, got, fine, allowed in (
            (
                "optim.lr",
                o.lr,
                not isinstance(o.lr, str),
                "a number: the second dualization of auto is not counted",
            ),
            ("optim.scale", o.scale, o.scale == "unit", "unit: dual norms are not counted"),
            (
                "optim.constraint",
                o.constraint,
                o.constraint is None,
                "none: retractions are not counted",
            ),
            (
                "optim.direction",
                o.direction,
                DIRECTIONS[o.direction].entrywise,
                "directions entry by entry: others are not counted",
            ),
            (
                "model.vocab_size",
                c.model.vocab_size,
                c.model.vocab_size is not None,
                "a number: no tokenizer is asked",
            ),
        ):
            if not fine:
                raise Refusal(
                    f"{path}: {key}",
                    got=repr(got),
                    allowed=allowed,
                    fix="a copy of the file with it",
                )
        return Case(name or path.stem, c.model, c.train.batch_size, o)

    @staticmethod
    def published(name: str, layers: int, heads: int, width: int, sequences: int) -> "Case":
        return Case(
            name, ModelConfig(layers, heads, width, block_size=2048, vocab_size=50304), sequences
        )

    def gpt(self, polar: Polar) -> GPT:
        """Without numbers; norms as in training, with this polar factor."""
        with torch.device("meta"):
            return build(self.model, self.optim.norms.build(polar, self.model.n_head)).to(
                getattr(torch, self.optim.param_dtype)
            )

    @property
    def polar(self) -> Polar:
        """That of training on an accelerator: dtype auto is bfloat16 there."""
        found = self.optim.polar
        return replace(found, dtype="bfloat16") if found.dtype == "auto" else found


def cases() -> dict[str, Case]:
    """The family. Shapes and batches: configs/; Brown et al., arXiv 2005.14165, table 2.1 (2 M tokens as 1024 × 2048, 3.2 M as 1600 × 2048; 13B is 5120 wide,
    its 40 heads of 128, where the table says 5140); Narayanan et al., arXiv 2104.04473, table 1 (1T, 3072 sequences of 2048). Vocabulary as in configs/."""
    found = [
        Case.of_config(ROOT / f"configs/gpt2_{n.lower()}.toml", n) for n in ("124M", "350M", "1.5B")
    ]
    found += [Case.published("6.7B", 32, 32, 4096, 1024), Case.published("13B", 40, 40, 5120, 1024)]
    found += [
        Case.published("175B", 96, 96, 12288, 1600),
        Case.published("1T", 128, 160, 25600, 3072),
    ]
    return {case.name: case for case in found}


# ---- optimizers


class Recorder(OneProcess):
    """One process, and what Dualized wants placed: (p, FLOPs, by rows)."""

    def __init__(self) -> None:
        super().__init__(Ranks())
        self.entries: list[tuple[Tensor, float, bool]] = []

    def assign(self, entries: list[tuple[Tensor, float, bool]]) -> None:
        self.entries += entries


class Planned(Dualized):
    """Dualized of weights without numbers. It takes no step."""

    def __init__(self, model: GPT, optim: OptimConfig) -> None:
        self.seen = Recorder()
        same = ("direction", "scale", "momentum_dtype", "master_weights")
        super().__init__(model, lr=1.0, **{k: getattr(optim, k) for k in same})

    def placement_of(self, p: Tensor) -> OneProcess:
        return self.seen


class _Mesh:
    """As much of a DeviceMesh as Shards asks for: c × s GPUs."""

    def __init__(self, copies: int, shards: int) -> None:
        self.shape, self.ndim = (copies, shards), 2

    def size(self, dimension: int) -> int:
        return self.shape[dimension]


# FLOPs an entry beside dualize. Nesterov's momentum: two lerps of 3, radius 1, update 2. AdamW (Loshchilov, Hutter, arXiv 1711.05101, alg. 2): averages 3 and 4,
# √, ÷ and + for the divisor 3, quotient 1, update 2, decay 1.
MOMENTUM_FLOPS, ADAMW_FLOPS = 9, 14
# torch.optim.Muon's iteration: 5 steps, plain, bfloat16; 2-D weights but embedding and head, which AdamW steps (as its documentation recommends).
MUON = Polar("jordan", "plain", "bfloat16")


@dataclass(frozen=True)
class Weight:
    """What one weight costs. whole: FLOPs that need all of it. split: FLOPs by rows or entries. state: bytes."""

    p: Tensor
    key: tuple[object, ...]  # of its stack
    by_rows: bool
    whole: int
    split: int
    state: int


OURS, ADAMW, ZERO, MUON_PLAIN, MUON_OWNED = (
    "Dualized",
    "AdamW",
    "AdamW, sharded",
    "Muon",
    "Muon, owned",
)
OPTIMIZERS = (OURS, ADAMW, ZERO, MUON_PLAIN, MUON_OWNED)


def weights_of(case: Case, optimizer: str, polar: Polar | None = None) -> tuple[GPT, list[Weight]]:
    """The model, and its weights in the order in which Dualized has them; polar: by default that of the case, or Muon's."""
    muon = optimizer in (MUON_PLAIN, MUON_OWNED)
    if muon:
        case = replace(case, optim=OptimConfig(param_dtype=case.optim.param_dtype, polar=MUON))
    model = case.gpt(polar or case.polar)
    planned = Planned(model, case.optim)
    planned.make_state(lambda name: True)
    found = []
    for name, (p, flops, by_rows) in zip(
        planned.param_groups[0]["param_names"], planned.seen.entries, strict=True
    ):
        state = sum(b.nbytes for b in planned.state[p].values())
        whole, split = (0, int(flops)) if by_rows else (int(flops), 0)
        split += MOMENTUM_FLOPS * p.numel()
        if optimizer in (ADAMW, ZERO) or (muon and by_rows):
            whole, split, state = 0, ADAMW_FLOPS * p.numel(), 2 * p.nbytes
        elif muon:
            state = p.nbytes
        found.append(
            Weight(p, (planned.norm.norms[name], p.shape, p.dtype), by_rows, whole, split, state)
        )
    return model, found


# ---- what a step asks of each GPU


@dataclass
class Step:
    """What an optimizer asks of each GPU in one step, beside the model. (w,) each; FLOPs and bytes.

    whole: of the FLOPs, those for weights that cannot be split. stepped: of the weights in memory, those that this GPU steps. buffers: of communication,
    at most at a time. exchanges: (sent, received) of each all-to-all. rings: (bytes that each GPU sends, bytes a second) of each ring collective.
    """

    whole: Tensor
    flops: Tensor
    stepped: Tensor
    state: Tensor
    buffers: Tensor
    exchanges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rings: list[tuple[float, float]] = field(default_factory=list)

    @property
    def sent(self) -> Tensor:
        return sum((sent for sent, _ in self.exchanges), torch.zeros_like(self.flops)) + sum(
            sent for sent, _ in self.rings
        )

    def seconds(self, gpu: GPU) -> float:
        """At least: FLOPs at peak, and stepped weights, gradients and state read, weights and state written, once. Of the busiest GPU."""
        return float((self.flops / gpu.flops + (3 * self.stepped + 2 * self.state) / gpu.hbm).max())

    def transfer_seconds(self, w: int) -> float:
        """At least: each exchange waits for the GPU that sends or gets most."""
        direct = sum(float(torch.maximum(*both).max()) for both in self.exchanges) / direct_speed(w)
        return direct + sum(sent / speed for sent, speed in self.rings)


def shared(
    weights: Iterable[Weight],
    w: int,
    share: Callable[[Weight], tuple[Tensor | float, Tensor | float]],
) -> Step:
    """A step without communication. share: of each weight, the parts (w,) of what needs it whole and of its entries that each GPU does."""
    whole, split, stepped, state = (torch.zeros(w, dtype=torch.float64) for _ in range(4))
    for weight in weights:
        works, rows = share(weight)
        whole += works * weight.whole
        split += rows * weight.split
        stepped += rows * weight.p.nbytes
        state += rows * weight.state
    return Step(whole, whole + split, stepped, state, torch.zeros_like(whole))


def stacks(weights: Iterable[Weight]) -> list[list[Weight]]:
    """As Dualized.step() makes and orders them."""
    found: dict[tuple[object, ...], list[Weight]] = {}
    for weight in weights:
        found.setdefault(weight.key, []).append(weight)
    return sorted(found.values(), key=lambda stack: not stack[0].by_rows)


def two_at_once(buffers: list[Tensor]) -> Tensor:
    """The largest sum of neighbours: while one stack is on its way, the next one is begun."""
    sums = [a + b for a, b in pairwise(buffers)] or buffers
    return torch.stack(sums).amax(0)


def owned_replicas(weights: list[Weight], w: int) -> Step:
    """Gradients to owners, weights back (Replicas)."""
    at = Replicas(Ranks(None, 0, w))
    at.assign([(x.p, float(x.whole or x.split), x.by_rows) for x in weights])
    parts = {
        x.p: torch.tensor([b - a for a, b in at.spans[x.p]], dtype=torch.float64) / x.p.shape[0]
        for x in weights
    }
    step = shared(weights, w, lambda x: (parts[x.p], parts[x.p]))
    own, N = step.stepped, sum(x.p.nbytes for x in weights)
    step.exchanges = [(N - own, (w - 1) * own), ((w - 1) * own, N - own)]
    # While gradients are on their way, a few buckets at a time: what leaves, a copy of the own part, what comes; and (float32) sums, which stay for the step.
    reduced = own * max(1.0, 4 / weights[0].p.element_size())

    def most(buckets: list[list[Tensor]], kept: int) -> Tensor:
        """Of a few buckets in a row. kept: copies of the own part."""
        live = [
            torch.stack([p.nbytes * (1 + (w - 2 + kept) * parts[p]) for p in bucket]).sum(0)
            for bucket in buckets
        ]
        return torch.stack(
            [
                torch.stack(live[i : i + IN_FLIGHT + 1]).sum(0)
                for i in range(max(1, len(live) - IN_FLIGHT))
            ]
        ).amax(0)

    publish = [most(bucketed(x.p for x in stack), 0) for stack in stacks(weights)]
    step.buffers = torch.maximum(most(at.buckets, 1), two_at_once(publish)) + reduced
    return step


def held_rows(rows: int, w: int, s: int) -> Tensor:
    """(w,): of a weight with so many rows, those that each GPU has of its copy. As fully_shard cuts: Shards' own spans."""
    at = Shards(Ranks(None, 0, w), _Mesh(w // s, s))
    spans = [at.span(rows, r) for r in range(s)]
    return torch.tensor([b - a for a, b in spans], dtype=torch.float64).repeat(w // s)


def owned_shards(weights: list[Weight], w: int, s: int) -> Step:
    """Rows of the momentum to owners, rows of the result back to all copies (Shards)."""
    at, c = Shards(Ranks(None, 0, w), _Mesh(w // s, s)), w // s
    at.assign([(x.p, float(x.whole), x.by_rows) for x in weights])
    rows = {n: held_rows(n, w, s) for n in {x.p.shape[0] for x in weights}}
    owned = {
        x.p: torch.nn.functional.one_hot(torch.tensor(at.owner[x.p]), w).double() for x in weights
    }
    step = shared(weights, w, lambda x: (owned[x.p], rows[x.p.shape[0]] / x.p.shape[0]))
    sent, received, buffers = (
        torch.zeros(w, dtype=torch.float64),
        torch.zeros(w, dtype=torch.float64),
        [step.buffers],
    )
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
    return step


def step_of(optimizer: str, weights: list[Weight], parallel: str, w: int, s: int) -> Step | None:
    """None where an optimizer is the same as another one."""
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
        step.rings = [
            ((s - 1) / s * sum(2 * x.p.numel() for x in weights if x.whole), ring_speed(s))
        ]
        step.buffers += max((2.0 * x.p.numel() for x in weights if x.whole), default=0.0)
    return step


@dataclass
class Around:
    """The model's share of a step: FLOPs of forward and backward, all GPUs; bytes a GPU of weights, gradients and FSDP2's buffers; rings as in Step."""

    flops: float
    weights: float
    grads: float
    buffers: float
    rings: list[tuple[float, float]]


def around(model: GPT, tokens: float, parallel: str, w: int, s: int) -> Around:
    """As runtime.py shards: a group for each block, gathered in forward and in backward, and one for the rest, gathered once. In the weights' dtype.

    rings: gathers, the reduction of gradients within a copy, and over copies.
    """
    flops = float(model.flops_per_token()) * tokens

    def padded(params: Iterable[Tensor]) -> int:
        """Bytes of the group gathered: FSDP2 fills every shard up to the first one's rows."""
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


# ---- tables


@dataclass
class Row:
    case: Case
    w: int
    parallel: str
    optimizer: str
    model: Around
    step: Step
    gpu: GPU

    def key(self) -> list[str]:
        alone = "*" if self.case.sequences < self.w else ""
        return [self.case.name, f"{self.w:,}{alone}", self.parallel, self.optimizer]

    def compute(self) -> list[str]:
        each, busiest = self.model.flops / self.w, float(self.step.flops.max())
        with_whole = int((self.step.whole > 0).sum())
        return [
            f"{each:.3g}",
            f"{self.step.flops.sum():.3g}",
            f"{busiest:.3g}",
            percent(busiest / (each + busiest)),
            f"{with_whole:,}" if with_whole else "–",
        ]

    def memory(self) -> list[str]:
        m, s = self.model, self.step
        buffers = s.buffers.clamp(
            min=m.buffers
        )  # forward and backward are over when the step begins
        total = m.weights + m.grads + s.state + buffers
        r = int(total.argmax())
        parts = [
            giga(x)
            for x in (m.weights, m.grads, float(s.state[r]), float(buffers[r]), float(total[r]))
        ]
        return [*parts, "yes" if total[r] <= self.gpu.memory else "no"]

    def communication(self) -> list[str]:
        return [
            giga(x)
            for x in (
                sum(b for b, _ in self.model.rings),
                float(self.step.sent.mean()),
                float(self.step.sent.max()),
            )
        ]

    def time(self) -> list[str]:
        around = sum(sent / speed for sent, speed in self.model.rings)
        times = (
            self.model.flops / self.w / self.gpu.flops,
            self.step.seconds(self.gpu),
            around,
            self.step.transfer_seconds(self.w),
        )
        return [number(1e3 * t) for t in times]


KEY = ["model", "GPUs", "parallel", "optimizer"]
TABLES = {
    "compute": [
        "forward + backward a GPU",
        "optimizer, all GPUs",
        "busiest GPU",
        "its share",
        "GPUs with a matrix",
    ],
    "memory": ["weights", "gradients", "state", "buffers", "sum", "could fit"],
    "communication": ["forward + backward", "optimizer, mean", "busiest GPU"],
    "time": [
        "forward + backward",
        "optimizer, busiest GPU",
        "their communication",
        "its communication",
    ],
}
UNITS = {
    "compute": "FLOPs a step",
    "memory": "GB a GPU, the fullest; without activations and a stack's temporaries",
    "communication": "GB that a GPU sends a step",
    "time": "ms, rooflines from data sheets: estimates, not measured, nothing overlapped",
}


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def giga(x: float) -> str:
    return number(x / 1e9)


def percent(x: float) -> str:
    return f"{100 * x:.2g} %" if x < 0.995 else f"{100 * x:.4g} %"


def rows(
    case: Case, made: dict[str, tuple[GPT, list[Weight]]], args: argparse.Namespace
) -> Iterator[Row]:
    """made: by optimizer, what weights_of found."""
    tokens = float(case.sequences * case.model.block_size)
    for w in args.gpus:
        if w < 1:
            raise Refusal("--gpus", got=w, allowed="1 or more", fix="--gpus 8")
        for mode in args.parallel if w > 1 else ["ddp"]:
            s = {"ddp": 1, "fsdp": w, "hsdp": min(w, args.shards)}[mode]
            if s < 1 or w % s:
                raise Refusal(
                    "--shards",
                    got=s,
                    allowed=f"a divisor of the {w} GPUs",
                    fix="another number of GPUs, or --shards",
                )
            for optimizer in args.optimizer:
                model, weights = made[optimizer]
                step = step_of(optimizer, weights, mode, w, s)
                if step is not None:
                    yield Row(
                        case,
                        w,
                        mode if w > 1 else "–",
                        optimizer,
                        around(model, tokens, mode, w, s),
                        step,
                        GPUS[args.gpu],
                    )


def headline(case: Case, model: GPT, weights: list[Weight], gpu: GPU) -> str:
    """The model, and what of it cannot be split."""
    top = max(weights, key=lambda x: x.whole)
    return (
        f"{case.name}: {model.num_params():,} weights; {case.sequences:,} sequences of {case.model.block_size:,} tokens a step;"
        f" {sum(x.whole > 0 for x in weights)} matrices that need an owner, the largest {' × '.join(map(str, top.p.shape))}:"
        f" {giga(4 * top.p.numel())} GB in float32, {top.whole:.3g} FLOPs to dualize, {number(1e3 * top.whole / gpu.flops)} ms at peak"
    )


def table(header: list[str], lines: list[list[str]], *, markdown: bool) -> str:
    if markdown:
        return "\n".join(
            "| " + " | ".join(x) + " |" for x in [header, ["---"] * len(header), *lines]
        )
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            x.ljust(n) if i < len(KEY) else x.rjust(n)
            for i, (x, n) in enumerate(zip(line, widths, strict=True))
        )
        for line in [header, *lines]
    )


def report(found: Iterable[Case], args: argparse.Namespace) -> Iterator[str]:
    """The tables, line by line."""
    counted: list[Row] = []
    for case in found:
        if args.tokens_per_step is not None:
            length = case.model.block_size
            if args.tokens_per_step < 1 or args.tokens_per_step % length:
                raise Refusal(
                    "--tokens-per-step",
                    got=args.tokens_per_step,
                    allowed=f"a multiple of {case.name}'s {length} tokens a sequence",
                    fix=length * max(1, args.tokens_per_step // length),
                )
            case = replace(case, sequences=args.tokens_per_step // length)
        made = {optimizer: weights_of(case, optimizer) for optimizer in {OURS, *args.optimizer}}
        yield ("- " if args.markdown else "") + headline(case, *made[OURS], GPUS[args.gpu])
        counted += rows(case, made, args)
    for name in args.table:
        title = f"{name}: {UNITS[name]} ({args.gpu})"
        yield f"\n**{title}**\n" if args.markdown else f"\n{title}\n"
        yield table(
            [*KEY, *TABLES[name]],
            [[*row.key(), *getattr(row, name)()] for row in counted],
            markdown=args.markdown,
        )
    if any(row.case.sequences < row.w for row in counted):
        yield f"\n{'&ast;' if args.markdown else '*'} fewer sequences than GPUs: data parallelism alone cannot share them out"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", nargs="+", default=["124M"], choices=list(cases()))
    which.add_argument("--config", type=Path, nargs="+", help="of a training run")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 64, 512, 4096, 16384])
    parser.add_argument(
        "--parallel", nargs="+", default=["ddp", "fsdp"], choices=("ddp", "fsdp", "hsdp")
    )
    parser.add_argument("--shards", type=int, default=NODE, help="of one copy, with hsdp")
    parser.add_argument(
        "--optimizer", nargs="+", default=[OURS, ADAMW, MUON_PLAIN], choices=OPTIMIZERS
    )
    parser.add_argument(
        "--tokens-per-step", type=int, help="by default those of the configuration or publication"
    )
    parser.add_argument("--gpu", default="H100", choices=list(GPUS))
    parser.add_argument("--table", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args(argv)
    try:
        found = (
            [Case.of_config(path) for path in args.config]
            if args.config
            else [cases()[name] for name in args.model]
        )
        for line in report(found, args):
            print(line)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
