"""Paper 2's Tables 1, 2, 3, 4 and 6 and Figure 3 for one translation data set, cell by cell.

    python scripts/reproduce_translation.py --study de-en --data FOLDER --output scripts/results/translation/de-en

FOLDER holds two files of lines for each split, `train.de` and `train.en`, say, also `.gz`, or a table for each,
`train.tsv.gz`. The studies `de-en` and `en-vi` are the papers' own (6 + 6 layers, for a GPU); `multi30k` and `tatoeba`
are small ones for a processor. `--tables 6` does that table alone. Models are trained by
`examples/train_translation.py`; what an arm shares with the plain one of its seed is trained once. Each run, record
and corruption within a record is kept, so an interrupted campaign goes on. The output folder gets records,
`runs.json`, `table.md`, and `figure-3.png`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from translation.campaign import Campaign
from translation.studies import STUDIES
from translation.tables import TABLES


def main() -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, choices=STUDIES)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the files of lines")
    parser.add_argument("--output", type=Path, required=True, help="the folder for records and tables")
    parser.add_argument("--work", type=Path, default=Path("runs/translation"), help="the folder for models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="only these, in this order")
    parser.add_argument("--test-sentences", type=int, help="measure on the first so many")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    campaign = Campaign(options)
    study = campaign.study
    sentences = "all test sentences" if options.test_sentences is None else f"{options.test_sentences} test sentences"
    text = [
        f"{study.title}: tokenised BLEU of {sentences}, beam 5, seeds {', '.join(map(str, options.seeds))}; "
        f"{study.epochs} epochs, defended from epoch {study.start_epoch} on, "
        f"mean of the last {study.average} checkpoints.\n"
    ]
    for table in options.tables:
        title = "Figure 3" if table == "figure-3" else f"Table {table}"
        text.append(f"## {title}\n\n{TABLES[table](campaign)}\n")
        (options.output / "table.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
