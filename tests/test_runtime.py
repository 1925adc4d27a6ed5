"""runtime.py alone."""

import time
from pathlib import Path

import pytest
import torch

import runtime
from runtime import Clock, RunConfig, RunError, RunFolder, Runtime, Stopwatch

CPU = RunConfig(device="cpu", precision="fp32")


def test_the_clock_stands_still_while_paused():
    clock = Clock(Runtime(CPU), 10.0)
    clock.start()
    time.sleep(0.02)
    with clock.paused():
        stood = clock.seconds()
        time.sleep(0.05)
        assert clock.seconds() == stood
    time.sleep(0.02)
    clock.stop()
    assert 10.04 <= clock.seconds() < 10.09
    assert clock.seconds() == clock.seconds()


def test_the_stopwatch_adds_its_blocks():
    watch = Stopwatch(Runtime(CPU), 1.0)
    for pause in (0.03, 0.01):
        with watch:
            time.sleep(pause)
    assert 1.04 <= watch.seconds() < 1.08
    assert 0.01 <= watch.latest() < 0.03


@pytest.mark.parametrize(("gain", "chosen"), [(3.0, "bf16"), (1.0, "fp32"), (0.0, "fp32")])
def test_precision_follows_the_probe_and_is_told(monkeypatch: pytest.MonkeyPatch, gain: float, chosen: str):
    monkeypatch.setattr(runtime, "bf16_gain", lambda device: gain)
    found = Runtime(RunConfig(device="cpu"))
    assert found.precision == chosen
    assert found.choices == [f"run.precision = {chosen} (a bf16 matrix product ran {gain:.1f}× as fast as fp32 here)"]
    with found.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if chosen == "bf16" else torch.float32)


def test_the_probe_runs_both_types():
    assert 0.01 < runtime.bf16_gain(torch.device("cpu"), size=32) < 100


def test_a_device_that_is_not_there_is_refused():
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match=r"run.device\n  got: cuda\n  allowed: "):
            Runtime(RunConfig(device="cuda"))


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
