"""The experiment on small objects: its claim, its trials, a run of one step, and misuse."""

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from _detectors import small_detector
from PIL import Image

NAME = "small_objects.py"
SCRIPT = Path(__file__).parents[2] / "experiments" / NAME


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize(("small", "holds"), [(0.3, True), (0.2, False), (0.1, False)])
def test_every_remedy_must_help(script, small, holds):
    figures = {"none": {"ap_small": 0.2}, "dilation": {"ap_small": 0.4}}
    result = script["conclude"](figures | {"resolution": {"ap_small": small}})
    assert result.holds is holds
    assert result.measured["dilation: gain in AP small"] == pytest.approx(0.2)
    without = script["conclude"]({"dilation": {"ap_small": 0.4}, "resolution": {"ap_small": 1.0}})
    assert not without.holds and "not judged" in without.claim


def test_remedies_differ_in_the_map_or_in_the_scales(script):
    trials = script["trials"](script["Config"]())
    strides = {}
    for name, trial in trials.items():
        model = small_detector(trial.model, num_classes=10, channels=1, **trial.fields)
        strides[name] = {model.backbone.feature_strides[m] for m in model.region_maps}
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 128, 128, 1)))
        assert 5e5 < sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) < 2e6
    one = {"none": {16}, "image_pyramid": {16}, "resolution": {16}, "dilation": {8}}
    assert strides == one | {"feature_pyramid": {4, 8, 16}}
    scales = {name: (trial.train_scales, trial.test_scales) for name, trial in trials.items()}
    assert scales.pop("image_pyramid") == ((1.0, 2.0), (1.0, 2.0))
    assert scales.pop("resolution") == ((2.0,), (2.0,))
    assert set(scales.values()) == {((1.0,), (1.0,))}


def test_writes_what_it_promises(launch, tmp_path):
    size = ("--canvas", 32, "--width", 8, "--scale", 1, 2, "--count", 1, 2, "--test-scenes", 5)
    flags = (*size, "--steps", 1, "--batch-size", 2, "--folder", "run")
    process = launch(NAME, "--remedies", "none", "dilation", *flags, cwd=tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    measured = json.loads((tmp_path / "run" / "result.json").read_text())["measured"]
    for name in ("none", "dilation"):
        assert 0 <= measured[f"{name}: ap"] <= 1
        assert measured[f"{name}: milliseconds an image"] > 0
    with Image.open(tmp_path / "run" / "figure.png") as figure:
        assert figure.size[0] > 500


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--remedies", "none"), "remedies=('none',): give two names or more"),
        (("--larger", "1"), "larger=1.0 must be above 1"),
        (("--steps", "0"), "steps=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
