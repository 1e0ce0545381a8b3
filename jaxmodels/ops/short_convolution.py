"""A causal convolution over a few time steps, each channel by itself."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.ops.checks import require_shape
from jaxmodels.ops.segments import document_index


def short_convolution(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "W D"],
    bias: Float[Array, "D"] | None = None,
    *,
    initial_state: Float[Array, "B P D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B P D"]]:
    """Mixes each channel over the last W time steps of its document.

    out_t = bias + sum over i < W of kernel_(W-1-i) x_(t-i)

    Computed as W shifted products that XLA fuses into one pass: on a CPU a
    grouped `lax.conv` is ten times slower. Time O(T W D).

    Args:
      x: inputs.
      kernel: the last row weighs the present, as `torch.nn.Conv1d` has it after
        padding on the left.
      bias: per channel.
      initial_state: the W - 1 inputs before x, of the document of x's first
        token; None is zeros.
      segment_ids: of the documents; the inputs of another are not seen.

    Returns:
      The outputs in x's dtype, and the last W - 1 inputs of the last document,
      with zeros before its beginning.

    Raises:
      ValueError: shapes disagree.

    Source: the depthwise causal convolutions of H3 (Fu et al. 2023,
    arXiv:2212.14052) and Mamba (Gu and Dao 2023, section 3.4, arXiv:2312.00752).
    """
    name = "short_convolution"
    batch, length, width = x.shape
    past = kernel.shape[0] - 1
    require_shape(name, "kernel", kernel, (past + 1, width), "(W, D)")
    if initial_state is None:
        initial_state = jnp.zeros((batch, past, width), x.dtype)
    require_shape(name, "initial_state", initial_state, (batch, past, width), "(B, W - 1, D)")
    padded = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)
    documents = None
    if segment_ids is not None:
        require_shape(name, "segment_ids", segment_ids, (batch, length), "(B, T)")
        # What came before belongs to the first document, number 0.
        documents = jnp.pad(document_index(segment_ids), ((0, 0), (past, 0)))
    taps = kernel[:, None, None]
    out = x * taps[past]
    for back in range(1, past + 1):
        earlier = slice(past - back, past - back + length)
        term = padded[:, earlier] * taps[past - back]
        if documents is not None:
            same = documents[:, earlier] == documents[:, past:]
            term = jnp.where(same[..., None], term, 0)
        out = out + term
    if bias is not None:
        out = out + bias[None, None]
    last = padded[:, length:]
    if documents is not None:
        last = jnp.where((documents[:, length:] == documents[:, -1:])[..., None], last, 0)
    return out.astype(x.dtype), last.astype(initial_state.dtype)
