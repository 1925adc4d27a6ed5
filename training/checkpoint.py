"""Checkpoints of a run: saved whole or not at all, found again, checked and loaded.

checkpoints/step_00000100/ holds
    model/*.safetensors       weights by parameter name, one file for each rank that wrote
    optimizer/*.safetensors   "<parameter>.<buffer>", likewise; of an optimizer with two sets of
                              weights also those of training, as model/ has those of evaluation
    state.json                the rest, with size and sha256 of each file, and a digest of itself
    config.toml, receipt.txt

Nothing is pickled. Tensors hold rows of the whole, so that any number of ranks, with any
run.parallel, reads what any other wrote. Ranks on several machines need a folder that all of them
see.
"""

import hashlib
import json
import os
import shutil
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

from optim import Dualized
from optim.errors import Refusal
from optim.metrize import canonical
from optim.ranks import Piece, piece_of, sharded

from .baseline import Baseline, evaluating
from .tensor_files import read_pieces, saved_tensors, write_pieces, written_by

SCHEMA = 2  # of state.json
# The keys that state.json has at least.
KEYS = {
    "schema",
    "step",
    "config",
    "progress",
    "shards",
    "tokenizer",
    "param_groups",
    "files",
    "digest",
}


class CheckpointError(Refusal):
    """A checkpoint that cannot be used."""


class SaveError(Refusal, RuntimeError):
    """A checkpoint that could not be written. Those before it are as they were."""


def model_pieces(model: nn.Module) -> dict[str, Piece]:
    """Return this rank's rows of every weight, by canonical name, in the model's memory."""
    return {canonical(n): piece_of(p.detach()) for n, p in model.named_parameters()}


# ---- saving


class Saver:
    """Writes the checkpoints of a run, one at a time, in a thread of its own.

    Every rank has one and calls the same methods.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        group: Any = None,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the thread.

        keep: as many of the newest checkpoints stay, and the one of lowest validation loss.
        group: of this saver alone; None for one process.
        waiting: called every second while wait() waits.
        """
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
        """Copy what is to be written, and begin to write checkpoints/step_<step>.

        Waits for the checkpoint before this one. If that one fails, its SaveError is raised and
        nothing is begun.

        state: for state.json. texts: further files, by name.
        """
        self.wait()
        groups = [
            {k: v.tolist() if isinstance(v, Tensor) else v for k, v in g.items()}
            for g in optimizer.settings()
        ]
        content = {"schema": SCHEMA, "step": step, "param_groups": groups, **state}
        if isinstance(optimizer, Baseline):
            content["optimizer"] = optimizer.packed()
        with evaluating(optimizer):
            weights = _copies(self._weights(model))
        copies = {"model": weights, "optimizer": _copies(self._buffers(optimizer))}
        self.writing = self.thread.submit(self._write, step, copies, content, texts)

    def wait(self) -> None:
        """Wait for the checkpoint under way.

        Raises SaveError, on every rank, if it could not be written.
        """
        writing, self.writing = self.writing, None
        while writing is not None:
            self.waiting()
            try:
                return writing.result(timeout=1)
            except TimeoutError:
                continue

    def _weights(self, model: nn.Module) -> dict[str, Piece]:
        """Return what this rank writes of the model: one rank writes a weight that all have."""
        elsewhere = {
            canonical(n)
            for i, (n, p) in enumerate(model.named_parameters())
            if not sharded(p) and i % self.size != self.rank
        }
        return {k: x for k, x in model_pieces(model).items() if k not in elsewhere}

    def _buffers(self, optimizer: Dualized | Baseline) -> dict[str, Piece]:
        """Return what this rank writes of the optimizer: all ranks have a baseline's state."""
        if not isinstance(optimizer, Baseline):
            return optimizer.held()
        return {} if self.rank else optimizer.held() | optimizer.training_weights()

    def _write(
        self,
        step: int,
        parts: dict[str, dict[str, Piece]],
        content: dict[str, Any],
        texts: dict[str, str],
    ) -> None:
        """Write a checkpoint under a hidden name, in the thread of every rank, and rename it."""
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / f".{final.name}.partial"
        try:
            self._on_main(lambda: _clear(partial))
            for part, pieces in parts.items():
                write_pieces(partial / part, pieces, group=self.group)
            signatures = self._together(
                lambda: {
                    str(p.relative_to(partial)): _signature(p)
                    for p in written_by(partial, self.rank)
                }
            )
            files = {name: s for of_rank in signatures for name, s in of_rank.items()}
            self._on_main(lambda: self._settle(partial, final, {**content, "files": files}, texts))
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
        """Give a whole folder its name, and remove checkpoints that are not kept; on rank 0."""
        for name, signature in content["files"].items():
            path = partial / name
            if not path.is_file() or path.stat().st_size != signature["bytes"]:
                raise OSError(
                    f"{path} was written by another rank and is not here:"
                    " all ranks must see one folder"
                )
        for name, text in {**texts, "state.json": json.dumps(signed(content), indent=1)}.items():
            (partial / name).write_text(text, encoding="utf-8")
            _fsync(partial / name)
        for path in (*(p for p in partial.iterdir() if p.is_dir()), partial):
            _fsync(path)
        _remove(final)
        partial.rename(final)
        _fsync(self.folder)
        newest = [p for p in steps(self.folder) if p <= final][-self.keep :]
        kept = (best_of(self.folder), *newest)
        # The new one is there: what cannot be removed is tried again with the next. Later ones go
        # too: they were damaged, or this run would have started from them.
        with suppress(OSError):
            for old in steps(self.folder):
                if old not in kept:
                    _remove(old)

    def _on_main(self, work: Callable[[], None]) -> None:
        """Do the work on rank 0 while the others wait; an OSError there is raised on all."""
        self._together(lambda: None if self.rank else work())

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Return work() of every rank, on every rank; an OSError of one is raised on all."""
        value, error = None, None
        try:
            value = work()
        except OSError as failure:
            error = failure
        own = (value, None if error is None else str(error))
        results: list[Any] = [own] * self.size
        if self.group is not None:
            dist.all_gather_object(results, own, group=self.group)
        for rank, (_, text) in enumerate(results):
            if text is not None:
                raise error or OSError(f"rank {rank}: {text}")
        return [value for value, _ in results]


def signed(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of state.json with a digest of all that is in it."""
    content = {k: v for k, v in content.items() if k != "digest"}
    return content | {
        "digest": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    }


def _copies(pieces: dict[str, Piece]) -> dict[str, Piece]:
    """Return the pieces in memory of their own on the host."""
    contiguous = torch.contiguous_format
    return {
        name: Piece(x.tensor.to("cpu", copy=True, memory_format=contiguous), x.row, x.shape)
        for name, x in pieces.items()
    }


def _clear(partial: Path) -> None:
    """Make an empty folder, and remove what a killed process left half-written or half-deleted."""
    for leftover in (*partial.parent.glob(".step_*.partial"), *partial.parent.glob(".step_*.old")):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, hidden first, so that a half-deleted one is never taken for a whole."""
    if checkpoint.exists():
        hidden = checkpoint.with_name(f".{checkpoint.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        checkpoint.rename(hidden)
        shutil.rmtree(hidden)


def _signature(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
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
    """Return the checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir())


def best_of(folder: Path) -> Path | None:
    """Return the checkpoint of lowest validation loss, of those evaluated at their own step."""
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
    """Return the newest undamaged checkpoint, if any, and what is wrong with each newer one.

    Raises CheckpointError where all are damaged.
    """
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
    for name, written in read_state(checkpoint)["files"].items():
        path = checkpoint / name
        present = _signature(path) if path.is_file() else {}
        if present != written:
            changed = ", ".join(f"{k} {v}" for k, v in present.items() if v != written[k])
            raise CheckpointError(
                f"{path}: damaged checkpoint",
                got=changed or "no such file",
                allowed=f"the file as it was written ({written['bytes']} bytes)",
                fix="delete this checkpoint; the one before is used",
            )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint. Raises CheckpointError unless it is whole."""
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
        if missing := KEYS - state.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
        if signed(state) != state or checkpoint.name != f"step_{state['step']:08d}":
            raise ValueError("a state that is not the one that was written there")
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint, error, "a whole state.json") from error
    return state


def _damaged(path: Path, error: Exception, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged checkpoint",
        got=error,
        allowed=allowed,
        fix="delete this checkpoint, and the one before is used",
    )


# ---- loading


def load_model(checkpoint: Path, model: nn.Module) -> None:
    """Load the weights into a model of the same names and shapes; every rank reads its own rows.

    Raises CheckpointError for another architecture.
    """
    pieces = model_pieces(model)
    saved = {name: shape for name, (shape, _) in _tensors(checkpoint / "model").items()}
    own = {k: x.shape for k, x in pieces.items()}
    if own != saved:
        name = sorted(k for k in own.keys() | saved.keys() if own.get(k) != saved.get(k))[0]
        raise CheckpointError(
            f"{checkpoint}: another architecture",
            got=f"{name} {saved.get(name, 'missing')} in the checkpoint",
            allowed=f"{own.get(name, 'no such parameter')}, as the configuration has it",
            fix="resume with the configuration that the run was started with:"
            " its folder's config.toml",
        )
    read_pieces(checkpoint / "model", pieces)


def load_optimizer(checkpoint: Path, state: dict[str, Any], optimizer: Dualized | Baseline) -> None:
    """Load settings and buffers by parameter name; every rank reads its own rows.

    state: of read_state(checkpoint). Raises CheckpointError for another optimizer.
    """
    tensors = _tensors(checkpoint / "optimizer")
    saved = {name: shape for name, (shape, _) in tensors.items()}
    optimizer.load_state_dict({"state": {}, "param_groups": state["param_groups"]})
    if isinstance(optimizer, Baseline):
        optimizer.make_state(state.get("optimizer"), tensors)
        pieces = optimizer.held() | optimizer.training_weights()
    else:
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
    read_pieces(checkpoint / "optimizer", pieces)


def _tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and the type of each whole tensor in a folder of a checkpoint.

    Raises CheckpointError for damaged files.
    """
    try:
        return saved_tensors(folder)
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, error, "whole safetensors files") from error
