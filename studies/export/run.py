"""A run or a configuration to export: read, and refused where no script can carry it out."""

import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from optim.baselines import BASELINES, takes_polar
from optim.errors import require
from optim.plugins import digests
from optim.schedules import SCHEDULES
from optim.settings import StepSettings
from training import config as configuration
from training.config import Config
from training.provenance import git_state
from training.resume import TOLD

from ..runs import ROOT, summary
from .specialise import ExportError

# Settings that a script carries out. All others must be at their defaults, but those that change
# nothing that it computes.
NOT_CARRIED, OF_STORAGE = ("momentum_dtype",), ("master_weights",)  # of a step
STEP = [f.name for f in fields(StepSettings) if f.name not in (*NOT_CARRIED, *OF_STORAGE)]
CARRIED = re.compile(
    r"(model|schedule|baseline|optim\.polar|optim\.norms|optim\.masses)\..*"
    r"|run\.(seed|device|precision|compile|threads|plugins)|data\.dataset"
    rf"|optim\.(name|composition)|optim\.(roles\.\w+\.)?({'|'.join(STEP)})"
    r"|train\.(steps|batch_size|gradient_accumulation_steps|eval_every|eval_tokens"
    r"|eval_batch_size|log_every)"
)
ONLY_ROUNDING = ("run.threads", "train.gradient_accumulation_steps", "run.plugins")
NEUTRAL = re.compile(
    r"run\.(name|dir|resume|parallel|shard_size|timeout)|data\.verify"
    rf"|optim\.({'|'.join(OF_STORAGE)}|auto\..*)"
    r"|optim\.(roles\.\w+\.)?beta2?_half_life"  # beta and beta2 are carried
    r"|train\.(target_loss|telemetry_every|sharpness_.*|checkpoint_every|keep_checkpoints"
    r"|max_nonfinite|pictures|sample_.*)"
)


@dataclass(frozen=True)
class Run:
    """A run, or a configuration that was not run, to export.

    world: the processes that it was computed by. origin: a line for the script's docstring.
    """

    name: str
    config: Config
    world: int
    origin: str
    folder: Path | None = None


# ---- reading


def read(source: Path) -> Run:
    """Return the run of a folder, or of a configuration file."""
    folder = source if source.is_dir() else None
    file = source / "config.toml" if folder else source
    require(
        file.is_file(),
        source,
        got=f"no {'config.toml in it' if folder else 'such file'}",
        allowed="a run's folder, or a configuration file",
        fix="another path",
        error=ExportError,
    )
    config = configuration.load([str(file)])
    if folder is None:
        config.run.name = file.stem  # not the time of now
        commit = commit_text(*git_state())
        origin = f"Exported from the configuration {file.name}, which was not run, by {commit}."
        return Run(file.stem, config, 1, origin)
    end = summary(source)
    if end is None:
        allowed, fix = "a run that came to its end", "train_gpt.py … --run.resume"
        raise ExportError(source, got="no summary.json", allowed=allowed, fix=fix)
    check_resumed(source, config)
    origin = f"Exported from the run {source.name} of {commit_text(end['commit'], end['dirty'])}."
    now, before = digests(config.run.plugins), end.get("plugins", {})
    changed = [name for name in now if now[name] != before.get(name, now[name])]
    if changed:
        origin += f"\nFiles of plugins that have changed since: {', '.join(changed)}."
    return Run(source.name, config, end["world_size"], origin, source)


def check_resumed(folder: Path, config: Config) -> None:
    """Raise ExportError for a run that was resumed with settings that change what it computes."""
    first = configuration.flat(config)
    for file in sorted(folder.glob("resumed_*_config.toml")):
        for key, value in configuration.flat(configuration.of_file(file)).items():
            if value != first.get(key) and key.startswith(TOLD) and key not in ONLY_ROUNDING:
                raise ExportError(
                    f"{key} of an exported run",
                    got=f"{first.get(key)!r}, and {value!r} when it was resumed",
                    allowed="a run with one value from its first to its last step",
                    fix=f"export {folder / 'config.toml'} or {file}, as a configuration",
                )


def commit_text(commit: str | None, dirty: bool | None) -> str:
    """Return the words for the code that a run was made with."""
    changes = " with changes that were not committed" if dirty else ""
    return f"nanodual, commit {commit}{changes}" if commit else "nanodual"


def nested(config: Config) -> dict[str, Any]:
    """Return a configuration as configuration.from_dict takes it: a copy can be changed."""
    return tomllib.loads(configuration.to_toml(config))


def resolved(run: Run) -> Config:
    """Return a copy of a run's configuration, with what a script chooses by itself."""
    config = configuration.from_dict(Config, nested(run.config))
    if run.folder is None and config.run.device == "auto":
        config.run.device = "cuda"
    if config.optim.polar.dtype == "auto":
        low = config.run.precision == "bf16" or takes_polar(config.optim.name)
        config.optim.polar = replace(config.optim.polar, dtype="bfloat16" if low else "float32")
    return config


# ---- refusing


def check(config: Config) -> None:
    """Raise ExportError for a setting that a script does not carry out."""
    default, o = configuration.flat(type(config)()), config.optim
    for key, value in configuration.flat(config).items():
        if value != default[key] and not CARRIED.fullmatch(key) and not NEUTRAL.fullmatch(key):
            raise refusal(key, value, f"{default[key]!r}")
    exported = ("dualized", *(name for name, recipe in BASELINES.items() if not recipe.normed))
    direction = next(iter(own_directions(config)), None)
    shape, vocabulary = config.schedule.shape, config.model.vocab_size
    of_optim = SCHEDULES[shape].__module__ == "optim.schedules"
    for key, value, fine, allowed in (
        ("optim.lr", o.lr, not isinstance(o.lr, str), "a number"),
        ("optim.name", o.name, o.name in exported, ", ".join(exported)),
        (
            "optim.direction",
            direction,
            not direction or bool(config.run.plugins),
            "those of optim/directions.py and of run.plugins",
        ),
        ("schedule.shape", shape, of_optim, "those of optim/schedules.py"),
        ("run.device", config.run.device, config.run.device in ("cpu", "cuda"), "cpu, cuda"),
        ("run.precision", config.run.precision, config.run.precision != "auto", "fp32, bf16"),
        ("model.vocab_size", vocabulary, vocabulary is not None, "a number"),
    ):
        if not fine:
            raise refusal(key, value, allowed)


def used_directions(config: Config) -> list[str]:
    """Return the directions of a run, by name."""
    settings = (vars(config.optim), *config.optim.roles.given().values())
    return sorted({s.get("direction", config.optim.direction) for s in settings})


def own_directions(config: Config) -> list[str]:
    """Return the directions of a run, by name, that optim/directions.py does not define."""
    ours = (ROOT / "optim/directions.py").read_text(encoding="utf-8")
    return [d for d in used_directions(config) if f'\n    "{d}": ' not in ours]


def refusal(key: str, value: object, allowed: str) -> ExportError:
    """Return the error for a setting that a script cannot have."""
    return ExportError(
        f"{key} of an exported run",
        got=repr(value),
        allowed=allowed,
        fix="another run, or studies/export/script.py, which has to do what it asks for",
    )
