"""Training on the score itself: a smooth F1 against cross-entropy for a rare class.

Claim     Where one class is rare, a classifier trained on a smooth F1 score reaches a
          higher F1 than one trained on cross-entropy (Pastor-Pellicer et al. 2013,
          "F-Measure as the Error Function to Train Neural Networks"; Bénédict et al.
          2021, "sigmoidF1", arXiv:2108.10566). And smooth surrogates become the exact
          functions as their temperature falls.
Measured  F1 at the threshold 1/2 on held-out digits, of one digit against the rest, with
          fewer and fewer of that digit in training and testing alike; the mean over all
          ten digits and several splits, for a linear classifier (or one hidden layer)
          trained to its end on cross-entropy, on cross-entropy weighted by how rare the
          class is, and on soft F1. The claim is held against pictures shrunk to 2 x 2,
          in which digits overlap. The evidence against: larger pictures, in which a
          plane tells a digit from the rest, and cross-entropy again, its threshold
          chosen afterwards as the one with the best F1 in training (the best one of a
          calibrated classifier is half of the best F1; Lipton et al. 2014,
          arXiv:1402.1892). Errors of the surrogates by temperature.
Run       python experiments/soft_metrics.py            (about 1 min on 2 CPU cores)
          python experiments/soft_metrics.py --hidden 32
          python experiments/soft_metrics.py --help
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels import data, plots
from jaxmodels.layers.linear import Linear
from jaxmodels.ops import soft_metrics
from jaxmodels.training.experiment import Result, run

CLASSES = 10
TEMPERATURES = 10.0 ** np.arange(-4, 1.01, 0.5)
CHOSEN = "cross-entropy, threshold chosen"


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    positives: tuple[int, ...] = (8, 24, 72)
    """How many of the digit are in training, and as many in testing, beside some 800 others."""
    shrink: tuple[int, ...] = (4, 2, 1)
    """Sides of the squares of pixels that are averaged; the claim is about the first."""
    splits: int = 4
    """Random halves of the digits, for each digit."""
    hidden: int = 0
    """Width of a hidden layer; none is 0."""
    steps: int = 1500
    """Of Adam, each on all examples: an F1 score is one of a whole set."""
    learning_rate: float = 0.1
    seed: int = 0
    folder: Path | None = None
    """Where results go; by default runs/soft_metrics/TIME."""


def main(config: Config, folder: Path) -> Result:
    check(config)
    scores = {
        shrink: {count: scores_with(config, shrink, count) for count in config.positives}
        for shrink in config.shrink
    }
    errors = surrogate_errors(jax.random.key(config.seed))
    draw_figure(folder, scores, errors)
    return conclude(config, scores, errors)


def check(config: Config) -> None:
    """Refuses what nothing could be measured with."""
    if not config.positives or not all(1 <= count <= 80 for count in config.positives):
        raise ValueError(f"positives={config.positives}: give numbers of 1 to 80")
    if not config.shrink or not {*config.shrink} <= {1, 2, 4, 8}:
        raise ValueError(f"shrink={config.shrink}: choose among 1, 2, 4 and 8")
    if config.splits < 2 or config.steps < 1:
        raise ValueError(
            f"splits={config.splits}, steps={config.steps}: give at least 2 splits and 1 step"
        )
    if config.hidden < 0:
        raise ValueError(f"hidden={config.hidden} must not be negative")


def cross_entropy(logits, targets):
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean()


def weighted_cross_entropy(logits, targets):
    """Both classes count the same, however many examples they have."""
    share = targets.mean()
    weights = jnp.where(targets > 0, 1 / share, 1 / (1 - share))
    return (weights * optax.sigmoid_binary_cross_entropy(logits, targets)).mean() / 2


def soft_f1_loss(logits, targets):
    return 1 - soft_metrics.soft_f1(jax.nn.sigmoid(logits), targets)


LOSSES: dict[str, Callable] = {
    "cross-entropy": cross_entropy,
    "weighted cross-entropy": weighted_cross_entropy,
    "soft F1": soft_f1_loss,
}


def exact_f1(logits, targets, threshold=0.0):
    """The score of saying yes above a threshold, 0 without a yes."""
    said = logits > threshold
    return 2 * (said * targets).sum() / jnp.maximum((said + targets).sum(), 1)


def halves(config: Config, shrink: int, count: int) -> tuple[tuple, tuple]:
    """Training and test sets of every digit and split: pictures and targets, stacked."""
    parts = [data.digits("train").arrays(), data.digits("test").arrays()]
    pictures, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    side = 8 // shrink
    pictures = pictures.reshape(-1, side, shrink, side, shrink).mean(axis=(2, 4))
    pictures = pictures.reshape(len(labels), -1)
    others = min(np.sum(labels != digit) for digit in range(CLASSES)) // 2
    sets = ([], [])
    for digit in range(CLASSES):
        for split in range(config.splits):
            rng = np.random.default_rng((config.seed, digit, split))
            ours = rng.permutation(np.flatnonzero(labels == digit))[: 2 * count]
            rest = rng.permutation(np.flatnonzero(labels != digit))[: 2 * others]
            for part, into in enumerate(sets):
                chosen = np.concatenate([ours[part::2], rest[part::2]])
                into.append((pictures[chosen], np.float32(labels[chosen] == digit)))
    return tuple(tuple(map(np.stack, zip(*each, strict=True))) for each in sets)


def scores_with(config: Config, shrink: int, count: int) -> dict[str, np.ndarray]:
    """F1 on the test sets by loss, (digits, splits)."""
    train_sets, test_sets = halves(config, shrink, count)
    keys = jax.random.split(jax.random.key(config.seed), len(train_sets[1]))
    found = {}
    for name, loss in LOSSES.items():
        plain, chosen = train_and_score(config, loss, keys, *train_sets, *test_sets)
        found[name] = np.asarray(plain).reshape(CLASSES, -1)
        if loss is cross_entropy:
            found[CHOSEN] = np.asarray(chosen).reshape(CLASSES, -1)
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.vmap, in_axes=(None, None, 0, 0, 0, 0, 0))
def train_and_score(config, loss, key, inputs, targets, test_inputs, test_targets):
    """F1 in testing, at the threshold 1/2 and at the one that is best in training."""
    hidden, out = Linear(config.hidden), Linear(1)
    for_hidden, for_out = jax.random.split(key)
    params = {}
    if config.hidden:
        params["hidden"] = hidden.init(for_hidden, inputs)
    width = config.hidden or inputs.shape[-1]
    params["out"] = out.init(for_out, jnp.zeros((1, width)))

    def logits(params, x):
        if config.hidden:
            x = jax.nn.relu(hidden.apply(params["hidden"], x))
        return out.apply(params["out"], x)[:, 0]

    def objective(params):
        return loss(logits(params, inputs), targets)

    optimizer = optax.adam(config.learning_rate)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(objective)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    (params, _), _ = jax.lax.scan(step, start, length=config.steps)
    thresholds = jnp.linspace(-8, 8, 161)
    reached = jax.vmap(exact_f1, (None, None, 0))(logits(params, inputs), targets, thresholds)
    said = logits(params, test_inputs)
    best = thresholds[jnp.argmax(reached)]
    return exact_f1(said, test_targets), exact_f1(said, test_targets, best)


def surrogate_errors(key: jax.Array) -> dict[str, list[float]]:
    """Mean absolute error by temperature against the exact functions, of random scores."""
    for_scores, for_labels = jax.random.split(key)
    scores = jax.random.normal(for_scores, (64, 16))
    labels = jax.random.randint(for_labels, (64,), 0, 16)
    labels = jnp.where(jnp.arange(64) % 2 == 0, scores.argmax(axis=1), labels)
    targets = jnp.float32(scores[:, 1] > 1)
    exact = {
        "maximum": scores.max(axis=1),
        "argmax": scores.argmax(axis=1),
        "rank": 1 + scores.argsort(axis=1).argsort(axis=1),
        "accuracy": jnp.mean(scores.argmax(axis=1) == labels),
        "F1": exact_f1(scores[:, 0], targets),
    }

    def smooth(t):
        return {
            "maximum": soft_metrics.soft_maximum(scores, t),
            "argmax": soft_metrics.soft_argmax(scores, t),
            "rank": soft_metrics.soft_rank(scores, t),
            "accuracy": soft_metrics.soft_accuracy(scores, labels, t),
            "F1": soft_metrics.soft_f1(jax.nn.sigmoid(scores[:, 0] / t), targets),
        }

    rows = [smooth(float(t)) for t in TEMPERATURES]
    return {
        name: [float(jnp.abs(row[name] - value).mean()) for row in rows]
        for name, value in exact.items()
    }


def standard_error(scores: np.ndarray) -> float:
    """Of the mean over splits for these ten digits, which are not drawn from any more."""
    return float(np.sqrt(scores.var(axis=1, ddof=1).mean() / scores.size))


def conclude(config: Config, scores, errors) -> Result:
    """The claim held against the numbers."""
    measured: dict[str, float] = {}
    for shrink, by_count in scores.items():
        for count, found in by_count.items():
            label = f"shrink_{shrink}_positives_{count}"
            measured |= {f"{label}_{key}": value for key, value in summary(found).items()}
    for name, line in errors.items():
        measured[f"error_of_{name}_at_temperature_{TEMPERATURES[0]:g}"] = line[0]
    rarest = min(config.positives)
    label = f"shrink_{config.shrink[0]}_positives_{rarest}_gain"
    better = measured[label] > 2 * measured[f"{label}_standard_error"]
    exact = all(line[0] < 0.01 for line in errors.values())
    return Result(
        claim=(
            f"with {rarest} examples of the class, training on soft F1 gives a higher F1 than "
            f"cross-entropy at the threshold 1/2 (pictures shrunk by {config.shrink[0]}), and cold "
            "surrogates are exact to 0.01"
        ),
        source="Pastor-Pellicer et al. 2013; Bénédict et al. 2021, arXiv:2108.10566",
        holds=bool(better and exact),
        measured=measured,
    )


def summary(found: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean scores by loss, and what soft F1 gains."""
    gain = found["soft F1"] - found["cross-entropy"]
    over_chosen = found["soft F1"] - found[CHOSEN]
    names = {name: name.replace(", ", "_").replace(" ", "_").replace("-", "_") for name in found}
    return {names[name]: float(values.mean()) for name, values in found.items()} | {
        "gain": float(gain.mean()),
        "gain_standard_error": standard_error(gain),
        "gain_over_a_chosen_threshold": float(over_chosen.mean()),
    }


def draw_figure(folder: Path, scores, errors) -> None:
    """F1 against how many examples there are, and errors against temperature."""
    figure = plots.new_figure(width=5.5 * (len(scores) + 1), height=4.8)
    *panels, last = figure.subplots(1, len(scores) + 1)
    for axes, (shrink, by_count) in zip(panels, scores.items(), strict=True):
        counts = np.array(sorted(by_count))
        lines = {
            name: (counts, np.array([by_count[count][name].mean() for count in counts.tolist()]))
            for name in by_count[counts[0]]
        }
        title = f"pictures of {8 // shrink} x {8 // shrink}"
        plots.curve(axes, lines, "examples of the class", "F1, held out", logx=True, title=title)
    # Below a float's precision an error is 0, which has no place on a logarithmic axis.
    colder = np.log10(TEMPERATURES)
    lines = {name: (colder, np.maximum(line, 1e-5)) for name, line in errors.items()}
    plots.curve(last, lines, "log10 of the temperature", "error of the surrogate", logy=True)
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
