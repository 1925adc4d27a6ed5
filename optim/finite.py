"""Numbers that are not finite: found on the device, told to the host one step late.

A step never waits for the device to say that a gradient was a NaN. The device masks the whole step,
and what it knows goes to the host meanwhile, which raises at the next step or at check_finite().
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import NonFiniteError
from .ranks import Ranks

norms = torch._foreach_norm


def are_finite(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return of each tensor whether it is finite throughout, 0-dim bools. None of them is empty."""
    tensors = list(tensors)
    if all(x.device.type == "cpu" for x in tensors):
        # The 2-norm is 8 times as fast there as the largest entry. That is asked only where squares
        # are not finite, as they may overflow.
        finite = [torch.isfinite(x) for x in norms(tensors)]
        if torch.stack(finite).all():
            return finite
    return [torch.isfinite(x) for x in norms(tensors, torch.inf)]


@dataclass
class Finding:
    """What the device knows of one step, on its way to the host.

    names: of the gradients, and "the loss" last. ok: 0-dim bool on the device, every number on
    every rank is finite. present: (n,) bools, which weights have a gradient on some rank; None for
    one rank.
    host: int32, a row for what ranks have of their own, one for averages, one for present; (1, n +
    1) with one rank. An entry of the first two is 0, or w − r if rank r has that number not finite.
    """

    names: list[str]
    ok: Tensor
    present: Tensor | None
    host: Tensor
    event: torch.Event | None
    ranks: Ranks

    def waited(self) -> Tensor:
        """Return host, once it is there."""
        if self.event is not None:
            self.event.synchronize()
        return self.host

    def were_present(self) -> list[bool]:
        """Return which weights had a gradient on some rank."""
        n = len(self.names) - 1
        return (
            [True] * n if self.ranks.size == 1 else [x > 0 for x in self.waited()[-1, :n].tolist()]
        )

    def check(self, call: int) -> None:
        """Raise NonFiniteError if a number was not finite. call: of step(), for the message."""
        w, host = self.ranks.size, self.waited()
        bad = host[:-1] if w > 1 else host
        if not bad.any():
            return
        own, *averages = bad.tolist()
        culprits = [
            f"{name} on rank {w - code}" if w > 1 else name
            for name, code in zip(self.names, own, strict=True)
            if code
        ]
        if own[-1]:  # the loss comes first: gradients follow it
            culprits.insert(0, culprits.pop())
        for average in averages:
            culprits += [
                f"the average over ranks of {name}"
                for name, code, of_rank in zip(self.names, average, own, strict=True)
                if code and not of_rank
            ]
        more = f" and of {len(culprits) - 1} more" if len(culprits) > 1 else ""
        raise NonFiniteError(
            f"{culprits[0]}{more} was not finite in call {call} of step(); that step was not taken,"
            " weights and momentum are as before"
        )


class Watch:
    """Looks at every number of a step, on all ranks alike."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._here: dict[tuple[bool, ...], Tensor] = {}  # on the device: which gradients are here

    def look(
        self,
        names: Sequence[str],
        own: Sequence[Tensor | None],
        averages: Sequence[Tensor | None],
        loss: Tensor | None,
        device: torch.device,
    ) -> Finding:
        """Return what is found of n gradients, of their averages where several ranks have them
        (None where they are the same), and of a loss. Collective: every rank calls it."""
        w, n = self.ranks.size, len(names)
        numbers: list[Tensor | None] = [*own, loss]
        if w > 1:  # and the averages, which may overflow
            numbers += [*averages, None]
        nothing = torch.zeros(1, device=device)
        known = [nothing if x is None or not x.numel() else x.detach() for x in numbers]
        finite = torch.stack([x.to(device) for x in are_finite(known)])
        told = torch.where(finite, 0, w - self.ranks.rank).to(torch.int32).view(-1, n + 1)
        ok, present = (told == 0).all(), None
        if w > 1:
            told = self.ranks.maximum(torch.cat((told, self._presence(numbers[: n + 1], device))))
            ok, present = (told[:-1] == 0).all(), told[-1, :n] > 0
        host, event = told.to("cpu", non_blocking=told.is_cuda), None
        if told.is_cuda:
            event = torch.Event(told.device)
            event.record()
        labels = [f"the gradient of {name}" for name in names]
        return Finding([*labels, "the loss"], ok, present, host, event, self.ranks)

    def _presence(self, numbers: Sequence[Any], device: torch.device) -> Tensor:
        """Return (1, n + 1), 1 where there is a number on this rank; made once, as a copy waits."""
        here = tuple(x is not None for x in numbers)
        if here not in self._here:
            known = torch.tensor(here, dtype=torch.int32)
            on_device = (
                known.pin_memory().to(device, non_blocking=True)
                if device.type == "cuda"
                else known.to(device)
            )
            self._here = {here: on_device}
        return self._here[here][None]
