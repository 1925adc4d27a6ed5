"""Rows of tensors in safetensors files, through torch.distributed.checkpoint.

A folder holds one file for each rank that wrote. A tensor has a name, and each rank has some of its
rows (`Piece`); any number of ranks reads what any other number wrote.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from optim.ranks import Piece

# One process that saves alone, and a rank that reads its own rows, are meant to be without a group.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)


def write_pieces(folder: Path, pieces: dict[str, Piece], *, group: Any = None) -> None:
    """Write this rank's rows of each tensor; all ranks of the group call it. None: one process.

    Raises CheckpointException, OSError, RuntimeError or SafetensorError if a rank cannot write.
    """
    save_state(
        {},
        storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        planner=_SavePlanner(pieces),
        process_group=group,
        no_dist=group is None,
    )


def read_pieces(folder: Path, pieces: dict[str, Piece]) -> None:
    """Read this rank's rows of each tensor into the memory of its piece."""
    if pieces:
        load_state(
            {},
            storage_reader=HuggingFaceStorageReader(str(folder)),
            planner=_LoadPlanner(pieces),
            no_dist=True,
        )


def saved_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and the type of each whole tensor in a folder; none where it has no files.

    Raises OSError or SafetensorError for files that are not whole.
    """
    if not any(folder.glob("*.safetensors")):
        return {}
    saved: dict[str, Any] = (
        HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    )
    return {name: (tuple(x.size), x.properties.dtype) for name, x in saved.items()}


def written_by(folder: Path, rank: int) -> list[Path]:
    """Return the files that a rank wrote in the folders of `folder`, sorted."""
    return [p for p in sorted(folder.glob("*/*")) if p.name.startswith(f"shard-{rank + 1:05d}-")]


# torch's own planners know whole tensors and DTensors only.


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, pieces: dict[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False)
        self.pieces = pieces

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, piece in self.pieces.items():
            for chunk in _chunks(piece):
                properties = TensorProperties.create_from_tensor(piece.tensor)
                entry = TensorWriteData(chunk, properties, torch.Size(piece.shape))
                place = MetadataIndex(name, chunk.offsets)
                items.append(WriteItem(place, WriteItemType.SHARD, tensor_data=entry))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index.fqn].tensor


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, pieces: dict[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False)
        self.pieces = pieces

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved: dict[str, Any] = self.metadata.state_dict_metadata
        return LoadPlan(
            [
                item
                for name, piece in self.pieces.items()
                for item in create_read_items_for_chunk_list(name, saved[name], _chunks(piece))
            ]
        )

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index.fqn].tensor


def _chunks(piece: Piece) -> list[ChunkStorageMetadata]:
    offsets = torch.Size((piece.row, *(0,) * (len(piece.shape) - 1)) if piece.shape else ())
    return [ChunkStorageMetadata(offsets, piece.tensor.shape)] if piece.tensor.numel() else []
