"""The two calls that all detectors share, on the smallest detector that has both."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import training
from jaxmodels.models.detection.detector import Detector, image_sizes, objects
from jaxmodels.ops.detections import Detections


class Brightest(Detector):
    """Takes the mean brightness, normalised over the batch, for the number of objects."""

    @nn.compact
    def __call__(self, images, *, train=False):
        mean = images.mean(axis=(1, 2))
        mean = nn.BatchNorm(use_running_average=not train, momentum=0.5)(mean)
        return nn.Dense(1)(mean)[:, 0]

    def losses(self, batch):
        found = self(batch["image"], train=True)
        there, _ = objects(batch)
        noise = jax.random.normal(self.make_rng("sample"))
        return {"count": jnp.mean((found - there.sum(axis=1)) ** 2), "noise": noise}

    def detections(self, images, image_sizes):
        boxes = jnp.concatenate([jnp.zeros((len(images), 2)), image_sizes[:, ::-1]], axis=-1)
        scores = nn.sigmoid(self(images))[:, None]
        there = jnp.ones_like(scores, bool)
        return Detections(boxes[:, None], scores, jnp.zeros_like(scores, jnp.int32), there)


def batch_of(count=5, boxes=3):
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.uniform(-1, 1, (count, 7, 11, 2)), jnp.float32),
        "boxes": jnp.zeros((count, boxes, 4)),
        "box_labels": jnp.asarray(rng.integers(-1, 2, (count, boxes)), jnp.int32),
    }


@pytest.fixture(scope="module")
def model():
    return Brightest()


@pytest.fixture(scope="module")
def variables(model):
    return jax.jit(model.init)(jax.random.key(0), batch_of()["image"])


def test_the_loss_is_the_sum_of_its_terms_and_moves_the_statistics(model, variables):
    batch = batch_of()
    state = {"batch_stats": variables["batch_stats"]}
    loss, terms, changed = model.loss(variables["params"], batch, jax.random.key(1), state)
    assert float(loss) == float(terms["count"] + terms["noise"])
    (norm,) = changed["batch_stats"].values()
    mean = np.asarray(batch["image"], np.float64).mean(axis=(1, 2))
    np.testing.assert_allclose(norm["mean"], 0.5 * mean.mean(axis=0), rtol=1e-5)
    centred = (mean - mean.mean(axis=0)) / np.sqrt(mean.var(axis=0) + 1e-5)
    dense = variables["params"]["Dense_0"]
    found = centred @ np.asarray(dense["kernel"])[:, 0]
    wanted = np.mean((found - (np.asarray(batch["box_labels"]) >= 0).sum(axis=1)) ** 2)
    np.testing.assert_allclose(terms["count"], wanted, rtol=1e-4)


def test_what_is_drawn_depends_on_the_key_alone(model, variables):
    state = {"batch_stats": variables["batch_stats"]}
    draws = [
        float(model.loss(variables["params"], batch_of(), jax.random.key(i), state)[1]["noise"])
        for i in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_training_step_takes_the_loss_as_it_is(model):
    optimizer = training.adamw(1e-2, steps=20)
    state = training.init_state(
        model, optimizer, jax.random.key(0), {"images": batch_of()["image"]}
    )
    step = training.make_step(model.loss, optimizer)
    counts = []
    for _ in range(20):
        state, metrics = step(state, batch_of())
        counts.append(float(metrics["count"]))
    assert counts[-1] < 0.8 * counts[0]
    assert np.abs(state.model_state["batch_stats"]["BatchNorm_0"]["mean"]).max() > 0


def test_boxes_know_the_size_before_padding(model, variables):
    images = batch_of()["image"]
    whole = model.detect(variables, images)
    np.testing.assert_array_equal(whole.boxes[:, 0], np.tile([0, 0, 11, 7], (5, 1)))
    cut = model.detect(variables, images, jnp.tile(jnp.array([[3, 5]]), (5, 1)))
    np.testing.assert_array_equal(cut.boxes[:, 0], np.tile([0, 0, 5, 3], (5, 1)))


def test_ignored_boxes_are_no_objects_and_padding_is_neither():
    batch = batch_of(2, 3) | {"box_labels": jnp.array([[4, 0, -1], [-1, 2, 2]])}
    there, ignored = objects(batch)
    np.testing.assert_array_equal(there, [[1, 1, 0], [0, 1, 1]])
    assert not ignored.any()
    there, ignored = objects(batch | {"box_ignored": jnp.array([[1, 0, 1], [0, 0, 1]], bool)})
    np.testing.assert_array_equal(there, [[0, 1, 0], [0, 1, 0]])
    np.testing.assert_array_equal(ignored, [[1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(image_sizes(batch), [[7, 11], [7, 11]])
    sizes = jnp.array([[3, 5], [7, 2]])
    np.testing.assert_array_equal(image_sizes(batch | {"image_size": sizes}), sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": None}, r"Brightest: the batch has no 'boxes', only \['box_labels', 'image'\]"),
        ({"boxes": jnp.zeros((5, 0, 4))}, r"'boxes'\] \(5, 0, 4\) has no place for a box"),
        ({"boxes": jnp.zeros((5, 3, 5))}, r"batch\['boxes'\] \(5, 3, 5\) must be \(B, N, 4\)"),
        ({"box_labels": jnp.zeros((5, 4), int)}, r"'box_labels'\] \(5, 4\) must be \(B, N\)"),
        ({"image_size": jnp.zeros((4, 2))}, r"batch\['image_size'\] \(4, 2\) must be \(B, 2\)"),
        ({"box_ignored": jnp.zeros((5, 2), bool)}, r"'box_ignored'\] \(5, 2\) must be"),
    ],
)
def test_batches_without_what_is_needed_are_named(model, variables, change, message):
    batch = {name: leaf for name, leaf in (batch_of() | change).items() if leaf is not None}
    with pytest.raises(ValueError, match=message):
        model.loss(variables["params"], batch, jax.random.key(0), {})
