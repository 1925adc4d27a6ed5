"""Directions: what a step dualizes, from the stream of gradients.

G: fresh gradients (n, *shape), a stack of weights of one shape. live: 1 where a block has a
gradient, else 0, broadcastable to G. A direction's scale does not matter, as dualize ignores it
(with scale = "unit"); so none has a bias correction or an ε.
Sources: Kingma, Ba, arXiv 1412.6980 (Adam); Vyas et al., arXiv 2409.11321 (SOAP);
Chen et al., arXiv 2302.06675 (Lion); Shazeer, Stern, arXiv 1804.04235 (Adafactor).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from .axes import Lines, lines_of
from .norms import Norm
from .plugins import require_free, require_part

Buffers = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """The part of a weight that a process has: its rows from `first` on.

    shape: of the whole weight. total: sets a tensor to its sum over the ranks that have the other
    rows, and returns it; None where this process has all of them, or needs no sums.
    """

    shape: tuple[int, ...]
    first: int = 0
    total: Callable[[Tensor], Tensor] | None = None


class Direction:
    """A rule for what is dualized. One instance serves all weights; the buffers are its memory.

    gated: it leaves its buffers as they are wherever live is 0. Otherwise the step does that for
    it, at the price of a copy.
    entrywise: no entry depends on another one, so that ranks may each hold some rows of a weight.
    """

    gated = entrywise = False
    # Names of small buffers that keep float32 whatever optim.momentum_dtype is.
    precise: tuple[str, ...] = ()

    @property
    def by_rows(self) -> bool:
        """Return whether ranks may each hold some rows of a weight, with Rows.total for sums."""
        return self.entrywise

    def on(self, norm: Norm, rows: Rows) -> "Direction":
        """Return the direction for weights of this norm, of which this process has these rows."""
        return self

    def buffers(self, W: Tensor) -> Buffers:
        """Return the buffers of one weight (*shape) before its first step, in its dtype.

        Where ranks have some rows each of a weight, so they have of a buffer of as many dimensions.
        Any other buffer is the same on all of them.
        """
        return {"momentum": torch.zeros_like(W)}

    def __call__(
        self, G: Tensor, state: Buffers, *, live: Tensor, beta: float, beta2: float, refresh: bool
    ) -> Tensor:
        """Return what is dualized (n, *shape), not an alias of a buffer.

        G is 0 where live is, and may be overwritten. state: the buffers, stacked (n, …), which are
        updated in place. refresh: costly parts of the state are made anew on this step.
        """
        raise NotImplementedError


def average_(M: Tensor, G: Tensor, live: Tensor, beta: float) -> Tensor:
    """Set M ← β M + (1 − β) G where live is 1, and return it; M, but for denormals, stays
    elsewhere."""
    return flush_(M.lerp_(G, live * (1 - beta)))


def flush_(M: Tensor) -> Tensor:
    """Set to 0 what is no larger than the smallest normal number: averages of zeros would tend to
    denormals, which make every product slow."""
    return torch.hardshrink(M, torch.finfo(M.dtype).tiny, out=M)


class Momentum(Direction):
    """The moving average M ← β M + (1 − β) G; with nesterov the one step ahead, (1 − β) G + β M."""

    gated = entrywise = True

    def __init__(self, *, nesterov: bool = False) -> None:
        self.nesterov = nesterov

    def __call__(
        self, G: Tensor, state: Buffers, *, live: Tensor, beta: float, beta2: float, refresh: bool
    ) -> Tensor:
        M = average_(state["momentum"], G, live, beta)
        return G.lerp_(M, beta) if self.nesterov else G.copy_(M)


class SignMomentum(Direction):
    """Lion: sign(β M + (1 − β) G) with the old average, then M ← β₂ M + (1 − β₂) G."""

    gated = entrywise = True

    def __call__(
        self, G: Tensor, state: Buffers, *, live: Tensor, beta: float, beta2: float, refresh: bool
    ) -> Tensor:
        D = torch.lerp(state["momentum"], G, 1 - beta).sign_()
        average_(state["momentum"], G, live, beta2)
        return D


def rms_(R: Tensor, G: Tensor, live: Tensor, beta2: float) -> Tensor:
    """Set R ← √(β₂ R² + (1 − β₂) G²), without squares that under- or overflow, and return it."""
    rate = live * (1 - beta2)
    return flush_(R.copy_(torch.hypot(R * (1 - rate).sqrt(), G * rate.sqrt())))


def ratio(M: Tensor, R: Tensor) -> Tensor:
    """Return M / R, 0 where R is; finite where R has forgotten what M still remembers."""
    return torch.where(R > 0, M / R, 0).clamp_(-1e6, 1e6)


class Adam(Direction):
    """M / R: the average gradient over its running RMS, 0 where there was never a gradient."""

    gated = entrywise = True

    def buffers(self, W: Tensor) -> Buffers:
        return {"momentum": torch.zeros_like(W), "rms": torch.zeros_like(W)}

    def __call__(
        self, G: Tensor, state: Buffers, *, live: Tensor, beta: float, beta2: float, refresh: bool
    ) -> Tensor:
        M, R = average_(state["momentum"], G, live, beta), rms_(state["rms"], G, live, beta2)
        return ratio(M, R)


@dataclass(frozen=True)
class SOAP(Direction):
    """Adam in the eigenbasis of Shampoo's factors L ← β₂ L + (1 − β₂) G Gᵀ and R likewise.

    A weight of more than 2 dimensions is taken as a matrix (O, rest), a vector as by Adam. A side
    longer than `limit` keeps its own axes. nesterov: of the average one step ahead, (1 − β) G + β
    M.

    Eigenvectors of equal eigenvalues, of zero above all, and quotients of entries that should be
    zero are rounding, different on every machine. So here, with ε the spacing of floats at 1:
    - The basis starts at the weight's own axes and takes one step of orthogonal iteration on every
      refresh, Q ← qr((F + √ε f I) Q), f being the factor F's largest diagonal entry. What F has not
      seen, or sees alike, keeps its axes.
    - An entry that is at most √ε of the largest RMS, as its own RMS is, is 0, and only from twice
      that on the full quotient. A quotient is at most 1/√(1 − β₂): more than that comes of axes
      that have just turned towards gradients, whose RMS is not theirs yet.
    docs/theory.md §3 says what a change of G by ε then does.
    """

    gated = True
    limit: int = 8192
    nesterov: bool = False

    def buffers(self, W: Tensor) -> Buffers:
        buffers = {
            k: torch.zeros_like(W, memory_format=torch.contiguous_format)
            for k in ("momentum", "rms")
        }
        buffers["unit"] = W.new_zeros(())
        if W.ndim >= 2:
            for side, size in (("left", W.shape[0]), ("right", W[0].numel())):
                if size <= self.limit:
                    buffers |= {
                        side: W.new_zeros(size, size),
                        f"{side}_basis": torch.eye(size, dtype=W.dtype, device=W.device),
                    }
        return buffers

    def __call__(
        self, G: Tensor, state: Buffers, *, live: Tensor, beta: float, beta2: float, refresh: bool
    ) -> Tensor:
        shape = G.shape
        M = average_(state["momentum"], G, live, beta)
        if self.nesterov:
            M = torch.lerp(G, M, beta)
        if G.ndim < 3:
            R = rms_(state["rms"], G, live, beta2)
            return ratio(M, R)
        G, M = G.flatten(2), M.flatten(2)
        # Factors are kept in units of the first gradient's largest entry, a power of two: squares
        # neither under- nor overflow, and digits stay.
        largest, unit = torch.frexp(G.abs().amax((-2, -1))), state["unit"]
        unit.copy_(
            torch.where(
                (unit > 0) | (largest.mantissa == 0),
                unit,
                torch.ldexp(torch.ones_like(unit), largest.exponent),
            )
        )
        scale = torch.where(unit > 0, unit, 1)[:, None, None]
        seen = live.reshape(live.shape[0], -1).amax(-1)[:, None, None] if live.ndim else live
        left, right = (
            self._basis(state, side, P / scale, seen, beta2, refresh)
            for side, P in (("left", G), ("right", G.mT))
        )
        R = rms_(state["rms"].view_as(G), _turn(G, left, right), seen, beta2)
        T = _turn(M, left, right)
        floor, limit = _root_eps(R) * R.amax((-2, -1), keepdim=True), (1 - beta2) ** -0.5
        known = (R.maximum(T.abs()) / floor - 1).clamp_(0, 1)
        D = torch.where(known > 0, (T / R).clamp_(-limit, limit) * known, 0)
        return _turn(D, *(None if Q is None else Q.mT for Q in (left, right))).reshape(shape)

    @staticmethod
    def _basis(
        state: Buffers, side: str, P: Tensor, live: Tensor, beta2: float, refresh: bool
    ) -> Tensor | None:
        """Return the side's basis as columns, after P (n, size, other) was seen."""
        if side not in state:
            return None
        F, Q = state[side], state[f"{side}_basis"]
        axes = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        Q.copy_(
            torch.where(Q.flatten(1).any(-1)[:, None, None], Q, axes)
        )  # a checkpoint of before may have it 0 until the first refresh
        average_(F, P @ P.mT, live, beta2)
        if refresh:
            shift, top = _root_eps(F), F.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]
            moved = F @ Q
            # Columns are made orthogonal in the order of their eigenvalues, largest first. Within
            # an octave they keep their own order, which no last digit may decide.
            octave = (
                (torch.where(top > 0, (Q * moved).sum(-2, keepdim=True) / top, 0) + shift)
                .log2()
                .add(0.25)
                .floor()
            )
            order = octave.argsort(dim=-1, descending=True, stable=True).expand_as(Q)
            turned = torch.linalg.qr((moved + shift * top * Q).gather(-1, order))[0]
            Q.copy_(
                torch.where(
                    (live > 0) & (top > 0), torch.empty_like(Q).scatter_(-1, order, turned), Q
                )
            )
        return Q


def _root_eps(X: Tensor) -> float:
    """Return √ε of a dtype: 1.5e-8 in float64, 3.5e-4 in float32."""
    return torch.finfo(X.dtype).eps ** 0.5


def _turn(X: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return leftᵀ X right; None is the identity."""
    X = X if left is None else left.mT @ X
    return X if right is None else X @ right


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
class Factored(Direction):
    """The average one step ahead, M̃ = (1 − β) G + β M, over √(r cᵀ): r and c are running means of
    G² over the rows and over the columns of each block, Adafactor's factored second moment.

    r and c are kept as their roots, and are of the norm's blocks: heads, experts, kernel positions.
    Vectors and scalars are divided entry by entry, as by Adam. What a norm's dualize ignores is
    left out: r where it gives each row its full size, all of it in sign descent. Where rows are
    blocks, c is of those with a gradient.

    Of v = √(r cᵀ), in units of the block's RMS u, the quotient is M̃ v / (v² + ε u²), with ε the
    spacing of floats at 1. It is M̃ / v but for v near √ε u, the size below which a gradient's
    entries are rounding. So a change of G by ε changes it by √ε at most, and it is finite where r
    and c have forgotten what M still remembers.
    """

    gated = True
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

    def __call__(
        self, G: Tensor, state: Buffers, *, live: Tensor, beta: float, beta2: float, refresh: bool
    ) -> Tensor:
        if self.norm.ignores == "entries":
            return self._ahead(G, state, live, beta)
        lines = self._lines_of(G[0])
        if lines is None:
            R = rms_(state["rms"], G, live, beta2)
            return ratio(self._ahead(G, state, live, beta), R)
        roots = self._observe(G, state, live, beta2, lines)
        return self._quotient(self._ahead(G, state, live, beta), roots, lines)

    def _sides(self) -> tuple[str, ...]:
        return ("columns",) if self.norm.ignores == "rows" else ("rows", "columns")

    def _lines_of(self, W: Tensor) -> Lines | None:
        """Return the lines of the blocks of the rows W (rows, …); None for vectors."""
        if W.ndim < 2:
            return None
        rows = self.rows or Rows(tuple(W.shape))
        return _lines(self.norm, rows.shape, rows.first, rows.first + len(W), W.device)

    @staticmethod
    def _ahead(G: Tensor, state: Buffers, live: Tensor, beta: float) -> Tensor:
        """Return the average one step ahead, in G's memory."""
        return G.lerp_(average_(state["momentum"], G, live, beta), beta)

    def _sums_of_squares(self, X: Tensor, lines: Lines) -> dict[str, Tensor]:
        """Return the sums of squares over each row and column. X is overwritten."""
        X.square_()
        return {k: lines.reduce(torch.sum, X, rows=k == "rows") for k in self._sides()}

    def _observe(
        self, G: Tensor, state: Buffers, live: Tensor, beta2: float, lines: Lines
    ) -> dict[str, Tensor]:
        """Let the roots of r and c see a gradient, and return them, (n, *lines.shape())."""
        live = live.reshape(*(1,) * (G.ndim - live.ndim), *live.shape)
        largest = lines.by_block(_largest, G).abs()
        unit = torch.where(largest > 0, largest, 1)  # squares neither under- nor overflow
        roots = {}
        for name, total in self._sums_of_squares(G / lines.spread_blocks(unit), lines).items():
            rows = name == "rows"
            count, units = lines.count(live, rows=rows), lines.spread_blocks(unit, rows=rows)
            if self.rows and self.rows.total and not lines.complete(rows=rows):
                # In float64, where squares of float32 numbers neither under- nor overflow.
                parts = (
                    total.double() * units.double().square(),
                    count.expand(len(G), *count.shape[1:]),
                )
                (total, count), units = _sums_over_ranks(self.rows.total, *parts), 1
            fresh = ((total / count.clamp(min=1)).sqrt() * units).to(G)
            roots[name] = rms_(state[name].view(total.shape), fresh, (count > 0).to(G), beta2)
        return roots

    @staticmethod
    def _quotient(D: Tensor, roots: dict[str, Tensor], lines: Lines) -> Tensor:
        """Return D v / (v² + ε u²), in D's memory."""
        eps = torch.finfo(D.dtype).eps
        u = _block_rms(roots, lines)
        c = roots["columns"] / lines.spread_blocks(u, rows=False)
        if "rows" not in roots:
            return D.mul_(lines.spread(c.div_(c.square().add_(eps)), rows=False))
        r = roots["rows"] / lines.spread_blocks(u, rows=True)
        r, c = lines.spread(r, rows=True), lines.spread(c, rows=False)
        if r.shape == D.shape:  # without a second copy of D's size
            v = r.mul_(c)
        else:
            v = c.mul_(r) if c.shape == D.shape else r * c
        return D.mul_(v).div_(v.square_().add_(eps))


def _sums_over_ranks(total: Callable[[Tensor], Tensor], *parts: Tensor) -> list[Tensor]:
    """Return the sums of these tensors over ranks, in float64, with one collective."""
    joined = total(torch.cat([x.double().flatten() for x in parts]))
    pairs = zip(joined.split([x.numel() for x in parts]), parts, strict=True)
    return [x.view(part.shape) for x, part in pairs]


def _block_rms(roots: dict[str, Tensor], lines: Lines) -> Tensor:
    """Return the RMS u of each block, 1 where that is 0, from the root means of its lines: of
    those that are here, if in part, which are the same on all ranks."""
    rows = not lines.is_here(rows=False)
    R = roots["rows" if rows else "columns"]
    largest = lines.reduce(_largest, R, rows=not rows)
    top = torch.where(largest > 0, largest, 1)
    squares = (R / lines.spread_blocks(top, rows=rows)).square_()
    count = lines.count(R.new_ones((1,) * R.ndim), rows=not rows)
    u = top * (lines.reduce(torch.sum, squares, rows=not rows) / count).sqrt_()
    return torch.where(u > 0, u, 1)


def _largest(X: Tensor, *, dim: int, keepdim: bool = False) -> Tensor:
    """Return max |X| over a dimension, without a copy of X."""
    return X.amax(dim, keepdim).maximum(-X.amin(dim, keepdim))


DIRECTIONS: dict[str, Direction] = {
    "momentum": Momentum(),
    "nesterov": Momentum(nesterov=True),
    "adam": Adam(),
    "soap": SOAP(),
    "nesterov_soap": SOAP(nesterov=True),
    "lion": SignMomentum(),
    "factored": Factored(),
}


def register_direction(name: str) -> Callable[[type[Direction]], type[Direction]]:
    """Make a direction known by name, so that configurations can name it.

    The class must be constructible without arguments.
    """

    def register(cls: type[Direction]) -> type[Direction]:
        present = DIRECTIONS.get(name)
        require_free("register_direction", name, cls, present and type(present))
        DIRECTIONS[name] = require_part("register_direction", cls, Direction)
        return cls

    return register
