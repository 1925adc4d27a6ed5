"""training/run_folder.py: one run a folder, and a folder that a dead run gives back."""

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest
from training import run_folder
from training.errors import RunError
from training.run_folder import RunFolder


def test_two_starts_do_not_share_a_folder(tmp_path: Path):
    first, second = (RunFolder(tmp_path / "runs/a", resume=False) for _ in range(2))
    first.create()
    with pytest.raises(RunError, match=r"run folder .*runs/a exists\n  got: a run that started a moment ago"):
        second.create()


def test_a_half_written_last_line_of_metrics_is_dropped(tmp_path: Path):
    folder = RunFolder(tmp_path / "a", resume=False)
    folder.create()
    for step in (1, 2, 3):
        folder.log_metrics({"step": step})
    with (tmp_path / "a/metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "lo')
    folder.keep_metrics(lambda r: r["step"] <= 2)
    assert folder.metrics() == [{"step": 1}, {"step": 2}]


def begun(path: Path) -> RunFolder:
    folder = RunFolder(path, resume=False)
    folder.create()
    folder.write("config.toml", "")
    folder.say("step 1")
    return folder


def test_a_run_that_crashed_before_its_first_checkpoint_gives_its_name_back(tmp_path: Path):
    begun(tmp_path / "a").close()
    again = begun(tmp_path / "a")
    assert again.crashed == tmp_path / "a.crashed"
    again.close()
    assert begun(tmp_path / "a").crashed == tmp_path / "a.crashed2"
    assert (tmp_path / "a.crashed/log.txt").read_text() == "step 1\n", "nothing is lost"


@pytest.mark.parametrize("kept", ["checkpoints/step_00000003", "summary.json", "failed.json"])
def test_a_run_that_has_saved_something_keeps_its_name(tmp_path: Path, kept: str):
    begun(tmp_path / "a").close()
    (tmp_path / "a" / kept).mkdir()
    with pytest.raises(RunError, match=r"run folder .*a exists\n  got: a run of this name"):
        RunFolder(tmp_path / "a", resume=False)


def test_a_run_that_lives_keeps_its_name_and_nobody_resumes_it(tmp_path: Path):
    living = begun(tmp_path / "a")
    with pytest.raises(RunError, match=r"run folder .*a exists"):
        RunFolder(tmp_path / "a", resume=False)
    with pytest.raises(RunError, match=r"got: another process that runs it now"):
        RunFolder(tmp_path / "a", resume=True).lock()
    living.close()
    with RunFolder(tmp_path / "a", resume=True) as folder:
        folder.lock()


def test_a_resumed_run_waits_for_a_process_that_is_just_ending(tmp_path: Path):
    living = begun(tmp_path / "a")
    threading.Timer(0.3, living.close).start()
    with RunFolder(tmp_path / "a", resume=True) as folder:
        folder.lock()


def test_of_two_starts_one_moves_the_crashed_run_and_the_other_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second start comes between the first one's look at the crashed run and its move."""
    begun(tmp_path / "a").close()
    first, second = (RunFolder(tmp_path / "a", resume=False) for _ in range(2))

    def slow(path: Path) -> Path:
        with pytest.raises(RunError, match="exists"):
            second.create()
        return path

    monkeypatch.setattr(run_folder, "free_name", slow)
    first.create()
    assert first.crashed == tmp_path / "a.crashed"
    with pytest.raises(RunError, match="exists"):
        second.create()


@pytest.mark.parametrize("machine", [None, "another"])
def test_a_run_of_another_machine_or_without_a_lock_keeps_its_name(tmp_path: Path, machine: str | None):
    """It may live: its lock says nothing here. It is resumed as ever."""
    begun(tmp_path / "a").close()
    lock = tmp_path / "a/.lock"
    lock.write_text(machine) if machine else lock.unlink()
    with pytest.raises(RunError, match="exists"):
        RunFolder(tmp_path / "a", resume=False)
    with RunFolder(tmp_path / "a", resume=True) as folder:
        folder.lock()


def test_a_killed_process_gives_its_lock_back(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def run() -> None:
        begun(tmp_path / "a")
        ready.set()
        signal.pause()

    process = context.Process(target=run)
    process.start()
    assert ready.wait(20)
    with pytest.raises(RunError, match="exists"):
        RunFolder(tmp_path / "a", resume=False)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert begun(tmp_path / "a").crashed == tmp_path / "a.crashed"


def test_a_folder_of_something_else_is_never_moved(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/log.txt").write_text("mine")
    with pytest.raises(RunError, match="exists"):
        RunFolder(tmp_path / "a", resume=False)
