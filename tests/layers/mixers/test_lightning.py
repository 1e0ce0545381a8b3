"""The layer against MiniMaxLightningAttention of transformers with its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from jaxmodels.layers.mixers.lightning import LightningAttention

BATCH, TIME, WIDTH, HEADS, HEAD_DIM = 2, 29, 11, 3, 4


def module(layer, layers):
    torch.manual_seed(0)
    config = MiniMaxConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=layers,
        layer_types=["linear_attention"] * layers,
        block_size=7,
    )
    mixer = MiniMaxLightningAttention(config, layer_idx=layer)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, 0.2, 0.5)
    return mixer.eval()


def our_tree(mixer, read):
    """Our parameters, or their gradients; theirs has q, k and v of a head side by side."""

    def get(name):
        return jnp.asarray(read(mixer.get_parameter(name)).detach().numpy())

    qkv = get("qkv_proj.weight").reshape(HEADS, 3, HEAD_DIM, WIDTH)
    return {
        **{name: {"kernel": qkv[:, i].reshape(-1, WIDTH).T} for i, name in enumerate("qkv")},
        "norm": {"scale": get("norm.weight")},
        "gate": {"kernel": get("output_gate.weight").T},
        "out": {"kernel": get("out_proj.weight").T},
    }


@pytest.mark.parametrize("layer, layers", [(0, 1), (1, 3)])
def test_values_and_gradients_match_transformers(layer, layers):
    theirs = module(layer, layers)
    ours = LightningAttention(
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        depth_fraction=layer / max(1, layers - 1),
        chunk_size=8,
    )
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, BATCH, TIME, WIDTH)).astype(np.float32)
    their_x = torch.tensor(x, requires_grad=True)
    their_out, _ = theirs(their_x, position_embeddings=None, attention_mask=None)
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


@pytest.mark.parametrize("fraction", [-0.5, 1.5])
def test_a_depth_outside_the_network_is_named(fraction):
    layer = LightningAttention(depth_fraction=fraction)
    with pytest.raises(ValueError, match=rf"LightningAttention: depth_fraction holds {fraction}"):
        layer.init(jax.random.key(0), jnp.zeros((1, 1, 8)))
