"""studies/export: the exported script runs alone and gives its run's losses."""

import ast
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS
from optim.directions import DIRECTIONS
from optim.norms import Frobenius, Norm, RMSToRMS
from optim.polar import Polar
from optim.schedules import SCHEDULES
from optim.views import Blocks
from studies.export import bundle, command, compose, pcg64, script, specialise
from studies.export import run as exported_run
from studies.export.expressions import Expressions
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
    "factored": ("--optim.direction", "factored"),
    "whitened": ("--optim.direction", "whitened", "--optim.refresh-every", "3"),
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
    "muon_float32": (
        *("--optim.name", "muon_adamw", "--optim.lr", "0.02", "--optim.polar.dtype", "float32"),
        *("--schedule.beta-warmup", "0.3", "--baseline.auxiliary-lr", "0.5"),
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
    files = {file: title for model, _ in MODELS.values() for file, title in compose.files(model, {}).items()}
    titles = {f"# ---- {title}\n\n": file for file, title in files.items()}
    found = re.split(f"^({'|'.join(map(re.escape, titles))})", text, flags=re.MULTILINE)
    return {titles[title]: section.strip() for title, section in zip(found[1::2], found[2::2], strict=True)}


def assert_optim_stands_in_it(text: str, *, dualized: bool) -> None:
    """All of update.py but its imports, and every definition of the other files byte for byte, comments before it and
    all; of the directions those that the run uses."""
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
        for registry in [piece for piece in pieces if piece.startswith("DIRECTIONS: ")]:
            pieces.remove(registry)
            entries = re.findall(r'"\w+": [\w.]+\(.*?\)', registry)
            assert entries and all(f"    {entry},\n" in source for entry in entries)
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
    assert len(file.read_text().splitlines()) < (2100 if case == "whitened" else 2000)
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


# ---- parts of plugins

PARTS = {
    "norm and direction": (
        *("--optim.norms.mlp", "Half", "--optim.norms.attention", "Half", "--optim.norms.per-head"),
        *("--optim.roles.mlp.direction", "forgetful", "--model.bias"),
    ),
    "baseline": ("--optim.name", "sign_sgd", "--optim.lr", "0.003", "--baseline.slow", "0.25"),
    "model and baseline": ("--model.name", "gated", "--optim.name", "sign_sgd", "--optim.lr", "0.003"),
    "schedule-free": (  # other weights are evaluated than gradients are taken at
        *("--run.plugins", "[]", "--optim.name", "schedule_free_adamw", "--optim.lr", "0.01"),
        *("--schedule.cooldown", "0"),
    ),
    "adafactor": ("--run.plugins", "[]", "--optim.name", "adafactor", "--optim.lr", "0.003"),
    "library": (
        *("--run.plugins", '["my_lion"]', "--optim.name", "lion", "--optim.lr", "0.003"),
        *("--optim.max-grad-norm", "0.5", "--schedule.beta-warmup", "0.3"),
    ),
}
LIBRARIES = ("library", "schedule-free", "adafactor")
LION = """
from nanodual import register_baseline
from pytorch_optimizer import Lion
from my_betas import pair
from torch import nn


@register_baseline("lion")
def lion(model: nn.Module, norm: object, *, lr: float, beta: float, beta2: float) -> Lion:
    return Lion(model.named_parameters(), lr=lr, betas=pair(beta, beta2))
"""


@pytest.mark.parametrize("case", PARTS)
def test_a_script_has_the_parts_of_plugins_in_it_and_gives_every_loss(case: str, root: Path):
    shutil.copy(ROOT / "tests/my_parts.py", root)
    (root / "my_lion.py").write_text(LION)
    (root / "my_betas.py").write_text("def pair(a, b):\n    return a, b\n")
    folder = trained(root, case.replace(" ", "_"), "--run.plugins", '["my_parts"]', *PARTS[case])
    bare = root / f"bare {case}"
    bare.mkdir()
    (bare / "corpora").symlink_to(root / "corpora")
    options = "--out", str(bare / "script.py")
    code, _, err = run(root, f"runs/{folder.name}", *options, script="studies.export")
    assert code == 0, err
    text = (bare / "script.py").read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, "-I", "script.py"], cwd=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_close(lines(logged(bare)), recorded(folder))
    imports = {str(n.module) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
    imports |= {a.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names}
    libraries = {"torch", "pytorch_optimizer"} if case in LIBRARIES else {"torch"}
    assert {name.split(".")[0] for name in imports} - sys.stdlib_module_names == libraries
    used = {"Half": "norm", "Forgetful": "direction", "SignSGD": "baseline", "GatedGPT": "model"}
    kinds = {kind for name, kind in used.items() if f"\nclass {name}(" in text}
    assert kinds == {kind for kind in used.values() if kind in case}, "what is used, and nothing else"
    assert "Letters" not in text, "shards are tokens: a script needs no tokenizer"
    assert not re.search("^@register_(baseline|model|direction)", text, re.MULTILINE)
    if case == "norm and direction":
        for code, _, err in run_ranks(bare, 2, script=str(bare / "script.py")):
            assert code == 0, err
        (other,) = {*bare.glob("logs/*.txt")} - {next(bare.glob("logs/*.txt"))}
        assert_close(lines(other.read_text(encoding="utf-8")), recorded(folder))


def test_a_run_whose_plugin_has_changed_or_that_was_resumed_otherwise_says_so(root: Path):
    """The script has the plugin's text of now, and one value of a setting."""
    shutil.copy(ROOT / "tests/my_parts.py", root)
    options = "--run.plugins", '["my_parts"]', "--optim.direction", "forgetful", "--train.steps", "4"
    folder = trained(root, "changed", *options, "--train.keep-checkpoints", "2")
    (root / "my_parts.py").write_text((root / "my_parts.py").read_text() + "\nLATER = 1\n")
    code, out, err = run(root, "runs/changed", "--out", "-", script="studies.export")
    assert code == 0 and "\nFiles of plugins that have changed since: my_parts.\n" in out, err
    trained(root, "changed", *options[:-1], "6", "--train.keep-checkpoints", "2", "--run.resume")
    code, _, err = run(root, "runs/changed", "--out", "-", script="studies.export")
    wanted = "error: train.steps of an exported run\n  got: 4, and 6 when it was resumed\n"
    assert code == 2 and err.startswith(wanted) and "config.toml" in err
    code, _, err = run(root, str(next(folder.glob("resumed_*_config.toml"))), "--out", "-", script="studies.export")
    assert code == 0, err


class Plain(Norm):
    """No dataclass: its arguments are attributes."""

    def __init__(self, ndim: int = 2, sizes: tuple[float, ...] = (1.0,)) -> None:
        self.ndim, self.sizes = ndim, sizes


@dataclass(frozen=True)
class Fields(Norm):
    inner: Norm = Plain()  # noqa: RUF009 - norms are constants
    bound: float = math.inf
    dtype: torch.dtype = torch.float32
    shares: tuple[float, ...] = ()


class Hidden(Norm):
    """One that keeps its argument under another name."""

    def __init__(self, size: float = 1.0) -> None:
        self.kept = size


def test_a_norm_is_written_as_what_makes_it_again():
    write = Expressions(Polar())
    for norm, code in (
        (Plain(), "Plain()"),
        (Plain(sizes=(0.5,)), "Plain(sizes=(0.5,))"),
        (Blocks(Plain(3), 4), "Blocks(inner=Plain(ndim=3), sizes=4)"),
        (Fields(bound=2.0), "Fields(bound=2.0)"),
        (Fields(Frobenius(1), dtype=torch.float64), "Fields(inner=Frobenius(ndim=1), dtype=torch.float64)"),
        (Hidden(), "Hidden()"),
        (RMSToRMS(Polar("you")), "RMSToRMS(polar=Polar(schedule='you'))"),
        ({"head": RMSToRMS(Polar())}, "{'head': RMSToRMS()}"),
    ):
        assert write.of(norm) == code
    assert write.named["Blocks"] == "optim.views" and write.named["Plain"] == __name__


def test_an_object_that_its_class_does_not_make_again_is_refused():
    class Local(Norm):
        """Made in a function."""

    changed = Plain()
    changed.extra = 1  # type: ignore[attr-defined]
    for norm, got in (
        (Hidden(2.0), "attributes that its constructor's arguments do not give it"),
        (changed, "attributes that its constructor's arguments do not give it"),
        (Local(), "a definition that does not stand at the top level of its file"),
        (Plain(sizes=(Local(),)), "a definition that does not stand at the top level of its file"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ExportError, match=f"in a script\n  got: {got}\n"):
            Expressions(Polar()).of(norm)


OURS = "class Norm:\n    pass\ndef helper():\n    pass\n"


def with_plugin(root: Path, text: str, last: str = "Mine()\n") -> str:
    """A script of a plugin's Mine and of one file of ours."""
    (root / "optim").mkdir(exist_ok=True)
    (root / "optim/norms.py").write_text(OURS)
    (root / "my_norms.py").write_text(text)
    (root / "end.py").write_text(f'"""end"""\n{last}')
    plugin = str(root / "my_norms.py")
    return bundle.bundle(
        root,
        {"optim/norms.py": "norms", plugin: "plugin", "end.py": "end"},
        known={"end.py": {}},
        filled={},
        packages=("optim", "my_norms"),
        modules={plugin: "my_norms"},
        plugins=[plugin],
        named={"Mine": "my_norms"},
    )


def test_of_a_plugin_comes_what_is_reached_as_it_stands(tmp_path: Path):
    kept = """# why
@cache  # once
class Mine(Norm):
    size = {"a":SIZE}  # of it
    def f(self) -> "Mine":
        return table[0], np.pi, F, nn, fast
"""
    text = with_plugin(
        tmp_path,
        '"""Mine."""\nfrom __future__ import annotations\n'
        "from functools import cache\nimport numpy as np\nimport torch.nn as nn\n"
        "from torch.nn import functional as F\nfrom nanodual.norms import Norm, helper\n"
        "from nanodual import register_norm\nimport optim\n\n"
        f"SIZE = 2\ntable = []\ntable.append(SIZE)\nunused = []\nunused.append(helper())\n"
        "try:\n    import fast\nexcept ImportError:\n    fast = None\n"
        "np.seterr(all='raise')\n"
        f"@register_norm\n{kept.replace('# why', '')}\n\n@optim.register_direction('x')\nclass Other:\n    pass\n"
        "register_norm(Other)\nif __name__ == '__main__':\n    print(Mine)\n",
    )
    assert kept.partition("\n")[2] in text and "class Norm:" in text
    assert text.startswith("from __future__ import annotations\n")
    for wanted in ("SIZE = 2", "table.append(SIZE)", "    import fast", "np.seterr(all='raise')", "import numpy as np"):
        assert wanted in text
    assert not re.search("register|Other|unused|helper|__main__|nanodual", text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exec('class Mine: pass')\n", "Mine, which end.py needs\n  got: 0 definitions"),
        ("def make():\n    class Mine: pass\n    return Mine\nMine = make()\nsetattr(make, 'x', exec)\n", "got: exec"),
        ("class Mine:\n    x = open(__file__)\n", "in a script\n  got: __file__"),
        ("globals()['x'] = 3\nclass Mine:\n    y = x\n", "got: globals|x, which .* needs"),
        ("class Mine:\n    y = late\n", "late, which .*my_norms.py needs\n  got: no definition that can be read"),
        ("from optim.norms import *\nclass Mine:\n    y = helper\n", "helper, which .* needs\n  got: no definition"),
        ("class Norm:\n    pass\nclass Mine(Norm):\n    pass\n", "Norm\n  got: a second definition"),
        ("class Mine:\n    pass\nclass Mine:\n    pass\n", "Mine\n  got: a second definition"),
        ("import optim.norms\nclass Mine(optim.norms.Norm):\n    pass\n", "optim, which .*\n  got: import optim.norms"),
        (
            "from optim.norms import Norm as N\nclass Mine(N):\n    pass\n",
            "N, which .*got: from optim.norms import Norm as N",
        ),
        (
            "from optim.stacks import Stack\nclass Mine(Stack):\n    pass\n",
            "Stack, which .*got: from optim.stacks import",
        ),
        ("class Mine:\n    def f(self):\n        from optim.norms import Norm\n", "got: from optim.norms import Norm"),
        ("def sum(x):\n    return x\nclass Mine:\n    y = sum\n", "sum\n  got: a definition of the name of a builtin"),
    ],
)
def test_what_a_script_cannot_have_of_a_plugin_is_refused(text: str, message: str, tmp_path: Path):
    last = "from optim.norms import Norm\nMine(Norm())\n"
    with pytest.raises(ExportError, match=f"(?s){message}"):
        with_plugin(tmp_path, text, last)


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
