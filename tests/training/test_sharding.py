"""Many devices give what one device gives."""

import contextlib
import types

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxmodels
from jaxmodels import training
from jaxmodels.ops.mesh_axes import axis_size, batch_axes
from jaxmodels.training import sharding
from jaxmodels.training.sharding import (
    batch_sharding,
    check_axes_used,
    placed_on,
    tree_shardings,
)


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
        ("data=2,pipe=4", "cannot read 'pipe=4'"),
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


def test_axes_have_one_order_however_they_are_written():
    mesh = training.make_mesh("tensor=2,sequence=2,data=2")
    assert tuple(mesh.shape.items()) == (("data", 2), ("sequence", 2), ("tensor", 2))
    assert [d.id for d in mesh.devices[0, 0]] == [0, 1]


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("data=4,tensor=4", "data=2,tensor=4"),
        ("tensor=16", "tensor=8"),
        ("data=3,fsdp=2", "data=4,fsdp=2"),
        ("fsdp=2,expert=2", "fsdp=4,expert=2"),
    ],
)
def test_a_mesh_that_does_not_fit_is_told_the_nearest_that_does(text, near):
    with pytest.raises(ValueError, match=f"there are 8; for instance '{near}' fits"):
        training.make_mesh(text)


def test_tensor_and_expert_split_by_the_names_of_layers_and_fsdp_what_is_left():
    """A column matrix by outputs, a row matrix by inputs, one axis each; moments alike."""
    tree = {
        "mixer": {"q": {"kernel": (64, 32), "bias": (32,)}, "out": {"kernel": (32, 64)}},
        "blocks": {"mlp": {"up": {"kernel": (3, 64, 96)}, "down": {"kernel": (3, 96, 64)}}},
        "mlp": {"gate": (4, 64, 96), "down": (4, 96, 64), "router": {"kernel": (64, 4)}},
        "embed": {"embedding": (255, 64)},
        "mu": {"v": {"kernel": (64,)}},
        "conv_1": {"conv": {"kernel": (3, 3, 8, 16)}, "norm": {"scale": (16,)}},
        "conv_2": {"conv": {"kernel": (3, 3, 16, 8)}},
        "cabin": {"kernel": (64, 32)},
    }
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
        tree,
        is_leaf=lambda x: type(x) is tuple,
    )
    placed = tree_shardings(shapes, training.make_mesh("fsdp=2,expert=2,tensor=2"))
    specs = jax.tree.map(lambda s: tuple(s.spec), placed)
    assert specs == {
        "mixer": {
            "q": {"kernel": ("fsdp", "tensor"), "bias": ("tensor",)},
            "out": {"kernel": ("tensor", "fsdp")},
        },
        "blocks": {
            "mlp": {
                "up": {"kernel": (None, "fsdp", "tensor")},
                "down": {"kernel": (None, "tensor", "fsdp")},
            }
        },
        "mlp": {
            "gate": ("expert", "fsdp", "tensor"),
            "down": ("expert", "tensor", "fsdp"),
            "router": {"kernel": ()},
        },
        "embed": {"embedding": (None, "fsdp")},
        "mu": {"v": {"kernel": ()}},
        "conv_1": {
            "conv": {"kernel": (None, None, "fsdp", "tensor")},
            "norm": {"scale": ("tensor",)},
        },
        "conv_2": {"conv": {"kernel": (None, None, "tensor", "fsdp")}},
        "cabin": {"kernel": ("fsdp",)},
    }


def test_an_axis_that_splits_no_parameter_is_refused():
    mesh = training.make_mesh("data=4,tensor=2")
    plain = tree_shardings({"dense": jax.ShapeDtypeStruct((64, 32), np.float32)}, mesh)
    with pytest.raises(ValueError, match=r"no parameter is split over tensor=2.*pass rules"):
        check_axes_used(plain, mesh)
    rules = [("dense", PartitionSpec("tensor"))]
    ruled = tree_shardings({"dense": jax.ShapeDtypeStruct((64, 32), np.float32)}, mesh, rules)
    check_axes_used(ruled, mesh)
    check_axes_used(plain, training.make_mesh("data=4,fsdp=2"))


def test_sequence_splits_time_and_tensor_nothing_of_the_batch():
    mesh = training.make_mesh("data=2,sequence=2,tensor=2")
    shapes = {"tokens": (4, 6), "label": (4,), "box": (4, 3), "image": (4, 6, 6, 3)}
    batch = {name: np.arange(np.prod(shape)).reshape(shape) for name, shape in shapes.items()}
    placed = training.shard_batch(batch, mesh)
    parts = {name: {s.data.shape for s in x.addressable_shards} for name, x in placed.items()}
    assert parts == {
        "tokens": {(2, 3)},
        "label": {(2,)},
        "box": {(2, 3)},
        "image": {(2, 6, 6, 3)},
    }
    for name, value in batch.items():
        np.testing.assert_array_equal(placed[name], value)
    training.shard_batch({"image": np.ones((4, 5, 5, 3)), "label": np.ones(4)}, mesh)
    with pytest.raises(ValueError, match="sequence=2 divides the second axis of nothing"):
        training.shard_batch({"tokens": np.ones((4, 5)), "label": np.ones(4)}, mesh)


def test_processes_without_a_part_of_the_batch_are_refused():
    """Two of four devices each, along an axis that does not split examples."""
    devices = np.array([types.SimpleNamespace(process_index=i // 4) for i in range(8)])
    parts = sharding._parts_of_a_process.__wrapped__
    assert parts(types.SimpleNamespace(shape={"data": 4, "tensor": 2}, devices=devices)) == 2
    with pytest.raises(ValueError, match=r"2 processes each.*'tensor': 8\} has 1; make data times"):
        parts(types.SimpleNamespace(shape={"tensor": 8}, devices=devices))


def test_operations_know_the_mesh_of_a_state_only_while_inside():
    placement = jax.tree.leaves(
        tree_shardings({"x": np.ones(3)}, training.make_mesh("data=4,tensor=2"))
    )
    with placed_on(placement):
        assert (axis_size("tensor"), axis_size("data", "tensor"), axis_size("fsdp")) == (2, 8, 1)
        assert (batch_axes(12), batch_axes(6)) == (("data",), ())
    assert axis_size("tensor") == 1
    alone = jax.tree.leaves(
        tree_shardings({"x": np.ones(3)}, training.make_mesh(devices=jax.devices()[:1]))
    )
    for nothing in (None, (), alone):
        with placed_on(nothing):
            assert jax.sharding.get_abstract_mesh().empty


@pytest.mark.parametrize("name", ["dit_s_2", "gpt2_small"])
def test_fsdp_leaves_a_device_an_eighth_of_published_models_and_their_moments(name):
    """From shapes alone; what is copied because it is small or odd must not count."""
    model, mesh = jaxmodels.create_model(name), training.make_mesh("fsdp=8")
    inputs = {
        "dit_s_2": [np.ones((1, 32, 32, 4), np.float32), np.ones(1, np.float32), np.ones(1, int)],
        "gpt2_small": [np.ones((1, 8), int)],
    }[name]
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    state = params, jax.eval_shape(training.adamw(1e-3, steps=10).init, params)
    shardings = tree_shardings(state, mesh)
    pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True))
    a_device = sum(int(np.prod(s.shard_shape(x.shape))) for x, s in pairs)
    assert 1 / 8 <= a_device / sum(x.size for x, _ in pairs) <= 0.127
