"""What a resumed run keeps of its configuration, what may differ, and what it says of that."""

from pathlib import Path
from typing import Any

from optim.polar import Polar
from optim.settings import BUFFERS, StepSettings, marked

from . import config as configuration
from .config import Config, ConfigError


def remember(config: Config) -> None:
    """Keep the device and the precision that were chosen for a run that is resumed.

    That is what there is before there is a runtime to ask.
    """
    path = Path(config.run.dir) / str(config.run.name) / "config.toml"
    before = configuration.of_file(path).run if config.run.resume and path.is_file() else None
    for key in ("device", "precision"):
        if before is not None and getattr(config.run, key) == "auto":
            setattr(config.run, key, getattr(before, key))


# What a resumed run has as it was, beside its model and what decides its optimizer's buffers.
KEPT = ("optim.name", "optim.param_dtype", "run.seed", "train.batch_size", "data.holdout")
# What else may differ and is told: other keys change nothing that is computed.
TOLD = ("optim.", "schedule.", "baseline.", "data.", "run.device", "run.precision", "run.threads")
TOLD += ("train.steps", "train.gradient_accumulation_steps")


def keep_choices(config: Config, folder: Path, saved: dict[str, Any] | None) -> list[str]:
    """Keep what was chosen for a resumed run's model, and return what differs from before, to be
    told.

    Raises ConfigError for what must not differ: model, seed, batches, and what a checkpoint's
    buffers are.
    """
    if saved:
        before = configuration.from_dict(Config, saved["config"])
    elif (folder / "config.toml").is_file():
        before = configuration.of_file(folder / "config.toml")
    else:
        return []
    config.model.vocab_size = config.model.vocab_size or before.model.vocab_size
    polar = config.optim.polar
    if polar.dtype == "auto":
        config.optim.polar = Polar(polar.schedule, polar.form, before.optim.polar.dtype)
    old, changes = configuration.flat(before), []
    for key, value in configuration.flat(config).items():
        if value == old[key]:
            continue
        if key.startswith("model.") or key in KEPT or needs_other_buffers(key, before, config):
            raise ConfigError(
                f"{key} of a resumed run",
                got=repr(value),
                allowed=f"{old[key]!r}, as {folder} has it",
                fix=f"resume with {folder / 'config.toml'}, or start a new run",
            )
        if key.startswith(TOLD):
            changes.append(f"changed: {key} = {value!r}, was {old[key]!r}")
    return changes


def needs_other_buffers(key: str, before: Config, now: Config) -> bool:
    """Return whether a setting that differs needs buffers that a checkpoint of `before` has not."""
    section, _, name = key.rpartition(".")
    if key == "optim.lr":
        return "auto" in (before.optim.lr, now.optim.lr)
    role = section.removeprefix("optim.roles.")
    given = [c.optim.roles.given() for c in (before, now)]
    if role in given[0].keys() - given[1].keys():
        return True  # a resumed optimizer splits groups of parameters, but joins none
    if not key.startswith("optim.") or name not in marked(StepSettings, BUFFERS):
        return False
    there, here = (
        of_roles.get(role, {}).get(name, getattr(c.optim, name))
        for of_roles, c in zip(given, (before, now), strict=True)
    )
    return there != here and {there, here} != {"momentum", "nesterov"}
