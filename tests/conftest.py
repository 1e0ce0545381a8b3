"""Suite-wide settings: virtual devices, strict promotion, checked shapes."""

import os

# Eight virtual devices let the sharding tests run anywhere; must precede JAX.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nothing in the suite may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping

jaxtyping.install_import_hook("jaxmodels", "beartype.beartype")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
