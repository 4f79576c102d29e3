"""Packs and strips of images: every pixel and label as it was packed; what is wrong with a file, in one line."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from for_each import for_each
from local_models import save_vit
from PIL import ExifTags, Image

from hf_parcor.errors import InputError
from hf_parcor.tasks import ImageClassification, Processed, Rows, decoded_images, load_rows, read_images

NAMES = ("cat", "dog", "bird")


def encoded(image, kind="PNG"):
    held = io.BytesIO()
    image.save(held, kind)
    return held.getvalue()


def pixels_of(count, side=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def packed(contents, labels, **more):
    """The arrays of a pack."""
    offsets = np.cumsum([0, *map(len, contents)])
    return {
        "jpeg": np.frombuffer(b"".join(contents), np.uint8),
        "offsets": offsets,
        "labels": np.array(labels, np.uint8),
        **more,
    }


@pytest.fixture
def pack(tmp_path):
    """Return what writes a pack, of three coloured images unless something else is given, and returns its name."""

    def write(**arrays):
        contents = [encoded(Image.fromarray(one)) for one in pixels_of(3)]
        whole = {**packed(contents, [0, 2, 1], names=np.array(NAMES)), **arrays}
        np.savez(tmp_path / "a.npz", **{name: value for name, value in whole.items() if value is not None})
        return str(tmp_path / "a.npz")

    return write


def test_pixels_and_labels_are_what_was_packed(pack):
    images = read_images(pack())
    assert np.array_equal(images.pixels, pixels_of(3))
    assert images.labels.tolist() == [0, 2, 1]
    assert images.names == NAMES


def test_a_model_that_counts_its_classes_otherwise_gets_them_by_name(pack):
    rows, task = load_rows(pack()), ImageClassification()
    numbers = {"bird": 0, "cat": 1, "dog": 2}
    found = decoded_images(rows, task.find_columns(rows, {}), numbers)
    assert found.labels.tolist() == [numbers[NAMES[label]] for label in (0, 2, 1)]
    assert [found[index]["label"] for index in range(3)] == found.labels.tolist()
    assert rows.part([2, 0], "some").entries.labels.tolist() == [1, 0]


@for_each("size", [None, (4, 4), (2, 3)])
def test_images_come_in_the_size_that_is_asked_for(pack, size):
    rows = load_rows(pack())
    found = decoded_images(
        rows, {"image": "image", "label": "label"}, {name: at for at, name in enumerate(NAMES)}, size
    )
    images = [Image.fromarray(one) for one in pixels_of(3)]
    if size is not None:
        images = [one.resize(size[::-1], Image.Resampling.BILINEAR) for one in images]
    assert np.array_equal(found.pixels, np.stack([np.asarray(one) for one in images]))


def test_images_without_colour_have_three_equal_channels(pack):
    grey = [Image.fromarray(one[..., 0]) for one in pixels_of(2)]
    clear = Image.fromarray(np.dstack([pixels_of(1)[0], np.full((4, 4), 7, np.uint8)]), "RGBA")
    images = read_images(pack(**packed([*map(encoded, grey), encoded(clear)], [0, 1, 2])))
    assert np.array_equal(images.pixels[:2], np.repeat(pixels_of(2)[..., :1], 3, -1))
    assert np.array_equal(images.pixels[2], pixels_of(1)[0])


def test_images_of_several_sizes_need_a_size(pack):
    sizes = [Image.fromarray(pixels_of(1, side)[0]) for side in (4, 6)]
    path = pack(**packed(list(map(encoded, sizes)), [0, 1]))
    with pytest.raises(InputError, match=r"image 1: expected the size of the first, 4 by 4 pixels, got 6 by 6"):
        read_images(path)
    found = read_images(path, (4, 4)).pixels
    assert np.array_equal(found[0], pixels_of(1, 4)[0])
    assert np.array_equal(found[1], np.asarray(sizes[1].resize((4, 4), Image.Resampling.BILINEAR)))


GOOD = encoded(Image.fromarray(pixels_of(1)[0]))


@for_each(
    ("arrays", "says"),
    [
        ({"labels": None}, "the array labels"),
        ({"jpeg": None, "offsets": None}, "'jpeg' it is no pack"),
        ({"labels": np.array([0, 1])}, "a label for each of 3 images, got 2"),
        ({"labels": np.array([0.0, 1.0, 2.0])}, "whole numbers.*float64"),
        ({"labels": np.array([0, 1, 3])}, "below 3.*got 3 of image 2"),
        ({"labels": np.array([0, -1, 2])}, "got -1 of image 1"),
        ({"offsets": np.array([0, 9, 5, 12])}, "offsets that rise.*got 9 and then 5 at 1"),
        ({"offsets": np.array([0, 5, 5, 12])}, "got 5 and then 5 at 1"),
        ({"offsets": np.array([0, 5, 9, 12])}, "the number of bytes, .*got 0 to 12"),
        ({"offsets": np.array([0.0, 5.0])}, "offsets as whole numbers"),
        ({"offsets": np.array([0])}, "two or more"),
        ({"jpeg": np.zeros(9, np.int16)}, "uint8 in one dimension, got int16"),
        ({"names": np.array([1, 2, 3])}, "names as text"),
        (packed([GOOD, b"no picture"], [0, 1]), "image 1: expected one that can be decoded"),
        (packed([GOOD, GOOD[: len(GOOD) // 2]], [0, 1]), "image 1: expected one that can be decoded"),
        ({"labels": np.array([None, 1, 2])}, "without objects"),
    ],
)
def test_what_is_no_pack(pack, arrays, says):
    with pytest.raises(InputError, match=says):
        load_rows(pack(**arrays))


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(InputError, match="NumPy"):
        read_images(tmp_path / "a.npz")
    for name in ("b.npz", "b.png", "b*.png"):
        with pytest.raises(InputError, match="expected a file, got none"):
            load_rows(str(tmp_path / name))


@pytest.fixture
def strips(tmp_path):
    pixels = pixels_of(5)
    for name, part in {"x_1.png": pixels[:3], "x_2.png": pixels[3:]}.items():
        Image.fromarray(part.reshape(len(part), 16, 3)).save(tmp_path / name)
    (tmp_path / "x_labels.txt").write_text("0\n1\n2\n1\n0\n")
    return tmp_path


class TestStrips:
    def test_one_picture_of_many_images(self, strips):
        images = load_rows(str(strips / "x*.png")).entries
        assert np.array_equal(images.pixels, pixels_of(5))
        assert images.labels.tolist() == [0, 1, 2, 1, 0]
        assert np.array_equal(np.asarray(images[4]["image"]), pixels_of(5)[4])
        assert read_images(strips / "x*.png", (2, 2)).pixels.shape == (5, 2, 2, 3)

    @for_each(
        ("name", "labels", "says"),
        [
            ("x_1.png", None, "a label for each of 3 images, got 5"),  # named alone
            ("x*.png", "0\none\n", "number of a class in each line"),
            ("x*.png", "", "a label for each of 5 images, got 0"),
        ],
    )
    def test_labels_that_do_not_fit(self, strips, name, labels, says):
        if labels is not None:
            (strips / "x_labels.txt").write_text(labels)
        with pytest.raises(InputError, match=says):
            read_images(strips / name)

    def test_which_labels(self, strips):
        (strips / "_labels.txt").write_text("0\n")  # of strips of any name
        with pytest.raises(InputError, match="one file x_labels"):
            read_images(strips / "x*.png")

    def test_a_picture_that_is_no_strip(self, strips):
        Image.fromarray(pixels_of(1, 5)[0]).save(strips / "x_3.png")
        with pytest.raises(InputError, match="square number, got 5 pixels"):
            read_images(strips / "x*.png")


def test_an_image_file_that_does_not_decode_says_which_row(tmp_path):
    (tmp_path / "0.png").write_bytes(GOOD[: len(GOOD) // 2])
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "0.png", "label": 0}]))
    rows = load_rows(str(tmp_path / "rows.json"))
    with pytest.raises(InputError, match=r"expected an image.* in row 1, got '0.png'"):
        decoded_images(rows, {"image": "image", "label": "label"}, {"zero": 0})


@for_each("row", [{}, {"image": None}])
def test_a_row_without_an_image(row):
    rows = Rows("rows.json", [{"image": Image.new("RGB", (2, 2))}, row], ("image",))
    for read in (rows.image, rows.image_size):
        with pytest.raises(InputError, match=r"expected an image.* in row 2, got NoneType .*; mend the data"):
            read("image", 1)


@for_each("orientation", range(1, 9))
def test_an_image_is_turned_as_people_see_it(orientation, tmp_path):
    """As `datasets` and Transformers read it, and wherever it lies; its size is known before it is decoded."""
    datasets = pytest.importorskip("datasets")
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels_of(1, 8)[0][:4]).save(tmp_path / "0.jpg", exif=exif)
    expected = load_image(str(tmp_path / "0.jpg"))
    assert expected.size == ((8, 4) if orientation < 5 else (4, 8))
    content = (tmp_path / "0.jpg").read_bytes()
    np.savez(tmp_path / "a.npz", **packed([content], [0]))
    boxes = {"boxes_xyxy": np.array([[0, 0, 0, 1, 1]]), "box_offsets": np.array([0, 1])}
    np.savez(tmp_path / "boxes.npz", **{**packed([content], [0]), **boxes})
    held = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None}]})
    for rows in (
        Rows(str(tmp_path / "rows.csv"), [{"image": "0.jpg"}], ("image",)),
        Rows("rows", [{"image": Image.open(tmp_path / "0.jpg")}], ("image",)),
        Rows("rows", held.cast_column("image", datasets.Image()), ("image",)),
        load_rows(str(tmp_path / "a.npz")),
        load_rows(str(tmp_path / "boxes.npz")),
    ):
        assert rows.image_size("image", 0) == expected.size
        np.testing.assert_array_equal(np.asarray(rows.image("image", 0)), np.asarray(expected))
    of_file = Rows(str(tmp_path / "rows.csv"), [{"image": "0.jpg", "label": "0"}], ("image", "label"))
    found = decoded_images(of_file, {"image": "image", "label": "label"}, {"0": 0})
    np.testing.assert_array_equal(found.pixels[0], np.asarray(expected))


@for_each("name", ["0.png", "0.tif"])
def test_of_16_bits_the_upper_eight_count(name, tmp_path):
    """PIL cuts them at 255: all but the darkest is white."""
    upper = pixels_of(1, 8)[0][..., 0]
    Image.fromarray(upper.astype(np.uint16) * 256 + 17).save(tmp_path / name)
    np.savez(tmp_path / "a.npz", **packed([(tmp_path / name).read_bytes()], [0]))
    of_file = Rows(str(tmp_path / "rows.csv"), [{"image": name}], ("image",)).image("image", 0)
    for found in (np.asarray(of_file), read_images(tmp_path / "a.npz").pixels[0]):
        np.testing.assert_array_equal(found, np.repeat(upper[..., None], 3, -1))


@for_each(
    ("pixels", "says"),
    [
        (np.float32([[-1, 0.5]]), "from -1 to 0.5"),
        (np.float32([[0, 1]]), "from 0 to 1"),  # all would be black
        (np.int32([[0, 4095]]), "from 0 to 4095"),
    ],
)
def test_pixels_of_an_unknown_range_are_refused(pixels, says):
    rows = Rows("rows", [{"image": Image.fromarray(pixels)}], ("image",))
    with pytest.raises(InputError, match=f"in row 1, got .*pixels {says}, not from 0 to 255"):
        rows.image("image", 0)


def test_labels_are_read_without_their_images(tmp_path):
    """A data set opens the image of a row that is asked for as a whole."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    cells = {"image": [{"path": None, "bytes": b"no image"}] * 2, "label": [1, 0]}
    found = datasets.Dataset.from_dict(cells, features=features)
    assert Rows("rows", found, ("image", "label")).column("label") == [1, 0]


def test_what_a_processor_leaves_of_several_sizes_is_refused(tmp_path):
    """As one that brings the shortest edge to a length, and does not crop."""
    folder = save_vit(tmp_path)
    settings = {"image_processor_type": "ViTImageProcessor", "do_resize": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    images = [Image.fromarray(pixels_of(1, side)[0]) for side in (8, 6)]
    rows = Rows("rows", [{"image": image, "label": "POSITIVE"} for image in images], ("image", "label"))
    task = ImageClassification()
    processed = Processed(task.load_model(folder), task.load_processor(folder))
    batches = task.batches(task.examples(rows, task.find_columns(rows, {}), processed), processed, 2)
    with pytest.raises(InputError, match=r"to one size, got \(3, 8, 8\) and \(3, 6, 6\) in one batch; set its size"):
        next(iter(batches))
