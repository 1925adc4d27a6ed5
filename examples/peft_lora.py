"""LoRA adapters on GPT-2 or Llama: a model of Python learns English.

Frozen weights have no place in the norm and no state.

python -m examples.peft_lora --model llama
"""

import argparse
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from examples.tiny import BATCH, language_model, loss_of, train_and_test, windows
from nanodual import Dualized

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def train(model: nn.Module, tokens: Tensor, *, lr: float, steps: int) -> Dualized:
    """Train what is not frozen; return the optimizer."""
    optimizer = Dualized(model, lr=lr, beta=0.8)
    scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps
    )
    for step in range(steps):
        x = windows(tokens, BATCH, seed=step)
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return optimizer


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Train the adapters; return the test loss before and after."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(TARGETS), default="gpt2")
    parser.add_argument(
        "--lr", type=float, default=2.0, help="modular norm of one step of the adapters"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--base-steps", type=int, default=100, help="of the whole model, before")
    args = parser.parse_args(argv)

    model = language_model(args.model)
    train(model, train_and_test("optim/*.py")[0], lr=2.0, steps=args.base_steps)
    english, test = train_and_test("docs/*.md")
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=8,
            lora_alpha=8,
            target_modules=TARGETS[args.model],
            fan_in_fan_out=args.model == "gpt2",
        ),
    )
    before = loss_of(adapted, test)
    optimizer = train(adapted, english, lr=args.lr, steps=args.steps)
    print(optimizer.norm.receipt())
    after = loss_of(adapted, test)
    print(f"test loss {before:.3f} → {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
