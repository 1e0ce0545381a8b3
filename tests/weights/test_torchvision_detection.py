"""torchvision's Faster R-CNN state dict: names, shapes, every module, and what it detects.

torchvision itself is not asked: its modules are put together in torch, under the names
of their tensors, in `torchvision_modules`, and the boxes are found by the definition in
NumPy loops.
"""

import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models.detection import two_stage
from safetensors.numpy import load_file, save_file
from weights.torch_models import randomised, to_torch
from weights.torchvision_modules import box_branch, torchvision

from jaxmodels.models.detection.faster_rcnn import TwoLayerHead
from jaxmodels.models.detection.feature_pyramid import FeaturePyramid
from jaxmodels.models.vision.resnet import ResNet
from jaxmodels.ops.pyramid_roi_align import pyramid_roi_align
from jaxmodels.weights import (
    load_torchvision_detector,
    save_torchvision_detector,
    torchvision_detection,
    torchvision_images,
)

STRIDES = (4, 8, 16, 32)
ANCHOR_SIZES = (32, 64, 128, 256, 512)
SMALL = {"depths": (1, 2, 1, 1), "widths": (8, 12, 16, 20), "stem": 8, "width": 6, "hidden": 11}
OURS = {
    "backbone": FeaturePyramid(
        ResNet(SMALL["depths"], SMALL["widths"], stem_width=8, num_classes=0, norm="frozen"),
        width=6,
    ),
    "head": TwoLayerHead(11),
}


def small(epsilon=1e-5, classes=5, seed=0):
    """With boxes that stay near their anchors, and no class that always wins."""
    theirs = randomised(torchvision(**SMALL, classes=classes, epsilon=epsilon), seed)
    with torch.no_grad():
        theirs["rpn"]["head"].bbox_pred.weight *= 0.1
        theirs["roi_heads"]["box_predictor"]["cls_score"].bias *= 0
    return theirs


def written(theirs, path):
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    theirs = small()
    path = written(theirs, tmp_path_factory.mktemp("small") / "small.safetensors")
    return theirs, path, *load_torchvision_detector(path, **OURS)


def images(*shape):
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def test_published_names_and_shapes(tmp_path):
    """All are missing in a file that holds something else, and so all are listed."""
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        load_torchvision_detector(tmp_path / "other.safetensors")
    *missing, extra = str(caught.value).splitlines()[1:]
    assert extra == "  extra x (3,)"
    with torch.device("meta"):
        published = torchvision().state_dict()
    assert missing == [
        f"  missing {name} {tuple(tensor.shape)}" for name, tensor in sorted(published.items())
    ]
    # The oracle's own names, by the published checkpoint's.
    assert len(published) == 295
    assert tuple(published["backbone.body.layer3.5.conv2.weight"].shape) == (256, 256, 3, 3)
    assert tuple(published["backbone.body.layer1.0.downsample.1.running_var"].shape) == (256,)
    assert tuple(published["backbone.fpn.inner_blocks.3.0.weight"].shape) == (256, 2048, 1, 1)
    assert tuple(published["rpn.head.conv.0.0.weight"].shape) == (256, 256, 3, 3)
    assert tuple(published["roi_heads.box_head.fc6.weight"].shape) == (1024, 12544)
    assert tuple(published["roi_heads.box_predictor.bbox_pred.weight"].shape) == (364, 1024)
    # What torchvision states for these weights; there, norms are no parameters.
    norms = sum(
        t.numel() for name, t in published.items() if "bn" in name or "downsample.1" in name
    )
    assert sum(tensor.numel() for tensor in published.values()) - norms == 41_755_286


def test_both_directions_are_bit_exact(pair, tmp_path):
    _, path, model, variables = pair
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert model.num_classes == 4
    before = load_file(path)
    for name in ("ours.safetensors", "ours.pth"):
        save_torchvision_detector(model, variables, tmp_path / name)
        again, same = load_torchvision_detector(tmp_path / name, **OURS)
        assert again == model
        chex.assert_trees_all_equal(variables, same)
    after = load_file(tmp_path / "ours.safetensors")
    in_torch = torch.load(tmp_path / "ours.pth", weights_only=True)
    small().load_state_dict(in_torch, strict=True)
    assert before.keys() == after.keys() == in_torch.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])
        np.testing.assert_array_equal(array, in_torch[name].numpy())
    assert {path.name for path in tmp_path.iterdir()} == {"ours.safetensors", "ours.pth"}


def test_modules_and_detections_are_those_of_the_published_network(pair):
    """Backbone, pyramid, proposals' head, box branch; then the boxes of the whole."""
    theirs, _, model, variables = pair
    model = model.clone(candidates=(40, 40), proposals=(30, 30), max_detections=13)
    size, x = (128, 192), images(1, 128, 192, 3)

    @jax.jit
    def parts(x):
        pyramid = model.backbone
        backbone = {name: variables[name]["backbone"] for name in variables}
        body = {name: backbone[name]["backbone"] for name in backbone}
        c = pyramid.backbone.apply(body, x, method="features")
        p = pyramid.apply(backbone, x, method="features")
        scored = model.apply(variables, p, method="score_anchors")
        proposals, scores = model.apply(variables, x)
        return c, p, scored, proposals, scores, model.detect(variables, x)

    c, p, scored, proposals, scores, found = parts(jnp.asarray(x))

    def same(ours, reference):
        reference = reference.detach().numpy()
        scale = np.abs(reference).max()
        assert scale > 0.1
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-4 * scale)

    maps = theirs["backbone"]["body"](to_torch(x))
    pyramid = theirs["backbone"]["fpn"](maps)
    for ours, reference in zip([*c.values(), *p.values()], [*maps, *pyramid], strict=True):
        same(ours, reference.permute(0, 2, 3, 1))
    anchors = []
    heads = [theirs["rpn"]["head"](each) for each in pyramid]
    for i, (logits, deltas) in enumerate(heads):
        same(scored.logits[i], logits)
        same(scored.deltas[i], deltas)
        stride = 4 * 2**i
        grid = [-(-side // stride) for side in size]
        anchors.append(two_stage.anchors(grid, stride, ANCHOR_SIZES[i : i + 1], (0.5, 1, 2)))
        np.testing.assert_allclose(scored.anchors[i], anchors[-1])

    logits, deltas = ([x[0].detach().numpy() for x in each] for each in zip(*heads, strict=True))
    boxes, objectness = two_stage.propose(logits, deltas, anchors, size, 40, 30, 0.7)
    assert proposals.valid.all() and len(boxes) == 30
    np.testing.assert_allclose(proposals.boxes[0], boxes, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(proposals.scores[0], 1 / (1 + np.exp(-objectness)), rtol=1e-3)

    # RoIAlign has its own oracle; here are our regions, in torch's layout.
    pooled = jax.jit(
        lambda p, b: pyramid_roi_align(
            [p[f"P{i}"] for i in range(2, 6)], b, 7, strides=STRIDES, aligned=False
        )
    )(p, jnp.asarray(boxes[None], jnp.float32))
    logits, deltas = box_branch(theirs, to_torch(pooled[0]))
    same(scores.logits[0], logits)
    same(scores.deltas[0], deltas)
    probabilities = torch.softmax(logits, 1).detach().numpy()
    expected = two_stage.detect(probabilities, deltas.detach().numpy(), boxes, size, 0.05, 0.5, 13)
    assert len(expected[0]) == 13 and len({*expected[2]}) > 1
    np.testing.assert_allclose(found.boxes[0], expected[0], rtol=1e-3, atol=0.05)
    np.testing.assert_allclose(found.scores[0], expected[1], rtol=1e-3)
    np.testing.assert_array_equal(found.classes[0], expected[2])


def test_older_names_counters_and_another_epsilon(pair, tmp_path):
    """The published file is as old as that, and its norms added nothing to the variance."""
    theirs, _, _, variables = pair
    state = theirs.state_dict()
    for block in ("inner", "layer"):
        for i in range(4):
            for kind in ("weight", "bias"):
                name = f"backbone.fpn.{block}_blocks.{i}"
                state[f"{name}.{kind}"] = state.pop(f"{name}.0.{kind}")
    for kind in ("weight", "bias"):
        state[f"rpn.head.conv.{kind}"] = state.pop(f"rpn.head.conv.0.0.{kind}")
    state["backbone.body.bn1.num_batches_tracked"] = torch.tensor(7)
    state["backbone.body.bn1.running_var"][:3] = 1e-5
    torch.save(state, tmp_path / "old.pth")
    model, same = load_torchvision_detector(tmp_path / "old.pth", **OURS)
    variables["batch_stats"]["backbone"]["backbone"]["stem_conv"]["norm"]["var"] = same[
        "batch_stats"
    ]["backbone"]["backbone"]["stem_conv"]["norm"]["var"]
    chex.assert_trees_all_equal(same, variables)

    model, folded = load_torchvision_detector(tmp_path / "old.pth", norm_epsilon=0.0, **OURS)
    body = small(epsilon=0.0)["backbone"]["body"]
    body.load_state_dict({
        name.removeprefix("backbone.body."): tensor
        for name, tensor in state.items()
        if name.startswith("backbone.body.") and "tracked" not in name
    })  # fmt: skip
    x = images(1, 32, 48, 3)
    folded_body = {name: folded[name]["backbone"]["backbone"] for name in folded}
    ours = jax.jit(lambda x: model.backbone.backbone.apply(folded_body, x, method="features"))(x)
    with torch.no_grad():
        for name, expected in zip(ours, body(to_torch(x)), strict=True):
            expected = expected.permute(0, 2, 3, 1).numpy()
            np.testing.assert_allclose(
                ours[name], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
            )
    save_torchvision_detector(model, folded, tmp_path / "new.safetensors", norm_epsilon=0.0)
    _, again = load_torchvision_detector(tmp_path / "new.safetensors", norm_epsilon=0.0, **OURS)
    chex.assert_trees_all_close(folded, again, rtol=1e-6)


def test_another_number_of_classes_has_new_last_layers(pair):
    _, path, model, variables = pair
    finer, fresh = load_torchvision_detector(path, num_classes=2, **OURS)
    assert finer == model.clone(num_classes=2)
    new = {name: fresh["params"].pop(name) for name in ("classify", "refine")}
    shapes = {name: jax.tree.map(jnp.shape, each) for name, each in new.items()}
    assert shapes == {
        "classify": {"kernel": (11, 3), "bias": (3,)},
        "refine": {"kernel": (11, 12), "bias": (12,)},
    }
    assert not any(leaf.any() for leaf in jax.tree.leaves(new))
    old = {name: each for name, each in variables["params"].items() if name not in new}
    chex.assert_trees_all_equal(fresh["params"], old)


def test_some_classes_keep_what_they_have_learnt(pair):
    _, path, model, variables = pair
    fewer, found = load_torchvision_detector(path, classes=[3, 0], **OURS)
    assert fewer == model.clone(num_classes=2)
    file, labels = load_file(path), [0, 4, 1]
    for ours, theirs, numbers in (("classify", "cls_score", 1), ("refine", "bbox_pred", 4)):
        layer = found["params"].pop(ours)
        for name, array in (("kernel", layer["kernel"].T), ("bias", layer["bias"])):
            name = "weight" if name == "kernel" else name
            whole = file[f"roi_heads.box_predictor.{theirs}.{name}"]
            kept = whole.reshape(5, numbers, *whole.shape[1:])[labels]
            np.testing.assert_array_equal(array, kept.reshape(-1, *whole.shape[1:]))
    rest = {k: v for k, v in variables["params"].items() if k not in ("classify", "refine")}
    chex.assert_trees_all_equal(found["params"], rest)
    fresh = load_torchvision_detector(path, classes=[3, 0], num_classes=5, **OURS)
    assert fresh[0].num_classes == 5 and not fresh[1]["params"]["classify"]["kernel"].any()


@pytest.mark.parametrize("classes", [[], [1, 1], [4], [-1]])
def test_classes_that_the_file_has_not(pair, classes):
    with pytest.raises(ValueError, match=r"classes=\[.*\] must be different .*, 0 to 3"):
        load_torchvision_detector(pair[1], classes=classes, **OURS)


def test_images_are_normalised_as_theirs():
    pixels = np.random.default_rng(2).uniform(0, 1, (2, 5, 7, 3)).astype(np.float32)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (pixels - mean) / std
    ours = jax.jit(torchvision_images)
    found = ours(jnp.asarray(2 * pixels - 1))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    found = ours(jnp.asarray(2 * pixels - 1), jnp.array([[5.0, 7], [3, 4]]))
    expected[1, 3:], expected[1, :, 4:] = 0, 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_every_tensor_that_does_not_fit_is_listed(pair, tmp_path):
    _, path, _, _ = pair
    tensors = load_file(path)
    del tensors["rpn.head.cls_logits.bias"]
    tensors["rpn.head.conv.1.0.weight"] = np.zeros((6, 6, 3, 3), np.float32)
    tensors["backbone.body.bn1.running_mean"] = np.zeros(9, np.float32)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not fit the model") as caught:
        load_torchvision_detector(tmp_path / "other.safetensors", **OURS)
    assert str(caught.value).splitlines()[1:] == [
        "  missing rpn.head.cls_logits.bias (3,)",
        "  extra rpn.head.conv.1.0.weight (6, 6, 3, 3)",
        "  misshapen backbone.body.bn1.running_mean: (9,), expected (8,)",
    ]


def test_files_of_something_else(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"a\.bin ends in none of '.safetensors', '.pth' and"):
        load_torchvision_detector(path)
    with pytest.raises(ValueError, match="there is no file"):
        load_torchvision_detector(tmp_path / "none.pth")
    damaged = path.rename(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_torchvision_detector(damaged)
    torch.save({"model": {"x": torch.ones(1)}, "epoch": 3}, tmp_path / "run.pth")
    with pytest.raises(ValueError, match=r"holds \['epoch', 'model'\], not tensors by name"):
        load_torchvision_detector(tmp_path / "run.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"torch is not installed; install it or take a \.safe"):
        load_torchvision_detector(tmp_path / "run.pth")


class Opened:
    """What a pickle can do to whoever opens it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


def test_nothing_in_a_file_is_run(tmp_path):
    torch.save({"x": Opened(tmp_path / "run")}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds more than tensors, which could run any code"):
        load_torchvision_detector(tmp_path / "a.pth")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_old_file_as_it_was(pair, tmp_path, monkeypatch):
    _, _, model, variables = pair
    path = tmp_path / "new" / "a.safetensors"
    save_torchvision_detector(model, variables, path)
    before = path.read_bytes()

    def half(tensors, path, metadata):
        path.write_bytes(before[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(torchvision_detection, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        save_torchvision_detector(model, variables, path)
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


def test_variables_and_names_that_cannot_be_written(pair, tmp_path):
    _, _, model, variables = pair
    with pytest.raises(ValueError, match=r"variables\['batch_stats'\] does not fit") as caught:
        save_torchvision_detector(model, {"params": variables["params"]}, tmp_path / "a.pth")
    assert "missing backbone/backbone/stem_conv/norm/mean (8,)" in str(caught.value)
    with pytest.raises(ValueError, match=r"ends in none of"):
        save_torchvision_detector(model, variables, tmp_path / "a.npz")
    assert not [*tmp_path.iterdir()]
