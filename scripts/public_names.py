"""Writes `hf_parcor/API.md`: every public name, the first sentence of its docstring, and its example.

    python -m scripts.public_names

A test compares the page with what this returns, and runs the examples as they stand there.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from doctest import DocTestParser
from pathlib import Path

import hf_parcor

PAGE = Path(hf_parcor.__file__).with_name("API.md")
HEAD = """# The public names

All that `from hf_parcor import ...` gives, by the part that defines it; other names may change in any release.
Arguments, defaults and errors are in the docstrings: `help(hf_parcor.SAM)`. `python -m scripts.public_names` makes
this page from them, and a test runs each example, after

```python
import math

import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_parcor import *
```
"""


def by_part() -> dict[str, list[str]]:
    """Return the public names by the part of the package that defines them, both in alphabetical order."""
    found: dict[str, list[str]] = {}
    for name in sorted(hf_parcor.__all__, key=str.lower):
        found.setdefault(getattr(hf_parcor, name).__module__.split(".")[1], []).append(name)
    return dict(sorted(found.items()))


def summary(documented: object) -> str:
    """Return the first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split())


def example(documented: object) -> str:
    """Return the doctest of a docstring as it stands there; "" if it has none."""
    text = inspect.getdoc(documented) or ""
    parts = DocTestParser().get_examples(text)
    if not parts:
        return ""
    lines = text.splitlines()
    last = parts[-1]
    end = last.lineno + len(last.source.splitlines()) + len(last.want.splitlines())
    shown = lines[parts[0].lineno : end]
    return inspect.cleandoc("\n" + "\n".join(shown))


def page() -> str:
    """Return the page."""

    def blocks() -> Iterator[str]:
        yield HEAD
        for part, names in by_part().items():
            yield f"## `hf_parcor.{part}`\n"
            for name in names:
                documented = getattr(hf_parcor, name)
                yield f"### `{name}`\n\n{summary(documented)}\n\n```pycon\n{example(documented)}\n```\n"

    return "\n".join(blocks())


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(
        prog="python -m scripts.public_names",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
