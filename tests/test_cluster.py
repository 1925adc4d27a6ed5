"""docs/cluster.md, its sbatch file and the Dockerfile as they are, executed: torchrun agents as machines, network
namespaces, stand-ins for SLURM.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from training import checkpoint
from training.config import Config

from tests.forked_python import forked_python, program
from tests.helpers import ROOT, descendants, run, run_ranks, small_dataset
from tests.test_ranks import EXACT, losses, until

PAGE = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
SBATCH = ROOT / "docs/cluster/train.sbatch"
Agent = subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("machines with spaces")
    small_dataset(root)
    (root / "train_gpt.py").symlink_to(ROOT / "train_gpt.py")
    return root


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with forked_python(tmp_path_factory.mktemp("python")) as path:
        yield path


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[int, float]:
    """The losses of one process."""
    code, _, err = run(root, "small.toml", "--run.name", "alone", *EXACT)
    assert code == 0, err
    return losses(root, "alone")


def free_port() -> int:
    """One of 20000 to 29999."""
    for port in range(20000 + os.getpid() % 9000, 30000):
        with suppress(OSError), closing(socket.create_server(("127.0.0.1", port))):
            return port
    raise AssertionError("no free port")


def commands(having: str) -> list[list[str]]:
    """The page's torchrun commands with this in them, as words."""
    blocks = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("torchrun ") and having in line]


def adapted(python: Path, command: Sequence[str], changes: dict[str, str], *more: str) -> list[str]:
    """A command of the page for two CPUs of this machine; all that is changed must be in it."""
    changes = {
        "torchrun": str(python),
        "--nproc_per_node=8": "--nproc_per_node=1",
        "configs/gpt2_124m.toml": "small.toml",
        **changes,
    }
    assert changes.keys() <= set(command), command
    words = [changes.get(word, word) for word in command]
    return [words[0], "-m", "torch.distributed.run", *words[1:], *more]


@contextmanager
def started(
    root: Path, python: Path, name: str, argvs: Sequence[Sequence[str]], env: dict[str, str] | None = None
) -> Iterator[list[Agent]]:
    """Processes with their output in root/<name>.<i>.log, ended with their children at the end of the block.

    torchrun starts workers by $PYTHON_EXEC.
    """
    processes: list[Agent] = []
    try:
        for i, argv in enumerate(argvs):
            with (root / f"{name}.{i}.log").open("w") as log:
                common = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": str(python)} | (env or {})
                processes.append(
                    subprocess.Popen(argv, cwd=root, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=common)
                )
        yield processes
    finally:
        for pid in [pid for p in processes if p.poll() is None for pid in [*descendants(p.pid), p.pid]]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for p in processes:
            p.wait()


def codes(root: Path, name: str, agents: list[Agent], deadline: float = 60) -> list[int]:
    """Exit codes of all, or a failure with their output."""
    end = time.monotonic() + deadline
    try:
        return [p.wait(max(0.0, end - time.monotonic())) for p in agents]
    except subprocess.TimeoutExpired:
        raise AssertionError("\n".join(said(root, name, i) for i in range(len(agents)))) from None


def said(root: Path, name: str, i: int) -> str:
    return (root / f"{name}.{i}.log").read_text()


def log(root: Path, name: str) -> str:
    return (root / "runs" / name / "log.txt").read_text()


TWO = "backend = gloo for 2 ranks on 2 machines, run.parallel = ddp"
HALVES = ("--train.gradient-accumulation-steps", "1")  # of one process's two micro-batches


# ---- two machines


def test_the_command_for_two_machines_gives_two_agents_the_losses_of_one_process(
    root: Path, python: Path, alone: dict[int, float]
):
    (command,) = commands("node1:29500")
    changes = {
        "--rdzv_endpoint=node1:29500": f"--rdzv_endpoint=127.0.0.1:{free_port()}",
        "--rdzv_id=NAME": "--rdzv_id=two",
        "NAME": "two",
    }
    argv = adapted(python, command, changes, *EXACT, *HALVES)
    # The name of the machine that tests run on may lead anywhere.
    with started(root, python, "two", [argv, argv], {"PET_LOCAL_ADDR": "127.0.0.1"}) as agents:
        assert codes(root, "two", agents) == [0, 0], said(root, "two", 0) + said(root, "two", 1)
    assert TWO in log(root, "two")
    assert losses(root, "two") == pytest.approx(alone, abs=1e-9)


# Two machines and a cable: this shell's namespace is the first, a sleeping process's the second.
NAMESPACES = """set -e
ip link set lo up
unshare --net sleep 600 &
trap "kill $!" EXIT
until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do kill -0 $!; done
ip link add eth0 type veth peer name eth0 netns $!
ip address add 10.0.0.1/24 dev eth0
ip link set eth0 up
nsenter --target $! --net sh -ec 'ip link set lo up; ip address add 10.0.0.2/24 dev eth0; ip link set eth0 up'
echo $!
read -r _ || true
"""


@contextmanager
def namespaces() -> Iterator[tuple[list[int], str]]:
    """(a process in each of two joined network namespaces, "") or ([], why there are none)."""
    command = ["unshare", "--user", "--map-root-user", "--net", "bash", "-c", NAMESPACES]
    try:
        shell = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    except FileNotFoundError as error:
        yield [], str(error)
        return
    assert shell.stdout and shell.stderr
    second = shell.stdout.readline()
    try:
        yield ([shell.pid, int(second)], "") if second else ([], f"exit code {shell.wait()}: {shell.stderr.read()}")
    finally:
        shell.communicate()


def test_two_network_namespaces_train_together_by_the_explicit_commands(
    root: Path, python: Path, alone: dict[int, float]
):
    exports = set(re.findall(r"^export (.*)$", PAGE, re.MULTILINE))
    (words,) = (shlex.split(x) for x in exports)
    variables = dict(word.split("=", 1) for word in words)
    assert variables == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}
    found = commands("--rdzv_conf=is_host")
    argvs = [
        adapted(python, command, {"--rdzv_id=NAME": "--rdzv_id=spaces", "NAME": "spaces"}, *EXACT, *HALVES)
        for command in found
    ]
    assert [[w for w in argv if "10.0.0." in w][-1] for argv in argvs] == [
        "--local_addr=10.0.0.1",
        "--local_addr=10.0.0.2",
    ]
    with namespaces() as (pids, reason):
        if not pids:
            assert reason and not reason.startswith("exit code 0")
            print(f"this machine gives no network namespaces: {reason}")
            return
        inside = [["nsenter", "--target", str(pid), "--user", "--net", "--preserve-credentials", "--"] for pid in pids]
        with started(
            root, python, "spaces", [[*a, *b] for a, b in zip(inside, argvs, strict=True)], variables
        ) as agents:
            assert codes(root, "spaces", agents) == [0, 0], said(root, "spaces", 0) + said(root, "spaces", 1)
    assert TWO in log(root, "spaces")
    assert losses(root, "spaces") == pytest.approx(alone, abs=1e-9)


def test_two_agents_restart_a_run_when_a_worker_of_one_was_killed(root: Path, python: Path):
    """The killed one's agent is held until the other, the host of the rendezvous, has seen its own worker fail: see
    docs/cluster.md on restarts.
    """
    folder = root / "runs/restarted/checkpoints"
    common = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--max-restarts=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{free_port()}",
    ]
    common += ["--rdzv_id=restarted", "--local_addr=127.0.0.1"]
    script = ["train_gpt.py", "small.toml", "--run.name", "restarted", *HALVES, "--train.sample-tokens", "0"]
    script += ["--train.steps", "100", "--train.checkpoint-every", "10"]
    argvs = [
        [str(python), "-m", "torch.distributed.run", *common, f"--rdzv_conf=is_host={i}", *script] for i in range(2)
    ]
    with started(root, python, "restarted", argvs) as agents:
        until(lambda: checkpoint.steps(folder) or any(a.poll() is not None for a in agents))
        assert [a.poll() for a in agents] == [None, None], said(root, "restarted", 0) + said(root, "restarted", 1)
        ours, theirs = (program(python, a.pid) for a in agents)
        (worker,), (other,) = (descendants(p) for p in (ours, theirs))
        os.kill(ours, signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)
        until(lambda: other not in descendants(theirs))
        os.kill(ours, signal.SIGCONT)
        assert codes(root, "restarted", agents) == [0, 0], said(root, "restarted", 0) + said(root, "restarted", 1)
    assert "resumed from runs/restarted/checkpoints/step_" in log(root, "restarted")
    assert list(losses(root, "restarted")) == list(range(1, 101)), "each step once"


# ---- SLURM

STANDINS = {
    # Two tasks, as on two nodes; a SIGTERM to srun itself kills them, as the real one does.
    "srun": """
printf '%s\\n' "$@" > "$FAKE/words"
while [[ $1 == -* ]]; do shift; done
for node in 1 2; do
  "$@" > "$FAKE/task.$node" 2>&1 &
  tasks+=($!)
done
trap 'kill -KILL "${tasks[@]}"' TERM
echo "${tasks[@]}" > "$FAKE/tasks"
highest=0
for task in "${tasks[@]}"; do
  code=0
  wait "$task" || code=$?
  (( code > highest )) && highest=$code
done
exit $highest
""",
    "scancel": """
[[ "$*" == "--signal=TERM $SLURM_JOB_ID.0" ]] || exit 1
kill -TERM $(cat "$FAKE/tasks")
""",
    "scontrol": """
case "$*" in
  "show hostnames node[1-2]") printf '%s\\n' 127.0.0.1 127.0.0.2 ;;
  "requeue $SLURM_JOB_ID") echo "$SLURM_JOB_ID" >> "$FAKE/requeued" ;;
  *) exit 1 ;;
esac
""",
    "torchrun": 'exec "$PYTHON" -m torch.distributed.run "$@"\n',
}


def slurm(folder: Path, python: str, **standins: str) -> dict[str, str]:
    """The environment of a batch script, with stand-ins for SLURM's commands."""
    folder.mkdir()
    for name, text in {**STANDINS, **standins}.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    return {
        "FAKE": str(folder),
        "PYTHON": python,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PET_LOCAL_ADDR": "127.0.0.1",
        "SLURM_JOB_ID": str(free_port() - 20000),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
    }


def test_the_sbatch_file_saves_before_its_time_is_over_queues_itself_again_and_goes_on(root: Path, python: Path):
    assert subprocess.run(["bash", "-n", str(SBATCH)]).returncode == 0
    fake, name = root / "standins", "job"
    env, folder = slurm(fake, str(python)), root / "runs" / name / "checkpoints"
    options = ("--train.steps", "100", "--train.checkpoint-every", "10", "--train.sample-prompt", "times is", *HALVES)
    argv = ["bash", str(SBATCH), "small.toml", name, *options]
    with started(root, python, "job", [argv], env) as (job,):
        until(lambda: checkpoint.steps(folder) or job.poll() is not None)
        assert job.poll() is None, said(root, "job", 0) + (fake / "task.1").read_text()
        job.send_signal(signal.SIGUSR1)
        (code,) = codes(root, "job", [job])
    assert code == 1, "torchrun's, of which SLURM hears nothing more"
    assert (fake / "requeued").read_text() == f"{env['SLURM_JOB_ID']}\n"
    step = int(checkpoint.steps(folder)[-1].name[5:])
    assert f"SIGTERM: saved step {step} in runs/{name};" in log(root, name)
    asked = (fake / "words").read_text().splitlines()
    assert asked[:4] == ["--ntasks-per-node=1", "--cpus-per-task=1", "--kill-on-bad-exit=1", "torchrun"]
    assert asked[-len(options) :] == list(options), "words stay whole"

    with started(root, python, "job", [argv], env) as (job,):
        assert codes(root, "job", [job]) == [0], said(root, "job", 0) + (fake / "task.1").read_text()
    assert TWO in log(root, name)
    assert f"resumed from runs/{name}/checkpoints/step_{step:08d} at step {step}" in log(root, name)
    assert list(losses(root, name)) == list(range(1, 101)), "each step once"
    assert (fake / "requeued").read_text() == f"{env['SLURM_JOB_ID']}\n", "a run at its end is not queued again"


def test_a_job_that_fails_by_itself_is_not_queued_again(tmp_path: Path):
    env = slurm(tmp_path / "standins", sys.executable, srun="exit 7\n")
    found = subprocess.run(
        ["bash", SBATCH, "small.toml", "name"], env=os.environ | env, cwd=tmp_path, capture_output=True, text=True
    )
    assert (found.returncode, found.stderr) == (7, "")
    assert not (tmp_path / "standins/requeued").exists()
    found = subprocess.run(["bash", SBATCH], env=os.environ | env, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode != 0
    assert "usage: sbatch docs/cluster/train.sbatch CONFIG NAME" in found.stderr


# ---- the page


def test_the_programs_of_the_page_train_on_two_ranks(tmp_path: Path):
    programs = re.findall(r"```python\n# (\w+\.py): torchrun.*?\n(.*?)```", PAGE, re.DOTALL)
    assert [name for name, _ in programs] == ["own.py", "sharded.py"]
    for name, text in programs:
        (tmp_path / name).write_text(text)
        (code, out, err), (other, quiet, _) = run_ranks(tmp_path, 2, script=str(tmp_path / name))
        assert (code, other, quiet) == (0, 0, ""), err
        (loss,) = re.findall(r"^loss ([\d.]+)$", out, re.MULTILINE)
        assert float(loss) < 1, "log 8 is 2.08"
    saved = torch.load(tmp_path / "own.pt")
    assert {tuple(s["momentum"].shape) for s in saved["optimizer"]["state"].values()} == {
        tuple(p.shape) for p in saved["model"].values()
    }
    assert {tuple(p.shape) for p in torch.load(tmp_path / "sharded.pt").values()} == {
        tuple(p.shape) for p in saved["model"].values()
    }


def test_options_files_and_variables_that_the_page_names_exist():
    for section, key in set(re.findall(r"\b(run|train)[.]([a-z_]+[a-z])\b", PAGE.replace("-", "_"))) - {
        ("train", "sbatch")
    }:
        assert key in get_type_hints(get_type_hints(Config)[section]), f"{section}.{key}"
    for path in re.findall(r"\]\((?!http)(.*?)\)", PAGE):
        assert (ROOT / "docs" / path.partition("#")[0]).exists(), path
    installed = Path(torch.__file__).parent
    sources = [
        *(installed / "distributed").rglob("*.py"),
        *(installed / "include/torch/csrc/distributed/c10d").glob("*.hpp"),
    ]
    text = "".join(p.read_text(encoding="utf-8") for p in sources)
    inside = (installed / "lib/libtorch_cpu.so").read_bytes() if (installed / "lib/libtorch_cpu.so").is_file() else b""
    for variable in set(re.findall(r"\bTORCH_\w+\b", PAGE + SBATCH.read_text())) - {"TORCH_", "TORCH_INDEX"}:
        assert variable in text or variable.encode() in inside, variable


# ---- the image


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's."""
    text = re.sub(
        r"\\\n", "", "\n".join(x for x in (ROOT / "Dockerfile").read_text().splitlines() if not x.startswith("#"))
    )
    return [(word, rest) for word, rest in (line.split(" ", 1) for line in text.splitlines() if line)]


def ignored(path: str) -> bool:
    """By .dockerignore: the last line that matches the path or a folder above it counts."""
    found = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern, parts = line.removeprefix("!"), path.split("/")
            heads = ["/".join(parts[: i + 1]) for i in range(len(parts))]
            deep = pattern.removeprefix("**/")
            if any(
                x == pattern or ("/" not in x and fnmatch.fnmatch(x, pattern)) or (deep != pattern and x.endswith(deep))
                for x in heads
            ):
                found = not line.startswith("!")
    return found


def test_the_image_gets_what_a_run_needs_and_nothing_else(root: Path, tmp_path: Path):
    image = tmp_path / "image"
    for words in (rest.split() for word, rest in instructions() if word == "COPY"):
        *sources, target = words
        for source in sources:
            found = [p for p in sorted(ROOT.glob(source)) if not ignored(p.name)]
            assert found, f"COPY {source}"
            for path in found:
                to = image / target / path.name if target == "./" else image / target
                if path.is_file():
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, to)
                else:
                    shutil.copytree(
                        path,
                        to,
                        ignore=lambda at, names: [n for n in names if ignored(f"{os.path.relpath(at, ROOT)}/{n}")],
                    )
    for name in (".git", ".venv", "corpora", "runs", "tests", "optim/__pycache__"):
        assert ignored(name), name
        assert not (image / name).exists(), name
    code = subprocess.run(
        [sys.executable, image / "train_gpt.py", "small.toml", "--run.name", "image", "--train.steps", "1", *HALVES],
        cwd=root, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, capture_output=True, text=True,
    )  # fmt: skip
    assert code.returncode == 0, code.stderr
    assert json.loads((root / "runs/image/summary.json").read_text())["steps"] == 1


def test_the_image_installs_torch_first_and_then_the_rest_as_the_makefile_does(tmp_path: Path):
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    for name in ("pip", "useradd", "chown"):
        (tmp_path / name).write_text(
            f'#!/bin/sh\nfor x in {name} "$@"; do printf "%s\\t" "$x"; done >> calls\necho >> calls\n'
        )
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        **dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG"),
    }
    for command in (rest for word, rest in instructions() if word == "RUN"):
        subprocess.run(["sh", "-euc", command], cwd=tmp_path, env=env, check=True)
    calls = [line.split("\t")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]
    torch_line = next(x for x in (ROOT / "requirements.txt").read_text().splitlines() if x.startswith("torch=="))
    pip = ["pip", "install", "--no-cache-dir"]
    assert calls[:2] == [[*pip, "--index-url", "https://pypi.org/simple", torch_line], [*pip, "-r", "requirements.txt"]]
    made = re.findall(r"^\t@\$\(PIP\) (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    index = '$(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") '
    assert made == [
        f"{index}\"$$(grep '^torch==' requirements.txt)\"",
        "-r requirements.txt",
        "-r requirements-dev.txt",
    ]
    assert [call[0] for call in calls[2:]] == ["useradd", "chown"]


def test_the_image_is_pinned_and_runs_torchrun_without_rights():
    found = dict(instructions())
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", found["FROM"])
    assert found["USER"] == "nanodual"
    assert json.loads(found["ENTRYPOINT"]) == ["torchrun"]
    words = [word for word, _ in instructions()]
    assert max(i for i, w in enumerate(words) if w == "RUN") < words.index("USER") < words.index("ENTRYPOINT")
