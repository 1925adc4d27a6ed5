"""The dimensions of a weight as the blocks of its norm have them: which lines run along each.

A line is a row or a column of a block. Statistics of rows and columns are taken in the weight's own
shape, so that heads, experts and convolutions need no copy, and ranks may have some rows each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Axes = tuple["Axis", ...]


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension of a weight.

    over_rows: it runs over the rows of blocks; otherwise over their columns. blocks: (size,), the
    number of the block in which each place is; all 0 where blocks reach over the whole dimension.
    """

    over_rows: bool
    blocks: Tensor

    @staticmethod
    def whole(size: int, *, over_rows: bool) -> "Axis":
        """Return a dimension over all of which blocks reach."""
        return Axis(over_rows, torch.zeros(size, dtype=torch.int64))

    @staticmethod
    def apart(size: int) -> "Axis":
        """Return a dimension each place of which is in a block of its own."""
        return Axis(False, torch.arange(size))


def matrix_axes(shape: Sequence[int]) -> Axes | None:
    """Return the axes of a weight (O, …) as one matrix (O, rest); None for vectors and scalars."""
    if len(shape) < 2:
        return None
    columns = (Axis.whole(size, over_rows=False) for size in shape[1:])
    return (Axis.whole(shape[0], over_rows=True), *columns)


class Segments:
    """The places along one dimension of which a process has some, by block.

    count: of blocks along it. sizes: (count,), the places of each that are here. distinct: each
    place is in a block of its own. equal: blocks are runs of one size. own: the block of each
    place, and places: those of each block, where blocks are several and not distinct.
    """

    def __init__(self, blocks: Tensor, first: int, end: int, device: torch.device) -> None:
        # Where each place is a block, a rank that has some places has these blocks alone.
        self.distinct = torch.equal(blocks, torch.arange(len(blocks)))
        own = torch.arange(end - first) if self.distinct else blocks[first:end]
        self.count = end - first if self.distinct else int(blocks.max()) + 1
        self.sizes = torch.bincount(own, minlength=self.count).to(device)
        size = len(own) // max(1, self.count)
        self.equal = torch.equal(own, torch.arange(self.count).repeat_interleave(size))
        self.own, self.places = own[:0], list[Tensor]()
        if not self.distinct and self.count > 1:
            self.own = own.to(device)
            self.places = [(own == b).nonzero()[:, 0].to(device) for b in range(self.count)]

    def reduce(self, f: Callable[..., Tensor], X: Tensor, dim: int) -> Tensor:
        """Return f (a sum, or the largest of numbers >= 0) over the places of each block."""
        if self.distinct:
            return X
        if not X.shape[dim]:
            return X.new_zeros(*X.shape[:dim], self.count, *X.shape[dim + 1 :])
        if self.count == 1:
            return f(X, dim=dim, keepdim=True)
        if self.equal:
            return f(X.unflatten(dim, (self.count, -1)), dim=dim + 1)
        parts = (X.index_select(dim, places) for places in self.places)
        nothing = torch.zeros_like(X.narrow(dim, 0, 1))
        return torch.cat(
            [f(x, dim=dim, keepdim=True) if x.shape[dim] else nothing for x in parts], dim
        )

    def spread(self, X: Tensor, dim: int) -> Tensor:
        """Return what each place has of its block's number; of one block, broadcastable."""
        return X if self.distinct or self.count == 1 else X.index_select(dim, self.own)


@dataclass(frozen=True, eq=False)
class Lines:
    """The rows and the columns of the blocks of a stack (n, *shape), of which some slices are here.

    over_rows: of each dimension of one weight, as in Axis.
    """

    over_rows: tuple[bool, ...]
    segments: tuple[Segments, ...]

    def _across(self, rows: bool) -> list[tuple[int, Segments]]:
        """Return the dimensions of a stack over which a row (or a column) runs."""
        pairs = zip(self.over_rows, self.segments, strict=True)
        return [(d, s) for d, (over_rows, s) in enumerate(pairs, 1) if over_rows != rows]

    def complete(self, *, rows: bool) -> bool:
        """Return whether each row (column) that is here is so as a whole."""
        return self.over_rows[0] == rows or self.segments[0].distinct

    def is_here(self, *, rows: bool) -> bool:
        """Return whether all rows (columns) of each block that is here are so, if in part."""
        return self.over_rows[0] != rows or self.segments[0].distinct

    def shape(self, local: Sequence[int], *, rows: bool) -> tuple[int, ...]:
        """Return the shape of one number a row (column), broadcastable to a weight but for blocks
        that are several along a dimension."""
        sizes = list(local)
        for d, s in self._across(rows):
            sizes[d - 1] = s.count
        return tuple(sizes)

    def reduce(self, f: Callable[..., Tensor], X: Tensor, *, rows: bool) -> Tensor:
        """Return f (sum or largest) over each row (column) of X, (n, *self.shape())."""
        for d, s in reversed(self._across(rows)):
            X = s.reduce(f, X, d)
        return X

    def largest(self, X: Tensor) -> Tensor:
        """Return max |X| of each block, (n, blocks along each dimension)."""
        return self.reduce(torch.amax, self.reduce(_largest, X, rows=True).abs(), rows=False)

    def count(self, live: Tensor, *, rows: bool) -> Tensor:
        """Return how many live entries each row (column) has here, broadcastable to reduce().

        live: 1 or 0, of size 1 where it is the same for all of a dimension.
        """
        for d, s in self._across(rows):
            if live.shape[d] == 1:
                sizes = s.sizes.to(live).view(-1, *(1,) * (live.ndim - 1 - d))
                live = live if s.distinct else live * sizes
            else:
                live = s.reduce(torch.sum, live, d)
        return live

    def spread(self, X: Tensor, *, rows: bool) -> Tensor:
        """Return numbers of rows (columns), (n, *self.shape()), broadcastable to the stack."""
        for d, s in self._across(rows):
            X = s.spread(X, d)
        return X

    def scale_(self, X: Tensor, numbers: Tensor, *, rows: bool) -> Tensor:
        """Multiply each row (column) of a stack by its number, and return it."""
        Y = X
        for d, s in reversed(self._across(rows)):
            if s.equal and s.count > 1 and not s.distinct:  # a view, not one number an entry
                Y, numbers = Y.unflatten(d, (s.count, -1)), numbers.unsqueeze(d + 1)
            else:
                numbers = s.spread(numbers, d)
        Y.mul_(numbers)
        return X

    def spread_blocks(self, X: Tensor, *, rows: bool | None = None) -> Tensor:
        """Return numbers of blocks, broadcastable to those of rows (columns), or to the stack."""
        for d, (over_rows, s) in enumerate(zip(self.over_rows, self.segments, strict=True), 1):
            X = s.spread(X, d) if rows in (None, over_rows) else X
        return X

    def matrices(self) -> "Matrices | None":
        """Return where blocks lie as matrices: rows along one dimension, columns along another, and
        whole blocks along all others. None where they lie otherwise, or columns along the first."""
        pairs = list(enumerate(zip(self.over_rows, self.segments, strict=True)))
        rows = [d for d, (over_rows, _) in pairs if over_rows]
        columns = [d for d, (over_rows, s) in pairs if not over_rows and not s.distinct]
        if len(rows) != 1 or len(columns) != 1 or columns == [0]:
            return None
        one = self.segments[columns[0]].count == 1
        return Matrices(rows[0], columns[0], self.segments[rows[0]]) if one else None


@dataclass(frozen=True, eq=False)
class Matrices:
    """Blocks as matrices. rows, columns: the dimensions of a weight along which these lie.

    A stack (n, *shape) is seen as (n, *others, rows, columns), where others are the dimensions
    along which whole blocks lie; k: blocks along the rows. runs: of columns that follow each other,
    into which those of a block are split; where there are several, each is a matrix of its own, and
    they are the last of the others.
    """

    rows: int
    columns: int
    segments: Segments
    runs: int = 1

    def seen(self, X: Tensor) -> Tensor:
        """Return a stack, or numbers of its columns, as (n, *others, rows, columns)."""
        X = X.movedim((self.rows + 1, self.columns + 1), (-2, -1))
        if self.runs == 1:
            return X
        runs = min(self.runs, X.shape[-1])  # 1 where all columns have the same number
        return X.unflatten(-1, (runs, X.shape[-1] // runs)).movedim(-2, -3)

    def gram(self, X: Tensor) -> Tensor:
        """Return XᵀX of each block, (n, *others, k, columns, columns)."""
        X = self.seen(X)
        if self.segments.count == 1 or self.segments.equal:
            X = X.unflatten(-2, (self.segments.count, X.shape[-2] // self.segments.count))
            return X.mT @ X
        parts = [X.index_select(-2, places) for places in self.segments.places]
        return torch.stack([P.mT @ P for P in parts], -3)

    def times(self, X: Tensor, Z: Tensor) -> Tensor:
        """Return X Z of each block, a stack. Z: (n, *others, k, columns, columns)."""
        X = self.seen(X)
        if self.segments.count == 1:
            Y = X @ Z.squeeze(-3)
        elif self.segments.equal:
            rows = X.shape[-2] // self.segments.count
            Y = (X.unflatten(-2, (self.segments.count, rows)) @ Z).flatten(-3, -2)
        else:
            Y = torch.empty_like(X)
            for places, z in zip(self.segments.places, Z.unbind(-3), strict=True):
                Y.index_copy_(-2, places, X.index_select(-2, places) @ z)
        Y = Y if self.runs == 1 else Y.movedim(-3, -2).flatten(-2)
        return Y.movedim((-2, -1), (self.rows + 1, self.columns + 1))


def _largest(X: Tensor, *, dim: int, keepdim: bool = False) -> Tensor:
    """Return max |X| over a dimension, without a copy of X."""
    return X.amax(dim, keepdim).maximum(-X.amin(dim, keepdim))


def lines_of(axes: Axes, first: int, end: int, device: torch.device) -> Lines:
    """Return the lines of a weight of these axes, of which rows first to end are here."""
    spans = [(first, end), *((0, len(a.blocks)) for a in axes[1:])]
    segments = (Segments(a.blocks, *span, device) for a, span in zip(axes, spans, strict=True))
    return Lines(tuple(a.over_rows for a in axes), tuple(segments))
