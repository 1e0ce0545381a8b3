"""Cross entropy over a vocabulary so large that all logits at once would not fit."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmodels.ops.checks import require_shape
from jaxmodels.ops.mesh_axes import axis_size, batch_axes, vary_alike


def chunked_cross_entropy(
    hidden: Float[Array, "*B D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "*B"],
    weights: Float[Array, "*B"] | None = None,
    *,
    z_loss: float = 0.0,
    chunk_size: int = 1024,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross entropy of logits that are never all there at once.

    logits_i = hidden_i kernel,   log Z_i = log sum_v exp(logits_iv)
    loss = sum_i w_i (log Z_i - logits_i,target + z_loss (log Z_i)^2) / sum_i w_i

    One chunk of tokens has its logits at a time, O(chunk_size * V) memory. The
    gradients are computed in the same pass, while the logits are there, and only
    scaled later: three matrix products, as without chunks, where recomputing the
    logits would be a fourth. They cost N D + D V floats until they are used.

    Args:
      hidden: what the unembedding is applied to.
      kernel: the unembedding; a tied table's transpose.
      targets: in [0, V). A token of weight 0 may have any, such as -1.
      weights: of the tokens, not negative; None is 1 for each. All 0 gives loss 0.
      z_loss: coefficient of (log Z)^2, which keeps logits from drifting.
      chunk_size: the most tokens whose logits exist at once, on a device.

    Returns:
      The loss, and its terms for the log, "cross_entropy" and with z_loss "z_loss",
      all float32. Logits and sums are float32 whatever the inputs.

    Raises:
      ValueError: shapes disagree, there is no token, chunk_size is not positive
        or z_loss is negative.

    Source: the z-loss from Chowdhery et al. 2022, "PaLM", section 5
    (arXiv:2204.02311); gradients during the forward pass from Hsu et al. 2024,
    "Liger Kernel", section 3.2 (arXiv:2410.10989).
    """
    _check(hidden, kernel, targets, weights, z_loss, chunk_size)
    if weights is None:
        weights = jnp.ones(targets.shape, jnp.float32)
    sums_of = partial(_sums_in_chunks, z_loss, chunk_size)
    sums = _on_mesh(sums_of, targets.shape)(kernel, hidden, targets, weights)
    total = jnp.sum(weights, dtype=jnp.float32)
    # A sum of no tokens is 0 already, and stays it.
    loss, cross_entropy = (x / jnp.where(total > 0, total, 1.0) for x in sums)
    cross_entropy = lax.stop_gradient(cross_entropy)
    terms = {"cross_entropy": cross_entropy}
    if z_loss:
        terms["z_loss"] = lax.stop_gradient(loss) - cross_entropy
    return loss, terms


def _check(hidden, kernel, targets, weights, z_loss, chunk_size):
    name = "chunked_cross_entropy"
    if hidden.ndim < 1 or kernel.ndim != 2 or hidden.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"{name}: hidden {hidden.shape} must be (*B, D) and kernel {kernel.shape} (D, V) with "
            f"the same D; a tied table (V, D) is passed transposed"
        )
    require_shape(name, "targets", targets, hidden.shape[:-1], "*B of hidden")
    if weights is not None:
        require_shape(name, "weights", weights, hidden.shape[:-1], "*B of hidden")
    if 0 in hidden.shape + kernel.shape:
        raise ValueError(f"{name}: hidden {hidden.shape}, kernel {kernel.shape}: nothing is empty")
    if chunk_size < 1:
        raise ValueError(f"{name}: chunk_size={chunk_size} must be at least 1, in tokens")
    if z_loss < 0:
        raise ValueError(f"{name}: z_loss={z_loss} must not be negative; 0 turns it off")


def _sums_in_chunks(z_loss, chunk_size, kernel, hidden, targets, weights):
    chunks = -(-targets.size // chunk_size)
    tokens = (hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1))
    return _weighted_sums(z_loss, kernel, *jax.tree.map(partial(_split, chunks), tokens))


def _on_mesh(sums_of, shape):
    """Each device sums its own tokens: XLA would add up the kernel's gradient in every chunk.

    Parts of sequences, all in one row, would even be gathered.
    """
    along = len(shape) == 2 and axis_size("sequence") > 1 and shape[1] % axis_size("sequence") == 0
    examples = batch_axes(shape[0]) if shape else ()
    axes = examples + ("sequence",) * along
    if not axes:
        return sums_of
    tokens = PartitionSpec(examples or None, *("sequence",) * along)

    def on_device(*arguments):
        return lax.psum(sums_of(*vary_alike(arguments)), axes)

    return jax.shard_map(
        on_device,
        in_specs=(PartitionSpec(), tokens, tokens, tokens),
        out_specs=PartitionSpec(),
        axis_names=set(axes),
    )


def _split(chunks: int, x: Array) -> Array:
    """Cuts (N, ...) into (chunks, N / chunks, ...), rounded up; what is added has weight 0."""
    x = jnp.pad(x, [(0, -len(x) % chunks)] + [(0, 0)] * (x.ndim - 1))
    # Strided, so that each device keeps its own tokens in every chunk.
    return x.reshape(-1, chunks, *x.shape[1:]).swapaxes(0, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sums(z_loss, kernel, hidden, targets, weights):
    """Weighted sums of the loss, and of the cross entropy, which has no gradient."""

    def add(sums, chunk):
        losses, cross_entropies, _ = _losses(z_loss, kernel, *chunk[:2])
        return _add_weighted(sums, chunk[2], losses, cross_entropies), None

    return lax.scan(add, _zeros(kernel), (hidden, targets, weights))[0]


def _losses(z_loss, kernel, hidden, targets):
    """(n,) losses and cross entropies, and the (n, V) gradient of each loss in its logits."""
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A comparison fuses with what follows, and a target of nothing is no NaN.
    is_target = targets[:, None] == jnp.arange(kernel.shape[1])[None, :]
    cross_entropies = log_z - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    slope = (1 + 2 * z_loss * log_z)[:, None] * jnp.exp(logits - log_z[:, None]) - is_target
    return cross_entropies + z_loss * jnp.square(log_z), cross_entropies, slope


def _zeros(kernel):
    # zeros_like, so that they vary over the axes of a shard_map as the sums will.
    return (jnp.zeros_like(kernel, jnp.float32, shape=()),) * 2


def _add_weighted(sums, weights, *losses):
    return tuple(s + jnp.sum(weights * x) for s, x in zip(sums, losses, strict=True))


def _forward(z_loss, kernel, hidden, targets, weights):
    def add(carry, chunk):
        sums, d_kernel = carry
        hidden, targets, weights = chunk
        losses, cross_entropies, slope = _losses(z_loss, kernel, hidden, targets)
        d_logits = (weights[:, None] * slope).astype(hidden.dtype)
        d_hidden = d_logits @ kernel.T
        d_kernel += jnp.matmul(hidden.T, d_logits, preferred_element_type=jnp.float32)
        sums = _add_weighted(sums, weights, losses, cross_entropies)
        return (sums, d_kernel), (d_hidden, losses)

    start = _zeros(kernel), jnp.zeros_like(kernel, jnp.float32)
    (sums, d_kernel), (d_hidden, losses) = lax.scan(add, start, (hidden, targets, weights))
    return sums, (d_kernel.astype(kernel.dtype), d_hidden, losses.astype(weights.dtype))


def _backward(z_loss, gradients, d_sums):
    d_kernel, d_hidden, d_weights = (d_sums[0].astype(g.dtype) * g for g in gradients)
    return d_kernel, d_hidden, None, d_weights


_weighted_sums.defvjp(_forward, _backward)
