"""studies/record_book: what enters the book, its tables, and the check of a record."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.shards import read_manifest
from studies import runs
from studies.export.log import LINE
from studies.export.run import Run
from studies.record_book import add as adding
from studies.record_book import book as shelf
from studies.record_book import check as checking
from studies.record_book import command, provenance
from studies.record_book import tables as listing
from studies.record_book.book import RecordError
from studies.record_book.check import DOUBT, compare
from studies.record_book.claims import RULE, claims_of_study
from studies.record_book.command import main
from studies.record_book.tables import tables, write_tables
from studies.record_book.tracks import TRACKS, Track
from training import config as configuration
from training.config import Config
from training.provenance import hardware

from tests.helpers import ROOT, SOAK, run, small_dataset

QUIET = ("--train.keep-checkpoints", "0", "--train.sample-tokens", "0", "--train.steps", "4", "--train.eval-every", "2")
SEEDS = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/study, of two entries and SEEDS seeds, with its results.json."""
    root = tmp_path_factory.mktemp("records with spaces")
    small_dataset(root)
    text = (root / "small.toml").read_text().replace("eval_tokens = 512\n", "")  # records take the whole split
    (root / "small.toml").write_text(text)
    folders = {}
    for name, options in {"dualized": (), "adamw": ("--optim.name", "adamw", "--optim.lr", "0.003")}.items():
        for seed in range(SEEDS):
            where = ("--run.dir", "runs/study", "--run.name", f"{name}.s4.seed{seed}", "--run.seed", str(seed))
            code, _, err = run(root, "small.toml", *where, *QUIET, *options)
            assert code == 0, err
            folders.setdefault(name, []).append(root / "runs/study" / f"{name}.s4.seed{seed}")
    write_results(root, folders)
    return root


def write_results(root: Path, folders: dict[str, list[Path]]) -> None:
    """As studies/speedrun.py does, of what records read; dualized has reached the target."""
    entries = []
    for name, paths in folders.items():
        summaries = [runs.summary(p) or {} for p in paths]
        told = [
            {
                "steps": 4,
                "seed": s["seed"],
                "loss": s["val_loss"],
                "train_seconds": s["train_seconds"],
                "path": p.name,
                "training": [[0, 0, 1.0]] * 50,
            }
            for p, s in zip(paths, summaries, strict=True)
        ]
        reached = {
            "steps": 4,
            "low": None,
            "high": 4.5,
            "tokens": 512,
            "train_seconds": 1.0,
            "confirmed": True,
            "interpolated": 3.5,
        }
        entries.append(
            {
                "name": name,
                "trials": [{}] * 8,
                "runs": told,
                "note": "",
                "horizons": [{"steps": 4, "n": SEEDS, "statistic": 0.5, "passes": name == "dualized"}],
                "at_budget": {"steps": 4},
                "to_target": reached if name == "dualized" else None,
            }
        )
    content = {
        "target": 2.8,
        "rule": {"threshold": 0.004, **RULE},
        "command": f"python -m studies.speedrun {root}/dualized.toml adamw.toml",
        "hardware": hardware("cpu, 1 threads"),
        "versions": {"torch": "here"},
        "entries": entries,
    }
    (root / "runs/study/results.json").write_text(json.dumps(content))


@pytest.fixture
def book(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty book, and the track "small" of the small dataset."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(shelf, "BOOK", tmp_path / "records")
    small = Track("Products", 2.8, "steps", read_manifest(root / "corpora/small").sha256, threads=2)
    timed = replace(small, figure="seconds")
    tracks = {
        "small": small,
        "timed": timed,
        "easy": replace(timed, target=99.0),
        "fineweb-124m": TRACKS["fineweb-124m"],
    }
    for module in (adding, listing, command):
        monkeypatch.setattr(module, "TRACKS", tracks)
    return tmp_path / "records"


def add(*sources: str, track: str = "small", slug: str = "first", dirty: bool = True, more: Sequence[str] = ()) -> int:
    return main(
        [
            "add",
            *sources,
            "--track",
            track,
            "--slug",
            slug,
            "--date",
            "2026-01-02",
            "--title",
            "A title",
            "--by",
            "A. Nonymous",
            *(["--allow-dirty"] if dirty else []),
            *more,
        ]
    )


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


# ---- adding


def test_a_record_has_the_claim_the_code_and_every_judged_run(book: Path, root: Path):
    assert add("runs/study") == 0
    folder = book / "small/2026-01-02_first"
    assert {p.name for p in folder.iterdir()} == {
        "record.json",
        "results.json",
        "dualized.toml",
        "dualized.txt",
        "adamw.toml",
        "adamw.txt",
    }
    record = read(folder)
    assert record["figure"] == {"entry": "dualized", "value": 4, "unit": "steps", "low": None, "high": 4.5}, (
        "no bound below"
    )
    assert [(e["name"], e["n"], e["seeds"], e["figure"], e["trials"]) for e in record["entries"]] == [
        ("dualized", 2, [0, 1], 4, 8),
        ("adamw", 2, [0, 1], None, 8),
    ]
    log = (folder / "adamw.txt").read_text()
    compile(log.split(f"\n{LINE}\n")[0], "adamw.txt", "exec")
    for seed, loss in enumerate(record["entries"][1]["losses"]):
        assert f"adamw.s4.seed{seed}, seed {seed}, by train_gpt.py" in log
        assert f"step:4/4 val_loss:{loss:.5f}" in log
    assert sum(p.stat().st_size for p in folder.iterdir()) < adding.LIMIT
    assert "training" not in (folder / "results.json").read_text()


def test_a_record_says_nothing_of_the_machine_s_folders(book: Path, root: Path):
    assert add("runs/study") == 0
    for file in (book / "small/2026-01-02_first").iterdir():
        text = file.read_text()
        assert str(root) not in text and str(ROOT) not in text and "/tmp/" not in text, file
    assert configuration.load([str(book / "small/2026-01-02_first/adamw.toml")]).data.dataset == "corpora/small"


def test_runs_of_one_configuration_are_judged_by_their_own_deviation(book: Path, root: Path):
    paths = [f"runs/study/dualized.s4.seed{s}" for s in range(SEEDS)]
    assert add(*paths, track="timed") == 0
    (entry,) = read(book / "timed/2026-01-02_first")["entries"]
    assert entry["trials"] is None and "| not counted |" in tables(relative_to=book)
    losses = np.array(entry["losses"])
    statistic = (2.8 - losses.mean()) * np.sqrt(2)
    # Student's quantile of 1 degree of freedom at one in a hundred, from a table.
    threshold = 31.821 * losses.std(ddof=1)
    assert entry["statistic"] == pytest.approx(statistic)
    assert entry["threshold"] == pytest.approx(threshold, rel=1e-4)
    assert entry["passes"] == (statistic >= threshold)
    assert (entry["figure"] is not None) == entry["passes"]
    assert add(*paths, track="timed", slug="given") == 0
    assert add(*paths, track="easy", slug="six", more=("--trials", "6")) == 0
    (entry,) = read(book / "easy/2026-01-02_six")["entries"]
    assert entry["trials"] == 6
    assert entry["passes"] and entry["figure"] == pytest.approx(entry["train_seconds"])


def test_a_record_of_runs_names_the_machine_that_trained_and_all_versions(
    book: Path, root: Path, monkeypatch: pytest.MonkeyPatch
):
    summary, elsewhere = runs.summary, {"hardware": "A processor, 3 cores", "commit": "abc", "dirty": False}
    assert (summary(root / "runs/study/adamw.s4.seed0") or {})["hardware"] == hardware("cpu")
    monkeypatch.setattr(runs, "summary", lambda path: (summary(path) or {}) | elsewhere)
    assert add("runs/study/adamw.s4.seed0", "runs/study/adamw.s4.seed1") == 0
    record = read(book / "small/2026-01-02_first")
    assert record["hardware"] == "A processor, 3 cores"
    assert record["versions"]["nanodual"] == "commit abc" and record["versions"].keys() >= {"python", "torch"}
    monkeypatch.setattr(
        runs, "summary", lambda path: {k: v for k, v in (summary(path) or {}).items() if k != "hardware"}
    )
    assert add("runs/study/adamw.s4.seed0", slug="old") == 0
    assert read(book / "small/2026-01-02_old")["hardware"] == "not known"


def test_trials_beside_a_study_s_are_counted_with_them_and_a_note_stands_under_the_table(book: Path, root: Path):
    assert add("runs/study", more=("--trials", "dualized=118", "--note", "110 screens\non the judged split")) == 0
    record = read(book / "small/2026-01-02_first")
    assert [e["trials"] for e in record["entries"]] == [118, 8] and record["note"] == "110 screens on the judged split"
    text = tables(relative_to=book)
    assert "dualized.txt) | 118 |" in text
    assert "|\n\n[A title](small/2026-01-02_first/): 110 screens on the judged split\n" in text


def test_seconds_of_two_machines_are_no_figure_of_a_track_of_seconds(
    book: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    summary = runs.summary
    elsewhere = {"hardware": "another"}
    monkeypatch.setattr(
        runs, "summary", lambda path: (summary(path) or {}) | (elsewhere if path.name.endswith("1") else {})
    )
    paths = [f"runs/study/dualized.s4.seed{s}" for s in range(SEEDS)]
    assert add(*paths, track="timed") == 2
    assert "training seconds of dualized.s4\n  got: " in refusal(capsys)
    assert add(*paths) == 0, "losses of two machines are compared as they are"
    assert read(book / "small/2026-01-02_first")["hardware"].endswith(", another")


def test_the_log_of_a_restored_run_says_that_it_has_its_evaluations_alone(book: Path, root: Path):
    restored = root / "runs/study/adamw.s4.seed1/restored.txt"
    restored.write_text("restored\n")
    try:
        assert add("runs/study/adamw.s4.seed0", "runs/study/adamw.s4.seed1") == 0
    finally:
        restored.unlink()
    (log,) = (book / "small/2026-01-02_first").glob("*.txt")
    assert log.read_text().count(", seed 1 (evaluations alone), by train_gpt.py of") == 1
    assert log.read_text().count("(evaluations alone), by") == 1


STUDY, RUN, CONFIG = "runs/study", "runs/study/adamw.s4.seed0", "small.toml"


@pytest.mark.parametrize(
    ("sources", "more", "said"),
    [
        (
            [STUDY],
            ["--trials", "dualized=7"],
            "--trials\n  got: dualized=7\n  allowed: dualized=N, N ≥ 8, adamw=N, N ≥ 8\n",
        ),
        ([STUDY], ["--trials", "9"], "--trials\n  got: 9\n"),
        ([STUDY], ["--trials", "sgd=9"], "--trials\n  got: sgd=9\n"),
        ([RUN], ["--trials", "some"], "--trials\n  got: some\n  allowed: adamw.s4=N, N ≥ 0\n"),
        ([RUN], ["--date", "../../x"], "--date\n  got: ../../x\n  allowed: YYYY-MM-DD\n"),
        ([RUN], ["--date", "23.11.2026"], "--date\n  got: 23.11.2026\n"),
        ([RUN], ["--slug", "../x"], "--slug\n  got: ../x\n"),
        ([STUDY, STUDY], [], f"sources\n  got: {STUDY}, {STUDY}\n  allowed: one study, or runs"),
        ([RUN, STUDY], [], "allowed: one study, or runs"),
        ([CONFIG], [], "sources\n  got: small.toml\n  allowed: folders of what was run\n"),
        (
            [CONFIG, CONFIG],
            ["--track", "fineweb-124m"],
            "sources\n  got: small.toml, small.toml\n  allowed: one of each name\n",
        ),
        ([CONFIG], ["--track", "fineweb-124m"], "model.n_layer of small\n"),
        ([RUN], ["--track", "fineweb-124m"], "nothing was run here"),
        (
            [str(ROOT / "configs/track3_124m.toml")],
            ["--track", "fineweb-124m", "--trials", "1"],
            "allowed: none, where nothing was run\n",
        ),
    ],
)
def test_what_is_no_record_is_refused(
    sources: list[str], more: list[str], said: str, book: Path, root: Path, capsys: pytest.CaptureFixture[str]
):
    assert add(*sources, more=more) == 2
    assert said in refusal(capsys)
    assert not book.exists()


@pytest.mark.parametrize(
    "rule",
    [{"test_level": None}, {"test_level": 0.4}, {"sigma_from": "given"}, {"sigma_from": None, "test_level": None}],
)
def test_a_study_of_another_rule_is_refused(rule: dict[str, Any], root: Path):
    """--threshold, --level, --sigma, and one seed, of which no σ is known."""
    results = json.loads((root / "runs/study/results.json").read_text())
    results["rule"] |= rule
    with pytest.raises(
        RecordError, match=r"(?s)rule of .*\n  got: .*\n  allowed: {'test_level': 0.01, 'sigma_from': 'runs'}\n  fix: "
    ):
        claims_of_study(root / "runs/study", results, Track("Products", 2.8, "steps", None))


@pytest.mark.parametrize(
    ("low", "high", "wanted"), [(3.1, 3.6, (3.1, 4)), (4.2, 4.6, (4, 4.6)), (None, None, (None, None))]
)
def test_an_interval_in_the_book_holds_the_steps_that_were_run(
    root: Path, low: float | None, high: float | None, wanted: tuple[Any, Any]
):
    """That of results.json is of the interpolated horizon, below the point of the grid."""
    results = json.loads((root / "runs/study/results.json").read_text())
    results["entries"][0]["to_target"] |= {"low": low, "high": high}
    claim = claims_of_study(root / "runs/study", results, Track("Products", 2.8, "steps", None))[0]
    assert (claim.figure, claim.low, claim.high) == (4, *wanted)


def test_a_study_whose_target_is_an_entrys_mean_is_judged_by_its_own_rule(root: Path):
    """Where that mean is the track's target to four digits: its threshold has the target's noise, and the entry that
    sets it neither passes nor fails.
    """
    results = json.loads((root / "runs/study/results.json").read_text())
    results |= {"target": 2.80004, "target_from": "adamw", "rule": {"threshold": 0.004 * 2**0.5, **RULE}}
    results["entries"][1]["horizons"][0]["passes"] = None
    track = Track("Products", 2.8, "steps", None)
    dualized, adamw = claims_of_study(root / "runs/study", results, track)
    assert (dualized.threshold, dualized.passes, adamw.passes) == (0.004 * 2**0.5, True, None)
    with pytest.raises(RecordError, match=r"got: 2.8001\n  allowed: 2.8\n"):
        claims_of_study(root / "runs/study", results | {"target": 2.8001}, track)


def test_runs_that_differ_are_not_one_entry(book: Path, root: Path, capsys: pytest.CaptureFixture[str]):
    assert add("runs/study/dualized.s4.seed0", "runs/study/adamw.s4.seed1") == 2
    assert "optim.name of adamw.s4.seed1\n  got: 'adamw'\n  allowed: 'dualized'" in refusal(capsys)
    assert add("runs/study/dualized.s4.seed0", "runs/study/dualized.s4.seed0") == 2
    assert "got: [0, 0]\n  allowed: each once" in refusal(capsys)
    assert not book.exists()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of its own, one commit of model.py and optim/norms.py."""
    root = tmp_path / "tree"
    (root / "optim").mkdir(parents=True)
    for name in ("model.py", "optim/norms.py"):
        (root / name).write_text("")
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    for args in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "first")):
        subprocess.run(["git", *args], cwd=root, check=True)
    monkeypatch.setattr(provenance, "ROOT", root)
    return root


def test_a_record_is_of_one_commit_and_the_present_code(tree: Path, tmp_path: Path):
    made = [Run(f"run{i}", Config(), 1, "", tmp_path / f"run{i}") for i in range(2)]
    for i in range(2):
        (tmp_path / f"run{i}").mkdir()
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True, check=True
    ).stdout.strip()

    def refused(*states: tuple[str | None, bool | None]) -> str:
        for i, (commit, dirty) in enumerate(states):
            (tmp_path / f"run{i}/summary.json").write_text(json.dumps({"commit": commit, "dirty": dirty}))
        found = made[: len(states)]
        try:
            assert provenance.check_clean(found, allow=False) == (states[0][0], False)
        except RecordError as error:
            assert provenance.check_clean(found, allow=True) == (min((c for c, _ in states), key=str), True)
            return str(error)
        return ""

    assert refused((head, False), (head, False)) == ""
    assert "got: runs of a tree with changes that are in no commit\n" in refused((head, False), (head, True))
    assert "got: runs of 2 commits\n" in refused((head, False), ("abc", False))
    assert "got: runs whose commit is not known: there was no git\n" in refused((None, None))
    assert f"got: commit {'1' * 40}, which this repository does not know\n" in refused(("1" * 40, False))
    (tree / "README.md").write_text("no code")
    assert refused((head, False)) == ""
    git = ("git", "-c", "user.name=A", "-c", "user.email=a@example.org")
    subprocess.run([*git, "add", "."], cwd=tree, check=True)
    subprocess.run([*git, "commit", "-q", "-m", "results, say"], cwd=tree, check=True)
    later = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True, check=True
    ).stdout.strip()
    for i, commit in enumerate((head, later)):
        (tmp_path / f"run{i}/summary.json").write_text(json.dumps({"commit": commit, "dirty": False}))
    assert provenance.check_clean(made, allow=False) == (min(head, later), False), "commits with one code"
    (tree / "optim/new.py").write_text("")
    assert f"got: code that has changed since commit {head}: optim/new.py\n" in refused((head, False))
    (tree / "model.py").write_text("x = 1\n")
    assert f"got: code that has changed since commit {head}: model.py, optim/new.py\n" in refused((head, False))


def test_code_that_is_in_no_commit_leaves_no_record(
    book: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    summary = runs.summary
    monkeypatch.setattr(runs, "summary", lambda path: (summary(path) or {}) | {"dirty": True, "commit": "abc"})
    assert add("runs/study", dirty=False) == 2
    assert "got: runs of a tree with changes that are in no commit" in refusal(capsys)
    assert not book.exists()


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"corpus": "another"}, "the data of corpora/small of a record of small"),
        ({"threads": 0.5}, "device of a record of small"),
        ({"target": 2.7}, "target of runs/study\n  got: 2.8\n  allowed: 2.7"),
        ({"fixed": "configs/tracks/pysource_cpu.toml"}, "model.n_layer of a record of small\n  got: 2\n  allowed: 4"),
    ],
)
def test_runs_of_another_track_are_refused(
    change: dict[str, Any],
    got: str,
    book: Path,
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(adding.TRACKS, "small", replace(adding.TRACKS["small"], **change))
    assert add("runs/study") == 2
    assert got in refusal(capsys)
    assert not book.exists()


def test_a_record_is_made_once_and_small(
    book: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert add("runs/study") == 0
    assert add("runs/study") == 2
    assert "got: a record of that name" in refusal(capsys)
    monkeypatch.setattr(adding, "LIMIT", 1000)
    assert add("runs/study", slug="large") == 2
    assert "allowed: 1,000" in refusal(capsys)


def test_the_optimization_track_takes_a_configuration_and_its_script(book: Path, root: Path):
    assert add(str(ROOT / "configs/track3_124m.toml"), track="fineweb-124m") == 0
    folder = book / "fineweb-124m/2026-01-02_first"
    assert {p.name for p in folder.iterdir()} == {"record.json", "track3_124m.toml", "track3_124m.py"}
    assert "data/fineweb10B" in (folder / "track3_124m.py").read_text()
    assert read(folder)["figure"] is None and read(folder)["hardware"] is None


# ---- tables


def test_tables_have_an_entry_a_row_the_best_first(book: Path, root: Path):
    assert add("runs/study") == 0
    text = tables(relative_to=book)
    assert "| steps to the target | end loss | training s, wall s | entry |" in text
    rows = [line for line in text.splitlines() if "2026-01-02" in line]
    where = "small/2026-01-02_first"
    assert rows[0].startswith("| 4 [?, 4] | ") and f"[dualized]({where}/dualized.txt) | 8 |" in rows[0]
    by = rows[0].replace(" (not from a commit)", "")  # said where this tree has changes
    assert by.endswith(f"[A title]({where}/), A. Nonymous |") and "✓ |" in rows[0]
    assert rows[1].startswith("| not reached | ") and "✓" not in rows[1]
    assert "**timed** (Products; target 2.8)\n\nNo record yet." in text


@pytest.fixture
def readme(book: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """README.md beside the book."""
    monkeypatch.setattr(listing, "ROOT", tmp_path)
    book.mkdir()
    return tmp_path / "README.md"


def test_tables_are_written_between_the_marks_and_once(readme: Path):
    readme.write_text(f"before\n{listing.BEGIN}\nold\n{listing.END}\nafter\n")
    assert main(["tables", "--check-only"]) == 1
    assert main(["tables"]) == 0
    assert main(["tables", "--check-only"]) == 0
    text = readme.read_text()
    assert (
        text.startswith(f"before\n{listing.BEGIN}\n**small**")
        and text.endswith(f"{listing.END}\nafter\n")
        and "old" not in text
    )
    readme.write_text(text.replace("No record yet.", "Many records."))
    assert write_tables(check_only=True) == ["README.md"], "a stale file with marks is told"


def test_a_readme_without_marks_is_left_alone_and_the_book_has_the_tables(readme: Path, book: Path):
    readme.write_text("before\n")
    assert write_tables(check_only=True) == ["records/README.md"]
    assert write_tables(check_only=False) == ["records/README.md"]
    assert write_tables(check_only=True) == [] and readme.read_text() == "before\n"
    assert "**small** (Products; target 2.8)\n\nNo record yet." in (book / "README.md").read_text()
    (book / "README.md").write_text("old")
    assert main(["tables", "--check-only"]) == 1


@pytest.mark.parametrize("marks", ["{0}", "{1}", "{1}{0}", "{0}{0}{1}", "{0}{1}{1}"])
def test_marks_that_enclose_no_place_or_two_are_refused(marks: str, readme: Path, capsys: pytest.CaptureFixture[str]):
    readme.write_text(f"before\n{marks.format(listing.BEGIN, listing.END)}\n")
    assert main(["tables"]) == 2
    assert "README.md\n  got: no place for the tables\n  allowed: " in refusal(capsys)


def test_the_committed_tables_are_those_of_the_book():
    assert write_tables(check_only=True) == []


def test_every_record_of_the_book_is_whole():
    for folder, record in shelf.records():
        assert record["track"] == folder.parent.name and folder.name.startswith(record["date"])
        for e in record["entries"]:
            assert (folder / e["config"]).is_file() and (folder / e["log"]).is_file()
        check = f"python -m studies.record_book check {folder.relative_to(ROOT).as_posix()}"
        assert record["commands"]["check"] == (None if record["corpus_sha256"] is None else check)
        assert sum(p.stat().st_size for p in folder.iterdir()) <= adding.LIMIT


def test_the_fixed_architecture_of_pysource_is_the_optimization_track_s():
    """But for its size, and for attention's scale, which is 0.12 of a head's width."""
    keys, big = (
        TRACKS["pysource-cpu"].required_values(),
        configuration.flat(configuration.load([str(ROOT / "configs/track3_124m.toml")])),
    )
    sizes = {"model.n_layer", "model.n_head", "model.n_embd", "model.block_size", "model.attention_scale"}
    assert {k: v for k, v in keys.items() if k.startswith("model.") and k not in sizes} == {
        k: v for k, v in big.items() if k in keys and k.startswith("model.") and k not in sizes
    }
    assert keys["model.attention_scale"] == pytest.approx(0.12 * keys["model.n_embd"] / keys["model.n_head"])
    assert keys["train.batch_size"] * keys["model.block_size"] == 4096
    assert isinstance(configuration.load([str(ROOT / "configs/tracks/pysource_cpu.toml")]), Config)


# ---- checking


def test_a_record_is_reproduced_exactly_here(
    book: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """With the code of now: a run that is there already counts if it is of the present commit, and that without
    changes.
    """
    assert add("runs/study") == 0
    folder = book / "small/2026-01-02_first"
    argv = ["check", str(folder), "--entry", "dualized", "--seeds", "1"]
    monkeypatch.setattr(checking, "git_state", lambda: ("abcdefgh9", False))
    out = root / "runs/check-2026-01-02_first-abcdefgh"
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"seed by seed at most \S+ apart, allowed 1e-06 on the same machine and versions; .* \(not judged\): PASS", said
    )
    assert not list(out.glob("*.jsonl")), "a check is no study"
    file = out / "dualized.seed0/summary.json"
    made = json.loads(file.read_text())
    file.write_text(json.dumps(made | {"commit": "abcdefgh9", "dirty": False}))
    record = read(folder)
    record["entries"][0]["losses"][0] += 1e-3
    (folder / "record.json").write_text(json.dumps(record))
    assert main(argv) == 1
    assert "FAIL" in capsys.readouterr().out
    for now in (("another", False), ("abcdefgh9", True), (None, None)):
        monkeypatch.setattr(checking, "git_state", lambda now=now: now)
        assert main([*argv, "--out", str(out)]) == 2
        assert "dualized.seed0\n  got: a run that is there already, of code that is not known to be this\n" in refusal(
            capsys
        )
    file.unlink()
    (file.parent / "failed.json").write_text('{"why": "the loss is nan"}')
    assert main([*argv, "--out", str(out)]) == 1 and file.is_file(), "one that diverged is trained again"
    shutil.rmtree(out)


def test_a_check_that_cannot_be_is_refused(book: Path, root: Path, capsys: pytest.CaptureFixture[str]):
    assert add("runs/study") == 0
    for options, said in (
        (["--entry", "sgd"], "--entry\n  got: sgd\n  allowed: dualized, adamw\n"),
        (["--seeds", "0"], "--seeds\n  got: 0\n  allowed: 1 or more\n"),
        (["--seeds", "-1"], "--seeds\n  got: -1\n"),
        (["--workers", "0"], "--workers\n  got: 0\n  allowed: 1 or more\n"),
        (["--workers", "-1"], "--workers\n  got: -1\n"),
    ):
        assert main(["check", str(book / "small/2026-01-02_first"), *options]) == 2
        assert said in refusal(capsys), options


def test_other_data_and_other_folders_are_refused(book: Path, root: Path, capsys: pytest.CaptureFixture[str]):
    assert add("runs/study") == 0
    folder = book / "small/2026-01-02_first"
    assert main(["check", "records/small/nothing"]) == 2
    assert "records/small/nothing\n  got: no record.json in it\n  allowed: records/small/2026-01-02_first\n" in refusal(
        capsys
    )
    (folder / "record.json").write_text(json.dumps(read(folder) | {"corpus_sha256": "another"}))
    assert main(["check", str(folder)]) == 2
    assert "the data of corpora/small" in refusal(capsys)


@pytest.mark.soak
def test_between_machines_means_are_compared_at_the_nominal_level():
    """3,000 records (10,000 in `make soak`) of 4 seeds and checks of 4, the same mean: one in a hundred fails, within 4
    binomial deviations; a shift of 5 σ is found.
    """
    rng, n, fails = np.random.default_rng(0), 10_000 if SOAK else 3_000, 0
    for losses in rng.normal(size=(n, 8)):
        fine, _ = compare(told(losses[:4]), found(losses[4:]), same=False)
        fails += not fine
    assert abs(fails / n - DOUBT) < 4 * (DOUBT * (1 - DOUBT) / n) ** 0.5
    losses = rng.normal(size=8)
    assert not compare(told(losses[:4]), found(losses[4:] + 5), same=False)[0]
    assert compare(told(losses[:4]), found(losses[:4]), same=True)[0]
    for same in (True, False):
        fine, text = compare(told(losses[:4]), [*found(losses[:3]), None], same=same)
        assert not fine and text.startswith("1 of 4 runs diverged here, none of 4 recorded; ")
    assert "tells no deviation" in compare(told(losses[:1]), found(losses[:1]), same=False)[1]


def told(losses: np.ndarray) -> dict[str, Any]:
    return {"losses": losses.tolist(), "n": len(losses), "mean": float(losses.mean()), "train_seconds": 1.0}


def found(losses: np.ndarray) -> list[dict[str, Any] | None]:
    return [{"val_loss": float(x), "train_seconds": 1.0} for x in losses]


def test_a_track_s_errors_have_got_allowed_and_fix(root: Path):
    config = configuration.load([str(root / "small.toml"), "--data.dataset", str(root / "corpora/small")])
    with pytest.raises(RecordError, match=r"(?s)got: .*\n  allowed: .*\n  fix: "):
        TRACKS["shakespeare-cpu"].check("shakespeare-cpu", config, {"device": "cpu, 1 threads", "world_size": 1})
