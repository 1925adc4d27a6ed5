"""optim/baselines.py, training/baseline.py: the optimizers that are compared with Dualized, by themselves, in
train_gpt.py, and of two ranks.
"""

import copy
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from model import GPT, GPTConfig
from models.ngram import NgramConfig, NgramGPT
from models.track3 import Track3Config, Track3GPT
from optim import ModularNorm, NonFiniteError, Normalized, Rule, metrize
from optim.baselines import BASELINES, Float32Muon, Several, coordinates, set_beta
from optim.errors import Refusal
from optim.norms import L1ToRMS, RMSToLinf, RMSToRMS, VectorRMS
from optim.polar import Polar
from optim.roles import RoleNorms
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import _muon
from training.baseline import Baseline
from training.checkpoint import Saver, load_model, load_optimizer, read_state, signed

from tests.helpers import ROOT, ranks, run, run_ranks, small_dataset, start

V, D = 13, 8
LR = {"normalized_adam": 0.5, "normalized_sgd": 0.5, "adamw": 0.01, "muon_adamw": 0.02, "sgd": 0.3}
# Of training/published.py: some more than their authors have, as the runs here are short.
LR |= {"schedule_free_adamw": 0.02, "prodigy": 1.0, "normuon": 0.02, "soap": 0.01, "adafactor": 0.01}
OF_TORCH = [name for name in LR if BASELINES[name].build.__module__ == "optim.baselines"]
SETTINGS = {"beta": 0.8, "beta2": 0.9, "weight_decay": 0.1, "refresh_every": 2}


class Net(nn.Module):
    """Every kind of weight: an embedding, matrices wide and tall, biases, a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.up, self.norm, self.down = nn.Linear(D, 3 * D), nn.RMSNorm(3 * D), nn.Linear(3 * D, D, bias=False)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        return self.head(self.down(self.norm(self.up(self.embedding(idx)).tanh())))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def gpt() -> GPT:
    return GPT(
        GPTConfig(n_layer=2, n_head=2, n_embd=D, block_size=4, vocab_size=V),
        RoleNorms().build(Polar("exact"), 2),
        torch.Generator().manual_seed(0),
    )


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch[:, 0]), batch[:, 1])


def batches(n: int, size: int = 16) -> Tensor:
    """(n, size, 2): inputs and targets."""
    return torch.randint(V, (n, size, 2), generator=torch.Generator().manual_seed(1))


def normed(model: nn.Module) -> ModularNorm:
    return metrize(model, rules=[Rule("head.weight", role="head")])


def baseline(name: str, model: nn.Module, **options) -> Baseline:
    max_grad_norm = options.pop("max_grad_norm", None)
    return Baseline(
        BASELINES[name](
            model, normed(model), **{"lr": LR[name], "scaling": "standard", "auxiliary_lr": 1.0, **SETTINGS, **options}
        ),
        model,
        max_grad_norm=max_grad_norm,
        scaling="modular",
    )


def descend(model: nn.Module, optimizer: Baseline, data: Tensor) -> None:
    for batch in data:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step(loss=loss.detach())
        optimizer.check_finite()
        optimizer.zero_grad()


# ---- Muon + AdamW


@pytest.mark.parametrize("shape", [(6, 15), (15, 6), (1, 4)])
def test_muon_in_float32_is_torchs_without_its_cast(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    """In float64 both, so that nothing but the cast differs; torch's own function is back after the step."""
    theirs_in_bfloat16 = _muon._zeropower_via_newtonschulz
    g = torch.Generator().manual_seed(0)
    start, grads = torch.randn(shape, generator=g).double(), torch.randn(5, *shape, generator=g).double()
    moved = []
    for kind in (Float32Muon, torch.optim.Muon):
        w = nn.Parameter(start.clone())
        optimizer = kind([w], lr=0.1, momentum=0.9, weight_decay=0.05)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "bfloat16", lambda X: X.clone())
            for w.grad in grads:
                optimizer.step()
        moved.append(w.detach())
    assert (moved[0] - moved[1]).norm() < 1e-12 * (moved[1] - start).norm()
    assert _muon._zeropower_via_newtonschulz is theirs_in_bfloat16


def test_muon_iterates_in_the_dtype_of_polar():
    for dtype, kind in (("float32", Float32Muon), ("bfloat16", torch.optim.Muon)):
        both = baseline("muon_adamw", net(), polar=Polar(dtype=dtype)).optimizer  # type: ignore[arg-type]
        assert isinstance(both, Several) and type(both.optimizers[0]) is kind


@pytest.mark.parametrize("emulated", [True, False])
def test_a_run_with_muon_takes_float32_where_bfloat16_is_emulated_and_says_so(tmp_path: Path, emulated: bool):
    small_dataset(tmp_path)
    (tmp_path / "train.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport train_gpt\ntrain_gpt.bfloat16_is_emulated = lambda device: {emulated}\ntrain_gpt.main(sys.argv[1:])\n"
    )
    options = ("--optim.name", "muon_adamw", "--optim.lr", "0.02", "--train.steps", "2", "--run.name", "a")
    code, out, err = run(tmp_path, "small.toml", *options, script=str(tmp_path / "train.py"))
    assert code == 0, err
    said = (
        "float32 (Muon's iteration; in bfloat16, which torch takes, it is emulated here)"
        if emulated
        else "bfloat16 (Muon's iteration, as torch has it)"
    )
    assert f"chosen: optim.polar.dtype = {said}\n" in out
    assert f'dtype = "{"float32" if emulated else "bfloat16"}"' in (tmp_path / "runs/a/config.toml").read_text()
    assert (
        (tmp_path / "runs/a/receipt.txt")
        .read_text()
        .startswith("Float32Muon + AdamW\n" if emulated else "Muon + AdamW\n")
    )


def test_muon_adamw_is_torchs_two_optimizers_in_the_tracks_groups():
    """The groups typed by hand from train_gpt_simple.py: Muon 0.025 with decay 0.05; AdamW 0.7, 0.004, 0.015 with decay
    0.001, betas 0.8 and 0.95, ε 1e-10.
    """
    ours, theirs, data = net(), net(), batches(6)
    optimizer = baseline("muon_adamw", ours, lr=0.025, beta=0.95, weight_decay=0.05)
    muon = torch.optim.Muon([theirs.up.weight, theirs.down.weight], lr=0.025, momentum=0.95, weight_decay=0.05)
    vectors = [theirs.up.bias, theirs.norm.weight]
    groups = [{"params": [p], "lr": lr} for p, lr in ((theirs.embedding.weight, 0.7), (theirs.head.weight, 0.004))]
    adamw = torch.optim.AdamW(
        [*groups, {"params": vectors, "lr": 0.015}], betas=(0.8, 0.95), eps=1e-10, weight_decay=0.001
    )
    for batch in data:
        descend(ours, optimizer, batch[None])
        loss_of(theirs, batch).backward()
        for other in (muon, adamw):
            other.step()
            other.zero_grad()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-9), name  # the fused kernel rounds otherwise
    receipt = optimizer.receipt().splitlines()
    assert receipt[0] == "Muon + AdamW" and len(receipt) == 1 + len(list(ours.parameters()))


def test_muon_is_for_hidden_matrices_alone():
    model = NgramGPT(
        NgramConfig(1, 2, D, block_size=4, vocab_size=V, ngram=3, ngram_rows=5, bias=True, norm_gains=True)
    )
    muon_adamw = BASELINES["muon_adamw"](model, metrize(model), lr=0.1, beta=0.9, weight_decay=0.0, auxiliary_lr=1.0)
    optimizer = Baseline(muon_adamw, model, max_grad_norm=None, scaling=None)
    muon = {n for g in optimizer.param_groups if not g.get("auxiliary") for n in g["param_names"]}
    assert muon == {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}


def test_auxiliary_lr_multiplies_adamws_groups_alone():
    once, twice, still = net(), net(), net()
    for model, auxiliary in ((once, 1.0), (twice, 2.0)):
        descend(model, baseline("muon_adamw", model, weight_decay=0.0, auxiliary_lr=auxiliary), batches(1))
    for (name, a), b, w in zip(once.named_parameters(), twice.parameters(), still.parameters(), strict=True):
        factor = 1 if name in ("up.weight", "down.weight") else 2
        assert torch.allclose(b - w, factor * (a - w), atol=1e-12), name


@pytest.mark.parametrize("name", LR)
def test_set_beta_reaches_every_average_but_the_auxiliary_ones(name: str):
    model = net()
    optimizer = baseline(name, model)
    for group in optimizer.param_groups:
        set_beta(group, 0.7)
    descend(model, optimizer, batches(2))  # still a valid optimizer
    for group in optimizer.param_groups:
        found = {group[k] for k in ("momentum", "dampening") if k in group} | {
            group["betas"][0] for k in ("betas",) if group.get(k, (None,))[0] is not None
        }
        expected = set() if name == "adafactor" else {0.8} if group.get("auxiliary") else {0.7}
        assert found == expected, "adafactor has no average of gradients"


# ---- coordinates


def test_coordinates_are_those_of_the_formulas():
    model = gpt()
    norm = metrize(model, model.structure())
    assert set(coordinates(model, norm, "standard").values()) == {1.0}
    ntk, modular = coordinates(model, norm, "ntk"), coordinates(model, norm, "modular")
    shapes = {n: p.shape for n, p in model.named_parameters()}
    assert ntk.keys() == modular.keys() == shapes.keys()
    for name, (rows, columns) in shapes.items():
        assert ntk[name] == (1 if name == "embedding.weight" else pytest.approx(columns**-0.5))
        own = {"embedding.weight": math.sqrt(D), "head.weight": 1 / math.sqrt(D)}.get(name, math.sqrt(rows / columns))
        assert modular[name] == pytest.approx(norm.radii[name] * own, rel=1e-5), name


def test_vectors_have_coordinates_too():
    model = net()
    norm = normed(model)
    ntk, modular = coordinates(model, norm, "ntk"), coordinates(model, norm, "modular")
    assert {n for n, s in ntk.items() if s == 1} == {"embedding.weight", "up.bias", "norm.weight"}
    assert isinstance(norm.norms["up.bias"], VectorRMS)
    assert modular["up.bias"] == pytest.approx(norm.radii["up.bias"] * math.sqrt(3 * D), rel=1e-5), (
        "‖e₁‖ = 1 / √D of unit RMS"
    )
    kinds = {n: type(x) for n, x in norm.norms.items()}
    assert (kinds["embedding.weight"], kinds["up.weight"], kinds["head.weight"]) == (L1ToRMS, RMSToRMS, RMSToLinf)


@pytest.mark.parametrize("scaling", ["standard", "ntk", "modular"])
def test_sgd_is_gradient_descent_in_its_coordinates(scaling: str):
    """torch's SGD on v, through the loss of W = s · v: the same weights after 5 steps with momentum."""
    model, data = net(), batches(5)
    scales = coordinates(model, normed(model), scaling)  # type: ignore[arg-type]
    v = {n: (p.detach() / scales[n]).requires_grad_() for n, p in model.named_parameters()}
    oracle = torch.optim.SGD(v.values(), lr=LR["sgd"], momentum=0.8, dampening=0.8)
    losses = []
    for batch in data:
        loss = nn.functional.cross_entropy(
            functional_call(model, {n: scales[n] * x for n, x in v.items()}, (batch[:, 0],)), batch[:, 1]
        )
        oracle.zero_grad()
        loss.backward()
        oracle.step()
        losses.append(loss.item())
    optimizer = baseline("sgd", model, scaling=scaling, weight_decay=0.0)
    descend(model, optimizer, data)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), scales[name] * v[name].detach(), rtol=1e-11, atol=1e-13)
    assert {g["lr"] for g in optimizer.param_groups} == {LR["sgd"]}, "the loop's lr is as it was"


# ---- the optimizers themselves


def test_adamw_is_torchs_and_decays_matrices_and_embeddings_alone():
    """Biases and gains beside it in an AdamW without decay."""
    model, data = net(), batches(4)
    other = copy.deepcopy(model)
    named = dict(other.named_parameters())
    flat = {"up.bias", "norm.weight"}
    oracles = [
        torch.optim.AdamW(
            [p for n, p in named.items() if (n in flat) is vector], lr=0.01, betas=(0.8, 0.9), weight_decay=decay
        )
        for vector, decay in ((False, 0.1), (True, 0.0))
    ]
    for batch in data:
        loss_of(other, batch).backward()
        for oracle in oracles:
            oracle.step()
            oracle.zero_grad()
    descend(model, baseline("adamw", model), data)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, named[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_normalized_ones_are_normalized_and_decay_all(base: str):
    model, data = net(), batches(4)
    other = copy.deepcopy(model)
    kind = {
        "adam": lambda ps: torch.optim.Adam(ps, betas=(0.8, 0.9)),
        "sgd": lambda ps: torch.optim.SGD(ps, momentum=0.8, dampening=0.8),
    }[base]
    oracle = Normalized(kind(list(other.named_parameters())), normed(other), 0.5, weight_decay=0.1)
    for batch in data:
        loss_of(other, batch).backward()
        oracle.step()
        oracle.zero_grad()
    descend(model, baseline(f"normalized_{base}", model), data)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_clipping_is_torchs():
    model, data = net(), batches(3)
    other = copy.deepcopy(model)
    oracle = torch.optim.SGD(other.parameters(), lr=0.3)
    for batch in data:
        loss_of(other, batch).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.01)
        oracle.step()
        oracle.zero_grad()
    descend(model, baseline("sgd", model, beta=0.0, weight_decay=0.0, max_grad_norm=0.01), data)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_not_finite_is_named_and_changes_nothing(name: str):
    model = net()
    optimizer = baseline(name, model)
    descend(model, optimizer, batches(2))
    before = copy.deepcopy((model.state_dict(), optimizer.held()))
    for bad in (math.nan, math.inf, -math.inf):
        for what in ("down.weight", "the loss"):
            loss = loss_of(model, batches(1)[0])
            loss.backward()
            if what == "down.weight":
                assert model.down.weight.grad is not None
                model.down.weight.grad[0, 0] = bad
            optimizer.step(loss=loss.detach() * (bad if what == "the loss" else 1))
            message = "the loss is" if what == "the loss" else "the gradient of down.weight is"
            with pytest.raises(NonFiniteError, match=f"{message} not finite; the step was not taken"):
                optimizer.check_finite()
            optimizer.check_finite()
            optimizer.zero_grad()
    after = model.state_dict(), optimizer.held()
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert all(torch.equal(before[1][k].tensor, after[1][k].tensor) for k in before[1])
    descend(model, optimizer, batches(1))


def save(folder: Path, model: nn.Module, optimizer: Baseline) -> Path:
    """A checkpoint of step 3 in the folder."""
    saver = Saver(folder, keep=2)
    texts = {"shards": [], "tokenizer": {}, "config": {}, "progress": {"val_step": -1}}
    saver.save(3, model, optimizer, texts, {})
    saver.wait()
    return folder / "step_00000003"


def load(checkpoint: Path, model: nn.Module, optimizer: Baseline) -> None:
    load_model(checkpoint, model)
    load_optimizer(checkpoint, read_state(checkpoint), optimizer)


@pytest.mark.parametrize("beta", [0.8, 0.0])
@pytest.mark.parametrize("name", BASELINES)
def test_state_that_is_put_back_continues_to_the_same_bits(name: str, beta: float, tmp_path: Path):
    """Through a checkpoint, into other weights, of which one is frozen."""
    model, data = net(), batches(6)
    model.norm.weight.requires_grad_(False)
    if name == "schedule_free_adamw" and not beta:
        with pytest.raises(Refusal, match="schedule_free_adamw: beta\n  got: 0.0\n  allowed: a number x with 0 < x"):
            baseline(name, model, beta=beta)
        return
    optimizer = baseline(name, model, beta=beta)
    descend(model, optimizer, data[:3])
    checkpoint = save(tmp_path, model, optimizer)
    descend(model, optimizer, data[3:])

    other = net(seed=1)
    other.norm.weight.requires_grad_(False)
    resumed = baseline(name, other, beta=beta)
    load(checkpoint, other, resumed)
    descend(other, resumed, data[3:])
    assert_same(other.state_dict(), model.state_dict())
    assert_same(pieces(resumed), pieces(optimizer))
    assert resumed.packed() == optimizer.packed()
    assert ("sgd" in name and beta == 0) == (not pieces(resumed))


@pytest.mark.parametrize("name", OF_TORCH)
def test_a_checkpoint_of_before_without_the_shape_of_the_state_is_read(name: str, tmp_path: Path):
    model, data = net(), batches(6)
    optimizer = baseline(name, model)
    descend(model, optimizer, data[:3])
    checkpoint = save(tmp_path, model, optimizer)
    descend(model, optimizer, data[3:])
    state = json.loads((checkpoint / "state.json").read_text())
    del state["optimizer"]
    (checkpoint / "state.json").write_text(json.dumps(signed(state)))
    other = net(seed=1)
    resumed = baseline(name, other)
    load(checkpoint, other, resumed)
    descend(other, resumed, data[3:])
    assert_same(other.state_dict(), model.state_dict())


def pieces(optimizer: Baseline) -> dict[str, Tensor]:
    return {k: x.tensor for k, x in optimizer.held().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_state_of_other_parameters_is_refused():
    one, two = baseline("adamw", net()), baseline("sgd", net())
    with pytest.raises(
        ValueError, match="optimizer state\n  got: other parameters\n  allowed: those of this model\n  fix: resume with"
    ):
        one.load_state_dict({"state": {}, "param_groups": two.settings()})


def test_a_receipt_tells_every_parameter_and_its_settings():
    lines = baseline("sgd", net(), scaling="ntk").receipt().splitlines()
    assert lines[0] == "SGD"
    assert lines[1:3] == [
        "embedding.weight  (13, 8)  lr 0.3, lr_scale 1, momentum 0.8, weight_decay 0.1",
        "up.weight         (24, 8)  lr 0.3, lr_scale 0.125, momentum 0.8, weight_decay 0.1",
    ]
    assert len(lines) == 7


# ---- ranks


def _stepped(rank: int, world: int, name: str) -> list[Tensor]:
    """In a rank: its part of every batch.

    For soap each has the whole, as its first eigenbases are of singular matrices: where there is no gradient they turn
    with the last bit of a sum.
    """
    model = net()
    optimizer = baseline(name, model, max_grad_norm=0.5)
    descend(model, optimizer, batches(4) if name == "soap" else batches(4).unflatten(1, (world, -1))[:, rank])
    loss = loss_of(model, batches(1)[0])
    loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    if rank == 1:
        assert model.up.weight.grad is not None
        model.up.weight.grad[0, 0] = math.nan
    optimizer.step(loss=loss.detach())
    with pytest.raises(NonFiniteError, match="the gradient of up.weight is not finite"):
        optimizer.check_finite()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)), "one rank's holds for all"
    return before


@pytest.mark.parametrize("name", BASELINES)
def test_two_ranks_are_one_process(name: str):
    found = ranks(2, _stepped, name)
    model = net()
    descend(model, baseline(name, model, max_grad_norm=0.5), batches(4))
    for p, one, two in zip(model.parameters(), *found, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, p.detach(), rtol=1e-11, atol=1e-13)


# ---- train_gpt.py


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("baselines with spaces")
    small_dataset(root)
    return root


def arguments(name: str) -> tuple[str, ...]:
    options = (
        "--optim.name",
        name,
        "--optim.lr",
        str(LR[name]),
        "--optim.weight-decay",
        "0.1",
        "--train.sample-tokens",
        "0",
    )
    return (*options, "--baseline.scaling", "modular", "--model.init", "fan_in") if name == "sgd" else options


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in r]


@pytest.fixture(scope="module", params=BASELINES)
def whole(root: Path, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """An uninterrupted run of each."""
    code, _, err = run(
        root, "small.toml", "--run.name", request.param, "--train.keep-checkpoints", "3", *arguments(request.param)
    )
    assert code == 0, err
    return request.param, root / "runs" / request.param


TITLES: dict[str, str | tuple[str, ...]] = {
    "adamw": "AdamW\n",
    "muon_adamw": ("Muon + AdamW\n", "Float32Muon + AdamW\n"),
    "sgd": "SGD\n",
    "schedule_free_adamw": "ScheduleFreeAdamW\n",
    "prodigy": "Prodigy\n",
    "normuon": ("NorMuon + AdamW\n", "Float32NorMuon + AdamW\n"),
    "soap": "SOAP\n",
    "adafactor": "AdaFactor\n",
}


def test_a_run_learns_and_says_what_it_trained_with(whole: tuple[str, Path]):
    name, folder = whole
    found = losses(folder)
    # prodigy looks for its step size from 1e-6 on: tests/test_published.py trains it for longer
    assert len(found) == 12 and found[-1] < found[0] - (0.1 if name != "prodigy" else 0.001)
    receipt = (folder / "receipt.txt").read_text()
    assert receipt.startswith(TITLES.get(name, "parameter ")) and "blocks.1.mlp.down.weight" in receipt
    assert (folder / "modular_norm.svg").exists() == name.startswith("normalized")
    assert f"14 tensors, {name} (receipt.txt)" in (folder / "log.txt").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    if name not in OF_TORCH:
        return
    hidden = (
        12 * 16**2 * 2 if name == "muon_adamw" else 0
    )  # 12 matrices of two blocks have Muon; embedding and head are the other two tensors
    second = summary["params"] - hidden + (2 if hidden else 14) if "adam" in name else 0
    assert summary["optimizer_state_bytes"] == 4 * (summary["params"] + second), (
        "a buffer, Adam's second one and its counts of steps"
    )


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(root: Path, whole: tuple[str, Path]):
    name, folder = whole
    cut = shutil.copytree(folder, root / f"runs/{name}-cut")
    for step in (8, 12):
        shutil.rmtree(cut / f"checkpoints/step_{step:08d}")
    (cut / "summary.json").unlink()
    code, out, err = run(
        root, "small.toml", "--run.name", cut.name, "--run.resume", *arguments(name), "--train.keep-checkpoints", "3"
    )
    assert code == 0 and "at step 4" in out, err
    assert losses(cut) == losses(folder)
    found, expected = (json.loads((f / "summary.json").read_text())["val_loss"] for f in (cut, folder))
    assert found == expected


def test_two_ranks_train_as_one(root: Path, whole: tuple[str, Path]):
    """float32 sums in another order: 1e-4 of a loss after 12 steps."""
    name, folder = whole
    args = ("small.toml", "--run.name", f"{name}-2", *arguments(name), "--train.gradient-accumulation-steps", "1")
    assert [code for code, *_ in run_ranks(root, 2, *args)] == [0, 0]
    assert losses(root / f"runs/{name}-2") == pytest.approx(losses(folder), rel=1e-4)


@pytest.mark.parametrize("whole", OF_TORCH, indirect=True)
def test_settings_of_a_resumed_baseline_take_effect_and_another_optimizer_is_refused(
    root: Path, whole: tuple[str, Path]
):
    name, folder = whole
    cut = shutil.copytree(folder, root / f"runs/{name}-changed")
    shutil.rmtree(cut / "checkpoints/step_00000012")
    (cut / "summary.json").unlink()
    other = "adamw" if name == "normalized_adam" else "normalized_adam"  # of the same buffers and groups
    code, _, err = run(
        root,
        "small.toml",
        "--run.name",
        cut.name,
        "--run.resume",
        *arguments(name),
        "--optim.name",
        other,
        "--baseline.scaling",
        "standard",
    )
    assert code == 2 and f"error: optim.name of a resumed run\n  got: '{other}'\n  allowed: '{name}'" in err
    code, out, err = run(
        root, "small.toml", "--run.name", cut.name, "--run.resume", *arguments(name), "--optim.weight-decay", "3"
    )
    assert code == 0 and "changed: optim.weight_decay = 3.0, was 0.1" in out, err
    assert losses(cut)[:9] == losses(folder)[:9] and losses(cut)[9:] != losses(folder)[9:]


@pytest.mark.parametrize("name", ["adamw", "normalized_sgd"])
def test_sharded_weights_are_refused(root: Path, name: str):
    found = run_ranks(root, 2, "small.toml", "--run.name", "sharded", "--run.parallel", "fsdp", *arguments(name))
    assert [code for code, *_ in found] == [2, 2]
    assert "a sharded weight (DTensor)" in found[0][2] and "allowed: whole ones\n  fix: " in found[0][2]
    assert not (root / "runs/sharded").exists()


def test_a_baseline_has_no_lr_of_its_own(root: Path):
    code, _, err = run(root, "small.toml", "--run.name", "auto", *arguments("adamw"), "--optim.lr", "auto")
    assert code == 2 and "error: optim.lr\n  got: 'auto'\n  allowed: a number for adamw" in err


def test_without_checkpoints_none_are_saved_not_even_at_a_signal(root: Path):
    args = (
        "small.toml",
        "--train.keep-checkpoints",
        "0",
        "--train.checkpoint-every",
        "1",
        "--train.sample-tokens",
        "0",
    )
    assert run(root, *args, "--run.name", "none", "--train.steps", "3")[0] == 0
    assert (root / "runs/none/summary.json").is_file() and not list(root.glob("runs/none/checkpoints/*"))
    process = start(root, *args, "--run.name", "cut", "--train.steps", "100000")
    while not (root / "runs/cut/metrics.jsonl").is_file():
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143 and not list(root.glob("runs/cut/checkpoints/*"))
    assert (
        "SIGTERM: ended at step " in (out := (root / "stdout").read_text())
        and "not saved" in out
        and "--run.resume" not in out
    )


# ---- what models start from


def test_initial_deviations_are_those_of_their_sources():
    """Of 64² entries or more: standard deviations within 5%, means within 4 standard errors."""
    layers, width = 3, 64
    for init in ("gpt2", "fan_in"):
        config = Track3Config(n_layer=layers, n_head=2, n_embd=width, block_size=4, vocab_size=256, init=init)
        for name, p in Track3GPT(
            config, RoleNorms().build(Polar("exact"), 2), torch.Generator().manual_seed(0)
        ).named_parameters():
            last = name.endswith(("attention.out.weight", "mlp.down.weight"))
            gpt2 = 0.02 / math.sqrt(2 * layers) if last else 0.02
            fan_in = 1.0 if name == "embedding.weight" else 1 / math.sqrt(p.shape[1])
            expected = gpt2 if init == "gpt2" else fan_in
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(p.mean().item()) < 4 * expected / math.sqrt(p.numel()), name
