"""optim/errors.py: one way to refuse, with the same lines everywhere."""

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from data.shards import DataError
from optim.errors import BackwardError, CopyError, CoverageError, NonFiniteError, PlacementError, Refusal, require
from training.checkpoint import CheckpointError
from training.config import ConfigError
from training.runtime import RankError, RunError

from tests.helpers import ROOT

IN_OPTIM = [Refusal, CoverageError, PlacementError, BackwardError, CopyError]
SUBCLASSES = [*IN_OPTIM, DataError, ConfigError, CheckpointError, RunError, RankError]
PARTS = {"got": -1.0, "allowed": "a finite number >= 0", "fix": "--optim.lr 0.1"}
APART = {"tests", "records", "corpora", "runs", ".venv", "build"}  # records: scripts as they were exported
PRODUCT = sorted(p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in APART)


def test_a_refusal_says_what_was_got_what_is_allowed_and_how_to_fix_it():
    assert str(Refusal("optim.lr", **PARTS)) == (
        "optim.lr\n  got: -1.0\n  allowed: a finite number >= 0\n  fix: --optim.lr 0.1"
    )


@pytest.mark.parametrize("left_out", PARTS)
def test_a_part_that_is_none_has_no_line(left_out: str):
    kept = {k: v for k, v in PARTS.items() if k != left_out}
    assert str(Refusal("optim.lr", **kept)).splitlines() == ["optim.lr", *(f"  {k}: {v}" for k, v in kept.items())]


@pytest.mark.parametrize("value", [0, "", False, ()])
def test_a_part_that_is_empty_has_its_line(value: object):
    assert str(Refusal("x", got=value)) == f"x\n  got: {value}"


@pytest.mark.parametrize("error", [*SUBCLASSES, NonFiniteError], ids=lambda e: e.__name__)
def test_whoever_catches_value_errors_catches_every_refusal(error: type[Exception]):
    assert issubclass(error, ValueError)


def test_where_torch_and_python_have_a_class_of_their_own_it_is_that_too():
    assert issubclass(BackwardError, RuntimeError) and issubclass(CopyError, TypeError)


@pytest.mark.parametrize("error", SUBCLASSES, ids=lambda e: e.__name__)
def test_a_refusal_travels_between_processes_with_its_parts(error: type[Refusal]):
    sent = error("optim.lr", **PARTS)
    came = pickle.loads(pickle.dumps(sent))
    assert type(came) is error and str(came) == str(sent)
    assert (came.what, came.got, came.allowed, came.fix) == ("optim.lr", *PARTS.values())


@pytest.mark.parametrize("fine", [True, 1, [0], "x"])
def test_require_passes_what_is_fine(fine: object):
    require(fine, "optim.lr", **PARTS)


@pytest.mark.parametrize("fine", [False, 0, [], "", None])
@pytest.mark.parametrize("error", [Refusal, CoverageError])
def test_require_raises_its_error_with_all_lines(fine: object, error: type[Refusal]):
    with pytest.raises(Refusal) as raised:
        require(fine, "optim.lr", **PARTS, error=error)
    assert type(raised.value) is error and str(raised.value) == str(Refusal("optim.lr", **PARTS))


def spelled(path: Path) -> Iterator[str]:
    """Every string of a file that spells a line of a refusal: literals, parts of f-strings, docstrings."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for word in ("got:", "allowed:", "fix:"):
                if word in node.value:
                    yield f"{path.relative_to(ROOT)}:{node.lineno} spells {word!r}"


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_message_spells_its_lines_by_hand(path: Path):
    by_hand = list(spelled(path))
    assert bool(by_hand) == (path == ROOT / "optim/errors.py"), by_hand


def test_a_message_that_spells_its_lines_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    file = tmp_path / "a.py"
    file.write_text('"""Its lines are got: and allowed:."""\nx = 1\nraise ValueError(f"{x}\\n  fix: {x}")\n')
    assert [line.split(" spells ") for line in spelled(file)] == [
        ["a.py:1", "'got:'"],
        ["a.py:1", "'allowed:'"],
        ["a.py:3", "'fix:'"],
    ]
