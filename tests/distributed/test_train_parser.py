"""The example that parses, as a program on two ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from example_program import TRAINS_AND_MEASURES

pytestmark = pytest.mark.slow  # ranks are processes of their own

HEADS = ([2, 0, 2], [0, 1], [2, 3, 0, 3], [3, 3, 0], [0, 1, 2])


def sentence(heads: list[int]) -> str:
    cells = [f"{place}\tw{place}\t_\tX\tT\t_\t{head}\tr\t_\t_\n" for place, head in enumerate(heads, 1)]
    return "".join(cells)


def measured(folder: str) -> list[dict[str, tuple[float, ...]]]:
    """Return what the program finds of a new parser, as it is and corrupted."""
    import train_parser

    from hf_parcor import EvaluationRecord

    settings = {
        **TRAINS_AND_MEASURES, "train_file": f"{folder}/trees.conllu", "validation_file": f"{folder}/trees.conllu",
        "output_dir": f"{folder}/out", "embedding_size": 4, "hidden_size": 8, "dropout": 0.0,
        "learning_rate": 1e-9, "max_steps": 1, "per_device_eval_batch_size": 3, "parse_batch_size": 2,
    }  # fmt: skip
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    sys.argv = ["train_parser.py", *flags, "--corruptions", "gradient=50", "gaussian=2"]
    train_parser.main()
    record = EvaluationRecord.load(f"{folder}/out/robustness.json")
    return [dict(row.metrics) for row in record.rows()]


def test_ranks_share_sentences_and_gradients(run_on_ranks, tmp_path: Path):
    (tmp_path / "trees.conllu").write_text("\n".join(map(sentence, HEADS)) + "\n", encoding="utf-8")
    (alone,) = run_on_ranks(measured, 1, str(tmp_path))
    assert len({row["uas"] for row in alone}) > 1
    first, _ = run_on_ranks(measured, 2, str(tmp_path), timeout=120.0)
    assert first == alone
