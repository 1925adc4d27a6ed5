"""What a training run imports is in requirements.txt, and nothing that only tests need."""

import ast
import re
from importlib.metadata import packages_distributions, requires
from pathlib import Path

from tests.helpers import ROOT


def pinned(file: str) -> set[str]:
    return {
        re.split(r"[=\[]", line)[0].lower().replace("_", "-")
        for line in (ROOT / file).read_text().splitlines()
        if "==" in line
    }


def imported(paths: list[Path]) -> set[str]:
    """The distributions of the modules that files import, anywhere in them."""
    modules, distributions = set[str](), packages_distributions()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    return {d.lower().replace("_", "-") for m in modules for d in distributions.get(m, [])}


def test_requirements_are_what_runs_and_studies_import_and_the_corpus():
    files = [
        *ROOT.glob("*.py"),
        *(p for folder in ("optim", "data", "models", "studies", "training") for p in (ROOT / folder).rglob("*.py")),
    ]
    corpus = {"sympy", "networkx", "mpmath"}
    hub = {"datasets", "huggingface-hub"}
    of_jinja2 = {"markupsafe"}
    peers = {"pytorch-optimizer"}  # of training/published.py, which says how it is installed
    assert imported(files) - hub - of_jinja2 - peers == pinned("requirements.txt") - corpus
    torch_needs = {re.split(r"[<>=!;\[ ]", r)[0].lower() for r in requires("torch") or []}
    assert corpus - torch_needs == {"mpmath"}, "that one sympy needs"


def test_what_tests_need_is_apart():
    assert not pinned("requirements.txt") & pinned("requirements-dev.txt")
    assert imported([*(ROOT / "tests").glob("*.py"), *(ROOT / "examples").glob("*.py")]) <= pinned(
        "requirements.txt"
    ) | pinned("requirements-dev.txt") | {"playwright"}
