"""docs/theory.md §3, "Averages on and off": each of its sentences, in float64.

Oracles: the two identities of a duality map, monotonicity, Jensen's inequality; and the norms' own norm(), dual_norm()
and dualize().
"""

from collections.abc import Callable

import pytest
import torch
from optim.directions import DIRECTIONS
from optim.norms import Frobenius, L1ToRMS, Norm, RMSToLinf, RMSToRMS, VectorRMS
from optim.polar import Polar
from torch import Tensor

EXACT = RMSToRMS(Polar("exact"))
SAME = 1e-10  # what eigendecompositions of condition 1e4 leave
NORMS: dict[str, Norm] = {"spectral": EXACT, "Frobenius": Frobenius(), "rows": L1ToRMS(), "head": RMSToLinf()}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def power(A: Tensor, exponent: float) -> Tensor:
    """Of a positive definite matrix."""
    values, V = torch.linalg.eigh(A)
    return (V * values**exponent) @ V.mT


def definite(n: int, seed: int) -> Tensor:
    X = gaussian(n, 2 * n, seed=seed) * torch.logspace(0, -1, n, dtype=torch.float64)[:, None]
    return X @ X.mT


def step(norm: Norm, M: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """A^(−1/2) dualize(A^(−1/2) M B^(−1/2)) B^(−1/2)."""
    left, right = power(A, -0.5), power(B, -0.5)
    return left @ norm.dualize(left @ M @ right) @ right


def polar(G: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


def inner(X: Tensor, Y: Tensor) -> float:
    return (X * Y).sum().item()


def spectral_norm(X: Tensor) -> float:
    return torch.linalg.svdvals(X)[0].item()


# ---- fixed averages: the norm in which the step is steepest descent


@pytest.mark.parametrize("name", NORMS)
def test_there_and_back_is_the_duality_map_of_the_norm_in_those_coordinates(name: str):
    norm, A, B, M = NORMS[name], definite(6, 1), definite(4, 2), gaussian(6, 4)
    T = step(norm, M, A, B)

    def own(W: Tensor) -> Tensor:
        return norm.norm(power(A, 0.5) @ W @ power(B, 0.5))

    assert abs(own(T).item() - 1) < SAME
    dual = norm.dual_norm(power(A, -0.5) @ M @ power(B, -0.5)).item()
    assert abs(inner(M, T) / dual - 1) < SAME
    for seed in range(20):  # no other weight of the unit ball has more of M, and more than that none has
        W = gaussian(6, 4, seed=10 + seed)
        assert inner(M, W / own(W)) < dual


@pytest.mark.parametrize("name", ["spectral", "Frobenius"])
@pytest.mark.parametrize("direction", ["factored", "whitened"])
def test_the_directions_step_has_both_identities_with_the_whitened_average(direction: str, name: str):
    norm, rule = NORMS[name], DIRECTIONS[direction].on(NORMS[name], None)  # type: ignore[arg-type]
    state = {k: b[None] for k, b in rule.buffers(gaussian(6, 4)).items()}
    settings = {"live": torch.ones(1, 1, 1).double(), "beta": 0.9, "beta2": 0.8, "refresh": True}
    for seed in range(5):
        G = gaussian(1, 6, 4, seed=seed) * torch.logspace(0, -1, 6, dtype=torch.float64)[:, None]
        D, back = rule.whiten(G.clone(), state, **settings)  # type: ignore[arg-type]
    assert back is not None
    ahead = 0.1 * G + 0.9 * state["momentum"]
    X, Y = gaussian(1, 6, 4, seed=11), gaussian(1, 6, 4, seed=12)
    assert abs(inner(X, back(Y.clone())) - inner(back(X.clone()), Y)) < SAME and inner(X, back(X.clone())) > 0
    whitened, T = back(ahead.clone()), back(norm.dualize(D))
    assert torch.allclose(D, back(whitened.clone()), atol=SAME)
    assert abs(inner(whitened, T) / norm.dual_norm(D).item() - 1) < SAME


@pytest.mark.parametrize("name", ["rows", "head"])
def test_rows_of_full_size_are_those_of_the_duality_map_but_for_a_positive_factor_each(name: str):
    """The step is dualize(M R^(−3/4)), without r."""
    norm, M, R = NORMS[name], gaussian(6, 4), definite(4, 2)
    r = gaussian(6, seed=3).square()
    whitened = r[:, None] ** -0.25 * M @ power(R, -0.25)
    exact = step(norm, whitened, r.sqrt().diag(), power(R, 0.5))
    taken = norm.dualize(M @ power(R, -0.75))
    length = torch.linalg.vector_norm
    factor = r**0.25 * length(M @ power(R, -0.5), dim=-1) / length(M @ power(R, -0.75), dim=-1)
    assert torch.allclose(taken, factor[:, None] * exact, rtol=SAME)


def test_a_vector_of_full_size_is_the_duality_map_but_for_one_positive_factor():
    norm, m, v = VectorRMS(), gaussian(5), gaussian(5, seed=1).square()
    exact = v**-0.25 * norm.dualize(v**-0.25 * m)
    taken = norm.dualize(m / v.sqrt())
    factor = torch.linalg.vector_norm(v**-0.25 * m) / torch.linalg.vector_norm(v**-0.5 * m)
    assert torch.allclose(taken, factor * exact, rtol=SAME)


# ---- without the way back


def test_without_the_way_back_a_step_is_no_duality_map_of_any_norm():
    """A duality map is a subgradient of a convex function, the dual norm, and so monotone."""
    P = torch.tensor([1.0, 9.0], dtype=torch.float64).diag()
    M, N = torch.tensor([[[9.0, 1.0]], [[10.0, 1.5]]], dtype=torch.float64)

    def monotone(f: Callable[[Tensor], Tensor]) -> float:
        return inner(f(M) - f(N), M - N)

    for norm in NORMS.values():
        assert monotone(lambda X, n=norm: n.dualize(X @ P)) < -0.05 * norm.dual_norm(M - N).item() / 2
        assert monotone(lambda X, n=norm: n.dualize(X @ P) @ P) > 0, "there and back"


def test_whitened_on_both_sides_and_not_carried_back_a_step_may_be_none_of_descent():
    M = torch.tensor([[3.0, 1.0], [1.0, 0.25]], dtype=torch.float64)
    P = torch.tensor([1.0, 16.0], dtype=torch.float64).diag()
    assert inner(M, polar(P @ M @ P)) < -1
    assert inner(M, P @ polar(P @ M @ P) @ P) > 0, "carried back it is"
    # So the directions' step is one of descent for the whitened average, and here not for the average itself.
    N = torch.linalg.inv(P) @ M @ torch.linalg.inv(P)
    assert inner(N, P @ polar(P @ P @ N @ P @ P) @ P) < 0


@pytest.mark.parametrize("seed", range(5))
def test_whitened_on_one_side_alone_a_step_is_one_of_descent(seed: int):
    """⟨M, U Vᵀ⟩ = tr(S Uᵀ P⁻¹ U) > 0 of P M = U S Vᵀ."""
    P, M = power(definite(4, seed), -0.5), gaussian(4, 6, seed=10 + seed)
    U, S, Vh = torch.linalg.svd(P @ M, full_matrices=False)
    expected = (S * (U.mT @ torch.linalg.inv(P) @ U).diagonal()).sum().item()
    assert abs(inner(M, U @ Vh) / expected - 1) < SAME and expected > 0
    assert inner(M, P @ polar(P @ P @ M)) > 0, "whitened, there and back"


# ---- averages off: one gradient, no momentum


def test_with_averages_off_one_side_alone_is_the_polar_factor_before_any_dualize():
    """[OO]'s identity of Shampoo, whose two fourth roots are one square root."""
    G = gaussian(6, 4)
    assert torch.allclose(G @ power(G.mT @ G, -0.5), polar(G), atol=SAME)
    assert torch.allclose(EXACT.dualize(G @ power(G.mT @ G, -0.5)), EXACT.dualize(G), atol=SAME)


def test_with_averages_off_there_and_back_is_no_old_optimizer():
    """U S^(−1/2) Vᵀ: it goes as far the less it sees. Only of orthogonal columns, which are white, is it the polar
    factor.
    """
    G, units = gaussian(6, 4), (6 / 4) ** 0.5
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    one = torch.eye(6, dtype=torch.float64)
    T = step(EXACT, G, one, power(G.mT @ G, 0.5))
    assert torch.allclose(T, units * (U * S**-0.5) @ Vh, atol=SAME)
    assert torch.allclose(T, units * G @ power(G.mT @ G, -0.75), atol=SAME)
    assert abs(inner(G, T) / (units * S.sqrt().sum().item()) - 1) < SAME
    white = 3 * polar(G)
    T = step(EXACT, white, one, power(white.mT @ white, 0.5))
    assert torch.allclose(3**0.5 * T, EXACT.dualize(G), atol=SAME)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 6)])
def test_with_averages_off_factored_dualizes_the_sign_of_vectors_and_of_matrices_of_one_line(shape: tuple[int, ...]):
    """[OO]'s identity of Adam; of a matrix's line, carried back, sign(g) |g|^(−1/2)."""
    norm = VectorRMS() if len(shape) == 1 else EXACT
    rule, G = DIRECTIONS["factored"].on(norm, None), gaussian(1, *shape)  # type: ignore[arg-type]
    state = {k: b[None] for k, b in rule.buffers(G[0]).items()}
    live = torch.ones(1, *(1 for _ in shape), dtype=torch.float64)
    D, back = rule.whiten(G.clone(), state, live=live, beta=0.0, beta2=0.0, refresh=True)
    assert torch.allclose(D, D.abs().amax() * G.sign(), rtol=SAME)
    if back is not None:
        T, expected = back(norm.dualize(D)), G.sign() * G.abs() ** -0.5
        assert torch.allclose(T, T.abs().amax() / expected.abs().amax() * expected, rtol=SAME)


# ---- averages on: Jensen's inequality


def averages(noise: float, seed: int = 0, n: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """(gradients, their mean M, E GᵀG)."""
    G = gaussian(6, 4, seed=seed) + noise * gaussian(n, 6, 4, seed=seed + 1)
    return G, G.mean(0), (G.mT @ G).mean(0)


@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
def test_the_mean_over_the_root_of_the_mean_square_is_inside_the_ball(noise: float):
    _, M, R = averages(noise)
    spread = torch.linalg.eigvalsh(R - M.mT @ M)
    assert spread[0] > 0, "E GᵀG − MᵀM is the covariance"
    white = torch.linalg.svdvals(M @ power(R, -0.5))
    assert white[0] < 1
    _, still, still_R = averages(0.0)
    assert torch.allclose(torch.linalg.svdvals(still @ power(still_R, -0.5)), torch.ones(4).double(), atol=SAME)


def test_it_touches_the_ball_only_where_there_is_no_noise():
    noise = 0.5 * gaussian(8, 6, 4, seed=1)
    noise[..., 0] = 0  # none along x
    G = gaussian(6, 4) + noise
    M, R = G.mean(0), (G.mT @ G).mean(0)
    values, x = torch.linalg.svdvals(M @ power(R, -0.5)), torch.eye(4, dtype=torch.float64)[0]
    assert abs(values[0].item() - 1) < SAME and values[1] < 1
    assert torch.allclose(R @ x, M.mT @ M @ x, atol=SAME)


def test_of_row_and_column_means_together_no_such_bound_holds_but_of_each_alone():
    M = torch.eye(2, dtype=torch.float64)  # of one gradient, without any noise
    r, c = M.square().mean(1), M.square().mean(0)
    assert (M.abs() / (r[:, None] * c / r.mean()).sqrt()).amax() > 1.4, "Adafactor's second moment"
    G, mean, _ = averages(0.5)
    assert (mean.square().mean(1) <= G.square().mean((0, 2))).all(), "rows"
    assert (mean.square().mean(0) <= G.square().mean((0, 1))).all(), "columns"
