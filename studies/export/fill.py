"""Code that is filled into a script: its weights, a baseline's optimizers, settings, data."""

import inspect
import re
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import torch

from data.shards import read_manifest
from model import GPT
from optim import ModularNorm
from optim.baselines import BASELINES
from optim.errors import require
from optim.norms import Norm
from training.config import Config

from .run import STEP, refusal
from .specialise import ExportError


def filled_in(
    config: Config, model: GPT, norm: ModularNorm, *, data: str, track: bool
) -> dict[str, str]:
    """Return {name in script.py: the statements that define it}.

    model: on the meta device. data: the folder of the script's data.
    """
    code = {
        "DATA": f"DATA = {data!r}",
        "CODE": "CODE = Path(__file__).read_text(encoding='utf-8')",
        "POLAR": f"POLAR = {config.optim.polar!r}",
        "SETTINGS": f"SETTINGS: Group = { {k: getattr(config.optim, k) for k in STEP}!r}",
        "ROLES": f"ROLES: dict[str, Group] = {config.optim.roles.given()!r}",
        "WEIGHTS": weights(norm, config),
    }
    if not track:
        splits = read_manifest(Path(config.data.dataset)).splits
        shards = {k: {s.file: s.sha256 for s in splits[k].shards} for k in ("train", "val")}
        code["SHARDS"] = f"SHARDS = {shards!r}"
    if config.optim.name != "dualized":
        code["base_optimizers"] = base_optimizers(model, norm, config)
    return code


# ---- weights


def weights(norm: ModularNorm, config: Config) -> str:
    """Return WEIGHTS in the order of initialization, blocks as a table.

    Of Weight's fields they have those that the run uses.
    """
    used = ["name", "role"]
    used += ["norm"] if config.optim.name == "dualized" or config.model.init == "norm" else []
    used += ["radius"] if config.optim.name == "dualized" else []
    L, names = config.model.n_layer, list(norm.norms)

    def row(name: str, radius: str) -> str:
        first = name.format(0)
        values = {
            "name": repr(name),
            "role": repr(norm.roles[first]),
            "norm": expression(norm.norms[first], config),
            "radius": radius,
        }
        return ", ".join(values[k] for k in used)

    def radii(name: str) -> str:
        by_layer = [norm.radii[name.format(i)] for i in range(L)]
        return f"[{by_layer[0]!r}] * {L}" if len(set(by_layer)) == 1 else repr(by_layer)

    inside = [n.replace("blocks.0.", "blocks.{}.", 1) for n in names if n.startswith("blocks.0.")]
    start = names.index(inside[0].format(0))
    before, after = names[:start], names[start + L * len(inside) :]
    require(
        names == [*before, *(n.format(i) for i in range(L) for n in inside), *after],
        "the model's structure",
        got="blocks that differ",
        allowed="L blocks with the same weights, one after the other",
        fix="studies/export/fill.py, weights",
        error=ExportError,
    )
    single = {n: f"Weight({row(n, repr(norm.radii[n]))})" for n in (*before, *after)}
    table = ", ".join(f"({row(n, radii(n))})" for n in inside)
    columns = ", ".join(used).replace("radius", "radii")
    cells = ", ".join({"name": "name.format(i)", "radius": "radii[i]"}.get(k, k) for k in used)
    blocks = f"*(Weight({cells}) for i in range({L}) for {columns} in BLOCK)"
    rows = [*(single[n] for n in before), blocks, *(single[n] for n in after)]
    return f"BLOCK = [{table}]\nWEIGHTS = [{', '.join(rows)}]"


def expression(norm: Norm, config: Config) -> str:
    """Return the expression that makes a norm, without what is at its default."""
    if not type(norm).__module__.startswith("optim."):
        raise refusal("optim.norms", norm, "norms of optim/norms.py")
    options = []
    for f in fields(norm):  # type: ignore[arg-type]
        value = getattr(norm, f.name)
        if f.init and value != f.default:
            inner = expression(value, config) if isinstance(value, Norm) else repr(value)
            options.append(f"{f.name}={'POLAR' if value == config.optim.polar else inner}")
    return f"{type(norm).__name__}({', '.join(options)})"


# ---- a baseline's optimizers


def base_optimizers(model: GPT, norm: ModularNorm, config: Config) -> str:
    """Return the function that builds a baseline's optimizers, with all their settings."""
    settings = config.optim.step_settings() | vars(config.baseline)
    recipe = BASELINES[config.optim.name]
    baseline = recipe(model.to_empty(device="cpu"), norm, lr=config.optim.lr, **settings)
    every = [n for n, _ in model.named_parameters()]
    built = []
    for optimizer in getattr(baseline, "optimizers", [baseline]):
        kind = type(optimizer).__name__
        if getattr(torch.optim, kind, None) is not type(optimizer):
            allowed = f"optimizers of torch.optim, not {kind}"
            raise refusal("optim.name", config.optim.name, allowed)
        groups = [
            f"dict(params=matching(model, {', '.join(map(repr, patterns(names, every)))}){options})"
            for options, names in names_by_options(optimizer).items()
        ]
        built.append(f"torch.optim.{kind}([{', '.join(groups)}], lr={config.optim.lr!r})")
    return (
        "def base_optimizers(model: GPT) -> list[torch.optim.Optimizer]:\n"
        f"    return [{', '.join(built)}]"
    )


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
