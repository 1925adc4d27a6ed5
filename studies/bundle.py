"""Our own modules as one file: what is known is written in, what that decides is decided, and only the definitions that are then used are left, as they stand.

An entry file is the script's end: its statements stay in their order, its definitions and those of the other files come along where something left names them; of a class, the
methods that something left mentions. Nothing is executed: all of it is done on syntax trees, so that the text stays right when the modules change.
"""

from __future__ import annotations

import ast
import copy
import io
import operator
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optim.errors import Refusal

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    **{
        ast.Eq: operator.eq,
        ast.NotEq: operator.ne,
        ast.Lt: operator.lt,
        ast.LtE: operator.le,
        ast.Gt: operator.gt,
        ast.GtE: operator.ge,
    },
    **{
        ast.Is: operator.is_,
        ast.IsNot: operator.is_not,
        ast.In: lambda a, b: a in b,
        ast.NotIn: lambda a, b: a not in b,
    },
}


class BundleError(Refusal):
    """Code that no single file can be made of: what was got, what is allowed, how to fix it."""


@dataclass(frozen=True)
class Code:
    """A known value that stands in the file as this expression."""

    text: str


class Erased:
    """A name that is not there: as a parameter, an argument, a statement."""


ERASED = Erased()
GONE = "__erased__"  # stands for it until what it belongs to is left out, too
Known = Mapping[str, Any]


class Specialise(ast.NodeTransformer):
    """Code in which expressions, by how they are written, have known values.

    Numbers become named constants ("config.n_layer" is N_LAYER), strings, truth values and None are written in. Branches, conditional expressions, comparisons and
    and/or that they decide are decided. "for TARGETS in EXPRESSION" may be known too, as Code.
    """

    def __init__(self, known: Known, constants: dict[str, int | float]) -> None:
        self.known, self.constants = known, constants

    def visit(self, node: ast.AST) -> Any:
        kinds = ast.Name | ast.Attribute | ast.Subscript | ast.Call | ast.IfExp | ast.Compare
        if isinstance(node, kinds) and isinstance(getattr(node, "ctx", None), ast.Load | None):
            text = ast.unparse(node)
            if text in self.known:
                return self._written(text, self.known[text])
        return super().visit(node)

    def _written(self, text: str, value: Any) -> ast.expr:
        if value is ERASED:
            return ast.Name(GONE, ast.Load())
        if isinstance(value, Code):
            return ast.parse(value.text, mode="eval").body
        if isinstance(value, int | float) and not isinstance(value, bool):
            name = text.rpartition(".")[2].upper()
            if self.constants.setdefault(name, value) != value:
                raise BundleError(
                    text,
                    got=value,
                    allowed=f"{self.constants[name]}, as {name} is already",
                    fix="another name",
                )
            return ast.Name(name, ast.Load())
        return ast.Constant(value)

    def _value(self, node: ast.expr) -> tuple[Any, ...]:
        """(value,), or () where it is not known."""
        if isinstance(node, ast.Constant):
            return (node.value,)
        if isinstance(node, ast.Name) and node.id in self.constants:
            return (self.constants[node.id],)
        if isinstance(node, ast.Tuple) and all(self._value(e) for e in node.elts):
            return (tuple(self._value(e)[0] for e in node.elts),)
        return ()

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        left, right = self._value(node.left), self._value(node.comparators[0])
        if left and right and len(node.ops) == 1:
            return ast.Constant(COMPARISONS[type(node.ops[0])](left[0], right[0]))
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        value = self._value(node.operand)
        return ast.Constant(not value[0]) if value and isinstance(node.op, ast.Not) else node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        self.generic_visit(node)
        decisive, left = isinstance(node.op, ast.Or), []
        for value in node.values:
            known = self._value(value)
            if not known or bool(known[0]) is decisive or (value is node.values[-1] and not left):
                left.append(value)
            if known and bool(known[0]) is decisive:
                break
        return left[0] if len(left) == 1 else ast.BoolOp(node.op, left)

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        node.test = self.visit(node.test)
        known = self._value(node.test)
        return (
            self.visit(node.body if known[0] else node.orelse)
            if known
            else self.generic_visit(node)
        )

    def visit_If(self, node: ast.If) -> Any:
        node.test = self.visit(node.test)
        known = self._value(node.test)
        if not known:
            return self.generic_visit(node)
        return self.generic_visit(ast.Module(node.body if known[0] else node.orelse, [])).body  # type: ignore[attr-defined]

    def visit_For(self, node: ast.For) -> Any:
        known = self.known.get(f"for {ast.unparse(node.target)} in {ast.unparse(node.iter)}")
        if known is not None:
            made = ast.parse(f"{known.text}: ...").body[0]
            assert isinstance(made, ast.For)
            node.target, node.iter = made.target, made.iter
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        node.args = [a for a in node.args if not _is_gone(a)]
        node.keywords = [k for k in node.keywords if not _is_gone(k.value)]
        return node

    def visit_Tuple(self, node: ast.Tuple) -> ast.expr:
        self.generic_visit(node)
        node.elts = [e for e in node.elts if not _is_gone(e)]
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.stmt | None:
        self.generic_visit(node)
        return None if _is_gone(node.value) else node

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | None:
        self.generic_visit(node)
        return None if _is_gone(node.value) else node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        """Fields that are known are left out, and with them the check of fields."""
        self.generic_visit(node)
        gone = [
            m
            for m in node.body
            if isinstance(m, ast.AnnAssign) and f"self.{ast.unparse(m.target)}" in self.known
        ]
        checks = [
            m
            for m in node.body
            if gone and isinstance(m, ast.FunctionDef) and m.name == "__post_init__"
        ]
        node.body = [m for m in node.body if m not in (*gone, *checks)]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        spec = node.args
        gone = {a.arg for a in (*spec.args, *spec.kwonlyargs) if self.known.get(a.arg) is ERASED}
        defaults = dict(zip([a.arg for a in spec.args][::-1], spec.defaults[::-1], strict=False))
        spec.args = [a for a in spec.args if a.arg not in gone]
        spec.defaults = [defaults[a.arg] for a in spec.args if a.arg in defaults]
        pairs = [
            (a, d)
            for a, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
            if a.arg not in gone
        ]
        spec.kwonlyargs, spec.kw_defaults = [a for a, _ in pairs], [d for _, d in pairs]
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node


def _is_gone(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == GONE


# ---- comments, which syntax trees do not have

COMMENT = "\x00"  # begins a string that stands for a comment


def parse(text: str) -> ast.Module:
    """The syntax tree of a file, its comments as statements before what they belong to. Those inside brackets and before `else` are left out."""
    lines, made, waiting, depth, first = text.splitlines(), [], [], 0, 0
    comments: dict[int, list[str]] = {}  # by the line of the statement
    own: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            alone = token.line.lstrip().startswith("#")
            own |= {token.start[0]} if alone else set()
            if depth == 0 and not re.match(r"# (type|pyright|noqa)\b", token.string):
                comments.setdefault(token.start[0] if alone else first, []).append(token.string)
        elif token.type == tokenize.NEWLINE:
            first = 0
        elif token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            first = first or token.start[0]
            depth += (
                (token.string in "([{") - (token.string in ")]}")
                if token.type == tokenize.OP
                else 0
            )
    for number, line in enumerate(lines, start=1):
        waiting += comments.get(number, [])
        if line.strip() and number not in own:
            if not re.match(r"\s*(else|elif|except|finally)\b", line):
                indent = line[: len(line) - len(line.lstrip())]
                made += [f"{indent}{COMMENT + comment!r}" for comment in waiting]
            waiting = []
        made += [line] if number not in own else []
    return ast.parse("\n".join(made) + "\n")


def unparse(nodes: Sequence[ast.AST]) -> str:
    text = "\n".join(ast.unparse(ast.fix_missing_locations(n)) for n in nodes) + "\n"
    return re.sub(
        r"""^( *)(['"]{1,3}\\x00.*)$""",
        lambda m: m[1] + ast.literal_eval(m[2])[len(COMMENT) :],
        text,
        flags=re.MULTILINE,
    )


def _is_comment(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and str(node.value.value).startswith(COMMENT)
    )


def formatted(text: str) -> str:
    """By ruff where it is installed; as it is elsewhere."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "140", "-"],
            input=text,
            capture_output=True,
            text=True,
        )
    except OSError:
        return text
    return done.stdout if done.returncode == 0 else text


# ---- one file of several


@dataclass
class Item:
    """A top-level statement with the comments before it, and the names that it defines; none for an effect."""

    file: str
    names: list[str]
    nodes: list[ast.stmt]


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return [
        n.id
        for t in targets
        for n in (t.elts if isinstance(t, ast.Tuple) else [t])
        if isinstance(n, ast.Name)
    ]


class Source:
    """One file: its items in order, and what it imports, {name: (the statement, its part)}."""

    def __init__(self, root: Path, file: str) -> None:
        self.items: list[Item] = []
        self.imports: dict[str, tuple[ast.Import | ast.ImportFrom, ast.alias]] = {}
        waiting: list[ast.stmt] = []
        for node in parse((root / file).read_text(encoding="utf-8")).body[
            1:
        ]:  # behind the docstring
            if _is_comment(node):
                waiting.append(node)
                continue
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imports |= {a.asname or a.name.split(".")[0]: (node, a) for a in node.names}
            else:
                self.items.append(Item(file, _defined(node), [*waiting, node]))
            waiting = []


def bundle(
    root: Path,
    files: Mapping[str, str],
    *,
    known: Mapping[str, Known],
    filled: Mapping[str, str],
    packages: Sequence[str],
    stripped: Sequence[str] = (),
) -> str:
    """The last of `files` ({file: a title for what comes from it}) with all that it needs of them: a file may need earlier ones alone when it is imported.

    known: by file, see Specialise. filled: statements that stand for those of these names in the last file. packages: whose names are among `files`. stripped: names of decorators that are
    left out. Raises BundleError for a name that is in none of the files, or twice in what is left.
    """
    constants: dict[str, int | float] = {}
    sources = {file: Source(root, file) for file in files}
    *_, last = files
    for file, source in sources.items():
        special = Specialise(known.get(file, {}), constants)
        for item in source.items:
            if file == last and item.names and item.names[0] in filled:
                item.nodes = list(ast.parse(filled[item.names[0]]).body)
            item.nodes = special.visit(ast.Module(item.nodes, [])).body
            for node in item.nodes:
                if isinstance(node, ast.ClassDef):
                    node.decorator_list = [
                        d for d in node.decorator_list if ast.unparse(d) not in stripped
                    ]
    given = {
        n.id
        for values in known.values()
        for v in values.values()
        if isinstance(v, Code)
        for n in _names(v.text)
    }
    reach = _Reach(sources, last, packages, given)
    while _drop_unread(reach.left()):
        reach = _Reach(sources, last, packages, given)
    sections, names = [], set()
    for file, title in files.items():
        items = [i for i in sources[file].items if id(i) in reach.items and i.nodes]
        twice = names & {n for i in items for n in i.names}
        if twice:
            raise BundleError(
                f"{file}: {min(twice)}",
                got="a second definition",
                allowed="one in a file",
                fix="rename one of them",
            )
        names |= {n for i in items for n in i.names}
        if items:
            sections.append(
                f"# ---- {title}\n\n"
                + unparse([reach.without_unused(n) for i in items for n in i.nodes])
            )
    body = "\n\n".join(sections)
    used = {n.id for n in ast.walk(ast.parse(body)) if isinstance(n, ast.Name)}
    numbers = "".join(f"{k} = {v!r}\n" for k, v in constants.items() if k in used)
    if GONE in used:
        raise BundleError(
            "an erased name",
            got="a use of it that is left",
            allowed="as an argument, a parameter, a statement",
            fix="what is known",
        )
    if twice := names & {k for k in constants if k in used}:
        raise BundleError(
            min(twice),
            got="a definition and a number",
            allowed="one of them",
            fix="rename the definition",
        )
    top = _imports({name: found for name, found in reach.externals.items() if name in used})
    return formatted(f"{top}\n\n# ---- Hyperparameters\n\n{numbers}\n\n{body}")


def _names(text: str) -> list[ast.Name]:
    """Of an expression, or of `for … in …`."""
    return [
        n
        for n in ast.walk(ast.parse(f"{text}: ..." if text.startswith("for ") else text))
        if isinstance(n, ast.Name)
    ]


def _imports(found: Mapping[str, tuple[ast.Import | ast.ImportFrom, ast.alias]]) -> str:
    """The standard library's first."""
    plain = {
        f"import {a.name}" + (f" as {a.asname}" if a.asname else "")
        for s, a in found.values()
        if isinstance(s, ast.Import)
    }
    parts: dict[str, set[str]] = {}
    for statement, alias in found.values():
        if isinstance(statement, ast.ImportFrom):
            parts.setdefault(str(statement.module), set()).add(ast.unparse(alias))
    lines = [
        *sorted(plain),
        *(
            f"from {module} import {', '.join(sorted(names))}"
            for module, names in sorted(parts.items())
        ),
    ]
    own = {line: line.split()[1].split(".")[0] in sys.stdlib_module_names for line in lines}
    return "\n".join(
        [line for line in lines if own[line]] + [""] + [line for line in lines if not own[line]]
    )


class _Reach:
    """What the last file's effects name, what that names, and so on."""

    def __init__(
        self, sources: dict[str, Source], last: str, packages: Sequence[str], given: set[str]
    ) -> None:
        """given: names that known values bring with them."""
        self.sources, self.last, self.packages, self.given = sources, last, packages, given
        self.items: dict[int, Item] = {}
        self.members: set[int] = set()  # of classes
        self.mentions = {"forward"}  # which torch calls
        self.externals: dict[str, tuple[ast.Import | ast.ImportFrom, ast.alias]] = {}
        self.todo = [i for i in sources[last].items if not i.names]
        while self._items() or self._methods():
            pass

    def _items(self) -> bool:
        """Whether there was one to be reached."""
        before = len(self.items)
        while self.todo:
            item = self.todo.pop()
            if id(item) not in self.items:
                self.items[id(item)] = item
                for node in item.nodes:
                    self._scan(item.file, node)
        return len(self.items) > before

    def _methods(self) -> bool:
        """Whether something that was reached since mentions one."""
        found = [
            (file, m)
            for file, _, m in self._class_members()
            if id(m) not in self.members and self._mentioned(m)
        ]
        for file, member in found:
            self.members.add(id(member))
            self._scan(file, member)
        return bool(found)

    def _class_members(self) -> Iterator[tuple[str, ast.ClassDef, ast.stmt]]:
        for item in list(self.items.values()):
            for node in item.nodes:
                if isinstance(node, ast.ClassDef):
                    yield from ((item.file, node, member) for member in node.body)

    def _scan(self, file: str, node: ast.AST) -> None:
        parts = (*node.bases, *node.decorator_list) if isinstance(node, ast.ClassDef) else (node,)
        for n in (n for part in parts for n in ast.walk(part)):
            if isinstance(n, ast.Name) and (item := self._item(file, n.id)) is not None:
                self.todo.append(item)
            elif isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load):
                self.mentions.add(n.attr)

    def _item(self, file: str, name: str) -> Item | None:
        """Its definition; None of what Python has, of a local name, and of what comes from elsewhere, which is noted."""
        own = next((i for i in self.sources[file].items if name in i.names), None)
        if own is not None:
            return own
        statement, alias = self.sources[file].imports.get(name, (None, None))
        ours = isinstance(statement, ast.ImportFrom) and (
            statement.level or str(statement.module).split(".")[0] in self.packages
        )
        if statement is not None and alias is not None and not ours:
            self.externals[name] = statement, alias
            return None
        if not ours and file != self.last and name not in self.given:
            return None
        # Where a package hands names on, the file is the one that has it. What is filled in names things that the last file need not import.
        stem = str(statement.module).split(".")[-1] if isinstance(statement, ast.ImportFrom) else ""
        found = [i for s in self.sources.values() for i in s.items if name in i.names]
        exact = [i for i in found if Path(i.file).stem == stem]
        if len(exact or found) == 1:
            return (exact or found)[0]
        if ours:
            raise BundleError(
                f"{name}, which {file} needs",
                got=f"{len(found)} definitions of it",
                allowed=f"one in {', '.join(self.sources)}",
                fix="decide the branch that needs it, or add its file",
            )
        return None

    def _mentioned(self, member: ast.stmt) -> bool:
        if isinstance(member, ast.FunctionDef):
            if member.name == "__post_init__":  # most check what is known to be fine
                calls = [ast.unparse(n.func) for n in ast.walk(member) if isinstance(n, ast.Call)]
                return "object.__setattr__" in calls or member.name in self.mentions
            return member.name in self.mentions or (
                member.name.startswith("__") and member.name not in ("__str__", "__repr__")
            )
        names = _defined(member)
        return (
            not names
            or bool(self.mentions.intersection(names))
            or (isinstance(member, ast.AnnAssign) and member.value is None)
        )

    def left(self) -> list[ast.AST]:
        """The code that is left: functions, effects, and the members of classes that are mentioned."""
        plain = [n for i in self.items.values() for n in i.nodes if not isinstance(n, ast.ClassDef)]
        return [*plain, *(m for _, _, m in self._class_members() if id(m) in self.members)]

    def without_unused(self, node: ast.stmt) -> ast.stmt:
        """A class with the members that are mentioned, and the comments before them."""
        if isinstance(node, ast.ClassDef):
            node, body, comments = copy.copy(node), [], []
            for member in node.body:
                if _is_comment(member):
                    comments.append(member)
                    continue
                if id(member) in self.members:
                    body += [*comments, member]
                comments = []
            node.body = body or [ast.Pass()]
        return node


def _drop_unread(code: Sequence[ast.AST]) -> bool:
    """Leave out `self.x = …` where no x is read in this code, and `x = y` where x is not; whether there was one."""
    every = [n for top in code for n in ast.walk(top)]
    read = {n.attr for n in every if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    dropped = False
    for function in (n for n in every if isinstance(n, ast.FunctionDef)):
        local = {
            n.id
            for n in ast.walk(function)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
        }

        def unread(s: ast.stmt, local: set[str] = local) -> bool:
            if not isinstance(s, ast.Assign) or len(s.targets) > 1:
                return False
            target = s.targets[0]
            if isinstance(target, ast.Attribute):
                return (
                    isinstance(target.value, ast.Name)
                    and target.value.id == "self"
                    and target.attr not in read
                )
            return (
                isinstance(target, ast.Name)
                and target.id not in local
                and isinstance(s.value, ast.Name | ast.Attribute)
            )

        kept = [s for s in function.body if not unread(s)]
        dropped |= len(kept) < len(function.body)
        function.body = kept or [ast.Pass()]
    return dropped
