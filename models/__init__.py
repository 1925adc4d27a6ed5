"""The models that a configuration can name: the GPT of model.py, and its forks beside this file.

A fork is a file with a subclass of GPT and its settings. To add one, import it here and name it in
MODELS; if it has settings of its own, ModelConfig has to inherit them.
"""

from dataclasses import Field, dataclass, fields
from typing import Annotated, Any

import torch

from model import GPT, GPTConfig
from optim import ModularNorm, metrize
from optim.errors import require
from optim.roles import Norms
from optim.settings import OneOf

from .ngram import NgramConfig, NgramGPT
from .track3 import Track3Config, Track3GPT

# Each model with the settings that it has.
MODELS: dict[str, tuple[type[GPT], type[GPTConfig]]] = {
    "gpt": (GPT, GPTConfig),
    "track3": (Track3GPT, Track3Config),
    "ngram": (NgramGPT, NgramConfig),
}


@dataclass
class ModelConfig(NgramConfig):
    """The model, by name. Settings of other models must be at their defaults."""

    name: Annotated[str, OneOf(MODELS)] = "gpt"
    """"gpt" is the GPT of model.py. "track3" has the parts of the speedrun's optimization track,
    and other residual streams and initial weights for comparisons (models/track3.py). "ngram" adds
    tables of n-grams and matches (models/ngram.py)."""

    def check(self) -> None:
        """Raise Refusal for what cannot be built, and for settings of other models."""
        super().check()
        for f in settings_of_others(self.name):
            value = getattr(self, f.name)
            require(
                value == f.default,
                f"model.{f.name}",
                got=value,
                allowed=f"{f.default} with model.name = {self.name!r}",
                fix=f"--model.name {' or '.join(models_with(f.name))}",
            )


def settings_of_others(name: str) -> list[Field[Any]]:
    """Return the settings that the model of this name has not, because only others have them."""
    return [f for f in fields(ModelConfig) if f.name != "name" and name not in models_with(f.name)]


def models_with(setting: str) -> list[str]:
    """Return the names of the models that have a setting."""
    return [
        name for name, (_, config) in MODELS.items() if setting in {f.name for f in fields(config)}
    ]


def build(
    config: ModelConfig, norms: Norms | None = None, generator: torch.Generator | None = None
) -> GPT:
    """Return the model that config.name names.

    norms: by role. generator: of the initial weights; on the meta device there are none.
    """
    model, _ = MODELS[config.name]
    return model(config, norms, generator)


def build_model_and_norm(
    config: Any, generator: torch.Generator | None = None
) -> tuple[GPT, ModularNorm]:
    """Return the model of a run's configuration, and the modular norm of its weights.

    config: has the sections model and optim of training/config.py. generator: of the initial
    weights. The default device counts: under torch.device("meta") the weights take no memory.
    """
    optim = config.optim
    model = build(config.model, optim.norms.build(optim.polar, config.model.n_head), generator)
    norm = metrize(model, model.structure(optim.masses))
    return model, norm.unweighted() if optim.composition == "max" else norm
