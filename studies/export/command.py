"""A run as one self-contained Python script and its log, as the NanoGPT speedrun's optimization
track has them.

    python -m studies.export runs/NAME [--out FILE.py] [--log FILE.txt] [--format own|track3]
    python -m studies.export configs/track3_124m.toml --format track3 --out train_gpt_dualized.py

The script imports torch and the standard library alone, and has the run's settings written into it.
It logs its own code first, then the lines that the track's scripts log. It runs alone, or under
torchrun where the number of processes divides its micro-batches. Its one argument, as the track's,
is a number of trials, whose seeds count up from the run's. The step is optim/update.py itself, and
whatever else it needs of optim/ stands there as it stands here. model.py, models/ and
studies/export/script.py are specialised to the run (studies/export/bundle.py). A setting that the script cannot
carry is refused.

own: the run's own batches and evaluations, of corpora/NAME/ in the current folder, whose files must
have the run's sha256: the run's losses within 1e-4 on a device of its kind.
track3: the optimization track's order of data (side by side, data/fineweb10B/fineweb_*.bin) and
steps of evaluation; everything else is the configuration's.
--log: the log of the run that was, in the same form: the script, versions, the lines of
metrics.jsonl.
"""

import argparse
import inspect
import re
import sys
import tomllib
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from data.shards import read_manifest
from model import GPT
from models import MODELS, build
from optim import ModularNorm, metrize
from optim.baselines import BASELINES
from optim.errors import Refusal, require
from optim.norms import Norm
from optim.schedules import SCHEDULES
from optim.settings import StepSettings
from training import config as configuration
from training.config import Config
from training.provenance import git_state

from ..runs import ROOT, metrics, summary
from .bundle import bundle
from .specialise import ERASED, Code, ExportError

FILES = {
    "optim/errors.py": "Refusals",
    "optim/polar.py": "Polar factor",
    "optim/norms.py": "Norms, their duality maps, initial weights",
    "optim/views.py": "Norms of parts of a weight",
    "optim/directions.py": "Directions: what is dualized",
    "optim/update.py": "The step",
    "optim/schedules.py": "Schedules",
    "optim/baselines.py": "Schedules of torch's optimizers",
    "model.py": "Architecture",
    "models/{}.py": "Architecture: what this model adds",
    "studies/export/pcg64.py": "Random numbers",
    "studies/export/script.py": "Data, optimizer, training",
}
TRACK_SLOTS = 8  # micro-batches of 64 sequences: the track's scripts run on 1, 2, 4 or 8 GPUs
TRACK_DATA = "data/fineweb10B"
LINE = "=" * 100
# What a script carries out. All other settings must be at their defaults, but those that change
# nothing that it computes.
NOT_CARRIED, OF_STORAGE = ("momentum_dtype",), ("master_weights",)  # of a step
STEP = [f.name for f in fields(StepSettings) if f.name not in (*NOT_CARRIED, *OF_STORAGE)]
CARRIED = re.compile(
    r"(model|schedule|baseline|optim\.polar|optim\.norms|optim\.masses)\..*"
    r"|run\.(seed|device|precision|compile|threads)|data\.dataset"
    rf"|optim\.(name|composition)|optim\.(roles\.\w+\.)?({'|'.join(STEP)})"
    r"|train\.(steps|batch_size|gradient_accumulation_steps|eval_every|eval_tokens"
    r"|eval_batch_size|log_every)"
)
NEUTRAL = re.compile(
    r"run\.(name|dir|resume|parallel|shard_size|timeout)|data\.verify"
    rf"|optim\.({'|'.join(OF_STORAGE)}|auto\..*)"
    r"|train\.(target_loss|telemetry_every|sharpness_.*|checkpoint_every|keep_checkpoints"
    r"|max_nonfinite|pictures|sample_.*)"
)


@dataclass(frozen=True)
class Run:
    """What is exported.

    world: the processes that it was computed by. origin: a line for the script's docstring.
    """

    name: str
    config: Config
    world: int
    origin: str
    folder: Path | None = None


def read(source: Path) -> Run:
    """Return the run of a folder, or of a configuration file."""
    folder = source if source.is_dir() else None
    file = source / "config.toml" if folder else source
    require(
        file.is_file(),
        source,
        got=f"no {'config.toml in it' if folder else 'such file'}",
        allowed="a run's folder, or a configuration file",
        fix="another path",
        error=ExportError,
    )
    config = configuration.load([str(file)])
    if folder is None:
        config.run.name = file.stem  # not the time of now
        what = f"the configuration {file.name}, which was not run, by {_commit(*git_state())}"
        return Run(file.stem, config, 1, f"Exported from {what}.")
    found = summary(source)
    if found is None:
        allowed, fix = "a run that came to its end", "train_gpt.py … --run.resume"
        raise ExportError(source, got="no summary.json", allowed=allowed, fix=fix)
    what = f"the run {source.name} of {_commit(found['commit'], found['dirty'])}"
    return Run(source.name, config, found["world_size"], f"Exported from {what}.", source)


def _commit(commit: str | None, dirty: bool | None) -> str:
    changes = " with changes that were not committed" if dirty else ""
    return f"nanodual, commit {commit}{changes}" if commit else "nanodual"


def check(config: Config) -> None:
    """Raise ExportError for a setting that a script does not carry out."""
    default, o = configuration.flat(Config()), config.optim
    for key, value in configuration.flat(config).items():
        if value != default[key] and not CARRIED.fullmatch(key) and not NEUTRAL.fullmatch(key):
            raise _refusal(key, value, f"{default[key]!r}")
    exported = ("dualized", *(name for name, made in BASELINES.items() if not made.normed))
    ours = (ROOT / "optim/directions.py").read_text(encoding="utf-8")
    directions = {s.get("direction", o.direction) for s in (vars(o), *o.roles.given().values())}
    direction = next((d for d in directions if f'\n    "{d}": ' not in ours), None)
    shape, vocabulary = config.schedule.shape, config.model.vocab_size
    made_here = SCHEDULES[shape].__module__ == "optim.schedules"
    muon = o.name != "muon_adamw" or o.polar.dtype == "bfloat16"
    for key, value, fine, allowed in (
        ("optim.lr", o.lr, not isinstance(o.lr, str), "a number"),
        ("optim.name", o.name, o.name in exported, ", ".join(exported)),
        ("optim.direction", direction, not direction, "those of optim/directions.py"),
        ("schedule.shape", shape, made_here, "those of optim/schedules.py"),
        ("optim.polar.dtype", o.polar.dtype, muon, "'bfloat16', in which torch's Muon iterates"),
        ("run.device", config.run.device, config.run.device in ("cpu", "cuda"), "cpu, cuda"),
        ("run.precision", config.run.precision, config.run.precision != "auto", "fp32, bf16"),
        ("model.vocab_size", vocabulary, vocabulary is not None, "a number"),
    ):
        if not fine:
            raise _refusal(key, value, allowed)


def _refusal(key: str, value: object, allowed: str) -> ExportError:
    return ExportError(
        f"{key} of an exported run",
        got=repr(value),
        allowed=allowed,
        fix="another run, or studies/export/script.py, which has to do what it asks for",
    )


def script(run: Run, *, track: bool = False) -> str:
    """Return the Python script of a run.

    track: with the optimization track's data order and evaluations.
    """
    config = _resolved(run)
    check(config)
    slots = TRACK_SLOTS if track else config.train.gradient_accumulation_steps * run.world
    if config.train.batch_size % slots:
        allowed = f"a multiple of {slots} micro-batches"
        raise _refusal("train.batch_size", config.train.batch_size, allowed)
    norms = config.optim.norms.build(config.optim.polar, config.model.n_head)
    with torch.device("meta"):
        model = build(config.model, norms)
    norm = metrize(model, model.structure(config.optim.masses))
    if config.optim.composition == "max":
        norm = norm.unweighted()
    dataset = Path(config.data.dataset)
    data = TRACK_DATA if track else f"corpora/{dataset.name}"
    filled = {
        "DATA": f"DATA = {data!r}",
        "CODE": "CODE = Path(__file__).read_text(encoding='utf-8')",
        "POLAR": f"POLAR = {config.optim.polar!r}",
        "SETTINGS": f"SETTINGS: Group = { {k: getattr(config.optim, k) for k in STEP}!r}",
        "ROLES": f"ROLES: dict[str, Group] = {config.optim.roles.given()!r}",
        "WEIGHTS": _weights(norm, config),
    }
    if not track:
        splits = {k: read_manifest(dataset).splits[k].shards for k in ("train", "val")}
        shards = {k: {s.file: s.sha256 for s in split} for k, split in splits.items()}
        filled["SHARDS"] = f"SHARDS = {shards!r}"
    if config.optim.name != "dualized":
        filled["base_optimizers"] = _base_optimizers(model, norm, config)
    files = {file.format(config.model.name): title for file, title in FILES.items()}
    code = bundle(
        ROOT,
        {file: title for file, title in files.items() if (ROOT / file).is_file()},
        known=_known(config, slots, track),
        filled=filled,
        packages=("optim", "model", "models", "config"),
        whole=("optim/update.py",),
        unregistered=("register_schedule",),  # whose SCHEDULES would be a second one
    )
    order = "the optimization track's order" if track else "the run's order"
    return (
        f'"""{run.name}: {run.origin}\n\nData: {data}/, in {order}.\n'
        f'Alone, or under torchrun with a number of processes that divides {slots}.\n"""\n\n{code}'
    )


def _resolved(run: Run) -> Config:
    """Return a copy of a run's configuration, with what a script chooses by itself."""
    config = configuration.from_dict(Config, nested(run.config))
    if run.folder is None and config.run.device == "auto":
        config.run.device = "cuda"
    if config.optim.polar.dtype == "auto":
        low = config.run.precision == "bf16" or config.optim.name == "muon_adamw"
        config.optim.polar = replace(config.optim.polar, dtype="bfloat16" if low else "float32")
    return config


def nested(config: Config) -> dict[str, Any]:
    """Return a configuration as configuration.from_dict takes it: a copy can be changed."""
    return tomllib.loads(configuration.to_toml(config))


def _known(config: Config, slots: int, track: bool) -> dict[str, dict[str, Any]]:
    """Return what is known of the files that are specialised, as they ask for it."""
    of_model = {
        f"{owner}.{k}": v
        for owner in ("config", "c", "self.config")
        for k, v in vars(config.model).items()
    }
    of_model |= {
        "for (leaf, _) in self.structure().radii()": Code("for leaf in WEIGHTS"),
        "self.head.weight.is_meta": Code("False"),
    }
    # No text is generated: nothing is cached.
    cached = ("past", "cache", "before")
    of_model |= {f"{name} is None": Code("True") for name in cached}
    of_model |= {f"{name} is not None": Code("False") for name in cached}
    erased = ("config", "self.config", "config.check()", "norms", *cached, "before_BS")
    calls = ("cache.layers[i] if cache else None", "cache.extend(idx_BT) if cache else None")
    of_model |= dict.fromkeys((*erased, *calls), ERASED)
    at = "step, config.train.steps"
    lr = ", ".join(f"{k}=config.schedule.{k}" for k in ("warmup", "cooldown", "power"))
    beta = ", ".join(f"{k}=config.schedule.beta_{k}" for k in ("low", "warmup", "cooldown"))
    of_script = {f"config.{k}": v for k, v in configuration.flat(config).items()} | {
        "config.train.gradient_accumulation_steps": slots,
        "config.model": ERASED,
        f"config.schedule.lr_at({at})": Code(f"{config.schedule.shape}({at}, {lr})"),
        f"config.schedule.beta_at({at}, beta=beta)": Code(f"momentum_at({at}, beta=beta, {beta})"),
        "build": Code(MODELS[config.model.name][0].__name__),
        "TRACK": track,
    }
    of_models = dict.fromkeys(("model.py", f"models/{config.model.name}.py"), of_model)
    return {**of_models, "studies/export/script.py": of_script}


# ---- what is filled in


def _expression(norm: Norm, config: Config) -> str:
    """Return the expression that makes a norm, without what is at its default."""
    if not type(norm).__module__.startswith("optim."):
        raise _refusal("optim.norms", norm, "norms of optim/norms.py")
    options = []
    for f in fields(norm):  # type: ignore[arg-type]
        value = getattr(norm, f.name)
        if f.init and value != f.default:
            inner = _expression(value, config) if isinstance(value, Norm) else repr(value)
            options.append(f"{f.name}={'POLAR' if value == config.optim.polar else inner}")
    return f"{type(norm).__name__}({', '.join(options)})"


def _weights(norm: ModularNorm, config: Config) -> str:
    """Return WEIGHTS in the order of initialization, blocks as a table.

    Of Weight's fields they have those that the run uses.
    """
    used = ["name", "role"]
    used += ["norm"] if config.optim.name == "dualized" or config.model.init == "norm" else []
    used += ["radius"] if config.optim.name == "dualized" else []
    L, rows = config.model.n_layer, list(norm.norms)

    def written(name: str, radius: str) -> str:
        first = name.format(0)
        values = {
            "name": repr(name),
            "role": repr(norm.roles[first]),
            "norm": _expression(norm.norms[first], config),
            "radius": radius,
        }
        return ", ".join(values[k] for k in used)

    def radii(name: str) -> str:
        values = [norm.radii[name.format(i)] for i in range(L)]
        return f"[{values[0]!r}] * {L}" if len(set(values)) == 1 else repr(values)

    inside = [n.replace("blocks.0.", "blocks.{}.", 1) for n in rows if n.startswith("blocks.0.")]
    start = rows.index(inside[0].format(0))
    before, after = rows[:start], rows[start + L * len(inside) :]
    require(
        rows == [*before, *(n.format(i) for i in range(L) for n in inside), *after],
        "the model's structure",
        got="blocks that differ",
        allowed="L blocks with the same weights, one after the other",
        fix="studies/export/command.py, _weights",
        error=ExportError,
    )
    one = {n: f"Weight({written(n, repr(norm.radii[n]))})" for n in (*before, *after)}
    table = ", ".join(f"({written(n, radii(n))})" for n in inside)
    names = ", ".join(used).replace("radius", "radii")
    made = ", ".join({"name": "name.format(i)", "radius": "radii[i]"}.get(k, k) for k in used)
    blocks = f"*(Weight({made}) for i in range({L}) for {names} in BLOCK)"
    weights = [*(one[n] for n in before), blocks, *(one[n] for n in after)]
    return f"BLOCK = [{table}]\nWEIGHTS = [{', '.join(weights)}]"


def _base_optimizers(model: GPT, norm: ModularNorm, config: Config) -> str:
    """Return the function that builds a baseline's optimizers, with all their settings."""
    settings = config.optim.step_settings() | vars(config.baseline)
    built = BASELINES[config.optim.name](
        model.to_empty(device="cpu"), norm, lr=config.optim.lr, **settings
    )
    every, lines = [n for n, _ in model.named_parameters()], []
    for optimizer in getattr(built, "optimizers", [built]):
        kind = type(optimizer).__name__
        if getattr(torch.optim, kind, None) is not type(optimizer):
            allowed = f"optimizers of torch.optim, not {kind}"
            raise _refusal("optim.name", config.optim.name, allowed)
        known = inspect.signature(type(optimizer)).parameters
        groups: dict[str, list[str]] = {}  # names by settings
        for group in optimizer.param_groups:
            own = {k: v for k, v in group.items() if k in known and k != "params"}
            values = {k: v for k, v in own.items() if v != known[k].default}
            values["lr"] = group["lr"] * group.get("lr_scale", 1.0)
            if group.get("auxiliary"):
                values["auxiliary"] = True
            options = "".join(f", {k}={v!r}" for k, v in values.items())
            groups.setdefault(options, []).extend(group["param_names"])
        patterns = {o: ", ".join(map(repr, _patterns(n, every))) for o, n in groups.items()}
        parts = [f"dict(params=matching(model, {p}){o})" for o, p in patterns.items()]
        lines.append(f"torch.optim.{kind}([{', '.join(parts)}], lr={config.optim.lr!r})")
    return (
        "def base_optimizers(model: GPT) -> list[torch.optim.Optimizer]:\n"
        f"    return [{', '.join(lines)}]"
    )


def _patterns(names: list[str], every: list[str]) -> list[str]:
    """Return patterns of fnmatch for these names and no other; where layers differ, the names."""
    patterns = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", n) for n in names))
    matched = {n for n in every for p in patterns if fnmatch(n, p)}
    return patterns if matched == set(names) else names


# ---- the log of a run that was


def log_lines(run: Run) -> str:
    """Return versions, and metrics as the script logs them."""
    assert run.folder is not None
    found, steps = summary(run.folder), run.config.train.steps
    assert found is not None
    of = f"{run.name}, seed {run.config.run.seed}"
    by = f"train_gpt.py of {_commit(found['commit'], found['dirty'])}"
    on = f"{found['device']} with world_size {found['world_size']}"
    lines = [f"Running PyTorch {found['torch']} on {on}: {of}, by {by}", LINE]
    for r in metrics(run.folder):
        done, seconds = r["step"], r["train_seconds"]
        what = f"val_loss:{r['val_loss']:.5f}" if "val_loss" in r else f"train_loss:{r['loss']:.6f}"
        times = f"train_time:{seconds:.3f}s step_avg:{1000 * seconds / max(1, done):.2f}ms"
        lines.append(f"step:{done}/{steps} {what} {times}")
    return "\n".join(lines) + "\n"


def _write(flag: str, file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ExportError(
            flag,
            got=f"{file} ({error.strerror})",
            allowed="a file in a folder that is there",
            fix="mkdir, or another path",
        ) from error


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run's folder, or a configuration file")
    parser.add_argument("--out", type=Path, help="the script; by default it is printed")
    parser.add_argument("--log", type=Path, help="the run's log in this form")
    parser.add_argument("--format", choices=("own", "track3"), default="own")
    args = parser.parse_args(argv)
    try:
        run = read(args.run)
        code = script(run, track=args.format == "track3")
        if args.log and run.folder is None:
            raise ExportError(
                "--log",
                got=f"{args.run}, a configuration",
                allowed="with a run's folder",
                fix="leave it out, or train it first",
            )
        if args.out:
            _write("--out", args.out, code)
        elif not args.log:
            print(code, end="")
        if args.log:
            _write("--log", args.log, f"{code}\n{LINE}\n{log_lines(run)}")
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
