"""Packing documents into full sequences: the same loss from fewer sequences.

Claim     Half of the tokens and more of a padded batch are padding; sequences packed
          to the brim, with their documents kept apart, train up to twice as fast and
          lose nothing (Krell et al. 2021, "Efficient Sequence Packing without
          Cross-contamination", arXiv:2107.02027, abstract and table 2).
Measured  A byte-level decoder on the functions and paragraphs of the standard library's
          source and manual, lengths as they are: real tokens a second in training,
          padded against packed, steps taken in turns; the loss of the same
          held-out documents in either form; what each form has learnt after equally
          many steps of equally many tokens, and in how many seconds; and real tokens a
          second in reading prompts, padded against laid end to end without padding
          (`decoding.ragged`). Batches of sorted lengths would waste less than these
          padded ones, which have one length as compiled programs like it.
Run       python experiments/packing.py                       (about 3 min on 2 CPU cores)
          python experiments/packing.py --mixer gated_delta --length 512
          python experiments/packing.py --data folder/of/text
          python experiments/packing.py --help
"""

import dataclasses
import itertools
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _language import bits_per_byte, train_language_model
from flax.core import FrozenDict

from jaxmodels import data, plots, training
from jaxmodels.decoding.ragged import last_logits
from jaxmodels.models.language.decoder import Decoder
from jaxmodels.training.experiment import Result, run

_FORMS = {"padded": data.pad_documents, "packed": data.pack_documents}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    data: Path | None = None
    """Texts: a folder, a .jsonl or a .parquet file; by default the standard library."""
    mixer: str = "softmax"
    """Any causal mixer."""
    width: int = 128
    depth: int = 2
    num_heads: int = 4
    head_dim: int = 32
    length: int = 1024
    """Bytes of a sequence; longer documents are split."""
    batch_size: int = 4
    """Packed sequences of a step; of padded ones a step has as many as hold equal tokens."""
    steps: int = 60
    rounds: int = 5
    """Turns of each form where speed is measured."""
    held_out_documents: int = 200
    prompts: int = 100
    """Held-out documents whose first halves are read as prompts."""
    learning_rate: float = 4e-3
    warmup: int = 20
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    precision: str = "float32"
    seed: int = 0
    log_every: int = 5
    checkpoint_every: int = 40
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/packing/TIME is begun."""


def main(config: Config, folder: Path) -> Result:
    documents, held_out = (read(config, part) for part in ("train", "test"))
    chosen = np.random.default_rng(0).permutation(len(held_out))
    judged = data.TokenDocuments.join(held_out[i] for i in chosen[: config.held_out_documents])
    rows = {form: make(documents, config.length) for form, make in _FORMS.items()}
    model = decoder(config)
    speeds = training_speeds(config, model, rows)
    variables, bits, curves = {}, {}, {}
    for form in _FORMS:
        variables[form], seconds = train(config, model, rows, form, folder / form)
        judge = _FORMS[form](judged, config.length)
        bits[form] = [bits_of(model, variables[name], judge) for name in variables]
        curves[form] = curve(folder / form, seconds)
    prompts = [d[: min(config.length, -(-len(d) // 2))] for d in judged][: config.prompts]
    reading = reading_speeds(config, model, variables["packed"], prompts)
    # The model trained on padded sequences, judged in both forms.
    difference = abs(float(bits["packed"][0] / bits["padded"][0]) - 1)
    draw_figure(folder, documents.lengths, speeds, reading, curves)
    return conclude(rows, documents.lengths, speeds, reading, bits, curves, difference)


def read(config: Config, part: str) -> data.TokenDocuments:
    if config.data is None:
        return data.tokenize(functions_and_paragraphs(part), data.ByteTokenizer())
    return data.tokenize(data.read_documents(config.data, split=part), data.ByteTokenizer())


def functions_and_paragraphs(part: str) -> list[str]:
    """Source is cut before its functions, methods and classes, the manual at blank lines."""
    manual = {*topics.values()}
    files = data.python_text(part).tobytes().decode(errors="replace").split("\0")
    pieces = []
    for text in files:
        border = "" if text in manual else r"(?= {0,4}(?:async |def |class |@))"
        pieces += re.split(rf"\n\n+{border}", text)
    return [piece for piece in pieces if piece.strip()]


def decoder(config: Config) -> Decoder:
    return Decoder(
        width=config.width,
        depth=config.depth,
        mixer=config.mixer,
        mixer_options=FrozenDict(num_heads=config.num_heads, head_dim=config.head_dim),
        dtype=training.compute_dtype(config.precision),
    )


def train(
    config: Config, model: Decoder, rows: Mapping[str, data.DocumentRows], form: str, folder: Path
) -> tuple[dict[str, Any], float]:
    """Trains on one form, with as many sequences a step as hold the tokens of packed ones."""
    batch_size = round(config.batch_size * rows["packed"].fill / rows[form].fill)
    config = dataclasses.replace(config, batch_size=batch_size)
    return train_language_model(config, model, rows[form], folder)


def bits_of(model: Decoder, variables: Mapping[str, Any], judge: data.DocumentRows) -> float:
    return bits_per_byte(model, variables, judge, count=len(judge))


def curve(folder: Path, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds and training loss, as logged."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    steps, losses = zip(*((line["step"], line["loss"]) for line in lines), strict=True)
    return [seconds * step / steps[-1] for step in steps], list(losses)


def training_speeds(
    config: Config, model: Decoder, rows: Mapping[str, data.DocumentRows]
) -> dict[str, list[float]]:
    """Real tokens a second of training steps, a figure a round; the forms take turns.

    One program serves both, since their batches have one shape.
    """
    optimizer = training.adamw(config.learning_rate, steps=1000)
    step = training.make_step(model.loss, optimizer, precision=config.precision)
    example = {"tokens": jax.ShapeDtypeStruct((1, config.length), jnp.int32)}
    state = training.init_state(model, optimizer, jax.random.key(0), example)
    streams = {
        form: data.batches(each, config.batch_size, seed=config.seed) for form, each in rows.items()
    }

    def turn(form):
        nonlocal state
        count = 0
        for batch in itertools.islice(streams[form], 4):
            state, metrics = step(state, batch)
            count += batch["weights"].sum()
        jax.block_until_ready(metrics)
        return count

    return in_turns(turn, config.rounds)


def reading_speeds(
    config: Config, model: Decoder, variables: Mapping[str, Any], prompts: list[np.ndarray]
) -> dict[str, list[float]]:
    """Real tokens a second of reading prompts for the logits that follow them.

    Raises:
      ArithmeticError: the two forms differ in what they find.
    """
    longest = max(map(len, prompts))

    @jax.jit
    def read_padded(variables, tokens, last):
        hidden, _ = model.apply(variables, tokens, method="hidden")
        return model.apply(variables, hidden[jnp.arange(len(last)), last], method="logits")

    def padded():
        found = []
        for start in range(0, len(prompts), config.batch_size):
            tokens = np.zeros((config.batch_size, longest), np.int32)
            last = np.zeros(config.batch_size, np.int32)
            group = prompts[start : start + config.batch_size]
            for row, prompt in enumerate(group):
                tokens[row, : len(prompt)] = prompt
                last[row] = len(prompt) - 1
            found.append(read_padded(variables, tokens, last)[: len(group)])
        return jnp.concatenate(found)

    def ragged():
        return last_logits(model, variables, prompts, capacity=config.length)

    found, wanted = ragged(), padded()
    if not np.allclose(found, wanted, rtol=0, atol=1e-3 * float(jnp.abs(wanted).max())):
        raise ArithmeticError("packing: prompts read end to end give other logits than padded ones")
    forms, count = {"padded": padded, "ragged": ragged}, sum(map(len, prompts))

    def turn(form):
        forms[form]().block_until_ready()
        return count

    return in_turns(turn, config.rounds, forms=tuple(forms))


def in_turns(
    turn: Callable[[str], float], rounds: int, forms: tuple[str, ...] = tuple(_FORMS)
) -> dict[str, list[float]]:
    """What `turn` counts, a second; every form has its turn in every round, and one to compile."""
    speeds = {form: [] for form in forms}
    for number in range(rounds + 1):
        for form in forms:
            start = time.perf_counter()
            count = turn(form)
            if number:
                speeds[form].append(float(count) / (time.perf_counter() - start))
    return speeds


def ratio(speeds: Mapping[str, list[float]]) -> float:
    """How much faster the second form is than the first: the median over rounds."""
    slow, fast = speeds.values()
    return statistics.median(b / a for a, b in zip(slow, fast, strict=True))


def conclude(rows, lengths, speeds, reading, bits, curves, difference) -> Result:
    return Result(
        claim="packed sequences train up to twice as fast as padded ones, and the loss is the same",
        source="Krell et al. 2021, arXiv:2107.02027, abstract",
        holds=ratio(speeds) >= 1.5 and difference < 1e-4,
        measured={
            "documents": len(lengths),
            "mean_length": float(lengths.mean()),
            "median_length": float(np.median(lengths)),
            **{f"{form}_fill": each.fill for form, each in rows.items()},
            **{f"{form}_sequences": len(each) for form, each in rows.items()},
            **{f"{form}_training_tokens_per_s": statistics.median(s) for form, s in speeds.items()},
            "packed_over_padded_training": ratio(speeds),
            **{f"{form}_reading_tokens_per_s": statistics.median(s) for form, s in reading.items()},
            "ragged_over_padded_reading": ratio(reading),
            "held_out_bits_padded": bits["padded"][0],
            "the_same_model_judged_packed": bits["packed"][0],
            "relative_difference": difference,
            "held_out_bits_after_packed_training": bits["packed"][1],
            **{f"{form}_training_seconds": when[-1] for form, (when, _) in curves.items()},
        },
    )


def draw_figure(folder: Path, lengths, speeds, reading, curves) -> None:
    """How long documents are, how fast each form is, and what it has learnt by when."""
    figure = plots.new_figure(width=16.0, height=5.0)
    histogram, bars, lines = figure.subplots(1, 3)
    histogram.hist(lengths, bins=np.geomspace(1, lengths.max(), 40))
    histogram.set(xscale="log", xlabel="bytes of a document", ylabel="documents")
    named = {**{f"train\n{n}": s for n, s in speeds.items()}}
    named |= {f"read\n{n}": s for n, s in reading.items()}
    bars.bar(list(named), [statistics.median(s) for s in named.values()])
    bars.set(ylabel="real tokens a second")
    plots.curve(lines, curves, "training, seconds", "training loss, nats a byte")
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
