"""Every kind of fault, in a real run: nothing is lost, and the same bits come out."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent / "scripts" / "small_run.py"
TWO = ("-m", "jaxmodels.launch", "-n", "2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def launch(tmp_path, cache):
    def run(*arguments, launcher=(), environment=None, wait=True):
        command = [sys.executable, *launcher, SCRIPT, *arguments]
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=tmp_path,
            env={
                **os.environ,
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "XLA_FLAGS": "",
                **(environment or {}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return ended(process) if wait else process

    return run


def ended(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    """Parameters and loss curve of runs that nothing happened to, by launcher."""
    found = {}

    def get(launcher):
        if launcher not in found:
            folder = tmp_path_factory.mktemp("undisturbed")
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": ""}
            command = [sys.executable, *launcher, SCRIPT, "--folder", folder]
            subprocess.run(command, check=True, env=environment, capture_output=True)
            found[launcher] = outcome(folder)
        return found[launcher]

    return get


def outcome(folder):
    with np.load(folder / "params.npz") as arrays:
        bits = {name: array.tobytes() for name, array in arrays.items()}
    return bits, (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "launcher, fault, said",
    [
        ((), "kill:13:0", "the process was ended by SIGKILL"),
        ((), "hang:13:0", "the process ended with status 75"),
        (TWO, "kill:13:0", "process 0 was ended by SIGKILL"),
        (TWO, "kill:13:1", "process 1 was ended by SIGKILL"),
        (TWO, "stop:13:1", "process 0 ended with status 75"),
    ],
)
def test_starts_again_and_ends_with_the_same_bits(
    launch, undisturbed, tmp_path, launcher, fault, said
):
    stall = () if "kill" in fault else ("--stall-seconds", "12")
    restarts = ("--restarts", "2")
    before, after = (restarts, ()) if launcher else ((), restarts)
    options = (*after, "--folder", tmp_path / "run", "--fault", fault, *stall)
    status, out, err = launch(*options, launcher=launcher + before)
    assert status == 0, err
    assert re.search(rf"jaxmodels.launch: {said} after \d+ s; restart 1 of 2", err)
    assert "restart 2" not in err
    if stall:
        assert re.search(r"no progress for 12 s after step 1\d, a peer or the input hangs", err)
    assert out.count("The claim holds") == 1
    assert outcome(tmp_path / "run") == undisturbed(launcher)


@pytest.mark.parametrize("launcher", [(), TWO])
def test_sigterm_saves_in_all_processes_at_one_step(launch, undisturbed, tmp_path, launcher):
    """Checkpoints are steps apart, so that one can only be there for the signal's sake."""
    rare = ("--checkpoint-every", "1000", "--folder", tmp_path / "run")
    status, out, err = launch(*rare, "--fault", "term:3:0", launcher=launcher)
    assert status == 143, err
    step = int(re.search(r"training: SIGTERM at step (\d+); saved to", out)[1])
    assert [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()] == [step]
    status, _, err = launch(*rare, "--fault", "term:3:0", launcher=launcher)
    assert status == 0, err
    assert outcome(tmp_path / "run") == undisturbed(launcher)


def test_a_file_that_vanishes_ends_all_processes_and_is_not_tried_again(launch, tmp_path):
    options = ("--folder", tmp_path / "run", "--fault", "gone:8:1")
    status, _, err = launch(*options, launcher=(*TWO, "--restarts", "2"))
    assert status == 1
    assert re.search(r"process 1: small_run.py: .*No such file or directory: .*not there", err)
    assert "restart" not in err and "Traceback" not in err
    assert (tmp_path / "run" / "checkpoints" / "5").is_dir()


def test_goes_on_with_another_number_of_processes_and_another_mesh(launch, undisturbed, tmp_path):
    killed = ("--folder", tmp_path / "run", "--fault", "kill:13:1")
    assert launch(*killed, "--mesh", "fsdp=2", launcher=TWO)[0] != 0
    four = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    status, _, err = launch(*killed, "--mesh", "data=2,fsdp=2", environment=four)
    assert status == 0, err
    curves = [
        np.array(
            [[r["step"], r["loss"], r["grad_norm"]] for r in map(json.loads, text.splitlines())]
        )
        for _, text in (outcome(tmp_path / "run"), undisturbed(()))
    ]
    np.testing.assert_allclose(*curves, rtol=1e-5)


def test_processes_started_differently_are_told_so(launch, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        launch(
            *("--folder", tmp_path / "run", "--batch-size", size),
            environment={
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAXMODELS_NUM_PROCESSES": "2",
                "JAXMODELS_PROCESS_ID": str(i),
            },
            wait=False,
        )
        for i, size in enumerate((16, 8))
    ]
    for i, process in enumerate(started):
        status, _, err = ended(process)
        assert status == 1
        assert f"process {i}: small_run.py: run: processes were started with different" in err
        assert "batch_size: process 0 16, process 1 8" in err
