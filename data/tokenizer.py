"""Tokenizers: bytes, characters, GPT-2.

To add one, decorate its class with register_tokenizer, here or in a plugin (docs/extend.md).
vocab_size is the tokenizer's own; padding it (50304) is the model's option.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Self, TypeVar

import numpy as np

from optim.errors import require
from optim.plugins import require_free

from .shards import DataError, Manifest


class Tokenizer:
    """From text to tokens and back."""

    name: str
    vocab_size: int

    separator: int
    """The token between documents."""

    separator_first = False
    """The separator stands before the first document, too."""

    fixed = True
    """The vocabulary is the same for every text."""

    characters: str | None = None
    """A vocabulary that is taken from the text: a dataset and a checkpoint keep it."""

    def __init__(self, characters: str | None = None) -> None:
        self.characters = characters

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> Self:
        """Return the tokenizer with the vocabulary of these texts."""
        return cls()

    def encode(self, text: str) -> np.ndarray:
        """Return a text's tokens (n,) uint16."""
        raise NotImplementedError

    def decode(self, tokens: list[int]) -> str:
        """Return the text that tokens stand for."""
        raise NotImplementedError

    def encode_prompt(self, text: str, *, option: str) -> list[int]:
        """Return a prompt's tokens, at least one. Raises DataError that names its option."""
        try:
            tokens = self.encode(text)
        except DataError as error:
            raise DataError(
                option,
                got=f"{text!r} ({error.what}: {error.got})",
                allowed=f"the characters {error.allowed}",
                fix="another prompt",
            ) from error
        check_outputs(self, tokens)
        if not len(tokens):
            raise DataError(
                option, got="no tokens", allowed="at least one character", fix="another prompt"
            )
        return tokens.tolist()

    def byte_lengths(self) -> np.ndarray:
        """Return the bytes of text that each token stands for (vocab_size,)."""
        raise NotImplementedError


def check_outputs(tokenizer: Tokenizer, tokens: np.ndarray) -> None:
    """Raise DataError for the first method that returns what it should not.

    tokens: what encode returned of a text, which are decoded too.
    """
    size = tokenizer.vocab_size
    _check_integers(tokenizer, "encode", tokens, "(n,)", np.ndim(tokens) == 1)
    require(
        not len(tokens) or (tokens.min() >= 0 and tokens.max() < size),
        f"encode of the tokenizer {tokenizer.name}",
        got=f"tokens from {min(tokens, default=0)} to {max(tokens, default=0)}",
        allowed=f"0 to {size - 1}, as vocab_size is {size}",
        fix="another vocab_size",
        error=DataError,
    )
    lengths = tokenizer.byte_lengths()
    _check_integers(tokenizer, "byte_lengths", lengths, f"({size},)", np.shape(lengths) == (size,))
    text = tokenizer.decode(tokens.tolist())
    require(
        isinstance(text, str),
        f"decode of the tokenizer {tokenizer.name}",
        got=type(text).__name__,
        allowed="str",
        fix='.decode(errors="replace")' if isinstance(text, bytes) else "return a str",
        error=DataError,
    )


def _check_integers(
    tokenizer: Tokenizer, method: str, output: object, shape: str, fits: bool
) -> None:
    """Raise DataError unless a method returned an array of integers whose shape fits."""
    array = isinstance(output, np.ndarray)
    require(
        array and fits and np.issubdtype(output.dtype, np.integer),
        f"{method} of the tokenizer {tokenizer.name}",
        got=f"an array {output.shape} {output.dtype}" if array else type(output).__name__,
        allowed=f"a NumPy array {shape} of integers",
        fix="return np.array(…, dtype=np.uint16)" if method == "encode" else "dtype=np.int64",
        error=DataError,
    )


TOKENIZERS: dict[str, type[Tokenizer]] = {}
LARGEST = 2**16  # shards hold 16 bits a token
NAMED = "a name of letters, digits, '_' and '-'"
T = TypeVar("T", bound=type[Tokenizer])


def register_tokenizer(cls: T) -> T:
    """Make a subclass of Tokenizer known by its `name`, so that datasets can name it.

    Raises Refusal for a class without a name of its own or of too large a vocabulary.
    """
    name = getattr(cls, "name", None)
    size = getattr(cls, "vocab_size", None)
    for fine, got, allowed in (
        (issubclass(cls, Tokenizer), cls.__name__, "a subclass of Tokenizer"),
        (isinstance(name, str) and re.fullmatch(r"\w[\w-]*", name), f"name = {name!r}", NAMED),
        (
            not isinstance(size, int) or 2 <= size <= LARGEST,
            f"vocab_size = {size!r}",
            f"2 to {LARGEST:,} tokens, as shards hold 16 bits a token",
        ),
    ):
        require(fine, f"register_tokenizer: {cls.__name__}", got=got, allowed=allowed)
    require_free("register_tokenizer", cls.name, cls, TOKENIZERS.get(cls.name))
    TOKENIZERS[cls.name] = cls
    return cls


@register_tokenizer
class Bytes(Tokenizer):
    """UTF-8 bytes. Documents are separated by a NUL byte, which counts as a byte of text."""

    name, vocab_size, separator = "bytes", 256, 0

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        return np.ones(256, dtype=np.int64)


@register_tokenizer
class Characters(Tokenizer):
    """One token a character of the text, numbered in code point order.

    Documents are separated by a newline, where the text has one.
    """

    name, fixed = "chars", False

    def __init__(self, characters: str | None = None) -> None:
        if not characters or "".join(sorted(set(characters))) != characters:
            raise DataError(
                "characters",
                got=repr(characters or ""),
                allowed="distinct, in code point order, at least one",
                fix='"".join(sorted(set(text)))',
            )
        self.characters, self.vocab_size = characters, len(characters)
        self.separator = max(0, characters.find("\n"))
        self._codes = np.array([ord(c) for c in characters], dtype="<u4")

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> Self:
        return cls("".join(sorted(set().union("\n", *map(set, texts)))))

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        tokens = np.searchsorted(self._codes, codes).clip(max=self.vocab_size - 1)
        unknown = self._codes[tokens] != codes
        if unknown.any():
            raise DataError(
                "a character that is not in the vocabulary",
                got=repr(chr(codes[unknown][0])),
                allowed=repr(self.characters),
                fix="another text, or the tokenizer bytes",
            )
        return tokens.astype(np.uint16)

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.characters[t] for t in tokens)  # type: ignore[index]

    def byte_lengths(self) -> np.ndarray:
        return np.array([len(c.encode()) for c in self.characters or ""], dtype=np.int64)


@register_tokenizer
class GPT2(Tokenizer):
    """GPT-2's byte pairs, by tiktoken, which fetches its two vocabulary files once.

    TIKTOKEN_CACHE_DIR keeps them. <|endoftext|> stands before every document, as in llm.c and
    modded-nanogpt.
    """

    name, vocab_size, separator, separator_first = "gpt2", 50257, 50256, True

    @cached_property
    def _encoding(self):  # noqa: ANN202 - tiktoken.Encoding, imported only where it is used
        import tiktoken

        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever its HTTP client raises
            raise DataError(
                "GPT-2's vocabulary files",
                got=type(error).__name__,
                allowed="a network, or tiktoken's two files in TIKTOKEN_CACHE_DIR",
                fix="set TIKTOKEN_CACHE_DIR to a folder that holds them",
            ) from error

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint16)

    def decode(self, tokens: list[int]) -> str:
        return self._encoding.decode(tokens)

    def byte_lengths(self) -> np.ndarray:
        """Return the bytes of each token: 0 of the separator, which stands for no text."""
        return np.array(
            [
                len(self._encoding.decode_single_token_bytes(t)) if t != self.separator else 0
                for t in range(self.vocab_size)
            ],
            dtype=np.int64,
        )


def tokenizer_class(name: str) -> type[Tokenizer]:
    """Return the class of this name. Raises DataError for an unknown name."""
    if name not in TOKENIZERS:
        raise DataError(
            "tokenizer",
            got=repr(name),
            allowed=", ".join(TOKENIZERS),
            fix="one of those, or the plugin that registers it in run.plugins (--plugin)",
        )
    return TOKENIZERS[name]


def get_tokenizer(name: str, characters: str | None = None) -> Tokenizer:
    """Return a tokenizer by name. characters: its vocabulary, if that was taken from a text."""
    cls = tokenizer_class(name)
    return cls() if characters is None else cls(characters)


def tokenizer_of(manifest: Manifest) -> Tokenizer:
    """Return a dataset's tokenizer."""
    return get_tokenizer(manifest.tokenizer, manifest.characters)
