"""How a run starts: in a new folder, or where an earlier process of it has stopped."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optim.errors import require
from optim.plugins import digests
from optim.polar import Polar
from optim.settings import BUFFERS, StepSettings, marked

from . import checkpoint
from . import config as configuration
from .config import Config, check_placement
from .errors import ConfigError
from .run_folder import RunFolder
from .runtime import Runtime


@dataclass
class Progress:
    """The part of a checkpoint that is no tensor.

    val_step, val_loss, val_bpb: of the last evaluation. target: the first evaluation at or under
    train.target_loss.
    """

    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    telemetry_seconds: float = 0.0
    compile_seconds: float = 0.0
    val_step: int = -1
    val_loss: float | None = None
    val_bpb: float | None = None
    target: dict[str, float] | None = None


@dataclass
class Start:
    """Where a run starts: its folder, and of a resumed run its newest whole checkpoint.

    saved: the checkpoint's state, without tensors. damage: a line for each damaged checkpoint.
    changes: a line for each setting that a resumed run has otherwise than before. plugins: the
    SHA-256 of each plugin's file.
    """

    folder: RunFolder
    resumed: bool
    checkpoint: Path | None = None
    saved: dict[str, Any] | None = None
    damage: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    plugins: dict[str, str] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Return the number of steps that were taken before."""
        return self.saved["step"] if self.saved else 0

    def tell(self, progress: Progress) -> None:
        """Print how the run starts, and drop metrics that a resumed run makes again."""
        folder, say = self.folder, self.folder.say
        if folder.crashed is not None:
            say(
                "a run of this name ended without a checkpoint or a result:"
                f" it is now {folder.crashed}"
            )
        for line in self.damage:
            say(f"left out: {line}")
        if self.resumed:
            folder.keep_metrics(
                lambda record: (
                    self.saved is not None
                    and record["step"] <= (progress.val_step if "val_loss" in record else self.step)
                )
            )
            if self.checkpoint:
                say(f"resumed from {self.checkpoint} at step {self.step}")
            else:
                say("no checkpoint yet: from the start")
        for line in self.changes:
            say(line)


def open_run(config: Config, runtime: Runtime) -> Start:
    """Find the folder of a run and the checkpoint to resume from; nothing is written yet.

    The configuration gets the run's name, device and precision. Raises RunError for a folder that
    cannot be used, ConfigError for what this run or these ranks cannot do.
    """
    # torchrun does not count a restart on every machine: one rank that was restarted speaks for
    # all. The configuration that is written starts a run.
    resume = max(runtime.gather(config.run.resume), key=bool)
    config.run.resume = False
    config.run.name = runtime.on_main(lambda: config.run.name)  # which has the time in it
    path = Path(config.run.dir) / str(config.run.name)
    resumed = runtime.on_main(path.is_dir) if resume == "auto" else bool(resume)
    folder = runtime.together(lambda: RunFolder(path, resume=resumed, main=runtime.main))
    start = Start(folder, resumed)
    if resumed:
        runtime.together(folder.lock)  # before the checkpoints are read
        newest, start.damage = runtime.on_main(lambda: checkpoint.newest_whole(folder.checkpoints))
        start.checkpoint = newest
        start.saved = runtime.together(lambda: checkpoint.read_state(newest) if newest else None)
        start.changes = runtime.together(lambda: keep_choices(config, path, start.saved))
    if start.step > config.train.steps:
        raise ConfigError(
            "train.steps of a resumed run",
            got=config.train.steps,
            allowed=f"{start.step} or more, the steps taken",
            fix="--train.steps",
        )
    start.plugins = check_plugins(config, runtime, start.saved)
    config.run.device = runtime.device.type  # type: ignore[assignment]
    config.run.precision = runtime.precision
    check_placement(config, ranks=runtime.size, parallel=runtime.parallel)
    return start


def check_plugins(config: Config, runtime: Runtime, saved: dict[str, Any] | None) -> dict[str, str]:
    """Return the SHA-256 of each plugin's file, and note which are others than a run began with.

    Raises ConfigError where the ranks have different files.
    """
    own = digests(config.run.plugins)
    everywhere = runtime.gather(own)
    differing = [name for name in own if len({digest.get(name) for digest in everywhere}) > 1]
    require(
        not differing,
        "run.plugins",
        got=f"{', '.join(differing)}, with different files on different ranks",
        allowed="the same file for every rank",
        fix="copy it to all machines",
        error=ConfigError,
    )
    before = (saved or {}).get("plugins", {})
    changed = [name for name in own if before.get(name, own[name]) != own[name]]
    configuration.note([f"{name} is another file than this run has had so far" for name in changed])
    return own


def remember(config: Config) -> None:
    """Keep the device and the precision that were chosen for a run that is resumed.

    They are known before there is a runtime to ask.
    """
    path = Path(config.run.dir) / str(config.run.name) / "config.toml"
    before = configuration.of_file(path).run if config.run.resume and path.is_file() else None
    for key in ("device", "precision"):
        if before is not None and getattr(config.run, key) == "auto":
            setattr(config.run, key, getattr(before, key))


# A resumed run has these as they were, beside its model and what decides its optimizer's buffers.
KEPT = ("optim.name", "optim.param_dtype", "run.seed", "train.batch_size", "data.holdout")
# These may differ and are told: other keys change nothing that is computed.
TOLD = ("optim.", "schedule.", "baseline.", "data.", "run.device", "run.precision", "run.threads")
TOLD += ("run.plugins", "train.steps", "train.gradient_accumulation_steps")


def keep_choices(config: Config, folder: Path, saved: dict[str, Any] | None) -> list[str]:
    """Keep what was chosen for a resumed run's model, and return a line for each difference.

    Raises ConfigError for what must not differ: model, seed, batches, and what decides a
    checkpoint's buffers.
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
    roles_before, roles_now = before.optim.roles.given(), now.optim.roles.given()
    if role in roles_before.keys() - roles_now.keys():
        return True  # a resumed optimizer splits groups of parameters, but joins none
    if not key.startswith("optim.") or name not in marked(StepSettings, BUFFERS):
        return False
    value_before = roles_before.get(role, {}).get(name, getattr(before.optim, name))
    value_now = roles_now.get(role, {}).get(name, getattr(now.optim, name))
    return value_before != value_now and {value_before, value_now} != {"momentum", "nesterov"}
