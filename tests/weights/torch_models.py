"""transformers' models with random weights as oracles: their values, gradients and folders."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxmodels


def randomised(model, seed=0):
    """No parameter and no statistic keeps its special starting value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dtype != torch.float32:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif tensor.ndim == 1:
                tensor.copy_(float("weight" in name or "lambda" in name) + 0.3 * noise)
            else:
                fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
                tensor.copy_(noise * fan_in**-0.5)
    return model.eval()


def images(*shape, seed=0):
    """Channels last; `to_torch` turns them."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def to_torch(x):
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))


def loaded(theirs, folder, **overrides):
    """The same model here, by way of a folder."""
    theirs.save_pretrained(folder)
    return jaxmodels.load_pretrained(folder, **overrides)


def random_variables(model, x, seed=3):
    """As `init`, but nothing keeps its special starting value, and nothing is compiled."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        noise = rng.normal(size=leaf.shape)
        if name.endswith(("scale", "var")):
            noise = 1 + 0.1 * noise
        elif name.endswith("kernel"):
            noise = noise * np.prod(leaf.shape[1 if "blocks" in name else 0 : -1]) ** -0.5
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def assert_same_gradients(theirs, output, model, variables, x, folder, tolerance=1e-4):
    """Gradients of sum(output * weights) for all parameters; values of the output too.

    Theirs are saved as if they were weights and read as such, so the names need
    no second table.

    Args:
      output: from their model to the tensor that a call of ours returns.
    """
    out = output(theirs)
    weights = np.random.default_rng(7).normal(size=out.shape).astype(np.float32)
    theirs.zero_grad()
    (out * torch.tensor(weights)).sum().backward()
    as_weights = copy.deepcopy(theirs)
    for ours, parameter in zip(as_weights.parameters(), theirs.parameters(), strict=True):
        ours.data = torch.zeros_like(ours) if parameter.grad is None else parameter.grad
    _, expected = loaded(as_weights, folder)

    def loss(params):
        out = model.apply({**variables, "params": params}, x)
        return (out * weights).sum(), out

    found, ours = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    scale = out.detach().abs().max().item()
    np.testing.assert_allclose(ours, out.detach().numpy(), atol=tolerance * scale)

    def compare(path, ours, reference):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        largest = np.abs(reference).max()
        # Softmax does not see the bias of the keys, and no test hides patches.
        silent = name.endswith(("k/bias", "mask"))
        assert (largest > 1e-3) != silent, (name, largest)
        np.testing.assert_allclose(ours, reference, atol=tolerance * max(largest, 1), err_msg=name)

    jax.tree_util.tree_map_with_path(compare, found, expected["params"])
