"""The repository's Python as syntax trees, for the tests that read the house rules of DESIGN.md from them."""

import ast
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.helpers import ROOT

# Not the product: its tests, scripts as they were exported, and what programs make.
APART = {"tests", "records", "corpora", "runs", "build", ".venv"}


def python_files(folder: Path) -> list[Path]:
    files = (p for p in folder.rglob("*.py") if p.relative_to(folder).parts[0] not in APART)
    return sorted(p for p in files if p.parent != folder or not p.name.startswith("my_"))  # a user's plugins


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PRODUCT = python_files(ROOT)
OPTIM = sorted((ROOT / "optim").glob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
by_file = pytest.mark.parametrize("path", PRODUCT, ids=relative)
by_file_of_optim = pytest.mark.parametrize("path", OPTIM, ids=lambda p: p.name)
by_file_of_tests = pytest.mark.parametrize("path", TESTS, ids=lambda p: p.name)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


@cache
def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> list[Function]:
    """Every function and method, wherever it is defined."""
    return [n for n in ast.walk(tree(path)) if isinstance(n, Function)]


def imported_names(path: Path) -> set[str]:
    """The names that imports at the top of a file bind, within `try` too."""
    top = [inner for n in tree(path).body for inner in (n.body if isinstance(n, ast.Try) else [n])]
    imports = [n for n in top if isinstance(n, ast.Import | ast.ImportFrom)]
    return {a.asname or a.name.split(".")[0] for n in imports for a in n.names}


def definitions(path: Path) -> set[str]:
    """The functions and classes that a file defines at its top."""
    return {n.name for n in tree(path).body if isinstance(n, Function | ast.ClassDef)}


def bound_by(node: ast.AST) -> list[str]:
    """The names that one node binds."""
    if isinstance(node, ast.Name):
        return [node.id] if isinstance(node.ctx, ast.Store) else []
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, Function | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [a.asname or a.name.split(".")[0] for a in node.names]
    name = getattr(node, "name", None) if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) else None
    return [name] if name else []


def local_names(path: Path) -> set[tuple[str, int]]:
    """(name, line) of all that functions, lambdas and comprehensions bind: parameters and targets of every kind."""
    scopes = [n for n in ast.walk(tree(path)) if isinstance(n, Function | ast.Lambda | Comprehension)]
    inside = {node for scope in scopes for node in ast.walk(scope) if node is not scope}
    return {(name, node.lineno) for node in inside for name in bound_by(node)}  # type: ignore[attr-defined]


def module_names(path: Path) -> set[tuple[str, int]]:
    """(name, line) of all that a file binds at its top level, imports included."""
    targets = [t for n in tree(path).body if isinstance(n, ast.Assign | ast.AnnAssign | ast.For) for t in ast.walk(n)]
    return {(name, n.lineno) for n in (*tree(path).body, *targets) for name in bound_by(n)}  # type: ignore[attr-defined]


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that stands as a statement: of modules, classes, functions, and under fields."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every comment; one of several lines is told by its first."""
    last = None  # the line and column of a comment that the next line may continue
    with path.open("rb") as f:
        for token in tokenize.tokenize(f.readline):
            if token.type == tokenize.COMMENT:
                line, column = token.start
                if last != (line - 1, column):
                    yield line, token.string.lstrip("#- ")
                last = (line, column)


def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it, by their absolute names."""
    package = list(path.relative_to(ROOT).parts[:-1])
    modules = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            modules |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            modules.add(".".join([*above, *([node.module] if node.module else [])]))
    return modules
