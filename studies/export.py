"""A run as one self-contained Python script and its log, in the form of the NanoGPT speedrun's optimization track.

    python -m studies.export runs/NAME [--out FILE.py] [--log FILE.txt] [--format own|track3]
    python -m studies.export configs/track3_124m.toml --format track3 --out train_gpt_dualized.py

The script imports torch and the standard library alone, has the run's settings written into it, logs its own code first and then the lines that the track's scripts log, and runs alone or under
torchrun where the number of processes divides its micro-batches; its one argument, as the track's, is a number of trials, whose seeds count up from the run's. Its code is that of
model.py, models/, optim/ and studies/script.py, specialised to the run (studies/bundle.py). A setting that it cannot carry is refused.

own: the run's own batches and evaluations, of corpora/NAME/ in the current folder, whose files must have the run's sha256: the run's losses within 1e-4 on a device of its kind.
track3: the optimization track's order of data (side by side, data/fineweb10B/fineweb_*.bin) and steps of evaluation; everything else is the configuration's.
--log: the log of the run that was, in the same form: the script, versions, the lines of metrics.jsonl.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

import config as configuration
from config import Config, ConfigError
from data.shards import DataError, Manifest, read_manifest
from model import GPT
from models import MODELS, build
from optim import BASELINES, DIRECTIONS, ModularNorm, Norm, Polar, metrize
from optim.errors import Refusal
from optim.settings import StepSettings
from runtime import git_state

from .bundle import ERASED, BundleError, Code, bundle
from .runs import ROOT, metrics, summary

FILES = {
    "optim/errors.py": "Refusals",
    "optim/polar.py": "Polar factor",
    "optim/norms.py": "Norms, their duality maps, initial weights",
    "optim/views.py": "Norms of parts of a weight",
    "optim/directions.py": "Direction: what is dualized",
    "optim/schedules.py": "Schedules",
    "optim/baselines.py": "Schedules of torch's optimizers",
    "model.py": "Architecture",
    "models/ngram.py": "Architecture: n-grams, matches, shifts",
    "studies/script.py": "Data, optimizer, training",
}
TRACK_SLOTS = 8  # micro-batches of 64 sequences: the track's scripts run on 1, 2, 4 or 8 GPUs
TRACK_DATA = "data/fineweb10B"
LINE = "=" * 100
# What a script carries out. All other settings must be at their defaults, but those that change nothing that it computes.
NOT_CARRIED, OF_STORAGE = ("momentum_dtype",), ("master_weights",)  # of a step
STEP = [f.name for f in fields(StepSettings) if f.name not in (*NOT_CARRIED, *OF_STORAGE)]
CARRIED = re.compile(
    r"(model|schedule|baseline|optim\.polar|optim\.norms|optim\.masses)\..*"
    r"|run\.(seed|device|precision|compile|threads)|data\.dataset"
    rf"|optim\.(name|composition|{'|'.join(STEP)})"
    r"|train\.(steps|batch_size|gradient_accumulation_steps|eval_every|eval_tokens|eval_batch_size|log_every)"
)
NEUTRAL = re.compile(
    r"run\.(name|dir|resume|parallel|shard_size|timeout)|data\.verify"
    rf"|optim\.({'|'.join(OF_STORAGE)}|auto\..*)"
    r"|train\.(target_loss|telemetry_every|sharpness_.*|checkpoint_every|keep_checkpoints|max_nonfinite|pictures|sample_.*)"
)


class ExportError(Refusal):
    """A run that no script can be made of: what was got, what is allowed, how to fix it."""


@dataclass(frozen=True)
class Run:
    """What is exported. world: the processes that it was computed by. origin: a line for the script's docstring."""

    name: str
    config: Config
    world: int
    origin: str
    folder: Path | None = None


def read(source: Path) -> Run:
    """Of a run folder, or a configuration file."""
    folder = source if source.is_dir() else None
    file = source / "config.toml" if folder else source
    if not file.is_file():
        raise ExportError(
            source,
            got=f"no {('config.toml in it' if folder else 'such file')}",
            allowed="a run's folder, or a configuration file",
            fix="another path",
        )
    config = configuration.load([str(file)])
    if folder is None:
        config.run.name = file.stem  # not the time of now
        commit, dirty = git_state()
        return Run(
            file.stem,
            config,
            1,
            f"Exported from the configuration {file.name}, which was not run, by {_commit(commit, dirty)}.",
        )
    found = summary(source)
    if found is None:
        raise ExportError(
            source,
            got="no summary.json",
            allowed="a run that came to its end",
            fix="train_gpt.py … --run.resume",
        )
    return Run(
        source.name,
        config,
        found["world_size"],
        f"Exported from the run {source.name} of {_commit(found['commit'], found['dirty'])}.",
        source,
    )


def _commit(commit: str | None, dirty: bool | None) -> str:
    return (
        f"nanodual, commit {commit}{' with changes that were not committed' if dirty else ''}"
        if commit
        else "nanodual"
    )


def check(config: Config) -> None:
    """Raise ExportError for a setting that a script does not carry out."""
    default, o = configuration.flat(Config()), config.optim
    exported = ("dualized", *(name for name, made in BASELINES.items() if not made.normed))
    for key, value in configuration.flat(config).items():
        if value != default[key] and not CARRIED.fullmatch(key) and not NEUTRAL.fullmatch(key):
            raise _refusal(key, value, f"{default[key]!r}")
    for key, value, fine, allowed in (
        ("optim.lr", o.lr, not isinstance(o.lr, str), "a number"),
        (
            "optim.name",
            o.name,
            o.name in exported,
            ", ".join(exported),
        ),
        (
            "optim.polar.dtype",
            o.polar.dtype,
            o.name != "muon_adamw" or o.polar.dtype == "bfloat16",
            "'bfloat16', in which torch.optim.Muon iterates",
        ),
        ("run.device", config.run.device, config.run.device in ("cpu", "cuda"), "cpu, cuda"),
        ("run.precision", config.run.precision, config.run.precision != "auto", "fp32, bf16"),
        (
            "model.vocab_size",
            config.model.vocab_size,
            config.model.vocab_size is not None,
            "a number",
        ),
    ):
        if not fine:
            raise _refusal(key, value, allowed)


def _refusal(key: str, value: object, allowed: str) -> ExportError:
    return ExportError(
        f"{key} of an exported run",
        got=repr(value),
        allowed=allowed,
        fix="another run, or studies/script.py, which has to do what it asks for",
    )


def script(run: Run, *, track: bool = False) -> str:
    """The Python script of a run; track: with the optimization track's data order and evaluations."""
    config = configuration.from_dict(Config, nested(run.config))
    if run.folder is None and config.run.device == "auto":
        config.run.device = "cuda"
    if config.optim.polar.dtype == "auto":
        low = config.run.precision == "bf16" or config.optim.name == "muon_adamw"
        config.optim.polar = replace(config.optim.polar, dtype="bfloat16" if low else "float32")
    check(config)
    slots = TRACK_SLOTS if track else config.train.gradient_accumulation_steps * run.world
    if config.train.batch_size % slots:
        raise _refusal(
            "train.batch_size", config.train.batch_size, f"a multiple of {slots} micro-batches"
        )
    with torch.device("meta"):
        model = build(
            config.model, config.optim.norms.build(config.optim.polar, config.model.n_head)
        )
    norm = metrize(model, model.structure(config.optim.masses))
    if config.optim.composition == "max":
        norm = norm.unweighted()
    dataset = Path(config.data.dataset)
    data = TRACK_DATA if track else f"corpora/{dataset.name}"
    filled = {
        "DATA": f"DATA = {data!r}",
        "CODE": "CODE = Path(__file__).read_text(encoding='utf-8')",
        **({} if track else {"SHARDS": _shards(read_manifest(dataset))}),
        **_weights(model, norm, config),
        **(
            {"base_optimizers": _base_optimizers(model, norm, config)}
            if config.optim.name != "dualized"
            else {}
        ),
    }
    files = {
        file: title
        for file, title in FILES.items()
        if not file.startswith("models/") or file == f"models/{config.model.name}.py"
    }
    try:
        code = bundle(
            ROOT,
            files,
            known=_known(config, slots, track),
            filled=filled,
            packages=("optim", "model", "models", "config"),
            stripped=("register_norm", "register_schedule"),
        )
    except BundleError as error:
        raise ExportError(
            "the code of this run",
            got=error,
            allowed="what studies/bundle.py can put into one file",
            fix="see there",
        ) from error
    order = "the optimization track's order" if track else "the run's order"
    return f'"""{run.name}: {run.origin}\n\nData: {data}/, in {order}. Alone, or under torchrun with a number of processes that divides {slots}.\n"""\n\n{code}'


def nested(config: Config) -> dict[str, Any]:
    """As configuration.from_dict takes it: a copy can be changed."""
    raw: dict[str, Any] = {}
    for key, value in configuration.flat(config).items():
        if value is not None:
            configuration.put(raw, key, value)
    return raw


def _known(config: Config, slots: int, track: bool) -> dict[str, dict[str, Any]]:
    """What the bundled files ask of the configuration, as they ask for it."""
    polar = config.optim.polar
    schedules = {polar.schedule, *(["cubic"] if config.optim.constraint == "stiefel" else [])}
    table = ast.parse((ROOT / "optim/polar.py").read_text(encoding="utf-8"))
    others = {
        ast.unparse(call): ERASED
        for call in ast.walk(table)
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) == "Schedule"
        and ast.literal_eval(call.args[0]) not in schedules
    }
    settings = {f"config.{k}": v for k, v in configuration.flat(config).items()} | {
        "config.train.gradient_accumulation_steps": slots
    }
    architecture = {
        f"{of}.{k}": v
        for of in ("config", "c", "self.config")
        for k, v in vars(config.model).items()
    }
    architecture |= {
        "for (leaf, _) in self.structure().radii()": Code("for leaf in WEIGHTS"),
        "self.head.weight.is_meta": Code("False"),
    }
    # No text is generated: nothing is cached.
    for name in ("past", "cache", "before"):
        architecture |= {
            name: ERASED,
            f"{name} is None": Code("True"),
            f"{name} is not None": Code("False"),
        }
    erased = (
        "config",
        "self.config",
        "config.check()",
        "norms",
        "cache.layers[i] if cache else None",
        "cache.extend(idx_BT) if cache else None",
    )
    architecture |= dict.fromkeys((*erased, "before_BS"), ERASED)
    return {
        "optim/polar.py": {f"self.{k}": v for k, v in vars(polar).items()} | others,
        **dict.fromkeys(("model.py", "models/ngram.py"), architecture),
        "studies/script.py": settings
        | {
            "build": Code(MODELS[config.model.name][0].__name__),
            "config.model": ERASED,
            "TRACK": track,
            "SCHEDULES[config.schedule.shape]": Code(config.schedule.shape),
        }
        | {"DIRECTIONS[config.optim.direction]": Code(_direction(config.optim.direction))},
    }


def _direction(name: str) -> str:
    """The expression that optim/directions.py has for it."""
    for node in ast.parse((ROOT / "optim/directions.py").read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.AnnAssign)
            and ast.unparse(node.target) == "DIRECTIONS"
            and isinstance(node.value, ast.Dict)
        ):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if key is not None and ast.literal_eval(key) == name:
                    return ast.unparse(value)
    raise _refusal(
        "optim.direction", name, f"those of optim/directions.py, not {DIRECTIONS[name]!r}"
    )


def _norm(norm: Any) -> str:
    """The expression that makes it, without what is at its default."""
    if isinstance(norm, Polar):
        return "Polar()"  # whose settings are written into its code
    if not isinstance(norm, Norm):
        return repr(norm)
    if not type(norm).__module__.startswith("optim."):
        raise _refusal("optim.norms", norm, "norms of optim/norms.py")
    options = []
    for f in fields(norm):  # type: ignore[arg-type]
        value = getattr(norm, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if f.init and (value != default and not isinstance(value, Polar)):
            options.append(f"{f.name}={_norm(value)}")
    return f"{type(norm).__name__}({', '.join(options)})"


def _weights(model: GPT, norm: ModularNorm, config: Config) -> dict[str, str]:
    """WEIGHTS in the order of initialization, blocks as a table; and the type of its rows, with what the run uses of it."""
    fields = {"name": "str", "role": "str"}
    dualized = config.optim.name == "dualized"
    if dualized or config.model.init == "norm":
        fields |= {"norm": "Norm"}
    if dualized:
        fields |= {"radius": "float"}
    L, rows = config.model.n_layer, list(norm.norms)

    def written(name: str, radius: Callable[[str], str]) -> list[str]:
        values = {
            "name": repr(name),
            "role": repr(norm.roles[name.format(0)]),
            "norm": _norm(norm.norms[name.format(0)]),
            "radius": radius(name),
        }
        return [values[k] for k in fields]

    inside = [n.replace("blocks.0.", "blocks.{}.", 1) for n in rows if n.startswith("blocks.0.")]
    start = rows.index(inside[0].format(0))
    before, after = rows[:start], rows[start + L * len(inside) :]
    if rows != [*before, *(n.format(i) for i in range(L) for n in inside), *after]:
        raise ExportError(
            "the model's structure",
            got="blocks that differ",
            allowed="L blocks with the same weights, one after the other",
            fix="studies/export.py, _weights",
        )

    def radii(name: str) -> str:
        values = [norm.radii[name.format(i)] for i in range(L)]
        return f"[{values[0]!r}] * {L}" if len(set(values)) == 1 else repr(values)

    one = [
        f"Weight({', '.join(written(n, lambda n: repr(norm.radii[n])))})" for n in (*before, *after)
    ]
    table = [f"({', '.join(written(n, radii))})" for n in inside]
    names = ", ".join("radii" if k == "radius" else k for k in fields)
    made = ", ".join({"name": "name.format(i)", "radius": "radii[i]"}.get(k, k) for k in fields)
    weights = [
        *one[: len(before)],
        f"*(Weight({made}) for i in range({L}) for {names} in BLOCK)",
        *one[len(before) :],
    ]
    rows_of = "\n".join(f"    {k}: {v}" for k, v in fields.items())
    doc = "One tensor: its role, the norm of that, and the radius that the modular norm gives it, the size of its step at lr 1."
    doc = doc if dualized else "One tensor, in the order of initialization."
    return {
        "Weight": f'class Weight(NamedTuple):\n    """{doc}"""\n{rows_of}',
        "WEIGHTS": f"BLOCK = [{', '.join(table)}]\nWEIGHTS = [{', '.join(weights)}]",
    }


def _shards(manifest: Manifest) -> str:
    found = {
        name: {s.file: s.sha256 for s in manifest.splits[name].shards} for name in ("train", "val")
    }
    return f"SHARDS = {found!r}"


def _base_optimizers(model: GPT, norm: ModularNorm, config: Config) -> str:
    """The function of studies/script.py that builds a baseline's optimizers, with all their settings."""
    settings = config.optim.step_settings() | vars(config.baseline)
    build = BASELINES[config.optim.name]
    made = build(model.to_empty(device="cpu"), norm, lr=config.optim.lr, **settings)
    every, lines = [n for n, _ in model.named_parameters()], []
    for optimizer in getattr(made, "optimizers", [made]):
        kind = type(optimizer)
        if getattr(torch.optim, kind.__name__, None) is not kind:
            raise _refusal(
                "optim.name", config.optim.name, f"optimizers of torch.optim, not {kind.__name__}"
            )
        known = inspect.signature(kind).parameters
        groups: dict[str, list[str]] = {}  # names by settings
        for group in optimizer.param_groups:
            values = {
                k: v
                for k, v in group.items()
                if k in known and k != "params" and v != known[k].default
            }
            values |= {"lr": group["lr"] * group.get("lr_scale", 1.0)} | (
                {"auxiliary": True} if group.get("auxiliary") else {}
            )
            groups.setdefault("".join(f", {k}={v!r}" for k, v in values.items()), []).extend(
                group["param_names"]
            )
        parts = [
            f"dict(params=matching(model, {', '.join(map(repr, _patterns(names, every)))}){options})"
            for options, names in groups.items()
        ]
        lines.append(f"torch.optim.{kind.__name__}([{', '.join(parts)}], lr={config.optim.lr!r})")
    return f"def base_optimizers(model: GPT) -> list[torch.optim.Optimizer]:\n    return [{', '.join(lines)}]"


def _patterns(names: list[str], every: list[str]) -> list[str]:
    """Of fnmatch, for these names and no other; the names themselves where layers differ."""
    patterns = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", n) for n in names))
    return (
        patterns if {n for n in every for p in patterns if fnmatch(n, p)} == set(names) else names
    )


# ---- the log of a run that was


def log(run: Run, code: str) -> str:
    """The script, then the run's versions and lines."""
    return f"{code}\n{LINE}\n{log_lines(run)}"


def log_lines(run: Run) -> str:
    """Versions, and metrics as the script logs them."""
    assert run.folder is not None
    found, steps, lines = summary(run.folder), run.config.train.steps, []
    assert found is not None
    for r in metrics(run.folder):
        done, seconds = r["step"], r["train_seconds"]
        what = f"val_loss:{r['val_loss']:.5f}" if "val_loss" in r else f"train_loss:{r['loss']:.6f}"
        lines.append(
            f"step:{done}/{steps} {what} train_time:{seconds:.3f}s step_avg:{1000 * seconds / max(1, done):.2f}ms"
        )
    running = f"Running PyTorch {found['torch']} on {found['device']} with world_size {found['world_size']}"
    return (
        "\n".join(
            [
                f"{running}: {run.name}, seed {run.config.run.seed}, by train_gpt.py of {_commit(found['commit'], found['dirty'])}",
                LINE,
                *lines,
            ]
        )
        + "\n"
    )


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
            _write("--log", args.log, log(run, code))
    except (ExportError, ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
