"""The classifier's script: digits, a folder of pictures, fine-tuning, and misuse."""

import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxmodels import create_model, load_pretrained, save_pretrained
from jaxmodels.weights import Preprocessing

NAME = "classify.py"
SCRIPT = Path(__file__).parents[2] / "experiments" / NAME


def finish(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_learns_digits(launch, tmp_path):
    flags = ("--steps", 120, "--learning-rate", 5e-3, "--augment", "affine", "--ema", 0.5)
    fields = ("depths=(1,1)", "widths=(16,32)", "stem_width=16")
    finish(launch(NAME, *flags, "--fields", *fields, "--folder", "run", cwd=tmp_path))
    measured = result_of(tmp_path / "run")["measured"]
    assert measured["held_out"] == 360 and measured["most_frequent_class"] < 0.15
    assert 0.5 < measured["top_1"] <= measured["top_5"]
    with Image.open(tmp_path / "run" / "figure.png") as figure:
        assert figure.size[0] > 500


@pytest.fixture
def pictures(tmp_path):
    """Two classes that differ in colour, twenty pictures each."""
    rng = np.random.default_rng(0)
    for name, colour in (("red", (200, 60, 50)), ("blue", (40, 70, 190))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.normal(colour, 30, size=(19, 23, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def test_fine_tunes_a_checkpoint_on_a_folder(launch, pictures, tmp_path):
    model = create_model(
        "vit_tiny_patch16_224", image_size=16, patch_size=8, width=24, depth=2, num_heads=3
    )
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    save_pretrained(
        model, variables, tmp_path / "start", preprocessing=Preprocessing((16, 16), mean=0.4)
    )
    flags = ("--data", pictures, "--image-size", 16, "--pretrained", "start", "--batch-size", 8)
    options = ("--steps", 30, "--warmup", 2, "--augment", "flip", "cutmix", "--folder", "run")
    finish(launch(NAME, *flags, *options, cwd=tmp_path))
    result = result_of(tmp_path / "run")
    assert result["measured"]["top_1"] == 1.0 and result["holds"]
    tuned, _ = load_pretrained(tmp_path / "run" / "model")
    assert tuned.num_classes == 2 and tuned.width == 24


def test_normalises_as_the_checkpoint_says(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    told = Preprocessing((4, 4), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    model = create_model(
        "vit_tiny_patch16_224", image_size=4, patch_size=4, width=12, depth=1, num_heads=3
    )
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))
    save_pretrained(model, variables, tmp_path / "start", preprocessing=told)
    levels = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), np.uint8)
    found = script["normaliser"](script["Config"](pretrained=str(tmp_path / "start")))(
        np.float32(levels) / np.float32(127.5) - 1
    )
    expected = (levels / 255 - np.array([0.4, 0.5, 0.6])) / np.array([0.2, 0.3, 0.4])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "resnet19"), "unknown model 'resnet19'"),
        (("--model", "dit_s_2"), "model=dit_s_2: a DiT is no classifier of digits"),
        (("--augment", "blur"), "augment=['blur']: choose among"),
        (("--fields", "depths"), "fields='depths': write name=value"),
        (("--pretrained", "nowhere"), "'nowhere' is neither an existing folder nor a hub id"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
