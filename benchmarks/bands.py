"""Where the schedules of optim/polar.py bring singular values: below their floor, and in bfloat16.

    python -m benchmarks.bands [--shapes 64x64 256x64 768x768 768x3072] [--seeds 20]

Two tables in markdown, about a minute. The first: each schedule's polynomial on a dense grid of
scalars in float64, its argument in units of ‖G‖_F. The second: matrices of known spectra, iterated
in bfloat16 and float32; singular values of the result by SVD in float64. Figures are rounded
outward. The seeds are for sides below 512; larger matrices vary less, and have one.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from optim.polar import SCHEDULES, Polar, Schedule

GRID = 400_001  # points on twelve decades: more only changes a maximum by less than 1e-8
LARGE = 512  # a side from which an SVD takes a tenth of a second
ITERATIONS = {
    "bfloat16, plain": ("plain", "bfloat16"),
    "bfloat16, Gram": ("gram", "bfloat16"),
    "float32": ("auto", "float32"),
}


def up(x: float) -> str:
    """Return a figure rounded up."""
    return f"{math.ceil(1e4 * x - 1e-9) / 1e4:.4f}"


def down(x: float) -> str:
    """Return a figure rounded down."""
    return f"{math.floor(1e4 * x + 1e-9) / 1e4:.4f}"


def scalar(schedule: Schedule, x: Tensor) -> Tensor:
    """Return what a schedule makes of singular values x, in units of ‖G‖_F."""
    x = x / schedule.safety
    for a, b, c in schedule.coefficients:
        x = a * x + b * x**3 + c * x**5
    return x


def below_the_floor() -> None:
    """Print each schedule's polynomial at and below its floor."""
    print("| schedule | slope at 0 | at the floor | floor/10 | floor/100 | floor/1000", end="")
    print(" | largest below the floor | upper edge | rises up to |\n" + "|---" * 9 + "|")
    for schedule in SCHEDULES.values():
        floor = schedule.floor
        x = torch.logspace(-12, 0, GRID, dtype=torch.float64)
        y = scalar(schedule, x)
        falls = (y.diff() < 0).nonzero()[0].item()
        slope = math.prod(a for a, _, _ in schedule.coefficients) / schedule.safety
        at = scalar(schedule, torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64) * floor)
        cells = [f"{slope:.0f}", *(f"{v:.5f}" for v in at.tolist()), up(y[x < floor].max().item())]
        cells += [f"{schedule.band[1]:g}", f"{x[int(falls)].item():.1e}"]
        print(f"| `{schedule.name}` | " + " | ".join(cells) + " |")


def log_uniform(m: int, lowest: float) -> Tensor:
    """Return m singular values from 1 down to lowest · ‖·‖_F."""
    S = torch.ones(m, dtype=torch.float64)
    for _ in range(60):  # a fixed point: the last is lowest · ‖S‖, which depends on it weakly
        S = torch.logspace(0, math.log10(lowest * S.norm().item()), m, dtype=torch.float64)
    return S


def haar(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """Return a random matrix with orthonormal columns."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=g, dtype=torch.float64))[0]


def matrices(m: int, n: int, floor: float, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (spectrum, its singular values, a matrix (m, n) that has them), m <= n."""
    g = torch.Generator().manual_seed(seed)
    U, V = haar(m, m, g), haar(n, m, g)
    half = torch.cat([log_uniform(m // 2, floor), torch.zeros(m - m // 2, dtype=torch.float64)])
    spectra = {"floor": log_uniform(m, floor), "tail": log_uniform(m, floor / 100), "half": half}
    for name, S in spectra.items():
        yield name, S, (U * S) @ V.mT
    G = torch.randn(m, n, generator=g, dtype=torch.float64)
    yield "Gaussian", torch.linalg.svdvals(G), G


def measure(shapes: list[tuple[int, int]], seeds: int) -> dict[tuple[str, str, str], list[float]]:
    """Return the values of each (schedule, iteration, quantity) over shapes, spectra and seeds."""
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    floor = SCHEDULES["jordan"].floor
    assert all(schedule.floor == floor for schedule in SCHEDULES.values())
    runs = [(s, seed) for s in shapes for seed in range(1 if max(s) >= LARGE else seeds)]
    for (rows, columns), seed in runs:
        m = min(rows, columns)
        for spectrum, S, G in matrices(m, max(rows, columns), floor, seed):
            G = (G if rows <= columns else G.mT).float()
            above = int(((1 - 1e-6) * floor * S.norm() <= S).sum())
            for schedule in SCHEDULES:
                for iteration, (form, dtype) in ITERATIONS.items():
                    X = Polar(schedule, form, dtype)(G)  # type: ignore[arg-type]
                    out = torch.linalg.svdvals(X.double()).tolist()
                    key = (schedule, iteration)
                    values[*key, "largest"].append(out[0])
                    values[*key, "smallest"].append(out[above - 1])
                    if spectrum == "tail":
                        values[*key, "tail"].append(out[-1])
                    if spectrum == "half":
                        values[*key, f"null {m}"].append(out[above])
    return values


def main() -> None:
    """Print both tables."""
    doc = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=doc)
    parser.add_argument("--shapes", nargs="+", default=["64x64", "256x64", "768x768", "768x3072"])
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, ", end="")
    print(f"{torch.get_num_threads()} threads\n")
    below_the_floor()
    shapes = [(int(r), int(c)) for r, c in (s.split("x") for s in args.shapes)]
    values = measure(shapes, args.seeds)
    sides = sorted({min(shape) for shape in shapes})
    print("\n| schedule | iteration | smallest from above the floor | largest of all", end="")
    print(" | from floor/100", end="")
    print("".join(f" | largest from 0, side {m}" for m in sides), end=" |\n")
    print("|---" * (5 + len(sides)) + "|")
    for schedule in SCHEDULES:
        for iteration in ITERATIONS:
            edges = {q: v for (s, i, q), v in values.items() if (s, i) == (schedule, iteration)}
            cells = [down(min(edges["smallest"])), up(max(edges["largest"]))]
            cells += [f"{down(min(edges['tail']))} – {up(max(edges['tail']))}"]
            cells += [up(max(edges[f"null {m}"])) for m in sides]
            print(f"| `{schedule}` | {iteration} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
