"""Does hiding parts of pictures while training help? Random erasing and occlusion.

Claim     Random erasing lowers the test error, most of all on pictures that are
          partly occluded (Zhong et al. 2017, "Random Erasing Data Augmentation",
          arXiv:1708.04896, section 4.2, on CIFAR-10).
Measured  A small ResNet on the handwritten digits of scikit-learn, trained with and
          without erasing (rectangles of noise) for equally many steps from the
          same initial weights, over several seeds. Test error on whole pictures and
          on pictures in which a rectangle of noise covers a growing share; both
          networks see the same occlusions. One of the 360 pictures is 0.28 %, so small
          differences mean nothing: gains, in the mean of the seeds, come with their
          standard errors over the pictures.
Found     Under occlusion it holds by far: 3.0 instead of 6.2 % at a share of 0.1, 14
          instead of 37 % at 0.3. On whole pictures it does not: 1.6 instead of 0.9 %,
          two pictures more, 1.5 standard errors.
Run       python experiments/random_erasing.py            (about 3 min on 2 CPU cores)
          python experiments/random_erasing.py --help
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels import create_model, data, plots, training
from jaxmodels.data.augmentation import random_erasing
from jaxmodels.training.experiment import Result, run, trajectory_fields

NAMES = {"erasing": True, "plain": False}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    probability: float = 0.5
    """Of a training picture to be erased."""
    area: tuple[float, float] = (0.02, 0.4)
    """Smallest and largest share of a training picture that is erased."""
    aspect: float = 0.3
    """Smallest height over width of what is erased; the largest is its inverse."""
    occlusions: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    """Covered shares of the test pictures."""
    num_draws: int = 10
    """Occlusions of every test picture."""
    num_seeds: int = 3
    depths: tuple[int, ...] = (1, 1, 1)
    widths: tuple[int, ...] = (16, 32, 64)
    steps: int = 800
    batch_size: int = 128
    learning_rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.05
    seed: int = 0
    checkpoint_every: int = 300
    log_every: int = 20
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/random_erasing/TIME is begun."""


def main(config: Config, folder: Path) -> Result:
    check(config)
    model = create_model(
        "resnet18",
        depths=config.depths,
        widths=config.widths,
        stem_width=config.widths[0],
        stem="cifar",
        in_channels=1,
        num_classes=10,
    )
    errors = {
        name: np.array(train_and_test(config, model, erase, folder / name))
        for name, erase in NAMES.items()
    }
    draw_figure(config, folder, errors)
    return conclude(config, errors)


def check(config: Config) -> None:
    """Refuses what would only fail, or mean nothing, after training."""
    if not config.occlusions or not all(0 < share < 1 for share in config.occlusions):
        raise ValueError(f"occlusions={config.occlusions}: give at least one share between 0 and 1")
    for name in ("num_draws", "num_seeds", "steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if len(config.depths) != len(config.widths) or not config.depths:
        raise ValueError(
            f"depths={config.depths} and widths={config.widths}: give one of each for every stage"
        )
    erase(config, data.digits("test").arrays()[0][:1], jax.random.key(0))


def erase(config: Config, images: jax.Array, key: jax.Array) -> jax.Array:
    """Training pictures, some of them with a rectangle of noise."""
    options = {"probability": config.probability, "area": config.area, "aspect": config.aspect}
    return random_erasing({"image": images}, key, **options)["image"]


def train_and_test(config: Config, model, erasing: bool, folder: Path) -> list[np.ndarray]:
    """The test errors of every seed by share of occlusion and picture."""

    def loss_fn(params, batch, key, model_state):
        images = erase(config, batch["image"], key) if erasing else batch["image"]
        variables = {"params": params, **model_state}
        logits, model_state = model.apply(variables, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(losses), {}, model_state

    optimizer = training.adamw(
        config.learning_rate,
        steps=config.steps,
        warmup=min(config.warmup, config.steps - 1),
        weight_decay=config.weight_decay,
    )
    step = training.make_step(loss_fn, optimizer)
    digits = data.digits("train")
    example = {"images": jnp.zeros((1, *digits.image_shape))}
    errors = []
    for seed in range(config.seed, config.seed + config.num_seeds):
        state = training.fit(
            training.init_state(model, optimizer, jax.random.key(seed), example),
            step,
            data.batches(digits, config.batch_size, seed=seed),
            steps=config.steps,
            directory=folder / f"seed_{seed}",
            config=trajectory_fields(config),
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            description=f"{folder.name}, seed {seed}",
        )
        errors.append(test_errors(config, model, {"params": state.params, **state.model_state}))
    return errors


def test_errors(config: Config, model, variables) -> np.ndarray:
    """How often each picture is wrong, (shares, pictures); the first share is 0."""
    images, labels = map(jnp.asarray, data.digits("test").arrays())

    @jax.jit
    def wrong(images):
        return jnp.argmax(model.apply(variables, images), axis=-1) != labels

    # Both networks and all seeds are tested on the same occlusions.
    keys = jax.random.split(jax.random.key(config.seed), config.num_draws)
    found = [np.float64(wrong(images))]
    for share in config.occlusions:
        draws = [wrong(occlude(images, share, key)) for key in keys]
        found.append(np.mean(draws, axis=0))
    return np.stack(found)


def occlude(images: jax.Array, share: float, key: jax.Array) -> jax.Array:
    """A rectangle of noise over this share of every picture."""
    options = {"probability": 1.0, "area": (share, share), "aspect": 0.5}
    return random_erasing({"image": images}, key, **options)["image"]


def conclude(config: Config, errors: dict[str, np.ndarray]) -> Result:
    """The claim held against errors of shape (seeds, shares, pictures)."""
    means = {name: of_pictures.mean(axis=0) for name, of_pictures in errors.items()}
    gains = means["plain"] - means["erasing"]
    gain, unsure = gains.mean(axis=1), gains.std(axis=1, ddof=1) / np.sqrt(gains.shape[1])
    measured = {}
    for i, share in enumerate(shares(config)):
        occluded = f"occluded_{share:g}"
        for name, mean in means.items():
            measured[f"{name}_error_{occluded}"] = float(mean[i].mean())
        measured[f"gain_{occluded}"] = float(gain[i])
        measured[f"gain_{occluded}_standard_error"] = float(unsure[i])
    return Result(
        claim="erasing lowers the test error under every occlusion, by more than two standard "
        "errors and more than on whole pictures, where it raises it by one standard error at most",
        source="Zhong et al. 2017, arXiv:1708.04896, section 4.2",
        holds=bool(
            np.all(gain[1:] > 2 * unsure[1:])
            and np.all(gain[1:] > gain[0])
            and gain[0] >= -unsure[0]
        ),
        measured=measured,
    )


def shares(config: Config) -> tuple[float, ...]:
    return (0.0, *config.occlusions)


def draw_figure(config: Config, folder: Path, errors: dict[str, np.ndarray]) -> None:
    """Errors against the occluded share, and what occluded digits look like."""
    images = jnp.asarray(data.digits("test").arrays()[0][:8])
    key = jax.random.key(config.seed)
    rows = [images, *(occlude(images, share, key) for share in config.occlusions)]
    figure = plots.new_figure(width=11.0, height=4.5)
    left, right = figure.subplots(1, 2)
    labels = {"plain": "trained on whole digits", "erasing": "trained with random erasing"}
    lines = {
        label: (shares(config), 100 * errors[name].mean(axis=(0, 2)))
        for name, label in labels.items()
    }
    title = f"mean of {config.num_seeds} seeds"
    plots.curve(left, lines, "occluded share of the picture", "test error in %", title=title)
    names = [f"{share:.0%}" for share in shares(config)]
    plots.image_grid(right, np.stack(rows), row_labels=names, title="test pictures")
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
