"""Pascal VOC's XML files and a folder of images as a data set with boxes."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np

from jaxmodels.data.detection_dataset import BoxTable, DetectionDataset, make_dataset, refuse
from jaxmodels.data.resizing import SHORTEST_800, FixedSize, ShortestSide

_NAME = "voc_detection"
_SUFFIXES = (".jpg", ".jpeg", ".png")

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


def voc_detection(
    root: str | os.PathLike[str],
    *,
    split: str,
    train: bool = False,
    class_names: tuple[str, ...] = VOC_CLASSES,
    resize: ShortestSide | FixedSize = SHORTEST_800,
    flip: bool = False,
    max_boxes: int | None = None,
    channels: int = 3,
) -> DetectionDataset:
    """Reads `root/ImageSets/Main/<split>.txt` with Annotations/*.xml and JPEGImages/*.

    A box of VOC holds its end pixels and counts from 1; here it is (xmin - 1, ymin - 1,
    xmax, ymax), which ends where the last pixel ends. Difficult objects are ignored boxes.
    Areas are those of the boxes. An XML file with a DOCTYPE is refused, since entities
    can expand without limit.

    Args:
      root: a folder such as VOCdevkit/VOC2007.
      split: name of the list, "trainval" for instance.
      train: as in `coco_detection`.
      class_names: of the labels 0, 1, ...; VOC's twenty by default.
      resize, flip, max_boxes, channels: as in `coco_detection`.

    Returns:
      A data set for `batches` and `evaluation_batches`, in the order of the list; its
      image ids are places in the list.

    Raises:
      ValueError: no such list, or one that is empty, has a name twice or a second column;
        missing or malformed XML, without a size or with a DOCTYPE; unknown names; boxes
        that are negative, not finite or wholly outside; missing pictures; more boxes than
        `max_boxes` in evaluation; or an impossible option.
    """
    root = Path(root)
    names = _names(root / "ImageSets" / "Main" / f"{split}.txt")
    files = [root / "Annotations" / f"{name}.xml" for name in names]
    missing = [repr(str(file)) for file in files if not file.is_file()]
    refuse(_NAME, missing, len(files), "annotations are missing", "add them, or correct the list")
    documents = [_read(file) for file in files]
    table = _table(files, documents, class_names)
    return make_dataset(
        _NAME,
        [_picture(root / "JPEGImages", name) for name in names],
        table,
        lambda place: files[table.pictures[place]].name,
        max_boxes=max_boxes,
        channels=channels,
        train=train,
        flip=flip,
        sizes=np.array([_size(*pair) for pair in zip(files, documents, strict=True)], np.int32),
        image_ids=np.arange(len(names)),
        class_names=tuple(class_names),
        category_ids=tuple(range(len(class_names))),
        resize=resize,
    )


def _names(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"{_NAME}: no list {str(file)!r}; pass the root and split of one")
    lines = [line.split() for line in file.read_text().splitlines() if line.strip()]
    columns = [repr(" ".join(line)) for line in lines if len(line) > 1]
    what = f"lines of {file.name!r} have more than a name"
    refuse(_NAME, columns, len(lines), what, "pass the list of a split, not that of one class")
    names = [line[0] for line in lines]
    twice = [repr(name) for name, count in Counter(names).items() if count > 1]
    refuse(_NAME, twice, len(names), f"names come twice in {file.name!r}", "keep one of each")
    if not names:
        raise ValueError(f"{_NAME}: {str(file)!r} is empty; it must name pictures")
    return names


def _read(file: Path) -> Element:
    """The root of an XML file."""
    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    # Only a DOCTYPE can declare entities, so without one nothing can expand.
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(file.read_bytes(), True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise ValueError(
            f"{_NAME}: {str(file)!r} cannot be read as XML: {error}; repair or remove it"
        ) from error
    return builder.close()


def _refuse_doctype(*_) -> None:
    raise ValueError("it has a DOCTYPE, whose entities may expand without limit")


def _size(file: Path, document: Element) -> tuple[int, int]:
    """Rows and columns."""
    sides = [document.findtext(f"size/{side}", "").strip() for side in ("height", "width")]
    if not all(side.isdecimal() and 0 < int(side) < 2**31 for side in sides):
        raise ValueError(
            f"{_NAME}: {str(file)!r} has no size of positive width and height; boxes cannot be "
            "checked without it, so add it"
        )
    return int(sides[0]), int(sides[1])


def _table(
    files: Sequence[Path], documents: Sequence[Element], class_names: Sequence[str]
) -> BoxTable:
    objects = [
        (place, element)
        for place, document in enumerate(documents)
        for element in document.findall("object")
    ]
    boxes = np.array([_box(files[place], element) for place, element in objects], np.float64)
    boxes = boxes.reshape(-1, 4)
    difficult = [element.findtext("difficult", "0").strip() == "1" for _, element in objects]
    return BoxTable(
        np.array([place for place, _ in objects], np.int64),
        boxes,
        _labels(files, objects, class_names),
        np.array(difficult, bool),
        np.prod(boxes[:, 2:] - boxes[:, :2], axis=1),
    )


def _box(file: Path, element: Element) -> list[float]:
    texts = [element.findtext(f"bndbox/{key}", "") for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = map(float, texts)
    except ValueError:
        raise ValueError(
            f"{_NAME}: {str(file)!r} has an object whose bndbox is {texts}; give it xmin, ymin, "
            "xmax and ymax"
        ) from None
    if right < left or bottom < top:
        raise ValueError(f"{_NAME}: {str(file)!r} has a box of negative size, {texts}; correct it")
    return [left - 1, top - 1, right, bottom]


def _labels(files, objects, class_names: Sequence[str]) -> np.ndarray:
    label_of = {name: label for label, name in enumerate(class_names)}
    names = [element.findtext("name", "").strip() for _, element in objects]
    unknown = [
        f"{name!r} in {files[place].name}"
        for name, (place, _) in zip(names, objects, strict=True)
        if name not in label_of
    ]
    refuse(_NAME, unknown, len(names), "objects have unknown names", "correct class_names")
    return np.array([label_of[name] for name in names], np.int32)


def _picture(folder: Path, name: str) -> Path:
    """The file of that name; if there is none, the usual one, which is then missing."""
    files = [folder / f"{name}{suffix}" for suffix in _SUFFIXES]
    return next((file for file in files if file.is_file()), files[0])
