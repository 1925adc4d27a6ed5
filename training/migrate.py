"""Configurations of earlier versions, read with the keys of now: the one place that knows old keys.

Files are always read: a run folder's config.toml, a checkpoint, a record, a result, and a file
that somebody wrote, of which train_gpt.py and the studies then say what was read as what. An
option of the command line is refused, with the key of now: nothing that is typed today has to be
old.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from models import settings_of_others
from optim.errors import Refusal


class ConfigError(Refusal):
    """A configuration that cannot be used: the key, what was got, what is allowed."""


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
# Keys of what was taken out (LOG.md), with the value that did nothing: other values cannot be run.
DROPPED: dict[str, Any] = {
    "optim.floor": 0.0,  # the least ‖update‖ / ‖weight‖
    "model.key_shift": False,  # keys of attention from the position before
}


def migrate(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration with the keys of now, and a line for each key that was another one.

    raw: nested dicts, which stay as they are. What is no section stays too, for the reader to
    refuse.
    """
    made, told = deepcopy(raw), []
    for old, nothing in DROPPED.items():
        section, name = _section(made, old)
        if section is None or name not in section:
            continue
        if (value := section.pop(name)) != nothing:
            raise ConfigError(
                old,
                got=repr(value),
                allowed=f"{nothing!r}, which did nothing: there is no such setting any more",
                fix="the commit that made it, which a run's summary.json names",
            )
        told.append(f"{old} = {nothing!r}, which did nothing, is left out")
    for old, new in RENAMED.items():
        section, name = _section(made, old)
        target, key = _section(made, new, make=section is not None and name in section)
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
        told.append(f"{old} is {new}")
    model = made.get("model")
    if isinstance(model, dict) and (name := _model_name(model)):
        made["model"] = {**model, "name": name}
        told.append(f'model.name is "{name}", by the other settings of the model')
    return made, told


def _section(
    raw: dict[str, Any], key: str, *, make: bool = False
) -> tuple[dict[str, Any] | None, str]:
    """Return the dict that a dotted key stands in, None where there is none, and its last name."""
    *sections, name = key.split(".")
    found: Any = raw
    for section in sections:
        found = found.setdefault(section, {}) if make else found.get(section)
        if not isinstance(found, dict):
            return None, name
    return found, name


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
