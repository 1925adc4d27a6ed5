"""Directions: what a step dualizes, from the stream of gradients.

G: fresh gradients (n, *shape), a stack of weights of one shape. live: 1 where a block has a
gradient, else 0, broadcastable to G. A direction's scale does not matter, as dualize ignores it
(with scale = "unit"); so none has a bias correction or an ε.
Sources: Kingma, Ba, arXiv 1412.6980 (Adam); Vyas et al., arXiv 2409.11321 (SOAP);
Chen et al., arXiv 2302.06675 (Lion). Those that know their noise are in whitening.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Buffers, Direction, average_, ratio, rms_
from .plugins import require_free, require_part
from .whitening import Factored, Whitened


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


DIRECTIONS: dict[str, Direction] = {
    "momentum": Momentum(),
    "nesterov": Momentum(nesterov=True),
    "adam": Adam(),
    "soap": SOAP(),
    "nesterov_soap": SOAP(nesterov=True),
    "lion": SignMomentum(),
    "factored": Factored(),
    "whitened": Whitened(),
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
