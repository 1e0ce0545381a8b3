"""FCOS against its composition in torch, and its definitions point by point."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_layers as oracle
from models.detection import points_oracle
from models.detection.points_oracle import CLASSES, SIZE, Trial, batch, iou, random_maps
from torch.nn import functional

import jaxmodels
from jaxmodels.models.detection.detector import objects
from jaxmodels.models.detection.fcos import FCOS, Places, PointScores, fcos_losses, fcos_targets
from jaxmodels.models.detection.feature_pyramid import FeaturePyramid
from jaxmodels.models.vision.resnet import ResNet

STRIDES, LIMIT = (4, 8), 9.0
GRIDS = ((8, 10), (4, 5))


def naive_points():
    """(x, y, stride, smallest, largest), row by row and level by level."""
    ranges = ((0.0, LIMIT), (LIMIT, np.inf))
    return [
        (stride * (x + 0.5), stride * (y + 0.5), stride, *limits)
        for stride, grid, limits in zip(STRIDES, GRIDS, ranges, strict=True)
        for y in range(grid[0])
        for x in range(grid[1])
    ]


def places():
    points = np.array(naive_points(), np.float32)
    return Places(*(jnp.asarray(part) for part in (points[:, :2], points[:, 2], points[:, 3:])))


def tower(params, x):
    for i in range(2):
        norm = params[f"norm_{i}"]
        x = oracle.conv(params[f"conv_{i}"], x)
        x = torch.relu(functional.group_norm(x, x.shape[1] // 8, norm["scale"], norm["bias"], 1e-5))
    return x


def predict(params, x):
    return oracle.conv({"kernel": params["conv"]["kernel"], "bias": params["bias"]}, x)


class Joined(nn.Module):
    """All values of a point side by side, so that one comparison sees them all."""

    detector: nn.Module

    def __call__(self, images, *, train=False):
        logits, distances, centreness, _ = self.detector(images, train=train)
        return jnp.concatenate([logits, distances, centreness[..., None]], axis=-1)[:, None]


def test_equals_torch():
    x = np.random.default_rng(0).normal(size=(2, 30, 37, 3)).astype(np.float32)
    pyramid = FeaturePyramid(oracle.SmallBackbone(), ("C2", "C3"), width=5, extra=None)
    model = FCOS(pyramid, CLASSES, (LIMIT,), head_width=16, head_depth=2)
    variables = oracle.random_variables(Joined(model), jnp.asarray(x))

    def forward(params, stats, x):
        params, stats = params["detector"], stats["detector"]["backbone"]["backbone"]
        neck = params["backbone"]
        maps = oracle.small_backbone(neck["backbone"], stats, x, True)
        inner = [oracle.conv(neck[f"lateral_{i}"]["conv"], maps[i + 1]) for i in range(2)]
        inner[0] = inner[0] + oracle.resized(inner[1], inner[0].shape[2:], "nearest")
        levels = []
        for i, stride in enumerate(STRIDES):
            level = oracle.conv(neck[f"output_{i}"]["conv"], inner[i])
            of_class, of_box = (tower(params[f"{name}_tower"], level) for name in ("class", "box"))
            sides = predict(params["distances"], of_box)
            values = [
                predict(params["classes"], of_class),
                stride * torch.exp(params["scales"][i] * sides),
                predict(params["centreness"], of_box),
            ]
            levels.append(torch.cat(values, 1).flatten(2))
        return torch.cat(levels, 2)[:, :, None]

    oracle.check(Joined(model), variables, forward, x, train=True, rtol=1e-3)


def naive_targets(images, image):
    """The class and the distances that each point is to find, or None."""
    boxes, labels, there, _ = points_oracle.objects_of(images, image)
    for x, y, stride, smallest, largest in naive_points():
        best = None
        for n in np.flatnonzero(there):
            left, top, right, bottom = boxes[n]
            sides = np.array([x - left, y - top, right - x, bottom - y])
            near = max(abs(x - (left + right) / 2), abs(y - (top + bottom) / 2)) < 1.5 * stride
            if min(sides) > 0 and near and smallest <= max(sides) <= largest:
                area = (right - left) * (bottom - top)
                if best is None or area < best[0]:
                    best = area, labels[n], sides
        yield None if best is None else best[1:]


def targets_of(images):
    there, ignored = objects(images)

    def one(boxes, labels, there, ignored):
        return fcos_targets(places(), boxes, labels, there, ignored, num_classes=CLASSES)

    return jax.jit(jax.vmap(one))(images["boxes"], images["box_labels"], there, ignored)


def middle(sides):
    left, top, right, bottom = sides
    across, down = min(left, right) / max(left, right), min(top, bottom) / max(top, bottom)
    return (across * down) ** 0.5


def is_taught(images, image, point, label):
    """Whether no ignored box of the class is around a point."""
    boxes, labels, _, ignored = points_oracle.objects_of(images, image)
    (x, y), inside = point[:2], ignored & (labels == label)
    return not any(
        left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes[inside]
    )


def test_targets_are_those_of_the_definition():
    images = batch()
    targets, found = targets_of(images), {None: 0, 4: 0, 8: 0}
    for i in range(3):
        for a, (point, wanted) in enumerate(
            zip(naive_points(), naive_targets(images, i), strict=True)
        ):
            found[wanted and point[2]] += 1
            labels = np.arange(CLASSES) == (-1 if wanted is None else wanted[0])
            taught = [labels[k] or is_taught(images, i, point, k) for k in range(CLASSES)]
            sides = np.ones(4) if wanted is None else wanted[1]
            np.testing.assert_array_equal(targets.labels[i, a], labels)
            np.testing.assert_array_equal(targets.taught[i, a], taught)
            np.testing.assert_allclose(targets.distances[i, a], sides, rtol=1e-5)
            np.testing.assert_allclose(targets.centreness[i, a], middle(sides), rtol=1e-5)
    assert min(found.values()) > 5 and not targets.taught.all()


def random_scores():
    shapes = [jax.ShapeDtypeStruct((3, len(naive_points()), n), jnp.float32) for n in (CLASSES, 4)]
    logits, logs = random_maps(shapes)
    centreness = random_maps(jax.ShapeDtypeStruct(logits.shape[:2], jnp.float32), seed=2)
    return logits, 4 * jnp.exp(0.5 * logs), centreness


def box_loss(kind, found, wanted, stride):
    """Of distances from one point: both boxes hold it."""
    if kind == "l1":
        return abs(found - torch.tensor(wanted)).mean() / stride
    pairs = [(found[k], torch.tensor(wanted[k])) for k in range(4)]
    (left, top, right, bottom), low = pairs, [min(*pair) for pair in pairs]
    shared = (low[0] + low[2]) * (low[1] + low[3])
    areas = [(left[k] + right[k]) * (top[k] + bottom[k]) for k in (0, 1)]
    union = sum(areas) - shared
    if kind == "iou":
        return -torch.log(shared / union)
    high = [max(*pair) for pair in pairs]
    around = (high[0] + high[2]) * (high[1] + high[3])
    return 1 - shared / union + (around - union) / around


@pytest.mark.parametrize("kind", ["giou", "iou", "l1"])
def test_losses_are_those_of_the_definition(kind):
    images = batch()
    targets = targets_of(images)

    def naive(found):
        """Equation 2 and cross entropies, divided by the positive points of the batch."""
        terms, count = dict.fromkeys(("classes", "boxes", "centreness"), 0), 0
        for i in range(3):
            points = zip(naive_points(), naive_targets(images, i), strict=True)
            for a, (point, wanted) in enumerate(points):
                for k in range(CLASSES):
                    p = torch.sigmoid(found[0][i, a, k])
                    if wanted is not None and wanted[0] == k:
                        terms["classes"] -= 0.25 * (1 - p) ** 2 * torch.log(p)
                    elif is_taught(images, i, point, k):
                        terms["classes"] -= 0.75 * p**2 * torch.log(1 - p)
                if wanted is not None:
                    count += 1
                    terms["boxes"] += box_loss(kind, found[1][i, a], wanted[1], point[2])
                    p, true = torch.sigmoid(found[2][i, a]), middle(wanted[1])
                    terms["centreness"] -= true * torch.log(p) + (1 - true) * torch.log(1 - p)
        return {name: term / count for name, term in terms.items()}

    def ours(found):
        return fcos_losses(PointScores(*found, places()), targets, kind)

    points_oracle.check_losses(ours, naive, random_scores())


@pytest.fixture(scope="module")
def trial():
    backbone = ResNet((1, 1), (8, 16), bottleneck=False, stem_width=8, num_classes=0)
    pyramid = FeaturePyramid(backbone, ("C2", "C3"), width=8, extra=None)
    model = FCOS(pyramid, CLASSES, (LIMIT,), head_width=16, head_depth=1, max_detections=31)
    return Trial(model, batch())


def test_points_are_those_of_the_maps(trial):
    variables = {"params": trial.params, **trial.state}
    found = jax.eval_shape(trial.model.apply, variables, batch()["image"])
    assert found.logits.shape == (3, len(naive_points()), CLASSES)
    maps = [jnp.zeros((1, *grid, 1)) for grid in GRIDS]
    jax.tree.map(np.testing.assert_array_equal, trial.model._places(maps), places())


def test_gradient_reaches_every_parameter(trial):
    trial.assert_gradient_reaches_all()


def test_padding_changes_nothing(trial):
    trial.assert_padding_changes_nothing()


def test_images_without_objects_teach_background(trial):
    trial.assert_empty_images_are_legal("boxes", "centreness")


def test_learns_a_batch(trial):
    trial.assert_learns(80)


def naive_detections(found, image, size, model):
    logits, distances, centreness = (np.asarray(each[image], np.float64) for each in found)
    candidates = []
    for a, (x, y, *_) in enumerate(naive_points()):
        left, top, right, bottom = distances[a]
        box = np.clip([x - left, y - top, x + right, y + bottom], 0, [*size[::-1], *size[::-1]])
        for k in range(CLASSES):
            p = 1 / (1 + np.exp(-logits[a, k]))
            if p > model.score_threshold and y < size[0] and x < size[1]:
                candidates.append((p / (1 + np.exp(-centreness[a])), k, box))
    kept = []
    for score, k, box in sorted(candidates, key=lambda each: -each[0]):
        if all(k != other[1] or iou(box, other[2]) <= model.iou_threshold for other in kept):
            kept.append((score, k, box))
    return kept[: model.max_detections]


@pytest.mark.parametrize("threshold", [0.4, 0.85])
def test_detections_are_those_of_the_definition(threshold):
    """Images of three sizes; with few candidates not all places are filled."""
    found, sizes = random_scores(), jnp.array([SIZE, (17, 37), (30, 9)])

    class Fixed(FCOS):
        def __call__(self, images, *, train=False):
            return PointScores(*found, places())

    model = Fixed(None, CLASSES, score_threshold=threshold, iou_threshold=0.4, max_detections=31)
    detections = jax.jit(model.detect)({}, batch()["image"], sizes)
    for i, size in enumerate(np.asarray(sizes)):
        expected = naive_detections(found, i, size, model)
        count = len(expected)
        assert i or (count < 31) == (threshold == 0.85)
        np.testing.assert_array_equal(detections.valid[i], np.arange(31) < count)
        for name, j in (("scores", 0), ("classes", 1), ("boxes", 2)):
            got = getattr(detections, name)[i][:count]
            np.testing.assert_allclose(got, [e[j] for e in expected], rtol=1e-4, atol=1e-4)


def test_detect_compiles_once(trial):
    trial.assert_detect_compiles_once()


def test_published_sizes():
    """P3 to P7, 256 channels, 4 convolutions; points start with a chance of 0.01."""
    model = jaxmodels.create_model("fcos_resnet50_fpn")
    assert model.backbone.feature_strides == {f"P{i}": 2**i for i in range(3, 8)}
    x = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    found, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert found.logits.shape == (1, 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1, 80)
    tower = variables["params"]["class_tower"]
    assert [tower[f"conv_{i}"]["kernel"].shape for i in range(4)] == 4 * [(3, 3, 256, 256)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size_limits": (9.0, 18.0)}, r"size_limits=\(9.0, 18.0\) must be one fewer than"),
        ({"box_loss": "l2"}, r"box_loss='l2' is none of \['giou', 'iou', 'l1'\]"),
        ({"head_width": 12}, "head_width=12 is not a multiple of 8"),
    ],
)
def test_bad_input(trial, fields, message):
    with pytest.raises(ValueError, match=f"FCOS: {message}"):
        jax.eval_shape(trial.model.clone(**fields).init, jax.random.key(0), batch()["image"])
