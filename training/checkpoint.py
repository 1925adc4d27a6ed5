"""Checkpoints: torch.distributed.checkpoint with safetensors for tensors, JSON for the rest, nothing pickled. One exists whole or not at all.

checkpoints/step_00000100/: model/*.safetensors and optimizer/*.safetensors ("<parameter>.<buffer>"), one file for each rank that wrote; state.json,
with the size and sha256 of each and a digest of itself; config.toml, receipt.txt. Tensors are keyed by parameter name and hold rows of the whole, so that
any number of ranks, with any run.parallel, reads what any other wrote. Ranks on several machines need a folder that all of them see.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
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

from optim import Dualized
from optim.errors import Refusal
from optim.metrize import canonical
from optim.ranks import Piece, piece_of, sharded
from training.baseline import Baseline

SCHEMA = 2  # of state.json

# That one process saves alone, or that a rank reads its own rows, is meant.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)


class CheckpointError(Refusal):
    """A checkpoint that cannot be used: what was got, what is allowed, how to fix it."""


class SaveError(Refusal, RuntimeError):
    """A checkpoint that could not be written. Those before it are as they were."""


# ---- pieces, as torch.distributed.checkpoint plans them; its own planners know whole tensors and DTensors only


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, pieces: dict[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False)
        self.pieces = pieces

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, piece in self.pieces.items():
            for chunk in _chunks(piece):
                data = TensorWriteData(
                    chunk,
                    TensorProperties.create_from_tensor(piece.tensor),
                    torch.Size(piece.shape),
                )
                items.append(
                    WriteItem(
                        MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data
                    )
                )
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
                for name, x in self.pieces.items()
                for item in create_read_items_for_chunk_list(name, saved[name], _chunks(x))
            ]
        )

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index.fqn].tensor


def _chunks(piece: Piece) -> list[ChunkStorageMetadata]:
    offsets = torch.Size((piece.row, *(0,) * (len(piece.shape) - 1)) if piece.shape else ())
    return [ChunkStorageMetadata(offsets, piece.tensor.shape)] if piece.tensor.numel() else []


def model_pieces(model: nn.Module) -> dict[str, Piece]:
    """This rank's part of every weight, by canonical name, in the model's memory."""
    return {canonical(n): piece_of(p.detach()) for n, p in model.named_parameters()}


# ---- saving


class Saver:
    """Writes checkpoints of a run, one at a time, in a thread of its own; every rank has one and calls the same methods.

    keep: the newest so many stay, and the one of lowest validation loss. group: of this saver alone, None for one process.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        group: Any = None,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """waiting: called every second while wait() does."""
        self.folder, self.keep, self.group, self.waiting = folder, keep, group, waiting
        self.rank, self.size = (
            (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        )
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        if torch.cuda.is_available():  # a new thread's device would be the first one
            self.thread.submit(torch.cuda.set_device, torch.cuda.current_device())
        self.writing: Future[None] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Dualized | Baseline,
        state: dict[str, Any],
        texts: dict[str, str],
    ) -> None:
        """Copy what is to be written, and begin to write checkpoints/step_<step>. state: JSON. texts: further files by name.

        Waits for the one before; its SaveError is raised, and nothing begun.
        """
        self.wait()
        groups = [
            {k: v.tolist() if isinstance(v, Tensor) else v for k, v in g.items()}
            for g in optimizer.settings()
        ]
        content = {"schema": SCHEMA, "step": step, "param_groups": groups, **state}
        # A weight that all ranks have is written by one of them.
        elsewhere = {
            canonical(n)
            for i, (n, p) in enumerate(model.named_parameters())
            if not sharded(p) and i % self.size != self.rank
        }
        held = (
            {} if self.rank and isinstance(optimizer, Baseline) else optimizer.held()
        )  # all ranks have a baseline's state
        parts = {
            "model": {k: x for k, x in model_pieces(model).items() if k not in elsewhere},
            "optimizer": held,
        }
        copies = {
            kind: {
                k: Piece(
                    x.tensor.to("cpu", copy=True, memory_format=torch.contiguous_format),
                    x.row,
                    x.shape,
                )
                for k, x in found.items()
            }
            for kind, found in parts.items()
        }
        self.writing = self.thread.submit(self._write, step, copies, content, texts)

    def wait(self) -> None:
        """Until the checkpoint under way is there. Raises SaveError, on every rank, if it could not be written."""
        writing, self.writing = self.writing, None
        while writing is not None:
            self.waiting()
            try:
                return writing.result(timeout=1)
            except TimeoutError:
                continue

    def _write(
        self,
        step: int,
        parts: dict[str, dict[str, Piece]],
        content: dict[str, Any],
        texts: dict[str, str],
    ) -> None:
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / f".{final.name}.partial"
        try:
            self._together(lambda: self.rank or _clear(partial))
            for kind, pieces in parts.items():
                save_state(
                    {},
                    storage_writer=HuggingFaceStorageWriter(
                        str(partial / kind), save_distributed=True
                    ),
                    planner=_SavePlanner(pieces),
                    process_group=self.group,
                    no_dist=self.group is None,
                )
            mine = [
                p
                for p in sorted(partial.glob("*/*"))
                if p.name.startswith(f"shard-{self.rank + 1:05d}-")
            ]
            files = self._together(
                lambda: {str(p.relative_to(partial)): _signature(p) for p in mine}
            )
            signatures = {k: v for found in files for k, v in found.items()}
            self._together(
                lambda: (
                    self.rank
                    or self._settle(partial, final, {**content, "files": signatures}, texts)
                )
            )
        except (OSError, CheckpointException, RuntimeError, SafetensorError) as error:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            first = (
                next(iter(error.failures.values()))[0]
                if isinstance(error, CheckpointException) and error.failures
                else error
            )
            raise SaveError(
                f"the checkpoint of step {step} could not be saved",
                got=first,
                allowed="a folder that can be written, with room",
                fix=f"see to {self.folder}; older checkpoints are as they were",
            ) from error

    def _settle(
        self, partial: Path, final: Path, content: dict[str, Any], texts: dict[str, str]
    ) -> None:
        """The last steps, on rank 0: a whole folder takes its name."""
        for name, signature in content["files"].items():
            path = partial / name
            if not path.is_file() or path.stat().st_size != signature["bytes"]:
                raise OSError(
                    f"{path} was written by another rank and is not here: all ranks must see one folder"
                )
        for name, text in {**texts, "state.json": json.dumps(signed(content), indent=1)}.items():
            (partial / name).write_text(text, encoding="utf-8")
            _fsync(partial / name)
        for path in (*(p for p in partial.iterdir() if p.is_dir()), partial):
            _fsync(path)
        _remove(final)
        partial.rename(final)
        _fsync(self.folder)
        best, kept = (
            best_of(self.folder),
            [p for p in steps(self.folder) if p <= final][-self.keep :],
        )
        with suppress(
            OSError
        ):  # the new one is there; what could not be removed is tried again with the next
            for old in steps(self.folder):
                if old not in (
                    best,
                    *kept,
                ):  # older ones, and later ones that were damaged, or this run would not be here
                    _remove(old)

    def _together(self, f: Callable[[], Any]) -> list[Any]:
        """f() of every rank, after which all go on; an OSError of one is one of all."""
        try:
            value, error = f(), None
        except OSError as found:
            value, error = None, found
        if self.group is None:
            found = [(value, None if error is None else str(error))]
        else:
            found = [None] * self.size
            dist.all_gather_object(
                found, (value, None if error is None else str(error)), group=self.group
            )
        for rank, (_, text) in enumerate(found):  # type: ignore[misc]
            if text is not None:
                raise error or OSError(f"rank {rank}: {text}")
        return [value for value, _ in found]  # type: ignore[misc]


def signed(content: dict[str, Any]) -> dict[str, Any]:
    """state.json with a digest of all that is in it."""
    content = {k: v for k, v in content.items() if k != "digest"}
    return content | {
        "digest": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    }


def _clear(partial: Path) -> None:
    """Begin anew, without what a killed process has left half-written or half-deleted."""
    for leftover in (*partial.parent.glob(".step_*.partial"), *partial.parent.glob(".step_*.old")):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)


def _remove(checkpoint: Path) -> None:
    """Under a hidden name first, so that no half-deleted checkpoint is ever taken for one."""
    if checkpoint.exists():
        hidden = checkpoint.with_name(f".{checkpoint.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        checkpoint.rename(hidden)
        shutil.rmtree(hidden)


def _signature(path: Path) -> dict[str, Any]:
    with path.open("rb") as f:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(f, "sha256").hexdigest(),
        }


def _fsync(path: Path) -> None:
    if os.name == "nt":  # Windows opens no folders, and syncs no files that are open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- finding


def steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir())


def best_of(folder: Path) -> Path | None:
    """The checkpoint of lowest validation loss, of those that were evaluated at their own step."""
    losses = []
    for checkpoint in steps(folder):
        try:
            state = read_state(checkpoint)
        except CheckpointError:
            continue
        if state["progress"]["val_step"] == state["step"]:
            losses.append((state["progress"]["val_loss"], checkpoint))
    return min(losses, default=(0, None))[1]


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without damage, if there is one, and what is wrong with each newer one. Raises CheckpointError where all are damaged."""
    damage: list[str] = []
    for checkpoint in reversed(steps(folder)):
        try:
            check_files(checkpoint)
        except CheckpointError as error:
            damage.append(str(error))
            continue
        return checkpoint, damage
    if damage:
        raise CheckpointError(damage[0])
    return None, []


def check_files(checkpoint: Path) -> None:
    """Raise CheckpointError unless every file is there with its size and sha256."""
    for name, signature in read_state(checkpoint)["files"].items():
        path = checkpoint / name
        found = _signature(path) if path.is_file() else "no such file"
        if found != signature:
            got = (
                found
                if isinstance(found, str)
                else ", ".join(f"{k} {v}" for k, v in found.items() if v != signature[k])
            )
            raise CheckpointError(
                f"{path}: damaged checkpoint",
                got=got,
                allowed=f"the file as it was written ({signature['bytes']} bytes)",
                fix="delete this checkpoint; the one before is used",
            )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__}")
        if state.get("schema", SCHEMA) != SCHEMA:
            raise CheckpointError(
                checkpoint,
                got=f"schema {state['schema']}",
                allowed=SCHEMA,
                fix="use the version that saved it",
            )
        missing = {
            "schema",
            "step",
            "config",
            "progress",
            "shards",
            "tokenizer",
            "param_groups",
            "files",
            "digest",
        } - state.keys()
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing))}")
        if signed(state) != state or checkpoint.name != f"step_{state['step']:08d}":
            raise ValueError("a state that is not the one that was written there")
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: damaged checkpoint",
            got=error,
            allowed="a whole state.json",
            fix="delete this checkpoint, and the one before is used",
        ) from error
    return state


# ---- loading


def load_model(checkpoint: Path, model: nn.Module) -> None:
    """Weights into a model of the same names and shapes, sharded or not. Every rank reads its own rows."""
    pieces = model_pieces(model)
    saved = _shapes(checkpoint / "model")
    own = {k: x.shape for k, x in pieces.items()}
    if own != saved:
        name = sorted(k for k in own.keys() | saved.keys() if own.get(k) != saved.get(k))[0]
        raise CheckpointError(
            f"{checkpoint}: another architecture",
            got=f"{name} {saved.get(name, 'missing')} in the checkpoint",
            allowed=f"{own.get(name, 'no such parameter')}, as the configuration has it",
            fix="resume with the configuration that the run was started with: its folder's config.toml",
        )
    _load(checkpoint / "model", pieces)


def load_optimizer(checkpoint: Path, state: dict[str, Any], optimizer: Dualized | Baseline) -> None:
    """Settings and buffers by parameter name. Every rank reads its own pieces. state: read_state(checkpoint)."""
    saved = _shapes(checkpoint / "optimizer")
    optimizer.load_state_dict({"state": {}, "param_groups": state["param_groups"]})
    names = {k.rsplit(".", 1)[0] for k in saved}
    optimizer.make_state(names.__contains__)
    pieces = optimizer.held()
    wrong = sorted(k for k, x in pieces.items() if saved.get(k) != x.shape)
    if wrong:
        raise CheckpointError(
            f"{checkpoint}: another optimizer",
            got=f"{wrong[0]} {saved.get(wrong[0], 'missing')}",
            allowed=pieces[wrong[0]].shape,
            fix="resume with the configuration that the run was started with",
        )
    _load(checkpoint / "optimizer", pieces)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    if not any(folder.glob("*.safetensors")):
        return {}
    try:
        saved: dict[str, Any] = (
            HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        )
        return {k: tuple(x.size) for k, x in saved.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: damaged checkpoint",
            got=error,
            allowed="whole safetensors files",
            fix="delete this checkpoint, and the one before is used",
        ) from error


def _load(folder: Path, pieces: dict[str, Piece]) -> None:
    if pieces:
        load_state(
            {},
            storage_reader=HuggingFaceStorageReader(str(folder)),
            planner=_LoadPlanner(pieces),
            no_dist=True,
        )
