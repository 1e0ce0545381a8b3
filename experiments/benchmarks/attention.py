"""Attention on a CPU against torch's and JAX's own.

Aim       from T = 1024 blocked attention in plain JAX runs at 0.75 of the speed
          of torch's scaled_dot_product_attention or better, and at 3 times that
          of jax.nn.dot_product_attention; the table says how far that holds
Measured  forward, and forward with all gradients, in float32, full and causal;
          the three take turns in processes of their own
Run       python experiments/benchmarks/attention.py          (about 4 min on 2 CPU cores)
          python experiments/benchmarks/attention.py --help
"""

import dataclasses
import functools
import os
from typing import NamedTuple

import numpy as np
import tyro
from _timing import Contest, print_ratios


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
      shapes: (batch, length, heads, width) of each case.
      rounds: turns of each contender in a case.
      turn_seconds: length of a turn.
    """

    shapes: tuple[tuple[int, int, int, int], ...] = (
        (8, 256, 8, 64),
        (8, 256, 6, 64),  # DiT-S/2
        (2, 1024, 8, 64),
        (1, 4096, 8, 64),
    )
    rounds: int = 7
    turn_seconds: float = 0.15


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    causal: bool
    backward: bool


def inputs(case: Case) -> list[np.ndarray]:
    """Queries, keys, values and the cotangent of the output, (B, T, H, K) each."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=case.shape).astype(np.float32) for _ in range(4)]


def time_jax(attend, case: Case):
    import jax
    import jax.numpy as jnp

    *qkv, cotangent = (jnp.asarray(x) for x in inputs(case))

    def both(*qkv):
        out, pull_back = jax.vjp(attend, *qkv)
        return out, pull_back(cotangent)  # the value too: torch computes it

    step = jax.jit(both if case.backward else attend)
    return lambda: jax.block_until_ready(step(*qkv))


def jaxmodels(case: Case):
    from jaxmodels import cpu

    cpu.tune()
    from jaxmodels import ops

    return time_jax(functools.partial(ops.dot_product_attention, causal=case.causal), case)


def jax_nn(case: Case):
    from jaxmodels import cpu

    cpu.tune()
    import jax

    return time_jax(functools.partial(jax.nn.dot_product_attention, is_causal=case.causal), case)


def torch_sdpa(case: Case):
    import torch

    torch.set_num_threads(os.cpu_count())
    # The memory layout of a model: (B, T, H, K) seen as (B, H, T, K).
    *qkv, cotangent = (torch.from_numpy(x).transpose(1, 2) for x in inputs(case))
    for x in qkv:
        x.requires_grad_(case.backward)
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=case.causal
    )
    if case.backward:
        return lambda: torch.autograd.grad(attend(*qkv), qkv, cotangent)
    return lambda: attend(*qkv)


def main(config: Config) -> None:
    contenders = {"jaxmodels": jaxmodels, "torch SDPA": torch_sdpa, "jax.nn": jax_nn}
    results = {}
    with Contest(contenders) as contest:
        for shape in config.shapes:
            for causal in (False, True):
                for backward in (False, True):
                    name = (
                        f"{shape}{' causal' if causal else ''}, forward"
                        f"{' + backward' if backward else ''}"
                    )
                    results[name] = contest.compare(
                        Case(shape, causal, backward),
                        rounds=config.rounds,
                        turn_seconds=config.turn_seconds,
                    )
                    print(f"measured {name}", flush=True)
    print_ratios("Attention, float32, shape (B, T, H, K)", results, ours="jaxmodels")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
