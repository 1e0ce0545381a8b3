"""What does a memory hold? Multi-query associative recall against the size of the state.

Claim     Layers with a memory of fixed size recall fewer of the pairs they have read
          the smaller the memory, while attention need not forget (Arora et al. 2023,
          "Zoology", arXiv:2312.04927, section 3). Where a key gets a new value, a
          memory that only adds fails, whatever its size, since it holds both values;
          the delta rule, which replaces what it holds for a key, recalls the new one
          (Schlag et al. 2021, "Linear Transformers Are Secretly Fast Weight
          Programmers", arXiv:2102.11174, section 6.1, setting 2).
Measured  One block of each mixer is trained on fresh sequences to name the value that
          a key was given last. Accuracy on new sequences against the floats of
          memory, K x V in every head, apart for keys written once and keys written
          again. Every token is embedded with the one before it, so that all mixers
          see a key together with its value: otherwise those would win that have a
          convolution inside. Gated linear attention adds too, but may fade old
          values; it is shown and not part of the claim. All are trained equally long,
          after which the gated ones are still learning where the memory is small.
Run       python experiments/associative_recall.py           (about 5 min on 2 CPU cores)
          python experiments/associative_recall.py --help
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels import create_mixer, data, plots, training
from jaxmodels.layers.linear import Linear
from jaxmodels.layers.mlp import GatedMlp
from jaxmodels.models.language.language_model import DecoderBlock
from jaxmodels.training.experiment import Result, run, trajectory_fields

# Memories that only add, add and fade, and replace; and what keeps every token.
ADDITIVE, FADING, DELTA, REFERENCE = "linear", "gla", ("delta", "gated_delta"), "softmax"
MEMORIES = (ADDITIVE, FADING, *DELTA)
KINDS = ("once", "again")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    num_writes: int = 12
    """Pairs of key and value at the beginning of a sequence."""
    num_live: int = 6
    """Different keys in a sequence, at most; less than the writes, so that some are rewritten."""
    num_questions: int = 12
    """Keys, chosen among those written, that follow the pairs."""
    num_keys: int = 32
    num_values: int = 16
    head_dims: tuple[int, ...] = (4, 8, 16)
    """Widths of keys and values in a head, which the size of the memory follows from."""
    num_heads: int = 2
    width: int = 64
    steps: int = 800
    batch_size: int = 64
    learning_rate: float = 1e-2
    warmup: int = 50
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    num_tests: int = 1024
    """New sequences that accuracy is measured on."""
    seed: int = 0
    checkpoint_every: int = 400
    log_every: int = 10
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/associative_recall/TIME is begun."""


def main(config: Config, folder: Path) -> Result:
    check(config)
    recall = {}
    for name in MEMORIES:
        for head_dim in config.head_dims:
            recall[name, head_dim] = train_and_test(config, name, head_dim, folder)
    widest = max(config.head_dims)
    recall[REFERENCE, widest] = train_and_test(config, REFERENCE, widest, folder)
    draw_figure(config, folder, recall)
    return conclude(config, recall)


def check(config: Config) -> None:
    """Refuses a task that cannot be set."""
    if not 1 <= config.num_live < config.num_writes:
        raise ValueError(
            f"num_live={config.num_live} must be at least 1 and below "
            f"num_writes={config.num_writes}, or no key is certain to be rewritten"
        )
    if config.num_keys < config.num_live:
        raise ValueError(f"num_keys={config.num_keys} must be at least num_live={config.num_live}")
    for name in ("num_questions", "num_values", "num_heads", "num_tests"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if not config.head_dims or any(dim < 2 or dim % 2 for dim in config.head_dims):
        raise ValueError(f"head_dims={config.head_dims}: give at least one, all even and above 0")


@dataclasses.dataclass(frozen=True)
class Recall:
    """Fresh sequences without end; a data set for `data.batches`.

    Tokens below `num_keys` are keys, those from there on are values.
    """

    config: Config

    def __len__(self) -> int:
        return 1_000_000

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`tokens` (B, T); of the questions (B, Q) the `answers` and whether `rewritten`."""
        c, size = self.config, len(indices)
        live = np.argsort(rng.random((size, c.num_keys)), axis=1)[:, : c.num_live]
        chosen = rng.integers(c.num_live, size=(size, c.num_writes))
        values = rng.integers(c.num_values, size=(size, c.num_writes))
        # Asking for a write chosen at random asks only for keys that were written.
        asked = rng.integers(c.num_writes, size=(size, c.num_questions))
        asked = np.take_along_axis(chosen, asked, axis=1)
        written = asked[:, :, None] == chosen[:, None, :]
        last = c.num_writes - 1 - np.argmax(written[:, :, ::-1], axis=2)

        keys = np.take_along_axis(live, chosen, axis=1)
        pairs = np.stack([keys, c.num_keys + values], axis=2).reshape(size, -1)
        questions = np.take_along_axis(live, asked, axis=1)
        return {
            "tokens": np.concatenate([pairs, questions], axis=1).astype(np.int32),
            "answers": np.take_along_axis(values, last, axis=1).astype(np.int32),
            "rewritten": written.sum(axis=2) > 1,
        }


class Recaller(nn.Module):
    """Embedding of each token and the one before, one block, a guess after every question.

    Attributes:
      config: sizes.
      mixer: name of the block's mixer.
      options: the mixer's fields.
    """

    config: Config
    mixer: str
    options: Mapping[str, Any]

    @nn.compact
    def __call__(self, tokens):
        c = self.config
        unit = nn.initializers.normal(1.0)
        x = nn.Embed(c.num_keys + c.num_values, c.width, embedding_init=unit)(tokens)
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        x = x + Linear(c.width, use_bias=False)(before)
        mixer = create_mixer(self.mixer, **self.options)
        x, _ = DecoderBlock(mixer, GatedMlp(2 * c.width, parent=None))(x)
        x = nn.RMSNorm()(x[:, -c.num_questions :])
        return Linear(c.num_values)(x)


def build(config: Config, name: str, head_dim: int) -> Recaller:
    options = {"num_heads": config.num_heads, "head_dim": head_dim}
    if name != REFERENCE:
        options["chunk_size"] = 16  # sequences are short
    if name == FADING:
        options["value_expansion"] = 1  # the size of memory that the others have
    return Recaller(config, name, options)


def memory_size(config: Config, head_dim: int) -> int:
    return config.num_heads * head_dim**2


def train_and_test(config: Config, name: str, head_dim: int, folder: Path) -> dict[str, float]:
    """Accuracy on keys written once, and on keys written again."""
    model = build(config, name, head_dim)

    def loss_fn(params, batch, key):
        logits = model.apply({"params": params}, batch["tokens"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["answers"])
        return jnp.mean(losses), {}

    optimizer = training.adamw(
        config.learning_rate,
        steps=config.steps,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    length = 2 * config.num_writes + config.num_questions
    example = {"tokens": jnp.zeros((1, length), jnp.int32)}
    state = training.fit(
        training.init_state(model, optimizer, jax.random.key(config.seed), example),
        training.make_step(loss_fn, optimizer),
        data.batches(Recall(config), config.batch_size, seed=config.seed),
        steps=config.steps,
        directory=folder / f"{name}_{head_dim}",
        config=trajectory_fields(config),
        checkpoint_every=config.checkpoint_every,
        log_every=config.log_every,
        description=f"{name} {head_dim}",
    )
    # Training draws from streams of (seed, batch); this is another.
    tests = Recall(config).batch(np.arange(config.num_tests), np.random.default_rng(config.seed))
    logits = jax.jit(model.apply)({"params": state.params}, tests["tokens"])
    right = np.argmax(logits, axis=-1) == tests["answers"]
    again = tests["rewritten"]
    return {kind: float(np.mean(right[again == (kind == "again")])) for kind in KINDS}


def conclude(config: Config, recall: dict[tuple[str, int], dict[str, float]]) -> Result:
    """The claim held against the numbers of the largest memory."""
    measured = {"chance": 1 / config.num_values}
    for (name, head_dim), shares in recall.items():
        size = "all" if name == REFERENCE else memory_size(config, head_dim)
        for kind, share in shares.items():
            measured[f"{name}_{size}_floats_{kind}"] = share
    widest = max(config.head_dims)
    delta = min(recall[name, widest]["again"] for name in DELTA)
    additive = max(recall[ADDITIVE, head_dim]["again"] for head_dim in config.head_dims)
    measured["worse_delta_rule_again"], measured["best_additive_again"] = delta, additive
    return Result(
        claim="delta rules recall the new value of a key where a memory that only adds fails",
        source="Schlag et al. 2021, arXiv:2102.11174, section 6.1; "
        "Arora et al. 2023, arXiv:2312.04927, section 3",
        holds=bool(delta > 0.9 and additive < 0.6),
        measured=measured,
    )


def draw_figure(
    config: Config, folder: Path, recall: dict[tuple[str, int], dict[str, float]]
) -> None:
    """Recall against memory, for keys written once and keys written again."""
    sizes = [memory_size(config, head_dim) for head_dim in config.head_dims]
    attention = recall[REFERENCE, max(config.head_dims)]
    figure = plots.new_figure(width=11.0, height=4.5)
    titles = ("keys written once", "keys written again: the last value counts")
    for axes, kind, title in zip(figure.subplots(1, 2), KINDS, titles, strict=True):
        lines = {
            name: (sizes, [recall[name, head_dim][kind] for head_dim in config.head_dims])
            for name in MEMORIES
        }
        lines[f"{REFERENCE} (keeps all tokens)"] = (sizes, [attention[kind]] * len(sizes))
        plots.curve(axes, lines, "floats of memory", "recalled", logx=True, title=title)
        axes.set_ylim(0, 1.03)
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
