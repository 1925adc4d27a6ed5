"""Dualized: steepest descent in the modular norm, with one learning rate.

    W ← retract( W − lr · radius · ( dualize(direction) + weight_decay · W ) )

The arithmetic is in update.py, who steps which weight in placement.py, and every setting in
settings.py. Here is what joins them. step() asks in turn: what moves? are all numbers finite, on
all ranks? It then gathers weights of one shape into stacks, steps each, and scatters what changed.
Sources: [MD] Bernstein, Newhouse, arXiv 2410.21265; [MN] Large et al., arXiv 2405.14813.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import CopyError, PlacementError, require
from .finite import Watch, eager
from .metrize import metrize
from .modular import ModularNorm
from .norms import Norm
from .placement import OneProcess, Shards, interleave
from .ranks import Piece, ranks_of, sharded
from .replicas import Replicas
from .schedules import EscapeVelocity
from .settings import StepSettings, defaults_of, known, takes
from .stacks import Radii, Stack, clip_factor, precise
from .state import (
    LOW,
    SCHEMA,
    Defaults,
    by_name,
    check_group,
    check_pairs,
    check_saved,
    check_shards,
    check_step,
    grouped,
    members,
    new_buffers,
    take_momentum,
)
from .update import by_rows

Entry = tuple[dict[str, Any], str, Tensor]  # (group, name, parameter)


class Dualized(torch.optim.Optimizer):
    """Steepest descent under a modular norm.

    model_or_named_parameters: a module (see metrize), or (name, parameter) pairs with `norm`.
    lr: modular norm of one step, before decay, in the coordinates of the direction; 0 makes step()
    an exact no-op. A tensor is allowed.
    "auto", or an EscapeVelocity, finds it, in runs of 500 steps or more: the groups' lr is then a
    multiplier, 1 at first, for schedules; one more copy of the weights is kept; 16-bit weights need
    master_weights for it.
    norm: the ModularNorm; by default metrize(model).
    grads: "reduced": p.grad is the same on all processes, or there is one; nothing is communicated.
    "local": every process of the default process group has the gradient of its own share of the
    batch; step() averages them, each weight is stepped by its owner alone, which has its momentum,
    and all get the result. See last_backward() and docs/cluster.md; GradScaler, whose ranks decide
    by themselves, does not go with it. Weights sharded by fully_shard stay so, under either.
    roles: settings of the weights of one role, {"bias": {"direction": "adam"}}.
    settings: by keyword, those of StepSettings (settings.py), which explains each of them.

    All but norm, grads and "auto" may differ by parameter group. A constraint holds for a block
    from its first step on, the row of a token from its first gradient. With a constraint, multiply
    your logits (ours: × 10), or leave the head unconstrained, in a group of its own: a head of norm
    1 on inputs of RMS 1 gives logits of at most 1.

    A gradient that is not finite makes the whole step a no-op, on all ranks, found on the device;
    the next step() or check_finite() raises NonFiniteError with the parameter's name and rank (of
    shards, the rank that has the rows). A block whose gradient is exactly zero does not move, and
    its momentum stays. p.grad is never written. With several processes step(), and state_dict()
    with local gradients, are collective: every rank calls them. A gradient absent on some ranks
    counts as zero there.
    """

    @takes(StepSettings)
    def __init__(
        self,
        model_or_named_parameters: nn.Module | Iterable[Any],
        lr: float | Tensor | Literal["auto"] | EscapeVelocity = StepSettings.lr,
        *,
        norm: ModularNorm | None = None,
        grads: Literal["reduced", "local"] = "reduced",
        roles: Mapping[str, Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        model = model_or_named_parameters
        require(
            grads in ("reduced", "local"),
            "Dualized: grads",
            got=repr(grads),
            allowed="reduced, local",
            fix="Dualized(…, grads=…)",
        )
        require(
            grads == "reduced" or type(model).__name__ != "DistributedDataParallel",
            'Dualized(DistributedDataParallel(…), grads="local")',
            got="gradients that DDP has reduced already",
            allowed='the bare module, or grads="reduced"',
            fix="one of them",
            error=PlacementError,
        )
        if isinstance(model, nn.Module):
            norm = norm or metrize(model, tell=True)
        norm, groups = grouped(model, norm, roles or {})
        # Copied: groups added later bring norms and radii of their own.
        own = ("norms", "radii", "roles", "masses", "shapes")
        self.norm = replace(norm, **{k: dict(getattr(norm, k)) for k in own})
        auto = isinstance(lr, str) and lr == "auto"
        self.escape = EscapeVelocity() if auto else lr if isinstance(lr, EscapeVelocity) else None
        tensors = [p for group in groups for _, p in group["params"]]
        self._ranks = ranks_of(tensors, local=grads == "local")
        replicas = grads == "local" and self._ranks.size > 1
        self._placement = (Replicas if replicas else OneProcess)(self._ranks)  # of whole weights
        self._shards: dict[Any, Shards] = {}  # of sharded ones, by mesh
        self._forget_step()
        # GradScaler then calls step() on every rank, which refuses it; else it would skip some.
        self._step_supports_amp_scaling = self._placement.state_at_owners
        # calls: of step() with gradients and an lr; here, as checkpoint libraries keep only groups.
        known("Dualized", settings, defaults_of(StepSettings))
        defaults = defaults_of(StepSettings) | {"lr": 1.0 if self.escape else lr} | settings
        settings = check_group(defaults, auto=self.escape is not None)
        super().__init__(groups, Defaults(settings, calls=0))

    def _forget_step(self) -> None:
        self._watch, self._radii = Watch(self._ranks), Radii()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, of named parameters. Existing radii stay.

        A parameter that the modular norm does not know needs the group's "norm" and "radius".
        """
        group = {k: v for k, v in param_group.items() if k not in ("norm", "radius")}
        group |= check_group(self.defaults | group, auto=self.escape is not None)
        pairs = check_pairs(self.norm, param_group, members(self.param_groups))
        group["params"] = pairs
        if self.escape:
            # One tensor for all groups, in the groups: checkpoint libraries keep nothing else.
            old = self.param_groups
            group["step_size"] = old[0]["step_size"] if old else self._new_step_size(pairs[0][1])
        check_shards(group, pairs, self._ranks, self._shards)
        super().add_param_group(group)
        entries: dict[OneProcess, list[tuple[Tensor, float, bool]]] = {}
        for name, p in pairs:
            if name not in self.norm.norms:
                self.norm.norms[name] = param_group["norm"]
                self.norm.radii[name] = float(param_group["radius"])
                self.norm.shapes[name] = tuple(p.shape)
            norm = self.norm.norms[name]
            entry = (p, float(norm.flops(p.shape)), by_rows(norm, self.param_groups[-1]))
            entries.setdefault(self.placement_of(p), []).append(entry)
        for place, placed in entries.items():
            place.assign(placed)

    def placement_of(self, p: Tensor) -> OneProcess:
        """Return who steps a weight: this process, replicas or shards."""
        if not sharded(p):
            return self._placement
        mesh = p.device_mesh  # type: ignore[attr-defined]
        return self._shards.setdefault(mesh, Shards(self._ranks, mesh))

    def _new_step_size(self, p: Tensor, value: float | Tensor | None = None) -> Tensor:
        assert self.escape
        value = self.escape.initial if value is None else value
        dtype = torch.promote_types(p.dtype, torch.float32)
        return torch.as_tensor(value, dtype=dtype, device=p.device).clone()

    def __getstate__(self) -> dict[str, Any]:
        require(
            self._ranks.size == 1,
            "Dualized of several processes",
            got="a copy or pickle of it",
            allowed="state_dict() of one, loaded into another",
            fix="copy the model, build Dualized anew, and load_state_dict()",
            error=CopyError,
        )
        self._watch.count()
        kept = {k: getattr(self, k) for k in ("norm", "escape", "_ranks", "_placement", "_shards")}
        return super().__getstate__() | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # load_state_dict() ends here, too: a step before it is over
        self._forget_step()

    @property
    def calls(self) -> int:
        """Return the number of calls of step() in which something was to be moved."""
        self._watch.count()
        return max(group["calls"] for group in self.param_groups)

    @property
    def step_size(self) -> float | None:
        """Return the escape velocity η, None without lr="auto". A step has the modular norm η · lr.

        Reading it waits for the device.
        """
        return self.param_groups[0]["step_size"].item() if self.escape else None

    # ---- the step

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, loss: Tensor | None = None
    ) -> Any:
        """Take one step. Returns what the closure does.

        loss: this rank's, 0-dim; one that is not finite stops the step as such a gradient does.
        """
        require(
            not (self._placement.state_at_owners and hasattr(self, "found_inf")),
            'GradScaler with grads="local"',
            got="a decision of each rank by itself",
            allowed='bfloat16, which needs no scaler, or grads="reduced" behind DDP',
            fix="one of them",
            error=PlacementError,
        )
        self.check_finite()
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        entries = self._moving()
        if entries:
            self._placement.receive_gradients()  # of replicas; shards have theirs
            # Before this call is counted.
            refresh = {id(g): g["calls"] % g["refresh_every"] == 0 for g in self.param_groups}
            stacks = self._stacks(entries, refresh, *self._look(entries, loss))
            self._grow(stacks)
            interleave(s.step() for s in stacks)
        self._placement.drop_gradients()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero gradients as torch does, and forget those that last_backward() has sent."""
        super().zero_grad(set_to_none)
        self._placement.drop_gradients()

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Surround the last backward pass: with grads="local", gradients leave as they come.

        Without it they leave in step(). What is written into p.grad after it (clipping, unscaling)
        is not seen. Every rank enters it or none.
        """
        with self._placement.sending_gradients():
            yield

    @eager
    def _moving(self) -> list[Entry]:
        """Return the parameters that may move in this step, each with its state made."""
        take_momentum(self.param_groups)
        entries: list[Entry] = []
        for group, name, p in members(self.param_groups):
            apart = self.placement_of(p).rows_are_apart(p)
            check_step(name, p, fits=not apart or by_rows(self.norm.norms[name], group))
            # One rank does not know which gradients others have: with several ranks every weight
            # takes part, and those without any gradient are masked.
            if p.grad is None and self._ranks.size == 1:
                continue
            self._make_state(
                group, self.norm.norms[name], p
            )  # at lr 0 too: checkpoint libraries have it made so
            lr = group["lr"]
            if (isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0:  # without waiting
                entries.append((group, name, p))
        return entries

    def _stacks(
        self, entries: list[Entry], refresh: dict[int, bool], ok: Tensor, present: Tensor | None
    ) -> list[Stack]:
        """Return the weights by group, norm, shape, dtype and device.

        ok, present: what Watch.look() says of them.
        """
        equal: dict[tuple[Any, ...], list[tuple[Entry, Tensor | None]]] = {}
        of_group: dict[int, list[Entry]] = {}
        for i, entry in enumerate(entries):
            group, name, p = entry
            of_group.setdefault(id(group), []).append(entry)
            key = (
                id(group),
                self.placement_of(p),
                self.norm.norms[name],
                p.shape,
                p.dtype,
                p.device,
            )
            equal.setdefault(key, []).append((entry, None if present is None else present[i]))
        clips = {k: self._clip(entries) for k, entries in of_group.items()}
        stacks = [
            self._stack(norm, place, alike, ok, clips[group], refresh[group])
            for (group, place, norm, *_), alike in equal.items()
        ]
        # Stacks that are stepped by rows are cheap to step and large to send. They come first, so
        # that they travel while the rest is computed.
        return sorted(stacks, key=lambda s: not s.by_rows)

    def _stack(
        self,
        norm: Norm,
        place: OneProcess,
        alike: list[tuple[Entry, Tensor | None]],
        ok: Tensor,
        clip: Tensor | None,
        refresh: bool,
    ) -> Stack:
        """Return a stack of weights, with the part of each that this rank steps."""
        group, masters = alike[0][0][0], alike[0][0][0]["master_weights"]
        mine = [
            (name, p, present)
            for (_, name, p), present in alike
            if not place.state_at_owners or place.rows(p).numel()
        ]
        presences = [present for *_, present in mine if present is not None]
        if presences:
            ok = ok & torch.stack(presences).reshape(-1, *(1,) * norm.ndim)
        params = [p for _, p, _ in mine]
        rows = [place.rows(p) for p in params]
        buffers: dict[str, list[Tensor]] = {}
        for p in params:
            for k, b in self.state[p].items():
                buffers.setdefault(k, []).append(place.from_state(b))
        return Stack(
            group,
            norm,
            place,
            everyone=[p for (*_, p), _ in alike],
            params=params,
            rows=rows,
            weights=[
                precise(self.state[p], place, p, x) if masters and x.dtype in LOW else x
                for p, x in zip(params, rows, strict=True)
            ],
            origin=buffers.pop("start", []),
            buffers={k: b for k, b in buffers.items() if k != "master"},
            radii=self._radii.of([self.norm.radii[n] for n, *_ in mine], params, norm.ndim),
            ok=ok,
            clip=clip,
            refresh=refresh,
        )

    def _grow(self, stacks: list[Stack]) -> None:
        """Let the escape velocity grow, after what these gradients say."""
        if self.escape:
            step_size: Tensor = self.param_groups[0]["step_size"]
            terms: list[Tensor] = []
            interleave(s.escape(step_size, terms) for s in stacks)
            total = torch.stack(terms).sum(0) if terms else step_size.new_zeros(2)
            grown = self.escape.grow(step_size, *self._ranks.gather(total).sum(0))
            step_size.copy_(grown)

    def _clip(self, entries: list[Entry]) -> Tensor | None:
        limit = entries[0][0]["max_grad_norm"]
        if limit is None:
            return None
        params = [p for *_, p in entries]
        pairs = [(self.placement_of(p).copies, self.placement_of(p).gradient(p)) for p in params]
        grads = [(copies, g) for copies, g in pairs if g is not None and g.numel()]
        return clip_factor(grads, limit, like=params, ranks=self._ranks)

    # ---- numbers that are not finite

    @eager
    def _look(self, entries: list[Entry], loss: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Do as Watch.look() says."""
        places = [(self.placement_of(p), p) for *_, p in entries]
        own = [at.local_gradient(p) for at, p in places]
        averages = [at.gradient(p) if at.state_at_owners else None for at, p in places]
        device = places[0][0].rows(places[0][1]).device
        return self._watch.look(entries, own, averages, loss, device)

    @eager
    def check_finite(self) -> None:
        """Raise NonFiniteError if a number of the last step was not finite: it was not taken."""
        self._watch.check()

    # ---- state

    @torch.no_grad()
    def _make_state(self, group: dict[str, Any], norm: Norm, p: Tensor) -> None:
        """Make the buffers of this rank's rows of p, if there are rows and no buffers yet."""
        place = self.placement_of(p)
        if self.state.get(p) or (place.state_at_owners and not place.rows(p).numel()):
            return
        state = new_buffers(group, norm, place, p, origin=bool(self.escape))
        self.state[p].update({k: place.to_state(p, b) for k, b in state.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return torch's layout, with names and a schema; local gradients: gathered from ranks."""
        self._watch.count()
        saved = super().state_dict()
        if self._placement.state_at_owners:
            own = (p for group in self.param_groups for p in group["params"])
            for p, i in zip(
                own, (i for g in saved["param_groups"] for i in g["params"]), strict=True
            ):
                if (place := self.placement_of(p)) is self._placement:
                    saved["state"][i] = place.gather_state(p, self.state.get(p, {}))
            saved["state"] = {i: buffers for i, buffers in saved["state"].items() if buffers}
        return saved | {"schema": SCHEMA}

    def settings(self) -> list[dict[str, Any]]:
        """Return param_groups as state_dict() has them, without asking other ranks."""
        self._watch.count()
        return super().state_dict()["param_groups"]

    def held(self) -> dict[str, Piece]:
        """Return this rank's part of the state, {"<parameter>.<buffer>": piece}."""
        return {
            f"{n}.{k}": self.placement_of(p).piece_of_state(p, b)
            for _, n, p in members(self.param_groups)
            for k, b in self.state.get(p, {}).items()
        }

    def make_state(self, wanted: Callable[[str], bool]) -> None:
        """Make the buffers of parameters of these names, so that held() can be read into."""
        for group, name, p in members(self.param_groups):
            if wanted(name):
                self._make_state(group, self.norm.norms[name], p)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but matched by parameter name, whatever the order, and copied.

        A missing or unknown name raises before anything changes.
        """
        groups, state = by_name(state_dict, [list(g["param_names"]) for g in self.param_groups])
        for group, own in zip(groups, self.param_groups, strict=True):
            check_saved(group, state, auto=self.escape is not None)
            if self.escape:
                group["step_size"] = self._new_step_size(own["params"][0], groups[0]["step_size"])
            # Saved by a version that had fewer settings.
            group.update({k: v for k, v in own.items() if k not in group})
        super().load_state_dict({"state": {}, "param_groups": groups})
        for group, saved in zip(self.param_groups, groups, strict=True):
            if self.escape:
                group["step_size"] = self.param_groups[0]["step_size"]
            for p, i in zip(group["params"], saved["params"], strict=True):
                # Not by torch, which casts buffers to the weight's dtype: masters, and momentum of
                # another one, would lose their digits.
                place, buffers = self.placement_of(p), state.get(i, {}).items()
                parts = {
                    k: place.cut(p, v.to(p.device)) for k, v in buffers if isinstance(v, Tensor)
                }
                if any(v is not None for v in parts.values()):
                    self.state[p].update({k: v for k, v in parts.items() if v is not None})
