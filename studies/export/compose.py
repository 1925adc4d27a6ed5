"""One run as the text of one script: files, known values and filled-in code, put together."""

from collections.abc import Mapping
from pathlib import Path

import torch

from model import GPT
from models import build_model_and_norm

from ..runs import ROOT
from .bundle import bundle
from .expressions import Expressions
from .fill import filled_in
from .plugins import check_parts, files_of_plugins
from .run import Run, check, refusal, resolved
from .values import SCRIPT, is_own, known_values, model_files

# Every definition that a run uses comes along. So a file's order is that of imports.
OPTIMIZER = {
    "optim/errors.py": "Refusals",
    "optim/polar.py": "Polar factor",
    "optim/axes.py": "Rows and columns of blocks",
    "optim/norms.py": "Norms, their duality maps, initial weights",
    "optim/views.py": "Norms of parts of a weight",
    "optim/moments.py": "Averages of gradients and of their squares",
    "optim/whitening.py": "Directions that know their noise",
    "optim/directions.py": "Directions: what is dualized",
    "optim/settings.py": "Settings",
    "optim/update.py": "The step",
    "optim/schedules.py": "Schedules",
}
STRUCTURE = {  # of a plugin's model, which makes its own
    "optim/receipt.py": "Receipts",
    "optim/smoothness.py": "Smoothness",
    "optim/modular.py": "The modular norm",
    "optim/roles.py": "Roles",
}
STAND_IN = "studies/export/modular.py"  # of optim/modular.py
BASELINES = {
    "optim/sites.py": "Names of weights",
    "optim/baselines.py": "Schedules of torch's optimizers",
    "training/published.py": "Published optimizers",
}
TRAINING = {
    "studies/export/pcg64.py": "Random numbers",
    SCRIPT: "Data, optimizer, training",
}
OURS = ("optim", "model", "models", "data", "training", "studies")  # that no script imports
TRACK_SLOTS = 8  # micro-batches of 64 sequences: the track's scripts run on 1, 2, 4 or 8 GPUs
TRACK_DATA = "data/fineweb10B"


def files(model: type[GPT], plugins: Mapping[str, str]) -> dict[str, str]:
    """Return {file: the title of its part} of a script, in its order.

    plugins: {file: its module}.
    """
    structure = STRUCTURE if is_own(model) else {STAND_IN: "The modular norm, as far as it is used"}
    own = {file: f"Plugin {module}" for file, module in plugins.items()}
    return OPTIMIZER | structure | BASELINES | model_files(model) | own | TRAINING


def script(run: Run, *, track: bool = False) -> str:
    """Return the Python script of a run.

    track: with the optimization track's data order and evaluations.
    """
    config = resolved(run)
    check(config)
    slots = TRACK_SLOTS if track else config.train.gradient_accumulation_steps * run.world
    if config.train.batch_size % slots:
        allowed = f"a multiple of {slots} micro-batches"
        raise refusal("train.batch_size", config.train.batch_size, allowed)
    with torch.device("meta"):
        model, norm = build_model_and_norm(config)
    data, plugins = data_folder(run, track=track), files_of_plugins(config.run.plugins)
    packages = (*OURS, *(module.split(".")[0] for module in plugins.values()))
    write = Expressions(config.optim.polar)
    filled = filled_in(config, model, norm, write, data=data, track=track)
    modes = "set_mode(" in filled["base_optimizers"]
    check_parts(write.named, packages)
    code = bundle(
        ROOT,
        files(type(model), plugins),
        known=known_values(config, type(model), slots=slots, track=track, modes=modes),
        filled=filled,
        packages=packages,
        whole=("optim/update.py",),
        unregistered=r"register_(norm|schedule|baseline)\b",  # a script names none by text
        modules={STAND_IN: "optim.modular", **plugins},
        plugins=[*plugins],
        named=write.named,
    )
    order = "the optimization track's order" if track else "the run's order"
    own = f"With parts of {', '.join(config.run.plugins)}.\n" if plugins else ""
    return (
        f'"""{run.name}: {run.origin}\n\n{own}Data: {data}/, in {order}.\n'
        f'Alone, or under torchrun with a number of processes that divides {slots}.\n"""\n\n{code}'
    )


def data_folder(run: Run, *, track: bool) -> str:
    """Return where a script looks for its data, from the folder that it is run in."""
    return TRACK_DATA if track else f"corpora/{Path(run.config.data.dataset).name}"
