"""The norms of single tensors, their dual norms, and the duality maps that attain them.

O, I: fan-out and fan-in of a linear map y = W x, W (..., O, I); leading dimensions stack equal-shaped weights.
rms(x) = ‖x‖₂ / √dim. ⟨A, B⟩ = Σ A∘B. Every method is pure.
Sources: [MD] Bernstein, Newhouse, arXiv 2410.21265, §4; [OO] Bernstein, Newhouse, arXiv 2409.20325; [SN] Pethick et al., arXiv 2502.07529.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from .polar import Polar


class Norm:
    """A norm on one weight. Two identities hold for G ≠ 0: norm(dualize(G)) == 1 and ⟨G, dualize(G)⟩ == dual_norm(G).

    dualize(0) == 0, and dualize(c·G) == dualize(G) for c > 0, at any scale of finite G. A subclass defines norm, dual_norm, dualize.
    """

    ndim = 2  # dimensions of one weight, the trailing ones of a stack
    rowwise = False  # the norm is a maximum over rows, and each row is dualized by itself

    def norm(self, W: Tensor) -> Tensor:
        """(..., O, I) → (...): the norm's value."""
        raise NotImplementedError

    def dual_norm(self, G: Tensor) -> Tensor:
        """(..., O, I) → (...): max ⟨G, T⟩ over norm(T) <= 1."""
        raise NotImplementedError

    def dualize(self, G: Tensor) -> Tensor:
        """(..., O, I) → same shape and dtype: a T of norm 1 that attains the dual norm."""
        raise NotImplementedError

    def sharp(self, G: Tensor) -> Tensor:
        """dual_norm(G) · dualize(G): the maximiser of ⟨G, T⟩ − norm(T)²/2, the step of plain steepest descent [OO]."""
        return self._per_weight(self.dual_norm(G)) * self.dualize(G)

    def project(self, W: Tensor) -> Tensor:
        """Onto the unit ball, radially: W / max(1, norm(W)); row by row for row-wise norms."""
        return W / self._per_weight(self.norm(W)).clamp(min=1).to(W.dtype)

    def init(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """A random weight of norm 1 and this shape, float32: the dual of a Gaussian."""
        return self.dualize(torch.randn(*shape, generator=generator))

    def _per_weight(self, value: Tensor) -> Tensor:
        return value.reshape(*value.shape, *(1,) * self.ndim)

    def __str__(self) -> str:
        return type(self).__name__


NORMS: dict[str, Callable[..., Norm]] = {}
N = TypeVar("N", bound=type[Norm])


def register_norm(cls: N) -> N:
    """Make a norm known by its class name, so that configurations can name it."""
    NORMS[cls.__name__] = cls
    return cls


def _at_least_fp32(G: Tensor) -> Tensor:
    return G if G.dtype == torch.float64 else G.float()


def _unit(G: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """G / ‖G‖₂ and ‖G‖₂ over dims (kept). Scaled by the largest entry first: no square under- or overflows; 0 stays 0."""
    G = _at_least_fp32(G)
    largest = G.abs().amax(dim=dims, keepdim=True)
    X = G / torch.where(largest > 0, largest, 1)
    length = torch.linalg.vector_norm(X, dim=dims, keepdim=True)  # 0, or between 1 and √numel
    return X / length.clamp(min=1), largest * length


@register_norm
@dataclass(frozen=True)
class RMSToRMS(Norm):
    """√(I/O) σ_max(W), the operator norm between RMS norms: hidden linear maps [MD]. Within the polar schedule's band of 1 where it is not exact."""

    polar: Polar = field(default=Polar())

    def norm(self, W: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(_at_least_fp32(W), ord=2) / self._scale(W)

    def dual_norm(self, G: Tensor) -> Tensor:
        X, length = _unit(G, (-2, -1))
        return self._scale(G) * length[..., 0, 0] * torch.linalg.svdvals(X).sum(-1)

    def dualize(self, G: Tensor) -> Tensor:
        return self.polar(G) * self._scale(G)

    def init(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """√(O/I) times a semi-orthogonal matrix, uniform (Haar): the exact polar factor of a Gaussian, by QR, which is cheaper than the SVD."""
        G = torch.randn(*shape, generator=generator)
        Q, R = torch.linalg.qr(G if shape[-2] >= shape[-1] else G.mT)
        Q = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        return (Q if shape[-2] >= shape[-1] else Q.mT) * self._scale(G)

    @staticmethod
    def _scale(W: Tensor) -> float:
        return (W.shape[-2] / W.shape[-1]) ** 0.5

    def __str__(self) -> str:
        return f"RMSToRMS[{self.polar.schedule}]"


class _RowWise(Norm):
    """A maximum over rows of c ‖row‖₂, c given by the width: dualize gives every non-zero row its full size 1/c."""

    rowwise = True

    def _row_factor(self, width: int) -> float:
        raise NotImplementedError

    def norm(self, W: Tensor) -> Tensor:
        return self._row_factor(W.shape[-1]) * _unit(W, (-1,))[1].amax(dim=(-2, -1))

    def dual_norm(self, G: Tensor) -> Tensor:
        return _unit(G, (-1,))[1].sum(dim=(-2, -1)) / self._row_factor(G.shape[-1])

    def dualize(self, G: Tensor) -> Tensor:
        return (_unit(G, (-1,))[0] / self._row_factor(G.shape[-1])).to(G.dtype)

    def project(self, W: Tensor) -> Tensor:
        return W / (self._row_factor(W.shape[-1]) * _unit(W, (-1,))[1]).clamp(min=1).to(W.dtype)


@register_norm
@dataclass(frozen=True)
class L1ToRMS(_RowWise):
    """max over rows of rms(row): embeddings (V, D), one row a token [MD]."""

    def _row_factor(self, width: int) -> float:
        return width**-0.5


@register_norm
@dataclass(frozen=True)
class RMSToLinf(_RowWise):
    """√I · max over rows of ‖row‖₂, the operator norm from RMS to the largest logit: heads (V, I) [SN]."""

    def _row_factor(self, width: int) -> float:
        return width**0.5


@register_norm
@dataclass(frozen=True)
class L1ToLinf(Norm):
    """max entry: sign descent [OO]."""

    rowwise = True  # entry by entry, even

    def norm(self, W: Tensor) -> Tensor:
        return W.abs().amax(dim=(-2, -1))

    def dual_norm(self, G: Tensor) -> Tensor:
        return _at_least_fp32(G).abs().sum(dim=(-2, -1))

    def dualize(self, G: Tensor) -> Tensor:
        return G.sign()


@register_norm
@dataclass(frozen=True)
class Frobenius(Norm):
    """‖W‖_F: normalized gradient descent [OO]."""

    def norm(self, W: Tensor) -> Tensor:
        return _unit(W, (-2, -1))[1][..., 0, 0]

    def dual_norm(self, G: Tensor) -> Tensor:
        return self.norm(G)

    def dualize(self, G: Tensor) -> Tensor:
        return _unit(G, (-2, -1))[0].to(G.dtype)

    def sharp(self, G: Tensor) -> Tensor:
        """G itself: ‖G‖_F · G/‖G‖_F without the rounding."""
        return G


@register_norm
@dataclass(frozen=True)
class VectorRMS(Norm):
    """rms(b) of a vector (..., O): biases [MD]."""

    ndim = 1

    def norm(self, W: Tensor) -> Tensor:
        return _unit(W, (-1,))[1][..., 0] / W.shape[-1] ** 0.5

    def dual_norm(self, G: Tensor) -> Tensor:
        return _unit(G, (-1,))[1][..., 0] * G.shape[-1] ** 0.5

    def dualize(self, G: Tensor) -> Tensor:
        return (_unit(G, (-1,))[0] * G.shape[-1] ** 0.5).to(G.dtype)
