"""An optimizer's groups of parameters, and its saved state, by parameter name."""

from collections.abc import Collection, Container, Iterable, Mapping
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from .coverage import check_built, check_distinct
from .directions import DIRECTIONS
from .errors import CoverageError, PlacementError, Refusal, require
from .modular import ModularNorm
from .moments import Rows
from .norms import Norm
from .placement import OneProcess
from .ranks import Ranks, check_sharded, sharded
from .settings import StepSettings, by_role, check, known, wrong
from .sites import canonical

SCHEMA = 2  # of Dualized.state_dict()
# A ZeroRedundancyOptimizer, too, passes groups of tensors, and keeps their names from us.
IN_GROUPS = (
    '; in place of DDP with ZeroRedundancyOptimizer: Dualized(model, ..., grads="local") on the '
    "bare module, which averages gradients and shards the state"
)
LOW = (torch.bfloat16, torch.float16)  # dtypes of weights that may have float32 masters


class Defaults(dict[str, Any]):
    """The settings of groups to come, of which "momentum" is said to be one.

    torch's OneCycleLR and CyclicLR look for it here, then write group["momentum"] before each step:
    take_momentum() makes that the step's beta. So it is never a second setting beside beta.
    """

    def __contains__(self, key: object) -> bool:
        return key == "momentum" or super().__contains__(key)


def take_momentum(groups: Iterable[dict[str, Any]]) -> None:
    """Set the beta of each group to the momentum that a scheduler has written there, if one has."""
    for group in groups:
        if "momentum" in group:
            group["beta"] = group.pop("momentum")


def check_group(settings: Mapping[str, Any], *, auto: bool) -> dict[str, Any]:
    """Return the settings of a group; raise Refusal for one that cannot be.

    auto: the step size is found while training.
    """
    group = dict(settings)
    if isinstance(group["momentum_dtype"], torch.dtype):
        group["momentum_dtype"] = str(group["momentum_dtype"]).removeprefix("torch.")
    lr = group["lr"]
    require(
        not isinstance(lr, Tensor) or lr.numel() == 1,
        "Dualized: lr",
        got="a tensor of several numbers",
        allowed="a number, or a tensor with one",
        fix="Dualized(…, lr=…); radii are what differs by weight",
    )
    waits = isinstance(lr, Tensor) and lr.device.type != "cpu"  # to be known
    number = 0.0 if waits else float(lr) if isinstance(lr, Tensor) else lr
    check(StepSettings, group | {"lr": number}, owner="Dualized")
    require(
        not isinstance(lr, str),
        "Dualized: lr",
        got=repr(lr),
        allowed='a finite number >= 0, or "auto" for all groups',
        fix="Dualized(…, lr=…)",
    )
    require(
        not auto or group["scale"] == "unit",
        "Dualized: scale",
        got=repr(group["scale"]),
        allowed='"unit" with lr="auto"',
        fix="Dualized(…, scale=…), or the same key of its parameter group",
    )
    return group


def grouped(
    model_or_named: Any, norm: ModularNorm | None, roles: Mapping[str, Mapping[str, Any]]
) -> tuple[ModularNorm, list[dict[str, Any]]]:
    """Return the norm, which must be there, and groups of trainable (name, parameter) pairs, one
    more for each role that has settings of its own."""
    if isinstance(model_or_named, nn.Module):
        model_or_named = model_or_named.named_parameters()
    listed = list(model_or_named)
    if listed and all(isinstance(x, dict) for x in listed):
        listed = [{**group, "params": named_pairs(group["params"], IN_GROUPS)} for group in listed]
        every = [x for group in listed for x in group["params"]]
        check_trainable(every, every)
    else:
        every = named_pairs(listed)
        listed = [{"params": [x for x in every if x[1].requires_grad]}]
        check_trainable(every, listed[0]["params"])
    check_built(every)
    if norm is None:
        raise CoverageError(
            "Dualized of named parameters",
            got="no norm",
            allowed="named parameters with a norm, or a module",
            fix="pass norm=ModularNorm(...), or the model itself",
        )
    for role, settings in roles.items():
        require(
            role in norm.roles.values(),
            f"Dualized: roles[{role!r}]",
            got="a role that no parameter has",
            allowed=", ".join(dict.fromkeys(norm.roles.values())),
            fix="Dualized(…, roles={role: {setting: value}})",
        )
        known(f"roles[{role!r}]", settings, by_role())
        for key, value, words in wrong(StepSettings, settings):
            raise Refusal(
                f"Dualized: roles[{role!r}][{key!r}]",
                got=repr(value),
                allowed=words,
                fix=f"Dualized(…, roles={{{role!r}: {{{key!r}: …}}}})",
            )
    groups: list[dict[str, Any]] = []
    for group in listed:
        pairs = group["params"]
        for role in (None, *roles):  # None: whatever has no settings of its own
            owned = [(n, p) for n, p in pairs if own_role(norm, n, roles) == role]
            if role is None and (owned or not roles):
                groups.append({**group, "params": owned})
            elif role is not None and owned:
                groups.append({**group, **roles[role], "params": owned, "role": role})
    return norm, groups


def own_role(norm: ModularNorm, name: str, roles: Container[str]) -> str | None:
    """Return the role of a parameter if it is one of these."""
    role = norm.roles.get(canonical(name), "")
    return role if role in roles else None


def check_pairs(
    norm: ModularNorm, group: Mapping[str, Any], others: list[tuple[dict[str, Any], str, Tensor]]
) -> list[tuple[str, Tensor]]:
    """Return a group's (name, parameter) pairs, each with a norm and a radius: its own
    already, or the group's.

    others: members of the groups so far. Raises CoverageError for a parameter that has no norm,
    two, or one that does not fit.
    """
    own, radius = group.get("norm"), group.get("radius")
    pairs = [(canonical(n), p) for n, p in named_pairs(group["params"])]
    check_distinct([*(n for _, n, _ in others), *(n for n, _ in pairs)])
    for name, p in pairs:
        placed = norm.norms.get(name)
        if placed is not None and (own is not None or radius is not None):
            raise CoverageError(
                name,
                got="a second norm or radius",
                allowed=f"the norm {placed} and radius {norm.radii[name]:g} that it has already",
                fix="leave norm and radius out of its group",
            )
        if placed is None and (own is None or radius is None):
            raise CoverageError(
                f"{name} has no norm",
                got=f"norm {own!r} and radius {radius!r}",
                allowed="both, for a parameter that is added",
                fix='give its group "norm" and "radius"',
            )
        placed = placed or own
        if not isinstance(placed, Norm) or not (radius is None or 0 <= radius < inf):
            raise CoverageError(
                name,
                got=f"norm {own!r}, radius {radius!r}",
                allowed="a Norm and a finite number >= 0",
                fix="RMSToRMS() and 0.1, say",
            )
        wrong_shape = placed.check(p.shape)
        require(
            not wrong_shape and not p.is_complex(),
            name,
            got=f"shape {tuple(p.shape)}, {p.dtype}",
            allowed=f"by {placed}: {wrong_shape or 'real numbers'}",
            fix="another norm, or the weight without what it stands for",
            error=CoverageError,
        )
    return pairs


def new_buffers(
    group: Mapping[str, Any], norm: Norm, place: OneProcess, p: Tensor, *, origin: bool
) -> dict[str, Tensor]:
    """Return the buffers of this rank's rows of p before the first step: the direction's and, where
    they are kept, a float32 master and the weights W₀ of the escape velocity."""
    rows, buffers = place.rows(p).detach(), dict[str, Tensor]()
    if group["master_weights"] and rows.dtype in LOW:
        buffers["master"] = rows.float()
    if origin:
        buffers["start"] = rows.clone()
    direction = DIRECTIONS[group["direction"]]
    own = direction.on(norm, Rows(tuple(p.shape), place.first_row(p))).buffers(rows)
    assert not own.keys() & {"master", "start"}
    dtype = getattr(torch, group["momentum_dtype"] or "", None)
    for k, b in own.items():
        kept = dtype is None or b.dtype == torch.float64 or not b.is_floating_point()
        buffers[k] = b if kept or k in direction.precise else b.to(dtype)
    return buffers


def check_shards(
    group: Mapping[str, Any], pairs: list[tuple[str, Tensor]], ranks: Ranks, meshes: Container[Any]
) -> None:
    """Raise PlacementError for a sharded weight that cannot be stepped.

    meshes: those of weights before; empty if there is none.
    """
    fine = ", ".join(k for k, d in DIRECTIONS.items() if d.by_rows)
    for name, p in pairs:
        if not sharded(p):
            continue
        check_sharded(name, p)
        require(
            DIRECTIONS[group["direction"]].by_rows,
            name,
            got=f"the direction {group['direction']!r} of a sharded weight",
            allowed=f"{fine}, which need no whole weight",
            fix='one of them, or replicas (grads="local"), whose owners have whole weights',
            error=PlacementError,
        )
        mesh: Any = p.device_mesh  # type: ignore[attr-defined]
        require(
            (not meshes or mesh in meshes) and mesh.size() == ranks.size,
            name,
            got="a mesh that no weight before it has",
            allowed="one mesh",
            fix="build Dualized with sharded weights",
            error=PlacementError,
        )


def check_step(name: str, p: Tensor, *, fits: bool) -> None:
    """Raise for a weight that cannot be stepped now. fits: its settings suit where its rows are."""
    if p.grad is not None and p.grad.is_sparse:
        raise Refusal(
            name, got="a sparse gradient", allowed="dense ones", fix="sparse=False in its module"
        )
    if not fits:
        raise PlacementError(
            name,
            got="a direction, scale or constraint that needs whole weights, set after its rows were"
            " given to ranks",
            allowed="those that it was built with",
            fix="build Dualized with them",
        )


def check_trainable(every: Collection[Any], trainable: Collection[Any]) -> None:
    """Raise CoverageError where there is nothing to train."""
    require(
        trainable,
        "Dualized",
        got=f"{len(every)} parameters, all frozen" if every else "no parameters",
        allowed="one or more that require gradients",
        fix="requires_grad_(True) on what is to be trained"
        if every
        else "a model that has weights",
        error=CoverageError,
    )


def named_pairs(named: Any, advice: str = "") -> list[tuple[str, Tensor]]:
    """Return one (name, parameter) pair, or several, as a list.

    advice: what the error for tensors without names says besides.
    """
    one = isinstance(named, tuple) and len(named) == 2 and isinstance(named[0], str)
    pairs = [named] if one else list(named)
    require(
        all(isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str) for x in pairs),
        "Dualized of a list of tensors",
        got="tensors without names",
        allowed="a module, or (name, parameter) pairs with norm=",
        fix="Dualized(model, ...) or Dualized(model.named_parameters(), ..., norm=metrize(model))"
        + advice,
        error=CoverageError,
    )
    return pairs


def members(groups: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Return (group, name, parameter) of every parameter, in order."""
    return [(g, n, p) for g in groups for n, p in zip(g["param_names"], g["params"], strict=True)]


def check_saved(group: Mapping[str, Any], state: Mapping[int, Any], *, auto: bool) -> None:
    """Raise Refusal for a saved group of the other kind: with a fixed lr, or with lr="auto"."""
    is_auto = "step_size" in group and all("start" in buffers for buffers in state.values())
    kinds = ("a fixed lr", "…"), ('lr="auto"', '"auto"')
    (theirs, fix), (ours, _) = kinds if auto else kinds[::-1]
    require(
        is_auto if auto else "step_size" not in group,
        "optimizer state",
        got=f"one saved with {theirs}",
        allowed=f"one saved with {ours}",
        fix=f"Dualized(model, lr={fix}), or start anew",
    )


def by_name(
    state_dict: dict[str, Any], names: list[list[str]], *, schema: int | None = SCHEMA
) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """Return (groups, state) of a saved optimizer for groups of these parameter names, copied.

    Raises Refusal before anything changes, if it has other parameters, other groups or a later
    schema.
    """
    saved_groups = state_dict["param_groups"]
    require(
        all("param_names" in g for g in saved_groups),
        "optimizer state",
        got="groups without param_names",
        allowed="the state of an optimizer of named parameters",
        fix="save Dualized's own",
    )
    require(
        schema is None or 1 <= state_dict.get("schema", schema) <= schema,
        "optimizer state",
        got=f"schema {state_dict.get('schema')}",
        allowed=f"1 to {schema}",
        fix="use the version that saved it",
    )
    saved = {
        canonical(n): (g, i)
        for g in saved_groups
        for n, i in zip(g["param_names"], g["params"], strict=True)
    }
    ours = [n for group in names for n in group]
    odd = sorted(saved.keys() ^ set(ours))
    if odd:
        raise Refusal(
            "optimizer state",
            got=f"other parameters; {odd[0]!r} is {'missing' if odd[0] in ours else 'unknown'}",
            allowed="the same names",
            fix="load it into the model that it was saved with",
        )
    for group in names:
        require(
            all(saved[n][0] is saved[group[0]][0] for n in group),
            "optimizer state",
            got=f"parameters of one group here in several there, {group[0]!r} among them",
            allowed="the same groups",
            fix="build the optimizer with the groups that it was saved with",
        )
    groups = [
        {**saved[group[0]][0], "params": [saved[n][1] for n in group], "param_names": group}
        for group in names
    ]
    # Copied: torch keeps the loaded tensors themselves, and two optimizers would share one
    # momentum.
    state = {
        i: {k: v.clone() if isinstance(v, Tensor) else v for k, v in buffers.items()}
        for i, buffers in state_dict["state"].items()
    }
    return groups, state
