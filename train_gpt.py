"""Train a GPT with the dualized optimizer.

python train_gpt.py configs/quickstart.toml [--section.key value]…      (--help lists every key)
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
from optim import CoverageError, Dualized, ModularNorm, NonFiniteError, Polar, metrize
from optim.step_size import SCHEDULES
from runtime import Clock, RunError, RunFolder, Runtime, git_state
from telemetry import StepSizes

REFUSALS = (ConfigError, DataError, RunError, CoverageError, checkpoint.CheckpointError)


def main(argv: list[str]) -> None:
    # ---- configuration, run folder, runtime: nothing is written before everything is known to fit
    config = configuration.load(argv)
    resume = config.run.resume
    folder = RunFolder(Path(config.run.dir) / str(config.run.name), resume=resume)
    newest = checkpoint.latest(folder.checkpoints) if resume else None
    saved = checkpoint.read_state(newest) if newest else None
    if newest and saved:
        adopt_choices(config, newest, saved["config"])
    runtime = Runtime(config.run)
    config.run.device, config.run.precision = runtime.device.type, runtime.precision  # type: ignore[assignment]

    # ---- data
    dataset = Dataset(config.data)
    vocab = dataset.tokenizer.vocab_size
    if config.model.vocab_size is None:
        config.model.vocab_size = vocab
    if config.model.vocab_size < vocab:
        raise ConfigError(
            f"model.vocab_size\n  got: {config.model.vocab_size}\n  allowed: {vocab} or more, the {dataset.tokenizer.name} vocabulary of {config.data.dataset}\n  fix: leave it out"
        )
    prompt = dataset.tokenizer.encode(config.train.sample_prompt)
    batches = TrainBatches(
        dataset.split("train"), block_size=config.model.block_size, batch_size=config.train.batch_size, seed=config.run.seed
    )

    # ---- model, modular norm, optimizer
    polar = config.optim.polar
    if polar.dtype == "auto":
        polar = Polar(polar.schedule, polar.form, "bfloat16" if runtime.precision == "bf16" else "float32")
        runtime.choices.append(f"optim.polar.dtype = {polar.dtype} (follows run.precision)")
        config.optim.polar = polar
    generator = torch.Generator().manual_seed(config.run.seed)
    model = GPT(config.model, config.optim.norms.build(polar), generator)
    norm = metrize(model, model.structure(config.optim.masses))
    if newest:
        checkpoint.load_model(newest, model)
    model.to(runtime.device)
    o = config.optim
    optimizer = Dualized(
        model, o.lr, norm=norm, direction=o.direction, beta=o.beta, weight_decay=o.weight_decay, max_grad_norm=o.max_grad_norm
    )

    # ---- where the run stands
    progress: dict[str, Any] = {
        "train_seconds": 0.0,
        "wall_seconds": 0.0,
        "optimizer_seconds": 0.0,
        "compile_seconds": 0.0,
        "target": None,
        "val_loss": None,
    }
    first = 0
    if newest and saved:
        checkpoint.load_training(newest, saved, optimizer)
        first, progress = saved["step"], saved["progress"]
    folder.create()
    say = folder.say
    if newest:
        folder.forget_after(first)
        say(f"resumed {newest} at step {first}")
    toml, receipt = configuration.to_toml(config), norm.receipt()
    folder.write(f"config.resumed_{first:08d}.toml" if newest else "config.toml", toml)
    folder.write("receipt.txt", receipt)
    train(
        config,
        runtime,
        dataset,
        batches,
        model,
        optimizer,
        norm,
        folder,
        first,
        progress,
        {"config.toml": toml, "receipt.txt": receipt},
        prompt.tolist(),
    )


def train(
    config: Config, runtime: Runtime, dataset: Dataset, batches: TrainBatches, model: GPT, optimizer: Dualized, norm: ModularNorm,
    folder: RunFolder, first: int, progress: dict[str, Any], texts: dict[str, str], prompt: list[int],
) -> None:  # fmt: skip
    """The loop, and what is left of it: metrics.jsonl, checkpoints, summary.json, loss.png, a sample."""
    run, c, say = config.run, config.train, folder.say
    wall_start = time.perf_counter() - progress["wall_seconds"]
    tokens_per_step = c.batch_size * config.model.block_size
    for choice in runtime.choices:
        say(f"chosen: {choice}")
    say(
        f"{folder.path}: {model.num_params():,} parameters, {len(norm.norms)} dualized tensors (receipt.txt), {runtime.device_name()}, {runtime.precision}, torch {torch.__version__}"
    )
    say(
        f"{config.data.dataset}: {dataset.manifest.splits['train'].tokens:,} tokens, {c.steps} steps of {tokens_per_step:,}, {c.steps * tokens_per_step / dataset.manifest.splits['train'].tokens:.2f} epochs"
    )

    forward = torch.compile(model) if run.compile else model
    parts = c.gradient_accumulation_steps
    if run.compile:
        progress["compile_seconds"] += compile_ahead(forward, model, runtime, c.batch_size // parts)
    clock = Clock(runtime, progress["train_seconds"])
    sizes = StepSizes(model, optimizer)
    schedule = SCHEDULES[config.optim.schedule]
    bar = tqdm(total=c.steps, initial=first, disable=None, unit="step", dynamic_ncols=True)

    def evaluate(step: int) -> None:
        loss = validation_loss(model, runtime, dataset, config)
        bpt = dataset.bytes_per_token("val")
        bpb = loss / math.log(2) / bpt if bpt else None
        record = {"step": step, "tokens": step * tokens_per_step, "train_seconds": clock.seconds, "val_loss": loss, "val_bpb": bpb}
        folder.log_metrics(record)
        progress.update(val_loss=loss, val_bpb=bpb)
        if progress["target"] is None and c.target_loss is not None and loss <= c.target_loss:
            progress["target"] = {"loss": loss, "step": step, "tokens": record["tokens"], "train_seconds": clock.seconds}
        tqdm.write("", end="")
        say(
            f"step {step:6d}  validation {loss:.4f} nats per token"
            + (f", {bpb:.4f} bits per byte" if bpb else "")
            + f"  {clock.seconds:.1f} s"
        )

    def save(step: int) -> None:
        optimizer.check_finite()
        progress.update(train_seconds=clock.seconds, wall_seconds=time.perf_counter() - wall_start)
        checkpoint.save(
            folder.checkpoints,
            step,
            model,
            optimizer,
            {"config": asdict(config), "progress": progress, "data": {"next_step": step}},
            texts,
            keep=c.keep_checkpoints,
        )

    if first == 0 and c.eval_every:
        evaluate(0)
    model.train()
    for step in range(first, c.steps):
        done = step + 1
        logged = done == c.steps or (c.log_every and done % c.log_every == 0)
        measured = c.telemetry_every and (done % c.telemetry_every == 0 or done == 1)
        with clock:
            lr = config.optim.lr * schedule(step, c.steps, warmup=config.optim.warmup, cooldown=config.optim.cooldown)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = torch.zeros((), device=runtime.device)
            for part in range(parts):
                x, y = runtime.to_device(*batches.batch(step, part=part, parts=parts))
                with runtime.autocast():
                    part_loss = forward(x, y)[1] / parts
                part_loss.backward()
                loss += part_loss.detach()
            if measured:
                sizes.before()
            started = clock.now() if logged or runtime.device.type == "cpu" else None
            optimizer.step()
            if started is not None:
                optimizer_seconds = clock.now() - started
            optimizer.zero_grad(set_to_none=True)
        progress["optimizer_seconds"] += optimizer_seconds
        bar.update()
        if logged or measured:
            record = {
                "step": done,
                "tokens": done * tokens_per_step,
                "train_seconds": clock.seconds,
                "loss": loss.item(),
                "lr": lr,
                "optimizer_ms": 1e3 * optimizer_seconds,
            }
            if measured:
                record["step_sizes"] = sizes.after()
            folder.log_metrics(record)
            bar.set_postfix(loss=f"{record['loss']:.3f}", tok_s=f"{done * tokens_per_step / clock.seconds:,.0f}")
        if done == c.steps or (c.eval_every and done % c.eval_every == 0):
            evaluate(done)
        if done == c.steps or (c.checkpoint_every and done % c.checkpoint_every == 0):
            save(done)
    bar.close()
    finish(config, runtime, dataset, model, optimizer, folder, clock, progress, wall_start, tokens_per_step, prompt)


@torch.no_grad()
def validation_loss(model: GPT, runtime: Runtime, dataset: Dataset, config: Config) -> float:
    """Nats per token over the whole validation split, or its first train.eval_tokens targets."""
    model.eval()
    total, count = 0.0, 0
    for x, y in validation_batches(
        dataset.split("val"), block_size=config.model.block_size, batch_size=config.train.eval_batch_size, tokens=config.train.eval_tokens
    ):
        count += int((y >= 0).sum())
        x, y = runtime.to_device(x, y)
        with runtime.autocast():
            total += model(x, y, reduction="sum")[1].item()  # type: ignore[union-attr]
    model.train()
    return total / count


def compile_ahead(forward: Any, model: GPT, runtime: Runtime, batch: int) -> float:
    """Compile on a batch of zeros, before the training clock starts: seconds. Leaves weights, gradients and generators as they were."""
    start = time.perf_counter()
    zeros = torch.zeros(batch, model.config.block_size, dtype=torch.int64, device=runtime.device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), runtime.autocast():
        forward(zeros, zeros)[1].backward()
    model.zero_grad(set_to_none=True)
    runtime.synchronize()
    return time.perf_counter() - start


def finish(
    config: Config, runtime: Runtime, dataset: Dataset, model: GPT, optimizer: Dualized, folder: RunFolder, clock: Clock,
    progress: dict[str, Any], wall_start: float, tokens_per_step: int, prompt: list[int],
) -> None:  # fmt: skip
    """summary.json, loss.png, a sample."""
    c, say = config.train, folder.say
    peak = runtime.peak_flops()
    speed = c.steps * tokens_per_step / clock.seconds
    commit, dirty = git_state()
    summary = {
        "params": model.num_params(), "tokens": c.steps * tokens_per_step, "steps": c.steps, "val_loss": progress["val_loss"], "val_bpb": progress["val_bpb"],
        "train_seconds": clock.seconds, "compile_seconds": progress["compile_seconds"], "wall_seconds": time.perf_counter() - wall_start,
        "optimizer_seconds": progress["optimizer_seconds"], "tokens_per_second": speed, "mfu": model.flops_per_token() * speed / peak if peak else None,
        "peak_memory_bytes": runtime.peak_memory_bytes(), "optimizer_state_bytes": sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)),
        "target": progress["target"], "seed": config.run.seed, "world_size": 1, "device": runtime.device_name(), "torch": torch.__version__, "commit": commit, "dirty": dirty,
    }  # fmt: skip
    folder.write_json("summary.json", summary)
    plot(folder)
    val = dataset.manifest.splits["val"]
    if summary["val_bpb"] is not None:
        gzipped = f", gzip -9 on the validation bytes: {8 * val.gzip9_bytes / val.bytes:.4f}" if val.gzip9_bytes and val.bytes else ""
        say(f"validation: {summary['val_bpb']:.4f} bits per byte{gzipped}")
    if c.sample_tokens:
        model.eval()
        generator = torch.Generator(runtime.device).manual_seed(config.run.seed)
        idx = torch.tensor([prompt], device=runtime.device)
        out = model.generate(idx, c.sample_tokens, temperature=0.8, vocab_size=dataset.tokenizer.vocab_size, generator=generator)
        say(f"sample:\n{dataset.tokenizer.decode(out[0].tolist())}")
    say(
        f"{summary['tokens']:,} tokens in {summary['train_seconds']:.1f} s of training ({speed:,.0f} tokens/s), {summary['wall_seconds']:.1f} s in all; picture: {folder.path / 'loss.png'}"
    )


def plot(folder: RunFolder) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, style in (("loss", {"alpha": 0.5, "label": "training batch"}), ("val_loss", {"marker": "o", "label": "validation"})):
        points = [(r["tokens"], r[key]) for r in folder.metrics() if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    axes.set(xlabel="tokens", ylabel="nats per token", title=folder.path.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder.path / "loss.png", dpi=120)
    plt.close(figure)


def adopt_choices(config: Config, newest: Path, saved: dict[str, Any]) -> None:
    """A resumed run keeps what was chosen for it at its start; what defines its weights and its data must not differ."""
    for section, key in (("run", "device"), ("run", "precision"), ("model", "vocab_size")):
        if getattr(getattr(config, section), key) in ("auto", None):
            setattr(getattr(config, section), key, saved[section][key])
    if config.optim.polar.dtype == "auto":
        config.optim.polar = Polar(config.optim.polar.schedule, config.optim.polar.form, saved["optim"]["polar"]["dtype"])
    fixed = {"run.seed", "data.dataset", "train.batch_size"}
    for key, value in configuration.flat(config).items():
        section, _, name = key.rpartition(".")
        if (section == "model" or key in fixed) and saved[section][name] != value:
            raise ConfigError(
                f"{key} of a resumed run\n  got: {value!r}\n  allowed: {saved[section][name]!r}, as {newest} has it\n  fix: resume with {newest.parent.parent / 'config.toml'}, or start a new run"
            )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except REFUSALS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except NonFiniteError as error:
        print(f"error: {error}\n  the run's checkpoints are untouched", file=sys.stderr)
        sys.exit(1)
