"""Shared by tests: small datasets, functions run by the ranks of a process group, and train_gpt.py in processes of its
own.

w: ranks, the processes of one group.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SOAK = os.environ.get("NANODUAL_SOAK") == "1"  # `make soak`: tests with the mark `soak` are longer
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
telemetry_every = 0
pictures = false  # they take longer than all else in such a run
"""

# Options of a study whose runs are quick: they keep nothing and say little.
QUICK = ("--train.keep-checkpoints", "0", "--train.sample-tokens", "0", "--train.eval-tokens", "256", "--workers", "2")


def small_dataset(root: Path) -> Path:
    """A dataset of characters under root/corpora/small, and a configuration for it."""
    from data import prepare

    forkserver.ensure_running()  # with what is loaded below, before a study would start it with less
    root.mkdir(parents=True, exist_ok=True)
    (root / "small.txt").write_text(TEXT)
    assert (
        prepare.main(["text", str(root / "small.txt"), "--tokenizer", "chars", "--out", str(root / "corpora/small")])
        == 0
    )
    (root / "small.toml").write_text(SMALL)
    return root / "small.toml"


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.loaded"])


def _join(processes: Sequence[BaseProcess], deadline: float, *, together: bool = False) -> list[int]:
    """Wait until all have ended, or with `together` until one has failed; kill those left, at the deadline at the
    latest, and return their places.
    """
    end, running = time.monotonic() + deadline, {p.sentinel: i for i, p in enumerate(processes)}
    try:
        while running and (ended := wait(list(running), max(0.0, end - time.monotonic()))):
            for i in [running.pop(sentinel) for sentinel in ended]:  # type: ignore[index]
                processes[i].join()
            if together and any(p.exitcode for p in processes):
                break
    finally:
        for i in running.values():
            processes[i].kill()
            processes[i].join()
    return list(running.values())


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and so on."""
    with suppress(FileNotFoundError):
        children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [p for child in children for p in [child, *descendants(child)]]
    return []


# ---- functions in the ranks of a process group


def _rank(folder: str, rank: int, world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """In a child: what the function returns in <folder>/<rank>, or a traceback in <folder>/<rank>.failed."""
    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore", module=r"torch\.")
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{folder}/store", world)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))
        torch.save(function(rank, world, *args), f"{folder}/{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(f"{folder}/{rank}.failed").write_text(traceback.format_exc())
        os._exit(1)  # not by way of destructors, which may wait for the other ranks


def ranks(world: int, function: Callable[..., Any], *args: Any, deadline: float = 60) -> list[Any]:
    """What function(rank, world, *args), of a module, returns in each of `world` real processes, the ranks of a gloo
    group.

    One that fails takes the others with it, and its traceback is the test's failure; so is the deadline (seconds).
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        processes = [_context.Process(target=_rank, args=(folder, r, world, function, args)) for r in range(world)]
        for process in processes:
            process.start()
        killed = _join(processes, deadline, together=True)
        failed = sorted(Path(folder).glob("*.failed"), key=lambda f: f.stat().st_mtime_ns)
        died = [
            f"rank {i} of {world} died, exit code {p.exitcode}"
            for i, p in enumerate(processes)
            if p.exitcode and i not in killed
        ]
        hung = (
            [f"ranks {killed} of {world} were still running" + ("" if died else f" after {deadline} s")]
            if killed
            else []
        )
        assert not died + hung, "\n".join(died + hung + [f"rank {f.stem}: {f.read_text()}" for f in failed])
        return [torch.load(f"{folder}/{r}", weights_only=False) for r in range(world)]


# ---- scripts


def share_server(key: object) -> None:
    """In a child: its own children are forked from the server that it was forked from.

    Python 3.11 would start, and load, another one. key: which 3.14 asks for.
    """
    forkserver._forkserver._forkserver_authkey = key  # type: ignore[attr-defined]
    forkserver._forkserver.ensure_running = lambda: None


def server_key() -> object:
    forkserver.ensure_running()
    return getattr(forkserver._forkserver, "_forkserver_authkey", None)


def _run(script: str, argv: list[str], cwd: str, env: dict[str, str], suffix: str, key: object) -> None:
    """In a child: the script or module as __main__, its output in <cwd>/stdout<suffix> and <cwd>/stderr<suffix>."""
    share_server(key)
    os.chdir(cwd)
    os.environ.update(env)
    for stream in ("stdout", "stderr"):
        file = open(stream + suffix, "w", buffering=1)  # noqa: SIM115 - open as long as the process is
        os.dup2(file.fileno(), getattr(sys, stream).fileno())
    sys.argv = [script, *argv]
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def _start(cwd: Path, argv: Sequence[str], script: str, env: dict[str, str] | None, suffix: str = "") -> BaseProcess:
    process = _context.Process(
        target=_run,
        args=(
            str(ROOT / script) if script.endswith(".py") else script,
            list(argv),
            str(cwd),
            env or {},
            suffix,
            server_key(),
        ),
    )
    process.start()
    return process


def _finish(cwd: Path, processes: Sequence[BaseProcess], suffixes: Sequence[str]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    hanging = _join(processes, 120)
    texts = [[(cwd / f"{stream}{suffix}").read_text() for stream in ("stdout", "stderr")] for suffix in suffixes]
    assert not hanging, f"processes {hanging} of {len(processes)} hang:\n" + "\n".join(texts[i][1] for i in hanging)
    return [(int(p.exitcode or 0), out, err) for p, (out, err) in zip(processes, texts, strict=True)]


def start(cwd: Path, *argv: str, script: str = "train_gpt.py", env: dict[str, str] | None = None) -> BaseProcess:
    """`python train_gpt.py argv…` in cwd, in a real process that is forked from one with torch imported.

    script: a file, or a module as `python -m` takes it. env: added to the environment.
    """
    return _start(cwd, argv, script, env)


def run(cwd: Path, *argv: str, script: str = "train_gpt.py", env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """The same to its end: (exit code, stdout, stderr)."""
    return _finish(cwd, [_start(cwd, argv, script, env)], [""])[0]


def start_ranks(
    cwd: Path, world: int, *argv: str, script: str = "train_gpt.py", env: dict[str, str] | None = None
) -> list[BaseProcess]:
    """`torchrun --nproc_per_node=world train_gpt.py argv…` in cwd, without torchrun: each rank's output in
    cwd/stdout.<rank> and cwd/stderr.<rank>.
    """
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    common = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [
        _start(cwd, argv, script, common | {"RANK": str(r), "LOCAL_RANK": str(r)} | (env or {}), f".{r}")
        for r in range(world)
    ]


def run_ranks(
    cwd: Path, world: int, *argv: str, script: str = "train_gpt.py", env: dict[str, str] | None = None
) -> list[tuple[int, str, str]]:
    """The same to the end of all: (exit code, stdout, stderr) of each rank."""
    return _finish(cwd, start_ranks(cwd, world, *argv, script=script, env=env), [f".{r}" for r in range(world)])
