"""The house style of DESIGN.md, read from the syntax trees of everything outside tests/: sizes, names and words."""

import ast
import builtins
import re
from pathlib import Path

import pytest
from optim.settings import StepSettings, hints_of

from tests import source
from tests.source import (
    OPTIM,
    by_file,
    by_file_of_tests,
    comments,
    definitions,
    docstrings,
    functions,
    imported_names,
    lines,
    local_names,
    module_names,
    tree,
)

COLUMNS, COLUMNS_OF_TESTS, SCREEN, FILE = 100, 120, 60, 450
PRAGMA = re.compile(r"  # (noqa|type: ignore|pyright:).*")  # a remark to a checker, which ruff format does not count
TEXT = re.compile(r"""(?<!")"(?!"")(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""")

# The first words of functions' docstrings. Another verb, in the imperative, is added here.
VERBS = set(
    """
    Add Adopt Append Average Begin Bring Build Chart Check Choose Clear Compare Copy Count Decide Declare Do Draw
    Drop Dualize End Estimate Find Fit Give Hold Interpolate Iterate Join Judge Keep Label Leave Let List Load Lock
    Make Measure Multiply Note Open Prepare Print Publish Raise Read Refuse Remove Rename Report Return Run Save Seed
    Set Shard Split Start Step Surround Sweep Take Tell Terminate Time Train Try Validate Wait Watch Write Yield Zero
    """.split()  # noqa: SIM905
)
# No docstring and no comment begins with these: what follows is seldom a sentence. A verb or a noun begins it.
NOT_FIRST = {"What", "Of", "Whether"}
# They say nothing of what they name.
VAGUE = {"found", "told", "made", "here", "there"}
BUILTINS = set(dir(builtins)) - {"copyright", "credits", "license"}


def first_word(text: str) -> str:
    words = text.split()
    return words[0].rstrip(",.:;") if words else ""


def too_long(path: Path, columns: int) -> list[int]:
    return [i for i, line in enumerate(lines(path), 1) if len(PRAGMA.sub("", line)) > columns]


def has_long_text(line: str) -> bool:
    """Is there a string on it, such as a message that a test pins, that no formatter can break?"""
    return any(len(text[0]) > 40 for text in TEXT.finditer(line))


def long_functions(path: Path) -> list[tuple[str, int]]:
    heights = [(f.name, (f.end_lineno or f.lineno) - f.lineno + 1) for f in functions(path)]
    return [(name, height) for name, height in heights if height > SCREEN]


def shadows(path: Path) -> set[tuple[str, int]]:
    """(name, line) of what hides a builtin, an import, or a function or class of the file."""
    local = {(n, line) for n, line in local_names(path) if n in BUILTINS | imported_names(path) | definitions(path)}
    lines_of_imports = {n.lineno for n in tree(path).body if isinstance(n, ast.Import | ast.ImportFrom)}
    at_top = {(n, line) for n, line in module_names(path) if line not in lines_of_imports}
    return local | {(n, line) for n, line in at_top if n in BUILTINS | imported_names(path)}


def docstrings_without_verb(path: Path) -> list[str]:
    texts = [(f.name, ast.get_docstring(f)) for f in functions(path)]
    return [f"{name}: {text.splitlines()[0]}" for name, text in texts if text and first_word(text) not in VERBS]


def bad_first_words(path: Path) -> list[tuple[int, str]]:
    texts = [*docstrings(path), *comments(path)]
    return [(line, text[:40]) for line, text in texts if first_word(text) in NOT_FIRST]


def vague_names(path: Path) -> list[tuple[str, int]]:
    return sorted((name, line) for name, line in local_names(path) | module_names(path) if name in VAGUE)


# ---- sizes


@by_file
def test_a_file_fits_in_a_head_and_its_functions_on_a_screen(path: Path):
    assert len(lines(path)) <= FILE
    assert too_long(path, COLUMNS) == []
    assert long_functions(path) == []


@by_file_of_tests
def test_no_line_of_a_test_is_longer_than_120_columns(path: Path):
    assert [i for i in too_long(path, COLUMNS_OF_TESTS) if not has_long_text(lines(path)[i - 1])] == []


# ---- names


@by_file
def test_nothing_hides_a_builtin_an_import_or_a_function_of_its_file(path: Path):
    assert sorted(shadows(path), key=lambda s: s[1]) == []


@by_file
def test_names_are_nouns(path: Path):
    assert vague_names(path) == []


# ---- words


@by_file
def test_the_docstring_of_a_function_begins_with_a_verb(path: Path):
    assert docstrings_without_verb(path) == []


@by_file
def test_no_docstring_or_comment_begins_with_half_a_sentence(path: Path):
    assert bad_first_words(path) == []


# ---- the checks themselves

BAD = '''"""Of a module."""
import json, os.path
from dataclasses import field as entry

# Whether it is so.
open = 1


class Point:
    """What a point is."""

    id: int = 0
    """Of the point."""

    def sum(self):
        """The sum."""


def twice(json, *, entry=1):
    """Return it."""
    for os in range(2):
        with open("x") as twice:
            pass
    try:
        found = [list for list in ()]
    except OSError as max:
        lambda Point: 0
    match entry:
        case [*hash]:
            import sys as vars
'''


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    (tmp_path / "bad.py").write_text(BAD)
    return tmp_path / "bad.py"


def test_the_checks_see_what_they_are_to_see(bad: Path):
    assert sorted(name for name, _ in shadows(bad)) == sorted(
        ["Point", "entry", "hash", "json", "list", "max", "open", "os", "twice", "vars"]
    ), "a method's and a field's name hide nothing"
    assert vague_names(bad) == [("found", 25)]
    assert docstrings_without_verb(bad) == ["sum: The sum."]
    assert {line for line, _ in bad_first_words(bad)} == {1, 5, 10, 13}


def test_the_checks_measure_lines_functions_and_whole_comments(tmp_path: Path):
    path = tmp_path / "long.py"
    path.write_text("def f():\n" + 60 * "    pass\n" + f"x = {97 * '1'}\n# It is asked\n# Whether it is long.\n")
    assert long_functions(path) == [("f", 61)]
    assert too_long(path, COLUMNS) == [62]
    assert bad_first_words(path) == [], "a comment's second line may begin as it likes"


def test_every_folder_of_the_product_is_read():
    folders = {source.relative(path).split("/")[0] for path in source.PRODUCT}
    assert folders >= {"benchmarks", "data", "examples", "models", "optim", "studies", "training", "train_gpt.py"}


# ---- one owner for each setting


def declarations(path: Path) -> list[str]:
    """The names that a file declares: fields with a type and a default, and parameters with a default.

    A user's arguments of StepSettings' own defaults are no declarations.
    """
    names = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef):
            names += [ast.unparse(s.target) for s in node.body if isinstance(s, ast.AnnAssign) and s.value]
        elif isinstance(node, ast.FunctionDef):
            args, defaults = node.args.args, node.args.defaults
            with_default = zip(args[len(args) - len(defaults) :], defaults, strict=True)
            by_keyword = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            names += [
                a.arg
                for a, default in (*with_default, *by_keyword)
                if default is not None and "StepSettings" not in ast.unparse(default)
            ]
    return names


@pytest.mark.parametrize("setting", hints_of(StepSettings))
def test_a_step_setting_is_declared_in_one_place(setting: str):
    # Normalized's own, of another optimizer; a norm's, which is another thing.
    others = {"weight_decay": ["normalized.py"], "scale": ["norms.py", "norms.py"]}
    places = [path.name for path in OPTIM for name in declarations(path) if name == setting]
    assert sorted(places) == sorted(["settings.py", *others.get(setting, [])])
