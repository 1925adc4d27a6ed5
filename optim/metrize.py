"""From a model to its modular norm: by the structure that it declares, or by the types of its
modules and the user's rules.

Each parameter is placed exactly once, or an error names it. The receipt of the result is
ModularNorm.receipt().
"""

import difflib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import inf
from typing import Any

from torch import Tensor, nn

from .errors import CoverageError
from .modular import Atom, ModularNorm, Module, atom, bond, concat
from .norms import NORMS, L1ToRMS, MaxEntry, Norm, RMSToLinf, RMSToRMS, VectorRMS
from .views import Blocks, ConvRMSToRMS, Flattened, Transposed

WRAPPERS = (
    "_orig_mod.",
    "module.",
    "_checkpoint_wrapped_module.",
    "_fsdp_wrapped_module.",
)  # torch.compile, DDP, checkpointing, FSDP

# Masses of a model that declares no structure: each role's total, shared equally by its maps (fused
# queries, keys and values are three). As in model.py, what is between embedding and head has six
# times the mass of either.
MASSES = {"embedding": 1.0, "hidden": 6.0, "head": 1.0, "gain": 0.5, "bias": 0.5, "scalar": 0.1}
# Several maps stored as one weight, by the names that models give them: blocks of as many rows as
# there are columns.
FUSED = ("c_attn", "qkv", "qkv_proj", "Wqkv", "gate_up_proj")
INTERLEAVED = (
    "query_key_value",
)  # GPT-NeoX, Bloom: queries, keys and values of each head in turn, in sizes that only the configuration tells
GAINS, BIASES = (
    ("weight", "gamma", "gain", "scale", "g"),
    ("bias", "beta", "b"),
)  # 1-D weights of modules of unknown type, by name


@dataclass(frozen=True)
class Rule:
    """What the user decides: for parameters whose name matches `pattern` (as file names do: * and
    ?), norm, mass and role; None leaves the default.

    norm: a Norm, or a name in NORMS. mass: of each matching weight, beside the totals in MASSES.
    role: a key of MASSES, which brings its norm, or a name of your own.
    maps: how many maps the weight holds, 3 for fused queries, keys and values, each with a share of
    the role's mass; a norm that sees its blocks belongs to it. On a declared structure a rule
    changes norm, mass and the role's name.
    """

    pattern: str
    norm: Norm | str | None = None
    mass: float | None = None
    role: str | None = None
    maps: int | None = None

    def __post_init__(self) -> None:
        if not (self.norm is None or isinstance(self.norm, str | Norm)):
            raise CoverageError(
                f"rule {self.pattern!r}",
                got=f"norm {self.norm!r}",
                allowed="a Norm, or a name in NORMS",
                fix="RMSToRMS(), with brackets, say",
            )
        if isinstance(self.norm, str):
            if self.norm not in NORMS:
                raise CoverageError(
                    f"rule {self.pattern!r}",
                    got=f"norm {self.norm!r}",
                    allowed=", ".join(NORMS),
                    fix="one of those, or a Norm",
                )
            object.__setattr__(self, "norm", NORMS[self.norm]())
        if self.mass is not None and not 0 <= self.mass < inf:
            raise CoverageError(
                f"rule {self.pattern!r}",
                got=f"mass {self.mass}",
                allowed="0 (never updated) or more",
                fix="Rule(…, mass=1)",
            )

        if self.maps is not None and not (isinstance(self.maps, int) and self.maps >= 1):
            raise CoverageError(
                f"rule {self.pattern!r}",
                got=f"maps {self.maps}",
                allowed="1 or more",
                fix="Rule(…, maps=3)",
            )

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Place:
    """role, norm, and how many maps the weight holds. wrap: what its storage makes of a role's
    norm. note: a guess that the receipt prints."""

    role: str
    norm: Norm
    maps: int = 1
    wrap: Callable[[Norm], Norm] = lambda norm: norm
    note: str = ""


def _rule(fields: Mapping[str, Any]) -> Rule:
    try:
        return Rule(**fields)
    except TypeError as error:
        allowed = ", ".join(Rule.__dataclass_fields__)
        raise CoverageError(
            "rule",
            got=dict(fields),
            allowed=allowed,
            fix="{'pattern': 'lm_head.weight', 'role': 'head'}, say",
        ) from error


def canonical(name: str) -> str:
    """A parameter's name without the prefixes that torch's wrappers add."""
    parts = name.split(".")
    return ".".join(p for p in parts if f"{p}." not in WRAPPERS)


def check_distinct(names: Iterable[str]) -> None:
    """Raise CoverageError for a name that stands twice."""
    twice = [n for n, count in Counter(names).items() if count > 1]
    if twice:
        raise CoverageError(
            f"two parameters are named {twice[0]!r}",
            got="one name twice, wrappers' prefixes taken off",
            allowed="one name a parameter",
            fix="rename one",
        )


def metrize(
    model: nn.Module,
    structure: Module | None = None,
    rules: Iterable[Rule | Mapping[str, Any]] = (),
) -> ModularNorm:
    """The modular norm of a model, by canonical parameter names.

    structure: the tree; by default what model.structure() returns. A model without one is placed by
    the types of its modules, its weights side by side with the shares of MASSES: nothing is assumed
    of its forward pass. rules: Rule, or a mapping of its fields; the first that matches a name wins
    over structure and types. Every trainable parameter is placed exactly once. Raises
    CoverageError, and names it, for one that is not, that is tied to another without a rule that
    gives the two one norm, of a shape that its norm does not fit, complex, or with sparse
    gradients; for a rule without a parameter; for an atom without one.
    """
    rules = [r if isinstance(r, Rule) else _rule(r) for r in rules]
    plain = _unwrapped(model)
    every = [(canonical(n), p) for n, p in model.named_parameters(remove_duplicate=False)]
    check_distinct(canonical(n) for n, _ in model.named_parameters())
    _check_rules(rules, [n for n, _ in every])
    unique = {canonical(n): p for n, p in model.named_parameters()}
    tables = {
        canonical(f"{path}.weight".lstrip(".")): m
        for path, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    }
    alias = _check_ties(every, rules, {n for n, m in tables.items() if isinstance(m, nn.Embedding)})
    declare: Callable[[], Module] | None = getattr(plain, "structure", None)
    for name, m in tables.items():
        if m.sparse and m.weight.requires_grad:
            raise CoverageError(
                name,
                got="sparse gradients",
                allowed="dense ones",
                fix=f"build its {type(m).__name__} with sparse=False",
            )
    if structure is None and declare is not None and not isinstance(declare, nn.Module):
        structure = declare()
    trainable = {n: p for n, p in unique.items() if p.requires_grad}
    notes: list[str] = []
    for name, p in trainable.items():
        if p.is_complex():
            raise CoverageError(
                name,
                got="complex numbers",
                allowed="real ones",
                fix="keep real and imaginary parts in two parameters, or freeze it",
            )
    if structure is None:
        tree = _by_type(plain, trainable, rules, alias, notes)
    else:
        tree = (
            structure.unrolled().mapped(lambda leaf: _ruled(leaf, rules, alias))
            if rules
            else structure
        )
    found = ModularNorm.of(tree)
    for name, p in trainable.items():
        norm = found.norms.get(name)
        if norm is None:
            raise CoverageError(
                f"{name} {tuple(p.shape)} has no place in the modular structure{_nearest(name, found.norms)}",
                allowed="every trainable parameter named by exactly one atom",
                fix="add an atom for it, or freeze it (requires_grad=False)",
            )
        wrong = norm.check(p.shape)
        if wrong:
            raise CoverageError(
                name,
                got=f"shape {tuple(p.shape)}\n  allowed by {norm}: {wrong}",
                fix=f"metrize(model, rules=[Rule({name!r}, norm=…)])",
            )
    absent = sorted(found.norms.keys() - {n for n, _ in every})
    if absent:
        raise CoverageError(
            f"the structure names {absent[0]!r}, which the model does not have{_nearest(absent[0], unique)}",
            got=absent[0],
            allowed="names of the model's parameters",
            fix="rename the atom",
        )
    frozen = len(unique) - len(trainable)
    if frozen:
        notes.append(f"{frozen} frozen parameter{'s' * (frozen > 1)} left out")
    kept = {
        f: {k: v for k, v in getattr(found, f).items() if k in trainable}
        for f in ("norms", "radii", "roles", "masses")
    }
    return replace(
        found, shapes={n: tuple(p.shape) for n, p in trainable.items()}, notes=tuple(notes), **kept
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    while (
        not model._parameters
        and len(list(model.children())) == 1
        and isinstance(
            inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module
        )
    ):
        model = inner
    return model


def _ruled(leaf: Atom, rules: list[Rule], alias: dict[str, set[str]]) -> Module:
    """An atom of a declared structure, as the first rule that matches it wants it."""
    rule = next(
        (r for r in rules if any(map(r.matches, {leaf.name} | alias.get(leaf.name, set())))), None
    )
    if rule is None:
        return leaf
    assert not isinstance(rule.norm, str)
    return replace(
        leaf,
        norm=rule.norm or leaf.norm,
        mass=leaf.mass if rule.mass is None else rule.mass,
        role=rule.role or leaf.role,
    )


def _by_type(
    model: nn.Module,
    trainable: Mapping[str, Tensor],
    rules: list[Rule],
    alias: dict[str, set[str]],
    notes: list[str],
) -> Module:
    """The tree of a model that declares none: its weights side by side."""
    owners = {
        canonical(f"{path}.{own}" if path else own): (m, own, path)
        for path, m in model.named_modules()
        for own in m._parameters
    }
    heads = _declared_heads(model)
    places: dict[str, Place] = {}
    masses: dict[str, float] = {}
    for name, p in trainable.items():
        module, own, path = owners[name]
        rule = next(
            (r for r in rules for n in sorted({name} | alias.get(name, set())) if r.matches(n)),
            Rule(name),
        )
        place = _place(module, own, path, p)
        role = rule.role or ("head" if id(p) in heads else place.role if place else None)
        if role is not None and role not in MASSES and _nearest(role, MASSES):
            raise CoverageError(
                f"rule {rule.pattern!r}",
                got=f"role {role!r}{_nearest(role, MASSES)}",
                allowed=", ".join(MASSES),
                fix="one of those, or a name that is not nearly one",
            )
        norm = rule.norm
        if norm is None and role is not None and (place is None or role != place.role):
            norm = _role_norm(role, p, place)
        elif norm is None and place:
            norm = place.norm
        if norm is None or isinstance(norm, str):
            raise _unplaced(name, module, p)
        as_placed = place is not None and (
            norm is place.norm or (rule.norm is not None and rule.role is None)
        )
        maps = rule.maps or (place.maps if place and as_placed else 1)
        role = role or ("hidden" if p.ndim >= 2 else "bias")
        places[name] = Place(role, norm, maps)
        if rule.mass is not None:
            masses[name] = rule.mass
        elif rule.norm is None and rule.role is None and place and place.note:
            notes.append(f"{name}: {place.note}")
    _check_head(model, trainable, places, rules, notes)
    counts: dict[str, int] = defaultdict(int)
    for name, place in places.items():
        if name not in masses:
            counts[place.role] += place.maps
    atoms = []
    for name, place in places.items():
        n = place.maps
        mass = masses.get(
            name, n * MASSES.get(place.role, MASSES["hidden"]) / max(1, counts[place.role])
        )
        leaf = atom(name, place.norm, mass=mass, role=place.role)
        atoms.append(leaf if n == 1 else bond(f"{n} maps", sensitivity=n, sharpness=0) @ leaf)
    return bond("any network", typical=True) @ concat(*atoms)


def _place(module: nn.Module, own: str, path: str, p: Tensor) -> Place | None:
    """By the module's type; None where it says nothing."""
    kind, label = type(module).__name__, path.rpartition(".")[2]
    bias = Place("bias", VectorRMS())
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Place("embedding", L1ToRMS())
    if isinstance(module, nn.Linear) or (
        kind == "Conv1D" and getattr(module.weight, "ndim", 0) == 2
    ):
        wrap: Callable[[Norm], Norm] = (
            Transposed if kind == "Conv1D" else lambda norm: norm
        )  # transformers' GPT-2 stores (I, O)
        rows, columns = reversed(module.weight.shape) if kind == "Conv1D" else module.weight.shape  # type: ignore[misc, union-attr]
        maps, norm, vector, note = 1, wrap(RMSToRMS()), VectorRMS(), ""
        fused = "qkv" in label or label in ("kv", "to_kv", "kv_proj")
        if label in INTERLEAVED or (
            fused and label not in FUSED and rows in (2 * columns, 3 * columns)
        ):
            return None  # several maps in an order that the name does not tell
        if label == "gate_up_proj" or (label in FUSED and rows != columns):
            maps = 2 if label == "gate_up_proj" else 3
            if rows % maps or (label != "gate_up_proj" and rows != maps * columns):
                return None
            norm, vector, note = (
                wrap(Blocks(RMSToRMS(), maps)),
                Blocks(VectorRMS(), maps),
                f"{maps} maps fused in one weight, by its name ({label})",
            )
        if own in ("weight", "bias"):
            return (
                Place("hidden", norm, maps, wrap, note)
                if own == "weight"
                else Place("bias", vector, maps)
            )
    if isinstance(module, nn.modules.conv._ConvNd):
        dims, transposed = len(module.kernel_size), module.transposed
        return (
            Place("hidden", ConvRMSToRMS(dims=dims, groups=module.groups, transposed=transposed))
            if own == "weight"
            else bias
        )
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        gates = (
            4
            if isinstance(module, nn.LSTM | nn.LSTMCell)
            else 3
            if isinstance(module, nn.GRU | nn.GRUCell)
            else 1
        )
        if own.startswith("bias"):
            return Place("bias", Blocks(VectorRMS(), gates), gates)
        return (
            Place("hidden", Blocks(RMSToRMS(), gates), gates)
            if "_hr" not in own
            else Place("hidden", RMSToRMS())
        )
    if isinstance(module, nn.MultiheadAttention):
        if own in ("in_proj_weight", "in_proj_bias"):
            return (
                Place("hidden", Blocks(RMSToRMS(), 3), 3)
                if own.endswith("weight")
                else Place("bias", Blocks(VectorRMS(), 3), 3)
            )
        return (
            Place("hidden", RMSToRMS())
            if p.ndim == 2
            else Place("bias", Flattened(VectorRMS(), p.ndim))
        )
    known = isinstance(
        module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase
    )
    if p.ndim == 0:
        return Place("scalar", MaxEntry(0), note="a scalar")
    if known or p.ndim == 1:
        guess = "" if known else f"1-D and named {own}, of a {kind}: taken for a"
        if own in GAINS:
            return Place("gain", MaxEntry(p.ndim), note=guess and f"{guess} gain")
        if own in BIASES:
            return Place(
                "bias",
                VectorRMS() if p.ndim == 1 else Flattened(VectorRMS(), p.ndim),
                note=guess and f"{guess} bias",
            )
    return None


def _role_norm(role: str, p: Tensor, place: Place | None) -> Norm | None:
    """The default norm of a role that is not the module type's own."""
    wrap = place.wrap if place else lambda norm: norm
    if p.ndim == 2 and role in ("embedding", "hidden", "head"):
        return wrap({"embedding": L1ToRMS(), "hidden": RMSToRMS(), "head": RMSToLinf()}[role])
    if role in ("gain", "scalar"):
        return MaxEntry(p.ndim)
    if role == "bias" and p.ndim:
        return VectorRMS() if p.ndim == 1 else Flattened(VectorRMS(), p.ndim)
    return place.norm if place else None


def _unplaced(name: str, module: nn.Module, p: Tensor) -> CoverageError:
    shape, kind = tuple(p.shape), type(module).__name__
    fix = f"metrize(model, rules=[Rule({name!r}, norm=…, role=…)]), or freeze it"
    if p.ndim == 3:
        fix += "; for experts norm=Experts(RMSToRMS()), stored (E, in, out) Experts(Transposed(RMSToRMS())); for vectors (1, T, D) Experts(L1ToRMS())"
    elif p.ndim == 2:
        fix += "; several maps fused in one weight are norm=Blocks(RMSToRMS(), (rows of each, …)), maps=…"
    return CoverageError(
        f"{name} {shape} of a {kind} has no place",
        got="a weight whose role its module's type and its name do not tell",
        allowed="one that a rule places",
        fix=fix,
    )


def _declared_heads(model: nn.Module) -> set[int]:
    """The ids of the weights of what a transformers model calls its output embeddings."""
    get: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    weight = getattr(head, "weight", None)
    return {id(weight)} if isinstance(weight, Tensor) else set()


def _check_head(
    model: nn.Module,
    trainable: Mapping[str, Tensor],
    places: dict[str, Place],
    rules: list[Rule],
    notes: list[str],
) -> None:
    """A map to a vocabulary that nobody called the head is not taken for a hidden one."""
    if any(place.role == "head" for place in places.values()):
        return
    vocabularies = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, place in places.items():
        shape = trainable[name].shape
        if (
            place.role == "hidden"
            and place.maps == 1
            and not any(
                part.isdigit() for part in name.split(".")[:-2]
            )  # a layer's own maps are not heads
            and len(shape) == 2
            and shape[0] in vocabularies
            and shape[0] != shape[1]
            and not any(r.matches(name) for r in rules)
        ):
            raise CoverageError(
                f"{name} {tuple(shape)} looks like the head",
                got="a map to as many outputs as an embedding has rows, and no head",
                allowed="a head by rule",
                fix=f"metrize(model, rules=[Rule({name!r}, role='head')]), or role='hidden' if it is not",
            )
    notes.append(
        "no head: every linear map is a hidden one; Rule(pattern, role='head') names one that ends in logits"
    )


def _check_rules(rules: list[Rule], names: list[str]) -> None:
    left = list(names)
    for rule in rules:
        if not any(rule.matches(n) for n in left):
            shadowed = any(rule.matches(n) for n in names)
            got = (
                "matches only parameters that earlier rules have taken"
                if shadowed
                else f"matches no parameter{_nearest(rule.pattern, names)}"
            )
            raise CoverageError(
                f"rule {rule.pattern!r}",
                got=f"a pattern that {got}",
                allowed="one that decides something",
                fix="correct it, move it up, or leave it out",
            )
        left = [n for n in left if not rule.matches(n)]


def _check_ties(
    every: Sequence[tuple[str, Tensor]], rules: list[Rule], embeddings: set[str]
) -> dict[str, set[str]]:
    """{first name: further names} of weights that share memory; an error unless all are embeddings,
    or a rule gives them one norm."""
    alias: dict[str, set[str]] = {}
    spans: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    owner: dict[int, str] = {}
    tensors = dict(every)
    for name, p in every:
        other = owner.setdefault(id(p), name)
        if other == name and p.numel() and p.device.type != "meta" and p.data_ptr():
            begin = p.data_ptr()
            end = (
                begin
                + (1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True)))
                * p.element_size()
            )
            memory = spans[p.untyped_storage().data_ptr()]
            other = next((n for a, b, n in memory if a < end and begin < b), name)
            memory.append((begin, end, name))
        twin = tensors[other]
        if other == name or not (p.requires_grad or twin.requires_grad):
            continue
        rule = next((r for r in rules if r.matches(name) or r.matches(other)), None)
        one_norm = (rule is not None and rule.norm is not None) or {name, other} <= embeddings
        if twin is not p or not one_norm:
            raise CoverageError(
                f"{name} shares its storage with {other}",
                got="one tensor in two roles",
                allowed="one role a tensor, or one norm by rule",
                fix=f"untie them (transformers: tie_word_embeddings=False in the config, before the model is built), or metrize(model, rules=[Rule({other!r}, norm={('VectorRMS' if p.ndim == 1 else 'RMSToRMS')!r})])",
            )
        alias.setdefault(other, set()).add(name)
    return alias


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (nearest: {close[0]!r})" if close else ""
