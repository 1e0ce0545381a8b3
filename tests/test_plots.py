"""Pictures are where they should be, and files are whole."""

import sys

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from PIL import Image

from jaxmodels import plots

ROWS, COLS, Y, X = 3, 2, 7, 5


@pytest.fixture
def axes():
    return plots.new_figure(4.0, 3.0).subplots()


@pytest.fixture
def production(monkeypatch):
    """Without the suite's shape checks, as users run it."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pictures(channels, *lead):
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (*lead, Y, X, channels)).astype(np.float32)


def drawn(axes):
    (picture,) = axes.get_images()
    return np.asarray(picture.get_array())


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_puts_each_picture_in_its_row_and_column(axes, channels):
    images = pictures(channels, ROWS, COLS)
    plots.image_grid(axes, images)
    sheet = drawn(axes).reshape(ROWS * Y + 2, COLS * X + 1, channels)
    for row in range(ROWS):
        for col in range(COLS):
            top, left = row * (Y + 1), col * (X + 1)
            part = sheet[top : top + Y, left : left + X]
            np.testing.assert_allclose(part, (images[row, col] + 1) / 2, atol=1e-6)
    np.testing.assert_array_equal(sheet[[Y, 2 * Y + 1]], 1)
    np.testing.assert_array_equal(sheet[:, X], 1)


def test_image_grid_clips_and_shows_black_to_white_unsmoothed(axes):
    images = np.array([-3.0, -1.0, 0.0, 1.0, 7.0]).reshape(1, 1, 1, 5, 1)
    plots.image_grid(axes, images)
    np.testing.assert_allclose(drawn(axes)[0], [0, 0, 0.5, 1, 1])
    (picture,) = axes.get_images()
    assert picture.get_interpolation() == "nearest"
    assert picture.get_clim() == (0, 1)
    np.testing.assert_allclose(picture.to_rgba(drawn(axes))[0, :2, :3], 0)


def test_image_grid_labels_the_middle_of_each_row(axes):
    plots.image_grid(axes, pictures(1, ROWS, COLS), ["zero", "one", "two"], title="digits")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["zero", "one", "two"]
    np.testing.assert_array_equal(axes.get_yticks(), [3, 11, 19])
    assert axes.get_title(loc="left") == "digits"


def test_image_grid_takes_jax_arrays(axes):
    plots.image_grid(axes, jnp.zeros((1, 1, Y, X, 3), jnp.bfloat16))
    np.testing.assert_array_equal(drawn(axes), np.full((Y, X, 3), 0.5))


def test_trajectory_runs_from_left_to_right(axes):
    states = pictures(1, 4, ROWS)
    plots.trajectory(axes, states, np.array([1, 0.75, 1 / 3, 0]), title="emerging")
    sheet = drawn(axes)
    for step in range(4):
        for row in range(ROWS):
            top, left = row * (Y + 1), step * (X + 1)
            part = sheet[top : top + Y, left : left + X]
            np.testing.assert_allclose(part, (states[step, row, ..., 0] + 1) / 2, atol=1e-6)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "0.75", "0.33", "0"]
    np.testing.assert_array_equal(axes.get_xticks(), [2, 8, 14, 20])


def test_curve_draws_every_line_with_its_name_and_colour(axes):
    lines = {"ours": ([1, 2, 3], [3.0, 2.0, 1.0]), "theirs": (np.arange(1, 51), np.ones(50))}
    plots.curve(axes, lines, "step", "loss (nats)", title="training")
    ours, theirs = axes.get_lines()
    np.testing.assert_array_equal(ours.get_xydata(), [[1, 3], [2, 2], [3, 1]])
    assert ours.get_color() != theirs.get_color()
    assert (ours.get_marker(), theirs.get_marker()) == ("o", "None")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ours", "theirs"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss (nats)")
    assert axes.get_title(loc="left") == "training"
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")


def test_no_two_of_many_curves_look_alike():
    axes = plots.new_figure(8.0, 5.0).subplots()
    plots.curve(axes, {str(i): ([1, 2], [i, i]) for i in range(21)}, "x", "y")
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
    assert len(looks) == 21
    axes.figure.draw_without_rendering()
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1


def test_curve_on_logarithmic_axes_labels_its_points(axes):
    plots.curve(axes, {"only": ([1, 4, 16], [1, 20, 300])}, "steps", "error", logx=True, logy=True)
    axes.figure.draw_without_rendering()
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4", "16"]
    assert {"1", "20", "200"} <= {label.get_text() for label in axes.get_yticklabels()}
    assert axes.get_legend() is None


def test_precision_recall_is_drawn_on_whole_axes(axes):
    curves = {"cat": ([0.5, 0.5, 1], [1, 0.5, 0.6]), "dog": (np.linspace(0, 1, 101), np.ones(101))}
    plots.precision_recall(axes, curves, title="VOC")
    cat, dog = axes.get_lines()
    np.testing.assert_array_equal(cat.get_xydata(), [[0.5, 1], [0.5, 0.5], [1, 0.6]])
    assert len(dog.get_xydata()) == 101 and axes.get_xlim() == (0, 1) and axes.get_ylim()[0] == 0
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("recall", "precision")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["cat", "dog"]
    assert axes.get_title(loc="left") == "VOC"
    # Points at 0 and 1 alone would else leave an axis of whole numbers.
    plots.precision_recall(axes, {"all": ([0, 1], [1, 1])})
    assert len(axes.get_xticks()) > 3


def test_save_figure_writes_a_png_and_nothing_else(axes, tmp_path):
    plots.image_grid(axes, pictures(3, ROWS, COLS))
    path = tmp_path / "figure.png"
    path.write_text("an older picture")
    plots.save_figure(axes.figure, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["figure.png"]
    with Image.open(path) as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", (600, 450))


def test_save_figure_keeps_the_old_picture_when_drawing_fails(axes, tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_text("an older picture")

    def half_written(file, **_):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(axes.figure, "savefig", half_written)
    with pytest.raises(OSError, match="no space left"):
        plots.save_figure(axes.figure, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["figure.png"]
    assert path.read_text() == "an older picture"


def test_save_figure_gives_the_permissions_of_an_ordinary_file(axes, tmp_path):
    (tmp_path / "ordinary").touch()
    plots.save_figure(axes.figure, str(tmp_path / "figure.png"))
    modes = {entry.stat().st_mode for entry in tmp_path.iterdir()}
    assert len(modes) == 1


def test_nothing_global_is_touched(axes):
    plots.curve(axes, {"only": ([0, 1], [-1, 2])}, "x", "y")  # linear axes take any value
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


def test_boxes_stand_where_their_picture_stands(axes):
    images = np.zeros((3, 16, 32, 1), np.float32)
    boxes = [
        np.zeros((0, 4)),
        np.array([[3.0, 2, 13, 7]]),
        np.array([[0.0, 0, 32, 16], [1, 5, 8, 9]]),
    ]
    plots.boxes_on_images(axes, images, boxes, [[], ["cat"], ["dog", "cat"]], title="found")
    # Two columns; gaps of 1 row and 2 columns, and pixels are centred on whole numbers.
    found = [(*p.get_xy(), p.get_width(), p.get_height()) for p in axes.patches]
    wanted = [(3 + 34 - 0.5, 1.5, 10, 5), (-0.5, 17 - 0.5, 32, 16), (0.5, 22 - 0.5, 7, 4)]
    np.testing.assert_allclose(found, wanted)
    first, whole, other = (patch.get_edgecolor() for patch in axes.patches)
    assert first == other != whole
    assert [text.get_text() for text in axes.texts] == ["cat", "dog", "cat"]
    (picture,) = axes.get_images()
    assert picture.get_array().shape == (16 + 1 + 16, 32 + 2 + 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda axes: plots.image_grid(axes, np.zeros((3, 7, 5, 1))),
            r"image_grid: images of shape \(3, 7, 5, 1\); give five dimensions",
        ),
        (
            lambda axes: plots.image_grid(axes, np.zeros((3, 0, 7, 5, 1))),
            r"image_grid: images of shape \(3, 0, 7, 5, 1\).*at least one picture",
        ),
        (
            lambda axes: plots.image_grid(axes, np.zeros((3, 2, 7, 5, 4))),
            r"image_grid: images of shape \(3, 2, 7, 5, 4\).*1 or 3 channels",
        ),
        (
            lambda axes: plots.image_grid(axes, np.full((3, 2, 7, 5, 1), np.nan)),
            r"image_grid: images hold values that are not finite",
        ),
        (
            lambda axes: plots.image_grid(axes, np.zeros((3, 2, 7, 5, 1)), ["a", "b"]),
            r"image_grid: 2 row_labels for 3 rows",
        ),
        (
            lambda axes: plots.trajectory(axes, np.zeros((3, 2, 7, 5, 2)), np.zeros(3)),
            r"trajectory: images of shape \(3, 2, 7, 5, 2\)",
        ),
        (
            lambda axes: plots.trajectory(axes, np.zeros((3, 2, 7, 5, 1)), np.zeros(2)),
            r"trajectory: times of shape \(2,\) for images of shape \(3, 2, 7, 5, 1\)",
        ),
        (
            lambda axes: plots.boxes_on_images(
                axes, np.zeros((2, 5, 7, 1)), [np.zeros((1, 4)), np.zeros((2, 4))], [["a"], ["b"]]
            ),
            r"boxes_on_images: 2 images, boxes of \[1, 2\] and names of \[1, 1\]",
        ),
        (
            lambda axes: plots.precision_recall(axes, {"cat": ([0, 1], [np.nan, 1])}),
            r"precision_recall: precision of 'cat' is not in \[0, 1\] everywhere; leave out",
        ),
        (
            lambda axes: plots.precision_recall(axes, {"cat": ([0, 2], [1, 1])}),
            r"precision_recall: recall of 'cat' is not in \[0, 1\] everywhere; leave out",
        ),
        (lambda axes: plots.curve(axes, {}, "x", "y"), r"curve: 0 lines; give 1 to 21"),
        (
            lambda axes: plots.curve(axes, {str(i): ([1], [1]) for i in range(22)}, "x", "y"),
            r"curve: 22 lines; give 1 to 21",
        ),
        (
            lambda axes: plots.curve(axes, {"a": ([1, 2], [1, 2, 3])}, "x", "y"),
            r"curve: line 'a' has x of shape \(2,\) and y of shape \(3,\)",
        ),
        (
            lambda axes: plots.curve(axes, {"a": ([], [])}, "x", "y"),
            r"curve: line 'a' has x of shape \(0,\)",
        ),
        (
            lambda axes: plots.curve(axes, {"a": ([0, 1], [1, 1])}, "x", "y", logx=True),
            r"curve: line 'a' has x=0 on a logarithmic axis; .*logx=False",
        ),
        (
            lambda axes: plots.curve(axes, {"a": ([1, 2], [1, -2])}, "x", "y", logy=True),
            r"curve: line 'a' has y=-2 on a logarithmic axis; .*logy=False",
        ),
        (
            lambda axes: plots.save_figure(axes.figure, "figure.pdf"),
            r"save_figure: 'figure.pdf' does not end in .png",
        ),
    ],
)
def test_bad_input(production, axes, call, message):
    with pytest.raises(ValueError, match=message):
        call(axes)
    assert not axes.get_images()
