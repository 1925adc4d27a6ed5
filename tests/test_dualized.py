"""optim/dualized.py. Oracles: torch.optim.SGD, the modular norm of measured steps, and the optimizer's own contract."""

import copy
import inspect
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import build
from optim import Dualized, EscapeVelocity, ModularNorm, NonFiniteError, Normalized, metrize, register_direction, stacks
from optim.directions import DIRECTIONS, Direction
from optim.errors import CoverageError
from optim.modular import Module, atom
from optim.norms import NORMS, Frobenius, L1ToLinf, L1ToRMS, Norm, RMSToLinf, RMSToRMS, VectorRMS
from optim.polar import Polar
from optim.settings import StepSettings, defaults_of
from optim.views import Blocks, ConvRMSToRMS, Experts, Transposed
from torch import nn
from training.config import load

FLOAT32 = 1e-5  # some hundred roundings
EXACT_STEP = 1e-6  # requested against achieved modular norm with the exact polar factor


class Net(nn.Module):
    """Embedding, two equal hidden maps and a head: one stack of two, and both row-wise norms. float64."""

    def __init__(self, hidden: Norm | None = None, embed: Norm | None = None, head: Norm | None = None):
        super().__init__()
        self.hidden, self.embed_norm, self.head_norm = (
            hidden or RMSToRMS(Polar("exact")),
            embed or L1ToRMS(),
            head or RMSToLinf(),
        )
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 6)
        self.up, self.down = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 7, bias=False)
        self.double()

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        x = self.embed(idx)
        return self.head(x + self.down(torch.tanh(self.up(x))))

    def structure(self) -> Module:
        mid = atom("down.weight", self.hidden) @ atom("up.weight", self.hidden, mass=2)
        return atom("head.weight", self.head_norm) @ mid @ atom("embed.weight", self.embed_norm, mass=0.5)


def loss_of(model: nn.Module, seed: int = 0, tokens: int = 64) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randint(7, (2, tokens), generator=g)
    return nn.functional.cross_entropy(model(x), y)


def take_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0, tokens: int = 64
) -> dict[str, torch.Tensor]:
    """One step; returns W_before − W_after by name."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    loss_of(model, seed, tokens).backward()
    optimizer.step()
    return {n: before[n] - p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_frobenius_times_its_dual_norm_is_sgd(beta: float):
    ours = Net(Frobenius(), Frobenius(), Frobenius())
    theirs = copy.deepcopy(ours)
    norm = metrize(ours)
    norm = ModularNorm(norm.norms, dict.fromkeys(norm.norms, 1.0))
    lr = 0.05
    dualized = Dualized(ours.named_parameters(), lr, norm=norm, direction="momentum", beta=beta, scale="dual")
    sgd = torch.optim.SGD(theirs.parameters(), lr=lr * (1 - beta), momentum=beta, dampening=0)
    for step in range(50):
        take_step(ours, dualized, step)
        take_step(theirs, sgd, step)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        if beta == 0:
            assert torch.equal(p, q), "bit for bit"
        assert (p - q).norm() <= 1e-12 * q.norm()


@pytest.mark.parametrize("direction", ["momentum", "nesterov"])
@pytest.mark.parametrize("lr", [0.3, 1e-4])
def test_every_step_has_modular_norm_lr(direction: str, lr: float):
    model = Net()
    optimizer = Dualized(model, lr, direction=direction)
    for step in range(8):
        delta = take_step(model, optimizer, step)
        assert abs(optimizer.norm.norm(delta).item() / lr - 1) < EXACT_STEP
        for name, d in delta.items():
            assert (
                abs(optimizer.norm.norms[name].norm(d).item() / (lr * optimizer.norm.radii[name]) - 1) < EXACT_STEP
            ), name


@pytest.mark.parametrize("schedule", ["quintic", "jordan", "you", "polar_express"])
def test_schedules_step_within_their_band(schedule: str):
    model = Net(hidden=RMSToRMS(Polar(schedule)))
    optimizer = Dualized(model, 0.1, direction="momentum")  # above the floor; docs/theory.md has what is below
    low, high = Polar(schedule).band
    for step in range(5):
        delta = take_step(model, optimizer, step)
        for name in ("up.weight", "down.weight"):
            assert (
                low - 1e-9
                <= optimizer.norm.norms[name].norm(delta[name]).item() / (0.1 * optimizer.norm.radii[name])
                <= high + 1e-9
            )


def test_the_first_step_goes_against_the_gradient_by_lr_times_the_dual_norm():
    model = Net()
    loss_of(model).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}  # type: ignore[union-attr]
    optimizer = Dualized(model, 1e-3, direction="nesterov")
    delta = take_step(model, optimizer)
    descent = torch.stack([(grads[n] * delta[n]).sum() for n in grads]).sum()
    assert torch.allclose(descent, 1e-3 * optimizer.norm.dual_norm(grads), rtol=1e-9)


def test_stacked_and_lone_weights_step_alike():
    """Equal shapes share one batched call; the result is each weight's own."""
    model = Net()
    lone = copy.deepcopy(model)
    norm = metrize(model)
    take_step(model, Dualized(model, 0.1))
    loss_of(lone).backward()
    for name, p in lone.named_parameters():
        Dualized([(name, p)], 0.1, norm=norm).step()
    for p, q in zip(model.parameters(), lone.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-14)


def test_weight_decay_is_scaled_by_the_radius():
    """With a zero gradient direction left out: compare two steps that differ by decay alone."""
    plain, decayed = Net(), Net()
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    take_step(plain, Dualized(plain, 0.1))
    optimizer = Dualized(decayed, 0.1, weight_decay=0.3)
    take_step(decayed, optimizer)
    for (name, p), q in zip(plain.named_parameters(), decayed.parameters(), strict=True):
        assert torch.allclose(p - q, 0.1 * optimizer.norm.radii[name] * 0.3 * before[name], atol=1e-14), name


def test_cautious_decay_shrinks_only_what_the_step_shrinks():
    """Three optimizers from the same weights: without decay, with it, and with cautious decay, which agrees with one of
    them entry by entry.
    """
    nets = [Net() for _ in range(3)]
    before = {n: p.detach().clone() for n, p in nets[0].named_parameters()}
    for net, (decay, cautious) in zip(nets, ((0.0, False), (0.3, False), (0.3, True)), strict=True):
        take_step(net, Dualized(net, 0.1, weight_decay=decay, cautious=cautious))
    mixed = 0
    for (name, plain), decayed, careful in zip(
        nets[0].named_parameters(), nets[1].parameters(), nets[2].parameters(), strict=True
    ):
        shrinks = (before[name] - plain) * before[name] > 0  # the step is against the entry's sign
        assert torch.allclose(careful, torch.where(shrinks, decayed, plain), atol=1e-14), name
        mixed += bool(shrinks.any() and not shrinks.all())
    assert mixed >= 3, "both kinds of entries are there"


def test_weights_stay_within_one_over_weight_decay():
    model = Net()
    optimizer = Dualized(model, 0.5, weight_decay=0.25)
    for step in range(300):
        take_step(model, optimizer, step % 3)
    for name, p in model.named_parameters():
        assert optimizer.norm.norms[name].norm(p) <= 1 / 0.25 * (1 + 1e-9)


def test_rows_without_a_gradient_do_not_move_and_keep_their_momentum():
    model = Net()
    optimizer = Dualized(model, 0.1, weight_decay=0.1)
    take_step(model, optimizer)
    momentum = optimizer.state[model.embed.weight]["momentum"].clone()
    g = torch.Generator().manual_seed(5)
    x = torch.randint(3, (8,), generator=g)  # tokens 0 … 2 of 7
    before = model.embed.weight.detach().clone()
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.embed.weight[3:], before[3:])
    assert torch.equal(optimizer.state[model.embed.weight]["momentum"][3:], momentum[3:])
    moved = (model.embed.weight[:3] - before[:3]).abs().sum(-1)
    assert (moved > 0).all()


def test_a_sign_row_that_is_no_longer_seen_stays_too():
    """theory.md §7: with sign, a momentum that only decays would move its row for ever."""
    model = Net(embed=L1ToLinf())
    optimizer = Dualized(model, 0.1)
    take_step(model, optimizer)
    before = model.embed.weight.detach().clone()
    optimizer.zero_grad()
    model(torch.tensor([0])).sum().backward()
    optimizer.step()
    assert torch.equal(model.embed.weight[1:], before[1:])


def test_nesterov_looks_one_step_ahead():
    """Two steps by hand: D = (1 − β) g₂ + β m₂ under a Frobenius norm."""
    p = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    norm = ModularNorm({"p": Frobenius()}, {"p": 1.0})
    optimizer = Dualized([("p", p)], 1.0, norm=norm, direction="nesterov", beta=0.5)
    g1, g2 = torch.tensor([[4.0, 0], [0, 0]]).double(), torch.tensor([[0, 8.0], [0, 0]]).double()
    p.grad = g1
    optimizer.step()
    before = p.detach().clone()
    p.grad = g2
    optimizer.step()
    expected = torch.tensor([[0.5, 6.0], [0, 0]]).double()  # m₂ = (1, 4); 0.5 · (0, 8) + 0.5 · (1, 4)
    assert torch.allclose(before - p.detach(), expected / expected.norm())


def test_a_gate_holds_for_any_registered_direction():
    @register_direction("heavy ball of a test")
    class HeavyBall(Direction):
        def __call__(self, G, state, *, live, beta, beta2, refresh):
            state["momentum"].mul_(beta).add_(G)
            return state["momentum"].clone()

    assert isinstance(DIRECTIONS["heavy ball of a test"], HeavyBall)

    try:
        model = Net()
        optimizer = Dualized(model, 0.1, direction="heavy ball of a test")
        take_step(model, optimizer)
        momentum = optimizer.state[model.up.weight]["momentum"].clone()
        loss_of(model).backward()
        model.head.weight.grad[0, 0] = math.nan  # type: ignore[index]
        optimizer.step()
        assert torch.equal(optimizer.state[model.up.weight]["momentum"], momentum)
    finally:
        del DIRECTIONS["heavy ball of a test"]


def test_a_zero_gradient_everywhere_moves_nothing():
    model = Net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = Dualized(model, 0.1)
    (loss_of(model) * 0).backward()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_lr_zero_is_an_exact_no_op(as_tensor: bool):
    model = Net()
    optimizer = Dualized(model, 0.1, weight_decay=0.1)
    take_step(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if as_tensor else 0.0
    before = [p.detach().clone() for p in model.parameters()]
    take_step(model, optimizer, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for i, s in optimizer.state_dict()["state"].items():
        assert torch.equal(s["momentum"], state["state"][i]["momentum"])
    assert {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "lr")} == {
        k: v for k, v in state["param_groups"][0].items() if k not in ("params", "lr")
    }


def test_a_tensor_lr_steps_like_a_number():
    a, b = Net(), Net()
    opt_a, opt_b = Dualized(a, 0.1), Dualized(b, torch.tensor(0.1, dtype=torch.float64))
    for step in range(3):
        take_step(a, opt_a, step)
        take_step(b, opt_b, step)
    assert all(torch.allclose(p, q, atol=1e-14) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_gates_the_step_and_is_named_at_the_next(value: float):
    model = Net()
    optimizer = Dualized(model, 0.1, weight_decay=0.1)
    take_step(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad()
    loss_of(model).backward()
    model.up.weight.grad[1, 2] = value  # type: ignore[index]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(s["momentum"], state[i]["momentum"]) for i, s in optimizer.state_dict()["state"].items())
    with pytest.raises(
        NonFiniteError, match=r"the gradient of up.weight was not finite in call 2 of step\(\); that step was not taken"
    ):
        optimizer.step()
    take_step(model, optimizer)
    assert all(torch.isfinite(p).all() for p in model.parameters()), "training goes on after the error is caught"


def test_missing_gradients_move_nothing_of_their_parameter():
    model = Net()
    optimizer = Dualized(model, 0.1, weight_decay=0.1)
    take_step(model, optimizer)
    momentum = optimizer.state[model.up.weight]["momentum"].clone()
    before = model.up.weight.detach().clone()
    optimizer.zero_grad()
    loss_of(model).backward()
    model.up.weight.grad = None
    optimizer.step()
    assert torch.equal(model.up.weight, before) and torch.equal(optimizer.state[model.up.weight]["momentum"], momentum)


def test_gradients_are_never_written():
    model = Net()
    optimizer = Dualized(model, 0.1, weight_decay=0.1, max_grad_norm=0.01)
    loss_of(model).backward()
    grads = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))  # type: ignore[arg-type]


def test_clipping_scales_the_raw_gradients_and_never_the_step():
    model = Net()
    optimizer = Dualized(model, 0.1, max_grad_norm=1e-3, direction="nesterov")
    delta = take_step(model, optimizer)
    assert abs(optimizer.norm.norm(delta).item() / 0.1 - 1) < EXACT_STEP
    total = torch.stack([s["momentum"].norm() for s in optimizer.state.values()]).norm()
    assert total.item() == pytest.approx((1 - 0.95) * 1e-3, rel=1e-6)


def test_clipping_never_makes_a_gradient_larger():
    """Seen in the momentum: the step forgets scale."""
    w = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = Dualized(
        [("w", w)], 0.1, norm=ModularNorm({"w": Frobenius()}, {"w": 1.0}), beta=0.5, max_grad_norm=10.0
    )
    w.grad = torch.eye(2, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(optimizer.state[w]["momentum"], 0.5 * w.grad)


def test_clipping_survives_huge_gradients_and_belongs_to_its_group():
    a, b = (nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    norm = ModularNorm({"a": Frobenius(), "b": Frobenius()}, {"a": 1.0, "b": 1.0})
    optimizer = Dualized([("a", a)], 0.1, norm=norm, beta=0.0, max_grad_norm=1.0)
    optimizer.add_param_group({"params": ("b", b), "max_grad_norm": 1e-3})
    a.grad, b.grad = torch.full((2, 2), 1e30), torch.full((2, 2), 1e30)
    optimizer.step()
    assert [optimizer.state[p]["momentum"].norm().item() for p in (a, b)] == pytest.approx([1.0, 1e-3], rel=FLOAT32)
    assert a.detach().norm().item() == pytest.approx(0.1, rel=FLOAT32)


def test_momentum_is_one_buffer_per_weight_and_nothing_else():
    model = Net()
    optimizer = Dualized(model, 0.1, direction="nesterov")
    take_step(model, optimizer)
    assert all(list(s) == ["momentum"] and s["momentum"].shape == p.shape for p, s in optimizer.state.items())


def test_by_default_there_are_one_buffer_per_weight_and_a_number_a_row_and_a_column():
    model = Net()
    optimizer = Dualized(model, 0.1)
    take_step(model, optimizer)
    assert optimizer.param_groups[0]["direction"] == "factored"
    for name, p in model.named_parameters():
        means = dict(optimizer.state[p])
        assert means.pop("momentum").shape == p.shape
        # Rows of an embedding and of a head have their full size whatever their mean squares are.
        assert sum(b.numel() for b in means.values()) == sum(
            p.shape if name in ("up.weight", "down.weight") else p.shape[1:]
        )


def test_a_state_of_before_factored_was_the_default_loads_and_steps_as_it_did():
    model = Net()
    optimizer = Dualized(model, 0.1, direction="nesterov")
    take_step(model, optimizer)
    twin = copy.deepcopy(model)
    other = Dualized(twin, 0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in (1, 2):
        take_step(model, optimizer, step)
        take_step(twin, other, step)
    assert other.param_groups[0]["direction"] == "nesterov"
    assert all(list(state) == ["momentum"] for state in other.state.values())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_state_loads_by_name_whatever_the_order():
    model = Net()
    optimizer = Dualized(model, 0.1)
    take_step(model, optimizer)
    state = optimizer.state_dict()
    assert state["schema"] == 2 and state["param_groups"][0]["param_names"][0] == "embed.weight"
    twin = copy.deepcopy(model)
    named = list(twin.named_parameters())[::-1]
    other = Dualized(named, 0.1, norm=metrize(twin))
    other.load_state_dict(state)
    for name, p in twin.named_parameters():
        assert torch.equal(
            other.state[p]["momentum"], optimizer.state[dict(model.named_parameters())[name]]["momentum"]
        )
    take_step(model, optimizer, 1)
    take_step(twin, other, 1)
    assert all(torch.allclose(p, q, atol=1e-13) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_state_of_other_parameters_is_refused_before_anything_changes():
    model = Net()
    optimizer = Dualized(model, 0.1)
    take_step(model, optimizer)
    other = Dualized([("embed.weight", model.embed.weight)], 0.1, norm=metrize(model))
    with pytest.raises(ValueError, match=r"'down.weight' is unknown\n  allowed: the same names"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_deepcopy_trains_on_alone():
    model = Net()
    optimizer = Dualized(model, 0.1)
    take_step(model, optimizer)
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    take_step(model, optimizer, 1)
    take_step(model2, optimizer2, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), model2.parameters(), strict=True))
    assert (
        optimizer2.state[model2.up.weight]["momentum"].data_ptr()
        != optimizer.state[model.up.weight]["momentum"].data_ptr()
    )


def test_torch_schedulers_hooks_and_closures_work():
    model = Net()
    optimizer = Dualized(model, 0.2, direction="nesterov")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5**s)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    delta_start = model.up.weight.detach().clone()
    second = optimizer.step(closure)
    assert second < first and seen == [0.2, 0.1]
    delta = delta_start - model.up.weight.detach()
    assert optimizer.norm.norms["up.weight"].norm(delta).item() == pytest.approx(
        0.1 * optimizer.norm.radii["up.weight"], rel=1e-6
    )


def test_accumulated_gradients_are_one_gradient():
    a, b = Net(), Net()
    (2 * loss_of(a)).backward()
    loss_of(b).backward()
    loss_of(b).backward()
    Dualized(a, 0.1).step()
    Dualized(b, 0.1).step()
    assert all(torch.allclose(p, q, atol=1e-12) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_frozen_parameters_are_left_out():
    model = Net()
    model.embed.weight.requires_grad_(False)
    optimizer = Dualized(model, 0.1)
    delta = take_step(model, optimizer)
    assert not delta["embed.weight"].any() and delta["up.weight"].any()


def test_parameters_added_later_need_a_norm_and_leave_the_radii():
    model = Net()
    optimizer = Dualized(model, 0.1)
    radii = dict(optimizer.norm.radii)
    bias = nn.Parameter(torch.ones(5, dtype=torch.float64))
    with pytest.raises(CoverageError, match=r'bias has no norm(?s:.*)fix: give its group "norm" and "radius"'):
        optimizer.add_param_group({"params": [("bias", bias)]})
    assert "bias" not in optimizer.norm.norms
    with pytest.raises(ValueError, match="Dualized: direction\\n  got: 'no such'"):
        optimizer.add_param_group(
            {"params": [("bias", bias)], "norm": VectorRMS(), "radius": 0.5, "direction": "no such"}
        )
    with pytest.raises(
        CoverageError, match="bias\n  got: shape \\(5,\\), torch.float64\n  allowed: by Frobenius: 2 dimensions"
    ):
        optimizer.add_param_group({"params": [("bias", bias)], "norm": Frobenius(), "radius": 0.5})
    assert "bias" not in optimizer.norm.norms, "a failed addition leaves nothing"
    with pytest.raises(CoverageError, match="two parameters are named 'up.weight'"):
        optimizer.add_param_group({"params": [("up.weight", model.up.weight)]})
    group = {"params": [("bias", bias)], "norm": VectorRMS(), "radius": 0.5}
    optimizer.add_param_group(group)
    assert set(group) == {"params", "norm", "radius"}, "the caller's group is left alone"
    (bias * torch.arange(1.0, 6.0)).sum().backward()
    optimizer.step()
    assert {k: v for k, v in optimizer.norm.radii.items() if k != "bias"} == radii
    assert VectorRMS().norm(1 - bias.detach()).item() == pytest.approx(0.05, rel=1e-9)


def test_groups_may_differ_in_their_settings():
    model = Net(embed=L1ToLinf())
    named = dict(model.named_parameters())
    rest = [(n, p) for n, p in named.items() if n != "embed.weight"]
    optimizer = Dualized(rest, 0.1, norm=metrize(model), direction="nesterov")
    optimizer.add_param_group({"params": [("embed.weight", named["embed.weight"])], "lr": 0.01, "beta": 0.0})
    delta = take_step(model, optimizer)
    assert L1ToLinf().norm(delta["embed.weight"]).item() == pytest.approx(
        0.01 * optimizer.norm.radii["embed.weight"], rel=1e-9
    )
    assert optimizer.norm.norms["up.weight"].norm(delta["up.weight"]).item() == pytest.approx(
        0.1 * optimizer.norm.radii["up.weight"], rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_weights_train(dtype: torch.dtype):
    model = Net(hidden=RMSToRMS()).to(dtype)
    optimizer = Dualized(model, 0.2)
    first = loss_of(model).item()
    for _ in range(20):
        take_step(model, optimizer)
    assert loss_of(model).item() < first - 0.1
    assert all(p.dtype == dtype for p in model.parameters())


def test_training_lowers_the_loss_like_an_optimizer_should():
    model = Net()
    optimizer = Dualized(model, 0.2)
    losses = []
    for _ in range(60):
        take_step(model, optimizer, tokens=24)
        losses.append(loss_of(model, tokens=24).item())
    assert losses[-1] < 0.6 * losses[0]


def test_a_bare_list_of_tensors_is_refused():
    model = Net()
    with pytest.raises(CoverageError, match="got: tensors without names"):
        Dualized(model.parameters(), 0.1)  # type: ignore[arg-type]
    with pytest.raises(CoverageError, match="got: no norm"):
        Dualized(model.named_parameters(), 0.1)
    named = [("up.weight", model.up.weight), ("module.up.weight", model.down.weight)]
    with pytest.raises(CoverageError, match="two parameters are named 'up.weight'"):
        Dualized(named, 0.1, norm=metrize(model))


def test_torchs_dictionaries_of_groups_are_taken():
    model = Net()
    named = list(model.named_parameters())
    optimizer = Dualized([{"params": named[:1], "lr": 0.01}, {"params": named[1:]}], 0.1, norm=metrize(model))  # type: ignore[list-item]
    delta = take_step(model, optimizer)
    assert optimizer.norm.norms["embed.weight"].norm(delta["embed.weight"]).item() == pytest.approx(
        0.01 * optimizer.norm.radii["embed.weight"]
    )


def test_sparse_gradients_are_refused_by_name():
    embed = nn.Embedding(5, 3, sparse=True)
    optimizer = Dualized(embed.named_parameters(), 0.1, norm=ModularNorm({"weight": L1ToRMS()}, {"weight": 1.0}))
    embed(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="weight\\n  got: a sparse gradient\\n  allowed: dense"):
        optimizer.step()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", -1.0),
        ("beta", 1.0),
        ("weight_decay", -0.1),
        ("beta2", 1.0),
        ("direction", "adamw"),
        ("scale", "two"),
        ("constraint", "cube"),
        ("momentum_dtype", "int8"),
        ("refresh_every", 0),
        ("max_grad_norm", 0.0),
    ],
)
def test_impossible_settings_are_refused_by_name(key: str, value: object):
    settings = {"lr": 0.1, key: value}
    with pytest.raises(ValueError, match=rf"Dualized: {key}\n  got: {value!r}\n  allowed:"):
        Dualized(Net(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_whatever_the_direction_a_step_has_norm_lr_and_the_gate_holds(direction: str):
    model = Net()
    optimizer = Dualized(model, 0.1, direction=direction, refresh_every=2)
    for step in range(4):
        delta = take_step(model, optimizer, step)
        for name, d in delta.items():
            # In coordinates of the direction's own, which tests/test_whitening.py has.
            if direction in ("factored", "whitened") and name in ("up.weight", "down.weight"):
                continue
            norm, radius = optimizer.norm.norms[name], optimizer.norm.radii[name]
            assert abs(norm.norm(d).item() / (0.1 * radius) - 1) < EXACT_STEP
    before = [p.detach().clone() for p in model.parameters()], copy.deepcopy(optimizer.state_dict()["state"])
    loss_of(model).backward()
    model.head.weight.grad[0, 0] = math.nan  # type: ignore[index]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before[0], strict=True))
    for i, buffers in optimizer.state_dict()["state"].items():
        assert all(torch.equal(b, before[1][i][k]) for k, b in buffers.items()), "buffers stay too"


@pytest.mark.parametrize("direction", ["momentum", "nesterov", "adam", "lion"])
def test_a_row_without_a_gradient_keeps_its_weight_and_its_buffers(direction: str):
    model = Net()
    optimizer = Dualized(model, 0.1, direction=direction, weight_decay=0.1)
    for step in range(3):
        take_step(model, optimizer, step)
    weight, buffers = model.embed.weight.detach().clone(), copy.deepcopy(dict(optimizer.state[model.embed.weight]))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.tensor([2, 5])), torch.tensor([1, 3])).backward()
    optimizer.step()
    still = [0, 1, 3, 4, 6]
    assert torch.equal(model.embed.weight[still], weight[still]) and not torch.equal(
        model.embed.weight[[2, 5]], weight[[2, 5]]
    )
    for k, b in buffers.items():
        assert torch.equal(optimizer.state[model.embed.weight][k][still], b[still])


@pytest.mark.parametrize("constraint", ["ball", "sphere", "stiefel"])
def test_a_constraint_holds_at_every_step(constraint: str):
    model = Net()
    optimizer = Dualized(model, 1.0, constraint=constraint, direction="nesterov")  # type: ignore[arg-type]
    for step in range(30):
        take_step(model, optimizer, step)
        for name, p in model.named_parameters():
            size = optimizer.norm.norms[name].norm(p).item()
            assert size <= 1 + 1e-3
            if constraint != "ball":
                assert size >= 1 - 1e-3, name
        if constraint == "stiefel":
            assert (torch.linalg.svdvals(model.up.weight.detach()) - 1).abs().max() < 1e-3
    assert loss_of(model, 99) < loss_of(Net(), 99)


@pytest.mark.parametrize("constraint", ["ball", "sphere", "stiefel"])
def test_vectors_are_kept_in_the_ball_whatever_the_constraint(constraint):
    bias = nn.Parameter(torch.zeros(4))
    optimizer = Dualized(
        [("bias", bias)], 0.1, norm=ModularNorm({"bias": VectorRMS()}, {"bias": 1.0}), constraint=constraint, beta=0.0
    )
    for _ in range(20):
        bias.grad = torch.tensor([1.0, -1, 1, -1])
        optimizer.step()
        assert 0 < VectorRMS().norm(bias.detach()) <= 1 + 1e-6
    assert VectorRMS().norm(bias.detach()) > 0.99


def test_lr_zero_neither_retracts_nor_counts():
    model = Net()
    with torch.no_grad():
        model.up.weight.mul_(3)
    before = model.up.weight.detach().clone()
    optimizer = Dualized(model, "auto", constraint="ball")
    optimizer.param_groups[0]["lr"] = 0.0
    for step in range(3):
        take_step(model, optimizer, step)
    assert (
        torch.equal(model.up.weight, before) and optimizer.step_size == EscapeVelocity.initial and optimizer.calls == 0
    )


def peak_bytes(work: Callable[[], object], folder: Path) -> int:
    """Bytes allocated at the peak, above what was there before: from the profiler's record of the allocator."""
    # acc_events: torch 2.11 warns once of events of earlier cycles, of which there are none.
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        work()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = [e for e in json.loads((folder / "trace.json").read_text())["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda e: e["ts"])
    total = peak = 0
    for e in events:
        total += e["args"]["Bytes"]
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize("direction", ["momentum", "nesterov", "factored", "whitened"])
@pytest.mark.parametrize(
    ("norm", "count", "shape"),
    [
        (RMSToRMS(), 4, (128, 128)),
        (RMSToRMS(), 4, (128, 192)),
        (RMSToRMS(), 3, (128, 512)),
        (RMSToRMS(), 3, (512, 128)),
        (RMSToRMS(), 1, (256, 256)),
        (L1ToRMS(), 1, (512, 256)),
        (RMSToLinf(), 2, (512, 256)),
        (Blocks(RMSToRMS(), 3), 2, (384, 128)),
        (Transposed(RMSToRMS()), 2, (128, 512)),
        (ConvRMSToRMS(), 2, (64, 64, 3, 3)),
        (ConvRMSToRMS(groups=4), 2, (64, 16, 3, 3)),
        (ConvRMSToRMS(), 1, (128, 128, 1, 1)),
        (Experts(RMSToRMS()), 2, (4, 64, 64)),
    ],
    ids=str,
)
def test_a_step_allocates_three_temporaries_of_the_largest_stack_at_most(
    direction: str, norm: Norm, count: int, shape: tuple[int, int], tmp_path: Path
):
    named = [(f"w{i}", nn.Parameter(torch.randn(*shape))) for i in range(count)]
    optimizer = Dualized(
        named,
        0.1,
        norm=ModularNorm({n: norm for n, _ in named}, {n: 1.0 for n, _ in named}),
        direction=direction,
        weight_decay=0.1,
        refresh_every=1,
    )
    for _, p in named:
        p.grad = torch.randn_like(p)
    optimizer.step()  # makes the buffers
    stack = 4 * count * math.prod(shape)
    state = [(k, b.nbytes) for s in optimizer.state.values() for k, b in s.items()]
    lines = sum(size for k, size in state if k in ("rows", "columns"))
    factors = sum(size for k, size in state if k == "factor")
    # A tenth for what is of a smaller order: norms, masks, the matrices' small sides in the last product. Means over
    # rows and columns are small but for these small weights. A refresh of fourth roots has factors besides.
    assert peak_bytes(optimizer.step, tmp_path) <= 3.1 * stack + 7 * lines + 9 * factors


def test_factored_keeps_one_buffer_a_weight_and_its_means_in_float32():
    config = load([str(Path(__file__).parents[1] / "configs/gpt2_124m.toml")])
    with torch.device("meta"):
        model = build(config.model, config.optim.norms.build(config.optim.polar, config.model.n_head))
    for dtype, buffers in ((None, 1.01), ("bfloat16", 0.51)):
        optimizer = Dualized(model, 1.0, direction="factored", momentum_dtype=dtype)
        optimizer.make_state(lambda name: True)
        state = [(k, b) for s in optimizer.state.values() for k, b in s.items()]
        weights = sum(p.nbytes for p in model.parameters())
        assert sum(b.nbytes for _, b in state) < buffers * weights
        assert all(b.dtype == torch.float32 for k, b in state if k in ("rows", "columns"))


def test_state_is_at_most_half_of_adamws():
    def state_bytes(optimizer: torch.optim.Optimizer) -> int:
        return sum(t.nbytes for s in optimizer.state.values() for t in s.values())

    ours, theirs = Net(), Net()
    dualized, adamw = Dualized(ours, 0.1, direction="nesterov"), torch.optim.AdamW(theirs.parameters())
    take_step(ours, dualized)
    take_step(theirs, adamw)
    assert state_bytes(dualized) == sum(p.nbytes for p in ours.parameters()) <= state_bytes(adamw) / 2


def test_master_weights_keep_what_bfloat16_would_round_away():
    torch.manual_seed(0)
    precise, rounded = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False).bfloat16()
    rounded.load_state_dict(precise.state_dict())
    precise.load_state_dict(rounded.state_dict())
    tree = atom("weight", RMSToRMS(Polar("exact")))
    first = Dualized(precise, 1e-4, norm=metrize(precise, tree))
    second = Dualized(rounded, 1e-4, norm=metrize(rounded, tree), master_weights=True, momentum_dtype="float32")
    for step in range(50):
        g = torch.randn(8, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
        precise.weight.grad, rounded.weight.grad = g.float(), g
        first.step()
        second.step()
    assert torch.equal(second.state[rounded.weight]["master"], precise.weight)
    assert torch.equal(rounded.weight, precise.weight.bfloat16())
    with torch.no_grad():
        rounded.weight[0, 0] = 5.0
    rounded.weight.grad = g
    second.step()
    assert rounded.weight[0, 0] == 5.0, "the step is far below bfloat16's spacing there, and what was written counts"
    loaded = Dualized(rounded, 1e-4, norm=metrize(rounded, tree), master_weights=True, momentum_dtype="float32")
    loaded.load_state_dict(second.state_dict())
    for k in ("master", "momentum"):
        assert loaded.state[rounded.weight][k].dtype == torch.float32
        assert torch.equal(loaded.state[rounded.weight][k], second.state[rounded.weight][k])


def test_bfloat16_momentum_is_half_the_state_and_trains():
    ends = {}
    for dtype in ("bfloat16", "float32"):
        model = Net().float()
        optimizer = Dualized(model, 0.3, momentum_dtype=dtype)
        for step in range(30):
            take_step(model, optimizer, step % 4)
        assert all(s["momentum"].dtype == getattr(torch, dtype) for s in optimizer.state.values())
        ends[dtype] = loss_of(model).item()
    assert (
        abs(ends["bfloat16"] / ends["float32"] - 1) < 0.01 and ends["bfloat16"] < loss_of(Net().float()).item() - 0.03
    )


def test_the_escape_velocity_stays_below_the_distance_travelled_and_grows_from_any_start():
    ends = []
    for initial in (1e-6, 1e-2):
        model = Net()
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = Dualized(model, EscapeVelocity(initial=initial, factor=1.0), beta=0.0)
        furthest = initial
        for step in range(60):
            take_step(model, optimizer, step)
            assert optimizer.step_size is not None and optimizer.step_size <= furthest * (1 + 1e-9), "Hölder's bound"
            furthest = max(
                furthest, optimizer.norm.norm({n: p.detach() - start[n] for n, p in model.named_parameters()}).item()
            )
        ends.append(loss_of(model, 99).item())
        assert optimizer.step_size is not None and optimizer.step_size > 3 * 1e-2
    assert all(end < loss_of(Net(), 99).item() for end in ends)


def test_the_escape_velocity_survives_checkpoints_and_deepcopies():
    model = Net()
    optimizer = Dualized(model, "auto")
    for step in range(10):
        take_step(model, optimizer, step)
    again = copy.deepcopy(model)
    loaded = Dualized(again, "auto")
    loaded.load_state_dict(json_groups(optimizer.state_dict()))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for step in range(10, 15):
        for m, o in ((model, optimizer), (again, loaded), (twin, twin_optimizer)):
            take_step(m, o, step)
    assert optimizer.step_size == loaded.step_size == twin_optimizer.step_size
    for p, q, r in zip(model.parameters(), again.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
    with pytest.raises(ValueError, match='got: one saved with lr="auto"'):
        Dualized(model, 0.1).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="got: one saved with a fixed lr"):
        Dualized(model, "auto").load_state_dict(Dualized(model, 0.1).state_dict())


def json_groups(state: dict) -> dict:
    """A state whose groups went through JSON, as in a checkpoint's state.json."""
    groups = [
        {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in g.items()} for g in state["param_groups"]
    ]
    return {**state, "param_groups": json.loads(json.dumps(groups))}


def test_steepest_descents_scale_has_no_escape_velocity():
    with pytest.raises(ValueError, match='Dualized: scale\n  got: \'dual\'\n  allowed: "unit" with lr="auto"'):
        Dualized(Net(), "auto", scale="dual")
    with pytest.raises(ValueError, match="got: 'automatic'"):
        Dualized(Net(), "automatic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"EscapeVelocity: initial\n  got: 0"):
        EscapeVelocity(initial=0)


def test_soap_without_averages_tends_to_the_polar_factor_of_one_gradient():
    """Adam in the eigenbasis of G = U S Vᵀ divides S by itself: U Vᵀ, Shampoo's step without accumulation. Orthogonal
    iteration brings the basis there by the ratio of squared singular values, here 4, at every refresh.
    """
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 5, generator=g, dtype=torch.float64))[0] for n in (5, 8))
    w = nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
    norm = ModularNorm({"w": Frobenius()}, {"w": 1.0})
    optimizer = Dualized([("w", w)], 1.0, norm=norm, direction="soap", beta=0.0, beta2=0.0, refresh_every=1)
    for step in range(30):
        before = w.detach().clone()
        w.grad = U * torch.tensor([1.0, 0.5, 0.25, 0.125, 0.0625], dtype=torch.float64) @ V.mT * (step > 0)
        optimizer.step()
        assert torch.equal(w.detach(), before) == (step == 0), "without a gradient nothing moves"
    assert torch.allclose(before - w.detach(), U @ V.mT / 5**0.5, atol=1e-10)


def test_soap_keeps_the_axes_of_a_weight_until_a_refresh_with_a_gradient():
    w = nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
    optimizer = Dualized([("w", w)], 1.0, norm=ModularNorm({"w": RMSToLinf()}, {"w": 1.0}), direction="soap")
    for step in range(12):
        w.grad = torch.randn(5, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * (step > 0)
        optimizer.step()
        basis = optimizer.state[w]["right_basis"]
        assert torch.allclose(basis.mT @ basis, torch.eye(8, dtype=torch.float64), atol=1e-12)
        assert torch.equal(basis, torch.eye(8, dtype=torch.float64)) == (step < 10), (
            "renewed at steps 0 and 10, and at 0 there was nothing"
        )


def noise(step: int, shape: tuple[int, ...] = (16, 16)) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


@pytest.mark.parametrize("constraint", [None, "ball", "sphere"])
def test_retraction_and_decay_are_no_way_of_the_escape_velocity(constraint):
    """Gradients that are noise say nothing of the way; being pulled to the ball from norm 3 would look like one."""
    w = nn.Parameter(3 * RMSToRMS().init((16, 16), torch.Generator().manual_seed(0)).double())
    norm = ModularNorm({"w": RMSToRMS(Polar("exact"))}, {"w": 1.0})
    optimizer = Dualized(
        [("w", w)], EscapeVelocity(1e-6), norm=norm, constraint=constraint, weight_decay=0.0 if constraint else 1.0
    )
    for step in range(20):
        w.grad = noise(step)
        optimizer.step()
    assert optimizer.step_size is not None and optimizer.step_size < 1e-5


def test_a_constant_gradient_grows_the_step_by_the_factor_whatever_the_decay():
    for decay in (0.0, 1.0):
        w = nn.Parameter(8 * RMSToRMS().init((16, 16), torch.Generator().manual_seed(0)).double())
        norm = ModularNorm({"w": RMSToRMS(Polar("exact"))}, {"w": 1.0})
        escape = EscapeVelocity(1e-6, factor=0.5)
        optimizer = Dualized([("w", w)], escape, norm=norm, weight_decay=decay, direction="nesterov")
        for _ in range(12):
            w.grad = noise(1)
            optimizer.step()
        assert optimizer.step_size == pytest.approx(1e-6 * 1.5**9, rel=1e-6), (
            "η = ½ Σ of the steps before, from the fourth step on"
        )


def test_mass_zero_is_not_retracted_either():
    w = nn.Parameter(3 * torch.eye(4))
    optimizer = Dualized(
        [("w", w)], 0.1, norm=ModularNorm({"w": RMSToRMS()}, {"w": 0.0}), constraint="sphere", weight_decay=0.1
    )
    w.grad = torch.ones(4, 4)
    optimizer.step()
    assert torch.equal(w.detach(), 3 * torch.eye(4))


def test_masters_are_made_where_a_loaded_state_has_none():
    params = [nn.Parameter(torch.randn(4, 4).bfloat16()) for _ in range(2)]
    named = [(f"w{i}", p) for i, p in enumerate(params)]
    norm = ModularNorm({n: RMSToRMS() for n, _ in named}, {n: 1.0 for n, _ in named})
    before = Dualized(named, 0.1, norm=norm)
    params[0].grad = torch.ones_like(params[0])
    before.step()
    after = Dualized(named, 0.1, norm=norm, master_weights=True)
    after.load_state_dict(before.state_dict())
    after.param_groups[0]["master_weights"] = True
    old = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    after.step()
    assert all(not torch.equal(p, q) and "master" in after.state[p] for p, q in zip(params, old, strict=True))


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**66])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_directions_ignore_the_scale_of_gradients(direction: str, scale: float):
    ends = []
    for c in (1.0, scale):
        w = nn.Parameter(torch.zeros(6, 8))
        optimizer = Dualized(
            [("w", w)], 0.1, norm=ModularNorm({"w": Frobenius()}, {"w": 1.0}), direction=direction, refresh_every=2
        )
        for step in range(5):
            w.grad = c * noise(step, (6, 8)).float()
            optimizer.step()
        ends.append(w.detach().clone())
    assert torch.allclose(*ends, atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_channels_last_weights_step_like_contiguous_ones(direction: str):
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        w = nn.Parameter(noise(0, (4, 6, 3, 3)).to(memory_format=layout))
        optimizer = Dualized(
            [("w", w)], 0.1, norm=ModularNorm({"w": ConvRMSToRMS()}, {"w": 1.0}), direction=direction, constraint="ball"
        )
        for step in range(4):
            w.grad = noise(step, (4, 6, 3, 3)).to(memory_format=layout)
            optimizer.step()
        ends.append(w.detach().contiguous())
    assert torch.allclose(*ends, atol=1e-9)


def test_a_running_rms_that_forgets_first_gives_no_nan():
    w = nn.Parameter(torch.ones(3, 3))
    optimizer = Dualized([("w", w)], 0.1, norm=ModularNorm({"w": RMSToRMS()}, {"w": 1.0}), direction="adam", beta2=0.0)
    for size in (1.0, 1e-40):
        w.grad = torch.full((3, 3), size)
        optimizer.step()
    assert torch.isfinite(w).all()


def test_what_cannot_be_meant_is_refused_in_words():
    w = nn.Parameter(torch.ones(3, 3))
    norm = ModularNorm({"w": RMSToRMS()}, {"w": 1.0})
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"lr": None}, "Dualized: lr\n  got: None"),
        ({"lr": torch.tensor(-1.0)}, "Dualized: lr"),
        ({"lr": 0.1, "beta": "a"}, "Dualized: beta\n  got: 'a'"),
        ({"lr": 0.1, "refresh_every": 1.5}, "Dualized: refresh_every\n  got: 1.5"),
    )
    for settings, text in cases:
        with pytest.raises(ValueError, match=text):
            Dualized([("w", w)], norm=norm, **settings)
    optimizer = Dualized([("w", w)], 0.1, norm=norm)
    for bad in (
        {"norm": "RMSToRMS", "radius": 1.0},
        {"norm": RMSToRMS(), "radius": -1.0},
        {"norm": RMSToRMS(), "radius": math.nan},
    ):
        with pytest.raises(CoverageError, match="allowed: a Norm and a finite number >= 0"):
            optimizer.add_param_group({"params": [("v", nn.Parameter(torch.ones(3, 3)))], **bad})
    with pytest.raises(ValueError, match='allowed: "unit" with lr="auto"'):
        Dualized([("w", w)], "auto", norm=norm).add_param_group(
            {"params": [("v", nn.Parameter(torch.ones(3, 3)))], "norm": RMSToRMS(), "radius": 1.0, "scale": "dual"}
        )
    with pytest.raises(ValueError, match="ModularNorm\n  got: radius -1.0 of 'w'"):
        ModularNorm({"w": RMSToRMS()}, {"w": -1.0})
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    assert Dualized([("w", w), ("frozen", frozen)], 0.1, norm=norm).param_groups[0]["param_names"] == ["w"]


def test_a_state_saved_in_other_groups_is_refused():
    params = [(n, nn.Parameter(torch.ones(2, 2))) for n in "ab"]
    norm = ModularNorm({n: RMSToRMS() for n in "ab"}, dict.fromkeys("ab", 1.0))
    two = Dualized([{"params": [params[0]], "lr": 0.1}, {"params": [params[1]], "lr": 5.0}], 1.0, norm=norm)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="parameters of one group here in several there"):
        Dualized(params, 1.0, norm=norm).load_state_dict(two.state_dict())


def test_normalized_keeps_sixteen_bit_updates_decays_and_refuses_what_it_cannot_scale():
    w = nn.Parameter(torch.ones(6, 6).half())
    norm = ModularNorm({"w": Frobenius()}, {"w": 1.0})
    optimizer = Normalized(torch.optim.SGD([("w", w)], lr=1.0), norm, 1e-2)
    g = 1e-4 * noise(0, (6, 6))
    w.grad = g.half()
    optimizer.step()
    u = 1 - w.detach().double()
    assert (u * g).sum() / (u.norm() * g.norm()) > 0.99, "the step's own rounding is what is left"
    v = nn.Parameter(torch.ones(6, 6).double())
    decayed = Normalized(torch.optim.SGD([("w", v)], lr=1.0), norm, 0.1, weight_decay=0.5)
    v.grad = noise(0, (6, 6))
    decayed.step()
    assert torch.allclose(1 - v.detach(), 0.1 * (v.grad / v.grad.norm() + 0.5))
    for base, text in (
        (torch.optim.LBFGS([v]), "LBFGS"),
        (torch.optim.ASGD([("w", v)]), "ASGD"),
        (torch.optim.Adafactor([("w", v)]), "with from_zero=False"),
        (torch.optim.SGD([("w", v), ("x", nn.Parameter(torch.ones(2)))]), "'x' in the base alone"),
        (
            torch.optim.SGD([{"params": [("w", v)]}, {"params": [("x", nn.Parameter(torch.ones(2)))], "lr": 3.0}]),
            "different lr",
        ),
    ):
        with pytest.raises(CoverageError, match=text):
            Normalized(base, norm, 0.1)
        assert base.param_groups[0]["lr"] != 0.1


def test_a_state_of_the_first_schema_loads_with_this_versions_other_settings():
    model = Net()
    optimizer = Dualized(model, 0.1)
    take_step(model, optimizer)
    old: dict[str, Any] = {**copy.deepcopy(optimizer.state_dict()), "schema": 1}
    for group in old["param_groups"]:
        for key in ("beta2", "refresh_every", "constraint", "momentum_dtype", "master_weights", "calls"):
            del group[key]
    again = copy.deepcopy(model)
    loaded = Dualized(again, 0.7, constraint="ball")
    loaded.load_state_dict(old)
    assert loaded.param_groups[0]["lr"] == 0.1 and loaded.param_groups[0]["constraint"] == "ball"
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["momentum"], loaded.state[q]["momentum"])


def test_normalized_by_block_gives_every_row_its_full_size():
    w = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
    norm = ModularNorm({"w": L1ToRMS()}, {"w": 0.5})
    sizes = {}
    for by_block in (False, True):
        w.data.zero_()
        w.grad = noise(0, (5, 4))
        Normalized(torch.optim.SGD([("w", w)], lr=1.0), norm, 0.2, by_block=by_block).step()
        sizes[by_block] = w.detach().square().mean(-1).sqrt()
    assert torch.allclose(sizes[True], torch.full_like(sizes[True], 0.1)), "lr · radius"
    assert sizes[False].amax() == pytest.approx(0.1) and sizes[False].amin() < 0.09


def test_unweighted_radii_are_one_but_for_what_is_never_updated():
    norm = ModularNorm({"a": Frobenius(), "b": Frobenius()}, {"a": 0.3, "b": 0.0})
    assert norm.unweighted().radii == {"a": 1.0, "b": 0.0}


def test_a_compiled_step_is_traced_in_two_graphs():
    """What is told to the host splits it once; a generator or an exception that the compiler cannot follow would leave
    the rest to eager mode.
    """
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    names = [n for n, _ in model.named_parameters()]
    optimizer = Dualized(
        list(model.named_parameters()),
        0.1,
        norm=ModularNorm(dict.fromkeys(names, RMSToRMS()), dict.fromkeys(names, 1.0)),
    )
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    products: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object):
        products.append(
            sum(
                node.target in (torch.baddbmm, "__matmul__") or "matmul" in str(node.target)
                for node in graph.graph.nodes
            )
        )
        return graph.forward

    torch._dynamo.reset()
    torch.compile(optimizer.step, backend=backend)()
    assert len(products) <= 2
    assert sum(products) >= 3 * 5, "three products in each of five steps of the polar iteration"


@pytest.mark.parametrize("direction", ["momentum", "nesterov", "adam", "lion", "factored", "whitened"])
@pytest.mark.parametrize("norm", ["L1ToRMS", "RMSToLinf"])
def test_a_long_table_steps_by_its_live_rows_bit_for_bit(monkeypatch: pytest.MonkeyPatch, direction: str, norm: str):
    taken: list[int] = []
    step_rows = stacks.Stack._step_rows
    monkeypatch.setattr(stacks.Stack, "_step_rows", lambda s, rows: (taken.append(len(rows)), step_rows(s, rows))[1])

    def train(long: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        monkeypatch.setattr(stacks, "LONG", long)
        generator = torch.Generator().manual_seed(0)
        W = torch.nn.Parameter(torch.randn(300, 12, generator=generator))
        optimizer = Dualized(
            [("table", W)],
            0.1,
            norm=ModularNorm({"table": NORMS[norm]()}, {"table": 0.7}),
            direction=direction,
            beta=0.8,
        )
        for step in range(6):
            W.grad = torch.zeros_like(W)
            if step != 3:  # and once none at all
                W.grad[torch.randint(300, (20,), generator=generator)] = torch.randn(20, 12, generator=generator)
            optimizer.step()
        return W.detach(), optimizer.state[W]

    (W, state), calls, (V, whole) = train(1), len(taken), train(2**60)
    assert calls == len(taken) == 6 and 0 in taken and max(taken) <= 20, "by rows in the first training alone"
    # Means over columns are sums over rows: of the live ones in another order than of all.
    same = torch.equal if direction not in ("factored", "whitened") else partial(torch.allclose, rtol=1e-5, atol=1e-5)
    assert same(W, V)
    assert state.keys() == whole.keys()
    assert all(same(state[k], whole[k]) for k in whole)


# ---- settings


def test_a_role_has_settings_of_its_own_and_the_others_keep_theirs():
    """An oracle of two groups, built by hand."""
    ours, theirs = Net(), Net()
    own = {"head.weight": {"direction": "adam", "beta": 0.5}}
    a = Dualized(ours, 0.1, roles=own, weight_decay=0.1)
    norm = metrize(theirs)
    heads = [(n, p) for n, p in theirs.named_parameters() if norm.roles[n] == "head.weight"]
    others = [(n, p) for n, p in theirs.named_parameters() if norm.roles[n] != "head.weight"]
    b = Dualized([{"params": others}, {"params": heads, **own["head.weight"]}], 0.1, norm=norm, weight_decay=0.1)
    assert [g.get("role") for g in a.param_groups] == [None, "head.weight"] and heads
    for step in range(3):
        take_step(ours, a, step)
        take_step(theirs, b, step)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_roles_settings_win_over_its_groups():
    model = Net()
    groups = [{"params": list(model.named_parameters()), "direction": "lion", "beta": 0.7}]
    optimizer = Dualized(groups, 0.1, norm=metrize(model), roles={"head.weight": {"direction": "adam"}})
    assert [(g["direction"], g["beta"]) for g in optimizer.param_groups] == [("lion", 0.7), ("adam", 0.7)]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"directon": "adam"},
            "Dualized: directon\n  got: no such setting\n  allowed: lr, (?s:.*)nearest valid name: direction",
        ),
        (
            {"roles": {"heads": {"beta": 0.5}}},
            "roles\\['heads'\\]\n  got: a role that no parameter has\n  allowed: embed.weight, ",
        ),
        (
            {"roles": {"head.weight": {"lr": 0.5}}},
            "roles\\['head.weight'\\]: lr\n  got: no such setting\n  allowed: direction, beta, beta2, weight_decay",
        ),
        (
            {"roles": {"head.weight": {"beta": 2}}},
            "\\['beta'\\]\n  got: 2\n  allowed: a number x with 0 <= x < 1\n  fix: ",
        ),
    ],
)
def test_settings_that_there_are_not_are_refused(settings: dict, text: str):
    with pytest.raises(ValueError, match=text):
        Dualized(Net(), 0.1, **settings)


def test_numbers_of_numpy_are_settings():
    model = Net()
    optimizer = Dualized(
        model, np.float32(0.25), beta=np.float64(0.5), refresh_every=np.int64(3), weight_decay=np.float32(0.5)
    )
    twin = Net()
    other = Dualized(twin, 0.25, beta=0.5, refresh_every=3, weight_decay=0.5)
    take_step(model, optimizer)
    take_step(twin, other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_group_that_is_refused_leaves_nothing_behind():
    model = Net()
    optimizer = Dualized(model, 0.1)
    fresh = {"norm": VectorRMS(), "radius": 0.5}
    inner = torch.ones(5, dtype=torch.float64, requires_grad=True) * 2  # no leaf, which torch refuses
    with pytest.raises(ValueError, match="leaf"):
        optimizer.add_param_group({"params": [("bias", inner)], **fresh})
    assert "bias" not in optimizer.norm.norms
    optimizer.add_param_group({"params": [("bias", nn.Parameter(torch.ones(5)))], **fresh})
    assert optimizer.norm.radii["bias"] == 0.5


def test_its_signature_has_every_setting_with_type_and_default():
    parameters = inspect.signature(Dualized).parameters
    for name, default in defaults_of(StepSettings).items():
        assert parameters[name].default == default
    assert parameters["beta"].annotation is float, "without marks, which are for the checks"
