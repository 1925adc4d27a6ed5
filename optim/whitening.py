"""Directions that know their noise: momentum in coordinates in which gradients are white.

r, c: running means of G² over each row and over each column of a block; a block is a matrix of the
norm: a head, an expert, a kernel position. R: the running mean of g gᵀ over the rows g of a block,
whose diagonal is c. M̃: the average one step ahead, (1 − β) G + β M. The whitened average
r^(−1/4) M̃ R^(−1/4) is dualized in the coordinates X = r^(1/4) W R^(1/4), and its step carried
back:

    W ← W − lr · r^(−1/4) dualize( r^(−1/2) M̃ R^(−1/2) ) R^(−1/4)

which is its steepest descent in the norm of X (docs/theory.md §3). Sources: Shazeer, Stern, arXiv
1804.04235 (Adafactor, whose second moment is √(r cᵀ)); Gupta, Koren, Singer, arXiv 1802.09568
(Shampoo); Xie et al., arXiv 2503.10537, An et al., arXiv 2503.20762 (one side alone).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from .axes import Lines, Matrices, lines_of
from .moments import Back, Buffers, Direction, Rows, average_, ratio, rms_
from .norms import Norm
from .polar import inverse_fourth_root

# By norm, shape of a weight, first row, end and device: a norm's blocks stay where they are.
LINES: dict[tuple[Norm, tuple[int, ...], int, int, torch.device], Lines | None] = {}
MOST_LINES = 4096  # more are of rows with a gradient, as many as there are this time


def _lines(
    norm: Norm, shape: tuple[int, ...], first: int, end: int, device: torch.device
) -> Lines | None:
    """Return the lines of a weight's blocks, of which rows first to end are here; None for
    vectors."""
    key = norm, shape, first, end, device
    if key not in LINES:
        LINES[key] = _new_lines(*key)  # type: ignore[call-arg]
    return LINES[key]


@torch.compiler.disable
def _new_lines(
    norm: Norm, shape: tuple[int, ...], first: int, end: int, device: torch.device
) -> Lines | None:
    """Return what _lines() does, made anew."""
    if len(LINES) >= MOST_LINES:
        LINES.clear()
    axes = norm.axes(shape)
    return None if axes is None else lines_of(axes, first, end, device)


@dataclass(frozen=True)
class Means:
    """Root means of squares over rows and columns, after they saw a gradient.

    roots: {"rows" or "columns": ρ (n, *lines.shape())}; inverses: 1/ρ. before: ρ of the columns
    before it; count: of live entries that each column had.
    """

    lines: Lines
    roots: dict[str, Tensor]
    inverses: dict[str, Tensor]
    before: Tensor
    count: Tensor


@dataclass(frozen=True)
class Factored(Direction):
    """The whitened average with means over rows and columns: c, a diagonal matrix, stands for R.

    State: the momentum, and the roots ρ of r and of c in float32. Vectors and scalars keep the root
    of the running mean of G² entry by entry: they are divided by it, as by Adam, and dualized to
    full size, without a way back.

    It leaves out what a norm's dualize ignores: everything in sign descent; r where each row gets
    its full size. There that comes after the way back: M̃ c^(−3/4) is dualized. Where rows are
    blocks, c is of the rows that have a gradient.

    1/ρ is ρ / (ρ² + ε u²), with u the block's RMS and ε the spacing of floats at 1: below √ε u a
    gradient's entries are rounding. 1/√ρ is in units of ρ's harmonic mean, so that a step is about
    as large as dualize made it.
    """

    gated = own_coordinates = True
    precise = ("rows", "columns")
    norm: Norm = field(default=Norm())
    rows: Rows | None = None

    @property
    def by_rows(self) -> bool:
        return True

    def on(self, norm: Norm, rows: Rows) -> Direction:
        return replace(self, norm=norm, rows=rows)

    def buffers(self, W: Tensor) -> Buffers:
        buffers, lines = {"momentum": torch.zeros_like(W)}, self._lines_of(W)
        if self.norm.ignores == "entries":
            return buffers
        if lines is None:
            return buffers | {"rms": torch.zeros_like(W)}
        dtype = torch.promote_types(W.dtype, torch.float32)
        for name in self._sides():
            shape = lines.shape(W.shape, rows=name == "rows")
            own = shape if lines.complete(rows=name == "rows") else (prod(shape),)
            buffers[name] = W.new_zeros(own, dtype=dtype)
        return buffers

    def whiten(
        self, G: Tensor, state: Buffers, *, live: Tensor, beta: float, beta2: float, refresh: bool
    ) -> tuple[Tensor, Back | None]:
        if self.norm.ignores == "entries":
            return _ahead(G, state, live, beta), None
        lines = self._lines_of(G[0])
        if lines is None:
            R = rms_(state["rms"], G, live, beta2)
            return ratio(_ahead(G, state, live, beta), R), None
        means = self._observe(G, state, live, beta2, lines)
        right = self._right(G, state, means, beta2=beta2, refresh=refresh)
        M = _ahead(G, state, live, beta)
        if "rows" not in means.roots:
            return right(M, 3), None
        left, lines = self._scale("rows", means), means.lines

        def back(T: Tensor) -> Tensor:
            return right(lines.scale_(T, left, rows=True), 1)

        return right(lines.scale_(M, left.square(), rows=True), 2), back

    def __call__(self, G: Tensor, state: Buffers, **settings: Any) -> Tensor:
        return self.whiten(G, state, **settings)[0]

    def _sides(self) -> tuple[str, ...]:
        return ("columns",) if self.norm.ignores == "rows" else ("rows", "columns")

    def _lines_of(self, W: Tensor) -> Lines | None:
        """Return the lines of the blocks of the rows W (rows, …); None for vectors."""
        if W.ndim < 2:
            return None
        rows = self.rows or Rows(tuple(W.shape))
        return _lines(self.norm, rows.shape, rows.first, rows.first + len(W), W.device)

    def _observe(
        self, G: Tensor, state: Buffers, live: Tensor, beta2: float, lines: Lines
    ) -> Means:
        """Let the roots of r and c see a gradient."""
        live = live.reshape(*(1,) * (G.ndim - live.ndim), *live.shape)
        unit = _above_zero(lines.largest(G))  # squares neither under- nor overflow
        squares = (G / lines.spread_blocks(unit)).square_()
        roots, before = {}, state["columns"].clone()
        for name in self._sides():
            rows = name == "rows"
            total = lines.reduce(torch.sum, squares, rows=rows)
            count, units = lines.count(live, rows=rows), lines.spread_blocks(unit, rows=rows)
            if self._sums and not lines.complete(rows=rows):
                # In float64, where squares of float32 numbers neither under- nor overflow.
                parts = (
                    total.double() * units.double().square(),
                    count.expand(len(G), *count.shape[1:]),
                )
                (total, count), units = _sums_over_ranks(self._sums, *parts), 1
            fresh = ((total / count.clamp(min=1)).sqrt() * units).to(G)
            R = state[name].view(total.shape)
            roots[name] = rms_(R, fresh, (count > 0).to(G), beta2)
        before = before.view_as(roots["columns"])
        return Means(lines, roots, _inverses(roots, lines), before, count)

    @property
    def _sums(self) -> Callable[[Tensor], Tensor] | None:
        return self.rows.total if self.rows else None

    def _right(
        self, G: Tensor, state: Buffers, means: Means, *, beta2: float, refresh: bool
    ) -> Callable[[Tensor, int], Tensor]:
        """Return what multiplies a stack by c^(−k/4) from the right, and may overwrite it."""
        lines, columns = means.lines, self._scale("columns", means)
        return lambda X, k: lines.scale_(X, columns**k, rows=False)

    def _scale(self, name: str, means: Means) -> Tensor:
        """Return 1/√ρ of each row (column), in units of the harmonic mean of ρ."""
        lines, rows, inverse = means.lines, name == "rows", means.inverses[name]
        parts = (inverse * means.roots[name], inverse)
        sums = [lines.reduce(torch.sum, x, rows=not rows) for x in parts]
        if self._sums and not lines.is_here(rows=rows):
            sums = _sums_over_ranks(self._sums, *sums)
        known, total = (x.to(inverse) for x in sums)
        unit = lines.spread_blocks(known / _above_zero(total), rows=rows)
        return (inverse * unit).sqrt_()


@dataclass(frozen=True)
class Whitened(Factored):
    """The whitened average with R itself.

    R serves blocks whose rows lie along the first dimension of a weight, or whole blocks do. The
    columns of a block with fewer rows are split into runs of equal length, with an R each, that
    have no more columns than the block has rows. Where none has two, the weight is Factored's, and
    so are all others.

    State beside Factored's, for each block, in float32: "factor", a square of which the part below
    the diagonal is C, of R = diag(γ) C diag(γ) with γ = √c, so that it knows no scale; C has 1s on
    its diagonal. The rest is the root, R^(−1/4), made anew on every refresh by matrix products
    alone (polar.inverse_fourth_root). Both are symmetric.
    """

    precise = (*Factored.precise, "factor")

    def buffers(self, W: Tensor) -> Buffers:
        buffers, matrices = super().buffers(W), self._matrices(W)
        if matrices is None:
            return buffers
        columns, size = buffers["columns"], W.shape[matrices.columns] // matrices.runs
        shape: tuple[int, ...] = (size * columns.numel(),)
        if columns.ndim == W.ndim:  # ranks have whole blocks, and of this buffer as of the weight
            shape = (len(W), size * prod(columns.shape[1:]), *(1,) * (W.ndim - 2))
        return buffers | {"factor": columns.new_zeros(shape)}

    def _matrices(self, W: Tensor) -> Matrices | None:
        """Return where the blocks of the rows W lie; None where Factored serves."""
        lines = None if self.norm.ignores == "entries" else self._lines_of(W)
        matrices = lines.matrices() if lines else None
        if matrices is None:
            return None
        shape = self.rows.shape if self.rows else W.shape
        rows, columns = (shape[d] for d in (matrices.rows, matrices.columns))
        width = max(1, min(rows // max(1, matrices.segments.count), columns))
        while columns % width:
            width -= 1
        return replace(matrices, runs=columns // width) if width > 1 else None

    def _right(
        self, G: Tensor, state: Buffers, means: Means, *, beta2: float, refresh: bool
    ) -> Callable[[Tensor, int], Tensor]:
        matrices = self._matrices(G[0])
        if matrices is None:
            return super()._right(G, state, means, beta2=beta2, refresh=refresh)
        roots = matrices.seen(means.roots["columns"])
        F = state["factor"].view(*roots.shape, roots.shape[-1])
        live = matrices.seen(means.count).amax(-1, keepdim=True).to(G) > 0
        root = F.triu()
        root.add_(root.triu(1).mT)
        C = self._products(F, G, means, matrices, live, beta2)
        below = C.tril(-1)
        if refresh:
            sizes = roots / _above_zero(roots.amax(-1, keepdim=True))  # products do not underflow
            Z = inverse_fourth_root(_scale_both_(C, sizes))
            root.lerp_(Z, live[..., None].to(Z))
        # A block whose first gradient came after the others' roots were made starts as Factored.
        diagonal = root.diagonal(dim1=-2, dim2=-1)
        none = diagonal.amax(-1, keepdim=True) == 0
        columns = matrices.seen(self._scale("columns", means))
        diagonal.copy_(torch.where(none, columns, diagonal))
        F.copy_(below.add_(root.triu()))
        return lambda X, k: matrices.times(X, torch.linalg.matrix_power(root, k))

    def _products(
        self, F: Tensor, G: Tensor, means: Means, matrices: Matrices, live: Tensor, beta2: float
    ) -> Tensor:
        """Return C after it saw a gradient. live: which blocks have one, (n, *others, k, 1)."""
        lines, inverse = means.lines, means.inverses["columns"]
        fresh = matrices.gram(lines.scale_(G.clone(), inverse, rows=False))
        if self._sums and not lines.complete(rows=False):
            fresh = self._sums(fresh)
        count = matrices.seen(means.count.to(G)).amax(-1)[..., None, None]
        # √β₂ ρ_before / ρ, at most 1.
        kept = matrices.seen(beta2**0.5 * means.before * inverse)
        C = F.tril(-1)
        C = _scale_both_(C + C.mT, torch.where(live, kept, 1))
        C.add_(fresh.div_(count.clamp(min=1)), alpha=1 - beta2)
        ones = matrices.seen((means.roots["columns"] * inverse).square())
        C.diagonal(dim1=-2, dim2=-1).copy_(ones)
        return C


def _scale_both_(A: Tensor, x: Tensor) -> Tensor:
    """Multiply matrices (..., n, n) by vectors (..., n) from both sides, and return them."""
    return A.mul_(x[..., :, None]).mul_(x[..., None, :])


def _ahead(G: Tensor, state: Buffers, live: Tensor, beta: float) -> Tensor:
    """Return the average one step ahead, in G's memory."""
    return G.lerp_(average_(state["momentum"], G, live, beta), beta)


def _inverses(roots: dict[str, Tensor], lines: Lines) -> dict[str, Tensor]:
    """Return 1/ρ of each root mean, as ρ / (ρ² + ε u²), with u the block's RMS."""
    u = _block_rms(roots, lines)
    inverses = {}
    for name, R in roots.items():
        units = lines.spread_blocks(u, rows=name == "rows")
        x = R / units
        inverses[name] = x / (x.square() + torch.finfo(R.dtype).eps) / units
    return inverses


def _sums_over_ranks(total: Callable[[Tensor], Tensor], *parts: Tensor) -> list[Tensor]:
    """Return the sums of these tensors over ranks, in float64, with one collective."""
    joined = total(torch.cat([x.double().flatten() for x in parts]))
    pairs = zip(joined.split([x.numel() for x in parts]), parts, strict=True)
    return [x.view(part.shape) for x, part in pairs]


def _block_rms(roots: dict[str, Tensor], lines: Lines) -> Tensor:
    """Return the RMS u of each block, above 0, from the root means of its lines: of
    those that are here, if in part, which are the same on all ranks."""
    rows = not lines.is_here(rows=False)
    R = roots["rows" if rows else "columns"]
    top = _above_zero(lines.reduce(torch.amax, R, rows=not rows))
    squares = (R / lines.spread_blocks(top, rows=rows)).square_()
    count = lines.count(R.new_ones((1,) * R.ndim), rows=not rows)
    u = top * (lines.reduce(torch.sum, squares, rows=not rows) / count).sqrt_()
    return _above_zero(u)


def _above_zero(x: Tensor) -> Tensor:
    """Return numbers to divide by: of what is 0 then, the quotient is 0."""
    return x.clamp(min=torch.finfo(x.dtype).tiny)
