"""Where a computation is going to run."""

import jax


def platform() -> str:
    """Name of the default device's platform ("cpu", "gpu", "tpu"), as known while tracing.

    Operations with a formulation for CPUs choose by it. Choosing inside the
    program (`lax.platform_dependent`) would trace and differentiate both.
    """
    device = jax.config.jax_default_device
    if device is None:
        device = jax.devices()[0]
    return device if isinstance(device, str) else device.platform
