"""Plugins: modules of a user's own that register norms, directions, baselines, tokenizers, models.

A plugin is an ordinary Python module. A configuration names it in [run] plugins, data.prepare and
convert with --plugin. docs/extend.md shows each kind of part.
"""

import ast
import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass, replace
from importlib.util import resolve_name
from keyword import iskeyword
from pathlib import Path
from typing import Any, cast

from .errors import Refusal, require

# The modules of a checkout: a plugin of such a name would never be the one that is imported.
OURS = ("optim", "nanodual", "model", "models", "data", "training", "studies", "benchmarks")
OURS += ("examples", "tests", "train_gpt", "sample")
LIBRARIES = ("site-packages", "dist-packages")  # folders whose modules are no user's own


def load(
    names: Sequence[str], *, option: str = "run.plugins", error: type[Refusal] = Refusal
) -> None:
    """Load these modules, each once. The working directory is the last place that is searched.

    option: the setting that named them. Raises `error` for a name that is not a module's, for one
    that does not exist or is hidden by another module, and where the module itself raises.
    """
    if names and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    for name in names:
        _check_name(name, option, error)
        importlib.invalidate_caches()  # a file that was written a moment ago counts
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as failure:
            raise _refusal(name, failure, option, error) from failure
        _check_place(name, option, error)


def file_of(name: str) -> Path:
    """Return the file of a plugin that is loaded, of a package its __init__.py."""
    return Path(str(sys.modules[name].__file__))


def source_files(names: Sequence[str]) -> dict[str, Path]:
    """Return {module: its file} of plugins that are loaded and of the user's own modules that they
    import. A module stands behind those that it imports.
    """
    packages = {name.split(".")[0] for name in names}
    modules: dict[str, Path] = {}
    seen: set[str] = set()

    def visit(name: str) -> None:
        top = name.split(".")[0]
        own = top in packages or (top not in OURS and not is_library(name))
        if name in seen or not own or not getattr(sys.modules.get(name), "__file__", None):
            return
        seen.add(name)
        for imported in _imports(name):
            visit(imported)
        modules[name] = file_of(name)

    for name in names:
        visit(name)
    return modules


def is_library(name: str) -> bool:
    """Return whether a module is Python's or an installed library's."""
    folders = Path(getattr(sys.modules.get(name), "__file__", None) or "").parts
    return name.split(".")[0] in sys.stdlib_module_names or not {*LIBRARIES}.isdisjoint(folders)


def _imports(name: str) -> Iterator[str]:
    """Yield the modules that a loaded module's file imports: their packages first, and the names
    that it takes from them, some of which are modules too.
    """
    file = file_of(name)
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    tree = ast.parse(file.read_bytes() if file.suffix == ".py" else "")
    targets = [name]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            targets += [f"{module}.{part.name}" for part in node.names]
        elif isinstance(node, ast.Import):
            targets += [part.name for part in node.names]
    for target in targets:
        parts = target.split(".")
        yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def digests(names: Sequence[str]) -> dict[str, str]:
    """Return {module: the SHA-256 of its file} of all source_files() of plugins that are loaded."""
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in source_files(names).items()
    }


def _check_name(name: str, option: str, error: type[Refusal]) -> None:
    parts = name.split(".")
    stem = name.removesuffix(".py").replace("/", ".").strip(".")
    require(
        all(part.isidentifier() and not iskeyword(part) for part in parts) and parts[-1] != "py",
        option,
        got=repr(name),
        allowed="the name of a Python module, as import takes it",
        fix=f'"{stem}"' if stem.replace(".", "").isidentifier() else '"my_plugin" of my_plugin.py',
        error=error,
    )
    require(
        parts[0] not in OURS and parts[0] not in sys.stdlib_module_names,
        option,
        got=f"{name!r}, the name of a module of {'nanodual' if parts[0] in OURS else 'Python'}",
        allowed="a module of another name",
        fix=f"rename its file, to my_{parts[-1]}.py say",
        error=error,
    )


def _check_place(name: str, option: str, error: type[Refusal]) -> None:
    """Refuse a folder without code, and what is not the file of this name that stands here."""
    require(
        getattr(sys.modules[name], "__file__", None),
        option,
        got=f"{name!r}, a folder without __init__.py",
        allowed="a module that registers parts",
        fix=f"the file in it: {name}.my_plugin, say",
        error=error,
    )
    stem, file = Path.cwd().joinpath(*name.split(".")), file_of(name)
    files = [p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.is_file()]
    require(
        not files or files[0].read_bytes() == file.read_bytes(),
        option,
        got=f"{name!r}, which is {file} and not {files[0] if files else None}",
        allowed="a name that no other module has",
        fix=f"rename {files[0] if files else None}",
        error=error,
    )


def _refusal(name: str, failure: BaseException, option: str, error: type[Refusal]) -> Refusal:
    """Return why a plugin could not be imported, with the place in it where it raised."""
    missing = failure.name or "" if isinstance(failure, ModuleNotFoundError) else ""
    if missing and f"{name}.".startswith(f"{missing}."):
        file = Path.cwd().joinpath(*name.split(".")).with_suffix(".py")
        top = sys.modules.get(name.split(".")[0])
        known = f", as {top.__name__} is {top.__file__}" if top else ""
        return error(
            option,
            got=f"{name!r}, and there is no such module{known}",
            allowed=f"a module that can be imported: {file}, or one that is installed",
            fix="run in the folder of the module, or set PYTHONPATH to it",
        )
    frames = traceback.extract_tb(failure.__traceback__)
    file = next((f.filename for f in frames if f.name == "<module>"), None)
    place = _place(failure, file) or name
    if isinstance(failure, Refusal):
        what = f"{failure.what}, in {place}"
        return error(what, got=failure.got, allowed=failure.allowed, fix=failure.fix)
    return error(
        f"{option}: {name} raised while it was imported",
        got=f"{type(failure).__name__}: {failure}",
        allowed="a module that is imported without an error",
        fix=f"see {place}",
    )


def _place(failure: BaseException, file: str | None) -> str | None:
    """Return a plugin's file and the last line in it that an error passed; None if it had none."""
    if isinstance(failure, SyntaxError) and failure.filename:
        return f"{failure.filename}, line {failure.lineno}"
    frames = traceback.extract_tb(failure.__traceback__)
    return next((f"{file}, line {f.lineno}" for f in reversed(frames) if f.filename == file), None)


def call(name: str, function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """Return what a registered function returns. Raises Refusal, with the place, where it raises.

    name: it is registered by. Refusals pass through as they are.
    """
    try:
        return function(*args, **keywords)
    except Refusal:
        raise
    except Exception as failure:
        file = inspect.unwrap(function).__code__.co_filename
        raise Refusal(
            f"{name}: its function raised",
            got=f"{type(failure).__name__}: {failure}",
            allowed="a function that returns what it builds",
            fix=f"see {_place(failure, file) or file}",
        ) from failure


def require_free(function: str, name: str, definition: Any, present: Any) -> None:
    """Raise Refusal if a name belongs to another definition than this one.

    function: the one that registers. present: the definition that has the name, None for none. The
    same module and qualified name again is fine: a module may be imported anew.
    """
    module = getattr(present, "__module__", None)
    mine = definition.__module__, definition.__qualname__
    require(
        present is None or (module, getattr(present, "__qualname__", None)) == mine,
        f"{function}: {name}",
        got=f"a name that {module} has registered already",
        allowed="a name that is free",
        fix="another name",
    )


def require_part(function: str, cls: type, base: type) -> Any:
    """Return an object of a class that is made without arguments.

    Raise Refusal unless it is a `base`, can be hashed and, if it is a dataclass, copied with other
    values; a TypeError that names the arguments that it lacks.
    """
    part, what = cls(), f"{function}: {cls.__name__}"
    got, fix = f"a class without {base.__name__}", f"class {cls.__name__}({base.__name__})"
    require(isinstance(part, base), what, got=got, allowed=f"a {base.__name__}", fix=fix)
    allowed, fix = "a plain class, or a frozen dataclass", "@dataclass(frozen=True) above it"
    hashed = type(part).__hash__ is not None
    require(hashed, what, got="a class that cannot be hashed", allowed=allowed, fix=fix)
    try:
        if is_dataclass(part):
            replace(cast(Any, part))
    except TypeError as error:
        got = "an __init__ that does not take the fields of its base"
        raise Refusal(what, got=got, allowed=allowed, fix=fix) from error
    return part
