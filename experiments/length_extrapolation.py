"""Train short, test long: what each scheme of positions does beyond its trained length.

Claim     A model with plain rotary positions fails beyond its trained length;
          NTK-aware scaling (bloc97 2023; Peng et al. 2023, "YaRN",
          arXiv:2309.00071, section 3) and ReRoPE (Su 2023, kexue.fm/archives/9708)
          carry on without training; a window does as well in loss, but only
          because text seldom needs what the window cuts off.
Measured  A byte-level decoder is trained on the standard library's source and
          manual at 256 bytes, and read up to 4,096 by every method that needs no
          training; others are trained for themselves, equally long, among them vectors
          that are added to the tokens' (sinusoidal, learned). Loss by
          position on held-out text, and a recall probe: one of 16 notes of a
          colour stands in the text and is asked for by its colour much later.
Run       python experiments/length_extrapolation.py          (about 18 min on 2 CPU cores)
          python experiments/length_extrapolation.py --trained hwfa alibi
          python experiments/length_extrapolation.py --help
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels import data, plots, training
from jaxmodels.layers import position_biases as biases
from jaxmodels.layers import rotary_scaling as scaling
from jaxmodels.layers.positions import NoPositions, ReRope, Rotary, XPos, hybrid_window_full
from jaxmodels.models.language.decoder import Decoder
from jaxmodels.training.experiment import Result, run, trajectory_fields

# A byte from 128 on is a note: one of _NOTES of each of _COLOURS. Bytes 1 to
# _COLOURS ask for the note of their colour. The text itself has neither.
_COLOURS, _NOTES, _FIRST_NOTE = 8, 16, 128
# NTK-aware scaling wants a larger factor than the length grows by (Peng et al. 2023,
# section 3.1), since all pairs but the slowest are stretched by less.
_NTK_MARGIN = 4.0
# Positions over which loss is averaged.
_BUCKET = 64
# Those that the claim is about, and others that take a trained rotary model.
_CLAIMED = ("rope", "window", "ntk", "rerope")
_OTHERS = ("dynamic_ntk", "yarn", "leaky_rerope", "log_n", "interpolation")
_ADDED = ("sinusoidal", "learned")
_OWN_TRAINING = ("hwfa", "alibi", "kerple", "sandwich", "xpos", "nope", *_ADDED)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    methods: tuple[str, ...] = _OTHERS
    """What the rotary model is read with, beside rope, window, ntk and rerope."""
    trained: tuple[str, ...] = _OWN_TRAINING
    """Schemes that are trained for themselves."""
    width: int = 128
    depth: int = 3
    num_heads: int = 4
    head_dim: int = 32
    length: int = 256
    """Bytes of a training sequence."""
    lengths: tuple[int, ...] = (256, 1024, 4096)
    """At which every method is tested; the scaling of rotary positions knows them."""
    held_out_bytes: int = 65_536
    """Text that every test reads, cut into sequences of its length."""
    batch_size: int = 16
    steps: int = 400
    answer_weight: float = 4.0
    """Weight of a recalled note in the training loss; a byte of text has one."""
    learning_rate: float = 4e-3
    warmup: int = 50
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    precision: str = "float32"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 100
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/length_extrapolation/TIME is begun."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How one method read sequences of one length.

    Attributes:
      bits: per byte of text, for each `_BUCKET` positions.
      recall: share of notes recalled, by how many bytes ago they stood.
    """

    bits: np.ndarray
    recall: dict[int, float]


def main(config: Config, folder: Path) -> Result:
    check(config)
    params = {name: train(config, name, folder / name) for name in ("rope", *config.trained)}
    readings = {}
    for name in (*_CLAIMED, *config.methods, *config.trained):
        learned = params.get(name, params["rope"])
        readings[name] = [read(config, name, learned, length) for length in config.lengths]
        bits = "  ".join(f"{reading.bits.mean():.2f}" for reading in readings[name])
        print(f"{name:<14} bits per byte at {config.lengths}: {bits}", flush=True)
    draw_figure(config, folder, readings)
    return conclude(config, readings)


def check(config: Config) -> None:
    """Refuses at once what would otherwise fail after minutes of training."""
    for field, known in (("methods", _OTHERS), ("trained", _OWN_TRAINING)):
        if unknown := {*getattr(config, field)} - {*known}:
            raise ValueError(f"{field}={sorted(unknown)} is unknown; choose from {known}")
    if config.length < 4 * _BUCKET or any(n % _BUCKET for n in (config.length, *config.lengths)):
        raise ValueError(
            f"length={config.length} must be at least {4 * _BUCKET}, and it and "
            f"lengths={config.lengths} multiples of {_BUCKET}"
        )
    if min(config.lengths) < config.length or list(config.lengths) != sorted(config.lengths):
        raise ValueError(
            f"lengths={config.lengths} must rise and be at least the trained length={config.length}"
        )


def layers(config: Config, name: str, length: int) -> list[dict]:
    """`position` and `window` of every layer's mixer, for reading `length` bytes."""
    trained, factor = config.length, length / config.length
    half = trained // 2
    leak = (length - half) / (trained - half)
    if name == "hwfa":
        # All windows together reach three quarters of the trained length.
        window = max(1, 3 * trained // (4 * (config.depth - 1)))
        return list(hybrid_window_full(config.depth, window=window, train_length=trained))
    position = {
        "rope": Rotary(),
        "window": Rotary(),
        "log_n": Rotary(train_length=trained),
        "interpolation": Rotary(scaling=scaling.Interpolation(factor)),
        "ntk": Rotary(scaling=scaling.NtkAware(factor if factor == 1 else _NTK_MARGIN * factor)),
        "dynamic_ntk": Rotary(scaling=scaling.DynamicNtk(trained, 2.0)),
        "yarn": Rotary(scaling=scaling.Yarn(factor, trained)),
        "rerope": ReRope(half, rotary=Rotary(train_length=trained)),
        "leaky_rerope": ReRope(half, leak, Rotary(train_length=trained)),
        "alibi": biases.Alibi(),
        "kerple": biases.Kerple(),
        "sandwich": biases.Sandwich(),
        "xpos": XPos(),
        "nope": NoPositions(),
        **dict.fromkeys(_ADDED, NoPositions()),
    }[name]
    window = trained - 1 if name == "window" else None
    return [{"position": position, "window": window}] * config.depth


def decoder(config: Config, name: str, length: int) -> Decoder:
    heads = {"num_heads": config.num_heads, "head_dim": config.head_dim}
    return Decoder(
        width=config.width,
        depth=config.depth,
        mixer_options=[{**heads, **layer} for layer in layers(config, name, length)],
        position_embedding=name if name in _ADDED else None,
        # Learned places beyond the trained length stay as they were drawn.
        context=max(config.lengths) if name == "learned" else None,
        dtype=training.compute_dtype(config.precision),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class NotedText:
    """Windows of a text with notes, and with questions for them; a data set for `batches`.

    Attributes:
      windows: of the text.
      gaps: bytes from a note to its question, for the colours in turn; None is a
        note anywhere and two questions anywhere after it.
    """

    windows: data.ByteWindows
    gaps: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        plain = self.windows.batch(indices, rng)
        text = np.concatenate([plain["tokens"], plain["targets"][:, -1:]], axis=1)
        text[~is_text(text)] = ord("?")
        for row in text:
            self._take_notes(row, rng)
        return {"tokens": text[:, :-1], "targets": text[:, 1:]}

    def _take_notes(self, row: np.ndarray, rng: np.random.Generator) -> None:
        """Writes notes, questions and answers into a text; all begin at even places."""
        pairs = len(row) // 2
        if self.gaps is None:
            places = 2 * rng.permutation(pairs)[: 3 * _COLOURS].reshape(_COLOURS, 3)
        else:
            asked = 2 * (pairs - 1 - rng.permutation(_COLOURS))
            places = np.stack([asked - np.resize(self.gaps, _COLOURS), asked], axis=1)
        for colour, (noted, *asked) in enumerate(np.sort(places, axis=1)):
            note = _FIRST_NOTE + _NOTES * colour + rng.integers(_NOTES)
            row[noted] = note
            for place in asked:
                row[place : place + 2] = 1 + colour, note


def is_text(tokens):
    """Neither a note nor a question."""
    return (tokens < _FIRST_NOTE) & ~is_question(tokens)


def is_question(tokens):
    return (tokens >= 1) & (tokens <= _COLOURS)


def train(config: Config, name: str, folder: Path) -> dict:
    """Trains a model with its own positions; returns its parameters."""
    model = decoder(config, name, config.length)

    def loss_fn(params, batch, key):
        logits, _ = model.apply({"params": params}, batch["tokens"], train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        weights = jnp.where(is_question(batch["tokens"]), config.answer_weight, 1.0)
        return jnp.mean(weights * losses), {}

    optimizer = training.adamw(
        config.learning_rate,
        steps=config.steps,
        warmup=config.warmup,
        b2=0.99,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    example = {"tokens": jnp.zeros((1, config.length), jnp.int32)}
    state = training.init_state(model, optimizer, jax.random.key(config.seed), example)
    train_set = NotedText(data.ByteWindows(data.python_text("train"), config.length))
    state = training.fit(
        state,
        training.make_step(loss_fn, optimizer, precision=config.precision),
        data.batches(train_set, config.batch_size, seed=config.seed),
        steps=config.steps,
        directory=folder,
        config=trajectory_fields(config),
        checkpoint_every=config.checkpoint_every,
        log_every=config.log_every,
        description=name,
    )
    return state.params


def read(config: Config, name: str, params: dict, length: int) -> Reading:
    """Reads held-out sequences, some at a time, with notes at known distances."""
    windows = data.ByteWindows(data.python_text("test"), length)
    # Within training, a quarter and half of the context, and nearly all of it.
    furthest = length - 4 * _COLOURS
    gaps = (config.length // 4, length // 4, length // 2, furthest)
    chosen = np.linspace(0, len(windows) - 1, max(1, config.held_out_bytes // length)).astype(int)
    batch = NotedText(windows, gaps).batch(chosen, np.random.default_rng(config.seed))
    model = decoder(config, name, length)

    @jax.jit
    def read_all(params, batch):
        def one(sequence):
            logits, _ = model.apply({"params": params}, sequence["tokens"][None])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits[0], sequence["targets"])
            return losses, jnp.argmax(logits[0], axis=-1) == sequence["targets"]

        some = max(1, config.batch_size * config.length // length)
        return jax.lax.map(one, batch, batch_size=some)

    losses, right = jax.tree.map(np.asarray, read_all(params, batch))
    plain = is_text(batch["targets"]).reshape(len(chosen), -1, _BUCKET)
    sums = np.sum(losses.reshape(plain.shape) * plain, axis=(0, 2))
    bits = sums / np.log(2) / np.sum(plain, axis=(0, 2))
    asked = is_question(batch["tokens"])
    colours = batch["tokens"][asked] - 1
    distance = np.resize(gaps, _COLOURS)[colours]
    recall = {int(gap): float(np.mean(right[asked][distance == gap])) for gap in np.unique(gaps)}
    return Reading(bits, recall)


def conclude(config: Config, readings: dict[str, list[Reading]]) -> Result:
    """The claim held against the numbers at the greatest length.

    The window's loss is the measure of the others': it reads the same bytes, and
    nothing in what it sees is longer than in training.
    """
    known = config.length // _BUCKET
    longest = {name: lengths[-1] for name, lengths in readings.items()}
    bits = {name: float(np.mean(reading.bits[known:])) for name, reading in longest.items()}
    recall = {
        name: float(np.mean([share for gap, share in r.recall.items() if gap >= config.length]))
        for name, r in longest.items()
    }
    lost = {name: value - bits["window"] for name, value in bits.items()}
    measured = {}
    for name, reading in longest.items():
        measured[f"{name}_bits_beyond"] = bits[name]
        measured[f"{name}_recall_within"] = reading.recall[config.length // 4]
        measured[f"{name}_recall_beyond"] = recall[name]
    return Result(
        claim=(
            f"at {config.lengths[-1] // config.length} times the trained length, plain rotary "
            "positions lose over half a bit a byte, NTK-aware ones less than half of that and "
            "ReRoPE less than a tenth, and both recall what a window has cut off"
        ),
        source="Peng et al. 2023, arXiv:2309.00071, section 3; Su 2023, kexue.fm/archives/9708",
        holds=bool(
            lost["rope"] > 0.5
            and lost["ntk"] < lost["rope"] / 2
            and lost["rerope"] < lost["rope"] / 10
            and recall["window"] < 2 / _NOTES
            and min(recall["ntk"], recall["rerope"]) > 8 / _NOTES
        ),
        measured=measured,
    )


def draw_figure(config: Config, folder: Path, readings: dict[str, list[Reading]]) -> None:
    """Loss by position, loss by length, and recall by distance."""
    figure = plots.new_figure(width=15.0, height=6.0)
    by_position, by_length, by_distance = figure.subplots(1, 3)
    longest = {name: reading[-1] for name, reading in readings.items()}
    # Ranges that double, so that all of them are wide on a logarithmic axis.
    count = config.lengths[-1] // _BUCKET
    starts = np.r_[0, 2 ** np.arange(np.ceil(np.log2(count)))].astype(int)
    ends = np.r_[starts[1:], count]
    plots.curve(
        by_position,
        {
            name: (_BUCKET * ends, np.add.reduceat(reading.bits, starts) / (ends - starts))
            for name, reading in longest.items()
        },
        f"up to this position of {config.lengths[-1]}, trained on {config.length}",
        "bits per byte, held out",
        logx=True,
    )
    plots.curve(
        by_length,
        {
            name: (config.lengths, [np.mean(reading.bits) for reading in all_lengths])
            for name, all_lengths in readings.items()
        },
        "length of the sequence",
        "bits per byte, held out",
        logx=True,
    )
    plots.curve(
        by_distance,
        {
            name: (list(reading.recall), list(reading.recall.values()))
            for name, reading in longest.items()
        },
        "bytes since the note",
        "share of notes recalled",
        logx=True,
    )
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
