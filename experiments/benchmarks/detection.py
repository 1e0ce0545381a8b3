"""What detectors do after their convolutions, on a CPU: suppression, and features of boxes.

Aim       exact non-maximum suppression of 2,000 and 10,000 boxes: at least 8 times the
          speed of a loop over kept boxes in NumPy, and 30 times that of one over torch
          tensors. RoIAlign of 512 RoIs, 7 x 7, of a map of 50 x 50 with 256 channels:
          at least twice the speed of torch's grid_sample and avg_pool2d
Measured  in turns, in float32, in processes of their own: boxes thrown over an image, of
          which most are kept ("sparse"), and 50 around each object ("crowded"), at two
          thresholds, also with all cores for XLA, whose threads wait for each other longer
          than they compute; RoIAlign forward, and forward with the gradient of the map, torch
          in both memory layouts. COCO's evaluation is in `detection_coco.py`
Run       python experiments/benchmarks/detection.py         (about 4 min on 2 CPU cores)
          python experiments/benchmarks/detection.py --parts roi_align
          python experiments/benchmarks/detection.py --help
"""

import dataclasses
import os
from typing import Literal, NamedTuple

import numpy as np
import tyro
from _timing import Contest, print_ratios

Part = Literal["nms", "roi_align"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
      parts: see above.
      boxes: how many are suppressed.
      rois: how many RoIs are pooled.
      rounds: turns of each contender in a case.
      turn_seconds: length of a turn.
    """

    parts: tuple[Part, ...] = ("nms", "roi_align")
    boxes: tuple[int, ...] = (2000, 10000)
    rois: int = 512
    rounds: int = 5
    turn_seconds: float = 0.2


class Scene(NamedTuple):
    """Boxes to suppress; `kept` is known from running it once."""

    boxes: int
    crowded: bool
    iou_threshold: float
    kept: int = 0

    def __str__(self):
        kind = "crowded" if self.crowded else "sparse"
        return f"{self.boxes} boxes, {kind}, IoU > {self.iou_threshold}: {self.kept} kept"


def scenes(counts: tuple[int, ...]) -> list[Scene]:
    """The figures asked for."""
    drawn = [
        Scene(count, crowded, threshold)
        for count in counts
        for crowded in (False, True)
        for threshold in (0.5, 0.7)
    ]
    return [scene._replace(kept=len(numpy_loop(scene)())) for scene in drawn]


def boxes_and_scores(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """On 1000 x 1000 pixels."""
    rng = np.random.default_rng(0)
    if scene.crowded:
        objects = scene.boxes // 50
        which = rng.integers(objects, size=scene.boxes)
        sides = rng.uniform(32, 256, size=(objects, 2))[which]
        centres = rng.uniform(0, 1000, size=(objects, 2))[which]
        centres = centres + sides * rng.normal(0, 0.1, size=sides.shape)
        sides = sides * np.exp(rng.normal(0, 0.15, size=sides.shape))
    else:
        sides = rng.uniform(8, 64, size=(scene.boxes, 2))
        centres = rng.uniform(0, 1000, size=sides.shape)
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    return boxes.astype(np.float32), rng.uniform(size=scene.boxes).astype(np.float32)


def jaxmodels_nms(scene: Scene):
    """On one core, as torch is: XLA has as many threads as the process has cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return jaxmodels_nms_all_cores(scene)


def jaxmodels_nms_all_cores(scene: Scene):
    from jaxmodels import cpu

    cpu.tune()
    import jax

    from jaxmodels.ops.nms import nms

    boxes, scores = map(jax.numpy.asarray, boxes_and_scores(scene))
    suppress = jax.jit(nms, static_argnums=2)
    kept = np.flatnonzero(suppress(boxes, scores, scene.iou_threshold))
    np.testing.assert_array_equal(kept, np.sort(numpy_loop(scene)()))
    return lambda: jax.block_until_ready(suppress(boxes, scores, scene.iou_threshold))


def numpy_loop(scene: Scene):
    """The best box silences the rest, then the best of those left."""
    boxes, scores = boxes_and_scores(scene)
    x1, y1, x2, y2 = np.ascontiguousarray(boxes.T)

    def suppress():
        areas, kept = (x2 - x1) * (y2 - y1), []
        left = np.argsort(-scores, kind="stable")
        while left.size:
            best, left = left[0], left[1:]
            kept.append(best)
            wide = np.minimum(x2[best], x2[left]) - np.maximum(x1[best], x1[left])
            high = np.minimum(y2[best], y2[left]) - np.maximum(y1[best], y1[left])
            shared = np.maximum(wide, 0) * np.maximum(high, 0)
            overlap = shared / (areas[best] + areas[left] - shared)
            left = left[overlap <= scene.iou_threshold]
        return kept

    return suppress


def torch_loop(scene: Scene):
    import torch

    torch.set_num_threads(1)  # the tensors are too small to be shared between cores
    boxes, scores = map(torch.from_numpy, boxes_and_scores(scene))
    x1, y1, x2, y2 = boxes.T.contiguous()

    def suppress():
        areas, kept = (x2 - x1) * (y2 - y1), []
        left = scores.argsort(descending=True, stable=True)
        while left.numel():
            best, left = left[0], left[1:]
            kept.append(best)
            wide = torch.minimum(x2[best], x2[left]) - torch.maximum(x1[best], x1[left])
            high = torch.minimum(y2[best], y2[left]) - torch.maximum(y1[best], y1[left])
            shared = wide.clamp(min=0) * high.clamp(min=0)
            overlap = shared / (areas[best] + areas[left] - shared)
            left = left[overlap <= scene.iou_threshold]
        return kept

    return suppress


class Align(NamedTuple):
    """RoIAlign, 7 x 7, two by two samples a bin, of one map of 50 x 50 pixels, stride 16."""

    rois: int
    backward: bool
    side: int = 50
    channels: int = 256

    def __str__(self):
        return f"{self.rois} RoIs 7x7, forward{' + backward' if self.backward else ''}"


def align_inputs(case: Align) -> tuple[np.ndarray, ...]:
    """Map, RoIs inside the image, and the cotangent of the output."""
    rng = np.random.default_rng(0)
    extent = 16 * case.side
    sides = rng.uniform(32, extent / 2, size=(case.rois, 2))
    low = rng.uniform(0, 1, size=sides.shape) * (extent - sides)
    x = rng.normal(size=(1, case.side, case.side, case.channels))
    cotangent = rng.normal(size=(1, case.rois, 7, 7, case.channels))
    rois = np.concatenate([low, low + sides], axis=1)[None]
    return tuple(a.astype(np.float32) for a in (x, rois, cotangent))


def jaxmodels_align(case: Align):
    from jaxmodels import cpu

    cpu.tune()
    import jax
    import jax.numpy as jnp

    from jaxmodels.ops.roi_align import roi_align

    x, rois, cotangent = map(jnp.asarray, align_inputs(case))

    def forward(x, rois):
        return roi_align(x, rois, 7, stride=16)

    def both(x, rois, cotangent):
        out, pull_back = jax.vjp(lambda x: forward(x, rois), x)
        return out, pull_back(cotangent)  # the value too: torch computes it

    if case.backward:
        step = jax.jit(both)
        return lambda: jax.block_until_ready(step(x, rois, cotangent))
    step = jax.jit(forward)
    return lambda: jax.block_until_ready(step(x, rois))


def torch_contiguous(case: Align):
    return torch_align(case, channels_last=False)


def torch_channels_last(case: Align):
    return torch_align(case, channels_last=True)


def torch_align(case: Align, *, channels_last: bool):
    import torch
    from torch.nn import functional

    torch.set_num_threads(os.cpu_count())
    x, rois, cotangent = map(torch.from_numpy, align_inputs(case))
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x = x.permute(0, 3, 1, 2).contiguous(memory_format=memory)
    # (1, C, N 7, 7), as it comes out.
    cotangent = cotangent[0].permute(3, 0, 1, 2).reshape(1, case.channels, -1, 7)
    cotangent = cotangent.contiguous(memory_format=memory)
    shares = (torch.arange(14) + 0.5) / 14

    def forward(x):
        low, high = rois[0, :, None, :2], rois[0, :, None, 2:]
        points = (low + (high - low) * shares[:, None]) * (2 / (16 * case.side)) - 1
        shape = (case.rois, 14, 14)
        grid = (points[:, None, :, 0].expand(shape), points[:, :, None, 1].expand(shape))
        grid = torch.stack(grid, dim=-1).reshape(1, -1, 14, 2)
        read = functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
        return functional.avg_pool2d(read, 2)

    x.requires_grad_(case.backward)
    if case.backward:

        def both():
            out = forward(x)
            return out, torch.autograd.grad(out, x, cotangent)

        return both
    return lambda: forward(x)


def main(config: Config) -> None:
    turns = {"rounds": config.rounds, "turn_seconds": config.turn_seconds}
    if "nms" in config.parts:
        contenders = {
            "jaxmodels": jaxmodels_nms,
            "all cores": jaxmodels_nms_all_cores,
            "numpy loop": numpy_loop,
            "torch loop": torch_loop,
        }
        compare("Exact non-maximum suppression, float32", contenders, scenes(config.boxes), turns)
    if "roi_align" in config.parts:
        contenders = {
            "jaxmodels": jaxmodels_align,
            "torch": torch_contiguous,
            "torch channels last": torch_channels_last,
        }
        cases = [Align(config.rois, backward) for backward in (False, True)]
        compare("RoIAlign of (1, 50, 50, 256), float32", contenders, cases, turns)


def compare(title: str, contenders: dict, cases: list, turns: dict) -> None:
    results = {}
    with Contest(contenders) as contest:
        for case in cases:
            results[str(case)] = contest.compare(case, **turns)
            print(f"measured {case}", flush=True)
    print_ratios(title, results, ours="jaxmodels")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
