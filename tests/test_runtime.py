"""training/runtime.py: the device and the precision."""

import pytest
import torch
from training import runtime
from training.errors import RunError
from training.runtime import RunConfig, Runtime

CPU = RunConfig(device="cpu", precision="fp32")


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
    made = Runtime(RunConfig(device="cpu"), product=(512, 64, 256))
    assert (made.precision, timed) == (chosen, [(512, 64, 256)])
    assert made.choices == [
        f"run.precision = {chosen} (in bf16 the MLP's product, casts and backward pass included, was {told} here)"
    ]
    with made.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if chosen == "bf16" else torch.float32)


@pytest.mark.parametrize("has", [True, False])
def test_precision_on_a_gpu_follows_its_hardware(monkeypatch: pytest.MonkeyPatch, has: bool):
    """Without a GPU: the device alone is set. Emulated bf16 is not taken for the hardware's."""
    made = Runtime(CPU)
    made.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: not including_emulation and has)
    assert made._choose_precision("auto", (512, 64, 256)) == ("bf16" if has else "fp32")
    assert made.choices == [f"run.precision = {'bf16 (this GPU has bf16)' if has else 'fp32 (this GPU has no bf16)'}"]


def test_the_probe_runs_both_types_on_few_rows(monkeypatch: pytest.MonkeyPatch):
    rows = []
    theirs = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, W: rows.append(len(x)) or theirs(x, W))
    assert 0.001 < runtime.bf16_gain(torch.device("cpu"), 64, 32, 128) < 100
    assert set(rows) == {64}
    monkeypatch.setattr(runtime, "PROBE_FLOPS", 6 * 32 * 128 * 8)
    runtime.bf16_gain(torch.device("cpu"), 10**9, 32, 128)
    assert rows[-1] == 8


def test_a_device_that_is_not_there_is_refused():
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match=r"run.device\n  got: cuda\n  allowed: "):
            Runtime(RunConfig(device="cuda"))
