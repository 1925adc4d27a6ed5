"""Who may import what (DESIGN.md, CONTRIBUTING.md), read from the syntax trees."""

import ast
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.source import OPTIM, by_file, by_file_of_optim, functions, imports, relative, tree

# What a folder, or a file of the root, may import of ours: whole packages, or single modules.
BELOW_TRAINING = {"optim", "model", "models", "data"}
ARROWS = {
    "optim": {"optim"},
    "nanodual.py": {"optim"},
    "model.py": {"optim"},
    "models": {"models", "model", "optim"},
    "data": {"data", "optim.errors", "optim.plugins", "optim.settings"},
    "training": {"training", *BELOW_TRAINING},
    "train_gpt.py": {"training", *BELOW_TRAINING},
    "sample.py": {"training", *BELOW_TRAINING},
    "studies": {"studies", "training", *BELOW_TRAINING},
    "benchmarks": {"benchmarks", "examples", "studies", "training", *BELOW_TRAINING},
    "examples": {"examples", "nanodual"},
}
OURS = {name.removesuffix(".py") for name in ARROWS}

# Where a library may be imported: a folder, or a single file.
LIBRARIES = {
    "torch": set(ARROWS),
    "triton": {"optim/kernels.py"},
    "numpy": {"data", "training", "studies", "benchmarks"},
    "scipy": {"studies"},
    "tqdm": {"data/corpora.py", "data/writer.py", "training", "studies"},
    "datasets": {"data/corpora.py"},
    "tiktoken": {"data/tokenizer.py"},
    "pydantic": {"training/sections.py"},
    "pytorch_optimizer": {"training/published.py"},
    "tyro": {"training/config.py", "training/help.py", "sample.py"},
    "safetensors": {"training/checkpoint.py"},
    "matplotlib": {"training", "studies"},
    "jinja2": {"studies/report"},
    "markupsafe": {"studies/report"},  # jinja2's own
    "transformers": {"examples", "benchmarks/foreign.py"},
    "accelerate": {"examples"},
    "peft": {"examples"},
}

# Only what communicates names torch.distributed. studies/export/script.py writes it into scripts.
COMMUNICATES = {
    "optim/ranks.py",
    "training/ranks.py",
    "training/watchdog.py",
    "training/checkpoint.py",
    "training/tensor_files.py",
    "studies/export/script.py",
    "benchmarks/ranks.py",
}

# Each file of optim/ may import those before it.
ORDER = (
    *(
        "errors",
        "plugins",
        "receipt",
        "ranks",
        "polar",
        "axes",
        "norms",
        "views",
        "moments",
        "whitening",
        "directions",
        "settings",
        "schedules",
        "update",
    ),
    *(
        "placement",
        "replicas",
        "finite",
        "stacks",
        "smoothness",
        "modular",
        "roles",
        "drawing",
        "sites",
        "adapters",
        "families",
        "fused",
        "experts",
        "module_types",
        "heads",
        "rules",
        "unplaced",
        "coverage",
        "metrize",
    ),
    *("state", "normalized", "dualized", "baselines", "convert", "curvature", "__init__"),
)
# Arithmetic, state and communication live apart: what a file may import at most.
ARITHMETIC = {
    *("polar", "axes", "norms", "views", "moments", "whitening", "directions"),
    *("update", "schedules", "settings", "errors", "plugins"),
}
COMMUNICATION = {"ranks", "placement", "replicas", "errors"}

# Private names of Python and of torch that we use, for want of public ones.
OF_OTHERS = {
    "_exit",
    "_current_frames",
    "_parameters",
    "_orig_mod",
    "_zeropower_via_newtonschulz",
    "_ConvNd",
    "_NormBase",
    "_dynamo",
    "_muon",
}


def part(path: Path) -> str:
    """The folder or the file of the root that a file belongs to."""
    return path.relative_to(ROOT).parts[0]


def is_of(module: str, allowed: set[str]) -> bool:
    """Is it one of these modules, or in one of these packages?"""
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def libraries(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imports(path)} - set(sys.stdlib_module_names) - OURS


def own_imports(path: Path) -> set[str]:
    """Modules of optim/ that a file of it imports at its top. A drawing is imported where it is asked for."""
    return {str(n.module) for n in tree(path).body if isinstance(n, ast.ImportFrom) and n.level == 1}


# ---- the whole repository


@by_file
def test_arrows_run_one_way(path: Path):
    ours = {module for module in imports(path) if module.split(".")[0] in OURS}
    assert {module for module in ours if not is_of(module, ARROWS[part(path)])} == set()


@by_file
def test_a_library_is_imported_only_where_the_list_allows_it(path: Path):
    assert {
        name
        for name in libraries(path)
        if not {part(path), relative(path), path.parent.relative_to(ROOT).as_posix()} & LIBRARIES.get(name, set())
    } == set()


@by_file_of_optim
def test_optim_needs_torch_alone(path: Path):
    assert libraries(path) <= {"torch"}


@by_file
def test_nothing_imports_the_training_script(path: Path):
    assert "train_gpt" not in imports(path)


@by_file
def test_only_what_communicates_touches_torch_distributed(path: Path):
    assert ("torch.distributed" in path.read_text(encoding="utf-8")) == (relative(path) in COMMUNICATES)


@by_file
def test_no_private_name_is_imported_from_another_module_of_ours(path: Path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).split(".")[0] in OURS):
            assert [a.name for a in node.names if a.name.startswith("_")] == []


def private_reads(path: Path) -> set[str]:
    """`x._name` where x is none of self, cls and super(), and the file defines no such name."""
    nodes = list(ast.walk(tree(path)))
    attributes = [n for n in nodes if isinstance(n, ast.Attribute)]
    own = {n.attr for n in attributes if isinstance(n.ctx, ast.Store)} | {f.name for f in functions(path)}
    own |= {n.target.id for n in nodes if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    return {
        n.attr
        for n in attributes
        if n.attr.startswith("_")
        and not n.attr.startswith(("__", "_foreach_", "_replace"))
        and not (isinstance(n.value, ast.Name) and n.value.id in ("self", "cls"))
        and not (isinstance(n.value, ast.Call) and ast.unparse(n.value) == "super()")
    } - own


@by_file
def test_no_private_name_of_another_module_is_read(path: Path):
    assert private_reads(path) <= OF_OTHERS


# ---- optim/


def test_every_file_has_a_place_in_the_order():
    assert {p.stem for p in OPTIM} == set(ORDER)


@by_file_of_optim
def test_a_file_of_optim_imports_only_those_before_it(path: Path):
    assert own_imports(path) <= set(ORDER[: ORDER.index(path.stem)])


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        *((n, ARITHMETIC) for n in ("update", "axes", "norms", "views", "moments", "whitening", "directions", "polar")),
        *((n, COMMUNICATION) for n in ("ranks", "placement", "replicas")),
    ],
)
def test_arithmetic_knows_no_ranks_and_ranks_no_norms(name: str, allowed: set[str]):
    assert own_imports(ROOT / f"optim/{name}.py") <= allowed


@pytest.mark.parametrize(
    "name", ["update", "axes", "norms", "views", "moments", "whitening", "directions", "polar", "settings"]
)
def test_arithmetic_has_no_optimizer_and_no_state_dict(name: str):
    nodes = list(ast.walk(tree(ROOT / f"optim/{name}.py")))
    names = {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {n.id for n in nodes if isinstance(n, ast.Name)}
    assert not names & {"Optimizer", "optim", "state_dict", "load_state_dict", "distributed", "param_groups"}


def test_nanodual_and_optim_are_one_module_object():
    """What is registered under one name is known under the other."""
    import nanodual
    import optim
    import optim.norms

    assert nanodual is optim
    assert sys.modules["nanodual.norms"] is optim.norms
    assert 10 <= len(optim.__all__) <= 14, "about a dozen public names"
    assert {"Dualized", "metrize", "register_norm", "register_direction", "register_baseline"} <= set(optim.__all__)
