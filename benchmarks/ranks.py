"""One step of Dualized on replicas: its seconds, and the bytes that each rank sends.

    python -m benchmarks.ranks --width 2048 --layers 1 --repeats 5

Wall and CPU seconds at 1, 2 and 4 ranks of one thread each, alternately. The model is a GPT with a
small vocabulary, so that matrices dominate as they do in large models. Gradients are random and
stay as they are.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from model import GPT, GPTConfig
from optim import Dualized, metrize


def measure(rank: int, world: int, folder: str, width: int, layers: int, steps: int) -> None:
    """Take steps in one rank, and save what they cost in <folder>/<rank>.

    That is (wall seconds, CPU seconds) of each step but the first, the bytes that the last step
    sent, and those of a ring all-reduce.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    model = GPT(
        GPTConfig(n_layer=layers, n_head=8, n_embd=width, block_size=64, vocab_size=256),
        generator=torch.Generator().manual_seed(0),
    )
    optimizer = Dualized(
        model, 0.01, norm=metrize(model, model.structure()), direction="nesterov", grads="local"
    )
    generator, sent, exchange = torch.Generator().manual_seed(rank), [0], dist.all_to_all_single

    def counted(
        target: torch.Tensor, source: torch.Tensor, *args: object, **kwargs: object
    ) -> object:
        sent[0] += source.nbytes
        return exchange(target, source, *args, **kwargs)  # type: ignore[arg-type]

    dist.all_to_all_single = counted  # type: ignore[assignment]
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn(p.shape, generator=generator)
    seconds = []
    for _ in range(steps + 1):
        dist.barrier()
        sent[0], wall, cpu = 0, time.perf_counter(), time.process_time()
        optimizer.step()
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    bound = 2 * (world - 1) / world * sum(p.nbytes for p in model.parameters())
    torch.save((seconds[1:], sent[0], bound), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True)
class Cost:
    """The cost of a step at some number of ranks, medians over steps."""

    wall: float
    """Seconds of the slowest rank."""

    cpu: list[float]
    """CPU seconds of each rank."""

    bytes_over_bound: float
    """Bytes sent over those of a ring all-reduce, over all ranks."""


def run(world: int, width: int, layers: int, steps: int) -> Cost:
    """Return the cost of a step at this number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            measure, (world, folder, width, layers, steps), nprocs=world, start_method="fork"
        )
        ranks = [torch.load(Path(folder) / str(r)) for r in range(world)]
    wall = statistics.median(max(seconds[i][0] for seconds, *_ in ranks) for i in range(steps))
    sent, bound = sum(x for _, x, _ in ranks), sum(x for *_, x in ranks)
    cpu = [statistics.median(cpu for _, cpu in seconds) for seconds, *_ in ranks]
    return Cost(wall, cpu, sent / bound if bound else 0.0)


def main() -> None:
    """Run 1, 2 and 4 ranks alternately, and print the ratios of their costs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    wall, mean, most = (
        "wall, 2 ranks / 1",
        "CPU of the mean rank of 4 / a quarter of 1",
        "CPU of the busiest rank of 4 / a quarter of 1",
    )
    ratios: dict[str, list[float]] = {wall: [], mean: [], most: []}
    for repeat in range(args.repeats):
        one, two, four = (run(world, args.width, args.layers, args.steps) for world in (1, 2, 4))
        ratios[wall].append(two.wall / one.wall)
        ratios[mean].append(sum(four.cpu) / one.cpu[0])
        ratios[most].append(4 * max(four.cpu) / one.cpu[0])
        cpu = " ".join(f"{x:.3f}" for x in four.cpu)
        print(
            f"{repeat}: wall {one.wall:.3f} s, {two.wall:.3f} s at 2 ranks; "
            f"CPU {one.cpu[0]:.3f} s, {cpu} s at 4; "
            f"bytes over the all-reduce bound {two.bytes_over_bound:.4f}, "
            f"{four.bytes_over_bound:.4f}",
            flush=True,
        )
    for name, values in ratios.items():
        spread = f"({min(values):.3f} … {max(values):.3f})"
        print(f"{name}: median {statistics.median(values):.3f} {spread}, n = {len(values)}")


if __name__ == "__main__":
    main()
