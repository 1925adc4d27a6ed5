"""The norms of single weights, their dual norms, and the duality maps that attain them.

O, I: fan-out and fan-in of a linear map y = W x, W (..., O, I); leading dimensions stack weights of
one shape. rms(x) = ‖x‖₂ / √dim. ⟨A, B⟩ = Σ A∘B. A block is what a norm treats by itself: a matrix,
a head, a row, a slice of a convolution. Every method is pure but dualize_.
Sources: [MD] Bernstein, Newhouse, arXiv 2410.21265, §4; [OO] Bernstein, Newhouse, arXiv 2409.20325;
[SN] Pethick et al., arXiv 2502.07529.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from .axes import Axes, matrix_axes
from .errors import Refusal
from .plugins import require_free, require_part
from .polar import SCHEDULES, Polar, at_least_fp32, plain, spectral_norm, to_unit_length


class Norm:
    """A norm on one weight. A subclass defines norm, dual_norm and dualize.

    Two identities hold for G ≠ 0: norm(dualize(G)) == 1 and ⟨G, dualize(G)⟩ == dual_norm(G). Also
    dualize(0) == 0, and dualize(c·G) == dualize(G) for c > 0, at any scale of finite G.
    """

    ndim: int = 2  # dimensions of one weight, the trailing ones of a stack
    # True: each slice of the first dimension is dualized (retracted) as it is in the whole weight.
    # Then ranks may hold slices.
    dualizes_by_rows: bool = False
    retracts_by_rows: bool = False
    # Each of these may have a positive factor of its own in G, which dualize ignores: "blocks",
    # "rows" of blocks, "entries".
    ignores: str = "blocks"

    def norm(self, W: Tensor) -> Tensor:
        """Return the norm of each weight, (..., O, I) → (...)."""
        raise NotImplementedError

    def dual_norm(self, G: Tensor) -> Tensor:
        """Return max ⟨G, T⟩ over norm(T) <= 1, (..., O, I) → (...)."""
        raise NotImplementedError

    def dualize(self, G: Tensor) -> Tensor:
        """Return a T of norm 1 that attains the dual norm, of G's shape and dtype."""
        raise NotImplementedError

    def dualize_(self, G: Tensor) -> Tensor:
        """Return dualize(G); G may be overwritten."""
        return self.dualize(G)

    def sharp(self, G: Tensor) -> Tensor:
        """Return dual_norm(G) · dualize(G), the T of largest ⟨G, T⟩ − norm(T)²/2: plain steepest
        descent [OO]."""
        return (self._per_weight(self.dual_norm(G)) * self.dualize(G)).to(G.dtype)

    def size(self, W: Tensor) -> Tensor:
        """Return norm(W) as training computes it, within 1e-3 and fast."""
        return self.norm(W)

    def normalize(self, W: Tensor) -> Tensor:
        """Return W / norm(W), one scalar for the whole weight; 0 stays 0."""
        size = self.size(W)
        return (W / self._per_weight(torch.where(size > 0, size, 1))).to(W.dtype)

    def project(self, W: Tensor) -> Tensor:
        """Return W / max(1, norm(W)), block by block; here the block is the whole weight."""
        return (W / self._per_weight(self.size(W)).clamp(min=1)).to(W.dtype)

    def sphere(self, W: Tensor) -> Tensor:
        """Return W on the unit sphere, radially, block by block; a block of zeros stays."""
        return self.normalize(W)

    def stiefel(self, W: Tensor) -> Tensor:
        """Return W with every singular value at full size; sphere(W) where a norm knows of none."""
        return self.sphere(W)

    def live(self, G: Tensor) -> Tensor:
        """Return which blocks have a gradient: bools, broadcastable to G (..., O, I).

        Here the block is the whole weight. Blocks whose gradient is exactly zero do not move. Of
        weights whose blocks reach over ranks G has zeros and ones alone, and may be one long, or on
        the device "meta", in a dimension over which blocks reach.
        """
        return nonzero(G, tuple(range(-self.ndim, 0))) if self.ndim else G != 0

    def axes(self, shape: Sequence[int]) -> Axes | None:
        """Return the dimensions of one weight as its blocks have them, for means over rows and
        columns; here the block is the whole weight. None where blocks are vectors or scalars."""
        return matrix_axes(shape)

    def matrices(self, W: Tensor) -> list[tuple[Tensor, float]]:
        """Return [(X (n, blocks, O, I), σ)]: the matrices that a spectral norm sees in a stack
        (n, *shape), and the singular values σ that dualize gives them. Other norms see none."""
        return []

    def init(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Return a random weight of norm 1 and this shape, float32: the dual of a Gaussian."""
        return self.dualize(torch.randn(tuple(shape), generator=generator))

    def update_rms(self, shape: Sequence[int]) -> float:
        """Return the RMS of the entries of dualize(G), for G without zeros and of full rank."""
        raise NotImplementedError

    def flops(self, shape: Sequence[int]) -> int:
        """Return the FLOPs of dualize for one weight: those of its matrix products, where it has
        any, else 4 an entry (|x|, x², two products)."""
        return 4 * prod(shape)

    def check(self, shape: Sequence[int]) -> str | None:
        """Return None if a weight of this shape fits, and otherwise which shapes do, in words."""
        fits = len(shape) == self.ndim and prod(shape)
        return None if fits else f"{self.ndim} dimensions, none of them 0"

    def _per_weight(self, value: Tensor) -> Tensor:
        return value.reshape((*value.shape, *(1,) * self.ndim))

    def __str__(self) -> str:
        return type(self).__name__


NORMS: dict[str, Callable[..., Norm]] = {}
N = TypeVar("N", bound=type[Norm])


def register_norm(cls: N) -> N:
    """Make a norm known by its class name, so that configurations can name it.

    It must be constructible without arguments.
    """
    require_free("register_norm", cls.__name__, cls, NORMS.get(cls.__name__))
    require_part("register_norm", cls, Norm)
    NORMS[cls.__name__] = cls
    return cls


def nonzero(G: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return whether any entry over these dimensions (kept, of size 1) differs from 0.

    On a CPU this takes a seventh of the time of (G != 0).any().
    """
    return (G.amax(dims, keepdim=True) != 0) | (G.amin(dims, keepdim=True) != 0)


# How large a spectral step is, named by formula, as libraries differ. Sources: [MD], the operator
# norm between RMS norms; [OO]; Jordan et al., kellerjordan.github.io/posts/muon; Liu et al., arXiv
# 2502.16982, which gives it the RMS of AdamW's.
SCALES: dict[str, Callable[[float, float], float]] = {
    "sqrt(O/I)": lambda O, I: (O / I) ** 0.5,  # noqa: E741
    "1": lambda O, I: 1.0,  # noqa: E741
    "sqrt(max(1, O/I))": lambda O, I: max(1.0, O / I) ** 0.5,  # noqa: E741
    "0.2 sqrt(max(O, I))": lambda O, I: 0.2 * max(O, I) ** 0.5,  # noqa: E741
}


@register_norm
@dataclass(frozen=True)
class Spectral(Norm):
    """σ_max(W) / scale [OO]. Within the polar schedule's band of 1 where it is not exact.

    scale: a formula in SCALES, the singular values of a step.
    """

    polar: Polar = field(default=Polar())
    scale: str = "1"

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise Refusal(
                f"{type(self).__name__}.scale",
                got=repr(self.scale),
                allowed=", ".join(SCALES),
                fix='scale="1"',
            )

    def norm(self, W: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(at_least_fp32(W), ord=2) / self.full_size(W.shape)

    def size(self, W: Tensor) -> Tensor:
        return spectral_norm(W) / self.full_size(W.shape)

    def dual_norm(self, G: Tensor) -> Tensor:
        X, length = to_unit_length(G, (-2, -1))
        return self.full_size(G.shape) * length[..., 0, 0] * torch.linalg.svdvals(X).sum(-1)

    def dualize(self, G: Tensor) -> Tensor:
        return self.polar(G) * self.full_size(G.shape)

    def dualize_(self, G: Tensor) -> Tensor:
        return self.polar(G, inplace=True).mul_(self.full_size(G.shape))

    def stiefel(self, W: Tensor) -> Tensor:
        """Return the polar factor at full size.

        Five cubic steps, each of which squares the distance from 1, polish what the schedule
        leaves.
        """
        X = at_least_fp32(self.polar(W)).reshape(-1, *W.shape[-2:])
        X = plain(X if W.shape[-2] <= W.shape[-1] else X.mT, SCHEDULES["cubic"].coefficients[:5])
        return (
            (X if W.shape[-2] <= W.shape[-1] else X.mT).reshape(W.shape) * self.full_size(W.shape)
        ).to(W.dtype)

    def init(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Return a uniform (Haar) semi-orthogonal matrix at full size, by QR, as SVD is slower."""
        G = torch.randn(*shape, generator=generator)
        Q, R = torch.linalg.qr(G if shape[-2] >= shape[-1] else G.mT)
        Q = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        return (Q if shape[-2] >= shape[-1] else Q.mT) * self.full_size(shape)

    def update_rms(self, shape: Sequence[int]) -> float:
        return self.full_size(shape) / max(shape[-2:]) ** 0.5

    def flops(self, shape: Sequence[int]) -> int:
        return self.polar.flops(shape[-2], shape[-1])

    def matrices(self, W: Tensor) -> list[tuple[Tensor, float]]:
        return [(W.reshape(len(W), -1, *W.shape[-2:]), self.full_size(W.shape))]

    def full_size(self, shape: Sequence[int]) -> float:
        """Return the singular values of a step of norm 1."""
        return SCALES[self.scale](shape[-2], shape[-1])

    def __str__(self) -> str:
        return f"Spectral[{self.scale}, {self.polar.schedule}]"


NORMS["MuonSpectral"] = partial(Spectral, scale="sqrt(max(1, O/I))")
NORMS["MoonlightSpectral"] = partial(Spectral, scale="0.2 sqrt(max(O, I))")


@register_norm
@dataclass(frozen=True)
class RMSToRMS(Spectral):
    """√(I/O) σ_max(W), the operator norm between RMS norms: hidden linear maps [MD]."""

    scale: str = "sqrt(O/I)"

    def __str__(self) -> str:
        return f"RMSToRMS[{self.polar.schedule}]"


class _RowWise(Norm):
    """The maximum over rows of c ‖row‖₂, c given by the width; dualize gives each row its size
    1/c."""

    dualizes_by_rows = retracts_by_rows = True
    ignores = "rows"

    def _row_factor(self, width: int) -> float:
        raise NotImplementedError

    def norm(self, W: Tensor) -> Tensor:
        return self._row_factor(W.shape[-1]) * to_unit_length(W, (-1,))[1].amax(dim=(-2, -1))

    def dual_norm(self, G: Tensor) -> Tensor:
        return to_unit_length(G, (-1,))[1].sum(dim=(-2, -1)) / self._row_factor(G.shape[-1])

    def dualize(self, G: Tensor) -> Tensor:
        return to_unit_length(G, (-1,))[0].div_(self._row_factor(G.shape[-1])).to(G.dtype)

    def dualize_(self, G: Tensor) -> Tensor:
        return (
            to_unit_length(G, (-1,), inplace=True)[0]
            .div_(self._row_factor(G.shape[-1]))
            .to(G.dtype)
        )

    def project(self, W: Tensor) -> Tensor:
        return (W / (self._row_factor(W.shape[-1]) * to_unit_length(W, (-1,))[1]).clamp(min=1)).to(
            W.dtype
        )

    def sphere(self, W: Tensor) -> Tensor:
        return self.dualize(W)

    def live(self, G: Tensor) -> Tensor:
        return nonzero(G, (-1,))

    def update_rms(self, shape: Sequence[int]) -> float:
        return 1 / (self._row_factor(shape[-1]) * shape[-1] ** 0.5)


@register_norm
@dataclass(frozen=True)
class L1ToRMS(_RowWise):
    """max over rows of rms(row): embeddings (V, D), one row a token [MD]."""

    def _row_factor(self, width: int) -> float:
        return width**-0.5


@register_norm
@dataclass(frozen=True)
class RMSToLinf(_RowWise):
    """√I · the largest ‖row‖₂, the operator norm from RMS to the largest logit: heads (V, I)
    [SN]."""

    def _row_factor(self, width: int) -> float:
        return width**0.5


@register_norm
@dataclass(frozen=True)
class MaxEntry(Norm):
    """max |entry| of a weight of ndim dimensions: sign descent [OO].

    It is the norm of a gain, a diagonal map from RMS to RMS; of a scalar (ndim 0); and of what is
    added to logits, a head's bias. A vector's blocks are its entries, those of others their rows.
    """

    ndim: int = 1
    ignores = "entries"

    @property
    def dualizes_by_rows(self) -> bool:  # type: ignore[override]
        return self.ndim >= 1

    @property
    def retracts_by_rows(self) -> bool:  # type: ignore[override]
        return self.ndim >= 1

    def _factor(self, shape: Sequence[int]) -> float:
        return 1.0

    def norm(self, W: Tensor) -> Tensor:
        return self._factor(W.shape) * self._over_weight(torch.amax, at_least_fp32(W).abs())

    def dual_norm(self, G: Tensor) -> Tensor:
        return self._over_weight(torch.sum, at_least_fp32(G).abs()) / self._factor(G.shape)

    def dualize(self, G: Tensor) -> Tensor:
        return G.sign() / self._factor(G.shape)

    def dualize_(self, G: Tensor) -> Tensor:
        return G.sign_().div_(self._factor(G.shape))

    def project(self, W: Tensor) -> Tensor:
        size = 1 / self._factor(W.shape)
        return W.clamp(-size, size)

    def sphere(self, W: Tensor) -> Tensor:
        if self.ndim < 2:
            return super().sphere(W)
        largest = at_least_fp32(W).abs().amax(-1, keepdim=True) * self._factor(W.shape)
        return (W / torch.where(largest > 0, largest, 1)).to(W.dtype)

    def live(self, G: Tensor) -> Tensor:
        return nonzero(G, (-1,)) if self.ndim >= 2 else G != 0

    def update_rms(self, shape: Sequence[int]) -> float:
        return 1 / self._factor(shape)

    def _over_weight(self, reduce: Callable[..., Tensor], X: Tensor) -> Tensor:
        return reduce(X, dim=tuple(range(-self.ndim, 0))) if self.ndim else X


@register_norm
@dataclass(frozen=True)
class L1ToLinf(MaxEntry):
    """max |entry| of a matrix: sign descent [OO]."""

    ndim: int = 2


@register_norm
@dataclass(frozen=True)
class MeanToLinf(MaxEntry):
    """I · max |entry|, from mean |x| to the largest logit: Scion's head [SN]; over RMSToLinf."""

    ndim: int = 2

    def _factor(self, shape: Sequence[int]) -> float:
        return float(shape[-1])


@register_norm
@dataclass(frozen=True)
class Frobenius(Norm):
    """‖W‖_F of a weight of ndim >= 1 dimensions: normalized gradient descent [OO]."""

    ndim: int = 2

    def norm(self, W: Tensor) -> Tensor:
        return to_unit_length(W, self._dims())[1].reshape(W.shape[: -self.ndim])

    def dual_norm(self, G: Tensor) -> Tensor:
        return self.norm(G)

    def dualize(self, G: Tensor) -> Tensor:
        return to_unit_length(G, self._dims())[0].to(G.dtype)

    def sharp(self, G: Tensor) -> Tensor:
        """Return G itself, which is ‖G‖_F · G/‖G‖_F without the rounding."""
        return G

    def update_rms(self, shape: Sequence[int]) -> float:
        return prod(shape) ** -0.5

    def _dims(self) -> tuple[int, ...]:
        return tuple(range(-self.ndim, 0))


@register_norm
@dataclass(frozen=True)
class VectorRMS(Norm):
    """rms(b) of a vector (..., O): biases [MD]."""

    ndim: int = field(default=1, init=False)

    def norm(self, W: Tensor) -> Tensor:
        return to_unit_length(W, (-1,))[1][..., 0] / W.shape[-1] ** 0.5

    def dual_norm(self, G: Tensor) -> Tensor:
        return to_unit_length(G, (-1,))[1][..., 0] * G.shape[-1] ** 0.5

    def dualize(self, G: Tensor) -> Tensor:
        return to_unit_length(G, (-1,))[0].mul_(G.shape[-1] ** 0.5).to(G.dtype)

    def update_rms(self, shape: Sequence[int]) -> float:
        return 1.0
