"""Which mixer learns text fastest: one small decoder with each of them.

Claim     Gates that depend on the data, and the delta rule, make linear attention
          a better language model at equal size (Yang et al. 2025, "Gated Delta
          Networks", arXiv:2412.06464, table 3: gated delta < Mamba-2 < RetNet in
          perplexity; Yang et al. 2024, arXiv:2312.06635, table 2: GLA < RetNet).
Measured  The same byte-level decoder is trained with every causal mixer on the
          standard library's source and manual, with equal numbers of parameters
          (the feed-forward makes up the difference), equal steps and equal
          batches; bits per byte on held-out files, against steps and against
          seconds of training (compilation not counted).
Run       python experiments/mixer_language_model.py          (about 10 min on 2 CPU cores)
          python experiments/mixer_language_model.py --mixers softmax gla --steps 500
          python experiments/mixer_language_model.py --help
"""

import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _language import mixer_decoder

from jaxmodels import create_mixer, data, list_mixers, plots, training
from jaxmodels.models.language.decoder import Decoder
from jaxmodels.training.experiment import Result, run, trajectory_fields
from jaxmodels.training.files import write_json

# Pairs of the claim: the first should need fewer bits than the second.
_CLAIMED = (("gated_delta", "retention"), ("gla", "retention"), ("gated_delta", "linear"))


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    mixers: tuple[str, ...] = ()
    """Names; by default all that are causal."""
    width: int = 128
    depth: int = 2
    num_heads: int = 4
    head_dim: int = 32
    length: int = 256
    """Bytes of a training sequence."""
    batch_size: int = 16
    steps: int = 120
    evaluate_every: int = 30
    held_out_windows: int = 64
    """Held-out sequences that bits per byte are measured on."""
    learning_rate: float = 4e-3
    warmup: int = 20
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    precision: str = "float32"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 30
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/mixer_language_model/TIME is begun."""


def main(config: Config, folder: Path) -> Result:
    texts = {part: data.python_text(part) for part in ("train", "test")}
    train_set, held_out = (data.ByteWindows(text, config.length) for text in texts.values())
    chosen = np.linspace(0, len(held_out) - 1, config.held_out_windows).astype(int)
    judged = held_out.batch(chosen, np.random.default_rng(0))
    names = config.mixers or causal_mixers()
    target = count_parameters(mixer_decoder(config, "softmax"))
    curves = {name: train(config, name, target, train_set, judged, folder) for name in names}
    draw_figure(folder, curves)
    return conclude(curves)


def causal_mixers() -> tuple[str, ...]:
    return tuple(name for name in list_mixers() if create_mixer(name).causal)


def count_parameters(model: Decoder) -> int:
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def equal_decoder(config: Config, name: str, target: int) -> Decoder:
    """The decoder whose feed-forward makes its parameters as many as `target`, or nearly."""
    narrow, wide = (count_parameters(mixer_decoder(config, name, mlp_width=f)) for f in (1, 2))
    mlp_width = 1 + round((target - narrow) / (wide - narrow))
    if mlp_width < 1:
        raise ValueError(
            f"mixer_language_model: {name} alone has more than the {target} parameters of softmax; "
            "lower num_heads or head_dim, or leave it out"
        )
    return mixer_decoder(config, name, mlp_width)


def train(config, name, target, train_set, judged, folder) -> dict[str, list[float]]:
    """Trains one decoder; returns bits per byte on held-out text by steps and by seconds."""
    model = equal_decoder(config, name, target)

    def loss_fn(params, batch, key):
        logits, _ = model.apply({"params": params}, batch["tokens"], train=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.mean(loss), {}

    optimizer = training.adamw(
        config.learning_rate,
        steps=config.steps,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    example = {"tokens": jnp.zeros((1, config.length), jnp.int32)}
    state = training.init_state(model, optimizer, jax.random.key(config.seed), example)
    step = training.make_step(loss_fn, optimizer, precision=config.precision)

    @jax.jit
    def held_out_bits(params):
        return loss_fn(params, judged, None)[0] / np.log(2)

    def batches():
        return data.batches(train_set, config.batch_size, seed=config.seed)

    # Compiles, on a copy, since a step overwrites its state.
    step(jax.tree.map(jnp.copy, state), next(batches()))
    points = folder / name / "curve.json"
    curve = json.loads(points.read_text()) if points.exists() else new_curve(model)
    stops = range(config.evaluate_every, config.steps, config.evaluate_every)
    for stop in (*stops, config.steps):
        start = time.perf_counter()
        state = training.fit(
            state,
            step,
            batches(),
            steps=stop,
            directory=folder / name,
            config=trajectory_fields(config),
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            description=name,
        )
        seconds = time.perf_counter() - start
        # A run that was interrupted passes by what it has done already.
        if stop > max(curve["step"], default=0):
            earlier = curve["seconds"][-1] if curve["seconds"] else 0.0
            curve["step"].append(stop)
            curve["seconds"].append(earlier + seconds)
            curve["bits"].append(float(held_out_bits(state.params)))
            write_json(points, curve)
    return curve


def new_curve(model: Decoder) -> dict:
    return {"parameters": count_parameters(model), "step": [], "seconds": [], "bits": []}


def conclude(curves: dict[str, dict[str, list[float]]]) -> Result:
    """The claim held against the numbers, as far as its mixers were trained."""
    measured = {}
    for name, curve in sorted(curves.items(), key=lambda item: item[1]["bits"][-1]):
        measured[f"{name}_bits_per_byte"] = curve["bits"][-1]
        measured[f"{name}_seconds"] = curve["seconds"][-1]
        measured[f"{name}_parameters"] = curve["parameters"]
    tested = [pair for pair in _CLAIMED if {*pair} <= {*curves}]
    return Result(
        claim="gla and gated_delta need fewer bits per byte than retention and linear attention",
        source="Yang et al. 2025, arXiv:2412.06464, table 3; 2024, arXiv:2312.06635, table 2",
        holds=bool(tested)
        and all(curves[a]["bits"][-1] < curves[b]["bits"][-1] for a, b in tested),
        measured=measured,
    )


def draw_figure(folder: Path, curves: dict[str, dict[str, list[float]]]) -> None:
    """Held-out bits per byte against steps and against seconds, a line a mixer."""
    figure = plots.new_figure(width=13.0, height=6.0)
    axes = figure.subplots(1, 2)
    for ax, key, label in zip(axes, ("step", "seconds"), ("step", "seconds"), strict=True):
        lines = {name: (curve[key], curve["bits"]) for name, curve in curves.items()}
        plots.curve(ax, lines, f"training, {label}", "bits per byte, held out")
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
