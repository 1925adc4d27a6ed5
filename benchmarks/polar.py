"""Polar factors: torch.optim.Muon's iteration, the forms of optim/polar.py and the SVD, in turns.

    python -m benchmarks.polar [--stack 12] [--shapes 768x768 768x3072] [--repeats 9]

Prints milliseconds per matrix (median) and the median of the ratios to torch.optim.Muon's
iteration. Muon's is torch's own function, called as torch.optim.Muon calls it: matrix by matrix,
with its default coefficients and steps (5, bf16). Ours takes the stack, as Dualized does; the
schedule is `jordan`, the same polynomial.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import _muon

from optim.polar import Polar

MUON = (3.4445, -4.7750, 2.0315)


def candidates() -> dict[str, Callable[[Tensor], Tensor]]:
    """Return every way to compute the polar factors of a stack, by name."""
    muon = getattr(_muon, "_zeropower_via_newtonschulz")  # noqa: B009 - private: the peer
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "torch.optim.Muon": lambda G: torch.stack([muon(g, MUON, 5, 1e-7) for g in G])
    }
    for form in ("plain", "gram"):
        for dtype in ("bfloat16", "float32"):
            ways[f"jordan {form} {dtype}"] = Polar("jordan", form, dtype)  # type: ignore[arg-type]
    return ways | {"exact (SVD)": Polar("exact")}


def main() -> None:
    """Time the candidates alternately, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["768x768", "768x3072"])
    parser.add_argument("--stack", type=int, default=12, help="equal matrices in one call")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, "
        f"stacks of {args.stack}, n = {args.repeats}"
    )
    for shape in args.shapes:
        G = torch.randn(args.stack, *map(int, shape.split("x")), device=args.device)
        seconds: dict[str, list[float]] = {name: [] for name in candidates()}
        for repeat in range(args.repeats + 1):
            for name, polar in candidates().items():
                start = time.perf_counter()
                polar(G).sum().item()
                if repeat:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
        peer = seconds["torch.optim.Muon"]
        for name, times in seconds.items():
            ratio = statistics.median(p / t for p, t in zip(peer, times, strict=True))
            milliseconds = 1e3 * statistics.median(times) / args.stack
            print(
                f"{shape:>10}  {name:<22} {milliseconds:8.1f} ms   "
                f"{ratio:5.2f}× as fast as torch.optim.Muon"
            )


if __name__ == "__main__":
    main()
