"""optim/polar.py. Oracles: the SVD, and the schedules' polynomials on scalars."""

import math
from typing import Literal

import pytest
import torch
from optim.polar import DAMPING, SCHEDULES, Polar, Schedule, inverse_fourth_root

Form = Literal["plain", "gram"]

NAMES = list(SCHEDULES)
ROUNDING = 1e-14  # of a dozen operations on float64 numbers near 1
FP32_LOG_UNIFORM = (
    2e-4  # of two ways to take the same sums in float32, where singular values are at least 1e-3 of the largest
)
# fp32 plain and Gram against float64: 8e-4 measured at worst, rank one under polar_express, whose polynomials are steep
# at 1
FP32 = 1e-3
GRAM_BF16 = 0.12
# The maximum of 2x − 1.5x³ + 0.5x⁵ on [0, 1], 1.00176: its derivative is 0 at x² = 0.8 and 1.
QUINTIC_PEAK = 1.12 * 0.8**0.5
# How far bf16 carries a singular value past a band's upper edge: 0.012 measured at worst.
BF16 = 0.02
# How far it carries one from the floor below the lower edge: 0.067 at worst of 200 matrices, three
# instruction sets. Rounding the entries of G does it, in steps as steep as polar_express's at 0.
BF16_BELOW = 0.1


def with_spectrum(m: int, n: int, S: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A float64 (m, n) matrix, m <= n, of these singular values."""
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(m, m, generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, m, generator=g, dtype=torch.float64))[0]
    return (U * S) @ V.mT


def in_band_spectrum(m: int, floor: float = 1e-3) -> torch.Tensor:
    """Log-uniform singular values, all of them at least floor · ‖·‖_F."""
    S = torch.logspace(-2, 0, m, dtype=torch.float64)
    assert S.min() / S.norm() >= floor
    return S


def on_scalars(schedule: Schedule, x: torch.Tensor) -> torch.Tensor:
    x = x / schedule.safety
    for a, b, c in schedule.coefficients:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=NAMES)
def test_stated_band_is_the_measured_one(schedule: Schedule):
    x = on_scalars(schedule, torch.logspace(-3, 0, 400_001, dtype=torch.float64))
    low, high = schedule.band
    assert low <= x.min() and x.max() <= high + ROUNDING, "the band must hold"  # cubic tends to its edge, 1, itself
    assert low > x.min() - 2e-3 and high < x.max() + 2e-3, "and be tight to its rounding"


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=NAMES)
def test_below_its_floor_only_quintic_passes_its_upper_edge_and_none_is_steeper_than_at_0(
    schedule: Schedule,
):
    x = torch.logspace(-12, math.log10(schedule.floor), 400_001, dtype=torch.float64)
    y = on_scalars(schedule, x)
    slope = math.prod(a for a, _, _ in schedule.coefficients) / schedule.safety
    assert (y > 0).all() and (y <= slope * x * (1 + ROUNDING)).all()
    if schedule.name == "quintic":
        assert QUINTIC_PEAK - 1e-6 < y.max() <= QUINTIC_PEAK + ROUNDING, "its last step is met at its peak"
    else:
        assert (y.diff() > 0).all() and y.max() <= schedule.band[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)])
def test_singular_values_land_in_the_band_and_the_factors_stay(name: str, form: Form, shape: tuple[int, int]):
    G = with_spectrum(24, max(shape), in_band_spectrum(24))
    G = G if shape[0] <= shape[1] else G.mT
    X = Polar(name, form)(G)
    low, high = SCHEDULES[name].band
    S = torch.linalg.svdvals(X)
    assert low - 1e-9 <= S.min() and S.max() <= high + 1e-9
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    middle = U.mT @ X @ Vh.mT  # diagonal exactly when X has G's singular vectors
    assert (middle - middle.diagonal().diag()).abs().max() < 1e-8


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("name", ["jordan", "you", "polar_express", "quintic"])
@pytest.mark.parametrize("spectrum", ["log-uniform", "rank one", "near rank one", "tiny tail"])
def test_float32_follows_float64(name: str, form: Form, spectrum: str):
    S = {
        "log-uniform": torch.logspace(-3, 0, 64, dtype=torch.float64),
        "rank one": torch.eye(64, dtype=torch.float64)[0],
        "near rank one": torch.cat([torch.ones(1), 1e-2 * torch.linspace(0, 1, 63)]).double(),
        "tiny tail": torch.logspace(-7, 0, 64, dtype=torch.float64),
    }[spectrum]
    G = with_spectrum(64, 256, S)
    error = torch.linalg.matrix_norm(Polar(name, form)(G.float()).double() - Polar(name, "plain")(G), ord=2)
    assert error < (FP32_LOG_UNIFORM if spectrum == "log-uniform" else FP32)


@pytest.mark.parametrize("name", ["jordan", "you", "polar_express"])
@pytest.mark.parametrize("rank", [1, 64])
@pytest.mark.parametrize(("form", "slack"), [("auto", BF16), ("gram", GRAM_BF16)])
def test_bfloat16_stays_under_the_band_when_plain_and_near_it_in_gram_form(
    name: str, rank: int, form: Literal["auto", "gram"], slack: float
):
    """Why form="auto" is plain in bfloat16. Without restarts the Gram form reaches 3 to 1e6 on the same spectra."""
    S = torch.logspace(-3, 0, 64, dtype=torch.float64) if rank > 1 else torch.eye(64, dtype=torch.float64)[0]
    X = Polar(name, form, "bfloat16")(with_spectrum(64, 256, S).float())
    assert torch.linalg.svdvals(X).max() < SCHEDULES[name].band[1] + slack


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [64, 256])
def test_bfloat16_keeps_the_band_of_singular_values_above_the_floor(name: str, n: int):
    """cubic too: torch.baddbmm with alpha=0 made NaN of it."""
    S, schedule = torch.logspace(-2.61, 0, 64, dtype=torch.float64), SCHEDULES[name]
    assert schedule.floor <= S.min() / S.norm() < 1.05 * schedule.floor
    low, high = schedule.band
    for seed in range(3):
        X = Polar(name, dtype="bfloat16")(with_spectrum(64, n, S, seed).float())
        out = torch.linalg.svdvals(X.double())
        assert low - BF16_BELOW < out.min() and out.max() < high + BF16


def test_exact_is_the_svd_factor_and_a_partial_isometry_where_rank_is_missing():
    G = with_spectrum(8, 12, torch.tensor([3.0, 2.0, 1.0, 0.5, 1e-3, 0, 0, 0], dtype=torch.float64))
    X = Polar("exact")(G)
    S = torch.linalg.svdvals(X)
    assert torch.allclose(S, torch.tensor([1.0] * 5 + [0.0] * 3, dtype=torch.float64), atol=1e-9)
    assert torch.allclose((X * G).sum(), torch.linalg.svdvals(G).sum(), rtol=1e-12)


@pytest.mark.parametrize("name", ["exact", *NAMES])
def test_scale_zero_and_stacks(name: str):
    polar = Polar(name)
    G = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(1))
    X = polar(G)
    assert X.shape == G.shape and X.dtype == G.dtype
    for scale in (2.0**-100, 2.0**100):
        assert torch.equal(polar(G * scale), X)
    assert torch.allclose(polar(G[1, 1]), X[1, 1], atol=FP32_LOG_UNIFORM)
    G[0, 1] = 0
    assert torch.equal(polar(G)[0, 1], torch.zeros(5, 7))


# ---- fourth roots

ROOT = 2e-6  # what the iteration's last step leaves, 0.154³ of 0.154³


def fourth_root(A: torch.Tensor) -> torch.Tensor:
    values, V = torch.linalg.eigh(A)
    damped = values + DAMPING * torch.linalg.matrix_norm(A)[..., None]
    unit = (values / damped).sum(-1) / (values * damped**-1.5).sum(-1)
    return unit.sqrt()[..., None, None] * ((V * damped[..., None, :] ** -0.25) @ V.mT)


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4, 1e-8, 0.0])
def test_a_fourth_root_is_the_eigendecompositions(smallest: float):
    X = with_spectrum(8, 8, torch.logspace(0, -1, 8, dtype=torch.float64))
    X[..., 4:] *= smallest**0.5
    A = torch.stack([X.mT @ X, X @ X.mT])
    expected = fourth_root(A)
    for scale in (1e-200, 1.0, 1e200):
        Z = inverse_fourth_root(scale * A)
        assert (Z - expected).norm() < ROOT * expected.norm()
    assert (Z - Z.mT).norm() < 1e-10 * Z.norm()


def test_a_fourth_root_keeps_the_size_of_what_is_in_the_range_on_average():
    X = with_spectrum(6, 12, torch.logspace(0, -0.5, 6, dtype=torch.float64))
    Z, V = inverse_fourth_root(X.mT @ X), torch.linalg.svd(X)[2][:6]
    assert math.isclose((V @ Z).norm() / 6**0.5, 1, rel_tol=1e-3)


def test_of_zero_and_of_a_multiple_of_one_a_fourth_root_is_a_multiple_of_one():
    eye = torch.eye(5, dtype=torch.float64)
    zero, one = inverse_fourth_root(torch.stack([0 * eye, 1e30 * eye]))
    assert torch.allclose(zero, zero[0, 0] * eye) and torch.allclose(one, eye, atol=1e-5)


def test_wrong_settings_name_what_is_allowed():
    names = "exact, cubic, quintic, jordan, you, polar_express"
    with pytest.raises(ValueError, match=rf"^Polar.schedule\n  got: 'newton'\n  allowed: {names}\n  fix: "):
        Polar("newton")
    with pytest.raises(
        ValueError, match=r"^Polar.dtype\n  got: 'float16'\n  allowed: auto, float32, bfloat16\n  fix: "
    ):
        Polar(dtype="float16")  # type: ignore[arg-type]
