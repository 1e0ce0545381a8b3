"""Straight paths need few steps: rectified flow on handwritten digits.

Claim     A rectified flow trained on logit-normal timesteps gives better samples
          in few steps than one trained on uniform timesteps (Esser et al. 2024,
          "Scaling Rectified Flow Transformers", arXiv:2403.03206, table 1 and
          figure 3: rf/lognorm(0.00, 1.00) against rf).
Measured  Two equal DiTs are trained on the two densities; both draw pictures in
          1 to 16 Euler steps. The judges know nothing of either: a support vector
          machine trained on the real training pictures (does a sample show the
          class asked for?), the Frechet distance to held-out real pictures in a
          fixed space of principal components (over that of real training
          pictures), and the distance to the nearest training picture (over that
          of held-out real ones: copies would be nearer, blur farther).
Run       python experiments/rectified_flow_dit.py         (about 4 min on 2 CPU cores)
          python experiments/rectified_flow_dit.py --data PATH --image-size 32
          python experiments/rectified_flow_dit.py --help
"""

import dataclasses
import functools
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import create_model, data, metrics, plots, save_pretrained, training
from jaxmodels.ops import flow
from jaxmodels.training import processes
from jaxmodels.training.experiment import Result, run, trajectory_fields
from jaxmodels.training.logging import read_metrics

# Of the figure: classes, samples of each, and moments on the way from noise.
_ROWS, _COLUMNS, _MOMENTS = 10, 8, 9


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    data: str = "digits"
    """"digits", or a directory with one folder of JPEG or PNG pictures per class."""
    image_size: int = 32
    """Side that pictures from a directory are scaled to; digits are 8 x 8."""
    flip: bool = True
    """Mirror pictures from a directory at random."""
    strict: bool = False
    """Stop at a picture that cannot be read instead of skipping and counting it."""
    model: str = "dit_s_2"
    """Registered name; the four fields below replace its published size."""
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    patch_size: int = 2
    density: str = "logit_normal(0, 1)"
    """Of the training timesteps: uniform, logit_normal(mean, std), mode(scale) or cosmap."""
    baseline: str = "uniform"
    """The density to compare with."""
    steps: int = 500
    batch_size: int = 128
    accumulate: int = 1
    """Parts that each batch is taken in, one after the other, to save memory."""
    learning_rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    ema: float = 0.99
    label_dropout: float = 0.1
    precision: str = "float32"
    """float32, bfloat16, float16, or float8 (products of eight bits, the rest bfloat16)."""
    keep_float32: str | None = None
    """Parameters whose layers compute in float32 under every precision, by path, as "^final"."""
    guidance: float = 2.0
    """Scale of classifier-free guidance for the guided samples."""
    sampling_steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    num_samples: int = 720
    """Samples judged for every density and number of steps."""
    seed: int = 0
    mesh: str = ""
    """Devices, such as "data=8" or "data=2,fsdp=4"; by default all of them on data."""
    num_workers: int = 0
    """Processes that read pictures ahead."""
    checkpoint_every: int = 25
    log_every: int = 10
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/rectified_flow_dit/TIME is begun."""


def main(config: Config, folder: Path) -> Result:
    train_set, held_out = load_data(config)
    check(config, len(held_out))
    densities = {text: flow.parse_density(text) for text in (config.density, config.baseline)}
    model = build_model(config, train_set)
    params = {
        text: train(config, model, density, train_set, folder / name_of(text))
        for text, density in densities.items()
    }
    processes.first_goes_on()
    save_pretrained(model, {"params": params[config.density]}, folder / "model")

    judge = metrics.SampleJudge(*train_set.arrays(), *held_out.arrays(), seed=config.seed)
    labels = np.resize(held_out.labels, config.num_samples)
    draw = Sampler(model, labels, white=train_set.white, seed=config.seed)
    quality = {
        text: [judge(draw(params[text], n)[-1], labels) for n in config.sampling_steps]
        for text in densities
    }
    guided = draw(params[config.density], config.sampling_steps[-1], config.guidance)
    draw_figure(config, folder, train_set, guided, labels, quality)
    return conclude(config, judge.reference, quality, judge(guided[-1], labels))


def check(config: Config, num_held_out: int) -> None:
    """Refuses at once what would otherwise fail after minutes of training."""
    if config.num_samples < num_held_out:
        raise ValueError(
            f"num_samples={config.num_samples} is fewer than the {num_held_out} held-out pictures "
            "that samples are compared with; draw more"
        )
    if name_of(config.density) == name_of(config.baseline):
        raise ValueError(f"density and baseline are the same, {config.density}; choose two")


def load_data(config: Config) -> tuple[data.ImageDataset, data.ImageDataset]:
    """The pictures to learn from, and those held out to judge by."""
    if config.data == "digits":
        return data.digits("train"), data.digits("test")
    pictures = data.image_folder(
        config.data, image_size=config.image_size, strict=config.strict, flip=config.flip
    )
    return pictures.split(held_out=0.2, seed=0)


def build_model(config: Config, train_set: data.ImageDataset) -> nn.Module:
    rows, _, channels = train_set.image_shape
    return create_model(
        config.model,
        width=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        patch_size=config.patch_size,
        input_size=rows,
        in_channels=channels,
        out_channels=channels,
        num_classes=len(train_set.class_names),
        label_dropout=config.label_dropout,
        dtype=training.compute_dtype(config.precision),
    )


def train(
    config: Config,
    model: nn.Module,
    density: flow.TimestepDensity,
    train_set: data.ImageDataset,
    folder: Path,
) -> dict:
    """Trains on one density of timesteps; returns the moving average of the parameters."""

    def loss_fn(params, batch, key):
        noise_key, time_key, dropout_key = jax.random.split(key, 3)
        batch = train_set.finish(batch)
        x0, labels = batch["image"], batch["label"]
        noise = jax.random.normal(noise_key, x0.shape)
        t = flow.sample_timesteps(time_key, labels.shape, density, stratified=True)
        prediction = model.apply(
            {"params": params},
            flow.interpolate(x0, noise, t),
            1000 * t,
            labels,
            train=True,
            rngs={"dropout": dropout_key},
        )
        return flow.flow_matching_loss(prediction, flow.velocity(x0, noise)).mean(), {}

    optimizer = training.adamw(
        config.learning_rate,
        steps=config.steps,
        warmup=config.warmup,
        b2=0.99,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    mesh = training.make_mesh(config.mesh)
    example = {
        "x": jnp.zeros((1, *train_set.image_shape)),
        "timesteps": jnp.zeros(1),
        "labels": jnp.zeros(1, jnp.int32),
    }
    state = training.init_state(
        model,
        optimizer,
        jax.random.key(config.seed),
        example,
        mesh=mesh,
        ema=True,
        precision=config.precision,
    )
    step = training.make_step(
        loss_fn,
        optimizer,
        precision=config.precision,
        keep_float32=config.keep_float32,
        accumulate=config.accumulate,
        ema=config.ema,
    )
    state = training.fit(
        state,
        step,
        data.batches(
            train_set,
            **processes.share(config.batch_size),
            seed=config.seed,
            num_workers=config.num_workers,
            compact=True,
        ),
        steps=config.steps,
        directory=folder,
        config=trajectory_fields(config),
        mesh=mesh,
        checkpoint_every=config.checkpoint_every,
        log_every=config.log_every,
        description=folder.name,
    )
    return processes.to_host(state.ema)


class Sampler:
    """Draws one picture for each label, in the grey levels that real pictures have."""

    def __init__(self, model: nn.Module, labels: np.ndarray, *, white: int, seed: int):
        self._white = white
        shape = (len(labels), model.input_size, model.input_size, model.in_channels)

        @functools.partial(jax.jit, static_argnums=(1, 2))
        def trajectory(params, num_steps, guidance):
            def velocity(x, t, labels):
                return model.apply({"params": params}, x, 1000 * t, labels)

            noise = jax.random.normal(jax.random.key(seed), shape)
            guided = flow.guided_velocity(
                velocity, guidance, jnp.asarray(labels), model.num_classes
            )
            return flow.sample(guided, noise, num_steps=num_steps, return_trajectory=True)

        self._trajectory = trajectory

    def __call__(self, params: dict, num_steps: int, guidance: float = 1.0) -> np.ndarray:
        """The pictures on their way from noise, (num_steps + 1, N, Y, X, C) in [-1, 1]."""
        images = np.clip(self._trajectory(params, num_steps, guidance), -1, 1)
        half = self._white / 2
        return np.round((images + 1) * half).astype(np.float32) / half - 1


def conclude(
    config: Config,
    reference: dict[str, float],
    quality: dict[str, list[dict[str, float]]],
    guided: dict[str, float],
) -> Result:
    """The claim held against the numbers."""
    ours, baseline = quality[config.density], quality[config.baseline]
    measured = {f"real_{name}": value for name, value in reference.items()}
    for n, mine, other in zip(config.sampling_steps, ours, baseline, strict=True):
        for name in mine:
            measured[f"{name}_{n}_steps"] = mine[name]
            measured[f"baseline_{name}_{n}_steps"] = other[name]
    measured |= {
        f"guided_{name}_{config.sampling_steps[-1]}_steps": v for name, v in guided.items()
    }

    def mean_log_frechet(results):
        return float(np.mean([np.log(result["frechet_ratio"]) for result in results]))

    gain = np.exp(mean_log_frechet(baseline) - mean_log_frechet(ours))
    measured["baseline_frechet_over_ours"] = float(gain)
    return Result(
        claim=(
            f"{config.density} timesteps give better samples in at most "
            f"{config.sampling_steps[-1]} steps than {config.baseline} timesteps"
        ),
        source="Esser et al. 2024, arXiv:2403.03206, table 1 and figure 3",
        holds=bool(gain > 1),
        measured=measured,
    )


def draw_figure(
    config: Config,
    folder: Path,
    train_set: data.ImageDataset,
    guided: np.ndarray,
    labels: np.ndarray,
    quality: dict[str, list[dict[str, float]]],
) -> None:
    """Samples, how one comes about, how training went, and what the claim is about."""
    names = train_set.class_names[:_ROWS]
    chosen = np.stack([np.flatnonzero(labels == c)[:_COLUMNS] for c in range(len(names))])
    figure = plots.new_figure(width=12.0, height=7.0)
    axes = figure.subplot_mosaic(
        [["samples", "path", "path"], ["samples", "loss", "quality"]],
        width_ratios=[1.1, 1, 1],
        height_ratios=[1, 1.2],
    )
    plots.image_grid(
        axes["samples"], guided[-1, chosen], row_labels=names, title="guided samples by class"
    )
    shown = np.unique(np.linspace(0, len(guided) - 1, _MOMENTS).round().astype(int))
    plots.trajectory(
        axes["path"],
        guided[shown][:, chosen[:4, 0]],
        1 - shown / (len(guided) - 1),
        title="from noise to digit",
    )
    losses = {text: read_metrics(folder / name_of(text) / "metrics.jsonl") for text in quality}
    plots.curve(
        axes["loss"],
        {text: zip_columns(records, "step", "loss") for text, records in losses.items()},
        xlabel="training step",
        ylabel="flow-matching loss",
        title="each under its own timesteps",
    )
    plots.curve(
        axes["quality"],
        {
            text: (config.sampling_steps, [result["frechet_ratio"] for result in results])
            for text, results in quality.items()
        },
        xlabel="Euler steps",
        ylabel="Frechet distance / that of real digits",
        title="quality against number of steps",
        logx=True,
        logy=True,
    )
    plots.save_figure(figure, folder / "figure.png")


def name_of(density: str) -> str:
    """A folder name for a density: `logit_normal(0, 1)` becomes `logit_normal_0_1`."""
    return "_".join(re.findall(r"[\w.]+", density))


def zip_columns(records: list[dict[str, float]], *columns: str) -> tuple[list[float], ...]:
    return tuple([record[column] for record in records] for column in columns)


if __name__ == "__main__":
    run(main, Config)
