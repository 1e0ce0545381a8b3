"""What a compiled program sends between devices, read from the program itself."""

import math
import re
from collections import Counter

_TYPES = {"pred": 1, "f8": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_TYPES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def bytes_sent(program: str) -> dict[str, int]:
    """The bytes that one device sends in one run, by the kind of collective.

    Of an array of n bytes among P devices, in a ring: an all-reduce sends
    2 (P - 1) / P n, an all-gather (n gathered), reduce-scatter (n before it) or
    all-to-all (P - 1) / P n, a permutation n. Loops count as often as they run; one
    whose number of rounds is not known counts once, and every branch counts.

    Args:
      program: the text of a compiled step, `jax.jit(f).lower(...).compile().as_text()`.

    Returns:
      Bytes by kind ("all-reduce", ...); a kind that is not there is not in it.

    Source: the costs of Patarasuk and Yuan 2009, see `ops.ring_all_reduce`.
    """
    computations, entry = _computations(program)
    total: Counter[str] = Counter()
    times = {name: 0 for name in computations}
    _count(entry, 1, computations, times)
    for name, lines in computations.items():
        for line in lines if times[name] else ():
            if found := _COLLECTIVE.search(line):
                total[found[2]] += times[name] * _sent(found[2], found[1], line, bool(found[3]))
    return dict(total)


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in program.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[1]
            computations[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def _count(name: str, times: int, computations: dict, seen: dict[str, int]) -> None:
    """Adds to `seen` how often a computation, and each that it calls, runs."""
    seen[name] += times
    for line in computations[name]:
        trips = _TRIPS.search(line)
        called = _CALLED.findall(line)
        for group in _BRANCHES.findall(line):
            called += [branch.strip().lstrip("%") for branch in group.split(",")]
        for other in called:
            if other in computations:
                _count(other, times * int(trips[1]) if trips else times, computations, seen)


def _sent(kind: str, result: str, line: str, starts: bool) -> int:
    size = sum(
        math.prod(int(n) for n in dims.split(",") if n) * _TYPES.get(dtype, 4)
        for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", result)
    )
    # One that only starts has its operands in its result, before what will be there.
    if kind == "collective-permute":
        return size // 2 if starts else size
    devices = _group_size(line)
    if kind == "all-gather" and starts:
        size = size * devices // (devices + 1)
    # The result of a reduce-scatter is one part of what there was.
    whole = devices * size if kind == "reduce-scatter" else size
    return (2 if kind == "all-reduce" else 1) * (devices - 1) * whole // devices


def _group_size(line: str) -> int:
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", line):
        sizes = dict(re.findall(r"('\w+')=(\d+)", found[1]))
        # An axis, or a part of one as 'axis':(before)size.
        axes = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(size or sizes[axis]) for axis, size in axes)
    raise ValueError(f"bytes_sent: cannot read the groups of {line.strip()[:200]!r}")
