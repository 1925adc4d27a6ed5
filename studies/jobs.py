"""A training that a study wants, and when a training that was done is the one that is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optim import plugins
from optim.errors import Refusal
from training import config as configuration
from training.config import Config

# Values that train_gpt.py replaces by what it chose.
FILLED_IN = {
    "run.device": "auto",
    "run.precision": "auto",
    "model.vocab_size": None,
    "optim.polar.dtype": "auto",
}
# Keys that do not change the numbers which a study reads. run.threads does change them: sums in
# another order make another run (docs/log.md).
NEUTRAL = (
    "run.name",
    "run.dir",
    "run.resume",
    "run.timeout",
    "data.verify",
    "train.log_every",
    "train.telemetry_every",
    "train.pictures",
    "train.keep_checkpoints",
    "train.sample_",
)


class StudyError(Refusal):
    """A study that cannot continue: what was got, what is allowed, how to fix it."""


@dataclass(frozen=True)
class Job:
    """A training that is wanted: its name, which is its run folder's, and its configuration."""

    name: str
    config: Config


def from_flat(values: Mapping[str, Any]) -> Config:
    """Return the configuration of {"section.key": value}; None leaves a default."""
    raw: dict[str, Any] = {}
    for key, value in values.items():
        if value is not None:
            configuration.put(raw, key, value)
    return configuration.from_dict(Config, raw)


def difference(wanted: Mapping[str, Any], trained: Mapping[str, Any]) -> str | None:
    """Return the first key in which a wanted training differs from one that was done.

    Keys that do not change its numbers are left aside, and what is wanted as "auto" is whatever
    was chosen.
    """
    for key, value in wanted.items():
        if (
            value != trained[key]
            and not key.startswith(NEUTRAL)
            and (key not in FILLED_IN or value != FILLED_IN[key])
        ):
            return key
    return None


def changed_plugin(wanted: Config, result: Mapping[str, Any]) -> str | None:
    """Return the first plugin whose file is not the one that a run had, by the run's result."""
    before = result.get("plugins", {})
    digests = plugins.digests(wanted.run.plugins)
    return next(
        (name for name in digests if before.get(name, digests[name]) != digests[name]), None
    )
