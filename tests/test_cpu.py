"""What a process does with memory once it is tuned, asked of the kernel."""

import subprocess
import sys

import pytest

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
