"""What a data set says of itself: its name on the Hub where it comes from there, and nothing of a file's loader."""

from __future__ import annotations

import pytest
from for_each import for_each

from hf_parcor.records.data import EvaluationData, evaluation_data_of, named_on_hub

datasets = pytest.importorskip("datasets", reason="data sets of the library `datasets` are what names are read from")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OF_HUB = f"hf://datasets/org/reviews@{COMMIT}/data/test.parquet"
UNNAMED = EvaluationData().name


@for_each(
    "info, split, expected",
    [
        ({}, None, EvaluationData(rows=2)),
        ({"dataset_name": "csv", "config_name": "default"}, "train", EvaluationData(split="train", rows=2)),
        # Files of one folder have a configuration with a hash of theirs.
        ({"dataset_name": "parquet", "config_name": "default-a1b2"}, None, EvaluationData(rows=2)),
        (
            {"dataset_name": "reviews", "config_name": "default"},
            "test[:2]",
            EvaluationData("reviews", split="test[:2]", rows=2),
        ),
        ({"dataset_name": "reviews", "config_name": "large"}, None, EvaluationData("reviews", config="large", rows=2)),
        (
            {
                "dataset_name": "parquet-reviews",
                "config_name": "large",
                "download_checksums": {"https://example.org/x": {}, OF_HUB: {}},
            },
            "test",
            EvaluationData("reviews", "org/reviews", config="large", split="test", revision=COMMIT, rows=2),
        ),
        ({"dataset_name": "reviews", "download_checksums": {"/data/x": {}}}, None, EvaluationData("reviews", rows=2)),
    ],
)
def test_what_a_data_set_says(info, split, expected) -> None:
    found = evaluation_data_of(
        datasets.Dataset.from_dict({"x": [1, 2]}, info=datasets.DatasetInfo(**info), split=split)
    )
    assert found == expected
    assert found.is_known


def test_a_file_is_named_by_whoever_knows_it(tmp_path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,0\nb,1\n")
    loaded = datasets.load_dataset(
        "csv", data_files=str(tmp_path / "rows.csv"), split="train[:1]", cache_dir=str(tmp_path / "cache")
    )
    assert evaluation_data_of(loaded) == EvaluationData(split="train[:1]", rows=1)
    assert evaluation_data_of(loaded).flags == {}, "no command line names it"


@for_each("other, rows", [([1, 2, 3], 3), (iter([1]), None), (None, None)])
def test_anything_else_says_how_many_rows_it_has(other, rows) -> None:
    found = evaluation_data_of(other)
    assert found == EvaluationData(rows=rows)
    assert found.is_known == (rows is not None)


def test_a_commit_is_that_of_its_own_name() -> None:
    known = EvaluationData("reviews", "org/reviews", split="test", revision=COMMIT)
    assert named_on_hub(known, "org/reviews") == known
    assert named_on_hub(known, "you/reviews") == EvaluationData("reviews", "you/reviews", split="test")


@for_each(
    "data, words",
    [
        (EvaluationData("reviews", "org/reviews"), "reviews (org/reviews)"),
        (EvaluationData("reviews", "reviews"), "reviews"),
        (EvaluationData("reviews", "", "large", "test", COMMIT, 1), "reviews, large, test, revision 0123456, 1 row"),
        (EvaluationData(rows=2_000), f"{UNNAMED}, 2,000 rows"),
    ],
)
def test_words(data, words) -> None:
    assert str(data) == words
