"""Experiments run as a user runs them: as processes, in a folder of their own."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
# Scripts that tests run in this process find their neighbours, as Python lets them otherwise.
sys.path.append(str(EXPERIMENTS))


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """Starts `python experiments/<name> <arguments>` in a folder; a Popen whose output is text."""
    # The processes of a session share one compilation cache, see one device as users do, and
    # compile as little as the suite itself.
    environment = dict(os.environ)
    flags = (flag for flag in environment["XLA_FLAGS"].split() if "device_count" not in flag)
    environment["XLA_FLAGS"] = " ".join(flags)
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("xla"))

    def start(name, *arguments, cwd):
        return subprocess.Popen(
            [sys.executable, EXPERIMENTS / name, *map(str, arguments)],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a script in this process; returns the one line that it refuses its arguments with."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(EXPERIMENTS / name), run_name="__main__")
        assert stopped.value.code == 1
        errors = capsys.readouterr().err
        assert errors.startswith(name) and len(errors.splitlines()) == 1
        return errors

    return run
