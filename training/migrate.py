"""Configurations of earlier versions, read with today's keys: the one place that knows old keys.

Files are always read: a run folder's config.toml, a checkpoint, a record, a result, a file that
somebody wrote. train_gpt.py and the studies say which old key was read as which new one. On the
command line an old key is refused, and the message names the new one.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from models import settings_of_others
from optim.baselines import BASELINES

from .errors import ConfigError

RENAMED = {
    "optim.schedule": "schedule.shape",
    "optim.warmup": "schedule.warmup",
    "optim.cooldown": "schedule.cooldown",
    "optim.cooldown_power": "schedule.power",
    "optim.beta_low": "schedule.beta_low",
    "optim.beta_warmup": "schedule.beta_warmup",
    "optim.beta_cooldown": "schedule.beta_cooldown",
    "optim.auto_initial": "optim.auto.initial",
    "optim.auto_factor": "optim.auto.factor",
    "optim.auxiliary_lr": "baseline.auxiliary_lr",
    "optim.scaling": "baseline.scaling",
}
# Keys of what was taken out (docs/log.md), with the value that did nothing. No other can be run.
DROPPED: dict[str, Any] = {
    "optim.floor": 0.0,  # the least ‖update‖ / ‖weight‖
    "model.key_shift": False,  # keys of attention from the position before
}
# Defaults of before, which stand in configurations of baselines too, though these do not take them.
EARLIER_DEFAULTS: dict[str, Any] = {"optim.direction": "nesterov"}


def migrate(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration with today's keys, and a line for each key that was renamed.

    raw: nested dicts, which stay as they are. What is no section stays too, for the reader to
    refuse.
    """
    migrated, notes = deepcopy(raw), []
    for old, nothing in DROPPED.items():
        section, name = _section(migrated, old)
        if section is None or name not in section:
            continue
        if (value := section.pop(name)) != nothing:
            raise ConfigError(
                old,
                got=repr(value),
                allowed=f"{nothing!r}, which did nothing: there is no such setting any more",
                fix="the commit that made it, which a run's summary.json names",
            )
        notes.append(f"{old} = {nothing!r}, which did nothing, is left out")
    for old, new in RENAMED.items():
        section, name = _section(migrated, old)
        target, key = _section(migrated, new, make=section is not None and name in section)
        if section is None or target is None or name not in section:
            continue
        if key in target:
            raise ConfigError(
                old,
                got=f"{section[name]!r}, beside {new} = {target[key]!r}",
                allowed=f"{new} alone",
                fix=f"leave {old} out",
            )
        target[key] = section.pop(name)
        notes.append(f"{old} is {new}")
    notes += _leave_out_untaken(migrated)
    model = migrated.get("model")
    if isinstance(model, dict) and (name := _model_name(model)):
        migrated["model"] = {**model, "name": name}
        notes.append(f'model.name is "{name}", by the other settings of the model')
    return migrated, notes


def _leave_out_untaken(raw: dict[str, Any]) -> list[str]:
    """Drop earlier defaults of settings that a configuration's baseline does not take, so that it
    is equal to one of now. Return a line for each."""
    notes, baseline = [], BASELINES.get(_name_of_optimizer(raw))
    for key, default in EARLIER_DEFAULTS.items():
        section, name = _section(raw, key)
        if baseline and section and name not in baseline.hints and section.get(name) == default:
            del section[name]
            notes.append(f"{key} = {default!r}, which {baseline.name} does not take, is left out")
    return notes


def _name_of_optimizer(raw: Mapping[str, Any]) -> str:
    """Return optim.name, "" where it is not stated."""
    optim = raw.get("optim")
    name = optim.get("name") if isinstance(optim, dict) else None
    return name if isinstance(name, str) else ""


def _section(
    raw: dict[str, Any], key: str, *, make: bool = False
) -> tuple[dict[str, Any] | None, str]:
    """Return the dict that a dotted key stands in, None where there is none, and its last name."""
    *sections, name = key.split(".")
    table: Any = raw
    for section in sections:
        table = table.setdefault(section, {}) if make else table.get(section)
        if not isinstance(table, dict):
            return None, name
    return table, name


def _model_name(model: Mapping[str, Any]) -> str | None:
    """Return the name of the model that settings of an earlier version are of, None where they say.

    Before model.name there was one model, with n-grams or without. Until "track3" had a name, its
    settings were those of "gpt".
    """
    others = {
        f.name for f in settings_of_others("gpt") if model.get(f.name, f.default) != f.default
    }
    of_track3 = others - {f.name for f in settings_of_others("track3")}
    if "name" not in model and others != of_track3:
        return "ngram"
    return "track3" if of_track3 and model.get("name", "gpt") == "gpt" else None
