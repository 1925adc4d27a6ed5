"""studies/cost_model/ against real steps: FLOPs, bytes and buffers in real processes, and the loopback interface's own
counters.

What test_the_loopback_interface_… runs, nearly:

    unshare -rn sh -c "ip link set lo up && python -m tests.test_cost_model"

w: ranks. r: a rank.
"""

import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from model import GPT
from models import ModelConfig
from optim import Dualized
from optim.polar import Polar
from optim.ranks import Ranks
from studies.cost_model.cases import Case, family
from studies.cost_model.command import main as count
from studies.cost_model.optimizers import ADAMW, MUON, MUON_PLAIN, OURS, ZERO, weights_of
from studies.cost_model.step import around, step_of
from studies.cost_model.tables import TABLES
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode
from training.config import OptimConfig

from tests.forked_python import forked_python
from tests.helpers import ROOT, ranks

# Rows that 4 does not divide, and float32, whose Gram form the wide matrices take.
SMALL = Case("small", ModelConfig(n_layer=3, n_head=1, n_embd=18, block_size=8, vocab_size=67), 4)
HALF = replace(SMALL, name="half", optim=OptimConfig(param_dtype="bfloat16"))  # with float32 masters
FACTORED = replace(SMALL, name="factored", optim=OptimConfig(direction="factored"))
WHITENED = replace(SMALL, name="whitened", optim=OptimConfig(direction="whitened", refresh_every=1))
FLOAT32, BFLOAT16 = Polar(dtype="float32"), Polar(dtype="bfloat16")
# 4 MB of weights, so that flags, barriers and TCP's own bytes are little beside them.
MEDIUM = Case("medium", ModelConfig(n_layer=2, n_head=2, n_embd=192, block_size=8, vocab_size=512), 4)
GLOO_REDUCE_SCATTER = 2  # gloo sends as much as for an all-reduce; a ring, NCCL's, half of it
LOOPBACK_TOLERANCE = 0.05  # TCP's headers and acknowledgements, flags, barriers

# As torch calls them from 2.13 on, and before.
FSDP_COLLECTIVES = ("all_gather_single", "reduce_scatter_single")
if not hasattr(dist, FSDP_COLLECTIVES[0]):
    FSDP_COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor")

MODES = {1: ("ddp",), 2: ("ddp", "fsdp"), 4: ("ddp", "fsdp", "hsdp")}
SHARDS = 2  # with hsdp


def shards(mode: str, w: int) -> int:
    return {"ddp": 1, "fsdp": w, "hsdp": SHARDS}[mode]


# ---- in the ranks


def real_model(case: Case, polar: Polar, mode: str, w: int) -> GPT:
    """With numbers, and sharded as training/ranks.py does."""
    generator = torch.Generator().manual_seed(0)
    norms = case.optim.norms.build(polar, case.model.n_head)
    model = GPT(replace(case.model, zero_init=False), norms, generator).to(getattr(torch, case.optim.param_dtype))
    if mode != "ddp":
        shape, names = ((w,), ("shard",)) if mode == "fsdp" else ((w // SHARDS, SHARDS), ("replicate", "shard"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for unit in (*model.blocks, model):
            fully_shard(unit, mesh=mesh)
    return model


def backward(model: GPT, case: Case, rank: int) -> None:
    generator = torch.Generator().manual_seed(1 + rank)
    idx = torch.randint(case.model.vocab_size or 0, (1, case.model.block_size + 1), generator=generator)
    loss = model(idx[:, :-1], idx[:, 1:])[1]
    assert loss is not None
    loss.backward()


class Counted:
    """Bytes that pass torch.distributed: what all-to-alls send to others, and rings of a direction's sums; the most
    that the former's buffers hold at a time; what FSDP2 gathers and reduces.
    """

    def __init__(self) -> None:
        self.sent = 0.0
        self.live = self.peak = 0
        self.gathered: list[int] = []
        self.reduced: list[int] = []

    def hold(self, x: Tensor) -> None:
        self.live += x.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(x, self.drop, x.nbytes)

    def drop(self, size: int) -> None:
        self.live -= size

    @contextmanager
    def counting(self):
        exchange = dist.all_to_all_single

        def all_to_all_single(target, source, sizes, counts, **kwargs):
            self.sent += (source.numel() - counts[dist.get_rank()]) * source.element_size()
            self.hold(source)
            self.hold(target)
            # Other tensors of the same memory, as gloo's thread lets go of what it was given some time after wait().
            target, source = (x.new_empty(0).set_(x) for x in (target, source))
            return exchange(target, source, sizes, counts, **kwargs)

        def noting(name: str, sizes: list[int]):
            collective = getattr(dist, name)

            def noted(*args, **kwargs):
                sizes.append(max(x.nbytes for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
                return collective(*args, **kwargs)

            return noted

        total = Ranks.total

        def summed(ranks: Ranks, x: Tensor) -> Tensor:
            self.sent += 2 * (ranks.size - 1) / ranks.size * x.nbytes
            return total(ranks, x)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ranks, "total", summed)
            patch.setattr(dist, "all_to_all_single", all_to_all_single)
            for name, sizes in zip(FSDP_COLLECTIVES, (self.gathered, self.reduced), strict=True):
                patch.setattr(dist, name, noting(name, sizes))
            yield self


def one_step(rank: int, w: int, case: Case, polar: Polar, mode: str) -> dict[str, int]:
    """What a real step of Dualized did on this rank."""
    model, counted = real_model(case, polar, mode, w), Counted()
    optimizer = Dualized(
        model, lr=0.1, grads="local", direction=case.optim.direction, master_weights=case.optim.master_weights
    )
    with counted.counting(), FlopCounterMode(display=False) as flops:
        backward(model, case, rank)
        around = flops.get_total_flops()
        optimizer.step()
    state = sum(
        (b.to_local() if hasattr(b, "to_local") else b).nbytes for s in optimizer.state.values() for b in s.values()
    )
    return {
        "flops": flops.get_total_flops() - around,
        "sent": round(counted.sent),
        "buffers": counted.peak,
        "state": state,
        "gathered": sum(counted.gathered),
        "reduced": sum(counted.reduced),
    }


def steps(rank: int, w: int, case: Case, polar: Polar) -> dict[str, dict[str, int]]:
    return {mode: one_step(rank, w, case, polar, mode) for mode in MODES[w]}


def traffic(rank: int, w: int, folder: str) -> None:
    """Of each mode, what a step counted on this rank, and what the loopback interface sent from all of them."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{w}", w)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=w, timeout=timedelta(seconds=20))
    found = {}
    for mode in ("ddp", "fsdp"):
        model, counted = real_model(MEDIUM, FLOAT32, mode, w), Counted()
        optimizer = Dualized(model, lr=0.1, grads="local")
        dist.barrier()
        before = loopback_bytes()
        dist.barrier()  # nobody sends before all have read
        with counted.counting():
            backward(model, MEDIUM, rank)
            optimizer.step()
        dist.barrier()
        found[mode] = {"sent": round(counted.sent), "loopback": loopback_bytes() - before}
        dist.barrier()
    Path(f"{folder}/{w}.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def loopback_bytes() -> int:
    """Sent so far, of the network namespace that this process is in."""
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def main() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    fork, found = multiprocessing.get_context("fork"), {}
    with tempfile.TemporaryDirectory() as folder:
        for w in (2, 4):
            processes = [fork.Process(target=traffic, args=(r, w, folder)) for r in range(w)]
            for process in processes:
                process.start()
            end = time.monotonic() + 40
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
            codes = [process.exitcode for process in processes]
            for process in processes:
                process.kill()
            if any(codes) or None in codes:
                sys.exit(f"exit codes of {w} ranks: {codes}")
            found[w] = [json.loads(Path(f"{folder}/{w}.{r}").read_text()) for r in range(w)]
    print(json.dumps(found))


# ---- the claims


@pytest.mark.parametrize(
    ("case", "w"),
    [(SMALL, 1), (SMALL, 2), (SMALL, 4), (HALF, 2), (FACTORED, 2), (FACTORED, 4), (WHITENED, 1), (WHITENED, 4)],
    ids=lambda x: getattr(x, "name", x),
)
def test_flops_bytes_and_memory_of_a_real_step_are_those_predicted(case: Case, w: int):
    found = ranks(w, steps, case, FLOAT32)
    model, weights = weights_of(case, OURS, FLOAT32)
    for mode in MODES[w]:
        step, real = (
            step_of(OURS, weights, mode, w, shards(mode, w)),
            {k: [f[mode][k] for f in found] for k in found[0][mode]},
        )
        assert step is not None
        assert real["flops"] == (step.whole + step.products).round().tolist(), (
            mode
        )  # products alone are counted; each rank's, so also their sum and the busiest's
        assert real["sent"] == step.sent.round().tolist(), mode
        assert real["state"] == step.state.round().tolist(), mode
        # Live tensors are what leaves and what comes; replicas keep a copy of the own part and its float32 sum besides.
        kept = step.stepped * (1 + 4 / model.head.weight.element_size()) if mode == "ddp" and w > 1 else torch.zeros(w)
        buffers = torch.tensor(real["buffers"]) + kept
        assert (buffers <= step.buffers).all() and buffers.max() == step.buffers.max(), mode
        # FSDP2's own: what a ring sends is (s − 1)/s of what is gathered or reduced.
        s = shards(mode, w)
        gathered, reduced = [round(sent * s / (s - 1)) for sent, _ in around(model, 1, mode, w, s).rings[:2]] or [0, 0]
        assert (real["gathered"], real["reduced"]) == ([gathered] * w, [reduced] * w), mode


def test_the_loopback_interface_carries_the_predicted_bytes(tmp_path: Path):
    """In a network namespace of its own, whose loopback interface nobody else uses; where the machine allows none, what
    ranks count themselves is compared.
    """
    alone = subprocess.run(["sh", "-c", "unshare -rn ip link set lo up"], capture_output=True, text=True, timeout=20)
    if alone.returncode == 0:
        # Without TCP's loss probes, which send 64 KB again where an acknowledgement is delayed, as it is on a busy
        # machine.
        prepared = 'ip link set lo up; { echo 0 > /proc/sys/net/ipv4/tcp_early_retrans; } 2> /dev/null; exec "$@"'
        command = ["unshare", "-rn", "sh", "-c", prepared, "sh"]
    else:
        command = []
        print(f"no network namespace here, bytes are only counted: {alone.stderr.strip()}")
    model, weights = weights_of(MEDIUM, OURS, FLOAT32)
    lowest: dict[tuple[str, str], int] = {}
    for i in range(3):  # a busy machine sends some packets twice: bytes are only ever added
        (tmp_path / str(i)).mkdir()
        with forked_python(tmp_path / str(i)) as python:
            done = subprocess.run(
                [*command, python, "-m", "tests.test_cost_model"], cwd=ROOT, capture_output=True, text=True, timeout=100
            )
        assert done.returncode == 0, done.stderr
        close = True
        for w, found in ((int(k), v) for k, v in json.loads(done.stdout.splitlines()[-1]).items()):
            for mode in ("ddp", "fsdp"):
                step = step_of(OURS, weights, mode, w, shards(mode, w))
                assert step is not None
                assert [f[mode]["sent"] for f in found] == step.sent.round().tolist(), (w, mode)
                gather, reduction = [sent for sent, _ in around(model, 1, mode, w, w).rings[:2]] or [0, 0]
                predicted = float(step.sent.sum()) + w * (gather + GLOO_REDUCE_SCATTER * reduction)
                if alone.returncode == 0:
                    key = str(w), mode
                    lowest[key] = min(found[0][mode]["loopback"], lowest.get(key, found[0][mode]["loopback"]))
                    print(f"w = {w}, {mode}: predicted {predicted:.0f}, loopback {found[0][mode]['loopback']}")
                    close &= lowest[key] == pytest.approx(predicted, rel=LOOPBACK_TOLERANCE)
        if close:
            return
    pytest.fail("the lowest of three is not what is predicted; see above")


@pytest.mark.parametrize("polar", [FLOAT32, BFLOAT16, Polar("jordan", "plain"), Polar("quintic", "gram")], ids=str)
def test_flops_of_every_form_are_those_predicted(polar: Polar):
    model = real_model(SMALL, polar, "ddp", 1)
    optimizer = Dualized(model, lr=0.1)
    backward(model, SMALL, 0)
    with FlopCounterMode(display=False) as flops:
        optimizer.step()
    assert flops.get_total_flops() == sum(x.whole for x in weights_of(SMALL, OURS, polar)[1])


def test_muon_and_adamw_cost_what_torchs_own_do():
    model = real_model(SMALL, MUON, "ddp", 1)
    backward(model, SMALL, 0)
    hidden = list(model.blocks.parameters())
    rest = [model.embedding.weight, model.head.weight]

    def cost(*optimizers: torch.optim.Optimizer) -> tuple[int, int]:
        """(FLOPs of products, bytes of buffers); counters of steps are no buffers."""
        with FlopCounterMode(display=False) as flops:
            for optimizer in optimizers:
                optimizer.step()
        buffers = [b for o in optimizers for s in o.state.values() for k, b in s.items() if k != "step"]
        return flops.get_total_flops(), sum(b.nbytes for b in buffers)

    for name, real in (
        (MUON_PLAIN, cost(torch.optim.Muon(hidden), torch.optim.AdamW(rest))),
        (ADAMW, cost(torch.optim.AdamW(model.parameters()))),
    ):
        step = step_of(name, weights_of(SMALL, name)[1], "ddp", 1, 1)
        assert step is not None and real == (step.whole.item(), step.state.item()), name


@pytest.mark.parametrize(("name", "billions"), [("6.7B", 6.7), ("13B", 13.0), ("175B", 175.0), ("1T", 1008.0)])
def test_the_family_has_the_published_sizes(name: str, billions: float):
    """Within 4 %: our head is not tied to the embedding, and 13B is 5120 wide."""
    assert family()[name].gpt(MUON).num_params() == pytest.approx(1e9 * billions, rel=0.04)


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hsdp"])
def test_the_largest_matrix_bounds_the_busiest_gpu_and_most_gpus_have_none(mode: str):
    _, weights = weights_of(family()["124M"], OURS)
    matrices = [x.whole for x in weights if x.whole]
    for w in (64, 512):
        step = step_of(OURS, weights, mode, w, {"ddp": 1, "fsdp": w, "hsdp": 8}[mode])
        assert step is not None
        assert step.whole.max() >= max(matrices) and step.whole.sum() == sum(matrices)
        assert (step.whole > 0).sum() == min(w, len(matrices))
    assert step.whole.max() == max(matrices)  # pyright: ignore[reportPossiblyUnboundVariable]


@pytest.mark.parametrize("w", [1, 2, 3, 8])
def test_replicas_send_what_a_ring_all_reduce_sends_on_average(w: int):
    momentum_alone = replace(SMALL, optim=OptimConfig(direction="nesterov"))  # whose step sums nothing over ranks
    _, weights = weights_of(momentum_alone, OURS)
    step, ring = (step_of(name, weights, "ddp", w, 1) for name in (OURS, ADAMW))
    assert step is not None and ring is not None
    assert step.sent.mean() == pytest.approx(float(ring.sent.mean()))


def documented() -> list[tuple[str, str]]:
    """[(arguments, what stands below them)] of the commands in docs/scaling.md."""
    parts = re.split(
        r"^    python -m studies\.cost_model (.*--markdown)$", (ROOT / "docs/scaling.md").read_text(), flags=re.M
    )
    return [(arguments, below.split("\n#")[0]) for arguments, below in zip(parts[1::2], parts[2::2], strict=True)]


@pytest.mark.parametrize("which", range(4))
def test_the_tables_in_the_documentation_are_the_commands_own(which: int, capsys: pytest.CaptureFixture[str]):
    """Rows of up to 1024 GPUs; the others take most of a minute."""
    found = documented()
    assert len(found) == 4
    arguments, below = found[which]
    argv = shlex.split(arguments)
    first = argv.index("--gpus") + 1
    last = next(i for i in range(first, len(argv)) if argv[i].startswith("--"))
    argv[first:last] = few = [w for w in argv[first:last] if int(w) <= 1024]
    count(argv)
    printed = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("&ast;")]
    gpus = {f"{int(w):,}" for w in few}
    kept = [
        line
        for line in below.splitlines()
        if line[:2] in ("| ", "- ", "**") and (line.count("|") < 5 or is_kept(line, gpus))
    ]
    assert printed == kept


def is_kept(line: str, gpus: set[str]) -> bool:
    """Whether a table's line is a heading, or a row of so many GPUs."""
    cell = line.split("|")[2].strip().removesuffix("*")
    return cell in gpus or not cell[0].isdigit()


def test_the_command_prints_its_tables(capsys: pytest.CaptureFixture[str]):
    count(
        [
            "--config",
            str(ROOT / "configs/gpt2_124m.toml"),
            "--gpus",
            "1",
            "1024",
            "--parallel",
            "fsdp",
            "--optimizer",
            OURS,
            ZERO,
            ADAMW,
        ]
    )
    printed = capsys.readouterr().out
    assert "gpt2_124m: 162,201,600 weights" in printed and "estimates, not measured" in printed
    assert len(re.findall(r"^gpt2_124m  1,024\*  fsdp ", printed, re.M)) == 2 * len(
        TABLES
    )  # sharded AdamW is AdamW there


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpus", "12", "--parallel", "hsdp"], "--shards\n  got: 8\n  allowed: a divisor of the 12 GPUs"),
        (
            ["--tokens-per-step", "1000"],
            "--tokens-per-step\n  got: 1000\n  allowed: a multiple of 124M's 1024 tokens a sequence\n  fix: 1024",
        ),
        (["--config", str(ROOT / "configs/points/soap.toml")], "optim.direction\n  got: 'soap'\n  allowed: "),
        (["--gpus", "0"], "--gpus\n  got: 0\n  allowed: 1 or more"),
    ],
)
def test_what_cannot_be_counted_is_refused(argv: list[str], message: str):
    with pytest.raises(SystemExit, match=re.escape(message)):
        count(argv)


if __name__ == "__main__":
    main()
