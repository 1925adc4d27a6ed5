"""optim/directions.py: what every direction owes to the rounding of its gradients.

Oracle: the same stream, perturbed below it.
A gradient is a sum that another processor takes in another order. What a step makes of that rounding must stay
rounding: wherever a gradient says nothing (null spaces, repeated singular values) a direction may neither divide
noise by noise nor let an eigensolver's choice of basis be seen.
"""

import math
import os
from collections.abc import Callable

import pytest
import torch
from optim import Dualized, ModularNorm
from optim.directions import DIRECTIONS
from optim.norms import RMSToRMS
from optim.polar import Polar
from torch import Tensor, nn

PERTURBATION = 1e-15  # of ‖G‖_F: some five roundings of every entry
TURN = 1e-6  # 1 − cos: 1e-3 of the step's length, so that condition numbers up to 1e12 are let pass
STEPS = 10
SEEDS = 40 if os.environ.get("NANODUAL_SOAK") == "1" else 6  # not by tests.helpers, which Windows cannot import
# These divide entry by entry, or take each entry's sign: of an entry that is rounding alone they make a full one. Only
# gradients without zeros.
ENTRYWISE = ("adam", "lion")

SHAPES = {"square": (12, 12), "tall": (16, 10), "wide": (9, 14), "smallest": (2, 2)}


def orthogonal(G: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


def rank(r: int) -> Callable[[Tensor], Tensor]:
    """The same Gaussian numbers in two factors: a matrix of rank r at most, another null space in every gradient of a
    stream.
    """
    return lambda G: G[:, :r] @ G.flip(0)[:r] if r < min(G.shape) else G


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "full rank": lambda G: G,
    "rank 1": rank(1),
    "rank 3": rank(3),
    "rows of zeros": lambda G: G * (torch.arange(len(G)) % 3 > 0)[:, None],
    "rows that sum to zero": lambda G: G - G.mean(0),
    "repeated singular values": orthogonal,
}


def stream(kind: str, shape: tuple[int, int], seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [KINDS[kind](torch.randn(shape, generator=g, dtype=torch.float64)) for _ in range(STEPS)]


def perturbed(gradients: list[Tensor], seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    noise = [torch.randn(G.shape, generator=g, dtype=G.dtype) for G in gradients]
    return [G + PERTURBATION * G.norm() / E.norm() * E for G, E in zip(gradients, noise, strict=True)]


def steps_taken(streams: dict[str, list[Tensor]], direction: str, polar: Polar) -> list[dict[str, Tensor]]:
    """By step and stream: what is taken off a weight of that name."""
    named = {name: nn.Parameter(torch.zeros_like(gradients[0])) for name, gradients in streams.items()}
    norm = ModularNorm(dict.fromkeys(named, RMSToRMS(polar)), dict.fromkeys(named, 1.0))
    # The basis of SOAP is renewed in steps 1, 4, 7 and 10.
    optimizer = Dualized(list(named.items()), 1.0, norm=norm, direction=direction, refresh_every=3)
    taken = []
    for t in range(STEPS):
        for name, w in named.items():
            w.grad = streams[name][t].clone()
            w.data.zero_()
        optimizer.step()
        taken.append({name: -w.detach() for name, w in named.items()})
    return taken


@pytest.mark.soak
@pytest.mark.parametrize("polar", [Polar(), Polar("exact")], ids=lambda polar: polar.schedule)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_perturbation_of_a_few_roundings_does_not_turn_the_step(direction: str, polar: Polar):
    kinds = [k for k in KINDS if direction not in ENTRYWISE or k != "rows of zeros"]
    cases = [(kind, name, seed) for kind in kinds for name in SHAPES for seed in range(SEEDS)]
    streams = {f"{kind}, {name}, seed {seed}": stream(kind, SHAPES[name], seed=seed) for kind, name, seed in cases}
    others = {name: perturbed(gradients, seed=math.prod(gradients[0].shape)) for name, gradients in streams.items()}
    plain, moved = (steps_taken(s, direction, polar) for s in (streams, others))
    for step in (0, STEPS - 1):
        turns = {
            name: 1
            - nn.functional.cosine_similarity(plain[step][name].flatten(), moved[step][name].flatten(), dim=0).item()
            for name in streams
        }
        assert max(turns.values()) < TURN, (step + 1, {name: turn for name, turn in turns.items() if turn >= TURN})
