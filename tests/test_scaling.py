"""studies/scaling.py against real steps: FLOPs, bytes and buffers in real processes, and the loopback interface's own counters.

    unshare -rn sh -c "ip link set lo up && python -m tests.test_scaling"      what test_the_loopback_interface_… runs

w: ranks. r: a rank.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from optim import Dualized, Polar
from studies import scaling
from studies.scaling import ADAMW, MUON, MUON_PLAIN, OURS, ZERO, Case, around, step_of, weights_of
from tests.helpers import ROOT, ranks

# Rows that 4 does not divide, and float32, whose Gram form the wide matrices take.
SMALL = Case("small", GPTConfig(n_layer=3, n_head=1, n_embd=18, block_size=8, vocab_size=67), 4)
FLOAT32, BFLOAT16 = Polar(dtype="float32"), Polar(dtype="bfloat16")
# 4 MB of weights, so that flags, barriers and TCP's own bytes are little beside them.
MEDIUM = Case("medium", GPTConfig(n_layer=2, n_head=2, n_embd=192, block_size=8, vocab_size=512), 4)
GLOO_REDUCE_SCATTER = 2  # gloo sends as much as for an all-reduce; a ring, NCCL's, half of it
LOOPBACK_TOLERANCE = 0.05  # TCP's headers and acknowledgements, flags, barriers

MODES = {1: ("ddp",), 2: ("ddp", "fsdp"), 4: ("ddp", "fsdp", "hsdp")}
SHARDS = 2  # with hsdp


def shards(mode: str, w: int) -> int:
    return {"ddp": 1, "fsdp": w, "hsdp": SHARDS}[mode]


# ---- in the ranks


def real_model(case: Case, polar: Polar, mode: str, w: int) -> GPT:
    """With numbers, and sharded as runtime.py does."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(replace(case.model, zero_init=False), case.optim.norms.build(polar, case.model.n_head), generator)
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
    """Bytes that pass torch.distributed: what all-to-alls send to others, the most that their buffers hold at a time, what FSDP2 gathers and reduces."""

    def __init__(self) -> None:
        self.sent = self.live = self.peak = 0
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
        exchange, gather, scatter = dist.all_to_all_single, dist.all_gather_into_tensor, dist.reduce_scatter_tensor

        def all_to_all_single(target, source, sizes, counts, **kwargs):
            self.sent += (source.numel() - counts[dist.get_rank()]) * source.element_size()
            self.hold(source)
            self.hold(target)
            return exchange(target, source, sizes, counts, **kwargs)

        def all_gather_into_tensor(output_tensor, input_tensor, **kwargs):
            self.gathered.append(output_tensor.nbytes)
            return gather(output_tensor, input_tensor, **kwargs)

        def reduce_scatter_tensor(output, input, **kwargs):
            self.reduced.append(input.nbytes)
            return scatter(output, input, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            for function in (all_to_all_single, all_gather_into_tensor, reduce_scatter_tensor):
                patch.setattr(dist, function.__name__, function)
            yield self


def one_step(rank: int, w: int, case: Case, polar: Polar, mode: str) -> dict[str, int]:
    """What a real step of Dualized did on this rank."""
    model, counted = real_model(case, polar, mode, w), Counted()
    optimizer = Dualized(model, lr=0.1, grads="local")
    with counted.counting(), FlopCounterMode(display=False) as flops:
        backward(model, case, rank)
        around = flops.get_total_flops()
        optimizer.step()
    state = sum((b.to_local() if hasattr(b, "to_local") else b).nbytes for s in optimizer.state.values() for b in s.values())
    return {
        "flops": flops.get_total_flops() - around,
        "sent": counted.sent,
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
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store{w}", w), rank=rank, world_size=w)
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
        found[mode] = {"sent": counted.sent, "loopback": loopback_bytes() - before}
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
            for process in processes:
                process.join(30)
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.kill()
                sys.exit(f"exit codes {[process.exitcode for process in processes]}")
            found[w] = [json.loads(Path(f"{folder}/{w}.{r}").read_text()) for r in range(w)]
    print(json.dumps(found))


# ---- the claims


@pytest.mark.parametrize("w", MODES)
def test_flops_bytes_and_state_of_a_real_step_are_those_predicted(w: int):
    found = ranks(w, steps, SMALL, FLOAT32)
    _, weights = weights_of(SMALL, OURS, FLOAT32)
    for mode in MODES[w]:
        step, real = step_of(OURS, weights, mode, w, shards(mode, w)), {k: [f[mode][k] for f in found] for k in found[0][mode]}
        assert step is not None
        assert real["flops"] == step.whole.tolist(), mode  # products alone are counted; each rank's, so also their sum and the busiest's
        assert real["sent"] == step.sent.round().tolist(), mode
        assert real["state"] == step.state.round().tolist(), mode
        # Live tensors: what leaves and what comes. Replicas keep a copy of the own part and its sum besides. A rank may need less than the stacks that it does not own.
        kept = 2 * step.stepped if mode == "ddp" and w > 1 else torch.zeros(w)
        buffers = torch.tensor(real["buffers"]) + kept
        assert (buffers <= step.buffers).all() and buffers.max() == step.buffers.max(), mode
        if mode == "ddp":
            assert (buffers == step.buffers).all()
        gathers, reduction = (sum(x[k] for x in found_rings(mode, w)) for k in (0, 1))
        assert (real["gathered"], real["reduced"]) == ([gathers] * w, [reduction] * w), mode


def found_rings(mode: str, w: int) -> list[tuple[int, int]]:
    """[(bytes gathered, bytes reduced)] of FSDP2 in a copy, from what is predicted that a ring sends."""
    s, model = shards(mode, w), SMALL.gpt(FLOAT32)
    return [tuple(round(sent * s / (s - 1)) for sent, _ in around(model, 1, mode, w, s).rings[:2])] if mode != "ddp" else []  # type: ignore[list-item]


def test_the_loopback_interface_carries_the_predicted_bytes():
    """In a network namespace of its own, whose loopback interface nobody else uses; where the machine allows none, what ranks count themselves is compared."""
    command = [sys.executable, "-m", "tests.test_scaling"]
    alone = subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], capture_output=True, text=True, timeout=20)
    if alone.returncode == 0:
        command = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    else:
        print(f"no network namespace here, bytes are only counted: {alone.stderr.strip()}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    model, weights = weights_of(MEDIUM, OURS, FLOAT32)
    for w, found in ((int(k), v) for k, v in json.loads(done.stdout.splitlines()[-1]).items()):
        for mode in ("ddp", "fsdp"):
            step = step_of(OURS, weights, mode, w, shards(mode, w))
            assert step is not None
            assert [f[mode]["sent"] for f in found] == step.sent.round().tolist(), (w, mode)
            gather, reduction = [sent for sent, _ in around(model, 1, mode, w, w).rings[:2]] or [0, 0]
            predicted = float(step.sent.sum()) + w * (gather + GLOO_REDUCE_SCATTER * reduction)
            if alone.returncode == 0:
                print(f"w = {w}, {mode}: predicted {predicted:.0f}, loopback {found[0][mode]['loopback']}")
                assert found[0][mode]["loopback"] == pytest.approx(predicted, rel=LOOPBACK_TOLERANCE), (w, mode)


if __name__ == "__main__":
    main()
