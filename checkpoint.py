"""Checkpoints: safetensors for tensors, JSON for the rest, nothing pickled. A checkpoint exists whole or not at all.

checkpoints/step_00000100/: model.safetensors, optimizer.safetensors ("<parameter>.<buffer>"), rng.safetensors, state.json, config.toml, receipt.txt.
Tensors are keyed by parameter name, so nothing depends on who computed them.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SCHEMA = 1  # of state.json


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: what was got, what is allowed, how to fix it."""


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], texts: dict[str, str], *, keep: int
) -> Path:
    """Write checkpoints/step_<step> whole, then drop all but the newest `keep`. state: JSON. texts: further files by name."""
    final = folder / f"step_{step:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    optimizer_state = optimizer.state_dict()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial / "model.safetensors")
    save_file(_by_name(optimizer_state), partial / "optimizer.safetensors")
    save_file(_rng_state(), partial / "rng.safetensors")
    groups = [{k: v.tolist() if isinstance(v, Tensor) else v for k, v in g.items()} for g in optimizer_state["param_groups"]]
    content = {"schema": SCHEMA, "step": step, "param_groups": groups, **state}
    for name, text in {**texts, "state.json": json.dumps(content, indent=1)}.items():
        (partial / name).write_text(text, encoding="utf-8")
    for path in [*partial.iterdir(), partial]:
        _fsync(path)
    _remove(final)
    partial.rename(final)
    _fsync(folder)
    for old in steps(folder)[:-keep]:
        _remove(old)
    return final


def _remove(checkpoint: Path) -> None:
    """Under a hidden name first, so that no half-deleted checkpoint is ever taken for one."""
    if checkpoint.exists():
        hidden = checkpoint.with_name(f".{checkpoint.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        checkpoint.rename(hidden)
        shutil.rmtree(hidden)


def steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir())


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, if there is one."""
    return max(steps(folder), default=None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__}")
        missing = {"schema", "step", "config", "progress", "shards", "tokenizer", "param_groups"} - state.keys()
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing))}")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: damaged checkpoint\n  got: {error}\n  allowed: a whole state.json\n  fix: delete this checkpoint, and the one before is used"
        ) from error
    if state["schema"] != SCHEMA:
        raise CheckpointError(f"{checkpoint}\n  got: schema {state['schema']}\n  allowed: {SCHEMA}\n  fix: use the version that saved it")
    return state


def load_model(checkpoint: Path, model: nn.Module) -> None:
    """Weights into a model of the same names and shapes."""
    tensors = _read(checkpoint / "model.safetensors")
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    saved = {k: tuple(v.shape) for k, v in tensors.items()}
    if own != saved:
        name = sorted(k for k in own.keys() | saved.keys() if own.get(k) != saved.get(k))[0]
        raise CheckpointError(
            f"{checkpoint}: another architecture\n  got: {name} {saved.get(name, 'missing')} in the checkpoint\n"
            f"  allowed: {own.get(name, 'no such parameter')}, as the configuration has it\n  fix: resume with the configuration that the run was started with: its folder's config.toml"
        )
    model.load_state_dict(tensors)


def load_training(checkpoint: Path, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Momentum by parameter name, and the random number generators."""
    tensors = _read(checkpoint / "optimizer.safetensors")
    index = {n: i for g in state["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
    buffers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, buffer = key.rsplit(".", 1)
        buffers.setdefault(index[name], {})[buffer] = tensor
    optimizer.load_state_dict({"state": buffers, "param_groups": state["param_groups"]})
    rng = _read(checkpoint / "rng.safetensors")
    torch.set_rng_state(rng["cpu"])
    for kind in _accelerators():
        if kind in rng:
            getattr(torch, kind).set_rng_state(rng[kind])


def _rng_state() -> dict[str, Tensor]:
    """Of the CPU and of the current accelerator."""
    return {"cpu": torch.get_rng_state()} | {kind: getattr(torch, kind).get_rng_state() for kind in _accelerators()}


def _accelerators() -> list[str]:
    return [kind for kind, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())) if there]


def _by_name(state: dict[str, Any]) -> dict[str, Tensor]:
    names = {i: n for g in state["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
    return {f"{names[i]}.{buffer}": t.contiguous() for i, buffers in state["state"].items() for buffer, t in buffers.items()}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: damaged checkpoint\n  got: {error}\n  allowed: a whole safetensors file\n  fix: delete this checkpoint, and the one before is used"
        ) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
