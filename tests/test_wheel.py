"""`make wheel`: what it packs, and that it works where the repository is out of sight.

The environment is new and has no access to the repository; torch alone is too large to install again, so that it,
with what it needs, is borrowed from the environment of the tests by a path. That optim/ needs nothing else is
tests/test_imports.py's claim.
"""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT

TRAIN = """
import importlib.util, pathlib, runpy, sys
import torch
from torch import nn

import nanodual
from nanodual import Dualized, Rule, metrize

assert pathlib.Path(nanodual.__file__).is_relative_to(sys.prefix), nanodual.__file__
assert not any(importlib.util.find_spec(name) for name in ("optim", "model", "config", "train_gpt"))


class Last(nn.Module):
    def forward(self, x):
        return x[0][:, -1]


torch.manual_seed(0)
gru = nn.GRU(16, 16, batch_first=True)
model = nn.Sequential(nn.Embedding(7, 16), nn.Linear(16, 16), nn.LayerNorm(16), gru, Last(), nn.Linear(16, 7))
x = torch.randint(7, (64, 5))
y = x[:, 2]
optimizer = Dualized(model, lr=1.0, norm=metrize(model, rules=[Rule("5.weight", role="head")]))
losses = []
for step in range(30):
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.5 * losses[0], losses

sys.argv = ["convert", "--help"]
runpy.run_module("nanodual.convert", run_name="__main__", alter_sys=True)
"""


def shell(*command: object, cwd: Path) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "MAKE"))}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=clean | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, with an older build's left-overs in it."""
    copy = tmp_path_factory.mktemp("repository")
    for path in [*ROOT.glob("*.py"), *map(ROOT.joinpath, ("Makefile", "pyproject.toml", "README.md", "LICENSE"))]:
        shutil.copy(path, copy)
    for name in ("optim", "data", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "build/lib/nanodual").mkdir(parents=True)
    (copy / "build/lib/nanodual/gone.py").touch()
    shell("make", "wheel", f"PYTHON={sys.executable}", cwd=copy)
    (built,) = (copy / "dist").iterdir()
    return built


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (n for n in packed.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_bytes(packed.read(name))


def test_it_holds_optim_as_nanodual_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as packed:
        found = {n for n in packed.namelist() if ".dist-info/" not in n}
    assert found == {
        f"nanodual/{p.name}" for p in (ROOT / "optim").iterdir() if p.suffix == ".py" or p.name == "py.typed"
    }


def test_its_one_dependency_is_torch(wheel: Path):
    about = metadata(wheel)
    assert about.get_all("Requires-Dist") == ["torch>=2.9"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (about["Name"], about["Version"]) == (
        "nanodual",
        version,
    ) and wheel.name == f"nanodual-{version}-py3-none-any.whl"
    assert about["License-Expression"] == "MIT" and about["Requires-Python"] == ">=3.11"


def test_installed_alone_it_trains_a_foreign_model_and_converts_settings(wheel: Path, tmp_path: Path):
    shell(sys.executable, "-m", "venv", "--without-pip", "env", cwd=tmp_path)
    python = tmp_path / "env/bin/python"
    shell(
        sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path
    )
    (packages,) = (tmp_path / "env/lib").glob("python*/site-packages")
    (packages / "borrowed.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    (tmp_path / "train.py").write_text(TRAIN)
    assert shell(python, "-W", "error", "train.py", cwd=tmp_path).startswith("usage: python -m nanodual.convert")
