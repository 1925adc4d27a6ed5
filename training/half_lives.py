"""The decays beta and beta2 by their half-lives in tokens, in a configuration.

optim.beta_half_life gives optim.beta, and optim.roles.<role>.beta_half_life that of a role; beta2
likewise. A configuration that is read has both: the half-life, and the decay that it gives at its
tokens a step. A file that is written has the decay as a comment alone, so that it can be read with
another batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any

from optim.errors import require
from optim.schedules import half_life

from .errors import ConfigError
from .sections import check_ranges, flat

if TYPE_CHECKING:
    from .config import Config

SUFFIX = "_half_life"


def half_lives(config: Config) -> dict[str, float]:
    """Return {"optim.beta": its half-life in tokens} of the decays that half-lives give."""
    return {
        key.removesuffix(SUFFIX): value
        for key, value in flat(config.optim, "optim.").items()
        if key.endswith(SUFFIX) and value is not None
    }


def set_decays(config: Config, raw: dict[str, Any]) -> None:
    """Set the decays that half-lives give. raw: the nested dicts that the configuration is made of.

    Raises ConfigError for a decay that stands there beside its half-life and is another one.
    """
    lives, tokens = half_lives(config), tokens_of_step(config)
    if lives:
        check_ranges(config)  # before its numbers are computed with
    for key, life in lives.items():
        *path, name = key.split(".")
        decay, stated = half_life(life, per_step=tokens), _section(raw, path).get(name)
        require(
            stated is None or math.isclose(stated, decay, rel_tol=1e-9),
            key,
            got=f"{stated} beside {key}{SUFFIX} = {life:g}",
            allowed=f"one of the two; the half-life gives {decay:g} at {tokens} tokens a step",
            fix="leave one out",
            error=ConfigError,
        )
        setattr(reduce(getattr, path, config), name, decay)


def tokens_of_step(config: Config) -> int:
    """Return the tokens of one step, over all micro-batches and processes."""
    return config.train.batch_size * config.model.block_size


def displaced(changes: Mapping[str, Any]) -> set[str]:
    """Return the settings whose place these take: a decay's half-life, and a half-life's decay."""
    keys = [key for key, value in changes.items() if value is not None]
    others = {k.removesuffix(SUFFIX) if k.endswith(SUFFIX) else k + SUFFIX for k in keys}
    return others - changes.keys()


def drop(raw: dict[str, Any], keys: Iterable[str]) -> None:
    """Take settings, "section.key", out of nested dicts, where they are in them."""
    for key in keys:
        *path, name = key.split(".")
        _section(raw, path).pop(name, None)


def decays_in_words(config: Config) -> list[str]:
    """Return a line for each decay that a half-life gives."""
    tokens = tokens_of_step(config)
    return [
        f"{key} = {reduce(getattr, key.split('.'), config):.6g}"
        f" (half-life: {life:,.0f} tokens, {tokens:,} a step)"
        for key, life in half_lives(config).items()
    ]


def _section(raw: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """Return the section of nested dicts at a path; an empty one where there is none."""
    return reduce(lambda section, key: section.get(key, {}), path, raw)
