"""Text from a run's newest checkpoint.

python sample.py runs/NAME --prompt "def f(" --tokens 300
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from data.tokenizer import get_tokenizer
from models import build_model_and_norm
from models.generation import generate
from optim.errors import Refusal
from training import checkpoint
from training import config as configuration
from training.config import Config
from training.errors import ConfigError, RunError
from training.run_folder import listing
from training.runtime import Runtime


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
    for name, least in (
        ("tokens", 1),
        ("samples", 1),
        ("temperature", 0),
        ("top_k", 1),
        ("seed", 0),
    ):
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(
                f"--{name.replace('_', '-')}",
                got=value,
                allowed=f"{least} or more",
                fix="another number",
            )
    if not options.run.is_dir():
        raise RunError(
            f"no run at {options.run}",
            got="no such folder",
            allowed=listing(options.run.parent),
            fix="python sample.py runs/NAME",
        )
    newest, damage = checkpoint.newest_whole(options.run / "checkpoints")
    for line in damage:
        print(f"left out: {line}", file=sys.stderr)
    if newest is None:
        raise RunError(
            options.run,
            got="no checkpoint",
            allowed="a run that has saved one",
            fix=f"python train_gpt.py {options.run}/config.toml --run.resume",
        )
    state = checkpoint.read_state(newest)
    config = configuration.from_dict(Config, state["config"])
    config.run.device = "auto"
    runtime = Runtime(config.run)
    tokenizer = get_tokenizer(**state["tokenizer"])
    idx_T = tokenizer.encode_prompt(options.prompt, option="--prompt")
    model, _ = build_model_and_norm(config)
    checkpoint.load_model(newest, model)
    model.to(runtime.device).eval()
    generator = torch.Generator(runtime.device).manual_seed(options.seed)
    idx_BT = torch.tensor([idx_T] * options.samples, device=runtime.device)
    with runtime.autocast():
        out_BT = generate(
            model,
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
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
