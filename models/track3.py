"""The architecture of the NanoGPT speedrun's optimization track, part by part.

Source: modded-nanogpt, records/track_3_optimization. configs/track3_124m.toml sets all of it.
Each part is a setting, so that a comparison can take some alone: baselines have a plain residual
stream and initial weights of their own. Dimensions are those of model.py.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from model import GPT, Block, GPTConfig, Rope
from optim.modular import Module, atom, bond, concat, residual
from optim.norms import MaxEntry
from optim.roles import RoleMasses


@dataclass
class Track3Config(GPTConfig):
    """The compact GPT, and the parts of the optimization track."""

    residual: Literal["convex", "plain"] = "convex"
    """"convex": (1 − 1/2L) x + (1/2L) f(x) for each of the 2L half-layers. "plain": x + f(x)."""
    branch_gains: bool = True
    """Give f the constants 1/3 and √(2/3) that keep it well-normed."""
    softcap: Literal["tanh", "rsqrt"] = "tanh"
    """With logit_softcap = c. "tanh": c · tanh(x/c). "rsqrt": x / √(1 + (x/c)²)."""
    norm_gains: bool = False
    """Give every RMSNorm gains."""
    embedding_norm: bool = False
    """Put an RMSNorm after the embedding."""
    rotary: Literal["full", "half"] = "full"
    """"half": turn half of each head's pairs, at base 1024, as the optimization track does."""
    init: Literal["norm", "gpt2", "fan_in", "track"] = "norm"
    """"norm": every weight at norm 1 of its role. The others are for comparisons. "gpt2":
    N(0, 0.02²), output projections by 1/√2L smaller (Radford et al. 2019, as nanoGPT). "fan_in":
    N(0, 1/I) and embeddings N(0, 1), the function that standard and NTK parametrizations start
    from. "track": N(0, 0.33/I), embeddings N(0, 1), output projections 0, as the optimization
    track. Biases start at 0, gains at 1."""

    def check(self) -> None:
        """Raise Refusal for a value that cannot be, and for values that cannot be together."""
        super().check()
        fits = self.rotary == "full" or self.n_embd // self.n_head % 4 == 0
        self.refuse_unless(fits, "rotary", '"full", or heads of a width that 4 divides')
        fits = self.branch_gains or self.residual == "plain"
        self.refuse_unless(fits, "branch_gains", 'true, or false with residual = "plain"')


class RMSNorm(nn.RMSNorm):
    """An RMSNorm whose gains, where it has them, are cast to the type of its input."""

    def __init__(self, config: Track3Config) -> None:
        super().__init__(config.n_embd, elementwise_affine=config.norm_gains)

    def forward(self, x: Tensor) -> Tensor:
        gain = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, (x.shape[-1],), gain)


class Track3GPT(GPT):
    """A GPT with those parts of the optimization track that its configuration takes."""

    config: Track3Config

    @property
    def attention_gain(self) -> float:
        return GPT.attention_gain if self.config.branch_gains else 1.0

    @property
    def mlp_gain(self) -> float:
        return GPT.mlp_gain if self.config.branch_gains else 1.0

    def make_embedding(self, vocabulary: int) -> None:
        super().make_embedding(vocabulary)
        self.embedding_norm = self.make_norm() if self.config.embedding_norm else nn.Identity()

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config)

    def make_block(self) -> Block:
        block = super().make_block()
        if self.config.residual == "plain":
            block.keep = 1.0
            block.attention_step, block.mlp_step = self.attention_gain, self.mlp_gain
        return block

    @torch.no_grad()
    def init_weights(self, generator: Generator | None) -> None:
        if self.config.init == "norm":
            return super().init_weights(generator)
        for leaf, _ in self.structure().radii():
            p = self.get_parameter(leaf.name)
            if leaf.role in ("gain", "bias"):
                p.fill_(leaf.role == "gain")
            else:
                p.normal_(generator=generator).mul_(self.deviation(leaf.name, p))

    def deviation(self, name: str, p: Tensor) -> float:
        """Return the standard deviation of a matrix's initial entries."""
        inner, D_in = name.endswith(("out.weight", "down.weight")), p.shape[1]
        if self.config.init == "gpt2":
            return 0.02 / math.sqrt(2 * self.config.n_layer) if inner else 0.02
        if name.endswith("embedding.weight"):
            return 1.0
        if self.config.init == "track":
            return 0.0 if inner or name == "head.weight" else (0.33 / D_in) ** 0.5
        return D_in**-0.5

    def embed(self, x_BT: Tensor, cache: Any = None) -> Tensor:
        return self.embedding_norm(self.rows(x_BT, cache))

    def rows(self, x_BT: Tensor, cache: Any = None) -> Tensor:
        """Return the rows of tokens, (B, T, D), before their norm."""
        return super().embed(x_BT, cache)

    def rotary(self, position_T: Tensor) -> Rope:
        """Return rotary positions; the track's own are frequencies 1 … 1/1024 for half of the pairs
        and 0 for the others, turning the other way."""
        if self.config.rotary == "full":
            return super().rotary(position_T)
        quarter = self.config.n_embd // self.config.n_head // 4
        octave = torch.linspace(0, 1, quarter, device=position_T.device, dtype=torch.float32)
        frequency = F.pad(-(1024**-octave), (0, quarter))
        angle = position_T.float()[:, None] * frequency
        return angle.cos(), angle.sin()

    def softcap(self, logits_BTV: Tensor, bound: float) -> Tensor:
        if self.config.softcap == "tanh":
            return super().softcap(logits_BTV, bound)
        return logits_BTV * (1 + (logits_BTV / bound).square()).rsqrt()

    # ---- the modular structure

    def structure(self, masses: RoleMasses | None = None) -> Module:
        """Return the tree of weights and maps, each role's mass in equal parts on its weights."""
        c = self.config
        embedding = self.embedding_structure()
        if c.embedding_norm:
            embedding = self.norm_structure("embedding_norm") @ embedding
        attention = self.attention_structure() @ self.norm_structure("blocks.{}.attention_norm")
        mlp = self.mlp_structure() @ self.norm_structure("blocks.{}.mlp_norm")
        attention, mlp = map(self.residual_structure, (attention, mlp))
        head = c.logit_scale * self.linear("head", "head", bias=MaxEntry)
        head = head @ self.norm_structure("head_norm")
        return (masses or RoleMasses()).share(head @ (mlp @ attention) ** c.n_layer @ embedding)

    def norm_structure(self, name: str) -> Module:
        norm = bond("rms_norm", typical=True)
        if not self.config.norm_gains:
            return norm
        return atom(f"{name}.weight", MaxEntry(), role="gain") @ norm

    def residual_structure(self, half: Module) -> Module:
        if self.config.residual == "convex":
            return residual(half, 2 * self.config.n_layer)
        # x + f(norm(x)): the stream grows with depth while the next norm divides by it. The typical
        # gain of both together is 1.
        whole = bond("x + f(x)", sensitivity=1 / (1 + half.sensitivity), typical=True)
        return whole @ concat(bond("identity"), half)
