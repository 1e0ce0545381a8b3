"""Starts a script in several processes on this machine, which train as one.

    python -m jaxmodels.launch -n 2 experiments/rectified_flow_dit.py --steps 100

Every process gets its own part of each batch; the devices of all are one mesh. With
`--restarts`, a run that was killed or lost a process is started again and goes on from
its last checkpoint. On a cluster nothing of this is needed: its scheduler starts the
script in every process, and `training.processes.start` finds the others.
"""

import argparse
import sys

from jaxmodels.training.supervisor import supervise


def main(arguments: list[str] | None = None) -> int:
    """Parses a command line; returns the exit status."""
    # Everything after the script belongs to the script, which tyro cannot say.
    parser = argparse.ArgumentParser(
        prog="python -m jaxmodels.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-n", "--processes", type=int, default=1, help="how many; default 1")
    parser.add_argument("--restarts", type=int, default=0, help="how often; default 0")
    parser.add_argument(
        "--stop-seconds", type=float, default=60.0, help="to save in after SIGTERM; default 60"
    )
    parser.add_argument("script", help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    options = parser.parse_args(arguments)
    if options.processes < 1 or options.restarts < 0 or options.stop_seconds < 0:
        parser.error("-n must be positive, --restarts and --stop-seconds not negative")
    return supervise(
        [sys.executable, options.script, *options.arguments],
        processes_count=options.processes,
        restarts=options.restarts,
        stop_seconds=options.stop_seconds,
    )


if __name__ == "__main__":
    raise SystemExit(main())
