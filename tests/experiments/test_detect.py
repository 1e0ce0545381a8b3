"""The script that trains detectors: what it is given, a run of two steps, and misuse."""

import dataclasses
import itertools
import json
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _detectors import Name, judge, pretrained_detector, small_detector
from PIL import Image

from jaxmodels import create_model, data, save_pretrained, training, weights
from jaxmodels.models.detection.detector import Detector
from jaxmodels.ops.detections import Detections

NAME = "detect.py"
SCRIPT = Path(__file__).parents[2] / "experiments" / NAME


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize("name", Name.__args__)
def test_small_detectors_learn_and_detect_and_are_of_one_size(name):
    model = small_detector(name, num_classes=10, channels=1)
    images = jax.ShapeDtypeStruct((2, 128, 128, 1), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    batch = {
        "image": images,
        "boxes": jax.ShapeDtypeStruct((2, 5, 4), jnp.float32),
        "box_labels": jax.ShapeDtypeStruct((2, 5), jnp.int32),
    }
    params, state = variables["params"], {"batch_stats": variables["batch_stats"]}
    loss, terms, changed = jax.eval_shape(model.loss, params, batch, jax.random.key(0), state)
    assert loss.shape == () and len(terms) > 1
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, state)
    found = jax.eval_shape(model.detect, variables, images)
    assert found.boxes.shape == (2, model.max_detections, 4)
    assert 5e5 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 2e6


def test_judging_counts_images_once_and_magnifies_their_sizes():
    """Boxes of 8 x 8 are small, unless the picture is taken to be larger."""

    class Knows:
        def detect(self, variables, images, image_sizes):
            boxes = jnp.zeros((len(images), 1, 4)).at[..., 2:].set(8.0)
            there = jnp.ones((len(images), 1), bool)
            return Detections(boxes, variables * there, 0 * there, there)

    batch = {
        "image": np.zeros((2, 16, 16, 1), np.float32),
        "boxes": np.array([[[0.0, 0, 8, 8]]] * 2),
        "box_labels": np.zeros((2, 1), np.int32),
        "filler": np.array([False, True]),
        "image_id": np.array([3, 3]),
    }
    for magnified, size in ((1, "ap_small"), (5, "ap_medium"), (13, "ap_large")):
        evaluator, rate = judge(Knows(), 0.5, [batch], 2, magnified=magnified)
        found = evaluator.coco().figures()
        assert found["ap"] == found[size] == 1
        assert np.isnan(rate)  # the only batch is the one that compiles
    _, rate = judge(Knows(), 0.5, [batch, {**batch, "image_id": np.array([4, 4])}], 2)
    assert rate > 0


def test_writes_what_it_promises(launch, tmp_path):
    size = ("--canvas", 32, "--width", 8, "--scale", 1, 2, "--count", 1, 2, "--test-scenes", 5)
    flags = (*size, "--steps", 2, "--batch-size", 2, "--test-scales", 1, 2, "--folder", "run")
    _, errors = (process := launch(NAME, "--model", "yolo_v2", *flags, cwd=tmp_path)).communicate()
    assert process.returncode == 0, errors
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    measured = result["measured"]
    assert measured["parameters"] > 0 and measured["seconds of training"] > 0
    for figure in ("ap", "ap50", "VOC 2007 mAP", "VOC 2010 mAP"):
        assert 0 <= measured[figure] <= 1
    assert result["holds"] == (measured["ap50"] > 0.85)
    with Image.open(tmp_path / "run" / "figure.png") as figure:
        assert figure.size[0] > 500


def test_the_seed_alone_decides_what_is_learnt():
    """Bit for bit, with the proposals that Faster R-CNN samples at random."""
    model = small_detector("faster_rcnn", num_classes=10, channels=1, width=8)
    scenes = data.digit_scenes("train", size=12, canvas=(32, 32), scale=(1.0, 2.0), count=(1, 2))
    optimizer = training.adamw(1e-3, steps=3, warmup=1)
    step = training.make_step(model.loss, optimizer, ema=0.9)
    example = {"images": jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)}

    def train(seed):
        state = training.init_state(model, optimizer, jax.random.key(seed), example, ema=True)
        for batch in itertools.islice(data.batches(scenes, 2, seed=seed), 3):
            state, _ = step(state, batch)
        return jax.tree.leaves((state.params, state.ema, state.model_state))

    first, again, other = map(train, (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_reads_coco_and_voc_in_their_published_layout(script, tmp_path):
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / split / "a.jpg")
        content = {
            "images": [{"id": 7, "file_name": "a.jpg", "width": 40, "height": 30}],
            "annotations": [
                {"id": 1, "image_id": 7, "category_id": 3, "bbox": [4, 5, 6, 7], "iscrowd": 0}
            ],
            "categories": [{"id": 3, "name": "cat"}],
        }
        file = tmp_path / "annotations" / f"instances_{split}.json"
        file.write_text(json.dumps(content))
    config = script["Config"](data=f"coco:{tmp_path}", shortest=60)
    train_set, test_set, channels = script["load_data"](config)
    assert (train_set.train, train_set.flip, test_set.train, channels) == (True, True, False, 3)
    batch = test_set.batch(np.array([0]), np.random.default_rng(0))
    np.testing.assert_allclose(batch["boxes"][0, 0], [8, 10, 20, 24])


def test_published_models_are_the_registered_ones():
    """Names of the scripts and of the registry agree."""
    known = small_detector.__globals__["_KNOWN"]
    assert set(known) == set(Name.__args__)
    published = small_detector.__globals__["published_detector"]
    found = published("fcos", num_classes=7, channels=3)
    assert found == create_model("fcos_resnet50_fpn", num_classes=7)


def test_starts_from_a_pretrained_resnet(script, tmp_path):
    """Its maps in the detector are its own, of images as the weights want them."""
    classifier = create_model("resnet18", num_classes=2)
    images = jax.random.uniform(jax.random.key(0), (1, 64, 64, 3), minval=-1)
    variables = jax.jit(classifier.init)(jax.random.key(1), images)
    save_pretrained(classifier, variables, tmp_path / "resnet")
    config = script["Config"](model="centernet", pretrained=str(tmp_path / "resnet"))
    pictures = SimpleNamespace(class_names=("a",) * 7)
    model, start = script["make_model"](config, pictures, 3)
    assert model == create_model("centernet_resnet18", num_classes=7)

    @jax.jit
    def maps(variables, images):
        found = model.apply(variables, images, method=lambda m, x: m.backbone.backbone.features(x))
        return found["C5"]

    stages = create_model("resnet18", num_classes=0)
    alone = {**variables, "params": {**variables["params"]}}
    del alone["params"]["head"]
    expected = stages.apply(alone, images)
    np.testing.assert_allclose(maps(start, images).mean(axis=(1, 2)), expected, atol=1e-5)


@pytest.mark.parametrize("pretrained", ["", "resnet"])
def test_losses_and_detections_see_images_as_the_weights_want_them(script, pretrained):
    """In units of ImageNet's deviations, with zeros in the padding."""

    class Sees:
        def loss(self, params, batch, key):
            return batch["image"], {}, {}

        def detect(self, variables, images, image_sizes):
            return images

    config = script["Config"](pretrained=pretrained)
    batch = {"image": jnp.full((1, 2, 2, 3), 0.4), "image_size": jnp.array([[2.0, 1.0]])}
    expected = np.full((1, 2, 2, 3), 0.4)
    if pretrained:
        mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        expected = (0.7 - mean) / deviation * np.array([1.0, 0.0])[:, None] * np.ones((1, 2, 1, 1))
    trained, *_ = script["loss_of"](config, Sees())(None, batch, None)
    found = script["detector_of"](config, Sees())(None, batch["image"], batch["image_size"])
    np.testing.assert_allclose(trained, expected, rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_one_other_scale_is_trained_at(script):
    """And not only several."""

    class Measures(Detector):
        def loss(self, params, batch, key, model_state=None):
            return jnp.float32(batch["image"].shape[1]), {}, {}

    config = script["Config"](train_scales=(2.0,))
    batch = {"image": jnp.zeros((1, 8, 8, 1)), "boxes": jnp.zeros((1, 1, 4))}
    loss, *_ = script["loss_of"](config, Measures())(None, batch, jax.random.key(0))
    assert loss == 16


def test_a_file_is_torchvisions_faster_rcnn(monkeypatch):
    """Which other detectors cannot start from."""
    load = partial(pretrained_detector, source="a.pth", num_classes=4, seed=0)
    with pytest.raises(ValueError, match="a file is torchvision's Faster R-CNN, not a fcos; take"):
        load("fcos")
    monkeypatch.setattr(weights, "load_torchvision_detector", lambda *given, **to: (given, to))
    want = {"num_classes": 4, "classes": None}
    assert load("faster_rcnn_fpn") == (("a.pth",), want)


def test_labels_of_a_file_are_category_ids_if_one_says_so(script, monkeypatch):
    """Theirs begin with the background, and COCO's ids have gaps."""
    monkeypatch.setattr(weights, "load_torchvision_detector", lambda *given, **to: (given, to))
    coco = SimpleNamespace(class_names=("person", "sheep", "toothbrush"), category_ids=(1, 20, 90))
    config = script["Config"](model="faster_rcnn_fpn", pretrained="a.pth", same_classes=True)
    want = {"num_classes": 3, "classes": [0, 19, 89]}
    assert script["make_model"](config, coco, 3) == (("a.pth",), want)
    config = dataclasses.replace(config, pretrained="resnet")
    with pytest.raises(ValueError, match="pretrained=resnet: a ResNet knows no boxes"):
        script["make_model"](config, coco, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data", "folder"), "data='folder': give scenes, coco:FOLDER or voc:FOLDER"),
        (("--data", "coco:nowhere"), "coco_detection: "),
        (("--data", "voc:nowhere"), "voc_detection: "),
        (("--test-scales", "0"), "test_scales=(0.0,) must be positive"),
        (("--steps", "0"), "steps=0 must be at least 1"),
        (("--same-classes",), "same_classes: there are none without pretrained"),
        (("--published",), "published models see colour, the images have 1"),
        (("--pretrained", "somewhere"), "pretrained=somewhere: trained models see colour"),
        (("--canvas", "7"), "digit_scenes: canvas=(7, 7) is smaller than a digit"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
