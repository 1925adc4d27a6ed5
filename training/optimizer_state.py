"""A torch optimizer's state, as JSON and tensors: what a checkpoint keeps of a baseline.

State is what an optimizer holds by parameter, in its groups and in attributes of its own: numbers,
texts, tensors, random generators, and lists, tuples, deques and dicts of these. In the JSON a
tensor's place says its name, shape and type. The tensors themselves go into safetensors files.
"""

from collections import Counter, deque
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
        packer = Packer(self.device)
        by_parameter, others = [], []
        for i, owner in enumerate(self.owners):
            entries = {self.names[p]: x for p, x in owner.state.items() if isinstance(p, Tensor)}
            by_parameter.append({n: packer.pack(x, n) for n, x in entries.items() if x})
            rest = {k: v for k, v in owner.state.items() if not isinstance(k, Tensor)}
            others.append(packer.pack(rest, f"(state {i})"))
        names = [f"(group {i})" for i in range(len(self.groups))]
        names += [f"({type(part).__name__})" for part in self.parts]
        changes = [
            self._changes(entries, was, name, packer)
            for entries, was, name in zip(self._settings(), self.settings, names, strict=True)
        ]
        self._check_shared(changes)
        packed = {"by_parameter": by_parameter, "others": others, "settings": changes}
        return packed, packer.tensors

    def _check_shared(self, changes: list[Json]) -> None:
        """Raise Refusal where groups share a list that changes: it would be several, if resumed."""
        of_groups = zip(self.groups, changes[: len(self.groups)], strict=True)
        values = [(k, group[k]) for group, changed in of_groups for k in changed]
        counts = Counter(id(v) for _, v in values if type(v) in (list, dict, deque))
        shared = [k for k, v in values if counts[id(v)] > 1]
        require(
            not shared,
            f"the optimizer's state {shared and shared[0]}",
            got="one object that several groups share, and that steps change",
            allowed="an object for each group",
            fix=NO_CHECKPOINTS,
        )

    def _changes(self, entries: Mapping[str, Any], was: Json, name: str, packer: "Packer") -> Json:
        """Return {key: value} of what differs from a snapshot, packed."""
        changes = {}
        for key, value in _own(entries).items():
            before = packer.count
            try:
                packed = packer.pack(value, f"{name}.{key}")
            except Refusal:
                if was.get(key) == {"object": id(value)}:
                    continue
                raise
            has_tensors = packer.count > before
            require(
                not has_tensors or "params" in entries or isinstance(value, Tensor),
                f"the optimizer's attribute {key}",
                got="tensors that are in none of its groups, and in its state of no weight",
                allowed="self.state[weight] for what belongs to a weight",
                fix=NO_CHECKPOINTS,
            )
            if has_tensors or key not in was or packed != was[key]:
                changes[key] = packed
        return changes

    def make(self, packed: Json) -> None:
        """Make the state anew as it was packed, with tensors whose entries are to be read yet."""
        parameters = {name: p for p, name in self.names.items()}
        unpack = Unpacker(self.device).unpack
        for owner, named, others in zip(
            self.owners, packed["by_parameter"], packed["others"], strict=True
        ):
            owner.state.update((parameters[n], unpack(entries)) for n, entries in named.items())
            owner.state.update(unpack(others))
        for entries, changes in zip(self._settings(), packed["settings"], strict=True):
            entries.update((k, unpack(v)) for k, v in changes.items())

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
            snapshot[key] = Packer(torch.device("cpu")).pack(value, key)
        except Refusal:
            snapshot[key] = {"object": id(value)}
    return snapshot


class Packer:
    """Turns values into JSON, and keeps their tensors by name, each of them once.

    device: of the weights, which a tensor follows unless it stays on the host. count: of tensors
    so far, again and again.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.count = device, 0
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def pack(self, value: Any, name: str) -> Json:
        """Return a value as JSON. Its tensors get names that begin with `name`.

        Raises Refusal for what is none of the kinds of state.
        """
        if isinstance(value, SCALARS):
            return value
        if type(value) is Tensor and value.layout is torch.strided:
            return self._pack_tensor(value, name)
        if type(value) in (list, tuple, deque):
            items = [self.pack(x, f"{name}.{i}") for i, x in enumerate(value)]
            if type(value) is deque:
                return {"deque": items, "maxlen": value.maxlen}
            return items if type(value) is list else {"tuple": items}
        if type(value) is dict:
            pairs = [[self.pack(k, name), self.pack(v, f"{name}.{k}")] for k, v in value.items()]
            return {"dict": pairs}
        if type(value) is torch.Generator:
            state = bytes(value.get_state().tolist()).hex()
            return {"generator": state, "host": value.device.type == "cpu"}
        raise Refusal(
            f"the optimizer's state {name}",
            got=f"a {type(value).__module__}.{type(value).__qualname__}, which no checkpoint holds",
            allowed="numbers, texts, tensors, and lists, tuples, deques and dicts of these",
            fix=NO_CHECKPOINTS,
        )

    def _pack_tensor(self, tensor: Tensor, name: str) -> Json:
        self.count += 1
        name = self._names.setdefault(id(tensor), name)
        while self.tensors.get(name, tensor) is not tensor:
            name = self._names[id(tensor)] = f"{name}'"
        row: dict[str, Json] = {
            "tensor": name,
            "shape": [*tensor.shape],
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
        if not tensor.is_contiguous():  # products of other strides round otherwise
            row["stride"] = [*torch.empty_like(tensor, device="meta").stride()]
        if tensor.device.type == "cpu" != self.device.type:
            row["host"] = True
        if tensor.numel():
            self.tensors[name] = tensor
        return row


class Unpacker:
    """Turns JSON of a Packer into values again, its tensors with any entries.

    device: of the weights.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: dict[str, Tensor] = {}

    def unpack(self, packed: Json) -> Any:
        """Return the value that was packed."""
        if isinstance(packed, list):
            return [self.unpack(x) for x in packed]
        if not isinstance(packed, dict):
            return packed
        if "tensor" in packed:
            return self._tensors.setdefault(packed["tensor"], self._tensor(packed))
        if "tuple" in packed:
            return tuple(self.unpack(x) for x in packed["tuple"])
        if "deque" in packed:
            return deque((self.unpack(x) for x in packed["deque"]), packed["maxlen"])
        if "generator" in packed:
            state = torch.tensor(list(bytes.fromhex(packed["generator"])), dtype=torch.uint8)
            return torch.Generator(self._place(packed)).set_state(state)
        return {self.unpack(k): self.unpack(v) for k, v in packed["dict"]}

    def _tensor(self, row: Json) -> Tensor:
        stride = row.get("stride", torch.empty(row["shape"], device="meta").stride())
        dtype = getattr(torch, row["dtype"])
        return torch.empty_strided(row["shape"], stride, dtype=dtype, device=self._place(row))

    def _place(self, row: Json) -> torch.device:
        return torch.device("cpu") if row.get("host") else self.device
