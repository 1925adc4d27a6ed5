"""Code that would fail or mean something else in a script is refused before it is written."""

import ast
import builtins
import symtable
from collections.abc import Mapping, Sequence

from .sources import Source, absolute
from .specialise import GONE, BundleError

# In a script these would mean something else than in a file of its own.
OF_A_FILE = ("exec", "eval", "globals", "__import__", "__file__", "__path__", "__spec__")


def check(
    texts: Mapping[Source, str], names: Sequence[str], used: set[str], packages: Sequence[str]
) -> None:
    """Raise BundleError for code that cannot be one file.

    texts: by the file that it is of. names: that have a meaning at its top level, imports included.
    used: names in it. packages: that a script does not import.
    """
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        got, fix = "a second definition", "rename one of them"
        raise BundleError(twice, got=got, allowed="one in a file", fix=fix)
    if GONE in used:
        got, allowed = "a use of it that is left", "as an argument, a parameter, a statement"
        raise BundleError("an erased name", got=got, allowed=allowed, fix="what is known")
    hidden = next((name for name in names if hasattr(builtins, name)), None)
    if hidden:
        got, allowed = "a definition of the name of a builtin", "a name that Python has not"
        raise BundleError(hidden, got=got, allowed=allowed, fix="rename it")
    for source, text in texts.items():
        missing = looked_up(text) - {*names, *dir(builtins)}
        missing = {name for name in missing if not name.startswith("__")}
        if missing:
            what = f"{min(missing)}, which {source.file} needs"
            got, fix = "no definition that can be read", "write it out in its file"
            allowed = "def, class, =, import at the top level"
            raise BundleError(what, got=got, allowed=allowed, fix=fix)
        if source.plugin:
            _check_plugin(source, text, packages)


def looked_up(text: str) -> set[str]:
    """Return the names that code looks up at its top level, or among the builtins."""
    return _looked_up(symtable.symtable(text, "script.py", "exec"))


def _looked_up(table: symtable.SymbolTable) -> set[str]:
    top = table.get_type() == "module"
    read = (s for s in table.get_symbols() if s.is_referenced() and (top or s.is_global()))
    return {s.get_name() for s in read}.union(*map(_looked_up, table.get_children()))


def _check_plugin(source: Source, text: str, packages: Sequence[str]) -> None:
    """Raise BundleError for what is not the same in a script as in a plugin's own file."""
    dynamic = looked_up(text).intersection(OF_A_FILE)
    if dynamic:
        raise BundleError(
            f"{source.file} in a script",
            got=min(dynamic),
            allowed="definitions that do not depend on the file that they are in",
            fix="write out what it makes",
        )
    for node in ast.walk(ast.parse(text)):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [absolute(node, source.package)] if isinstance(node, ast.ImportFrom) else []
        inside = next((m for m in modules if m.split(".")[0] in packages), None)
        if inside:
            got, fix = ast.unparse(node), "move it to the top of the file"
            allowed = "imports of other libraries alone inside a definition"
            raise BundleError(f"{source.file} in a script", got=got, allowed=allowed, fix=fix)
