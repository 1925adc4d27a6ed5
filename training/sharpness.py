"""The curvature of the loss on one fixed batch, at the weights as they are.

studies.sharpness draws it over training. B, T: sequences and tokens of the batch. H: the Hessian.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from optim import Dualized, ModularNorm
from optim.baselines import Scaling, coordinates
from optim.curvature import Hessian, along, eigenvalues, loss_smoothness, modular_sharpness
from optim.metrize import canonical

from .baseline import Baseline
from .geometry import six_digits


class Sharpness:
    """Measures the curvature of the loss, without dropout and autocast, in the weights' precision.

    That is float32 or float64, and weights must be whole. batch: inputs and targets (B, T).
    modular: whether the sharpness in the modular norm is measured too, which takes longest.
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
        self.base = optimizer.optimizer if isinstance(optimizer, Baseline) else optimizer
        self.scaling: Scaling = (
            "standard"
            if isinstance(self.base, torch.optim.Adam)
            else getattr(optimizer, "scaling", "modular")
        )
        self.scales = coordinates(model, norm, self.scaling)

    def measure(self) -> dict[str, Any]:
        """Return the record of one measurement; None stands for what is not finite or not defined.

        coordinates: those in which this optimizer is gradient descent: `modular` for Dualized and
            Normalized, SGD's own, the weights themselves for AdamW.
        lambda_max, lambda_min, gradient_norm: the ends of the Hessian's spectrum and the length of
            the gradient in these coordinates. residual, products, converged: of lambda_max, as
            eigenvalues() says; lambda_min is from above, within lambda_min_residual of an
            eigenvalue.
        preconditioned: the largest eigenvalue of AdamW's P^(−1/2) H P^(−1/2), P = √v̂ + ε (Cohen et
            al., arXiv 2207.14484).
        threshold: the value of lambda_max (SGD) or preconditioned (AdamW) beyond which gradient
            descent with this lr and momentum is unstable on a quadratic; see stable().
        modular_sharpness: a lower bound on max dᵀHd over ‖d‖ <= 1 in the modular norm, from two
            climbs of at most 10 products.
        smoothness_bound: σα + τ, where the norm's tree declares it.
        curvature_along, dual_norm, stable_lr: along d = dualize(g); stable_lr is the largest lr at
            which a step along d does not overshoot. With "momentum" and beta 0 that is the step;
            "factored" takes another one.
        """
        model, training = self.model, self.model.training
        model.eval()
        try:
            record = self._record()
        finally:
            model.train(training)
        return {k: six_digits(v) if isinstance(v, float) else v for k, v in record.items()}

    def _record(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        H = self._hessian(self.scales)
        ends = eigenvalues(H, generator=generator)
        gradient = torch.stack([g.norm() for g in H.gradient.values()]).norm().item()
        record: dict[str, Any] = {
            "loss": H.value,
            "coordinates": self.scaling,
            "gradient_norm": gradient,
            "lambda_max": ends.largest,
            "lambda_min": ends.smallest,
            "residual": ends.largest_residual,
            "lambda_min_residual": ends.smallest_residual,
            "products": ends.steps,
            "converged": ends.converged,
        }
        if isinstance(self.base, torch.optim.Adam) and self.base.state:
            preconditioned = eigenvalues(self._hessian(adam_roots(self.base)), generator=generator)
            record["preconditioned"] = preconditioned.largest
            record["preconditioned_converged"] = preconditioned.converged
        plain = self._hessian({})
        if self.modular:
            top = replace(ends, vector={k: self.scales[k] * v for k, v in ends.vector.items()})
            climbed = modular_sharpness(
                plain, self.norm, generator=generator, restarts=0, steps=10, top=top
            )
            record["modular_sharpness"] = climbed.value
            record["modular_sharpness_converged"] = climbed.converged
        ahead = along(plain, self.norm)
        return record | {
            "curvature_along": ahead.curvature,
            "dual_norm": ahead.dual_norm,
            "stable_lr": ahead.stable_lr,
            "smoothness_bound": loss_smoothness(self.norm),
            "threshold": stable(self.base),
        }

    def _hessian(self, scales: Mapping[str, float | Tensor]) -> Hessian:
        x_BT, y_BT = self.batch
        return Hessian(lambda: self.model(x_BT, y_BT)[1], self.weights, scales)


def adam_roots(adam: torch.optim.Adam) -> dict[str, Tensor]:
    """Return P^(−1/2) by name, P = √v̂ + ε; 0 where Adam saw no gradient yet and does not move."""
    roots = {}
    for group in adam.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            state = adam.state[p]
            unbiased = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            root = (unbiased.sqrt() + group["eps"]).rsqrt()
            roots[canonical(name)] = torch.where(unbiased > 0, root, 0)
    return roots


def stable(optimizer: torch.optim.Optimizer) -> float | None:
    """Return the curvature beyond which SGD or Adam is unstable on a quadratic.

    With averaged momentum β that is 2(1 + β)/((1 − β) lr), 38/lr at 0.9 (Cohen et al., arXiv
    2207.14484). None for other optimizers: a dualized step's threshold is stable_lr.
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
