"""Experiments run as a user runs them: as processes, in a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """Starts `python experiments/<name> <arguments>` in a folder; a Popen whose output is text."""
    # The processes of a session share one compilation cache, and see one device as users do.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
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
