"""Checks that every weight of a model can have one norm, and has it."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import CoverageError, require
from .modular import ModularNorm
from .rules import Rule, nearest_name
from .sites import canonical


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


def check_tensors(
    model: nn.Module, every: list[tuple[str, Tensor]], chosen: dict[str, Rule], *, declared: bool
) -> None:
    """Raise CoverageError for weights that share memory, are complex or get sparse gradients."""
    owners = {
        canonical(f"{path}.{own}".lstrip(".")): module
        for path, module in model.named_modules(remove_duplicate=False)
        for own in module._parameters
    }
    alone = (nn.Embedding,) if declared else (nn.Module,)  # what may share a weight by its type
    _check_ties(every, chosen, {n: m for n, m in owners.items() if isinstance(m, alone)})
    for name, module in owners.items():
        table = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        require(
            not (table and module.sparse and module.weight.requires_grad),
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
    are biases, and where a rule gives them one norm or role. owners: the module of each name, if
    its type may decide.
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
        rule = chosen.get(name)
        ruled = rule is not None and (rule.norm or rule.role) is not None
        own, twins_own = name.rpartition(".")[2], owner.rpartition(".")[2]
        kinds = owners.get(name), owners.get(owner)
        alike = None not in kinds and (type(kinds[0]) is type(kinds[1]) or p.ndim == 1)
        one_norm = ruled or (alike and own == twins_own)
        moves = p.requires_grad or twin.requires_grad
        norm = "VectorRMS" if p.ndim == 1 else "RMSToRMS"
        by_rule = f", or metrize(model, rules=[Rule({owner!r}, norm={norm!r})])"
        require(
            owner == name or not moves or (twin is p and one_norm),
            f"{name} shares its storage with {owner}",
            got="one tensor in two roles",
            allowed="one role a tensor, or one norm by rule",
            fix="untie them (transformers: tie_word_embeddings=False in the config, before the "
            f"model is built){by_rule if twin is p and p.ndim <= 2 else ''}",
            error=CoverageError,
        )


def check_coverage(
    norm: ModularNorm, trainable: dict[str, Tensor], every: list[tuple[str, Tensor]]
) -> None:
    """Raise CoverageError unless each parameter has one atom of its shape, and each atom one."""
    for name, p in trainable.items():
        shape, own = tuple(p.shape), norm.norms.get(name)
        if own is None:
            nearest = nearest_name(name, norm.norms)
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
            f"the structure names {name!r}, which the model does not have"
            f"{nearest_name(name, names)}",
            got=name,
            allowed="names of the model's parameters",
            fix="rename the atom",
        )
