"""Preprocessing against transformers' image processors on images of many shapes."""

import json

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from jaxmodels.weights.preprocess import Preprocessing, load_preprocessing, preprocessing_config

PROCESSORS = {
    "vit": ViTImageProcessorPil(size={"height": 31, "width": 37}),
    "dinov2": BitImageProcessorPil(
        size={"shortest_edge": 37}, crop_size={"height": 31, "width": 29}
    ),
    "resnet": ConvNextImageProcessorPil(size={"shortest_edge": 27}, crop_pct=0.875, resample=3),
    "large convnext": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "only crop": BitImageProcessorPil(
        do_resize=False, crop_size={"height": 40, "width": 61}, do_normalize=False
    ),
    "raw": BitImageProcessorPil(
        size={"height": 11, "width": 13}, do_center_crop=False, do_rescale=False,
        image_mean=[90, 100, 110], image_std=[50, 60, 70],
    ),
}  # fmt: skip


def photographs():
    """Smooth and rough, in both orientations, one smaller than every size above."""
    rng = np.random.default_rng(0)
    sizes = ((53, 71), (71, 53), (19, 23), (64, 64), (200, 90))
    return [
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).resize(size, i % 4)
        for i, size in enumerate(sizes)
    ]


def folder_of(processor, path):
    processor.save_pretrained(path)
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize("name", PROCESSORS)
def test_equals_the_image_processor_within_a_grey_level(tmp_path, name):
    processor = PROCESSORS[name]
    ours = load_preprocessing(folder_of(processor, tmp_path / "a"))
    images = photographs()
    expected = np.stack(processor(images)["pixel_values"]).transpose(0, 2, 3, 1)
    found = ours(images)
    assert found.dtype == np.float32
    level = ours.scale / np.max(ours.std)
    np.testing.assert_allclose(found, expected, atol=0.01 * level, rtol=1e-5)
    np.testing.assert_array_equal(ours([np.asarray(image) for image in images]), found)


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_is_written_is_read_here_and_by_transformers(tmp_path, name):
    ours = load_preprocessing(folder_of(PROCESSORS[name], tmp_path / "a"))
    written = tmp_path / "b"
    written.mkdir()
    (written / "config.json").write_text("{}")
    (written / "preprocessor_config.json").write_text(json.dumps(preprocessing_config(ours)))
    assert load_preprocessing(written) == ours
    theirs = transformers.AutoImageProcessor.from_pretrained(written)
    images = photographs()
    expected = np.stack(theirs(images)["pixel_values"]).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours(images), expected, atol=1e-4, rtol=1e-5)


def test_older_files_have_numbers_for_sizes(tmp_path):
    config = {"size": 19, "do_center_crop": True, "crop_size": 17, "image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    ours = load_preprocessing(tmp_path)
    assert ours == Preprocessing(size=(19, 19), crop=(17, 17), mean=(0.1, 0.2, 0.3))
    path.write_text(json.dumps(config | {"default_to_square": False, "size": [19, 23]}))
    assert load_preprocessing(tmp_path).size == (19, 23)
    path.write_text(json.dumps(config | {"default_to_square": False}))
    assert load_preprocessing(tmp_path).size == 19


def test_grey_images():
    grey = np.arange(77, dtype=np.uint8).reshape(7, 11)
    ours = Preprocessing(size=None, mean=0.0, std=1.0)
    np.testing.assert_allclose(ours([grey])[0, ..., 0], grey / 255, rtol=1e-6)
    np.testing.assert_array_equal(ours([grey[..., None]]), ours([grey]))
    assert ours([Image.fromarray(grey)]).shape == (1, 7, 11, 3)


def test_bad_input(tmp_path):
    ours = Preprocessing(size=8)
    with pytest.raises(ValueError, match=r"float64 \(7, 11, 3\) is neither a PIL image nor"):
        ours([np.zeros((7, 11, 3))])
    with pytest.raises(ValueError, match=r"uint8 \(3, 7, 11\) is neither"):
        ours([np.zeros((3, 7, 11), np.uint8)])
    with pytest.raises(ValueError, match=r"end up with shapes \[\(8, 12, 3\), \(8, 16, 3\)\]"):
        ours([np.zeros((4, 6, 3), np.uint8), np.zeros((4, 8, 3), np.uint8)])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no preprocessor_config.json in"):
        load_preprocessing(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    for config in ({"resample": 9}, {"do_pad": True}, {"crop_pct": 0.9, "do_center_crop": True}):
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"resample=.* switches on .* known are"):
            load_preprocessing(tmp_path)
