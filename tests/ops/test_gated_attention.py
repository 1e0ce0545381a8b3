"""Gated attention against its definition in torch, float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.ops import gated_attention as module
from jaxmodels.ops.gated_attention import gated_attention

LENGTHS = [4, 13, 1, 11]
TOTAL = sum(LENGTHS)


# Without the suite's shape checks, which would be first to refuse.
as_users_run_it = inspect.unwrap(gated_attention)
FORMS = [("relu2", "parallel"), ("relu2", "small blocks"), ("softmax", "blocked")]


@pytest.fixture(params=FORMS, ids=lambda param: " ".join(param))
def options(request, monkeypatch):
    """Small blocks: several spans, loops inside spans, a ragged last block."""
    kernel, form = request.param
    if form == "small blocks":
        form = "blocked"
        for name, value in {"_MAX_WEIGHTS": 1, "_MIN_ROWS": 3, "_MAX_SPANS": 2}.items():
            monkeypatch.setattr(module, name, value)
    return {"kernel": kernel, "form": form}


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in shapes]


def definition(q, k, v, a, b, seen, kernel):
    """Sums over s, one query after the other."""
    outs = []
    for t in range(q.shape[1]):
        keys = torch.from_numpy(np.flatnonzero(seen[t]))
        scale = 1 / len(keys) if kernel == "relu2" else q.shape[-1] ** -0.5
        logits = (k[:, keys] * q[:, t, None]).sum(-1) * scale + (b[:, keys] * a[:, t, None]).sum(-1)
        weights = logits.clamp(min=0) ** 2 if kernel == "relu2" else logits.softmax(-1)
        outs.append((weights[..., None] * v[:, keys]).sum(1))
    return torch.stack(outs, 1)


def assert_matches(options, seen, **rest):
    inputs = arrays((2, TOTAL, 5), (2, TOTAL, 5), (2, TOTAL, 7), (2, TOTAL, 3), (2, TOTAL, 3))
    inputs[0] *= 5  # so that the divided products are of the size of the bias
    (weight,) = arrays((2, TOTAL, 7))
    leaves = [torch.tensor(x, requires_grad=True) for x in inputs]
    out = definition(*leaves, seen, options["kernel"])
    (out * torch.from_numpy(weight)).sum().backward()

    def loss(q, k, v, a, b):
        out = gated_attention(q, k, v, bias=(a, b), **options, **rest)
        return jnp.sum(out * weight), out

    found = jax.jit(jax.grad(loss, range(5), has_aux=True))(
        *(jnp.asarray(x, jnp.float32) for x in inputs)
    )
    grads, value = found
    wanted = (out.detach(), *(x.grad for x in leaves))
    for ours, theirs in zip((value, *grads), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("causal", [True, False])
def test_one_document(options, causal):
    seen = np.tri(TOTAL, dtype=bool) if causal else np.ones((TOTAL, TOTAL), bool)
    assert_matches(options, seen, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_documents_do_not_see_each_other(options, causal):
    which = np.repeat(np.arange(4), LENGTHS)
    seen = which[:, None] == which[None, :]
    seen = seen & np.tri(TOTAL, dtype=bool) if causal else seen
    ids = jnp.asarray(np.stack([np.repeat([7, 3, 7, 9], LENGTHS)] * 2))
    assert_matches(options, seen, causal=causal, segment_ids=ids)


def test_mask(options):
    seen = np.random.default_rng(1).random((TOTAL, TOTAL)) < 0.4
    np.fill_diagonal(seen, True)
    mask = jnp.broadcast_to(jnp.asarray(seen), (2, TOTAL, TOTAL))
    assert_matches(options, seen, mask=mask)


def test_a_query_without_keys_is_zero():
    q, k, v = (jnp.abs(jnp.asarray(x, jnp.float32)) for x in arrays((3, 5), (4, 5), (4, 7)))
    mask = jnp.ones((3, 4), bool).at[1].set(False)
    for kernel in ("relu2", "softmax"):
        out = gated_attention(q, k, v, kernel=kernel, mask=mask)
        np.testing.assert_array_equal(out[1], 0)
        assert np.abs(out[0]).max() > 0


def test_a_longer_document_does_not_change_its_beginning():
    x = jnp.asarray(arrays((1, 29, 5))[0], jnp.float32)
    whole = gated_attention(x, x, x, causal=True)
    part = gated_attention(x[:, :11], x[:, :11], x[:, :11], causal=True)
    np.testing.assert_allclose(whole[:, :11], part, rtol=1e-5)


def test_leading_dimensions_and_vmap():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays(*[(2, 3, 11, 5)] * 3))
    attend = jax.jit(lambda *x: gated_attention(*x, causal=True))
    out = attend(q, k, v)
    np.testing.assert_allclose(out[1, 2], attend(q[1, 2], k[1, 2], v[1, 2]), rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(attend)(q, k, v), out, rtol=1e-5)


def test_half_precision_stays_half():
    x = jnp.ones((1, 600, 2), jnp.bfloat16)
    out = gated_attention(x, x, x)
    assert out.dtype == jnp.bfloat16
    # 600 (2 / 600)^2, with n, weights and result rounded to eight bits.
    np.testing.assert_allclose(out.astype(jnp.float32), 4 / 600, rtol=0.02)


@pytest.mark.parametrize("causal", [True, False])
def test_memory_of_the_blocked_form_is_not_quadratic(causal):
    length = 8192
    x = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
    grad = jax.grad(lambda *x: gated_attention(*x, causal=causal).sum(), (0, 1, 2))
    used = jax.jit(grad).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
    assert used < 4 * length * length / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "exp"}, "kernel='exp'"),
        ({"form": "recurrent"}, "form='recurrent'"),
        ({"causal": True, "mask": jnp.ones((2, 5, 5), bool)}, "mask stands instead of"),
    ],
)
def test_bad_options_are_refused(options, message):
    x = jnp.zeros((2, 5, 3))
    with pytest.raises(ValueError, match=message):
        gated_attention(x, x, x, **options)


def test_bad_shapes_are_refused():
    x, longer = jnp.zeros((2, 5, 3)), jnp.zeros((2, 7, 3))
    with pytest.raises(ValueError, match="agree in length"):
        as_users_run_it(x, x, longer[:, :0])
    with pytest.raises(ValueError, match="as many queries as keys"):
        as_users_run_it(x, longer, longer, causal=True)
