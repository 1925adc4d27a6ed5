"""A torch optimizer's state, as JSON and tensors: what a checkpoint keeps of a baseline.

State is what an optimizer holds by parameter, in its groups and in attributes of its own: numbers,
texts, tensors, random generators, and lists, tuples, deques, sets and dicts of these. In the JSON
a tensor's place says its name, shape and type. The tensors themselves go into safetensors files.
"""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, MutableMapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from optim import ModularNorm
from optim.errors import Refusal
from optim.polar import Polar

Json = Any
SCALARS = (type(None), bool, int, float, str)
DICTS = {kind.__name__: kind for kind in (dict, OrderedDict, Counter, defaultdict)}
FACTORIES = {f.__name__: f for f in (bool, int, float, str, list, set, dict, deque)}
# Values without a place in a checkpoint, that the constructor makes anew and no step changes.
CONSTANTS = (torch.dtype, torch.device, torch.Size, Polar, Enum, bytes, complex)
PARTS = (torch.optim.Optimizer, ModularNorm)
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
        self.settings = [self._snapshot(entries) for entries in self._settings()]

    def _settings(self) -> list[MutableMapping[str, Any]]:
        """Return the dicts that hold settings, and maybe state: every group, every part's own."""
        return [*self.groups, *map(vars, self.parts)]

    def _snapshot(self, entries: Mapping[str, Any]) -> dict[str, Json]:
        """Return {key: packed value}; what cannot be packed is refused later, after a step."""
        packer = Packer(self.device, self.names)
        return {key: packer.pack(value, key) for key, value in _own(entries).items()}

    def pack(self, *, saved: bool = True) -> tuple[Json, dict[str, Tensor]]:
        """Return (JSON, {name: tensor}).

        Raises Refusal for state that has no place in either, unless it is not to be saved.
        """
        packer = Packer(self.device, self.names)
        packed = [
            self._pack_owner(owner, f"(state {i})", packer) for i, owner in enumerate(self.owners)
        ]
        names = [f"(group {i})" for i in range(len(self.groups))]
        names += [f"({type(part).__name__})" for part in self.parts]
        changes = [
            self._changes(entries, was, name, packer)
            for entries, was, name in zip(self._settings(), self.settings, names, strict=True)
        ]
        self._check_shared(changes, packer)
        for refusal in [*packer.refusals, *packer.objects] if saved else []:
            raise refusal
        by_parameter, others = [x for x, _ in packed], [x for _, x in packed]
        return {"by_parameter": by_parameter, "others": others, "settings": changes}, packer.tensors

    def _pack_owner(
        self, owner: torch.optim.Optimizer, name: str, packer: "Packer"
    ) -> tuple[Json, Json]:
        """Return ({parameter: its state}, all other state) of one optimizer, packed."""
        by_parameter, others = {}, {}
        for key, value in owner.state.items():
            if not isinstance(key, Tensor):
                others[key] = value
            elif key not in self.names:
                packer.refuse(
                    f"the state of {type(owner).__name__}",
                    got=f"self.state of a tensor of shape {tuple(key.shape)} that is no weight",
                    allowed="self.state[weight], for a weight of its groups",
                )
            elif type(value) not in DICTS.values():
                weight = self.names[key]
                by_parameter[weight] = packer.pack(value, f"{weight}.(state)")
            elif value:
                by_parameter[self.names[key]] = packer.pack(value, self.names[key])
        return by_parameter, packer.pack(others, name)

    def _check_shared(self, changes: list[Json], packer: "Packer") -> None:
        """Refuse a list that groups share and that changes: it would be several, if resumed."""
        of_groups = zip(self.groups, changes[: len(self.groups)], strict=True)
        values = [(k, group[k]) for group, changed in of_groups for k in changed]
        kinds = (list, deque, set, *DICTS.values())
        counts = Counter(id(v) for _, v in values if type(v) in kinds)
        for key in [k for k, v in values if counts[id(v)] > 1][:1]:
            packer.refuse(
                f"the optimizer's state {key}",
                got="one object that several groups share, and that steps change",
                allowed="an object for each group",
            )

    def _changes(self, entries: Mapping[str, Any], was: Json, name: str, packer: "Packer") -> Json:
        """Return {key: value} of what differs from a snapshot, packed."""
        changes = {}
        for key, value in _own(entries).items():
            count, objects = packer.count, len(packer.objects)
            packed = packer.pack(value, f"{name}.{key}")
            has_tensors = packer.count > count
            if has_tensors and "params" not in entries and not isinstance(value, Tensor):
                packer.refuse(
                    f"the optimizer's attribute {key}",
                    got="tensors that are in none of its groups, and in its state of no weight",
                    allowed="self.state[weight] for what belongs to a weight",
                )
            if has_tensors or key not in was or packed != was[key]:
                changes[key] = packed
            else:
                del packer.objects[objects:]
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
                for group in owner.param_groups:
                    if any(self.names[p] == name for p in group["params"]):
                        # Where torch has it, so that reading it does not wait for the device.
                        on_device = group.get("fused") or group.get("capturable")
                        host = {"host": True} if buffer == "step" and not on_device else {}
                        named.setdefault(name, {"dict": []})["dict"].append([buffer, row | host])
        nothing = [{"dict": []} for _ in self.owners]
        settings = [{} for _ in self._settings()]
        return {"by_parameter": by_parameter, "others": nothing, "settings": settings}


def _own(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return what may be state of a group, or of an optimizer's attributes."""
    if "params" in entries:
        return {k: v for k, v in entries.items() if k not in NO_STATE}
    own = {k: v for k, v in entries.items() if k not in ("state", "param_groups", "defaults")}
    return {k: v for k, v in own.items() if not k.startswith("_optimizer_")}  # torch's hooks


class Packer:
    """Turns values into JSON, and keeps their tensors by name, each of them once.

    device: of the weights, which a tensor follows unless it stays on the host. weights: with their
    names. count: of tensors so far, again and again. refusals: of values that it could not pack.
    objects: refusals of those among them that no step changes, as functions and modules.
    """

    def __init__(self, device: torch.device, weights: Mapping[Tensor, str] | None = None) -> None:
        self.device, self.weights, self.count = device, weights or {}, 0
        self.tensors: dict[str, Tensor] = {}
        self.refusals: list[Refusal] = []
        self.objects: list[Refusal] = []
        self._names: dict[int, str] = {}
        # By storage: the first byte, the last, and the name of each tensor in it.
        self._spans: dict[int, list[tuple[int, int, str]]] = {}
        for p, name in self.weights.items():
            self._spans.setdefault(_storage(p), []).append((*_span(p), name))

    def refuse(self, what: str, *, got: str, allowed: str) -> None:
        """Keep a refusal, for who has to save the state."""
        self.refusals.append(Refusal(what, got=got, allowed=allowed, fix=NO_CHECKPOINTS))

    def pack(self, value: Any, name: str) -> Json:
        """Return a value as JSON. Its tensors get names that begin with `name`.

        What is none of the kinds of state is refused, and gets what tells the object apart.
        """
        if isinstance(value, SCALARS):
            return value
        if type(value) is Tensor and value.layout is torch.strided:
            return self._pack_tensor(value, name)
        if type(value) in (list, tuple, deque, set, frozenset):
            items = [self.pack(x, f"{name}.{i}") for i, x in enumerate(value)]
            if type(value) is deque:
                return {"deque": items, "maxlen": value.maxlen}
            if type(value) in (set, frozenset):
                return {type(value).__name__: sorted(items, key=repr)}
            return items if type(value) is list else {"tuple": items}
        if type(value) in DICTS.values():
            return self._pack_dict(value, name)
        if type(value) is torch.Generator:
            state = bytes(value.get_state().tolist()).hex()
            return {"generator": state, "host": value.device.type == "cpu"}
        self.refuse(
            f"the optimizer's state {name}",
            got=f"a {type(value).__module__}.{type(value).__qualname__}, which no checkpoint holds",
            allowed="numbers, texts, tensors, and lists, tuples, deques, sets and dicts of these",
        )
        weight = isinstance(value, Tensor) and value in self.weights
        if weight or callable(value) or isinstance(value, (*CONSTANTS, *PARTS)):
            self.objects.append(self.refusals.pop())
        return {"object": repr(value) if isinstance(value, CONSTANTS) else id(value)}

    def _pack_dict(self, value: Any, name: str) -> Json:
        pairs = []
        for i, (k, v) in enumerate(value.items()):
            key = k if isinstance(k, SCALARS) else i
            pairs.append([self.pack(k, name), self.pack(v, f"{name}.{key}")])
        row: dict[str, Json] = {"dict": pairs}
        if type(value) is not dict:
            row["kind"] = type(value).__name__
        if isinstance(value, defaultdict) and value.default_factory is not None:
            row["factory"] = getattr(value.default_factory, "__name__", "")
            if FACTORIES.get(row["factory"]) is not value.default_factory:
                self.refuse(
                    f"the optimizer's state {name}",
                    got=f"a defaultdict of {value.default_factory}, which no checkpoint holds",
                    allowed=f"a dict, or a defaultdict of {', '.join(FACTORIES)}",
                )
        return row

    def _check_memory(self, tensor: Tensor, name: str) -> None:
        """Refuse a tensor in memory that another one has too: they would part, if resumed."""
        start, end = _span(tensor)
        spans = self._spans.setdefault(_storage(tensor), [])
        for _, _, other in [x for x in spans if x[0] < end and start < x[1]][:1]:
            self.refuse(
                f"the optimizer's state {name}",
                got=f"a tensor that shares its memory with {other}",
                allowed="tensors of their own memory, or one and the same tensor",
            )
        spans.append((start, end, name))

    def _pack_tensor(self, tensor: Tensor, name: str) -> Json:
        self.count += 1
        if tensor.numel() and id(tensor) not in self._names:
            self._check_memory(tensor, name)
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


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage, and the one after its last."""
    start, size = tensor.storage_offset(), tensor.element_size()
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return int(start * size), int((start + steps + 1) * size)


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
        for kind in (set, frozenset):
            if kind.__name__ in packed:
                return kind(self.unpack(x) for x in packed[kind.__name__])
        value = {self.unpack(k): self.unpack(v) for k, v in packed["dict"]}
        kind: Any = DICTS[packed.get("kind", "dict")]
        if kind is defaultdict:
            return kind(FACTORIES[packed["factory"]] if "factory" in packed else None, value)
        return kind(value)

    def _tensor(self, row: Json) -> Tensor:
        stride = row.get("stride", torch.empty(row["shape"], device="meta").stride())
        dtype = getattr(torch, row["dtype"])
        return torch.empty_strided(row["shape"], stride, dtype=dtype, device=self._place(row))

    def _place(self, row: Json) -> torch.device:
        return torch.device("cpu") if row.get("host") else self.device
