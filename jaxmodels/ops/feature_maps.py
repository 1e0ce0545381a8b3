"""Features whose inner products stand for the similarity of queries and keys.

Linear attention takes phi(q) and phi(k) for q and k. Some maps are a kernel of
their own, others approximate the exp(q . k) of softmax attention: by its series,
or by random features that are right on average.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def elu_plus_one(x: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """A positive map of the same width.

    phi(x) = x + 1 if x > 0 else exp(x)

    Args:
      x: queries or keys.

    Returns:
      The features, > 0 down to the smallest number of the dtype.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs", equation 7
    (arXiv:2006.16236).
    """
    # As written, not elu(x) + 1, which rounds exp(x) to a multiple of 1e-7.
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def taylor_features(x: Float[Array, "*B K"], *, order: int = 2) -> Float[Array, "*B M"]:
    """The series of exp, exactly: as many terms of exp(q . k) as `order` says.

    phi(q) . phi(k) = 1 + q . k + (q . k)^2 / 2

    A product x_i x_j is there once with weight one, not twice with weight 1/2:
    M = 1 + K + K (K + 1) / 2, half of what the outer product of x would take.
    The second order is at least 1/2; the first is positive only for |q . k| < 1,
    as with q and k of norm below one.

    Args:
      x: queries or keys. For attention with scale 1 / sqrt(K), both times K^(-1/4).
      order: 1 or 2.

    Returns:
      M features, with M = 1 + K at order 1.

    Raises:
      ValueError: another order.

    Source: Arora et al. 2024, "Simple linear attention language models balance the
    recall-throughput tradeoff" (Based), section 4.1 (arXiv:2402.18668); the first
    order is Li et al. 2020, "Linear Attention Mechanism" (arXiv:2007.14902).
    """
    if order not in (1, 2):
        raise ValueError(f"taylor_features: order={order} must be 1 or 2")
    terms = [jnp.ones_like(x[..., :1]), x]
    if order == 2:
        rows, columns = jnp.triu_indices(x.shape[-1], k=1)
        terms += [x * x * math.sqrt(0.5), x[..., rows] * x[..., columns]]
    return jnp.concatenate(terms, axis=-1)


def gaussian_projection(key: PRNGKeyArray, features: int, width: int) -> Float[Array, "M K"]:
    """Directions for random features, drawn independently from N(0, I).

    Args:
      key: another key draws another projection.
      features: M, how many.
      width: K, of queries and keys.

    Raises:
      ValueError: features or width below 1.

    Source: see `positive_features`.
    """
    _require_positive("gaussian_projection", features, width)
    return jax.random.normal(key, (features, width))


def orthogonal_projection(key: PRNGKeyArray, features: int, width: int) -> Float[Array, "M K"]:
    """Directions for random features, orthogonal to each other within blocks of K.

    Each is by itself distributed as N(0, I), so what was unbiased with
    independent ones stays so; that they cover all directions evenly lowers the
    variance. The directions of a block are a random rotation, the lengths are
    those of independent Gaussian vectors.

    Args:
      key: another key draws another projection.
      features: M, how many; the last block is cut if K does not divide it.
      width: K, of queries and keys.

    Raises:
      ValueError: features or width below 1.

    Source: Choromanski et al. 2021, "Rethinking Attention with Performers",
    section 2.4 (arXiv:2009.14794); Yu et al. 2016, "Orthogonal Random Features"
    (arXiv:1610.09072).
    """
    _require_positive("orthogonal_projection", features, width)
    for_directions, for_lengths = jax.random.split(key)
    blocks = -(-features // width)
    rotations, triangles = jnp.linalg.qr(jax.random.normal(for_directions, (blocks, width, width)))
    # QR fixes signs by its own rule; the diagonal's signs make the rotation uniform.
    signs = jnp.sign(jnp.diagonal(triangles, axis1=-2, axis2=-1))
    directions = (rotations * signs[:, None, :]).swapaxes(-1, -2).reshape(-1, width)[:features]
    lengths = jnp.linalg.norm(jax.random.normal(for_lengths, (features, width)), axis=-1)
    return directions * lengths[:, None]


def positive_features(
    x: Float[Array, "*B K"], projection: Float[Array, "M K"]
) -> tuple[Float[Array, "*B M"], Float[Array, "*B"]]:
    """Random features for exp(q . k) that are never negative (FAVOR+).

    phi(x) = exp(W x - |x|^2 / 2) / sqrt(M),   E[phi(q) . phi(k)] = exp(q . k)

    exp may overflow, so each token's features come with a factor of their own:
    phi(x) = features * exp(log_scale), the largest feature being 1 / sqrt(M). It
    depends on no other token, so what a token gives away about itself is the same
    in any sequence. `ops.performer_attention` puts the factors back safely.
    To differentiation log_scale is a constant; the features carry all of it.

    Args:
      x: queries or keys. For attention with scale 1 / sqrt(K), both times K^(-1/4).
      projection: M directions, from `orthogonal_projection` or `gaussian_projection`.

    Returns:
      The features and log_scale, in float32.

    Raises:
      ValueError: the projection is for another width.

    Source: Choromanski et al. 2021, lemma 1 (arXiv:2009.14794). The paper's code
    subtracts the largest exponent of all keys, later ones included, and adds a
    small constant to every feature, which is a bias; neither is done here.
    """
    x, projected = _project("positive_features", x, projection)
    exponents = projected - jnp.sum(x * x, axis=-1, keepdims=True) / 2
    top = jax.lax.stop_gradient(jnp.max(exponents, axis=-1, keepdims=True))
    return jnp.exp(exponents - top) / math.sqrt(projection.shape[0]), top[..., 0]


def trigonometric_features(
    x: Float[Array, "*B K"], projection: Float[Array, "M K"]
) -> tuple[Float[Array, "*B M2"], Float[Array, "*B"]]:
    """Random features for exp(q . k) by sines and cosines.

    phi(x) = exp(|x|^2 / 2) [cos(W x), sin(W x)] / sqrt(M),   E[phi(q) . phi(k)] = exp(q . k)

    Unbiased like `positive_features`, but its variance is large exactly where
    exp(q . k) is small, and sums of features can come near zero or below. The
    factor exp(|x|^2 / 2) is apart for the same reason and in the same way.

    Args:
      x: queries or keys. For attention with scale 1 / sqrt(K), both times K^(-1/4).
      projection: M directions, from `orthogonal_projection` or `gaussian_projection`.

    Returns:
      2 M features and log_scale = |x|^2 / 2, in float32; phi(x) is
      features * exp(log_scale).

    Raises:
      ValueError: the projection is for another width.

    Source: Choromanski et al. 2021, equation 5 with the functions sin and cos
    (arXiv:2009.14794); Rahimi and Recht 2007, "Random Features for Large-Scale
    Kernel Machines".
    """
    x, projected = _project("trigonometric_features", x, projection)
    exponent = jnp.sum(x * x, axis=-1, keepdims=True) / 2
    constant = jax.lax.stop_gradient(exponent)
    waves = jnp.concatenate([jnp.cos(projected), jnp.sin(projected)], axis=-1)
    # A factor of one, whose gradient is that of exp(|x|^2 / 2).
    features = waves * jnp.exp(exponent - constant)
    return features / math.sqrt(projection.shape[0]), constant[..., 0]


def _project(name: str, x: Array, projection: Array) -> tuple[Array, Array]:
    """x and W x in float32: in exponents, bfloat16 would be wrong by whole factors."""
    if x.shape[-1] != projection.shape[1]:
        raise ValueError(
            f"{name}: projection {projection.shape} must be (M, K) with the width "
            f"K={x.shape[-1]} of x {x.shape}"
        )
    x = x.astype(jnp.float32)
    return x, x @ projection.T


def _require_positive(name: str, features: int, width: int) -> None:
    if features < 1 or width < 1:
        raise ValueError(f"{name}: features={features} and width={width} must be at least 1")
