"""DiT as `diffusers` writes it: class DiTTransformer2DModel."""

from collections.abc import Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.models.generative.dit import DiT
from jaxmodels.weights.classifiers import require_fields
from jaxmodels.weights.family import Family
from jaxmodels.weights.table import PATCHES, Row, dense

CLASS_NAME = "DiTTransformer2DModel"

# Sizes: their field to ours.
_SIZES = {
    "sample_size": "input_size",
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "num_layers": "depth",
    "num_attention_heads": "num_heads",
    "num_embeds_ada_norm": "num_classes",
}
_HEAD_WIDTH = "attention_head_dim"
# What a DiT is by definition; a file that says otherwise is another network.
_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
    "norm_type": "ada_norm_zero",
    "upcast_attention": False,
}
# Written by others without meaning for this network.
_IDLE = {"norm_num_groups"}


_BLOCK = "transformer_blocks.{block}"
# They keep a copy of these embeddings in every block.
_EMBEDDING = f"{_BLOCK}.norm1.emb"

ROWS = [
    Row("patch_embed/project/kernel", "pos_embed.proj.weight", PATCHES),
    Row("patch_embed/project/bias", "pos_embed.proj.bias"),
    *dense("timestep_embedding/up", f"{_EMBEDDING}.timestep_embedder.linear_1", tied=True),
    *dense("timestep_embedding/down", f"{_EMBEDDING}.timestep_embedder.linear_2", tied=True),
    Row(
        "label_embedding/table/embedding",
        f"{_EMBEDDING}.class_embedder.embedding_table.weight",
        tied=True,
    ),
    *dense("blocks/modulation/project", f"{_BLOCK}.norm1.linear"),
    *dense("blocks/attention/q", f"{_BLOCK}.attn1.to_q"),
    *dense("blocks/attention/k", f"{_BLOCK}.attn1.to_k"),
    *dense("blocks/attention/v", f"{_BLOCK}.attn1.to_v"),
    *dense("blocks/attention/out", f"{_BLOCK}.attn1.to_out.0"),
    *dense("blocks/mlp/up", f"{_BLOCK}.ff.net.0.proj"),
    *dense("blocks/mlp/down", f"{_BLOCK}.ff.net.2"),
    *dense("final/modulation/project", "proj_out_1"),
    *dense("final/project", "proj_out_2"),
]


def accepts(config: Mapping[str, Any]) -> bool:
    """Whether config.json describes a DiT; folders older than its class name do so too."""
    name = config.get("_class_name")
    older = name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"
    return name == CLASS_NAME or older


def from_config(config: Mapping[str, Any], names: Set[str] = frozenset()) -> dict[str, Any]:
    """Our fields for a config.json.

    Raises:
      ValueError: a size is missing, or something a DiT does not have is switched on.
    """
    del names  # config says it all
    known = {*_SIZES, _HEAD_WIDTH, *_FIXED, *_IDLE}
    faults = [f"{name} is missing" for name in (*_SIZES, _HEAD_WIDTH) if name not in config]
    faults += [
        f"{name}={config[name]!r}, but a DiT has {value!r}"
        for name, value in _FIXED.items()
        if config.get(name, value) != value
    ]
    faults += [
        f"{name}={value!r} is unknown"
        for name, value in config.items()
        if name not in known and not name.startswith("_") and value not in (None, False)
    ]
    if faults:
        raise ValueError(f"load_pretrained: config.json is not of a DiT: {'; '.join(faults)}")
    fields = {ours: config[theirs] for theirs, ours in _SIZES.items()}
    return {**fields, "width": config["num_attention_heads"] * config[_HEAD_WIDTH]}


def to_config(model: DiT) -> dict[str, Any]:
    """The config.json of a model.

    Raises:
      ValueError: the format has no place for a field of the model.
    """
    require_fields(CLASS_NAME, model, mixer=None)
    if model.mlp_ratio != 4:
        raise ValueError(
            f"save_pretrained: {CLASS_NAME} always has mlp_ratio=4, this model {model.mlp_ratio}; "
            f"save its parameters with a checkpoint instead"
        )
    sizes = {theirs: getattr(model, ours) for theirs, ours in _SIZES.items()}
    return {
        "_class_name": CLASS_NAME,
        **sizes,
        _HEAD_WIDTH: model.width // model.num_heads,
        **_FIXED,
    }


def example_inputs(model: DiT) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of the arguments of a call with one image."""
    image = (1, model.input_size, model.input_size, model.in_channels)
    return (
        jax.ShapeDtypeStruct(image, jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )


FAMILY = Family(
    name=CLASS_NAME,
    model=DiT,
    accepts=accepts,
    from_config=from_config,
    to_config=to_config,
    tables=lambda model: {"params": ROWS},
    example_inputs=example_inputs,
    weights_file="diffusion_pytorch_model.safetensors",
)
