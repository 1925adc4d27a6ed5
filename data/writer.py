"""Texts → a dataset in a folder of its own, which appears whole or not at all."""

import bz2
import gzip
import lzma
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .shards import (
    META,
    DataError,
    Manifest,
    Split,
    read_manifest,
    sha256_of,
    write_manifest,
    write_split,
)
from .tokenizer import Tokenizer, check_outputs

Splits = dict[str, list[str]]  # the documents of train and val

# Validation texts up to these sizes are compressed, for comparison with the model's bits per byte.
# xz takes a second for a megabyte.
COMPRESSED_LIMIT, XZ_LIMIT = 64 * 2**20, 8 * 2**20
EXCERPT = 100  # characters on which a tokenizer's methods are checked


def write_dataset(
    out: Path,
    source: dict[str, Any],
    tokenizer: Tokenizer,
    documents_by_split: Splits,
    *,
    overwrite: bool,
) -> None:
    """Write documents as a dataset at `out`, unless it is there already.

    source: where the documents come from; it tells this dataset from others. overwrite: replace a
    dataset of another source. Raises DataError for an empty split, and where `out` is taken.
    """
    for split, documents in documents_by_split.items():
        if not any(documents):
            raise DataError(
                f"{split} split is empty",
                got="no text",
                allowed="at least one character",
                fix="more documents, or --val FILE",
            )
    text = next(filter(None, documents_by_split["val"]))[:EXCERPT]
    check_outputs(tokenizer, tokenizer.encode(text))
    separator = ""
    if tokenizer.byte_lengths()[tokenizer.separator]:
        separator = tokenizer.decode([tokenizer.separator])
    if is_prepared(out, source, tokenizer.name, overwrite=overwrite):
        add_compressed_sizes(out, separator.join(documents_by_split["val"]).encode())
        return
    with building(out) as folder:
        splits = {}
        for split, documents in documents_by_split.items():
            text = separator.join(documents).encode()
            shards = write_split(folder, split, encoded(tokenizer, documents, split))
            sizes = compressed_sizes(text) if split == "val" else {}
            splits[split] = Split(sum(s.tokens for s in shards), len(text), shards, **sizes)
        manifest = Manifest(
            tokenizer.name, tokenizer.vocab_size, splits, source, tokenizer.characters
        )
        write_manifest(folder, manifest)
    report(out, "written")


def write_stream(
    out: Path,
    source: dict[str, Any],
    tokenizer: Tokenizer,
    documents: Iterator[str],
    limits: dict[str, int | None],
) -> None:
    """Write a stream of documents as a dataset at `out`, without holding them in memory.

    limits: by split, in the order in which they are filled: after how many tokens a split takes no
    further document; None: it takes all that are left. Raises DataError for an empty split.
    """
    with building(out) as folder:
        splits: dict[str, Split] = {}
        for split, limit in limits.items():
            sizes: list[int] = []
            chunks = encoded_until(limit, tokenizer, documents, split, sizes)
            shards = write_split(folder, split, chunks)
            splits[split] = Split(sum(s.tokens for s in shards), sum(sizes), shards)
            if not splits[split].tokens:
                raise DataError(
                    f"{source['kind']}: {split} split is empty",
                    got=f"{splits['val'].tokens} tokens in all",
                    allowed="more than --val-tokens",
                    fix="a smaller --val-tokens",
                )
        write_manifest(folder, Manifest(tokenizer.name, tokenizer.vocab_size, splits, source))
    report(out, "written")


def encoded_until(
    limit: int | None, tokenizer: Tokenizer, documents: Iterator[str], split: str, sizes: list[int]
) -> Iterator[np.ndarray]:
    """Yield the tokens of whole documents, each after a separator, until there are `limit`.

    sizes: a document's bytes are appended, those of its separator included.
    """
    separator = np.array([tokenizer.separator], dtype=np.uint16)
    separator_bytes = int(tokenizer.byte_lengths()[tokenizer.separator])
    count = 0
    with tqdm(
        total=limit, desc=f"tokenize {split}", unit="tok", unit_scale=True, disable=None
    ) as progress:
        while limit is None or count < limit:
            document = next(documents, None)
            if document is None:
                return
            if not count:
                check_outputs(tokenizer, tokenizer.encode(document[:EXCERPT]))
            tokens = np.concatenate([separator, tokenizer.encode(document)])
            sizes.append(len(document.encode()) + separator_bytes)
            count += len(tokens)
            progress.update(len(tokens))
            yield tokens


def encoded(tokenizer: Tokenizer, documents: list[str], split: str) -> Iterator[np.ndarray]:
    """Yield the documents' tokens, with the separator between documents."""
    separator = np.array([tokenizer.separator], dtype=np.uint16)
    progress = tqdm(documents, desc=f"tokenize {split}", unit="doc", disable=None)
    for i, document in enumerate(progress):
        if i or tokenizer.separator_first:
            yield separator
        yield tokenizer.encode(document)


def compressed_sizes(text: bytes) -> dict[str, int]:
    """Return a text's size under gzip -9, bzip2 -9 and xz -9e, by the names of fields of Split.

    A long text is not given to the slow ones, and a longer text to none.
    """
    if len(text) > COMPRESSED_LIMIT:
        return {}
    sizes = {"gzip9_bytes": len(gzip.compress(text, 9)), "bzip2_bytes": len(bz2.compress(text, 9))}
    if len(text) <= XZ_LIMIT:
        sizes["xz_bytes"] = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    return sizes


def add_compressed_sizes(folder: Path, text: bytes) -> None:
    """Measure a dataset's validation text if it was prepared before these sizes were measured."""
    manifest = read_manifest(folder)
    if manifest.splits["val"].bzip2_bytes is None and (sizes := compressed_sizes(text)):
        manifest.splits["val"] = replace(manifest.splits["val"], **sizes)
        write_manifest(folder, manifest)


def report(folder: Path, event: str) -> None:
    """Print what happened to a dataset, and its sizes."""
    manifest = read_manifest(folder)
    sizes = ", ".join(f"{name} {s.tokens:,} tokens" for name, s in manifest.splits.items())
    print(f"{folder} {event}: {manifest.tokenizer} ({manifest.vocab_size}), {sizes}")


def is_prepared(out: Path, source: dict[str, Any], tokenizer: str, *, overwrite: bool) -> bool:
    """Return whether `out` holds this very dataset, whole.

    A damaged one may be built anew. Raises DataError for a dataset of another source or tokenizer,
    unless it is to be overwritten.
    """
    settle(out.resolve())
    if not (out / META).is_file():
        return False
    try:
        present = read_manifest(out)
    except DataError:
        return False
    if (present.source, present.tokenizer) != (source, tokenizer):
        if overwrite:
            return False
        raise DataError(
            f"{out} holds another dataset",
            got=f"{tokenizer} of {source}",
            allowed=f"{present.tokenizer} of {present.source}, which is there",
            fix="another --out, or --replace",
        )
    if is_whole(out, present):
        report(out, "is there already")
        return True
    return False


def is_whole(folder: Path, manifest: Manifest) -> bool:
    """Return whether every shard exists and has its hash."""
    return all(
        (folder / shard.file).is_file() and sha256_of(folder / shard.file) == shard.sha256
        for split in manifest.splits.values()
        for shard in split.shards
    )


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, whose place it takes when the block ends well.

    Raises DataError if `folder` exists and is no dataset, or has other files in it. One process at
    a time.
    """
    folder = folder.resolve()
    settle(folder)
    foreign = foreign_files(folder)
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


def foreign_files(folder: Path) -> list[str]:
    """Return the names of what is in a folder and does not belong to a dataset made here."""
    if not folder.is_dir():
        return []
    own = re.compile(rf"{re.escape(META)}|(train|val)_\d{{6}}\.bin")
    return [path.name for path in folder.iterdir() if not own.fullmatch(path.name)]


def settle(folder: Path) -> None:
    """Clear what a killed `building` left.

    The old dataset comes back if the new one did not take its place.
    """
    partial, old = _beside(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Return the places of the new dataset while it is built, and of the old one meanwhile."""
    return folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
