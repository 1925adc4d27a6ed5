"""A torch optimizer's state, as JSON and tensors: what a checkpoint keeps of a baseline.

State is what an optimizer holds by parameter, in its groups and in attributes of its own: numbers,
texts, tensors, random generators, and lists, tuples, deques and dicts of these. In the JSON a
tensor's place says its name, shape and type. The tensors themselves go into safetensors files.
"""

from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from optim.errors import Refusal, require

Json = Any
SCALARS = (type(None), bool, int, float, str)
# The keys of a group that the training loop sets, or that are no state.
NO_STATE = ("lr", "beta", "betas", "momentum", "dampening")
NO_STATE += ("params", "param_names", "lr_scale", "auxiliary")
NO_CHECKPOINTS = "keep it as that, or save no checkpoints: --train.keep-checkpoints 0"


def parts_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """Yield an optimizer and those that it is made of: a wrapper's base, each of several."""
    yield optimizer
    for value in vars(optimizer).values():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, torch.optim.Optimizer):
                yield from parts_of(part)


class OptimizerState:
    """The state of an optimizer: what differs from what its constructor made.

    names: of its parameters. A setting is no state: a key of a group or an attribute counts as soon
    as it has another value than at first, and one with a tensor in it always.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> None:
        self.names, self.groups = names, optimizer.param_groups
        self.device = next(iter(names)).device
        self.parts = list(parts_of(optimizer))
        # A wrapper and its base may share one dict, and several optimizers have none of their own.
        owners = {id(vars(part)["state"]): part for part in self.parts if "state" in vars(part)}
        self.owners = list(owners.values())
        self.settings = [_snapshot(entries) for entries in self._settings()]

    def _settings(self) -> list[MutableMapping[str, Any]]:
        """Return the dicts that hold settings, and maybe state: every group, every part's own."""
        return [*self.groups, *map(vars, self.parts)]

    def pack(self) -> tuple[Json, dict[str, Tensor]]:
        """Return (JSON, {name: tensor}). Raises Refusal for state that has no place in either."""
        tensors: dict[str, Tensor] = {}
        by_parameter, others = [], []
        for i, owner in enumerate(self.owners):
            entries = {self.names[p]: x for p, x in owner.state.items() if isinstance(p, Tensor)}
            named = {n: pack(x, n, tensors, self.device) for n, x in entries.items() if x}
            by_parameter.append(named)
            shared = {k: v for k, v in owner.state.items() if not isinstance(k, Tensor)}
            others.append(pack(shared, f"(state {i})", tensors, self.device))
        names = [f"(group {i})" for i in range(len(self.groups))]
        names += [f"({type(part).__name__})" for part in self.parts]
        changes = [
            self._changes(entries, was, name, tensors)
            for entries, was, name in zip(self._settings(), self.settings, names, strict=True)
        ]
        return {"by_parameter": by_parameter, "others": others, "settings": changes}, tensors

    def _changes(
        self, entries: Mapping[str, Any], was: Json, name: str, tensors: dict[str, Tensor]
    ) -> Json:
        """Return {key: value} of what differs from a snapshot, packed."""
        changes = {}
        for key, value in _own(entries).items():
            before = len(tensors)
            try:
                packed = pack(value, f"{name}.{key}", tensors, self.device)
            except Refusal:
                if was.get(key) == {"object": id(value)}:
                    continue
                raise
            held = len(tensors) > before
            require(
                not held or "params" in entries or isinstance(value, Tensor),
                f"the optimizer's attribute {key}",
                got="tensors that are in none of its groups, and in its state of no weight",
                allowed="self.state[weight] for what belongs to a weight",
                fix=NO_CHECKPOINTS,
            )
            if held or key not in was or packed != was[key]:
                changes[key] = packed
        return changes

    def make(self, packed: Json) -> None:
        """Make the state anew as it was packed, with tensors whose entries are to be read yet."""
        parameters = {name: p for p, name in self.names.items()}
        for owner, named, others in zip(
            self.owners, packed["by_parameter"], packed["others"], strict=True
        ):
            for name, entries in named.items():
                p = parameters[name]
                owner.state[p] = unpack(entries, p.device)
            owner.state.update(unpack(others, self.device))
        for entries, changes in zip(self._settings(), packed["settings"], strict=True):
            entries.update((k, unpack(v, self.device)) for k, v in changes.items())

    def packed_before(self, saved: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Json:
        """Return the JSON of a checkpoint that has none, with its tensors' shapes and types.

        Such a one is older, and of torch's optimizers: a parameter's buffers, and `step` as (1,).
        """
        by_parameter: list[dict[str, Json]] = [{} for _ in self.owners]
        for key, (shape, dtype) in saved.items():
            name, _, buffer = key.rpartition(".")
            shape = () if buffer == "step" else shape
            row = {"tensor": key, "shape": [*shape], "dtype": str(dtype).removeprefix("torch.")}
            for owner, named in zip(self.owners, by_parameter, strict=True):
                if any(self.names[p] == name for g in owner.param_groups for p in g["params"]):
                    named.setdefault(name, {"dict": []})["dict"].append([buffer, row])
        nothing = [{"dict": []} for _ in self.owners]
        settings = [{} for _ in self._settings()]
        return {"by_parameter": by_parameter, "others": nothing, "settings": settings}


def _own(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return what may be state of a group, or of an optimizer's attributes."""
    if "params" in entries:
        return {k: v for k, v in entries.items() if k not in NO_STATE}
    return {k: v for k, v in entries.items() if k not in ("state", "param_groups", "defaults")}


def _snapshot(entries: Mapping[str, Any]) -> dict[str, Json]:
    """Return {key: packed value}, or what tells the object apart where it cannot be packed."""
    snapshot: dict[str, Json] = {}
    for key, value in _own(entries).items():
        try:
            snapshot[key] = pack(value, key, {}, torch.device("cpu"))
        except Refusal:
            snapshot[key] = {"object": id(value)}
    return snapshot


def pack(value: Any, name: str, tensors: dict[str, Tensor], device: torch.device) -> Json:
    """Return a value as JSON. Its tensors are put into `tensors`, under names that begin with name.

    device: of the weights, which a tensor follows unless it stays on the host. Raises Refusal for
    any other kind of value.
    """
    if isinstance(value, SCALARS):
        return value
    if type(value) is Tensor and value.layout is torch.strided:
        return _pack_tensor(value, name, tensors, device)
    if type(value) in (list, tuple, deque):
        items = [pack(x, f"{name}.{i}", tensors, device) for i, x in enumerate(value)]
        if type(value) is deque:
            return {"deque": items, "maxlen": value.maxlen}
        return items if type(value) is list else {"tuple": items}
    if type(value) is dict:
        pairs = value.items()
        return {
            "dict": [
                [pack(k, name, tensors, device), pack(v, f"{name}.{k}", tensors, device)]
                for k, v in pairs
            ]
        }
    if type(value) is torch.Generator:
        state = bytes(value.get_state().tolist()).hex()
        return {"generator": state, "host": value.device.type == "cpu"}
    raise Refusal(
        f"the optimizer's state {name}",
        got=f"a {type(value).__module__}.{type(value).__qualname__}, which no checkpoint can hold",
        allowed="numbers, texts, tensors, and lists, tuples, deques and dicts of these",
        fix=NO_CHECKPOINTS,
    )


def _pack_tensor(
    tensor: Tensor, name: str, tensors: dict[str, Tensor], device: torch.device
) -> Json:
    while name in tensors:
        name += "'"
    row: dict[str, Json] = {
        "tensor": name,
        "shape": [*tensor.shape],
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }
    if not tensor.is_contiguous():  # products of other strides round otherwise
        row["stride"] = [*torch.empty_like(tensor, device="meta").stride()]
    if tensor.device.type == "cpu" != device.type:
        row["host"] = True
    if tensor.numel():
        tensors[name] = tensor.detach()
    return row


def unpack(packed: Json, device: torch.device) -> Any:
    """Return the value that was packed, its tensors with any entries.

    device: of the weights.
    """
    if isinstance(packed, list):
        return [unpack(x, device) for x in packed]
    if not isinstance(packed, dict):
        return packed
    place = torch.device("cpu") if packed.get("host") else device
    if "generator" in packed:
        state = torch.tensor(list(bytes.fromhex(packed["generator"])), dtype=torch.uint8)
        return torch.Generator(place).set_state(state)
    if "tensor" in packed:
        shape = packed["shape"]
        stride = packed.get("stride", torch.empty(shape, device="meta").stride())
        return torch.empty_strided(
            shape, stride, dtype=getattr(torch, packed["dtype"]), device=place
        )
    if "tuple" in packed:
        return tuple(unpack(x, device) for x in packed["tuple"])
    if "deque" in packed:
        return deque((unpack(x, device) for x in packed["deque"]), packed["maxlen"])
    return {unpack(k, device): unpack(v, device) for k, v in packed["dict"]}
