"""Optimizers against PyTorch's or NumPy in float64, and the schedule against its closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxmodels import training
from jaxmodels.training.optimizers import make_optimizer

LEARNING_RATE, STEPS = 3e-2, 17


def descend(optimizer, params, gradients):
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def rate(i):
    """The closed form of a cosine over STEPS steps without warm-up."""
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * i / STEPS))


def torch_descend(optimizer_class, weight, bias, gradients, *, decay, clip=None, **options):
    weight, bias = (torch.nn.Parameter(torch.tensor(x)) for x in (weight, bias))
    groups = [{"params": [weight], "weight_decay": decay}, {"params": [bias], "weight_decay": 0.0}]
    options = options or {"betas": (0.9, 0.99), "eps": 1e-8}
    optimizer = optimizer_class(groups, lr=LEARNING_RATE, **options)
    for i, gradient in enumerate(gradients):
        for group in optimizer.param_groups:
            group["lr"] = rate(i)
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


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize(
    ("name", "torch_class", "ours", "theirs"),
    [
        ("adam_l2", torch.optim.Adam, {"b2": 0.99}, {"betas": (0.9, 0.99), "eps": 1e-8}),
        ("sgd", torch.optim.SGD, {"b1": 0.8}, {"momentum": 0.8}),
    ],
)
def test_decay_in_the_gradient_is_torch_s(case, clip, name, torch_class, ours, theirs):
    params, gradients = case
    optimizer = make_optimizer(
        name, LEARNING_RATE, steps=STEPS, weight_decay=0.3, clip_norm=clip, **ours
    )
    found = descend(optimizer, params, gradients)["layer"]
    weight, bias = torch_descend(
        torch_class,
        params["layer"]["kernel"],
        params["layer"]["bias"],
        gradients,
        decay=0.3,
        clip=clip,
        **theirs,
    )
    np.testing.assert_allclose(found["kernel"], weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["bias"], bias, rtol=1e-5, atol=1e-6)


def test_decoupled_decay_shrinks_and_decay_in_adam_s_gradient_walks(case):
    """Without a gradient: w (1 - lr decay) each step, against lr sign(w) whatever the decay."""
    params, gradients = case
    start = np.float64(params["layer"]["kernel"])
    nothing = jax.tree.map(np.zeros_like, gradients[:1])

    def after_one(name, decay):
        optimizer = make_optimizer(name, LEARNING_RATE, steps=STEPS, weight_decay=decay)
        return descend(optimizer, params, nothing)["layer"]["kernel"]

    for decay in (0.3, 3.0):
        shrunk = start * (1 - LEARNING_RATE * decay)
        np.testing.assert_allclose(after_one("adamw", decay), shrunk, rtol=1e-6)
        walked = start - LEARNING_RATE * np.sign(start)
        np.testing.assert_allclose(after_one("adam_l2", decay), walked, rtol=1e-5, atol=1e-6)


def test_lion_is_the_paper_s_recursion(case):
    params, gradients = case
    optimizer = make_optimizer("lion", LEARNING_RATE, steps=STEPS, weight_decay=0.3)
    found = descend(optimizer, params, gradients)["layer"]
    for name, decay in (("kernel", 0.3), ("bias", 0.0)):
        w, m = np.float64(params["layer"][name]), 0.0
        for i, gradient in enumerate(gradients):
            g = np.float64(gradient["layer"][name])
            w = w - rate(i) * (np.sign(0.9 * m + 0.1 * g) + decay * w)
            m = 0.99 * m + 0.01 * g
        np.testing.assert_allclose(found[name], w, rtol=1e-5, atol=1e-6)


def momenta(gradients, beta):
    """Nesterov's, as Adam with it takes them: corrected for starting at zero."""
    m = 0.0
    for t, g in enumerate(gradients, start=1):
        m = beta * m + (1 - beta) * g
        yield beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)


def orthogonalised(matrix):
    """What five steps of Newton and Schulz do to the singular values, without the steps."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return 0.2 * math.sqrt(max(matrix.shape)) * (u * s) @ v


def test_muon_orthogonalises_hidden_matrices_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    shapes = {
        "up": {"kernel": (5, 3), "bias": (3,)},
        "stack": {"kernel": (2, 3, 7)},
        "conv": {"kernel": (3, 2, 2, 5)},
        "head": {"kernel": (3, 2)},
    }

    def tree():
        return {k: {n: rng.normal(size=s) for n, s in v.items()} for k, v in shapes.items()}

    params, gradients = tree(), [tree() for _ in range(4)]
    optimizer = make_optimizer("muon", LEARNING_RATE, steps=STEPS, weight_decay=0.3)
    single = jax.tree.map(jnp.float32, (params, gradients))
    found = jax.jit(lambda p, g: descend(optimizer, p, g))(*single)

    def muon(layer, to_matrices, back):
        w = params[layer]["kernel"]
        for i, m in enumerate(momenta([g[layer]["kernel"] for g in gradients], 0.95)):
            update = back(np.stack([orthogonalised(x) for x in to_matrices(m)]))
            w = w - rate(i) * (update + 0.3 * w)
        np.testing.assert_allclose(found[layer]["kernel"], w, rtol=1e-4, atol=1e-5)

    muon("up", lambda m: m[None], lambda x: x[0])
    muon("stack", lambda m: m, lambda x: x)
    muon("conv", lambda m: m.reshape(1, 12, 5), lambda x: x.reshape(3, 2, 2, 5))
    for layer, name, decay in (("up", "bias", 0.0), ("head", "kernel", 0.3)):
        w, v = params[layer][name], 0.0
        own = [g[layer][name] for g in gradients]
        for i, (m, g) in enumerate(zip(momenta(own, 0.9), own, strict=True)):
            v = 0.999 * v + 0.001 * g**2
            direction = m / (np.sqrt(v / (1 - 0.999 ** (i + 1))) + 1e-8)
            w = w - rate(i) * (direction + decay * w)
        np.testing.assert_allclose(found[layer][name], w, rtol=1e-4, atol=1e-5)


def test_adafactor_is_torch_s():
    """Factored for the kernel, which is large, and whole for the bias, which is not."""
    rng = np.random.default_rng(0)

    def tree(scale=1.0):
        shapes = {"kernel": (128, 131), "bias": (7,)}
        return {"layer": {n: np.float32(scale * rng.normal(size=s)) for n, s in shapes.items()}}

    params, gradients = tree(0.1), [tree() for _ in range(5)]
    optimizer = make_optimizer("adafactor", LEARNING_RATE, steps=STEPS)
    found = descend(optimizer, params, gradients)["layer"]
    options = {"beta2_decay": -0.8, "eps": (1e-30, 1e-3), "d": 1.0}
    weight, bias = torch_descend(
        torch.optim.Adafactor, *params["layer"].values(), gradients, decay=0.0, **options
    )
    np.testing.assert_allclose(found["kernel"], weight, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["bias"], bias, rtol=1e-4, atol=1e-6)
    sizes = [leaf.size for leaf in jax.tree.leaves(optimizer.init(params))]
    assert max(sizes) < 200


@pytest.mark.parametrize("name", ["adamw", "adam_l2", "sgd", "lion", "muon", "adafactor"])
def test_every_optimizer_shares_schedule_mask_and_clipping(case, name):
    params, gradients = case
    options = {"steps": STEPS, "warmup": 1, "weight_decay": 0.3, "clip_norm": 1e-3}
    optimizer = make_optimizer(name, LEARNING_RATE, **options)

    @jax.jit
    def two_updates(gradient):
        state = optimizer.init(params)
        first, state = optimizer.update(gradient, state, params)
        return first["layer"], optimizer.update(gradient, state, params)[0]["layer"]

    nothing = jax.tree.map(np.zeros_like, gradients[0])
    first, second = two_updates(nothing)
    np.testing.assert_array_equal(first["kernel"], 0.0)
    np.testing.assert_array_equal(second["bias"], 0.0)
    assert np.all(np.sign(second["kernel"]) == -np.sign(params["layer"]["kernel"]))
    large, larger = (jax.tree.map(lambda g, k=k: g * k, gradients[0]) for k in (1e2, 1e4))
    found, expected = two_updates(large)[1], two_updates(larger)[1]
    np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=1e-4)
    np.testing.assert_allclose(found["bias"], expected["bias"], rtol=1e-4)
    assert np.abs(found["bias"]).max() > 0


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
        ({"warmup": 9}, r"make_optimizer: adamw: warmup=9 .* below steps=9"),
        ({"warmup": -1}, r"adamw: warmup=-1"),
        ({"learning_rate": 0.0}, r"adamw: learning_rate=0.0 must be positive"),
        ({"final_fraction": 1.5}, r"final_fraction=1.5 must lie in \[0, 1\]"),
        ({"weight_decay": -0.1}, r"weight_decay=-0.1"),
        ({"clip_norm": 0.0}, r"clip_norm=0.0 must be positive"),
        ({"b2": 1.0}, r"adamw: b2=1.0 must lie in \[0, 1\)"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        training.adamw(**({"learning_rate": 1e-3, "steps": 9} | change))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("adamv", {}, r"unknown optimizer 'adamv'; did you mean adamw.* There are adamw, adam_l2"),
        ("sgd", {"b2": 0.9}, r"make_optimizer: sgd: b2=0.9 is of no use to it; it has b1"),
        ("adafactor", {"b1": 0.9}, r"adafactor: b1=0.9 is of no use to it; it has neither moment"),
        ("lion", {"steps": 0}, r"make_optimizer: lion: warmup=0"),
    ],
)
def test_bad_names_and_moments(name, change, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(name, **({"learning_rate": 1e-3, "steps": 9} | change))


def test_optimizer_works_under_jit_and_keeps_structure(case):
    params, gradients = case
    optimizer = training.adamw(LEARNING_RATE, steps=STEPS, clip_norm=1.0)
    eager = descend(optimizer, params, gradients)
    jitted = jax.jit(lambda p, g: descend(optimizer, p, g))(params, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager, jitted)
