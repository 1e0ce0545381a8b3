"""Losses one after the other against torch's plain sum, and the memory that it saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.ops.sum_in_turn import sum_in_turn


def example(losses=3):
    rng = np.random.default_rng(0)
    shapes = (5, 7), (losses, 7, 11), (losses, 5)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def loss(shared, own, rest):
    x, scale = shared
    out = scale * jnp.tanh(x @ own)
    return jnp.sum(rest[:, None] * out**2), {"largest": out.max()}


def by_torch(x, own, rest):
    leaves = [torch.tensor(a, dtype=torch.float64).requires_grad_() for a in (x, own, 1.5)]
    outs = leaves[2] * torch.tanh(leaves[0] @ leaves[1])
    total = (torch.tensor(rest)[..., None] * outs**2).sum()
    total.backward()
    return total.item(), outs.amax((1, 2)).detach().numpy(), [a.grad.numpy() for a in leaves]


@pytest.mark.parametrize("losses", [1, 3])
def test_equals_torch_in_value_and_gradient(losses):
    x, own, rest = example(losses)
    value, largest, (d_x, d_own, d_scale) = by_torch(x, own, rest)

    def half(shared, own):
        total, auxiliary = sum_in_turn(loss, shared, own, jnp.asarray(rest))
        return total / 2, (total, auxiliary)

    shared = jnp.asarray(x), jnp.float32(1.5)
    of = jax.jit(jax.grad(half, argnums=(0, 1), has_aux=True))
    gradients, (total, auxiliary) = of(shared, own)
    np.testing.assert_allclose(total, value, rtol=1e-5)
    np.testing.assert_allclose(auxiliary["largest"], largest, rtol=1e-5)
    for found, expected in zip(
        jax.tree.leaves(gradients), (d_x / 2, d_scale / 2, d_own / 2), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    # The pass without gradients is another one.
    total, auxiliary = jax.jit(lambda *args: sum_in_turn(loss, *args))(shared, own, rest)
    np.testing.assert_allclose(total, value, rtol=1e-5)
    np.testing.assert_allclose(auxiliary["largest"], largest, rtol=1e-5)


def test_auxiliary_values_and_the_rest_have_no_gradient():
    x, own, rest = map(jnp.asarray, example())

    def largest(x, own):
        return sum_in_turn(loss, (x, 1.5), own, rest)[1]["largest"].sum()

    for gradient in jax.jit(jax.grad(largest, argnums=(0, 1)))(x, own):
        np.testing.assert_array_equal(gradient, 0)
    total = jax.jit(jax.grad(lambda rest: sum_in_turn(loss, (x, 1.5), own, rest)[0]))
    np.testing.assert_array_equal(total(rest), 0)


def test_memory_does_not_grow_with_the_number_of_losses():
    x, own = jnp.ones((512, 8)), jnp.ones((6, 8, 1024))

    def bytes_of(function):
        compiled = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(x, own).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def one(x, own, rest):
        return jnp.sum(jnp.tanh(x @ own) ** 2), rest

    def plain(x, own):
        return sum(one(x, part, None)[0] for part in own)

    # The tanh of one loss, and of all six.
    held = 4 * 512 * 1024
    assert bytes_of(plain) > 6 * held
    assert bytes_of(lambda x, own: sum_in_turn(one, x, own, jnp.zeros(6))[0]) < 3 * held


@pytest.mark.parametrize("rest", [jnp.zeros(2), jnp.float32(0)])
def test_bad_input(rest):
    with pytest.raises(ValueError, match=r"sum_in_turn: own and rest must be stacked, .* are \["):
        sum_in_turn(lambda *args: (jnp.float32(0), None), jnp.zeros(3), jnp.zeros((3, 5)), rest)
