"""ViT, Swin or ResNet? One classifier of each at equal size, and what large images cost them.

Claim     Attention in windows costs time in proportion to the area of an image, and
          attention among all patches in proportion to its square (Liu et al. 2021,
          "Swin Transformer", arXiv:2103.14030, section 3.2, equations 1 and 2).
Measured  A ViT with patches of 8 x 8, a Swin and a ResNet whose numbers of
          parameters differ by less than a tenth, trained equally long on scenes of
          one handwritten digit each: accuracy on scenes of other digits and
          images/s. Then the time of the forward pass of one image from 64 to 512
          pixels, the fastest of several calls, and its multiplications, counted in
          the traced program. Exponents of both in the number of pixels are fitted
          over the larger half of the sizes. ViT's also has the linear cost of its
          matrices, so that its exponent nears 2 only as attention outgrows them.
Run       python experiments/vit_or_swin.py            (about 13 min on 2 CPU cores)
          python experiments/vit_or_swin.py --help
"""

import dataclasses
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from jaxmodels import create_model, data, plots, training
from jaxmodels.metrics import top_k_accuracy
from jaxmodels.training.experiment import Result, run, trajectory_fields
from jaxmodels.training.files import write_json

# About 1.2 million parameters each: registered name, and fields.
MODELS = {
    "ViT": (
        "vit_tiny_patch16_224",
        {"patch_size": 8, "width": 128, "depth": 6, "num_heads": 4, "pool": "mean"},
    ),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"window": 4, "width": 48, "depths": (2, 2, 2), "num_heads": (3, 6, 12)},
    ),
    "ResNet": ("resnet18", {"depths": (3, 4, 3), "widths": (32, 64, 128), "stem_width": 32}),
}
# Linear growth, and growth that is clearly more.
LINEAR, QUADRATIC = 1.1, 1.4


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    image_size: int = 64
    """Side of the scenes that are learnt from."""
    scale: tuple[float, float] = (2.0, 6.0)
    """Smallest and largest digit, in units of 8 x 8 pixels."""
    steps: int = 1500
    """Of training; with 0, only costs are measured."""
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.05
    train_scenes: int = 20_000
    test_scenes: int = 2_000
    sizes: tuple[int, ...] = (64, 128, 192, 256, 384, 512)
    """Sides of the images whose cost is measured."""
    turn_seconds: float = 1.5
    """How long the forward pass of each is repeated."""
    seed: int = 0
    checkpoint_every: int = 200
    log_every: int = 20
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/vit_or_swin/TIME is begun."""


def main(config: Config, folder: Path) -> Result:
    check(config)
    models = {name: build(config, name) for name in MODELS}
    test_set = scenes(config, "test", config.test_scenes).batch(
        np.arange(config.test_scenes), np.random.default_rng(0)
    )
    measured, costs = {}, {}
    for name, model in models.items():
        variables = train(config, model, folder / name, name)
        measured |= describe(config, name, model, variables, test_set)
        costs[name] = growth(config, name, model, variables)
    write_json(folder / "costs.json", costs)
    draw_figure(config, folder, costs, measured, test_set)
    return conclude(config, costs, measured)


def check(config: Config) -> None:
    """Refuses what would only fail, or mean nothing, after training."""
    sizes, smallest = (*config.sizes, config.image_size), 16  # a window of Swin
    if min(sizes) < smallest:
        raise ValueError(f"sizes={sizes} of scenes and costs must be at least {smallest}")
    if len(set(larger_half(config.sizes))) < 2 or list(config.sizes) != sorted(config.sizes):
        raise ValueError(f"sizes={config.sizes}: give at least three, in ascending order")
    if config.steps < 0:
        raise ValueError(f"steps={config.steps} must not be negative")


def larger_half(values: tuple) -> tuple:
    """Where fixed costs no longer count."""
    return values[len(values) // 2 :]


def build(config: Config, name: str):
    registered, fields = MODELS[name]
    if name == "ViT":
        fields = {**fields, "image_size": config.image_size}
    return create_model(registered, in_channels=1, num_classes=10, **fields)


def scenes(config: Config, split: str, size: int) -> data.DigitScenes:
    """One digit each, somewhere."""
    canvas = (config.image_size, config.image_size)
    options = {"canvas": canvas, "count": (1, 1), "scale": config.scale, "noise": 0.1}
    return data.digit_scenes(split, size=size, seed=config.seed, **options)


def train(config: Config, model, folder: Path, name: str) -> dict:
    """The trained variables."""
    optimizer = training.adamw(
        config.learning_rate,
        steps=max(config.steps, 1),
        warmup=max(0, min(config.warmup, config.steps - 1)),
        weight_decay=config.weight_decay,
        clip_norm=1.0,
    )
    train_set = scenes(config, "train", config.train_scenes)
    example = {"images": jnp.zeros((1, *train_set.image_shape))}
    state = training.init_state(model, optimizer, jax.random.key(config.seed), example)
    if config.steps:
        state = training.fit(
            state,
            training.make_step(make_loss(model), optimizer),
            data.batches(train_set, config.batch_size, seed=config.seed),
            steps=config.steps,
            directory=folder,
            config=trajectory_fields(config),
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            description=name,
        )
    return {"params": state.params, **state.model_state}


def make_loss(model):
    """Cross-entropy; the last argument is there for models with batch statistics."""

    def loss_fn(params, batch, key, model_state=None):
        logits, changed = model.apply(
            {"params": params, **(model_state or {})},
            batch["image"],
            train=True,
            mutable=list(model_state or ()),
            rngs={"dropout": key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return (losses.mean(), {}, changed) if model_state else (losses.mean(), {})

    return loss_fn


def describe(config: Config, name: str, model, variables, test_set) -> dict[str, float]:
    """Size, speed and accuracy at the size that was learnt."""
    labels, size = test_set["label"], config.batch_size
    # Whole batches, so that one program takes all; the first scenes fill the last one up.
    images = np.resize(
        test_set["image"], (-(-len(labels) // size) * size, *test_set["image"].shape[1:])
    )
    forward = jax.jit(model.apply).lower(variables, images[:size]).compile()
    batches = images.reshape(-1, size, *images.shape[1:])
    logits = jnp.concatenate([forward(variables, batch) for batch in batches])[: len(labels)]
    return {
        f"{name}: parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        f"{name}: accuracy": float(top_k_accuracy(logits, jnp.asarray(labels))),
        f"{name}: images per second": size / fastest(forward, variables, jnp.asarray(batches[0])),
    }


def growth(config: Config, name: str, model, variables) -> dict[str, list[float]]:
    """Seconds and multiplications of the forward pass of one image, a figure a size."""
    cost = {"pixels": [], "seconds": [], "multiplications": []}
    for size in track(config.sizes, description=f"cost of {name}"):
        image = jnp.zeros((1, size, size, 1))
        forward = jax.jit(model.apply).lower(variables, image).compile()
        with jax.default_device("cpu"):  # where no kernel hides what it multiplies
            program = jax.make_jaxpr(model.apply)(variables, image)
        cost["pixels"].append(size**2)
        cost["seconds"].append(fastest(forward, variables, image, seconds=config.turn_seconds))
        cost["multiplications"].append(multiplications(program.jaxpr))
    return cost


def fastest(call, *arguments, seconds: float = 1.0) -> float:
    """The least time of a call, among three or as many as fit; others only add to it."""
    jax.block_until_ready(call(*arguments))
    times = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def multiplications(program) -> int:
    """Those of all matrix products and convolutions; the body of a loop counts every time.

    XLA's own count, `compiled.cost_analysis()`, takes a loop's body once.
    """
    total = 0
    for equation in program.eqns:
        options = equation.params
        inner = options.get("jaxpr", options.get("call_jaxpr"))
        sizes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
        if inner is not None:
            total += options.get("length", 1) * multiplications(getattr(inner, "jaxpr", inner))
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = options["dimension_numbers"]
            total += math.prod(sizes[-1]) * math.prod(sizes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            features = options["dimension_numbers"].rhs_spec[0]
            total += math.prod(sizes[-1]) * math.prod(sizes[1]) // sizes[1][features]
    return total


def exponent(cost: dict[str, list[float]], of: str) -> float:
    """The p of cost ~ pixels^p, by least squares over the larger half of the sizes."""
    pairs = [larger_half(cost[key]) for key in ("pixels", of)]
    return float(np.polyfit(*np.log(np.asarray(pairs, float)), 1)[0])


def conclude(config: Config, costs, measured: dict[str, float]) -> Result:
    """The claim held against the numbers."""
    measured = dict(measured)
    for name, cost in costs.items():
        measured[f"{name}: exponent of time"] = exponent(cost, "seconds")
        measured[f"{name}: exponent of multiplications"] = exponent(cost, "multiplications")
        for size, seconds in zip(config.sizes, cost["seconds"], strict=True):
            measured[f"{name}: ms at {size}"] = 1e3 * seconds
    last = {key: np.log(costs["ViT"][key][-2:]) for key in ("pixels", "multiplications")}
    steepest = float(np.diff(last["multiplications"])[0] / np.diff(last["pixels"])[0])
    measured["ViT: exponent of multiplications at the end"] = steepest
    holds = (
        measured["Swin: exponent of time"] <= LINEAR
        and measured["Swin: exponent of multiplications"] <= LINEAR
        and measured["ViT: exponent of time"] >= QUADRATIC
        and steepest > measured["ViT: exponent of multiplications"] >= QUADRATIC
    )
    return Result(
        claim=f"time and multiplications of Swin grow with the number of pixels to the power of "
        f"at most {LINEAR}, those of ViT of at least {QUADRATIC} and still rising",
        source="Liu et al. 2021, arXiv:2103.14030, section 3.2",
        holds=bool(holds),
        measured=measured,
    )


def draw_figure(config: Config, folder: Path, costs, measured, test_set) -> None:
    """Time and multiplications against the side of the image; scenes with the accuracies."""
    figure = plots.new_figure(width=15.0, height=4.5)
    *panels, last = figure.subplots(1, 3)
    units = {"seconds": ("forward pass, ms", 1e3), "multiplications": ("millions", 1e-6)}
    for axes, (key, (unit, scale)) in zip(panels, units.items(), strict=True):
        lines = {
            f"{name}, exponent {exponent(cost, key):.2f}": (
                list(config.sizes),
                [scale * value for value in cost[key]],
            )
            for name, cost in costs.items()
        }
        title = f"{key} for one image"
        plots.curve(axes, lines, "side in pixels", unit, logx=True, logy=True, title=title)
    shown = test_set["image"][: min(18, config.test_scenes) // 3 * 3]
    names = ", ".join(f"{name} {measured[f'{name}: accuracy']:.1%}" for name in MODELS)
    plots.image_grid(last, shown.reshape(3, -1, *shown.shape[1:]), title=f"accuracy: {names}")
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
