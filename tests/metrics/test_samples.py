"""The judge of samples, on samples whose quality is known."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import pairwise_distances
from sklearn.svm import SVC

from jaxmodels.metrics import SampleJudge


@pytest.fixture(scope="module")
def digits():
    source = load_digits()
    images = (source.images[..., None] / 8 - 1).astype(np.float32)
    return images, source.target.astype(np.int32)


@pytest.fixture(scope="module")
def judge(digits):
    images, labels = digits
    return SampleJudge(images[:700], labels[:700], images[700:1013], labels[700:1013])


def test_reference_is_what_scipy_and_scikit_learn_say(digits, judge):
    images, labels = digits
    flat = images.reshape(len(images), -1).astype(np.float64)
    svm = SVC(C=10.0, gamma="scale").fit(flat[:700], labels[:700])
    assert judge.reference["svm_accuracy"] == svm.score(flat[700:1013], labels[700:1013])
    nearest = pairwise_distances(flat[700:1013], flat[:700]).min(axis=1)
    np.testing.assert_allclose(judge.reference["neighbour_distance"], np.median(nearest), rtol=1e-5)
    features = PCA(20, svd_solver="full").fit(flat[:700]).transform(flat[:1013])
    rng, values = np.random.default_rng(0), []
    real = features[700:]
    for _ in range(8):
        drawn = features[rng.permutation(700)[:313]]
        a, b = np.cov(drawn.T), np.cov(real.T)
        gap = np.sum((drawn.mean(0) - real.mean(0)) ** 2)
        values.append(gap + np.trace(a + b - 2 * sqrtm(a @ b).real))
    np.testing.assert_allclose(judge.reference["frechet"], np.mean(values), rtol=1e-3)


def test_other_real_digits_are_as_good_as_real(digits, judge):
    images, labels = digits
    verdict = judge(images[1013:1500], labels[1013:1500])
    assert verdict["accuracy"] > 0.9
    assert 0.5 < verdict["frechet_ratio"] < 3
    assert 0.8 < verdict["neighbour_ratio"] < 1.25


def test_copies_noise_blur_and_wrong_labels_are_found_out(digits, judge):
    images, labels = digits
    copies = judge(images[:700], labels[:700])
    assert copies["neighbour_ratio"] == 0
    np.testing.assert_allclose(copies["frechet_ratio"], 1, rtol=1e-6)
    noise = np.random.default_rng(1).uniform(-1, 1, (400, 8, 8, 1)).astype(np.float32)
    assert judge(noise, labels[:400])["neighbour_ratio"] > 2
    assert judge(noise, labels[:400])["frechet_ratio"] > 5
    mean = np.broadcast_to(images[:700].mean(0), (400, 8, 8, 1))
    assert judge(mean, labels[:400])["frechet_ratio"] > 5
    assert judge(images[:700], (labels[:700] + 1) % 10)["accuracy"] < 0.02


def test_too_few_samples(digits, judge):
    images, labels = digits
    with pytest.raises(ValueError, match="312 samples are fewer than the 313 held-out"):
        judge(images[:312], labels[:312])
