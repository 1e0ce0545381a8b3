"""Model folders as the PyTorch world writes them: config.json beside safetensors files."""

import contextlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxmodels.weights.float8 import float8_tensors

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PREPROCESSING = "preprocessor_config.json"
_INDEX = "*.safetensors.index.json"
# In a pipeline, the denoising network has a folder of its own.
_SUBFOLDER = "transformer"
# Only these are asked of the hub: a pickle is never even downloaded.
_WANTED = [
    f"{stem}{end}"
    for stem in ("diffusion_pytorch_model", "model")
    for end in ("*.safetensors", _INDEX[1:])
]
_WANTED = [CONFIG, PREPROCESSING, *_WANTED]
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_REFUSED = (
    "is a pickle, which can run any code when opened; convert it to safetensors (in PyTorch: "
    "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors'))"
)


def find_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder that holds config.json, downloaded first if `source` is a hub id.

    Args:
      source: a model folder, a pipeline folder with a `transformer` folder
        inside, or `owner/name` on the Hugging Face hub.
      revision: branch, tag or commit on the hub.

    Raises:
      ValueError: nothing of the kind is there, or it is a file.
    """
    path = Path(source)
    if path.suffix in _PICKLES:
        raise ValueError(f"load_pretrained: {path} {_REFUSED}")
    if path.is_file():
        raise ValueError(f"load_pretrained: {path} is a file; pass the folder that contains it")
    if not path.is_dir():
        path = _download(str(source), revision)
    elif revision is not None:
        raise ValueError(
            f"load_pretrained: revision={revision!r} only means something on the hub, "
            f"and {path} is a folder here; leave it out"
        )
    for folder in (path, path / _SUBFOLDER):
        if (folder / CONFIG).is_file():
            return folder
    raise ValueError(f"load_pretrained: no {CONFIG} in {path} or its {_SUBFOLDER!r} folder")


def _download(hub_id: str, revision: str | None) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise ValueError(
            f"load_pretrained: {hub_id!r} is neither an existing folder nor a hub id 'owner/name'"
        )
    patterns = [*_WANTED, *(f"{_SUBFOLDER}/{name}" for name in _WANTED)]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"load_pretrained: {hub_id!r} is not a folder here and could not be had from the "
            f"hub: {error}"
        ) from error


def read_config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """The folder's config.json, or another; raises ValueError if it is not a JSON object."""
    path = folder / name
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"load_pretrained: {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"load_pretrained: {path} holds a {type(config).__name__}, not an object")
    return config


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """All tensors of a folder by name, read only when sliced.

    Yields:
      Safetensors slices: `.get_shape()` reads nothing, `[:]` gives a NumPy array.

    Raises:
      ValueError: no or several weight files, a missing shard, a pickle, a damaged file.
    """
    with contextlib.ExitStack() as stack:
        tensors = {}
        for path in _weight_files(folder):
            try:
                handle = stack.enter_context(safe_open(path, framework="numpy"))
            except SafetensorError as error:
                raise ValueError(
                    f"load_pretrained: {path} is not a whole safetensors file: {error}; "
                    f"download or save it again"
                ) from error
            tensors.update((name, handle.get_slice(name)) for name in handle.offset_keys())
            tensors |= float8_tensors(path)
        yield tensors


def _weight_files(folder: Path) -> list[Path]:
    index = next(folder.glob(_INDEX), None)
    if index is not None:
        paths = sorted(
            {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
        )
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            raise ValueError(f"load_pretrained: {index} lists files that are not there: {absent}")
        return paths
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) == 1:
        return paths
    if paths:
        names = [path.name for path in paths]
        raise ValueError(f"load_pretrained: {folder} has several weight files, keep one of {names}")
    pickles = sorted(path for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ValueError(f"load_pretrained: {pickles[0]} {_REFUSED}")
    raise ValueError(f"load_pretrained: no .safetensors file in {folder}")


def write_folder(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    weights_file: str = WEIGHTS,
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model folder, whole or not at all.

    Everything goes to a new folder beside it, which then takes the name, so a
    crash or a full disk leaves the old folder as it was.

    Args:
      path: of the folder; a model folder of that name is replaced.
      config: for config.json.
      tensors: by name.
      weights_file: name of the file that holds them.
      preprocessing: for preprocessor_config.json, if there is to be one.

    Raises:
      ValueError: path is a file or a folder of something else.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"save_pretrained: {path} is a file; pass the name of a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG).is_file():
        raise ValueError(
            f"save_pretrained: {path} has files in it but no {CONFIG}, so it is not a model "
            f"folder and is not replaced; choose another name"
        )
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (
        path.with_name(f".{path.name}.{uuid.uuid4().hex}.{what}") for what in ("new", "old")
    )
    try:
        new.mkdir()
        _write_json(new / CONFIG, config)
        if preprocessing is not None:
            _write_json(new / PREPROCESSING, preprocessing)
        contiguous = {name: np.asarray(array, order="C") for name, array in tensors.items()}
        save_file(contiguous, new / weights_file, metadata={"format": "pt"})
        if path.is_dir():
            path.rename(old)
        new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
