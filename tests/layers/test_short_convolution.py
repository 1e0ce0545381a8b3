"""The layer against torch's Conv1d with its own weights, and SiLU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.layers.short_convolution import ShortConvolution


@pytest.mark.parametrize("use_bias", [False, True])
def test_the_layer_is_a_padded_conv1d_and_silu(use_bias):
    x = np.random.default_rng(0).normal(size=(2, 11, 5)).astype(np.float32)
    conv = torch.nn.Conv1d(5, 5, 3, groups=5, padding=2, bias=use_bias)
    wanted = torch.nn.functional.silu(conv(torch.from_numpy(x).mT)[..., :11]).mT
    params = {"kernel": conv.weight.detach()[:, 0].T.numpy()}
    if use_bias:
        params["bias"] = conv.bias.detach().numpy()
    layer = ShortConvolution(size=3, use_bias=use_bias)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    assert {n: p.shape for n, p in params.items()} == {n: p.shape for n, p in shapes.items()}

    call = jax.jit(layer.apply)
    out, state = call({"params": params}, x)
    np.testing.assert_allclose(out, wanted.detach(), atol=1e-6)
    np.testing.assert_array_equal(state, x[:, -2:])
    first, state = call({"params": params}, x[:, :4])
    second, _ = call({"params": params}, x[:, 4:], state=state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), out, atol=1e-6)


def test_documents_reach_the_op():
    layer = ShortConvolution(size=3)
    x = jnp.ones((1, 6, 5))
    params = jax.jit(layer.init)(jax.random.key(0), x)
    out, _ = layer.apply(params, x, segment_ids=jnp.asarray([[0, 0, 0, 1, 1, 1]]))
    np.testing.assert_allclose(out[:, 3:], out[:, :3], rtol=1e-6)
    assert np.abs(out[:, 0] - out[:, 2]).max() > 1e-3


def test_the_kernel_starts_as_torch_has_it():
    """Uniform in +-1 / sqrt(W), and parameters are float32 whatever the computation is."""
    layer = ShortConvolution(size=4, dtype=jnp.bfloat16)
    x = jnp.zeros((1, 2, 4099))
    (out, _), params = layer.init_with_output(jax.random.key(0), x)
    kernel = params["params"]["kernel"]
    assert out.dtype == jnp.bfloat16 and kernel.dtype == jnp.float32
    assert 0.499 < float(jnp.abs(kernel).max()) <= 0.5
    np.testing.assert_allclose(kernel.std(), 0.5 / 3**0.5, rtol=0.02)
