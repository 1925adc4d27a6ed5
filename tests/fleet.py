"""The fleet: what metrize makes of small random models, and whether it is right and trains.

`python -m tests.fleet [name…]` prints a table of all of them, or of some, and its sums.
"""

import contextlib
import re
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import optim
import optim.norms
import optim.views
import torch
import transformers
from optim import Dualized, ModularNorm, Rule, metrize
from optim.errors import CoverageError
from torch import nn

from tests.configurations import FLEET, Batch
from tests.modules import MODULES
from tests.perturbation import judge, loss_of

ENTRIES = FLEET | {f"nn.{name}": entry for name, entry in MODULES.items()}
STEPS = 20
PASTES = 3  # of an error's rules, before we give up

# What the judge calls wrong and is not: (entry, weights): why.
EXCEPTIONS = {
    ("gemma3n", "*per_layer_model_projection.weight"): "one map, whose outputs are shared out among the layers",
    ("gemma3n", "*altup.*_coefs.weight"): "one map to coefficients of streams, of which one goes through the layer",
    ("funnel_mlm", "*seg_embed"): "a table of two keys, of which one is chosen after queries have met both",
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what transformers and older parts of torch print and warn of."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


@dataclass
class Placement:
    """The norm of a model, None where it has none; and the rules, pasted from errors, that it needed."""

    norm: ModularNorm | None
    rules: list[Rule] = field(default_factory=list)
    pastes: int = 0
    message: str = ""  # of the last error


@dataclass
class Report:
    """What became of an entry. wrong, excepted: of weights, why. losses: before and after training."""

    placement: Placement
    wrong: dict[str, list[str]]
    excepted: dict[str, str]
    losses: tuple[float, float]

    @property
    def fell(self) -> bool:
        return self.losses[1] < self.losses[0]


def build(name: str) -> tuple[nn.Module, Batch]:
    with quiet():
        return ENTRIES[name]()


def rules_in(message: str) -> list[Rule]:
    """The rules that an error message prints, read as Python with the names of optim."""
    names = {**vars(optim.norms), **vars(optim.views), **vars(optim)}
    lists = re.findall(r"rules=(\[.*?\])\)", message, re.DOTALL)
    return [rule for text in lists for rule in eval(text, dict(names))]


def place(model: nn.Module) -> Placement:
    """Metrize a model, with the rules of its error messages where it asks for some."""
    placement = Placement(None)
    while placement.norm is None and placement.pastes <= PASTES:
        try:
            placement.norm = metrize(model, rules=placement.rules)
        except CoverageError as error:
            placement.message = str(error)
            placement.rules = rules_in(placement.message) + placement.rules
            placement.pastes += 1
    return placement


def train(model: nn.Module, batch: Batch, norm: ModularNorm) -> tuple[float, float]:
    """The first and the last loss of some steps on one batch, at lr 1 decaying to 0."""
    optimizer = Dualized(model, lr=1.0, norm=norm)
    losses = []
    for step in range(STEPS + 1):
        torch.manual_seed(0)
        loss = loss_of(model, batch)
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = 1 - step / STEPS
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


def report(name: str) -> Report:
    """Place, train and judge an entry. AssertionError, with the error's text, where it is not placed."""
    model, batch = build(name)
    placement = place(model)
    assert placement.norm is not None, placement.message
    with quiet():
        losses = train(*ENTRIES[name](), placement.norm)
        verdict = judge(model, batch, placement.norm.norms, placement.norm.notes)
    excepted = {
        weight: why
        for weight in verdict.wrong
        for (entry, pattern), why in EXCEPTIONS.items()
        if entry == name and fnmatchcase(weight, pattern)
    }
    wrong = {weight: why for weight, why in verdict.wrong.items() if weight not in excepted}
    return Report(placement, wrong, excepted, losses)


# ---- the table


def lines(name: str, entry: Report, seconds: float) -> Iterator[str]:
    rules, (first, last) = entry.placement.rules, entry.losses
    counts = f"{len(rules):2d} rules  {len(entry.wrong):2d} wrong  {len(entry.excepted):2d} excepted"
    yield f"{name:42s} {counts}  {first:8.3f} -> {last:8.3f}  {seconds:5.1f} s{'' if entry.fell else '  ROSE'}"
    norms = entry.placement.norm.norms if entry.placement.norm else {}
    shapes = entry.placement.norm.shapes if entry.placement.norm else {}
    yield from (f"    needs {rule.pattern} {rule.role or rule.norm}" for rule in rules)
    for weight, why in entry.wrong.items():
        norm = str(norms[weight]).replace("[polar_express]", "")
        yield f"    wrong {weight} {shapes[weight]} {norm}: {'; '.join(why)}"
    yield from (f"    excepted {weight}: {why}" for weight, why in entry.excepted.items())


def table(names: list[str]) -> None:
    reports, failed = [], []
    for name in names:
        start = time.perf_counter()
        try:
            entry = report(name)
        except Exception as error:
            failed.append(name)
            print(f"{name:42s} FAILED {type(error).__name__}: {str(error)[:2000]}", flush=True)
            continue
        reports.append(entry)
        print(*lines(name, entry, time.perf_counter() - start), sep="\n", flush=True)
    rules = [len(entry.placement.rules) for entry in reports]
    print(
        f"{len(names)} entries: {rules.count(0)} need no rule, {rules.count(1)} one, "
        f"{sum(n > 1 for n in rules)} more, {len(failed)} failed; "
        f"{sum(len(entry.wrong) for entry in reports)} weights wrong in {sum(bool(e.wrong) for e in reports)} entries, "
        f"{sum(len(entry.excepted) for entry in reports)} excepted; "
        f"the loss fell in {sum(entry.fell for entry in reports)}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    table(sys.argv[1:] or [*ENTRIES])
