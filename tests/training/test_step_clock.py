"""Where time goes, and how many operations a step is."""

import json
import types

import jax
import jax.numpy as jnp
import pytest

from jaxmodels import training
from jaxmodels.training import step_clock
from jaxmodels.training.flops import peak_flops, step_flops
from jaxmodels.training.runtime import Runtime

M, K, N = 37, 53, 71


def test_products_are_counted_as_xla_counts_them():
    """Large enough that what is no product hardly counts."""

    def f(x, w, image, kernel):
        y = jax.lax.conv_general_dilated(
            image,
            kernel,
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )
        return jnp.sum(jnp.einsum("bmk,bkn->bmn", x, w)) + jnp.sum(y**2)

    shapes = ((3, M, K), (3, K, N), (2, 23, 19, 10), (5, 3, 5, 14))
    arguments = [jnp.ones(shape) for shape in shapes]
    ours, xla = step_flops(jax.jit(f), *arguments)
    conv = 2 * (2 * 19 * 17 * 14) * (5 * 3 * 5)
    assert ours == 2 * 3 * M * K * N + conv
    assert ours == pytest.approx(xla, rel=0.02)


def test_loops_count_as_often_as_they_run():
    w, x = jnp.ones((7, K, K)), jnp.ones((M, K))

    def unrolled(w, x):
        for i in range(7):
            x = jnp.tanh(x @ w[i])
        return jnp.sum(x)

    def scanned(w, x):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jnp.sum(jax.lax.scan(body, x, w)[0])

    flat, xla = step_flops(jax.jit(jax.value_and_grad(unrolled)), w, x)
    assert flat == pytest.approx(xla, rel=0.05)
    # Without the first layer's gradient for x, and with each layer's product once more.
    looped, xla = step_flops(jax.jit(jax.value_and_grad(scanned)), w, x)
    one = 2 * M * K * K
    assert (flat, looped) == (20 * one, 28 * one)
    assert xla < looped / 3  # which is why we count


def test_the_first_step_which_compiles_is_counted_by_itself(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 10.0, 20.0, 20.5, 30.0, 30.5])
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: next(now))
    clock = step_clock.StepClock()
    for part in ("input", "compute", "input"):
        with clock.part(part):
            pass
        clock.tick()
    report = clock.report(lambda: None)
    assert report["first_step_seconds"] == 10.0
    assert (report["input_ms"], report["compute_ms"]) == (250.0, 250.0)  # of two steps


def test_report_of_a_run(problem, tmp_path, monkeypatch, capsys):
    # As of a machine that makes 10^12 operations a second.
    monkeypatch.setattr(step_clock, "peak_flops", lambda devices: devices * 1e12)
    step, initial = problem.compiled
    training.fit(
        jax.tree.map(jnp.copy, initial),
        step,
        problem.stream(),
        steps=14,
        directory=tmp_path,
        checkpoint_every=5,
        runtime=Runtime(profile=True),
    )
    report = json.loads((tmp_path / "timing.json").read_text())
    # Forward and backward of (16, 5) by 512 by 3, without the gradient of the input.
    assert report["flops"] == 2 * 16 * 512 * (5 * 2 + 3 * 3)
    total = sum(report[f"{part}_ms"] for part in ("input", "compute", "checkpoint"))
    assert all(report[f"{part}_ms"] > 0 for part in ("input", "compute", "checkpoint"))
    assert report["utilisation"] == pytest.approx(report["flops"] / (total / 1e3) / 1e12)
    assert report["steps"] == 14
    assert "ms a step (input" in capsys.readouterr().out
    assert list((tmp_path / "trace").rglob("perfetto_trace.json.gz"))
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
    ],
)
def test_peak_of_a_known_device_is_its_data_sheets(monkeypatch, kind, peak):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert peak_flops(4) == 4 * peak


def test_an_unknown_device_that_begins_like_a_known_one_is_measured(monkeypatch):
    card = types.SimpleNamespace(device_kind="NVIDIA L40", platform="gpu")
    monkeypatch.setattr(jax, "devices", lambda: [card])
    assert peak_flops(1) < 1e14


def test_peak_of_this_machine_is_that_of_a_product():
    assert 1e8 < peak_flops(8) < 1e14
