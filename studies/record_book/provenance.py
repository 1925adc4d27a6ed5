"""The commit that a record's runs are of, and whether the present code is still that."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from optim.errors import require
from optim.plugins import digests, source_files
from training.provenance import git_state

from ..export.run import Run
from ..runs import ROOT
from .book import RecordError
from .claims import summary_of

# A run's numbers come from these files, which also write its script.
CODE = ("model.py", "models", "optim", "data", "train_gpt.py", "training", "studies/export")


def check_clean(judged: Sequence[Run], *, allow: bool) -> tuple[str | None, bool]:
    """Return (commit, dirty) of the runs; of the present tree if there are none.

    Raise RecordError unless all are of commits with one code, without changes, and the present
    code, which the record exports, is still that. `allow` records another state instead.
    """
    states = {(s["commit"], s["dirty"]) for s in map(summary_of, judged)} or {git_state()}
    commits = {commit for commit, _ in states}
    commit = min(commits, key=str)
    if None in commits:
        got = "runs whose commit is not known: there was no git"
    elif len(commits) > 1 and any(_changes_since(str(c)) for c in commits):
        got = f"runs of {len(commits)} commits"
    elif any(dirty for _, dirty in states):
        got = "runs of a tree with changes that are in no commit"
    else:
        got = _changes_since(str(commit))
    if got is not None and not allow:
        raise RecordError(
            "the code of the record",
            got=got,
            allowed="one commit, the present code",
            fix="commit, and run it again; --allow-dirty records it as it is",
        )
    return commit, got is not None


def plugin_texts(judged: Sequence[Run]) -> dict[str, str]:
    """Return {file: its text} of the plugins of these runs and of the files that they import.

    A check imports them: each stands where Python looks for it. Raise RecordError for one that is
    not Python code, and for a file that has changed since a run.
    """
    texts: dict[str, str] = {}
    for run in judged:
        names = run.config.run.plugins
        before = summary_of(run).get("plugins", {}) if run.folder else {}
        for name, digest in digests(names).items():
            require(
                # Earlier versions kept the digests of the named plugins alone.
                before.get(name, digest) == digest,
                f"the plugin {name}",
                got=f"a file that has changed since {run.name}",
                allowed="the file that it was trained with",
                fix="put it back, or train it again",
                error=RecordError,
            )
        for name, file in source_files(names).items():
            require(
                file.suffix == ".py",
                f"the plugin {name} of {run.name}",
                got=file,
                allowed="a file of Python code, which the record keeps",
                fix="write it as a .py file",
                error=RecordError,
            )
            place = name.replace(".", "/") + "/__init__" * (file.stem == "__init__")
            texts[f"{place}.py"] = file.read_text(encoding="utf-8")
    return texts


def _changes_since(commit: str) -> str | None:
    """Return how this tree's code differs from the commit; None if it does not."""
    commands = (("diff", "--name-only", commit), ("ls-files", "--others", "--exclude-standard"))
    files = []
    try:
        for arguments in commands:
            git = ["git", *arguments, "--", *CODE]
            done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
            files += done.stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return f"commit {commit}, which this repository does not know"
    return f"code that has changed since commit {commit}: {', '.join(files)}" if files else None
