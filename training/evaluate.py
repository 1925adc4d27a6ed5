"""The validation loss of a model, over the ranks of a run."""

import math
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from data.loader import Dataset, validation_batches
from model import GPT

from .config import Config
from .runtime import Runtime


@torch.no_grad()
def evaluate(
    model: GPT,
    runtime: Runtime,
    dataset: Dataset,
    config: Config,
    *,
    step: int,
    say: Callable[[str], None],
) -> tuple[float, float]:
    """Return (nats per token, bits per byte) on the validation split.

    It is the whole split, or its first train.eval_tokens targets. Each rank computes its share of
    the batches. step: of the run, for the watchdog. say: prints a line of progress.
    """
    model.eval()
    c, split = config.train, dataset.split("val")
    byte_lengths = torch.from_numpy(dataset.tokenizer.byte_lengths())
    nats, token_count, byte_count = 0.0, 0, 0
    batches = validation_batches(
        split,
        block_size=config.model.block_size,
        batch_size=c.eval_batch_size,
        tokens=c.eval_tokens,
    )
    if runtime.main:
        whole = sum(map(len, split)) - 1
        batches = with_progress(batches, total=min(c.eval_tokens or whole, whole), say=say)
    for x_BT, y_BT in share_of_rank(batches, runtime.rank, runtime.size):
        runtime.beat(step, "evaluation")
        targets = y_BT[y_BT >= 0]
        token_count += targets.numel()
        byte_count += int(byte_lengths[targets].sum())
        x_BT, y_BT = runtime.to_device(x_BT, y_BT)
        with runtime.autocast():
            loss = model(x_BT, y_BT, reduction="sum")[1]
        nats += loss.item()  # type: ignore[union-attr]
    model.train()
    nats, token_count, byte_count = runtime.total(nats, token_count, byte_count)
    return nats / token_count, nats / math.log(2) / max(1, byte_count)


def share_of_rank(
    batches: Iterable[tuple[Tensor, Tensor]], rank: int, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every size-th batch.

    All ranks get the same number, as sharded models need it: at the end some get a batch whose
    targets do not count.
    """
    for i, (x_BT, y_BT) in enumerate(batches):
        if i % size == rank:
            yield x_BT, y_BT
        last = i, x_BT, y_BT
    i, x_BT, y_BT = last
    if i % size < rank:
        yield x_BT, torch.full_like(y_BT, -1)


def with_progress(
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    total: int,
    say: Callable[[str], None],
    every: float = 10.0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of an evaluation, and show how far it is.

    It is a bar on a terminal, else a line every so many seconds. total: targets of all batches.
    """
    start = latest = time.perf_counter()
    count = 0
    with tqdm(
        total=total,
        desc="validation",
        unit="tok",
        unit_scale=True,
        leave=False,
        disable=None,
        dynamic_ncols=True,
    ) as bar:
        for x_BT, y_BT in batches:
            yield x_BT, y_BT
            targets = int((y_BT >= 0).sum())
            count += targets
            bar.update(targets)
            now = time.perf_counter()
            if bar.disable and now - latest >= every and count < total:
                latest = now
                left = (now - start) * (total / count - 1)
                say(f"validation: {count:,} of {total:,} tokens, {left:.0f} s left")
