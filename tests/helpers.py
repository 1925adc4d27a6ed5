"""Shared by tests: small datasets, and train_gpt.py run in processes of its own."""

import multiprocessing
import os
import runpy
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = "".join(f"{i} times {j} is {i * j}.\n" for i in range(40) for j in range(40))

SMALL = """
[run]
device = "cpu"
precision = "fp32"
threads = 1
[data]
dataset = "corpora/small"
[model]
n_layer = 2
n_head = 2
n_embd = 16
block_size = 16
dropout = 0.1
[optim]
lr = 3.0
[train]
steps = 12
batch_size = 8
gradient_accumulation_steps = 2
eval_tokens = 512
log_every = 1
checkpoint_every = 4
sample_tokens = 8
"""


def small_dataset(root: Path) -> Path:
    """A dataset of characters under root/corpora/small, and a configuration for it."""
    from data import prepare

    root.mkdir(parents=True, exist_ok=True)
    (root / "small.txt").write_text(TEXT)
    assert prepare.main(["text", str(root / "small.txt"), "--tokenizer", "chars", "--out", str(root / "corpora/small")]) == 0
    (root / "small.toml").write_text(SMALL)
    return root / "small.toml"


def _run(script: str, argv: list[str], cwd: str) -> None:
    """In a child: the script as __main__, its output in <cwd>/stdout and <cwd>/stderr."""
    os.chdir(cwd)
    for stream in ("stdout", "stderr"):
        file = open(stream, "w", buffering=1)  # noqa: SIM115 - open as long as the process is
        os.dup2(file.fileno(), getattr(sys, stream).fileno())
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name="__main__")


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "config", "checkpoint", "telemetry", "data.loader"])


def start(cwd: Path, *argv: str, script: str = "train_gpt.py") -> BaseProcess:
    """`python train_gpt.py argv…` in cwd, in a real process that is forked from one with torch imported."""
    process = _context.Process(target=_run, args=(str(ROOT / script), list(argv), str(cwd)))
    process.start()
    return process


def run(cwd: Path, *argv: str, script: str = "train_gpt.py") -> tuple[int, str, str]:
    """The same to its end: (exit code, stdout, stderr)."""
    process = start(cwd, *argv, script=script)
    process.join(120)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode, (cwd / "stdout").read_text(), (cwd / "stderr").read_text()
