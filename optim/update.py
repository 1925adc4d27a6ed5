"""One step of the dualized optimizer: all of its arithmetic.

    W ← retract( W − lr · radius · ( dualize(direction) + weight_decay · W ) )

The default direction, "factored", has coordinates of its own for matrices: dualize acts there, and
what it returns is carried back (whitening.py). Then lr is the norm of the step in these.

A stack is n weights of one shape, norm and group, which one batched call steps. step_() knows no
ranks, no state dict and no torch.optim: Dualized gathers stacks (clipped gradients, float32
masters), calls it, and scatters what changed (stacks.py). Of 12 layers the queries, keys, values
and output projections of attention are one stack:

    weights   48 tensors (768, 768)             changed in place
    G         (48, 768, 768)                    their gradients
    live      (48, 1, 1), or finer, of bools    which blocks have a gradient; no other block moves
    radii     (48, 1, 1)                        the size of each weight's step at lr 1
    state     {"momentum": (48, 768, 768), …}   the direction's memory, changed in place
    group     {"direction": "factored", …}      settings, as optim/settings.py declares them
    lr        a number, or a tensor ()          the modular norm of this step, at scale "unit"

A name that ends in _ changes its arguments. Sources: [MD] Bernstein, Newhouse, arXiv 2410.21265;
[MN] Large et al., arXiv 2405.14813.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .directions import DIRECTIONS
from .moments import Back, Rows
from .norms import Norm

Group = Mapping[str, Any]
# One call for all tensors of a list; public in torch's source, though not in its documentation.
add_, subtract_, copy_ = torch._foreach_add_, torch._foreach_sub_, torch._foreach_copy_


def step_(
    weights: list[Tensor],
    G: Tensor,
    state: dict[str, Tensor],
    group: Group,
    *,
    norm: Norm,
    live: Tensor,
    radii: Tensor,
    lr: float | Tensor,
    refresh: bool,
    rows: Rows | None = None,
    origin: list[Tensor] | None = None,
    keep: Callable[[dict[str, Tensor]], None] | None = None,
) -> None:
    """Step a stack. G is overwritten. refresh: if true, SOAP renews its basis.

    rows: what weights has of the whole ones; by default all.

    origin: the starting weights W₀, for lr = "auto" alone, which measures W₀ − W. Decay and
    retraction are no part of that way, so they move W₀ along. keep: called with the new state, so
    that it is written back and freed before dualize needs memory.
    """
    D, back = direction_(G, state, group, norm=norm, live=live, refresh=refresh, rows=rows)
    if keep is not None:
        keep(state)
    del G, state
    D = dualize_(D, norm, group)
    D = D if back is None else back(D)
    descend_(weights, D, group, live=live, radii=radii, lr=lr, origin=origin)
    del D
    if group["constraint"] is not None:
        W = stacked(weights)
        settle_(weights, W, retract(W, norm, group), live=live, radii=radii, origin=origin)


def direction_(
    G: Tensor,
    state: dict[str, Tensor],
    group: Group,
    *,
    norm: Norm,
    live: Tensor,
    refresh: bool,
    rows: Rows | None = None,
) -> tuple[Tensor, Back | None]:
    """Return what is dualized, (n, *shape): a momentum, say. Only live blocks change the state.

    Also what carries the dualized step back, where a direction has coordinates of its own.
    """
    direction = DIRECTIONS[group["direction"]].on(norm, rows or Rows(tuple(G.shape[1:])))
    # A gated direction leaves its memory alone where nothing is live; others are put back below.
    before = {} if direction.gated else {k: v.clone() for k, v in state.items()}
    settings = {k: group[k] for k in ("beta", "beta2")}
    clear_(G, live)
    D, back = direction.whiten(G, state, live=live.to(G), refresh=refresh, **settings)
    for k, old in before.items():
        some = live.reshape(len(live), -1).any(1).reshape(-1, *(1,) * (old.ndim - 1))
        kept = live if old.shape == D.shape else some
        state[k] = torch.where(kept, state[k], old)
    return D, back


def dualize_(D: Tensor, norm: Norm, group: Group) -> Tensor:
    """Return the steepest direction of norm 1; with scale "dual", times the dual norm of D."""
    return norm.sharp(D) if group["scale"] == "dual" else norm.dualize_(D)


def descend_(
    weights: list[Tensor],
    T: Tensor,
    group: Group,
    *,
    live: Tensor,
    radii: Tensor,
    lr: float | Tensor,
    origin: list[Tensor] | None = None,
) -> None:
    """Set W ← W − lr · radius · (T + weight_decay · W) where live. T is overwritten."""
    U = clear_(T.mul_(radii), live)
    lr = lr.to(U) if isinstance(lr, Tensor) else lr
    if group["weight_decay"]:
        W = stacked(weights)
        decays = live & (U * W > 0) if group["cautious"] else live
        decay = torch.where(decays, W, 0).mul_(radii * group["weight_decay"]).mul_(lr)
        subtract_(weights, decay.unbind())
        if origin:
            subtract_(origin, decay.unbind())
    if isinstance(lr, Tensor):
        subtract_(weights, U.mul_(lr).unbind())
    else:
        add_(weights, U.unbind(), alpha=-lr)


def retract(W: Tensor, norm: Norm, group: Group) -> Tensor:
    """Return a stack (n, *shape) on its constraint.

    Vectors and scalars are kept in the ball: a bias of norm 1 for ever would be another model.
    """
    constraint = group["constraint"] if norm.ndim >= 2 else "ball"
    return {"ball": norm.project, "sphere": norm.sphere, "stiefel": norm.stiefel}[constraint](W)


def settle_(
    weights: list[Tensor],
    W: Tensor,
    R: Tensor,
    *,
    live: Tensor,
    radii: Tensor,
    origin: list[Tensor] | None = None,
) -> None:
    """Set the weights, stacked in W, to their retraction R where live and where they may move."""
    torch.where(live & (radii > 0), R, W, out=R)
    if origin:
        add_(origin, (R - W).unbind())
    copy_(weights, R.unbind())


def escape_terms(
    G: Tensor, T: Tensor, weights: list[Tensor], origin: list[Tensor], radii: Tensor
) -> Tensor:
    """Return (⟨G, W₀ − W⟩, Σ radius · ‖G‖†), (2,), of the escape velocity; see EscapeVelocity.

    G: gradients, 0 where not live. T: dualize(G), which attains the dual norm ‖G‖†.
    """
    ways = zip(G, origin, weights, strict=True)
    travelled = torch.stack([(g * (w0 - w)).sum() for g, w0, w in ways]).sum()
    return torch.stack([travelled, (G * T * radii).sum()])


def total_norm(grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the 2-norm of all gradients together, which clipping needs, 0-dim of this dtype.

    They are scaled by the largest entry first, so that no square under- or overflows.
    """
    largest = torch.nn.utils.get_total_norm(grads, torch.inf)
    scale = torch.where(largest > 0, largest, 1)
    length = torch.nn.utils.get_total_norm([g / scale.to(g) for g in grads])
    return scale.to(dtype) * length.to(dtype)


def by_rows(norm: Norm, group: Group) -> bool:
    """Return whether a step treats each row of a weight alone, but for the direction's sums: ranks
    may then have some rows each."""
    dualizes = DIRECTIONS[group["direction"]].by_rows and norm.dualizes_by_rows
    retracts = group["constraint"] is None or norm.retracts_by_rows
    return dualizes and retracts and group["scale"] == "unit"


def clear_(X: Tensor, live: Tensor) -> Tensor:
    """Set X to 0 where not live, and return it."""
    # On a CPU, where the host need not wait to know it, usually nothing is to do.
    eager = X.device.type == "cpu" and not torch.compiler.is_compiling()
    return X if eager and live.all() else X.masked_fill_(~live, 0)


def stacked(tensors: list[Tensor]) -> Tensor:
    """Return (n, *shape); one tensor is viewed, not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
