"""Who may import what (CONTRIBUTING.md), read from the syntax trees."""

import ast
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT


def imports(path: Path) -> set[str]:
    """Absolute names of imported modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module))
    return found


def third_party(path: Path) -> set[str]:
    return {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", sorted((ROOT / "optim").glob("*.py")), ids=lambda p: p.name)
def test_optim_needs_torch_alone(path: Path):
    assert third_party(path) <= {"torch"}


@pytest.mark.parametrize("path", sorted((ROOT / "data").glob("*.py")), ids=lambda p: p.name)
def test_data_needs_numpy_torch_errors_and_ranges_alone(path: Path):
    assert {n for n in imports(path) if n.split(".")[0] == "optim"} <= {"optim.errors", "optim.settings"}
    extra = {"prepare.py": {"datasets", "tqdm"}, "tokenizer.py": {"tiktoken"}}.get(path.name, set())
    assert third_party(path) <= {"numpy", "torch", "optim"} | extra


def test_the_model_needs_torch_and_optim_alone():
    assert third_party(ROOT / "model.py") <= {"torch", "optim"}


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.py")), ids=lambda p: p.name)
def test_other_models_need_the_one_that_they_extend(path: Path):
    assert third_party(path) <= {"torch", "optim", "model"}


@pytest.mark.parametrize("path", sorted((ROOT / "training").glob("*.py")), ids=lambda p: p.name)
def test_training_stands_on_models_data_and_optim(path: Path):
    lower = {"data", "model", "models", "optim", "training"}
    libraries = {"numpy", "torch", "tqdm", "safetensors", "pydantic", "tyro", "matplotlib"}
    assert third_party(path) <= libraries | lower


def test_nothing_imports_the_training_script():
    for path in ROOT.rglob("*.py"):
        if ".venv" not in path.parts:
            assert "train_gpt" not in imports(path), path


def test_only_communication_checkpoints_and_runtime_touch_torch_distributed():
    allowed = {"ranks.py", "runtime.py", "checkpoint.py", "tensor_files.py"}
    for path in [
        *ROOT.glob("*.py"),
        *(ROOT / "models").glob("*.py"),
        *(ROOT / "optim").glob("*.py"),
        *(ROOT / "data").glob("*.py"),
        *(ROOT / "training").glob("*.py"),
    ]:
        if path.name not in allowed:
            assert "torch.distributed" not in path.read_text(), path


def test_nanodual_and_optim_are_one_module_object():
    """What is registered under one name is known under the other."""
    import nanodual
    import optim
    import optim.norms

    assert nanodual is optim
    assert sys.modules["nanodual.norms"] is optim.norms
    assert 10 <= len(optim.__all__) <= 14, "about a dozen public names"
    assert {"Dualized", "metrize", "register_norm", "register_direction", "register_baseline"} <= set(optim.__all__)
