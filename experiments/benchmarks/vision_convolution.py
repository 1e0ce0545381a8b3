"""Convolutions on a CPU against torch's and XLA's own.

Aim       depthwise 7 x 7 on (4, 56, 56, 128) at half the speed of torch in its better
          memory layout or more, forward and with gradients, and forward at 25
          times that of a grouped lax.conv
Measured  forward, and forward with both gradients, in float32: depthwise, and the
          plain convolutions of a ResNet; the contenders take turns in processes
          of their own
Run       python experiments/benchmarks/vision_convolution.py  (about 4 min on 2 CPU cores)
          python experiments/benchmarks/vision_convolution.py --help
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
      depthwise: (batch, side, channels, kernel size) of each depthwise case.
      plain: (batch, side, channels in, channels out, kernel size, stride).
      rounds: turns of each contender in a case.
      turn_seconds: length of a turn.
    """

    depthwise: tuple[tuple[int, int, int, int], ...] = ((4, 56, 128, 7), (4, 56, 128, 3))
    plain: tuple[tuple[int, int, int, int, int, int], ...] = (
        (8, 56, 64, 64, 3, 1),
        (8, 14, 256, 256, 3, 1),
        (8, 56, 64, 256, 1, 1),
        (8, 56, 256, 512, 1, 2),
    )
    rounds: int = 7
    turn_seconds: float = 0.15


class Case(NamedTuple):
    batch: int
    side: int
    channels: int
    features: int
    kernel_size: int
    stride: int
    groups: int
    backward: bool

    def __str__(self) -> str:
        shape = (self.batch, self.side, self.side, self.channels)
        kind = "depthwise" if self.groups > 1 else f"to {self.features}, stride {self.stride}"
        passes = "forward + backward" if self.backward else "forward"
        return f"{self.kernel_size}x{self.kernel_size} {kind} on {shape}, {passes}"


def inputs(case: Case) -> list[np.ndarray]:
    """Image, kernel and the cotangent of the output, channels last."""
    rng = np.random.default_rng(0)
    side = (case.side - 1) // case.stride + 1
    size, width = case.kernel_size, case.channels // case.groups
    shapes = [
        (case.batch, case.side, case.side, case.channels),
        (size, size, width, case.features),
        (case.batch, side, side, case.features),
    ]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def time_jax(convolve, case: Case):
    import jax
    import jax.numpy as jnp

    x, kernel, cotangent = (jnp.asarray(array) for array in inputs(case))

    def both(x, kernel):
        out, pull_back = jax.vjp(convolve, x, kernel)
        return out, pull_back(cotangent)  # the value too: torch computes it

    step = jax.jit(both if case.backward else convolve)
    return lambda: jax.block_until_ready(step(x, kernel))


def jaxmodels(case: Case):
    from jaxmodels import cpu

    cpu.tune()
    from jaxmodels.ops.convolution import convolution

    options = {"padding": case.kernel_size // 2, "stride": case.stride, "groups": case.groups}
    return time_jax(functools.partial(convolution, **options), case)


def lax_conv(case: Case):
    from jaxmodels import cpu

    cpu.tune()
    from jax import lax

    pad = case.kernel_size // 2
    return time_jax(
        lambda x, kernel: lax.conv_general_dilated(
            x,
            kernel,
            (case.stride, case.stride),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=case.groups,
        ),
        case,
    )


def time_torch(case: Case, layout: str):
    import torch

    torch.set_num_threads(os.cpu_count())
    x, kernel, cotangent = (torch.from_numpy(array) for array in inputs(case))
    format_ = getattr(torch, layout)
    x, cotangent = (a.permute(0, 3, 1, 2).contiguous(memory_format=format_) for a in (x, cotangent))
    kernel = kernel.permute(3, 2, 0, 1).contiguous(memory_format=format_)
    for array in (x, kernel):
        array.requires_grad_(case.backward)
    convolve = functools.partial(
        torch.nn.functional.conv2d,
        padding=case.kernel_size // 2,
        stride=case.stride,
        groups=case.groups,
    )
    if case.backward:
        return lambda: torch.autograd.grad(convolve(x, kernel), (x, kernel), cotangent)
    return lambda: convolve(x, kernel)


def torch_channels_first(case: Case):
    return time_torch(case, "contiguous_format")


def torch_channels_last(case: Case):
    return time_torch(case, "channels_last")


def measure(title: str, shapes, passes, contenders, config: Config) -> None:
    results = {}
    with Contest(contenders) as contest:
        for shape in shapes:
            for backward in passes:
                case = Case(*shape, backward)
                results[str(case)] = contest.compare(
                    case, rounds=config.rounds, turn_seconds=config.turn_seconds
                )
    print_ratios(f"{title}, float32; the better torch layout counts", results, ours="jaxmodels")


OURS_AND_TORCH = {
    "jaxmodels": jaxmodels,
    "torch NCHW": torch_channels_first,
    "torch NHWC": torch_channels_last,
}
EVERYONE = OURS_AND_TORCH | {"lax.conv": lax_conv}


def measure_depthwise(config: Config) -> None:
    shapes = [(b, s, c, c, k, 1, c) for b, s, c, k in config.depthwise]
    measure("Depthwise, forward", shapes, [False], EVERYONE, config)
    # A step of XLA's own takes seconds here.
    measure("Depthwise, with gradients", shapes, [True], OURS_AND_TORCH, config)


def measure_plain(config: Config) -> None:
    shapes = [(*shape, 1) for shape in config.plain]
    measure("Convolution", shapes, [False, True], EVERYONE, config)


def main(config: Config) -> None:
    measure_depthwise(config)
    measure_plain(config)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
