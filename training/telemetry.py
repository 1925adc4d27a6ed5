"""What a run tells of its geometry, at logged steps only: weights, gradients and steps in the norms of their tensors, and attention's logits.

n: weights of one norm, shape and dtype, measured together as a stack (n, *shape). (B, H, T, K) as in model.py.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, isnan, nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import Attention
from optim import Dualized, ModularNorm, Normalized
from optim.baselines import Scaling, coordinates
from optim.curvature import Hessian, along, eigenvalues, loss_smoothness, modular_sharpness
from optim.metrize import canonical
from optim.norms import Norm, Spectral
from optim.ranks import sharded
from training.baseline import Baseline

STACK = 2**26  # entries of a stack at most, 256 MB: what is measured of large models comes in parts


def whole(p: Tensor) -> Tensor:
    """A weight, gathered where it is sharded."""
    return (p.full_tensor() if sharded(p) else p).detach()  # type: ignore[attr-defined]


def spectral(norm: Norm) -> bool:
    """Whether a step of this norm is made of polar factors."""
    return spectral(norm.inner) if hasattr(norm, "inner") else isinstance(norm, Spectral)  # type: ignore[attr-defined]


def blocks(norm: Norm, W: Tensor) -> list[tuple[Tensor, float]]:
    """[(X (n, blocks, O, I), unit)]: the matrices in a stack of a spectral norm, lying, and the singular values that dualize gives them."""
    return [(X if X.shape[-2] <= X.shape[-1] else X.mT, unit) for X, unit in norm.matrices(W)]


def by_eigenvalues(norm: Norm, W: Tensor) -> bool:
    """Whether singular values come from LAPACK: on a CPU in a quarter to a half of the time of matrix products at width 512, in no more at 64."""
    return W.device.type == "cpu" and spectral(norm)


def singular_values(X: Tensor) -> Tensor:
    """(…, O, I), O <= I → (…, O), from the eigenvalues of X Xᵀ: within √(rounding) of the largest."""
    largest = X.abs().amax(dim=(-2, -1), keepdim=True)
    X = X / torch.where(largest > 0, largest, 1)
    return torch.linalg.eigvalsh(X @ X.mT).clamp(min=0).sqrt() * largest[..., 0]


def size(norm: Norm, W: Tensor) -> Tensor:
    """(n, *shape) → (n,): ‖W‖, within 1e-3."""
    if not by_eigenvalues(norm, W):
        return norm.size(W)
    return torch.stack(
        [singular_values(X).amax((1, 2)) / unit for X, unit in blocks(norm, W)]
    ).amax(0)


def dual_norm(norm: Norm, G: Tensor) -> Tensor:
    """(n, *shape) → (n,): ‖G‖†. Of spectral norms within 1e-6 on a CPU, and elsewhere ⟨G, T⟩, T the schedule's polar factor polished.

    That one is too small, by a part of what singular values under 1e-4 ‖G‖_F add up to: 1 in 100 where they are spread evenly over six decades.
    """
    if by_eigenvalues(norm, G):
        return torch.stack(
            [singular_values(X.double()).sum((1, 2)) * unit for X, unit in blocks(norm, G)]
        ).sum(0)
    return (G * norm.stiefel(G)).flatten(1).sum(-1) if spectral(norm) else norm.dual_norm(G)


def finite(measure: Callable[[Norm, Tensor], Tensor], norm: Norm, W: Tensor) -> Tensor:
    """measure(norm, W), NaN where a weight is not finite: LAPACK would raise."""
    ok = W.reshape(len(W), -1).isfinite().all(-1)
    return measure(norm, torch.where(ok.view(-1, *(1,) * norm.ndim), W, 0)).masked_fill(~ok, nan)


def residual(norm: Norm, U: Tensor) -> Tensor:
    """(n, *shape) → (n,): ‖PPᵀ − I‖_F / √m over the m rows (columns, of a tall one) of the polar factors P in U: the RMS of σ² − 1, all blocks together."""
    squares, sides = torch.zeros(len(U)).to(U), 0
    for X, unit in blocks(norm, U):
        A = (X @ X.mT).div_(unit**2)
        A.diagonal(dim1=-2, dim2=-1).sub_(1)
        squares, sides = squares + A.square().sum((1, 2, 3)), sides + A.shape[1] * A.shape[2]
    return (squares / sides).sqrt()


def beside_decay(norm: Norm, moved: Tensor, old: Tensor, decay: Tensor) -> Tensor:
    """What a step did beside W ← W − decay · W. What did not move did not decay either: rows, or whole tensors, without a gradient."""
    return torch.where(norm.live(moved), moved + decay * old, 0)


@torch.no_grad()
def attention_logits(model: nn.Module, idx_BT: Tensor) -> dict[str, Tensor]:
    """{layer: 0-dim}: the largest |scale · ⟨q, k⟩| over heads and causal pairs, without dropout, in the weights' precision."""
    found: dict[str, Tensor] = {}

    def watch(name: str, attention: Attention) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            q_BHTK, k_BHTK, _ = attention.heads(args[0], args[1])
            logits_BHTT = attention.scale * (q_BHTK.float() @ k_BHTK.float().mT)
            found[name] = logits_BHTT.tril_().abs_().amax()

        return attention.register_forward_pre_hook(look)

    hooks = [watch(canonical(n), m) for n, m in model.named_modules() if isinstance(m, Attention)]
    training = model.training
    try:
        if hooks:
            model.eval()(idx_BT)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


@dataclass(frozen=True)
class Request:
    """What a step was asked to be: its size lr · radius, its share of decay, and whether it is that size times polar factors."""

    size: float = 0.0
    decay: float = 0.0
    polar: bool = False


class Geometry:
    """The geometry of one step: before(), optimizer.step(), after(); on every rank where weights are sharded.

    optimizer: any of torch's, or a Baseline. norm: has all trainable weights of the model. Together they take as long as half a training step at width 64,
    and as one at width 512 (one core, 1,024 tokens a step).
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | Baseline, norm: ModularNorm
    ) -> None:
        self.model, self.norm = model, norm
        self.optimizer = optimizer.optimizer if isinstance(optimizer, Baseline) else optimizer
        self.weights = {canonical(n): p for n, p in model.named_parameters() if p.requires_grad}
        alike: dict[tuple[Any, ...], list[str]] = {}
        for name, p in self.weights.items():
            alike.setdefault((norm.norms[name], p.shape, p.dtype), []).append(name)
        self.stacks: list[tuple[Norm, list[str]]] = []
        for (each, shape, _), names in alike.items():
            most = max(1, STACK // shape.numel())
            self.stacks += [(each, names[i : i + most]) for i in range(0, len(names), most)]
        self.old: dict[str, Tensor] = {}
        self.dual: list[Tensor] = []

    @torch.no_grad()
    def before(self) -> None:
        """After the backward pass: copies the weights, and measures their gradients."""
        self.old = {
            n: p.detach().clone() for n, p in self.weights.items()
        }  # shards of sharded ones
        self.dual = [finite(dual_norm, norm, self._gradients(names)) for norm, names in self.stacks]

    @torch.no_grad()
    def after(self, idx_BT: Tensor | None = None) -> dict[str, Any]:
        """After the step: {quantity: {tensor: number}}, and two totals; None is what is not defined or not finite, as 0/0.

        step: ‖ΔW‖ / (lr · radius), achieved over requested, of what the step did beside weight decay, a constraint's retraction included. 0 is what did not move.
            Dualized and Normalized only, as no other step has a size that was asked for.
        orthogonality: the residual of the polar factors P in that step, ΔW = lr · radius · scale · P; see residual(). 0 is exact, a schedule whose band is
            [a, b] has at most max(1 − a², b² − 1), and each direction that P lacks adds 1 to the mean of squares: rank r of m alone gives √(1 − r/m). Retractions
            and the rounding of 16-bit weights are in it. Dualized with spectral norms and unit scale only.
        weight_norm: ‖W‖ after the step. relative_step: the whole change, decay included, over that.
        grad_dual_norm: ‖g‖† of p.grad before the step, 0 where there is none; where gradients are local, of this rank's share of the batch.
        modular_weight_norm, modular_grad_dual_norm: max ‖W‖ / radius, of weights that have one, and Σ radius · ‖g‖†.
        max_attention_logit: by layer, the largest |logit| over causal pairs of these sequences at the new weights, if they are given and model.py's model is.

        Sizes are within 1e-3, as norm.size's are.
        """
        asked, parts = self._requests(), []
        for (norm, names), dual in zip(self.stacks, self.dual, strict=True):
            old, requests = (
                _precise(torch.stack([whole(self.old[n]) for n in names])),
                [asked.get(n, Request()) for n in names],
            )
            new = self._weights(names)
            step = moved = new - old
            parts += [
                ("weight_norm", names, finite(size, norm, new)),
                ("grad_dual_norm", names, dual),
                ("moved", names, achieved := finite(size, norm, moved)),
            ]
            if asked:
                sizes, decay = (
                    torch.tensor([getattr(r, k) for r in requests])
                    .to(old)
                    .view(-1, *(1,) * norm.ndim)
                    for k in ("size", "decay")
                )
                if any(r.decay for r in requests):
                    step = beside_decay(norm, moved, old, decay)
                    achieved = finite(size, norm, step)
                parts.append(("step", names, achieved))
                if spectral(norm) and all(r.polar for r in requests):
                    parts.append(("orthogonality", names, residual(norm, step / sizes)))
        self.old, self.dual = {}, []
        logits = attention_logits(self.model, idx_BT) if idx_BT is not None else {}
        parts += [
            ("max_attention_logit", [name], logit.reshape(1)) for name, logit in logits.items()
        ]
        return self._tables(self._read(parts), asked)

    def _weights(self, names: Sequence[str]) -> Tensor:
        return _precise(torch.stack([whole(self.weights[n]) for n in names]))

    def _gradients(self, names: Sequence[str]) -> Tensor:
        ps = [self.weights[n] for n in names]
        return _precise(
            torch.stack([whole(torch.zeros_like(p) if p.grad is None else p.grad) for p in ps])
        )

    def _requests(self) -> dict[str, Request]:
        o, found = self.optimizer, {}
        if isinstance(o, Dualized | Normalized):
            unit = (o.step_size or 1.0) if isinstance(o, Dualized) else 1.0
            for group in o.param_groups:
                decay = group["weight_decay"] if isinstance(o, Dualized) else o.weight_decay
                if decay and isinstance(o, Dualized) and group["cautious"]:
                    continue  # which entries decayed is not known here
                for name in group["param_names"]:
                    asked = float(group["lr"]) * unit * self.norm.radii[name]
                    found[name] = Request(
                        asked, asked * decay, isinstance(o, Dualized) and group["scale"] == "unit"
                    )
        return found

    @staticmethod
    def _read(parts: Sequence[tuple[str, Sequence[str], Tensor]]) -> dict[str, dict[str, float]]:
        """All at once: each reading would wait for the device."""
        values, tables = iter(torch.cat([v for *_, v in parts]).tolist()), {}
        for quantity, names, _ in parts:
            tables.setdefault(quantity, {}).update((n, next(values)) for n in names)
        return tables

    def _tables(
        self, found: dict[str, dict[str, float]], asked: Mapping[str, Request]
    ) -> dict[str, Any]:
        """From what was read, in the order of the network."""
        weights, dual, moved, radii = (
            found["weight_norm"],
            found["grad_dual_norm"],
            found.pop("moved"),
            self.norm.radii,
        )
        found["relative_step"] = {n: moved[n] / x if x else nan for n, x in weights.items()}
        for name, x in found.get("step", {}).items():
            # What is left of a weight that only decayed is rounding, some 1e-7 of it.
            rounding = (
                4
                * torch.finfo(torch.promote_types(self.weights[name].dtype, torch.float32)).eps
                * weights[name]
            )
            still = name not in asked or not asked[name].size or x <= rounding
            found["step"][name] = 0.0 if still else x / asked[name].size
        for name in found.get("orthogonality", {}):
            if not found["step"][name]:
                found["orthogonality"][name] = nan
        sizes = [x / radii[n] for n, x in weights.items() if radii[n]]
        totals = {
            "modular_weight_norm": nan if any(map(isnan, sizes)) else max(sizes, default=0.0),
            "modular_grad_dual_norm": sum(radii[n] * x for n, x in dual.items()),
        }
        order = (
            "step",
            "relative_step",
            "weight_norm",
            "grad_dual_norm",
            "orthogonality",
            "max_attention_logit",
        )
        tables = {
            q: {n: _number(found[q][n]) for n in (*self.weights, *found[q]) if n in found[q]}
            for q in order
            if q in found
        }
        return tables | {k: _number(v) for k, v in totals.items()}


def _precise(W: Tensor) -> Tensor:
    return W.to(torch.promote_types(W.dtype, torch.float32))


def _number(x: float) -> float | None:
    """Six digits, or None for what JSON has no number for."""
    return float(f"{x:.6g}") if isfinite(x) else None


# ---- curvature


class Sharpness:
    """The curvature of the loss on one fixed batch, at the weights as they are: what studies.sharpness draws over training.

    batch: inputs and targets (B, T). Without dropout and autocast, in the weights' own precision, float32 or float64; weights must be whole.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Dualized | Baseline,
        norm: ModularNorm,
        batch: Sequence[Tensor],
        *,
        modular: bool = True,
    ) -> None:
        self.model, self.norm, self.batch, self.modular = model, norm, batch, modular
        self.weights = {canonical(n): p for n, p in model.named_parameters() if p.requires_grad}
        self.own = optimizer.optimizer if isinstance(optimizer, Baseline) else optimizer
        self.scaling: Scaling = (
            "standard"
            if isinstance(self.own, torch.optim.Adam)
            else getattr(optimizer, "scaling", "modular")
        )
        self.scales = coordinates(model, norm, self.scaling)

    def measure(self) -> dict[str, Any]:
        """lambda_max, lambda_min: ends of the Hessian's spectrum, and gradient_norm, in the coordinates in which this optimizer is gradient descent: `modular` for
            Dualized and Normalized, SGD's own, the weights themselves for AdamW. residual, products, converged: of lambda_max, as eigenvalues() says;
            lambda_min is from above, within lambda_min_residual of an eigenvalue.
        preconditioned: largest eigenvalue of AdamW's P^(−1/2) H P^(−1/2), P = √v̂ + ε (Cohen et al., arXiv 2207.14484).
        threshold: beyond which gradient descent with this lr and momentum is unstable on a quadratic, for lambda_max (SGD) or preconditioned (AdamW); see stable().
        modular_sharpness: a lower bound on max dᵀHd over ‖d‖ <= 1 in the modular norm, from two climbs of at most 10 products. smoothness_bound: σα + τ, where the norm's tree declares it.
        curvature_along, dual_norm, stable_lr: along d = dualize(g), the largest lr at which a step without momentum does not overshoot.
        """
        model, training = self.model, self.model.training
        model.eval()
        try:
            found = self._measure()
        finally:
            model.train(training)
        return {k: _number(v) if isinstance(v, float) else v for k, v in found.items()}

    def _measure(self) -> dict[str, Any]:
        x_BT, y_BT = self.batch
        generator = torch.Generator().manual_seed(0)

        def hessian(scales: Mapping[str, float | Tensor]) -> Hessian:
            return Hessian(lambda: self.model(x_BT, y_BT)[1], self.weights, scales)

        H = hessian(self.scales)
        ends = eigenvalues(H, generator=generator)
        gradient = torch.stack([g.norm() for g in H.gradient.values()]).norm().item()
        found: dict[str, Any] = {
            "loss": H.value,
            "coordinates": self.scaling,
            "gradient_norm": gradient,
        }
        found |= {
            "lambda_max": ends.largest,
            "lambda_min": ends.smallest,
            "residual": ends.largest_residual,
            "lambda_min_residual": ends.smallest_residual,
        }
        found |= {"products": ends.steps, "converged": ends.converged}
        if isinstance(self.own, torch.optim.Adam) and self.own.state:
            roots = {
                canonical(n): _adam_root(self.own, group, p)
                for group in self.own.param_groups
                for n, p in zip(group["param_names"], group["params"], strict=True)
            }
            preconditioned = eigenvalues(hessian(roots), generator=generator)
            found |= {
                "preconditioned": preconditioned.largest,
                "preconditioned_converged": preconditioned.converged,
            }
        plain = hessian({})
        if self.modular:
            top = replace(ends, vector={k: self.scales[k] * v for k, v in ends.vector.items()})
            climbed = modular_sharpness(
                plain, self.norm, generator=generator, restarts=0, steps=10, top=top
            )
            found |= {
                "modular_sharpness": climbed.value,
                "modular_sharpness_converged": climbed.converged,
            }
        ahead = along(plain, self.norm)
        found |= {
            "curvature_along": ahead.curvature,
            "dual_norm": ahead.dual_norm,
            "stable_lr": ahead.stable_lr,
        }
        found |= {"smoothness_bound": loss_smoothness(self.norm), "threshold": stable(self.own)}
        return found


def _adam_root(adam: torch.optim.Adam, group: Mapping[str, Any], p: Tensor) -> Tensor:
    """P^(−1/2), P = √v̂ + ε; 0 where no gradient was seen yet, as Adam does not move there."""
    state = adam.state[p]
    unbiased = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
    return torch.where(unbiased > 0, (unbiased.sqrt() + group["eps"]).rsqrt(), 0)


def stable(optimizer: torch.optim.Optimizer) -> float | None:
    """The curvature beyond which SGD or Adam with averaged momentum β is unstable on a quadratic, 2(1 + β)/((1 − β) lr): 38/lr at 0.9 (Cohen et al., arXiv 2207.14484).

    None for others: a dualized step's is stable_lr.
    """
    group = optimizer.param_groups[0]
    lr = float(group["lr"])
    if isinstance(optimizer, torch.optim.Adam):
        beta = group["betas"][0]
    elif isinstance(optimizer, torch.optim.SGD):
        beta = group["momentum"]
    else:
        return None
    return None if not lr else 2 * (1 + beta) / ((1 - beta) * lr)


# ---- pictures

# Of a picture: the quantity, its title, and how its colours spread.
PANELS = (
    ("step", "achieved over requested step", "ratio"),
    ("relative_step", "‖ΔW‖ / ‖W‖", "log"),
    ("weight_norm", "‖W‖", "linear"),
    ("grad_dual_norm", "‖g‖†", "log"),
    ("orthogonality", "‖PPᵀ − I‖ / √m", "linear"),
    ("max_attention_logit", "largest attention logit", "linear"),
)


def kind(name: str) -> str:
    """What a tensor is in every layer: "attention.q" of "blocks.3.attention.q.weight"."""
    return re.sub(r"\b\d+\b", "*", name.removesuffix(".weight")).split("*.")[-1]


def grid(
    records: Sequence[Mapping[str, Any]], quantity: str
) -> tuple[list[str], list[int], list[list[float]]]:
    """(tensors, steps, values [tensor][step]): in the order of the network, those of one kind together; NaN is what there is no number for."""
    measured = {
        r["step"]: r["geometry"][quantity] for r in records if quantity in r.get("geometry", {})
    }
    names = list(dict.fromkeys(n for table in measured.values() for n in table))
    kinds = list(dict.fromkeys(kind(n) for n in names))
    names.sort(key=lambda n: kinds.index(kind(n)))
    found = [[table.get(n) for table in measured.values()] for n in names]
    return names, list(measured), [[nan if x is None else x for x in row] for row in found]


def plot_geometry(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Heat maps, layer × time, of the records that have "geometry": a panel for each quantity, rows by kind of tensor and then by layer."""
    from matplotlib.colors import CenteredNorm, LogNorm, Normalize
    from matplotlib.figure import Figure

    panels = [(grid(records, quantity), title, spread) for quantity, title, spread in PANELS]
    # 0 is a step that was not taken, or a gradient that was not there: grey, as what has no number.
    shown = [
        (
            names,
            steps,
            [[x if spread == "linear" or x > 0 else nan for x in row] for row in values],
            title,
            spread,
        )
        for (names, steps, values), title, spread in panels
    ]
    shown = [panel for panel in shown if any(isfinite(x) for row in panel[2] for x in row)]
    if not shown:
        return
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    tall = min(6.5, max(2.8, 1 + 0.05 * max(len(names) for names, *_ in shown)))
    figure = Figure(figsize=(4.6 * across, tall * down), layout="constrained")
    all_axes = figure.subplots(down, across, squeeze=False).flatten()
    for axes in all_axes[len(shown) :]:
        axes.set_axis_off()
    for axes, (names, steps, values, title, spread) in zip(all_axes, shown, strict=False):
        numbers = [x for row in values for x in row if isfinite(x)]
        if spread == "ratio":
            colours, palette = CenteredNorm(1, max(0.25, *(abs(x - 1) for x in numbers))), "RdBu_r"
        else:
            colours, palette = (
                (LogNorm if spread == "log" else Normalize)(min(numbers), max(numbers)),
                "viridis",
            )
        axes.set_facecolor("0.8")
        image = axes.imshow(
            values, aspect="auto", interpolation="nearest", norm=colours, cmap=palette
        )
        figure.colorbar(image, ax=axes, pad=0.01).ax.tick_params(labelsize=7)
        rows: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            rows.setdefault(kind(name), []).append(i)
        axes.set_yticks([(at[0] + at[-1]) / 2 for at in rows.values()], list(rows), fontsize=7)
        for at in list(rows.values())[1:]:
            axes.axhline(at[0] - 0.5, color="black", linewidth=0.5)
        places = sorted({round(i * (len(steps) - 1) / 4) for i in range(5)})
        axes.set_xticks(places, [str(steps[i]) for i in places], fontsize=7)
        axes.tick_params(axis="y", length=0)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step (first layer on top)", fontsize=7)
    figure.savefig(path, dpi=120)
