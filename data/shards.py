"""Token shards in the llm.c / modded-nanogpt layout, and the manifest of a dataset.

A shard is 256 little-endian int32 (magic 20240520, version 1, token count, zeros), then that many little-endian uint16 tokens.
A dataset is a folder: train_000000.bin …, val_000000.bin …, and meta.json, written last: a folder without it is not a dataset.
Layout: karpathy/llm.c, dev/data/data_common.py.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from optim.errors import Refusal

MAGIC, VERSION, HEADER = 20240520, 1, 256  # HEADER in int32
SHARD_TOKENS = 100_000_000  # as llm.c's FineWeb shards
META = "meta.json"
SCHEMA = 1  # of meta.json


class DataError(Refusal):
    """A dataset, shard or text that cannot be used: what was got, what is allowed, how to fix it."""


@dataclass
class Shard:
    """One file of a dataset. sha256 is of the whole file."""

    file: str
    tokens: int
    sha256: str


@dataclass
class Split:
    """tokens: in all shards. bytes: of the text they stand for, null where unknown. gzip9_bytes, bzip2_bytes, xz_bytes: that text under gzip -9, bzip2 -9 and
    xz -9e, where it was measured."""

    tokens: int
    bytes: int | None
    shards: list[Shard]
    gzip9_bytes: int | None = None
    bzip2_bytes: int | None = None
    xz_bytes: int | None = None

    def compressors(self) -> dict[str, float]:
        """Bits per byte of the compressors that were measured, the weakest first."""
        sizes = {"gzip -9": self.gzip9_bytes, "bzip2 -9": self.bzip2_bytes, "xz -9e": self.xz_bytes}
        return {
            name: 8 * size / self.bytes
            for name, size in sizes.items()
            if size is not None and self.bytes
        }


@dataclass
class Manifest:
    """tokenizer: bytes, chars or gpt2. vocab_size: every token is below it. characters: of the chars tokenizer, in order. source: where the text came from."""

    tokenizer: str
    vocab_size: int
    splits: dict[str, Split]
    source: dict[str, Any]
    characters: str | None = None
    schema: int = field(default=SCHEMA)

    @property
    def sha256(self) -> str:
        """Of the corpus: over the sha256 of the shards, of train and then of val."""
        digests = [s.sha256 for name in ("train", "val") for s in self.splits[name].shards]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def write_shard(path: Path, tokens: np.ndarray) -> Shard:
    """Tokens (n,), each below 65,536, as one shard."""
    if len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < 2**16):
        raise DataError(
            str(path),
            got=f"tokens {tokens.min()} … {tokens.max()}",
            allowed="0 … 65535, the format's uint16",
            fix="a tokenizer with a vocabulary of at most 65536",
        )
    header = np.zeros(HEADER, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    content = header.tobytes() + tokens.astype("<u2").tobytes()
    path.write_bytes(content)
    return Shard(path.name, len(tokens), hashlib.sha256(content).hexdigest())


def read_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped (n,) uint16. Raises DataError on a wrong header or length."""
    if not path.is_file():
        raise DataError(
            f"{path}: no such shard",
            got="no file",
            allowed="the file as it was prepared",
            fix="prepare the dataset again (python -m data.prepare)",
        )
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=HEADER)
    if len(header) < HEADER or header[0] != MAGIC or header[1] != VERSION:
        got = f"magic {header[0]}, version {header[1]}" if len(header) > 1 else f"{size} bytes"
        raise DataError(
            f"{path}: not a token shard",
            got=got,
            allowed=f"magic {MAGIC}, version {VERSION}",
            fix="prepare the dataset again (python -m data.prepare)",
        )
    expected = HEADER * 4 + 2 * int(header[2])
    if size != expected:
        raise DataError(
            f"{path}: truncated or damaged shard",
            got=f"{size} bytes",
            allowed=f"{expected}, for the {header[2]} tokens its header promises",
            fix="prepare the dataset again (python -m data.prepare)",
        )
    if not header[2]:
        return np.zeros(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER * 4, shape=(int(header[2]),))


def write_split(
    folder: Path, name: str, chunks: Iterable[np.ndarray], *, shard_tokens: int = SHARD_TOKENS
) -> list[Shard]:
    """A stream of token arrays as shards of at most shard_tokens."""
    shards: list[Shard] = []
    pending: list[np.ndarray] = []
    count = 0

    def flush(tokens: np.ndarray) -> None:
        shards.append(write_shard(folder / f"{name}_{len(shards):06d}.bin", tokens))

    for chunk in chunks:
        pending.append(chunk)
        count += len(chunk)
        while count >= shard_tokens:
            tokens = np.concatenate(pending)
            flush(tokens[:shard_tokens])
            pending, count = [tokens[shard_tokens:]], count - shard_tokens
    if count or not shards:
        flush(np.concatenate(pending) if pending else np.zeros(0, dtype="<u2"))
    return shards


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """meta.json, atomically."""
    temporary = folder / f".{META}.tmp"
    with temporary.open("w", encoding="utf-8") as f:
        f.write(json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(folder / META)


def read_manifest(folder: Path) -> Manifest:
    """Raises DataError where there is no dataset, or one of another schema."""
    path = folder / META
    if not path.is_file():
        shards = sorted(folder.glob("*.bin")) if folder.is_dir() else []
        own = folder.name if folder.name in ("pysource", "shakespeare") else "--help"
        fix = (
            f"python -m data.prepare adopt {folder} --tokenizer gpt2"
            if shards
            else f"python -m data.prepare {own} (in the repository's folder)"
        )
        raise DataError(
            f"no dataset at {folder}",
            got="shards without a " + META if shards else "no " + META,
            allowed="a folder made by python -m data.prepare",
            fix=fix,
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            raise DataError(
                f"schema of {path}",
                got=raw["schema"],
                allowed=SCHEMA,
                fix="prepare the dataset again",
            )
        raw["splits"] = {
            k: Split(**{**s, "shards": [Shard(**x) for x in s["shards"]]})
            for k, s in raw["splits"].items()
        }
        return Manifest(**raw)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            f"{path}: damaged manifest",
            got=repr(error),
            allowed="what python -m data.prepare writes",
            fix="prepare the dataset again",
        ) from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def is_whole(folder: Path, manifest: Manifest) -> bool:
    """Whether every shard is there and has its hash."""
    return all(
        (folder / s.file).is_file() and sha256_of(folder / s.file) == s.sha256
        for split in manifest.splits.values()
        for s in split.shards
    )


def settle(folder: Path) -> None:
    """Clear what a killed `building` left: the old dataset comes back if the new one did not take its place."""
    partial, old = _beside(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A sibling folder that becomes `folder`, a dataset made here or nothing before, when the block ends well. One process at a time."""
    folder = folder.resolve()
    settle(folder)
    foreign = (
        [
            p.name
            for p in folder.iterdir()
            if p.name != META and not re.fullmatch(r"(train|val)_\d{6}\.bin", p.name)
        ]
        if folder.is_dir()
        else []
    )
    if (folder.exists() and not (folder / META).is_file()) or foreign:
        got = f"other files in it, {foreign[0]} for one" if foreign else f"no {META} in it"
        raise DataError(
            f"{folder} is there and is not a dataset",
            got=got,
            allowed="a new folder, or a dataset's",
            fix="another --out",
        )
    partial, old = _beside(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        settle(folder)
