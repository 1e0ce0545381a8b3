"""The layers around the delta rules: transformers' with copied weights, and the paper's equations.

Outputs, and gradients for the input and every parameter.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import conv1d, silu
from transformers import KimiLinearConfig, Qwen3NextConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from jaxmodels.layers.mixers.delta_net import DeltaNet
from jaxmodels.layers.mixers.gated_delta_net import GatedDeltaNet
from jaxmodels.layers.mixers.kimi_delta import KimiDeltaAttention

BATCH, LENGTH, MODEL = 2, 19, 11


def random_parameters(module):
    """Starting values hide mistakes: all norms are one, some biases zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) / 2
        parameter.data = noise + 1 if "norm" in name else noise
    return module


def compare(mixer, module, convert):
    """Ours with the weights of `module`; `convert` maps its weights, and so its gradients."""
    rng = np.random.default_rng(0)
    x, weight = (rng.normal(size=(BATCH, LENGTH, MODEL)).astype(np.float32) for _ in range(2))
    theirs = torch.tensor(x, requires_grad=True)
    expected = module(theirs)
    (expected * torch.tensor(weight)).sum().backward()
    tensors = dict(module.named_parameters())
    params = convert({name: p.detach().numpy() for name, p in tensors.items()})
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, {"params": params}) == jax.tree.map(lambda a: a.shape, shapes)

    def loss(params, x):
        out, _ = mixer.apply({"params": params}, x)
        return jnp.vdot(out, weight), out

    grads, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, jnp.asarray(x))
    expected_grads = convert({name: p.grad.numpy() for name, p in tensors.items()})
    np.testing.assert_allclose(out, expected.detach(), atol=1e-4)
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(grads),
        jax.tree.leaves((expected_grads, theirs.grad.numpy())),
        strict=True,
    ):
        bound = 1e-4 * max(1, abs(wanted).max())
        np.testing.assert_allclose(found, wanted, atol=bound, rtol=0, err_msg=str(path))


def kernel(weight):
    return {"kernel": weight.T}


@pytest.mark.parametrize("key_heads", [2, 6])
def test_gated_delta_net_matches_qwen3_next(key_heads):
    key_dim, value_dim, value_heads = 5, 7, 6
    shared = value_heads // key_heads
    config = Qwen3NextConfig(
        hidden_size=MODEL,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        linear_conv_kernel_dim=3,
        rms_norm_eps=1e-3,
    )

    def convert(theirs):
        # A head of keys after the other, each with all that is shared by it.
        sizes = np.cumsum([key_dim, key_dim, shared * value_dim])
        in_heads = theirs["in_proj_qkvz.weight"].reshape(key_heads, -1, MODEL)
        parts = np.split(in_heads, sizes, axis=1)
        *qkv, gate = (part.reshape(-1, MODEL) for part in parts)
        per_head = theirs["in_proj_ba.weight"].reshape(key_heads, 2, shared, MODEL)
        return {
            "qkv": kernel(np.concatenate(qkv)),
            "conv": kernel(theirs["conv1d.weight"][:, 0]),
            "gate": kernel(gate),
            "beta": kernel(per_head[:, 0].reshape(-1, MODEL)),
            "decay": kernel(per_head[:, 1].reshape(-1, MODEL)),
            "A_log": theirs["A_log"],
            "dt_bias": theirs["dt_bias"],
            "norm": {"scale": theirs["norm.weight"]},
            "out": kernel(theirs["out_proj.weight"]),
        }

    mixer = GatedDeltaNet(
        num_heads=key_heads,
        head_dim=key_dim,
        num_value_heads=value_heads,
        value_dim=value_dim,
        conv_size=3,
        norm_eps=1e-3,
        chunk_size=8,
    )
    compare(mixer, random_parameters(Qwen3NextGatedDeltaNet(config, 0)), convert)


def test_kimi_delta_attention_matches_kimi_linear():
    config = KimiLinearConfig(
        hidden_size=MODEL,
        linear_attn_config={"num_heads": 3, "head_dim": 5, "short_conv_kernel_size": 4},
        rms_norm_eps=1e-3,
    )

    def convert(theirs):
        qkv = [theirs[f"{name}_proj.weight"] for name in "qkv"]
        return {
            "qkv": kernel(np.concatenate(qkv)),
            "conv": kernel(theirs["conv1d.weight"][:, 0]),
            "decay_down": kernel(theirs["forget_gate.f_a_proj.weight"]),
            "decay_up": kernel(theirs["forget_gate.f_b_proj.weight"]),
            "A_log": theirs["forget_gate.A_log"].reshape(-1),
            "dt_bias": theirs["forget_gate.dt_bias"],
            "beta": kernel(theirs["b_proj.weight"]),
            "gate_down": kernel(theirs["g_a_proj.weight"]),
            "gate_up": kernel(theirs["g_b_proj.weight"]),
            "norm": {"scale": theirs["o_norm.weight"]},
            "out": kernel(theirs["o_proj.weight"]),
        }

    mixer = KimiDeltaAttention(num_heads=3, head_dim=5, norm_eps=1e-3, chunk_size=8)
    compare(mixer, random_parameters(KimiLinearDeltaAttention(config, 0)), convert)


class PaperDeltaNet(torch.nn.Module):
    """The layer by its equations, a token after the other."""

    def __init__(self, heads, width, conv_size):
        super().__init__()
        self.heads, self.width = heads, width
        inner = heads * width
        self.q, self.k, self.v = (torch.nn.Linear(MODEL, inner, bias=False) for _ in range(3))
        self.convs = torch.nn.Parameter(torch.empty(3, inner, 1, conv_size))
        self.beta = torch.nn.Linear(MODEL, heads, bias=False)
        self.norm_weight = torch.nn.Parameter(torch.empty(width))
        self.out = torch.nn.Linear(inner, MODEL, bias=False)

    def forward(self, x):
        q, k, v = (
            self.convolved(project(x), weight)
            for project, weight in zip((self.q, self.k, self.v), self.convs, strict=True)
        )
        q, k = (y / y.norm(dim=-1, keepdim=True) for y in (q, k))
        beta = torch.sigmoid(self.beta(x))
        memory = torch.zeros(len(x), self.heads, self.width, self.width)
        outs = []
        for t in range(x.shape[1]):
            old = torch.einsum("bhkv,bhk->bhv", memory, k[:, t])
            new = beta[:, t, :, None] * v[:, t] + (1 - beta[:, t, :, None]) * old
            memory = memory + torch.einsum("bhk,bhv->bhkv", k[:, t], new - old)
            out = torch.einsum("bhkv,bhk->bhv", memory, q[:, t])
            out = out / torch.sqrt((out**2).mean(-1, keepdim=True) + 1e-3)
            outs.append(self.out((out * self.norm_weight).flatten(1)))
        return torch.stack(outs, 1)

    def convolved(self, y, weight):
        padded = torch.nn.functional.pad(y.transpose(1, 2), (weight.shape[-1] - 1, 0))
        y = silu(conv1d(padded, weight, groups=len(weight))).transpose(1, 2)
        return y.unflatten(-1, (self.heads, self.width))


def test_delta_net_follows_the_paper():
    def convert(theirs):
        convs = theirs["convs"]
        return {
            "qkv": kernel(np.concatenate([theirs[f"{name}.weight"] for name in "qkv"])),
            "conv": kernel(convs.reshape(-1, convs.shape[-1])),
            "beta": kernel(theirs["beta.weight"]),
            "norm": {"scale": theirs["norm_weight"]},
            "out": kernel(theirs["out.weight"]),
        }

    mixer = DeltaNet(num_heads=3, head_dim=5, conv_size=3, norm_eps=1e-3, chunk_size=8)
    compare(mixer, random_parameters(PaperDeltaNet(3, 5, 3)), convert)


@pytest.mark.parametrize("mixer", [GatedDeltaNet(num_heads=64), KimiDeltaAttention(num_heads=64)])
def test_fresh_layers_remember(mixer):
    """Rates times steps are small: after a token some memory is left everywhere, but not all."""
    params = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 2, 8)))["params"]
    rate, step = jnp.exp(params["A_log"]), jax.nn.softplus(params["dt_bias"])
    low = 0.01 if isinstance(mixer, GatedDeltaNet) else 1.0
    assert (rate >= low).all() and (rate <= 16).all() and rate.max() > 1
    assert (step >= 0.99e-3).all() and (step <= 0.101).all() and step.max() > 3 * step.min()


def test_value_heads_that_cannot_share_are_named():
    mixer = GatedDeltaNet(num_heads=4, num_value_heads=6)
    with pytest.raises(ValueError, match=r"^GatedDeltaNet: num_value_heads=6 .* num_heads=4;"):
        jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 2, 8)))
