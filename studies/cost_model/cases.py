"""The models that are counted: the project's configurations and published ones."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from model import GPT
from models import ModelConfig, build
from optim.directions import DIRECTIONS
from optim.errors import require
from optim.polar import Polar
from training.config import OptimConfig, load

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Case:
    """A model and one step of it. sequences: of block_size tokens, over all GPUs."""

    name: str
    model: ModelConfig
    sequences: int
    optim: OptimConfig = field(default_factory=OptimConfig)

    @staticmethod
    def of_config(path: Path, name: str | None = None) -> "Case":
        """Return the case of a training run.

        Raises Refusal for a setting whose cost is not counted.
        """
        config = load([str(path)])
        o, vocab_size = config.optim, config.model.vocab_size
        by_rows = "directions that need no whole weight: others are not counted"
        second = "a number: the second dualization of auto is not counted"
        for key, value, counted, allowed in (
            ("optim.lr", o.lr, not isinstance(o.lr, str), second),
            ("optim.scale", o.scale, o.scale == "unit", "unit: dual norms are not counted"),
            (
                "optim.constraint",
                o.constraint,
                o.constraint is None,
                "none: retractions are not counted",
            ),
            ("optim.direction", o.direction, DIRECTIONS[o.direction].by_rows, by_rows),
            (
                "model.vocab_size",
                vocab_size,
                vocab_size is not None,
                "a number: no tokenizer is asked",
            ),
        ):
            require(
                counted,
                f"{path}: {key}",
                got=repr(value),
                allowed=allowed,
                fix="a copy of the file with it",
            )
        return Case(name or path.stem, config.model, config.train.batch_size, o)

    @staticmethod
    def published(name: str, layers: int, heads: int, width: int, sequences: int) -> "Case":
        """Return the case of a published shape, with 2,048 tokens a sequence."""
        model = ModelConfig(layers, heads, width, block_size=2048, vocab_size=50304)
        return Case(name, model, sequences)

    def gpt(self, polar: Polar) -> GPT:
        """Return the model without numbers; its norms are those of training with this factor."""
        norms = self.optim.norms.build(polar, self.model.n_head)
        with torch.device("meta"):
            return build(self.model, norms).to(getattr(torch, self.optim.param_dtype))

    @property
    def polar(self) -> Polar:
        """Return the polar factor of training on an accelerator: dtype auto is bfloat16 there."""
        polar = self.optim.polar
        return replace(polar, dtype="bfloat16") if polar.dtype == "auto" else polar


def family() -> dict[str, Case]:
    """Return the family by name, from 124M to 1T weights.

    Shapes and batches: configs/; Brown et al., arXiv 2005.14165, table 2.1 (2 M tokens as 1024 ×
    2048, 3.2 M as 1600 × 2048; 13B is 5120 wide, its 40 heads of 128, where the table says 5140);
    Narayanan et al., arXiv 2104.04473, table 1 (1T, 3072 sequences of 2048). Vocabulary as in
    configs/.
    """
    members = [
        *(Case.of_config(CONFIGS / f"gpt2_{n.lower()}.toml", n) for n in ("124M", "350M", "1.5B")),
        Case.published("6.7B", 32, 32, 4096, 1024),
        Case.published("13B", 40, 40, 5120, 1024),
        Case.published("175B", 96, 96, 12288, 1600),
        Case.published("1T", 128, 160, 25600, 3072),
    ]
    return {case.name: case for case in members}
