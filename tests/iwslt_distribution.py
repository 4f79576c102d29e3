"""IWSLT's official distribution, written small: tags, talks, numbered segments, archives within archives."""

from __future__ import annotations

import io
import tarfile
import zipfile
from html import escape

YEAR_14 = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")


def talk(number, lines, title="A title", description="A description", *, documents=False):
    """A talk of a training file; since 2015 between <doc> and </doc>."""
    head = [
        *([f'<doc docid="{number}" genre="lectures">'] if documents else []),
        f"<url>http://www.ted.com/talks/{number}</url>",
        "<keywords>talks, TED</keywords>",
        *([f"<speaker>Speaker {number}</speaker>"] if documents else []),
        f"<talkid>{number}</talkid>",
        f"<title>{title}</title>",
        f"<description>{description}</description>",
    ]
    tail = ['<reviewer href="http://www.ted.com/profiles/1">R</reviewer>', "<translator>T</translator>", "</doc>"]
    return "".join(f"{line}\n" for line in [*head, *(f" {line} " for line in lines), *(tail if documents else [])])


def segments(lines, language, *, target=False, document="535"):
    """An evaluation set of one document."""
    kind = "refset" if target else "srcset"
    numbered = [f'<seg id="{number}"> {escape(line, quote=False)} </seg>' for number, line in enumerate(lines, 1)]
    return "".join(
        f"{line}\n"
        for line in [
            '<?xml version="1.0" encoding="UTF-8"?>',
            "<mteval>",
            f'<{kind} setid="iwslt2014-dev2010" srclang="{language}">',
            f'<doc docid="{document}" genre="lectures">',
            "<keywords>talks</keywords>",
            "<talkid>535</talkid>",
            "<title>A title</title>",
            *numbered,
            "</doc>",
            f"</{kind}>",
            "</mteval>",
        ]
    )


def distribution(pair="de-en", year=14, sets=YEAR_14, *, documents=False, train=None, evaluation=None):
    """The files by name: two talks of three and two lines, and two segments a set, unless given."""
    files = {}
    for side, language in enumerate(pair.split("-")):
        short = [[f"{language} & line {number}.{line}" for line in range(3 - number)] for number in (0, 1)]
        lines = train[side] if train else short
        files[f"train.tags.{pair}.{language}"] = "".join(
            talk(
                number,
                [escape(line, quote=False) for line in of_talk],
                f"{language} title {number}",
                f"{language} described {number}",
                documents=documents,
            )
            for number, of_talk in enumerate(lines, start=1)
        )
        for name in sets:
            content = evaluation[name][side] if evaluation else [f"{language} & {name} {row}" for row in (1, 2)]
            files[f"IWSLT{year}.{name}.{pair}.{language}.xml"] = segments(content, language, target=side == 1)
    return {name: content.encode() for name, content in files.items()}


def in_folder(files, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def tar(files, within="de-en", mode="w:gz"):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, content in {"README": b"read me", **files}.items():
            entry = tarfile.TarInfo(f"{within}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def zipped(files, within="de-en"):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{within}/", b"")
        for name, content in files.items():
            archive.writestr(f"{within}/{name}", content)
    return packed.getvalue()
