"""Directions, averages of gradients and of their squares: what all directions are made of.

G: fresh gradients (n, *shape), a stack of weights of one shape. live: 1 where a block has a
gradient, else 0, broadcastable to G. Names that end in _ change their arguments.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .norms import Norm

Buffers = dict[str, Tensor]
# Takes a stack to the coordinates in which it is dualized, or a step back from there.
Back = Callable[[Tensor], Tensor]


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
    own_coordinates: whiten() may return what carries a step back.
    """

    gated = entrywise = own_coordinates = False
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

    def whiten(
        self, G: Tensor, state: Buffers, *, live: Tensor, beta: float, beta2: float, refresh: bool
    ) -> tuple[Tensor, Back | None]:
        """Return what is dualized, as __call__() does, and what carries the dualized step back from
        coordinates of the direction's own: None where it has none."""
        return self(G, state, live=live, beta=beta, beta2=beta2, refresh=refresh), None

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


def rms_(R: Tensor, G: Tensor, live: Tensor, beta2: float) -> Tensor:
    """Set R ← √(β₂ R² + (1 − β₂) G²), without squares that under- or overflow, and return it."""
    rate = live * (1 - beta2)
    return flush_(R.copy_(torch.hypot(R * (1 - rate).sqrt(), G * rate.sqrt())))


def ratio(M: Tensor, R: Tensor) -> Tensor:
    """Return M / R, 0 where R is; finite where R has forgotten what M still remembers."""
    return torch.where(R > 0, M / R, 0).clamp_(-1e6, 1e6)
