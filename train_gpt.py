"""Train a GPT with the dualized optimizer, alone or under torchrun.

    python train_gpt.py configs/quickstart.toml [--section.key value]…      (--help lists every key)
    torchrun --standalone --nproc_per_node=2 train_gpt.py configs/quickstart.toml

`train` makes the parts of a run, then loops over its steps. Below it stand the parts in the order
in which they are made, then `Run`: what is done once in a while, and at the end.

Exit codes: 0 done; 2 refused before any work, and the message says why; 1 stopped by numbers that
were not finite, or by a last checkpoint that could not be written; 143 and 130 ended by SIGTERM
and SIGINT, with a checkpoint (--run.resume goes on); 124 another rank made no progress.

B batch, T positions.
"""

import os
import sys
import time
import traceback
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from data.loader import Dataset, TrainBatches, check_validation
from data.shards import DataError
from model import GPT
from models import build_model_and_norm
from optim import Dualized, ModularNorm, NonFiniteError
from optim.baselines import set_beta, takes_polar
from optim.errors import Refusal, require
from optim.polar import Polar
from training import checkpoint
from training import config as configuration
from training.baseline import Baseline, build_baseline
from training.config import Config
from training.errors import ConfigError, RankError, Stopped
from training.resume import Progress, Start, open_run, remember
from training.run import Data, Run
from training.runtime import Runtime, bfloat16_is_emulated


def main(argv: list[str]) -> None:
    """Train as the command line says."""
    config = configuration.load(argv)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        config.run.resume = config.run.resume or "auto"
    remember(config)
    sequences = config.train.batch_size // config.train.gradient_accumulation_steps
    tokens, D = sequences * config.model.block_size, config.model.n_embd
    runtime = Runtime(config.run, product=(tokens, D, 4 * D))
    try:
        train(config, runtime)
        runtime.close()
    except (Refusal, Stopped, NonFiniteError, checkpoint.SaveError):  # alike on all ranks
        runtime.close()
        raise


def train(config: Config, runtime: Runtime) -> None:
    """Make the parts of a run, loop over its steps, and finish it."""
    start = open_run(config, runtime)  # its folder, and of a resumed run the checkpoint
    with start.folder:  # which no other process writes into
        data = build_data(config, runtime, start)
        model, norm, optimizer = build_model(config, runtime)
        progress = restore(config, runtime, start, model, optimizer)
        forward = compile_model(config, runtime, model, progress)
        run = Run(config, runtime, start, data, model, norm, optimizer, progress)

        c, parts = config.train, config.train.gradient_accumulation_steps
        if c.eval_every and start.step == 0:
            run.evaluate(0)
        with runtime.catching_signals(), run:
            for step in range(start.step, c.steps):
                done = step + 1
                lr = set_lr_and_beta(config, optimizer, step)

                # Each rank has its share of the batch, in parts; optimizer.step() averages over
                # ranks (optim/placement.py). The batch is the same for any number of either.
                losses: list[Tensor] = []
                for part in range(parts):
                    runtime.beat(done, "forward and backward")
                    slot = part * runtime.size + runtime.rank
                    runtime.seed(config.run.seed, step, slot)
                    batch = data.batches.batch(step, part=slot, parts=parts * runtime.size)
                    x_BT, y_BT = runtime.to_device(*batch)
                    with runtime.autocast():
                        part_loss = forward(x_BT, y_BT)[1] / parts
                    with optimizer.last_backward() if part == parts - 1 else nullcontext():
                        part_loss.backward()
                    losses.append(part_loss.detach())
                loss = torch.stack(losses).sum()

                # Once in a while: keep the weights before they move.
                measured = due(c.telemetry_every, done, first=True)
                if measured:
                    run.keep_weights()

                runtime.beat(done, "optimizer")
                run.check_finite(step)  # of the step before: the device tells one step late
                with run.optimizer_watch:
                    optimizer.step(loss=loss)
                optimizer.zero_grad(set_to_none=True)
                run.bar.update()
                ended_by = runtime.stop_wanted()

                # Once in a while: log and measure, evaluate, save.
                last = done == c.steps
                curved = due(c.sharpness_every, done, first=True)
                if last or measured or curved or due(c.log_every, done):
                    run.log(done, loss, lr, x_BT if measured else None, curved=curved)
                if due(c.eval_every, done):
                    run.evaluate(done)
                if last or ended_by or due(c.checkpoint_every, done):
                    run.save(done)
                if ended_by and not last:
                    run.stop(done, ended_by)
        run.finish()


def set_lr_and_beta(config: Config, optimizer: Dualized | Baseline, step: int) -> float:
    """Set the learning rate and the momentum of every group for a step, and return the former."""
    steps, roles = config.train.steps, config.optim.roles.given()
    lr = optimizer.defaults["lr"] * config.schedule.lr_at(step, steps)
    for group in optimizer.param_groups:
        beta = roles.get(group.get("role"), {}).get("beta", config.optim.beta)
        group["lr"] = lr
        set_beta(group, config.schedule.beta_at(step, steps, beta=beta))
    return lr


def due(every: int, done: int, *, first: bool = False) -> bool:
    """Return whether to do after `done` steps what is done every so many, and never for 0.

    first: after the first step too.
    """
    return every > 0 and (done % every == 0 or (first and done == 1))


# ---- the parts of a run


def build_data(config: Config, runtime: Runtime, start: Start) -> Data:
    """Open the dataset and fit the vocabulary of the model to it.

    Raises DataError where a resumed run had other text, ConfigError for too small a vocabulary.
    """
    config.data.verify &= runtime.local_rank == 0  # once a machine
    dataset = runtime.together(lambda: Dataset(config.data))
    tokenizer, name = dataset.tokenizer, config.data.dataset
    config.model.vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            got=config.model.vocab_size,
            allowed=f"{tokenizer.vocab_size} or more, the {tokenizer.name} vocabulary of {name}",
            fix="leave it out",
        )
    shards = [s.sha256 for s in dataset.manifest.splits["train"].shards]
    if start.saved and start.saved["shards"] != shards:
        raise DataError(
            f"{name} of a resumed run",
            got="other training shards than the run was started with",
            allowed="the same text",
            fix="prepare it again as it was, or start a new run",
        )
    batches = TrainBatches(
        dataset.split("train"),
        block_size=config.model.block_size,
        batch_size=config.train.batch_size,
        seed=config.run.seed,
    )
    check_validation(dataset.split("val"))
    prompt = tokenizer.encode_prompt(config.train.sample_prompt, option="train.sample_prompt")
    return Data(dataset, batches, prompt, shards)


def build_model(config: Config, runtime: Runtime) -> tuple[GPT, ModularNorm, Dualized | Baseline]:
    """Return the model on the device, sharded where it is to be, its norm and its optimizer."""
    o = config.optim
    if o.polar.dtype == "auto":
        choose_polar_dtype(config, runtime)
    model, norm = build_model_and_norm(config, torch.Generator().manual_seed(config.run.seed))
    model.to(runtime.device, getattr(torch, o.param_dtype))
    runtime.shard(model, model.blocks)
    settings, roles = o.step_settings(), o.roles.given()
    if o.name == "dualized":
        of_model = list(dict.fromkeys(norm.roles.values()))
        for role in roles:
            require(
                role in of_model,
                f"optim.roles.{role}",
                got="a role that no weight of this model has",
                allowed=", ".join(of_model),
                fix="leave it out",
                error=ConfigError,
            )
        lr = o.auto if isinstance(o.lr, str) else o.lr
        return model, norm, Dualized(model, lr, norm=norm, grads="local", roles=roles, **settings)
    return model, norm, build_baseline(config, model, norm)


def choose_polar_dtype(config: Config, runtime: Runtime) -> None:
    """Set optim.polar.dtype where it is "auto": the run's precision, for Muon torch's bfloat16."""
    low, why = runtime.precision == "bf16", "follows run.precision"
    if takes_polar(config.optim.name):
        low = not runtime.on_main(lambda: bfloat16_is_emulated(runtime.device))
        why = "Muon's iteration, as torch has it"
        if not low:
            why = "Muon's iteration; in bfloat16, which torch takes, it is emulated here"
    dtype, polar = "bfloat16" if low else "float32", config.optim.polar
    config.optim.polar = Polar(polar.schedule, polar.form, dtype)
    runtime.choices.append(f"optim.polar.dtype = {dtype} ({why})")


def restore(
    config: Config, runtime: Runtime, start: Start, model: GPT, optimizer: Dualized | Baseline
) -> Progress:
    """Load the checkpoint of a resumed run, and return how far it was."""
    newest, saved = start.checkpoint, start.saved
    if newest is None or saved is None:
        return Progress()
    runtime.together(lambda: checkpoint.load_model(newest, model))
    runtime.together(lambda: checkpoint.load_optimizer(newest, saved, optimizer))
    if isinstance(optimizer, Dualized):
        settings, roles = config.optim.step_settings(), config.optim.roles.given()
        for group in optimizer.param_groups:  # the configuration's, which may have changed
            group.update(settings | roles.get(group.get("role"), {}))
    return Progress(**saved["progress"])


def compile_model(config: Config, runtime: Runtime, model: GPT, progress: Progress) -> Any:
    """Return what computes the loss: the model, compiled on zeros where run.compile asks for it."""
    if not config.run.compile:
        return model
    print("compiling …", flush=True)
    began = time.perf_counter()
    parts = config.train.gradient_accumulation_steps * runtime.size
    shape = config.train.batch_size // parts, config.model.block_size
    zeros_BT = torch.zeros(shape, dtype=torch.int64, device=runtime.device)
    # One tensor twice would be compiled for, and again in step 1.
    example = zeros_BT, zeros_BT.clone()
    compiled = runtime.together(lambda: runtime.compile(model.train(), example))
    progress.compile_seconds += time.perf_counter() - began
    return compiled


def report(error: object) -> None:
    """Print an error once.

    Refusals and ends are alike on all ranks, but for those before ranks know of each other. A
    signal's end is in the log.
    """
    if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
        print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    code = 0
    try:
        main(sys.argv[1:])
    except (NonFiniteError, checkpoint.SaveError) as error:
        code = 1
        report(error)
    except Refusal as error:
        code = 2
        report(error)
    except Stopped as stopped:
        code = stopped.code
    except KeyboardInterrupt:
        report("interrupted at once; what was saved before stays")
        os._exit(130)  # without waiting for ranks, or for a checkpoint that is being written
    except Exception:
        if "RANK" not in os.environ:
            raise
        # Not all ranks are here. Leave at once: a thread that writes a checkpoint, or a backend,
        # may wait for the others for ever.
        traceback.print_exc()
        print(
            f"error: rank {os.environ['RANK']} failed, perhaps as another one left: see the"
            " outputs of all ranks",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
    if "RANK" in os.environ:
        # An all-to-all that gloo's thread frees while the interpreter ends would abort a process
        # that is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
