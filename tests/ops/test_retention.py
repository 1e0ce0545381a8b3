"""Retention against the sum of its paper in NumPy float64."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmodels.ops.retention import retention, retention_decays

BATCH, LENGTH, HEADS, WIDTH, VALUE_WIDTH = 2, 19, 3, 5, 7


def inputs():
    rng = np.random.default_rng(0)
    widths = (WIDTH, WIDTH, VALUE_WIDTH)
    arrays = [rng.normal(size=(BATCH, LENGTH, HEADS, w)) for w in widths]
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def by_definition(q, k, v, decay):
    """out_t = sum over s <= t of decay^(t-s) (q_t . k_s) v_s"""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(v.shape)
    for t in range(LENGTH):
        for s in range(t + 1):
            faded = decay ** (t - s) * np.sum(q[:, t] * k[:, s], axis=-1)
            out[:, t] += faded[..., None] * v[:, s]
    return out


@pytest.mark.parametrize("form", ["chunked", "parallel", "recurrent"])
def test_values_are_the_papers_sum(form):
    decay = np.array([1.0, 0.9, 1e-6])
    arrays = inputs()
    out, state = jax.jit(lambda *a: retention(*a, form=form, chunk_size=8))(
        *arrays, jnp.asarray(decay, jnp.float32)
    )
    np.testing.assert_allclose(out, by_definition(*arrays, decay), rtol=1e-5, atol=1e-5)
    powers = decay ** np.arange(LENGTH)[::-1, None]
    wanted = np.einsum("th,bthk,bthv->bhkv", powers, *arrays[1:])
    np.testing.assert_allclose(state, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_sum():
    """The sum is bilinear in each argument but the decay, whose derivative is differenced."""
    q, k, v = inputs()
    decay = np.array([0.97, 0.9, 0.5])
    weight = np.random.default_rng(1).normal(size=v.shape)

    def loss(q, k, v, decay):
        return jnp.sum(weight * retention(q, k, v, decay, chunk_size=8)[0])

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, jnp.asarray(decay, jnp.float32))
    rng = np.random.default_rng(2)
    for place, array in enumerate((q, k, v)):
        along = rng.normal(size=array.shape)
        arrays = [q, k, v]
        arrays[place] = along
        wanted = np.sum(weight * by_definition(*arrays, decay))
        np.testing.assert_allclose(np.sum(found[place] * along), wanted, rtol=1e-5)
    for head in range(HEADS):
        step = 1e-6 * np.eye(HEADS)[head]
        ends = [np.sum(weight * by_definition(q, k, v, decay + s)) for s in (-step, step)]
        np.testing.assert_allclose(found[3][head], (ends[1] - ends[0]) / 2e-6, rtol=1e-4)


def test_the_papers_decays():
    np.testing.assert_allclose(retention_decays(3), [31 / 32, 63 / 64, 127 / 128], rtol=1e-7)


@pytest.mark.parametrize(
    "decay, options, message",
    [
        ([1.0, 0.5, 0.0], {}, r"decay holds 0, outside \(0, 1\]"),
        ([1.0, 1.5, 0.5], {}, r"decay holds 1.5, outside \(0, 1\]"),
        ([1.0, 0.5], {}, r"decay \(2,\) must be one a head, \(H,\) = \(3,\)"),
        ([1.0, 0.5, 0.5], {"form": "serial"}, r"form='serial' is unknown"),
        ([1.0, 0.5, 0.5], {"chunk_size": -1}, r"chunk_size=-1 must be at least 1"),
    ],
)
def test_bad_input_is_named(decay, options, message, monkeypatch):
    # The suite's checks of annotations would speak first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=rf"^retention: {message}"):
        retention(*inputs(), jnp.asarray(decay), **options)
