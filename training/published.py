"""Published optimizers as baselines, from the library pytorch_optimizer, imported when asked for.

Their settings are their authors'. Those that are no setting here are constants below, or the
library's defaults where these are the authors'. configs/race/ has a file for each, with the
authors' learning rate, betas and schedule: for another model they are to be tuned.
"""

import math
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from optim.baselines import (
    AuxiliaryLr,
    Several,
    auxiliary_adamw,
    newton_schulz,
    register_baseline,
    split_hidden,
    trainable,
)
from optim.errors import Refusal, require
from optim.modular import ModularNorm
from optim.polar import Polar
from optim.settings import Help, Range

VERSION = "4.1.0"  # of pytorch_optimizer, which these were tried with


def library() -> Any:
    """Return the package pytorch_optimizer. Raises Refusal where it is not installed."""
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise Refusal(
            "optim.name",
            got=f"an optimizer of a library that cannot be imported: {error}",
            allowed="those of optim/baselines.py, or the library pytorch_optimizer",
            fix=f"pip install pytorch_optimizer=={VERSION}",
        ) from error
    return pytorch_optimizer


@register_baseline("schedule_free_adamw")
def schedule_free_adamw(
    model: nn.Module,
    norm: ModularNorm,
    *,
    lr: float,
    beta: float,
    beta2: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Build schedule-free AdamW (Defazio et al., arXiv 2405.15682).

    Gradients are taken at one set of weights; another, their average, is evaluated and saved.
    The authors (github.com/facebookresearch/schedule_free) have lr 0.0025, betas 0.9 and 0.999, no
    decay, a constant lr after a warm-up, and beta 0.95 or 0.98 for very long runs. A warm-up of
    [schedule] is theirs: both multiply lr. In the library 1e-15 stands under the root besides.
    """
    require(
        beta > 0,
        "schedule_free_adamw: beta",
        got=beta,
        allowed="a number x with 0 < x < 1, between the average and its newest weights",
        fix="--optim.beta 0.9",
    )
    return library().ScheduleFreeAdamW(
        trainable(model), lr=lr, betas=(beta, beta2), weight_decay=weight_decay
    )


@register_baseline("prodigy")
def prodigy(
    model: nn.Module,
    norm: ModularNorm,
    *,
    lr: float,
    beta: float,
    beta2: float,
    weight_decay: float,
    d_coef: Annotated[
        float,
        Range(0, above=True),
        Help("prodigy: a multiple of the step size that it finds, which its lr of 1 is not for."),
    ] = 1.0,
    safeguard_warmup: Annotated[
        bool, Help("prodigy: leave lr out of its estimate, for runs with a warm-up.")
    ] = False,
) -> torch.optim.Optimizer:
    """Build Prodigy, Adam that finds its step size (Mishchenko, Defazio, arXiv 2306.06101).

    The authors (github.com/konstmish/prodigy) have lr 1 for all networks, betas 0.9 and 0.999,
    decoupled decay (0 at first), d_coef 1, and a cosine over the whole run. All weights are one
    group: the step size is one number, and the library takes the lr of the first group for all.
    """
    return library().Prodigy(
        trainable(model),
        lr=lr,
        betas=(beta, beta2),
        weight_decay=weight_decay,
        d_coef=d_coef,
        safeguard_warmup=safeguard_warmup,
    )


@register_baseline("normuon")
def normuon(
    model: nn.Module,
    norm: ModularNorm,
    *,
    lr: float,
    beta: float,
    beta2: float,
    weight_decay: float,
    auxiliary_lr: AuxiliaryLr = 1.0,
    polar: Polar | None = None,
) -> torch.optim.Optimizer:
    """Build NorMuon for the hidden matrices (Li et al., arXiv 2510.05491), AdamW for the rest.

    The authors (github.com/zichongli5/NorMuon) have lr 0.02, beta 0.95, beta2 0.95 for the squares
    of rows, no decay, five iterations, and the step's norm as it was before rows were normalized.
    Their AdamW beside it has lr 0.0003 for all other weights; here these are grouped as in
    muon_adamw, so that the two differ in the hidden matrices alone. polar: with its dtype "float32"
    the iteration is in float32.
    """
    hidden, rest = split_hidden(model, norm)
    in_float32 = polar is not None and polar.dtype == "float32"
    groups = [
        {
            "params": hidden,
            "use_muon": True,
            "lr": lr,
            "momentum": beta,
            "beta2": beta2,
            "weight_decay": weight_decay,
        }
    ]
    rows = (float32_normuon() if in_float32 else library().NorMuon)(groups)
    return Several(
        rows, auxiliary_adamw(model, rest, lr=lr, scale=auxiliary_lr, weight_decay=weight_decay)
    )


def float32_normuon() -> Any:
    """Return NorMuon with its iteration in float32, for processors that emulate bfloat16."""

    class Float32NorMuon(library().NorMuon):
        @staticmethod
        def _orthogonalize(group: dict[str, Any], updates: list[Tensor]) -> list[Tensor]:
            (coefficients,) = group["ns_coeffs"]
            return [newton_schulz(X, coefficients, group["ns_steps"], 1e-7) for X in updates]

    return Float32NorMuon


@register_baseline("soap")
def soap(
    model: nn.Module,
    norm: ModularNorm,
    *,
    lr: float,
    beta: float,
    beta2: float,
    weight_decay: float,
    refresh_every: int,
) -> torch.optim.Optimizer:
    """Build SOAP, Adam in the eigenbases of Shampoo (Vyas et al., arXiv 2409.11321).

    The authors (github.com/nikhilvyas/SOAP) have lr 0.003, betas 0.95 and 0.95, decay 0.01, new
    eigenbases every 10 steps, none for a side above 10,000, and vectors as Adam has them. The
    first step moves no weight: it makes the first eigenbases, as theirs does.
    """
    return library().SOAP(
        trainable(model),
        lr=lr,
        betas=(beta, beta2),
        weight_decay=weight_decay,
        precondition_frequency=refresh_every,
    )


@register_baseline("adafactor")
def adafactor(
    model: nn.Module, norm: ModularNorm, *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Build Adafactor without momentum (Shazeer, Stern, arXiv 1804.04235), with an lr from outside.

    That is how T5 is fine-tuned: lr 0.001, no relative step, no scale of the weights, decay of
    squares 1 − t^−0.8, clipped at 1 (transformers' Adafactor, "recommended T5 finetuning
    settings"). A step size of its own would leave out the schedule, which the entries of a race
    share. The library caps the decay of squares; the cap here is none, as in the paper.
    """
    return library().AdaFactor(
        trainable(model),
        lr=lr,
        betas=(None, math.nextafter(1, 0)),
        decay_rate=-0.8,
        clip_threshold=1.0,
        scale_parameter=False,
        relative_step=False,
        weight_decay=weight_decay,
    )
