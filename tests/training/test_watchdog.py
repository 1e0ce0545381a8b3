"""The watchdog ends what hangs, and nothing else."""

import subprocess
import sys
import textwrap

SCRIPT = """
    import sys, time
    from jaxmodels.training.watchdog import Watchdog

    with Watchdog(float(sys.argv[1]), "training") as watchdog:
        for step in range(int(sys.argv[2])):
            watchdog.beat(step + 1)
        time.sleep(float(sys.argv[3]))
    time.sleep(0.3)
    print("went on")
"""


def run(*arguments):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_hanging_ends_with_a_line_and_status_75():
    done = run("0.1", "2", "100")
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr.startswith(
        "training: no progress for 0 s after step 2, a peer or the input hangs"
    )


def test_the_first_step_may_take_ten_times_as_long_and_the_end_any_time():
    assert run("0.2", "0", "0.5").stdout == "went on\n"
    assert run("0.1", "2", "0").stdout == "went on\n"
    assert run("0.02", "1", "100").returncode == 75
