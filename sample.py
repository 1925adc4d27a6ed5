"""Text from a run's newest checkpoint.

python sample.py runs/NAME --prompt "def f(" --tokens 300
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

import checkpoint
import config as configuration
from config import Config, ConfigError
from data.loader import Dataset
from data.shards import DataError
from model import GPT
from runtime import RunError, RunFolder, Runtime


@dataclass
class Options:
    """Text from a run's newest checkpoint."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, runs/NAME."""
    prompt: str = "\n"
    tokens: int = 256
    samples: int = 1
    temperature: float = 0.8
    """0 always takes the likeliest token."""
    top_k: int | None = None
    seed: int = 0


def main(options: Options) -> None:
    for name, value, least in (
        ("tokens", options.tokens, 1),
        ("samples", options.samples, 1),
        ("temperature", options.temperature, 0),
        ("top-k", options.top_k or 1, 1),
    ):
        if value < least:
            raise ConfigError(f"--{name}\n  got: {value}\n  allowed: {least} or more")
    folder = RunFolder(options.run, resume=True)
    newest = checkpoint.latest(folder.checkpoints)
    if newest is None:
        raise RunError(
            f"{folder.checkpoints}\n  got: no checkpoint\n  allowed: a run that has saved one\n  fix: let it train, or set train.checkpoint_every"
        )
    config = configuration.from_dict(Config, checkpoint.read_state(newest)["config"])
    config.run.device = "auto"
    runtime = Runtime(config.run)
    tokenizer = Dataset(config.data).tokenizer
    idx_T = tokenizer.encode(options.prompt).tolist()
    if not idx_T:
        raise ConfigError("--prompt\n  got: no tokens\n  allowed: at least one character")
    model = GPT(config.model, config.optim.norms.build(config.optim.polar))
    checkpoint.load_model(newest, model)
    model.to(runtime.device).eval()
    generator = torch.Generator(runtime.device).manual_seed(options.seed)
    idx_BT = torch.tensor([idx_T] * options.samples, device=runtime.device)
    with runtime.autocast():
        out_BT = model.generate(
            idx_BT,
            options.tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            vocab_size=tokenizer.vocab_size,
            generator=generator,
        )
    for i, row in enumerate(out_BT.tolist()):
        print(f"{'-' * 8} {i + 1}\n" * (options.samples > 1) + tokenizer.decode(row))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ConfigError, DataError, RunError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
