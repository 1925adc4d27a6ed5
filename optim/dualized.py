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
from .metrize import CoverageError, canonical, metrize
from .modular import ModularNorm, NonFiniteError
from .norms import Norm

SCHEMA = 1  # of state_dict()


def stacked_update(
    G: Tensor,
    M: Tensor,
    W: Tensor | None,
    radii: Tensor,
    ok: Tensor,
    *,
    norm: Norm,
    direction: Direction,
    beta: float,
    weight_decay: float,
    scale: str,
) -> tuple[Tensor, Tensor]:
    """(U, new M): the update W ← W − lr · U of a stack, and its momentum. Pure.

    G, M, W: (n, *shape), W only read where weight_decay > 0. radii: (n, 1…). ok: 0-dim bool; where it is False U is 0 and M stays.
    A row of a row-wise norm with an exactly zero gradient is treated the same: theory.md §7 tells why.
    """
    live = ok & (G != 0).any(dim=-1, keepdim=True) if norm.rowwise else ok
    fresh = torch.where(live, G, M)
    D, M = direction(fresh, M, beta=beta)
    U = norm.sharp(D) if scale == "dual" else norm.dualize(D)
    if W is not None and weight_decay:
        U = U + weight_decay * W
    return torch.where(live, U * radii, 0), M


class Dualized(torch.optim.Optimizer):
    """Steepest descent under a modular norm.

    model_or_named_parameters: a module that declares its structure (see metrize), or (name, parameter) pairs with `norm`.
    lr: modular norm of one step, before decay; 0 makes step() an exact no-op. A tensor is allowed.
    norm: the ModularNorm; by default metrize(model). direction: a name in DIRECTIONS. beta: decay of the momentum average (0.95 is slow).
    weight_decay: decoupled and scaled by the radius, so every weight stays within norm 1/weight_decay.
    scale: "unit" steps have norm lr; "dual" steps are each weight's dual norm times that, plain steepest descent (with Frobenius: gradient descent).
    max_grad_norm: clip the raw gradients' global 2-norm; updates are never clipped.

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
        for what, value, allowed, fine in (
            ("lr", lr, "a number >= 0", lr >= 0),
            ("beta", beta, "0 <= beta < 1", 0 <= beta < 1),
            ("weight_decay", weight_decay, "a number >= 0", weight_decay >= 0),
            ("direction", direction, ", ".join(DIRECTIONS), direction in DIRECTIONS),
            ("scale", scale, "unit, dual", scale in ("unit", "dual")),
            ("max_grad_norm", max_grad_norm, "None or a number > 0", max_grad_norm is None or max_grad_norm > 0),
        ):
            if not fine:
                raise ValueError(f"Dualized: {what}: got {value!r}; allowed: {allowed}")
        if isinstance(model_or_named_parameters, nn.Module):
            norm = norm or metrize(model_or_named_parameters)
            named = [(canonical(n), p) for n, p in model_or_named_parameters.named_parameters() if p.requires_grad]
        else:
            named = [(canonical(n), p) for n, p in self._pairs(model_or_named_parameters)]
            if norm is None:
                raise CoverageError("Dualized of named parameters: got no norm\n  fix: pass norm=ModularNorm(...), or the model itself")
        # Copied: groups added later bring norms and radii of their own.
        self.norm = ModularNorm(dict(norm.norms), dict(norm.radii), dict(norm.roles), dict(norm.masses), dict(norm.shapes))
        self._watch: tuple[Tensor, torch.Event | None, list[str], int] | None = None
        defaults = dict(lr=lr, beta=beta, weight_decay=weight_decay, direction=direction, scale=scale, max_grad_norm=max_grad_norm, steps=0)
        super().__init__(named, defaults)

    @staticmethod
    def _pairs(named: Iterable[Any]) -> list[tuple[str, Tensor]]:
        pairs = list(named)
        if any(not (isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str)) for x in pairs):
            raise CoverageError(
                "Dualized of a list of tensors\n  got: tensors without names\n  allowed: a module, or (name, parameter) pairs with norm=\n"
                "  fix: Dualized(model, ...) or Dualized(model.named_parameters(), ..., norm=metrize(model))"
            )
        return pairs

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with named parameters; a parameter that the modular norm does not know needs the group's "norm" and "radius". Existing radii stay."""
        norm, radius = param_group.pop("norm", None), param_group.pop("radius", None)
        params = param_group["params"]
        pairs = self._pairs([params] if isinstance(params, tuple) else params)
        for name, p in pairs:
            if name not in self.norm.norms:
                if norm is None or radius is None:
                    raise CoverageError(f'{name} has no norm; fix: give its group "norm" and "radius" (got {norm!r} and {radius!r})')
                self.norm.norms[name], self.norm.radii[name], self.norm.shapes[name] = norm, float(radius), tuple(p.shape)
            if p.ndim != self.norm.norms[name].ndim:
                raise CoverageError(
                    f"{name}: got shape {tuple(p.shape)}; allowed by {self.norm.norms[name]}: {self.norm.norms[name].ndim} dimensions"
                )
        super().add_param_group({**param_group, "params": pairs})

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"norm": self.norm, "_watch": None}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        self.check_finite()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        present = [
            (group, name, p)
            for group in self.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
            if p.grad is not None
        ]
        for _, _, p in present:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        present = [(g, n, p) for g, n, p in present if isinstance(g["lr"], Tensor) or g["lr"] != 0]
        if present:
            ok = self._all_finite(present)
            clip = self._clip([(g, p) for g, _, p in present])
            stacks: dict[tuple[Any, ...], list[tuple[str, Tensor]]] = {}
            groups = {id(g): g for g, _, _ in present}
            for g, name, p in present:
                stacks.setdefault((id(g), self.norm.norms[name], p.shape, p.dtype, p.device), []).append((name, p))
            for (group_id, norm, *_), members in stacks.items():
                self._step_stack(groups[group_id], norm, members, ok, clip)
            for g in groups.values():
                g["steps"] += 1
        return loss

    def _step_stack(self, group: dict[str, Any], norm: Norm, members: list[tuple[str, Tensor]], ok: Tensor, clip: Tensor | None) -> None:
        weights = [p for _, p in members]
        moments = [self.state[p]["momentum"] for p in weights]
        M = _stack(moments)
        G = _stack([p.grad for p in weights]).to(M.dtype)  # type: ignore[misc]
        ok = ok.to(G.device)
        if clip is not None:
            G = G * clip.to(G.device)
        lr = group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.to(G.device)
            ok = ok & (lr != 0)
        radii = torch.tensor([self.norm.radii[n] for n, _ in members], dtype=G.dtype, device=G.device).reshape(-1, *(1,) * norm.ndim)
        W = _stack(weights) if group["weight_decay"] else None
        options = {k: group[k] for k in ("beta", "weight_decay", "scale")}
        U, M = stacked_update(G, M, W, radii, ok, norm=norm, direction=DIRECTIONS[group["direction"]], **options)
        torch._foreach_copy_(moments, M.unbind())  # pyright: ignore[reportPrivateImportUsage]
        if isinstance(lr, Tensor):
            torch._foreach_sub_(weights, (U * lr).unbind())  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_add_(weights, U.unbind(), alpha=-lr)  # pyright: ignore[reportPrivateImportUsage]

    def _all_finite(self, present: list[tuple[dict[str, Any], str, Tensor]]) -> Tensor:
        """A 0-dim bool on the device; which gradient was not finite is copied to the host without waiting."""
        grads = [p.grad for _, _, p in present]
        largest = torch.stack([x.to(grads[0].device) for x in torch._foreach_norm(grads, torch.inf)])  # type: ignore[union-attr, arg-type]
        finite = torch.isfinite(largest)
        event = None
        host = finite.to("cpu", non_blocking=True)
        if finite.is_cuda:
            event = torch.Event(finite.device)
            event.record()
        self._watch = (host, event, [n for _, n, _ in present], present[0][0]["steps"])
        return finite.all()

    def check_finite(self) -> None:
        """Raise NonFiniteError if the last step met a gradient that was not finite. That step changed nothing."""
        if self._watch is None:
            return
        finite, event, names, step = self._watch
        self._watch = None
        if event is not None:
            event.synchronize()
        if not finite.all():
            bad = [n for n, fine in zip(names, finite.tolist(), strict=True) if not fine]
            more = f" and of {len(bad) - 1} more" if len(bad) > 1 else ""
            raise NonFiniteError(
                f"the gradient of {bad[0]}{more} was not finite at optimizer step {step}; that step was not taken, weights and momentum are as before"
            )

    def _clip(self, present: list[tuple[dict[str, Any], Tensor]]) -> Tensor | None:
        limit = present[0][0]["max_grad_norm"]
        if limit is None:
            return None
        total = torch.nn.utils.get_total_norm([p.grad for _, p in present])  # type: ignore[misc]
        return (limit / total).clamp(max=1)

    def state_dict(self) -> dict[str, Any]:
        """torch's layout, with param_names in every group and a schema version."""
        return super().state_dict() | {"schema": SCHEMA}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but matched by parameter name, whatever the order, and copied; a missing or unknown name raises before anything changes."""
        if state_dict.get("schema", SCHEMA) != SCHEMA:
            raise ValueError(f"optimizer state: got schema {state_dict['schema']}; allowed: {SCHEMA}")
        theirs = {canonical(n): i for g in state_dict["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
        ours = [canonical(n) for g in self.param_groups for n in g["param_names"]]
        if theirs.keys() != set(ours):
            odd = sorted(theirs.keys() ^ set(ours))
            raise ValueError(
                f"optimizer state: got other parameters; {odd[0]!r} is {'missing' if odd[0] in ours else 'unknown'}; allowed: the same names"
            )
        where = {canonical(n): g for g in state_dict["param_groups"] for n in g["param_names"]}
        groups = []
        for group in self.param_groups:
            source = where[canonical(group["param_names"][0])]
            groups.append(
                {**source, "params": [theirs[canonical(n)] for n in group["param_names"]], "param_names": list(group["param_names"])}
            )
        # Cloned: torch keeps the loaded tensors themselves, and two optimizers would then share one momentum.
        state = {i: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for i, s in state_dict["state"].items()}
        super().load_state_dict({"state": state, "param_groups": groups})


def _stack(tensors: list[Tensor]) -> Tensor:
    """(n, *shape); one tensor is viewed, not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
