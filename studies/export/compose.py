"""One run as the text of one script: files, known values and filled-in code, put together."""

from collections.abc import Mapping
from pathlib import Path

import torch

from models import MODELS, build_model_and_norm

from ..runs import ROOT
from .bundle import bundle
from .expressions import Expressions
from .fill import filled_in, own_model
from .plugins import check_named, files_of_plugins
from .run import Run, check, refusal, resolved
from .values import SCRIPT, is_own, known_values, model_files

OPTIMIZER = {
    "optim/errors.py": "Refusals",
    "optim/polar.py": "Polar factor",
    "optim/norms.py": "Norms, their duality maps, initial weights",
    "optim/views.py": "Norms of parts of a weight",
    "optim/directions.py": "Directions: what is dualized",
    "optim/update.py": "The step",
    "optim/schedules.py": "Schedules",
    "optim/baselines.py": "Schedules of torch's optimizers",
}
TRAINING = {
    "studies/export/pcg64.py": "Random numbers",
    SCRIPT: "Data, optimizer, training",
}
# What parts of plugins may name besides.
OF_PLUGINS = ("receipt", "settings", "smoothness", "modular", "roles", "module_types", "metrize")
OURS = ("optim", "model", "models", "data", "training", "studies")  # that a script does not import
TRACK_SLOTS = 8  # micro-batches of 64 sequences: the track's scripts run on 1, 2, 4 or 8 GPUs
TRACK_DATA = "data/fineweb10B"


def files(model_name: str, plugins: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return {file: the title of its part} of a script, in its order.

    plugins: {file: its module}.
    """
    others = {f"optim/{name}.py": f"optim/{name}.py" for name in OF_PLUGINS if plugins}
    own = {file: f"Plugin: {module}" for file, module in (plugins or {}).items()}
    return OPTIMIZER | others | model_files(MODELS[model_name][0]) | own | TRAINING


def script(run: Run, *, track: bool = False) -> str:
    """Return the Python script of a run.

    track: with the optimization track's data order and evaluations.
    """
    config = resolved(run)
    check(config)
    slots = # What parts of plugins may name besides.
OF_PLUGINS = ("receipt", "settings", "smoothness", "modular", "roles", "module_types", "metrize")
OURS = ("optim", "model", "models", "data", "training", "studies")  # that a script does not import
TRACK_SLOTS if track else config.train.gradient_accumulation_steps * run.world
    if config.train.batch_size % slots:
        allowed = f"a multiple of {slots} micro-batches"
        raise refusal("train.batch_size", config.train.batch_size, allowed)
    with torch.device("meta"):
        model, norm = build_model_and_norm(config)
    data, plugins = data_folder(run, track=track), files_of_plugins(config.run.plugins)
    write = Expressions(config.optim.polar)
    known = known_values(config, type(model), slots=slots, track=track)
    filled = filled_in(config, model, norm, write, data=data, track=track)
    if is_own(type(model)):
        filled |= own_model(config, write)
        write.name(type(model))
    packages = (*OURS, *(module.split(".")[0] for module in plugins.values()))
    check_named(write.named, packages)
    code = bundle(
        ROOT,
        files(config.model.name, plugins),
        known=known,
        filled=filled,
        packages=packages,
        whole=("optim/update.py",),
        plugins=plugins,
        named=write.named,
        unregistered="register_(norm|schedule)$",  # a script names none of them by text
    )
    order = "the optimization track's order" if track else "the run's order"
    return (
        f'"""{run.name}: {run.origin}\n\nData: {data}/, in {order}.\n'
        f'Alone, or under torchrun with a number of processes that divides {slots}.\n"""\n\n{code}'
    )


def data_folder(run: Run, *, track: bool) -> str:
    """Return where a script looks for its data, from the folder that it is run in."""
    return TRACK_DATA if track else f"corpora/{Path(run.config.data.dataset).name}"
