"""The comparison of detectors: its claims, what it trains, a run of one step, and misuse."""

import itertools
import json
import runpy
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

NAME = "detector_comparison.py"
SCRIPT = Path(__file__).parents[2] / "experiments" / NAME
PYRAMID = "the pyramid gains most on small digits"
POSITION = "R-FCN matches Faster R-CNN with a faster head"
HEAD = "faster_rcnn, last stage as head"
TRIDENT = "TridentNet's single branch keeps most of the gain"
IOU = "generalized IoU beats L1"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def found():
    """Figures with which all claims hold."""
    base = {"ap": 0.5, "ap_small": 0.3, "ap_large": 0.6, "images a second": 10.0}
    return {
        "faster_rcnn": base,
        "faster_rcnn_fpn": base | {"ap_small": 0.5, "ap_large": 0.7},
        HEAD: base | {"milliseconds of the head": 2.0},
        "r_fcn": base | {"ap": 0.49, "milliseconds of the head": 1.0},
        "tridentnet for one branch": base | {"ap": 0.6},
        "tridentnet, one branch": base | {"ap": 0.56},
        "fcos": base | {"ap": 0.55},
        "fcos, L1": base | {"ap": 0.54},
    }


@pytest.mark.parametrize(
    ("name", "change", "fails"),
    [
        ("fcos", {}, None),
        ("faster_rcnn_fpn", {"ap_small": 0.35}, PYRAMID),
        ("faster_rcnn", {"ap_small": 0.6, "ap_large": 0.9}, PYRAMID),
        ("r_fcn", {"ap": 0.47}, POSITION),
        (HEAD, {"milliseconds of the head": 0.9}, POSITION),
        ("tridentnet for one branch", {"ap": 0.63}, TRIDENT),
        ("tridentnet for one branch", {"ap": 0.45}, TRIDENT),
        ("fcos", {"ap": 0.53}, IOU),
    ],
)
def test_claims_are_about_pairs(script, name, change, fails):
    figures = found()
    judged = script["claims"](figures | {name: figures[name] | change})
    assert judged == {claim: claim != fails for claim in (PYRAMID, POSITION, TRIDENT, IOU)}


def test_claims_about_others_are_not_judged(script):
    few = {name: found()[name] for name in (HEAD, "r_fcn", "fcos")}
    judged = script["claims"](few)
    assert judged == {PYRAMID: None, POSITION: True, TRIDENT: None, IOU: None}


def test_the_heads_time_is_what_the_backbone_does_not_take(script, monkeypatch):
    """By a clock that says 15 ms with head and 5 ms without, and at first what compiling took."""

    class Same:
        def apply(self, variables, images, method):
            return images

        def detect(self, variables, images):
            return images

    turns = script["TURNS"]
    spans = [9.0, 3.0, *([0.015, 0.005] * turns)]
    spans[4] = 0.5  # once the machine was busy
    ticks = itertools.chain.from_iterable((0.0, span) for span in spans)
    clock = types.SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setitem(script["milliseconds_of_head"].__globals__, "time", clock)
    batch = {"image": np.zeros((2, 4, 4, 1), np.float32)}
    assert script["milliseconds_of_head"](Same(), {}, batch) == pytest.approx(5)
    assert next(ticks, None) is None


def test_special_trials_come_with_their_detector(script):
    config = script["Config"](models=("fcos", "tridentnet"))
    assert script["trials"](config) == {
        "fcos": ("fcos", {}),
        "tridentnet": ("tridentnet", {}),
        "tridentnet for one branch": ("tridentnet", {"ranges": ((0.0, 1e9),) * 3}),
        "fcos, L1": ("fcos", {"box_loss": "l1"}),
    }
    assert len(script["trials"](script["Config"]())) == 14


def test_the_counterpart_of_r_fcn_runs_the_last_stage_on_each_region(script):
    config = script["Config"](models=("r_fcn",), width=8)
    trials = script["trials"](config)
    assert {*trials} == {"r_fcn", HEAD}
    name, fields = trials[HEAD]
    model = script["make"](config, name, **fields)
    images = jax.ShapeDtypeStruct((1, 64, 64, 1), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    assert {*params["head"]} == {"block_0"} and not any("stages_3" in k for k in params["backbone"])
    position_sensitive = script["make"](config, "r_fcn")
    stages = jax.eval_shape(position_sensitive.init, jax.random.key(0), images)["params"][
        "backbone"
    ]
    shapes = jax.tree.map(jnp.shape, stages["stages_3_0"])
    assert jax.tree.map(jnp.shape, params["head"]["block_0"]) == shapes
    assert model.backbone.feature_strides["C4"] == 8


def test_writes_what_it_promises(launch, tmp_path):
    size = ("--canvas", 32, "--width", 8, "--scale", 1, 2, "--count", 1, 2, "--test-scenes", 5)
    flags = (*size, "--steps", 1, "--batch-size", 2, "--folder", "run")
    process = launch(NAME, "--models", "yolo_v1", "yolo_v2", *flags, cwd=tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert not result["holds"] and "not judged" in result["claim"]
    for name in ("yolo_v1", "yolo_v2"):
        for figure in ("ap", "ap50", "ap75"):
            assert 0 <= result["measured"][f"{name}: {figure}"] <= 1
        assert result["measured"][f"{name}: images a second"] > 0
        assert json.loads((tmp_path / "run" / name / "figures.json").read_text())
    with Image.open(tmp_path / "run" / "figure.png") as figure:
        assert figure.size[0] > 500


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--models", "fcos", "fcos"), "models=('fcos', 'fcos'): give one name or more"),
        (("--width", "0"), "width=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
