"""How fast does a GPT-2 write here, against `transformers`, and how soon does it begin?

Measured  Greedy decoding of 128 tokens after prompts of 32, float32, random weights
          of GPT-2's shapes, by `jaxmodels.decoding.generate` and by the `generate`
          of `transformers` on torch, in turns: tokens a second, their ratio, and
          for a batch of one the share of the speed at which memory could be read
          (every parameter once a token). GPT-2 small alone and eight prompts at
          once; a model of 6 layers and width 384 over GPT-2's vocabulary and over
          bytes. Then the time from the start of a process to the first token of
          GPT-2 small, with an empty and with a filled compilation cache.
Run       python experiments/benchmarks/decoding.py           (about 11 min on 2 CPU cores)
          python experiments/benchmarks/decoding.py --help
"""

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tyro
from _timing import Contest, print_ratios

PROMPT, NEW, THREADS = 32, 128, 2
SMALL = {"width": 768, "depth": 12, "num_heads": 12, "vocab_size": 50_257}
TINY = {**SMALL, "width": 384, "depth": 6, "num_heads": 6}
CASES = {
    "GPT-2 small, batch 1": (SMALL, 1),
    "GPT-2 small, batch 8": (SMALL, 8),
    "6 layers of 384, batch 1": (TINY, 1),
    "6 layers of 384, bytes, batch 1": ({**TINY, "vocab_size": 256}, 1),
}


def prompts(case: str) -> np.ndarray:
    sizes, batch = CASES[case]
    return np.random.default_rng(0).integers(0, sizes["vocab_size"], (batch, PROMPT))


def ours(case: str, stream: Callable | None = None) -> Callable[[], None]:
    """jaxmodels on one device, which reads matrices on one core at batch 1."""
    return _jaxmodels(case, 1, stream)


def ours_per_core(case: str) -> Callable[[], None]:
    """jaxmodels on a device for each core, the parameters split between them."""
    return _jaxmodels(case, THREADS)


def _jaxmodels(case: str, devices: int, stream: Callable | None = None) -> Callable[[], None]:
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
    from jaxmodels import cpu, training

    cpu.tune()
    training.enable_compilation_cache()
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from jaxmodels.decoding import generate
    from jaxmodels.models.language.gpt2 import GPT2
    from jaxmodels.training.sharding import tree_shardings

    model = GPT2(**CASES[case][0])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    # Repeated, since to draw them all takes seconds; a prime number, so that no rows are equal.
    weights = np.random.default_rng(0).normal(0, 0.02, 99_991).astype(np.float32)
    variables = jax.tree.map(lambda leaf: np.resize(weights, leaf.shape), shapes)
    mesh = training.make_mesh(f"fsdp={devices}")
    # Heads stay whole; other matrices are split along their longer axis.
    rules = [("/(q|k|v)/kernel", PartitionSpec(None, "fsdp"))]
    variables = jax.device_put(variables, tree_shardings(variables, mesh, rules))
    texts = prompts(case)

    def call():
        out = generate(model, variables, texts, max_new_tokens=NEW, stream=stream)
        jax.block_until_ready(out)

    return call


def transformers(case: str) -> Callable[[], None]:
    """`generate` of transformers on torch, as it is."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(THREADS)
    sizes, _ = CASES[case]
    config = GPT2Config(
        n_embd=sizes["width"],
        n_layer=sizes["depth"],
        n_head=sizes["num_heads"],
        vocab_size=sizes["vocab_size"],
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.tensor(prompts(case))
    mask = torch.ones_like(tokens)

    def call():
        with torch.inference_mode():
            model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False)

    return call


def memory(case: str) -> Callable[[], None]:
    """Reads as many bytes as the parameters have, once."""
    read = np.ones(parameter_bytes(case) // 4, np.float32)
    return lambda: read.sum()


def parameter_bytes(case: str) -> int:
    """Of what one token needs: all but the positions, of which it reads one row."""
    sizes, _ = CASES[case]
    width, hidden = sizes["width"], 4 * sizes["width"]
    layer = 4 * width * (width + 1) + 2 * width * hidden + hidden + width + 4 * width
    return 4 * (sizes["depth"] * layer + 2 * width + sizes["vocab_size"] * width)


def print_speeds(results: dict[str, dict[str, list[float]]]) -> None:
    """Tokens a second, and at batch 1 the share of what reading every parameter allows."""
    for case, seconds in results.items():
        batch = CASES[case][1]
        middle = {name: statistics.median(times) for name, times in seconds.items()}
        speeds = {name: batch * NEW / middle[name] for name in seconds if name != "memory"}
        line = ", ".join(f"{name} {speed:.1f} tokens/s" for name, speed in speeds.items())
        bytes_read = parameter_bytes(case)
        pairs = zip(seconds["memory"], seconds["jaxmodels"], strict=True)
        shares = [NEW * read / whole for read, whole in pairs]
        print(
            f"{case}: {line}; memory {bytes_read / middle['memory'] / 1e9:.1f} GB/s, of which "
            f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%}) are used"
        )


def seconds_to_first_token(cache: Path) -> float:
    """Starts a Python process that makes GPT-2 small, and gives when its first token is there."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    code = "import decoding; decoding.say_first_token()"
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        check=True,
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
    )
    return float(done.stdout.split()[-1]) - start


def say_first_token() -> None:
    """Prints the time of day when the first of 128 tokens is there."""
    first = []
    ours("GPT-2 small, batch 1", stream=lambda tokens: first.append(time.time()))()
    print(first[0])


@dataclasses.dataclass(frozen=True)
class Config:
    cases: tuple[str, ...] = tuple(CASES)
    """Which of the cases."""
    rounds: int = 5
    """Turns of each contender."""
    start: bool = True
    """Also measure the time to the first token."""


def main(config: Config) -> None:
    if config.cases:
        contenders = {
            "jaxmodels": ours,
            "jaxmodels, a device per core": ours_per_core,
            "transformers": transformers,
            "memory": memory,
        }
        with Contest(contenders) as contest:
            results = {
                case: contest.compare(case, rounds=config.rounds, turn_seconds=1)
                for case in config.cases
            }
        title = f"{NEW} tokens after {PROMPT}, greedy, float32, {THREADS} threads"
        speeds = {
            case: {name: times for name, times in seconds.items() if name != "memory"}
            for case, seconds in results.items()
        }
        print_ratios(title, speeds, ours="jaxmodels")
        print_speeds(results)
    if config.start:
        with tempfile.TemporaryDirectory() as cache:
            cold, *warm = (seconds_to_first_token(Path(cache)) for _ in range(3))
        warm = ", ".join(f"{seconds:.1f}" for seconds in warm)
        print(f"GPT-2 small, process start to first token: cold {cold:.1f} s; warm {warm} s")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
