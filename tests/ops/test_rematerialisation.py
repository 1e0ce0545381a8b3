"""Policies of rematerialisation: what they keep is counted, what they compute is a loop's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmodels.ops import dot_product_attention
from jaxmodels.ops.rematerialisation import (
    POLICIES,
    group_size,
    products_saveable,
    require_policy,
    scan_blocks,
)
from jaxmodels.training.liveness import peak_bytes

WIDTH, HIDDEN, ROWS = 3, 5, 7
COMPUTED = [policy for policy in POLICIES if policy != "offload"]


def block(x, own):
    up, down = own
    h = jnp.sin(x @ up) * 0.7
    return x + jnp.tanh(h @ down), h.sum()


def weights(count):
    rng = np.random.default_rng(count)
    shapes = (count, WIDTH, HIDDEN), (count, HIDDEN, WIDTH)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


X = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, WIDTH)), jnp.float32)


def in_numpy(w, b):
    """The definition in float64, and its derivative by x along ones, by the product rule."""
    x, slope, ys = np.asarray(X, np.float64), np.ones(X.shape), []
    w, b = np.asarray(w, np.float64), np.asarray(b, np.float64)
    for up, down in zip(w, b, strict=True):
        u, du = x @ up, slope @ up
        h, dh = np.sin(u) * 0.7, np.cos(u) * du * 0.7
        t = np.tanh(h @ down)
        x, slope = x + t, slope + (1 - t**2) * (dh @ down)
        ys.append(h.sum())
    return x, slope, np.asarray(ys)


@pytest.mark.parametrize("remat", COMPUTED)
def test_values_and_gradients_are_the_definitions(remat):
    """Five blocks leave a rest beside the groups of two, six do not."""
    for count in (5, 6):
        own = weights(count)
        expected, slope, sums = in_numpy(*own)

        @jax.jit
        def both(x, own):
            results = []
            for run in (lambda *args: scan_blocks(block, *args, remat), partial(lax.scan, block)):
                (out, ys), back = jax.vjp(run, x, own)
                results.append((out, ys, back((jnp.ones_like(out), jnp.zeros_like(ys)))))
                results.append(back((jnp.cos(out), jnp.ones_like(ys))))
            return results

        (out, ys, (dx, _)), found, *_, wanted = both(X, own)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ys, sums, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(jnp.sum(dx), slope.sum(), rtol=1e-4)
        for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-5)


def kept(remat, count):
    """Numbers kept over the forward pass, without the weights, which stay anyway."""

    def forward(x, own):
        return jax.vjp(lambda x, own: scan_blocks(block, x, own, remat)[0], x, own)[1]

    own = weights(count)
    leaves = jax.tree.leaves(jax.eval_shape(forward, X, own))
    return sum(leaf.size for leaf in leaves) - sum(leaf.size for leaf in own)


def test_what_is_kept_is_what_the_table_says():
    inputs, products = ROWS * WIDTH, ROWS * (WIDTH + HIDDEN)
    assert kept("blocks", 16) == 16 * inputs
    assert kept("dots", 16) == 16 * (inputs + products)
    assert kept("none", 16) > 16 * (inputs + products)
    for remat in ("sqrt", "everything"):
        assert kept(remat, 16) == 4 * inputs
        assert kept(remat, 64) == 8 * inputs


def test_going_back_holds_less_and_less():
    """Beside what is kept: everything holds no products of a whole group, as sqrt does."""

    def held(remat):
        def loss(x, own):
            return jnp.sum(scan_blocks(block, x, own, remat)[0])

        return peak_bytes(jax.grad(loss), jnp.ones((97, WIDTH)), weights(64))

    sizes = [held(remat) for remat in ("none", "dots", "blocks", "sqrt", "everything")]
    assert sizes == sorted(sizes, reverse=True) and len({*sizes}) == 5


@pytest.mark.parametrize(
    ("count", "size"), [(1, 1), (2, 1), (12, 3), (13, 3), (28, 4), (61, 7), (64, 8), (96, 8)]
)
def test_groups_are_about_as_many_as_their_blocks(count, size):
    assert group_size(count, "sqrt") == group_size(count, "everything") == size
    assert group_size(count, "blocks") == 1


def test_products_are_those_of_weights():
    """Matrix products and convolutions are kept, scores of attention are not."""
    image, kernel = jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 3))

    def f(x, k, q):
        y = jnp.sin(
            lax.conv_general_dilated(
                x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
        scores = jnp.einsum("bqd,bkd->bqk", jnp.sin(q), q)
        return jnp.sin(y).sum() + jnp.sin(jnp.sin(scores)).sum()

    def forward(x, k, q):
        return jax.vjp(jax.checkpoint(f, policy=products_saveable), x, k, q)[1]

    shapes = {
        leaf.shape
        for leaf in jax.tree.leaves(jax.eval_shape(forward, image, kernel, jnp.ones((7, 11, 2))))
    }
    assert (1, 5, 5, 3) in shapes and (7, 11, 11) not in shapes


def test_unknown_policies_and_platforms_are_named():
    with pytest.raises(ValueError, match=r"Net: remat='sqr' is none of .*'sqrt', 'everything'"):
        require_policy("Net", "sqr")
    with pytest.raises(ValueError, match="scan_blocks: remat='' is none of"):
        scan_blocks(block, X, weights(2), "")
    with pytest.raises(ValueError, match='remat="offload" needs a device beside the host'):
        require_policy("Net", "offload")


@pytest.mark.parametrize("implementation", ["blocked", "short"])
def test_attention_is_not_run_again_where_products_are_kept(implementation):
    """Its exponentials are those of one forward and one backward pass; "blocks" has one more."""
    q = jnp.ones((1, 8, 2, 4))

    def exponentials(remat):
        def one(q, weight):
            h = jnp.sin(jnp.einsum("nthk,kl->nthl", q, weight))
            return dot_product_attention(h, h, h, implementation=implementation), None

        def loss(q, weights):
            return jnp.sum(scan_blocks(one, q, weights, remat)[0] ** 2)

        return str(jax.make_jaxpr(jax.grad(loss, argnums=1))(q, jnp.ones((3, 4, 4)))).count(" exp ")

    none = exponentials("none")
    assert none > 0
    assert exponentials("dots") == none
    assert exponentials("blocks") > none
