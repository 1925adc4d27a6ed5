"""Every example runs, in a fraction of its steps, and learns: its test loss falls by a margin that untrained noise does not reach."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from examples import cnn, hf_accelerate, hf_plain_loop, hf_trainer, peft_lora

NATS = 1.5  # a byte: uniform guesses cost 5.5, single bytes by their frequency 3.5


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """Accelerate keeps its settings in the class, for the whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("argv", ["--model gpt2", "--model llama", "--model llama --accumulate 2", "--model llama --compile eager"])
def test_the_plain_loop_learns(argv: str, capsys: pytest.CaptureFixture[str]):
    before, after = hf_plain_loop.main([*argv.split(), "--steps", "14"])
    assert after < before - NATS
    out = capsys.readouterr().out
    assert "RMSToLinf" in out and f"test loss {before:.3f} → {after:.3f}" in out, "the receipt and the loss"


def test_the_trainer_learns_and_resumes_from_its_checkpoint(tmp_path: Path):
    argv = ["--steps", "14", "--out", str(tmp_path)]
    before, after = hf_trainer.main(argv)
    assert after < before - NATS
    shutil.rmtree(tmp_path / "checkpoint-14")  # as if interrupted after step 7
    assert hf_trainer.main([*argv, "--resume"]) == (before, after)


@pytest.mark.parametrize("argv", ["", "--precision bf16 --accumulate 2"])
def test_accelerate_learns(argv: str):
    before, after = hf_accelerate.main([*argv.split(), "--steps", "14"])
    assert after < before - NATS


@pytest.mark.parametrize("argv", ["", "--amp"])
def test_the_convolutions_learn(argv: str):
    before, after = cnn.main([*argv.split(), "--steps", "20"])
    assert after < before - 0.5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_adapters_learn(model: str, capsys: pytest.CaptureFixture[str]):
    before, after = peft_lora.main(["--model", model, "--base-steps", "20", "--steps", "12"])
    assert after < before - 0.1
    assert "frozen parameters left out" in capsys.readouterr().out
