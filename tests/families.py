"""Tiny random models of every family that routes, made by shrinking the default configuration of each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

SIGNS = re.compile(
    r"self\.experts\b|use_experts_implementation|\bclass \w*MoE\w*\(nn\.Module\)|\bclass \w*Router\w*\(nn\."
)
"""What the source of a family that routes holds."""

NOT_ROUTED = {
    "granite_docling": "its router picks a path of the vision tower",
    "vitpose_backbone": "picks an expert by the data set of the image, not by a router",
}
"""Folders of transformers that hold the signs and have no sparse layer in which a router chooses by token."""

FIELDS = {
    r"(n_)?vocab_size": 320,
    r"hidden_size|d_model": 32,
    r"num_hidden_layers|n_layers|num_layers": 4,
    r"num_attention_heads|n_heads|mamba_n_heads|mamba_num_heads|linear_num_((key|value)_)?heads": 4,
    r"num_key_value_heads": 2,
    r"head_dim|v_head_dim|linear_head_dim|qk_nope_head_dim|mamba_d_state|ssm_state_size": 8,
    r"qk_rope_head_dim|mamba_dt_rank": 4,
    r"q_lora_rank|kv_lora_rank|linear_(key|value)_head_dim|mamba_head_dim|mamba_d_head": 16,
    r"(moe_)?intermediate_size|shared_(expert_)?intermediate_size|(expert_)?ffn_hidden_size": 24,
    r"moe_shared_expert_intermediate_size": 24,
    r"num_local_experts|num_experts|n_routed_experts|moe_num_experts": 8,
    r"num_experts_per_tok(en)?|moe_k|moe_topk": 2,
    r"n_group|num_expert_group": 2,
    r"topk_group|first_k_dense_replace|num_dense_layers|moe_layer_start_index": 1,
    r"max_position_embeddings|max_seq_len": 512,
    r"sliding_window": 16,
    r"(pad|bos|eos)_token_id": 0,
    r"layer_types|mlp_layer_types|layers_block_type": None,
}
"""What a field, matched whole, shrinks to, in a configuration and in the parts of it."""

OTHER_TOWERS = {
    r"depth|encoder_layers|num_hidden_layers|n_layers": 1,
    r"num_heads|encoder_attention_heads": 4,
    r"out_hidden_size|text_hidden_size|output_dim|d_model": 32,
    r"encoder_ffn_dim|downsample_hidden_size|mlp_dim": 24,
    r"image_size": 56,
    r"num_position_embeddings": 16,
}
"""The same for the parts that do not read text."""

MLA: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 4}
SLIDING = ["sliding_attention"] * 3 + ["full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 24, "layer_types": SLIDING}
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria": {},
    "axk1": MLA,
    "axk2": MLA,
    "bailing_hybrid": MLA | {"layer_group_size": 2},
    "beam": {},
    "cohere2_moe": {},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 3, "hidden_size": 32},
    },
    "deepseek_ocr2": {
        "text_config": {
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense", *["sparse"] * 3],
            "num_key_value_heads": 4,
        }
    },
    "deepseek_v2": MLA | {"num_experts_per_tok": 3},
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "deepseek_v4": {},
    "diffusion_gemma": {"text_config": GEMMA},
    "doge": {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 4},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4, "head_dim": 12, "swa_num_attention_heads": 4}
        | {"swa_num_key_value_heads": 4, "swa_kv_lora_rank": 16, "swa_q_lora_rank": 16}
        | {"swa_qk_nope_head_dim": 8, "swa_head_dim": 12, "swa_v_head_dim": 8},
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["sparse"]},
        "audio_config": {"adapter_out_dim": 32, "adapter_input_size": 32, "num_key_value_heads": 4},
    },
    "ernie4_5_moe": {},
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [24, 16], "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}
    },
    "exaone_moe": {},
    "flex_olmo": {"num_experts_per_tok": 5},
    "flint": {},
    "gemma4": {
        "text_config": GEMMA
        | {"enable_moe_block": True, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320}
    },
    "glm4_moe": {},
    "glm4_moe_lite": MLA,
    "glm4v_moe": {
        "text_config": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}}
        | {"head_dim": 8}
    },
    "glm5_next": {
        "text_config": MLA | {"qk_rope_head_dim": 0, "head_dim": 0},
        "vision_config": {"projection_intermediate_size": 24},
    },
    "glm_moe_dsa": MLA,
    "gpt_oss": {"rope_parameters": ROPE},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hy_v3": {},
    "hy_v4": {},
    "inkling_mm_model": {},
    "inkling2": {},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {},
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "llama4": {
        "text_config": {"num_experts_per_tok": 2, "intermediate_size_mlp": 24},
        "vision_config": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    },
    "longcat_flash": MLA | {"num_layers": 2, "zero_expert_num": 3, "num_hidden_layers": 4, "moe_topk": 4},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl": {},
    "mistral4": MLA
    | {"rope_parameters": ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8192}},
    "mistral_large4": {"text_config": MLA},
    "mixtral": {},
    "muse_spark": {
        "out_hidden_size": 32,
        "projector_hidden_size": 32,
        "text_config": {"moe_hidden_size": 32},
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8] * 4, "depths": [1] * 4},
    },
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"], "n_groups": 2},
    "nllb-moe": {"pad_token_id": 1, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
    | {"moe_eval_capacity_token_fraction": 0.1}
    | dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
    "olmoe": {"num_experts": 16, "num_experts_per_tok": 8},
    "openai_privacy_filter": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 300, "vision_end_token_id": 301, "audio_end_token_id": 302},
    "qwen3_vl_moe": {},
    "qwen4_exp": {
        "text_config": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16}
        | {"indexer_compress_ratio": 2, "output_gate_type": "sigmoid", "hc_lowrank": 8}
    },
    "solar_open": {},
    "step3p7": {"text_config": {"num_sliding_attention_heads": 4, "share_expert_dim": 24, "sliding_window": 16}},
    "switch_transformers": {"d_kv": 8, "d_ff": 24, "num_decoder_layers": 4, "num_heads": 4, "expert_capacity": 3}
    | {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
    "unlimited_ocr": {},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""Every family by its ``model_type``, with the fields that differ from `FIELDS`."""


@cache
def installed_families() -> dict[str, str]:
    """Every folder of the installed transformers that routes, with the model type that is built of it."""
    return families_in(Path(transformers.__file__).parent / "models")


def families_in(root: Path) -> dict[str, str]:
    """The same of a folder of models."""
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name not in NOT_ROUTED):
        sources = [path.read_text("utf-8") for path in folder.glob("modeling_*.py")]
        if any(SIGNS.search(source) for source in sources):
            types = [
                each
                for each in CONFIG_MAPPING_NAMES
                if model_type_to_module_name(each) == folder.name and each in MODEL_MAPPING_NAMES
            ]
            found[folder.name] = next((each for each in types if each in FAMILIES), types[0] if types else "")
    return found


def tiny_config(family: str, **changes: Any) -> Any:
    """The default configuration of a family, shrunk."""
    default = transformers.AutoConfig.for_model(family)
    return type(default)(**_shrunk(default.to_dict(), FAMILIES.get(family, {}) | changes))


def tiny_model(family: str, *, causal: bool = False, seed: int = 0, **changes: Any) -> Any:
    """A random model of a family, in which what only biases the choice is random, too."""
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    torch.manual_seed(seed)
    return randomized(kind.from_config(tiny_config(family, **changes), dtype=torch.float32).eval())


def randomized(model: Any) -> Any:
    """The model, with routers that are not nearly uniform and choices that no default value decides."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            last = name.rpartition(".")[2]
            if last in {"e_score_correction_bias", "expert_bias", "balancing_biases"} or "moe_statics" in name:
                tensor.normal_(std=0.05)
            elif last == "tid2eid":
                tensor.copy_(torch.rand(len(tensor), 8).argsort(dim=1)[:, : tensor.shape[1]])
            elif tensor.dim() >= 2 and tensor.is_floating_point():
                tensor.mul_(16.0 if "router_mlp" in name else 4.0) if tensor.any() else tensor.normal_(std=0.1)
    return model


def _shrunk(default: Mapping[str, Any], own: Mapping[str, Any], *, text: bool = True) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in default.items():
        if isinstance(value, dict) and "model_type" in value:
            part = own.get(name) or {}
            fields[name] = _shrunk(value, part, text=text and name not in _OTHERS) | {"model_type": value["model_type"]}
        elif value is not None and not isinstance(value, bool):
            for pattern, small in (FIELDS if text else FIELDS | OTHER_TOWERS).items():
                if re.fullmatch(pattern, name):
                    fields[name] = small
    return fields | {name: value for name, value in own.items() if not isinstance(fields.get(name), dict)}


_OTHERS = {"vision_config", "audio_config", "sam_config", "encoder_config", "talker_config", "code2wav_config"}
