"""Operations on images on a CPU against compositions in torch.

Aim       deformable convolution, 3 x 3 with 256 channels on 50 x 50 pixels: at
          least twice the speed of sampling all taps by torch's grid_sample and
          multiplying them by the kernel in one matrix product
Measured  forward, and forward with all gradients, in float32; ours and torch take
          turns in processes of their own; torch in both memory layouts
Run       python experiments/benchmarks/vision_ops.py         (about 2 min on 2 CPU cores)
          python experiments/benchmarks/vision_ops.py --help
"""

import dataclasses
import os
from typing import NamedTuple

import numpy as np
import tyro
from _timing import Contest, print_ratios


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
      rounds: turns of each contender in a case.
      turn_seconds: length of a turn.
    """

    rounds: int = 7
    turn_seconds: float = 0.3


class Deformable(NamedTuple):
    """A 3 x 3 deformable convolution that keeps the size of its image."""

    batch: int
    side: int
    channels: int
    modulated: bool
    backward: bool

    def __str__(self):
        shape = (self.batch, self.side, self.side, self.channels)
        return (
            f"deformable v{2 if self.modulated else 1} 3x3 {shape}, forward"
            f"{' + backward' if self.backward else ''}"
        )


def deformable_cases() -> list[Deformable]:
    """The figure asked for, with and without masks, and a larger batch of smaller images."""
    return [
        Deformable(batch, side, channels, modulated, backward)
        for batch, side, channels in ((1, 50, 256), (4, 28, 128))
        for modulated in (False, True)
        for backward in (False, True)
    ]


def deformable_inputs(case: Deformable) -> list[np.ndarray]:
    """Image, kernel, offsets, mask or none, and last the cotangent of the output."""
    rng = np.random.default_rng(0)
    image = (case.batch, case.side, case.side, case.channels)
    taps = (case.batch, case.side, case.side, 1, 3, 3)
    arrays = [rng.normal(size=image), rng.normal(size=(3, 3, case.channels, case.channels))]
    arrays.append(rng.normal(0, 2, size=(*taps, 2)))
    if case.modulated:
        arrays.append(rng.uniform(size=taps))
    return [a.astype(np.float32) for a in (*arrays, rng.normal(size=image))]


def jaxmodels(case: Deformable):
    from jaxmodels import cpu

    cpu.tune()
    import jax
    import jax.numpy as jnp

    from jaxmodels.ops.deformable import deformable_convolution

    *inputs, cotangent = map(jnp.asarray, deformable_inputs(case))

    def forward(x, kernel, offsets, mask=None):
        return deformable_convolution(x, kernel, offsets, mask=mask, padding=1)

    def both(*inputs):
        out, pull_back = jax.vjp(forward, *inputs)
        return out, pull_back(cotangent)  # the value too: torch computes it

    step = jax.jit(both if case.backward else forward)
    return lambda: jax.block_until_ready(step(*inputs))


def torch_contiguous(case: Deformable):
    return time_torch(case, channels_last=False)


def torch_channels_last(case: Deformable):
    return time_torch(case, channels_last=True)


def time_torch(case: Deformable, *, channels_last: bool):
    """The taps stand outermost, so that the sampled image is the matrix to multiply."""
    import torch

    torch.set_num_threads(os.cpu_count())
    *arrays, cotangent = deformable_inputs(case)
    batch, side, channels = case.batch, case.side, case.channels
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.from_numpy(arrays[0]).permute(0, 3, 1, 2).contiguous(memory_format=memory)
    kernel = torch.from_numpy(arrays[1]).permute(3, 2, 0, 1).reshape(channels, -1).contiguous()
    # (B, 9, V, U, (dx, dy))
    offsets = torch.from_numpy(arrays[2]).reshape(batch, side, side, 9, 2).flip(-1)
    offsets = offsets.permute(0, 3, 1, 2, 4).contiguous()
    inputs = [x, kernel, offsets]
    if case.modulated:
        mask = torch.from_numpy(arrays[3]).reshape(batch, side, side, 9).permute(0, 3, 1, 2)
        inputs.append(mask.contiguous())
    cotangent = torch.from_numpy(cotangent).permute(0, 3, 1, 2).reshape(batch, channels, -1)
    cotangent = cotangent.contiguous()
    where, tap = torch.arange(float(side)), torch.arange(-1.0, 2.0)
    px = (tap[None, :, None, None] + where).expand(3, 3, side, side)
    py = (tap[:, None, None, None] + where[:, None]).expand(3, 3, side, side)
    rigid = torch.stack([px, py], dim=-1).reshape(1, 9, side, side, 2)

    def forward(x, kernel, offsets, mask=None):
        grid = ((rigid + offsets) * (2 / (side - 1)) - 1).reshape(batch, 9 * side, side, 2)
        taps = torch.nn.functional.grid_sample(x, grid, align_corners=True)
        taps = taps.reshape(batch, channels, 9, side, side)
        if mask is not None:
            taps = taps * mask[:, None]
        return kernel @ taps.reshape(batch, channels * 9, -1)

    for tensor in inputs:
        tensor.requires_grad_(case.backward)
    if case.backward:
        return lambda: torch.autograd.grad(forward(*inputs), inputs, cotangent)
    return lambda: forward(*inputs)


def main(config: Config) -> None:
    contenders = {
        "jaxmodels": jaxmodels,
        "torch": torch_contiguous,
        "torch channels last": torch_channels_last,
    }
    results = {}
    with Contest(contenders) as contest:
        for case in deformable_cases():
            results[str(case)] = contest.compare(
                case, rounds=config.rounds, turn_seconds=config.turn_seconds
            )
            print(f"measured {case}", flush=True)
    print_ratios("Deformable convolution, float32", results, ours="jaxmodels")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
