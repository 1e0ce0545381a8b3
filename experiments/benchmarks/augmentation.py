"""Augmentation on a CPU: images a second, of each change and of all in turn.

Aim       256 images of 224 x 224 x 3 through all of them at 500 images/s or more
Measured  each augmentation compiled by itself, and `augment` with all of them; four
          of them also against torch (the same work for every image, written with
          grid_sample, interpolate and where; parameters drawn as here)
Run       python experiments/benchmarks/augmentation.py       (about 2 min on 2 CPU cores)
          python experiments/benchmarks/augmentation.py --help
"""

import dataclasses
import os
import statistics
from typing import NamedTuple

import numpy as np
import tyro
from _timing import Contest, print_ratios

PEERS = ("flip", "crop", "affine", "mixup")
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
      batch_size: images at once.
      image_size: rows and columns.
      rounds: turns of each contender in a case.
      turn_seconds: length of a turn.
    """

    batch_size: int = 256
    image_size: int = 224
    rounds: int = 5
    turn_seconds: float = 0.5


class Case(NamedTuple):
    names: tuple[str, ...]
    batch_size: int
    image_size: int


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Images in [-1, 1] and labels."""
    rng = np.random.default_rng(0)
    shape = (case.batch_size, case.image_size, case.image_size, 3)
    images = rng.uniform(-1, 1, shape).astype(np.float32)
    return images, rng.integers(CLASSES, size=case.batch_size)


def jaxmodels(case: Case):
    from jaxmodels import cpu

    cpu.tune()
    import jax
    import jax.numpy as jnp

    from jaxmodels.data.augmentation import augment

    images, labels = map(jnp.asarray, inputs(case))
    batch, key = {"image": images, "label": labels}, jax.random.key(0)
    change = jax.jit(lambda batch, key: augment(batch, key, case.names, num_classes=CLASSES))
    return lambda: jax.block_until_ready(change(batch, key))


def torch_peer(case: Case):
    import torch
    from torch.nn import functional

    torch.set_num_threads(os.cpu_count())
    images, labels = map(torch.from_numpy, inputs(case))
    # Channels last in memory, as ours; seen as (B, C, Y, X).
    images, count, size = images.permute(0, 3, 1, 2), case.batch_size, case.image_size
    soft = functional.one_hot(labels, CLASSES).float()

    def flip():
        return torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(3), images)

    def crop():
        sides = (size * torch.empty(count).uniform_(0.25, 1).sqrt()).int().tolist()
        cuts = [
            (torch.randint(size - side + 1, (2,)).tolist(), images[i : i + 1], side)
            for i, side in enumerate(sides)
        ]
        return torch.cat(
            [
                functional.interpolate(image[:, :, y : y + s, x : x + s], size, mode="bilinear")
                for (y, x), image, s in cuts
            ]
        )

    def affine():
        angle = torch.empty(count).uniform_(-0.26, 0.26)
        shift = torch.empty(2, count).uniform_(-0.2, 0.2)
        cos, sin = angle.cos(), angle.sin()
        maps = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1).reshape(-1, 2, 3)
        grid = functional.affine_grid(maps, images.shape, align_corners=False)
        return functional.grid_sample(images, grid, align_corners=False)

    def mixup():
        weight, partner = torch.rand(count, 1, 1, 1), torch.randperm(count)
        mixed = torch.lerp(images[partner], images, weight)
        return mixed, torch.lerp(soft[partner], soft, weight[:, 0, 0])

    return {"flip": flip, "crop": crop, "affine": affine, "mixup": mixup}[case.names[0]]


def main(config: Config) -> None:
    from jaxmodels.data.augmentation import AUGMENTATIONS

    size = (config.batch_size, config.image_size)
    turns = {"rounds": config.rounds, "turn_seconds": config.turn_seconds}
    seconds, against = {}, {}
    with Contest({"jaxmodels": jaxmodels}) as alone:
        for names in (*((name,) for name in AUGMENTATIONS), tuple(AUGMENTATIONS)):
            label = names[0] if len(names) == 1 else f"all {len(names)} in turn"
            seconds[label] = alone.compare(Case(names, *size), **turns)["jaxmodels"]
            times = [config.batch_size / s for s in seconds[label]]
            middle = statistics.median(times)
            print(
                f"{label:<16} {middle:8,.0f} images/s ({min(times):,.0f} to {max(times):,.0f})",
                flush=True,
            )
    with Contest({"jaxmodels": jaxmodels, "torch": torch_peer}) as contest:
        for name in PEERS:
            against[name] = contest.compare(Case((name,), *size), **turns)
    print_ratios(f"{size[0]} images of {size[1]} x {size[1]} x 3", against, ours="jaxmodels")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
