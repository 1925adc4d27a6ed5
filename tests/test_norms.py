"""optim/norms.py. Oracles: Hölder's inequality on random trial tensors, operator norms' own definitions by inputs
(torch's convolutions among them), the SVD, and blocks cut out by plain indexing.
"""

import math
from functools import reduce
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from optim import ModularNorm
from optim.modular import atom, bond, concat
from optim.norms import (
    NORMS,
    SCALES,
    Frobenius,
    L1ToLinf,
    L1ToRMS,
    MaxEntry,
    MeanToLinf,
    Norm,
    RMSToLinf,
    RMSToRMS,
    Spectral,
    VectorRMS,
    spectral_norm,
)
from optim.polar import SCHEDULES, Polar
from optim.views import Blocks, ConvRMSToRMS, Experts, Flattened, ScionConv, Transposed
from pytorch_optimizer.optimizer import scion as published_scion
from torch import Tensor

EXACT = 1e-10  # float64, exact polar factor
SIZE = 1e-3  # how close size() promises to be, from below
FP32 = 1e-5
Shape = tuple[int, ...]

LINEAR = RMSToRMS(Polar("exact"))
HEAD = RMSToLinf()
MATRICES: list[Norm] = [
    *(Spectral(Polar("exact"), scale) for scale in SCALES),
    LINEAR,
    L1ToRMS(),
    HEAD,
    L1ToLinf(),
    MaxEntry(2),
    MeanToLinf(),
    Frobenius(),
]
SHAPES = [(6, 6), (4, 9), (9, 4), (1, 7), (7, 1), (1, 1)]
OTHERS: list[tuple[Norm, Shape]] = [
    (VectorRMS(), (7,)),
    (MaxEntry(0), ()),
    (MaxEntry(1), (7,)),
    (MaxEntry(3), (2, 3, 4)),
    (Frobenius(1), (7,)),
    (Frobenius(3), (2, 3, 4)),
    (Frobenius(4), (2, 3, 2, 2)),
    (Blocks(LINEAR, 3), (6, 5)),
    (Blocks(LINEAR, (2, 2, 5, 1)), (10, 4)),
    (Blocks(LINEAR, 3, turns=2), (12, 5)),
    (Blocks(LINEAR, (2, 1, 1), turns=3), (12, 4)),
    (Blocks(VectorRMS(), (1, 1), turns=4), (8,)),
    (Blocks(VectorRMS(), 3), (6,)),
    (Blocks(VectorRMS(), (4, 2)), (6,)),
    (Blocks(HEAD, 2), (6, 4)),
    (Blocks(HEAD, (1, 5)), (6, 4)),
    (Blocks(ConvRMSToRMS(LINEAR, 1), 2), (4, 3, 2)),
    (Transposed(LINEAR), (4, 9)),
    (Transposed(L1ToRMS()), (4, 9)),
    (Transposed(Blocks(LINEAR, (3, 2))), (4, 5)),
    (Transposed(Transposed(HEAD)), (3, 5)),
    (Flattened(LINEAR), (4, 3, 2, 2)),
    (Flattened(HEAD, 3), (4, 3, 2)),
    (Flattened(VectorRMS(), 2), (3, 4)),
    (Flattened(Blocks(LINEAR, 2), 3), (4, 3, 2)),
    (Experts(LINEAR), (3, 4, 5)),
    (Experts(Transposed(LINEAR)), (3, 5, 4)),
    (Experts(HEAD), (3, 4, 5)),
    (Experts(VectorRMS()), (3, 4)),
    (Experts(MaxEntry(0)), (3,)),
    (Experts(Blocks(LINEAR, (1, 3))), (3, 4, 5)),
    (Experts(Transposed(Blocks(HEAD, 2))), (3, 5, 4)),
    (ConvRMSToRMS(LINEAR, 1), (4, 6, 3)),
    (ConvRMSToRMS(LINEAR), (5, 3, 2, 3)),
    (ConvRMSToRMS(LINEAR, 3), (2, 3, 2, 1, 2)),
    (ConvRMSToRMS(LINEAR, 2, 2), (6, 4, 2, 2)),
    (ConvRMSToRMS(LINEAR, 2, 4), (8, 1, 3, 2)),
    (ConvRMSToRMS(LINEAR, 1, transposed=True), (4, 6, 3)),
    (ConvRMSToRMS(LINEAR, 2, 3, transposed=True), (6, 2, 2, 2)),
    (ConvRMSToRMS(HEAD, 1), (4, 6, 3)),
]
ONE_SHAPE = [(n, (4, 6)) for n in MATRICES] + OTHERS


def cases(pairs: list[tuple[Norm, Shape]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("norm", "shape"), [pytest.param(n, s, id=f"{label(n)} {'×'.join(map(str, s))}") for n, s in pairs]
    )


def label(norm: Norm) -> str:
    return f"{norm}, {norm.ndim}d" if isinstance(norm, (MaxEntry, Frobenius, Flattened)) else str(norm)


def sample(shape: Shape, *, seed: int = 0, rank_one: bool = False, zero: int | None = None) -> Tensor:
    """Gaussian in float64, or a product of one Gaussian vector per dimension.

    zero: one of the first dimension made 0.
    """
    g = torch.Generator().manual_seed(seed)
    if rank_one:
        vectors = [torch.randn(n, generator=g, dtype=torch.float64) for n in shape]
        return reduce(lambda X, v: X[..., None] * v, vectors, torch.ones((), dtype=torch.float64))
    G = torch.randn(shape, generator=g, dtype=torch.float64)
    if zero is not None:
        G[zero] = 0
    return G


def polars(norm: Norm) -> Polar | None:
    """Of the spectral norm inside, if there is one."""
    inner = getattr(norm, "inner", None)
    return norm.polar if isinstance(norm, Spectral) else polars(inner) if inner else None


def slack(norm: Norm) -> float:
    return SIZE if polars(norm) else EXACT


# Dual pairs.


@cases([*((n, s) for n in MATRICES for s in SHAPES), *OTHERS])
@pytest.mark.parametrize("rank_one", [False, True], ids=["full rank", "rank one"])
def test_dualize_has_norm_one_and_attains_the_dual_norm(norm: Norm, shape: Shape, rank_one: bool):
    for scale in (1.0, 1e-30, 1e30):
        G = scale * sample(shape, rank_one=rank_one)
        D = norm.dualize(G)
        assert abs(norm.norm(D) - 1) < EXACT
        assert abs((G * D).sum() / norm.dual_norm(G) - 1) < EXACT
        G, D = G.float(), norm.dualize(G.float())
        assert abs(norm.norm(D) - 1) < FP32
        assert abs((G.double() * D).sum() / norm.dual_norm(G) - 1) < FP32


@cases(ONE_SHAPE)
def test_float32_neither_under_nor_overflows(norm: Norm, shape: Shape):
    G = sample(shape)
    for scale in (1e-30, 1e30):
        small = (scale * G).float()
        assert torch.allclose(norm.dualize(small).double(), norm.dualize(G), atol=FP32)
        for value in (norm.dual_norm, norm.norm, norm.size):
            assert torch.allclose(value(small).double() / scale, value(G), rtol=FP32)


@pytest.mark.parametrize("name", NORMS)
def test_every_registered_name_gives_a_dual_pair_within_its_polar_band(name: str):
    norm = NORMS[name]()
    low, high = norm.polar.band if isinstance(norm, Spectral) else (1.0, 1.0)
    for shape in ((12, 12), (6, 24), (24, 6)):
        G = sample(shape[: norm.ndim])
        D = norm.dualize(G)
        assert low - EXACT <= norm.norm(D) <= high + EXACT
        assert low - EXACT <= (G * D).sum() / norm.dual_norm(G) <= high + EXACT


def test_the_names_known():
    spectral = {"Spectral", "MuonSpectral", "MoonlightSpectral", "RMSToRMS"}
    assert set(NORMS) >= spectral | {
        "L1ToRMS",
        "RMSToLinf",
        "L1ToLinf",
        "MaxEntry",
        "MeanToLinf",
        "Frobenius",
        "VectorRMS",
    }
    with pytest.raises(ValueError, match=r"^Spectral.scale\n  got: '2'\n  allowed: .*O/I"):
        Spectral(scale="2")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", [(12, 12), (6, 24), (24, 6)], ids=str)
def test_schedules_keep_both_identities_within_their_band(schedule: str, shape: Shape):
    norm = RMSToRMS(Polar(schedule))
    G = sample(shape)
    assert torch.linalg.svdvals(G).min() / G.norm() > 1e-3
    low, high = norm.polar.band
    D = norm.dualize(G)
    assert low - EXACT <= norm.norm(D) <= high + EXACT
    assert low - EXACT <= (G * D).sum() / norm.dual_norm(G) <= high + EXACT


@cases(ONE_SHAPE)
def test_no_trial_of_norm_one_beats_the_dual_norm(norm: Norm, shape: Shape):
    G = sample(shape)
    trials = sample((200, *shape), seed=1)
    for T in (trials, norm.dualize(G) + 0.05 * trials, norm.dualize(trials)):
        products = (G * T).reshape(200, -1).sum(1) / norm.norm(T)
        assert (products <= norm.dual_norm(G) * (1 + EXACT)).all()


@cases(ONE_SHAPE)
def test_sharp_is_the_dual_norm_times_the_dual(norm: Norm, shape: Shape):
    G = sample(shape)
    S = norm.sharp(G)
    assert torch.allclose(S, norm.dual_norm(G) * norm.dualize(G), rtol=EXACT)
    best = (G * S).sum() - norm.norm(S) ** 2 / 2
    assert torch.allclose(best, norm.dual_norm(G) ** 2 / 2), "the value of max ⟨G, T⟩ − norm(T)²/2 is dual_norm(G)²/2"


@given(st.sampled_from(ONE_SHAPE), st.integers(0, 2**31), st.floats(-25, 25))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_dualize_ignores_scale_and_flips_with_sign(case: tuple[Norm, Shape], seed: int, exponent: float):
    norm, shape = case
    G = sample(shape, seed=seed)
    D = norm.dualize(G)
    assert torch.allclose(norm.dualize(G * 10**exponent), D, atol=1e-9)
    assert torch.allclose(norm.dualize(-G), -D, atol=1e-9)


# What every method owes to every norm.

METHODS = ("norm", "size", "dual_norm", "dualize", "dualize_", "sharp", "normalize", "project", "sphere", "stiefel")


@cases(ONE_SHAPE)
def test_stacks_equal_loops_zero_gives_zero_and_arguments_stay(norm: Norm, shape: Shape):
    G = sample((3, *shape), zero=1)
    G[2] *= 1e3
    for name in METHODS:
        method, stack = getattr(norm, name), G.clone()
        out = method(stack)
        assert torch.allclose(out, torch.stack([method(g.clone()) for g in G]), rtol=EXACT, atol=EXACT), name
        assert torch.equal(out[1], torch.zeros_like(out[1])), name
        assert name == "dualize_" or torch.equal(stack, G), f"{name} wrote to its argument"


@cases(ONE_SHAPE)
def test_dualize_in_place_returns_what_dualize_returns(norm: Norm, shape: Shape):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        G = sample(shape).to(dtype)
        # Convolutions go slice by slice in place, and sum in another order: a small entry has the rounding of large
        # ones.
        D, within = norm.dualize(G), {torch.float64: EXACT, torch.float32: FP32}.get(dtype, torch.finfo(dtype).eps)
        assert (norm.dualize_(G.clone()) - D).abs().max() <= within * D.abs().max()


@cases(ONE_SHAPE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_goes_in_and_comes_out_near(norm: Norm, shape: Shape, dtype: torch.dtype):
    G = sample(shape).to(dtype)
    for name in METHODS:
        out, wide = getattr(norm, name)(G.clone()), getattr(norm, name)(G.double())
        assert name == "sharp" or out.dtype == (torch.float32 if name in METHODS[:3] else dtype), name
        assert (out - wide).abs().max() <= 0.01 * wide.abs().max(), name


def test_sharp_keeps_the_dtype():
    for dtype in (torch.bfloat16, torch.float16):
        assert [label(n) for n, s in ONE_SHAPE if s and n.sharp(sample(s).to(dtype)).dtype != dtype] == []


@cases(ONE_SHAPE)
def test_size_is_the_norm_from_below(norm: Norm, shape: Shape):
    W = sample((20, *shape))
    assert (norm.size(W) <= norm.norm(W) * (1 + EXACT)).all()
    assert (norm.size(W) >= norm.norm(W) * (1 - slack(norm))).all()


@cases(ONE_SHAPE)
def test_init_has_norm_one_and_follows_the_generator(norm: Norm, shape: Shape):
    def init(seed: int) -> Tensor:
        return norm.init((2, *shape), torch.Generator().manual_seed(seed))

    W = init(3)
    assert W.dtype == torch.float32 and tuple(W.shape) == (2, *shape)
    assert ((norm.norm(W.double()) - 1).abs() < FP32).all()
    assert torch.equal(W, init(3))
    assert not all(torch.equal(W, init(seed)) for seed in range(4, 12)), "several seeds: a scalar has two signs"
    assert norm.norm(norm.init(shape, torch.Generator().manual_seed(0))).item() == pytest.approx(1, rel=FP32)


@cases([*((n, s) for n in MATRICES for s in SHAPES), *OTHERS])
def test_update_rms_is_that_of_the_dual_of_a_gaussian(norm: Norm, shape: Shape):
    assert norm.dualize(sample(shape)).square().mean().sqrt().item() == pytest.approx(norm.update_rms(shape), rel=EXACT)


# Balls and spheres.


@given(st.sampled_from(ONE_SHAPE), st.integers(0, 2**31), st.floats(-1, 1), st.floats(-20, 20))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_project_is_radial_idempotent_and_never_leaves_the_ball(
    case: tuple[Norm, Shape], seed: int, exponent: float, other: float
):
    norm, shape = case
    W = sample(shape, seed=seed)
    W = 10**exponent * W / norm.norm(W)
    P = norm.project(W)
    assert norm.norm(P) <= min(norm.norm(W), 1 + slack(norm)) * (1 + EXACT)
    assert norm.norm(W) < 1 or norm.norm(P) >= 1 - EXACT, "it lands on the sphere, not inside"
    assert torch.allclose(norm.project(P), P, rtol=slack(norm))
    assert ((P * W >= 0) & (P.abs() <= W.abs() * (1 + EXACT))).all(), "each entry is scaled by something in [0, 1]"
    assert torch.allclose(norm.project(0.999 * W / norm.norm(W)), 0.999 * W / norm.norm(W), rtol=1e-14), (
        "the identity inside"
    )
    far = norm.project(10 ** abs(other) * W / norm.norm(W))
    assert 1 - EXACT <= norm.norm(far) <= 1 + slack(norm)


@cases(ONE_SHAPE)
def test_normalize_divides_the_whole_weight_by_one_number(norm: Norm, shape: Shape):
    for scale in (1, 1e-30, 1e30):
        W = scale * sample(shape)
        N = norm.normalize(W)
        assert 1 - EXACT <= norm.norm(N) <= 1 + slack(norm)
        assert torch.allclose(N / W, (N / W).flatten()[0].expand(shape), rtol=1e-14)


@cases(ONE_SHAPE)
def test_sphere_has_norm_one(norm: Norm, shape: Shape):
    for scale in (1, 1e-30, 1e30):
        assert 1 - EXACT <= norm.norm(norm.sphere(scale * sample(shape))) <= 1 + slack(norm)
        assert not polars(norm) or abs(norm.norm(norm.stiefel(scale * sample(shape))) - 1) < EXACT


# Norms that are maxima over blocks: (norm, shape, norm of a block, factor, the blocks of W as that norm reads them, by
# plain indexing).
BLOCKED: list[tuple[Norm, Shape, Norm, float, object]] = [
    (Blocks(LINEAR, 3), (6, 5), LINEAR, 1, lambda W: [W[0:2], W[2:4], W[4:6]]),
    (Blocks(LINEAR, (2, 2, 5, 1)), (10, 4), LINEAR, 1, lambda W: [W[0:2], W[2:4], W[4:9], W[9:10]]),
    (Blocks(LINEAR, 3, turns=2), (12, 5), LINEAR, 1, lambda W: [W[[i, i + 1, i + 6, i + 7]] for i in (0, 2, 4)]),
    (Blocks(LINEAR, (2, 1, 1), turns=2), (8, 4), LINEAR, 1, lambda W: [W[[0, 1, 4, 5]], W[[2, 6]], W[[3, 7]]]),
    (Transposed(Blocks(LINEAR, (1, 1), turns=3)), (4, 6), LINEAR, 1, lambda W: [W[:, ::2].T, W[:, 1::2].T]),
    (Experts(Blocks(LINEAR, 2, turns=2)), (1, 4, 5), LINEAR, 1, lambda W: [W[0, ::2], W[0, 1::2]]),
    (Blocks(VectorRMS(), (4, 2)), (6,), VectorRMS(), 1, lambda W: [W[:4], W[4:]]),
    (Blocks(HEAD, 2), (6, 4), HEAD, 1, lambda W: [W[i : i + 1] for i in range(6)]),
    (HEAD, (6, 4), Frobenius(), 2, lambda W: [W[i : i + 1] for i in range(6)]),
    (L1ToRMS(), (6, 4), VectorRMS(), 1, lambda W: [W[i] for i in range(6)]),
    (Transposed(LINEAR), (4, 9), LINEAR, 1, lambda W: [W.T]),
    (Transposed(L1ToRMS()), (4, 9), VectorRMS(), 1, lambda W: [W[:, i] for i in range(9)]),
    (Transposed(Blocks(LINEAR, (3, 2))), (4, 5), LINEAR, 1, lambda W: [W[:, :3].T, W[:, 3:].T]),
    (Flattened(LINEAR, 3), (4, 3, 2), LINEAR, 1, lambda W: [W.view(4, 6)]),
    (Flattened(VectorRMS(), 2), (3, 4), VectorRMS(), 1, lambda W: [W.view(12)]),
    (Experts(LINEAR), (3, 4, 5), LINEAR, 1, lambda W: [W[0], W[1], W[2]]),
    (Experts(Transposed(LINEAR)), (3, 5, 4), LINEAR, 1, lambda W: [W[0].T, W[1].T, W[2].T]),
    (
        Experts(Blocks(LINEAR, (1, 3))),
        (3, 4, 5),
        LINEAR,
        1,
        lambda W: [W[e, rows] for e in range(3) for rows in (slice(1), slice(1, 4))],
    ),
    (ConvRMSToRMS(LINEAR, 1), (4, 6, 3), LINEAR, 3, lambda W: [W[:, :, i] for i in range(3)]),
    (ConvRMSToRMS(LINEAR), (5, 3, 2, 3), LINEAR, 6, lambda W: [W[:, :, i, j] for i in range(2) for j in range(3)]),
    (
        ConvRMSToRMS(LINEAR, 1, 2),
        (6, 4, 2),
        LINEAR,
        2,
        lambda W: [W[g : g + 3, :, i] for g in (0, 3) for i in range(2)],
    ),
    (
        ConvRMSToRMS(LINEAR, 1, 4),
        (8, 1, 3),
        LINEAR,
        3,
        lambda W: [W[g : g + 2, :, i] for g in (0, 2, 4, 6) for i in range(3)],
    ),
    (
        ConvRMSToRMS(LINEAR, 1, 3, True),
        (6, 2, 2),
        LINEAR,
        2,
        lambda W: [W[g : g + 2, :, i].T for g in (0, 2, 4) for i in range(2)],
    ),
    (ConvRMSToRMS(HEAD, 1), (4, 6, 3), HEAD, 3, lambda W: [W[o : o + 1, :, i] for i in range(3) for o in range(4)]),
]


@pytest.mark.parametrize(
    ("norm", "shape", "inner", "factor", "cut"), [pytest.param(*b, id=f"{label(b[0])} {b[1]}") for b in BLOCKED]
)
def test_blocks_are_what_plain_indexing_cuts_out(norm: Norm, shape: Shape, inner: Norm, factor: float, cut):
    G = sample(shape)
    if len(cut(G)) > 1:
        cut(G)[-1].zero_()
        cut(G)[0].mul_(1e-3)
    assert norm.norm(G).item() == pytest.approx(factor * max(inner.norm(b) for b in cut(G)).item(), rel=EXACT)
    assert norm.dual_norm(G).item() == pytest.approx(sum(inner.dual_norm(b).item() for b in cut(G)) / factor, rel=EXACT)
    for method in ("dualize", "sphere", "stiefel", "project"):
        out = getattr(norm, method)(G)
        for b, found in zip(cut(G), cut(out), strict=True):
            expected = getattr(inner, method)(factor * b if method == "project" else b) / factor
            assert torch.allclose(found, expected, rtol=EXACT, atol=EXACT), method
    for b, found in zip(cut(G), cut(norm.sphere(G)), strict=True):
        assert factor * inner.norm(found).item() == pytest.approx(float(b.any()), rel=slack(inner)), (
            "zero blocks stay, the others have full size"
        )


@pytest.mark.parametrize("shape", [(5, 7, 3, 3), (8, 3, 3, 3), (6, 4, 5), (4, 4, 2, 3)])
def test_scions_convolution_is_the_published_one_and_the_loosest_bound(shape: Shape, monkeypatch: pytest.MonkeyPatch):
    def polar(G: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
        return U @ Vh

    monkeypatch.setattr(published_scion, "zero_power_via_newton_schulz_5", polar)
    G, W = sample(shape), sample((2, *shape))[1]
    norm, T = ScionConv(LINEAR, len(shape)), published_scion.SpectralConv().lmo(G.clone())
    assert torch.allclose(norm.dualize(G), T, rtol=1e-9, atol=1e-12)
    assert norm.norm(T).item() == pytest.approx(1)
    assert (T * G).sum().item() == pytest.approx(norm.dual_norm(G).item())
    assert T.square().mean().sqrt().item() == pytest.approx(norm.update_rms(shape))
    flat = Flattened(LINEAR, len(shape)).norm(W)
    assert flat <= ConvRMSToRMS(LINEAR, len(shape) - 2).norm(W) <= norm.norm(W)


BLOCKS: list[tuple[Norm, Shape, tuple]] = [  # what has no gradient, and so does not move
    (LINEAR, (4, 6), (...,)),
    (Frobenius(), (4, 6), (...,)),
    (VectorRMS(), (4,), (...,)),
    (MaxEntry(), (4,), (1,)),
    (MaxEntry(0), (), (...,)),
    (Blocks(LINEAR, 2), (4, 6), (slice(2, 4),)),
    (Blocks(LINEAR, (1, 3)), (4, 6), (slice(1, 4),)),
    (Blocks(VectorRMS(), 2), (4,), (slice(2, 4),)),
    (Blocks(LINEAR, 2, turns=2), (8, 6), ([2, 3, 6, 7],)),
    (Blocks(Flattened(L1ToRMS(), 3), (1, 3)), (4, 5, 6), (2,)),  # blocks whose masks have other shapes
    (Transposed(Blocks(LINEAR, 3)), (4, 6), (slice(None), slice(2, 4))),
    (Flattened(LINEAR, 4), (4, 3, 2, 2), (...,)),
    (ConvRMSToRMS(LINEAR, 2), (4, 6, 3, 3), (slice(None), slice(None), 1, 2)),
    (ConvRMSToRMS(LINEAR, 1, groups=2), (4, 3, 3), (slice(2, 4), slice(None), 2)),
    (L1ToRMS(), (4, 6), (1,)),
    (HEAD, (4, 6), (1,)),
    (MaxEntry(2), (4, 6), (1,)),
    (L1ToLinf(), (4, 6), (1,)),
    (MeanToLinf(), (4, 6), (1,)),
    (Blocks(HEAD, (1, 3)), (4, 6), (1,)),
    (Transposed(L1ToRMS()), (4, 6), (slice(None), 1)),
    (Flattened(HEAD, 3), (4, 3, 2), (1,)),
    (Experts(LINEAR), (3, 4, 5), (1,)),
    (Experts(Transposed(LINEAR)), (3, 5, 4), (1,)),
    (Experts(Blocks(LINEAR, 2)), (3, 4, 5), (1, slice(2, 4))),
    (Experts(VectorRMS()), (3, 4), (1,)),
    (Experts(MaxEntry(0)), (3,), (1,)),
    (Experts(HEAD), (3, 4, 5), (1, 2)),
    (ConvRMSToRMS(HEAD, 1), (4, 6, 3), (1, slice(None), 2)),
]


@pytest.mark.parametrize(("norm", "shape", "index"), [pytest.param(*b, id=label(b[0])) for b in BLOCKS])
def test_blocks_without_a_gradient_are_masked(norm: Norm, shape: Shape, index: tuple):
    G = sample((2, *shape))
    G[(1, *index)] = 0
    one = torch.zeros_like(G[(0, *index)])  # one entry is enough
    one.view(-1)[0] = 1e-38
    G[(0, *index)] = one
    expected = torch.ones_like(G, dtype=torch.bool)
    expected[(1, *index)] = False
    for gradient, mask in ((G, expected), (G[1], expected[1]), (G[0], expected[0])):
        live = norm.live(gradient)
        assert live.dtype == torch.bool
        assert torch.equal(live.expand_as(gradient), mask)


@pytest.mark.parametrize(("norm", "shape"), [pytest.param(*n, id=label(n[0])) for n in ONE_SHAPE + OTHERS])
def test_a_weight_moves_with_its_gradient_and_does_not_without(norm: Norm, shape: Shape):
    G = sample((2, *shape))
    G[1] = 0
    live = norm.live(G).expand_as(G)
    assert live[0].all() and not live[1].any()


@pytest.mark.parametrize(
    ("norm", "shape", "text"),
    [
        (LINEAR, (4,), "2 dimensions, none of them 0"),
        (LINEAR, (0, 4), "2 dimensions, none of them 0"),
        (MaxEntry(0), (1,), "0 dimensions, none of them 0"),
        (VectorRMS(), (2, 2), "1 dimensions, none of them 0"),
        (Blocks(LINEAR, 3), (4, 4), "rows in 3 equal blocks"),
        (Blocks(LINEAR, 0), (4, 4), "rows in 0 equal blocks"),
        (Blocks(LINEAR, (3, 2)), (4, 4), "5 rows"),
        (Blocks(LINEAR, 2, turns=4), (6, 4), "rows in 2 equal blocks, 4 times in turn"),
        (Blocks(LINEAR, (1, 1), turns=3), (4, 4), "6 rows"),
        (Blocks(LINEAR, 2, turns=0), (4, 4), "rows in 2 equal blocks, 0 times in turn"),
        (Blocks(LINEAR, 3), (3, 4, 4), "2 dimensions, none of them 0"),
        (Transposed(Blocks(LINEAR, 3)), (3, 4), "2 dimensions, and of each block rows in 3 equal blocks"),
        (Experts(LINEAR), (4, 4), "3 dimensions, none of them 0"),
        (Experts(Blocks(LINEAR, 3)), (2, 4, 4), "3 dimensions, and of each block rows in 3 equal blocks"),
        (Flattened(LINEAR), (4, 4), "4 dimensions, none of them 0"),
        (ConvRMSToRMS(LINEAR, 2), (4, 4, 3), "4 dimensions, none of them 0"),
        (ConvRMSToRMS(LINEAR, 2, 3), (4, 1, 3, 3), "4 dimensions, the first a multiple of 3 groups"),
    ],
    ids=str,
)
def test_check_says_what_fits(norm: Norm, shape: Shape, text: str):
    assert norm.check(shape) == text


@cases(ONE_SHAPE)
def test_check_accepts_what_works(norm: Norm, shape: Shape):
    assert norm.check(shape) is None


# Singular values by matrix products.


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def with_singular_values(S: Tensor, columns: int, seed: int = 0) -> Tensor:
    S = S.double()
    return (orthogonal(len(S), seed) * S) @ orthogonal(columns, seed + 1)[: len(S)]


SPECTRA = {
    "flat": torch.ones(60),
    "two equal": torch.tensor([1.0] * 2 + [0.5] * 58),
    "two within 1e-3": torch.tensor([1.0, 0.999] + [0.5] * 58),
    "all within 1e-3": torch.linspace(0.999, 1, 60),
    "log-uniform": torch.logspace(-6, 0, 60),
    "rank one": torch.eye(60)[0],
    "one above many": torch.tensor([1.0] + [0.998] * 59),
    "half near 1": torch.cat([torch.linspace(0.99, 1, 150), torch.linspace(0, 0.99, 150)]),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_spectral_norm_is_within_its_promise_from_below(spectrum: str, dtype: torch.dtype):
    S = SPECTRA[spectrum]
    rounding = 1e-6 if dtype == torch.float32 else 1e-13
    for seed, columns in product(range(2), (len(S), len(S) + 30)):
        W = with_singular_values(S, columns, seed).to(dtype)
        top = torch.linalg.svdvals(W.double())[0]
        found = (
            torch.stack([spectral_norm(M) for M in (W, W.mT)] + [spectral_norm(W * c) / c for c in (1e-30, 1e30)]) / top
        )
        assert (found <= 1 + rounding).all() and (found >= 1 - SIZE).all()


@pytest.mark.parametrize("m", [32, 256, 512])
def test_spectral_norm_holds_on_its_worst_spectrum(m: int):
    """One singular value above m − 1 equal ones, and singular vectors that no column favours (Hadamard's); gaps around
    the worst one, ln(m) / 2^13.
    """
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < m:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    for gap in torch.linspace(0.4, 1.6, 5) * math.log(m) / 2**13:
        S = torch.full((m,), 1 - gap.item(), dtype=torch.float64)
        S[0] = 1
        assert 1 - SIZE <= spectral_norm(H * S / m**0.5) <= 1 + EXACT


def test_spectral_norm_of_nothing_is_zero():
    for shape in ((3, 4), (4, 3), (2, 3, 3)):
        assert torch.equal(spectral_norm(torch.zeros(shape)), torch.zeros(shape[:-2]))


@pytest.mark.parametrize(
    ("polar", "ratio", "error"),
    # ratio: ‖W‖_F / σ_min up to which stiefel holds: beyond it the schedule leaves the smallest singular values too far
    # below 1
    [
        (Polar("exact"), 1e6, 1e-6),
        (Polar("quintic"), 5000, SIZE),
        (Polar("you"), 1400, SIZE),
        (Polar("polar_express"), 1300, SIZE),
        (Polar("polar_express", dtype="bfloat16"), 200, SIZE),
        (Polar("cubic"), 160, SIZE),
        (Polar("jordan"), 200, 1.2e-3),
    ],
    ids=lambda value: f"{value.schedule}-{value.dtype}" if isinstance(value, Polar) else str(value),
)
def test_stiefel_makes_every_singular_value_full_up_to_this_ratio(polar: Polar, ratio: float, error: float):
    S = torch.logspace(0, -9, 20, dtype=torch.float64)
    S = (S + S.norm() / ratio).clamp(max=1)
    wide, square = with_singular_values(S, 30), with_singular_values(S, 20)
    for M, dtype, scale in product((wide, wide.mT, square), (torch.float32, torch.float64), SCALES):
        if polar.schedule == "exact" and dtype == torch.float32:
            continue  # 1e6 is past what the SVD's own rounding in float32 tells from zero
        found = torch.linalg.svdvals(Spectral(polar, scale).stiefel(M.to(dtype)).double())
        assert (found / SCALES[scale](*M.shape) - 1).abs().max() <= error


def test_hidden_init_is_semi_orthogonal_and_favours_no_sign():
    W = RMSToRMS().init((2000, 4, 9), torch.Generator().manual_seed(0)).double()
    assert torch.allclose(W @ W.mT, torch.eye(4, dtype=torch.float64).expand(2000, 4, 4) * 4 / 9, atol=1e-6)
    assert (W.mean(0).abs() < 5 * W.std(0) / 2000**0.5).all(), "the sign that QR gives its diagonal is undone"


@pytest.mark.parametrize(
    ("shape", "sizes"), [((8, 2), (2, 1, 2, 0.2 * 8**0.5)), ((2, 8), (0.5, 1, 1, 0.2 * 8**0.5))], ids=str
)
def test_the_singular_values_of_a_step_are_those_its_scale_names(shape: Shape, sizes: tuple[float, ...]):
    names = ("RMSToRMS", "Spectral", "MuonSpectral", "MoonlightSpectral")
    for name, scale, size in zip(
        names, ("sqrt(O/I)", "1", "sqrt(max(1, O/I))", "0.2 sqrt(max(O, I))"), sizes, strict=True
    ):
        for norm in (NORMS[name](Polar("exact")), Spectral(Polar("exact"), scale)):
            assert torch.allclose(
                torch.linalg.svdvals(norm.dualize(sample(shape))), torch.full((2,), size, dtype=torch.float64)
            )


# Operator norms.


def rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


def mean(x: Tensor) -> Tensor:
    return x.abs().mean(-1)


def total(x: Tensor) -> Tensor:
    return x.abs().sum(-1)


def largest(x: Tensor) -> Tensor:
    return x.abs().amax(-1)


@pytest.mark.parametrize(
    ("norm", "size_in", "size_out"),
    [
        (LINEAR, rms, rms),
        (Spectral(Polar("exact")), lambda x: x.norm(dim=-1), lambda y: y.norm(dim=-1)),
        (L1ToRMS(), total, rms),
        (HEAD, rms, largest),
        (L1ToLinf(), total, largest),
        (MeanToLinf(), mean, largest),
        (MaxEntry(1), rms, rms),
    ],
    ids=lambda value: str(value) if isinstance(value, Norm) else "",
)
def test_operator_norms_bound_the_gain_of_every_input_and_some_input_attains_them(norm: Norm, size_in, size_out):
    W = sample((5, 7)[-norm.ndim :])
    A = (
        W.diag() if norm.ndim == 1 else W.mT if isinstance(norm, L1ToRMS) else W
    )  # an embedding's rows are its outputs: x → xᵀW
    best_right = torch.linalg.svd(A)[2][
        :1
    ]  # the worst input of RMS → RMS; rows and unit vectors are those of the others
    inputs = torch.cat([sample((4000, A.shape[1]), seed=2), best_right, torch.eye(A.shape[1], dtype=torch.float64), A])
    gains = size_out(inputs @ A.mT) / size_in(inputs)
    assert gains.max() <= norm.norm(W) * (1 + EXACT)
    assert gains.max() >= norm.norm(W) * (1 - EXACT)


def test_scions_head_norm_bounds_the_operator_norm_from_rms_to_the_largest_logit():
    W = sample((200, 5, 7))
    assert (HEAD.norm(W) <= MeanToLinf().norm(W)).all()
    signs = W.sign()
    assert torch.allclose(HEAD.norm(signs), MeanToLinf().norm(signs)), (
        "with equality where all entries of a row are equally large"
    )


@given(
    dims=st.sampled_from([1, 2, 3]),
    groups=st.sampled_from([1, 2, 3]),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    transposed=st.booleans(),
    options=st.fixed_dictionaries(
        {"stride": st.integers(1, 3), "padding": st.integers(0, 2), "dilation": st.integers(1, 2)}
    ),
    kernel=st.tuples(*[st.integers(1, 3)] * 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_convolutions_gain_at_most_their_norm_and_attain_it(dims, groups, per_group, transposed, options, kernel, seed):
    """From the largest channel RMS of a position to that of another. per_group (1, 1) is depthwise."""
    out, into = per_group
    norm = ConvRMSToRMS(LINEAR, dims, groups, transposed)
    shape = (groups * into, out) if transposed else (groups * out, into)
    W = sample((*shape, *kernel[:dims]), seed=seed)
    assert norm.check(W.shape) is None
    convolve = getattr(F, f"conv{'_transpose' * transposed}{dims}d")

    def gain(W: Tensor, x: Tensor) -> float:
        y = convolve(x, W, groups=groups, **options)
        return (rms(y.movedim(1, -1)).max() / rms(x.movedim(1, -1)).max()).item()

    x = sample((4, groups * into, *(7,) * dims), seed=seed + 1)
    assert gain(W, x) <= norm.norm(W) * (1 + EXACT)
    x = x / rms(x.movedim(1, -1)).unsqueeze(1)  # of one size everywhere
    assert gain(W, x) <= norm.norm(W) * (1 + EXACT)
    # Equal slices and a constant input along a group's first right singular vector: an output that sees every tap has
    # all of the norm.
    W = W[(..., *(slice(1),) * dims)].expand_as(W)
    right = torch.zeros(groups, into, dtype=torch.float64)
    for g, slices in enumerate(W.flatten(2)[..., 0].unflatten(0, (groups, -1))):
        A = slices.mT if transposed else slices
        right[g] = torch.linalg.matrix_norm(A, ord=2) * torch.linalg.svd(A)[2][0]
    right[right.norm(dim=1) < right.norm(dim=1).max()] = 0
    x = right.reshape(1, -1, *(1,) * dims).expand(1, -1, *(7,) * dims)
    assert gain(W, x) <= norm.norm(W) * (1 + EXACT)
    if (
        not transposed or options["stride"] == 1
    ):  # a transposed convolution of a larger stride has no output that sees every tap
        assert gain(W, x) >= norm.norm(W) * (1 - EXACT)


def test_circular_padding_keeps_the_bound_of_a_convolution_and_attains_it():
    W = sample((5, 3, 1, 1)).expand(5, 3, 3, 3)
    conv = torch.nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular", bias=False, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(W)
        x = torch.linalg.svd(W[..., 0, 0])[2][0].reshape(1, 3, 1, 1).expand(1, 3, 6, 6)
        gains = rms(conv(x).movedim(1, -1)) / rms(x.movedim(1, -1))
    assert torch.allclose(gains, ConvRMSToRMS(LINEAR).norm(W).expand_as(gains), rtol=EXACT)


# Heads and fused maps.


@given(st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_norm_per_head_lies_between_the_whole_and_root_heads_times_it(
    heads: int, rows: int, width: int, seed: int, rank_one: bool
):
    W = sample((heads * rows, width), seed=seed, rank_one=rank_one)
    whole, per_head = LINEAR.norm(W), Blocks(LINEAR, heads).norm(W)
    assert whole <= per_head * (1 + EXACT)
    assert per_head <= heads**0.5 * whole * (1 + EXACT)


def test_both_ends_of_the_range_per_head_are_attained():
    head = sample((2, 5))
    alike, alone = torch.cat([head] * 3), torch.cat([head, 0 * head, 0 * head])
    assert torch.allclose(Blocks(LINEAR, 3).norm(alike), LINEAR.norm(alike))
    assert torch.allclose(Blocks(LINEAR, 3).norm(alone), 3**0.5 * LINEAR.norm(alone))


@pytest.mark.parametrize("sizes", [3, (4, 4, 4)], ids=str)
def test_fused_queries_keys_and_values_behind_a_bond_of_sensitivity_three_move_as_three_atoms(sizes: int | Shape):
    attention = bond("attention", sensitivity=0.5)
    apart = atom("out", LINEAR, mass=2) @ attention @ concat(*(atom(n, LINEAR) for n in "qkv")) @ atom("in", LINEAR)
    fused = atom("qkv", Blocks(LINEAR, sizes), mass=3)
    fused = atom("out", LINEAR, mass=2) @ attention @ bond("split", sensitivity=3) @ fused @ atom("in", LINEAR)
    assert (apart.mass, apart.sensitivity) == (fused.mass, fused.sensitivity)
    three, one = ModularNorm.of(apart), ModularNorm.of(fused)
    for name in ("out", "in"):
        assert one.radii[name] == pytest.approx(three.radii[name], rel=1e-14)
    assert [three.radii[n] for n in "qkv"] == pytest.approx([one.radii["qkv"]] * 3, rel=1e-14)
    parts = {n: sample((4, 6), seed=i) for i, n in enumerate("qkv")}
    whole = {"qkv": torch.cat(list(parts.values()))}
    assert torch.allclose(one.dualize(whole)["qkv"], torch.cat(list(three.dualize(parts).values())), rtol=EXACT)
    assert torch.allclose(one.dual_norm(whole), three.dual_norm(parts), rtol=EXACT)


@pytest.mark.parametrize(
    ("norm", "text"),
    [
        (Blocks(LINEAR, 3), "3 × RMSToRMS[exact]"),
        (Blocks(LINEAR, (2, 2, 5)), "(2 × 2 + 5) × RMSToRMS[exact]"),
        (Experts(Transposed(HEAD)), "Experts(Transposed(RMSToLinf))"),
        (ConvRMSToRMS(LINEAR, 1, 2, True), "Conv(RMSToRMS[exact], 1d, 2 groups, transposed)"),
        (Spectral(Polar("you"), "sqrt(O/I)"), "Spectral[sqrt(O/I), you]"),
    ],
    ids=["blocks", "unequal blocks", "nested", "convolution", "spectral"],
)
def test_norms_say_what_they_are(norm: Norm, text: str):
    assert str(norm) == text
