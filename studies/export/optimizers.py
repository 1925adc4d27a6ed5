"""The optimizers of a baseline, as code."""

import ast
import inspect
import re
import textwrap
from fnmatch import fnmatch
from typing import Any

import torch

from model import GPT
from optim import ModularNorm
from optim.baselines import BASELINES, Build, average_decay
from training.config import Config
from training.optimizer_state import parts_of

from .expressions import Expressions
from .run import refusal

OF_NORM = {"norms": "norm", "radii": "radius", "roles": "role"}  # of ModularNorm, and of Weight


def base_optimizers(model: GPT, norm: ModularNorm, config: Config, write: Expressions) -> str:
    """Return the function that builds a baseline's optimizers, with all their settings.

    torch's own of optim/baselines.py are written out by their groups; others are built as there.
    """
    recipe, o = BASELINES[config.optim.name], config.optim
    settings = {**o.step_settings(), **vars(config.baseline), "lr": o.lr, "polar": o.polar}
    taken = {k: settings[k] for k in recipe.hints}
    baseline = recipe(model.to_empty(device="cpu"), norm, **taken)
    parts = getattr(baseline, "optimizers", [baseline])
    torchs = all(getattr(torch.optim, type(part).__name__, None) is type(part) for part in parts)
    if recipe.build.__module__ != "optim.baselines" or not torchs:
        return built_optimizers(baseline, recipe.build, taken, config, write)
    every = [n for n, _ in model.named_parameters()]
    built = []
    for optimizer in parts:
        kind = type(optimizer).__name__
        groups = [
            f"dict(params=matching(model, {', '.join(map(repr, patterns(names, every)))}){options})"
            for options, names in names_by_options(optimizer).items()
        ]
        built.append(f"torch.optim.{kind}([{', '.join(groups)}], lr={config.optim.lr!r})")
    return (
        "def base_optimizers(model: GPT) -> list[torch.optim.Optimizer]:\n"
        f"    return [{', '.join(built)}]"
    )


def built_optimizers(
    baseline: torch.optim.Optimizer,
    build: Build,
    settings: dict[str, Any],
    config: Config,
    write: Expressions,
) -> str:
    """Return the function that builds a baseline's optimizer by the function that registered it.

    Groups are then as the run has them: each with its own lr, auxiliary unless its average decays
    by the setting beta (optim/baselines.py, Recipe; training/baseline.py, share_lr).
    """
    parts = getattr(baseline, "optimizers", [baseline])
    modes = [p for p in parts_of(baseline) if hasattr(p, "train") and hasattr(p, "eval")]
    if any(part not in parts for part in modes):
        allowed = "an optimizer with train() and eval() that no other optimizer wraps"
        raise refusal("optim.name", config.optim.name, allowed)
    arguments = ["model", _norm(build, config, write)]
    arguments += [f"{k}={write.of(v)}" for k, v in settings.items()]
    lines = [
        "def base_optimizers(model: GPT) -> list[torch.optim.Optimizer]:",
        f"    optimizer = {write.name(build)}({', '.join(arguments)})",
        "    for group in optimizer.param_groups:",
        f"        if {write.name(average_decay)}(group) != {settings.get('beta')!r}:",
        '            group["auxiliary"] = True',
        '        group["lr"] = float(group["lr"]) * group.get("lr_scale", 1.0)',
        *(["    set_mode([optimizer], 'train')"] if modes else []),
        "    return [optimizer]",
    ]
    return "\n".join(lines)


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
    keywords = ", ".join(f"{k}={v}" for k, v in given.items())
    return f"{write.name(ModularNorm)}({keywords})" if given else "None"


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
