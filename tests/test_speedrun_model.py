"""models/ngram.py, and the choice of a model by its name.

Oracles: the full forward for the cache, dictionaries of n-grams for the hash, searches of strings for matches, torch's
FLOP counter.
"""

import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model import GPT, Block
from models import MODELS, ModelConfig, build
from models.generation import Cache, generate
from models.ngram import NgramConfig, NgramGPT, match_rows, ngram_rows, shift
from models.track3 import Track3GPT
from optim import Dualized, metrize
from optim.roles import RoleMasses
from torch.utils.flop_counter import FlopCounterMode
from training.config import Config, ConfigError, from_dict, load
from training.migrate import migrate

from tests.helpers import ROOT

SMALL = NgramConfig(
    n_layer=2,
    n_head=2,
    n_embd=16,
    block_size=12,
    vocab_size=11,
    zero_init=False,
    ngram=3,
    ngram_rows=64,
    mlp_shift=True,
)


def small(**changes: object) -> NgramGPT:
    return NgramGPT(replace(SMALL, **changes), generator=torch.Generator().manual_seed(0)).eval()  # type: ignore[arg-type]


def tokens(*shape: int, vocabulary: int = 11) -> torch.Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(1))


MATCHES = {"match": 2}


@pytest.mark.parametrize("options", [{}, MATCHES])
def test_positions_see_only_the_past(options: dict):
    model, idx = small(**options), tokens(2, 12, vocabulary=2)
    for t in (1, 7, 11):
        changed = idx.clone()
        changed[:, t:] = 2 + (changed[:, t:] + 1) % 2
        a, b = model(idx)[0], model(changed)[0]
        assert torch.allclose(a[:, :t], b[:, :t], atol=1e-6)  # products of other shapes round otherwise
        assert not torch.allclose(a[:, t:], b[:, t:], atol=1e-3)


@pytest.mark.parametrize("prompt", [1, 2, 3, 30])
@pytest.mark.parametrize("options", [{"ngram": 1}, {"mlp_shift": False}, {"ngram": 5}, MATCHES])
def test_cached_generation_is_what_the_whole_forward_would_say(options: dict, prompt: int):
    model, idx = small(block_size=64, **options), tokens(2, prompt, vocabulary=2)
    fast = generate(model, idx, 20, temperature=0, matching=True)
    slow = idx
    for _ in range(20):
        slow = torch.cat((slow, model(slow)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(fast, slow)


def test_generation_goes_past_the_block_with_the_ngrams_of_the_text():
    """Alone, they decide the next token: no attention, no MLP, a table that counts."""
    model = small(n_layer=1, block_size=4, mlp_shift=False, zero_init=True, ngram_rows=4096)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(11, 16, generator=torch.Generator().manual_seed(2)))
        model.get_parameter("ngram_embedding.weight").normal_(generator=torch.Generator().manual_seed(3))
    idx = tokens(3, 9)
    out = generate(model, idx, 30, temperature=0)
    for t in range(9 + 3, 39):  # once the prompt's cut at block_size is out of reach
        assert torch.equal(out[:, t], model(out[:, t - 4 : t])[0][:, -1].argmax(-1))


def test_rows_are_those_of_the_ngrams_wherever_they_stand():
    idx, rows = tokens(40, 30), 2**40  # so many that no two of these n-grams share one
    found = ngram_rows(idx, order=4, rows=rows)
    assert found.shape == (40, 30, 3)
    assert 0 <= int(found.min()) <= int(found.max()) < rows
    by_ngram: dict[tuple[int, ...], set[int]] = {}
    for b in range(40):
        for t in range(30):
            for n in (2, 3, 4):
                padded = (-1,) * 3 + tuple(idx[b].tolist())
                by_ngram.setdefault(padded[t + 4 - n : t + 4], set()).add(int(found[b, t, n - 2]))
    assert all(len(rows_of) == 1 for rows_of in by_ngram.values())
    assert len(set().union(*by_ngram.values())) == len(by_ngram)


@pytest.mark.parametrize("seen", [1, 2, 10])
def test_tokens_in_front_are_part_of_the_ngrams(seen: int):
    idx = tokens(3, 20)
    whole = ngram_rows(idx, order=4, rows=999)
    assert torch.equal(ngram_rows(idx[:, 10:], order=4, rows=999, before=idx[:, 10 - seen : 10])[:, 3:], whole[:, 13:])
    assert torch.equal(ngram_rows(idx[:, 10:], order=4, rows=999, before=idx[:, :10]), whole[:, 10:])


def follower(text: list[int], length: int) -> int:
    """1 + the token that followed the last time that the last `length` tokens stood in the text before; 0 for never."""
    for end in range(len(text) - 1, length - 1, -1):
        if text[end - length : end] == text[-length:]:
            return text[end] + 1
    return 0


def test_a_match_is_what_followed_the_last_time():
    idx, vocabulary = tokens(5, 90, vocabulary=2), 7
    idx[:, 50:] = idx[:, 10:50]  # long ones, too
    found = match_rows(idx, matches=4, vocabulary=vocabulary)
    assert found.shape == (5, 90, 4)
    for b in range(5):
        for t in range(90):
            text = idx[b, : t + 1].tolist()
            assert found[b, t].tolist() == [follower(text, 4 * 2**i) + i * (vocabulary + 1) for i in range(4)]
    assert (found - torch.arange(4) * (vocabulary + 1)).flatten(0, 1).count_nonzero(0).min() > 40


def test_matches_reach_into_the_tokens_in_front():
    idx = tokens(3, 60, vocabulary=2)
    whole = match_rows(idx, matches=3, vocabulary=11)
    assert torch.equal(match_rows(idx[:, -1:], matches=3, vocabulary=11, before=idx[:, :-1]), whole[:, -1:])


def test_in_training_some_sequences_find_no_matches():
    model, idx = small(**MATCHES, match_dropout=0.5), tokens(20, 40, vocabulary=2)
    with torch.no_grad():
        model.get_parameter("match_embedding.weight")[[*range(1, 12), *range(13, 24)]] += 1  # all rows but "never"
    logits = {"found": model(idx)[0], "none": model(idx, cache=Cache(model.config, matching=False))[0]}
    model.train()
    torch.manual_seed(0)
    mixed = model(idx)[0]
    torch.manual_seed(0)
    assert torch.equal(model(idx)[0], mixed)
    same = {k: (v == mixed).flatten(1).all(1) for k, v in logits.items()}
    assert torch.equal(same["none"], ~same["found"])
    assert 4 <= same["none"].sum() <= 16
    for p, kind in ((0.0, "found"), (1.0, "none")):
        model.config.match_dropout = p
        assert torch.equal(model(idx)[0], logits[kind])


def test_without_matching_no_text_repeats_itself():
    model, idx = small(**MATCHES), tokens(1, 40, vocabulary=2)
    with torch.no_grad():
        model.get_parameter("match_embedding.weight")[[*range(1, 12), *range(13, 24)]] += 1  # all rows but "never"
    never = small(**MATCHES)
    assert not torch.equal(model(idx)[0], never(idx)[0])
    unmatched, never_matched = (m(idx, cache=Cache(m.config, matching=False))[0] for m in (model, never))
    assert torch.equal(unmatched, never_matched)
    assert torch.equal(generate(model, idx, 9, temperature=0), generate(never, idx, 9, temperature=0))


@pytest.mark.parametrize("rows", [1000, 4096, 65536])
def test_the_hash_fills_its_rows_at_least_as_chance_would(rows: int):
    """All bigrams of 65 symbols: rows · (1 − exp(−n/rows)) rows in use, but for 4 deviations of balls in bins."""
    a, b = torch.meshgrid(torch.arange(65), torch.arange(65), indexing="ij")
    used = ngram_rows(torch.stack((a.flatten(), b.flatten()), dim=1), order=2, rows=rows)[:, 1, 0].unique().numel()
    filling = 65**2 / rows
    deviation = math.sqrt(rows * (math.exp(-filling) - (1 + filling) * math.exp(-2 * filling)))
    assert used > rows * (1 - math.exp(-filling)) - 4 * deviation


def test_shift_takes_half_of_the_channels_from_the_position_before():
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    y = shift(x, None)
    assert torch.equal(y[..., :3], x[..., :3])
    assert torch.equal(y[:, 1:, 3:], x[:, :-1, 3:])
    assert not y[:, 0, 3:].any()


def test_a_shifted_mlp_reaches_one_position_a_layer():
    model, idx = small(ngram=1), tokens(1, 12)
    with torch.no_grad():
        for block in model.blocks:
            assert isinstance(block, Block)
            block.attention.out.weight.zero_()
    changed = idx.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    moved = (model(idx)[0] != model(changed)[0]).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [4, 5, 6]  # two layers


def test_without_the_options_nothing_is_different():
    """The same parameters, and a table of zeros adds exactly nothing: the first logits are bit for bit those of a model
    without it.
    """
    off, on = small(ngram=1, mlp_shift=False, zero_init=True), small(mlp_shift=False, zero_init=True)
    assert {n for n, _ in on.named_parameters()} - {n for n, _ in off.named_parameters()} == {"ngram_embedding.weight"}
    with torch.no_grad():
        for model in (off, on):
            model.head.weight.copy_(torch.randn(11, 16, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(on(tokens(2, 12))[0], off(tokens(2, 12))[0])
    assert NgramConfig().ngram == 1
    assert not NgramConfig().mlp_shift


def test_the_table_has_its_place_in_the_modular_norm():
    """Depth 1, masses 1 + 2 + 4 + 2 + 1 of 10, logit_scale 10: the table has twice the embedding's share, is read twice
    and steps as far.
    """
    model = small(n_layer=1)
    norm = metrize(model, model.structure(RoleMasses(ngram=2.0)))
    assert set(norm.norms) == {n for n, _ in model.named_parameters()}
    assert (norm.roles["ngram_embedding.weight"], str(norm.norms["ngram_embedding.weight"])) == ("ngram", "L1ToRMS")
    assert norm.masses["ngram_embedding.weight"] == pytest.approx(2)
    half_mlp = 1 / 2 + 1 / 3**0.5
    for name in ("embedding.weight", "ngram_embedding.weight"):
        assert norm.radii[name] == pytest.approx(1 / 10 / 10 / half_mlp)
    assert "ngram_embedding.weight" in norm.receipt()
    assert "shift" in str(norm.tree)


def test_matches_have_their_place_in_the_modular_norm():
    """Masses 1 + 1 + 4 + 2 + 1 + 1 of 10: read twice, as far as the embedding, at half its radius."""
    model = small(n_layer=1, match=2)
    norm = metrize(model, model.structure())
    assert (norm.roles["match_embedding.weight"], str(norm.norms["match_embedding.weight"])) == ("match", "L1ToRMS")
    assert norm.radii["match_embedding.weight"] == pytest.approx(norm.radii["embedding.weight"] / 2)
    zero = NgramGPT(replace(SMALL, zero_init=True, match=2)).get_parameter("match_embedding.weight")
    assert not zero.any()
    assert zero.shape == (2 * 12, 16)


def test_only_rows_of_ngrams_that_were_met_move():
    model, idx = small(), tokens(2, 12)
    table = model.get_parameter("ngram_embedding.weight")
    before = table.detach().clone()
    optimizer = Dualized(model, 0.1, norm=metrize(model))
    loss = model(idx, idx.roll(-1, 1))[1]
    assert loss is not None
    loss.backward()
    optimizer.step()
    moved = (table != before).any(-1).nonzero().flatten()
    assert torch.equal(moved, ngram_rows(idx, order=3, rows=64).unique())


def test_flops_are_what_torch_counts():
    """A look-up is no product."""
    model = small().train()
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = model(tokens(3, 12), tokens(3, 12))[1]
        assert loss is not None
        loss.backward()
    assert counter.get_total_flops() / 36 == pytest.approx(model.flops_per_token(), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"ngram": 0},
            r"^NgramConfig: ngram\n  got: 0\n  allowed: an integer >= 1\n  fix: NgramConfig\(…, ngram=…\)$",
        ),
        (
            {"match": 9},
            r"^NgramConfig: match\n  got: 9\n  allowed: an integer x with 0 <= x <= 8\n  fix: NgramConfig\(…, match=…\)$",
        ),
        (
            {"ngram_rows": 0},
            r"^NgramConfig: ngram_rows\n  got: 0\n  allowed: an integer >= 1\n  fix: NgramConfig\(…, ngram_rows=…\)$",
        ),
    ],
)
def test_impossible_tables_are_refused(changes: dict, text: str):
    with pytest.raises(ValueError, match=text):
        NgramGPT(replace(SMALL, **changes))


# ---- the choice of a model


@pytest.mark.parametrize(
    ("setting", "value", "default"),
    [
        ("ngram", 4, 1),
        ("ngram_rows", 8, 4096),
        ("match", 1, 0),
        ("match_dropout", 0.5, 0.0),
        ("mlp_shift", True, False),
    ],
)
def test_a_plain_gpt_has_no_settings_of_ngrams(setting: str, value: object, default: object):
    text = f"model.{setting}\n  got: {value}\n  allowed: {default} with model.name = 'gpt'\n  fix: --model.name ngram"
    with pytest.raises(ConfigError, match=f"^{text}$"):
        load(["--run.name", "x", f"--model.{setting.replace('_', '-')}", str(value)])
    config = load(["--run.name", "x", f"--model.{setting}", str(value), "--model.name", "ngram"])
    assert getattr(config.model, setting) == value


def test_an_option_does_not_change_the_model_of_a_file(tmp_path: Path):
    (tmp_path / "c.toml").write_text("[model]\nn_layer = 1\n")
    assert load([str(tmp_path / "c.toml")]).model.name == "gpt"
    with pytest.raises(ConfigError, match="model.match\n  got: 2\n  allowed: 0 with model.name = 'gpt'"):
        load([str(tmp_path / "c.toml"), "--model.match", "2"])


@pytest.mark.parametrize("name", MODELS)
def test_the_name_decides_the_class(name: str):
    assert (
        type(build(ModelConfig(1, 1, 8, block_size=4, vocab_size=7, name=name)))
        is {"gpt": GPT, "track3": Track3GPT, "ngram": NgramGPT}[name]
    )


@pytest.mark.parametrize("path", sorted((ROOT / "records").rglob("*.toml")), ids=lambda p: p.stem)
def test_configurations_without_a_name_are_the_models_that_they_were(path: Path):
    """Those of the record book: with n-gram settings "ngram", with the optimization track's "track3", and without
    them, or with their defaults, "gpt"."""
    raw = tomllib.loads(path.read_text())["model"]
    model = from_dict(Config, {"model": raw}).model
    other = "track3" if raw.get("residual", "convex") == "plain" else "gpt"
    assert model.name == ("ngram" if raw.get("ngram", 1) > 1 else other)
    assert {key: getattr(model, key) for key in raw} == raw
    model.check()


TRACK3: dict[str, Any] = {
    "residual": "plain",
    "branch_gains": False,
    "norm_gains": True,
    "rotary": "half",
    "init": "track",
}


@pytest.mark.parametrize("setting", TRACK3)
def test_a_gpt_of_before_with_settings_of_the_track_is_its_fork(setting: str):
    """Files and options of when these were settings of "gpt", which wrote its name or none."""
    raw: dict[str, Any] = {setting: TRACK3[setting]} | ({"residual": "plain"} if setting == "branch_gains" else {})
    for name in ({}, {"name": "gpt"}):
        assert from_dict(Config, {"model": raw | name}).model.name == "track3"
    migrated, lines = migrate({"model": {"name": "gpt", **raw}})
    assert migrated["model"]["name"] == "track3"
    assert lines == ['model.name is "track3", by the other settings of the model']
    for name in ("track3", "ngram"):
        assert migrate({"model": {"name": name, **raw}}) == ({"model": {"name": name, **raw}}, [])
    options = [f"--model.{k.replace('_', '-')}={v}" for k, v in raw.items()]
    assert load(["--run.name", "x", *options]).model.name == "track3"
    with pytest.raises(ValueError, match="with model.name = 'gpt'\n  fix: --model.name track3 or ngram"):
        ModelConfig(n_head=2, n_embd=16, **raw).check()


def test_an_ngram_model_has_the_track_s_settings_too():
    """As before these were a fork's: quickstart.toml turns half of each head's pairs."""
    raw: dict[str, Any] = {"ngram": 2, "rotary": "half", "residual": "plain"}
    assert from_dict(Config, {"model": raw}).model.name == "ngram"
    model = build(ModelConfig(2, 2, 16, block_size=8, vocab_size=11, name="ngram", bias=True, **{**raw, **TRACK3}))
    norm = metrize(model, model.structure())
    assert set(norm.roles.values()) == {"embedding", "ngram", "attention", "mlp", "head", "gain", "bias"}


def test_the_track_s_configuration_is_what_it_says():
    path = ROOT / "configs" / "shakespeare_speedrun.toml"
    config = load([str(path)])
    assert (
        config.train.target_loss
        == tomllib.loads((ROOT / "configs" / "shakespeare_char.toml").read_text())["train"]["target_loss"]
    )
    assert build(replace(config.model, vocab_size=65)).num_params() == 2 * 65 * 64 + 8192 * 64 + 4 * 64**2 + 8 * 64**2
