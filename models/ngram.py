"""The n-gram model: one layer that is given what a larger model has to learn.

A plain GPT spends most of a short training on two simple things: which letters follow which, and
how to find the last place in the text that looked like this one. This model is given the means
for both.

N-grams. Beside the row of its own token, a position adds learned rows for its last 2, 3, … n
tokens. There are too many n-grams for a row each, so a hash picks a row of one table, and some
n-grams share a row. The table begins at zero. Nothing is counted beforehand: its rows are learned
by gradient steps, as all other weights are.

Matches. A position looks for the last time that its last 4 tokens stood in the window, and adds a
learned row for the token that followed there; and so for its last 8, 16 and 32 tokens. It does
not copy that token: it learns, for each length, what such a hint is worth.

Shifted MLP. Half of the MLP's input comes from the position before (Peng et al., arXiv 2305.13048,
without its learned mix).

All of it is optional, and a model has no table that is off. configs/quickstart.toml uses all three,
with bytes as tokens; configs/shakespeare_speedrun.toml uses n-grams and the shifted MLP.

B batch, T positions, S positions and the text in front of them, D n_embd, V vocabulary,
N rows of n-grams and M of matches that a position reads.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, MLP, Block
from optim.modular import Module, atom, bond
from optim.settings import Range

from .generation import Past
from .track3 import Track3Config, Track3GPT


@dataclass
class NgramConfig(Track3Config):
    """The GPT of models/track3.py, and tables of n-grams and matches."""

    ngram: Annotated[int, Range(1)] = 1
    """N > 1 adds a row for each of the last 2, … N tokens; 1 adds none."""

    ngram_rows: Annotated[int, Range(1)] = 4096
    """Rows of the table of n-grams."""

    match: Annotated[int, Range(0, 8, closed=True)] = 0
    """M > 0 adds rows for what followed the last time that the last 4, 8, … 4 · 2^(M − 1) tokens
    stood in the window; 0 adds none."""

    match_dropout: Annotated[float, Range(0, 1, closed=True)] = 0.0
    """In training this share of the sequences finds no matches, so that the model learns to do
    without them, as `generate` does."""

    mlp_shift: bool = False
    """Half of the MLP's input comes from the position before."""


# ---- which rows of the tables a position reads

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, odd, as a signed integer (Knuth)


def ngram_rows(idx_BT: Tensor, *, order: int, rows: int, before: Tensor | None = None) -> Tensor:
    """Return for each position the rows of its last 2, … `order` tokens: (B, T, order − 1).

    before (B, any): the tokens in front of idx. Where there are none, the n-gram is padded with a
    symbol of its own. Hashing is multiplicative (Knuth, The Art of Computer Programming, vol. 3,
    §6.4).
    """
    rows_by_order, T = [], idx_BT.shape[1]
    seen_BS = idx_BT if before is None else torch.cat((before, idx_BT), dim=1)
    seen_BS = F.pad(seen_BS + 1, (order - 1, 0))  # 0 is "no token"
    S = seen_BS.shape[1]
    key_BT = seen_BS[:, -T:]
    for back in range(1, order):
        # Products wrap around, the same on all devices.
        key_BT = key_BT * GOLDEN + seen_BS[:, S - T - back : S - back]
        rows_by_order.append(((key_BT * GOLDEN) >> 32) % rows)
    return torch.stack(rows_by_order, dim=-1)


def match_rows(
    idx_BT: Tensor,
    *,
    matches: int,
    vocabulary: int,
    before: Tensor | None = None,
) -> Tensor:
    """Return for each position and length 4, 8, 16 … the row of what followed the last time.

    The result is (B, T, matches). Each length has vocabulary + 1 rows, the first one for "never".
    before (B, any): the tokens in front of idx, where matches are looked for too.

    Keys are hashes: equal keys are equal n-grams but for 64-bit collisions. A stable sort puts each
    position behind the last one before it that has the same key.
    """
    seen_BS = idx_BT if before is None else torch.cat((before, idx_BT), dim=1)
    place_S = torch.arange(seen_BS.shape[1], device=idx_BT.device)
    rows_by_length: list[Tensor] = []
    key_BS, length = seen_BS + 1, 1
    while len(rows_by_length) < matches:
        # Two keys of neighbours make a key of twice the tokens.
        key_BS = key_BS * GOLDEN + F.pad(key_BS, (length, 0))[:, : key_BS.shape[1]]
        key_BS ^= key_BS >> 29
        length *= 2
        if length < 4:
            continue
        sorted_BS, order_BS = key_BS.sort(dim=1, stable=True)
        again_BS = torch.where(sorted_BS[:, 1:] == sorted_BS[:, :-1], order_BS[:, :-1], -1)
        last_BS = torch.full_like(order_BS, -1).scatter_(1, order_BS[:, 1:], again_BS)
        known_BS = (last_BS >= 0) & (place_S >= length - 1)
        follower_BS = torch.where(known_BS, seen_BS.gather(1, last_BS + 1) + 1, 0)
        first_row = len(rows_by_length) * (vocabulary + 1)
        rows_by_length.append(follower_BS + first_row)
    return torch.stack(rows_by_length, dim=-1)[:, -idx_BT.shape[1] :]


# ---- a layer that looks one position back


def shift(x_BTD: Tensor, past: Past | None) -> Tensor:
    """Return x with the second half of its channels from the position before, 0 at the first."""
    own, old = x_BTD.chunk(2, dim=-1)
    last = past.last if past is not None and past.last is not None else torch.zeros_like(old[:, :1])
    if past is not None:
        past.last = old[:, -1:]
    return torch.cat((own, torch.cat((last, old[:, :-1]), dim=1)), dim=-1)


class ShiftedMLP(MLP):
    """An MLP that has half of its input from the position before."""

    def forward(self, x_BTD: Tensor, past: Any = None) -> Tensor:
        return super().forward(shift(x_BTD, past))


# ---- the model


class NgramGPT(Track3GPT):
    """A GPT with tables of n-grams and matches, and layers that look one position back."""

    config: NgramConfig
    zeros = (*GPT.zeros, "ngram_embedding.weight", "match_embedding.weight")

    def make_embedding(self, vocabulary: int) -> None:
        super().make_embedding(vocabulary)
        c = self.config
        if c.ngram > 1:
            self.ngram_embedding = nn.Embedding(c.ngram_rows, c.n_embd)
        if c.match:
            self.match_embedding = nn.Embedding(c.match * (vocabulary + 1), c.n_embd)

    def make_block(self) -> Block:
        block = super().make_block()
        if self.config.mlp_shift:
            block.mlp = ShiftedMLP(self.config)
        return block

    def rows(self, x_BT: Tensor, cache: Any = None) -> Tensor:
        """Return the sum of the rows of each position's token, n-grams and matches, (B, T, D)."""
        c = self.config
        x_BTD = super().rows(x_BT, cache)
        before_BS = cache.text_BS if cache else None
        if c.ngram > 1:
            rows_BTN = ngram_rows(x_BT, order=c.ngram, rows=c.ngram_rows, before=before_BS)
            x_BTD = x_BTD + self.ngram_embedding(rows_BTN).sum(dim=-2)
        if c.match:
            V, device = self.embedding.num_embeddings, x_BT.device
            never_M = torch.arange(c.match, device=device) * (V + 1)
            if cache is None or cache.matching:
                rows_BTM = match_rows(x_BT, matches=c.match, vocabulary=V, before=before_BS)
            else:
                rows_BTM = never_M.expand(*x_BT.shape, c.match)
            if self.training and c.match_dropout:
                dropped_B = torch.rand(len(x_BT), device=device) < c.match_dropout
                rows_BTM = torch.where(dropped_B[:, None, None], never_M, rows_BTM)
            x_BTD = x_BTD + self.match_embedding(rows_BTM).sum(dim=-2)
        return x_BTD

    def embedding_structure(self) -> Module:
        """Return the sum of the tables; one that a token reads k times has sensitivity k."""
        c, norm, structure = self.config, self.norms["embedding"], super().embedding_structure()
        if c.ngram > 1:
            structure += (c.ngram - 1) * atom("ngram_embedding.weight", norm, role="ngram")
        if c.match:
            structure += c.match * atom("match_embedding.weight", norm, role="match")
        return structure

    def mlp_structure(self) -> Module:
        if not self.config.mlp_shift:
            return super().mlp_structure()
        # Half of two positions: as large as one where they are alike in size, at most √2 times.
        return super().mlp_structure() @ bond("shift", typical=True)
