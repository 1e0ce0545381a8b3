"""AdamW against PyTorch's, and the schedule against its closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxmodels import training

LEARNING_RATE, STEPS = 3e-2, 17


def descend(optimizer, params, gradients):
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def torch_descend(optimizer_class, weight, bias, gradients, *, decay, clip=None):
    weight, bias = (torch.nn.Parameter(torch.tensor(x)) for x in (weight, bias))
    groups = [{"params": [weight], "weight_decay": decay}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = optimizer_class(groups, lr=LEARNING_RATE, betas=(0.9, 0.99), eps=1e-8)
    for i, gradient in enumerate(gradients):
        # The closed form of a cosine over STEPS steps without warm-up.
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * i / STEPS))
        weight.grad, bias.grad = (torch.tensor(gradient["layer"][n]) for n in ("kernel", "bias"))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([weight, bias], clip)
        optimizer.step()
    return weight.detach().numpy(), bias.detach().numpy()


@pytest.fixture
def case():
    rng = np.random.default_rng(0)

    def tree():
        shapes = {"kernel": (5, 3), "bias": (2, 3)}  # a stacked bias has two axes
        return {"layer": {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}}

    return tree(), [tree() for _ in range(11)]


@pytest.mark.parametrize("clip", [None, 0.7])
def test_adamw_is_torch_adamw_with_decay_on_kernels_only(case, clip):
    params, gradients = case
    optimizer = training.adamw(
        LEARNING_RATE, steps=STEPS, b2=0.99, weight_decay=0.3, clip_norm=clip
    )
    ours = descend(optimizer, params, gradients)["layer"]
    weight, bias = torch_descend(
        torch.optim.AdamW,
        params["layer"]["kernel"],
        params["layer"]["bias"],
        gradients,
        decay=0.3,
        clip=clip,
    )
    np.testing.assert_allclose(ours["kernel"], weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours["bias"], bias, rtol=1e-5, atol=1e-6)


def test_decay_is_decoupled_from_the_gradient(case):
    """L2 in the gradient (torch's Adam) goes elsewhere; the optimizer must tell them apart."""
    params, gradients = case
    optimizer = training.adamw(LEARNING_RATE, steps=STEPS, b2=0.99, weight_decay=0.3)
    ours = descend(optimizer, params, gradients)["layer"]["kernel"]
    coupled, _ = torch_descend(
        torch.optim.Adam, params["layer"]["kernel"], params["layer"]["bias"], gradients, decay=0.3
    )
    assert np.abs(ours - coupled).max() > 1e-2


def test_schedule_rises_linearly_and_falls_as_a_cosine():
    # Sign descent: with b1 = b2 = 0 Adam's update is the learning rate itself.
    optimizer = training.adamw(0.5, steps=12, warmup=4, final_fraction=0.1, b1=0.0, b2=0.0)
    params = {"kernel": jnp.zeros(())}
    state, seen = optimizer.init(params), []
    for _ in range(13):
        update, state = optimizer.update({"kernel": jnp.ones(())}, state, params)
        seen.append(-float(update["kernel"]))
    rise = [0.5 * i / 4 for i in range(4)]
    fall = [0.5 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 8))) for i in range(9)]
    np.testing.assert_allclose(seen, rise + fall, rtol=1e-5, atol=1e-7)


def test_decay_mask_follows_paths():
    tree = {"blocks": {"up": {"kernel": 1, "bias": 2}}, "label": {"embedding": 3}}
    assert training.decay_mask(tree) == {
        "blocks": {"up": {"kernel": True, "bias": False}},
        "label": {"embedding": False},
    }
    assert training.decay_mask(tree, "label|up/b")["label"]["embedding"] is True
    assert training.decay_mask(tree, "label|up/b")["blocks"]["up"] == {
        "kernel": False,
        "bias": True,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup": 9}, r"adamw: warmup=9 .* below steps=9"),
        ({"warmup": -1}, r"adamw: warmup=-1"),
        ({"learning_rate": 0.0}, r"adamw: learning_rate=0.0 must be positive"),
        ({"weight_decay": -0.1}, r"weight_decay=-0.1"),
        ({"clip_norm": 0.0}, r"clip_norm=0.0 must be positive"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        training.adamw(**({"learning_rate": 1e-3, "steps": 9} | change))


def test_optimizer_works_under_jit_and_keeps_structure(case):
    params, gradients = case
    optimizer = training.adamw(LEARNING_RATE, steps=STEPS, clip_norm=1.0)
    eager = descend(optimizer, params, gradients)
    jitted = jax.jit(lambda p, g: descend(optimizer, p, g))(params, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager, jitted)
