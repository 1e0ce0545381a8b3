"""What fit does about values that are not finite: stop, leave out, or go back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import training
from jaxmodels.training.logging import read_metrics
from jaxmodels.training.runtime import Runtime, using


class Gapped:
    """A stream without some of its batches."""

    def __init__(self, stream, missing):
        self._stream, self._missing = stream, missing

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self._stream)
        return next(self) if self._stream.position in self._missing else batch

    def get_state(self):
        return self._stream.get_state()

    def set_state(self, state):
        self._stream.set_state(state)


class Poisoned(Gapped):
    """The same batches made useless."""

    def __next__(self):
        batch = next(self._stream)
        if self._stream.position in self._missing:
            batch["x"][0, 1] = np.inf
        return batch


def fitted(problem, directory, stream, *, on_nan="rollback", steps=20, step=None, state=None):
    compiled, initial = problem.compiled
    return training.fit(
        jax.tree.map(jnp.copy, initial) if state is None else state,
        compiled if step is None else step,
        stream,
        steps=steps,
        directory=directory,
        checkpoint_every=7,
        log_every=1,
        runtime=Runtime(on_nan=on_nan),
    )


def plain(state):
    return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


@pytest.mark.parametrize("bad", [{3}, {10, 12}, {7, 8, 20}])
def test_rolled_back_run_is_the_run_without_those_batches(problem, tmp_path, capsys, bad):
    rolled = fitted(problem, tmp_path / "rolled", Poisoned(problem.stream(), bad))
    said = [line for line in capsys.readouterr().out.splitlines() if "rolled back" in line]
    without = fitted(problem, tmp_path / "without", Gapped(problem.stream(), bad))
    chex.assert_trees_all_equal(plain(rolled), plain(without))
    curves = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("rolled", "without")]
    assert curves[0] == curves[1] and len(curves[0]) == 20
    assert len(said) == len(bad)
    for before, (number, line) in enumerate(zip(sorted(bad), said, strict=True)):
        step = number - before
        assert f"step {step}: batch[x] is not finite" in line
        assert f"; rolled back to step {(step - 1) // 7 * 7}, " in line
        assert line.endswith(f"batch {number} will be passed over")


def test_what_was_passed_over_stays_so_after_a_restart(problem, tmp_path):
    """The checkpoint of step 7 comes before the bad batch, that of step 14 after it."""
    bad = {10}
    for steps in (9, 15, 20):
        pieces = fitted(problem, tmp_path / "a", Poisoned(problem.stream(), bad), steps=steps)
    whole = fitted(problem, tmp_path / "b", Gapped(problem.stream(), bad))
    chex.assert_trees_all_equal(plain(pieces), plain(whole))


def test_rolling_back_in_vain_ends(problem, tmp_path):
    stream = Poisoned(problem.stream(), set(range(10, 100)))
    with pytest.raises(training.NonFiniteError, match="Rolled back to step 7 3 times in vain"):
        fitted(problem, tmp_path, stream)


def test_skipping_leaves_the_update_out_and_says_so(problem, tmp_path, capsys):
    optimizer = problem.optimizer()
    with using(Runtime(on_nan="skip")):
        step = training.make_step(problem.loss, optimizer)
    stream = Poisoned(problem.stream(), {5, 9})
    options = {"on_nan": "skip", "steps": 10, "step": step, "state": problem.state(optimizer)}
    state = fitted(problem, tmp_path, stream, **options)
    assert int(state.step) == 10 and np.isfinite(state.params["Dense_0"]["kernel"]).all()
    out = capsys.readouterr().out
    assert "step 5: batch[x] is not finite; update left out (1)" in out
    assert "step 9: batch[x] is not finite; update left out (2)" in out
    records = {r["step"]: r for r in read_metrics(tmp_path / "metrics.jsonl")}
    assert [step for step, r in records.items() if r["skipped"]] == [5, 9]
    assert "grad_norm" not in records[5] and "grad_norm" in records[6]


def test_skipping_needs_a_step_that_can(problem, tmp_path):
    with pytest.raises(ValueError, match=r"make_step\(..., skip_nonfinite=True\)"):
        fitted(problem, tmp_path, problem.stream(), on_nan="skip")


def test_float16_at_its_smallest_scale_ends(problem, tmp_path):
    """Gradients that overflow whatever the scale: the loss itself does."""
    optimizer = problem.optimizer()
    state = problem.state(optimizer, precision="float16")
    scale = state.loss_scale.replace(value=jnp.float32(2.0**-12))
    step = training.make_step(problem.loss, optimizer, precision="float16")
    stream = Poisoned(problem.stream(), {4, 5, 6, 7})
    with pytest.raises(training.NonFiniteError, match="step 5: the loss scale of float16 fell"):
        fitted(
            problem,
            tmp_path,
            stream,
            on_nan="stop",
            step=step,
            state=state.replace(loss_scale=scale),
        )
