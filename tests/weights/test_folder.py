"""Model folders: what is read, what is refused, what a crash leaves behind."""

import json

import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

from jaxmodels.weights import folder as module
from jaxmodels.weights.folder import find_folder, open_tensors, read_config, write_folder

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.float32)}


def test_writes_what_it_reads(tmp_path):
    write_folder(tmp_path / "deep" / "model", {"size": 3}, {**TENSORS, "t": TENSORS["a"].T})
    folder = find_folder(tmp_path / "deep" / "model")
    assert read_config(folder) == {"size": 3}
    with open_tensors(folder) as tensors:
        assert {name: tuple(t.get_shape()) for name, t in tensors.items()} == {
            "a": (2, 3),
            "b": (5,),
            "t": (3, 2),
        }
        np.testing.assert_array_equal(tensors["t"][:], TENSORS["a"].T)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]


def test_replaces_a_model_folder_but_nothing_else(tmp_path):
    model = tmp_path / "model"
    write_folder(model, {"size": 3}, TENSORS)
    write_folder(model, {"size": 4}, {"b": TENSORS["b"]})
    assert read_config(model) == {"size": 4}
    assert [*load_file(model / module.WEIGHTS)] == ["b"]

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(ValueError, match="not a model folder and is not replaced"):
        write_folder(tmp_path / "photos", {}, TENSORS)
    with pytest.raises(ValueError, match="is a file; pass the name of a folder"):
        write_folder(tmp_path / "photos" / "cat.jpg", {}, TENSORS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "photos"]


def test_a_failed_write_leaves_the_old_folder_whole(tmp_path, monkeypatch):
    model = tmp_path / "model"
    write_folder(model, {"size": 3}, TENSORS)
    before = {path.name: path.read_bytes() for path in model.iterdir()}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_folder(model, {"size": 4}, TENSORS)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickles_are_refused_with_a_remedy(tmp_path, suffix):
    pickled = tmp_path / f"model{suffix}"
    pickled.write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a pickle.*convert it to safetensors"):
        find_folder(pickled)
    with (
        pytest.raises(ValueError, match=rf"model{suffix} is a pickle.*convert"),
        open_tensors(find_folder(tmp_path)),
    ):
        pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"once upon a time", "is not a whole safetensors file"),
        (b"", "is not a whole safetensors file"),
        (None, "no .safetensors file in"),
    ],
)
def test_damaged_or_absent_weights(tmp_path, content, message):
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message), open_tensors(tmp_path):
        pass


def test_truncated_weights(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="not a whole safetensors file"), open_tensors(tmp_path):
        pass


def test_several_weight_files_without_an_index(tmp_path):
    for name in ("x.safetensors", "y.safetensors"):
        save_file(TENSORS, tmp_path / name)
    with pytest.raises(ValueError, match=r"keep one of.*x.*y"), open_tensors(tmp_path):
        pass


def test_configs_that_are_not(tmp_path):
    for content, message in (("{", "is not JSON"), ("[1]", "holds a list, not an object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path)


def test_sources_that_are_not(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    for source, message in (
        (tmp_path, "no config.json in"),
        (tmp_path / "model.safetensors", "is a file; pass the folder"),
        (tmp_path / "a" / "b" / "c", "neither an existing folder nor a hub id"),
    ):
        with pytest.raises(ValueError, match=message):
            find_folder(source)
    with pytest.raises(ValueError, match="revision='main' only means something on the hub"):
        find_folder(tmp_path, revision="main")


def test_the_hub_is_asked_for_safetensors_only(tmp_path, monkeypatch):
    repository = ["config.json", "model_index.json", "vae/diffusion_pytorch_model.safetensors"]
    for folder in ("", "transformer/"):
        stem = f"{folder}diffusion_pytorch_model"
        repository += [f"{folder}config.json", f"{stem}.bin", f"{stem}.safetensors"]
        repository += [f"{stem}-00001-of-00002.safetensors", f"{stem}.safetensors.index.json"]
    repository += ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
    repository += ["model.safetensors.index.json", "preprocessor_config.json"]
    wanted = []

    def snapshot(hub_id, *, revision, allow_patterns):
        assert (hub_id, revision) == ("owner/dit", "v2")
        wanted.extend(filter_repo_objects(repository, allow_patterns=allow_patterns))
        (tmp_path / "config.json").write_text(json.dumps({}))
        return str(tmp_path)

    monkeypatch.setattr(module, "snapshot_download", snapshot)
    assert find_folder("owner/dit", revision="v2") == tmp_path
    unwanted = {name for name in repository if name.endswith(".bin") or "vae" in name}
    assert {*repository} - {*wanted} == unwanted | {"model_index.json"}


def test_the_hub_cannot_be_reached():
    with pytest.raises(ValueError, match="'owner/absent' is not a folder here and could not be"):
        find_folder("owner/absent")
