"""The tracks: what runs must have in common to be compared, and the target they race to."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.shards import read_manifest
from optim.errors import require
from training import config as configuration
from training.config import Config

from ..runs import ROOT
from .book import RecordError

# A run may choose these freely where a track fixes the architecture.
FREE_MODEL_KEYS = ("model.init", "model.zero_init", "model.vocab_size")


@dataclass(frozen=True)
class Track:
    """One race: its data, its target, and what an entry must leave as it is."""

    title: str
    # A loss in nats per token, measured once and fixed since.
    target: float
    # The figure that counts, for runs whose mean end loss over seeds passes the rule at `target`.
    figure: Literal["steps", "seconds"]
    # sha256 over the sha256 of the shards, train and then val. None: the track is not run here.
    corpus: str | None
    # A configuration file whose data, model (but its initialization) and batch bind every entry.
    # None leaves architecture and batch free.
    fixed: str | None = None
    # The most threads that all processes of a run may have together.
    threads: int | None = None

    def check(self, name: str, config: Config, summary: dict[str, Any]) -> None:
        """Raise RecordError unless the run belongs to this track, which is called `name`."""
        folder = Path(config.data.dataset)
        values = configuration.flat(config)
        rules = [
            (f"the data of {folder}", read_manifest(folder).sha256, self.corpus),
            *((key, values[key], value) for key, value in self.required_values().items()),
        ]
        cpu = re.fullmatch(r"cpu, (\d+) threads", summary["device"])
        if self.threads and not (cpu and int(cpu[1]) * summary["world_size"] <= self.threads):
            rules.append(("device", summary["device"], f"cpu, {self.threads} threads at most"))
        for what, got, allowed in rules:
            require(
                got == allowed,
                f"{what} of a record of {name}",
                got=repr(got),
                allowed=repr(allowed),
                fix=f"{self.fixed or 'another --track'}, or other runs",
                error=RecordError,
            )

    def required_values(self) -> dict[str, Any]:
        """Return the settings that every run of the track has: {"section.key": value}."""
        common = {"data.holdout": 0.0}
        if self.fixed is None:
            return common | {"train.eval_tokens": None}
        raw = tomllib.loads((ROOT / self.fixed).read_text(encoding="utf-8"))
        base = configuration.flat(configuration.from_dict(Config, raw))
        model = {k: v for k, v in base.items() if k.startswith("model.")}
        return (
            common
            | {k: v for k, v in model.items() if k not in FREE_MODEL_KEYS}
            | {k: base[k] for k in ("train.batch_size", "train.eval_tokens")}
        )


# The mean end loss of tuned AdamW at 400 steps, 4 seeds (docs/log.md, 2026-11-23).
PYSOURCE_TARGET = 1.9346
TRACKS = {
    "pysource-cpu": Track(
        "Python source by bytes, 4,096 tokens a step, 0.86 M parameters: "
        "steps to AdamW's loss at 400",
        PYSOURCE_TARGET,
        "steps",
        "4e1482b081f50655fa12297bf77d437f2085c7df5f058c7488b101127cd0e933",
        fixed="configs/tracks/pysource_cpu.toml",
    ),
    "shakespeare-cpu": Track(
        "Tiny Shakespeare by characters, the whole validation split, 2 CPU cores: "
        "training seconds to nanoGPT's own final loss",
        1.898,
        "seconds",
        "4676901879784a432c158f48cd91880148d1d1bfafb8802994e32d07af8ba072",
        threads=2,
    ),
    "fineweb-124m": Track(
        "The NanoGPT speedrun's optimization track: scripts, which were not run here",
        3.28,
        "steps",
        None,
        fixed="configs/track3_124m.toml",
    ),
}
