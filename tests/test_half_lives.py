"""training/half_lives.py: beta and beta2 by half-lives in tokens, from a file to a run that is resumed and exported."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from models import build_model_and_norm
from studies.export import command
from studies.runs import job
from training.baseline import build_baseline
from training.config import Config, ConfigError, from_dict, load, of_file, to_toml
from training.resume import keep_choices

from tests.helpers import run, small_dataset

# 8 sequences of 16 tokens are a step of 128: a half-life of 256 tokens is one of two steps.
FILE = """
[model]
block_size = 16
[optim]
beta_half_life = 256.0
[optim.roles.head]
beta2_half_life = 512.0
[train]
batch_size = 8
"""
TWO_STEPS, FOUR_STEPS = round(math.sqrt(0.5), 12), round(math.sqrt(math.sqrt(0.5)), 12)


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "c.toml").write_text(FILE)
    return str(tmp_path / "c.toml")


def decays(config: Config) -> tuple[float, float, float | None, float | None]:
    head = config.optim.roles.head
    return config.optim.beta, config.optim.beta2, head.beta, head.beta2


def test_half_lives_give_decays_at_the_tokens_of_a_step(file: str):
    assert decays(load([file])) == decays(of_file(Path(file))) == (TWO_STEPS, 0.99, None, FOUR_STEPS)
    assert load([file]).optim.roles.given() == {"head": {"beta2": FOUR_STEPS}}, "what Dualized takes of a role"
    assert decays(load([file, "--train.batch-size", "16"]))[0] == 0.5
    assert decays(load([file, "--model.block-size", "8", "--train.batch-size", "32"]))[0] == 0.5


def test_micro_batches_do_not_change_them(file: str):
    assert decays(load([file, "--train.gradient-accumulation-steps", "4"])) == decays(load([file]))


def test_a_written_configuration_shows_its_decays_and_is_read_at_another_batch(file: str, tmp_path: Path):
    config = load([file, "--run.name", "x"])
    written = tmp_path / "written.toml"
    written.write_text(text := to_toml(config))
    assert f"\n# beta = {TWO_STEPS}\nbeta2 = 0.99\n" in text and f"\n# beta2 = {FOUR_STEPS}\n" in text
    assert "\nbeta_half_life = 256.0\n" in text
    assert load([str(written)]) == config
    assert decays(load([str(written), "--train.batch-size", "16"]))[0] == 0.5


def test_a_decay_beside_its_half_life_is_refused_unless_it_is_the_same(file: str):
    Path(file).write_text(FILE.replace("[optim]", "[optim]\nbeta = 0.9"))
    with pytest.raises(ConfigError) as error:
        load([file])
    assert str(error.value) == (
        "optim.beta\n  got: 0.9 beside optim.beta_half_life = 256\n"
        "  allowed: one of the two; the half-life gives 0.707107 at 128 tokens a step\n  fix: leave one out"
    )
    Path(file).write_text(FILE.replace("beta2_half_life", "beta2 = 0.9\nbeta2_half_life"))
    with pytest.raises(
        ConfigError, match=r"^optim.roles.head.beta2\n  got: 0.9 beside optim.roles.head.beta2_half_life"
    ):
        load([file])
    config = from_dict(Config, {"optim": {"beta_half_life": 5000.0}})
    assert from_dict(Config, asdict(config)) == config, "a checkpoint has both"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nbeta_half_life = 0.0", "optim.beta_half_life\n  got: 0.0\n  allowed: a finite number > 0 or left out\n"),
        ("[optim]\nbeta_half_life = 1e9\n[train]\nbatch_size = 0", "train.batch_size\n  got: 0\n  allowed: an integer >= 1"),
        ("[optim]\nbeta_half_life = 1e30", "optim.beta\n  got: 1.0\n  allowed: a number x with 0 <= x < 1"),
        (
            "[optim]\nname = 'adamw'\n[optim.roles.head]\nbeta_half_life = 9.0",
            "optim.roles.head.beta_half_life\n  got: 9.0\n  allowed: left out with optim.name = 'adamw'",
        ),
    ],
)  # fmt: skip
def test_what_gives_no_decay_is_named(text: str, message: str, tmp_path: Path):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load([str(tmp_path / "c.toml")])
    assert str(error.value).startswith(message)


def test_the_command_line_replaces_either_by_the_other(file: str):
    config = load([file, "--optim.beta", "0.9", "--optim.roles.head.beta2", "0.5"])
    assert decays(config) == (0.9, 0.99, None, 0.5)
    assert config.optim.beta_half_life is config.optim.roles.head.beta2_half_life is None
    Path(file).write_text("[optim]\nbeta = 0.9\nbeta2 = 0.8\n[model]\nblock_size = 16\n[train]\nbatch_size = 8")
    assert decays(load([file, "--optim.beta-half-life", "128"])) == (0.5, 0.8, None, None)
    with pytest.raises(ConfigError, match="optim.beta\n  got: 0.9 beside optim.beta_half_life = 128"):
        load([file, "--optim.beta-half-life", "128", "--optim.beta", "0.9"])


def test_a_job_of_a_study_keeps_half_lives_and_replaces_them_likewise(file: str, tmp_path: Path):
    base = load([file])
    assert decays(job(base, "x", tmp_path, **{"train.batch_size": 16}).config) == (0.5, 0.99, None, TWO_STEPS)
    assert decays(job(base, "x", tmp_path, **{"optim.beta": 0.9}).config) == (0.9, 0.99, None, FOUR_STEPS)
    other = job(base, "x", tmp_path, **{"optim.beta_half_life": None, "optim.beta2_half_life": 128.0}).config
    assert decays(other) == (0.95, 0.5, None, FOUR_STEPS)


def test_a_resumed_run_is_told_of_another_half_life(file: str):
    before, now = load([file]), load([file, "--optim.beta-half-life", "128"])
    assert keep_choices(now, Path("runs/x"), {"config": json.loads(json.dumps(asdict(before)))}) == [
        f"changed: optim.beta = 0.5, was {TWO_STEPS}",
        "changed: optim.beta_half_life = 128.0, was 256.0",
    ]


def test_baselines_take_them_as_they_take_decays():
    small = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16, "vocab_size": 8}
    optim = {"name": "adamw", "beta_half_life": 256.0, "beta2_half_life": 512.0}
    config = from_dict(Config, {"model": small, "optim": optim, "train": {"batch_size": 8}})
    config.optim.check()
    model, norm = build_model_and_norm(config, torch.Generator().manual_seed(0))
    assert {g["betas"] for g in build_baseline(config, model, norm).param_groups} == {(TWO_STEPS, FOUR_STEPS)}


# ---- runs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("half-lives")
    small_dataset(root)
    return root


OPTIONS = ("--optim.roles.head.direction", "adam", "--schedule.beta-cooldown", "1", "--train.sample-tokens", "0")
IN_TOKENS = ("--optim.beta-half-life", "256", "--optim.roles.head.beta2-half-life", "512")
IN_STEPS = ("--optim.beta", str(TWO_STEPS), "--optim.roles.head.beta2", str(FOUR_STEPS))


def trained(root: Path, name: str, options: Sequence[str]) -> tuple[Path, str]:
    code, out, err = run(root, "small.toml", "--run.name", name, *OPTIONS, *options)
    assert code == 0, err
    return root / "runs" / name, out


def losses(folder: Path) -> list[float]:
    return [
        r["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in (r := json.loads(line))
    ]


def test_a_run_by_half_lives_is_the_run_by_their_decays_and_resumes_so(root: Path):
    tokens, out = trained(root, "tokens", IN_TOKENS)
    steps, _ = trained(root, "steps", IN_STEPS)
    assert losses(tokens) == losses(steps) and len(losses(tokens)) == 12
    for line in (
        "chosen: optim.beta = 0.707107 (half-life: 256 tokens, 128 a step)\n",
        "chosen: optim.roles.head.beta2 = 0.840896 (half-life: 512 tokens, 128 a step)\n",
    ):
        assert line in out
    shutil.copytree(tokens, root / "runs/resumed")
    shutil.rmtree(root / "runs/resumed/checkpoints/step_00000012")
    resumed, out = trained(root, "resumed", (*IN_TOKENS, "--run.resume"))
    assert "at step 8\n" in out and "changed:" not in out
    assert losses(resumed) == losses(tokens)
    state = json.loads((resumed / "checkpoints/step_00000012/state.json").read_text())
    (head,) = (g for g in state["param_groups"] if g.get("role") == "head")
    assert head["beta2"] == FOUR_STEPS
    assert head["beta"] == pytest.approx(0.85 + (TWO_STEPS - 0.85) / 12), (
        "a schedule of beta starts from what was given"
    )


def test_the_exported_script_is_that_of_the_decays(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(root)
    text = (root / "small.toml").read_text().replace("[model]", "[model]\nvocab_size = 18") + "[optim.roles.head]\n"
    scripts = []
    for folder, optim, head in (
        ("a", "beta_half_life = 256", "beta2_half_life = 512"),
        ("b", f"beta = {TWO_STEPS}", f"beta2 = {FOUR_STEPS}"),
    ):
        (root / folder).mkdir()
        (root / folder / "run.toml").write_text(text.replace("[optim]", f"[optim]\n{optim}") + head)
        assert command.main([f"{folder}/run.toml", "--out", f"{folder}/script.py"]) == 0
        scripts.append((root / folder / "script.py").read_text())
    assert scripts[0] == scripts[1] and str(TWO_STEPS) in scripts[0]
