"""Pictures of results: each function draws into an Axes that the caller owns.

Figures are made without pyplot, so no window opens and no global state changes:

    figure = new_figure(width=8.0, height=4.0)
    left, right = figure.subplots(1, 2)
    image_grid(left, images, title="samples")
    curve(right, {"loss": (steps, losses)}, "step", "loss")
    save_figure(figure, "figure.png")
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import ArrayLike as Pixels
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import AutoLocator, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

# Okabe and Ito's palette: told apart by all common kinds of colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Colours come again with the next dash pattern.
DASHES = ("-", "--", ":")
INK = "#333333"
GRID = "#DDDDDD"


def new_figure(width: float = 8.0, height: float = 5.0) -> Figure:
    """An empty figure whose parts make room for each other.

    Args:
      width, height: in inches.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    return Figure(figsize=(width, height), dpi=150, layout=layout, facecolor="white")


def image_grid(
    axes: Axes,
    images: Float[Pixels, "rows cols Y X C"],
    row_labels: Sequence[str] | None = None,
    title: str | None = None,
) -> None:
    """Draws rows and columns of pictures as one big picture, a thin gap between them.

    Args:
      axes: is cleared of ticks and frame.
      images: values in [-1, 1], clipped beyond; one channel is grey, three are colour.
      row_labels: one text for each row.
      title: above the grid.

    Raises:
      ValueError: images without five dimensions, with no picture, with other than
        one or three channels or with values that are not finite; row_labels of
        another length than rows.
    """
    images = _checked_images("image_grid", images)
    rows, _, height, _, _ = images.shape
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(
            f"image_grid: {len(row_labels)} row_labels for {rows} rows; give one for each"
        )
    _show(axes, _tile(images))
    if row_labels is not None:
        axes.set_yticks(_centres(rows, height), row_labels)
    _set_title(axes, title)


def trajectory(
    axes: Axes,
    images: Float[Pixels, "steps rows Y X C"],
    times: ArrayLike,
    title: str | None = None,
) -> None:
    """Draws how pictures emerge: one row for each picture, time from left to right.

    Args:
      axes: is cleared of ticks and frame.
      images: the states of a sampler, values in [-1, 1], clipped beyond.
      times: the time of each step, written below its column.
      title: above the grid.

    Raises:
      ValueError: as `image_grid`; times of another length than steps.
    """
    images = _checked_images("trajectory", images)
    times = np.asarray(times)
    if times.shape != images.shape[:1]:
        raise ValueError(
            f"trajectory: times of shape {times.shape} for images of shape {images.shape}; "
            "give one time for each step"
        )
    _show(axes, _tile(images.swapaxes(0, 1)))
    axes.set_xticks(_centres(len(times), images.shape[3]), [f"{time:.2g}" for time in times])
    axes.set_xlabel("time t", color=INK)
    _set_title(axes, title)


def curve(
    axes: Axes,
    lines: Mapping[str, tuple[ArrayLike, ArrayLike]],
    xlabel: str,
    ylabel: str,
    *,
    logx: bool = False,
    logy: bool = False,
    title: str | None = None,
) -> None:
    """Draws named lines; a few points are marked, many are a line alone.

    Args:
      axes: keeps what is drawn in it already.
      lines: name to (x, y); several lines get a legend, a single one does not.
        Beyond seven, colours come again with another dash pattern, and the legend
        stands beside the axes.
      xlabel, ylabel: what is measured, with its unit.
      logx, logy: logarithmic axes; few points on logx are labelled one by one.
      title: above the lines.

    Raises:
      ValueError: no lines, more than colours and dashes tell apart, x and y that are
        not two lists of the same length, or a value <= 0 on a logarithmic axis.
    """
    looks = [(color, dash) for dash in DASHES for color in PALETTE]
    if not 1 <= len(lines) <= len(looks):
        raise ValueError(
            f"curve: {len(lines)} lines; give 1 to {len(looks)}, as many as colours and dashes "
            "tell apart"
        )
    points = set()
    for (color, dash), (name, (x, y)) in zip(looks, lines.items(), strict=False):
        x, y = _checked_line(name, x, y, logx, logy)
        few = len(x) <= 20
        style = {"marker": "o", "markersize": 4, "linewidth": 1.6} if few else {"linewidth": 1.0}
        axes.plot(x, y, color=color, linestyle=dash, label=name, **style)
        points.update(x.tolist())
    _style_curve(axes, xlabel, ylabel, title)
    if logy:
        axes.set_yscale("log")
        _plain_log_ticks(axes.yaxis)
    if logx:
        axes.set_xscale("log")
        _plain_log_ticks(axes.xaxis)
        if len(points) <= 10:
            axes.set_xticks(sorted(points))
    elif all(point.is_integer() for point in points):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(lines) > 1:
        # Many names would cover the lines; they stand beside the axes.
        beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        place = beside if len(lines) > len(PALETTE) else {}
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, **place)


def precision_recall(
    axes: Axes,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    title: str | None = None,
) -> None:
    """Draws how precision falls as recall rises, on axes from 0 to 1.

    Args:
      axes: keeps what is drawn in it already.
      curves: name to (recall, precision), from `CocoScores.curve` or `VocScores.curves`;
        a legend as in `curve`. Classes without objects have no curve; leave them out.
      title: above the curves.

    Raises:
      ValueError: as `curve`; or values outside [0, 1], NaN among them.
    """
    for name, line in curves.items():
        for what, values in zip(("recall", "precision"), map(np.asarray, line), strict=True):
            if not np.all((values >= 0) & (values <= 1)):
                raise ValueError(
                    f"precision_recall: {what} of {name!r} is not in [0, 1] everywhere; leave out "
                    "classes without objects"
                )
    curve(axes, curves, "recall", "precision", title=title)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.xaxis.set_major_locator(AutoLocator())


def boxes_on_images(
    axes: Axes,
    images: Float[Pixels, "N Y X C"],
    boxes: Sequence[Float[np.ndarray, "_ 4"]],
    names: Sequence[Sequence[str]],
    title: str | None = None,
) -> None:
    """Draws pictures in two rows and named boxes on them; a name has one colour everywhere.

    Args:
      axes: is cleared of ticks and frame.
      images: values in [-1, 1], clipped beyond; one channel is grey, three are colour.
      boxes: of each picture, xyxy in pixels.
      names: of each box.
      title: above the pictures.

    Raises:
      ValueError: as `image_grid`, or boxes or names of another number than pictures or boxes.
    """
    images = np.asarray(images, np.float32)
    if not len(images) == len(boxes) == len(names) or any(
        len(some) != len(said) for some, said in zip(boxes, names, strict=True)
    ):
        raise ValueError(
            f"boxes_on_images: {len(images)} images, boxes of {[*map(len, boxes)]} and names of "
            f"{[*map(len, names)]}; give each image its boxes and each box a name"
        )
    columns = -(-len(images) // 2)
    blank = np.ones((2 * columns - len(images), *images.shape[1:]), np.float32)
    grid = np.concatenate([images, blank]).reshape(2, columns, *images.shape[1:])
    _show(axes, _tile(_checked_images("boxes_on_images", grid)))
    known = sorted({name for said in names for name in said})
    colors = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(known)}
    height, width = (side + _gap(side) for side in images.shape[1:3])
    for i, (some, said) in enumerate(zip(boxes, names, strict=True)):
        row, column = divmod(i, columns)
        for (left, top, right, bottom), name in zip(some, said, strict=True):
            corner = (left + column * width - 0.5, top + row * height - 0.5)
            style = {"fill": False, "edgecolor": colors[name], "linewidth": 1.2}
            axes.add_patch(Rectangle(corner, right - left, bottom - top, **style))
            axes.text(*corner, name, color=colors[name], fontsize=7, va="bottom")
    _set_title(axes, title)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG, whole or not at all.

    Args:
      figure: as made by `new_figure`.
      path: ends in .png; its folder exists. A picture there before is replaced.

    Raises:
      ValueError: path does not end in .png.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"save_figure: {str(path)!r} does not end in .png")
    # In the same folder, because only there is replacing atomic.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            figure.savefig(file, format="png")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _checked_images(function: str, images) -> np.ndarray:
    images = np.asarray(images, dtype=np.float32)
    if images.ndim != 5 or images.size == 0 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"{function}: images of shape {images.shape}; give five dimensions, at least one "
            "picture and 1 or 3 channels in the last dimension"
        )
    if not np.all(np.isfinite(images)):
        raise ValueError(f"{function}: images hold values that are not finite")
    return images


def _checked_line(name: str, x, y, logx: bool, logy: bool) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or x.size == 0:
        raise ValueError(
            f"curve: line {name!r} has x of shape {x.shape} and y of shape {y.shape}; "
            "give two lists of the same length"
        )
    for axis, values, logarithmic in (("x", x, logx), ("y", y, logy)):
        if logarithmic and np.any(values <= 0):
            raise ValueError(
                f"curve: line {name!r} has {axis}={values.min():g} on a logarithmic axis; "
                f"values must be positive, or pass log{axis}=False"
            )
    return x, y


def _gap(length: int) -> int:
    """Pixels between pictures: visible, yet narrow beside a picture of this size."""
    return max(1, length // 16)


def _centres(count: int, length: int) -> np.ndarray:
    return np.arange(count) * (length + _gap(length)) + (length - 1) / 2


def _tile(images: np.ndarray) -> np.ndarray:
    """One picture in [0, 1], white between the parts."""
    rows, cols, height, width, channels = images.shape
    down, right = _gap(height), _gap(width)
    sheet = np.ones((rows, height + down, cols, width + right, channels), np.float32)
    sheet[:, :height, :, :width] = (np.clip(images, -1, 1).transpose(0, 2, 1, 3, 4) + 1) / 2
    sheet = sheet.reshape(rows * (height + down), cols * (width + right), channels)
    return sheet[:-down, :-right]


def _show(axes: Axes, picture: np.ndarray) -> None:
    grey = picture.shape[-1] == 1
    axes.imshow(
        picture[..., 0] if grey else picture,
        cmap="gray" if grey else None,
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    axes.set_anchor("NW")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.spines[:].set_visible(False)


def _style_curve(axes: Axes, xlabel: str, ylabel: str, title: str | None) -> None:
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(color=GRID, labelcolor=INK, labelsize=9)
    _set_title(axes, title)


def _plain_log_ticks(axis: Axis) -> None:
    """0.2, 0.5, 1, 2 are read faster than powers of ten, and a short axis still gets some."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _set_title(axes: Axes, title: str | None) -> None:
    if title is not None:
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
