"""Our own modules, and a user's plugins, as one file, made on syntax trees alone: nothing is
executed.

Files come in three ways. Some come whole, but for their imports. Of others every definition that
something names comes as it stands, byte for byte. The rest is specialised to a run: what is known
is written in, what that decides is decided, and only what is then used is left.

The last file is the script's end. Its statements stay in their order. Its definitions, and those of
the other files, come along where something that is left names them; of a specialised class the
methods come that something left mentions. Of a plugin the statements that define nothing come too,
unless they concern nothing but definitions that stay behind.
"""

import ast
import copy
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .check import check
from .sources import Item, Source, as_it_stands, defined, module_of, specialised, without_imports
from .specialise import BundleError, Known, Specialise, is_comment, unparse

# Decorators and calls by which a plugin's part gets its name.
REGISTRATION = r"([\w.]+\.)?register_(norm|direction|baseline|tokenizer|model)\b"


def bundle(
    root: Path,
    files: Mapping[str, str],
    *,
    known: Mapping[str, Known],
    filled: Mapping[str, str],
    packages: Sequence[str],
    whole: Sequence[str] = (),
    unregistered: str = "(?!)",
    modules: Mapping[str, str] | None = None,
    plugins: Sequence[str] = (),
    named: Mapping[str, str] | None = None,
) -> str:
    """Return the last file with all that it needs of the files, {file: a title for its part}.

    A file may need earlier ones alone when it is imported. known: by file, see Specialise; a file
    that is not among them comes as it stands. filled: statements that stand for those of these
    names, in the last file if it defines them. packages: whose names are among the files. whole:
    files that come whole, if at all. unregistered: a pattern of decorators that are left out.
    modules: {file: its module} where its path does not say it. plugins: the files that are a user's
    own. named: {name: its module} of what `filled` and `known` name.
    Raises BundleError for a name that is in none of the files, or twice in what is left, and for
    what a plugin cannot hand on.
    """
    constants: dict[str, int | float] = {}
    titles, last = {}, [*files][-1]
    ends = {
        n for x in ast.parse((root / last).read_text(encoding="utf-8")).body for n in defined(x)
    }
    before = {name: text for name, text in filled.items() if name not in ends}
    for file in files:
        text = (root / file).read_text(encoding="utf-8")
        if file in known:
            special = Specialise(known[file], constants)
            items = specialised(text, special, filled if file == last else {})
        elif file in whole:
            items = [without_imports(text)]
        else:
            pattern = REGISTRATION if file in plugins else unregistered
            items = as_it_stands(text, unregistered=pattern, whole=file in plugins)
            items = [_filled(item, before) for item in items]
        module = (modules or {}).get(file, module_of(file))
        titles[Source(file, module, items, text, plugin=file in plugins)] = files[file]
    reach = Reach([*titles], packages, named or {})
    return written(titles, reach, constants, packages)


def _filled(item: Item, statements: Mapping[str, str]) -> Item:
    """Return the item, or what stands for it."""
    texts = [formatted(statements[name]) for name in item.names if name in statements]
    return Item(item.names, [*ast.parse(texts[0]).body], texts[0]) if texts else item


def written(
    titles: Mapping[Source, str],
    reach: "Reach",
    constants: Mapping[str, int | float],
    packages: Sequence[str],
) -> str:
    """Return the text of what is reached of files, {file: the title of its part}, once checked."""
    parts = {s: [i for i in s.items if i in reach.items and i.nodes] for s in titles}
    texts = {s: _text(items, reach) for s, items in parts.items() if items}
    body = "\n\n\n".join(f"# ---- {titles[s]}\n\n{text}" for s, text in texts.items())
    used = {n.id for n in ast.walk(ast.parse(body)) if isinstance(n, ast.Name)}
    numbers = {k: v for k, v in constants.items() if k in used}
    imports = {name: origins for name, origins in reach.imports.items() if name in used}
    names = [*(n for items in parts.values() for i in items for n in i.names), *numbers]
    check(texts, [*names, *(name for name, _ in meanings(imports))], used, packages)
    top = _imports({origin for origins in imports.values() for origin in origins})
    future = ("__future__", "annotations")
    if any(s.imports.get("annotations") == future for s in texts):
        top = f"from __future__ import annotations\n\n{top}"
    header = "".join(f"{k} = {v!r}\n" for k, v in numbers.items())
    return f"{top}\n# ---- Hyperparameters\n\n{header}\n\n{body}\n"


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


# ---- imports

Origin = tuple[str, str]  # a module, and what of it is imported; "" and a module


def meanings(imports: Mapping[str, Iterable[Origin]]) -> set[tuple[str, str]]:
    """Return (name, what it stands for) of imports: two of a name are two meanings of it."""
    return {_meaning(*origin) for origins in imports.values() for origin in origins}


def _meaning(module: str, part: str) -> tuple[str, str]:
    what, renamed, name = part.partition(" as ")
    if module:
        return name or what, f"{module}.{what}"
    top = what.partition(".")[0]
    return (name, what) if renamed else (top, top)


def _imports(origins: set[Origin]) -> str:
    """Return import statements, the standard library's first; one where two mean the same."""
    lines = [f"import {part}" for part in sorted(p for m, p in origins if not m)]
    renamed = {_meaning(m, part) for m, part in origins if not m and " as " in part}
    for module in sorted({module for module, _ in origins if module}):
        parts = [p for m, p in sorted(origins) if m == module and _meaning(m, p) not in renamed]
        lines += [f"from {module} import {', '.join(parts)}"] if parts else []
    own = [line for line in lines if line.split()[1].split(".")[0] in sys.stdlib_module_names]
    return "\n".join([*own, "", *(line for line in lines if line not in own), ""])


class Reach:
    """The definitions that the last file's effects name, those that these name, and so on."""

    def __init__(
        self, sources: list[Source], packages: Sequence[str], named: Mapping[str, str]
    ) -> None:
        """Find it. packages: those whose names are among the files. named: see bundle."""
        self.sources, self.packages, self.named = sources, packages, named
        self.items: set[Item] = set()
        self.left: set[ast.stmt] = set()  # specialised code, of classes what is mentioned
        self.mentions = {"forward"}  # which torch calls
        self.imports: dict[str, set[Origin]] = {}  # of what is not among the files
        self.members: list[tuple[Source, ast.stmt]] = []  # of classes, that nothing mentions so far
        self.todo = [(sources[-1], i) for i in sources[-1].items if i.effect]
        while self.todo:
            self._follow_items()
            self.todo = [(s, i) for s in sources if s.plugin for i in s.items if self._acts(s, i)]

    def _follow_items(self) -> None:
        """Take the items that wait, and all that they name."""
        while self.todo:
            source, item = self.todo.pop()
            if item in self.items:
                continue
            self.items.add(item)
            for node in item.nodes:
                if item.text is not None:
                    self._follow(source, node)
                    self.mentions |= attributes(node) if source.plugin else set()
                elif isinstance(node, ast.ClassDef):
                    self._follow(source, *node.bases, *node.decorator_list)
                    self.members += [(source, m) for m in node.body]
                else:
                    self._leave(source, node)
            while mentioned := [x for x in self.members if self._mentioned(x[1])]:
                self.members = [x for x in self.members if x not in mentioned]
                for owner, member in mentioned:
                    self._leave(owner, member)

    def _acts(self, source: Source, item: Item) -> bool:
        """Return whether an effect comes: of what is left of its file, or of none of its names."""
        if not item.effect or item in self.items:
            return False
        names = {n.id for node in item.nodes for n in ast.walk(node) if isinstance(n, ast.Name)}
        concerned = {i for name in {*names, *item.names} for i in source.definitions(name)}
        return not concerned or not concerned.isdisjoint(self.items)

    def _leave(self, source: Source, node: ast.stmt) -> None:
        """Note that specialised code is left, and what it mentions."""
        self.left.add(node)
        self.mentions |= attributes(node)
        self._follow(source, node)

    def _follow(self, source: Source, *nodes: ast.AST) -> None:
        """Note to look at the definitions of the names in code."""
        names = (n for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name))
        self.todo += [pair for n in names for pair in self._definitions(source, n.id)]

    def _definitions(self, source: Source, name: str) -> list[tuple[Source, Item]]:
        """Return where a name is defined: nowhere if Python has it, if it is a local name, and if
        it comes from elsewhere, which is noted."""
        imported = source.imports.get(name)
        if source is self.sources[-1] and name in self.named:
            imported = self.named[name], name
        elif own := source.definitions(name):
            return [(source, i) for i in own]
        module, part = imported or ("", "")
        if imported and (module or part).split(".")[0] not in self.packages:
            self.imports.setdefault(name, set()).add(imported)
            return []
        # Where a package or a file hands names on, the file is the one that has it. What known
        # values name in a specialised file is not imported there.
        items = [(s, i) for s in self.sources for i in s.definitions(name)]
        if imported is None:
            items = [(s, i) for s, i in items if s is self.sources[-1]] or items
            return items if source.items[0].text is None and len(items) == 1 else []
        exact = [(s, i) for s, i in items if s.module == module]
        top = module.split(".")[0]
        items = exact or [(s, i) for s, i in items if s.module.split(".")[0] == top]
        if len({s.file for s, _ in items}) != 1 or part != name:
            raise self._not_among_files(source, name, module, part)
        return items

    def _not_among_files(self, source: Source, name: str, module: str, part: str) -> BundleError:
        """Return the error for a name that is imported from a file that has no such definition."""
        what, files = f"{name}, which {source.file} needs", ", ".join(s.file for s in self.sources)
        if not source.plugin:
            count = len([s for s in self.sources if s.definitions(name)])
            got, allowed = f"{count} definitions of it", f"one in {files}"
            fix = "decide the branch that needs it, or add its file"
            return BundleError(what, got=got, allowed=allowed, fix=fix)
        statement = f"from {module} import {part}" if module else f"import {part}"
        return BundleError(
            what,
            got=statement,
            allowed="definitions of optim, model, models and plugins, each by its own name",
            fix="from MODULE import NAME, with the MODULE that defines it and without `as`",
        )

    def _mentioned(self, member: ast.stmt) -> bool:
        names = defined(member)
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


def attributes(node: ast.AST) -> set[str]:
    """Return the attributes that code reads."""
    loads = (n for n in ast.walk(node) if isinstance(n, ast.Attribute))
    return {n.attr for n in loads if isinstance(n.ctx, ast.Load)}
