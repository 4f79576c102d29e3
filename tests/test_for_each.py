"""A table as one test: it runs what `parametrize` runs, and a row that fails hides no other."""

from __future__ import annotations

import inspect
import logging
from contextlib import contextmanager

import pytest
import torch
from for_each import for_each


class Reports:
    """What pytest's own `subtests` would report."""

    def __init__(self):
        self.ran, self.failed = [], []

    @contextmanager
    def test(self, **row):
        self.ran.append(row)
        try:
            yield
        except AssertionError:
            self.failed.append(row)


def test_tables_multiply_each_row_is_reported_and_begins_with_the_same_seed():
    reports, drawn = Reports(), []

    @for_each("a", [1, 2, 3])
    @for_each(("b", "c"), [(1, 2), (3, 4)])
    def test(fixture, a, b, c):
        drawn.append(float(torch.rand(())))
        assert a + b != 4, fixture

    assert list(inspect.signature(test).parameters) == ["fixture", "subtests"]
    test(fixture="given", subtests=reports)
    assert reports.ran == [{"a": a, "b": b, "c": c} for a in (1, 2, 3) for b, c in ((1, 2), (3, 4))]
    assert reports.failed == [{"a": 1, "b": 3, "c": 4}, {"a": 3, "b": 1, "c": 2}]
    assert len(set(drawn)) == 1


def test_a_folder_and_a_log_are_those_of_their_row(tmp_path, caplog):
    found = []

    @for_each("a", [1, 2])
    def test(tmp_path, caplog, a):
        found.append([*tmp_path.iterdir(), *caplog.messages])
        (tmp_path / "file").touch()
        logging.getLogger("ours").warning("row %s", a)

    test(tmp_path=tmp_path, caplog=caplog, subtests=Reports())
    assert found == [[], []]


def test_a_patch_is_that_of_its_row(monkeypatch):
    found = []

    @for_each("a", [1, 2])
    def test(monkeypatch, a):
        found.append(Reports.__doc__)
        monkeypatch.setattr(Reports, "__doc__", a)
        assert Reports.__doc__ == a

    before = Reports.__doc__
    test(monkeypatch=monkeypatch, subtests=Reports())
    assert found == [before, before]


def test_marks_stay_and_an_empty_table_is_refused():
    @for_each("a", [1])
    @pytest.mark.slow
    def test(a):
        pass

    assert [mark.name for mark in test.pytestmark] == ["slow"]
    with pytest.raises(AssertionError, match="without rows"):
        for_each("a", [])
