"""The norms of single weights, their dual norms, and the duality maps that attain them.

O, I: fan-out and fan-in of a linear map y = W x, W (..., O, I); leading dimensions stack equal-shaped weights.
rms(x) = ‖x‖₂ / √dim. ⟨A, B⟩ = Σ A∘B. A block is what a norm treats by itself: a matrix, a head, a row, a slice of a convolution.
Every method is pure but dualize_, which may overwrite its argument.
Sources: [MD] Bernstein, Newhouse, arXiv 2410.21265, §4; [OO] Bernstein, Newhouse, arXiv 2409.20325; [SN] Pethick et al., arXiv 2502.07529.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from .errors import Refusal
from .polar import SCHEDULES, Polar, plain


class Norm:
    """A norm on one weight. Two identities hold for G ≠ 0: norm(dualize(G)) == 1 and ⟨G, dualize(G)⟩ == dual_norm(G).

    dualize(0) == 0, and dualize(c·G) == dualize(G) for c > 0, at any scale of finite G. A subclass defines norm, dual_norm, dualize.
    """

    ndim: int = 2  # dimensions of one weight, the trailing ones of a stack
    # Whether a slice of the first dimension is dualized (retracted) as it is in the whole weight: then ranks may hold slices.
    dualizes_by_rows: bool = False
    retracts_by_rows: bool = False

    def norm(self, W: Tensor) -> Tensor:
        """(..., O, I) → (...): the norm's value."""
        raise NotImplementedError

    def dual_norm(self, G: Tensor) -> Tensor:
        """(..., O, I) → (...): max ⟨G, T⟩ over norm(T) <= 1."""
        raise NotImplementedError

    def dualize(self, G: Tensor) -> Tensor:
        """(..., O, I) → same shape and dtype: a T of norm 1 that attains the dual norm."""
        raise NotImplementedError

    def dualize_(self, G: Tensor) -> Tensor:
        """dualize(G); G may be overwritten."""
        return self.dualize(G)

    def sharp(self, G: Tensor) -> Tensor:
        """dual_norm(G) · dualize(G): the maximiser of ⟨G, T⟩ − norm(T)²/2, the step of plain steepest descent [OO]."""
        return (self._per_weight(self.dual_norm(G)) * self.dualize(G)).to(G.dtype)

    def size(self, W: Tensor) -> Tensor:
        """(..., O, I) → (...): norm(W) as training computes it, within 1e-3 and fast."""
        return self.norm(W)

    def normalize(self, W: Tensor) -> Tensor:
        """W / norm(W), one scalar for the whole weight; 0 stays 0."""
        size = self.size(W)
        return (W / self._per_weight(torch.where(size > 0, size, 1))).to(W.dtype)

    def project(self, W: Tensor) -> Tensor:
        """Onto the unit ball, radially, block by block: W / max(1, norm(W))."""
        return (W / self._per_weight(self.size(W)).clamp(min=1)).to(W.dtype)

    def sphere(self, W: Tensor) -> Tensor:
        """Onto the unit sphere, radially, block by block; a block of zeros stays."""
        return self.normalize(W)

    def stiefel(self, W: Tensor) -> Tensor:
        """Every singular value of a spectral norm's matrices to its full size; other norms know no singular values: sphere(W)."""
        return self.sphere(W)

    def fresh(self, G: Tensor) -> Tensor | None:
        """A mask, broadcastable to G, of the blocks that have a gradient; None: the weight moves as a whole."""
        return None

    def init(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """A random weight of norm 1 and this shape, float32: the dual of a Gaussian."""
        return self.dualize(torch.randn(tuple(shape), generator=generator))

    def update_rms(self, shape: Sequence[int]) -> float:
        """Root mean square of the entries of dualize(G), G of this shape without zeros and of full rank."""
        raise NotImplementedError

    def flops(self, shape: Sequence[int]) -> int:
        """Of dualize for one weight: those of matrix products, where there are any, else 4 an entry (|x|, x², two products)."""
        return 4 * prod(shape)

    def check(self, shape: Sequence[int]) -> str | None:
        """None if a weight of this shape fits, else what does."""
        return (
            None
            if len(shape) == self.ndim and prod(shape)
            else f"{self.ndim} dimensions, none of them 0"
        )

    def _per_weight(self, value: Tensor) -> Tensor:
        return value.reshape((*value.shape, *(1,) * self.ndim))

    def __str__(self) -> str:
        return type(self).__name__


NORMS: dict[str, Callable[..., Norm]] = {}
N = TypeVar("N", bound=type[Norm])


def register_norm(cls: N) -> N:
    """Make a norm known by its class name, so that configurations can name it. It must be constructible without arguments."""
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
    return X.div_(length.clamp(min=1)), largest * length


def spectral_norm(W: Tensor, squarings: int = 7, steps: int = 15) -> Tensor:
    """σ_max of (..., m, n) by matrix products alone, from below and within 1e-3 (tests/test_norms.py).

    A = (W Wᵀ)^(2^squarings) turns its longest column, and `steps` further products with A turn it on, towards the leading singular vectors; its gain
    under Wᵀ is σ_max. The error is about ln(m) / (2^(squarings + 2) (steps + 1)) at worst, whatever the spectrum's gap: 5e-4 at m = 1024.
    """
    X, length = _unit(W, (-2, -1))
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


# How large a spectral step is, named by formula: libraries differ, and "spectral" alone means several of them.
SCALES: dict[str, Callable[[float, float], float]] = {
    "sqrt(O/I)": lambda O, I: (O / I) ** 0.5,  # noqa: E741 - [MD]: the operator norm between RMS norms
    "1": lambda O, I: 1.0,  # noqa: E741 - [OO]
    "sqrt(max(1, O/I))": lambda O, I: max(1.0, O / I) ** 0.5,  # noqa: E741 - Jordan et al., kellerjordan.github.io/posts/muon
    "0.2 sqrt(max(O, I))": lambda O, I: 0.2 * max(O, I) ** 0.5,  # noqa: E741 - Liu et al., arXiv 2502.16982: AdamW's RMS
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
                f"{type(self).__name__}.scale", got=repr(self.scale), allowed=", ".join(SCALES)
            )

    def norm(self, W: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(_at_least_fp32(W), ord=2) / self._scale(W.shape)

    def size(self, W: Tensor) -> Tensor:
        return spectral_norm(W) / self._scale(W.shape)

    def dual_norm(self, G: Tensor) -> Tensor:
        X, length = _unit(G, (-2, -1))
        return self._scale(G.shape) * length[..., 0, 0] * torch.linalg.svdvals(X).sum(-1)

    def dualize(self, G: Tensor) -> Tensor:
        return self.polar(G) * self._scale(G.shape)

    def dualize_(self, G: Tensor) -> Tensor:
        return self.polar(G, inplace=True).mul_(self._scale(G.shape))

    def stiefel(self, W: Tensor) -> Tensor:
        """The polar factor at full size; five cubic steps (each squares the distance from 1) polish what the schedule's band leaves."""
        X = _at_least_fp32(self.polar(W)).reshape(-1, *W.shape[-2:])
        X = plain(X if W.shape[-2] <= W.shape[-1] else X.mT, SCHEDULES["cubic"].coefficients[:5])
        return (
            (X if W.shape[-2] <= W.shape[-1] else X.mT).reshape(W.shape) * self._scale(W.shape)
        ).to(W.dtype)

    def init(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Scale times a semi-orthogonal matrix, uniform (Haar): the exact polar factor of a Gaussian, by QR, which is cheaper than the SVD."""
        G = torch.randn(*shape, generator=generator)
        Q, R = torch.linalg.qr(G if shape[-2] >= shape[-1] else G.mT)
        Q = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        return (Q if shape[-2] >= shape[-1] else Q.mT) * self._scale(shape)

    def update_rms(self, shape: Sequence[int]) -> float:
        return self._scale(shape) / max(shape[-2:]) ** 0.5

    def flops(self, shape: Sequence[int]) -> int:
        return self.polar.flops(shape[-2], shape[-1])

    def _scale(self, shape: Sequence[int]) -> float:
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
    """A maximum over rows of c ‖row‖₂, c given by the width: dualize gives every non-zero row its full size 1/c."""

    dualizes_by_rows = retracts_by_rows = True

    def _row_factor(self, width: int) -> float:
        raise NotImplementedError

    def norm(self, W: Tensor) -> Tensor:
        return self._row_factor(W.shape[-1]) * _unit(W, (-1,))[1].amax(dim=(-2, -1))

    def dual_norm(self, G: Tensor) -> Tensor:
        return _unit(G, (-1,))[1].sum(dim=(-2, -1)) / self._row_factor(G.shape[-1])

    def dualize(self, G: Tensor) -> Tensor:
        return _unit(G, (-1,))[0].div_(self._row_factor(G.shape[-1])).to(G.dtype)

    def project(self, W: Tensor) -> Tensor:
        return (W / (self._row_factor(W.shape[-1]) * _unit(W, (-1,))[1]).clamp(min=1)).to(W.dtype)

    def sphere(self, W: Tensor) -> Tensor:
        return self.dualize(W)

    def fresh(self, G: Tensor) -> Tensor:
        return (G != 0).any(dim=-1, keepdim=True)

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
    """√I · max over rows of ‖row‖₂, the operator norm from RMS to the largest logit: heads (V, I) [SN]."""

    def _row_factor(self, width: int) -> float:
        return width**0.5


@register_norm
@dataclass(frozen=True)
class MaxEntry(Norm):
    """max |entry| of a weight of ndim dimensions: a gain, which is a diagonal map from RMS to RMS; a scalar (ndim 0); sign descent for any [OO]."""

    ndim: int = 1

    @property
    def dualizes_by_rows(self) -> bool:  # type: ignore[override]
        return self.ndim >= 1

    def _factor(self, shape: Sequence[int]) -> float:
        return 1.0

    def norm(self, W: Tensor) -> Tensor:
        return self._factor(W.shape) * self._over_weight(torch.amax, _at_least_fp32(W).abs())

    def dual_norm(self, G: Tensor) -> Tensor:
        return self._over_weight(torch.sum, _at_least_fp32(G).abs()) / self._factor(G.shape)

    def dualize(self, G: Tensor) -> Tensor:
        return G.sign() / self._factor(G.shape)

    def dualize_(self, G: Tensor) -> Tensor:
        return G.sign_().div_(self._factor(G.shape))

    def fresh(self, G: Tensor) -> Tensor | None:
        return (G != 0).any(dim=-1, keepdim=True) if self.ndim >= 2 else None

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
    """I · max |entry|, the operator norm from mean |x| to the largest logit; it bounds RMSToLinf: Scion's head (V, I) [SN]."""

    ndim: int = 2

    def _factor(self, shape: Sequence[int]) -> float:
        return float(shape[-1])


@register_norm
@dataclass(frozen=True)
class Frobenius(Norm):
    """‖W‖_F of a weight of ndim >= 1 dimensions: normalized gradient descent [OO]."""

    ndim: int = 2

    def norm(self, W: Tensor) -> Tensor:
        return _unit(W, self._dims())[1].reshape(W.shape[: -self.ndim])

    def dual_norm(self, G: Tensor) -> Tensor:
        return self.norm(G)

    def dualize(self, G: Tensor) -> Tensor:
        return _unit(G, self._dims())[0].to(G.dtype)

    def sharp(self, G: Tensor) -> Tensor:
        """G itself: ‖G‖_F · G/‖G‖_F without the rounding."""
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
        return _unit(W, (-1,))[1][..., 0] / W.shape[-1] ** 0.5

    def dual_norm(self, G: Tensor) -> Tensor:
        return _unit(G, (-1,))[1][..., 0] * G.shape[-1] ** 0.5

    def dualize(self, G: Tensor) -> Tensor:
        return _unit(G, (-1,))[0].mul_(G.shape[-1] ** 0.5).to(G.dtype)

    def update_rms(self, shape: Sequence[int]) -> float:
        return 1.0


@dataclass(frozen=True)
class _View(Norm):
    """A weight seen as stacks of blocks with a norm of their own: factor · the maximum of inner.norm over blocks.

    _split: (..., *weight) → stacks (..., P, *block); _join undoes it.
    """

    inner: Norm

    def __post_init__(self) -> None:
        if self.inner.ndim not in self._inner_dimensions():
            raise Refusal(
                type(self).__name__,
                got=f"{self.inner}, of {self.inner.ndim} dimensions",
                allowed=self._inner_dimensions(),
            )

    def _inner_dimensions(self) -> tuple[int, ...]:
        return (2,)

    def _split(self, W: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def _join(self, parts: list[Tensor], shape: Sequence[int]) -> Tensor:
        """shape: that of W, stack included."""
        raise NotImplementedError

    def _factor(self, shape: Sequence[int]) -> float:
        return 1.0

    def norm(self, W: Tensor) -> Tensor:
        return self._largest(self.inner.norm, W)

    def size(self, W: Tensor) -> Tensor:
        return self._largest(self.inner.size, W)

    def dual_norm(self, G: Tensor) -> Tensor:
        return torch.stack([self.inner.dual_norm(p).sum(-1) for p in self._split(G)]).sum(
            0
        ) / self._factor(G.shape)

    def dualize(self, G: Tensor) -> Tensor:
        return self._each(self.inner.dualize, G) / self._factor(G.shape)

    def dualize_(self, G: Tensor) -> Tensor:
        return self._each(self.inner.dualize_, G).div_(self._factor(G.shape))

    def project(self, W: Tensor) -> Tensor:
        return self._each(
            lambda p: self.inner.project(p * self._factor(W.shape)), W
        ) / self._factor(W.shape)

    def sphere(self, W: Tensor) -> Tensor:
        return self._each(self.inner.sphere, W) / self._factor(W.shape)

    def stiefel(self, W: Tensor) -> Tensor:
        return self._each(self.inner.stiefel, W) / self._factor(W.shape)

    def fresh(self, G: Tensor) -> Tensor | None:
        parts = self._split(G)
        masks = [m.expand(p.shape) for p in parts if (m := self.inner.fresh(p)) is not None]
        return self._join(masks, G.shape) if len(masks) == len(parts) else None

    def init(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        return self._each(
            lambda p: self.inner.init(p.shape, generator), torch.empty(*shape)
        ) / self._factor(shape)

    def update_rms(self, shape: Sequence[int]) -> float:
        parts = self._split(torch.empty(*shape, device="meta"))
        squares = sum(
            p.numel()
            * self.inner.update_rms(p.shape[-self.inner.ndim :] if self.inner.ndim else ()) ** 2
            for p in parts
        )
        return (squares / prod(shape)) ** 0.5 / self._factor(shape)

    def flops(self, shape: Sequence[int]) -> int:
        parts = self._split(torch.empty(*shape, device="meta"))
        blocks = [p.shape[p.ndim - self.inner.ndim :] for p in parts]
        return sum(
            p.numel() // max(1, prod(b)) * self.inner.flops(b)
            for p, b in zip(parts, blocks, strict=True)
        )

    def check(self, shape: Sequence[int]) -> str | None:
        wrong = super().check(shape)
        if wrong:
            return wrong
        try:
            parts = self._split(torch.empty(*shape, device="meta"))
        except (RuntimeError, ValueError):
            return self._fits()
        inner = next(
            (w for p in parts if (w := self.inner.check(p.shape[p.ndim - self.inner.ndim :]))), None
        )
        return inner and f"{self._fits()}, and of each block {inner}"

    def _fits(self) -> str:
        return f"{self.ndim} dimensions"

    def _largest(self, size: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
        return self._factor(W.shape) * torch.stack([size(p).amax(-1) for p in self._split(W)]).amax(
            0
        )

    def _each(self, change: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
        return self._join([change(p) for p in self._split(W)], W.shape)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.inner})"


@dataclass(frozen=True)
class Blocks(_View):
    """The maximum over blocks of rows: heads, fused queries, keys and values, the gates of an LSTM.

    sizes: a number of equal blocks, or the rows of each. A fused weight of n maps side by side is one atom of n maps' mass behind a bond of
    sensitivity n: the same radii as n atoms in concat().
    """

    sizes: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sizes, int):
            object.__setattr__(self, "sizes", tuple(self.sizes))  # a norm is a key of stacks

    def _inner_dimensions(self) -> tuple[int, ...]:
        return (1, 2, 3)

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return self.inner.ndim

    def _runs(self, rows: int) -> list[tuple[int, int]]:
        """(blocks, rows of each) for every run of equal sizes, each one batched call."""
        if isinstance(self.sizes, int):
            if self.sizes < 1 or rows % self.sizes:
                raise ValueError(f"{rows} rows in {self.sizes} blocks")
            return [(self.sizes, rows // self.sizes)]
        if sum(self.sizes) != rows:
            raise ValueError(f"{rows} rows in blocks of {self.sizes}")
        return [(len(list(run)), size) for size, run in groupby(self.sizes)]

    def _split(self, W: Tensor) -> list[Tensor]:
        runs = self._runs(W.shape[-self.ndim])
        stacks = W.split([count * size for count, size in runs], dim=-self.ndim)
        return [s.unflatten(-self.ndim, run) for s, run in zip(stacks, runs, strict=True)]

    def _join(self, parts: list[Tensor], shape: Sequence[int]) -> Tensor:
        return (
            torch.cat([p.flatten(-self.ndim - 1, -self.ndim) for p in parts], dim=-self.ndim)
            if len(parts) > 1
            else parts[0].reshape(shape)
        )

    def _fits(self) -> str:
        return (
            f"rows in {self.sizes} equal blocks"
            if isinstance(self.sizes, int)
            else f"{sum(self.sizes)} rows"
        )

    def __str__(self) -> str:
        if isinstance(self.sizes, int):
            return f"{self.sizes} × {self.inner}"
        runs = " + ".join(
            f"{count} × {size}" if count > 1 else f"{size}"
            for count, size in self._runs(sum(self.sizes))
        )
        return f"({runs}) × {self.inner}"


class _One(_View):
    """A view of the whole weight as one block, or of its first dimension as equal blocks."""

    def _view(self, W: Tensor) -> Tensor:
        """(..., *weight) → (..., P, *block)."""
        raise NotImplementedError

    def _unview(self, X: Tensor, shape: Sequence[int]) -> Tensor:
        raise NotImplementedError

    def _split(self, W: Tensor) -> list[Tensor]:
        return [self._view(W)]

    def _join(self, parts: list[Tensor], shape: Sequence[int]) -> Tensor:
        return self._unview(parts[0], shape)


@dataclass(frozen=True)
class Transposed(_One):
    """The norm of Wᵀ: weights stored (I, O), as GPT-2's Conv1D and many stacks of experts are."""

    ndim: int = field(default=2, init=False)

    def _view(self, W: Tensor) -> Tensor:
        return W.mT.unsqueeze(-3)

    def _unview(self, X: Tensor, shape: Sequence[int]) -> Tensor:
        return X.squeeze(-3).mT

    def fresh(self, G: Tensor) -> Tensor | None:
        mask = self.inner.fresh(G.mT)
        return None if mask is None else mask.mT


@dataclass(frozen=True)
class Flattened(_One):
    """The norm of a weight (O, …) of ndim dimensions as a matrix (O, rest) or, for norms of vectors, as one vector.

    Flattened(RMSToRMS(), 4) is Scion's and Muon's convolution [SN].
    """

    ndim: int = 4

    def _inner_dimensions(self) -> tuple[int, ...]:
        return (1, 2)

    def _view(self, W: Tensor) -> Tensor:
        stack = W.shape[: W.ndim - self.ndim]
        return (
            W.reshape(*stack, 1, -1)
            if self.inner.ndim == 1
            else W.reshape(*stack, 1, W.shape[W.ndim - self.ndim], -1)
        )

    def _unview(self, X: Tensor, shape: Sequence[int]) -> Tensor:
        return X.reshape(shape)


@dataclass(frozen=True)
class Experts(_One):
    """The maximum over the first dimension of a stack (E, O, I): the experts of a mixture, whose outputs are combined convexly.

    An expert that was given no token, whose gradient is exactly zero, does not move, as a row of an embedding.
    """

    dualizes_by_rows = retracts_by_rows = True

    def _inner_dimensions(self) -> tuple[int, ...]:
        return (0, 1, 2, 3)

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return self.inner.ndim + 1

    def _view(self, W: Tensor) -> Tensor:
        return W

    def _unview(self, X: Tensor, shape: Sequence[int]) -> Tensor:
        return X

    def fresh(self, G: Tensor) -> Tensor:
        rows, dims = self.inner.fresh(G), tuple(range(-self.inner.ndim, 0))
        if rows is not None:
            return rows
        return (G != 0).any(dim=dims, keepdim=True) if dims else G != 0


@dataclass(frozen=True)
class ConvRMSToRMS(_One):
    """K · the maximum over the K slices of a convolution's kernel, and over groups, of inner, here RMS → RMS [MD].

    It bounds the gain between spatial maxima of channel RMS, for any stride, padding and dilation. dims: spatial dimensions.
    Weights (O, I/groups, *kernel), or (I, O/groups, *kernel) where transposed; depthwise is groups = I.
    """

    inner: Norm = field(default=RMSToRMS())
    dims: int = 2
    groups: int = 1
    transposed: bool = False

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return 2 + self.dims

    def _factor(self, shape: Sequence[int]) -> float:
        return float(prod(shape[len(shape) - self.dims :]))

    def _slices(self, W: Tensor) -> Tensor:
        """(..., K, g, O/g, I/g), sharing memory with W where its kernel positions can be flattened."""
        X = W.flatten(-self.dims).movedim(-1, -3).unflatten(-2, (self.groups, -1))
        return X.mT if self.transposed else X

    def _view(self, W: Tensor) -> Tensor:
        return self._slices(W).flatten(-4, -3)

    def dualize_(self, G: Tensor) -> Tensor:
        """Slice by slice: all of them together are a copy of G."""
        G = G.contiguous()
        for X in self._slices(G).unbind(-4):
            X.copy_(self.inner.dualize_(X.contiguous()))
        return G.div_(self._factor(G.shape))

    def _unview(self, X: Tensor, shape: Sequence[int]) -> Tensor:
        X = X.mT if self.transposed else X
        X = X.unflatten(-3, (-1, self.groups)).flatten(-3, -2)
        return X.movedim(-3, -1).reshape(shape)

    def _fits(self) -> str:
        return f"{self.ndim} dimensions, the first a multiple of {self.groups} groups"

    def __str__(self) -> str:
        options = ", ".join(
            [
                f"{self.dims}d",
                *([f"{self.groups} groups"] if self.groups > 1 else []),
                *(["transposed"] if self.transposed else []),
            ]
        )
        return f"Conv({self.inner}, {options})"
