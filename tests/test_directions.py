"""optim/directions.py: what every direction owes to the rounding of its gradients.

Oracle: the same stream, perturbed below it.
A gradient is a sum that another processor takes in another order. What a step makes of that rounding must stay
rounding: wherever a gradient says nothing (null spaces, repeated singular values) a direction may neither divide
noise by noise nor let an eigensolver's choice of basis be seen.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim import Dualized, ModularNorm
from optim.directions import DIRECTIONS
from optim.norms import Frobenius, L1ToRMS, MaxEntry, MeanToLinf, Norm, RMSToLinf, RMSToRMS, VectorRMS
from optim.polar import Polar
from optim.views import Blocks, ConvRMSToRMS, Experts, Flattened, ScionConv, Transposed, View
from torch import Tensor, nn

PERTURBATION = 1e-15  # of ‖G‖_F: some five roundings of every entry
TURN = 1e-6  # 1 − cos: 1e-3 of the step's length, so that condition numbers up to 1e12 are let pass
STEPS = 10
SEEDS = 40 if os.environ.get("NANODUAL_SOAK") == "1" else 6  # not by tests.helpers, which Windows cannot import
# These divide entry by entry, or take each entry's sign: of an entry that is rounding alone they make a full one. Only
# gradients without zeros.
ENTRYWISE = ("adam", "lion")

SHAPES = {"square": (12, 12), "tall": (16, 10), "wide": (9, 14), "smallest": (2, 2)}


def orthogonal(G: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


def rank(r: int) -> Callable[[Tensor], Tensor]:
    """The same Gaussian numbers in two factors: a matrix of rank r at most, another null space in every gradient of a
    stream.
    """
    return lambda G: G[:, :r] @ G.flip(0)[:r] if r < min(G.shape) else G


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "full rank": lambda G: G,
    "rank 1": rank(1),
    "rank 3": rank(3),
    "rows of zeros": lambda G: G * (torch.arange(len(G)) % 3 > 0)[:, None],
    "rows that sum to zero": lambda G: G - G.mean(0),
    "repeated singular values": orthogonal,
}


def stream(kind: str, shape: tuple[int, int], seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [KINDS[kind](torch.randn(shape, generator=g, dtype=torch.float64)) for _ in range(STEPS)]


def perturbed(gradients: list[Tensor], seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    noise = [torch.randn(G.shape, generator=g, dtype=G.dtype) for G in gradients]
    return [G + PERTURBATION * G.norm() / E.norm() * E for G, E in zip(gradients, noise, strict=True)]


def steps_taken(streams: dict[str, list[Tensor]], direction: str, polar: Polar) -> list[dict[str, Tensor]]:
    """By step and stream: what is taken off a weight of that name."""
    named = {name: nn.Parameter(torch.zeros_like(gradients[0])) for name, gradients in streams.items()}
    norm = ModularNorm(dict.fromkeys(named, RMSToRMS(polar)), dict.fromkeys(named, 1.0))
    # The basis of SOAP is renewed in steps 1, 4, 7 and 10.
    optimizer = Dualized(list(named.items()), 1.0, norm=norm, direction=direction, refresh_every=3)
    taken = []
    for t in range(STEPS):
        for name, w in named.items():
            w.grad = streams[name][t].clone()
            w.data.zero_()
        optimizer.step()
        taken.append({name: -w.detach() for name, w in named.items()})
    return taken


@pytest.mark.soak
@pytest.mark.parametrize("polar", [Polar(), Polar("exact")], ids=lambda polar: polar.schedule)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_perturbation_of_a_few_roundings_does_not_turn_the_step(direction: str, polar: Polar):
    kinds = [k for k in KINDS if direction not in ENTRYWISE or k != "rows of zeros"]
    cases = [(kind, name, seed) for kind in kinds for name in SHAPES for seed in range(SEEDS)]
    streams = {f"{kind}, {name}, seed {seed}": stream(kind, SHAPES[name], seed=seed) for kind, name, seed in cases}
    others = {name: perturbed(gradients, seed=math.prod(gradients[0].shape)) for name, gradients in streams.items()}
    plain, moved = (steps_taken(s, direction, polar) for s in (streams, others))
    for step in (0, STEPS - 1):
        turns = {
            name: 1
            - nn.functional.cosine_similarity(plain[step][name].flatten(), moved[step][name].flatten(), dim=0).item()
            for name in streams
        }
        assert max(turns.values()) < TURN, (step + 1, {name: turn for name, turn in turns.items() if turn >= TURN})


# ---- factored


EXACT = Polar("exact")
CLOSE = 1e-7  # of float64: the quotient is M̃ v / (v² + ε u²), where v is small against u
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
    "vector": (VectorRMS(), (6,)),
    "experts' vectors": (Experts(VectorRMS()), (3, 6)),
    "gain": (MaxEntry(), (6,)),
    "scalar": (MaxEntry(0), ()),
}


def blockwise(norm: Norm, f: Callable[..., Tensor], *Ws: Tensor) -> Tensor:
    """f of each stack of innermost blocks of several weights, put together again."""
    if not isinstance(norm, View):
        return f(norm, *Ws)
    parts = zip(*(norm.split(W) for W in Ws), strict=True)
    return norm.join([blockwise(norm.inner, f, *p) for p in parts], Ws[0].shape)


def divisor(norm: Norm, S: Tensor) -> Tensor:
    """The square root of the means over rows times those over columns, from averages of squares S."""
    if norm.ndim < 2:
        return S.sqrt()
    return (S.mean(-1, keepdim=True) * S.mean(-2, keepdim=True)).sqrt()


def follow(norm: Norm, shape: tuple[int, ...], gradients: list[Tensor], **settings: Any) -> tuple[Tensor, Dualized]:
    """A weight of zeros after its steps in the direction "factored", of norm 1 each."""
    w = nn.Parameter(torch.zeros(shape, dtype=gradients[0].dtype))
    optimizer = Dualized(
        [("w", w)], 1.0, norm=ModularNorm({"w": norm}, {"w": 1.0}), direction="factored", beta=0.9, **settings
    )
    for G in gradients:
        w.grad = G.clone()
        optimizer.step()
    return w.detach(), optimizer


def gaussians(shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Of rows and columns of other sizes."""
    g = torch.Generator().manual_seed(seed)
    scale = math.prod(
        (0.1 + torch.rand(s, generator=g, dtype=torch.float64) * 3).reshape(-1, *(1,) * i)
        for i, s in enumerate(reversed(shape))
    )
    return [scale * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(4)]


@pytest.mark.parametrize("name", BLOCKS)
def test_factored_divides_by_the_means_of_squares_over_rows_and_columns_of_each_block(name: str):
    """Averages of squares entry by entry, whose means are the averages of means; blocks by the views' own split()."""
    norm, shape = BLOCKS[name]
    gradients = gaussians(shape)
    w, _ = follow(norm, shape, gradients, beta2=0.7)
    M = S = expected = torch.zeros(1, *shape, dtype=torch.float64)
    for G in gradients:
        M, S = 0.9 * M + 0.1 * G, 0.7 * S + 0.3 * G * G
        ahead = 0.1 * G + 0.9 * M
        expected = expected - norm.dualize(blockwise(norm, lambda n, A, S: A / divisor(n, S), ahead, S))
    assert torch.allclose(w, expected[0], atol=CLOSE)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("name", BLOCKS)
def test_factored_knows_no_scale(name: str, scale: float):
    norm, shape = BLOCKS[name]
    gradients = [G.float() for G in gaussians(shape)]
    w, _ = follow(norm, shape, gradients)
    scaled, _ = follow(norm, shape, [scale * G for G in gradients])
    assert torch.allclose(w, scaled, atol=1e-3)


@pytest.mark.parametrize("name", ["matrix", "heads", "in turn", "experts", "convolution", "transposed", "vector"])
def test_factored_forgets_nothing_of_a_block_without_a_gradient(name: str):
    """A step in which a block has none is no step of that block, whatever its neighbours do."""
    norm, shape = BLOCKS[name]
    first, other, last = gaussians(shape)[:3]
    zeros = norm.split(other[None])[0].clone() if isinstance(norm, View) else other[None, None].clone()
    zeros[:, 0] = 0  # the first block, of several or of one
    second = norm.join([zeros], other[None].shape)[0] if isinstance(norm, View) else zeros[0, 0]
    block = (second == 0) & (other != 0)
    before, _ = follow(norm, shape, [first, second])
    after, optimizer = follow(norm, shape, [first, second, last])
    short, skipped = follow(norm, shape, [first, last])
    shorter, _ = follow(norm, shape, [first])
    assert torch.equal(before[block], shorter[block]), "it stands still"
    assert torch.allclose((after - before)[block], (short - shorter)[block], atol=1e-12)
    if block.all():
        (state,), (other_state,) = optimizer.state.values(), skipped.state.values()
        assert all(torch.equal(b, other_state[k]) for k, b in state.items())


def test_factored_sees_columns_in_the_rows_that_have_a_gradient():
    """As of a table of those rows alone; where there is none, columns stay."""
    G = gaussians((3, 4))
    wide = [torch.zeros(7, 4, dtype=torch.float64).index_copy(0, torch.tensor([1, 2, 5]), g) for g in G]
    w, optimizer = follow(L1ToRMS(), (7, 4), [*wide, torch.zeros_like(wide[0])])
    expected, other = follow(L1ToRMS(), (3, 4), G)
    assert torch.allclose(w[[1, 2, 5]], expected, atol=1e-12) and not w[[0, 3, 4, 6]].any()
    (state,), (other_state,) = optimizer.state.values(), other.state.values()
    assert state.keys() == {"momentum", "columns"} == other_state.keys()
    assert torch.allclose(state["columns"], other_state["columns"], atol=1e-12)


def test_factored_is_known_to_the_root_of_rounding_whatever_the_sizes_of_rows_and_columns():
    """D itself, of the finest perturbation: rows and columns over 16 decades, of which most are rounding."""
    direction = DIRECTIONS["factored"]
    for decades in (0, 4, 8, 16):
        sizes = 10.0 ** -torch.linspace(0, decades, 12, dtype=torch.float64)
        scale = sizes[:, None] * sizes[torch.randperm(12, generator=torch.Generator().manual_seed(decades))]
        ends = []
        for gradients in (G := [scale * g for g in stream("full rank", (12, 12), 1)], perturbed(G, 2)):
            state, D = {k: b[None] for k, b in direction.buffers(gradients[0]).items()}, gradients[0]
            for g in gradients:
                settings = {"live": torch.ones(1, 1, 1).double(), "beta": 0.95, "beta2": 0.99, "refresh": False}
                D = direction(g[None].clone(), state, **settings)
            ends.append(D)
        eps = torch.finfo(torch.float64).eps
        assert (ends[0] - ends[1]).norm() < 10 * eps**0.5 * ends[0].norm()
        assert decades > 8 or (ends[0] - ends[1]).norm() < 1e-13 / sizes.amin() ** 2 * ends[0].norm(), "usually less"


@pytest.mark.parametrize("beta2", [0.0, 0.5])
def test_factored_is_finite_where_means_forget_what_the_momentum_remembers(beta2: float):
    large, small = gaussians((6, 4))[0].float(), 1e-20 * gaussians((6, 4), 1)[0].float()
    for norm in (RMSToRMS(), RMSToLinf(), Frobenius()):
        w, optimizer = follow(norm, (6, 4), [1e15 * large, *[small] * 100], beta2=beta2)
        assert torch.isfinite(w).all()
        assert all(torch.isfinite(b).all() for s in optimizer.state.values() for b in s.values())


@pytest.mark.parametrize("name", BLOCKS)
def test_factored_resumes_exactly(name: str):
    norm, shape = BLOCKS[name]
    gradients = gaussians(shape)
    whole, _ = follow(norm, shape, gradients)
    w, optimizer = follow(norm, shape, gradients[:2])
    saved = optimizer.state_dict()
    p = nn.Parameter(w.clone())
    resumed = Dualized([("w", p)], 1.0, norm=ModularNorm({"w": norm}, {"w": 1.0}), direction="factored", beta=0.9)
    resumed.load_state_dict(saved)
    for G in gradients[2:]:
        p.grad = G.clone()
        resumed.step()
    assert torch.equal(p.detach(), whole)
