"""What one process can see of several; what several do is in test_faults.py."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels import training
from jaxmodels.training import processes
from jaxmodels.training.checksums import checksums, require_checksums
from jaxmodels.training.reader import Reader


def test_one_process_is_the_first_and_has_everything():
    assert processes.is_first() and processes.gather({"a": (1, None)}) == [{"a": [1, None]}]
    assert processes.share(7) == {"batch_size": 7, "process_index": 0, "process_count": 1}
    processes.first_goes_on()


def test_a_batch_that_does_not_divide(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    assert processes.share(12) == {"batch_size": 4, "process_index": 2, "process_count": 3}
    with pytest.raises(ValueError, match="batch_size=7 does not divide over 3 processes"):
        processes.share(7)
    with pytest.raises(processes.Follower):
        processes.first_goes_on()


@pytest.mark.parametrize(
    "environment, several",
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"JAXMODELS_DISTRIBUTED": "1"}, True),
    ],
)
def test_surroundings_are_recognised(monkeypatch, environment, several):
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: asked.append(options))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.start(heartbeat_seconds=7)
    assert len(asked) == several
    if several:
        # JAX detects the rest.
        assert "num_processes" not in asked[0] and asked[0]["heartbeat_timeout_seconds"] == 7


def trees():
    """The same numbers on meshes of one and of eight devices, in two layouts."""
    tree = {
        "a": jnp.arange(16 * 24.0).reshape(16, 24),
        "b": jnp.arange(8, dtype=jnp.bfloat16),
        "key": jax.random.key(3),
    }
    mesh = training.make_mesh("data=2,fsdp=4")
    for spec in (PartitionSpec("fsdp"), PartitionSpec(None, "data")):
        placed = dict(tree, a=jax.device_put(tree["a"], NamedSharding(mesh, spec)))
        yield placed
    yield tree


def test_checksums_hold_on_every_mesh_and_notice_a_changed_bit():
    for saved in trees():
        sums = checksums(saved)
        for found in trees():
            require_checksums(found, sums)
            changed = np.asarray(found["a"]).copy()
            changed.view(np.uint32)[13, 17] ^= 1
            wrong = dict(found, a=jax.device_put(changed, found["a"].sharding))
            with pytest.raises(OSError, match="contents of a do not match"):
                require_checksums(wrong, sums)
    whole = np.asarray(trees().__next__()["a"])
    assert sums["a"] == {"0:16,0:24": zlib.crc32(whole)}
    require_checksums({"a": jnp.asarray(whole)}, {"a": zlib.crc32(whole)})  # as once saved


def test_a_checksum_that_is_missing_is_damage():
    tree = {"a": jnp.ones(3)}
    with pytest.raises(OSError, match="contents of a do not match"):
        require_checksums(tree, {})


def test_positions_of_several_processes_need_as_many(problem):
    reader = Reader(problem.stream())
    facts = {"data": {"by_process": [{"position": 1}, {"position": 2}]}}
    with pytest.raises(ValueError, match="each of 2 processes was at its own place"):
        reader.go_to(facts, 4)
