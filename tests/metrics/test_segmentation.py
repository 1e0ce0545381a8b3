"""Confusion matrices and scores of label maps against scikit-learn."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from jaxmodels.metrics import confusion_matrix, segmentation_scores


def maps(shape, classes, ignored=0.0):
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=shape)
    guess = np.where(rng.random(shape) < 0.6, labels, rng.integers(classes, size=shape))
    labels[rng.random(shape) < ignored] = 255
    return jnp.asarray(labels, jnp.int32), jnp.asarray(guess, jnp.int32)


@pytest.mark.parametrize(
    ("shape", "classes", "ignored"),
    [((1,), 1, 0.0), ((3, 7, 11), 13, 0.4), ((2, 129, 131), 5, 0.4), ((16384,), 2, 0.0)],
)
def test_equals_scikit_learn(shape, classes, ignored):
    labels, guess = maps(shape, classes, ignored=ignored)
    kept = np.asarray(labels) != 255
    got = confusion_matrix(labels, guess, classes)
    assert got.dtype == jnp.int32 and got.shape == (classes, classes)
    truth, guess = np.asarray(labels)[kept], np.asarray(guess)[kept]
    scores = segmentation_scores(got)
    present = np.union1d(truth, guess)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, of absent classes
        want = sk.confusion_matrix(truth, guess, labels=np.arange(classes))
        iou = sk.jaccard_score(truth, guess, labels=present, average=None)
        weighted = sk.jaccard_score(truth, guess, average="weighted")
        recall = sk.balanced_accuracy_score(truth, guess)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(scores.iou[present], iou, rtol=1e-12)
    assert np.isnan(np.delete(scores.iou, present)).all()
    np.testing.assert_allclose(scores.mean_iou, iou.mean(), rtol=1e-12)
    np.testing.assert_allclose(scores.frequency_weighted_iou, weighted, rtol=1e-12)
    np.testing.assert_allclose(scores.pixel_accuracy, sk.accuracy_score(truth, guess), rtol=1e-12)
    np.testing.assert_allclose(scores.mean_pixel_accuracy, recall, rtol=1e-12)


def test_batches_add_up_under_jit_and_vmap():
    labels, guess = maps((6, 17, 19), 5, ignored=0.2)
    whole = confusion_matrix(labels, guess, 5)
    compiled = jax.jit(lambda l, g: confusion_matrix(l, g, 5))
    parts = compiled(labels[:2], guess[:2]) + compiled(labels[2:], guess[2:])
    np.testing.assert_array_equal(parts, whole)
    each = jax.vmap(lambda l, g: confusion_matrix(l, g, 5))(labels, guess)
    np.testing.assert_array_equal(each.sum(axis=0), whole)


def test_absent_classes_by_hand():
    # Class 0 occurs, 1 is only predicted, 2 only occurs, 3 is neither.
    matrix = np.array([[3, 1, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]])
    scores = segmentation_scores(matrix)
    np.testing.assert_array_equal(scores.iou, [3 / 6, 0, 0, np.nan])
    assert scores.pixel_accuracy == 3 / 6
    assert scores.mean_pixel_accuracy == (3 / 4 + 0) / 2
    assert scores.mean_iou == 0.5 / 3
    assert scores.frequency_weighted_iou == 4 * 0.5 / 6


def test_another_label_can_be_ignored_whatever_is_predicted_there():
    labels, guess = jnp.array([[0, 1], [2, 1]]), jnp.array([[0, 99], [1, -7]])
    got = confusion_matrix(labels, guess, 3, ignore_label=1)
    np.testing.assert_array_equal(got, [[1, 0, 0], [0, 0, 0], [0, 1, 0]])


def test_classes_out_of_range_raise_and_do_not_count_when_compiled():
    good, bad = jnp.array([0, 1, 2]), jnp.array([0, 1, 3])
    with pytest.raises(ValueError, match=r"confusion_matrix: labels holds 3, outside \[0, 2\]"):
        confusion_matrix(bad, good, 3)
    with pytest.raises(ValueError, match=r"predictions holds 3, outside \[0, 2\]"):
        confusion_matrix(good, bad, 3)
    compiled = jax.jit(lambda l, g: confusion_matrix(l, g, 3))
    for pair in ((good, bad), (bad, good), (good, jnp.array([0, 1, -1]))):
        np.testing.assert_array_equal(compiled(*pair), np.diag([1, 1, 0]))


def test_shapes_and_empty_matrices_are_named():
    with pytest.raises(ValueError, match=r"predictions \(3, 5\) must be the shape of labels"):
        inspect.unwrap(confusion_matrix)(jnp.zeros((5, 3), int), jnp.zeros((3, 5), int), 3)
    with pytest.raises(ValueError, match="matrix has 0 pixels"):
        segmentation_scores(np.zeros((3, 3), int))
    with pytest.raises(ValueError, match="smallest count of -1"):
        segmentation_scores(np.array([[3, -1], [0, 0]]))
