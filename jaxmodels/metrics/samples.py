"""Whether generated pictures are what was asked for, spread as they should, and new."""

import numpy as np
from jaxtyping import Float, Int

from jaxmodels.metrics.frechet import frechet_distance
from jaxmodels.metrics.neighbours import nearest_neighbour_distances


class SampleJudge:
    """Judges samples by classical tools fitted to real pictures only.

    Nothing here is learned from, or shared with, the model that is judged.

    Args:
      train_images, train_labels: what the model learned from.
      real_images, real_labels: held-out pictures of the same kind.
      components: principal components of the Fréchet distance's space.
      draws: Fréchet distances are averages over this many random subsets as
        large as the held-out set, because the estimate depends on the count.
      seed: of the subsets.

    Attributes:
      reference: how real pictures fare, by name: `svm_accuracy` of the support
        vector machine on the held-out ones, `frechet` of training against
        held-out ones, `neighbour_distance` of held-out ones (median).
    """

    def __init__(
        self,
        train_images: Float[np.ndarray, "N Y X C"],
        train_labels: Int[np.ndarray, "N"],
        real_images: Float[np.ndarray, "M Y X C"],
        real_labels: Int[np.ndarray, "M"],
        *,
        components: int = 20,
        draws: int = 8,
        seed: int = 0,
    ):
        from sklearn.decomposition import PCA
        from sklearn.svm import SVC

        self._train, real = _flat(train_images), _flat(real_images)
        components = min(components, *self._train.shape)
        self._space = PCA(components, svd_solver="full").fit(self._train)
        self._classifier = SVC(C=10.0, gamma="scale").fit(self._train, train_labels)
        self._real, self._draws, self._seed = self._space.transform(real), draws, seed
        self.reference = {
            "svm_accuracy": self._accuracy(real, real_labels),
            "frechet": self._frechet(self._train),
            "neighbour_distance": self._neighbour_distance(real),
        }

    def __call__(
        self, images: Float[np.ndarray, "S Y X C"], labels: Int[np.ndarray, "S"]
    ) -> dict[str, float]:
        """Judges samples.

        Args:
          images: at least as many as there are held-out pictures.
          labels: the classes that were asked for.

        Returns:
          `accuracy`: share classified as the class asked for; `frechet_ratio`:
          Fréchet distance to held-out pictures over that of training pictures;
          `neighbour_ratio`: median distance to the nearest training picture over
          that of held-out pictures.

        Raises:
          ValueError: too few samples.
        """
        if len(images) < len(self._real):
            raise ValueError(
                f"SampleJudge: {len(images)} samples are fewer than the {len(self._real)} held-out "
                "pictures they are compared with; draw more"
            )
        samples = _flat(images)
        reference = self.reference
        return {
            "accuracy": self._accuracy(samples, labels),
            "frechet_ratio": self._frechet(samples) / reference["frechet"],
            "neighbour_ratio": self._neighbour_distance(samples) / reference["neighbour_distance"],
        }

    def _accuracy(self, pictures, labels) -> float:
        return float(np.mean(self._classifier.predict(pictures) == labels))

    def _frechet(self, pictures) -> float:
        features, rng = self._space.transform(pictures), np.random.default_rng(self._seed)
        subsets = [rng.permutation(len(features))[: len(self._real)] for _ in range(self._draws)]
        return float(np.mean([frechet_distance(features[s], self._real) for s in subsets]))

    def _neighbour_distance(self, pictures) -> float:
        return float(np.median(nearest_neighbour_distances(pictures, self._train)))


def _flat(images: Float[np.ndarray, "N Y X C"]) -> Float[np.ndarray, "N D"]:
    return images.reshape(len(images), -1)
