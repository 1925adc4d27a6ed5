"""Files of a script, read as syntax trees: what they define, import and do. Nothing is executed."""

import ast
import re
import symtable
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from .specialise import Specialise, is_comment, parse


@dataclass(eq=False)
class Item:
    """A top-level statement with the comments before it, or a file that comes whole.

    names: what it defines. text: as it stands; None if it is specialised. effect: it does more than
    to define.
    """

    names: list[str]
    nodes: list[ast.stmt]
    text: str | None = None
    effect: bool = False


class Source:
    """One file: its items in order, and what it imports, {name: (module, part of it)}.

    plugin: a user's own file, whose effects come along.
    """

    def __init__(
        self, file: str, module: str, items: list[Item], text: str, *, plugin: bool
    ) -> None:
        self.file, self.module, self.items, self.plugin = file, module, items, plugin
        is_package = PurePath(file).stem == "__init__"
        self.package = module if is_package else module.rpartition(".")[0]
        self.imports = imports_of(text, self.package)

    def definitions(self, name: str) -> list[Item]:
        """Return the items that define a name."""
        return [i for i in self.items if name in i.names]


def module_of(file: str) -> str:
    """Return the module of a file of ours, "optim.norms" of optim/norms.py."""
    return ".".join(PurePath(file).with_suffix("").parts)


def defined(node: ast.stmt) -> list[str]:
    """Return the names that a definition or an assignment defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    names = [n for t in targets for n in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return [n.id for n in names if isinstance(n, ast.Name)]


def does_nothing(node: ast.stmt) -> bool:
    """Return whether a statement is a text, an import, or a block that a type checker, or
    `python FILE`, alone sees."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return text or isinstance(node, ast.Import | ast.ImportFrom | ast.Pass)


def bound(node: ast.stmt) -> list[str]:
    """Return the names that an if, for, while, try or with defines."""
    if not isinstance(node, ast.If | ast.For | ast.While | ast.Try | ast.With):
        return []
    symbols = symtable.symtable(ast.unparse(node), "", "exec").get_symbols()
    return [s.get_name() for s in symbols if s.is_assigned() or s.is_imported()]


def as_it_stands(text: str, *, unregistered: str = "(?!)", whole: bool = True) -> list[Item]:
    """Return the top-level statements of a file, each with the comments that touch it.

    unregistered: a pattern of decorators that are left out, and of calls that are no effect. whole:
    with the methods that import a neighbouring file when they are called, which no script can.
    """
    lines, items = text.splitlines(), []
    for node in ast.parse(text).body:
        decorators = getattr(node, "decorator_list", [])
        dropped = [d for d in decorators if re.match(unregistered, ast.unparse(d))]
        first = min(n.lineno for n in (node, *decorators))
        methods = [] if whole else importing_methods(node)
        out = {n for d in (*dropped, *methods) for n in range(d.lineno, (d.end_lineno or 0) + 1)}
        out |= {m.lineno - 1 for m in methods}  # the empty line before it
        while first > 1 and lines[first - 2].startswith("#"):
            first -= 1
        decorators[:] = [d for d in decorators if d not in dropped]
        if methods:
            node.body = [n for n in node.body if n not in methods]  # type: ignore[attr-defined]
        numbers = range(first, (node.end_lineno or 0) + 1)
        kept = "\n".join(lines[n - 1] for n in numbers if n not in out)
        registers = isinstance(node, ast.Expr) and re.match(unregistered, ast.unparse(node))
        nothing, names = bool(registers) or does_nothing(node), defined(node)
        others = [] if nothing else bound(node)
        items.append(Item(names or others, [node], kept, effect=not (nothing or names)))
    return items


def importing_methods(node: ast.stmt) -> list[ast.stmt]:
    """Return the methods of a class in which a relative import stands."""
    members = node.body if isinstance(node, ast.ClassDef) else []
    inner = {m: [n for n in ast.walk(m) if isinstance(n, ast.ImportFrom)] for m in members}
    return [m for m, imports in inner.items() if any(n.level for n in imports)]


def without_imports(text: str) -> Item:
    """Return a file as one item, all of it but its top-level imports."""
    body = ast.parse(text).body
    imports = [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
    imported = {line for n in imports for line in range(n.lineno, (n.end_lineno or 0) + 1)}
    others = [x for number, x in enumerate(text.splitlines(), start=1) if number not in imported]
    left = [n for n in body if n not in imports]
    names = [name for n in left for name in defined(n)]
    return Item(names, left, re.sub("\n{4,}", "\n\n\n", "\n".join(others)))


def specialised(text: str, special: Specialise, filled: Mapping[str, str]) -> list[Item]:
    """Return the top-level statements of a file, as they are when what is known is written in.

    filled: statements that stand for those that define these names.
    """
    items, waiting = [], []
    for node in parse(text).body[1:]:  # behind the docstring
        waiting.append(node)
        if not is_comment(node):
            names = defined(node)
            given = [filled[n] for n in names if n in filled]
            nodes = ast.parse(given[0]).body if given else waiting
            if given:
                names = [n for x in nodes for n in defined(x)]
            if not isinstance(node, ast.Import | ast.ImportFrom):
                items.append(Item(names, special.statements(nodes), effect=not names))
            waiting = []
    return items


def imports_of(text: str, package: str) -> dict[str, tuple[str, str]]:
    """Return {name: (module, part of it)} of a file's top-level imports; ("", module) of a module.

    package: to which relative imports are relative. What is "nanodual" elsewhere is "optim" here.
    """
    body, imports = ast.parse(text).body, {}
    typing = [n for n in body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    for node in [*body, *(n for block in typing for n in block.body)]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = absolute(node, package) if isinstance(node, ast.ImportFrom) else ""
            parts = {a.asname or a.name.split(".")[0]: ast.unparse(a) for a in node.names}
            imports |= {name: (origin, part) for name, part in parts.items()}
    return imports


def absolute(node: ast.ImportFrom, package: str) -> str:
    """Return the module from which a statement in a package imports."""
    parents = package.split(".")
    above = parents[: len(parents) + 1 - node.level] if node.level else []
    name = ".".join([*above, *([node.module] if node.module else [])])
    return re.sub(r"^nanodual\b", "optim", name)
