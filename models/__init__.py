"""The models that a configuration can name: the GPT of model.py, and those beside this file."""

from dataclasses import Field, dataclass, fields
from typing import Any, Literal

import torch

from model import GPT, GPTConfig
from optim import ModularNorm, metrize
from optim.errors import require
from optim.norms import Norm

from .ngram import NgramConfig, NgramGPT

# Each model with the settings that it has.
MODELS: dict[str, tuple[type[GPT], type[GPTConfig]]] = {
    "gpt": (GPT, GPTConfig),
    "ngram": (NgramGPT, NgramConfig),
}


@dataclass
class ModelConfig(NgramConfig):
    """The model, by name. Settings of other models must be at their defaults."""

    name: Literal["gpt", "ngram"] = "gpt"
    """"gpt" is the GPT of model.py; "ngram" adds tables of n-grams and matches (models/ngram.py)."""

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
    return [
        name for name, (_, config) in MODELS.items() if setting in {f.name for f in fields(config)}
    ]


def build(
    config: ModelConfig,
    norms: dict[str, Norm] | None = None,
    generator: torch.Generator | None = None,
) -> GPT:
    """Return the model that config.name names.

    norms: by role. generator: of the initial weights; on the meta device there are none.
    """
    model, _ = MODELS[config.name]
    return model(config, norms, generator)


def build_model_and_norm(
    config: Any, generator: torch.Generator | None = None
) -> tuple[GPT, ModularNorm]:
    """Return the model of a configuration, and the modular norm of its weights."""
    o = config.optim
    model = build(config.model, o.norms.build(o.polar, config.model.n_head), generator)
    norm = metrize(model, model.structure(o.masses))
    return model, norm.unweighted() if o.composition == "max" else norm
