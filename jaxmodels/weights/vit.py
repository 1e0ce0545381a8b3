"""ViT and DINOv2 as `transformers` writes them: model types vit and dinov2.

A class token, `ViTModel` with or without its pooler, and `…ForImageClassification`.
The names are those of the files on the hub, which all versions of transformers
read and write. A pooler beside a classifier has no part in its logits and is
dropped, as transformers does.
"""

from collections.abc import Mapping, Set
from typing import Any

from jaxmodels.models.vision.dinov2 import gated_width
from jaxmodels.models.vision.vit import VisionTransformer
from jaxmodels.weights.classifiers import REQUIRED, Config, require_fields
from jaxmodels.weights.family import Family, image_input
from jaxmodels.weights.table import PATCHES, Row, affine, dense, leading_axes

_COMMON = {
    "hidden_size": ("width", REQUIRED),
    "num_hidden_layers": ("depth", REQUIRED),
    "num_attention_heads": ("num_heads", REQUIRED),
    "image_size": ("image_size", 224),
    "num_channels": ("in_channels", 3),
    "hidden_dropout_prob": ("dropout", 0.0),
}
_FIXED = {"hidden_act": "gelu", "qkv_bias": True, "attention_probs_dropout_prob": 0.0}
_VIT = Config(
    "vit",
    "ViT",
    _COMMON
    | {
        "intermediate_size": ("hidden_width", REQUIRED),
        "patch_size": ("patch_size", 16),
        "layer_norm_eps": ("norm_eps", 1e-12),
    },
    _FIXED | {"pooler_act": "tanh"},
)
_DINOV2 = Config(
    "dinov2",
    "Dinov2",
    _COMMON
    | {
        "patch_size": ("patch_size", 14),
        "layer_norm_eps": ("norm_eps", 1e-6),
        "layerscale_value": ("layer_scale", 1.0),
        "use_swiglu_ffn": ("gated_mlp", False),
        "use_mask_token": ("mask_token", True),
        "drop_path_rate": ("drop_path", 0.0),
    },
    _FIXED,
)


def _vit_from_config(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    fields = _VIT.read(config, names)
    fields["pooler"] = not fields["num_classes"] and "pooler.dense.weight" in names
    return fields


def _vit_to_config(model: VisionTransformer) -> dict[str, Any]:
    _require_plain("vit", model)
    require_fields("vit", model, pool="token", gated_mlp=False, mask_token=False)
    if model.num_classes:
        require_fields("vit", model, pooler=False)
    hidden = {"intermediate_size": model.hidden_width or 4 * model.width}
    return {**_VIT.write(model), **hidden}


def _dinov2_from_config(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    fields = _DINOV2.read(config, names)
    fields["pool"] = "token_and_mean" if fields["num_classes"] else "token"
    fields["hidden_width"] = _dinov2_hidden(
        fields["width"], config.get("mlp_ratio", 4), fields["gated_mlp"]
    )
    return fields


def _dinov2_hidden(width: int, ratio: float | int, gated: bool) -> int:
    return gated_width(width, ratio) if gated else int(width * ratio)


def _dinov2_to_config(model: VisionTransformer) -> dict[str, Any]:
    _require_plain("dinov2", model)
    pool = "token_and_mean" if model.num_classes else "token"
    require_fields("dinov2", model, pool=pool, pooler=False)
    hidden = model.hidden_width or 4 * model.width
    ratio = round(hidden / model.width * (1.5 if model.gated_mlp else 1))
    if hidden != _dinov2_hidden(model.width, ratio, model.gated_mlp):
        raise ValueError(
            f"save_pretrained: the format 'dinov2' has no hidden_width={hidden} for "
            f"width={model.width}; save the parameters with a checkpoint instead"
        )
    return {**_DINOV2.write(model), "mlp_ratio": ratio}


def _require_plain(name: str, model: VisionTransformer) -> None:
    require_fields(name, model, mixer=None, num_registers=0)


def _tables(model: VisionTransformer) -> dict[str, list[Row]]:
    is_dinov2 = model.layer_scale is not None
    prefix = ("dinov2." if is_dinov2 else "vit.") if model.num_classes else ""
    block = f"{prefix}encoder.layer.{{block}}"
    attention = f"{block}.attention"
    embeddings = f"{prefix}embeddings"
    patches = f"{embeddings}.patch_embeddings.projection"
    rows = [
        Row("class_token", f"{embeddings}.cls_token", leading_axes(2)),
        Row("positions", f"{embeddings}.position_embeddings", leading_axes(1)),
        Row(
            "patch_embed/project/kernel",
            f"{patches}.weight",
            PATCHES,
        ),
        Row("patch_embed/project/bias", f"{patches}.bias"),
        *dense("blocks/attention/q", f"{attention}.attention.query"),
        *dense("blocks/attention/k", f"{attention}.attention.key"),
        *dense("blocks/attention/v", f"{attention}.attention.value"),
        *dense("blocks/attention/out", f"{attention}.output.dense"),
        *(_dinov2_rows(model, block) if is_dinov2 else _vit_rows(block)),
        *affine("norm", f"{prefix}layernorm"),
    ]
    if model.mask_token:
        rows.append(Row("mask", f"{embeddings}.mask_token", leading_axes(1)))
    if model.pooler:
        rows += dense("pool_projection", "pooler.dense")
    if model.num_classes:
        rows += dense("head", "classifier")
    return {"params": rows}


def _vit_rows(block: str) -> list[Row]:
    return [
        *affine("blocks/attention_norm", f"{block}.layernorm_before"),
        *affine("blocks/mlp_norm", f"{block}.layernorm_after"),
        *dense("blocks/mlp/up", f"{block}.intermediate.dense"),
        *dense("blocks/mlp/down", f"{block}.output.dense"),
    ]


def _dinov2_rows(model: VisionTransformer, block: str) -> list[Row]:
    up, down = ("weights_in", "weights_out") if model.gated_mlp else ("fc1", "fc2")
    return [
        *affine("blocks/attention_norm", f"{block}.norm1"),
        *affine("blocks/mlp_norm", f"{block}.norm2"),
        Row("blocks/attention_scale", f"{block}.layer_scale1.lambda1"),
        Row("blocks/mlp_scale", f"{block}.layer_scale2.lambda1"),
        *dense("blocks/mlp/up", f"{block}.mlp.{up}"),
        *dense("blocks/mlp/down", f"{block}.mlp.{down}"),
    ]


VIT = Family(
    name="vit",
    model=VisionTransformer,
    accepts=_VIT.accepts,
    from_config=_vit_from_config,
    to_config=_vit_to_config,
    tables=_tables,
    example_inputs=lambda model: image_input(model.image_size, model.in_channels),
    holds=lambda model: model.layer_scale is None,
    free=frozenset({"dropout", "drop_path"}),
    head="head",
    ignored=r"vit\.pooler\.dense\..*",
)
DINOV2 = Family(
    name="dinov2",
    model=VisionTransformer,
    accepts=_DINOV2.accepts,
    from_config=_dinov2_from_config,
    to_config=_dinov2_to_config,
    tables=_tables,
    example_inputs=lambda model: image_input(model.image_size, model.in_channels),
    holds=lambda model: model.layer_scale is not None,
    free=frozenset({"dropout", "drop_path"}),
    head="head",
)
