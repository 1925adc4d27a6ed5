"""DESIGN.md's measures of optim/, read from the syntax trees: sizes, columns, who imports whom, and who owns a setting."""

import ast
from pathlib import Path

import pytest
from optim.settings import StepSettings, hints_of

from tests.helpers import ROOT

FILES = sorted((ROOT / "optim").glob("*.py"))
PRODUCT = [p for p in ROOT.rglob("*.py") if not {"tests", "records", ".venv", "build"} & set(p.relative_to(ROOT).parts)]
COLUMNS, SCREEN, FILE = 100, 60, 450

# Each file of optim/ may import those before it.
ORDER = (
    *("errors", "receipt", "ranks", "polar", "norms", "views", "directions", "settings", "schedules", "update"),
    *(
        "placement",
        "replicas",
        "finite",
        "stacks",
        "smoothness",
        "modular",
        "roles",
        "drawing",
        "module_types",
        "metrize",
        "state",
    ),
    *("normalized", "dualized", "baselines", "convert", "curvature", "__init__"),
)
# Arithmetic, state and communication live apart: what a file may import at most.
ARITHMETIC = {"polar", "norms", "views", "directions", "update", "schedules", "settings", "errors"}
COMMUNICATION = {"ranks", "placement", "replicas", "errors"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def own_imports(path: Path) -> set[str]:
    """Modules of optim/ that a file of it imports at its top. A drawing is imported where it is asked for."""
    return {str(n.module) for n in tree(path).body if isinstance(n, ast.ImportFrom) and n.level == 1}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_fits_in_a_head_and_its_functions_on_a_screen(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= FILE
    assert [i for i, line in enumerate(lines, 1) if len(line) > COLUMNS] == []
    functions = [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef)]
    assert {n.name: n.end_lineno - n.lineno + 1 for n in functions if n.end_lineno - n.lineno >= SCREEN} == {}  # type: ignore[operator]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_arrows_run_one_way(path: Path):
    before = ORDER[: ORDER.index(path.stem)]
    assert own_imports(path) <= set(before)


def test_every_file_has_a_place_in_the_order():
    assert {p.stem for p in FILES} == set(ORDER)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        *((n, ARITHMETIC) for n in ("update", "norms", "views", "directions", "polar")),
        *((n, COMMUNICATION) for n in ("ranks", "placement", "replicas")),
    ],
)
def test_arithmetic_knows_no_ranks_and_ranks_no_norms(name: str, allowed: set[str]):
    assert own_imports(ROOT / f"optim/{name}.py") <= allowed


@pytest.mark.parametrize("name", ["update", "norms", "views", "directions", "polar", "settings"])
def test_arithmetic_has_no_optimizer_and_no_state_dict(name: str):
    nodes = list(ast.walk(tree(ROOT / f"optim/{name}.py")))
    names = {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {n.id for n in nodes if isinstance(n, ast.Name)}
    assert not names & {"Optimizer", "optim", "state_dict", "load_state_dict", "distributed", "param_groups"}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_name_is_imported_from_another_module_of_ours(path: Path):
    ours = {"optim", "nanodual", "training", "studies", "data", "models", *(p.stem for p in ROOT.glob("*.py"))}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).split(".")[0] in ours):
            assert [a.name for a in node.names if a.name.startswith("_")] == []


def private_reads(path: Path) -> set[str]:
    """`x._name` where x is neither self nor cls, and torch has no such name."""
    return {
        node.attr
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith(("__", "_foreach_", "_replace"))
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        and not (isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()")
    }


@pytest.mark.parametrize(
    "path",
    [
        *FILES,
        ROOT / "training/geometry.py",
        ROOT / "training/sharpness.py",
        ROOT / "training/plots.py",
        *(ROOT / "studies/cost_model").glob("*.py"),
        ROOT / "training/checkpoint.py",
        ROOT / "training/tensor_files.py",
    ],
    ids=lambda p: p.name,
)
def test_no_private_name_of_another_module_is_read(path: Path):
    torchs = {"_parameters", "_orig_mod", "_zeropower_via_newtonschulz", "_ConvNd", "_NormBase", "_dynamo"}
    assert private_reads(path) <= torchs


@pytest.mark.parametrize("setting", hints_of(StepSettings))
def test_a_step_setting_is_declared_in_one_place(setting: str):
    """A declaration: a field with a type and a default, or a parameter with a default, in optim/. A user's arguments of lr are no declarations."""
    found = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                found += [
                    path.name
                    for s in node.body
                    if isinstance(s, ast.AnnAssign) and s.value and ast.unparse(s.target) == setting
                ]
            elif isinstance(node, ast.FunctionDef):
                args, options = node.args.args, node.args.kwonlyargs
                late = zip(args[len(args) - len(node.args.defaults) :], node.args.defaults, strict=True)
                named = zip(options, node.args.kw_defaults, strict=True)
                given = [(a.arg, d) for a, d in (*late, *named) if d is not None]
                found += [
                    path.name
                    for name, default in given
                    if name == setting and "StepSettings" not in ast.unparse(default)
                ]
    # Normalized's own, of another optimizer; a norm's, which is another thing.
    others = {"weight_decay": ["normalized.py"], "scale": ["norms.py", "norms.py"]}
    assert sorted(found) == sorted(["settings.py", *others.get(setting, [])])
