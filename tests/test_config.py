"""training/config.py: strict keys, types and values, each error with got / allowed / fix."""

from dataclasses import replace
from pathlib import Path

import pytest
from training.config import Config, ConfigError, flat, flat_hints, from_dict, load, read_options, to_toml
from training.synonyms import SYNONYMS

from tests.helpers import ROOT


def write(path: Path, text: str) -> str:
    (path / "c.toml").write_text(text)
    return str(path / "c.toml")


def test_a_file_sets_values_and_the_command_line_overrides_them(tmp_path: Path):
    file = write(tmp_path, "[optim]\nlr = 0.5\nbeta = 0.8\n[optim.masses]\nhead = 3\n")
    config = load(
        [
            file,
            "--optim.lr",
            "0.25",
            "--optim.masses.mlp",
            "7",
            "--train.batch-size",
            "4",
            "--run.compile",
            "--run.name",
            "x",
        ]
    )
    assert (config.optim.lr, config.optim.beta, config.optim.masses.head, config.optim.masses.mlp) == (
        0.25,
        0.8,
        3.0,
        7.0,
    )
    assert (config.train.batch_size, config.run.compile, config.run.name) == (4, True, "x")
    assert load([file]).run.name.startswith("c-"), "the name of a run follows its file and the time"  # type: ignore[union-attr]


def test_the_written_configuration_is_the_configuration(tmp_path: Path):
    config = load(
        [str(ROOT / "configs/shakespeare_char.toml"), "--run.name", "x", "--train.sample-prompt", 'a "b"\n\t\\']
    )
    assert load([write(tmp_path, to_toml(config))]) == config


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda f: f.stem)
def test_shipped_configurations_load(file: Path):
    assert load([str(file)]).train.steps > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[optim]\nlearning_rate = 1",
            "unknown key optim.learning_rate\n  got: learning_rate\n  allowed: name, lr, direction, beta, ",
        ),
        ("[optim]\nbetta = 1", "  fix: nearest valid name: optim.beta"),
        (
            "[optin]\nlr = 1",
            "unknown key optin\n  got: optin\n  allowed: run, data, model, optim, schedule, baseline, train\n  fix: nearest valid name: optim",
        ),
        ("[optim]\nlr = 'fast'", "optim.lr\n  got: 'fast'\n  allowed: a finite number >= 0 or \"auto\""),
        ("[optim]\nlr = '0.1'", "optim.lr\n  got: '0.1'\n  allowed: a finite number"),
        ("[train]\nsteps = 1.5", "train.steps\n  got: 1.5\n  allowed: an integer"),
        ("[run]\ncompile = 1", "run.compile\n  got: 1\n  allowed: true or false"),
        ("[run]\ndevice = 'tpu'", 'run.device\n  got: \'tpu\'\n  allowed: "auto", "cpu", "cuda", "mps"'),
        ("optim = 3", "optim\n  got: 3\n  allowed: a section\n  fix: [optim]"),
        ("[optim]\nlr = inf", "optim.lr\n  got: inf\n  allowed: a finite number"),
        ("[optim.masses]\nmlp = nan", "optim.masses.mlp\n  got: nan\n  allowed: a finite number"),
        ("[run]\nseed = -1", "run.seed\n  got: -1\n  allowed: an integer x with 0 <= x < 2**63\n  fix: "),
        ("[run]\nseed = 9223372036854775808", "run.seed\n  got: 9223372036854775808\n  allowed: an integer x with 0"),
        ("[run]\nresume = 'yes'", "run.resume\n  got: 'yes'\n  allowed: true, false or \"auto\"\n  fix: "),
        ("[data]\nholdout = 1.0", "data.holdout\n  got: 1.0\n  allowed: a number x with 0 <= x < 1\n  fix: "),
        ("[model]\nmatch = 9", "model.match\n  got: 9\n  allowed: an integer x with 0 <= x <= 8\n  fix: "),
        ("[model]\nvocab_size = 1", "model.vocab_size\n  got: 1\n  allowed: an integer >= 2 or left out\n  fix: "),
        ("[run]\nname = '..'", "run.name\n  got: '..'\n  allowed: the name of a run folder"),
        (
            "[model]\nn_head = 0",
            "model.n_head\n  got: 0\n  allowed: an integer >= 1\n  fix: set it in the file, or --model.n-head",
        ),
        ("[model]\nn_embd = -24", "model.n_embd\n  got: -24\n  allowed: an integer >= 1"),
        (
            "[train]\nbatch_size = 6\ngradient_accumulation_steps = 4",
            "train.gradient_accumulation_steps\n  got: 4\n  allowed: a divisor of train.batch_size = 6",
        ),
        (
            "[optim]\nname = 'adam'",
            'optim.name\n  got: \'adam\'\n  allowed: "dualized", "normalized_adam", '
            '"normalized_sgd", "adamw", "muon_adamw", "sgd", "schedule_free_adamw", "prodigy", "normuon", "soap", '
            '"adafactor"\n  fix: ',
        ),
        ("[optim]\nname = 'adamw'\nlr = 'auto'", "optim.lr\n  got: 'auto'\n  allowed: a number for adamw\n  fix: "),
        (
            "[optim]\nname = 'adamw'\nconstraint = 'sphere'",
            "optim.constraint\n  got: 'sphere'\n  allowed: left out with optim.name = 'adamw', which does not take it",
        ),
        (
            "[baseline]\nscaling = 'ntk'",
            "baseline.scaling\n  got: 'ntk'\n  allowed: 'standard' with optim.name = 'dualized', which does not take it",
        ),
        ("[baseline]\nscaling = 'mup'", 'baseline.scaling\n  got: \'mup\'\n  allowed: "standard", "ntk", "modular"'),
        ("[model]\ninit = 'zero'", 'model.init\n  got: \'zero\'\n  allowed: "norm", "gpt2", "fan_in"'),
        ("[train]\nkeep_checkpoints = -1", "train.keep_checkpoints\n  got: -1\n  allowed: an integer >= 0"),
        ("[optim]\nbeta = 1.0", "optim.beta\n  got: 1.0\n  allowed: a number x with 0 <= x < 1"),
        ("[schedule]\nshape = 'step'", 'schedule.shape\n  got: \'step\'\n  allowed: "wsd", "cosine"\n  fix: '),
        (
            "[optim.norms]\nhead = 'Nuclear'",
            'optim.norms.head\n  got: \'Nuclear\'\n  allowed: "Spectral", "MuonSpectral", "MoonlightSpectral", "RMSToRMS", '
            '"L1ToRMS", "RMSToLinf", "L1ToLinf", "MeanToLinf", "Frobenius"\n  fix: ',
        ),
        ("[optim.norms]\nhead = 'VectorRMS'", "optim.norms.head\n  got: 'VectorRMS'\n  allowed: \"Spectral\""),
        ("[optim.masses]\nmlp = -1.0", "optim.masses.mlp\n  got: -1.0\n  allowed: a finite number >= 0\n  fix: "),
        (
            "[optim.polar]\nschedule = 'newton'",
            "optim.polar.schedule\n  got: 'newton'\n  allowed: exact, cubic",
        ),
        ("[optim.auto]\nfactor = 0.0", "optim.auto.factor\n  got: 0.0\n  allowed: a finite number > 0\n  fix: "),
        ("[model]\nn_head = 5", "model.n_head\n  got: 5\n  allowed: a divisor of n_embd = 768\n  fix: "),
        ("[run]\nname = 'a/b'", "run.name\n  got: 'a/b'\n  allowed: the name of a run folder"),
        ("[optim\n", "allowed: TOML"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError) as error:
        load([write(tmp_path, text)])
    assert message in str(error.value)
    assert all(word in str(error.value) for word in ("got:", "allowed:", "fix:"))


def test_the_command_line_is_as_strict():
    with pytest.raises(
        ConfigError, match="unknown option --optim.lrr\n  got: --optim.lrr(.|\n)*fix: nearest valid name: --optim.lr"
    ):
        load(["--run.name", "x", "--optim.lrr", "3"])
    with pytest.raises(
        ConfigError,
        match="--optim.lr\n  got: 'fast'\n  allowed: a finite number >= 0 or \"auto\"\n  fix: --optim.lr VALUE",
    ):
        load(["--run.name", "x", "--optim.lr", "fast"])
    for gone in ("--optim.floor", "--model.key-shift", "--model.no-key-shift"):
        with pytest.raises(ConfigError, match=f"unknown option {gone}\n(.|\n)*fix: leave it out: there is no such"):
            load(["--run.name", "x", gone, "0"])
    with pytest.raises(ConfigError, match="--optim.lr\n  got: ''"):
        load(["--run.name", "x", "--optim.lr"])
    with pytest.raises(SystemExit) as help_:
        load(["--help"])
    assert help_.value.code == 0
    with pytest.raises(ConfigError, match="train.steps\n  got: 0\n  allowed: an integer >= 1"):
        load(["--run.name", "x", "--train.steps", "0"])
    with pytest.raises(ConfigError, match=r"configuration file\n  got: nowhere.toml"):
        load(["nowhere.toml"])
    with pytest.raises(ConfigError, match=r"run.name\n  got: None"):
        load([])


def test_every_key_is_an_option_of_its_own_type():
    """Each key's default, given as an option in either spelling, is the default again."""
    for key, value in flat(Config()).items():
        for flag in (f"--{key}", f"--{key}".replace("_", "-")):
            assert read_options([flag, str(value)]) == {key: value}
            assert read_options([f"{flag}={value}"]) == {key: value}
    assert flat_hints(Config).keys() == flat(Config()).keys()


def test_switches_stand_alone_or_take_a_value_and_values_may_look_like_options():
    assert read_options(["--run.compile", "--optim.lr", "-1"]) == {"run.compile": True, "optim.lr": -1.0}
    assert read_options(["--run.no-compile", "--run.resume=False"]) == {"run.compile": False, "run.resume": False}
    assert read_options(["--run.compile", "True"]) == {"run.compile": True}
    assert read_options(["--train.sample-prompt", "--x"]) == {"train.sample_prompt": "--x"}
    for stray in (["word"], ["-x"], ["--"]):
        with pytest.raises(ConfigError, match="unknown option"):
            read_options(stray)
    with pytest.raises(ConfigError, match="--optim.lr\n  got: 'None'\n  allowed: a finite number"):
        read_options(["--optim.lr", "None"])


def test_integers_do_for_numbers():
    assert from_dict(Config, {"optim": {"lr": 1}}) == replace(Config(), optim=replace(Config().optim, lr=1.0))


@pytest.mark.parametrize(
    ("option", "fix"),
    [
        ("--lr", "it is --optim.lr"),
        ("--optim.learning-rate", "it is --optim.lr"),
        ("--learning_rate", "it is --optim.lr"),
        ("--steps", "it is --train.steps"),
        ("--optim.steps", "it is --train.steps"),
        ("--n-layer", "it is --model.n-layer"),
        ("--beta", "it is --optim.beta"),
        ("--optim.lrr", "nearest valid name: --optim.lr"),
    ],
)
def test_a_wrong_option_is_answered_by_what_it_means(option: str, fix: str):
    with pytest.raises(ConfigError, match=rf"unknown option {option}\n(.|\n)*fix: {fix}$"):
        load([option, "1"])


def test_a_wrong_key_of_a_file_is_answered_by_what_it_means(tmp_path: Path):
    file = tmp_path / "a.toml"
    for text, fix in (
        ("[optim]\nlearning_rate = 1.0", "it is optim.lr"),
        ("[train]\nmax_iters = 10", "it is train.steps"),
        ("lr = 0.1", "it is optim.lr"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=rf"fix: {fix}$"):
            load([str(file)])


def test_every_synonym_means_a_setting():
    assert set(SYNONYMS.values()) <= flat_hints(Config).keys()
