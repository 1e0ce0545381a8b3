"""Linear time wins once sequences are long: every mixer's cost against length.

Claim     FLASH trains 4.9 to 12 times as fast as its quadratic rival on long
          sequences (Hua et al. 2022, "Transformer Quality in Linear Time",
          arXiv:2202.10447, abstract and figure 4); gated linear attention is
          slower than softmax attention on short sequences and faster on long
          ones (Yang et al. 2024, arXiv:2312.06635, figure 3).
Measured  Time and memory of the forward and backward pass of one layer of every
          registered mixer, batch 1, against sequence length, in one process, the
          lengths of a mixer in turn. Memory is what XLA says the compiled program
          holds at its peak beside its inputs. A mixer's time exponent is fitted
          over lengths of 2,048 to 16,384; its crossover is the length from which
          it is faster than softmax attention.
Run       python experiments/attention_scaling.py             (about 15 min on 2 CPU cores)
          python experiments/attention_scaling.py --mixers softmax gla --lengths 256 1024
          python experiments/attention_scaling.py --help
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxmodels import create_mixer, list_mixers, plots
from jaxmodels.registry import module_fields
from jaxmodels.training.experiment import Result, run
from jaxmodels.training.files import write_json

# Lengths between which growth is fitted: below, fixed costs count.
_FITTED = 2048, 16384


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    width: int = 256
    """Of the model."""
    num_heads: int = 4
    head_dim: int = 64
    mixers: tuple[str, ...] = ()
    """Names; by default all that are registered."""
    repeats: int = 5
    """Timed calls of a length, of which the median counts."""
    max_seconds: float = 8.0
    """A mixer whose call takes longer is not tried on the next length."""
    seed: int = 0
    folder: Path | None = None
    """Where results go; by default runs/attention_scaling/TIME."""


def main(config: Config, folder: Path) -> Result:
    names = config.mixers or tuple(list_mixers())
    costs = {name: measure(config, name) for name in track(names, description="mixers")}
    write_json(folder / "costs.json", costs)
    draw_figure(folder, costs)
    return conclude(costs)


def measure(config: Config, name: str) -> dict[str, list[float]]:
    """Seconds and bytes of one forward and backward pass, a figure a length.

    The lengths take turns, so that a slow spell of the machine bends no curve.
    """
    calls, peaks, seconds = [], [], []
    for length in config.lengths:
        call, peak = prepare(config, name, length)
        calls.append(call)
        peaks.append(peak)
        seconds.append([duration(call)])  # the first one, which does not count
        if seconds[-1][0] > config.max_seconds:
            break
    for _ in range(config.repeats):
        for call, times in zip(calls, seconds, strict=True):
            if times[0] <= config.max_seconds:
                times.append(duration(call))
    return {
        "length": list(config.lengths[: len(calls)]),
        "seconds": [statistics.median(times[1:] or times) for times in seconds],
        "bytes": peaks,
    }


def prepare(config: Config, name: str, length: int) -> tuple[Callable[[], None], int]:
    """A call that does the work once, and the bytes it holds at its peak."""
    mixer = build(config, name, length)
    x = jax.random.normal(jax.random.key(config.seed), (1, length, config.width))
    params = jax.jit(mixer.init)(jax.random.key(config.seed + 1), x)

    def loss(params, x):
        out, _ = mixer.apply(params, x)
        return jnp.sum(out * out)

    # The value too: without it XLA might drop part of the forward pass.
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, x).compile()
    return (
        lambda: jax.block_until_ready(step(params, x)),
        step.memory_analysis().temp_size_in_bytes,
    )


def duration(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def build(config: Config, name: str, length: int):
    """A mixer at the configured size, as far as it has one."""
    fields = module_fields(create_mixer(name))
    wanted = {
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "max_length": length,
    }
    return create_mixer(name, **{k: v for k, v in wanted.items() if k in fields})


def exponent(cost: dict[str, list[float]], of: str = "seconds") -> float | None:
    """The p of time ~ length^p, by least squares over long sequences; None with too few."""
    first, last = _FITTED
    measured = zip(cost["length"], cost[of], strict=True)
    pairs = [(t, y) for t, y in measured if first <= t <= last]
    if len(pairs) < 2:
        return None
    return float(np.polyfit(*np.log(np.asarray(pairs, float)).T, 1)[0])


def crossover(cost: dict[str, list[float]], rival: dict[str, list[float]]) -> float | None:
    """The length from which `cost` is below its rival; None if the longest still is not.

    Between measured lengths both are taken as straight lines in the logarithms.
    """
    count = min(len(cost["length"]), len(rival["length"]))
    length = np.log(cost["length"][:count])
    gap = np.log(cost["seconds"][:count]) - np.log(rival["seconds"][:count])
    if gap[-1] >= 0:
        return None
    slower = np.flatnonzero(gap >= 0)
    if not len(slower):
        return float(cost["length"][0])
    i = slower[-1]
    share = gap[i] / (gap[i] - gap[i + 1])
    return float(np.exp(length[i] + share * (length[i + 1] - length[i])))


def conclude(costs: dict[str, dict[str, list[float]]]) -> Result:
    """The claim held against the numbers, as far as its mixers were measured."""
    measured = {}
    for name, cost in costs.items():
        for length, seconds in zip(cost["length"], cost["seconds"], strict=True):
            measured[f"{name}_ms_{length}"] = 1e3 * seconds
        measured[f"{name}_time_exponent"] = exponent(cost)
        measured[f"{name}_memory_exponent"] = exponent(cost, "bytes")
        if "softmax" in costs:
            measured[f"{name}_crossover"] = crossover(cost, costs["softmax"])
    holds = []
    for name, rival in (("flash", "flash_quad"), ("flash", "softmax")):
        if {name, rival} <= {*costs}:
            gain = gain_at_the_longest(costs[name], costs[rival])
            measured[f"{rival}_over_{name}"] = gain
            holds.append(gain >= 4.9)
    if {"gla", "softmax"} <= {*costs}:
        first = [costs[name]["seconds"][0] for name in ("gla", "softmax")]
        gain = gain_at_the_longest(costs["gla"], costs["softmax"])
        measured |= {"softmax_over_gla": gain, "softmax_over_gla_short": first[1] / first[0]}
        holds.append(gain > 1 and first[0] > first[1])
    return Result(
        claim=(
            "on long sequences FLASH is at least 4.9 times as fast as quadratic attention, and "
            "gated linear attention loses on short sequences and wins on long ones"
        ),
        source="Hua et al. 2022, arXiv:2202.10447, figure 4; Yang et al. 2024, arXiv:2312.06635",
        holds=bool(holds) and all(holds),
        measured=measured,
    )


def gain_at_the_longest(cost: dict[str, list[float]], rival: dict[str, list[float]]) -> float:
    """How many times as fast as its rival, at the longest sequence both were measured on."""
    last = min(len(cost["length"]), len(rival["length"])) - 1
    return rival["seconds"][last] / cost["seconds"][last]


def draw_figure(folder: Path, costs: dict[str, dict[str, list[float]]]) -> None:
    """Time and memory against length, a line a mixer."""
    figure = plots.new_figure(width=13.0, height=6.0)
    for axes, key, unit, scale in zip(
        figure.subplots(1, 2),
        ("seconds", "bytes"),
        ("forward and backward, ms", "memory beside the inputs, MB"),
        (1e3, 1e-6),
        strict=True,
    ):
        lines = {n: (c["length"], [scale * y for y in c[key]]) for n, c in costs.items()}
        plots.curve(axes, lines, "tokens", unit, logx=True, logy=True)
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
