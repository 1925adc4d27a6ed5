"""Models, trainers, wrappers and base optimizers that know nothing of us.

Oracles: the same run without them, the SVD, torch's own optimizers.
"""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers  # loads its parts when they are used
from optim import Dualized, NonFiniteError, Normalized, Rule, metrize
from optim.errors import CoverageError
from optim.norms import RMSToRMS
from optim.polar import Polar
from optim.views import Blocks, Transposed
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from tests.helpers import ranks

V, T, D = 32, 8, 16
LR = 0.3
COMMON: dict[str, Any] = dict(vocab_size=V, bos_token_id=0, eos_token_id=0)
NO_DROPOUT: dict[str, Any] = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
ROUNDING = 1e-12  # of float64, for one step of weights of order 1


def gpt2(seed: int = 0, *, tied: bool = False) -> "transformers.GPT2LMHeadModel":
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **COMMON, **NO_DROPOUT, n_positions=T, n_embd=D, n_layer=1, n_head=2, tie_word_embeddings=tied
        )
    )


def llama(seed: int = 0) -> "transformers.LlamaForCausalLM":
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(
        hidden_size=D, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, **sizes, max_position_embeddings=T))


def tokens(seed: int = 0, batch: int = 4) -> Tensor:
    """Counting upwards from random starts: quickly learned."""
    start = torch.randint(V, (batch, 1), generator=torch.Generator().manual_seed(seed))
    return (start + torch.arange(T)) % V


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(input_ids=x, labels=x).loss


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, tokens(seed))
    loss.backward()
    optimizer.step()
    return loss.item()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 30) -> tuple[float, float]:
    losses = [take_step(model, optimizer, seed) for seed in range(steps)]
    return losses[0], losses[-1]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def buffers(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """State by parameter name."""
    named = [(n, p) for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)]
    return {n: dict(optimizer.state[p]) for n, p in named}


def same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    """Bit for bit, dtypes included."""
    one, two = buffers(a), buffers(b)
    settings = [
        [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in o.param_groups] for o in (a, b)
    ]
    return (
        settings[0] == settings[1]
        and one.keys() == two.keys()
        and all(one[n].keys() == two[n].keys() for n in one)
        and all(t.dtype == two[n][k].dtype and torch.equal(t, two[n][k]) for n, s in one.items() for k, t in s.items())
    )


def placed(model: nn.Module, *rules: Rule) -> dict[str, tuple[str, str]]:
    """{name: (role, norm)}, the polar schedule's name left out."""
    norm = metrize(model, rules=rules)
    return {n: (norm.roles[n], str(norm.norms[n]).replace("[polar_express]", "")) for n in norm.norms}


# ---- placing


def test_gpt2_is_placed_without_a_rule():
    layer = "transformer.h.0"
    vector, gain, matrix = ("bias", "VectorRMS"), ("gain", "MaxEntry"), ("hidden", "Transposed(RMSToRMS)")
    assert placed(gpt2()) == {
        "transformer.wte.weight": ("embedding", "L1ToRMS"),
        "transformer.wpe.weight": ("embedding", "L1ToRMS"),
        **{f"{layer}.ln_{i}.weight": gain for i in (1, 2)},
        **{f"{layer}.ln_{i}.bias": vector for i in (1, 2)},
        f"{layer}.attn.c_attn.weight": ("hidden", "Transposed(3 × RMSToRMS)"),
        f"{layer}.attn.c_attn.bias": ("bias", "3 × VectorRMS"),
        **{f"{layer}.{m}.weight": matrix for m in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
        **{f"{layer}.{m}.bias": vector for m in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
        "transformer.ln_f.weight": gain,
        "transformer.ln_f.bias": vector,
        "lm_head.weight": ("head", "RMSToLinf"),
    }


def test_llama_is_placed_without_a_rule():
    layer = "model.layers.0"
    maps = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    norms = [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"]
    assert placed(llama()) == {
        "model.embed_tokens.weight": ("embedding", "L1ToRMS"),
        **{f"{layer}.{m}.weight": ("hidden", "RMSToRMS") for m in maps},
        **{f"{m}.weight": ("gain", "MaxEntry") for m in norms},
        "lm_head.weight": ("head", "RMSToLinf"),
    }
    assert not metrize(llama()).notes, "nothing is guessed"


class Inside(nn.Module):
    """A model whose get_output_embeddings cannot be seen."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Tensor) -> Any:
        return self.inner(**inputs)


def test_a_hidden_head_is_guessed_and_named_by_a_rule():
    model = Inside(gpt2())
    assert (
        "inner.lm_head.weight: taken for a head: 32 outputs, as many as an embedding has rows" in metrize(model).notes
    )
    assert placed(model, Rule("inner.lm_head.weight", role="head")) == {
        f"inner.{n}": place for n, place in placed(gpt2()).items()
    }


class Maps(nn.Module):
    """Queries, keys and values of d: fused as GPT-2 does, or in three linear maps of the same weights."""

    def __init__(self, fused: "transformers.pytorch_utils.Conv1D | None" = None) -> None:
        super().__init__()
        if fused is None:
            self.c_attn = transformers.pytorch_utils.Conv1D(3 * D, D)
        else:
            self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
            for i, m in enumerate((self.q, self.k, self.v)):
                own = slice(i * D, (i + 1) * D)
                m.weight.data, m.bias.data = fused.weight.data[:, own].T.clone(), fused.bias.data[own].clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.c_attn(x) if hasattr(self, "c_attn") else torch.cat([self.q(x), self.k(x), self.v(x)], -1)


@pytest.mark.parametrize("schedule", ["exact", "polar_express"])
def test_a_fused_weight_steps_as_its_three_maps_do(schedule: str):
    torch.manual_seed(0)
    fused = Maps()
    split = Maps(fused.c_attn).double()
    fused.double()
    norm = RMSToRMS(Polar(schedule))
    one = Dualized(fused, LR, norm=metrize(fused, rules=[Rule("c_attn.weight", norm=Transposed(Blocks(norm, 3)))]))
    three = Dualized(split, LR, norm=metrize(split, rules=[Rule("*.weight", norm=norm)]))
    for seed in range(3):
        x = torch.randn(64, D, generator=torch.Generator().manual_seed(seed)).double()
        for model, optimizer in ((fused, one), (split, three)):
            optimizer.zero_grad()
            model(x).sin().square().sum().backward()
            optimizer.step()
    for i, m in enumerate((split.q, split.k, split.v)):
        own = slice(i * D, (i + 1) * D)
        assert (fused.c_attn.weight[:, own].T - m.weight).abs().max() < ROUNDING
        assert (fused.c_attn.bias[own] - m.bias).abs().max() < ROUNDING


def test_a_step_of_c_attn_is_the_polar_factor_of_each_block_of_its_transpose():
    model: Any = gpt2().double()
    c_attn = model.transformer.h[0].attn.c_attn
    optimizer = Dualized(
        model,
        LR,
        norm=metrize(model, rules=[Rule("*.c_attn.weight", norm=Transposed(Blocks(RMSToRMS(Polar("exact")), 3)))]),
        direction="nesterov",
    )
    before = c_attn.weight.detach().clone()
    take_step(model, optimizer)
    radii = optimizer.norm.radii
    assert radii["transformer.h.0.attn.c_attn.weight"] == pytest.approx(radii["transformer.h.0.attn.c_proj.weight"]), (
        "a share for each map"
    )
    for moved, g in zip((before - c_attn.weight).split(D, dim=1), c_attn.weight.grad.split(D, dim=1), strict=True):
        U, _, Vh = torch.linalg.svd(g.T)
        rank = torch.linalg.matrix_rank(g, rtol=1e-9).item()  # a layer norm's outputs have one linear relation
        assert rank in (D - 1, D)
        polar = U[:, :rank] @ Vh[:rank]
        assert (moved.T - LR * radii["transformer.h.0.attn.c_attn.weight"] * polar).abs().max() < 1e-9


def test_tied_gpt2_is_refused_and_told_how_to_untie_it():
    with pytest.raises(CoverageError) as error:
        Dualized(gpt2(tied=True), LR)
    assert str(error.value) == (
        "lm_head.weight shares its storage with transformer.wte.weight\n"
        "  got: one tensor in two roles\n"
        "  allowed: one role a tensor, or one norm by rule\n"
        "  fix: untie them (transformers: tie_word_embeddings=False in the config, before the model is built), "
        "or metrize(model, rules=[Rule('transformer.wte.weight', norm='RMSToRMS')])"
    )


def test_a_model_without_a_head_has_none_whatever_its_sizes():
    """As many positions as channels: c_attn.weight (D, 3D) is no map to positions."""
    torch.manual_seed(0)
    model = transformers.GPT2Model(transformers.GPT2Config(**COMMON, n_positions=D, n_embd=D, n_layer=1, n_head=2))
    assert set(metrize(model).roles.values()) == {"embedding", "hidden", "gain", "bias"}


def test_queries_with_fewer_keys_and_values_in_one_weight_are_placed_by_the_attentions_own_numbers():
    """Blocks of as many rows as columns would be queries, and keys with values."""
    sizes: dict[str, Any] = dict(
        hidden_size=D, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**COMMON, **sizes, pad_token_id=0))
    name = "model.layers.0.self_attn.qkv_proj.weight"
    fused = ("hidden", "(16 + 2 × 8) × RMSToRMS")
    assert placed(model)[name] == placed(model, Rule(name, norm=Blocks(RMSToRMS(), (D, D // 2, D // 2))))[name] == fused


@pytest.mark.parametrize("fix", ["untied", "by rule"])
def test_tied_gpt2_trains_after_either_fix(fix: str):
    model = gpt2(tied=fix == "by rule")
    rules = [Rule("transformer.wte.weight", norm="RMSToRMS")] if fix == "by rule" else []
    first, last = train(model, Dualized(model, 2.0, norm=metrize(model, rules=rules), beta=0.8))
    assert last < first - 0.5
    assert (model.lm_head.weight is model.transformer.wte.weight) == (fix == "by rule")


def test_llama_trains():
    model = llama()
    first, last = train(model, Dualized(model, 2.0, beta=0.8))
    assert last < first - 0.5


# ---- adapters


# peft asks transformers for a name that it has given up.
FORGETFUL = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@FORGETFUL
def test_only_adapters_are_placed_and_trained():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    optimizer = Dualized(model, 4.0)
    assert all(".lora_A." in n or ".lora_B." in n for n in optimizer.norm.norms) and len(optimizer.norm.norms) == 4
    frozen = sum(not p.requires_grad for p in model.parameters())
    assert f"note: {frozen} frozen parameters left out\n" in optimizer.norm.receipt()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    first, last = train(model, optimizer, 20)
    assert last < first
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(optimizer.norm.norms), "names are the model's, and nothing else moves"


@FORGETFUL
def test_tied_weights_that_are_frozen_need_no_fix():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(gpt2(tied=True), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    assert set(metrize(model).roles.values()) == {"hidden"}


@FORGETFUL
def test_adapters_of_an_unknown_kind_are_refused_until_a_rule_places_them():
    from peft import LoHaConfig, get_peft_model

    model = get_peft_model(llama(), LoHaConfig(r=4, target_modules=["q_proj"]))
    name = "base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a.default"
    with pytest.raises(CoverageError, match=rf"^no place for 4 weights\n(.|\n)*{name}, 16×4, of a ParameterDict"):
        Dualized(model, LR)
    norm = metrize(model, rules=[Rule("*.hada_w*.default", role="hidden")])
    assert set(norm.roles.values()) == {"hidden"} and len(norm.norms) == 4
    train(model, Dualized(model, LR, norm=norm), 2)


# ---- wrappers


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": lambda m: torch.compile(m, backend="eager"),  # type: ignore[dict-item, return-value]
    "DDP": nn.parallel.DistributedDataParallel,
    "FSDP": lambda m: FullyShardedDataParallel(m, use_orig_params=True, device_id=torch.device("cpu")),
}


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings(
    "ignore:FSDP is switching to use `NO_SHARD`:UserWarning", "ignore:FSDP.state_dict_type:FutureWarning"
)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("saved_under_it", [True, False])
def test_state_passes_between_a_wrapped_model_and_a_plain_one(wrapper: str, saved_under_it: bool):
    a, b = gpt2(), gpt2()
    wrapped = WRAPPERS[wrapper](a)
    if wrapper == "compile":
        wrapped.forward = a.forward  # type: ignore[method-assign] - its names matter here, not its speed
    pair = [(wrapped, Dualized(wrapped, LR)), (b, Dualized(b, LR))]
    assert pair[0][1].param_groups[0]["param_names"] == [n for n, _ in b.named_parameters()]
    (saver, saving), (loader, loading) = pair if saved_under_it else pair[::-1]
    for seed in range(2):
        take_step(saver, saving, seed)
    for p, q in zip(loader.parameters(), saver.parameters(), strict=True):
        p.data.copy_(q.data)
    loading.load_state_dict(saving.state_dict())
    assert same_state(saving, loading)
    assert take_step(saver, saving, 2) == take_step(loader, loading, 2)
    assert same(weights(saver), weights(loader)) and same_state(saving, loading)


@pytest.mark.usefixtures("alone")
def test_a_sharded_model_keeps_its_names_and_takes_a_plain_models_state():
    plain, sharded = gpt2(), gpt2()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    saving, loading = Dualized(plain, LR), Dualized(sharded, LR)
    take_step(plain, saving)
    loading.load_state_dict(saving.state_dict())
    whole = {
        n: {k: getattr(t, "full_tensor", lambda t=t: t)() for k, t in s.items()} for n, s in buffers(loading).items()
    }
    assert whole.keys() == buffers(saving).keys()
    assert all(torch.equal(whole[n]["momentum"], s["momentum"]) for n, s in buffers(saving).items())


def _data_parallel(rank: int, world: int) -> tuple[str, list[Tensor], list[Tensor], list[int]]:
    """What ZeroRedundancyOptimizer meets; weights after DDP's way and after ours, and numbers of state in each."""
    a, b = small().double(), small().double()
    wrapped = nn.parallel.DistributedDataParallel(a)
    with pytest.raises(CoverageError) as refusal:
        ZeroRedundancyOptimizer(a.parameters(), optimizer_class=Dualized, lr=LR)
    norm = metrize(a, rules=[Rule("4.weight", role="head")])
    reduced, local = Dualized(wrapped, LR, norm=norm), Dualized(b, LR, norm=norm, grads="local")
    for seed in range(3):
        x = tokens(seed * world + rank)
        for model, optimizer in ((wrapped, reduced), (b, local)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
            optimizer.step()
    # Means over columns apart, which all ranks have that have rows of a weight.
    sizes = [
        sum(t.numel() for state in o.state.values() for k, t in state.items() if k != "columns")
        for o in (reduced, local)
    ]
    return str(refusal.value), weights(a), weights(b), sizes


def test_what_zero_redundancy_optimizer_is_told_shards_the_state_and_trains_as_ddp():
    one, two = ranks(2, _data_parallel)
    for text, by_ddp, by_ours, _ in (one, two):
        assert text.startswith("Dualized of a list of tensors\n  got: tensors without names\n")
        assert 'in place of DDP with ZeroRedundancyOptimizer: Dualized(model, ..., grads="local") on the bare' in text
        assert max((p - q).abs().max() for p, q in zip(by_ddp, by_ours, strict=True)) < ROUNDING
    assert same(one[2], two[2])
    (whole, first), (again, second) = one[3], two[3]
    assert first + second == whole == again and min(first, second) > 0


@pytest.mark.parametrize("lazy", ["LazyLinear", "LazyConv2d", "LazyBatchNorm1d"])
def test_a_lazy_module_is_refused_until_it_has_seen_an_input(lazy: str):
    sizes = {"LazyLinear": (3,), "LazyConv2d": (3, 2), "LazyBatchNorm1d": ()}[lazy]
    model = nn.Sequential(getattr(nn, lazy)(*sizes))
    for place in (metrize, Dualized, lambda m: Dualized(m.named_parameters(), norm=metrize(nn.Linear(2, 2)))):
        with pytest.raises(
            CoverageError, match=r"^0.weight\n  got: a parameter of a lazy module(.|\n)*fix: call the model once"
        ):
            place(model)
    model(torch.ones(2, 2, 2, 2) if lazy == "LazyConv2d" else torch.ones(2, 2))
    assert Dualized(model).norm.norms.keys() == {"0.weight", "0.bias"}


NOTHING: dict[str, tuple[Callable[[], Any], str]] = {
    "no weights": (lambda: Dualized(nn.ReLU()), "no parameters"),
    "an empty list": (lambda: Dualized([], norm=metrize(nn.Linear(2, 2))), "no parameters"),
    "an empty group": (lambda: Dualized([{"params": []}], norm=metrize(nn.Linear(2, 2))), "no parameters"),
    "all frozen": (lambda: Dualized(small().requires_grad_(False)), "6 parameters, all frozen"),
}


@pytest.mark.parametrize("what", NOTHING)
def test_nothing_to_train_is_refused(what: str):
    make, got = NOTHING[what]
    with pytest.raises(CoverageError, match=rf"^Dualized\n  got: {got}\n(.|\n)*fix: "):
        make()


def test_state_loads_into_reordered_parameters():
    a, b = gpt2(), gpt2()
    saving, loading = Dualized(a, LR), Dualized(list(b.named_parameters())[::-1], LR, norm=metrize(b))
    for seed in range(2):
        take_step(a, saving, seed)
    b.load_state_dict(a.state_dict())
    loading.load_state_dict(saving.state_dict())
    assert same_state(saving, loading)
    take_step(a, saving, 2)
    take_step(b, loading, 2)
    assert same(weights(a), weights(b))


# ---- saved and loaded

SETTINGS: dict[str, dict[str, Any]] = {
    "default": dict(lr=LR),
    "lr=auto": dict(lr="auto"),
    "tensor lr": dict(lr=torch.tensor(LR)),
    "soap": dict(lr=LR, direction="soap", refresh_every=3),
    "masters": dict(lr=LR, master_weights=True, momentum_dtype="float32"),
    "masters, lr=auto": dict(lr="auto", master_weights=True),
    "bfloat16 momentum": dict(lr=LR, momentum_dtype="bfloat16"),
}


TRAINED: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "Dualized": lambda m: Dualized(m, LR),
    "Dualized, lr=auto": lambda m: Dualized(m, "auto"),
    "Normalized Adam": lambda m: Normalized(torch.optim.Adam(m.named_parameters()), m, LR),
}


def build(settings: str, seed: int = 0) -> tuple[nn.Module, Dualized]:
    model = gpt2(seed).bfloat16() if "masters" in settings else gpt2(seed)
    return model, Dualized(model, **copy.deepcopy(SETTINGS[settings]))


def assert_twins(
    a: tuple[nn.Module, torch.optim.Optimizer], b: tuple[nn.Module, torch.optim.Optimizer], steps: int = 3
) -> None:
    """Equal now and after further steps, bit for bit."""
    for seed in range(steps):
        assert same(weights(a[0]), weights(b[0])) and same_state(a[1], b[1]), seed
        assert take_step(*a, 10 + seed) == take_step(*b, 10 + seed)


@pytest.mark.parametrize("settings", SETTINGS)
def test_torch_save_and_load_without_pickled_objects_change_nothing(settings: str, tmp_path: Path):
    a, b = build(settings), build(settings, seed=1)
    train(*a, 4)
    torch.save({"model": a[0].state_dict(), "optimizer": a[1].state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    b[0].load_state_dict(state["model"])
    b[1].load_state_dict(state["optimizer"])
    assert_twins(a, b)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize("settings", SETTINGS)
def test_distributed_checkpoints_load_into_a_fresh_optimizer(settings: str, tmp_path: Path):
    a, b = build(settings), build(settings, seed=1)
    train(*a, 4)
    model_state, optimizer_state = get_state_dict(*a)
    state_dict_saver.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
    before = weights(b[0])
    model_state, optimizer_state = get_state_dict(*b)  # makes the state by a step with lr = 0
    assert same(before, weights(b[0])), "a no-op"
    state = {"model": model_state, "optimizer": optimizer_state}
    state_dict_loader.load(state, checkpoint_id=tmp_path)
    set_state_dict(*b, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert_twins(a, b)


@pytest.mark.parametrize("settings", [*SETTINGS, "Normalized Adam"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_model_and_optimizer_train_on_alike_and_apart(settings: str, how: str):
    model = gpt2()
    a = build(settings) if settings in SETTINGS else (model, TRAINED[settings](model))
    train(*a, 4)
    b = copy.deepcopy(a) if how == "deepcopy" else pickle.loads(pickle.dumps(a))
    assert_twins(a, b)
    take_step(*a)
    assert not same(weights(a[0]), weights(b[0]))


def trainer(
    folder: Path, seed: int, make: Callable[[nn.Module], torch.optim.Optimizer], steps: int
) -> "transformers.Trainer":
    model = gpt2(seed)
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6)
    settings = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=3,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = [{"input_ids": x, "labels": x} for x in tokens(batch=24)]
    return transformers.Trainer(model, settings, train_dataset=data, optimizers=(optimizer, scheduler))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", TRAINED.values(), ids=TRAINED)
def test_a_resumed_trainer_ends_where_an_uninterrupted_one_does(
    make: Callable[[nn.Module], torch.optim.Optimizer], tmp_path: Path
):
    whole = trainer(tmp_path, 0, make, 6)
    whole.train()
    resumed = trainer(tmp_path, 1, make, 6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(whole.model), weights(resumed.model))  # type: ignore[arg-type]


def test_accelerate_saves_and_loads_its_state(tmp_path: Path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    a: Any = accelerator.prepare(*build("default"))
    train(a[0], a[1], 3)
    accelerator.save_state(str(tmp_path))
    kept = weights(a[0])
    losses = [take_step(a[0], a[1], seed) for seed in range(3)]
    accelerator.load_state(str(tmp_path))
    assert same(weights(a[0]), kept)
    assert [take_step(a[0], a[1], seed) for seed in range(3)] == losses


# ---- loops


def test_scaled_losses_step_alike_and_an_overflow_is_left_out_without_an_error():
    a, b = build("default"), build("default")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def scaled_step(seed: int, factor: float = 1.0) -> None:
        b[1].zero_grad()
        scaler.scale(loss_of(b[0], tokens(seed)) * factor).backward()
        scaler.step(b[1])
        scaler.update()

    for seed in range(3):
        take_step(*a, seed)
        scaled_step(seed)
    assert max((p - q).abs().max() for p, q in zip(*map(weights, (a[0], b[0])), strict=True)) < 1e-6
    before = weights(b[0])
    scaled_step(3, math.inf)
    assert same(weights(b[0]), before) and scaler.get_scale() == 2.0**9
    scaled_step(4)
    b[1].check_finite()
    assert not same(weights(b[0]), before), "training goes on"


def schedulers(optimizer: torch.optim.Optimizer) -> dict[str, Callable[[], Any]]:
    lr = torch.optim.lr_scheduler
    return {
        "LambdaLR": lambda: lr.LambdaLR(optimizer, lambda step: 0.5**step),
        "MultiplicativeLR": lambda: lr.MultiplicativeLR(optimizer, lambda step: 0.5),
        "StepLR": lambda: lr.StepLR(optimizer, 2, 0.1),
        "MultiStepLR": lambda: lr.MultiStepLR(optimizer, [1, 3]),
        "ConstantLR": lambda: lr.ConstantLR(optimizer, total_iters=3),
        "LinearLR": lambda: lr.LinearLR(optimizer),
        "ExponentialLR": lambda: lr.ExponentialLR(optimizer, 0.5),
        "PolynomialLR": lambda: lr.PolynomialLR(optimizer, 6),
        "CosineAnnealingLR": lambda: lr.CosineAnnealingLR(optimizer, 4),
        "CosineAnnealingWarmRestarts": lambda: lr.CosineAnnealingWarmRestarts(optimizer, 3),
        "CyclicLR": lambda: lr.CyclicLR(optimizer, LR / 10, LR, step_size_up=3),
        "OneCycleLR": lambda: lr.OneCycleLR(optimizer, LR, total_steps=6),
        "OneCycleLR, no momentum": lambda: lr.OneCycleLR(optimizer, LR, total_steps=6, cycle_momentum=False),
        "ReduceLROnPlateau": lambda: lr.ReduceLROnPlateau(optimizer, patience=0),
        "ChainedScheduler": lambda: lr.ChainedScheduler(
            [lr.ConstantLR(optimizer, 0.1, 2), lr.ExponentialLR(optimizer, 0.9)]
        ),
        "SequentialLR": lambda: lr.SequentialLR(
            optimizer, [lr.LinearLR(optimizer, 0.1, 1.0, 2), lr.CosineAnnealingLR(optimizer, 4)], [2]
        ),
        "SWALR": lambda: torch.optim.swa_utils.SWALR(optimizer, LR / 10, anneal_epochs=3),
    }


SCHEDULERS = schedulers(torch.optim.SGD([torch.zeros(1)], 0.1))


def test_the_schedulers_below_are_all_of_torchs():
    names = set(torch.optim.lr_scheduler.__all__) - {"LRScheduler"}
    assert names <= set(SCHEDULERS)


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["Dualized", "Normalized"])
def test_a_scheduler_sets_the_modular_norm_of_every_step(name: str, kind: str):
    model = gpt2().double()
    norm = metrize(
        model,
        rules=[
            Rule("*.c_attn.weight", norm=Transposed(Blocks(EXACT, 3))),
            Rule("*.h.*.c_*.weight", norm=Transposed(EXACT)),
        ],
    )
    optimizer = (
        Dualized(model, LR, norm=norm, direction="nesterov")
        if kind == "Dualized"
        else Normalized(torch.optim.Adam(model.named_parameters()), norm, LR)
    )
    scheduler = schedulers(optimizer)[name]()
    metric = [1.0] if name == "ReduceLROnPlateau" else []
    seen = set()
    for seed in range(5):
        lr = optimizer.param_groups[0]["lr"]
        seen.add(round(lr, 9))
        before = dict(zip(norm.norms, weights(model), strict=True))
        take_step(model, optimizer, seed)
        moved = {n: before[n] - p.detach() for n, p in model.named_parameters()}
        assert norm.norm(moved).item() == pytest.approx(lr, rel=1e-3, abs=1e-12)
        scheduler.step(*metric)
    assert len(seen) > 1, "it acts"


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_a_scheduler_that_cycles_momentum_cycles_beta(name: str):
    """As torch.optim.SGD's momentum, and with the weights that beta set by hand leads to."""
    peer = torch.optim.SGD([torch.zeros(1)], LR, momentum=0.5)
    theirs = schedulers(peer)[name]()
    (a, one), (b, two) = build("default"), build("default")
    scheduler = schedulers(one)[name]()
    betas = []
    for seed in range(5):
        two.param_groups[0].update(lr=peer.param_groups[0]["lr"], beta=peer.param_groups[0]["momentum"])
        assert take_step(a, one, seed) == take_step(b, two, seed)
        assert same(weights(a), weights(b))
        betas.append(one.param_groups[0]["beta"])
        assert betas[-1] == peer.param_groups[0]["momentum"]
        peer.step()
        theirs.step()
        scheduler.step()
    assert len(set(betas)) >= 4
    one.step()
    assert "momentum" not in one.param_groups[0], "beta is its one name"


def test_a_cycle_of_momentum_resumes_where_it_was():
    def one_cycle() -> tuple[nn.Module, Dualized, Any]:
        model, optimizer = build("default")
        return model, optimizer, schedulers(optimizer)["OneCycleLR"]()

    whole, saved, resumed = one_cycle(), one_cycle(), one_cycle()
    for model, optimizer, scheduler in (whole, saved):
        for seed in range(3):
            take_step(model, optimizer, seed)
            scheduler.step()
    for ours, theirs in zip(resumed, saved, strict=True):
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for seed in range(3, 5):
        assert take_step(*whole[:2], seed) == take_step(*resumed[:2], seed)
        for _, _, scheduler in (whole, resumed):
            scheduler.step()
    assert same_state(whole[1], resumed[1]) and same(weights(whole[0]), weights(resumed[0]))


EXACT = RMSToRMS(Polar("exact"))


def test_accumulated_batches_are_one_large_batch():
    a, b = llama().double(), llama().double()
    one, many = Dualized(a, LR), Dualized(b, LR)
    for seed in range(3):
        x = tokens(seed, batch=8)
        loss_of(a, x).backward()
        for part in x.split(2):
            (loss_of(b, part) / 4).backward()
        for optimizer in (one, many):
            optimizer.step()
            optimizer.zero_grad()
    assert max((p - q).abs().max() for p, q in zip(weights(a), weights(b), strict=True)) < ROUNDING


def test_a_compiled_model_trains_as_the_plain_one():
    a, b = llama(), llama()
    one, two = Dualized(a, LR), Dualized(b, LR)
    compiled = torch.compile(b, backend="eager")
    for seed in range(3):
        assert take_step(compiled, two, seed) == pytest.approx(take_step(a, one, seed), rel=1e-4)  # type: ignore[arg-type]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D), nn.LayerNorm(D), nn.Tanh(), nn.Linear(D, V, bias=False))


def test_a_compiled_step_gives_the_eager_steps_numbers_and_reports_a_gradient_that_is_not_finite():
    torch._dynamo.reset()
    a, b = small(), small()
    norm = metrize(a, rules=[Rule("4.weight", role="head")])
    one, two = Dualized(a, LR, norm=norm), Dualized(b, LR, norm=norm)
    compiled = torch.compile(two.step, backend="eager")
    for seed in range(12):
        for model, optimizer in ((a, one), (b, two)):
            optimizer.zero_grad()
            x = tokens(seed)
            nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
        one.step()
        compiled()
        assert same(weights(a), weights(b)), seed
        for optimizer in (one, two):
            optimizer.param_groups[0]["lr"] *= 0.9
    two.zero_grad()
    (b(tokens()).square().mean() * math.nan).backward()
    compiled()
    with pytest.raises(
        NonFiniteError, match=r"the gradient of 0.weight and of 5 more was not finite in call 13 of step\(\)"
    ):
        two.check_finite()


# ---- any base optimizer

Base = Callable[[nn.Module], torch.optim.Optimizer]
BASES: dict[str, Base] = {
    name: (lambda m, name=name, kw=kw: getattr(torch.optim, name)(m.named_parameters(), **kw))
    for name, kw in {
        "SGD": dict(lr=0.1, momentum=0.9, nesterov=True),
        "Adam": dict(lr=1e-3, amsgrad=True),
        "AdamW": dict(lr=1e-3, weight_decay=0),
        "NAdam": dict(),
        "RAdam": dict(),
        "Adamax": dict(),
        "RMSprop": dict(momentum=0.9, centered=True),
        "Adagrad": dict(),
        "Adadelta": dict(),
        "Rprop": dict(),
    }.items()
}
STEP = 1e-3  # size() against the exact norm: it is fast, and from below


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_any_base_steps_by_lr_times_the_radius(make: Base):
    model = gpt2().double()
    norm = metrize(model)
    optimizer = Normalized(make(model), norm, LR)
    first = last = 0.0
    for seed in range(6):
        before = dict(zip(norm.norms, weights(model), strict=True))
        last = take_step(model, optimizer, seed)
        first = first or last
        for name, p in model.named_parameters():
            size = norm.norms[name].norm(before[name] - p.detach()).item()
            assert size == pytest.approx(LR * norm.radii[name], rel=STEP), name
    assert last < first


def test_a_base_that_decays_is_refused():
    model = gpt2()
    with pytest.raises(
        ValueError,
        match=r"got: a base with weight_decay 0.01\n(.|\n)*fix: weight_decay=0 in the base, and Normalized\(…, weight_decay=…\)",
    ):
        Normalized(torch.optim.AdamW(model.named_parameters()), model, LR)


@pytest.mark.parametrize("make", [BASES["Adam"], BASES["SGD"], BASES["Adagrad"]], ids=["Adam", "SGD", "Adagrad"])
def test_the_state_of_a_base_survives(make: Base, tmp_path: Path):
    a, b = gpt2(), gpt2(1)
    one, two = Normalized(make(a), a, LR), Normalized(make(b), b, LR)
    train(a, one, 3)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    b.load_state_dict(a.state_dict())
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_twins((a, one), (b, two))


@pytest.mark.parametrize("make", [BASES["Adam"], BASES["SGD"]], ids=["Adam", "SGD"])
def test_a_base_sees_no_gradient_that_is_not_finite(make: Base):
    model = gpt2()
    optimizer = Normalized(make(model), model, LR)
    train(model, optimizer, 2)
    before, state = weights(model), copy.deepcopy(buffers(optimizer))
    optimizer.zero_grad()
    loss_of(model, tokens()).backward()
    model.lm_head.weight.grad[3, 4] = math.nan  # type: ignore[index]
    with pytest.raises(NonFiniteError, match="the gradient of lm_head.weight is not finite; the step was not taken"):
        optimizer.step()
    assert same(weights(model), before)
    for name, held in buffers(optimizer).items():
        assert all(
            torch.equal(v, state[name][k]) if isinstance(v, Tensor) else v == state[name][k] for k, v in held.items()
        )
    optimizer.zero_grad()
    train(model, optimizer, 1)
    assert not same(weights(model), before), "training goes on"
