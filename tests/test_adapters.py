"""optim/adapters.py: every kind of adapter of PEFT that is placed, and those that are refused.

Oracles: the layers' own forward passes, and training.
"""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from optim import Dualized, metrize
from torch import Tensor, nn

from tests.test_foreign import FORGETFUL, gpt2, llama, take_step, tokens

pytestmark = [FORGETFUL, pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")]
ATTENTION = "base_model.model.model.layers.0.self_attn.q_proj"
MLP = "base_model.model.model.layers.0.mlp.down_proj"
EMBEDDING = "base_model.model.model.embed_tokens"
TARGETS = ["q_proj", "down_proj"]
MAP, GAINS = ("hidden", "RMSToRMS"), ("gain", "MaxEntry")
CAUSAL: dict[str, Any] = dict(task_type="CAUSAL_LM", num_virtual_tokens=3)

# Each method: its configuration, and where its weights belong.
ADAPTERS: dict[str, tuple[Callable[[], Any], dict[str, tuple[str, str]]]] = {
    "IA3": (
        lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
        {f"{ATTENTION}.ia3_l.default": GAINS, f"{MLP}.ia3_l.default": GAINS},
    ),
    "AdaLoRA": (
        lambda: peft.AdaLoraConfig(init_r=6, target_r=3, total_step=20, tinit=2, tfinal=2, target_modules=TARGETS),
        {
            f"{layer}.lora_{k}.default": GAINS if k == "E" else MAP
            for layer in (ATTENTION, MLP)
            for k in ("A", "B", "E")
        },
    ),
    "VeRA": (
        lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
        {f"{ATTENTION}.vera_lambda_{k}.default": GAINS for k in ("b", "d")},
    ),
    "LoRA of an embedding": (
        lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens"]),
        {
            f"{EMBEDDING}.lora_embedding_A.default": ("embedding", "Transposed(L1ToRMS)"),
            f"{EMBEDDING}.lora_embedding_B.default": MAP,
        },
    ),
    "DoRA": (
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
        {f"{ATTENTION}.lora_{k}.default.weight": MAP for k in ("A", "B")}
        | {f"{ATTENTION}.lora_magnitude_vector.default.weight": GAINS},
    ),
    "trainable tokens": (
        lambda: peft.TrainableTokensConfig(token_indices=[1, 2, 3]),
        {f"{EMBEDDING}.trainable_tokens_delta.default": ("embedding", "L1ToRMS")},
    ),
    "prompt tuning": (
        lambda: peft.PromptTuningConfig(**CAUSAL),
        {"prompt_encoder.default.embedding.weight": ("embedding", "L1ToRMS")},
    ),
    "prefix tuning": (
        lambda: peft.PrefixTuningConfig(**CAUSAL),
        {"prompt_encoder.default.embedding.weight": ("embedding", "L1ToRMS")},
    ),
    "layer norms": (
        lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
        {"base_model.model.model.layers.0.input_layernorm.ln_tuning_layers.default.weight": GAINS},
    ),
}


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_is_placed_by_itself_and_trains(method: str):
    configuration, places = ADAPTERS[method]
    model = peft.get_peft_model(llama(), configuration())
    norm = metrize(model)
    assert {n: (norm.roles[n], str(norm.norms[n]).replace("[polar_express]", "")) for n in norm.norms} == places
    assert [note for note in norm.notes if "frozen" not in note and "no head" not in note] == []
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Dualized(model, 1.0, norm=norm, beta=0.8)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=20)
    losses = []
    for step in range(20):
        losses.append(take_step(model, optimizer, seed=0))
        if method == "AdaLoRA":
            model.base_model.update_and_allocate(step)
        schedule.step()
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    pruned = {n for n in places if ".lora_E." in n}  # AdaLoRA sets those that it leaves out to 0, as they began
    assert moved <= set(places) <= moved | pruned


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("configuration", "shape"),
    [
        (peft.LoraConfig(r=4, target_modules=["conv"], use_dora=True), (1, 8, 1, 1)),
        (peft.IA3Config(target_modules=["conv"], feedforward_modules=[]), (1, 8, 1, 1)),
        (peft.IA3Config(target_modules=["conv"], feedforward_modules=["conv"]), (1, 3, 1, 1)),
    ],
)
def test_the_gains_of_a_convolutions_adapter_are_one_number_a_channel(configuration: Any, shape: tuple[int, ...]):
    norm = metrize(peft.get_peft_model(Images(), configuration))
    (name,) = (n for n, role in norm.roles.items() if role == "gain")
    assert norm.shapes[name] == shape and str(norm.norms[name]) == "MaxEntry"


def test_a_row_of_an_embeddings_adapter_is_a_token():
    """A step of it moves the tokens of the batch alone, each by the same length."""
    model: Any = peft.get_peft_model(llama(), ADAPTERS["LoRA of an embedding"][0]())
    A = model.base_model.model.model.embed_tokens.lora_embedding_A["default"]
    B = model.base_model.model.model.embed_tokens.lora_embedding_B["default"]
    nn.init.normal_(A, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(B, generator=torch.Generator().manual_seed(1))
    optimizer = Dualized(model, 1.0, direction="nesterov")
    x, before = tokens(batch=1), A.detach().clone()
    seen = x[0, :-1]  # nothing is predicted from the last
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()
    moved = (A - before).norm(dim=0)
    assert set(moved.nonzero().flatten().tolist()) == set(seen.tolist())
    lengths = moved[seen] / A.shape[0] ** 0.5
    assert torch.allclose(lengths, torch.full_like(lengths, optimizer.norm.radii[next(iter(optimizer.norm.norms))]))


def test_gpt2s_transposed_weights_have_adapters_of_the_same_places():
    settings: dict[str, Any] = dict(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"])
    model = peft.get_peft_model(gpt2(), peft.IA3Config(**settings, fan_in_fan_out=True))
    assert set(metrize(model).roles.values()) == {"gain"}
    assert {tuple(p.shape) for p in model.parameters() if p.requires_grad} == {(48, 1), (1, 16)}
