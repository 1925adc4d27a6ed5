"""Each setting has one declaration; earlier versions' keys, roles, --help and docs/settings.md follow from it."""

import ast
import inspect
import json
import tomllib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
from optim import Dualized, register_baseline
from optim.baselines import BASELINES
from optim.errors import Refusal
from optim.norms import NORMS, RMSToRMS
from optim.polar import SCHEDULES, Polar
from optim.roles import RoleMasses, RoleNorms
from optim.schedules import Schedule
from optim.settings import Help, OneOf, Range, StepSettings, allowed, by_role, help_texts, hints_of
from training import config as configuration
from training.config import Config, ConfigError, flat, from_dict, load, to_toml
from training.help import page
from training.migrate import DROPPED, EARLIER_DEFAULTS, RENAMED, migrate
from training.resume import keep_choices

from tests.helpers import ROOT, run, small_dataset

PRODUCT = [p for p in ROOT.rglob("*.py") if not {".venv", "tests", "records", "build"} & set(p.relative_to(ROOT).parts)]


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


# ---- one declaration


def defaults(path: Path) -> Iterator[tuple[str, str]]:
    """(owner, name) of what has its own default: annotated fields of classes, parameters of functions and methods."""
    tree = ast.parse(text_of(path))
    owners = {id(inner): node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for inner in node.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and id(node) in owners and node.value is not None:
            yield owners[id(node)], ast.unparse(node.target)
        if isinstance(node, ast.FunctionDef):
            spec = node.args
            named = [*spec.posonlyargs, *spec.args]
            pairs = [*zip(named[len(named) - len(spec.defaults) :], spec.defaults, strict=True)]
            pairs += [(a, d) for a, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if d is not None]
            for argument, default in pairs:
                if not isinstance(default, ast.Attribute):  # lr=StepSettings.lr is a reference
                    yield owners.get(id(node), node.name), argument.arg


# Arguments of other things that have the name of a setting.
OTHERS = {
    ("scale", "optim/norms.py", "Spectral"),
    ("scale", "optim/norms.py", "RMSToRMS"),
    ("weight_decay", "optim/normalized.py", "Normalized"),
    ("scaling", "optim/baselines.py", "Recipe"),
    ("scaling", "optim/baselines.py", "register_baseline"),
}


def test_a_setting_of_a_step_or_of_a_baseline_has_one_declaration():
    """Of a baseline's own: once in each that takes it, alike (register_baseline)."""
    owners = {(f.name, "optim/settings.py", "StepSettings") for f in fields(StepSettings)}
    owners |= {
        (key, f"{made.build.__module__.replace('.', '/')}.py", name)
        for name, made in BASELINES.items()
        for key in made.own
    }
    names = {key for key, *_ in owners}
    found = {
        (name, str(path.relative_to(ROOT)), owner)
        for path in PRODUCT
        for owner, name in defaults(path)
        if name in names
    }
    assert found - OTHERS == owners


def declarations(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(key, type with range and marks, help text) of every setting of a section and those below it."""
    for key, hint in hints_of(cls).items():
        if is_dataclass(hint):
            yield from declarations(hint, f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{key}", hint, help_texts(cls).get(key, "")


def parts(hint: Any) -> Iterator[Any]:
    """What a type is made of, its marks among it."""
    yield hint
    for inner in (*getattr(hint, "__metadata__", ()), *get_args(hint)):
        if not isinstance(inner, str):
            yield from parts(inner)


# What is not said of a text or a number by a registry or a range, and why.
FREE = {
    "run.name": "a name that is made where none is given",
    "run.dir": "any folder",
    "run.plugins": "any modules",
    "data.dataset": "any folder",
    "train.sample_prompt": "any text",
    "optim.polar.schedule": "polar.py stands in exported scripts without settings.py: its text has the names",
}


def test_every_setting_has_its_text_and_its_range():
    texts = {key: text for key, _, text in declarations(Config)}
    assert texts.keys() == flat(Config()).keys() and [key for key, text in texts.items() if len(text) <= 8] == []
    free = set()
    for key, hint, _ in declarations(Config):
        made = [*parts(hint)]
        kind = Range if int in made or float in made else OneOf if str in made else None
        if kind is not None and not any(isinstance(m, kind) for m in made):
            free.add(key)
    assert free == FREE.keys()


def test_the_text_of_a_polar_schedule_has_all_names():
    text = help_texts(Polar)["schedule"]
    assert all(f'"{name}"' in text for name in ("exact", *SCHEDULES))


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Annotated[str, OneOf({"a": 1, "b": 2})] | None, '"a", "b"; or left out'),  # type: ignore[operator]
        (Annotated[str, OneOf({"a": 1})] | None, '"a" or left out'),  # type: ignore[operator]
        (Literal["a", "b"] | None, '"a", "b"; or left out'),
        (bool, "true or false"),
        (list[str], 'a list of text, as ["a", "b"]'),
        (bool | None, "true or false; or left out"),
        (bool | Literal["auto"], 'true, false or "auto"'),
        (Annotated[int, Range(1)] | None, "an integer >= 1 or left out"),  # type: ignore[operator]
        (Annotated[int, Range(0, 8, closed=True)], "an integer x with 0 <= x <= 8"),
        (Annotated[float, Range(0, 2**63)], "a number x with 0 <= x < 2**63"),
        (Annotated[float | Literal["auto"], Range(0)], 'a finite number >= 0 or "auto"'),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_allowed_is_said_in_words(hint: Any, words: str):
    assert allowed(hint) == words


def test_a_norm_that_is_registered_is_one_that_a_role_can_have(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(NORMS, "Mine", RMSToRMS)
    assert '"Frobenius", "Mine"' in allowed(hints_of(RoleNorms)["mlp"])
    raw = {"run": {"name": "x"}, "optim": {"norms": {"mlp": "Mine"}}}
    from_dict(Config, raw).check()


# ---- earlier versions

BEFORE_NAMES = """
[model]
n_layer = 1
n_head = 1
n_embd = 8
block_size = 8
ngram = 3
[optim]
lr = 0.5
schedule = "cosine"
warmup = 3
cooldown = 0.9
cooldown_power = 1.2
auto_initial = 0.2
auto_factor = 0.4
beta_low = 0.5
beta_warmup = 0.1
beta_cooldown = 0.2
scaling = "standard"
auxiliary_lr = 1.0
floor = 0.0
[optim.masses]
ngram = 3.0
"""


def test_a_run_of_an_earlier_version_is_read_with_the_keys_of_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "c.toml"
    file.write_text(BEFORE_NAMES)
    config = load([str(file), "--schedule.warmup", "4"])
    assert config.schedule == Schedule(
        shape="cosine", warmup=4.0, cooldown=0.9, power=1.2, beta_low=0.5, beta_warmup=0.1, beta_cooldown=0.2
    )
    assert (config.optim.auto.initial, config.optim.auto.factor, config.model.name) == (0.2, 0.4, "ngram")
    told = capsys.readouterr().err
    assert told.startswith(
        f"note: {file} is of an earlier version: optim.floor = 0.0, which did nothing, is left out; "
    )
    assert all(f"{old} is {new}" in told for old, new in RENAMED.items()) and told.count("\n") == 1
    assert configuration.of_file(file) == replace(
        config, schedule=replace(config.schedule, warmup=3.0), run=replace(config.run, name=None)
    )
    assert capsys.readouterr().err == "", "a study that reads a run folder says nothing"
    (tmp_path / "now.toml").write_text(to_toml(config))
    assert load([str(tmp_path / "now.toml")]) == config and not capsys.readouterr().err


def test_every_renamed_key_is_one_of_now_and_no_key_of_now_is_an_old_one():
    keys = flat(Config())
    assert set(RENAMED.values()) <= keys.keys() and not (RENAMED.keys() | DROPPED.keys()) & keys.keys()


def test_a_checkpoint_of_an_earlier_version_is_read():
    raw = {"optim": {"lr": 2.0, "cooldown": 0.3}, "train": {"steps": 7}}
    config = from_dict(Config, raw)
    assert (config.optim.lr, config.schedule.cooldown) == (2.0, 0.3) and raw["optim"] == {"lr": 2.0, "cooldown": 0.3}


@pytest.mark.parametrize("path", sorted((ROOT / "records").rglob("*.toml")), ids=lambda p: p.stem)
def test_every_record_loads(path: Path):
    old, new = tomllib.loads(text_of(path)), flat(load([str(path)]))
    baseline = BASELINES.get(old["optim"]["name"])
    for key, value in old["optim"].items():
        if baseline and f"optim.{key}" in EARLIER_DEFAULTS:
            assert key not in baseline.hints, "its default may be another one now"
        elif not isinstance(value, dict) and f"optim.{key}" not in DROPPED:
            assert new[RENAMED.get(f"optim.{key}", f"optim.{key}")] == value
    assert "direction" in old["optim"], "a record names its direction, whatever the default is now"
    record = json.loads(text_of(path.parent / "record.json"))
    assert path.name in {e["config"] for e in record["entries"]}


def test_a_baselines_run_of_before_the_default_direction_changed_is_one_of_now():
    def read(name: str, direction: str) -> Config:
        return from_dict(Config, {"run": {"name": "x"}, "optim": {"name": name, "lr": 0.1, "direction": direction}})

    for name in BASELINES:
        before, now = read(name, "nesterov"), read(name, Config().optim.direction)
        before.check()
        assert before == now and keep_choices(now, Path("runs/x"), {"config": nested(before)}) == []
    with pytest.raises(
        ConfigError, match="optim.direction\n  got: 'soap'\n  allowed: 'factored' with optim.name = 'sgd'"
    ):
        read("sgd", "soap").check()
    assert read("dualized", "nesterov").optim.direction == "nesterov"


def test_a_run_of_before_the_default_direction_changed_resumes_with_its_own():
    """Its folder names the direction, as every folder does, so that no other is taken unasked."""
    before = from_dict(Config, {"optim": {"direction": "nesterov"}})
    for config in (before, Config()):
        assert f'direction = "{config.optim.direction}"' in to_toml(config)
    saved = {"config": nested(before)}
    again = from_dict(Config, tomllib.loads(to_toml(before)))
    assert keep_choices(again, Path("runs/x"), saved) == [] and again.optim.direction == "nesterov"
    with pytest.raises(
        ConfigError,
        match="optim.direction of a resumed run\n  got: 'factored'\n  allowed: 'nesterov', as runs/x has it\n"
        "  fix: resume with runs/x/config.toml",
    ):
        keep_choices(Config(), Path("runs/x"), saved)


def test_what_cannot_be_read_truthfully_is_refused():
    with pytest.raises(
        ConfigError, match="optim.floor\n  got: 0.3\n  allowed: 0.0, which did nothing: .*\n  fix: the commit"
    ):
        migrate({"optim": {"floor": 0.3}})
    with pytest.raises(
        ConfigError,
        match="optim.warmup\n  got: 0.1, beside schedule.warmup = 0.2\n  allowed: schedule.warmup alone\n  fix: leave",
    ):
        migrate({"optim": {"warmup": 0.1}, "schedule": {"warmup": 0.2}})
    with pytest.raises(ConfigError, match="schedule\n  got: 'wsd'\n  allowed: a section"):
        from_dict(Config, {"schedule": "wsd"})


def test_an_old_option_is_refused_with_the_key_of_now():
    for old, new in RENAMED.items():
        with pytest.raises(ConfigError) as error:
            load(["--run.name", "x", f"--{old.replace('_', '-')}", "1"])
        assert str(error.value).startswith(f"unknown option --{old.replace('_', '-')}\n")
        assert f"  fix: it is --{new.replace('_', '-')} now" in str(error.value)


# ---- roles


def test_roles_are_set_in_a_file_and_on_the_command_line(tmp_path: Path):
    file = tmp_path / "c.toml"
    file.write_text('[optim.roles.bias]\ndirection = "adam"\nbeta = 0.9\n')
    config = load([str(file), "--run.name", "x", "--optim.roles.head.weight-decay", "0.1"])
    assert config.optim.roles.given() == {
        "bias": {"direction": "adam", "beta": 0.9},
        "head": {"weight_decay": 0.1},
    }
    file.write_text(text := to_toml(config))
    assert load([str(file)]) == config
    assert "[optim.roles.bias]" in text and "[optim.roles.gain]" not in text and "[optim.roles]" not in text
    assert Config().optim.roles.given() == {}


def test_roles_are_those_of_the_masses_and_have_what_declarations_say():
    assert set(vars(Config().optim.roles)) == {f.name for f in fields(RoleMasses)}
    for role in vars(Config().optim.roles).values():
        assert list(vars(role)) == [*by_role(), "beta_half_life", "beta2_half_life"]
    assert by_role() == ["direction", "beta", "beta2", "weight_decay"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim.roles.bias]\nbeta = 1.0", "optim.roles.bias.beta\n  got: 1.0\n  allowed: a number x with 0 <= x < 1 or left out\n  fix: "),
        ("[optim.roles.bias]\ndirection = 'sam'", "optim.roles.bias.direction\n  got: 'sam'\n  allowed: \"momentum\", \"nesterov\", "),
        ("[optim.roles.bias]\nscale = 'dual'", "unknown key optim.roles.bias.scale\n  got: scale\n  allowed: direction, beta, "),
        ("[optim.roles.biases]\nbeta = 0.5", "unknown key optim.roles.biases\n  got: biases\n  allowed: embedding, ngram, match, "),
        (
            "[optim]\nname = 'adamw'\n[optim.roles.bias]\nbeta = 0.5",
            "optim.roles.bias.beta\n  got: 0.5\n  allowed: left out with optim.name = 'adamw', which does not take it",
        ),
    ],
)  # fmt: skip
def test_what_a_role_cannot_have_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load([str(tmp_path / "c.toml")])
    assert message in str(error.value)


def trained(root: Path, *argv: str) -> tuple[int, str]:
    roles = ("--optim.roles.head.direction", "adam", "--optim.roles.head.beta", "0.5")
    code, _, err = run(root, "small.toml", "--schedule.beta-cooldown", "1", "--run.name", "roles", *roles, *argv)
    return code, err


def test_a_run_steps_a_role_by_its_own_settings_and_resumes_with_them(tmp_path: Path):
    small_dataset(tmp_path)
    code, err = trained(tmp_path, "--train.sample-tokens", "0", "--train.steps", "4")
    assert code == 0, err

    def groups(step: int) -> dict[str | None, dict]:
        state = json.loads((tmp_path / f"runs/roles/checkpoints/step_{step:08d}/state.json").read_text())
        return {g.get("role"): g for g in state["param_groups"]}

    head, others = groups(4)["head"], groups(4)[None]
    assert head["param_names"] == ["head.weight"] and len(others["param_names"]) == 13
    assert (head["direction"], others["direction"]) == ("adam", "factored")
    last = Schedule(beta_cooldown=1.0)
    assert head["beta"] == last.beta_at(3, 4, beta=0.5) and others["beta"] == last.beta_at(3, 4, beta=0.95)
    code, err = trained(tmp_path, "--train.steps", "5", "--run.resume", "--optim.roles.head.weight-decay", "0.1")
    assert code == 0, err
    assert (groups(5)["head"]["weight_decay"], groups(5)[None]["weight_decay"]) == (0.1, 0.0)
    assert groups(5)["head"]["beta"] == last.beta_at(4, 5, beta=0.5)
    assert "changed: optim.roles.head.weight_decay = 0.1, was None" in (tmp_path / "runs/roles/log.txt").read_text()
    code, err = trained(tmp_path, "--run.name", "gains", "--optim.roles.gain.beta", "0.5")
    message = "error: optim.roles.gain\n  got: a role that no weight of this model has\n  allowed: embedding, attention, mlp, head\n"
    assert code == 2 and message in err


# ---- baselines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nname = 'sgd'\ncautious = true", "optim.cautious\n  got: True\n  allowed: False with optim.name = 'sgd', which does not take it\n  fix: "),
        ("[optim]\nname = 'adamw'\n[optim.auto]\ninitial = 0.3", "optim.auto.initial\n  got: 0.3\n  allowed: 0.1 with optim.name = 'adamw'"),
        ("[optim]\nname = 'sgd'\n[baseline]\nauxiliary_lr = 2.0", "baseline.auxiliary_lr\n  got: 2.0\n  allowed: 1.0 with optim.name = 'sgd'"),
        ("[optim]\nname = 'muon_adamw'\n[baseline]\nauxiliary_lr = 0.0", "baseline.auxiliary_lr\n  got: 0.0\n  allowed: a finite number > 0"),
    ],
)  # fmt: skip
def test_what_a_baseline_does_not_take_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load([str(tmp_path / "c.toml")])
    assert message in str(error.value)


def test_what_one_baseline_takes_is_not_taken_by_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(BASELINES, "careful", replace(BASELINES["sgd"], name="careful", build=careful))
    for section in ({"lr": 0.1, "beta": 0.5, "beta2": 0.5, "weight_decay": 0.1, "max_grad_norm": 1.0}, {"lr": 0.2}):
        from_dict(Config, {"run": {"name": "x"}, "optim": {"name": "sgd", **section}}).check()
    raw = {"run": {"name": "x"}, "optim": {"name": "careful", "cautious": True}}
    from_dict(Config, raw).check()
    raw["optim"]["name"] = "sgd"
    with pytest.raises(ConfigError, match="optim.cautious\n  got: True\n  allowed: False with optim.name = 'sgd'"):
        from_dict(Config, raw).check()


def careful(model, norm, *, lr: float, beta: float, cautious: bool) -> Any: ...


def test_a_baselines_parameters_are_its_declaration(monkeypatch: pytest.MonkeyPatch):
    assert {name: set(made.hints) for name, made in BASELINES.items()} == {
        "normalized_adam": {"lr", "beta", "beta2", "weight_decay"},
        "normalized_sgd": {"lr", "beta", "weight_decay"},
        "adamw": {"lr", "beta", "beta2", "weight_decay"},
        "muon_adamw": {"lr", "beta", "weight_decay", "auxiliary_lr", "polar"},
        "sgd": {"lr", "beta", "weight_decay", "scaling"},
        "schedule_free_adamw": {"lr", "beta", "beta2", "weight_decay"},
        "prodigy": {"lr", "beta", "beta2", "weight_decay", "d_coef", "safeguard_warmup"},
        "normuon": {"lr", "beta", "beta2", "weight_decay", "auxiliary_lr", "polar"},
        "soap": {"lr", "beta", "beta2", "weight_decay", "refresh_every"},
        "adafactor": {"lr", "weight_decay"},
    }
    assert set(vars(Config().baseline)) == {"auxiliary_lr", "scaling", "d_coef", "safeguard_warmup"}
    monkeypatch.setattr("optim.baselines.BASELINES", dict(BASELINES))
    with pytest.raises(Refusal, match="register_baseline: rho of sam\n  got: a setting without default or help text"):

        @register_baseline("sam")
        def sam(model, norm, *, lr: float, rho: float = 0.1) -> Any: ...

    with pytest.raises(Refusal, match="register_baseline: scaling of sam\n  got: another declaration than another"):

        @register_baseline("sam")
        def other(model, norm, *, lr: float, scaling: Annotated[float, Range(0), Help("How far.")] = 0.1) -> Any: ...

    with pytest.raises(
        Refusal, match='sgd: scaling\n  got: \'mup\'\n  allowed: "standard", "ntk", "modular"\n  fix: sgd'
    ):
        BASELINES["sgd"](None, None, lr=1.0, scaling="mup")  # type: ignore[arg-type]


# ---- help


def test_help_shows_every_text_and_range(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        load([str(ROOT / "configs/race/adamw.toml"), "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Train one model, as a configuration file says." in shown
    for section in (StepSettings, Schedule, type(Config().train), type(Config().run), type(Config().baseline), Polar):
        for key, text in help_texts(section).items():
            assert " ".join(text.split()) in shown, key
    assert "--optim.roles.bias.beta {None}|FLOAT" in shown and "(default: 0.0036)" in shown
    assert "Allowed: a number x with 0 <= x < 1. (default: 0.7)" in shown


def test_the_page_of_settings_is_that_of_the_code():
    """`python -m training.help > docs/settings.md`."""
    assert text_of(ROOT / "docs/settings.md") == page(Config())


# ---- what a resumed run may change


def resumed(before: Config, **changes: object) -> list[str]:
    raw = {"config": json.loads(json.dumps(nested(before)))}
    now = nested(before)
    for key, value in changes.items():
        configuration.put(now, key.replace("__", "."), value)
    return keep_choices(from_dict(Config, now), Path("runs/x"), raw)


def nested(config: Config) -> dict:
    raw: dict = {}
    for key, value in flat(config).items():
        if value is not None:
            configuration.put(raw, key, value)
    return raw


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__direction": "soap"},
        {"optim__momentum_dtype": "bfloat16"},
        {"optim__master_weights": False},
        {"optim__lr": "auto"},
        {"optim__name": "adamw"},
        {"optim__param_dtype": "bfloat16"},
        {"run__seed": 1},
        {"model__dropout": 0.1},
        {"optim__roles__bias__direction": "adam"},
    ],
    ids=str,
)
def test_what_decides_buffers_model_and_batches_is_refused(changes: dict):
    (key,) = changes
    with pytest.raises(
        ConfigError, match=f"{key.replace('__', '.')} of a resumed run\n  got: .*\n  allowed: .*, as runs/x has it"
    ):
        resumed(Config(), **changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optim__beta": 0.8}, "changed: optim.beta = 0.8, was 0.95"),
        ({"schedule__cooldown": 0.2}, "changed: schedule.cooldown = 0.2, was 0.5"),
        ({"baseline__scaling": "ntk"}, "changed: baseline.scaling = 'ntk', was 'standard'"),
        ({"optim__roles__bias__beta": 0.8}, "changed: optim.roles.bias.beta = 0.8, was None"),
        ({"train__log_every": 3}, None),
    ],
    ids=str,
)
def test_what_else_differs_is_told(changes: dict, told: str | None):
    assert resumed(Config(), **changes) == ([told] if told else [])


@pytest.mark.parametrize("key", ["optim.direction", "optim.roles.bias.direction"])
def test_directions_of_the_same_buffers_may_follow_each_other(key: str):
    before = from_dict(Config, {"optim": {"direction": "nesterov"}})
    told = f"changed: {key} = 'momentum', was {flat(before)[key]!r}"
    assert resumed(before, **{key.replace(".", "__"): "momentum"}) == [told]


def test_a_role_that_was_apart_is_not_joined_again():
    before = from_dict(Config, {"optim": {"roles": {"bias": {"beta": 0.5}}}})
    now = nested(before)
    del now["optim"]["roles"]
    saved = {"config": nested(before)}
    with pytest.raises(ConfigError, match="optim.roles.bias.beta of a resumed run\n  got: None\n  allowed: 0.5"):
        keep_choices(from_dict(Config, now), Path("runs/x"), saved)


def test_a_checkpoint_of_an_earlier_version_is_compared_by_the_keys_of_now():
    assert keep_choices(Config(), Path("runs/x"), {"config": {"optim": {"cooldown": 0.3, "floor": 0.0}}}) == [
        "changed: schedule.cooldown = 0.5, was 0.3"
    ]


def test_dualized_takes_every_setting_of_a_step():
    assert set(Config().optim.step_settings()) | {"lr"} <= set(inspect.signature(Dualized).parameters)
