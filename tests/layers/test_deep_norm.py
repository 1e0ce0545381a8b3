"""DeepNorm against torch's layer norm and the scales that the paper prints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.layers.deep_norm import DeepNorm, deep_norm_scales


def test_equals_torchs_norm_of_the_weighted_sum():
    rng = np.random.default_rng(0)
    x, branch, weight, bias = (rng.normal(size=s) for s in ((2, 3, 7), (2, 3, 7), 7, 7))
    layer = DeepNorm(num_blocks=100)
    variables = {"params": {"norm": {"scale": weight, "bias": bias}}}
    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (variables, x, branch))
    shapes = jax.eval_shape(layer.init, jax.random.key(0), *arrays[1:])
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)
    total = torch.tensor(200**0.25 * x + branch)
    want = torch.nn.functional.layer_norm(total, (7,), torch.tensor(weight), torch.tensor(bias))
    np.testing.assert_allclose(layer.apply(*arrays), want, rtol=1e-4, atol=1e-5)


def test_scales_are_the_papers():
    """18 blocks of a decoder: alpha = 36^(1/4) = 2.449, beta = 144^(-1/4) = 0.289."""
    np.testing.assert_allclose(deep_norm_scales(18), (6**0.5, 12**-0.5))
    with pytest.raises(ValueError, match="deep_norm_scales: num_blocks=0 must be at least 1"):
        deep_norm_scales(0)
