"""The settings for people: what --help shows, and docs/settings.md.

python -m training.help > docs/settings.md
"""

import inspect
import json
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import field, fields, is_dataclass, make_dataclass
from functools import partial
from typing import Annotated, Any, get_type_hints

import tyro

from optim.settings import OneOf, Range, allowed, help_texts, hints_of


def described(config: Any) -> type:
    """Return a class like that of `config` for tyro, with its values, help texts and ranges."""
    cls = type(config)
    plain, texts = get_type_hints(cls), texts_of(cls)
    rows: list[tuple[str, Any, Any]] = []
    for f in fields(cls):
        value = getattr(config, f.name)
        if is_dataclass(value):
            section = described(value)
            rows.append((f.name, section, field(default_factory=section)))
        else:
            arg = tyro.conf.arg(help=texts[f.name])
            default = field(default_factory=partial(deepcopy, value))  # a list must be a factory's
            rows.append((f.name, Annotated[plain[f.name], arg], default))
    return make_dataclass(cls.__name__, rows, namespace={"__doc__": cls.__doc__})


def texts_of(cls: type) -> dict[str, str]:
    """Return {setting: its help text in one line, with what the type does not say of its range}."""
    texts: dict[str, str] = {}
    for key, hint in hints_of(cls).items():
        text = " ".join(help_texts(cls).get(key, "").split())
        texts[key] = f"{text} Allowed: {allowed(hint)}." if _is_marked(hint) else text
    return texts


def _is_marked(hint: Any) -> bool:
    """Return whether a hint has a range or a registry."""
    marks = getattr(hint, "__metadata__", ())
    inner = (a for a in getattr(hint, "__args__", ()) if not isinstance(a, str))
    return any(isinstance(m, Range | OneOf) for m in marks) or any(map(_is_marked, inner))


def page(config: Any) -> str:
    """Return docs/settings.md: a table for each section, in the order of a configuration file."""
    head = (
        "# Settings\n\nEvery key of a configuration file, and as `--section.key VALUE` an option of"
        " `train_gpt.py`. Written by `python -m training.help`; do not edit.\n"
    )
    return "\n".join([head, *_tables(config, "")])


def _tables(config: Any, prefix: str) -> Iterator[str]:
    cls = type(config)
    nested = {f.name: v for f in fields(cls) if is_dataclass(v := getattr(config, f.name))}
    rows = []
    for key, hint in hints_of(cls).items():
        if key not in nested:
            text = " ".join(help_texts(cls).get(key, "").split())
            value = getattr(config, key)
            default = "left out" if value is None else f"`{json.dumps(value)}`"
            cells = (f"`{key}`", allowed(hint), default, text)
            rows.append(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |")
    if prefix:
        paragraphs = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
        yield "\n\n".join([f"## [{prefix}]", *(" ".join(p.split()) for p in paragraphs)]) + "\n"
    if rows:
        yield "\n".join(["| key | allowed | default | |", "|---|---|---|---|", *rows, ""])
    seen: dict[type, str] = {}
    for name, section in nested.items():
        path = f"{prefix}.{name}" if prefix else name
        if type(section) in seen:
            yield f"## [{path}]\n\nAs [{seen[type(section)]}].\n"
        else:
            yield from _tables(section, path)
        seen.setdefault(type(section), path)


if __name__ == "__main__":
    from training.config import Config

    sys.stdout.write(page(Config()))
