"""A small DeepSeek-V3, and that of `transformers` with the same weights."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
)

from jaxmodels.layers.rotary_scaling import Yarn
from jaxmodels.models.language.deepseek_v3 import DeepseekV3

BATCH, LENGTH, VOCAB, WIDTH, DEPTH, AHEAD = 2, 19, 37, 22, 2, 2
HEADS, Q_RANK, KV_RANK, NOPE, ROPE, VALUE = 3, 13, 11, 5, 6, 7
DENSE, EXPERT, EXPERTS, GROUPS, SHARED = 29, 17, 6, 3, 2
WEIGHT = 0.7


def ours(**overrides):
    fields = {
        "vocab_size": VOCAB,
        "width": WIDTH,
        "depth": DEPTH,
        "dense_depth": 1,
        "num_heads": HEADS,
        "q_rank": Q_RANK,
        "kv_rank": KV_RANK,
        "nope_dim": NOPE,
        "rope_dim": ROPE,
        "value_dim": VALUE,
        "mlp_width": DENSE,
        "expert_width": EXPERT,
        "num_experts": EXPERTS,
        "num_shared": SHARED,
        "top_k": 3,
        "groups": GROUPS,
        "top_groups": 2,
        "rope_base": 500.0,
        "rope_scaling": Yarn(factor=4.0, train_length=7),
        "num_ahead": AHEAD,
        "ahead_weight": WEIGHT,
        "balance_coefficient": 0.0,
        "norm_eps": 0.3,
    }
    return DeepseekV3(**{**fields, **overrides})


@functools.cache
def theirs():
    """Their model and two of their modules that look ahead."""
    config = DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        first_k_dense_replace=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=Q_RANK,
        kv_lora_rank=KV_RANK,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        intermediate_size=DENSE,
        moe_intermediate_size=EXPERT,
        n_routed_experts=EXPERTS,
        n_shared_experts=SHARED,
        num_experts_per_tok=3,
        n_group=GROUPS,
        topk_group=2,
        max_position_embeddings=28,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 7,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        rms_norm_eps=0.3,
        tie_word_embeddings=False,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = DeepseekV3ForCausalLM(config).eval()
    # Their modules stand after the dense layers, whatever their number.
    config.first_k_dense_replace = 0
    model.ahead = torch.nn.ModuleList(
        MtpLayer(config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, k) for k in range(AHEAD)
    )
    torch.manual_seed(0)
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        if "norm" in name:
            torch.nn.init.uniform_(value, 0.5, 2.0)
        elif "inv_freq" not in name:
            torch.nn.init.normal_(value, 0.0, 0.3)
    return model


def tree(model, read=lambda weight: weight.detach()):
    """Our parameters from theirs, or from their gradients."""

    def array(weight):
        return jnp.asarray(read(weight).numpy())

    def linears(parent, names):
        return {
            ours: {"kernel": array(getattr(parent, name).weight).T} for ours, name in names.items()
        }

    def norm(layer):
        return {"scale": array(layer.weight)}

    gated = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    attention = {"q_down": "q_a_proj", "q_up": "q_b_proj", "kv_down": "kv_a_proj_with_mqa"}
    attention |= {"kv_up": "kv_b_proj", "out": "o_proj"}

    def experts(mlp):
        if not hasattr(mlp, "experts"):
            return linears(mlp, gated)
        gate, up = jnp.split(array(mlp.experts.gate_up_proj).swapaxes(1, 2), 2, axis=-1)
        return {
            "router": {"kernel": array(mlp.gate.weight).T},
            "gate": gate,
            "up": up,
            "down": array(mlp.experts.down_proj).swapaxes(1, 2),
            "shared": linears(mlp.shared_experts, gated),
        }

    def block(layer):
        latents = {
            "q_norm": norm(layer.self_attn.q_a_layernorm),
            "kv_norm": norm(layer.self_attn.kv_a_layernorm),
        }
        return {
            "mixer_norm": norm(layer.input_layernorm),
            "mlp_norm": norm(layer.post_attention_layernorm),
            "mixer": latents | linears(layer.self_attn, attention),
            "mlp": experts(layer.mlp),
        }

    params = {
        "embed": {"embedding": array(model.model.embed_tokens.weight)},
        "final_norm": norm(model.model.norm),
        **linears(model, {"head": "lm_head"}),
    }
    for i, layer in enumerate(model.model.layers):
        params[f"block_{i}"] = block(layer)
    for i, layer in enumerate(model.ahead):
        params[f"ahead_{i}"] = {
            "block": block(layer.mtp_block),
            "embed_norm": norm(layer.enorm),
            "hidden_norm": norm(layer.hnorm),
            "final_norm": norm(layer.post_norm),
            **linears(layer, {"project": "eh_proj"}),
        }
    return params


def biases(model):
    """The collection "router"."""

    def of(layer):
        return {"mlp": {"router": {"bias": jnp.asarray(layer.mlp.gate.e_score_correction_bias)}}}

    found = {f"block_{i}": of(model.model.layers[i]) for i in range(1, DEPTH)}
    return found | {f"ahead_{i}": {"block": of(m.mtp_block)} for i, m in enumerate(model.ahead)}


def variables():
    return {"params": tree(theirs()), "router": biases(theirs())}


def draw(length=LENGTH + 1):
    return np.random.default_rng(1).integers(0, VOCAB, (BATCH, length))


def their_hidden(tokens, stride=1):
    """Hidden states of the model and of each module, of one text (1, T)."""
    model = theirs()
    places = stride * torch.arange(tokens.shape[1])[None]
    seen = torch.ones_like(tokens)  # without it, a gap between positions is a border to them
    found = [model.model(tokens, attention_mask=seen, position_ids=places).last_hidden_state]
    for k, module in enumerate(model.ahead[: tokens.shape[1] - 1], 1):
        embedded, at = model.model.embed_tokens(tokens[:, k:]), places[:, :-k]
        hidden = torch.ones(at.shape[1], at.shape[1], dtype=torch.bool).triu(1)
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[None, None]
        angles = model.model.rotary_emb(embedded, at)
        found.append(module(embedded, found[-1][:, :-1], angles, mask, at, None))
    return found
