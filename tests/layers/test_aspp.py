"""ASPP against its composition in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_layers as oracle

from jaxmodels.layers.aspp import ASPP


def image(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_equals_torch(separable, train):
    model = ASPP(5, rates=(1, 2, 3), separable=separable, output_stride=8)
    x = image(2, 7, 11, 3)
    variables = oracle.random_variables(model, jnp.asarray(x))
    unit = oracle.separable if separable else oracle.conv_norm
    oracle.check(
        model,
        variables,
        lambda p, s, x: oracle.aspp(p, s, x, train, (2, 4, 6), unit),
        x,
        train=train,
    )


def test_rates_follow_the_output_stride():
    """A pixel far off in the image is out of reach of the stride-16 rates on a stride-8 map."""

    def reach(output_stride):
        model = ASPP(2, output_stride=output_stride, norm="frozen")
        x = jnp.ones((1, 1, 81, 1))
        variables = jax.tree.map(jnp.ones_like, model.init(jax.random.key(0), x))
        mean = jnp.zeros((1, 1, 81, 1))

        def centre(x):
            return model.apply(variables, x)[0, 0, 40, 0]

        gradient = np.asarray(jax.grad(centre)(x + mean)[0, 0, :, 0])
        # What the mean of the map passes on is the same everywhere.
        return np.flatnonzero(~np.isclose(gradient, gradient[0])) - 40

    np.testing.assert_array_equal(reach(16), [-18, -12, -6, 0, 6, 12, 18])
    np.testing.assert_array_equal(reach(8), [-36, -24, -12, 0, 12, 24, 36])


def test_rates_that_do_not_fit():
    with pytest.raises(ValueError, match=r"ASPP: rates=\(6, 12, 17\).* output_stride=32"):
        jax.eval_shape(
            ASPP(5, rates=(6, 12, 17), output_stride=32).init,
            jax.random.key(0),
            jnp.zeros((1, 5, 5, 3)),
        )
