"""The text and the models of the language examples, at a size for one CPU core.

The text is the bytes of this repository's own Python; the models are GPT-2 and Llama.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

LENGTH, BATCH = 64, 16


def options(doc: str | None, *, model: str, lr: float, steps: int) -> argparse.ArgumentParser:
    """Return the options that every language example has, with this example's defaults."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("gpt2", "llama"), default=model)
    parser.add_argument("--lr", type=float, default=lr, help="modular norm of one step")
    parser.add_argument("--steps", type=int, default=steps)
    return parser


def text(pattern: str = "optim/*.py") -> Tensor:
    """Return the bytes of the files, a token each (tokens,)."""
    files = sorted(Path(__file__).parent.parent.glob(pattern))
    return torch.frombuffer(
        bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8
    ).long()


def windows(tokens: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Return random windows (count, LENGTH)."""
    starts = torch.randint(
        len(tokens) - LENGTH, (count, 1), generator=torch.Generator().manual_seed(seed)
    )
    return tokens[starts + torch.arange(LENGTH)]


def train_and_test(pattern: str = "optim/*.py") -> tuple[Tensor, Tensor]:
    """Return the text without every tenth kilobyte, and 64 windows of what was left out."""
    tokens = text(pattern)
    blocks = tokens[: len(tokens) // 1000 * 1000].view(-1, 1000)
    held_out = torch.arange(len(blocks)) % 10 == 9
    return blocks[~held_out].flatten(), windows(blocks[held_out].flatten(), 64)


def language_model(name: str, *, seed: int = 0) -> nn.Module:
    """Return a model with random weights. name: "gpt2" or "llama"."""
    torch.manual_seed(seed)
    # A tied head is refused: one tensor cannot have two roles.
    common: dict[str, Any] = dict(
        vocab_size=256, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False
    )
    if name == "gpt2":
        no_dropout: dict[str, Any] = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        return GPT2LMHeadModel(
            GPT2Config(**common, **no_dropout, n_positions=LENGTH, n_embd=128, n_layer=2, n_head=4)
        )
    sizes: dict[str, Any] = dict(
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(LlamaConfig(**common, **sizes, max_position_embeddings=LENGTH))


@torch.no_grad()
def loss_of(model: nn.Module, x: Tensor) -> float:
    """Return the mean loss on windows, in evaluation mode."""
    model.eval()
    loss = model(input_ids=x, labels=x).loss.item()
    model.train()
    return loss
