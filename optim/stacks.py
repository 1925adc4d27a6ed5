"""Stacks: weights of one shape, gathered, stepped by update.step_(), and scattered.

A stack's step is a job: it yields where it waits for other ranks (placement.py). Only shards that
need whole weights call the parts of step_() one by one, because the ranks come between them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from .directions import DIRECTIONS
from .moments import Direction, Rows
from .norms import Norm, nonzero
from .placement import Job, OneProcess
from .ranks import Ranks, sharded
from .update import (
    by_rows,
    clear_,
    copy_,
    descend_,
    direction_,
    dualize_,
    escape_terms,
    retract,
    settle_,
    stacked,
    step_,
    total_norm,
)

LONG = 2**18  # entries of a table from which on only the rows with a gradient are read and written


@dataclass(eq=False)
class Stack:
    """Weights of one group, norm, shape, dtype and device, and what this rank steps of them.

    everyone: all parameters of the stack; params: those of which this rank has rows, n of them.
    rows: these rows. weights: what steps, the rows or their float32 masters. buffers: the
    direction's, n of each name. origin: n weights W₀, of the escape velocity alone. radii: (n, 1…).
    ok: bools, one or (n, 1…): no number of this step is bad, and some rank has a gradient. clip: a
    factor, or None. blocks: Norm.live() of the gradients, once it has been asked.
    """

    group: dict[str, Any]
    norm: Norm
    place: OneProcess
    everyone: list[Tensor]
    params: list[Tensor]
    rows: list[Tensor]
    weights: list[Tensor]
    buffers: dict[str, list[Tensor]]
    origin: list[Tensor]
    radii: Tensor
    ok: Tensor
    clip: Tensor | None
    refresh: bool
    blocks: Tensor | None = None

    @property
    def lr(self) -> float | Tensor:
        """Return the modular norm of this step."""
        auto = bool(self.origin)  # W₀ is kept for the escape velocity alone
        return self.group["lr"] * self.group["step_size"] if auto else self.group["lr"]

    @property
    def by_rows(self) -> bool:
        """Return whether the step treats each row alone, but for the direction's sums."""
        return by_rows(self.norm, self.group)

    @property
    def direction(self) -> Direction:
        """Return what says which of the gradients' stream is dualized."""
        return DIRECTIONS[self.group["direction"]]

    @property
    def part(self) -> Rows:
        """Return what this rank has of each weight."""
        p = self.everyone[0]
        return Rows(tuple(p.shape), self.place.first_row(p), self.place.total(p))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Return (G (n, *shape), a copy, clipped; live, bools broadcastable to it)."""
        grads = [self.place.gradient(p) for p in self.params]
        pairs = zip(grads, self.weights, strict=True)
        G = torch.stack([torch.zeros_like(w) if g is None else g for g, w in pairs])
        G = G.to(self.radii.dtype)
        ok, lr, f = self.ok.to(G.device), self.group["lr"], self.norm.live
        if isinstance(lr, Tensor):
            ok = ok & (lr != 0).to(G.device)
        if self.blocks is None:  # once a step, as shards ask all ranks and wait
            self.blocks = self.place.mask(f, G, self.params, by_rows=self.norm.dualizes_by_rows)
        live = self.blocks & ok
        return (G if self.clip is None else G.mul_(self.clip.to(G))), live

    def step(self) -> Job:
        """Step what this rank has of the stack, and send it to those who have it too.

        It yields where it waits for other ranks; on one process it never does.
        """
        if not self.place.steps_alone(by_rows=self.by_rows):
            yield from self._step_shards()
        elif not self.params or not self.rows[0].numel():
            self._step_nothing()
        elif (some := self._rows_with_gradients()) is not None:
            self._step_rows(some)
        else:
            self._step_alone()
        yield from self.place.send_rows(self.everyone)

    def _step_alone(self) -> None:
        """Step without other ranks."""
        G, live = self.gradients()
        step_(
            self.weights,
            G,
            self._gather(),
            self.group,
            norm=self.norm,
            live=live,
            radii=self.radii,
            lr=self.lr,
            refresh=self.refresh,
            rows=self.part,
            origin=self.origin,
            keep=self._scatter,
        )
        self._write_rows()

    def _step_nothing(self) -> None:
        """Take part in the direction's sums over ranks, without a row of these weights."""
        if self.direction.entrywise or self.part.total is None:
            return
        if self.params:
            G, live = self.gradients()
            state = self._gather()
        else:
            W = self.place.rows(self.everyone[0]).detach()
            W = W.to(torch.promote_types(W.dtype, torch.float32))
            G = W.new_zeros(len(self.everyone), *W.shape)
            live = self.norm.live(G)
            own = self.direction.on(self.norm, self.part).buffers(W)
            state = {k: stacked([b] * len(G)) for k, b in own.items()}
        direction_(
            G, state, self.group, norm=self.norm, live=live, refresh=self.refresh, rows=self.part
        )
        if self.params:
            self._scatter(state)

    def _step_shards(self) -> Job:
        """Do as update.step_() does; what needs whole weights is done where they are, by
        place.on_whole()."""
        group, norm, place = self.group, self.norm, self.place
        G, live = self.gradients()
        state = self._gather()
        D, back = direction_(
            G, state, group, norm=norm, live=live, refresh=self.refresh, rows=self.part
        )
        self._scatter(state)
        del G, state
        f = partial(dualize_, norm=norm, group=group)
        alone = place.steps_alone(by_rows=norm.dualizes_by_rows and group["scale"] == "unit")
        D = f(D) if alone else (yield from place.on_whole(f, D, self.params))
        D = D if back is None else back(D)
        changed = {"live": live, "radii": self.radii, "origin": self.origin}
        descend_(self.weights, D, group, lr=self.lr, **changed)
        del D
        if group["constraint"] is not None:
            W, f = stacked(self.weights), partial(retract, norm=norm, group=group)
            alone = place.steps_alone(by_rows=norm.retracts_by_rows)
            R = f(W) if alone else (yield from place.on_whole(f, W, self.params))
            settle_(self.weights, W, R, **changed)
        self._write_rows()

    def _write_rows(self) -> None:
        """Write float32 masters into the weights."""
        if self.weights[0] is not self.rows[0]:
            copy_(self.rows, self.weights)

    def escape(self, step_size: Tensor, terms: list[Tensor]) -> Job:
        """Append the stack's terms of the escape velocity (update.escape_terms)."""
        alone = self.place.steps_alone(by_rows=self.norm.dualizes_by_rows)
        if self.params and (self.rows[0].numel() or not alone):
            G, live = self.gradients()
            clear_(G, live)
            f = self.norm.dualize
            T = f(G) if alone else (yield from self.place.on_whole(f, G, self.params))
            term = escape_terms(G, T, self.weights, self.origin, self.radii)
            terms.append(term.to(step_size) / self.place.copies)

    def _gather(self) -> dict[str, Tensor]:
        """Return the direction's buffers as stacks, in float32 at least."""
        dtypes = {
            k: torch.promote_types(b[0].dtype, torch.float32) for k, b in self.buffers.items()
        }
        return {k: stacked(b).to(dtypes[k]) for k, b in self.buffers.items()}

    def _scatter(self, state: Mapping[str, Tensor]) -> None:
        """Write back the buffers of which the direction was given copies."""
        gated = self.direction.gated
        for k, buffers in self.buffers.items():
            if len(buffers) > 1 or not gated or state[k].dtype != buffers[0].dtype:
                copy_(buffers, state[k].unbind())

    def _rows_with_gradients(self) -> Tensor | None:
        """Return the rows of a long table that have a gradient, if only they need be read; else
        None.

        That is so for one weight in float32 that no other process steps, on the CPU, where the host
        need not wait to know them: half of the time of a step of a table of n-grams.
        """
        if len(self.params) != 1 or self.place.ranks.size > 1 or torch.compiler.is_compiling():
            return None
        W, g = self.weights[0], self.place.gradient(self.params[0])
        usual = self.clip is None and not self.origin and not isinstance(self.group["lr"], Tensor)
        if not usual or not self.by_rows or not self.direction.gated:
            return None
        # Means over columns, and the like, are of all rows and stay whole.
        means = {k for k in self.direction.precise if k in self.buffers}
        means -= {k for k in means if self.buffers[k][0].ndim == W.ndim}
        tables = [W, g, *(b for k, (b,) in self.buffers.items() if k not in means)]
        if g is None or g.ndim != 2 or W.device.type != "cpu" or W.numel() < LONG or not self.ok:
            return None
        if W is not self.rows[0] or sharded(self.params[0]):
            return None
        if any(x.dtype != torch.float32 or x.shape != W.shape for x in tables):
            return None
        return nonzero(g, (1,))[:, 0].nonzero()[:, 0]

    def _step_rows(self, rows: Tensor) -> None:
        """Do as _step_alone() does, of these rows of one weight: the same numbers, bit for bit, but
        for the order of sums over rows."""
        W = self.weights[0]
        tables = {"W": W, **{k: b for k, (b,) in self.buffers.items() if b.shape == W.shape}}
        taken = {k: x.index_select(0, rows) for k, x in tables.items()}
        state = {k: taken.get(k, b)[None] for k, (b,) in self.buffers.items()}
        gradient = self.place.gradient(self.params[0])
        assert gradient is not None
        G = gradient.index_select(0, rows)[None]
        step_(
            [taken["W"]],
            G,
            state,
            self.group,
            norm=self.norm,
            live=self.norm.live(G),
            radii=self.radii,
            lr=self.lr,
            refresh=self.refresh,
            rows=self.part,
        )
        for k, x in tables.items():
            x.index_copy_(0, rows, taken[k])


class Radii:
    """Radii on the device, made once: a copy to the device waits for it."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[Any, ...], Tensor] = {}

    def of(self, values: list[float], params: list[Tensor], ndim: int) -> Tensor:
        """Return the radii (n, 1…) of n weights of ndim dimensions."""
        if not params:
            return torch.empty(0)
        dtype = torch.promote_types(params[0].dtype, torch.float32)
        key = (dtype, params[0].device, ndim, tuple(values))
        if key not in self._by_key:
            radii = torch.tensor(values, dtype=dtype, device=params[0].device)
            self._by_key[key] = radii.reshape(-1, *(1,) * ndim)
        return self._by_key[key]


def precise(state: dict[str, Tensor], place: OneProcess, p: Tensor, rows: Tensor) -> Tensor:
    """Return the float32 master of the rows of p, brought up to date where p was written
    otherwise."""
    if "master" not in state:
        state["master"] = place.to_state(p, rows.detach().float())
    master = place.from_state(state["master"])
    return master.copy_(torch.where(master.to(p.dtype) == rows, master, rows))


def clip_factor(
    grads: Sequence[tuple[int, Tensor]], limit: float, *, like: Sequence[Tensor], ranks: Ranks
) -> Tensor:
    """Return the factor, at most 1, that brings the gradients' 2-norm to the limit.

    grads: (ranks that have the same, gradient), none empty; like: all weights, of whose dtypes and
    device the sum is, the same on all ranks. Collective.
    """
    dtype = reduce(torch.promote_types, (p.dtype for p in like), torch.float32)
    parts = [torch.zeros((), device=like[0].device, dtype=dtype)]
    for copies in sorted({c for c, _ in grads}):
        own = [g for c, g in grads if c == copies]
        parts.append(total_norm(own, dtype) / copies**0.5)
    total = _length(ranks.gather(_length(torch.stack(parts))))
    return (limit / total).clamp(max=1)


def _length(x: Tensor) -> Tensor:
    """Return the 2-norm of a vector, without squares that under- or overflow."""
    largest = torch.where(x.amax() > 0, x.amax(), 1)
    return largest * torch.linalg.vector_norm(x / largest)
