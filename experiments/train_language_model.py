"""Trains or fine-tunes any language model on the standard library's source, or on your text.

Claim     A language model is the better compressor (Delétang et al. 2023, "Language
          Modeling Is Compression", arXiv:2309.10668, table 1): for windows of text
          that it has not seen, each coded by itself, it needs fewer bits a byte than
          gzip and LZMA need for the same windows.
Measured  Bits per byte on held-out files, of the model and of both compressors;
          tokens a second; the share of this machine's matrix products that training
          reaches, with 6 operations a parameter and token; and samples.
Run       python experiments/train_language_model.py          (about 2 min on 2 CPU cores)
          python experiments/train_language_model.py --model decoder --mixer gated_delta
          python experiments/train_language_model.py --pretrained FOLDER --data TEXTS
          python experiments/train_language_model.py --help
"""

import dataclasses
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from _language import (
    bits_per_byte,
    held_out_bytes,
    mixer_decoder,
    text_sets,
    train_language_model,
)

from jaxmodels import (
    create_model,
    data,
    decoding,
    load_pretrained,
    plots,
    save_pretrained,
    training,
)
from jaxmodels.models.language.language_model import LanguageModel
from jaxmodels.training import processes
from jaxmodels.training.experiment import Result, run
from jaxmodels.training.flops import peak_flops
from jaxmodels.training.logging import read_metrics


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    data: Path | None = None
    """A text, a .jsonl or .parquet file, or a folder of them; by default the source and
    the manual of Python's standard library."""
    model: Literal["decoder", "gpt2", "llama", "qwen3", "mixtral", "deepseek_v3"] = "llama"
    """A family at a size for two cores; "decoder" takes any mixer."""
    mixer: str = "softmax"
    """Of the decoder; any causal name of `jaxmodels.list_mixers()`."""
    pretrained: str = ""
    """A folder of a model to start from, with its tokenizer, in place of `model`; what it
    becomes is saved in that format, in the folder `model` of the results."""
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    head_dim: int = 32
    """Of the decoder; elsewhere it is width / num_heads."""
    length: int = 256
    """Tokens of a training sequence; without a tokenizer a token is a byte."""
    batch_size: int = 16
    steps: int = 300
    learning_rate: float = 3e-3
    warmup: int = 40
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    precision: str = "float32"
    """float32, bfloat16, float16, or float8 (products of eight bits, the rest bfloat16)."""
    held_out_windows: int = 128
    """Held-out sequences that bits per byte are measured on."""
    prompt: str = "def "
    """What samples begin with."""
    samples: int = 3
    sample_tokens: int = 200
    temperature: float = 0.8
    seed: int = 0
    mesh: str = ""
    """Devices, such as "data=2,fsdp=4"; by default one, or all of several processes."""
    checkpoint_every: int = 100
    log_every: int = 10
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/train_language_model/TIME is begun."""


def main(config: Config, folder: Path) -> Result:
    model, start, tokenizer = load_model(config)
    train_set, held_out = text_sets(config.data, config.length, tokenizer)
    variables, seconds = train_language_model(
        config, model, train_set, folder, start=start, mesh=config.mesh
    )
    processes.first_goes_on()
    judged = {"count": config.held_out_windows, "tokenizer": tokenizer}
    bits = {"the model": bits_per_byte(model, variables, held_out, **judged)}
    texts = held_out_bytes(held_out, **judged)
    bits |= {name: compressed_bits(code, texts) for name, code in COMPRESSORS.items()}
    write_samples(config, model, variables, tokenizer, folder)
    if config.pretrained:
        save_pretrained(model, variables, folder / "model")
    draw_figure(folder, bits)
    return conclude(config, model, variables["params"], bits, seconds)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda text: gzip.compress(text, compresslevel=9, mtime=0),
    # Raw, since the container's header alone would weigh as much as a short text.
    "LZMA": lambda text: lzma.compress(
        text, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}]
    ),
}


def load_model(config: Config) -> tuple[LanguageModel, dict | None, data.Tokenizer | None]:
    """The model, the variables it starts from or None, and its tokenizer or None for bytes."""
    dtype = training.compute_dtype(config.precision)
    if config.pretrained:
        return load_folder(config, dtype)
    if config.model == "decoder":
        return mixer_decoder(config, config.mixer), None, None
    if config.mixer != "softmax":
        raise ValueError(
            f"mixer={config.mixer}: {config.model} has a mixer of its own; pass --model decoder"
        )
    name, fields = SMALL[config.model]
    return create_model(name, **sizes(config), **fields(config), dtype=dtype), None, None


def load_folder(config: Config, dtype: Any) -> tuple[LanguageModel, dict, data.Tokenizer | None]:
    """A model of `transformers`; one of 256 tokens without a tokenizer reads bytes."""
    folder = config.pretrained
    model, variables = load_pretrained(folder, dtype=dtype)
    if not isinstance(model, LanguageModel):
        raise ValueError(f"pretrained={folder}: a {type(model).__name__} is no language model")
    if model.context is not None and config.length > model.context:
        raise ValueError(f"length={config.length} exceeds the model's context of {model.context}")
    reads_bytes = model.vocab_size == 256 and not (Path(folder) / "tokenizer.json").exists()
    return model, variables, None if reads_bytes else data.load_tokenizer(folder)


def sizes(config: Config) -> dict[str, Any]:
    """What all families call by the same names."""
    if config.width % (2 * config.num_heads):
        raise ValueError(
            f"width={config.width} must be a multiple of twice the {config.num_heads} num_heads"
        )
    names = ("width", "depth", "num_heads")
    context = config.length + config.sample_tokens
    return {"vocab_size": 256, "context": context} | {n: getattr(config, n) for n in names}


def _grouped(config: Config) -> dict[str, Any]:
    """Half as many heads of keys and values, SwiGLU of 8 / 3 of the width, as Llama's sizes."""
    kv_heads = config.num_heads // 2 if config.num_heads % 2 == 0 else config.num_heads
    mlp_width = -(-config.width * 8 // 24) * 8
    return {"num_kv_heads": kv_heads, "mlp_width": mlp_width}


def _latent(config: Config) -> dict[str, Any]:
    head_dim = config.width // config.num_heads
    return {
        "mlp_width": 3 * config.width,
        "expert_width": config.width // 2,
        "dense_depth": 1,
        "q_rank": None,
        "kv_rank": config.width // 2,
        "nope_dim": head_dim,
        "rope_dim": head_dim,
        "value_dim": head_dim,
        "num_experts": 8,
        "top_k": 2,
        "groups": 2,
        "top_groups": 1,
        "tied": True,
    }


SMALL: dict[str, tuple[str, Callable[[Config], dict[str, Any]]]] = {
    "gpt2": ("gpt2_small", lambda config: {}),
    "llama": ("llama3_8b", lambda config: {**_grouped(config), "tied": True}),
    "qwen3": (
        "qwen3_0_6b",
        lambda config: {**_grouped(config), "head_dim": config.width // config.num_heads},
    ),
    "mixtral": ("mixtral_8x7b", lambda config: {**_grouped(config), "num_experts": 4}),
    "deepseek_v3": ("deepseek_v3", _latent),
}


def compressed_bits(compress: Callable[[bytes], bytes], texts: list[bytes]) -> float:
    """Bits a byte, each text compressed by itself."""
    return 8 * sum(len(compress(text)) for text in texts) / sum(map(len, texts))


def write_samples(config, model, variables, tokenizer, folder: Path) -> None:
    """Continues the prompt, by the likeliest tokens and at random, into samples.txt."""
    # Where bytes are read, a zero ends a file of the library.
    stops = (0,) if tokenizer is None else ()
    tokenizer = tokenizer or data.ByteTokenizer()
    stops += () if tokenizer.end_id is None else (tokenizer.end_id,)
    options = {"max_new_tokens": config.sample_tokens, "stop_tokens": stops}
    prompt = tokenizer.encode(config.prompt)
    found = {"likeliest": decoding.generate(model, variables, [prompt], **options)}
    if config.samples:
        options |= {"temperature": config.temperature, "key": jax.random.key(config.seed)}
        prompts = [prompt] * config.samples
        title = f"temperature {config.temperature}"
        found[title] = decoding.generate(model, variables, prompts, **options)
    written = "\n".join(
        f"=== {title}\n{config.prompt}{tokenizer.decode(tokens)}"
        for title, generation in found.items()
        for tokens in generation.sequences()
    )
    (folder / "samples.txt").write_text(written + "\n")
    print(written, flush=True)


def conclude(config: Config, model, params, bits: dict[str, float], seconds: float) -> Result:
    """The claim held against the numbers."""
    tokens = config.steps * config.batch_size * config.length
    active = active_parameters(model, params)
    speed = 6 * active * tokens / seconds
    possible = peak_flops(1)
    others = [value for name, value in bits.items() if name != "the model"]
    return Result(
        claim="a language model needs fewer bits a byte of unseen windows than gzip and LZMA",
        source="Delétang et al. 2023, arXiv:2309.10668, table 1",
        holds=all(bits["the model"] < value for value in others),
        measured={
            **{f"bits per byte, {name}": value for name, value in bits.items()},
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "parameters that a token meets": active,
            "seconds of training": seconds,
            "tokens per second": tokens / seconds,
            "GFLOP/s of training": speed / 1e9,
            "GFLOP/s at most": possible / 1e9,
            "FLOP utilisation": speed / possible,
        },
    )


def active_parameters(model: LanguageModel, params: Any) -> int:
    """Those in products with a token: its experts' alone, and no table that is only looked up."""
    share = model.top_k / model.num_experts if hasattr(model, "num_experts") else 1.0

    def active(path, leaf):
        looked_up = path[0].key == "place" or (path[0].key == "embed" and "head" in params)
        # Experts lie along the first of three axes.
        return 0 if looked_up else leaf.size * (share if leaf.ndim == 3 else 1)

    return round(sum(jax.tree.leaves(jax.tree.map_with_path(active, params))))


def draw_figure(folder: Path, bits: dict[str, float]) -> None:
    """The loss of training in bits a token, and beside it what a byte of unseen text costs."""
    records = [
        record for record in read_metrics(folder / "metrics.jsonl") if "cross_entropy" in record
    ]
    steps, losses = ([record[name] for record in records] for name in ("step", "cross_entropy"))
    figure = plots.new_figure(width=12.0, height=5.0)
    left, right = figure.subplots(1, 2)
    lines = {"training": (steps, [loss / np.log(2) for loss in losses])}
    plots.curve(left, lines, "training, step", "bits a token")
    right.bar(list(bits), list(bits.values()))
    right.set_ylabel("bits a byte, held out")
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
