"""optim/placement.py, replicas.py, ranks.py, and Dualized over ranks.

Oracle: one process without a process group, on the whole batch.
w: ranks. mode: "replicas" (gradients of their own), "fsdp" (rows sharded over all ranks), "hsdp" (two copies, each
sharded over half of the ranks). Functions that take (rank, world, …) run in the processes of a group: see
tests.helpers.ranks.
"""

import copy
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from model import GPT, GPTConfig
from optim import Dualized, ModularNorm, NonFiniteError, metrize, replicas
from optim import ranks as the_ranks
from optim.errors import PlacementError
from optim.norms import L1ToLinf, L1ToRMS, MaxEntry, Norm, RMSToLinf, RMSToRMS, VectorRMS
from optim.placement import Job, assign_owners, interleave
from optim.polar import SCHEDULES, Polar
from optim.ranks import Piece, Ranks
from optim.views import Blocks, ConvRMSToRMS, Experts, Flattened, Transposed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode
from training.config import load
from training.tensor_files import read_pieces, write_pieces

from tests.helpers import ROOT, SOAK, ranks, run_ranks

# of float64 weights, relative to their largest entry: only the order of sums differs; 2e-14 measured after 20 steps
SAME = 1e-9
SAME_FLOAT32 = 1e-5  # after one step; Polar Express is steep where a singular value is near 0
TOLERANCES = {torch.float64: SAME, torch.float32: SAME_FLOAT32, torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps}
STEPS = 20 if SOAK else 6
SAVED, RESUMED = range(4), range(4, 7)  # steps before and after a checkpoint
BATCH = 48  # sequences: divisible by every number of ranks times 4 parts
MODES = [("replicas", 1), ("replicas", 2), ("replicas", 3), ("replicas", 4), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)]
Weights = dict[str, Tensor]


class Net(nn.Module):
    """Uneven shapes, a bias, two row-wise norms, a weight of one row, a gain of one entry, and three equal maps, one of
    them unused.

    Over 4 ranks the last shard of 5 rows is empty, and all but the first of one row.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(13, 10)
        self.narrow, self.wide = nn.Linear(10, 5), nn.Linear(5, 10, bias=False)
        self.sign, self.up, self.down, self.unused = (nn.Linear(10, 10, bias=False) for _ in range(4))
        self.one, self.head = nn.Linear(10, 1, bias=False), nn.Linear(10, 11, bias=False)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.wide(torch.tanh(self.narrow(h)))
        h = h + self.down(torch.relu(self.up(self.sign(h)))) * self.gain
        h = h + 0.1 * self.one(h)
        return nn.functional.cross_entropy(self.head(h).flatten(0, -2), y.flatten())

    def norm(self, polar: Polar) -> ModularNorm:
        rows: dict[str, Norm] = {
            "embed.weight": L1ToRMS(),
            "head.weight": RMSToLinf(),
            "sign.weight": L1ToLinf(),
            "gain": MaxEntry(1),
        }
        norms = {
            n: rows.get(n) or (VectorRMS() if p.ndim == 1 else RMSToRMS(polar)) for n, p in self.named_parameters()
        }
        return ModularNorm(norms, {n: 0.05 * (1 + i % 3) for i, n in enumerate(norms)})


# Each setting that a rank could get wrong, in few runs. Keys: modules, the parameters of a group.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "groups": {
        "embed head gain": {"direction": "nesterov", "weight_decay": 0.1, "max_grad_norm": 0.3, "constraint": "sphere"},
        "narrow wide": {"direction": "adam", "scale": "dual", "lr": 0.1, "constraint": "ball"},
        "sign up down unused": {"direction": "lion", "constraint": "stiefel", "lr": torch.tensor(0.5)},
        "one": {"lr": 0.0},
    },
    "factored": {
        "embed head gain sign": {"direction": "factored", "max_grad_norm": 0.3, "constraint": "ball"},
        "narrow wide": {"direction": "factored", "scale": "dual", "lr": 0.1},
        "up down one unused": {"direction": "factored", "weight_decay": 0.1},
    },
    "whitened": {
        "embed head gain sign": {"direction": "whitened", "refresh_every": 2, "max_grad_norm": 0.3},
        "narrow wide": {"direction": "whitened", "refresh_every": 1, "constraint": "ball"},
        "up down one unused": {"direction": "whitened", "weight_decay": 0.1},
    },
    "auto": {
        "embed head gain narrow wide sign": {"weight_decay": 0.1, "max_grad_norm": 0.3, "constraint": "ball"},
        "up down one unused": {"lr": 0.5, "direction": "nesterov", "scale": "unit"},
    },
}


def dualized(model: Net, case: str, *, polar: str = "exact", **settings: Any) -> Dualized:
    named = list(model.named_parameters())
    groups: Any = [
        {"params": [(n, p) for n, p in named if n.split(".")[0] in modules.split()], **options}
        for modules, options in CASES[case].items()
    ]
    assert sum(len(g["params"]) for g in groups) == len(named)
    return Dualized(groups, "auto" if case == "auto" else 1.0, norm=model.norm(Polar(polar)), **settings)


def sharded(model: nn.Module, mode: str, world: int) -> nn.Module:
    """The model as this mode has it; the module "narrow", where there is one, is a sharded unit of its own."""
    if mode != "replicas":
        shape, names = ((world,), ("shard",)) if mode == "fsdp" else ((2, world // 2), ("replicate", "shard"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for unit in [m for n, m in model.named_children() if n == "narrow"] + [model]:
            fully_shard(unit, mesh=mesh, reshard_after_forward=False)
    return model


def train(
    model: nn.Module,
    optimizer: Dualized,
    steps: Iterable[int],
    *,
    rank: int = 0,
    world: int = 1,
    parts: int = 1,
    overlap: bool = True,
) -> None:
    """Steps on this rank's share of the batches, in as many micro-batches. overlap: inside last_backward()."""
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x, y = torch.randint(13, (BATCH, 3), generator=g), torch.randint(11, (BATCH, 3), generator=g)
        for part in range(parts):
            size, last = BATCH // (world * parts), part == parts - 1
            first = (part * world + rank) * size
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
                model.set_reshard_after_backward(last)
            with optimizer.last_backward() if last and overlap else nullcontext():
                (model(x[first : first + size], y[first : first + size]) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.check_finite()


def full(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def weights(model: nn.Module) -> Weights:
    """Whole, copied."""
    return {n: full(p) for n, p in model.named_parameters()}


def difference(a: Weights, b: Weights) -> float:
    """The largest over tensors of max |a − b| / max |b|."""
    assert a.keys() == b.keys()
    return max(
        ((a[k].double() - b[k].double()).abs().max() / b[k].double().abs().max().clamp(min=1e-30)).item() for k in b
    )


def equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)


@cache
def alone(case: str, steps: int = STEPS) -> Weights:
    """After training in one process."""
    model = Net().double()
    train(model, dualized(model, case), range(steps))
    return weights(model)


# ---- the same step on any number of ranks


def _trained(rank: int, world: int, mode: str, case: str, parts: int) -> Weights:
    model = sharded(Net().double(), mode, world)
    grads = "reduced" if mode == "hsdp" else "local"  # of sharded weights they are the same
    train(model, dualized(model, case, grads=grads), range(STEPS), rank=rank, world=world, parts=parts)  # type: ignore[arg-type]
    return weights(model)


def _all_trained(rank: int, world: int, mode: str) -> dict[tuple[str, int], Weights]:
    runs = [("groups", 4), ("auto", 1), ("factored", 2), ("whitened", 1)] + [("groups", 1)] * (
        mode == "replicas" or world == 2
    )  # the others are slow
    return {(case, parts): _trained(rank, world, mode, case, parts) for case, parts in runs}


@pytest.mark.soak
@pytest.mark.parametrize(("mode", "world"), MODES)
def test_any_number_of_ranks_and_parts_trains_as_one_process(mode: str, world: int):
    found = ranks(world, _all_trained, mode)
    start = dict(Net().double().named_parameters())
    for case, parts in found[0]:
        for name, w in alone(case).items():
            still = name.startswith("unused") or (case == "groups" and name.startswith("one"))
            assert torch.equal(w, start[name]) == still, name
        for rank in range(world):
            assert equal(found[rank][case, parts], found[0][case, parts]), "bit for bit on all ranks"
            assert difference(found[rank][case, parts], alone(case)) < SAME, (case, parts)


def _in_another_setting(rank: int, world: int, what: str) -> Weights:
    model: nn.Module = Net().double()
    if what == "two pairs":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "shard"))["shard"]
        fully_shard(model, mesh=mesh)
        rank, world = rank % 2, 2
    elif what != "DDP":
        fully_shard(model.narrow, mesh=init_device_mesh("cpu", (world,)))
    optimizer = dualized(model, "auto", grads="local" if "local" in what else "reduced")  # type: ignore[arg-type]
    forward = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if what == "DDP" else model

    def average(*_: Any) -> None:
        for p in model.parameters():
            if p.grad is not None and not isinstance(p, DTensor):
                dist.all_reduce(p.grad)
                p.grad /= world

    if what == "a sharded layer, reduced":
        optimizer.register_step_pre_hook(average)
    train(forward, optimizer, range(4), rank=rank, world=world)
    return weights(model)


@pytest.mark.parametrize(
    ("world", "what"), [(2, "DDP"), (2, "a sharded layer, local"), (3, "a sharded layer, reduced"), (4, "two pairs")]
)
def test_reduced_gradients_part_of_the_weights_sharded_and_part_of_the_ranks_train_as_one_process(
    world: int, what: str
):
    """Two pairs: each shards its own model over two of the four ranks, and has the whole batch."""
    for found in ranks(world, _in_another_setting, what):
        assert difference(found, alone("auto", 4)) < SAME


EXACT = Polar("exact")
KINDS: dict[str, tuple[Norm, tuple[int, ...]]] = {  # of weights: their norms and shapes
    "matrix": (RMSToRMS(EXACT), (6, 4)),
    "twin": (RMSToRMS(EXACT), (6, 4)),
    "square": (RMSToRMS(EXACT), (5, 5)),
    "row": (RMSToRMS(EXACT), (1, 5)),
    "rows": (L1ToRMS(), (7, 5)),
    "experts": (Experts(RMSToRMS(EXACT)), (3, 4, 4)),
    "conv": (ConvRMSToRMS(RMSToRMS(EXACT)), (4, 3, 2, 2)),
    "heads": (Blocks(RMSToRMS(EXACT), 2), (6, 4)),
    "unequal": (Blocks(RMSToRMS(EXACT), (2, 1), turns=2), (6, 4)),
    "transposed": (Transposed(RMSToRMS(EXACT)), (5, 4)),
    "groups": (ConvRMSToRMS(RMSToRMS(EXACT), groups=2, transposed=True), (6, 2, 2, 1)),
    "flattened": (Flattened(RMSToRMS(EXACT)), (5, 2, 2, 2)),
    "few rows": (RMSToLinf(), (2, 4)),
    "tied rows": (Blocks(L1ToRMS(), 2), (6, 4)),
    "vector": (VectorRMS(), (5,)),
    "gain": (MaxEntry(1), (5,)),
    "scalar": (MaxEntry(0), ()),
    "strided": (RMSToRMS(EXACT), (4, 6)),
}
REPLICAS_ALONE = ("scalar", "strided")  # FSDP shards no scalars and nothing that is not contiguous
KEPT: dict[str, tuple[torch.dtype, dict[str, Any]]] = {  # of the weights; settings of what is kept of them
    "masters": (
        torch.bfloat16,
        {"master_weights": True, "momentum_dtype": "float32", "direction": "nesterov", "weight_decay": 0.1},
    ),
    "bfloat16": (torch.bfloat16, {"direction": "lion", "constraint": "sphere"}),
    "bfloat16 momentum": (torch.float32, {"momentum_dtype": "bfloat16", "direction": "adam", "constraint": "ball"}),
    "dual": (torch.float32, {"scale": "dual", "beta": 0.5, "lr": 0.01}),
    "soap": (torch.float64, {"direction": "soap", "refresh_every": 2}),
    "factored": (torch.float64, {"direction": "factored", "weight_decay": 0.1}),
    "whitened": (torch.float64, {"direction": "whitened", "refresh_every": 2, "weight_decay": 0.1}),
    "whitened in float32": (torch.float32, {"direction": "whitened", "momentum_dtype": "bfloat16"}),
    "factored in float32": (torch.float32, {"direction": "factored", "momentum_dtype": "bfloat16"}),
}
HAND_STEPS = 3


class Bag(nn.Module):
    """Weights without a forward pass: gradients are set by hand."""

    def __init__(self, names: Iterable[str] = KINDS):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for name in names:
            W = torch.randn(KINDS[name][1], generator=g)
            setattr(self, name, nn.Parameter(W.mT.contiguous().mT if name == "strided" else W))

    def dualized(self, **settings: Any) -> Dualized:
        norms = {n: KINDS[n][0] for n, _ in self.named_parameters()}
        radii = {n: 0.1 * (1 + i) for i, n in enumerate(norms)}
        return Dualized(self.named_parameters(), settings.pop("lr", 0.5), norm=ModularNorm(norms, radii), **settings)


def share(name: str, step: int, rank: int, world: int) -> Tensor:
    """A rank's gradient: small whole numbers, whose average over any number of ranks is the same and exact in every
    dtype. (1 of 1: that average.)
    """

    def numbers(of: int) -> Tensor:
        return torch.randint(
            -4,
            5,
            KINDS[name][1],
            generator=torch.Generator().manual_seed(1000 * step + 100 * of + list(KINDS).index(name)),
        )

    others = [numbers(r) for r in range(1, world)]
    return (others[rank - 1] if rank else world * numbers(0) - sum(others)).double()


def set_gradients(model: nn.Module, step: int, rank: int, world: int) -> None:
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):  # gradients of shards come reduced
            p.grad = distribute_tensor(
                share(name, step, 0, 1).to(p.dtype), p.device_mesh, p.placements, src_data_rank=None
            )
        else:
            p.grad = torch.empty_like(p).copy_(share(name, step, rank, world))


def step_by_hand(model: nn.Module, optimizer: Dualized, steps: Iterable[int], rank: int = 0, world: int = 1) -> None:
    for step in steps:
        set_gradients(model, step, rank, world)
        optimizer.step()
    optimizer.check_finite()


def buffers(optimizer: Dualized) -> Weights:
    """The whole state, copied, by parameter and buffer. Collective."""
    saved = optimizer.state_dict()
    names = {
        i: n for group in saved["param_groups"] for n, i in zip(group["param_names"], group["params"], strict=True)
    }
    return {f"{names[i]}.{k}": full(b) for i, state in saved["state"].items() for k, b in state.items()}


def _by_hand(rank: int, world: int, mode: str) -> dict[str, Weights]:
    found = {}
    for kept, (dtype, options) in KEPT.items():
        if mode == "replicas" or kept != "soap":
            model = sharded(
                Bag(n for n in KINDS if mode == "replicas" or n not in REPLICAS_ALONE).to(dtype), mode, world
            )
            optimizer = model.dualized(grads="local", **options)  # type: ignore[operator]
            step_by_hand(model, optimizer, range(HAND_STEPS), rank, world)
            found[kept] = weights(model) | buffers(optimizer)
    return found


@pytest.mark.parametrize(("mode", "world"), [("replicas", 2), ("replicas", 3), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)])
def test_weights_and_state_of_every_kind_and_dtype_are_as_in_one_process(mode: str, world: int):
    """Averages are exact here, so that little is left to rounding.

    Otherwise rounding alone tells apart some of SOAP's axes.
    """
    found = ranks(world, _by_hand, mode)
    for kept in found[0]:
        dtype, options = KEPT[kept]
        model = Bag(n for n, _ in Bag().named_parameters() if n in found[0][kept]).to(dtype)
        before = weights(model)
        optimizer = model.dualized(**options)
        step_by_hand(model, optimizer, range(HAND_STEPS))
        expected = weights(model)
        assert all(not torch.equal(before[n], w) for n, w in expected.items() if n != "scalar"), (
            "a sign may go to and fro"
        )
        expected |= buffers(optimizer)
        coarse = 4 * torch.finfo(torch.bfloat16).eps if "bfloat16" in kept else 0
        for rank in range(world):
            assert found[rank][kept].keys() == expected.keys()
            for n, x in expected.items():
                y = found[rank][kept][n]
                assert torch.equal(y, found[0][kept][n]) and y.dtype == x.dtype, (kept, n)
                if not n.endswith("_basis"):
                    assert difference({n: y}, {n: x}) <= max(coarse, TOLERANCES[x.dtype]), (kept, n)


def _grown(rank: int, world: int, mode: str) -> Weights:
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.later = Bag(["matrix", "rows"]), Bag(["twin", "experts"])

    model = Two().double()
    sharded(model, mode, world)
    optimizer = model.narrow.dualized(grads="local")
    step_by_hand(model.narrow, optimizer, range(2), rank, world)
    for name, p in model.later.named_parameters():
        optimizer.add_param_group({"params": [(name, p)], "norm": KINDS[name][0], "radius": 0.2, "direction": "adam"})
    for step in range(2, 4):
        for part in (model.later, model.narrow):
            set_gradients(part, step, rank, world)
        optimizer.step()
    optimizer.check_finite()
    return weights(model)


@pytest.mark.parametrize(("mode", "world"), [("replicas", 3), ("fsdp", 2)])
def test_weights_that_are_added_later_find_their_owners(mode: str, world: int):
    expected = _grown(0, 1, "replicas")
    for found in ranks(world, _grown, mode):
        assert difference(found, expected) < SAME


def _frozen(rank: int, world: int) -> Weights:
    model = Bag(["matrix", "rows"])
    model.rows.requires_grad_(False)
    norms = {n: KINDS[n][0] for n, _ in model.named_parameters()}
    groups: Any = [{"params": list(model.named_parameters())}]
    optimizer = Dualized(groups, 0.5, norm=ModularNorm(norms, dict.fromkeys(norms, 0.1)), grads="local")
    model.matrix.grad = share("matrix", 0, rank, world).float()
    optimizer.step()
    return weights(model)


def test_a_frozen_weight_in_a_group_stays():
    """As in one process, where a group's weights need not want gradients."""
    expected = _frozen(0, 1)
    assert torch.equal(expected["rows"], Bag(["matrix", "rows"]).rows)  # type: ignore[arg-type]
    for found in ranks(2, _frozen):
        assert difference(found, expected) < SAME_FLOAT32


DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def _clipped(rank: int, world: int, mode: str, name: str) -> list[Weights]:
    found = []
    for dtype in DTYPES:
        model = sharded(Bag([name]).to(dtype), mode, world)
        step_by_hand(model, model.dualized(max_grad_norm=1.0, grads="local"), range(3), rank, world)  # type: ignore[operator]
        found.append(weights(model))
    return found


@pytest.mark.parametrize(("mode", "name"), [("replicas", "matrix"), ("fsdp", "row")])
def test_ranks_that_step_nothing_of_a_group_take_part_in_its_clipping(mode: str, name: str):
    """One weight with one owner; one row of which the other shard is empty."""
    of_ranks = ranks(2, _clipped, mode, name, deadline=20)
    for i, dtype in enumerate(DTYPES):
        model = Bag([name]).to(dtype)
        step_by_hand(model, model.dualized(max_grad_norm=1.0), range(3))
        for found in of_ranks:
            assert difference(found[i], weights(model)) <= TOLERANCES[dtype], dtype


# ---- one step in float32, and gradients that leave early


def _one_step(rank: int, world: int) -> Weights:
    model = Net()
    train(model, dualized(model, "groups", polar="polar_express", grads="local"), range(1), rank=rank, world=world)
    return weights(model)


@pytest.mark.parametrize("world", [2, 3])
def test_one_step_in_float32_follows_one_process(world: int):
    model = Net()
    train(model, dualized(model, "groups", polar="polar_express"), range(1))
    for found in ranks(world, _one_step):
        assert difference(found, weights(model)) < SAME_FLOAT32


def _overlapped(rank: int, world: int) -> list[Weights]:
    found = []
    for overlap, bucket in ((False, 600), (True, 1), (True, 600), (True, the_ranks.BUCKET_BYTES)):
        the_ranks.BUCKET_BYTES = bucket
        model = Net()
        train(
            model, dualized(model, "groups", grads="local"), range(3), rank=rank, world=world, parts=2, overlap=overlap
        )
        found.append(weights(model))
    return found


def test_gradients_that_leave_during_backward_give_the_same_bits():
    late, *early = ranks(3, _overlapped)[0]
    assert all(equal(weights, late) for weights in early)


# ---- gradients that are missing, or come in any order


class Layers(nn.Module):
    """Maps that a loss may use in any order; one is float32, one has a row-wise norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(5)).double()
        self.maps[3].float()

    def dualized(self, **settings: Any) -> Dualized:
        norms: dict[str, Norm] = {
            n: L1ToRMS() if n == "maps.4.weight" else RMSToRMS(EXACT) for n, _ in self.named_parameters()
        }
        return Dualized(self, 0.5, norm=ModularNorm(norms, dict.fromkeys(norms, 0.1)), weight_decay=0.1, **settings)

    def loss(self, used: Iterable[int], seed: int) -> Tensor:
        """Gradients arrive in the reverse order of use. No use at all has a loss too, without gradients."""
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for i in used:
            total = total + (self.maps[i](x.float() if i == 3 else x) - x.roll(i, 0)).square().mean()
        return total


def used_by(rank: int, step: int) -> list[int]:
    """Which maps a rank's loss uses, and in which order."""
    turned = [(i + rank) % 5 for i in range(5)]
    return [
        turned,
        turned if rank else [0, 2, 3, 4],  # missing on rank 0
        [i for i in turned if i != 2],  # on all ranks
        turned[1:],  # another one on each rank
        turned if rank else [],  # all on rank 0
        [],  # everything
        turned[::-1] if rank % 2 else turned,
        turned[:1],  # one on each rank: some on no rank
    ][step]


BUCKETS = (1, 300, the_ranks.BUCKET_BYTES)  # bytes: one weight in each, two, all of a dtype
SIZES = [(1, 1), (1, 4), (300, 4), (the_ranks.BUCKET_BYTES, 4)]  # with how many of them are under way


def _missing(rank: int, world: int) -> list[Weights]:
    return [_missing_with(rank, world, overlap, *sizes) for overlap in (True, False) for sizes in SIZES]


def _missing_with(rank: int, world: int, overlap: bool, bucket: int, in_flight: int) -> Weights:
    the_ranks.BUCKET_BYTES, replicas.IN_FLIGHT = bucket, in_flight
    model = Layers()
    optimizer = model.dualized(grads="local")
    for step in range(8):
        with optimizer.last_backward() if overlap else nullcontext():
            model.loss(used_by(rank, step), 10 * step + rank).backward()
        here = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        before = (
            weights(model),
            {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()},
        )
        optimizer.step()
        used = {i for r in range(world) for i in used_by(r, step)}
        for i, (n, p) in enumerate(model.named_parameters()):
            assert torch.equal(p, before[0][n]) == (i not in used), (step, n)
            if i not in used:
                assert equal(optimizer.state[p], before[1][n])
            assert p.grad is here[n] is None or torch.equal(p.grad, here[n]), "never written"  # type: ignore[arg-type]
        optimizer.zero_grad()
    optimizer.check_finite()
    return weights(model)


@pytest.mark.parametrize("world", [2, 3])
def test_a_gradient_missing_on_some_ranks_counts_as_zero_there(world: int):
    """And where it is missing on all, nothing of that weight moves.

    Whatever the order of gradients, and however they leave.
    """
    model = Layers()
    optimizer = model.dualized()
    for step in range(8):
        for rank in range(world):
            (model.loss(used_by(rank, step), 10 * step + rank) / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = ranks(world, _missing, deadline=40)
    for other in [w for of_rank in found for w in of_rank]:
        assert equal(other, found[0][0])
        for n, w in weights(model).items():
            assert difference({n: other[n]}, {n: w}) < TOLERANCES[w.dtype], n


def _with_other_collectives(rank: int, world: int, used: list[list[int]]) -> list[float]:
    model = Layers()
    optimizer, sums = model.dualized(grads="local"), []
    for _ in range(2):
        with optimizer.last_backward():
            loss = model.loss(used[rank], rank)
            loss.backward()
        total = torch.tensor(float(rank))
        dist.all_reduce(total)
        optimizer.step()
        optimizer.zero_grad()
        sums.append(total.item())
    return sums


@pytest.mark.parametrize("used", [[[0, 1, 2, 3, 4]] * 2, [[0, 1], [0, 1, 2, 3, 4]]], ids=["all", "some"])
def test_other_collectives_fit_between_the_last_backward_pass_and_the_step(used: list[list[int]]):
    """A loss is averaged there, say, while one rank has sent its gradients and another one has none to send yet."""
    assert ranks(2, _with_other_collectives, used, deadline=10) == [[1.0, 1.0]] * 2


def _calls(rank: int, world: int) -> list[int]:
    model = Layers()
    optimizer, calls = model.dualized(grads="local"), []
    for used in ([0], [], [1] if rank else []):
        model.loss(used, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        calls.append(optimizer.calls)
    return calls


def test_a_step_without_any_gradient_on_any_rank_does_not_count():
    """As in one process: the calls say when SOAP's bases are renewed, and are saved."""
    assert ranks(2, _calls) == [[1, 1, 2]] * 2


def _two_backward_passes(rank: int, world: int, bucket: int) -> tuple[str, Weights]:
    the_ranks.BUCKET_BYTES = bucket
    model = Layers()
    optimizer = model.dualized(grads="local")
    losses = [model.loss(range(5), rank) for _ in range(2)]
    with pytest.raises(RuntimeError) as caught, optimizer.last_backward():
        [loss.backward() for loss in losses]
    optimizer.zero_grad()
    with optimizer.last_backward():
        model.loss(range(5), rank).backward()
    optimizer.step()
    return str(caught.value), weights(model)


@pytest.mark.parametrize("bucket", [300, the_ranks.BUCKET_BYTES])
def test_two_backward_passes_as_the_last_one_are_refused(bucket: int):
    model = Layers()
    optimizer = model.dualized()
    for rank in range(2):
        (model.loss(range(5), rank) / 2).backward()
    optimizer.step()
    for text, found in ranks(2, _two_backward_passes, bucket):
        expected = (
            "last_backward()\n  got: a further backward pass before step()\n  allowed: one in it, the last of a step\n  fix: accumulate the others before;"
            " the optimizer's zero_grad() forgets a step that is not to be taken"
        )
        assert text == expected
        assert difference(found, weights(model)) < SAME_FLOAT32, "and a step goes on as if nothing had been"


NOT_TAKEN = ([[0, 1, 2, 3, 4]] * 2, [[0, 1, 2, 3, 4], [0]], [[], [3, 4]], [[], []])  # what the two ranks use


def _step_not_taken(rank: int, world: int, goes_on: str) -> list[Weights]:
    found = []
    for used, bucket in product(NOT_TAKEN, BUCKETS[1:]):
        the_ranks.BUCKET_BYTES = bucket
        model = Layers()
        optimizer = model.dualized(grads="local")
        with optimizer.last_backward():
            model.loss(used[rank], 50 + rank).backward()
        optimizer.zero_grad()
        if goes_on == "with one weight more":
            more = nn.Parameter(torch.ones(4, 4))
            optimizer.add_param_group({"params": [("more", more)], "norm": L1ToRMS(), "radius": 0.1})
        for _ in range(2):
            if goes_on == "in parts":
                model.loss(range(5), rank).backward()
            with nullcontext() if goes_on == "without overlap" else optimizer.last_backward():
                model.loss(range(5), rank + 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(weights(model))
    return found


GOES_ON = ("with overlap", "in parts", "without overlap", "with one weight more")


def _steps_not_taken(rank: int, world: int) -> dict[str, list[Weights]]:
    return {goes_on: _step_not_taken(rank, world, goes_on) for goes_on in GOES_ON}


@pytest.fixture(scope="module")
def steps_not_taken() -> list[dict[str, list[Weights]]]:
    return ranks(2, _steps_not_taken)


@pytest.mark.parametrize("goes_on", GOES_ON)
def test_gradients_that_were_sent_for_a_step_never_taken_are_forgotten(
    goes_on: str, steps_not_taken: list[dict[str, list[Weights]]]
):
    """Also where the ranks had heard different ones."""
    model = Layers()
    optimizer = model.dualized()
    for _ in range(2):
        for rank in range(2):
            for seed in (rank, rank + 2) if goes_on == "in parts" else (rank + 2,):
                (model.loss(range(5), seed) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in steps_not_taken:
        for after, used in zip(found[goes_on], product(NOT_TAKEN, BUCKETS[1:]), strict=True):
            assert difference(after, weights(model)) < SAME_FLOAT32, used


# ---- numbers that are not finite


def _not_finite(rank: int, world: int, mode: str, what: str) -> tuple[str, bool, Weights]:
    """A good step, a bad one, one that raises, and one more: (the error's text, whether the bad one changed nothing,
    weights).
    """
    model = sharded(Bag(n for n in KINDS if n not in REPLICAS_ALONE), mode, world)
    optimizer = model.dualized(grads="local", direction="adam", weight_decay=0.1)  # type: ignore[operator]

    def kept() -> Weights:
        state = {
            f"{n}.{k}": full(b) for n, p in model.named_parameters() for k, b in optimizer.state.get(p, {}).items()
        }
        return weights(model) | state

    step_by_hand(model, optimizer, [0], rank, world)
    before = kept()
    for name, p in model.named_parameters():
        assert p.grad is not None
        if name in what.split(" and "):
            mine = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            mine[-1] = math.nan if rank == 1 else mine[-1]
        if what == f"{name} overflows":
            p.grad.fill_(3e38)
    optimizer.step(loss=torch.tensor(math.inf if "loss" in what and rank == 1 else 1.0))
    same = equal(kept(), before)
    set_gradients(model, 1, rank, world)
    with pytest.raises(NonFiniteError) as caught:
        optimizer.step()
    same = same and equal(kept(), before)
    optimizer.step()
    optimizer.check_finite()
    return str(caught.value), same, weights(model)


TAKEN = "was not finite in call 2 of step(); that step was not taken, weights and momentum are as before"


NOT_FINITE = {  # what, and how the error's text begins
    ("replicas", 2): {
        "square": "the gradient of square on rank 1",
        "square and rows and loss": "the loss on rank 1 and of 2 more was",
        "rows overflows": "the average over ranks of the gradient of rows was",
    },
    ("replicas", 3): {
        "rows": "the gradient of rows on rank 1",
        "loss": "the loss on rank 1 was",
        "matrix overflows": "the average over ranks of the gradient of matrix was",
    },
    ("fsdp", 2): {"square": "the gradient of square on rank 1", "loss": "the loss on rank 1"},
    ("hsdp", 4): {"square": "the gradient of square on rank 1"},
}


def _all_not_finite(rank: int, world: int, mode: str) -> dict[str, tuple[str, bool, Weights]]:
    return {what: _not_finite(rank, world, mode, what) for what in NOT_FINITE[mode, world]}


@pytest.mark.parametrize(("mode", "world"), NOT_FINITE)
def test_a_number_that_is_not_finite_on_one_rank_stops_the_step_on_all(mode: str, world: int):
    """Weights and state stay bit for bit, the next step says on every rank what it was and where, and the step after it
    goes on.
    """
    found = ranks(world, _all_not_finite, mode)
    model = Bag(n for n in KINDS if n not in REPLICAS_ALONE)
    optimizer = model.dualized(direction="adam", weight_decay=0.1)
    step_by_hand(model, optimizer, [0, 1])
    for what, text in NOT_FINITE[mode, world].items():
        for message, same, after in (of_rank[what] for of_rank in found):
            assert message == found[0][what][0], "the same on all ranks"
            assert message.startswith(text) and message.endswith(TAKEN), message
            assert same, what
            assert equal(after, weights(model)), what


# ---- who holds which state


def _held(rank: int, world: int, mode: str) -> tuple[dict[str, Piece], set[str], dict[str, str]]:
    """(pieces, names of those that make_state() makes, what is wrong with DTensors: nothing)."""
    names = [n for n in KINDS if n not in REPLICAS_ALONE]
    model = sharded(Bag(names).double(), mode, world)
    optimizer = model.dualized(grads="local", direction="adam" if mode != "replicas" else "soap")  # type: ignore[operator]
    step_by_hand(model, optimizer, range(2), rank, world)
    wrong = {}
    for n, p in model.named_parameters():
        for k, b in optimizer.state.get(p, {}).items():
            if mode != "replicas" and not (
                isinstance(b, DTensor) and b.placements == p.placements and b.device_mesh == p.device_mesh  # type: ignore[attr-defined]
            ):
                wrong[f"{n}.{k}"] = str(b)
    model = sharded(Bag(names).double(), mode, world)
    fresh = model.dualized(grads="local", direction="adam" if mode != "replicas" else "soap")  # type: ignore[operator]
    fresh.make_state(lambda name: name.startswith("r"))
    return {k: Piece(p.tensor.clone(), p.row, p.shape) for k, p in optimizer.held().items()}, set(fresh.held()), wrong


@pytest.mark.parametrize(
    ("mode", "world"), [("replicas", 2), ("replicas", 3), ("replicas", 4), ("fsdp", 2), ("fsdp", 4)]
)
def test_ranks_hold_the_state_of_their_pieces_alone_and_together_all_of_it(mode: str, world: int):
    model = Bag(n for n in KINDS if n not in REPLICAS_ALONE).double()
    optimizer = model.dualized(direction="adam" if mode != "replicas" else "soap")
    step_by_hand(model, optimizer, range(2))
    found = ranks(world, _held, mode)
    assert sum(p.tensor.nbytes for pieces, *_ in found for p in pieces.values()) == sum(
        b.nbytes for b in buffers(optimizer).values()
    )
    for name, whole in buffers(optimizer).items():
        pieces = sorted((p[name] for p, *_ in found if name in p), key=lambda p: p.row)
        assert all(p.shape == whole.shape for p in pieces), name
        if whole.ndim == 0:
            assert len(pieces) == 1
            continue
        ends = [p.row + p.tensor.shape[0] for p in pieces if len(p.tensor)]
        assert [p.row for p in pieces if len(p.tensor)] == [0, *ends[:-1]] and ends[-1] == len(whole), "each row once"
        if not name.endswith("_basis"):
            assert difference({name: torch.cat([p.tensor for p in pieces])}, {name: whole}) < SAME
    for pieces, made, wrong in found:
        assert not wrong, "DTensors, placed as their parameters"
        assert made == {n for n in pieces if n.startswith("r")}, "before the first step, what it would make"


def _to_files(rank: int, world: int, mode: str, direction: str, written: str, read: str) -> tuple[Weights, Weights]:
    """(the whole state after two steps, whose pieces are written; that of another optimizer which reads pieces)."""
    model = sharded(Bag(n for n in KINDS if n not in REPLICAS_ALONE).double(), mode, world)
    optimizer = model.dualized(grads="local", direction=direction)  # type: ignore[operator]
    step_by_hand(model, optimizer, range(2), rank, world)
    write_pieces(Path(written), optimizer.held(), group=dist.group.WORLD)
    model = sharded(Bag(n for n in KINDS if n not in REPLICAS_ALONE).double(), mode, world)
    other = model.dualized(grads="local", direction=direction)  # type: ignore[operator]
    other.make_state(lambda name: True)
    read_pieces(Path(read), other.held())
    return buffers(optimizer), buffers(other)


@pytest.mark.parametrize("direction", ["factored", "whitened"])
@pytest.mark.parametrize(("mode", "world"), [("replicas", 2), ("fsdp", 4), ("hsdp", 4)])
def test_means_of_products_go_into_files_and_back(mode: str, world: int, direction: str, tmp_path: Path):
    """Rows with their ranks, columns, factors and roots that all ranks have once."""
    model = Bag(n for n in KINDS if n not in REPLICAS_ALONE).double()
    optimizer = model.dualized(direction=direction)
    step_by_hand(model, optimizer, range(2))
    write_pieces(tmp_path / "alone", optimizer.held())
    whole = buffers(optimizer)
    assert {"matrix.rows", "matrix.columns", "rows.columns", "heads.columns"} <= whole.keys()
    full = {f"{name}.factor" for name in ("matrix", "rows", "experts", "square")}
    assert full <= whole.keys() if direction == "whitened" else not full & whole.keys()
    for theirs, from_one in ranks(world, _to_files, mode, direction, str(tmp_path / "ranks"), str(tmp_path / "alone")):
        assert difference(theirs, whole) < SAME and equal(from_one, whole)
    fresh = Bag(n for n in KINDS if n not in REPLICAS_ALONE).double().dualized(direction=direction)
    fresh.make_state(lambda name: True)
    read_pieces(tmp_path / "ranks", fresh.held())
    assert equal(buffers(fresh), theirs)


# ---- saved here, loaded there


def _saved(rank: int, world: int, mode: str, case: str) -> tuple[Weights, dict[str, Any]]:
    model = sharded(Net().double(), mode, world)
    optimizer = dualized(model, case, grads="local")  # type: ignore[arg-type]
    train(model, optimizer, SAVED, rank=rank, world=world)
    saved = optimizer.state_dict()
    whole = {i: {k: full(b) for k, b in state.items()} for i, state in saved["state"].items()}
    return weights(model), saved | {"state": whole}


def loaded(
    mode: str, world: int, case: str, saved: tuple[Weights, dict[str, Any]], **settings: Any
) -> tuple[nn.Module, Dualized]:
    model = Net().double()
    model.load_state_dict(saved[0])
    sharded(model, mode, world)
    optimizer = dualized(model, case, **settings)
    optimizer.load_state_dict(saved[1])
    return model, optimizer


def _resumed(rank: int, world: int, mode: str, case: str, path: str) -> Weights:
    model, optimizer = loaded(mode, world, case, torch.load(path), grads="local")
    train(model, optimizer, RESUMED, rank=rank, world=world)
    return weights(model)


def _saved_and_resumed(
    rank: int, world: int, mode: str, folder: str
) -> dict[str, tuple[tuple[Weights, dict[str, Any]], Weights]]:
    return {
        case: (_saved(rank, world, mode, case), _resumed(rank, world, mode, case, f"{folder}/{case}")) for case in CASES
    }


@pytest.fixture(scope="module")
def saved_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights and state of one process, by case."""
    folder = tmp_path_factory.mktemp("saved")
    for case in CASES:
        model = Net().double()
        optimizer = dualized(model, case)
        train(model, optimizer, SAVED)
        torch.save((weights(model), optimizer.state_dict()), folder / case)
    return folder


@pytest.mark.parametrize(("mode", "world"), [("replicas", 2), ("replicas", 3), ("fsdp", 2)])
def test_a_run_goes_on_from_one_process_to_ranks_and_back(mode: str, world: int, saved_alone: Path):
    for by_case in ranks(world, _saved_and_resumed, mode, str(saved_alone)):
        for case, (state, resumed) in by_case.items():
            model, optimizer = loaded("replicas", 1, case, state)
            train(model, optimizer, RESUMED)
            whole = alone(case, RESUMED.stop)
            assert difference(weights(model), whole) < SAME, (
                case,
                "from ranks to one process; every rank has the whole state",
            )
            assert difference(resumed, whole) < SAME, (case, "from one process to ranks")


# ---- what is sent


MILLION = GPTConfig(n_layer=4, n_head=2, n_embd=128, block_size=8, vocab_size=1024)  # 1.05 M weights


def _bytes_sent(rank: int, world: int) -> int:
    """By this rank in one step."""
    model = GPT(MILLION)
    optimizer = Dualized(model, 0.1, grads="local")
    sent = 0

    def counting(function: Callable[..., Any], size: Callable[..., float]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            sent += size(*args)
            return function(*args, **kwargs)

        return counted

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("another collective than those counted")

    def exchanged(target: Tensor, source: Tensor, came: list[int], went: list[int]) -> int:
        return (sum(went) - went[rank]) * source.element_size()

    dist.all_to_all_single = counting(dist.all_to_all_single, exchanged)
    dist.all_gather = counting(dist.all_gather, lambda out, x: (world - 1) * x.nbytes)
    dist.all_reduce = counting(dist.all_reduce, lambda x, op: 2 * (world - 1) / world * x.nbytes)
    for other in (
        "all_gather_object",
        "all_gather_into_tensor",
        "broadcast",
        "reduce_scatter_tensor",
        "all_to_all",
        "send",
        "isend",
    ):
        setattr(dist, other, refused)
    for step in range(2):
        sent = 0
        x = torch.randint(1024, (2, 2, 8), generator=torch.Generator().manual_seed(10 * step + rank))
        with optimizer.last_backward():
            model(*x)[1].backward()
        optimizer.step()
    return sent


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_step_sends_what_a_ring_all_reduce_does(world: int):
    """Twice (w − 1)/w of the weights' bytes a rank; a rank that owns more than its share sends more, here by 1.2% at
    most.
    """
    bound = 2 * (world - 1) / world * sum(p.nbytes for p in GPT(MILLION).parameters())
    found = ranks(world, _bytes_sent)
    assert 0.99 * bound < sum(found) / world < 1.05 * bound
    assert max(found) < 1.05 * bound


# ---- who steps what


def optimum(costs: list[int], w: int) -> int:
    """The largest load of the best of all assignments."""
    return min(
        max(sum(c for c, r in zip(costs, (0, *where), strict=True) if r == rank) for rank in range(w))
        for where in product(range(w), repeat=len(costs) - 1)
    )


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 4))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_largest_load_is_within_grahams_bound_of_the_best(costs: list[int], w: int):
    loads = [0.0] * w
    where = assign_owners(costs, loads)
    assert loads == [0.0] * w, "not written"
    assert where == assign_owners(costs, loads), "every rank finds the same"
    largest = max(sum(c for c, r in zip(costs, where, strict=True) if r == rank) for rank in range(w))
    assert largest <= (4 / 3 - 1 / (3 * w)) * optimum(costs, w) * (1 + 1e-12)


def test_costs_go_longest_first_to_the_least_loaded_rank_and_the_lowest_of_equals():
    assert assign_owners([1, 1, 1], [0, 0]) == [0, 1, 0]
    assert assign_owners([1, 5, 2, 2], [0, 0]) == [1, 0, 1, 1]
    assert assign_owners([1, 1], [3, 0, 2]) == [1, 1]
    assert assign_owners([], [0, 0]) == []


@pytest.mark.parametrize("size", ["124m", "350m", "1.5b"])
def test_eight_ranks_share_a_gpts_steps_within_a_tenth(size: str, monkeypatch: pytest.MonkeyPatch):
    config = load([str(ROOT / f"configs/gpt2_{size}.toml")])
    monkeypatch.setattr("optim.dualized.ranks_of", lambda params, local: Ranks(None, 0, 8))
    with torch.device("meta"):
        model = GPT(config.model, config.optim.norms.build(config.optim.polar, config.model.n_head))
    norm = metrize(model, model.structure(config.optim.masses))
    loads = Dualized(model, 1.0, norm=norm, direction=config.optim.direction, grads="local")._placement.loads  # type: ignore[attr-defined]
    assert sum(loads) == pytest.approx(sum(norm.norms[n].flops(p.shape) for n, p in model.named_parameters()))
    assert max(loads) / (sum(loads) / 8) < 1.1


def jobs_of(yields: Iterable[int], log: list[str]) -> Iterator[Job]:
    """Jobs a, b, … that yield so many times; the log has what they do: a0, before their first yield, a1, …"""

    def job(name: str, times: int) -> Job:
        for i in range(times):
            log.append(f"{name}{i}")
            yield
        log.append(f"{name}{times}")

    return (job(chr(ord("a") + i), times) for i, times in enumerate(yields))


@pytest.mark.parametrize(
    ("ahead", "yields", "order"),
    [
        (0, [1, 1, 1], "a0 a1 b0 b1 c0 c1"),
        (1, [1, 1, 1], "a0 b0 a1 c0 b1 c1"),
        (0, [2, 2], "a0 a1 a2 b0 b1 b2"),
        (1, [2, 2, 2], "a0 b0 a1 b1 a2 c0 b2 c1 c2"),
        (2, [2, 2, 2], "a0 b0 a1 c0 b1 a2 c1 b2 c2"),
        (1, [0, 1, 0, 2], "a0 b0 c0 b1 d0 d1 d2"),
        (1, [], ""),
        (2, [0, 0], "a0 b0"),
    ],
)
def test_later_jobs_are_begun_while_one_waits(ahead: int, yields: list[int], order: str):
    log: list[str] = []
    interleave(jobs_of(yields, log), at_once=ahead + 1)
    assert " ".join(log) == order


@given(st.lists(st.integers(0, 4), max_size=6), st.integers(0, 3))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_all_jobs_are_done_and_no_more_are_begun_than_allowed(yields: list[int], ahead: int):
    log: list[str] = []
    interleave(jobs_of(yields, log), at_once=ahead + 1)
    for i, times in enumerate(yields):
        assert [x for x in log if x[0] == chr(ord("a") + i)] == [f"{chr(ord('a') + i)}{k}" for k in range(times + 1)]
    assert [x for x in log if x[1:] == "0"] == sorted(x for x in log if x[1:] == "0"), "begun in order"
    under_way: set[str] = set()
    for x in log:
        under_way.add(x[0])
        assert len(under_way) <= ahead + 1
        following = f"{chr(ord(x[0]) + 1)}0"
        if ahead and x[1:] == "1" and x[0] == min(under_way) and following in log:
            assert log.index(following) < log.index(x), "the next one sends before the oldest goes on"
        if int(x[1:]) == yields[ord(x[0]) - ord("a")]:
            under_way.remove(x[0])


# ---- what is refused


def _refusals(rank: int, world: int) -> dict[str, str]:
    """Their texts, by what was tried."""
    line, table, cube = (
        init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)])) for shape in ((2,), (2, 1), (2, 1, 1))
    )

    def build(*weights: Tensor, **settings: Any) -> Dualized:
        named = [(f"w{i}", nn.Parameter(w)) for i, w in enumerate(weights)]
        norm = ModularNorm({n: RMSToRMS() for n, _ in named}, dict.fromkeys((n for n, _ in named), 1.0))
        return Dualized(named, 0.1, norm=norm, **settings)

    def placed(mesh: DeviceMesh, *placements: Any) -> Tensor:
        return distribute_tensor(torch.ones(4, 4), mesh, placements, src_data_rank=None)

    rows, turned = Shard(0), DeviceMesh("cpu", [[1], [0]], mesh_dim_names=("a", "b"))
    later = build(torch.ones(4, 4))
    tried: dict[str, Callable[[], Any]] = {
        "columns": lambda: build(placed(line, Shard(1))),
        "copies": lambda: build(placed(line, Replicate())),
        "shards of copies": lambda: build(placed(table, rows, Replicate())),
        "a cube": lambda: build(placed(cube, Replicate(), Replicate(), rows)),
        "other order": lambda: build(placed(turned, Replicate(), rows)),
        "two meshes": lambda: build(placed(line, rows), placed(table, Replicate(), rows)),
        "a part": lambda: build(placed(table["b"], rows), grads="local"),
        "soap": lambda: build(placed(line, rows), direction="soap"),
        "later": lambda: later.add_param_group(
            {"params": [("v", nn.Parameter(placed(line, rows)))], "norm": RMSToRMS(), "radius": 1.0},
        ),
        "ddp": lambda: Dualized(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)), 0.1, grads="local"),
        "copy of replicas": lambda: copy.deepcopy(build(torch.ones(4, 4), grads="local")),
        "copy of shards": lambda: copy.deepcopy(build(placed(line, rows))),
    }
    found = {}
    for what, attempt in tried.items():
        with pytest.raises((PlacementError, TypeError)) as caught:
            attempt()
        found[what] = f"{caught.type.__name__}: {caught.value}"
    return found


def test_what_is_not_supported_is_refused_when_built():
    unplaced = (
        "  allowed: (Shard(0),) of fully_shard, or (Replicate(), Shard(0)) of a replicate × shard mesh\n"
        "  fix: fully_shard without tensor parallelism and without shard_placement_fn"
    )
    mesh = (
        "  allowed: one dimension, or replicate × shard over all ranks in order\n"
        '  fix: init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicate", "shard"))'
    )
    several = (
        "CopyError: Dualized of several processes\n  got: a copy or pickle of it\n  allowed: state_dict() of one, loaded into another\n"
        "  fix: copy the model, build Dualized anew, and load_state_dict()"
    )
    expected = {
        "columns": f"PlacementError: w0\n  got: a DTensor of placements (Shard(dim=1),)\n{unplaced}",
        "copies": f"PlacementError: w0\n  got: a DTensor of placements (Replicate(),)\n{unplaced}",
        "shards of copies": f"PlacementError: w0\n  got: a DTensor of placements (Shard(dim=0), Replicate())\n{unplaced}",
        "a cube": f"PlacementError: sharded weights\n  got: the mesh …\n{mesh}",
        "other order": f"PlacementError: sharded weights\n  got: the mesh …\n{mesh}",
        "two meshes": "PlacementError: sharded weights\n  got: 2 meshes\n  allowed: one for all weights\n  fix: pass the same mesh to every fully_shard",
        "a part": 'PlacementError: grads="local" beside sharded weights\n  got: a mesh of 1 in a world of 2\n  allowed: a mesh of all ranks\n'
        '  fix: grads="reduced", which sharded gradients are anyway',
        "soap": "PlacementError: w0\n  got: the direction 'soap' of a sharded weight\n  allowed: momentum, nesterov, adam, lion, factored, whitened, which need no whole weight\n"
        '  fix: one of them, or replicas (grads="local"), whose owners have whole weights',
        "later": "PlacementError: v\n  got: a mesh that no weight before it has\n  allowed: one mesh\n  fix: build Dualized with sharded weights",
        "ddp": 'PlacementError: Dualized(DistributedDataParallel(…), grads="local")\n  got: gradients that DDP has reduced already\n'
        '  allowed: the bare module, or grads="reduced"\n  fix: one of them',
        "copy of replicas": several,
        "copy of shards": several,
    }
    for found in ranks(2, _refusals):
        assert {what: re.sub(r"the mesh .*", "the mesh …", text) for what, text in found.items()} == expected


def test_local_gradients_without_a_process_group_are_refused_where_there_are_several_processes(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(PlacementError) as caught:
        Bag().dualized(grads="local")
    assert str(caught.value) == (
        'grads="local"\n  got: WORLD_SIZE 4 and no process group\n  allowed: torch.distributed.init_process_group() before\n'
        "  fix: call it, or start one process"
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    Bag().dualized(grads="local")


def test_only_reduced_and_local_gradients_are_known():
    with pytest.raises(
        ValueError, match=r"^Dualized: grads\n  got: 'some'\n  allowed: reduced, local\n  fix: Dualized\(…, grads=…\)$"
    ):
        Bag().dualized(grads="some")


# ---- what a step costs


def measured_flops(norm: Norm, shape: tuple[int, ...]) -> int:
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        norm.dualize_(G)
    return counter.get_total_flops()


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("form", ["plain", "gram", "auto"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_flops_of_a_polar_factor_are_those_of_its_products(schedule: str, form: Any, dtype: Any):
    polar = Polar(schedule, form, dtype)
    for m, n in ((6, 6), (4, 5), (4, 8), (12, 4), (1, 5)):
        assert polar.flops(m, n) == RMSToRMS(polar).flops((m, n)) == measured_flops(RMSToRMS(polar), (m, n)), (m, n)


@pytest.mark.parametrize(
    ("wrap", "shape"),
    [
        (lambda inner: Blocks(inner, 3), (12, 5)),
        (lambda inner: Blocks(inner, (4, 4, 2)), (10, 6)),
        (lambda inner: Blocks(inner, (2, 1, 1), turns=3), (12, 6)),
        (lambda inner: Blocks(Transposed(inner), 2), (6, 8)),
        (lambda inner: Experts(inner), (3, 4, 6)),
        (lambda inner: Experts(Blocks(inner, 2)), (3, 4, 6)),
        (lambda inner: Experts(Transposed(inner)), (3, 4, 9)),
        (lambda inner: ConvRMSToRMS(inner), (4, 3, 3, 2)),
        (lambda inner: ConvRMSToRMS(inner, dims=1, groups=2), (6, 2, 5)),
        (lambda inner: ConvRMSToRMS(inner, groups=2, transposed=True), (6, 2, 2, 2)),
        (lambda inner: Flattened(inner, 4), (4, 3, 2, 2)),
        (lambda inner: Transposed(inner), (4, 12)),
    ],
)
@pytest.mark.parametrize("form", ["plain", "gram", "auto"])
def test_flops_of_a_view_are_those_of_its_blocks(wrap: Callable[[Norm], Norm], shape: tuple[int, ...], form: Any):
    norm = wrap(RMSToRMS(Polar("polar_express", form)))
    assert norm.flops(shape) == measured_flops(norm, shape)


# ---- the harness itself


def _fails(rank: int, world: int, how: str) -> int:
    if rank == 1 and how == "raises":
        raise RuntimeError("this one")
    if rank == 1 and how == "dies":
        os._exit(3)
    if rank == 1 and how == "hangs":
        time.sleep(60)
    dist.barrier()
    return rank


def test_a_rank_that_fails_takes_the_others_with_it():
    assert ranks(3, _fails, "not") == [0, 1, 2]  # the fork server has loaded everything by now
    began = time.monotonic()
    for how, text in (
        ("raises", "RuntimeError: this one"),
        ("dies", "rank 1 of 3 died, exit code 3"),
        ("hangs", r"ranks \[0, 1, 2\] of 3 were still running after 1 s"),
    ):
        with pytest.raises(AssertionError, match=text):
            ranks(3, _fails, how, deadline=1 if how == "hangs" else 20)
    assert time.monotonic() - began < 25, "the group's timeout is 30 s, and a rank sleeps for 60"


def test_a_script_runs_in_ranks_as_torchrun_would_start_it(tmp_path: Path):
    (tmp_path / "script.py").write_text(
        "import os, sys, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "print(dist.get_rank(), dist.get_world_size(), os.environ['LOCAL_RANK'], os.environ['LOCAL_WORLD_SIZE'], os.environ['MORE'], sys.argv[1:])\n"
        "dist.barrier()\n"
        "sys.exit(f'{dist.get_rank()} refuses' if dist.get_rank() else 0)\n"
    )
    found = run_ranks(tmp_path, 2, "a", "b c", script=str(tmp_path / "script.py"), env={"MORE": "x"})
    assert [(code, out) for code, out, _ in found] == [(0, "0 2 0 2 x ['a', 'b c']\n"), (1, "1 2 1 2 x ['a', 'b c']\n")]
    assert "1 refuses" in found[1][2]


def _refused_at_the_step(rank: int, world: int) -> list[str]:
    model, said = Layers(), []
    whole = Dualized(
        [("w", nn.Parameter(torch.ones(5, 4)))], 0.1, norm=ModularNorm({"w": L1ToRMS()}, {"w": 1.0}), grads="local"
    )
    weight = whole.param_groups[0]["params"][0]
    weight.grad = torch.ones(5, 4)
    whole.param_groups[0]["scale"] = "dual"
    with pytest.raises(PlacementError) as caught:
        whole.step()
    said.append(str(caught.value))
    scaled = model.dualized(grads="local")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model.loss(range(5), rank)).backward()
    with pytest.raises(PlacementError) as caught:
        scaler.step(scaled)
    said.append(str(caught.value))
    return said


def test_what_replicas_cannot_do_is_refused_at_the_step_on_all_ranks():
    for split, scaled in ranks(2, _refused_at_the_step):
        assert (
            "w\n  got: a direction, scale or constraint that needs whole weights, set after its rows were given to ranks"
            in split
        )
        assert 'GradScaler with grads="local"\n  got: ' in scaled


def _state_before_the_first_step(rank: int, world: int) -> dict[str, tuple[int, ...]]:
    model = Layers()
    optimizer = model.dualized(grads="local")
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    model.loss(range(5), rank).backward()
    optimizer.step()
    state = optimizer.state_dict()
    names = state["param_groups"][0]["param_names"]
    return {names[i]: tuple(s["momentum"].shape) for i, s in state["state"].items()}


def test_the_state_that_a_checkpoint_library_makes_by_a_step_of_lr_0_is_whole():
    shapes = {n: tuple(p.shape) for n, p in Layers().named_parameters()}
    assert ranks(2, _state_before_the_first_step) == [shapes] * 2


def _order_of_work(rank: int, world: int) -> list[str]:
    the_ranks.BUCKET_BYTES = 1  # every weight leaves alone
    layers = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3)))
    named = dict(layers.named_parameters())
    optimizer = Dualized(
        list(named.items()),
        0.1,
        norm=ModularNorm(dict.fromkeys(named, RMSToRMS()), dict.fromkeys(named, 1.0)),
        grads="local",
    )
    done: list[str] = []
    for name, p in named.items():
        p.register_post_accumulate_grad_hook(lambda _, name=name: done.append(f"gradient {name}"))
    exchange, dualize = the_ranks.Ranks.exchange, RMSToRMS.dualize_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(the_ranks.Ranks, "exchange", lambda *args: (done.append("leaves"), exchange(*args))[1])
        patch.setattr(RMSToRMS, "dualize_", lambda *args: (done.append("dualizes"), dualize(*args))[1])
        with optimizer.last_backward():
            layers(torch.ones(1, 6)).sum().backward()
            done.append("end of backward")
        optimizer.step()
    return done


def test_gradients_leave_while_the_backward_pass_goes_on():
    for order in ranks(2, _order_of_work):
        backward = order[: order.index("end of backward")]
        assert backward.count("leaves") == 3
        assert backward.index("leaves") < backward.index("gradient 0.weight"), (
            "the last layer's has left before the first layer's is there"
        )


def _order_of_stacks(rank: int, world: int, mode: str) -> list[str]:
    shapes = {"row": (6, 4), "a": (4, 6), "b": (6, 6), "c": (8, 6)}
    norms: dict[str, Norm] = {n: L1ToRMS() if n == "row" else RMSToRMS() for n in shapes}
    generator, named = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        copies = [torch.randn(shape, generator=generator) for _ in range(2)]
        for i, x in enumerate(copies):
            x = distribute_tensor(x, init_device_mesh("cpu", (world,)), [Shard(0)]) if mode == "fsdp" else x
            named[f"{name}{i}"] = nn.Parameter(x)
    optimizer = Dualized(
        list(named.items()),
        0.1,
        norm=ModularNorm({n: norms[n[:-1]] for n in named}, dict.fromkeys(named, 1.0)),
        grads="local",
    )
    for p in named.values():
        p.grad = torch.ones_like(p)
    done: list[str] = []
    exchange, dualize, wait = the_ranks.Ranks.exchange, RMSToRMS.dualize_, the_ranks.Pending.wait
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(the_ranks.Ranks, "exchange", lambda *args: (done.append("sends"), exchange(*args))[1])
        patch.setattr(the_ranks.Pending, "wait", lambda *args: (done.append("waits"), wait(*args))[1])
        patch.setattr(RMSToRMS, "dualize_", lambda *args: (done.append("dualizes"), dualize(*args))[1])
        optimizer.step()
    return done


@pytest.mark.parametrize("mode", ["replicas", "fsdp"])
def test_a_stack_is_on_its_way_while_the_next_one_is_dualized(mode: str):
    for order in ranks(2, _order_of_stacks, mode):
        after = "".join(x[0] for x in order[order.index("dualizes") - 1 :])
        # Between a stack's sending and the waiting for it another one is dualized.
        assert "sds" in after or "swds" in after, order
        assert after.count("d") == 3


# ---- blocks without a gradient, which may reach over ranks

STILL: dict[str, tuple[Norm, tuple[int, ...], tuple]] = {
    "whole": (RMSToRMS(), (6, 4), (...,)),
    "head": (Blocks(RMSToRMS(), 3), (6, 4), (slice(2, 4),)),  # its rows are of both ranks
    "heads": (Blocks(VectorRMS(), (1, 4, 1)), (6,), (slice(1, 5),)),
    "slice": (ConvRMSToRMS(RMSToRMS(), 2), (5, 6, 3, 3), (slice(None), slice(None), 1, 2)),
    "columns": (Transposed(Blocks(RMSToRMS(), 2)), (6, 4), (slice(None), slice(2, 4))),
    "column of a live block": (Transposed(Blocks(RMSToRMS(), 2)), (6, 4), (slice(None), 1)),
    "entry of one row": (Flattened(VectorRMS(), 3), (1, 1, 5), (0, 0, 2)),
    "row": (L1ToRMS(), (5, 4), (1,)),
    "gain": (MaxEntry(), (5,), (2,)),
}


def _stands_still(rank: int, world: int, mode: str) -> dict[str, torch.Tensor]:
    generator, named = torch.Generator().manual_seed(0), {}
    stream = {
        n: [torch.randn(s, generator=generator, dtype=torch.float64) for _ in range(4)]
        for n, (_, s, _) in STILL.items()
    }
    mesh = init_device_mesh("cpu", (world,)) if mode == "fsdp" else None

    def placed(x: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(x, mesh, [Shard(0)]) if mesh else x.clone()

    for name, (first, *_) in stream.items():
        named[name] = nn.Parameter(placed(first))
    norm = ModularNorm({n: norm for n, (norm, *_) in STILL.items()}, dict.fromkeys(STILL, 1.0))
    local = {"one": "reduced", "fsdp": "reduced", "replicas": "local"}[mode]
    optimizer = Dualized(list(named.items()), 0.1, norm=norm, grads=local, weight_decay=0.1)  # type: ignore[arg-type]
    for step in range(1, 4):
        for name, p in named.items():
            g = stream[name][step].clone()
            if step > 1:
                g[STILL[name][2]] = 0
            p.grad = placed(g)
        optimizer.step()
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in named.items()}


@pytest.mark.parametrize("mode", ["replicas", "fsdp"])
def test_a_block_stands_still_on_ranks_as_on_one_process(mode: str):
    expected = _stands_still(0, 1, "one")
    for found in ranks(2, _stands_still, mode):
        for name, w in expected.items():
            assert torch.allclose(found[name], w, rtol=0, atol=1e-12), name
