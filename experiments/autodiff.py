"""A define-by-run tape in a hundred lines, beside JAX's transformations of functions.

Claim     The gradient of a scalar function by reverse mode costs at most five times the
          function, however many inputs it has, and forward mode does the same for one
          input and any number of outputs (Baur and Strassen 1983; Griewank and Walther
          2008, "Evaluating Derivatives", sections 3.2 and 3.3). Recording operations as
          they run (Chainer, PyTorch) and transforming functions (JAX) give the same
          derivatives.
Measured  Gradients of a classifier's loss on digits by the tape below, by `jax.grad` and by
          central differences; `jvp`, `vjp` and a Hessian-vector product (forward over
          reverse) against differences; all in float64. A loop whose length depends on its
          data: what the tape, `grad`, `jit` and `while_loop` make of it. Floating point
          operations of Jacobians over those of their function, as XLA counts them, for
          numbers of inputs and outputs; and of the gradient, as the tape counts them.
Run       python experiments/autodiff.py            (about 15 s on 2 CPU cores)
          python experiments/autodiff.py --help
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import data, plots
from jaxmodels.training.experiment import Result, run

CHEAP = 5.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    hidden: int = 16
    """Width of the classifier."""
    batch_size: int = 32
    sizes: tuple[int, ...] = (1, 4, 16, 64, 256)
    """Numbers of inputs, and of outputs, whose Jacobians are counted."""
    width: int = 64
    """Of the function whose Jacobians are counted."""
    seed: int = 0
    folder: Path | None = None
    """Where results go; by default runs/autodiff/TIME."""


class Tape:
    """Remembers every operation in the order in which it ran.

    Control flow is Python's own: what was not run is not on the tape. Played
    backwards, each operation turns the gradient of its result into those of its
    operands. `forward_work` and `backward_work` count additions and multiplications.
    """

    def __init__(self):
        self.records: list[tuple[Variable, tuple[Variable, ...], Callable]] = []
        self.forward_work = 0
        self.backward_work = 0

    def variable(self, value) -> "Variable":
        return Variable(self, np.asarray(value, np.float64))

    def record(self, value, operands, pull, work: int, pull_work: int) -> "Variable":
        """Notes a result, and how its gradient is pulled back to its operands."""
        result = self.variable(value)
        self.records.append((result, operands, pull))
        self.forward_work += work
        result.pull_work = pull_work
        return result

    def gradient(self, output: "Variable", inputs: Sequence["Variable"]) -> list[np.ndarray]:
        """d output / d inputs, of a scalar, in one pass over the tape."""
        grads = {id(output): np.ones_like(output.value)}
        for result, operands, pull in reversed(self.records):
            if id(result) not in grads:
                continue  # nothing of it reaches the output
            self.backward_work += result.pull_work
            for operand, grad in zip(operands, pull(grads.pop(id(result))), strict=True):
                grad = _sum_to(grad, operand.value.shape)
                if id(operand) in grads:
                    self.backward_work += grad.size
                    grad = grad + grads[id(operand)]
                grads[id(operand)] = grad
        return [grads.get(id(x), np.zeros_like(x.value)) for x in inputs]


class Variable:
    """A value on a tape; arithmetic with it, or NumPy arrays beside it, is recorded."""

    __array_ufunc__ = None  # NumPy leaves `array * variable` to us
    pull_work = 0

    def __init__(self, tape: Tape, value: np.ndarray):
        self.tape, self.value = tape, value

    def _other(self, other) -> "Variable":
        return other if isinstance(other, Variable) else self.tape.variable(other)

    def _elementwise(self, other, value, pull, pull_work: int) -> "Variable":
        size = value.size
        return self.tape.record(value, (self, other), pull, size, pull_work * size)

    def __add__(self, other):
        other = self._other(other)
        return self._elementwise(other, self.value + other.value, lambda g: (g, g), 0)

    def __sub__(self, other):
        other = self._other(other)
        return self._elementwise(other, self.value - other.value, lambda g: (g, -g), 1)

    def __mul__(self, other):
        other = self._other(other)
        a, b = self.value, other.value
        return self._elementwise(other, a * b, lambda g: (g * b, g * a), 2)

    def __truediv__(self, other):
        other = self._other(other)
        a, b = self.value, other.value
        return self._elementwise(other, a / b, lambda g: (g / b, -g * a / (b * b)), 5)

    def __matmul__(self, other):
        other = self._other(other)
        a, b = self.value, other.value
        work = 2 * a.size * b.shape[1]
        return self.tape.record(a @ b, (self, other), lambda g: (g @ b.T, a.T @ g), work, 2 * work)

    def __radd__(self, other):
        return self._other(other) + self

    def __rsub__(self, other):
        return self._other(other) - self

    def __rmul__(self, other):
        return self._other(other) * self

    def __rtruediv__(self, other):
        return self._other(other) / self

    def __rmatmul__(self, other):
        return self._other(other) @ self

    def sum(self, axis=None, keepdims=False):
        value = self.value.sum(axis=axis, keepdims=keepdims)
        kept = self.value.sum(axis=axis, keepdims=True).shape
        shape = self.value.shape

        def pull(grad):
            return (np.broadcast_to(grad.reshape(kept), shape),)

        return self.tape.record(value, (self,), pull, self.value.size, 0)

    def _unary(self, value, slope) -> "Variable":
        size = value.size
        return self.tape.record(value, (self,), lambda g: (g * slope,), size, 2 * size)

    def exp(self):
        value = np.exp(self.value)
        return self._unary(value, value)

    def log(self):
        return self._unary(np.log(self.value), 1 / self.value)

    def tanh(self):
        value = np.tanh(self.value)
        return self._unary(value, 1 - value * value)


def _sum_to(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undoes broadcasting: what an entry was copied to is summed."""
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    stretched = [
        i for i, (have, want) in enumerate(zip(grad.shape, shape, strict=True)) if have != want
    ]
    return grad.sum(axis=tuple(stretched), keepdims=True)


def main(config: Config, folder: Path) -> Result:
    if min(config.hidden, config.batch_size, config.width, *config.sizes) < 1:
        raise ValueError("hidden, batch_size, width and sizes must be at least 1")
    if len({*config.sizes}) < 2:
        raise ValueError(f"sizes={config.sizes}: give two different numbers, a trend is sought")
    with jax.enable_x64(True):
        errors, tape_ratio = derivative_errors(config)
        errors |= loop_errors(2.0)
    work = {
        "forward": [work_ratio(jax.jacfwd, config, n, 1) for n in config.sizes],
        "reverse": [work_ratio(jax.jacrev, config, n, 1) for n in config.sizes],
        "forward, of outputs": [work_ratio(jax.jacfwd, config, 1, m) for m in config.sizes],
        "reverse, of outputs": [work_ratio(jax.jacrev, config, 1, m) for m in config.sizes],
    }
    draw_figure(config, folder, work)
    return conclude(config, errors, tape_ratio, work)


def classifier_loss(params, images, wanted, tanh: Callable, exp: Callable, log: Callable):
    """Mean cross-entropy of two layers: the same lines for the tape and for JAX."""
    hidden = tanh(images @ params[0] + params[1])
    logits = hidden @ params[2] + params[3]
    log_sum = log(exp(logits).sum(axis=1, keepdims=True))
    return ((log_sum - logits) * wanted).sum() / len(images)


def problem(config: Config) -> tuple[list[np.ndarray], Callable, Callable]:
    """Parameters, and the loss with the tape and with JAX."""
    images, labels = data.digits("train").take(np.arange(config.batch_size))
    images, wanted = images.reshape(len(labels), -1).astype(np.float64), np.eye(10)[labels]
    rng = np.random.default_rng(config.seed)
    shapes = (images.shape[1], config.hidden), (1, config.hidden), (config.hidden, 10), (1, 10)
    params = [rng.normal(size=shape) / np.sqrt(shape[0]) for shape in shapes]

    def by_tape(params):
        tape = Tape()
        variables = [tape.variable(p) for p in params]
        loss = classifier_loss(variables, images, wanted, Variable.tanh, Variable.exp, Variable.log)
        return tape, variables, loss

    def by_jax(params):
        return classifier_loss(params, images, wanted, jnp.tanh, jnp.exp, jnp.log)

    return params, by_tape, by_jax


def derivative_errors(config: Config) -> tuple[dict[str, float], float]:
    """Largest errors, over the largest entry of what is compared with.

    And the work of loss and gradient over that of the loss, as the tape counts it.
    """
    params, by_tape, by_jax = problem(config)
    rng = np.random.default_rng(config.seed + 1)
    direction = [rng.normal(size=p.shape) for p in params]

    def tape_gradient(params):
        tape, variables, loss = by_tape(params)
        return tape.gradient(loss, variables), tape

    def difference(function, epsilon=1e-5):
        """Along the direction: (f(p + e d) - f(p - e d)) / 2 e."""
        up, down = (
            function([p + sign * epsilon * d for p, d in zip(params, direction, strict=True)])
            for sign in (1, -1)
        )
        return jax.tree.map(lambda a, b: (a - b) / (2 * epsilon), up, down)

    gradient, tape = tape_gradient(params)
    grad = jax.grad(by_jax)
    value, slope = jax.jvp(by_jax, (params,), (direction,))
    _, pull = jax.vjp(by_jax, params)
    along = difference(lambda p: by_tape(p)[2].value)
    _, product = jax.jvp(grad, (params,), (direction,))
    errors = {
        "loss: tape and JAX": _error(value, by_tape(params)[2].value),
        "gradient: tape and jax.grad": _error(gradient, grad(params)),
        "gradient: tape and differences": _error(_dot(gradient, direction), along),
        "jvp and differences": _error(slope, along),
        "vjp and the tape": _error(pull(jnp.ones_like(value))[0], gradient),
        "Hessian-vector product and differences": _error(
            product, difference(lambda p: tape_gradient(p)[0])
        ),
    }
    return errors, 1 + tape.backward_work / tape.forward_work


def _dot(a, b) -> float:
    return sum(float(np.vdot(x, y)) for x, y in zip(a, b, strict=True))


def _error(found, exact) -> float:
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True))
    largest = max(float(np.abs(np.asarray(b)).max()) for _, b in pairs)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs) / largest


def newton_root(a, value: Callable = float):
    """The square root, by as many of Newton's steps as it takes; `value` looks at a number."""
    x = a
    while abs(value(x * x - a)) > 1e-12:
        x = (x + a / x) / 2
    return x


def loop_errors(a: float) -> dict[str, float | bool]:
    """A loop that ends by what it has computed; d sqrt(a) / da = 1 / (2 sqrt(a))."""
    exact = 0.5 / np.sqrt(a)
    tape = Tape()
    start = tape.variable(a)
    root = newton_root(start, lambda x: float(x.value))

    def compiled_loop(a):
        return jax.lax.while_loop(
            lambda x: jnp.abs(x * x - a) > 1e-12, lambda x: (x + a / x) / 2, a
        )

    return {
        "loop: tape": _error(tape.gradient(root, [start]), [exact]),
        "loop: jax.grad, not compiled": _error(jax.grad(concrete_root)(a), exact),
        "loop: jvp of while_loop": _error(jax.jvp(compiled_loop, (a,), (1.0,))[1], exact),
        "jit refuses a Python loop over values": _refuses(jax.jit(concrete_root), a),
        "while_loop refuses reverse mode": _refuses(jax.grad(compiled_loop), a),
    }


def concrete_root(a):
    """Under `grad` a number's value is known below the tracer; the loop may look at it."""
    return newton_root(a, lambda x: float(jax.lax.stop_gradient(x)))


def _refuses(function: Callable, a: float) -> bool:
    try:
        function(a)
    except (ValueError, TypeError):
        return True
    return False


def work_ratio(jacobian: Callable, config: Config, inputs: int, outputs: int) -> float:
    """Floating point operations of a Jacobian over those of its function, as XLA counts them."""
    keys = jax.random.split(jax.random.key(config.seed), 3)
    sizes = inputs, config.width, config.width, outputs
    kernels = [
        jax.random.normal(key, shape)
        for key, shape in zip(keys, itertools.pairwise(sizes), strict=True)
    ]

    def function(x):
        for kernel in kernels[:-1]:
            x = jnp.tanh(x @ kernel)
        return x @ kernels[-1]

    def work(function):
        return jax.jit(function).lower(jnp.ones(inputs)).compile().cost_analysis()["flops"]

    return work(lambda x: (function(x), jacobian(function)(x))) / work(function)


def exponent(sizes, values) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def conclude(
    config: Config, errors: dict, tape_ratio: float, work: dict[str, list[float]]
) -> Result:
    """The claim held against the numbers."""
    measured = {**errors, "tape: work of loss and gradient / loss": tape_ratio}
    for name, ratios in work.items():
        measured[f"work of {name}: largest ratio"] = max(ratios)
        measured[f"work of {name}: exponent"] = exponent(config.sizes, ratios)
    agree = all(v if isinstance(v, bool) else v < 1e-6 for v in errors.values())
    gradients = [tape_ratio, *work["reverse"], *work["forward, of outputs"]]
    return Result(
        claim=(
            f"a gradient costs at most {CHEAP:g} times its function by reverse mode, and so does "
            "forward mode for one input; a tape and JAX agree to 1e-6"
        ),
        source="Baur and Strassen 1983; Griewank and Walther 2008, sections 3.2 and 3.3",
        holds=bool(agree and max(gradients) <= CHEAP),
        measured=measured,
    )


def draw_figure(config: Config, folder: Path, work: dict[str, list[float]]) -> None:
    """Work against numbers of inputs and of outputs."""
    figure = plots.new_figure(width=11.0, height=4.6)
    axes = figure.subplots(1, 2, sharey=True)
    for side, of, what in ((axes[0], "", "inputs"), (axes[1], ", of outputs", "outputs")):
        sizes = np.array(config.sizes)
        lines = {
            f"{mode} mode": (sizes, np.array(work[mode + of])) for mode in ("forward", "reverse")
        }
        lines[f"{CHEAP:g} times"] = (sizes, np.full(len(sizes), CHEAP))
        title = f"{what}, one {'output' if what == 'inputs' else 'input'}"
        label = f"number of {what}"
        plots.curve(side, lines, label, "work / function's", logx=True, logy=True, title=title)
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
