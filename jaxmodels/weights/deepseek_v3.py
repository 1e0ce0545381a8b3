"""DeepSeek-V3 as its authors and `transformers` write it: model type deepseek_v3.

The modules that look ahead are the layers after the last one. `transformers` leaves
them out of its model but reads files that have them; how many there are is told by
the tensors. Their copies of the embeddings and of the head are read over, and not
written.
"""

import math
from collections.abc import Mapping, Set
from typing import Any

from jaxmodels.layers.rotary_scaling import Yarn
from jaxmodels.models.language.deepseek_v3 import DeepseekV3
from jaxmodels.weights.config import REQUIRED, Config
from jaxmodels.weights.family import Family, token_input
from jaxmodels.weights.llama import PLAIN, SIZES, expert_rows, gated_rows, outer_rows
from jaxmodels.weights.rotary import read_rotary, rope_entries, write_rotary
from jaxmodels.weights.table import LINEAR, Row

_CONFIG = Config(
    "deepseek_v3",
    "DeepseekV3",
    SIZES
    | {
        "first_k_dense_replace": ("dense_depth", REQUIRED),
        "q_lora_rank": ("q_rank", None),
        "kv_lora_rank": ("kv_rank", REQUIRED),
        "qk_nope_head_dim": ("nope_dim", REQUIRED),
        "qk_rope_head_dim": ("rope_dim", REQUIRED),
        "v_head_dim": ("value_dim", REQUIRED),
        "moe_intermediate_size": ("expert_width", REQUIRED),
        "n_routed_experts": ("num_experts", REQUIRED),
        "n_shared_experts": ("num_shared", REQUIRED),
        "num_experts_per_tok": ("top_k", REQUIRED),
        "n_group": ("groups", REQUIRED),
        "topk_group": ("top_groups", REQUIRED),
        "routed_scaling_factor": ("routed_scale", REQUIRED),
    },
    PLAIN | {"norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
)
_LAYOUTS = {True: "interleaved", False: "half"}


def from_config(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    """Our fields for a config.json; ValueError if it has what the model has not."""
    _CONFIG.refuse(_CONFIG.faults(config))
    fields = _CONFIG.sizes(config)
    base, scaling = read_rotary(config, 10_000.0)
    return {
        **fields,
        "rope_base": base,
        "rope_scaling": scaling,
        "rope_layout": _LAYOUTS[config.get("rope_interleave", True)],
        "num_ahead": sum(name.endswith(".eh_proj.weight") for name in names),
        **_read_magnitudes(rope_entries(config), scaling, fields),
    }


def _read_magnitudes(entries: Mapping[str, Any], scaling: Any, fields: Mapping) -> dict[str, Any]:
    """YaRN's factors on turned channels (mscale) and on all (mscale_all_dim).

    Where both are 1, as published, the model's own defaults say the same.
    """
    ours, all_dim = (entries.get(name, 0) for name in ("mscale", "mscale_all_dim"))
    if not isinstance(scaling, Yarn) or (ours, all_dim) == (1, 1):
        return {}
    turned = _magnitude(scaling, float(ours or 1)) / (
        _magnitude(scaling, float(all_dim)) if ours else 1
    )
    root = (fields["nope_dim"] + fields["rope_dim"]) ** -0.5
    return {
        "rope_magnitude": turned,
        "attention_scale": root * _magnitude(scaling, float(all_dim)) ** 2,
    }


def _magnitude(scaling: Yarn, mscale: float) -> float:
    return 0.1 * mscale * math.log(scaling.factor) + 1.0


def to_config(model: DeepseekV3) -> dict[str, Any]:
    """The config.json of a model; ValueError where the format has no place for a field."""
    return {
        **_CONFIG.entries(model),
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": model.num_heads,
        "num_nextn_predict_layers": model.num_ahead,
        "rope_interleave": model.rope_layout == _LAYOUTS[True],
        "rope_parameters": {
            **write_rotary(model.rope_base, model.rope_scaling, model.context),
            **_write_magnitudes(model),
        },
    }


def _write_magnitudes(model: DeepseekV3) -> dict[str, float]:
    plain = model.attention_scale is None and model.rope_magnitude == 1.0
    if not isinstance(model.rope_scaling, Yarn):
        if plain:
            return {}
        raise ValueError(
            f"save_pretrained: the format 'deepseek_v3' has attention_scale="
            f"{model.attention_scale} and rope_magnitude={model.rope_magnitude} with YaRN alone; "
            "save the parameters with a checkpoint instead"
        )
    if plain:
        return {"mscale": 1.0, "mscale_all_dim": 1.0}
    root = (model.nope_dim + model.rope_dim) ** -0.5
    scale = root if model.attention_scale is None else model.attention_scale
    whole = (scale / root) ** 0.5
    slope = 0.1 * math.log(model.rope_scaling.factor)
    written = {"mscale": (model.rope_magnitude * whole - 1) / slope}
    return {**written, "mscale_all_dim": (whole - 1) / slope}


def tables(model: DeepseekV3) -> dict[str, list[Row]]:
    """Rows of all parameters, and of the routers' biases."""
    params, router = outer_rows(model), []
    for k in range(model.num_ahead):
        ours, theirs = f"ahead_{k}", f"model.layers.{model.depth + k}"
        params += [
            Row(f"{ours}/embed_norm/scale", f"{theirs}.enorm.weight"),
            Row(f"{ours}/hidden_norm/scale", f"{theirs}.hnorm.weight"),
            Row(f"{ours}/project/kernel", f"{theirs}.eh_proj.weight", LINEAR),
            Row(f"{ours}/final_norm/scale", f"{theirs}.shared_head.norm.weight"),
            Row(f"{ours}/block/mixer_norm/scale", f"{theirs}.input_layernorm.weight"),
            Row(f"{ours}/block/mlp_norm/scale", f"{theirs}.post_attention_layernorm.weight"),
        ]
    blocks = [f"block_{i}" for i in range(model.depth)]
    blocks += [f"ahead_{k}/block" for k in range(model.num_ahead)]
    for i, ours in enumerate(blocks):
        theirs = f"model.layers.{i}"
        params += _attention_rows(f"{ours}/mixer", f"{theirs}.self_attn", model)
        if i < model.dense_depth:
            params += gated_rows(f"{ours}/mlp", f"{theirs}.mlp")
            continue
        params += _mixture_rows(f"{ours}/mlp", f"{theirs}.mlp", model)
        bias = f"{theirs}.mlp.gate.e_score_correction_bias"
        router.append(Row(f"{ours}/mlp/router/bias", bias))
    return {"params": params, "router": router} if router else {"params": params}


def _attention_rows(ours: str, theirs: str, model: DeepseekV3) -> list[Row]:
    maps = {"kv_down": "kv_a_proj_with_mqa", "kv_up": "kv_b_proj", "out": "o_proj"}
    norms = {"kv_norm": "kv_a_layernorm"}
    if model.q_rank is None:
        maps["q"] = "q_proj"
    else:
        maps |= {"q_down": "q_a_proj", "q_up": "q_b_proj"}
        norms["q_norm"] = "q_a_layernorm"
    return [Row(f"{ours}/{o}/kernel", f"{theirs}.{t}.weight", LINEAR) for o, t in maps.items()] + [
        Row(f"{ours}/{o}/scale", f"{theirs}.{t}.weight") for o, t in norms.items()
    ]


def _mixture_rows(ours: str, theirs: str, model: DeepseekV3) -> list[Row]:
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    rows = expert_rows(ours, f"{theirs}.experts", model.num_experts, names)
    rows.append(Row(f"{ours}/router/kernel", f"{theirs}.gate.weight", LINEAR))
    if model.num_shared:
        rows += gated_rows(f"{ours}/shared", f"{theirs}.shared_experts")
    return rows


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    model=DeepseekV3,
    accepts=_CONFIG.accepts,
    from_config=from_config,
    to_config=to_config,
    tables=tables,
    example_inputs=lambda model: token_input(),
    free=frozenset({"context", "rope_base", "rope_scaling"}),
    ignored=r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight",
)
