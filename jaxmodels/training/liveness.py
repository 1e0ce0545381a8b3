"""How much memory a traced function needs beside its arguments, without compiling it.

The equations of a jaxpr are run through in order, and the bytes of what is still needed
are added up. What XLA computes inside a loop over the elements of a consumer takes no
memory of its own: elementwise operations and rearrangements that go into one another.
Buffers are those of products, convolutions, reductions, loops, gathers and sorts, and of
elementwise results that such an operation reads or that several costly ones would
repeat.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

# Have buffers of their own whatever reads them.
_OWN = {
    "all_gather", "argsort", "concatenate", "cond", "conv_general_dilated", "cumlogsumexp",
    "cummax", "cummin", "cumprod", "cumsum", "dot_general", "dynamic_update_slice", "gather",
    "ragged_dot", "ragged_dot_general", "reduce_window", "reduce_window_max",
    "reduce_window_sum", "rng_bit_generator", "scan", "select_and_gather_add",
    "select_and_scatter_add", "sort", "stack", "threefry2x32", "top_k", "while",
}  # fmt: skip
# Read inside a loop over what they reduce; the result is a buffer.
_REDUCE = ("reduce_", "arg", "scatter")
# The same bytes under another shape; of what `ops.stored` stores, whoever reads it.
_STORED = "layout_constraint"
_VIEWS = {
    "reshape", "squeeze", "expand_dims", "copy", "optimization_barrier", "name", "pvary", _STORED,
}  # fmt: skip
# Leave an array split as it was.
_REARRANGE = _VIEWS | {
    "add_any", "broadcast_in_dim", "concatenate", "convert_element_type", "mul", "slice",
    "stack", "transpose", "unstack",
}  # fmt: skip
# Not computed twice for two readers.
_COSTLY = {
    "acos", "asin", "atan2", "cbrt", "cos", "digamma", "div", "erf", "erf_inv", "exp", "exp2",
    "expm1", "lgamma", "log", "log1p", "logistic", "pow", "rem", "rsqrt", "sin", "sqrt", "tan",
    "tanh",
}  # fmt: skip
_LOOPS = ("scan", "while", "cond")
# Buffers do not fit into one another without gaps: XLA's total over what lives at once.
_PACKING = 1.08
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclasses.dataclass
class _Node:
    """An equation, its values as numbers."""

    name: str
    inputs: list[int]
    outputs: list[int]
    params: dict[str, Any]

    @property
    def owns(self) -> bool:
        return self.name in _OWN or self.name.startswith(_REDUCE)


@functools.cache
def _barriers_hold() -> bool:
    """Whether XLA's programs for this backend still have the barriers of their functions."""
    probe = jax.jit(lambda x: jax.lax.optimization_barrier(jax.lax.sin(x)))
    return jax.default_backend() != "cpu" or " opt-barrier(" in probe.lower(0.0).compile().as_text()


class _Program:
    """A jaxpr without calls, and the bytes of every value."""

    def __init__(self, jaxpr: Any):
        self.nodes: list[_Node] = []
        self.bytes: list[int] = []
        self._found: dict[Any, list[int]] = {}
        self.inputs = [self._value(var.aval) for var in jaxpr.invars]
        self.outputs = self._inline(jaxpr, self.inputs)

    def _value(self, aval: Any) -> int:
        size = math.prod(getattr(aval, "shape", ()))
        self.bytes.append(size * getattr(getattr(aval, "dtype", None), "itemsize", 0))
        return len(self.bytes) - 1

    def _inline(self, jaxpr: Any, inputs: Sequence[int]) -> list[int]:
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        # Constants are part of the program.
        known |= {var: self._constant() for var in jaxpr.constvars}

        def number(atom):
            return self._constant(atom) if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            arguments = [number(atom) for atom in equation.invars]
            inner = _called(equation)
            if inner is None:
                results = self._add(equation, arguments)
            else:
                arguments = arguments[len(arguments) - len(inner.invars) :]
                results = self._inline(inner, self._kept_apart(equation, arguments))
            known |= zip(equation.outvars, results, strict=True)
        return [number(atom) for atom in jaxpr.outvars]

    def _add(self, equation: Any, arguments: list[int]) -> list[int]:
        """A node for an equation, or the one that computes the same already."""
        name, params = equation.primitive.name, equation.params
        key = name, *arguments, *(f"{k}={v}" for k, v in params.items() if name not in _LOOPS)
        if key in self._found and name not in _LOOPS:
            return self._found[key]
        results = [self._value(var.aval) for var in equation.outvars]
        self.nodes.append(_Node(name, arguments, results, params))
        self._found[key] = results
        return results

    def _kept_apart(self, equation: Any, arguments: list[int]) -> list[int]:
        """Arguments that are not recognised as the same, where a barrier hides them.

        On CPUs XLA takes barriers away before it merges what is computed twice, unless
        `cpu.tune` told it not to.
        """
        apart = equation.params.get("prevent_cse", False)
        if apart is False or not _barriers_hold():
            return arguments
        copies = []
        for value in arguments:
            self.bytes.append(self.bytes[value])
            copies.append(len(self.bytes) - 1)
            self.nodes.append(_Node("optimization_barrier", [value], copies[-1:], {}))
        return copies

    def _constant(self, literal: Any = None) -> int:
        key = None if literal is None else ("constant", str(literal.val), str(literal.aval))
        if key in self._found:
            return self._found[key][0]
        self.bytes.append(0)
        if key is not None:
            self._found[key] = [len(self.bytes) - 1]
        return len(self.bytes) - 1


def _called(equation: Any) -> Any:
    """The jaxpr of an equation that is a call, or None."""
    if equation.primitive.name == "scan" and equation.params["length"] == 1:
        return equation.params["jaxpr"].jaxpr  # XLA takes such a loop away
    if equation.primitive.name in _LOOPS:
        return None
    found = next((equation.params[k] for k in _CALLS if k in equation.params), None)
    return getattr(found, "jaxpr", found)


def peak_bytes(
    function: Any,
    *arguments: Any,
    argument_parts: Any = None,
    result_parts: Any = None,
    taken: int = 0,
) -> int:
    """The most bytes held at once beside the arguments, results included.

    Args:
      function: of trees of arrays; is traced.
      *arguments: arrays or `jax.ShapeDtypeStruct`s, of the size that one device computes
        with.
      argument_parts: into how many parts each argument is split over devices, leaves in
        order; by default all are whole. One that is split is gathered where a product
        reads it, and held until the last such product; a loop gathers a slice.
      result_parts: likewise for the first results; those after them are whole.
      taken: as many of the first results are needed no longer once they are made.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), True)
    program = _Program(jaxpr)
    if argument_parts is not None:
        _split(program, argument_parts, result_parts)
    return round(_PACKING * _peak(program, program.outputs, program.outputs[taken:]))


def _split(program: _Program, argument_parts: Sequence[int], result_parts: Sequence[int]) -> None:
    """Makes the parameters, their stacks and gradients as small as a device's part of them."""
    parts = {v: n for v, n in zip(program.inputs, argument_parts, strict=True) if n > 1}
    for node in program.nodes:
        read = [value for value in node.inputs if program.bytes[value]]
        if node.name in _REARRANGE and read and all(value in parts for value in read):
            parts |= dict.fromkeys(node.outputs, min(parts[value] for value in read))
    whole = dict(enumerate(program.bytes))
    program.nodes = _gathered(program, parts)
    for value, count in zip(program.outputs, result_parts, strict=False):
        if count > 1:
            parts[value] = count
    for node in reversed(program.nodes):
        counts = [parts[value] for value in node.outputs if value in parts]
        if node.name in _REARRANGE and counts:
            parts |= {v: counts[0] for v in node.inputs if v not in parts and v in whole}
    for value, count in parts.items():
        program.bytes[value] //= count


def _gathered(program: _Program, parts: dict[int, int]) -> list[_Node]:
    """The nodes, with one that gathers before the first product that reads what is split."""
    nodes, gathered = [], {}
    for node in program.nodes:
        if node.name in _OWN and node.name not in ("scan", "concatenate", "stack"):
            for value in set(node.inputs) & {*parts}:
                if value not in gathered:
                    program.bytes.append(program.bytes[value])
                    gathered[value] = len(program.bytes) - 1
                    nodes.append(_Node("all_gather", [value], [gathered[value]], {}))
            inputs = [gathered.get(value, value) for value in node.inputs]
            node = dataclasses.replace(node, inputs=inputs)
        nodes.append(node)
    return nodes


def _body_peak(jaxpr: Any, slices: int = 0, streamed: int = 0) -> int:
    """Of a jaxpr whose last `slices` arguments are read, and last `streamed` results written,
    a part of something larger that is held outside.
    """
    program = _Program(jaxpr)
    first = len(program.inputs) - slices
    program.nodes[:0] = [_Node("slice", [], [i], {}) for i in program.inputs[first:]]
    results = program.outputs[: len(program.outputs) - streamed]
    return _peak(program, results, results)


def _peak(program: _Program, results: Sequence[int], kept: Sequence[int]) -> int:
    buffers = _buffers(program, results)
    last = _last_uses(program, buffers, kept)
    live, peak, held = 0, 0, set()

    def release(step):
        nonlocal live, held
        gone = {value for value in held if last.get(value, -1) <= step}
        live -= sum(program.bytes[value] for value in gone)
        held -= gone

    for step, node in enumerate(program.nodes):
        if not node.owns:
            # An elementwise result may stand where an argument stood that is needed no more.
            release(step)
        made = {value for value in node.outputs if value in buffers}
        live += sum(program.bytes[value] for value in made)
        held |= made
        peak = max(peak, live + _inside(node))
        release(step)
    return peak


def _inside(node: _Node) -> int:
    """What a loop or a branch holds besides its results."""
    params = node.params
    if node.name == "scan":
        jaxpr = params["jaxpr"].jaxpr
        carried = params["num_consts"] + params["num_carry"]
        written = len(jaxpr.outvars) - params["num_carry"]
        return _body_peak(jaxpr, len(jaxpr.invars) - carried, written)
    if node.name == "while":
        return _body_peak(params["body_jaxpr"].jaxpr)
    if node.name == "cond":
        return max(_body_peak(branch.jaxpr) for branch in params["branches"])
    return 0


def _buffers(program: _Program, results: Sequence[int]) -> set[int]:
    """The values that are held; all others are computed where they are read."""
    readers: dict[int, list[_Node]] = {}
    for node in program.nodes:
        for value in set(node.inputs):
            readers.setdefault(value, []).append(node)
    chosen = {value for value in results if value not in program.inputs}
    stored = {_STORED, "optimization_barrier"} if _barriers_hold() else {_STORED}
    # Backwards, because a view of a value that is held holds it too.
    for node in reversed(program.nodes):
        for value in node.outputs:
            if node.name in _VIEWS:
                if value in chosen or node.name in stored or _read_whole(value, readers):
                    chosen.discard(value)
                    chosen.update(node.inputs)
            elif node.owns or _read_whole(value, readers) or _twice(node, value, readers):
                chosen.add(value)
    # Arguments are held by others, but for slices, which nodes before the others make.
    made = {value for node in program.nodes for value in node.outputs}
    return chosen & made


def _read_whole(value: int, readers: dict[int, list[_Node]]) -> bool:
    return any(node.name in _OWN for node in readers.get(value, ()))


def _twice(node: _Node, value: int, readers: dict[int, list[_Node]]) -> bool:
    """Whether a costly result would be computed by several readers."""
    return node.name in _COSTLY and len(readers.get(value, ())) > 1


def _last_uses(program: _Program, buffers: set[int], kept: Sequence[int]) -> dict[int, int]:
    """The last node that reads each buffer, through whatever is computed on the way."""
    sources: dict[int, frozenset[int]] = {}

    def of(value):
        if value in buffers:
            return frozenset((value,))
        return sources.get(value, frozenset())

    last: dict[int, int] = {}
    for step, node in enumerate(program.nodes):
        read = frozenset(itertools.chain.from_iterable(of(value) for value in node.inputs))
        for value in node.outputs:
            sources[value] = read
        if node.owns or any(value in buffers for value in node.outputs):
            last |= dict.fromkeys(read, step)
            last |= {value: max(step, last.get(value, step)) for value in node.outputs}
    end = len(program.nodes)
    for value in kept:
        last |= dict.fromkeys(of(value), end)
    return last
