"""Code that is filled into a script: its weights, a baseline's optimizers, settings, data."""

from pathlib import Path

from data.shards import read_manifest
from model import GPT
from models import own_settings
from optim import ModularNorm
from optim.baselines import BASELINES
from optim.directions import DIRECTIONS
from training.config import Config

from .expressions import Expressions
from .optimizers import base_optimizers
from .run import STEP, own_directions, used_directions
from .values import is_own


def filled_in(
    config: Config,
    model: GPT,
    norm: ModularNorm,
    write: Expressions,
    *,
    data: str,
    track: bool,
) -> dict[str, str]:
    """Return {name in script.py, or in a file before it: the statements that define it}.

    model: on the meta device. data: the folder of the script's data.
    """
    baseline = config.optim.name in BASELINES
    optimizers = base_optimizers(model, norm, config, write) if baseline else ""
    own = own_directions(config)
    directions = {name: DIRECTIONS[name] for name in (() if baseline else used_directions(config))}
    ours = {name: x for name, x in directions.items() if name not in own}
    others = {name: x for name, x in directions.items() if name in own}
    code = {
        "DATA": f"DATA = {data!r}",
        "CODE": "CODE = Path(__file__).read_text(encoding='utf-8')",
        "POLAR": f"POLAR = {config.optim.polar!r}",
        "SETTINGS": f"SETTINGS: Group = { {k: getattr(config.optim, k) for k in STEP}!r}",
        "ROLES": f"ROLES: dict[str, Group] = {config.optim.roles.given()!r}",
        "WEIGHTS": weights(norm, config, write, optimizers),
        "DIRECTIONS": f"DIRECTIONS: dict[str, Direction] = {write.of(ours)}",
        "OWN_DIRECTIONS": f"OWN_DIRECTIONS = {write.of(others)}",
        "base_optimizers": optimizers,
    }
    if not track:
        splits = read_manifest(Path(config.data.dataset)).splits
        shards = {k: {s.file: s.sha256 for s in splits[k].shards} for k in ("train", "val")}
        code["SHARDS"] = f"SHARDS = {shards!r}"
    return code | (own_model(config, type(model), write) if is_own(type(model)) else {})


def own_model(config: Config, model: type[GPT], write: Expressions) -> dict[str, str]:
    """Return {name in script.py: the statement that defines it} for the model of a plugin.

    It is not specialised: it takes its settings, and its norms by role.
    """
    write.name(model)
    settings = own_settings(config.model)
    norms = config.optim.norms.build(config.optim.polar, config.model.n_head)
    return {
        "MODEL": f"MODEL = {write.of(settings)}",
        "NORMS_BY_ROLE": f"NORMS_BY_ROLE = {write.of(norms)}",
    }


# ---- weights


def weights(norm: ModularNorm, config: Config, write: Expressions, optimizers: str) -> str:
    """Return WEIGHTS in the order of initialization, blocks that are alike as a table.

    Of Weight's fields they have those that the run uses. optimizers: the code of a baseline's.
    """
    dualized, drawn = config.optim.name == "dualized", config.model.init == "norm"
    used = ["name", "role"]
    used += ["norm"] if dualized or drawn or "w.norm " in optimizers else []
    used += ["radius"] if dualized or "w.radius " in optimizers else []
    L, names = config.model.n_layer, list(norm.norms)

    def row(name: str, radius: str) -> str:
        first = name.format(0)
        values = {
            "name": repr(name),
            "role": repr(norm.roles[first]),
            "norm": write.of(norm.norms[first]),
            "radius": radius,
        }
        return ", ".join(values[k] for k in used)

    def radii(name: str) -> str:
        by_layer = [norm.radii[name.format(i)] for i in range(L)]
        return f"[{by_layer[0]!r}] * {L}" if len(set(by_layer)) == 1 else repr(by_layer)

    inside = [n.replace("blocks.0.", "blocks.{}.", 1) for n in names if n.startswith("blocks.0.")]
    start = names.index(inside[0].format(0)) if inside else 0
    before, after = names[:start], names[start + L * len(inside) :]
    if not inside or names != [*before, *(n.format(i) for i in range(L) for n in inside), *after]:
        rows = [f"Weight({row(n, repr(norm.radii[n]))})" for n in names]
        return f"WEIGHTS = [{', '.join(rows)}]"
    single = {n: f"Weight({row(n, repr(norm.radii[n]))})" for n in (*before, *after)}
    table = ", ".join(f"({row(n, radii(n))})" for n in inside)
    columns = ", ".join(used).replace("radius", "radii")
    cells = ", ".join({"name": "name.format(i)", "radius": "radii[i]"}.get(k, k) for k in used)
    blocks = f"*(Weight({cells}) for i in range({L}) for {columns} in BLOCK)"
    rows = [*(single[n] for n in before), blocks, *(single[n] for n in after)]
    return f"BLOCK = [{table}]\nWEIGHTS = [{', '.join(rows)}]"
