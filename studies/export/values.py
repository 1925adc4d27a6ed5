"""The values of a run's configuration that the specialiser knows, by the file that uses them.

An entry is an expression as it is written in the file, with its value: a constant, other code, or
nothing, where a script has no such thing.
"""

from typing import Any

from model import GPT
from training import config as configuration
from training.config import Config

from .run import own_directions
from .specialise import ERASED, Code

SCRIPT = "studies/export/script.py"  # the script's end, which asks for all else


OWN_FILES = ("model.py", "models/generation.py", "models/track3.py", "models/ngram.py")


def is_own(model: type[GPT]) -> bool:
    """Return whether a model is a plugin's."""
    return model.__module__ != "model" and not model.__module__.startswith("models.")


def model_files(model: type[GPT]) -> dict[str, str]:
    """Return {file: the title of its part} of a model and of those that it extends, these first.

    Of a plugin's model they are all of ours.
    """
    if is_own(model):
        return {file: f"Architecture: {file}" for file in OWN_FILES}
    classes = [cls for cls in reversed(model.__mro__) if issubclass(cls, GPT)]
    files = {f"{cls.__module__.replace('.', '/')}.py": cls for cls in classes}
    titles = {file: f"Architecture: what {cls.__name__} adds" for file, cls in files.items()}
    return titles | {"model.py": "Architecture"}


def known_values(
    config: Config, model: type[GPT], *, slots: int, track: bool, modes: bool
) -> dict[str, dict[str, Any]]:
    """Return what is known in the files that are specialised, {file: {expression: value}}.

    slots: micro-batches of a step. track: with the optimization track's data order and evaluations.
    modes: the optimizer has other weights for an evaluation than for a gradient.
    """
    of_script = values_of_script(config, model, slots=slots, track=track)
    if not modes:
        calls = (f"set_mode(optimizer.optimizers, '{mode}')" for mode in ("eval", "train"))
        of_script |= dict.fromkeys(calls, ERASED)
    if is_own(model):
        return {SCRIPT: of_script}
    return {**dict.fromkeys(model_files(model), values_of_model(config)), SCRIPT: of_script}


def values_of_model(config: Config) -> dict[str, Any]:
    """Return what is known in the files of the model."""
    values = {
        f"{owner}.{key}": value
        for owner in ("config", "c", "self.config")
        for key, value in vars(config.model).items()
    }
    values |= {
        "for (leaf, _) in self.structure().radii()": Code("for leaf in WEIGHTS"),
        "self.head.weight.is_meta": Code("False"),
    }
    # No text is generated: nothing is cached.
    cached = ("past", "cache", "before")
    values |= {f"{name} is None": Code("True") for name in cached}
    values |= {f"{name} is not None": Code("False") for name in cached}
    erased = ["config", "self.config", "config.check()", "norms", *cached, "before_BS"]
    erased += ["cache.layers[i] if cache else None", "cache.text_BS if cache else None"]
    if config.model.init != "norm":  # a fork draws its weights, from no norm
        erased += ["p.copy_(leaf.norm.init(p.shape, generator))"]
    return values | dict.fromkeys(erased, ERASED)


def values_of_script(
    config: Config, model: type[GPT], *, slots: int, track: bool
) -> dict[str, Any]:
    """Return what is known in the script's end."""
    at = "step, config.train.steps"
    lr = ", ".join(f"{k}=config.schedule.{k}" for k in ("warmup", "cooldown", "power"))
    beta = ", ".join(f"{k}=config.schedule.beta_{k}" for k in ("low", "warmup", "cooldown"))
    values = {f"config.{k}": v for k, v in configuration.flat(config).items()} | {
        "config.train.gradient_accumulation_steps": slots,
        "config.model": Code("MODEL"),
        f"config.schedule.lr_at({at})": Code(f"{config.schedule.shape}({at}, {lr})"),
        f"config.schedule.beta_at({at}, beta=beta)": Code(f"momentum_at({at}, beta=beta, {beta})"),
        "build": Code(model.__name__),
        "TRACK": track,
    }
    if config.run.plugins:  # any part of them may draw random numbers
        values["config.model.dropout"] = True
    if not is_own(model):  # it is specialised to its settings, and its weights have their norms
        values |= dict.fromkeys(("config.model", "NORMS_BY_ROLE"), ERASED)
    if not own_directions(config):
        values |= dict.fromkeys(("OWN_DIRECTIONS", "DIRECTIONS.update(OWN_DIRECTIONS)"), ERASED)
    return values
