"""The main job in a short configuration: complete, killed, misused, on other pictures."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from diffusers import DiTTransformer2DModel
from PIL import Image
from skimage.data import lfw_subset

from jaxmodels import load_pretrained
from jaxmodels.training.logging import read_metrics

NAME = "rectified_flow_dit.py"
SCRIPT = Path(__file__).parents[2] / "experiments" / NAME
SMALL = ("--width", 32, "--depth", 2, "--batch-size", 64, "--warmup", 5, "--checkpoint-every", 10)
SHORT = (*SMALL, "--steps", 80, "--sampling-steps", 1, 4, "--num-samples", 360, "--folder", "run")
DENSITIES = ("logit_normal_0_1", "uniform")


@pytest.fixture(scope="module")
def finished(launch, tmp_path_factory):
    """An undisturbed run: its folder, its output, and the seconds it took."""
    cwd, started = tmp_path_factory.mktemp("finished"), time.monotonic()
    output, errors = (process := launch(NAME, *SHORT, cwd=cwd)).communicate()
    assert process.returncode == 0, errors
    return cwd / "run", output, time.monotonic() - started


def final_bits(folder):
    """Every number of the last checkpoints, bit for bit."""
    bits = {}
    for density in DENSITIES:
        path = folder / density / "checkpoints" / "80" / "state"
        with ocp.StandardCheckpointer() as reader:
            tree = reader.restore(path.resolve())
        for name, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            numbers = jax.random.key_data(leaf) if is_key else leaf
            bits[density, jax.tree_util.keystr(name)] = np.asarray(numbers).tobytes()
    return bits


def test_writes_what_it_promises(finished):
    folder, output, _ = finished
    assert "logit_normal_0_1: step 80/80" in output and "steps/s" in output
    result = json.loads((folder / "result.json").read_text())
    measured = result["measured"]
    assert measured["real_svm_accuracy"] >= 0.98
    assert {
        f"{p}{m}_{n}_steps"
        for p in ("", "baseline_")
        for n in (1, 4)
        for m in ("accuracy", "frechet_ratio", "neighbour_ratio")
    } <= set(measured)
    assert result["holds"] == (measured["baseline_frechet_over_ours"] > 1)
    with Image.open(folder / "figure.png") as figure:
        assert figure.size[0] > 1000
    for density in DENSITIES:
        records = read_metrics(folder / density / "metrics.jsonl")
        assert [r["step"] for r in records] == list(range(10, 81, 10))
        assert records[-1]["loss"] < 0.8 * records[0]["loss"]
        assert list((folder / density).glob("events.out.tfevents.*"))


def test_learned_weights_run_in_diffusers(finished):
    folder, _, _ = finished
    model, variables = load_pretrained(folder / "model")
    peer = DiTTransformer2DModel.from_pretrained(folder / "model", low_cpu_mem_usage=False)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8, 8, 1)).astype(np.float32)
    t, labels = np.array([1.0, 500.0, 999.0], np.float32), np.array([0, 7, 9])
    ours = model.apply(variables, *map(jnp.asarray, (x, t, labels)))
    with torch.no_grad():
        theirs = peer(
            torch.tensor(x.transpose(0, 3, 1, 2)),
            timestep=torch.tensor(t),
            class_labels=torch.tensor(labels),
        ).sample
    assert np.abs(ours).max() > 0.1
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


def test_killed_at_random_moments_it_ends_with_the_same_bits(finished, launch, tmp_path):
    folder, _, seconds = finished
    moments = random.Random(0)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        process = launch(NAME, *SHORT, cwd=tmp_path)
        try:
            process.communicate(timeout=moments.uniform(0.3, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        process.communicate()
    _, errors = (process := launch(NAME, *SHORT, cwd=tmp_path)).communicate()
    assert process.returncode == 0, errors
    assert final_bits(tmp_path / "run") == final_bits(folder)
    before = json.loads((folder / "result.json").read_text())["measured"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["measured"] == before


@pytest.fixture
def faces(tmp_path):
    """Faces and other patches as class folders, with two files that are not pictures."""
    root = tmp_path / "pictures"
    for i, picture in enumerate(lfw_subset()):
        kind = root / ("face" if i < 100 else "other")
        kind.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray((picture * 255).astype(np.uint8))
        pixels.save(kind / (f"{i}.png" if i % 2 else f"{i}.jpg"))
    (root / "face" / "text.png").write_text("not a picture")
    whole = (root / "other" / "150.jpg").read_bytes()
    (root / "other" / "150.jpg").write_bytes(whole[: len(whole) // 2])
    return root


def test_trains_on_a_folder_of_pictures(launch, faces, tmp_path):
    flags = ("--data", faces, "--image-size", 16, "--patch-size", 4, "--batch-size", 16)
    short = ("--steps", 12, "--sampling-steps", 2, "--num-samples", 40, "--folder", "run")
    process = launch(NAME, *SMALL, *flags, *short, cwd=tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "skipped 2 of 201 pictures" in errors
    assert "text.png" in errors and "150.jpg" in errors
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (config["sample_size"], config["in_channels"]) == (16, 3)
    strict = launch(NAME, *SMALL, *flags, *short, "--strict", "--folder", "b", cwd=tmp_path)
    _, errors = strict.communicate()
    assert strict.returncode == 1 and "Traceback" not in errors
    assert "text.png" in errors and "150.jpg" in errors and "Repair or remove" in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "dit_s_3"), "unknown model 'dit_s_3'; did you mean 'dit_s_"),
        (("--patch-size", "3"), "patch_size=3 does not divide input_size=8"),
        (("--num-heads", "5"), "width=32 must be a multiple of"),
        (("--density", "logit_norm"), "unknown density 'logit_norm'; did you mean 'logit_normal'"),
        (("--mesh", "data=3"), "'data=3' asks for 3 devices but there are 8"),
        (("--precision", "float4"), "precision='float4' is not a policy"),
        (("--data", "nowhere"), "'nowhere' does not exist"),
        (("--batch-size", "5000"), "batch_size=5000 is more than the 1437"),
        (("--num-samples", "10"), "num_samples=10 is fewer than the 360 held-out pictures"),
        (("--steps", "5"), "warmup=5 must be at least 0 and below steps=5"),
        (("--baseline", "logit_normal(0, 1)"), "density and baseline are the same"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *SMALL, "--steps", 12, *flags)
