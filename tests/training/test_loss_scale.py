"""Loss scaling and skipped steps against closed forms: powers of two leave no rounding."""

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodels import training
from jaxmodels.training import loss_scale
from jaxmodels.training.loss_scale import LossScale, initial_loss_scale
from jaxmodels.training.state import ScaledTrainState

TINY = 2.0**-13


def product(params, batch, key):
    """Its gradient is 2^-26, found in two products of float16."""
    # Not constants: XLA would fold them into one, which is zero.
    first, second = batch["x"].mean(axis=0).astype(params["w"].dtype)
    return ((params["w"] * first) * second).sum(), {}


def start(optimizer, *, scale=None, width=3, **fields):
    """A state of `width` zeros; scaled when there is a scale."""
    params = {"w": jnp.zeros(width)}
    kind = training.TrainState if scale is None else ScaledTrainState
    more = {} if scale is None else {"loss_scale": scale}
    fields = {"ema": None, "key": jax.random.key(3), **fields, **more}
    return kind(jnp.zeros((), jnp.int32), params, optimizer.init(params), **fields)


def batch(factor):
    return {"x": jnp.full((4, 2), factor)}


def test_the_factor_follows_its_rule():
    """Python's integers count; the factor meets its floor, its ceiling and everything between."""
    rng = np.random.default_rng(0)
    runs = [rng.random(60) < 0.7, np.zeros(40, bool), np.ones(200, bool)]
    scale, after = initial_loss_scale(2.0**4, growth_interval=3), jax.jit(LossScale.after)
    exponent, good, skipped = 4, 0, 0
    for finite in np.concatenate(runs):
        scale = after(scale, finite)
        good = good + 1 if finite else 0
        skipped += not finite
        if not finite:
            exponent = max(exponent - 1, -14)
        elif good == 3:
            exponent, good = min(exponent + 1, 32), 0
        assert float(scale.value) == 2.0**exponent
        assert (int(scale.good_steps), int(scale.skipped)) == (good, skipped)
    assert (loss_scale.MINIMUM, loss_scale.MAXIMUM) == (2.0**-14, 2.0**32)


def test_a_gradient_below_float16_is_lost_without_scaling_and_right_with_it():
    unscaled = jax.grad(lambda w: product({"w": w.astype(jnp.float16)}, batch(TINY), None)[0])
    np.testing.assert_array_equal(unscaled(jnp.zeros(3)), 0.0)
    optimizer = optax.sgd(1.0)
    step = training.make_step(product, optimizer, precision="float16")
    state, metrics = step(start(optimizer, scale=initial_loss_scale()), batch(TINY))
    np.testing.assert_array_equal(state.params["w"], -(2.0**-26))
    assert state.params["w"].dtype == jnp.float32
    assert (int(metrics["skipped"]), float(metrics["loss_scale"])) == (0, 2.0**15)


def test_gradients_are_unscaled_before_they_are_clipped():
    """Four gradients of 2^-26 have the norm 2^-25; clipped to 2^-26 each is halved."""
    optimizer = optax.chain(optax.clip_by_global_norm(2.0**-26), optax.sgd(1.0))
    step = training.make_step(product, optimizer, precision="float16")
    state, metrics = step(start(optimizer, scale=initial_loss_scale(), width=4), batch(TINY))
    np.testing.assert_allclose(state.params["w"], -(2.0**-27), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], 2.0**-25, rtol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_overflow_changes_nothing_and_halves_the_factor(accumulate):
    """32768 x 3 is beyond float16, 16384 x 3 is not: one step of three is skipped."""

    def loss(params, batch, key, model_state):
        value = params["w"].sum() * batch["x"].mean().astype(params["w"].dtype)
        return value, {}, {"seen": model_state["seen"] + 1.0}

    optimizer = optax.adam(0.5)
    fields = {"ema": {"w": jnp.full(3, 7.0)}, "model_state": {"seen": jnp.zeros(())}}
    first = start(optimizer, scale=initial_loss_scale(growth_interval=2), **fields)
    step = training.make_step(loss, optimizer, precision="float16", ema=0.9, accumulate=accumulate)
    expected = jax.device_get((first.params, first.opt_state, first.ema, first.model_state))
    state, metrics = step(first, batch(3.0))
    found = (state.params, state.opt_state, state.ema, state.model_state)
    chex.assert_trees_all_equal(jax.device_get(found), expected)
    assert (int(state.step), int(metrics["skipped"]), int(metrics["first_nonfinite"])) == (1, 1, 0)
    assert float(metrics["loss_scale"]) == float(state.loss_scale.value) == 2.0**14
    state, metrics = step(state, batch(3.0))
    assert (int(metrics["skipped"]), int(state.loss_scale.skipped)) == (0, 1)
    # Adam's first step is its learning rate; it is the first, for the skipped one was none.
    np.testing.assert_allclose(state.params["w"], -0.5, rtol=1e-5)
    assert float(state.model_state["seen"]) == accumulate
    assert float(metrics["loss_scale"]) == 2.0**14
    state, metrics = step(state, batch(3.0))
    assert float(metrics["loss_scale"]) == 2.0**15
    assert int(state.step) == 3


def test_a_step_of_nan_is_skipped_and_the_others_are_as_ever(problem):
    """The third batch is poisoned: the run goes on as one that never took that step."""

    def trained(state):
        return state.params, state.ema, state.opt_state

    optimizer = problem.optimizer(warmup=0)
    # Accumulated too: there NaN comes in one part of the two.
    options = {"ema": 0.9, "accumulate": 2}
    step = training.make_step(problem.noisy_loss, optimizer, skip_nonfinite=True, **options)
    plain = training.make_step(problem.noisy_loss, optimizer, **options)
    state, other = (problem.state(optimizer, ema=True) for _ in range(2))
    batches, skipped, history = problem.stream(poison=3), [], []
    for n in range(5):
        batch = next(batches)
        state, metrics = step(state, batch)
        skipped.append(int(metrics["skipped"]))
        other = other.replace(step=other.step + 1) if n == 2 else plain(other, batch)[0]
        assert np.isfinite(metrics["loss"]) == (n != 2)
        assert (int(metrics["first_nonfinite"]) >= 0) == (n == 2)
        history.append(jax.device_get(trained(state)))
    chex.assert_trees_all_equal(history[2], history[1])
    assert skipped == [0, 0, 1, 0, 0]
    assert "loss_scale" not in metrics
    # XLA fuses the two programs differently, which shows in the last bit.
    chex.assert_trees_all_close(trained(state), trained(other), rtol=1e-5, atol=1e-7)


def test_a_gradient_alone_or_a_loss_alone_suffices_to_skip():
    def loss(params, batch, key):
        # At 0 the root's gradient is infinite, its value is not; the other adds no gradient.
        hidden = jax.lax.stop_gradient(jnp.log(batch["x"].min()))
        return jnp.sqrt(params["w"]).sum() + params["v"].sum() + hidden, {}

    optimizer = optax.sgd(0.5)
    step = training.make_step(loss, optimizer, skip_nonfinite=True)
    for w, x, skipped in ((0.0, 1.0, 1), (1.0, 0.0, 1), (1.0, 1.0, 0)):
        params = {"v": jnp.ones(2), "w": jnp.full(3, w)}
        state = training.TrainState(
            jnp.zeros((), jnp.int32), params, optimizer.init(params), None, jax.random.key(0)
        )
        state, metrics = step(state, batch(x))
        assert int(metrics["skipped"]) == skipped
        np.testing.assert_array_equal(state.params["v"], 1.0 if skipped else 0.5)


def test_the_state_holds_a_factor_only_where_it_is_needed(problem, tmp_path):
    """A field, even of None, would make checkpoints of earlier runs unreadable."""
    optimizer = problem.optimizer()
    plain = problem.state(optimizer, precision="bfloat16")
    fields = {"step", "params", "opt_state", "ema", "key", "model_state"}
    assert set(flax.serialization.to_state_dict(plain)) == fields
    state = problem.state(optimizer, precision="float16")
    assert set(flax.serialization.to_state_dict(state)) == {*fields, "loss_scale"}
    changed = state.replace(loss_scale=state.loss_scale.after(jnp.array(False)))
    checkpoints = training.Checkpointer(tmp_path)
    checkpoints.save(1, changed, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(state)
    checkpoints.close()
    assert float(restored.loss_scale.value) == 2.0**14
    assert int(restored.loss_scale.skipped) == 1


def test_several_devices_agree_on_the_factor(problem):
    """An overflow on one device is an overflow of all."""
    mesh = training.make_mesh("fsdp=2", devices=jax.devices()[:2])
    optimizer = problem.optimizer(warmup=0)
    state = problem.state(optimizer, mesh=mesh, precision="float16")
    assert state.loss_scale.value.sharding.is_fully_replicated
    step = training.make_step(problem.loss, optimizer, precision="float16")
    data = next(problem.stream())
    data["y"][0] = 1e7
    before = jax.device_get(state.params)
    state, metrics = step(state, training.shard_batch(data, mesh))
    assert (int(metrics["skipped"]), float(metrics["loss_scale"])) == (1, 2.0**14)
    chex.assert_trees_all_equal(jax.device_get(state.params), before)


@pytest.mark.parametrize(
    ("precision", "scale", "message"),
    [
        ("float16", None, r"'float16' but the state has no loss scale; .*precision='float16'"),
        ("bfloat16", initial_loss_scale(), r"'bfloat16' but the state has a loss scale"),
    ],
)
def test_a_state_of_another_precision_is_refused(precision, scale, message):
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match=message):
        training.make_step(product, optimizer, precision=precision)(
            start(optimizer, scale=scale), batch(TINY)
        )


@pytest.mark.parametrize(
    ("value", "interval", "message"),
    [
        (3.0, 1, "value=3.0 must be a power of two"),
        (2.0**33, 1, "value=8589934592.0"),
        (0.0, 1, "value=0.0"),
        (1.0, 0, "growth_interval=0 must be at least 1"),
    ],
)
def test_bad_factors(value, interval, message):
    with pytest.raises(ValueError, match=message):
        initial_loss_scale(value, growth_interval=interval)
