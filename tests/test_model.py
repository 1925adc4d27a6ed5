"""model.py. Oracles: finite samples for typical gains, the full forward for the cache, torch's FLOP counter."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from config import from_dict, load
from model import ATTENTION_GAIN, GPT, MLP_GAIN, RELU2_SENSITIVITY, GPTConfig, RoleMasses, RoleNorms
from optim import Dualized, Polar, metrize
from tests.helpers import ROOT

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=11, zero_init=False)


def build(**changes: object) -> GPT:
    return GPT(replace(SMALL, **changes), generator=torch.Generator().manual_seed(0)).eval()  # type: ignore[arg-type]


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("residual", ["convex", "plain"])
@pytest.mark.parametrize("depth", [1, 2, 12])
def test_every_parameter_has_its_role_and_the_radii_do_not_shrink_with_depth(residual: str, depth: int):
    model = build(n_layer=depth, residual=residual)
    norm = metrize(model)
    assert set(norm.norms) == {n for n, _ in model.named_parameters()}
    assert {norm.roles[n] for n in norm.norms} == {"embedding", "attention", "mlp", "head"}
    m = RoleMasses()
    assert sum(norm.masses.values()) == pytest.approx(m.embedding + m.attention + m.mlp + m.head)
    share = 1 / (m.embedding + m.attention + m.mlp + m.head)
    last = f"blocks.{depth - 1}.mlp.down.weight"
    # Under the head's logit_scale: the last block's radius times its residual weight is its layer's share of the mass.
    weight = 1 / (2 * depth) if residual == "convex" and depth else 1.0
    typical = 1 / (1 + RELU2_SENSITIVITY * MLP_GAIN) if residual == "plain" else weight
    assert norm.radii[last] * typical * model.config.logit_scale == pytest.approx(share * m.mlp / depth / 2)
    assert norm.radii["head.weight"] * model.config.logit_scale == pytest.approx(share * m.head)


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
    assert (MLP_GAIN * y).square().mean().sqrt().item() == pytest.approx(1, rel=3e-3)
    assert (2 * x.relu()).square().mean().sqrt().item() == pytest.approx(RELU2_SENSITIVITY, rel=3e-3)
    assert pytest.approx(1 / 3) == ATTENTION_GAIN


def test_positions_see_only_the_past():
    model, idx = build(), tokens(2, 12)
    changed = idx.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 11
    a, b = model(idx)[0], model(changed)[0]
    assert torch.allclose(a[:, :7], b[:, :7], atol=1e-6)
    assert not torch.allclose(a[:, 7:], b[:, 7:], atol=1e-3)


def test_rotary_scores_depend_on_distance_alone():
    model, idx = build(n_layer=1), tokens(1, 6)
    assert torch.allclose(model(idx)[0], model(idx, start=5)[0], atol=1e-5)


def test_dropout_is_on_in_training_only():
    model, idx = build(dropout=0.5), tokens(1, 8)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_softcap_bounds_the_logits_and_keeps_their_order():
    plain, capped = build(logit_scale=20.0), build(logit_scale=20.0, logit_softcap=5.0)
    a, b = plain(tokens(1, 8))[0], capped(tokens(1, 8))[0]
    assert a.abs().max() > 5 > b.abs().max()
    assert torch.allclose(b, 5 * torch.tanh(a / 5))


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
    fast = model.generate(idx, 20, temperature=0)
    slow = idx
    for _ in range(20):
        slow = torch.cat((slow, model(slow)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(fast, slow)


def test_generation_goes_past_the_block_and_stays_in_the_tokenizers_vocabulary():
    model = build(block_size=4)
    out = model.generate(tokens(3, 9) % 7, 30, vocab_size=7, top_k=3, generator=torch.Generator().manual_seed(0))
    assert out.shape == (3, 39)
    assert int(out.max()) < 7
    one_layer = build(n_layer=1, block_size=4)
    idx = tokens(1, 9)
    last = one_layer.generate(idx, 5, temperature=0)[:, -5:]
    assert torch.equal(last[:, 0], one_layer(idx[:, -4:])[0][:, -1].argmax(-1)), "one layer sees exactly the last block_size tokens"


def test_flops_are_what_torch_counts():
    model = build(block_size=12).train()
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = model(tokens(3, 12), tokens(3, 12))[1]
        loss.backward()
    # torch counts no gradient of the embedding's input and the whole attention matrix, as the convention does.
    assert counter.get_total_flops() / 36 == pytest.approx(model.flops_per_token(), rel=1e-3)


def test_roles_can_have_other_norms():
    norms = RoleNorms(head="L1ToLinf", mlp="Frobenius").build(Polar("jordan"))
    model = GPT(SMALL, norms)
    found = metrize(model)
    assert str(found.norms["head.weight"]) == "L1ToLinf"
    assert str(found.norms["blocks.1.mlp.up.weight"]) == "Frobenius"
    assert str(found.norms["blocks.1.attention.q.weight"]) == "RMSToRMS[jordan]"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n_head": 3}, "model.n_head: got 3; allowed: a divisor of n_embd = 16"),
        ({"n_head": 16}, r"model.n_embd: got 16; allowed: a multiple of 2 · n_head = 32"),
        ({"dropout": 1.0}, "model.dropout: got 1.0; allowed: 0 <= dropout < 1"),
        ({"vocab_size": 1}, "model.vocab_size: got 1; allowed: 2 or more"),
        ({"n_layer": 0}, "model.n_layer: got 0; allowed: 1 or more"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict, text: str):
    with pytest.raises(ValueError, match=text):
        GPT(replace(SMALL, **changes))


@pytest.mark.parametrize(("name", "params"), [("gpt2_124m", 162_201_600), ("gpt2_350m", 405_012_480), ("gpt2_1.5b", 1_635_532_800)])
def test_gpt2_configurations_have_their_size(name: str, params: int):
    config = load([str(ROOT / f"configs/{name}.toml")])
    with torch.device("meta"):
        model = GPT(config.model)
    assert model.num_params() == params
    assert set(metrize(model).norms) == {n for n, _ in model.named_parameters()}
    assert config.model.vocab_size == 50304
    assert config.train.batch_size * config.model.block_size == 524_288


def test_gpt2_124m_builds_and_steps_within_8_gigabytes():
    import resource

    config = load([str(ROOT / "configs/gpt2_124m.toml")])
    model = GPT(config.model, config.optim.norms.build(Polar(dtype="bfloat16")), torch.Generator().manual_seed(0))
    assert model.num_params() == 162_201_600
    norm = metrize(model, model.structure(config.optim.masses))
    assert len(norm.receipt().splitlines()) == 1 + 12 * 6 + 2
    optimizer = Dualized(model, config.optim.lr, norm=norm, direction=config.optim.direction, beta=config.optim.beta)
    before = model.head.weight.detach().clone()
    idx = torch.randint(50257, (1, 129), generator=torch.Generator().manual_seed(0))
    first = model(idx[:, :-1], idx[:, 1:])[1]
    assert first.item() == pytest.approx(math.log(50304), rel=1e-6), "a zero head predicts uniformly"
    first.backward()
    optimizer.step()
    step = norm.norms["head.weight"].norm(model.head.weight.detach() - before).item()
    assert step == pytest.approx(config.optim.lr * norm.radii["head.weight"], rel=1e-5)
    assert model(idx[:, :-1], idx[:, 1:])[1] < first
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 * 2**20, "kilobytes"


def test_the_model_section_of_a_file_is_the_models_own_config():
    assert from_dict(GPTConfig, {"n_layer": 3}) == replace(GPTConfig(), n_layer=3)
