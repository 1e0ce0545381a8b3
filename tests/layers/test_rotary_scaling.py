"""Stretched rotary attention against the rotary embeddings of `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from jaxmodels.layers.positions import Rotary
from jaxmodels.layers.rotary_scaling import DynamicNtk, Interpolation, Llama3, NtkAware, Yarn

B, T, H, G, K, BASE, TRAINED = 2, 13, 6, 3, 10, 53.0, 7
CASES = {
    "default": (None, {}),
    "linear": (Interpolation(3.0), {"factor": 3.0}),
    "dynamic": (DynamicNtk(TRAINED, 2.0), {"factor": 2.0}),
    "yarn": (Yarn(3.0, TRAINED), {"factor": 3.0}),
    "llama3": (
        Llama3(3.0, TRAINED, 0.1, 0.7),
        {"factor": 3.0, "low_freq_factor": 0.1, "high_freq_factor": 0.7},
    ),
}


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


Q, KEYS, VALUES = draw(0, B, T, H, K), draw(1, B, T, G, K), draw(2, B, T, G, K)


def ours(scheme, documents=None):
    attend = jax.jit(
        lambda q, k, v, places, ids: scheme.attend(
            q, scheme.keys(k, places), v, places, places, causal=True, segment_ids=ids
        )
    )
    places = jnp.arange(T) if documents is None else jnp.asarray(documents[1])
    ids = None if documents is None else jnp.broadcast_to(jnp.asarray(documents[0]), (B, T))
    return attend(Q, KEYS, VALUES, jnp.broadcast_to(places, (B, T)), ids)


def theirs(kind, parameters, rows=slice(0, T)):
    q, k, v = (torch.tensor(x[:, rows]).transpose(1, 2) for x in (Q, KEYS, VALUES))
    parameters = {"rope_type": kind, "rope_theta": BASE, **parameters}
    if kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = TRAINED
    config = LlamaConfig(
        hidden_size=H * K,
        num_attention_heads=H,
        max_position_embeddings=TRAINED,
        rope_parameters=parameters,
    )
    length = q.shape[2]
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(length).expand(B, length))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).numpy()


@pytest.mark.parametrize("kind", CASES)
def test_attention_equals_transformers(kind):
    scaling, parameters = CASES[kind]
    out = ours(Rotary(BASE, scaling=scaling))
    np.testing.assert_allclose(out, theirs(kind, parameters), rtol=1e-4, atol=2e-5)


def test_ntk_aware_is_dynamic_ntk_at_its_length():
    out = ours(Rotary(BASE, scaling=NtkAware(T / TRAINED)))
    expected = ours(Rotary(BASE, scaling=DynamicNtk(TRAINED)))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_dynamic_ntk_stretches_every_document_by_its_own_length():
    """A row of a long and a short document equals the two rows of transformers."""
    cut = 11
    documents = np.arange(T) >= cut, np.where(np.arange(T) < cut, np.arange(T), np.arange(T) - cut)
    out = ours(Rotary(BASE, scaling=CASES["dynamic"][0]), (documents[0].astype(int), documents[1]))
    for rows in (slice(0, cut), slice(cut, T)):
        expected = theirs("dynamic", {"factor": 2.0}, rows)
        np.testing.assert_allclose(out[:, rows], expected, rtol=1e-4, atol=2e-5)
