"""One plugin with a norm, a direction, a baseline, a tokenizer and a model: from a text to a report, from TOML alone.

Every command is a process of its own, in a folder outside the checkout that has the plugin, the text and TOML files.
"""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, TEXT, run, start

CONFIG = """
[run]
plugins = ["my_parts"]
device = "cpu"
precision = "fp32"
threads = 1
[data]
dataset = "corpora/tables"
[model]
name = "gated"
gate_rank = 3
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
dropout = 0.1
[train]
steps = 60
batch_size = 8
gradient_accumulation_steps = 2
eval_tokens = 512
eval_every = 30
log_every = 10
checkpoint_every = 4
sample_tokens = 0
telemetry_every = 30
pictures = false
"""
OPTIMIZERS = {
    "ours": """
[optim]
lr = 1.0
direction = "forgetful"
[optim.norms]
attention = "Half"
mlp = "Half"
""",
    "sign": '[optim]\nname = "sign_sgd"\nlr = 0.003\n[baseline]\nslow = 0.25\n',
    "muon": '[optim]\nname = "muon_adamw"\nlr = 0.01\n',
}


def succeed(root: Path, *argv: str, script: str = "train_gpt.py") -> str:
    """What a command prints."""
    code, out, err = run(root, *argv, script=script)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("of my own")
    shutil.copy(ROOT / "tests/my_parts.py", root)
    (root / "tables.txt").write_text(TEXT)
    for name, optimizer in OPTIMIZERS.items():
        (root / f"{name}.toml").write_text(CONFIG + optimizer)
    arguments = "text", "tables.txt", "--tokenizer", "letters", "--plugin", "my_parts", "--out", "corpora/tables"
    out = succeed(root, *arguments, script="data.prepare")
    assert "letters (41)" in out
    succeed(root, "ours.toml", "--run.name", "whole")
    return root


def losses(folder: Path) -> dict[tuple[int, str], float]:
    """{(step, "val" or "train"): loss}."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {(r["step"], "val" if "val_loss" in r else "train"): r.get("val_loss", r.get("loss")) for r in records}


def test_a_run_has_every_part_of_the_plugin_and_learns(root: Path):
    receipt = (root / "runs/whole/receipt.txt").read_text()
    gate = next(line for line in receipt.splitlines() if "mlp.gate.weight" in line)
    assert "Half" in gate
    found = losses(root / "runs/whole")
    assert found[60, "val"] < found[0, "val"] - 0.5
    assert set(json.loads((root / "runs/whole/summary.json").read_text())["plugins"]) == {"my_parts"}


def test_stopped_and_resumed_it_gives_the_same_losses(root: Path):
    process = start(root, "ours.toml", "--run.name", "stopped")
    deadline = time.monotonic() + 60
    while not list((root / "runs/stopped/checkpoints").glob("step_*")):
        assert process.exitcode is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143, "it ended before it was stopped"
    assert "resumed from" in succeed(root, "runs/stopped/config.toml", "--run.name", "stopped", "--run.resume")
    assert losses(root / "runs/stopped") == losses(root / "runs/whole")


def test_it_samples_in_its_own_tokens(root: Path):
    out = succeed(root, "runs/whole", "--prompt", "3 TIMES 4", "--tokens", "12", script="sample.py")
    assert out.startswith("3 times 4") and len(out.rstrip("\n")) == len("3 times 4") + 12


def test_its_script_gives_its_losses_without_plugin_and_checkout(root: Path):
    bare = root / "bare"
    bare.mkdir()
    (bare / "corpora").symlink_to(root / "corpora")
    succeed(root, "runs/whole", "--out", "bare/script.py", script="studies.export")
    done = subprocess.run([sys.executable, "-I", "script.py"], cwd=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = next(bare.glob("logs/*.txt")).read_text()
    found = re.findall(r"^step:(\d+)/60 (val|train)_loss:([\d.]+) ", log, re.MULTILINE)
    wanted = losses(root / "runs/whole")
    assert {(int(step), kind) for step, kind, _ in found} == wanted.keys() - {(1, "train")}, "which telemetry logs"
    assert max(abs(float(loss) - wanted[int(step), kind]) for step, kind, loss in found) <= 1e-4
    tree = ast.parse((bare / "script.py").read_text())
    defined = {n.name for n in tree.body if isinstance(n, ast.ClassDef)}
    assert {"Half", "Forgetful", "GatedGPT"} <= defined and not {"SignSGD", "Letters"} & defined


def test_its_parts_race_against_muon_and_adamw_on_two_ranks(root: Path):
    """To a page with every entry in it."""
    files = [f"{name}.toml" for name in OPTIMIZERS]
    options = "--name", "race", "--seeds", "1", "--budget", "steps=10", "--nproc", "2", "--workers", "1"
    more = "--train.gradient-accumulation-steps", "1", "--train.eval-tokens", "256"
    succeed(root, *files, *options, *more, script="studies.speedrun")
    results: dict[str, Any] = json.loads((root / "runs/race/results.json").read_text())
    assert [e["name"] for e in results["entries"]] == list(OPTIMIZERS) and results["ranks"] == 2
    assert all(e["at_budget"]["loss"]["mean"] < 3.8 for e in results["entries"]), "all are trained"
    for name in OPTIMIZERS:
        summary = json.loads((root / f"runs/race/{name}.s10.seed0/summary.json").read_text())
        assert summary["world_size"] == 2 and "my_parts" in summary["plugins"]
    page = (root / "runs/race/report.html").read_text(encoding="utf-8")
    assert all(name in page for name in OPTIMIZERS) and (root / "runs/race/report.png").stat().st_size > 10_000
