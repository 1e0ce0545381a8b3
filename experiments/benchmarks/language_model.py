"""How fast does a small Llama train here?

Measured  6 layers of width 384, T = 512, batch 8, float32: a training step (forward,
          backward, AdamW on the mean cross entropy) of `jaxmodels` and of the same
          network in `transformers` on torch, eager and compiled, with equal
          parameters; once with a vocabulary of bytes and once with Llama 2's. Then
          what the loss over that vocabulary holds in memory, chunked and not.
Run       python experiments/benchmarks/language_model.py     (about 5 min on 2 CPU cores)
          python experiments/benchmarks/language_model.py --help
"""

import dataclasses
import os
from collections.abc import Callable

import numpy as np
import tyro
from _timing import Contest, print_ratios

BATCH, LENGTH, WIDTH, DEPTH, HEADS, MLP_WIDTH = 8, 512, 384, 6, 6, 1024
VOCABULARIES = {"bytes": 256, "Llama 2": 32_000}
THREADS = 2
LEARNING_RATE, DECAY = 1e-4, 0.01


def example(vocab_size: int) -> np.ndarray:
    """Tokens, one more than a model reads."""
    return np.random.default_rng(0).integers(0, vocab_size, (BATCH, LENGTH + 1), np.int32)


def _jaxmodels(vocab_size: int, devices: int) -> Callable[[], None]:
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
    from jaxmodels import cpu

    cpu.tune()
    import jax
    import optax

    from jaxmodels import training
    from jaxmodels.models.language.llama import Llama

    model = Llama(
        width=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        mlp_width=MLP_WIDTH,
        vocab_size=vocab_size,
    )
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=DECAY)
    mesh = training.make_mesh(f"data={devices}")
    tokens = example(vocab_size)
    batch = training.shard_batch({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, mesh)
    inputs = {"tokens": batch["tokens"]}
    state = training.init_state(model, optimizer, jax.random.key(0), inputs, mesh=mesh)
    step = training.make_step(model.loss, optimizer)

    def call():
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return call


def ours(vocab_size: int) -> Callable[[], None]:
    """jaxmodels on one device that uses all cores."""
    return _jaxmodels(vocab_size, devices=1)


def ours_per_core(vocab_size: int) -> Callable[[], None]:
    """jaxmodels on a device for each core, the batch split between them."""
    return _jaxmodels(vocab_size, devices=THREADS)


def _transformers(vocab_size: int, compiled: bool) -> Callable[[], None]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(THREADS)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=MLP_WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=DECAY, fused=True
    )
    network = torch.compile(model) if compiled else model
    tokens = torch.tensor(example(vocab_size), dtype=torch.int64)
    # As ours: every token has a target, and no cache is made.
    inputs = {"input_ids": tokens[:, :-1], "shift_labels": tokens[:, 1:].contiguous()}

    def call():
        optimizer.zero_grad(set_to_none=True)
        network(**inputs, labels=inputs["shift_labels"], use_cache=False).loss.backward()
        optimizer.step()

    return call


def torch_eager(vocab_size: int) -> Callable[[], None]:
    """transformers as it is."""
    return _transformers(vocab_size, compiled=False)


def torch_compiled(vocab_size: int) -> Callable[[], None]:
    """transformers through torch.compile."""
    return _transformers(vocab_size, compiled=True)


def loss_megabytes(vocab_size: int) -> tuple[float, float]:
    """Temporary memory of the loss and its gradients: chunked, and with all logits."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxmodels.ops import chunked_cross_entropy

    hidden = jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.float32)
    kernel = jax.ShapeDtypeStruct((WIDTH, vocab_size), jnp.float32)
    targets = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)

    def chunked(hidden, kernel, targets):
        return chunked_cross_entropy(hidden, kernel, targets)[0]

    def whole(hidden, kernel, targets):
        logits = hidden @ kernel
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def megabytes(loss):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, kernel, targets)
        return compiled.compile().memory_analysis().temp_size_in_bytes / 1e6

    return megabytes(chunked), megabytes(whole)


@dataclasses.dataclass(frozen=True)
class Config:
    rounds: int = 5
    """Turns of each contender."""
    compile: bool = True
    """Also measure torch.compile."""


def main(config: Config) -> None:
    contenders = {
        "jaxmodels": ours,
        "jaxmodels, a device per core": ours_per_core,
        "torch eager": torch_eager,
    }
    if config.compile:
        contenders["torch compiled"] = torch_compiled
    with Contest(contenders) as contest:
        results = {
            f"vocabulary {name}, {size}": contest.compare(size, rounds=config.rounds)
            for name, size in VOCABULARIES.items()
        }
    title = f"Llama, {DEPTH} layers of {WIDTH}: training step, {BATCH} x {LENGTH}, float32"
    print_ratios(f"{title}, {THREADS} threads", results, ours="jaxmodels")
    for name, size in VOCABULARIES.items():
        chunked, whole = loss_megabytes(size)
        print(f"loss over {name}: {chunked:.0f} MB chunked, {whole:.0f} MB with all logits")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
