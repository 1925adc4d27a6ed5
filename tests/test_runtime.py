"""runtime.py alone."""

import re
import time
from pathlib import Path

import pytest
import torch
from training import runtime
from training.runtime import Clock, RunConfig, RunError, RunFolder, Runtime, Stopwatch, telling

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


@pytest.mark.parametrize(
    ("gain", "chosen", "told"),
    [
        (3.0, "bf16", "3.0 × faster"),
        (1.0, "fp32", "1.0 × faster"),
        (1 / 23, "fp32", "23 × slower"),
        (0.0, "fp32", "not possible"),
    ],
)
def test_precision_follows_the_models_own_product_and_is_told(
    monkeypatch: pytest.MonkeyPatch, gain: float, chosen: str, told: str
):
    timed = []
    monkeypatch.setattr(runtime, "bf16_gain", lambda device, *product: timed.append(product) or gain)
    found = Runtime(RunConfig(device="cpu"), product=(512, 64, 256))
    assert (found.precision, timed) == (chosen, [(512, 64, 256)])
    assert found.choices == [
        f"run.precision = {chosen} (in bf16 the MLP's product, casts and backward pass included, was {told} here)"
    ]
    with found.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if chosen == "bf16" else torch.float32)


@pytest.mark.parametrize("has", [True, False])
def test_precision_on_a_gpu_follows_its_hardware(monkeypatch: pytest.MonkeyPatch, has: bool):
    """Without a GPU: the device alone is set. Emulated bf16 is not taken for the hardware's."""
    found = Runtime(CPU)
    found.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: not including_emulation and has)
    assert found._precision(RunConfig(), (512, 64, 256)) == ("bf16" if has else "fp32")
    assert found.choices == [f"run.precision = {'bf16 (this GPU has bf16)' if has else 'fp32 (this GPU has no bf16)'}"]


def test_the_probe_runs_both_types_on_few_rows(monkeypatch: pytest.MonkeyPatch):
    rows = []
    theirs = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, W: rows.append(len(x)) or theirs(x, W))
    assert 0.001 < runtime.bf16_gain(torch.device("cpu"), 64, 32, 128) < 100
    assert set(rows) == {64}
    monkeypatch.setattr(runtime, "PROBE_FLOPS", 6 * 32 * 128 * 8)
    runtime.bf16_gain(torch.device("cpu"), 10**9, 32, 128)
    assert rows[-1] == 8


def test_an_evaluation_tells_how_far_it_is():
    targets = torch.tensor([[0, 1, 2, -1]])
    said: list[str] = []
    batches = [(targets, targets)] * 4
    assert list(telling(batches, total=12, say=said.append, every=0.0)) == batches
    assert [re.sub(r", \d+ s", ", 7 s", line) for line in said] == [
        f"validation: {n} of 12 tokens, 7 s left" for n in (3, 6, 9)
    ]
    assert not list(telling([], total=12, say=said.append)) and len(said) == 3


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
