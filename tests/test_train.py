"""train_gpt.py, sample.py and training/ together, in real processes on a small dataset."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data.shards import read_manifest, read_shard, write_manifest, write_shard
from model import GPT
from models import build
from models.ngram import NgramGPT
from safetensors.torch import load_file, save_file
from training.checkpoint import signed
from training.config import Config, from_dict

from tests.helpers import ROOT, SOAK, TEXT, run, small_dataset, start

KILLS = 100 if SOAK else 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("a path with spaces")
    small_dataset(root)
    return root


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """An uninterrupted run."""
    code, _, err = run(
        root,
        "small.toml",
        "--run.name",
        "whole",
        "--train.telemetry-every",
        "4",
        "--train.pictures",
        "--train.target-loss",
        "4.0",
        "--train.eval-every",
        "6",
    )
    assert code == 0, err
    return root / "runs/whole"


@pytest.fixture(scope="module")
def plain(root: Path) -> Path:
    """A run whose steps have a requested size in the norms themselves."""
    options = ("--optim.direction", "nesterov", "--train.telemetry-every", "4")
    code, _, err = run(root, "small.toml", "--run.name", "plain", *options)
    assert code == 0, err
    return root / "runs/plain"


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step_*"))
    return {f"{kind}.{k}": v for kind in ("model", "optimizer") for k, v in load_file(file_of(newest, kind)).items()}


def file_of(checkpoint: Path, kind: str) -> Path:
    """Of a run of one process: the only file of this kind ("model", "optimizer"), or one by its name."""
    if kind.endswith(".json"):
        return checkpoint / kind
    (path,) = (checkpoint / kind).iterdir()
    return path


def sign_anew(checkpoint: Path, file: Path) -> None:
    """Let state.json agree with what a test wrote into a file."""
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"][str(file.relative_to(checkpoint))] = {
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    (checkpoint / "state.json").write_text(json.dumps(signed(state)))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_its_folder(whole: Path):
    assert {p.name for p in whole.iterdir()} == {
        "config.toml",
        "receipt.txt",
        "modular_norm.svg",
        "metrics.jsonl",
        "summary.json",
        "loss.png",
        "geometry.png",
        "checkpoints",
        "log.txt",
        ".lock",
    }
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["step_00000008", "step_00000012"], (
        "the newest two are kept"
    )
    assert re.search(r"blocks.1.mlp.down.weight +16×64 +mlp +RMSToRMS", (whole / "receipt.txt").read_text())
    assert all((whole / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "geometry.png"))
    steps = [r["step"] for r in records(whole) if "loss" in r]
    assert steps == list(range(1, 13))
    assert "sample:\n" in (whole / "log.txt").read_text()
    assert re.search(r"^validation: [\d.]+ bits per byte$", (whole / "log.txt").read_text(), re.MULTILINE), (
        "of 512 targets alone"
    )


def test_compressors_stand_beside_a_score_of_the_whole_split(root: Path):
    code, out, err = run(
        root,
        "small.toml",
        "--run.name",
        "packed",
        "--train.steps",
        "1",
        "--train.eval-tokens",
        "None",
        "--train.pictures",
    )
    assert code == 0, err
    assert re.search(r"bits per byte \(gzip -9 [\d.]+, bzip2 -9 [\d.]+, xz -9e [\d.]+ of the same bytes\)", out)


def test_without_a_terminal_loss_rate_and_time_left_are_told_every_log_every_steps(whole: Path):
    told = re.findall(
        r"^step +(\d+) of 12  loss ([\d.]+)  lr ([\d.e-]+)  [\d,]+ tokens/s  (\d+) s left$",
        (whole / "log.txt").read_text(),
        re.MULTILINE,
    )
    expected = [(str(r["step"]), f"{r['loss']:.4f}", f"{r['lr']:.3g}") for r in records(whole) if "loss" in r]
    assert [line[:3] for line in told] == expected and told[-1][3] == "0"


def test_the_summary_has_its_fields_and_they_agree(whole: Path):
    s = json.loads((whole / "summary.json").read_text())
    expected = (
        "params tokens steps val_loss val_bpb train_seconds compile_seconds wall_seconds optimizer_seconds telemetry_seconds tokens_per_second mfu peak_memory_bytes "
        "optimizer_state_bytes target seed world_size device hardware torch commit dirty"
    )
    assert list(s) == expected.split()
    assert s["tokens"] == 12 * 8 * 16
    model = {k: W for k, W in weights(whole).items() if k.startswith("model.")}
    means = sum(sum(W.shape if "blocks" in k else W.shape[1:]) for k, W in model.items())
    assert s["optimizer_state_bytes"] == 4 * (s["params"] + means), "fp32: one buffer per weight, rows and columns"
    assert s["tokens_per_second"] == pytest.approx(s["tokens"] / s["train_seconds"])
    assert (
        0 < s["optimizer_seconds"] < s["train_seconds"] < s["wall_seconds"]
        and 0 < s["telemetry_seconds"] < s["wall_seconds"] - s["train_seconds"]
    )
    assert s["val_bpb"] == pytest.approx(s["val_loss"] / 0.6931472, rel=1e-6), "one byte a character here"
    first = next(r for r in records(whole) if r.get("val_loss", 9) <= 4.0)
    assert s["target"] == {
        "loss": first["val_loss"],
        "step": first["step"],
        "tokens": first["tokens"],
        "train_seconds": first["train_seconds"],
    }


def test_training_learns(whole: Path):
    found = [r["val_loss"] for r in records(whole) if "val_loss" in r]
    assert len(found) == 3, "before, in the middle, at the end"
    assert found[-1] < found[0] - 0.5


def test_achieved_steps_are_what_was_requested(plain: Path):
    """‖ΔW‖ / (lr · radius), read from the weights: 1 for row-wise norms, within the schedule's band for the polar
    factor.
    """
    measured = [r["geometry"]["step"] for r in records(plain) if "geometry" in r]
    assert len(measured) == 4
    first, *later = measured
    assert first.pop("head.weight") == pytest.approx(1, abs=1e-4)
    assert set(first.values()) == {0.0}, "behind a head that starts at zero, the first gradients are exactly zero"
    for sizes in later:
        assert len(sizes) == 14
        for name, size in sizes.items():
            low, high = (0.846, 1.142) if "blocks" in name else (1, 1)
            assert low - 1e-3 <= size <= high + 1e-3, name


def test_by_default_rows_and_vectors_step_as_requested_and_matrices_in_other_coordinates(whole: Path):
    *_, last = (r["geometry"] for r in records(whole) if "geometry" in r)
    assert "orthogonality" not in last
    for name, size in last["step"].items():
        assert ("blocks" in name and size > 1.142) or size == pytest.approx(1, abs=1e-3), name


def test_the_resolved_configuration_runs_again_to_the_same_weights(root: Path, whole: Path):
    text = (whole / "config.toml").read_text()
    assert 'dtype = "float32"' in text, "what was chosen is recorded"
    assert 'device = "cpu"' in text
    code, _, err = run(root, str(whole / "config.toml"), "--run.name", "again")
    assert code == 0, err
    assert same(weights(root / "runs/again"), weights(whole))


def test_accumulation_changes_who_computes_not_what(root: Path, whole: Path):
    """Dropout off: the same global batch in 1, 4 or 8 micro-batches.

    fp32 sums differ in order, and the polar factor amplifies that slowly.
    """
    found = []
    for parts in (1, 4, 8):
        code, _, err = run(
            root,
            "small.toml",
            "--run.name",
            f"parts{parts}",
            "--model.dropout",
            "0",
            "--train.gradient-accumulation-steps",
            str(parts),
        )
        assert code == 0, err
        found.append([r["loss"] for r in records(root / f"runs/parts{parts}") if "loss" in r])
    for other in found[1:]:
        assert other[:5] == pytest.approx(found[0][:5], abs=1e-5)
        assert other == pytest.approx(found[0], abs=5e-3)


@pytest.mark.soak
def test_killed_at_any_moment_a_run_resumes_to_the_same_bits(root: Path):
    """kill -9 at random moments, half of them in training with a checkpoint at every step, half anywhere from start-up
    on. Dropout makes the generators matter.
    """
    args = (
        "small.toml",
        "--train.steps",
        "40" if SOAK else "20",
        "--train.eval-every",
        "10",
        "--train.checkpoint-every",
        "1",
        "--train.log-every",
        "1",
    )
    began = time.perf_counter()
    code, _, err = run(root, *args, "--run.name", "unharmed")
    assert code == 0, err
    life, whole = time.perf_counter() - began, root / "runs/unharmed"
    training = json.loads((whole / "summary.json").read_text())["wall_seconds"]
    rng = random.Random(0)
    resumed_from = []
    for kill in range(KILLS):
        folder = root / "runs/killed"
        shutil.rmtree(folder, ignore_errors=True)
        process = start(root, *args, "--run.name", "killed")
        if kill % 2:
            time.sleep(rng.uniform(0, life))
        else:
            while not list((folder / "checkpoints").glob("step_*")):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.9 * training))
        process.kill()
        process.join()
        code, out, err = run(root, *args, "--run.name", "killed", *(("--run.resume",) if folder.exists() else ()))
        assert code == 0, (kill, err)
        assert same(weights(folder), weights(whole)), f"kill {kill}: {out.splitlines()[0]}"
        for key in ("loss", "val_loss"):
            points = [[(r["step"], r[key]) for r in records(f) if key in r] for f in (folder, whole)]
            assert points[0] == points[1], (kill, key)
        resumed_from.append(out.splitlines()[0])
    assert len({r for r in resumed_from if "resumed from" in r}) > KILLS // 4, f"the moments differ: {resumed_from}"


REFUSED = [
    (["small.toml", "--optim.lrr", "1"], "error: unknown option --optim.lrr"),
    (["small.toml", "--data.dataset", "corpora/none"], "error: no dataset at corpora/none\n  got: no meta.json\n  allowed: a folder made by python -m data.prepare"),
    (["small.toml", "--model.vocab-size", "5"], "error: model.vocab_size\n  got: 5\n  allowed: "),
    (["small.toml", "--run.name", "whole"], "error: run folder runs/whole exists\n  got: a run of this name\n  allowed: a new name, or going on with this run\n  fix: --run.name NAME, or --run.resume"),
    (["small.toml", "--run.name", "none", "--run.resume"], "error: nothing to resume at runs/none\n  got: no such run folder\n  allowed: "),
    (["small.toml", "--run.name", "whole", "--run.resume", "--model.n-layer", "3"], "error: model.n_layer of a resumed run\n  got: 3\n  allowed: 2, as runs/whole has it\n  fix: "),
    (["small.toml", "--run.name", "whole", "--run.resume", "--run.seed", "3"], "error: run.seed of a resumed run\n  got: 3\n  allowed: 0"),
    (["small.toml", "--model.block-size", "100000"], "error: training split too short"),
    (["small.toml", "--run.name", "whole", "--run.resume", "--train.steps", "6"], "error: train.steps of a resumed run\n  got: 6\n  allowed: 12 or more"),
    (["small.toml", "--optim.lr", "fast"], "error: --optim.lr\n  got: 'fast'\n  allowed: a finite number >= 0 or \"auto\"\n  fix: --optim.lr VALUE"),
    (["small.toml", "--run.dir", "small.toml"], "error: run.dir\n  got: small.toml, a file"),
    (["none.toml"], "error: configuration file\n  got: none.toml (No such file or directory)\n  allowed: a TOML file\n  fix: one of those in configs/: "),
    (["corpora"], "error: configuration file\n  got: corpora (Is a directory)"),
    (["--run.resume"], "error: run.name\n  got: None\n  allowed: the name of a run folder"),
    (["small.toml", "--train.sample-prompt", "語"], "error: train.sample_prompt\n  got: '語' (a character that is not in the vocabulary: '語')\n  allowed: the characters "),
    (["small.toml", "--optim.norms.mlp", "Nuclear"], "error: optim.norms.mlp\n  got: 'Nuclear'\n  allowed: \"Spectral\", \"MuonSpectral\""),
    (["small.toml", "--optim.constraint", "sphere"], "error: model.zero_init\n  got: True\n  allowed: false with optim.constraint = 'sphere'"),
    (["small.toml", "--optim.constraint", "cube"], "error: --optim.constraint\n  got: 'cube'\n  allowed: \"ball\", \"sphere\", \"stiefel\"; or left out"),
    (["small.toml", "--optim.lr", "auto", "--optim.scale", "dual"], "error: optim.scale\n  got: 'dual'\n  allowed: \"unit\" where lr is \"auto\""),
    (["small.toml", "--run.name", "whole", "--run.resume", "--optim.lr", "auto"], "error: optim.lr of a resumed run\n  got: 'auto'\n  allowed: 3.0"),
    (["small.toml", "--run.name", "whole", "--run.resume", "--optim.direction", "soap"], "error: optim.direction of a resumed run\n  got: 'soap'"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "text"), REFUSED, ids=lambda v: v if isinstance(v, str) else " ".join(v[1:3]))
def test_refusals_are_short_exit_2_and_touch_nothing(root: Path, whole: Path, argv: list[str], text: str):
    before = {p: p.stat().st_mtime_ns for p in (root / "runs").rglob("*")}
    code, _, err = run(root, *argv)
    assert code == 2
    assert text in err
    assert "Traceback" not in err
    assert {p: p.stat().st_mtime_ns for p in (root / "runs").rglob("*")} == before


@pytest.mark.parametrize(
    ("damage", "text"),
    [("truncated", "truncated or damaged shard"), ("flipped", "corrupted shard"), ("gone", "no such shard")],
)
def test_damaged_data_stops_a_run_before_it_starts(root: Path, tmp_path: Path, damage: str, text: str):
    shutil.copytree(root / "corpora", tmp_path / "corpora")
    shutil.copy(root / "small.toml", tmp_path)
    shard = tmp_path / "corpora/small/train_000000.bin"
    raw = bytearray(shard.read_bytes())
    raw[1500] ^= 1
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(raw if damage == "flipped" else raw[:-10])
    code, _, err = run(tmp_path, "small.toml")
    assert code == 2
    assert f"error: corpora/small/train_000000.bin: {text}" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("file", ["model", "state.json", "optimizer"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    root: Path, whole: Path, tmp_path: Path, file: str, damage: str
):
    copy = tmp_path / "runs/damaged"
    shutil.copytree(whole, copy)
    path = file_of(copy / "checkpoints/step_00000012", file)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(raw[:50] if damage == "cut" else raw)
    if file == "state.json" and damage == "flipped":
        path.write_text(
            json.dumps(
                json.loads((whole / "checkpoints/step_00000012/state.json").read_text())
                | {"files": {"model/none": {"bytes": 1}}}
            )
        )
    args = (
        "small.toml",
        "--run.dir",
        str(tmp_path / "runs"),
        "--run.name",
        "damaged",
        "--run.resume",
        "--train.eval-every",
        "6",
    )
    code, out, err = run(root, *args)
    assert code == 0, err
    assert "damaged checkpoint\n  got: " in out
    assert "left out: " in out
    assert "resumed from" in out and "step_00000008 at step 8" in out
    assert same(weights(copy), weights(whole)), "the damaged one is made again"


def test_damage_to_all_checkpoints_is_refused_and_deletes_nothing(root: Path, whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "runs/damaged")
    for checkpoint in (tmp_path / "runs/damaged/checkpoints").iterdir():
        file_of(checkpoint, "model").write_bytes(b"")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    code, _, err = run(root, "small.toml", "--run.dir", str(tmp_path / "runs"), "--run.name", "damaged", "--run.resume")
    assert code == 2
    assert "damaged checkpoint\n  got: bytes 0" in err
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_other_weights_in_a_checkpoint_are_named(root: Path, whole: Path):
    copy = root / "runs/other_weights"
    shutil.copytree(whole, copy)
    path = file_of(copy / "checkpoints/step_00000012", "model")
    save_file({k: (v[:, :8].contiguous() if k == "head.weight" else v) for k, v in load_file(path).items()}, path)
    sign_anew(path.parent.parent, path)
    code, _, err = run(root, "small.toml", "--run.name", copy.name, "--run.resume")
    assert code == 2
    assert "another architecture\n  got: head.weight (" in err


def test_resuming_with_other_text_is_refused(root: Path, whole: Path, tmp_path: Path):
    from data import prepare

    shutil.copytree(whole, tmp_path / "runs/whole")
    small_dataset(tmp_path)
    (tmp_path / "small.txt").write_text(TEXT[::-1])  # the same characters
    assert (
        prepare.main(
            [
                "text",
                str(tmp_path / "small.txt"),
                "--tokenizer",
                "chars",
                "--out",
                str(tmp_path / "corpora/small"),
                "--replace",
            ]
        )
        == 0
    )
    code, _, err = run(tmp_path, "small.toml", "--run.name", "whole", "--run.resume")
    assert code == 2
    assert "error: corpora/small of a resumed run\n  got: other training shards than the run was started with" in err


def test_a_validation_split_too_short_is_found_before_training(root: Path, tmp_path: Path):
    shutil.copytree(root / "corpora", tmp_path / "corpora")
    shutil.copy(root / "small.toml", tmp_path)
    folder = tmp_path / "corpora/small"
    shard = write_shard(folder / "val_000000.bin", np.zeros(1, dtype=np.uint16))
    manifest = read_manifest(folder)
    manifest.splits["val"].shards = [shard]
    write_manifest(folder, manifest)
    code, _, err = run(tmp_path, "small.toml")
    assert code == 2
    assert "error: validation split too short" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--optim.lr", "auto", "--optim.direction", "adam"),
        (
            "--optim.direction",
            "soap",
            "--optim.refresh-every",
            "3",
            "--optim.constraint",
            "sphere",
            "--model.no-zero-init",
            "--optim.norms.per-head",
        ),
        (
            "--optim.param-dtype",
            "bfloat16",
            "--optim.momentum-dtype",
            "float32",
            "--optim.constraint",
            "ball",
            "--optim.direction",
            "lion",
        ),
    ],
    ids=["auto", "soap", "bfloat16"],
)
def test_every_kind_of_state_resumes_to_the_same_bits(root: Path, options: tuple[str, ...]):
    name = options[-1].strip("-")
    code, _, err = run(root, "small.toml", "--run.name", name, *options)
    assert code == 0, err
    cut = shutil.copytree(root / "runs" / name, root / f"runs/{name}-cut")
    shutil.rmtree(cut / "checkpoints/step_00000012")
    (cut / "summary.json").unlink()
    code, out, err = run(root, "small.toml", "--run.name", f"{name}-cut", "--run.resume", *options)
    assert code == 0 and "at step 8" in out, err
    assert same(weights(cut), weights(root / "runs" / name))


def test_the_receipt_of_a_run_holds_predictions_and_the_drawing(whole: Path):
    receipt = (whole / "receipt.txt").read_text()
    assert "update RMS" in receipt.splitlines()[0] and "2 times (mass 6" in receipt
    assert (whole / "modular_norm.svg").read_text().startswith("<svg") and (
        whole / "checkpoints/step_00000012/receipt.txt"
    ).read_text() == receipt


def test_a_run_goes_on_past_its_end_when_it_is_given_more_steps(root: Path, whole: Path):
    shutil.copytree(whole, root / "runs/longer")
    code, out, err = run(root, "small.toml", "--run.name", "longer", "--run.resume", "--train.steps", "15")
    assert code == 0, err
    assert "resumed from runs/longer/checkpoints/step_00000012 at step 12" in out
    assert json.loads((root / "runs/longer/summary.json").read_text())["steps"] == 15
    assert "changed: train.steps = 15, was 12" in out
    assert (root / "runs/longer/config.toml").read_text() == (whole / "config.toml").read_text(), (
        "what the run began with is kept"
    )
    assert "steps = 15" in (root / "runs/longer/resumed_00000012_config.toml").read_text()


def test_other_settings_of_a_resumed_run_take_effect_and_are_told(root: Path, plain: Path):
    shutil.copytree(plain, root / "runs/changed")
    args = (
        "--run.name",
        "changed",
        "--run.resume",
        "--train.steps",
        "13",
        "--optim.beta",
        "0",
        "--optim.direction",
        "momentum",
        "--optim.lr",
        "1e-9",
    )
    code, out, err = run(root, "small.toml", *args)
    assert code == 0, err
    for line in (
        "changed: optim.beta = 0.0, was 0.95",
        "changed: optim.direction = 'momentum', was 'nesterov'",
        "changed: optim.lr = 1e-09, was 3.0",
    ):
        assert line in out
    state = json.loads((root / "runs/changed/checkpoints/step_00000013/state.json").read_text())
    assert (state["param_groups"][0]["beta"], state["param_groups"][0]["direction"]) == (0.0, "momentum")


def test_a_run_of_before_the_default_direction_changed_resumes_with_its_own(root: Path, plain: Path):
    folder = shutil.copytree(plain, root / "runs/before")
    options = ("--run.name", "before", "--run.resume", "--train.steps", "13")
    code, _, err = run(root, "small.toml", *options)
    assert code == 2
    assert "optim.direction of a resumed run\n  got: 'factored'\n  allowed: 'nesterov'" in err
    assert f"fix: resume with {Path('runs/before/config.toml')}" in err
    code, _, err = run(root, "runs/before/config.toml", *options)
    assert code == 0, err
    (group,) = json.loads((folder / "checkpoints/step_00000013/state.json").read_text())["param_groups"]
    assert group["direction"] == "nesterov"
    assert {k.rpartition(".")[2] for k in weights(folder) if k.startswith("optimizer.")} == {"momentum"}


def test_evaluating_newly_on_resume_makes_no_false_first_point(root: Path, whole: Path):
    code, _, err = run(root, "small.toml", "--run.name", "late_eval")
    assert code == 0, err
    code, _, err = run(
        root,
        "small.toml",
        "--run.name",
        "late_eval",
        "--run.resume",
        "--train.steps",
        "14",
        "--train.eval-every",
        "1",
        "--train.target-loss",
        "9",
    )
    assert code == 0, err
    assert json.loads((root / "runs/late_eval/summary.json").read_text())["target"]["step"] == 13
    assert 0 not in [r["step"] for r in records(root / "runs/late_eval")]


def test_a_resumed_run_keeps_the_precision_and_device_it_has(root: Path, whole: Path, tmp_path: Path):
    """The probe might choose another one today; here "auto" would find bf16 on many machines."""
    shutil.copytree(whole, tmp_path / "runs/kept")
    args = (
        "small.toml",
        "--run.dir",
        str(tmp_path / "runs"),
        "--run.name",
        "kept",
        "--run.resume",
        "--train.steps",
        "13",
    )
    code, out, err = run(root, *args, "--run.precision", "auto", "--run.device", "auto")
    assert code == 0, err
    assert "chosen: run.precision" not in out
    assert "chosen: run.device" not in out
    assert 'precision = "fp32"' in (tmp_path / "runs/kept/resumed_00000012_config.toml").read_text()


def test_a_run_at_its_end_resumes_to_its_summary(root: Path, whole: Path):
    """As after a kill between the last checkpoint and the last evaluation."""
    shutil.copytree(whole, root / "runs/ended")
    (root / "runs/ended/summary.json").unlink()
    code, _, err = run(root, "small.toml", "--run.name", "ended", "--run.resume", "--train.eval-every", "6")
    assert code == 0, err
    ends = [json.loads((root / f"runs/{n}/summary.json").read_text()) for n in ("ended", "whole")]
    assert ends[0]["val_loss"] == ends[1]["val_loss"]
    losses = [r["step"] for r in records(root / "runs/ended") if "val_loss" in r]
    assert losses == [0, 6, 12]


def test_a_resumed_run_that_never_reached_a_checkpoint_starts_anew_with_the_same_model(root: Path, whole: Path):
    shutil.copytree(whole, root / "runs/early")
    shutil.rmtree(root / "runs/early/checkpoints")
    args = ("small.toml", "--run.name", "early", "--run.resume", "--train.eval-every", "6")
    code, _, err = run(root, *args, "--model.n-layer", "1")
    assert code == 2
    assert "error: model.n_layer of a resumed run\n  got: 1\n  allowed: 2, as runs/early has it" in err
    code, out, err = run(root, *args)
    assert code == 0, err
    assert "no checkpoint yet: from the start" in out
    assert same(weights(root / "runs/early"), weights(whole))
    assert [r["step"] for r in records(root / "runs/early") if "val_loss" in r] == [0, 6, 12], "no record stands twice"
    assert run(root, "runs/early/config.toml", "--run.name", "early2")[0] == 0, "the written configuration starts a run"


def poisoned(root: Path, whole: Path, weight: str, value: float) -> Path:
    """A copy of the run with one entry of one saved weight replaced."""
    copy = root / f"runs/poisoned_{weight}"
    shutil.copytree(whole, copy)
    path = file_of(copy / "checkpoints/step_00000012", "model")
    tensors = load_file(path)
    tensors[weight][0, 0] = value
    save_file(tensors, path)
    sign_anew(path.parent.parent, path)
    return copy


def test_steps_that_are_not_finite_are_named_left_out_and_end_the_run(root: Path, whole: Path):
    copy = poisoned(root, whole, "blocks.0.mlp.up.weight", torch.inf)
    code, out, err = run(root, "small.toml", "--run.name", copy.name, "--run.resume", "--train.steps", "16")
    assert code == 1
    for line in (
        "step 13 was left out, the first of train.max_nonfinite = 3: the loss",
        "step 14 was left out, 2 in a row of train.max",
    ):
        assert line in out
    assert "error: step 15: the loss and of 14 more was not finite in call 15 of step(); that step was not taken" in err
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["step_00000008", "step_00000012"]


def test_a_last_step_that_is_not_finite_is_not_saved(root: Path, whole: Path):
    copy = poisoned(root, whole, "head.weight", torch.nan)
    code, _, err = run(
        root, "small.toml", "--run.name", copy.name, "--run.resume", "--train.steps", "13", "--train.max-nonfinite", "1"
    )
    assert code == 1
    assert "error: step 13: the loss" in err
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["step_00000008", "step_00000012"]


def test_the_reported_loss_is_that_of_the_saved_weights_without_dropout(root: Path, whole: Path):
    newest = whole / "checkpoints/step_00000012"
    config = from_dict(Config, json.loads((newest / "state.json").read_text())["config"])
    model = GPT(config.model).eval()
    model.load_state_dict(load_file(file_of(newest, "model")))
    stream = torch.from_numpy(read_shard(root / "corpora/small/val_000000.bin")[:513].astype(np.int64))
    with torch.no_grad():
        loss = model(stream[:-1].view(-1, 16), stream[1:].view(-1, 16))[1]
    assert loss is not None
    assert json.loads((whole / "summary.json").read_text())["val_loss"] == pytest.approx(loss.item(), abs=1e-5)


def with_backend(root: Path, name: str, backend: str) -> str:
    """train_gpt.py with torch.compile of another backend than inductor, whose C++ takes half a minute to compile."""
    script = root / f"{name}.py"
    script.write_text(
        f"import functools, runpy, sys, torch\n{backend}\ntorch.compile = functools.partial(torch.compile, backend=backend)\n"
        f"runpy.run_path({str(ROOT / 'train_gpt.py')!r}, run_name='__main__')\n"
    )
    return str(script)


@pytest.mark.soak
def test_a_compiled_run_agrees_and_its_compilation_is_off_the_clock(root: Path, whole: Path):
    """Traced and differentiated by the compiler; inductor, which goes on to C++, in `make soak`."""
    args = ("--train.steps", "3", "--model.dropout", "0")
    assert run(root, "small.toml", "--run.name", "eager", *args)[0] == 0
    script = "train_gpt.py" if SOAK else with_backend(root, "aot", "backend = 'aot_eager'")
    code, _, err = run(root, "small.toml", "--run.name", "compiled", "--run.compile", *args, script=script)
    if SOAK and " " in torch.__file__:  # torch's own compiler calls do not quote it
        assert code == 2
        assert "error: run.compile\n  got: " in err
        assert "allowed: where a C++ compiler is, and torch in a path without spaces" in err
        assert not (root / "runs/compiled").exists()
        return
    assert code == 0, err
    eager, compiled = (json.loads((root / f"runs/{n}/summary.json").read_text()) for n in ("eager", "compiled"))
    assert compiled["val_loss"] == pytest.approx(eager["val_loss"], abs=1e-3)
    assert compiled["compile_seconds"] > 0 == eager["compile_seconds"]
    first = next(r for r in records(root / "runs/compiled") if "loss" in r)
    assert first["train_seconds"] < 1, "nothing is compiled in the first step"


def test_a_compiler_that_fails_is_told_before_there_is_a_run(root: Path, whole: Path):
    script = with_backend(root, "fails", "def backend(*_):\n    raise RuntimeError('g++: not found\\nand much more')")
    code, _, err = run(root, "small.toml", "--run.name", "uncompiled", "--run.compile", script=script)
    assert code == 2
    assert (
        "error: run.compile\n  got: RuntimeError: g++: not found\n  allowed: where a C++ compiler is, and torch in a path without spaces"
        in err
    )
    assert not (root / "runs/uncompiled").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_ends_with_its_code(root: Path, whole: Path, number: int, code: int):
    name = f"signal{code}"
    folder = root / "runs" / name
    process = start(root, "small.toml", "--run.name", name, "--train.steps", "100000")
    while not (folder / "metrics.jsonl").is_file():
        time.sleep(0.01)
    os.kill(process.pid or 0, number)
    process.join(60)
    assert process.exitcode == code
    (newest,) = (folder / "checkpoints").glob(f"step_{max(r['step'] for r in records(folder)):08d}")
    step = int(newest.name[5:])
    assert (
        f"{signal.Signals(number).name}: saved step {step} in runs/{name}; --run.name {name} --run.resume goes on"
        in (root / "stdout").read_text()
    )
    found, out, err = run(root, "small.toml", "--run.name", name, "--run.resume", "--train.steps", str(step + 1))
    assert found == 0, err
    assert f"at step {step}" in out


def test_a_run_that_is_killed_before_its_first_checkpoint_gives_its_name_back(root: Path):
    args = ("small.toml", "--run.name", "killed-early", "--train.checkpoint-every", "0")
    folder = root / "runs/killed-early"
    process = start(root, *args, "--train.steps", "100000")
    while not (folder / "metrics.jsonl").is_file():
        time.sleep(0.01)
    code, _, err = run(root, *args)
    assert code == 2 and "error: run folder runs/killed-early exists" in err, "it lives"
    process.kill()
    process.join()
    logged = records(folder)
    code, out, err = run(root, *args, "--train.steps", "2")
    assert code == 0, err
    crashed = root / "runs/killed-early.crashed"
    assert f"ended without a checkpoint or a result: it is now runs/{crashed.name}" in out
    assert records(crashed)[: len(logged)] == logged, "nothing is lost"
    assert (folder / "summary.json").is_file()


def test_a_signal_after_the_last_step_does_not_cut_off_the_last_checkpoint(root: Path):
    """The signal comes at once after the loop, and writing is slow."""
    (root / "late.py").write_text(
        f"import os, runpy, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from training import checkpoint, run\nfsync = checkpoint._fsync\n"
        "checkpoint._fsync = lambda path: (time.sleep(0.2), fsync(path))\n"
        "run.Run.finish = lambda self: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"runpy.run_path({str(ROOT / 'train_gpt.py')!r}, run_name='__main__')\n"
    )
    run(root, "small.toml", "--run.name", "late", "--train.checkpoint-every", "0", script=str(root / "late.py"))
    assert [p.name for p in (root / "runs/late/checkpoints").iterdir()] == ["step_00000012"]


def test_sample_continues_the_prompt(root: Path, whole: Path):
    code, out, err = run(
        root, str(whole), "--prompt", "3 times 4", "--tokens", "20", "--samples", "2", script="sample.py"
    )
    assert code == 0, err
    assert out.count("3 times 4") >= 2
    assert (
        run(root, str(whole), "--prompt", "3 times 4", "--tokens", "20", "--samples", "2", script="sample.py")[1] == out
    ), "the seed decides"
    code, _, err = run(root, "runs/none", script="sample.py")
    assert code == 2
    assert "error: no run at runs/none\n  got: no such folder\n  allowed: " in err
    for option, value, text in (
        ("--top-k", "0", "--top-k\n  got: 0"),
        ("--temperature", "nan", "--temperature\n  got: nan"),
        ("--prompt", "語", "--prompt\n  got: '語'"),
    ):
        code, _, err = run(root, str(whole), option, value, script="sample.py")
        assert (code, text in err) == (2, True), err


def test_a_run_keeps_the_name_of_its_model_and_sample_rebuilds_it(root: Path, tmp_path: Path):
    options = ("--model.name", "ngram", "--model.ngram", "3", "--model.match", "1", "--model.mlp-shift")
    code, _, err = run(root, "small.toml", "--run.name", "ngrams", "--train.steps", "2", *options)
    assert code == 0, err
    folder = root / "runs/ngrams"
    assert 'name = "ngram"' in (folder / "config.toml").read_text().split("[model]")[1].split("[optim]")[0]
    newest = folder / "checkpoints/step_00000002"
    assert {"ngram_embedding.weight", "match_embedding.weight"} <= load_file(file_of(newest, "model")).keys()
    code, out, err = run(tmp_path, str(folder), "--prompt", "3 times", "--tokens", "9", script="sample.py")
    assert code == 0, err
    assert out.startswith("3 times")
    # A checkpoint from before there was a name, whose settings say what it is.
    state = json.loads((newest / "state.json").read_text())
    del state["config"]["model"]["name"]
    assert type(build(from_dict(Config, state["config"]).model)) is NgramGPT


def test_sample_needs_no_dataset(whole: Path, tmp_path: Path):
    code, out, err = run(tmp_path, str(whole), "--prompt", "3 times", "--tokens", "5", script="sample.py")
    assert code == 0, err
    assert "3 times" in out


def test_a_world_without_a_rank_is_refused(monkeypatch: pytest.MonkeyPatch):
    from training.runtime import RunConfig, RunError, Runtime

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RunError, match="WORLD_SIZE 2\n  got: no RANK, MASTER_ADDR, MASTER_PORT\n  allowed: .*\n  fix: torchrun"
    ):
        Runtime(RunConfig(device="cpu"))
