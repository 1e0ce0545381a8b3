"""Llama and Qwen3 as `transformers` writes them: model types llama and qwen3."""

from collections.abc import Callable, Mapping, Set
from typing import Any

from jaxmodels.models.language.language_model import LanguageModel
from jaxmodels.models.language.llama import Llama
from jaxmodels.models.language.qwen3 import Qwen3
from jaxmodels.weights.config import REQUIRED, Config
from jaxmodels.weights.family import Family, token_input
from jaxmodels.weights.rotary import read_rotary, write_rotary
from jaxmodels.weights.table import LINEAR, Row

SIZES = {
    "vocab_size": ("vocab_size", REQUIRED),
    "hidden_size": ("width", REQUIRED),
    "num_hidden_layers": ("depth", REQUIRED),
    "num_attention_heads": ("num_heads", REQUIRED),
    "intermediate_size": ("mlp_width", REQUIRED),
    "max_position_embeddings": ("context", REQUIRED),
    "rms_norm_eps": ("norm_eps", REQUIRED),
    "tie_word_embeddings": ("tied", False),
}
GROUPED = {"num_key_value_heads": ("num_kv_heads", REQUIRED), "head_dim": ("head_dim", None)}
PLAIN = {"hidden_act": "silu", "attention_bias": False}
_LLAMA = Config("llama", "Llama", SIZES | GROUPED, PLAIN | {"mlp_bias": False})
_QWEN3 = Config("qwen3", "Qwen3", SIZES | GROUPED, PLAIN | {"use_sliding_window": False})


def read_decoder(form: Config, base: float) -> Callable[[Mapping[str, Any], Set[str]], dict]:
    """From a config.json to fields, for a decoder with rotary positions.

    Args:
      form: of config.json.
      base: of the rotary positions, where config.json has none.
    """

    def from_config(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
        del names  # config says it all
        form.refuse(form.faults(config))
        rope_base, scaling = read_rotary(config, base)
        return {**form.sizes(config), "rope_base": rope_base, "rope_scaling": scaling}

    return from_config


def write_decoder(form: Config) -> Callable[[Llama], dict[str, Any]]:
    """From a module to its config.json, for a decoder with rotary positions."""

    def to_config(model: Llama) -> dict[str, Any]:
        return {
            **form.entries(model),
            "architectures": [f"{form.stem}ForCausalLM"],
            "rope_parameters": write_rotary(model.rope_base, model.rope_scaling, model.context),
        }

    return to_config


def outer_rows(model: LanguageModel) -> list[Row]:
    """Rows of everything outside the blocks, and of the blocks' norms."""
    rows = [
        Row("embed/embedding", "model.embed_tokens.weight"),
        Row("final_norm/scale", "model.norm.weight"),
    ]
    if not model.tied:
        rows.append(Row("head/kernel", "lm_head.weight", LINEAR))
    for i in range(model.depth):
        theirs = f"model.layers.{i}"
        rows += [
            Row(f"block_{i}/mixer_norm/scale", f"{theirs}.input_layernorm.weight"),
            Row(f"block_{i}/mlp_norm/scale", f"{theirs}.post_attention_layernorm.weight"),
        ]
    return rows


def attention_rows(ours: str, theirs: str, *, qk_norm: bool = False) -> list[Row]:
    """Rows of the four projections of attention, and of its norms."""
    names = {"q": "q", "k": "k", "v": "v", "out": "o"}
    rows = [
        Row(f"{ours}/{o}/kernel", f"{theirs}.{t}_proj.weight", LINEAR) for o, t in names.items()
    ]
    if qk_norm:
        rows += [Row(f"{ours}/{n}_norm/scale", f"{theirs}.{n}_norm.weight") for n in "qk"]
    return rows


def gated_rows(ours: str, theirs: str) -> list[Row]:
    """Rows of a SwiGLU feed-forward."""
    return [
        Row(f"{ours}/{name}/kernel", f"{theirs}.{name}_proj.weight", LINEAR)
        for name in ("gate", "up", "down")
    ]


def expert_rows(ours: str, theirs: str, count: int, names: Mapping[str, str]) -> list[Row]:
    """Rows of the experts' matrices, of which ours are stacked.

    Args:
      ours, theirs: where they are.
      count: E.
      names: ours to theirs.
    """
    return [
        Row(f"{ours}/{o}", tuple(f"{theirs}.{e}.{t}.weight" for e in range(count)), LINEAR)
        for o, t in names.items()
    ]


def tables(model: Llama) -> dict[str, list[Row]]:
    """Rows of all parameters."""
    rows = outer_rows(model)
    for i in range(model.depth):
        ours, theirs = f"block_{i}", f"model.layers.{i}"
        qk_norm = model.qk_norm is not None
        rows += attention_rows(f"{ours}/mixer", f"{theirs}.self_attn", qk_norm=qk_norm)
        rows += gated_rows(f"{ours}/mlp", f"{theirs}.mlp")
    return {"params": rows}


LLAMA = Family(
    name="llama",
    model=Llama,
    accepts=_LLAMA.accepts,
    from_config=read_decoder(_LLAMA, 10_000.0),
    to_config=write_decoder(_LLAMA),
    tables=tables,
    example_inputs=lambda model: token_input(),
    holds=lambda model: type(model) is Llama and model.qk_norm is None and model.window is None,
    free=frozenset({"context", "rope_base", "rope_scaling"}),
)
QWEN3 = Family(
    name="qwen3",
    model=Qwen3,
    accepts=_QWEN3.accepts,
    from_config=read_decoder(_QWEN3, 1_000_000.0),
    to_config=write_decoder(_QWEN3),
    tables=tables,
    example_inputs=lambda model: token_input(),
    holds=lambda model: type(model) is Qwen3 and model.qk_norm == "rms" and model.window is None,
    free=frozenset({"context", "rope_base", "rope_scaling"}),
)
