"""Train a GPT with the dualized optimizer, alone or under torchrun.

    python train_gpt.py configs/quickstart.toml [--section.key value]…      (--help lists every key)
    torchrun --standalone --nproc_per_node=2 train_gpt.py configs/quickstart.toml

Exit codes: 0 done; 2 refused before any work (the message says why); 1 stopped by numbers that were not finite, or by a last checkpoint that could not
be written; 143 and 130 ended by SIGTERM and SIGINT, with a checkpoint (--run.resume goes on); 124 another rank made no progress.
"""

import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.loader import Dataset, TrainBatches, check_validation, validation_batches
from data.shards import DataError
from model import GPT
from models import build
from optim import Dualized, NonFiniteError, metrize
from optim.baselines import BASELINES, set_beta
from optim.errors import Refusal, require
from optim.polar import Polar
from training import checkpoint
from training import config as configuration
from training.baseline import Baseline
from training.config import Config, ConfigError
from training.geometry import Geometry
from training.plots import plot_geometry, plot_losses
from training.resume import keep_choices, remember
from training.runtime import (
    Clock,
    RankError,
    RunError,
    RunFolder,
    Runtime,
    Stopwatch,
    bfloat16_is_emulated,
    git_state,
    hardware,
    telling,
)
from training.sharpness import Sharpness


class Stopped(Exception):
    """A signal ended the run at this step, with a checkpoint where there are any."""

    def __init__(self, number: int, step: int, folder: Path, *, saved: bool) -> None:
        end = (
            f"saved step {step} in {folder}; --run.name {folder.name} --run.resume goes on"
            if saved
            else f"ended at step {step}, not saved"
        )
        super().__init__(f"{signal.Signals(number).name}: {end}")
        self.code = 128 + number


@dataclass
class Progress:
    """What a checkpoint keeps beside tensors. val_*: the last evaluation, at step val_step. target: the first one at or under train.target_loss."""

    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    telemetry_seconds: float = 0.0
    compile_seconds: float = 0.0
    val_step: int = -1
    val_loss: float | None = None
    val_bpb: float | None = None
    target: dict[str, float] | None = None


def main(argv: list[str]) -> None:
    config = configuration.load(argv)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        config.run.resume = config.run.resume or "auto"
    remember(config)
    tokens, D = (
        config.train.batch_size
        // config.train.gradient_accumulation_steps
        * config.model.block_size,
        config.model.n_embd,
    )
    runtime = Runtime(config.run, product=(tokens, D, 4 * D))
    try:
        train(config, runtime)
        runtime.close()
    except (Refusal, Stopped, NonFiniteError, checkpoint.SaveError):  # alike on all ranks
        runtime.close()
        raise


def train(config: Config, runtime: Runtime) -> None:
    # ---- configuration and run folder; nothing is written before everything is known to fit
    # torchrun does not count a restart on every machine: one rank that was restarted speaks for all.
    resume, config.run.resume = (
        max(runtime.gather(config.run.resume), key=bool),
        False,
    )  # the written configuration starts a run
    config.run.name = runtime.on_main(lambda: config.run.name)  # which has the time in it
    path = Path(config.run.dir) / str(config.run.name)
    resume = runtime.on_main(path.is_dir) if resume == "auto" else bool(resume)
    folder = runtime.together(lambda: RunFolder(path, resume=resume, main=runtime.main))
    newest, damage = (
        runtime.on_main(lambda: checkpoint.newest_whole(folder.checkpoints))
        if resume
        else (None, [])
    )
    saved = runtime.together(lambda: checkpoint.read_state(newest) if newest else None)
    first = saved["step"] if saved else 0
    changes = runtime.together(lambda: keep_choices(config, folder.path, saved)) if resume else []
    if first > config.train.steps:
        raise ConfigError(
            "train.steps of a resumed run",
            got=config.train.steps,
            allowed=f"{first} or more, the steps taken",
            fix="--train.steps",
        )
    config.run.device, config.run.precision = runtime.device.type, runtime.precision  # type: ignore[assignment]
    c, o = config.train, config.optim
    parts = c.gradient_accumulation_steps
    if c.batch_size % (parts * runtime.size):
        raise ConfigError(
            "train.batch_size",
            got=c.batch_size,
            allowed=f"a multiple of {parts * runtime.size}, {runtime.size} ranks times train.gradient_accumulation_steps = {parts}",
            fix="--train.batch-size, --train.gradient-accumulation-steps, or other ranks",
        )
    if c.sharpness_every and (
        runtime.size > 1 or o.param_dtype == "bfloat16" or runtime.device.type == "mps"
    ):
        raise ConfigError(
            "train.sharpness_every",
            got=f"{c.sharpness_every} with {runtime.size} ranks on {runtime.device.type}, optim.param_dtype = {o.param_dtype!r}",
            allowed="one process on cpu or cuda, float32 or float64 weights",
            fix="0, or one process with --optim.param-dtype float32",
        )
    if config.run.compile and runtime.parallel != "ddp":
        raise ConfigError(
            "run.compile",
            got=f"true with run.parallel = {runtime.parallel!r}",
            allowed="with ddp",
            fix="leave one of them out",
        )

    # ---- data
    config.data.verify &= runtime.local_rank == 0  # once a machine
    dataset = runtime.together(lambda: Dataset(config.data))
    tokenizer, training, val = dataset.tokenizer, dataset.split("train"), dataset.split("val")
    config.model.vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            got=config.model.vocab_size,
            allowed=f"{tokenizer.vocab_size} or more, the {tokenizer.name} vocabulary of {config.data.dataset}",
            fix="leave it out",
        )
    shards = [s.sha256 for s in dataset.manifest.splits["train"].shards]
    if saved and saved["shards"] != shards:
        raise DataError(
            f"{config.data.dataset} of a resumed run",
            got="other training shards than the run was started with",
            allowed="the same text",
            fix="prepare it again as it was, or start a new run",
        )
    batches = TrainBatches(
        training, block_size=config.model.block_size, batch_size=c.batch_size, seed=config.run.seed
    )
    check_validation(val)
    prompt = tokenizer.encode_prompt(c.sample_prompt, option="train.sample_prompt")

    # ---- model, modular norm, optimizer
    if o.polar.dtype == "auto":
        low, why = runtime.precision == "bf16", "follows run.precision"
        if o.name == "muon_adamw":
            low = not runtime.on_main(lambda: bfloat16_is_emulated(runtime.device))
            why = (
                "Muon's iteration, as torch has it"
                if low
                else "Muon's iteration; in bfloat16, which torch takes, it is emulated here"
            )
        o.polar = Polar(o.polar.schedule, o.polar.form, "bfloat16" if low else "float32")
        runtime.choices.append(f"optim.polar.dtype = {o.polar.dtype} ({why})")
    model = build(
        config.model,
        o.norms.build(o.polar, config.model.n_head),
        torch.Generator().manual_seed(config.run.seed),
    )
    norm = metrize(model, model.structure(o.masses))
    if o.composition == "max":
        norm = norm.unweighted()
    model.to(runtime.device, getattr(torch, o.param_dtype))
    runtime.shard(model, model.blocks)
    settings, roles = o.step_settings(), o.roles.given()
    if o.name == "dualized":
        for role in roles:
            require(
                role in norm.roles.values(),
                f"optim.roles.{role}",
                got="a role that no weight of this model has",
                allowed=", ".join(dict.fromkeys(norm.roles.values())),
                fix="leave it out",
                error=ConfigError,
            )
        lr = o.auto if isinstance(o.lr, str) else o.lr
        optimizer = Dualized(model, lr, norm=norm, grads="local", roles=roles, **settings)
    else:
        own = vars(config.baseline)
        optimizer = Baseline(
            BASELINES[o.name](model, norm, lr=o.lr, polar=o.polar, **settings, **own),
            max_grad_norm=o.max_grad_norm,
            scaling=own["scaling"] if "scaling" in BASELINES[o.name].own else "modular",
        )
    if newest and saved:
        runtime.together(lambda: checkpoint.load_model(newest, model))
        runtime.together(lambda: checkpoint.load_optimizer(newest, saved, optimizer))
        if isinstance(optimizer, Dualized):
            for group in optimizer.param_groups:  # the configuration's, which may have changed
                group.update(settings | roles.get(group.get("role"), {}))
    progress = Progress(**saved["progress"]) if saved else Progress()
    forward = model
    if config.run.compile:
        forward, compile_seconds = runtime.together(
            lambda: compile_ahead(model, runtime, c.batch_size // parts // runtime.size)
        )
        progress.compile_seconds += compile_seconds

    # ---- the run folder
    runtime.together(folder.create)
    say = folder.say
    normed = o.name == "dualized" or BASELINES[o.name].normed
    texts = {
        "config.toml": configuration.to_toml(config),
        "receipt.txt": optimizer.receipt()
        if isinstance(optimizer, Baseline) and not normed
        else norm.receipt(),
    }
    if normed and norm.tree:  # the plain maximum over tensors has none
        texts |= {
            "receipt.txt": f"{norm.receipt()}\n{norm.tree}\n",
            "modular_norm.svg": norm.tree.svg(),
        }
    for name, text in texts.items():
        folder.write(f"resumed_{first:08d}_{name}" if newest else name, text)
    for line in damage:
        say(f"left out: {line}")
    if resume:
        # Metrics that the checkpoint does not know are dropped: the run makes them again.
        folder.keep_metrics(
            lambda r: (
                saved is not None and r["step"] <= (progress.val_step if "val_loss" in r else first)
            )
        )
        say(
            f"resumed from {newest} at step {first}"
            if newest
            else "no checkpoint yet: from the start"
        )
    for line in (*changes, *(f"chosen: {choice}" for choice in runtime.choices)):
        say(line)
    tokens_per_step, train_tokens = (
        c.batch_size * config.model.block_size,
        dataset.manifest.splits["train"].tokens,
    )
    epochs = c.steps * tokens_per_step / train_tokens
    say(
        f"{folder.path}: {model.num_params():,} parameters, {len(norm.norms)} {'dualized tensors' if o.name == 'dualized' else f'tensors, {o.name}'} (receipt.txt)"
    )
    say(f"{runtime.device_name()}, {runtime.precision}, torch {torch.__version__}")
    say(
        f"{config.data.dataset}: {train_tokens:,} tokens; {c.steps} steps of {tokens_per_step:,}, {epochs:.2f} epochs"
    )

    def evaluate(done: int) -> None:
        loss, bpb = validation(model, runtime, dataset, config, done, say)
        if not math.isfinite(loss):
            raise NonFiniteError(f"the validation loss after step {done} is {loss}")
        point = {"step": done, "tokens": done * tokens_per_step, "train_seconds": clock.seconds()}
        progress.val_step, progress.val_loss, progress.val_bpb = done, loss, bpb
        if progress.target is None and c.target_loss is not None and loss <= c.target_loss:
            progress.target = {"loss": loss, **point}
        folder.log_metrics({**point, "val_loss": loss, "val_bpb": bpb})
        say(
            f"step {done:6d}  validation {loss:.4f} nats per token, {bpb:.4f} bits per byte  {clock.seconds():.1f} s"
        )

    def save(done: int) -> None:
        progress.train_seconds, progress.optimizer_seconds = (
            clock.seconds(),
            optimizer_watch.seconds(),
        )
        progress.wall_seconds, progress.telemetry_seconds = (
            time.perf_counter() - wall_start,
            telemetry_watch.seconds(),
        )
        if not c.keep_checkpoints:
            return
        state = {
            "config": asdict(config),
            "progress": asdict(progress),
            "shards": shards,
            "tokenizer": {"name": tokenizer.name, "characters": tokenizer.characters},
        }
        settle()
        saver.save(done, model, optimizer, state, texts)

    def settle() -> None:
        """Wait for the checkpoint under way. Training goes on without it where it could not be written."""
        try:
            saver.wait()
        except checkpoint.SaveError as error:
            say(f"error: {error}")

    def check_finite(step: int) -> None:
        """What is known by now of the last step, if it was not finite."""
        nonlocal bad
        try:
            optimizer.check_finite()
        except NonFiniteError as error:
            bad = [*bad, step] if bad[-1:] == [step - 1] else [step]
            count = f"{len(bad)} in a row" if len(bad) > 1 else "the first"
            say(
                f"step {step} was left out, {count} of train.max_nonfinite = {c.max_nonfinite}: {error}"
            )
            if len(bad) >= c.max_nonfinite:
                settle()
                raise NonFiniteError(f"step {step}: {error}") from error

    # ---- the loop
    wall_start = time.perf_counter() - progress.wall_seconds
    clock, optimizer_watch = (
        Clock(runtime, progress.train_seconds),
        Stopwatch(runtime, progress.optimizer_seconds),
    )
    geometry, telemetry_watch = (
        Geometry(model, optimizer, norm),
        Stopwatch(runtime, progress.telemetry_seconds),
    )
    sharpness: Sharpness | None = None
    if c.sharpness_every:
        # One batch for all runs of a study, whatever their seeds, in an order that no run has.
        fixed = TrainBatches(
            training,
            block_size=config.model.block_size,
            batch_size=c.sharpness_sequences,
            seed=2**63,
        ).batch(0)
        sharpness = Sharpness(
            model, optimizer, norm, runtime.to_device(*fixed), modular=c.sharpness_modular
        )
    saver = checkpoint.Saver(
        folder.checkpoints,
        keep=c.keep_checkpoints,
        group=runtime.group(),
        waiting=lambda: runtime.beat(c.steps, "checkpoint"),
    )
    bad: list[int] = []
    schedule, groups = config.schedule, optimizer.param_groups
    betas = [roles.get(group.get("role"), {}).get("beta", o.beta) for group in groups]
    if c.eval_every and first == 0 and progress.val_step < 0:
        evaluate(0)
    bar = tqdm(
        total=c.steps,
        initial=first,
        disable=None if runtime.main else True,
        unit="step",
        dynamic_ncols=True,
    )
    with runtime.catching_signals():
        clock.start()
        started = time.perf_counter()
        for step in range(first, c.steps):
            done = step + 1
            last = done == c.steps
            measured = bool(c.telemetry_every) and (done % c.telemetry_every == 0 or done == 1)
            curved = sharpness is not None and (done % c.sharpness_every == 0 or done == 1)
            lr = optimizer.defaults["lr"] * schedule.lr_at(step, c.steps)
            for group, beta in zip(groups, betas, strict=True):
                group["lr"] = lr
                set_beta(group, schedule.beta_at(step, c.steps, beta=beta))
            losses: list[Tensor] = []
            for part in range(parts):
                runtime.beat(done, "forward and backward")
                slot = (
                    part * runtime.size + runtime.rank
                )  # of the global batch, which does not depend on ranks
                runtime.seed(config.run.seed, step, slot)
                x_BT, y_BT = runtime.to_device(
                    *batches.batch(step, part=slot, parts=parts * runtime.size)
                )
                with runtime.autocast():
                    part_loss = forward(x_BT, y_BT)[1] / parts
                with optimizer.last_backward() if part == parts - 1 else nullcontext():
                    part_loss.backward()
                losses.append(part_loss.detach())
            loss = torch.stack(losses).sum()
            looks = measured and (runtime.main or runtime.parallel != "ddp")
            if measured:
                with clock.paused(), telemetry_watch:
                    if looks:
                        geometry.before()
            runtime.beat(done, "optimizer")
            check_finite(step)
            with optimizer_watch:
                optimizer.step(loss=loss)
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            signal = runtime.stop_wanted()
            if last or measured or curved or (c.log_every and done % c.log_every == 0):
                with clock.paused():
                    record: dict[str, Any] = {
                        "step": done,
                        "tokens": done * tokens_per_step,
                        "train_seconds": clock.seconds(),
                    }
                    record |= {
                        "loss": runtime.total(loss.item())[0] / runtime.size,
                        "lr": lr * (optimizer.step_size or 1.0),
                    }
                    record["optimizer_ms"] = 1e3 * optimizer_watch.latest()
                    if looks:
                        with telemetry_watch:
                            record["geometry"] = geometry.after(x_BT[:2])
                    if sharpness and curved:
                        runtime.beat(done, "sharpness")
                        record["sharpness"] = sharpness.measure()
                    folder.log_metrics(record)
                    pace = f"{record['tokens'] / clock.seconds():,.0f}"
                    bar.set_postfix(loss=f"{record['loss']:.3f}", tok_s=pace)
                    if bar.disable:  # no terminal
                        left = (time.perf_counter() - started) / (done - first) * (c.steps - done)
                        say(
                            f"step {done:6d} of {c.steps}  loss {record['loss']:.4f}  lr {record['lr']:.3g}  {pace} tokens/s  {left:.0f} s left"
                        )
            if c.eval_every and done % c.eval_every == 0:
                with clock.paused():
                    evaluate(done)
            if last or signal or (c.checkpoint_every and done % c.checkpoint_every == 0):
                with clock.paused():
                    runtime.beat(done, "checkpoint")
                    check_finite(done)
                    save(done)
            if signal and not last:
                saver.wait()
                stopped = Stopped(signal, done, folder.path, saved=c.keep_checkpoints > 0)
                say(str(stopped))
                raise stopped
        clock.stop()
    bar.close()
    saver.wait()
    if progress.val_step < c.steps:
        evaluate(c.steps)

    runtime.at_ease()

    # ---- what is left of it: summary.json, loss.png, a sample
    seconds, peak = progress.train_seconds, runtime.peak_flops()
    speed = c.steps * tokens_per_step / seconds
    commit, dirty = git_state()
    held = sum(piece.tensor.nbytes for piece in optimizer.held().values())
    most = [
        max(column)
        for column in zip(*runtime.gather((runtime.peak_memory_bytes() or 0, held)), strict=True)
    ]
    summary = {
        "params": model.num_params(),
        "tokens": c.steps * tokens_per_step,
        "steps": c.steps,
        "val_loss": progress.val_loss,
        "val_bpb": progress.val_bpb,
        "train_seconds": seconds,
        "compile_seconds": progress.compile_seconds,
        "wall_seconds": time.perf_counter() - wall_start,
        "optimizer_seconds": progress.optimizer_seconds,
        "telemetry_seconds": progress.telemetry_seconds,
        "tokens_per_second": speed,
        "mfu": model.flops_per_token() * speed / (peak * runtime.size) if peak else None,
        "peak_memory_bytes": most[0] or None,
        "optimizer_state_bytes": most[1],
        "target": progress.target,
        "seed": config.run.seed,
        "world_size": runtime.size,
        "device": runtime.device_name(),
        "hardware": hardware(runtime.device_name()),
        "torch": torch.__version__,
        "commit": commit,
        "dirty": dirty,
    }
    folder.write_json("summary.json", summary)
    # Compressors were given the whole split: they are beside a score of all of it, or not at all.
    split = dataset.manifest.splits["val"]
    packed = (
        split.compressors() if c.eval_tokens is None or c.eval_tokens >= split.tokens - 1 else {}
    )
    if runtime.main and c.pictures:
        plot_losses(folder, packed, bytes_per_token=(split.bytes or 0) / split.tokens)
        plot_geometry(folder.metrics(), folder.path / "geometry.png", band=o.polar.band)
    if c.sample_tokens and (runtime.main or runtime.parallel != "ddp"):
        model.eval()
        generator = torch.Generator(runtime.device).manual_seed(config.run.seed)
        idx_BT = torch.tensor([prompt], device=runtime.device)
        out_BT = model.generate(
            idx_BT,
            c.sample_tokens,
            temperature=0.8,
            vocab_size=tokenizer.vocab_size,
            generator=generator,
        )
        say(f"sample:\n{tokenizer.decode(out_BT[0].tolist())}\n")
    others = ", ".join(f"{name} {bits:.4f}" for name, bits in packed.items())
    say(
        f"validation: {progress.val_bpb:.4f} bits per byte"
        + f" ({others} of the same bytes)" * bool(others)
    )
    if optimizer.step_size is not None:
        say(
            f"lr found: {optimizer.step_size:.4g} (started at {o.auto.initial:g}), times the schedule"
        )
    say(
        f"{summary['tokens']:,} tokens in {seconds:.1f} s of training ({speed:,.0f} tokens/s), {summary['wall_seconds']:.1f} s in all"
    )
    python = (
        os.path.relpath(sys.executable)
        if Path(sys.executable).is_relative_to(Path.cwd())
        else "python"
    )
    picture = f"picture: {folder.path / 'loss.png'}   " if c.pictures else ""
    say(f"{picture}more text: {python} sample.py {folder.path} --prompt …")


@torch.no_grad()
def validation(
    model: GPT,
    runtime: Runtime,
    dataset: Dataset,
    config: Config,
    step: int,
    say: Callable[[str], None],
) -> tuple[float, float]:
    """(nats per token, bits per byte) over the whole validation split, or its first train.eval_tokens targets. Each rank has its share of the batches."""
    model.eval()
    lengths = torch.from_numpy(dataset.tokenizer.byte_lengths())
    nats, tokens, size = 0.0, 0, 0
    c = config.train
    stream = validation_batches(
        dataset.split("val"),
        block_size=config.model.block_size,
        batch_size=c.eval_batch_size,
        tokens=c.eval_tokens,
    )
    if runtime.main:
        whole = sum(map(len, dataset.split("val"))) - 1
        stream = telling(stream, total=min(c.eval_tokens or whole, whole), say=say)
    for x_BT, y_BT in shares(stream, runtime.rank, runtime.size):
        runtime.beat(step, "evaluation")
        targets = y_BT[y_BT >= 0]
        tokens, size = tokens + targets.numel(), size + int(lengths[targets].sum())
        x_BT, y_BT = runtime.to_device(x_BT, y_BT)
        with runtime.autocast():
            loss = model(x_BT, y_BT, reduction="sum")[1]
        nats += loss.item()  # type: ignore[union-attr]
    model.train()
    nats, tokens, size = runtime.total(nats, tokens, size)
    return nats / tokens, nats / math.log(2) / max(1, size)


def shares(
    stream: Iterable[tuple[Tensor, Tensor]], rank: int, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every size-th batch. All ranks get as many, as sharded models need: at the end, some get one whose targets do not count."""
    for i, (x_BT, y_BT) in enumerate(stream):
        if i % size == rank:
            yield x_BT, y_BT
        last = i, x_BT, y_BT
    i, x_BT, y_BT = last
    if i % size < rank:
        yield x_BT, torch.full_like(y_BT, -1)


def compile_ahead(model: GPT, runtime: Runtime, batch: int) -> tuple[Any, float]:
    """(the compiled model, seconds): compiled on zeros before any clock starts. Leaves weights, gradients and generators as they were."""
    from torch._dynamo.exc import BackendCompilerFailed

    print("compiling …", flush=True)
    start = time.perf_counter()
    model.train()
    forward = torch.compile(model)
    zeros_BT = torch.zeros(batch, model.config.block_size, dtype=torch.int64, device=runtime.device)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), runtime.autocast():
            forward(zeros_BT, zeros_BT.clone())[
                1
            ].backward()  # one tensor twice would be compiled for, and again in step 1
    except BackendCompilerFailed as error:
        cause = error.inner_exception
        raise RunError(
            "run.compile",
            got=f"{type(cause).__name__}: {str(cause).splitlines()[0]}",
            allowed=f"where a C++ compiler is, and torch in a path without spaces (here: {Path(torch.__file__).parent})",
            fix="leave it out, or install there",
        ) from error
    model.zero_grad(set_to_none=True)
    runtime.synchronize()
    return forward, time.perf_counter() - start


def report(error: object) -> None:
    """Once: refusals and ends are alike on all ranks, but for those before ranks know of each other. A signal's end is in the log."""
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
        # Not all ranks are here: leave at once, as a thread that writes a checkpoint, or a backend, may wait for the others for ever.
        traceback.print_exc()
        print(
            f"error: rank {os.environ['RANK']} failed, perhaps as another one left: see the outputs of all ranks",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
    if "RANK" in os.environ:
        # An all-to-all that gloo's thread frees while the interpreter ends would abort a process that is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
