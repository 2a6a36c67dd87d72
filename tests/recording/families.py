"""Tiny random models of many families, made by shrinking the default configuration of each."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers

FIELDS = {
    r"(n_)?vocab_size": 320,
    r"hidden_size|d_model": 32,
    r"num_hidden_layers|n_layers|num_layers": 4,
    r"num_attention_heads|n_heads|mamba_n_heads|mamba_num_heads|linear_num_(key|value)_heads": 4,
    r"num_key_value_heads": 2,
    r"head_dim|v_head_dim|qk_nope_head_dim|mamba_d_state|ssm_state_size": 8,
    r"qk_rope_head_dim|mamba_dt_rank": 4,
    r"q_lora_rank|kv_lora_rank|linear_(key|value)_head_dim|mamba_head_dim|mamba_d_head": 16,
    r"(moe_)?intermediate_size|shared_(expert_)?intermediate_size|(expert_)?ffn_hidden_size": 24,
    r"moe_shared_expert_intermediate_size": 24,
    r"num_local_experts|num_experts|n_routed_experts|moe_num_experts": 8,
    r"num_experts_per_tok|moe_k|moe_topk": 2,
    r"n_group": 2,
    r"topk_group|first_k_dense_replace|num_dense_layers|moe_layer_start_index": 1,
    r"max_position_embeddings|max_seq_len": 512,
    r"sliding_window": 16,
    r"(pad|bos|eos)_token_id": 0,
    r"layer_types|mlp_layer_types|layers_block_type": None,
}
MLA: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "aria_text": {},
    "cohere2_moe": {},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 3, "hidden_size": 32},
    },
    "deepseek_v2": MLA | {"num_experts_per_tok": 3},
    "deepseek_v3": MLA,
    "deepseek_v4": {},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {"num_experts_per_tok": 5},
    "glm4_moe": {},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": MLA | {"num_layers": 2, "zero_expert_num": 3, "num_hidden_layers": 4, "moe_topk": 4},
    "minimax": {},
    "minimax_m2": {},
    "mixtral": {},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"], "n_groups": 2},
    "openai_privacy_filter": {},
    "olmoe": {"num_experts": 16, "num_experts_per_tok": 8},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "solar_open": {},
}
"""The fields of each family that differ from `FIELDS`."""


def tiny_config(family: str, **changes: Any) -> Any:
    """The default configuration of a family, shrunk."""
    default = transformers.AutoConfig.for_model(family)
    fields: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        for pattern, small in FIELDS.items():
            if re.fullmatch(pattern, name) and value is not None and not isinstance(value, bool):
                fields[name] = small
    return type(default)(**fields | FAMILIES.get(family, {}) | changes)


def tiny_model(family: str, *, causal: bool = False, seed: int = 0, **changes: Any) -> Any:
    """A random model of a family, in which what only biases the choice is random, too."""
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    torch.manual_seed(seed)
    model = kind.from_config(tiny_config(family, **changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            last = name.rpartition(".")[2]
            if last in {"e_score_correction_bias", "expert_bias", "balancing_biases"} or "moe_statics" in name:
                tensor.normal_(std=0.05)
            elif last == "tid2eid":
                tensor.copy_(torch.rand(len(tensor), 8).argsort(dim=1)[:, : tensor.shape[1]])
            elif tensor.dim() >= 2 and tensor.is_floating_point():
                tensor.mul_(4.0)  # routers that are not nearly uniform
    return model
