"""Folders in eight bits: as `transformers` quantises weights, and by hand in torch."""

import json
import types

import chex
import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from weights.test_language_weights import make

import jaxmodels

BLOCK = (8, 8)


def quantizer(scale_fmt=None):
    config = types.SimpleNamespace(weight_block_size=BLOCK, scale_fmt=scale_fmt)
    return types.SimpleNamespace(quantization_config=config)


def layers(tensors):
    """The matrices of linear maps, which is what such folders have in eight bits."""
    return [name for name, t in tensors.items() if t.ndim == 2 and "layers" in name]


def by_hand(weight):
    """Eight bits and scales of blocks, of which the last are smaller, and what they stand for."""
    grid = [-(-size // part) for size, part in zip(weight.shape, BLOCK, strict=True)]
    values, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(grid)
    meant = torch.empty_like(weight)
    for i, j in np.ndindex(*grid):
        here = tuple(slice(k * p, (k + 1) * p) for k, p in zip((i, j), BLOCK, strict=True))
        scales[i, j] = weight[here].abs().max() / 448
        values[here] = (weight[here] / scales[i, j]).to(torch.float8_e4m3fn)
        meant[here] = values[here].float() * scales[i, j]
    return values, scales, meant


def by_transformers(scale_fmt, scale_dtype):
    def quantize(weight):
        found = Fp8Quantize(quantizer(scale_fmt)).convert({"w": weight})
        values, scales = found["w"], found["w_scale_inv"].to(scale_dtype)
        meant = Fp8Dequantize(quantizer())._dequantize_one(values, scales, torch.float32)
        return values, scales, meant

    return quantize


def by_one_scale(dtype):
    def quantize(weight):
        scale = weight.abs().max() / torch.finfo(dtype).max
        values = (weight / scale).to(dtype)
        return values, scale, values.float() * scale

    return quantize


def rewritten(folder, quantize, names=layers):
    """Puts eight bits into a folder; gives the tensors that they stand for."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    written, meant = dict(tensors), dict(tensors)
    for name in names(tensors):
        written[name], written[f"{name}_scale_inv"], meant[name] = quantize(tensors[name])
    save_file(written, path)
    return meant


def set_config(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": BLOCK}


def whole_blocks(tensors):
    return [n for n in layers(tensors) if not any(size % 8 for size in tensors[n].shape)]


@pytest.mark.parametrize(
    ("name", "quantize", "names", "config"),
    [
        ("deepseek_v3", by_hand, layers, FP8),
        ("qwen3", by_transformers(None, torch.float32), whole_blocks, FP8),
        ("qwen3", by_transformers(None, torch.bfloat16), whole_blocks, FP8),
        ("qwen3", by_transformers("ue8m0", torch.float8_e8m0fnu), whole_blocks, FP8),
        ("llama", by_one_scale(torch.float8_e5m2), layers, {"quant_method": "fp8"}),
    ],
)
def test_reads_what_the_eight_bits_stand_for(tmp_path, name, quantize, names, config):
    make(name).save_pretrained(tmp_path / "eight")
    make(name).save_pretrained(tmp_path / "meant")
    meant = rewritten(tmp_path / "eight", quantize, names)
    set_config(tmp_path / "eight", quantization_config=config)
    save_file(meant, tmp_path / "meant" / "model.safetensors")
    model, variables = jaxmodels.load_pretrained(tmp_path / "eight")
    same, expected = jaxmodels.load_pretrained(tmp_path / "meant")
    assert model == same
    chex.assert_trees_all_equal(variables, expected)
    whole = make(name).state_dict()
    assert len(names(load_file(tmp_path / "eight" / "model.safetensors"))) >= 4
    assert any(not torch.equal(meant[key], whole[key]) for key in meant.keys() & whole.keys())


def test_blocks_are_of_128_where_nothing_is_said(tmp_path):
    make("llama").save_pretrained(tmp_path)
    _, before = jaxmodels.load_pretrained(tmp_path)
    rewritten(tmp_path, lambda weight: (weight, torch.full((1, 1), 2.0), None))
    _, after = jaxmodels.load_pretrained(tmp_path)
    first, second = (v["params"]["block_0"]["mlp"] for v in (before, after))
    chex.assert_trees_all_equal(jax.tree.map(lambda a: 2 * a, first), second)


def test_other_ways_to_quantise_and_scales_that_do_not_fit_are_named(tmp_path):
    make("llama").save_pretrained(tmp_path)
    rewritten(tmp_path, by_hand)
    set_config(tmp_path, quantization_config={**FP8, "weight_block_size": (7, 8)})
    with pytest.raises(
        ValueError, match=r"block of \(7, 8\).*\n.*down_proj.weight_scale_inv \(3, 6\)"
    ):
        jaxmodels.load_pretrained(tmp_path)
    set_config(tmp_path, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match="quant_method='gptq'; only 'fp8'"):
        jaxmodels.load_pretrained(tmp_path)


def test_a_scale_of_nothing_is_an_extra_tensor(tmp_path):
    make("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"model.norm.bias_scale_inv": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"extra model.norm.bias_scale_inv"):
        jaxmodels.load_pretrained(tmp_path)
