"""The entries of a study: configurations, and what has to agree between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training import config as configuration
from training.config import Config

from .. import runs
from ..jobs import NEUTRAL

OPTIMIZER = ("optim.", "schedule.", "baseline.")  # settings in which entries are meant to differ
BY_STUDY = ("run.seed", "train.steps", "train.eval_every", *NEUTRAL)  # set for each run
BY_STUDY += ("run.plugins",)  # other keys name what they register


def tokens_per_step(config: Config) -> int:
    """Return the tokens that one step trains on."""
    return config.train.batch_size * config.model.block_size


MUST_AGREE: dict[str, Callable[[Config], Any]] = {
    "data.dataset": lambda c: c.data.dataset,
    "model.block_size": lambda c: c.model.block_size,
    "tokens of a step": tokens_per_step,
    "train.eval_tokens": lambda c: c.train.eval_tokens,
}


@dataclass
class Entry:
    """A configuration that takes part."""

    name: str
    """The stem of its file."""
    path: str
    config: Config
    steps: int = 0
    """Its budget."""
    tuned: dict[str, Any] | None = None
    """The values of its best trial; None without trials."""
    trials: list[dict[str, Any]] = field(default_factory=list)
    """Its trials, as results.json holds them."""
    notes: list[str] = field(default_factory=list)

    def job(self, name: str, folder: Path, **changes: Any) -> runs.Job:
        """Return a run of the study with this configuration, and some values changed."""
        return runs.job(self.config, name, folder, **{**runs.QUIET, **changes})

    def run_name(self, steps: int, seed: int) -> str:
        """Return the name of a judged run."""
        return f"{self.name}.s{steps}.seed{seed}"

    def judged_job(self, steps: int, seed: int, folder: Path, **values: Any) -> runs.Job:
        """Return a run that is judged, with the tuned values, or with these.

        It is evaluated about five times on its way, which the training clock does not count.
        """
        changes = {"run.seed": seed, "train.steps": steps, "train.eval_every": max(1, steps // 5)}
        return self.job(
            self.run_name(steps, seed), folder, **changes, **(self.tuned or {}), **values
        )


def load(paths: Sequence[str], options: Sequence[str], *, allow_different: bool) -> list[Entry]:
    """Load the entries, and raise StudyError unless they can be compared.

    They have to agree in what MUST_AGREE lists. Other differences but those of the optimizer are
    noted. options: --section.key value, for every entry.
    """
    entries = [Entry(Path(p).stem, p, configuration.load([p, *options])) for p in paths]
    names = [e.name for e in entries]
    if len(set(names)) < len(names):
        raise runs.StudyError(
            "entries", got=", ".join(names), allowed="one of each name", fix="rename a file"
        )
    first = entries[0]
    for entry in entries:
        _require_no_holdout(entry)
        if not allow_different:
            _require_agreement(entry, first)
        if differences := _differences(entry, first):
            entry.notes.append(
                f"beside its optimizer, differs from {first.name}: {', '.join(differences)}"
            )
    return entries


def _require_no_holdout(entry: Entry) -> None:
    """Raise StudyError if the configuration itself holds out a part of the training split."""
    if entry.config.data.holdout:
        raise runs.StudyError(
            entry.path,
            got=f"data.holdout = {entry.config.data.holdout}",
            allowed="0; tuning holds out for itself",
            fix="leave it out, and --holdout",
        )


def _require_agreement(entry: Entry, first: Entry) -> None:
    """Raise StudyError unless an entry agrees with the first in data and measure."""
    for what, value_of in MUST_AGREE.items():
        if value_of(entry.config) != value_of(first.config):
            raise runs.StudyError(
                f"{what} of the entries",
                got=f"{value_of(entry.config)} of {entry.name}",
                allowed=f"{value_of(first.config)}, as {first.name} has it",
                fix="the same for all, or --allow-different",
            )


def _differences(entry: Entry, first: Entry) -> list[str]:
    """List the settings beside the optimizer's in which an entry differs from the first."""
    values = configuration.flat(first.config)
    return [
        f"{key} {spelled(value)} ({spelled(values[key])})"
        for key, value in configuration.flat(entry.config).items()
        if value != values[key] and not key.startswith((*OPTIMIZER, *BY_STUDY))
    ]


def spelled(value: Any) -> str:
    """Return a setting's value as names and tables spell it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
