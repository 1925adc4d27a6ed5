"""Directions: what a step dualizes, from the stream of gradients. Pure functions of stacked tensors.

A direction takes the fresh gradient G and its one buffer M, equal-shaped stacks, and returns (what is dualized, the new buffer).
"""

from collections.abc import Callable

from torch import Tensor, lerp

Direction = Callable[..., tuple[Tensor, Tensor]]


def momentum(G: Tensor, M: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """The exponential moving average M ← β M + (1 − β) G, 0 <= β < 1."""
    M = lerp(M, G, 1 - beta)
    return M, M


def nesterov(G: Tensor, M: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """The average one step ahead: (1 − β) G + β M with the new M."""
    M = lerp(M, G, 1 - beta)
    return lerp(G, M, beta), M


DIRECTIONS: dict[str, Direction] = {"momentum": momentum, "nesterov": nesterov}


def register_direction(name: str) -> Callable[[Direction], Direction]:
    """Make a direction known by name, so that configurations can name it."""

    def register(direction: Direction) -> Direction:
        DIRECTIONS[name] = direction
        return direction

    return register
