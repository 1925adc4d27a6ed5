"""summary.json: the facts of a run that has ended. Its keys are documented here alone."""

from collections.abc import Mapping
from typing import Any

import torch

from model import GPT

from .config import Config
from .provenance import hardware
from .resume import Progress
from .runtime import Runtime


def summary(
    config: Config,
    runtime: Runtime,
    model: GPT,
    progress: Progress,
    *,
    source: tuple[str | None, bool | None],
    plugins: Mapping[str, str],
    wall_seconds: float,
    optimizer_state_bytes: int,
) -> dict[str, Any]:
    """Return the facts of a run, by the names that readers of summary.json use.

    params: weights. tokens, steps: trained on. val_loss: nats per token, val_bpb: bits per byte.
    train_seconds: the training clock, without compile_seconds and evaluations; wall_seconds: all
    of it; optimizer_seconds and telemetry_seconds: parts. tokens_per_second: of the training
    clock. mfu: the share of the devices' bf16 peak that the model's products use, null where the
    peak is not known. peak_memory_bytes, optimizer_state_bytes: of the rank that has most. target:
    the first evaluation at or under train.target_loss. seed, world_size, device, hardware, torch:
    what computed it. commit, dirty: source, which git_state() said at the start; null outside git.
    plugins: the SHA-256 of each one's file at the start; left out where there are none.
    """
    tokens = config.train.steps * config.train.batch_size * config.model.block_size
    seconds, peak = progress.train_seconds, runtime.peak_flops()
    speed = tokens / seconds
    commit, dirty = source
    memory = runtime.gather((runtime.peak_memory_bytes() or 0, optimizer_state_bytes))
    peak_memory, state_bytes = (max(column) for column in zip(*memory, strict=True))
    return {
        "params": model.num_params(),
        "tokens": tokens,
        "steps": config.train.steps,
        "val_loss": progress.val_loss,
        "val_bpb": progress.val_bpb,
        "train_seconds": seconds,
        "compile_seconds": progress.compile_seconds,
        "wall_seconds": wall_seconds,
        "optimizer_seconds": progress.optimizer_seconds,
        "telemetry_seconds": progress.telemetry_seconds,
        "tokens_per_second": speed,
        "mfu": model.flops_per_token() * speed / (peak * runtime.size) if peak else None,
        "peak_memory_bytes": peak_memory or None,
        "optimizer_state_bytes": state_bytes,
        "target": progress.target,
        "seed": config.run.seed,
        "world_size": runtime.size,
        "device": runtime.device_name(),
        "hardware": hardware(runtime.device_name()),
        "torch": torch.__version__,
        "commit": commit,
        "dirty": dirty,
        **({"plugins": dict(plugins)} if plugins else {}),
    }
