"""FSDP divides the memory of training by the devices for half as much again of communication.

Claim     Partitioning parameters, gradients and optimizer state over N devices (ZeRO
          stage 3) leaves 1 / N of them on each, for 1.5 times the communication of
          data parallelism, which copies them (Rajbhandari et al. 2020,
          arXiv:1910.02054, sections 5.3 and 7).
Measured  A decoder trained on random tokens over 1, 2, 4 and 8 virtual devices, for
          each way to spread it: data, fsdp, tensor, sequence (ring attention), and
          with experts data and expert. Bytes of parameters and optimizer state on a
          device; bytes that a device sends in a step, counted in the program that
          XLA compiled; tokens a second; and the largest difference of the loss from
          one device's. On CPU XLA gathers parameters once, not again for the gradient,
          and has no reduce-scatter, for which it all-reduces: 1 + 2 instead of the
          paper's 2 + 1 against data parallelism's 2. Virtual devices share the cores of
          one machine, so equal speed is the most there is: what is missing is work done
          more than once, and exchange.
Run       python experiments/data_parallel.py               (about 2 min on 2 CPU cores)
          python experiments/data_parallel.py --devices 1 8 --strategies data fsdp
          python experiments/data_parallel.py --help
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from _parallel import measure_in_processes

from jaxmodels import plots
from jaxmodels.training.experiment import Result, run

# The mesh's axis, and whether the model has experts.
STRATEGIES = {
    "data": ("data", False),
    "fsdp": ("fsdp", False),
    "tensor": ("tensor", False),
    "sequence": ("sequence", False),
    "experts_data": ("data", True),
    "experts_expert": ("expert", True),
}
MEGABYTE = 1e6


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    """How many; the first is what the others are compared with."""
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    width: int = 128
    depth: int = 4
    num_heads: int = 8
    mlp_width: int = 384
    vocab_size: int = 512
    num_experts: int = 8
    """Of the models with experts; each token sees two of a quarter of the width."""
    length: int = 128
    batch_size: int = 16
    steps: int = 3
    """That are timed."""
    seed: int = 0
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/data_parallel/TIME is begun."""


def main(config: Config, folder: Path) -> Result:
    found = {name: {} for name in config.strategies}
    for devices in config.devices:
        cases = [case(config, name, devices) for name in config.strategies]
        for name, figures in zip(found, measure_in_processes(devices, cases), strict=True):
            found[name][devices] = figures
    draw_figure(folder, found)
    return conclude(config, found)


def case(config: Config, name: str, devices: int) -> dict[str, Any]:
    """The arguments of `_parallel.measure`."""
    if name not in STRATEGIES:
        raise ValueError(f"strategy {name!r} is unknown; choose from {', '.join(STRATEGIES)}")
    axis, has_experts = STRATEGIES[name]
    sizes = {
        "width": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_heads,
        "mlp_width": config.mlp_width,
        "vocab_size": config.vocab_size,
    }
    if has_experts:
        experts = {"num_experts": config.num_experts, "top_k": 2, "balance_coefficient": 0.0}
        sizes |= {"mlp_width": config.mlp_width // 4, **experts}
    batch = [config.batch_size, config.length]
    return {"mesh": f"{axis}={devices}", "sizes": sizes, "batch": batch, "steps": config.steps}


def conclude(config: Config, found: dict[str, dict[int, dict[str, Any]]]) -> Result:
    """The claim held against the numbers of the most devices."""
    first, most = min(config.devices), max(config.devices)
    measured: dict[str, Any] = {}
    for name, by_devices in found.items():
        alone, many = by_devices[first], by_devices[most]
        measured |= {
            f"{name}_state_share_of_a_device": many["state"] / alone["state"],
            f"{name}_sent_over_parameters": sum(many["sent"].values()) / many["parameters"],
            f"{name}_sent_by_kind": many["sent"],
            f"{name}_working_memory_over_one_device": many["working"] / alone["working"],
            f"{name}_speed_over_one_device": many["tokens_per_second"] / alone["tokens_per_second"],
            f"{name}_largest_difference_of_loss": float(
                np.max(np.abs(np.subtract(many["losses"], alone["losses"])))
            ),
        }
    holds = False
    if {"data", "fsdp"} <= found.keys():
        sent = [measured[f"{name}_sent_over_parameters"] for name in ("fsdp", "data")]
        measured["fsdp_sent_over_data"] = sent[0] / sent[1] if sent[1] else float("nan")
        share = measured["fsdp_state_share_of_a_device"]
        holds = share * most <= 1.1 * first and measured["fsdp_sent_over_data"] <= 1.55
    return Result(
        claim="FSDP leaves 1 / N of the state on a device for 1.5 times the communication",
        source="Rajbhandari et al. 2020, arXiv:1910.02054, sections 5.3 and 7",
        holds=bool(holds),
        measured=measured,
    )


def draw_figure(folder: Path, found: dict[str, dict[int, dict[str, Any]]]) -> None:
    """State on a device, bytes it sends, and speed, against the number of devices."""
    figure = plots.new_figure(width=15.0, height=5.0)
    state, sent, speed = figure.subplots(1, 3)

    def lines(value):
        return {
            name: (list(by_devices), [value(figures) for figures in by_devices.values()])
            for name, by_devices in found.items()
        }

    plots.curve(
        state,
        lines(lambda f: f["state"] / MEGABYTE),
        "devices",
        "parameters and optimizer on a device, MB",
    )
    plots.curve(
        sent,
        lines(lambda f: sum(f["sent"].values()) / MEGABYTE),
        "devices",
        "sent by a device in a step, MB",
    )
    plots.curve(speed, lines(lambda f: f["tokens_per_second"]), "devices", "tokens a second")
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
