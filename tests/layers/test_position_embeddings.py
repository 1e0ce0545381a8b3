"""Position embeddings against GPT-2's and the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxmodels.layers.position_embeddings import LearnedPositions, SinusoidalPositions

POSITIONS = np.array([[0, 3, 10], [7, 7, 1]])


def test_learned_positions_equal_an_embedding_of_torch():
    theirs = torch.nn.Embedding(11, 6)
    table = jnp.asarray(theirs.weight.detach().numpy())
    layer = LearnedPositions(11, 6)
    out = jax.jit(layer.apply)({"params": {"embedding": table}}, POSITIONS)
    np.testing.assert_array_equal(out, theirs(torch.tensor(POSITIONS)).detach().numpy())
    params = jax.jit(layer.init)(jax.random.key(0), jnp.asarray(POSITIONS))["params"]
    assert params["embedding"].shape == (11, 6)
    assert 0.01 < np.std(params["embedding"]) < 0.03


def test_a_position_that_was_never_learned_is_not_a_number():
    layer = LearnedPositions(11, 6)
    variables = jax.jit(layer.init)(jax.random.key(0), jnp.asarray(POSITIONS))
    out = layer.apply(variables, jnp.array([[-1, 0, 10, 11]]))
    np.testing.assert_array_equal(np.isnan(out).all(-1), [[True, False, False, True]])
    assert not np.isnan(out[:, 1:3]).any()


def test_sinusoidal_positions_by_definition():
    out = SinusoidalPositions(6, jnp.bfloat16)(jnp.asarray(POSITIONS))
    assert out.dtype == jnp.bfloat16
    angles = POSITIONS[..., None] / 10_000.0 ** (2 * np.arange(3) / 6)
    for wave, mine in ((np.sin, out[..., ::2]), (np.cos, out[..., 1::2])):
        np.testing.assert_allclose(mine.astype(jnp.float32), wave(angles), atol=1e-2)
