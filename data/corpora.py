"""Corpora: where texts come from, and how they are split. Each recipe is a command of data.prepare.

To add a corpus, add a recipe: a function that reads the texts, splits them, and writes a dataset.
"""

import hashlib
import importlib.metadata
import re
import urllib.request
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .shards import (
    META,
    DataError,
    Manifest,
    Shard,
    Split,
    read_manifest,
    read_shard,
    sha256_of,
    write_manifest,
)
from .tokenizer import TOKENIZERS, Tokenizer, get_tokenizer, tokenizer_class
from .writer import Splits, is_prepared, report, write_dataset, write_stream

CORPORA = Path("corpora")
# Pure Python, pinned in requirements.txt, needed by torch itself.
PACKAGES = ("mpmath", "networkx", "sympy")
VALIDATION = 50  # one file in so many, by the hash of its name
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

ADOPTED = {"kind": "adopted"}

Option = tuple[tuple[str, ...], dict[str, Any]]  # the arguments of argparse's add_argument()


def option(*names: str, **settings: Any) -> Option:
    """Return an option of a command, in the words of argparse's add_argument()."""
    return names, settings


PLACE = (
    option("--out", type=Path, help="the dataset's folder (default: under corpora/)"),
    option("--replace", action="store_true", help="replace a dataset of another source there"),
)


@dataclass(frozen=True)
class Recipe:
    """How a corpus is prepared: the function that does it, and its command's options."""

    prepare: Callable[[Namespace], None]
    """Its docstring is the command's help."""

    tokenizer: str
    """The default of --tokenizer."""

    streams: bool
    """The text is not read as a whole first: --tokenizer takes those of a fixed vocabulary."""

    options: tuple[Option, ...]
    """All other options."""

    @property
    def tokenizers(self) -> list[str]:
        """Return the names that --tokenizer takes."""
        return [name for name, cls in TOKENIZERS.items() if cls.fixed or not self.streams]


RECIPES: dict[str, Recipe] = {}  # by command


def recipe(
    command: str, *options: Option, tokenizer: str, streams: bool = False
) -> Callable[[Callable[[Namespace], None]], Callable[[Namespace], None]]:
    """Make a function the recipe of a command of data.prepare."""

    def register(prepare: Callable[[Namespace], None]) -> Callable[[Namespace], None]:
        RECIPES[command] = Recipe(prepare, tokenizer, streams, options)
        return prepare

    return register


def folder_of(args: Namespace, corpus: str, *, plain: str = "") -> Path:
    """Return --out or, by default, a folder named after the corpus and the tokenizer.

    plain: the tokenizer that the name leaves out.
    """
    name = corpus if args.tokenizer == plain else f"{corpus}-{args.tokenizer}"
    return args.out or CORPORA / name


def write(args: Namespace, folder: Path, source: dict[str, Any], splits: Splits) -> None:
    """Write texts that are all in memory as a dataset, with the tokenizer that was asked for."""
    documents = chain.from_iterable(splits.values())
    tokenizer = tokenizer_class(args.tokenizer).of_texts(documents)
    write_dataset(folder, source, tokenizer, splits, overwrite=args.replace)


# ---- splits


def hash_split(texts_by_name: Iterable[tuple[str, str]]) -> Splits:
    """Split (name, text) pairs by the sha256 of the name: one name in VALIDATION validates."""
    splits: Splits = {"train": [], "val": []}
    for name, text in texts_by_name:
        validates = int(hashlib.sha256(name.encode()).hexdigest(), 16) % VALIDATION == 0
        splits["val" if validates else "train"].append(text)
    return splits


def end_split(texts: Iterable[str]) -> Splits:
    """Split each text: its first 90% of characters train, as in nanoGPT, and the rest validates."""
    cuts = [(text, int(0.9 * len(text))) for text in texts]
    return {"train": [t[:cut] for t, cut in cuts], "val": [t[cut:] for t, cut in cuts]}


def corpus_hash(splits: Splits) -> str:
    """Return the sha256 over every split's name and its documents' hashes, in order."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        digest.update(f"{name} {len(splits[name])}".encode())
        for text in splits[name]:
            digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


# ---- pysource: the embedded corpus


@recipe("pysource", *PLACE, tokenizer="bytes")
def prepare_pysource(args: Namespace) -> None:
    """Prepare the embedded corpus: the Python sources of packages that this project needs anyway.

    It needs no network.
    """
    splits = hash_split(chain.from_iterable(map(package_sources, PACKAGES)))
    versions = {p: importlib.metadata.version(p) for p in PACKAGES}
    source = {"kind": "pysource", "packages": versions, "corpus_sha256": corpus_hash(splits)}
    write(args, folder_of(args, "pysource", plain="bytes"), source, splits)


def package_sources(package: str) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of a package's Python files, in a fixed order."""
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
        path = Path(str(file.locate()))
        yield file.as_posix(), path.read_text(encoding="utf-8", errors="replace")


# ---- text: files of one's own


@recipe(
    "text",
    *PLACE,
    option("files", nargs="+", type=Path, metavar="FILE"),
    option("--val", nargs="+", type=Path, default=[], metavar="FILE", help="validation files"),
    option("--separator", help=r"text between documents, for instance '\n\x1e\n'"),
    tokenizer="bytes",
)
def prepare_text(args: Namespace) -> None:
    """Prepare your own UTF-8 text files: each file a document, or many with --separator.

    Without --val, the last 10% of each file validates.
    """
    files = [(str(f), read_text(f)) for f in args.files]
    cut = partial(documents_of, separator=unescape(args.separator) if args.separator else None)
    if args.val:
        splits = {
            "train": [document for _, text in files for document in cut(text)],
            "val": [document for f in args.val for document in cut(read_text(f))],
        }
    elif args.separator:
        splits = hash_split(
            (f"{name}:{i}", document)
            for name, text in files
            for i, document in enumerate(cut(text))
        )
    else:
        splits = end_split(text for _, text in files)
    source = {
        "kind": "text",
        "files": [f.name for f in [*args.files, *args.val]],
        "corpus_sha256": corpus_hash(splits),
    }
    write(args, folder_of(args, args.files[0].name.split(".")[0]), source, splits)


def documents_of(text: str, *, separator: str | None) -> list[str]:
    """Return a file's documents: all of it or, with a separator, the parts that are not empty."""
    return [d for d in text.split(separator) if d] if separator else [text]


def unescape(separator: str) -> str:
    r"""Return the text that \n, \x1e and the like stand for, as a shell passes them."""
    try:
        return separator.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise DataError(
            "--separator",
            got=f"{separator!r} ({error.reason})",
            allowed="text with Python's escapes",
            fix=r"for instance '\n\x1e\n'",
        ) from error


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes. Raises DataError if it does not exist."""
    if not path.is_file():
        fix = "its path, from the folder that the command runs in"
        raise DataError(str(path), got="no such file", allowed="a text file that exists", fix=fix)
    return path.read_bytes()


def read_text(path: Path) -> str:
    """Return a file's text. Raises DataError if it is not UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        fix = f"iconv -f latin1 -t utf8 {path}, if that is its encoding"
        raise DataError(str(path), got=error, allowed="UTF-8 text", fix=fix) from error


# ---- shakespeare


@recipe(
    "shakespeare",
    *PLACE,
    option("--file", type=Path, help="a local copy, instead of the download"),
    tokenizer="chars",
)
def prepare_shakespeare(args: Namespace) -> None:
    """Prepare Tiny Shakespeare, split as nanoGPT does: the first 90% of the characters train."""
    out = folder_of(args, "shakespeare", plain="chars")
    source = {"kind": "shakespeare", "sha256": SHAKESPEARE_SHA256}
    if not args.file and is_prepared(out, source, args.tokenizer, overwrite=args.replace):
        return
    content = read_bytes(args.file) if args.file else download_shakespeare()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise DataError(
            "Tiny Shakespeare: another file",
            got=f"sha256 {digest}",
            allowed=SHAKESPEARE_SHA256,
            fix="for a text of your own, python -m data.prepare text FILE --tokenizer chars",
        )
    write(args, out, source, end_split([content.decode()]))


def download_shakespeare() -> bytes:
    """Return Tiny Shakespeare from the network. Raises DataError if that fails."""
    print(f"downloading {SHAKESPEARE_URL}")
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=60) as response:
            return response.read()
    except OSError as error:
        raise DataError(
            "Tiny Shakespeare",
            got=error,
            allowed="a network, or a local copy",
            fix="python -m data.prepare shakespeare --file input.txt",
        ) from error


# ---- hub: whatever the library `datasets` loads


@recipe(
    "hub",
    *PLACE,
    option("name", help="for instance HuggingFaceFW/fineweb, or json"),
    option("--config", help="for instance sample-10BT"),
    option("--split", default="train"),
    option("--files", nargs="+", default=[], help="data files; NAME is then their format"),
    option("--column", default="text"),
    option("--revision"),
    option("--tokens", type=int, help="stop after so many training tokens"),
    option(
        "--val-tokens",
        type=int,
        default=10_485_760,
        help="the first documents, up to so many tokens, validate",
    ),
    tokenizer="gpt2",
    streams=True,
)
def prepare_hub(args: Namespace) -> None:
    """Prepare a dataset that the library `datasets` loads: it streams, and may exceed the memory.

    NAME is a name on the Hugging Face hub or, with --files, json, text, csv or parquet.
    """
    load_dataset = dataset_loader()
    out = folder_of(args, args.name.split("/")[-1].lower())
    keys = ("name", "config", "split", "column", "revision", "tokens", "val_tokens")
    files = {str(f): sha256_of(Path(f)) if Path(f).is_file() else None for f in args.files}
    source = {"kind": "hub", **{k: getattr(args, k) for k in keys}, "files": files}
    if is_prepared(out, source, args.tokenizer, overwrite=args.replace):
        return
    tokenizer = get_tokenizer(args.tokenizer)
    try:
        rows = load_dataset(
            args.name,
            args.config,
            split=args.split,
            data_files=args.files or None,
            revision=args.revision,
            streaming=True,
        )
        texts = texts_of(iter(rows), args.column)
    except (OSError, ValueError) as error:
        raise DataError(
            f"hub: {args.name}",
            got=error,
            allowed="a dataset that the datasets library loads",
            fix="the name, --config, --split or --files",
        ) from error
    limits = {"val": args.val_tokens, "train": args.tokens}
    write_stream(out, source, tokenizer, texts, limits)


def dataset_loader() -> Callable[..., Iterable[dict[str, Any]]]:
    """Return datasets.load_dataset. Raises DataError if that library is not installed."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise DataError(
            "hub",
            got="no package datasets, which training does not need",
            allowed="an environment that has it",
            fix="pip install datasets, in the version of requirements-dev.txt",
        ) from error
    return load_dataset


def texts_of(rows: Iterator[dict[str, Any]], column: str) -> Iterator[str]:
    """Yield what a column holds, without empty texts. Raises DataError for what is no text."""
    while (row := next_row(rows)) is not None:
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
        yield row[column]


def next_row(rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the next row, None after the last. Raises DataError for one that cannot be read."""
    try:
        return next(rows, None)
    except (OSError, ValueError) as error:
        raise DataError(
            "hub",
            got=error,
            allowed="rows that the datasets library reads",
            fix="mend the data, or leave that file out of --files",
        ) from error


# ---- adopt: shards that another program made


@recipe("adopt", option("folder", type=Path), tokenizer="gpt2", streams=True)
def adopt(args: Namespace) -> None:
    """Write a manifest for shards that llm.c or modded-nanogpt made, in their own folder.

    Its files are named train_….bin or …_train_….bin, and so for val.
    """
    folder: Path = args.folder
    tokenizer = get_tokenizer(args.tokenizer)
    try:
        prepared_here = (folder / META).is_file() and read_manifest(folder).source != ADOPTED
    except DataError:
        prepared_here = False  # damaged, and written anew below
    if prepared_here:
        raise DataError(
            str(folder),
            got="a dataset that was prepared here",
            allowed="shards of another program",
            fix="nothing to adopt, train on it",
        )
    splits = {name: adopted_split(folder, name, tokenizer) for name in ("train", "val")}
    write_manifest(folder, Manifest(tokenizer.name, tokenizer.vocab_size, splits, ADOPTED))
    report(folder, "adopted")


def adopted_split(folder: Path, name: str, tokenizer: Tokenizer) -> Split:
    """Return the shards of a split, measured. Raises DataError for none, and for unknown tokens."""
    paths = sorted(p for p in folder.glob("*.bin") if re.search(rf"(^|_){name}(_|\.)", p.name))
    if not paths:
        raise DataError(
            str(folder),
            got=f"no file named {name}_….bin or …_{name}_….bin",
            allowed="a folder with train and val shards",
            fix="python -m data.prepare adopt FOLDER",
        )
    size, shards, byte_lengths = 0, [], tokenizer.byte_lengths()
    for path in tqdm(paths, desc=f"adopt {name}", unit="shard", disable=None):
        tokens = read_shard(path)
        if len(tokens) and int(tokens.max()) >= tokenizer.vocab_size:
            raise DataError(
                str(path),
                got=f"token {tokens.max()}",
                allowed=f"below {tokenizer.vocab_size}, the vocabulary of {tokenizer.name}",
                fix="--tokenizer",
            )
        size += int(byte_lengths[tokens].sum())
        shards.append(Shard(path.name, len(tokens), sha256_of(path)))
    return Split(sum(s.tokens for s in shards), size, shards)
