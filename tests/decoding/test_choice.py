"""The rule of choice, apart from what `generate` shows of it."""

import jax.numpy as jnp
import numpy as np

from jaxmodels.decoding.choice import likeliest


def test_likeliest_is_the_first_of_the_largest():
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (2, 3, 19)).astype(np.float32)
    logits[0, 0] = -np.inf
    logits[0, 1, :17] = -np.inf
    found = likeliest(jnp.asarray(logits))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, logits.argmax(-1))


def test_what_is_not_a_number_gives_a_token_of_the_vocabulary():
    assert 0 <= int(likeliest(jnp.full(7, jnp.nan))) < 7
