"""Where numbers come from: the source tree, and the machine."""

import os
import platform
import re
import subprocess
from pathlib import Path

import torch

# Paths of git, from this folder: the whole tree but what studies append to while they run.
CODE = (":/", ":(exclude)../studies/results/*.jsonl")


def git_state() -> tuple[str | None, bool | None]:
    """Return (commit, uncommitted changes) of this source tree, (None, None) outside git.

    Lines that studies append to their results are no changes of it: they say what it computed.
    """

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", *CODE))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def hardware(device: str) -> str:
    """Return the processor, the cores that this process may use, and torch's vector instructions.

    device: its name, which is told first where it is not a CPU.
    """
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    named = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = named[1] if named else platform.processor() or platform.machine()
    cpu = f"{processor}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"
    return cpu if device.startswith("cpu") else f"{device} ({cpu})"
