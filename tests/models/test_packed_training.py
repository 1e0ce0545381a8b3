"""Training on packed documents against training on each of them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodels.data import TokenDocuments, pack_documents
from jaxmodels.models.language.decoder import Decoder

VOCAB, LENGTH = 41, 19
# Tokens of the documents; the same length twice or more, so that few programs are compiled.
SIZES = (12, 7, 7, 12, 12, 7)


def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, size).astype(np.int32) for size in SIZES]


def alone(model, params):
    """The mean over all targets of what each document costs alone, without any segment ids."""
    total = count = 0.0
    for size in sorted({*SIZES}):
        rows = np.stack([d for d in documents() if len(d) == size])
        logits, _ = model.apply({"params": params}, jnp.asarray(rows[:, :-1]))
        costs = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
        total, count = total + jnp.sum(costs), count + costs.size
    return total / count


@pytest.mark.parametrize("mixer", ["softmax", "gated_delta", "ssd"])
def test_packed_equals_alone_in_loss_and_gradients(mixer):
    options = {"num_heads": 2, "head_dim": 6}
    model = Decoder(width=20, depth=1, vocab_size=VOCAB, mixer=mixer, mixer_options=options)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))["params"]
    packed = pack_documents(TokenDocuments.join(documents()), LENGTH)
    assert len(packed) == len(SIZES) / 2 and packed.fill < 1
    arrays = packed.batch(np.arange(len(packed)), np.random.default_rng(0))
    batch = {name: jnp.asarray(array) for name, array in arrays.items()}

    def together(params):
        return model.loss(params, batch, jax.random.key(0))[0]

    want, wanted = jax.jit(jax.value_and_grad(lambda params: alone(model, params)))(params)
    found, gradient = jax.jit(jax.value_and_grad(together))(params)
    np.testing.assert_allclose(found, want, rtol=1e-6)

    def near(one, other):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())

    jax.tree.map(near, gradient, wanted)
