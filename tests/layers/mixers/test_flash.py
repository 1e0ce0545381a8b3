"""FLASH against the paper's layer in torch, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.registry import create_mixer

LENGTH, WIDTH, S, E, SIZE = 23, 11, 6, 7, 5


def rope(x):
    """Turns the last axis, in halves, by positions along axis 1."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[1]), 10_000.0 ** (-torch.arange(half) / half))
    z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles.double())[None]
    return torch.cat([z.real, z.imag], -1)


def moved(variables):
    """Away from starting values under which scales, offsets or biases would not show."""
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    leaves = [p + 0.5 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, leaves)


@pytest.mark.parametrize("kernel", ["relu2", "softmax"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_layer_is_the_papers(causal, kernel):
    mixer = create_mixer(
        "flash", head_dim=S, value_dim=E, chunk_size=SIZE, causal=causal, kernel=kernel
    )
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    variables = moved(jax.jit(mixer.init)(jax.random.key(1), x))
    params = jax.tree.map(lambda p: torch.from_numpy(np.array(p, np.float64)), variables["params"])
    mixed = torch.from_numpy(np.array(x, np.float64)) @ params["inputs"]["in"]["kernel"]
    mixed = torch.nn.functional.silu(mixed + params["inputs"]["in"]["bias"])
    u, v, z = mixed[..., :E], mixed[..., E : 2 * E], mixed[..., 2 * E :]
    pairs = zip(params["inputs"]["scale"], params["inputs"]["offset"], strict=True)
    quad_q, quad_k, lin_q, lin_k = (rope(z * scale + offset) for scale, offset in pairs)

    a, b = (rope(params["bias"][name].expand(1, LENGTH, S)) for name in "ab")
    chunk = torch.arange(LENGTH) // SIZE
    near, far = chunk[:, None] == chunk, torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    if causal:
        near, far = near.tril(), chunk[:, None] > chunk
    logits = quad_q @ quad_k.mT * (S**-0.5 if kernel == "softmax" else 1 / SIZE) + a @ b.mT
    if kernel == "relu2":
        weights = logits.relu() ** 2 * near
    else:
        weights = logits.masked_fill(~near, -torch.inf).softmax(-1)
    weights = weights + lin_q @ lin_k.mT * far / far.sum(-1).clamp(min=1)[:, None]
    out = (u * (weights @ v)) @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(
        jax.jit(mixer.apply)(variables, x)[0], out, atol=1e-5 * float(out.abs().max())
    )


def test_the_state_does_not_grow():
    mixer = create_mixer("flash")
    sizes = [
        sum(x.size for x in jax.tree.leaves(mixer.init_state(2, length, jnp.float32)))
        for length in (16, 16_384)
    ]
    assert sizes[0] == sizes[1]
    with pytest.raises(ValueError, match="init_state needs value_dim"):
        create_mixer("flash", value_dim=None).init_state(1, 5, jnp.float32)


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        create_mixer("flash", chunk_size=0).init(jax.random.key(0), jnp.zeros((1, 3, 8)))
