"""Plugins: modules of a user's own that configurations name, and the parts that they register."""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from data import prepare
from data.shards import read_manifest
from data.tokenizer import TOKENIZERS
from models import MODELS, build
from optim import plugins
from optim.baselines import BASELINES
from optim.directions import DIRECTIONS
from optim.errors import Refusal
from optim.norms import NORMS
from safetensors.torch import load_file
from studies import runs
from studies.export.run import Run
from studies.record_book.book import RecordError
from studies.record_book.check import check_record
from studies.record_book.provenance import plugin_texts
from studies.speedrun import entries
from training import config as configuration
from training.config import Config, ConfigError, config_class, from_dict, load, of_file, read_options, to_toml

from tests.helpers import ROOT, TEXT, run, run_ranks, small_dataset
from tests.source import PRODUCT, relative

REGISTRIES: tuple[dict[str, Any], ...] = (NORMS, DIRECTIONS, BASELINES, TOKENIZERS, MODELS)

PARTS = '''
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from data.tokenizer import Tokenizer, register_tokenizer
from model import GPT, GPTConfig
from models import register_model
from nanodual import register_baseline, register_direction, register_norm
from nanodual.directions import Direction
from nanodual.norms import Norm
from nanodual.settings import Help, Range


@register_norm
class Half(Norm):
    def norm(self, W):
        return W.flatten(-2).norm(dim=-1)

    def dual_norm(self, G):
        return self.norm(G)

    def dualize(self, G):
        size = self.norm(G)[..., None, None]
        return torch.where(size > 0, G / size, 0)


@register_direction("fresh")
class Fresh(Direction):
    def buffers(self, W):
        return {}

    def __call__(self, G, state, *, live, beta, beta2, refresh):
        return G


@register_baseline("halved_sgd")
def halved_sgd(model, norm, *, lr: float, share: Annotated[float, Range(0), Help("halved_sgd: of lr.")] = 0.5):
    return torch.optim.SGD(list(model.named_parameters()), lr=share * lr)


@register_tokenizer
class Nibbles(Tokenizer):
    name, vocab_size, separator = "nibbles", 16, 0

    def encode(self, text):
        codes = np.frombuffer(text.encode(), dtype=np.uint8)
        return np.stack([codes >> 4, codes & 15], -1).reshape(-1).astype(np.uint16)

    def decode(self, tokens):
        return bytes(a << 4 | b for a, b in zip(tokens[::2], tokens[1::2])).decode(errors="replace")

    def byte_lengths(self):
        return np.tile([0, 1], 8)


@dataclass
class LouderConfig(GPTConfig):
    volume: Annotated[float, Range(0)] = 1.0
    """A factor of the embedding."""

    def check(self):
        super().check()
        self.refuse_unless(self.volume != 13, "volume", "another number")


@register_model("louder", LouderConfig)
class Louder(GPT):
    config: LouderConfig

    def embed(self, idx_BT, cache=None):
        return self.config.volume * super().embed(idx_BT, cache)
'''

OTHER = '''
from dataclasses import dataclass

from model import GPT, GPTConfig
from models import register_model


@dataclass
class WaveConfig(GPTConfig):
    wave: int = 1
    """A setting of another plugin."""


@register_model("wave", WaveConfig)
class Wave(GPT):
    config: WaveConfig
'''

LOUDER = """
[run]
plugins = ["parts"]
device = "cpu"
precision = "fp32"
threads = 1
[data]
dataset = "corpora/nibbles"
[model]
name = "louder"
volume = 1.5
n_layer = 1
n_head = 1
n_embd = 16
block_size = 16
[optim]
direction = "fresh"
[optim.norms]
mlp = "Half"
[optim.roles.attention]
direction = "nesterov"
[train]
steps = 6
batch_size = 4
eval_tokens = 256
checkpoint_every = 3
sample_tokens = 8
telemetry_every = 3
pictures = false
"""


@pytest.fixture
def registries() -> Iterator[None]:
    """What a test registers and imports is gone after it."""
    before = [dict(r) for r in REGISTRIES], list(sys.path), set(sys.modules)
    yield
    for registry, content in zip(REGISTRIES, before[0], strict=True):
        registry.clear()
        registry.update(content)
    sys.path[:] = before[1]
    for name in set(sys.modules) - before[2]:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None) -> Path:
    """The working directory, with the plugins parts and other."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "other.py").write_text(OTHER)
    (tmp_path / "louder.toml").write_text(LOUDER)
    return tmp_path


# ---- loading


def test_a_plugin_of_the_working_directory_is_imported_once(folder: Path):
    (folder / "count.py").write_text("import sys\nsys.modules[__name__].__dict__.setdefault('seen', []).append(1)\n")
    plugins.load(["count"])
    plugins.load(["count", "count"])
    assert sys.modules["count"].seen == [1] and sys.path.count(str(folder)) == 1
    assert sys.path.index(str(folder)) == len(sys.path) - 1, "a checkout's modules come first"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("no_such", None, "got: 'no_such', and there is no such module\n  allowed: a module that can be imported: "),
        ("parts.inner", None, "got: 'parts.inner', and there is no such module, as parts is "),
        ("mine.py", "", "got: 'mine.py'\n  allowed: the name of a Python module, as import takes it\n  fix: \"mine\""),
        ("./mine", "", 'fix: "mine"'),
        ("my-plugin", "", "got: 'my-plugin'\n  allowed: the name of a Python module"),
        ("class", "", "got: 'class'\n  allowed: the name of a Python module"),
        ("", "", "got: ''"),
        ("data", "", "got: 'data', the name of a module of nanodual\n  allowed: a module of another name\n"),
        ("json", "", "got: 'json', the name of a module of Python\n"),
        ("json.tool", None, "got: 'json.tool', the name of a module of Python\n"),
        ("os.path", None, "got: 'os.path', the name of a module of Python\n"),
        ("data.prepare", None, "got: 'data.prepare', the name of a module of nanodual\n"),
        ("optim.norms", None, "\n  fix: rename its file, to my_norms.py say"),
        ("torch", "\n", "not {folder}/torch.py\n  allowed: a name that no other module has\n  fix: rename "),
        ("bad", "\n\n1 / 0\n", "bad raised while it was imported\n  got: ZeroDivisionError: division by zero\n"),
        ("bad", "\n\n1 / 0\n", "fix: see {folder}/bad.py, line 3"),
        ("bad", "x = 1\ndef f(:\n", "fix: see {folder}/bad.py, line 2"),
        ("bad", "import json\njson.loads('')\n", "fix: see {folder}/bad.py, line 2"),
        ("bad", "import no_such_module\n", "got: ModuleNotFoundError: No module named 'no_such_module'\n"),
        ("bad", "raise SystemExit(3)\n", "got: SystemExit: 3\n"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_refused_with_the_place(
    folder: Path, name: str, text: str | None, words: str
):
    if text is not None and name.isidentifier():
        (folder / f"{name}.py").write_text(text)
    with pytest.raises(ConfigError) as error:
        from_dict(Config, {"run": {"plugins": [name]}})
    assert words.replace("{folder}", str(folder)) in str(error.value)
    assert str(error.value).startswith("run.plugins")


def test_a_folder_without_code_is_no_plugin_and_one_with_code_is(folder: Path):
    (folder / "mine").mkdir()
    (folder / "mine/inner.py").write_text(OTHER)
    with pytest.raises(ConfigError, match=r"'mine', a folder without __init__\.py\n.*\n  fix: the file in it: mine\."):
        from_dict(Config, {"run": {"plugins": ["mine"]}})
    assert vars(from_dict(Config, {"run": {"plugins": ["mine.inner"]}, "model": {"wave": 1}}).model)["wave"] == 1


def test_a_part_that_is_refused_is_told_with_its_line(folder: Path):
    (folder / "bad.py").write_text("from optim import register_norm\n@register_norm\nclass Odd:\n    ndim = 2\n")
    with pytest.raises(ConfigError, match=r"register_norm: Odd, in .*bad\.py, line \d\n  got: a class without Norm"):
        from_dict(Config, {"run": {"plugins": ["bad"]}})


def test_the_modules_of_a_checkout_are_those_that_no_plugin_can_be_named_after():
    tops = {relative(path).split("/")[0].removesuffix(".py") for path in PRODUCT}
    assert tops | {"tests"} == set(plugins.OURS)


# ---- names that are taken


def test_a_name_belongs_to_one_definition_which_may_be_imported_anew(folder: Path):
    plugins.load(["parts"])
    importlib.reload(sys.modules["parts"])
    assert NORMS["Half"] is sys.modules["parts"].Half and type(DIRECTIONS["fresh"]) is sys.modules["parts"].Fresh
    (folder / "copy_of_parts.py").write_text(PARTS)
    with pytest.raises(Refusal, match=r"register_norm: Half, .*\n  got: a name that parts has registered already\n"):
        plugins.load(["copy_of_parts"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("from optim.norms import *\n@register_norm\nclass RMSToRMS(Norm):\n    pass", "register_norm: RMSToRMS"),
        ("from optim.norms import *\n@register_norm\nclass MuonSpectral(Norm):\n    pass", "register_norm: MuonSpe"),
        (
            "from optim.directions import *\n@register_direction('adam')\nclass Mine(Direction):\n    pass",
            "register_direction: adam",
        ),
        (
            "from optim import register_baseline\n@register_baseline('sgd')\ndef mine(model, norm, *, lr):\n    pass",
            "register_baseline: sgd",
        ),
        (
            "from data.tokenizer import *\nfrom data.tokenizer import register_tokenizer\n"
            "@register_tokenizer\nclass Mine(Tokenizer):\n    name = 'gpt2'",
            "register_tokenizer: gpt2",
        ),
        (
            "from models import *\nfrom model import *\n@register_model('gpt', GPTConfig)\nclass Mine(GPT):\n    pass",
            "register_model: gpt",
        ),
    ],
)
def test_a_shipped_name_is_taken(folder: Path, text: str, words: str):
    (folder / "mine.py").write_text(text)
    before = [dict(r) for r in REGISTRIES]
    with pytest.raises(Refusal, match=f"{words}.*, in .*mine.py, line .*\n  got: a name that .* has registered"):
        plugins.load(["mine"])
    assert [dict(r) for r in REGISTRIES] == before


MODEL = "from dataclasses import dataclass\nfrom model import GPT, GPTConfig\nfrom models import register_model\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("@register_model('mine', GPTConfig)\nclass Mine:\n    pass", "allowed: a subclass of GPT\n"),
        ("@register_model('mine', dict)\nclass Mine(GPT):\n    pass", "allowed: a dataclass that extends GPTConfig\n"),
        (
            "class C(GPTConfig):\n    x: int = 1\n@register_model('mine', C)\nclass Mine(GPT):\n    pass",
            "allowed: a dataclass that extends GPTConfig\n",
        ),
        ("    x: int", "TypeError: non-default argument"),
        ("    x: int = 1", "x of mine, .*\n  got: no text under it\n  allowed: a text, for --help\n"),
        ("    x: int = 1.5\n    'x'", "x of mine, .*\n  got: the default 1.5\n  allowed: an integer\n"),
        ("    x: tuple[int, int] = (1, 2)\n    'x'", r"x of mine, .*\n  got: the default \(1, 2\)\n"),
        ("    name: str = 'x'\n    'x'", "name of mine, .*\n  got: a name that \\[model\\] has\n"),
        (
            "    n_layer: int = 4\n    'x'",
            "n_layer of mine, .*\n  got: an integer, by default 4\n  allowed: the type and",
        ),
        ("    ngram: int = 0\n    'x'", "ngram of mine, .*\n  got: an integer, by default 0\n"),
    ],
)
def test_a_model_that_declares_no_settings_of_its_own_rightly_is_refused(folder: Path, text: str, words: str):
    if text.startswith("    "):
        text = f"@dataclass\nclass C(GPTConfig):\n{text}\n@register_model('mine', C)\nclass Mine(GPT):\n    pass"
    (folder / "mine.py").write_text(f"{MODEL}{text}\n")
    with pytest.raises(Refusal, match=words):
        plugins.load(["mine"])
    assert "mine" not in MODELS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "@register_norm\n@dataclass\nclass Mine(Norm):\n    p: int = 1",
            "register_norm: Mine, .*\n  got: a class that cannot be hashed\n  allowed: a plain class, or a frozen",
        ),
        (
            "@register_norm\nclass Mine(Spectral):\n    def __init__(self):\n        super().__init__()",
            "register_norm: Mine, .*\n  got: an __init__ that does not take the fields of its base\n",
        ),
        ("@register_norm\nclass Mine(Norm):\n    def __init__(self, p):\n        pass", "TypeError: .*'p'"),
        (
            "@register_tokenizer\nclass Mine(Tokenizer):\n    pass",
            "register_tokenizer: Mine, .*\n  got: name = None\n",
        ),
        (
            "@register_tokenizer\nclass Mine(Tokenizer):\n    name, vocab_size = 'mine', 2**16 + 1",
            "register_tokenizer: Mine, .*\n  got: vocab_size = 65537\n  allowed: 2 to 65,536 tokens",
        ),
        ("register_tokenizer(dict)", "allowed: a subclass of Tokenizer"),
    ],
)
def test_a_part_that_would_fail_in_a_run_is_refused(folder: Path, text: str, words: str):
    head = "from dataclasses import dataclass\nfrom optim.norms import Norm, Spectral, register_norm\n"
    head += "from data.tokenizer import Tokenizer, register_tokenizer\n"
    (folder / "mine.py").write_text(f"{head}{text}\n")
    with pytest.raises(Refusal, match=words):
        plugins.load(["mine"])


# ---- configurations


def test_plugins_are_left_out_of_a_text_that_has_none(tmp_path: Path):
    config = load([str(ROOT / "configs/quickstart.toml"), "--run.name", "x"])
    assert config.run.plugins == [] and "plugins" not in to_toml(config)
    assert config_class() is Config and type(config) is Config


@pytest.mark.parametrize(
    "options",
    [
        ["--run.plugins", "parts,other"],
        ["--run.plugins", "parts", "other", "--run.seed", "0"],
        ["--run.plugins", '["parts", "other"]'],
        ["--run.plugins=parts, other"],
        ["--run.plugins", "no_such", "--run.plugins", "parts,other"],
    ],
)
def test_the_command_line_names_plugins_as_a_user_would(folder: Path, options: list[str]):
    config = load([*options, "--run.name", "x", "--model.name", "wave", "--model.wave", "3"])
    assert config.run.plugins == ["parts", "other"] and vars(config.model)["wave"] == 3


def test_the_command_line_refuses_what_is_no_list_of_names():
    assert read_options(["--run.plugins", ""]) == {"run.plugins": []}
    for value in ("[1]", '["a"'):
        with pytest.raises(ConfigError, match=r'--run\.plugins\n  got: .*\n  allowed: a list of text, as \["a", "b"\]'):
            read_options(["--run.plugins", value])
    with pytest.raises(ConfigError, match=r"run\.plugins\n  got: 'parts'\n  allowed: a list of text"):
        from_dict(Config, {"run": {"plugins": "parts"}})


def test_plugins_of_the_command_line_replace_those_of_the_file(folder: Path):
    (folder / "c.toml").write_text('[run]\nplugins = ["no_such"]\n')
    assert load(["c.toml", "--run.plugins", "other"]).run.plugins == ["other"]
    with pytest.raises(ConfigError, match="'no_such', and there is no such module"):
        load(["c.toml"])


def test_a_configuration_has_the_settings_of_its_plugins(folder: Path):
    config = load(["louder.toml", "--run.name", "x"])
    assert isinstance(config, Config) and type(config) is config_class() is not Config
    assert (vars(config.model)["volume"], config.optim.norms.mlp, config.optim.direction) == (1.5, "Half", "fresh")
    assert config.baseline.share == 0.5 and set(vars(Config().baseline)) < set(vars(config.baseline))
    assert {f"model.{k}" for k in get_type_hints(get_type_hints(type(config))["model"])} <= configuration.flat(
        config
    ).keys()
    (folder / "again.toml").write_text(to_toml(config))
    assert load(["again.toml"]) == config == of_file(folder / "again.toml")
    assert "volume = 1.5" in to_toml(config) and "share" not in to_toml(config)
    model = build(from_dict(Config, {"model": vars(config.model) | {"vocab_size": 16, "logit_softcap": 9.0}}).model)
    assert type(model).__name__ == "Louder" and vars(model.config)["volume"] == 1.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.volume", "-1"], r"model\.volume\n  got: -1\.0\n  allowed: a finite number >= 0\n"),
        (["--model.volume", "13"], r"model\.volume\n  got: 13\.0\n  allowed: another number\n"),
        (
            ["--model.name", "gpt"],
            r"model\.volume\n  got: 1\.5\n  allowed: 1\.0 with model\.name = 'gpt'\n  fix: .*louder",
        ),
        (["--model.volum", "1"], r"unknown option --model\.volum\n.*\n.*\n  fix: nearest valid name: --model\.volume"),
        (["--baseline.share", "0.1"], r"baseline\.share\n  got: 0\.1\n  allowed: 0\.5 with optim\.name = 'dualized'"),
        (["--optim.norms.mlp", "Hal"], r"optim\.norms\.mlp\n  got: 'Hal'\n.*\n  fix: nearest valid name: Half"),
        (["--optim.direction", "frsh"], r"optim\.direction\n  got: 'frsh'\n.*\n  fix: nearest valid name: fresh"),
        (
            ["--optim.roles.mlp.direction", "nestrov"],
            r"optim\.roles\.mlp\.direction\n.*\n.*\n  fix: nearest .* nesterov",
        ),
        (
            ["--optim.norms.mlp", "Zzz"],
            r"fix: set it in the file, or --optim\.norms\.mlp, or name the plugin that has it",
        ),
    ],
)
def test_settings_of_plugins_are_checked_as_all_others(folder: Path, options: list[str], words: str):
    with pytest.raises(ConfigError, match=words):
        load(["louder.toml", "--run.name", "x", *options])


def test_a_part_without_its_plugin_is_answered_with_the_plugin_s_setting():
    with pytest.raises(ConfigError, match=r"unknown key model\.volume\n.*\n.*\n  fix: .*in run\.plugins"):
        from_dict(Config, {"model": {"volume": 2.0}})


def test_help_shows_the_settings_of_plugins(folder: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        load(["louder.toml", "--help"])
    shown = capsys.readouterr().out
    assert "--model.volume" in shown and "A factor of the embedding." in shown and "--baseline.share" in shown


def test_two_configurations_of_different_plugins_keep_their_own_settings(folder: Path):
    """A study reads both in one process; each run's process reads its own alone."""
    first = load(["louder.toml", "--run.name", "x"])
    second = from_dict(Config, {"run": {"plugins": ["other"]}, "model": {"name": "wave", "wave": 2}})
    third = load(["louder.toml", "--run.name", "x"])
    assert configuration.flat(first) == configuration.flat(third), "with the defaults of what came later"
    assert to_toml(first) == to_toml(third) and "wave" not in to_toml(third)
    assert "volume" not in to_toml(second) and "wave = 2" in to_toml(second)
    assert "volume" not in to_toml(from_dict(Config, {}))


def test_an_earlier_version_s_model_is_not_guessed_by_a_plugin_s_settings(folder: Path):
    config = from_dict(Config, {"run": {"name": "x", "plugins": ["parts"]}, "model": {"volume": 2.0}})
    with pytest.raises(ConfigError, match=r"model\.volume\n.*\n.*model\.name = 'gpt'\n  fix: --model\.name louder"):
        config.check()


# ---- runs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/louder: a model, a norm, directions and a tokenizer of a plugin."""
    root = tmp_path_factory.mktemp("plugins with spaces")
    (root / "parts.py").write_text(PARTS)
    (root / "other.py").write_text(OTHER)
    (root / "louder.toml").write_text(LOUDER)
    (root / "text.txt").write_text(TEXT)
    small_dataset(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "path", [*sys.path])
        before = [dict(r) for r in REGISTRIES]
        options = ["--plugin", "parts", "--tokenizer", "nibbles", "--out", "corpora/nibbles"]
        assert prepare.main(["text", "text.txt", *options]) == 0
        for registry, content in zip(REGISTRIES, before, strict=True):
            registry.clear()
            registry.update(content)
        del sys.modules["parts"]
    code, _, err = run(root, "louder.toml", "--run.name", "louder")
    assert code == 0, err
    return root


def test_a_tokenizer_of_a_plugin_is_known_with_the_plugin_alone(root: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        prepare.main(["text", str(root / "text.txt"), "--tokenizer", "nibbles"])
    assert "invalid choice: 'nibbles'" in capsys.readouterr().err
    assert prepare.main(["text", str(root / "text.txt"), "--plugin", "no_such"]) == 2
    assert "error: --plugin\n  got: 'no_such', and there is no such module" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        (
            ".reshape(-1).astype(np.uint16)",
            ".reshape(-1).tolist()",
            "encode of the tokenizer nibbles\n  got: list\n  allowed: a NumPy array (n,) of integers\n  fix: return np.array",
        ),
        (".reshape(-1).astype(np.uint16)", "", ", 2) uint8\n"),
        ("codes & 15", "codes & 15 | 16", "got: tokens from "),
        (
            '.decode(errors="replace")',
            "",
            "decode of the tokenizer nibbles\n  got: bytes\n  allowed: str\n  fix: .decode(",
        ),
        ("np.tile([0, 1], 8)", "[0, 1] * 8", "byte_lengths of the tokenizer nibbles\n  got: list\n"),
        ("np.tile([0, 1], 8)", "np.tile([0, 1], 4)", "got: an array (8,) int64\n  allowed: a NumPy array (16,) of int"),
    ],
)
def test_a_tokenizer_s_methods_are_checked_when_it_is_first_used(
    folder: Path, right: str, wrong: str, words: str, capsys: pytest.CaptureFixture[str]
):
    """By data.prepare, which leaves nothing behind; and on the prompt, before a run or a sample begins."""
    assert right in PARTS
    (folder / "parts.py").write_text(PARTS.replace(right, wrong))
    (folder / "text.txt").write_text(TEXT)
    options = ["--plugin", "parts", "--tokenizer", "nibbles", "--out", "corpora/nibbles"]
    assert prepare.main(["text", "text.txt", *options]) == 2
    assert words in capsys.readouterr().err and not (folder / "corpora").exists()
    with pytest.raises(Refusal) as error:
        TOKENIZERS["nibbles"]().encode_prompt("A", option="--prompt")
    assert words in str(error.value)


def test_a_run_says_which_plugins_it_had(root: Path):
    summary = json.loads((root / "runs/louder/summary.json").read_text())
    assert list(summary["plugins"]) == ["parts"] and len(summary["plugins"]["parts"]) == 64
    assert 'plugins = ["parts"]' in (root / "runs/louder/config.toml").read_text()
    assert "Half" in (root / "runs/louder/receipt.txt").read_text()


def test_a_run_with_plugins_samples_and_resumes_to_the_same_weights(root: Path):
    code, out, err = run(root, "runs/louder", "--tokens", "4", script="sample.py")
    assert code == 0 and out, err
    shutil.copytree(root / "runs/louder", root / "runs/cut")
    shutil.rmtree(root / "runs/cut/checkpoints/step_00000006")
    code, out, err = run(root, "runs/louder/config.toml", "--run.name", "cut", "--run.resume")
    assert code == 0 and "at step 3" in out and "another file" not in err, err
    files = [next((root / f"runs/{n}/checkpoints/step_00000006/model").iterdir()) for n in ("louder", "cut")]
    ends = [load_file(file) for file in files]
    assert all(torch.equal(ends[1][name], weight) for name, weight in ends[0].items())


def test_a_plugin_that_changed_or_went_is_noted_or_refused_and_nothing_is_lost(root: Path):
    assert run(root, "louder.toml", "--run.name", "later")[0] == 0
    saved = sorted((root / "runs/later/checkpoints").iterdir())
    (root / "parts.py").rename(root / "away.py")
    try:
        code, _, err = run(root, "runs/later/config.toml", "--run.resume", "--train.steps", "7")
        assert code == 2 and "error: run.plugins\n  got: 'parts', and there is no such module" in err
        code, _, err = run(root, "runs/later", script="sample.py")
        assert code == 2 and "error: run.plugins\n  got: 'parts', and there is no such module" in err
        assert sorted((root / "runs/later/checkpoints").iterdir()) == saved
        (root / "parts.py").write_text(PARTS + "\n# changed\n")
        code, _, err = run(root, "runs/later/config.toml", "--run.resume", "--train.steps", "7")
        assert code == 0 and err.count("note: parts is another file than this run has had so far") == 1
        code, _, err = run(root, "runs/later/config.toml", "--run.resume", "--train.steps", "8")
        assert code == 0 and "another file" not in err, "it is noted once"
    finally:
        (root / "away.py").replace(root / "parts.py")


def test_the_list_of_a_plugin_s_files_has_what_it_imports_of_the_user_s_own(folder: Path):
    """Of packages too, in functions and relatively; ours, Python's and the libraries' files are not in it."""
    (folder / "kit").mkdir()
    (folder / "kit/__init__.py").write_text("")
    (folder / "kit/inner.py").write_text("from . import deep\nfrom .deep import x\n")
    (folder / "kit/deep.py").write_text("x = 1\n")
    (folder / "late.py").write_text("import json, numpy\n")
    (folder / "user.py").write_text(
        "import torch\nimport optim.norms\nimport kit.inner\ndef f():\n    import late\nf()\n"
    )
    plugins.load(["user"])
    names = ["kit", "kit.deep", "kit.inner", "late", "user"]
    assert sorted(plugins.source_files(["user"])) == sorted(plugins.digests(["user"])) == names
    assert list(plugins.source_files(["user"]))[-1] == "user", "behind what it imports"
    before = plugins.digests(["user"])
    (folder / "kit/deep.py").write_text("x = 2\n")
    after = plugins.digests(["user"])
    assert [name for name in names if before[name] != after[name]] == ["kit.deep"]
    run_of_user = Run("a", from_dict(Config, {"run": {"plugins": ["user"]}}), 1, "")
    texts = plugin_texts([run_of_user])
    assert sorted(texts) == ["kit/__init__.py", "kit/deep.py", "kit/inner.py", "late.py", "user.py"]
    assert texts["kit/deep.py"] == "x = 2\n"


def test_a_list_of_a_plugin_s_settings_is_kept_when_it_is_empty_and_typed_from_options(folder: Path):
    (folder / "lists.py").write_text(
        "from typing import Annotated\nimport torch\nfrom optim import register_baseline\n"
        "from optim.settings import Help\n"
        "@register_baseline('listed')\ndef listed(model, norm, *, lr, xs: Annotated[list[float], Help('x')] = [1.0],\n"
        "    ns: Annotated[list[int], Help('n')] = []):\n    return torch.optim.SGD(model.parameters(), lr=lr)\n"
    )
    raw = {"run": {"plugins": ["lists"]}, "optim": {"name": "listed"}, "baseline": {"xs": []}}
    text = to_toml(from_dict(Config, raw))
    assert "xs = []" in text and "\nns = " not in text
    (folder / "lists.toml").write_text(text)
    assert vars(of_file(folder / "lists.toml").baseline)["xs"] == []
    for option in ("1,2", "[1, 2]", "[1.0, 2.0]"):
        assert read_options(["--baseline.xs", option]) == {"baseline.xs": [1.0, 2.0]}
    assert read_options(["--baseline.ns", "1", "2"]) == {"baseline.ns": [1, 2]}
    for option in ("1,b", "[1, true]"):
        with pytest.raises(ConfigError, match="allowed: a list of finite numbers\n"):
            read_options(["--baseline.xs", option])
    with pytest.raises(ConfigError, match="allowed: a list of integers\n"):
        read_options(["--baseline.ns", "1.5"])


def test_two_ranks_train_with_a_plugin_as_one_does(root: Path):
    codes = run_ranks(root, 2, "louder.toml", "--run.name", "two")
    assert [code for code, *_ in codes] == [0, 0], codes
    one, two = (json.loads((root / f"runs/{n}/summary.json").read_text()) for n in ("louder", "two"))
    assert two["val_loss"] == pytest.approx(one["val_loss"], abs=1e-4) and two["plugins"] == one["plugins"]


def test_two_ranks_refuse_a_missing_plugin_alike(root: Path):
    ends = run_ranks(root, 2, "louder.toml", "--run.name", "none", "--run.plugins", "no_such")
    assert [code for code, *_ in ends] == [2, 2] and not (root / "runs/none").exists()
    assert "no such module" in ends[0][2] and not ends[1][2], "told once"


def test_a_baseline_of_a_plugin_trains(root: Path):
    options = ("--optim.name", "halved_sgd", "--baseline.share", "0.25", "--optim.lr", "0.5")
    (root / "halved.toml").write_text(
        LOUDER.replace('direction = "fresh"\n', "").replace('[optim.roles.attention]\ndirection = "nesterov"\n', "")
    )
    code, _, err = run(root, "halved.toml", "--run.name", "halved", *options)
    assert code == 0, err
    assert "share = 0.25" in (root / "runs/halved/config.toml").read_text()


# ---- studies


def test_entries_with_different_plugins_are_compared(
    root: Path, monkeypatch: pytest.MonkeyPatch, registries: None, tmp_path: Path
):
    """Each run's process imports its own plugins alone."""
    monkeypatch.chdir(root)
    (root / "wave.toml").write_text(
        LOUDER.replace('"parts"', '"other"')
        .replace('"louder"\nvolume = 1.5', '"wave"\nwave = 2')
        .replace("nibbles", "small")
        .partition("[optim]")[0]
        + "[train]\nsteps = 2\nbatch_size = 4\neval_tokens = 256\n"
    )
    loaded = entries.load(["louder.toml", "wave.toml"], ["--data.dataset", "corpora/small"], allow_different=False)
    (note,) = loaded[1].notes
    assert "model.name wave (louder)" in note and "model.volume 1 (1.5)" in note and "plugins" not in note
    jobs = [e.job(e.name, tmp_path / "study", **{"train.steps": 2}) for e in loaded]
    runs.execute(jobs, tmp_path / "study", workers=runs.places(2), costs=[1, 1], say=lambda _: None)
    summaries = [runs.summary(tmp_path / "study" / e.name) for e in loaded]
    assert [list(s["plugins"]) for s in summaries if s] == [["parts"], ["other"]]
    assert all(runs.done(job, tmp_path / "study") for job in jobs)
    lines = [json.loads(line) for line in (tmp_path / "study/runs.jsonl").read_text().splitlines()]
    assert ["model.wave" in line["settings"] for line in lines] == [line["run"] == "wave" for line in lines]
    for job in jobs:
        shutil.rmtree(tmp_path / "study" / job.name)
    said: list[str] = []
    runs.execute(jobs, tmp_path / "study", workers=runs.places(2), costs=[1, 1], say=said.append)
    assert said[0].startswith("2 runs restored from ")
    assert [runs.summary(tmp_path / "study" / e.name) for e in loaded] == summaries


def test_a_study_notes_that_a_plugin_changed_between_its_runs():
    summary = {"commit": "c", "dirty": False, "torch": "2"}
    both = [summary | {"plugins": {"parts": digest}} for digest in ("one", "other")]
    assert runs.versions(both)["note"] == "the judged runs are of 2 versions of the plugin parts"
    assert runs.versions([both[0], summary])["note"] is None


def test_a_record_keeps_the_file_of_a_plugin_as_it_was(root: Path, monkeypatch: pytest.MonkeyPatch, registries: None):
    monkeypatch.chdir(root)
    path = root / "runs/louder"
    judged = Run("louder", of_file(path / "config.toml"), 1, "", path)
    assert plugin_texts([judged]) == {"parts.py": PARTS}
    monkeypatch.setattr("studies.record_book.provenance.digests", lambda names: dict.fromkeys(names, "another"))
    with pytest.raises(RecordError, match="the plugin parts\n  got: a file that has changed since louder\n"):
        plugin_texts([judged])


def test_a_record_is_checked_with_its_own_plugins(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None, capsys: pytest.CaptureFixture[str]
):
    """parts.py is in the record's folder alone."""
    record, elsewhere = tmp_path / "record", tmp_path / "elsewhere"
    for new in (record, elsewhere):
        new.mkdir()
    (elsewhere / "corpora").symlink_to(root / "corpora")
    monkeypatch.chdir(elsewhere)
    (record / "parts.py").write_text(PARTS)
    (record / "louder.toml").write_text((root / "runs/louder/config.toml").read_text())
    summary = json.loads((root / "runs/louder/summary.json").read_text())
    loss = summary["val_loss"]
    entry = {"name": "louder", "config": "louder.toml", "seeds": [0], "n": 1, "mean": loss, "losses": [loss]}
    entry |= {k: summary[k] for k in ("torch", "device", "train_seconds")}
    corpus = read_manifest(root / "corpora/nibbles").sha256
    content = {"corpus_sha256": corpus, "hardware": summary["hardware"], "entries": [entry]}
    (record / "record.json").write_text(json.dumps(content))
    assert check_record(record, entry=None, seeds=None, workers=1, out=tmp_path / "out"), capsys.readouterr().out
    assert "louder" in capsys.readouterr().out and sys.path[0] == str(record)


def test_a_record_without_plugins_imports_nothing_of_its_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None
):
    monkeypatch.chdir(root)
    (tmp_path / "plain.toml").write_text('[data]\ndataset = "corpora/small"\n')
    content = {"corpus_sha256": "another", "entries": [{"name": "plain", "config": "plain.toml"}]}
    (tmp_path / "record.json").write_text(json.dumps(content))
    with pytest.raises(RecordError, match="the data of corpora/small"):
        check_record(tmp_path, entry=None, seeds=None, workers=1, out=tmp_path / "out")
    assert str(tmp_path) not in sys.path


def test_a_study_refuses_results_of_another_file_of_its_plugin(folder: Path):
    config = from_dict(Config, {"run": {"plugins": ["parts"], "name": "a"}})
    wanted, path = runs.Job("a", config), folder / "study" / "a"
    path.mkdir(parents=True)
    (path / "config.toml").write_text(to_toml(config))
    digests = plugins.digests(["parts"])
    (path / "summary.json").write_text(json.dumps({"plugins": digests}))
    assert runs.done(wanted, folder / "study")
    (path / "summary.json").write_text(json.dumps({"plugins": dict.fromkeys(digests, "0")}))
    with pytest.raises(runs.StudyError, match="got: another file of the plugin parts than this run had"):
        runs.done(wanted, folder / "study")
