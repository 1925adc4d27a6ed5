"""Adding a record: from a study, from runs of one configuration, or from scripts not run here."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from optim.errors import require
from training import config as configuration
from training.config import Config

from .. import runs
from ..export.compose import script
from ..export.log import LINE, log_lines
from ..export.run import Run, nested, read
from ..runs import ROOT
from . import book
from .book import RecordError
from .claims import (
    Claim,
    check_alike,
    check_clock,
    claim_of_runs,
    claims_of_study,
    count_trials,
    summary_of,
)
from .provenance import check_clean, plugin_texts
from .tracks import TRACKS, Track

# Bytes of a record: text that a reader opens, and that a repository keeps.
LIMIT = 1_000_000


@dataclass
class Evidence:
    """The evidence of a record: judged runs, or configurations that were not run here."""

    claims: list[Claim] = field(default_factory=list)
    # results.json, if the runs are a study's.
    results: dict[str, Any] | None = None
    # Configurations that were not run, by name.
    configurations: dict[str, Run] = field(default_factory=dict)

    def judged(self) -> list[Run]:
        """Return the runs of all claims."""
        return [run for claim in self.claims for run in claim.judged]

    def entries(self) -> list[dict[str, Any]]:
        """Return the entries of record.json."""
        return [c.entry() for c in self.claims] or [
            {"name": name, "config": f"{name}.toml", "log": f"{name}.py", "n": 0, "figure": None}
            for name in self.configurations
        ]

    def machine(self) -> dict[str, Any]:
        """Return the hardware and the versions that trained, None where nothing was run."""
        if self.results:
            return {key: self.results[key] for key in ("hardware", "versions")}
        if not self.claims:
            return {"hardware": None, "versions": None}
        summaries = [summary_of(run) for run in self.judged()]
        return {"hardware": runs.machines(summaries), "versions": runs.versions(summaries)}


def add_record(
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
    """Write records/TRACK/DAY_SLUG and return it. Leave nothing behind if it is refused."""
    rules, day = TRACKS[track], _iso_day(day)
    check_sources(sources, slug, rules)
    folder = book.BOOK / track / f"{day}_{slug}"
    place = folder.relative_to(book.BOOK.parent)
    if folder.exists():
        got, allowed, fix = "a record of that name", "a new one", "another --slug"
        raise RecordError(place, got=got, allowed=allowed, fix=fix)
    evidence = read_evidence(sources, rules)
    count_trials(evidence.claims, trials)
    for claim in evidence.claims:
        check_alike(claim)
        check_clock(claim, rules)
        for run in claim.judged:
            rules.check(track, run.config, summary_of(run))
    commit, dirty = check_clean(evidence.judged(), allow=allow_dirty)
    entries = evidence.entries()
    record = {
        "schema": 1,
        "track": track,
        "date": day,
        "title": title or slug,
        "by": list(by),
        "note": " ".join(note.split()),
        "target": rules.target,
        "figure": best_figure(entries, rules),
        "commit": commit,
        "dirty": dirty,
        **evidence.machine(),
        "corpus_sha256": rules.corpus,
        "commands": {
            "made": evidence.results["command"] if evidence.results else None,
            "added": command,
            "check": f"python -m studies.record_book check records/{track}/{folder.name}"
            if evidence.claims
            else None,
        },
        "entries": entries,
    }
    write_record(folder, texts(record, evidence), picture=sources[0] / "report.png")
    return folder


def _iso_day(day: str) -> str:
    try:
        return date.fromisoformat(day).isoformat()
    except ValueError as error:
        allowed, fix = "YYYY-MM-DD", "leave it out, for today"
        raise RecordError("--date", got=day, allowed=allowed, fix=fix) from error


def check_sources(sources: Sequence[Path], slug: str, track: Track) -> None:
    """Raise RecordError for a bad slug, or for sources that the track does not take."""
    require(
        re.fullmatch(r"[a-z0-9][a-z0-9_-]*", slug),
        "--slug",
        got=slug,
        allowed="small letters, digits, '_' and '-'",
        fix="a few words",
        error=RecordError,
    )
    folders = [s for s in sources if s.is_dir()]
    if track.corpus is not None:
        study = any((s / "results.json").is_file() for s in sources)
        checks = [
            (len(folders) == len(sources), "folders of what was run", "train it first"),
            (
                not study or len(sources) == 1,
                "one study, or runs of one configuration",
                "a record for each",
            ),
        ]
    else:
        names = {s.stem for s in sources}
        checks = [
            (not folders, "configuration files; nothing was run here", track.fixed),
            (len(names) == len(sources), "one of each name", "rename a file"),
        ]
    got = ", ".join(map(str, sources))
    for fine, allowed, fix in checks:
        require(fine, "sources", got=got, allowed=allowed, fix=fix, error=RecordError)


def read_evidence(sources: Sequence[Path], track: Track) -> Evidence:
    """Read what the record rests on. Raise RecordError for what the track does not take."""
    if track.corpus is None:
        untrained = {s.stem: read(s) for s in sources}
        for name, run in untrained.items():
            _check_configuration(name, run.config, track)
        return Evidence(configurations=untrained)
    study = sources[0] / "results.json"
    if study.is_file():
        results = json.loads(study.read_text(encoding="utf-8"))
        return Evidence(claims_of_study(sources[0], results, track), results)
    return Evidence([claim_of_runs(sources, track)])


def _check_configuration(name: str, config: Config, track: Track) -> None:
    """Raise RecordError if a configuration that was not run differs from the track's."""
    values = configuration.flat(config)
    for key, value in track.required_values().items():
        require(
            values[key] == value or key == "train.eval_tokens",
            f"{key} of {name}",
            got=repr(values[key]),
            allowed=repr(value),
            fix=track.fixed,
            error=RecordError,
        )


def best_figure(entries: Sequence[dict[str, Any]], track: Track) -> dict[str, Any] | None:
    """Return the smallest figure of the entries, with its interval; None if none has one."""
    reached = [e for e in entries if e["figure"] is not None]
    if not reached:
        return None
    best = min(reached, key=lambda e: e["figure"])
    return {
        "entry": best["name"],
        "value": best["figure"],
        "unit": track.figure,
        "low": best["low"],
        "high": best["high"],
    }


# ---- a record's files


def texts(record: dict[str, Any], evidence: Evidence) -> dict[str, str]:
    """Return the record's text files by name, without this machine's folders."""
    files = {"record.json": json.dumps(record, indent=1, ensure_ascii=False) + "\n"}
    for claim in evidence.claims:
        files[f"{claim.name}.toml"] = portable_toml(claim.judged[0].config)
        files[f"{claim.name}.txt"] = log_of(claim)
    for name, run in evidence.configurations.items():
        files[f"{name}.toml"] = portable_toml(run.config)
        files[f"{name}.py"] = script(run, track=True)
    sources = plugin_texts([*evidence.judged(), *evidence.configurations.values()])
    for name in sources.keys() & files.keys():
        got, allowed = "a file of the record", "a name of its own"
        raise RecordError(f"the plugin {name}", got=got, allowed=allowed, fix="rename it")
    files |= sources
    if evidence.results:
        for run in (r for e in evidence.results["entries"] for r in e["runs"]):
            run.pop("training", None)  # the logs have it
        compact = json.dumps(evidence.results, ensure_ascii=False, separators=(",", ":"))
        files["results.json"] = compact + "\n"
    return {
        name: text.replace(f"{Path.cwd()}/", "").replace(f"{ROOT}/", "")
        for name, text in files.items()
    }


def log_of(claim: Claim) -> str:
    """Return one log: the first seed's script, then the lines of every seed."""
    code = script(claim.judged[0])
    return "\n".join([code + LINE, *(log_lines(r) for r in claim.judged)])


def portable_toml(config: Config) -> str:
    """Return a configuration without the places of this machine."""
    raw = configuration.from_dict(Config, nested(config))
    raw.run.dir, raw.data.dataset = "runs", f"corpora/{Path(config.data.dataset).name}"
    return configuration.to_toml(raw)


def write_record(folder: Path, files: dict[str, str], *, picture: Path) -> None:
    """Write a new record's folder. Raise RecordError before anything is written if it is large."""
    size = sum(len(text.encode()) for text in files.values())
    if picture.is_file():
        size += picture.stat().st_size
    require(
        size <= LIMIT,
        f"{folder.parent.name}/{folder.name}",
        got=f"{size:,} bytes",
        allowed=f"{LIMIT:,}",
        fix="fewer evaluations, train.log_every higher, or fewer entries",
        error=RecordError,
    )
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    if picture.is_file():
        shutil.copy(picture, folder / "report.png")
