"""The harness of every experiment: folders, results, and how a run that fails ends."""

import json
import os
import re
import subprocess
import sys
import textwrap

import jax
import pytest

from jaxmodels.training import experiment

SCRIPT = """
    '''A script.

    Claim     two is two
    '''
    import dataclasses, os, time
    from pathlib import Path
    from jaxmodels.training.experiment import Result, run

    @dataclasses.dataclass(frozen=True)
    class Config:
        number: int = 2
        log_every: int = 1
        fail: str = ""
        folder: Path | None = None

    def main(config, folder):
        count = folder / "visits"
        count.write_text(count.read_text() + "x" if count.exists() else "x")
        if config.fail == "value":
            raise ValueError("main: number=2 is not three; pass 3")
        if config.fail == "bug":
            raise KeyError("bug")
        if config.fail == "die":
            os._exit(9)
        return Result("two is two", "Peano 1889", config.number == 2, {"number": config.number})

    if __name__ == "__main__":
        run(main, Config)
"""


@pytest.fixture
def launch(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def run(*arguments):
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
        return subprocess.run(
            [sys.executable, script, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )

    run.folders = lambda: sorted((tmp_path / "runs" / "toy").iterdir())
    return run


def test_result_says_what_was_found_where_and_with_what(launch):
    done = launch()
    assert done.returncode == 0, done.stderr
    assert "The claim holds: two is two" in done.stdout
    (folder,) = launch.folders()
    result = json.loads((folder / "result.json").read_text())
    assert result["measured"] == {"number": 2} and result["holds"] is True
    assert result["source"] == "Peano 1889" and 0 <= result["seconds"] < 60
    assert result["peak_memory_gb"] > 0.05
    assert result["hardware"]["devices"] and result["versions"]["jax"]
    assert json.loads((folder / "config.json").read_text())["number"] == 2


def test_unfinished_run_is_gone_on_with_and_a_finished_one_is_left_alone(launch):
    assert launch("--fail", "die").returncode == 9
    assert launch("--fail", "die", "--log-every", "5").returncode == 9
    (first,) = launch.folders()
    assert (first / "visits").read_text() == "xx"
    assert launch("--number", "3").returncode == 0
    assert len(launch.folders()) == 2  # another configuration is another run
    (finished,) = set(launch.folders()) - {first}
    assert launch("--number", "3", "--folder", "mine").returncode == 0
    assert (finished / "visits").read_text() == "x"
    assert (first / "visits").read_text() == "xx"


def test_wrong_input_is_one_message_and_a_traceback_in_the_folder(launch):
    failed = launch("--fail", "value")
    assert failed.returncode == 1
    assert failed.stderr.strip() == "toy.py: main: number=2 is not three; pass 3"
    (folder,) = launch.folders()
    assert "Traceback" in (folder / "error.txt").read_text()
    assert not (folder / "result.json").exists()


def test_a_bug_keeps_its_traceback(launch):
    failed = launch("--fail", "bug")
    assert failed.returncode == 1
    assert "KeyError" in failed.stderr and "Traceback" in failed.stderr


def test_unknown_flag(launch):
    failed = launch("--numbre", "3")
    assert failed.returncode == 2
    assert "numbre" in failed.stderr and "--number" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_two_processes_do_not_share_a_folder(launch, tmp_path):
    import filelock

    (tmp_path / "mine").mkdir()
    with filelock.FileLock(tmp_path / "mine" / ".lock"):
        failed = launch("--folder", "mine")
    assert failed.returncode == 1
    assert "another process is working in mine" in failed.stderr
    assert launch("--folder", "mine").returncode == 0
    with filelock.FileLock(tmp_path / "mine" / ".lock"):
        failed = launch("--folder", "mine")
    # It says who was the last to work there.
    assert re.search(r"run: process \d+ on \S+ is working in mine; wait", failed.stderr)


def test_a_folder_that_cannot_be_written_is_named(launch, tmp_path):
    (tmp_path / "file").touch()
    failed = launch("--folder", "file/inside")
    assert failed.returncode == 1
    assert "toy.py: run: cannot write in file/inside (Not a directory)" in failed.stderr
    assert "choose another with --folder" in failed.stderr


def test_wrong_runtime_flags_are_refused(launch):
    failed = launch("--restarts", "-1")
    assert failed.returncode == 1
    assert failed.stderr.strip() == (
        "toy.py: Runtime: restarts=-1 must not be negative and stall_seconds=600.0 must be positive"
    )


def test_a_lost_peer_is_told_from_wrong_input(monkeypatch):
    """As JAX raises it, and as the checkpointer wraps it."""
    gone = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    wrapped = OSError("Checkpointer: a checkpoint could not be written")
    wrapped.__cause__ = gone
    cases = {gone: True, wrapped: True, ValueError("steps=0 must be at least 1"): False}
    for count in (2, 1):
        monkeypatch.setattr(jax, "process_count", lambda count=count: count)
        assert {e: experiment._lost_peer(e) for e in cases} == {
            e: lost and count > 1 for e, lost in cases.items()
        }


def test_another_configuration_in_the_same_folder_is_refused(launch, tmp_path):
    launch("--folder", "mine", "--fail", "die")
    failed = launch("--folder", "mine", "--number", "3")
    assert failed.returncode == 1
    assert "fail: there 'die', now ''; number: there 2, now 3" in failed.stderr
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["number"] == 2
