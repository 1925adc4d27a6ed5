"""The sizes of a study of transfer: models, batches and horizons along an axis.

The axes are width (model.n_embd, at the configuration's width of a head), depth (model.n_layer),
context (model.block_size, at its tokens a step), batch (train.batch_size) and horizon
(train.steps). A batch may vary at equal tokens: the steps of a run are then fewer as it grows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from training.config import Config

from .runs import StudyError


@dataclass(frozen=True)
class Axis:
    """key: the setting that --<option> varies. letter: in the names of runs."""

    option: str
    key: str
    letter: str


AXES = {
    "width": Axis("widths", "model.n_embd", "w"),
    "depth": Axis("depths", "model.n_layer", "d"),
    "context": Axis("contexts", "model.block_size", "t"),
    "batch": Axis("batches", "train.batch_size", "b"),
    "horizon": Axis("horizons", "train.steps", "n"),
}
Size = tuple[int, ...]  # a value of each axis, in this order
BATCH, HORIZON = list(AXES).index("batch"), list(AXES).index("horizon")
# The factor of a learning rate by the ratio of its batch to the one it was given for.
BATCH_RULES: dict[str, Callable[[float], float]] = {"constant": lambda _: 1.0, "sqrt": math.sqrt}


@dataclass(frozen=True)
class Line:
    """Sizes that differ along one axis."""

    axis: str
    sizes: tuple[Size, ...]

    def values(self) -> list[int]:
        """Return the value of the axis at each size."""
        return [size[list(AXES).index(self.axis)] for size in self.sizes]

    @property
    def at_equal_tokens(self) -> bool:
        """Return whether the batch varies and all sizes train on as many tokens."""
        return self.axis == "batch" and len({size[HORIZON] for size in self.sizes}) > 1

    def __str__(self) -> str:
        values, moving = self.values(), (self.axis, "horizon" * self.at_equal_tokens)
        fixed = [f"{a} {v}" for a, v in zip(AXES, self.sizes[0], strict=True) if a not in moving]
        if self.at_equal_tokens:
            fixed.append(f"{self.sizes[0][BATCH] * self.sizes[0][HORIZON]} sequences")
        return f"{self.axis} {values[0]} … {values[-1]} ({', '.join(fixed)})"


def base_size(base: Config) -> Size:
    """Return the size of a configuration."""
    c, t = base.model, base.train
    return c.n_embd, c.n_layer, c.block_size, t.batch_size, t.steps


def settings_at(base: Config, size: Size) -> dict[str, Any]:
    """Return the settings of `base` at another size.

    Raises StudyError for a width that heads do not divide, and for a context that does not divide
    the tokens of a step.
    """
    width, depth, context, batch, steps = size
    tokens, head = base.model.block_size * batch, base.model.n_embd // base.model.n_head
    for option, got, fits, allowed in (
        ("--widths", width, width % head == 0, f"a multiple of {head}, the width of a head"),
        (
            "--contexts",
            context,
            tokens % context == 0,
            f"a divisor of {tokens}, the tokens of a step",
        ),
    ):
        if not fits:
            raise StudyError(
                option, got=got, allowed=allowed, fix="other sizes, or another configuration"
            )
    return {
        "model.n_embd": width,
        "model.n_head": width // head,
        "model.n_layer": depth,
        "model.block_size": context,
        "train.batch_size": tokens // context,
        "train.steps": steps,
    }


def run_name(size: Size, lr: float, seed: int) -> str:
    """Return the name of a run; a name has no plus sign."""
    sizes = ".".join(
        f"{axis.letter}{value}" for axis, value in zip(AXES.values(), size, strict=True)
    )
    return f"{sizes}.lr{lr:g}.s{seed}".replace("+", "")


def lines_through(base: Size, values: dict[str, list[int]], *, grid: bool) -> list[Line]:
    """Return a line for each axis with two values or more, the others as in `base`.

    An axis with one value sets it for all lines. grid: a line for each combination of the others'
    values.
    """
    lines = []
    for i, axis in enumerate(AXES):
        varied = sorted(set(values[axis]))
        if len(varied) < 2:
            continue
        others = [
            sorted(set(values[a]))
            if j != i and values[a] and (grid or len(values[a]) == 1)
            else [base[j]]
            for j, a in enumerate(AXES)
        ]
        for size in itertools.product(*others):
            lines.append(Line(axis, tuple((*size[:i], v, *size[i + 1 :]) for v in varied)))
    return lines


def with_equal_tokens(line: Line, base: Size) -> Line:
    """Return a line whose sizes train on the tokens that their steps have at the batch of `base`.

    Raises StudyError for a batch that does not divide them.
    """
    sizes = []
    for size in line.sizes:
        *others, batch, steps = size
        sequences = base[BATCH] * steps
        if batch < 1 or sequences % batch:
            raise StudyError(
                "--batch-sizes",
                got=batch,
                allowed=f"a divisor of {sequences}, the sequences of a run",
                fix="other sizes, or other --train.steps",
            )
        sizes.append((*others, batch, sequences // batch))
    return Line(line.axis, tuple(sizes))
