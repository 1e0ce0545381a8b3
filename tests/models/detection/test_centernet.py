"""CenterNet against its composition in torch, and its definitions cell by cell."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_layers as oracle
from models.detection import points_oracle
from models.detection.points_oracle import CLASSES, SIZE, Trial, batch, random_maps
from torch.nn import functional

import jaxmodels
from jaxmodels.models.detection.centernet import (
    CenterNet,
    CentreMaps,
    UpConvolutions,
    centre_losses,
    centre_targets,
)
from jaxmodels.models.detection.detector import objects
from jaxmodels.models.vision.hourglass import Hourglass
from jaxmodels.models.vision.resnet import ResNet

STRIDE, SHAPE = 4, (8, 10, CLASSES)


def deformed(params, x):
    """Each tap read by grid_sample; y and x of it, then its weight."""
    made = oracle.conv(params["offsets"], x)
    batch, _, rows, columns = x.shape
    offsets, masks = made[:, :18].reshape(batch, 9, 2, rows, columns), torch.sigmoid(made[:, 18:])
    out = 0
    for k in range(9):
        y = torch.arange(rows)[:, None] + k // 3 - 1 + offsets[:, k, 0]
        z = torch.arange(columns)[None, :] + k % 3 - 1 + offsets[:, k, 1]
        grid = torch.stack([2 * z / (columns - 1) - 1, 2 * y / (rows - 1) - 1], dim=-1)
        read = functional.grid_sample(x, grid, align_corners=True) * masks[:, k, None]
        weight = params["kernel"][k // 3, k % 3].T[:, :, None, None]
        out = out + functional.conv2d(read, weight)
    return out


def up_convolutions(params, stats, x, train, widths):
    """The last map of the small backbone, doubled."""
    x = oracle.small_backbone(params["backbone"], stats["backbone"], x, train)[2]
    for i in range(widths):
        if f"mix_norm_{i}" in params:
            x = deformed(params[f"mix_{i}"], x)
            x = torch.relu(oracle.norm(params[f"mix_norm_{i}"], stats[f"mix_norm_{i}"], x, train))
        else:
            x = oracle.conv_norm(params[f"mix_{i}"], stats[f"mix_{i}"], x, train)
        weight = params[f"up_{i}"]["kernel"].permute(2, 3, 0, 1)
        x = functional.conv_transpose2d(x, weight, stride=2, padding=1)
        x = torch.relu(oracle.norm(params[f"up_norm_{i}"], stats[f"up_norm_{i}"], x, train))
    return x


def head(params, x):
    hidden = torch.relu(oracle.conv(params["hidden"], x))
    value = params["value"]
    return oracle.conv({"kernel": value["conv"]["kernel"], "bias": value["bias"]}, hidden)


class Joined(nn.Module):
    """All maps side by side, so that one comparison sees them all."""

    detector: nn.Module

    def __call__(self, images, *, train=False):
        found = self.detector(images, train=train)
        return jnp.concatenate(jax.tree.leaves(found), axis=-1)


@pytest.mark.parametrize("deformable", [True, False])
def test_equals_torch(deformable):
    x = np.random.default_rng(0).normal(size=(2, 23, 29, 3)).astype(np.float32)
    backbone = UpConvolutions(oracle.SmallBackbone(), (7, 5), deformable=deformable)
    assert backbone.feature_strides == {"up": 2}
    model = Joined(CenterNet(backbone, num_classes=CLASSES, head_width=11))
    variables = oracle.random_variables(model, jnp.asarray(x))

    def forward(params, stats, x):
        params, stats = params["detector"], stats["detector"]["backbone"]
        x = up_convolutions(params["backbone"], stats, x, True, 2)
        return torch.cat(
            [head(params[f"{name}_up"], x) for name in ("heat", "offsets", "sizes")], 1
        )

    oracle.check(model, variables, forward, x, train=True, rtol=1e-3)


def test_hourglass_is_taught_at_every_stack_and_detects_with_the_last():
    backbone = Hourglass((5, 7), (1, 1), stacks=2, stem_width=3)
    model = CenterNet(backbone, num_classes=CLASSES, head_width=3)
    found, variables = jax.eval_shape(
        lambda key, x: model.init_with_output(key, x), jax.random.key(0), batch()["image"]
    )
    assert [each.heat.shape for each in found] == 2 * [(3, *SHAPE)]
    heads = {name for name in variables["params"] if name != "backbone"}
    assert heads == {f"{a}_stack_{i}" for a in ("heat", "offsets", "sizes") for i in range(2)}


def naive_targets(images, shape, stride):
    for image in range(3):
        boxes, _, there, _ = points_oracle.objects_of(images, image)
        centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / stride
        made = points_oracle.heat_maps(centres, images, image, shape, stride, 0.7)
        yield *made, sizes, there


def targets_of(images, shape=SHAPE, stride=STRIDE):
    def one(*of_image):
        return centre_targets(*of_image, shape=shape, stride=stride)

    return jax.jit(jax.vmap(one))(images["boxes"], images["box_labels"], *objects(images))


@pytest.mark.parametrize(("shape", "stride"), [(SHAPE, STRIDE), ((*SIZE, CLASSES), 1)])
def test_targets_and_losses_are_those_of_the_definition(shape, stride):
    """On a coarse map, where Gaussians are points, and on a fine one, where they are not."""
    images = batch()
    targets, expected = targets_of(images, shape, stride), [*naive_targets(images, shape, stride)]
    for i, (heat, taught, cells, offsets, sizes, there) in enumerate(expected):
        np.testing.assert_allclose(targets.heat[i], heat, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(targets.taught[i], taught)
        np.testing.assert_array_equal(targets.there[i], there)
        np.testing.assert_array_equal(targets.cells[i][there], cells[there])
        np.testing.assert_allclose(targets.offsets[i][there], offsets[there], atol=1e-5)
        np.testing.assert_allclose(targets.sizes[i][there], sizes[there], rtol=1e-5)
    at_objects = targets.heat == 1
    assert (targets.taught & ~at_objects).any() and (~targets.taught & at_objects).any()
    assert stride > 1 or (targets.heat * (1 - targets.heat)).any()

    def naive(found):
        """Equations 1 to 4: N is the number of objects in the batch."""
        heats, taughts = ([each[i] for each in expected] for i in (0, 1))
        offset_error = size_error = count = 0
        for b, (_, _, cells, offsets, sizes, there) in enumerate(expected):
            for n in np.flatnonzero(there):
                x, y = cells[n]
                offset_error += abs(found.offsets[b, y, x] - torch.tensor(offsets[n])).sum()
                size_error += abs(found.sizes[b, y, x] - torch.tensor(sizes[n])).sum()
                count += 1
        return {
            "heat": points_oracle.heat_loss(found.heat, heats, taughts),
            "offsets": offset_error / count,
            "sizes": 0.1 * size_error / count,
        }

    found = random_found(shape)
    points_oracle.check_losses(lambda found: centre_losses(found, targets), naive, found)


def random_found(shape=SHAPE):
    shapes = [jax.ShapeDtypeStruct((3, *shape[:2], n), jnp.float32) for n in (CLASSES, 2, 2)]
    return random_maps(CentreMaps(*shapes))


@pytest.fixture(scope="module")
def trial():
    backbone = ResNet((1,), (16,), bottleneck=False, stem_width=8, num_classes=0)
    return Trial(CenterNet(backbone, CLASSES, head_width=16, max_detections=11), batch())


def test_gradient_reaches_every_parameter(trial):
    trial.assert_gradient_reaches_all()


def test_padding_changes_nothing(trial):
    trial.assert_padding_changes_nothing()


def test_images_without_objects_teach_background(trial):
    trial.assert_empty_images_are_legal("offsets", "sizes")


def test_learns_a_batch(trial):
    trial.assert_learns(80)


def test_loss_is_the_mean_over_maps(trial):
    found, targets = random_found(), targets_of(batch())
    other = jax.tree.map(jnp.negative, found)

    class Two(CenterNet):
        def __call__(self, images, *, train=False):
            return found, other

    @jax.jit
    def both():
        terms = Two(trial.model.backbone, CLASSES).loss({}, batch(), jax.random.key(0))[1]
        return terms, [centre_losses(each, targets) for each in (found, other)]

    terms, parts = both()
    for name, term in terms.items():
        np.testing.assert_allclose(term, (parts[0][name] + parts[1][name]) / 2, rtol=1e-5)


def naive_detections(found, image, size, count):
    """The boxes of the highest peaks that have an area inside the image."""
    offsets, sizes = (np.asarray(each[image], np.float64) for each in found[1:])
    boxes = []
    for score, k, x, y in points_oracle.peaks(found.heat[image], size, STRIDE, count):
        (dx, dy), (w, h) = offsets[y, x], sizes[y, x]
        box = STRIDE * np.array([x + dx - w / 2, y + dy - h / 2, x + dx + w / 2, y + dy + h / 2])
        boxes.append((score, k, np.clip(box, 0, [*size[::-1], *size[::-1]])))
    return [each for each in boxes if (each[2][2:] > each[2][:2]).all()]


def test_detections_are_the_peaks(trial):
    """Of images of three sizes; boxes without an area are left out."""
    found, sizes = random_found(), jnp.array([SIZE, (17, 36), (30, 9)])
    found = found._replace(sizes=found.sizes + 1)

    class Fixed(CenterNet):
        def __call__(self, images, *, train=False):
            return (found,)

    model = Fixed(trial.model.backbone, CLASSES, max_detections=31)
    detections = jax.jit(model.detect)({}, batch()["image"], sizes)
    for i, size in enumerate(np.asarray(sizes)):
        expected = naive_detections(found, i, size, 31)
        count = len(expected)
        assert 0 < count < 31
        np.testing.assert_array_equal(detections.valid[i], np.arange(31) < count)
        for name, j, empty in (("scores", 0, 0), ("classes", 1, -1), ("boxes", 2, 0)):
            got = getattr(detections, name)[i]
            np.testing.assert_allclose(got[:count], [e[j] for e in expected], rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(got[count:], np.full_like(got[count:], empty))


def test_detect_compiles_once(trial):
    trial.assert_detect_compiles_once()


def test_published_sizes():
    """Deformable up-convolutions of 256, 128 and 64 channels on the last map of ResNet."""
    model = jaxmodels.create_model("centernet_resnet18")
    x = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    found, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert found[0].heat.shape == (1, 16, 24, 80)
    backbone = variables["params"]["backbone"]
    kernels = [backbone[f"mix_{i}"]["kernel"].shape for i in range(3)]
    assert kernels == [(3, 3, 512, 256), (3, 3, 256, 128), (3, 3, 128, 64)]
    assert backbone["up_2"]["kernel"].shape == (4, 4, 64, 64)
    assert variables["params"]["sizes_up"]["hidden"]["kernel"].shape == (3, 3, 64, 64)
    large = jaxmodels.create_model("centernet_resnet101").backbone
    assert large.backbone.depths == (3, 4, 23, 3) and large.deformable
