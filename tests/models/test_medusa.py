"""Medusa's heads and their loss against torch, and what training them changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxmodels import training
from jaxmodels.models.language.medusa import MedusaHeads

BATCH, LENGTH, WIDTH, VOCABULARY, HEADS, DEPTH = 2, 11, 5, 13, 3, 2
rng = np.random.default_rng(0)
HIDDEN = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
TARGETS = rng.integers(0, VOCABULARY, (BATCH, LENGTH))
MODEL = MedusaHeads(VOCABULARY, heads=HEADS, depth=DEPTH)


def parameters():
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.asarray(HIDDEN))["params"]
    return jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(1), p.shape), params)


def batch(**more):
    return {"hidden": jnp.asarray(HIDDEN), "targets": jnp.asarray(TARGETS), **more}


def torchs(params):
    """Logits of all heads, in float64, and the parameters that they are functions of."""
    leaves = jax.tree.map(lambda p: torch.tensor(np.array(p, np.float64)).requires_grad_(), params)
    logits = []
    for k in range(HEADS):
        h = torch.tensor(HIDDEN, dtype=torch.float64)
        for i in range(DEPTH):
            block = leaves[f"head_{k}"][f"block_{i}"]
            h = h + torch.nn.functional.silu(h @ block["kernel"] + block["bias"])
        logits.append(h @ leaves[f"unembed_{k}"]["kernel"])
    return torch.stack(logits, dim=-2), leaves


def torch_loss(logits, documents):
    """A head at a time and a token at a time, as the paper's equation 1 has it."""
    total = 0.0
    for k in range(1, HEADS + 1):
        losses = [
            torch.nn.functional.cross_entropy(logits[b, t, k - 1], torch.tensor(TARGETS[b, t + k]))
            for b in range(BATCH)
            for t in range(LENGTH - k)
            if documents[b, t] == documents[b, t + k]
        ]
        total = total + 0.8**k * torch.stack(losses).mean()
    return total


def test_logits_equal_torch():
    params = parameters()
    found = jax.jit(MODEL.apply)({"params": params}, jnp.asarray(HIDDEN))
    assert found.shape == (BATCH, LENGTH, HEADS, VOCABULARY)
    np.testing.assert_allclose(found, torchs(params)[0].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_equal_torch(packed):
    params = parameters()
    documents = np.zeros((BATCH, LENGTH), np.int32)
    more = {}
    if packed:
        documents[0, 4:], documents[1, 7:] = 1, 2
        more = {"segment_ids": jnp.asarray(documents)}

    def loss_fn(params):
        loss, *rest = MODEL.loss(params, batch(**more), None)
        return loss, rest

    (loss, (terms, state)), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    logits, leaves = torchs(params)
    wanted = torch_loss(logits, documents)
    wanted.backward()
    np.testing.assert_allclose(loss, wanted.item(), rtol=1e-5)
    assert set(terms) == {"cross_entropy_1", "cross_entropy_2", "cross_entropy_3"} and state == {}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b.grad, rtol=1e-4, atol=1e-5), gradient, leaves
    )


def test_heads_begin_as_the_models_own():
    kernel = jax.random.normal(jax.random.key(2), (WIDTH, VOCABULARY))
    params = MODEL.begin_with(kernel)
    found = MODEL.apply({"params": params}, jnp.asarray(HIDDEN))
    for head in range(HEADS):
        np.testing.assert_allclose(found[:, :, head], HIDDEN @ kernel, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"MedusaHeads: kernel \(5, 7\) must be \(D, vocab_size=13"
    ):
        MODEL.begin_with(kernel[:, :7])


def test_a_training_step_lowers_the_loss():
    optimizer = optax.sgd(0.1)
    example = {"h": jax.ShapeDtypeStruct((1, WIDTH), jnp.float32)}
    state = training.init_state(MODEL, optimizer, jax.random.key(0), example)
    step = training.make_step(MODEL.loss, optimizer)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[0] > losses[1] > losses[2]


def test_half_precision_gives_logits_in_float32():
    model = MedusaHeads(VOCABULARY, heads=HEADS, depth=DEPTH, dtype=jnp.bfloat16)
    params = parameters()
    found = model.apply({"params": params}, jnp.asarray(HIDDEN))
    assert found.dtype == jnp.float32
    wanted = MODEL.apply({"params": params}, jnp.asarray(HIDDEN))
    assert 0 < jnp.max(jnp.abs(found - wanted)) < 0.05 * jnp.max(jnp.abs(wanted))
