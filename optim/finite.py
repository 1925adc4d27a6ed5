"""Numbers that are not finite: found on the device, told to the host one step late.

A step never waits for the device to say that a gradient was a NaN. The device masks the whole step,
and what it knows goes to the host meanwhile, which raises at the next step or at check_finite().
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import NonFiniteError
from .ranks import Ranks

F = TypeVar("F", bound=Callable[..., Any])
norms_of = torch._foreach_norm  # one call for all tensors of a list


def eager(function: F) -> F:
    """Leave a function out of torch.compile's graphs: what the host learns later is not traced."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


def are_finite(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return of each tensor whether it is finite throughout, 0-dim bools. None of them is empty."""
    tensors = list(tensors)
    if all(x.device.type == "cpu" for x in tensors):
        # The 2-norm is 8 times as fast there as the largest entry. That is asked only where squares
        # are not finite, as they may overflow.
        finite = [torch.isfinite(x) for x in norms_of(tensors)]
        if torch.stack(finite).all():
            return finite
    return [torch.isfinite(x) for x in norms_of(tensors, torch.inf)]


class Watch:
    """Looks at every number of a step, on all ranks alike, and remembers what it saw for the host.

    groups, names: of the weights of the last step, and "the loss" as a further name. report: int32
    on the host, a row for what ranks have of their own, one for averages, one for which weights
    have a gradient on some rank; the first alone with one rank. An entry of the first two is 0, or
    w − r if rank r has that number not finite.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.groups: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.report: Tensor | None = None
        self.event: torch.Event | None = None
        self.counted = True
        self._presences: dict[tuple[bool, ...], Tensor] = {}  # on the device, by what this rank has

    def look(
        self,
        weights: Sequence[tuple[dict[str, Any], str, Tensor]],
        own: Sequence[Tensor | None],
        averages: Sequence[Tensor | None],
        loss: Tensor | None,
        device: torch.device,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (0-dim bool: every number on every rank is finite; (n,) bools: which weights have
        a gradient on some rank, None for one rank).

        weights: n of (group, name, parameter). own: their gradients. averages: where ranks have
        other ones of their own, else None. Collective: every rank calls it.
        """
        w, n = self.ranks.size, len(weights)
        numbers: list[Tensor | None] = [*own, loss]
        if w > 1:  # and the averages, which may overflow
            numbers += [*averages, None]
        nothing = torch.zeros(1, device=device)
        known = [nothing if x is None or not x.numel() else x.detach() for x in numbers]
        finite = torch.stack([x.to(device) for x in are_finite(known)])
        bad = torch.where(finite, 0, w - self.ranks.rank).to(torch.int32).view(-1, n + 1)
        ok, present, report = (bad == 0).all(), None, bad
        if w > 1:
            report = self.ranks.maximum(torch.cat((bad, self._presence(numbers[: n + 1], device))))
            ok, present = (report[:-1] == 0).all(), report[-1, :n] > 0
        self.report, self.event = report.to("cpu", non_blocking=report.is_cuda), None
        if report.is_cuda:
            self.event = torch.Event(report.device)
            self.event.record()
        self.groups = [group for group, *_ in weights]
        self.names, self.counted = [f"the gradient of {n}" for _, n, _ in weights], False
        if w == 1:
            self.count()
        return ok, present

    def _presence(self, numbers: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """Return (1, n + 1), 1 where there is a number on this rank; made once, as a copy waits."""
        present = tuple(x is not None for x in numbers)
        if present not in self._presences:
            known = torch.tensor(present, dtype=torch.int32)
            known = known.pin_memory() if device.type == "cuda" else known
            self._presences = {present: known.to(device, non_blocking=device.type == "cuda")}
        return self._presences[present][None]

    def _waited(self) -> list[list[int]]:
        """Return the report, once it is on the host."""
        if self.event is not None:
            self.event.synchronize()
        return [] if self.report is None else self.report.tolist()

    def count(self) -> None:
        """Add 1 to the calls of the groups of which some rank had a gradient in the last step."""
        if not self.counted:
            self.counted = True
            present = self._waited()[-1] if self.ranks.size > 1 else [1] * len(self.groups)
            moved = {id(g): g for g, x in zip(self.groups, present, strict=False) if x}
            for group in moved.values():
                group["calls"] += 1

    def check(self) -> None:
        """Raise NonFiniteError, once, if a number of the last step was not finite."""
        self.count()
        rows, w = self._waited(), self.ranks.size
        self.report = None
        own, averages = rows[0] if rows else [], rows[1] if len(rows) > 1 else []
        of = [f" on rank {w - code}" if w > 1 else "" for code in own]
        names = [*self.names, "the loss"]
        bad = [name + rank for name, rank, code in zip(names, of, own, strict=False) if code]
        if bad and own[-1]:  # the loss comes first: gradients follow it
            bad.insert(0, bad.pop())
        bad += [
            f"the average over ranks of {name}"
            for name, code, of_rank in zip(names, averages, own, strict=False)
            if code and not of_rank
        ]
        if bad:
            more = f" and of {len(bad) - 1} more" if len(bad) > 1 else ""
            call = max(group["calls"] for group in self.groups)
            raise NonFiniteError(
                f"{bad[0]}{more} was not finite in call {call} of step(); that step was not taken,"
                " weights and momentum are as before"
            )
