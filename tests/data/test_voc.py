"""A folder in the form of VOC that the tests write: what is read of it, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from jaxmodels.data import VOC_CLASSES, FixedSize, voc_detection

OBJECT = """<object><name>{name}</name><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>
{difficult}<bndbox><xmax>{2}</xmax><xmin>{0}</xmin><ymin>{1}</ymin><ymax>{3}</ymax></bndbox></object>"""
SIZE = "<size><width>30</width><height>20</height><depth>3</depth></size>"


def an_object(*box, name="dog", difficult=""):
    return OBJECT.format(*box, name=name, difficult=difficult)


def write(root, name, *objects, size=SIZE, head="", suffix=".jpg", shape=(20, 30)):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    text = f"{head}<annotation>{size}{''.join(objects)}</annotation>"
    (root / "Annotations" / f"{name}.xml").write_text(text)
    Image.new("RGB", shape[::-1]).save(root / "JPEGImages" / f"{name}{suffix}")
    with (root / "ImageSets" / "Main" / "val.txt").open("a") as file:
        file.write(f"{name}\n")


def read(root, **options):
    return voc_detection(root, **{"split": "val", "resize": FixedSize(20, 30)} | options)


def test_boxes_flags_and_names(tmp_path):
    hard = "<difficult> 1 </difficult>"
    write(
        tmp_path,
        "2008_000002",
        an_object(1, 1, 30, 20, name="tvmonitor"),
        an_object(4, 5, 4, 9.5, difficult=hard),
        an_object(2, 3, 31, 4, name="aeroplane", difficult="<difficult>0</difficult>"),
    )
    write(tmp_path, "000005", suffix=".png")
    dataset = read(tmp_path)
    assert dataset.class_names == VOC_CLASSES and len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES) and len(dataset) == 2
    batch = dataset.batch(np.array([0, 1]), np.random.default_rng(0))
    # The first box holds all of its picture, the second one column.
    wanted = [[0, 0, 30, 20], [3, 4, 4, 9.5], [1, 2, 30, 4]]
    np.testing.assert_allclose(batch["boxes"][0], wanted, rtol=1e-6)
    assert batch["box_labels"].tolist() == [[19, 11, 0], [-1, -1, -1]]
    assert batch["box_ignored"].tolist() == [[False, True, False], [False] * 3]
    assert batch["area"][0].tolist() == [600, 5.5, 60] and batch["image_id"].tolist() == [0, 1]
    assert dataset.boxes_clipped == 1
    assert [path.rsplit("/")[-1] for path in dataset.paths] == ["2008_000002.jpg", "000005.png"]


def test_other_classes(tmp_path):
    write(tmp_path, "a", an_object(1, 1, 3, 3, name="mitosis"))
    dataset = read(tmp_path, class_names=("cell", "mitosis"))
    batch = dataset.batch(np.array([0]), np.random.default_rng(0))
    assert batch["box_labels"].tolist() == [[1]] and dataset.category_ids == (0, 1)


BOMB = """<?xml version="1.0"?><!DOCTYPE annotation [<!ENTITY a "aaaaaaaaaa">
<!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>"""


@pytest.mark.parametrize(
    ("objects", "options", "message"),
    [
        ((), {"size": ""}, r"a\.xml' has no size of positive width and height; boxes cannot be"),
        ((), {"size": SIZE.replace("30", "0")}, "has no size of positive width and height"),
        ((), {"size": SIZE.replace("30", "wide")}, "has no size of positive width and height"),
        (
            (an_object(1, 1, 2, 2, name="dgo"), an_object(1, 1, 2, 2)),
            {},
            r"1 of 2 objects have unknown names: 'dgo' in a\.xml; correct class_names",
        ),
        (("<object><name>dog</name></object>",), {}, r"bndbox is \['', '', '', ''\]; give it xmin"),
        ((an_object(9, 1, 8, 2),), {}, r"box of negative size, \['9', '1', '8', '2'\]; correct it"),
        ((an_object("nan", 1, 8, 2),), {}, r"1 of 1 boxes hold NaN or infinity: a\.xml; correct"),
        ((an_object(31, 1, 38, 2),), {}, r"1 of 1 boxes lie outside of their pictures: a\.xml;"),
        (("<object>",), {}, r"a\.xml' cannot be read as XML: mismatched tag"),
        (("&b;",), {"head": BOMB}, "cannot be read as XML: it has a DOCTYPE, whose entities may"),
        ((), {"head": '<?xml version="1.0" encoding="nonsense"?>'}, "as XML: unknown encoding"),
    ],
)
def test_bad_annotations_are_named(tmp_path, objects, options, message):
    write(tmp_path, "a", *objects, **options)
    with pytest.raises(ValueError, match=f"voc_detection: .*{message}"):
        read(tmp_path)


def test_a_doctype_is_refused_in_any_encoding(tmp_path):
    write(tmp_path, "a")
    text = BOMB.replace("?>", ' encoding="utf-16"?>') + f"<annotation>{SIZE}</annotation>"
    (tmp_path / "Annotations" / "a.xml").write_bytes(text.encode("utf-16"))
    with pytest.raises(ValueError, match="it has a DOCTYPE"):
        read(tmp_path)


def test_missing_files_and_bad_lists_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"voc_detection: no list '.*Main/val\.txt'; pass the root"
    ):
        read(tmp_path)
    for name in ("a", "b", "c"):
        write(tmp_path, name)
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(
        ValueError, match=r"1 of 3 pictures are missing: '.*JPEGImages/b\.jpg'; add"
    ):
        read(tmp_path)
    (tmp_path / "Annotations" / "b.xml").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 annotations are missing: '.*b\.xml'; add them"):
        read(tmp_path)
    file = tmp_path / "ImageSets" / "Main" / "val.txt"
    for text, message in {
        "a\nc\na\n": r"1 of 3 names come twice in 'val.txt': 'a'; keep one of each",
        "a -1\nc  1\n": r"2 of 2 lines of 'val.txt' have more than a name: 'a -1', 'c 1'; pass the",
        "\n": r"val.txt' is empty; it must name pictures",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(tmp_path)
