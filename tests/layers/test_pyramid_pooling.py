"""YOLO's pyramid against parallel pools in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_layers as oracle
from torch.nn import functional

from jaxmodels.layers.pyramid_pooling import SPP


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("sizes", [(5, 9, 13), (3, 7)])
def test_equals_parallel_pools_in_torch(train, sizes):
    model = SPP(5, kernel_sizes=sizes)
    x = np.random.default_rng(0).normal(size=(2, 13, 11, 6)).astype(np.float32)
    variables = oracle.random_variables(model, jnp.asarray(x))

    def forward(params, stats, x):
        silu = {"activation": functional.silu}
        x = oracle.conv_norm(params["reduce"], stats["reduce"], x, train, **silu)
        pools = [functional.max_pool2d(x, k, stride=1, padding=k // 2) for k in sizes]
        x = torch.cat([x, *pools], 1)
        return oracle.conv_norm(params["project"], stats["project"], x, train, **silu)

    oracle.check(model, variables, forward, x, train=train)


@pytest.mark.parametrize("sizes", [(5, 8), (9, 5), (4,)])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match=r"SPP: kernel_sizes=.* must be odd and ascending"):
        jax.eval_shape(SPP(5, kernel_sizes=sizes).init, jax.random.key(0), jnp.zeros((1, 5, 5, 4)))
