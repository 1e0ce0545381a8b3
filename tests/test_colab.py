"""Notebooks hold only names that exist: their Python cells run, given a trained folder."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "colab").glob("*.ipynb"))


def python_cells(notebook):
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            yield "\n".join(
                line for line in "".join(cell["source"]).splitlines() if line[:1] not in "%!"
            )


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_on_a_folder_of_weights(notebook, tmp_path, monkeypatch):
    import jax
    import jax.numpy as jnp

    from jaxmodels import create_model, save_pretrained

    model = create_model(
        "dit_s_2", width=32, depth=1, num_heads=2, input_size=8, in_channels=1, out_channels=1,
        num_classes=10,
    )  # fmt: skip
    example = (jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    save_pretrained(model, model.init(jax.random.key(0), *example), tmp_path / "runs/colab/model")
    monkeypatch.chdir(tmp_path)
    names = {}
    for source in python_cells(notebook):
        if "IPython" not in source:
            exec(source, names)
    assert names["images"].shape == (10, 8, 8, 1)
