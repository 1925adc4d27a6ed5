"""optim/norms.py. Oracles: Hölder's inequality on random trial tensors, and the operator norms' own definitions by random inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim import NORMS, Frobenius, L1ToLinf, L1ToRMS, Norm, RMSToLinf, RMSToRMS, VectorRMS
from optim.polar import SCHEDULES, Polar

EXACT = 1e-10  # float64, exact polar factor
NORMS_2D = [RMSToRMS(Polar("exact")), L1ToRMS(), RMSToLinf(), L1ToLinf(), Frobenius()]
ALL = [*NORMS_2D, VectorRMS()]
SHAPES = [(6, 6), (4, 9), (9, 4), (1, 7), (7, 1), (1, 1)]
ids = [str(n) for n in ALL]


def sample(norm: Norm, shape: tuple[int, int], *, seed: int = 0, stack: int = 0, rank_one: bool = False) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    size = shape if norm.ndim == 2 else shape[1:]
    G = torch.randn(*((stack,) if stack else ()), *size, generator=g, dtype=torch.float64)
    return torch.outer(G[:, 0], G[0]) if rank_one and norm.ndim == 2 else G


@pytest.mark.parametrize("norm", ALL, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("rank_one", [False, True])
def test_dualize_has_norm_one_and_attains_the_dual_norm(norm: Norm, shape: tuple[int, int], scale: float, rank_one: bool):
    G = scale * sample(norm, shape, rank_one=rank_one)
    D = norm.dualize(G)
    assert abs(norm.norm(D) - 1) < EXACT
    assert abs((G * D).sum() / norm.dual_norm(G) - 1) < EXACT


@pytest.mark.parametrize("norm", ALL, ids=ids)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_float32_neither_under_nor_overflows(norm: Norm, scale: float):
    G = sample(norm, (5, 8))
    assert torch.allclose(norm.dualize((scale * G).float()).double(), norm.dualize(G), atol=1e-5)
    assert torch.allclose(norm.dual_norm((scale * G).float()).double() / scale, norm.dual_norm(G), rtol=1e-5)
    assert torch.allclose(norm.norm((scale * G).float()).double() / scale, norm.norm(G), rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", [(12, 12), (6, 24), (24, 6)], ids=str)
def test_schedules_keep_both_identities_within_their_band(schedule: str, shape: tuple[int, int]):
    norm = RMSToRMS(Polar(schedule))
    G = sample(norm, shape)
    assert torch.linalg.svdvals(G).min() / G.norm() > 1e-3
    low, high = norm.polar.band
    D = norm.dualize(G)
    assert low - EXACT <= norm.norm(D) <= high + EXACT
    assert low - EXACT <= (G * D).sum() / norm.dual_norm(G) <= high + EXACT


@pytest.mark.parametrize("norm", ALL, ids=ids)
def test_no_trial_of_norm_one_beats_the_dual_norm(norm: Norm):
    G = sample(norm, (4, 6))
    trials = sample(norm, (4, 6), seed=1, stack=500)
    near = norm.dualize(G) + 0.05 * trials
    for T in (trials, near):
        size = norm.norm(T).reshape(-1, *(1,) * norm.ndim)
        assert ((G * T / size).flatten(1).sum(1) <= norm.dual_norm(G) * (1 + EXACT)).all()


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(-1).sqrt()


@pytest.mark.parametrize(
    ("norm", "size_in", "size_out"),
    [
        (RMSToRMS(Polar("exact")), rms, rms),
        (L1ToRMS(), lambda x: x.abs().sum(-1), rms),
        (RMSToLinf(), rms, lambda y: y.abs().amax(-1)),
        (L1ToLinf(), lambda x: x.abs().sum(-1), lambda y: y.abs().amax(-1)),
    ],
    ids=["RMSToRMS", "L1ToRMS", "RMSToLinf", "L1ToLinf"],
)
def test_operator_norms_bound_the_gain_of_every_input_and_some_input_attains_them(norm: Norm, size_in, size_out):
    W = sample(norm, (5, 7))
    maps_rows = isinstance(norm, L1ToRMS)  # an embedding's rows are its outputs: x → xᵀW
    A = W.mT if maps_rows else W
    best_right = torch.linalg.svd(A)[2][:1]  # the worst input of RMS → RMS; rows and unit vectors are those of the others
    inputs = torch.cat(
        [
            torch.randn(4000, A.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64),
            best_right,
            torch.eye(A.shape[1], dtype=torch.float64),
            A,
        ]
    )
    gains = size_out(inputs @ A.mT) / size_in(inputs)
    assert gains.max() <= norm.norm(W) * (1 + EXACT)
    assert gains.max() >= norm.norm(W) * (1 - EXACT)


@pytest.mark.parametrize("norm", ALL, ids=ids)
def test_zero_gives_zero_and_is_not_contagious(norm: Norm):
    G = sample(norm, (4, 6), stack=3)
    G[1] = 0
    D = norm.dualize(G)
    assert torch.equal(D[1], torch.zeros_like(D[1]))
    assert torch.equal(norm.dualize(G[:1])[0], D[0]) or torch.allclose(norm.dualize(G[:1])[0], D[0], atol=1e-14)
    assert norm.norm(G)[1] == 0 and norm.dual_norm(G)[1] == 0


@pytest.mark.parametrize("norm", [L1ToRMS(), RMSToLinf()], ids=str)
def test_a_zero_row_stays_zero_and_the_others_get_full_size(norm: Norm):
    G = sample(norm, (4, 6))
    G[2] = 0
    sizes = norm.dualize(G).norm(dim=-1)
    assert sizes[2] == 0
    assert torch.allclose(sizes[[0, 1, 3]], sizes[0].expand(3))


@pytest.mark.parametrize("norm", ALL, ids=ids)
def test_sharp_is_the_dual_norm_times_the_dual(norm: Norm):
    G = sample(norm, (4, 6), stack=2)
    expected = norm.dual_norm(G).reshape(2, *(1,) * norm.ndim) * norm.dualize(G)
    assert torch.allclose(norm.sharp(G), expected, rtol=1e-12)
    best = (G * norm.sharp(G)).flatten(1).sum(1) - norm.norm(norm.sharp(G)) ** 2 / 2
    assert torch.allclose(best, norm.dual_norm(G) ** 2 / 2), "the value of max ⟨G, T⟩ − norm(T)²/2 is dual_norm(G)²/2"


@pytest.mark.parametrize("norm", ALL, ids=ids)
def test_project_is_the_identity_inside_the_ball_and_lands_on_it_from_outside(norm: Norm):
    W = sample(norm, (4, 6))
    W = W / norm.norm(W)
    assert torch.allclose(norm.project(0.5 * W), 0.5 * W, rtol=1e-14)
    assert abs(norm.norm(norm.project(3 * W)) - 1) < EXACT


@pytest.mark.parametrize("norm", ALL, ids=ids)
def test_init_has_norm_one_and_follows_the_generator(norm: Norm):
    shape = (9, 4) if norm.ndim == 2 else (9,)
    W = norm.init(shape, torch.Generator().manual_seed(3))
    assert W.dtype == torch.float32 and tuple(W.shape) == shape
    assert abs(norm.norm(W.double()) - 1) < 1e-5
    assert torch.equal(W, norm.init(shape, torch.Generator().manual_seed(3)))
    assert not torch.equal(W, norm.init(shape, torch.Generator().manual_seed(4)))


def test_hidden_init_is_semi_orthogonal():
    W = RMSToRMS().init((4, 9), torch.Generator().manual_seed(0)).double()
    assert torch.allclose(W @ W.mT, torch.eye(4, dtype=torch.float64) * 4 / 9, atol=1e-6)


@given(st.sampled_from(ALL), st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 5), st.floats(-25, 25))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_dualize_ignores_scale_and_flips_with_sign(norm: Norm, seed: int, rows: int, columns: int, exponent: float):
    G = sample(norm, (rows, columns), seed=seed)
    D = norm.dualize(G)
    assert torch.allclose(norm.dualize(G * 10**exponent), D, atol=1e-9)
    assert torch.allclose(norm.dualize(-G), -D, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_goes_in_and_comes_out(dtype: torch.dtype):
    for norm in ALL:
        G = sample(norm, (4, 6)).to(dtype)
        assert norm.dualize(G).dtype == dtype
        assert norm.project(G).dtype == dtype
        assert torch.isfinite(norm.dualize(G)).all()


def test_every_norm_is_known_by_name():
    assert set(NORMS) >= {"RMSToRMS", "L1ToRMS", "RMSToLinf", "L1ToLinf", "Frobenius", "VectorRMS"}
