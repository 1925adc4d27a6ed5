"""The cost of each weight under each optimizer: FLOPs and bytes of state.

They are counted from the code, on weights without numbers (torch's meta device). O: rows of a
weight.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model import GPT
from optim import Dualized
from optim.directions import DIRECTIONS
from optim.moments import Rows
from optim.norms import Norm
from optim.placement import OneProcess
from optim.polar import Polar
from optim.ranks import Ranks
from optim.update import direction_
from training.config import OptimConfig

from .cases import Case

OURS, ADAMW, ZERO, MUON_PLAIN, MUON_OWNED = (
    "Dualized",
    "AdamW",
    "AdamW, sharded",
    "Muon",
    "Muon, owned",
)
OPTIMIZERS = (OURS, ADAMW, ZERO, MUON_PLAIN, MUON_OWNED)
# FLOPs an entry beside dualize. Nesterov's momentum: two lerps of 3, radius 1, update 2. AdamW
# (Loshchilov, Hutter, arXiv 1711.05101, alg. 2): averages 3 and 4, √, ÷ and + for the divisor 3,
# quotient 1, update 2, decay 1. Besides, of "factored": largest and smallest 2, quotient and square
# 2, two sums 2, there and back 4; of "whitened": the same, but rows' there and back alone, and
# columns before the product 1. What is done by entries of R is not counted.
MOMENTUM_FLOPS, ADAMW_FLOPS = 9, 14
DIRECTION_FLOPS = {"factored": 10, "whitened": 9}
# torch.optim.Muon's iteration: 5 steps, plain, bfloat16; 2-D weights but embedding and head, which
# AdamW steps (as its documentation recommends).
MUON = Polar("jordan", "plain", "bfloat16")


@dataclass(frozen=True)
class Weight:
    """The cost of one weight.

    key: of its stack. whole: FLOPs that need all of it. split: FLOPs by rows or entries. products:
    of these, a direction's matrix products. roots: FLOPs of its roots, on every rank with rows,
    on average over steps. state: bytes, by rows. common: bytes of state that every rank with
    rows has. summed: bytes that are summed over the ranks that have rows, where these are apart.
    """

    p: Tensor
    key: tuple[object, ...]
    by_rows: bool
    whole: int
    split: int
    state: int
    common: int = 0
    summed: int = 0
    products: int = 0
    roots: float = 0.0


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
        self.recorder = Recorder()
        same = ("direction", "refresh_every", "scale", "momentum_dtype", "master_weights")
        super().__init__(model, lr=1.0, **{k: getattr(optim, k) for k in same})

    def placement_of(self, p: Tensor) -> OneProcess:
        return self.recorder


def weights_of(case: Case, optimizer: str, polar: Polar | None = None) -> tuple[GPT, list[Weight]]:
    """Return the model, and its weights in the order in which Dualized has them.

    polar: by default that of the case, or Muon's.
    """
    muon = optimizer in (MUON_PLAIN, MUON_OWNED)
    if muon:
        case = replace(case, optim=OptimConfig(param_dtype=case.optim.param_dtype, polar=MUON))
    model = case.gpt(polar or case.polar)
    planned = Planned(model, case.optim)
    planned.make_state(lambda name: True)
    weights = []
    names = planned.param_groups[0]["param_names"]
    for name, (p, flops, by_rows) in zip(names, planned.recorder.entries, strict=True):
        norm, buffers = planned.norm.norms[name], planned.state[p].values()
        state = sum(b.nbytes for b in buffers if b.ndim == p.ndim)
        common = sum(b.nbytes for b in buffers if b.ndim != p.ndim)
        group = planned.param_groups[0]
        costs = group["direction"], group["refresh_every"], norm, tuple(p.shape), p.dtype
        summed, products, roots = direction_costs(*costs)
        whole, split = (0, int(flops)) if by_rows else (int(flops), 0)
        more = DIRECTION_FLOPS.get(group["direction"], 0)
        split += (MOMENTUM_FLOPS + more) * p.numel() + products
        key = (norm, p.shape, p.dtype)
        weight = Weight(p, key, by_rows, whole, split, state, common, summed, products, roots)
        if optimizer in (ADAMW, ZERO) or (muon and by_rows):
            weight = Weight(p, key, by_rows, 0, ADAMW_FLOPS * p.numel(), 2 * p.nbytes)
        elif muon:
            weight = Weight(p, key, by_rows, whole, split, p.nbytes)
        weights.append(weight)
    return model, weights


@cache
def direction_costs(
    direction: str, refresh_every: int, norm: Norm, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[int, int, float]:
    """Return the bytes that a direction sums over ranks if these have rows of a weight each, the
    FLOPs of its matrix products by rows, and those of its roots on average over steps."""
    p = torch.empty(shape, dtype=dtype, device="meta")
    whole, nothing = (direction_products(direction, p, norm, n, refresh=False) for n in (len(p), 0))
    summed, roots = direction_products(direction, p, norm, 0, refresh=True)
    own = nothing[1] + (roots - nothing[1]) / refresh_every
    return summed, whole[1] - nothing[1], own


def direction_products(
    direction: str, p: Tensor, norm: Norm, rows: int, *, refresh: bool
) -> tuple[int, int]:
    """Return (bytes summed over ranks, FLOPs of products) of a direction where a rank has so many
    rows of a weight."""
    sizes: list[int] = []

    def total(x: Tensor) -> Tensor:
        sizes.append(x.nbytes)
        return x

    part = Rows(tuple(p.shape), total=total)
    G = torch.empty(1, rows, *p.shape[1:], device="meta")
    own = DIRECTIONS[direction].on(norm, part).buffers(G[0])
    state = {k: b[None] for k, b in own.items()}
    live = torch.ones(1, *(1,) * p.ndim, dtype=torch.bool, device="meta")
    group = {"direction": direction, "beta": 0.9, "beta2": 0.9}  # whose values cost nothing
    with FlopCounterMode(display=False) as flops:
        D, back = direction_(G, state, group, norm=norm, live=live, refresh=refresh, rows=part)
        if back is not None:
            back(D)
    return sum(sizes), flops.get_total_flops()
