"""Layers in torch on parameters in our layout, so that gradients compare leaf by leaf."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

from jaxmodels.layers.conv_norm import ConvNorm
from jaxmodels.layers.convolution import Conv


def random_variables(model, *args, seed=0, **options):
    """As init, but no mistake hides behind a zero or a one; variances are positive."""
    shapes = jax.eval_shape(lambda key: model.init(key, *args, **options), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5
        if name in ("var", "scale"):
            return rng.uniform(0.5, 1.5, leaf.shape)
        return rng.normal(size=leaf.shape) * 0.1

    drawn = jax.tree_util.tree_map_with_path(draw, shapes)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), drawn)


def tensors(tree, requires_grad=False):
    return jax.tree.map(
        lambda leaf: torch.tensor(np.asarray(leaf)).requires_grad_(requires_grad), tree
    )


def channels_first(x):
    return x.permute(0, 3, 1, 2)


def channels_last(x):
    return x.permute(0, 2, 3, 1)


def conv(params, x, **options):
    """A convolution that keeps the size at stride one."""
    weight = params["kernel"].permute(3, 2, 0, 1)
    dilation = options.get("dilation", 1)
    padding = tuple(dilation * (k - 1) // 2 for k in weight.shape[2:])
    return functional.conv2d(x, weight, params.get("bias"), padding=padding, **options)


def transposed(params, x, **options):
    weight = params["kernel"].permute(2, 3, 0, 1)
    return functional.conv_transpose2d(x, weight, params["bias"], **options)


def norm(params, stats, x, train):
    """Batch norm; updates `stats` as torch does, with the sample variance."""
    return functional.batch_norm(
        x, stats["mean"], stats["var"], params["scale"], params["bias"], training=train,
        momentum=0.1, eps=1e-5,
    )  # fmt: skip


def conv_norm(params, stats, x, train, activation=torch.relu, **options):
    x = conv(params["conv"], x, **options)
    return activation(norm(params["norm"], stats["norm"], x, train))


def separable(params, stats, x, train, dilation=1):
    x = conv_norm(
        params["depthwise"], stats["depthwise"], x, train, groups=x.shape[1], dilation=dilation
    )
    return conv_norm(params["pointwise"], stats["pointwise"], x, train)


def aspp(params, stats, x, train, dilations, unit):
    branches = [conv_norm(params["point"], stats["point"], x, train)]
    for i, rate in enumerate(dilations):
        name = f"atrous_{i}"
        branches.append(unit(params[name], stats[name], x, train, dilation=rate))
    mean = functional.adaptive_avg_pool2d(x, 1)
    mean = conv_norm(params["image"], stats["image"], mean, train)
    branches.append(functional.interpolate(mean, x.shape[2:], mode="bilinear"))
    return conv_norm(params["project"], stats["project"], torch.cat(branches, 1), train)


def resized(x, size, mode="bilinear"):
    return functional.interpolate(x, size, mode=mode)


def check(model, variables, forward, x, *, train, rtol=1e-4):
    """Compares outputs, gradients of all parameters, and in training the new running means.

    Args:
      forward: (params, stats, channels-first images) -> channels-first output, in torch.
    """
    params, stats = variables["params"], variables.get("batch_stats", {})
    theirs, running = tensors(params, requires_grad=True), tensors(stats)
    expected = channels_last(forward(theirs, running, channels_first(torch.tensor(x))))
    weights = np.random.default_rng(9).normal(size=tuple(expected.shape)).astype(np.float32)
    leaves, tree = jax.tree.flatten(theirs)
    gradients = torch.autograd.grad(expected, leaves, torch.tensor(weights))
    gradients = jax.tree.unflatten(tree, [g.numpy() for g in gradients])

    @jax.jit
    def ours(params, x):
        def loss(params):
            out, new = model.apply(
                {"params": params, "batch_stats": stats}, x, train=train, mutable=["batch_stats"]
            )
            return (out * weights).sum(), (out, new)

        gradients, (out, new) = jax.grad(loss, has_aux=True)(params)
        return out, gradients, new

    out, found, new = ours(params, jnp.asarray(x))

    def close(got, want):
        want = np.asarray(want)
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * (np.abs(want).max() + 1e-3))

    close(out, expected.detach())
    jax.tree.map(close, found, gradients)
    if train and stats:
        means = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(new["batch_stats"])
                 if path[-1].key == "mean"]  # fmt: skip
        wanted = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(running)
                  if path[-1].key == "mean"]  # fmt: skip
        jax.tree.map(close, means, [w.numpy() for w in wanted])


class SmallBackbone(nn.Module):
    """Three maps, each half the one before; the second has batch norm."""

    def setup(self):
        self.layers = [Conv(3, 3, stride=2), ConvNorm(4, 3), Conv(5, 3, stride=2)]
        self.down = Conv(4, 2, stride=2, padding=((0, 1), (0, 1)))

    @property
    def feature_strides(self):
        return {"C1": 2, "C2": 4, "C3": 8}

    def features(self, images, *, train=False):
        first = nn.relu(self.layers[0](images))
        second = self.layers[1](self.down(first), train=train)
        return {"C1": first, "C2": second, "C3": nn.relu(self.layers[2](second))}


def small_backbone(params, stats, x, train):
    first = torch.relu(conv(params["layers_0"], x, stride=2))
    weight = params["down"]["kernel"].permute(3, 2, 0, 1)
    down = functional.conv2d(
        functional.pad(first, (0, 1, 0, 1)), weight, params["down"]["bias"], stride=2
    )
    second = conv_norm(params["layers_1"], stats["layers_1"], down, train)
    return first, second, torch.relu(conv(params["layers_2"], second, stride=2))
