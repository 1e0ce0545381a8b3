"""Chunked cross entropy against torch with all logits, its memory, and its devices."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels import training
from jaxmodels.ops import chunked_cross_entropy
from jaxmodels.training.communication import bytes_sent
from jaxmodels.training.sharding import make_mesh

WIDTH, VOCAB = 7, 13


def example(lead, seed=0, width=WIDTH, vocab=VOCAB):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(*lead, width)).astype(np.float32)
    kernel = rng.normal(size=(width, vocab)).astype(np.float32)
    targets = np.asarray(rng.integers(0, vocab, lead), np.int32)
    weights = np.asarray(rng.uniform(0.5, 2, lead) * rng.integers(0, 2, lead))
    weights.flat[0] = 0.7
    return hidden, kernel, targets, weights.astype(np.float32)


def by_torch(hidden, kernel, targets, weights, z_loss):
    """Loss, cross entropy and the gradients of hidden, kernel and weights."""
    leaves = [torch.tensor(x, dtype=torch.float64).requires_grad_() for x in (hidden, kernel)]
    w = torch.tensor(weights, dtype=torch.float64).requires_grad_()
    logits = leaves[0] @ leaves[1]
    t = torch.tensor(targets, dtype=torch.int64)
    each = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), t.reshape(-1), reduction="none"
    ).reshape(t.shape)
    cross_entropy = (w * each).sum() / w.sum()
    loss = cross_entropy + z_loss * (w * logits.logsumexp(-1) ** 2).sum() / w.sum()
    gradients = torch.autograd.grad(loss, [*leaves, w])
    return loss.item(), cross_entropy.item(), [g.numpy() for g in gradients]


def ours(hidden, kernel, targets, weights, **options):
    """The same of three times the loss, whose gradients are then divided."""

    def loss(hidden, kernel, weights):
        loss, terms = chunked_cross_entropy(hidden, kernel, targets, weights, **options)
        return 3 * loss, (loss, terms)

    targets = jnp.asarray(targets)
    of = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    gradients, (loss, terms) = of(hidden, kernel, weights)
    return loss, terms, [g / 3 for g in gradients]


@settings(deadline=None, max_examples=8)
@given(
    lead=st.sampled_from([(), (1,), (5,), (2, 3), (3, 1, 5)]),
    chunk_size=st.sampled_from([1, 2, 3, 4, 1024]),
    z_loss=st.sampled_from([0.0, 0.03]),
)
def test_equals_torch_in_value_and_gradient(lead, chunk_size, z_loss):
    arrays = example(lead)
    loss, cross_entropy, expected = by_torch(*arrays, z_loss)
    value, terms, found = ours(*arrays, z_loss=z_loss, chunk_size=chunk_size)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    np.testing.assert_allclose(terms["cross_entropy"], cross_entropy, rtol=1e-6)
    if z_loss:
        np.testing.assert_allclose(terms["z_loss"], loss - cross_entropy, rtol=1e-4, atol=1e-6)
    assert set(terms) == ({"cross_entropy", "z_loss"} if z_loss else {"cross_entropy"})
    for gradient, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-4, atol=1e-6)


def test_without_a_gradient_and_without_weights():
    """The pass that keeps no gradients is another one than the tests above see."""
    hidden, kernel, targets, _ = example((3, 5))
    expected = by_torch(hidden, kernel, targets, np.ones((3, 5)), 0.01)
    loss, terms = chunked_cross_entropy(
        *map(jnp.asarray, (hidden, kernel, targets)), z_loss=0.01, chunk_size=4
    )
    np.testing.assert_allclose((loss, terms["cross_entropy"]), expected[:2], rtol=1e-6)


def test_terms_have_no_gradient():
    hidden, kernel, targets, weights = (jnp.asarray(x) for x in example((5,)))

    def terms(*args):
        hidden, kernel, weights = args
        loss = chunked_cross_entropy(hidden, kernel, targets, weights, z_loss=0.1)
        return sum(loss[1].values())

    for gradient in jax.jit(jax.grad(terms, argnums=(0, 1, 2)))(hidden, kernel, weights):
        np.testing.assert_array_equal(gradient, 0)


def test_targets_of_no_weight_may_be_anything():
    hidden, kernel, targets, weights = example((3, 5))
    wild = np.where(weights == 0, np.resize([-100, VOCAB, 2**30], (3, 5)), targets)
    expected, _, slopes = ours(hidden, kernel, targets, weights, chunk_size=4)
    loss, _, found = ours(hidden, kernel, wild.astype(np.int32), weights, chunk_size=4)
    np.testing.assert_array_equal(loss, expected)
    for gradient, reference in zip(found[:2], slopes[:2], strict=True):
        np.testing.assert_array_equal(gradient, reference)


def test_no_weight_at_all_is_no_loss():
    hidden, kernel, targets, weights = example((5,))
    loss, _, gradients = ours(hidden, kernel, targets, 0 * weights, chunk_size=2)
    assert loss == 0
    for gradient in gradients[:2]:
        np.testing.assert_array_equal(gradient, 0)


def test_large_logits_stay_finite():
    hidden, kernel, targets, weights = example((5,))
    loss, _, gradients = ours(300 * hidden, 300 * kernel, targets, weights, chunk_size=2)
    np.testing.assert_allclose(
        loss, by_torch(300 * hidden, 300 * kernel, targets, weights, 0.0)[0], rtol=1e-5
    )
    assert all(np.isfinite(g).all() for g in gradients)


def test_memory_is_that_of_a_chunk():
    tokens, chunk, width, vocab = 2048, 128, 8, 1024
    hidden, kernel, targets, _ = (jnp.asarray(x) for x in example((tokens,), 0, width, vocab))

    def bytes_of(loss):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, kernel).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    least = bytes_of(lambda h, k: jnp.sum(jax.nn.logsumexp(h @ k, axis=-1)))
    assert least >= 4 * tokens * vocab  # the compiler does not find it by itself
    used = bytes_of(lambda h, k: chunked_cross_entropy(h, k, targets, chunk_size=chunk)[0])
    # Logits, their gradient, and copies of the small operands.
    assert used < 4 * (4 * chunk * vocab + 4 * width * (tokens + vocab))


def test_devices_keep_their_tokens():
    """Sharded over data, no chunk gathers tokens; the result is that of one device."""
    hidden, kernel, targets, weights = example((16, 3))
    mesh = training.make_mesh("data=8")

    def place(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def loss(hidden, kernel, targets, weights):
        return chunked_cross_entropy(hidden, kernel, targets, weights, chunk_size=16)[0]

    args = place(hidden, "data"), place(kernel), place(targets, "data"), place(weights, "data")
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*args).compile()
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
    found, gradients = compiled(*args)
    expected = by_torch(hidden, kernel, targets, weights, 0.0)
    np.testing.assert_allclose(found, expected[0], rtol=1e-6)
    for gradient, reference in zip(gradients, expected[2], strict=False):
        np.testing.assert_allclose(gradient, reference, rtol=1e-4, atol=1e-6)


def test_vmap_is_a_loop():
    hidden, kernel, targets, weights = (jnp.asarray(x) for x in example((2, 5)))
    of = jax.value_and_grad(
        lambda h, t, w: chunked_cross_entropy(h, kernel, t, w, z_loss=0.1, chunk_size=3)[0]
    )
    mapped = jax.vmap(of)(hidden, targets, weights)
    for i in range(2):
        looped = of(hidden[i], targets[i], weights[i])
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6),
            mapped,
            looped,
        )


def test_bfloat16_sums_in_float32():
    """As far as a compiler does not do so of its own accord, on the CPU for instance."""
    hidden, kernel, targets, weights = example((211,))
    short = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, kernel)]
    rounded = [np.asarray(x, np.float32) for x in short]
    expected = by_torch(*rounded, targets, weights, 0.0)
    loss, _, gradients = ours(*short, targets, weights, chunk_size=16)
    assert loss.dtype == jnp.float32
    program = str(jax.make_jaxpr(lambda h, k: ours(h, k, targets, weights))(*short))
    assert program.count("preferred_element_type=float32") == 2  # logits, gradient of the kernel
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    for gradient, reference in zip(gradients[:2], expected[2], strict=False):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            gradient.astype(np.float32), reference, rtol=0.02, atol=5e-3 * np.abs(reference).max()
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kernel": jnp.zeros((13, 7))}, r"hidden \(2, 3, 7\) .* kernel \(13, 7\).* transposed"),
        ({"targets": jnp.zeros((2, 4), int)}, r"targets \(2, 4\) must be \*B of hidden = \(2, 3\)"),
        ({"weights": jnp.zeros((3,))}, r"weights \(3,\) must be \*B of hidden = \(2, 3\)"),
        ({"hidden": jnp.zeros((0, 7)), "targets": jnp.zeros((0,), int)}, "nothing is empty"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"z_loss": -0.1}, r"z_loss=-0\.1 must not be negative"),
    ],
)
def test_bad_input(changed, message):
    good = {
        "hidden": jnp.zeros((2, 3, 7)),
        "kernel": jnp.zeros((7, 13)),
        "targets": jnp.zeros((2, 3), int),
    }
    with pytest.raises(ValueError, match=f"chunked_cross_entropy: .*{message}"):
        inspect.unwrap(chunked_cross_entropy)(**{**good, **changed})  # as users run it


@pytest.mark.parametrize("text", ["data=8", "data=2,sequence=4"])
def test_devices_add_up_the_gradient_of_the_kernel_once(text):
    """Not in every chunk; with the values and gradients of one device."""
    rng = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 12, 5), (5, 13)))
    targets = jnp.asarray(rng.integers(0, 13, (8, 12)))
    weights = jnp.asarray(rng.uniform(0, 1, (8, 12)), jnp.float32)

    def loss(hidden, kernel):
        return chunked_cross_entropy(hidden, kernel, targets, weights, z_loss=0.1, chunk_size=3)[0]

    both = jax.value_and_grad(loss, (0, 1))
    expected = jax.jit(both)(hidden, kernel)
    mesh = make_mesh(text)
    with jax.set_mesh(mesh):
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*mesh.axis_names))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        options = {"in_shardings": (split, whole), "out_shardings": (None, (split, whole))}
        compiled = jax.jit(both, **options).lower(hidden, kernel).compile()
    found = compiled(*jax.device_put((hidden, kernel), (split, whole)))
    for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)
    sent = bytes_sent(compiled.as_text())
    assert set(sent) == {"all-reduce"}
    assert sent["all-reduce"] < 2 * kernel.nbytes
