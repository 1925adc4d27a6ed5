"""From a model to its modular norm: by the structure that it declares, or by its modules' types.

Each parameter is placed exactly once, or an error names it. The user's rules come before both. The
receipt of the result is ModularNorm.receipt().
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from .coverage import check_built, check_coverage, check_distinct, check_tensors
from .errors import CoverageError, GuessWarning, require
from .experts import experts_around
from .heads import declared_head, guessed_heads
from .modular import Atom, ModularNorm, Module, atom, bond, concat
from .module_types import MASSES, map_of, norm_of_role, place_by_type
from .norms import MaxEntry, Norm
from .rules import Rule, as_rule, check_rules, nearest_name
from .sites import Map, Place, Readers, Site, canonical, sites_of
from .unplaced import summary, unplaced
from .views import Blocks, Transposed


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
    rules = [as_rule(r) for r in ([rules] if isinstance(rules, Rule | Mapping) else rules)]
    every: list[tuple[str, Tensor]] = [
        (canonical(n), p) for n, p in model.named_parameters(remove_duplicate=False)
    ]
    check_built(every)
    check_distinct(canonical(n) for n, _ in model.named_parameters())
    check_rules(rules, [name for name, _ in every])
    names: dict[int, list[str]] = defaultdict(list)  # of each tensor
    for name, p in every:
        names[id(p)].append(name)
    chosen: dict[str, Rule] = {}  # by every name of a tensor: the first rule that matches one
    for rule in reversed(rules):
        chosen |= {n: rule for group in names.values() if rule.matches(*group) for n in group}
    plain, notes = _unwrapped(model), []
    declare: Any = getattr(plain, "structure", None)
    if structure is None and callable(declare) and not isinstance(declare, nn.Module):
        structure = cast(Module, declare())
    check_tensors(model, every, chosen, declared=structure is not None)
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
    check_coverage(norm, trainable, every)

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
    heads = _heads(model, sites, maps, readers, chosen)
    tied = _tied_heads(model)
    on_logits = _biases_of_heads(sites, maps, heads) | {f"{path}.bias".lstrip(".") for path in tied}
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
    if not tied and not any(place.role == "head" for place in places.values()):
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
        label = f"{n} maps{f' of {E} experts' * (E > 1)}"
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
    nearest = nearest_name(role, MASSES) if role and role not in MASSES else ""
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
        norm = norm and _divided(norm, rule.maps or 1)
    if norm is None or isinstance(norm, str):
        return None
    as_default = default and (norm is default.norm or (rule.norm is not None and rule.role is None))
    maps = rule.maps or (default.maps if default and as_default else 1)
    guessed = rule.mass is None and rule.norm is None and rule.role is None
    note = (head if head is not None else default.note if default else "") if guessed else ""
    return Place(
        role or ("hidden" if site.weight.ndim >= 2 else "bias"), norm, maps, rule.mass, note
    )


def _divided(norm: Norm, maps: int) -> Norm:
    """Return the norm of so many equal blocks of rows, each of which has the norm."""
    if maps == 1:
        return norm
    if isinstance(norm, Transposed):
        return replace(norm, inner=Blocks(norm.inner, maps))
    return Blocks(norm, maps)


def _heads(
    model: nn.Module,
    sites: dict[str, Site],
    maps: dict[str, Map | None],
    readers: Readers,
    chosen: dict[str, Rule],
) -> dict[str, str]:
    """Return {name: why} of the heads: by rule, as transformers declare them, or guessed."""
    declared = declared_head(model)
    heads = guessed_heads(model, sites, maps, readers, declared=declared is not None)
    heads |= {name: "" for name, site in sites.items() if site.weight is declared}
    ruled = {name: rule for name, rule in chosen.items() if name in sites}
    roles = {name: rule.role or (rule.norm and "hidden") for name, rule in ruled.items()}
    kept = {name: why for name, why in heads.items() if roles.get(name) in (None, "", "head")}
    return kept | {name: "" for name, role in roles.items() if role == "head"}


def _tied_heads(model: nn.Module) -> list[str]:
    """Return the paths of the maps whose weight is an embedding's as well."""
    modules = dict(model.named_modules(remove_duplicate=False))
    tables = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    linear = {path: m for path, m in modules.items() if isinstance(m, nn.Linear)}
    return [canonical(path) for path, m in linear.items() if id(m.weight) in tables]


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
