"""Variables that are no parameters: the running mean of a batch norm, by its recursion."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import training

MOMENTUM = 0.9


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(x)
        return nn.Dense(3)(x)


@pytest.fixture(scope="module")
def normalised(problem):
    model = Normalised()

    def loss(params, batch, key, model_state):
        variables = {"params": params, **model_state}
        out, changed = model.apply(variables, batch["x"], train=True, mutable=["batch_stats"])
        return jnp.mean((out - batch["y"]) ** 2), {}, changed

    return model, loss, problem.optimizer()


def start(normalised, **options):
    model, _, optimizer = normalised
    example = {"x": jnp.zeros((1, 5))}
    return training.init_state(model, optimizer, jax.random.key(0), example, **options)


def statistics(state):
    return state.model_state["batch_stats"]["BatchNorm_0"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_running_mean_follows_its_recursion(problem, normalised, precision):
    _, loss, optimizer = normalised
    state, batches = start(normalised), problem.stream()
    assert set(state.model_state) == {"batch_stats"} and "batch_stats" not in state.params
    step, mean = training.make_step(loss, optimizer, precision=precision), np.zeros(5)
    for _ in range(4):
        batch = next(batches)
        state, _ = step(state, batch)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * np.float64(batch["x"]).mean(0)
    assert statistics(state)["mean"].dtype == jnp.float32
    np.testing.assert_allclose(statistics(state)["mean"], mean, rtol=1e-5, atol=1e-6)


def test_accumulation_passes_statistics_from_part_to_part(problem, normalised):
    _, loss, optimizer = normalised
    batch = next(problem.stream())
    state, _ = training.make_step(loss, optimizer, accumulate=4)(start(normalised), batch)
    mean = np.zeros(5)
    for part in range(4):
        mean = MOMENTUM * mean + (1 - MOMENTUM) * np.float64(batch["x"][part::4]).mean(0)
    np.testing.assert_allclose(statistics(state)["mean"], mean, rtol=1e-5, atol=1e-6)


def test_two_devices_share_their_statistics(problem, normalised):
    _, loss, optimizer = normalised
    mesh = training.make_mesh("data=2", devices=jax.devices()[:2])
    batch = next(problem.stream())
    state, _ = training.make_step(loss, optimizer)(
        start(normalised, mesh=mesh), training.shard_batch(batch, mesh)
    )
    variance = MOMENTUM + (1 - MOMENTUM) * np.float64(batch["x"]).var(0)
    np.testing.assert_allclose(statistics(state)["var"], variance, rtol=1e-5)


def test_resuming_restores_statistics(problem, normalised, tmp_path):
    _, loss, optimizer = normalised
    step = training.make_step(loss, optimizer)
    whole = training.fit(
        start(normalised), step, problem.stream(), steps=6, directory=tmp_path / "whole"
    )
    for steps in (3, 6):
        parts = training.fit(
            start(normalised), step, problem.stream(), steps=steps, directory=tmp_path / "parts"
        )
    np.testing.assert_array_equal(statistics(parts)["mean"], statistics(whole)["mean"])
    np.testing.assert_array_equal(statistics(parts)["var"], statistics(whole)["var"])


@pytest.mark.parametrize("ema", [True, False])
def test_starting_from_given_variables_copies_them(problem, normalised, ema):
    """Parameters, their average and statistics; training then leaves the given ones alone."""
    _, loss, optimizer = normalised
    state = start(normalised, ema=ema)
    own = {"params": state.params, **state.model_state}
    given = jax.tree.map(lambda leaf: jnp.asarray(leaf) + 2, own)
    begun = training.start_from(state, given)
    for found in (begun.params, *([begun.ema] if ema else [])):
        jax.tree.map(np.testing.assert_array_equal, found, given["params"])
    jax.tree.map(
        np.testing.assert_array_equal, begun.model_state["batch_stats"], given["batch_stats"]
    )
    assert (begun.ema is None) == (not ema) and begun.step == 0
    step = training.make_step(loss, optimizer, ema=0.9 if ema else None)
    kept = jax.tree.map(np.array, given)
    step(begun, next(problem.stream()))  # overwrites what it is given
    jax.tree.map(np.testing.assert_array_equal, given, kept)


def test_variables_of_another_model_are_refused(normalised):
    state = start(normalised)
    given = {"params": {"Dense_0": {"kernel": jnp.zeros((5, 4)), "bias": jnp.zeros(3)}}}
    with pytest.raises(ValueError, match="start_from: variables are not those") as caught:
        training.start_from(state, given)
    assert str(caught.value).splitlines()[1:] == [
        "  batch_stats/BatchNorm_0/mean: None, not (5,)",
        "  batch_stats/BatchNorm_0/var: None, not (5,)",
        "  params/BatchNorm_0/bias: None, not (5,)",
        "  params/BatchNorm_0/scale: None, not (5,)",
        "  params/Dense_0/kernel: (5, 4), not (5, 3)",
    ]
