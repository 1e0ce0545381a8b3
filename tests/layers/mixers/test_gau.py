"""The gated attention unit against the paper's layer in torch, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.registry import create_mixer

LENGTH, WIDTH, S, E = 13, 11, 6, 7


def rope(x):
    """Turns the last axis, in halves, by positions along axis 1."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[1]), 10_000.0 ** (-torch.arange(half) / half))
    z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles.double())[None]
    return torch.cat([z.real, z.imag], -1)


def parameters(variables):
    return jax.tree.map(lambda p: torch.from_numpy(np.array(p, np.float64)), variables["params"])


def moved(variables):
    """Away from starting values under which scales, offsets or biases would not show."""
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    leaves = [p + 0.5 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def gated_inputs(params, tokens, e=E):
    mixed = tokens @ params["inputs"]["in"]["kernel"] + params["inputs"]["in"]["bias"]
    mixed = mixed * torch.sigmoid(mixed)
    u, v, z = mixed[..., :e], mixed[..., e : 2 * e], mixed[..., 2 * e :]
    pairs = zip(params["inputs"]["scale"], params["inputs"]["offset"], strict=True)
    return u, v, [rope(z * scale + offset) for scale, offset in pairs]


def bias_of(params, length):
    a, b = (params["bias"][name].expand(1, length, S) for name in "ab")
    return (rope(a) @ rope(b).mT)[0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["gau", "flash_quad"])
def test_the_layer_is_the_papers(name, causal):
    mixer = create_mixer(name, head_dim=S, value_dim=E, causal=causal)
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    variables = moved(jax.jit(mixer.init)(jax.random.key(1), x))
    params, tokens = parameters(variables), torch.from_numpy(np.array(x, np.float64))

    u, v, (q, k) = gated_inputs(params, tokens)
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    logits, bias = q @ k.mT, bias_of(params, LENGTH)
    if name == "gau":
        weights = (logits / S**0.5 + bias).masked_fill(~seen, -torch.inf).softmax(-1)
    else:
        weights = (logits / seen.sum(-1)[:, None] + bias).relu() ** 2 * seen
    out = (u * (weights @ v)) @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(
        jax.jit(mixer.apply)(variables, x)[0], out, atol=1e-5 * float(out.abs().max())
    )


def test_without_a_value_width_it_is_twice_the_models():
    mixer = create_mixer("gau", value_dim=None)
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 3, WIDTH)))
    assert shapes["params"]["out"]["kernel"].shape == (2 * WIDTH, WIDTH)
    with pytest.raises(ValueError, match="init_state needs value_dim"):
        mixer.init_state(1, 5, jnp.float32)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel='exp'"):
        create_mixer("gau", kernel="exp").init(jax.random.key(0), jnp.zeros((1, 3, 8)))
