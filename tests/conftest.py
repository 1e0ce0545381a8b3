"""Suite-wide settings: virtual devices, strict promotion, checked shapes."""

import ctypes
import gc
import os
import platform
from pathlib import Path

# Eight virtual devices let the sharding tests run anywhere. Nearly all of the suite's time
# is compilation: optimising takes half of it, the newer emitters of fused loops half of the
# rest, and modules of LLVM, one for each kernel, a fifth of what is left then; two workers
# fill two cores. All must precede JAX.
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_multi_thread_eigen=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *_FLAGS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The workers fill the cores; torch's threads would wait for each other, up to half the time.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing in the suite may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping

jaxtyping.install_import_hook("jaxmodels", "beartype.beartype")

import jax

from jaxmodels import cpu

jax.config.update("jax_numpy_rank_promotion", "raise")
# Experiments that run in this process would keep all memory it ever had, and set flags that
# XLA has read already; neither can be taken back. Those in processes of their own are tuned.
cpu.tune = lambda: None


# A worker's programs grow to 15 GB otherwise, of which two do not fit into 24 GB with others.
_MOST_BYTES = 5 << 30


def pytest_runtest_teardown(item, nextitem):
    """Forgets what is compiled between two files, if it has become much."""
    pages = Path("/proc/self/statm")
    if nextitem is None or nextitem.path == item.path or not pages.is_file():
        return
    if int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") < _MOST_BYTES:
        return
    jax.clear_caches()
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def pytest_collection_finish(session):
    """Collects garbage rarely, and never among what imports have made: a tenth of the time."""
    del session
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)
