"""Ends of a run: refusals, which say what was got, what is allowed and the fix, and signals."""

import signal
from pathlib import Path

from optim.errors import Refusal


class ConfigError(Refusal):
    """A configuration that cannot be used: the key, what was got, what is allowed."""


class RunError(Refusal):
    """A run that cannot start, or go on, on this machine."""


class RankError(RunError):
    """A RunError of one rank, before ranks can tell each other."""


class Stopped(Exception):
    """A signal ended the run at this step, with a checkpoint where there are any."""

    def __init__(self, number: int, step: int, folder: Path, *, saved: bool) -> None:
        end = f"ended at step {step}, not saved"
        if saved:
            end = f"saved step {step} in {folder}; --run.name {folder.name} --run.resume goes on"
        super().__init__(f"{signal.Signals(number).name}: {end}")
        self.code = 128 + number
