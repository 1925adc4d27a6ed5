"""Batches of windows from memory-mapped shards. Seed and step alone decide a global batch.

T: block_size. A window is T + 1 tokens of one shard: T inputs, and for each the next token as its
target. B: sequences of the global batch.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from optim.settings import Range, check

from .shards import META, DataError, Manifest, Split, read_manifest, read_shard, sha256_of
from .tokenizer import Tokenizer, tokenizer_of


@dataclass
class DataConfig:
    """The text of a run."""

    dataset: str = "corpora/pysource"
    """A folder made by python -m data.prepare."""

    verify: bool = True
    """Compare every shard with its sha256 before training."""

    holdout: Annotated[float, Range(0, 1)] = 0.0
    """Do not train on this last fraction of the training split; validation reads it instead of the
    validation split. For choosing settings."""


class Dataset:
    """A prepared dataset: its manifest, tokenizer and shards.

    With config.holdout the manifest's splits are those that result from it.
    """

    def __init__(self, config: DataConfig) -> None:
        check(DataConfig, vars(config), owner="DataConfig")
        self.folder = Path(config.dataset)
        self.manifest: Manifest = read_manifest(self.folder)
        self.tokenizer: Tokenizer = tokenizer_of(self.manifest)
        self.shards: dict[str, list[np.ndarray]] = {}
        for name, split in self.manifest.splits.items():
            arrays = []
            for shard in split.shards:
                path = self.folder / shard.file
                array = read_shard(path)
                if len(array) != shard.tokens or (
                    config.verify and sha256_of(path) != shard.sha256
                ):
                    raise DataError(
                        f"{path}: corrupted shard",
                        got=f"a file that differs from the sha256 or token count in {META}",
                        allowed="the file as it was prepared",
                        fix="prepare the dataset again (python -m data.prepare)",
                    )
                arrays.append(array)
            self.shards[name] = arrays
        if self.tokenizer.vocab_size != self.manifest.vocab_size:
            raise DataError(
                f"vocab_size in {self.folder / META}",
                got=self.manifest.vocab_size,
                allowed=f"{self.tokenizer.vocab_size}, that of tokenizer {self.manifest.tokenizer}",
                fix="prepare the dataset again (python -m data.prepare)",
            )
        if config.holdout:
            self._hold_out(config.holdout)

    def _hold_out(self, fraction: float) -> None:
        """Validate on the last tokens of the training split, and train on the others.

        The manifest does not tell how many bytes of text each part stands for: both are unknown.
        """
        whole, shards = self.manifest.splits["train"], self.manifest.splits["train"].shards
        left = kept = whole.tokens - round(fraction * whole.tokens)
        train: list[np.ndarray] = []
        held: list[np.ndarray] = []
        for array in self.split("train"):
            train += [array[:left]] if left else []
            held += [array[left:]] if left < len(array) else []
            left = max(0, left - len(array))
        self.shards |= {"train": train, "val": held}
        self.manifest.splits |= {
            "train": Split(kept, None, shards),
            "val": Split(whole.tokens - kept, None, shards),
        }

    def split(self, name: str) -> list[np.ndarray]:
        """Return a split's shards. Raises DataError for a split that the dataset does not have."""
        if name not in self.shards:
            raise DataError(
                str(self.folder),
                got=f"no split {name!r}",
                allowed=", ".join(self.shards),
                fix="prepare the dataset again (python -m data.prepare)",
            )
        return self.shards[name]


class TrainBatches:
    """The training stream: an epoch visits every window once.

    Each epoch has its own offset and order, both drawn from (seed, epoch).
    """

    def __init__(
        self, shards: list[np.ndarray], *, block_size: int, batch_size: int, seed: int
    ) -> None:
        self.shards, self.T, self.B, self.seed = shards, block_size, batch_size, seed
        # T tokens are kept for the offset, so that every epoch has the same number of windows.
        self.windows = [max(0, (len(s) - 1) // block_size - 1) for s in shards]
        self.ends = list(accumulate(self.windows))
        if not self.ends or not self.ends[-1]:
            tokens = sum(map(len, shards))
            raise DataError(
                "training split too short",
                got=f"{tokens} tokens in {len(shards)} shards",
                allowed=f"a shard of at least 2 · block_size + 1 = {2 * block_size + 1} tokens",
                fix="a smaller model.block_size or more text",
            )
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def _draw_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """Return an epoch's offset and the order of its windows."""
        rng = np.random.default_rng((self.seed, epoch))
        return int(rng.integers(self.T)), rng.permutation(self.ends[-1]).astype(np.int64)

    def batch(self, step: int, *, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B/parts, T) int64 of this step.

        They are the part-th of `parts` equal slices of its global batch.
        """
        size = self.B // parts
        first = step * self.B + part * size
        rows = np.stack([self._window(i) for i in range(first, first + size)])
        tokens = torch.from_numpy(rows.astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _window(self, index: int) -> np.ndarray:
        """Return the index-th window (T + 1,) of the stream."""
        epoch, place = divmod(index, self.ends[-1])
        offset, order = self._epoch(epoch)
        window = int(order[place])
        shard = bisect_right(self.ends, window)
        start = offset + (window - (self.ends[shard - 1] if shard else 0)) * self.T
        return self.shards[shard][start : start + self.T + 1]


def validation_batches(
    shards: list[np.ndarray], *, block_size: int, batch_size: int, tokens: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets (at most batch_size, T) int64 of a whole split.

    Every token but the first is a target once. Windows lie side by side, and the last one is padded
    with target −1, which does not count. tokens: stop after so many targets.
    """
    check_validation(shards)
    stream = shards[0] if len(shards) == 1 else np.concatenate(shards)
    count = len(stream) - 1 if tokens is None else min(tokens, len(stream) - 1)
    stream = stream[: count + 1]
    for start in range(0, count, block_size * batch_size):
        chunk = np.asarray(stream[start : start + block_size * batch_size + 1]).astype(np.int64)
        rows = -(-(len(chunk) - 1) // block_size)
        inputs = np.zeros(rows * block_size, dtype=np.int64)
        targets = np.full(rows * block_size, -1, dtype=np.int64)
        inputs[: len(chunk) - 1], targets[: len(chunk) - 1] = chunk[:-1], chunk[1:]
        yield (
            torch.from_numpy(inputs).view(rows, block_size),
            torch.from_numpy(targets).view(rows, block_size),
        )


def check_validation(shards: list[np.ndarray]) -> None:
    """Raise DataError for a split that has nothing to score."""
    tokens = sum(map(len, shards))
    if tokens < 2:
        raise DataError(
            "validation split too short",
            got=f"{tokens} tokens",
            allowed="2 or more",
            fix="more text",
        )
