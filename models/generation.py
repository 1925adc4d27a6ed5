"""Text from a model, token by token.

B batch, H heads, T new positions, S positions of the text so far, K width of a head, V vocabulary.
"""

import torch
from torch import Tensor

from model import GPT, GPTConfig


class Past:
    """The keys and values (B, H, T, K) of a text's last positions, for one layer.

    last: the MLP's input from the last position, where it looks back (models/ngram.py).
    """

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.kv: tuple[Tensor, Tensor] | None = None
        self.last: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that new positions see, and keep the last of them."""
        T = k.shape[2]
        if self.kv is not None:
            k, v = torch.cat((self.kv[0], k), dim=2), torch.cat((self.kv[1], v), dim=2)
        assert T in (1, k.shape[2]), "no mask for several new positions behind old ones"
        start = max(0, k.shape[2] - self.positions)
        self.kv = k[:, :, start:], v[:, :, start:]
        return k, v


class Cache:
    """The state that a text leaves for its next token: its length, last tokens, each layer's past.

    All but the length are of the last block_size − 1 positions. matching: whether the n-gram model
    looks up matches in the text. By default it does not: a text that is matched with itself soon
    repeats itself for ever.
    """

    def __init__(self, config: GPTConfig, *, matching: bool = False) -> None:
        self.positions, self.matching, self.length = config.block_size - 1, matching, 0
        self.layers = [Past(self.positions) for _ in range(config.n_layer)]
        self.text_BS: Tensor | None = None

    def extend(self, idx_BT: Tensor) -> None:
        """Add tokens that the model has seen."""
        seen_BS = idx_BT if self.text_BS is None else torch.cat((self.text_BS, idx_BT), dim=1)
        self.text_BS = seen_BS[:, max(0, seen_BS.shape[1] - self.positions) :]
        self.length += idx_BT.shape[1]


@torch.no_grad()
def generate(
    model: GPT,
    idx_BT: Tensor,
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    matching: bool = False,
) -> Tensor:
    """Return texts (B, T ≥ 1) continued by `tokens` tokens, (B, T + tokens).

    Each position sees the last block_size ones. temperature: 0 always takes the likeliest token.
    top_k: draw from so many likeliest. vocab_size: of the tokenizer, where the model's is padded.
    matching: as of Cache.
    """
    cache = Cache(model.config, matching=matching)
    new_BT = idx_BT[:, -model.config.block_size :]
    for _ in range(tokens):
        logits_BV = model(new_BT, cache=cache)[0][:, -1, :vocab_size]
        cache.extend(new_BT)
        if top_k is not None:
            kth = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < kth, -torch.inf)
        if temperature == 0:
            new_BT = logits_BV.argmax(-1, keepdim=True)
        else:
            # Logits of at most 0 do not overflow, however small the temperature is.
            logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature
            new_BT = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)
        idx_BT = torch.cat((idx_BT, new_BT), dim=1)
    return idx_BT
