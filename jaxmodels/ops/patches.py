"""Images as sequences of patches, and back."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def patchify(image: Float[Array, "*B Y X C"], patch_size: int) -> Float[Array, "*B N F"]:
    """Cuts an image into square patches, row by row.

    out[n, (p, q, c)] = image[n // (X/P) * P + p, n % (X/P) * P + q, c]

    Args:
      image: channels last.
      patch_size: P, the side of a patch in pixels.

    Returns:
      N = (Y/P)(X/P) tokens of F = P * P * C values, channels fastest.

    Raises:
      ValueError: patch_size does not divide both sides.

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.1
    (arXiv:2010.11929).
    """
    *batch, height, width, channels = image.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"patchify: patch_size={patch_size} does not divide an image of {height} x {width} "
            f"pixels (shape {image.shape}, channels last); crop, pad or choose another patch size"
        )
    rows, columns = height // patch_size, width // patch_size
    x = image.reshape(*batch, rows, patch_size, columns, patch_size, channels)
    x = jnp.swapaxes(x, -4, -3)
    return x.reshape(*batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(
    tokens: Float[Array, "*B N F"], rows: int, columns: int, patch_size: int
) -> Float[Array, "*B Y X C"]:
    """Puts patches back together; the inverse of `patchify`.

    Args:
      tokens: one token a patch, row by row; channels fastest.
      rows, columns: size of the grid in patches.
      patch_size: P, the side of a patch in pixels.

    Returns:
      An image of rows * P by columns * P pixels and C = F / P^2 channels.

    Raises:
      ValueError: the grid or the patch does not fit the tokens.

    Source: Peebles and Xie 2023, section 3.2, "transformer decoder"
    (arXiv:2212.09748).
    """
    *batch, count, features = tokens.shape
    if count != rows * columns or features % patch_size**2:
        raise ValueError(
            f"unpatchify: tokens of shape {tokens.shape} are not a grid of {rows} x {columns} "
            f"patches of {patch_size} x {patch_size} pixels; check rows, columns and patch_size"
        )
    x = tokens.reshape(*batch, rows, columns, patch_size, patch_size, features // patch_size**2)
    x = jnp.swapaxes(x, -4, -3)
    return x.reshape(*batch, rows * patch_size, columns * patch_size, x.shape[-1])
