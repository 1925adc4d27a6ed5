"""Tables of costs: a row for each model, number of GPUs, parallelism and optimizer."""

from dataclasses import dataclass

from model import GPT

from .cases import Case
from .hardware import GPU
from .optimizers import Weight
from .step import Around, Step

KEY = ["model", "GPUs", "parallel", "optimizer"]
TABLES = {
    "compute": [
        "forward + backward a GPU",
        "optimizer, all GPUs",
        "busiest GPU",
        "its share",
        "GPUs with a matrix",
    ],
    "memory": ["weights", "gradients", "state", "buffers", "sum", "could fit"],
    "communication": ["forward + backward", "optimizer, mean", "busiest GPU"],
    "time": [
        "forward + backward",
        "optimizer, busiest GPU",
        "their communication",
        "its communication",
    ],
}
UNITS = {
    "compute": "FLOPs a step",
    "memory": "GB a GPU, the fullest; without activations and a stack's temporaries",
    "communication": "GB that a GPU sends a step",
    "time": "ms, rooflines from data sheets: estimates, not measured, nothing overlapped",
}


@dataclass
class Row:
    """One step of a case on w GPUs; its methods return the cells of the tables by name."""

    case: Case
    w: int
    parallel: str
    optimizer: str
    around: Around
    step: Step
    gpu: GPU

    def key(self) -> list[str]:
        """Return the first cells; * marks a batch that so many GPUs cannot share."""
        alone = "*" if self.case.sequences < self.w else ""
        return [self.case.name, f"{self.w:,}{alone}", self.parallel, self.optimizer]

    def compute(self) -> list[str]:
        """Return FLOPs a step."""
        each, busiest = self.around.flops / self.w, float(self.step.flops.max())
        with_whole = int((self.step.whole > 0).sum())
        return [
            f"{each:.3g}",
            f"{self.step.flops.sum():.3g}",
            f"{busiest:.3g}",
            percent(busiest / (each + busiest)),
            f"{with_whole:,}" if with_whole else "–",
        ]

    def memory(self) -> list[str]:
        """Return GB of the fullest GPU, and whether it could hold them."""
        model, step = self.around, self.step
        # Forward and backward are over when the step begins.
        buffers = step.buffers.clamp(min=model.buffers)
        total = model.weights + model.grads + step.state + buffers
        r = int(total.argmax())
        parts = (
            model.weights,
            model.grads,
            float(step.state[r]),
            float(buffers[r]),
            float(total[r]),
        )
        return [*map(giga, parts), "yes" if total[r] <= self.gpu.memory else "no"]

    def communication(self) -> list[str]:
        """Return GB that a GPU sends a step."""
        sent = self.step.sent
        model = sum(b for b, _ in self.around.rings)
        return [giga(x) for x in (model, float(sent.mean()), float(sent.max()))]

    def time(self) -> list[str]:
        """Return milliseconds, by rooflines."""
        times = (
            self.around.flops / self.w / self.gpu.flops,
            self.step.seconds(self.gpu),
            sum(sent / speed for sent, speed in self.around.rings),
            self.step.transfer_seconds(self.w),
        )
        return [number(1e3 * t) for t in times]


def headline(case: Case, model: GPT, weights: list[Weight], gpu: GPU) -> str:
    """Return a line on the model, and on what of it cannot be split."""
    top = max(weights, key=lambda x: x.whole)
    return (
        f"{case.name}: {model.num_params():,} weights; {case.sequences:,} sequences of"
        f" {case.model.block_size:,} tokens a step;"
        f" {sum(x.whole > 0 for x in weights)} matrices that need an owner, the largest"
        f" {' × '.join(map(str, top.p.shape))}:"
        f" {giga(4 * top.p.numel())} GB in float32, {top.whole:.3g} FLOPs to dualize,"
        f" {number(1e3 * top.whole / gpu.flops)} ms at peak"
    )


def table(name: str, rows: list[Row], *, markdown: bool) -> str:
    """Return one of TABLES as text."""
    lines = [[*KEY, *TABLES[name]], *([*row.key(), *getattr(row, name)()] for row in rows)]
    if markdown:
        lines.insert(1, ["---"] * len(lines[0]))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(n) if i < len(KEY) else cell.rjust(n)
            for i, (cell, n) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def number(x: float) -> str:
    """Return three digits, or whole thousands with commas."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def giga(x: float) -> str:
    """Return bytes as GB."""
    return number(x / 1e9)


def percent(x: float) -> str:
    """Return a share in percent, with more digits near 100."""
    return f"{100 * x:.2g} %" if x < 0.995 else f"{100 * x:.4g} %"
