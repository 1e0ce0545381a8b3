"""GPT-2 as `transformers` writes it: model type gpt2.

Their three input projections are one matrix, (in, out) as ours are. Files on the
hub that were written from the bare network lack the prefix "transformer.", and
keep the causal mask as a tensor.
"""

from collections.abc import Mapping, Set
from typing import Any

from jaxmodels.models.language.gpt2 import GPT2
from jaxmodels.weights.config import REQUIRED, Config
from jaxmodels.weights.family import Family, token_input
from jaxmodels.weights.table import Row, affine

_CONFIG = Config(
    "gpt2",
    "GPT2",
    {
        "n_embd": ("width", REQUIRED),
        "n_layer": ("depth", REQUIRED),
        "n_head": ("num_heads", REQUIRED),
        "n_inner": ("mlp_width", None),
        "n_positions": ("context", 1024),
        "vocab_size": ("vocab_size", 50_257),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
    },
    {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
)
_PREFIX = "transformer."


def from_config(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    """Our fields for a config.json; ValueError if it has what GPT-2 has not."""
    del names  # config says it all
    _CONFIG.refuse(_CONFIG.faults(config))
    return _CONFIG.sizes(config)


def to_config(model: GPT2) -> dict[str, Any]:
    """The config.json of a model."""
    return {**_CONFIG.entries(model), "architectures": ["GPT2LMHeadModel"]}


def tables(model: GPT2) -> dict[str, list[Row]]:
    """Rows of all parameters."""
    rows = [
        Row("embed/embedding", f"{_PREFIX}wte.weight"),
        Row("place/embedding", f"{_PREFIX}wpe.weight"),
        *affine("final_norm", f"{_PREFIX}ln_f"),
    ]
    for i in range(model.depth):
        ours, theirs = f"block_{i}", f"{_PREFIX}h.{i}"
        rows += affine(f"{ours}/mixer_norm", f"{theirs}.ln_1")
        rows += affine(f"{ours}/mlp_norm", f"{theirs}.ln_2")
        for kind, name in (("kernel", "weight"), ("bias", "bias")):
            joined = tuple(f"{ours}/mixer/{part}/{kind}" for part in "qkv")
            rows += [
                Row(joined, f"{theirs}.attn.c_attn.{name}"),
                Row(f"{ours}/mixer/out/{kind}", f"{theirs}.attn.c_proj.{name}"),
                Row(f"{ours}/mlp/up/{kind}", f"{theirs}.mlp.c_fc.{name}"),
                Row(f"{ours}/mlp/down/{kind}", f"{theirs}.mlp.c_proj.{name}"),
            ]
    return {"params": rows}


GPT2_FAMILY = Family(
    name="gpt2",
    model=GPT2,
    accepts=_CONFIG.accepts,
    from_config=from_config,
    to_config=to_config,
    tables=tables,
    example_inputs=lambda model: token_input(),
    ignored=r".*\.attn\.(masked_)?bias|lm_head\.weight",
    rename=lambda name: name if name.startswith(_PREFIX) else _PREFIX + name,
)
