"""Files by name in a folder or an archive, also in an archive within it; nothing is unpacked to the disk."""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

ARCHIVES = (".tgz", ".tar.gz", ".tar", ".zip")

# What the libraries raise on a damaged, cut or encrypted archive.
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


@dataclass(frozen=True)
class PackedFile:
    """The content of a file, and where it lies: its path, after that of each archive around it."""

    place: str
    content: bytes

    def lines(self) -> Iterator[bytes]:
        """Return its lines."""
        return iter(io.BytesIO(self.content))


def files_named(
    path: str | Path, wanted: Callable[[str], bool], archive_wanted: Callable[[str], bool]
) -> dict[str, PackedFile]:
    """Return the files below a folder, or in an archive, whose name is wanted, by that name.

    Args:
        path: A folder, or a .tgz, .tar or .zip.
        wanted: Whether a file of this name, without folders, is one.
        archive_wanted: Whether to look into an archive of this name, found on the way.

    Raises:
        ValueError: There is nothing at `path`, or no folder or archive; an archive is damaged; or two files of one
            name differ.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: expected a folder, or one of {', '.join(ARCHIVES)}, found nothing; check the name")
    found: dict[str, PackedFile] = {}
    for name, file in _walk(path, wanted, archive_wanted):
        known = found.setdefault(name, file)
        if known.content != file.content:
            raise ValueError(
                f"{path}: expected one {name}, got two that differ, {known.place} and {file.place}; give the "
                "folder or archive of one of them"
            )
    return found


def _walk(
    path: Path, wanted: Callable[[str], bool], archive_wanted: Callable[[str], bool]
) -> Iterator[tuple[str, PackedFile]]:
    if path.is_dir():
        for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
            if wanted(file.name):
                yield file.name, PackedFile(str(file), file.read_bytes())
            elif file.name.endswith(ARCHIVES) and archive_wanted(file.name):
                with file.open("rb") as stream:
                    yield from _unpack(str(file), stream, wanted, archive_wanted)
    else:
        with path.open("rb") as stream:
            yield from _unpack(str(path), stream, wanted, archive_wanted)


def _unpack(
    place: str, stream: IO[bytes], wanted: Callable[[str], bool], archive_wanted: Callable[[str], bool]
) -> Iterator[tuple[str, PackedFile]]:
    kept = []
    try:
        for member, read in _members(place, stream):
            name = PurePosixPath(member).name
            if wanted(name) or (name.endswith(ARCHIVES) and archive_wanted(name)):
                kept.append((name, PackedFile(f"{place}:{member}", read())))
    except _DAMAGED as error:
        raise ValueError(
            f"{place}: expected a whole archive, got {type(error).__name__}: {error}; fetch it again"
        ) from error
    for name, file in kept:
        if wanted(name):
            yield name, file
        else:
            yield from _unpack(file.place, io.BytesIO(file.content), wanted, archive_wanted)


def _members(place: str, stream: IO[bytes]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    is_tar = tarfile.is_tarfile(stream)  # asked first: a .tar that ends with a .zip looks like a .zip
    stream.seek(0)
    if is_tar:
        with tarfile.open(fileobj=stream) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield member.name, content.read
            _check_ended(tar)
    elif zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as packed:
            for entry in packed.infolist():
                if not entry.is_dir():
                    yield entry.filename, partial(packed.read, entry)
    else:
        raise ValueError(
            f"{place}: expected a folder, or one of {', '.join(ARCHIVES)}, got another file or a damaged one; give "
            "the archive as it was published"
        )


def _check_ended(tar: tarfile.TarFile) -> None:
    """Refuse an archive whose files go on behind the last one that was read: the library stops at a damaged header.

    Raises:
        tarfile.ReadError: There is no end where it should be.
        OSError: What it is packed in is damaged further on.
    """
    rest: Any = tar.fileobj
    rest.seek(tar.offset)
    if rest.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("neither a file nor the end behind the last file")
    while rest.read(1 << 20):  # gzip checks its sum at the end
        pass
