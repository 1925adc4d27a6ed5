"""model.py, models/track3.py and models/generation.py.

Oracles: finite samples for typical gains, the full forward for the cache, torch's FLOP counter.
"""

import math
import re
import sys
from dataclasses import replace

import pytest
import torch
from model import GPT, MLP, Block, GPTConfig
from models import ModelConfig, build_model_and_norm
from models import build as build_named
from models.generation import Cache, generate
from models.track3 import Track3Config, Track3GPT
from optim import Dualized, metrize
from optim.modular import Module, atom, bond, concat, residual
from optim.norms import MaxEntry, VectorRMS
from optim.polar import Polar
from optim.roles import RoleMasses, RoleNorms
from torch.utils.flop_counter import FlopCounterMode
from training.config import Config, load

from tests.helpers import ROOT, SOAK

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=11, zero_init=False)
SMALL_TRACK3 = Track3Config(**vars(SMALL))


def build(**changes: object) -> GPT:
    return GPT(replace(SMALL, **changes), generator=torch.Generator().manual_seed(0)).eval()  # type: ignore[arg-type]


def build_track3(**changes: object) -> Track3GPT:
    return Track3GPT(replace(SMALL_TRACK3, **changes), generator=torch.Generator().manual_seed(0)).eval()  # type: ignore[arg-type]


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("residual", ["convex", "plain"])
@pytest.mark.parametrize("depth", [1, 2, 12])
def test_every_parameter_has_its_role_and_masses_add_up(residual: str, depth: int):
    model = build_track3(
        n_layer=depth, residual=residual, **dict.fromkeys(("bias", "norm_gains", "embedding_norm"), residual == "plain")
    )
    norm = metrize(model)
    assert set(norm.norms) == {n for n, _ in model.named_parameters()}
    totals = {
        role: sum(norm.masses[n] for n in norm.norms if norm.roles[n] == role) for role in set(norm.roles.values())
    }
    assert totals == pytest.approx({role: getattr(RoleMasses(), role) for role in totals})
    assert set(totals) == (
        {"embedding", "attention", "mlp", "head"} | ({"gain", "bias"} if residual == "plain" else set())
    )


def test_convex_radii_hardly_depend_on_depth():
    """(1 − 1/2L) + μ/2L per half keeps the whole within exp(μ − 1): no radius may drift by more from depth 1 to 64."""
    first = {d: metrize(build(n_layer=d)).radii["blocks.0.attention.q.weight"] for d in (2, 8, 64)}
    last = {d: metrize(build(n_layer=d)).radii[f"blocks.{d - 1}.mlp.down.weight"] for d in (2, 8, 64)}
    for radii in (first, last):
        assert max(radii.values()) / min(radii.values()) < math.exp(GPT.relu2_sensitivity * GPT.mlp_gain - 1)


@pytest.mark.parametrize("zero_init", [False, True])
def test_weights_start_at_norm_one_or_zero(zero_init: bool):
    model = build(zero_init=zero_init)
    norm = metrize(model)
    for name, p in model.named_parameters():
        expected = 0 if zero_init and name.endswith(("out.weight", "down.weight", "head.weight")) else 1
        assert norm.norms[name].norm(p.detach()).item() == pytest.approx(expected, abs=1e-5), name
    assert torch.equal(
        GPT(SMALL, generator=torch.Generator().manual_seed(5)).head.weight,
        GPT(SMALL, generator=torch.Generator().manual_seed(5)).head.weight,
    )


def test_the_gains_are_the_gaussian_values_they_claim():
    x = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x.relu().square()
    assert (GPT.mlp_gain * y).square().mean().sqrt().item() == pytest.approx(1, rel=3e-3)
    assert (2 * x.relu()).square().mean().sqrt().item() == pytest.approx(GPT.relu2_sensitivity, rel=3e-3)
    assert pytest.approx(1 / 3) == GPT.attention_gain


def reference(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """The forward pass once more, from docs/theory.md §2: explicit loops over heads and positions, complex rotations,
    nothing folded.
    """
    c = model.config
    L, H, K = c.n_layer, c.n_head, c.n_embd // c.n_head
    w = {n: p.detach().double() for n, p in model.named_parameters()}

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def turn(x: torch.Tensor, t: int) -> torch.Tensor:
        angle = t * 10_000.0 ** (-torch.arange(K // 2).double() / (K // 2))
        z = torch.complex(x[: K // 2], x[K // 2 :]) * torch.polar(torch.ones(K // 2).double(), angle)
        return torch.cat((z.real, z.imag))

    def attend(x: torch.Tensor, at: str) -> torch.Tensor:
        out = torch.zeros_like(x)
        q, k, v = (x @ w[f"{at}.{n}.weight"].mT for n in "qkv")
        for h in range(H):
            s = slice(h * K, (h + 1) * K)
            qs, ks = ([turn(norm(y[t, s]), t) for t in range(len(x))] for y in (q, k))
            for t in range(len(x)):
                cosines = torch.stack([qs[t] @ ks[u] / K for u in range(t + 1)])
                out[t, s] = (c.attention_scale * cosines).softmax(0) @ v[: t + 1, s]
        return (out / 3) @ w[f"{at}.out.weight"].mT

    def mlp(x: torch.Tensor, at: str) -> torch.Tensor:
        return ((2 / 3) ** 0.5 * (x @ w[f"{at}.up.weight"].mT).clamp(min=0) ** 2) @ w[f"{at}.down.weight"].mT

    rows = []
    for row in idx:
        x = w["embedding.weight"][row]
        for i in range(L):
            for half, name in ((attend, "attention"), (mlp, "mlp")):
                f = half(norm(x), f"blocks.{i}.{name}")
                x = (1 - 1 / (2 * L)) * x + f / (2 * L) if getattr(c, "residual", "convex") == "convex" else x + f
        rows.append(c.logit_scale * (norm(x) @ w["head.weight"].mT))
    return torch.stack(rows)


@pytest.mark.parametrize("residual", [None, "convex", "plain"])
def test_the_forward_pass_is_the_one_in_the_theory(residual: str | None):
    """Of the compact GPT, and of the fork whose residual stream can be another."""
    options, idx = {"attention_scale": 6.0, "logit_scale": 3.0}, tokens(2, 7)
    model = build(**options) if residual is None else build_track3(residual=residual, **options)
    assert torch.allclose(model(idx)[0].double(), reference(model, idx), atol=1e-4)


def test_radii_of_a_convex_model_by_hand():
    """Depth 1, masses 1, 4, 2, 1 of 8, logit_scale 10: the target 1 goes down the tree by theory.md §2's two rules."""
    norm = metrize(build(n_layer=1))
    mlp, attention = 2 / 3**0.5, 1.0  # sensitivities: √2 · √(2/3); 3 · ⅓
    half_mlp = 1 / 2 + mlp / 2
    assert norm.radii["head.weight"] == pytest.approx(1 / 8 / 10)
    assert norm.radii["blocks.0.mlp.down.weight"] == pytest.approx(1 / 8 / 10 / (1 / 2))
    assert norm.radii["blocks.0.mlp.up.weight"] == pytest.approx(1 / 8 / 10 / (1 / 2) / mlp)
    assert norm.radii["blocks.0.attention.out.weight"] == pytest.approx(1 / 8 / 10 / half_mlp / (1 / 2))
    assert norm.radii["blocks.0.attention.q.weight"] == pytest.approx(1 / 8 / 10 / half_mlp / (1 / 2) / (1 / 3))
    assert norm.radii["embedding.weight"] == pytest.approx(1 / 8 / 10 / half_mlp / (1 / 2 + attention / 2))


OPTIONS = {
    "gpt": {},
    "bias": {"bias": True, "logit_softcap": 15.0},
    "track3": {"bias": True, "norm_gains": True, "embedding_norm": True, "residual": "plain", "branch_gains": False},
}


@pytest.mark.parametrize(
    "masses", [RoleMasses(), RoleMasses(0.3, attention=3.7, mlp=1.9, head=0.7, gain=0.7, bias=0.0)]
)
@pytest.mark.parametrize("depth", [1, 3, 12, 13])
@pytest.mark.parametrize("case", OPTIONS)
def test_masses_and_radii_are_those_that_were_counted_by_hand(case: str, depth: int, masses: RoleMasses):
    """Bit for bit: until structures counted their own weights, a layer had 4 matrices of attention, 2 of an MLP and 6
    biases, and the tree was written once with these numbers."""
    make = build_track3 if case == "track3" else build
    model = make(n_layer=depth, **OPTIONS[case])
    c, norms = model.config, model.norms
    bias, gain = masses.bias / (6 * depth + 1), masses.gain / (2 * depth + 2)

    def linear(name: str, role: str, mass: float, kind: str = "", beside: object = None) -> Module:
        weight = atom(f"{name}.weight", norms[kind or role], role=role, mass=mass)
        other = atom(f"{name}.bias", beside or VectorRMS(), role="bias", mass=bias, sensitivity=0)  # type: ignore[arg-type]
        return bond("add", sharpness=0) @ concat(weight, other) if c.bias else weight

    def normed(module: Module | None, name: str) -> Module:
        norm = bond("rms_norm", typical=True)
        norm = atom(f"{name}.weight", MaxEntry(), role="gain", mass=gain) @ norm if case == "track3" else norm
        return norm if module is None else module @ norm

    def half(module: Module) -> Module:
        if case != "track3":
            return residual(module, 2 * depth)
        return bond("x + f(x)", sensitivity=1 / (1 + module.sensitivity), typical=True) @ concat(
            bond("identity"), module
        )

    attend, relu = (1 / 3, math.sqrt(2 / 3)) if case != "track3" else (1.0, 1.0)
    share = masses.attention / 4 / depth
    q, k, v = (linear(f"blocks.{{}}.attention.{n}", "attention", share, "qkv") for n in "qkv")
    attention = linear("blocks.{}.attention.out", "attention", share) @ (attend * bond("attention")) @ concat(q, k, v)
    up, down = (linear(f"blocks.{{}}.mlp.{n}", "mlp", masses.mlp / 2 / depth) for n in ("up", "down"))
    mlp = down @ (relu * bond("relu²", sensitivity=math.sqrt(2))) @ up
    attention, mlp = half(normed(attention, "blocks.{}.attention_norm")), half(normed(mlp, "blocks.{}.mlp_norm"))
    embedding: Module = atom("embedding.weight", norms["embedding"], role="embedding", mass=masses.embedding)
    embedding = normed(None, "embedding_norm") @ embedding if case == "track3" else embedding
    head = c.logit_scale * linear("head", "head", masses.head, beside=MaxEntry())
    tree = normed(head, "head_norm") @ (mlp @ attention) ** depth @ embedding
    found = {leaf.name: (leaf.mass, radius) for leaf, radius in model.structure(masses).radii()}
    assert found == {leaf.name: (leaf.mass, radius) for leaf, radius in tree.radii()}


class GLU(MLP):
    """down(relu(gate x) · up x): a third matrix."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.gate = torch.nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)

    def forward(self, x_BTD: torch.Tensor, past: object = None) -> torch.Tensor:
        return self.down(self.gate(x_BTD).relu() * self.up(x_BTD))


class GLUGPT(GPT):
    mlp_gain = math.sqrt(2)  # rms(relu(x) y) = √½ for x, y ~ N(0, 1)

    def make_block(self) -> Block:
        block = super().make_block()
        block.mlp = GLU(self.config)
        return block

    def mlp_structure(self) -> Module:
        up, gate, down = (self.linear(f"blocks.{{}}.mlp.{n}", "mlp") for n in ("up", "gate", "down"))
        return down @ (self.mlp_gain * bond("relu(a) · b", sensitivity=math.sqrt(0.5), typical=True)) @ concat(up, gate)


@pytest.mark.parametrize("bias", [False, True])
def test_a_third_matrix_changes_no_number_elsewhere(bias: bool):
    """A gated MLP: the twenty lines above. Every weight has a place, every role the mass that it had."""
    model = GLUGPT(replace(SMALL, bias=bias), generator=torch.Generator().manual_seed(0))
    norm, masses = metrize(model), RoleMasses()
    assert {n for n, _ in model.named_parameters()} == set(norm.norms)
    of_role = {r: [m for n, m in norm.masses.items() if norm.roles[n] == r] for r in set(norm.roles.values())}
    assert {r: sum(m) for r, m in of_role.items()} == pytest.approx({r: getattr(masses, r) for r in of_role})
    assert [len(of_role[r]) for r in ("attention", "mlp")] == [8, 6] and len(of_role.get("bias", [])) == 15 * bias
    assert all(len(set(m)) == 1 for m in of_role.values()), "in equal parts"
    x, y = torch.randn(2, 4_000_000, generator=torch.Generator().manual_seed(0))
    assert (GLUGPT.mlp_gain * x.relu() * y).square().mean().sqrt().item() == pytest.approx(1, rel=3e-3)
    optimizer, losses = Dualized(model, 0.3, norm=norm), []
    for _ in range(5):
        loss = model(tokens(4, 12), tokens(4, 12).roll(-1, 1))[1]
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1


def test_a_role_without_a_mass_is_refused():
    with pytest.raises(
        ValueError, match="the role of a weight\n  got: 'gate'\n  allowed: embedding, ngram, match, att"
    ):
        RoleMasses().share(atom("w", VectorRMS(), role="gate"))


@pytest.mark.parametrize("composition", ["modular", "max"])
def test_one_function_builds_the_model_and_its_norm(composition: str):
    config = Config()
    config.model = ModelConfig(**vars(SMALL_TRACK3) | {"name": "track3", "norm_gains": True})
    config.optim.composition, config.optim.norms.per_head = composition, True  # type: ignore[assignment]
    config.optim.masses.head, config.optim.polar = 3.0, Polar("jordan")
    model, norm = build_model_and_norm(config, torch.Generator().manual_seed(4))
    norms = config.optim.norms.build(config.optim.polar, 2)
    same = Track3GPT(config.model, norms, torch.Generator().manual_seed(4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))
    whole = metrize(same, same.structure(config.optim.masses))
    assert norm.radii == (whole if composition == "modular" else whole.unweighted()).radii
    assert str(norm.norms["blocks.0.attention.q.weight"]) == "2 × RMSToRMS[jordan]"
    with torch.device("meta"):
        empty, again = build_model_and_norm(config)
    assert all(p.is_meta for p in empty.parameters()) and again.radii == norm.radii


def test_the_model_is_short_and_its_structure_is_its_end():
    """DESIGN.md: at most 260 lines; what gives weights their place is one piece."""
    text = (ROOT / "model.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 260
    body, end = text.split("    # ---- the modular structure")
    assert "head @ (mlp @ attention) ** L @ embedding" in end
    assert not re.search(r"\b(atom|bond|concat|residual)\(", body), "all of it is there"
    assert not re.search(r"nn\.|Tensor|torch", end), "and nothing else"


def test_top_k_leaves_the_k_likeliest():
    model, idx = build(), tokens(64, 1)
    logits = model(idx)[0][:, -1]
    drawn = generate(model, idx, 1, top_k=2, temperature=5.0, generator=torch.Generator().manual_seed(0))[:, -1]
    ranks = (logits > logits.gather(1, drawn[:, None])).sum(1)
    assert set(ranks.tolist()) == {0, 1}


def test_positions_see_only_the_past():
    model, idx = build(), tokens(2, 12)
    changed = idx.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 11
    a, b = model(idx)[0], model(changed)[0]
    assert torch.allclose(a[:, :7], b[:, :7], atol=1e-6)
    assert not torch.allclose(a[:, 7:], b[:, 7:], atol=1e-3)


def test_rotary_scores_depend_on_distance_alone():
    model, idx = build(n_layer=1), tokens(1, 6)
    later = Cache(SMALL)
    later.length = 5
    assert torch.allclose(model(idx)[0], model(idx, cache=later)[0], atol=1e-5)


def test_dropout_is_on_in_training_only_in_attention_and_on_the_residual():
    model, x = build(dropout=0.5), torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    rope = model.rotary(torch.arange(8))
    block = model.blocks[0]
    assert isinstance(block, Block)
    attention = block.attention
    for module in (attention, block):
        assert torch.equal(module(x, rope), module(x, rope))
    attention.train()
    assert not torch.equal(attention(x, rope), attention(x, rope))
    attention.eval()
    block.training = True  # the residual's dropout alone
    assert not torch.equal(block(x, rope), block(x, rope))


def test_softcap_bounds_the_logits_and_keeps_their_order():
    plain, capped = build(logit_scale=20.0), build(logit_scale=20.0, logit_softcap=5.0)
    a, b = plain(tokens(1, 8))[0], capped(tokens(1, 8))[0]
    assert a.abs().max() > 5 > b.abs().max()
    assert torch.allclose(b, 5 * torch.tanh(a / 5))


@pytest.mark.parametrize("softcap", ["tanh", "rsqrt"])
def test_the_fork_s_softcaps_are_what_they_say(softcap: str):
    plain, capped = build_track3(logit_scale=20.0), build_track3(logit_scale=20.0, logit_softcap=5.0, softcap=softcap)
    x = plain(tokens(1, 8))[0] / 5
    expected = 5 * (torch.tanh(x) if softcap == "tanh" else x / (1 + x**2).sqrt())
    assert torch.allclose(capped(tokens(1, 8))[0], expected, atol=1e-5)


def test_targets_of_minus_one_do_not_count():
    model, idx = build(), tokens(2, 12)
    y = idx.roll(-1)
    y[0, 3:] = -1
    logits, loss = model(idx, y)
    chosen = y >= 0
    expected = -logits.log_softmax(-1)[chosen].gather(1, y[chosen][:, None]).mean()
    assert torch.allclose(loss, expected)


@pytest.mark.parametrize("prompt", [1, 5, 30])
def test_cached_generation_is_what_the_whole_forward_would_say(prompt: int):
    model, idx = build(block_size=64), tokens(2, prompt)
    fast = generate(model, idx, 20, temperature=0)
    slow = idx
    for _ in range(20):
        slow = torch.cat((slow, model(slow)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(fast, slow)


def test_generation_goes_past_the_block_and_stays_in_the_tokenizers_vocabulary():
    model = build(block_size=4)
    out = generate(model, tokens(3, 9) % 7, 30, vocab_size=7, top_k=3, generator=torch.Generator().manual_seed(0))
    assert out.shape == (3, 39)
    assert int(out.max()) < 7


@pytest.mark.parametrize("window", [1, 2, 5])
def test_one_layer_sees_exactly_the_last_block_size_tokens(window: int):
    model, idx = build(n_layer=1, block_size=window), tokens(2, 9)
    fast = generate(model, idx, 12, temperature=0)
    for _ in range(12):
        idx = torch.cat((idx, model(idx[:, -window:])[0][:, -1:].argmax(-1)), dim=1)
    assert torch.equal(fast, idx)


def test_tiny_temperatures_are_greedy_and_do_not_overflow():
    model, idx = build(), tokens(1, 3)
    assert torch.equal(generate(model, idx, 8, temperature=1e-45), generate(model, idx, 8, temperature=0))


def test_flops_are_what_torch_counts():
    model = build(block_size=12).train()
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = model(tokens(3, 12), tokens(3, 12))[1]
        loss.backward()
    # torch counts no gradient of the embedding's input and the whole attention matrix, as the convention does.
    assert counter.get_total_flops() / 36 == pytest.approx(model.flops_per_token(), rel=1e-3)


def test_roles_can_have_other_norms():
    norms = RoleNorms(head="L1ToLinf", mlp="Frobenius").build(Polar("jordan"), 2)
    model = GPT(SMALL, norms)
    found = metrize(model)
    assert str(found.norms["head.weight"]) == "L1ToLinf"
    assert str(found.norms["blocks.1.mlp.up.weight"]) == "Frobenius"
    assert str(found.norms["blocks.1.attention.q.weight"]) == "RMSToRMS[jordan]"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n_head": 3}, r"model.n_head\n  got: 3\n  allowed: a divisor of n_embd = 16"),
        ({"n_head": 16}, r"model.n_embd\n  got: 16\n  allowed: a multiple of 2 · n_head = 32"),
        ({"n_head": 0}, r"^GPTConfig: n_head\n  got: 0\n  allowed: an integer >= 1\n  fix: GPTConfig\(…, n_head=…\)$"),
        ({"dropout": 1.0}, r"GPTConfig: dropout\n  got: 1.0\n  allowed: a number x with 0 <= x < 1\n  fix: "),
        ({"vocab_size": 1}, r"GPTConfig: vocab_size\n  got: 1\n  allowed: an integer >= 2 or left out\n  fix: "),
        ({"n_layer": 0}, r"GPTConfig: n_layer\n  got: 0\n  allowed: an integer >= 1\n  fix: "),
        ({"logit_softcap": 0.0}, r"GPTConfig: logit_softcap\n  got: 0.0\n  allowed: a finite number > 0 or left out\n"),
        (
            {"init": "zero"},
            r'Track3Config: init\n  got: \'zero\'\n  allowed: "norm", "gpt2", "fan_in", "track"\n  fix: ',
        ),
    ],
)
def test_impossible_shapes_are_refused(changes: dict, text: str):
    with pytest.raises(ValueError, match=text):
        GPT(replace(SMALL_TRACK3 if "init" in changes else SMALL, **changes))


@pytest.mark.parametrize(
    ("name", "params"), [("gpt2_124m", 162_201_600), ("gpt2_350m", 405_012_480), ("gpt2_1.5b", 1_635_532_800)]
)
def test_gpt2_configurations_have_their_size(name: str, params: int):
    config = load([str(ROOT / f"configs/{name}.toml")])
    with torch.device("meta"):
        model = GPT(config.model)
    assert model.num_params() == params
    assert set(metrize(model).norms) == {n for n, _ in model.named_parameters()}
    assert config.model.vocab_size == 50304
    assert config.train.batch_size * config.model.block_size == 524_288


@pytest.mark.soak
def test_gpt2_124m_builds_and_steps_within_8_gigabytes():
    """All of its 12 layers in `make soak`, else 2 of them: 92 M parameters, most in the embedding and the head."""
    import resource

    config = load([str(ROOT / "configs/gpt2_124m.toml")])
    config.model.n_layer = layers = 12 if SOAK else 2
    model = GPT(
        config.model,
        config.optim.norms.build(Polar(dtype="bfloat16"), config.model.n_head),
        torch.Generator().manual_seed(0),
    )
    assert model.num_params() == 162_201_600 - (12 - layers) * 7_077_888
    norm = metrize(model, model.structure(config.optim.masses))
    assert len(norm.receipt().splitlines()) == 1 + layers * 6 + 2
    optimizer = Dualized(model, config.optim.lr, norm=norm, direction=config.optim.direction, beta=config.optim.beta)
    before = model.head.weight.detach().clone()
    idx = torch.randint(50257, (1, 129), generator=torch.Generator().manual_seed(0))
    first = model(idx[:, :-1], idx[:, 1:])[1]
    assert first.item() == pytest.approx(math.log(50304), rel=1e-6), "a zero head predicts uniformly"
    first.backward()
    optimizer.step()
    step = norm.norms["head.weight"].norm(model.head.weight.detach() - before).item()
    assert isinstance(config.optim.lr, float)
    assert step == pytest.approx(config.optim.lr * norm.radii["head.weight"], rel=1e-5)
    assert model(idx[:, :-1], idx[:, 1:])[1] < first
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit < 8 * 10**9 * model.num_params() / 162_201_600


def track3(w: dict[str, torch.Tensor], idx: torch.Tensor, layers: int, heads: int) -> torch.Tensor:
    """The optimization track's function, written down from its script's names: w has its parameters' names; one
    position, one head at a time.
    """
    K = w["blocks.0.attn.q.weight"].shape[0] // heads

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

    def turned(x: torch.Tensor, t: int) -> torch.Tensor:
        angle = torch.cat((t * (1 / 1024) ** torch.linspace(0, 1, K // 4).double(), torch.zeros(K // 4).double()))
        z = torch.complex(x[: K // 2], x[K // 2 :]) * torch.polar(torch.ones(K // 2).double(), -angle)
        return torch.cat((z.real, z.imag))

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"].mT + w[f"{name}.bias"]

    rows = []
    for row in idx:
        x = norm(w["embed.weight"][row]) * w["norm1.gains"]
        for i in range(layers):
            y = norm(x) * w[f"blocks.{i}.norm1.gains"]
            q, k, v = (linear(y, f"blocks.{i}.attn.{n}") for n in "qkv")
            mixed = torch.zeros_like(v)
            for h in range(heads):
                s = slice(h * K, (h + 1) * K)
                qs, ks = ([turned(norm(z[t, s]), t) for t in range(len(y))] for z in (q, k))
                for t in range(len(y)):
                    scores = 0.12 * torch.stack([qs[t] @ ks[u] for u in range(t + 1)])
                    mixed[t, s] = scores.softmax(0) @ v[: t + 1, s]
            x = x + linear(mixed, f"blocks.{i}.attn.proj")
            y = norm(x) * w[f"blocks.{i}.norm2.gains"]
            x = x + linear(linear(y, f"blocks.{i}.mlp.fc").clamp(min=0) ** 2, f"blocks.{i}.mlp.proj")
        logits = linear(norm(x) * w["norm2.gains"], "proj")
        rows.append(15 * logits / (logits.square() + 15**2).sqrt())
    return torch.stack(rows)


TRACK3 = (
    ("embedding_norm.weight", "norm1.gains"),
    ("head_norm.weight", "norm2.gains"),
    ("attention_norm.weight", "norm1.gains"),
    ("mlp_norm.weight", "norm2.gains"),
    ("embedding.", "embed."),
    ("head.", "proj."),
    ("attention.out", "attn.proj"),
    ("attention.", "attn."),
    ("mlp.up", "mlp.fc"),
    ("mlp.down", "mlp.proj"),
)


def track3_name(name: str) -> str:
    for ours, theirs in TRACK3:
        if ours in name:
            return name.replace(ours, theirs)
    raise AssertionError(name)


def test_track3_config_is_the_tracks_function_and_shapes():
    config = load([str(ROOT / "configs" / "track3_124m.toml")]).model
    with torch.device("meta"):
        shapes = {track3_name(n): tuple(p.shape) for n, p in build_named(config).named_parameters()}
    block = {f"attn.{n}.{k}": s for n in ("q", "k", "v", "proj") for k, s in (("weight", (768, 768)), ("bias", (768,)))}
    block |= {
        "mlp.fc.weight": (3072, 768),
        "mlp.fc.bias": (3072,),
        "mlp.proj.weight": (768, 3072),
        "mlp.proj.bias": (768,),
    }
    block |= {"norm1.gains": (768,), "norm2.gains": (768,)}
    outside = {
        "embed.weight": (50304, 768),
        "proj.weight": (50304, 768),
        "proj.bias": (50304,),
        "norm1.gains": (768,),
        "norm2.gains": (768,),
    }
    assert shapes == outside | {f"blocks.{i}.{n}": s for i in range(12) for n, s in block.items()}

    small = replace(config, n_layer=2, n_embd=256, n_head=2, block_size=8, vocab_size=19)  # heads of width 128 as there
    model = build_named(small, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for p in model.parameters():  # none at 0 or 1, where an error could hide
            p.copy_(
                torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
                * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.5)
            )
    idx = torch.randint(19, (2, 8), generator=torch.Generator().manual_seed(1))
    expected = track3({track3_name(n): p.detach() for n, p in model.named_parameters()}, idx, 2, 2)
    assert expected.abs().max() > 1, "a softcap that bends"
    assert torch.allclose(model(idx)[0], expected, atol=1e-6)  # the rotation's angles are float32


def test_the_tracks_initialization():
    model = build_track3(n_embd=64, init="track", bias=True, norm_gains=True)
    for name, p in model.named_parameters():
        if name.endswith(("out.weight", "down.weight", "head.weight", "bias")):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            expected = 1.0 if name == "embedding.weight" else (0.33 / p.shape[1]) ** 0.5
            assert p.std().item() == pytest.approx(expected, rel=0.1), name  # 700 to 16384 draws
