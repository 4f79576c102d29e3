"""Which radius to begin with, and when to start: a ViT, LoRA adapters, causal language models, a tuned translator.

    python -m scripts.usual_cases --case vit --data FOLDER --output scripts/results/usual_cases/vit --jobs 2
    python -m scripts.usual_cases --case lora --model MODEL --data FOLDER --output scripts/results/usual_cases/lora

FOLDER has the data sets of all cases, a folder each. `lora` begins with MODEL, a folder or a name on the Hub; other
cases that tune a model train that model here first, once for all seeds. Each arm is trained with each seed by the
library's examples and measured by them; the radii of K = 1 in L2 are four times as large each, the smallest about
0.0004 of the weights' norm, what the default is of a BERT's. Finished runs are kept, so an interrupted campaign goes
on. The output folder gets a record for each run, `runs.json`, and `table.md`: mean ± sample standard deviation over
seeds, with Student's t against the plain arm.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import ViTConfig, ViTForImageClassification, set_seed
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_parcor.records import EvaluationRecord
from hf_parcor.reports.tables import markdown_table
from hf_parcor.statistics import Alternative
from scripts.campaigns import (
    PLAIN,
    Arm,
    Run,
    begin,
    campaign_parser,
    finished,
    l2,
    marked,
    measured_once,
    of_run,
    of_study,
    over,
    over_runs,
    risk,
    run_example,
    write_table,
)

EXAMPLES = Path(__file__).parents[1] / "examples"


def defended(epsilon: float, start: float = 0.0) -> Arm:
    """Return K = 1 with a radius, from an epoch on."""
    late = ["--defense_start_epoch", f"{start:g}"] if start else []
    label = f"ε = {epsilon:g}" + (f", from epoch {start:g} on" if start else "")
    return Arm(label, l2("multi_step_risk", epsilon, "--defense_steps", "1", *late))


@dataclass(frozen=True)
class Case:
    """A usual way to train.

    Args:
        says: What the page calls it.
        example: What trains it.
        settings: Flags of every run; those that end with `_file` are paths in the data folder.
        arms: The ways to train, by name; the first is the plain one.
        corruptions: The rows, as words of `--corruptions`.
        metric: What the rows show.
        begins_with: Flags of the example that train what is tuned; none where it begins otherwise.
    """

    says: str
    example: str
    settings: Mapping[str, Any]
    arms: Mapping[str, Arm]
    corruptions: Sequence[str]
    metric: str
    begins_with: Mapping[str, Any] = field(default_factory=dict)


def radii(*epsilons: float, late: float | None = None) -> dict[str, Arm]:
    """Return the plain arm, and K = 1 with each radius; if `late`, from that epoch on, and the second from 0 too."""
    found = {"plain": PLAIN}
    for place, epsilon in enumerate(epsilons, 1):
        found[f"radius-{place}"] = defended(epsilon, late or 0.0)
    if late is not None:
        found["from-0"] = defended(epsilons[1])
    return found


def corruptions(*epsilons: float) -> list[str]:
    """Return words for the corruptions along the gradient with these radii, noise, and 4 bits."""
    return [*(f"gradient={epsilon:g}" for epsilon in epsilons), "gaussian=0.02", "quantization=4"]


BASE_4_BITS = Arm(
    "half 4 bits of the merged base",
    [*risk(0.5, "quantization=4"), "--defense_target_modules", "base_layer", "--defense_merge_adapters", "true"],
)
DECODER = (
    "hidden_size=128,intermediate_size=352,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=4,"
    "tie_word_embeddings=true,max_position_embeddings=64"
)
LANGUAGE_MODEL = {"block_size": 64, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 32}
NEW_DECODER = {
    **LANGUAGE_MODEL,
    "model_type": "llama",
    "config_overrides": DECODER,
    "train_file": "ptb_lm/ptb.train.txt.gz",
    "num_train_epochs": 3,
    "learning_rate": 3e-3,
    "warmup_steps": 20,
}
TRANSLATOR = {
    "source_lang": "de",
    "target_lang": "en",
    "max_length": 128,
    "per_device_eval_batch_size": 32,
    "label_smoothing_factor": 0.1,
    "adam_beta2": 0.98,
}
IMAGES = {"image_size": 32, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 100}

CASES = {
    "vit": Case(
        "a small ViT of CIFAR-10, fine-tuned on 20 classes of Tiny-ImageNet, 10,000 images, 3 epochs",
        "train_image_classifier",
        {
            **IMAGES,
            "train_file": "tiny_imagenet20/tiny_imagenet20_train.npz",
            "validation_file": "tiny_imagenet20/tiny_imagenet20_val.npz",
            "max_eval_samples": 1000,
            "num_train_epochs": 3,
            "learning_rate": 5e-4,
            "warmup_steps": 10,
        },
        radii(0.015, 0.06, 0.24),
        corruptions(0.05, 0.1, 0.2),
        "accuracy",
        begins_with={
            **IMAGES,
            "train_file": "cifar10/cifar10_train_jpeg.npz",
            "max_train_samples": 20_000,
            "num_train_epochs": 10,
            "learning_rate": 1e-3,
            "warmup_steps": 100,
            "lr_scheduler_type": "cosine",
        },
    ),
    "lora": Case(
        "LoRA adapters of rank 8 on all linear layers of a small BERT, 2,048 sentences of SST-2, 1 epoch",
        "train_sst2",
        {
            "train_file": "sst2/train_sentences.tsv.gz",
            "validation_file": "sst2/dev.tsv.gz",
            "max_train_samples": 2048,
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 64,
            "learning_rate": 2e-3,
            "num_train_epochs": 1,
            "lora_rank": 8,
        },
        {**radii(0.004, 0.016, 0.064), "base-4-bits": BASE_4_BITS},
        corruptions(0.05, 0.1, 0.2),
        "accuracy",
    ),
    "causal-lm": Case(
        "a small Llama from scratch on 153,600 words of the Penn Treebank, 3 epochs",
        "train_language_model",
        {
            **NEW_DECODER,
            "validation_file": "ptb_lm/ptb.valid.txt.gz",
            "max_train_tokens": 153_600,
            "max_eval_tokens": 12_800,
        },
        radii(0.05, 0.2, 0.8, late=1.0),
        corruptions(0.5, 1, 2),
        "loss",
    ),
    "causal-lm-tuned": Case(
        "a small Llama of the Penn Treebank, fine-tuned on 6,920 sentences of film reviews, 2 epochs",
        "train_language_model",
        {
            **LANGUAGE_MODEL,
            "train_file": "sst2/train_sentences.tsv.gz",
            "validation_file": "sst2/dev.tsv.gz",
            "text_column_name": "sentence",
            "max_eval_tokens": 12_800,
            "num_train_epochs": 2,
            "learning_rate": 5e-4,
            "warmup_steps": 20,
        },
        radii(0.05, 0.2, 0.8),
        corruptions(0.5, 1, 2),
        "loss",
        begins_with={**NEW_DECODER, "max_train_tokens": 460_800},
    ),
    "seq2seq-tuned": Case(
        "a small translation model of Tatoeba, De-En, fine-tuned on 14,500 captions of Multi30k, 2 epochs",
        "train_translation",
        {
            **TRANSLATOR,
            "max_tokens": 1024,
            "train_source_file": "multi30k_ende/train.de.gz",
            "train_target_file": "multi30k_ende/train.en.gz",
            "validation_source_file": "multi30k_ende/val.de.gz",
            "validation_target_file": "multi30k_ende/val.en.gz",
            "max_train_samples": 14_500,
            "max_eval_samples": 300,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "warmup_steps": 20,
            "generation_num_beams": 1,
        },
        radii(0.04, 0.16, 0.64),
        corruptions(0.5, 1, 2),
        "bleu",
        begins_with={
            **TRANSLATOR,
            "max_tokens": 2048,
            "train_file": "tatoeba_ende/train.tsv.gz",
            "max_train_samples": 100_000,
            "vocabulary_size": 4_000,
            "config_overrides": "encoder_layers=2,decoder_layers=2,d_model=128,encoder_ffn_dim=256,"
            "decoder_ffn_dim=256,dropout=0.1,attention_dropout=0.0,activation_dropout=0.0,max_position_embeddings=256",
            "num_train_epochs": 4,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "inverse_sqrt",
            "warmup_steps": 400,
        },
    ),
}


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    names = list(dict.fromkeys(name for case in CASES.values() for name in case.arms))
    parser = campaign_parser(__doc__, names, "runs/usual_cases", "the data sets, a folder each")
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--model", help="of lora: a folder or a name on the Hub")
    options = begin(parser)
    options.work = of_study(options.work, options.case, options.model)
    options.tunes = threading.Lock()
    if options.case == "lora" and options.model is None:
        parser.error("--model: expected what --case lora begins with, got nothing; see --help")
    return options


def in_folder(data: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the paths of files."""
    return {flag: data / value if flag.endswith("_file") else value for flag, value in settings.items()}


def new_vit(folder: Path) -> Path:
    """Save a small ViT with random weights, and its image processor."""
    set_seed(0)
    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=32,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 10
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def what_is_tuned(options: argparse.Namespace, case: Case) -> str | None:
    """Return the model that runs begin with, trained unless it is there already; None where they begin with none."""
    if not case.begins_with:
        model: str | None = options.model
        return model
    folder: Path = options.work / "begins-with"
    with options.tunes:  # runs side by side wait for it
        if not (folder / "train_results.json").exists():
            settings = {
                **in_folder(options.data, case.begins_with),
                "seed": 0,
                "output_dir": folder,
                "save_strategy": "no",
                "report_to": "none",
                "logging_steps": 50,
            }
            if options.case == "vit":
                settings["model_name_or_path"] = new_vit(options.work / "new")
            program = [EXAMPLES / f"{case.example}.py"]
            run_example(program, settings, "--do_train", "--defense", "none", threads=options.threads)
    return str(folder)


def measure(options: argparse.Namespace, run: Run) -> EvaluationRecord:
    """Train and measure one model, unless its record is there already."""
    case = CASES[options.case]

    def example(folder: Path) -> None:
        begins_with = what_is_tuned(options, case)
        settings = {
            **in_folder(options.data, case.settings),
            **({} if begins_with is None else {"model_name_or_path": begins_with}),
            **of_run(run, folder),
            "save_strategy": "no",
            "logging_steps": 10,
        }
        flags = ["--do_train", "--do_eval", *run.arm.flags, "--corruptions", *case.corruptions]
        run_example([EXAMPLES / f"{case.example}.py"], settings, *flags, threads=options.threads)

    return measured_once(options, run, example)


def page(options: argparse.Namespace, records: Mapping[str, Sequence[EvaluationRecord]]) -> str:
    """Return the table of a case, a row for each corruption and a column for each arm."""
    case = CASES[options.case]
    metric, of_loss, per_cent = case.metric, case.metric == "loss", case.metric == "accuracy"
    better, digits = (Alternative.LESS, 3) if of_loss else (Alternative.GREATER, 1)
    rows = []
    for place, row in enumerate(records["plain"][0].rows()):
        values = {
            name: [(100 if per_cent else 1) * record.rows()[place].mean(metric) for record in of_arm]
            for name, of_arm in records.items()
        }
        rows.append([row.label, *(marked(of_arm, values["plain"], digits, better) for of_arm in values.values())])
    head = [f"{metric}{' (%)' if per_cent else ''}", *(case.arms[name].label for name in records)]
    return "\n".join(
        [
            f"# {case.says[0].upper()}{case.says[1:]}\n",
            f"{over(options.seeds)}. Each ε is of K = 1 in L2.\n",
            markdown_table(head, rows),
            "",
        ]
    )


def main() -> None:
    """Run what is missing, and write the table."""
    options = parse_options()
    case = CASES[options.case]
    over_runs(measure, "runs", options, {name: case.arms[name] for name in options.arms or case.arms})
    found = over_runs(measure, "records", options, finished(options, case.arms))
    if "plain" in found:  # there is something to compare with
        write_table(options.output, page(options, found))


if __name__ == "__main__":
    main()
