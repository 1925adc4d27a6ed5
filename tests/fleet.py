"""Small random models of every kind: configurations of `transformers`, and the modules of torch.nn.

Each entry of FLEET builds a model and a batch with which it has a loss. Sizes are as distinct as a family allows, so
that a shape says which dimension it is. `python -m tests.fleet [name…]` judges them and prints a table.
"""

import contextlib
import dataclasses
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import optim
import optim.norms
import optim.views
import torch
import transformers
from optim import Dualized, ModularNorm, Rule, metrize
from optim.errors import CoverageError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

B, T, V, D = 4, 8, 53, 24  # sequences, tokens of each, vocabulary, width
HEADS, GROUPS, INNER, EXPERTS = 4, 2, 40, 3
CLASSES, SIDE = 5, 32  # of a classifier; pixels of an image's side

Batch = dict[str, Tensor]
Entry = Callable[[], tuple[nn.Module, Batch]]
FLEET: dict[str, Entry] = {}

# Sizes by the names that configurations give them. A family takes those that it has.
SIZES: dict[str, Any] = {
    "vocab_size": V,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim"), D),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_head"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), GROUPS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), INNER),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 2 * T),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 20),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 28),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "tie_word_embeddings": False,
    "use_cache": False,
    **dict.fromkeys(("dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"), 0.0),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "activation_dropout"), 0.0),
    **dict.fromkeys(("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "dropout_rate", "drop_connect_rate"), 0.0),
    **dict.fromkeys(("feat_proj_dropout", "final_dropout", "hidden_dropout_rate", "attn_dropout"), 0.0),
    **dict.fromkeys(("summary_first_dropout", "classifier_dropout", "classifier_dropout_prob"), 0.0),
    "image_size": SIDE,
    "patch_size": 8,
    "num_labels": CLASSES,
}


def config_of(kind: str, **sizes: Any) -> Any:
    """The configuration of a family: SIZES where it has such a field, and its own."""
    family = CONFIG_MAPPING[kind]
    fields = {f.name for f in dataclasses.fields(family)} | set(family.attribute_map)
    for f in dataclasses.fields(family):  # a unit that is never open says nothing
        if "act" in f.name and isinstance(f.default, str) and f.default.startswith("relu"):
            sizes = {f.name: "gelu"} | sizes
    own = {family.attribute_map.get(k, k) for k in sizes}
    common = {k: v for k, v in SIZES.items() if k in fields | {"tie_word_embeddings", "num_labels"}}
    common = {k: v for k, v in common.items() if family.attribute_map.get(k, k) not in own}
    return family(**{k: v for k, v in (common | sizes).items() if v is not ...})


def class_of(name: str) -> Any:
    return getattr(transformers, name)


def tokens(seed: int = 0, length: int = T) -> Tensor:
    return torch.randint(3, V, (B, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(seed: int = 1) -> Tensor:
    return torch.arange(B) % CLASSES


def add(name: str, architecture: str, kind: str, batch: Callable[[], Batch], **sizes: Any) -> None:
    """Put a configuration in the fleet."""

    def entry() -> tuple[nn.Module, Batch]:
        torch.manual_seed(0)
        config = config_of(kind, **sizes)
        for part in (config, *(v for v in vars(config).values() if hasattr(v, "_attn_implementation"))):
            part._attn_implementation = "eager"
            with contextlib.suppress(AttributeError, ValueError):
                part._experts_implementation = "eager"
        model = class_of(architecture)(config)
        for part in model.modules():  # some families tie whatever the configuration says
            head = part.get_output_embeddings() if isinstance(part, transformers.PreTrainedModel) else None
            if head is not None and head.weight is part.get_input_embeddings().weight:
                head.weight = nn.Parameter(head.weight.detach().clone())
        return model.train(), batch()

    assert name not in FLEET
    FLEET[name] = entry


def causal() -> Batch:
    return {"input_ids": tokens(), "labels": tokens()}


def masked() -> Batch:
    return {"input_ids": tokens(), "labels": tokens(1)}


def sequence() -> Batch:
    return {"input_ids": tokens(), "labels": labels()}


def span() -> Batch:
    return {"input_ids": tokens(), "start_positions": torch.arange(B), "end_positions": torch.arange(B) + 2}


def pair() -> Batch:
    return {"input_ids": tokens(), "labels": tokens(1, T - 2)}


def shifted() -> Batch:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(2, T - 2), "labels": tokens(1, T - 2)}


def image() -> Batch:
    return {"pixel_values": noise(B, 3, SIDE, SIDE), "labels": labels()}


def lm(name: str, architecture: str, kind: str = "", **sizes: Any) -> None:
    add(name, f"{architecture}ForCausalLM", kind or name, causal, **sizes)


# ---- decoders

add("gpt2", "GPT2LMHeadModel", "gpt2", causal)
lm("gpt_neo", "GPTNeo", num_layers=2, attention_types=[[["global", "local"], 1]])
lm("gptj", "GPTJ", rotary_dim=4)
lm("gpt_neox", "GPTNeoX")
lm("codegen", "CodeGen", rotary_dim=4, n_embd=32)
lm("gpt_bigcode", "GPTBigCode", multi_query=True)
lm("gpt_bigcode_mha", "GPTBigCode", "gpt_bigcode", multi_query=False)
lm("opt", "OPT", word_embed_proj_dim=D)
lm("opt_projected", "OPT", "opt", word_embed_proj_dim=20)
lm("bloom", "Bloom")
FALCON = dict(alibi=False)
lm("falcon_mha", "Falcon", "falcon", num_kv_heads=HEADS, multi_query=False, new_decoder_architecture=False)
lm("falcon_mqa", "Falcon", "falcon", multi_query=True, new_decoder_architecture=False)
lm("falcon_gqa", "Falcon", "falcon", new_decoder_architecture=True)
lm("mpt", "Mpt")
lm("persimmon", "Persimmon", hidden_size=32)
lm("phi", "Phi", hidden_size=32)
lm("phi3", "Phi3", hidden_size=32)
lm("stablelm", "StableLm")
lm("llama", "Llama")
lm("mistral", "Mistral", head_dim=8)
lm("qwen2", "Qwen2")
lm("qwen3", "Qwen3", head_dim=8)
lm("gemma", "Gemma", head_dim=8)
lm("gemma2", "Gemma2", head_dim=8)
lm("gemma3", "Gemma3", "gemma3_text", head_dim=8)
lm("gemma3n", "Gemma3n", "gemma3n_text", head_dim=8, vocab_size_per_layer_input=V, hidden_size_per_layer_input=10,
   laurel_rank=6, num_hidden_layers=2, num_kv_shared_layers=0, intermediate_size=INNER, layer_types=["sliding_attention", "full_attention"], activation_sparsity_pattern=[0.0, 0.0])
lm("cohere", "Cohere")
lm("cohere2", "Cohere2", head_dim=8)
lm("olmo", "Olmo")
lm("olmo2", "Olmo2")
lm("starcoder2", "Starcoder2")
lm("glm", "Glm", head_dim=8)
lm("glm4", "Glm4", head_dim=8)
lm("granite", "Granite")
lm("nemotron", "Nemotron", hidden_act="gelu")
lm("smollm3", "SmolLM3")
lm("diffllama", "DiffLlama")
lm("helium", "Helium", head_dim=6)
lm("exaone4", "Exaone4")
lm("seed_oss", "SeedOss", head_dim=8)
lm("xglm", "XGLM", attention_heads=HEADS)
lm("biogpt", "BioGpt")
add("openai_gpt", "OpenAIGPTLMHeadModel", "openai-gpt", causal)
add("ctrl", "CTRLLMHeadModel", "ctrl", causal, dff=INNER)
lm("nanochat", "NanoChat")
lm("minicpm3", "MiniCPM3", q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, num_key_value_heads=HEADS)

# ---- mixtures of experts

LATENT = dict(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5,
              num_key_value_heads=HEADS)
GROUPED = dict(n_group=1, topk_group=1, first_k_dense_replace=0, n_shared_experts=1)
lm("mixtral", "Mixtral")
lm("qwen2_moe", "Qwen2Moe")
lm("qwen3_moe", "Qwen3Moe", head_dim=8)
lm("olmoe", "Olmoe")
lm("deepseek_v2", "DeepseekV2", **LATENT, **GROUPED)
lm("deepseek_v3", "DeepseekV3", **LATENT, **GROUPED)
lm("gpt_oss", "GptOss", head_dim=8)
lm("llama4", "Llama4", "llama4_text", head_dim=8, intermediate_size_mlp=28, moe_layers=[0], attn_temperature_tuning=False, num_experts_per_tok=1)
lm("granitemoe", "GraniteMoe")
lm("jetmoe", "JetMoe", kv_channels=8, num_key_value_heads=GROUPS)
lm("phimoe", "Phimoe")
lm("ernie4_5_moe", "Ernie4_5_Moe", moe_layer_start_index=0, moe_layer_end_index=0, moe_layer_interval=1)
lm("minimax", "MiniMax", head_dim=8, num_hidden_layers=2, layer_types=["full_attention", "linear_attention"], block_size=4)
lm("dots1", "Dots1", head_dim=8, **GROUPED)
lm("glm4_moe", "Glm4Moe", head_dim=8, **GROUPED)
lm("dbrx", "Dbrx", attn_config=dict(kv_n_heads=GROUPS, attn_pdrop=0.0, clip_qkv=8.0, rope_theta=10000.0), ffn_config=dict(hidden_size=D, ffn_hidden_size=20, moe_num_experts=EXPERTS, moe_top_k=2))
lm("longcat_flash", "LongcatFlash", **LATENT, head_dim=4, ffn_hidden_size=INNER, zero_expert_num=1)
lm("flex_olmo", "FlexOlmo")
lm("hunyuan_moe", "HunYuanMoEV1", "hunyuan_v1_moe", head_dim=8)
add("switch", "SwitchTransformersForConditionalGeneration", "switch_transformers", shifted, d_kv=7, num_sparse_encoder_layers=1, dense_act_fn="gelu", num_sparse_decoder_layers=1, num_layers=2, num_decoder_layers=2)
add("nllb_moe", "NllbMoeForConditionalGeneration", "nllb-moe", pair, encoder_sparse_step=1, decoder_sparse_step=1, expert_capacity=64, activation_function="gelu")

# ---- state spaces and linear attention

lm("mamba", "Mamba", state_size=6, time_step_rank=5, expand=2)
lm("mamba2", "Mamba2", state_size=6, num_heads=6, head_dim=8, n_groups=2, expand=2, chunk_size=4)
lm("falcon_mamba", "FalconMamba", state_size=6, time_step_rank=5, expand=2)
lm("zamba", "Zamba", num_hidden_layers=2, layers_block_type=["mamba", "hybrid"], mamba_d_state=6, mamba_dt_rank=5, n_mamba_heads=2, attention_head_dim=12, attention_hidden_size=2 * D, use_mamba_kernels=False)
lm("zamba2", "Zamba2", num_hidden_layers=2, layers_block_type=["mamba", "hybrid"], mamba_d_state=6, n_mamba_heads=6, mamba_headdim=8, mamba_ngroups=1, chunk_size=4, use_mamba_kernels=False, adapter_rank=6, num_mem_blocks=1, num_key_value_heads=HEADS)
lm("bamba", "Bamba", num_hidden_layers=2, attn_layer_indices=[1], mamba_d_state=6, mamba_n_heads=6, mamba_d_head=8, mamba_n_groups=2, mamba_chunk_size=4)
lm("jamba", "Jamba", num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=6, mamba_dt_rank=5, use_mamba_kernels=False)
lm("recurrent_gemma", "RecurrentGemma", num_hidden_layers=2, block_types=["recurrent", "attention"], lru_width=32, head_dim=8)
lm("rwkv", "Rwkv", attention_hidden_size=D, num_hidden_layers=2, context_length=16)
lm("qwen3_next", "Qwen3Next", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=5)
lm("lfm2", "Lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"])
lm("xlstm", "xLSTM", num_heads=2, chunk_size=4, qk_dim_factor=0.5, v_dim_factor=1.0, mode="train", chunkwise_kernel="chunkwise--native_autograd", sequence_kernel="native_sequence__native", step_kernel="native")
lm("falcon_h1", "FalconH1", mamba_d_ssm=48, mamba_n_heads=6, mamba_d_head=8, mamba_d_state=6, mamba_n_groups=1, mamba_chunk_size=2)
lm("granitemoehybrid", "GraniteMoeHybrid", num_hidden_layers=2, layer_types=["mamba", "attention"], mamba_n_heads=6, mamba_d_head=8, mamba_d_state=6, mamba_n_groups=1, mamba_chunk_size=4)
lm("nemotron_h", "NemotronH", num_hidden_layers=..., layers_block_type=["mamba", "attention", "moe"], mamba_num_heads=6, mamba_head_dim=8, ssm_state_size=6, n_groups=2, chunk_size=4, head_dim=8, use_mamba_kernels=False, moe_shared_expert_intermediate_size=28, mlp_hidden_act="gelu")
lm("olmo_hybrid", "OlmoHybrid", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=5)
lm("kimi_linear", "KimiLinear", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], linear_head_dim=6, linear_num_heads=4, kv_lora_rank=10, q_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, num_key_value_heads=HEADS)

# ---- encoders

for name, head, kind in (
    ("bert", "Bert", "bert"), ("roberta", "Roberta", "roberta"), ("albert", "Albert", "albert"),
    ("electra", "Electra", "electra"), ("deberta_v2", "DebertaV2", "deberta-v2"), ("deberta", "Deberta", "deberta"), ("modernbert", "ModernBert", "modernbert"),
    ("mpnet", "MPNet", "mpnet"), ("funnel", "Funnel", "funnel"), ("fnet", "FNet", "fnet"), ("convbert", "ConvBert", "convbert"),
    ("longformer", "Longformer", "longformer"), ("big_bird", "BigBird", "big_bird"), ("distilbert", "DistilBert", "distilbert"),
    ("camembert", "Camembert", "camembert"), ("squeezebert", "SqueezeBert", "squeezebert"),
    ("rembert", "RemBert", "rembert"), ("roformer", "RoFormer", "roformer"), ("mobilebert", "MobileBert", "mobilebert"), ("esm", "Esm", "esm"), ("eurobert", "EuroBert", "eurobert"),
):  # fmt: skip
    own: dict[str, Any] = {
        "deberta_v2": dict(relative_attention=True, position_buckets=4, pos_att_type=["c2p", "p2c"], position_biased_input=False),
        "deberta": dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False),
        "albert": dict(embedding_size=20), "electra": dict(embedding_size=20),
        "modernbert": dict(global_attn_every_n_layers=1, pad_token_id=0, cls_token_id=1, sep_token_id=2, local_attention=8),
        "funnel": dict(block_sizes=[1, 1], d_head=6, d_inner=INNER, num_decoder_layers=1), "convbert": dict(embedding_size=20, head_ratio=2, conv_kernel_size=3),
        "longformer": dict(attention_window=4), "big_bird": dict(attention_type="original_full"), "distilbert": dict(dim=D, hidden_dim=INNER),
        "squeezebert": dict(embedding_size=D, q_groups=2, k_groups=2, v_groups=2, post_attention_groups=1, intermediate_groups=2, output_groups=2),
        "rembert": dict(input_embedding_size=20, output_embedding_size=28), "mobilebert": dict(embedding_size=20, intra_bottleneck_size=16, true_hidden_size=16, hidden_size=D, num_feedforward_networks=1), "esm": dict(mask_token_id=3, position_embedding_type="rotary", token_dropout=False),
    }.get(name, {})  # fmt: skip
    add(f"{name}_mlm", f"{head}ForMaskedLM", kind, masked, **own)
for name, head, own in (
    ("bert", "Bert", {}), ("xlnet", "XLNet", dict(d_inner=INNER)), ("canine", "Canine", dict(num_hash_buckets=31, num_hash_functions=2, downsampling_rate=2, upsampling_kernel_size=3, local_transformer_stride=4)),
    ("deberta-v2", "DebertaV2", dict(relative_attention=False)),
):  # fmt: skip
    add(f"{name}_classifier", f"{head}ForSequenceClassification", name, sequence, **own)
add("roberta_qa", "RobertaForQuestionAnswering", "roberta", span, num_labels=2)
add("xlnet_qa", "XLNetForQuestionAnsweringSimple", "xlnet", span, d_inner=INNER, num_labels=2)
add("gpt2_classifier", "GPT2ForSequenceClassification", "gpt2", sequence)
add("perceiver", "PerceiverForMaskedLM", "perceiver", lambda: masked(), num_latents=6, d_latents=28, num_blocks=1, num_self_attends_per_block=1, num_self_attention_heads=4, num_cross_attention_heads=4, qk_channels=16, v_channels=28, max_position_embeddings=T)

# ---- encoders and decoders

add("t5", "T5ForConditionalGeneration", "t5", shifted, d_kv=7, relative_attention_num_buckets=6, relative_attention_max_distance=8)
add("t5_gated", "T5ForConditionalGeneration", "t5", shifted, d_kv=7, feed_forward_proj="gated-gelu", relative_attention_num_buckets=6, relative_attention_max_distance=8)
add("umt5", "UMT5ForConditionalGeneration", "umt5", shifted, d_kv=7, relative_attention_num_buckets=6, relative_attention_max_distance=8)
for name, head in (("bart", "Bart"), ("mbart", "MBart"), ("pegasus", "Pegasus"), ("blenderbot", "Blenderbot"), ("m2m_100", "M2M100"), ("plbart", "PLBart")):
    add(name, f"{head}ForConditionalGeneration", name, pair)
add("marian", "MarianMTModel", "marian", pair, decoder_vocab_size=V, share_encoder_decoder_embeddings=False)
add("led", "LEDForConditionalGeneration", "led", pair, attention_window=4, max_encoder_position_embeddings=16, max_decoder_position_embeddings=16)
add("prophetnet", "ProphetNetForConditionalGeneration", "prophetnet", pair, num_encoder_attention_heads=HEADS, num_decoder_attention_heads=HEADS, num_buckets=6, relative_max_distance=8, ngram=2)
add("longt5", "LongT5ForConditionalGeneration", "longt5", shifted, d_kv=7, relative_attention_num_buckets=6, local_radius=3)

# ---- vision

for name, head, own in (
    ("vit", "ViT", {}), ("deit", "DeiT", {}), ("beit", "Beit", dict(use_relative_position_bias=True, use_absolute_position_embeddings=True)),
    ("data2vec-vision", "Data2VecVision", dict(use_relative_position_bias=True)),
    ("swin", "Swin", dict(embed_dim=12, depths=[1, 1], num_heads=[2, 3], window_size=2, patch_size=4, use_absolute_embeddings=True)),
    ("swinv2", "Swinv2", dict(embed_dim=12, depths=[1, 1], num_heads=[2, 3], window_size=2, patch_size=4)),
    ("convnext", "ConvNext", dict(patch_size=2, num_stages=4, hidden_sizes=[8, 12, 20, 28], depths=[1, 1, 1, 1])), ("convnextv2", "ConvNextV2", dict(patch_size=2, num_stages=4, hidden_sizes=[8, 12, 20, 28], depths=[1, 1, 1, 1])),
    ("resnet", "ResNet", dict(embedding_size=8, hidden_sizes=[12, 20], depths=[1, 2])), ("regnet", "RegNet", dict(embedding_size=8, hidden_sizes=[12, 20], depths=[1, 1], groups_width=4)),
    ("mobilenet_v1", "MobileNetV1", dict(depth_multiplier=0.05)), ("mobilenet_v2", "MobileNetV2", dict(depth_multiplier=0.05, min_depth=8)),
    ("mobilevit", "MobileViT", dict(hidden_sizes=[12, 16, 20], neck_hidden_sizes=[8, 8, 12, 12, 16, 20, 24], patch_size=2, image_size=64, num_attention_heads=2)),
    ("cvt", "Cvt", dict(embed_dim=[8, 12, 16], num_heads=[1, 2, 2], depth=[1, 1, 1])),
    ("poolformer", "PoolFormer", dict(hidden_sizes=[8, 12], depths=[1, 1], patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1], num_encoder_blocks=2)),
    ("segformer", "Segformer", dict(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[4, 1], hidden_sizes=[8, 12], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=20)),
    ("dinov2", "Dinov2", dict(use_swiglu_ffn=True, layerscale_value=1.0)), ("dinov2_with_registers", "Dinov2WithRegisters", {}), ("ijepa", "IJepa", {}), ("vit_msn", "ViTMSN", {}),
    ("levit", "Levit", dict(hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[4, 4, 4], patch_size=16, drop_path_rate=0, image_size=64)),
    ("pvt", "Pvt", dict(num_encoder_blocks=2, depths=[1, 1], sequence_reduction_ratios=[4, 1], hidden_sizes=[8, 12], patch_sizes=[4, 2], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2])),
    ("pvt_v2", "PvtV2", dict(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[4, 1], hidden_sizes=[8, 12], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2])),
    ("focalnet", "FocalNet", dict(embed_dim=12, hidden_sizes=[12, 20], depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3], patch_size=4)),
    ("efficientnet", "EfficientNet", dict(width_coefficient=1.0, depth_coefficient=1.0, depth_divisor=4, in_channels=[32, 12], out_channels=[12, 20], kernel_sizes=[3, 5], strides=[1, 2], num_block_repeats=[1, 1], expand_ratios=[1, 2], hidden_dim=1280)), ("bit", "Bit", dict(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], num_groups=4)), ("hiera", "Hiera", dict(embed_dim=12, depths=[1, 1], num_heads=[2, 2], image_size=[32, 32], mlp_ratio=2.0, num_query_pool=1, query_stride=[2, 2], masked_unit_size=[4, 4], patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1])), ("swiftformer", "SwiftFormer", dict(embed_dims=[8, 12], depths=[1, 1], downsamples=[True, True], mlp_ratio=2)),
    ("siglip", "Siglip", dict(text_config=dict(vocab_size=V, hidden_size=20, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=HEADS), vision_config=dict(hidden_size=D, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=HEADS, image_size=SIDE, patch_size=8))), ("clip", "CLIP", dict(text_config=dict(vocab_size=V, hidden_size=20, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=HEADS), vision_config=dict(hidden_size=D, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=HEADS, image_size=SIDE, patch_size=8), projection_dim=12)), ("hgnet_v2", "HGNetV2", dict(embedding_size=8, hidden_sizes=[12, 20], depths=[1, 1], stem_channels=[3, 8, 12], stage_in_channels=[12, 16], stage_mid_channels=[8, 8], stage_out_channels=[16, 20], stage_num_blocks=[1, 1], stage_downsample=[False, True], stage_downsample_strides=[2, 2], stage_light_block=[False, True], stage_kernel_size=[3, 3], stage_numb_of_layers=[2, 2])), ("textnet", "TextNet", dict(stem_out_channels=8, hidden_sizes=[8, 12, 16, 20, 24], conv_layer_kernel_sizes=[[[3, 3]], [[3, 1]], [[1, 3]], [[3, 3]]], conv_layer_strides=[[2], [2], [1], [1]])), ("mobilevitv2", "MobileViTV2", dict(patch_size=2, base_attn_unit_dims=[16, 24, 32], n_attn_blocks=[1, 1, 1], width_multiplier=0.1)), 
):  # fmt: skip
    add(name, f"{head}ForImageClassification", name, image, **own)
add("vit_mae", "ViTMAEForPreTraining", "vit_mae", lambda: {"pixel_values": noise(B, 3, SIDE, SIDE)}, decoder_hidden_size=20, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=28, mask_ratio=0.5)


# ---- audio

def sound(length: int = 400) -> Callable[[], Batch]:
    return lambda: {"input_values": noise(B, length), "labels": labels()}

CONVS = dict(conv_dim=(12, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=6, num_conv_pos_embedding_groups=2, classifier_proj_size=20, mask_time_prob=0.0, apply_spec_augment=False)
for name, head, own in (
    ("wav2vec2", "Wav2Vec2", {}), ("hubert", "Hubert", {}), ("wavlm", "WavLM", dict(num_buckets=8, max_bucket_distance=8)), ("sew", "SEW", dict(squeeze_factor=2)), ("sew-d", "SEWD", dict(squeeze_factor=2, position_buckets=4, max_position_embeddings=16)), ("unispeech-sat", "UniSpeechSat", {}), ("data2vec-audio", "Data2VecAudio", dict(conv_pos_kernel_size=3, num_conv_pos_embeddings=2)), ("wav2vec2-conformer", "Wav2Vec2Conformer", dict(conv_depthwise_kernel_size=3)),
):  # fmt: skip
    add(name, f"{head}ForSequenceClassification", name, sound(), **(CONVS | own))
add("wav2vec2_ctc", "Wav2Vec2ForCTC", "wav2vec2", lambda: {"input_values": noise(B, 400), "labels": tokens(1, 3)}, **CONVS)
add("whisper", "WhisperForConditionalGeneration", "whisper", lambda: {"input_features": noise(B, 10, 16), "labels": tokens(1, 6)}, num_mel_bins=10, max_source_positions=8, max_target_positions=16, suppress_tokens=None, begin_suppress_tokens=None)
add("ast", "ASTForAudioClassification", "audio-spectrogram-transformer", lambda: {"input_values": noise(B, 24, 16), "labels": labels()}, patch_size=8, frequency_stride=4, time_stride=4, max_length=24, num_mel_bins=16)
add("moonshine", "MoonshineForConditionalGeneration", "moonshine", lambda: {"input_values": noise(B, 1100), "labels": tokens(1, 6)}, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1, encoder_num_attention_heads=HEADS, decoder_num_attention_heads=HEADS, encoder_num_key_value_heads=HEADS, decoder_num_key_value_heads=HEADS)
add("speech_to_text", "Speech2TextForConditionalGeneration", "speech_to_text", lambda: {"input_features": noise(B, 24, 10), "labels": tokens(1, 6)}, input_feat_per_channel=10, conv_channels=20, max_source_positions=24, max_target_positions=16)


# ---- what metrize makes of an entry

ROUNDS = 4  # of pasting rules, before we give up
STEPS = 20


@dataclasses.dataclass
class Placement:
    """The norm of a model, by rules that were pasted from error messages; or the last message."""

    norm: ModularNorm | None
    rules: list[Rule]
    pastes: int
    message: str


def rules_in(message: str) -> list[Rule]:
    """The rules that an error message prints, read as Python with the names of optim."""
    names = {**vars(optim.norms), **vars(optim.views), **vars(optim)}
    lists = re.findall(r"rules=(\[.*?\])\)", message, re.DOTALL)
    return [rule for text in lists for rule in eval(text, dict(names))]


def place(model: nn.Module) -> Placement:
    """Metrize a model, with the rules of its error messages where it asks for some."""
    rules: list[Rule] = []
    for pastes in range(ROUNDS):
        try:
            return Placement(metrize(model, rules=rules), rules, pastes, "")
        except CoverageError as error:
            message = str(error)
            try:
                rules = rules_in(message) + rules
            except Exception as wrong:
                return Placement(None, rules, pastes, f"{message}\n{wrong!r}")
    return Placement(None, rules, ROUNDS, message)


def train(model: nn.Module, batch: Batch, norm: ModularNorm) -> tuple[float, float]:
    """(first, last) loss of some steps on one batch, lr 1 decaying to 0."""
    optimizer = Dualized(model, lr=1.0, norm=norm)
    losses = []
    for step in range(STEPS + 1):
        torch.manual_seed(0)
        loss = model(**batch).loss
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = 1 - step / STEPS
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


def row(name: str, *, details: bool = True) -> str:
    """A line of the table, and a line for each wrong placement."""
    from tests.perturbation import judge

    start = time.perf_counter()
    model, batch = FLEET[name]()
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    placement = place(model)
    if placement.norm is None:
        return f"{name:24s} {len(placement.rules):2d} rules  NOT PLACED\n{placement.message}"
    losses = train(*FLEET[name](), placement.norm)
    verdict = judge(model, batch, placement.norm.norms, placement.norm.notes)
    seconds = time.perf_counter() - start
    head = f"{name:24s} {len(placement.rules):2d} rules  {len(verdict.wrong):2d} wrong  {losses[0]:8.3f} -> {losses[1]:8.3f}  {seconds:5.1f} s"
    up = "  LOSS ROSE" if not losses[1] < losses[0] else ""
    lines = [
        f"    {n} {shapes[n]} {str(placement.norm.norms[n]).replace('[polar_express]', '')}: {'; '.join(why)}"
        for n, why in verdict.wrong.items()
    ]
    rules = [f"    needs {r.pattern} {r.role or r.norm}" for r in placement.rules]
    return "\n".join([head + up, *rules, *(lines if details else ())])


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for name in sys.argv[1:] or FLEET:
        try:
            print(row(name), flush=True)
        except Exception as error:
            print(f"{name:24s} FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
