"""Dualized: steepest descent in the modular norm, one learning rate, one momentum buffer per
weight.

    W ← retract( W − lr · radius · ( dualize(direction) + weight_decay · W ) )

The arithmetic is in update.py, who steps which weight in placement.py, and every setting in
settings.py. Here is what joins them. step() asks in turn: what moves? are all numbers finite, on
all ranks? It then gathers weights of one shape into stacks, steps each, and scatters what changed.
Sources: [MD] Bernstein, Newhouse, arXiv 2410.21265; [MN] Large et al., arXiv 2405.14813.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from .directions import DIRECTIONS
from .errors import CopyError, PlacementError, Refusal, require
from .finite import Finding, Watch
from .metrize import metrize
from .modular import ModularNorm
from .norms import Norm
from .placement import OneProcess, Shards, interleave
from .ranks import Piece, check_sharded, ranks_of, sharded
from .replicas import Replicas
from .schedules import EscapeVelocity
from .settings import StepSettings, defaults_of, takes
from .stacks import Stack, clip_factor
from .state import SCHEMA, add_norms, by_name, check_group, grouped, members
from .update import by_rows

F = TypeVar("F", bound=Callable[..., Any])
LOW = (torch.bfloat16, torch.float16)
Entry = tuple[dict[str, Any], str, Tensor]  # (group, name, parameter)


def eager(function: F) -> F:
    """Leave a function out of torch.compile's graphs: what the host learns later is not traced."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


class Dualized(torch.optim.Optimizer):
    """Steepest descent under a modular norm.

    model_or_named_parameters: a module (see metrize), or (name, parameter) pairs with `norm`.
    lr: modular norm of one step, before decay; 0 makes step() an exact no-op. A tensor is allowed.
    "auto", or an EscapeVelocity, finds it: the groups' lr is then a multiplier, 1 at first, for
    schedules; one more copy of the weights is kept; 16-bit weights need master_weights for it.
    norm: the ModularNorm; by default metrize(model).
    grads: "reduced": p.grad is the same on all processes, or there is one; nothing is communicated.
    "local": every process of the default process group has the gradient of its own share of the
    batch; step() averages them, each weight is stepped by its owner alone, which has its momentum,
    and all get the result. See last_backward() and docs/cluster.md; GradScaler, whose ranks decide
    by themselves, does not go with it. Weights sharded by fully_shard stay so, under either.
    roles: settings of the weights of one role, {"bias": {"direction": "adam"}}.
    settings: by keyword, those of StepSettings (settings.py), which explains each of them.

    All but norm, grads and "auto" may differ by parameter group. A constraint holds for a block
    from its first step on, the row of a token from its first gradient. A head of norm 1 on inputs
    of RMS 1 gives logits of at most 1, unless the model scales them, as model.py does: else give
    the head a group without constraint.

    A gradient that is not finite makes the whole step a no-op, on all ranks, found on the device;
    the next step() or check_finite() raises NonFiniteError with the parameter's name and rank. A
    block whose gradient is exactly zero does not move, and its momentum stays. p.grad is never
    written. With several processes step(), and state_dict() with local gradients, are collective:
    every rank calls them. A gradient absent on some ranks counts as zero there.
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
            norm = norm or metrize(model)
        norm, groups = grouped(model, norm, roles or {})
        # Copied: groups added later bring norms and radii of their own.
        own = ("norms", "radii", "roles", "masses", "shapes")
        self.norm = replace(norm, **{k: dict(getattr(norm, k)) for k in own})
        auto = isinstance(lr, str) and lr == "auto"
        self.escape = EscapeVelocity() if auto else lr if isinstance(lr, EscapeVelocity) else None
        tensors = [p for group in groups for _, p in group["params"]]
        self._ranks = ranks_of(tensors, local=grads == "local")
        replicas = grads == "local" and self._ranks.size > 1
        self._placement = (Replicas if replicas else OneProcess)(self._ranks)
        self._shards: dict[Any, Shards] = {}
        self._forget_step()
        # Makes GradScaler call step() on every rank, where it can be refused on every rank; by
        # itself it would skip some and leave others waiting.
        self._step_supports_amp_scaling = self._placement.state_at_owners
        # calls: of step() with gradients and an lr; here, as checkpoint libraries keep only groups.
        defaults = defaults_of(StepSettings) | {"lr": 1.0 if self.escape else lr} | settings
        super().__init__(groups, check_group(defaults, auto=self.escape is not None) | {"calls": 0})

    def _forget_step(self) -> None:
        self._watch, self._finding, self._call = Watch(self._ranks), None, 0
        self._finding: Finding | None
        self._counts: list[dict[str, Any]] = []  # groups of the last step that are not counted yet
        self._radii: dict[tuple[Any, ...], Tensor] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, of named parameters. Existing radii stay.

        A parameter that the modular norm does not know needs the group's "norm" and "radius".
        """
        group = {k: v for k, v in param_group.items() if k not in ("norm", "radius")}
        group |= check_group(self.defaults | group, auto=self.escape is not None)
        group["params"] = add_norms(self.norm, param_group, members(self.param_groups))
        pairs = group["params"]
        if self.escape:
            # One tensor for all groups: it travels in the groups because checkpoint libraries keep
            # nothing else.
            known = self.param_groups[0]["step_size"] if self.param_groups else None
            group["step_size"] = self._new_step_size(pairs[0][1]) if known is None else known
        self._refuse_unsupported(group, pairs)
        super().add_param_group(group)
        entries: dict[OneProcess, list[tuple[Tensor, float, bool]]] = {}
        for name, p in pairs:
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

    def _refuse_unsupported(self, group: dict[str, Any], pairs: list[tuple[str, Tensor]]) -> None:
        for name, p in pairs:
            if not sharded(p):
                continue
            check_sharded(name, p)
            require(
                DIRECTIONS[group["direction"]].entrywise,
                name,
                got=f"the direction {group['direction']!r} of a sharded weight",
                allowed=f"{', '.join(k for k, d in DIRECTIONS.items() if d.entrywise)},"
                " entry by entry",
                fix='one of them, or replicas (grads="local"), whose owners have whole weights',
                error=PlacementError,
            )
            mesh = p.device_mesh  # type: ignore[attr-defined]
            require(
                (not self._shards or mesh in self._shards) and mesh.size() == self._ranks.size,
                name,
                got="a mesh that no weight before it has",
                allowed="one mesh",
                fix="build Dualized with sharded weights",
                error=PlacementError,
            )

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
        self._count()
        kept = {k: getattr(self, k) for k in ("norm", "escape", "_ranks", "_placement", "_shards")}
        return super().__getstate__() | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_step()

    @property
    def calls(self) -> int:
        """Number of calls of step() in which something was to be moved."""
        self._count()
        return max(group["calls"] for group in self.param_groups)

    @property
    def step_size(self) -> float | None:
        """The escape velocity η, or None without lr="auto". The modular norm of a step is η · lr.

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
            self._placement.receive_gradients()
            refresh = {id(g): g["calls"] % g["refresh_every"] == 0 for g, *_ in entries}
            ok, present = self._look(entries, loss)
            stacks = self._stacks(entries, ok, present, refresh)
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
        """Surround the last backward pass of a step: with grads="local", gradients leave for their
        owners as they come, while it goes on.

        Without it they leave in step(). What is written into p.grad after it (clipping, unscaling)
        is not seen. Every rank enters it or none.
        """
        with self._placement.sending_gradients():
            yield

    @eager
    def _moving(self) -> list[Entry]:
        """Return the parameters that may move in this step, each with its state made."""
        entries: list[Entry] = []
        for group, name, p in members(self.param_groups):
            if p.grad is not None and p.grad.is_sparse:
                raise Refusal(
                    name,
                    got="a sparse gradient",
                    allowed="dense ones",
                    fix="sparse=False in its module",
                )
            # What other ranks have is not known here: with several, every weight takes part, and
            # those without any gradient are masked.
            if p.grad is None and self._ranks.size == 1:
                continue
            self._make_state(group, p)  # at lr 0 too: checkpoint libraries have it made so
            lr = group["lr"]
            if (isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0:  # without waiting
                entries.append((group, name, p))
            apart = self.placement_of(p).rows_are_apart(p)
            require(
                not apart or by_rows(self.norm.norms[name], group),
                name,
                got="a direction, scale or constraint that needs whole weights, set after its rows"
                " were given to ranks",
                allowed="those that it was built with",
                fix="build Dualized with them",
                error=PlacementError,
            )
        return entries

    def _stacks(
        self, entries: list[Entry], ok: Tensor, present: Tensor | None, refresh: dict[int, bool]
    ) -> list[Stack]:
        """Return the weights by group, norm, shape, dtype and device."""
        clips: dict[int, Tensor | None] = {}
        equal: dict[tuple[Any, ...], list[tuple[int, Entry]]] = {}
        for i, (group, name, p) in enumerate(entries):
            if id(group) not in clips:
                own = [q for g, _, q in entries if g is group]
                clips[id(group)] = self._clip(own, group["max_grad_norm"])
            norm, place = self.norm.norms[name], self.placement_of(p)
            key = (id(group), place, norm, p.shape, p.dtype, p.device)
            equal.setdefault(key, []).append((i, entries[i]))
        stacks: list[Stack] = []
        for (_, place, norm, *_), alike in equal.items():
            group = alike[0][1][0]
            everyone = [p for _, (*_, p) in alike]
            mine = [
                (i, n, p)
                for i, (_, n, p) in alike
                if not place.state_at_owners or place.rows(p).numel()
            ]
            params = [p for *_, p in mine]
            rows = [place.rows(p) for p in params]
            weights = [self._precise(group, *pair) for pair in zip(params, rows, strict=True)]
            fine = ok
            if present is not None and mine:
                here = torch.stack([present[i] for i, *_ in mine])
                fine = ok & here.reshape(-1, *(1,) * norm.ndim)
            radii = self._radii_of(norm, [(n, p) for _, n, p in mine])
            names = (
                [k for k in self.state[params[0]] if k not in ("master", "start")] if params else []
            )
            state = {k: [place.from_state(self.state[p][k]) for p in params] for k in names}
            origin = [place.from_state(self.state[p]["start"]) for p in params if self.escape]
            clip, anew = clips[id(group)], refresh[id(group)]
            owned = (params, rows, weights, state, origin)
            stacks.append(Stack(group, norm, place, everyone, *owned, radii, fine, clip, anew))
        # What is stepped by rows is cheap to step and large to send: first, so that the rest hides
        # its way.
        return sorted(stacks, key=lambda s: not by_rows(s.norm, s.group))

    def _grow(self, stacks: list[Stack]) -> None:
        """Let the escape velocity grow, after what these gradients say."""
        if self.escape:
            step_size: Tensor = self.param_groups[0]["step_size"]
            terms: list[Tensor] = []
            interleave(s.escape(step_size, terms) for s in stacks)
            total = torch.stack(terms).sum(0) if terms else step_size.new_zeros(2)
            grown = self.escape.grow(step_size, *self._ranks.gather(total).sum(0))
            step_size.copy_(grown)

    def _clip(self, params: list[Tensor], limit: float | None) -> Tensor | None:
        if limit is None:
            return None
        places = [self.placement_of(p) for p in params]
        pairs = [(at.copies, at.gradient(p)) for at, p in zip(places, params, strict=True)]
        grads = [(copies, g) for copies, g in pairs if g is not None and g.numel()]
        return clip_factor(grads, limit, like=params, ranks=self._ranks)

    def _radii_of(self, norm: Norm, pairs: list[tuple[str, Tensor]]) -> Tensor:
        """Return the radii (n, 1…), made once: a copy to the device waits for it."""
        if not pairs:
            return torch.empty(0)
        values, p = tuple(self.norm.radii[n] for n, _ in pairs), pairs[0][1]
        key = (torch.promote_types(p.dtype, torch.float32), p.device, norm.ndim, values)
        if key not in self._radii:
            made = torch.tensor(values, dtype=key[0], device=p.device)
            self._radii[key] = made.reshape(-1, *(1,) * norm.ndim)
        return self._radii[key]

    def _precise(self, group: dict[str, Any], p: Tensor, rows: Tensor) -> Tensor:
        """Return what steps: rows of p, or their float32 master, brought up to date where somebody
        else has written p."""
        if not group["master_weights"] or p.dtype not in LOW:
            return rows
        place = self.placement_of(p)
        if "master" not in self.state[p]:
            self.state[p]["master"] = place.to_state(p, rows.detach().float())
        master = place.from_state(self.state[p]["master"])
        return master.copy_(torch.where(master.to(p.dtype) == rows, master, rows))

    # ---- numbers that are not finite

    @eager
    def _look(self, entries: list[Entry], loss: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (0-dim bool: every number on every rank is finite; (n,) bools: which weights have
        a gradient on some rank, None for one rank)."""
        places = [(self.placement_of(p), p) for *_, p in entries]
        own = [at.local_gradient(p) for at, p in places]
        averages = [at.gradient(p) if at.state_at_owners else None for at, p in places]
        device = places[0][0].rows(places[0][1]).device
        found = self._watch.look([n for _, n, _ in entries], own, averages, loss, device)
        self._finding, self._counts = found, [g for g, *_ in entries]
        self._call = 1 + max(g["calls"] for g in self._counts)
        if self._ranks.size == 1:
            self._count()
        return found.ok, found.present

    @eager
    def _count(self) -> None:
        """Count the last step in the groups of which some rank had a gradient: with several ranks
        that is known late."""
        if self._finding is not None and self._counts:
            present = self._finding.were_present()
            counted = {id(g): g for g, x in zip(self._counts, present, strict=True) if x}
            self._counts = []
            for group in counted.values():
                group["calls"] += 1

    @eager
    def check_finite(self) -> None:
        """Raise NonFiniteError if the last step met a gradient that was not finite. That step
        changed nothing."""
        if self._finding is not None:
            self._count()
            found, self._finding = self._finding, None
            found.check(self._call)

    # ---- state

    @torch.no_grad()
    def _make_state(self, group: dict[str, Any], p: Tensor) -> None:
        """Make the buffers of this rank's rows of p, if there are rows and no buffers yet."""
        place = self.placement_of(p)
        rows = place.rows(p).detach()
        if self.state.get(p) or (place.state_at_owners and not rows.numel()):
            return
        state: dict[str, Tensor] = {}
        if group["master_weights"] and p.dtype in LOW:
            state["master"] = rows.float()
        if self.escape:
            state["start"] = rows.clone()
        made = DIRECTIONS[group["direction"]].buffers(rows)
        assert not made.keys() & {"master", "start"}
        dtype = getattr(torch, group["momentum_dtype"] or "", None)
        for k, b in made.items():
            kept = dtype is None or b.dtype == torch.float64 or not b.is_floating_point()
            state[k] = b if kept else b.to(dtype)
        self.state[p].update({k: place.to_state(p, b) for k, b in state.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return torch's layout, with param_names in every group and a schema version.

        With local gradients it is the whole state, gathered on every rank.
        """
        self._count()
        saved = super().state_dict()
        if self._placement.state_at_owners:
            groups = zip(self.param_groups, saved["param_groups"], strict=True)
            for p, i in (
                x for own, s in groups for x in zip(own["params"], s["params"], strict=True)
            ):
                place = self.placement_of(p)
                whole = (
                    place.gather_state(p, self.state.get(p, {})) if place is self._placement else {}
                )
                if whole:
                    saved["state"][i] = whole
        return saved | {"schema": SCHEMA}

    def settings(self) -> list[dict[str, Any]]:
        """Return param_groups as state_dict() has them, without asking other ranks."""
        self._count()
        return super().state_dict()["param_groups"]

    def held(self) -> dict[str, Piece]:
        """Return this rank's part of the state, {"<parameter>.<buffer>": piece}, for checkpoints of
        pieces."""
        return {
            f"{n}.{k}": self.placement_of(p).piece_of_state(p, b)
            for _, n, p in members(self.param_groups)
            for k, b in self.state.get(p, {}).items()
        }

    def make_state(self, wanted: Callable[[str], bool]) -> None:
        """Make the buffers of the parameters of these names, as their first step would: held() can
        then be read into."""
        for group, name, p in members(self.param_groups):
            if wanted(name):
                self._make_state(group, p)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but matched by parameter name, whatever the order, and copied.

        A missing or unknown name raises before anything changes.
        """
        groups, state = by_name(state_dict, [list(g["param_names"]) for g in self.param_groups])
        for group, own in zip(groups, self.param_groups, strict=True):
            auto = "step_size" in group and all("start" in s for s in state.values())
            kinds = ("a fixed lr", "…"), ('lr="auto"', '"auto"')
            (theirs, fix), (ours, _) = kinds if self.escape else kinds[::-1]
            require(
                auto if self.escape else "step_size" not in group,
                "optimizer state",
                got=f"one saved with {theirs}",
                allowed=f"one saved with {ours}",
                fix=f"Dualized(model, lr={fix}), or start anew",
            )
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
                buffers = {k: v for k, v in state.get(i, {}).items() if isinstance(v, Tensor)}
                place = self.placement_of(p)
                parts = {k: place.cut(p, v.to(p.device)) for k, v in buffers.items()}
                own = {k: v for k, v in parts.items() if v is not None}
                if own:
                    self.state[p].update(own)
