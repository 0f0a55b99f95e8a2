"""The sizes of tiny models: rules by the names of configuration fields, and settings of single families."""

import re
from typing import Any

VOCABULARY, LAYERS, WIDTH = 512, 4, 64

# Sizes by the names of configuration fields; the first match counts. A size of 0 (off) stays 0.
SIZES = {
    r"(unpadded_|decoder_)?vocab_size(_per_layer_input)?": VOCABULARY,
    r"hidden_size|d_model|n_embd|emb_dim|embedding_(dim|size)|(in|out)put_embedding_size|word_embed_proj_dim|lru_width": WIDTH,
    r"(attention|router)_hidden_size|hidden_size_global|adapter_(in_dim|out_dim|input_size)": WIDTH,
    r"(dense_)?intermediate_size(_mlp)?|((de|en)coder_)?ffn_dim|d_inner|dff|dim_ff|(ffn|feed_forward)_(hidden_)?size": 96,
    r"expert_ffn_hidden_size|\w+_intermediate_size": 48,
    r"kv_lora_rank|q_lora_rank": 32,
    r"hidden_size_per_layer_input|\w*(_d_head|head_dim|headdim|_state|state_size|_rank|_lowrank|ple_embed_dim)": 16,
    r"attention_head_size|d_head|dim_head|kv_channels|query_pre_attn_scalar|keep_window_size": 16,
    r"(mamba_)?chunk_size|\w*window(_size)?|local_attention|attention_chunk_size|index_(topk|block_size)|rotary_dim": 8,
    r"mamba_(n|num)_heads": 8,
    r"\w*(key_value|kv|linear_num_key)_heads|index(er)?_n_heads|o_groups|num_experts_per_tok(en)?|moe_(topk|k)": 2,
    r"\w*(attention|value|^n|num|^)_?heads?|(en|de)coder_layers|num_encoder_layers|heads_per_ngram|num_random_blocks": 4,
    r"(num|n_routed|num_local|moe_num)_experts": 4,
    r"\w*position_embeddings|n_positions|max_seq_len|context_length|n_ctx|\w+_positions|model_max_length|mamba_d_ssm": 128,
    r"rel_extent": 128,
    r"(mamba_)?n?_?groups?|topk_group|num_expert_group|first_k_dense_replace|(bos|decoder_start)_token_id": 1,
    r"eos_token_id": 2,
    r"pad_token_id": 0,
}
# before the rules: heads of 16 are what 4 heads in 64 make, but rotary and other halves of a head are not whole heads
EXACTLY = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "mamba_ngroups": 1, "mamba_n_groups": 1, "n_group": 1}
DEPTH = re.compile(r"num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers|num_blocks")
TOKEN = re.compile(r"\w+_token_(id|index)")

SLIDING = ["sliding_attention", "full_attention"]
LATENT = {"head_dim": 8}  # multi-head latent attention: the rotary part of a head
EVERY_HEAD = {"num_key_value_heads": 4}
DEEPSEEK_V2 = LATENT | {"num_experts_per_tok": 2, "first_k_dense_replace": 1}
GEMMA_4_E = {"num_hidden_layers": 6, "layer_types": SLIDING * 3, "num_kv_shared_layers": 2, "global_head_dim": 32}
GEMMA_4 = {"global_head_dim": 32, "layer_types": SLIDING * 2, "hidden_size_per_layer_input": 0}
ZAMBA = EVERY_HEAD | {
    "num_hidden_layers": 6,
    "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
    "attention_head_dim": 32,
    "attention_hidden_size": 128,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
QWEN_4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ple_embed_dim": 16,
    "ngram_vocab_size_base": 200,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
# Exceptions to the rules: settings that belong together, and those of variants.
SETTINGS: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT | EVERY_HEAD,
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 100,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v2:lite": DEEPSEEK_V2 | {"q_lora_rank": None},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT | EVERY_HEAD,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {"text_config": EVERY_HEAD | {"per_layer_config": {}}},
    "dots3_note_text": EVERY_HEAD | {"per_layer_config": {}},
    "falcon": {"new_decoder_architecture": True},
    "falcon:7b": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "falcon:rw": {
        "new_decoder_architecture": False,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "num_kv_heads": 4,
    },
    "falcon_mamba": {"time_step_rank": 4},
    "gemma2": {"layer_types": SLIDING * 2},
    "gemma3_text": {"layer_types": SLIDING * 2},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "layer_types": SLIDING * 3,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 6,
        "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
    },
    "gemma4": {"text_config": GEMMA_4_E},
    "gemma4:whole": {
        "text_config": GEMMA_4_E,
        "vision_config": VISION
        | {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 16, "position_embedding_size": 64},
    },
    "gemma4_text": GEMMA_4_E,  # as E2B and E4B
    "gemma4_text:31b": GEMMA_4 | {"attention_k_eq_v": True},
    "gemma4_text:moe": GEMMA_4  # as 26B-A4B
    | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "gemma4_unified_text": {"layer_types": SLIDING * 2},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT | EVERY_HEAD,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama4_text:interleaved": {"interleave_moe_layer_step": 2, "moe_layers": [1, 3]},
    "longcat_flash": LATENT | {"num_hidden_layers": None, "zero_expert_num": 2},
    "mamba": {"time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16, "layer_types": SLIDING * 2},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    "opt:350m": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "qwen2_5_vl:whole": {"text_config": {"rope_parameters": ROPE | {"mrope_section": [4, 2, 2]}}},
    "qwen4_exp": {"text_config": QWEN_4},
    "qwen4_exp_text": QWEN_4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {  # without a seed it hashes differently in each forward
        "hash_seed": 0,
        "is_decoder": True,
        "num_hidden_layers": 2,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "vaultgemma": {"layer_types": SLIDING * 2},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": ZAMBA | {"mamba_dt_rank": 4},
    "zamba2": ZAMBA
    | {"hybrid_layer_ids": [2, 4], "n_mamba_heads": 8, "mamba_headdim": 16, "num_query_groups": 4, "kv_channels": 16},
    "zaya": {"num_experts_per_tok": 1},
}
