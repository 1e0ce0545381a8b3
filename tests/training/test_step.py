"""The training step against recursions written out in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodels import training


def test_loss_falls(problem):
    optimizer, stream = problem.optimizer(), problem.stream()
    step, state = training.make_step(problem.loss, optimizer), problem.state(optimizer)
    losses = []
    for _ in range(100):
        state, metrics = step(state, next(stream))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:10])
    assert int(state.step) == 100


def test_one_step_is_gradient_and_optax_by_hand(problem):
    optimizer, batch = problem.optimizer(warmup=0), next(problem.stream())
    state = problem.state(optimizer)
    grads = jax.grad(lambda p: problem.loss(p, batch, None)[0])(state.params)
    updates, _ = optimizer.update(grads, state.opt_state, state.params)
    expected = optax.apply_updates(state.params, updates)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)))
    state, metrics = training.make_step(problem.loss, optimizer)(state, batch)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert set(metrics) == {"loss", "mae", "grad_norm", "first_nonfinite"}
    assert int(metrics["first_nonfinite"]) == -1


def test_average_follows_its_recursion(problem):
    optimizer, stream = problem.optimizer(), problem.stream()
    state = problem.state(optimizer, ema=True)
    step = training.make_step(problem.loss, optimizer, ema=0.4)
    average = jax.tree.map(np.float64, state.params)
    for n in range(7):
        state, _ = step(state, next(stream))
        decay = min(0.4, (1 + n) / (10 + n))
        average = jax.tree.map(
            lambda a, p, d=decay: d * a + (1 - d) * np.float64(p), average, state.params
        )
    chex.assert_trees_all_close(state.ema, jax.tree.map(np.float32, average), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_is_the_large_batch(problem, parts):
    optimizer = problem.optimizer(warmup=0, clip_norm=0.1)
    results = []
    for accumulate in (1, parts):
        stream, state = problem.stream(), problem.state(optimizer)
        step = training.make_step(problem.loss, optimizer, accumulate=accumulate)
        for _ in range(5):
            state, metrics = step(state, next(stream))
        results.append((state.params, metrics))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-6)


def test_accumulated_parts_use_different_keys(problem):
    def loss(params, batch, key):
        return jnp.sum(params["w"]), {"draw": jax.random.uniform(key)}

    params = {"w": jnp.ones(2)}
    optimizer = optax.sgd(0.1)
    state = training.TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.init(params), None, jax.random.key(3)
    )
    _, metrics = training.make_step(loss, optimizer, accumulate=2)(state, {"x": jnp.zeros((4, 1))})
    key = jax.random.fold_in(jax.random.key(3), 0)
    draws = [jax.random.uniform(k) for k in jax.random.split(key, 2)]
    np.testing.assert_allclose(metrics["draw"], np.mean(draws), rtol=1e-6)


def test_every_step_has_its_own_key(problem):
    def loss(params, batch, key):
        return jnp.sum(params["w"]), {"draw": jax.random.uniform(key)}

    params, optimizer = {"w": jnp.ones(2)}, optax.sgd(0.1)
    state = training.TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.init(params), None, jax.random.key(3)
    )
    step, draws = training.make_step(loss, optimizer), []
    for _ in range(5):
        state, metrics = step(state, {"x": jnp.zeros((4, 1))})
        draws.append(float(metrics["draw"]))
    assert len(set(draws)) == 5


def test_bfloat16_computes_low_and_keeps_high(problem):
    seen = []

    def loss(params, batch, key):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(params))
        return problem.loss(params, batch, key)

    optimizer, batch = problem.optimizer(warmup=0), next(problem.stream())
    states = [
        training.make_step(loss, optimizer, precision=precision)(problem.state(optimizer), batch)
        for precision in ("float32", "bfloat16")
    ]
    assert {jnp.dtype(d) for d in seen} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}
    for state, metrics in states:
        assert metrics["loss"].dtype == jnp.float32
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(states[0][1]["loss"], states[1][1]["loss"], rtol=2e-2)
    assert float(states[0][1]["loss"]) != float(states[1][1]["loss"])


def test_compiles_once_and_donates(problem):
    optimizer, stream = problem.optimizer(), problem.stream()
    state = first = problem.state(optimizer, ema=True)
    traced = chex.assert_max_traces(problem.loss, n=1)
    step = training.make_step(traced, optimizer, ema=0.9)
    for _ in range(3):
        state, _ = step(state, next(stream))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))


def test_names_the_first_gradient_that_is_not_finite(problem):
    def loss(params, batch, key):
        # d sqrt(x) / dx is infinite at 0, the value is not.
        value = jnp.sum(params["a"]) + jnp.sum(jnp.sqrt(params["b"])) + jnp.sum(params["c"])
        return value, {}

    params = {"a": jnp.ones(2), "b": jnp.zeros(3), "c": jnp.ones(5)}
    optimizer = optax.sgd(0.1)
    state = training.TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.init(params), None, jax.random.key(0)
    )
    _, metrics = training.make_step(loss, optimizer)(state, {"x": jnp.zeros((2, 1))})
    assert int(metrics["first_nonfinite"]) == 1
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float4"}, "precision='float4' is not a policy"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"ema": 1.0}, r"ema=1.0 must lie in \(0, 1\)"),
        ({"ema": 0.9}, "state has no moving average"),
        ({"accumulate": 3}, "accumulate=3 does not divide the batch of 16"),
    ],
)
def test_bad_input(problem, options, message):
    optimizer = problem.optimizer()
    with pytest.raises(ValueError, match=message):
        training.make_step(problem.loss, optimizer, **options)(
            problem.state(optimizer), next(problem.stream())
        )
