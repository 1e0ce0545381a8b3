"""Folders in eight bits: as `transformers` quantises weights, and by hand in torch."""

import json
import re
import shutil
import types

import chex
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from weights.test_language_weights import make

import jaxmodels
from jaxmodels.weights.float8 import with_scales
from jaxmodels.weights.folder import open_tensors

BLOCK = (7, 5)
# Theirs takes whole blocks alone.
WHOLE = (8, 8)


def quantizer(scale_fmt=None):
    config = types.SimpleNamespace(weight_block_size=WHOLE, scale_fmt=scale_fmt)
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
FP8_WHOLE = {**FP8, "weight_block_size": WHOLE}


def whole_blocks(tensors):
    return [n for n in layers(tensors) if not any(size % 8 for size in tensors[n].shape)]


@pytest.mark.parametrize(
    ("name", "quantize", "names", "config"),
    [
        ("deepseek_v3", by_hand, layers, FP8),
        ("qwen3", by_transformers(None, torch.float32), whole_blocks, FP8_WHOLE),
        ("qwen3", by_transformers(None, torch.bfloat16), whole_blocks, FP8_WHOLE),
        ("qwen3", by_transformers("ue8m0", torch.float8_e8m0fnu), whole_blocks, FP8_WHOLE),
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


def written(path, **tensors):
    save_file(tensors, path / "model.safetensors")
    return open_tensors(path)


def test_blocks_are_of_128_where_nothing_is_said(tmp_path):
    values = torch.ones(130, 257).to(torch.float8_e4m3fn)
    scales = torch.arange(1.0, 7.0).reshape(2, 3)
    with written(tmp_path, w=values, w_scale_inv=scales) as tensors:
        found = with_scales(tensors, {})
        assert found.keys() == {"w"} and found["w"].get_shape() == [130, 257]
        meant = np.kron(scales, np.ones((128, 128), np.float32))[:130, :257]
        np.testing.assert_array_equal(found["w"][:], meant)
        np.testing.assert_array_equal(found["w"][129:, 3], meant[129:, 3])


def test_a_cast_without_scales_is_what_it_says(tmp_path):
    values = torch.tensor([1.5, -2.0]).to(torch.float8_e5m2)
    with written(tmp_path, w=values) as tensors:
        np.testing.assert_array_equal(with_scales(tensors, {})["w"][:], [1.5, -2.0])


def test_a_scale_may_lie_in_another_shard(tmp_path):
    make("llama").save_pretrained(tmp_path / "whole")
    rewritten(tmp_path / "whole", by_hand)
    set_config(tmp_path / "whole", quantization_config=FP8)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "model.safetensors").unlink()
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    place = {name: f"{name.endswith('scale_inv')}.safetensors" for name in tensors}
    for file in {*place.values()}:
        part = {name: tensors[name] for name in tensors if place[name] == file}
        save_file(part, tmp_path / "parts" / file)
    index = tmp_path / "parts" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": place}))
    trees = [jaxmodels.load_pretrained(tmp_path / name)[1] for name in ("whole", "parts")]
    chex.assert_trees_all_equal(*trees)


SIZE, NAME = "weight_block_size", "down_proj.weight"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {**FP8, SIZE: (9, 5)},
            rf"of \(9, 5\).*\n(.*\n)*.*{NAME}_scale_inv \(4, 9\), expected \(3, 9\)",
        ),
        ({**FP8, SIZE: 128}, "weight_block_size=128 of config.json is not two positive numbers"),
        ({**FP8, SIZE: [7]}, r"weight_block_size=\[7\] of config.json is not two positive"),
        ({**FP8, SIZE: [0, 7]}, r"weight_block_size=\[0, 7\] of config.json is not two positive"),
        ({"quant_method": "gptq"}, "quant_method='gptq'; only 'fp8'"),
        ({"bits": 4}, "quant_method=None; only 'fp8'"),
        ([8], r"quant_method=\[8\]; only 'fp8'"),
    ],
)
def test_other_ways_to_quantise_and_scales_that_do_not_fit_are_named(tmp_path, config, message):
    make("llama").save_pretrained(tmp_path)
    rewritten(tmp_path, by_hand)
    set_config(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match=message):
        jaxmodels.load_pretrained(tmp_path)


@pytest.mark.parametrize("shape", [(2, 2), (2,), (1, 1)])
def test_scales_of_another_shape_are_named(tmp_path, shape):
    make("llama").save_pretrained(tmp_path)
    rewritten(tmp_path, lambda weight: (weight, torch.ones(shape), None))
    set_config(tmp_path, quantization_config=FP8)
    with pytest.raises(ValueError, match=rf"{NAME}_scale_inv {re.escape(str(shape))}, expected"):
        jaxmodels.load_pretrained(tmp_path)


def test_eight_bits_whose_scale_is_lost_are_named(tmp_path):
    make("llama").save_pretrained(tmp_path)
    rewritten(tmp_path, by_hand)
    set_config(tmp_path, quantization_config=FP8)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("_scale_inv"))
    save_file({name: t for name, t in tensors.items() if name != lost}, path)
    with pytest.raises(ValueError, match=f"has eight bits, but there is no {lost}"):
        jaxmodels.load_pretrained(tmp_path)


def test_a_scale_of_nothing_is_an_extra_tensor(tmp_path):
    make("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"model.norm.bias_scale_inv": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"extra model.norm.bias_scale_inv"):
        jaxmodels.load_pretrained(tmp_path)
