"""studies/transfer.py: the command from end to end on a small dataset, and its parts."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data.loader import Dataset
from matplotlib.figure import Figure
from model import GPT
from studies import runs, transfer
from studies.intervals import Interval
from studies.runs import StudyError
from studies.sizes import AXES, Line, base_size, lines_through, run_name, settings_at, with_equal_tokens
from studies.transfer import main
from studies.verdict import Thresholds, Verdict, judge
from training import checkpoint
from training import config as configuration
from training.config import Config

from tests.helpers import QUICK, run, small_dataset
from tests.pictures import check_nothing_is_cut_off

BASE = (16, 2, 16, 8, 12)  # of helpers.SMALL
NONE: dict[str, list[int]] = {axis: [] for axis in AXES}
OPTIONS = ("--train.steps", "4", *QUICK)
SWEEP = ("--widths", "32", "16", "--lrs", "4", "1", "2", "--name", "sweep")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("transfer with spaces")
    small_dataset(root)
    return root


@pytest.fixture(scope="module")
def base(root: Path) -> Config:
    return configuration.load([*where(root)])


def where(root: Path) -> tuple[str, ...]:
    """Configuration, text and run folders by absolute paths: runs start in the directory of the whole test."""
    return (str(root / "small.toml"), "--data.dataset", str(root / "corpora/small"), "--run.dir", str(root / "runs"))


def call(root: Path, *argv: str) -> int:
    return main([*where(root), *OPTIONS, *argv])


def written(folder: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("*/summary.json")}


@pytest.fixture(scope="module")
def swept(root: Path) -> Path:
    """Two widths, three learning rates, two seeds."""
    assert call(root, *SWEEP) == 0
    return root / "runs/sweep"


# ---- sizes and lines


def test_one_axis_is_one_line_of_ascending_sizes():
    (line,) = lines_through(BASE, NONE | {"width": [64, 16, 32, 16]}, grid=False)
    assert (line.axis, line.sizes) == ("width", tuple((w, 2, 16, 8, 12) for w in (16, 32, 64)))
    assert str(line) == "width 16 … 64 (depth 2, context 16, batch 8, horizon 12)"
    assert line.values() == [16, 32, 64]


@pytest.mark.parametrize(("axis", "place"), [("width", 0), ("depth", 1), ("context", 2), ("batch", 3), ("horizon", 4)])
def test_each_axis_varies_what_it_names(axis: str, place: int):
    (line,) = lines_through(BASE, NONE | {axis: [2, 4]}, grid=False)
    assert [size[place] for size in line.sizes] == [2, 4]
    assert all(size[:place] + size[place + 1 :] == BASE[:place] + BASE[place + 1 :] for size in line.sizes)


def test_two_axes_are_two_lines_through_the_configuration():
    assert lines_through(BASE, NONE | {"width": [16, 32], "depth": [2, 4]}, grid=False) == [
        Line("width", ((16, 2, 16, 8, 12), (32, 2, 16, 8, 12))),
        Line("depth", ((16, 2, 16, 8, 12), (16, 4, 16, 8, 12))),
    ]


def test_a_grid_is_each_line_of_the_product():
    found = lines_through(BASE, NONE | {"width": [16, 32], "depth": [2, 4, 8]}, grid=True)
    assert [(line.axis, len(line.sizes)) for line in found] == [("width", 2)] * 3 + [("depth", 3)] * 2
    assert {size[:2] for line in found for size in line.sizes} == {(w, d) for w in (16, 32) for d in (2, 4, 8)}
    assert [line.sizes[0][1] for line in found[:3]] == [2, 4, 8], "width at each depth"


def test_an_axis_of_one_value_sets_it_for_all():
    assert lines_through(BASE, NONE | {"width": [16, 32], "depth": [4]}, grid=False) == [
        Line("width", ((16, 4, 16, 8, 12), (32, 4, 16, 8, 12)))
    ]
    assert lines_through(BASE, NONE | {"depth": [4]}, grid=False) == []


def test_a_size_keeps_the_width_of_a_head_and_the_tokens_of_a_step(base: Config):
    assert base_size(base) == BASE
    wide, long = settings_at(base, (48, 2, 16, 8, 12)), settings_at(base, (16, 2, 32, 8, 12))
    assert (wide["model.n_embd"], wide["model.n_head"]) == (48, 6), "8 wide, as 16 / 2"
    assert (long["model.block_size"], long["train.batch_size"]) == (32, 4)
    large = settings_at(base, (16, 3, 16, 24, 7))
    assert (large["train.batch_size"], large["model.n_layer"], large["train.steps"]) == (24, 3, 7), (
        "a larger batch has more tokens"
    )
    assert runs.job(base, "x", Path("runs"), **settings_at(base, BASE)).config.model == base.model


def test_a_batch_at_equal_tokens_has_fewer_steps_as_it_grows():
    (line,) = lines_through(BASE, NONE | {"batch": [4, 8, 16]}, grid=False)
    assert not line.at_equal_tokens
    held = with_equal_tokens(line, BASE)
    assert held.at_equal_tokens and [size[3:] for size in held.sizes] == [(4, 24), (8, 12), (16, 6)]
    assert str(held) == "batch 4 … 16 (width 16, depth 2, context 16, 96 sequences)"
    (wide,) = lines_through(BASE, NONE | {"width": [16, 32], "batch": [16]}, grid=False)
    assert str(with_equal_tokens(wide, BASE)) == "width 16 … 32 (depth 2, context 16, batch 16, horizon 6)"


def test_names_tell_sizes_learning_rate_and_seed():
    assert run_name(BASE, 0.001, 3) == "w16.d2.t16.b8.n12.lr0.001.s3"
    assert run_name(BASE, 2e6, 0).endswith(".lr2e06.s0"), "a run's name has no plus sign"


# ---- refusals


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            (),
            "got: 0 axes with two sizes or more, --lrs \n  allowed: one or more, and 3 or more learning rates above 0\n  fix: --widths 64 128 256 --lrs",
        ),
        (
            ("--widths", "16", "32", "--lrs", "1", "2"),
            "got: 1 axes with two sizes or more, --lrs 1 2\n  allowed: one or more, and 3 or more",
        ),
        (("--widths", "16", "32", "--lrs", "0", "1", "2"), "--lrs 0 1 2\n"),
        (("--depths", "2", "--lrs", "1", "2", "4"), "got: 0 axes"),
        (
            ("--widths", "16", "20", "--lrs", "1", "2", "4"),
            "--widths\n  got: 20\n  allowed: a multiple of 8, the width of a head\n  fix: other sizes",
        ),
        (
            ("--contexts", "16", "24", "--lrs", "1", "2", "4"),
            "--contexts\n  got: 24\n  allowed: a divisor of 128, the tokens of a step\n  fix: other",
        ),
        (
            ("--widths", "16", "32", "--lrs", "1", "2", "4", "--seeds", "0"),
            "--seeds, --workers\n  got: 0, 2\n  allowed: 1 or more\n  fix: leave them out",
        ),
        (
            ("--batch-sizes", "6", "8", "10", "--lrs", "1", "2", "4"),
            "--batch-sizes\n  got: 6\n  allowed: a divisor of 32, the sequences of a run\n  fix: other sizes, or other",
        ),
        (
            ("--batch-sizes", "0", "8", "--lrs", "1", "2", "4"),
            "--batch-sizes\n  got: 0\n  allowed: a divisor of 32, the",
        ),
        (
            ("--batch-sizes", "4", "8", "--batches", "4", "8", "--lrs", "1", "2", "4"),
            "--batches, --batch-sizes\n  got: both\n  allowed: one: the batch at the configuration's steps, or at its",
        ),
        (
            ("--widths", "16", "32", "--batch-rule", "sqrt", "--lrs", "1", "2", "4"),
            "--batch-rule\n  got: sqrt without --batch-sizes\n  allowed: constant\n  fix: --batch-sizes 8 16 32",
        ),
        (
            ("--coordinates", "2", "--widths", "16"),
            "--coordinates\n  got: fewer than 2 --widths\n  allowed: 2 or more\n  fix: --widths 64 128 256",
        ),
    ],
)
def test_what_cannot_be_swept_is_named(root: Path, argv: tuple[str, ...], message: str):
    with pytest.raises(StudyError) as error:
        call(root, *argv)
    assert message in str(error.value)
    assert all(word in str(error.value) for word in ("got:", "allowed:", "fix:"))


def test_options_of_runs_are_checked_as_strictly(root: Path):
    for argv, message in (
        (("--optim.lrr", "3"), "unknown option --optim.lrr"),
        (("--width", "16"), "unknown option --width"),
        (("--optim.name", "adam"), "optim.name\n  got: 'adam'"),
    ):
        with pytest.raises(configuration.ConfigError, match=message):
            call(root, "--widths", "16", "32", "--lrs", "1", "2", "4", *argv)


def test_the_command_ends_with_code_2_where_it_refuses(root: Path):
    command = root / "command.py"
    command.write_text("import runpy\nrunpy.run_module('studies.transfer', run_name='__main__', alter_sys=True)\n")
    code, _, err = run(root, "small.toml", "--widths", "16", "20", "--lrs", "1", "2", "4", script=str(command))
    assert (code, err) == (
        2,
        "error: --widths\n  got: 20\n  allowed: a multiple of 8, the width of a head\n  fix: other sizes, or another configuration\n",
    )
    code, _, err = run(root, "nowhere.toml", script=str(command))
    assert code == 2 and err.startswith("error: configuration file\n  got: nowhere.toml")


# ---- the command


def test_the_cost_alone_is_printed_and_nothing_runs(root: Path, capsys: pytest.CaptureFixture[str]):
    assert call(root, "--widths", "16", "32", "--lrs", "1", "2", "4", "--dry-run") == 0
    out = capsys.readouterr().out
    assert (
        f"{root / 'runs/transfer-small-dualized'}: 12 runs, 0 of them done; " in out and " FLOPs to go, about " in out
    )
    assert " GFLOP/s), 2 at a time\n" in out and out.count("\n") == 1
    assert not (root / "runs/transfer-small-dualized").exists()


def test_a_sweep_leaves_losses_verdict_and_picture(root: Path, swept: Path, capsys: pytest.CaptureFixture[str]):
    assert {p.name for p in swept.iterdir() if not p.name.startswith("w")} == {
        ".lock",
        "configs",
        "results.json",
        "runs.jsonl",
        "verdict.txt",
        "transfer.png",
    }
    results = json.loads((swept / "results.json").read_text())
    (line,) = results["lines"]
    assert (line["axis"], line["sizes"], line["lrs"], line["seeds"]) == ("width", [16, 32], [1.0, 2.0, 4.0], 2)
    assert results["thresholds"] == vars(Thresholds())
    for s, width in enumerate((16, 32)):
        for k, lr in enumerate((1, 2, 4)):
            for seed in (0, 1):
                folder = swept / f"w{width}.d2.t16.b8.n4.lr{lr}.s{seed}"
                assert line["losses"][s][k][seed] == json.loads((folder / "summary.json").read_text())["val_loss"]
                made = configuration.load([str(folder / "config.toml")])
                assert (made.model.n_embd, made.model.n_head, made.optim.lr, made.run.seed) == (
                    width,
                    width // 8,
                    lr,
                    seed,
                )
    assert line["word"] == judge(np.array(line["losses"]), [16, 32], [1.0, 2.0, 4.0]).word
    text = (swept / "verdict.txt").read_text()
    assert f"width 16 … 32 (depth 2, context 16, batch 8, horizon 4): {line['word']}\n" in text
    for key in (
        "drift of the best lr at most 0.5 octaves: ",
        "the first's best lr costs the largest at most 0.50% of loss: ",
        "larger is not worse at that lr",
    ):
        assert key in text
    assert (swept / "transfer.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_goes_on_from_its_lines_with_the_same_verdict(root: Path, swept: Path):
    """Without its run folders."""
    moved = root / "moved/sweep"
    moved.mkdir(parents=True)
    shutil.copy(swept / "runs.jsonl", moved)
    assert main([*where(root)[:-1], str(moved.parent), *OPTIONS, *SWEEP]) == 0
    assert len(list(moved.glob("*/restored.txt"))) == 12 and not any((moved / "configs").iterdir())
    same, other = ((f / "results.json").read_text() for f in (swept, moved))
    assert json.loads(other) | {"command": ""} == json.loads(same) | {"command": ""}
    texts = [(f / "verdict.txt").read_text().partition("\n") for f in (swept, moved)]
    assert texts[0][2] == texts[1][2], "but for the command's line"


def test_the_same_call_again_runs_nothing_and_a_seed_more_runs_its_own(
    root: Path, swept: Path, capsys: pytest.CaptureFixture[str]
):
    there, verdict = written(swept), (swept / "verdict.txt").read_text()
    capsys.readouterr()
    assert call(root, *SWEEP) == 0
    out = capsys.readouterr().out
    assert ": 12 runs, 12 of them done; 0 FLOPs to go, about 0 s on this machine" in out
    assert written(swept) == there and (swept / "verdict.txt").read_text() == verdict
    assert verdict in out + "\n" and f"picture: {swept / 'transfer.png'}" in out
    assert call(root, *SWEEP, "--seeds", "3", "--max-drift", "10") == 0
    assert ": 18 runs, 12 of them done; " in capsys.readouterr().out
    now = written(swept)
    assert there.items() <= now.items() and now.keys() - there.keys() == {
        n[:-1] + "2" for n in there if n.endswith("0")
    }
    results = json.loads((swept / "results.json").read_text())
    assert results["thresholds"]["drift"] == 10 and results["lines"][0]["seeds"] == 3
    with pytest.raises(StudyError, match="got: optim.beta = 0.5\n  allowed: 0.95, as the run that is there had it"):
        call(root, *SWEEP, "--optim.beta", "0.5")


def test_axes_of_all_kinds_and_a_divergence_in_one_call(root: Path, capsys: pytest.CaptureFixture[str]):
    """One seed, and a learning rate that nothing survives: no PASS, and the losses say so."""
    argv = (
        "--contexts",
        "8",
        "16",
        "--batches",
        "8",
        "16",
        "--lrs",
        "0.1",
        "0.2",
        "1e30",
        "--seeds",
        "1",
        "--optim.name",
        "sgd",
        "--name",
        "kinds",
    )
    assert call(root, *argv) == 0
    results = json.loads((root / "runs/kinds/results.json").read_text())
    assert [line["axis"] for line in results["lines"]] == ["context", "batch"]
    assert {line["word"] for line in results["lines"]} == {"TOO NOISY TO SAY"}
    losses = np.array([line["losses"] for line in results["lines"]], dtype=object)
    assert losses.shape == (2, 2, 3, 1) and (losses[:, :, 2] == "diverged").all()
    assert np.isfinite(losses[:, :, :2].astype(float)).all()
    assert losses[0, 1].tolist() == losses[1, 0].tolist(), "the configuration itself is in both lines, and ran once"
    assert len(written(root / "runs/kinds")) == 6
    text = (root / "runs/kinds/verdict.txt").read_text()
    assert (root / "runs/kinds/w16.d2.t8.b8.n4.lr1e30.s0/failed.json").is_file()
    assert "note: 2 of 6 runs diverged" in text and "noise is unknown" in text and "not bracketed" in text


def test_batch_sizes_train_on_equal_tokens_at_rates_that_the_rule_carries(root: Path):
    """And with an average whose half-life in tokens stays: 128 is a step of the configuration."""
    argv = ("--batch-sizes", "4", "8", "16", "--batch-rule", "sqrt", "--lrs", "1", "2", "4", "--name", "batch-sizes")
    argv += ("--optim.beta-half-life", "128", "--max-drift", "99", "--max-cost", "99", "--seeds", "1")
    assert call(root, *argv) == 0
    folder = root / "runs/batch-sizes"
    for batch, steps, root_of_ratio, beta in ((4, 8, 0.5**0.5, 0.5**0.5), (8, 4, 1.0, 0.5), (16, 2, 2**0.5, 0.25)):
        for lr in (1, 2, 4):
            rate = lr * root_of_ratio
            made = configuration.of_file(folder / f"w16.d2.t16.b{batch}.n{steps}.lr{rate:g}.s0/config.toml")
            assert (made.train.batch_size, made.train.steps) == (batch, steps)
            assert (made.optim.lr, made.optim.beta) == pytest.approx((rate, beta))
    results = json.loads((folder / "results.json").read_text())
    (line,) = results["lines"]
    assert results["batch_rule"] == {"rule": "sqrt", "from_batch": 8}
    assert (line["axis"], line["sizes"], line["lrs"]) == ("batch", [4, 8, 16], [1.0, 2.0, 4.0])
    assert line["words"].keys() == {"drift", "cost"}, "nothing says that losses fall over batch sizes"
    text = (folder / "verdict.txt").read_text()
    assert (
        "\n\nlearning rates: those of batch 8, times sqrt(batch / 8)\naverages kept in tokens: optim.beta\n\n" in text
    )
    assert "batch 4 … 16 (width 16, depth 2, context 16, 32 sequences): " in text
    assert "against the one before: not judged" in text and "larger is not worse" not in text


@pytest.mark.parametrize(("rule", "drifts"), [("constant", [0.5, 1.0]), ("sqrt", [0.0, 0.0])])
def test_a_best_rate_that_grows_as_the_root_of_the_batch_drifts_but_by_that_rule(
    rule: str, drifts: list[float], base: Config, monkeypatch: pytest.MonkeyPatch
):
    def loss(folder: Path) -> float:  # lowest at 2 · √(batch / 8)
        batch, rate = (float(re.search(rf"\.{key}([\d.]+)\.", folder.name)[1]) for key in ("b", "lr"))  # type: ignore[index]
        return 3 + math.log2(rate / (2 * math.sqrt(batch / 8))) ** 2 / 10

    monkeypatch.setattr(runs, "final_loss", loss)
    argv = [*where(root=Path()), "--batch-sizes", "4", "8", "16", "--lrs", "0.5", "1", "2", "4", "--seeds", "1"]
    options = transfer.build_parser().parse_known_args([*argv, "--batch-rule", rule])[0]
    sweep = transfer.plan(options, base, Path("runs/x"))
    (line,) = sweep.lines
    verdict = judge(sweep.losses(line), line.values(), sweep.lrs)
    assert [i.value for i in verdict.drift] == pytest.approx(drifts, abs=1e-4)


def test_a_method_leaves_half_lives_that_were_asked_for(root: Path):
    argv = ("--widths", "16", "32", "--coordinates", "1", "--method", "adamw", "--optim.lr", "0.01")
    assert call(root, *argv, "--optim.beta2-half-life", "128", "--name", "method") == 0
    made = configuration.of_file(root / "runs/method/coordinates.w16.n1/config.toml")
    assert (made.optim.name, made.optim.beta2, made.optim.weight_decay) == ("adamw", 0.5, 0.1)


def test_the_coordinate_check_is_the_change_of_activations(root: Path, capsys: pytest.CaptureFixture[str]):
    """Against the checkpoints: the residual stream by the model's own parts, one after the other."""
    assert call(root, "--coordinates", "3", "--widths", "32", "16", "--name", "coordinates") == 0
    out = capsys.readouterr().out.splitlines()
    assert "rms of the change of activations after 3 steps, lr 3, dualized" in out
    rows = {
        line.rsplit(maxsplit=3)[0].strip(): [float(x) for x in line.rsplit(maxsplit=3)[1:]]
        for line in out
        if line.startswith(("emb", "block", "logits"))
    }
    assert list(rows) == ["embedding", "block 0", "block 1", "logits"]
    T = 16
    tokens = np.concatenate(Dataset(configuration.load([*where(root)]).data).split("val"))
    idx_BT = torch.tensor(tokens[: 16 * T].astype(np.int64)).view(16, T)
    changes: dict[str, list[float]] = {name: [] for name in rows}
    for width in (16, 32):
        (path,) = (root / f"runs/coordinates/coordinates.w{width}.n3/checkpoints").iterdir()
        assert path.name == "step_00000003"
        c = configuration.from_dict(Config, checkpoint.read_state(path)["config"])
        seen = []
        for trained in (False, True):
            model = GPT(
                c.model, c.optim.norms.build(c.optim.polar, c.model.n_head), torch.Generator().manual_seed(0)
            ).eval()
            if trained:
                checkpoint.load_model(path, model)
            with torch.no_grad():
                stream = [model.embedding(idx_BT)]
                for block in model.blocks:
                    stream.append(block(stream[-1], model.rotary(torch.arange(T))))
                seen.append([*stream, model(idx_BT)[0]])
        for name, before, after in zip(rows, *seen, strict=True):
            changes[name].append(math.sqrt(float(((after - before).double() ** 2).mean())))
    for name, (small, large) in changes.items():
        assert rows[name] == pytest.approx([small, large, math.log2(large / small)], abs=6e-4), name
    worst = max(rows, key=lambda name: abs(rows[name][2]))
    assert out[-1].startswith(f"largest slope of log change against log width: {rows[worst][2]:+.3f} ({worst})")


def test_more_seeds_of_the_smallest_size_alone(root: Path, swept: Path, capsys: pytest.CaptureFixture[str]):
    """Nothing new at the larger size, and a verdict of what there is."""
    before = written(swept)
    assert call(root, *SWEEP, "--first-seeds", "4") == 0
    new = written(swept).keys() - before.keys()
    assert new and all(n.startswith("w16.") and n.endswith(("s2", "s3")) for n in new)
    (line,) = json.loads((swept / "results.json").read_text())["lines"]
    assert np.isfinite(np.array(line["losses"][0])).all() and all(
        cell[2:] == [None, None] for cell in line["losses"][1]
    )
    assert line["noise"]["df"] == 2 * (3 + 1)


def test_a_size_at_which_everything_diverged_is_named(root: Path):
    wild = (
        "--widths",
        "16",
        "32",
        "--lrs",
        "1e30",
        "2e30",
        "4e30",
        "--seeds",
        "1",
        "--optim.name",
        "sgd",
        "--name",
        "wild",
    )
    assert call(root, *wild) == 0
    said = (root / "runs/wild/verdict.txt").read_text()
    assert (
        "no verdict\nlosses of size 16\n  got: no run that did not diverge\n  allowed: one or more\n  fix: smaller --lrs"
        in said
    )
    assert json.loads((root / "runs/wild/results.json").read_text())["lines"] == []


# ---- what a reader is told


def test_a_text_tells_every_number_and_word():
    line = Line("width", ((16, *BASE[1:]), (32, *BASE[1:])))
    i = Interval(1.0, 2.0, 4.0)
    verdict = Verdict(
        [16, 32],
        [1.0, 2.0, 4.0],
        2,
        None,
        [i, i],
        [2.5, 2.25],
        [True, False],
        [Interval(-0.5, 0.0, 0.5)],
        [Interval(0, 0.001, 0.002)],
        [Interval(-0.02, -0.01, 0.01)],
    )
    verdict.words = {"drift": "PASS", "cost": "PASS", "worse": "TOO NOISY TO SAY"}
    verdict.notes = ["a note"]
    found = transfer.verdict_text(line, verdict, Thresholds())
    assert found.splitlines()[0].endswith(": TOO NOISY TO SAY")
    row = found.splitlines()[3]
    assert "2 [1, 4]" in row and "2.2500" in row and "0 [-0.5, 0.5]" in row
    assert "+0.10% [+0.00%, +0.20%]" in row and "-1.00% [-2.00%, +1.00%]" in row and row.endswith("not bracketed")
    assert (
        "larger is not worse at that lr (by more than 0.50%): TOO NOISY TO SAY" in found
        and "  note: a note\n  note: rates an octave apart" in found
    )


def test_the_pictures_legend_explains_its_markers_and_shows_what_diverged(tmp_path: Path, figures: list[Figure]):
    """A run that diverged and a loss far above the others are marked at the edge, not left out."""
    line, lrs = Line("width", ((16, *BASE[1:]), (32, *BASE[1:]))), [1.0, 2.0, 4.0, 8.0]
    losses = np.array([[[3.0], [2.5], [2.6], [9.0]], [[2.9], [2.4], [2.5], [math.inf]]])
    judged = transfer.JudgedLine(line, losses, judge(losses, [16, 32], lrs))
    transfer.plot([judged], lrs, "dualized, text", tmp_path / "transfer.png")
    check_nothing_is_cut_off(figures[0])
    (axes,) = figures[0].axes
    legend = axes.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == [
        "width 16",
        "width 32",
        "one seed; a curve is their mean",
        "best rate, by the fitted parabola",
        "a loss above this axis",
        "a run diverged",
    ]
    marked = {x.get_marker(): list(np.atleast_1d(x.get_xdata())) for x in axes.lines if x.get_marker() in "x^"}  # type: ignore[arg-type]
    assert marked == {"^": [8.0], "x": [8.0]}
    low, high = axes.get_ylim()
    assert all(low < y < high for y in judged.verdict.loss)
    assert "nats per token" in axes.get_ylabel() and "learning rate" in axes.get_xlabel()
