"""fit: resuming, stopping and refusing."""

import signal

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxmodels import training
from jaxmodels.training.logging import read_metrics


def fitted(problem, directory, *, steps=20, stream=None, config=None, **options):
    step, initial = problem.compiled
    return training.fit(
        jax.tree.map(jnp.copy, initial),
        step,
        stream or problem.stream(),
        steps=steps,
        directory=directory,
        config=config,
        **{"checkpoint_every": 7, "log_every": 2} | options,
    )


def plain(state):
    return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


def test_resumed_run_ends_with_the_same_bits(problem, tmp_path):
    whole = fitted(problem, tmp_path / "whole")
    for steps in (9, 16, 20):  # stops between checkpoints and at the end
        pieces = fitted(problem, tmp_path / "pieces", steps=steps)
    chex.assert_trees_all_equal(plain(whole), plain(pieces))
    again = fitted(problem, tmp_path / "pieces")
    chex.assert_trees_all_equal(plain(whole), plain(again))


def test_resuming_uses_every_part_of_the_checkpoint(problem, tmp_path):
    """A stream that would start over, or another seed, must not show."""
    whole = fitted(problem, tmp_path / "whole")
    fitted(problem, tmp_path / "pieces", steps=14)
    late = problem.stream()
    late.position = 99
    pieces = fitted(problem, tmp_path / "pieces", stream=late)
    chex.assert_trees_all_equal(plain(whole), plain(pieces))


def test_metrics_have_each_step_once(problem, tmp_path):
    fitted(problem, tmp_path, steps=9)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "loss": 1.0}\n{"step": 14, "lo')  # ran on, then died
    fitted(problem, tmp_path)
    records = read_metrics(tmp_path / "metrics.jsonl")
    # 9 is there because a last step is always recorded.
    assert [r["step"] for r in records] == [2, 4, 6, 8, 9, 10, 12, 14, 16, 18, 20]
    assert set(records[0]) == {"step", "loss", "mae", "grad_norm"}
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_other_configuration_is_refused(problem, tmp_path):
    fitted(problem, tmp_path, steps=3, config={"width": 5, "seed": 1, "same": [1, 2]})
    with pytest.raises(
        ValueError, match=r"different configuration \(seed: checkpoint 1, now 2; width: .*5, now 7"
    ):
        fitted(problem, tmp_path, config={"width": 7, "seed": 2, "same": [1, 2]})


@pytest.mark.parametrize("poison", [5, 7, 20])
def test_nan_names_step_and_tensor_and_keeps_checkpoints(problem, tmp_path, poison):
    with pytest.raises(training.NonFiniteError, match=rf"step {poison}: batch\[y\] is not finite"):
        fitted(problem, tmp_path, stream=problem.stream(poison=poison))
    kept = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert all(step < poison for step in kept)
    assert sorted(kept) == [s for s in (7, 14) if s < poison][-2:]


def test_exploding_parameters_name_the_loss(problem, tmp_path):
    optimizer = problem.optimizer(learning_rate=1e38, warmup=0)
    step = training.make_step(problem.loss, optimizer)
    with pytest.raises(training.NonFiniteError, match=r"step 2: the loss .*is not finite"):
        training.fit(problem.state(optimizer), step, problem.stream(), steps=9, directory=tmp_path)


def test_stream_without_position_is_refused(problem, tmp_path):
    with pytest.raises(ValueError, match="generator without get_state and set_state"):
        fitted(problem, tmp_path, stream=(x for x in []))


def test_stream_that_ends_is_an_error(problem, tmp_path):
    with pytest.raises(ValueError, match="batches ended after step 4 of 20"):
        fitted(problem, tmp_path, stream=problem.stream(length=4))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_says_how_to_go_on(problem, tmp_path, number):
    class Interrupting(problem.stream):
        def __next__(self):
            if self.position == 10:
                signal.raise_signal(number)
            return super().__next__()

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        fitted(problem, tmp_path / "pieces", stream=Interrupting())
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert (tmp_path / "pieces" / "checkpoints" / "11").is_dir()
    pieces = fitted(problem, tmp_path / "pieces")
    chex.assert_trees_all_equal(plain(fitted(problem, tmp_path / "whole")), plain(pieces))


def test_runs_on_a_mesh(problem, tmp_path):
    mesh = training.make_mesh("data=2,fsdp=4")
    optimizer = problem.optimizer()
    step = training.make_step(problem.loss, optimizer)
    state = problem.state(optimizer, mesh=mesh)
    placed = jax.tree.map(lambda x: x.sharding, state)
    for steps in (5, 8):
        state = training.fit(
            problem.state(optimizer, mesh=mesh),
            step,
            problem.stream(),
            steps=steps,
            directory=tmp_path,
            mesh=mesh,
        )
    assert jax.tree.map(lambda x: x.sharding, state) == placed
    one = training.fit(
        problem.state(optimizer),
        step,
        problem.stream(),
        steps=8,
        directory=tmp_path / "one",
    )
    chex.assert_trees_all_close(
        jax.device_get(state.params), jax.device_get(one.params), rtol=1e-5, atol=1e-6
    )
