"""The tape against torch and NumPy, what it counts against counting by hand, and a short run."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

NAME = "autodiff.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(Path(__file__).parents[2] / "experiments" / NAME))


def busy(x, y, z, lib):
    """Every operation, with broadcasting in each direction, reuse, and plain arrays beside."""
    a = lib.tanh(x @ y) + z  # (3, 5) + (1, 5)
    b = (2.0 - a) * x.sum() / (1.5 + lib.exp(-1.0 * a))
    c = lib.log(3.0 + a * a) - b / 7.0
    d = (
        np.full((2, 3), 0.3) @ c
        if lib is not torch
        else torch.full((2, 3), 0.3, dtype=torch.float64) @ c
    )
    rows = c.sum(axis=1, keepdims=True) * z.sum(axis=0) + 1.0 / (2.0 + a * a)
    return (rows * rows).sum() + (d - z).sum()


class OnTape:
    """The functions of torch that `busy` names, for a tape's variables."""

    def __init__(self, script):
        variable = script["Variable"]
        self.tanh, self.exp, self.log = variable.tanh, variable.exp, variable.log


def test_the_tape_is_torchs(script):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in ((3, 2), (2, 5), (1, 5))]
    tape = script["Tape"]()
    variables = [tape.variable(a) for a in arrays]
    out = busy(*variables, OnTape(script))
    leaves = [torch.tensor(a, requires_grad=True) for a in arrays]
    want = busy(*leaves, torch)
    np.testing.assert_allclose(out.value, want.detach(), rtol=1e-12)
    unused = tape.variable(np.ones(4))
    found = tape.gradient(out, [*variables, unused])
    for ours, theirs in zip(found, torch.autograd.grad(want, leaves), strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    np.testing.assert_array_equal(found[3], 0)


def test_work_is_counted(script):
    """A product of (3, 2) and (2, 5): 2 * 30 forward, twice that back; a tanh; a sum."""
    tape = script["Tape"]()
    a, b = tape.variable(np.ones((3, 2))), tape.variable(np.ones((2, 5)))
    side = (a * 2.0).tanh()  # does not reach the output: forward only
    out = (a @ b).tanh().sum()
    assert side.value.shape == (3, 2)
    assert tape.forward_work == 6 + 6 + 60 + 15 + 15
    tape.gradient(out, [a, b])
    assert tape.backward_work == 120 + 30


def test_control_flow_is_what_ran(script):
    """The number of Newton's steps depends on the number; the derivative does not notice."""
    lengths = []
    for a in (2.0, 30.0, 900.0):
        tape = script["Tape"]()
        start = tape.variable(a)
        root = script["newton_root"](start, lambda x: float(x.value))
        np.testing.assert_allclose(tape.gradient(root, [start])[0], 0.5 / np.sqrt(a), rtol=1e-9)
        lengths.append(len(tape.records))
    assert lengths[0] < lengths[1] < lengths[2]


def test_the_verdict_follows_the_numbers(script):
    config, conclude = script["Config"](sizes=(1, 4)), script["conclude"]
    work = {
        "forward": [2.0, 8.0],
        "reverse": [2.0, 3.0],
        "forward, of outputs": [2.0, 3.0],
        "reverse, of outputs": [2.0, 8.0],
    }
    errors = {"one": 1e-9, "refuses": True}
    result = conclude(config, errors, 3.0, work)
    assert result.holds and result.measured["work of forward: exponent"] == pytest.approx(1)
    assert not conclude(config, {**errors, "one": 7.0}, 3.0, work).holds
    assert not conclude(config, {**errors, "refuses": False}, 3.0, work).holds
    assert not conclude(config, errors, 6.0, work).holds
    assert not conclude(config, errors, 3.0, {**work, "reverse": [2.0, 6.0]}).holds


def test_a_short_run_measures_what_it_promises(script, tmp_path):
    config = script["Config"](sizes=(1, 8), width=8, hidden=3, batch_size=5)
    result = script["main"](config, tmp_path)
    measured = result.measured
    assert result.holds
    assert measured["gradient: tape and differences"] < 1e-7
    assert measured["Hessian-vector product and differences"] < 1e-7
    # Eight tangents cost four times as much as the two of value and one tangent, and more.
    assert measured["work of forward: largest ratio"] > 5
    assert measured["work of reverse: largest ratio"] < 3
    assert json.loads(json.dumps(measured)) == measured
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--hidden", "0"), "hidden, batch_size, width and sizes must be at least 1"),
        (("--sizes", "4", "4"), "sizes=(4, 4): give two different numbers"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
