"""The optimizers of a baseline, as code."""

import ast
import inspect
import re
import textwrap
from fnmatch import fnmatch

import torch

from model import GPT
from optim import ModularNorm
from optim.baselines import BASELINES, Build
from training.config import Config

from .expressions import Expressions
from .run import refusal

OF_NORM = {"norms": "norm", "radii": "radius", "roles": "role"}  # of ModularNorm, and of Weight


def base_optimizers(model: GPT, norm: ModularNorm, config: Config, write: Expressions) -> str:
    """Return the function that builds a baseline's optimizers, with all their settings.

    torch's own of optim/baselines.py are written out by their groups; others are built as there.
    """
    recipe = BASELINES[config.optim.name]
    if recipe.build.__module__ != "optim.baselines":
        return built_optimizers(config, write)
    settings = config.optim.step_settings() | vars(config.baseline)
    baseline = recipe(model.to_empty(device="cpu"), norm, lr=config.optim.lr, **settings)
    every = [n for n, _ in model.named_parameters()]
    built = []
    for optimizer in getattr(baseline, "optimizers", [baseline]):
        kind = type(optimizer).__name__
        if getattr(torch.optim, kind, None) is not type(optimizer):
            return built_optimizers(config, write)
        groups = [
            f"dict(params=matching(model, {', '.join(map(repr, patterns(names, every)))}){options})"
            for options, names in names_by_options(optimizer).items()
        ]
        built.append(f"torch.optim.{kind}([{', '.join(groups)}], lr={config.optim.lr!r})")
    return (
        "def base_optimizers(model: GPT) -> list[torch.optim.Optimizer]:\n"
        f"    return [{', '.join(built)}]"
    )


def built_optimizers(config: Config, write: Expressions) -> str:
    """Return the function that builds a baseline's optimizer by the function that registered it."""
    recipe, o = BASELINES[config.optim.name], config.optim
    settings = {**o.step_settings(), **vars(config.baseline), "lr": o.lr, "polar": o.polar}
    arguments = ["model", _norm(recipe.build, config, write)]
    arguments += [f"{k}={write.of(settings[k])}" for k in recipe.hints]
    return (
        "def base_optimizers(model: GPT) -> list[torch.optim.Optimizer]:\n"
        f"    optimizer = {write.name(recipe.build)}({', '.join(arguments)})\n"
        "    for group in optimizer.param_groups:\n"
        '        group["lr"] = optimizer.defaults["lr"] * group.get("lr_scale", 1.0)\n'
        f"        set_beta(group, {o.beta!r})\n"
        "    return [optimizer]"
    )


def _norm(build: Build, config: Config, write: Expressions) -> str:
    """Return the code of a baseline's second argument: what it asks of the modular norm."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(build)))
    name = [*inspect.signature(build).parameters][1]
    whole = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == name]
    parts = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.value in whole]
    asked = {n.attr for n in parts} | ({*OF_NORM} if len(whole) > len(parts) else set())
    other = next(iter(asked - OF_NORM.keys()), None)
    if other:
        allowed = f"a function that asks {', '.join(OF_NORM)} of its norm, and not {other}"
        raise refusal("optim.name", config.optim.name, allowed)
    given = {k: f"{{w.name: w.{v} for w in WEIGHTS}}" for k, v in OF_NORM.items() if asked}
    parts = ", ".join(f"{k}={v}" for k, v in given.items())
    return f"{write.name(ModularNorm)}({parts})" if given else "None"


def names_by_options(optimizer: torch.optim.Optimizer) -> dict[str, list[str]]:
    """Return {an optimizer's options of a group, as code: the names of its weights}."""
    accepted = inspect.signature(type(optimizer)).parameters
    names: dict[str, list[str]] = {}
    for group in optimizer.param_groups:
        options = {k: v for k, v in group.items() if k in accepted and k != "params"}
        options = {k: v for k, v in options.items() if v != accepted[k].default}
        options["lr"] = group["lr"] * group.get("lr_scale", 1.0)
        if group.get("auxiliary"):
            options["auxiliary"] = True
        code = "".join(f", {k}={v!r}" for k, v in options.items())
        names.setdefault(code, []).extend(group["param_names"])
    return names


def patterns(names: list[str], every: list[str]) -> list[str]:
    """Return patterns of fnmatch for these names and no other; where layers differ, the names."""
    short = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", n) for n in names))
    matched = {n for n in every for pattern in short if fnmatch(n, pattern)}
    return short if matched == set(names) else names
