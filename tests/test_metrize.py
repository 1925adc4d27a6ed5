"""optim/metrize.py, and what ModularNorm shows of its result: every parameter exactly once, or an error that names it.

Oracles: real steps of Dualized, and the same network built from separate maps.
"""

import copy
import re
import warnings
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import pytest
import torch
from model import GPT, GPTConfig
from models.ngram import NgramConfig, NgramGPT
from optim import Dualized, ModularNorm, Rule, metrize
from optim.errors import CoverageError, GuessWarning
from optim.metrize import MASSES
from optim.modular import Module, atom, bond, concat, residual
from optim.norms import Frobenius, L1ToRMS, MaxEntry, Norm, RMSToLinf, RMSToRMS, Spectral, VectorRMS
from optim.polar import Polar
from optim.views import Blocks, Experts
from torch import nn

R = "RMSToRMS[polar_express]"
NO_HEAD = "no head: every linear map is a hidden one; Rule(pattern, role='head') names one that ends in logits"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def exact(norm: ModularNorm) -> ModularNorm:
    """The same with exact polar factors."""

    def one(norm: Norm) -> Norm:
        if isinstance(norm, Spectral):
            return replace(norm, polar=Polar("exact"))
        inner = getattr(norm, "inner", None)
        return norm if inner is None else replace(norm, inner=one(inner))  # type: ignore[type-var]

    return replace(norm, norms={k: one(n) for k, n in norm.norms.items()})


def places(model: nn.Module, *rules: Rule) -> dict[str, str]:
    """{name: "role norm"}."""
    norm = metrize(model, rules=rules)
    return {n: f"{norm.roles[n]} {norm.norms[n]}" for n in norm.norms}


def gaussian_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, grads: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """W_before − W_after of a step on Gaussian gradients, or on these."""
    g = torch.Generator().manual_seed(0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype) if grads is None else grads[n]
    optimizer.step()
    return {n: before[n] - p.detach() for n, p in model.named_parameters()}


def holding(**parts: nn.Module | nn.Parameter) -> nn.Module:
    model = nn.Module()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

    def structure(self) -> Module:
        return atom("b.weight", RMSToRMS(), role="out") @ atom("a.weight", RMSToRMS(), mass=3, role="in")


class Conv1D(nn.Module):
    """As in transformers' GPT-2: weights stored (I, O)."""

    def __init__(self, out: int, into: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(into, out)), nn.Parameter(torch.zeros(out))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        x = self.embed(idx)
        return self.head(x + self.up(x))


# A declared structure.


def test_every_parameter_gets_its_norm_and_the_receipt_shows_it():
    assert metrize(Two()).receipt() == (
        "parameter  shape  role  norm                     mass  radius  update RMS\n"
        "a.weight   4×3    in    RMSToRMS[polar_express]  3     0.75    0.433\n"
        "b.weight   2×4    out   RMSToRMS[polar_express]  1     0.25    0.08839\n"
    )


def test_wrappers_do_not_change_names():
    assert metrize(torch.compile(Two())).radii == metrize(Two()).radii  # type: ignore[arg-type]
    assert metrize(holding(module=Two()), Two().structure()).radii == metrize(Two()).radii
    assert metrize(holding(module=nn.Linear(3, 4))).radii == metrize(nn.Linear(3, 4)).radii


def test_a_parameter_without_a_place_is_an_error_that_names_it():
    model = Two()
    model.extra = parameter(2)
    with pytest.raises(CoverageError, match=r"^extra \(2,\) has no place in the modular structure"):
        metrize(model)


def test_a_place_without_a_parameter_is_an_error_with_the_nearest_name():
    with pytest.raises(CoverageError, match=r"names 'a.weigth', which the model does not have \(nearest: 'a.weight'\)"):
        metrize(Two(), atom("a.weigth", Frobenius()) @ Two().structure())


def test_a_norm_of_other_dimensions_is_refused():
    model = holding(a=nn.Linear(3, 4, bias=False))
    with pytest.raises(CoverageError) as error:
        metrize(model, atom("a.weight", VectorRMS()))
    assert str(error.value) == (
        "a.weight\n  got: shape (4, 3)\n  allowed: 1 dimensions, none of them 0 (VectorRMS)\n  fix: metrize(model, rules=[Rule('a.weight', norm=…)])"
    )


def test_an_empty_parameter_is_refused():
    with pytest.raises(
        CoverageError, match=r"^a\n  got: shape \(0, 3\)\n  allowed: 2 dimensions, none of them 0 \(Frobenius\)\n"
    ):
        metrize(holding(a=parameter(0, 3)), atom("a", Frobenius()))


def test_two_parameters_of_one_name_are_refused():
    model = holding(weight=parameter(2, 2), module=holding(weight=parameter(2, 2)))
    with pytest.raises(CoverageError, match="two parameters are named 'weight'"):
        metrize(model, atom("weight", Frobenius()))


# Module types.

LINEAR = {"weight": f"hidden {R}", "bias": "bias VectorRMS"}
AFFINE = {"weight": "gain MaxEntry", "bias": "bias VectorRMS"}


def gates(n: int, *suffixes: str) -> dict[str, str]:
    times = f"{n} × " if n > 1 else ""
    kinds = {
        "weight_ih": f"hidden {times}{R}",
        "weight_hh": f"hidden {times}{R}",
        "bias_ih": f"bias {times}VectorRMS",
        "bias_hh": f"bias {times}VectorRMS",
    }
    return {k + s: place for s in suffixes for k, place in kinds.items()}


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(3, 4), LINEAR),
        (Conv1D(4, 3), LINEAR | {"weight": f"hidden Transposed({R})"}),
        (nn.Embedding(5, 4, padding_idx=1), {"weight": "embedding L1ToRMS"}),
        (nn.EmbeddingBag(5, 4), {"weight": "embedding L1ToRMS"}),
        (nn.Conv1d(4, 6, 3), LINEAR | {"weight": f"hidden Conv({R}, 1d)"}),
        (nn.Conv2d(4, 6, (3, 1), groups=2), LINEAR | {"weight": f"hidden Conv({R}, 2d, 2 groups)"}),
        (nn.Conv2d(4, 4, 3, groups=4), LINEAR | {"weight": f"hidden Conv({R}, 2d, 4 groups)"}),
        (nn.Conv3d(2, 3, 2, bias=False), {"weight": f"hidden Conv({R}, 3d)"}),
        (nn.ConvTranspose1d(4, 6, 3), LINEAR | {"weight": f"hidden Conv({R}, 1d, transposed)"}),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), LINEAR | {"weight": f"hidden Conv({R}, 2d, 2 groups, transposed)"}),
        (nn.ConvTranspose3d(2, 3, 2), LINEAR | {"weight": f"hidden Conv({R}, 3d, transposed)"}),
        (nn.LayerNorm(4), AFFINE),
        (nn.LayerNorm([2, 3]), AFFINE | {"bias": "bias Flattened(VectorRMS)"}),
        (nn.RMSNorm([2, 3]), {"weight": "gain MaxEntry"}),
        (nn.GroupNorm(2, 4), AFFINE),
        (nn.BatchNorm1d(4), AFFINE),
        (nn.BatchNorm3d(4), AFFINE),
        (nn.InstanceNorm2d(4, affine=True), AFFINE),
        (nn.RNN(3, 4), gates(1, "_l0")),
        (nn.GRU(3, 4, num_layers=2, bidirectional=True), gates(3, "_l0", "_l0_reverse", "_l1", "_l1_reverse")),
        (nn.LSTM(3, 4, proj_size=2), gates(4, "_l0") | {"weight_hr_l0": f"hidden {R}"}),
        (nn.RNNCell(3, 4), gates(1, "")),
        (nn.GRUCell(3, 4, bias=False), {k: v for k, v in gates(3, "").items() if "bias" not in k}),
        (nn.LSTMCell(3, 4), gates(4, "")),
        (
            nn.MultiheadAttention(8, 2),
            {
                "in_proj_weight": f"hidden 3 × {R}",
                "in_proj_bias": "bias 3 × VectorRMS",
                "out_proj.weight": f"hidden {R}",
                "out_proj.bias": "bias VectorRMS",
            },
        ),
        (
            nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True, bias=False),
            {f"{n}_proj_weight": f"hidden {R}" for n in "qkv"}
            | {
                "bias_k": "bias Flattened(VectorRMS)",
                "bias_v": "bias Flattened(VectorRMS)",
                "out_proj.weight": f"hidden {R}",
            },
        ),
    ],
    ids=repr,
)
def test_modules_are_placed_by_their_type(module: nn.Module, expected: dict[str, str]):
    assert places(module) == expected
    assert metrize(module).notes == (NO_HEAD,), "nothing is guessed"


def zoo() -> nn.Module:
    """Weights of every kind, in float64."""
    return holding(
        embedding=nn.Embedding(9, 6, padding_idx=0),
        linear=nn.Linear(6, 11),
        conv1d=Conv1D(5, 3),
        qkv=nn.Linear(4, 12),
        conv=nn.Conv2d(4, 6, (3, 2), groups=2),
        depthwise=nn.Conv1d(4, 4, 3, groups=4),
        transposed=nn.ConvTranspose2d(4, 6, 3, groups=2),
        layer_norm=nn.LayerNorm([2, 3]),
        batch_norm=nn.BatchNorm1d(4),
        lstm=nn.LSTM(3, 4, proj_size=2),
        gru=nn.GRUCell(3, 5),
        attention=nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True),
        packed=nn.MultiheadAttention(6, 2),
        prelu=nn.PReLU(3),
        experts=parameter(3, 4, 5),
        head=nn.Linear(6, 9),
        scalar=parameter(),
    ).double()


ZOO = (
    Rule("experts", norm=Experts(RMSToRMS()), role="hidden"),
    Rule("head.weight", role="head"),
    Rule("linear.weight", role="hidden"),
)


def test_the_receipt_predicts_the_steps_that_dualized_takes():
    """The column's four digits, at lr = 1 with the exact polar factor, of a step in the norms themselves."""
    model = zoo()
    norm = exact(metrize(model, rules=ZOO))
    delta = gaussian_step(model, Dualized(model, 1.0, norm=norm, direction="nesterov"))
    header, *rows = norm.receipt().split("\nnote:")[0].splitlines()
    assert re.split("  +", header) == ["parameter", "shape", "role", "norm", "mass", "radius", "update RMS"]
    assert len(rows) == len(delta)
    for row in rows:
        name, shape, role, norm_name, mass, radius, predicted = re.split("  +", row)
        assert shape == ("×".join(map(str, delta[name].shape)) or "scalar") and role == norm.roles[name]
        assert (norm_name, mass, radius) == (
            str(norm.norms[name]),
            f"{norm.masses[name]:.4g}",
            f"{norm.radii[name]:.4g}",
        )
        assert float(predicted) == pytest.approx(delta[name].square().mean().sqrt().item(), rel=6e-4), name
        assert norm.norms[name].norm(delta[name]).item() == pytest.approx(norm.radii[name], rel=1e-6), name


def test_what_is_not_known_is_a_question_mark_in_the_receipt():
    class Odd(Norm):
        pass

    norm = ModularNorm({"a": Odd(), "b": Frobenius()}, {"a": 0.5, "b": 1.0}, shapes={"a": (2, 3)}, notes=("one", "two"))
    assert norm.receipt() == (
        "parameter  shape  role  norm       mass  radius  update RMS\n"
        "a          2×3          Odd        0     0.5     ?\n"
        "b          ?            Frobenius  0     1       ?\n"
        "note: one\n"
        "note: two\n"
    )


def test_a_padding_row_never_moves_nor_decays():
    model = nn.Embedding(5, 4, padding_idx=2)
    model.weight.data[2] = 1
    before = model.weight.detach().clone()
    optimizer = Dualized(model, 0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([0, 1, 2, 2, 3])).square().sum().backward()
        optimizer.step()
    moved = (model.weight != before).any(1)
    assert moved.tolist() == [True, True, False, True, False], "nor does a row that was not seen"


# Fused weights: three maps in one are three maps.


def split_apart(fused: nn.Module, name: str, parts: int) -> nn.Module:
    """The same network with fused.name as `parts` Linears beside it."""
    model = nn.Module()
    for child_name, child in fused.named_children():
        if child_name != name:
            setattr(model, child_name, child)
            continue
        weight = child.weight if isinstance(child, nn.Linear) else child.weight.mT  # type: ignore[union-attr]
        for i, (w, b) in enumerate(zip(weight.chunk(parts), child.bias.chunk(parts), strict=True)):  # type: ignore[union-attr, operator]
            setattr(model, f"part{i}", nn.Linear(w.shape[1], w.shape[0]))
            getattr(model, f"part{i}").weight.data, getattr(model, f"part{i}").bias.data = (
                w.detach().clone(),
                b.detach().clone(),
            )
    return model.double()


@pytest.mark.parametrize(
    ("label", "parts", "layer"),
    [
        ("qkv", 3, nn.Linear(6, 18)),
        ("qkv_proj", 3, nn.Linear(6, 18)),
        ("Wqkv", 3, nn.Linear(6, 18)),
        ("c_attn", 3, Conv1D(18, 6)),
        ("gate_up_proj", 2, nn.Linear(6, 20)),
    ],
)
def test_a_fused_weight_steps_as_its_maps_would_apart(label: str, parts: int, layer: nn.Module):
    read = len(layer.bias) // parts  # type: ignore[arg-type]
    fused = holding(embed=nn.Embedding(5, 6), **{label: layer}, out=nn.Linear(read, 6)).double()
    apart = split_apart(fused, label, parts)
    norm, theirs = exact(metrize(fused)), exact(metrize(apart))
    assert norm.notes == (f"{label}.weight: {parts} maps fused in one weight, by its name ({label})", NO_HEAD)
    assert norm.masses[f"{label}.weight"] == pytest.approx(parts * norm.masses["out.weight"])
    for kind in ("weight", "bias"):
        radii = [theirs.radii[f"part{i}.{kind}"] for i in range(parts)]
        assert radii == pytest.approx([norm.radii[f"{label}.{kind}"]] * parts)
    assert {k: norm.radii[k] for k in ("embed.weight", "out.weight", "out.bias")} == pytest.approx(
        {k: theirs.radii[k] for k in ("embed.weight", "out.weight", "out.bias")}
    )
    grads = {n: torch.randn_like(p) for n, p in fused.named_parameters()}
    delta = gaussian_step(fused, Dualized(fused, 1.0, norm=norm), grads)
    stored = isinstance(layer, Conv1D)
    for kind in ("weight", "bias"):
        whole = grads.pop(f"{label}.{kind}")
        whole = whole.mT if stored and kind == "weight" else whole
        grads |= {f"part{i}.{kind}": g for i, g in enumerate(whole.chunk(parts))}
    parted = gaussian_step(apart, Dualized(apart, 1.0, norm=theirs), grads)
    joined = torch.cat([parted[f"part{i}.weight"] for i in range(parts)])
    assert torch.allclose(delta[f"{label}.weight"], joined.mT if stored else joined, atol=1e-12)
    assert torch.allclose(
        delta[f"{label}.bias"], torch.cat([parted[f"part{i}.bias"] for i in range(parts)]), atol=1e-12
    )


def test_packed_attention_and_gates_have_the_radii_of_separate_maps():
    packed = metrize(nn.MultiheadAttention(6, 2)).radii
    apart = metrize(holding(q=nn.Linear(6, 6), k=nn.Linear(6, 6), v=nn.Linear(6, 6), out_proj=nn.Linear(6, 6))).radii
    assert (packed["in_proj_weight"], packed["in_proj_bias"]) == pytest.approx((apart["q.weight"], apart["q.bias"]))
    assert packed["out_proj.weight"] == pytest.approx(apart["out_proj.weight"])
    gru = metrize(nn.GRUCell(4, 4)).radii
    maps = metrize(holding(**{f"m{i}": nn.Linear(4, 4) for i in range(6)})).radii
    assert [gru[k] for k in ("weight_ih", "weight_hh", "bias_ih")] == pytest.approx(
        [maps["m0.weight"], maps["m5.weight"], maps["m0.bias"]]
    )


def test_a_fused_name_of_grouped_queries_is_refused_and_a_rule_places_it():
    model = holding(c_attn=nn.Linear(8, 12, bias=False))  # 8 rows of queries, 2 of keys, 2 of values
    with pytest.raises(
        CoverageError,
        match=r"^no place for 1 weight\n(.|\n)*c_attn.weight, 12×8, of a Linear\n(.|\n)*Blocks\(RMSToRMS\(\), \(rows of each, …\)\), maps=…",
    ):
        metrize(model)
    rule = Rule("c_attn.weight", norm=Blocks(RMSToRMS(), (8, 2, 2)), role="hidden")
    assert places(model, rule) == {"c_attn.weight": f"hidden (8 + 2 × 2) × {R}"}


def test_a_square_weight_of_a_fused_name_is_one_map():
    assert places(holding(qkv=nn.Linear(4, 4, bias=False))) == {"qkv.weight": f"hidden {R}"}


# Weights of no known type.


@pytest.mark.parametrize(
    ("name", "role"),
    [*((n, "gain") for n in ("weight", "gamma", "gain", "scale", "g")), *((n, "bias") for n in ("bias", "beta", "b"))],
)
def test_vectors_of_unknown_modules_are_placed_by_name_with_a_note(name: str, role: str):
    class SomeLayer(nn.Module):
        pass

    layer = SomeLayer()
    layer.register_parameter(name, parameter(3))
    norm = metrize(holding(inner=layer))
    assert norm.roles == {f"inner.{name}": role}
    assert norm.notes[0] == f"inner.{name}: 1-D and named {name}, of a SomeLayer: taken for a {role}"
    assert norm.receipt().endswith(f"\nnote: {norm.notes[0]}\nnote: {NO_HEAD}\n")
    assert metrize(holding(inner=layer), rules=[Rule("inner.*", role=role)]).notes == (NO_HEAD,), (
        "what a rule decides is no guess"
    )


def test_scalars_have_a_role_of_their_own():
    norm = metrize(holding(temperature=parameter()))
    assert (norm.roles["temperature"], norm.norms["temperature"], norm.notes[0]) == (
        "scalar",
        MaxEntry(0),
        "temperature: a scalar",
    )


@pytest.mark.parametrize(
    ("weight", "alternatives"),
    [
        (
            parameter(3, 4),
            "maps (out, in); stored (in, out): norm=Transposed(RMSToRMS()); rows of a table: role='embedding'; numbers that "
            "multiply or add one by one: role='gain', role='bias'",
        ),
        (
            parameter(3, 4, 5),
            "3 maps (out, in), of experts or groups; stored (in, out): norm=Experts(Transposed(RMSToRMS())); rows of a table: "
            "role='embedding'",
        ),
        (
            parameter(3, 4, 5, 6),
            "maps (out, in); stored (in, out): norm=Transposed(RMSToRMS()); rows of a table: role='embedding'; numbers that "
            "multiply or add one by one: role='gain', role='bias'",
        ),
    ],
    ids=["2-D", "3-D", "4-D"],
)
def test_weights_that_neither_type_nor_name_tell_are_refused(weight: nn.Parameter, alternatives: str):
    model = holding(experts=weight)
    with pytest.raises(CoverageError) as error:
        metrize(model)
    shape = "×".join(map(str, weight.shape))
    assert str(error.value) == (
        f"no place for 1 weight\n  got: weights that no type, shape or name tells\n    experts, {shape}, of a Module\n"
        "  allowed: a rule for each; the roles are embedding, hidden, head, gain, bias, scalar\n"
        f"  fix: metrize(model, rules=[\n    Rule('experts', role='hidden'),  # {alternatives}\n  ]), or requires_grad=False. Norms are in nanodual.norms, "
        "their views (Blocks, Experts, Transposed) in nanodual.views"
    )
    assert metrize(model, rules=pasted(str(error.value))).roles == {"experts": "hidden"}


def pasted(message: str) -> list[Rule]:
    """The rules that an error prints, as a user pastes them."""
    return eval(re.search(r"rules=(\[.*?\n  \])", message, re.DOTALL)[1], {"Rule": Rule})  # type: ignore[index]


def test_one_error_names_all_weights_without_a_place_by_patterns_and_its_rules_work():
    layers = nn.ModuleList(holding(mix=parameter(4, 5), c_attn=nn.Linear(8, 12)) for _ in range(3))
    model = holding(layers=layers, other=parameter(3, 4, 5))
    with pytest.raises(CoverageError) as error:
        metrize(model)
    message = str(error.value)
    assert message.startswith(
        "no place for 7 weights\n  got: weights that no type, shape or name tells\n    other, 3×4×5, of a Module\n"
        "    layers.*.mix, 4×5, of a Module, 3 of them\n    layers.*.c_attn.weight, 12×8, of a Linear, 3 of them\n"
    )
    assert len(metrize(model, rules=pasted(message)).norms) == 10


def test_the_patterns_of_an_error_match_no_other_weight():
    layers = nn.ModuleList(holding(mix=parameter(4, 5), sub=holding(mix=parameter(4))) for _ in range(2))
    model = holding(**{"layers": layers, "odd[1]": parameter(2, 3)})
    with pytest.raises(CoverageError) as error:
        metrize(model)
    rules = pasted(str(error.value))
    assert [rule.pattern for rule in rules] == ["odd[1]", "layers.0.mix", "layers.1.mix"]
    assert metrize(model, rules=rules).roles["layers.0.sub.mix"] == "gain"


# Rules.


def test_a_rule_decides_norm_mass_or_role_and_leaves_the_rest():
    model = nn.Linear(3, 4)
    assert places(model, Rule("weight", norm=Frobenius())) == LINEAR | {"weight": "hidden Frobenius"}
    assert places(model, Rule("weight", role="mine")) == LINEAR | {"weight": f"mine {R}"}
    assert places(model, Rule("weight", norm="L1ToRMS", role="mine")) == LINEAR | {"weight": "mine L1ToRMS"}
    norm = metrize(model, rules=[Rule("weight", mass=2)])
    assert places(model, Rule("weight", mass=2)) == LINEAR and norm.masses == {"weight": 2, "bias": MASSES["bias"]}


@pytest.mark.parametrize(
    ("role", "shape", "expected"),
    [
        ("embedding", (5, 4), L1ToRMS()),
        ("hidden", (5, 4), RMSToRMS()),
        ("head", (5, 4), RMSToLinf()),
        ("gain", (5,), MaxEntry()),
        ("gain", (5, 4), MaxEntry(2)),
        ("scalar", (), MaxEntry(0)),
        ("bias", (5,), VectorRMS()),
    ],
)
def test_a_role_brings_its_norm(role: str, shape: tuple[int, ...], expected: Norm):
    norm = metrize(holding(x=parameter(*shape)), rules=[Rule("x", role=role)])
    assert (norm.roles["x"], norm.norms["x"], norm.masses["x"]) == (role, expected, MASSES[role])


def test_a_role_keeps_how_the_weight_is_stored():
    assert places(Conv1D(4, 3), Rule("weight", role="head"))["weight"] == "head Transposed(RMSToLinf)"
    assert places(holding(x=parameter(5, 4)), Rule("x", role="bias")) == {"x": "bias Flattened(VectorRMS)"}


def test_norms_by_name_and_rules_as_mappings_are_the_same():
    norms = [
        metrize(nn.Linear(3, 4), rules=[r])
        for r in (Rule("w*", norm=Frobenius()), Rule("w*", norm="Frobenius"), {"pattern": "w*", "norm": "Frobenius"})
    ]
    assert norms[0].norms == norms[1].norms == norms[2].norms and norms[0].radii == norms[1].radii == norms[2].radii


def test_the_first_rule_that_matches_wins():
    rules = [Rule("0.weight", norm="Frobenius"), Rule("*.weight", mass=5)]
    norm = metrize(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), rules=rules)
    assert [str(norm.norms[f"{i}.weight"]) for i in (0, 1)] == ["Frobenius", R]
    assert norm.masses["1.weight"] == 5 != norm.masses["0.weight"]


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        (
            [Rule("wieght", mass=1)],
            "rule 'wieght'\n  got: a pattern that matches no parameter (nearest: 'weight')\n  allowed: one that decides something\n",
        ),
        (
            [Rule("*", mass=1), Rule("weight", mass=2)],
            "rule 'weight'\n  got: a pattern that matches only parameters that earlier rules have taken\n  allowed: one that decides something\n"
            "  fix: correct it, move it up, or leave it out",
        ),
    ],
)
@pytest.mark.parametrize("declared", [False, True])
def test_a_rule_that_decides_nothing_is_an_error(rules: list[Rule], text: str, declared: bool):
    tree = atom("weight", Frobenius()) if declared else None
    with pytest.raises(CoverageError) as error:
        metrize(nn.Linear(3, 4, bias=False), tree, rules)
    assert str(error.value).startswith(text)


def test_an_impossible_rule_is_refused():
    with pytest.raises(
        CoverageError,
        match=r"^rule 'w'\n  got: norm 'RMS2RMS'\n  allowed: (.*, )?RMSToRMS(, .*)?\n  fix: nearest valid name: RMSToRMS$",
    ):
        Rule("w", norm="RMS2RMS")
    for mass in (-1.0, float("nan")):
        with pytest.raises(
            CoverageError, match=rf"^rule 'w'\n  got: mass {mass}\n  allowed: 0 \(never updated\) or more\n"
        ):
            Rule("w", mass=mass)
    with pytest.raises(
        CoverageError, match=r"^weight\n  got: shape \(4, 3\)\n  allowed: 1 dimensions, .* \(VectorRMS\)\n  fix: "
    ):
        metrize(nn.Linear(3, 4), rules=[Rule("weight", norm="VectorRMS")])


class Stacked(nn.Module):
    """Numbered blocks under a power."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            holding(up=nn.Linear(4, 4, bias=False), down=nn.Linear(4, 4, bias=False)) for _ in range(3)
        )

    def structure(self) -> Module:
        block = (
            atom("blocks.{}.down.weight", RMSToRMS(), role="mlp")
            @ bond("relu²", typical=True)
            @ atom("blocks.{}.up.weight", RMSToRMS(), role="mlp")
        )
        return residual(block, 3) ** 3


def test_rules_reach_numbered_atoms_of_a_declared_structure():
    plain = metrize(Stacked())
    ruled = metrize(
        Stacked(), rules=[Rule("blocks.1.up.*", norm="Frobenius", role="odd"), Rule("*.down.weight", role="down")]
    )
    assert ruled.radii == pytest.approx(plain.radii), "neither norm nor role changes a radius"
    changed = {n for n in plain.norms if plain.norms[n] != ruled.norms[n]}
    assert changed == {"blocks.1.up.weight"} and ruled.roles["blocks.1.up.weight"] == "odd"
    assert [ruled.roles[f"blocks.{i}.down.weight"] for i in range(3)] == ["down"] * 3
    light = metrize(Stacked(), rules=[Rule("blocks.1.*", mass=0)])
    assert [n for n, r in light.radii.items() if r == 0] == ["blocks.1.up.weight", "blocks.1.down.weight"]
    assert light.radii["blocks.0.up.weight"] == pytest.approx(1.5 * plain.radii["blocks.0.up.weight"]), (
        "the others share what it had"
    )


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), Two()])
def test_mass_zero_never_moves(model: nn.Module):
    name = next(n for n, _ in model.named_parameters())
    optimizer = Dualized(model, 1.0, norm=metrize(model, rules=[Rule(name, mass=0)]), weight_decay=0.5)
    delta = gaussian_step(model, optimizer)
    assert not delta.pop(name).any() and all(d.any() for d in delta.values())


# Masses.


def test_each_role_has_its_total_mass_shared_by_its_maps():
    norm = metrize(zoo(), rules=[Rule("*.bias", role="bias"), *ZOO])
    totals = {role: sum(m for n, m in norm.masses.items() if norm.roles[n] == role) for role in MASSES}
    assert totals == pytest.approx(MASSES)
    assert norm.masses["lstm.weight_ih_l0"] == pytest.approx(4 * norm.masses["linear.weight"])
    assert norm.masses["conv.weight"] == pytest.approx(norm.masses["experts"])
    hidden = {n: r for n, r in norm.radii.items() if norm.roles[n] == "hidden"}
    assert len({round(r, 12) for r in hidden.values()}) == 1, "every map has the same radius, fused or not"


def test_a_mass_by_rule_is_beside_the_totals():
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3)))
    assert metrize(model, rules=[Rule("1.weight", mass=4)]).masses == {"0.weight": 3, "1.weight": 4, "2.weight": 3}
    norm = metrize(model, rules=[Rule("1.weight", role="mine")])
    assert norm.masses == {"0.weight": 3, "1.weight": 6, "2.weight": 3}, (
        "a role of the user's own has a hidden one's total"
    )


# Several maps in one weight.


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False)


class Experts3(nn.Module):
    """Three experts in two stacks, (E, out, in) or (E, in, out)."""

    def __init__(self, *, transposed: bool):
        super().__init__()
        self.up, self.down = parameter(3, 8, 6), parameter(3, 6, 8)
        if transposed:
            self.up, self.down = parameter(3, 6, 8), parameter(3, 8, 6)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_same_experts_have_the_same_radii_as_a_stack_and_as_a_list(transposed: bool):
    rest = {"router": nn.Linear(6, 3), "out": nn.Linear(6, 6)}
    stack = metrize(holding(**rest, experts=Experts3(transposed=transposed)))
    apart = metrize(holding(**rest, experts=nn.ModuleList(Expert() for _ in range(3))))
    for kind in ("up", "down"):
        radii = [apart.radii[f"experts.{i}.{kind}.weight"] for i in range(3)]
        assert radii == pytest.approx([stack.radii[f"experts.{kind}"]] * 3)
        assert sum(apart.masses[f"experts.{i}.{kind}.weight"] for i in range(3)) == pytest.approx(
            stack.masses[f"experts.{kind}"]
        )
    assert stack.radii["out.weight"] == pytest.approx(apart.radii["out.weight"])
    of_one = f"Transposed({R})" if transposed else R
    assert str(stack.norms["experts.up"]) == str(stack.norms["experts.down"]) == f"Experts({of_one})"


def test_layers_that_are_named_after_a_mixture_are_no_experts():
    class MoELayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(6, 6, bias=False)

    radii = [metrize(holding(layers=nn.ModuleList(MoELayer() for _ in range(n)))).radii for n in (2, 8)]
    assert radii[0]["layers.0.q.weight"] == pytest.approx(4 * radii[1]["layers.0.q.weight"])


@pytest.mark.parametrize("order", [("w1", "w2", "w3"), ("gate", "up", "down")])
def test_three_stacks_of_experts_are_told_apart_by_the_odd_one_and_the_router(order: tuple[str, ...]):
    down = "w2" if "w2" in order else "down"
    stacks = {name: parameter(3, 6, 8) if name == down else parameter(3, 8, 6) for name in order}
    norm = metrize(holding(router=nn.Linear(6, 3, bias=False), experts=holding(**stacks)))
    assert {str(norm.norms[f"experts.{name}"]) for name in order} == {f"Experts({R})"}
    columns = {name: parameter(*w.shape[:1], *w.shape[:0:-1]) for name, w in stacks.items()}
    norm = metrize(holding(router=nn.Linear(6, 3, bias=False), experts=holding(**columns)))
    assert {str(norm.norms[f"experts.{name}"]) for name in order} == {f"Experts(Transposed({R}))"}


def test_a_square_stack_is_stored_as_its_other_stack_says():
    router = nn.Linear(8, 3, bias=False)
    columns = holding(router=router, experts=holding(gate_up=parameter(3, 8, 8), down=parameter(3, 4, 8)))
    norms = metrize(columns).norms  # 8 inputs, gates and values of 4 each
    assert str(norms["experts.gate_up"]) == f"Experts(Transposed(2 × {R}))"
    assert str(norms["experts.down"]) == f"Experts(Transposed({R}))"


def test_a_router_of_its_own_parameter_is_a_map():
    norm = metrize(holding(gate=parameter(3, 6), experts=Experts3(transposed=False)))
    assert norm.norms["gate"] == RMSToRMS() and norm.roles["gate"] == "hidden"


def test_gates_of_an_own_recurrent_cell_are_four_maps():
    cell = holding(x2h=nn.Linear(6, 24), h2h=nn.Linear(6, 24), out=nn.Linear(6, 6))
    norms = metrize(holding(cells=nn.ModuleList([cell]))).norms
    assert str(norms["cells.0.x2h.weight"]) == str(norms["cells.0.h2h.weight"]) == f"4 × {R}"


def test_a_rule_of_several_maps_divides_the_weight_and_its_bias():
    model = holding(first=nn.Linear(6, 12), after=nn.Linear(12, 6))
    norm = metrize(model, rules=[Rule("first.weight", maps=3)])
    assert (str(norm.norms["first.weight"]), str(norm.norms["first.bias"])) == (f"3 × {R}", "3 × VectorRMS")
    whole = metrize(model).masses["after.weight"]
    assert norm.masses["first.weight"] == pytest.approx(3 * norm.masses["after.weight"]) and whole == 3


def test_a_role_keeps_what_a_convolution_and_a_bilinear_map_are():
    model = holding(out=nn.Conv2d(8, 4, 3), pair=nn.Bilinear(2, 3, 4))
    norms = metrize(model, rules=[Rule("*.weight", role="head")]).norms
    assert str(norms["out.weight"]) == "Conv(RMSToLinf, 2d)" and str(norms["pair.weight"]) == "Flattened(RMSToLinf)"


def test_grouped_queries_are_divided_by_whatever_names_the_attention_has_for_its_heads():
    attention = holding(Wqkv=nn.Linear(64, 128, bias=False), out_proj=nn.Linear(64, 64))
    attention.num_heads, attention.num_heads_kv = 4, 2  # type: ignore[assignment]
    norm = metrize(holding(layers=nn.ModuleList([attention])))
    assert str(norm.norms["layers.0.Wqkv.weight"]) == f"(64 + 2 × 32) × {R}"


def test_a_map_that_nothing_reads_whole_is_noted():
    layer = holding(modulation=nn.Linear(8, 48), up=nn.Linear(8, 8))
    notes = metrize(holding(layers=nn.ModuleList([layer, copy.deepcopy(layer)]))).notes
    assert notes[0] == "layers.*.modulation.weight: one map, though no map reads its 48 outputs whole"


@pytest.mark.parametrize(
    ("weight", "after", "maps"),
    [
        (nn.Linear(8, 24), nn.Linear(8, 8), 3),  # queries, keys and values of any name
        (nn.Linear(8, 20), nn.Linear(10, 8), 2),  # gates and what they gate
        (nn.Linear(8, 24), nn.Linear(24, 8), 1),
        (nn.Conv1d(8, 16, 1), nn.Conv1d(8, 8, 3), 2),
    ],
)
def test_a_weight_of_which_only_a_part_is_read_holds_several_maps_and_is_noted(
    weight: nn.Module, after: nn.Module, maps: int
):
    norm = metrize(holding(layers=nn.ModuleList([holding(first=weight, after=after)])))
    placed = norm.norms["layers.0.first.weight"]
    assert getattr(placed, "sizes", 1) == maps
    assert any(note.startswith(f"layers.0.first.weight: {maps} maps fused") for note in norm.notes) == (maps > 1)
    assert getattr(norm.norms["layers.0.first.bias"], "sizes", 1) == maps
    model = holding(layers=nn.ModuleList([holding(first=weight, after=after)]))
    one = metrize(model, rules=[Rule("layers.0.first.weight", maps=1)])
    assert not isinstance(one.norms["layers.0.first.weight"], Blocks), "a rule says that it is one"


def test_a_layer_before_wider_ones_is_one_map():
    """A stage's last map doubles the channels, which only the next stage reads."""
    stages = [holding(block=nn.Linear(8, 8), widen=nn.Linear(8, 16)), holding(block=nn.Linear(16, 16))]
    norm = metrize(holding(stages=nn.ModuleList(stages)))
    assert norm.norms["stages.0.widen.weight"] == RMSToRMS()


# Tables, tokens and parametrized weights.


@pytest.mark.parametrize("shape", [(6,), (5, 6), (1, 5, 6), (1, 1, 6), (1, 3, 5, 6)])
def test_tables_of_any_dimensions_are_embeddings_by_role(shape: tuple[int, ...]):
    model = holding(odd=parameter(*shape), out=nn.Linear(6, 6))
    norm = metrize(model, rules=[Rule("odd", role="embedding")]).norms["odd"]
    W = torch.randn(shape)
    rows = W.reshape(-1, 6)
    assert float(norm.norm(W)) == pytest.approx(float(rows.square().mean(-1).sqrt().amax()))
    assert norm.dualize(W).reshape(-1, 6).square().mean(-1).sqrt().tolist() == pytest.approx([1] * len(rows))


def test_a_vision_transformers_tables_need_no_rule_and_are_noted():
    model = holding(cls_token=parameter(1, 1, 6), pos_embed=parameter(1, 5, 6), relative_bias_table=parameter(7, 2))
    assert set(metrize(model).roles.values()) == {"embedding"}
    assert [note.partition(":")[0] for note in metrize(model).notes[:3]] == [
        "cls_token",
        "pos_embed",
        "relative_bias_table",
    ]


PARAMETRIZED = {
    "spectral_norm": (nn.utils.parametrizations.spectral_norm, {"parametrizations.weight.original": f"hidden {R}"}),
    "orthogonal": (nn.utils.parametrizations.orthogonal, {"parametrizations.weight.original": f"hidden {R}"}),
    "weight_norm": (
        nn.utils.parametrizations.weight_norm,
        {"parametrizations.weight.original0": "gain MaxEntry", "parametrizations.weight.original1": f"hidden {R}"},
    ),
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_a_parametrized_weight_is_placed_as_the_weight_that_it_makes(name: str):
    parametrize, expected = PARAMETRIZED[name]
    model = holding(map=parametrize(nn.Linear(6, 6)))
    assert places(model) == {"map.bias": "bias VectorRMS"} | {f"map.{k}": v for k, v in expected.items()}
    x = torch.randn(4, 6)
    optimizer = Dualized(model, 0.1, norm=metrize(model))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model.map(x) - 1).square().mean()  # type: ignore[operator]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_dualized_says_once_what_was_guessed_and_metrize_puts_it_into_the_receipt():
    model = holding(cls_token=parameter(1, 1, 6), out=nn.Linear(6, 6))
    text = "metrize guessed.*\n  cls_token: one row of a table, by its name"
    with pytest.warns(GuessWarning, match=text) as warned:
        Dualized(model)
    assert len(warned) == 1 and warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Dualized(model, norm=metrize(model))
    assert "note: cls_token: one row of a table, by its name" in metrize(model).receipt()


# The head.


def test_a_map_to_a_vocabulary_is_taken_for_the_head_and_noted_wherever_it_stands():
    embedding, maps = nn.Embedding(7, 6), {"hidden": nn.Linear(6, 6), "words": nn.Linear(6, 7)}
    first = holding(**dict(reversed(maps.items())), after=nn.Linear(6, 6), embed=embedding)
    for model in (holding(embed=embedding, **maps), first):
        norm = metrize(model)
        assert norm.norms["words.weight"] == RMSToLinf() and norm.norms["words.bias"] == MaxEntry()
        assert norm.notes == ("words.weight: taken for a head: 7 outputs, as many as an embedding has rows",)
    assert not metrize(model, rules=[Rule("words.weight", role="head")]).notes, "what a rule decides is no guess"
    hidden = metrize(model, rules=[Rule("words.weight", role="hidden")])
    assert hidden.norms["words.weight"] == RMSToRMS() and hidden.notes == (NO_HEAD,)


def test_the_map_whose_outputs_nothing_reads_is_taken_for_a_classifiers_last():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5))
    norm = metrize(model)
    assert [n for n, role in norm.roles.items() if role == "head"] == ["4.weight"]
    assert norm.notes == ("4.weight: taken for a head: no map reads its 5 outputs",)
    recurrent = holding(features=nn.Linear(5, 8), lstm=nn.LSTM(8, 6), out=nn.Linear(6, 3))
    assert [n for n, role in metrize(recurrent).roles.items() if role == "head"] == ["out.weight"]
    autoencoder = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16))
    assert metrize(autoencoder).notes == (NO_HEAD,), "its last outputs are as wide as its inputs"
    layers = [holding(score=nn.Linear(8, 3), up=nn.Linear(8, 9), down=nn.Linear(9, 8)) for _ in range(2)]
    assert "head" not in metrize(holding(layers=nn.ModuleList(layers))).roles.values(), "a map inside a repeated layer"
    critics = [nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 1)) for _ in range(2)]
    norm = metrize(holding(actor=nn.Linear(8, 3), critics=nn.ModuleList(critics)))
    assert {n for n, role in norm.roles.items() if role == "head"} == {
        "actor.weight",
        "critics.0.1.weight",
        "critics.1.1.weight",
    }
    experts = nn.ModuleList(Expert() for _ in range(3))
    norm = metrize(holding(stem=nn.Linear(4, 6), router=nn.Linear(6, 3), experts=experts))
    assert norm.roles["router.weight"] == "hidden", "one output for each expert"
    generator = nn.Sequential(nn.Linear(5, 60), nn.Unflatten(1, (15, 2, 2)), nn.ConvTranspose2d(15, 3, 3))
    assert metrize(generator).roles["0.weight"] == "hidden", "a convolution reads what was reshaped"


def test_a_square_map_between_equal_sizes_does_not_look_like_the_head():
    assert metrize(nn.Sequential(nn.Embedding(6, 6), nn.Linear(6, 6))).notes == (NO_HEAD,)


def test_the_output_embeddings_of_transformers_are_the_head():
    class Transformer(nn.Module):
        def __init__(self, head: str | None):
            super().__init__()
            self.embed, self.lm_head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
            self.head = head

        def get_output_embeddings(self) -> nn.Module | None:
            return getattr(self, self.head) if self.head else None

    assert places(Transformer("lm_head")) == {"embed.weight": "embedding L1ToRMS", "lm_head.weight": "head RMSToLinf"}
    assert metrize(Transformer(None)).notes[0].startswith("lm_head.weight: taken for a head")


def classifier(head: type[nn.Module] = nn.Linear) -> nn.Module:
    last = Conv1D(4, 8) if head is Conv1D else head(8, 4)
    return holding(embed=nn.Embedding(9, 6), hidden=nn.Linear(6, 8), head=last)


@pytest.mark.parametrize("head", [nn.Linear, Conv1D])
@pytest.mark.parametrize("pattern", ["head.weight", "head.*"])
def test_a_heads_bias_has_the_norm_of_logits(head: type[nn.Module], pattern: str):
    norm = metrize(classifier(head), rules=[Rule(pattern, role="head")])
    assert (norm.norms["head.bias"], norm.norms["hidden.bias"]) == (MaxEntry(), VectorRMS())
    assert norm.roles["head.bias"] == ("bias" if pattern == "head.weight" else "head"), "the rule's word stands"


def test_a_heads_bias_keeps_its_role_mass_and_radius():
    norm = metrize(classifier(), rules=[Rule("head.weight", role="head")])
    assert norm.roles["head.bias"] == "bias"
    assert norm.masses["head.bias"] == norm.masses["hidden.bias"] == MASSES["bias"] / 2
    assert norm.radii["head.bias"] == norm.radii["hidden.bias"]


def test_a_step_moves_every_logit_alike_through_a_heads_bias():
    model = classifier().double()
    norm = metrize(model, rules=[Rule("head.weight", role="head")])
    delta = gaussian_step(model, Dualized(model, 0.5, norm=norm, direction="nesterov"))
    assert torch.allclose(delta["head.bias"].abs(), torch.full((4,), 0.5 * norm.radii["head.bias"]).double())
    assert delta["hidden.bias"].abs().unique().numel() > 1


def test_a_declared_heads_bias_has_the_norm_of_logits_even_where_only_biases_train():
    model = classifier()
    vars(model)["get_output_embeddings"] = lambda: model.head
    assert metrize(model).norms["head.bias"] == MaxEntry()
    model.head.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    assert metrize(model).norms["head.bias"] == MaxEntry()
    hidden = metrize(model, rules=[Rule("head.weight", role="hidden")])
    assert hidden.norms["head.bias"] == VectorRMS(), "a rule's word against it counts"
    assert metrize(model, rules=[Rule("head.bias", norm=Frobenius(1))]).norms["head.bias"] == Frobenius(1)


def test_the_bias_of_a_tied_head_has_the_norm_of_logits():
    model = Tied()
    model.head.bias = parameter(7)
    norm = metrize(model, rules=[Rule("embed.weight", norm="RMSToLinf", role="head")])
    assert (norm.norms["head.bias"], norm.norms["up.bias"]) == (MaxEntry(), VectorRMS())


@pytest.mark.parametrize("name", ["gpt", "ngram"])
def test_a_gpts_biases_have_the_norms_of_what_they_are_added_to(name: str):
    settings: dict[str, Any] = dict(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=5, bias=True)
    model = GPT(GPTConfig(**settings)) if name == "gpt" else NgramGPT(NgramConfig(**settings, ngram=2))
    norm = metrize(model)
    biases = {n: own for n, own in norm.norms.items() if n.endswith("bias")}
    assert biases.pop("head.bias") == MaxEntry() and norm.roles["head.bias"] == "bias"
    assert len(biases) == 6 and set(biases.values()) == {VectorRMS()}


# Ties.


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_are_refused_by_identity(device: str):
    with torch.device(device):
        model = Tied()
    with pytest.raises(CoverageError) as error:
        metrize(model)
    assert str(error.value) == (
        "head.weight shares its storage with embed.weight\n  got: one tensor in two roles\n  allowed: one role a tensor, or one norm by rule\n"
        "  fix: untie them (transformers: tie_word_embeddings=False in the config, before the model is built), or metrize(model, rules=[Rule('embed.weight', norm='RMSToRMS')])"
    )


def test_modules_of_one_type_may_share_a_weight():
    model = holding(a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    model.b.weight, model.b.bias = model.a.weight, model.a.bias  # type: ignore[union-attr, assignment]
    assert places(model) == {"a.weight": f"hidden {R}", "a.bias": "bias VectorRMS"}
    model.c = model.a  # one module under two names
    assert len(places(model)) == 2


def test_tied_weights_of_a_declared_structure_are_refused():
    model = holding(a=nn.Linear(3, 3, bias=False), b=nn.Linear(3, 3, bias=False))
    model.b.weight = model.a.weight  # type: ignore[union-attr, assignment]
    with pytest.raises(CoverageError, match=r"^b.weight shares its storage with a.weight"):
        metrize(model, Two().structure())


def test_overlapping_views_are_refused_and_views_side_by_side_are_fine():
    flat = torch.zeros(40)
    parts = {"a": flat[:12].view(4, 3), "b": flat[12:20].view(2, 4), "c": flat[20:]}
    tree = concat(*(atom(n, Frobenius(p.ndim)) for n, p in parts.items()))
    assert list(metrize(holding(**{n: nn.Parameter(p) for n, p in parts.items()}), tree).norms) == ["a", "b", "c"]
    parts["b"] = flat[11:19].view(2, 4)
    with pytest.raises(CoverageError, match="^b shares its storage with a\n"):
        metrize(holding(**{n: nn.Parameter(p) for n, p in parts.items()}), tree)
    with pytest.raises(CoverageError, match="^b shares its storage with a\n"):
        metrize(holding(a=nn.Parameter(flat), b=nn.Parameter(flat)), tree)


def test_weights_on_the_meta_device_are_no_tie_and_cost_nothing():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(10**6, 10**6, bias=False) for _ in range(3)))
    assert len(metrize(model).norms) == 3


@pytest.mark.parametrize("pattern", ["embed.weight", "head.weight"])
def test_a_tie_with_one_norm_by_rule_under_either_name_trains(pattern: str):
    model = Tied()
    norm = metrize(model, rules=[Rule(pattern, norm="RMSToLinf", role="head")])
    assert set(norm.norms) == {"embed.weight", "up.weight", "up.bias"} and norm.norms["embed.weight"] == RMSToLinf()
    optimizer = Dualized(model, 0.5, norm=norm)
    x, y = torch.randint(7, (2, 64), generator=torch.Generator().manual_seed(0))
    y = (x * 2 + 1) % 7
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and model.head.weight is model.embed.weight


def test_a_rule_of_mass_alone_resolves_no_tie_and_a_role_does():
    with pytest.raises(CoverageError, match="^head.weight shares its storage with embed.weight"):
        metrize(Tied(), rules=[Rule("embed.weight", mass=2)])
    for name in ("embed.weight", "head.weight"):
        assert places(Tied(), Rule(name, role="embedding"))["embed.weight"] == "embedding L1ToRMS"


def test_a_tied_heads_bias_is_added_to_logits():
    model = holding(embed=nn.Embedding(7, 4), lstm=nn.LSTM(4, 4), out=nn.Linear(4, 7))
    model.out.weight = model.embed.weight  # type: ignore[union-attr, assignment]
    norm = metrize(model, rules=[Rule("embed.weight", norm="RMSToRMS")])
    assert norm.norms["out.bias"] == MaxEntry() and not norm.notes


# What takes no part, and what cannot.


def test_frozen_parameters_need_no_place_and_are_counted():
    model = Two()
    model.a.weight.requires_grad_(False)
    norm = metrize(model)
    assert list(norm.norms) == list(norm.radii) == list(norm.shapes) == ["b.weight"]
    assert norm.receipt().endswith("\nnote: 1 frozen parameter left out\n")
    foreign = holding(a=nn.Linear(3, 4), odd=parameter(2, 3, 4))
    for p in (foreign.odd, foreign.a.bias):  # type: ignore[union-attr]
        p.requires_grad_(False)  # type: ignore[union-attr, operator]
    assert metrize(foreign).notes[-1] == "2 frozen parameters left out"


def test_sparse_gradients_are_refused():
    with pytest.raises(CoverageError) as error:
        metrize(nn.Sequential(nn.Embedding(5, 4, sparse=True)))
    assert (
        str(error.value)
        == "0.weight\n  got: sparse gradients\n  allowed: dense ones\n  fix: build its Embedding with sparse=False"
    )


@pytest.mark.parametrize("tree", [None, atom("weight", RMSToRMS())])
def test_complex_weights_are_refused(tree: Module | None):
    with pytest.raises(CoverageError, match=r"^weight\n  got: complex numbers\n  allowed: real ones\n  fix: "):
        metrize(nn.Linear(3, 4, bias=False, dtype=torch.complex64), tree)


# The drawing.

# The radii by hand, of a total mass of 11: head 1/11/10; the last block's share is 4/11/10, of which down has 1/4 / 0.5
# and up 3/4 / 0.5 / 2; the first
# block's is that through a gain of 1.5; w and b share 2/11/10 through 1.5².
DRAWN = """\
embed: L1ToRMS, mass 0                            radius 0
norm
a < b
sum of
  ─ w: RMSToRMS[polar_express], mass 1            radius 0.00404
  ─ b: VectorRMS, mass 1, sensitivity 0           radius 0.00404
2 times (mass 8, sensitivity ≈ 2.25)
  sum of
    ─ identity, × 0.5
    ┬ {}.up: RMSToRMS[polar_express], in, mass 3  radius 0.01818 … 0.02727
      relu², sensitivity ≈ 2
      {}.down: RMSToRMS[polar_express], mass 1    radius 0.01212 … 0.01818
      × 0.5
head: RMSToLinf, mass 1                           radius 0.009091
× 10"""
FOREIGN = """\
any network of
  ─ 0.weight: L1ToRMS, embedding, mass 1                      radius 0.1429
  ┬ 1.weight_ih: 3 × RMSToRMS[polar_express], hidden, mass 3  radius 0.1429
    3 maps, sensitivity 3
  ┬ 1.weight_hh: 3 × RMSToRMS[polar_express], hidden, mass 3  radius 0.1429
    3 maps, sensitivity 3"""


def test_the_tree_is_drawn_in_the_order_of_the_forward_pass():
    mlp = (
        atom("{}.down", RMSToRMS())
        @ bond("relu²", sensitivity=2, typical=True)
        @ atom("{}.up", RMSToRMS(), mass=3, role="in")
    )
    biased = bond("add", sharpness=0) @ concat(atom("w", RMSToRMS()), atom("b", VectorRMS(), sensitivity=0))
    tree = (
        10
        * atom("head", RMSToLinf())
        @ residual(mlp, 2) ** 2
        @ biased
        @ bond("a < b")
        @ bond("norm")
        @ atom("embed", L1ToRMS(), mass=0)
    )
    assert str(tree) == DRAWN
    radii = ModularNorm.of(tree).radii
    last = 4 / 11 / 10 / 4 / 0.5
    assert (radii["0.down"], radii["1.down"]) == pytest.approx((last / 1.5, last)), "the first block's is the smaller"


def test_a_foreign_models_tree_is_its_weights_side_by_side():
    assert str(metrize(nn.Sequential(nn.Embedding(5, 4), nn.GRUCell(4, 4, bias=False))).tree) == FOREIGN
    assert metrize(nn.Linear(3, 4)).smoothness() is None, "nothing is known of its forward pass"


def test_the_picture_is_the_drawing_with_a_bar_beside_every_weight():
    tree = atom("head", RMSToLinf(), mass=3) @ bond("a < b & c") @ atom("embed", L1ToRMS(), role="in")
    svg = tree.svg()
    root = ET.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    texts = [t.text for t in root.iter(f"{space}text")]
    assert texts == ["embed: L1ToRMS, in, mass 1", "0.25", "a < b & c", "head: RMSToLinf, mass 3", "0.75"]
    assert " ".join(str(t) for t in texts).split() == str(tree).replace("radius", "").split(), "word for word"
    background, *bars = root.iter(f"{space}rect")
    assert [float(b.get("width", "nan")) for b in bars] == pytest.approx([220 / 3, 220], abs=0.1)
    assert int(root.get("height", "0")) == 20 * len(str(tree).splitlines()) + 20 and background.get("fill") == "white"
    assert ET.fromstring(bond("nothing").svg()) is not None


def test_one_embedding_under_two_names_is_no_tie_of_roles():
    """T5's encoder and decoder read one table."""
    model = nn.Module()
    model.shared, model.encoder = nn.Embedding(7, 4), nn.Module()
    model.encoder.embed_tokens = model.shared
    assert list(metrize(model).norms) == ["shared.weight"]
    model.encoder.embed_tokens = nn.Embedding(7, 4)
    model.encoder.embed_tokens.weight = model.shared.weight
    assert list(metrize(model).norms) == ["shared.weight"]


def test_queries_keys_and_values_head_by_head_need_a_rule_where_nothing_tells_the_heads():
    model = nn.Module()
    model.query_key_value = nn.Linear(4, 12, bias=False)
    with pytest.raises(CoverageError, match="query_key_value.weight, 12×4, of a Linear"):
        metrize(model)
    model.num_heads = 2  # type: ignore[assignment]
    assert str(metrize(model).norms["query_key_value.weight"]) == "3 × RMSToRMS[polar_express] in 2 turns"
    norm = metrize(model, rules=[Rule("query_key_value.weight", norm=Blocks(RMSToRMS(), 6), maps=3)])
    assert str(norm.norms["query_key_value.weight"]) == "6 × RMSToRMS[polar_express]"
