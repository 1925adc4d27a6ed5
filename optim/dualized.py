"""Dualized: steepest descent in the modular norm, one learning rate, one momentum buffer per weight.

    W ← W − lr · radius · (dualize(direction) + weight_decay · W)

Stacks: (n, *shape), the n weights of one (group, norm, shape, dtype, device), so that equal shapes cost one batched call.
Source: [MD] Bernstein, Newhouse, arXiv 2410.21265.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .directions import DIRECTIONS, Direction
from .metrize import CoverageError, canonical, check_distinct, metrize
from .modular import ModularNorm, NonFiniteError
from .norms import Norm

SCHEMA = 1  # of state_dict()


def stacked_update(
    G: Tensor,
    M: Tensor,
    W: Tensor | None,
    radii: Tensor,
    ok: Tensor,
    clip: Tensor | None,
    *,
    norm: Norm,
    direction: Direction,
    beta: float,
    weight_decay: float,
    scale: str,
) -> tuple[Tensor, Tensor]:
    """(U, new M): the update W ← W − lr · U of a stack, and its momentum. Pure.

    G, M, W: (n, *shape), W only read where weight_decay > 0. radii: (n, 1…). ok: 0-dim bool; where it is False U is 0 and M stays.
    clip: 0-dim factor of G. A row of a row-wise norm with an exactly zero gradient is treated as if not ok: theory.md §3 tells why.
    """
    live = ok & (G != 0).any(dim=-1, keepdim=True) if norm.rowwise else ok
    fresh = torch.where(live, G if clip is None else G * clip, M)
    D, moved = direction(fresh, M, beta=beta)
    U = norm.sharp(D) if scale == "dual" else norm.dualize(D)
    if W is not None and weight_decay:
        U = U + weight_decay * W
    return torch.where(live, U * radii, 0), torch.where(live, moved, M)


def _validate(settings: dict[str, Any]) -> None:
    """Raise ValueError for an impossible setting of a parameter group."""
    lr, limit = settings["lr"], settings["max_grad_norm"]
    for what, allowed, fine in (
        ("lr", "a finite number >= 0", isinstance(lr, Tensor) or 0 <= lr < float("inf")),
        ("beta", "0 <= beta < 1", 0 <= settings["beta"] < 1),
        ("weight_decay", "a finite number >= 0", 0 <= settings["weight_decay"] < float("inf")),
        ("direction", ", ".join(DIRECTIONS), settings["direction"] in DIRECTIONS),
        ("scale", "unit, dual", settings["scale"] in ("unit", "dual")),
        ("max_grad_norm", "None or a number > 0", limit is None or limit > 0),
    ):
        if not fine:
            raise ValueError(f"Dualized: {what}: got {settings[what]!r}; allowed: {allowed}")


class Dualized(torch.optim.Optimizer):
    """Steepest descent under a modular norm.

    model_or_named_parameters: a module that declares its structure (see metrize), or (name, parameter) pairs with `norm`.
    lr: modular norm of one step, before decay; 0 makes step() an exact no-op. A tensor is allowed.
    norm: the ModularNorm; by default metrize(model). direction: a name in DIRECTIONS. beta: decay of the momentum average (0.95 is slow).
    weight_decay: decoupled and scaled by the radius: every weight stays within norm 1/weight_decay (times the polar band's upper edge).
    scale: "unit" steps have norm lr; "dual" steps are each weight's dual norm times that, plain steepest descent (with Frobenius: gradient descent).
    max_grad_norm: clip the 2-norm of a parameter group's raw gradients; updates are never clipped.
    All but the norm may differ by parameter group.

    A gradient that is not finite makes the whole step a no-op, found on the device; the next step() or check_finite() raises NonFiniteError
    with the parameter's name. p.grad is never written.
    """

    def __init__(
        self,
        model_or_named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
        lr: float | Tensor,
        *,
        norm: ModularNorm | None = None,
        direction: str = "momentum",
        beta: float = 0.95,
        weight_decay: float = 0.0,
        scale: Literal["unit", "dual"] = "unit",
        max_grad_norm: float | None = None,
    ) -> None:
        named: list[Any]
        if isinstance(model_or_named_parameters, nn.Module):
            norm = norm or metrize(model_or_named_parameters)
            named = [(n, p) for n, p in model_or_named_parameters.named_parameters() if p.requires_grad]
        else:
            named = list(model_or_named_parameters)
            if not all(isinstance(x, dict) for x in named):
                named = _pairs(named)
            if norm is None:
                raise CoverageError("Dualized of named parameters: got no norm\n  fix: pass norm=ModularNorm(...), or the model itself")
        # Copied: groups added later bring norms and radii of their own.
        self.norm = ModularNorm(dict(norm.norms), dict(norm.radii), dict(norm.roles), dict(norm.masses), dict(norm.shapes))
        self.calls = 0  # of step()
        self._watch: tuple[Tensor, torch.Event | None, list[str], int] | None = None
        self._radii: dict[tuple[Any, ...], Tensor] = {}
        defaults = dict(lr=lr, beta=beta, weight_decay=weight_decay, direction=direction, scale=scale, max_grad_norm=max_grad_norm)
        _validate(defaults)
        super().__init__(named, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with named parameters; one that the modular norm does not know needs the group's "norm" and "radius". Existing radii stay."""
        group = {k: v for k, v in param_group.items() if k not in ("norm", "radius")}
        norm, radius = param_group.get("norm"), param_group.get("radius")
        pairs = [(canonical(n), p) for n, p in _pairs(group["params"])]
        group["params"] = pairs
        _validate(self.defaults | group)
        check_distinct([*(n for g in self.param_groups for n in g["param_names"]), *(n for n, _ in pairs)])
        for name, p in pairs:
            known = self.norm.norms.get(name)
            if known is not None and (norm is not None or radius is not None):
                raise CoverageError(
                    f"{name} has the norm {known} and radius {self.norm.radii[name]:g} already; fix: leave norm and radius out of its group"
                )
            if known is None and (norm is None or radius is None):
                raise CoverageError(f'{name} has no norm; fix: give its group "norm" and "radius" (got {norm!r} and {radius!r})')
            placed = known or norm
            assert isinstance(placed, Norm)
            if p.ndim != placed.ndim:
                raise CoverageError(f"{name}: got shape {tuple(p.shape)}; allowed by {placed}: {placed.ndim} dimensions")
        super().add_param_group(group)
        for name, p in pairs:
            if norm is not None and radius is not None:
                self.norm.norms[name], self.norm.radii[name], self.norm.shapes[name] = norm, float(radius), tuple(p.shape)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"norm": self.norm, "calls": self.calls, "_watch": None, "_radii": {}}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        self.check_finite()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.calls += 1
        present: list[tuple[dict[str, Any], list[tuple[str, Tensor]]]] = []
        for group in self.param_groups:
            members = [(n, p) for n, p in zip(group["param_names"], group["params"], strict=True) if p.grad is not None]
            for name, p in members:
                if p.grad.is_sparse:
                    raise ValueError(f"{name}: got a sparse gradient; allowed: dense; fix: sparse=False in its module")
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            if members and (isinstance(group["lr"], Tensor) or group["lr"] != 0):
                present.append((group, members))
        if not present:
            return loss
        ok = self._all_finite([x for _, members in present for x in members])
        for group, members in present:
            clip = _clip([p.grad for _, p in members if p.grad is not None], group["max_grad_norm"])
            stacks: dict[tuple[Any, ...], list[tuple[str, Tensor]]] = {}
            for name, p in members:
                stacks.setdefault((self.norm.norms[name], p.shape, p.dtype, p.device), []).append((name, p))
            for (norm, *_), stack in stacks.items():
                self._step_stack(group, norm, stack, ok, clip)
        return loss

    def _step_stack(self, group: dict[str, Any], norm: Norm, members: list[tuple[str, Tensor]], ok: Tensor, clip: Tensor | None) -> None:
        weights = [p for _, p in members]
        moments = [self.state[p]["momentum"] for p in weights]
        M = _stack(moments)
        G = _stack([p.grad for p in weights]).to(M.dtype)  # type: ignore[misc]
        ok = ok.to(G.device)
        clip = clip if clip is None else clip.to(G)
        lr = group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.to(G.device)
            ok = ok & (lr != 0)
        key = (G.dtype, G.device, *(n for n, _ in members))
        if key not in self._radii:  # made once: a copy to the device waits for it
            precise = torch.promote_types(G.dtype, torch.float32)  # 1/7 is 0.4% off in bfloat16
            radii = torch.tensor([self.norm.radii[n] for n, _ in members], dtype=precise, device=G.device)
            self._radii[key] = radii.reshape(-1, *(1,) * norm.ndim)
        radii = self._radii[key]
        W = _stack(weights) if group["weight_decay"] else None
        options = {k: group[k] for k in ("beta", "weight_decay", "scale")}
        U, M = stacked_update(G, M, W, radii, ok, clip, norm=norm, direction=DIRECTIONS[group["direction"]], **options)
        torch._foreach_copy_(moments, M.unbind())  # pyright: ignore[reportPrivateImportUsage]
        if isinstance(lr, Tensor):
            torch._foreach_sub_(weights, (U * lr).unbind())  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_add_(weights, U.unbind(), alpha=-lr)  # pyright: ignore[reportPrivateImportUsage]

    def _all_finite(self, present: list[tuple[str, Tensor]]) -> Tensor:
        """A 0-dim bool on the device. Which gradient was not finite goes to the host without waiting for it."""
        grads = [p.grad for _, p in present if p.grad is not None]
        largest = torch._foreach_norm(grads, torch.inf)  # type: ignore[arg-type]
        finite = torch.stack([torch.isfinite(x).to(grads[0].device) for x in largest])
        host, event = finite.to("cpu", non_blocking=finite.is_cuda), None
        if finite.is_cuda:
            event = torch.Event(finite.device)
            event.record()
        self._watch = (host, event, [n for n, _ in present], self.calls)
        return finite.all()

    def check_finite(self) -> None:
        """Raise NonFiniteError if the last step met a gradient that was not finite. That step changed nothing."""
        if self._watch is None:
            return
        finite, event, names, call = self._watch
        self._watch = None
        if event is not None:
            event.synchronize()
        if not finite.all():
            bad = [n for n, fine in zip(names, finite.tolist(), strict=True) if not fine]
            more = f" and of {len(bad) - 1} more" if len(bad) > 1 else ""
            raise NonFiniteError(
                f"the gradient of {bad[0]}{more} was not finite in call {call} of step(); that step was not taken, weights and momentum are as before"
            )

    def state_dict(self) -> dict[str, Any]:
        """torch's layout, with param_names in every group and a schema version."""
        return super().state_dict() | {"schema": SCHEMA}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but matched by parameter name, whatever the order, and copied; a missing or unknown name raises before anything changes."""
        if any("param_names" not in g for g in state_dict["param_groups"]):
            raise ValueError(
                "optimizer state: got groups without param_names; allowed: the state of an optimizer of named parameters; fix: save Dualized's own"
            )
        if state_dict.get("schema", SCHEMA) != SCHEMA:
            raise ValueError(f"optimizer state: got schema {state_dict['schema']}; allowed: {SCHEMA}")
        saved = {canonical(n): (g, i) for g in state_dict["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
        ours = [n for g in self.param_groups for n in g["param_names"]]
        if saved.keys() != set(ours):
            odd = sorted(saved.keys() ^ set(ours))
            raise ValueError(
                f"optimizer state: got other parameters; {odd[0]!r} is {'missing' if odd[0] in ours else 'unknown'}; allowed: the same names"
            )
        groups = []
        for names in (list(g["param_names"]) for g in self.param_groups):
            settings, _ = saved[names[0]]
            groups.append({**settings, "params": [saved[n][1] for n in names], "param_names": names})
        # Cloned: torch keeps the loaded tensors themselves, and two optimizers would then share one momentum.
        state = {i: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for i, s in state_dict["state"].items()}
        super().load_state_dict({"state": state, "param_groups": groups})


def _pairs(named: Any) -> list[tuple[str, Tensor]]:
    """One (name, parameter) pair or several, as a list."""
    one = isinstance(named, tuple) and len(named) == 2 and isinstance(named[0], str)
    pairs = [named] if one else list(named)
    if any(not (isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str)) for x in pairs):
        raise CoverageError(
            "Dualized of a list of tensors\n  got: tensors without names\n  allowed: a module, or (name, parameter) pairs with norm=\n"
            "  fix: Dualized(model, ...) or Dualized(model.named_parameters(), ..., norm=metrize(model))"
        )
    return pairs


def _clip(grads: list[Tensor], limit: float | None) -> Tensor | None:
    """The factor, at most 1, that brings the gradients' 2-norm to the limit; scaled by the largest entry first, so that no square overflows."""
    if limit is None:
        return None
    largest = torch.nn.utils.get_total_norm(grads, torch.inf)
    scale = torch.where(largest > 0, largest, 1)
    total = scale * torch.nn.utils.get_total_norm([g / scale.to(g) for g in grads]).to(scale)
    return (limit / total).clamp(max=1)


def _stack(tensors: list[Tensor]) -> Tensor:
    """(n, *shape); one tensor is viewed, not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
