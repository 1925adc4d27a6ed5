"""The optimizers we are compared with: torch's own, and [MN]'s normalized ones.

A baseline is one function of a model and its norm. Its keyword parameters declare its settings:
those that StepSettings has come from the section [optim], all others are its own and come from
[baseline], with their default, range and help text here. training/published.py has more of them,
from a library; a plugin may have others. Sources: [MN] arXiv 2405.14813.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim import _muon

from .errors import Refusal, require
from .metrize import canonical
from .modular import ModularNorm
from .normalized import Normalized
from .plugins import call, require_free
from .polar import Polar, plain
from .settings import (
    Help,
    Range,
    StepSettings,
    allowed,
    defaults_of,
    fits,
    hints_of,
    known,
)

Build = Callable[..., torch.optim.Optimizer]
Scaling = Literal["standard", "ntk", "modular"]
GIVEN = ("polar",)  # what a run has besides, and a baseline may ask for


@dataclass(frozen=True)
class Recipe:
    """How a baseline is built, the settings that it takes, and what else is known of it.

    normed: its steps have the modular norm lr, so that a run's receipt is that of the norm.
    scaling: the coordinates in which it descends with one learning rate, None if there are none.
    """

    name: str
    build: Build
    normed: bool = False
    scaling: Scaling | None = None

    @cached_property
    def hints(self) -> dict[str, Any]:
        """Return {setting: its type with range and help text}."""
        hints = hints_of(StepSettings) | get_type_hints(self.build, include_extras=True)
        keywords = inspect.signature(self.build).parameters.values()
        return {p.name: hints.get(p.name) for p in keywords if p.kind is p.KEYWORD_ONLY}

    @cached_property
    def own(self) -> dict[str, tuple[Any, Any]]:
        """Return {setting: (type, default)} of the settings that no other optimizer needs."""
        parameters = inspect.signature(self.build).parameters
        others = (*hints_of(StepSettings), *GIVEN)
        return {k: (h, parameters[k].default) for k, h in self.hints.items() if k not in others}

    def __call__(
        self, model: nn.Module, norm: ModularNorm, **settings: Any
    ) -> torch.optim.Optimizer:
        """Build the optimizer from those of the settings that it takes.

        Settings of other optimizers are left aside, so that the entries of a comparison can share
        their settings. A group whose average of gradients does not decay by `beta` is marked as
        auxiliary, so that set_beta leaves it alone.
        """
        others = {k for baseline in BASELINES.values() for k in baseline.hints}
        known(self.name, settings, [*defaults_of(StepSettings), *others])
        for key, hint in self.hints.items():
            require(
                key not in settings or key in GIVEN or fits(hint, settings[key]),
                f"{self.name}: {key}",
                got=repr(settings.get(key)),
                allowed=allowed(hint),
                fix=f"{self.name}(…, {key}=…)",
            )
        taken = {k: v for k, v in settings.items() if k in self.hints}
        optimizer = call(self.name, self.build, model, norm, **taken)
        require(
            isinstance(optimizer, torch.optim.Optimizer),
            f"{self.name}: what its function returns",
            got=f"a {type(optimizer).__name__}",
            allowed="a torch optimizer",
            fix="return torch.optim.SGD(model.named_parameters(), lr=lr), say",
        )
        for group in optimizer.param_groups:
            if average_decay(group) != taken.get("beta"):
                group["auxiliary"] = True
        return optimizer


BASELINES: dict[str, Recipe] = {}


def register_baseline(
    name: str, *, normed: bool = False, scaling: Scaling | None = None
) -> Callable[[Build], Build]:
    """Make an optimizer known by name, so that configurations can name it.

    The function takes (model, norm), and after a * the settings of the optimizer. Settings that
    StepSettings has come from [optim], `polar` from [optim.polar]. Any other is the baseline's own
    and comes from [baseline]: it has a type, a default and a Help text. The function returns a
    torch optimizer of the model's weights, each weight once.

    The training loop sets the lr of every group. A group that was built with a multiple of the
    others' lr keeps that multiple, and so does one with an "lr_scale". normed: its steps have the
    modular norm lr. scaling: the coordinates in which it descends with one learning rate, for
    train.sharpness_every; a setting of this name takes its place.
    """

    def register(build: Build) -> Build:
        require(
            name != "dualized",
            "register_baseline",
            got=repr(name),
            allowed="a name that is not the dualized optimizer's own",
            fix="another name",
        )
        present = BASELINES[name].build if name in BASELINES else None
        require_free("register_baseline", name, build, present)
        recipe = Recipe(name, build, normed, "modular" if normed else scaling)
        _check_declaration(recipe)
        BASELINES[name] = recipe
        return build

    return register


def _check_declaration(recipe: Recipe) -> None:
    """Raise Refusal for a function whose parameters do not declare a baseline's settings."""
    name, what = recipe.name, f"register_baseline: {recipe.name}"
    parameters = list(inspect.signature(recipe.build).parameters.values())
    require(
        [p.kind for p in parameters[:2]] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
        and all(p.kind is p.KEYWORD_ONLY for p in parameters[2:]),
        what,
        got=f"a function of ({', '.join(map(str, parameters))})",
        allowed="(model, norm), then settings that are keywords only",
        fix=f"def {name}(model, norm, *, lr: float, beta: float)",
    )
    try:
        own = recipe.own
    except (NameError, TypeError) as error:
        raise Refusal(
            what,
            got=f"an annotation that cannot be read: {error}",
            allowed="types that its module has imported",
            fix="import them at the top of the module",
        ) from error
    for key, (hint, default) in own.items():
        what = f"register_baseline: {key} of {name}"
        texts = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Help)]
        others = [b.own[key] for b in BASELINES.values() if b.name != name and key in b.own]
        require(
            texts and default is not inspect.Parameter.empty,
            what,
            got="a setting without default or help text",
            allowed="a setting of Dualized, or one that says what it is",
            fix=f'{key}: Annotated[float, Range(0), Help("…")] = …',
        )
        require(
            all(other == own[key] for other in others),
            what,
            got="another declaration than another baseline's",
            allowed="the same, or another name",
            fix="rename it",
        )
        require(
            fits(hint, default),
            what,
            got=f"the default {default!r}",
            allowed=allowed(hint),
            fix="another default, or a type that TOML has: float, int, bool, str, Literal, list",
        )


@register_baseline("normalized_adam", normed=True)
def normalized_adam(
    model: nn.Module,
    norm: ModularNorm,
    *,
    lr: float,
    beta: float,
    beta2: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Build [MN]'s Adam: its update, every tensor of it at norm lr · radius."""
    base = torch.optim.Adam(trainable(model), betas=(beta, beta2))
    return Normalized(base, norm, lr, weight_decay=weight_decay)


@register_baseline("normalized_sgd", normed=True)
def normalized_sgd(
    model: nn.Module, norm: ModularNorm, *, lr: float, beta: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Build [MN]'s SGD: the averaged gradient, every tensor of it at norm lr · radius."""
    base = torch.optim.SGD(trainable(model), momentum=beta, dampening=beta)
    return Normalized(base, norm, lr, weight_decay=weight_decay)


@register_baseline("adamw", scaling="standard")
def adamw(
    model: nn.Module,
    norm: ModularNorm,
    *,
    lr: float,
    beta: float,
    beta2: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Build torch's AdamW, with decay on matrices and embeddings alone, as nanoGPT groups them."""
    groups = [
        {
            "params": [(n, p) for n, p in trainable(model) if (p.ndim >= 2) is decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=lr, betas=(beta, beta2), fused=_fused(model)
    )


# ---- Muon for the hidden matrices, AdamW for the rest

# lr of AdamW's groups as multiples of Muon's, its betas, ε, and its weight decay as a multiple of
# Muon's: the optimization track's tuned baseline (modded-nanogpt, records/track_3_optimization/
# train_gpt_simple.py, 06/2026: 0.7, 0.004, 0.015 beside 0.025, decay 0.001 beside 0.05).
AUXILIARY = {
    "embedding": 0.7 / 0.025,
    "ngram": 0.7 / 0.025,
    "match": 0.7 / 0.025,
    "head": 0.004 / 0.025,
    "vectors": 0.015 / 0.025,
}
AUXILIARY_SETTINGS: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-10}
AUXILIARY_DECAY = 0.001 / 0.05


AuxiliaryLr = Annotated[
    float,
    Range(0, above=True),
    Help("muon_adamw, normuon: a multiple of AdamW's learning rates; 1 is the track's beside lr."),
]


@register_baseline("muon_adamw")
def muon_adamw(
    model: nn.Module,
    norm: ModularNorm,
    *,
    lr: float,
    beta: float,
    weight_decay: float,
    auxiliary_lr: AuxiliaryLr = 1.0,
    polar: Polar | None = None,
) -> torch.optim.Optimizer:
    """Build torch's Muon for the hidden matrices and AdamW for embeddings, head and vectors.

    They are grouped as the optimization track's baseline. lr, beta, weight_decay: Muon's. polar:
    with its dtype "float32" Muon is Float32Muon.
    """
    hidden, rest = split_hidden(model, norm)
    kind = Float32Muon if polar is not None and polar.dtype == "float32" else torch.optim.Muon
    muon = kind(hidden, lr=lr, momentum=beta, weight_decay=weight_decay)
    return Several(
        muon, auxiliary_adamw(model, rest, lr=lr, scale=auxiliary_lr, weight_decay=weight_decay)
    )


Named = list[tuple[str, Tensor]]


def split_hidden(model: nn.Module, norm: ModularNorm) -> tuple[Named, dict[str, Named]]:
    """Return the hidden matrices of a model, and its other weights by their kind in AUXILIARY."""
    kinds: dict[str, Named] = {"hidden": []}
    for name, p in trainable(model):
        role = norm.roles[canonical(name)]
        kind = "vectors" if p.ndim < 2 else role if role in AUXILIARY else "hidden"
        kinds.setdefault(kind, []).append((name, p))
    return kinds.pop("hidden"), kinds


def auxiliary_adamw(
    model: nn.Module, kinds: dict[str, Named], *, lr: float, scale: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Build the track's AdamW beside a Muon. scale: of its learning rates; the rest are Muon's."""
    groups = [
        {"params": named, "lr_scale": scale * AUXILIARY[kind], "auxiliary": True}
        for kind, named in kinds.items()
    ]
    decay = AUXILIARY_DECAY * weight_decay
    return torch.optim.AdamW(
        groups, lr=lr, weight_decay=decay, fused=_fused(model), **AUXILIARY_SETTINGS
    )


class Float32Muon(torch.optim.Muon):
    """torch.optim.Muon with its iteration in float32, for processors that emulate bfloat16.

    There bfloat16 takes seven times as long.
    """

    def step(self, closure: Any = None) -> Any:
        theirs = _muon._zeropower_via_newtonschulz
        try:
            _muon._zeropower_via_newtonschulz = newton_schulz
            with torch.no_grad():
                # Without the hooks, which this class's own step has.
                return inspect.unwrap(torch.optim.Muon.step)(self, closure)
        finally:
            _muon._zeropower_via_newtonschulz = theirs


def newton_schulz(
    grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
) -> Tensor:
    """Iterate as torch.optim.Muon on one matrix, in its own dtype instead of bfloat16."""
    X = grad.mT if grad.shape[0] > grad.shape[1] else grad
    X = plain((X / X.norm().clamp(min=eps))[None], (ns_coefficients,) * ns_steps)[0]
    return X.mT if grad.shape[0] > grad.shape[1] else X


class Several(torch.optim.Optimizer):
    """Several optimizers, each of its own parameters, that a training loop uses as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers, self.defaults = optimizers, optimizers[0].defaults
        self.param_groups = [group for o in optimizers for group in o.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        return {p: s for o in self.optimizers for p, s in o.state.items()}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the groups' settings alone: buffers are in `state`."""
        return {
            "state": {},
            "param_groups": [g for o in self.optimizers for g in o.state_dict()["param_groups"]],
        }


# ---- gradient descent, in three coordinates


@register_baseline("sgd", scaling="standard")
def sgd(
    model: nn.Module,
    norm: ModularNorm,
    *,
    lr: float,
    beta: float,
    weight_decay: float,
    scaling: Annotated[
        Scaling,
        Help(
            "sgd: the coordinates in which all weights have one learning rate, those of the"
            " standard, the NTK or the maximal-update parametrization."
        ),
    ] = "standard",
) -> torch.optim.Optimizer:
    """Build torch's SGD with averaged momentum (dampening = beta).

    Every weight is a group, as `scaling` gives each its own multiple of lr (see coordinates).
    """
    scales = coordinates(model, norm, scaling)
    groups = [
        {"params": [(n, p)], "lr_scale": scales[canonical(n)] ** 2} for n, p in trainable(model)
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=beta, dampening=beta, weight_decay=weight_decay)


def coordinates(model: nn.Module, norm: ModularNorm, scaling: Scaling) -> dict[str, float]:
    """Return {name: s} of W = s · v, v: coordinates in which all weights have one learning rate.

    In W the learning rate of plain gradient descent is s² times that. standard: 1. ntk: 1/√I for
    matrices (O, I), and 1 for embeddings, gains and biases (Jacot et al., arXiv 1806.07572).
    modular: radius times the size of one entry of norm 1, so that a matrix moves by √(O/I), an
    embedding row by √D and a head row by 1/√I as Modula's weights do ([MN] §3); this is the
    scaling of maximal updates (Yang, Simon, Bernstein, arXiv 2310.17813).
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

    def scale(name: str, p: Tensor) -> float:
        if scaling == "ntk":
            return 1.0 if p.ndim < 2 or id(p) in embeddings else p[0].numel() ** -0.5
        if scaling == "modular":
            one = torch.zeros(p.shape)
            one.view(-1)[0] = 1
            return norm.radii[name] / float(norm.norms[name].norm(one))
        return 1.0

    return {canonical(n): scale(canonical(n), p) for n, p in trainable(model)}


def takes_polar(name: str) -> bool:
    """Return whether an optimizer is a baseline with Muon's iteration, which [optim.polar] sets."""
    return name in BASELINES and "polar" in BASELINES[name].hints


def average_decay(group: dict[str, Any]) -> float | None:
    """Return the decay of a group's average of gradients, None where it has no such setting."""
    average = group.get("beta", group.get("momentum"))
    return average if average is not None else (group.get("betas") or (None,))[0]


def set_beta(group: dict[str, Any], beta: float) -> None:
    """Set the decay of a parameter group's average of gradients, by its optimizer's name for it.

    Auxiliary groups keep theirs, and so do groups that have none.
    """
    if group.get("auxiliary") or average_decay(group) is None:
        return
    if "beta" in group:
        group["beta"] = beta
    elif "momentum" in group:
        if group.get("dampening") == group["momentum"]:  # where the momentum is an average
            group["dampening"] = beta
        group["momentum"] = beta
    else:
        group["betas"] = (beta, *group["betas"][1:])


def _fused(model: nn.Module) -> bool:
    return all(p.device.type in ("cpu", "cuda") for p in model.parameters())


def trainable(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the named weights that are trained."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]
