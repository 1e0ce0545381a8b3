"""Blocks run by a policy: what each draws, which are equal, and which group stays."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.layers.repeated_blocks import run_in_turn, run_listed, run_stacked

X = jnp.ones((2, 3))


class Noise(nn.Module):
    """Adds noise, as much as it is told."""

    @nn.compact
    def __call__(self, x, share):
        scale = self.param("scale", nn.initializers.ones, ())
        return x + scale * share * jax.random.normal(self.make_rng("dropout"), x.shape)


class Stacked(nn.Module):
    remat: str

    @nn.compact
    def __call__(self, x, shares):
        return run_stacked(
            lambda block, x, share: block(x, share), Noise(), x, shares, 4, self.remat
        )


def test_every_block_draws_its_own_and_no_policy_changes_it():
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = Stacked("none").init(rngs, X, jnp.ones(4))
    assert variables["params"]["Noise_0"]["scale"].shape == (4,)

    @jax.jit
    def draws(key):
        def of(remat, i):
            rngs = {"dropout": key}
            return Stacked(remat).apply(variables, 0 * X, jnp.eye(4)[i], rngs=rngs)

        return [[of(remat, i) for i in range(4)] for remat in ("none", "sqrt")]

    plain, grouped = draws(jax.random.key(2))
    np.testing.assert_array_equal(plain, grouped)
    assert len(np.unique(np.asarray(plain).round(5))) == 4 * 6


class Listed(nn.Module):
    widths: tuple[int, ...]
    remat: str = "blocks"
    in_turn: bool = False
    last: bool = True

    def setup(self):
        self.block = [nn.Sequential([nn.Dense(n), jnp.sin, nn.Dense(3)]) for n in self.widths]

    def __call__(self, x):
        if self.in_turn:
            run = lambda model, i, x: model.block[i](x)  # noqa: E731
            return run_in_turn(run, self, x, len(self.widths), self.remat, last=self.last)
        return run_listed(lambda block, x: block(x), self.block, x, self.remat)


def test_only_equal_neighbours_are_stacked():
    """Blocks 5 5 7 5: a scan of two, and two of one block."""
    model = Listed((5, 5, 7, 5))
    variables = jax.jit(model.init)(jax.random.key(0), X)
    numbers, expected = jax.tree.map(np.asarray, variables), np.asarray(X)
    for i in range(4):
        layers = numbers["params"][f"block_{i}"]
        up, down = layers["layers_0"], layers["layers_2"]
        h = np.sin(expected @ up["kernel"] + up["bias"])
        expected = h @ down["kernel"] + down["bias"]
    np.testing.assert_allclose(model.apply(variables, X), expected, rtol=1e-5, atol=1e-6)
    lengths = [
        equation.params["length"]
        for equation in jax.make_jaxpr(model.apply)(variables, X).jaxpr.eqns
        if equation.primitive.name == "scan"
    ]
    assert lengths == [2, 1, 1]


@pytest.mark.parametrize(("last", "inputs", "products"), [(True, 3, 2), (False, 2, 0)])
def test_the_last_group_is_kept_where_the_backward_pass_begins(last, inputs, products):
    """Two groups of two: the input of each, and in the last the other block's and products."""
    model = Listed((5, 5, 5, 5), remat="sqrt", in_turn=True, last=last)
    params = jax.eval_shape(model.init, jax.random.key(0), X)
    leaves = jax.tree.leaves(jax.eval_shape(lambda p, x: jax.vjp(model.apply, p, x)[1], params, X))
    shapes = [leaf.shape for leaf in leaves]
    assert (shapes.count((2, 3)), shapes.count((2, 5))) == (inputs, products)
