"""Replicas (ddp): every rank has all weights, and gradients of its own share of the batch.

A weight has one owner, or all ranks step equal runs of its rows. Gradients leave for those who step
them while the backward pass makes others; only they keep momentum; new rows come back to all. See
placement.py for one step on two ranks.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from .errors import BackwardError
from .placement import Job, OneProcess, assign_owners
from .ranks import Pending, Piece, Ranks, bucketed, count_rows, numel, rows_of

# Buckets under way before the first of them is waited for, so that what has come does not fill
# memory.
IN_FLIGHT = 4


class Replicas(OneProcess):
    """Every rank has all weights; each steps what it owns."""

    state_at_owners = True

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.copies = ranks, 1
        self.loads = [0.0] * ranks.size  # FLOPs of a step
        self.spans: dict[Tensor, list[tuple[int, int]]] = {}  # of each weight, every rank's rows
        self.buckets: list[list[Tensor]] = []
        self.bucket_of: dict[Tensor, int] = {}
        self.arrived: list[set[Tensor]] = []  # of each bucket, the weights whose gradient is there
        self.open = self.opened = False  # sending_gradients(): now; since the last step
        self.buckets_sent = 0  # since the last step
        self.under_way: list[tuple[dict[Tensor, Tensor], Pending]] = []  # (own part, the others')
        self.averaged: dict[Tensor, Tensor] = {}

    def assign(self, entries: list[tuple[Tensor, float, bool]]) -> None:
        w = self.ranks.size
        owners = iter(
            assign_owners([cost for _, cost, by_rows in entries if not by_rows], self.loads)
        )
        for p, cost, by_rows in entries:
            rows = count_rows(p)
            if by_rows:
                self.spans[p] = list(pairwise(rows * r // w for r in range(w + 1)))
            else:
                owner = next(owners)
                self.spans[p] = [(0, rows if r == owner else 0) for r in range(w)]
            shares = [(end - first) / rows for first, end in self.spans[p]]
            self.loads = [load + cost * x for load, x in zip(self.loads, shares, strict=True)]
            if p.requires_grad:
                hear = weakref.WeakMethod(self._arrive)
                p.register_post_accumulate_grad_hook(
                    lambda p, hear=hear: (listener := hear()) and listener(p)
                )
        self.buckets = bucketed(reversed(self.spans))
        self.bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self.drop_gradients()

    def rows_are_apart(self, p: Tensor) -> bool:
        return max(end - first for first, end in self.spans[p]) < count_rows(p)

    def rows(self, p: Tensor) -> Tensor:
        return rows_of(p, *self.spans[p][self.ranks.rank])

    def first_row(self, p: Tensor) -> int:
        return self.spans[p][self.ranks.rank][0]

    def total(self, p: Tensor) -> Callable[[Tensor], Tensor] | None:
        return self.ranks.total if self.rows_are_apart(p) else None

    def gradient(self, p: Tensor) -> Tensor | None:
        return self.averaged.get(p)

    def local_gradient(self, p: Tensor) -> Tensor | None:
        return p.grad

    # ---- gradients: sent bucket by bucket, averaged where they are stepped

    @contextmanager
    def sending_gradients(self) -> Iterator[None]:
        self.drop_gradients()
        self.open = self.opened = True
        try:
            yield
        finally:
            self.open = False
        # On every rank before whatever comes next, whichever gradients it has.
        self._send_the_rest()

    def _arrive(self, p: Tensor) -> None:
        """Note that the backward pass has made a gradient, and send every bucket that is full."""
        if not self.opened:
            return
        arrived = self.arrived[self.bucket_of[p]]
        if p in arrived or not self.open:
            raise BackwardError(
                "last_backward()",
                got="a further backward pass before step()",
                allowed="one in it, the last of a step",
                fix="accumulate the others before; the optimizer's zero_grad() forgets a step that"
                " is not to be taken",
            )
        arrived.add(p)
        # In the order of buckets, whatever the order of gradients: every rank must take the same.
        while self.buckets_sent < len(self.buckets) and len(self.arrived[self.buckets_sent]) == len(
            self.buckets[self.buckets_sent]
        ):
            self._send_bucket()
            # Without waiting: another rank may wait for this one somewhere else in its backward
            # pass.
            while len(self.under_way) > IN_FLIGHT and self.under_way[0][1].work.is_completed():
                self._receive_bucket()

    def _send_bucket(self) -> None:
        """Begin to send the next bucket's gradients to those who step them."""
        bucket, me, w = self.buckets[self.buckets_sent], self.ranks.rank, self.ranks.size
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        pairs = list(zip(bucket, grads, strict=True))
        sent = [
            [rows_of(g, *self.spans[p][r]) for p, g in pairs] if r != me else [] for r in range(w)
        ]
        own = {p: rows_of(g, *self.spans[p][me]).clone() for p, g in pairs}
        sizes = [0 if r == me else numel(own.values()) for r in range(w)]
        self.under_way.append((own, self.ranks.exchange(sent, sizes, grads[0])))
        self.buckets_sent += 1

    def _send_the_rest(self) -> None:
        while self.buckets_sent < len(self.buckets):
            self._send_bucket()
            while len(self.under_way) > IN_FLIGHT:
                self._receive_bucket()

    def _receive_bucket(self) -> None:
        """Average the oldest bucket under way, in the order of ranks."""
        own, pending = self.under_way.pop(0)
        sizes = [x.numel() for x in own.values()]
        parts = [x.split(sizes if x.numel() else [0] * len(own)) for x in pending.wait()]
        for i, (p, mine) in enumerate(own.items()):
            if mine.numel():
                of_ranks = [
                    mine if r == self.ranks.rank else part[i].view_as(mine)
                    for r, part in enumerate(parts)
                ]
                total = of_ranks[0].to(torch.promote_types(mine.dtype, torch.float32), copy=True)
                for part in of_ranks[1:]:
                    total += part
                self.averaged[p] = total.div_(self.ranks.size)

    def receive_gradients(self) -> None:
        self._send_the_rest()
        while self.under_way:
            self._receive_bucket()
        self._begin_anew()

    def drop_gradients(self) -> None:
        for _, pending in self.under_way:
            pending.wait()
        self._begin_anew()
        self.averaged = {}

    def _begin_anew(self) -> None:
        self.under_way, self.buckets_sent, self.opened = [], 0, False
        self.arrived = [set() for _ in self.buckets]

    # ---- new weights

    def send_rows(self, params: list[Tensor]) -> Job:
        me, w = self.ranks.rank, self.ranks.size
        under_way: list[tuple[list[list[Tensor]], Pending]] = []

        def receive() -> None:
            theirs, pending = under_way.pop(0)
            for rows, came in zip(theirs, pending.wait(), strict=True):
                for old, new in zip(rows, came.split([x.numel() for x in rows]), strict=True):
                    old.copy_(new.view_as(old))

        for bucket in bucketed(params):
            theirs = [
                [] if r == me else [rows_of(p, *self.spans[p][r]) for p in bucket] for r in range(w)
            ]
            mine = [rows for p in bucket if (rows := self.rows(p)).numel()]
            sent = [[] if r == me else mine for r in range(w)]
            under_way.append(
                (theirs, self.ranks.exchange(sent, [numel(x) for x in theirs], bucket[0]))
            )
            if len(under_way) > IN_FLIGHT:
                receive()
        yield
        while under_way:
            receive()

    # ---- state

    def cut(self, p: Tensor, whole: Tensor) -> Tensor | None:
        first, end = self.spans[p][self.ranks.rank]
        if first == end:
            return None
        all_rows = end - first == count_rows(p)
        return whole if all_rows or whole.ndim != p.ndim else whole[first:end].clone()

    def piece_of_state(self, p: Tensor, buffer: Tensor) -> Piece:
        first, end = self.spans[p][self.ranks.rank]
        if end - first == count_rows(p) or buffer.ndim != p.ndim:
            return Piece(buffer, 0, tuple(buffer.shape))
        return Piece(buffer, first, (p.shape[0], *buffer.shape[1:]))

    def gather_state(self, p: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        described = {k: (tuple(b.shape), b.dtype) for k, b in state.items()}
        whole: dict[str, list[Tensor]] = {}
        for r, buffers in enumerate(self.ranks.gather_objects(described)):
            for k, (shape, dtype) in buffers.items():
                if r == self.ranks.rank:
                    part = state[k].clone(memory_format=torch.contiguous_format)
                else:
                    part = torch.empty(shape, dtype=dtype, device=p.device)
                whole.setdefault(k, []).append(self.ranks.broadcast(part, source=r))
        return {
            k: torch.cat(parts) if len(parts) > 1 and parts[0].ndim == p.ndim else parts[0]
            for k, parts in whole.items()
        }
