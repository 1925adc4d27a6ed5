"""optim/convert.py. Oracles: real steps of torch.optim.AdamW, torch.optim.Muon and Dualized."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from optim import Dualized, ModularNorm, Rule, metrize
from optim.convert import convert, main
from optim.modular import Module, atom, concat
from optim.norms import NORMS, MaxEntry, Norm, RMSToRMS, VectorRMS
from optim.polar import Polar
from torch import nn

from tests.test_metrize import exact

HEAD = [Rule("head.weight", role="head")]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """Every role, and hidden weights of several shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.conv, self.norm, self.gru = nn.Conv1d(8, 8, 3), nn.LayerNorm(8), nn.GRU(8, 6)
        self.head = nn.Linear(6, 11)
        self.temperature = nn.Parameter(torch.ones(()))


class Hidden(nn.Module):
    """One hidden weight."""

    def __init__(self, out: int = 24, into: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(into, out, bias=False)


def rms(x: torch.Tensor) -> float:
    return x.detach().square().mean().sqrt().item()


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> dict[str, torch.Tensor]:
    """W_before − W_after of a step on Gaussian gradients."""
    g = torch.Generator().manual_seed(seed)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p)
    optimizer.step()
    return {n: before[n] - p.detach() for n, p in model.named_parameters()}


def test_our_predicted_steps_are_those_that_dualized_takes():
    model = Net().double()
    norm = metrize(model, rules=HEAD)
    found = convert(norm, "adamw", lr=6e-4, weight_decay=0.0)
    delta = stepped(model, Dualized(model, norm=exact(norm), **found.settings))
    assert {r.name for r in found.rows} == delta.keys()
    for row in found.rows:
        assert row.ours == pytest.approx(rms(delta[row.name]), rel=1e-6), row.name


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.5, 0.95), (0.95, 0.95)])
def test_adamw_steps_on_noise_in_proportion_to_the_prediction(betas: tuple[float, float]):
    """On noise alone AdamW's update RMS is lr · √((1 − β₁)/(1 + β₁)), within 3% (β₂ < 1, and the sample); the published
    0.2 at β₁ = 0.9 is 0.87 of it.
    """
    model = Hidden(100, 100)
    found = convert(metrize(model), "adamw", lr=1e-3, weight_decay=0.0, betas=betas)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, betas=betas)
    measured = [rms(stepped(model, optimizer, seed)["up.weight"]) for seed in range(100)][-1]
    assert measured == pytest.approx(1e-3 * ((1 - betas[0]) / (1 + betas[0])) ** 0.5, rel=0.03)
    assert found.rows[0].baseline == pytest.approx(0.87 * measured, rel=0.03)
    if betas[0] == 0.9:
        assert found.rows[0].baseline == pytest.approx(0.2 * 1e-3)


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32)])
def test_muons_predicted_step_is_torchs(shape: tuple[int, int], adjust: str | None):
    """Within 2% (bfloat16) for an iteration that converges; the five default steps leave singular values between 0.7
    and 1.2: 20%.
    """
    converging: dict[str, Any] = dict(ns_coefficients=(1.5, -0.5, 0.0), ns_steps=40)
    for tolerance, settings in ((0.02, converging), (0.2, {})):
        model = Hidden(*shape)
        found = convert(metrize(model), "muon", lr=0.02, weight_decay=0.0, adjust_lr_fn=adjust)
        optimizer = torch.optim.Muon(model.parameters(), lr=0.02, weight_decay=0.0, adjust_lr_fn=adjust, **settings)
        assert found.rows[0].baseline == pytest.approx(rms(stepped(model, optimizer)["up.weight"]), rel=tolerance)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("adjust", "norm"), [("original", "MuonSpectral"), ("match_rms_adamw", "MoonlightSpectral")])
def test_in_muons_own_norm_its_settings_are_its_own_and_train_alike(adjust: str, norm: str, nesterov: bool):
    """The conventions of momentum, Nesterov and decay are one.

    The ways differ by bfloat16's rounding, 3% of their length.
    """
    ours, theirs = Hidden(), Hidden()
    theirs.load_state_dict(ours.state_dict())
    start = ours.up.weight.detach().clone()
    spectral: Norm = replace(NORMS[norm](), polar=Polar("jordan", dtype="bfloat16"))  # type: ignore[type-var]
    muon: dict[str, Any] = dict(lr=0.02, weight_decay=0.5, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust)
    found = convert(metrize(ours, rules=[Rule("*", norm=spectral)]), "muon", **muon)
    assert found.settings == pytest.approx(
        {"lr": 0.02, "direction": "nesterov" if nesterov else "momentum", "beta": 0.9, "weight_decay": 0.5}
    )
    a = Dualized(ours, norm=metrize(ours, rules=[Rule("*", norm=spectral)]), **found.settings)
    b = torch.optim.Muon(theirs.parameters(), **muon)
    for seed in range(10):
        stepped(ours, a, seed)
        stepped(theirs, b, seed)
    way = theirs.up.weight.detach() - start
    assert (ours.up.weight - theirs.up.weight).norm() < 0.03 * way.norm()


@pytest.mark.parametrize(
    ("baseline", "settings"),
    [("adamw", dict(betas=(0.8, 0.95))), ("muon", {}), ("muon", dict(adjust_lr_fn="match_rms_adamw"))],
)
def test_hidden_steps_agree_in_the_geometric_mean_weighted_by_size(baseline, settings):
    found = convert(metrize(Net(), rules=HEAD), baseline, lr=3e-3, weight_decay=0.0, **settings)
    hidden = [r for r in found.rows if r.matched]
    names = {"up.weight", "down.weight", "gru.weight_ih_l0", "gru.weight_hh_l0"}
    assert {r.name for r in hidden} == (names | {"conv.weight"} if baseline == "adamw" else names), (
        "torch's Muon takes matrices alone"
    )
    logs = torch.cat([torch.full(r.shape, math.log(r.ours) - math.log(r.baseline)).flatten() for r in hidden])  # type: ignore[arg-type]
    assert logs.mean().abs() < 1e-5, "one entry, one vote"


def test_a_lone_hidden_weight_decays_as_under_adamw():
    model = Hidden().double()
    lr, decay = 6e-4, 0.1
    norm = metrize(model, rules=[Rule("*", mass=3)])
    found = convert(norm, "adamw", lr=lr, weight_decay=decay)

    def decayed(make) -> torch.Tensor:
        steps = []
        for wd in (0.0, 1.0):
            twin = copy.deepcopy(model)
            steps.append(stepped(twin, make(twin, wd))["up.weight"])
        return steps[1] - steps[0]

    theirs = decayed(lambda m, wd: torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=wd * decay))
    ours = decayed(lambda m, wd: Dualized(m, norm=norm, **found.settings | {"weight_decay": wd * found.weight_decay}))
    assert theirs.abs().min() > 0 and torch.allclose(ours, theirs, rtol=1e-6)


def test_lr_scales_through_and_weight_decay_does_not_change_with_it():
    norm = metrize(Net(), rules=HEAD)
    a, b = (convert(norm, "adamw", lr=lr, weight_decay=0.1) for lr in (1e-3, 2e-3))
    assert (b.lr, b.weight_decay, b.beta) == pytest.approx((2 * a.lr, a.weight_decay, 0.9))
    assert convert(norm, "adamw", lr=1e-3, weight_decay=0.0).weight_decay == 0


def test_muon_matched_to_adamws_rms_converts_as_adamw_does():
    norm = metrize(Hidden())
    adamw = convert(norm, "adamw", lr=1e-3, weight_decay=0.1)
    muon = convert(norm, "muon", lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    assert (muon.lr, muon.weight_decay) == pytest.approx((adamw.lr, adamw.weight_decay))
    assert (adamw.direction, muon.direction, muon.beta) == ("momentum", "nesterov", 0.95)


def test_what_muon_does_not_take_steps_by_its_adamw_where_that_is_given():
    norm = metrize(Net(), rules=HEAD)
    without, given = (convert(norm, "muon", lr=0.02, weight_decay=0.0, adamw_lr=lr) for lr in (None, 3e-4))
    assert without.settings == given.settings
    for a, b in zip(without.rows, given.rows, strict=True):
        assert (a.baseline, b.baseline) == (
            (b.baseline, a.baseline) if a.matched else (None, pytest.approx(0.2 * 3e-4))
        )
    assert {r.role for r in given.rows if not r.matched} == {"embedding", "hidden", "head", "gain", "bias", "scalar"}


def test_in_a_declared_structure_the_spectral_weights_that_move_are_matched():
    class Odd(Norm):
        def check(self, shape):
            return None

    model = nn.Module()
    for name in "abcd":
        model.register_parameter(name, nn.Parameter(torch.ones(4) if name == "c" else torch.ones(4, 4)))
    tree = concat(
        atom("a", RMSToRMS(), role="mlp"), atom("b", RMSToRMS(), mass=0), atom("c", VectorRMS()), atom("d", Odd())
    )
    found = convert(metrize(model, tree), "adamw", lr=1e-3, weight_decay=0.1)
    assert {r.name: (r.ours is not None, r.matched) for r in found.rows} == {
        "a": (True, True),
        "b": (True, False),
        "c": (True, False),
        "d": (False, False),
    }
    assert found.rows[1].ours == 0 and found.rows[0].ours == pytest.approx(2e-4)


def test_the_table_reads_so():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 16, bias=False), nn.LayerNorm(16))
    norm = metrize(model, rules=[Rule("1.weight", role="hidden")])
    assert str(convert(norm, "muon", lr=0.02, weight_decay=0.1, adamw_lr=1e-3)) == (
        "Dualized(…, lr, direction='nesterov', beta=0.95, weight_decay=0.1)\n"
        "lr 0.02667: takes Muon's steps (matched)\n"
        "lr 0.125 to 4: recommended, as the best of seven small models lay there\n"
        "scan lr = 0.0267, 0.0933, 0.327, 1.14, 4, falling to 0 in each run; then halve and double the best\n"
        "\n"
        "parameter  shape  role       update RMS Muon  Dualized  ratio  matched\n"
        "0.weight   5×4    embedding  0.0002           0.00333   16.7\n"
        "1.weight   16×4   hidden     0.01             0.01      1      yes\n"
        "2.weight   16     gain       0.0002           0.00167   8.33\n"
        "2.bias     16     bias       0.0002           0.00167   8.33\n"
        "\n"
        "update RMS: root mean square of a step's entries, predicted, before decay. Matched, in the geometric\n"
        "mean weighted by size: the steps of the rows marked yes, and their decay per step. The other rows\n"
        "differ by design: their steps follow from the modular norm."
    )


@pytest.mark.parametrize("lr", [1e-6, 1e-3, 0.01, 0.3, 10.0])
def test_a_scan_leads_from_the_matched_rate_over_the_recommended_range_in_even_ratios(lr: float):
    found = convert(metrize(Net(), rules=HEAD), "adamw", lr=lr, weight_decay=0.0)
    ends = (min(found.lr, found.recommended[0]), max(found.lr, found.recommended[1]))
    assert (found.scan[0], found.scan[-1]) == pytest.approx(ends)
    ratios = [b / a for a, b in zip(found.scan, found.scan[1:], strict=False)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios)) and 2.5 < ratios[0] < 5.7


@pytest.mark.parametrize(
    ("baseline", "settings", "text"),
    [
        ("adam", {}, "convert: baseline\n  got: 'adam'\n  allowed: adamw, muon\n"),
        ("adamw", dict(lr=0.0), "convert: lr\n  got: 0.0\n  allowed: a finite number > 0\n"),
        ("adamw", dict(lr=math.nan), "convert: lr\n  got: nan"),
        ("adamw", dict(weight_decay=-0.1), "convert: weight_decay\n  got: -0.1\n  allowed: a finite number >= 0\n"),
        ("adamw", dict(weight_decay=None), "convert: weight_decay\n  got: None"),
        ("adamw", dict(betas=(0.9, 1.0)), "convert: betas\n  got: (0.9, 1.0)\n  allowed: two numbers, 0 <= beta < 1\n"),
        ("adamw", dict(betas=0.9), "convert: betas\n  got: 0.9"),
        ("muon", dict(momentum=1.0), "convert: momentum\n  got: 1.0\n  allowed: 0 <= momentum < 1\n"),
        ("muon", dict(nesterov="no"), "convert: nesterov\n  got: 'no'\n  allowed: True, False\n"),
        (
            "muon",
            dict(adjust_lr_fn="half"),
            "convert: adjust_lr_fn\n  got: 'half'\n  allowed: original, match_rms_adamw\n",
        ),
        ("muon", dict(adamw_lr=math.inf), "convert: adamw_lr\n  got: inf\n"),
        (
            "adamw",
            dict(momentum=0.9),
            "convert: momentum\n  got: 0.9, with AdamW\n  allowed: only with the other baseline\n",
        ),
        ("muon", dict(betas=(0.9, 0.95)), "convert: betas\n  got: (0.9, 0.95), with Muon\n"),
    ],
)
def test_impossible_settings_are_refused_by_name(baseline, settings, text):
    with pytest.raises(ValueError) as error:
        convert(metrize(Hidden()), baseline, **dict(lr=0.1, weight_decay=0.1) | settings)
    assert str(error.value).startswith(text) and "\n  fix: " in str(error.value)


def test_a_network_with_nothing_to_match_is_refused():
    with pytest.raises(
        ValueError, match=r"^convert from AdamW\n  got: no hidden weight that moves, so nothing to match\n"
    ):
        convert(metrize(nn.LayerNorm(3)), "adamw", lr=0.1, weight_decay=0)
    with pytest.raises(ValueError, match=r"^convert from Muon\n  got: no hidden weight of 2 dimensions that moves"):
        convert(metrize(nn.Conv2d(3, 4, 3)), "muon", lr=0.1, weight_decay=0)
    with pytest.raises(ValueError, match=r"^convert\n  got: a modular norm without the shape of a\n"):
        convert(ModularNorm.of(Module() @ atom("a", RMSToRMS())), "adamw", lr=0.1, weight_decay=0)


MODELS = """
import torch
from torch import nn

def large():
    return nn.Sequential(nn.Linear(10**6, 10**6, bias=False), nn.Linear(10**6, 10**6, bias=False))

class Outer:
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up = nn.Embedding(5, 4), nn.Linear(4, 16, bias=False)
            self.head = nn.Linear(16, 5, bias=False)

class Unplaced(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(torch.empty(3, 4, 5))

def reads_its_weights():
    model = nn.Linear(4, 4)
    assert model.weight.sum().item() < 99
    return model

def needs_more(x):
    return nn.Linear(x, x)

def other():
    return "a model"
"""
ADAMW = ["--lr", "6e-4", "--weight-decay", "0.1"]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "convertible.py").write_text(MODELS)
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "convertible"


def test_the_command_prints_the_table_and_the_guesses(module: str, capsys: pytest.CaptureFixture[str]):
    rules = ["--rule", "head.*,role=head,mass=2", "--rule", "up.*,norm=MuonSpectral"]
    assert main(["adamw", "--model", f"{module}:Outer.Small", *rules, *ADAMW, "--betas", "0.8", "0.95"]) == 0
    from convertible import Outer  # type: ignore[import-not-found]

    norm = metrize(Outer.Small(), rules=[Rule("head.*", role="head", mass=2), Rule("up.*", norm="MuonSpectral")])
    out, err = capsys.readouterr()
    assert out == f"{convert(norm, 'adamw', lr=6e-4, weight_decay=0.1, betas=(0.8, 0.95))}\n" and not err
    assert (
        main(["muon", "--model", f"{module}:reads_its_weights", "--lr", "0.02", "--weight-decay", "0", "--no-nesterov"])
        == 0
    )
    out, err = capsys.readouterr()
    assert out.startswith(
        "Dualized(…, lr, direction='momentum', beta=0.95, weight_decay=0)\nlr 0.02167: takes Muon's steps (matched)\n"
    )
    built, note = err.splitlines()
    assert built.startswith("note: built on the CPU; on the meta device: ") and note.startswith("note: no head: ")


PLUGIN = """
from dataclasses import dataclass

from nanodual import register_norm
from optim.norms import RMSToRMS


@register_norm
@dataclass(frozen=True)
class OfAPlugin(RMSToRMS):
    pass
"""


def test_a_norm_of_a_plugin_and_maps_are_named_on_the_command_line(
    module: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
):
    request.addfinalizer(lambda: NORMS.pop("OfAPlugin"))
    (tmp_path / "own_norms.py").write_text(PLUGIN)
    (tmp_path / "nothing_else.py").write_text("")
    rules = ["--rule", "up.*,norm=OfAPlugin,maps=4", "--rule", "head.*,role=head"]
    plugins = ["--plugin", "own_norms", "--plugin", "nothing_else"]
    assert main(["adamw", "--model", f"{module}:Outer.Small", *plugins, *rules, *ADAMW]) == 0
    from convertible import Outer  # type: ignore[import-not-found]

    norm = metrize(Outer.Small(), rules=[Rule("up.*", norm=RMSToRMS(), maps=4), Rule("head.*", role="head")])
    assert capsys.readouterr().out == f"{convert(norm, 'adamw', lr=6e-4, weight_decay=0.1)}\n"


def test_a_model_that_fits_no_memory_is_built_on_the_meta_device(module: str, capsys: pytest.CaptureFixture[str]):
    assert main(["adamw", "--model", f"{module}:large", *ADAMW]) == 0
    assert "0.weight   1000000×1000000  hidden  0.00012" in capsys.readouterr().out


def test_shapes_alone_convert_as_the_model_does(module: str, capsys: pytest.CaptureFixture[str]):
    assert main(["adamw", "--model", f"{module}:Outer.Small", "--rule", "head.weight,role=head", *ADAMW]) == 0
    by_model = capsys.readouterr().out
    assert (
        main(
            [
                "adamw",
                "--shapes",
                "embed.weight=5x4:embedding",
                "up.weight=16x4:hidden",
                "head.weight=5x16:head",
                *ADAMW,
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == by_model


def test_shapes_tell_a_heads_bias_by_its_name(capsys: pytest.CaptureFixture[str]):
    shapes = ["up.weight=8x4:hidden", "up.bias=8:bias", "head.weight=5x8:head", "head.bias=5:bias"]
    assert main(["adamw", "--shapes", *shapes, *ADAMW]) == 0
    by_shapes = capsys.readouterr().out
    model = nn.ModuleDict({"up": nn.Linear(4, 8), "head": nn.Linear(8, 5)})
    norm = metrize(model, rules=[Rule("head.weight", role="head")])
    assert by_shapes == f"{convert(norm, 'adamw', lr=6e-4, weight_decay=0.1)}\n"
    assert isinstance(norm.norms["head.bias"], MaxEntry)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "convertible"], "--model\n  got: 'convertible'\n  allowed: module:callable\n"),
        (
            ["--model", "no_such_module:f"],
            "--model no_such_module:f\n  got: ModuleNotFoundError: No module named 'no_such_module'\n",
        ),
        (["--model", "broken:f"], "--model broken:f\n  got: ZeroDivisionError: division by zero\n"),
        (
            ["--model", "convertible:larg"],
            "--model convertible:larg\n  got: AttributeError: module 'convertible' has no attribute 'larg'\n",
        ),
        (
            ["--model", "convertible:needs_more"],
            "--model convertible:needs_more\n  got: TypeError: needs_more() missing 1 required",
        ),
        (["--model", "convertible:other"], "--model convertible:other\n  got: a str\n  allowed: an nn.Module\n"),
        (["--model", "convertible:Unplaced"], "no place for 1 weight\n"),
        (
            ["--model", "convertible:large", "--rule", "0.*"],
            "--rule\n  got: '0.*'\n  allowed: pattern,key=value,… with the keys role, mass",
        ),
        (["--model", "convertible:large", "--rule", "0.*,role"], "--rule\n  got: '0.*,role'\n"),
        (["--model", "convertible:large", "--rule", "0.*,maps=1.5"], "--rule\n  got: '0.*,maps=1.5'\n"),
        (["--model", "convertible:large", "--rule", "0.*,maps=0"], "rule '0.*'\n  got: maps 0\n"),
        (["--model", "convertible:large", "--plugin", "no_such_norms"], "--plugin\n  got: 'no_such_norms', and there "),
        (["--model", "convertible:large", "--plugin", "broken"], "--plugin: broken raised while it was imported\n"),
        (["--model", "convertible:large", "--rule", "0.*,mass=much"], "--rule\n  got: '0.*,mass=much'\n"),
        (["--model", "convertible:large", "--rule", "0.*,rolle=head"], "--rule\n  got: '0.*,rolle=head'\n"),
        (["--model", "convertible:large", "--rule", "0.*,norm=L3"], "rule '0.*'\n  got: norm 'L3'\n"),
        (
            ["--shapes", "up=16x4"],
            "--shapes\n  got: 'up=16x4'\n  allowed: name=OxI:role, each name once, role one of embedding, hidden, ",
        ),
        (["--shapes", "up=16x4:mlp"], "--shapes\n  got: 'up=16x4:mlp'\n"),
        (["--shapes", "up=4x4:hidden", "up=8x4:hidden"], "--shapes\n  got: 'up=8x4:hidden'\n"),
        (["--shapes", "up=4:hidden"], "--shapes\n  got: 'up=4:hidden'\n"),
        (["--shapes", "up=4x4:hidden", "--rule", "up,mass=2"], "--rule\n  got: --shapes as well\n"),
        (["--shapes", "up=4x4:hidden", "--betas", "0.9", "2"], "convert: betas\n  got: [0.9, 2.0]\n"),
    ],
)
def test_bad_input_exits_with_2_and_says_what_is_allowed(
    arguments, text, module: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["adamw", *arguments, *ADAMW]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"error: {text}") and "\n  allowed: " in err and "\n  fix: " in err


@pytest.mark.parametrize(
    "arguments", [[], ["sgd"], ["adamw", *ADAMW], ["adamw", "--shapes", "a=2x2:hidden", *ADAMW, "--momentum", "0.9"]]
)
def test_an_incomplete_command_line_exits_with_2(arguments, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and "usage: python -m optim.convert" in capsys.readouterr().err
