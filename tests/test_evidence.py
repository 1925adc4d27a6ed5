"""studies/evidence.py: a study's lines, by which it goes on without its run folders."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from studies import jobs as wanted_jobs
from studies import runs
from studies.evidence import Evidence, _digest, file_of, is_restored
from studies.jobs import Job, StudyError
from training import config as configuration
from training import provenance
from training.config import Config

from tests.helpers import ROOT, small_dataset

QUICK = {
    **runs.QUIET,
    "train.steps": 3,
    "train.eval_tokens": 64,
    "train.eval_every": 2,
    "train.log_every": 1,
}
WILD = {"optim.name": "sgd", "optim.lr": 1e30, "train.max_nonfinite": 1, "train.steps": 6}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("evidence with spaces")
    file = small_dataset(root)
    return configuration.load([str(file), "--data.dataset", str(root / "corpora/small")])


def job(base: Config, folder: Path, name: str, **changes: Any) -> Job:
    return runs.job(base, name, folder, **{**QUICK, "run.seed": ord(name[0]), **changes})


def call(jobs: list[Job], folder: Path, **options: Any) -> list[str]:
    said: list[str] = []
    runs.execute(jobs, folder, workers=runs.places(2), costs=[1.0] * len(jobs), say=said.append, **options)
    return said


@pytest.fixture(scope="module")
def ended(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of a and b, which ended, and d, which diverged."""
    folder = tmp_path_factory.mktemp("ended") / "runs/study"
    call([job(base, folder, "a"), job(base, folder, "b"), job(base, folder, "d", **WILD)], folder)
    return folder


@pytest.fixture
def folder(ended: Path, tmp_path: Path) -> Path:
    """A copy of that study's folder, of the same name."""
    return Path(shutil.copytree(ended, tmp_path / "runs/study"))


def lines(folder: Path) -> dict[str, dict[str, Any]]:
    return {line["run"]: line for line in map(json.loads, (folder / "runs.jsonl").read_text().splitlines())}


def lose(folder: Path, *names: str) -> None:
    for name in names:
        shutil.rmtree(folder / name)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "a") -> None:
    """Change one line, with the hash that belongs to it."""
    changed = lines(folder)
    change(changed[name])
    changed[name]["sha256"] = _digest(changed[name]["settings"])
    (folder / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed.values()))


# ---- lines


def test_each_run_that_ends_has_one_line_with_its_result_and_its_settings(ended: Path, base: Config):
    assert file_of(ended) == ended / "runs.jsonl"
    by_run = lines(ended)
    assert by_run.keys() == {"a", "b", "d"} and (ended / "runs.jsonl").read_text().count("\n") == 3
    for name in "ab":
        line, summary = by_run[name], runs.summary(ended / name) or {}
        assert line["summary"] == summary and summary["val_loss"] and summary["hardware"]
        assert line["settings"]["run.seed"] == ord(name) and "run.dir" not in line["settings"]
        assert [r["step"] for r in line["records"]] == [0, 2, 3], "evaluations alone"
        assert line["filled_in"]["model.vocab_size"] == 18
    assert by_run["d"]["failed"]["why"] == json.loads((ended / "d/failed.json").read_text())["why"]
    assert by_run["d"]["failed"]["hardware"] == by_run["a"]["summary"]["hardware"]
    assert by_run["a"]["sha256"] != by_run["b"]["sha256"], "seeds differ"
    assert str(Path(base.data.dataset).parent) not in (ended / "runs.jsonl").read_text(), "no path of this machine"


def test_the_hash_is_that_of_the_numbers_whatever_the_names_and_places(base: Config, tmp_path: Path, ended: Path):
    call([job(base, tmp_path, "x", **{"run.seed": ord("a"), "train.log_every": 2})], tmp_path)
    assert lines(tmp_path)["x"]["sha256"] == lines(ended)["a"]["sha256"]


def test_a_run_that_has_no_line_gets_it_at_the_next_call(base: Config, folder: Path):
    """As a kill between a run's end and its line leaves it, or an earlier version of this program."""
    before = (folder / "runs.jsonl").read_bytes()
    kept = [line for line in before.splitlines(keepends=True) if b'"run":"b"' not in line]
    (folder / "runs.jsonl").write_bytes(b"".join(kept))
    jobs = [job(base, folder, name) for name in "ab"]
    assert call(jobs, folder) == ["2 of 2 runs are there already"]
    after = (folder / "runs.jsonl").read_bytes()
    assert sorted(after.splitlines()) == sorted(before.splitlines()), "to the last byte, its date too"
    assert call(jobs, folder) and (folder / "runs.jsonl").read_bytes() == after, "each once"
    (folder / "runs.jsonl").unlink()
    call(jobs, folder)
    assert lines(folder).keys() == {"a", "b"}


def test_half_a_last_line_is_dropped_and_the_next_is_whole(base: Config, folder: Path):
    file = folder / "runs.jsonl"
    rewrite(folder, lambda line: None)
    file.write_bytes(file.read_bytes()[:-40])
    half = [line["run"] for line in map(json.loads, file.read_text().splitlines()[:-1])]
    cut = ({"a", "b", "d"} - {*half}).pop()
    changes = WILD if cut == "d" else {}
    said = call([job(base, folder, cut, **changes)], folder)
    assert said == [
        f"note: the last line of {file} was cut by a kill, and is dropped",
        "1 of 1 runs are there already",
    ]
    assert lines(folder).keys() == {"a", "b", "d"}


def test_a_whole_last_line_without_its_newline_counts(base: Config, folder: Path):
    file = folder / "runs.jsonl"
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    jobs = [job(base, folder, "a"), job(base, folder, "b"), job(base, folder, "d", **WILD)]
    lose(folder, "a", "b", "d")
    assert call([*jobs, job(base, folder, "c")], folder)[-1] == "3 of 4 runs are there already"
    assert lines(folder).keys() == {"a", "b", "c", "d"}


@pytest.mark.parametrize("broken", ["<<<<<<< HEAD", '{"run": "a"}', '"text"', "a changed setting"])
def test_a_line_that_no_study_wrote_is_refused(base: Config, folder: Path, broken: str):
    file = folder / "runs.jsonl"
    first = json.loads(file.read_text().splitlines()[0])
    if broken == "a changed setting":
        first["settings"]["optim.beta"] = 0.5
        broken = json.dumps(first)
    file.write_text("\n" + broken + "\n" + file.read_text())
    with pytest.raises(StudyError) as error:
        call([job(base, folder, "a")], folder)
    assert str(error.value).startswith(f"{file}, line 2\n  got: {broken[:40]}…\n  allowed: a line as a study wrote it")


# ---- restoring


def test_a_run_folder_is_restored_from_its_line_and_not_trained(base: Config, ended: Path, folder: Path):
    jobs = [job(base, folder, "a"), job(base, folder, "b"), job(base, folder, "d", **WILD)]
    lose(folder, "a", "d")
    shutil.rmtree(folder / "configs")
    assert call(jobs, folder) == [
        f"2 runs restored from {folder / 'runs.jsonl'}; without its line a run is trained",
        "3 of 3 runs are there already",
    ]
    assert not any((folder / "configs").iterdir()), "nothing was trained"
    assert is_restored(folder / "a") and is_restored(folder / "d") and not is_restored(folder / "b")
    for name, file in (("a", "summary.json"), ("d", "failed.json")):
        assert json.loads((folder / name / file).read_text()) == json.loads((ended / name / file).read_text())
        trained, restored = (
            configuration.flat(configuration.of_file(f / name / "config.toml")) for f in (ended, folder)
        )
        assert restored | {"run.dir": trained["run.dir"]} == trained
    evaluations = [r for r in runs.metrics(ended / "a") if "val_loss" in r]
    assert runs.metrics(folder / "a") == evaluations
    assert "restored from " in (folder / "a/log.txt").read_text()
    before = (folder / "runs.jsonl").read_bytes()
    assert call(jobs, folder) == ["3 of 3 runs are there already"]
    assert (folder / "runs.jsonl").read_bytes() == before


def test_a_half_made_folder_gives_way_to_the_line(base: Config, folder: Path):
    (folder / "a/summary.json").unlink()
    (folder / "a/rubbish").write_text("")
    (folder / ".restoring").mkdir()
    call([job(base, folder, "a")], folder)
    assert is_restored(folder / "a") and runs.summary(folder / "a") == lines(folder)["a"]["summary"]
    assert not (folder / "a/rubbish").exists() and not (folder / ".restoring").exists()


def test_a_line_of_another_configuration_is_refused(base: Config, folder: Path):
    lose(folder, "a")
    before = (folder / "runs.jsonl").read_bytes()
    for key, value, was in (("optim.lr", 2.0, "3.0"), ("run.precision", "bf16", "'fp32'"), ("run.threads", 2, "1")):
        other = job(base, folder, "a", **{key: value})
        for refused in (
            lambda other=other: call([other], folder),
            lambda other=other: runs.sweep([other], folder, workers=runs.places(1), dry_run=True),
        ):
            with pytest.raises(StudyError) as error:
                refused()
            assert str(error.value) == (
                f"{folder / 'runs.jsonl'}, the line of a\n  got: {key} = {value!r}\n  allowed: {was},"
                " as that run had it\n  fix: another --name, or delete the line"
            )
    assert not (folder / "a").exists() and (folder / "runs.jsonl").read_bytes() == before
    for key, value in (("run.precision", "auto"), ("optim.polar.dtype", "auto"), ("train.log_every", 2)):
        assert Evidence(folder).line_of(job(base, folder, "a", **{key: value})), "the numbers are the same"


def test_a_run_folder_of_another_configuration_than_its_line_is_refused(base: Config, folder: Path):
    lose(folder, "a")
    other = job(base, folder, "a", **{"optim.lr": 2.0})
    call([other], folder, portable=False)
    with pytest.raises(StudyError, match="the line of a\n  got: optim.lr = 2.0\n"):
        call([other], folder)


def test_a_line_of_another_plugin_is_refused(base: Config, folder: Path, monkeypatch: pytest.MonkeyPatch):
    lose(folder, "a")
    rewrite(folder, lambda line: line["summary"].update(plugins={"parts": "1"}))
    for digest in "12":
        monkeypatch.setattr(wanted_jobs.plugins, "digests", lambda names, digest=digest: {"parts": digest})
        if digest == "1":
            assert Evidence(folder).line_of(job(base, folder, "a"))
            continue
        with pytest.raises(StudyError, match="the line of a\n  got: another file of the plugin parts\n"):
            call([job(base, folder, "a")], folder)


def test_a_corpus_is_known_by_its_hash_and_not_by_its_folder(base: Config, folder: Path, tmp_path: Path):
    lose(folder, "a", "b")
    elsewhere = shutil.copytree(base.data.dataset, tmp_path / "elsewhere")
    call([job(base, folder, "a", **{"data.dataset": str(elsewhere)})], folder)
    assert is_restored(folder / "a")
    assert configuration.of_file(folder / "a/config.toml").data.dataset == str(elsewhere)
    meta = json.loads((elsewhere / "meta.json").read_text())
    meta["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (elsewhere / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(StudyError, match="the line of b\n  got: data.dataset = '"):
        call([job(base, folder, "b", **{"data.dataset": str(elsewhere)})], folder)


def test_a_line_of_before_a_setting_was_added_or_renamed_counts(base: Config, folder: Path):
    lose(folder, "a")

    def as_before(line: dict[str, Any]) -> None:
        settings = line["settings"]
        del settings["optim.cautious"]
        settings["optim.cooldown"] = settings.pop("schedule.cooldown")

    rewrite(folder, as_before)
    call([job(base, folder, "a")], folder)
    assert is_restored(folder / "a")


# ---- two machines


def test_files_of_two_machines_are_merged_by_putting_one_behind_the_other(base: Config, folder: Path):
    """A run that both have counts once, the first, with a note if no machine explains the difference."""
    file = folder / "runs.jsonl"
    mine = lines(folder)["a"]
    theirs = {**mine, "summary": mine["summary"] | {"hardware": "another", "val_loss": mine["summary"]["val_loss"]}}
    for apart, said in ((0.005, False), (0.5, True)):
        theirs["summary"]["val_loss"] = mine["summary"]["val_loss"] + apart
        file.write_text(json.dumps(mine) + "\n\n" + json.dumps(theirs) + "\n")
        lose(folder, "a")
        notes = [x for x in call([job(base, folder, "a")], folder) if x.startswith("note: ")]
        assert runs.final_loss(folder / "a") == mine["summary"]["val_loss"]
        losses = f"{mine['summary']['val_loss']:.4f} and {theirs['summary']['val_loss']:.4f}"
        note = f"note: a ended at {losses} by two lines of {file}; the first counts, or its run folder"
        assert notes == [note] * said


def test_a_run_folder_of_this_machine_has_its_own_line_beside_another_machines(base: Config, folder: Path):
    rewrite(folder, lambda line: line["summary"].update(hardware="another"))
    call([job(base, folder, "a")], folder)
    machines = [
        line["summary"]["hardware"]
        for line in map(json.loads, (folder / "runs.jsonl").read_text().splitlines())
        if line["run"] == "a"
    ]
    assert machines == ["another", (runs.summary(folder / "a") or {})["hardware"]]


def test_git_merges_files_of_two_branches_by_their_lines(tmp_path: Path):
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    file = tmp_path / "studies/results/x.jsonl"
    file.parent.mkdir(parents=True)

    def git(*args: str) -> None:
        who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True)

    def commit(text: str) -> None:
        file.write_text(text)
        git("add", ".")
        git("commit", "-q", "-m", "lines")

    git("init", "-q", "-b", "main")
    commit("0\n")
    git("checkout", "-q", "-b", "other")
    commit("0\n1\n")
    git("checkout", "-q", "main")
    commit("0\n2\n")
    git("merge", "-q", "other")
    assert sorted(file.read_text().splitlines()) == ["0", "1", "2"]


# ---- where


def test_only_studies_of_the_checkouts_runs_write_into_the_checkout(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert file_of(ROOT / "runs/x").resolve() == ROOT / "studies/results/x.jsonl"
    monkeypatch.chdir(tmp_path)
    assert file_of(ROOT / "runs/x") == ROOT / "studies/results/x.jsonl"
    folder = Path("runs/study-of-a-test")
    call([job(base, folder, "a")], folder)
    assert lines(tmp_path / folder).keys() == {"a"}
    assert not (ROOT / "studies/results/study-of-a-test.jsonl").exists()
    monkeypatch.chdir(ROOT)
    assert file_of(Path("runs/x")) == Path("studies/results/x.jsonl"), "as a message has it"


def test_runs_that_this_machine_has_to_make_leave_no_line_and_are_not_restored(base: Config, folder: Path):
    before = (folder / "runs.jsonl").read_bytes()
    lose(folder, "a")
    call([job(base, folder, "a"), job(base, folder, "c")], folder, portable=False)
    assert not is_restored(folder / "a") and (folder / "runs.jsonl").read_bytes() == before


def test_a_dry_run_counts_the_runs_that_the_file_has(base: Config, folder: Path, capsys: pytest.CaptureFixture[str]):
    lose(folder, "a", "d")
    jobs = [job(base, folder, "a"), job(base, folder, "b"), job(base, folder, "c"), job(base, folder, "d", **WILD)]
    before = (folder / "runs.jsonl").read_bytes()
    (folder / "runs.jsonl").write_bytes(before + b'{"half')
    assert not runs.sweep(jobs, folder, workers=runs.places(1), dry_run=True)
    file = folder / "runs.jsonl"
    assert f"{folder}: 4 runs, 3 of them done (2 by {file}); " in capsys.readouterr().out
    assert not (folder / "a").exists() and file.read_bytes() == before + b'{"half', "it writes nothing"


def test_lines_of_results_are_no_changes_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A study's second run would else be of a tree with changes: its first has a line."""
    results = tmp_path / "studies/results"
    for new in (results, tmp_path / "training"):
        new.mkdir(parents=True)
    (tmp_path / "training/provenance.py").write_text("")
    (results / "old.jsonl").write_text("")
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    for args in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "first")):
        subprocess.run(["git", *args], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "training/provenance.py"))
    assert provenance.git_state()[1] is False
    (results / "old.jsonl").write_text("a line\n")
    (results / "new.jsonl").write_text("a line\n")
    assert provenance.git_state()[1] is False
    (tmp_path / "new.py").write_text("")
    assert provenance.git_state()[1] is True
