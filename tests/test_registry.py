"""Public names of models."""

import flax.linen as nn
import pytest

import jaxmodels
from jaxmodels import registry


@pytest.fixture
def empty(monkeypatch):
    """A registry of its own, so that nothing registered here is seen elsewhere."""
    monkeypatch.setattr(registry, "_MODELS", registry._Names("model", "jaxmodels.layers.mixers"))
    monkeypatch.setattr(registry._Names, "_import_all", lambda names: None)


@pytest.fixture
def two(empty):
    @registry.register_model
    def small_net(**overrides):
        return nn.Dense(**{"features": 3, **overrides})

    @registry.register_model
    def large_net(**overrides):
        return nn.Dense(**{"features": 30, **overrides})


def test_create_by_name_with_overrides(two):
    assert registry.create_model("large_net") == nn.Dense(features=30)
    made = registry.create_model("small_net", features=5, use_bias=False)
    assert made == nn.Dense(features=5, use_bias=False)


def test_list_is_sorted_and_filtered(two):
    assert registry.list_models() == ["large_net", "small_net"]
    assert registry.list_models("small*") == ["small_net"]
    assert registry.list_models("absent*") == []


def test_unknown_name_gets_the_nearest(two):
    with pytest.raises(ValueError, match="unknown model 'smal_net'; did you mean 'small_net'"):
        registry.create_model("smal_net")
    with pytest.raises(ValueError, match=r"known: \['large_net', 'small_net'\]"):
        registry.create_model("xyz")


def test_unknown_field_gets_the_nearest_and_all(two):
    with pytest.raises(ValueError, match="no field 'feature'; did you mean 'features'") as caught:
        registry.create_model("small_net", feature=5)
    assert "Valid fields: features, use_bias, dtype" in str(caught.value)
    assert "parent" not in str(caught.value)


def test_a_name_is_given_once(two):
    def small_net():
        return nn.Dense(3)

    small_net.__module__ = "elsewhere"
    with pytest.raises(ValueError, match="'small_net' of elsewhere is already registered by"):
        registry.register_model(small_net)


def test_every_published_name_builds_and_shows_the_package_is_whole():
    """Names come from importing all model files; each builds without overrides."""
    names = jaxmodels.list_models()
    assert "dit_s_2" in names
    for name in names:
        assert isinstance(jaxmodels.create_model(name), nn.Module)
    with pytest.raises(ValueError, match=r"did you mean .*'dit_s_2'"):
        jaxmodels.create_model("dit_s2")


def test_mixers_have_names_of_their_own():
    assert "softmax" in jaxmodels.list_mixers()
    assert "softmax" not in jaxmodels.list_models()
    assert jaxmodels.create_mixer("softmax", num_heads=7).num_heads == 7
    with pytest.raises(ValueError, match="create_mixer: unknown mixer 'softmx'; did you mean"):
        jaxmodels.create_mixer("softmx")
    with pytest.raises(ValueError, match="create_mixer: 'softmax' has no field 'heads'"):
        jaxmodels.create_mixer("softmax", heads=7)
