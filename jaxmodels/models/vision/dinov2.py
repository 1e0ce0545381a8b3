"""DINOv2: vision transformers trained without labels.

Paper    Oquab et al. 2024, "DINOv2: Learning Robust Visual Features without
         Supervision" (arXiv:2304.07193), the networks of table 17; registers from
         Darcet et al. 2024, "Vision Transformers Need Registers" (arXiv:2309.16588),
         by `num_registers=4`.
Differs  Networks only: `vit.VisionTransformer` with layer scale, a mask token and,
         in the giant one, SwiGLU.
Weights  transformers' `dinov2` (Dinov2Model, Dinov2ForImageClassification, which
         is `pool="token_and_mean"`), both ways.
"""

from jaxmodels.models.vision.vit import VisionTransformer
from jaxmodels.registry import register_model


def gated_width(width: int, ratio: float | int = 4) -> int:
    """Hidden width that gives SwiGLU's three matrices the size of two, a multiple of eight."""
    return (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8


def _published(width: int, depth: int, num_heads: int, overrides: dict) -> VisionTransformer:
    fields = {
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "image_size": 518,
        "patch_size": 14,
        "num_classes": 0,
        "layer_scale": 1.0,
        "mask_token": True,
    }
    return VisionTransformer(**{**fields, **overrides})


@register_model
def dinov2_small(**overrides) -> VisionTransformer:
    """DINOv2 ViT-S/14 without a head, positions for 518 x 518 pixels."""
    return _published(384, 12, 6, overrides)


@register_model
def dinov2_base(**overrides) -> VisionTransformer:
    """DINOv2 ViT-B/14 without a head, positions for 518 x 518 pixels."""
    return _published(768, 12, 12, overrides)


@register_model
def dinov2_large(**overrides) -> VisionTransformer:
    """DINOv2 ViT-L/14 without a head, positions for 518 x 518 pixels."""
    return _published(1024, 24, 16, overrides)


@register_model
def dinov2_giant(**overrides) -> VisionTransformer:
    """DINOv2 ViT-g/14 with SwiGLU, without a head, positions for 518 x 518 pixels."""
    gated = {"gated_mlp": True, "hidden_width": gated_width(1536)}
    return _published(1536, 40, 24, {**gated, **overrides})
