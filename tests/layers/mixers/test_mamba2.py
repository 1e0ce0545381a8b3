"""The layer against Mamba2Mixer of transformers with its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from jaxmodels.layers.mixers.mamba2 import Mamba2

BATCH, TIME, WIDTH, HEADS, HEAD_DIM, STATE, GROUPS, CONV = 2, 29, 12, 6, 4, 5, 2, 3


def module():
    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=WIDTH,
        expand=2,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        state_size=STATE,
        n_groups=GROUPS,
        conv_kernel=CONV,
        chunk_size=11,
        use_bias=True,
        num_hidden_layers=1,
    )
    mixer = Mamba2Mixer(config, layer_idx=0)
    for name, parameter in mixer.named_parameters():
        # Weights of a size at which every one of them matters.
        torch.nn.init.normal_(parameter, 0.0 if "bias" in name else 0.3, 0.6)
    return mixer.eval()


def our_tree(mixer, read):
    """Our parameters, or their gradients, from the torch module's."""

    def get(name):
        return jnp.asarray(read(mixer.get_parameter(name)).detach().numpy())

    return {
        "in": {"kernel": get("in_proj.weight").T, "bias": get("in_proj.bias")},
        "conv": {"kernel": get("conv1d.weight")[:, 0].T, "bias": get("conv1d.bias")},
        "dt_bias": get("dt_bias"),
        "A_log": get("A_log"),
        "D": get("D"),
        "norm": {"scale": get("norm.weight").reshape(GROUPS, -1)},
        "out": {"kernel": get("out_proj.weight").T, "bias": get("out_proj.bias")},
    }


def test_values_and_gradients_match_transformers():
    theirs = module()
    ours = Mamba2(
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        state_dim=STATE,
        num_groups=GROUPS,
        conv_size=CONV,
        use_bias=True,
        chunk_size=8,
    )
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, BATCH, TIME, WIDTH)).astype(np.float32)
    their_x = torch.tensor(x, requires_grad=True)
    their_out = theirs(their_x)
    (their_out * torch.from_numpy(weight)).sum().backward()
    params = our_tree(theirs, lambda parameter: parameter)

    def loss(params, x):
        out, _ = ours.apply({"params": params}, x)
        return jnp.sum(weight * out), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (d_params, d_x), out = run(params, jnp.asarray(x))
    wanted = (
        our_tree(theirs, lambda parameter: parameter.grad),
        jnp.asarray(their_x.grad.numpy()),
        jnp.asarray(their_out.detach().numpy()),
    )

    def close(found, wanted):
        atol = 1e-4 * max(1.0, float(jnp.abs(wanted).max()))
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=atol)

    jax.tree.map(close, (d_params, d_x, out), wanted)


def test_fresh_parameters_are_the_published_ones():
    """Rates of decay in [1, 16], first time steps in [0.001, 0.1], skips of one."""
    layer = Mamba2(num_heads=512, head_dim=1, state_dim=2)
    params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 1, 3)))["params"]
    rates, steps = np.exp(params["A_log"]), np.log1p(np.exp(params["dt_bias"]))
    assert 1.0 <= rates.min() < 1.2 and 15.8 < rates.max() <= 16.0
    assert 0.00099 < steps.min() < 0.0011 and 0.09 < steps.max() < 0.1001
    # Evenly spread in magnitude: as many below the middle as above.
    assert 0.4 < np.mean(steps < 0.01) < 0.6
    np.testing.assert_array_equal(params["D"], 1)


def test_groups_that_do_not_divide_the_heads_are_named():
    with pytest.raises(ValueError, match="Mamba2: num_groups=3 does not divide num_heads=4"):
        Mamba2(num_groups=3).init(jax.random.key(0), jnp.zeros((1, 1, 8)))
