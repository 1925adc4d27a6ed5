"""A run's plugins: the files that a script takes its parts from."""

import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from optim.plugins import OURS

from .sources import imports_of
from .specialise import ExportError

LIBRARIES = ("site-packages", "dist-packages")  # folders whose modules a script imports


def files_of_plugins(names: Sequence[str]) -> dict[str, str]:
    """Return {file: its module} of plugins and of the user's own files that they import.

    A file stands behind those that it imports.
    """
    packages = {name.split(".")[0] for name in names}
    files: dict[str, str] = {}
    seen: set[str] = set()

    def visit(name: str) -> None:
        file = getattr(sys.modules.get(name), "__file__", None)
        if name in seen or file is None or not _is_own(name, packages):
            return
        seen.add(name)
        package = name if Path(file).stem == "__init__" else name.rpartition(".")[0]
        for module, part in imports_of(source(name), package).values():
            what = part.partition(" as ")[0]
            visit(module or what)
            visit(f"{module}.{what}")
        files[file] = name

    for name in names:
        visit(name)
    return files


def source(name: str) -> str:
    """Return the text of a module that is loaded."""
    try:
        return inspect.getsource(sys.modules[name])
    except OSError as error:
        raise ExportError(
            f"the plugin {name} of an exported run",
            got="no file of Python code",
            allowed="a module with its source",
            fix="write it as a .py file",
        ) from error


def check_parts(named: Mapping[str, str], packages: Sequence[str]) -> None:
    """Raise ExportError for a part of a run, {its name: its module}, that no plugin has.

    packages: whose files a script has. Parts of installed libraries are imported.
    """
    for name, module in named.items():
        if module.split(".")[0] not in packages and not _is_library(module):
            raise ExportError(
                f"{name} of an exported run",
                got=f"a part of {module}",
                allowed="parts of optim/, of run.plugins and of installed libraries",
                fix=f"--run.plugins {module}",
            )


def _is_library(name: str) -> bool:
    folders = Path(getattr(sys.modules[name], "__file__", None) or "").parts
    return name.split(".")[0] in sys.stdlib_module_names or not {*LIBRARIES}.isdisjoint(folders)


def _is_own(name: str, packages: set[str]) -> bool:
    """Return whether a module is a user's own, not ours and no library."""
    top = name.split(".")[0]
    return top in packages or (top not in OURS and not _is_library(name))
