"""DiT: published sizes, what holds at initialisation, label dropout, precision, devices."""

from functools import partial

import chex
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxmodels
from jaxmodels.models.generative.dit import DiT, DiTBlock

FIELDS = {"input_size": 6, "patch_size": 2, "in_channels": 3, "width": 20, "depth": 3}
FIELDS |= {"num_heads": 5, "num_classes": 7}


def batch(size: int = 2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (size, 6, 6, 3), dtype)
    return (
        x,
        1000 * jax.random.uniform(keys[1], (size,)),
        jax.random.randint(keys[2], (size,), 0, 8),
    )


def random_variables(model: DiT, *args):
    """As init, but nothing is zero: an adaLN-zero model is blind to most mistakes."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(3)
    draw = [rng.normal(size=leaf.shape) * leaf.shape[-1] ** -0.5 for leaf in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(leaf, jnp.float32) for leaf in draw])


@pytest.fixture(scope="module")
def model():
    return DiT(**FIELDS)


@pytest.fixture(scope="module")
def variables(model):
    return random_variables(model, *batch())


@pytest.fixture(scope="module")
def apply(model):
    return jax.jit(model.apply)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("dit_s_2", 33), ("dit_b_4", 130), ("dit_b_8", 131), ("dit_l_2", 458), ("dit_xl_2", 675)],
)
def test_parameter_counts_are_those_of_the_paper(name, millions):
    """Table 4 of the paper; two channels out for one in, as published."""
    model = jaxmodels.create_model(name)
    x = jax.ShapeDtypeStruct((2, 32, 32, 4), jnp.float32)
    one = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, *one)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6) == millions
    assert jax.eval_shape(model.apply, shapes, x, *one).shape == (2, 32, 32, 8)


def test_parameter_count_is_that_of_diffusers_without_its_copies(variables):
    theirs = diffusers.DiTTransformer2DModel(
        sample_size=6, in_channels=3, num_layers=3, num_attention_heads=5, attention_head_dim=4,
        num_embeds_ada_norm=7,
    )  # fmt: skip
    copies = sum(p.numel() for p in theirs.transformer_blocks[0].norm1.emb.parameters())
    count = sum(p.numel() for p in theirs.parameters()) - 2 * copies
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count


def test_all_published_sizes_are_registered():
    names = [f"dit_{size}_{patch}" for size in ("b", "l", "s", "xl") for patch in (2, 4, 8)]
    assert jaxmodels.list_models("dit_*") == names
    for name in names:
        model = jaxmodels.create_model(name, num_classes=3)
        assert (model.patch_size, model.num_classes) == (int(name[-1]), 3)
        assert model.width // model.num_heads == (72 if "xl" in name else 64)


def test_zero_map_at_initialisation(model, apply):
    initial = jax.jit(model.init)(jax.random.key(0), *batch())
    np.testing.assert_array_equal(apply(initial, *batch()), 0)


def test_blocks_are_identities_at_initialisation():
    block = DiTBlock(num_heads=5)
    x = jax.random.normal(jax.random.key(0), (2, 7, 20))
    condition = jax.random.normal(jax.random.key(1), (2, 20))
    out, _ = jax.jit(block.init_with_output)(jax.random.key(2), x, condition)
    np.testing.assert_array_equal(out, x)


def test_initialisation_is_the_published_one(model):
    """Bounds of Xavier's uniform; the published code keeps q, k and v in one matrix."""
    wide = model.clone(width=180, depth=2)
    params = jax.jit(wide.init)(jax.random.key(0), *batch())["params"]
    blocks = params["blocks"]

    def assert_uniform(kernel, fan_in, fan_out):
        bound = np.sqrt(6 / (fan_in + fan_out))
        assert 0.97 * bound < np.abs(kernel).max() <= bound
        assert np.std(kernel) == pytest.approx(bound / np.sqrt(3), rel=0.05)

    for name in "qkv":
        assert_uniform(blocks["attention"][name]["kernel"], 180, 3 * 180)
    assert_uniform(blocks["attention"]["out"]["kernel"], 180, 180)
    assert_uniform(blocks["mlp"]["up"]["kernel"], 180, 720)
    assert_uniform(blocks["mlp"]["down"]["kernel"], 720, 180)
    assert_uniform(params["patch_embed"]["project"]["kernel"], 12, 180)
    for normal in (
        params["timestep_embedding"]["up"]["kernel"],
        params["timestep_embedding"]["down"]["kernel"],
        params["label_embedding"]["table"]["embedding"],
    ):
        assert np.std(normal) == pytest.approx(0.02, rel=0.1)
    layers = blocks["mlp"]["up"]["kernel"]
    assert not np.allclose(layers[0], layers[1]), "blocks must not start equal"


def test_blocks_run_in_order_each_with_its_slice(model, variables, apply):
    params, args = variables["params"], batch()
    first, second, third = (jax.tree.map(lambda p, i=i: p[i], params["blocks"]) for i in range(3))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), second, first, third)
    swapped = apply({"params": params | {"blocks": stacked}}, *args)
    assert np.abs(swapped - apply(variables, *args)).max() > 0.01


def test_train_drops_labels_at_the_given_rate(model, variables, apply):
    """With dropout, a batch of equal images has exactly two outputs: with and without class."""
    size = 400
    x, t, _ = (jnp.repeat(a[:1], size, axis=0) for a in batch())
    labels = jnp.full((size,), 3)
    train = jax.jit(
        lambda key: model.apply(variables, x, t, labels, train=True, rngs={"dropout": key})
    )
    with_class = apply(variables, x[:2], t[:2], labels[:2])[:1]
    without = apply(variables, x[:2], t[:2], jnp.full((2,), 7))[:1]
    assert np.abs(with_class - without).max() > 0.01
    out = train(jax.random.key(5))
    kept = np.isclose(out, with_class, atol=1e-5).all(axis=(1, 2, 3))
    dropped = np.isclose(out, without, atol=1e-5).all(axis=(1, 2, 3))
    assert (kept ^ dropped).all()
    assert 0.05 < dropped.mean() < 0.16
    assert not np.array_equal(out, train(jax.random.key(6)))


def test_nothing_is_dropped_without_train_or_at_rate_zero(model, variables, apply):
    args = batch()
    expected = apply(variables, *args)
    always = jax.jit(model.clone(label_dropout=1.0).apply)
    np.testing.assert_array_equal(always(variables, *args), expected)
    # No "dropout" key is needed when nothing can be dropped.
    never = jax.jit(partial(model.clone(label_dropout=0.0).apply, train=True))
    np.testing.assert_array_equal(never(variables, *args), expected)


def test_labels_out_of_range_give_nan(variables, apply):
    x, t, _ = batch()
    out = apply(variables, x, t, jnp.array([7, 8]))
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()


def test_timesteps_and_positions_matter(variables, apply):
    x, t, labels = batch()
    expected = apply(variables, x, t, labels)
    assert np.abs(apply(variables, x, t + 1, labels) - expected).max() > 1e-3
    flipped = apply(variables, x[:, ::-1], t, labels)[:, ::-1]
    turned = apply(variables, x.swapaxes(1, 2), t, labels).swapaxes(1, 2)
    assert np.abs(flipped - expected).max() > 0.01
    assert np.abs(turned - expected).max() > 0.01


def test_bfloat16_is_near_float32(model, variables, apply):
    expected = np.asarray(apply(variables, *batch()))
    out = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(variables, *batch())
    assert out.dtype == jnp.bfloat16
    assert np.abs(out.astype(np.float32) - expected).mean() < 0.02 * np.abs(expected).mean()
    initial = jax.eval_shape(model.clone(dtype=jnp.bfloat16).init, jax.random.key(0), *batch())
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}


def test_compiles_once(model, variables):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def traced(*args):
        return model.apply(*args)

    for seed in range(3):
        x, t, labels = batch()
        traced(variables, x + seed, t, labels)


def test_vmap_over_a_group_of_batches(model, variables, apply):
    x, t, labels = batch(6)
    grouped = (a.reshape(2, 3, *a.shape[1:]) for a in (x, t, labels))
    out = jax.jit(jax.vmap(model.apply, in_axes=(None, 0, 0, 0)))(variables, *grouped)
    expected = apply(variables, x, t, labels)
    np.testing.assert_allclose(out.reshape(expected.shape), expected, atol=1e-5)


def test_batch_sharded_over_eight_devices(variables, apply):
    args = batch(8)
    expected = apply(variables, *args)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(args, NamedSharding(mesh, PartitionSpec("data")))
    out = apply(jax.device_put(variables, NamedSharding(mesh, PartitionSpec())), *sharded)
    assert len(out.sharding.device_set) == 8
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_pmap_over_eight_devices(model, variables, apply):
    args = batch(16)
    grouped = (a.reshape(8, 2, *a.shape[1:]) for a in args)
    out = jax.pmap(model.apply, in_axes=(None, 0, 0, 0))(variables, *grouped)
    expected = apply(variables, *args)
    np.testing.assert_allclose(out.reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({}, (2, 3, 6, 6), r"x of shape \(2, 3, 6, 6\) is not \(batch, 6, 6, 3\).*channels last"),
        ({}, (2, 8, 8, 3), r"x of shape \(2, 8, 8, 3\) is not"),
        ({"input_size": 7}, (2, 7, 7, 3), "patch_size=2 does not divide input_size=7"),
        ({"width": 22}, (2, 6, 6, 3), "width=22 must be a multiple of 4"),
        ({"num_heads": 3}, (2, 6, 6, 3), "width=20 must be a multiple of .* num_heads=3"),
    ],
)
def test_bad_shapes_and_sizes(model, changes, shape, message):
    args = jnp.zeros(shape), jnp.zeros(2), jnp.zeros(2, int)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.clone(**changes).init, jax.random.key(0), *args)
