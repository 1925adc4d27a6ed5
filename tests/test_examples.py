"""Every example runs, in a fraction of its steps, and learns: its test loss falls by a margin that untrained noise does
not reach.
"""

import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

NATS = 1.5  # a byte: uniform guesses cost 5.5, single bytes by their frequency 3.5


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Windows of half the length. Accelerate keeps its settings in the class, for the whole process."""
    from accelerate.state import AcceleratorState

    monkeypatch.setattr("examples.tiny.LENGTH", 32)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def example(name: str, *argv: str) -> tuple[float, float]:
    """Test loss before and after.

    Imported here, since transformers takes seconds and every worker collects every file.
    """
    return import_module(f"examples.{name}").main(argv)


@pytest.mark.parametrize(
    "argv", ["--model gpt2", "--model llama", "--model llama --accumulate 2", "--model llama --compile eager"]
)
def test_the_plain_loop_learns(argv: str, capsys: pytest.CaptureFixture[str]):
    before, after = example("hf_plain_loop", *argv.split(), "--steps", "12")
    assert after < before - NATS
    out = capsys.readouterr().out
    assert "RMSToLinf" in out and f"test loss {before:.3f} → {after:.3f}" in out, "the receipt and the loss"


def test_the_trainer_learns_and_resumes_from_its_checkpoint(tmp_path: Path):
    argv = ["--steps", "12", "--out", str(tmp_path)]
    before, after = example("hf_trainer", *argv)
    assert after < before - NATS
    shutil.rmtree(tmp_path / "checkpoint-12")  # as if interrupted after step 6
    assert example("hf_trainer", *argv, "--resume") == (before, after)


@pytest.mark.parametrize("argv", ["", "--precision bf16 --accumulate 2"])
def test_accelerate_learns(argv: str):
    before, after = example("hf_accelerate", *argv.split(), "--steps", "12")
    assert after < before - NATS


@pytest.mark.parametrize("argv", ["", "--amp"])
def test_the_convolutions_learn(argv: str):
    before, after = example("cnn", *argv.split(), "--steps", "20")
    assert after < before - 0.5


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft asks transformers for it
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_adapters_learn(model: str, capsys: pytest.CaptureFixture[str]):
    before, after = example("peft_lora", "--model", model, "--base-steps", "20", "--steps", "12")
    assert after < before - 0.1
    assert "frozen parameters left out" in capsys.readouterr().out
