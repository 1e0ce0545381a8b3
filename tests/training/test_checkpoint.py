"""What a checkpoint promises: the same bits, or the ones before, or a clear word."""

import gc
import shutil
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import training


@pytest.fixture
def state():
    return {
        "params": {"kernel": jnp.arange(15.0).reshape(3, 5), "bias": jnp.full(7, 1 / 3)},
        "step": jnp.int32(11),
        "key": jax.random.key(5),
        "low": jnp.arange(4, dtype=jnp.bfloat16),
    }


def same(a, b):
    def bits(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes(), leaf.dtype, leaf.shape

    return jax.tree.map(bits, a) == jax.tree.map(bits, b)


def shifted(state, by):
    return {**state, "params": jax.tree.map(lambda x: x + by, state["params"])}


def saved(directory, state, steps=(1, 2), keep=2):
    checkpoints = training.Checkpointer(directory, keep=keep)
    for step in steps:
        checkpoints.save(step, shifted(state, step), {"data": {"position": step}})
    checkpoints.close()


def test_round_trip_is_exact(tmp_path, state):
    saved(tmp_path, state)
    restored, facts = training.Checkpointer(tmp_path).restore(state)
    assert same(restored, shifted(state, 2))
    assert facts == {"data": {"position": 2}}


def test_nothing_saved_is_none(tmp_path, state):
    checkpoints = training.Checkpointer(tmp_path / "new")
    assert checkpoints.restore(state) is None
    assert checkpoints.facts() is None


def test_keeps_the_latest(tmp_path, state):
    saved(tmp_path, state, steps=(1, 2, 3, 4), keep=3)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [2, 3, 4]


def test_state_may_be_donated_while_it_is_written(tmp_path, state):
    """The write goes on in the background; the step overwrites the buffers meanwhile."""
    checkpoints = training.Checkpointer(tmp_path)
    large = {"x": jnp.arange(1_000_003.0)}
    overwrite = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
    expected = jax.device_get(large)
    current = large
    checkpoints.save(1, current, {})
    for _ in range(3):
        current = overwrite(current)
    jax.block_until_ready(current)
    checkpoints.close()
    restored, _ = training.Checkpointer(tmp_path).restore(expected)
    assert same(restored, expected)


@pytest.fixture
def unfinished_reads():
    """Where one array cannot be read, Orbax leaves the reads of the others unfinished.

    They complain when they are collected, which must not happen in another test.
    """
    yield
    gc.collect()


def unfinished(test):
    ignore = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return pytest.mark.usefixtures("unfinished_reads")(ignore(test))


def files_of(step_folder):
    return sorted(p for p in step_folder.rglob("*") if p.is_file() and p.stat().st_size)


@unfinished
@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed"])
def test_any_damaged_file_means_the_checkpoint_before_or_no_harm(tmp_path, state, damage):
    """Every file in turn: the newest state if the file did not matter, else the previous."""
    saved(tmp_path / "whole", state)
    names = [p.relative_to(tmp_path / "whole") for p in files_of(tmp_path / "whole" / "2")]
    fell_back = 0
    for i, name in enumerate(names):
        copy = tmp_path / str(i)
        shutil.copytree(tmp_path / "whole", copy)
        target = copy / name
        content = target.read_bytes()
        middle = len(content) // 2
        if damage == "truncated":
            target.write_bytes(content[:middle])
        elif damage == "flipped":
            target.write_bytes(
                content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
            )
        else:
            target.unlink()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            restored, facts = training.Checkpointer(copy).restore(state)
        step = facts["data"]["position"]
        assert same(restored, shifted(state, step))
        assert step == 2 or any("damaged and passed over" in str(w.message) for w in warned)
        fell_back += step == 1
    assert fell_back >= 3


def test_contents_of_another_checkpoint_are_noticed(tmp_path, state):
    """Arrays that Orbax can read, but that are not the ones that were saved."""
    saved(tmp_path, state)
    shutil.rmtree(tmp_path / "2" / "state")
    shutil.copytree(tmp_path / "1" / "state", tmp_path / "2" / "state")
    with pytest.warns(UserWarning, match="params/.* do not match their checksum"):
        restored, facts = training.Checkpointer(tmp_path).restore(state)
    assert facts == {"data": {"position": 1}}
    assert same(restored, shifted(state, 1))


@unfinished
def test_all_damaged_is_an_error(tmp_path, state):
    saved(tmp_path, state)
    for path in files_of(tmp_path):
        path.write_bytes(path.read_bytes()[:-5])
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(OSError, match=r"none of the checkpoints \[2, 1\]"),
    ):
        training.Checkpointer(tmp_path).restore(state)


@unfinished
def test_saving_over_a_passed_over_checkpoint(tmp_path, state):
    saved(tmp_path, state)
    for path in files_of(tmp_path / "2"):
        path.write_bytes(path.read_bytes()[:-5])
    checkpoints = training.Checkpointer(tmp_path)
    with pytest.warns(UserWarning, match="passed over"):
        checkpoints.restore(state)
    assert (tmp_path / "damaged_2").is_dir()
    checkpoints.save(2, shifted(state, 2), {})
    checkpoints.close()
    restored, _ = training.Checkpointer(tmp_path).restore(state)
    assert same(restored, shifted(state, 2))


def test_a_checkpoint_that_will_not_fit_is_refused_beforehand(tmp_path, state, monkeypatch):
    checkpoints = training.Checkpointer(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    usage = shutil.disk_usage(tmp_path)
    large = {"x": jnp.zeros(1_000_000)}
    # Room for the numbers alone is not enough.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4_000_000))
    with pytest.raises(OSError, match=r"step 2 could not be written.*no space left.*there: \[1\]"):
        checkpoints.save(2, large, {})
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4_500_000))
    checkpoints.save(2, large, {})
    checkpoints.close()


def test_no_space_leaves_the_last_good_checkpoint(tmp_path):
    """The operating system refuses to let files grow, as a full disk does."""
    script = """
        import resource, sys
        import jax.numpy as jnp
        from jaxmodels import training

        checkpoints = training.Checkpointer(sys.argv[1])
        checkpoints.save(1, {"x": jnp.arange(1000.0)}, {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            checkpoints.save(2, {"x": jnp.sin(jnp.arange(1_000_000.0))}, {})
            checkpoints.wait()
        except OSError as error:
            print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path], capture_output=True, text=True
    )
    assert "could not be written" in result.stdout, result.stderr
    assert "Complete checkpoints there: [1]" in result.stdout
    restored, _ = training.Checkpointer(tmp_path).restore({"x": jnp.zeros(1000)})
    np.testing.assert_array_equal(restored["x"], np.arange(1000.0))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: {**s, "more": jnp.zeros(3)}, r"more is in only one of the two"),
        (lambda s: {k: v for k, v in s.items() if k != "low"}, "low is in only one of the two"),
        (lambda s: {**s, "low": jnp.zeros(5, jnp.bfloat16)}, r"low is \(4,\) there and \(5,\) now"),
    ],
)
def test_another_model_is_refused_and_loses_nothing(tmp_path, state, change, said):
    saved(tmp_path, state)
    with pytest.raises(ValueError, match=f"of another model or optimizer: {said}"):
        training.Checkpointer(tmp_path).restore(change(state))
    restored, _ = training.Checkpointer(tmp_path).restore(state)
    assert same(restored, shifted(state, 2))


def test_keeping_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep=1 leaves nothing to fall back on"):
        training.Checkpointer(tmp_path, keep=1)
