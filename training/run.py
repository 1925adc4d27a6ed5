"""A run beside its steps: its start, what is done once in a while, and its end."""

import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from data.loader import Dataset, TrainBatches
from model import GPT
from models.generation import generate
from optim import Dualized, ModularNorm, NonFiniteError
from optim.baselines import BASELINES

from . import checkpoint
from .baseline import Baseline, evaluating
from .clock import Clock, Stopwatch
from .config import Config, to_toml
from .errors import Stopped
from .evaluate import evaluate
from .geometry import Geometry
from .half_lives import decays_in_words, tokens_of_step
from .plots import plot_geometry, plot_losses
from .provenance import git_state
from .resume import Progress, Start
from .runtime import Runtime
from .sharpness import Sharpness
from .summary import summary


class Data(NamedTuple):
    """The text of a run, and the prompt of its sample. shards: the sha256 of each."""

    dataset: Dataset
    batches: TrainBatches
    prompt: list[int]
    shards: list[str]


class Run:
    """A run's parts and clocks, and what is done with them beside its steps.

    `with run:` starts and stops the training clock and the progress bar.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        start: Start,
        data: Data,
        model: GPT,
        norm: ModularNorm,
        optimizer: Dualized | Baseline,
        progress: Progress,
    ) -> None:
        """Write the run's folder and make its instruments."""
        self.config, self.runtime, self.folder, self.data = config, runtime, start.folder, data
        self.model, self.optimizer, self.progress = model, optimizer, progress
        self.first, self.steps = start.step, config.train.steps
        self.plugins = start.plugins
        self.tokens_per_step = tokens_of_step(config)
        self.source = git_state()  # at the start: files may change while it trains
        self.texts = texts_of_run(config, norm, optimizer)
        self._write_folder(start, norm)
        self.wall_start = time.perf_counter() - progress.wall_seconds
        self.clock = Clock(runtime, progress.train_seconds)
        self.optimizer_watch = Stopwatch(runtime, progress.optimizer_seconds)
        self.telemetry_watch = Stopwatch(runtime, progress.telemetry_seconds)
        self.geometry = Geometry(model, optimizer, norm)
        self.sharpness = self._sharpness(norm) if config.train.sharpness_every else None
        self.saver = checkpoint.Saver(
            self.folder.checkpoints,
            keep=config.train.keep_checkpoints,
            group=runtime.group(),
            waiting=lambda: runtime.beat(self.steps, "checkpoint"),
        )
        self.nonfinite: list[int] = []  # the last steps in a row that were left out

    def _write_folder(self, start: Start, norm: ModularNorm) -> None:
        """Make the folder, write what is known before the first step, and tell it."""
        config, folder, say = self.config, self.folder, self.folder.say
        self.runtime.together(folder.create)
        for name, text in self.texts.items():
            folder.write(f"resumed_{self.first:08d}_{name}" if start.checkpoint else name, text)
        start.tell(self.progress)
        for choice in [*self.runtime.choices, *decays_in_words(config)]:
            say(f"chosen: {choice}")
        kind = (
            "dualized tensors"
            if config.optim.name == "dualized"
            else f"tensors, {config.optim.name}"
        )
        train_tokens = self.data.dataset.manifest.splits["train"].tokens
        epochs = self.steps * self.tokens_per_step / train_tokens
        say(
            f"{folder.path}: {self.model.num_params():,} parameters, {len(norm.norms)} {kind}"
            " (receipt.txt)"
        )
        say(f"{self.runtime.device_name()}, {self.runtime.precision}, torch {torch.__version__}")
        commit, dirty = self.source
        say(f"commit {commit}{', with uncommitted changes' * bool(dirty)}")
        say(
            f"{config.data.dataset}: {train_tokens:,} tokens; {self.steps} steps of"
            f" {self.tokens_per_step:,}, {epochs:.2f} epochs"
        )

    def _sharpness(self, norm: ModularNorm) -> Sharpness:
        c = self.config.train
        # One batch for all runs of a study, whatever their seeds, in an order that no run has.
        fixed = TrainBatches(
            self.data.dataset.split("train"),
            block_size=self.config.model.block_size,
            batch_size=c.sharpness_sequences,
            seed=2**63,
        ).batch(0)
        batch = self.runtime.to_device(*fixed)
        return Sharpness(self.model, self.optimizer, norm, batch, modular=c.sharpness_modular)

    def __enter__(self) -> None:
        self.bar = tqdm(
            total=self.steps,
            initial=self.first,
            disable=None if self.runtime.main else True,
            unit="step",
            dynamic_ncols=True,
        )
        self.clock.start()
        self.began = time.perf_counter()

    def __exit__(self, error: object, *_: object) -> None:
        self.bar.close()
        if error is None:
            self.clock.stop()
            self.saver.wait()  # while signals are caught: none shall cut off the last checkpoint

    @property
    def looks(self) -> bool:
        """Return whether this rank measures geometry: rank 0, or all where weights are sharded."""
        return self.runtime.main or self.runtime.parallel != "ddp"

    def keep_weights(self) -> None:
        """Keep the weights before a step, for the geometry of the step."""
        with self.clock.paused(), self.telemetry_watch:
            if self.looks:
                self.geometry.before()

    def log(
        self, done: int, loss: Tensor, lr: float, measured_BT: Tensor | None, *, curved: bool
    ) -> None:
        """Write a line of metrics.jsonl.

        loss: this rank's part of it. measured_BT: the batch with which geometry is measured, None
        for a step without. curved: measures sharpness.
        """
        runtime, optimizer = self.runtime, self.optimizer
        with self.clock.paused():
            seconds = self.clock.seconds()
            record: dict[str, Any] = {
                "step": done,
                "tokens": done * self.tokens_per_step,
                "train_seconds": seconds,
                "loss": runtime.total(loss.item())[0] / runtime.size,
                "lr": lr * (optimizer.step_size or 1.0),
                "optimizer_ms": 1e3 * self.optimizer_watch.latest(),
            }
            if measured_BT is not None and self.looks:
                with self.telemetry_watch:
                    record["geometry"] = self.geometry.after(measured_BT[:2])
            if self.sharpness and curved:
                runtime.beat(done, "sharpness")
                record["sharpness"] = self.sharpness.measure()
            self.folder.log_metrics(record)
            pace = f"{record['tokens'] / seconds:,.0f}"
            self.bar.set_postfix(loss=f"{record['loss']:.3f}", tok_s=pace)
            if self.bar.disable:  # no terminal
                per_step = (time.perf_counter() - self.began) / (done - self.first)
                self.folder.say(
                    f"step {done:6d} of {self.steps}  loss {record['loss']:.4f}"
                    f"  lr {record['lr']:.3g}  {pace} tokens/s"
                    f"  {per_step * (self.steps - done):.0f} s left"
                )

    def evaluate(self, done: int) -> None:
        """Measure the validation loss, write a line of metrics.jsonl, and note the target.

        Raises NonFiniteError for a loss that is not finite.
        """
        progress, target_loss = self.progress, self.config.train.target_loss
        with self.clock.paused():
            seconds = self.clock.seconds()
            with evaluating(self.optimizer):
                loss, bpb = evaluate(
                    self.model,
                    self.runtime,
                    self.data.dataset,
                    self.config,
                    step=done,
                    say=self.folder.say,
                )
            if not math.isfinite(loss):
                raise NonFiniteError(f"the validation loss after step {done} is {loss}")
            tokens = done * self.tokens_per_step
            point = {"step": done, "tokens": tokens, "train_seconds": seconds}
            progress.val_step, progress.val_loss, progress.val_bpb = done, loss, bpb
            if progress.target is None and target_loss is not None and loss <= target_loss:
                progress.target = {"loss": loss, **point}
            self.folder.log_metrics({**point, "val_loss": loss, "val_bpb": bpb})
            self.folder.say(
                f"step {done:6d}  validation {loss:.4f} nats per token, {bpb:.4f} bits per byte"
                f"  {seconds:.1f} s"
            )

    def save(self, done: int) -> None:
        """Save a checkpoint, which a thread writes while training goes on."""
        progress, c = self.progress, self.config.train
        with self.clock.paused():
            self.runtime.beat(done, "checkpoint")
            self.check_finite(done)
            progress.train_seconds = self.clock.seconds()
            progress.optimizer_seconds = self.optimizer_watch.seconds()
            progress.wall_seconds = time.perf_counter() - self.wall_start
            progress.telemetry_seconds = self.telemetry_watch.seconds()
            if not c.keep_checkpoints:
                return
            tokenizer = self.data.dataset.tokenizer
            state = {
                "config": asdict(self.config),
                "progress": asdict(progress),
                "shards": self.data.shards,
                "tokenizer": {"name": tokenizer.name, "characters": tokenizer.characters},
            }
            if self.plugins:
                state["plugins"] = self.plugins
            self._wait_for_checkpoint()
            self.saver.save(done, self.model, self.optimizer, state, self.texts)

    def _wait_for_checkpoint(self) -> None:
        """Wait for the checkpoint under way. Where it could not be written, training goes on."""
        try:
            self.saver.wait()
        except checkpoint.SaveError as error:
            self.folder.say(f"error: {error}")

    def check_finite(self, step: int) -> None:
        """Report a step that was left out, as its loss or gradient was not finite.

        The optimizer knows it one step late. Raises NonFiniteError after train.max_nonfinite of
        them in a row.
        """
        most = self.config.train.max_nonfinite
        try:
            self.optimizer.check_finite()
        except NonFiniteError as error:
            in_a_row = self.nonfinite[-1:] == [step - 1]
            self.nonfinite = [*self.nonfinite, step] if in_a_row else [step]
            count = len(self.nonfinite)
            which = f"{count} in a row" if count > 1 else "the first"
            self.folder.say(
                f"step {step} was left out, {which} of train.max_nonfinite = {most}: {error}"
            )
            if count >= most:
                self._wait_for_checkpoint()
                raise NonFiniteError(f"step {step}: {error}") from error

    def stop(self, done: int, number: int) -> None:
        """End the run at a signal: raise Stopped once the checkpoint is written."""
        self.saver.wait()
        saved = self.config.train.keep_checkpoints > 0
        stopped = Stopped(number, done, self.folder.path, saved=saved)
        self.folder.say(str(stopped))
        raise stopped

    def finish(self) -> None:
        """Write what is left of a run: its last evaluation, summary.json, pictures, a sample."""
        if self.progress.val_step < self.steps:
            self.evaluate(self.steps)
        self.runtime.stop_watchdog()
        c, say, path = self.config.train, self.folder.say, self.folder.path
        facts = self._summary()
        self.folder.write_json("summary.json", facts)
        # Compressors were given the whole split: they are beside a score of all of it, or absent.
        split = self.data.dataset.manifest.splits["val"]
        whole = c.eval_tokens is None or c.eval_tokens >= split.tokens - 1
        compressors = split.compressors() if whole else {}
        if self.runtime.main and c.pictures:
            bytes_per_token = (split.bytes or 0) / split.tokens
            plot_losses(self.folder, compressors, bytes_per_token=bytes_per_token)
            plot_geometry(
                self.folder.metrics(), path / "geometry.png", band=self.config.optim.polar.band
            )
        if c.sample_tokens and self.looks:
            with evaluating(self.optimizer):
                say(f"sample:\n{self._sample()}\n")
        others = ", ".join(f"{name} {bits:.4f}" for name, bits in compressors.items())
        compared = f" ({others} of the same bytes)" if others else ""
        say(f"validation: {self.progress.val_bpb:.4f} bits per byte{compared}")
        if self.optimizer.step_size is not None:
            started = self.config.optim.auto.initial
            say(
                f"lr found: {self.optimizer.step_size:.4g} (started at {started:g}),"
                " times the schedule"
            )
        say(
            f"{facts['tokens']:,} tokens in {facts['train_seconds']:.1f} s of training"
            f" ({facts['tokens_per_second']:,.0f} tokens/s), {facts['wall_seconds']:.1f} s in all"
        )
        inside = Path(sys.executable).is_relative_to(Path.cwd())
        python = os.path.relpath(sys.executable) if inside else "python"
        picture = f"picture: {path / 'loss.png'}   " if c.pictures else ""
        say(f"{picture}more text: {python} sample.py {path} --prompt …")

    def _summary(self) -> dict[str, Any]:
        held = sum(piece.tensor.nbytes for piece in self.optimizer.held().values())
        return summary(
            self.config,
            self.runtime,
            self.model,
            self.progress,
            source=self.source,
            plugins=self.plugins,
            wall_seconds=time.perf_counter() - self.wall_start,
            optimizer_state_bytes=held,
        )

    def _sample(self) -> str:
        model, runtime, tokenizer = self.model.eval(), self.runtime, self.data.dataset.tokenizer
        generator = torch.Generator(runtime.device).manual_seed(self.config.run.seed)
        out_BT = generate(
            model,
            torch.tensor([self.data.prompt], device=runtime.device),
            self.config.train.sample_tokens,
            temperature=0.8,
            vocab_size=tokenizer.vocab_size,
            generator=generator,
        )
        return tokenizer.decode(out_BT[0].tolist())


def texts_of_run(
    config: Config, norm: ModularNorm, optimizer: Dualized | Baseline
) -> dict[str, str]:
    """Return the files that say what a run is: {name: text}."""
    normed = config.optim.name == "dualized" or BASELINES[config.optim.name].normed
    if isinstance(optimizer, Baseline) and not normed:
        receipt = optimizer.receipt()
    else:
        receipt = norm.receipt()
    texts = {"config.toml": to_toml(config), "receipt.txt": receipt}
    if normed and norm.tree:  # the plain maximum over tensors has none
        texts["receipt.txt"] += f"\n{norm.tree}\n"
        texts["modular_norm.svg"] = norm.tree.svg()
    return texts
