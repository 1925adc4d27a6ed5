"""train_gpt.py in several real processes: the same numbers at any number of ranks, checkpoints that fit all, and every
fault.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from model import GPT, GPTConfig
from optim import Dualized, metrize
from optim.ranks import Piece
from torch import Tensor
from training import checkpoint
from training.checkpoint import SaveError, Saver, best_of, newest_whole
from training.tensor_files import read_pieces, saved_tensors

from tests.forked_python import forked_python, program
from tests.helpers import ROOT, SOAK, descendants, ranks, run, run_ranks, small_dataset, start_ranks

KILLS = 100 if SOAK else 2
STEPS = "20" if SOAK else "6"  # of runs that are compared
EXACT = (
    "--optim.param-dtype",
    "float64",
    "--optim.polar.schedule",
    "exact",
    "--optim.lr",
    "1",
    "--schedule.cooldown",
    "0",
)
# 36 wide: at 4 ranks, the head's 18 rows are shards of 5, 5, 5 and 3.
SHAPE = (
    "--model.n-embd",
    "36",
    "--train.batch-size",
    "24",
    "--train.sample-tokens",
    "0",
    "--train.checkpoint-every",
    "0",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks with spaces")
    small_dataset(root)
    return root


def train(root: Path, world: int, name: str, *argv: str) -> str:
    """A run of `world` ranks to its end: what rank 0 printed."""
    args = ("small.toml", "--run.name", name, *argv)
    found = [run(root, *args)] if world == 1 else run_ranks(root, world, *args)
    assert [code for code, *_ in found] == [0] * world, [err for *_, err in found]
    for _, out, err in found[1:]:
        assert not out, "rank 0 speaks for all"
        assert "rror" not in err
    return found[0][1]


def losses(root: Path, name: str, key: str = "loss") -> dict[int, float]:
    lines = (root / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r[key] for r in map(json.loads, lines) if key in r}


def weights(root: Path, name: str) -> dict[str, Tensor]:
    """The whole weights of the newest checkpoint, whoever wrote it."""
    newest, damage = newest_whole(root / "runs" / name / "checkpoints")
    assert newest and not damage, damage
    whole = {k: torch.empty(shape, dtype=torch.float64) for k, (shape, _) in saved_tensors(newest / "model").items()}
    read_pieces(newest / "model", {k: Piece(x, 0, tuple(x.shape)) for k, x in whole.items()})
    return whole


def deviation(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest ‖a − b‖ / ‖b‖ of a weight."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).norm() / b[k].norm()).item() for k in a)


def until(condition: Callable[[], object], processes: list[BaseProcess] | None = None, deadline: float = 60) -> None:
    """Return when the condition holds; fail at the deadline, or when a process has ended before."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "the deadline passed"
        assert not any(p.exitcode is not None for p in processes or []), [p.exitcode for p in processes or []]
        time.sleep(0.002)


def ends(processes: list[BaseProcess], deadline: float = 60) -> list[int | None]:
    """Exit codes."""
    for process in processes:
        process.join(deadline)
    codes = [p.exitcode for p in processes]
    for process in processes:
        process.kill()
    return codes


# ---- the same numbers


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Tensor]:
    """Of one process, in float64 with dropout: what every other way of computing it is compared with."""
    train(root, 1, "alone", *SHAPE, *EXACT, "--train.steps", STEPS, "--train.gradient-accumulation-steps", "4")
    return weights(root, "alone")


@pytest.mark.soak
@pytest.mark.parametrize(
    ("world", "accumulation", "mode"),
    [
        (2, 2, ("ddp",)),
        (4, 1, ("ddp",)),
        (2, 2, ("fsdp",)),
        (4, 1, ("fsdp",)),
        (4, 1, ("hsdp", "--run.shard-size", "2")),
    ],
)
def test_ranks_change_who_computes_not_what(
    root: Path, alone: dict[str, Tensor], world: int, accumulation: int, mode: tuple[str, ...]
):
    """Dropout included: masks depend on the step and on the part of the global batch, not on who has it."""
    name = f"{mode[0]}{world}"
    steps = ("--train.steps", STEPS, "--train.gradient-accumulation-steps", str(accumulation))
    out = train(root, world, name, *SHAPE, *EXACT, *steps, "--run.parallel", *mode)
    assert f"chosen: backend = gloo for {world} ranks on 1 machine, run.parallel = {mode[0]}" in out
    assert deviation(weights(root, name), alone) < 1e-9
    assert losses(root, name) == pytest.approx(losses(root, "alone"), abs=1e-9)
    assert losses(root, name, "val_loss") == pytest.approx(losses(root, "alone", "val_loss"), abs=1e-9), (
        "evaluation is shared out"
    )


@pytest.mark.soak
@pytest.mark.parametrize("accumulation", [1, 4])
def test_three_ranks_take_thirds_of_the_same_batches(root: Path, accumulation: int):
    found = []
    for world, parts in ((1, 3 * accumulation), (3, accumulation)):
        name = f"thirds{world}x{parts}"
        train(
            root,
            world,
            name,
            *SHAPE,
            *EXACT,
            "--train.steps",
            STEPS,
            "--train.gradient-accumulation-steps",
            str(parts),
            "--train.batch-size",
            "12",
        )
        found.append(weights(root, name))
    assert deviation(*found) < 1e-9


def test_a_whole_run_of_two_ranks_in_float32_ends_as_one_process_does(root: Path):
    train(root, 1, "fp32", "--train.batch-size", "12")
    train(
        root,
        2,
        "fp32x2",
        "--train.batch-size",
        "12",
        "--train.gradient-accumulation-steps",
        "1",
        "--train.telemetry-every",
        "4",
    )
    one, two = losses(root, "fp32"), losses(root, "fp32x2")
    assert two[1] == pytest.approx(one[1], abs=1e-5)
    assert two == pytest.approx(one, abs=5e-3)
    summary = json.loads((root / "runs/fp32x2/summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["tokens"] == 12 * 12 * 16
    assert 0.45 < summary["optimizer_state_bytes"] / (4 * summary["params"]) < 0.55, (
        "each rank has half of the momentum"
    )
    assert [
        r for r in map(json.loads, (root / "runs/fp32x2/metrics.jsonl").read_text().splitlines()) if "geometry" in r
    ]


@pytest.mark.soak
def test_in_bf16_two_ranks_end_within_the_spread_of_seeds(root: Path):
    ends_at, steps = [], 60 if SOAK else 24
    fixed = (
        "--run.precision",
        "bf16",
        "--train.steps",
        str(steps),
        "--train.batch-size",
        "16",
        "--train.checkpoint-every",
        "0",
    )
    for seed in range(4):
        train(root, 1, f"bf16-{seed}", *fixed, "--run.seed", str(seed))
        ends_at.append(losses(root, f"bf16-{seed}", "val_loss")[steps])
    for mode in ("ddp", "fsdp"):
        train(root, 2, f"bf16x2-{mode}", *fixed, "--train.gradient-accumulation-steps", "1", "--run.parallel", mode)
        assert abs(losses(root, f"bf16x2-{mode}", "val_loss")[steps] - ends_at[0]) <= max(ends_at) - min(ends_at)


# ---- checkpoints


def test_any_world_and_mode_resumes_what_any_other_saved(root: Path, alone: dict[str, Tensor]):
    """1 → 2 → 4 (fsdp) → 4 (hsdp) → 3 → 1 ranks; the masks of dropout differ at 3 ranks, so there is none."""
    fixed = (*SHAPE, *EXACT, "--model.dropout", "0", "--optim.direction", "adam", "--optim.momentum-dtype", "float32")
    train(root, 1, "straight", *fixed, "--train.steps", "16", "--train.gradient-accumulation-steps", "1")
    chain = [(1, "ddp"), (2, "ddp"), (4, "fsdp"), (4, "hsdp"), (3, "ddp"), (2, "fsdp"), (1, "ddp")]
    for i, (world, mode) in enumerate(chain):
        go_on = ("--run.resume",) if i else ()
        sizes = ("--run.shard-size", "2") if mode == "hsdp" else ()
        out = train(
            root, world, "chain", *fixed, *go_on, "--run.parallel", mode, *sizes,
            "--train.steps", str(16 if i == 6 else 2 * (i + 1)), "--train.gradient-accumulation-steps", "1",
        )  # fmt: skip
        assert not i or f"at step {2 * i}" in out
    # What is left is the order of sums.
    assert losses(root, "chain") == pytest.approx(losses(root, "straight"), abs=1e-9)
    assert deviation(weights(root, "chain"), weights(root, "straight")) < 1e-7


def small() -> tuple[GPT, Dualized]:
    model = GPT(
        GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=11),
        generator=torch.Generator().manual_seed(0),
    )
    optimizer = Dualized(model, 1.0, norm=metrize(model, model.structure()))
    model(torch.arange(4)[None], torch.arange(4)[None])[1].backward()  # type: ignore[union-attr]
    optimizer.step()
    return model, optimizer


def state(step: int, val_loss: float | None) -> dict:
    return {
        "config": {},
        "progress": {"val_step": -1 if val_loss is None else step, "val_loss": val_loss},
        "shards": [],
        "tokenizer": {},
    }


def test_saving_goes_on_behind_the_run_and_holds_what_was_there_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import threading

    go, sign = threading.Event(), checkpoint._signature
    monkeypatch.setattr(checkpoint, "_signature", lambda path: (go.wait(30), sign(path))[1])
    model, optimizer = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    saver = Saver(tmp_path, keep=2)
    saver.save(1, model, optimizer, state(1, 1.0), {})
    optimizer.step()
    assert not checkpoint.steps(tmp_path), "save() returned before the checkpoint is there"
    go.set()
    saver.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"], "nothing half-written is left"
    checkpoint.load_model(tmp_path / "step_00000001", model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_newest_and_the_best_are_kept(tmp_path: Path):
    model, optimizer = small()
    saver = Saver(tmp_path, keep=2)
    for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 1.5], start=1):
        saver.save(step, model, optimizer, state(step, loss), {"config.toml": "x = 1\n"})
    saver.wait()
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step_00000002", "step_00000004", "step_00000005"]
    assert best_of(tmp_path) == tmp_path / "step_00000002"
    assert (tmp_path / "step_00000005/config.toml").read_text() == "x = 1\n"
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".pkl", ".metadata", ".distcp")], (
        "nothing pickled"
    )


def test_what_is_pruned_is_never_the_new_checkpoint(tmp_path: Path):
    """The newest was damaged, the run went on from the one before, and was told to stop before it came as far again."""
    model, optimizer = small()
    saver = Saver(tmp_path, keep=1)
    for step in (100, 200, 150):
        saver.save(step, model, optimizer, state(step, None), {})
        saver.wait()
        if step == 200:
            (tmp_path / "step_00000200/state.json").write_text("{}")
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step_00000150"]
    assert newest_whole(tmp_path) == (tmp_path / "step_00000150", [])


def test_a_state_that_was_edited_or_moved_is_damage(tmp_path: Path):
    model, optimizer = small()
    saver = Saver(tmp_path, keep=3)
    for step in (1, 2, 3):
        saver.save(step, model, optimizer, state(step, None), {})
    saver.wait()
    path = tmp_path / "step_00000003/state.json"
    path.write_text(path.read_text().replace('"calls": 1', '"calls": 2'))
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000004")
    newest, damage = newest_whole(tmp_path)
    assert newest == tmp_path / "step_00000001"
    assert len(damage) == 2 and all("a state that is not the one that was written there" in line for line in damage)


def _saves_into_folders_of_their_own(rank: int, world: int, folder: str) -> str:
    import torch.distributed as dist

    model, optimizer = small()
    saver = Saver(Path(folder) / str(rank), keep=1, group=dist.new_group(backend="gloo"))
    saver.save(1, model, optimizer, state(1, None), {})
    with pytest.raises(SaveError) as caught:
        saver.wait()
    return str(caught.value)


def test_ranks_that_do_not_see_one_folder_are_told_when_they_save(tmp_path: Path):
    for said in ranks(2, _saves_into_folders_of_their_own, str(tmp_path)):
        assert "was written by another rank and is not here: all ranks must see one folder" in said
    assert not checkpoint.steps(tmp_path / "0")


def test_a_folder_that_cannot_be_written_is_told_at_the_next_save(tmp_path: Path):
    model, optimizer = small()
    saver = Saver(tmp_path / "checkpoints", keep=2)
    saver.save(1, model, optimizer, state(1, 1.0), {})
    saver.wait()
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    (tmp_path / "checkpoints").write_text("a file")
    saver.save(2, model, optimizer, state(2, 1.0), {})
    with pytest.raises(
        SaveError, match="the checkpoint of step 2 could not be saved\n  got: .*\n  allowed: .*\n  fix: "
    ):
        saver.wait()
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "moved").rename(tmp_path / "checkpoints")
    saver.save(3, model, optimizer, state(3, 1.0), {})
    saver.wait()
    assert [p.name for p in checkpoint.steps(tmp_path / "checkpoints")] == ["step_00000001", "step_00000003"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_while_saving_loses_nothing_older(root: Path, world: int):
    """A limit on the size of files, as write() on a full disk: it fails in the middle."""
    name = f"full{world}"
    folder = root / "runs" / name / "checkpoints"
    args = (
        "small.toml",
        "--run.name",
        name,
        "--train.checkpoint-every",
        "1",
        "--train.steps",
        "100000",
        "--train.log-every",
        "0",
    )
    processes = start_ranks(root, world, *args)
    until(lambda: checkpoint.steps(folder), processes)
    for process in processes:
        resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE, (4096, 4096))
    until(lambda: "could not be saved" in (root / "stdout.0").read_text(), processes)
    kept = checkpoint.steps(folder)[-1]
    checkpoint.check_files(kept)
    os.kill(processes[0].pid or 0, signal.SIGTERM)
    assert ends(processes) == [1] * world, "the last checkpoint could not be written"
    said = (root / "stderr.0").read_text()
    assert "could not be saved\n  got: " in said and "File too large" in said
    assert "Traceback" not in said
    out = train(
        root, world, name, "--run.resume", "--train.steps", str(int(kept.name[5:]) + 2), "--train.checkpoint-every", "1"
    )
    assert f"resumed from runs/{name}/checkpoints/{kept.name}" in out
    assert not list(folder.glob(".*")), "nothing half-written is left"


# ---- faults


def test_a_signal_to_one_rank_saves_on_all(root: Path):
    args = ("small.toml", "--run.name", "told", "--train.steps", "100000")
    processes = start_ranks(root, 2, *args)
    until(lambda: (root / "runs/told/metrics.jsonl").is_file(), processes)
    os.kill(processes[1].pid or 0, signal.SIGTERM)
    assert ends(processes) == [143, 143]
    (step,) = [int(p.name[5:]) for p in checkpoint.steps(root / "runs/told/checkpoints")[-1:]]
    assert (
        f"SIGTERM: saved step {step} in runs/told; --run.name told --run.resume goes on"
        in (root / "runs/told/log.txt").read_text()
    )
    assert f"at step {step}" in train(root, 1, "told", "--run.resume", "--train.steps", str(step + 1))


def test_signals_that_come_twice_still_save(root: Path):
    """A scheduler tells every process, and so does torchrun; a terminal's SIGINT comes twice likewise."""
    processes = start_ranks(root, 2, "small.toml", "--run.name", "twice", "--train.steps", "100000")
    until(lambda: (root / "runs/twice/metrics.jsonl").is_file(), processes)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        for process in processes:
            os.kill(process.pid or 0, number)
    assert ends(processes) in ([143, 143], [130, 130])
    assert checkpoint.steps(root / "runs/twice/checkpoints")


def test_a_rank_that_hangs_is_named_by_the_others(root: Path):
    processes = start_ranks(
        root,
        3,
        "small.toml",
        "--run.name",
        "hung",
        "--run.timeout",
        "5",
        "--train.steps",
        "100000",
        "--train.batch-size",
        "12",
    )
    until(lambda: (root / "runs/hung/metrics.jsonl").is_file(), processes)
    os.kill(processes[1].pid or 0, signal.SIGSTOP)
    try:
        for process in (processes[0], processes[2]):
            process.join(30)
        assert [processes[0].exitcode, processes[2].exitcode] == [124, 124]
    finally:
        ends(processes, 0.1)
    for rank in (0, 2):
        said = (root / f"stderr.{rank}").read_text()
        assert "error: no progress for 5 s\n  got: rank 1 (" in said
        assert f"behind the others; this is rank {rank}, " in said


def test_the_death_of_a_rank_ends_the_others(root: Path):
    processes = start_ranks(root, 2, "small.toml", "--run.name", "lost", "--train.steps", "100000")
    until(lambda: (root / "runs/lost/metrics.jsonl").is_file(), processes)
    processes[1].kill()
    assert ends(processes) == [1, -9]
    assert "error: rank 0 failed, perhaps as another one left" in (root / "stderr.0").read_text()


def test_a_number_that_is_not_finite_ends_all_ranks_with_its_place(root: Path):
    """One entry of a matrix is NaN from step 5 on, by way of a checkpoint."""
    train(root, 1, "nan", "--train.steps", "4")
    folder = root / "runs/nan/checkpoints/step_00000004"
    (file,) = (folder / "model").iterdir()
    from safetensors.torch import load_file, save_file

    from tests.test_train import sign_anew

    tensors = load_file(file)
    tensors["blocks.1.mlp.up.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    sign_anew(folder, file)
    found = run_ranks(
        root,
        2,
        "small.toml",
        "--run.name",
        "nan",
        "--run.resume",
        "--train.steps",
        "20",
        "--train.checkpoint-every",
        "1",
    )
    assert [code for code, *_ in found] == [1, 1]
    assert (
        "step 5 was left out, the first of train.max_nonfinite = 3: the loss on rank 0 and of 14 more was not finite in call 5"
        in found[0][1]
    )
    assert "error: step 7: the loss on rank 0" in found[0][2]
    checkpoint.check_files(newest_whole(root / "runs/nan/checkpoints")[0] or Path())


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("--train.batch-size", "6"), "error: train.batch_size\n  got: 6\n  allowed: a multiple of 4, 2 ranks times train.gradient_accumulation_steps = 2"),
        (("--run.parallel", "hsdp", "--run.shard-size", "3"), "error: run.shard_size\n  got: 3\n  allowed: a divisor of the 2 ranks"),
        (("--run.parallel", "fsdp", "--optim.direction", "soap"), "\n  got: the direction 'soap' of a sharded weight\n  allowed: momentum, nesterov"),
        (("--run.parallel", "fsdp", "--run.compile"), "error: run.compile\n  got: true with run.parallel = 'fsdp'"),
        (("--run.parallel", "tp"), "error: --run.parallel\n  got: 'tp'\n  allowed: \"ddp\", \"fsdp\", \"hsdp\""),
        (("--run.timeout", "0"), "error: run.timeout\n  got: 0"),
        (("--data.dataset", "corpora/none"), "error: no dataset at corpora/none"),
    ],
    ids=lambda v: " ".join(v[-2:]) if isinstance(v, tuple) else "",
)  # fmt: skip
def test_refusals_are_told_once_and_end_all_ranks(root: Path, argv: tuple[str, ...], text: str):
    found = run_ranks(root, 2, "small.toml", "--run.name", "refused", *argv)
    assert [code for code, *_ in found] == [2, 2]
    assert text in found[0][2]
    assert "rror" not in found[1][2]
    assert not (root / "runs/refused").exists()


def test_what_one_rank_alone_cannot_do_is_told_with_its_number(root: Path, tmp_path: Path):
    script = tmp_path / "differ.py"
    script.write_text(
        f"import os, runpy, sys\nif os.environ['RANK'] == '1':\n    sys.argv += ['--data.dataset', 'corpora/none']\n"
        f"sys.argv[0] = {str(ROOT / 'train_gpt.py')!r}\nsys.path.insert(0, {str(ROOT)!r})\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    found = run_ranks(root, 2, "small.toml", "--run.name", "differ", script=str(script))
    assert [code for code, *_ in found] == [2, 2]
    assert "error: rank 1: no dataset at corpora/none" in found[0][2]
    assert not (root / "runs/differ").exists()


@pytest.mark.soak
def test_killed_at_any_moment_on_any_rank_a_run_resumes_to_the_same_weights(root: Path):
    """kill -9 of one of two ranks, then the others as torchrun does, at random moments, saving included; then
    resume="auto", sometimes alone.
    """
    args = (
        "--run.resume",
        "auto",
        "--train.steps",
        "30" if SOAK else "12",
        "--train.checkpoint-every",
        "1",
        *EXACT,
        "--train.sample-tokens",
        "0",
    )
    two, one = ("--train.gradient-accumulation-steps", "1"), ("--train.gradient-accumulation-steps", "2")
    began = time.monotonic()
    train(root, 2, "unharmed", *args, *two)
    life, whole = time.monotonic() - began, weights(root, "unharmed")
    rng, at = random.Random(1), set()
    for kill in range(KILLS):
        shutil.rmtree(root / "runs/killed", ignore_errors=True)
        processes = start_ranks(root, 2, "small.toml", *args, "--run.name", "killed", *two)
        if kill % 3:  # in training, where a checkpoint is always being written; else anywhere from start-up on
            until(lambda: checkpoint.steps(root / "runs/killed/checkpoints"), processes)
            time.sleep(rng.uniform(0, 0.6))
        else:
            time.sleep(rng.uniform(0, life))
        processes[rng.randrange(2)].kill()
        time.sleep(rng.uniform(0, 0.05))
        ends(processes, 0)
        world, parts = (1, one) if rng.random() < 0.3 else (2, two)
        out = train(root, world, "killed", *args, *parts)
        at.add(out.splitlines()[0])
        assert deviation(weights(root, "killed"), whole) < 1e-9, f"kill {kill}, {world} ranks: {out.splitlines()[0]}"
        assert losses(root, "killed") == pytest.approx(losses(root, "unharmed"), abs=1e-9)
    assert len(at) >= (15 if SOAK else 1), f"the moments differ: {at}"  # of as many as there are steps


@pytest.fixture
def python(tmp_path: Path) -> Iterator[Path]:
    with forked_python(tmp_path) as path:
        yield path


def test_torchrun_restarts_a_run_whose_worker_was_killed(root: Path, python: Path):
    args = (
        "--train.steps",
        "100",
        "--train.checkpoint-every",
        "10",
        "--train.log-every",
        "0",
        "--train.sample-tokens",
        "0",
    )
    command = [
        str(python), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1",
        str(ROOT / "train_gpt.py"), "small.toml", "--run.name", "restarted", *args,
    ]  # fmt: skip
    folder = root / "runs/restarted/checkpoints"
    with (root / "torchrun.log").open("w") as log:
        agent = subprocess.Popen(
            command,
            cwd=root,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": str(python)},
        )
    try:
        until(lambda: checkpoint.steps(folder) or agent.poll() is not None)
        assert agent.poll() is None, (root / "torchrun.log").read_text()
        workers = descendants(program(python, agent.pid))
        os.kill(workers[-1], signal.SIGKILL)
        assert agent.wait(90) == 0, (root / "torchrun.log").read_text()
    finally:
        agent.kill()
    assert "resumed from runs/restarted/checkpoints/step_" in (root / "runs/restarted/log.txt").read_text()
    assert checkpoint.steps(folder)[-1].name == "step_00000100"


def test_restarts_need_a_name(root: Path):
    code, _, err = run(root, "small.toml", env={"TORCHELASTIC_MAX_RESTARTS": "3"})
    assert code == 2
    assert "error: run.name\n  got: none, under torchrun --max-restarts" in err
