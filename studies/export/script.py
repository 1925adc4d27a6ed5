"""The end of an exported script: its data, what gathers weights into stacks, the loop.

Nothing imports this to run it. studies/export specialises it: `config.section.key` becomes the
run's value, a branch that the value decides is taken or left out, and what is to be filled in is
filled in (fill.py). The definitions that are left come out as one script, together with those that
they need of model.py, models/ and optim/. So whatever is written here must suit every run.

T block_size, B sequences of the global batch, V vocabulary. A slot is one micro-batch of a step:
what they hold does not depend on how many processes share them.
"""

import hashlib
import os
import sys
import time
import uuid
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model import GPT
from models import build
from optim.baselines import set_beta
from optim.directions import DIRECTIONS
from optim.moments import Direction, Rows
from optim.norms import Norm
from optim.polar import Polar
from optim.update import Group, step_, total_norm
from training.config import Config
from training.runtime import RunConfig

from .pcg64 import Random, seed_words


class Weight(NamedTuple):
    """One tensor, with what this run uses of it. radius: the size of its step at lr 1."""

    name: str
    role: str
    norm: Norm
    radius: float


# ---- filled in by fill.py
config = Config(run=RunConfig(device="cpu"))
TRACK = False  # the optimization track's data order and evaluations
DATA = ""
SHARDS: dict[str, dict[str, str]] = {}  # {split: {file: sha256}}
POLAR = Polar()
WEIGHTS: list[Weight] = []  # in the order in which they are initialized
SETTINGS: Group = {}  # of a step, as optim/settings.py explains them
ROLES: dict[str, Group] = {}  # what the weights of a role have of their own
OWN_DIRECTIONS: dict[str, Direction] = {}  # of plugins
MODEL: Any = config.model  # a plugin's: its settings, and its norms by role
NORMS_BY_ROLE: dict[str, Norm] = {}
CODE = ""


DIRECTIONS.update(OWN_DIRECTIONS)


# ---- data


def read_shard(path: Path) -> Tensor:
    """Return the bits of a file's uint16 tokens, (n,) int16, mapped.

    They stand behind 256 int32: magic, version, n, zeros.
    """
    header = torch.from_file(str(path), shared=False, size=256, dtype=torch.int32)
    magic, version, n = header[:3].tolist()
    if (magic, version) != (20240520, 1):
        raise ValueError(f"{path}: not a token shard: magic {magic}, version {version}")
    return torch.from_file(str(path), shared=False, size=512 + n, dtype=torch.int16)[512:]


def read_split(split: str) -> list[Tensor]:
    """Return the shards of a split."""
    if TRACK:
        files = sorted(Path(DATA).glob(f"fineweb_{split}_*.bin"))
        if not files:
            raise FileNotFoundError(f"{DATA}/fineweb_{split}_*.bin")
        return [read_shard(file) for file in files]
    shards = []
    for file, sha256 in SHARDS[split].items():
        with (Path(DATA) / file).open("rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != sha256:
                raise ValueError(f"{DATA}/{file}: other data than the run's")
        shards.append(read_shard(Path(DATA) / file))
    return shards


def integers(tokens: Tensor) -> Tensor:
    """Return tokens as int64."""
    return tokens.long() & 0xFFFF


class Batches:
    """Batches of windows of T + 1 tokens, each of which every epoch visits once.

    An epoch's offset and order are drawn from (seed, epoch).
    """

    def __init__(self, shards: list[Tensor], seed: int) -> None:
        self.shards, self.seed, self.epoch = shards, seed, -1
        # T tokens are kept for the epoch's offset: every epoch has the same number of windows.
        self.places = [
            (s, k)
            for s, shard in enumerate(shards)
            for k in range((len(shard) - 1) // config.model.block_size - 1)
        ]

    def batch(self, step: int, slot: int, slots: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B / slots, T) of one slot of a step."""
        size = config.train.batch_size // slots
        first = step * config.train.batch_size + slot * size
        rows = integers(torch.stack([self._window(i) for i in range(first, first + size)]))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _window(self, index: int) -> Tensor:
        epoch, place = divmod(index, len(self.places))
        if epoch != self.epoch:
            self.epoch, random = epoch, Random(self.seed, epoch)
            self.offset = random.below(config.model.block_size)
            self.order = random.permutation(len(self.places))
        shard, k = self.places[self.order[place]]
        start = self.offset + k * config.model.block_size
        return self.shards[shard][start : start + config.model.block_size + 1]


class InOrder:
    """Batches side by side, as the files have them.

    The end of a file that has no whole batch more is left out.
    """

    def __init__(self, shards: list[Tensor]) -> None:
        self.shards, self.tokens = shards, config.train.batch_size * config.model.block_size
        self.ends = list(accumulate(max(1, (len(s) - 2) // self.tokens) for s in shards))

    def batch(self, step: int, slot: int, slots: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B / slots, T) of one slot of a step."""
        if step >= self.ends[-1]:
            raise ValueError(f"step {step}: the data ends after {self.ends[-1]}")
        shard = next(i for i, end in enumerate(self.ends) if step < end)
        size, before = self.tokens // slots, self.ends[shard - 1] if shard else 0
        first = (step - before) * self.tokens + slot * size
        window = integers(self.shards[shard][first : first + size + 1])
        shape = -1, config.model.block_size
        return window[:-1].view(shape), window[1:].view(shape)


def validation_batches(shards: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets side by side: every token but the first is a target once.

    The last window is padded with targets of −1, which do not count.
    """
    stream, T = shards[0] if len(shards) == 1 else torch.cat(shards), config.model.block_size
    targets = len(stream) - 1
    if config.train.eval_tokens is not None:
        targets = min(targets, config.train.eval_tokens)
    for start in range(0, targets, T * config.train.eval_batch_size):
        chunk = integers(stream[start : min(start + T * config.train.eval_batch_size, targets) + 1])
        missing = -(len(chunk) - 1) % T
        x, y = F.pad(chunk[:-1], (0, missing)), F.pad(chunk[1:], (0, missing), value=-1)
        yield x.view(-1, T), y.view(-1, T)


# ---- optimizer


class Stack:
    """Weights of one group, norm and shape, (n, *shape), which step together."""

    def __init__(self, group: Group, norm: Norm, weights: list[Tensor], radii: list[float]) -> None:
        self.group, self.norm, self.weights = group, norm, weights
        self.radii = torch.tensor(radii, device=weights[0].device).reshape(-1, *(1,) * norm.ndim)
        direction = DIRECTIONS[group["direction"]].on(norm, Rows(tuple(weights[0].shape)))
        buffers = [direction.buffers(w) for w in weights]
        self.state = {k: torch.stack([b[k] for b in buffers]) for k in buffers[0]}

    def step(self, clip: Tensor | None, *, refresh: bool) -> None:
        """Step the weights as their gradients say, these times clip."""
        G = torch.stack([w.grad for w in self.weights])  # type: ignore[arg-type]
        live = self.norm.live(G)
        step_(
            self.weights,
            G if clip is None else G.mul_(clip),
            self.state,
            self.group,
            norm=self.norm,
            live=live,
            radii=self.radii,
            lr=self.group["lr"],
            refresh=refresh,
        )


class Dualized:
    """Steepest descent in the modular norm: every weight is stepped by step_()."""

    def __init__(self, model: GPT) -> None:
        own = {role: {**SETTINGS, **settings} for role, settings in ROLES.items()}
        others, placed = {**SETTINGS}, {w.name: w for w in WEIGHTS}
        equal: dict[Any, list[tuple[Tensor, float]]] = {}
        for name, p in model.named_parameters():
            w = placed[name]
            role = w.role if w.role in own else None
            equal.setdefault((role, w.norm, p.shape), []).append((p, w.radius))
        self.groups: list[dict[str, Any]] = [others, *own.values()]
        self.stacks = [
            Stack(own.get(role, others), norm, [p for p, _ in alike], [r for _, r in alike])
            for (role, norm, _), alike in equal.items()
        ]
        self.lrs, self.betas = [g["lr"] for g in self.groups], [g["beta"] for g in self.groups]
        self.calls = 0

    @torch.no_grad()
    def step(self) -> None:
        """Step all weights; gradients are clipped group by group."""
        for group in self.groups:
            stacks, clip = [s for s in self.stacks if s.group is group], None
            if group["max_grad_norm"] is not None:
                grads = [p.grad for s in stacks for p in s.weights if p.grad is not None]
                length = total_norm(grads, grads[0].dtype)
                clip = (group["max_grad_norm"] / length).clamp(max=1)
            for stack in stacks:
                stack.step(clip, refresh=self.calls % group["refresh_every"] == 0)
        self.calls += 1


def matching(model: GPT, *patterns: str) -> list[Tensor]:
    """Return the weights of these names."""
    return [
        p
        for name, p in model.named_parameters()
        if any(fnmatch(name, pattern) for pattern in patterns)
    ]


def base_optimizers(model: GPT) -> list[torch.optim.Optimizer]:
    """Return torch's optimizers, as fill.py fills them in."""
    raise NotImplementedError


class Baseline:
    """torch's own optimizers, each weight in one of their groups."""

    def __init__(self, model: GPT) -> None:
        self.model, self.optimizers = model, base_optimizers(model)
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        assert sorted(id(p) for g in self.groups for p in g["params"]) == sorted(
            map(id, model.parameters())
        )
        self.lrs = [group["lr"] for group in self.groups]
        self.betas = [config.optim.beta] * len(self.groups)

    def step(self) -> None:
        """Step all weights; their gradients are clipped together."""
        if config.optim.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()


def set_mode(optimizers: list[Any], mode: str) -> None:
    """Set the model's weights to those to "train", or those to "eval", where these are others."""
    for optimizer in optimizers:
        for part in getattr(optimizer, "optimizers", [optimizer]):
            if hasattr(part, mode):
                getattr(part, mode)()


# ---- set-up: one process, or those of torchrun

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
SLOTS = config.train.gradient_accumulation_steps  # of a step, whoever computes them
assert SLOTS % WORLD == 0
if config.run.threads is not None:
    torch.set_num_threads(config.run.threads)
device = torch.device(config.run.device)
if config.run.device == "cuda":
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
if WORLD > 1:
    dist.init_process_group()
logfile = Path("logs") / f"{uuid.uuid4()}.txt"


def print0(text: str, *, console: bool = False, log: bool = True) -> None:
    """Print into the log, to the console, or both, once for all processes."""
    if RANK == 0 and console:
        print(text, flush=True)
    if RANK == 0 and log:
        with logfile.open("a", encoding="utf-8") as f:
            print(text, file=f)


def total(x: Tensor) -> Tensor:
    """Return the sum over processes."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def now() -> float:
    """Return the time in seconds at which all processes and devices have come so far."""
    if config.run.device == "cuda":
        torch.cuda.synchronize()
    if WORLD > 1:
        dist.barrier()
    return time.perf_counter()


def autocast() -> torch.autocast:
    """Return the context of a forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.run.precision == "bf16")


# ---- training and validation


@torch.no_grad()
def validate(model: GPT, shards: list[Tensor]) -> float:
    """Return the mean loss in nats per token."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for i, (x_BT, y_BT) in enumerate(validation_batches(shards)):
        if i % WORLD == RANK:
            x_BT, y_BT = x_BT.to(device), y_BT.to(device)
            with autocast():
                loss = model(x_BT, y_BT, reduction="sum")[1]
            sums += torch.stack([loss.double(), (y_BT >= 0).sum().double()])
    model.train()
    nats, tokens = total(sums).tolist()
    return nats / tokens


def evaluates(step: int) -> bool:
    """Return whether the model is validated after so many steps."""
    if step == config.train.steps:
        return True
    if TRACK:
        return step % (125 if step < 0.9 * config.train.steps else 25) == 0
    if config.train.eval_every:
        return step % config.train.eval_every == 0
    return False


def backward(forward: Any, batches: Any, seed: int, step: int) -> Tensor:
    """Make the gradients of a step; return the loss of this process's part of it."""
    loss = torch.zeros((), device=device)
    for slot in range(RANK, SLOTS, WORLD):
        if config.model.dropout or config.model.match_dropout:
            low, high = seed_words((seed, step, slot), 2)
            torch.manual_seed((high << 32 | low) >> 1)
        x_BT, y_BT = batches.batch(step, slot, SLOTS)
        with autocast():
            part = forward(x_BT.to(device), y_BT.to(device))[1] / SLOTS
        part.backward()
        loss += part.detach()
    if WORLD > 1:
        for p in forward.parameters():
            dist.all_reduce(p.grad)
    return loss


def schedule(optimizer: Any, step: int) -> None:
    """Give every group its learning rate and momentum of this step."""
    for group, lr in zip(optimizer.groups, optimizer.lrs, strict=True):
        group["lr"] = lr * config.schedule.lr_at(step, config.train.steps)
    if config.schedule.beta_warmup or config.schedule.beta_cooldown:
        for group, beta in zip(optimizer.groups, optimizer.betas, strict=True):
            set_beta(group, config.schedule.beta_at(step, config.train.steps, beta=beta))


def train(seed: int) -> None:
    """Train and validate one model."""
    torch.manual_seed(seed)
    if TRACK:
        batches = InOrder(read_split("train"))
    else:
        batches = Batches(read_split("train"), seed)
    val_shards = read_split("val")
    model = build(config.model, NORMS_BY_ROLE, generator=torch.Generator().manual_seed(seed)).to(
        device
    )
    forward = torch.compile(model, dynamic=False) if config.run.compile else model
    optimizer: Any = Dualized(model) if config.optim.name == "dualized" else Baseline(model)
    steps, seconds, since = config.train.steps, 0.0, now()
    for step in range(steps + 1):
        if evaluates(step):
            seconds += now() - since
            set_mode(optimizer.optimizers, "eval")
            val_loss = validate(model, val_shards)
            set_mode(optimizer.optimizers, "train")
            times = f"train_time:{seconds:.3f}s step_avg:{1000 * seconds / max(1, step):.2f}ms"
            print0(f"step:{step}/{steps} val_loss:{val_loss:.5f} {times}", console=True)
            since = now()
        if step == steps:
            break
        loss = backward(forward, batches, seed, step)
        schedule(optimizer, step)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        done = step + 1
        logged = done == steps
        if config.train.log_every:
            logged = logged or done % config.train.log_every == 0
        if logged:
            elapsed = seconds + time.perf_counter() - since
            times = f"train_time:{elapsed:.3f}s step_avg:{1000 * elapsed / done:.2f}ms"
            print0(f"step:{done}/{steps} train_loss:{total(loss).item():.6f} {times}")


def main() -> None:
    """Train as many trials as the argument says, seeds one after the other."""
    logfile.parent.mkdir(exist_ok=True)
    print0(str(logfile), console=True, log=False)
    print0(CODE)
    print0("=" * 100)
    on = f"{torch.get_num_threads()} CPU threads"
    if config.run.device == "cuda":
        on = torch.cuda.get_device_name(device)
    versions = f"PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}"
    print0(f"Running {versions} on {on} with world_size {WORLD}")
    print0("=" * 100)
    for trial in range(int(sys.argv[-1]) if len(sys.argv) > 1 else 1):
        train(config.run.seed + trial)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
