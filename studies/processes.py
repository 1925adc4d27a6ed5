"""A script in processes of its own, one a rank, which end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = [  # what takes train_gpt.py seconds to import
    "torch",
    "tqdm",
    "matplotlib.pyplot",
    "models",
    "data.loader",
    "training.config",
    "training.checkpoint",
]


def start(
    script: Path, config: Path, environments: Sequence[Mapping[str, str]]
) -> list[BaseProcess]:
    """Start a script on a configuration file, one process for each rank's environment.

    The first rank's output goes to <name>.log beside <name>.toml, that of the others to
    <name>.<rank>.log.
    """
    processes = []
    for rank, environment in enumerate(environments):
        log = config.with_name(f"{config.stem}.{rank}.log" if rank else f"{config.stem}.log")
        log.write_text("")
        process = _context().Process(
            target=_run_script, args=(str(script), str(config), str(log), environment)
        )
        process.start()
        processes.append(process)
    return processes


def end(processes: Sequence[BaseProcess]) -> None:
    """Terminate the processes that still run, and wait for all of them."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def _context() -> Any:
    """Return how processes are started: forked from one that has imported torch, if possible.

    A run then starts in a tenth of a second.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _run_script(script: str, config: str, log: str, environment: dict[str, str]) -> None:
    """Run the script, in the child, until its parent ends.

    A child that is left behind would write where the next call begins the same run anew.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    os.environ.update(environment)
    with open(log, "w", buffering=1) as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
        sys.argv = [script, config]
        runpy.run_path(script, run_name="__main__")
