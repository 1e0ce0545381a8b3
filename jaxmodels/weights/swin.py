"""Swin v1 and v2 as `transformers` writes them: model types swin and swinv2."""

from collections.abc import Iterator, Mapping, Set
from typing import Any

from jaxmodels.models.vision.swin import SwinTransformer
from jaxmodels.models.vision.swin_v2 import SwinTransformerV2
from jaxmodels.weights.classifiers import REQUIRED, Config
from jaxmodels.weights.family import Family, image_input
from jaxmodels.weights.table import PATCHES, Row, affine, dense, trailing_axes

_COMMON = {
    "embed_dim": ("width", REQUIRED),
    "depths": ("depths", REQUIRED),
    "num_heads": ("num_heads", REQUIRED),
    "window_size": ("window", 7),
    "patch_size": ("patch_size", 4),
    "num_channels": ("in_channels", 3),
    "mlp_ratio": ("mlp_ratio", 4.0),
    "hidden_dropout_prob": ("dropout", 0.0),
    "drop_path_rate": ("drop_path", 0.1),
}
_FIXED = {
    "hidden_act": "gelu",
    "qkv_bias": True,
    "use_absolute_embeddings": False,
    "layer_norm_eps": 1e-5,
    "attention_probs_dropout_prob": 0.0,
}
_V1 = Config("swin", "Swin", _COMMON, _FIXED)
_V2 = Config(
    "swinv2",
    "Swinv2",
    _COMMON
    | {
        "image_size": ("image_size", 224),
        "pretrained_window_sizes": ("trained_windows", (0, 0, 0, 0)),
    },
    _FIXED,
)


def _blocks(model: SwinTransformer, prefix: str) -> Iterator[tuple[str, str]]:
    for stage, depth in enumerate(model.depths):
        for block in range(depth):
            yield f"stages_{stage}_{block}", f"{prefix}encoder.layers.{stage}.blocks.{block}"


def _rows(model: SwinTransformer, prefix: str) -> list[Row]:
    """What both versions have."""
    patches = f"{prefix}embeddings.patch_embeddings.projection"
    rows = [
        Row("patch_embed/project/kernel", f"{patches}.weight", PATCHES),
        Row("patch_embed/project/bias", f"{patches}.bias"),
        *affine("patch_norm", f"{prefix}embeddings.norm"),
        *affine("norm", f"{prefix}layernorm"),
    ]
    for ours, theirs in _blocks(model, prefix):
        attention = f"{theirs}.attention.self"
        rows += [
            *dense(f"{ours}/attention/q", f"{attention}.query"),
            *dense(
                f"{ours}/attention/k",
                f"{attention}.key",
                bias=not isinstance(model, SwinTransformerV2),
            ),
            *dense(f"{ours}/attention/v", f"{attention}.value"),
            *dense(f"{ours}/attention/out", f"{theirs}.attention.output.dense"),
            *affine(f"{ours}/attention_norm", f"{theirs}.layernorm_before"),
            *affine(f"{ours}/mlp_norm", f"{theirs}.layernorm_after"),
            *dense(f"{ours}/mlp/up", f"{theirs}.intermediate.dense"),
            *dense(f"{ours}/mlp/down", f"{theirs}.output.dense"),
        ]
    for stage in range(len(model.depths) - 1):
        merge = f"{prefix}encoder.layers.{stage}.downsample"
        rows += dense(f"merges_{stage}/reduce", f"{merge}.reduction", bias=False)
        rows += affine(f"merges_{stage}/norm", f"{merge}.norm")
    return rows + (dense("head", "classifier") if model.num_classes else [])


def _tables_v1(model: SwinTransformer) -> dict[str, list[Row]]:
    prefix = "swin." if model.num_classes else ""
    table = "attention.self.relative_position_bias_table"
    biases = [
        Row(f"{ours}/attention/position_bias", f"{theirs}.{table}")
        for ours, theirs in _blocks(model, prefix)
    ]
    return {"params": _rows(model, prefix) + biases}


def _tables_v2(model: SwinTransformerV2) -> dict[str, list[Row]]:
    prefix = "swinv2." if model.num_classes else ""
    rows = _rows(model, prefix)
    for ours, theirs in _blocks(model, prefix):
        attention = f"{theirs}.attention.self"
        position = f"{attention}.continuous_position_bias_mlp"
        rows += [
            Row(f"{ours}/attention/logit_scale", f"{attention}.logit_scale", trailing_axes(2)),
            *dense(f"{ours}/attention/position_up", f"{position}.0"),
            *dense(f"{ours}/attention/position_down", f"{position}.2", bias=False),
        ]
    return {"params": rows}


def _v1_to_config(model: SwinTransformer) -> dict[str, Any]:
    return {**_V1.write(model), "image_size": 32 * model.window}


def _v2_from_config(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    fields = _V2.read(config, names)
    # Their default has four windows whatever the number of stages.
    return {**fields, "trained_windows": fields["trained_windows"][: len(fields["depths"])]}


# Tables that follow from the window, which older versions of transformers stored.
_BUFFERS = r".*\.(relative_position_index|relative_coords_table)"
_FREE = frozenset({"dropout", "drop_path"})

SWIN = Family(
    name="swin",
    model=SwinTransformer,
    accepts=_V1.accepts,
    from_config=_V1.read,
    to_config=_v1_to_config,
    tables=_tables_v1,
    example_inputs=lambda model: image_input(model.patch_size * model.window, model.in_channels),
    holds=lambda model: not isinstance(model, SwinTransformerV2),
    free=_FREE,
    head="head",
    ignored=_BUFFERS,
)
SWIN_V2 = Family(
    name="swinv2",
    model=SwinTransformerV2,
    accepts=_V2.accepts,
    from_config=_v2_from_config,
    to_config=_V2.write,
    tables=_tables_v2,
    example_inputs=lambda model: image_input(model.patch_size * model.window, model.in_channels),
    free=_FREE,
    head="head",
    ignored=_BUFFERS,
)
