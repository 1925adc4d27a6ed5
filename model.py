"""The GPT, and the modular structure of its weights. Models of models/ extend it by its methods make_embedding, embed, embedding_structure and mlp_class.

B batch, T positions, D n_embd, H n_head, K = D/H width of a head, F = 4D hidden width of the MLP, V vocabulary, L n_layer.
Linear maps are y = W x with W (out, in). Sources: [MN] arXiv 2405.14813; [MD] arXiv 2410.21265; docs/theory.md has the derivations.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optim.errors import Refusal, require
from optim.modular import Module, atom, bond, concat, residual
from optim.norms import NORMS, MaxEntry, Norm, Spectral, VectorRMS
from optim.polar import Polar
from optim.settings import OneOf, Range, check
from optim.views import Blocks


@dataclass
class GPTConfig:
    """The GPT. configs/track3_124m.toml sets it to the architecture of the NanoGPT speedrun's
    optimization track."""

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
    """Of attention weights, and of what each half-layer adds."""

    residual: Literal["convex", "plain"] = "convex"
    """"convex": (1 − 1/2L) x + (1/2L) f(x) for each of the 2L half-layers. "plain": x + f(x)."""

    branch_gains: bool = True
    """Give f the constants 1/3 and √(2/3) that keep it well-normed."""

    logit_softcap: Annotated[float, Range(0, above=True)] | None = None
    """Bound logits softly by this, c; by default they are not."""

    softcap: Literal["tanh", "rsqrt"] = "tanh"
    """"tanh": c · tanh(x/c). "rsqrt": x / √(1 + (x/c)²)."""

    logit_scale: Annotated[float, Range(0, above=True)] = 10.0
    """Logits of a head of norm 1 at unit-RMS input are at most this."""

    attention_scale: Annotated[float, Range(0, above=True)] = 10.0
    """c in softmax(c · cos(q, k))."""

    bias: bool = False
    """Give every linear map a bias."""

    norm_gains: bool = False
    """Give every RMSNorm gains."""

    embedding_norm: bool = False
    """Put an RMSNorm after the embedding."""

    rotary: Literal["full", "half"] = "full"
    """"half": turn half of each head's pairs, at base 1024, as the optimization track does."""

    init: Literal["norm", "gpt2", "fan_in", "track"] = "norm"
    """"norm": every weight at norm 1 of its role. The others are for comparisons. "gpt2": N(0, 0.02²),
    output projections by 1/√2L smaller (Radford et al. 2019, as nanoGPT). "fan_in": N(0, 1/I) and
    embeddings N(0, 1), the function that standard and NTK parametrizations start from. "track":
    N(0, 0.33/I), embeddings N(0, 1), output projections 0, as the optimization track. Biases start at
    0, gains at 1."""

    zero_init: bool = True
    """With init = "norm": start output projections at 0."""

    def check(self) -> None:
        """Raise Refusal for a value that cannot be, and for values that cannot be together."""
        check(type(self), vars(self), owner=type(self).__name__)
        D, H = self.n_embd, self.n_head
        for name, fine, allowed in (
            ("n_head", D % H == 0, f"a divisor of n_embd = {D}"),
            (
                "n_embd",
                D % (2 * H) == 0,
                f"a multiple of 2 · n_head = {2 * H} (rotary positions turn pairs)",
            ),
            (
                "rotary",
                self.rotary == "full" or D // H % 4 == 0,
                '"full", or heads of a width that 4 divides',
            ),
            (
                "branch_gains",
                self.branch_gains or self.residual == "plain",
                'true, or false with residual = "plain"',
            ),
        ):
            require(
                fine,
                f"model.{name}",
                got=getattr(self, name),
                allowed=allowed,
                fix=f"set it in the file, or --model.{name.replace('_', '-')}",
            )


class MatrixNorms(Mapping[str, Callable[..., Norm]]):
    """The registered norms of matrices, by name. What is registered later counts."""

    def __getitem__(self, name: str) -> Callable[..., Norm]:
        if name not in iter(self):
            raise KeyError(name)
        return NORMS[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, norm in NORMS.items() if norm().ndim == 2)

    def __len__(self) -> int:
        return len([*self])


MATRIX_NORMS = MatrixNorms()


@dataclass
class RoleNorms:
    """The norm of each role, by its name in optim.NORMS."""

    embedding: Annotated[str, OneOf(MATRIX_NORMS)] = "L1ToRMS"
    """Of the embedding, and of the rows for n-grams and matches."""

    attention: Annotated[str, OneOf(MATRIX_NORMS)] = "RMSToRMS"
    """Of queries, keys, values and the output projection."""

    mlp: Annotated[str, OneOf(MATRIX_NORMS)] = "RMSToRMS"
    """Of both matrices of an MLP."""

    head: Annotated[str, OneOf(MATRIX_NORMS)] = "RMSToLinf"
    """Of the head."""

    per_head: bool = False
    """Take of queries, keys and values the maximum over heads of theirs."""

    def roles(self) -> dict[str, str]:
        return {role: name for role, name in vars(self).items() if isinstance(name, str)}

    def build(self, polar: Polar, n_head: int) -> dict[str, Norm]:
        """The norm of each role, and of queries, keys and values ("qkv")."""
        check(RoleNorms, vars(self), owner="RoleNorms")
        made = {role: NORMS[name]() for role, name in self.roles().items()}
        norms: dict[str, Norm] = {
            role: replace(norm, polar=polar) if isinstance(norm, Spectral) else norm
            for role, norm in made.items()
        }
        return norms | {
            "qkv": Blocks(norms["attention"], n_head) if self.per_head else norms["attention"]
        }


@dataclass
class RoleMasses:
    """Each role's share of feature learning, all layers together; only ratios matter.

    A layer's six matrices have equal mass, as in Modula. 0 is never updated.
    """

    embedding: Annotated[float, Range(0)] = 1.0
    """Of the embedding."""

    ngram: Annotated[float, Range(0)] = 1.0
    """Of the table of n-grams, where the model has one."""

    match: Annotated[float, Range(0)] = 1.0
    """Of the rows for matches, where the model has them."""

    attention: Annotated[float, Range(0)] = 4.0
    """Of all attentions."""

    mlp: Annotated[float, Range(0)] = 2.0
    """Of all MLPs."""

    head: Annotated[float, Range(0)] = 1.0
    """Of the head."""

    gain: Annotated[float, Range(0)] = 0.5
    """Of all gains of norms, where the model has them."""

    bias: Annotated[float, Range(0)] = 0.5
    """Of all biases, where the model has them."""

    def check(self) -> None:
        """Raise Refusal for a mass that cannot be, and where all are 0."""
        check(RoleMasses, vars(self), owner="RoleMasses")
        require(
            any(vars(self).values()),
            "optim.masses",
            got="0 for every role",
            allowed="at least one above 0",
            fix="leave one of them out",
        )


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def rotary(position: Tensor, width: int, *, half: bool = False) -> tuple[Tensor, Tensor]:
    """(T,) → cos, sin (T, width/2): rotary positions, base 10,000 (Su et al., arXiv 2104.09864).

    half: the optimization track's (modded-nanogpt, records/track_3_optimization): frequencies 1 … 1/1024 for half of the pairs, 0 for the others, turning the other way.
    """
    if half:
        turned = -(
            1024 ** -torch.linspace(0, 1, width // 4, device=position.device, dtype=torch.float32)
        )
        frequency = torch.cat((turned, torch.zeros_like(turned)))
    else:
        frequency = 10_000 ** (
            -torch.arange(0, width, 2, device=position.device, dtype=torch.float32) / width
        )
    angle_TK = position.float()[:, None] * frequency
    return angle_TK.cos(), angle_TK.sin()


def rotate(x_BHTK: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (r.to(x_BHTK.dtype) for r in rope)
    a, b = x_BHTK.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


# Constant gains inside a block keep it well-normed; they are folded into the residual weight, as linear maps let them pass.
ATTENTION_GAIN = 1 / 3  # concat(q, k, v) has sensitivity 3 in the sum norm [MN]
MLP_GAIN = math.sqrt(2 / 3)  # rms(relu(x)²) = √(3/2) for x ~ N(0, 1)
RELU2_SENSITIVITY = math.sqrt(
    2
)  # rms of relu²'(x) = 2 relu(x) for x ~ N(0, 1): typical, relu² is not Lipschitz


class RMSNorm(nn.RMSNorm):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config.n_embd, elementwise_affine=config.norm_gains)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(
            x, (x.shape[-1],), None if self.weight is None else self.weight.to(x.dtype)
        )

    @staticmethod
    def structure(name: str, mass: float | None) -> Module:
        """mass: of its gains, None without."""
        norm = bond("rms_norm", typical=True)
        return (
            norm
            if mass is None
            else atom(f"{name}.weight", MaxEntry(), role="gain", mass=mass) @ norm
        )


def linear(
    name: str, norm: Norm, role: str, mass: float, bias: tuple[Norm, float] | None
) -> Module:
    """A weight's atom; with a bias, (its norm, its mass), the sum of both."""
    weight = atom(f"{name}.weight", norm, role=role, mass=mass)
    if bias is None:
        return weight
    return bond("add", sharpness=0) @ concat(
        weight, atom(f"{name}.bias", bias[0], role="bias", mass=bias[1], sensitivity=0)
    )


class Attention(nn.Module):
    """Causal attention with QK-norm: queries and keys have unit RMS per head, so scores are c · cos(q, k)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        D = config.n_embd
        self.q, self.k, self.v, self.out = (nn.Linear(D, D, bias=config.bias) for _ in range(4))
        self.n_head, self.dropout = config.n_head, config.dropout
        self.scale = config.attention_scale * config.n_head / D  # c/K, since ⟨q, k⟩ = K cos(q, k)

    def heads(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Queries and keys, at unit RMS and rotated, and values: (B, H, T, K) each."""
        q, k, v = (
            w(x_BTD).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
            for w in (self.q, self.k, self.v)
        )
        return [rotate(rms_norm(q), rope), rotate(rms_norm(k), rope), v]

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], past: "Past | None" = None
    ) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.heads(x_BTD, rope)
        if past is not None:
            k, v = past.extend(k, v)
            assert T == 1 or k.shape[2] == T, (
                "the mask of several new positions behind old ones is not built"
            )
        dropout = self.dropout if self.training else 0.0
        y_BHTK = F.scaled_dot_product_attention(
            q, k, v, is_causal=T > 1, dropout_p=dropout, scale=self.scale
        )
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))

    @staticmethod
    def structure(
        prefix: str,
        norms: dict[str, Norm],
        mass: float,
        gain: float,
        bias: tuple[Norm, float] | None,
    ) -> Module:
        q, k, v = (linear(f"{prefix}.{n}", norms["qkv"], "attention", mass, bias) for n in "qkv")
        out = linear(f"{prefix}.out", norms["attention"], "attention", mass, bias)
        # Sensitivity 1 in each of q, k, v [MN] at scale 1/K; with QK-norm and scale c/K it is the typical value.
        return out @ (gain * bond("attention", typical=True)) @ concat(q, k, v)


class MLP(nn.Module):
    """Squared-ReLU MLP (So et al., arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x_BTD: Tensor, past: "Past | None" = None) -> Tensor:
        return self.down(self.up(x_BTD).relu().square())

    @staticmethod
    def structure(
        prefix: str,
        norms: dict[str, Norm],
        mass: float,
        gain: float,
        bias: tuple[Norm, float] | None,
    ) -> Module:
        up, down = (
            linear(f"{prefix}.{n}", norms["mlp"], "mlp", mass, bias) for n in ("up", "down")
        )
        return down @ (gain * bond("relu²", sensitivity=RELU2_SENSITIVITY, typical=True)) @ up


class Block(nn.Module):
    """An attention half and an MLP half, each behind an RMSNorm."""

    def __init__(self, config: GPTConfig, mlp: type[MLP] = MLP) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config), mlp(config)
        self.dropout = config.dropout
        step = 1 / (2 * config.n_layer) if config.residual == "convex" else 1.0
        self.keep = 1 - step if config.residual == "convex" else 1.0
        self.attention_step, self.mlp_step = (
            step * (gain if config.branch_gains else 1.0) for gain in (ATTENTION_GAIN, MLP_GAIN)
        )

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], past: "Past | None" = None
    ) -> Tensor:
        x_BTD = self._add(
            x_BTD, self.attention(self.attention_norm(x_BTD), rope, past), self.attention_step
        )
        return self._add(x_BTD, self.mlp(self.mlp_norm(x_BTD), past), self.mlp_step)

    def _add(self, x_BTD: Tensor, f_BTD: Tensor, step: float) -> Tensor:
        if self.dropout:
            f_BTD = F.dropout(f_BTD, self.dropout, self.training)
        return torch.add(x_BTD * self.keep, f_BTD, alpha=step)


class Past:
    """Keys and values (B, H, T, K) of one layer, the last `window` − 1 positions of them."""

    def __init__(self, window: int) -> None:
        self.keep = window - 1
        self.kv: tuple[Tensor, Tensor] | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.kv is not None:
            k, v = torch.cat((self.kv[0], k), dim=2), torch.cat((self.kv[1], v), dim=2)
        start = max(0, k.shape[2] - self.keep)
        self.kv = k[:, :, start:], v[:, :, start:]
        return k, v


class Cache:
    """What a text leaves for its next token: the number of its tokens, and the past of each layer."""

    def __init__(self, config: GPTConfig) -> None:
        self.length = 0
        self.layers: Sequence[Past] = [Past(config.block_size) for _ in range(config.n_layer)]


OUTPUTS = ("out.weight", "down.weight", "head.weight")


class GPT(nn.Module):
    """A causal language model whose every weight starts at norm 1 of its role's norm, or at 0."""

    zeros: tuple[str, ...] = OUTPUTS  # ends of the names of weights that start at 0, with zero_init

    def __init__(
        self,
        config: GPTConfig,
        norms: dict[str, Norm] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """norms: by role, as RoleNorms.build makes them. generator: of the initial weights. vocab_size must be set."""
        super().__init__()
        config.check()
        if config.vocab_size is None:
            raise Refusal(
                "model.vocab_size", got="none", allowed="the tokenizer's vocabulary or more"
            )
        self.config = config
        self.norms = norms or RoleNorms().build(Polar(), config.n_head)
        self.make_embedding(config.vocab_size)
        self.embedding_norm = RMSNorm(config) if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, self.mlp_class()) for _ in range(config.n_layer))
        self.head_norm = RMSNorm(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)
        if not self.head.weight.is_meta:
            self._init_weights(generator)

    def make_embedding(self, vocabulary: int) -> None:
        self.embedding = nn.Embedding(vocabulary, self.config.n_embd)

    def embed(self, idx_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T, D) of tokens, before embedding_norm. cache: of the text in front of them."""
        return self.embedding(idx_BT)

    def embedding_structure(self, masses: RoleMasses) -> Module:
        return atom(
            "embedding.weight", self.norms["embedding"], mass=masses.embedding, role="embedding"
        )

    def mlp_class(self) -> type[MLP]:
        """Of the blocks."""
        return MLP

    @torch.no_grad()
    def _init_weights(self, generator: torch.Generator | None) -> None:
        for leaf, _ in self.structure().radii():
            p = self.get_parameter(leaf.name)
            if leaf.role in ("gain", "bias"):
                p.fill_(leaf.role == "gain")
            elif self.config.init != "norm":
                p.normal_(generator=generator).mul_(self._deviation(leaf.name, p))
            elif self.config.zero_init and leaf.name.endswith(self.zeros):
                p.zero_()
            else:
                p.copy_(leaf.norm.init(p.shape, generator))

    def _deviation(self, name: str, p: Tensor) -> float:
        """Of the initial entries, where init is not "norm"."""
        if self.config.init == "gpt2":
            return 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith(OUTPUTS[:2]) else 0.02
        if self.config.init == "track":
            return (
                1.0
                if name.endswith("embedding.weight")
                else 0.0
                if name.endswith(OUTPUTS)
                else (0.33 / p.shape[1]) ** 0.5
            )
        return 1.0 if name.endswith("embedding.weight") else p.shape[1] ** -0.5

    def structure(self, masses: RoleMasses | None = None) -> Module:
        """The tree of atoms and bonds (theory.md §2): head ∘ norm ∘ blocks ∘ embedding."""
        c, m, norms = self.config, masses or RoleMasses(), self.norms
        gains, biases = 2 * c.n_layer + 1 + c.embedding_norm, 6 * c.n_layer + 1
        gain = m.gain / gains if c.norm_gains else None
        bias = (VectorRMS(), m.bias / biases) if c.bias else None
        kinds = (
            (Attention, "attention", m.attention / 4, ATTENTION_GAIN),
            (self.mlp_class(), "mlp", m.mlp / 2, MLP_GAIN),
        )
        halves = []
        for half, name, mass, branch in kinds:
            inside = half.structure(
                f"blocks.{{}}.{name}",
                norms,
                mass / c.n_layer,
                branch if c.branch_gains else 1.0,
                bias,
            )
            halves.append(inside @ RMSNorm.structure(f"blocks.{{}}.{name}_norm", gain))
        if c.residual == "convex":
            attention, mlp = (residual(half, 2 * c.n_layer) for half in halves)
        else:
            # x + f(norm(x)): the stream grows with depth while the next norm divides by it; the typical gain of both is 1.
            attention, mlp = map(_plain, halves)
        embedding = self.embedding_structure(m)
        if c.embedding_norm:
            embedding = RMSNorm.structure("embedding_norm", gain) @ embedding
        # The norm of logits is their largest: so is that of the head's bias.
        head = c.logit_scale * linear(
            "head", norms["head"], "head", m.head, (MaxEntry(), bias[1]) if bias else None
        )
        return (
            head @ RMSNorm.structure("head_norm", gain) @ (mlp @ attention) ** c.n_layer @ embedding
        )

    def forward(
        self,
        idx_BT: Tensor,
        target_BT: Tensor | None = None,
        *,
        reduction: str = "mean",
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(logits (B, T, V), loss in nats per token or None). Targets of −1 do not count. cache: of the text in front, which these tokens continue."""
        c = self.config
        start = 0 if cache is None else cache.length
        rope = rotary(
            torch.arange(start, start + idx_BT.shape[1], device=idx_BT.device),
            c.n_embd // c.n_head,
            half=c.rotary == "half",
        )
        x_BTD = self.embedding_norm(self.embed(idx_BT, cache))
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rope, cache.layers[i] if cache else None)
        if cache is not None:
            cache.length += idx_BT.shape[1]
        logits_BTV = self.head(self.head_norm(x_BTD))
        logits_BTV = (
            logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)) * c.logit_scale
        )
        if c.logit_softcap is not None:
            u_BTV = logits_BTV / c.logit_softcap
            logits_BTV = (
                c.logit_softcap * torch.tanh(u_BTV)
                if c.softcap == "tanh"
                else logits_BTV * (1 + u_BTV.square()).rsqrt()
            )
        if target_BT is None:
            return logits_BTV, None
        return logits_BTV, F.cross_entropy(
            logits_BTV.flatten(0, 1), target_BT.flatten(), ignore_index=-1, reduction=reduction
        )

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Of one training step: 6 per weight of a matrix product and 12 L D T for attention, causality not discounted (Chowdhery et al., arXiv 2204.02311, App. B)."""
        c = self.config
        return (
            6
            * sum(
                p.numel()
                for n, p in self.named_parameters()
                if p.ndim == 2 and not n.endswith("embedding.weight")
            )
            + 12 * c.n_layer * c.n_embd * c.block_size
        )

    @torch.no_grad()
    def generate(
        self,
        idx_BT: Tensor,
        tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        vocab_size: int | None = None,
        generator: torch.Generator | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """idx (B, T >= 1) continued by `tokens` tokens: (B, T + tokens). temperature 0 is greedy. vocab_size: of the tokenizer, where the model's is padded.

        cache: an empty one, where the model wants another than Cache. Keys and values are cached; each position sees the last block_size ones.
        """
        cache = cache or Cache(self.config)
        fresh_BT = idx_BT[:, -self.config.block_size :]
        for _ in range(tokens):
            logits_BV = self(fresh_BT, cache=cache)[0][:, -1, :vocab_size]
            if top_k is not None:
                kth = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
                logits_BV = logits_BV.masked_fill(logits_BV < kth, -torch.inf)
            if temperature == 0:
                fresh_BT = logits_BV.argmax(-1, keepdim=True)
            else:
                logits_BV = (
                    logits_BV - logits_BV.amax(-1, keepdim=True)
                ) / temperature  # no overflow, however small the temperature
                fresh_BT = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)
            idx_BT = torch.cat((idx_BT, fresh_BT), dim=1)
        return idx_BT


def _plain(half: Module) -> Module:
    return bond("x + f(x)", sensitivity=1 / (1 + half.sensitivity), typical=True) @ concat(
        bond("identity"), half
    )
