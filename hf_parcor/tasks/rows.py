"""Rows of data, from the Hub or from a local file, and what their columns are called."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from hf_parcor.errors import InputError, nearest, one_line
from hf_parcor.hub_data import load_hub_data
from hf_parcor.records.data import EvaluationData, evaluation_data_of
from hf_parcor.tasks.audio import Samples, audio_seconds, read_audio
from hf_parcor.tasks.files import data_suffix, read_file
from hf_parcor.tasks.images import in_rgb, is_image_pack, read_image_rows

_Value = TypeVar("_Value")
_ON_ITS_SIDE = range(5, 9)  # of the orientations of EXIF, those by which width and height change places


@dataclass(frozen=True)
class Rows:
    """Rows of data, each a mapping from the names of columns to values.

    Attributes:
        source: What messages call them.
        entries: The rows, a list or a `datasets.Dataset`.
        columns: The names of the columns.
        class_names: For columns with numbers that stand for names: the names, in order.
        data: What records call them.
        numbers: Of the rows in the source, from 1 on, which messages name; empty where none is left out.
        folders: Of the rows, where the files lie that they name; empty where that is beside the source.

    Raises:
        InputError: There is no row.
    """

    source: str
    entries: Sequence[Mapping[str, Any]]
    columns: tuple[str, ...]
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    data: EvaluationData = field(default_factory=EvaluationData)
    numbers: Sequence[int] = ()
    folders: Sequence[Path] = ()

    def __post_init__(self) -> None:
        if not len(self.entries):
            raise InputError(f"{self.source}: expected at least one row, got none; name other data")

    def part(self, indices: Sequence[int], split: str) -> Rows:
        """Return some of the rows.

        Args:
            indices: Which, from 0 on.
            split: What records call this part.
        """
        entries: Any = self.entries
        chosen = [entries[index] for index in indices] if isinstance(entries, list) else entries.select(indices)
        data = replace(self.data, split=split, rows=len(indices))
        numbers = [self.number(index) for index in indices]
        folders = [self.folders[index] for index in indices] if self.folders else ()
        return replace(self, entries=chosen, data=data, numbers=numbers, folders=folders)

    def number(self, index: int) -> int:
        """Return the number in the source, from 1 on, of a row of these, from 0 on."""
        return self.numbers[index] if self.numbers else index + 1

    def numbered(self, values: Iterable[_Value]) -> Iterator[tuple[int, _Value]]:
        """Return the values of the rows, each with its row's number in the source."""
        return ((self.number(index), value) for index, value in enumerate(values))

    def first(self, count: int | None) -> Rows:
        """Return the first rows, as many as there are up to a number; None for all."""
        if count is None or count >= len(self.entries):
            return self
        split = self.data.split
        return self.part(range(count), f"({split})[:{count}]" if "+" in split else f"{split}[:{count}]")

    def split_off(self, share: float, seed: int) -> tuple[Rows, Rows]:
        """Split off a random part: return the rows without it, and the part, both in their order.

        Of n rows the part has n · share, rounded, but one at least, and one remains at least. It is drawn without
        replacement by `random.Random(seed)`: the same in every process, on every machine, and for every model.

        Args:
            share: Of the rows, between 0 and 1.
            seed: Of the draw.

        Raises:
            InputError: There is one row only.

        Examples:
            >>> rows = Rows("dev.tsv", [{"text": text} for text in "abcdef"], ("text",))
            >>> training, held_out = rows.split_off(0.3, seed=0)
            >>> len(training.entries), len(held_out.entries), held_out.data.split
            (4, 2, 'held out: 2 of 6 rows, seed 0')
        """
        total = len(self.entries)
        if total < 2:
            raise InputError(
                f"{self.source}: expected two rows or more, to train on one and measure on the other, got {total}; "
                "name other data to measure on"
            )
        count = min(max(1, round(total * share)), total - 1)
        drawn = set(random.Random(seed).sample(range(total), count))
        of_both = [[index for index in range(total) if (index in drawn) is inside] for inside in (False, True)]
        said = f"{count} of {total:,} rows, seed {seed}"
        before = f"{self.data.split}, " if self.data.split else ""
        return self.part(of_both[0], f"{before}without {said}"), self.part(of_both[1], f"{before}held out: {said}")

    def with_columns(self, *names: str) -> Iterator[Mapping[str, Any]]:
        """Return the rows one by one; of a data set with these columns alone, since it would open the images too."""
        entries: Any = self.entries
        if hasattr(entries, "select_columns"):
            entries = entries.select_columns(list(dict.fromkeys(names)))
        return iter(entries)

    def column(self, name: str) -> list[Any]:
        """Return all values of a column.

        Raises:
            InputError: A row lacks it.
        """
        values = [row.get(name) for row in self.with_columns(name)]
        if None in values:
            raise InputError(
                f"{self.source}: expected a value of {name!r} in each row, got none in row "
                f"{self.number(values.index(None))}; mend the data, or name another column or split"
            )
        return values

    def texts(self, name: str) -> list[str]:
        """Return all values of a column as texts.

        Raises:
            InputError: A row lacks it, or has something else.
        """
        return [self.text(value, name, row) for row, value in self.numbered(self.column(name))]

    def text(self, value: Any, column: str, row: int) -> str:
        """Return a text; of a number as it is written, since tables make numbers of what looks like one.

        Args:
            value: Of a row, or one of several there.
            column: Its column, for the message.
            row: The number of its row.

        Raises:
            InputError: It is something else, which Python would write in its own way.
        """
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value  # no NaN
        if not isinstance(value, str) and not is_number:
            raise InputError(
                f"{self.source}: expected a text in column {column!r}, got {type(value).__name__} in row {row}; name "
                "another column, or mend the data"
            )
        return str(value)

    def image(self, column: str, index: int) -> Any:
        """Return an image of a row in RGB, as `PIL.Image`; it is opened when it is needed.

        It is turned as its EXIF says, as `datasets` and Transformers do it, and as people see it. Of 16 bits a pixel
        the upper eight count.

        Args:
            column: With images of PIL, names of files beside the data file, or mappings with `bytes`, as `datasets`
                stores them.
            index: Of the row, from 0 on.

        Raises:
            InputError: There is none, or it cannot be read.
        """
        with self._opened(column, index) as image:
            return in_rgb(image)

    def image_size(self, column: str, index: int) -> tuple[int, int]:
        """Return width and height of an image of a row, as `image` finds it.

        Pixels are decoded only where EXIF may stand behind them, as in PNG.

        Raises:
            InputError: As for `image`.
        """
        from PIL import ExifTags

        with self._opened(column, index) as image:
            size = int(image.width), int(image.height)
            return size[::-1] if image.getexif().get(ExifTags.Base.Orientation) in _ON_ITS_SIDE else size

    def audio(self, column: str, index: int, rate: int) -> Samples:
        """Return a recording of a row, as `read_audio` does; it is decoded when it is needed.

        Args:
            column: With names of files beside the data file, or mappings as `datasets` stores them.
            index: Of the row, from 0 on.
            rate: Samples a second.

        Raises:
            InputError: There is none, or it cannot be read.
            ImportError: What reads it is not installed.
        """
        with self._recording(column, index) as recording:
            return read_audio(recording, rate)

    def audio_seconds(self, column: str, index: int) -> float:
        """Return how long a recording of a row is, as `audio` finds it; it is not decoded.

        Raises:
            InputError: As for `audio`.
        """
        with self._recording(column, index) as recording:
            return audio_seconds(recording)

    def _beside(self, value: Any, index: int) -> Any:
        """Return where a file lies that a row names, beside the data file; what is no name as it is."""
        if not isinstance(value, (str, int)):  # an int is a file by the name of a number, as tables are read
            return value
        return (self.folders[index] if self.folders else Path(self.source).parent) / str(value)

    @contextmanager
    def _recording(self, column: str, index: int) -> Iterator[Any]:
        recording = self._beside(self.entries[index].get(column), index)  # a row of JSON may lack it
        try:
            yield recording
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{self.source}: expected a recording, or the file of one, in row {self.number(index)}, got "
                f"{one_line(error)}; mend the data: paths are relative to the data file"
            ) from error

    @contextmanager
    def _opened(self, column: str, index: int) -> Iterator[Any]:
        from PIL import Image

        image = self.entries[index].get(column)
        if isinstance(image, Mapping):
            image = image.get("path") if image.get("bytes") is None else io.BytesIO(image["bytes"])
        try:
            image = self._beside(image, index)
            if isinstance(image, (Path, io.BytesIO)):
                with Image.open(image) as opened:
                    yield opened
            else:
                yield image
        except (OSError, AttributeError, ValueError, SyntaxError) as error:  # the last is what PIL raises of a PNG
            shown = repr(image.name) if isinstance(image, Path) else type(image).__name__
            raise InputError(
                f"{self.source}: expected an image, or the file of one, in row {self.number(index)}, got {shown} "
                f"({one_line(error)}); mend the data: paths are relative to the data file"
            ) from error


def load_rows(source: str, split: str = "validation", configuration: str | None = None) -> Rows:
    """Return the rows of a local file, of a local folder that `datasets` knows, or of a data set on the Hub.

    Packs and strips of images are files too, see `read_image_rows`; their columns are `image` and `label`, with boxes
    `boxes_xyxy` too.
    A data set that is still a loading script is read as `load_hub_data` does.

    Args:
        source: A file (.csv, .tsv, .json, .jsonl, .txt, also .gz; .npz, .png), a folder, or a name on the Hub.
        split: Which split; a file has none.
        configuration: The data set's configuration.

    Raises:
        InputError: There is no such data, split or configuration, or it has no row.
        ImportError: It is no local file, and datasets is not installed.
    """
    path = Path(source)
    if is_image_pack(source):
        return _of_images(source)
    if path.is_file() or data_suffix(source):
        return _of_files(source, [path], EvaluationData(path.name))
    files = _files_of_split(source, split, configuration) if path.is_dir() else []
    if files:
        return _of_files(source, files, EvaluationData(path.absolute().name, split=split))
    found = load_hub_data(source, configuration, split=split)
    if "translation" in found.features:
        found = found.flatten()
    data = replace(evaluation_data_of(found), name=path.absolute().name, id="" if path.exists() else source)
    for name, feature in found.features.items():
        if type(feature).__name__ == "Audio":  # `datasets` would decode it with another library, at its own rate
            found = found.cast_column(name, type(feature)(decode=False))
    # Which file a row is from is not known, but that those of a folder lie in it.
    folders = [path] * len(found) if path.is_dir() else ()
    return Rows(source, found, tuple(found.column_names), _class_names(found.features), data, folders=folders)


def _files_of_split(folder: str, split: str, configuration: str | None) -> list[str]:
    """Return the files that `datasets` takes for a split of a folder, where `read_file` reads all of them.

    It keeps what cells say, where `datasets` makes a 1 of 01. None where the folder says which types its columns have.
    """
    try:
        import datasets
    except ImportError:  # said where it is read
        return []
    try:
        builder = datasets.load_dataset_builder(folder, configuration)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError):  # said where it is read
        return []
    if builder.info.features is not None:
        return []
    files = [str(file) for file in (builder.config.data_files or {}).get(split, [])]
    return files if all(data_suffix(file) and Path(file).is_file() for file in files) else []


def _of_files(source: str, files: Sequence[str | Path], data: EvaluationData) -> Rows:
    rows: list[Mapping[str, Any]] = []
    folders: list[Path] = []
    for file in files:
        rows += read_file(file)
        folders += [Path(file).parent] * (len(rows) - len(folders))
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    return Rows(source, rows, names, data=replace(data, rows=len(rows)), folders=folders)


def _of_images(source: str) -> Rows:
    entries, names = read_image_rows(source)
    data = EvaluationData(Path(source).name, rows=len(entries))
    return Rows(source, entries, tuple(entries[0]), {"label": names} if names else {}, data)


def find_column(rows: Rows, role: str, known: Sequence[str], given: Mapping[str, str]) -> str | None:
    """Return the column that has a role: the one that is given, or the first with a well-known name.

    Raises:
        InputError: The column that is given does not exist, or two have one well-known name but for its case.
    """
    if role in given:
        if given[role] not in rows.columns:
            raise InputError(
                f"{rows.source}: expected one of the columns {', '.join(rows.columns)}, got {given[role]!r} for "
                f"{role}{nearest(given[role], rows.columns)}; name the column"
            )
        return given[role]
    found = next(filter(None, ([name for name in rows.columns if name.lower() == wanted] for wanted in known)), [])
    if len(found) > 1:
        raise InputError(
            f"{rows.source}: expected one column for {role}, got {', '.join(found)}; name it with --column {role}=NAME"
        )
    return found[0] if found else None


def _class_names(features: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """Return the names behind the numbers of those columns that are labels, or lists of labels."""
    found: dict[str, Sequence[str]] = {}
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)
        # Of objects on images, each with a box and a class, those of the class.
        parts = inner.values() if isinstance(inner, dict) else [inner]
        of_parts = [getattr(getattr(part, "feature", part), "names", None) for part in parts]
        names = next((names for names in of_parts if names is not None), None)
        if names is not None:
            found[name] = list(names)
    return found
