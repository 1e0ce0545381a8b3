"""What the recurrences have in common: their arguments and the choice of a form."""

from collections.abc import Callable, Collection, Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodels.ops.checks import require_shape
from jaxmodels.ops.sequence_parallel import spread_over_sequence


def run_recurrence(
    name: str,
    forms: Mapping[str, Callable],
    q: Array,
    k: Array,
    v: Array,
    gates: Mapping[str, Array | None],
    *,
    per_channel: Collection[str] = (),
    initial_state: Array | None,
    segment_ids: Array | None,
    form: str,
    chunk_size: int,
) -> tuple[Float[Array, "*B T H V"], Float[Array, "*B H K V"]]:
    """Checks the arguments, runs one form in float32 with one batch axis, and undoes both.

    Traced for a mesh that splits `sequence`, a causal form runs on every device's part.

    Args:
      name: of the public function, for errors.
      forms: each `form(q, k, v, *gates, state, segment_ids, chunk_size)` on one
        batch axis, returning the outputs and the final state.
      q, k, v, initial_state, segment_ids, form, chunk_size: the caller's.
      gates: name to array, in the order that the forms take them; each (*B, T, H).
        None is passed on.
      per_channel: names of the gates that are (*B, T, H, K) instead.

    Returns:
      The outputs in v's dtype, and the final state in float32.

    Raises:
      ValueError: shapes disagree, the form is unknown or chunk_size < 1.
    """
    if form not in forms:
        raise ValueError(f"{name}: form={form!r} is unknown; use one of {', '.join(forms)}")
    if chunk_size < 1:
        raise ValueError(f"{name}: chunk_size={chunk_size} must be at least 1")
    if q.ndim < 3 or q.shape != k.shape or q.shape[:-1] != v.shape[:-1] or 0 in q.shape + v.shape:
        raise ValueError(
            f"{name}: q {q.shape} and k {k.shape} must be (*B, T, H, K), v {v.shape} "
            f"(*B, T, H, V), with the same *B, T and H and nothing empty"
        )
    *lead, length, heads, width = q.shape
    if length == 1 and "recurrent" in forms:
        form = "recurrent"  # decoding: one step has nothing to share
    for gate, value in gates.items():
        if gate in per_channel:
            require_shape(name, gate, value, q.shape, "(*B, T, H, K)")
        elif value is not None:
            require_shape(name, gate, value, q.shape[:-1], "(*B, T, H)")
    state_shape = (*lead, heads, width, v.shape[-1])
    if initial_state is None:
        initial_state = jnp.zeros(state_shape, jnp.float32)
    require_shape(name, "initial_state", initial_state, state_shape, "(*B, H, K, V)")
    if segment_ids is not None:
        require_shape(name, "segment_ids", segment_ids, (*lead, length), "(*B, T)")
        segment_ids = segment_ids.reshape(-1, length)

    def flat(x):
        return None if x is None else x.reshape(-1, *x.shape[len(lead) :]).astype(jnp.float32)

    run = forms[form]
    # All causal recurrences can be streamed, and no other.
    if "recurrent" in forms:
        run = spread_over_sequence(run, length)
    out, state = run(
        *(flat(x) for x in (q, k, v, *gates.values(), initial_state)), segment_ids, chunk_size
    )
    return out.reshape(v.shape).astype(v.dtype), state.reshape(state_shape)
