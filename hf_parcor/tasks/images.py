"""Many images of one size as one array of pixels: packs of encoded images, and strips without loss."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isqrt
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hf_parcor.errors import InputError, one_line

Pixels: TypeAlias = NDArray[np.uint8]
Size: TypeAlias = tuple[int, int]
_LABELS = "_labels.txt"
_ARRAYS = ("jpeg", "offsets", "labels", "names", "boxes_xyxy", "box_offsets")


def is_image_pack(source: str) -> bool:
    """Tell whether a name is that of a pack (.npz) or of strips (.png), one or a pattern.

    Examples:
        >>> is_image_pack("cifar10_test_jpeg.npz"), is_image_pack("cifar10_lossless*.png"), is_image_pack("dev.tsv")
        (True, True, False)
    """
    return source.lower().endswith((".npz", ".png"))


@dataclass(frozen=True, eq=False)
class LabelledImages(Sequence[Mapping[str, Any]]):
    """Images of one size and their classes; as a sequence, rows with an `image` and a `label`.

    Attributes:
        pixels: Of shape (images, height, width, 3), from 0 to 255.
        labels: The number of each image's class, whole.
        names: The names of the classes, by number; none if they have none.
    """

    pixels: Pixels
    labels: NDArray[np.int64]
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image

        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return {"image": Image.fromarray(self.pixels[index]), "label": int(self.labels[index])}

    def select(self, indices: Sequence[int]) -> LabelledImages:
        """Return some of them."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(self, pixels=self.pixels[chosen], labels=self.labels[chosen])


def read_images(source: str | Path, size: Size | None = None) -> LabelledImages:
    """Return the images of a pack, or of strips, all decoded.

    A *pack* is an .npz file of NumPy with the arrays `jpeg`, the bytes of all encoded images one after the other;
    `offsets`, so that those of image i are `jpeg[offsets[i]:offsets[i + 1]]`; `labels`, the number of each image's
    class; and, if there are, `names` of the classes.

    A *strip* is a .png file each of whose rows is one square image, as wide as that has pixels: 1,000 images of 32 by
    32 pixels are 1,024 wide and 1,000 high. Beside `x_1.png` and `x_2.png` lies `x_labels.txt`, with the number of a
    class in each line, for the images of all strips that begin with `x` in the order of their names. Several are named
    by a pattern, `x*.png`.

    Images of a pack are turned as their EXIF says, as files of images are. Images without colour are given three equal
    channels; what is transparent is seen without; of 16 bits a pixel the upper eight count.

    Args:
        source: A file, or a pattern of strips.
        size: Height and width that all images are brought to, bilinearly. Default None: as they are, of one size.

    Raises:
        InputError: There is no such file, it is no such pack, or an image cannot be decoded or has another size.
    """
    name = str(source)
    return _of_pack(name, _arrays_of(name), size) if name.lower().endswith(".npz") else _of_strips(name, size)


def read_image_rows(source: str) -> tuple[Sequence[Mapping[str, Any]], tuple[str, ...]]:
    """Return the rows of a pack, or of strips, and the names of the classes, if there are any.

    They are those of `read_images`, unless a pack has `boxes_xyxy` (n, 5): class and corners (xmin, ymin, xmax, ymax)
    in pixels, those of image i from `box_offsets[i]` up to `box_offsets[i + 1]`, which may be none. Then each row has
    an `image`, whose `bytes` are not decoded, since sizes may differ; `boxes_xyxy`, a list of corners; and `label`, a
    list of as many classes.

    Raises:
        InputError: As for `read_images`; or boxes are no numbers, or not for as many images.
    """
    arrays = _arrays_of(source) if source.lower().endswith(".npz") else {}
    if "boxes_xyxy" in arrays:
        return _with_boxes(source, arrays)
    images = _of_pack(source, arrays, None) if arrays else _of_strips(source, None)
    return images, images.names


def stacked_pixels(images: Iterable[Any], count: int, source: str, size: Size | None = None) -> Pixels:
    """Return the pixels of images of PIL in one array.

    Args:
        images: Images, which are closed after use.
        count: How many there are.
        source: What messages call the data.
        size: As for `read_images`.

    Raises:
        InputError: An image cannot be decoded, or has another size than the first.
    """
    pixels: Pixels | None = None
    for index, image in enumerate(images):
        decoded = _decoded(image, index, source, size)
        if pixels is None:
            pixels = np.empty((count, *decoded.shape), np.uint8)
        if decoded.shape != pixels.shape[1:]:
            shapes = [f"{width} by {height}" for height, width, _ in (pixels.shape[1:], decoded.shape)]
            _refuse(
                f"{source}: image {index}",
                f"the size of the first, {shapes[0]} pixels",
                f"{shapes[1]}",
                "say which size all are to have",
            )
        pixels[index] = decoded
    if pixels is None:
        _refuse(source, "images", "none", "name other data")
    return pixels


def in_rgb(image: Any) -> Any:
    """Return an image of PIL in RGB, turned as its EXIF says; of 16 bits a pixel the upper eight.

    PIL would cut them at 255, so that nearly all of the image is white.

    Raises:
        ValueError: Pixels are numbers of another range, of which nobody knows what is white.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)  # decodes
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        low, high = image.getextrema()
        if not 0 <= low <= high <= 255 or 0 < high <= 1:  # up to 1, all would be black
            raise ValueError(f"pixels from {low:g} to {high:g}, not from 0 to 255")
    return image.convert("RGB")


def _decoded(image: Any, index: int, source: str, size: Size | None) -> Pixels:
    try:
        with image:
            image = in_rgb(image)
            if size is not None and image.size != size[::-1]:
                from PIL import Image

                image = image.resize(size[::-1], Image.Resampling.BILINEAR)
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:  # the last is what PIL raises of a broken PNG
        _refuse(f"{source}: image {index}", "one that can be decoded", one_line(error), "mend or leave it out", error)


def _of_pack(source: str, arrays: Mapping[str, NDArray[Any]], size: Size | None) -> LabelledImages:
    if "labels" not in arrays:
        _refuse(source, "the array labels, or boxes_xyxy, beside images", _listed(arrays), "add one")
    names = _names(source, arrays.get("names"))
    count = len(arrays["offsets"]) - 1
    labels = _labels(source, arrays["labels"], count, names)
    opened = _opened(source, arrays["jpeg"], arrays["offsets"])
    return LabelledImages(stacked_pixels(opened, count, source, size), labels, names)


def _with_boxes(source: str, arrays: Mapping[str, NDArray[Any]]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    names, boxes = _names(source, arrays.get("names")), arrays["boxes_xyxy"]
    if boxes.dtype.kind not in "iuf" or boxes.ndim != 2 or boxes.shape[1] != 5:
        _refuse(source, "boxes_xyxy as numbers, five a box", _shown(boxes), "store class, xmin, ymin, xmax, ymax")
    if "box_offsets" not in arrays:
        _refuse(source, "the array box_offsets beside boxes_xyxy", _listed(arrays), "say which boxes each image has")
    content, offsets = arrays["jpeg"], arrays["offsets"]
    starts = _offsets(source, "box_offsets", arrays["box_offsets"], "boxes", len(boxes))
    if len(starts) != len(offsets):
        found = f"{len(starts)} for {len(offsets) - 1} images"
        _refuse(source, "one number in box_offsets more than images", found, "repeat one where an image has no box")
    classes = boxes[:, 0]
    broken = np.flatnonzero(~np.isfinite(classes) | (classes != np.floor(classes)))
    if len(broken):
        found = f"{classes[broken[0]]} of box {broken[0]}"
        _refuse(source, "whole numbers of classes first in boxes_xyxy", found, "number the classes")
    labels = _labels(source, classes.astype(np.int64), len(boxes), names, "box").tolist()
    corners = boxes[:, 1:].astype(float).tolist()
    rows = [
        {
            "image": {"bytes": content[start:end].tobytes()},
            "boxes_xyxy": corners[first:last],
            "label": labels[first:last],
        }
        for (start, end), (first, last) in zip(pairwise(offsets), pairwise(starts), strict=True)
    ]
    return rows, names


def _arrays_of(source: str) -> dict[str, NDArray[Any]]:
    """Return the arrays of a pack: encoded images, where each begins, and what it says of them."""
    try:
        with Path(source).open("rb") as file, np.load(file, allow_pickle=False) as pack:
            arrays = {name: pack[name] for name in _ARRAYS if name in pack.files}
    except FileNotFoundError as error:
        _refuse(source, "a file", "none", "check its name", error)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        _refuse(source, "an .npz file of NumPy without objects", one_line(error), "restore or convert it", error)
    missing = [name for name in ("jpeg", "offsets") if name not in arrays]
    if missing:
        wanted = f"the arrays jpeg and offsets (without {missing[0]!r} it is no pack)"
        _refuse(source, wanted, _listed(arrays), "add it")
    content, offsets = arrays["jpeg"], arrays["offsets"]
    if content.dtype != np.uint8 or content.ndim != 1:
        _refuse(source, "jpeg as bytes, uint8 in one dimension", _shown(content), "store encoded images")
    arrays["offsets"] = _offsets(source, "offsets", offsets, "bytes", len(content))
    return arrays


def _offsets(source: str, name: str, offsets: NDArray[Any], parts: str, count: int) -> NDArray[np.int64]:
    """Return where the parts of each image begin, and the last ones end; an image may be without boxes, not bytes."""
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
        _refuse(source, f"{name} as whole numbers in one dimension, two or more", _shown(offsets), "mend them")
    offsets = offsets.astype(np.int64)
    least = int(parts == "bytes")
    falling = np.flatnonzero(np.diff(offsets) < least)
    if len(falling):
        at = int(falling[0])
        wanted = f"{name} that rise, since each image has bytes" if least else f"{name} that do not fall"
        _refuse(source, wanted, f"{offsets[at]} and then {offsets[at + 1]} at {at}", "mend them")
    if offsets[0] != 0 or offsets[-1] != count:
        wanted = f"{name} from 0 to the number of {parts}, {count}"
        _refuse(source, wanted, f"{offsets[0]} to {offsets[-1]}", "mend them, or restore the file")
    return offsets


def _opened(source: str, content: Pixels, offsets: NDArray[np.int64]) -> Iterator[Any]:
    from PIL import Image

    for index, (start, end) in enumerate(pairwise(offsets)):
        try:
            yield Image.open(io.BytesIO(content[start:end].tobytes()))
        except (OSError, SyntaxError) as error:
            _refuse(
                f"{source}: image {index}", "one that can be decoded", one_line(error), "mend or leave it out", error
            )


def _of_strips(source: str, size: Size | None) -> LabelledImages:
    named = Path(source)
    paths = sorted(named.parent.glob(named.name)) or [named]
    pixels = [_of_strip(path) for path in paths]
    if len({strip.shape[1] for strip in pixels}) > 1:
        _refuse(source, "strips of images of one size", "several sizes", "name strips of one size")
    whole = np.concatenate(pixels)
    file = _labels_beside(source, paths)
    try:
        numbers = [int(line) for line in file.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        _refuse(str(file), "the number of a class in each line", one_line(error), "mend it", error)
    labels = _labels(str(file), np.array(numbers, dtype=np.int64), len(whole), ())
    if size is not None and whole.shape[1:3] != size:
        from PIL import Image

        whole = stacked_pixels(map(Image.fromarray, whole), len(whole), source, size)
    return LabelledImages(whole, labels)


def _of_strip(path: Path) -> Pixels:
    from PIL import Image

    try:
        with Image.open(path) as image:
            strip = np.asarray(in_rgb(image))
    except FileNotFoundError as error:
        _refuse(str(path), "a file", "none", "check its name", error)
    except (OSError, ValueError, SyntaxError) as error:
        _refuse(str(path), "a picture", one_line(error), "mend or convert it", error)
    side = isqrt(strip.shape[1])
    if side**2 != strip.shape[1]:
        wanted = "a strip, each row a square image, whose width is a square number"
        _refuse(str(path), wanted, f"{strip.shape[1]} pixels", "name single images in a table, or as an image folder")
    return strip.reshape(len(strip), side, side, 3)


def _labels_beside(source: str, paths: Sequence[Path]) -> Path:
    found = [
        file
        for file in sorted(paths[0].parent.glob(f"*{_LABELS}"))
        if all(path.name.startswith(file.name.removesuffix(_LABELS)) for path in paths)
    ]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        _refuse(source, f"one file x{_LABELS} beside strips whose names begin with x", names, "name it so")
    return found[0]


def _names(source: str, names: NDArray[Any] | None) -> tuple[str, ...]:
    if names is None:
        return ()
    if names.dtype.kind != "U" or names.ndim != 1:
        _refuse(source, "names as text in one dimension", _shown(names), "mend them")
    return tuple(map(str, names))


def _labels(
    source: str, labels: NDArray[Any], count: int, names: Sequence[str], what: str = "image"
) -> NDArray[np.int64]:
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        _refuse(source, "labels as whole numbers in one dimension", _shown(labels), "number the classes")
    if len(labels) != count:
        _refuse(source, f"a label for each of {count} images", f"{len(labels)} labels", "add or name what is missing")
    most = len(names) or np.iinfo(np.int64).max
    outside = np.flatnonzero((labels < 0) | (labels >= most))
    if len(outside):
        at = int(outside[0])
        known = f" below {most}, the number of names" if names else ""
        _refuse(source, f"labels from 0 on{known}", f"{labels[at]} of {what} {at}", "mend them")
    return labels.astype(np.int64)


def _listed(arrays: Mapping[str, Any]) -> str:
    return ", ".join(arrays) or "none of these"


def _shown(array: NDArray[Any]) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _refuse(source: str, expected: str, found: str, advice: str, error: Exception | None = None) -> NoReturn:
    raise InputError(f"{source}: expected {expected}, got {found}; {advice}") from error
