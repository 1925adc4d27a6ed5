"""Code of which something is known: that is written in, and what it decides is decided.

All of it is done on syntax trees, with comments; nothing is executed.
"""

import ast
import io
import operator
import re
import tokenize
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optim.errors import Refusal

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


class ExportError(Refusal):
    """A run that no script can be made of: what was got, what is allowed, how to fix it."""


class BundleError(ExportError):
    """Code that no single file can be made of."""


@dataclass(frozen=True)
class Code:
    """A known value that stands in the file as this expression, which may have known parts."""

    text: str


GONE = "__erased__"  # stands for what is erased until what that belongs to is left out, too
ERASED = Code(GONE)  # a name that is not there: as a parameter, an argument, a statement
Known = Mapping[str, Any]


class Specialise(ast.NodeTransformer):
    """Code in which expressions, by how they are written, have known values.

    Numbers become named constants ("config.n_layer" is N_LAYER); strings, truth values and None are
    written in. Branches, conditional expressions, comparisons and and/or that they decide are
    decided. "for TARGETS in EXPRESSION" may be known too, as Code.
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
        if isinstance(value, Code):
            return self.visit(ast.parse(value.text, mode="eval").body)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return ast.Constant(value)
        name = text.rpartition(".")[2].upper()
        if self.constants.setdefault(name, value) != value:
            allowed = f"{self.constants[name]}, as {name} is already"
            raise BundleError(text, got=value, allowed=allowed, fix="another name")
        return ast.Name(name, ast.Load())

    def _value(self, node: ast.expr) -> tuple[Any, ...]:
        """Return (value,), or () where it is not known."""
        if isinstance(node, ast.Constant):
            return (node.value,)
        if isinstance(node, ast.Name) and node.id in self.constants:
            return (self.constants[node.id],)
        return ()

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        left, right = self._value(node.left), self._value(node.comparators[0])
        compare = COMPARISONS.get(type(node.ops[0]))
        if left and right and compare and len(node.ops) == 1:
            return ast.Constant(compare(left[0], right[0]))
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
        erased = [value for value in left if _is_gone(value)]
        return (erased or left)[0] if erased or len(left) == 1 else ast.BoolOp(node.op, left)

    def _branch(self, node: Any) -> Any:
        """Return the branch that a test decides on, None where it does not."""
        node.test = self.visit(node.test)
        known = self._value(node.test)
        return (node.body if known[0] else node.orelse) if known else None

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        branch = self._branch(node)
        return self.generic_visit(node) if branch is None else self.visit(branch)

    def visit_If(self, node: ast.If) -> Any:
        branch = self._branch(node)
        if branch is not None:
            return self.statements(branch)
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node

    def statements(self, nodes: list[ast.stmt]) -> list[ast.stmt]:
        """Return what is left of statements."""
        module = ast.Module(nodes, [])
        self.generic_visit(module)
        return module.body

    def visit_For(self, node: ast.For) -> Any:
        known = self.known.get(f"for {ast.unparse(node.target)} in {ast.unparse(node.iter)}")
        if known is not None:
            loop = ast.parse(f"{known.text}: ...").body[0]
            assert isinstance(loop, ast.For)
            node.target, node.iter = loop.target, loop.iter
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        node.args = [a for a in node.args if not _is_gone(a)]
        node.keywords = [k for k in node.keywords if not _is_gone(k.value)]
        return node

    def visit_Expr(self, node: ast.Expr | ast.Assign) -> ast.stmt | None:
        self.generic_visit(node)
        return None if _is_gone(node.value) else node

    visit_Assign = visit_Expr

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | None:
        erased = self.known.get(ast.unparse(node.target)) is ERASED
        return None if erased else super().generic_visit(node)  # type: ignore[return-value]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        spec, before = node.args, len(node.args.args) - len(node.args.defaults)
        spec.args, defaults = self._not_erased(spec.args, [None] * before + spec.defaults)
        spec.defaults = [d for d in defaults if d is not None]
        spec.kwonlyargs, spec.kw_defaults = self._not_erased(spec.kwonlyargs, spec.kw_defaults)
        self.generic_visit(node)
        ends = (i for i, n in enumerate(node.body, start=1) if isinstance(n, ast.Return))
        node.body = node.body[: next(ends, None)] or [ast.Pass()]
        return node

    def _not_erased(
        self, args: list[ast.arg], defaults: Sequence[ast.expr | None]
    ) -> tuple[list[ast.arg], list[ast.expr | None]]:
        """Return the parameters, and their defaults, that are not erased."""
        pairs = zip(args, defaults, strict=True)
        rest = [(a, d) for a, d in pairs if self.known.get(a.arg) is not ERASED]
        return [a for a, _ in rest], [d for _, d in rest]


def _is_gone(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == GONE


# ---- comments, which syntax trees do not have

COMMENT = "\x00"  # begins a string that stands for a comment


def parse(text: str) -> ast.Module:
    """Return the syntax tree of a file, its comments as statements before what they belong to.

    Those inside brackets and before `else` are left out.
    """
    before: dict[int, list[str]] = {}  # comments, by the line on which their statement begins
    waiting, lines, first, depth = [], [], 0, 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            kept = not re.match(r"# (type|pyright|noqa)\b", token.string)
            waiting += [token.string] if kept and not first else []
            before.get(first, []).extend([token.string] if kept and not depth else [])
        elif token.type == tokenize.NEWLINE:
            first = 0
        elif token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            if not first:
                first, waiting, before[token.start[0]] = token.start[0], [], waiting
            if token.type == tokenize.OP:
                depth += (token.string in "([{") - (token.string in ")]}")
    for number, line in enumerate(text.splitlines(), start=1):
        indent = line[: len(line) - len(line.lstrip())]
        if not re.match(r"\s*(else|elif|except|finally)\b", line):
            lines += [f"{indent}{COMMENT + comment!r}" for comment in before.get(number, [])]
        lines.append(line)
    return ast.parse("\n".join(lines) + "\n")


def unparse(nodes: Sequence[ast.AST]) -> str:
    """Return the text of parsed code, its comments as comments."""
    text = "\n".join(ast.unparse(ast.fix_missing_locations(n)) for n in nodes) + "\n"
    return re.sub(
        r"""^( *)(['"]{1,3}\\x00.*)$""",
        lambda m: m[1] + ast.literal_eval(m[2])[len(COMMENT) :],
        text,
        flags=re.MULTILINE,
    )


def is_comment(node: ast.AST) -> bool:
    """Return whether a statement stands for a comment."""
    text = getattr(getattr(node, "value", None), "value", None)
    return isinstance(node, ast.Expr) and isinstance(text, str) and text.startswith(COMMENT)
