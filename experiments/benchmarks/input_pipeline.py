"""Pictures a second: a folder of JPEG files through the input pipeline, and by Pillow alone.

Measured  `data.image_folder(..., cache=False)` read by `data.batches` with workers, as
          training reads it (decoded, checked for its size, turned upright, mirrored,
          batched, and handed to the main process as bytes, which the compiled step
          scales to [-1, 1]), against as many
          processes that only decode the same files with Pillow into arrays and throw
          them away. In turn, on the same cores; the ratio of each round and its median.
          On a machine that others use, rates say little: the processor time that a
          picture takes in all processes together is measured as well, whose ratio is
          that of the rates where all cores are busy. Files are crops of the pictures
          that come with scikit-image, written here.
Run       python experiments/benchmarks/input_pipeline.py            (about 1 min on 2 CPU cores)
          python experiments/benchmarks/input_pipeline.py --workers 4 --rounds 15
"""

import dataclasses
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from jaxmodels import cpu

PICTURES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
# The pipeline reads ahead; what it has ready when its turn comes is not what it reads a second.
READ_AHEAD = 10


@dataclasses.dataclass(frozen=True)
class Config:
    count: int = 2048
    """Files in the folder."""
    image_size: int = 224
    quality: int = 90
    """Of JPEG."""
    batch_size: int = 64
    batches: int = 40
    """Timed in a turn."""
    workers: int = 2
    """Of the pipeline, and processes of Pillow; 0 is two threads that read ahead, against two."""
    rounds: int = 7


def main(config: Config) -> None:
    cpu.tune()  # as experiments do
    with tempfile.TemporaryDirectory() as folder:
        files = write_pictures(config, Path(folder))
        alone(config, Path(folder), files)
        processes = config.workers or 2
        with multiprocessing.get_context("spawn").Pool(processes, cpu.tune) as pool:
            stream = open_stream(config, Path(folder))
            decode_all(config, pool, files)
            rates, costs = [], []
            for number in range(config.rounds):
                ours, pillow = read_all(config, stream), decode_all(config, pool, files)
                rates.append(ours[0] / pillow[0])
                costs.append(pillow[1] / ours[1])
                print(
                    f"round {number + 1}: jaxmodels {ours[0]:6.0f} pictures/s, {ours[1]:.3f} ms of "
                    f"processor time each; Pillow {pillow[0]:6.0f}, {pillow[1]:.3f} ms",
                    flush=True,
                )
            stream.close()
    readers = f"{config.workers} workers" if config.workers else "2 threads"
    print(f"{readers}, {config.image_size} x {config.image_size}, of Pillow:")
    for name, ratios in (("pictures a second", rates), ("pictures a processor second", costs)):
        middle = statistics.median(ratios)
        print(f"  {name}: {middle:.1%} ({min(ratios):.1%} to {max(ratios):.1%})")


def write_pictures(config: Config, folder: Path) -> list[str]:
    """Random crops in two classes; the paths."""
    import skimage

    bundled = Path(skimage.__file__).parent / "data"
    whole = [Image.open(bundled / name).convert("RGB") for name in PICTURES]
    rng, paths = np.random.default_rng(0), []
    for number in range(config.count):
        image = whole[number % len(whole)]
        side = int(rng.integers(min(200, min(image.size)), min(image.size) + 1))
        left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
        crop = image.crop((left, top, left + side, top + side))
        path = folder / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        crop.resize((config.image_size, config.image_size)).save(path, quality=config.quality)
        paths.append(str(path))
    return paths


def open_stream(config: Config, folder: Path) -> Iterator:
    from jaxmodels import data

    dataset = data.image_folder(folder, image_size=config.image_size, cache=False)
    return data.batches(
        dataset, config.batch_size, seed=0, num_workers=config.workers, compact=True
    )


def read_all(config: Config, stream: Iterator) -> tuple[float, float]:
    """Pictures a second through the pipeline, and milliseconds of processor time for each."""
    for _ in itertools.islice(stream, READ_AHEAD):
        pass
    found = timed(
        config.batches * config.batch_size,
        lambda: [None for _ in itertools.islice(stream, config.batches)],
    )
    time.sleep(1)  # workers fill their buffers, and leave the cores to whoever is next
    return found


def decode_all(config: Config, pool, files: list[str]) -> tuple[float, float]:
    """The same by Pillow in the processes of a pool."""
    wanted = list(itertools.islice(itertools.cycle(files), config.batches * config.batch_size))
    chunk = -(-len(wanted) // 32)
    parts = [wanted[start : start + chunk] for start in range(0, len(wanted), chunk)]
    return timed(len(wanted), lambda: pool.map(decode, parts, chunksize=1))


def timed(count: int, work: Callable[[], object]) -> tuple[float, float]:
    used, started = processor_seconds(), time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return count / seconds, (processor_seconds() - used) / count * 1e3


def processor_seconds() -> float:
    """Of this process and its children, so far; the kernel counts hundredths."""
    ids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    fields = [Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split() for number in ids]
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


def decode(paths: list[str]) -> None:
    for path in paths:
        with Image.open(path) as image:
            np.asarray(image.convert("RGB"))


def alone(config: Config, folder: Path, files: list[str]) -> None:
    """Processor time of a picture in one thread, ours without its way to the main process."""
    from jaxmodels import data

    dataset = data.image_folder(folder, image_size=config.image_size, cache=False)
    rng, count = np.random.default_rng(0), min(len(files), 512)
    used = {"Pillow": [], "jaxmodels": []}
    for _ in range(3):
        for name in used:
            started = time.process_time()
            if name == "Pillow":
                decode(files[:count])
            else:
                for part in np.array_split(np.arange(count), -(-count // config.batch_size)):
                    dataset.compact_batch(part, rng)
            used[name].append((time.process_time() - started) / count * 1e3)
    for name, times in used.items():
        print(f"{name}: {min(times):.3f} ms of processor time a picture, in one thread")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
