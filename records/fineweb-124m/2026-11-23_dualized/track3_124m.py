"""track3_124m: Exported from the configuration track3_124m.toml, which was not run, by nanodual, commit cf0a59daa59f6fcde5b2db15894424f6aa33919d.

Data: data/fineweb10B/, in the optimization track's order. Alone, or under torchrun with a number of processes that divides 8.
"""

import hashlib
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ---- Hyperparameters

N_EMBD = 768
N_HEAD = 6
DROPOUT = 0.0
ATTENTION_SCALE = 15.36
VOCAB_SIZE = 50304
NGRAM = 1
N_LAYER = 12
LOGIT_SCALE = 1.0
NGRAM_ROWS = 4096
LOGIT_SOFTCAP = 15.0
BLOCK_SIZE = 1024
BATCH_SIZE = 512
EVAL_TOKENS = 10485760
EVAL_BATCH_SIZE = 64
BETA2 = 0.99
REFRESH_EVERY = 10
GRADIENT_ACCUMULATION_STEPS = 8
STEPS = 3250
WARMUP = 0.0
COOLDOWN = 0.7
COOLDOWN_POWER = 1.0
BETA = 0.95
LR = 3.0
LOG_EVERY = 10
SEED = 0


# ---- Polar factor

Coefficients = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Schedule:
    """A fixed sequence of steps X ← aX + b(XXᵀ)X + c(XXᵀ)²X on X = G / (safety · ‖G‖_F).

    coefficients, safety factor and band are one value: a table run with another table's safety factor has another band.
    band: where singular values from [floor, 1] · ‖G‖_F land, exact arithmetic, rounded outward (measured: tests/test_polar.py).
    """

    name: str
    coefficients: Coefficients
    safety: float
    band: tuple[float, float]


SCHEDULES = {
    s.name: s
    for s in (
        Schedule(
            "polar_express",
            (
                (8.156554524902461, -22.48329292557795, 15.878769915207462),
                (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
            ),
            1.02,
            (0.846, 1.142),
        ),
    )
}
# The Gram form accumulates rounding errors faster than the plain one; X is formed anew ("restart") every so many steps. In float32 this
# period follows the plain form within 2e-4 on log-uniform spectra. In bfloat16 no period but 1, the plain form, keeps the band: 2 leaves it
# by up to 0.1 on log-uniform and rank-one spectra, and 9 diverges (tests/test_polar.py), so that bfloat16 is plain unless gram is asked for.
GRAM_PERIOD = {torch.float64: 3, torch.float32: 3, torch.bfloat16: 2}
# The Gram form has fewer FLOPs exactly above n/m = 1.5 [GN]; from 2 on it also fits in two temporaries of X's size.
GRAM_ASPECT = 2.0


def plain(X: Tensor, coefficients: Coefficients, *, inplace: bool = False) -> Tensor:
    """The iteration on X (b, m, n), m <= n. inplace: in X, with at most two more tensors of its size."""
    for a, b, c in coefficients:
        A = X @ X.mT
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        del A
        Y = torch.baddbmm(X, P, X, beta=a)
        X = X.copy_(Y) if inplace else Y
        del P, Y
    return X


def gram(X: Tensor, coefficients: Coefficients, *, inplace: bool = False) -> Tensor:
    """The same iteration through R = XXᵀ (b, m, m) and the product Q of its polynomials, m <= n [GN]."""
    Q = R = None
    for step, (a, b, c) in enumerate(coefficients, start=1):
        R = X @ X.mT if R is None else R
        P = torch.baddbmm(R, R, R, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P if Q is None else P @ Q
        if step % GRAM_PERIOD[X.dtype] == 0 or step == len(coefficients):
            R = P = None
            X = X.copy_(Q @ X) if inplace else Q @ X
            Q = None
        else:
            R = P @ R
            R = R @ P
    return X


@dataclass(frozen=True)
class Polar:
    """How a polar factor is computed.

    schedule: "exact" (SVD) or a name in SCHEDULES. form: "plain", "gram", or "auto": gram from aspect ratio GRAM_ASPECT on, except in bfloat16.
    dtype: of the iteration; "auto" is bfloat16 on an accelerator and float32 on a CPU (in train_gpt.py: that of run.precision). float64 input is always iterated in float64.
    """

    def __call__(self, G: Tensor, *, inplace: bool = False) -> Tensor:
        """The polar factor of each matrix of G (..., m, n), in G's dtype; zero for a zero matrix, any scale of G.

        inplace: G may be overwritten; where the iteration is in G's dtype, it then needs two more tensors of G's size, and no third.
        """
        X = G.double() if G.dtype == torch.float64 else G.float()
        # Divided by its own largest entry first, ‖X‖_F is in [1, √(mn)]: no square under- or overflows, and 0 stays 0.
        largest = X.amax(dim=(-2, -1), keepdim=True).maximum(-X.amin(dim=(-2, -1), keepdim=True))
        scale = torch.where(largest > 0, largest, 1)
        X = X.div_(scale) if inplace or X is not G else X / scale
        schedule = SCHEDULES["polar_express"]
        X.div_(schedule.safety * torch.linalg.matrix_norm(X, keepdim=True).clamp(min=1))
        tall = X.shape[-2] > X.shape[-1]
        X = (X.mT if tall else X).to(self._iteration_dtype(G)).reshape(-1, min(G.shape[-2:]), max(G.shape[-2:]))
        X = self._form(X.shape, X.dtype)(X, schedule.coefficients, inplace=True)
        return (X.mT if tall else X).reshape(G.shape).to(G.dtype)

    def _form(self, shape: Sequence[int], dtype: torch.dtype) -> Callable[..., Tensor]:
        """Of X (..., m, n), m <= n."""
        pays = shape[-1] >= GRAM_ASPECT * shape[-2] and dtype != torch.bfloat16
        return gram if pays else plain

    def _iteration_dtype(self, G: Tensor) -> torch.dtype:
        if G.dtype == torch.float64:
            return torch.float64
        return getattr(torch, "bfloat16")


# ---- Norms, their duality maps, initial weights


class Norm:
    """A norm on one weight. Two identities hold for G ≠ 0: norm(dualize(G)) == 1 and ⟨G, dualize(G)⟩ == dual_norm(G).

    dualize(0) == 0, and dualize(c·G) == dualize(G) for c > 0, at any scale of finite G. A subclass defines norm, dual_norm, dualize.
    """

    # dimensions of one weight, the trailing ones of a stack
    ndim: int = 2

    def norm(self, W: Tensor) -> Tensor:
        """(..., O, I) → (...): the norm's value."""
        raise NotImplementedError

    def dualize(self, G: Tensor) -> Tensor:
        """(..., O, I) → same shape and dtype: a T of norm 1 that attains the dual norm."""
        raise NotImplementedError

    def dualize_(self, G: Tensor) -> Tensor:
        """dualize(G); G may be overwritten."""
        return self.dualize(G)

    def fresh(self, G: Tensor) -> Tensor | None:
        """A mask, broadcastable to G, of the blocks that have a gradient; None: the weight moves as a whole."""
        return None

    def init(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """A random weight of norm 1 and this shape, float32: the dual of a Gaussian."""
        return self.dualize(torch.randn(tuple(shape), generator=generator))


def _at_least_fp32(G: Tensor) -> Tensor:
    return G if G.dtype == torch.float64 else G.float()


def _unit(G: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """G / ‖G‖₂ and ‖G‖₂ over dims (kept). Scaled by the largest entry first: no square under- or overflows; 0 stays 0."""
    G = _at_least_fp32(G)
    largest = G.abs().amax(dim=dims, keepdim=True)
    X = G / torch.where(largest > 0, largest, 1)
    # 0, or between 1 and √numel
    length = torch.linalg.vector_norm(X, dim=dims, keepdim=True)
    return (X.div_(length.clamp(min=1)), largest * length)


# How large a spectral step is, named by formula: libraries differ, and "spectral" alone means several of them.
SCALES: dict[str, Callable[[float, float], float]] = {
    "sqrt(O/I)": lambda O, I: (O / I) ** 0.5,
    "1": lambda O, I: 1.0,
    "sqrt(max(1, O/I))": lambda O, I: max(1.0, O / I) ** 0.5,
    "0.2 sqrt(max(O, I))": lambda O, I: 0.2 * max(O, I) ** 0.5,
}


@dataclass(frozen=True)
class Spectral(Norm):
    """σ_max(W) / scale [OO]. Within the polar schedule's band of 1 where it is not exact.

    scale: a formula in SCALES, the singular values of a step.
    """

    polar: Polar = field(default=Polar())
    scale: str = "1"

    def norm(self, W: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(_at_least_fp32(W), ord=2) / self._scale(W.shape)

    def dualize(self, G: Tensor) -> Tensor:
        return self.polar(G) * self._scale(G.shape)

    def dualize_(self, G: Tensor) -> Tensor:
        return self.polar(G, inplace=True).mul_(self._scale(G.shape))

    def init(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Scale times a semi-orthogonal matrix, uniform (Haar): the exact polar factor of a Gaussian, by QR, which is cheaper than the SVD."""
        G = torch.randn(*shape, generator=generator)
        Q, R = torch.linalg.qr(G if shape[-2] >= shape[-1] else G.mT)
        Q = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        return (Q if shape[-2] >= shape[-1] else Q.mT) * self._scale(shape)

    def _scale(self, shape: Sequence[int]) -> float:
        return SCALES[self.scale](shape[-2], shape[-1])


@dataclass(frozen=True)
class RMSToRMS(Spectral):
    """√(I/O) σ_max(W), the operator norm between RMS norms: hidden linear maps [MD]."""

    scale: str = "sqrt(O/I)"


class _RowWise(Norm):
    """A maximum over rows of c ‖row‖₂, c given by the width: dualize gives every non-zero row its full size 1/c."""

    def _row_factor(self, width: int) -> float:
        raise NotImplementedError

    def norm(self, W: Tensor) -> Tensor:
        return self._row_factor(W.shape[-1]) * _unit(W, (-1,))[1].amax(dim=(-2, -1))

    def dualize(self, G: Tensor) -> Tensor:
        return _unit(G, (-1,))[0].div_(self._row_factor(G.shape[-1])).to(G.dtype)

    def fresh(self, G: Tensor) -> Tensor:
        return (G != 0).any(dim=-1, keepdim=True)


@dataclass(frozen=True)
class L1ToRMS(_RowWise):
    """max over rows of rms(row): embeddings (V, D), one row a token [MD]."""

    def _row_factor(self, width: int) -> float:
        return width ** (-0.5)


@dataclass(frozen=True)
class RMSToLinf(_RowWise):
    """√I · max over rows of ‖row‖₂, the operator norm from RMS to the largest logit: heads (V, I) [SN]."""

    def _row_factor(self, width: int) -> float:
        return width**0.5


@dataclass(frozen=True)
class MaxEntry(Norm):
    """max |entry| of a weight of ndim dimensions: a gain, which is a diagonal map from RMS to RMS; a scalar (ndim 0); sign descent for any [OO]."""

    ndim: int = 1

    def _factor(self, shape: Sequence[int]) -> float:
        return 1.0

    def norm(self, W: Tensor) -> Tensor:
        return self._factor(W.shape) * self._over_weight(torch.amax, _at_least_fp32(W).abs())

    def dualize(self, G: Tensor) -> Tensor:
        return G.sign() / self._factor(G.shape)

    def dualize_(self, G: Tensor) -> Tensor:
        return G.sign_().div_(self._factor(G.shape))

    def fresh(self, G: Tensor) -> Tensor | None:
        return (G != 0).any(dim=-1, keepdim=True) if self.ndim >= 2 else None

    def _over_weight(self, reduce: Callable[..., Tensor], X: Tensor) -> Tensor:
        return reduce(X, dim=tuple(range(-self.ndim, 0))) if self.ndim else X


@dataclass(frozen=True)
class VectorRMS(Norm):
    """rms(b) of a vector (..., O): biases [MD]."""

    ndim: int = field(default=1, init=False)

    def norm(self, W: Tensor) -> Tensor:
        return _unit(W, (-1,))[1][..., 0] / W.shape[-1] ** 0.5

    def dualize(self, G: Tensor) -> Tensor:
        return _unit(G, (-1,))[0].mul_(G.shape[-1] ** 0.5).to(G.dtype)


# ---- Direction: what is dualized

Buffers = dict[str, Tensor]


class Direction:
    """A rule for what is dualized. One instance serves all weights; what it remembers is in the buffers.

    gated: it leaves its buffers as they are wherever live is 0. Otherwise the optimizer does that for it, at the price of a copy.
    entrywise: no entry depends on another one, so that ranks may each hold some rows of a weight.
    """

    def buffers(self, W: Tensor) -> Buffers:
        """Of one weight (*shape), in its dtype, before the first step."""
        return {"momentum": torch.zeros_like(W)}

    def __call__(self, G: Tensor, state: Buffers, *, live: Tensor, beta: float, beta2: float, refresh: bool) -> Tensor:
        """What is dualized (n, *shape), not an alias of a buffer.

        G is 0 where live is, and may be overwritten. state: the buffers, stacked (n, …), updated in place.
        refresh: a step on which costly parts of the state are made anew.
        """
        raise NotImplementedError


def _average_(M: Tensor, G: Tensor, live: Tensor, beta: float) -> Tensor:
    """M ← β M + (1 − β) G, exactly M where live is 0."""
    return M.lerp_(G, live * (1 - beta))


class Momentum(Direction):
    """The exponential moving average M ← β M + (1 − β) G, 0 <= β < 1; with nesterov the average one step ahead, (1 − β) G + β M."""

    def __init__(self, *, nesterov: bool = False) -> None:
        self.nesterov = nesterov

    def __call__(self, G: Tensor, state: Buffers, *, live: Tensor, beta: float, beta2: float, refresh: bool) -> Tensor:
        M = _average_(state["momentum"], G, live, beta)
        return G.lerp_(M, beta) if self.nesterov else G.copy_(M)


# ---- Schedules


def wsd(step: int, total: int, *, warmup: float, cooldown: float, power: float = 1.0) -> float:
    """Warm-up, stable, decay: linear to 1 over `warmup` steps, then 1, then to 0 over the last `cooldown` fraction of all steps (Hägele et al., arXiv 2405.18392),
    as the power of what is left of it (1.2 is the optimization track's "PowerCool")."""
    left = (total - step) / max(1, round(cooldown * total)) if cooldown else 1.0
    return min(1.0, (step + 1) / max(1, _steps(warmup, total)), max(0.0, left) ** power)


def _steps(warmup: float, total: int) -> int:
    return round(warmup * total if warmup < 1 else warmup)


# ---- Architecture


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def rotary(position: Tensor, width: int, *, half: bool = False) -> tuple[Tensor, Tensor]:
    """(T,) → cos, sin (T, width/2): rotary positions, base 10,000 (Su et al., arXiv 2104.09864).

    half: the optimization track's (modded-nanogpt, records/track_3_optimization): frequencies 1 … 1/1024 for half of the pairs, 0 for the others, turning the other way.
    """
    if half:
        turned = -(1024 ** (-torch.linspace(0, 1, width // 4, device=position.device, dtype=torch.float32)))
        frequency = torch.cat((turned, torch.zeros_like(turned)))
    else:
        frequency = 10000 ** (-torch.arange(0, width, 2, device=position.device, dtype=torch.float32) / width)
    angle_TK = position.float()[:, None] * frequency
    return (angle_TK.cos(), angle_TK.sin())


def rotate(x_BHTK: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (r.to(x_BHTK.dtype) for r in rope)
    a, b = x_BHTK.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def ngram_rows(idx_BT: Tensor, *, order: int, rows: int, before: Tensor | None = None) -> Tensor:
    """(B, T, order − 1): for each position, rows of a hash table for its last 2, … `order` tokens. before (B, any): the tokens in front of idx.

    Where there are none the n-gram is padded, with a symbol of its own. Multiplicative hashing (Knuth, The Art of Computer Programming, vol. 3, §6.4).
    """
    found, T = ([], idx_BT.shape[1])
    seen = idx_BT if before is None else torch.cat((before, idx_BT), dim=1)
    # 0 is "no token"
    seen = F.pad(seen + 1, (order - 1, 0))
    key = seen[:, -T:]
    for back in range(1, order):
        # wraps around, the same on all devices
        key = key * GOLDEN + seen[:, seen.shape[1] - T - back : seen.shape[1] - back]
        found.append((key * GOLDEN >> 32) % rows)
    return torch.stack(found, dim=-1)


# 2^64 / golden ratio, odd, as a signed integer [Knuth]
GOLDEN = 11400714819323198485 - 2**64
# Constant gains inside a block keep it well-normed; they are folded into the residual weight, as linear maps let them pass.
# concat(q, k, v) has sensitivity 3 in the sum norm [MN]
ATTENTION_GAIN = 1 / 3
# rms(relu(x)²) = √(3/2) for x ~ N(0, 1)
MLP_GAIN = math.sqrt(2 / 3)


class RMSNorm(nn.RMSNorm):
    def __init__(self) -> None:
        super().__init__(N_EMBD, elementwise_affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), None if self.weight is None else self.weight.to(x.dtype))


class Attention(nn.Module):
    """Causal attention with QK-norm: queries and keys have unit RMS per head, so scores are c · cos(q, k)."""

    def __init__(self) -> None:
        super().__init__()
        D = N_EMBD
        self.q, self.k, self.v, self.out = (nn.Linear(D, D, bias=True) for _ in range(4))
        self.n_head, self.dropout = (N_HEAD, DROPOUT)
        # c/K, since ⟨q, k⟩ = K cos(q, k)
        self.scale = ATTENTION_SCALE * N_HEAD / D

    def heads(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Queries and keys, at unit RMS and rotated, and values: (B, H, T, K) each."""
        q, k, v = (w(x_BTD).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        return [rotate(rms_norm(q), rope), rotate(rms_norm(k), rope), v]

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.heads(x_BTD, rope)
        dropout = self.dropout if self.training else 0.0
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=dropout, scale=self.scale)
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Squared-ReLU MLP (So et al., arXiv 2109.08668)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(N_EMBD, 4 * N_EMBD, bias=True)
        self.down = nn.Linear(4 * N_EMBD, N_EMBD, bias=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.up(x_BTD).relu().square())


class Block(nn.Module):
    """An attention half and an MLP half, each behind an RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = (RMSNorm(), Attention())
        self.mlp_norm, self.mlp = (RMSNorm(), MLP())
        self.dropout, self.mlp_shift = (DROPOUT, False)
        step = 1.0
        self.keep = 1.0
        self.attention_step, self.mlp_step = (step * 1.0 for gain in (ATTENTION_GAIN, MLP_GAIN))

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x_BTD = self._add(x_BTD, self.attention(self.attention_norm(x_BTD), rope), self.attention_step)
        y_BTD = self.mlp_norm(x_BTD)
        return self._add(x_BTD, self.mlp(shift(y_BTD) if self.mlp_shift else y_BTD), self.mlp_step)

    def _add(self, x_BTD: Tensor, f_BTD: Tensor, step: float) -> Tensor:
        if self.dropout:
            f_BTD = F.dropout(f_BTD, self.dropout, self.training)
        return torch.add(x_BTD * self.keep, f_BTD, alpha=step)


def shift(x_BTD: Tensor) -> Tensor:
    """The second half of the channels from the position before; 0 before the first one."""
    own, old = x_BTD.chunk(2, dim=-1)
    last = torch.zeros_like(old[:, :1])
    return torch.cat((own, torch.cat((last, old[:, :-1]), dim=1)), dim=-1)


OUTPUTS = ("out.weight", "down.weight", "head.weight")


class GPT(nn.Module):
    """A causal language model whose every weight starts at norm 1 of its role's norm, or at 0."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        """norms: by role, as RoleNorms.build makes them. generator: of the initial weights. vocab_size must be set."""
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, N_EMBD)
        self.ngram_embedding = None
        self.embedding_norm = RMSNorm()
        self.blocks = nn.ModuleList((Block() for _ in range(N_LAYER)))
        self.head_norm = RMSNorm()
        self.head = nn.Linear(N_EMBD, VOCAB_SIZE, bias=True)
        self._init_weights(generator)

    @torch.no_grad()
    def _init_weights(self, generator: torch.Generator | None) -> None:
        for leaf in WEIGHTS:
            p = self.get_parameter(leaf.name)
            if leaf.role in ("gain", "bias"):
                p.fill_(leaf.role == "gain")
            elif leaf.name.endswith(OUTPUTS) or leaf.role == "ngram":
                p.zero_()
            else:
                p.copy_(leaf.norm.init(p.shape, generator))

    def forward(
        self, idx_BT: Tensor, target_BT: Tensor | None = None, *, reduction: str = "mean", start: int = 0, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(logits (B, T, V), loss in nats per token or None). Targets of −1 do not count. With past, start: position of the first token; before: tokens in front of it, for n-grams."""
        rope = rotary(torch.arange(start, start + idx_BT.shape[1], device=idx_BT.device), N_EMBD // N_HEAD, half=True)
        x_BTD = self.embedding(idx_BT)
        if self.ngram_embedding is not None:
            x_BTD = x_BTD + self.ngram_embedding(ngram_rows(idx_BT, order=NGRAM, rows=NGRAM_ROWS, before=before)).sum(dim=-2)
        x_BTD = self.embedding_norm(x_BTD)
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rope)
        logits_BTV = self.head(self.head_norm(x_BTD))
        logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)) * LOGIT_SCALE
        u_BTV = logits_BTV / LOGIT_SOFTCAP
        logits_BTV = logits_BTV * (1 + u_BTV.square()).rsqrt()
        if target_BT is None:
            return (logits_BTV, None)
        return (logits_BTV, F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), ignore_index=-1, reduction=reduction))


# ---- Data, optimizer, training


class Weight(NamedTuple):
    """One tensor: its role, the norm of that, and the radius that the modular norm gives it, the size of its step at lr 1."""

    name: str
    role: str
    norm: Norm
    radius: float


DATA = "data/fineweb10B"
# {split: {file: sha256}}
SHARDS: dict[str, dict[str, str]] = {}
BLOCK = [
    ("blocks.{}.attention_norm.weight", "gain", MaxEntry(), [0.002849002849002849] * 12),
    ("blocks.{}.attention.q.weight", "attention", RMSToRMS(), [0.037037037037037035] * 12),
    ("blocks.{}.attention.q.bias", "bias", VectorRMS(), [0.0030441400304414006] * 12),
    ("blocks.{}.attention.k.weight", "attention", RMSToRMS(), [0.037037037037037035] * 12),
    ("blocks.{}.attention.k.bias", "bias", VectorRMS(), [0.0030441400304414006] * 12),
    ("blocks.{}.attention.v.weight", "attention", RMSToRMS(), [0.037037037037037035] * 12),
    ("blocks.{}.attention.v.bias", "bias", VectorRMS(), [0.0030441400304414006] * 12),
    ("blocks.{}.attention.out.weight", "attention", RMSToRMS(), [0.037037037037037035] * 12),
    ("blocks.{}.attention.out.bias", "bias", VectorRMS(), [0.0030441400304414006] * 12),
    ("blocks.{}.mlp_norm.weight", "gain", MaxEntry(), [0.0036476640623644176] * 12),
    ("blocks.{}.mlp.up.weight", "mlp", RMSToRMS(), [0.015806544270245807] * 12),
    ("blocks.{}.mlp.up.bias", "bias", VectorRMS(), [0.0012991680222119843] * 12),
    ("blocks.{}.mlp.down.weight", "mlp", RMSToRMS(), [0.022353829281232362] * 12),
    ("blocks.{}.mlp.down.bias", "bias", VectorRMS(), [0.0018373010368136187] * 12),
]
WEIGHTS = [
    Weight("embedding.weight", "embedding", L1ToRMS(), 0.11111111111111109),
    Weight("embedding_norm.weight", "gain", MaxEntry(), 0.0021367521367521365),
    *(Weight(name.format(i), role, norm, radii[i]) for i in range(12) for name, role, norm, radii in BLOCK),
    Weight("head_norm.weight", "gain", MaxEntry(), 0.0021367521367521365),
    Weight("head.weight", "head", RMSToLinf(), 0.11111111111111109),
    Weight("head.bias", "bias", MaxEntry(), 0.0007610350076103499),
]
CODE = Path(__file__).read_text(encoding="utf-8")
DIRECTION = Momentum(nesterov=True)


# ---- data
def read_shard(path: Path) -> Tensor:
    """(n,) int16, mapped: the bits of a file's uint16 tokens, behind 256 int32 (magic, version, n, zeros)."""
    magic, version, n = torch.from_file(str(path), shared=False, size=256, dtype=torch.int32)[:3].tolist()
    if (magic, version) != (20240520, 1):
        raise ValueError(f"{path}: not a token shard: magic {magic}, version {version}")
    return torch.from_file(str(path), shared=False, size=512 + n, dtype=torch.int16)[512:]


def read_split(split: str) -> list[Tensor]:
    files = sorted(Path(DATA).glob(f"fineweb_{split}_*.bin"))
    if not files:
        raise FileNotFoundError(f"{DATA}/fineweb_{split}_*.bin")
    return [read_shard(file) for file in files]
    shards = []
    for file, sha256 in SHARDS[split].items():
        with (Path(DATA) / file).open("rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != sha256:
                raise ValueError(f"{DATA}/{file}: other data than the run's")
        shards.append(read_shard(Path(DATA) / file))
    return shards


def integers(tokens: Tensor) -> Tensor:
    return tokens.long() & 65535


class InOrder:
    """Batches side by side, as the files have them; the end of a file that has no whole batch more is left out."""

    def __init__(self, shards: list[Tensor]) -> None:
        self.shards, self.tokens = (shards, BATCH_SIZE * BLOCK_SIZE)
        self.ends = list(accumulate((max(1, (len(s) - 2) // self.tokens) for s in shards)))

    def batch(self, step: int, slot: int, slots: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B / slots, T) of one slot of a step."""
        if step >= self.ends[-1]:
            raise ValueError(f"step {step}: the data ends after {self.ends[-1]}")
        shard = next((i for i, end in enumerate(self.ends) if step < end))
        first = (step - (self.ends[shard - 1] if shard else 0)) * self.tokens + slot * (self.tokens // slots)
        window = integers(self.shards[shard][first : first + self.tokens // slots + 1])
        return (window[:-1].view(-1, BLOCK_SIZE), window[1:].view(-1, BLOCK_SIZE))


def validation_batches(shards: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Every token but the first is a target once: windows side by side, the last one padded with targets of −1, which do not count."""
    stream, T = (shards[0] if len(shards) == 1 else torch.cat(shards), BLOCK_SIZE)
    targets = len(stream) - 1
    targets = min(targets, EVAL_TOKENS)
    for start in range(0, targets, T * EVAL_BATCH_SIZE):
        chunk = integers(stream[start : min(start + T * EVAL_BATCH_SIZE, targets) + 1])
        missing = -(len(chunk) - 1) % T
        yield (F.pad(chunk[:-1], (0, missing)).view(-1, T), F.pad(chunk[1:], (0, missing), value=-1).view(-1, T))


# ---- optimizer
class Stack:
    """Weights of one norm and shape, (n, *shape), which step together."""

    def __init__(self, norm: Norm, weights: list[Tensor], radii: list[float]) -> None:
        self.norm, self.weights = (norm, weights)
        self.radii = torch.tensor(radii, device=weights[0].device).reshape(-1, *(1,) * norm.ndim)
        made = [DIRECTION.buffers(w) for w in weights]
        self.state = {k: torch.stack([m[k] for m in made]) for k in made[0]}

    def step(self, lr: float, beta: float, clip: Tensor | None, refresh: bool) -> None:
        G = torch.stack([w.grad for w in self.weights])
        # a row without any gradient does not move
        live = self.norm.fresh(G)
        live = torch.ones((), dtype=torch.bool, device=G.device) if live is None else live
        D = DIRECTION(G, self.state, live=live.to(G.dtype), beta=beta, beta2=BETA2, refresh=refresh)
        D = self.norm.dualize_(D)
        W = torch.stack([w.detach() for w in self.weights])
        U = D.mul_(self.radii).masked_fill_(~live, 0)
        W = torch.add(W, U, alpha=-lr)
        for w, new in zip(self.weights, W, strict=True):
            w.copy_(new)


class Dualized:
    """W ← retract(W − lr · radius · (dualize(direction) + weight decay · W)): steepest descent in the modular norm, every weight by the same rule."""

    def __init__(self, model: GPT) -> None:
        equal: dict[tuple[Norm, torch.Size], list[tuple[Tensor, float]]] = {}
        placed = {w.name: w for w in WEIGHTS}
        for name, p in model.named_parameters():
            equal.setdefault((placed[name].norm, p.shape), []).append((p, placed[name].radius))
        self.stacks = [Stack(norm, [p for p, _ in members], [r for _, r in members]) for (norm, _), members in equal.items()]
        self.calls = 0

    @torch.no_grad()
    def step(self, lr: float, beta: float) -> None:
        clip = None
        for stack in self.stacks:
            stack.step(lr, beta, clip, self.calls % REFRESH_EVERY == 0)
        self.calls += 1


# ---- set-up: one process, or those of torchrun
RANK, WORLD = (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
# of a step, whoever computes them
SLOTS = GRADIENT_ACCUMULATION_STEPS
assert SLOTS % WORLD == 0
device = torch.device("cuda")
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
torch.cuda.set_device(device)
if WORLD > 1:
    dist.init_process_group()
logfile = Path("logs") / f"{uuid.uuid4()}.txt"


def print0(text: str, *, console: bool = False, log: bool = True) -> None:
    if RANK == 0 and console:
        print(text, flush=True)
    if RANK == 0 and log:
        with logfile.open("a", encoding="utf-8") as f:
            print(text, file=f)


def total(x: Tensor) -> Tensor:
    """The sum over processes."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def now() -> float:
    torch.cuda.synchronize()
    if WORLD > 1:
        dist.barrier()
    return time.perf_counter()


# ---- training and validation
@torch.no_grad()
def validate(model: GPT, shards: list[Tensor]) -> float:
    """Nats per token."""
    model.eval()
    found = torch.zeros(2, dtype=torch.float64, device=device)
    for i, (x_BT, y_BT) in enumerate(validation_batches(shards)):
        if i % WORLD == RANK:
            x_BT, y_BT = (x_BT.to(device), y_BT.to(device))
            with torch.autocast(device.type, torch.bfloat16, enabled=True):
                loss = model(x_BT, y_BT, reduction="sum")[1]
            found += torch.stack([loss.double(), (y_BT >= 0).sum().double()])
    model.train()
    nats, tokens = total(found).tolist()
    return nats / tokens


def train(seed: int) -> None:
    torch.manual_seed(seed)
    batches = InOrder(read_split("train"))
    val_shards = read_split("val")
    model = GPT(generator=torch.Generator().manual_seed(seed)).to(device)
    forward = model
    optimizer = Dualized(model)
    steps, seconds, since = (STEPS, 0.0, now())
    for step in range(steps + 1):
        evaluates = step % (125 if step < 0.9 * steps else 25) == 0 or step == steps
        if evaluates:
            seconds += now() - since
            val_loss = validate(model, val_shards)
            average = f"{1000 * seconds / max(1, step):.2f}ms"
            print0(f"step:{step}/{steps} val_loss:{val_loss:.5f} train_time:{seconds:.3f}s step_avg:{average}", console=True)
            since = now()
        if step == steps:
            break
        loss = torch.zeros((), device=device)
        for slot in range(RANK, SLOTS, WORLD):
            x_BT, y_BT = batches.batch(step, slot, SLOTS)
            with torch.autocast(device.type, torch.bfloat16, enabled=True):
                part = forward(x_BT.to(device), y_BT.to(device))[1] / SLOTS
            part.backward()
            loss += part.detach()
        if WORLD > 1:
            for p in model.parameters():
                dist.all_reduce(p.grad)
        multiplier = wsd(step, steps, warmup=WARMUP, cooldown=COOLDOWN, power=COOLDOWN_POWER)
        beta = BETA
        optimizer.step(LR * multiplier, beta)
        model.zero_grad(set_to_none=True)
        done = step + 1
        logged = done == steps
        logged = logged or done % LOG_EVERY == 0
        if logged:
            elapsed = seconds + time.perf_counter() - since
            print0(
                f"step:{done}/{steps} train_loss:{total(loss).item():.6f} train_time:{elapsed:.3f}s step_avg:{1000 * elapsed / done:.2f}ms"
            )


def main() -> None:
    """As many trials as the argument says, seeds one after the other."""
    logfile.parent.mkdir(exist_ok=True)
    print0(str(logfile), console=True, log=False)
    print0(CODE)
    print0("=" * 100)
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print0(f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda} on {on} with world_size {WORLD}")
    print0("=" * 100)
    for trial in range(int(sys.argv[-1]) if len(sys.argv) > 1 else 1):
        train(SEED + trial)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
