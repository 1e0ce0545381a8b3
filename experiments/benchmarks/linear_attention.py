"""Gated recurrences on a CPU against those of transformers in torch, and against themselves.

Aim       the chunked gated delta rule, Kimi delta rule and gated linear attention run
          at the speed of the chunked torch code or better and 20 times as fast as
          token by token; chunked is 4 times as fast as our own recurrent form at
          T = 4096; time grows as T; the state does not grow at all
Measured  in float32: forward, and forward with all gradients, in turns; the exponent
          of the time from T = 2048 to 16384; the bytes of a decoding state
Peers     transformers' code that needs no compiled kernel: of qwen3_next (gated
          delta rule) and kimi_linear (a decay a channel). It has no chunked gated
          linear attention, so that is compared with kimi_linear's, which solves a
          triangular system besides, and with our own formulation written in torch
Run       python experiments/benchmarks/linear_attention.py     (about 5 min on 2 CPU cores)
          python experiments/benchmarks/linear_attention.py --parts states
          python experiments/benchmarks/linear_attention.py --help
"""

import dataclasses
import functools
import os
from typing import Literal, NamedTuple

import numpy as np
import tyro
from _timing import Contest, print_ratios

Part = Literal["chunked", "twin", "token", "own", "lengths", "states"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
      parts: "chunked" and "token" are against transformers', "twin" against our
        formulation in torch, "own" is our chunked against our recurrent form,
        "lengths" the growth of time and "states" the size of decoding states.
      batches: batch sizes of the comparisons with transformers.
      length: tokens in these.
      heads, width: H, and K = V, everywhere.
      lengths: tokens of the growth; its exponent is fitted.
      own_length: tokens of our chunked against our recurrent form.
      rounds: turns of each contender in a case.
      turn_seconds: length of a turn.
    """

    parts: tuple[Part, ...] = ("chunked", "twin", "token", "own", "lengths", "states")
    batches: tuple[int, ...] = (1, 2)
    length: int = 2048
    heads: int = 4
    width: int = 64
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    own_length: int = 4096
    rounds: int = 5
    turn_seconds: float = 0.2


class Case(NamedTuple):
    op: str
    batch: int
    length: int
    heads: int
    width: int
    backward: bool


RULES = ("delta_rule", "gated_delta_rule", "kimi_delta_rule", "gated_linear_attention")
MIXERS = ("delta", "gated_delta", "kda", "gla", "ssd", "retention", "softmax")


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Arguments by name, and the cotangent of the output."""
    rng = np.random.default_rng(0)
    shape = (case.batch, case.length, case.heads)
    q, k, v, cotangent = (rng.normal(size=(*shape, case.width)) for _ in range(4))
    found = {"q": q / np.linalg.norm(q, axis=-1, keepdims=True)}
    found |= {"k": k / np.linalg.norm(k, axis=-1, keepdims=True), "v": v}
    per_head = case.op == "gated_delta_rule"
    if case.op != "delta_rule":
        found["log_decay"] = -0.1 * rng.uniform(size=shape if per_head else q.shape)
    if case.op != "gated_linear_attention":
        found["beta"] = rng.uniform(size=shape)
    found["cotangent"] = cotangent
    return {name: x.astype(np.float32) for name, x in found.items()}


def jaxmodels(case: Case, form: str = "chunked"):
    from jaxmodels import cpu

    cpu.tune()
    import jax
    import jax.numpy as jnp

    from jaxmodels.ops import delta_rule, gated_linear_attention, kimi_delta

    modules = (delta_rule, kimi_delta, gated_linear_attention)
    rule = next(getattr(m, case.op) for m in modules if hasattr(m, case.op))
    arrays = {name: jnp.asarray(x) for name, x in inputs(case).items()}
    cotangent = arrays.pop("cotangent")

    def forward(arrays):
        return rule(**arrays, form=form)[0]

    def both(arrays):
        out, pull_back = jax.vjp(forward, arrays)
        return out, pull_back(cotangent)  # the value too: torch computes it

    step = jax.jit(both if case.backward else forward)
    return lambda: jax.block_until_ready(step(arrays))


def time_torch(call, case: Case):
    """`call` takes inputs by name and returns the output."""
    import torch

    torch.set_num_threads(os.cpu_count())
    arrays = {name: torch.from_numpy(x) for name, x in inputs(case).items()}
    cotangent = arrays.pop("cotangent")
    if not case.backward:
        return lambda: call(**arrays)
    for x in arrays.values():
        x.requires_grad_()
    return lambda: torch.autograd.grad(call(**arrays), list(arrays.values()), cotangent)


def transformers(case: Case, form: str = "chunked"):
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it says that there is no kernel
    import torch
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    if case.op == "gated_delta_rule":
        peers = qwen.torch_chunk_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule
    else:
        peers = kimi.chunk_kimi_delta_attention, kimi.recurrent_kimi_delta_attention
    peer = peers[form == "recurrent"]
    ones = torch.ones(case.batch, case.length, case.heads)

    def call(q, k, v, log_decay, beta=ones):
        return peer(q, k, v, log_decay, beta, initial_state=None, output_final_state=False)[0]

    return time_torch(call, case)


def torch_twin(case: Case):
    """Gated linear attention as `jaxmodels` computes it, in torch."""
    import torch

    def halve(q, k, log_decay):
        size = k.shape[-2]
        if size == 1:
            return (q * k).sum(-1, keepdim=True), log_decay, torch.zeros_like(log_decay)

        def pairs(x):
            return x.unflatten(-2, (2, size // 2))

        q, k, log_decay = pairs(q), pairs(k), pairs(log_decay)
        inside, start, end = halve(q, k, log_decay)
        keys = k[..., 0, :, :] * end[..., 0, :, :].exp()
        below = (q[..., 1, :, :] * start[..., 1, :, :].exp()) @ keys.mT
        whole = start[..., -1:, :]
        start = torch.stack([start[..., 0, :, :], start[..., 1, :, :] + whole[..., 0, :, :]], -3)
        end = torch.stack([end[..., 0, :, :] + whole[..., 1, :, :], end[..., 1, :, :]], -3)
        upper = torch.cat([inside[..., 0, :, :], torch.zeros_like(below)], -1)
        lower = torch.cat([below, inside[..., 1, :, :]], -1)
        return torch.cat([upper, lower], -2), start.flatten(-3, -2), end.flatten(-3, -2)

    def call(q, k, v, log_decay):
        # (B, T, H, K) -> (B, H, N, C, K), with the chunk size of jaxmodels' default
        q, k, v, log_decay = (
            x.transpose(1, 2).unflatten(2, (-1, 32)).contiguous() for x in (q, k, v, log_decay)
        )
        products, start, end = halve(q, k, log_decay)
        writes = (k * end.exp()).mT @ v
        through = start[..., -1, :].exp()[..., None]
        states = [torch.zeros_like(writes[:, :, 0])]
        for n in range(writes.shape[2] - 1):
            states.append(through[:, :, n] * states[-1] + writes[:, :, n])
        out = products @ v + (q * start.exp()) @ torch.stack(states, 2)
        return out.flatten(2, 3).transpose(1, 2)

    return time_torch(call, case)


def compare(title: str, contenders: dict, cases: list[Case], config: Config) -> None:
    results = {}
    with Contest(contenders) as contest:
        for case in cases:
            passes = "forward + backward" if case.backward else "forward"
            name = f"{case.op} B={case.batch} T={case.length}, {passes}"
            results[name] = contest.compare(
                case, rounds=config.rounds, turn_seconds=config.turn_seconds
            )
            print(f"measured {name}", flush=True)
    print_ratios(
        f"{title}, float32, H={config.heads}, K=V={config.width}",
        results,
        ours=next(iter(contenders)),
    )


def grow(config: Config) -> None:
    """Prints the best round of each length, and the exponent that fits them."""
    with Contest({"jaxmodels": jaxmodels}) as contest:
        for op in RULES:
            seconds = []
            for length in config.lengths:
                case = Case(op, 1, length, config.heads, config.width, True)
                rounds = contest.compare(case, rounds=config.rounds, turn_seconds=0.3)
                seconds.append(min(rounds["jaxmodels"]))  # of a shared machine the steadiest
            exponent = np.polyfit(np.log(config.lengths), np.log(seconds), 1)[0]
            times = ", ".join(
                f"T={length} {1e3 * s:.0f} ms"
                for length, s in zip(config.lengths, seconds, strict=True)
            )
            print(f"{op}, forward + backward: time ~ T^{exponent:.2f}   ({times})", flush=True)


def print_states(config: Config) -> None:
    """Prints the bytes that decoding one sequence carries, by how long it may get."""
    import jax
    import jax.numpy as jnp

    from jaxmodels import create_mixer

    for name in MIXERS:
        mixer = create_mixer(name, num_heads=config.heads, head_dim=config.width)
        sizes = []
        for length in config.lengths:
            state = jax.eval_shape(functools.partial(mixer.init_state, 1, length, jnp.float32))
            sizes.append(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)))
        sizes = ", ".join(
            f"{length} tokens {size / 1024:.0f} KiB"
            for length, size in zip(config.lengths, sizes, strict=True)
        )
        print(f"decoding state of {name}: {sizes}")


def main(config: Config) -> None:
    def cases(op, batches=(1,), length=config.length, passes=(False, True)):
        return [
            Case(op, batch, length, config.heads, config.width, backward)
            for batch in batches
            for backward in passes
        ]

    if "chunked" in config.parts:
        compare(
            "Chunked against chunked",
            {"jaxmodels": jaxmodels, "transformers": transformers},
            cases("gated_delta_rule", config.batches)
            + cases("kimi_delta_rule")
            + cases("gated_linear_attention"),
            config,
        )
    if "twin" in config.parts:
        compare(
            "The same formulation in torch",
            {"jaxmodels": jaxmodels, "torch": torch_twin},
            cases("gated_linear_attention", config.batches),
            config,
        )
    if "token" in config.parts:
        compare(
            "Chunked against token by token",
            {
                "jaxmodels": jaxmodels,
                "transformers": functools.partial(transformers, form="recurrent"),
            },
            cases("gated_delta_rule", passes=(True,)) + cases("kimi_delta_rule", passes=(True,)),
            dataclasses.replace(config, rounds=2),
        )
    if "own" in config.parts:
        compare(
            "Chunked against our own recurrent form",
            {"chunked": jaxmodels, "recurrent": functools.partial(jaxmodels, form="recurrent")},
            [case for op in RULES for case in cases(op, length=config.own_length, passes=(True,))],
            dataclasses.replace(config, rounds=3),
        )
    if "lengths" in config.parts:
        grow(config)
    if "states" in config.parts:
        print_states(config)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
