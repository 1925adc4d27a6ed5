"""training/published.py: baselines from pytorch_optimizer, each with its authors' settings."""

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data.loader import Dataset, validation_batches
from models import build_model_and_norm
from optim import Refusal
from optim.baselines import BASELINES, Several
from optim.polar import Polar
from pytorch_optimizer.optimizer.muon import base as published_muon
from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
from safetensors.torch import load_file
from torch import Tensor, nn
from training import published
from training.baseline import evaluating
from training.checkpoint import load_model
from training.config import load, of_file

from tests.helpers import ROOT, run, small_dataset
from tests.test_baselines import baseline, batches, descend, loss_of, losses, net

FILES = {
    "schedule_free": "schedule_free_adamw",
    "prodigy": "prodigy",
    "normuon": "normuon",
    "soap": "soap",
    "adafactor": "adafactor",
}
# lr, beta, beta2, weight decay, by hand: the defaults of facebookresearch/schedule_free, konstmish/prodigy,
# zichongli5/NorMuon and nikhilvyas/SOAP, and transformers' "recommended T5 finetuning settings" of Adafactor. None: it
# takes no such setting.
AUTHORS = {
    "schedule_free": (0.0025, 0.9, 0.999, 0.0),
    "prodigy": (1.0, 0.9, 0.999, 0.0),
    "normuon": (0.02, 0.95, 0.95, 0.0),
    "soap": (0.003, 0.95, 0.95, 0.01),
    "adafactor": (0.001, None, None, 0.0),
}


def race(file: str) -> dict:
    return tomllib.loads((ROOT / f"configs/race/{file}.toml").read_text())


# ---- the files of a race


@pytest.mark.parametrize("file", FILES)
def test_a_file_has_the_authors_settings_and_the_races_model_and_data(file: str):
    raw, adamw, muon = race(file), race("adamw"), race("muon")
    assert {k: raw[k] for k in ("run", "data", "train")} == {k: adamw[k] for k in ("run", "data", "train")}
    assert raw["model"] == (muon if file == "normuon" else adamw)["model"]
    assert raw["optim"]["name"] == FILES[file]
    o, taken = load([str(ROOT / f"configs/race/{file}.toml")]).optim, BASELINES[FILES[file]].hints
    settings = zip(("lr", "beta", "beta2", "weight_decay"), AUTHORS[file], strict=True)
    assert {k: getattr(o, k) if k in taken else None for k, _ in settings} == dict(
        zip(("lr", "beta", "beta2", "weight_decay"), AUTHORS[file], strict=True)
    )
    assert raw["schedule"].get("cooldown") == {"schedule_free": 0.0, "prodigy": 1.0}.get(file, 0.7)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    small_dataset(root)
    return root


SMALLER = (
    *("--data.dataset", "corpora/small", "--model.n-layer", "2", "--model.n-head", "2", "--model.n-embd", "32"),
    *("--model.block-size", "32", "--model.attention-scale", "0.25", "--train.eval-tokens", "512"),
    *("--train.log-every", "1", "--train.sample-tokens", "0", "--train.pictures", "False"),
)


@pytest.mark.parametrize("file", FILES)
def test_the_file_of_each_trains_a_smaller_model(file: str, root: Path):
    """With the authors' learning rate, in 30 steps; Prodigy finds its own in some 20 and has 60."""
    steps = "60" if file == "prodigy" else "30"
    args = (str(ROOT / f"configs/race/{file}.toml"), "--run.name", file, "--train.steps", steps, *SMALLER)
    code, _, err = run(root, *args)
    assert code == 0, err
    found = losses(root / "runs" / file)
    assert found[-1] < found[0] - 0.3, found


# ---- each of them


def test_the_library_is_imported_only_when_asked_for():
    code = "import sys, training.config, training.baseline; sys.exit('pytorch_optimizer' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", FILES.values())
def test_without_the_library_its_optimizers_are_refused_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(Refusal) as refused:
        baseline(name, net())
    assert refused.value.fix == "pip install pytorch_optimizer==4.1.0" and refused.value.what == "optim.name"


def test_the_version_that_is_named_is_the_one_that_is_tested():
    assert f"pytorch_optimizer=={published.VERSION}\n" in (ROOT / "requirements-dev.txt").read_text()


def test_schedule_free_evaluates_the_average_of_its_iterates_and_trains_on_to_the_bit():
    """x is the mean of z over steps, as every step has the same lr: Defazio et al., eq. 4 with c = 1/t."""
    model, twin, data = net(), net(), batches(5)
    optimizer, other = (baseline("schedule_free_adamw", m, weight_decay=0.0) for m in (model, twin))
    iterates: dict[str, list[Tensor]] = {n: [] for n, _ in model.named_parameters()}
    for batch in data:
        descend(model, optimizer, batch[None])
        for name, p in model.named_parameters():
            iterates[name].append(optimizer.optimizer.state[p]["z"].clone())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with evaluating(optimizer):
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), torch.stack(iterates[name]).mean(0), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    descend(twin, other, data)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_checkpoint_of_schedule_free_has_the_weights_that_were_evaluated(root: Path):
    """Without evaluations the run is the same, and another model with the saved weights has the validation loss."""
    args = ("small.toml", "--optim.name", "schedule_free_adamw", "--optim.lr", "0.05", "--model.dropout", "0")
    for name, every in (("often", "1"), ("seldom", "0")):
        code, _, err = run(root, *args, "--run.name", name, "--train.eval-every", every, "--train.sample-tokens", "0")
        assert code == 0, err
    records = [json.loads(line) for line in (root / "runs/often/metrics.jsonl").read_text().splitlines()]
    trained = {r["step"]: r["loss"] for r in records if "loss" in r}
    assert list(trained.values()) == losses(root / "runs/seldom")
    saved, training = {}, {}
    for file in (root / "runs/often/checkpoints/step_00000012").glob("*/*.safetensors"):
        tensors = load_file(file)
        (saved if file.parent.name == "model" else training).update(tensors)
    z = training["head.weight.z"]
    y, x = training["head.weight.(training)"], saved["head.weight"]
    torch.testing.assert_close(y, 0.95 * x + 0.05 * z, rtol=1e-5, atol=1e-6)
    assert (y - x).norm() > 1e-3 * x.norm(), "two sets of weights"
    (validation,) = (r["val_loss"] for r in records if "val_loss" in r and r["step"] == 12)
    assert validation_loss(root, "often") == pytest.approx(validation, rel=1e-5)


def validation_loss(root: Path, name: str) -> float:
    """The loss per token of the weights in the last checkpoint of a run of small.toml, on its first 512 targets."""
    config = of_file(root / f"runs/{name}/config.toml")
    model, _ = build_model_and_norm(config)
    load_model(root / f"runs/{name}/checkpoints/step_00000012", model)
    dataset = Dataset(replace(config.data, dataset=str(root / config.data.dataset)))
    sums = [
        (model.eval()(x, y, reduction="sum")[1].item(), int((y >= 0).sum()))  # type: ignore[union-attr]
        for x, y in validation_batches(dataset.split("val"), block_size=16, batch_size=32, tokens=512)
    ]
    nats, tokens = map(sum, zip(*sums, strict=True))
    return nats / tokens


def test_prodigy_finds_a_step_size_and_keeps_it_in_its_groups():
    model = net()
    optimizer = baseline("prodigy", model)
    assert len(optimizer.param_groups) == 1
    descend(model, optimizer, batches(1).expand(30, -1, -1))
    (group,) = optimizer.param_groups
    assert group["d"] > 100 * group["d0"]
    larger = net()
    once = baseline("prodigy", larger, d_coef=10.0)
    descend(larger, once, batches(1).expand(5, -1, -1))
    assert once.param_groups[0]["d"] > group["d0"]


@pytest.mark.parametrize("shape", [(6, 15), (15, 6), (6, 6)])
def test_normuon_in_float32_is_the_librarys_without_its_cast(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    """In float64 both, so that nothing but the cast differs."""

    def in_float64(G: Tensor, num_steps: int, weights: list[tuple[float, float, float]]) -> Tensor:
        return zero_power_via_newton_schulz_5(G, num_steps, weights=weights, dtype=torch.float64)

    monkeypatch.setattr(published_muon, "zero_power_via_newton_schulz_5", in_float64)
    g = torch.Generator().manual_seed(0)
    start, grads = torch.randn(shape, generator=g).double(), torch.randn(5, *shape, generator=g).double()
    moved = []
    for kind in (published.float32_normuon(), published.library().NorMuon):
        w = nn.Parameter(start.clone())
        optimizer = kind([{"params": [w], "use_muon": True, "lr": 0.1}])
        for grad in grads:
            w.grad = grad.clone()
            optimizer.step()
        moved.append(w.detach())
    assert (moved[0] - moved[1]).norm() < 1e-12 * (moved[1] - start).norm()


def test_normuon_has_the_hidden_matrices_and_the_rest_is_as_beside_muon():
    ours, muon = (baseline(name, net()).optimizer for name in ("normuon", "muon_adamw"))
    assert isinstance(ours, Several) and isinstance(muon, Several)
    settings = ("param_names", "lr", "lr_scale", "betas", "eps", "weight_decay")
    rest = [[{k: g[k] for k in settings} for g in o.optimizers[1].param_groups] for o in (ours, muon)]
    assert rest[0] == rest[1]
    assert ours.param_groups[0]["param_names"] == ["up.weight", "down.weight"]
    single = baseline("normuon", net(), polar=Polar(dtype="float32")).optimizer
    assert type(single.optimizers[0]).__name__ == "Float32NorMuon"  # type: ignore[attr-defined]


def test_normuon_keeps_the_size_of_muons_step_and_evens_its_rows():
    """Within 30%: five steps of the iteration leave singular values between 0.7 and 1.2, and rows as even as that."""
    model = net()
    before = model.up.weight.detach().clone()  # (24, 8), whose rows have different gradients
    loss_of(model, batches(1)[0]).backward()
    optimizer = baseline("normuon", model, weight_decay=0.0)
    optimizer.step()
    step = (model.up.weight.detach() - before) / (0.02 * 3**0.5)
    assert step.norm().item() == pytest.approx(8**0.5, rel=0.3)
    rows = step.norm(dim=1)
    assert rows.max() < 1.3 * rows.min()


def test_soap_moves_no_weight_in_its_first_step():
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = baseline("soap", model)
    descend(model, optimizer, batches(1))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    descend(model, optimizer, batches(2))
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_adafactor_steps_by_the_lr_that_the_loop_sets():
    """A step has RMS lr at most, its clip; the scale of a weight changes nothing."""
    steps = []
    for scale in (1.0, 8.0):
        model = net()
        optimizer = baseline("adafactor", model, weight_decay=0.0)
        weight = model.head.weight
        with torch.no_grad():
            weight.mul_(scale)
        old = weight.detach().clone()
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
        for group in optimizer.param_groups:
            group["lr"] = 0.003
        optimizer.step()
        steps.append(weight.detach() - old)
    assert 0.5 * 0.003 < steps[0].square().mean().sqrt() <= 0.003 * (1 + 1e-9)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-9, atol=1e-15)
