"""Fields by arithmetic against fields by gradients, and against numbers worked out by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import create_model
from jaxmodels.layers.convolution import Conv, ConvTranspose
from jaxmodels.layers.deformable import DeformableConv
from jaxmodels.ops.pooling import max_pool
from jaxmodels.receptive_field import Field, effective_field, field_bounds, receptive_field


class Stack(nn.Module):
    layers: tuple

    @nn.compact
    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Branches(nn.Module):
    """A wide and a narrow branch that meet, off centre, behind a pool."""

    @nn.compact
    def __call__(self, x):
        x = max_pool(x, 3, stride=2, padding=1)
        wide = Conv(3, (5, 1), dilation=2)(x)
        narrow = nn.relu(Conv(3, 3, padding=((2, 0), (0, 2)))(x))
        return nn.LayerNorm()(wide + narrow)


def positive(variables):
    """Weights that cannot cancel, so that a gradient is zero only where no path leads."""
    return jax.tree.map(lambda p: jnp.abs(p) + 0.01, variables)


def bounds_by_gradient(model, shape, unit, *, method=None, name=None, prepare=positive):
    variables = prepare(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape[1:]))))

    @jax.jit
    def at(images):
        out = model.apply(variables, images, method=method)
        return (out if name is None else out[name])[:, unit[0], unit[1]].sum(-1)

    return field_bounds(effective_field(at, jax.random.key(1), shape))


def clipped(bounds, shape):
    return tuple((max(a, 0), min(b, n - 1)) for (a, b), n in zip(bounds, shape[1:3], strict=True))


STACKS = {
    "plain": Stack((Conv(3, 3), Conv(2, 5), Conv(3, 3))),
    "strided": Stack((Conv(3, (7, 5), stride=(2, 1)), Conv(2, 3, stride=2), Conv(3, (1, 3)))),
    "dilated": Stack((Conv(3, 3, dilation=2), Conv(2, 3, dilation=(1, 4)))),
    "asymmetric": Stack((Conv(3, 3, padding=((2, 0), (0, 1))), Conv(2, 4, padding=1))),
    "depthwise": Stack((Conv(3, 7, groups=3), Conv(2, 1))),
    "branches": Branches(),
    "linen": Stack((nn.Conv(3, (5, 3), strides=(2, 1), padding="VALID"), nn.Conv(2, (3, 3)))),
}


@pytest.mark.parametrize("name", STACKS)
def test_arithmetic_equals_gradients(name):
    shape, unit = (5, 43, 41, 3), (6, 7)
    field = receptive_field(STACKS[name], shape).outputs
    assert not field.whole
    assert clipped(field.bounds(unit), shape) == bounds_by_gradient(STACKS[name], shape, unit)


@pytest.mark.parametrize(
    "name, options, unit",
    [("C2", {}, (0, 0)), ("C3", {}, (11, 3)), ("C4", {"output_stride": 8}, (5, 5))],
)
def test_resnet(name, options, unit):
    model = create_model(
        "resnet18", widths=(8, 8, 8, 8), stem_width=8, depths=(1, 1, 1, 1), **options
    )
    shape = (3, 191, 193, 3)
    field = receptive_field(model, shape, method="features").outputs[name]
    found = bounds_by_gradient(model, shape, unit, method="features", name=name, prepare=running)
    assert clipped(field.bounds(unit), shape) == found


def running(variables):
    """Zero scales, with which residual blocks start, would cut their paths."""
    return {**variables, "params": positive(variables["params"])}


def test_published_sizes_of_resnet50():
    shape = (1, 640, 640, 3)
    first = receptive_field(create_model("resnet50", stride_on="1x1"), shape, method="features")
    assert first.outputs["C5"].size == (483, 483)  # table 1 of Araujo et al. 2019, for v1
    fields = receptive_field(create_model("resnet50"), shape, method="features")
    # v1.5 strides one convolution later: 11 + 3 * 8, + 8 + 3 * 16, + 16 + 5 * 32, + 32 + 2 * 64
    assert [field.size[0] for field in fields.outputs.values()] == [35, 91, 267, 427]
    assert {name: f.stride[0] for name, f in fields.outputs.items()} == {
        "C2": 4,
        "C3": 8,
        "C4": 16,
        "C5": 32,
    }
    assert fields.layers["stem_conv/conv"] == Field((7, 7), (2, 2), (-3, -3))
    assert next(iter(fields.layers)) == "stem_conv/conv" and len(fields.layers) == 53


def test_deformable_contains_the_rigid_field():
    layers = (DeformableConv(3, 3), DeformableConv(2, 3, dilation=2))
    model, shape, unit = Stack(layers), (4, 31, 29, 3), (15, 14)
    rigid = receptive_field(model, shape).outputs.bounds(unit)
    assert rigid == ((12, 18), (11, 17))
    assert bounds_by_gradient(model, shape, unit, prepare=lambda v: v)[0] == rigid[0]

    def moved(variables):
        key = jax.random.key(5)
        return jax.tree.map(lambda p: 0.4 * jax.random.normal(key, p.shape), variables)

    found = bounds_by_gradient(model, shape, unit, prepare=moved)
    pairs = zip(found, rigid, strict=True)
    assert all(low <= r_low and high >= r_high for (low, high), (r_low, r_high) in pairs)
    assert found != rigid


@pytest.mark.parametrize(
    "model",
    [
        create_model("vit_tiny_patch16_224", image_size=32, width=12, depth=2, num_heads=3),
        Stack((Conv(3, 3), ConvTranspose(2, 2, stride=2))),
    ],
)
def test_sees_the_whole_image(model):
    field = receptive_field(model, (1, 32, 32, 3)).outputs
    assert field == Field((32, 32), (0, 0), (0, 0), whole=True)


def test_global_pooling_sees_the_whole_image():
    assert receptive_field(create_model("resnet18"), (1, 32, 32, 3)).outputs.whole


def test_effective_field_is_the_mean_absolute_gradient():
    kernel = np.arange(1.0, 10.0).reshape(3, 3)

    def unit(images):
        signs = jnp.asarray([1.0, -1.0])[None, None, None, :]
        return jnp.sum(images[:, 2:5, 1:4] * kernel[None, :, :, None] * signs, axis=(1, 2, 3))

    field = effective_field(unit, jax.random.key(0), (3, 7, 6, 2))
    expected = np.zeros((7, 6))
    expected[2:5, 1:4] = kernel
    np.testing.assert_allclose(field, expected, rtol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match=r"input_shape=\(32, 32, 3\) must be \(B, Y, X, C\)"):
        receptive_field(STACKS["plain"], (32, 32, 3))
    with pytest.raises(ValueError, match="field_bounds: the field is zero everywhere"):
        field_bounds(jnp.zeros((3, 4)))
