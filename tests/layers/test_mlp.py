"""The feed-forward against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jaxmodels.layers.mlp import GatedMlp, Mlp


def test_equals_torch_in_value_and_gradient():
    torch.manual_seed(0)
    up, down = torch.nn.Linear(7, 17), torch.nn.Linear(17, 7)
    theirs = torch.nn.Sequential(up, torch.nn.GELU(approximate="tanh"), down)
    x = np.random.default_rng(0).normal(0, 2, size=(3, 5, 7)).astype(np.float32)
    expected = theirs(torch.tensor(x))
    expected.square().sum().backward()

    def numbers(linear, attribute=lambda p: p.detach()):
        weight, bias = attribute(linear.weight).numpy(), attribute(linear.bias).numpy()
        return {"kernel": jnp.asarray(weight.T), "bias": jnp.asarray(bias)}

    params = {"up": numbers(up), "down": numbers(down)}

    def loss(params):
        out = Mlp(hidden_width=17).apply({"params": params}, jnp.asarray(x))
        return jnp.square(out).sum(), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-5)
    for name, linear in (("up", up), ("down", down)):
        for key, theirs in numbers(linear, lambda p: p.grad).items():
            np.testing.assert_allclose(grads[name][key], theirs, rtol=1e-4, atol=1e-4)


def test_gated_equals_that_of_llama_in_value_and_gradient():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=7, intermediate_size=17, num_attention_heads=1, head_dim=2
    )
    theirs = transformers.models.llama.modeling_llama.LlamaMLP(config)
    x = np.random.default_rng(0).normal(0, 2, size=(3, 5, 7)).astype(np.float32)
    expected = theirs(torch.tensor(x))
    expected.square().sum().backward()
    linears = {"gate": theirs.gate_proj, "up": theirs.up_proj, "down": theirs.down_proj}
    params = {
        name: {"kernel": jnp.asarray(linear.weight.detach().numpy().T)}
        for name, linear in linears.items()
    }

    def loss(params):
        out = GatedMlp(hidden_width=17).apply({"params": params}, jnp.asarray(x))
        return jnp.square(out).sum(), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-5)
    for name, linear in linears.items():
        want = linear.weight.grad.numpy().T
        np.testing.assert_allclose(grads[name]["kernel"], want, rtol=1e-4, atol=1e-4)
