"""What an exported run is made of beside our own modules' code: data, the flat step of the modular norm, the loop. Nothing imports this to run it.

studies/export.py reads this file: `config.section.key` becomes the run's value, a branch that the value decides is taken or left out, what is filled in is filled in, and the
definitions that are left come out as one script together with those of model.py, models/ and optim/ that they need. So whatever is written here must be written for every run.

T block_size, B sequences of the global batch, V vocabulary. A slot is one micro-batch of a step: what they hold does not depend on how many processes share them.
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
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from config import Config
from model import GPT
from models import build
from optim import DIRECTIONS, Norm
from optim.baselines import set_beta
from optim.schedules import SCHEDULES, momentum_at
from runtime import RunConfig


class Weight(NamedTuple):
    """One tensor: the norm of its role, and the radius that the modular norm gives it, which is the size of its step at lr 1."""

    name: str
    role: str
    norm: Norm
    radius: float


# ---- filled in by export.py
config = Config(run=RunConfig(device="cpu"))
TRACK = False  # the optimization track's data order and evaluations
DATA = ""
SHARDS: dict[str, dict[str, str]] = {}  # {split: {file: sha256}}
WEIGHTS: list[Weight] = []  # in the order in which they are initialized
CODE = ""
DIRECTION = DIRECTIONS[config.optim.direction]


# ---- data


def read_shard(path: Path) -> Tensor:
    """(n,) int16, mapped: the bits of a file's uint16 tokens, behind 256 int32 (magic, version, n, zeros)."""
    magic, version, n = torch.from_file(str(path), shared=False, size=256, dtype=torch.int32)[
        :3
    ].tolist()
    if (magic, version) != (20240520, 1):
        raise ValueError(f"{path}: not a token shard: magic {magic}, version {version}")
    return torch.from_file(str(path), shared=False, size=512 + n, dtype=torch.int16)[512:]


def read_split(split: str) -> list[Tensor]:
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
    return tokens.long() & 0xFFFF


def seed_words(numbers: tuple[int, ...], count: int) -> list[int]:
    """numpy's SeedSequence(numbers).generate_state(count), uint32, from non-negative integers."""
    low, constant, entropy = 2**32 - 1, 0x43B0D7E5, []
    for number in numbers:
        entropy += [number >> shift & low for shift in range(0, max(1, number.bit_length()), 32)]

    def hashed(value: int, multiplier: int) -> int:
        nonlocal constant
        value, constant = value ^ constant, constant * multiplier & low
        value = value * constant & low
        return value ^ value >> 16

    def mixed(x: int, y: int) -> int:
        value = 0xCA01F9DD * x - 0x4973F715 * y & low
        return value ^ value >> 16

    pool = [hashed(word, 0x931E8875) for word in (entropy + [0] * 4)[:4]]
    for i in range(4):
        for j in range(4):
            if i != j:
                pool[j] = mixed(pool[j], hashed(pool[i], 0x931E8875))
    for word in entropy[4:]:
        pool = [mixed(p, hashed(word, 0x931E8875)) for p in pool]
    constant = 0x8B51F9DD
    return [hashed(pool[i % 4], 0x58F38DED) for i in range(count)]


class Random:
    """numpy's default_rng(numbers), which the order of the data comes from: PCG64 (O'Neill, pcg-random.org), integers by Lemire's method (arXiv 1805.10941)."""

    def __init__(self, *numbers: int) -> None:
        state, self.increment, self.half = 0, 0, None
        for word in seed_words(numbers, 8)[::-1]:
            state = state << 32 | word
        # The least significant 64 bits come first.
        a, b, c, d = (state >> 64 * i & 2**64 - 1 for i in range(4))
        self.increment = (c << 64 | d) << 1 & 2**128 - 1 | 1
        self.state = (a << 64 | b) + self.increment
        self._step()

    def _step(self) -> None:
        self.state = (self.state * 0x2360ED051FC65DA44385DF649FCCF645 + self.increment) & 2**128 - 1

    def _bits(self) -> int:
        """32 of them: each state has 64, the lower half first."""
        if self.half is not None:
            bits, self.half = self.half, None
            return bits
        self._step()
        word, turn = (self.state >> 64 ^ self.state) & 2**64 - 1, self.state >> 122
        word = (word >> turn | word << 64 - turn) & 2**64 - 1
        self.half = word >> 32
        return word & 2**32 - 1

    def below(self, n: int) -> int:
        """0 … n − 1, n <= 2³²."""
        if n == 1:
            return 0
        product = self._bits() * n
        if product & 2**32 - 1 < n:
            while product & 2**32 - 1 < (2**32 - n) % n:
                product = self._bits() * n
        return product >> 32

    def permutation(self, n: int) -> list[int]:
        """Fisher and Yates's, its places by rejection of what is too large."""
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            mask = (1 << i.bit_length()) - 1
            while (j := self._bits() & mask) > i:
                pass
            order[i], order[j] = order[j], order[i]
        return order


class Batches:
    """Every epoch visits every window of T + 1 tokens once, at an offset and in an order of its own, both drawn from (seed, epoch)."""

    def __init__(self, shards: list[Tensor], seed: int) -> None:
        self.shards, self.seed, self.epoch = shards, seed, -1
        # T tokens are kept for the epoch's offset, so that every epoch has the same number of windows.
        self.places = [
            (s, k)
            for s, shard in enumerate(shards)
            for k in range((len(shard) - 1) // config.model.block_size - 1)
        ]

    def batch(self, step: int, slot: int, slots: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B / slots, T) of one slot of a step."""
        size = config.train.batch_size // slots
        first = step * config.train.batch_size + slot * size
        rows = integers(torch.stack([self._window(i) for i in range(first, first + size)]))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _window(self, index: int) -> Tensor:
        epoch, place = divmod(index, len(self.places))
        if epoch != self.epoch:
            random = Random(self.seed, epoch)
            self.epoch, self.offset, self.order = (
                epoch,
                random.below(config.model.block_size),
                random.permutation(len(self.places)),
            )
        shard, k = self.places[self.order[place]]
        start = self.offset + k * config.model.block_size
        return self.shards[shard][start : start + config.model.block_size + 1]


class InOrder:
    """Batches side by side, as the files have them; the end of a file that has no whole batch more is left out."""

    def __init__(self, shards: list[Tensor]) -> None:
        self.shards, self.tokens = shards, config.train.batch_size * config.model.block_size
        self.ends = list(accumulate(max(1, (len(s) - 2) // self.tokens) for s in shards))

    def batch(self, step: int, slot: int, slots: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B / slots, T) of one slot of a step."""
        if step >= self.ends[-1]:
            raise ValueError(f"step {step}: the data ends after {self.ends[-1]}")
        shard = next(i for i, end in enumerate(self.ends) if step < end)
        first = (step - (self.ends[shard - 1] if shard else 0)) * self.tokens + slot * (
            self.tokens // slots
        )
        window = integers(self.shards[shard][first : first + self.tokens // slots + 1])
        return window[:-1].view(-1, config.model.block_size), window[1:].view(
            -1, config.model.block_size
        )


def validation_batches(shards: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Every token but the first is a target once: windows side by side, the last one padded with targets of −1, which do not count."""
    stream, T = shards[0] if len(shards) == 1 else torch.cat(shards), config.model.block_size
    targets = len(stream) - 1
    if config.train.eval_tokens is not None:
        targets = min(targets, config.train.eval_tokens)
    for start in range(0, targets, T * config.train.eval_batch_size):
        chunk = integers(stream[start : min(start + T * config.train.eval_batch_size, targets) + 1])
        missing = -(len(chunk) - 1) % T
        yield (
            F.pad(chunk[:-1], (0, missing)).view(-1, T),
            F.pad(chunk[1:], (0, missing), value=-1).view(-1, T),
        )


# ---- optimizer


class Stack:
    """Weights of one norm and shape, (n, *shape), which step together."""

    def __init__(self, norm: Norm, weights: list[Tensor], radii: list[float]) -> None:
        self.norm, self.weights = norm, weights
        self.radii = torch.tensor(radii, device=weights[0].device).reshape(-1, *(1,) * norm.ndim)
        made = [DIRECTION.buffers(w) for w in weights]
        self.state = {k: torch.stack([m[k] for m in made]) for k in made[0]}

    def step(self, lr: float, beta: float, clip: Tensor | None, refresh: bool) -> None:
        G = torch.stack([w.grad for w in self.weights])  # type: ignore[arg-type]
        live = self.norm.fresh(G)  # a row without any gradient does not move
        live = torch.ones((), dtype=torch.bool, device=G.device) if live is None else live
        if config.optim.max_grad_norm is not None:
            G.mul_(clip)  # type: ignore[arg-type]
        D = DIRECTION(
            G,
            self.state,
            live=live.to(G.dtype),
            beta=beta,
            beta2=config.optim.beta2,
            refresh=refresh,
        )
        D = self.norm.sharp(D) if config.optim.scale == "dual" else self.norm.dualize_(D)
        W = torch.stack([w.detach() for w in self.weights])
        U = D.mul_(self.radii).masked_fill_(~live, 0)
        if config.optim.weight_decay:
            decays = live & (U * W > 0) if config.optim.cautious else live
            W = W - torch.where(decays, W, 0).mul_(self.radii * config.optim.weight_decay).mul_(lr)
        W = torch.add(W, U, alpha=-lr)
        if config.optim.constraint:
            # Vectors and scalars are kept in the ball.
            if config.optim.constraint == "ball" or self.norm.ndim < 2:
                R = self.norm.project(W)
            elif config.optim.constraint == "sphere":
                R = self.norm.sphere(W)
            else:
                R = self.norm.stiefel(W)
            W = torch.where(live & (self.radii > 0), R, W)
        for w, new in zip(self.weights, W, strict=True):
            w.copy_(new)


class Dualized:
    """W ← retract(W − lr · radius · (dualize(direction) + weight decay · W)): steepest descent in the modular norm, every weight by the same rule."""

    def __init__(self, model: GPT) -> None:
        equal: dict[tuple[Norm, torch.Size], list[tuple[Tensor, float]]] = {}
        placed = {w.name: w for w in WEIGHTS}
        for name, p in model.named_parameters():
            equal.setdefault((placed[name].norm, p.shape), []).append((p, placed[name].radius))
        self.stacks = [
            Stack(norm, [p for p, _ in members], [r for _, r in members])
            for (norm, _), members in equal.items()
        ]
        self.calls = 0

    @torch.no_grad()
    def step(self, lr: float, beta: float) -> None:
        clip = None
        if config.optim.max_grad_norm is not None:
            total = torch.nn.utils.get_total_norm([w.grad for s in self.stacks for w in s.weights])  # type: ignore[misc]
            clip = (config.optim.max_grad_norm / total).clamp(max=1)
        for stack in self.stacks:
            stack.step(lr, beta, clip, self.calls % config.optim.refresh_every == 0)
        self.calls += 1


def matching(model: GPT, *patterns: str) -> list[Tensor]:
    return [
        p
        for name, p in model.named_parameters()
        if any(fnmatch(name, pattern) for pattern in patterns)
    ]


def base_optimizers(model: GPT) -> list[torch.optim.Optimizer]:
    """Filled in by export.py."""
    raise NotImplementedError


class Baseline:
    """torch's own optimizers, each weight in one of their groups."""

    def __init__(self, model: GPT) -> None:
        self.model, self.optimizers = model, base_optimizers(model)
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        assert sorted(id(p) for g in self.groups for p in g["params"]) == sorted(
            map(id, model.parameters())
        )
        for group in self.groups:
            group["initial_lr"] = group["lr"]

    def step(self, multiplier: float, beta: float) -> None:
        if config.optim.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.max_grad_norm)
        for group in self.groups:
            group["lr"] = group["initial_lr"] * multiplier
            if config.schedule.beta_warmup or config.schedule.beta_cooldown:
                set_beta(group, beta)
        for optimizer in self.optimizers:
            optimizer.step()


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
    if RANK == 0 and console:
        print(text, flush=True)
    if RANK == 0 and log:
        with logfile.open("a", encoding="utf-8") as f:
            print(text, file=f)


def total(x: Tensor) -> Tensor:
    """The sum over processes."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def now() -> float:
    if config.run.device == "cuda":
        torch.cuda.synchronize()
    if WORLD > 1:
        dist.barrier()
    return time.perf_counter()


# ---- training and validation


@torch.no_grad()
def validate(model: GPT, shards: list[Tensor]) -> float:
    """Nats per token."""
    model.eval()
    found = torch.zeros(2, dtype=torch.float64, device=device)
    for i, (x_BT, y_BT) in enumerate(validation_batches(shards)):
        if i % WORLD == RANK:
            x_BT, y_BT = x_BT.to(device), y_BT.to(device)
            with torch.autocast(
                device.type, torch.bfloat16, enabled=config.run.precision == "bf16"
            ):
                loss = model(x_BT, y_BT, reduction="sum")[1]
            found += torch.stack([loss.double(), (y_BT >= 0).sum().double()])
    model.train()
    nats, tokens = total(found).tolist()
    return nats / tokens


def train(seed: int) -> None:
    torch.manual_seed(seed)
    if TRACK:
        batches = InOrder(read_split("train"))
    else:
        batches = Batches(read_split("train"), seed)
    val_shards = read_split("val")
    model = build(config.model, generator=torch.Generator().manual_seed(seed)).to(device)
    forward = torch.compile(model, dynamic=False) if config.run.compile else model
    optimizer = Dualized(model) if config.optim.name == "dualized" else Baseline(model)
    steps, seconds, since = config.train.steps, 0.0, now()
    for step in range(steps + 1):
        if TRACK:
            evaluates = step % (125 if step < 0.9 * steps else 25) == 0 or step == steps
        else:
            evaluates = step == steps
            if config.train.eval_every:
                evaluates = evaluates or step % config.train.eval_every == 0
        if evaluates:
            seconds += now() - since
            val_loss = validate(model, val_shards)
            average = f"{1000 * seconds / max(1, step):.2f}ms"
            print0(
                f"step:{step}/{steps} val_loss:{val_loss:.5f} train_time:{seconds:.3f}s step_avg:{average}",
                console=True,
            )
            since = now()
        if step == steps:
            break
        loss = torch.zeros((), device=device)
        for slot in range(RANK, SLOTS, WORLD):
            if config.model.dropout or config.model.match_dropout:
                low, high = seed_words((seed, step, slot), 2)
                torch.manual_seed((high << 32 | low) >> 1)
            x_BT, y_BT = batches.batch(step, slot, SLOTS)
            with torch.autocast(
                device.type, torch.bfloat16, enabled=config.run.precision == "bf16"
            ):
                part = forward(x_BT.to(device), y_BT.to(device))[1] / SLOTS
            part.backward()
            loss += part.detach()
        if WORLD > 1:
            for p in model.parameters():
                dist.all_reduce(p.grad)
        multiplier = SCHEDULES[config.schedule.shape](
            step,
            steps,
            warmup=config.schedule.warmup,
            cooldown=config.schedule.cooldown,
            power=config.schedule.power,
        )
        beta = config.optim.beta
        if config.schedule.beta_warmup or config.schedule.beta_cooldown:
            beta = momentum_at(
                step,
                steps,
                beta=config.optim.beta,
                low=config.schedule.beta_low,
                warmup=config.schedule.beta_warmup,
                cooldown=config.schedule.beta_cooldown,
            )
        if config.optim.name == "dualized":
            optimizer.step(config.optim.lr * multiplier, beta)  # type: ignore[operator]
        else:
            optimizer.step(multiplier, beta)
        model.zero_grad(set_to_none=True)
        done = step + 1
        logged = done == steps
        if config.train.log_every:
            logged = logged or done % config.train.log_every == 0
        if logged:
            elapsed = seconds + time.perf_counter() - since
            print0(
                f"step:{done}/{steps} train_loss:{total(loss).item():.6f} train_time:{elapsed:.3f}s step_avg:{1000 * elapsed / done:.2f}ms"
            )


def main() -> None:
    """As many trials as the argument says, seeds one after the other."""
    logfile.parent.mkdir(exist_ok=True)
    print0(str(logfile), console=True, log=False)
    print0(CODE)
    print0("=" * 100)
    on = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    print0(
        f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda} on {on} with world_size {WORLD}"
    )
    print0("=" * 100)
    for trial in range(int(sys.argv[-1]) if len(sys.argv) > 1 else 1):
        train(config.run.seed + trial)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
