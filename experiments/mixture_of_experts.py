"""Experts balanced by a bias: even loads that cost nothing in quality.

Claim     Moving a bias on the router's scores after each step balances experts
          better than an auxiliary loss and without hurting the language model (Wang
          et al. 2024, arXiv:2408.15664, table 2; DeepSeek-AI 2024, "DeepSeek-V3",
          arXiv:2412.19437, section 4.5.2).
Measured  One small decoder on the standard library's source and manual, of equal
          active parameters: dense; with experts that nothing balances; balanced by a
          loss; by a bias. Bits per byte on held-out files; the most any expert of a
          layer is loaded over the mean load there, in the worst layer, over many
          held-out windows, and the average of that over single batches. And the
          evidence against: the dense decoder once more, trained for as many seconds
          as the experts with the bias took.
Run       python experiments/mixture_of_experts.py          (about 12 min on 2 CPU cores)
          python experiments/mixture_of_experts.py --num-experts 32 --top-k 6
          python experiments/mixture_of_experts.py --help
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from _language import bits_per_byte, text_sets, train_language_model
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict

from jaxmodels import data, plots, training
from jaxmodels.layers.experts import MixtureOfExperts
from jaxmodels.models.language.llama import Llama
from jaxmodels.training.experiment import Result, run

_DENSE_IN_EQUAL_TIME = "dense in equal time"


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    data: Path | None = None
    """A text, a .jsonl or .parquet file or a folder of them; by default the standard library."""
    width: int = 96
    depth: int = 2
    num_heads: int = 4
    num_experts: int = 16
    top_k: int = 3
    """Experts that a token sees, beside one that all tokens share."""
    expert_width: int = 72
    """Of one expert's feed-forward; the dense one is as wide as those that a token sees."""
    bias_rate: float = 0.003
    balance_coefficient: float = 0.01
    length: int = 128
    """Bytes of a training sequence."""
    batch_size: int = 16
    steps: int = 500
    held_out_windows: int = 128
    learning_rate: float = 3e-3
    warmup: int = 30
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    precision: str = "float32"
    tolerance: float = 0.01
    """Bits per byte by which the bias may be worse and still not hurt."""
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 100
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/mixture_of_experts/TIME is begun."""


class Sparse(Llama):
    """Llama with experts in place of its feed-forwards.

    Attributes:
      experts: fields of `MixtureOfExperts`.
    """

    experts: Mapping[str, Any] = FrozenDict()

    @nn.nowrap
    def feed_forward(self) -> nn.Module:
        """The experts of one block."""
        return MixtureOfExperts(**self.experts, dtype=self.dtype, parent=None)


def models(config: Config) -> dict[str, Llama]:
    """Those compared, by name; the parameters that a token sees are equally many."""
    sizes = {
        "width": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_heads,
        "mlp_width": (config.top_k + 1) * config.expert_width,
        "vocab_size": 256,
        "dtype": training.compute_dtype(config.precision),
    }
    experts = {
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "hidden_width": config.expert_width,
        "shared_width": config.expert_width,
        "scores": "sigmoid",
    }
    balanced = {
        "unbalanced": {},
        "loss": {"balance_coefficient": config.balance_coefficient / config.depth},
        "bias": {"bias_rate": config.bias_rate},
    }
    sparse = {name: Sparse(**sizes, experts={**experts, **how}) for name, how in balanced.items()}
    return {"dense": Llama(**sizes), **sparse}


def main(config: Config, folder: Path) -> Result:
    train_set, held_out = text_sets(config.data, config.length)
    found = {}
    for name, model in models(config).items():
        found[name] = measure(config, model, train_set, held_out, folder / name)
    longer = math.ceil(config.steps * found["bias"]["seconds"] / found["dense"]["seconds"])
    patient = dataclasses.replace(config, steps=longer)
    place = folder / _DENSE_IN_EQUAL_TIME.replace(" ", "_")
    found[_DENSE_IN_EQUAL_TIME] = measure(
        patient, models(config)["dense"], train_set, held_out, place
    )
    draw_figure(folder, found)
    return conclude(config, found)


def measure(config, model, train_set, held_out, folder) -> dict[str, Any]:
    """Trains one model; returns what it came to."""
    variables, seconds = train_language_model(config, model, train_set, folder)
    bits = bits_per_byte(model, variables, held_out, count=config.held_out_windows)
    found = {
        "bits": bits,
        "seconds": seconds,
        "steps": config.steps,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
    }
    if isinstance(model, Sparse):
        found["loads"] = expert_loads(config, model, variables, held_out)
    return found


def expert_loads(config: Config, model: Sparse, variables: Any, windows: data.Dataset):
    """(batches, layers, experts): how many tokens of each held-out batch an expert had."""

    @jax.jit
    def loads(variables, tokens):
        _, sown = model.apply(variables, tokens, method="hidden", mutable="intermediates")
        flat = flatten_dict(sown["intermediates"])
        return [value[0] for path, value in sorted(flat.items()) if path[-1] == "expert_load"]

    chosen = np.linspace(0, len(windows) - 1, config.held_out_windows).astype(int)
    batches = np.array_split(chosen, max(1, len(chosen) // config.batch_size))
    tokens = (windows.batch(part, np.random.default_rng(0))["tokens"] for part in batches)
    return np.stack([np.stack(jax.device_get(loads(variables, part))) for part in tokens])


def imbalance(loads: np.ndarray) -> tuple[float, float]:
    """The largest load over the mean load, in the worst layer: of all batches, and of one."""

    def worst(loads):
        return (loads.max(axis=-1) / loads.mean(axis=-1)).max(axis=-1)

    return float(worst(loads.sum(axis=0))), float(worst(loads).mean())


def conclude(config: Config, found: dict[str, dict[str, Any]]) -> Result:
    """The claim held against the numbers."""
    measured = {}
    for name, figures in found.items():
        key = name.replace(" ", "_")
        measured[f"{key}_bits_per_byte"] = figures["bits"]
        measured[f"{key}_seconds"] = figures["seconds"]
        measured[f"{key}_steps"] = figures["steps"]
        measured[f"{key}_parameters"] = figures["parameters"]
        if "loads" in figures:
            overall, of_batch = imbalance(figures["loads"])
            measured[f"{key}_max_over_mean_load"] = overall
            measured[f"{key}_max_over_mean_load_of_a_batch"] = of_batch
    bits, equal_time = found["bias"]["bits"], found[_DENSE_IN_EQUAL_TIME]["bits"]
    measured["experts_beat_dense_in_equal_steps"] = bool(bits < found["dense"]["bits"])
    measured["experts_beat_dense_in_equal_time"] = bool(bits < equal_time)
    even = measured["bias_max_over_mean_load"] <= 1.2
    others = min(found["loss"]["bits"], found["unbalanced"]["bits"])
    return Result(
        claim="a bias evens the load (at most 1.2 of the mean) without hurting the loss",
        source="Wang et al. 2024, arXiv:2408.15664, table 2; 2024, arXiv:2412.19437, section 4.5.2",
        holds=bool(even and bits <= others + config.tolerance),
        measured=measured,
    )


def draw_figure(folder: Path, found: dict[str, dict[str, Any]]) -> None:
    """Loads of the experts of the worst layer in order, and bits per byte against seconds."""
    figure = plots.new_figure(width=13.0, height=6.0)
    left, right = figure.subplots(1, 2)
    lines = {}
    for name, figures in found.items():
        if "loads" in figures:
            loads = figures["loads"].sum(axis=0)
            worst = loads[np.argmax(loads.max(axis=-1))]
            lines[name] = (np.arange(1, len(worst) + 1), np.sort(worst)[::-1] / worst.mean())
    plots.curve(left, lines, "experts of the worst layer, in order", "load / mean load")
    points = {name: ([figures["seconds"]], [figures["bits"]]) for name, figures in found.items()}
    plots.curve(right, points, "training, seconds", "bits per byte, held out")
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
