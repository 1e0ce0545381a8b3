"""The persistent compilation cache: the second start of a program skips XLA."""

import os
from pathlib import Path

import jax


def enable_compilation_cache(directory: str | Path | None = None) -> Path:
    """Keeps compiled programs on disk, keyed by JAX from program, flags and hardware.

    Args:
      directory: where; by default `JAX_COMPILATION_CACHE_DIR` if that is set,
        else `~/.cache/jaxmodels/xla`.

    Returns:
      The directory in use.
    """
    chosen = directory or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    path = Path(chosen) if chosen else Path.home() / ".cache" / "jaxmodels" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(path))
    # JAX's default keeps only what took a second to compile; start-up is made
    # of many programs that take less.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return path
