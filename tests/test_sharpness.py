"""studies/sharpness.py and training/sharpness.py: the numbers of a study on curves that are known, a run's records
against dense Hessians, thresholds by simulation.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.loader import Dataset, TrainBatches
from matplotlib.figure import Figure
from model import GPT, GPTConfig
from optim import Dualized, metrize
from optim.baselines import BASELINES, coordinates
from studies import runs
from studies.runs import StudyError
from studies.sharpness import main, read_methods
from studies.trajectories import (
    Curve,
    common_losses,
    consistency,
    drift,
    margins,
    ratios,
    read_curve,
    spread_at_losses,
    spread_at_steps,
)
from training import checkpoint
from training import config as configuration
from training.baseline import Baseline
from training.sharpness import Sharpness, stable

from tests.helpers import QUICK, run, small_dataset
from tests.pictures import check_nothing_is_cut_off, words

STEPS = np.arange(1, 101, 10.0)


def made(factor: float, *, delay: float = 1.0) -> Curve:
    """ln value = ln factor + a function of loss alone; the loss falls `delay` times as slowly."""
    losses = 4 * np.exp(-STEPS / (50 * delay))
    return Curve(STEPS, losses, factor * np.exp(1 / losses))


# ---- numbers of curves


def test_one_curve_at_all_sizes_has_no_spread():
    curves = [made(2.0) for _ in range(3)]
    assert max(spread_at_steps(curves), abs(drift(curves, [64, 128, 256]))) < 1e-12
    grid = common_losses(curves)
    assert grid is not None and spread_at_losses(curves, grid) < 1e-12


def test_a_power_of_width_is_its_exponent_and_its_spread():
    widths = [64, 128, 256]
    curves = [made(w**0.5) for w in widths]
    logs = [0.5 * math.log(w) for w in widths]
    assert drift(curves, widths) == pytest.approx(0.5)
    assert spread_at_steps(curves) == pytest.approx(np.std(logs, ddof=1))


def test_sizes_that_are_only_slower_have_no_spread_at_equal_loss():
    curves = [made(1.0), made(1.0, delay=1.5)]
    grid = common_losses(curves)
    assert grid is not None and grid[0] > grid[-1]
    assert grid[-1] >= max(c.losses.min() for c in curves) and grid[0] <= min(c.losses.max() for c in curves)
    assert spread_at_losses(curves, grid) < 0.01 < 0.05 < spread_at_steps(curves)


def test_curves_without_a_common_loss_have_none():
    assert common_losses([Curve(STEPS, STEPS + 10, STEPS), Curve(STEPS, -STEPS, STEPS)]) is None


def test_a_ratio_of_spreads_comes_with_its_interval():
    rng = np.random.default_rng(0)

    def seeds(exponent: float) -> list[list[Curve]]:
        return [[made(w**exponent * math.exp(0.02 * rng.standard_normal())) for w in (64, 128, 256)] for _ in range(4)]

    found = {"dualized": seeds(0.1), "ntk": seeds(0.5)}
    times = ratios(found, "dualized", "ntk")
    for key in ("steps", "losses"):
        i = times[key]
        assert i is not None and i.low < 5 < i.high and i.low > 3
    numbers = consistency(found, [64, 128, 256])
    exponent = numbers["ntk"]["drift"]
    assert exponent is not None and exponent.low < 0.5 < exponent.high


# ---- records


def small(**changes: Any) -> tuple[GPT, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model = GPT(
        GPTConfig(1, 1, 4, block_size=6, vocab_size=7, zero_init=False, **changes), generator=generator
    ).double()
    return model, list(torch.randint(0, 7, (2, 3, 6), generator=generator))


def dense(model: GPT, batch: list[torch.Tensor], scales: dict[str, float | torch.Tensor]) -> torch.Tensor:
    """S H S by rows of the double backward pass: eigenvalues of the whole matrix, ascending."""
    names = [n for n, _ in model.named_parameters()]
    weights = [p for _, p in model.named_parameters()]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = model(*batch)[1]
        assert loss is not None
        flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, weights, create_graph=True)])
        rows = [torch.cat([h.reshape(-1) for h in torch.autograd.grad(g, weights, retain_graph=True)]) for g in flat]
    s = torch.cat([(scales[n] * torch.ones_like(p)).reshape(-1) for n, p in zip(names, weights, strict=True)])
    return torch.linalg.eigvalsh(s[:, None] * torch.stack(rows) * s)


@pytest.mark.parametrize(
    ("name", "scaling"), [("dualized", "modular"), ("sgd", "ntk"), ("sgd", "standard"), ("normalized_sgd", "modular")]
)
def test_a_record_has_the_ends_of_the_spectrum_in_the_methods_own_coordinates(name: str, scaling: str):
    model, batch = small()
    norm = metrize(model, model.structure())
    if name == "dualized":
        optimizer: Dualized | Baseline = Dualized(model, 0.1, norm=norm)
    else:
        optimizer = Baseline(
            BASELINES[name](model, norm, lr=0.1, beta=0.9, beta2=0.99, weight_decay=0.0, scaling=scaling),
            model,
            max_grad_norm=None,
            scaling=scaling,  # type: ignore[arg-type]
        )
    record = Sharpness(model, optimizer, norm, batch).measure()
    spectrum = dense(model, batch, dict(coordinates(model, norm, scaling)))  # type: ignore[arg-type]
    assert record["coordinates"] == scaling
    assert record["lambda_max"] == pytest.approx(spectrum[-1].item(), rel=1e-4)
    assert spectrum[0] <= record["lambda_min"] < 0, "from above: Lanczos stops when the other end has converged"
    assert record["converged"] and model.training
    assert record["modular_sharpness"] >= 0 and "preconditioned" not in record


def test_adamw_has_its_preconditioned_curvature():
    model, batch = small()
    norm = metrize(model, model.structure())
    adamw = BASELINES["adamw"](model, norm, lr=0.01, beta=0.9, beta2=0.99, weight_decay=0.0)
    optimizer = Baseline(adamw, model, max_grad_norm=None, scaling="modular")
    for _ in range(3):
        model(*batch)[1].backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    record = Sharpness(model, optimizer, norm, batch).measure()
    state = {n: optimizer.optimizer.state[p] for n, p in model.named_parameters()}
    scales = {n: ((s["exp_avg_sq"] / (1 - 0.99**3)).sqrt() + 1e-8).rsqrt() for n, s in state.items()}
    assert record["preconditioned"] == pytest.approx(dense(model, batch, scales)[-1].item(), rel=1e-3)
    assert record["lambda_max"] == pytest.approx(dense(model, batch, dict.fromkeys(scales, 1.0))[-1].item(), rel=1e-4)
    assert record["threshold"] == pytest.approx(2 * 1.9 / (0.1 * 0.01))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_sgd_is_stable_below_its_threshold_and_not_above(beta: float):
    """On ½ λ w², by simulation of torch's."""
    for part, falls in ((0.98, True), (1.02, False)):
        w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=0.1, momentum=beta, dampening=beta)
        threshold = stable(optimizer)
        assert threshold is not None
        for _ in range(3000):
            w.grad = part * threshold * w.detach()
            optimizer.step()
        assert (abs(w.item()) < 1e-3) is falls


# ---- the command


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharpness with spaces")
    small_dataset(root)
    return root


def call(root: Path, *argv: str) -> int:
    where = (str(root / "small.toml"), "--data.dataset", str(root / "corpora/small"), "--run.dir", str(root / "runs"))
    options = ("--train.steps", "5", *QUICK)
    return main([*where, *options, "--train.sharpness-every", "2", "--train.sharpness-sequences", "4", *argv])


def test_the_command_measures_draws_and_compares(root: Path, capsys: pytest.CaptureFixture[str], figures: list[Figure]):
    argv = (
        "--widths",
        "8",
        "16",
        "--depths",
        "1",
        "2",
        "--methods",
        "dualized=1",
        "ntk=1",
        "--seeds",
        "2",
        "--name",
        "s",
        "--train.no-sharpness-modular",
    )
    assert call(root, *argv) == 0
    folder, said = root / "runs/s", capsys.readouterr().out
    assert {p.name for p in folder.glob("*.png")} == {"sharpness-width.png", "sharpness-depth.png"}
    assert all((folder / p).stat().st_size > 10_000 for p in ("sharpness-width.png", "sharpness-depth.png"))
    for figure in figures:
        check_nothing_is_cut_off(figure)
        assert all(label in words(figure) for label in ("λ_max", "nats", "training step", "unstable above", "thin:"))
    results = json.loads((folder / "results.json").read_text())
    assert [line["axis"] for line in results["lines"]] == ["width", "depth"]
    path = folder / "dualized.w16.d2.t16.b8.n5.lr1.s0"
    found = read_curve(path, "lambda_max")
    assert found is not None and list(found.steps) == [1, 2, 4]
    records = {r["step"]: r["sharpness"] for r in runs.metrics(path) if "sharpness" in r}
    assert list(found.values) == [records[s]["lambda_max"] for s in (1, 2, 4)]
    both = [
        [read_curve(folder / f"{m}.w{w}.d2.t16.b8.n5.lr{lr}.s{s}", "lambda_max") for w in (8, 16)]
        for m, lr in (("dualized", 1), ("ntk", 1))
        for s in (0, 1)
    ]
    spreads = [spread_at_steps([c for c in curves if c]) for curves in both]
    times = results["lines"][0]["ratios"]["ntk"]["steps"]["value"]
    assert times == pytest.approx(math.sqrt(spreads[2] * spreads[3] / (spreads[0] * spreads[1])))
    assert "spread of ntk over that of dualized" in said and "spread of ntk" in (folder / "verdict.txt").read_text()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("summary.json")}
    assert call(root, *argv, "--quantity", "gradient_norm") == 0
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("summary.json")} == before, (
        "another quantity of the same runs"
    )
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    assert call(root, *argv) == 0
    assert not any((folder / "configs").iterdir()) and len(list(folder.glob("*/restored.txt"))) == len(before)
    assert json.loads((folder / "results.json").read_text()) == results, "the curves are in the runs' lines"


@pytest.mark.parametrize("seed", ["0", "1"])
def test_every_run_of_a_study_looks_at_the_same_batch(root: Path, seed: str):
    name = f"batch{seed}"
    code, _, said = run(
        root, "small.toml", "--run.name", name, "--run.seed", seed, "--train.steps", "3", "--train.sharpness-every", "3"
    )
    assert code == 0, said
    config = configuration.load([str(root / "runs" / name / "config.toml")])
    config.data.dataset = str(root / "corpora/small")
    newest, _ = checkpoint.newest_whole(root / "runs" / name / "checkpoints")
    assert newest
    model = GPT(config.model).eval()
    checkpoint.load_model(newest, model)
    fixed = TrainBatches(
        Dataset(config.data).split("train"), block_size=16, batch_size=config.train.sharpness_sequences, seed=2**63
    ).batch(0)
    loss = model(*fixed)[1]
    assert loss is not None
    assert runs.metrics(root / "runs" / name)[-2]["sharpness"]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_point_of_equal_loss_is_one_where_the_loss_fell_to_it():
    """Not one of a spike above it."""
    spiked = Curve(np.arange(4.0), np.array([4.0, 3.0, 3.5, 2.0]), np.array([1.0, 2.0, 100.0, 3.0]))
    assert np.exp(spiked.at_losses(np.array([3.0, 2.5, 2.0]))) == pytest.approx([2, 6**0.5, 3])
    grid = common_losses([Curve(np.arange(3.0), np.array([2.9, 3.5, 2.0]), np.ones(3)), spiked])
    assert grid is not None and grid[0] == 2.9


def test_curvature_that_did_not_converge_is_left_out(tmp_path: Path):
    (tmp_path / "summary.json").write_text("{}")
    records = [
        {
            "step": i,
            "lr": 1.0,
            "sharpness": {"loss": 4.0 - i, "lambda_max": 1.0 + i, "converged": i != 1, "threshold": 2.0},
        }
        for i in range(3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found = read_curve(tmp_path, "lambda_max")
    assert found is not None and list(found.steps) == [0, 2] and list(found.values) == [1, 3]
    assert read_curve(tmp_path, "preconditioned") is None, "a method without it"
    assert margins(tmp_path) == [(0, 0.5), (1, 1.0), (2, 1.5)]


def test_the_margin_of_a_dualized_step_is_that_of_its_own_threshold(tmp_path: Path):
    for i, stable_lr in enumerate((4.0, None)):
        record = {"step": 1, "lr": 1.0, "sharpness": {"threshold": None, "stable_lr": stable_lr}}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        assert margins(tmp_path) == [(1, (0.25, 0.0)[i])]


def test_curvature_does_not_change_a_run(root: Path):
    for name, every in (("with", "2"), ("without", "0")):
        code, _, said = run(
            root, "small.toml", "--run.name", name, "--train.steps", "6", "--train.sharpness-every", every
        )
        assert code == 0, said
    losses = [[r["loss"] for r in runs.metrics(root / "runs" / name) if "loss" in r] for name in ("with", "without")]
    assert losses[0] == losses[1]
    measured = [r["sharpness"] for r in runs.metrics(root / "runs/with") if "sharpness" in r]
    assert len(measured) == 4 and all(m["modular_sharpness"] >= 0 for m in measured), (
        "by default in the modular norm too"
    )


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("--methods", "muon=1"), "--methods\n  got: muon=1\n  allowed: METHOD=LR, of dualized,"),
        (("--methods", "ntk"), "--methods\n  got: ntk\n"),
        (("--methods", "ntk=-1"), "--methods\n  got: ntk=-1\n"),
        (("--widths", "16"), "got: 0 axes"),
    ],
)
def test_what_cannot_be_studied_is_refused(root: Path, argv: tuple[str, ...], text: str):
    with pytest.raises(StudyError) as error:
        call(root, "--name", "refused", *argv)
    assert text in str(error.value)
    assert not (root / "runs/refused").exists()


def test_every_method_is_a_configuration(root: Path):
    for method in runs.METHODS:
        made = runs.job(
            configuration.load([str(root / "small.toml")]),
            "x",
            root / "runs",
            **runs.METHODS[method],
            **{"optim.lr": read_methods([f"{method}=0.5"])[method]},
        )
        assert made.config.optim.lr == 0.5


def test_bfloat16_weights_have_no_curvature_to_measure(root: Path):
    code, _, said = run(
        root, "small.toml", "--run.name", "bf16", "--train.sharpness-every", "2", "--optim.param-dtype", "bfloat16"
    )
    assert code == 2 and "train.sharpness_every\n  got: 2 with" in said
