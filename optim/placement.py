"""Who steps what: one process, replicas, shards. Nothing here knows a norm or a formula.

A rank's *rows* of a weight are the rows (slices of the first dimension) that it steps. An *owner*
is the rank that has a weight whole while it is dualized: polar factors need all of a matrix, while
rows of embeddings and heads can be stepped apart. With replicas it alone has the momentum, too.

One step on two ranks, of matrices A and B and an embedding E. Time runs down; "→ 1": to rank 1.

  replicas (ddp): both ranks have every weight; only an owner has momentum      (replicas.py)
    rank 0: owns A and the upper half of E      rank 1: owns B and the lower half of E
    backward pass: gradients of B, E low → 1    backward pass: gradients of A, E up → 0
    average own and received gradients          average own and received gradients
    all numbers finite? ask the other rank      all numbers finite? ask the other rank
    step E up;              new E up → 1        step E low;             new E low → 0
    step A;  new A → 1;  receive E low          step B;  new B → 0;  receive E up
                         receive B                                   receive A

  shards (fsdp): each rank has half of the rows of every weight, gradient and momentum      (here)
    rank 0: upper halves; owns A                rank 1: lower halves; owns B
    backward pass: fully_shard has averaged     backward pass: the same
    all numbers finite? ask the other rank      all numbers finite? ask the other rank
    step E up: rows need nobody else            step E low
    are gradients of A, B zero? ask the other   are gradients of A, B zero? ask the other
    momentum of A up, B up;           B up → 1  momentum of A low, B low;         A low → 0
    receive A low; dualize A; its low half → 1  receive B up; dualize B; its upper half → 0
    receive B's upper half; W ← W − … of both   receive A's lower half; W ← W − … of both

(A and B have one shape here; a constraint that needs whole weights makes the last two lines twice.
Without last_backward() gradients leave in step(). Where rows are apart, a direction may need a sum
over ranks before its momentum. With gloo the host waits, with NCCL the device.)
Where a line says "ask", all ranks wait for each other. Where it says "receive", interleave() has
begun the next stack of weights before the rank waits. Source of the scheme: Rajbhandari et al.,
arXiv 1910.02054 (ZeRO: one owner for each piece of state).
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .ranks import Piece, Ranks, as_dtensor, piece_of, shard_rows, whole_of

# A piece of work on one stack that is done in parts. It yields where it has sent something and is
# about to wait for others; whoever runs it may do other work before it goes on.
Job = Generator[None, None, Any]
ENDED = "ended"  # what next(job, ENDED) returns when there is no further yield
AT_ONCE = 2  # jobs under way at a time: more would hide no more of the way, and take memory


def interleave(jobs: Iterable[Job], *, at_once: int = AT_ONCE) -> None:
    """Run jobs, two at a time, so that one computes while the other one's messages are on their
    way.

    Each round begins one more job, if fewer than two are under way, and lets each of these, the
    newest first, go on to its next yield. With jobs a, b, c of three parts each (send, compute and
    send, receive):

        round   1        2           3           4           5           6
                a.send   b.send      b.compute   c.send      c.compute   c.receive
                         a.compute   a.receive   b.receive

    The order depends on the number of parts alone, never on time. So all ranks, which have the same
    jobs in the same order, begin their collectives in the same order, as collectives require.
    """
    waiting = iter(jobs)
    under_way: list[Job] = []
    while True:
        if len(under_way) < at_once and (following := next(waiting, None)) is not None:
            under_way.append(following)
        if not under_way:
            return
        under_way = [job for job in reversed(under_way) if next(job, ENDED) is not ENDED][::-1]


def assign_owners(costs: Sequence[float], loads: Sequence[float]) -> list[int]:
    """Return the rank of each cost: the longest first, to the least loaded rank, the lowest of
    equals.

    loads: what ranks have so far. Graham, SIAM J. Appl. Math. 17, 1969.
    """
    loads, owners = list(loads), [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(len(loads)), key=lambda r: (loads[r], r))
        loads[owners[i]] += costs[i]
    return owners


class OneProcess:
    """Weights that this process steps by itself: it is the only one, or the others do the same.

    Replicas and Shards have the same methods. copies: ranks that step the same rows.
    state_at_owners: true where gradients and state are only at the ranks that step a weight.
    """

    state_at_owners = False

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.copies = ranks, ranks.size

    def assign(self, entries: list[tuple[Tensor, float, bool]]) -> None:
        """Decide who steps each weight of (p, FLOPs of its step, whether its rows may be apart).

        Earlier weights stay where they are.
        """

    def rows_are_apart(self, p: Tensor) -> bool:
        """Return whether ranks step rows of p without having it whole."""
        return False

    def steps_alone(self, *, by_rows: bool) -> bool:
        """Return whether a step needs no other rank. by_rows: it treats each row by itself."""
        return True

    # ---- weights and gradients

    def rows(self, p: Tensor) -> Tensor:
        """Return the rows of p that this rank steps, in p's own memory; none where it steps
        none."""
        return p

    def first_row(self, p: Tensor) -> int:
        """Return the place of the first of rows(p) in p."""
        return 0

    def total(self, p: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Return what sets a tensor to its sum over the ranks that have the other rows of p, all of
        which call it; None where p is whole."""
        return None

    def gradient(self, p: Tensor) -> Tensor | None:
        """Return the averaged gradient of rows(p), not to be written."""
        return p.grad

    def local_gradient(self, p: Tensor) -> Tensor | None:
        """Return the gradient as this rank's backward pass left it."""
        return self.gradient(p)

    def mask(
        self, f: Callable[[Tensor], Tensor], G: Tensor, params: list[Tensor], *, by_rows: bool
    ) -> Tensor:
        """Return f of the whole gradients, cut to our rows of them, G (n, rows, …).

        f is Norm.live: which blocks are not zero. by_rows: no block reaches over rows.
        """
        return f(G)

    @contextmanager
    def sending_gradients(self) -> Iterator[None]:
        """Let gradients leave as a backward pass in here makes them, all of them by its end."""
        yield

    def receive_gradients(self) -> None:
        """Average what other ranks sent; gradient() is ready after this."""

    def drop_gradients(self) -> None:
        """Let go of gradients: their step is over, or is not taken."""

    # ---- what needs other ranks in a step

    def on_whole(
        self, f: Callable[[Tensor], Tensor], X: Tensor, params: list[Tensor]
    ) -> Generator[None, None, Tensor]:
        """Return the rows of f(whole weights) from the rows X (n, rows, …) of n weights.

        f may overwrite its argument.
        """
        return f(X)
        yield  # which makes this a generator

    def send_rows(self, params: list[Tensor]) -> Job:
        """Bring what ranks wrote into their rows of these weights to all that have them."""
        return
        yield  # which makes this a generator

    # ---- state

    def to_state(self, p: Tensor, buffer: Tensor) -> Tensor:
        """Return a buffer of rows(p) as the optimizer's state has it."""
        return buffer

    def from_state(self, buffer: Tensor) -> Tensor:
        """Return a buffer of the state as a plain tensor, in the same memory."""
        return buffer

    def cut(self, p: Tensor, whole: Tensor) -> Tensor | None:
        """Return this rank's part of a whole buffer, as to_state() makes it; None if it has
        none."""
        return whole

    def piece_of_state(self, p: Tensor, buffer: Tensor) -> Piece:
        """Return a buffer of the state with its place in the whole."""
        return Piece(buffer, 0, tuple(buffer.shape))

    def gather_state(self, p: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole buffers of a weight, on every rank, from what each has of them."""
        return state


class Shards(OneProcess):
    """Weights, gradients and state are DTensors: rows over shards, and copies of all over replicas.

    Gradients come averaged. A weight that is not stepped by rows has one owner, which gets its rows
    of its own copy and sends the result's rows to all.
    """

    def __init__(self, ranks: Ranks, mesh: Any) -> None:
        self.ranks = ranks
        self.n_shards = mesh.size(mesh.ndim - 1)
        self.copies = ranks.size // self.n_shards
        self.loads = [0.0] * ranks.size
        self.owner: dict[Tensor, int] = {}

    def assign(self, entries: list[tuple[Tensor, float, bool]]) -> None:
        whole = [(p, cost) for p, cost, by_rows in entries if not by_rows]
        owners = assign_owners([cost for _, cost in whole], self.loads)
        for (p, cost), owner in zip(whole, owners, strict=True):
            self.owner[p] = owner
            self.loads[owner] += cost
        for i, (p, *_) in enumerate(x for x in entries if x[2]):
            self.owner[p] = i % self.ranks.size  # for a constraint that needs whole weights

    def steps_alone(self, *, by_rows: bool) -> bool:
        return by_rows

    def span(self, rows: int, rank: int) -> tuple[int, int]:
        """Return (first, end) of the rows that a rank has of a weight of so many."""
        return shard_rows(rows, self.n_shards, rank % self.n_shards)

    def rows(self, p: Tensor) -> Tensor:
        return self.from_state(p)

    def first_row(self, p: Tensor) -> int:
        return self.span(p.shape[0], self.ranks.rank)[0]

    def total(self, p: Tensor) -> Callable[[Tensor], Tensor] | None:
        whole = self.span(p.shape[0], 0)[1] == p.shape[0]  # on the first rank of each copy
        return None if whole else lambda x: self.ranks.total(x).div_(self.copies)

    def gradient(self, p: Tensor) -> Tensor | None:
        return None if p.grad is None else self.from_state(p.grad)

    def mask(
        self, f: Callable[[Tensor], Tensor], G: Tensor, params: list[Tensor], *, by_rows: bool
    ) -> Tensor:
        if by_rows:
            return f(G)
        shape, alive = params[0].shape, G != 0
        # A dimension of a mask is one long where blocks reach over it: it is reduced here, not
        # sent.
        mask = f(torch.empty(1, *shape, device="meta")).shape[1:]
        for dim, size in enumerate(mask[1:], start=2):
            alive = alive.any(dim, keepdim=True) if size == 1 else alive
        if mask[0] == 1:  # blocks reach over all rows
            return f(self.ranks.maximum(alive.any(1, keepdim=True).to(G.dtype)))
        spans = [self.span(shape[0], r) for r in range(self.n_shards)]
        padded = G.new_zeros(len(alive), spans[0][1], *alive.shape[2:])
        padded[:, : alive.shape[1]] = alive
        everyone = self.ranks.gather(padded)
        parts = [everyone[r][:, : b - a] for r, (a, b) in enumerate(spans)]
        first, end = self.span(shape[0], self.ranks.rank)
        return f(torch.cat(parts, dim=1))[:, first:end]

    def on_whole(
        self, f: Callable[[Tensor], Tensor], X: Tensor, params: list[Tensor]
    ) -> Generator[None, None, Tensor]:
        me, w, p = self.ranks.rank, self.ranks.size, params[0]
        spans = [self.span(p.shape[0], r) for r in range(w)]
        assert X.shape[1] == spans[me][1] - spans[me][0]
        owned = [[i for i, q in enumerate(params) if self.owner[q] == r] for r in range(w)]
        near = [r // self.n_shards == me // self.n_shards for r in range(w)]  # with the same copy
        n, inner = len(owned[me]), p.numel() // p.shape[0]
        came = [n * near[r] * (spans[r][1] - spans[r][0]) * inner for r in range(w)]
        sent = [[X[owned[r]]] if near[r] else [] for r in range(w)]
        pending = self.ranks.exchange(sent, came, X)
        yield
        parts = [
            x.view(n, end - first, *p.shape[1:])
            for x, (first, end), close in zip(pending.wait(), spans, near, strict=True)
            if close
        ]
        Y = f(torch.cat(parts, dim=1)) if n else X.new_empty(0, *p.shape)
        del pending, parts
        counts = [len(owned[r]) * X.shape[1] * inner for r in range(w)]
        pending = self.ranks.exchange([[Y[:, first:end]] for first, end in spans], counts, X)
        del Y
        yield
        out = torch.empty_like(X)
        for theirs, x in zip(owned, pending.wait(), strict=True):
            out[theirs] = x.view(len(theirs), *X.shape[1:])
        return out

    def to_state(self, p: Tensor, buffer: Tensor) -> Tensor:
        return as_dtensor(p, buffer, by_rows=buffer.ndim == p.ndim)

    def from_state(self, buffer: Tensor) -> Tensor:
        return buffer.to_local()  # type: ignore[attr-defined]

    def cut(self, p: Tensor, whole: Tensor) -> Tensor | None:
        first, end = self.span(p.shape[0], self.ranks.rank)
        part = whole_of(whole)
        return self.to_state(p, (part[first:end] if part.ndim == p.ndim else part).clone())

    def piece_of_state(self, p: Tensor, buffer: Tensor) -> Piece:
        return piece_of(buffer)
