"""The coordinate check: how the change of each layer's activations grows with width.

A slope of 0 of log change against log width is transfer's condition (Yang et al., arXiv
2203.03466, Appendix D). `python -m studies.transfer CONFIG --widths … --coordinates K` does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.loader import Dataset, validation_batches
from model import GPT
from models import build_model_and_norm
from training import checkpoint
from training import config as configuration
from training.config import Config

from . import runs
from .sizes import base_size, settings_at

SEQUENCES = 16  # of the fixed batch whose activations are compared
CHANGES = dict[str, list[float]]  # of each layer, at each width


def print_coordinates(
    base: Config, folder: Path, widths: list[int], steps: int, workers: int
) -> int:
    """Train at each width, and print the changes and their slopes. Return the exit code.

    Raises StudyError for fewer than 2 widths, and for a run that did not end.
    """
    if len(widths) < 2:
        raise runs.StudyError(
            "--coordinates",
            got="fewer than 2 --widths",
            allowed="2 or more",
            fix="--widths 64 128 256",
        )
    changes = changes_of_activations(base, folder, widths, steps, workers)
    slopes = {layer: slope(widths, at_widths) for layer, at_widths in changes.items()}
    print(
        f"rms of the change of activations after {steps} steps,"
        f" lr {base.optim.lr:g}, {base.optim.name}"
    )
    print(f"{'':12}" + "".join(f"{f'width {w}':>12}" for w in widths) + f"{'slope':>10}")
    for layer, at_widths in changes.items():
        print(f"{layer:12}" + "".join(f"{v:12.4f}" for v in at_widths) + f"{slopes[layer]:10.3f}")
    worst = max(slopes, key=lambda layer: abs(slopes[layer]))
    print(
        f"largest slope of log change against log width: {slopes[worst]:+.3f} ({worst});"
        " 0 is independence of width"
    )
    return 0


def changes_of_activations(
    base: Config, folder: Path, widths: list[int], steps: int, workers: int
) -> CHANGES:
    """Return the rms of the change of each layer's output after `steps` steps, at each width.

    Layers: the residual stream after the embedding and after each block, and the logits, of one
    fixed batch.
    """
    jobs = [coordinate_job(base, folder, width, steps) for width in widths]
    costs = [float(w) for w in widths]
    runs.execute(jobs, folder, workers=runs.places(workers), costs=costs, portable=False)
    windows = validation_batches(
        Dataset(base.data).split("val"), block_size=base.model.block_size, batch_size=SEQUENCES
    )
    idx_BT, _ = next(windows)
    changes: CHANGES = {}
    for job in jobs:
        newest = checkpoint.newest_whole(folder / job.name / "checkpoints")[0]
        if newest is None:
            raise runs.StudyError(
                job.name,
                got="no checkpoint",
                allowed="a run that ended",
                fix=f"a smaller --optim.lr; see {folder}/configs/{job.name}.log",
            )
        config = configuration.from_dict(Config, checkpoint.read_state(newest)["config"])
        generator = torch.Generator().manual_seed(config.run.seed)
        model, _ = build_model_and_norm(config, generator)
        before = activations(model, idx_BT)  # as train_gpt.py begins
        checkpoint.load_model(newest, model)
        for layer, x in activations(model, idx_BT).items():
            rms = (x - before[layer]).square().mean().sqrt().item()
            changes.setdefault(layer, []).append(rms)
    return changes


def coordinate_job(base: Config, folder: Path, width: int, steps: int) -> runs.Job:
    """Return the run at one width: a schedule's first steps, not a schedule of so few steps."""
    settings = settings_at(base, (width, *base_size(base)[1:])) | {
        "train.keep_checkpoints": 1,
        "train.checkpoint_every": 0,
        "train.steps": steps,
        "schedule.cooldown": 0.0,
        "train.eval_tokens": base.train.eval_batch_size * base.model.block_size,
    }
    return runs.job(base, f"coordinates.w{width}.n{steps}", folder, **settings)


def slope(widths: list[int], changes: list[float]) -> float:
    """Return the slope of log change against log width; NaN where a layer did not change."""
    if min(changes) <= 0:
        return math.nan
    return float(np.polyfit(np.log2(widths), np.log2(changes), 1)[0])


def activations(model: GPT, idx_BT: Tensor) -> dict[str, Tensor]:
    """Return the output of the embedding, of each block and of the head, without dropout."""
    outputs: dict[str, Tensor] = {}

    def keep(layer: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            outputs[layer] = output

        return hook

    layers = {"embedding": model.embedding} | {
        f"block {i}": block for i, block in enumerate(model.blocks)
    }
    hooks = [module.register_forward_hook(keep(layer)) for layer, module in layers.items()]
    with torch.no_grad():
        outputs["logits"] = model.eval()(idx_BT)[0]
    for hook in hooks:
        hook.remove()
    return outputs
