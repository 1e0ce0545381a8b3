"""Which experts see which tokens, and what keeps their loads even."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.ops.checks import require_shape
from jaxmodels.ops.mesh_axes import for_each_token


def top_k_routing(
    scores: Float[Array, "*B E"],
    top_k: int,
    *,
    bias: Float[Array, "E"] | None = None,
    groups: int = 1,
    top_groups: int | None = None,
    renormalise: bool = True,
    scale: float = 1.0,
) -> tuple[Float[Array, "*B K"], Int[Array, "*B K"]]:
    """Every token chooses the experts that score highest.

    experts = top_k over e of s_e + b_e,  within the best groups
    w_e = scale s_e / sum over chosen e' of s_e'

    A group is as good as the sum of its two best biased scores. The bias decides
    who is chosen and never enters the weights.

    Args:
      scores: positive, such as the softmax or the sigmoid of a router's logits.
      top_k: K, experts a token.
      bias: b, added for the choice alone; see `updated_bias`.
      groups: equal parts of the experts, in order, such as those of one machine.
      top_groups: how many of them a token may choose from; None is all.
      renormalise: divides by the sum of the chosen scores, else w_e = scale s_e.
      scale: factor on all weights.

    Returns:
      Weights, and the experts' numbers; the best first.

    Raises:
      ValueError: more choices than there are experts to choose from, experts that
        do not divide into groups, groups of one expert, or a bias of another shape.

    Source: Shazeer et al. 2017, section 2.1 (arXiv:1701.06538); without and with
    renormalisation Fedus et al. 2021 (arXiv:2101.03961) and Jiang et al. 2024,
    "Mixtral of Experts", section 2.1 (arXiv:2401.04088); bias and groups
    DeepSeek-AI 2024, "DeepSeek-V3", equations 13 to 16 and section 2.1.2
    (arXiv:2412.19437).
    """
    top_groups = groups if top_groups is None else top_groups
    check_choice("top_k_routing", scores.shape[-1], top_k, groups, top_groups)
    preferred = scores
    if bias is not None:
        require_shape("top_k_routing", "bias", bias, scores.shape[-1:], "(E,)")
        preferred = scores + jnp.broadcast_to(bias, scores.shape)
    if top_groups < groups:
        preferred = _within_best_groups(preferred, groups, top_groups)
    _, experts = for_each_token(partial(lax.top_k, k=top_k), lax.stop_gradient(preferred))
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if renormalise:
        # Sigmoids may all be zero in float32.
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return scale * weights, experts


def check_choice(name: str, num_experts: int, top_k: int, groups: int, top_groups: int) -> None:
    """Raises unless a token can choose `top_k` experts out of its groups.

    Raises:
      ValueError: naming the caller, the argument and the remedy.
    """
    if groups < 1 or num_experts % groups:
        raise ValueError(
            f"{name}: {num_experts} experts do not divide into groups={groups}; choose a divisor"
        )
    if not 1 <= top_groups <= groups:
        raise ValueError(f"{name}: top_groups={top_groups} must lie in 1 to groups={groups}")
    if top_groups < groups and num_experts == groups:
        raise ValueError(
            f"{name}: groups={groups} of one expert each have no two best scores; use fewer groups"
        )
    seen = top_groups * num_experts // groups
    if not 1 <= top_k <= seen:
        raise ValueError(
            f"{name}: top_k={top_k} must lie in 1 to {seen}, the experts that a token may choose "
            f"from ({top_groups} of {groups} groups of {num_experts // groups})"
        )


def _within_best_groups(scores, groups, top_groups):
    grouped = scores.reshape(*scores.shape[:-1], groups, -1)
    quality = for_each_token(partial(lax.top_k, k=2), grouped)[0].sum(axis=-1)
    _, best = for_each_token(partial(lax.top_k, k=top_groups), quality)
    allowed = jax.nn.one_hot(best, groups, dtype=bool).any(axis=-2)
    return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(scores.shape)


def expert_choice(
    scores: Float[Array, "N E"], capacity: int
) -> tuple[Float[Array, "E C"], Int[Array, "E C"]]:
    """Every expert chooses the tokens that score highest, so that loads are equal.

    tokens_e = top_C over n of s_ne,   w_ec = s of the token chosen

    A token may be chosen by many experts or by none. What a token gets depends on
    all others, later ones too: a language model trained so sees the future.

    Args:
      scores: the softmax over experts of a router's logits.
      capacity: C, tokens an expert.

    Returns:
      Weights, and the tokens' numbers; the best first.

    Raises:
      ValueError: the capacity is not in 1 to N.

    Source: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing",
    section 3.2 (arXiv:2202.09368).
    """
    if not 1 <= capacity <= len(scores):
        raise ValueError(
            f"expert_choice: capacity={capacity} must lie in 1 to the {len(scores)} tokens"
        )
    return tuple(lax.top_k(scores.T, capacity))


def capacity_slots(
    weights: Float[Array, "N K"], experts: Int[Array, "N K"], num_experts: int, capacity: int
) -> tuple[Float[Array, "E C"], Int[Array, "E C"]]:
    """Gives the tokens that chose an expert its places, as far as there are any.

    All first choices come before all second choices, and earlier tokens before
    later ones; who finds no place is dropped.

    Args:
      weights, experts: from `top_k_routing`; E is a choice of none.
      num_experts: E.
      capacity: C, places an expert.

    Returns:
      As `expert_choice`: the weight and the token of every place. An empty place
      has weight 0 and token 0.

    Raises:
      ValueError: no places.

    Source: Lepikhin et al. 2020, "GShard", algorithm 1 (arXiv:2006.16668).
    """
    if capacity < 1:
        raise ValueError(f"capacity_slots: capacity={capacity} must be at least 1")
    choices = experts.T.ravel()
    order = jnp.argsort(choices, stable=True)
    load = expert_load(choices, num_experts)
    ends = jnp.cumsum(load)
    places = (ends - load)[:, None] + jnp.arange(capacity)[None, :]
    filled = places < ends[:, None]
    chosen = order[jnp.minimum(places, len(order) - 1)]
    tokens = jnp.where(filled, chosen % len(experts), 0)
    return jnp.where(filled, weights.T.ravel()[chosen], 0), tokens


def counted_choices(
    experts: Int[Array, "*B K"], counted: Bool[Array, "*B"] | None, num_experts: int
) -> Int[Array, "*B K"]:
    """The choices of some tokens, such as those that are no padding; of the others E: none.

    Args:
      experts: numbers from `top_k_routing`.
      counted: False for a token that chooses nothing; None where all choose.
      num_experts: E.

    Source: what `transformers` does with an attention mask in Mixtral's balance loss.
    """
    if counted is None:
        return experts
    return jnp.where(counted[..., None], experts, num_experts)


def expert_load(experts: Int[Array, "..."], num_experts: int) -> Int[Array, "E"]:
    """How often each expert was chosen.

    Args:
      experts: numbers from `top_k_routing`, of any shape; E is a choice of none.
      num_experts: E.
    """
    numbers = jnp.arange(num_experts)
    return jnp.sum(experts.reshape(-1, 1) == numbers[None, :], axis=0, dtype=jnp.int32)


def load_balance_loss(
    probabilities: Float[Array, "*B E"], experts: Int[Array, "*B K"]
) -> Float[Array, ""]:
    """Punishes probability mass on experts that are chosen too often.

    loss = E sum_e f_e P_e,   f_e = choices of e a token,   P_e = mean probability

    K where all is even, up to E where every token has the same certain choice. The
    gradient flows through P alone.

    Args:
      probabilities: the softmax of a router's logits.
      experts: those chosen; a token that chose E is left out of f and P.

    Returns:
      A scalar to be multiplied by a small coefficient (0.01 in Switch).

    Source: Fedus et al. 2021, "Switch Transformers", equations 4 to 6
    (arXiv:2101.03961); for K > 1 as in Mixtral's public code.
    """
    num_experts = probabilities.shape[-1]
    counted = experts[..., 0] < num_experts
    tokens = jnp.maximum(jnp.sum(counted), 1)
    total = jnp.where(counted[..., None], probabilities.astype(jnp.float32), 0.0)
    mean = total.reshape(-1, num_experts).sum(axis=0) / tokens
    return num_experts / tokens * jnp.sum(expert_load(experts, num_experts) * mean)


def sequence_balance_loss(
    scores: Float[Array, "B T E"], experts: Int[Array, "B T K"]
) -> Float[Array, ""]:
    """The balance within each sequence, averaged over sequences that have tokens.

    loss = mean over sequences of sum_e f_e P_e
    f_e = E / (K T) choices of e,   P_e = 1 / T sum_t s_te / sum_e' s_te'

    1 where all is even.

    Args:
      scores: positive; made to sum to one here.
      experts: those chosen; a token that chose E is left out.

    Returns:
      A scalar to be multiplied by a very small coefficient (0.0001 in DeepSeek-V3).

    Source: DeepSeek-AI 2024, "DeepSeek-V3", equations 17 to 20 (arXiv:2412.19437).
    """
    scores = scores.astype(jnp.float32)
    shares = scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)

    def of_one(shares, experts):
        return load_balance_loss(shares, experts) / experts.shape[-1]

    has_tokens = jnp.any(experts[..., 0] < scores.shape[-1], axis=-1)
    return jnp.sum(jax.vmap(of_one)(shares, experts)) / jnp.maximum(jnp.sum(has_tokens), 1)


def router_z_loss(
    logits: Float[Array, "*B E"], counted: Bool[Array, "*B"] | None = None
) -> Float[Array, ""]:
    """Keeps a router's logits small.

    loss = mean of (log sum_e exp l_e)^2

    Args:
      logits: before the softmax.
      counted: which tokens the mean is over; None is all.

    Returns:
      A scalar to be multiplied by a small coefficient (0.001 in ST-MoE).

    Source: Zoph et al. 2022, "ST-MoE", equation 5 (arXiv:2202.08906).
    """
    squares = jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1))
    if counted is None:
        return squares.mean()
    return jnp.sum(jnp.where(counted, squares, 0.0)) / jnp.maximum(jnp.sum(counted), 1)


def updated_bias(bias: Float[Array, "E"], load: Int[Array, "E"], rate: float) -> Float[Array, "E"]:
    """Balances without a loss: experts that were chosen too often become less attractive.

    b_e <- b_e + rate sign(mean load - load_e)

    Args:
      bias: of `top_k_routing`.
      load: how often each expert was chosen in this step.
      rate: of the change (0.001 in DeepSeek-V3).

    Returns:
      The bias of the next step.

    Raises:
      ValueError: bias and load differ in shape.

    Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for
    Mixture-of-Experts", algorithm 1 (arXiv:2408.15664).
    """
    require_shape("updated_bias", "load", load, bias.shape, "bias's shape")
    # In integers, where a load that is exactly even is seen to be.
    return bias + rate * jnp.sign(load.sum() - len(load) * load)
