"""Words of other programs for our settings: a wrong name is answered with the right one.

nanoGPT, modded-nanogpt, Hugging Face's TrainingArguments and torch's optimizers use them. A word
here is never accepted: it is a hint in a refusal.
"""

from collections.abc import Iterable

SYNONYMS = {
    "lr": "optim.lr",
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "optimizer": "optim.name",
    "optim": "optim.name",
    "momentum": "optim.beta",
    "beta1": "optim.beta",
    "adam_beta1": "optim.beta",
    "adam_beta2": "optim.beta2",
    "wd": "optim.weight_decay",
    "decay": "optim.weight_decay",
    "grad_clip": "optim.max_grad_norm",
    "clip": "optim.max_grad_norm",
    "scheduler": "schedule.shape",
    "lr_scheduler_type": "schedule.shape",
    "warmup_iters": "schedule.warmup",
    "warmup_steps": "schedule.warmup",
    "warmup_ratio": "schedule.warmup",
    "cooldown_frac": "schedule.cooldown",
    "iters": "train.steps",
    "iterations": "train.steps",
    "max_iters": "train.steps",
    "max_steps": "train.steps",
    "num_iterations": "train.steps",
    "batch": "train.batch_size",
    "bs": "train.batch_size",
    "device_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "accumulation": "train.gradient_accumulation_steps",
    "grad_accum": "train.gradient_accumulation_steps",
    "grad_accumulation_steps": "train.gradient_accumulation_steps",
    "eval_interval": "train.eval_every",
    "eval_steps": "train.eval_every",
    "val_loss_every": "train.eval_every",
    "eval_iters": "train.eval_tokens",
    "val_tokens": "train.eval_tokens",
    "log_interval": "train.log_every",
    "logging_steps": "train.log_every",
    "save_every": "train.checkpoint_every",
    "save_steps": "train.checkpoint_every",
    "save_total_limit": "train.keep_checkpoints",
    "out_dir": "run.dir",
    "output_dir": "run.dir",
    "run_name": "run.name",
    "bf16": "run.precision",
    "amp": "run.precision",
    "torch_compile": "run.compile",
    "fsdp": "run.parallel",
    "num_threads": "run.threads",
    "data": "data.dataset",
    "corpus": "data.dataset",
    "model": "model.name",
    "architecture": "model.name",
    "layers": "model.n_layer",
    "depth": "model.n_layer",
    "num_layers": "model.n_layer",
    "heads": "model.n_head",
    "num_heads": "model.n_head",
    "width": "model.n_embd",
    "d_model": "model.n_embd",
    "dim": "model.n_embd",
    "hidden_size": "model.n_embd",
    "context": "model.block_size",
    "context_length": "model.block_size",
    "seq_len": "model.block_size",
    "sequence_length": "model.block_size",
    "max_seq_len": "model.block_size",
}


def key_meant(key: str, keys: Iterable[str]) -> str | None:
    """Return the key that a wrong one means, or None.

    It is the one that this word means in other programs, or the one of another section with the
    same last name, if no second one is as near to the top. keys: "section.key" of all settings.
    """
    keys, word = list(keys), key.rpartition(".")[2]
    if word in SYNONYMS:
        return SYNONYMS[word]
    same = sorted((k for k in keys if k.rpartition(".")[2] == word), key=lambda k: k.count("."))
    if not same or (len(same) > 1 and same[1].count(".") == same[0].count(".")):
        return None
    return same[0]
