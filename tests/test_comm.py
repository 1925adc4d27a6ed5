"""optim/comm.py, and Dualized over ranks. Oracle: one process without a process group, on the whole batch.

w: ranks. mode: "replicas" (gradients of their own), "fsdp" (rows sharded over all ranks), "hsdp" (two copies, each sharded over half of the ranks).
Functions that take (rank, world, …) run in the processes of a group: see tests.helpers.ranks.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from config import load
from model import GPT
from optim import (
    Blocks,
    ConvRMSToRMS,
    Dualized,
    Experts,
    Flattened,
    L1ToLinf,
    L1ToRMS,
    MaxEntry,
    ModularNorm,
    NonFiniteError,
    Norm,
    Polar,
    RMSToLinf,
    RMSToRMS,
    Transposed,
    VectorRMS,
    metrize,
)
from optim import comm
from optim.comm import CommError, Job, Piece, Ranks, assign, run
from optim.polar import SCHEDULES
from tests.helpers import ROOT, ranks

SAME = 1e-9  # of float64 weights, relative to their largest entry: only the order of sums differs; 2e-14 measured after 20 steps
SAME_FLOAT32 = 1e-5  # after one step; Polar Express is steep where a singular value is near 0
TOLERANCES = {torch.float64: SAME, torch.float32: SAME_FLOAT32, torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps}
STEPS = 20
BATCH = 48  # sequences: divisible by every number of ranks times 4 parts
MODES = [("replicas", 1), ("replicas", 2), ("replicas", 3), ("replicas", 4), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)]
Weights = dict[str, Tensor]


class Net(nn.Module):
    """Uneven shapes, biases, two row-wise norms, a weight of one row, an unused layer, a gain of one entry, two equal hidden maps.

    Over 4 ranks the last shard of 5 rows is empty, and all but the first of one row.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(13, 10)
        self.narrow, self.wide = nn.Linear(10, 5), nn.Linear(5, 10, bias=False)
        self.sign, self.up, self.down = (nn.Linear(10, 10, bias=False) for _ in range(3))
        self.one, self.unused = nn.Linear(10, 1), nn.Linear(3, 2, bias=False)
        self.head = nn.Linear(10, 11, bias=False)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.wide(torch.tanh(self.narrow(h)))
        h = h + self.down(torch.relu(self.up(self.sign(h)))) * self.gain
        h = h + 0.1 * self.one(h)
        return nn.functional.cross_entropy(self.head(h).flatten(0, -2), y.flatten())

    def norm(self, polar: Polar) -> ModularNorm:
        rows: dict[str, Norm] = {"embed.weight": L1ToRMS(), "head.weight": RMSToLinf(), "sign.weight": L1ToLinf(), "gain": MaxEntry(1)}
        norms = {n: rows.get(n) or (VectorRMS() if p.ndim == 1 else RMSToRMS(polar)) for n, p in self.named_parameters()}
        return ModularNorm(norms, {n: 0.05 * (1 + i % 3) for i, n in enumerate(norms)})


# Each setting that a rank could get wrong, in few runs. Keys: modules, the parameters of a group.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "groups": {
        "embed head gain": {"direction": "nesterov", "weight_decay": 0.1, "max_grad_norm": 0.3, "constraint": "sphere"},
        "narrow wide": {"direction": "adam", "scale": "dual", "lr": 0.1, "constraint": "ball"},
        "sign up down unused": {"direction": "lion", "constraint": "stiefel", "lr": torch.tensor(0.5)},
        "one": {"lr": 0.0},
    },
    "auto": {
        "embed head gain narrow wide sign": {"weight_decay": 0.1, "max_grad_norm": 0.3, "constraint": "ball"},
        "up down one unused": {"lr": 0.5, "direction": "nesterov", "scale": "unit"},
    },
}


def dualized(model: Net, case: str, *, polar: str = "exact", **settings: Any) -> Dualized:
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if n.split(".")[0] in modules.split()], **options} for modules, options in CASES[case].items()
    ]
    assert sum(len(g["params"]) for g in groups) == len(named)
    return Dualized(groups, "auto" if case == "auto" else 1.0, norm=model.norm(Polar(polar)), **settings)


def sharded(model: nn.Module, mode: str, world: int) -> nn.Module:
    """The model as this mode has it; the module "narrow", where there is one, is a sharded unit of its own."""
    if mode != "replicas":
        shape, names = ((world,), ("shard",)) if mode == "fsdp" else ((2, world // 2), ("replicate", "shard"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for unit in (model.narrow, model) if hasattr(model, "narrow") else (model,):
            fully_shard(unit, mesh=mesh, reshard_after_forward=False)
    return model


def train(
    model: nn.Module, optimizer: Dualized, steps: Iterable[int], *, rank: int = 0, world: int = 1, parts: int = 1, overlap: bool = True
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
    return max(((a[k].double() - b[k].double()).abs().max() / b[k].double().abs().max().clamp(min=1e-30)).item() for k in b)


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
    train(model, dualized(model, case, grads="local"), range(STEPS), rank=rank, world=world, parts=parts)  # type: ignore[arg-type]
    return weights(model)


def _all_trained(rank: int, world: int, mode: str) -> dict[tuple[str, int], Weights]:
    # Sharded gradients are accumulated and reduced by FSDP, whatever the settings.
    runs = [(case, parts) for case, parts in product(CASES, (1, 4)) if mode == "replicas" or (case, parts) != ("auto", 4)]
    return {(case, parts): _trained(rank, world, mode, case, parts) for case, parts in runs}


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


EXACT = Polar("exact")
KINDS: dict[str, tuple[Norm, tuple[int, ...]]] = {  # of weights: their norms and shapes
    "matrix": (RMSToRMS(EXACT), (6, 4)),
    "twin": (RMSToRMS(EXACT), (6, 4)),
    "square": (RMSToRMS(EXACT), (5, 5)),
    "row": (RMSToRMS(EXACT), (1, 5)),
    "rows": (L1ToRMS(), (7, 5)),
    "experts": (Experts(RMSToRMS(EXACT)), (3, 4, 4)),
    "conv": (ConvRMSToRMS(RMSToRMS(EXACT)), (4, 3, 2, 2)),
    "vector": (VectorRMS(), (5,)),
    "gain": (MaxEntry(1), (5,)),
    "scalar": (MaxEntry(0), ()),
    "strided": (RMSToRMS(EXACT), (4, 6)),
}
REPLICAS_ALONE = ("scalar", "strided")  # FSDP shards no scalars and nothing that is not contiguous
KEPT: dict[str, tuple[torch.dtype, dict[str, Any]]] = {  # of the weights; settings of what is kept of them
    "masters": (torch.bfloat16, {"master_weights": True, "momentum_dtype": "float32", "direction": "nesterov", "weight_decay": 0.1}),
    "bfloat16": (torch.bfloat16, {"direction": "lion", "constraint": "sphere"}),
    "bfloat16 momentum": (torch.float32, {"momentum_dtype": "bfloat16", "direction": "adam", "constraint": "ball"}),
    "dual": (torch.float32, {"scale": "dual", "beta": 0.5, "lr": 0.01}),
    "soap": (torch.float64, {"direction": "soap", "refresh_every": 2}),
}
HAND_STEPS = 4


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
    """A rank's gradient: small whole numbers, whose average over any number of ranks is the same and exact in every dtype. (1 of 1: that average.)"""

    def numbers(of: int) -> Tensor:
        return torch.randint(-4, 5, KINDS[name][1], generator=torch.Generator().manual_seed(1000 * step + 100 * of + list(KINDS).index(name)))

    others = [numbers(r) for r in range(1, world)]
    return (others[rank - 1] if rank else world * numbers(0) - sum(others)).double()


def step_by_hand(model: nn.Module, optimizer: Dualized, steps: Iterable[int], rank: int = 0, world: int = 1) -> None:
    for step in steps:
        for name, p in model.named_parameters():
            if isinstance(p, DTensor):  # gradients of shards come reduced
                p.grad = distribute_tensor(share(name, step, 0, 1).to(p.dtype), p.device_mesh, p.placements, src_data_rank=None)
            else:
                p.grad = share(name, step, rank, world).to(p.dtype)
        optimizer.step()
    optimizer.check_finite()


def buffers(optimizer: Dualized) -> Weights:
    """The whole state, copied, by parameter and buffer. Collective."""
    saved = optimizer.state_dict()
    names = {i: n for group in saved["param_groups"] for n, i in zip(group["param_names"], group["params"], strict=True)}
    return {f"{names[i]}.{k}": full(b) for i, state in saved["state"].items() for k, b in state.items()}


def _by_hand(rank: int, world: int, mode: str) -> dict[str, Weights]:
    found = {}
    for kept, (dtype, options) in KEPT.items():
        if mode == "replicas" or kept != "soap":
            model = sharded(Bag(n for n in KINDS if mode == "replicas" or n not in REPLICAS_ALONE).to(dtype), mode, world)
            optimizer = model.dualized(grads="local", **options)  # type: ignore[operator]
            step_by_hand(model, optimizer, range(HAND_STEPS), rank, world)
            found[kept] = weights(model) | buffers(optimizer)
    return found


@pytest.mark.parametrize(("mode", "world"), MODES[1:])
def test_weights_and_state_of_every_kind_and_dtype_are_as_in_one_process(mode: str, world: int):
    """Averages are exact here, so that little is left to rounding: otherwise it alone tells apart some of SOAP's axes."""
    found = ranks(world, _by_hand, mode)
    for kept in found[0]:
        dtype, options = KEPT[kept]
        model = Bag(n for n, _ in Bag().named_parameters() if n in found[0][kept]).to(dtype)
        before = weights(model)
        optimizer = model.dualized(**options)
        step_by_hand(model, optimizer, range(HAND_STEPS))
        expected = weights(model)
        assert all(not torch.equal(before[n], w) for n, w in expected.items() if n != "scalar"), "a sign may go to and fro"
        expected |= buffers(optimizer)
        coarse = 4 * torch.finfo(torch.bfloat16).eps if "bfloat16" in kept else 0
        for rank in range(world):
            assert found[rank][kept].keys() == expected.keys()
            for n, x in expected.items():
                y = found[rank][kept][n]
                assert torch.equal(y, found[0][kept][n]) and y.dtype == x.dtype, (kept, n)
                if not n.endswith("_basis"):
                    assert difference({n: y}, {n: x}) <= max(coarse, TOLERANCES[x.dtype]), (kept, n)


def _clipped(rank: int, world: int, mode: str, dtype: torch.dtype, name: str) -> Weights:
    model = sharded(Bag([name]).to(dtype), mode, world)
    step_by_hand(model, model.dualized(max_grad_norm=1.0, grads="local"), range(3), rank, world)  # type: ignore[operator]
    return weights(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mode", "name"), [("replicas", "matrix"), ("fsdp", "row")])
def test_ranks_that_step_nothing_of_a_group_take_part_in_its_clipping(mode: str, name: str, dtype: torch.dtype):
    """One weight with one owner; one row of which the other shard is empty."""
    model = Bag([name]).to(dtype)
    step_by_hand(model, model.dualized(max_grad_norm=1.0), range(3))
    for found in ranks(2, _clipped, mode, dtype, name, deadline=20):
        assert difference(found, weights(model)) <= TOLERANCES[dtype]


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


def _overlapped(rank: int, world: int, bucket: int) -> list[Weights]:
    comm.BUCKET_BYTES = bucket
    found = []
    for overlap in (True, False):
        model = Net()
        train(model, dualized(model, "groups", grads="local"), range(3), rank=rank, world=world, parts=2, overlap=overlap)
        found.append(weights(model))
    return found


@pytest.mark.parametrize("bucket", [1, 600, comm.BUCKET_BYTES])
def test_gradients_that_leave_during_backward_give_the_same_bits(bucket: int):
    (early, late), *_ = ranks(3, _overlapped, bucket)
    assert equal(early, late)


# ---- gradients that are missing, or come in any order


class Layers(nn.Module):
    """Maps that a loss may use in any order; one is float32, one has a row-wise norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(5)).double()
        self.maps[3].float()

    def dualized(self, **settings: Any) -> Dualized:
        norms = {n: L1ToRMS() if n.startswith("maps.4") else RMSToRMS(EXACT) for n, _ in self.named_parameters()}
        return Dualized(self, 0.5, norm=ModularNorm(norms, dict.fromkeys(norms, 0.1)), weight_decay=0.1, **settings)

    def loss(self, used: Iterable[int], seed: int) -> Tensor:
        """Gradients arrive in the reverse order of use. No use at all has a loss too, without gradients."""
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for i in used:
            total = total + (self.maps[i](x.to(self.maps[i].weight.dtype)) - x.roll(i, 0)).square().mean()
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


def _missing(rank: int, world: int, overlap: bool, bucket: int) -> Weights:
    comm.BUCKET_BYTES = bucket
    model = Layers()
    optimizer = model.dualized(grads="local")
    for step in range(8):
        with optimizer.last_backward() if overlap else nullcontext():
            model.loss(used_by(rank, step), 10 * step + rank).backward()
        here = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        before = weights(model), {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
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


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("bucket", [300, comm.BUCKET_BYTES])
@pytest.mark.parametrize("world", [2, 3])
def test_a_gradient_missing_on_some_ranks_counts_as_zero_there(world: int, overlap: bool, bucket: int):
    """And where it is missing on all, nothing of that weight moves."""
    found = ranks(world, _missing, overlap, bucket, deadline=40)
    model = Layers()
    optimizer = model.dualized()
    for step in range(8):
        for rank in range(world):
            (model.loss(used_by(rank, step), 10 * step + rank) / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank in range(world):
        assert equal(found[rank], found[0])
        for n, p in weights(model).items():
            assert difference({n: found[rank][n]}, {n: p}) < TOLERANCES[p.dtype], n


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
    comm.BUCKET_BYTES = bucket
    model = Layers()
    optimizer = model.dualized(grads="local")
    with pytest.raises(RuntimeError) as caught, optimizer.last_backward():
        for _ in range(2):
            model.loss(range(5), rank).backward()
    optimizer.zero_grad()
    with optimizer.last_backward():
        model.loss(range(5), rank).backward()
    optimizer.step()
    return str(caught.value), weights(model)


@pytest.mark.parametrize("bucket", [300, comm.BUCKET_BYTES])
def test_two_backward_passes_as_the_last_one_are_refused(bucket: int):
    model = Layers()
    optimizer = model.dualized()
    for rank in range(2):
        (model.loss(range(5), rank) / 2).backward()
    optimizer.step()
    for text, found in ranks(2, _two_backward_passes, bucket):
        expected = "last_backward()\n  got: two backward passes inside\n  allowed: one, the last of a step\n  fix: accumulate the others before it"
        assert text == expected
        assert difference(found, weights(model)) < SAME_FLOAT32, "and a step goes on as if nothing had been"


def _step_not_taken(rank: int, world: int, bucket: int, skipped: list[list[int]], goes_on: str) -> Weights:
    comm.BUCKET_BYTES = bucket
    model = Layers()
    optimizer = model.dualized(grads="local")
    with optimizer.last_backward():
        model.loss(skipped[rank], 50 + rank).backward()
    optimizer.zero_grad()
    for _ in range(2):
        if goes_on == "in parts":
            (model.loss(range(5), rank) / 2).backward()
        with nullcontext() if goes_on == "without overlap" else optimizer.last_backward():
            (model.loss(range(5), rank + 2) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize("goes_on", ["with overlap", "in parts", "without overlap"])
@pytest.mark.parametrize("skipped", [[[0, 1, 2, 3, 4]] * 2, [[0, 1, 2, 3, 4], [0]], [[], [3, 4]], [[], []]], ids=str)
@pytest.mark.parametrize("bucket", [300, comm.BUCKET_BYTES])
def test_gradients_that_were_sent_for_a_step_never_taken_are_forgotten(bucket: int, skipped: list[list[int]], goes_on: str):
    model = Layers()
    optimizer = model.dualized()
    for _ in range(2):
        for rank in range(2):
            if goes_on == "in parts":
                (model.loss(range(5), rank) / 4).backward()
            (model.loss(range(5), rank + 2) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in ranks(2, _step_not_taken, bucket, skipped, goes_on, deadline=20):
        assert difference(found, weights(model)) < SAME_FLOAT32


# ---- numbers that are not finite


def _not_finite(rank: int, world: int, mode: str, what: str) -> tuple[str, bool, Weights]:
    """A good step, a bad one, one that raises, and one more: (the error's text, whether the bad one changed nothing, weights)."""
    model = sharded(Bag(n for n in KINDS if n not in REPLICAS_ALONE), mode, world)
    optimizer = model.dualized(grads="local", direction="adam", weight_decay=0.1)  # type: ignore[operator]

    def kept() -> Weights:
        state = {f"{n}.{k}": full(b) for n, p in model.named_parameters() for k, b in optimizer.state.get(p, {}).items()}
        return weights(model) | state

    step_by_hand(model, optimizer, [0], rank, world)
    before = kept()
    for name, p in model.named_parameters():
        assert p.grad is not None
        if name == what:
            mine = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            mine[-1] = math.nan if rank == 1 else mine[-1]
        if what == f"{name} overflows":
            p.grad.fill_(3e38)
    optimizer.step(loss=torch.tensor(math.inf if what == "loss" and rank == 1 else 1.0))
    same = equal(kept(), before)
    step_by_hand_raises = pytest.raises(NonFiniteError)
    with step_by_hand_raises as caught:
        step_by_hand(model, optimizer, [1], rank, world)
    same = same and equal(kept(), before)
    optimizer.step()
    optimizer.check_finite()
    return str(caught.value), same, weights(model)


TAKEN = "was not finite in call 2 of step(); that step was not taken, weights and momentum are as before"


@pytest.mark.parametrize(
    ("mode", "world", "what", "text"),
    [
        ("replicas", 2, "square", "the gradient of square on rank 1"),
        ("replicas", 3, "rows", "the gradient of rows on rank 1"),
        ("replicas", 3, "loss", "the loss on rank 1"),
        ("replicas", 2, "rows overflows", "the average over ranks of the gradient of rows on rank 0"),
        ("replicas", 3, "matrix overflows", "the average over ranks of the gradient of matrix on rank "),
        ("fsdp", 2, "square", "the gradient of square on rank 1"),
        ("fsdp", 2, "loss", "the loss on rank 1"),
        ("hsdp", 4, "square", "the gradient of square on rank 1"),
    ],
)
def test_a_number_that_is_not_finite_on_one_rank_stops_the_step_on_all(mode: str, world: int, what: str, text: str):
    """Weights and state stay bit for bit, the next step says on every rank what it was and where, and the step after it goes on."""
    found = ranks(world, _not_finite, mode, what)
    model = Bag(n for n in KINDS if n not in REPLICAS_ALONE)
    optimizer = model.dualized(direction="adam", weight_decay=0.1)
    step_by_hand(model, optimizer, [0, 1])
    for message, same, after in found:
        assert message == found[0][0], "the same on all ranks"
        assert message.startswith(text) and message.endswith(TAKEN), message
        assert same
        assert equal(after, weights(model))
