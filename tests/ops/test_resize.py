"""Resizing against torch's interpolate, in values and gradients, and against Pillow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxmodels.ops.resize import _nearest, resize

OPTIONS = [
    {"method": "nearest"},
    *({"method": m, "align_corners": a} for m in ("bilinear", "bicubic") for a in (False, True)),
    *({"method": m, "antialias": True} for m in ("bilinear", "bicubic")),
]


def torchs(x, size, cotangent, *, method, **options):
    """Values, and the gradient of x, in float64 (where torch filters only float32)."""
    dtype = torch.float32 if method == "nearest" else torch.float64
    x = torch.tensor(np.asarray(x), dtype=dtype).permute(0, 3, 1, 2).requires_grad_()
    if method != "nearest":
        options.setdefault("align_corners", False)
    out = torch.nn.functional.interpolate(x, size, mode=method, **options).permute(0, 2, 3, 1)
    out.backward(torch.tensor(np.asarray(cotangent), dtype=dtype))
    return out.detach(), x.grad.permute(0, 2, 3, 1)


def ours(x, size, cotangent, **options):
    @jax.jit
    def both(x, cotangent):
        out, pull_back = jax.vjp(lambda x: resize(x, size, **options), x)
        return out, *pull_back(cotangent)

    return both(x, cotangent)


@settings(deadline=None, max_examples=9)
@given(
    options=st.sampled_from(OPTIONS),
    rows=st.integers(1, 17),
    columns=st.integers(1, 17),
    size=st.tuples(st.integers(1, 23), st.integers(1, 23)),
)
def test_equals_torch_in_values_and_gradients(options, rows, columns, size):
    x = jax.random.normal(jax.random.key(rows), (2, rows, columns, 3))
    cotangent = jax.random.normal(jax.random.key(columns), (2, *size, 3))
    expected = torchs(x, size, cotangent, **options)
    for found, theirs in zip(ours(x, size, cotangent, **options), expected, strict=True):
        np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(11, 5), (7, 31)])
def test_up_and_down_equals_torch(options, size):
    x = jax.random.normal(jax.random.key(0), (2, 7, 13, 3))
    cotangent = jax.random.normal(jax.random.key(1), (2, *size, 3))
    expected = torchs(x, size, cotangent, **options)
    for found, theirs in zip(ours(x, size, cotangent, **options), expected, strict=True):
        np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_antialias_equals_pillow(method):
    levels = np.random.default_rng(0).normal(size=(23, 19)).astype(np.float32)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    theirs = np.asarray(Image.fromarray(levels).resize((5, 7), filters[method]))
    out = resize(jnp.asarray(levels)[None, :, :, None], (7, 5), method=method, antialias=True)
    np.testing.assert_allclose(out[0, :, :, 0], theirs, rtol=1e-5, atol=1e-5)


def test_nearest_equals_torch_at_every_size():
    """Also where the position of a pixel is a whole number that float32 misses."""
    for old in range(1, 100, 7):
        for new in range(1, 100):
            line = torch.arange(old, dtype=torch.float32)[None, None]
            expected = torch.nn.functional.interpolate(line, new, mode="nearest")[0, 0]
            np.testing.assert_array_equal(_nearest(old, new), expected)


def test_vmap_dtype_and_one_number_for_both_sides():
    x = jax.random.normal(jax.random.key(0), (3, 1, 5, 7, 2))
    whole = resize(x[:, 0], 11, method="bicubic")
    mapped = jax.vmap(lambda x: resize(x, 11, method="bicubic"))(x)
    np.testing.assert_allclose(mapped[:, 0], whole, rtol=1e-6, atol=1e-6)
    half = resize(x[0].astype(jnp.bfloat16), (11, 11))
    assert half.dtype == jnp.bfloat16
    expected = resize(x[0].astype(jnp.bfloat16).astype(jnp.float32), (11, 11))
    np.testing.assert_array_equal(half, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (0, {}, "size=0 must be at least 1"),
        (3, {"method": "lanczos"}, "unknown method 'lanczos'; pass one of .*'bicubic'"),
        (3, {"method": "nearest", "align_corners": True}, "neither align_corners=True nor"),
        (3, {"method": "nearest", "antialias": True}, "nor antialias=True"),
        (3, {"align_corners": True, "antialias": True}, "contradicts"),
    ],
)
def test_bad_input(size, options, message):
    with pytest.raises(ValueError, match=f"resize: .*{message}"):
        resize(jnp.zeros((1, 5, 7, 3)), size, **options)


def test_an_empty_image_is_refused():
    with pytest.raises(ValueError, match=r"resize: x .* has no pixels"):
        resize(jnp.zeros((1, 0, 7, 3)), 3)
