"""Small models, and every kind of draft for them."""

import functools

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxmodels.decoding.drafts import ModelDraft, NgramDraft
from jaxmodels.decoding.head_drafts import MedusaDraft, ModuleDraft, MultiTokenDraft
from jaxmodels.models.language.decoder import Decoder
from jaxmodels.models.language.deepseek_v3 import DeepseekV3
from jaxmodels.models.language.medusa import MedusaHeads
from jaxmodels.models.language.multi_token import MultiToken
from jaxmodels.ops.candidate_tree import CandidateTree, chain

VOCABULARY = 7
TREE = CandidateTree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0)))


@functools.cache
def made(mixer="softmax", width=12, seed=None, depth=2, multi_token=False):
    """A model and its variables, of which text is varied and no two tokens are equally likely."""
    if seed is None:
        seed = 1 if multi_token else {"softmax": 7, "linear": 2, "sliding_window": 3}[mixer]
    options = {"head_dim": 6} if mixer == "sliding_window" else {"head_dim": 8}
    options |= {"window": 3} if mixer == "sliding_window" else {}
    model = Decoder(
        width=width,
        depth=depth,
        vocab_size=VOCABULARY,
        mixer=mixer,
        mixer_options=FrozenDict(num_heads=1, **options),
    )
    if multi_token:
        model = MultiToken(model, heads=4, drafting=True)
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))
    return model, jax.tree.map(lambda p: 3.0 * p, variables)


@functools.cache
def whole(model):
    """All logits, of a text that is read at once and without a state."""
    return jax.jit(lambda variables, tokens: model.apply(variables, tokens)[0])


def near(variables, amount=0.15):
    """Parameters a little off, for a draft that is often right."""
    key = jax.random.key(9)
    return jax.tree.map(
        lambda p: p + amount * jnp.std(p) * jax.random.normal(key, p.shape), variables
    )


@functools.cache
def medusa_heads(width=12):
    heads = MedusaHeads(VOCABULARY, heads=3)
    params = heads.begin_with(made()[1]["params"]["embed"]["embedding"].T)
    return heads, near({"params": params}, 0.3)


@functools.cache
def deepseek(num_ahead=1):
    model = DeepseekV3(
        width=12,
        depth=2,
        dense_depth=1,
        num_heads=2,
        mlp_width=10,
        expert_width=6,
        q_rank=None,
        kv_rank=4,
        nope_dim=4,
        rope_dim=2,
        value_dim=5,
        num_experts=4,
        top_k=2,
        groups=1,
        top_groups=1,
        num_ahead=num_ahead,
        vocab_size=VOCABULARY,
        context=None,
    )
    variables = jax.jit(model.init)(jax.random.key(8), jnp.zeros((1, 4), jnp.int32))
    grown = jax.tree.map(lambda p: p if p.ndim == 1 else 160.0 * p, variables["params"])
    return model, {**variables, "params": grown}


def case(kind):
    """The model that generates, its variables, and a draft."""
    if kind == "module":
        model, variables = deepseek()
        return model, variables, ModuleDraft(model, variables, 2)
    if kind == "modules":
        model, variables = deepseek(3)
        return model, variables, ModuleDraft(model, variables, 5)
    if kind.startswith("multi_token"):
        model, variables = made(multi_token=True)
    else:
        model, variables = made()
    drafts = {
        "itself": lambda: ModelDraft(model, variables, 3),
        "model": lambda: ModelDraft(model, near(variables), 3),
        "recurrent model": lambda: ModelDraft(*made("linear", width=10, seed=1, depth=1), 2),
        "n-gram": lambda: NgramDraft(3, 2),
        "multi_token": lambda: MultiTokenDraft(model, variables),
        "multi_token drawn": lambda: MultiTokenDraft(model, variables, chain(2), drawn=True),
        "multi_token tree": lambda: MultiTokenDraft(model, variables, TREE),
        "medusa tree": lambda: MedusaDraft(*medusa_heads(), TREE),
        "medusa tree drawn": lambda: MedusaDraft(*medusa_heads(), TREE, drawn=True),
    }
    return model, variables, drafts[kind]()
