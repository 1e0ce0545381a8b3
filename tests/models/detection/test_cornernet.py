"""CornerNet against its composition in torch, and its definitions corner by corner."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_layers as oracle
from models.detection import points_oracle
from models.detection.points_oracle import CLASSES, SIZE, Trial, batch, iou, random_maps

import jaxmodels
from jaxmodels.models.detection.cornernet import (
    CornerMaps,
    CornerNet,
    Corners,
    corner_losses,
    corner_targets,
    pair_corners,
)
from jaxmodels.models.detection.detector import objects
from jaxmodels.models.vision.hourglass import Hourglass
from jaxmodels.models.vision.resnet import ResNet

STRIDE, SHAPE, OVERLAP = 4, (8, 10, CLASSES), 0.3


def same(x):
    return x


def seen(x, direction):
    """From each place the largest value to the right (left side) or below (top side), or back."""
    axis = 3 if direction in ("left", "right") else 2
    ahead = direction in ("left", "top")
    x = x.flip(axis) if ahead else x
    x = torch.cummax(x, axis).values
    return x.flip(axis) if ahead else x


def corner(params, stats, x, kind, directions):
    name = f"{kind}_stack_0"
    block, running = params[f"{name}_pooling"], stats[f"{name}_pooling"]

    def unit(part, x, activation=torch.relu):
        return oracle.conv_norm(block[part], running[part], x, True, activation)

    pooled = unit("pooled", sum(seen(unit(d, x), d) for d in directions), same)
    x = unit("out", torch.relu(pooled + unit("shortcut", x, same)))
    maps = []
    for part in ("heat", "embeddings", "offsets"):
        head = params[f"{name}_{part}"]
        hidden = torch.relu(oracle.conv(head["hidden"], x))
        value = {"kernel": head["value"]["conv"]["kernel"], "bias": head["value"]["bias"]}
        maps.append(oracle.conv(value, hidden))
    return maps


class OneMap(nn.Module):
    """A backbone of one map, called as that of an hourglass."""

    backbone: nn.Module

    @property
    def feature_strides(self):
        return {"stack_0": 4}

    def features(self, images, *, train=False):
        return {"stack_0": self.backbone.features(images, train=train)["C2"]}


class Joined(nn.Module):
    """All maps side by side, so that one comparison sees them all."""

    detector: nn.Module

    def __call__(self, images, *, train=False):
        found = self.detector(images, train=train)
        return jnp.concatenate(jax.tree.leaves(found), axis=-1)


def test_equals_torch():
    x = np.random.default_rng(0).normal(size=(2, 23, 29, 3)).astype(np.float32)
    resnet = ResNet((1,), (6,), bottleneck=False, stem_width=6, num_classes=0)
    model = Joined(CornerNet(OneMap(resnet), CLASSES, pool_width=7, head_width=5))
    variables = oracle.random_variables(model, jnp.asarray(x))

    def forward(params, stats, x):
        params, stats = params["detector"], stats["detector"]
        below, running = (tree["backbone"]["backbone"] for tree in (params, stats))
        x = oracle.conv_norm(below["stem_conv"], running["stem_conv"], x, True, stride=2)
        x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
        below, running = below["stages_0_0"], running["stages_0_0"]
        inner = oracle.conv_norm(below["conv_1"], running["conv_1"], x, True)
        x = torch.relu(x + oracle.conv_norm(below["conv_2"], running["conv_2"], inner, True, same))
        maps = corner(params, stats, x, "top_left", ("top", "left"))
        maps += corner(params, stats, x, "bottom_right", ("bottom", "right"))
        return torch.cat(maps, 1)

    oracle.check(model, variables, forward, x, train=True, rtol=1e-3)


def naive_targets(images):
    for image in range(3):
        boxes, _, there, _ = points_oracle.objects_of(images, image)
        kinds = [
            points_oracle.heat_maps(points, images, image, SHAPE, STRIDE, OVERLAP)
            for points in (boxes[:, :2], boxes[:, 2:])
        ]
        yield kinds, there


def targets_of(images):
    there, ignored = objects(images)

    def one(*of_image):
        return corner_targets(*of_image, shape=SHAPE, stride=STRIDE, min_overlap=OVERLAP)

    return jax.jit(jax.vmap(one))(images["boxes"], images["box_labels"], there, ignored)


def embedding_losses(first, second):
    """Equations 4 and 5 of one image, from its objects' embeddings."""
    middles, pull, push = [(a + b) / 2 for a, b in zip(first, second, strict=True)], 0, 0
    count = len(middles)
    for a, b, e in zip(first, second, middles, strict=True):
        pull = pull + ((a - e) ** 2 + (b - e) ** 2) / count
    for k in range(count):
        for j in range(count):
            if j != k:
                apart = 1 - abs(middles[k] - middles[j])
                push = push + torch.clamp(apart, min=0) / (count * (count - 1))
    return pull, push


def naive_losses(found, expected):
    terms = dict.fromkeys(("heat", "offsets", "pull", "push"), 0)
    embeddings = [([], []) for _ in expected]
    for kind, maps in enumerate(found):
        heats, taughts = ([each[0][kind][i] for each in expected] for i in (0, 1))
        terms["heat"] += points_oracle.heat_loss(maps.heat, heats, taughts)
        total = sum(there.sum() for _, there in expected)
        for b, (kinds, there) in enumerate(expected):
            _, _, cells, offsets = kinds[kind]
            for n in np.flatnonzero(there):
                x, y = cells[n]
                error = abs(maps.offsets[b, y, x] - torch.tensor(offsets[n]))
                terms["offsets"] += torch.where(error < 1, error**2 / 2, error - 0.5).sum() / total
                embeddings[b][kind].append(maps.embeddings[b, y, x, 0])
    for pair in embeddings:
        pull, push = embedding_losses(*pair)
        terms["pull"] += 0.1 * pull / len(embeddings)
        terms["push"] += 0.1 * push / len(embeddings)
    return terms


def random_found(seed=1):
    shapes = [jax.ShapeDtypeStruct((3, *SHAPE[:2], n), jnp.float32) for n in (CLASSES, 1, 2)]
    return random_maps((CornerMaps(*shapes), CornerMaps(*shapes)), seed)


def test_targets_and_losses_are_those_of_the_definition():
    images = batch()
    targets, expected = targets_of(images), [*naive_targets(images)]
    for i, (kinds, there) in enumerate(expected):
        for target, (heat, taught, cells, offsets) in zip(targets, kinds, strict=True):
            np.testing.assert_allclose(target.heat[i], heat, rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(target.taught[i], taught)
            np.testing.assert_array_equal(target.cells[i][there], cells[there])
            np.testing.assert_allclose(target.offsets[i][there], offsets[there], atol=1e-5)
    assert (~targets[0].taught & (targets[0].heat == 1)).any()
    there, _ = objects(images)
    points_oracle.check_losses(
        lambda found: corner_losses(found, targets, there, 0.1),
        lambda found: naive_losses(found, expected),
        random_found(),
    )


@pytest.fixture(scope="module")
def trial():
    backbone = ResNet((1,), (16,), bottleneck=False, stem_width=8, num_classes=0)
    sizes = {"pool_width": 8, "head_width": 16, "corners": 17, "candidates": 31}
    return Trial(CornerNet(backbone, CLASSES, **sizes, max_detections=19), batch())


def test_embeddings_are_weighted_as_the_model_says(trial):
    """0.1 as in the paper unless told otherwise; nothing else changes."""
    found, _ = trial.terms()
    heavy = trial.model.clone(embedding_weight=0.7)
    _, wanted, _ = jax.jit(heavy.loss)(trial.params, trial.batch, jax.random.key(0), trial.state)
    for name, term in found.items():
        factor = 7 if name in ("pull", "push") else 1
        np.testing.assert_allclose(wanted[name], factor * term, rtol=1e-4, err_msg=name)


def test_gradient_reaches_every_parameter(trial):
    trial.assert_gradient_reaches_all()


def test_padding_changes_nothing(trial):
    trial.assert_padding_changes_nothing()


def test_images_without_objects_teach_background(trial):
    trial.assert_empty_images_are_legal("offsets", "pull", "push")


def test_learns_a_batch(trial):
    trial.assert_learns(80)


def test_pairs_are_those_of_the_definition():
    """Seven corners by five, of three classes; some scores are zero, as where peaks ran out."""
    rng = np.random.default_rng(3)

    def draw(count):
        scores = rng.uniform(size=count) * (rng.uniform(size=count) > 0.2)
        points, embeddings = rng.uniform(0, 30, (count, 2)), rng.normal(0, 0.5, count)
        return points, scores, rng.integers(0, 2, count), embeddings

    first, second = draw(37), draw(41)
    ours = [
        Corners(*(jnp.asarray(part, jnp.int32 if i == 2 else jnp.float32)
                  for i, part in enumerate(kind))) for kind in (first, second)
    ]  # fmt: skip
    boxes, scores, classes, valid = jax.jit(pair_corners, static_argnums=2)(*ours, 0.5)
    assert 10 < valid.sum() < valid.size / 2
    for m, (i, j) in enumerate(np.ndindex(37, 41)):
        (x1, y1), (x2, y2) = first[0][i], second[0][j]
        alike = first[2][i] == second[2][j] and abs(first[3][i] - second[3][j]) <= 0.5
        wanted = alike and x1 < x2 and y1 < y2 and first[1][i] > 0 and second[1][j] > 0
        assert valid[m] == wanted, (i, j)
        if wanted:
            np.testing.assert_allclose(boxes[m], [x1, y1, x2, y2], rtol=1e-5)
            np.testing.assert_allclose(scores[m], (first[1][i] + second[1][j]) / 2, rtol=1e-5)
            assert classes[m] == first[2][i]


def naive_corners(maps, image, size, count):
    """(score, class, point, embedding) of the highest peaks in the image."""
    heat, embeddings, offsets = (np.asarray(each[image], np.float64) for each in maps)
    return [
        (score, k, np.clip(STRIDE * (offsets[y, x] + [x, y]), 0, size[::-1]), embeddings[y, x, 0])
        for score, k, x, y in points_oracle.peaks(heat, size, STRIDE, count)
    ]


def naive_detections(kinds, image, size, model):
    """Pairs by loops, and soft suppression as its figure has it."""
    corners = [naive_corners(maps, image, size, model.corners) for maps in kinds]
    pairs = []
    for score, k, point, e in corners[0]:
        for other_score, other_k, other_point, other_e in corners[1]:
            alike = k == other_k and abs(e - other_e) <= model.max_distance
            if alike and (other_point > point).all():
                pairs.append([(score + other_score) / 2, k, np.append(point, other_point)])
    left, found = sorted(pairs, key=lambda each: -each[0])[: model.candidates], []
    while left:
        best = left.pop(int(np.argmax([each[0] for each in left])))
        found.append(best)
        for each in left:
            if each[1] == best[1]:
                each[0] *= np.exp(-(iou(best[2], each[2]) ** 2) / 0.5)
    return found[: model.max_detections]


def test_detections_are_those_of_the_definition():
    """Images of three sizes, the last too small to fill all places."""
    kinds, sizes = random_found(), jnp.array([SIZE, (21, 36), (9, 13)])

    class Fixed(CornerNet):
        def __call__(self, images, *, train=False):
            return (kinds,)

    model = Fixed(ResNet((1,), (8,)), CLASSES, corners=29, candidates=37, max_detections=17)
    detections = jax.jit(model.detect)({}, batch()["image"], sizes)
    counts = []
    for i, size in enumerate(np.asarray(sizes)):
        expected = naive_detections(kinds, i, size, model)
        counts.append(len(expected))
        np.testing.assert_array_equal(detections.valid[i], np.arange(17) < counts[-1])
        for name, j in (("scores", 0), ("classes", 1), ("boxes", 2)):
            got = getattr(detections, name)[i][: counts[-1]]
            np.testing.assert_allclose(got, [e[j] for e in expected], rtol=1e-4, atol=1e-4)
    assert counts[0] == 17 > counts[2] > 0, counts


def test_detect_compiles_once(trial):
    trial.assert_detect_compiles_once()


def test_published_sizes():
    """Both stacks of Hourglass-104 are taught; 201 million parameters, as is often cited."""
    model = jaxmodels.create_model("cornernet_hourglass104")
    x = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    found, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert [each.heat.shape for kinds in found for each in kinds] == 4 * [(1, 32, 32, 80)]
    assert isinstance(model.backbone, Hourglass)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert round(count / 1e6) == 201
