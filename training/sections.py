"""Sections of settings, dataclasses in dataclasses, as nested dicts, TOML and options, and back.

Every key, type and range is checked against the declarations (optim/settings.py); pydantic turns
text and TOML into types. Nothing that is read is executed.
"""

import json
import re
from collections.abc import Container, Iterator
from dataclasses import fields, is_dataclass
from itertools import takewhile
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from optim.errors import Refusal, nearest
from optim.settings import allowed, choices, defaults_of, hints_of, nearest_choice, wrong

from .errors import ConfigError
from .migrate import DROPPED, RENAMED
from .synonyms import SYNONYMS, key_meant

OPEN_SECTIONS = ("model.", "baseline.")  # to which plugins add settings
OF_PLUGIN = ", or name the plugin that has it in run.plugins"


def set_it(key: str) -> str:
    """Return how a user sets this key."""
    return f"set it in the file, or --{key.replace('_', '-')}"


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise ConfigError for the first value, in any section, that its declaration refuses."""
    for name, value, words in wrong(type(config), vars(config)):
        key = f"{prefix}{name}"
        hint = hints_of(type(config))[name]
        fix = nearest_choice(
            hint, value, otherwise=f"{set_it(key)}{OF_PLUGIN * bool(choices(hint))}"
        )
        raise ConfigError(key, got=repr(value), allowed=words, fix=fix)
    for f in fields(config):
        if is_dataclass(value := getattr(config, f.name)):
            check_ranges(value, f"{prefix}{f.name}.")


def from_dict(cls: type, raw: dict[str, Any], path: str = "") -> Any:
    """Return a dataclass made of nested dicts, every key and type checked."""
    hints, declared = get_type_hints(cls), hints_of(cls)
    values: dict[str, Any] = {}
    for key, value in raw.items():
        dotted = f"{path}{key}"
        if key not in hints:
            otherwise = f"leave it out{OF_PLUGIN * (path in OPEN_SECTIONS)}"
            fix = nearest(key, hints, otherwise=otherwise, prefix=path)
            if key in SYNONYMS and path.count(".") < 2:
                fix = f"it is {SYNONYMS[key]}"
            raise ConfigError(f"unknown key {dotted}", got=key, allowed=", ".join(hints), fix=fix)
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                fix = f"[{dotted}], with its keys below"
                raise ConfigError(dotted, got=repr(value), allowed="a section", fix=fix)
            values[key] = from_dict(hints[key], value, f"{dotted}.")  # type: ignore[arg-type]
            continue
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            fix = "write it so, or leave it out for the default"
            words = allowed(declared[key])
            raise ConfigError(dotted, got=repr(value), allowed=words, fix=fix) from error
    try:
        return cls(**values)
    except Refusal as error:  # of a section that checks itself: its own name before the setting's
        dotted = path + re.split(r"\W+", str(error.what))[-1]
        raise ConfigError(
            dotted, got=error.got, allowed=error.allowed, fix=set_it(dotted)
        ) from error


def put(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set raw["section"]["key"] to a value, for "section.key"; sections are made."""
    *sections, name = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
    raw[name] = value


def flat_hints(cls: type, prefix: str = "", *, extras: bool = False) -> dict[str, Any]:
    """Return {"section.key": type}. extras: with ranges and marks."""
    out: dict[str, Any] = {}
    for key, hint in get_type_hints(cls, include_extras=extras).items():
        if is_dataclass(hint):
            out |= flat_hints(hint, f"{prefix}{key}.", extras=extras)  # type: ignore[arg-type]
        else:
            out[f"{prefix}{key}"] = hint
    return out


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return {"section.key": value}."""
    out: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            out |= flat(value, f"{prefix}{f.name}.")
        else:
            out[f"{prefix}{f.name}"] = value
    return out


def to_toml(
    config: Any,
    prefix: str = "",
    *,
    leave_out: Container[str] = (),
    computed: Container[str] = (),
) -> str:
    """Return it as TOML, without keys that are None, lists that are empty by default, and empty
    sections.

    leave_out: further keys that are not written, as "section.key". computed: keys whose values
    others give; they are written as comments.
    """
    lines, tables, defaults = [], [], defaults_of(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            inner = f"{prefix}{f.name}."
            text = to_toml(value, inner, leave_out=leave_out, computed=computed)
            header = f"\n[{prefix}{f.name}]\n" if text and not text.startswith("[") else "\n"
            tables += [header + text] if text else []
        elif value is None or value == defaults.get(f.name) == []:
            continue
        elif (key := f"{prefix}{f.name}") not in leave_out:
            comment = "# " if key in computed else ""
            lines.append(f"{comment}{f.name} = {json.dumps(value, ensure_ascii=False)}\n")
    return "".join([*lines, *tables]).lstrip("\n")


# ---- options of the command line


def read_options(cls: type, options: list[str]) -> dict[str, Any]:
    """Return {"section.key": typed value} of ["--section.key", "value", …].

    --section.key=value does too; a switch may stand alone, or as --section.no-key.
    """
    hints, declared = flat_hints(cls), flat_hints(cls, extras=True)
    return {
        key: _typed(flag, value, hints[key], declared[key])
        for flag, key, value in _named(hints, list(options))
    }


def _named(hints: dict[str, Any], rest: list[str]) -> Iterator[tuple[str, str, str | bool]]:
    """Yield (flag, key, value) of each option; True and False are of switches that stand alone."""
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        section, _, name = key.rpartition(".")
        switch = f"{section}.{name.removeprefix('no_')}"
        if hints.get(switch) is bool and name.startswith("no_") and not equals:
            yield flag, switch, False
            continue
        if not flag.startswith("--") or key not in hints:
            raise ConfigError(
                f"unknown option {flag}",
                got=flag,
                allowed="--section.key, with the keys of the configuration file",
                fix=_nearest(key, hints),
            )
        if get_origin(hints[key]) is list and not equals:
            values = list(takewhile(lambda option: not option.startswith("--"), rest))
            del rest[: len(values)]
            yield flag, key, ",".join(values)
            continue
        alone = not equals and (not rest or rest[0].startswith("--"))
        if alone and bool in (hints[key], *get_args(hints[key])):
            yield flag, key, True
            continue
        if not equals:
            value = rest.pop(0) if rest else ""
        yield flag, key, value


def _nearest(key: str, hints: dict[str, Any]) -> str:
    if not DROPPED.keys().isdisjoint({key, key.replace(".no_", ".")}):
        return "leave it out: there is no such setting any more"
    if key in RENAMED:
        return f"it is --{RENAMED[key].replace('_', '-')} now"
    if meant := key_meant(key, hints):
        return f"it is --{meant.replace('_', '-')}"
    # Compared as keys are written, and told as options are.
    fix = nearest(key, hints, otherwise="--help lists them", prefix="--")
    return fix.replace("_", "-")


def _typed(flag: str, value: str | bool, hint: Any, declared: Any) -> Any:
    if isinstance(value, bool):
        return value
    if value == "None" and type(None) in get_args(hint):
        return None
    try:
        if get_origin(hint) is not list:
            return TypeAdapter(hint).validate_strings(value)
        if value.lstrip().startswith("["):
            return TypeAdapter(hint).validate_json(value, strict=True)
        item = TypeAdapter(get_args(hint)[0])
        return [item.validate_strings(x.strip()) for x in value.split(",") if x.strip()]
    except ValidationError as error:
        words = allowed(declared)
        raise ConfigError(flag, got=repr(value), allowed=words, fix=f"{flag} VALUE") from error
