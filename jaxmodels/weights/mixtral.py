"""Mixtral as `transformers` writes it: model type mixtral, a file entry an expert's matrix."""

from collections.abc import Mapping, Set
from typing import Any

from jaxmodels.models.language.mixtral import Mixtral
from jaxmodels.weights.config import REQUIRED, Config
from jaxmodels.weights.family import Family, token_input
from jaxmodels.weights.llama import (
    GROUPED,
    SIZES,
    attention_rows,
    expert_rows,
    outer_rows,
    read_decoder,
    write_decoder,
)
from jaxmodels.weights.table import LINEAR, Row

_EXPERTS = {
    "num_local_experts": ("num_experts", REQUIRED),
    "num_experts_per_tok": ("top_k", REQUIRED),
    "router_aux_loss_coef": ("balance_coefficient", 0.001),
}
_FIXED = {"hidden_act": "silu", "attention_bias": False, "router_jitter_noise": 0.0}
_CONFIG = Config("mixtral", "Mixtral", SIZES | GROUPED | _EXPERTS, _FIXED)
_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def from_config(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    """Our fields for a config.json; ValueError if it has what Mixtral has not."""
    fields = read_decoder(_CONFIG, 1_000_000.0)(config, names)
    seen = config.get("sliding_window")
    # Theirs counts the token itself.
    return {**fields, "window": None if seen is None else seen - 1}


def to_config(model: Mixtral) -> dict[str, Any]:
    """The config.json of a model."""
    seen = None if model.window is None else model.window + 1
    return {**write_decoder(_CONFIG)(model), "sliding_window": seen}


def tables(model: Mixtral) -> dict[str, list[Row]]:
    """Rows of all parameters."""
    rows = outer_rows(model)
    for i in range(model.depth):
        ours, theirs = f"block_{i}", f"model.layers.{i}"
        rows += attention_rows(f"{ours}/mixer", f"{theirs}.self_attn")
        experts = f"{theirs}.block_sparse_moe"
        rows += expert_rows(f"{ours}/mlp", f"{experts}.experts", model.num_experts, _NAMES)
        rows.append(Row(f"{ours}/mlp/router/kernel", f"{experts}.gate.weight", LINEAR))
    return {"params": rows}


MIXTRAL = Family(
    name="mixtral",
    model=Mixtral,
    accepts=_CONFIG.accepts,
    from_config=from_config,
    to_config=to_config,
    tables=tables,
    example_inputs=lambda model: token_input(),
    holds=lambda model: model.qk_norm is None,
    free=frozenset({"context", "rope_base", "rope_scaling", "window", "balance_coefficient"}),
)
