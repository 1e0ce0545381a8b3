"""The feed-forward half of a transformer block as a mixture of experts."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float

from jaxmodels.layers.mlp import GatedMlp
from jaxmodels.ops import routing
from jaxmodels.ops.expert_parallel import dropless_on_mesh
from jaxmodels.ops.experts import capacity_experts
from jaxmodels.ops.linear import linear

# Of each expert's matrices, as Linear has it of one.
_INIT = nn.initializers.variance_scaling(
    1.0, "fan_avg", "uniform", in_axis=-2, out_axis=-1, batch_axis=0
)


class MixtureOfExperts(nn.Module):
    """Many gated feed-forwards, of which a router picks a few for each token.

    out = shared(x) + sum over chosen e of w_e down_e (silu(gate_e x) * up_e x)

    With the defaults it is Mixtral's; DeepSeek-V3's has scores="sigmoid", groups,
    scale, shared_width and bias_rate.

    What keeps loads even is one of two. `balance_coefficient` sows a loss: Switch's
    and Mixtral's over the whole batch for softmax scores, DeepSeek-V3's over each
    sequence for sigmoids. `bias_rate` keeps a bias in the collection "router", moved
    after each call in which that collection is mutable. Losses are sown in the
    collection "losses", multiplied by their coefficients; how many tokens each expert
    had, in "intermediates" as "expert_load".

    Padding goes through experts as other tokens do, but counts in no loss and no load, and
    takes no other token's place.

    Where no token is dropped, experts may lie on different devices of a mesh, and tokens
    travel to them (`ops.expert_parallel`).

    Attributes:
      num_experts: E.
      top_k: experts a token.
      hidden_width: F, of each expert.
      scores: "softmax" or "sigmoid" of the router's logits.
      renormalise: weights of a token sum to `scale`.
      groups, top_groups: a token chooses from its best `top_groups` of `groups`
        equal parts of the experts; None is all.
      scale: factor on the weights.
      shared_width: F of a feed-forward that sees every token; 0 is none.
      capacity_factor: None drops nothing; else an expert has room for as many times
        its even share of tokens, and more than that are dropped.
      choice: "token", or "expert": each expert chooses its even share of all tokens,
        see `ops.routing.expert_choice`.
      balance_coefficient, z_coefficient: of the losses; 0 is none.
      bias_rate: of the balancing bias; None is no bias, 0 one that stays.
      kernel_init, expert_init: of the router and the shared part, and of the experts.
      dtype: of the computation; the router works in float32.

    Raises:
      ValueError: options that contradict each other.

    Source: Jiang et al. 2024, "Mixtral of Experts", section 2.1 (arXiv:2401.04088);
    DeepSeek-AI 2024, "DeepSeek-V3", section 2.1.2 (arXiv:2412.19437).
    """

    num_experts: int
    top_k: int
    hidden_width: int
    scores: str = "softmax"
    renormalise: bool = True
    groups: int = 1
    top_groups: int | None = None
    scale: float = 1.0
    shared_width: int = 0
    capacity_factor: float | None = None
    choice: str = "token"
    balance_coefficient: float = 0.0
    z_coefficient: float = 0.0
    bias_rate: float | None = None
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    expert_init: Initializer = _INIT
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], counted: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Returns an array of x's shape in `dtype`.

        Args:
          x: tokens.
          counted: False on padding; None without any.
        """
        self._check()
        x = x.astype(self.dtype)
        has_bias = self.bias_rate is not None
        logits, bias = Router(self.num_experts, has_bias, self.kernel_init, name="router")(x)
        scores = jax.nn.softmax(logits) if self.scores == "softmax" else jax.nn.sigmoid(logits)
        if self.z_coefficient:
            self._sow("router_z", self.z_coefficient * routing.router_z_loss(logits, counted))
        if self.choice == "expert":
            tokens = x.reshape(-1, x.shape[-1])
            if counted is not None:
                scores = jnp.where(counted[..., None], scores, 0.0)
            out = self._chosen_by_experts(tokens, scores.reshape(-1, self.num_experts))
        else:
            out = self._chosen_by_tokens(x, scores, bias, counted)
        out = out.reshape(x.shape)
        if self.shared_width:
            fields = {"kernel_init": self.kernel_init, "dtype": self.dtype, "name": "shared"}
            out = out + GatedMlp(self.shared_width, **fields)(x)
        return out

    def _chosen_by_experts(self, tokens, scores):
        capacity = self._places(len(tokens), 1.0)
        weights, chosen = routing.expert_choice(scores, capacity)
        return capacity_experts(tokens, self.scale * weights, chosen, *self._matrices(tokens))

    def _chosen_by_tokens(self, x, scores, bias, counted):
        weights, experts = routing.top_k_routing(
            scores,
            self.top_k,
            bias=None if bias is None else bias.value,
            groups=self.groups,
            top_groups=self.top_groups,
            renormalise=self.renormalise,
            scale=self.scale,
        )
        choices = routing.counted_choices(experts, counted, self.num_experts)
        self._balance(scores, choices, bias)
        if self.capacity_factor is None:
            return dropless_on_mesh(x, weights, experts, *self._matrices(x))
        tokens = x.reshape(-1, x.shape[-1])
        pairs = (a.reshape(-1, self.top_k) for a in (weights, choices))
        capacity = self._places(len(tokens), self.capacity_factor)
        slots = routing.capacity_slots(*pairs, self.num_experts, capacity)
        return capacity_experts(tokens, *slots, *self._matrices(tokens))

    def _balance(self, scores, experts, bias):
        load = routing.expert_load(experts, self.num_experts)
        self.sow("intermediates", "expert_load", load)
        if self.balance_coefficient:
            softmax = self.scores == "softmax"
            loss = routing.load_balance_loss if softmax else routing.sequence_balance_loss
            self._sow("balance", self.balance_coefficient * loss(scores, experts))
        if bias is not None and self.is_mutable_collection("router") and not self.is_initializing():
            bias.value = routing.updated_bias(bias.value, load, self.bias_rate)

    def _sow(self, name, loss):
        if not self.is_initializing():
            self.sow("losses", name, loss)

    def _matrices(self, tokens):
        width = tokens.shape[-1]
        inward = (self.num_experts, width, self.hidden_width)
        outward = (self.num_experts, self.hidden_width, width)
        shapes = {"gate": inward, "up": inward, "down": outward}
        return [
            self.param(name, self.expert_init, shape).astype(self.dtype)
            for name, shape in shapes.items()
        ]

    def _places(self, num_tokens: int, factor: float) -> int:
        return max(1, math.ceil(factor * self.top_k * num_tokens / self.num_experts))

    def _check(self):
        name = type(self).__name__
        if self.scores not in ("softmax", "sigmoid"):
            raise ValueError(f'{name}: scores={self.scores!r} is neither "softmax" nor "sigmoid"')
        if self.choice not in ("token", "expert"):
            raise ValueError(f'{name}: choice={self.choice!r} is neither "token" nor "expert"')
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(
                f"{name}: capacity_factor={self.capacity_factor} must be positive; None drops "
                f"nothing"
            )
        top_groups = self.groups if self.top_groups is None else self.top_groups
        routing.check_choice(name, self.num_experts, self.top_k, self.groups, top_groups)
        if self.choice == "expert":
            self._check_expert_choice(name)

    def _check_expert_choice(self, name: str) -> None:
        """Loads are equal by construction, and no token has K weights to make sum to one."""
        wanted = {
            "renormalise": False,
            "groups": 1,
            "capacity_factor": None,
            "balance_coefficient": 0,
            "bias_rate": None,
        }
        if wrong := {k: getattr(self, k) for k, v in wanted.items() if getattr(self, k) != v}:
            raise ValueError(
                f'{name}: choice="expert" contradicts {wrong}; use '
                f"{ {k: wanted[k] for k in wrong} }"
            )


class Router(nn.Module):
    """A score for every expert, in float32, and the bias that balances them.

    Attributes:
      num_experts: E.
      has_bias: whether there is one, in the collection "router".
      kernel_init: of the (D, E) kernel.
    """

    num_experts: int
    has_bias: bool = False
    kernel_init: Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> tuple[Float[Array, "*B E"], nn.Variable | None]:
        """Returns logits, and the variable of the bias, for the caller to read and move."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.num_experts))
        logits = linear(x.astype(jnp.float32), kernel.astype(jnp.float32))
        if not self.has_bias:
            return logits, None
        return logits, self.variable("router", "bias", jnp.zeros, (self.num_experts,))
