"""Linformer attention against its equation for each document, in torch's float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch

from jaxmodels.ops.linformer import linformer_attention

BATCH, LENGTH, HEADS, WIDTH, VALUE, ROWS, RANK = 2, 19, 3, 5, 7, 23, 11
ENDS = [0, 4, 9, 10, 18, 19]
SEGMENTS = np.repeat([[3, 1, 3, 2, 5]], np.diff(ENDS), axis=1) + np.array([[0], [10]])
POSITIONS = np.concatenate([np.arange(n) for n in np.diff(ENDS)])[None].repeat(BATCH, 0)


def draw():
    rng = np.random.default_rng(0)
    qkv = [rng.normal(size=(BATCH, LENGTH, HEADS, width)) for width in (WIDTH, WIDTH, VALUE)]
    return [*qkv, rng.normal(size=(ROWS, RANK)), rng.normal(size=(ROWS, RANK))]


def reference(q, k, v, e, f, ends):
    """Document by document: softmax(Q (E K)^T / sqrt(K)) (F V)."""
    out = []
    for start, end in itertools.pairwise(ends):
        part, length = slice(start, end), end - start
        keys = torch.einsum("sr,bshk->brhk", e[:length], k[:, part])
        values = torch.einsum("sr,bshv->brhv", f[:length], v[:, part])
        logits = torch.einsum("bthk,brhk->bhtr", q[:, part], keys) / WIDTH**0.5
        out.append(torch.einsum("bhtr,brhv->bthv", logits.softmax(-1), values))
    return torch.cat(out, 1)


@functools.cache
def compiled(form, segmented):
    def loss(inputs, positions, weights):
        out = linformer_attention(
            *inputs,
            positions=positions,
            segment_ids=jnp.asarray(SEGMENTS) if segmented else None,
            form=form,
            chunk_size=4,
        )
        return jnp.sum(out * weights), out

    return jax.jit(jax.grad(loss, has_aux=True))


@pytest.mark.parametrize(("form", "segmented"), [("chunked", 0), ("chunked", 1), ("parallel", 1)])
def test_every_form_is_the_definition(form, segmented):
    arrays = draw()
    positions = POSITIONS if segmented else np.arange(LENGTH)[None].repeat(BATCH, 0)
    weights = np.random.default_rng(1).normal(size=arrays[2].shape)
    leaves = [torch.tensor(x, requires_grad=True) for x in arrays]
    expected = reference(*leaves, ENDS if segmented else [0, LENGTH])
    (expected * torch.tensor(weights)).sum().backward()
    ours = [jnp.asarray(x, jnp.float32) for x in (*arrays, weights)]
    gradients, out = compiled(form, bool(segmented))(ours[:5], jnp.asarray(positions), ours[5])
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-4, atol=1e-4)
    for found, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(found, leaf.grad, rtol=1e-3, atol=5e-5 * abs(leaf.grad).max())


def test_a_position_beyond_the_rows_is_not_a_number():
    """Inside a compiled function there is no other way to say it."""
    arrays = [jnp.asarray(x, jnp.float32) for x in draw()]
    positions = jnp.asarray(POSITIONS).at[1, 0].set(ROWS)
    _, out = compiled("chunked", False)(arrays, positions, jnp.ones_like(arrays[2]))
    assert jnp.isfinite(out[0]).all() and jnp.isnan(out[1]).all()


def test_no_array_grows_with_the_square_of_the_length():
    length, size, rank = 4096, 16, 16
    shape = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    rows = jax.ShapeDtypeStruct((length, rank), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def run(q, k, v, e, f, ids):
        return linformer_attention(q, k, v, e, f, positions=ids, segment_ids=ids, chunk_size=size)

    traced = jax.make_jaxpr(run)(shape, shape, shape, rows, rows, ids)
    sizes = [var.aval.size for equation in traced.jaxpr.eqns for var in equation.outvars]
    assert length * rank <= max(sizes) <= 2 * length * rank


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_projection": jnp.zeros((23, 10))}, r"value_projection \(23, 10\) must both be"),
        ({"positions": jnp.zeros((2, 18), int)}, r"positions \(2, 18\) must be \(\*B, T\)"),
        ({"positions": jnp.full((2, 19), 23)}, r"positions holds 23, outside \[0, 22\]"),
        ({"form": "recurrent"}, "form='recurrent' is unknown; use one of chunked, parallel"),
        ({"v": jnp.zeros((2, 18, 3, 7))}, r"v \(2, 18, 3, 7\)"),
    ],
)
def test_bad_input_says_what_to_do(changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    names = ("q", "k", "v", "key_projection", "value_projection")
    arguments = {n: jnp.asarray(x, jnp.float32) for n, x in zip(names, draw(), strict=True)}
    arguments |= {"positions": jnp.asarray(POSITIONS)} | changes
    with pytest.raises(ValueError, match=message):
        linformer_attention(**arguments)
