"""Does predicting several tokens at once make the next one better?

Claim     Models trained to predict n tokens with n parallel heads are better at the
          next one too, above all on bytes (Gloeckle et al. 2024, "Better & Faster
          Large Language Models via Multi-token Prediction", arXiv:2404.19737, tables
          1 and 2); their figure 3 shows the opposite for small models.
Measured  Held-out bits per byte of the first head alone, of one decoder trained on
          bytes of the standard library: for the next token; for n, with the same
          trunk and so the same model in use, after equal steps and after equal time;
          and for n with as many blocks in all. Then the memory that gradients take,
          with heads in turn as here, and with all at once.
Run       python experiments/multi_token_prediction.py        (about 8 min on 2 CPU cores)
          python experiments/multi_token_prediction.py --help
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from _language import bits_per_byte, text_sets, train_language_model

from jaxmodels import ops, plots, training
from jaxmodels.models.language.decoder import Decoder
from jaxmodels.models.language.multi_token import MultiToken, targets_ahead
from jaxmodels.training.experiment import Result, run

NEXT, STEPS, TIME, SIZE = "next token", "equal steps", "equal time", "equal size"


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    data: Path | None = None
    """A text, a .jsonl or .parquet file, or a folder of them; by default the source and
    the manual of Python's standard library."""
    heads: int = 4
    """Tokens predicted at once, n."""
    width: int = 128
    depth: int = 5
    """Blocks, at least n + 1."""
    num_heads: int = 4
    head_dim: int = 32
    length: int = 256
    """Bytes of a training sequence."""
    batch_size: int = 8
    steps: int = 400
    learning_rate: float = 3e-3
    warmup: int = 40
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    precision: str = "float32"
    held_out_windows: int = 256
    """Held-out sequences that bits per byte are measured on."""
    seed: int = 0
    checkpoint_every: int = 100
    log_every: int = 10
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/multi_token_prediction/TIME is begun."""


def main(config: Config, folder: Path) -> Result:
    if not 2 <= config.heads < config.depth:
        raise ValueError(
            f"heads={config.heads} must be at least 2 and below depth={config.depth}, so that a "
            f"trunk of two blocks is left where sizes are equal"
        )
    train_set, held_out = text_sets(config.data, config.length)
    bits, seconds, steps = {}, {}, {}

    def measure(name: str, model: MultiToken, number: int = config.steps) -> None:
        schedule = dataclasses.replace(config, steps=number)
        place = folder / name.replace(" ", "_")
        variables, seconds[name] = train_language_model(schedule, model, train_set, place)
        judged = {"count": config.held_out_windows}
        bits[name], steps[name] = bits_per_byte(model, variables, held_out, **judged), number

    measure(NEXT, decoder(config, heads=1, depth=config.depth))
    measure(STEPS, decoder(config, heads=config.heads, depth=config.depth))
    measure(SIZE, decoder(config, heads=config.heads, depth=config.depth - config.heads + 1))
    fewer = max(1, min(config.steps, round(config.steps * seconds[NEXT] / seconds[STEPS])))
    measure(TIME, decoder(config, heads=config.heads, depth=config.depth), fewer)
    draw_figure(folder, bits, seconds)
    return conclude(config, bits, seconds, steps, gradient_megabytes(config))


def decoder(config: Config, *, heads: int, depth: int) -> MultiToken:
    """A trunk of some depth, its last block the first of the heads."""
    trunk = Decoder(
        width=config.width,
        depth=depth,
        mixer_options={"num_heads": config.num_heads, "head_dim": config.head_dim},
        dtype=training.compute_dtype(config.precision),
    )
    return MultiToken(trunk, heads=heads)


def gradient_megabytes(config: Config) -> dict[str, float]:
    """Temporary memory of loss and gradients: for the next token, and for n in both ways."""
    several = decoder(config, heads=config.heads, depth=config.depth)

    def at_once(params, batch, key):
        """What the loss of `MultiToken` is, written down plainly."""
        model = several.clone(drafting=True)
        hidden, _ = model.apply({"params": params}, batch["tokens"], method="hidden")
        kernel = model.output_kernel(params)
        losses = [
            ops.chunked_cross_entropy(part, kernel, *targets_ahead(batch, number))[0]
            for number, part in enumerate(jnp.split(hidden, config.heads, axis=-1))
        ]
        return sum(losses), {}

    alone = decoder(config, heads=1, depth=config.depth)
    losses = {
        NEXT: (alone, alone.loss),
        "heads in turn": (several, several.loss),
        "heads at once": (several, at_once),
    }
    return {name: megabytes(config, *pair) for name, pair in losses.items()}


def megabytes(config: Config, model: MultiToken, loss) -> float:
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.length), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(model.init, key, tokens)["params"]
    gradients = jax.jit(jax.value_and_grad(lambda *args: loss(*args)[0]))
    batch = {"tokens": tokens, "targets": tokens}
    compiled = gradients.lower(params, batch, key).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def conclude(config: Config, bits, seconds, steps, memory: dict[str, float]) -> Result:
    """The claim held against the numbers."""
    return Result(
        claim=f"trained for {config.heads} tokens, the same model needs fewer bits for the next "
        "one after equal steps",
        source="Gloeckle et al. 2024, arXiv:2404.19737, tables 1 and 2; against it figure 3",
        holds=bits[STEPS] < bits[NEXT],
        measured={
            **{f"bits per byte, {name}": value for name, value in bits.items()},
            **{f"seconds of training, {name}": value for name, value in seconds.items()},
            **{f"steps, {name}": value for name, value in steps.items()},
            **{f"MB for gradients, {name}": value for name, value in memory.items()},
        },
    )


def draw_figure(folder: Path, bits: dict[str, float], seconds: dict[str, float]) -> None:
    """What a byte of unseen text costs after how much training."""
    figure = plots.new_figure(width=7.0, height=5.0)
    points = {name: ([seconds[name]], [bits[name]]) for name in bits}
    plots.curve(figure.subplots(), points, "seconds of training", "bits a byte, held out")
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
