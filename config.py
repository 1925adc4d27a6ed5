"""One run's configuration: the owners' dataclasses composed; a TOML file sets values, the command line overrides them.

Configuration files are data: nothing in them is executed.
"""

import difflib
import json
import math
import os
import re
import time
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import tyro
from pydantic import TypeAdapter, ValidationError

from data.loader import DataConfig
from model import RoleMasses, RoleNorms
from models import ModelConfig, settings_of_others
from optim import RIVALS, EscapeVelocity, Polar
from optim.directions import DIRECTIONS
from optim.dualized import Constraint
from optim.errors import Refusal
from optim.rivals import Scaling
from optim.schedules import SCHEDULES
from runtime import RunConfig


class ConfigError(Refusal):
    """A configuration that cannot be used: the key, what was got, what is allowed."""


DUALIZED_ONLY = (
    "direction",
    "refresh_every",
    "scale",
    "cautious",
    "constraint",
    "momentum_dtype",
    "master_weights",
    "auto_initial",
    "auto_factor",
)


@dataclass
class OptimConfig:
    """name: "dualized", or one it is compared with: "normalized_adam" and "normalized_sgd" in the modular norm, "adamw", "muon_adamw", "sgd".
    Those have no direction, refresh_every, scale, cautious, constraint, momentum_dtype, master_weights and auto_*.
    auxiliary_lr: of muon_adamw, a multiple of AdamW's learning rates beside Muon's (optim/rivals.py). scaling: of sgd, lr of each weight for the standard, the NTK or the modular coordinates (optim/rivals.py).

    lr: modular norm of one step at the schedule's top (adamw, sgd: theirs), or "auto". schedule: wsd (linear warm-up, stable, linear cooldown) or cosine.

    warmup: steps, or below 1 a fraction of all. cooldown: wsd, the last fraction of all steps; cosine, the depth of the decay. composition: "modular", or "max", the plain maximum over
    tensors. cooldown_power: 1 is linear. beta_low, beta_warmup, beta_cooldown: beta starts and ends at beta_low, over these fractions of all steps. auto_initial, auto_factor: as in EscapeVelocity. param_dtype: of the weights in memory (float64 is for checks). The rest as in Dualized.
    """

    name: str = "dualized"
    lr: float | Literal["auto"] = 1.0
    scaling: Scaling = "standard"
    schedule: str = "wsd"
    warmup: float = 0.0
    cooldown: float = 0.5
    cooldown_power: float = 1.0
    auto_initial: float = EscapeVelocity.initial
    auto_factor: float = EscapeVelocity.factor
    direction: str = "nesterov"
    beta: float = 0.95
    beta_low: float = 0.85
    beta_warmup: float = 0.0
    beta_cooldown: float = 0.0
    beta2: float = 0.99
    refresh_every: int = 10
    scale: Literal["unit", "dual"] = "unit"
    composition: Literal["modular", "max"] = "modular"
    weight_decay: float = 0.0
    cautious: bool = False
    auxiliary_lr: float = 1.0
    constraint: Constraint | None = None
    max_grad_norm: float | None = None
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    master_weights: bool = True
    momentum_dtype: Literal["float32", "bfloat16"] | None = None
    polar: Polar = field(default_factory=Polar)
    norms: RoleNorms = field(default_factory=RoleNorms)
    masses: RoleMasses = field(default_factory=RoleMasses)

    def check(self) -> None:
        """Raise ConfigError for impossible values."""
        require(
            "optim",
            (
                "name",
                self.name,
                self.name in ("dualized", *RIVALS),
                ", ".join(("dualized", *RIVALS)),
            ),
            *(
                (
                    k,
                    getattr(self, k),
                    getattr(self, k) == getattr(OptimConfig, k),
                    f"{getattr(OptimConfig, k)!r} with optim.name = {self.name!r}, which has no choice",
                )
                for k in (
                    *(DUALIZED_ONLY if self.name != "dualized" else ()),
                    *(("scaling",) if self.name != "sgd" else ()),
                    *(("auxiliary_lr",) if self.name != "muon_adamw" else ()),
                )
            ),
            (
                "lr",
                self.lr,
                isinstance(self.lr, str) <= (self.name == "dualized"),
                f"a number for {self.name}",
            ),
            ("lr", self.lr, isinstance(self.lr, str) or self.lr >= 0, '0 or more, or "auto"'),
            ("auto_initial", self.auto_initial, 0 < self.auto_initial < math.inf, "more than 0"),
            ("auto_factor", self.auto_factor, 0 < self.auto_factor < math.inf, "more than 0"),
            (
                "scale",
                self.scale,
                self.scale == "unit" or self.lr != "auto",
                '"unit" where lr is "auto"',
            ),
            ("schedule", self.schedule, self.schedule in SCHEDULES, ", ".join(SCHEDULES)),
            (
                "warmup",
                self.warmup,
                self.warmup >= 0,
                "0 or more steps, or a fraction of all below 1",
            ),
            ("cooldown", self.cooldown, 0 <= self.cooldown <= 1, "a fraction from 0 to 1"),
            ("cooldown_power", self.cooldown_power, self.cooldown_power > 0, "more than 0"),
            *(
                (k, getattr(self, k), 0 <= getattr(self, k) <= 1, "a fraction from 0 to 1")
                for k in ("beta_warmup", "beta_cooldown")
            ),
            ("beta_low", self.beta_low, 0 <= self.beta_low < 1, "0 <= beta_low < 1"),
            ("auxiliary_lr", self.auxiliary_lr, self.auxiliary_lr > 0, "more than 0"),
            ("direction", self.direction, self.direction in DIRECTIONS, ", ".join(DIRECTIONS)),
            ("beta", self.beta, 0 <= self.beta < 1, "0 <= beta < 1"),
            ("beta2", self.beta2, 0 <= self.beta2 < 1, "0 <= beta2 < 1"),
            ("refresh_every", self.refresh_every, self.refresh_every >= 1, "1 or more steps"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more"),
            (
                "max_grad_norm",
                self.max_grad_norm,
                self.max_grad_norm is None or self.max_grad_norm > 0,
                "more than 0, or left out",
            ),
        )
        self.norms.check()
        self.masses.check()


@dataclass
class TrainConfig:
    """steps: of the optimizer. batch_size: sequences of block_size tokens in one step, over all micro-batches.

    eval_every: steps, 0 is at the end only; the whole validation split, or its first eval_tokens targets. target_loss: nats per token.
    sharpness_sequences: of the fixed batch whose loss has its curvature measured (telemetry.py); sharpness_modular: in the modular norm too, which takes most of the time.
    gradient_accumulation_steps: micro-batches of every process; batch_size must be a multiple of them times the processes.
    log_every, telemetry_every, sharpness_every, checkpoint_every: steps, 0 is never (a checkpoint is always saved at the end). keep_checkpoints: newest ones kept,
    beside the one of lowest validation loss; 0 saves none, not even at a signal. max_nonfinite: steps in a row whose loss or gradient is not finite, and which are left out, that end the run.
    pictures: loss.png and geometry.png at the end.
    """

    steps: int = 1000
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    eval_every: int = 0
    eval_tokens: int | None = None
    eval_batch_size: int = 32
    target_loss: float | None = None
    log_every: int = 10
    telemetry_every: int = 100
    sharpness_every: int = 0
    sharpness_sequences: int = 16
    sharpness_modular: bool = True
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    max_nonfinite: int = 3
    pictures: bool = True
    sample_tokens: int = 256
    sample_prompt: str = "\n"

    def check(self) -> None:
        """Raise ConfigError for impossible values."""
        require(
            "train",
            ("steps", self.steps, self.steps >= 1, "1 or more"),
            ("batch_size", self.batch_size, self.batch_size >= 1, "1 or more"),
            (
                "gradient_accumulation_steps",
                self.gradient_accumulation_steps,
                self.gradient_accumulation_steps >= 1
                and self.batch_size % self.gradient_accumulation_steps == 0,
                f"a divisor of train.batch_size = {self.batch_size}",
            ),
            (
                "eval_tokens",
                self.eval_tokens,
                self.eval_tokens is None or self.eval_tokens >= 1,
                "1 or more, or left out",
            ),
            ("eval_batch_size", self.eval_batch_size, self.eval_batch_size >= 1, "1 or more"),
            *(
                (k, getattr(self, k), getattr(self, k) >= 0, "0 or more")
                for k in (
                    "eval_every",
                    "log_every",
                    "telemetry_every",
                    "sharpness_every",
                    "checkpoint_every",
                    "sample_tokens",
                )
            ),
            (
                "sharpness_sequences",
                self.sharpness_sequences,
                self.sharpness_sequences >= 1,
                "1 or more",
            ),
            (
                "max_nonfinite",
                self.max_nonfinite,
                self.max_nonfinite >= 1,
                "1 (the first one ends the run) or more",
            ),
            ("keep_checkpoints", self.keep_checkpoints, self.keep_checkpoints >= 0, "0 or more"),
            (
                "sample_prompt",
                self.sample_prompt,
                bool(self.sample_prompt),
                "at least one character",
            ),
        )


@dataclass
class Config:
    """One training run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> None:
        """Raise ConfigError for impossible values, in any section."""
        for key, value in flat(self).items():
            section, _, name = key.rpartition(".")
            require(
                section,
                (
                    name,
                    value,
                    not isinstance(value, float) or math.isfinite(value),
                    "a finite number",
                ),
            )
        name = self.run.name
        require(
            "run",
            (
                "name",
                name,
                re.fullmatch(r"\w[\w.-]*", name or "") is not None,
                "the name of a run folder: letters, digits, '_', '-' and '.'",
            ),
            ("seed", self.run.seed, 0 <= self.run.seed < 2**63, "0 … 2**63 − 1"),
        )
        try:
            self.model.check()
            self.optim.check()
            self.train.check()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        require(
            "train",
            (
                "sharpness_every",
                self.train.sharpness_every,
                not (self.train.sharpness_every and self.optim.name == "muon_adamw"),
                'never (0) with optim.name = "muon_adamw", which has no coordinates of its own',
            ),
        )
        require(
            "model",
            (
                "zero_init",
                self.model.zero_init,
                not (self.model.zero_init and self.optim.constraint in ("sphere", "stiefel")),
                f"false with optim.constraint = {self.optim.constraint!r}, which zero weights cannot be put on",
            ),
        )


def require(section: str, *checks: tuple[str, object, bool, str]) -> None:
    """Raise ConfigError for the first (key, value, fine, allowed) that is not fine."""
    for key, value, fine, allowed in checks:
        if not fine:
            flag = f"--{section}.{key}".replace("_", "-")
            raise ConfigError(
                f"{section}.{key}",
                got=repr(value),
                allowed=allowed,
                fix=f"set it in the file, or {flag}",
            )


def from_dict(cls: type, raw: dict[str, Any], path: str = "") -> Any:
    """A dataclass from nested dicts, every key and type checked."""
    hints = get_type_hints(cls)
    raw = named(raw) if cls is Config else raw
    values: dict[str, Any] = {}
    for key, value in raw.items():
        dotted = f"{path}{key}"
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            fix = f"nearest valid name: {path}{close[0]}" if close else "leave it out"
            raise ConfigError(f"unknown key {dotted}", got=key, allowed=", ".join(hints), fix=fix)
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(
                    dotted,
                    got=repr(value),
                    allowed="a section",
                    fix=f"[{dotted}], with its keys below",
                )
            values[key] = from_dict(hints[key], value, f"{dotted}.")  # type: ignore[arg-type]
            continue
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ConfigError(
                dotted,
                got=repr(value),
                allowed=spell(hints[key]),
                fix="write it so, or leave it out for the default",
            ) from error
    try:
        return cls(**values)
    except ValueError as error:  # of a section that checks itself, as Polar does
        raise ConfigError(
            path.rstrip("."), got=raw, allowed=error, fix=f"set it in the file, or --{path}KEY"
        ) from error


def named(raw: dict[str, Any]) -> dict[str, Any]:
    """With model.name = "ngram", where what was saved before that key has settings of n-grams: the one place where a name is implied."""
    model = raw.get("model")
    if not isinstance(model, dict) or "name" in model:
        return raw
    plain = all(model.get(f.name, f.default) == f.default for f in settings_of_others("gpt"))
    return raw if plain else raw | {"model": {"name": "ngram", **model}}


def spell(hint: Any) -> str:
    """A type as a user writes it."""
    if getattr(hint, "__origin__", None) is Literal:
        return ", ".join(map(repr, hint.__args__))
    names = {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "true or false",
        type(None): "left out",
    }
    return names[hint] if hint in names else " or ".join(map(spell, get_args(hint)))


def load(argv: list[str]) -> Config:
    """[CONFIG.toml] [--section.key value]… → Config. `--help` lists every key."""
    path = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    options = argv[1:] if path else argv
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            shipped = Path(__file__).parent / "configs"
            there = ", ".join(sorted(str(p.relative_to(shipped)) for p in shipped.rglob("*.toml")))
            raise ConfigError(
                "configuration file",
                got=f"{path} ({error.strerror})",
                allowed="a TOML file",
                fix=f"one of those in {shipped.name}/: {there}",
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(path, got=error, allowed="TOML", fix="see https://toml.io") from error
    # The file's own mistakes first; and its model, which options do not imply.
    raw.setdefault("model", {})["name"] = from_dict(Config, raw).model.name
    if "--help" in options or "-h" in options:
        tyro.cli(
            Config,
            default=from_dict(Config, raw),
            args=["--help"],
            prog="train_gpt.py [CONFIG.toml]",
            description=load.__doc__,
        )
    for key, value in read_options(options).items():
        put(raw, key, value)
    config = from_dict(Config, raw)
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


def put(raw: dict[str, Any], key: str, value: Any) -> None:
    """raw["section"]["key"] = value, for "section.key"; sections are made."""
    *sections, name = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
    raw[name] = value


def read_options(options: list[str]) -> dict[str, Any]:
    """["--section.key", "value", …] → {"section.key": typed value}. --section.key=value does too; a switch may stand alone or as --section.no-key."""
    hints, found = flat_hints(Config), {}
    rest = list(options)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        section, _, key = name.rpartition(".")
        if (
            hints.get(f"{section}.{key.removeprefix('no_')}") is bool
            and key.startswith("no_")
            and not equals
        ):
            found[f"{section}.{key.removeprefix('no_')}"] = False
            continue
        if not flag.startswith("--") or name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            fix = (
                f"nearest valid name: --{close[0].replace('_', '-')}"
                if close
                else "--help lists them"
            )
            raise ConfigError(
                f"unknown option {flag}",
                got=flag,
                allowed="--section.key, with the keys of the configuration file",
                fix=fix,
            )
        if (
            not equals
            and bool in (hints[name], *get_args(hints[name]))
            and (not rest or rest[0].startswith("--"))
        ):
            found[name] = True
            continue
        if not equals:
            value = rest.pop(0) if rest else ""
        if value == "None" and type(None) in get_args(hints[name]):
            found[name] = None
            continue
        try:
            found[name] = TypeAdapter(hints[name]).validate_strings(value)
        except ValidationError as error:
            raise ConfigError(
                flag, got=repr(value), allowed=spell(hints[name]), fix=f"{flag} VALUE"
            ) from error
    return found


def flat_hints(cls: type, prefix: str = "") -> dict[str, Any]:
    """{"section.key": type}."""
    out: dict[str, Any] = {}
    for key, hint in get_type_hints(cls).items():
        out |= (
            flat_hints(hint, f"{prefix}{key}.") if is_dataclass(hint) else {f"{prefix}{key}": hint}
        )  # type: ignore[arg-type]
    return out


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"section.key": value}."""
    out: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        out |= (
            flat(value, f"{prefix}{f.name}.")
            if is_dataclass(value)
            else {f"{prefix}{f.name}": value}
        )
    return out


def to_toml(config: Any, prefix: str = "") -> str:
    """The configuration as TOML; keys that are None are left out, which means the same."""
    lines, tables = [], []
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            tables.append(f"\n[{prefix}{f.name}]\n{to_toml(value, f'{prefix}{f.name}.')}")
        elif value is not None:
            lines.append(f"{f.name} = {json.dumps(value, ensure_ascii=False)}\n")
    return "".join([*lines, *tables]).lstrip("\n")
