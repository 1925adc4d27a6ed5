"""One step of Dualized on replicas: wall and CPU seconds at 1, 2 and 4 ranks of one thread each, alternately, and the bytes that each rank sends.

    python -m benchmarks.ranks --width 2048 --layers 1 --repeats 5

The model is a GPT with a small vocabulary, so that matrices dominate as they do in large models. Gradients are random and stay as they are.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from model import GPT, GPTConfig
from optim import Dualized, metrize


def measure(rank: int, world: int, folder: str, width: int, layers: int, steps: int) -> None:
    """In a rank: (wall seconds, CPU seconds) of each step but the first, and bytes sent to others, to <folder>/<rank>."""
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


def run(world: int, width: int, layers: int, steps: int) -> tuple[float, list[float], float]:
    """(median wall seconds of a step, that of the slowest rank; median CPU seconds of each rank; bytes sent over the all-reduce bound, mean of ranks)."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            measure, (world, folder, width, layers, steps), nprocs=world, start_method="fork"
        )
        found = [torch.load(Path(folder) / str(r)) for r in range(world)]
    wall = statistics.median(max(s[i][0] for s, *_ in found) for i in range(steps))
    sent, bound = sum(x for _, x, _ in found), sum(x for *_, x in found)
    return (
        wall,
        [statistics.median(cpu for _, cpu in s) for s, *_ in found],
        sent / bound if bound else 0.0,
    )


def main() -> None:
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
        ratios[wall].append(two[0] / one[0])
        ratios[mean].append(sum(four[1]) / one[1][0])
        ratios[most].append(4 * max(four[1]) / one[1][0])
        print(
            f"{repeat}: wall {one[0]:.3f} s, {two[0]:.3f} s at 2 ranks; CPU {one[1][0]:.3f} s, {' '.join(f'{x:.3f}' for x in four[1])} s at 4;"
            f" bytes over the all-reduce bound {two[2]:.4f}, {four[2]:.4f}",
            flush=True,
        )
    for name, values in ratios.items():
        print(
            f"{name}: median {statistics.median(values):.3f} ({min(values):.3f} … {max(values):.3f}), n = {len(values)}"
        )


if __name__ == "__main__":
    main()
