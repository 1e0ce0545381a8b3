"""What part of an image a unit of a network sees: by arithmetic, and by gradients."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from jaxmodels.layers.convolution import Conv
from jaxmodels.layers.deformable import DeformableConv
from jaxmodels.ops.windows import padding_pairs, pair

# Layers whose window is known from their fields, whatever they compute with.
_WINDOW_LAYERS = (Conv, DeformableConv)
_CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat2",
    "checkpoint",
)
# These mix places although rows and columns stay as they are.
_MIXING = {"cumsum", "cumprod", "cummax", "cummin", "sort", "rev", "scan", "while", "cond"}
_MARK = "receptive_field"


@dataclasses.dataclass(frozen=True)
class Field:
    """What unit (i, j) of a map sees: rows start[0] + i stride[0] and the size[0] - 1 after.

    Attributes:
      size: rows and columns of the image, padding included.
      stride: how far the field moves from one unit to the next, in pixels.
      start: the first row and column that unit (0, 0) sees; negative in the padding.
      whole: every unit sees the whole image, as after attention or global pooling;
        size is the image's, stride and start are zero.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    start: tuple[int, int]
    whole: bool = False

    def bounds(self, unit: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """First and last row, first and last column that a unit sees, in the padding too."""
        first = [a + i * s for a, i, s in zip(self.start, unit, self.stride, strict=True)]
        rows, columns = ((a, a + n - 1) for a, n in zip(first, self.size, strict=True))
        return rows, columns


class ReceptiveFields(NamedTuple):
    """Fields of a network.

    Attributes:
      layers: of every convolution's output, by path, in the order of computation.
      outputs: of what the network returns, in the same structure.
    """

    layers: dict[str, Field]
    outputs: Any


def receptive_field(
    model: nn.Module, input_shape: tuple[int, ...], *, method: str | None = None
) -> ReceptiveFields:
    """Which pixels the units of a network may depend on, by arithmetic alone.

    Through a window of k taps, d apart, with stride s and padding p,

    size' = size + (k - 1) d stride,   start' = start - p stride,   stride' = s stride

    and where branches meet, the field is the smallest that contains all of theirs.
    The network is traced, never run: convolutions are known by their layers, pools
    by their operation, and everything else either acts on each place alone or, if it
    changes rows and columns, sees the whole image. Deformable convolutions count as
    the rigid ones that they start as; transposed convolutions as the whole image.

    Args:
      model: any linen module that is called with images.
      input_shape: (B, Y, X, C) of the images.
      method: the method to analyse, such as "features"; None is the call.

    Returns:
      Fields by layer and of the outputs.

    Raises:
      ValueError: input_shape has not four sizes.

    Source: Araujo, Norris and Sim 2019, "Computing Receptive Fields of
    Convolutional Neural Networks" (Distill), sections 2 and 3.
    """
    if len(input_shape) != 4:
        raise ValueError(
            f"receptive_field: input_shape={input_shape} must be (B, Y, X, C), channels last"
        )
    images = jax.ShapeDtypeStruct(tuple(input_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    layers: list[tuple[str, Field]] = []

    def run(variables, images):
        with nn.intercept_methods(_marker(layers)):
            return model.apply(variables, images, method=method)

    traced, shapes = jax.make_jaxpr(run, return_shape=True)(variables, images)
    tracer = _Tracer(tuple(input_shape[1:3]), [window for _, window in layers])
    count = len(traced.jaxpr.invars)
    pixel = Field((1, 1), (1, 1), (0, 0))
    found = tracer.run(traced.jaxpr, [None] * (count - 1) + [pixel])
    outputs = jax.tree.unflatten(jax.tree.structure(shapes), [f or tracer.all for f in found])
    by_path = {path: tracer.outputs[i] for i, (path, _) in enumerate(layers)}
    return ReceptiveFields(by_path, outputs)


def _marker(layers: list[tuple[str, Field]]) -> Callable:
    """Marks input and output of window layers in the trace, and notes their windows."""

    def intercept(call, args, kwargs, context):
        module = context.module
        if not isinstance(module, _WINDOW_LAYERS) or context.method_name != "__call__":
            return call(*args, **kwargs)
        number = len(layers)
        layers.append(("/".join(module.path), _window_of(module)))
        x = checkpoint_name(args[0], f"{_MARK} in {number}")
        return checkpoint_name(call(x, *args[1:], **kwargs), f"{_MARK} out {number}")

    return intercept


def _window_of(layer: nn.Module) -> Field:
    """The field of a layer's output in its own input."""
    size, stride, dilation = (
        pair("receptive_field", name, getattr(layer, name))
        for name in ("kernel_size", "stride", "dilation")
    )
    spread = tuple((k - 1) * d + 1 for k, d in zip(size, dilation, strict=True))
    padding = layer.padding
    if padding is None:
        padding = tuple((n - 1) // 2 for n in spread)
    (top, _), (left, _) = padding_pairs("receptive_field", padding)
    return Field(spread, stride, (-top, -left))


class _Tracer:
    """Carries fields through a traced program; None is what does not depend on the image."""

    def __init__(self, image: tuple[int, int], windows: list[Field]):
        self.all = Field(image, (0, 0), (0, 0), whole=True)
        self.outputs: dict[int, Field] = {}
        self._windows = windows
        self._inputs: dict[int, Field] = {}

    def run(self, jaxpr, fields: list[Field | None]) -> list[Field | None]:
        known = dict(zip(jaxpr.invars, fields, strict=True))

        def field(atom):
            return known.get(atom) if isinstance(atom, jax.extend.core.Var) else None

        for equation in jaxpr.eqns:
            found = self._through(equation, [field(atom) for atom in equation.invars])
            known |= zip(equation.outvars, found, strict=True)
        return [field(atom) for atom in jaxpr.outvars]

    def _through(self, equation, fields) -> list[Field | None]:
        name, parameters = equation.primitive.name, equation.params
        if name == "name" and parameters["name"].startswith(_MARK):
            return [self._marked(parameters["name"], fields[0])]
        if all(f is None for f in fields):
            return [None] * len(equation.outvars)
        if name in _CALLS:
            inner = parameters.get("jaxpr", parameters.get("call_jaxpr"))
            return self.run(getattr(inner, "jaxpr", inner), fields)
        if name.startswith("reduce_window"):
            return [self._compose(fields[0], _window_of_pool(parameters))]
        if name == "conv_general_dilated":
            window = _window_of_convolution(equation)
            return [self.all if window is None else self._compose(fields[0], window)]
        if name in _SHIFTS and equation.outvars[0].aval.ndim == 4:
            return [self._compose(fields[0], _SHIFTS[name](parameters))]
        if name in _MIXING or not self._keeps_places(equation, fields):
            return [self.all] * len(equation.outvars)
        return [self._union([f for f in fields if f is not None])] * len(equation.outvars)

    def _marked(self, text: str, field: Field | None) -> Field | None:
        _, direction, number = text.split()
        if direction == "in":
            self._inputs[int(number)] = field or self.all
            return field
        window, seen = self._windows[int(number)], self._inputs[int(number)]
        self.outputs[int(number)] = self._compose(seen, window)
        return self.outputs[int(number)]

    def _keeps_places(self, equation, fields) -> bool:
        """Whether all images that come in and go out have the same rows and columns."""
        if equation.primitive.name == "dot_general":
            contracted, _ = equation.params["dimension_numbers"]
            if any(
                f is not None and {1, 2} & {*axes}
                for f, axes in zip(fields[:2], contracted, strict=True)
            ):
                return False
        images = [a.aval for a, f in zip(equation.invars, fields, strict=True) if f is not None]
        images += [a.aval for a in equation.outvars]
        return all(a.ndim >= 3 for a in images) and len({a.shape[1:3] for a in images}) == 1

    def _compose(self, outer: Field, window: Field) -> Field:
        if outer.whole:
            return outer
        triples = zip(
            outer.size,
            outer.stride,
            outer.start,
            window.size,
            window.stride,
            window.start,
            strict=True,
        )
        sides = [(n + (m - 1) * s, s * t, a + b * s) for n, s, a, m, t, b in triples]
        return Field(*(tuple(side) for side in zip(*sides, strict=True)))

    def _union(self, fields: list[Field]) -> Field:
        if any(f.whole for f in fields) or len({f.stride for f in fields}) > 1:
            return self.all
        starts = np.array([f.start for f in fields])
        ends = starts + [f.size for f in fields]
        start = starts.min(0)
        size = ends.max(0) - start
        return Field(tuple(size.tolist()), fields[0].stride, tuple(start.tolist()))


def _window_of_pad(parameters) -> Field:
    low = tuple(-int(before) for before, _, _ in parameters["padding_config"][1:3])
    return Field((1, 1), (1, 1), low)


def _window_of_slice(parameters) -> Field:
    strides = parameters["strides"] or (1, 1, 1, 1)
    return Field((1, 1), tuple(strides[1:3]), tuple(parameters["start_indices"][1:3]))


_SHIFTS = {"pad": _window_of_pad, "slice": _window_of_slice}


def _window_of_pool(parameters) -> Field:
    dilation = parameters.get("window_dilation", (1, 1, 1, 1))
    sizes = parameters["window_dimensions"]
    spread = tuple((sizes[i] - 1) * dilation[i] + 1 for i in (1, 2))
    start = tuple(-int(parameters["padding"][i][0]) for i in (1, 2))
    return Field(spread, tuple(parameters["window_strides"][1:3]), start)


def _window_of_convolution(equation) -> Field | None:
    """Of a convolution that is no layer of ours; None if it is not one of images (B, Y, X, C)."""
    numbers, parameters = equation.params["dimension_numbers"], equation.params
    if numbers.lhs_spec != (0, 3, 1, 2) or numbers.out_spec != (0, 3, 1, 2):
        return None
    if any(d != 1 for d in parameters["lhs_dilation"]):
        return None
    kernel = equation.invars[1].aval.shape
    sizes = [kernel[axis] for axis in numbers.rhs_spec[2:]]
    spread = [(k - 1) * d + 1 for k, d in zip(sizes, parameters["rhs_dilation"], strict=True)]
    start = tuple(-int(before) for before, _ in parameters["padding"])
    return Field(tuple(spread), tuple(parameters["window_strides"]), start)


def effective_field(
    unit: Callable[[Float[Array, "B Y X C"]], Float[Array, "B"]],
    key: Key[Array, ""],
    input_shape: tuple[int, ...],
) -> Float[Array, "Y X"]:
    """How strongly each pixel moves a unit: the field by gradients.

    field[y, x] = mean over images and channels of |d unit / d image[y, x]|

    Args:
      unit: of a batch of images, one number each, such as a sum over the channels
        at one place of a map.
      key: draws the images from a standard normal distribution.
      input_shape: (B, Y, X, C); more images find more of what a rectifier or a
        maximum hides at one of them.

    Returns:
      The field; zero exactly where no image's pixel has any influence.

    Source: Luo et al. 2016, "Understanding the Effective Receptive Field in Deep
    Convolutional Neural Networks", section 2 (arXiv:1701.04128).
    """
    images = jax.random.normal(key, input_shape)
    gradients = jax.grad(lambda images: jnp.sum(unit(images)))(images)
    return jnp.mean(jnp.abs(gradients), axis=(0, 3))


def field_bounds(field: Float[Array, "Y X"]) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last row, first and last column where an `effective_field` is not zero.

    Raises:
      ValueError: it is zero everywhere.
    """
    rows, columns = (np.flatnonzero(np.asarray(field).any(axis)) for axis in (1, 0))
    if len(rows) == 0:
        raise ValueError("field_bounds: the field is zero everywhere; no pixel moves this unit")
    return (int(rows[0]), int(rows[-1])), (int(columns[0]), int(columns[-1]))
