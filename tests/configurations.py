"""Small random models of `transformers`, of every kind of family, each with a batch with which it has a loss.

Sizes are as distinct as a family allows, so that a shape says which dimension it is.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

B, T, V, D = 4, 8, 53, 24  # sequences, tokens of each, vocabulary, width
HEADS, GROUPS, INNER, EXPERTS = 4, 2, 40, 3
CLASSES, SIDE = 5, 32  # of a classifier; pixels of an image's side

Batch = dict[str, Any]
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


def configuration(family: str, **sizes: Any) -> Any:
    """The configuration of a family: SIZES where it has such a field, and its own; one that is ... is left out."""
    kind: Any = CONFIG_MAPPING[family]
    renamed = kind.attribute_map
    fields = {f.name for f in dataclasses.fields(kind)} | {*renamed, "tie_word_embeddings", "num_labels"}
    for f in dataclasses.fields(kind):  # a unit that is never open says nothing
        if "act" in f.name and isinstance(f.default, str) and f.default.startswith("relu"):
            sizes = {f.name: "gelu"} | sizes
    own = {renamed.get(name, name) for name in sizes}
    common = {name: size for name, size in SIZES.items() if name in fields and renamed.get(name, name) not in own}
    return kind(**{name: size for name, size in (common | sizes).items() if size is not ...})


def tokens(seed: int = 0, length: int = T) -> Tensor:
    return torch.randint(3, V, (B, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels() -> Tensor:
    return torch.arange(B) % CLASSES


def untie(model: nn.Module) -> None:
    """Give heads weights of their own: some families tie them whatever the configuration says."""
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            head: Any = part.get_output_embeddings()
            if head is not None and head.weight is part.get_input_embeddings().weight:
                head.weight = nn.Parameter(head.weight.detach().clone())


def add(name: str, architecture: str, family: str, batch: Callable[[], Batch], **sizes: Any) -> None:
    """Put a configuration in the fleet."""

    def entry() -> tuple[nn.Module, Batch]:
        torch.manual_seed(0)
        config = configuration(family, **sizes)
        for part in (config, *(v for v in vars(config).values() if hasattr(v, "_attn_implementation"))):
            part._attn_implementation = "eager"
            with contextlib.suppress(AttributeError, ValueError):  # of a family without experts
                part._experts_implementation = "eager"
        model = getattr(transformers, architecture)(config)
        untie(model)
        return model.train(), batch()

    assert name not in FLEET
    FLEET[name] = entry


def causal() -> Batch:
    return {"input_ids": tokens(), "labels": tokens()}


def chunked() -> Batch:
    """Linear attention in chunks of 4 tokens: by default a loop over 64 positions, most of them padding."""
    return causal() | {"chunk_size": 4}


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


def image(side: int = SIDE) -> Batch:
    return {"pixel_values": noise(B, 3, side, side), "labels": labels()}


def spectrogram(*shape: int) -> Callable[[], Batch]:
    return lambda: {"input_features": noise(B, *shape), "labels": tokens(1, 6)}


def decoder(name: str, model: str, family: str = "", batch: Callable[[], Batch] = causal, **sizes: Any) -> None:
    add(name, f"{model}ForCausalLM", family or name, batch, **sizes)


def encoder(name: str, model: str, family: str = "", **sizes: Any) -> None:
    add(f"{name}_mlm", f"{model}ForMaskedLM", family or name, masked, **sizes)


def seq2seq(name: str, model: str) -> None:
    add(name, f"{model}ForConditionalGeneration", name, pair)


def classifier(family: str, model: str, **sizes: Any) -> None:
    add(f"{family}_classifier", f"{model}ForSequenceClassification", family, sequence, **sizes)


def vision(family: str, model: str, side: int = SIDE, **sizes: Any) -> None:
    add(family, f"{model}ForImageClassification", family, lambda: image(side), **({"image_size": side} | sizes))


def audio(family: str, model: str, **sizes: Any) -> None:
    add(
        family,
        f"{model}ForSequenceClassification",
        family,
        lambda: {"input_values": noise(B, 400), "labels": labels()},
        **(CONVOLUTIONS | sizes),
    )


# fmt: off

COMMON: dict[str, Any] = dict(intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=HEADS)
TEXT: dict[str, Any] = dict(vocab_size=V, hidden_size=20, **COMMON)
PICTURES: dict[str, Any] = dict(hidden_size=D, image_size=SIDE, patch_size=8, **COMMON)
CONVOLUTIONS: dict[str, Any] = dict(conv_dim=(12, 16), conv_kernel=(10, 3), conv_stride=(5, 2),
    num_feat_extract_layers=2, num_conv_pos_embeddings=6, num_conv_pos_embedding_groups=2, classifier_proj_size=20,
    mask_time_prob=0.0, apply_spec_augment=False)
LATENT: dict[str, Any] = dict(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5,
    num_key_value_heads=HEADS)
GROUPED: dict[str, Any] = dict(n_group=1, topk_group=1, first_k_dense_replace=0, n_shared_experts=1)
DELTA: dict[str, Any] = dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
DELTA_HEADS: dict[str, Any] = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6,
    linear_value_head_dim=5)

# ---- decoders

add("gpt2", "GPT2LMHeadModel", "gpt2", causal)
decoder("gpt_neo", "GPTNeo", num_layers=2, attention_types=[[["global", "local"], 1]])
decoder("gptj", "GPTJ", rotary_dim=4)
decoder("gpt_neox", "GPTNeoX")
decoder("codegen", "CodeGen", rotary_dim=4, n_embd=32)
decoder("gpt_bigcode", "GPTBigCode", multi_query=True)
decoder("gpt_bigcode_mha", "GPTBigCode", "gpt_bigcode", multi_query=False)
decoder("opt", "OPT", word_embed_proj_dim=D)
decoder("opt_projected", "OPT", "opt", word_embed_proj_dim=20)
decoder("bloom", "Bloom")
decoder("falcon_mha", "Falcon", "falcon", num_kv_heads=HEADS, multi_query=False, new_decoder_architecture=False)
decoder("falcon_mqa", "Falcon", "falcon", multi_query=True, new_decoder_architecture=False)
decoder("falcon_gqa", "Falcon", "falcon", new_decoder_architecture=True)
decoder("mpt", "Mpt")
decoder("persimmon", "Persimmon", hidden_size=32)
decoder("phi", "Phi", hidden_size=32)
decoder("phi3", "Phi3", hidden_size=32)
decoder("stablelm", "StableLm")
decoder("llama", "Llama")
decoder("mistral", "Mistral", head_dim=8)
decoder("qwen2", "Qwen2")
decoder("qwen3", "Qwen3", head_dim=8)
decoder("gemma", "Gemma", head_dim=8)
decoder("gemma2", "Gemma2", head_dim=8)
decoder("gemma3", "Gemma3", "gemma3_text", head_dim=8)
decoder("gemma3n", "Gemma3n", "gemma3n_text", head_dim=8, vocab_size_per_layer_input=V, hidden_size_per_layer_input=10,
    laurel_rank=6, num_hidden_layers=2, num_kv_shared_layers=0, intermediate_size=INNER,
    layer_types=["sliding_attention", "full_attention"], activation_sparsity_pattern=[0.0, 0.0])
decoder("cohere", "Cohere")
decoder("cohere2", "Cohere2", head_dim=8)
decoder("olmo", "Olmo")
decoder("olmo2", "Olmo2")
decoder("starcoder2", "Starcoder2")
decoder("glm", "Glm", head_dim=8)
decoder("glm4", "Glm4", head_dim=8)
decoder("granite", "Granite")
decoder("nemotron", "Nemotron", hidden_act="gelu")
decoder("smollm3", "SmolLM3")
decoder("diffllama", "DiffLlama")
decoder("helium", "Helium", head_dim=6)
decoder("exaone4", "Exaone4")
decoder("seed_oss", "SeedOss", head_dim=8)
decoder("xglm", "XGLM", attention_heads=HEADS)
decoder("biogpt", "BioGpt")
add("openai_gpt", "OpenAIGPTLMHeadModel", "openai-gpt", causal)
add("ctrl", "CTRLLMHeadModel", "ctrl", causal, dff=INNER)
decoder("nanochat", "NanoChat")
decoder("minicpm3", "MiniCPM3", **LATENT)

# ---- mixtures of experts

decoder("mixtral", "Mixtral")
decoder("qwen2_moe", "Qwen2Moe")
decoder("qwen3_moe", "Qwen3Moe", head_dim=8)
decoder("olmoe", "Olmoe")
decoder("deepseek_v2", "DeepseekV2", **LATENT, **GROUPED)
decoder("deepseek_v3", "DeepseekV3", **LATENT, **GROUPED)
decoder("gpt_oss", "GptOss", head_dim=8)
decoder("llama4", "Llama4", "llama4_text", head_dim=8, intermediate_size_mlp=28, moe_layers=[0],
    attn_temperature_tuning=False, num_experts_per_tok=1)
decoder("granitemoe", "GraniteMoe")
decoder("jetmoe", "JetMoe", kv_channels=8, num_key_value_heads=GROUPS)
decoder("phimoe", "Phimoe")
decoder("ernie4_5_moe", "Ernie4_5_Moe", moe_layer_start_index=0, moe_layer_end_index=0, moe_layer_interval=1)
decoder("minimax", "MiniMax", head_dim=8, num_hidden_layers=2, layer_types=["full_attention", "linear_attention"],
    block_size=4)
decoder("dots1", "Dots1", head_dim=8, **GROUPED)
decoder("glm4_moe", "Glm4Moe", head_dim=8, **GROUPED)
decoder("dbrx", "Dbrx", attn_config=dict(kv_n_heads=GROUPS, attn_pdrop=0.0, clip_qkv=8.0, rope_theta=10000.0),
    ffn_config=dict(hidden_size=D, ffn_hidden_size=20, moe_num_experts=EXPERTS, moe_top_k=2))
decoder("longcat_flash", "LongcatFlash", **LATENT, head_dim=4, ffn_hidden_size=INNER, zero_expert_num=1)
decoder("flex_olmo", "FlexOlmo")
decoder("hunyuan_moe", "HunYuanMoEV1", "hunyuan_v1_moe", head_dim=8)
add("switch", "SwitchTransformersForConditionalGeneration", "switch_transformers", shifted, d_kv=7,
    num_sparse_encoder_layers=1, dense_act_fn="gelu", num_sparse_decoder_layers=1, num_layers=2, num_decoder_layers=2)
add("nllb_moe", "NllbMoeForConditionalGeneration", "nllb-moe", pair, encoder_sparse_step=1, decoder_sparse_step=1,
    expert_capacity=64, activation_function="gelu")

# ---- state spaces and linear attention

decoder("mamba", "Mamba", state_size=6, time_step_rank=5, expand=2)
decoder("mamba2", "Mamba2", state_size=6, num_heads=6, head_dim=8, n_groups=2, expand=2, chunk_size=4)
decoder("falcon_mamba", "FalconMamba", state_size=6, time_step_rank=5, expand=2)
decoder("zamba", "Zamba", num_hidden_layers=2, layers_block_type=["mamba", "hybrid"], mamba_d_state=6, mamba_dt_rank=5,
    n_mamba_heads=2, attention_head_dim=12, attention_hidden_size=2 * D, use_mamba_kernels=False)
decoder("zamba2", "Zamba2", num_hidden_layers=2, layers_block_type=["mamba", "hybrid"], mamba_d_state=6,
    n_mamba_heads=6, mamba_headdim=8, mamba_ngroups=1, chunk_size=4, use_mamba_kernels=False, adapter_rank=6,
    num_mem_blocks=1, num_key_value_heads=HEADS)
decoder("bamba", "Bamba", num_hidden_layers=2, attn_layer_indices=[1], mamba_d_state=6, mamba_n_heads=6,
    mamba_d_head=8, mamba_n_groups=2, mamba_chunk_size=4)
decoder("jamba", "Jamba", num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
    expert_layer_offset=1, mamba_d_state=6, mamba_dt_rank=5, use_mamba_kernels=False)
decoder("recurrent_gemma", "RecurrentGemma", num_hidden_layers=2, block_types=["recurrent", "attention"], lru_width=32,
    head_dim=8)
decoder("rwkv", "Rwkv", attention_hidden_size=D, num_hidden_layers=2, context_length=16)
decoder("qwen3_next", "Qwen3Next", batch=chunked, head_dim=8, **DELTA, **DELTA_HEADS)
decoder("lfm2", "Lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"])
decoder("xlstm", "xLSTM", num_heads=2, chunk_size=4, qk_dim_factor=0.5, v_dim_factor=1.0, mode="train",
    chunkwise_kernel="chunkwise--native_autograd", sequence_kernel="native_sequence__native", step_kernel="native")
decoder("falcon_h1", "FalconH1", mamba_d_ssm=48, mamba_n_heads=6, mamba_d_head=8, mamba_d_state=6, mamba_n_groups=1,
    mamba_chunk_size=2)
decoder("granitemoehybrid", "GraniteMoeHybrid", num_hidden_layers=2, layer_types=["mamba", "attention"],
    mamba_n_heads=6, mamba_d_head=8, mamba_d_state=6, mamba_n_groups=1, mamba_chunk_size=4)
decoder("nemotron_h", "NemotronH", num_hidden_layers=..., layers_block_type=["mamba", "attention", "moe"],
    mamba_num_heads=6, mamba_head_dim=8, ssm_state_size=6, n_groups=2, chunk_size=4, head_dim=8,
    use_mamba_kernels=False, moe_shared_expert_intermediate_size=28, mlp_hidden_act="gelu")
decoder("olmo_hybrid", "OlmoHybrid", batch=chunked, **DELTA, **DELTA_HEADS)
decoder("kimi_linear", "KimiLinear", batch=chunked, linear_head_dim=6, linear_num_heads=4, **DELTA, **LATENT)

# ---- encoders

encoder("bert", "Bert")
encoder("roberta", "Roberta")
encoder("albert", "Albert", embedding_size=20)
encoder("electra", "Electra", embedding_size=20)
encoder("deberta_v2", "DebertaV2", "deberta-v2", relative_attention=True, position_buckets=4,
    pos_att_type=["c2p", "p2c"], position_biased_input=False)
encoder("deberta", "Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False)
encoder("modernbert", "ModernBert", global_attn_every_n_layers=1, pad_token_id=0, cls_token_id=1, sep_token_id=2,
    local_attention=8)
encoder("mpnet", "MPNet")
encoder("funnel", "Funnel", block_sizes=[1, 1], d_head=6, d_inner=INNER, num_decoder_layers=1)
encoder("fnet", "FNet")
encoder("convbert", "ConvBert", embedding_size=20, head_ratio=2, conv_kernel_size=3)
encoder("longformer", "Longformer", attention_window=4)
encoder("big_bird", "BigBird", attention_type="original_full")
encoder("distilbert", "DistilBert", dim=D, hidden_dim=INNER)
encoder("camembert", "Camembert")
encoder("squeezebert", "SqueezeBert", embedding_size=D, q_groups=2, k_groups=2, v_groups=2, post_attention_groups=1,
    intermediate_groups=2, output_groups=2)
encoder("rembert", "RemBert", input_embedding_size=20, output_embedding_size=28)
encoder("roformer", "RoFormer")
encoder("mobilebert", "MobileBert", embedding_size=20, intra_bottleneck_size=16, true_hidden_size=16, hidden_size=D,
    num_feedforward_networks=1)
encoder("esm", "Esm", mask_token_id=3, position_embedding_type="rotary", token_dropout=False)
encoder("eurobert", "EuroBert")
classifier("bert", "Bert")
classifier("xlnet", "XLNet", d_inner=INNER)
classifier("canine", "Canine", num_hash_buckets=31, num_hash_functions=2, downsampling_rate=2,
    upsampling_kernel_size=3, local_transformer_stride=4)
classifier("deberta-v2", "DebertaV2", relative_attention=False)
add("roberta_qa", "RobertaForQuestionAnswering", "roberta", span, num_labels=2)
add("xlnet_qa", "XLNetForQuestionAnsweringSimple", "xlnet", span, d_inner=INNER, num_labels=2)
add("gpt2_classifier", "GPT2ForSequenceClassification", "gpt2", sequence)
add("perceiver", "PerceiverForMaskedLM", "perceiver", masked, num_latents=6, d_latents=28, num_blocks=1,
    num_self_attends_per_block=1, num_self_attention_heads=4, num_cross_attention_heads=4, qk_channels=16,
    v_channels=28, max_position_embeddings=T)

# ---- encoders and decoders

add("t5", "T5ForConditionalGeneration", "t5", shifted, d_kv=7, relative_attention_num_buckets=6,
    relative_attention_max_distance=8)
add("t5_gated", "T5ForConditionalGeneration", "t5", shifted, d_kv=7, feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=6, relative_attention_max_distance=8)
add("umt5", "UMT5ForConditionalGeneration", "umt5", shifted, d_kv=7, relative_attention_num_buckets=6,
    relative_attention_max_distance=8)
seq2seq("bart", "Bart")
seq2seq("mbart", "MBart")
seq2seq("pegasus", "Pegasus")
seq2seq("blenderbot", "Blenderbot")
seq2seq("m2m_100", "M2M100")
seq2seq("plbart", "PLBart")
add("marian", "MarianMTModel", "marian", pair, decoder_vocab_size=V, share_encoder_decoder_embeddings=False)
add("led", "LEDForConditionalGeneration", "led", pair, attention_window=4, max_encoder_position_embeddings=16,
    max_decoder_position_embeddings=16)
add("prophetnet", "ProphetNetForConditionalGeneration", "prophetnet", pair, num_encoder_attention_heads=HEADS,
    num_decoder_attention_heads=HEADS, num_buckets=6, relative_max_distance=8, ngram=2)
add("longt5", "LongT5ForConditionalGeneration", "longt5", shifted, d_kv=7, relative_attention_num_buckets=6,
    local_radius=3)

# ---- vision

vision("vit", "ViT")
vision("deit", "DeiT")
vision("beit", "Beit", use_relative_position_bias=True, use_absolute_position_embeddings=True)
vision("data2vec-vision", "Data2VecVision", use_relative_position_bias=True)
vision("swin", "Swin", embed_dim=12, depths=[1, 1], num_heads=[2, 3], window_size=2, patch_size=4,
    use_absolute_embeddings=True)
vision("swinv2", "Swinv2", embed_dim=12, depths=[1, 1], num_heads=[2, 3], window_size=2, patch_size=4)
vision("convnext", "ConvNext", patch_size=2, num_stages=4, hidden_sizes=[8, 12, 20, 28], depths=[1, 1, 1, 1])
vision("convnextv2", "ConvNextV2", patch_size=2, num_stages=4, hidden_sizes=[8, 12, 20, 28], depths=[1, 1, 1, 1])
vision("resnet", "ResNet", embedding_size=8, hidden_sizes=[12, 20], depths=[1, 2])
vision("regnet", "RegNet", embedding_size=8, hidden_sizes=[12, 20], depths=[1, 1], groups_width=4)
vision("mobilenet_v1", "MobileNetV1", depth_multiplier=0.05)
vision("mobilenet_v2", "MobileNetV2", depth_multiplier=0.05, min_depth=8)
vision("mobilevit", "MobileViT", hidden_sizes=[12, 16, 20], neck_hidden_sizes=[8, 8, 12, 12, 16, 20, 24], patch_size=2,
    num_attention_heads=2)
vision("cvt", "Cvt", embed_dim=[8, 12, 16], num_heads=[1, 2, 2], depth=[1, 2, 3])
vision("poolformer", "PoolFormer", hidden_sizes=[8, 12], depths=[1, 1], patch_sizes=[7, 3], strides=[4, 2],
    padding=[2, 1], num_encoder_blocks=2)
vision("segformer", "Segformer", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[4, 1], hidden_sizes=[8, 12],
    patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=20)
vision("dinov2", "Dinov2", use_swiglu_ffn=True, layerscale_value=1.0)
vision("dinov2_with_registers", "Dinov2WithRegisters")
vision("ijepa", "IJepa")
vision("vit_msn", "ViTMSN")
vision("levit", "Levit", side=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
    key_dim=[4, 4, 4], patch_size=16, drop_path_rate=0)
vision("pvt", "Pvt", num_encoder_blocks=2, depths=[1, 1], sequence_reduction_ratios=[4, 1], hidden_sizes=[8, 12],
    patch_sizes=[4, 2], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2])
vision("pvt_v2", "PvtV2", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[4, 1], hidden_sizes=[8, 12],
    patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2])
vision("focalnet", "FocalNet", embed_dim=12, hidden_sizes=[12, 20], depths=[1, 1], focal_levels=[2, 2],
    focal_windows=[3, 3], patch_size=4)
vision("efficientnet", "EfficientNet", width_coefficient=1.0, depth_coefficient=1.0, depth_divisor=4,
    in_channels=[32, 12], out_channels=[12, 20], kernel_sizes=[3, 5], strides=[1, 2], num_block_repeats=[1, 1],
    expand_ratios=[1, 2], hidden_dim=1280)
vision("bit", "Bit", embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], num_groups=4)
vision("hiera", "Hiera", embed_dim=12, depths=[1, 1], num_heads=[2, 2], image_size=[32, 32], mlp_ratio=2.0,
    num_query_pool=1, query_stride=[2, 2], masked_unit_size=[4, 4], patch_size=[3, 3], patch_stride=[2, 2],
    patch_padding=[1, 1])
vision("swiftformer", "SwiftFormer", embed_dims=[8, 12], depths=[1, 1], downsamples=[True, True], mlp_ratio=2)
vision("siglip", "Siglip", text_config=TEXT, vision_config=PICTURES)
vision("clip", "CLIP", text_config=TEXT, vision_config=PICTURES, projection_dim=12)
vision("hgnet_v2", "HGNetV2", embedding_size=8, hidden_sizes=[12, 20], depths=[1, 1], stem_channels=[3, 8, 12],
    stage_in_channels=[12, 16], stage_mid_channels=[8, 8], stage_out_channels=[16, 20], stage_num_blocks=[1, 1],
    stage_downsample=[False, True], stage_downsample_strides=[2, 2], stage_light_block=[False, True],
    stage_kernel_size=[3, 3], stage_numb_of_layers=[2, 2])
vision("textnet", "TextNet", stem_out_channels=8, hidden_sizes=[8, 12, 16, 20, 24],
    conv_layer_kernel_sizes=[[[3, 3]], [[3, 1]], [[1, 3]], [[3, 3]]], conv_layer_strides=[[2], [2], [1], [1]])
vision("mobilevitv2", "MobileViTV2", side=64, patch_size=2, base_attn_unit_dims=[16, 24, 32], n_attn_blocks=[1, 1, 1],
    width_multiplier=0.1)
add("vit_mae", "ViTMAEForPreTraining", "vit_mae", lambda: {"pixel_values": noise(B, 3, SIDE, SIDE)},
    decoder_hidden_size=20, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=28,
    mask_ratio=0.5)

# ---- audio

audio("wav2vec2", "Wav2Vec2")
audio("hubert", "Hubert")
audio("wavlm", "WavLM", num_buckets=8, max_bucket_distance=8)
audio("sew", "SEW", squeeze_factor=2)
audio("sew-d", "SEWD", squeeze_factor=2, position_buckets=4, max_position_embeddings=16)
audio("unispeech-sat", "UniSpeechSat")
audio("data2vec-audio", "Data2VecAudio", conv_pos_kernel_size=3, num_conv_pos_embeddings=2)
audio("wav2vec2-conformer", "Wav2Vec2Conformer", conv_depthwise_kernel_size=3)
add("wav2vec2_ctc", "Wav2Vec2ForCTC", "wav2vec2", lambda: {"input_values": noise(B, 400), "labels": tokens(1, 3)},
    **CONVOLUTIONS)
add("whisper", "WhisperForConditionalGeneration", "whisper", spectrogram(10, 16), num_mel_bins=10,
    max_source_positions=8, max_target_positions=16, suppress_tokens=None, begin_suppress_tokens=None)
add("ast", "ASTForAudioClassification", "audio-spectrogram-transformer",
    lambda: {"input_values": noise(B, 24, 16), "labels": labels()}, patch_size=8, frequency_stride=4, time_stride=4,
    max_length=24, num_mel_bins=16)
add("moonshine", "MoonshineForConditionalGeneration", "moonshine",
    lambda: {"input_values": noise(B, 1100), "labels": tokens(1, 6)}, encoder_num_hidden_layers=1,
    decoder_num_hidden_layers=1, encoder_num_attention_heads=HEADS, decoder_num_attention_heads=HEADS,
    encoder_num_key_value_heads=HEADS, decoder_num_key_value_heads=HEADS)
add("speech_to_text", "Speech2TextForConditionalGeneration", "speech_to_text", spectrogram(24, 10),
    input_feat_per_channel=10, conv_channels=20, max_source_positions=24, max_target_positions=16)
