"""The experiment on depth and width against closed forms, its verdict, and a short run."""

import dataclasses
import json
import math
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

NAME = "signal_propagation.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(Path(__file__).parents[2] / "experiments" / NAME))


@pytest.fixture(scope="module")
def small(script):
    return script["Config"](
        depth=8, width=64, draws=16, batch_size=32, depths=(3, 8), widths=(8, 16), steps=3, seeds=2
    )


@pytest.mark.parametrize(
    ("initialiser", "norm", "forward", "back"),
    [
        ("He uniform", "none", 1.0, 1.0),
        ("Xavier truncated_normal", "none", 0.5, 0.5),
        ("LeCun normal", "batch", 1.0, math.pi / (math.pi - 1)),
    ],
)
def test_mean_squares_follow_the_closed_forms(script, small, initialiser, norm, forward, back):
    """Of variance going in and of gradients coming back, a layer at a time."""
    squares, gradients = script["plain"](small, initialiser, norm, jax.random.key(0))
    assert squares.shape == gradients.shape == (8,)
    assert script["factor"](np.asarray(squares)) == pytest.approx(forward, rel=0.06)
    assert 1 / script["factor"](np.asarray(gradients)) == pytest.approx(back, rel=0.08)
    # The gradient of <last layer, direction> in the last layer is the direction.
    assert float(gradients[-1]) == pytest.approx(1.0, abs=0.1)


def test_skips_add_up(script, small):
    """Pre-norm adds a variance of one a block; post-norm and DeepNorm always leave one."""
    key = jax.random.key(1)
    found = {name: script["residual"](small, name, 8, key) for name in script["SKIPS"][1:]}
    np.testing.assert_allclose(found["pre-norm"][0], 1 + np.arange(1, 9), rtol=0.15)
    for name in ("post-norm", "DeepNorm"):
        np.testing.assert_allclose(found[name][0], 1, rtol=1e-3)
    # Branches of DeepNorm are (beta / alpha)^2 = 1 / 4 N of the skip, 1 / 32 here.
    assert float(found["DeepNorm"][1]) < 0.3 * float(found["post-norm"][1])


def test_the_change_of_a_first_step_is_torchs(script):
    """|J J^T d| of two post-norm blocks, for the same kernels, by torch's whole Jacobian."""
    config, blocks, width = script["Config"](width=16, batch_size=3, draws=1), 2, 8
    key = jax.random.key(5)
    for_x, for_out, *for_kernels = jax.random.split(jax.random.split(key, 1)[0], 4)
    init = jax.nn.initializers
    kernels = [
        torch.tensor(
            np.stack([draw(k, (width, width)) for k in jax.random.split(key, blocks)]),
            dtype=torch.float64,
        )
        for draw, key in zip((init.he_normal(), init.lecun_normal()), for_kernels, strict=True)
    ]
    x, direction = (
        torch.tensor(np.asarray(jax.random.normal(k, (3, width)))).double()
        for k in (for_x, for_out)
    )

    def norm(x):
        return torch.nn.functional.layer_norm(x, (width,), eps=1e-6)

    def output(first, second):
        out = norm(x)
        for one, two in zip(first, second, strict=True):
            out = norm(out + torch.relu(out @ one) @ two)
        return norm(out).reshape(-1)

    parts = torch.autograd.functional.jacobian(output, tuple(kernels))
    jacobian = torch.cat([part.reshape(3 * width, -1) for part in parts], dim=1)
    want = (jacobian @ jacobian.T @ direction.reshape(-1) / 3).norm() / 3**0.5
    _, change = script["residual"](config, "post-norm", blocks, key)
    np.testing.assert_allclose(change, want, rtol=1e-4)


def test_a_step_of_descent_is_torchs(script):
    """The loss after one step on all pictures at once, in either parameterisation."""
    images = np.random.default_rng(0).normal(size=(1, 5)).astype(np.float32)
    labels = np.array([3])
    config = script["Config"](batch_size=2, steps=2, seeds=1)
    key = jax.random.split(jax.random.split(jax.random.key(config.seed), 1)[0])[0]
    for name, rate in (("standard", 0.05), ("tangent", 0.3)):
        model = script["network"](name, 7)
        variables = model.init(key, jnp.asarray(images))["params"]
        weights = [np.asarray(variables[f"layers_{i}"]["kernel"], np.float64) for i in (0, 2, 4)]
        leaves = [torch.tensor(w, requires_grad=True) for w in weights]
        scales = [math.sqrt(2 / len(w)) if name == "tangent" else 1.0 for w in weights]
        optimizer = torch.optim.SGD(leaves, lr=rate)
        for _ in range(2):  # the last tenth of two steps is the second one
            hidden = torch.tensor(images.astype(np.float64))
            for leaf, scale in zip(leaves[:2], scales, strict=False):
                hidden = torch.relu(hidden @ (scale * leaf))
            out = hidden @ (scales[2] * leaves[2])
            loss = ((out - torch.eye(10)[labels]) ** 2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rates = jnp.array([rate])
        found = script["train"](config, name, 7, rates, jnp.asarray(images), jnp.asarray(labels))
        np.testing.assert_allclose(found[0], loss.item(), rtol=1e-3)


def perfect(script, config):
    """What the closed forms predict."""
    depth = np.arange(config.depth)
    rates = script["RATES"]
    ones = np.ones(config.depth)
    closed = {name: (scale / 2) ** depth for name, (_, scale) in script["INITIALISERS"].items()}
    back = {name: math.pi / (math.pi - 1) if name == "batch" else 1 for name in script["NORMS"]}
    depths = np.array(config.depths, float)
    return {
        "initialisers": {name: (squares, squares) for name, squares in closed.items()},
        "norms": {name: (ones, factor ** (-1.0 * depth)) for name, factor in back.items()},
        "skips": {name: ones for name in script["SKIPS"]},
        "changes": {"pre-norm": depths**0.5, "post-norm": depths, "DeepNorm": np.ones(len(depths))},
        "rates": {
            "standard": np.abs(rates[None] * np.array(config.widths)[:, None] - 2.0),
            "tangent": np.tile(np.abs(rates - 0.5), (len(config.widths), 1)),
        },
    }


def test_the_verdict_follows_the_numbers(script):
    config, conclude = script["Config"](depth=40), script["conclude"]
    good = perfect(script, config)
    result = conclude(config, good)
    assert result.holds
    assert result.measured["standard: exponent of width in the best rate"] == pytest.approx(-1)
    assert result.measured["tangent: exponent of width in the best rate"] == pytest.approx(0)
    flat, depth = np.ones(40), np.arange(40.0)
    for changed in (
        {"initialisers": {**good["initialisers"], "LeCun normal": (flat, flat)}},
        {"initialisers": {**good["initialisers"], "He normal": (0.9**depth, flat)}},
        {"norms": {**good["norms"], "batch": (flat, flat)}},
        {"norms": {**good["norms"], "layer": (flat, 1.1**depth)}},
        {"norms": {**good["norms"], "rms": (0.5**depth, flat)}},
        {"changes": {**good["changes"], "DeepNorm": good["changes"]["post-norm"]}},
        {"rates": {**good["rates"], "tangent": good["rates"]["standard"]}},
        {"rates": {**good["rates"], "standard": good["rates"]["tangent"]}},
    ):
        assert not conclude(config, {**good, **changed}).holds, changed.keys()


def test_a_short_run_measures_what_it_promises(script, small, tmp_path, monkeypatch):
    """With few initialisers and norms, because each is compiled."""
    for table, kept in (("INITIALISERS", ("LeCun normal",)), ("NORMS", ("none", "rms"))):
        for name in [name for name in script[table] if name not in kept]:
            monkeypatch.delitem(script[table], name)
    config = dataclasses.replace(small, width=16, draws=2)
    measured = script["main"](config, tmp_path).measured
    assert measured["LeCun normal: factor a layer"] == pytest.approx(0.5, rel=0.3)
    assert measured["rms norm: activations, last over first"] == pytest.approx(1, rel=0.5)
    assert measured["post-norm: exponent of depth in a step's change"] > 0.5
    assert abs(measured["DeepNorm: exponent of depth in a step's change"]) < 0.3
    assert json.loads(json.dumps(measured)) == measured
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--depth", "3"), "depth=3, width=256: give at least 4 layers and a width that 8 divides"),
        (("--width", "20"), "depth=100, width=20: give"),
        (("--widths", "64", "64"), "widths=(64, 64): give two different numbers"),
        (("--draws", "0"), "batch_size, draws, steps and seeds must be at least 1"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
