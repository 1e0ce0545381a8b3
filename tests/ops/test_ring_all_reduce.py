"""The ring's sums against NumPy's, and its bytes against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmodels.ops.ring_all_reduce import ring_all_gather, ring_all_reduce, ring_reduce_scatter
from jaxmodels.training.communication import bytes_sent

DEVICES = 8


def values(*shape):
    return np.random.default_rng(0).normal(size=(DEVICES, *shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(), (3,), (5, 13)])
def test_every_device_has_the_sum(shape):
    x = values(*shape)
    both = jax.pmap(lambda x: (ring_all_reduce(x, "i"), lax.psum(x, "i")), axis_name="i")
    found, psum = both(x)
    expected = np.broadcast_to(x.astype(np.float64).sum(axis=0), x.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, psum, rtol=1e-5, atol=1e-6)
    # The parts are copies of one sum, so that devices cannot drift apart.
    assert (np.asarray(found) == np.asarray(found)[:1]).all()


def test_its_halves_are_reduce_scatter_and_all_gather():
    x = values(DEVICES, 3)
    halves = jax.pmap(
        lambda x: (ring_reduce_scatter(x, "i"), ring_all_gather(x[0], "i")), axis_name="i"
    )
    mine, gathered = halves(x)
    np.testing.assert_allclose(mine, x.astype(np.float64).sum(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gathered, np.broadcast_to(x[:, 0], gathered.shape))


def test_it_sends_twice_the_size_less_one_part():
    mesh = jax.make_mesh((DEVICES,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("i")

    def sent(reduce):
        call = jax.shard_map(lambda x: reduce(x, "i"), mesh=mesh, in_specs=spec, out_specs=spec)
        x = jax.ShapeDtypeStruct((DEVICES * 64, 10), jnp.float32)
        return bytes_sent(jax.jit(call).lower(x).compile().as_text())

    part = 4 * 64 * 10 // DEVICES
    assert sent(ring_all_reduce) == {"collective-permute": 2 * (DEVICES - 1) * part}
    reduce = lambda x, axis: lax.pcast(lax.psum(x, axis), axis, to="varying")  # noqa: E731
    assert sent(reduce) == {"all-reduce": 2 * (DEVICES - 1) * part}
