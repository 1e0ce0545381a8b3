"""Many devices give what one device gives."""

import contextlib

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxmodels import training
from jaxmodels.training.sharding import batch_sharding, tree_shardings


def trained(problem, mesh, steps=5, **options):
    optimizer = problem.optimizer(warmup=0, clip_norm=0.5)
    state = problem.state(optimizer, mesh=mesh, ema=True)
    step = training.make_step(problem.loss, optimizer, ema=0.9, **options)
    stream = problem.stream()
    for _ in range(steps):
        state, metrics = step(state, training.shard_batch(next(stream), mesh))
    return state, metrics


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=2,fsdp=4"])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}])
def test_sharded_equals_one_device(problem, mesh, options):
    one = trained(problem, training.make_mesh(devices=jax.devices()[:1]), **options)
    many = trained(problem, training.make_mesh(mesh), **options)
    chex.assert_trees_all_close(
        jax.device_get((one[0].params, one[0].ema, one[1])),
        jax.device_get((many[0].params, many[0].ema, many[1])),
        rtol=1e-5,
        atol=1e-6,
    )


def test_initial_values_do_not_depend_on_the_mesh(problem):
    optimizer = problem.optimizer()
    one = problem.state(optimizer)
    many = problem.state(optimizer, mesh=training.make_mesh("fsdp=8"))
    chex.assert_trees_all_equal(jax.device_get(one.params), jax.device_get(many.params))


def test_fsdp_splits_parameters_moments_and_average_and_keeps_them_split(problem):
    mesh = training.make_mesh("data=2,fsdp=4")
    optimizer = problem.optimizer()
    state = problem.state(optimizer, mesh=mesh, ema=True)
    placed = jax.tree.map(lambda x: x.sharding, state)
    step = training.make_step(problem.loss, optimizer, ema=0.9)
    stream = problem.stream()
    state, _ = step(state, training.shard_batch(next(stream), mesh))
    with counted_compilations() as compilations:
        for _ in range(3):
            state, _ = step(state, training.shard_batch(next(stream), mesh))
    assert not compilations
    same = jax.tree.map(lambda x, s: x.sharding == s, state, placed)
    assert all(jax.tree.leaves(same))

    def share(tree):
        leaves = jax.tree.leaves(tree)
        return sum(x.addressable_shards[0].data.nbytes for x in leaves) / sum(
            x.nbytes for x in leaves
        )

    for tree in (state.params, state.ema, state.opt_state):
        assert share(tree) < 0.36  # a quarter, and the small bias of 512 that is copied


@contextlib.contextmanager
def counted_compilations():
    seen = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_large_arrays_are_split_along_their_longest_axis_that_divides():
    mesh = training.make_mesh("data=2,fsdp=4")
    tree = {
        "even": jax.ShapeDtypeStruct((24, 84), np.float32),
        "odd": jax.ShapeDtypeStruct((24, 85), np.float32),
        "prime": jax.ShapeDtypeStruct((47, 53), np.float32),
        "small": jax.ShapeDtypeStruct((8, 4), np.float32),
    }
    specs = {name: s.spec for name, s in tree_shardings(tree, mesh).items()}
    assert specs == {
        "even": PartitionSpec(None, "fsdp"),
        "odd": PartitionSpec("fsdp"),
        "prime": PartitionSpec(),
        "small": PartitionSpec(),
    }


def test_first_matching_rule_wins_and_absent_axes_are_dropped():
    tree = {"a": {"kernel": jax.ShapeDtypeStruct((64, 32), np.float32)}}
    rules = [("a/kernel", PartitionSpec("fsdp", "data")), ("kernel", PartitionSpec("data"))]
    both = tree_shardings(tree, training.make_mesh("data=2,fsdp=4"), rules)
    assert both["a"]["kernel"].spec == PartitionSpec("fsdp", "data")
    one = tree_shardings(tree, training.make_mesh("data=8"), rules)
    assert one["a"]["kernel"].spec == PartitionSpec(None, "data")


def test_batches_are_split_over_all_axes():
    mesh = training.make_mesh("data=2,fsdp=4")
    batch = {"x": np.arange(48.0).reshape(16, 3)}
    placed = training.shard_batch(batch, mesh)["x"]
    assert placed.sharding.is_equivalent_to(batch_sharding(mesh), 2)
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(placed, batch["x"])


def test_mesh_from_text():
    assert dict(training.make_mesh("data=2, fsdp=4").shape) == {"data": 2, "fsdp": 4}
    assert dict(training.make_mesh("").shape) == {"data": 8}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=3", "'data=3' asks for 3 devices but there are 8; for instance 'data=8' fits"),
        ("data=2,tensor=4", "cannot read 'tensor=4'"),
        ("data", "cannot read 'data'"),
        ("data=x", "cannot read 'data=x'"),
        ("data=0", "cannot read 'data=0'"),
        ("data=2,data=4", "cannot read 'data=4'"),
    ],
)
def test_bad_mesh(text, message):
    with pytest.raises(ValueError, match=message):
        training.make_mesh(text)


def test_batch_that_does_not_divide():
    with pytest.raises(ValueError, match=r"batch\[x\] has 12 examples.*over 8 devices"):
        training.shard_batch({"x": np.zeros((12, 3))}, training.make_mesh("data=8"))


def test_rule_that_does_not_divide():
    tree = {"kernel": jax.ShapeDtypeStruct((6, 5), np.float32)}
    with pytest.raises(ValueError, match=r"kernel of shape \(6, 5\) cannot be split"):
        tree_shardings(tree, training.make_mesh("fsdp=8"), [("kernel", PartitionSpec("fsdp"))])
