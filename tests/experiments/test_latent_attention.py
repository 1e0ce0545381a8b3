"""The experiment on the size of caches: equal models, the paper's numbers, a short run."""

import json
import runpy
from pathlib import Path

import pytest

NAME = "latent_attention.py"
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / NAME))


def test_the_published_cut_is_the_papers():
    """Table 1 of arXiv:2405.04434: 2 heads d_h l, and (d_c + d_R) l."""
    published = SCRIPT["published_cut"]()
    assert published["published_cache_numbers_before"] == 2 * 8 * 128 * 95
    assert published["published_cache_numbers_after"] == (512 + 64) * 60
    assert round(published["published_cut_of_bits"], 3) == 0.933
    assert round(published["published_cut_of_numbers"], 3) == 0.822


def test_models_are_of_equal_size_and_their_caches_those_of_table_1():
    config = SCRIPT["Config"]()
    target = SCRIPT["count_parameters"](SCRIPT["decoder"](config, "mha"))
    heads, unit = config.num_heads, 3 * config.width * config.depth
    wanted = {"mha": 2 * heads, "gqa": 2 * config.num_groups, "mqa": 2, "mla": 5}
    for name, of_heads in wanted.items():
        model = SCRIPT["equal_decoder"](config, name, target)
        assert abs(SCRIPT["count_parameters"](model) - target) <= unit / 2, name
        numbers = SCRIPT["cache_numbers"](model.mixers())
        assert numbers == of_heads * config.head_dim * config.depth


def result(**changes):
    found = {
        name: {
            "cache_bytes_per_token": size,
            "bits_per_byte": 2.0,
            "tokens_per_second": 10.0,
            "tokens_per_second_in_equal_memory": speed,
        }
        for name, size, speed in (("mha", 100, 10.0), ("mla", 7, 50.0))
    }
    found["mla"] |= changes
    return SCRIPT["conclude"](SCRIPT["published_cut"](), found)


def test_the_claim_follows_the_numbers():
    assert result().holds and result(bits_per_byte=2.01).holds
    assert result().measured["cut"] == pytest.approx(0.93)
    assert result().measured["times_faster_in_equal_memory"] == 5.0
    assert result().measured["times_faster"] == 1.0
    assert not result(bits_per_byte=2.03).holds
    assert not result(tokens_per_second_in_equal_memory=9.0).holds


def test_a_short_run_measures_what_it_promises(launch, tmp_path):
    sizes = ("--width", 32, "--depth", 1, "--num-heads", 4, "--head-dim", 8, "--num-groups", 2)
    steps = ("--steps", 20, "--warmup", 3, "--length", 64, "--held-out-windows", 8)
    times = ("--context", 96, "--rounds", 2, "--new-tokens", 4)
    process = launch(NAME, *sizes, *steps, *times, "--folder", "run", cwd=tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    measured = json.loads((tmp_path / "run" / "result.json").read_text())["measured"]
    caches = {"mha": 64, "gqa": 32, "mqa": 16, "mla": 40}
    for name, numbers in caches.items():
        assert measured[f"{name}_cache_bytes_per_token"] == 4 * numbers
        # Eight bits are a byte nothing is known of.
        assert 1 < measured[f"{name}_bits_per_byte"] < 7
        assert measured[f"{name}_tokens_per_second"] > 0
        assert measured[f"{name}_tokens_per_second_in_equal_memory"] > 0
    assert measured["cut"] == pytest.approx(1 - 40 / 64)
    assert (tmp_path / "run" / "figure.png").stat().st_size > 10_000
