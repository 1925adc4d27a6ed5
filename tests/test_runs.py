"""studies/runs.py: trainings in real processes, none of them twice."""

import importlib.util
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from data.loader import Dataset
from model import GPT
from studies import processes, run_cost, runs
from studies.run_cost import cost, duration
from studies.runs import Job, StudyError, done, execute, job, metrics, summary
from training import config as configuration
from training.config import Config

from tests.helpers import _context, server_key, share_server, small_dataset

QUICK = {
    "train.steps": 3,
    "train.keep_checkpoints": 0,
    "train.sample_tokens": 0,
    "train.eval_tokens": 64,
    "train.log_every": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("studies with spaces")
    file = small_dataset(root)
    return configuration.load([str(file), "--data.dataset", str(root / "corpora/small")])


def jobs_of(base: Config, folder: Path, names: str, **changes) -> list[Job]:
    return [job(base, name, folder, **{**QUICK, "run.seed": i, **changes}) for i, name in enumerate(names)]


def study(jobs: list[Job], folder: Path, workers: int = 2) -> list[str]:
    said: list[str] = []
    execute(jobs, folder, workers=runs.places(workers), costs=[1.0] * len(jobs), say=said.append)
    return said


def killed_later(jobs: list[Job], folder: Path, key: object, shares: bool) -> None:
    """In a process of its own, and without `shares` with a server of its own that forks its runs, as a user's."""
    if shares:
        share_server(key)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    study(jobs, folder)


def written(folder: Path) -> dict[str, int]:
    """When each result was."""
    return {
        p.parent.name: p.stat().st_mtime_ns
        for name in ("summary.json", "failed.json")
        for p in folder.glob(f"*/{name}")
    }


def until(condition: Callable[[], object], deadline: float = 60) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "the deadline passed"
        time.sleep(0.01)


def test_runs_are_done_once_and_new_ones_are_added(base: Config, tmp_path: Path):
    jobs = jobs_of(base, tmp_path, "abc")
    assert study(jobs[:2], tmp_path) == []
    first = written(tmp_path)
    assert first.keys() == {"a", "b"}
    found = [summary(tmp_path / j.name) for j in jobs]
    assert found[0] and found[1] and not found[2] and found[0]["val_loss"] != found[1]["val_loss"], "seeds differ"
    assert [r["step"] for r in metrics(tmp_path / "a") if "loss" in r] == [1, 2, 3]
    assert study(jobs, tmp_path) == ["2 of 3 runs are there already"]
    assert (again := written(tmp_path)).keys() == {"a", "b", "c"} and first.items() <= again.items()
    assert study(jobs, tmp_path) == ["3 of 3 runs are there already"] and written(tmp_path) == again


def test_a_run_is_what_train_gpt_makes_of_its_configuration(base: Config, tmp_path: Path):
    """The same numbers one at a time and two at a time."""
    study(jobs_of(base, tmp_path / "two", "ab"), tmp_path / "two")
    study(jobs_of(base, tmp_path / "one", "ab"), tmp_path / "one", workers=1)
    for name in "ab":
        one, two = (
            [(r["step"], r["loss"]) for r in metrics(tmp_path / n / name) if "loss" in r] for n in ("one", "two")
        )
        assert one == two


def test_another_configuration_under_a_name_is_refused(base: Config, tmp_path: Path):
    (one,) = jobs_of(base, tmp_path, "a")
    assert not done(one, tmp_path)
    study([one], tmp_path)
    assert done(one, tmp_path)
    there = written(tmp_path)
    for key, value, was in (
        ("optim.lr", 2.0, "3.0"),
        ("run.seed", 7, "0"),
        ("run.precision", "bf16", "'fp32'"),
        ("model.vocab_size", 32, "18"),
        ("optim.max_grad_norm", 1.0, "None"),
        ("run.threads", 2, "1"),
        ("optim.polar.dtype", "bfloat16", "'float32'"),
    ):
        (other,) = jobs_of(base, tmp_path, "a", **{key: value})
        with pytest.raises(StudyError) as error:
            study([other], tmp_path)
        assert str(error.value) == (
            f"{tmp_path / 'a'}\n  got: {key} = {value!r}\n  allowed: {was}, as the run that is there had it\n  fix: another --name, or delete {tmp_path / 'a'}"
        )
    for key, value in (
        ("run.timeout", 5.0),
        ("run.precision", "auto"),
        ("optim.polar.dtype", "auto"),
        ("data.verify", not base.data.verify),
        ("train.log_every", 2),
        ("model.vocab_size", 18),
    ):
        assert done(jobs_of(base, tmp_path, "a", **{key: value})[0], tmp_path), "the numbers are the same"
    assert written(tmp_path) == there


def test_a_run_that_diverges_is_a_result_and_not_done_again(base: Config, tmp_path: Path):
    wild = {"optim.name": "sgd", "optim.lr": 1e30, "train.max_nonfinite": 1, "train.steps": 6}
    jobs = [*jobs_of(base, tmp_path, "d", **wild), *jobs_of(base, tmp_path, "a")]
    study(jobs, tmp_path)
    assert json.loads((tmp_path / "d/failed.json").read_text())["why"].endswith(
        "the loss is not finite; the step was not taken"
    )
    assert summary(tmp_path / "d") is None and summary(tmp_path / "a")
    there = written(tmp_path)
    assert there.keys() == {"a", "d"}
    assert study(jobs, tmp_path) == ["2 of 2 runs are there already"] and written(tmp_path) == there


@pytest.mark.parametrize(
    "last",
    [
        "error: step 5: the gradient of x is not finite; the step was not taken",
        "error: the validation loss after step 3 is nan",
    ],
)
def test_last_words_of_a_divergence_are_known(last: str):
    code, words = runs.NOT_FINITE
    assert code == 1 and words.search(f"step 3 was left out\n{last}\n")
    assert not words.search("Traceback\n    optimizer.check_finite()\nKeyError: 'finite'\n"), (
        "the name of a function is none"
    )


def test_another_failure_ends_the_study_with_what_the_run_said(base: Config, tmp_path: Path):
    """No text there: train_gpt.py refuses.

    What was under way is finished, nothing is begun after it, and the next call does the rest.
    """
    bad = jobs_of(base, tmp_path, "x", **{"data.dataset": str(tmp_path / "nowhere")})
    jobs = [*jobs_of(base, tmp_path, "a"), *bad, *jobs_of(base, tmp_path, "bcd")]
    with pytest.raises(StudyError) as error:
        study(jobs, tmp_path)
    text = str(error.value)
    assert (
        text.startswith("a run of the study failed\n  got: x: exit code 2\n")
        and "nowhere" in text
        and "error: " in text
    )
    assert "allowed: runs that end\n  fix: see above, and call the study again: what is done stays" in text
    there = written(tmp_path)
    assert "a" in there and "d" not in there and "x" not in there
    study([j for j in jobs if j.name != "x"], tmp_path)
    assert there.items() <= written(tmp_path).items() and written(tmp_path).keys() == set("abcd")


def test_a_study_killed_in_the_middle_goes_on_and_leaves_no_process_behind(base: Config, tmp_path: Path):
    """kill −9: what was under way ends too, and is begun anew; what was done stays.

    The second time SIGINT: runs are told and waited for.
    """
    long = {"train.steps": 1_000_000}
    jobs = [
        *jobs_of(base, tmp_path, "a"),
        *jobs_of(base, tmp_path, "l", **long),
        *jobs_of(base, tmp_path, "b"),
        *jobs_of(base, tmp_path, "m", **long),
    ]
    lines = tmp_path / "l/metrics.jsonl"
    there: dict[str, int] = {}
    for number in (signal.SIGKILL, signal.SIGINT):
        process = _context.Process(target=killed_later, args=(jobs, tmp_path, server_key(), number == signal.SIGINT))
        process.start()
        until(
            lambda: (
                written(tmp_path).keys() == {"a", "b"} and all((tmp_path / n / "metrics.jsonl").is_file() for n in "lm")
            )
        )
        until(lambda: lines.read_text().count("\n") > 3)
        assert process.pid
        os.kill(process.pid, number)
        process.join(30)
        assert process.exitcode, "it ended by the signal"
        until(lambda: (before := lines.read_text(), time.sleep(0.3), lines.read_text())[0::2] == (before,) * 2, 20)
        assert there.items() <= written(tmp_path).items() and written(tmp_path).keys() == {"a", "b"}
        there = written(tmp_path)
        (tmp_path / "l/rubbish").write_text("")
        lines.unlink()
    short = [
        *jobs_of(base, tmp_path, "a"),
        *jobs_of(base, tmp_path, "l"),
        *jobs_of(base, tmp_path, "b"),
        *jobs_of(base, tmp_path, "m"),
    ]
    assert study(short, tmp_path) == ["2 of 4 runs are there already"]
    assert there.items() <= written(tmp_path).items() and written(tmp_path).keys() == set("albm")
    assert not (tmp_path / "l/rubbish").exists(), "begun anew"
    assert not multiprocessing.active_children()


def test_what_runs_share_is_there():
    """The server that forks them ignores a module that it cannot import: each run would import it by itself."""
    assert [name for name in processes.PRELOADED if importlib.util.find_spec(name) is None] == []


def test_a_half_made_run_folder_is_begun_anew(base: Config, tmp_path: Path):
    """As a run leaves it that was killed without a checkpoint, or whose folder was made and no more."""
    jobs = jobs_of(base, tmp_path, "ab")
    for name, file in (("a", "metrics.jsonl"), ("b", ".summary.json.tmp")):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / file).write_text('{"step": 1, "lo')
    assert not any(done(j, tmp_path) for j in jobs)
    assert study(jobs, tmp_path) == [] and written(tmp_path).keys() == {"a", "b"}
    assert [r["step"] for r in metrics(tmp_path / "a") if "loss" in r] == [1, 2, 3]
    assert not (tmp_path / "b/.summary.json.tmp").exists()


def test_a_job_has_its_changes_and_is_checked(base: Config, tmp_path: Path):
    made = job(
        base, "x", tmp_path, **{"model.n_embd": 32, "optim.polar.schedule": "exact", "optim.max_grad_norm": None}
    )
    flat = configuration.flat(made.config)
    assert (flat["run.name"], flat["run.dir"], flat["model.n_embd"], flat["optim.polar.schedule"]) == (
        "x",
        str(tmp_path),
        32,
        "exact",
    )
    kept = {k: v for k, v in configuration.flat(base).items() if flat[k] != v}
    assert kept.keys() == {"run.name", "run.dir", "model.n_embd", "optim.polar.schedule"}
    with pytest.raises(configuration.ConfigError, match="model.n_head\n  got: 2\n  allowed: a divisor of n_embd = 17"):
        job(base, "x", tmp_path, **{"model.n_embd": 17})


def test_the_cost_counts_what_is_trained_and_evaluated(base: Config):
    """Against the model's own count; a dualized step costs more than AdamW's, and twice the steps twice as much."""
    plain = replace(
        base,
        optim=replace(base.optim, name="adamw"),
        train=replace(base.train, steps=10, eval_tokens=512, eval_every=0),
    )
    per_token = GPT(
        replace(base.model, vocab_size=18), base.optim.norms.build(base.optim.polar, base.model.n_head)
    ).flops_per_token()
    dataset = Dataset(base.data)
    flops, seconds = cost(plain, dataset, 1e9)
    assert flops == pytest.approx(per_token * (10 * 8 * 16 + 512 / 3))
    assert seconds == pytest.approx(run_cost.STARTUP + flops / 1e9 + 10 * 2 * run_cost.OVERHEAD)
    assert cost(replace(plain, optim=base.optim), dataset, 1e9)[0] > flops
    often = replace(plain, train=replace(plain.train, eval_every=5))
    assert cost(often, dataset, 1e9)[0] - flops == pytest.approx(2 * per_token / 3 * 512), (
        "two evaluations more: before, and in the middle"
    )
    whole = replace(plain, train=replace(plain.train, eval_tokens=None))
    assert cost(whole, dataset, 1e9)[0] - flops == pytest.approx(
        per_token / 3 * (dataset.manifest.splits["val"].tokens - 512)
    )
    curved = replace(plain, train=replace(plain.train, sharpness_every=5, sharpness_sequences=2))
    assert cost(curved, dataset, 1e9)[0] - flops == pytest.approx(3 * run_cost.PRODUCTS * 4 * per_token * 2 * 16)
    assert run_cost.measure_speed(base) > 1e8


def test_a_duration_is_that_of_the_longest_run_or_of_all_by_workers():
    assert duration([10, 10, 40], 2) == "40 s" and duration([30, 30, 30, 30], 2) == "60 s" and duration([], 2) == "0 s"
    assert duration([600] * 4, 4) == "10 min" and duration([7200], 1) == "2.0 h"


@pytest.mark.parametrize("workers", [0, -1])
def test_less_than_one_run_at_a_time_is_refused(base: Config, tmp_path: Path, workers: int):
    jobs = jobs_of(base, tmp_path, "a")
    for call in (
        lambda: study(jobs, tmp_path, workers),
        lambda: runs.sweep(jobs, tmp_path, workers=runs.places(workers), dry_run=True),
    ):
        with pytest.raises(StudyError, match=f"--workers\n  got: {workers}\n  allowed: 1 or more\n  fix: "):
            call()
    assert not (tmp_path / "a").exists()


def test_a_second_call_in_the_same_folder_is_refused(base: Config, tmp_path: Path):
    with runs._alone(tmp_path), pytest.raises(StudyError) as error:
        study(jobs_of(base, tmp_path, "a"), tmp_path)
    assert str(error.value) == (
        f"{tmp_path}\n  got: another call that is at work in it\n  allowed: one at a time\n  fix: wait for it, or another --name"
    )
    assert not (tmp_path / "a").exists()
    with runs._alone(tmp_path):
        pass


def test_written_numbers_are_json(tmp_path: Path):
    runs.write_json(tmp_path / "x.json", {"a": [1.5, math.inf, (math.nan, 2)], "b": None})
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
        "a": [1.5, None, [None, 2]],
        "b": None,
    }
