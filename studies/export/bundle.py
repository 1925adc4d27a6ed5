"""Our own modules as one file, made on syntax trees alone: nothing is executed.

Files come in three ways. Some come whole, but for their imports. Of others every definition that
something names comes as it stands, byte for byte. The rest is specialised to a run: what is known
is written in, what that decides is decided, and only what is then used is left.

The last file is the script's end. Its statements stay in their order. Its definitions, and those of
the other files, come along where something that is left names them; of a specialised class the
methods come that something left mentions.
"""

import ast
import copy
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .specialise import GONE, BundleError, Known, Specialise, is_comment, parse, unparse

# ---- files, and what they define


@dataclass(eq=False)
class Item:
    """A top-level statement with the comments before it, or a file that comes whole.

    names: what it defines; none for an effect. text: as it stands; None if it is specialised.
    """

    names: list[str]
    nodes: list[ast.stmt]
    text: str | None = None


@dataclass(eq=False)
class Source:
    """One file: its items in order, and what it imports, {name: (module, part of it)}."""

    file: str
    items: list[Item]
    imports: dict[str, tuple[str, str]]

    def definition(self, name: str) -> Item | None:
        """Return the item that defines a name."""
        return next((i for i in self.items if name in i.names), None)


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    names = [n for t in targets for n in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return [n.id for n in names if isinstance(n, ast.Name)]


def as_it_stands(text: str, *, unregistered: Sequence[str] = ()) -> list[Item]:
    """Return the top-level statements of a file, each with the comments that touch it.

    unregistered: decorators that are left out.
    """
    lines, items = text.splitlines(), []
    for node in ast.parse(text).body:
        decorators = getattr(node, "decorator_list", [])
        dropped = [d for d in decorators if ast.unparse(d) in unregistered]
        decorators[:] = [d for d in decorators if d not in dropped]
        first = min(n.lineno for n in (node, *decorators))
        while first > 1 and not dropped and lines[first - 2].startswith("#"):
            first -= 1
        items.append(Item(_defined(node), [node], "\n".join(lines[first - 1 : node.end_lineno])))
    return items


def without_imports(text: str) -> Item:
    """Return a file as one item, all of it but its top-level imports."""
    body = ast.parse(text).body
    imports = [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
    imported = {line for n in imports for line in range(n.lineno, (n.end_lineno or 0) + 1)}
    others = [x for number, x in enumerate(text.splitlines(), start=1) if number not in imported]
    left = [n for n in body if n not in imports]
    names = [name for n in left for name in _defined(n)]
    return Item(names, left, re.sub("\n{4,}", "\n\n\n", "\n".join(others)))


def specialised(text: str, special: Specialise, filled: Mapping[str, str]) -> list[Item]:
    """Return the top-level statements of a file, as they are when what is known is written in.

    filled: statements that stand for those that define these names.
    """
    items, waiting = [], []
    for node in parse(text).body[1:]:  # behind the docstring
        waiting.append(node)
        if not is_comment(node):
            names = _defined(node)
            given = [filled[n] for n in names if n in filled]
            nodes = ast.parse(given[0]).body if given else waiting
            if not isinstance(node, ast.Import | ast.ImportFrom):
                items.append(Item(names, special.statements(nodes)))
            waiting = []
    return items


def imports_of(text: str) -> dict[str, tuple[str, str]]:
    """Return {name: (module, part of it)} of a file's top-level imports; ("", module) of a module.

    A relative import's module begins with its dots.
    """
    imports = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = "." * getattr(node, "level", 0) + (getattr(node, "module", None) or "")
            parts = {a.asname or a.name.split(".")[0]: ast.unparse(a) for a in node.names}
            imports |= {name: (module, part) for name, part in parts.items()}
    return imports


# ---- one file of several


def bundle(
    root: Path,
    files: Mapping[str, str],
    *,
    known: Mapping[str, Known],
    filled: Mapping[str, str],
    packages: Sequence[str],
    whole: Sequence[str] = (),
    unregistered: Sequence[str] = (),
) -> str:
    """Return the last file with all that it needs of the files, {file: a title for its part}.

    A file may need earlier ones alone when it is imported. known: by file, see Specialise; a file
    that is not among them comes as it stands. filled: statements that stand for those of these
    names in the last file. packages: whose names are among the files. whole: files that come whole,
    if at all. unregistered: decorators that are left out. Raises BundleError for a name that is in
    none of the files, or twice in what is left.
    """
    constants: dict[str, int | float] = {}
    sources, last = [], [*files][-1]
    for file in files:
        text = (root / file).read_text(encoding="utf-8")
        if file in known:
            special = Specialise(known[file], constants)
            items = specialised(text, special, filled if file == last else {})
        elif file in whole:
            items = [without_imports(text)]
        else:
            items = as_it_stands(text, unregistered=unregistered)
        sources.append(Source(file, items, imports_of(text)))
    reach = Reach(sources, packages)
    parts = {s.file: [i for i in s.items if i in reach.items and i.nodes] for s in sources}
    sections = [
        f"# ---- {files[file]}\n\n{_text(items, reach)}" for file, items in parts.items() if items
    ]
    body = "\n\n\n".join(sections)
    used = {n.id for n in ast.walk(ast.parse(body)) if isinstance(n, ast.Name)}
    numbers = {k: v for k, v in constants.items() if k in used}
    imports = [(name, origin) for name, origin in reach.imports if name in used]
    names = [*(n for items in parts.values() for i in items for n in i.names), *numbers]
    _check([*names, *(name for name, _ in imports)], used)
    top = _imports({origin for _, origin in imports})
    header = "".join(f"{k} = {v!r}\n" for k, v in numbers.items())
    return f"{top}\n# ---- Hyperparameters\n\n{header}\n\n{body}\n"


def _check(names: list[str], used: set[str]) -> None:
    """Raise BundleError for a name that has two definitions, and for one that should be gone."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        got, fix = "a second definition", "rename one of them"
        raise BundleError(twice, got=got, allowed="one in a file", fix=fix)
    if GONE in used:
        got, allowed = "a use of it that is left", "as an argument, a parameter, a statement"
        raise BundleError("an erased name", got=got, allowed=allowed, fix="what is known")


def _text(items: Sequence[Item], reach: "Reach") -> str:
    """Return the text of items of one file."""
    if items[0].text is not None:
        return "\n\n\n".join(str(i.text).strip("\n") for i in items)
    return formatted(unparse([reach.without_unused(n) for i in items for n in i.nodes])).strip("\n")


def formatted(text: str) -> str:
    """Return the text as ruff formats it where that is installed, and as it is elsewhere."""
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "100", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else text


def _imports(origins: set[tuple[str, str]]) -> str:
    """Return import statements, the standard library's first."""
    lines = [f"import {part}" for module, part in sorted(origins) if not module]
    for module in sorted({module for module, _ in origins if module}):
        parts = ", ".join(part for origin, part in sorted(origins) if origin == module)
        lines.append(f"from {module} import {parts}")
    own = [line for line in lines if line.split()[1].split(".")[0] in sys.stdlib_module_names]
    return "\n".join([*own, "", *(line for line in lines if line not in own), ""])


class Reach:
    """The definitions that the last file's effects name, those that these name, and so on."""

    def __init__(self, sources: list[Source], packages: Sequence[str]) -> None:
        """Find it. packages: those whose names are among the files."""
        self.sources, self.packages = sources, packages
        self.items: set[Item] = set()
        self.left: set[ast.stmt] = set()  # specialised code, of classes what is mentioned
        self.mentions = {"forward"}  # which torch calls
        self.imports: set[tuple[str, tuple[str, str]]] = set()  # of what is not among the files
        self.todo = [(sources[-1], i) for i in sources[-1].items if not i.names]
        members: list[tuple[Source, ast.stmt]] = []  # of classes, that nothing mentions so far
        while self.todo:
            source, item = self.todo.pop()
            if item in self.items:
                continue
            self.items.add(item)
            for node in item.nodes:
                if item.text is not None:
                    self._follow(source, node)
                elif isinstance(node, ast.ClassDef):
                    self._follow(source, *node.bases, *node.decorator_list)
                    members += [(source, m) for m in node.body]
                else:
                    self._leave(source, node)
            while mentioned := [x for x in members if self._mentioned(x[1])]:
                members = [x for x in members if x not in mentioned]
                for owner, member in mentioned:
                    self._leave(owner, member)

    def _leave(self, source: Source, node: ast.stmt) -> None:
        """Note that specialised code is left, and what it mentions."""
        self.left.add(node)
        loads = (n for n in ast.walk(node) if isinstance(n, ast.Attribute))
        self.mentions |= {n.attr for n in loads if isinstance(n.ctx, ast.Load)}
        self._follow(source, node)

    def _follow(self, source: Source, *nodes: ast.AST) -> None:
        """Note to look at the definitions of the names in code."""
        names = (n for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name))
        self.todo += [pair for n in names for pair in self._definitions(source, n.id)]

    def _definitions(self, source: Source, name: str) -> list[tuple[Source, Item]]:
        """Return where a name is defined: nowhere if Python has it, if it is a local name, and if
        it comes from elsewhere, which is noted."""
        own, imported = source.definition(name), source.imports.get(name)
        module, _ = imported or ("", "")
        if own is not None:
            return [(source, own)]
        if imported and not module.startswith(".") and module.split(".")[0] not in self.packages:
            self.imports.add((name, imported))
            return []
        # Where a package hands names on, the file is the one that has it. What known values name
        # in a specialised file is not imported there.
        items = [(s, i) for s in self.sources if (i := s.definition(name)) is not None]
        exact = [(s, i) for s, i in items if Path(s.file).stem == module.split(".")[-1]]
        items = exact or items
        if imported is None:
            return items if source.items[0].text is None and len(items) == 1 else []
        if len(items) != 1:
            what, got = f"{name}, which {source.file} needs", f"{len(items)} definitions of it"
            allowed = f"one in {', '.join(s.file for s in self.sources)}"
            fix = "decide the branch that needs it, or add its file"
            raise BundleError(what, got=got, allowed=allowed, fix=fix)
        return items

    def _mentioned(self, member: ast.stmt) -> bool:
        names = _defined(member)
        if isinstance(member, ast.FunctionDef):
            return names[0].startswith("__") or names[0] in self.mentions
        return not names or bool(self.mentions.intersection(names))

    def without_unused(self, node: ast.stmt) -> ast.stmt:
        """Return a class with the members that are mentioned, and the comments before them."""
        if not isinstance(node, ast.ClassDef):
            return node
        node, body, comments = copy.copy(node), [], []
        for member in node.body:
            comments.append(member)
            if not is_comment(member):
                body += comments if member in self.left else []
                comments = []
        node.body = body or [ast.Pass()]
        return node
