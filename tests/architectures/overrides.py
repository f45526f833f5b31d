"""What makes configurations small: values of fields by name, and by model type where a name is not enough."""

from __future__ import annotations

from typing import Any

# fewest layers of a model
LAYERS = 2
WIDTH, HEADS, HEAD, INNER, WINDOW, TURN, POSITIONS = 32, 4, 8, 64, 8, 40, 256

# (value, the names of the fields that get it)
GROUPS: tuple[tuple[Any, str], ...] = (
    (WIDTH, "hidden_size n_embd d_model embedding_dim emb_dim embedding_size word_embed_proj_dim"),
    (WIDTH, "lru_width hidden_size_global backbone_hidden_size"),
    (HEADS, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"),
    (HEADS, "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads"),
    (HEADS, "linear_num_heads linear_num_value_heads swa_num_attention_heads num_query_groups"),
    (2, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads"),
    (HEAD, "head_dim global_head_dim swa_head_dim d_head d_kv dim_head kv_channels attention_head_size"),
    (HEAD, "qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim rotary_dim query_pre_attn_scalar"),
    (HEAD, "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim"),
    (HEAD, "hidden_size_per_layer_input"),
    (2 * HEAD, "qk_head_dim"),
    (16, "q_lora_rank kv_lora_rank o_lora_rank laurel_rank hc_lowrank"),
    (INNER, "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size d_inner"),
    (INNER, "moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp dim_ff dff"),
    (INNER, "shared_intermediate_size dense_intermediate_size expert_ffn_hidden_size feed_forward_size"),
    (INNER, "moe_shared_expert_intermediate_size prefix_dense_intermediate_size"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts"),
    (1, "n_group topk_group n_shared_experts num_shared_experts num_expert_group first_k_dense_replace"),
    (2, "o_groups n_groups mamba_ngroups"),
    # few heads of an index give many equal scores, among which rounding chooses
    (16, "index_n_heads"),
    (16, "state_size mamba_d_state ssm_state_size chunk_size mamba_chunk_size"),
    (2 * WIDTH, "mamba_d_ssm"),
    (2 * WIDTH // HEAD, "mamba_n_heads mamba_num_heads"),
    (4, "time_step_rank mamba_dt_rank"),
    (WINDOW, "sliding_window attention_window_size window_size local_attention attention_chunk_size"),
    (WINDOW, "sliding_window_size index_topk"),
    (POSITIONS, "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions context_length"),
    (True, "is_decoder"),
    (0, "num_kv_shared_layers"),
    # not sizes: weights large enough that a wrong position shows in nats, and factors that are not one
    (0.2, "initializer_range init_std embedding_initializer_range"),
    (2.0, "embedding_multiplier logits_scaling lm_head_multiplier key_multiplier"),
    (0.5, "residual_multiplier attention_multiplier logit_scale attention_out_multiplier ssm_out_multiplier"),
    (5.0, "final_logit_softcapping attn_logit_softcapping logits_soft_cap output_logit_soft_cap"),
)
SIZES = {name: value for value, names in GROUPS for name in names.split()}
# fields that get their value also where the default is None
ALWAYS = ("head_dim", "num_key_value_heads", "n_routed_experts", "final_logit_softcapping")

# the layers of a hybrid of sliding and full attention
MIXED = ["sliding_attention", "full_attention"]
# n-gram embeddings and an index of key blocks, both small
QWEN4 = {
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 4,
    "heads_per_ngram": 2,
    "ple_embed_dim": WIDTH,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
GEMMA4 = {"global_head_dim": 2 * HEAD, "layer_types": MIXED}
ASSISTANT = {
    "text_config": {
        **GEMMA4,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "model_type": "gemma4_text",
        "num_kv_shared_layers": 2,
    }
}
MUSIC = {
    "text_encoder": {
        "model_type": "t5",
        "d_model": WIDTH,
        "d_kv": HEAD,
        "d_ff": INNER,
        "num_layers": 1,
        "num_heads": HEADS,
    },
    "audio_encoder": {
        "model_type": "encodec",
        "hidden_size": WIDTH,
        "num_filters": 4,
        "codebook_size": 16,
        "codebook_dim": WIDTH,
    },
    "decoder": {},
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": MIXED,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            for kind in MIXED
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"moe_intermediate_size": INNER, "n_shared_experts": 1, "num_experts_per_tok": 2},
    # the last two layers use the keys and values of the first two
    "gemma3n_text": {"layer_types": MIXED * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
    # this class does not cap its logits
    "gemma3": {"text_config": {"final_logit_softcapping": None}},
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "gemma4_assistant": ASSISTANT,
    "gemma4_unified_assistant": ASSISTANT,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2": {
        "layer_types": ["conv", "full_attention"],
        "full_attn_idxs": [1],
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"scale_emb": 1, "dim_model_base": WIDTH},
    "musicgen": MUSIC,
    "musicgen_melody": MUSIC,
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "w_init_variance_scale": 1.0},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "num_hidden_layers": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "n_mamba_heads": 2,
    },
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16]},
}

VARIANTS: dict[str, dict[str, Any]] = {
    "falcon (alibi)": {"alibi": True},
    "falcon (new decoder)": {"new_decoder_architecture": True},
    "bert (encoder)": {"is_decoder": False},
    "gemma4_text (experts)": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": INNER,
    },
    "gemma4_text (shared layers)": {
        "layer_types": MIXED * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
    },
    "opt (projected, norms after)": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    # the angles change at TURN tokens, which the longest texts of the run would pass
    "phi3 (longrope)": {
        "original_max_position_embeddings": TURN,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
            "original_max_position_embeddings": TURN,
        },
    },
    "llama (dynamic rope)": {
        "max_position_embeddings": TURN,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
    "llama (yarn)": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 24,
        }
    },
    "qwen2 (sliding window)": {
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
        "max_window_layers": 1,
    },
}
