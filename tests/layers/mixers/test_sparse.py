"""The sparse mixer against its layer in torch; promises of all mixers are tested elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.registry import create_mixer

LENGTH, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 23, 11, 4, 2, 6
PATTERNS = {
    "strided": ({"stride": 5}, lambda t, s: t - s <= 5 or (t - s) % 5 == 0),
    "fixed": ({"stride": 5, "summary": 2}, lambda t, s: t // 5 == s // 5 or s % 5 >= 3),
    "local": ({"stride": None, "window": 4}, lambda t, s: t - s <= 4),
    "dilated": ({"stride": 3, "window": 2}, lambda t, s: t - s in (0, 3, 6)),
}


def turned(x):
    """Rotary positions: channel i with channel i + 3, as complex numbers."""
    angles = torch.outer(torch.arange(LENGTH), 10_000.0 ** (-torch.arange(3) / 3)).double()
    z = torch.complex(x[..., :3], x[..., 3:]) * torch.exp(1j * angles)[None, :, None]
    return torch.cat([z.real, z.imag], -1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_layer_and_its_decoding_are_those_of_torch(pattern):
    options, sees = PATTERNS[pattern]
    mixer = create_mixer(
        "sparse",
        pattern=pattern,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        use_bias=True,
        **options,
    )
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    variables = jax.jit(mixer.init)(jax.random.key(1), x)
    params = jax.tree.map(lambda p: torch.from_numpy(np.array(p, np.float64)), variables["params"])
    tokens = torch.from_numpy(np.array(x, np.float64))

    def project(name, heads):
        y = tokens @ params[name]["kernel"] + params[name]["bias"]
        return y.reshape(2, LENGTH, heads, HEAD_DIM)

    q, k = turned(project("q", HEADS)), turned(project("k", KV_HEADS))
    seen = torch.tensor([[s <= t and sees(t, s) for s in range(LENGTH)] for t in range(LENGTH)])
    out = torch.nn.functional.scaled_dot_product_attention(
        *(y.transpose(1, 2) for y in (q, k, project("v", KV_HEADS))),
        attn_mask=seen,
        enable_gqa=True,
    )
    out = out.transpose(1, 2).reshape(2, LENGTH, -1) @ params["out"]["kernel"]
    out = out + params["out"]["bias"]

    call = jax.jit(mixer.apply)
    np.testing.assert_allclose(call(variables, x)[0], out, atol=1e-5)
    first, state = call(variables, x[:, :9], state=mixer.init_state(2, 31, x.dtype))
    second, _ = call(variables, x[:, 9:], state=state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), out, atol=1e-5)


def test_the_pattern_counts_places_whatever_the_positions_are():
    mixer = create_mixer("sparse", pattern="fixed", stride=5, summary=2, head_dim=6)
    x = jax.random.normal(jax.random.key(0), (1, LENGTH, WIDTH))
    variables = jax.jit(mixer.init)(jax.random.key(1), x)
    call = jax.jit(mixer.apply)
    # Rotary positions see distances alone, and blocks do not move with them.
    later = call(variables, x, positions=jnp.arange(LENGTH)[None] + 3)[0]
    np.testing.assert_allclose(call(variables, x)[0], later, atol=2e-5)


def test_options_of_another_pattern_are_refused():
    mixer = create_mixer("sparse", pattern="local", window=4)
    with pytest.raises(ValueError, match="stride=32 is not used by pattern='local'"):
        mixer.init(jax.random.key(0), jnp.zeros((1, 3, 8)))
