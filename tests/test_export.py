"""studies/export: the exported script runs alone and gives its run's losses."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS
from optim.directions import DIRECTIONS
from optim.schedules import SCHEDULES
from studies.export import bundle, command, compose, pcg64, script, specialise
from studies.export import run as exported_run
from studies.export.log import LINE
from studies.export.specialise import ERASED, BundleError, Code, ExportError, Specialise
from training import config as configuration
from training.config import Config

from tests.helpers import ROOT, run, run_ranks, small_dataset

# The log has five digits of a validation loss: half of the last one is 5e-6. What is left is for sums in another order.
CLOSE = 1e-4
QUIET = (
    "--train.keep-checkpoints",
    "0",
    "--train.sample-tokens",
    "0",
    "--train.telemetry-every",
    "0",
    "--train.eval-every",
    "5",
)
TRACK3 = (
    *(
        "--model.residual",
        "plain",
        "--model.no-branch-gains",
        "--model.bias",
        "--model.norm-gains",
        "--model.embedding-norm",
    ),
    *(
        "--model.rotary",
        "half",
        "--model.logit-softcap",
        "15",
        "--model.softcap",
        "rsqrt",
        "--model.logit-scale",
        "1.0",
    ),
    *("--model.attention-scale", "0.96", "--model.dropout", "0"),
)
CASES = {
    "dualized": (),
    "track3": TRACK3,
    "soap": (
        "--optim.direction",
        "nesterov_soap",
        "--optim.refresh-every",
        "3",
        *TRACK3,
        "--model.init",
        "track",
        "--optim.lr",
        "0.3",
    ),
    "speedrun": (
        "--model.name",
        "ngram",
        "--model.ngram",
        "3",
        "--model.ngram-rows",
        "64",
        "--model.mlp-shift",
        "--model.match",
        "2",
        "--model.match-dropout",
        "0.5",
        "--model.dropout",
        "0.0",
        "--optim.masses.ngram",
        "3.0",
    ),
    "adamw": ("--optim.name", "adamw", "--optim.lr", "0.003", "--optim.weight-decay", "0.1", "--model.init", "gpt2"),
    "muon_adamw": (
        "--optim.name",
        "muon_adamw",
        "--optim.lr",
        "0.02",
        "--optim.weight-decay",
        "0.05",
        "--schedule.beta-warmup",
        "0.3",
        "--optim.polar.dtype",
        "bfloat16",
        *TRACK3,
    ),
    "sgd": (
        "--optim.name",
        "sgd",
        "--baseline.scaling",
        "ntk",
        "--model.init",
        "fan_in",
        "--optim.max-grad-norm",
        "0.5",
    ),
    "recipe": (
        *(
            "--optim.weight-decay",
            "0.1",
            "--optim.cautious",
            "--optim.max-grad-norm",
            "0.5",
            "--schedule.warmup",
            "3",
        ),
        *(
            "--schedule.beta-warmup",
            "0.2",
            "--schedule.beta-cooldown",
            "0.1",
            "--schedule.power",
            "1.2",
            "--optim.norms.per-head",
        ),
        *("--optim.norms.head", "L1ToLinf", "--optim.norms.mlp", "MuonSpectral", "--optim.polar.schedule", "you"),
    ),
    "stiefel": (
        "--optim.constraint",
        "stiefel",
        "--model.no-zero-init",
        "--schedule.shape",
        "cosine",
        "--optim.direction",
        "adam",
    ),
    "dual": (
        "--optim.scale",
        "dual",
        "--optim.lr",
        "0.1",
        "--optim.polar.schedule",
        "exact",
        "--optim.composition",
        "max",
    ),
    "roles": (
        *("--optim.roles.bias.direction", "adam", "--optim.roles.embedding.beta", "0.8"),
        *("--optim.roles.mlp.weight-decay", "0.2", "--schedule.beta-warmup", "0.3"),
        *TRACK3,
    ),
    "groups": (  # two, whose gradients are clipped one by one
        *("--optim.weight-decay", "0.1", "--optim.cautious", "--optim.max-grad-norm", "0.05"),
        *("--optim.roles.head.direction", "adam", "--optim.constraint", "sphere"),
        *("--model.no-zero-init", "--optim.norms.per-head", *TRACK3),
    ),
    "bf16": ("--run.precision", "bf16", "--optim.constraint", "ball", "--optim.direction", "lion"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export with spaces")
    small_dataset(root)
    return root


def trained(root: Path, name: str, *options: str) -> Path:
    code, _, err = run(root, "small.toml", "--run.name", name, *QUIET, *options)
    assert code == 0, err
    return root / "runs" / name


def exported(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Path:
    """The script, alone in a folder with nothing but the data."""
    monkeypatch.chdir(root)  # the run's data is named relative to it
    bare = root / f"bare {folder.name}"
    bare.mkdir()
    (bare / "corpora").symlink_to(root / "corpora")
    assert command.main([str(folder), "--out", str(bare / "script.py"), *options]) == 0
    return bare / "script.py"


def lines(log: str) -> dict[tuple[int, str], float]:
    """{(step, "val" or "train"): loss}."""
    found = re.findall(
        r"^step:(\d+)/\d+ (val|train)_loss:([\d.]+) train_time:[\d.]+s step_avg:[\d.]+ms$", log, re.MULTILINE
    )
    return {(int(step), kind): float(loss) for step, kind, loss in found}


def recorded(folder: Path) -> dict[tuple[int, str], float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {(r["step"], "val" if "val_loss" in r else "train"): r.get("val_loss", r.get("loss")) for r in records}


def logged(bare: Path) -> str:
    (file,) = bare.glob("logs/*.txt")
    return file.read_text(encoding="utf-8")


def assert_close(found: dict[tuple[int, str], float], wanted: dict[tuple[int, str], float]) -> None:
    assert found.keys() == wanted.keys()
    assert max(abs(found[k] - wanted[k]) for k in wanted) <= CLOSE


def sections(text: str) -> dict[str, str]:
    """{file: what a script has of it}."""
    files = {file: title for name in MODELS for file, title in compose.files(name).items()}
    titles = {f"# ---- {title}\n\n": file for file, title in files.items()}
    found = re.split(f"^({'|'.join(map(re.escape, titles))})", text, flags=re.MULTILINE)
    return {titles[title]: section.strip() for title, section in zip(found[1::2], found[2::2], strict=True)}


def assert_optim_stands_in_it(text: str, *, dualized: bool) -> None:
    """All of update.py but its imports, and every definition of the other files byte for byte, comments before it and
    all."""
    update = (ROOT / "optim/update.py").read_text(encoding="utf-8")
    imports = [n for n in ast.parse(update).body if isinstance(n, ast.Import | ast.ImportFrom)]
    lines = update.splitlines(keepends=True)
    for part in (lines[: imports[0].lineno - 1], lines[imports[-1].end_lineno :]):
        assert ("".join(part).strip() in text) is dualized
    ours = {file: section for file, section in sections(text).items() if file.startswith("optim/")}
    assert {"optim/update.py", "optim/norms.py", "optim/directions.py"} <= ours.keys() or not dualized
    for file, section in ours.items():
        source = (ROOT / file).read_text(encoding="utf-8")
        pieces = section.split("\n\n\n")  # no definition has two empty lines in it
        assert not [piece for piece in pieces if f"\n{piece}\n" not in f"\n{source}"], file


@pytest.mark.parametrize("case", CASES)
def test_the_script_gives_every_loss_of_its_run(case: str, root: Path, monkeypatch: pytest.MonkeyPatch):
    folder = trained(root, case, *CASES[case])
    file = exported(root, folder, monkeypatch)
    code, out, err = run(file.parent, script=str(file))
    assert code == 0, err
    assert_close(lines(logged(file.parent)), recorded(folder))
    assert lines(out).keys() == {k for k in recorded(folder) if k[1] == "val"}  # those of training are in the log alone
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imports |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imports} <= {"torch", *sys.stdlib_module_names}
    assert len(file.read_text().splitlines()) < 2000
    text = file.read_text(encoding="utf-8")
    assert_optim_stands_in_it(text, dualized="--optim.name" not in CASES[case])
    tree = ast.parse("\n".join(part for file, part in sections(text).items() if not file.startswith("optim/")))
    names = {str(getattr(n, "id", getattr(n, "arg", getattr(n, "name", None)))) for n in ast.walk(tree)}
    assert not names & {"past", "cache", "before", "generate"}, "no text is generated"
    assert {"NgramGPT", "ngram_rows", "match_rows", "ShiftedMLP"} & names == (
        {"NgramGPT", "ngram_rows", "match_rows", "ShiftedMLP"} if case == "speedrun" else set()
    )


def test_the_script_runs_in_isolation_and_logs_its_own_code_first(root: Path, monkeypatch: pytest.MonkeyPatch):
    folder = trained(root, "isolated", "--train.steps", "2")
    file = exported(root, folder, monkeypatch)
    told = "import runpy, sys; sys.argv = ['script.py', '2']; runpy.run_path('script.py', run_name='__main__'); print(*(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)), sep='\\n')"
    done = subprocess.run([sys.executable, "-I", "-c", told], cwd=file.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = [m for m in done.stdout.splitlines() if Path(m).is_relative_to(ROOT) and ".venv" not in Path(m).parts]
    assert not ours
    code, versions, trials = logged(file.parent).split(f"\n{LINE}\n")
    assert code == file.read_text()
    assert versions.startswith(f"Running PyTorch {torch.__version__}")
    first, second = trials.split("step:0/2")[1:]
    assert_close(lines("step:0/2" + first), recorded(folder))
    assert lines(second) != lines(first)  # the second trial is the next seed


def test_processes_share_the_micro_batches(root: Path, monkeypatch: pytest.MonkeyPatch):
    folder = trained(root, "shared")
    file = exported(root, folder, monkeypatch)
    for code, _, err in run_ranks(file.parent, 2, script=str(file)):
        assert code == 0, err
    assert_close(lines(logged(file.parent)), recorded(folder))


def test_the_log_of_the_run_has_the_form_of_the_script_s(root: Path, monkeypatch: pytest.MonkeyPatch):
    folder = trained(root, "told", "--train.steps", "3")
    file = exported(root, folder, monkeypatch, "--log", str(root / "told.txt"))
    code, versions, rest = (root / "told.txt").read_text(encoding="utf-8").split(f"\n{LINE}\n")
    assert code == file.read_text(encoding="utf-8") and "seed 0, by train_gpt.py of nanodual" in versions
    assert_close(lines(rest), recorded(folder))


def test_other_data_is_refused_by_the_script(root: Path, monkeypatch: pytest.MonkeyPatch):
    file = exported(root, trained(root, "data", "--train.steps", "1"), monkeypatch)
    (file.parent / "corpora").unlink()
    (file.parent / "corpora/small").mkdir(parents=True)
    for shard in (root / "corpora/small").glob("*.bin"):
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        (file.parent / "corpora/small" / shard.name).write_bytes(content)
    code, _, err = run(file.parent, script=str(file))
    assert code == 1 and "other data than the run's" in err


# ---- the optimization track's form


def test_the_track_s_script_takes_its_files_and_evaluates_at_its_steps(root: Path, monkeypatch: pytest.MonkeyPatch):
    folder = trained(root, "track", *TRACK3, "--train.steps", "30", "--train.log-every", "0")
    file = exported(root, folder, monkeypatch, "--format", "track3")
    data = file.parent / "data/fineweb10B"
    data.mkdir(parents=True)
    for split in ("train", "val"):
        (data / f"fineweb_{split}_000001.bin").write_bytes((root / f"corpora/small/{split}_000000.bin").read_bytes())
    code, _, err = run(file.parent, script=str(file))
    assert code == 0, err
    found = lines(logged(file.parent))
    assert [step for step, kind in found if kind == "val"] == [
        0,
        30,
    ]  # every 125, in the last tenth every 25, and the last
    assert found[0, "val"] == pytest.approx(recorded(folder)[0, "val"], abs=CLOSE)  # the same weights, the same text
    assert found[30, "val"] < found[0, "val"] - 0.1


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(12, 60), min_size=1, max_size=3))
def test_batches_in_order_are_the_track_s(lengths: list[int]):
    """Its rule: batches of B·T tokens side by side in a file, as long as B·T + 1 more are there behind the position."""
    B, T, slots = 2, 5, 2
    shards = [torch.arange(n, dtype=torch.int16) + 100 * i for i, n in enumerate(lengths)]
    wanted = [s[p : p + B * T + 1] for s in shards for p in range(0, len(s), B * T) if p + B * T + 1 < len(s)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "config", Config())
        script.config.train.batch_size, script.config.model.block_size = B, T
        stream = script.InOrder(shards)
        for step, tokens in enumerate(wanted):
            parts = [stream.batch(step, slot, slots) for slot in range(slots)]
            assert torch.cat([x for x, _ in parts]).flatten().tolist() == tokens[:-1].tolist()
            assert torch.cat([y for _, y in parts]).flatten().tolist() == tokens[1:].tolist()
        with pytest.raises(ValueError, match="the data ends"):
            stream.batch(len(wanted), 0, slots)


def test_the_track_s_configuration_is_exported_without_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert command.main([str(ROOT / "configs/track3_124m.toml"), "--format", "track3", "--out", "script.py"]) == 0
    text = (tmp_path / "script.py").read_text()
    assert "which was not run" in text and "data/fineweb10B" in text and "GRADIENT_ACCUMULATION_STEPS = 8" in text
    compile(text, "script.py", "exec")


def test_the_track_s_script_lacks_nothing_but_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = configuration.to_toml(configuration.load([str(ROOT / "configs/track3_124m.toml"), "--run.device", "cpu"]))
    (tmp_path / "cpu.toml").write_text(config)
    assert command.main(["cpu.toml", "--format", "track3", "--out", "script.py"]) == 0
    code, out, err = run(tmp_path, script=str(tmp_path / "script.py"))
    assert code == 1 and out.startswith("logs/")
    assert err.strip().endswith("FileNotFoundError: data/fineweb10B/fineweb_train_*.bin")


# ---- where it is written


def test_a_run_s_script_is_written_beside_it_with_the_command_that_runs_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    trained(root, "beside", "--train.steps", "1")
    monkeypatch.chdir(root)
    assert command.main(["runs/beside"]) == 0
    out = capsys.readouterr().out
    count = len((root / "runs/beside/script.py").read_text(encoding="utf-8").splitlines())
    lines = [
        f"wrote runs/beside/script.py: {count} lines",
        "run it where corpora/small/ is: python runs/beside/script.py",
    ]
    assert out.splitlines() == lines
    code, out, err = run(root, script=str(root / "runs/beside/script.py"))
    assert code == 0 and "val_loss" in out, err
    assert command.main(["runs/beside", "--out", "-"]) == 0
    assert capsys.readouterr().out == (root / "runs/beside/script.py").read_text(encoding="utf-8")


def test_a_configuration_s_script_is_written_here_and_nothing_else_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    asked = [str(ROOT / "configs/track3_124m.toml"), "--format", "track3"]
    assert command.main(asked) == command.main(asked) == 0, "the same content is no loss"
    text = (tmp_path / "track3_124m.py").read_text(encoding="utf-8")
    (tmp_path / "track3_124m.py").write_text("mine\n")
    capsys.readouterr()
    assert command.main(asked) == 2
    assert capsys.readouterr().err == (
        "error: track3_124m.py\n  got: a file that is there already, with other content\n"
        "  allowed: a new file, unless --out names it\n"
        "  fix: --out track3_124m.py to overwrite it, or --out with another name\n"
    )
    assert (tmp_path / "track3_124m.py").read_text() == "mine\n"
    assert command.main([*asked, "--out", "track3_124m.py"]) == 0
    assert (tmp_path / "track3_124m.py").read_text(encoding="utf-8") == text


# ---- what cannot be exported


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (("--optim.lr", "auto"), "optim.lr"),
        (("--optim.name", "normalized_adam"), "optim.name"),
        (("--optim.param-dtype", "bfloat16"), "optim.param_dtype"),
        (("--optim.momentum-dtype", "bfloat16"), "optim.momentum_dtype"),
        (("--data.holdout", "0.1"), "data.holdout"),
    ],
)
def test_a_setting_that_the_script_lacks_is_refused(options: tuple[str, ...], key: str, root: Path):
    config = configuration.load([str(root / "small.toml"), *options, "--run.name", "x", "--model.vocab-size", "18"])
    with pytest.raises(ExportError, match=f"{key} of an exported run\n  got: .*\n  allowed: .*\n  fix: "):
        exported_run.check(config)


@pytest.mark.parametrize("key", ["optim.direction", "optim.roles.bias.direction", "schedule.shape"])
def test_what_is_registered_elsewhere_is_refused(key: str, root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(DIRECTIONS, "mine", DIRECTIONS["adam"])
    monkeypatch.setitem(SCHEDULES, "mine", lambda *_, **__: 1.0)
    config = configuration.load(
        [str(root / "small.toml"), f"--{key}", "mine", "--run.name", "x", "--model.vocab-size", "18"]
    )
    with pytest.raises(ExportError, match="of an exported run\n  got: 'mine'\n  allowed: those of optim/"):
        exported_run.check(config)


def test_every_setting_is_carried_neutral_or_refused_when_it_is_changed():
    """One that a later version adds is refused until somebody decides."""
    both = [
        k
        for k in configuration.flat(Config())
        if exported_run.CARRIED.fullmatch(k) and exported_run.NEUTRAL.fullmatch(k)
    ]
    assert not both
    read = set(
        re.findall(
            r"config\.((?:run|data|model|optim|schedule|baseline|train)\.\w+)\b(?!\()",
            (ROOT / "studies/export/script.py").read_text(),
        )
    )
    assert read <= {k for k in configuration.flat(Config()) if exported_run.CARRIED.fullmatch(k)}


def test_a_run_that_did_not_end_is_refused(root: Path, capsys: pytest.CaptureFixture[str]):
    folder = root / "runs/unfinished"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text((root / "small.toml").read_text())
    assert command.main([str(folder)]) == 2
    assert "no summary.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "got"), [(b"[model\n", "got: Expected ']'"), ("# für\n".encode("latin-1"), "got: 'utf-8' codec")]
)
def test_a_file_that_is_no_toml_is_refused(
    content: bytes, got: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "x.toml").write_bytes(content)
    assert command.main([str(tmp_path / "x.toml")]) == 2
    assert re.search(rf"error: .*x.toml\n  {got}.*\n  allowed: TOML\n  fix: ", capsys.readouterr().err)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "no/such/x.py"
    assert command.main([str(ROOT / "configs/track3_124m.toml"), "--format", "track3", "--out", str(file)]) == 2
    assert (
        f"--out\n  got: {file} (No such file or directory)\n  allowed: a file in a folder that is there\n"
        in capsys.readouterr().err
    )


# ---- the order of the data


@settings(max_examples=100, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 2**70), min_size=1, max_size=6),
    n=st.integers(1, 300),
    most=st.integers(1, 2**32 - 1),
)
def test_random_draws_what_numpy_does(numbers: list[int], n: int, most: int):
    ours, numpys = pcg64.Random(*numbers), np.random.default_rng(numbers)
    assert pcg64.seed_words(tuple(numbers), 9) == np.random.SeedSequence(numbers).generate_state(9).tolist()
    assert ours.below(most) == int(numpys.integers(most))
    assert ours.permutation(n) == numpys.permutation(n).tolist()


# ---- specialising


def specialised(text: str, known: dict) -> str:
    return specialise.unparse(Specialise(known, {}).visit(specialise.parse(text)).body)


def test_what_is_known_is_decided():
    text = """
def f(config, x, past=None):
    # why
    if config.kind == "a" and x:
        y = g(config, x)  # how
    elif config.kind != "b":
        y = 2
    if past is not None:
        y = past
    return y * config.n if config.off or not config.on else [h(x, past) for _ in range(config.n)]
"""
    known = {
        "config.kind": "a",
        "config.n": 3,
        "config.on": True,
        "config.off": None,
        "config": ERASED,
        "past": ERASED,
        "past is not None": Code("False"),
    }
    wanted = """
def f(x):
    # why
    if x:
        # how
        y = g(x)
    else:
        y = 2
    return [h(x) for _ in range(N)]
"""
    assert specialised(text, known).strip() == wanted.strip()


def test_what_follows_a_decided_return_is_left_out():
    text = """
def f(config, x):
    if config.kind == "a":
        return x
    y = g(x)
    return y

def h(config, x):
    if x:
        config.check()
    elif config.kind == "a":
        x += 1
    return x
"""
    wanted = """
def f(x):
    return x

def h(x):
    if x:
        pass
    else:
        x += 1
    return x
"""
    known = {"config.kind": "a", "config": ERASED, "config.check()": ERASED}
    assert specialised(text, known).replace("\n\n", "\n").strip() == wanted.replace("\n\n", "\n").strip()


def make(root: Path, **files: str) -> str:
    for name, text in files.items():
        (root / f"{name}.py").write_text(f'"""{name}"""\n{text}')
    """All but `plain` are specialised."""
    known = {f"{name}.py": {} for name in files if name != "plain"}
    return bundle.bundle(root, {f"{name}.py": name for name in files}, known=known, filled={}, packages=tuple(files))


def test_only_what_is_used_is_left(tmp_path: Path):
    text = make(
        tmp_path,
        a="import math\nimport os\nclass A:\n    x: int\n    def used(self):\n        return two()\n    def unused(self):\n        return os.sep\ndef two():\n    return math.pi\ndef lonely():\n    pass\n",
        b="from a import A\nprint(A().used())\n",
    )
    assert "import math" in text and "def used" in text and "def two" in text
    assert not re.search(r"unused|lonely|import os|from a", text)


def test_what_is_not_specialised_comes_as_it_stands(tmp_path: Path):
    kept = """# why

# because
@cache  # once
class A:
    x: int  # of it

    def unused(self):
        return math.pi if 1 > 2 else {"a":1}
"""
    text = make(
        tmp_path,
        plain=f"import math\nfrom functools import cache\n{kept}def lonely():\n    pass\n",
        b="from plain import A\nA()\n",
    )
    assert kept.partition("\n\n")[2] in text
    assert "import math\nfrom functools import cache\n" in text
    assert "lonely" not in text and "why" not in text  # a comment apart belongs to no definition


def test_a_name_that_is_imported_and_defined_is_refused(tmp_path: Path):
    with pytest.raises(BundleError, match="pi\n  got: a second definition"):
        make(
            tmp_path,
            plain="from math import pi\ndef f():\n    return pi\n",
            b="from plain import f\npi = 3\nprint(pi, f())\n",
        )


def test_two_definitions_of_a_name_are_refused(tmp_path: Path):
    with pytest.raises(BundleError, match="f\n  got: a second definition"):
        make(
            tmp_path,
            a="def f():\n    pass\ndef g():\n    return f()\n",
            b="from a import g\ndef f():\n    return g()\nf()\n",
        )


def test_a_use_of_what_is_not_in_the_files_is_refused(tmp_path: Path):
    with pytest.raises(BundleError, match="h, which b.py needs\n  got: 0 definitions"):
        make(tmp_path, a="def f():\n    pass\n", b="from a import h\nh()\n")
