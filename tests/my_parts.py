# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""A plugin: a norm, a direction, a baseline, a tokenizer and a model of one's own. Tests copy it beside their runs."""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from data.tokenizer import Tokenizer, register_tokenizer
from model import GPT, MLP, GPTConfig
from models import register_model
from nanodual import register_baseline, register_direction, register_norm
from nanodual.directions import Buffers, Direction, average_
from nanodual.modular import Module, bond
from nanodual.norms import Norm
from nanodual.settings import Help, Range
from torch import Tensor, nn

SIZE = 0.5  # a constant


def unit(X: Tensor) -> Tensor:
    """Return a helper's work: X at 2-norm 1, 0 stays 0."""
    return X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(X.dtype).tiny)


@register_norm
class Half(Norm):
    """‖W‖_F / (SIZE √O): a norm that is no dataclass."""

    def __init__(self, size: float = SIZE) -> None:
        self.size_of_step = size

    def _c(self, shape) -> float:
        return self.size_of_step * math.sqrt(shape[-2])

    def norm(self, W: Tensor) -> Tensor:
        return W.norm(dim=(-2, -1)) / self._c(W.shape)

    def dual_norm(self, G: Tensor) -> Tensor:
        return G.norm(dim=(-2, -1)) * self._c(G.shape)

    def dualize(self, G: Tensor) -> Tensor:
        return unit(G) * self._c(G.shape)

    def update_rms(self, shape) -> float:
        return self._c(shape) / math.sqrt(math.prod(shape))


# Remembers less.
@register_direction("forgetful")
class Forgetful(Direction):
    """The average, with half of β."""

    gated = True

    def __call__(self, G: Tensor, state: Buffers, *, live: Tensor, beta: float, beta2: float, refresh: bool) -> Tensor:
        return average_(state["momentum"], G, live, SIZE * beta).clone()


class SignSGD(torch.optim.Optimizer):
    """Steps of one size."""

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("average", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    p.add_(m.sign(), alpha=-group["lr"])


@register_baseline("sign_sgd")
def sign_sgd(
    model: nn.Module,
    norm,
    *,
    lr: float,
    beta: float,
    slow: Annotated[float, Range(0), Help("sign_sgd: lr of vectors and the embedding, a multiple of lr.")] = 0.5,
) -> torch.optim.Optimizer:
    """Build SignSGD."""
    groups = [
        {"params": [(n, p)], "lr_scale": slow if norm.roles[n] == "embedding" else 1.0}
        for n, p in model.named_parameters()
    ]
    return SignSGD(groups, lr=lr, momentum=beta)


@register_tokenizer
class Letters(Tokenizer):
    """Lower-case letters, digits, space, newline and one for all else."""

    name, separator = "letters", 1
    alphabet = " \n.=abcdefghijklmnopqrstuvwxyz0123456789?"
    vocab_size = len(alphabet)

    def encode(self, text: str) -> np.ndarray:
        places = {c: i for i, c in enumerate(self.alphabet)}
        return np.array([places.get(c, len(places) - 1) for c in text.lower()], dtype=np.uint16)

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.alphabet[t] for t in tokens)

    def byte_lengths(self) -> np.ndarray:
        return np.ones(self.vocab_size, dtype=np.int64)


@dataclass
class GatedConfig(GPTConfig):
    """The GPT, with a gate."""

    gate_rank: Annotated[int, Range(1)] = 4
    """Width of the gate."""


class GatedMLP(MLP):
    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x_BTD: Tensor, past=None) -> Tensor:
        return super().forward(x_BTD, past) * torch.sigmoid(self.gate(x_BTD))


@register_model("gated", GatedConfig)
class GatedGPT(GPT):
    """A GPT whose MLPs have a gate."""

    config: GatedConfig

    def make_block(self):
        block = super().make_block()
        block.mlp = GatedMLP(self.config)
        return block

    def mlp_structure(self) -> Module:
        gate = bond("sigmoid", sensitivity=0.25, typical=True) @ self.linear("blocks.{}.mlp.gate", "mlp")
        return 0.5 * super().mlp_structure() + 0.5 * gate
