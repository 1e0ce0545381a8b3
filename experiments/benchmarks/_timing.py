"""Fair timing on a shared CPU: contenders take turns in processes of their own.

Times drift by a factor of two on a shared machine, so only ratios from one
alternating run mean anything. Thread pools also spin for a while after their
work is done and would slow down whoever comes next, so each contender lives in
its own process, is asleep on a pipe while the others run, and warms up
untimed when its turn comes.

A contender is a module-level function `make(case) -> call`: it runs in the
worker process, imports its framework, builds inputs, and returns a function of
no arguments that does the work once and blocks until it is finished.

    def ours(case): import jax; ...; return lambda: step(x).block_until_ready()
    def peer(case): import torch; ...; return lambda: model(x)

    def main():
        with Contest({"jaxmodels": ours, "torch": peer}) as contest:
            results = {"forward": contest.compare(case), ...}
        print_ratios("DiT-S/2", results, ours="jaxmodels")

    if __name__ == "__main__":   # required: workers import the script anew
        main()
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Table

# Thread pools stop spinning well within this time after their last task.
_SETTLE_SECONDS = 0.03


class Contest:
    """Worker processes, one a contender, that are timed in alternation."""

    def __init__(self, contenders: Mapping[str, Callable]):
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = {}, []
        for name, make in contenders.items():
            pipe, child = context.Pipe()
            process = context.Process(target=_serve, args=(make, child), daemon=True)
            process.start()
            child.close()
            self._pipes[name] = pipe
            self._processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pipe in self._pipes.values():
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            process.terminate()

    def compare(
        self, case, *, rounds: int = 7, turn_seconds: float = 0.25
    ) -> dict[str, list[float]]:
        """Times every contender on `case`, in turn, `rounds` times.

        Args:
          case: any picklable value; passed to each contender's `make`.
          rounds: how often each contender has its turn.
          turn_seconds: length of a turn; the call is repeated to fill it.

        Returns:
          Per contender the seconds of one call (the median of a turn), one
          figure a round; figures of the same round belong together.
        """
        repeats = {}
        for name, pipe in self._pipes.items():
            pipe.send(("make", case))
            once = _receive(name, pipe)
            repeats[name] = max(1, min(200, round(turn_seconds / once)))
        seconds = {name: [] for name in self._pipes}
        for _ in range(rounds):
            for name, pipe in self._pipes.items():
                time.sleep(_SETTLE_SECONDS)
                pipe.send(("time", repeats[name]))
                seconds[name].append(_receive(name, pipe))
        return seconds


def _receive(name: str, pipe) -> float:
    try:
        answer = pipe.recv()
    except EOFError:
        raise RuntimeError(f"benchmark: the process of {name!r} died") from None
    if isinstance(answer, str):
        raise RuntimeError(f"benchmark: {name!r} failed: {answer}")
    return answer


def _serve(make: Callable, pipe) -> None:
    call = None
    while True:
        try:
            order, value = pipe.recv()
        except EOFError:
            return
        try:
            if order == "make":
                call = None  # frees the previous case first
                call = make(value)
                call()  # compiles
                pipe.send(_median_seconds(call, 2))
            else:
                pipe.send(_median_seconds(call, value))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")


def _median_seconds(call: Callable, repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def speed_ratio(ours: list[float], peer: list[float]) -> tuple[float, float, float]:
    """Our speed over the peer's: median, lowest and highest of the rounds.

    Above one means that ours is faster.
    """
    ratios = sorted(b / a for a, b in zip(ours, peer, strict=True))
    return statistics.median(ratios), ratios[0], ratios[-1]


def print_ratios(title: str, results: Mapping[str, Mapping[str, list[float]]], *, ours: str):
    """Prints a row a case: our median time, and each peer's time and our speed over it.

    Args:
      title: heading of the table.
      results: case name to what `Contest.compare` returned.
      ours: the contender that the others are compared with.
    """
    peers = [name for name in next(iter(results.values())) if name != ours]
    table = Table(title=f"{title}\nspeed over peer: median (lowest, highest round); > 1 is faster")
    table.add_column("case", no_wrap=True)
    table.add_column(f"{ours} ms", justify="right")
    for peer in peers:
        table.add_column(f"{peer} ms", justify="right")
        table.add_column(f"x {peer}", justify="right")
    for case, seconds in results.items():
        row = [case, f"{1e3 * statistics.median(seconds[ours]):.2f}"]
        for peer in peers:
            middle, low, high = speed_ratio(seconds[ours], seconds[peer])
            row.append(f"{1e3 * statistics.median(seconds[peer]):.2f}")
            row.append(f"{middle:.2f} ({low:.2f}, {high:.2f})")
        table.add_row(*row)
    Console(width=max(140, Console().width)).print(table)
    print(
        "Each contender in its own process, taking turns; idle ones wait on a pipe "
        "(no thread pool spins), and each turn starts with an untimed call."
    )
