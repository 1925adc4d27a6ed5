"""One run's configuration: the owners' dataclasses composed.

A TOML file sets values, the command line overrides them. Configuration files are data: nothing in
them is executed. But [run] plugins names Python modules of this machine, which are imported first.
docs/settings.md lists every setting.
"""

import os
import re
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import tyro

from data.loader import DataConfig
from models import ModelConfig, model_config, settings_of_others
from optim import plugins
from optim.baselines import BASELINES
from optim.errors import Refusal, require
from optim.schedules import Schedule
from optim.settings import Range, defaults_of

from . import sections
from .errors import ConfigError, RankError
from .half_lives import displaced, drop, half_lives, set_decays
from .help import described
from .migrate import migrate
from .optimizers import (
    BaselineSettings,
    OptimConfig,
    baseline_settings,
    own_settings_of,
    require_default,
)
from .runtime import RunConfig
from .sections import check_ranges, flat_hints, put, set_it

__all__ = ["Config", "ConfigError", "OptimConfig", "TrainConfig", "flat", "flat_hints", "from_dict"]
__all__ += ["load", "of_file", "put", "read_options", "to_toml"]


@dataclass(kw_only=True)
class TrainConfig:
    """The length of a run, its batches, and what it measures, saves and draws."""

    steps: Annotated[int, Range(1)] = 1000
    """Steps of the optimizer in the whole run."""

    batch_size: Annotated[int, Range(1)] = 16
    """Sequences of block_size tokens in one step, over all micro-batches and processes."""

    gradient_accumulation_steps: Annotated[int, Range(1)] = 1
    """Micro-batches of every process; batch_size is a multiple of them times the processes."""

    eval_every: Annotated[int, Range(0)] = 0
    """Steps between two evaluations; 0 evaluates at the end only."""

    eval_tokens: Annotated[int, Range(1)] | None = None
    """Evaluate on the first so many targets of the validation split, by default on all of it."""

    eval_batch_size: Annotated[int, Range(1)] = 32
    """Sequences of one forward pass in an evaluation."""

    target_loss: Annotated[float, Range(0)] | None = None
    """Note in summary.json the first evaluation at or under this loss, in nats per token."""

    log_every: Annotated[int, Range(0)] = 10
    """Steps between two lines of metrics.jsonl; 0 logs the last step only."""

    telemetry_every: Annotated[int, Range(0)] = 100
    """Steps between two measurements of every tensor's geometry; 0 is never."""

    sharpness_every: Annotated[int, Range(0)] = 0
    """Steps between two measurements of the loss's curvature; 0 is never."""

    sharpness_sequences: Annotated[int, Range(1)] = 16
    """Sequences of the fixed batch whose loss has its curvature measured."""

    sharpness_modular: bool = True
    """Measure curvature in the modular norm too, which takes most of the time."""

    checkpoint_every: Annotated[int, Range(0)] = 0
    """Steps between two checkpoints; 0 saves at the end and at a signal only."""

    keep_checkpoints: Annotated[int, Range(0)] = 2
    """Newest checkpoints kept, beside that of lowest validation loss; 0 saves none at all."""

    max_nonfinite: Annotated[int, Range(1)] = 3
    """End the run after so many steps in a row whose loss or gradient was not finite. Such a step
    is left out."""

    pictures: bool = True
    """Draw loss.png and geometry.png at the end."""

    sample_tokens: Annotated[int, Range(0)] = 256
    """Tokens of the sample at the end; 0 prints none."""

    sample_prompt: str = "\n"
    """The text that the sample continues."""

    def check(self) -> None:
        """Raise ConfigError for values that cannot be together."""
        parts = self.gradient_accumulation_steps
        require(
            self.batch_size % parts == 0,
            "train.gradient_accumulation_steps",
            got=parts,
            allowed=f"a divisor of train.batch_size = {self.batch_size}",
            fix=set_it("train.gradient_accumulation_steps"),
            error=ConfigError,
        )
        require(
            self.sample_prompt,
            "train.sample_prompt",
            got=repr(self.sample_prompt),
            allowed="at least one character",
            fix=set_it("train.sample_prompt"),
            error=ConfigError,
        )


@dataclass
class Config:
    """One training run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: Schedule = field(default_factory=Schedule)
    baseline: BaselineSettings = field(default_factory=BaselineSettings)  # type: ignore[valid-type]
    train: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> None:
        """Raise ConfigError for impossible values, in any section."""
        check_ranges(self)
        name = self.run.name
        require(
            re.fullmatch(r"\w[\w.-]*", name or ""),
            "run.name",
            got=repr(name),
            allowed="the name of a run folder: letters, digits, '_', '-' and '.'",
            fix=set_it("run.name"),
            error=ConfigError,
        )
        try:
            self.model.check()
            self.optim.check()
            self.train.check()
        except Refusal as error:  # of the model's own, or of its masses
            raise ConfigError(
                error.what, got=error.got, allowed=error.allowed, fix=error.fix
            ) from error
        own, defaults = own_settings_of(self.optim.name), defaults_of(type(self.baseline))
        for key, value in vars(self.baseline).items():
            if key not in own:
                require_default(f"baseline.{key}", value, defaults[key], self.optim.name)
        baseline = BASELINES.get(self.optim.name)
        require(
            not self.train.sharpness_every or baseline is None or baseline.scaling is not None,
            "train.sharpness_every",
            got=self.train.sharpness_every,
            allowed=f'never (0) with optim.name = "{self.optim.name}", which has no coordinates of'
            " its own",
            fix=set_it("train.sharpness_every"),
            error=ConfigError,
        )
        constraint = self.optim.constraint
        require(
            not (self.model.zero_init and constraint in ("sphere", "stiefel")),
            "model.zero_init",
            got=self.model.zero_init,
            allowed=f"false with optim.constraint = {constraint!r}, which zero weights"
            " cannot be put on",
            fix=set_it("model.zero_init"),
            error=ConfigError,
        )


# ---- the settings of what plugins have registered


def config_class() -> type[Config]:
    """Return Config with the settings of every model and baseline that is registered now."""
    return _config_class(model_config(), baseline_settings(tuple(BASELINES.values())))


@cache
def _config_class(model: type[ModelConfig], baseline: type) -> type[Config]:
    """Return Config with these sections [model] and [baseline]."""
    if (model, baseline) == (ModelConfig, BaselineSettings):
        return Config
    rows = [(k, c, field(default_factory=c)) for k, c in (("model", model), ("baseline", baseline))]
    namespace = {"__doc__": Config.__doc__, "__module__": __name__}
    return make_dataclass("Config", rows, bases=(Config,), namespace=namespace)


def flat(config: Config) -> dict[str, Any]:
    """Return {"section.key": value}, with the defaults of what was registered after it was read."""
    return sections.flat(config_class()()) | sections.flat(config)


def to_toml(config: Config) -> str:
    """Return a configuration as TOML.

    Settings of plugins' parts that it does not name are left out, as the plugins that it names may
    not declare them.
    """
    own = own_settings_of(config.optim.name)
    foreign = {f"model.{f.name}" for f in settings_of_others(config.model.name, type(config.model))}
    foreign |= {f"baseline.{k}" for k in vars(config.baseline) if k not in own}
    leave_out = foreign - flat_hints(Config).keys()
    return sections.to_toml(config, leave_out=leave_out, computed=half_lives(config))


# ---- reading


def from_dict(cls: type, raw: dict[str, Any]) -> Any:
    """Return a dataclass made of nested dicts, every key and type checked.

    Of a Config the plugins are loaded first, and the keys of earlier versions are read too
    (training/migrate.py).
    """
    if not issubclass(cls, Config):
        return sections.from_dict(cls, raw)
    load_plugins(raw)
    return _composed(migrate(raw)[0])


def _composed(raw: dict[str, Any]) -> Config:
    config = sections.from_dict(config_class(), raw)
    set_decays(config, raw)
    return config


def load_plugins(raw: Mapping[str, Any]) -> None:
    """Load the plugins that a configuration names; what is no list of names is refused later."""
    section = raw.get("run")
    names = section.get("plugins") if isinstance(section, dict) else None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        # Only rank 0 prints a ConfigError, and another machine may lack the file: it says so too.
        first_of_its_machine = os.environ.get("LOCAL_RANK") == "0"
        speaks = first_of_its_machine and os.environ.get("RANK", "0") != "0"
        plugins.load(names, error=RankError if speaks else ConfigError)


def of_file(path: Path) -> Config:
    """Return the configuration in a file, of whatever version, as it stands there."""
    return from_dict(Config, _read(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        shipped = Path(__file__).parent.parent / "configs"
        files = ", ".join(sorted(str(p.relative_to(shipped)) for p in shipped.rglob("*.toml")))
        raise ConfigError(
            "configuration file",
            got=f"{path} ({error.strerror})",
            allowed="a TOML file",
            fix=f"one of those in {shipped.name}/: {files}",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(path, got=error, allowed="TOML", fix="see https://toml.io") from error


DESCRIPTION = """Train one model, as a configuration file says. The options below override it; their
defaults are the file's."""


def load(argv: list[str]) -> Config:
    """Return the configuration that arguments name: [CONFIG.toml] [--section.key value]….

    Of --help it prints the page and exits.
    """
    path = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    options = argv[1:] if path else argv
    raw, older = migrate(_read(path)) if path is not None else ({}, [])
    note(older, f"{path} is of an earlier version: ")
    if (named := plugins_of(options)) is not None:
        put(raw, "run.plugins", named)
    # The file's own mistakes first; and its model.
    raw.setdefault("model", {})["name"] = from_dict(Config, raw).model.name
    if "--help" in options or "-h" in options:
        tyro.cli(
            described(from_dict(Config, raw)),
            args=["--help"],
            prog="train_gpt.py [CONFIG.toml]",
            description=DESCRIPTION,
        )
    values = read_options(options)
    drop(raw, displaced(values))
    for key, value in values.items():
        put(raw, key, value)
    if "model.name" not in values:  # options can imply another model than the file's, told so
        raw, implied = migrate(raw)
        note(implied)
    config = _composed(raw)
    if config.run.name is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise ConfigError(
            "run.name",
            got="none, under torchrun --max-restarts",
            allowed="a name, by which a restart finds the run",
            fix="--run.name NAME",
        )
    if config.run.name is None and path is not None and not config.run.resume:
        config.run.name = f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    config.check()
    return config


def note(lines: list[str], about: str = "") -> None:
    """Print once what was read otherwise than it was written."""
    if lines and os.environ.get("RANK", "0") == "0":
        print(f"note: {about}{'; '.join(lines)}", file=sys.stderr)


def read_options(options: list[str]) -> dict[str, Any]:
    """Return {"section.key": typed value} of ["--section.key", "value", …]."""
    return sections.read_options(config_class(), options)


def plugins_of(options: list[str]) -> list[str] | None:
    """Return the plugins that options name, None where none does: they declare other options."""
    flag = "--run.plugins"
    starts = [i for i, option in enumerate(options) if option.partition("=")[0] == flag]
    if not starts:
        return None
    rest = options[starts[-1] :]
    end = next((i for i, option in enumerate(rest) if i and option.startswith("--")), len(rest))
    return sections.read_options(Config, rest[:end])["run.plugins"]


def check_placement(config: Config, *, ranks: int, parallel: str) -> None:
    """Raise ConfigError for what these ranks cannot do. The configuration's device is chosen."""
    c, parts = config.train, config.train.gradient_accumulation_steps
    require(
        c.batch_size % (parts * ranks) == 0,
        "train.batch_size",
        got=c.batch_size,
        allowed=f"a multiple of {parts * ranks}, {ranks} ranks times"
        f" train.gradient_accumulation_steps = {parts}",
        fix="--train.batch-size, --train.gradient-accumulation-steps, or other ranks",
        error=ConfigError,
    )
    dtype, device = config.optim.param_dtype, config.run.device
    require(
        not c.sharpness_every or (ranks == 1 and dtype != "bfloat16" and device != "mps"),
        "train.sharpness_every",
        got=f"{c.sharpness_every} with {ranks} ranks on {device}, optim.param_dtype = {dtype!r}",
        allowed="one process on cpu or cuda, float32 or float64 weights",
        fix="0, or one process with --optim.param-dtype float32",
        error=ConfigError,
    )
    require(
        not config.run.compile or parallel == "ddp",
        "run.compile",
        got=f"true with run.parallel = {parallel!r}",
        allowed="with ddp",
        fix="leave one of them out",
        error=ConfigError,
    )
