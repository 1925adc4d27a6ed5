"""The polar factor U Vᵀ of a matrix G = U S Vᵀ, exactly or by odd matrix polynomials; the largest
singular value.

m, n: rows and columns of one matrix. Everything takes stacks (..., m, n).
Sources: [MU] kellerjordan.github.io/posts/muon; [PE] arXiv 2505.16932; [GN] Zhang, Amsel, Chen,
Dao, Gram Newton-Schulz, 2026.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import require

Coefficients = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Schedule:
    """A fixed sequence of steps X ← aX + b(XXᵀ)X + c(XXᵀ)²X on X = G / (safety · ‖G‖_F).

    coefficients, safety factor and band are one value: a table run with another table's safety
    factor has another band. band: where singular values from [floor, 1] · ‖G‖_F land, in exact
    arithmetic, rounded outward (measured: tests/test_polar.py).
    """

    name: str
    coefficients: Coefficients
    safety: float
    band: tuple[float, float]
    floor: float = 1e-3


def _over(divisor: int, *rows: tuple[int, int, int]) -> Coefficients:
    return tuple((a / divisor, b / divisor, c / divisor) for a, b, c in rows)


SCHEDULES = {
    s.name: s
    for s in (
        # The classical cubic and quintic Newton-Schulz iterations (Higham, Functions of Matrices,
        # ch. 8).
        Schedule("cubic", ((1.5, -0.5, 0.0),) * 12, 1.0, (0.129, 1.0)),
        Schedule("quintic", ((2.0, -1.5, 0.5),) * 12, 1.0, (0.99999, 1.00001)),
        Schedule("jordan", ((3.4445, -4.7750, 2.0315),) * 5, 1.0, (0.470, 1.203)),  # [MU]
        Schedule(  # You Jiacheng's six steps, as published with [MU]'s successors.
            "you",
            _over(
                1024,
                (3955, -8306, 5008),
                (3735, -6681, 3463),
                (3799, -6499, 3211),
                (4019, -6385, 2906),
                (2677, -3029, 1162),
                (2172, -1833, 682),
            ),
            1.0,
            (0.866, 1.0),
        ),
        # [PE] with the safety factor 1.02 on ‖G‖_F, the pair that modded-nanogpt and dion use.
        Schedule(
            "polar_express",
            (
                (8.156554524902461, -22.48329292557795, 15.878769915207462),
                (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
            ),
            1.02,
            (0.846, 1.142),
        ),
    )
}

# The Gram form accumulates rounding errors faster than the plain one; X is formed anew ("restart")
# every so many steps. In float32 this period follows the plain form within 2e-4 on log-uniform
# spectra. In bfloat16 no period but 1, the plain form, keeps the band: 2 leaves it by up to 0.1 on
# log-uniform and rank-one spectra, and 9 diverges (tests/test_polar.py), so that bfloat16 is plain
# unless gram is asked for.
GRAM_PERIOD = {torch.float64: 3, torch.float32: 3, torch.bfloat16: 2}
# The Gram form has fewer FLOPs exactly above n/m = 1.5 [GN]; from 2 on it also fits in two
# temporaries of X's size.
GRAM_ASPECT = 2.0


def _even(A: Tensor, b: float, c: float) -> Tensor:
    """Return bA + cA², without a product where c = 0.

    In bfloat16 on a CPU with AVX512-BF16, torch 2.11 to 2.14, baddbmm(alpha=0) is A, not bA.
    """
    return torch.baddbmm(A, A, A, beta=b, alpha=c) if c else b * A


def plain(X: Tensor, coefficients: Coefficients, *, inplace: bool = False) -> Tensor:
    """Return the iteration's result on X (b, m, n), m <= n.

    inplace: in X, with at most two more tensors of its size.
    """
    for a, b, c in coefficients:
        A = X @ X.mT
        P = _even(A, b, c)
        del A
        Y = torch.baddbmm(X, P, X, beta=a)
        X = X.copy_(Y) if inplace else Y
        del P, Y
    return X


def gram(X: Tensor, coefficients: Coefficients, *, inplace: bool = False) -> Tensor:
    """Return what plain() does, through R = XXᵀ (b, m, m) and the product Q of polynomials [GN]."""
    Q = R = None
    for step, (a, b, c) in enumerate(coefficients, start=1):
        R = X @ X.mT if R is None else R
        P = _even(R, b, c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P if Q is None else P @ Q
        if step % GRAM_PERIOD[X.dtype] == 0 or step == len(coefficients):
            R = P = None
            X = X.copy_(Q @ X) if inplace else Q @ X
            Q = None
        else:
            R = P @ R
            R = R @ P
    return X


def exact(G: Tensor) -> Tensor:
    """Return U Vᵀ over the singular values above √ε of the largest.

    A rank-deficient G gives the partial isometry that the schedules tend to. What is smaller may be
    rounding: of sums in another order, of averages that cancel, of quotients as a direction makes
    them (SOAP's entries are known to √ε). The schedules bring nothing below 1e-3 ‖G‖_F to full size
    either; float32's √ε is 3.5e-4, float64's 1.5e-8.
    """
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    kept = torch.finfo(G.dtype).eps ** 0.5 * S[..., :1] < S
    return (U * kept.to(U.dtype).unsqueeze(-2)) @ Vh


@dataclass(frozen=True)
class Polar:
    """How a polar factor is computed."""

    schedule: str = "polar_express"
    """"exact" (an SVD), or the steps of an iteration (SCHEDULES): "cubic", "quintic", "jordan",
    "you" or "polar_express"."""

    form: Literal["auto", "plain", "gram"] = "auto"
    """"gram" works on XXᵀ, which is smaller than a long X; "plain" on X. "auto": gram from the
    aspect ratio GRAM_ASPECT on, except in bfloat16."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the iteration. "auto": bfloat16 on an accelerator, float32 on a CPU, and in
    train_gpt.py that of run.precision. float64 input is always iterated in float64."""

    def __post_init__(self) -> None:
        allowed = {
            "schedule": ("exact", *SCHEDULES),
            "form": ("auto", "plain", "gram"),
            "dtype": ("auto", "float32", "bfloat16"),
        }
        for field, names in allowed.items():
            value, fix = getattr(self, field), f"Polar({field}={names[0]!r})"
            words = ", ".join(names)
            require(value in names, f"Polar.{field}", got=repr(value), allowed=words, fix=fix)

    @property
    def band(self) -> tuple[float, float]:
        """Return where singular values from [1e-3, 1] · ‖G‖_F land, in exact arithmetic."""
        return (1.0, 1.0) if self.schedule == "exact" else SCHEDULES[self.schedule].band

    def __call__(self, G: Tensor, *, inplace: bool = False) -> Tensor:
        """Return the polar factor of each matrix of G (..., m, n), in G's dtype.

        It does not depend on G's scale, and is 0 for a zero matrix. inplace: G may be overwritten;
        where the iteration is in G's dtype, it then needs two more tensors of G's size, no third.
        """
        X = G.double() if G.dtype == torch.float64 else G.float()
        # Divided by its own largest entry first, ‖X‖_F is in [1, √(mn)]: no square under- or
        # overflows, and 0 stays 0.
        largest = X.amax(dim=(-2, -1), keepdim=True).maximum(-X.amin(dim=(-2, -1), keepdim=True))
        scale = torch.where(largest > 0, largest, 1)
        X = X.div_(scale) if inplace or X is not G else X / scale
        if self.schedule == "exact":
            return exact(X).to(G.dtype)
        schedule = SCHEDULES[self.schedule]
        X.div_(schedule.safety * torch.linalg.matrix_norm(X, keepdim=True).clamp(min=1))
        tall = X.shape[-2] > X.shape[-1]
        X = (X.mT if tall else X).to(self._iteration_dtype(G))
        X = X.reshape(-1, *X.shape[-2:])
        X = self._form(X.shape, X.dtype)(X, schedule.coefficients, inplace=True)
        return (X.mT if tall else X).reshape(G.shape).to(G.dtype)

    def flops(self, m: int, n: int) -> int:
        """Return the FLOPs of the matrix products for one matrix (m, n).

        A multiplication with its addition counts 2, dtype "auto" as float32. The SVD has
        6 n m² + 20 m³ for m <= n (Golub, Van Loan, Matrix Computations, 4th ed., fig. 8.6.1: R-SVD
        with U₁, Σ, V).
        """
        m, n = sorted((m, n))
        dtype = torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        if self.schedule == "exact":
            return 6 * n * m * m + 20 * m**3
        coefficients, side, square = SCHEDULES[self.schedule].coefficients, 2 * m * m * n, 2 * m**3
        steps, squares = len(coefficients), square * sum(c != 0 for _, _, c in coefficients)
        if self._form((1, m, n), dtype) is plain:
            return 2 * side * steps + squares
        ends = [step == steps or step % GRAM_PERIOD[dtype] == 0 for step in range(1, steps + 1)]
        starts = [True, *ends[:-1]]
        return squares + sum(
            side * (start + end) + square * ((not start) + 2 * (not end))
            for start, end in zip(starts, ends, strict=True)
        )

    def _form(self, shape: Sequence[int], dtype: torch.dtype) -> Callable[..., Tensor]:
        """Return the iteration for X (..., m, n), m <= n."""
        pays = shape[-1] >= GRAM_ASPECT * shape[-2] and dtype != torch.bfloat16
        return gram if self.form == "gram" or (self.form == "auto" and pays) else plain

    def _iteration_dtype(self, G: Tensor) -> torch.dtype:
        if G.dtype == torch.float64:
            return torch.float64
        if self.dtype == "auto":
            return torch.float32 if G.device.type == "cpu" else torch.bfloat16
        return getattr(torch, self.dtype)


def at_least_fp32(G: Tensor) -> Tensor:
    """Return G in float32, or as it is in float64."""
    return G if G.dtype == torch.float64 else G.float()


def to_unit_length(
    G: Tensor, dims: tuple[int, ...], *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Return G / ‖G‖₂ and ‖G‖₂ over dims (kept); 0 stays 0.

    It is scaled by the largest entry first, so that no square under- or overflows.
    """
    G = at_least_fp32(G)
    largest = G.abs().amax(dim=dims, keepdim=True)
    scale = torch.where(largest > 0, largest, 1)
    X = G.div_(scale) if inplace else G / scale
    length = torch.linalg.vector_norm(X, dim=dims, keepdim=True)  # 0, or between 1 and √numel
    return X.div_(length.clamp(min=1)), largest * length


def spectral_norm(W: Tensor, squarings: int = 7, steps: int = 15) -> Tensor:
    """Return σ_max of (..., m, n) by matrix products alone, from below and within 1e-3.

    The longest column of A = (W Wᵀ)^(2^squarings) is turned towards the leading singular vector,
    and further by `steps` products with A. Its gain under Wᵀ is σ_max. The error is at worst about
    ln(m) / (2^(squarings + 2) (steps + 1)), whatever the spectrum's gap: 5e-4 at m = 1024.
    """
    X, length = to_unit_length(W, (-2, -1))
    X = X if X.shape[-2] <= X.shape[-1] else X.mT
    A = X @ X.mT
    for _ in range(squarings):
        A = A @ A
        A = A / A.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(A.dtype).tiny)
    longest = torch.linalg.vector_norm(A, dim=-2, keepdim=True).argmax(-1, keepdim=True)
    v = A.gather(-1, longest.expand(*A.shape[:-1], 1))
    for _ in range(steps):
        v = A @ v
        v = v / v.abs().amax(dim=-2, keepdim=True).clamp(min=torch.finfo(A.dtype).tiny)
    gain = torch.linalg.vector_norm(X.mT @ v, dim=(-2, -1)) / torch.linalg.vector_norm(
        v, dim=(-2, -1)
    ).clamp(min=torch.finfo(A.dtype).tiny)
    return gain * length[..., 0, 0]


DAMPING = 1e-4  # of a matrix's Frobenius norm, added before an inverse root: its condition is 1e4


def inverse_fourth_root(A: Tensor) -> Tensor:
    """Return A^(−1/4) of positive semidefinite matrices (..., n, n), by matrix products alone.

    A is overwritten. Its eigenvalues are damped by DAMPING ‖A‖_F. The result Z is scaled so that a
    matrix with orthonormal rows within the range of A keeps its size on average: tr(Z² P) = tr P,
    where P is the projection on the range, A (A + damping)⁻¹. Of A = 0 it is a multiple of 1.
    Source of the coupled iteration: Higham, Functions of Matrices, ch. 6; its coefficients are
    [PE]'s, then two quintic steps.
    """
    X = at_least_fp32(A)
    largest = X.abs().amax((-2, -1), keepdim=True)
    X = X.div_(torch.where(largest > 0, largest, 1))
    X = X.div_(torch.linalg.matrix_norm(X, keepdim=True).clamp(min=1))
    X.diagonal(dim1=-2, dim2=-1).add_(DAMPING)
    # Eigenvalues are from 1e-4 on, then from 1e-2: steps for smaller ones are left out.
    steps = (*SCHEDULES["polar_express"].coefficients, *QUINTIC)
    Z = _root(_root(X, steps[1:]), steps[2:], inverse=True)
    square = Z @ Z
    fourth = square @ square  # (A + damping)⁻¹
    known = X.shape[-1] - DAMPING * _trace(fourth)
    size = _trace(square) - DAMPING * (square * fourth).sum((-2, -1))
    scale = torch.where((known > 0) & (size > 0), (known / size).abs(), 1).sqrt()
    return Z.mul_(scale[..., None, None]).to(A.dtype)


QUINTIC = (
    (1.875, -1.25, 0.375),
) * 2  # cubic convergence at 1: Higham, Functions of Matrices, ch. 8


def _root(A: Tensor, steps: Coefficients, *, inverse: bool = False) -> Tensor:
    """Return A^(1/2), or A^(−1/2), of positive definite matrices of norm 1 at most."""
    Y, Z = A, None
    for i, (a, b, c) in enumerate(steps, start=1):
        T = Y if Z is None else Z @ Y
        P = (T @ T).mul_(c).add_(T, alpha=b)
        del T
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        last = i == len(steps)
        Y = Y if last and inverse else Y @ P
        Z = Z if last and not inverse else P if Z is None else P @ Z
    assert Z is not None
    return Z if inverse else Y


def _trace(A: Tensor) -> Tensor:
    return A.diagonal(dim1=-2, dim2=-1).sum(-1)
