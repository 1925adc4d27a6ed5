"""Train a GPT with the dualized optimizer.

    python train_gpt.py configs/quickstart.toml [--section.key value]…      (--help lists every key)

Exit codes: 0 done, 2 refused before any work (the message says why), 1 stopped by a gradient that was not finite.
"""

import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import config as configuration
from config import Config, ConfigError
from data.loader import Dataset, TrainBatches, validation_batches
from data.shards import DataError
from model import GPT
from optim import CoverageError, Dualized, NonFiniteError, Polar, metrize
from optim.step_size import SCHEDULES
from runtime import Clock, RunError, RunFolder, Runtime, Stopwatch, git_state
from telemetry import StepSizes

REFUSALS = (ConfigError, DataError, RunError, CoverageError, checkpoint.CheckpointError)


def main(argv: list[str]) -> None:
    # ---- configuration and runtime; nothing is written before everything is known to fit
    config = configuration.load(argv)
    folder = RunFolder(Path(config.run.dir) / str(config.run.name), resume=config.run.resume)
    newest = checkpoint.latest(folder.checkpoints) if config.run.resume else None
    saved = checkpoint.read_state(newest) if newest else None
    if newest and saved:
        keep_choices(config, saved["config"], newest)
    runtime = Runtime(config.run)
    config.run.device, config.run.precision = runtime.device.type, runtime.precision  # type: ignore[assignment]
    c = config.train

    # ---- data
    dataset = Dataset(config.data)
    vocab = dataset.tokenizer.vocab_size
    config.model.vocab_size = config.model.vocab_size or vocab
    if config.model.vocab_size < vocab:
        raise ConfigError(
            f"model.vocab_size\n  got: {config.model.vocab_size}\n  allowed: {vocab} or more, the {dataset.tokenizer.name} vocabulary"
            f" of {config.data.dataset}\n  fix: leave it out"
        )
    shards = [s.sha256 for s in dataset.manifest.splits["train"].shards]
    if saved and saved["shards"] != shards:
        raise DataError(
            f"{config.data.dataset} of a resumed run\n  got: other training shards than the run was started with\n  allowed: the same text\n  fix: prepare it again as it was, or start a new run"
        )
    batches = TrainBatches(dataset.split("train"), block_size=config.model.block_size, batch_size=c.batch_size, seed=config.run.seed)
    prompt = dataset.tokenizer.encode(c.sample_prompt).tolist()

    # ---- model, modular norm, optimizer
    polar = config.optim.polar
    if polar.dtype == "auto":
        config.optim.polar = polar = Polar(polar.schedule, polar.form, "bfloat16" if runtime.precision == "bf16" else "float32")
        runtime.choices.append(f"optim.polar.dtype = {polar.dtype} (follows run.precision)")
    model = GPT(config.model, config.optim.norms.build(polar), torch.Generator().manual_seed(config.run.seed))
    norm = metrize(model, model.structure(config.optim.masses))
    if newest:
        checkpoint.load_model(newest, model)
    model.to(runtime.device)
    o = config.optim
    optimizer = Dualized(
        model, o.lr, norm=norm, direction=o.direction, beta=o.beta, weight_decay=o.weight_decay, max_grad_norm=o.max_grad_norm
    )
    lr_at = SCHEDULES[o.schedule]

    # ---- where the run stands
    first, progress = (
        0,
        {"train_seconds": 0.0, "wall_seconds": 0.0, "optimizer_seconds": 0.0, "compile_seconds": 0.0, "val_loss": None, "target": None},
    )
    if newest and saved:
        checkpoint.load_training(newest, saved, optimizer)
        first, progress = saved["step"], saved["progress"]
    folder.create()
    say = folder.say
    texts = {"config.toml": configuration.to_toml(config), "receipt.txt": norm.receipt()}
    for name, text in texts.items():
        folder.write(f"resumed_{first:08d}_{name}" if newest else name, text)
    if config.run.resume:
        folder.forget_after(first)
        say(f"resumed from {newest} at step {first}" if newest else "no checkpoint yet: from the start")
    for choice in runtime.choices:
        say(f"chosen: {choice}")
    tokens_per_step, train_tokens = c.batch_size * config.model.block_size, dataset.manifest.splits["train"].tokens
    say(
        f"{folder.path}: {model.num_params():,} parameters, {len(norm.norms)} dualized tensors (receipt.txt), {runtime.device_name()}, {runtime.precision}, torch {torch.__version__}"
    )
    say(
        f"{config.data.dataset}: {train_tokens:,} tokens; {c.steps} steps of {tokens_per_step:,}, {c.steps * tokens_per_step / train_tokens:.2f} epochs"
    )

    def evaluate(done: int) -> None:
        loss = validation_loss(model, runtime, dataset, config)
        bytes_per_token = dataset.bytes_per_token("val")
        bpb = loss / math.log(2) / bytes_per_token if bytes_per_token else None
        point = {"loss": loss, "step": done, "tokens": done * tokens_per_step, "train_seconds": clock.seconds()}
        progress.update(val_loss=loss, val_bpb=bpb)
        if progress["target"] is None and c.target_loss is not None and loss <= c.target_loss:
            progress["target"] = point
        folder.log_metrics({k: v for k, v in point.items() if k != "loss"} | {"val_loss": loss, "val_bpb": bpb})
        say(
            f"step {done:6d}  validation {loss:.4f} nats per token"
            + (f", {bpb:.4f} bits per byte" if bpb else "")
            + f"  {clock.seconds():.1f} s"
        )

    def save(done: int) -> None:
        optimizer.check_finite()
        progress.update(
            train_seconds=clock.seconds(), optimizer_seconds=optimizer_watch.seconds(), wall_seconds=time.perf_counter() - wall_start
        )
        state = {"config": asdict(config), "progress": progress, "shards": shards}
        checkpoint.save(folder.checkpoints, done, model, optimizer, state, texts, keep=c.keep_checkpoints)

    # ---- the loop
    wall_start = time.perf_counter() - progress["wall_seconds"]
    forward, parts = torch.compile(model) if config.run.compile else model, c.gradient_accumulation_steps
    if config.run.compile:
        progress["compile_seconds"] += compile_ahead(forward, model, runtime, c.batch_size // parts)
    clock, optimizer_watch = Clock(runtime, progress["train_seconds"]), Stopwatch(runtime, progress["optimizer_seconds"])
    sizes = StepSizes(model, optimizer)
    if first == 0 and c.eval_every:
        evaluate(0)
    bar = tqdm(total=c.steps, initial=first, disable=None, unit="step", dynamic_ncols=True)
    clock.start()
    for step in range(first, c.steps):
        done = step + 1
        last = done == c.steps
        measured = bool(c.telemetry_every) and (done % c.telemetry_every == 0 or done == 1)
        lr = o.lr * lr_at(step, c.steps, warmup=o.warmup, cooldown=o.cooldown)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=runtime.device)
        for part in range(parts):
            x_BT, y_BT = runtime.to_device(*batches.batch(step, part=part, parts=parts))
            with runtime.autocast():
                part_loss = forward(x_BT, y_BT)[1] / parts
            part_loss.backward()
            loss += part_loss.detach()
        if measured:
            sizes.before()
        with optimizer_watch:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.update()
        if last or measured or (c.log_every and done % c.log_every == 0):
            with clock.paused():
                record = {"step": done, "tokens": done * tokens_per_step, "train_seconds": clock.seconds(), "loss": loss.item(), "lr": lr}
                record["optimizer_ms"] = 1e3 * optimizer_watch.latest()
                if measured:
                    record["step_sizes"] = sizes.after()
                folder.log_metrics(record)
                bar.set_postfix(loss=f"{record['loss']:.3f}", tok_s=f"{record['tokens'] / clock.seconds():,.0f}")
        if last or (c.eval_every and done % c.eval_every == 0):
            with clock.paused():
                evaluate(done)
        if last or (c.checkpoint_every and done % c.checkpoint_every == 0):
            with clock.paused():
                save(done)
    bar.close()

    # ---- what is left of it: summary.json, loss.png, a sample
    train_seconds, speed, peak = progress["train_seconds"], c.steps * tokens_per_step / progress["train_seconds"], runtime.peak_flops()
    commit, dirty = git_state()
    summary = {
        "params": model.num_params(),
        "tokens": c.steps * tokens_per_step,
        "steps": c.steps,
        **{k: progress[k] for k in ("val_loss", "val_bpb", "train_seconds", "compile_seconds")},
        "wall_seconds": time.perf_counter() - wall_start,
        "optimizer_seconds": progress["optimizer_seconds"],
        "tokens_per_second": speed,
        "mfu": model.flops_per_token() * speed / peak if peak else None,
        "peak_memory_bytes": runtime.peak_memory_bytes(),
        "optimizer_state_bytes": sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)),
        "target": progress["target"],
        "seed": config.run.seed,
        "world_size": 1,
        "device": runtime.device_name(),
        "torch": torch.__version__,
        "commit": commit,
        "dirty": dirty,
    }
    folder.write_json("summary.json", summary)
    plot_losses(folder)
    if c.sample_tokens:
        model.eval()
        generator = torch.Generator(runtime.device).manual_seed(config.run.seed)
        out_BT = model.generate(
            torch.tensor([prompt], device=runtime.device), c.sample_tokens, temperature=0.8, vocab_size=vocab, generator=generator
        )
        say(f"sample:\n{dataset.tokenizer.decode(out_BT[0].tolist())}\n")
    if summary["val_bpb"] is not None:
        val = dataset.manifest.splits["val"]
        gzipped = f"; gzip -9 of the validation bytes: {8 * val.gzip9_bytes / val.bytes:.4f}" if val.gzip9_bytes and val.bytes else ""
        say(f"validation: {summary['val_bpb']:.4f} bits per byte{gzipped}")
    say(
        f"{summary['tokens']:,} tokens in {train_seconds:.1f} s of training ({speed:,.0f} tokens/s), {summary['wall_seconds']:.1f} s in all"
    )
    say(f"picture: {folder.path / 'loss.png'}   more text: python sample.py {folder.path} --prompt …")


@torch.no_grad()
def validation_loss(model: GPT, runtime: Runtime, dataset: Dataset, config: Config) -> float:
    """Nats per token over the whole validation split, or its first train.eval_tokens targets."""
    model.eval()
    total, count = 0.0, 0
    val, c = dataset.split("val"), config.train
    for x_BT, y_BT in validation_batches(val, block_size=config.model.block_size, batch_size=c.eval_batch_size, tokens=c.eval_tokens):
        count += int((y_BT >= 0).sum())
        x_BT, y_BT = runtime.to_device(x_BT, y_BT)
        with runtime.autocast():
            loss = model(x_BT, y_BT, reduction="sum")[1]
        total += loss.item()  # type: ignore[union-attr]
    model.train()
    return total / count


def compile_ahead(forward: Any, model: GPT, runtime: Runtime, batch: int) -> float:
    """Compile on a batch of zeros, before the training clock starts: seconds. Leaves weights, gradients and generators as they were."""
    start = time.perf_counter()
    zeros_BT = torch.zeros(batch, model.config.block_size, dtype=torch.int64, device=runtime.device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), runtime.autocast():
        forward(zeros_BT, zeros_BT)[1].backward()
    model.zero_grad(set_to_none=True)
    runtime.synchronize()
    return time.perf_counter() - start


def plot_losses(folder: RunFolder) -> None:
    """loss.png: training and validation loss against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    records = folder.metrics()
    for key, style in (("loss", "-"), ("val_loss", "o-")):
        points = [(r["tokens"], r[key]) for r in records if key in r]
        if points:
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                style,
                label={"loss": "training batch", "val_loss": "validation"}[key],
                alpha=0.8,
            )
    axes.set(xlabel="tokens", ylabel="loss, nats per token", title=folder.path.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder.path / "loss.png", dpi=120)
    plt.close(figure)


def keep_choices(config: Config, saved: dict[str, Any], newest: Path) -> None:
    """A resumed run keeps what was chosen for it at its start; what defines its weights, batches and seeds must not differ."""
    for section, key in (("run", "device"), ("run", "precision"), ("model", "vocab_size")):
        if getattr(getattr(config, section), key) in ("auto", None):
            setattr(getattr(config, section), key, saved[section][key])
    if config.optim.polar.dtype == "auto":
        config.optim.polar = Polar(config.optim.polar.schedule, config.optim.polar.form, saved["optim"]["polar"]["dtype"])
    for key, value in configuration.flat(config).items():
        section, _, name = key.rpartition(".")
        if (section == "model" or key in ("run.seed", "train.batch_size")) and saved[section][name] != value:
            raise ConfigError(
                f"{key} of a resumed run\n  got: {value!r}\n  allowed: {saved[section][name]!r}, as {newest} has it\n"
                f"  fix: resume with {newest.parent.parent / 'config.toml'}, or start a new run"
            )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except REFUSALS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except NonFiniteError as error:
        print(f"error: {error}\n  the checkpoints of this run are as they were", file=sys.stderr)
        sys.exit(1)
