"""Mixed images and labels: the label is what the image is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.data.augmentation import cutmix, mixup

B = 200
# Image n is the constant n / B, so a mixture tells what it was made of.
VALUES = np.arange(B, dtype=np.float32) / B
BATCH = {
    "image": jnp.asarray(np.broadcast_to(VALUES[:, None, None, None], (B, 13, 17, 1))),
    "label": jnp.arange(B),
}


@pytest.mark.parametrize("change", [mixup, cutmix])
def test_labels_are_the_shares_of_the_images(change):
    out = jax.jit(lambda b, k: change(b, k, alpha=1.0, num_classes=B))(BATCH, jax.random.key(0))
    labels = np.asarray(out["label"])
    assert labels.shape == (B, B)
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
    assert (labels > 0).sum(axis=1).max() <= 2
    # Mean values of images made of n and m are mixed as the labels are.
    np.testing.assert_allclose(np.mean(out["image"], axis=(1, 2, 3)), labels @ VALUES, atol=2e-6)
    own = np.diag(labels)
    assert own.min() < 0.2 and own.max() > 0.8 and len(np.unique(own)) > B / 5


def test_mixup_weights_follow_the_beta_distribution():
    for alpha in (0.2, 4.0):
        out = mixup(BATCH, jax.random.key(1), alpha=alpha, num_classes=B)
        labels = np.asarray(out["label"])
        own = np.diag(labels)[(labels > 0).sum(axis=1) == 2]
        assert abs(own.mean() - 0.5) < 0.1
        assert abs(own.std() - np.sqrt(1 / (4 * (2 * alpha + 1)))) < 0.07
        assert np.ptp(out["image"], axis=(1, 2, 3)).max() == 0


def test_cutmix_pastes_one_rectangle_and_the_mask_follows():
    mask = jnp.broadcast_to(jnp.arange(B)[:, None, None], (B, 13, 17))
    out = cutmix({**BATCH, "mask": mask}, jax.random.key(3), num_classes=B)
    cut = 0
    for n in range(B):
        image, classes = np.asarray(out["image"][n, ..., 0]), np.asarray(out["mask"][n])
        np.testing.assert_array_equal(image, VALUES[classes])
        pasted = classes != n
        if pasted.any() and not pasted.all():
            rows, columns = pasted.any(axis=1), pasted.any(axis=0)
            np.testing.assert_array_equal(pasted, rows[:, None] & columns[None])
            np.testing.assert_allclose(out["label"][n, n], 1 - pasted.mean(), atol=1e-6)
            # The image's proportions, unless an edge cuts it.
            if not (
                pasted[0].any() or pasted[-1].any() or pasted[:, 0].any() or pasted[:, -1].any()
            ):
                assert abs(rows.sum() / 13 - columns.sum() / 17) < 0.08
            cut += 1
    assert cut > B / 2


def test_cutmix_rectangles_are_the_papers():
    """Shares and places against the definition drawn in NumPy; a pixel's rounding apart."""
    size, rng = np.array([13, 17]), np.random.default_rng(0)
    mask = jnp.broadcast_to(jnp.arange(B)[:, None, None], (B, *size))
    shown = [
        cutmix({"image": BATCH["image"], "mask": mask}, jax.random.key(seed))["mask"]
        for seed in range(3)
    ]
    pasted = np.concatenate([np.asarray(classes) != mask for classes in shown])
    half = np.sqrt(rng.uniform(size=(20000, 1))) * size / 2
    centre = rng.uniform(0, size, size=(20000, 2))
    edges = [np.clip(edge, 0, size) for edge in (centre - half, centre + half)]
    want = np.prod((edges[1] - edges[0]) / size, axis=1)
    assert abs(pasted.mean() - want.mean()) < 0.04
    assert abs(pasted.mean(axis=(1, 2)).std() - want.std()) < 0.03
    for axes in ((0, 1), (0, 2)):
        line = pasted.mean(axis=axes)
        np.testing.assert_allclose(line, line[::-1], atol=0.12)


def test_another_key_chooses_other_partners():
    partners = []
    for seed in (0, 1):
        labels = np.array(mixup(BATCH, jax.random.key(seed), alpha=4.0, num_classes=B)["label"])
        np.fill_diagonal(labels, 0)
        partners.append(labels.argmax(axis=1))
    assert np.mean(partners[0] == partners[1]) < 0.05
    assert sorted(set(partners[0]) | {0}) != partners[0].tolist()
    assert len(set(partners[0])) > 0.95 * B  # each image is once a partner


def test_masks_alone_need_no_label():
    out = cutmix({"image": BATCH["image"], "mask": jnp.zeros((B, 13, 17), int)}, jax.random.key(0))
    assert set(out) == {"image", "mask"}


@pytest.mark.parametrize("change", [mixup, cutmix])
def test_soft_labels_keys_and_vmap(change):
    soft = jax.nn.softmax(jax.random.normal(jax.random.key(0), (B, 5)))
    batch, key = {**BATCH, "label": soft}, jax.random.key(4)
    out = change(batch, key)
    whole = change(BATCH, key, num_classes=B)["label"]
    np.testing.assert_allclose(out["label"], np.asarray(whole) @ np.asarray(soft), atol=1e-5)
    keys = jnp.stack([key, jax.random.key(5)])
    both = jax.vmap(lambda k: change(batch, k)["image"])(keys)
    np.testing.assert_allclose(both[0], out["image"], atol=1e-6)
    assert np.any(both[0] != both[1])


@pytest.mark.parametrize("change", [mixup, cutmix])
@pytest.mark.parametrize(
    ("extra", "options", "message"),
    [
        ({}, {}, r"label \(200,\) with num_classes=None; give soft labels"),
        ({}, {"num_classes": 5}, r"label holds 5, outside \[0, 4\]"),
        ({}, {"num_classes": B, "alpha": 0.0}, r"alpha holds 0, outside \(0,"),
        ({"boxes": jnp.zeros((B, 1, 4))}, {"num_classes": B}, "cannot mix boxes; leave them out"),
        ({"label": jnp.zeros(3, int)}, {"num_classes": 5}, r"label \(3,\) with num_classes=5"),
    ],
)
def test_bad_input_is_named(change, extra, options, message):
    with pytest.raises(ValueError, match=f"{change.__name__}: {message}"):
        change({**BATCH, **extra}, jax.random.key(0), **options)


def test_what_has_no_average_is_refused():
    with pytest.raises(ValueError, match="mixup: cannot mix mask; leave"):
        mixup({**BATCH, "mask": jnp.zeros((B, 13, 17), int)}, jax.random.key(0), num_classes=B)
    with pytest.raises(ValueError, match=r"mixup: the batch holds \['image'\]; it needs 'label'"):
        mixup({"image": BATCH["image"]}, jax.random.key(0))
