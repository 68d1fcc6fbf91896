"""The table of `tests.architectures`: tiny random models, as changes of their configurations.

Two layers of 32 units. Windows are shorter than the rows, unless the row's name says otherwise;
soft-caps and scales of the head are far from one, so that leaving them out shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

try:
    import tiny
except ModuleNotFoundError:  # as part of a program, from the repository's root
    from tests import tiny

VOCAB = -(-tiny.VOCAB // 8) * 8
CONTEXT = 256
SWITCH = 64  # tokens, where a position table changes with the length
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
MODERN = {**WIDE, **HEADS, "head_dim": 8}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
NO_DROP = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
SMALL_EXPERTS = {**EXPERTS, "moe_intermediate_size": 16}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
SHARED_KEYS = {  # the last two layers attend to the keys of the first two
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
ROPE = {"rope_theta": 10000.0}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
LATENT_MOE = {**WIDE, **HEADS, **LATENT, **ROUTED, "moe_intermediate_size": 16}
MAMBA = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
# The library's scan clamps these models' time steps from below, its step with a cache does not.
UNCLAMPED: dict[str, Any] = {
    "time_step_min": 1e-9,
    "note": "without `time_step_min`, which the library itself leaves out while it decodes",
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """A kind of rotary table."""
    return {"rope_parameters": {"rope_type": kind, **ROPE, **more}}


def factors(size: int) -> dict[str, Any]:
    """Short and long factors of a rotary table of `size` dimensions."""
    half = size // 2
    return {
        "short_factor": [1.0 + 0.1 * i for i in range(half)],
        "long_factor": [2.0 + 1.5 * i for i in range(half)],
        "original_max_position_embeddings": SWITCH,
    }


@dataclass(frozen=True)
class Row:
    """One architecture: its name here, that of transformers, and what makes it tiny."""

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    reference: str = "eager"  # attention of the plain model it is compared with
    note: str = ""  # for the document


def row(
    name: str,
    base: dict[str, Any],
    kind: str = "",
    reference: str = "eager",
    note: str = "",
    **changes: Any,
) -> Row:
    """A row of the table; `kind` is the model type where it is not the name."""
    return Row(name, kind or name, {**TOKENS, **base, **changes}, reference, note)


GEMMA2 = {
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
ALTUP = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "intermediate_size": [48, 48],
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0, 0.0],
    "final_logit_softcapping": 3.0,
    "altup_num_inputs": 2,
}
SCALED = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
SCALED_MOE = {**SCALED, "num_local_experts": 4, "num_experts_per_tok": 2}
CHUNKS = {
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
    "attention_chunk_size": 16,
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "floor_scale": SWITCH,
}
GEMMA3_TEXT = {**TOKENS, **MODERN, **WINDOW, "query_pre_attn_scalar": 8}
FALCON = {**WIDE, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
FULL = {"layer_types": ["full_attention", "full_attention"]}

# fmt: off
TABLE: tuple[Row, ...] = (
    row("llama", MODERN),
    row("llama, tied, biased", MODERN, "llama", tie_word_embeddings=True, attention_bias=True),
    row("llama, wide heads", MODERN, "llama", head_dim=16, mlp_bias=True),
    row("llama, rope linear", MODERN, "llama", **rope("linear", factor=4.0)),
    row("llama, rope dynamic", {**MODERN, "max_position_embeddings": SWITCH}, "llama",
        **rope("dynamic", factor=4.0)),
    row("llama, rope yarn", MODERN, "llama",
        **rope("yarn", factor=4.0, original_max_position_embeddings=SWITCH)),
    row("llama, rope llama3", MODERN, "llama", **rope(
        "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=SWITCH)),
    row("llama, rope longrope", MODERN, "llama", **rope("longrope", **factors(8))),
    row("llama, rope dynamic, original", MODERN, "llama", **rope(
        "dynamic", factor=4.0, original_max_position_embeddings=SWITCH)),
    row("qwen2", MODERN),
    row("qwen2, window", MODERN, "qwen2", use_sliding_window=True, sliding_window=16,
        max_window_layers=1),
    row("qwen2, window off", MODERN, "qwen2", use_sliding_window=False, sliding_window=16),
    row("qwen2_moe", {**MODERN, **SMALL_EXPERTS}, shared_expert_intermediate_size=16),
    row("qwen3", MODERN),
    row("qwen3_moe", {**MODERN, **SMALL_EXPERTS}),
    row("qwen3_next", {**MODERN, **SMALL_EXPERTS, **DELTA}, shared_expert_intermediate_size=16),
    row("qwen3_5_text", {**MODERN, **DELTA}),
    row("qwen3_5", {}, text_config={**TOKENS, **MODERN, **DELTA}, image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2, vision_start_token_id=3, vision_end_token_id=4, vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 32, "num_position_embeddings": 16}),
    row("mistral", MODERN, sliding_window=None),
    row("mistral, window 16", MODERN, "mistral", sliding_window=16),
    row("mistral, window 100", MODERN, "mistral", sliding_window=100),
    row("mistral, window 512", MODERN, "mistral", sliding_window=512),
    row("mistral, window 1100", MODERN, "mistral", sliding_window=1100,
        max_position_embeddings=2048),
    row("mimo_v2_flash", {**MODERN, **ROUTED, **SMALL_EXPERTS, **WINDOW}, v_head_dim=4),
    row("minimax_m2", {**MODERN, **EXPERTS}),
    row("mixtral", {**MODERN, **EXPERTS}, sliding_window=None),
    row("mixtral, window", {**MODERN, **EXPERTS}, "mixtral", sliding_window=16),
    row("ministral", MODERN, **WINDOW),
    row("ministral3", MODERN, **rope(
        "yarn", factor=4.0, original_max_position_embeddings=SWITCH, llama_4_scaling_beta=0.1)),
    row("gemma", MODERN),
    row("gemma2", {**MODERN, **GEMMA2, **WINDOW}),
    row("gemma2, window 512", {**MODERN, **GEMMA2, **WINDOW}, "gemma2", sliding_window=512),
    row("gemma3_text", GEMMA3_TEXT),
    row("gemma3_text, window 100", GEMMA3_TEXT, "gemma3_text", sliding_window=100),
    row("gemma3_text, bidirectional", GEMMA3_TEXT, "gemma3_text", use_bidirectional_attention=True),
    row("gemma3_text, rope linear", GEMMA3_TEXT, "gemma3_text", rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}}),
    row("gemma3", {}, text_config=GEMMA3_TEXT, vision_config=VISION, mm_tokens_per_image=4,
        boi_token_index=3, eoi_token_index=4, image_token_index=VOCAB - 1),
    row("gemma3n_text", {**MODERN, **WINDOW, **ALTUP}),
    row("gemma3n_text, shared keys", {**MODERN, **WINDOW, **ALTUP, **SHARED_KEYS}, "gemma3n_text",
        intermediate_size=[48] * 4, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0]),
    row("gemma4", {}, vision_config=VISION, image_token_id=VOCAB - 1, video_token_id=VOCAB - 2,
        audio_token_id=VOCAB - 3, boi_token_id=3, eoi_token_id=4, boa_token_id=5, text_config={
            **TOKENS, **MODERN, **WINDOW, "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB}),
    row("gemma4_text", {**MODERN, **WINDOW}, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB, final_logit_softcapping=3.0),
    row("vaultgemma", {**MODERN, **GEMMA2, **WINDOW}),
    row("recurrent_gemma", MODERN, lru_width=32, attention_window_size=16, logits_soft_cap=3.0,
        block_types=["recurrent", "attention"]),
    row("phi", {**WIDE, **HEADS}),
    row("phi3", {**WIDE, **HEADS}),
    row("phi3, longrope", {**WIDE, **HEADS}, "phi3", original_max_position_embeddings=SWITCH,
        **rope("longrope", **factors(8))),
    row("phi3, window", {**WIDE, **HEADS}, "phi3", sliding_window=16),
    row("phi3, longrope, window", {**WIDE, **HEADS}, "phi3", sliding_window=40,
        original_max_position_embeddings=SWITCH, **rope("longrope", **factors(8))),
    row("phimoe", {**WIDE, **HEADS, **EXPERTS}),
    row("phimoe, longrope", {**WIDE, **HEADS, **EXPERTS}, "phimoe", **rope(
        "longrope", **factors(8), short_mscale=1.1, long_mscale=1.3)),
    row("gpt2", {**OLD, **NO_DROP}, pad_token_id=None),
    row("gpt2, pad token", {**OLD, **NO_DROP}, "gpt2", pad_token_id=2),
    row("gpt2, scaled by layer", {**OLD, **NO_DROP}, "gpt2", scale_attn_by_inverse_layer_idx=True),
    row("gpt_neo", {}, hidden_size=32, num_layers=2, num_heads=4, window_size=16,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=CONTEXT),
    row("gpt_neox", {**WIDE, **HEADS}),
    row("gpt_neox_japanese", {**WIDE, **HEADS}),
    row("gptj", {**OLD, **NO_DROP}, rotary_dim=4),
    row("codegen", {**OLD, **NO_DROP}, rotary_dim=4, n_ctx=CONTEXT),
    row("gpt_bigcode", {**OLD, **NO_DROP}),
    row("gpt_bigcode, all heads", {**OLD, **NO_DROP}, "gpt_bigcode", multi_query=False),
    row("openai-gpt", {**OLD, **NO_DROP}),
    row("ctrl", {**OLD, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, dff=48),
    row("opt", {**WIDE, **HEADS}, ffn_dim=48, word_embed_proj_dim=32),
    row("opt-350m", {**WIDE, **HEADS}, "opt", ffn_dim=48, word_embed_proj_dim=16,
        do_layer_norm_before=False),
    row("bloom", {}, hidden_size=32, n_layer=2, n_head=4),
    row("mpt", {}, d_model=32, n_heads=4, n_layers=2, max_seq_len=CONTEXT, expansion_ratio=2),
    row("falcon", FALCON, new_decoder_architecture=True, num_kv_heads=2),
    row("falcon, multi-query", FALCON, "falcon", multi_query=True),
    # Its eager attention adds the bias twice, once with the mask.
    row("falcon, alibi", FALCON, "falcon", "sdpa", multi_query=True, alibi=True),
    row("falcon, sequential", FALCON, "falcon", multi_query=False, parallel_attn=False, bias=True,
        num_kv_heads=4),
    row("starcoder2", {**WIDE, **HEADS}),
    row("stablelm", {**WIDE, **HEADS}),
    row("stablelm, parallel", {**WIDE, **HEADS}, "stablelm", use_parallel_residual=True,
        qk_layernorm=True, use_qkv_bias=True),
    row("olmo", MODERN, clip_qkv=0.5),
    row("olmo2", MODERN),
    row("olmo3", {**MODERN, **WINDOW}),
    row("olmoe", {**MODERN, **EXPERTS}, num_key_value_heads=4),
    row("olmo_hybrid", MODERN, layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8),
    row("flex_olmo", {**MODERN, **EXPERTS}),
    row("cohere", MODERN, logit_scale=0.5),
    row("cohere, norms", MODERN, "cohere", use_qk_norm=True),
    row("cohere2", {**MODERN, **WINDOW}, logit_scale=0.5),
    row("granite", MODERN, **SCALED),
    row("granitemoe", MODERN, **SCALED_MOE),
    row("granitemoehybrid", {**MODERN, **MAMBA}, **SCALED_MOE, shared_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"]),
    row("granitemoeshared", MODERN, **SCALED_MOE, shared_intermediate_size=16),
    row("granite_swa", {**MODERN, **WINDOW}),
    row("hyperclovax", MODERN, **SCALED),
    row("nemotron", MODERN),
    row("persimmon", {**WIDE, **HEADS}),
    row("xglm", {}, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4,
        max_position_embeddings=CONTEXT),
    row("biogpt", {**WIDE, **HEADS}),
    row("gpt_oss", {**MODERN, **EXPERTS, **WINDOW}, **rope(
        "yarn", factor=4.0, original_max_position_embeddings=SWITCH)),
    row("deepseek_v2", LATENT_MOE, num_experts_per_tok=2, first_k_dense_replace=1),
    row("deepseek_v3", LATENT_MOE, num_experts_per_tok=2, first_k_dense_replace=1),
    row("deepseek_v3, rope yarn", LATENT_MOE, "deepseek_v3", num_experts_per_tok=2,
        first_k_dense_replace=1, **rope("yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.7,
                                        original_max_position_embeddings=SWITCH)),
    row("deepseek_v32", LATENT_MOE, num_experts_per_tok=2, first_k_dense_replace=1, index_topk=8,
        index_head_dim=16, index_n_heads=2),
    row("longcat_flash", {**WIDE, **HEADS, **LATENT}, num_layers=2, ffn_hidden_size=48,
        expert_ffn_hidden_size=16, moe_topk=2, n_routed_experts=4, zero_expert_num=2, head_dim=8),
    row("kimi_linear", {**WIDE, **HEADS, **LATENT}, model_max_length=CONTEXT, num_experts=4,
        num_experts_per_token=2, moe_intermediate_size=16, linear_head_dim=8, linear_num_heads=2,
        layer_types=["linear_attention", "full_attention"]),
    row("minicpm3", {**WIDE, **HEADS, **LATENT}, dim_model_base=16),
    row("glm", MODERN),
    row("glm4", MODERN),
    row("glm4_moe", {**MODERN, **ROUTED, **SMALL_EXPERTS}, first_k_dense_replace=1),
    row("glm4_moe_lite", {**LATENT_MOE, **EXPERTS}, first_k_dense_replace=1),
    row("exaone_moe", {**MODERN, **ROUTED, **SMALL_EXPERTS, **WINDOW}, num_shared_experts=1,
        first_k_dense_replace=1),
    row("exaone4", {**MODERN, **WINDOW}),
    row("smollm3", MODERN, no_rope_layers=[1, 0], **FULL),
    row("helium", MODERN),
    row("ernie4_5", MODERN),
    row("hunyuan_v1_dense", MODERN),
    row("hunyuan_v1_moe", MODERN, num_experts=4, moe_topk=2, moe_intermediate_size=16),
    row("ernie4_5_moe", MODERN, moe_intermediate_size=16, moe_k=2, moe_num_experts=4,
        moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_end_index=1),
    row("cwm", {**MODERN, **WINDOW}, **rope(
        "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=SWITCH)),
    row("afmoe", {**MODERN, **ROUTED, **SMALL_EXPERTS, **WINDOW}, num_dense_layers=1,
        num_shared_experts=1),
    row("jais2", MODERN),
    row("nanochat", MODERN, final_logit_softcapping=3.0),
    row("dots1", {**MODERN, **ROUTED, **SMALL_EXPERTS}, first_k_dense_replace=1),
    row("bamba", {**MODERN, **MAMBA}, attn_layer_indices=[1]),
    row("jamba", {**MODERN, **MAMBA}, mamba_dt_rank=4, num_experts=2, attn_layer_period=2,
        attn_layer_offset=1, use_mamba_kernels=False),
    row("mamba", {}, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=4),
    row("mamba2", {}, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16,
        n_groups=1, chunk_size=16),
    row("falcon_mamba", {}, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=4),
    row("rwkv", {}, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2,
        context_length=CONTEXT),
    row("zamba2", {**WIDE, **HEADS}, mamba_d_state=8, n_mamba_heads=4, chunk_size=16,
        num_key_value_heads=4, layers_block_type=["linear_attention", "hybrid"], adapter_rank=4,
        **UNCLAMPED),
    row("zamba2, clamped", {**WIDE, **HEADS}, "zamba2", mamba_d_state=8, n_mamba_heads=4,
        chunk_size=16, num_key_value_heads=4, adapter_rank=4,
        layers_block_type=["linear_attention", "hybrid"]),
    row("falcon_h1", {**MODERN, **MAMBA}, mamba_d_ssm=64, lm_head_multiplier=0.5),
    row("nemotron_h", MODERN, layers_block_type=["linear_attention", "full_attention"],
        ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=16, n_groups=1, chunk_size=16,
        **UNCLAMPED),
    row("nemotron_h, clamped", MODERN, "nemotron_h", ssm_state_size=8, mamba_num_heads=4,
        mamba_head_dim=16, n_groups=1, chunk_size=16,
        layers_block_type=["linear_attention", "full_attention"]),
    row("lfm2", MODERN, layer_types=["conv", "full_attention"], block_multiple_of=8),
    row("lfm2_moe", {**MODERN, **SMALL_EXPERTS}, layer_types=["conv", "full_attention"],
        num_dense_layers=1),
    row("llama4_text", {**MODERN, **CHUNKS}),
    row("llama4", {}, text_config={**TOKENS, **MODERN, **CHUNKS}, image_token_index=VOCAB - 1,
        boi_token_index=3, eoi_token_index=4, vision_config={
            **VISION, "intermediate_size": 64, "projector_input_dim": 16,
            "projector_output_dim": 16, "vision_output_dim": 16}),
    row("dbrx", {}, d_model=32, n_heads=4, n_layers=2, max_seq_len=CONTEXT,
        attn_config={"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 10000.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4,
                    "moe_top_k": 2}),
    row("jetmoe", {**WIDE, "max_position_embeddings": CONTEXT}, num_key_value_heads=2,
        kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
    row("arcee", MODERN),
    row("apertus", MODERN),
    row("seed_oss", MODERN, attention_dropout=0.1, residual_dropout=0.1),
    row("bitnet", MODERN),
    row("diffllama", MODERN),
    row("doge", MODERN),
    row("minimax", {**MODERN, **EXPERTS}, block_size=16,
        layer_types=["linear_attention", "full_attention"]),
    row("modernbert-decoder", {**WIDE, **HEADS}, local_attention=16,
        layer_types=["sliding_attention", "full_attention"]),
    row("moshi, window", {}, "moshi", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=48, sliding_window=16, max_position_embeddings=CONTEXT),
    row("xlstm", {}, hidden_size=32, embedding_dim=32, num_hidden_layers=2, num_blocks=2,
        num_heads=2, chunk_size=16),
    row("bart", {}, d_model=32, encoder_layers=1, decoder_layers=2, decoder_attention_heads=4,
        encoder_attention_heads=4, decoder_ffn_dim=48, encoder_ffn_dim=48,
        max_position_embeddings=CONTEXT),
    row("roberta", {**WIDE, **HEADS}, is_decoder=True),
    row("bert", {**WIDE, **HEADS}, is_decoder=True),
    row("bert, no decoder", {**WIDE, **HEADS}, "bert"),
    row("xlnet", {}, d_model=32, n_layer=2, n_head=4, d_inner=48),
)
