"""A run's plugins: the files that a script takes its parts from."""

from collections.abc import Mapping, Sequence

from optim.errors import require
from optim.plugins import is_library, source_files

from .specialise import ExportError


def files_of_plugins(names: Sequence[str]) -> dict[str, str]:
    """Return {file: its module} of plugins and of the user's own files that they import.

    A file stands behind those that it imports.
    """
    modules = source_files(names)
    for name, file in modules.items():
        require(
            file.suffix == ".py",
            f"the plugin {name} of an exported run",
            got="no file of Python code",
            allowed="a module with its source",
            fix="write it as a .py file",
            error=ExportError,
        )
    return {str(file): name for name, file in modules.items()}


def check_parts(named: Mapping[str, str], packages: Sequence[str]) -> None:
    """Raise ExportError for a part of a run, {its name: its module}, that no plugin has.

    packages: whose files a script has. Parts of installed libraries are imported.
    """
    for name, module in named.items():
        if module.split(".")[0] not in packages and not is_library(module):
            raise ExportError(
                f"{name} of an exported run",
                got=f"a part of {module}",
                allowed="parts of optim/, of run.plugins and of installed libraries",
                fix=f"--run.plugins {module}",
            )
