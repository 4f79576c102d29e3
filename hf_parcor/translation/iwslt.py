"""The official distribution of IWSLT: training lines between tags, evaluation sets of numbered segments."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from hf_parcor.hub_data import download_from_hub
from hf_parcor.translation.packed_files import ARCHIVES, PackedFile, files_named
from hf_parcor.translation.parallel_text import ParallelText, decoded_lines, pair_up

# What stands before and after the lines of a talk. Anything else between < and > is part of a line.
_BEFORE = ("doc", "url", "keywords", "speaker", "talkid", "title", "description")
_AFTER = ("reviewer", "translator", "/doc")
_TAG = re.compile(rf"<({'|'.join((*_BEFORE, *_AFTER))})\b[^>]*>")
_TITLES = ("title", "description")
_TEXT = "text"

_SEGMENT = re.compile(r'<seg\s+id="(\d+)"\s*>((?:(?!</?seg\b).)*)</seg>')
_DOCUMENT = re.compile(r'<doc\b[^>]*?(?:\bdocid="([^"]*)"[^>]*)?>', re.IGNORECASE)
_NAME_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class IwsltText:
    """A language pair of one year's distribution, found and not yet parsed.

    Args:
        source: The language to translate from.
        target: The language to translate to.
        pair: Both, as the files are named: `de-en`, also where `de` is the target and the year has no `en-de`.
        year: The last two digits, `14`; None if there is no evaluation set.
        origin: Where it was found.
        files: By `train` or the name of the set, the file of each language.
    """

    source: str
    target: str
    pair: str
    year: str | None
    origin: str
    files: Mapping[str, Mapping[str, PackedFile]] = field(repr=False)

    @property
    def sets(self) -> tuple[str, ...]:
        """The evaluation sets with both languages: the development sets, then the tests, each by year."""
        complete = [name for name in self.files if name != "train" and len(self.files[name]) == 2]
        return tuple(sorted(complete, key=_order))

    def train(self) -> ParallelText:
        """Return the lines of the talks, without tags, titles and descriptions, `&amp;` and its like resolved.

        Raises:
            ValueError: A file is missing, not UTF-8, or a tag is not closed; or the languages differ in their talks or
                in the number of lines of one.
        """
        pairs = (
            (place, html.unescape(source), html.unescape(target))
            for place, kind, source, target in self.lines()
            if kind == _TEXT
        )
        return pair_up(pairs, f"{self.origin}, train")

    def evaluation(self, *names: str) -> ParallelText:
        """Return the segments of these sets, one set after the other, as people write them.

        Args:
            *names: As in `sets`, or without what stands before the point where that is not needed: `dev2010`.

        Raises:
            ValueError: No set is named, or there is no such set, or two; or it is malformed: no segment, one that is
                not alone and closed in its line or numbered twice, or segments of one language that the other has not.
        """
        pairs = (
            (place, html.unescape(source), html.unescape(target)) for place, source, target in self.segments(*names)
        )
        return pair_up(pairs, f"{self.origin}, {' '.join(names)}")

    def lines(self) -> Iterator[tuple[int, str, str, str]]:
        """Yield all lines of the training files as they stand: number, kind, and the text in both languages.

        The kind is `text`, `title` or `description`; the number is that in the file of the source.

        Raises:
            ValueError: As in `train`.
        """
        first, second = self._both("train")
        talks = list(_talks(first)), list(_talks(second))
        for number, (one, two) in enumerate(zip_longest(*talks, fillvalue=_NO_TALK), start=1):
            if one.number != two.number:
                raise ValueError(
                    f"{first.place} and {second.place}: expected the same talks, got {len(talks[0]):,} and "
                    f"{len(talks[1]):,}; talk {number:,} is {one.number}, from line {one.start:,}, and {two.number}, "
                    f"from line {two.start:,}: fetch them again"
                )
            if [kind for _, kind, _ in one.lines] != [kind for _, kind, _ in two.lines]:
                raise ValueError(
                    f"{first.place} and {second.place}: expected as many lines of talk {number:,} ({one.number}), got "
                    f"{one.counts}, from line {one.start:,}, and {two.counts}, from line {two.start:,}; align them"
                )
            for (place, kind, source), (_, _, target) in zip(one.lines, two.lines, strict=True):
                yield place, kind, source, target

    def segments(self, *names: str) -> Iterator[tuple[int, str, str]]:
        """Yield the segments of these sets as they stand, numbered from 1 through all of them.

        Raises:
            ValueError: As in `evaluation`.
        """
        if not names:
            raise ValueError(
                f"{self.origin}: expected the name of an evaluation set, got none; there are "
                f"{', '.join(self.sets) or 'none'}: name some of these"
            )
        place = 0
        for name in names:
            first, second = self._both(self._full_name(name))
            segments = _segments(first), _segments(second)
            for one, two in ((first, second), (second, first)):
                mine, other = segments if one is first else reversed(segments)
                missing = [key for key in mine if key not in other]
                if missing:
                    document, number = missing[0]
                    raise ValueError(
                        f"{first.place} and {second.place}: expected the same segments, got {len(segments[0]):,} and "
                        f"{len(segments[1]):,}; segment {number} of document {document} in {one.place} is not in "
                        f"{two.place}: align them"
                    )
            for key, source in segments[0].items():
                place += 1
                yield place, source, segments[1][key]

    def _both(self, name: str) -> tuple[PackedFile, PackedFile]:
        there = self.files.get(name, {})
        for language in (self.source, self.target):
            if language not in there:
                wanted = f"train.tags.{self.pair}.{language}" if name == "train" else f"{name} in {language!r}"
                raise ValueError(
                    f"{self.origin}: expected {wanted}, found {', '.join(sorted(self.files))}"
                    f"{' in the other language alone' if there else ''}; give the distribution with it"
                )
        return there[self.source], there[self.target]

    def _full_name(self, name: str) -> str:
        names = [full for full in self.sets if name in (full, full.partition(".")[2])]
        if len(names) != 1:
            raise ValueError(
                f"{self.origin}: expected the name of an evaluation set, got {name!r}, which is "
                f"{' and '.join(names) or 'none'}; there are {', '.join(self.sets) or 'none'}: name one of these"
            )
        return names[0]


def read_iwslt(path: str | Path, source: str, target: str, cache_dir: str | None = None) -> IwsltText:
    """Find a language pair in the official distribution, that of IWSLT'14, '15, '17 or another year of this form.

    Its files are called `train.tags.de-en.de` and `IWSLT14.TED.dev2010.de-en.de.xml`, say.

    Args:
        path: A folder, a .tgz or .zip, as published: one pair, several, or a year with an archive of each pair. Or the
            name of a data set on the Hub that has such archives, as `IWSLT/iwslt2017` beside its loading script.
        source: The language to translate from, `de`.
        target: The language to translate to, `en`.
        cache_dir: Where downloads are kept.

    Raises:
        ValueError: There is nothing of the pair, or of several years, or an archive is damaged.
    """
    if not Path(path).exists() and _NAME_ON_THE_HUB.fullmatch(str(path)) and not str(path).endswith(ARCHIVES):
        archive = download_from_hub(str(path), lambda names: _archive_of(names, source, target), cache_dir)
        return read_iwslt(archive, source, target)
    for pair in (f"{source}-{target}", f"{target}-{source}"):
        files = _of_pair(path, pair, source, target)
        if files:
            break
    else:
        raise ValueError(
            f"{path}: expected train.tags.{source}-{target}.{source} or IWSLT….{source}-{target}.{source}.xml, found "
            f"neither, nor of {target}-{source}; give the folder or archive with these"
        )
    years = sorted({year for year, _ in files if year})
    if len(years) > 1:
        raise ValueError(
            f"{path}: expected the distribution of one year, got those of {', '.join(years)}; give one of them"
        )
    return IwsltText(
        source, target, pair, years[0] if years else None, str(path), {name: both for (_, name), both in files.items()}
    )


def _of_pair(
    path: str | Path, pair: str, source: str, target: str
) -> dict[tuple[str | None, str], dict[str, PackedFile]]:
    """Return the files of each language, by year and set; the training files are of no year."""
    languages = f"(?P<language>{re.escape(source)}|{re.escape(target)})"
    training = re.compile(rf"train\.tags\.{re.escape(pair)}\.{languages}")
    evaluation = re.compile(
        rf"IWSLT(?P<year>\d\d)\.(?P<name>[A-Za-z]+\.(?:dev|tst)\d{{4}}(?:\.\w+)?)\.{re.escape(pair)}\.{languages}\.xml"
    )
    found: dict[tuple[str | None, str], dict[str, PackedFile]] = {}
    named = files_named(
        path,
        lambda name: bool(training.fullmatch(name) or evaluation.fullmatch(name)),
        lambda name: _has_pair(name, source, target),
    )
    for name, file in sorted(named.items()):
        match = evaluation.fullmatch(name)
        key = (match["year"], match["name"]) if match else (None, "train")
        found.setdefault(key, {})[name.removesuffix(".xml").rpartition(".")[2]] = file
    return found


def _has_pair(name: str, source: str, target: str) -> bool:
    """Return whether an archive is called after both languages: `de-en.tgz`, `DeEnItNlRo-DeEnItNlRo.zip`."""
    stem = name.split(".")[0].lower()
    codes = {half[start : start + 2] for half in stem.split("-") for start in range(0, len(half), 2)}
    return stem in (f"{source}-{target}", f"{target}-{source}") or {source, target} <= codes


def _archive_of(names: Sequence[str], source: str, target: str) -> str:
    """Return which of the files is the archive of the pair: its own, that of the other direction, one of several."""
    archives = [name for name in names if name.endswith(ARCHIVES)]
    stems = {PurePosixPath(name).name.split(".")[0]: name for name in archives}
    several = [stem for stem in stems if _has_pair(stem, source, target)]
    for stem in (f"{source}-{target}", f"{target}-{source}", *several):
        if stem in stems:
            return stems[stem]
    raise ValueError(
        f"expected an archive of {source}-{target}, found {', '.join(stems) or 'no archive'}; name other languages, "
        "or give a folder or archive of your own"
    )


def _order(name: str) -> tuple[bool, str, str]:
    what = name.split(".")[1]
    return not what.startswith("dev"), what, name


@dataclass
class _Talk:
    """A talk of a training file: the number it is known by, its first line, and number, kind and text of each line."""

    start: int
    number: str = "unknown"
    lines: list[tuple[int, str, str]] = field(default_factory=list)
    ended: bool = False

    @property
    def counts(self) -> str:
        titles = sum(kind in _TITLES for _, kind, _ in self.lines)
        return f"{len(self.lines) - titles:,} lines and {titles} titles and descriptions"


_NO_TALK = _Talk(0, "none")


def _talks(file: PackedFile) -> Iterator[_Talk]:
    """Yield the talks of a training file. One begins with the first tag of its head."""
    talk = None
    for number, line in enumerate(decoded_lines(file.lines(), file.place), start=1):
        text = line.strip()
        match = _TAG.match(text)
        tag = match[1] if match else None
        if talk is None or (tag in _BEFORE and talk.ended):
            if talk is not None:
                yield talk
            talk = _Talk(number)
        if tag is None:
            talk.lines.append((number, _TEXT, text))
            talk.ended = True
        elif tag in _AFTER:
            talk.ended = True
        elif tag == "talkid":
            talk.number = _inside(text, tag, file, number)
        elif tag in _TITLES:
            talk.lines.append((number, tag, _inside(text, tag, file, number)))
    if talk is not None:
        yield talk


def _inside(text: str, tag: str, file: PackedFile, number: int) -> str:
    if not text.endswith(f"</{tag}>"):
        raise ValueError(
            f"{file.place}, line {number:,}: expected </{tag}> at the end of the line that begins with <{tag}>, got "
            f"{text[-40:]!r}; mend the file, or fetch it again"
        )
    return text.removesuffix(f"</{tag}>").partition(">")[2].strip()


def _segments(file: PackedFile) -> dict[tuple[str, int], str]:
    """Return the segments of an evaluation set by document and number."""
    found: dict[tuple[str, int], str] = {}
    document, documents, open_since = "none", 0, None
    for number, line in enumerate(decoded_lines(file.lines(), file.place), start=1):
        text = line.strip()
        if match := _DOCUMENT.match(text):
            documents += 1
            document, open_since = match[1] or str(documents), number
        elif text.lower().startswith("</doc>"):
            open_since = None
        elif "<seg" in text:
            match = _SEGMENT.fullmatch(text)
            if match is None:
                raise ValueError(
                    f'{file.place}, line {number:,}: expected <seg id="…"> and its </seg> alone in one line, got '
                    f"{text[:60]!r}; mend the file, or fetch it again"
                )
            key = (document, int(match[1]))
            if key in found:
                raise ValueError(
                    f"{file.place}, line {number:,}: expected each segment once, got number {key[1]} of document "
                    f"{document} again; mend the file, or fetch it again"
                )
            found[key] = match[2].strip()
    if open_since is not None:
        raise ValueError(
            f"{file.place}: expected </doc> after the document of line {open_since:,}, got the end of the file; it is "
            "cut: fetch it again"
        )
    if not found:
        raise ValueError(f"{file.place}: expected segments, found none; is it an evaluation set?")
    return found
