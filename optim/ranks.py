"""The processes that step together, and the few collectives that a step needs. Nothing here knows a
norm.

w: number of ranks. What is large goes through one collective, an all-to-all with splits of any
size: a reduction is an all-to-all and a sum in the order of ranks, the same on every backend; a
gather sends each rank's rows to the others. Both together send 2 (w − 1) / w of the weights' bytes
a rank on average, as a ring all-reduce does (docs/scaling.md).
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .errors import PlacementError, require

# So many bytes leave together: gradients in the order in which a backward pass makes them. It is
# DDP's default (Li et al., arXiv 2006.15704).
BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class Piece:
    """One rank's part of a weight or of a buffer.

    tensor: (rows, …). row: the place of its first row in the whole, whose shape is `shape`.
    """

    tensor: Tensor
    row: int
    shape: tuple[int, ...]


@dataclass
class Pending:
    """An exchange under way. source is kept until it has left."""

    work: Any
    source: Tensor
    target: Tensor
    sizes: list[int]

    def wait(self) -> list[Tensor]:
        """Return what came from each rank, (sizes[r],) each."""
        if self.work is not None:
            self.work.wait()
        return list(self.target.split(self.sizes))


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that step together. group: None for one process."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @staticmethod
    def of(group: dist.ProcessGroup | None) -> "Ranks":
        """Return the ranks of a process group."""
        alone = group is None or dist.get_world_size(group) == 1
        return Ranks() if alone else Ranks(group, dist.get_rank(group), dist.get_world_size(group))

    def gather(self, x: Tensor) -> Tensor:
        """Return every rank's x, (…) → (w, …)."""
        out = x.new_empty(self.size, *x.shape)
        if self.size == 1:
            return out.copy_(x)
        dist.all_gather(list(out.unbind()), x.contiguous(), group=self.group)
        return out

    def maximum(self, x: Tensor) -> Tensor:
        """Set x to its largest value over ranks, entry by entry, and return it."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def total(self, x: Tensor) -> Tensor:
        """Set x to its sum over ranks, entry by entry, the same on all of them, and return it."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group)
        return x

    def average(self, x: Tensor) -> Tensor:
        """Set x to its average over ranks, entry by entry, and return it."""
        return self.total(x).div_(self.size) if self.size > 1 else x

    def gather_objects(self, x: Any) -> list[Any]:
        """Return every rank's x, of any type that pickle knows."""
        objects: list[Any] = [None] * self.size
        dist.all_gather_object(objects, x, group=self.group)
        return objects

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """Set x to what rank `source` has, and return it."""
        dist.broadcast(x, group=self.group, group_src=source)
        return x

    def exchange(self, sent: list[list[Tensor]], sizes: list[int], like: Tensor) -> Pending:
        """Begin to send sent[r] to rank r and to receive sizes[r] numbers from it.

        like: has their dtype and device.
        """
        parts = [x.reshape(-1) for to in sent for x in to]
        source = torch.cat(parts) if parts else like.new_empty(0)
        target = like.new_empty(sum(sizes))
        counts = [numel(to) for to in sent]
        work = None
        if self.size > 1:
            work = dist.all_to_all_single(
                target, source, sizes, counts, group=self.group, async_op=True
            )
        else:
            target.copy_(source)
        return Pending(work, source, target, sizes)


def ranks_of(params: Iterable[Tensor], *, local: bool) -> Ranks:
    """Return the ranks that step these weights together.

    They are the mesh's if weights are sharded, all ranks if gradients are local, and otherwise this
    process alone.
    """
    meshes = {p.device_mesh for p in params if isinstance(p, DTensor)}
    if not meshes:
        return Ranks.of(_world() if local else None)
    require(
        len(meshes) == 1,
        "sharded weights",
        got=f"{len(meshes)} meshes",
        allowed="one for all weights",
        fix="pass the same mesh to every fully_shard",
        error=PlacementError,
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
            fix="init_device_mesh(device, (replicas, shards),"
            ' mesh_dim_names=("replicate", "shard"))',
        )
    require(
        not local or ranks.size == dist.get_world_size(),
        'grads="local" beside sharded weights',
        got=f"a mesh of {ranks.size} in a world of {dist.get_world_size()}",
        allowed="a mesh of all ranks",
        fix='grads="reduced", which sharded gradients are anyway',
        error=PlacementError,
    )
    return ranks


def _world() -> dist.ProcessGroup | None:
    if dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    require(
        int(os.environ.get("WORLD_SIZE", "1")) == 1,
        'grads="local"',
        got=f"WORLD_SIZE {os.environ.get('WORLD_SIZE')} and no process group",
        allowed="torch.distributed.init_process_group() before",
        fix="call it, or start one process",
        error=PlacementError,
    )
    return None


# ---- sharded weights (DTensor): rows over the last dimension of a mesh, copies over its first of
# two


def sharded(p: Tensor) -> bool:
    """Return whether a weight is a DTensor."""
    return isinstance(p, DTensor)


def check_sharded(name: str, p: Tensor) -> None:
    """Raise PlacementError unless the weight is sharded by rows, as fully_shard does."""
    assert isinstance(p, DTensor)
    kinds = tuple(type(x) for x in p.placements)
    last: Any = p.placements[-1]
    rows = kinds in ((Shard,), (Replicate, Shard)) and last.dim == 0
    require(
        rows,
        name,
        got=f"a DTensor of placements {tuple(p.placements)}",
        allowed="(Shard(0),) of fully_shard, or (Replicate(), Shard(0)) of a replicate × shard"
        " mesh",
        fix="fully_shard without tensor parallelism and without shard_placement_fn",
        error=PlacementError,
    )


def as_dtensor(p: Tensor, part: Tensor, *, by_rows: bool) -> Tensor:
    """Return this rank's part of a buffer as a DTensor: its rows, sharded as p is, or all of it,
    which each rank has."""
    assert isinstance(p, DTensor)
    if not by_rows:
        return DTensor.from_local(
            part, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False
        )
    whole = torch.empty(p.shape[0], *part.shape[1:], device="meta")
    return DTensor.from_local(
        part,
        p.device_mesh,
        p.placements,
        run_check=False,
        shape=whole.shape,
        stride=p.stride() if whole.shape == p.shape else whole.stride(),
    )


def whole_of(x: Tensor) -> Tensor:
    """Return a tensor whole, gathered where it is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def piece_of(x: Tensor) -> Piece:
    """Return what this rank has of a tensor, sharded by rows or whole."""
    if not isinstance(x, DTensor):
        return Piece(x, 0, tuple(x.shape))
    if isinstance(x.placements[-1], Replicate):
        return Piece(x.to_local(), 0, tuple(x.shape))
    mesh, last = x.device_mesh, x.device_mesh.ndim - 1
    first, _ = shard_rows(x.shape[0], mesh.size(last), mesh.get_local_rank(last))
    return Piece(x.to_local(), first, tuple(x.shape))


def shard_rows(rows: int, shards: int, shard: int) -> tuple[int, int]:
    """Return (first, end) of a shard's rows: those of torch.chunk, the last ones fewer or none."""
    step = -(-rows // shards)
    return min(rows, shard * step), min(rows, (shard + 1) * step)


# ---- rows and buckets


def bucketed(params: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return runs of weights of one dtype and device, at most BUCKET_BYTES if they are several."""
    buckets: list[list[Tensor]] = []
    size, kind = 0, None
    for p in params:
        if not buckets or kind != (p.dtype, p.device) or size + p.nbytes > BUCKET_BYTES:
            buckets.append([])
            size, kind = 0, (p.dtype, p.device)
        buckets[-1].append(p)
        size += p.nbytes
    return buckets


def rows_of(x: Tensor, first: int, end: int) -> Tensor:
    """Return x[first:end]; a scalar is one row."""
    if x.ndim == 0:
        return x if end > first else x.new_empty(0)
    return x[first:end]


def count_rows(x: Tensor) -> int:
    """Return the number of rows; a scalar is one."""
    return x.shape[0] if x.ndim else 1


def numel(tensors: Iterable[Tensor]) -> int:
    """Return the number of all entries."""
    return sum(x.numel() for x in tensors)
