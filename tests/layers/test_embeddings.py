"""Time and class embeddings against `diffusers`' own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings

from jaxmodels.layers.embeddings import LabelEmbedding, TimestepEmbedding


def flax_dense(linear: torch.nn.Linear) -> dict:
    return {
        "kernel": jnp.asarray(linear.weight.detach().numpy().T),
        "bias": jnp.asarray(linear.bias.detach().numpy()),
    }


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return CombinedTimestepLabelEmbeddings(11, 13).eval()


def test_timestep_embedding_equals_diffusers(theirs):
    t = np.array([0, 0.5, 37, 999], np.float32)
    with torch.no_grad():
        expected = theirs.timestep_embedder(theirs.time_proj(torch.tensor(t)))
    embedder = theirs.timestep_embedder
    params = {"up": flax_dense(embedder.linear_1), "down": flax_dense(embedder.linear_2)}
    out = jax.jit(TimestepEmbedding(13).apply)({"params": params}, jnp.asarray(t))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_label_embedding_equals_diffusers(theirs):
    labels = np.array([0, 3, 10, 11])
    with torch.no_grad():
        expected = theirs.class_embedder(torch.tensor(labels))
    table = jnp.asarray(theirs.class_embedder.embedding_table.weight.detach().numpy())
    variables = {"params": {"table": {"embedding": table}}}
    out = jax.jit(LabelEmbedding(11, 13).apply)(variables, jnp.asarray(labels))
    np.testing.assert_array_equal(out, expected)


def test_dropped_labels_become_the_one_after_the_last():
    layer = LabelEmbedding(5, 3, dropout=0.25)
    labels = jnp.arange(4000) % 5
    table = jnp.arange(18.0).reshape(6, 3)
    variables = {"params": {"table": {"embedding": table}}}
    drop = jax.jit(lambda key: layer.apply(variables, labels, train=True, rngs={"dropout": key}))
    classes = np.asarray(drop(jax.random.key(0))[:, 0] / 3, int)
    dropped = classes == 5
    np.testing.assert_array_equal(classes[~dropped], np.asarray(labels)[~dropped])
    assert abs(dropped.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)
    assert not np.array_equal(drop(jax.random.key(0)), drop(jax.random.key(1)))


def test_initialisation_is_small():
    params = TimestepEmbedding(13).init(jax.random.key(0), jnp.zeros(2))["params"]
    assert np.std(params["up"]["kernel"]) == pytest.approx(0.02, rel=0.1)
    params = LabelEmbedding(97, 13).init(jax.random.key(0), jnp.zeros(2, int))["params"]
    assert params["table"]["embedding"].shape == (98, 13)
    assert np.std(params["table"]["embedding"]) == pytest.approx(0.02, rel=0.1)
