"""Corpora → shards. `python -m data.prepare --help`.

Every command is idempotent (the same source gives the same dataset, and one that is there already is left alone) and atomic
(a dataset appears whole or not at all).
"""

import argparse
import bz2
import gzip
import hashlib
import importlib.metadata
import lzma
import re
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .shards import (
    META,
    DataError,
    Manifest,
    Shard,
    Split,
    building,
    is_whole,
    read_manifest,
    read_shard,
    settle,
    sha256_of,
    write_manifest,
    write_split,
)
from .tokenizer import NAMES, Characters, Tokenizer, get_tokenizer

CORPORA = Path("corpora")
PACKAGES = (
    "mpmath",
    "networkx",
    "sympy",
)  # pure Python, pinned in requirements.txt, needed by torch itself
VALIDATION = 50  # one file in so many, by the hash of its name
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# Validation texts up to these sizes are compressed for comparison. xz takes a second for a megabyte.
COMPRESSED_LIMIT, XZ_LIMIT = 64 * 2**20, 8 * 2**20

ADOPTED = {"kind": "adopted"}

Splits = dict[str, list[str]]


def is_there(out: Path, source: dict[str, Any], tokenizer: str, *, replace: bool) -> bool:
    """Whether `out` holds this very dataset, whole. A damaged one may be built anew; one of another source only with --replace."""
    settle(out.resolve())
    if not (out / META).is_file():
        return False
    try:
        there = read_manifest(out)
    except DataError:
        return False
    if (there.source, there.tokenizer) != (source, tokenizer):
        if replace:
            return False
        raise DataError(
            f"{out} holds another dataset",
            got=f"{tokenizer} of {source}",
            allowed=f"{there.tokenizer} of {there.source}, which is there",
            fix="another --out, or --replace",
        )
    if is_whole(out, there):
        report(out, "is there already")
        return True
    return False


def build(
    args: argparse.Namespace,
    out: Path,
    source: dict[str, Any],
    tokenizer: Tokenizer,
    splits: Splits,
) -> None:
    """Documents → a dataset at `out`, unless it is there."""
    for name, documents in splits.items():
        if not any(documents):
            raise DataError(
                f"{name} split is empty",
                got="no text",
                allowed="at least one character",
                fix="more documents, or --val FILE",
            )
    there = is_there(out, source, tokenizer.name, replace=args.replace)
    separator = (
        tokenizer.decode([tokenizer.separator])
        if tokenizer.byte_lengths()[tokenizer.separator]
        else ""
    )
    if there:
        manifest, joint = read_manifest(out), separator.join(splits["val"]).encode()
        if manifest.splits["val"].bzip2_bytes is None and (
            sizes := compressed(joint)
        ):  # prepared before these were measured
            manifest.splits["val"] = replace(manifest.splits["val"], **sizes)
            write_manifest(out, manifest)
        return
    with building(out) as folder:
        made = {}
        for name, documents in splits.items():
            joint = separator.join(documents).encode()
            shards = write_split(folder, name, encode(tokenizer, documents, name))
            sizes = compressed(joint) if name == "val" else {}
            made[name] = Split(sum(s.tokens for s in shards), len(joint), shards, **sizes)
        write_manifest(
            folder,
            Manifest(tokenizer.name, tokenizer.vocab_size, made, source, tokenizer.characters),
        )
    report(out, "written")


def compressed(text: bytes) -> dict[str, int]:
    """The sizes of a text under gzip -9, bzip2 -9 and xz -9e, by their names in Split; of a long one fewer, or none."""
    if len(text) > COMPRESSED_LIMIT:
        return {}
    sizes = {"gzip9_bytes": len(gzip.compress(text, 9)), "bzip2_bytes": len(bz2.compress(text, 9))}
    return sizes | (
        {"xz_bytes": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))}
        if len(text) <= XZ_LIMIT
        else {}
    )


def encode(tokenizer: Tokenizer, documents: list[str], name: str) -> Iterator[np.ndarray]:
    """Documents with the separator between them; before each of them for GPT-2, as llm.c and modded-nanogpt have it."""
    separator = np.array([tokenizer.separator], dtype=np.uint16)
    for i, document in enumerate(
        tqdm(documents, desc=f"tokenize {name}", unit="doc", disable=None)
    ):
        if i or tokenizer.name == "gpt2":
            yield separator
        yield tokenizer.encode(document)


def report(out: Path, what: str) -> None:
    manifest = read_manifest(out)
    sizes = ", ".join(f"{name} {s.tokens:,} tokens" for name, s in manifest.splits.items())
    print(f"{out} {what}: {manifest.tokenizer} ({manifest.vocab_size}), {sizes}")


def hash_split(named: Iterable[tuple[str, str]]) -> Splits:
    """(name, text) pairs → train and val: one name in VALIDATION, by the sha256 of the name alone."""
    splits: Splits = {"train": [], "val": []}
    for name, text in named:
        chosen = int(hashlib.sha256(name.encode()).hexdigest(), 16) % VALIDATION == 0
        splits["val" if chosen else "train"].append(text)
    return splits


def corpus_hash(splits: Splits) -> str:
    """sha256 over every split's name and its documents' hashes, in order."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        digest.update(f"{name} {len(splits[name])}".encode())
        for text in splits[name]:
            digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def package_sources(package: str) -> Iterator[tuple[str, str]]:
    """(path, text) of a package's Python files, in a fixed order."""
    try:
        files = importlib.metadata.distribution(package).files
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            "pysource",
            got=f"no installed package {package!r}",
            allowed=", ".join(PACKAGES),
            fix="pip install -r requirements.txt",
        ) from error
    if not files:
        raise DataError(
            "pysource",
            got=f"no list of files for {package!r}",
            allowed="a package that pip installed",
            fix=f"pip install --force-reinstall {package}",
        )
    for file in sorted((f for f in files if f.suffix == ".py"), key=str):
        yield (
            file.as_posix(),
            Path(str(file.locate())).read_text(encoding="utf-8", errors="replace"),
        )


def pysource(args: argparse.Namespace) -> None:
    """The embedded corpus: the Python sources of packages that this project needs anyway. No network."""
    splits = hash_split(chain.from_iterable(map(package_sources, PACKAGES)))
    versions = {p: importlib.metadata.version(p) for p in PACKAGES}
    source = {"kind": "pysource", "packages": versions, "corpus_sha256": corpus_hash(splits)}
    tokenizer = make_tokenizer(args.tokenizer, splits)
    build(
        args,
        args.out or CORPORA / named("pysource", args.tokenizer, "bytes"),
        source,
        tokenizer,
        splits,
    )


def shakespeare(args: argparse.Namespace) -> None:
    """Tiny Shakespeare, characters, split as nanoGPT does: the first 90% of the characters train."""
    out = args.out or CORPORA / named("shakespeare", args.tokenizer, "chars")
    source = {"kind": "shakespeare", "sha256": SHAKESPEARE_SHA256}
    if not args.file and is_there(out, source, args.tokenizer, replace=args.replace):
        return
    if args.file:
        content = read_bytes(args.file)
    else:
        print(f"downloading {SHAKESPEARE_URL}")
        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=60) as response:
                content = response.read()
        except OSError as error:
            raise DataError(
                "Tiny Shakespeare",
                got=error,
                allowed="a network, or a local copy",
                fix="python -m data.prepare shakespeare --file input.txt",
            ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise DataError(
            "Tiny Shakespeare: another file",
            got=f"sha256 {digest}",
            allowed=SHAKESPEARE_SHA256,
            fix="for a text of your own, python -m data.prepare text FILE --tokenizer chars",
        )
    text = content.decode()
    cut = int(0.9 * len(text))
    splits = {"train": [text[:cut]], "val": [text[cut:]]}
    tokenizer = make_tokenizer(args.tokenizer, splits)
    build(args, out, source, tokenizer, splits)


def text(args: argparse.Namespace) -> None:
    """Your own UTF-8 text files: each file a document, or many with --separator. Without --val, the last 10% of each file validates."""
    files = [(str(f), read_text(f)) for f in args.files]
    cut = partial(documents, separator=unescape(args.separator) if args.separator else None)
    if args.val:
        splits = {
            "train": [d for _, t in files for d in cut(t)],
            "val": [d for f in args.val for d in cut(read_text(f))],
        }
    elif args.separator:
        splits = hash_split((f"{name}:{i}", d) for name, t in files for i, d in enumerate(cut(t)))
    else:
        splits = {
            "train": [t[: int(0.9 * len(t))] for _, t in files],
            "val": [t[int(0.9 * len(t)) :] for _, t in files],
        }
    source = {
        "kind": "text",
        "files": [f.name for f in [*args.files, *args.val]],
        "corpus_sha256": corpus_hash(splits),
    }
    build(
        args,
        args.out or CORPORA / named(args.files[0].name.split(".")[0], args.tokenizer, ""),
        source,
        make_tokenizer(args.tokenizer, splits),
        splits,
    )


def unescape(separator: str) -> str:
    r"""\n, \x1e and the like, as a shell passes them."""
    try:
        return separator.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise DataError(
            "--separator",
            got=f"{separator!r} ({error.reason})",
            allowed="text with Python's escapes",
            fix=r"for instance '\n\x1e\n'",
        ) from error


def documents(content: str, *, separator: str | None) -> list[str]:
    return [d for d in content.split(separator) if d] if separator else [content]


def hub(args: argparse.Namespace) -> None:
    """A dataset that the `datasets` library can load: a name on the Hugging Face hub, or json, text, parquet with --files. Streams, so it may be larger than memory."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise DataError(
            "hub",
            got="no package datasets, which training does not need",
            allowed="an environment that has it",
            fix="pip install datasets, in the version of requirements-dev.txt",
        ) from error

    out = args.out or CORPORA / named(args.name.split("/")[-1].lower(), args.tokenizer, "")
    options = {
        k: getattr(args, k)
        for k in ("name", "config", "split", "column", "revision", "tokens", "val_tokens")
    }
    files = {str(f): sha256_of(Path(f)) if Path(f).is_file() else None for f in args.files}
    source = {"kind": "hub", **options, "files": files}
    if is_there(out, source, args.tokenizer, replace=args.replace):
        return
    tokenizer = get_tokenizer(args.tokenizer)
    try:
        rows = iter(
            load_dataset(
                args.name,
                args.config,
                split=args.split,
                data_files=args.files or None,
                revision=args.revision,
                streaming=True,
            )
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"hub: {args.name}",
            got=error,
            allowed="a dataset that the datasets library loads",
            fix="the name, --config, --split or --files",
        ) from error
    sizes = {"train": 0, "val": 0}
    with building(out) as folder:
        made = {}
        for name, wanted in (("val", args.val_tokens), ("train", args.tokens)):
            shards = write_split(
                folder, name, take(rows, tokenizer, args.column, wanted, name, sizes)
            )
            made[name] = Split(sum(s.tokens for s in shards), sizes[name], shards)
            if not made[name].tokens:
                raise DataError(
                    f"hub: {name} split is empty",
                    got=f"{made['val'].tokens} tokens in all",
                    allowed="more than --val-tokens",
                    fix="a smaller --val-tokens",
                )
        write_manifest(folder, Manifest(tokenizer.name, tokenizer.vocab_size, made, source))
    report(out, "written")


def take(
    rows: Iterator[dict[str, Any]],
    tokenizer: Tokenizer,
    column: str,
    wanted: int | None,
    name: str,
    sizes: dict[str, int],
) -> Iterator[np.ndarray]:
    """Whole documents until `wanted` tokens are reached; counts their bytes in sizes[name]."""
    count = 0
    separator = np.array([tokenizer.separator], dtype=np.uint16)
    with tqdm(
        total=wanted, desc=f"tokenize {name}", unit="tok", unit_scale=True, disable=None
    ) as bar:
        while wanted is None or count < wanted:
            try:
                row = next(rows, None)
            except (OSError, ValueError) as error:
                raise DataError(
                    "hub",
                    got=error,
                    allowed="rows that the datasets library reads",
                    fix="mend the data, or leave that file out of --files",
                ) from error
            if row is None:
                return
            if column not in row:
                raise DataError(
                    "hub", got=f"no column {column!r}", allowed=", ".join(row), fix="--column NAME"
                )
            if not row[column]:
                continue
            if not isinstance(row[column], str):
                raise DataError(
                    f"hub: column {column!r}",
                    got=type(row[column]).__name__,
                    allowed="text",
                    fix="--column NAME",
                )
            tokens = np.concatenate([separator, tokenizer.encode(row[column])])
            sizes[name] += len(row[column].encode()) + (tokenizer.name == "bytes")
            count += len(tokens)
            bar.update(len(tokens))
            yield tokens


def adopt(args: argparse.Namespace) -> None:
    """A manifest for shards that llm.c or modded-nanogpt made: files named train_….bin or …_train_….bin, and so for val."""
    folder: Path = args.folder
    tokenizer = get_tokenizer(args.tokenizer)
    try:
        ours = (folder / META).is_file() and read_manifest(folder).source != ADOPTED
    except DataError:
        ours = False  # damaged, and written anew below
    if ours:
        raise DataError(
            str(folder),
            got="a dataset that was prepared here",
            allowed="shards of another program",
            fix="nothing to adopt, train on it",
        )
    made = {}
    for name in ("train", "val"):
        paths = sorted(p for p in folder.glob("*.bin") if re.search(rf"(^|_){name}(_|\.)", p.name))
        if not paths:
            raise DataError(
                str(folder),
                got=f"no file named {name}_….bin or …_{name}_….bin",
                allowed="a folder with train and val shards",
                fix="python -m data.prepare adopt FOLDER",
            )
        size, shards, lengths = 0, [], tokenizer.byte_lengths()
        for path in tqdm(paths, desc=f"adopt {name}", unit="shard", disable=None):
            tokens = read_shard(path)
            if len(tokens) and int(tokens.max()) >= tokenizer.vocab_size:
                raise DataError(
                    str(path),
                    got=f"token {tokens.max()}",
                    allowed=f"below {tokenizer.vocab_size}, the vocabulary of {args.tokenizer}",
                    fix="--tokenizer",
                )
            size += int(lengths[tokens].sum())
            shards.append(Shard(path.name, len(tokens), sha256_of(path)))
        made[name] = Split(sum(s.tokens for s in shards), size, shards)
    write_manifest(folder, Manifest(tokenizer.name, tokenizer.vocab_size, made, ADOPTED))
    report(folder, "adopted")


def named(corpus: str, tokenizer: str, default: str) -> str:
    return corpus if tokenizer == default else f"{corpus}-{tokenizer}"


def make_tokenizer(name: str, splits: Splits) -> Tokenizer:
    if name == "chars":
        return Characters(
            "".join(
                sorted(
                    set().union("\n", *(set(d) for documents in splits.values() for d in documents))
                )
            )
        )
    return get_tokenizer(name)


def read_bytes(path: Path) -> bytes:
    if not path.is_file():
        fix = "its path, from the folder that the command runs in"
        raise DataError(str(path), got="no such file", allowed="a text file that exists", fix=fix)
    return path.read_bytes()


def read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        fix = f"iconv -f latin1 -t utf8 {path}, if that is its encoding"
        raise DataError(str(path), got=error, allowed="UTF-8 text", fix=fix) from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="CORPUS")

    def command(
        run: Any, default_tokenizer: str, tokenizers: Iterable[str] = NAMES
    ) -> argparse.ArgumentParser:
        about = run.__doc__.replace("%", "%%")  # argparse formats it
        sub = commands.add_parser(run.__name__, help=about, description=about)
        sub.set_defaults(run=run)
        sub.add_argument("--tokenizer", choices=tuple(tokenizers), default=default_tokenizer)
        if run is not adopt:
            sub.add_argument(
                "--out", type=Path, help="the dataset's folder (default: under corpora/)"
            )
            sub.add_argument(
                "--replace", action="store_true", help="replace a dataset of another source there"
            )
        return sub

    command(pysource, "bytes")
    sub = command(text, "bytes")
    sub.add_argument("files", nargs="+", type=Path, metavar="FILE")
    sub.add_argument(
        "--val", nargs="+", type=Path, default=[], metavar="FILE", help="validation files"
    )
    sub.add_argument("--separator", help=r"text between documents, for instance '\n\x1e\n'")
    command(shakespeare, "chars").add_argument(
        "--file", type=Path, help="a local copy, instead of the download"
    )
    sub = command(hub, "gpt2", ("bytes", "gpt2"))
    sub.add_argument("name", help="for instance HuggingFaceFW/fineweb, or json")
    sub.add_argument("--config", help="for instance sample-10BT")
    sub.add_argument("--split", default="train")
    sub.add_argument(
        "--files",
        nargs="+",
        default=[],
        help="data files, where NAME is json, text, csv or parquet",
    )
    sub.add_argument("--column", default="text")
    sub.add_argument("--revision")
    sub.add_argument("--tokens", type=int, help="stop after so many training tokens")
    sub.add_argument(
        "--val-tokens",
        type=int,
        default=10_485_760,
        help="the first documents, up to so many tokens, validate",
    )
    sub = command(adopt, "gpt2", ("bytes", "gpt2"))
    sub.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        refusal = DataError(
            str(error.filename),
            got=error.strerror,
            allowed="a place that can be read and written",
            fix="--out FOLDER",
        )
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
