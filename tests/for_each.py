"""A table of cases as one test."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import transformers

Test = Callable[..., None]


def for_each(names: str | Sequence[str], values: Iterable[Any]) -> Callable[[Test], Test]:
    """Run a test for every row of a table, and name each row that fails.

    It is written as `pytest.mark.parametrize` is, tables multiply as there, and all is collected as one test: for rows
    that take milliseconds. Every row begins with the same seeds, an empty `tmp_path` and nothing in `caplog`, and what
    it patches with `monkeypatch` ends with it. Other fixtures are set up once, and must not keep what a row did.
    """
    columns = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    table = [dict(zip(columns, (row,) if len(columns) == 1 else row, strict=True)) for row in values]
    assert table, "a table without rows tests nothing"

    def decorate(test: Test) -> Test:
        test, below = getattr(test, "for_each", (test, [{}]))
        rows = [{**row, **inner} for row in table for inner in below]

        def run(*args: Any, subtests: pytest.Subtests, **fixtures: Any) -> None:
            for place, row in enumerate(rows):
                transformers.set_seed(0)
                with subtests.test(**row), pytest.MonkeyPatch.context() as patches:
                    test(*args, **_of_row(place, fixtures, patches), **row)

        left = [parameter for name, parameter in inspect.signature(test).parameters.items() if name not in rows[0]]
        subtests = inspect.Parameter("subtests", inspect.Parameter.KEYWORD_ONLY)
        run.__signature__ = inspect.Signature([*left, subtests])
        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        run.__dict__.update(test.__dict__)  # marks
        run.for_each = (test, rows)
        return run

    return decorate


def _of_row(place: int, fixtures: dict[str, Any], patches: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the fixtures, such that those of pytest keep nothing of an earlier row."""
    own: dict[str, Any] = {}
    if "monkeypatch" in fixtures:
        own["monkeypatch"] = patches
    if "tmp_path" in fixtures:
        own["tmp_path"] = fixtures["tmp_path"] / f"row-{place}"
        own["tmp_path"].mkdir()
    if "caplog" in fixtures:
        fixtures["caplog"].clear()
    return {**fixtures, **own}
