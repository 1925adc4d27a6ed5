"""Learning rates for models that declare no structure: the rate that matches AdamW's, a scan, auto.

    python -m benchmarks.foreign rates [--models vit lstm …] [--steps 200] [--seeds 3]
        [--rates 0.125 0.25 …]
    python -m benchmarks.foreign auto [--steps 50 150 500] [--seeds 2] [--rates 0.5 1 2 4]

`rates` trains each model with the settings that optim/convert.py gives for AdamW's of lr 1e-3 and
weight decay 0.01, at the rate that it matches and at --rates, and with that AdamW. `auto`
trains with the defaults of Dualized, at lr="auto" and at --rates. All rates fall to 0
linearly. Prints the mean test loss (nats) at each rate, the best with *, and where auto ended (η).
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from examples.cnn import CLASSES, ResNet, textures
from examples.tiny import LENGTH, language_model, train_and_test, windows
from optim import Dualized, ModularNorm, Rule, metrize, schedule
from optim.convert import convert

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
BATCH = 16  # windows of text
IMAGES = 64
ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
MASK = 0  # a byte that the text does not have
Build = Callable[[nn.Module, ModularNorm], torch.optim.Optimizer]
train_and_test_once = cache(train_and_test)


@dataclass(frozen=True)
class Task:
    """A model and what it learns.

    batch: of a seed, or the test set. loss: of a model on one. rules: of its weights.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int | None], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    rules: tuple[Rule, ...] = ()


class LSTM(nn.Module):
    """A language model of two LSTM layers."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(256, width), nn.Linear(width, 256)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0])


def text(seed: int | None) -> Tensor:
    """Return windows of bytes (batch, LENGTH), for training or of the text left out."""
    kept, left_out = train_and_test_once()
    return left_out if seed is None else windows(kept, BATCH, seed=seed)


def images(seed: int | None) -> tuple[Tensor, Tensor]:
    """Return noisy stripes (batch, 3, 16, 16), and their directions (batch,)."""
    return textures(512, seed=-1) if seed is None else textures(IMAGES, seed=seed)


def of_language(model: nn.Module, x: Tensor) -> Tensor:
    """Return the loss of a model of transformers on windows."""
    return model(input_ids=x, labels=x).loss


def of_masked(model: nn.Module, x: Tensor) -> Tensor:
    """Return the loss on 15 % of the bytes, masked by their own sum."""
    hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(int(x.sum()))) < 0.15
    return model(input_ids=x.masked_fill(hidden, MASK), labels=x.masked_fill(~hidden, -100)).loss


def of_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Return the loss of a model whose outputs are logits of the next byte."""
    return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def of_classes(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of a classifier."""
    x, y = batch
    output = model(x)
    return F.cross_entropy(getattr(output, "logits", output), y)


def language(name: str) -> nn.Module:
    """Return a model of the examples, by the seed that was set."""
    return language_model(name, seed=torch.initial_seed())


def vit() -> nn.Module:
    """Return a vision transformer of 2 layers."""
    sizes: dict[str, Any] = dict(image_size=16, patch_size=4, num_labels=CLASSES)
    return ViTForImageClassification(
        ViTConfig(
            **sizes,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
        )
    )


def bert() -> nn.Module:
    """Return a masked language model of 2 layers, normalized after each block."""
    sizes: dict[str, Any] = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2)
    no_dropout: dict[str, Any] = dict(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=256,
            **sizes,
            **no_dropout,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
        )
    )


def mixtral() -> nn.Module:
    """Return a mixture of 4 experts in each of 2 layers."""
    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    experts: dict[str, Any] = dict(num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=256,
            **sizes,
            **experts,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
        )
    )


def perceptron() -> nn.Module:
    """Return three linear maps with ReLU."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(768, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()),
        nn.Linear(256, CLASSES),
    )


HEAD = Rule("head.weight", role="head")  # as many outputs as other maps have inputs, or twice
TASKS = {
    "gpt2": Task(lambda: language("gpt2"), text, of_language),
    "llama": Task(lambda: language("llama"), text, of_language),
    "mixtral": Task(mixtral, text, of_language),
    "bert": Task(bert, text, of_masked),
    "lstm": Task(LSTM, text, of_logits, (HEAD,)),
    "vit": Task(vit, images, of_classes),
    "resnet": Task(ResNet, images, of_classes, (HEAD,)),
    "mlp": Task(perceptron, images, of_classes),
}


def train(task: Task, *, steps: int, seed: int, make: Build) -> tuple[float, str]:
    """Return the test loss after a run whose rate falls to 0 linearly, and auto's step size.

    The loss is infinite where a number was not finite.
    """
    torch.manual_seed(seed)
    model = task.build()
    optimizer = make(model, metrize(model, rules=task.rules))
    scheduler = schedule(optimizer, steps, cooldown=1.0)
    for step in range(steps):
        optimizer.zero_grad()
        task.loss(model, task.batch(seed * steps + step)).backward()
        try:
            optimizer.step()
        except ValueError:
            return math.inf, ""
        scheduler.step()
    model.eval()
    with torch.no_grad():
        loss = task.loss(model, task.batch(None)).item()
    step_size = getattr(optimizer, "step_size", None)
    return loss if math.isfinite(loss) else math.inf, f"{step_size:.3g}" if step_size else ""


def dualized(settings: dict[str, Any], model: nn.Module, norm: ModularNorm) -> Dualized:
    """Return our optimizer with these settings."""
    return Dualized(model, norm=norm, **settings)


def adamw(model: nn.Module, norm: ModularNorm) -> torch.optim.Optimizer:
    """Return the AdamW whose settings are converted."""
    return torch.optim.AdamW(model.parameters(), **ADAMW)


def matched(task: Task) -> dict[str, Any]:
    """Return the settings of Dualized that convert gives for ADAMW's."""
    return convert(metrize(task.build(), rules=task.rules), "adamw", **ADAMW).settings


def compare(name: str, steps: int, seeds: int, entries: dict[str, Build]) -> None:
    """Train with each entry, and print their mean test losses."""
    losses: dict[str, list[float]] = {}
    sizes: list[str] = []
    for label, make in entries.items():
        for seed in range(seeds):
            loss, size = train(TASKS[name], steps=steps, seed=seed, make=make)
            losses.setdefault(label, []).append(loss)
            sizes += [size] * bool(size)
    means = {label: sum(values) / seeds for label, values in losses.items()}
    best = min((x, label) for label, x in means.items() if label != "AdamW")[1]
    cells = (f"{label} {x:.3f}{'*' * (label == best)}" for label, x in means.items())
    tail = f"  η {', '.join(sizes)}" if sizes else ""
    print(f"{name:8} {steps:4} steps  {'  '.join(cells)}{tail}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=("rates", "auto"))
    parser.add_argument("--models", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--steps", nargs="+", type=int, default=[200])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    for name in args.models:
        settings = matched(TASKS[name]) if args.study == "rates" else {"lr": "auto"}
        own = settings["lr"]
        rates = {own if own == "auto" else f"matched {own:.3g}": own}
        rates |= {f"{lr:g}": lr for lr in args.rates}
        entries: dict[str, Build] = {
            label: partial(dualized, settings | {"lr": lr}) for label, lr in rates.items()
        }
        if args.study == "rates":
            entries["AdamW"] = adamw
        for steps in args.steps:
            compare(name, steps, args.seeds, entries)


if __name__ == "__main__":
    main()
