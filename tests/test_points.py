"""Old optimizers as points of the design space: the [optim] section of each configs/points/*.toml against torch's own optimizers, published code,
or an identity of eigh, SVD and autograd, over 50 steps in float64."""

import copy
import math
import random
import re
import tomllib
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path

import pytest
import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer import scion as published_scion
from torch import Tensor, nn

from config import OptimConfig, load
from optim import Dualized, EscapeVelocity, Module, Norm, Polar, atom, metrize
from tests.helpers import ROOT, run, small_dataset

POINTS = {p.stem: p for p in sorted((ROOT / "configs/points").glob("*.toml"))}
STEPS = 50
Step = Callable[[], object]


class Net(nn.Module):
    """One weight of each role of a GPT, float64: 7 tokens, 6 wide, 15 hidden. Its numbers are Python's, the same in every version of torch."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.attention, self.mlp, self.head = (nn.Linear(i, o, bias=False) for i, o in ((6, 15), (15, 6), (6, 7)))
        self.double()
        rng = random.Random(0)
        for p in self.parameters():
            p.data = torch.tensor([rng.uniform(-0.7, 0.7) for _ in range(p.numel())], dtype=p.dtype).view_as(p)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embedding(idx)
        return self.head(x + self.mlp(torch.tanh(self.attention(x))))

    def structure(self, norms: dict[str, Norm]) -> Module:
        embedding, attention, mlp, head = (atom(f"{role}.weight", norms[role], role=role) for role in ("embedding", "attention", "mlp", "head"))
        return head @ mlp @ attention @ embedding


def backward(model: nn.Module, step: int, *, scale: float = 1.0, every_token: bool = False) -> None:
    """The gradient of a noisy minibatch of 12 tokens, times scale; about one of the 7 is missing unless every_token."""
    rng = random.Random(step)
    x = [*range(7 if every_token else 0)]
    x += [int(7 * rng.random()) for _ in range(12 - len(x))]
    y = torch.tensor([int(7 * rng.random()) for _ in x])
    model.zero_grad()
    (scale * nn.functional.cross_entropy(model(torch.tensor(x)), y)).backward()


def point(name: str, *options: str) -> OptimConfig:
    return load([str(POINTS[name]), *options]).optim


def build(o: OptimConfig, model: Net) -> Dualized:
    """The optimizer of a configuration, as train_gpt.py makes it."""
    norm = metrize(model, model.structure(o.norms.build(o.polar, n_head=1)))
    settings = {k: v for k, v in vars(o).items() if k in signature(Dualized).parameters and k != "lr"}
    lr = EscapeVelocity(o.auto_initial, o.auto_factor) if isinstance(o.lr, str) else o.lr
    return Dualized(model, lr, norm=norm.unweighted() if o.composition == "max" else norm, **settings)


def apart(model: Net, twin: Net) -> float:
    """The largest distance between two weights over the distance one has travelled; one that never moved would be infinitely far."""
    way = [(p - q).norm() / (p - p0).norm() for p, q, p0 in zip(model.parameters(), twin.parameters(), Net().parameters(), strict=True)]
    return max(w.item() for w in way)


def follow(o: OptimConfig, oracle: Callable[[Net], Step], **batch: float) -> float:
    """How far apart our optimizer and an oracle of a twin network are after 50 steps, each on gradients of its own."""
    model, twin = Net(), Net()
    pairs = [(model, build(o, model).step), (twin, oracle(twin))]
    for t in range(STEPS):
        for net, step in pairs:
            backward(net, t, **batch)  # type: ignore[arg-type]
            step()
    return apart(model, twin)
