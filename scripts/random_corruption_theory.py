"""Paper 1, Table 3, on a small language model: how much do random corruptions change the loss, and does theory say so?

    python scripts/random_corruption_theory.py --data FOLDER

FOLDER holds `ptb.train.txt` and `ptb.valid.txt` (or `.gz`), a sentence a line. A GPT-2 of two layers learns it word by
word; over fixed validation text the gradient g of the mean loss is taken in float64, with G = ‖g‖₂. Then

- `--draws` random directions r ~ N(0, I), drawn in float32: the first-order loss change aᵀg of a = ε r/‖r‖₂, which is
  ε G cos(r, g), against Theorem 1: quantiles with 95 % intervals from order statistics, probabilities, and
  a Kolmogorov–Smirnov test;
- for each ε, `--changes` random corruptions and the change of the loss that forward passes find, in float64 and in
  float32, beside Hutchinson's estimate of the mean.

The output folder gets `record.json` and `table.md`.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from theorem_1.comparison import measure
from theorem_1.language_model import rows_of, trained_model, words_of
from theorem_1.table import table
from transformers import set_seed

from hf_parcor.evaluation.identity import library_versions
from hf_parcor.records.stored import replace_text, to_strict_json


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, str]:
    """Return the options, and the command that has them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with ptb.train.txt and ptb.valid.txt, or .gz of them")
    add("--output", type=Path, default=Path("scripts/results/random_corruption"), help="folder for what is found")
    add("--words", type=int, default=10_000, help="size of the vocabulary")
    add("--layers", type=int, default=2, help="layers of the model")
    add("--width", type=int, default=64, help="its hidden size")
    add("--length", type=int, default=64, help="words a row")
    add("--batch", type=int, default=16, help="rows a batch")
    add("--steps", type=int, default=300, help="steps of training")
    add("--learning-rate", type=float, default=3e-3, help="its largest")
    add("--rows", type=int, default=32, help="rows of validation text that the loss is over")
    add("--draws", type=int, default=10_000, help="random corruptions to first order")
    add("--changes", type=int, default=100, help="random corruptions by forward passes, for each ε and precision")
    add("--epsilons", type=float, nargs="+", default=[5e-4, 5e-2, 5.0], help="radii, the first for the first order")
    add("--probes", type=int, default=16, help="Hessian-vector products for the trace")
    add("--seed", type=int, default=0)
    add("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    command = "python scripts/random_corruption_theory.py --data FOLDER"
    for name, value in vars(options).items():
        if name not in ("data", "output", "quiet") and value != parser.get_default(name):
            values = value if isinstance(value, list) else [value]
            command += f" --{name.replace('_', '-')} {' '.join(map(str, values))}"
    return options, command


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, draw, measure, write."""
    options, command = parse(arguments)
    set_seed(options.seed)
    texts = {part: words_of(options.data, part) for part in ("train", "valid")}
    vocabulary = {word: number for number, (word, _) in enumerate(Counter(texts["train"]).most_common(options.words))}
    rows = rows_of(texts["valid"], vocabulary, options.length)[: options.rows]
    started = time.monotonic()
    model = trained_model(rows_of(texts["train"], vocabulary, options.length), len(vocabulary), options)
    trained = time.monotonic()
    found = measure(model, rows, options)
    settings = {name: value for name, value in vars(options).items() if name not in ("data", "output", "quiet")}
    record = {
        "command": command,
        "settings": settings,
        "tokens": len(rows) * (options.length - 1),
        "seconds": {"training": trained - started, "measuring": time.monotonic() - trained},
        **found,
        "versions": library_versions(),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    replace_text(options.output / "record.json", to_strict_json(record))
    text = table(record)
    replace_text(options.output / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
