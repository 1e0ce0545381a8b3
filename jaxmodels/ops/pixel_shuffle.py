"""Channels to pixels and back, for learned upsampling without transposed convolution."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def pixel_shuffle(x: Float[Array, "*B Y X F"], factor: int) -> Float[Array, "*B V U C"]:
    """Lays groups of channels out as squares of pixels.

    out[r y + i, r x + j, c] = x[y, x, (c r + i) r + j],   0 <= i, j < r = factor

    Channels count as in torch, where those of one output channel lie side by
    side, so that weights fit; `unpatchify` does it with output channels fastest.

    Args:
      x: images of F = C r^2 channels.
      factor: by which both sides grow.

    Returns:
      Images of r Y by r X pixels and C channels.

    Raises:
      ValueError: factor is below 1, or its square does not divide the channels.

    Source: Shi et al. 2016, "Real-Time Single Image and Video Super-Resolution
    Using an Efficient Sub-Pixel Convolutional Neural Network", equation 4
    (arXiv:1609.05158).
    """
    *batch, rows, columns, features = x.shape
    if factor < 1 or features % factor**2:
        raise ValueError(
            f"pixel_shuffle: factor={factor} squared does not divide the {features} channels of x "
            f"{x.shape} (..., Y, X, F)"
        )
    channels = features // factor**2
    x = x.reshape(*batch, rows, columns, channels, factor, factor)
    x = jnp.moveaxis(x, (-2, -1), (-4, -2))
    return x.reshape(*batch, rows * factor, columns * factor, channels)


def pixel_unshuffle(x: Float[Array, "*B V U C"], factor: int) -> Float[Array, "*B Y X F"]:
    """Lays squares of pixels out as groups of channels; the inverse of `pixel_shuffle`.

    Args:
      x: images whose sides factor divides.
      factor: by which both sides shrink.

    Returns:
      Images of 1 / factor the sides and factor^2 times the channels.

    Raises:
      ValueError: factor is below 1 or does not divide both sides.

    Source: as `pixel_shuffle`.
    """
    *batch, rows, columns, channels = x.shape
    if factor < 1 or rows % factor or columns % factor:
        raise ValueError(
            f"pixel_unshuffle: factor={factor} does not divide the sides of x {x.shape} "
            "(..., Y, X, C); crop or pad it"
        )
    rows, columns = rows // factor, columns // factor
    x = x.reshape(*batch, rows, factor, columns, factor, channels)
    x = jnp.moveaxis(x, (-4, -2), (-2, -1))
    return x.reshape(*batch, rows, columns, channels * factor**2)
