"""The experiment on ViT and Swin: its counts and fits, a run of two steps, and misuse."""

import json
import math
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

NAME = "vit_or_swin.py"
SCRIPT = Path(__file__).parents[2] / "experiments" / NAME


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def parameters(script):
    """Shapes of the parameters of each model."""
    image = jnp.zeros((1, 64, 64, 1))
    models = {name: script["build"](script["Config"](), name) for name in script["MODELS"]}
    return models, {
        name: jax.eval_shape(model.init, jax.random.key(0), image) for name, model in models.items()
    }


def test_models_are_of_equal_size(parameters):
    sizes = [
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))
        for shapes in parameters[1].values()
    ]
    assert len(sizes) == 3 and max(sizes) < 1.1 * min(sizes)


def counted(script, parameters, name, size):
    models, shapes = parameters
    image = jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32)
    return script["multiplications"](jax.make_jaxpr(models[name].apply)(shapes[name], image).jaxpr)


@pytest.mark.parametrize("size", [64, 512])
def test_multiplications_of_vit_are_those_of_the_paper(script, parameters, size):
    """Equation 1, 4 T D^2 + 2 T^2 D, the feed-forward, 8 T D^2, and both ends."""
    tokens, width, depth = (size // 8) ** 2, 128, 6
    blocks = depth * (12 * tokens * width**2 + 2 * tokens**2 * width)
    expected = blocks + tokens * 8 * 8 * width + width * 10
    found = counted(script, parameters, "ViT", size)
    # Positions are interpolated for all sizes but the one that is learnt.
    assert expected <= found <= expected * (1 if size == 64 else 1.01)


@pytest.mark.parametrize("name", ["Swin", "ResNet"])
def test_multiplications_without_loops_are_those_xla_counts(script, parameters, name):
    """XLA adds the cheap operations, and leaves out what meets the padding: little, here."""
    models, shapes = parameters
    image = jax.ShapeDtypeStruct((1, 256, 256, 1), jnp.float32)
    program = jax.jit(models[name].apply).lower(shapes[name], image)
    found = counted(script, parameters, name, 256)
    assert found == pytest.approx(program.cost_analysis()["flops"] / 2, rel=0.1)


def test_a_loop_counts_as_often_as_it_runs(script):
    def loop(x):
        return jax.lax.scan(lambda x, _: (x @ jnp.ones((3, 3)), None), x, length=5)[0]

    program = jax.make_jaxpr(loop)(jnp.ones((2, 3))).jaxpr
    assert script["multiplications"](program) == 5 * 2 * 3 * 3


SIZES = (32, 64, 128, 256, 512, 1024)


def cost(power, bend=0.0):
    """Grows with this power over the larger half, at the end by more; the rest says nothing."""
    pixels = np.array(SIZES) ** 2.0
    z = np.log(pixels / 512**2)
    grown = np.where(pixels < 256**2, 1e-3, np.exp(power * z + bend * z**2)).tolist()
    return {"pixels": pixels.tolist(), "seconds": grown, "multiplications": grown}


def test_exponents_are_fitted_to_the_larger_half(script):
    assert script["exponent"](cost(1.7, 0.1), "seconds") == pytest.approx(1.7)


@pytest.mark.parametrize(
    ("vit", "swin", "bend", "holds"),
    [(1.7, 1.0, 0.1, True), (1.7, 1.2, 0.1, False), (1.3, 1.0, 0.1, False), (1.7, 1.0, 0, False)],
)
def test_the_claim_is_about_both(script, vit, swin, bend, holds):
    config = script["Config"](sizes=SIZES)
    # Without a bend its sign would be left to rounding.
    grown = {"ViT": cost(vit, bend - 1e-6), "Swin": cost(swin)}
    result = script["conclude"](config, grown, {})
    assert result.holds is holds
    assert result.measured["ViT: exponent of multiplications at the end"] == pytest.approx(
        vit + bend * np.log(4), abs=1e-3
    )


TINY = {
    "ViT": {"patch_size": 8, "width": 16, "depth": 1, "num_heads": 2},
    "Swin": {"window": 4, "width": 16, "depths": (1,), "num_heads": (2,)},
    "ResNet": {"depths": (1,), "widths": (16,), "stem_width": 16},
}


def test_writes_what_it_promises(tmp_path):
    """In this process and with small networks: programs of the real ones take a minute."""
    script = runpy.run_path(str(SCRIPT))
    for name, (registered, _) in list(script["MODELS"].items()):
        script["MODELS"][name] = registered, TINY[name]
    scenes = {"image_size": 32, "scale": (2.0, 3.0), "train_scenes": 50, "test_scenes": 6}
    costs = {"sizes": (16, 32, 48), "turn_seconds": 0.0}
    config = script["Config"](**scenes, **costs, steps=2, batch_size=4)
    measured = script["main"](config, tmp_path).measured
    for name in TINY:
        assert 0 <= measured[f"{name}: accuracy"] <= 1
        assert measured[f"{name}: images per second"] > 0
        assert measured[f"{name}: ms at 48"] > 0
        assert (tmp_path / name / "metrics.jsonl").is_file()
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert costs["Swin"]["pixels"] == [256, 1024, 2304]
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.size[0] > 500


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sizes", "8", "64", "128"), "must be at least 16"),
        (("--image-size", "8"), "must be at least 16"),
        (("--sizes", "64", "64"), "sizes=(64, 64): give at least three, in ascending order"),
        (("--sizes", "128", "64", "32"), "sizes=(128, 64, 32): give at least three"),
        (("--steps", "-1"), "steps=-1 must not be negative"),
        (("--image-size", "32", "--scale", "5", "6"), "canvas=(32, 32) is smaller than a digit"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
