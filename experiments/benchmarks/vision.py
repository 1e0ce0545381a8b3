"""Vision on a CPU: networks against transformers on torch, and what they are made of.

Aim       ViT-S/16, batch 8, forward and training step: 0.9 times the speed of the better
          of torch eager and compiled, or more; ResNet-50, batch 8, forward: 0.8 times
          the better of these in both memory layouts; the time of Swin grows with the
          number of pixels to the power of 1.1 at most. The aims of the other parts are
          those of the files they come from
Measured  models       the same networks with equally many parameters, float32, images of
                       224 x 224 in NHWC here; a training step is forward, backward and
                       AdamW on the cross-entropy
          swin         Swin-T on one image of growing size; the exponent is fitted
          depthwise, convolution                      `vision_convolution.py`
          deformable                                  `vision_ops.py`
          augmentation                                `augmentation.py`
Run       python experiments/benchmarks/vision.py            (about 15 min on 2 CPU cores)
          python experiments/benchmarks/vision.py --parts models --no-compile
          python experiments/benchmarks/vision.py --help
"""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import augmentation
import numpy as np
import tyro
import vision_convolution
import vision_ops
from _timing import Contest, print_ratios

Part = Literal["models", "swin", "depthwise", "convolution", "deformable", "augmentation"]

BATCH, SIZE, CLASSES = 8, 224, 1000
THREADS = 2
LEARNING_RATE, DECAY = 1e-4, 0.05


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
      parts: see above.
      rounds: turns of each contender in a case.
      compile: also measures torch.compile.
      swin_sizes: sides of the image for Swin-T.
    """

    parts: tuple[Part, ...] = (
        *("models", "swin", "depthwise", "convolution", "deformable", "augmentation"),
    )
    rounds: int = 5
    compile: bool = True
    swin_sizes: tuple[int, ...] = (224, 448, 672, 896)


class Case(NamedTuple):
    model: Literal["ViT-S/16", "ResNet-50", "Swin-T"]
    train: bool = False
    batch: int = BATCH
    size: int = SIZE

    def __str__(self) -> str:
        return f"{self.model} {'training step' if self.train else 'forward'}"


REGISTERED = {
    "ViT-S/16": "vit_small_patch16_224",
    "ResNet-50": "resnet50",
    "Swin-T": "swin_tiny_patch4_window7_224",
}


def example(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Images, channels last, and labels."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (case.batch, case.size, case.size, 3)).astype(np.float32)
    return images, rng.integers(0, CLASSES, case.batch)


def jaxmodels(case: Case, devices: int) -> Callable[[], None]:
    """Ours on one device that uses all cores, or the batch split over one for each core."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
    from jaxmodels import cpu

    cpu.tune()
    import jax
    import optax

    from jaxmodels import create_model, training

    model = create_model(REGISTERED[case.model])
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=DECAY)
    mesh = training.make_mesh(f"data={devices}")
    batch = training.shard_batch(example(case), mesh)
    inputs = {"images": batch[0]}
    state = training.init_state(model, optimizer, jax.random.key(0), inputs, mesh=mesh)
    if not case.train:
        variables = {"params": state.params, **state.model_state}
        forward = jax.jit(model.apply)
        return lambda: forward(variables, batch[0]).block_until_ready()

    def loss_fn(params, batch, key):
        logits = model.apply({"params": params}, batch[0], train=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), {}

    step = training.make_step(loss_fn, optimizer)

    def call():
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return call


def torch_peer(case: Case, compiled: bool, channels_last: bool = False) -> Callable[[], None]:
    """transformers' network, eager or through torch.compile, in either memory layout."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    if case.model == "ViT-S/16":
        size = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
        config = transformers.ViTConfig(**size, num_labels=CLASSES)
        model = transformers.ViTForImageClassification(config)
    else:
        config = transformers.ResNetConfig(num_labels=CLASSES)
        model = transformers.ResNetForImageClassification(config)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)
    images, labels = map(torch.tensor, example(case))
    images = images.permute(0, 3, 1, 2).contiguous(memory_format=layout)
    network = torch.compile(model) if compiled else model
    if not case.train:
        model.eval()

        def call():
            with torch.inference_mode():
                network(images)

        return call
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=DECAY, fused=True
    )

    def call():
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(network(images).logits, labels).backward()
        optimizer.step()

    return call


def models(config: Config) -> None:
    """ViT-S/16 and ResNet-50 against transformers'."""
    ours = {
        "jaxmodels": partial(jaxmodels, devices=1),
        "a device per core": partial(jaxmodels, devices=THREADS),
    }
    kinds = {"eager": False, "compiled": True} if config.compile else {"eager": False}
    for layouts, cases in (
        ({"": False}, [Case("ViT-S/16"), Case("ViT-S/16", train=True)]),
        ({" NCHW": False, " NHWC": True}, [Case("ResNet-50")]),
    ):
        peers = {
            f"torch {kind}{layout}": partial(torch_peer, compiled=compiled, channels_last=last)
            for kind, compiled in kinds.items()
            for layout, last in layouts.items()
        }
        with Contest(ours | peers) as contest:
            results = {
                str(case): contest.compare(case, rounds=config.rounds, turn_seconds=2)
                for case in cases
            }
        title = f"batch {BATCH}, float32, {THREADS} threads; the better torch counts"
        print_ratios(title, results, ours="jaxmodels")


def swin(config: Config) -> None:
    """Time of Swin-T against the number of pixels; noise only adds, so the fastest round counts."""
    seconds = []
    with Contest({"jaxmodels": partial(jaxmodels, devices=1)}) as alone:
        for size in config.swin_sizes:
            times = alone.compare(Case("Swin-T", batch=1, size=size), rounds=config.rounds)
            seconds.append(min(times["jaxmodels"]))
            print(f"Swin-T, one image of {size} x {size}: {1e3 * seconds[-1]:.1f} ms", flush=True)
    exponent, _ = np.polyfit(2 * np.log(config.swin_sizes), np.log(seconds), 1)
    print(f"time grows with the number of pixels to the power of {exponent:.2f}", flush=True)


def main(config: Config) -> None:
    convolutions = vision_convolution.Config(rounds=config.rounds)
    parts: dict[Part, Callable[[], None]] = {
        "models": lambda: models(config),
        "swin": lambda: swin(config),
        "depthwise": lambda: vision_convolution.measure_depthwise(convolutions),
        "convolution": lambda: vision_convolution.measure_plain(convolutions),
        "deformable": lambda: vision_ops.main(vision_ops.Config(rounds=config.rounds)),
        "augmentation": lambda: augmentation.main(augmentation.Config(rounds=config.rounds)),
    }
    for part in config.parts:
        parts[part]()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
