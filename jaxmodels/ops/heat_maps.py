"""Heat maps of objects: painted around what is there, and read at their peaks."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.ops.checks import require_shape, require_within
from jaxmodels.ops.pooling import max_pool

# Below the rounding error of any box; keeps the gradient of a root finite.
_TINY = 1e-12


def gaussian_radius(
    heights: Float[Array, "*B"], widths: Float[Array, "*B"], min_overlap: float = 0.7
) -> Float[Array, "*B"]:
    """How far both corners of a box may be off, in x and y, for it to still fit.

    The largest r such that for all of these boxes IoU with the h x w box >= o:
      moved by (r, r)        (h - r)(w - r) / (2 h w - (h - r)(w - r))
      smaller on all sides   (h - 2 r)(w - 2 r) / (h w)
      larger on all sides    h w / ((h + 2 r)(w + 2 r))

    The smaller box always fits least, so r is where its overlap is o:
    r = (h + w - sqrt((h + w)^2 - 4 (1 - o) h w)) / 4

    Args:
      heights, widths: h and w, in cells of the heat map.
      min_overlap: o, in (0, 1).

    Returns:
      r, not rounded.

    Raises:
      ValueError: the overlap is outside (0, 1), or a height or width is negative.

    Source: Law and Deng 2018, "CornerNet", section 3.2 and figure 5 (arXiv:1808.01244).
    An early version of the authors' code, which CenterNet's still holds, solves the
    three equations wrongly and gets larger radii.
    """
    if not 0 < min_overlap < 1:
        raise ValueError(f"gaussian_radius: min_overlap={min_overlap} must be between 0 and 1")
    for name, value in (("heights", heights), ("widths", widths)):
        require_within("gaussian_radius", name, value, 0, jnp.inf)
    total, missed = heights + widths, (1 - min_overlap) * heights * widths
    root = jnp.sqrt(jnp.maximum(total**2 - 4 * missed, _TINY))
    # The form without a difference of almost equal numbers.
    return missed / (total + root)


def splat_gaussians(
    centres: Int[Array, "N 2"],
    radii: Float[Array, "..."],
    labels: Int[Array, "..."],
    valid: Bool[Array, "..."],
    shape: tuple[int, int, int],
) -> Float[Array, "Y X K"]:
    """Paints a Gaussian around every object on the map of its class; the highest one shows.

    out[y, x, k] = max over n of class k of exp(-((x - x_n)^2 + (y - y_n)^2) / (2 s_n^2)),
    s_n = (2 r_n + 1) / 6, and zero where |x - x_n| or |y - y_n| > r_n

    O(N Y X) time and memory.

    Args:
      centres: (x, y), column and row, of cells.
      radii: (N,), rounded down to whole cells.
      labels: (N,), classes from 0.
      valid: (N,), which objects there are.
      shape: Y rows, X columns and K classes.

    Returns:
      The heat map, exactly 1 at the centres.

    Raises:
      ValueError: an object lies outside the map, has a class outside [0, K - 1] or a
        negative radius, or shapes disagree.

    Source: Law and Deng 2018, "CornerNet", section 3.2 (arXiv:1808.01244); the maximum
    from Zhou et al. 2019, "Objects as Points", section 3 (arXiv:1904.07850). The width
    and where it ends are those of the authors' code; CornerNet's text has s = r / 3.
    """
    name, (rows, columns, classes) = "splat_gaussians", shape
    for argument, array in (("radii", radii), ("labels", labels), ("valid", valid)):
        require_shape(name, argument, array, (len(centres),), "(N,)")
    x, y, labels = (jnp.where(valid, v, 0) for v in (centres[:, 0], centres[:, 1], labels))
    radii = jnp.floor(jnp.where(valid, radii, 0))
    limits = {"centres (x)": (x, columns), "centres (y)": (y, rows), "labels": (labels, classes)}
    for argument, (value, count) in limits.items():
        require_within(name, argument, value, 0, count - 1)
    require_within(name, "radii", radii, 0, jnp.inf)
    across, down = _gaussians(x, radii, columns), _gaussians(y, radii, rows)
    painted = valid[:, None, None] * down[:, :, None] * across[:, None, :]
    return jnp.moveaxis(jnp.zeros((classes, rows, columns)).at[labels].max(painted), 0, 2)


def heat_map_peaks(
    heat: Float[Array, "Y X K"], count: int, *, size: int = 3
) -> tuple[Float[Array, "P"], Int[Array, "P"], Int[Array, "P"], Int[Array, "P"]]:
    """The highest of all cells that no neighbour of their class exceeds.

    Args:
      heat: of one image, >= 0.
      count: P, how many are returned.
      size: side of the neighbourhood, odd; 1 takes cells whatever is around them.

    Returns:
      Heats, falling, and the class, row and column of each. Where there are fewer
      peaks the heat is 0.

    Raises:
      ValueError: the size is even, or the map has fewer cells than count.

    Source: Zhou et al. 2019, "Objects as Points", section 4, "From points to bounding
    boxes" (arXiv:1904.07850).
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(f"heat_map_peaks: size={size} must be odd, to have a centre")
    if not 1 <= count <= heat.size:
        raise ValueError(
            f"heat_map_peaks: count={count} must be from 1 to the {heat.size} cells of heat "
            f"{heat.shape}"
        )
    highest = max_pool(heat[None], size, stride=1, padding=size // 2)[0]
    peaks = jnp.where(heat == highest, heat, 0)
    scores, places = lax.top_k(peaks.ravel(), count)
    rows, columns, classes = jnp.unravel_index(places, heat.shape)
    return scores, classes, rows, columns


def _gaussians(centre: Int[Array, "N"], radii: Float[Array, "N"], count: int) -> Array:
    """exp(-d^2 / (2 s^2)) along one axis, (N, count)."""
    apart = jnp.arange(count)[None] - centre[:, None]
    deviation = (2 * radii[:, None] + 1) / 6
    return jnp.where(jnp.abs(apart) <= radii[:, None], jnp.exp(-((apart / deviation) ** 2) / 2), 0)
