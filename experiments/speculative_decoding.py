"""Several tokens a step: one language model, with every kind of draft before it.

Claim     1. A small draft makes decoding 2 to 3 times as fast, its output unchanged
             (Leviathan et al. 2023, arXiv:2211.17192, table 2).
          2. The token after the next one, guessed by what was trained with the model, is
             accepted 85 to 90 % of the time (DeepSeek-V3, arXiv:2412.19437, section 5.4.3).
          3. Medusa is 2.2 to 3.6 times as fast (Cai et al. 2024, arXiv:2401.10774).
Measured  A byte-level decoder is trained on the standard library's source and manual,
          with heads for later tokens beside its last block; a smaller decoder on the same
          text; and Medusa heads on the frozen model, with the tree that their accuracy
          suggests. Then held-out text is continued, one prompt at a time: plain, and with a
          draft model, prompt look-up, the other heads, and Medusa, all greedy, whose text
          must be the same; and drawn, plain, with exact and with typical acceptance.
          Tokens a second after the first call, tokens a round, and how often the first
          guess was accepted. Ways take turns prompt by prompt, so that a busy machine is
          as slow for all.
Run       python experiments/speculative_decoding.py           (some 35 min on 2 CPU cores)
          python experiments/speculative_decoding.py --data my_text.txt
          python experiments/speculative_decoding.py --help
"""

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _language import bits_per_byte, text_sets, train_language_model
from flax.core import FrozenDict

from jaxmodels import data, plots, training
from jaxmodels.decoding import generate
from jaxmodels.decoding.drafts import ModelDraft, NgramDraft
from jaxmodels.decoding.head_drafts import MedusaDraft, MultiTokenDraft
from jaxmodels.decoding.speculative import acceptance, speculative_generate, tokens_a_round
from jaxmodels.models.language.decoder import Decoder
from jaxmodels.models.language.medusa import MedusaHeads
from jaxmodels.models.language.multi_token import MultiToken, targets_ahead
from jaxmodels.ops.candidate_tree import CandidateTree, grow_tree
from jaxmodels.training.experiment import Result, run, trajectory_fields

GREEDY = ("draft model", "n-gram", "multi-token", "medusa")
DRAWN = ("draft model, drawn", "medusa, drawn", "medusa, typical")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    data: Path | None = None
    """Text file, or folder of them, .jsonl or .parquet; by default Python's standard library."""
    width: int = 384
    """57 MB with the depth below: six tokens, with their drafts, take as long as two; of a
    model of 19 MB, which a cache holds, as long as four, and a draft gains little."""
    depth: int = 8
    heads: int = 4
    """Tokens that are predicted at each place, by heads trained with the model."""
    draft_width: int = 128
    draft_depth: int = 2
    length: int = 256
    """Bytes of a training sequence."""
    batch_size: int = 8
    steps: int = 600
    draft_steps: int = 2400
    medusa_steps: int = 300
    medusa_heads: int = 4
    tree_size: int = 16
    """Guesses of Medusa's tree."""
    draft_length: int = 7
    """Guesses of the draft model a round."""
    ngram_length: int = 8
    """Guesses of prompt look-up a round."""
    prompts: int = 8
    prompt_length: int = 64
    new_tokens: int = 192
    temperature: float = 0.7
    """Of drawn text."""
    typical: tuple[float, float] = (0.09, 0.3)
    """Epsilon and delta of typical acceptance."""
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    precision: str = "float32"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 100
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/speculative_decoding/TIME is begun."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """All that takes part: each model with its variables."""

    model: MultiToken
    variables: dict[str, Any]
    draft: Decoder
    draft_variables: dict[str, Any]
    medusa: MedusaHeads
    medusa_variables: dict[str, Any]
    tree: CandidateTree

    @property
    def alone(self) -> tuple[Decoder, dict[str, Any]]:
        """The model without its other heads."""
        return self.model.trunk, {"params": self.variables["params"]["trunk"]}


def main(config: Config, folder: Path) -> Result:
    check(config)
    train_set, held_out = text_sets(config.data, config.length)
    trained, measured = train(config, train_set, held_out, folder)
    prompts = pick_prompts(held_out, config)
    found = race(ways(config, trained), prompts)
    measured |= summarise(found)
    draw_figure(folder, found)
    return conclude(measured)


def check(config: Config) -> None:
    """Refuses what would only fail after training."""
    for name in ("steps", "draft_steps", "medusa_steps", "prompts", "new_tokens", "draft_length"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if not 0 < config.prompt_length <= config.length - config.new_tokens:
        raise ValueError(
            f"prompt_length={config.prompt_length} must be positive, and with "
            f"new_tokens={config.new_tokens} no more than length={config.length}, beyond which "
            f"the model has seen nothing"
        )
    if config.heads < 2 or config.temperature <= 0:
        raise ValueError(
            f"heads={config.heads} must be at least 2 and temperature={config.temperature} "
            f"above 0; greedy text is measured as well"
        )


def decoder(width: int, depth: int) -> Decoder:
    """A byte-level decoder with heads of 32 channels."""
    options = FrozenDict(num_heads=max(width // 32, 1), head_dim=32)
    return Decoder(width=width, depth=depth, vocab_size=256, mixer_options=options)


def train(config: Config, train_set, held_out, folder: Path) -> tuple[Trained, dict[str, Any]]:
    """Trains the model with its heads, the draft model, and Medusa's heads on the model."""
    model = MultiToken(decoder(config.width, config.depth), config.heads)
    draft = decoder(config.draft_width, config.draft_depth)
    variables, seconds = train_language_model(config, model, train_set, folder / "model")
    schedule = dataclasses.replace(config, steps=config.draft_steps)
    of_draft, draft_seconds = train_language_model(schedule, draft, train_set, folder / "draft")
    medusa = MedusaHeads(256, config.medusa_heads)
    of_medusa = train_medusa(config, medusa, model, variables, train_set, folder / "medusa")
    tree = grow_tree(accuracies(medusa, of_medusa, model, variables, train_set), config.tree_size)
    drafting = dataclasses.replace(model, drafting=True)
    trained = Trained(drafting, variables, draft, of_draft, medusa, of_medusa, tree)
    measured = {
        "bits_per_byte": bits_per_byte(model, variables, held_out),
        "draft_bits_per_byte": bits_per_byte(draft, of_draft, held_out),
        "training_seconds": seconds,
        "draft_training_seconds": draft_seconds,
        "tree": " ".join("".join(map(str, choice)) for choice in tree.nodes[1:]),
    }
    return trained, measured


def train_medusa(
    config: Config, heads: MedusaHeads, model: MultiToken, variables, train_set, folder: Path
) -> dict[str, Any]:
    """Trains heads on the vectors of a model that stays as it is; returns their variables."""
    optimizer = training.adamw(
        config.learning_rate,
        steps=config.medusa_steps,
        warmup=min(config.warmup, config.medusa_steps - 1),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    example = {"h": jax.ShapeDtypeStruct((1, config.width), jnp.float32)}
    state = training.init_state(heads, optimizer, jax.random.key(config.seed), example)
    kernel = model.output_kernel(variables["params"])
    state = state.replace(params=heads.begin_with(kernel))
    step = training.make_step(heads.loss, optimizer, precision=config.precision)
    read = reader(model)
    state = training.fit(
        state,
        lambda state, batch: step(state, {**batch, "hidden": read(variables, batch["tokens"])}),
        data.batches(train_set, config.batch_size, seed=config.seed + 1),
        steps=config.medusa_steps,
        directory=folder,
        config=trajectory_fields(config),
        checkpoint_every=config.checkpoint_every,
        log_every=config.log_every,
        description="medusa",
    )
    return {"params": state.params}


def reader(model: MultiToken) -> Callable[[Any, Any], Any]:
    """The compiled function from variables and tokens to what the model reads logits from."""
    return jax.jit(lambda variables, tokens: model.apply(variables, tokens, method="hidden")[0])


def accuracies(heads, of_heads, model, variables, train_set, ranks: int = 5) -> np.ndarray:
    """How often each head's guess of each rank is right, on some text of training."""
    chosen = np.linspace(0, len(train_set) - 1, 32).astype(int)
    batch = train_set.batch(chosen, np.random.default_rng(0))
    hidden = reader(model)(variables, batch["tokens"])
    logits = jax.jit(heads.apply)(of_heads, hidden)
    _, best = jax.lax.top_k(logits, ranks)
    batch = {"targets": jnp.asarray(batch["targets"])}
    rows = []
    for head in range(heads.heads):
        targets, weights = targets_ahead(batch, head + 1)
        right = (best[:, :, head] == targets[..., None]) * weights[..., None]
        rows.append(np.asarray(right.sum(axis=(0, 1)) / weights.sum()))
    return np.stack(rows)


def pick_prompts(held_out: data.Dataset, config: Config) -> list[np.ndarray]:
    """Beginnings of held-out windows, evenly spaced."""
    chosen = np.linspace(0, len(held_out) - 1, config.prompts).astype(int)
    batch = held_out.batch(chosen, np.random.default_rng(0))
    return list(batch["tokens"][:, : config.prompt_length])


def ways(config: Config, trained: Trained) -> dict[str, Callable[[np.ndarray], Any]]:
    """Functions from a prompt to what was generated, by name; the plain one first."""
    alone = trained.alone
    small = ModelDraft(trained.draft, trained.draft_variables, config.draft_length)
    medusa = MedusaDraft(trained.medusa, trained.medusa_variables, trained.tree)
    several = MultiTokenDraft(trained.model, trained.variables)
    drawn = {"temperature": config.temperature, "key": jax.random.key(config.seed)}

    def plain(**options):
        return lambda prompt: generate(*alone, [prompt], **options)

    def guessed(draft, model_and_variables=alone, **options):
        return lambda prompt: speculative_generate(*model_and_variables, [prompt], draft, **options)

    new = {"max_new_tokens": config.new_tokens}
    return {
        "plain": plain(**new),
        "draft model": guessed(small, **new),
        "n-gram": guessed(NgramDraft(config.ngram_length), **new),
        "multi-token": guessed(several, (trained.model, trained.variables), **new),
        "medusa": guessed(medusa, **new),
        "plain, drawn": plain(**new, **drawn),
        "draft model, drawn": guessed(small, **new, **drawn),
        "medusa, drawn": guessed(medusa, **new, **drawn),
        "medusa, typical": guessed(medusa, **new, **drawn, typical=config.typical),
    }


@dataclasses.dataclass
class Runs:
    """What one way has generated, a prompt after the other."""

    texts: list[list[int]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    rounds: Any = 0

    def add(self, out: Any, seconds: float) -> None:
        """Counts one prompt's text, and its rounds if there were any."""
        self.texts += out.sequences()
        self.seconds += seconds
        self.rounds = self.rounds + np.asarray(getattr(out, "rounds", 0))

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.texts)) / self.seconds


def race(ways: dict[str, Callable], prompts: list[np.ndarray]) -> dict[str, Runs]:
    """Lets all ways continue each prompt in turn, once everything is compiled."""
    found = {name: Runs() for name in ways}
    for way in ways.values():
        jax.block_until_ready(way(prompts[0]))
    for prompt, (name, way) in itertools.product(prompts, ways.items()):
        started = time.perf_counter()
        out = jax.block_until_ready(way(prompt))
        found[name].add(out, time.perf_counter() - started)
    return found


def summarise(found: dict[str, Runs]) -> dict[str, Any]:
    """Speed and acceptance by name, speed-ups against the plain way of the same kind."""
    measured: dict[str, Any] = {}
    for name, runs in found.items():
        measured[f"{name}: tokens/s"] = runs.tokens_per_second
        if name in GREEDY + DRAWN:
            plain = found["plain" if name in GREEDY else "plain, drawn"]
            measured[f"{name}: times plain"] = runs.tokens_per_second / plain.tokens_per_second
            measured[f"{name}: tokens a round"] = tokens_a_round(runs.rounds)
            measured[f"{name}: first guess accepted"] = float(acceptance(runs.rounds)[0])
        if name in GREEDY:
            same = [a == b for a, b in zip(runs.texts, found["plain"].texts, strict=True)]
            measured[f"{name}: texts identical"] = f"{sum(same)} of {len(same)}"
    measured["all greedy texts identical"] = all(
        found[name].texts == found["plain"].texts for name in GREEDY
    )
    return measured


def conclude(measured: dict[str, Any]) -> Result:
    """The claims held against the numbers, each of which must be reached."""
    return Result(
        claim="a draft model decodes at 2 times the speed of plain decoding with identical text, "
        "Medusa at 2.2 times, and the second token is accepted 85 % of the time",
        source="Leviathan et al. 2023, arXiv:2211.17192, table 2; Cai et al. 2024, "
        "arXiv:2401.10774; DeepSeek-V3, arXiv:2412.19437, section 5.4.3",
        holds=measured["all greedy texts identical"]
        and measured["draft model: times plain"] >= 2
        and measured["medusa, typical: times plain"] >= 2.2
        and measured["multi-token: first guess accepted"] >= 0.85,
        measured=measured,
    )


def draw_figure(folder: Path, found: dict[str, Runs]) -> None:
    """Speed of each way, and how often each guess was accepted where those before it were."""
    figure = plots.new_figure(width=14.0, height=6.0)
    left, right = figure.subplots(1, 2)
    names = list(found)[::-1]
    colors = [plots.PALETTE[0 if name.startswith("plain") else 1] for name in names]
    left.barh(names, [found[name].tokens_per_second for name in names], color=colors)
    left.set_xlabel("tokens a second")
    lines = {
        name: (1 + np.arange(len(runs.rounds) - 1), acceptance(runs.rounds))
        for name, runs in found.items()
        if name in GREEDY + DRAWN
    }
    plots.curve(right, lines, "guess", "accepted where those before it were")
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
