"""How fast is a layer of experts that drops no token?

Measured  Mixtral's block with 16 experts of which a token sees two, float32: the
          layer of `jaxmodels` and `MixtralSparseMoeBlock` of `transformers` on
          torch, whose experts are a loop ("eager"), a grouped product or, for a few
          tokens, a batched one. For each size a call as in inference, and forward
          and backward as in training. Torch's best form is the one to beat.
Run       python experiments/benchmarks/mixture_of_experts.py      (about 3 min on 2 CPU cores)
          python experiments/benchmarks/mixture_of_experts.py --help
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import tyro
from _timing import Contest, print_ratios

EXPERTS, TOP_K, THREADS = 16, 2, 2
# Tokens, width, and width of an expert.
SIZES = {
    "1 token, 768 x 2048": (1, 768, 2048),
    "512 tokens, 256 x 512": (512, 256, 512),
    "1024 tokens, 384 x 1024": (1024, 384, 1024),
    "4096 tokens, 384 x 256": (4096, 384, 256),
}
Case = tuple[str, str]


def example(tokens: int, width: int, hidden: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "x": (1, tokens, width),
        "router": (width, EXPERTS),
        "gate": (EXPERTS, width, hidden),
        "up": (EXPERTS, width, hidden),
        "down": (EXPERTS, hidden, width),
    }
    return {
        name: rng.normal(0, shape[-2] ** -0.5, size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def ours(case: Case) -> Callable[[], None]:
    """The layer of jaxmodels."""
    from jaxmodels import cpu

    cpu.tune()
    import jax
    import jax.numpy as jnp

    from jaxmodels.layers.experts import MixtureOfExperts

    size, kind = case
    tokens, width, hidden = SIZES[size]
    params = {name: jnp.asarray(a) for name, a in example(tokens, width, hidden).items()}
    x = params.pop("x")
    params["router"] = {"kernel": params["router"]}
    layer = MixtureOfExperts(num_experts=EXPERTS, top_k=TOP_K, hidden_width=hidden)

    def forward(params, x):
        return layer.apply({"params": params}, x)

    def loss(params, x):
        return jnp.square(forward(params, x)).mean()

    of = jax.jit(forward if kind == "inference" else jax.value_and_grad(loss, (0, 1)))
    return lambda: jax.block_until_ready(of(params, x))


def _transformers(case: Case, experts: str) -> Callable[[], None]:
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.set_num_threads(THREADS)
    size, kind = case
    tokens, width, hidden = SIZES[size]
    config = MixtralConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        experts_implementation=experts,
    )
    block = MixtralSparseMoeBlock(config)
    arrays = {n: torch.tensor(a) for n, a in example(tokens, width, hidden).items()}
    inward = torch.cat([arrays["gate"], arrays["up"]], dim=2)
    with torch.no_grad():
        block.gate.weight.copy_(arrays["router"].T)
        block.experts.gate_up_proj.copy_(inward.mT)
        block.experts.down_proj.copy_(arrays["down"].mT)
    x = arrays["x"]
    if kind == "inference":

        def call():
            with torch.inference_mode():
                block(x)

        return call
    x.requires_grad_()

    def call():
        block.zero_grad(set_to_none=True)
        x.grad = None
        block(x).square().mean().backward()

    return call


def torch_loop(case: Case) -> Callable[[], None]:
    """transformers with a loop over experts."""
    return _transformers(case, "eager")


def torch_grouped(case: Case) -> Callable[[], None]:
    """transformers with torch's grouped product."""
    return _transformers(case, "grouped_mm")


def torch_batched(case: Case) -> Callable[[], None]:
    """transformers with a copy of an expert for every token that chose it."""
    return _transformers(case, "batched_mm")


@dataclasses.dataclass(frozen=True)
class Config:
    rounds: int = 5
    """Turns of each contender."""
    turn_seconds: float = 0.5
    """Length of a turn."""
    sizes: tuple[str, ...] = ()
    """Names of sizes; by default all."""


def main(config: Config) -> None:
    names = config.sizes or tuple(SIZES)
    if unknown := {*names} - {*SIZES}:
        raise SystemExit(f"sizes: {sorted(unknown)} are none of {sorted(SIZES)}")
    few = [name for name in names if SIZES[name][0] < 64]
    many = [name for name in names if name not in few]
    for group, last in ((few, {"torch batched": torch_batched}), (many, {})):
        if not group:
            continue
        contenders = {"jaxmodels": ours, "torch loop": torch_loop, "torch grouped": torch_grouped}
        with Contest({**contenders, **last}) as contest:
            results = {
                f"{name}, {kind}": contest.compare(
                    (name, kind), rounds=config.rounds, turn_seconds=config.turn_seconds
                )
                for name in group
                for kind in ("inference", "training")
            }
        title = f"{EXPERTS} experts, top {TOP_K}, float32, {THREADS} threads"
        print_ratios(title, results, ours="jaxmodels")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
