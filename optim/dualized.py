"""Dualized: steepest descent in the modular norm, one learning rate, one momentum buffer per weight. Normalized: any base optimizer in that norm.

    W ← retract( W − lr · radius · (dualize(direction) + weight_decay · W) )

Stacks: (n, *shape), the n weights of one (group, norm, shape, dtype, device), so that equal shapes cost one batched call.
Sources: [MD] Bernstein, Newhouse, arXiv 2410.21265; [MN] Large et al., arXiv 2405.14813.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import inf
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from .comm import Alone, Job, Piece, Replicas, Shards, ranks_of, run, sharded
from .directions import DIRECTIONS
from .errors import CopyError, CoverageError, NonFiniteError, PlacementError, Refusal
from .metrize import canonical, check_distinct, metrize
from .modular import ModularNorm
from .norms import Norm
from .schedules import EscapeVelocity

F = TypeVar("F", bound=Callable[..., Any])
SCHEMA = 2  # of state_dict()
LOW = (torch.bfloat16, torch.float16)
LONG = (
    2**18
)  # entries of a table from which on only the rows that have a gradient are read and written
DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
Constraint = Literal["ball", "sphere", "stiefel"]
RETRACTIONS: dict[str, Callable[[Norm, Tensor], Tensor]] = {
    "ball": lambda norm, W: norm.project(W),
    "sphere": lambda norm, W: norm.sphere(W),
    "stiefel": lambda norm, W: norm.stiefel(W),
}


def _eager(function: F) -> F:
    """Left out of torch.compile's graphs: what is for the host to know later must not be traced."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


def retract(W: Tensor, *, norm: Norm, constraint: str) -> Tensor:
    """A stack (n, *shape) on its constraint. Vectors and scalars are kept in the ball: a bias of norm 1 for ever would be another model."""
    return RETRACTIONS[constraint if norm.ndim >= 2 else "ball"](norm, W)


def _finite(grads: list[Tensor]) -> list[Tensor]:
    """0-dim bools: which gradients are finite throughout. None of them is empty."""
    if all(g.device.type == "cpu" for g in grads):
        # 8 times as fast there as the largest entry, which is asked only where squares are not finite, as they may overflow.
        found = [torch.isfinite(x) for x in torch._foreach_norm(grads)]  # pyright: ignore[reportPrivateImportUsage]
        if torch.stack(found).all():
            return found
    return [torch.isfinite(x) for x in torch._foreach_norm(grads, torch.inf)]  # pyright: ignore[reportPrivateImportUsage]


def escape_terms(
    G: Tensor, dual: Tensor, start: list[Tensor], weights: list[Tensor], radii: Tensor
) -> Tensor:
    """(⟨G, W₀ − W⟩, Σ radius · ‖G‖†) of a stack (2,): what its gradients say that the way from W₀ was worth, and their share of the dual norm.

    G: (n, *shape), 0 where nothing is live. dual: dualize(G), which attains the dual norm. Nothing is written.
    """
    worth = torch.stack(
        [(g * (w0 - w)).sum() for g, w0, w in zip(G, start, weights, strict=True)]
    ).sum()
    return torch.stack([worth, (G * dual * radii).sum()])


@dataclass
class _Stack:
    """Equal-shaped weights of one group that step together, and what this rank steps of them.

    everyone: all parameters of the stack; params: those of which this rank has pieces. weights: what steps, the pieces or
    their masters; radii: (n, 1…); ok: a bool, or one for each (n, 1…).
    """

    group: dict[str, Any]
    norm: Norm
    at: Alone
    everyone: list[Tensor]
    params: list[Tensor]
    pieces: list[Tensor]
    weights: list[Tensor]
    radii: Tensor
    ok: Tensor
    clip: Tensor | None
    refresh: bool

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(G (n, *shape), a copy, clipped and 0 where nothing is live; live, a mask broadcastable to it)."""
        grads = [self.at.gradient(p) for p in self.params]
        G = torch.stack(
            [
                torch.zeros_like(w) if g is None else g
                for g, w in zip(grads, self.weights, strict=True)
            ]
        ).to(self.radii.dtype)
        ok = self.ok.to(G.device)
        if isinstance(self.group["lr"], Tensor):
            ok = ok & (self.group["lr"] != 0).to(G.device)
        fresh = self.norm.live(G)
        live = ok if fresh is None else fresh & ok
        if self.clip is not None:
            G.mul_(self.clip.to(G))
        return G.masked_fill_(~live, 0), live


@dataclass
class _Watch:
    """What is known on the device of the last step, on its way to the host.

    host: int32, a column for each of the n gradients and for the loss; rows: the number of the rank that has it not finite, counted down from w to 1,
    0 for none; of the average likewise; whether there is one. The last two with several ranks only. groups: of the gradients.
    """

    host: Tensor
    event: torch.Event | None
    names: list[str]
    groups: list[dict[str, Any]]
    call: int
    counted: bool = False

    def wait(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.host


def _validate(settings: dict[str, Any], *, auto: bool = False) -> None:
    """Raise ValueError for an impossible setting of a parameter group."""

    def number(low: float, high: float) -> Callable[[Any], bool]:
        return lambda x: low <= x < high

    checks: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
        (
            "lr",
            'a finite number >= 0, or "auto" for all groups',
            lambda x: x.device.type != "cpu" or x >= 0 if isinstance(x, Tensor) else 0 <= x < inf,
        ),
        ("beta", "0 <= beta < 1", number(0, 1)),
        ("beta2", "0 <= beta2 < 1", number(0, 1)),
        ("refresh_every", "1 or more steps", lambda x: isinstance(x, int) and x >= 1),
        ("weight_decay", "a finite number >= 0", number(0, inf)),
        ("cautious", "true or false", lambda x: isinstance(x, bool)),
        ("direction", ", ".join(DIRECTIONS), lambda x: x in DIRECTIONS),
        (
            "scale",
            '"unit" with lr="auto"' if auto else "unit, dual",
            lambda x: x == "unit" or (x == "dual" and not auto),
        ),
        ("constraint", f"None, {', '.join(RETRACTIONS)}", lambda x: x is None or x in RETRACTIONS),
        ("momentum_dtype", 'None (the weight\'s), "float32", "bfloat16"', lambda x: x in DTYPES),
        ("max_grad_norm", "None or a number > 0", lambda x: x is None or x > 0),
    )
    for what, allowed, fine in checks:
        try:
            good = fine(settings[what])
        except TypeError:
            good = False
        if not good:
            raise Refusal(
                f"Dualized: {what}",
                got=repr(settings[what]),
                allowed=allowed,
                fix=f"Dualized(…, {what}=…), or the same key of its parameter group",
            )


class Dualized(torch.optim.Optimizer):
    """Steepest descent under a modular norm.

    model_or_named_parameters: a module (see metrize), or (name, parameter) pairs with `norm`.
    lr: modular norm of one step, before decay; 0 makes step() an exact no-op. A tensor is allowed. "auto", or an EscapeVelocity, finds it: the
    groups' lr is then a multiplier, 1 at first, for schedules; one more copy of the weights is kept. 16-bit weights need master_weights for it.
    norm: the ModularNorm; by default metrize(model). direction: a name in DIRECTIONS. beta: decay of the momentum average (0.95 is slow).
    beta2: of Adam's and SOAP's squares, and of Lion's average. refresh_every: steps between SOAP's eigenbases.
    weight_decay: decoupled and scaled by the radius: every weight stays within norm 1/weight_decay (times the polar band's upper edge).
    cautious: decay only the entries that the step makes smaller anyway (Chen et al., arXiv 2510.12402); that ball is then none.
    constraint: "ball" keeps every weight at norm <= 1, "sphere" at norm 1, by one scalar per block (matrix, head, row); "stiefel" sets all singular values
    of spectrally normed weights. Vectors and scalars are kept in the ball. Blocks join it at their first step, the row of a token with its first
    gradient. A head of norm 1 on inputs of RMS 1 gives logits of at most 1, unless the model scales them, as model.py does: else give the head
    a group without constraint.
    scale: "unit" steps have norm lr; "dual" steps are each weight's dual norm times that, plain steepest descent (with Frobenius: gradient descent).
    grads: "reduced": p.grad is the same on all processes, or there is one; nothing is communicated. "local": every process of the default process group has the
    gradient of its own share of the batch; step() averages them, each weight is stepped by its owner alone, which has its momentum, and all get the
    result. See last_backward() and docs/cluster.md; GradScaler, whose ranks decide by themselves, does not go with it. Weights sharded by fully_shard stay so, under either.
    max_grad_norm: clip the 2-norm of a parameter group's raw gradients; updates are never clipped.
    momentum_dtype: of the buffers, "float32" or "bfloat16" (whose 8 bits stall averages of beta above 0.99); None is the weight's, and 64-bit
    weights keep theirs. master_weights: keep 16-bit weights in float32 besides, and step there; what others write into a weight counts.
    All but norm and "auto" may differ by parameter group.

    A gradient that is not finite makes the whole step a no-op, on all ranks, found on the device; the next step() or check_finite() raises NonFiniteError
    with the parameter's name and rank. p.grad is never written. With several processes step(), and state_dict() with local gradients, are
    collective: every rank calls them. A gradient absent on some ranks counts as zero there.
    """

    def __init__(
        self,
        model_or_named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
        lr: float | Tensor | Literal["auto"] | EscapeVelocity,
        *,
        norm: ModularNorm | None = None,
        direction: str = "momentum",
        beta: float = 0.95,
        beta2: float = 0.99,
        refresh_every: int = 10,
        weight_decay: float = 0.0,
        cautious: bool = False,
        constraint: Constraint | None = None,
        scale: Literal["unit", "dual"] = "unit",
        grads: Literal["reduced", "local"] = "reduced",
        max_grad_norm: float | None = None,
        momentum_dtype: Literal["float32", "bfloat16"] | torch.dtype | None = None,
        master_weights: bool = False,
    ) -> None:
        momentum_dtype = (
            str(momentum_dtype).removeprefix("torch.")
            if isinstance(momentum_dtype, torch.dtype)
            else momentum_dtype
        )  # type: ignore[assignment]
        named: list[Any]
        if isinstance(model_or_named_parameters, nn.Module):
            norm = norm or metrize(model_or_named_parameters)
            named = [
                (n, p) for n, p in model_or_named_parameters.named_parameters() if p.requires_grad
            ]
        else:
            named = list(model_or_named_parameters)
            if not all(isinstance(x, dict) for x in named):
                named = [(n, p) for n, p in _pairs(named) if p.requires_grad]
            if norm is None:
                raise CoverageError(
                    "Dualized of named parameters",
                    got="no norm",
                    allowed="named parameters with a norm, or a module",
                    fix="pass norm=ModularNorm(...), or the model itself",
                )
        # Copied: groups added later bring norms and radii of their own.
        self.norm = replace(
            norm,
            **{k: dict(getattr(norm, k)) for k in ("norms", "radii", "roles", "masses", "shapes")},
        )
        self.escape = (
            EscapeVelocity()
            if isinstance(lr, str) and lr == "auto"
            else lr
            if isinstance(lr, EscapeVelocity)
            else None
        )
        self._watch: _Watch | None = None
        self._radii: dict[tuple[Any, ...], Tensor] = {}
        self._here: dict[
            tuple[bool, ...], Tensor
        ] = {}  # on the device: which weights have a gradient on this rank
        if grads not in ("reduced", "local"):
            raise Refusal(
                "Dualized: grads",
                got=repr(grads),
                allowed="reduced, local",
                fix="Dualized(…, grads=…)",
            )
        if (
            grads == "local"
            and type(model_or_named_parameters).__name__ == "DistributedDataParallel"
        ):
            raise PlacementError(
                'Dualized(DistributedDataParallel(…), grads="local")',
                got="gradients that DDP has reduced already",
                allowed='the bare module, or grads="reduced"',
                fix="one of them",
            )
        tensors = [
            p for x in named for _, p in (_pairs(x["params"]) if isinstance(x, dict) else [x])
        ]
        self._ranks = ranks_of(tensors, local=grads == "local")
        self._plain = (Replicas if grads == "local" and self._ranks.size > 1 else Alone)(
            self._ranks
        )
        self._shards: dict[Any, Shards] = {}
        # Makes GradScaler call step() on every rank, where it can be refused on every rank; by itself it would skip some and leave others waiting.
        self._step_supports_amp_scaling = self._plain.owned
        defaults = dict(
            lr=1.0 if self.escape else lr,
            direction=direction,
            beta=beta,
            beta2=beta2,
            refresh_every=refresh_every,
            weight_decay=weight_decay,
            cautious=cautious,
            constraint=constraint,
            scale=scale,
            max_grad_norm=max_grad_norm,
            momentum_dtype=momentum_dtype,
            master_weights=master_weights,
            calls=0,  # of step() with gradients and an lr; here, as checkpoint libraries keep the groups and nothing else
        )
        _validate(defaults, auto=self.escape is not None)
        super().__init__(named, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with named parameters; one that the modular norm does not know needs the group's "norm" and "radius". Existing radii stay."""
        group = {k: v for k, v in param_group.items() if k not in ("norm", "radius")}
        norm, radius = param_group.get("norm"), param_group.get("radius")
        pairs = [(canonical(n), p) for n, p in _pairs(group["params"])]
        group["params"] = pairs
        _validate(self.defaults | group, auto=self.escape is not None)
        check_distinct(
            [*(n for g in self.param_groups for n in g["param_names"]), *(n for n, _ in pairs)]
        )
        for name, p in pairs:
            known = self.norm.norms.get(name)
            if known is not None and (norm is not None or radius is not None):
                raise CoverageError(
                    name,
                    got="a second norm or radius",
                    allowed=f"the norm {known} and radius {self.norm.radii[name]:g} that it has already",
                    fix="leave norm and radius out of its group",
                )
            if known is None and (norm is None or radius is None):
                raise CoverageError(
                    name,
                    got=f"no norm or no radius ({norm!r} and {radius!r})",
                    allowed="both, for a parameter that is added",
                    fix='give its group "norm" and "radius"',
                )
            placed = known or norm
            if not isinstance(placed, Norm) or (radius is not None and not 0 <= radius < inf):
                raise CoverageError(
                    name,
                    got=f"norm {norm!r}, radius {radius!r}",
                    allowed="a Norm and a finite number >= 0",
                    fix="RMSToRMS() and 0.1, say",
                )
            wrong = placed.check(p.shape)
            if wrong or p.is_complex():
                raise CoverageError(
                    f"{name}: got shape {tuple(p.shape)}, {p.dtype}; allowed by {placed}: {wrong or 'real numbers'}"
                )
        if self.escape:
            # One tensor for all groups: it travels in the groups because checkpoint libraries keep nothing else.
            group["step_size"] = (
                self.param_groups[0]["step_size"]
                if self.param_groups
                else self._new_step_size([p for _, p in pairs])
            )
        self._refuse_unsupported(self.defaults | group, pairs)
        super().add_param_group(group)
        for name, p in pairs:
            if norm is not None and radius is not None:
                self.norm.norms[name], self.norm.radii[name], self.norm.shapes[name] = (
                    norm,
                    float(radius),
                    tuple(p.shape),
                )
        entries: dict[Alone, list[tuple[Tensor, float, bool]]] = {}
        for name, p in pairs:
            norm = self.norm.norms[name]
            entries.setdefault(self._at(p), []).append(
                (p, float(norm.flops(p.shape)), _by_rows(norm, self.param_groups[-1]))
            )
        for at, placed in entries.items():
            at.place(placed)

    def _at(self, p: Tensor) -> Alone:
        """Where a weight is stepped."""
        if not sharded(p):
            return self._plain
        mesh = p.device_mesh  # type: ignore[attr-defined]
        return self._shards.setdefault(mesh, Shards(self._ranks, mesh))

    def _refuse_unsupported(self, group: dict[str, Any], pairs: list[tuple[str, Tensor]]) -> None:
        for name, p in pairs:
            if not sharded(p):
                continue
            Shards.check(name, p)  # type: ignore[arg-type]
            if not DIRECTIONS[group["direction"]].entrywise:
                fine = ", ".join(k for k, d in DIRECTIONS.items() if d.entrywise)
                raise PlacementError(
                    name,
                    got=f"the direction {group['direction']!r} of a sharded weight",
                    allowed=f"{fine}, entry by entry",
                    fix='one of them, or replicas (grads="local"), whose owners have whole weights',
                )
            mesh = p.device_mesh  # type: ignore[attr-defined]
            if (self._shards and mesh not in self._shards) or mesh.size() != self._ranks.size:
                raise PlacementError(
                    name,
                    got="a mesh that no weight before it has",
                    allowed="one mesh",
                    fix="build Dualized with sharded weights",
                )

    def _new_step_size(self, params: list[Tensor], value: float | Tensor | None = None) -> Tensor:
        assert self.escape and params
        dtype = torch.promote_types(params[0].dtype, torch.float32)
        return torch.as_tensor(
            self.escape.initial if value is None else value, dtype=dtype, device=params[0].device
        ).clone()

    def __getstate__(self) -> dict[str, Any]:
        if self._ranks.size > 1:
            raise CopyError(
                "Dualized of several processes",
                got="a copy or pickle of it",
                allowed="state_dict() of one, loaded into another",
            )
        kept = {k: getattr(self, k) for k in ("norm", "escape", "_ranks", "_plain", "_shards")}
        return super().__getstate__() | kept | {"_watch": None, "_radii": {}, "_here": {}}

    @property
    def calls(self) -> int:
        """Of step(), where something was to be moved."""
        self._count()
        return max(group["calls"] for group in self.param_groups)

    @property
    def step_size(self) -> float | None:
        """The escape velocity η, or None without lr="auto". The modular norm of a step is η · lr. Reading it waits for the device."""
        return self.param_groups[0]["step_size"].item() if self.escape else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Tensor | None = None) -> Any:  # type: ignore[override]
        """One step. loss: this rank's, 0-dim; one that is not finite stops the step as such a gradient does. Returns what closure does."""
        if self._plain.owned and hasattr(self, "found_inf"):
            raise PlacementError(
                'GradScaler with grads="local"',
                got="a decision of each rank by itself",
                allowed='bfloat16, which needs no scaler, or grads="reduced" behind DDP',
                fix="one of them",
            )
        self.check_finite()
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        entries: list[tuple[dict[str, Any], str, Tensor]] = []
        for group in self.param_groups:
            lr = group["lr"]
            moves = (
                isinstance(lr, Tensor) and lr.device.type != "cpu"
            ) or lr != 0  # without waiting for a device
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if p.grad is not None and p.grad.is_sparse:
                    raise Refusal(
                        name,
                        got="a sparse gradient",
                        allowed="dense ones",
                        fix="sparse=False in its module",
                    )
                # What other ranks have is not known here: with several, every weight takes part, and those without any gradient are masked.
                if p.grad is not None or self._ranks.size > 1:
                    self._make_state(group, p)  # at lr 0 too: checkpoint libraries have it made so
                    if moves:
                        entries.append((group, name, p))
                    if self._at(p).splits(p) and not _by_rows(self.norm.norms[name], group):
                        raise PlacementError(
                            name,
                            got="a direction, scale or constraint that needs whole weights, set after its rows were given to ranks",
                            allowed="those that it was built with",
                            fix="build Dualized with them",
                        )
        if not entries:
            self._plain.forget()
            return result
        groups = list({id(g): g for g, *_ in entries}.values())
        self._plain.receive_gradients()
        refresh = [group["calls"] % group["refresh_every"] == 0 for group in groups]
        ok, present = self._all_finite(entries, loss)
        stacks: list[_Stack] = []
        for group, anew in zip(groups, refresh, strict=True):
            mine = [(i, name, p) for i, (g, name, p) in enumerate(entries) if g is group]
            clip = self._clip([p for *_, p in mine], group["max_grad_norm"])
            equal: dict[tuple[Any, ...], list[tuple[int, str, Tensor]]] = {}
            for i, name, p in mine:
                equal.setdefault(
                    (self._at(p), self.norm.norms[name], p.shape, p.dtype, p.device), []
                ).append((i, name, p))
            for key, members in equal.items():
                at, norm, *_ = key
                held = [(i, n, p) for i, n, p in members if not at.owned or at.piece(p).numel()]
                pieces = [at.piece(p) for *_, p in held]
                weights = [
                    self._precise(group, p, piece)
                    for (*_, p), piece in zip(held, pieces, strict=True)
                ]
                live = ok
                if present is not None and held:
                    live = ok & torch.stack([present[i] for i, *_ in held]).reshape(
                        -1, *(1,) * norm.ndim
                    )
                radii = self._radii_of(norm, [(n, p) for _, n, p in held])
                stacks.append(
                    _Stack(
                        group,
                        norm,
                        at,
                        [p for *_, p in members],
                        [p for *_, p in held],
                        pieces,
                        weights,
                        radii,
                        live,
                        clip,
                        anew,
                    )
                )
        # What is stepped by rows is cheap to step and large to send: first, so that the rest hides its way.
        stacks.sort(key=lambda s: not _by_rows(s.norm, s.group))
        ahead = max(s.at.ahead for s in stacks)
        step_size = self._grow(stacks, ahead) if self.escape else None
        run([self._step_stack(s, step_size) for s in stacks], ahead=ahead)
        self._plain.forget()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; gradients that last_backward() has sent for a step that was not taken are forgotten."""
        super().zero_grad(set_to_none)
        self._plain.forget()

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Around the last backward pass of a step: with grads="local", gradients leave for their owners as they come, while it goes on.

        Without it they leave in step(). What is written into p.grad after it (clipping, unscaling) is not seen. Every rank enters it or none.
        """
        with self._plain.listening():
            yield

    def _grow(self, stacks: list[_Stack], ahead: int) -> Tensor:
        """The escape velocity, after what these gradients say."""
        assert self.escape
        step_size, parts = self.param_groups[0]["step_size"], []

        def terms(s: _Stack) -> Job:
            if not s.params:
                return
            G, _ = s.gradients()
            dual = yield from s.at.whole(
                s.norm.dualize, G, s.params, by_rows=s.norm.dualizes_by_rows
            )
            start = [s.at.local(self.state[p]["start"]) for p in s.params]
            parts.append(
                escape_terms(G, dual, start, s.weights, s.radii).to(step_size) / s.at.copies
            )

        run((terms(s) for s in stacks), ahead=ahead)
        total = torch.stack(parts).sum(0) if parts else step_size.new_zeros(2)
        return step_size.copy_(self.escape.grow(step_size, *self._ranks.gather(total).sum(0)))

    def _clip(self, params: list[Tensor], limit: float | None) -> Tensor | None:
        """The factor, at most 1, that brings the gradients' 2-norm to the limit; scaled by the largest entry first, so that no square overflows."""
        if limit is None:
            return None
        dtype = reduce(
            torch.promote_types, (p.dtype for p in params), torch.float32
        )  # the same on all ranks
        by_copies: dict[int, list[Tensor]] = {}
        for p in params:
            g = self._at(p).gradient(p)
            if g is not None and g.numel():
                by_copies.setdefault(self._at(p).copies, []).append(g)
        parts = [torch.zeros((), device=params[0].device, dtype=dtype)]
        for copies, grads in by_copies.items():
            largest = torch.nn.utils.get_total_norm(grads, torch.inf)
            scale = torch.where(largest > 0, largest, 1)
            parts.append(
                scale.to(dtype)
                * torch.nn.utils.get_total_norm([g / scale.to(g) for g in grads]).to(dtype)
                / copies**0.5
            )
        total = _length(self._ranks.gather(_length(torch.stack(parts))))
        return (limit / total).clamp(max=1)

    def _radii_of(self, norm: Norm, pairs: list[tuple[str, Tensor]]) -> Tensor:
        """(n, 1…), made once: a copy to the device waits for it."""
        if not pairs:
            return torch.empty(0)
        values = tuple(self.norm.radii[n] for n, _ in pairs)
        p = pairs[0][1]
        key = (torch.promote_types(p.dtype, torch.float32), p.device, norm.ndim, values)
        if key not in self._radii:
            self._radii[key] = torch.tensor(values, dtype=key[0], device=p.device).reshape(
                -1, *(1,) * norm.ndim
            )
        return self._radii[key]

    def _make_state(self, group: dict[str, Any], p: Tensor) -> None:
        """The buffers of this rank's piece of p, where there is one and it has none yet."""
        at = self._at(p)
        piece = at.piece(p).detach()
        if self.state.get(p) or (at.owned and not piece.numel()):
            return
        state: dict[str, Tensor] = {}
        if group["master_weights"] and p.dtype in LOW:
            state["master"] = piece.float()
        if self.escape:
            state["start"] = piece.clone()
        made = DIRECTIONS[group["direction"]].buffers(piece)
        clash = made.keys() & {"master", "start"}
        assert not clash, clash
        dtype = DTYPES[group["momentum_dtype"]]
        kept = (torch.float64, *(b.dtype for b in made.values() if not b.is_floating_point()))
        state |= {
            k: b if dtype is None or b.dtype in kept else b.to(dtype) for k, b in made.items()
        }
        self.state[p].update({k: at.keep(p, b) for k, b in state.items()})

    def _precise(self, group: dict[str, Any], p: Tensor, piece: Tensor) -> Tensor:
        """What steps: the piece of p, or its float32 master, brought up to date where somebody else has written p."""
        if not group["master_weights"] or p.dtype not in LOW:
            return piece
        at = self._at(p)
        if "master" not in self.state[p]:
            self.state[p]["master"] = at.keep(p, piece.detach().float())
        master = at.local(self.state[p]["master"])
        return master.copy_(torch.where(master.to(p.dtype) == piece, master, piece))

    def _step_stack(self, s: _Stack, step_size: Tensor | None) -> Job:
        """W ← retract(W − lr · radius · (dualize(direction) + weight_decay · W)), the direction's buffers first. Yields as run() wants it."""
        if s.params:
            yield from self._step_pieces(s, step_size)
        if s.at.ahead:
            yield from s.at.publish(s.everyone)

    def _step_pieces(self, s: _Stack, step_size: Tensor | None) -> Job:
        group, at = s.group, s.at
        if (rows := self._live_rows(s)) is not None:
            return self._step_rows(s, rows)
        G, live = s.gradients()
        held = {
            k: [at.local(self.state[p][k]) for p in s.params]
            for k in self.state[s.params[0]]
            if k not in ("master", "start")
        }
        state = {
            k: _stack(buffers).to(torch.promote_types(buffers[0].dtype, torch.float32))
            for k, buffers in held.items()
        }
        direct = DIRECTIONS[group["direction"]]
        if not direct.gated:
            state = {k: v.clone() for k, v in state.items()}
        D = direct(
            G,
            state,
            live=live.to(G.dtype),
            beta=group["beta"],
            beta2=group["beta2"],
            refresh=s.refresh,
        )
        for k, buffers in held.items():
            if not direct.gated:
                ok = s.ok if s.ok.ndim == 0 else s.ok.reshape(-1, *(1,) * (state[k].ndim - 1))
                state[k] = torch.where(
                    live if state[k].shape == D.shape else ok, state[k], torch.stack(buffers)
                )
            if (
                len(buffers) > 1 or not direct.gated or state[k].dtype != buffers[0].dtype
            ):  # else the buffer itself was updated
                torch._foreach_copy_(buffers, state[k].unbind())  # pyright: ignore[reportPrivateImportUsage]
        del G, state
        dualize = s.norm.sharp if group["scale"] == "dual" else s.norm.dualize_
        if at.ahead:
            D = yield from at.whole(
                dualize, D, s.params, by_rows=s.norm.dualizes_by_rows and group["scale"] == "unit"
            )
        else:  # what torch.compile can follow
            D = dualize(D)
        U = D.mul_(s.radii).masked_fill_(~live, 0)
        del D
        lr = group["lr"] if step_size is None else group["lr"] * step_size
        lr = lr.to(U) if isinstance(lr, Tensor) else lr
        # What decay and retraction do is not part of the way that the escape velocity measures: W₀ moves along.
        start = [at.local(self.state[p]["start"]) for p in s.params] if self.escape else []
        if group["weight_decay"]:
            W = _stack(s.weights)
            decays = live & (U * W > 0) if group["cautious"] else live
            decay = torch.where(decays, W, 0).mul_(s.radii * group["weight_decay"]).mul_(lr)
            torch._foreach_sub_(s.weights, decay.unbind())  # pyright: ignore[reportPrivateImportUsage]
            if start:
                torch._foreach_sub_(start, decay.unbind())  # pyright: ignore[reportPrivateImportUsage]
            del decay
        if isinstance(lr, Tensor):
            torch._foreach_sub_(s.weights, U.mul_(lr).unbind())  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_add_(s.weights, U.unbind(), alpha=-lr)  # pyright: ignore[reportPrivateImportUsage]
        del U
        if group["constraint"] is not None:
            W = _stack(s.weights)
            onto = partial(retract, norm=s.norm, constraint=group["constraint"])
            R = (
                (yield from at.whole(onto, W, s.params, by_rows=s.norm.retracts_by_rows))
                if at.ahead
                else onto(W)
            )
            R = torch.where(live & (s.radii > 0), R, W)
            if start:
                torch._foreach_add_(start, (R - W).unbind())  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_copy_(s.weights, R.unbind())  # pyright: ignore[reportPrivateImportUsage]
        if s.weights[0] is not s.pieces[0]:
            torch._foreach_copy_(s.pieces, s.weights)  # pyright: ignore[reportPrivateImportUsage]

    def _live_rows(self, s: _Stack) -> Tensor | None:
        """The rows of a long table that have a gradient, where all others would be left as they are; None where the whole stack steps.

        For one weight that no other process steps, on the CPU, where the host need not wait to know them.
        """
        group = s.group
        whole = (
            self.escape
            or group["weight_decay"]
            or group["constraint"]
            or s.clip is not None
            or isinstance(group["lr"], Tensor)
        )
        alone = (
            len(s.params) == 1
            and self._ranks.size == 1
            and not sharded(s.params[0])
            and s.weights[0] is s.pieces[0]
        )
        if (
            whole
            or not alone
            or s.weights[0].device.type != "cpu"
            or s.weights[0].numel() < LONG
            or torch.compiler.is_compiling()
        ):
            return None
        direction, buffers = DIRECTIONS[group["direction"]], self.state[s.params[0]].values()
        if (
            not _by_rows(s.norm, group)
            or not direction.gated
            or any(b.shape != s.weights[0].shape for b in buffers)
        ):
            return None
        g = s.at.gradient(s.params[0])
        if (
            g is None
            or g.ndim != 2
            or any(x.dtype != torch.float32 for x in (s.weights[0], g, *buffers))
            or not s.ok
        ):
            return None
        return (
            ((g.amax(-1) != 0) | (g.amin(-1) != 0)).nonzero().squeeze(-1)
        )  # 7 times as fast as (g != 0).any(-1)

    def _step_rows(self, s: _Stack, rows: Tensor) -> None:
        """What _step_pieces does, of these rows of one weight alone: the same numbers, bit for bit."""
        (p,), (W,), group = s.params, s.weights, s.group
        G = s.at.gradient(p).index_select(0, rows)[None]  # type: ignore[union-attr]
        state = {k: b.index_select(0, rows)[None] for k, b in self.state[p].items()}
        D = DIRECTIONS[group["direction"]](
            G,
            state,
            live=torch.ones_like(s.radii),
            beta=group["beta"],
            beta2=group["beta2"],
            refresh=s.refresh,
        )
        for k, b in self.state[p].items():
            b.index_copy_(0, rows, state[k][0])
        U = s.norm.dualize_(D).mul_(s.radii)[0]
        W.index_copy_(0, rows, W.index_select(0, rows).add_(U, alpha=-group["lr"]))

    @_eager
    def _all_finite(
        self, entries: list[tuple[dict[str, Any], str, Tensor]], loss: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(0-dim bool, the same on all ranks: every number is finite; (n,) bool: the weight has a gradient on some rank, None for one rank).

        What was not finite, and where, goes to the host without waiting for it.
        """
        w, n = self._ranks.size, len(entries)
        device = self._at(entries[0][2]).piece(entries[0][2]).device
        nothing = torch.zeros(1, device=device)
        numbers = [self._at(p).own(p) for *_, p in entries] + [loss]
        if w > 1:  # and the averages, which may overflow
            numbers += [
                self._at(p).gradient(p) if self._at(p).owned else None for *_, p in entries
            ] + [None]
        finite = _finite([nothing if x is None or not x.numel() else x.detach() for x in numbers])
        bad = (
            torch.where(torch.stack([x.to(device) for x in finite]), 0, w - self._ranks.rank)
            .to(torch.int32)
            .view(-1, n + 1)
        )
        ok, present, told = (bad == 0).all(), None, bad
        if w > 1:
            here = tuple(x is not None for x in numbers[: n + 1])
            if here not in self._here:
                known = torch.tensor(here, dtype=torch.int32)
                self._here = {
                    here: known.pin_memory().to(device, non_blocking=True)
                    if device.type == "cuda"
                    else known.to(device)
                }
            told = self._ranks.maximum(torch.cat((bad, self._here[here][None])))
            ok, present = (told[:-1] == 0).all(), told[-1, :n] > 0
        host, event = told.to("cpu", non_blocking=told.is_cuda), None
        if told.is_cuda:
            event = torch.Event(told.device)
            event.record()
        names, groups = (
            [f"the gradient of {name}" for _, name, _ in entries] + ["the loss"],
            [group for group, *_ in entries],
        )
        self._watch = _Watch(host, event, names, groups, 1 + max(g["calls"] for g in groups))
        if w == 1:
            self._count()
        return ok, present

    @_eager
    def _count(self) -> None:
        """Let the last step count in the groups of which some rank had a gradient: with several ranks that is known late."""
        watch = self._watch
        if watch is not None and not watch.counted:
            watch.counted = True
            here = watch.wait()[-1].tolist() if self._ranks.size > 1 else [1] * len(watch.groups)
            for group in {
                id(g): g for g, there in zip(watch.groups, here, strict=False) if there
            }.values():
                group["calls"] += 1

    @_eager
    def check_finite(self) -> None:
        """Raise NonFiniteError if the last step met a gradient that was not finite. That step changed nothing."""
        if self._watch is None:
            return
        self._count()
        watch, self._watch = self._watch, None
        w, host = self._ranks.size, watch.wait()
        bad = host[:-1] if w > 1 else host
        if not bad.any():
            return
        local, *average = bad.tolist()
        found = [
            f"{name} on rank {w - code}" if w > 1 else name
            for name, code in zip(watch.names, local, strict=True)
            if code
        ]
        if local[-1]:  # the loss comes first: gradients follow it
            found.insert(0, found.pop())
        for codes in average:
            found += [
                f"the average over ranks of {n}"
                for n, code, own in zip(watch.names, codes, local, strict=True)
                if code and not own
            ]
        more = f" and of {len(found) - 1} more" if len(found) > 1 else ""
        raise NonFiniteError(
            f"{found[0]}{more} was not finite in call {watch.call} of step(); that step was not taken, weights and momentum are as before"
        )

    def state_dict(self) -> dict[str, Any]:
        """torch's layout, with param_names in every group and a schema version. With local gradients: the whole state, gathered on every rank."""
        self._count()
        found = super().state_dict()
        if self._plain.owned:
            for group, saved in zip(self.param_groups, found["param_groups"], strict=True):
                for p, i in zip(group["params"], saved["params"], strict=True):
                    if self._plain is self._at(p) and (
                        whole := self._plain.collect(p, self.state.get(p, {}))
                    ):
                        found["state"][i] = whole
        return found | {"schema": SCHEMA}

    def settings(self) -> list[dict[str, Any]]:
        """param_groups as state_dict() has them, without asking other ranks."""
        self._count()
        return super().state_dict()["param_groups"]

    def held(self) -> dict[str, Piece]:
        """This rank's part of the state: {"<parameter>.<buffer>": piece}. For checkpoints of pieces, as checkpoint.py writes them."""
        named = [
            (n, p)
            for g in self.param_groups
            for n, p in zip(g["param_names"], g["params"], strict=True)
        ]
        return {
            f"{n}.{k}": self._at(p).held(p, b)
            for n, p in named
            for k, b in self.state.get(p, {}).items()
        }

    @torch.no_grad()
    def make_state(self, wanted: Callable[[str], bool]) -> None:
        """Make the buffers of the parameters of these names that have none, as their first step would: held() can then be read into."""
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if wanted(name):
                    self._make_state(group, p)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but matched by parameter name, whatever the order, and copied; a missing or unknown name raises before anything changes."""
        groups, state = by_name(state_dict, [list(g["param_names"]) for g in self.param_groups])
        for group, own in zip(groups, self.param_groups, strict=True):
            if self.escape:
                if "step_size" not in group or any("start" not in s for s in state.values()):
                    raise Refusal(
                        "optimizer state",
                        got="one saved with a fixed lr",
                        allowed='one saved with lr="auto"',
                        fix="Dualized(model, lr=…), or start anew",
                    )
                group["step_size"] = self._new_step_size(own["params"], groups[0]["step_size"])
            elif "step_size" in group:
                raise Refusal(
                    "optimizer state",
                    got='one saved with lr="auto"',
                    allowed="one saved with a fixed lr",
                    fix='Dualized(model, lr="auto")',
                )
            group.update(
                {k: v for k, v in own.items() if k not in group}
            )  # saved by a version that had fewer settings
        super().load_state_dict({"state": {}, "param_groups": groups})
        for group in self.param_groups:
            if self.escape:
                group["step_size"] = self.param_groups[0]["step_size"]
        for group, saved in zip(self.param_groups, groups, strict=True):
            for p, i in zip(group["params"], saved["params"], strict=True):
                # Not by torch, which casts buffers to the weight's dtype: masters, and momentum of another one, would lose their digits.
                taken = {
                    k: self._at(p).take(p, v.to(p.device))
                    for k, v in state.get(i, {}).items()
                    if isinstance(v, Tensor)
                }
                if any(v is not None for v in taken.values()):
                    self.state[p].update({k: v for k, v in taken.items() if v is not None})


class Normalized(torch.optim.Optimizer):
    """Any base optimizer in the modular norm [MN]: its own update u, each tensor of it rescaled to lr · radius / ‖u‖.

    base_optimizer: a torch optimizer of named parameters, Adam(model.named_parameters(), …), with weight_decay 0. Its groups and its state are
    this optimizer's; their lr is the modular norm of one step.
    norm: the ModularNorm, or the model (see metrize). weight_decay: as in Dualized. by_block: see ModularNorm.normalize.
    from_zero: the base steps from zero weights, with lr 1, so that u comes without rounding in any dtype; False for a base that reads the weights
    (Adafactor, LAMB): u is then the difference of the weights, and its rounding error is theirs. Where some groups' lr is 0, the base still counts the step.

    A gradient that is not finite raises NonFiniteError before anything changes: the base cannot be gated on the device.
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        norm: ModularNorm | nn.Module,
        lr: float | Tensor,
        *,
        weight_decay: float = 0.0,
        by_block: bool = False,
        from_zero: bool = True,
    ) -> None:
        self.base, self.weight_decay, self.by_block, self.from_zero = (
            base_optimizer,
            weight_decay,
            by_block,
            from_zero,
        )
        self.norm = metrize(norm) if isinstance(norm, nn.Module) else norm
        kind, groups = type(base_optimizer).__name__, base_optimizer.param_groups

        def refuse(got: str, allowed: str, fix: str) -> None:
            raise CoverageError("Normalized", got=got, allowed=allowed, fix=fix)

        if isinstance(lr, str) or (not isinstance(lr, Tensor) and not 0 <= lr < inf):
            refuse(f"lr {lr!r}", "a finite number >= 0", "Normalized(base, norm, lr=0.1)")
        if kind in ("LBFGS", "ASGD"):
            refuse(
                f"{kind}, which keeps weights or closures of its own",
                "bases that turn gradients into an update",
                "another base",
            )
        if from_zero and kind in ("Adafactor", "Lamb", "LAMB"):
            refuse(
                f"{kind}, whose update depends on the weights", "with from_zero=False", "pass it"
            )
        if len({float(g["lr"]) for g in groups}) > 1:
            refuse(
                "a base whose groups have different lr",
                "one lr",
                "give all its groups one lr: radii are what differs by weight",
            )
        for group in groups:
            if group.get("weight_decay"):
                refuse(
                    f"a base with weight_decay {group['weight_decay']:g}",
                    "0, or decay would be rescaled with the update",
                    "weight_decay=0 in the base, and Normalized(…, weight_decay=…)",
                )
            if "param_names" not in group:
                refuse(
                    f"{kind} of parameters without names",
                    "named ones",
                    f"{kind}(model.named_parameters(), …)",
                )
        found = {
            canonical(n): p
            for g in groups
            for n, p in zip(g["param_names"], g["params"], strict=True)
            if p.requires_grad
        }
        if found.keys() != self.norm.norms.keys():
            odd = sorted(found.keys() ^ self.norm.norms.keys())[0]
            refuse(
                f"{odd!r} in {'the base' if odd in found else 'the norm'} alone",
                "the same parameters in both",
                f"{kind}(model.named_parameters(), …)",
            )
        for name, p in found.items():
            if sharded(p):
                refuse(
                    f"{name}, a sharded weight (DTensor)",
                    "whole ones",
                    "Dualized, whose owners have whole weights",
                )
            if wrong := self.norm.norms[name].check(p.shape):
                refuse(
                    f"{name} of shape {tuple(p.shape)}",
                    wrong,
                    "metrize the model that the base was built for",
                )
        for group in groups:
            group["param_names"], group["lr"] = [canonical(n) for n in group["param_names"]], lr
        super().__init__(base_optimizer.param_groups, {"lr": lr})
        # One truth: schedulers, GradScaler and checkpoints see the base's groups and state.
        self.param_groups, self.state = base_optimizer.param_groups, base_optimizer.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [g for g in self.param_groups if float(g["lr"]) != 0]
        moving = [
            (g, n, p)
            for g in groups
            for n, p in zip(g["param_names"], g["params"], strict=True)
            if p.grad is not None
        ]
        if not moving:
            return loss
        finite = torch.stack(
            _finite([p.grad for *_, p in moving])
        ).tolist()  # one wait for the device, not one a weight
        if not all(finite):
            name = moving[finite.index(False)][1]
            raise NonFiniteError(
                f"the gradient of {name} is not finite; the step was not taken, weights and the base's state are as before"
            )
        old = [p.detach().clone() for *_, p in moving]
        if self.from_zero:
            torch._foreach_zero_([p for *_, p in moving])  # pyright: ignore[reportPrivateImportUsage]
        lrs = [g["lr"] for g in self.param_groups]
        try:
            for group in self.param_groups:
                group["lr"] = (
                    torch.ones_like(group["lr"]) if isinstance(group["lr"], Tensor) else 1.0
                )
            self.base.step()
            updates = {
                n: -p if self.from_zero else w - p for (_, n, p), w in zip(moving, old, strict=True)
            }
        finally:
            for group, own in zip(self.param_groups, lrs, strict=True):
                group["lr"] = own
            torch._foreach_copy_([p for *_, p in moving], old)  # pyright: ignore[reportPrivateImportUsage]
        for group, name, p in moving:
            radius, U = self.norm.radii[name], updates.pop(name).unsqueeze(0)
            norm = self.norm.norms[name]
            U = norm.sphere(U)[0] if self.by_block else norm.normalize(U)[0]
            if self.weight_decay:
                U = torch.where((U != 0).any(), U + self.weight_decay * p, U)
            p.sub_(U * (group["lr"] * radius))
        return loss

    def __getstate__(self) -> dict[str, Any]:
        kept = ("base", "norm", "weight_decay", "by_block", "from_zero")
        return super().__getstate__() | {k: getattr(self, k) for k in kept}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once built: the base would not know it."""
        if hasattr(self, "state") and self.state is self.base.state:
            raise CoverageError(
                "Normalized",
                got="a group of parameters after construction",
                allowed="before",
                fix="add it to the base and build Normalized anew",
            )
        super().add_param_group({k: v for k, v in param_group.items() if k != "param_names"})

    def state_dict(self) -> dict[str, Any]:
        """The base's."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The base's, matched by parameter name."""
        groups, state = by_name(
            state_dict, [list(g["param_names"]) for g in self.param_groups], schema=None
        )
        self.base.load_state_dict({"state": state, "param_groups": groups})
        self.param_groups, self.state = self.base.param_groups, self.base.state


def by_name(
    state_dict: dict[str, Any], names: list[list[str]], *, schema: int | None = SCHEMA
) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """(groups, state) of a saved optimizer for these groups of parameter names, tensors copied. Raises ValueError before anything changes."""
    if any("param_names" not in g for g in state_dict["param_groups"]):
        raise Refusal(
            "optimizer state",
            got="groups without param_names",
            allowed="the state of an optimizer of named parameters",
            fix="save Dualized's own",
        )
    if schema is not None and not 1 <= state_dict.get("schema", schema) <= schema:
        raise Refusal(
            "optimizer state",
            got=f"schema {state_dict['schema']}",
            allowed=f"1 to {schema}",
            fix="use the version that saved it",
        )
    saved = {
        canonical(n): (g, i)
        for g in state_dict["param_groups"]
        for n, i in zip(g["param_names"], g["params"], strict=True)
    }
    ours = [n for group in names for n in group]
    if saved.keys() != set(ours):
        odd = sorted(saved.keys() ^ set(ours))
        raise Refusal(
            "optimizer state",
            got=f"other parameters; {odd[0]!r} is {('missing' if odd[0] in ours else 'unknown')}",
            allowed="the same names",
            fix="load it into the model that it was saved with",
        )
    for group in names:
        if any(saved[n][0] is not saved[group[0]][0] for n in group):
            raise Refusal(
                "optimizer state",
                got=f"parameters of one group here in several there, {group[0]!r} among them",
                allowed="the same groups",
                fix="build the optimizer with the groups that it was saved with",
            )
    groups = [
        {**saved[group[0]][0], "params": [saved[n][1] for n in group], "param_names": group}
        for group in names
    ]
    # Cloned: torch keeps the loaded tensors themselves, and two optimizers would then share one momentum.
    state = {
        i: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()}
        for i, s in state_dict["state"].items()
    }
    return groups, state


def _pairs(named: Any) -> list[tuple[str, Tensor]]:
    """One (name, parameter) pair or several, as a list."""
    one = isinstance(named, tuple) and len(named) == 2 and isinstance(named[0], str)
    pairs = [named] if one else list(named)
    if any(not (isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str)) for x in pairs):
        raise CoverageError(
            "Dualized of a list of tensors",
            got="tensors without names",
            allowed="a module, or (name, parameter) pairs with norm=",
            fix="Dualized(model, ...) or Dualized(model.named_parameters(), ..., norm=metrize(model))",
        )
    return pairs


def _length(x: Tensor) -> Tensor:
    """The 2-norm of a vector, without squares that under- or overflow."""
    largest = torch.where(x.amax() > 0, x.amax(), 1)
    return largest * torch.linalg.vector_norm(x / largest)


def _by_rows(norm: Norm, group: dict[str, Any]) -> bool:
    """Whether a weight steps row by row: then ranks may have some rows each."""
    dualizes = (
        DIRECTIONS[group["direction"]].entrywise
        and norm.dualizes_by_rows
        and group["scale"] == "unit"
    )
    return dualizes and (group["constraint"] is None or norm.retracts_by_rows)


def _stack(tensors: list[Tensor]) -> Tensor:
    """(n, *shape); one tensor is viewed, not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
