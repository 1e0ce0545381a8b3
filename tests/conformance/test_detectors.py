"""Every registered detector at its published size: shapes alone, nothing is computed."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jaxmodels
from jaxmodels.models.detection.detector import Detector

SIDE, BOXES = 448, 7
FLOATS = jax.ShapeDtypeStruct


@functools.cache
def abstract(name):
    """A model and the shapes of its variables."""
    model = jaxmodels.create_model(name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images(1))
    return model, shapes


def images(count, side=SIDE):
    return FLOATS((count, side, side, 3), jnp.float32)


def batch(count):
    return {
        "image": images(count),
        "boxes": FLOATS((count, BOXES, 4), jnp.float32),
        "box_labels": FLOATS((count, BOXES), jnp.int32),
        "box_ignored": FLOATS((count, BOXES), jnp.bool_),
        "image_size": FLOATS((count, 2), jnp.int32),
    }


def is_detector(name):
    return isinstance(jaxmodels.create_model(name), Detector)


NAMES = [name for name in jaxmodels.list_models() if is_detector(name)]


def test_all_methods_are_registered():
    assert len(NAMES) >= 11
    assert {name.split("_")[0] for name in NAMES} >= {
        "faster",
        "r",
        "tridentnet",
        "yolo",
        "fcos",
        "centernet",
        "cornernet",
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_a_number_with_named_terms_and_all_state_comes_back(name):
    model, variables = abstract(name)
    state = {kind: tree for kind, tree in variables.items() if kind != "params"}
    loss, terms, changed = jax.eval_shape(
        model.loss, variables["params"], batch(2), jax.random.key(0), state
    )
    assert loss.shape == () and loss.dtype == jnp.float32
    assert len(terms) > 1 and all(term.shape == () for term in terms.values())
    assert jax.tree.structure(changed) == jax.tree.structure(state)


@pytest.mark.parametrize("name", NAMES)
def test_detections_have_one_shape_whatever_is_in_the_images(name):
    model, variables = abstract(name)
    found = jax.eval_shape(model.detect, variables, images(2), FLOATS((2, 2), jnp.int32))
    count = model.max_detections
    assert found.boxes.shape == (2, count, 4) and found.boxes.dtype == jnp.float32
    assert found.scores.shape == found.classes.shape == found.valid.shape == (2, count)
    assert found.classes.dtype == jnp.int32 and found.valid.dtype == jnp.bool_


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_float32_and_channels_first_is_refused(name):
    model, variables = abstract(name)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    wrong = FLOATS((2, 3, SIDE, SIDE), jnp.float32)
    with pytest.raises(ValueError, match="channels first"):
        jax.eval_shape(model.detect, variables, wrong)
