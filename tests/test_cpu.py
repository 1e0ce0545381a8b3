"""What a process does with memory once it is tuned, asked of the kernel and of XLA."""

import os
import subprocess
import sys

import pytest

from jaxmodels import cpu

# Page faults of two gigabytes and a half, used and freed twice.
SCRIPT = """
import ctypes, resource
from jaxmodels import cpu

{tune}
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
size = ctypes.c_size_t(5 << 29)
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(size))
    libc.memset(block, 1, size)
    libc.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("tuned", [False, True])
def test_freed_memory_stays_however_much_it_is(tuned):
    script = SCRIPT.format(tune="cpu.tune()" * tuned)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = map(int, done.stdout.split())
    # Pages may be large, where the kernel is set so.
    assert first > 1000
    assert second < first / 100 if tuned else second > first / 2


# Temporary bytes of a gradient, by XLA and by the planner; layers computed again, or not.
CHECKPOINTS = """
import jax, jax.numpy as jnp
from jaxmodels import cpu
from jaxmodels.training.liveness import peak_bytes

{tune}

def bytes_of(wrap):
    def loss(x, w):
        for _ in range(8):
            x = wrap(lambda x, w: jnp.sin(jnp.sin(x @ w) @ w.T))(x, w)
        return jnp.sum(x)

    step = jax.grad(loss)
    shapes = [jax.ShapeDtypeStruct(size, "float32") for size in ((64, 96), (96, 96))]
    compiled = jax.jit(step).lower(*shapes).compile()
    print(compiled.memory_analysis().temp_size_in_bytes, peak_bytes(step, *shapes))

bytes_of(jax.checkpoint)
bytes_of(lambda layer: layer)
"""


@pytest.mark.parametrize("tuned", [False, True])
def test_what_is_computed_again_outside_of_loops_is_not_kept(tuned):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    script = CHECKPOINTS.format(tune="cpu.tune()" * tuned)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    again, kept = (list(map(int, line.split())) for line in done.stdout.splitlines())
    for source in range(2):
        share = again[source] / kept[source]
        assert share < 0.65 if tuned else share == 1


# Temporary bytes of a gradient in maps, by XLA and by the planner: of convolutions, norms and
# ReLUs, where a map is the size of x, and of causal attention, where it is that of logits.
STACK = """
import flax.linen as nn, jax, jax.numpy as jnp
from jaxmodels import cpu
from jaxmodels.layers.conv_norm import ConvNorm
from jaxmodels.ops import dot_product_attention
from jaxmodels.training.liveness import peak_bytes

cpu.tune()

class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(8):
            x = ConvNorm(32, 3)(x, train=True)
        return x

class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(8):
            q, k, v = (nn.DenseGeneral((4, 8))(x) for _ in range(3))
            x += dot_product_attention(q, k, v, causal=True).reshape(x.shape)
        return x

stack, shape, of_map = {stack}
x = jax.ShapeDtypeStruct(shape, "float32")

def loss(variables, x):
    return jnp.sum(stack.apply(variables, x, mutable=["batch_stats"])[0] ** 2)

variables = jax.eval_shape(stack.init, jax.random.key(0), x)
step = jax.grad(loss)
compiled = jax.jit(step).lower(variables, x).compile()
for found in (compiled.memory_analysis().temp_size_in_bytes, peak_bytes(step, variables, x)):
    print(found / (4 * of_map))
"""


@pytest.mark.parametrize(
    "stack, most",
    [
        ("Convolutions(), (8, 24, 24, 32), 8 * 24 * 24 * 32", 2 * 8 + 2),
        ("Attention(), (2, 256, 32), 2 * 4 * 256 * 256", 8 + 4),
    ],
)
def test_nothing_is_made_of_what_is_kept_before_it_is_needed(stack, most):
    """Two maps a layer of convolutions and norms, one of attention."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    script = STACK.replace("{stack}", stack)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    used, planned = map(float, done.stdout.split())
    assert used < most
    assert planned == pytest.approx(used, rel=0.15)


def test_flags_of_the_user_and_of_other_devices_stay(monkeypatch):
    name = "xla_disable_hlo_passes"
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=cse")
    cpu.set_flags()
    assert os.environ["XLA_FLAGS"].count(name) == os.environ["XLA_FLAGS"].count("cse") == 1
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    monkeypatch.setattr(cpu, "find_spec", lambda name: name == "jax_plugins")
    cpu.set_flags()
    assert name not in os.environ["XLA_FLAGS"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    cpu.set_flags()
    assert f"--{name}=cse_barrier_expander" in os.environ["XLA_FLAGS"]
