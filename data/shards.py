"""Token shards in the llm.c / modded-nanogpt layout, and the manifest of a dataset.

A shard is 256 little-endian int32 (magic 20240520, version 1, token count, zeros), then that many
little-endian uint16 tokens. A dataset is a folder: train_000000.bin …, val_000000.bin …, and
meta.json, which is written last: a folder without it is not a dataset.
Layout: karpathy/llm.c, dev/data/data_common.py.
"""

import hashlib
import json
import os
from collections.abc import Iterable
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
    """A dataset, a shard or a text that cannot be used."""


@dataclass
class Shard:
    """One file of a dataset."""

    file: str
    tokens: int

    sha256: str
    """The hash of the whole file, its header included."""


@dataclass
class Split:
    """The part of a dataset that trains, or the part that validates."""

    tokens: int
    """In all shards."""

    bytes: int | None
    """The size of the text that the tokens stand for; null where it is not known."""

    shards: list[Shard]

    gzip9_bytes: int | None = None
    """That text under gzip -9, where it was measured; the next two likewise."""

    bzip2_bytes: int | None = None
    """Under bzip2 -9."""

    xz_bytes: int | None = None
    """Under xz -9e."""

    def compressors(self) -> dict[str, float]:
        """Return bits per byte of the compressors that were measured, the weakest first."""
        sizes = {"gzip -9": self.gzip9_bytes, "bzip2 -9": self.bzip2_bytes, "xz -9e": self.xz_bytes}
        return {
            name: 8 * size / self.bytes
            for name, size in sizes.items()
            if size is not None and self.bytes
        }


@dataclass
class Manifest:
    """A dataset's meta.json."""

    tokenizer: str
    """Its name (data/tokenizer.py)."""

    vocab_size: int
    """Every token is below it."""

    splits: dict[str, Split]

    source: dict[str, Any]
    """Where the text came from."""

    characters: str | None = None
    """The vocabulary of a tokenizer that takes it from the text."""

    schema: int = field(default=SCHEMA)

    @property
    def sha256(self) -> str:
        """Return the corpus's hash: over the sha256 of the shards, of train and then of val."""
        digests = [s.sha256 for name in ("train", "val") for s in self.splits[name].shards]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def write_shard(path: Path, tokens: np.ndarray) -> Shard:
    """Write tokens (n,), each below 65,536, as one shard. Raises DataError for larger ones."""
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
    """Return a shard's tokens (n,) uint16, memory-mapped. Raises DataError for a damaged file."""
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
    """Write a stream of token arrays as shards of at most shard_tokens."""
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
    """Write meta.json, whole or not at all."""
    temporary = folder / f".{META}.tmp"
    with temporary.open("w", encoding="utf-8") as f:
        f.write(json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(folder / META)


def read_manifest(folder: Path) -> Manifest:
    """Return a dataset's manifest. Raises DataError for no dataset, and for another schema."""
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
    """Return a file's sha256."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
