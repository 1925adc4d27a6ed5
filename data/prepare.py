"""Prepare a corpus as a dataset: its texts become shards of tokens in a folder under corpora/.

Each command may be repeated: the same source gives the same dataset, and one that exists is left
alone. A dataset appears whole or not at all.
"""

import argparse
import sys
from typing import Any

from optim.plugins import load

from .corpora import RECIPES
from .shards import DataError

PLUGIN: dict[str, Any] = {
    "action": "append",
    "default": [],
    "metavar": "MODULE",
    "help": "a Python module of your own that registers tokenizers; may be repeated",
}


def parser() -> argparse.ArgumentParser:
    """Return the command line: one command for each recipe of data/corpora.py."""
    top = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="CORPUS")
    for name, recipe in RECIPES.items():
        about = str(recipe.prepare.__doc__)
        escaped = about.replace("%", "%%")  # argparse formats help, but no description
        command = commands.add_parser(name, help=escaped, description=about)
        command.set_defaults(prepare=recipe.prepare)
        command.add_argument("--tokenizer", choices=recipe.tokenizers, default=recipe.tokenizer)
        command.add_argument("--plugin", **PLUGIN)
        for names, settings in recipe.options:
            command.add_argument(*names, **settings)
    return top


def main(argv: list[str] | None = None) -> int:
    """Prepare the corpus that a command line asks for; return the exit code."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--plugin", **PLUGIN)  # which decides what --tokenizer takes
    try:
        load(first.parse_known_args(argv)[0].plugin, option="--plugin", error=DataError)
        args = parser().parse_args(argv)
        args.prepare(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        refusal = DataError(
            str(error.filename),
            got=error.strerror,
            allowed="a place that can be read and written",
            fix="--out FOLDER",
        )
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
