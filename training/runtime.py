"""The machinery of a run: its ranks, the torch device, the precision, the generators."""

import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import nn

from optim.settings import Range

from .errors import RankError, RunError
from .ranks import Ranks

try:
    import resource
except ImportError:  # Windows
    resource = None


@dataclass
class RunConfig:
    """Where a run is computed, by how many processes, and where its folder is."""

    name: str | None = None
    """Name of the run folder; by default the configuration's name and the time."""

    dir: str = "runs"
    """The folder that holds the run folders."""

    seed: Annotated[int, Range(0, 2**63)] = 0
    """Seed of the initial weights, of the order of the data and of random masks."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """The torch device. auto takes cuda, else mps, else cpu."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is autocast. auto takes it on GPUs that have it. Elsewhere it takes it where the model's
    own products are faster in it."""

    compile: bool = False
    """Compile the model with torch.compile, before any clock starts."""

    threads: Annotated[int, Range(1)] | None = None
    """Threads of the CPU; by default torch's choice."""

    resume: bool | Literal["auto"] = False
    """Resume the named run from its newest whole checkpoint. "auto" resumes if a checkpoint exists,
    else starts anew."""

    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """How several processes hold the weights. ddp: all of them in every process. fsdp: sharded over
    all processes. hsdp: sharded over groups of shard_size neighbours, a copy in each group."""

    shard_size: Annotated[int, Range(1)] | None = None
    """Processes of one group of hsdp; by default those of one machine."""

    timeout: Annotated[float, Range(0, above=True)] = 600.0
    """Seconds without progress until the run ends and names the process it waits for."""

    plugins: list[str] = field(default_factory=list)
    """Python modules of your own, imported first, that register parts (docs/extend.md). Naming one
    runs its code: read a stranger's configuration before you run it."""


# Dense bf16 peaks in FLOP/s, by the device's full name, from NVIDIA's data sheets.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


class Runtime(Ranks):
    """The ranks of a run, and this rank's device, precision, autocast and generators."""

    def __init__(self, config: RunConfig, product: tuple[int, int, int] | None = None) -> None:
        """Choose the device, connect the ranks, choose the precision, seed torch.

        product: (rows, inner, columns) of the model's MLP, the rows of all ranks together. By it
        precision = "auto" chooses on devices other than CUDA; without it fp32 is taken.
        """
        super().__init__(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.device = torch.device(self._choose_device(config.device))
        if self.size > 1:
            self.connect(config, self.device)
        self.precision: Literal["fp32", "bf16"] = self.on_main(
            lambda: self._choose_precision(config.precision, product)
        )
        torch.manual_seed(config.seed)

    def _choose_device(self, device: str) -> str:
        available = {
            "cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available(),
            "cpu": True,
        }
        devices = [name for name, is_available in available.items() if is_available]
        if device == "auto":
            device = devices[0]
            self.choices.append(f"run.device = {device} (found here: {', '.join(devices)})")
        if device not in devices:
            error = RunError if self.size == 1 else RankError
            raise error(
                "run.device",
                got=device,
                allowed=f"{', '.join(devices)}, found here",
                fix="--run.device auto",
            )
        if device == "mps" and self.size > 1:
            raise RunError(
                "run.device",
                got=f"mps and {self.size} ranks",
                allowed="cuda, cpu",
                fix="--run.device cpu, or one process",
            )
        if device == "cuda" and self.size > 1:
            if self.local_rank >= torch.cuda.device_count():
                raise RankError(
                    "LOCAL_RANK",
                    got=self.local_rank,
                    allowed=f"below {torch.cuda.device_count()}, the GPUs of this machine",
                    fix="torchrun --nproc_per_node=gpu",
                )
            torch.cuda.set_device(self.local_rank)
            return f"cuda:{self.local_rank}"
        return device

    def _choose_precision(
        self, precision: Literal["auto", "fp32", "bf16"], product: tuple[int, int, int] | None
    ) -> Literal["fp32", "bf16"]:
        if precision != "auto":
            return precision
        if self.device.type == "cuda":
            faster = not bfloat16_is_emulated(self.device)
            why = f"this GPU has {'' if faster else 'no '}bf16"
        elif product is None:
            faster, why = False, "no product of a model to time"
        else:
            rows, inner, columns = product
            gain = bf16_gain(self.device, rows // self.size, inner, columns)
            faster = gain > 1.2
            why = (
                "in bf16 the MLP's product, casts and backward pass included, was"
                f" {ratio_in_words(gain)} here"
            )
        chosen = "bf16" if faster else "fp32"
        self.choices.append(f"run.precision = {chosen} ({why})")
        return chosen

    def seed(self, *numbers: int) -> None:
        """Seed torch's generators from the numbers alone.

        So nothing depends on which rank draws, or on what was drawn before.
        """
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the model's forward pass."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def to_device(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        if self.device.type == "cuda":
            return [t.pin_memory().to(self.device, non_blocking=True) for t in tensors]
        return [t.to(self.device) for t in tensors]

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type}, {torch.get_num_threads()} threads"

    def peak_flops(self) -> float | None:
        """Return the device's bf16 peak in FLOP/s, None where it is not known."""
        return PEAK_FLOPS.get(self.device_name()) if self.precision == "bf16" else None

    def peak_memory_bytes(self) -> int | None:
        """Return the most memory that this rank held.

        It is of the device's allocator, or of the process on a CPU, and None on Windows, which
        does not count it so.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if resource is None:
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def compile(self, model: nn.Module, example: tuple[torch.Tensor, torch.Tensor]) -> Any:
        """Return the compiled model, compiled on an example batch of (inputs, targets).

        Weights, gradients and generators stay as they were. Raises RunError where there is no
        compiler.
        """
        from torch._dynamo.exc import BackendCompilerFailed

        compiled = torch.compile(model)
        try:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())), self.autocast():
                compiled(*example)[1].backward()
        except BackendCompilerFailed as error:
            cause = error.inner_exception
            folder = Path(torch.__file__).parent
            raise RunError(
                "run.compile",
                got=f"{type(cause).__name__}: {str(cause).splitlines()[0]}",
                allowed="where a C++ compiler is, and torch in a path without spaces"
                f" (here: {folder})",
                fix="leave it out, or install there",
            ) from error
        model.zero_grad(set_to_none=True)
        self.synchronize()
        return compiled


PROBE_FLOPS = 4e9  # of bf16_gain's product at most: a tenth of a second in fp32 on a slow core


def bf16_gain(device: torch.device, rows: int, inner: int, columns: int) -> float:
    """Return how many times as fast as in fp32 a linear map is under bf16 autocast.

    The map is x (rows, inner) → (rows, columns), with its gradients. rows are cut so that the
    products stay below PROBE_FLOPS. Both are timed alternately, best of three, or of two where
    bf16 is ten times as slow, as emulation is. Returns 0 where it does not run.
    """
    rows = max(1, min(rows, int(PROBE_FLOPS / (6 * inner * columns))))
    x = torch.ones(rows, inner, device=device, requires_grad=True)
    W = torch.ones(columns, inner, device=device, requires_grad=True)

    def seconds(dtype: torch.dtype) -> float:
        start = time.perf_counter()
        low = dtype != torch.float32
        with torch.autocast(device.type, dtype, enabled=low, cache_enabled=False):
            loss = nn.functional.linear(x, W).sum()
        sum(g.sum() for g in torch.autograd.grad(loss, (x, W))).item()  # type: ignore[union-attr]
        return time.perf_counter() - start

    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    try:
        for dtype in best:
            seconds(dtype)  # the first ones are slower
        for turn in range(3):
            best = {dtype: min(before, seconds(dtype)) for dtype, before in best.items()}
            if turn and best[torch.bfloat16] > 10 * best[torch.float32]:
                break
    except RuntimeError:
        return 0.0
    return best[torch.float32] / best[torch.bfloat16]


def bfloat16_is_emulated(device: torch.device) -> bool:
    """Return whether a device has no bfloat16 products of its own.

    Other than on CUDA products of 256³ are timed. Emulation on AVX2 makes them 20 to 50 times
    slower than float32's, hardware (AVX512-BF16) 2 to 3 times faster: 4 times slower is taken for
    emulation.
    """
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return bf16_gain(device, 256, 256, 256) < 1 / 4


def ratio_in_words(gain: float) -> str:
    """Return a ratio of speeds in words: "3.0 × faster"."""
    if gain <= 0:
        return "not possible"
    ratio = max(gain, 1 / gain)
    return f"{ratio:.{0 if ratio >= 10 else 1}f} × {'faster' if gain >= 1 else 'slower'}"
