"""optim/whitening.py: the directions "factored" and "whitened", of every norm and view.

Oracle: the formula written plainly, in float64, of each block that View.split() gives: means over all gradients so far
at once, and an eigendecomposition for the fourth root.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build
from optim import Dualized, ModularNorm
from optim.directions import DIRECTIONS
from optim.norms import Frobenius, L1ToRMS, MaxEntry, MeanToLinf, Norm, RMSToLinf, RMSToRMS, VectorRMS
from optim.polar import DAMPING, Polar
from optim.views import Blocks, ConvRMSToRMS, Experts, Flattened, ScionConv, Transposed, View
from torch import Tensor, nn
from training.config import load

from tests.test_directions import perturbed, stream

EXACT = Polar("exact")
CLOSE = 1e-5  # inverse_fourth_root() is within 1e-6 of an eigendecomposition's
BOTH = ("factored", "whitened")
BETA, BETA2 = 0.9, 0.7
BLOCKS: dict[str, tuple[Norm, tuple[int, ...]]] = {
    "matrix": (RMSToRMS(EXACT), (6, 4)),
    "Frobenius": (Frobenius(), (6, 4)),
    "embedding": (L1ToRMS(), (7, 4)),
    "head": (RMSToLinf(), (7, 4)),
    "sign": (MeanToLinf(), (6, 4)),
    "heads": (Blocks(RMSToRMS(EXACT), 3), (12, 5)),
    "fused": (Blocks(RMSToRMS(EXACT), (6, 2, 2)), (10, 5)),
    "in turn": (Blocks(RMSToRMS(EXACT), 3, turns=2), (12, 5)),
    "unequal in turn": (Blocks(RMSToRMS(EXACT), (2, 1), turns=3), (9, 5)),
    "heads of heads": (Blocks(Blocks(RMSToRMS(EXACT), 2), (4, 8)), (12, 5)),
    "tied rows": (Blocks(L1ToRMS(), 2), (6, 5)),
    "transposed": (Transposed(RMSToRMS(EXACT)), (4, 6)),
    "transposed embedding": (Transposed(L1ToRMS()), (4, 7)),
    "transposed heads": (Transposed(Blocks(RMSToRMS(EXACT), 2)), (4, 6)),
    "experts": (Experts(RMSToRMS(EXACT)), (3, 4, 5)),
    "experts' gates": (Experts(Transposed(Blocks(RMSToRMS(EXACT), (1, 1), turns=3))), (3, 4, 6)),
    "convolution": (ConvRMSToRMS(RMSToRMS(EXACT)), (4, 6, 3, 2)),
    "groups": (ConvRMSToRMS(RMSToRMS(EXACT), groups=2), (4, 3, 3, 2)),
    "transposed convolution": (ConvRMSToRMS(RMSToRMS(EXACT), groups=2, transposed=True), (4, 3, 3, 2)),
    "flattened": (Flattened(RMSToRMS(EXACT)), (4, 3, 2, 2)),
    "Scion's": (ScionConv(RMSToRMS(EXACT)), (4, 3, 2, 2)),
    "as a vector": (Flattened(VectorRMS(), 3), (4, 3, 2)),
    "tall heads": (Blocks(RMSToRMS(EXACT), 3), (12, 3)),
    "tall and unequal": (Blocks(RMSToRMS(EXACT), (2, 1), turns=3), (9, 3)),
    "tall heads of heads": (Blocks(Blocks(RMSToRMS(EXACT), 2), (4, 8)), (12, 3)),
    "tall experts": (Experts(RMSToRMS(EXACT)), (3, 5, 4)),
    "tall convolution": (ConvRMSToRMS(RMSToRMS(EXACT)), (6, 4, 3, 2)),
    "tall groups": (ConvRMSToRMS(RMSToRMS(EXACT), groups=2), (8, 3, 1, 2)),
    "wide": (RMSToRMS(EXACT), (4, 6)),
    "wide and prime": (RMSToRMS(EXACT), (4, 7)),
    "wide heads": (Blocks(RMSToRMS(EXACT), 3), (12, 8)),
    "wide and unequal": (Blocks(RMSToRMS(EXACT), (2, 1), turns=3), (9, 12)),
    "wide experts": (Experts(RMSToRMS(EXACT)), (3, 4, 8)),
    "vector": (VectorRMS(), (6,)),
    "experts' vectors": (Experts(VectorRMS()), (3, 6)),
    "gain": (MaxEntry(), (6,)),
    "scalar": (MaxEntry(0), ()),
}


# Those of which "whitened" keeps R: blocks that lie along two dimensions of a weight. Into how many runs their columns
# are split: as many as it takes for them to be no longer than the block has rows.
FULL = {
    **dict.fromkeys(("matrix", "Frobenius", "embedding", "head", "tall experts", "tall convolution", "tall groups"), 1),
    **dict.fromkeys(("tall heads", "tall and unequal", "tall heads of heads"), 1),
    **dict.fromkeys(("wide", "wide heads", "wide experts", "convolution", "experts' gates"), 2),
    "wide and unequal": 3,
}


def blockwise(norm: Norm, f: Callable[..., Tensor], *Ws: Tensor) -> Tensor:
    """f of each stack of innermost blocks of several weights, put together again."""
    if not isinstance(norm, View):
        return f(norm, *Ws)
    parts = zip(*(norm.split(W) for W in Ws), strict=True)
    return norm.join([blockwise(norm.inner, f, *p) for p in parts], Ws[0].shape)


def mean(values: list[Tensor], beta: float) -> Tensor:
    """The running mean from 0 on."""
    return torch.stack([(1 - beta) * beta**age * x for age, x in enumerate(reversed(values))]).sum(0)


def fourth_root(R: Tensor) -> Tensor:
    """R^(−1/4), damped, in the units in which projections on R's range keep their size."""
    values, V = torch.linalg.eigh(R)
    damped = values + DAMPING * torch.linalg.matrix_norm(R)[..., None]
    unit = (values / damped).sum(-1) / (values * damped**-1.5).sum(-1)
    return unit.sqrt()[..., None, None] * ((V * damped[..., None, :] ** -0.25) @ V.mT)


def root_of_lines(squares: Tensor) -> Tensor:
    """1/√ρ of each line, ρ being the root of its mean square, in units of the harmonic mean of ρ."""
    rho = squares.sqrt()
    return (1 / (rho * (1 / rho).mean(-1, keepdim=True))).sqrt()


def block_diagonal(parts: list[Tensor]) -> Tensor:
    """Of stacks of matrices (*n, k, k)."""
    diagonal = [torch.block_diag(*matrices) for matrices in zip(*(p.flatten(0, -3) for p in parts), strict=True)]
    return torch.stack(diagonal).unflatten(0, parts[0].shape[:-2])


def whitener(ignores: str, runs: int, gradients: list[Tensor], *, inverse: bool = False) -> Callable[[Tensor], Tensor]:
    """What takes a gradient of an innermost block to its coordinates, and a step back from them. runs: of R; 0 for c.
    inverse: a step to them.
    """
    r = root_of_lines(mean([G.square().mean(-1) for G in gradients], BETA2))
    if runs:
        stacks = zip(*(G.chunk(runs, -1) for G in gradients), strict=True)
        products = [mean([X.mT @ X / X.shape[-2] for X in run], BETA2) for run in stacks]
        right = block_diagonal([fourth_root(R) for R in products])
    else:
        right = root_of_lines(mean([G.square().mean(-2) for G in gradients], BETA2)).diag_embed()
    if inverse:
        r, right = 1 / r, torch.linalg.inv(right)
    return lambda X: (X if ignores == "rows" else r[..., None] * X) @ right


def expected_step(norm: Norm, runs: int, gradients: list[Tensor]) -> Tensor:
    """The step of a stack (n, *shape) after these gradients."""

    def there(inner: Norm, M: Tensor, *Gs: Tensor) -> Tensor:
        if norm.ignores == "entries":
            return M
        if inner.ndim < 2:
            return M / mean([G.square() for G in Gs], BETA2).sqrt()
        white = whitener(norm.ignores, runs, list(Gs))
        return white(white(white(M))) if norm.ignores == "rows" else white(white(M))

    def back(inner: Norm, T: Tensor, *Gs: Tensor) -> Tensor:
        if inner.ndim < 2 or norm.ignores in ("rows", "entries"):
            return T
        return whitener(norm.ignores, runs, list(Gs))(T)

    ahead = (1 - BETA) * gradients[-1] + BETA * mean(gradients, BETA)
    D = blockwise(norm, there, ahead, *gradients)
    return blockwise(norm, back, norm.dualize(D), *gradients)


def dualized(norm: Norm, w: nn.Parameter, direction: str, **settings: Any) -> Dualized:
    return Dualized(
        [("w", w)],
        1.0,
        norm=ModularNorm({"w": norm}, {"w": 1.0}),
        direction=direction,
        **{"beta": BETA, "beta2": BETA2, "refresh_every": 2, **settings},
    )


def follow(
    direction: str, norm: Norm, shape: tuple[int, ...], gradients: list[Tensor], **settings: Any
) -> tuple[Tensor, Dualized]:
    """A weight of zeros after its steps, of norm 1 each."""
    w = nn.Parameter(torch.zeros(shape, dtype=gradients[0].dtype))
    optimizer = dualized(norm, w, direction, **settings)
    for G in gradients:
        w.grad = G.clone()
        optimizer.step()
    return w.detach(), optimizer


def buffers(optimizer: Dualized) -> dict[str, Tensor]:
    """Of the one weight."""
    (state,) = optimizer.state.values()
    return state


def gaussians(shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Of rows and columns of other sizes."""
    g = torch.Generator().manual_seed(seed)
    scale = math.prod(
        (0.1 + torch.rand(s, generator=g, dtype=torch.float64) * 3).reshape(-1, *(1,) * i)
        for i, s in enumerate(reversed(shape))
    )
    return [scale * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(4)]


# ---- the formula


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_step_is_that_of_the_plain_formula_of_each_block(name: str, direction: str):
    norm, shape = BLOCKS[name]
    gradients, runs = gaussians(shape), FULL.get(name, 0) if direction == "whitened" else 0
    w, optimizer = follow(direction, norm, shape, gradients, refresh_every=1)
    stacks = [G[None] for G in gradients]
    expected = sum(-expected_step(norm, runs, stacks[: t + 1]) for t in range(len(stacks)))
    assert torch.allclose(w, expected[0], atol=CLOSE)  # type: ignore[index]
    assert ("factor" in buffers(optimizer)) == (runs > 0)


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_step_has_norm_lr_in_the_directions_own_coordinates(name: str, direction: str):
    norm, shape = BLOCKS[name]
    gradients, runs = gaussians(shape), FULL.get(name, 0) if direction == "whitened" else 0
    before, after = (follow(direction, norm, shape, gradients[:n], refresh_every=1)[0] for n in (3, 4))

    def own(inner: Norm, T: Tensor, *Gs: Tensor) -> Tensor:
        usual = inner.ndim < 2 or norm.ignores in ("rows", "entries")
        return T if usual else whitener(norm.ignores, runs, list(Gs), inverse=True)(T)

    step = blockwise(norm, own, (after - before)[None], *(G[None] for G in gradients))
    assert abs(norm.norm(step).item() - 1) < CLOSE


def test_the_root_is_made_anew_on_a_refresh_and_stays_until_the_next():
    norm, shape = BLOCKS["tall heads"]
    w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer, roots, factors = dualized(norm, w, "whitened", refresh_every=3), [], []
    for G in gaussians(shape):
        w.grad = G
        optimizer.step()
        F = buffers(optimizer)["factor"].view(3, 3, 3)
        roots.append(F.triu())
        factors.append(F.tril(-1))
    assert torch.equal(roots[0], roots[1]) and torch.equal(roots[1], roots[2])
    assert not torch.allclose(roots[2], roots[3], rtol=0.01)
    assert all(not torch.equal(a, b) for a, b in pairwise(factors))


def test_a_block_whose_first_gradient_is_late_starts_as_factored_until_the_next_refresh():
    norm, shape = BLOCKS["tall experts"]
    gradients = gaussians(shape)
    gradients[0][1] = 0
    whitened, factored = (
        [follow(d, norm, shape, gradients[:n], refresh_every=3)[0] for n in (1, 2, 3, 4)] for d in reversed(BOTH)
    )
    first, second, _, last = (a - b for a, b in zip(whitened, factored, strict=True))
    assert not first[1].any() and second[1].abs().max() < 1e-12 and second[0].abs().max() > 0.01
    expected = expected_step(norm, 1, [G[None] for G in gradients])[0, 1]
    assert torch.allclose((whitened[2] - whitened[3])[1], expected, atol=CLOSE), "with R from its refresh on"
    assert last[1].abs().max() > 0.01


@pytest.mark.parametrize("direction", BOTH)
def test_columns_are_seen_in_the_rows_that_have_a_gradient(direction: str):
    """As of a table of those rows alone; where there is none, columns stay."""
    G = gaussians((5, 4))
    rows = torch.tensor([1, 2, 5, 6, 8])
    wide = [torch.zeros(9, 4, dtype=torch.float64).index_copy(0, rows, g) for g in G]
    w, optimizer = follow(direction, L1ToRMS(), (9, 4), [*wide, torch.zeros_like(wide[0])])
    expected, other = follow(direction, L1ToRMS(), (5, 4), G)
    assert torch.allclose(w[rows], expected, atol=1e-12) and not w[[0, 3, 4, 7]].any()
    state, other_state = buffers(optimizer), buffers(other)
    own = {"momentum", "columns"} | ({"factor"} if direction == "whitened" else set())
    assert state.keys() == own == other_state.keys()
    assert all(torch.allclose(state[k], other_state[k], atol=1e-12) for k in own - {"momentum"})


# ---- whatever gradients are


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_step_knows_no_scale(name: str, direction: str, scale: float):
    norm, shape = BLOCKS[name]
    gradients = [G.float() for G in gaussians(shape)]
    if name in ("matrix", "embedding", "tall heads"):  # a column without a gradient
        gradients = [G * (torch.arange(shape[1]) > 0) for G in gradients]
    w, _ = follow(direction, norm, shape, gradients)
    scaled, _ = follow(direction, norm, shape, [scale * G for G in gradients])
    # Of a block with fewer rows than columns, R is singular: its units are known to ε / DAMPING^1.5, with float32's ε.
    singular = direction == "whitened" and name in ("tall heads of heads", "wide and unequal")
    assert w.isfinite().all() and torch.allclose(w, scaled, atol=0.05 if singular else 1e-3)


ONE_BY_ONE = ["matrix", "heads", "in turn", "experts", "convolution", "transposed", "vector", *sorted(FULL)]


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("name", [n for n in ONE_BY_ONE if n not in ("embedding", "head", "tall heads of heads")])
def test_nothing_is_forgotten_of_a_block_without_a_gradient(name: str, direction: str):
    """A step in which a block has none is no step of that block, whatever its neighbours do."""
    norm, shape = BLOCKS[name]
    first, other, last = gaussians(shape)[:3]
    stacks = norm.split(other[None]) if isinstance(norm, View) else [other[None, None]]
    stacks = [s.clone() for s in stacks]
    stacks[0][:, 0] = 0  # the first block, of several or of one
    second = norm.join(stacks, other[None].shape)[0] if isinstance(norm, View) else stacks[0][0, 0]
    block = (second == 0) & (other != 0)
    before, _ = follow(direction, norm, shape, [first, second], refresh_every=1)
    after, optimizer = follow(direction, norm, shape, [first, second, last], refresh_every=1)
    short, skipped = follow(direction, norm, shape, [first, last], refresh_every=1)
    shorter, _ = follow(direction, norm, shape, [first], refresh_every=1)
    assert torch.equal(before[block], shorter[block]), "it stands still"
    assert torch.allclose((after - before)[block], (short - shorter)[block], atol=1e-12)
    if block.all():
        assert all(torch.equal(b, buffers(skipped)[k]) for k, b in buffers(optimizer).items())


@pytest.mark.parametrize("name", ["tall heads", "tall and unequal", "tall experts", "tall convolution"])
def test_what_is_kept_of_a_block_without_a_gradient_stays_bit_for_bit(name: str):
    norm, shape = BLOCKS[name]
    first, second = gaussians(shape)[:2]
    assert isinstance(norm, View)
    stacks = [s.clone() for s in norm.split(second[None])]
    stacks[0][:, 0] = 0
    second = norm.join(stacks, second[None].shape)[0]
    (_, one), (_, two) = (follow("whitened", norm, shape, G, refresh_every=1) for G in ([first], [first, second]))
    width = shape[1] if name != "tall experts" else shape[2]
    a, b = (buffers(o)["factor"].reshape(-1, width, width) for o in (one, two))
    assert sum(torch.equal(x, y) for x, y in zip(a, b, strict=True)) == 1


@pytest.mark.parametrize("direction", BOTH)
def test_what_is_dualized_is_known_to_rounding_over_the_sizes_of_rows_and_columns(direction: str):
    """D itself, of the finest perturbation: rows and columns over some decades each. R is damped, so that of it more is
    known.
    """
    rule, eps = DIRECTIONS[direction], torch.finfo(torch.float64).eps
    for decades in (0, 2, 4, 6, 16):
        sizes = 10.0 ** -torch.linspace(0, decades, 12, dtype=torch.float64)
        scale = sizes[:, None] * sizes[torch.randperm(12, generator=torch.Generator().manual_seed(decades))]
        ends = []
        for gradients in (G := [scale * g for g in stream("full rank", (12, 12), 1)], perturbed(G, 2)):
            state, D = {k: b[None] for k, b in rule.buffers(gradients[0]).items()}, gradients[0]
            for g in gradients:
                settings = {"live": torch.ones(1, 1, 1).double(), "beta": 0.95, "beta2": 0.99, "refresh": True}
                D = rule(g[None].clone(), state, **settings)
            ends.append(D)
        difference = ((ends[0] - ends[1]).norm() / ends[0].norm()).item()
        assert difference < 50 * eps / sizes.amin() ** 2
        assert direction == "factored" or difference < 30 * eps**0.5


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("beta2", [0.0, 0.5])
def test_a_step_is_finite_where_means_forget_what_the_momentum_remembers(beta2: float, direction: str):
    large, small = gaussians((6, 4))[0].float(), 1e-20 * gaussians((6, 4), 1)[0].float()
    for norm in (RMSToRMS(), RMSToLinf(), Frobenius()):
        w, optimizer = follow(direction, norm, (6, 4), [1e15 * large, *[small] * 100], beta2=beta2)
        assert torch.isfinite(w).all()
        assert all(torch.isfinite(b).all() for b in buffers(optimizer).values())


@pytest.mark.parametrize("direction", BOTH)
def test_a_run_with_an_adaptive_step_size_finds_the_minimum(direction: str):
    """From far below the distance to it."""
    target = gaussians((6, 4))[0]
    w = nn.Parameter(torch.zeros_like(target))
    norm = ModularNorm({"w": RMSToRMS(EXACT)}, {"w": 1.0})
    optimizer = Dualized([("w", w)], "auto", norm=norm, direction=direction, beta=0.5)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 1 - step / 200
        w.grad = w.detach() - target
        optimizer.step()
    assert optimizer.step_size is not None and optimizer.step_size > 0.01
    assert (w - target).norm() < 0.1 * target.norm()


# ---- what is kept


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_run_resumes_exactly_between_two_refreshes(name: str, direction: str):
    norm, shape = BLOCKS[name]
    gradients = gaussians(shape)
    whole, _ = follow(direction, norm, shape, gradients, refresh_every=3)
    w, optimizer = follow(direction, norm, shape, gradients[:2], refresh_every=3)
    saved = optimizer.state_dict()
    p = nn.Parameter(w.clone())
    resumed = dualized(norm, p, direction, refresh_every=3)
    resumed.load_state_dict(saved)
    for G in gradients[2:]:
        p.grad = G.clone()
        resumed.step()
    assert torch.equal(p.detach(), whole)


@pytest.mark.parametrize(("direction", "most"), [("factored", 1.1), ("whitened", 1.5)])
def test_the_state_of_gpt2_is_small(direction: str, most: float):
    """In buffers of a weight's size; half of it where momentum_dtype is bfloat16, but for what stays in float32."""
    config = load([str(Path(__file__).parents[1] / "configs/gpt2_124m.toml")])
    with torch.device("meta"):
        model = build(config.model, config.optim.norms.build(config.optim.polar, config.model.n_head))
    sizes = []
    for dtype in (None, "bfloat16"):
        optimizer = Dualized(model, 1.0, direction=direction, momentum_dtype=dtype)
        optimizer.make_state(lambda name: True)
        state = [(k, b) for s in optimizer.state.values() for k, b in s.items()]
        assert all(b.dtype == torch.float32 for k, b in state if k not in ("momentum", "rms"))
        sizes.append(sum(b.nbytes for _, b in state) / sum(p.nbytes for p in model.parameters()))
    print(f"{direction}: {sizes[0]:.3f} buffers a weight, {sizes[1]:.3f} with the momentum in bfloat16")
    assert 1 < sizes[0] < most and abs(sizes[0] - sizes[1] - 0.5) < 0.01
