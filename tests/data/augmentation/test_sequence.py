"""Augmentations by name against the same functions called one by one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.data.augmentation import AUGMENTATIONS, augment
from jaxmodels.training.sharding import batch_sharding, make_mesh

IMAGES = jax.random.uniform(jax.random.key(0), (3, 19, 17, 3), minval=-1)
BATCH = {"image": IMAGES, "label": jnp.arange(3)}


@pytest.mark.parametrize(
    "names",
    [
        ("flip",),
        ("erasing", "cutout", "crop", "hide_and_seek", "cutmix"),
    ],
)
def test_equals_the_functions_in_turn(names):
    key = jax.random.key(1)
    got = jax.jit(lambda b, k: augment(b, k, names, num_classes=5))(BATCH, key)
    want = BATCH
    for number, name in enumerate(names):
        options = {"num_classes": 5} if name in ("mixup", "cutmix") else {}
        change = jax.jit(functools.partial(AUGMENTATIONS[name], **options))
        want = change(want, jax.random.fold_in(key, number))
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=2e-4)
        assert got[name].dtype == value.dtype


def test_images_are_stored_after_all_but_what_goes_into_those_that_hide():
    names = ("colour", "cutout", "crop", "mixup")
    program = jax.make_jaxpr(lambda b, k: augment(b, k, names, num_classes=5))
    assert str(program(BATCH, jax.random.key(0))).count(" = layout_constraint[") == 3


def test_devices_change_their_own_images():
    names, key = ("flip", "erasing", "crop"), jax.random.key(1)
    batch = {"image": jnp.tile(IMAGES[:2], (2, 1, 1, 1)), "mask": jnp.zeros((4, 19, 17), int)}
    want = jax.jit(lambda batch: augment(batch, key, names))(batch)
    mesh = make_mesh("data=4", jax.devices()[:4])
    placed = jax.device_put(batch, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        step = jax.jit(lambda batch: augment(batch, key, names)).lower(placed).compile()
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), step(placed), want)
    assert not re.search(r"\[4,19,17\S* all-gather", step.as_text())


def test_no_names_change_nothing_and_numpy_is_welcome():
    out = augment(jax.tree.map(np.asarray, BATCH), jax.random.key(0), ())
    jax.tree.map(np.testing.assert_array_equal, out, BATCH)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"augment: unknown name 'flop'; choose among \['affine'"):
        augment(BATCH, jax.random.key(0), ("flip", "flop"))
    with pytest.raises(ValueError, match=r"augment: label \(3,\) with num_classes=None"):
        augment(BATCH, jax.random.key(0), ("cutmix",))
