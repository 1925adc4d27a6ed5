"""Who dualizes what: one process, replicas, shards. Nothing here knows a norm.

w: ranks of the group. A piece: the rows (slices of the first dimension) of a weight that one rank steps. An owner: the rank that has a weight whole
while it is dualized. What is large goes through one collective, an all-to-all with splits of any size: a reduction is an all-to-all and a sum in the
order of ranks, the same on every backend; a gather sends each piece to the others. Both together send 2 (w − 1) / w of the weights' bytes a rank on
average, as a ring all-reduce does (docs/scaling.md).
Source of the scheme: Rajbhandari et al., arXiv 1910.02054 (ZeRO: one owner for each piece of the optimizer's state).
"""

import os
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .errors import BackwardError, PlacementError

# What leaves together; gradients in the order in which a backward pass makes them. DDP's default (Li et al., arXiv 2006.15704).
BUCKET_BYTES = 25 * 2**20
# Buckets under way before the first of them is waited for, so that what has come does not fill the memory.
IN_FLIGHT = 4

Job = Generator[None, None, Any]


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a weight or of a buffer. tensor: (rows, …); row: the first one's place in the whole of this shape."""

    tensor: Tensor
    row: int
    shape: tuple[int, ...]


def assign(costs: Sequence[float], loads: Sequence[float]) -> list[int]:
    """The rank of each cost: longest first, to the least loaded rank, the lowest of equals (Graham, SIAM J. Appl. Math. 17, 1969). loads: so far."""
    loads, ranks = list(loads), [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        ranks[i] = min(range(len(loads)), key=lambda r: (loads[r], r))
        loads[ranks[i]] += costs[i]
    return ranks


def run(jobs: Iterable[Job], *, ahead: int) -> None:
    """Run jobs that yield wherever something is under way between ranks, in the same order on every rank.

    While one waits, up to `ahead` later ones are begun: they send before it goes on to compute.
    """
    if not ahead:
        for job in jobs:
            for _ in job:
                pass
        return
    waiting, begun, more, ended = iter(jobs), [], True, object()
    while begun or more:
        if more and len(begun) <= ahead:
            following = next(waiting, None)
            more = following is not None
            begun += [following] if following is not None else []
        begun = [job for job in reversed(begun) if next(job, ended) is not ended][::-1]


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that step together. group: None for one process."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @staticmethod
    def of(group: dist.ProcessGroup | None) -> "Ranks":
        alone = group is None or dist.get_world_size(group) == 1
        return Ranks() if alone else Ranks(group, dist.get_rank(group), dist.get_world_size(group))

    def gather(self, x: Tensor) -> Tensor:
        """(…) → (w, …): everybody's."""
        out = x.new_empty(self.size, *x.shape)
        if self.size == 1:
            return out.copy_(x)
        dist.all_gather(list(out.unbind()), x.contiguous(), group=self.group)
        return out

    def maximum(self, x: Tensor) -> Tensor:
        """Entry by entry over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def average(self, x: Tensor) -> Tensor:
        """Entry by entry over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
            x.div_(self.size)
        return x

    def exchange(self, sent: list[list[Tensor]], sizes: list[int], like: Tensor) -> "Pending":
        """Begin to send sent[r] to rank r and to receive sizes[r] numbers from it, in the dtype and on the device of `like`."""
        parts = [x.reshape(-1) for to in sent for x in to]
        source = torch.cat(parts) if parts else like.new_empty(0)
        target = like.new_empty(sum(sizes))
        counts = [sum(x.numel() for x in to) for to in sent]
        work = None
        if self.size > 1:
            work = dist.all_to_all_single(
                target, source, sizes, counts, group=self.group, async_op=True
            )
        else:
            target.copy_(source)
        return Pending(work, source, target, sizes)


@dataclass
class Pending:
    """An exchange under way. source is kept until it has left."""

    work: Any
    source: Tensor
    target: Tensor
    sizes: list[int]

    def wait(self) -> list[Tensor]:
        """What came from each rank, (sizes[r],) each."""
        if self.work is not None:
            self.work.wait()
        return list(self.target.split(self.sizes))


class Alone:
    """Weights that this process steps by itself: it is the only one, or the others do the same.

    This is also the interface of Replicas and Shards. copies: ranks that hold the same piece. ahead: see run(). owned: a rank has no
    state of what it does not step.
    """

    ahead = 0
    owned = False

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.copies = ranks, ranks.size

    def place(self, entries: list[tuple[Tensor, float, bool]]) -> None:
        """Decide who owns each weight of (p, FLOPs of its step, whether its rows may be apart). Earlier weights stay where they are."""

    def splits(self, p: Tensor) -> bool:
        """Whether ranks step rows of p without having it whole."""
        return False

    def piece(self, p: Tensor) -> Tensor:
        """The rows of p that this rank steps, in p's own memory; a tensor without rows where it steps none."""
        return p

    def gradient(self, p: Tensor) -> Tensor | None:
        """The gradient of the piece, not to be written."""
        return p.grad

    def own(self, p: Tensor) -> Tensor | None:
        """The gradient as this rank's backward pass left it."""
        return self.gradient(p)

    def keep(self, p: Tensor, buffer: Tensor) -> Tensor:
        """A buffer of the piece as the optimizer's state holds it."""
        return buffer

    def local(self, buffer: Tensor) -> Tensor:
        """A kept buffer as a plain tensor, sharing its memory."""
        return buffer

    def take(self, p: Tensor, whole: Tensor) -> Tensor | None:
        """This rank's part of a whole buffer, as keep() would hold it; None where it has none."""
        return whole

    def held(self, p: Tensor, buffer: Tensor) -> Piece:
        """A kept buffer, and its place in the whole."""
        return Piece(buffer, 0, tuple(buffer.shape))

    def whole(
        self, f: Callable[[Tensor], Tensor], X: Tensor, params: list[Tensor], *, by_rows: bool
    ) -> Generator[None, None, Tensor]:
        """The pieces of f(whole weights) from the pieces X (n, rows, …) of n weights. f may overwrite its argument. by_rows: it acts on each row alone."""
        return f(X) if X.numel() else X
        yield

    def collect(self, p: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole buffers of a weight, on every rank, from what each has of them."""
        return state

    def publish(self, params: list[Tensor]) -> Job:
        """What ranks wrote into their pieces of these weights reaches all that hold them."""
        return
        yield

    def receive_gradients(self) -> None:
        """Reduce what has not left yet; gradient() is ready after this."""

    def forget(self) -> None:
        """Let go of gradients: their step is over, or is not taken."""

    @contextmanager
    def listening(self):  # noqa: ANN201 - Iterator[None]
        """Gradients leave as a backward pass in here makes them, all of them by its end."""
        yield


class Replicas(Alone):
    """Every rank has all weights, and gradients of its own. A weight has one owner, or all ranks own equal runs of its rows; only owners hold state."""

    ahead = 1
    owned = True

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.copies = ranks, 1
        self.loads = [0.0] * ranks.size  # FLOPs of a step
        self.rows: dict[
            Tensor, list[tuple[int, int]]
        ] = {}  # of each rank, in the order in which weights came
        self.buckets: list[list[Tensor]] = []
        self.bucket_of: dict[Tensor, int] = {}
        self.heard: list[set[Tensor]] = []  # of each bucket, the weights whose gradient is there
        self.open = self.opened = False  # for gradients as they come; since the last step
        self.sent = 0  # buckets, since the last step
        self.under_way: list[tuple[dict[Tensor, Tensor], Pending]] = []  # (own part, the others')
        self.reduced: dict[Tensor, Tensor] = {}

    def place(self, entries: list[tuple[Tensor, float, bool]]) -> None:
        w = self.ranks.size
        owners = iter(assign([cost for _, cost, by_rows in entries if not by_rows], self.loads))
        for p, cost, by_rows in entries:
            rows = _length(p)
            if by_rows:
                ends = [rows * r // w for r in range(w + 1)]
                self.rows[p] = list(pairwise(ends))
            else:
                owner = next(owners)
                self.rows[p] = [(0, rows if r == owner else 0) for r in range(w)]
            self.loads = [
                load + cost * (b - a) / rows
                for load, (a, b) in zip(self.loads, self.rows[p], strict=True)
            ]
            if p.requires_grad:
                hear = weakref.WeakMethod(self._hear)
                p.register_post_accumulate_grad_hook(
                    lambda p, hear=hear: (listener := hear()) and listener(p)
                )
        self.buckets = bucketed(reversed(self.rows))
        self.bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self.forget()

    def splits(self, p: Tensor) -> bool:
        return max(end - first for first, end in self.rows[p]) < _length(p)

    def piece(self, p: Tensor) -> Tensor:
        return _rows(p, *self.rows[p][self.ranks.rank])

    def gradient(self, p: Tensor) -> Tensor | None:
        return self.reduced.get(p)

    def own(self, p: Tensor) -> Tensor | None:
        return p.grad

    def take(self, p: Tensor, whole: Tensor) -> Tensor | None:
        first, end = self.rows[p][self.ranks.rank]
        if first == end:
            return None
        return whole if end - first == _length(p) else whole[first:end].clone()

    def held(self, p: Tensor, buffer: Tensor) -> Piece:
        first, end = self.rows[p][self.ranks.rank]
        return Piece(
            buffer,
            first,
            tuple(buffer.shape) if end - first == _length(p) else (p.shape[0], *buffer.shape[1:]),
        )

    def publish(self, params: list[Tensor]) -> Job:
        me, w = self.ranks.rank, self.ranks.size
        under_way: list[tuple[list[list[Tensor]], Pending]] = []

        def receive() -> None:
            theirs, pending = under_way.pop(0)
            for pieces, came in zip(theirs, pending.wait(), strict=True):
                for piece, new in zip(pieces, came.split([x.numel() for x in pieces]), strict=True):
                    piece.copy_(new.view_as(piece))

        for bucket in bucketed(params):
            theirs = [
                [] if r == me else [_rows(p, *self.rows[p][r]) for p in bucket] for r in range(w)
            ]
            mine = [piece for p in bucket if (piece := self.piece(p)).numel()]
            sizes = [_numel(x) for x in theirs]
            under_way.append(
                (
                    theirs,
                    self.ranks.exchange(
                        [[] if r == me else mine for r in range(w)], sizes, bucket[0]
                    ),
                )
            )
            if len(under_way) > IN_FLIGHT:
                receive()
        yield
        while under_way:
            receive()

    def collect(self, p: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        described: list[Any] = [None] * self.ranks.size
        dist.all_gather_object(
            described,
            {k: (tuple(b.shape), b.dtype) for k, b in state.items()},
            group=self.ranks.group,
        )
        whole: dict[str, list[Tensor]] = {}
        for r, buffers in enumerate(described):
            for k, (shape, dtype) in buffers.items():
                part = (
                    state[k].clone(memory_format=torch.contiguous_format)
                    if r == self.ranks.rank
                    else torch.empty(shape, dtype=dtype, device=p.device)
                )
                dist.broadcast(part, group=self.ranks.group, group_src=r)
                whole.setdefault(k, []).append(part)
        return {k: parts[0] if len(parts) == 1 else torch.cat(parts) for k, parts in whole.items()}

    @contextmanager
    def listening(self):  # noqa: ANN201 - Iterator[None]
        self.forget()
        self.open = self.opened = True
        try:
            yield
        finally:
            self.open = False
        self._send_all()  # on every rank before whatever comes next, whichever gradients it has heard of

    def _hear(self, p: Tensor) -> None:
        if not self.opened:
            return
        heard = self.heard[self.bucket_of[p]]
        if p in heard or not self.open:
            raise BackwardError(
                "last_backward()",
                got="a further backward pass before step()",
                allowed="one in it, the last of a step",
                fix="accumulate the others before; the optimizer's zero_grad() forgets a step that is not to be taken",
            )
        heard.add(p)
        # In the order of buckets, whatever the order of gradients: every rank must take the same.
        while self.sent < len(self.buckets) and len(self.heard[self.sent]) == len(
            self.buckets[self.sent]
        ):
            self._send()
            # Without waiting: another rank may wait for this one somewhere else in its backward pass.
            while len(self.under_way) > IN_FLIGHT and self.under_way[0][1].work.is_completed():
                self._receive()

    def _send(self) -> None:
        """The next bucket."""
        bucket, me, w = self.buckets[self.sent], self.ranks.rank, self.ranks.size
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        sent = [
            [_rows(g, *self.rows[p][r]) for p, g in zip(bucket, grads, strict=True)]
            if r != me
            else []
            for r in range(w)
        ]
        mine = {p: _rows(g, *self.rows[p][me]).clone() for p, g in zip(bucket, grads, strict=True)}
        sizes = [0 if r == me else _numel(mine.values()) for r in range(w)]
        self.under_way.append((mine, self.ranks.exchange(sent, sizes, grads[0])))
        self.sent += 1

    def _send_all(self) -> None:
        while self.sent < len(self.buckets):
            self._send()
            while len(self.under_way) > IN_FLIGHT:
                self._receive()

    def _receive(self) -> None:
        """The oldest bucket under way, averaged in the order of ranks."""
        mine, pending = self.under_way.pop(0)
        parts = [
            came.split([x.numel() for x in mine.values()] if came.numel() else [0] * len(mine))
            for came in pending.wait()
        ]
        for i, (p, own) in enumerate(mine.items()):
            if own.numel():
                of_ranks = [
                    own if r == self.ranks.rank else part[i].view_as(own)
                    for r, part in enumerate(parts)
                ]
                total = of_ranks[0].to(torch.promote_types(own.dtype, torch.float32), copy=True)
                for part in of_ranks[1:]:
                    total += part
                self.reduced[p] = total.div_(self.ranks.size)

    def receive_gradients(self) -> None:
        self._send_all()
        while self.under_way:
            self._receive()
        self._begin_anew()

    def forget(self) -> None:
        for _, pending in self.under_way:
            pending.wait()
        self._begin_anew()
        self.reduced = {}

    def _begin_anew(self) -> None:
        self.under_way, self.sent, self.heard, self.opened = (
            [],
            0,
            [set() for _ in self.buckets],
            False,
        )


class Shards(Alone):
    """Weights, gradients and state are DTensors: rows over the shard dimension of a mesh, copies over its replicate dimension if it has one.

    Gradients come reduced. A weight has one owner, which gets the rows of its own copy and sends the result's to all.
    """

    ahead = 1

    def __init__(self, ranks: Ranks, mesh: Any) -> None:
        self.ranks = ranks
        self.shards = mesh.size(mesh.ndim - 1)
        self.copies = ranks.size // self.shards
        self.loads = [0.0] * ranks.size
        self.owner: dict[Tensor, int] = {}

    @staticmethod
    def check(name: str, p: DTensor) -> None:
        """Raise PlacementError for what is not supported."""
        placed = tuple(type(x) for x in p.placements)
        if placed not in ((Shard,), (Replicate, Shard)) or p.placements[-1].dim != 0:  # type: ignore[attr-defined]
            raise PlacementError(
                name,
                got=f"a DTensor of placements {tuple(p.placements)}",
                allowed="(Shard(0),) of fully_shard, or (Replicate(), Shard(0)) of a replicate × shard mesh",
                fix="fully_shard without tensor parallelism and without shard_placement_fn",
            )

    def place(self, entries: list[tuple[Tensor, float, bool]]) -> None:
        whole = [(p, cost) for p, cost, by_rows in entries if not by_rows]
        for (p, cost), owner in zip(
            whole, assign([cost for _, cost in whole], self.loads), strict=True
        ):
            self.owner[p] = owner
            self.loads[owner] += cost
        for i, (p, *_) in enumerate(x for x in entries if x[2]):
            self.owner[p] = i % self.ranks.size  # for what is not done by rows after all

    def piece(self, p: Tensor) -> Tensor:
        return self.local(p)

    def gradient(self, p: Tensor) -> Tensor | None:
        return None if p.grad is None else self.local(p.grad)

    def keep(self, p: Tensor, buffer: Tensor) -> Tensor:
        assert isinstance(p, DTensor)
        return DTensor.from_local(
            buffer, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )

    def local(self, buffer: Tensor) -> Tensor:
        return buffer.to_local()  # type: ignore[attr-defined]

    def take(self, p: Tensor, whole: Tensor) -> Tensor | None:
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        first, end = self._span(p, self.ranks.rank)
        return self.keep(p, whole[first:end].clone())

    def held(self, p: Tensor, buffer: Tensor) -> Piece:
        return piece_of(buffer)

    def _span(self, p: Tensor, rank: int) -> tuple[int, int]:
        return _chunk(p.shape[0], self.shards, rank % self.shards)

    def whole(
        self, f: Callable[[Tensor], Tensor], X: Tensor, params: list[Tensor], *, by_rows: bool
    ) -> Generator[None, None, Tensor]:
        if by_rows:
            return f(X) if X.numel() else X
        me, w, p = self.ranks.rank, self.ranks.size, params[0]
        spans = [self._span(p, r) for r in range(w)]
        assert X.shape[1] == spans[me][1] - spans[me][0]
        owned = [[i for i, q in enumerate(params) if self.owner[q] == r] for r in range(w)]
        near = [r // self.shards == me // self.shards for r in range(w)]  # with the same copy
        n, inner = len(owned[me]), p.numel() // p.shape[0]

        def rows(counts: list[int]) -> list[tuple[int, ...]]:
            return [
                (count, b - a, *p.shape[1:]) for count, (a, b) in zip(counts, spans, strict=True)
            ]

        came = [n * near[r] * (spans[r][1] - spans[r][0]) * inner for r in range(w)]
        pending = self.ranks.exchange([[X[owned[r]]] if near[r] else [] for r in range(w)], came, X)
        yield
        parts = [
            x.view(shape)
            for x, shape, close in zip(pending.wait(), rows([n] * w), near, strict=True)
            if close
        ]
        Y = f(torch.cat(parts, dim=1)) if n else X.new_empty(0, *p.shape)
        del pending, parts
        counts = [len(o) for o in owned]
        height = X.shape[1]
        pending = self.ranks.exchange(
            [[Y[:, a:b]] for a, b in spans], [c * height * inner for c in counts], X
        )
        del Y
        yield
        out = torch.empty_like(X)
        for mine, x in zip(owned, pending.wait(), strict=True):
            out[mine] = x.view(len(mine), *X.shape[1:])
        return out


def ranks_of(params: Iterable[Tensor], *, local: bool) -> Ranks:
    """Who steps these weights together: the mesh of sharded ones, else the whole world where gradients are local, else this process alone."""
    meshes = {p.device_mesh for p in params if isinstance(p, DTensor)}
    if not meshes:
        return Ranks.of(_world() if local else None)
    if len(meshes) > 1:
        raise PlacementError(
            "sharded weights",
            got=f"{len(meshes)} meshes",
            allowed="one for all weights",
            fix="pass the same mesh to every fully_shard",
        )
    mesh = meshes.pop()
    if mesh.ndim == 1:
        ranks = Ranks.of(mesh.get_group())
    elif mesh.ndim == 2 and mesh.mesh.flatten().tolist() == list(range(dist.get_world_size())):
        ranks = Ranks.of(dist.group.WORLD)
    else:
        raise PlacementError(
            "sharded weights",
            got=f"the mesh {mesh}",
            allowed="one dimension, or replicate × shard over all ranks in order",
            fix='init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicate", "shard"))',
        )
    if local and ranks.size != dist.get_world_size():
        raise PlacementError(
            'grads="local" beside sharded weights',
            got=f"a mesh of {ranks.size} in a world of {dist.get_world_size()}",
            allowed="a mesh of all ranks",
            fix='grads="reduced", which sharded gradients are anyway',
        )
    return ranks


def _world() -> dist.ProcessGroup | None:
    if dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PlacementError(
            'grads="local"',
            got=f"WORLD_SIZE {os.environ['WORLD_SIZE']} and no process group",
            allowed="torch.distributed.init_process_group() before",
            fix="call it, or start one process",
        )
    return None


def bucketed(params: Iterable[Tensor]) -> list[list[Tensor]]:
    """Runs of weights of one dtype and device, of at most BUCKET_BYTES where they are not one weight."""
    buckets: list[list[Tensor]] = []
    size, kind = 0, None
    for p in params:
        if not buckets or kind != (p.dtype, p.device) or size + p.nbytes > BUCKET_BYTES:
            buckets.append([])
            size, kind = 0, (p.dtype, p.device)
        buckets[-1].append(p)
        size += p.nbytes
    return buckets


def piece_of(x: Tensor) -> Piece:
    """What this rank has of a tensor, sharded by rows or whole."""
    if not isinstance(x, DTensor):
        return Piece(x, 0, tuple(x.shape))
    dimension = x.device_mesh.ndim - 1
    first, _ = _chunk(
        x.shape[0], x.device_mesh.size(dimension), x.device_mesh.get_local_rank(dimension)
    )
    return Piece(x.to_local(), first, tuple(x.shape))


def sharded(p: Tensor) -> bool:
    """Whether a weight is a DTensor."""
    return isinstance(p, DTensor)


def _chunk(rows: int, shards: int, shard: int) -> tuple[int, int]:
    """(first, end) of a shard's rows: those of torch.chunk, the last ones fewer or none."""
    step = -(-rows // shards)
    return min(rows, shard * step), min(rows, (shard + 1) * step)


def _rows(x: Tensor, first: int, end: int) -> Tensor:
    """x[first:end]; a scalar is one row."""
    if x.ndim == 0:
        return x if end > first else x.new_empty(0)
    return x[first:end]


def _length(x: Tensor) -> int:
    return x.shape[0] if x.ndim else 1


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() for x in tensors)
