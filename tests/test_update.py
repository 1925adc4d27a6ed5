"""optim/update.py: one step's arithmetic.

Oracles: the formula with dense linear algebra, and Dualized itself, which gathers and scatters around it.
"""

import copy
from typing import Any

import pytest
import torch
from optim import Dualized, ModularNorm
from optim.directions import DIRECTIONS
from optim.moments import Rows, average_, rms_
from optim.norms import Frobenius, L1ToRMS, MaxEntry, Norm, RMSToRMS, VectorRMS
from optim.polar import Polar
from optim.settings import StepSettings, defaults_of
from optim.update import step_
from optim.views import Blocks, ConvRMSToRMS
from torch import nn

EXACT = RMSToRMS(Polar("exact"))
CLOSE = 1e-12  # float64, a few steps


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group(**settings: Any) -> dict[str, Any]:
    """Settings of a step in the norm itself, and these."""
    return defaults_of(StepSettings) | {"direction": "nesterov"} | settings


def polar(G: torch.Tensor) -> torch.Tensor:
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


def one_step(
    W: torch.Tensor, G: torch.Tensor, norm: Norm, *, radius: float = 0.7, lr: float = 0.1, **settings: Any
) -> torch.Tensor:
    """The weight after step_() of a stack of one."""
    W, chosen = W.clone(), group(**settings)
    state = {k: b[None] for k, b in DIRECTIONS[chosen["direction"]].on(norm, Rows(tuple(W.shape))).buffers(W).items()}
    radii = torch.full((1, *(1,) * norm.ndim), radius, dtype=W.dtype)
    step_([W], G[None].clone(), state, chosen, norm=norm, live=norm.live(G[None]), radii=radii, lr=lr, refresh=True)
    return W


def test_a_step_is_its_formula():
    """W ← W − lr · radius · (√(O/I) · U Vᵀ + weight decay · W): numpy would write the same."""
    W, G = gaussian(6, 4), gaussian(6, 4, seed=1)
    expected = W - 0.1 * 0.7 * ((6 / 4) ** 0.5 * polar(G) + 0.3 * W)
    assert torch.allclose(one_step(W, G, EXACT, weight_decay=0.3), expected, atol=CLOSE)


def test_cautious_decay_takes_only_entries_that_the_step_makes_smaller():
    W, G = gaussian(6, 4), gaussian(6, 4, seed=1)
    T = (6 / 4) ** 0.5 * polar(G)
    expected = W - 0.1 * 0.7 * (T + 0.3 * torch.where(T * W > 0, W, 0))
    assert torch.allclose(one_step(W, G, EXACT, weight_decay=0.3, cautious=True), expected, atol=CLOSE)


@pytest.mark.parametrize(("constraint", "values"), [("ball", None), ("sphere", None), ("stiefel", (6 / 4) ** 0.5)])
def test_a_constraint_holds_after_the_step(constraint: str, values: float | None):
    W = one_step(3 * gaussian(6, 4), gaussian(6, 4, seed=1), EXACT, constraint=constraint)
    assert EXACT.norm(W).item() == pytest.approx(1, abs=2e-3)
    if values is not None:
        assert torch.linalg.svdvals(W) == pytest.approx(values, rel=2e-3)


def test_the_dual_scale_is_steepest_descent():
    W, G = gaussian(6, 4), gaussian(6, 4, seed=1)
    assert torch.allclose(one_step(W, G, Frobenius(), scale="dual", beta=0.0), W - 0.1 * 0.7 * G, atol=CLOSE)


NORMS: dict[str, tuple[Norm, tuple[int, ...]]] = {
    "matrix": (RMSToRMS(), (6, 4)),
    "rows": (L1ToRMS(), (6, 4)),
    "heads": (Blocks(RMSToRMS(), 2), (6, 4)),
    "slices": (ConvRMSToRMS(RMSToRMS(), 2), (4, 6, 3, 3)),
    "vector": (VectorRMS(), (6,)),
    "gain": (MaxEntry(), (6,)),
    "scalar": (MaxEntry(0), ()),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.3, "cautious": True},
    "ball": {"constraint": "ball", "weight_decay": 0.1},
    "dual": {"scale": "dual"},
}


@pytest.mark.parametrize("direction", sorted(DIRECTIONS))
@pytest.mark.parametrize("options", OPTIONS)
def test_dualized_on_one_process_takes_the_step_of_update_bit_for_bit(direction: str, options: str):
    chosen = group(direction=direction, refresh_every=2, lr=0.1, **OPTIONS[options])
    for name, (norm, shape) in NORMS.items():
        ours, theirs = ([nn.Parameter(gaussian(*shape, seed=i)) for i in range(2)] for _ in range(2))
        modular = ModularNorm({"0": norm, "1": norm}, {"0": 0.7, "1": 0.3})
        optimizer = Dualized([(str(i), p) for i, p in enumerate(ours)], norm=modular, **chosen)
        own = DIRECTIONS[direction].on(norm, Rows(shape))
        made = [own.buffers(p.detach()) for p in theirs]
        state = {k: torch.stack([b[k] for b in made]) for k in made[0]}
        radii = torch.tensor([0.7, 0.3], dtype=torch.float64).reshape(-1, *(1,) * norm.ndim)
        for step in range(3):
            G = gaussian(2, *shape, seed=10 + step)
            for p, g in zip(ours, G, strict=True):
                p.grad = g.clone()
            optimizer.step()
            weights = [p.detach() for p in theirs]
            more = {"norm": norm, "live": norm.live(G), "radii": radii, "lr": 0.1, "refresh": step % 2 == 0}
            step_(weights, G, state, chosen, **more)
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True)), name


# ---- blocks without a gradient


STILL: dict[str, tuple[Norm, tuple[int, ...], tuple[Any, ...]]] = {
    "matrix": (RMSToRMS(), (6, 4), (...,)),
    "vector": (VectorRMS(), (6,), (...,)),
    "row": (L1ToRMS(), (6, 4), (2,)),
    "head": (Blocks(RMSToRMS(), 2), (6, 4), (slice(3, 6),)),
    "slice": (ConvRMSToRMS(RMSToRMS(), 2), (4, 6, 3, 3), (slice(None), slice(None), 1, 2)),
    "entry of a gain": (MaxEntry(), (6,), (1,)),
}


@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.5}, {"constraint": "sphere"}], ids=["plain", "decay", "sphere"]
)
@pytest.mark.parametrize("direction", ["momentum", "nesterov", "adam", "lion"])
@pytest.mark.parametrize("name", STILL)
def test_a_block_whose_gradient_is_exactly_zero_stands_still_and_its_momentum_stays(
    name: str, direction: str, settings: dict[str, Any]
):
    norm, shape, index = STILL[name]
    p = nn.Parameter(gaussian(*shape))
    optimizer = Dualized([("w", p)], 0.1, norm=ModularNorm({"w": norm}, {"w": 1.0}), direction=direction, **settings)
    p.grad = gaussian(*shape, seed=1)
    optimizer.step()
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state[p])
    p.grad = gaussian(*shape, seed=2)
    p.grad[index] = 0
    optimizer.step()
    assert torch.equal(p[index], before[index])
    assert all(torch.equal(b[index], state[k][index]) for k, b in optimizer.state[p].items())
    moved = p.detach() != before
    moved[index] = True
    assert moved.any(), "the others do"
    assert index == (...,) or moved.all()


def test_a_weight_that_never_again_has_a_gradient_ends_where_it_is():
    """Its momentum would fall for ever, and its dual stay at full size."""
    p = nn.Parameter(gaussian(6, 4).float())
    optimizer = Dualized([("w", p)], 0.1, norm=ModularNorm({"w": EXACT}, {"w": 1.0}))
    p.grad = gaussian(6, 4, seed=1).float()
    optimizer.step()
    after = p.detach().clone()
    for _ in range(5):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(p, after)


@pytest.mark.parametrize("constraint", ["ball", "sphere"])
def test_a_large_row_that_stands_still_does_not_shrink_the_others(constraint: str):
    """Blocks join a constraint one by one: so they do in the norms of sign descent."""
    W = torch.ones(3, 4, dtype=torch.float64)
    W[0] = 8
    p = nn.Parameter(W.clone())
    optimizer = Dualized([("w", p)], 1e-3, norm=ModularNorm({"w": MaxEntry(2)}, {"w": 1.0}), constraint=constraint)  # type: ignore[arg-type]
    for step in range(5):
        p.grad = gaussian(3, 4, seed=step)
        p.grad[0] = 0
        optimizer.step()
    assert torch.equal(p[0], W[0])
    assert p[1:].abs().amax(-1).tolist() == pytest.approx([1, 1], abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_average_has_no_denormals(dtype: torch.dtype):
    """An entry whose gradient is gone, in a block that has some, falls by β a step and ends at 0."""
    tiny = torch.finfo(dtype).tiny
    G = torch.tensor([0.0, 1.0], dtype=dtype)
    live = torch.ones((), dtype=dtype)
    for average, beta in ((average_, 0.5), (rms_, 0.25)):
        M, seen = torch.tensor([64 * tiny, 1.0], dtype=dtype), []
        for _ in range(12):
            average(M, G, live, beta)
            seen.append(M[0].item())
        assert all(x == 0 or x >= tiny for x in seen)
        assert seen[0] > 0 and seen[-1] == 0
        assert M[1] == 1


# ---- torch.compile


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tensor lr": {"lr": torch.tensor(0.1)},
    "auto": {"lr": "auto"},
    "factored": {"direction": "factored"},
    "whitened": {"direction": "whitened", "refresh_every": 2},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_compiled_step_is_not_compiled_anew_for_each_parameter(settings: dict[str, Any]):
    """Each shape is a stack of its own: 8 of them, and yet a few graphs, which later steps take as they are."""
    weights = {f"w{i}": nn.Parameter(torch.randn(4 + i, 6)) for i in range(4)} | {
        f"b{i}": nn.Parameter(torch.randn(4 + i)) for i in range(6)
    }
    norm = ModularNorm({n: Frobenius() if n[0] == "w" else VectorRMS() for n in weights}, dict.fromkeys(weights, 1.0))
    optimizer = Dualized(list(weights.items()), **{"lr": 0.1, **settings}, norm=norm)
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    step, counts = torch.compile(optimizer.step, backend=backend), []
    for i in range(5):
        for p in weights.values():
            p.grad = torch.randn_like(p)
        if isinstance(settings.get("lr", 0.1), float):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + i)  # as a schedule does
        step()
        counts.append(len(graphs))
    assert counts[0] <= 2, "one for the step, one for what comes before"
    assert counts[-1] <= 4 and counts[-1] == counts[2]
