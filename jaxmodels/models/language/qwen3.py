"""Qwen3: Llama's decoder with queries and keys normalised a head.

Paper    Yang et al. 2025, "Qwen3 Technical Report", section 2 (arXiv:2505.09388):
         grouped queries, SwiGLU, rotary positions and RMSNorm, without the bias of
         Qwen2 and with QK-norm.
Weights  `transformers` folders of model type "qwen3", both ways.
"""

from jaxmodels.models.language.llama import Llama
from jaxmodels.registry import register_model


class Qwen3(Llama):
    """Qwen3; see `Llama` for the attributes and `LanguageModel` for its calls.

    Heads are wider than the model's width over their number in most sizes.
    """

    head_dim: int | None = 128
    vocab_size: int = 151_936
    rope_base: float = 1_000_000.0
    qk_norm: str | None = "rms"
    context: int | None = 40_960
    norm_eps: float = 1e-6


@register_model
def qwen3_0_6b(**overrides) -> Qwen3:
    """0.6 billion parameters."""
    return Qwen3(**{**_sizes(1024, 28, 16, 3072, tied=True), **overrides})


@register_model
def qwen3_1_7b(**overrides) -> Qwen3:
    """1.7 billion parameters."""
    return Qwen3(**{**_sizes(2048, 28, 16, 6144, tied=True), **overrides})


@register_model
def qwen3_4b(**overrides) -> Qwen3:
    """4 billion parameters."""
    return Qwen3(**{**_sizes(2560, 36, 32, 9728, tied=True), **overrides})


@register_model
def qwen3_8b(**overrides) -> Qwen3:
    """8.2 billion parameters."""
    return Qwen3(**{**_sizes(4096, 36, 32, 12_288), **overrides})


@register_model
def qwen3_14b(**overrides) -> Qwen3:
    """14.8 billion parameters."""
    return Qwen3(**{**_sizes(5120, 40, 40, 17_408), **overrides})


@register_model
def qwen3_32b(**overrides) -> Qwen3:
    """32.8 billion parameters."""
    return Qwen3(**{**_sizes(5120, 64, 64, 25_600), **overrides})


def _sizes(width: int, depth: int, num_heads: int, mlp_width: int, tied: bool = False) -> dict:
    return {
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "num_kv_heads": 8,
        "mlp_width": mlp_width,
        "tied": tied,
    }
