"""Language models on real text: read, trained and judged alike for several scripts."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import create_mixer, data, ops, training
from jaxmodels.models.language.decoder import Decoder
from jaxmodels.models.language.language_model import LanguageModel
from jaxmodels.registry import module_fields
from jaxmodels.training import processes
from jaxmodels.training.experiment import trajectory_fields
from jaxmodels.training.files import write_json
from jaxmodels.training.planner import device_memory

# Of a single text without files to tell apart, the last eighth is held out.
_HELD_OUT = 1 / 8


class Schedule(Protocol):
    """The fields of a script's configuration that training goes by."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int
    weight_decay: float
    clip_norm: float
    precision: str
    seed: int
    checkpoint_every: int
    log_every: int


class Sizes(Protocol):
    """The fields of a script's configuration that say how large a decoder is."""

    width: int
    depth: int
    num_heads: int
    head_dim: int
    precision: str


def mixer_decoder(config: Sizes, name: str, mlp_width: int | None = None) -> Decoder:
    """A byte-level decoder with any mixer, whose heads are as wide as they can be alike.

    Args:
      config: the sizes.
      name: of the mixer.
      mlp_width: of the feed-forwards; None is the decoder's own rule.
    """
    fields = module_fields(create_mixer(name))
    if "num_heads" in fields:
        sizes = {"num_heads": config.num_heads, "head_dim": config.head_dim}
    else:
        # One head as wide as all, and values of twice the width, as FLASH has them.
        sizes = {"head_dim": config.num_heads * config.head_dim, "value_dim": 2 * config.width}
    return Decoder(
        width=config.width,
        depth=config.depth,
        mlp_width=mlp_width,
        mixer=name,
        mixer_options={field: value for field, value in sizes.items() if field in fields},
        dtype=training.compute_dtype(config.precision),
    )


def text_sets(
    source: Path | None, length: int, tokenizer: data.Tokenizer | None = None
) -> tuple[data.Dataset, data.Dataset]:
    """Sequences to learn from and to be judged by, from different files.

    Args:
      source: a text, a `.jsonl` or `.parquet` file, or a folder of them; None is the
        source and the manual of Python's standard library.
      length: T, of a sequence.
      tokenizer: None takes windows of bytes, each a token; otherwise documents are
        tokenized and packed.

    Returns:
      Two data sets for `data.batches`; the packed ones have segment ids, positions
      and weights as well.
    """
    parts = ("train", "test")
    if tokenizer is not None:
        documents = (data.tokenize(_texts(source, part), tokenizer) for part in parts)
        first, second = (data.pack_documents(each, length) for each in documents)
    else:
        first, second = (data.ByteWindows(_bytes(source, part), length) for part in parts)
    return first, second


def _texts(source: Path | None, part: str) -> list[str]:
    if source is None:
        return data.python_text(part).tobytes().decode(errors="replace").split("\0")
    if source.is_file() and source.suffix not in (".jsonl", ".parquet"):
        (text,) = data.read_documents(source)
        border = round(len(text) * (1 - _HELD_OUT))
        return [text[:border] if part == "train" else text[border:]]
    return list(data.read_documents(source, split=part))


def _bytes(source: Path | None, part: str) -> np.ndarray:
    if source is None:
        return data.python_text(part)
    return data.tokenize(_texts(source, part), data.ByteTokenizer()).tokens.astype(np.uint8)


def train_language_model(
    config: Schedule,
    model: LanguageModel,
    train_set: data.Dataset,
    folder: Path,
    *,
    loss: Callable | None = None,
    start: Mapping[str, Any] | None = None,
    mesh: str = "",
) -> tuple[dict[str, Any], float]:
    """Trains with AdamW, or goes on where `folder` stands; all processes together.

    Args:
      config: the schedule, and whatever else determines the result.
      model: any language model.
      train_set: has "tokens" and "targets", as those of `text_sets`.
      folder: gets metrics, checkpoints and `cost.json`.
      loss: in place of `model.loss`.
      start: variables to begin with, in place of random ones.
      mesh: as of `training.make_mesh`; "" is one device, or all of several processes.

    Raises:
      ValueError: no steps, or a step that would not fit into a device's memory, told
        before anything is compiled.

    Returns:
      The variables, whole and on the host if there is a mesh, and how long their
      training took in seconds, compilation left out.
    """
    if config.steps < 1:
        raise ValueError(f"steps={config.steps} must be at least 1")
    optimizer = training.adamw(
        config.learning_rate,
        steps=config.steps,
        warmup=min(config.warmup, config.steps - 1),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        b2=0.95,
    )
    step = training.make_step(loss or model.loss, optimizer, precision=config.precision)

    def batches():
        return data.batches(train_set, **processes.share(config.batch_size), seed=config.seed)

    devices = training.make_mesh(mesh) if mesh or jax.process_count() > 1 else None
    first = next(batches())
    example = {"tokens": jax.ShapeDtypeStruct((1, first["tokens"].shape[1]), jnp.int32)}
    placement = {"mesh": devices, "precision": config.precision}
    whole = {
        name: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype)
        for name, x in first.items()
    }
    planned = training.plan(
        model, lambda model: loss or model.loss, optimizer, example, whole, **placement
    )
    planned.require_room(device_memory())
    state = training.init_state(model, optimizer, jax.random.key(config.seed), example, **placement)
    if start is not None:
        state = training.start_from(state, start)
    # Compiles, so that the clock sees training alone.
    placed = first if devices is None else training.shard_batch(first, devices)
    step(jax.tree.map(jnp.copy, state), placed)
    with _Clock(folder) as clock:
        state = training.fit(
            state,
            step,
            batches(),
            steps=config.steps,
            directory=folder,
            config=trajectory_fields(config),
            mesh=devices,
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            description=folder.name,
        )
    variables = {"params": state.params, **state.model_state}
    return variables if devices is None else processes.to_host(variables), clock.seconds


class _Clock:
    """Counts seconds in `folder/cost.json`, on from those of an interrupted run."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "cost.json"
        self.seconds = json.loads(self._file.read_text())["seconds"] if self._file.exists() else 0.0

    def __enter__(self):
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds += time.perf_counter() - self._started
        if processes.is_first():
            write_json(self._file, {"seconds": self.seconds})


def bits_per_byte(
    model: LanguageModel,
    variables: Mapping[str, Any],
    windows: data.Dataset,
    *,
    tokenizer: data.Tokenizer | None = None,
    count: int = 64,
    batch_size: int = 8,
) -> float:
    """How many bits a byte of text costs the model.

    Args:
      model: any language model.
      variables: its own.
      windows: as those of `text_sets`.
      tokenizer: what made them; None is a byte a token.
      count: how many windows to judge by, evenly spaced.
      batch_size: how many at once.
    """

    @jax.jit
    def nats(variables, batch):
        places = batch.get("positions"), batch.get("segment_ids")
        hidden, _ = model.apply(variables, batch["tokens"], *places, method="hidden")
        kernel = model.output_kernel(variables["params"]).astype(hidden.dtype)
        weights = batch.get("weights", jnp.ones(batch["tokens"].shape))
        loss, _ = ops.chunked_cross_entropy(hidden, kernel, batch["targets"], weights)
        return loss * jnp.sum(weights)

    total, length = 0.0, 0
    for batch in _judged(windows, count, batch_size):
        total += float(nats(variables, batch))
        length += sum(map(len, _target_bytes(batch, tokenizer)))
    return float(total / length / np.log(2))


def held_out_bytes(
    windows: data.Dataset, *, tokenizer: data.Tokenizer | None = None, count: int = 64
) -> list[bytes]:
    """The texts that `bits_per_byte` judges by, a window each."""
    batches = _judged(windows, count, batch_size=1)
    return [text for batch in batches for text in _target_bytes(batch, tokenizer)]


def _judged(windows: data.Dataset, count: int, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Windows evenly spaced, in batches that differ by one in size at most."""
    chosen = np.unique(np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int))
    for part in np.array_split(chosen, -(-len(chosen) // batch_size)):
        yield windows.batch(part, np.random.default_rng(0))


def _target_bytes(
    batch: Mapping[str, np.ndarray], tokenizer: data.Tokenizer | None
) -> Iterator[bytes]:
    """The text of all real targets, window by window."""
    targets = batch["targets"]
    for row, weights in zip(targets, batch.get("weights", np.ones(targets.shape)), strict=True):
        real = row[weights > 0]
        yield (
            real.astype(np.uint8).tobytes()
            if tokenizer is None
            else tokenizer.decode(real).encode()
        )
