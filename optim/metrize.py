"""From a model to its modular norm: by the structure that it declares, or by its modules' types.

Each parameter is placed exactly once, or an error names it. The user's rules come before both. The
receipt of the result is ModularNorm.receipt().
"""

import difflib
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import inf
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import CoverageError, GuessWarning, require
from .heads import declared_head, guessed_heads
from .modular import Atom, ModularNorm, Module, atom, bond, concat
from .module_types import MASSES, experts_around, map_of, norm_of_role, place_by_type
from .norms import NORMS, MaxEntry, Norm
from .sites import Map, Place, Readers, Site, canonical, sites_of
from .unplaced import summary, unplaced


@dataclass(frozen=True)
class Rule:
    """A user's decision on the parameters whose name matches; None leaves the default.

    pattern: as of file names, with * and ?. norm: a Norm, or a name in NORMS. mass: of each
    matching weight, beside the totals in MASSES. role: a key of MASSES, which brings its norm, or a
    name of your own. maps: how many maps the weight holds, 3 for fused queries, keys and values,
    each with a share of the role's mass; a norm that sees its blocks belongs to it. On a declared
    structure a rule changes norm, mass and the role's name.
    """

    pattern: str
    norm: Norm | str | None = None
    mass: float | None = None
    role: str | None = None
    maps: int | None = None

    def __post_init__(self) -> None:
        norm, mass, maps = self.norm, self.mass, self.maps
        typed, named = norm is None or isinstance(norm, str | Norm), not isinstance(norm, str)
        weighed = mass is None or 0 <= mass < inf
        counted = maps is None or (isinstance(maps, int) and maps >= 1)
        for field, fine, allowed, fix in (
            ("norm", typed, "a Norm, or a name in NORMS", "RMSToRMS(), with brackets, say"),
            ("norm", named or norm in NORMS, ", ".join(NORMS), "one of those, or a Norm"),
            ("mass", weighed, "0 (never updated) or more", "Rule(…, mass=1)"),
            ("maps", counted, "1 or more", "Rule(…, maps=3)"),
        ):
            what, got = f"rule {self.pattern!r}", f"{field} {getattr(self, field)!r}"
            require(fine, what, got=got, allowed=allowed, fix=fix, error=CoverageError)
        if isinstance(norm, str):
            object.__setattr__(self, "norm", NORMS[norm]())

    def matches(self, *names: str) -> bool:
        """Return whether one of the names of a weight matches."""
        return any(fnmatchcase(name, self.pattern) for name in names)


def _rule(fields: Mapping[str, Any]) -> Rule:
    try:
        return Rule(**fields)
    except TypeError as error:
        allowed = ", ".join(Rule.__dataclass_fields__)
        fix = "{'pattern': 'lm_head.weight', 'role': 'head'}, say"
        raise CoverageError("rule", got=dict(fields), allowed=allowed, fix=fix) from error


def check_distinct(names: Iterable[str]) -> None:
    """Raise CoverageError for a name that stands twice."""
    for name, count in Counter(names).items():
        require(
            count == 1,
            f"two parameters are named {name!r}",
            got="one name twice, wrappers' prefixes taken off",
            allowed="one name a parameter",
            fix="rename one",
            error=CoverageError,
        )


def check_built(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise CoverageError for a parameter of a lazy module, which has no shape yet."""
    for name, p in named:
        require(
            not is_lazy(p),
            name,
            got="a parameter of a lazy module, whose shape is not known yet",
            allowed="parameters with shapes",
            fix="call the model once on an input before",
            error=CoverageError,
        )


def metrize(
    model: nn.Module,
    structure: Module | None = None,
    rules: Iterable[Rule | Mapping[str, Any]] = (),
    *,
    tell: bool = False,
) -> ModularNorm:
    """Return the modular norm of a model, by canonical parameter names.

    structure: the tree; by default what model.structure() returns. A model without one is placed by
    the types of its modules, its weights side by side with the shares of MASSES: nothing is assumed
    of its forward pass. rules: Rule, or a mapping of its fields; the first that matches a name wins
    over structure and types.
    tell: warn once of what was guessed, which is in the notes of the result and in its receipt.
    Every trainable parameter is placed exactly once. Raises CoverageError for those that are not,
    all of them named, each with a rule that places it; for one that is tied to another without a
    rule that gives the two one norm, of a shape that its norm does not fit, complex, or with sparse
    gradients; for a rule without a parameter; for an atom without one.
    """
    rules = [r if isinstance(r, Rule) else _rule(r) for r in rules]
    every: list[tuple[str, Tensor]] = [
        (canonical(n), p) for n, p in model.named_parameters(remove_duplicate=False)
    ]
    check_built(every)
    check_distinct(canonical(n) for n, _ in model.named_parameters())
    _check_rules(rules, [name for name, _ in every])
    names: dict[int, list[str]] = defaultdict(list)  # of each tensor
    for name, p in every:
        names[id(p)].append(name)
    chosen: dict[str, Rule] = {}  # by every name of a tensor: the first rule that matches one
    for rule in reversed(rules):
        chosen |= {n: rule for group in names.values() if rule.matches(*group) for n in group}
    plain, notes = _unwrapped(model), []
    declare: Callable[[], Module] | None = getattr(plain, "structure", None)
    if structure is None and declare is not None and not isinstance(declare, nn.Module):
        structure = declare()
    _check_tensors(model, every, chosen, declared=structure is not None)
    firsts = {group[0] for group in names.values()}
    trainable = {name: p for name, p in every if name in firsts and p.requires_grad}

    if structure is None:
        structure, notes = _by_type(plain, trainable, chosen)
        if tell and notes:
            lines = "\n  ".join(notes)
            text = f"metrize guessed, as metrize(model, rules=…) can correct:\n  {lines}"
            warnings.warn(text, GuessWarning, stacklevel=3)
    elif rules:
        structure = structure.unrolled().mapped(lambda leaf: _ruled(leaf, chosen))
    norm = ModularNorm.of(structure)
    _check_coverage(norm, trainable, every)

    frozen = len(firsts) - len(trainable)
    if frozen:
        notes.append(f"{frozen} frozen parameter{'s' * (frozen > 1)} left out")
    kept = {
        f: {name: value for name, value in getattr(norm, f).items() if name in trainable}
        for f in ("norms", "radii", "roles", "masses")
    }
    shapes = {name: tuple(p.shape) for name, p in trainable.items()}
    return replace(norm, shapes=shapes, notes=tuple(notes), **kept)


def _unwrapped(model: nn.Module) -> nn.Module:
    while not model._parameters and len(list(model.children())) == 1:
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _ruled(leaf: Atom, chosen: dict[str, Rule]) -> Module:
    """Return an atom of a declared structure as its rule wants it."""
    rule = chosen.get(leaf.name, Rule(leaf.name))
    assert not isinstance(rule.norm, str)
    mass = leaf.mass if rule.mass is None else rule.mass
    return replace(leaf, norm=rule.norm or leaf.norm, mass=mass, role=rule.role or leaf.role)


# ---- a model that declares no structure


def _by_type(
    model: nn.Module, trainable: dict[str, Tensor], chosen: dict[str, Rule]
) -> tuple[Module, list[str]]:
    """Return the tree of a model that declares none, its weights side by side, and its notes."""
    sites = sites_of(model)
    maps = {name: map_of(site) for name, site in sites.items()}
    readers = Readers({sites[name].key: own for name, own in maps.items() if own is not None})
    heads = _heads(model, sites, maps, chosen)
    on_logits = _biases_of_heads(sites, maps, heads)
    weights = {site.key: name for name, site in sites.items() if maps[name] is not None}
    places: dict[str, Place] = {}
    left: dict[str, Site] = {}
    for name in sorted(trainable, key=lambda n: sites[n].own == "bias"):  # behind their weights
        site, rule = sites[name], chosen.get(name, Rule(name))
        weight = weights.get(site.path, "") if site.own == "bias" else name
        if weight in left:
            continue  # until its weight is placed
        beside = places.get(weight) if weight != name else None
        own = maps.get(weight)
        default = place_by_type(site, own, readers, beside)
        place = _placed(site, own, rule, default, heads.get(name), name in on_logits)
        if place is None:
            left[name] = site
        else:
            places[name] = place
    if left:
        raise unplaced(left, maps)
    places = {name: places[name] for name in trainable}
    notes = summary({name: place.note for name, place in places.items() if place.note})
    if not any(place.role == "head" for place in places.values()):
        notes.append(
            "no head: every linear map is a hidden one; "
            "Rule(pattern, role='head') names one that ends in logits"
        )
    return _side_by_side(places, sites), notes


def _side_by_side(places: dict[str, Place], sites: dict[str, Site]) -> Module:
    """Return the tree of weights side by side, each role's mass in equal parts on its maps.

    Experts in a list of modules are one module together, as a stack of them is: their outputs are
    combined convexly.
    """
    experts = {name: experts_around(sites[name]) for name in places}
    maps: dict[str, float] = defaultdict(float)  # that share the mass of a role
    for name, place in places.items():
        maps[place.role] += place.maps / experts[name] if place.mass is None else 0
    atoms = []
    for name, place in places.items():
        n, E, mass = place.maps, experts[name], place.mass
        if mass is None:
            mass = n / E * MASSES.get(place.role, MASSES["hidden"]) / maps[place.role]
        leaf = atom(name, place.norm, mass=mass, role=place.role)
        label = (
            f"{n} maps"
            if E == 1
            else f"{n} of {E} experts"
            if n == 1
            else f"{n} maps of {E} experts"
        )
        atoms.append(leaf if n == E == 1 else bond(label, sensitivity=n / E, sharpness=0) @ leaf)
    return bond("any network", typical=True) @ concat(*atoms)


def _placed(
    site: Site,
    own: Map | None,
    rule: Rule,
    default: Place | None,
    head: str | None,
    on_logits: bool,
) -> Place | None:
    """Return the place of a weight: by its rule, its role, then its module's type.

    head: why it is a head, which is a note. on_logits: it is added to logits. None where the weight
    has no place.
    """
    role = rule.role or ("head" if head is not None else default.role if default else None)
    nearest = _nearest(role, MASSES) if role and role not in MASSES else ""
    require(
        not nearest,
        f"rule {rule.pattern!r}",
        got=f"role {role!r}{nearest}",
        allowed=", ".join(MASSES),
        fix="one of those, or a name that is not nearly one",
        error=CoverageError,
    )
    norm = rule.norm
    if norm is None and on_logits and role in ("bias", "head"):
        norm = MaxEntry(site.weight.ndim)  # the norm of logits is their largest entry
    elif norm is None and default and role == default.role and rule.maps in (None, default.maps):
        norm = default.norm
    elif norm is None:
        norm = norm_of_role(role, site, own, default)
    if norm is None or isinstance(norm, str):
        return None
    as_default = default and (norm is default.norm or (rule.norm is not None and rule.role is None))
    maps = rule.maps or (default.maps if default and as_default else 1)
    guessed = rule.mass is None and rule.norm is None and rule.role is None
    note = (head if head is not None else default.note if default else "") if guessed else ""
    return Place(
        role or ("hidden" if site.weight.ndim >= 2 else "bias"), norm, maps, rule.mass, note
    )


def _heads(
    model: nn.Module,
    sites: dict[str, Site],
    maps: dict[str, Map | None],
    chosen: dict[str, Rule],
) -> dict[str, str]:
    """Return {name: why} of the heads: by rule, as transformers declare them, or guessed."""
    declared = declared_head(model)
    heads = guessed_heads(model, sites, maps)
    heads |= {name: "" for name, site in sites.items() if site.weight is declared}
    roles = {name: rule.role or (rule.norm and "hidden") for name, rule in chosen.items()}
    kept = {name: why for name, why in heads.items() if roles.get(name) in (None, "", "head")}
    return kept | {name: "" for name, role in roles.items() if role == "head"}


def _biases_of_heads(
    sites: dict[str, Site], maps: dict[str, Map | None], heads: dict[str, str]
) -> set[str]:
    """Return the names of the biases of heads: beside one, or alone and of as many entries."""
    paths = {sites[name].path for name in heads}
    logits = {own.O for name in heads if (own := maps[name]) is not None}
    alone = {
        name
        for name, site in sites.items()
        if site.own == "bias"
        and site.weight.numel() in logits
        and not hasattr(site.module, "weight")
    }
    return alone | {n for n, site in sites.items() if site.own == "bias" and site.path in paths}


# ---- what cannot be placed


def _check_rules(rules: list[Rule], names: list[str]) -> None:
    """Raise CoverageError for a rule that decides nothing."""
    left = list(names)
    for rule in rules:
        if not any(map(rule.matches, left)):
            shadowed = any(map(rule.matches, names))
            raise CoverageError(
                f"rule {rule.pattern!r}",
                got="a pattern that matches only parameters that earlier rules have taken"
                if shadowed
                else f"a pattern that matches no parameter{_nearest(rule.pattern, names)}",
                allowed="one that decides something",
                fix="correct it, move it up, or leave it out",
            )
        left = [name for name in left if not rule.matches(name)]


def _check_tensors(
    model: nn.Module, every: list[tuple[str, Tensor]], chosen: dict[str, Rule], *, declared: bool
) -> None:
    """Raise CoverageError for weights that share memory, are complex or get sparse gradients."""
    tables = {
        canonical(f"{path}.weight".lstrip(".")): module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    owners = {
        canonical(f"{path}.{own}".lstrip(".")): module
        for path, module in model.named_modules(remove_duplicate=False)
        for own in module._parameters
    }
    alone = (nn.Embedding,) if declared else (nn.Module,)  # what may share a weight by its type
    _check_ties(every, chosen, {n: m for n, m in owners.items() if isinstance(m, alone)})
    for name, module in tables.items():
        require(
            not (module.sparse and module.weight.requires_grad),
            name,
            got="sparse gradients",
            allowed="dense ones",
            fix=f"build its {type(module).__name__} with sparse=False",
            error=CoverageError,
        )
    for name, p in every:
        require(
            not (p.requires_grad and p.is_complex()),
            name,
            got="complex numbers",
            allowed="real ones",
            fix="keep real and imaginary parts in two parameters, or freeze it",
            error=CoverageError,
        )


def _check_ties(
    every: list[tuple[str, Tensor]], chosen: dict[str, Rule], owners: dict[str, nn.Module]
) -> None:
    """Raise CoverageError for weights that share memory.

    Two names of one tensor may stand where modules of one type have it under one name, where both
    are biases, and where a rule gives them one norm. owners: the module of each name, if its type
    may decide.
    """
    spans: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    first: dict[int, str] = {}
    tensors = dict(every)
    for name, p in every:
        owner = first.setdefault(id(p), name)
        if owner == name and p.numel() and p.device.type != "meta" and p.data_ptr():
            reach = sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
            begin, end = p.data_ptr(), p.data_ptr() + (1 + reach) * p.element_size()
            memory = spans[p.untyped_storage().data_ptr()]
            owner = next((n for a, b, n in memory if a < end and begin < b), name)
            memory.append((begin, end, name))
        twin = tensors[owner]
        ruled = name in chosen and chosen[name].norm is not None
        own, twins_own = name.rpartition(".")[2], owner.rpartition(".")[2]
        kinds = owners.get(name), owners.get(owner)
        alike = None not in kinds and (type(kinds[0]) is type(kinds[1]) or p.ndim == 1)
        one_norm = ruled or (alike and own == twins_own)
        moves = p.requires_grad or twin.requires_grad
        norm = "VectorRMS" if p.ndim == 1 else "RMSToRMS"
        require(
            owner == name or not moves or (twin is p and one_norm),
            f"{name} shares its storage with {owner}",
            got="one tensor in two roles",
            allowed="one role a tensor, or one norm by rule",
            fix="untie them (transformers: tie_word_embeddings=False in the config, before the "
            f"model is built), or metrize(model, rules=[Rule({owner!r}, norm={norm!r})])",
            error=CoverageError,
        )


def _check_coverage(
    norm: ModularNorm, trainable: dict[str, Tensor], every: list[tuple[str, Tensor]]
) -> None:
    """Raise CoverageError unless each parameter has one atom of its shape, and each atom one."""
    for name, p in trainable.items():
        shape, own = tuple(p.shape), norm.norms.get(name)
        if own is None:
            nearest = _nearest(name, norm.norms)
            raise CoverageError(
                f"{name} {shape} has no place in the modular structure{nearest}",
                got="no atom of that name",
                allowed="every trainable parameter named by exactly one atom",
                fix="add an atom for it, or freeze it (requires_grad=False)",
            )
        wrong = own.check(shape)
        require(
            not wrong,
            name,
            got=f"shape {shape}",
            allowed=f"{wrong} ({own})",
            fix=f"metrize(model, rules=[Rule({name!r}, norm=…)])",
            error=CoverageError,
        )
    names = [name for name, _ in every]
    for name in sorted(norm.norms.keys() - set(names))[:1]:
        raise CoverageError(
            f"the structure names {name!r}, which the model does not have{_nearest(name, names)}",
            got=name,
            allowed="names of the model's parameters",
            fix="rename the atom",
        )


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (nearest: {close[0]!r})" if close else ""
