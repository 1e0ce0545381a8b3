"""What any detector must do that learns from a batch: the same checks for several of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import torch_layers
from models.detection import two_stage


def batch_of(size=(40, 56), classes=3, boxes=5):
    """Three images with some objects, a crowd and an object, and nothing; places are empty."""
    rng = np.random.default_rng(0)
    found = np.stack([two_stage.boxes_in(rng, boxes, np.array(size, float), 8) for _ in range(3)])
    labels = rng.integers(0, classes, (3, boxes))
    labels[0, 3:] = labels[1, 2:] = labels[2] = -1
    ignored = np.zeros((3, boxes), bool)
    ignored[1, 0] = True
    images = rng.uniform(-1, 1, (3, *size, 1)).astype(np.float32)
    sizes = np.array([size, (size[0] - 7, size[1]), (size[0], size[1] - 9)])
    return {
        "image": images,
        "boxes": found,
        "box_labels": labels,
        "box_ignored": ignored,
        "image_size": sizes,
    }


def learn(model, variables):
    """A compiled (batch, key) -> loss terms and gradients."""
    params = variables["params"]
    state = {"batch_stats": variables["batch_stats"]} if "batch_stats" in variables else {}
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(batch, key):
        def loss(params):
            return model.loss(params, batch, key, state)[:2]

        (total, terms), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return {**terms, "total": total}, gradients

    return step


def check_learning(model, batch):
    """Every parameter learns; places without a box, and their order, are nothing.

    The model must take all RoIs, or their number changes what is drawn.
    """
    variables = torch_layers.random_variables(model, jnp.asarray(batch["image"]))
    step = learn(model, variables)
    terms, gradients = step(batch, jax.random.key(1))
    assert all(np.isfinite(term) and term > 0 for term in terms.values())
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all() and np.asarray(leaf).any(), jax.tree_util.keystr(path)

    moved = {**batch}
    for name in ("boxes", "box_labels", "box_ignored"):
        moved[name] = batch[name][:, ::-1].copy()
    moved["boxes"][moved["box_labels"] < 0] = (1e4, 7, 2e4, 9)
    again, _ = step(moved, jax.random.key(1))
    for name, term in terms.items():
        np.testing.assert_allclose(again[name], term, rtol=1e-4, err_msg=name)

    empty, gradients = step({**batch, "box_labels": np.full((3, 5), -1)}, jax.random.key(1))
    assert float(empty["proposal_boxes"]) == float(empty["roi_boxes"]) == 0
    assert empty["proposal_objectness"] > 0 and empty["roi_classes"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    return variables


def check_detecting(model, variables, batch):
    """One program for all images of a shape; boxes lie in their images, best first."""
    chex.clear_trace_counter()
    detect = jax.jit(chex.assert_max_traces(model.detect, n=1))
    for _ in range(2):
        found = detect(variables, batch["image"], jnp.asarray(batch["image_size"]))
    assert np.asarray(found.valid).any(axis=1).all()
    limits = batch["image_size"][:, None, ::-1]
    assert (found.boxes >= 0).all() and (found.boxes <= np.tile(limits, 2)).all()
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert ((found.classes >= 0) == found.valid).all()
    return found
