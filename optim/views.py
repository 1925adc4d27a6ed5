"""A weight seen as blocks with a norm of their own: heads, experts, slices of a convolution.

O, I: fan-out and fan-in; leading dimensions stack equal-shaped weights, as in norms.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod

import torch
from torch import Tensor

from .axes import Axes, Axis
from .errors import Refusal
from .norms import Norm, RMSToRMS


@dataclass(frozen=True)
class View(Norm):
    """A weight as stacks of blocks: factor · the maximum over blocks of their inner norm.

    A subclass defines split() and join(), factor() where it is not 1, and axes(), without which
    means over rows and columns take the whole weight as one matrix (O, rest).
    """

    inner: Norm

    def __post_init__(self) -> None:
        if self.inner.ndim not in self._inner_dimensions():
            raise Refusal(
                type(self).__name__,
                got=f"{self.inner}, of {self.inner.ndim} dimensions",
                allowed=f"{' or '.join(map(str, self._inner_dimensions()))} dimensions",
                fix=f"{type(self).__name__}(RMSToRMS()), say",
            )

    def _inner_dimensions(self) -> tuple[int, ...]:
        return (2,)

    @property
    def ignores(self) -> str:  # type: ignore[override]
        return self.inner.ignores

    def split(self, W: Tensor) -> list[Tensor]:
        """Return stacks of equal blocks, (..., *weight) → [(..., P, *block)]."""
        raise NotImplementedError

    def join(self, parts: list[Tensor], shape: Sequence[int]) -> Tensor:
        """Return the weights (..., *weight) of this shape that split() made these stacks of."""
        raise NotImplementedError

    def factor(self, shape: Sequence[int]) -> float:
        """Return the multiple of the largest inner norm that the norm is."""
        return 1.0

    def norm(self, W: Tensor) -> Tensor:
        return self._largest(self.inner.norm, W)

    def size(self, W: Tensor) -> Tensor:
        return self._largest(self.inner.size, W)

    def dual_norm(self, G: Tensor) -> Tensor:
        return torch.stack([self.inner.dual_norm(p).sum(-1) for p in self.split(G)]).sum(
            0
        ) / self.factor(G.shape)

    def dualize(self, G: Tensor) -> Tensor:
        return self._each(self.inner.dualize, G) / self.factor(G.shape)

    def dualize_(self, G: Tensor) -> Tensor:
        return self._each(self.inner.dualize_, G).div_(self.factor(G.shape))

    def project(self, W: Tensor) -> Tensor:
        return self._each(lambda p: self.inner.project(p * self.factor(W.shape)), W) / self.factor(
            W.shape
        )

    def sphere(self, W: Tensor) -> Tensor:
        return self._each(self.inner.sphere, W) / self.factor(W.shape)

    def stiefel(self, W: Tensor) -> Tensor:
        return self._each(self.inner.stiefel, W) / self.factor(W.shape)

    def live(self, G: Tensor) -> Tensor:
        return self.join([self.inner.live(p).expand(p.shape) for p in self.split(G)], G.shape)

    def matrices(self, W: Tensor) -> list[tuple[Tensor, float]]:
        factor = self.factor(W.shape)
        return [
            (X, size / factor) for part in self.split(W) for X, size in self.inner.matrices(part)
        ]

    def init(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        return self._each(
            lambda p: self.inner.init(p.shape, generator), torch.empty(*shape)
        ) / self.factor(shape)

    def update_rms(self, shape: Sequence[int]) -> float:
        parts = self.split(torch.empty(*shape, device="meta"))
        squares = sum(
            p.numel()
            * self.inner.update_rms(p.shape[-self.inner.ndim :] if self.inner.ndim else ()) ** 2
            for p in parts
        )
        return (squares / prod(shape)) ** 0.5 / self.factor(shape)

    def flops(self, shape: Sequence[int]) -> int:
        parts = self.split(torch.empty(*shape, device="meta"))
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
            parts = self.split(torch.empty(*shape, device="meta"))
        except (RuntimeError, ValueError):
            return self._fits()
        inner = next(
            (w for p in parts if (w := self.inner.check(p.shape[p.ndim - self.inner.ndim :]))), None
        )
        return inner and f"{self._fits()}, and of each block {inner}"

    def _fits(self) -> str:
        return f"{self.ndim} dimensions"

    def _largest(self, size: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
        return self.factor(W.shape) * torch.stack([size(p).amax(-1) for p in self.split(W)]).amax(0)

    def _each(self, change: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
        return self.join([change(p) for p in self.split(W)], W.shape)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.inner})"


@dataclass(frozen=True)
class Blocks(View):
    """The maximum over blocks of rows: heads, fused queries, keys and values, the gates of an LSTM.

    sizes: a number of equal blocks, or the rows of each. turns: how often they come in turn, their
    rows then counted within one turn; a block is its rows of all turns. Queries, keys and values
    that stand head by head are Blocks(inner, 3, turns=heads), and gates that alternate with what
    they gate Blocks(inner, (1, 1), turns=gates). A fused weight of n maps is one atom of n maps'
    mass behind a bond of sensitivity n: the same radii as n atoms in concat().
    """

    sizes: int | tuple[int, ...] = 1
    turns: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sizes, int):
            object.__setattr__(self, "sizes", tuple(self.sizes))  # a norm is a key of stacks

    def _inner_dimensions(self) -> tuple[int, ...]:
        return (1, 2, 3, 4, 5)

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return self.inner.ndim

    def _runs(self, rows: int) -> list[tuple[int, int]]:
        """Return (blocks, rows of each) for every run of equal sizes, each one batched call.

        rows: of one turn.
        """
        if isinstance(self.sizes, int):
            if self.sizes < 1 or rows % self.sizes:
                raise ValueError(f"{rows} rows in {self.sizes} blocks")
            return [(self.sizes, rows // self.sizes)]
        if sum(self.sizes) != rows:
            raise ValueError(f"{rows} rows in blocks of {self.sizes}")
        return [(len(list(run)), size) for size, run in groupby(self.sizes)]

    def split(self, W: Tensor) -> list[Tensor]:
        k = self.ndim
        turns = W.unflatten(-k, (self.turns, -1))
        runs = self._runs(turns.shape[-k])
        stacks = turns.split([count * size for count, size in runs], dim=-k)
        blocks = (s.unflatten(-k, run) for s, run in zip(stacks, runs, strict=True))
        return [s.movedim(-k - 2, -k - 1).flatten(-k - 1, -k) for s in blocks]

    def join(self, parts: list[Tensor], shape: Sequence[int]) -> Tensor:
        k = self.ndim
        blocks = (p.unflatten(-k, (self.turns, -1)).movedim(-k - 1, -k - 2) for p in parts)
        turns = [s.flatten(-k - 1, -k) for s in blocks]
        return (torch.cat(turns, dim=-k) if len(turns) > 1 else turns[0]).reshape(shape)

    def axes(self, shape: Sequence[int]) -> Axes | None:
        first = torch.zeros(self.turns, shape[0] // self.turns, dtype=torch.int64)
        axes, row, count = None, 0, 0
        for blocks, size in self._runs(first.shape[1]):
            axes = self.inner.axes((self.turns * size, *shape[1:]))
            if axes is None:
                return None
            own = axes[0].blocks.view(self.turns, size)
            for _ in range(blocks):
                first[:, row : row + size] = count + own
                row, count = row + size, count + int(own.max()) + 1
        return axes and (Axis(axes[0].over_rows, first.flatten()), *axes[1:])

    def live(self, G: Tensor) -> Tensor:
        if self.turns > 1:
            return super().live(G)
        masks, k = [], self.ndim  # a block's mask stands for each of its rows
        for part in self.split(G):
            mask = self.inner.live(part)
            shape = (*mask.shape[:-k], part.shape[-k], *mask.shape[mask.ndim - k + 1 :])
            masks.append(mask.expand(shape).flatten(-k - 1, -k))
        rest = torch.broadcast_shapes(*(m.shape[m.ndim - k + 1 :] for m in masks))
        rows = [m.expand(*m.shape[: m.ndim - k + 1], *rest) for m in masks]
        return torch.cat(rows, dim=-k)

    def _fits(self) -> str:
        in_turn = f", {self.turns} times in turn" if self.turns != 1 else ""
        if isinstance(self.sizes, int):
            return f"rows in {self.sizes} equal blocks{in_turn}"
        return f"{self.turns * sum(self.sizes)} rows"

    def __str__(self) -> str:
        in_turn = f" in {self.turns} turns" if self.turns != 1 else ""
        if isinstance(self.sizes, int):
            return f"{self.sizes} × {self.inner}{in_turn}"
        runs = " + ".join(
            f"{count} × {size}" if count > 1 else f"{size}"
            for count, size in self._runs(sum(self.sizes))
        )
        return f"({runs}) × {self.inner}{in_turn}"


class _One(View):
    """A view of the whole weight as one block, or of its first dimension as equal blocks."""

    def _view(self, W: Tensor) -> Tensor:
        """Return (..., *weight) as (..., P, *block)."""
        raise NotImplementedError

    def _unview(self, X: Tensor, shape: Sequence[int]) -> Tensor:
        raise NotImplementedError

    def split(self, W: Tensor) -> list[Tensor]:
        return [self._view(W)]

    def join(self, parts: list[Tensor], shape: Sequence[int]) -> Tensor:
        return self._unview(parts[0], shape)


@dataclass(frozen=True)
class Transposed(_One):
    """The norm of Wᵀ: weights stored (I, O), as GPT-2's Conv1D and many stacks of experts are."""

    ndim: int = field(default=2, init=False)

    def _view(self, W: Tensor) -> Tensor:
        return W.mT.unsqueeze(-3)

    def _unview(self, X: Tensor, shape: Sequence[int]) -> Tensor:
        return X.squeeze(-3).mT

    @property
    def ignores(self) -> str:  # type: ignore[override]
        # Its blocks' rows are not the weight's, which ranks may have apart.
        return "blocks" if self.inner.ignores == "rows" else self.inner.ignores

    def axes(self, shape: Sequence[int]) -> Axes | None:
        axes = self.inner.axes(shape[::-1])
        return axes and axes[::-1]

    def live(self, G: Tensor) -> Tensor:
        return self.inner.live(G.mT).mT


@dataclass(frozen=True)
class Flattened(_One):
    """The norm of a weight (O, …) of ndim dimensions as a matrix (O, rest) or as one vector.

    Flattened(Spectral(), 4) is Muon's convolution. Flattened(RMSToRMS(), 4) bounds the gain of a
    convolution between spatial maxima; Scion's steps are 1/√K of its, K kernel positions:
    ScionConv.
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

    def axes(self, shape: Sequence[int]) -> Axes | None:
        """Return the axes; blocks along flattened columns are taken together."""
        axes = self.inner.axes((shape[0], prod(shape[1:]))) if self.inner.ndim == 2 else None
        if axes is None:
            return None
        return (
            axes[0],
            *(Axis.whole(size, over_rows=axes[1].over_rows) for size in shape[1:]),
        )

    def live(self, G: Tensor) -> Tensor:
        mask, stack = self.inner.live(self._view(G)), G.shape[: G.ndim - self.ndim]
        whole = mask.numel() == prod(stack)  # one block, over all dimensions
        return mask.reshape(*stack, *(1,) * self.ndim) if whole else super().live(G)


@dataclass(frozen=True)
class ScionConv(Flattened):
    """Scion's convolution: √K times the norm of the kernel (O, I, *kernel) as a matrix (O, I K).

    K is the number of kernel positions, so that with RMSToRMS it is K √(I/O) σ_max, and a step has
    singular values √(O/I)/K. Source: the authors' code, github.com/LIONS-EPFL/scion, scion.py.
    """

    inner: Norm = field(default=RMSToRMS())

    def _inner_dimensions(self) -> tuple[int, ...]:
        return (2,)

    def factor(self, shape: Sequence[int]) -> float:
        return prod(shape[len(shape) - self.ndim + 2 :]) ** 0.5


@dataclass(frozen=True)
class Experts(_One):
    """The maximum over the first dimension of a stack (E, O, I): the experts of a mixture.

    Their outputs are combined convexly. An expert that was given no token has a gradient of exactly
    zero and does not move, as a row of an embedding.
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

    def axes(self, shape: Sequence[int]) -> Axes | None:
        axes = self.inner.axes(shape[1:])
        return axes and (Axis.apart(shape[0]), *axes)

    def live(self, G: Tensor) -> Tensor:
        return self.inner.live(G)


@dataclass(frozen=True)
class ConvRMSToRMS(_One):
    """K · the maximum of inner over the K slices of a convolution's kernel, and over groups [MD].

    With RMSToRMS it bounds the gain between spatial maxima of channel RMS, for any stride, padding
    and dilation. dims: spatial dimensions. Weights are (O, I/groups, *kernel), or
    (I, O/groups, *kernel) where transposed; depthwise is groups = I.
    """

    inner: Norm = field(default=RMSToRMS())
    dims: int = 2
    groups: int = 1
    transposed: bool = False

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return 2 + self.dims

    def factor(self, shape: Sequence[int]) -> float:
        return float(prod(shape[len(shape) - self.dims :]))

    def _slices(self, W: Tensor) -> Tensor:
        """Return (..., K, g, O/g, I/g), in W's memory where kernel positions can be flattened."""
        X = W.flatten(-self.dims).movedim(-1, -3).unflatten(-2, (self.groups, -1))
        return X.mT if self.transposed else X

    def _view(self, W: Tensor) -> Tensor:
        return self._slices(W).flatten(-4, -3)

    @property
    def ignores(self) -> str:  # type: ignore[override]
        rows = self.inner.ignores == "rows" and self.transposed
        return "blocks" if rows else self.inner.ignores

    def axes(self, shape: Sequence[int]) -> Axes | None:
        block = (shape[0] // self.groups, shape[1])
        axes = self.inner.axes(block[::-1] if self.transposed else block)
        if axes is None:
            return None
        first, second = axes[::-1] if self.transposed else axes
        count = int(first.blocks.max()) + 1
        groups = torch.arange(self.groups)[:, None] * count + first.blocks
        kernel = (Axis.apart(size) for size in shape[2:])
        return (Axis(first.over_rows, groups.flatten()), second, *kernel)

    def live(self, G: Tensor) -> Tensor:
        mask = self.inner.live(self._slices(G))  # (..., K, g, O/g or 1, I/g or 1)
        mask = mask.mT if self.transposed else mask
        if self.groups > 1:  # a block's mask stands for each of its rows
            rows = G.shape[-self.ndim] // self.groups
            mask = mask.expand(*mask.shape[:-2], rows, mask.shape[-1])
        return mask.flatten(-3, -2).movedim(-3, -1).unflatten(-1, G.shape[-self.dims :])

    def dualize_(self, G: Tensor) -> Tensor:
        """Dualize slice by slice: all of them together are a copy of G."""
        G = G.contiguous()
        for X in self._slices(G).unbind(-4):
            X.copy_(self.inner.dualize_(X.contiguous()))
        return G.div_(self.factor(G.shape))

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
