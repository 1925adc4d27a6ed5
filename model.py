"""A compact GPT and, in one piece at its end, the modular structure of its weights.

B batch · T positions · D n_embd · H n_head · K = D/H width of a head · V vocab_size · L n_layer.
Linear maps are y = W x with W_OI (out, in). A fork is a subclass of GPT in a file of models/.
[MN]: Large et al., arXiv 2405.14813. docs/theory.md §2 derives the structure.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from optim.errors import Refusal, require
from optim.modular import Module, atom, bond, concat, residual
from optim.norms import MaxEntry, VectorRMS
from optim.polar import Polar
from optim.roles import Norms, RoleMasses, RoleNorms
from optim.settings import Range, check

Rope = tuple[Tensor, Tensor]  # cos and sin of positions, (T, K/2) each


@dataclass
class GPTConfig:
    """The compact GPT: nanoGPT's settings, and four more."""

    n_layer: Annotated[int, Range(1)] = 12
    """Blocks, each of an attention and an MLP."""
    n_head: Annotated[int, Range(1)] = 12
    """Heads of an attention; n_embd is a multiple of twice their number."""
    n_embd: Annotated[int, Range(1)] = 768
    """Width of the residual stream."""
    block_size: Annotated[int, Range(1)] = 1024
    """Tokens of a sequence."""
    vocab_size: Annotated[int, Range(2)] | None = None
    """Rows of embedding and head; by default the tokenizer's. Larger is padding."""
    dropout: Annotated[float, Range(0, 1)] = 0.0
    """Share of attention weights, and of what each half-layer adds, left out in training."""
    bias: bool = False
    """Give every linear map a bias."""
    logit_softcap: Annotated[float, Range(0, above=True)] | None = None
    """Bound logits softly by this, c: c · tanh(logits / c). By default they are not bounded."""
    logit_scale: Annotated[float, Range(0, above=True)] = 10.0
    """Logits of a head of norm 1 at unit-RMS input are at most this."""
    attention_scale: Annotated[float, Range(0, above=True)] = 10.0
    """c in softmax(c · cos(q, k))."""
    zero_init: bool = True
    """Start output projections and the head at 0; other weights start at norm 1 of their role."""

    def check(self) -> None:
        """Raise Refusal for a value that cannot be, and for values that cannot be together."""
        check(type(self), vars(self), owner=type(self).__name__)
        D, H = self.n_embd, self.n_head
        pairs = f"a multiple of 2 · n_head = {2 * H} (rotary positions turn pairs)"
        self.refuse_unless(D % H == 0, "n_head", f"a divisor of n_embd = {D}")
        self.refuse_unless(D % (2 * H) == 0, "n_embd", pairs)

    def refuse_unless(self, fine: bool, name: str, allowed: str) -> None:
        """Raise Refusal for a setting's value unless it is fine."""
        fix = f"set it in the file, or --model.{name.replace('_', '-')}"
        require(fine, f"model.{name}", got=getattr(self, name), allowed=allowed, fix=fix)


def rotate(x_BHTK: Tensor, rope: Rope) -> Tensor:
    """Return queries or keys at unit RMS, turned by their positions."""
    a, b = F.rms_norm(x_BHTK, x_BHTK.shape[-1:]).chunk(2, dim=-1)
    cos, sin = (r.to(a.dtype) for r in rope)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Causal attention with QK-norm: scores are c · cos(q, k), c = attention_scale."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        D, bias = config.n_embd, config.bias
        self.q, self.k, self.v, self.out = (nn.Linear(D, D, bias=bias) for _ in range(4))
        self.n_head, self.dropout = config.n_head, config.dropout
        self.scale = config.attention_scale * config.n_head / D  # c/K, as ⟨q, k⟩ = K cos(q, k)

    def heads(self, x_BTD: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys, at unit RMS and turned, and values: (B, H, T, K) each."""
        maps, shape = (self.q, self.k, self.v), (self.n_head, -1)
        q, k, v = (w(x_BTD).unflatten(-1, shape).transpose(1, 2) for w in maps)
        return rotate(q, rope), rotate(k, rope), v

    def forward(self, x_BTD: Tensor, rope: Rope, past: Any = None) -> Tensor:
        q, k, v = self.heads(x_BTD, rope)
        if past is not None:
            k, v = past.extend(k, v)
        dropout, causal = self.dropout if self.training else 0.0, x_BTD.shape[1] > 1
        y_BHTK = F.scaled_dot_product_attention(q, k, v, None, dropout, causal, scale=self.scale)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Squared-ReLU MLP (So et al., arXiv 2109.08668), 4D wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x_BTD: Tensor, past: Any = None) -> Tensor:
        return self.down(self.up(x_BTD).relu().square())


class Block(nn.Module):
    """Two half-layers, x ← (1 − 1/2L) x + (1/2L) gain · f(rms_norm(x)): attention, then MLP."""

    def __init__(self, config: GPTConfig, rms: list[nn.RMSNorm], mlp: MLP, *gains: float) -> None:
        super().__init__()
        self.attention_norm, self.attention = rms[0], Attention(config)
        self.mlp_norm, self.mlp = rms[1], mlp
        self.dropout, step = config.dropout, 1 / (2 * config.n_layer)
        self.keep, self.attention_step, self.mlp_step = 1 - step, *(step * gain for gain in gains)

    def forward(self, x_BTD: Tensor, rope: Rope, past: Any = None) -> Tensor:
        f_BTD = self.attention(self.attention_norm(x_BTD), rope, past)
        x_BTD = self.add(x_BTD, f_BTD, self.attention_step)
        return self.add(x_BTD, self.mlp(self.mlp_norm(x_BTD), past), self.mlp_step)

    def add(self, x_BTD: Tensor, f_BTD: Tensor, step: float) -> Tensor:
        f_BTD = F.dropout(f_BTD, self.dropout, self.training) if self.dropout else f_BTD
        return torch.add(x_BTD * self.keep, f_BTD, alpha=step)


class GPT(nn.Module):
    """A causal language model whose weights start at norm 1 of their role's norm, or at 0.

    norms: by role, as RoleNorms builds them. generator: of the initial weights.
    """

    zeros: tuple[str, ...] = ("out.weight", "down.weight", "head.weight")  # at 0

    def __init__(
        self, config: GPTConfig, norms: Norms | None = None, generator: Generator | None = None
    ) -> None:
        super().__init__()
        config.check()
        if config.vocab_size is None:
            raise Refusal("model.vocab_size", got="none", allowed="the tokenizer's, or more")
        self.config = config
        self.norms = norms or RoleNorms().build(Polar(), config.n_head)
        self.make_embedding(config.vocab_size)
        self.blocks = nn.ModuleList(self.make_block() for _ in range(config.n_layer))
        self.head_norm = self.make_norm()
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)
        if not self.head.weight.is_meta:
            self.init_weights(generator)

    def make_embedding(self, vocabulary: int) -> None:
        self.embedding = nn.Embedding(vocabulary, self.config.n_embd)

    def make_norm(self) -> nn.RMSNorm:
        return nn.RMSNorm(self.config.n_embd, elementwise_affine=False)

    def make_block(self) -> Block:
        rms, gains = [self.make_norm(), self.make_norm()], (self.attention_gain, self.mlp_gain)
        return Block(self.config, rms, MLP(self.config), *gains)

    @torch.no_grad()
    def init_weights(self, generator: Generator | None) -> None:
        for leaf, _ in self.structure().radii():
            p, ends = self.get_parameter(leaf.name), leaf.name.endswith(self.zeros)
            if leaf.role == "bias" or (self.config.zero_init and ends):
                p.zero_()
            elif leaf.role != "gain":  # gains start at 1
                p.copy_(leaf.norm.init(p.shape, generator))

    def embed(self, idx_BT: Tensor, cache: Any = None) -> Tensor:
        """Return the rows of tokens, (B, T, D). cache: of the text in front of them."""
        return self.embedding(idx_BT)

    def rotary(self, position_T: Tensor) -> Rope:
        """Return rotary positions, base 10,000 (Su et al., arXiv 2104.09864)."""
        K = self.config.n_embd // self.config.n_head
        pair = torch.arange(0, K, 2, device=position_T.device, dtype=torch.float32)
        angle = position_T.float()[:, None] * 10_000 ** (-pair / K)
        return angle.cos(), angle.sin()

    def softcap(self, logits_BTV: Tensor, bound: float) -> Tensor:
        return bound * torch.tanh(logits_BTV / bound)

    def forward(
        self,
        x_BT: Tensor,
        y_BT: Tensor | None = None,
        *,
        cache: Any = None,
        reduction: str = "mean",
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits (B, T, V) and, with targets y, the loss in nats. −1 is no target.

        cache: of the text in front (models/generation.py).
        """
        c = self.config
        start = 0 if cache is None else cache.length
        rope = self.rotary(start + torch.arange(x_BT.shape[1], device=x_BT.device))
        x_BTD = self.embed(x_BT, cache)
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rope, cache.layers[i] if cache else None)
        logits_BTV = self.head(self.head_norm(x_BTD))
        wide = torch.promote_types(logits_BTV.dtype, torch.float32)
        logits_BTV = logits_BTV.to(wide) * c.logit_scale
        if c.logit_softcap is not None:
            logits_BTV = self.softcap(logits_BTV, c.logit_softcap)
        if y_BT is None:
            return logits_BTV, None
        rows, y = logits_BTV.flatten(0, 1), y_BT.flatten()
        return logits_BTV, F.cross_entropy(rows, y, ignore_index=-1, reduction=reduction)

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Return the FLOPs of training on a token (Chowdhery et al., arXiv 2204.02311, App. B)."""
        c, named = self.config, self.named_parameters()
        matrices = [p for n, p in named if p.ndim == 2 and not n.endswith("embedding.weight")]
        return 6 * sum(p.numel() for p in matrices) + 12 * c.n_layer * c.n_embd * c.block_size

    # ---- the modular structure of the weights: head ∘ (MLP ∘ attention)^L ∘ embedding
    # Constants of a half-layer. As W (c a) = c (W a), forward() has them in the residual's step.
    attention_gain = 1 / 3  # makes its sensitivity 1: concat(q, k, v) has 3 in the sum norm [MN]
    mlp_gain = math.sqrt(2 / 3)  # makes its output's RMS 1: rms(relu(x)²) = √(3/2), x ~ N(0, 1)
    relu2_sensitivity = math.sqrt(2)  # rms of relu²'(x) = 2 relu(x) for x ~ N(0, 1): no bound

    def structure(self, masses: RoleMasses | None = None) -> Module:
        """Return the tree of weights and maps, each role's mass in equal parts on its weights."""
        L, norm = self.config.n_layer, bond("rms_norm", typical=True)
        embedding = self.embedding_structure()
        attention = residual(self.attention_structure() @ norm, 2 * L)
        mlp = residual(self.mlp_structure() @ norm, 2 * L)
        # The norm of logits is their largest: so is that of the head's bias.
        head = self.config.logit_scale * self.linear("head", "head", bias=MaxEntry) @ norm
        return (masses or RoleMasses()).share(head @ (mlp @ attention) ** L @ embedding)

    def embedding_structure(self) -> Module:
        return atom("embedding.weight", self.norms["embedding"], role="embedding")

    def attention_structure(self) -> Module:
        q, k, v = (self.linear(f"blocks.{{}}.attention.{n}", "attention", "qkv") for n in "qkv")
        out = self.linear("blocks.{}.attention.out", "attention")
        # Sensitivity 1 in each of q, k, v at scale 1/K [MN]; taken as 1 with QK-norm and c/K too.
        return out @ (self.attention_gain * bond("attention", typical=True)) @ concat(q, k, v)

    def mlp_structure(self) -> Module:
        up, down = (self.linear(f"blocks.{{}}.mlp.{n}", "mlp") for n in ("up", "down"))
        relu2 = bond("relu²", sensitivity=self.relu2_sensitivity, typical=True)
        return down @ (self.mlp_gain * relu2) @ up

    def linear(self, name: str, role: str, norm: str = "", bias: type = VectorRMS) -> Module:
        """Return a weight or, with a bias, the sum of both."""
        weight = atom(f"{name}.weight", self.norms[norm or role], role=role)
        if not self.config.bias:
            return weight
        return weight + atom(f"{name}.bias", bias(), role="bias", sensitivity=0)
