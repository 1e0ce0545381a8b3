"""Deeper for little more time: what the backward pass forgets and computes again.

Claim     Memory for activations grows as the square root of depth when groups of
          layers are computed again, for one more forward pass, about 30 % of the time
          (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost",
          arXiv:1604.06174, section 4); networks can be ten times as deep for 20 % more
          time (Salimans and Bulatov 2018, OpenAI's "gradient-checkpointing").
Measured  A Vision Transformer of growing depth under every policy of
          `ops.rematerialisation`. Memory is what XLA says the compiled gradient holds
          beside parameters, gradients and pictures; time that of one gradient, the
          policies in turn, the fastest of a few rounds. From these the power of depth
          that memory grows with, how much deeper `sqrt` is at the memory that `none`
          takes at `from_depth`, and what the planner had said before compiling.
Run       python experiments/gradient_checkpointing.py         (about 2 min on 2 CPU cores)
          python experiments/gradient_checkpointing.py --depths 12 24 48 --width 192
          python experiments/gradient_checkpointing.py --help
"""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxmodels import plots
from jaxmodels.models.vision.vit import VisionTransformer
from jaxmodels.training.experiment import Result, run
from jaxmodels.training.files import write_json
from jaxmodels.training.liveness import peak_bytes

Costs = dict[str, dict[str, list[float]]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    depths: tuple[int, ...] = (4, 16, 64, 256)
    """Ascending. Growth is fitted over the last two."""
    policies: tuple[str, ...] = ("none", "dots", "blocks", "sqrt", "everything")
    """Must have none and sqrt."""
    width: int = 64
    num_heads: int = 2
    image_size: int = 32
    patch_size: int = 4
    batch_size: int = 32
    from_depth: int = 16
    """The depth from whose memory without rematerialisation one goes deeper."""
    rounds: int = 5
    """In each of which every policy has its turn."""
    allowed_time: float = 1.33
    """What one more forward pass may cost, over the time of `none`."""
    seed: int = 0
    folder: Path | None = None
    """Where results go; by default runs/gradient_checkpointing/TIME."""


def main(config: Config, folder: Path) -> Result:
    if not {"none", "sqrt"} <= {*config.policies} or config.from_depth not in config.depths:
        raise ValueError(
            f"gradient_checkpointing: policies={config.policies} must have none and sqrt, and "
            f"depths={config.depths} must have from_depth={config.from_depth}"
        )
    costs: Costs = {p: {"bytes": [], "seconds": [], "planned": []} for p in config.policies}
    for depth in track(config.depths, description="depths"):
        for policy, found in measure(config, depth).items():
            for name, value in found.items():
                costs[policy][name].append(value)
    write_json(folder / "costs.json", {"depths": config.depths, "costs": costs})
    draw_figure(config, folder, costs)
    return conclude(config, costs)


def measure(config: Config, depth: int) -> dict[str, dict[str, float]]:
    """Memory, time and the planner's figure of every policy at one depth."""
    images = jax.random.normal(
        jax.random.key(config.seed), (config.batch_size, *[config.image_size] * 2, 3)
    )
    params = jax.jit(network(config, depth, "none").init)(jax.random.key(1), images)
    steps, costs = {}, {}
    for policy in config.policies:
        gradient = gradient_of(network(config, depth, policy))
        steps[policy] = jax.jit(gradient).lower(params, images).compile()
        found = steps[policy].memory_analysis()
        whole = found.temp_size_in_bytes + found.output_size_in_bytes
        planned = peak_bytes(gradient, params, images) / whole
        costs[policy] = {"bytes": found.temp_size_in_bytes, "planned": planned}
        jax.block_until_ready(steps[policy](params, images))
    turns = {policy: [] for policy in steps}
    for _ in range(config.rounds):
        for policy, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(params, images))
            turns[policy].append(time.perf_counter() - start)
    # Other work on the machine only ever adds time.
    return {policy: {**costs[policy], "seconds": min(turns[policy])} for policy in steps}


def network(config: Config, depth: int, policy: str) -> VisionTransformer:
    return VisionTransformer(
        width=config.width,
        depth=depth,
        num_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=10,
        remat=policy,
    )


def gradient_of(model: VisionTransformer):
    def loss(params, images):
        return jnp.mean(jnp.square(model.apply(params, images)))

    # The value too: without it XLA might drop part of the forward pass.
    return jax.value_and_grad(loss)


def growth(depths: tuple[int, ...], sizes: list[float]) -> float:
    """The p of memory ~ depth^p between the last two depths."""
    return float(np.log(sizes[-1] / sizes[-2]) / np.log(depths[-1] / depths[-2]))


def depth_within(depths: tuple[int, ...], sizes: list[float], room: float) -> float:
    """How deep one gets with so many bytes, on straight lines in the logarithms.

    The deepest measured is a lower bound where all fit.
    """
    if sizes[-1] <= room:
        return float(depths[-1])
    return float(np.exp(np.interp(np.log(room), np.log(sizes), np.log(depths))))


def conclude(config: Config, costs: Costs) -> Result:
    """The claim held against the numbers."""
    depths, measured = config.depths, {}
    plain = costs["none"]
    for policy, cost in costs.items():
        for depth, size, seconds in zip(depths, cost["bytes"], cost["seconds"], strict=True):
            measured[f"{policy}_mb_{depth}"] = size / 1e6
            measured[f"{policy}_seconds_{depth}"] = seconds
        measured[f"{policy}_memory_exponent"] = growth(depths, cost["bytes"])
        measured[f"{policy}_memory_over_none"] = cost["bytes"][-1] / plain["bytes"][-1]
        measured[f"{policy}_time_over_none"] = cost["seconds"][-1] / plain["seconds"][-1]
    room = plain["bytes"][depths.index(config.from_depth)]
    deeper = depth_within(depths, costs["sqrt"]["bytes"], room) / config.from_depth
    measured["sqrt_deeper_in_equal_memory"] = deeper
    slower = [a / b for a, b in zip(costs["sqrt"]["seconds"], plain["seconds"], strict=True)]
    measured["sqrt_worst_time_over_none"] = max(slower)
    planned = [ratio for cost in costs.values() for ratio in cost["planned"]]
    measured["planned_over_xla_lowest"], measured["planned_over_xla_highest"] = (
        min(planned),
        max(planned),
    )
    grows = measured["sqrt_memory_exponent"] <= 0.6 and measured["none_memory_exponent"] >= 0.9
    return Result(
        claim=(
            "activations take memory as the root of depth, and a network can be ten times as "
            "deep for at most a third more time a block"
        ),
        source="Chen et al. 2016, arXiv:1604.06174, section 4; Salimans and Bulatov 2018",
        holds=bool(grows and deeper >= 10 and max(slower) <= config.allowed_time),
        measured=measured,
    )


def draw_figure(config: Config, folder: Path, costs: Costs) -> None:
    """Memory against depth, and the time of each policy over that of none."""
    figure = plots.new_figure(width=13.0, height=6.0)
    left, right = figure.subplots(1, 2)
    depths = list(config.depths)
    sizes = {
        policy: (depths, [size / 1e6 for size in cost["bytes"]]) for policy, cost in costs.items()
    }
    plots.curve(left, sizes, "blocks", "memory for activations, MB", logx=True, logy=True)
    plain = costs["none"]["seconds"]
    ratios = {
        policy: (depths, [a / b for a, b in zip(cost["seconds"], plain, strict=True)])
        for policy, cost in costs.items()
    }
    plots.curve(right, ratios, "blocks", "time over that of none", logx=True)
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
