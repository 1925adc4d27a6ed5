"""The record book of the speedrun tracks: records/TRACK/DATE_SLUG/, the tables of README.md and records/README.md, and the check of a record.

    python -m studies.record_book add runs/STUDY --track pysource-cpu --slug dualized --title "…" --by NAME [--trials ENTRY=N …] [--note "…"]
    python -m studies.record_book add runs/a runs/b runs/c --track shakespeare-cpu --slug bigram        (one configuration, one seed a run)
    python -m studies.record_book tables [--check-only]
    python -m studies.record_book check records/TRACK/DATE_SLUG [--entry NAME] [--seeds N]

A record has for each of its entries the configuration, and a log: the full code, as a script that runs alone (studies/export.py), then the lines of every run that is judged.
record.json says what was claimed and by which rule; a study's results.json and report.png come along. `check` trains the entries again and compares losses: exactly where processor, torch and
threads are the same, else by their means; seconds are told and not judged.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from data.shards import DataError, read_manifest
from optim.errors import Refusal
from training import config as configuration
from training.config import Config, ConfigError
from training.runtime import RunError, git_state

from .. import runs, statistics
from ..export import compose, log
from ..export import run as exported
from ..export.run import Run
from ..export.specialise import ExportError
from ..runs import ROOT

BOOK = ROOT / "records"
LIMIT = 1_000_000  # bytes of a record: text that a reader opens, and a repository keeps
BEGIN, END = "<!-- records:begin -->", "<!-- records:end -->"
CODE = (
    "model.py",
    "models",
    "optim",
    "data",
    "train_gpt.py",
    "training",
    "studies/export",
)  # what numbers come from
# nats: the same processor, vector instructions, threads, versions and seeds give the same numbers, up to a few roundings of a float32 near 2. Where one of them
# differs a run of 180 steps ends 0.001 to 0.007 apart (LOG.md, 2026-11-27).
SAME = 1e-6
ROUNDING = 5e-5  # of a target: four digits
RULE = {
    "test_level": statistics.RULE_LEVEL,
    "sigma_from": "runs",
}  # of a study's results.json: a record's threshold is nobody's choice
DOUBT = 0.01  # two-sided level at which means of other machines differ: one check in a hundred fails by chance


class RecordError(Refusal):
    """A record that cannot be made or read: what was got, what is allowed, how to fix it."""


# ---- tracks


@dataclass(frozen=True)
class Track:
    """What runs must have in common to be compared.

    target: a fixed number, measured once. corpus: sha256 over the sha256 of the shards, train and then val. figure: what counts, for an end loss whose mean over seeds passes the rule at `target`. fixed: a configuration whose
    data, model (but its initialization) and batch are everybody's; None leaves architecture and batch free. threads: at most, of all processes. None of a corpus: not run here.
    """

    title: str
    target: float
    figure: Literal["steps", "seconds"]
    corpus: str | None
    fixed: str | None = None
    threads: int | None = None

    def check(self, name: str, config: Config, summary: dict[str, Any]) -> None:
        """Raise RecordError for a run of another track."""
        folder = Path(config.data.dataset)
        corpus = read_manifest(folder).sha256
        threads = re.fullmatch(r"cpu, (\d+) threads", summary["device"])
        there = configuration.flat(config)
        checks = [
            (f"the data of {folder}", corpus, self.corpus),
            *((key, there[key], value) for key, value in self.keys().items()),
        ]
        if self.threads and not (
            threads and int(threads[1]) * summary["world_size"] <= self.threads
        ):
            checks.append(("device", summary["device"], f"cpu, {self.threads} threads at most"))
        for what, got, allowed in checks:
            if got != allowed:
                raise RecordError(
                    f"{what} of a record of {name}",
                    got=repr(got),
                    allowed=repr(allowed),
                    fix=f"{self.fixed or 'another --track'}, or other runs",
                )

    def keys(self) -> dict[str, Any]:
        """Values that every run of the track has: {"section.key": value}."""
        common = {"data.holdout": 0.0}
        if self.fixed is None:
            return common | {"train.eval_tokens": None}
        raw = tomllib.loads((ROOT / self.fixed).read_text(encoding="utf-8"))
        base = configuration.flat(configuration.from_dict(Config, raw))
        free = ("model.init", "model.zero_init", "model.vocab_size")
        return common | {
            k: v
            for k, v in base.items()
            if (k.startswith("model.") and k not in free)
            or k in ("train.batch_size", "train.eval_tokens")
        }


PYSOURCE_TARGET = (
    1.9346  # the mean end loss of tuned AdamW at 400 steps, 4 seeds (LOG.md, 2026-11-23)
)
TRACKS = {
    "pysource-cpu": Track(
        "Python source by bytes, 4,096 tokens a step, 0.86 M parameters: steps to AdamW's loss at 400",
        PYSOURCE_TARGET,
        "steps",
        "4e1482b081f50655fa12297bf77d437f2085c7df5f058c7488b101127cd0e933",
        fixed="configs/tracks/pysource_cpu.toml",
    ),
    "shakespeare-cpu": Track(
        "Tiny Shakespeare by characters, the whole validation split, 2 CPU cores: training seconds to nanoGPT's own final loss",
        1.898,
        "seconds",
        "4676901879784a432c158f48cd91880148d1d1bfafb8802994e32d07af8ba072",
        threads=2,
    ),
    "fineweb-124m": Track(
        "The NanoGPT speedrun's optimization track: scripts, which were not run here",
        3.28,
        "steps",
        None,
        fixed="configs/track3_124m.toml",
    ),
}


# ---- what is claimed


@dataclass
class Claim:
    """One entry: the runs of one horizon, a seed each, and what they say. low, high: of the figure, None where unknown. trials: of its tuning, all counted; None: nobody counted."""

    name: str
    runs: list[Run]
    figure: float | None
    low: float | None
    high: float | None
    statistic: float
    threshold: float | None
    passes: bool | None
    trials: int | None
    note: str

    def told(self) -> dict[str, Any]:
        summaries = [summary_of(r) for r in self.runs]

        def mean(key: str) -> float:
            return float(np.mean([s[key] for s in summaries]))

        losses = [s["val_loss"] for s in summaries]
        return {
            "name": self.name,
            "config": f"{self.name}.toml",
            "log": f"{self.name}.txt",
            "steps": summaries[0]["steps"],
            "tokens": summaries[0]["tokens"],
            "params": summaries[0]["params"],
            "seeds": [s["seed"] for s in summaries],
            "n": len(losses),
            "losses": losses,
            "mean": float(np.mean(losses)),
            "statistic": self.statistic,
            "threshold": self.threshold,
            "passes": self.passes,
            "figure": self.figure,
            "low": self.low,
            "high": self.high,
            **{key: mean(key) for key in ("train_seconds", "optimizer_seconds", "wall_seconds")},
            "device": summaries[0]["device"],
            "torch": summaries[0]["torch"],
            "trials": self.trials,
            "note": self.note,
        }


def summary_of(run: Run) -> dict[str, Any]:
    found = runs.summary(run.folder) if run.folder else None
    assert found is not None, "export.read refuses a folder without one"
    return found


def claims_of_study(folder: Path, results: dict[str, Any], track: Track) -> list[Claim]:
    """At the confirmed steps to the target, or where an entry has none, at the budget and without a figure.

    low, high of a horizon hold it too: in results.json they are of the interpolated one. A study whose target is an entry's mean that is the track's to ROUNDING is judged by its own rule,
    with the noise that such a target has. The rule is the book's: its level, and σ of the study's own runs.
    """
    rule = {key: results["rule"][key] for key in ("test_level", "sigma_from")}
    if rule != RULE:
        raise RecordError(
            f"rule of {folder}",
            got=rule,
            allowed=RULE,
            fix="python -m studies.speedrun … with 2 seeds or more, without --threshold, --level and --sigma",
        )
    if results["target"] is None or abs(results["target"] - track.target) > ROUNDING:
        raise RecordError(
            f"target of {folder}",
            got=results["target"],
            allowed=track.target,
            fix=f"python -m studies.speedrun … --target {track.target}",
        )
    found = []
    for e in results["entries"]:
        reached = e["to_target"] if e["to_target"] and e["to_target"]["confirmed"] else None
        steps = (reached or e["at_budget"])["steps"]
        judged = [r for r in e["runs"] if r["steps"] == steps]
        diverged = [r["path"] for r in judged if r["loss"] is None]
        if diverged:
            raise RecordError(
                e["name"],
                got=f"runs that diverged: {', '.join(diverged)}",
                allowed="a loss of each",
                fix="other settings",
            )
        horizon = next(h for h in e["horizons"] if h["steps"] == steps)
        figure = low = high = None
        if reached and track.figure == "steps":
            figure = steps
            low, high = (
                None if x is None else of(steps, x)
                for of, x in ((min, reached["low"]), (max, reached["high"]))
            )
        elif reached:
            seconds = statistics.mean_interval([r["train_seconds"] for r in judged])
            figure, low, high = (
                seconds.value,
                *(x if math.isfinite(x) else None for x in (seconds.low, seconds.high)),
            )
        read = [exported.read(folder / r["path"]) for r in judged]
        threshold, tried = results["rule"]["threshold"], len(e["trials"])
        found.append(
            Claim(
                e["name"],
                read,
                figure,
                low,
                high,
                horizon["statistic"],
                threshold,
                horizon["passes"],
                tried,
                e["note"],
            )
        )
    return found


def claim_of_runs(folders: Sequence[Path], track: Track) -> Claim:
    """Of one configuration's runs, a seed each; the rule's threshold from their own standard deviation; one run has none and passes nothing."""
    read = [exported.read(f) for f in folders]
    losses, seconds = ([summary_of(r)[key] for r in read] for key in ("val_loss", "train_seconds"))
    noise = statistics.pooled([np.array(losses)])
    threshold = statistics.threshold(noise, len(losses)) if noise else None
    rule = statistics.Rule(track.target, math.inf if threshold is None else threshold)
    mean = float(np.mean(losses))
    passes = None if threshold is None else rule.passes(mean, len(losses))
    told = statistics.mean_interval(seconds)
    figure = (
        None
        if not passes
        else told.value
        if track.figure == "seconds"
        else float(read[0].config.train.steps)
    )
    low, high = (
        (told.low, told.high)
        if passes and track.figure == "seconds" and len(seconds) > 1
        else (None, None)
    )
    name = re.sub(r"[.-]?(s|seed)?\d+$", "", folders[0].name) or folders[0].name
    return Claim(
        name,
        read,
        figure,
        low,
        high,
        rule.statistic(mean, len(losses)),
        threshold,
        passes,
        None,
        "",
    )


def count(claims: Sequence[Claim], trials: Sequence[str]) -> None:
    """Set the entries' trials to what is said: NAME=N, or N of the only entry."""
    for text in trials:
        name, _, number = text.rpartition("=")
        claim = next((c for c in claims if c.name == name or (not name and len(claims) == 1)), None)
        if claim is None or not number.isdecimal() or int(number) < (claim.trials or 0):
            allowed = (
                ", ".join(f"{c.name}=N, N ≥ {c.trials or 0}" for c in claims)
                or "none, where nothing was run"
            )
            raise RecordError(
                "--trials",
                got=text,
                allowed=allowed,
                fix="all that were made, a study's own among them",
            )
        claim.trials = int(number)


def check_alike(claim: Claim) -> None:
    """Raise RecordError for runs of one entry that differ in more than seed and name."""
    first = configuration.flat(claim.runs[0].config)
    seeds = [r.config.run.seed for r in claim.runs]
    for run in claim.runs[1:]:
        for key, value in configuration.flat(run.config).items():
            if value != first[key] and key not in ("run.seed", "run.name", "run.dir"):
                raise RecordError(
                    f"{key} of {run.name}",
                    got=repr(value),
                    allowed=f"{first[key]!r}, as {claim.runs[0].name} has it",
                    fix="runs of one configuration",
                )
    if len(set(seeds)) < len(seeds):
        raise RecordError(
            f"seeds of {claim.name}", got=seeds, allowed="each once", fix="one run a seed"
        )


def check_clean(found: Sequence[Run], *, allow: bool) -> tuple[str | None, bool]:
    """(commit, dirty) of the runs. Raise RecordError unless all are of one commit, without changes, and the code that is exported is still that; `allow` records it instead."""
    states = {(s["commit"], s["dirty"]) for s in map(summary_of, found)} or {git_state()}
    commits = {commit for commit, _ in states}
    commit = min(commits, key=str)
    if None in commits:
        got = "runs whose commit is not known: there was no git"
    elif len(commits) > 1:
        got = f"runs of {len(commits)} commits"
    elif any(dirty for _, dirty in states):
        got = "runs of a tree with changes that are in no commit"
    else:
        got = _changed(str(commit))
    if got is not None and not allow:
        raise RecordError(
            "the code of the record",
            got=got,
            allowed="one commit, the present code",
            fix="commit, and run it again; --allow-dirty records it as it is",
        )
    return commit, got is not None


def _changed(commit: str) -> str | None:
    """What this tree's code has that the commit has not, files that git does not know among it; None if nothing."""
    try:
        done = [
            subprocess.run(
                ["git", *args, "--", *CODE], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.splitlines()
            for args in (
                ("diff", "--name-only", commit),
                ("ls-files", "--others", "--exclude-standard"),
            )
        ]
    except (OSError, subprocess.CalledProcessError):
        return f"commit {commit}, which this repository does not know"
    files = [file for listed in done for file in listed]
    return f"code that has changed since commit {commit}: {', '.join(files)}" if files else None


# ---- adding


def add(
    sources: Sequence[Path],
    track: str,
    slug: str,
    *,
    title: str,
    by: Sequence[str],
    day: str,
    command: str,
    allow_dirty: bool,
    trials: Sequence[str] = (),
    note: str = "",
) -> Path:
    """Make records/TRACK/DAY_SLUG and return it; nothing is left of one that is refused."""
    rules = TRACKS[track]
    ran, study = rules.corpus is not None, any((s / "results.json").is_file() for s in sources)
    said, names = ", ".join(map(str, sources)), {s.stem for s in sources}
    try:
        day = date.fromisoformat(day).isoformat()
    except ValueError as error:
        raise RecordError(
            "--date", got=day, allowed="YYYY-MM-DD", fix="leave it out, for today"
        ) from error
    for what, got, fine, allowed, fix in (
        (
            "--slug",
            slug,
            re.fullmatch(r"[a-z0-9][a-z0-9_-]*", slug),
            "small letters, digits, '_' and '-'",
            "a few words",
        ),
        (
            "sources",
            said,
            not ran or all(s.is_dir() for s in sources),
            "folders of what was run",
            "train it first",
        ),
        (
            "sources",
            said,
            ran or not any(s.is_dir() for s in sources),
            "configuration files; nothing was run here",
            str(rules.fixed),
        ),
        (
            "sources",
            said,
            not study or len(sources) == 1,
            "one study, or runs of one configuration",
            "a record for each",
        ),
        ("sources", said, ran or len(names) == len(sources), "one of each name", "rename a file"),
    ):
        if not fine:
            raise RecordError(what, got=got, allowed=allowed, fix=fix)
    folder = BOOK / track / f"{day}_{slug}"
    if folder.exists():
        raise RecordError(
            folder.relative_to(BOOK.parent),
            got="a record of that name",
            allowed="a new one",
            fix="another --slug",
        )
    results, claims, scripts = None, [], {}
    if not ran:
        scripts = {s.stem: exported.read(s) for s in sources}
        for name, run in scripts.items():
            there = configuration.flat(run.config)
            wrong = next(
                (k for k, v in rules.keys().items() if k != "train.eval_tokens" and there[k] != v),
                None,
            )
            if wrong:
                raise RecordError(
                    f"{wrong} of {name}",
                    got=repr(there[wrong]),
                    allowed=repr(rules.keys()[wrong]),
                    fix=rules.fixed,
                )
    elif study:
        results = json.loads((sources[0] / "results.json").read_text(encoding="utf-8"))
        claims = claims_of_study(sources[0], results, rules)
    else:
        claims = [claim_of_runs(sources, rules)]
    count(claims, trials)
    for claim in claims:
        check_alike(claim)
        for run in claim.runs:
            rules.check(track, run.config, summary_of(run))
    commit, dirty = check_clean([r for c in claims for r in c.runs], allow=allow_dirty)
    summaries = [summary_of(r) for c in claims for r in c.runs]
    entries = [c.told() for c in claims] or [
        {"name": n, "config": f"{n}.toml", "log": f"{n}.py", "n": 0, "figure": None}
        for n in scripts
    ]
    best = min(
        (e for e in entries if e["figure"] is not None), key=lambda e: e["figure"], default=None
    )
    record = {
        "schema": 1,
        "track": track,
        "date": day,
        "title": title or slug,
        "by": list(by),
        "note": " ".join(note.split()),
        "target": rules.target,
        "figure": best
        and {
            "entry": best["name"],
            "value": best["figure"],
            "unit": rules.figure,
            "low": best["low"],
            "high": best["high"],
        },
        "commit": commit,
        "dirty": dirty,
        "hardware": results["hardware"] if results else runs.machines(summaries) if ran else None,
        "versions": results["versions"] if results else runs.versions(summaries) if ran else None,
        "corpus_sha256": rules.corpus,
        "commands": {
            "made": results["command"] if results else None,
            "added": command,
            "check": None
            if rules.corpus is None
            else f"python -m studies.record_book check records/{track}/{day}_{slug}",
        },
        "entries": entries,
    }
    files = {"record.json": json.dumps(record, indent=1, ensure_ascii=False) + "\n"}
    for claim in claims:
        files |= {
            f"{claim.name}.toml": _portable(claim.runs[0].config),
            f"{claim.name}.txt": log_of(claim),
        }
    for name, run in scripts.items():
        files |= {
            f"{name}.toml": _portable(run.config),
            f"{name}.py": compose.script(run, track=True),
        }
    if results:
        for run in (r for e in results["entries"] for r in e["runs"]):
            run.pop("training", None)  # in the logs
        files["results.json"] = (
            json.dumps(results, ensure_ascii=False, separators=(",", ":")) + "\n"
        )
    picture = sources[0] / "report.png"
    files = {
        name: text.replace(f"{Path.cwd()}/", "").replace(f"{ROOT}/", "")
        for name, text in files.items()
    }  # where it was made is nobody's business
    size = sum(len(text.encode()) for text in files.values()) + (
        picture.stat().st_size if picture.is_file() else 0
    )
    if size > LIMIT:
        raise RecordError(
            f"{track}/{day}_{slug}",
            got=f"{size:,} bytes",
            allowed=f"{LIMIT:,}",
            fix="fewer evaluations, train.log_every higher, or fewer entries",
        )
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if picture.is_file():
        shutil.copy(picture, folder / "report.png")
    return folder


def log_of(claim: Claim) -> str:
    """The script of the first seed, then all seeds' lines, as one file of several trials."""
    code = compose.script(claim.runs[0])
    return "\n".join([code + log.LINE, *(log.log_lines(r) for r in claim.runs)])


def _portable(config: Config) -> str:
    """A configuration without the places of this machine."""
    raw = configuration.from_dict(Config, exported.nested(config))
    raw.run.dir, raw.data.dataset = "runs", f"corpora/{Path(config.data.dataset).name}"
    return configuration.to_toml(raw)


# ---- tables


def records() -> list[tuple[Path, dict[str, Any]]]:
    found = sorted(BOOK.glob("*/*/record.json"))
    return [(f.parent, json.loads(f.read_text(encoding="utf-8"))) for f in found]


def tables(*, relative_to: Path) -> str:
    """A table for each track: an entry a row, the best figure first; those without one come last. Then the records' notes."""
    parts = []
    for name, track in TRACKS.items():
        there = [
            (folder.relative_to(relative_to), record)
            for folder, record in records()
            if record["track"] == name
        ]
        rows = [(e, folder, record) for folder, record in there for e in record["entries"]]
        rows.sort(
            key=lambda r: (
                math.inf if r[0]["figure"] is None else r[0]["figure"],
                r[2]["date"],
                r[0]["name"],
            )
        )
        parts.append(f"**{name}** ({track.title}; target {track.target:g})")
        if not rows:
            parts.append("No record yet.")
            continue
        unit = {"steps": "steps to the target", "seconds": "training seconds"}[track.figure]
        head = f"| {unit} | end loss | training s, wall s | entry | trials | date | record |\n|---|---|---|---|---|---|---|"
        parts.append("\n".join([head, *(_row(*row) for row in rows)]))
        parts += [
            f"[{record['title']}]({folder.as_posix()}/): {record['note']}"
            for folder, record in there
            if record.get("note")
        ]
    return "\n\n".join(parts) + "\n"


def _row(e: dict[str, Any], folder: Path, record: dict[str, Any]) -> str:
    by = f", {', '.join(record['by'])}" if record["by"] else ""
    where = f"[{record['title']}]({folder.as_posix()}/){by}{' (not from a commit)' if record['dirty'] else ''}"
    if not e["n"]:
        return f"| not run here | | | [{e['name']}]({folder.as_posix()}/{e['log']}) | | {record['date']} | {where} |"
    digits = ".0f" if TRACKS[record["track"]].figure == "steps" else ".2f"
    figure = "not reached" if e["figure"] is None else f"{e['figure']:{digits}}"
    if e["figure"] is not None and (e["low"] is not None or e["high"] is not None):
        low, high = (f"{x:{digits}}" if x is not None else "?" for x in (e["low"], e["high"]))
        figure += f" [{low}, {high}]"
    loss = f"{e['mean']:.4f} (n = {e['n']}, {e['steps']} steps){' ✓' if e['passes'] else ''}"
    trials = "not counted" if e["trials"] is None else e["trials"]
    return f"| {figure} | {loss} | {e['train_seconds']:.1f}, {e['wall_seconds']:.1f} | [{e['name']}]({folder.as_posix()}/{e['log']}) | {trials} | {record['date']} | {where} |"


TEXT = """# Record book

Made by `python -m studies.record_book tables`; `python -m studies.record_book --help` says how a record is added and checked.
A ✓ is a mean end loss that passes the rule (target − mean) · √n ≥ threshold (docs/speedrun.md). Intervals are of 95 %. trials: of the entry's tuning, all of a study's, and what its author counted beside them.
A track's target is a fixed number: of pysource-cpu and shakespeare-cpu a mean end loss that was measured once, whose noise no record is judged by again.

"""


def write_tables(*, check_only: bool) -> list[str]:
    """Names of the files that were (or, checking, are) not what is generated."""
    readme, book = ROOT / "README.md", BOOK / "README.md"
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise RecordError(
            "README.md",
            got="no place for the tables",
            allowed=f"{BEGIN} and {END}, once each",
            fix="put them in",
        )
    before, rest = text.split(BEGIN)
    wanted = {
        readme: f"{before}{BEGIN}\n{tables(relative_to=ROOT)}{END}{rest.split(END)[1]}",
        book: TEXT + tables(relative_to=BOOK),
    }
    stale = [
        f
        for f, content in wanted.items()
        if not f.is_file() or f.read_text(encoding="utf-8") != content
    ]
    for file in [] if check_only else stale:
        file.write_text(wanted[file], encoding="utf-8")
    return [str(f.relative_to(ROOT)) for f in stale]


# ---- checking


def check(
    folder: Path, *, entry: str | None, seeds: int | None, workers: int, out: Path | None
) -> bool:
    """Train a record's entries again, by their first seeds, with the code of now, and say PASS or FAIL with the figures."""
    if not (folder / "record.json").is_file():
        there = ", ".join(str(f.relative_to(BOOK.parent)) for f, _ in records())
        raise RecordError(folder, got="no record.json in it", allowed=there, fix="one of them")
    if seeds is not None and seeds < 1:
        raise RecordError("--seeds", got=seeds, allowed="1 or more", fix="leave it out, for all")
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    state = commit, dirty = git_state()
    out = out or Path("runs") / f"check-{folder.resolve().name}-{(commit or 'no-commit')[:8]}"
    if record["corpus_sha256"] is None:
        raise RecordError(
            folder,
            got="a script that was not run",
            allowed="a record with runs",
            fix="torchrun it where the data and the GPUs are",
        )
    names = [e["name"] for e in record["entries"]]
    if entry is not None and entry not in names:
        raise RecordError("--entry", got=entry, allowed=", ".join(names), fix="one of them")
    good = True
    for e in record["entries"]:
        if entry not in (None, e["name"]):
            continue
        config = configuration.load([str(folder / e["config"])])
        got = read_manifest(Path(config.data.dataset)).sha256
        if got != record["corpus_sha256"]:
            raise RecordError(
                f"the data of {config.data.dataset}",
                got=got,
                allowed=record["corpus_sha256"],
                fix="python -m data.prepare, with the versions of requirements.txt",
            )
        quiet = {
            "data.dataset": str(Path(config.data.dataset).resolve()),
            "train.keep_checkpoints": 0,
            "train.sample_tokens": 0,
            "train.pictures": False,
        }
        wanted = e["seeds"][:seeds]
        jobs = [
            runs.job(config, f"{e['name']}.seed{s}", out, **{"run.seed": s, **quiet})
            for s in wanted
        ]
        for path in (out / j.name for j in jobs):
            made = runs.summary(path)
            if made is None:
                shutil.rmtree(
                    path, ignore_errors=True
                )  # one that diverged does not say by which code
            elif dirty is not False or (made["commit"], made["dirty"]) != state:
                raise RecordError(
                    path,
                    got="a run that is there already, of code that is not known to be this",
                    allowed=f"one of commit {commit}, without changes",
                    fix="delete it, or another --out",
                )
        runs.sweep(jobs, out, workers=runs.places(workers), dry_run=False)
        found = [runs.summary(out / j.name) for j in jobs]
        fine, said = compare(e, found, same=_same(record, e, found))
        good &= fine
        print(f"{e['name']}: {said}: {'PASS' if fine else 'FAIL'}")
    print(f"{folder}: {'PASS' if good else 'FAIL'}")
    return good


def _same(
    record: dict[str, Any], e: dict[str, Any], found: Sequence[dict[str, Any] | None]
) -> bool:
    """Whether these were trained on the record's kind of machine, with its torch and threads."""
    here = {(s["torch"], s["device"], s["hardware"]) for s in found if s}
    return here == {(e["torch"], e["device"], record["hardware"])}


def compare(
    e: dict[str, Any], found: Sequence[dict[str, Any] | None], *, same: bool
) -> tuple[bool, str]:
    """(fine, figures): each seed's loss within SAME on the same machine; else means within Student's interval at level DOUBT, of their pooled deviation."""
    here = [math.inf if s is None else s["val_loss"] for s in found]
    there, n, m = e["losses"], len(found), e["n"]
    seconds = f"{np.mean([s['train_seconds'] for s in found if s] or [math.nan]):.1f} s of training here, {e['train_seconds']:.1f} s recorded (not judged)"
    if diverged := sum(not math.isfinite(x) for x in here):
        return False, f"{diverged} of {n} runs diverged here, none of {m} recorded; {seconds}"
    means = f"mean end loss {np.mean(here):.4f} here (n = {n}), {e['mean']:.4f} recorded (n = {m})"
    if same:
        apart = max(abs(a - b) for a, b in zip(here, there, strict=False))
        return (
            apart <= SAME,
            f"{means}; seed by seed at most {apart:.2g} apart, allowed {SAME:g} on the same machine and versions; {seconds}",
        )
    df = n + m - 2
    deviation = (
        math.sqrt(
            sum(float(((x := np.array(y)) - x.mean()) @ (x - x.mean())) for y in (here, there)) / df
        )
        if df
        else math.nan
    )
    apart, allowed = (
        abs(float(np.mean(here)) - e["mean"]),
        float(stats.t.isf(DOUBT / 2, df)) * deviation * math.sqrt(1 / n + 1 / m)
        if df
        else math.nan,
    )
    if math.isnan(allowed):
        return (
            False,
            f"{means}; one loss on either side tells no deviation, and machine or versions differ; {seconds}",
        )
    return (
        apart <= allowed,
        f"{means}; {apart:.4f} apart, allowed {allowed:.4f} between machines ({1 - DOUBT:.0%}); {seconds}",
    )


# ---- the command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m studies.record_book",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="do", required=True)
    adding = commands.add_parser("add", help="a study, or runs of one configuration, to the book")
    adding.add_argument("sources", nargs="+", type=Path, metavar="runs/NAME")
    adding.add_argument("--track", required=True, choices=TRACKS)
    adding.add_argument("--slug", required=True, help="of the folder's name")
    adding.add_argument("--title", default="")
    adding.add_argument("--by", nargs="+", default=[], metavar="NAME")
    adding.add_argument("--date", default=date.today().isoformat())
    adding.add_argument(
        "--trials",
        nargs="+",
        default=[],
        metavar="[ENTRY=]N",
        help='of its tuning, all of them; a study\'s own if left out, and of runs "not counted"',
    )
    adding.add_argument(
        "--note", default="", help="what a reader has to know; stands under the table"
    )
    adding.add_argument(
        "--allow-dirty", action="store_true", help="code that is in no commit; the record says so"
    )
    tabling = commands.add_parser(
        "tables", help="write the tables of README.md and records/README.md"
    )
    tabling.add_argument(
        "--check-only", action="store_true", help="exit code 1 where they are not up to date"
    )
    checking = commands.add_parser("check", help="train a record again")
    checking.add_argument("record", type=Path, metavar="records/TRACK/DATE_SLUG")
    checking.add_argument("--entry")
    checking.add_argument("--seeds", type=int, help="the first ones; all if left out")
    checking.add_argument("--workers", type=int, default=1)
    checking.add_argument(
        "--out", type=Path, help="run folders; runs/check-DATE_SLUG-COMMIT if left out"
    )
    args = parser.parse_args(argv)
    try:
        if args.do == "add":
            command = shlex.join(
                ["python", "-m", "studies.record_book", *(sys.argv[1:] if argv is None else argv)]
            )
            options = {
                k: getattr(args, k) for k in ("title", "by", "allow_dirty", "trials", "note")
            }
            print(
                add(
                    args.sources, args.track, args.slug, day=args.date, command=command, **options
                ).relative_to(BOOK.parent)
            )
            return 0
        if args.do == "tables":
            stale = write_tables(check_only=args.check_only)
            print(
                "\n".join(
                    f"{name}: {'not up to date' if args.check_only else 'written'}"
                    for name in stale
                )
                or "up to date"
            )
            return int(bool(stale) and args.check_only)
        return int(
            not check(
                args.record, entry=args.entry, seeds=args.seeds, workers=args.workers, out=args.out
            )
        )
    except (RecordError, ExportError, ConfigError, DataError, RunError, runs.StudyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
