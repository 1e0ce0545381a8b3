"""The supervisor: what it starts again, what it does not, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmodels import launch
from jaxmodels.training.supervisor import TEMPORARY, supervise

# A program that counts its lives in a file and ends each as the list says.
_LIVES = """
import os, pathlib, signal, sys
lives = pathlib.Path(sys.argv[1]) / os.environ.get("JAXMODELS_PROCESS_ID", "0")
life = len(lives.read_text()) if lives.exists() else 0
lives.write_text("x" * (life + 1))
ends = [int(n) for n in sys.argv[2].split(",")]
end = ends[min(life, len(ends) - 1)]
if end < 0:
    os.kill(os.getpid(), -end)
sys.exit(end)
"""


def lives(folder, ends, **options):
    status = supervise([sys.executable, "-c", _LIVES, str(folder), ends], **options)
    return status, {p.name: len(p.read_text()) for p in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "ends, restarts, status, count",
    [
        ("0", 3, 0, 1),
        (f"-9,{TEMPORARY},0", 3, 0, 3),  # killed, then a lost peer, then well
        ("1,0", 3, 1, 1),  # wrong input stays wrong
        ("-9,0", 0, 128 + 9, 1),
        (f"{TEMPORARY}", 1, TEMPORARY, 2),
    ],
)
def test_starts_again_what_may_pass(tmp_path, capfd, ends, restarts, status, count):
    assert lives(tmp_path, ends, restarts=restarts) == (status, {"0": count})
    said = capfd.readouterr().err.splitlines()
    assert sum("restart" in line for line in said) == count - 1
    if ends.startswith("-9"):
        assert said[0].startswith("jaxmodels.launch: the process was ended by SIGKILL")


def test_all_processes_start_again(tmp_path):
    assert lives(tmp_path, "-9,0", processes_count=3, restarts=1) == (0, {"0": 2, "1": 2, "2": 2})


@pytest.mark.parametrize(
    "statuses, status, said",
    [
        # What is seen first need not be the cause, and what follows from it comes in any form.
        ((TEMPORARY, 1), 1, "process 1 ended with status 1"),
        ((-6, 1), 1, "process 1 ended with status 1"),
        ((1, -9), 128 + 9, "process 1 was ended by SIGKILL"),
        ((TEMPORARY, -6), TEMPORARY, "process 0 ended with status 75"),
    ],
)
def test_the_process_at_fault_is_found(capfd, statuses, status, said):
    program = (
        "import os, sys, time; i = int(os.environ['JAXMODELS_PROCESS_ID']); time.sleep(0.3 * i); "
        f"end = {statuses}[i]; os.kill(os.getpid(), -end) if end < 0 else sys.exit(end)"
    )
    assert supervise([sys.executable, "-c", program], processes_count=2) == status
    assert said in capfd.readouterr().err


def test_a_process_that_waits_for_a_dead_one_is_ended():
    program = "import os, time; i = int(os.environ['JAXMODELS_PROCESS_ID']); "
    program += "i or os.kill(os.getpid(), 9); time.sleep(600)"
    started = time.monotonic()
    assert supervise([sys.executable, "-c", program], processes_count=2) == 128 + signal.SIGKILL
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "reaction, status", [("sys.exit(143)", 143), ("time.sleep(600)", 128 + signal.SIGKILL)]
)
def test_sigterm_is_handed_on_and_has_a_deadline(tmp_path, reaction, status):
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, sys, time, pathlib\n"
        f"def stop(*_):\n    {reaction}\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "time.sleep(600)\n"
    )
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "jaxmodels.launch", "--restarts", "3", "--stop-seconds", "0.5"]
    launched = subprocess.Popen([*command, script, ready], stderr=subprocess.PIPE, text=True)
    while not ready.exists():
        time.sleep(0.01)
    launched.send_signal(signal.SIGTERM)
    _, said = launched.communicate(timeout=60)
    assert launched.returncode == status
    assert ("killed" in said) == (status != 143)
    assert "restart" not in said


def test_processes_die_with_the_launcher(tmp_path):
    child = tmp_path / "child"
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time, pathlib\n"
        "part = pathlib.Path(sys.argv[1] + '.part')\n"
        "part.write_text(str(os.getpid()))\n"
        "part.rename(sys.argv[1])\n"
        "time.sleep(600)\n"
    )
    launched = subprocess.Popen([sys.executable, "-m", "jaxmodels.launch", script, child])
    while not child.exists():
        time.sleep(0.01)
    launched.kill()
    launched.wait()
    number, deadline = int(child.read_text()), time.monotonic() + 20
    while alive(number):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(number):
    """Whether a process runs; one that its parent has not asked about does not."""
    try:
        os.kill(number, 0)
        status = Path(f"/proc/{number}/stat").read_text()
        return status.rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_wrong_counts_are_refused(capsys):
    with pytest.raises(ValueError, match="processes_count=0 must be positive"):
        supervise(["true"], processes_count=0)
    with pytest.raises(SystemExit):
        launch.main(["-n", "0", "script.py"])
    assert "-n must be positive" in capsys.readouterr().err
