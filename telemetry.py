"""What a run tells about its geometry, at logged steps only: the achieved size of every tensor's step beside the requested one."""

import torch
from torch import Tensor, nn

from optim import Dualized
from optim.comm import sharded
from optim.metrize import canonical


def whole(p: Tensor) -> Tensor:
    """A weight, gathered where it is sharded."""
    return (p.full_tensor() if sharded(p) else p).detach()  # type: ignore[attr-defined]


class StepSizes:
    """‖ΔW‖ / (lr · radius) per tensor, read from the weights themselves: 1 where the step is exactly as requested.

    before(), then optimizer.step(), then after(), on every rank where weights are sharded. ΔW is what the step did beside weight decay, a constraint's retraction included. Tensors that did not
    move are 0.
    """

    def __init__(self, model: nn.Module, optimizer: Dualized) -> None:
        self.optimizer = optimizer
        self.weights = {canonical(n): p for n, p in model.named_parameters() if p.requires_grad}
        self.old: dict[str, Tensor] = {}

    @torch.no_grad()
    def before(self) -> None:
        self.old = {n: whole(p).clone() for n, p in self.weights.items()}

    @torch.no_grad()
    def after(self) -> dict[str, float]:
        norm, ratios, unit = self.optimizer.norm, {}, self.optimizer.step_size or 1.0
        for group in self.optimizer.param_groups:
            for name in group["param_names"]:
                requested = float(group["lr"]) * unit * norm.radii[name]
                if not requested:
                    ratios[name] = 0.0
                    continue
                old, new = self.old[name].float(), whole(self.weights[name]).float()
                delta = new - old * (1 - requested * group["weight_decay"])
                # What did not move did not decay either: rows, or whole tensors, without a gradient.
                moved = norm.norms[name].fresh(new - old)
                still = ~moved if moved is not None else (new == old).all()
                delta = torch.where(still, 0, delta)
                ratios[name] = norm.norms[name].norm(delta).item() / requested
        self.old = {}
        return ratios
