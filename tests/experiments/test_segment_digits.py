"""The experiment on segmentation: its scores and claim, a run of two steps, and misuse."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NAME = "segment_digits.py"
SCRIPT = Path(__file__).parents[2] / "experiments" / NAME


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_outlines_are_the_pixels_on_both_sides(script):
    masks = np.zeros((1, 5, 7), np.int32)
    masks[0, :, 3:] = 4
    masks[0, 2, 3] = 9
    expected = np.zeros((5, 7), bool)
    expected[:, 2:4] = True
    expected[2, 4] = True
    np.testing.assert_array_equal(script["at_outlines"](masks)[0], expected)


def test_scores_are_those_of_the_definitions(script):
    masks = np.zeros((1, 4, 6), np.int32)
    masks[0, :, 3:] = 2
    predictions = masks.copy()
    predictions[0, :, 2] = 2  # a column at the outline is wrong
    found = script["measure"](masks, predictions)
    assert found["PA"] == pytest.approx(20 / 24)
    assert found["MPA"] == pytest.approx((8 / 12 + 1) / 2)
    assert found["MIoU"] == pytest.approx((8 / 12 + 12 / 16) / 2)
    assert found["FWIoU"] == pytest.approx((12 * 8 / 12 + 12 * 12 / 16) / 24)
    assert found["PA at outlines"] == pytest.approx(0.5)
    assert found["PA elsewhere"] == 1


@pytest.mark.parametrize(
    ("change", "holds"), [({}, True), ({"MIoU": 0.4}, False), ({"PA at outlines": 0.72}, False)]
)
def test_the_claim_is_about_scores_and_outlines(script, change, holds):
    coarse = {"MIoU": 0.5, "PA at outlines": 0.7, "PA elsewhere": 0.9}
    skips = {"MIoU": 0.8, "PA at outlines": 0.9, "PA elsewhere": 0.95}
    judge = script["skips_sharpen"]
    assert judge({"fcn_coarse": coarse, "fcn": skips, "unet": {**skips, **change}}) is holds
    assert judge({"fcn_coarse": coarse, "fcn": {**skips, **change}, "unet": skips}) is holds
    assert judge({"fcn": skips, "unet": skips}) is None


def test_networks_of_a_comparison_are_of_one_size(script):
    """Within a tenth of their mean; the ways up may differ by what they learn."""
    config = script["Config"]()
    jax, image = script["jax"], script["jnp"].zeros((1, 48, 48, 1))
    for models, most in (("networks", 0.1), ("stacks", 0.0)):
        sizes = []
        for model in script[models](config).values():
            shapes = jax.eval_shape(model.init, jax.random.key(0), image)
            sizes.append(sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])))
        assert len(sizes) > 2
        np.testing.assert_allclose(sizes, np.mean(sizes), rtol=most)


def test_stacks_see_equally_far_and_only_one_through_holes(script):
    config = script["Config"]()
    schedules = script["dilations"](config)
    assert sum(schedules["dilated"]) == sum(schedules["hybrid"]) == 12
    assert script["share_read"](schedules["hybrid"]) == 1
    # 9 of 25 places along each side.
    assert script["share_read"](schedules["dilated"]) == pytest.approx((9 / 25) ** 2)


def test_writes_what_it_promises(launch, tmp_path):
    chosen = ("--models", "fcn", "--upsampling", "--stacks", "hybrid")
    size = ("--canvas", 24, "--scale", 1, 2, "--width", 4, "--batch-size", 2, "--test-scenes", 9)
    flags = (*chosen, *size, "--steps", 2, "--short-steps", 1, "--folder", "run")
    _, errors = (process := launch(NAME, *flags, cwd=tmp_path)).communicate()
    assert process.returncode == 0, errors
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    measured = result["measured"]
    assert not result["holds"] and "not judged" in result["claim"]
    names = ("networks, fcn", "stacks, hybrid")
    for name in names:
        for score in ("PA", "MPA", "MIoU", "FWIoU", "PA at outlines", "PA elsewhere"):
            assert 0 <= measured[f"{name}: {score}"] <= 1
        assert measured[f"{name}: seconds"] > 0
    assert measured["best MIoU"] == max(measured[f"{name}: MIoU"] for name in names)
    with Image.open(tmp_path / "run" / "figure.png") as figure:
        assert figure.size[0] > 500


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--models", "--upsampling", "--stacks"), "models, upsampling and stacks are all empty"),
        (("--models", "fcn", "fcn"), "models=('fcn', 'fcn') names one twice"),
        (("--test-scenes", "0"), "test_scenes=0 must be at least 1"),
        (("--ink-weight", "0"), "ink_weight=0.0 must be above 0"),
        (("--canvas", "8"), "digit_scenes: canvas=(8, 8) is smaller than a digit"),
        (("--rate", "40"), "hybrid_dilations: no schedule of depth=4"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
