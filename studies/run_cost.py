"""The cost of a training on this machine, before it runs: FLOPs and seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from data.loader import Dataset
from models import build_model_and_norm
from optim.baselines import BASELINES
from training.config import Config

# Seconds a layer and step takes beside its FLOPs, on one CPU thread: `python -m studies.transfer`
# at width 64 (docs/log.md).
OVERHEAD = 5e-3
STARTUP = 1.0  # seconds a run
# Hessian-vector products of one record of curvature, each about four times a gradient's FLOPs:
# `python -m studies.sharpness` (docs/log.md).
PRODUCTS = 60


def measure_speed(config: Config) -> float:
    """Return the FLOP/s of a float32 product of 512 × 512 matrices, the best of five.

    It is measured on the run's device, with its number of threads.
    """
    device = "cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu"
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    A = torch.ones(512, 512, device=device)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(4):
            B = A @ A
        B.sum().item()
        best = max(best, 4 * 2 * 512**3 / (time.perf_counter() - begin))
    return best


def cost(config: Config, dataset: Dataset, flops_per_second: float) -> tuple[float, float]:
    """Return (FLOPs, seconds) of one run.

    Counted are forward, backward, evaluations, curvature, and the norms of Dualized and Normalized;
    the steps of other optimizers are not.
    """
    c = config.train
    vocab_size = config.model.vocab_size or dataset.tokenizer.vocab_size
    shape = replace(config.model, vocab_size=vocab_size)
    with torch.device("meta"):
        model, norm = build_model_and_norm(replace(config, model=shape))
    per_token = model.flops_per_token()
    dualize = sum(n.flops(model.get_parameter(k).shape) for k, n in norm.norms.items())
    baseline = BASELINES.get(config.optim.name)
    dualize *= baseline is None or baseline.normed
    step = per_token * c.batch_size * shape.block_size + dualize
    evaluations = 1 + (c.steps // c.eval_every if c.eval_every else 0)
    eval_tokens = c.eval_tokens or dataset.manifest.splits["val"].tokens
    flops = c.steps * step + evaluations * per_token / 3 * eval_tokens
    if c.sharpness_every:
        records = 1 + c.steps // c.sharpness_every
        flops += records * PRODUCTS * 4 * per_token * c.sharpness_sequences * shape.block_size
    return flops, STARTUP + flops / flops_per_second + c.steps * shape.n_layer * OVERHEAD


def duration(seconds: Sequence[float], workers: int) -> str:
    """Return in words how long runs of so many seconds take, `workers` at a time."""
    longest = max(sum(seconds) / workers, max(seconds, default=0))
    if longest < 90:
        return f"{longest:.0f} s"
    return f"{longest / 60:.0f} min" if longest < 5400 else f"{longest / 3600:.1f} h"
