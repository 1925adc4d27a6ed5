"""training/geometry.py.

Oracles: torch.linalg.svdvals and norm(), dual_norm() in float64, weight by weight; attention's scores with complex
rotations.
A step of a known size is one whose gradient is a full-rank Gaussian and whose polar factor is exact, in the norm
itself: its direction has no coordinates of its own.
"""

import json
from functools import partial
from typing import Any

import pytest
import torch
from model import GPT
from models.track3 import Track3Config, Track3GPT
from optim import Dualized, ModularNorm, Normalized, metrize
from optim.norms import Frobenius, L1ToLinf, L1ToRMS, MaxEntry, Norm, RMSToLinf, RMSToRMS, Spectral, VectorRMS
from optim.polar import SCHEDULES, Polar
from optim.roles import RoleNorms
from optim.views import Blocks, ConvRMSToRMS, Experts, Flattened, Transposed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from training.baseline import Baseline
from training.geometry import STACK, Geometry, attention_logits, dual_norm

from tests.helpers import ranks

DIGITS = 1e-5  # numbers have six of them
CLOSE = 1e-3  # what a size is promised within
EXACT = Polar("exact")
Plain = partial(Dualized, direction="nesterov")
CONFIG = Track3Config(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=11, zero_init=False)
PER_TENSOR = {"relative_step", "weight_norm", "grad_dual_norm"}
TOTALS = {"modular_weight_norm", "modular_grad_dual_norm"}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Weights(nn.Module):
    w0: nn.Parameter
    w1: nn.Parameter


def weights(norm: Norm, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Weights, ModularNorm]:
    """A module of weights w0, w1, … of one norm, with Gaussian gradients; their radii are 0.5, 1, 1.5, …"""
    model = Weights()
    for i, shape in enumerate(shapes):
        p = nn.Parameter(gaussian(*shape, seed=i).to(dtype))
        p.grad = gaussian(*shape, seed=10 + i).to(dtype)
        model.register_parameter(f"w{i}", p)
    names = [f"w{i}" for i in range(len(shapes))]
    return model, ModularNorm(dict.fromkeys(names, norm), {n: 0.5 * (i + 1) for i, n in enumerate(names)})


def measured(
    model: nn.Module, optimizer: torch.optim.Optimizer | Baseline, norm: ModularNorm, idx: Tensor | None = None
) -> dict[str, Any]:
    """One step, measured; what is measured can be written and read."""
    geometry = Geometry(model, optimizer, norm)
    geometry.before()
    optimizer.step()
    found = geometry.after(idx)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def gpt(dtype: torch.dtype = torch.float64, *, per_head: bool = False, polar: Polar = EXACT, **changes: Any) -> GPT:
    config = Track3Config(**(vars(CONFIG) | changes))
    norms = RoleNorms(per_head=per_head).build(polar, config.n_head)
    return Track3GPT(config, norms, torch.Generator().manual_seed(0)).to(dtype)


def backward(model: nn.Module, seed: int = 0) -> Tensor:
    idx = torch.randint(11, (8, 13), generator=torch.Generator().manual_seed(seed))
    model(idx[:, :-1], idx[:, 1:].contiguous())[1].backward()
    return idx[:, :-1]


def matrices(name: str, W: Tensor, per_head: bool) -> Tensor:
    return W.unflatten(0, (CONFIG.n_head, -1)) if per_head and name.split(".")[-2] in "qkv" else W.unsqueeze(0)


def norm_of(name: str, W: Tensor, per_head: bool) -> float:
    """docs/theory.md §1, by role."""
    if name == "embedding.weight":
        return W.square().mean(1).sqrt().max().item()
    if name == "head.weight":
        return (W.square().sum(1) * W.shape[1]).sqrt().max().item()
    return max(
        (M.shape[1] / M.shape[0]) ** 0.5 * torch.linalg.svdvals(M).max().item() for M in matrices(name, W, per_head)
    )


def dual_of(name: str, G: Tensor, per_head: bool) -> float:
    if name == "embedding.weight":
        return (G.square().sum(1) * G.shape[1]).sqrt().sum().item()
    if name == "head.weight":
        return (G.square().sum(1) / G.shape[1]).sqrt().sum().item()
    return sum(
        (M.shape[0] / M.shape[1]) ** 0.5 * torch.linalg.svdvals(M).sum().item() for M in matrices(name, G, per_head)
    )


def test_what_a_cautious_step_asked_for_is_not_told():
    """Which entries decayed is not known afterwards; without decay there is nothing to know."""
    for decay, told in ((0.2, False), (0.0, True)):
        model, norm = weights(RMSToRMS(EXACT), (6, 6), (4, 8))
        found = measured(model, Dualized(model, 0.1, norm=norm, weight_decay=decay, cautious=True), norm)
        assert ("step" in found) is told


# ---- sizes


@pytest.mark.parametrize("products", [False, True])  # as on an accelerator
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("kind", ["Dualized", "Normalized", "AdamW", "a baseline"])
def test_every_number_of_a_transformer_is_the_oracles(
    kind: str, per_head: bool, products: bool, monkeypatch: pytest.MonkeyPatch
):
    if products:
        monkeypatch.setattr("training.geometry.by_eigenvalues", lambda norm, W: False)
    model = gpt(per_head=per_head)
    norm = metrize(model)
    adam = torch.optim.AdamW(model.named_parameters(), lr=0.01, weight_decay=0.1 if kind == "AdamW" else 0.0)
    optimizer = {
        "Dualized": lambda: Plain(model, 0.3, norm=norm, weight_decay=0.2),
        "Normalized": lambda: Normalized(adam, norm, 0.3, weight_decay=0.2),
        "AdamW": lambda: adam,
        "a baseline": lambda: Baseline(
            Normalized(adam, norm, 0.3, weight_decay=0.2), model, max_grad_norm=None, scaling="modular"
        ),
    }[kind]()
    idx = backward(model)
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found = measured(model, optimizer, norm, idx)
    tables = PER_TENSOR | TOTALS | {"max_attention_logit"} | ({"step"} if kind != "AdamW" else set())
    assert set(found) == tables | ({"orthogonality"} if kind == "Dualized" else set())
    for name, p in model.named_parameters():
        size = norm_of(name, p.detach(), per_head)
        assert found["weight_norm"][name] == pytest.approx(size, rel=CLOSE), name
        assert found["relative_step"][name] == pytest.approx(
            norm_of(name, p.detach() - old[name], per_head) / size, rel=2 * CLOSE
        ), name
        assert found["grad_dual_norm"][name] == pytest.approx(dual_of(name, grads[name], per_head), rel=CLOSE), name
        if kind != "AdamW":
            assert found["step"][name] == pytest.approx(1, rel=CLOSE), name
    assert list(found["weight_norm"]) == [n for n, _ in model.named_parameters()], "in the order of the network"
    assert found["modular_weight_norm"] == pytest.approx(
        max(x / norm.radii[n] for n, x in found["weight_norm"].items()), rel=DIGITS
    )
    assert found["modular_grad_dual_norm"] == pytest.approx(norm.dual_norm(grads).item(), rel=CLOSE)


NORMS = {
    "RMSToRMS": (RMSToRMS(EXACT), (6, 4)),
    "muon": (Spectral(EXACT, "sqrt(max(1, O/I))"), (4, 6)),
    "equal blocks": (Blocks(RMSToRMS(EXACT), 2), (6, 5)),
    "uneven blocks": (Blocks(RMSToRMS(EXACT), (2, 2, 7)), (11, 5)),
    "blocks in turn": (Blocks(RMSToRMS(EXACT), (2, 1), turns=2), (6, 5)),
    "transposed": (Transposed(RMSToRMS(EXACT)), (6, 4)),
    "transposed blocks": (Transposed(Blocks(RMSToRMS(EXACT), 3)), (5, 9)),
    "flattened": (Flattened(RMSToRMS(EXACT), 4), (6, 2, 2, 2)),
    "experts": (Experts(RMSToRMS(EXACT)), (3, 5, 4)),
    "convolution": (ConvRMSToRMS(RMSToRMS(EXACT)), (6, 4, 3, 3)),
    "groups": (ConvRMSToRMS(RMSToRMS(EXACT), groups=2), (6, 2, 3, 3)),
}
OTHERS = {
    "rows": (L1ToRMS(), (6, 4)),
    "head": (RMSToLinf(), (6, 4)),
    "sign": (L1ToLinf(), (6, 4)),
    "frobenius": (Frobenius(), (6, 4)),
    "bias": (VectorRMS(), (6,)),
    "scalar": (MaxEntry(0), ()),
}


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("case", [*NORMS, *OTHERS])
def test_in_every_norm_a_step_is_as_long_as_requested(case: str, products: bool, monkeypatch: pytest.MonkeyPatch):
    if products:
        monkeypatch.setattr("training.geometry.by_eigenvalues", lambda norm, W: False)
    norm, shape = (NORMS | OTHERS)[case]
    model, modular = weights(norm, shape, shape)
    sizes = {n: norm.norm(p.detach().unsqueeze(0))[0].item() for n, p in model.named_parameters()}
    duals = {n: norm.dual_norm(p.grad.unsqueeze(0))[0].item() for n, p in model.named_parameters()}  # type: ignore[union-attr]
    found = measured(model, Plain(model.named_parameters(), 1e-3, norm=modular, weight_decay=0.3), modular)
    assert found["step"] == pytest.approx(dict.fromkeys(sizes, 1), rel=CLOSE)
    assert found["weight_norm"] == pytest.approx(sizes, rel=2e-3), "steps of 1e-3 and decay of a third of that"
    assert found["grad_dual_norm"] == pytest.approx(duals, rel=CLOSE if products else DIGITS)
    assert ("orthogonality" in found) == (case in NORMS)
    if case in NORMS:
        assert max(found["orthogonality"].values()) < 1e-6


@pytest.mark.parametrize("shape", [(64, 64), (48, 192), (192, 48)])
@pytest.mark.parametrize("schedule", ["polar_express", "jordan", "quintic"])
def test_on_an_accelerator_the_dual_norm_is_1_in_100_too_small_at_worst(
    schedule: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    """Singular values spread evenly in logarithm over six decades, in float32; on a CPU none is missed."""
    m = min(shape)
    U, V = (torch.linalg.qr(gaussian(n, m, seed=n))[0] for n in shape)
    S = torch.logspace(0, -6, m, dtype=torch.float64)
    G, norm = ((U * S) @ V.mT).float()[None], RMSToRMS(Polar(schedule))
    expected = (shape[0] / shape[1]) ** 0.5 * S.sum().item()
    assert dual_norm(norm, G).item() == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr("training.geometry.by_eigenvalues", lambda norm, W: False)
    assert 0.99 < dual_norm(norm, G).item() / expected < 1 + 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_gradients_have_dual_norms(scale: float):
    model, norm = weights(RMSToRMS(), (6, 4), dtype=torch.float32)
    assert model.w0.grad is not None
    expected = scale * torch.linalg.svdvals(model.w0.grad.double()).sum().item() * 1.5**0.5
    model.w0.grad.mul_(scale)
    assert measured(model, Dualized(model.named_parameters(), 0.1, norm=norm), norm)["grad_dual_norm"][
        "w0"
    ] == pytest.approx(expected, rel=1e-5)


def test_large_stacks_are_measured_in_parts(monkeypatch: pytest.MonkeyPatch):
    found = []
    for entries in (STACK, 48, 1):
        monkeypatch.setattr("training.geometry.STACK", entries)
        model, norm = weights(RMSToRMS(EXACT), *[(6, 4)] * 5)
        assert len(Geometry(model, torch.optim.SGD(model.parameters()), norm).stacks) == {48: 3, 1: 5}.get(entries, 1)
        found.append(measured(model, Plain(model.named_parameters(), 0.1, norm=norm), norm))
    for parts in found[1:]:
        for quantity, table in found[0].items():
            assert parts[quantity] == pytest.approx(table, abs=1e-6), quantity


# ---- what a step is made of


def test_the_residual_of_a_schedule_is_inside_its_band():
    """σ² − 1 of singular values in [a, b] is at most 1 − a² or b² − 1 in size; so is the RMS of it."""
    for name in ("jordan", "polar_express", "you"):
        low, high = SCHEDULES[name].band
        model, norm = weights(RMSToRMS(Polar(name)), (32, 24), (32, 24), (24, 96))
        found = measured(model, Plain(model.named_parameters(), 0.1, norm=norm), norm)
        for residual, step in zip(found["orthogonality"].values(), found["step"].values(), strict=True):
            assert 1e-3 < residual <= max(1 - low**2, high**2 - 1), name
            assert low - CLOSE <= step <= high + CLOSE, name


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_directions_that_a_polar_factor_lacks_count_one_each(rank: int):
    model, norm = weights(RMSToRMS(EXACT), (8, 5))
    model.w0.grad = gaussian(8, rank) @ gaussian(rank, 5, seed=1)
    found = measured(model, Plain(model.named_parameters(), 0.1, norm=norm), norm)
    assert found["orthogonality"]["w0"] == pytest.approx((1 - rank / 5) ** 0.5, abs=1e-6)
    assert found["step"]["w0"] == pytest.approx(1, rel=CLOSE)


def test_steps_leave_decay_out_and_what_did_not_move_is_zero():
    rows, whole, still = (nn.Parameter(gaussian(4, 3, seed=i).float()) for i in range(3))
    model = nn.Module()
    model.rows, model.whole, model.still = rows, whole, still
    norm = ModularNorm(
        {"rows": L1ToRMS(), "whole": Frobenius(), "still": Frobenius()}, {"rows": 0.5, "whole": 2.0, "still": 1.0}
    )
    rows.grad = torch.zeros(4, 3)
    rows.grad[1] = 1.0
    whole.grad = torch.ones(4, 3)
    found = measured(model, Dualized(model.named_parameters(), 0.1, norm=norm, weight_decay=0.7), norm)
    assert found["step"] == pytest.approx({"rows": 1.0, "whole": 1.0, "still": 0.0}, abs=1e-5)
    assert found["relative_step"]["still"] == 0
    assert found["grad_dual_norm"]["still"] == 0


def test_a_gradient_of_zeros_takes_no_step_and_does_not_decay():
    model, norm = weights(RMSToRMS(), (6, 4), (6, 4), dtype=torch.float32)
    assert model.w0.grad is not None
    model.w0.grad.zero_()
    found = measured(model, Plain(model.named_parameters(), 0.1, norm=norm, weight_decay=0.7), norm)
    assert found["step"]["w0"] == 0
    assert found["orthogonality"]["w0"] is None
    assert found["relative_step"]["w0"] == 0
    assert 0.8 < found["step"]["w1"] < 1.2


def test_at_lr_zero_nothing_moves_and_gradients_are_measured():
    model, norm = weights(RMSToRMS(), (6, 4), (6, 4))
    with torch.no_grad():
        model.w1.zero_()
    found = measured(model, Plain(model.named_parameters(), 0.0, norm=norm), norm)
    assert found["step"] == {"w0": 0, "w1": 0}
    assert found["orthogonality"] == {"w0": None, "w1": None}
    assert found["relative_step"] == {"w0": 0, "w1": None}, "0/0"
    assert min(found["grad_dual_norm"].values()) > 0


def test_a_weight_of_radius_zero_is_no_part_of_the_modular_norm():
    model, norm = weights(RMSToRMS(), (6, 4), (6, 4))
    norm.radii["w1"] = 0.0
    found = measured(model, Dualized(model.named_parameters(), 0.1, norm=norm), norm)
    assert found["step"]["w1"] == 0
    assert found["modular_weight_norm"] == pytest.approx(found["weight_norm"]["w0"] / 0.5, rel=DIGITS)


def test_an_adaptive_step_size_is_part_of_the_request():
    model, norm = weights(RMSToRMS(EXACT), (6, 4), (6, 4))
    optimizer = Plain(model.named_parameters(), "auto", norm=norm)
    for _ in range(5):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    found = measured(model, optimizer, norm)
    assert found["step"] == pytest.approx({"w0": 1, "w1": 1}, rel=CLOSE)
    assert optimizer.step_size is not None and optimizer.step_size > 0.1, "it grew"


def test_steps_of_the_dual_norms_length_are_measured_as_such():
    model, norm = weights(RMSToRMS(EXACT), (6, 4))
    found = measured(model, Plain(model.named_parameters(), 0.01, norm=norm, scale="dual", beta=0.0), norm)
    assert found["step"]["w0"] == pytest.approx(found["grad_dual_norm"]["w0"], rel=CLOSE)
    assert "orthogonality" not in found


@pytest.mark.parametrize("direction", ["factored", "whitened"])
def test_of_a_step_in_coordinates_of_the_directions_own_no_polar_factor_is_measured(direction: str):
    model, norm = weights(RMSToRMS(EXACT), (6, 4), (6, 4))
    rows, rows_norm = weights(L1ToRMS(), (6, 4))
    found = measured(model, Dualized(model.named_parameters(), 0.01, norm=norm, direction=direction), norm)
    assert "orthogonality" not in found
    assert all(0.2 < step < 5 for step in found["step"].values()), "not the requested size, but about that"
    optimizer = Dualized(rows.named_parameters(), 0.01, norm=rows_norm, direction=direction)
    assert measured(rows, optimizer, rows_norm)["step"]["w0"] == pytest.approx(1, rel=CLOSE)


def test_on_the_sphere_weights_have_norm_one():
    model, norm = weights(RMSToRMS(EXACT), (6, 4), (6, 4))
    found = measured(model, Dualized(model.named_parameters(), 0.1, norm=norm, constraint="sphere"), norm)
    assert found["weight_norm"] == pytest.approx({"w0": 1, "w1": 1}, rel=2 * CLOSE)


def test_bf16_weights_are_measured_with_their_rounding():
    model, norm = weights(RMSToRMS(EXACT), (32, 24), (32, 24), dtype=torch.bfloat16)
    found = measured(model, Plain(model.named_parameters(), 5.0, norm=norm), norm)
    for name, p in model.named_parameters():
        assert found["weight_norm"][name] == pytest.approx(norm_of("x.weight", p.detach().double(), False), rel=CLOSE)
        assert found["step"][name] == pytest.approx(1, rel=0.02), "8 bits"
        assert found["orthogonality"][name] < 0.05


def test_what_is_not_finite_is_none_and_the_rest_is_measured():
    model, norm = weights(RMSToRMS(), (6, 4), (6, 4))
    assert model.w0.grad is not None
    model.w0.grad[1, 2] = torch.nan
    found = measured(model, torch.optim.SGD(model.parameters(), 0.1), norm)
    assert found["grad_dual_norm"]["w0"] is None
    assert found["weight_norm"]["w0"] is None
    assert found["modular_weight_norm"] is None
    assert found["modular_grad_dual_norm"] is None
    assert min(found[q]["w1"] for q in PER_TENSOR) > 0
    model, norm = weights(RMSToRMS(), (6, 4), (6, 4))
    model.w0.grad = torch.full((6, 4), torch.inf, dtype=torch.float64)
    found = measured(model, Dualized(model.named_parameters(), 0.1, norm=norm), norm)
    assert found["step"] == {"w0": 0, "w1": 0}, "the step was not taken"
    assert found["grad_dual_norm"]["w0"] is None


# ---- attention


def scores(model: GPT, layer: int, idx: Tensor) -> Tensor:
    """(sequences, heads, query, key): c · cos of the angle between queries and keys, of a layer before which nothing
    was added to the embedding.
    """
    H, K = CONFIG.n_head, CONFIG.n_embd // CONFIG.n_head
    angles = torch.arange(idx.shape[1])[:, None] * 10_000.0 ** (-torch.arange(K // 2) / (K // 2))
    turned = []
    for name in "qk":
        y = model.embedding.weight[idx] @ model.get_parameter(f"blocks.{layer}.attention.{name}.weight").mT
        z = (
            torch.complex(*y.unflatten(-1, (H, 2, K // 2)).unbind(-2))
            * torch.polar(torch.ones_like(angles), angles)[:, None]
        )
        turned.append(z / torch.linalg.vector_norm(z, dim=-1, keepdim=True))
    return model.config.attention_scale * torch.einsum("bthk,bshk->bhts", turned[0], turned[1].conj()).real.detach()


def test_the_largest_attention_logit_is_that_of_explicit_scores():
    model = gpt(zero_init=True, attention_scale=6.0, residual="plain")
    idx = backward(model)[:3]
    found = attention_logits(model, idx)
    for layer in range(2):
        every = scores(model, layer, idx).abs()
        assert found[f"blocks.{layer}.attention"].item() == pytest.approx(every.tril().max().item(), rel=1e-5)
    assert list(found) == ["blocks.0.attention", "blocks.1.attention"]
    late = [(a := scores(model, i, idx).abs()).max() > a.tril().max() + 1e-3 for i in range(2)]
    assert any(late), "or the causal mask would not be tested"


def test_with_qk_norm_no_attention_logit_is_above_its_scale_and_equal_keys_reach_it():
    model = gpt(attention_scale=6.0)
    with torch.no_grad():
        model.get_parameter("blocks.0.attention.q.weight").mul_(100)
        model.get_parameter("blocks.1.attention.k.weight").copy_(model.get_parameter("blocks.1.attention.q.weight"))
    first, second = (x.item() for x in attention_logits(model, backward(model)).values())
    assert 0 < first < 6
    assert second == pytest.approx(6, rel=1e-4)


def test_looking_at_attention_leaves_the_model_as_it_was():
    model = gpt(dropout=0.5).train()
    idx = backward(model)
    grads, state = [p.grad.clone() for p in model.parameters() if p.grad is not None], torch.get_rng_state()
    first, again = attention_logits(model, idx), attention_logits(model, idx)
    assert first == again, "without dropout"
    assert model.training and model.blocks[0].training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))  # type: ignore[arg-type]


# ---- ranks


def _sharded(rank: int, world: int) -> tuple[list[dict[str, Any]], list[float]]:
    """Three measured steps, of all ranks on the same sequences; and the losses."""
    torch.manual_seed(0)
    model = gpt(polar=Polar())
    norm = metrize(model)
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for unit in (*model.blocks, model):
            fully_shard(unit, mesh=mesh)
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                unit.set_force_sum_reduction_for_comms(True)
    optimizer = Dualized(model, 0.5, norm=norm, weight_decay=0.1)
    geometry, found, losses = Geometry(model, optimizer, norm), [], []
    for step in range(3):
        idx = torch.randint(11, (8, 13), generator=torch.Generator().manual_seed(step))
        loss = model(idx[:, :-1], idx[:, 1:].contiguous())[1]
        loss.backward()
        losses.append(loss.item())
        geometry.before()
        optimizer.step()
        optimizer.zero_grad()
        found.append(geometry.after(idx[:2, :-1]))
    return found, losses


def test_sharded_weights_have_the_geometry_of_whole_ones_and_train_on_alike():
    alone, losses = _sharded(0, 1)
    for found, of_rank in ranks(2, _sharded):
        assert of_rank == pytest.approx(losses, rel=1e-9)
        for mine, expected in zip(found, alone, strict=True):
            assert list(mine) == list(expected)
            for quantity, table in expected.items():
                assert mine[quantity] == pytest.approx(table, rel=1e-5), quantity
