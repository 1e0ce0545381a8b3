"""Windows against explicit loops: placement, inverse, shift, padding, mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.ops.shifted_windows import (
    map_windows,
    relative_places,
    shift_mask,
    window_partition,
    window_reverse,
)


def test_placement_and_inverse():
    x = np.arange(2 * 6 * 15 * 5, dtype=np.float32).reshape(2, 6, 15, 5)
    windows = window_partition(jnp.asarray(x), 3)
    expected = [
        x[:, y : y + 3, c : c + 3].reshape(2, 9, 5) for y in (0, 3) for c in range(0, 15, 3)
    ]
    np.testing.assert_array_equal(windows, np.stack(expected, axis=1))
    np.testing.assert_array_equal(window_reverse(windows, 6, 15, 3), x)
    vmapped = jax.vmap(lambda x: window_partition(x, 3))(jnp.asarray(x)[:, None])
    np.testing.assert_array_equal(vmapped[:, 0], windows)


def test_mask_is_where_the_shift_did_not_wrap():
    """A pixel sees another if both moved by the same vector, wrapped or not."""
    height, width, size, shift = 6, 9, 3, 2
    moved = np.empty((height, width, 2), int)
    for y in range(height):
        for x in range(width):
            moved[y, x] = (y + shift) % height - y, (x + shift) % width - x
    mask = shift_mask(height, width, size, shift)
    for n in range(6):
        y, x = n // 3 * 3, n % 3 * 3
        window = moved[y : y + 3, x : x + 3].reshape(9, 2)
        same = (window[:, None] == window[None]).all(axis=-1)
        np.testing.assert_array_equal(mask[n], same)
    assert shift_mask(6, 9, 3, 0).all()


def test_places_are_offsets():
    table = relative_places(3)
    for t in range(9):
        for s in range(9):
            down, across = t // 3 - s // 3 + 2, t % 3 - s % 3 + 2
            assert table[t, s] == 5 * down + across


@pytest.mark.parametrize("shift", [0, 1])
def test_map_windows_pads_shifts_and_undoes_both(shift):
    """Each pixel becomes the sum of what it sees: those of its window that are its neighbours."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 3))
    weights = jax.random.normal(jax.random.key(1), (2, 5, 7, 3))

    def attend(windows, mask):
        assert (mask is None) == (shift == 0)
        seen = jnp.ones((4 * 3, 4, 4)) if mask is None else mask.astype(jnp.float32)
        return jnp.einsum("nts,bnsc->bntc", seen[: windows.shape[1]], windows)

    def run(x):
        return map_windows(attend, x, 2, shift)

    expected = np.zeros((2, 5, 7, 3))
    start = range(-shift if shift else 0, 8, 2)
    for top in start:
        for left in start:
            rows = slice(max(top, 0), min(top + 2, 5))
            columns = slice(max(left, 0), min(left + 2, 7))
            total = np.asarray(x)[:, rows, columns].sum(axis=(1, 2), keepdims=True)
            expected[:, rows, columns] = total
    np.testing.assert_allclose(jax.jit(run)(x), expected, atol=1e-5)
    # The operation is its own transpose, so the gradient is that of the weights.
    gradient = jax.grad(lambda x: (run(x) * weights).sum())(x)
    np.testing.assert_allclose(gradient, run(weights), atol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match=r"size=4 does not divide an image of 6 x 8 pixels"):
        window_partition(jnp.zeros((1, 6, 8, 3)), 4)
    with pytest.raises(ValueError, match=r"\(1, 3, 9, 2\) are not those of 6 x 6 pixels"):
        window_reverse(jnp.zeros((1, 3, 9, 2)), 6, 6, 3)
    with pytest.raises(ValueError, match=r"shift=3 must be in \[0, size=3\)"):
        map_windows(lambda x, mask: x, jnp.zeros((1, 6, 6, 2)), 3, 3)
