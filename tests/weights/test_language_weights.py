"""Language models of transformers by way of their folders: outputs, gradients, text, and back."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from weights.torch_models import loaded, random_variables, randomised

import jaxmodels
from jaxmodels.layers.rotary_scaling import DynamicNtk, Interpolation, Llama3, Yarn
from jaxmodels.models.language.gpt2 import GPT2
from jaxmodels.models.language.llama import Llama
from jaxmodels.weights.table import export_tensors

BATCH, LENGTH, VOCAB = 2, 17, 37
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 41, "num_hidden_layers": 2}
# Their products of groups only take widths that are multiples of 4.
PLAIN_EXPERTS = {"experts_implementation": "eager"}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, **NO_TOKENS}


def rope(kind, **entries):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **entries}}


def llama_config(**changes):
    return transformers.LlamaConfig(**{**SIZES, **rope("default"), **changes})


LLAMA3 = rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=3.0,
    original_max_position_embeddings=13,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=13)


def deepseek_config(**changes):
    sizes = {
        "kv_lora_rank": 11,
        "q_lora_rank": 13,
        "qk_nope_head_dim": 5,
        "qk_rope_head_dim": 6,
        "v_head_dim": 7,
        "moe_intermediate_size": 17,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 3,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }
    return transformers.DeepseekV3Config(**{**SIZES, **rope("default"), **sizes, **changes})


def mixtral_config(**changes):
    experts = {"num_local_experts": 5, "num_experts_per_tok": 2}
    return transformers.MixtralConfig(**{**SIZES, **rope("default"), **experts, **changes})


def rope_with_magnitudes(mscale, all_dim):
    return {
        "rope_parameters": {**YARN["rope_parameters"], "mscale": mscale, "mscale_all_dim": all_dim}
    }


CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=31, n_embd=24, n_layer=2, n_head=3, **NO_TOKENS
    ),
    "gpt2 with another width": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=31, n_embd=24, n_layer=1, n_head=3, n_inner=41, **NO_TOKENS
    ),
    "llama": llama_config,
    "llama 3": lambda: llama_config(tie_word_embeddings=True, head_dim=10, **LLAMA3),
    "llama beyond its context": lambda: llama_config(
        max_position_embeddings=11, **rope("dynamic", factor=3.0)
    ),
    "llama with yarn": lambda: llama_config(**YARN),
    "deepseek_v3": lambda: deepseek_config(),
    "deepseek_v3 stretched": lambda: deepseek_config(
        q_lora_rank=None, rope_interleave=False, **rope_with_magnitudes(0.5, 0.7)
    ),
    "deepseek_v3 with one magnitude": lambda: deepseek_config(**YARN),
    "deepseek_v3 as published": lambda: deepseek_config(**rope_with_magnitudes(1.0, 1.0)),
    "mixtral": lambda: mixtral_config(),
    "mixtral with a window": lambda: mixtral_config(sliding_window=5, router_aux_loss_coef=0.03),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, **rope("default"), head_dim=10),
}


def make(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), **PLAIN_EXPERTS)
    return randomised(model)


def some_tokens(length=LENGTH, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (BATCH, length)))


def as_torch(tokens):
    return torch.tensor(np.asarray(tokens), dtype=torch.int64)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_directions_are_bit_exact(tmp_path, name):
    theirs = make(name)
    model, variables = loaded(theirs, tmp_path / "theirs")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    jaxmodels.save_pretrained(model, variables, tmp_path / "ours")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key])
    again, _ = jaxmodels.load_pretrained(tmp_path / "ours")
    assert again == model
    same = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", **PLAIN_EXPERTS
    ).eval()
    assert type(same) is type(theirs)
    tokens = as_torch(some_tokens())
    with torch.no_grad():
        torch.testing.assert_close(same(tokens).logits, theirs(tokens).logits, atol=0, rtol=0)


def gradients_by_name_in_a_file(model, folder):
    """Which may differ from the names in the module: some join the experts' matrices."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    return {k: v for k, v in tensors.items() if not k.endswith("e_score_correction_bias")}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_theirs(tmp_path, name):
    theirs = make(name)
    # Theirs has no loss that balances experts unless it is asked for.
    plain = {"balance_coefficient": 0.0} if "deepseek" in name or "mixtral" in name else {}
    model, variables = loaded(theirs, tmp_path, **plain)
    others = {kind: tree for kind, tree in variables.items() if kind != "params"}
    tokens, targets = some_tokens(), some_tokens(seed=1)

    logits, state = jax.jit(model.apply)(variables, tokens)
    expected = theirs(as_torch(tokens)).logits
    assert state is None
    np.testing.assert_allclose(logits, expected.detach(), atol=1e-4, rtol=1e-4)

    torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), as_torch(targets).flatten()
    ).backward()
    batch = {"tokens": tokens, "targets": targets}
    found = jax.jit(jax.grad(lambda p: model.loss(p, batch, jax.random.key(0), others)[0]))(
        variables["params"]
    )
    wanted = gradients_by_name_in_a_file(theirs, tmp_path / "gradients")
    named = export_tensors(jaxmodels.weights.family_of(model).tables(model)["params"], found, model)
    assert {*named} == {*wanted}
    for key, gradient in wanted.items():
        np.testing.assert_allclose(named[key], gradient, atol=1e-5, rtol=1e-3, err_msg=key)


@pytest.mark.parametrize("name", ["gpt2", "llama 3", "qwen3"])
def test_reading_in_pieces_is_reading_at_once(tmp_path, name):
    theirs = make(name)
    model, variables = loaded(theirs, tmp_path)
    tokens = some_tokens()
    expected = theirs(as_torch(tokens)).logits.detach()
    state, parts = model.init_state(BATCH, LENGTH), []
    read = jax.jit(model.apply)
    for piece in jnp.split(tokens, [5, 6, 13], axis=1):
        logits, state = read(variables, piece, state=state)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-4, rtol=1e-4)


def test_packed_documents_restart_their_positions(tmp_path):
    theirs = make("gpt2")
    model, variables = loaded(theirs, tmp_path)
    tokens = some_tokens()
    segment_ids = jnp.asarray([[0] * 7 + [1] * (LENGTH - 7)] * BATCH)
    logits, _ = model.apply(variables, tokens, segment_ids=segment_ids)
    for part in (slice(0, 7), slice(7, None)):
        expected = theirs(as_torch(tokens[:, part])).logits.detach()
        np.testing.assert_allclose(logits[:, part], expected, atol=1e-4, rtol=1e-4)


def test_modules_that_look_ahead_are_the_layers_after_the_last(tmp_path):
    """As in the published files, which repeat embeddings and head beside each."""
    theirs = make("deepseek_v3")
    model, _ = loaded(theirs, tmp_path / "theirs")
    model = model.clone(num_ahead=2)
    variables = random_variables(model, some_tokens())
    jaxmodels.save_pretrained(model, variables, tmp_path / "ours")
    path = tmp_path / "ours" / "model.safetensors"
    tensors = load_file(path)
    assert tensors["model.layers.3.eh_proj.weight"].shape == (24, 48)
    assert {int(name.split(".")[2]) for name in tensors if "layers" in name} == {0, 1, 2, 3}
    tensors["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"]
    save_file(tensors, path)
    again, same = jaxmodels.load_pretrained(tmp_path / "ours")
    assert again == model
    chex.assert_trees_all_equal(same, variables)


def test_names_of_older_files_are_understood(tmp_path):
    """The hub's gpt2 has no prefix and keeps its causal mask."""
    model, variables = loaded(make("gpt2"), tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 31, 31), np.float32))
    save_file(tensors, tmp_path / "old" / "model.safetensors")
    again, same = jaxmodels.load_pretrained(tmp_path / "old")
    assert again == model
    chex.assert_trees_all_equal(same, variables)


def test_older_entries_of_rotary_positions_are_understood(tmp_path):
    model, _ = loaded(make("llama 3"), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    entries = config.pop("rope_parameters")
    config["rope_theta"] = entries.pop("rope_theta")
    config["rope_scaling"] = {"type": entries.pop("rope_type"), **entries}
    path.write_text(json.dumps(config))
    assert jaxmodels.load_pretrained(tmp_path)[0] == model


@pytest.mark.parametrize(
    "scaling",
    [
        Interpolation(3.0),
        DynamicNtk(train_length=23, factor=3.0),
        Yarn(3.0, 23, 16.0, 2.0),
        Llama3(3.0, 23, 2.0, 5.0),
        None,
    ],
)
def test_stretched_positions_are_kept(tmp_path, scaling):
    model = Llama(6, 1, 1, 1, 5, vocab_size=7, rope_base=77.0, rope_scaling=scaling, context=23)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    jaxmodels.save_pretrained(model, variables, tmp_path / "model")
    assert jaxmodels.load_pretrained(tmp_path / "model")[0] == model.clone(head_dim=None)


def test_dynamic_scaling_that_the_format_cannot_say_is_refused(tmp_path):
    model = Llama(6, 1, 1, 1, 5, vocab_size=7, rope_scaling=DynamicNtk(train_length=23), context=29)
    with pytest.raises(ValueError, match="at the model's context=29, and train_length=23"):
        jaxmodels.save_pretrained(model, {}, tmp_path / "model")


def test_shards_are_read_and_a_missing_one_is_named(tmp_path):
    theirs = make("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    model, variables = jaxmodels.load_pretrained(tmp_path)
    tokens = some_tokens()
    expected = theirs(as_torch(tokens)).logits.detach()
    np.testing.assert_allclose(model.apply(variables, tokens)[0], expected, atol=1e-4, rtol=1e-4)
    shards[1].unlink()
    with pytest.raises(ValueError, match=shards[1].name):
        jaxmodels.load_pretrained(tmp_path)


def test_other_configurations_are_refused(tmp_path):
    make("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"model_type": "mamba"}, "is of class 'mamba'; supported: .*llama"),
        ({"attention_bias": True}, "llama: attention_bias=True, only False is supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "type 'longrope'; supported: default"),
        ({"model_type": "qwen3", "use_sliding_window": False}, "missing .*q_norm"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            jaxmodels.load_pretrained(tmp_path)
    del config["hidden_size"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="hidden_size is missing"):
        jaxmodels.load_pretrained(tmp_path)


def test_a_batch_without_targets_is_named():
    model = GPT2(6, 1, 1, vocab_size=7, context=11)
    tokens = jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(ValueError, match="GPT2: the batch has no 'targets'"):
        model.loss({}, {"tokens": tokens}, jax.random.key(0))
    with pytest.raises(ValueError, match=r"is \(1, 3\), but \{'targets': \(1, 2\)\}"):
        model.loss({}, {"tokens": tokens, "targets": tokens[:, :2]}, jax.random.key(0))
