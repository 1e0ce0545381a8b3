"""What the README says is what happens."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_examples_run():
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    sampling, backbone, detector, language, mixing = examples
    assert len([line for line in sampling.splitlines() if line.strip()]) <= 10
    names = {}
    exec(mixing, names)
    assert names["out"].shape == (1, 7, 64) and names["state"] is not None
    exec(backbone, names)
    strides = names["model"].feature_strides
    assert strides == {"C2": 4, "C3": 8, "C4": 8, "C5": 8}
    assert {name: -(-65 // m.shape[1]) for name, m in names["maps"].items()} == strides
    exec(detector, names)
    assert names["boxes"].shape == (1, 100, 4) and names["valid"].shape == (1, 100)
    exec(language, names)
    assert names["found"].tokens.shape == (2, 5)
    np.testing.assert_array_equal(names["same"].tokens, names["found"].tokens)
    exec(sampling, names)
    assert names["images"].shape == (10, 8, 8, 1)
    # A fresh DiT is the zero field, so sampling leaves the noise where it is.
    np.testing.assert_array_equal(names["images"], names["noise"])


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_every_file_of_the_architecture_exists():
    (picture,) = re.findall(r"Imports point down only:\n\n```\n(.*?)```", README, re.DOTALL)
    inside = picture[picture.index("jaxmodels/") :]
    for name in re.findall(r"^  (\S+)", inside, re.MULTILINE):
        assert (ROOT / "jaxmodels" / name).exists(), name
