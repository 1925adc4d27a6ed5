"""The models that a configuration can name: the GPT of model.py, and its forks beside this file.

A fork is a file with a subclass of GPT and its settings. One of this folder is imported and
registered here; if it has settings of its own, ModelConfig has to inherit them. Any other is a
plugin, which uses register_model itself (docs/extend.md).
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from typing import Annotated, Any, TypeVar

import torch

from model import GPT, GPTConfig
from optim import ModularNorm, metrize
from optim.errors import require
from optim.plugins import require_free
from optim.roles import Norms
from optim.settings import OneOf, allowed, extended, fits, help_texts, hints_of

from .ngram import NgramConfig, NgramGPT
from .track3 import Track3Config, Track3GPT

# Each model with the settings that it has.
MODELS: dict[str, tuple[type[GPT], type[GPTConfig]]] = {}
M = TypeVar("M", bound=type[GPT])


def register_model(name: str, settings: type[GPTConfig]) -> Callable[[M], M]:
    """Make a model known by name, so that configurations can name it.

    The class is a subclass of GPT. settings: a dataclass that extends GPTConfig, or the settings of
    a fork; its fields are keys of [model], each with a default and a docstring under it.
    """

    def register(cls: M) -> M:
        what = f"register_model: {name}"
        present = MODELS[name][0] if name in MODELS else None
        require_free("register_model", name, cls, present)
        require(
            inspect.isclass(cls) and issubclass(cls, GPT),
            what,
            got=repr(cls),
            allowed="a subclass of GPT",
            fix="class Mine(GPT)",
        )
        require(
            inspect.isclass(settings)
            and issubclass(settings, GPTConfig)
            and "__dataclass_fields__" in vars(settings),
            what,
            got=f"settings that are {settings!r}",
            allowed="a dataclass that extends GPTConfig",
            fix=f'@register_model("{name}", GPTConfig), or @dataclass above your class of settings',
        )
        for f in fields(settings):
            _check_setting(name, settings, f)
        MODELS[name] = cls, settings
        return cls

    return register


def _check_setting(name: str, settings: type[GPTConfig], f: Field[Any]) -> None:
    """Raise Refusal for a setting without default or text, or declared otherwise elsewhere."""
    hint = hints_of(settings)[f.name]
    others = [
        (hints_of(other)[f.name], g.default)
        for model, (_, other) in MODELS.items()
        for g in fields(other)
        if g.name == f.name and model != name
    ]
    example = f'{f.name}: int = 1, and """what it is""" on the line below'
    rows = (
        (f.name != "name", "a name that [model] has", "another name", "rename it"),
        (f.default is not MISSING, "no default", "a number, a text or a switch", example),
        (f.name in help_texts(settings), "no text under it", "a text, for --help", example),
        (fits(hint, f.default), f"the default {f.default!r}", allowed(hint), example),
        (
            all(other == (hint, f.default) for other in others),
            f"{allowed(hint)}, by default {f.default!r}",
            "the type and the default with which another model declares it",
            "rename it",
        ),
    )
    for fine, got, words, fix in rows:
        require(fine, f"register_model: {f.name} of {name}", got=got, allowed=words, fix=fix)


register_model("gpt", GPTConfig)(GPT)
register_model("track3", Track3Config)(Track3GPT)
register_model("ngram", NgramConfig)(NgramGPT)


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
        for f in settings_of_others(self.name, type(self)):
            value = getattr(self, f.name)
            require(
                value == f.default,
                f"model.{f.name}",
                got=value,
                allowed=f"{f.default} with model.name = {self.name!r}",
                fix=f"--model.name {' or '.join(models_with(f.name))}",
            )
        if (own := own_settings(self)) is not self:
            own.check()


def model_config() -> type[ModelConfig]:
    """Return ModelConfig with the settings of every model that is registered now."""
    return _model_config(tuple(settings for _, settings in MODELS.values()))


@cache
def _model_config(classes: tuple[type[GPTConfig], ...]) -> type[ModelConfig]:
    """Return ModelConfig with the settings that these classes have and it has not."""
    declared = {
        f.name: (hints_of(cls)[f.name], f.default, help_texts(cls)[f.name])
        for cls in classes
        for f in fields(cls)
    }
    return extended(ModelConfig, declared)


def own_settings(config: ModelConfig) -> GPTConfig:
    """Return a configuration as the class of settings that its model was registered with."""
    _, settings = MODELS[config.name]
    if isinstance(config, settings):
        return config
    return settings(**{f.name: getattr(config, f.name) for f in fields(settings)})


def settings_of_others(name: str, cls: type[ModelConfig] = ModelConfig) -> list[Field[Any]]:
    """Return the settings that the model of this name has not, because only others have them.

    cls: whose settings are asked for; by default those of the models in this folder.
    """
    return [f for f in fields(cls) if f.name != "name" and name not in models_with(f.name)]


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
    return model(own_settings(config), norms, generator)


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
