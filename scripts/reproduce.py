"""Run a whole campaign of this repository: one command for each, as small as minutes or as large as the papers'.

    python -m scripts.reproduce --list
    python -m scripts.reproduce sst2 --size small --model MODEL --data FOLDER --jobs 2
    python -m scripts.reproduce sst2 --size full --model MODEL --data FOLDER --jobs 12 --hours 0.5

Arms and seeds run side by side, a process each; what is finished is kept, so the same command goes on after an
interruption. Records, `runs.json` (how each run was trained, how long, on which machine) and `table.md` with its
tests go to `--output`, by default a folder under `runs`, and the end says where the records of this repository
lie, to compare with. `--hours` plans by what the kept runs took: it starts the arms that fit, in their order, and
says which do not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Study:
    """One campaign at one size.

    Args:
        says: What it shows.
        command: The module in `scripts` that runs it, and the flags that make it this study.
        records: The folder of its records in `scripts/results`; "" where none is kept yet.
        model: The flag of the campaign that takes `--model`; "" where it needs none.
        arms: Those of the records, in their order, where they are not all that the campaign has.
        seeds: Those of the records, where there is a choice.
        side_by_side: Whether it takes `--jobs`.
    """

    says: str
    command: str
    records: str
    model: str = ""
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (1, 2, 3)
    side_by_side: bool = True

    def words(self) -> list[str]:
        """Return what Python runs."""
        name, *flags = self.command.split()
        return ["-m", f"scripts.{name}", *flags]

    def call(self, model: str, data: str, arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """Return what Python runs, with what it is given."""
        return [
            *self.words(),
            *([self.model, model] if self.model else []),
            *("--data", data),
            *(["--arms", *arms] if arms else []),
            *(["--seeds", *map(str, seeds)] if seeds else []),
        ]

    def line(self) -> str:
        """Return the command that made the records, with placeholders, to be read."""
        return " ".join(["python", *self.call("MODEL", "FOLDER", self.arms, self.seeds)])


DEPLOYED = ("plain", "half-4-bits", "worst-and-4-bits", "half-4-bits-channel", "torchao")
STUDIES: dict[str, dict[str, Study]] = {
    "sst2": {
        "small": Study("every defense, on 2,048 sentences", "reproduce_sst2", "sst2", model="--model"),
        "full": Study(
            "for what will happen to the weights, on all 67,349 sentences",
            "deploy_sst2 --size full",
            "sst2_full",
            model="--model",
            arms=DEPLOYED,
        ),
    },
    "sst2-first": {
        "full": Study(
            "K = 1 and SAM, on all 67,349 sentences, at an earlier commit",
            "deploy_sst2 --size full",
            "sst2_first",
            model="--model",
            arms=("plain", "multi_step_risk-1", "sam-half"),
        ),
    },
    "sst2-alone": {
        "full": Study(
            "all of the loss at corrupted weights, on all 67,349 sentences",
            "deploy_sst2 --size full",
            "sst2_alone",
            model="--model",
            arms=("4-bits", "noise"),
            seeds=(0,),
        ),
    },
    "sst2-deployed": {
        "small": Study(
            "for what will happen to the weights, on 2,048 sentences",
            "deploy_sst2",
            "sst2_deployed",
            model="--model",
        ),
    },
    "sst2-formats": {
        "small": Study(
            "the same models in more formats",
            "deploy_sst2 --measured formats",
            "sst2_formats",
            model="--model",
            arms=("plain", "half-4-bits", "worst-and-4-bits", "half-4-bits-channel", "multi_step_risk-1", "sam-half"),
        ),
    },
    "sst2-pruned": {
        "small": Study(
            "pruned, and trained for it, on 2,048 sentences",
            "deploy_sst2 --measured pruning",
            "sst2_pruned",
            model="--model",
        ),
    },
    "embeddings": {
        "small": Study(
            "an embedding model, plain, defended and for 2 bits", "defend_embeddings", "embeddings", model="--model"
        )
    },
    "cheaper": {"small": Study("defenses cheaper than a pass", "defend_for_less", "less", model="--model")},
    "probes": {"small": Study("which part of a BERT is weak", "probe_sst2", "probes", model="--model", seeds=(1,))},
    "flips": {"small": Study("the worst bit flips", "worst_bit_flips", "worst_bit_flips", model="--model")},
    "radius": {
        "small": Study(
            "what a growing ε does without corruption",
            "radius_sst2",
            "radius",
            model="--model",
            seeds=(1, 2, 3, 4, 5),
        )
    },
    "search": {
        "small": Study(
            "which ε",
            "search_epsilon_sst2",
            "search_epsilon",
            model="--model",
            seeds=(1,),
            side_by_side=False,
        ),
    },
    "recipe": {
        "small": Study(
            "which layer, which bits",
            "which_bits --system sst2",
            "recipe/sst2",
            model="--model",
            seeds=(1,),
            side_by_side=False,
        )
    },
    "recipe-images": {
        "small": Study(
            "which part of a ResNet-20, which bits",
            "which_bits --system images",
            "recipe/images",
            model="--model",
            seeds=(),
            side_by_side=False,
        )
    },
    "recipe-translation": {
        "small": Study(
            "which part of a translation model, which bits",
            "which_bits --system translation",
            "recipe/translation",
            seeds=(1,),
            side_by_side=False,
        )
    },
    "recipe-decoder": {
        "small": Study(
            "which part of a pretrained GPT-2, which bits",
            "which_bits --system decoder",
            "recipe/decoder",
            seeds=(1,),
            side_by_side=False,
        )
    },
    "recipe-embeddings": {
        "small": Study(
            "which part of all-MiniLM-L6-v2, which bits",
            "which_bits --system embeddings",
            "recipe/embeddings",
            model="--model",
            seeds=(),
            side_by_side=False,
        )
    },
    "gptq": {
        "small": Study(
            "what GPTQ made of all-MiniLM-L6-v2, layer by layer",
            "layers_of_gptq",
            "gptq",
            model="--model",
            seeds=(),
            side_by_side=False,
        )
    },
    "speech": {
        "small": Study(
            "a speech recognizer, plain, defended and for 4 bits", "defend_speech", "speech", model="--model"
        )
    },
    "images": {
        "small": Study(
            "paper 1 on four trained ResNets, 2,000 test images",
            "reproduce_paper_1 --lossless-images 1000 --test-images 2000 --probe-images 500",
            "paper_1",
            model="--weights",
            seeds=(),
            side_by_side=False,
        ),
        "full": Study(
            "paper 1 on four trained ResNets, all images",
            "reproduce_paper_1",
            "",
            model="--weights",
            seeds=(),
            side_by_side=False,
        ),
    },
    "images-trained": {
        "small": Study(
            "a ResNet-20 of CIFAR-10, fine-tuned and from scratch",
            "reproduce_images",
            "images",
            model="--weights",
        ),
        "full": Study("ResNet-34 of CIFAR-10, 200 epochs", "reproduce_images --size full", ""),
    },
    "tiny-imagenet": {
        "small": Study(
            "a ResNet-20 of 20 classes of Tiny-ImageNet, at 32 pixels",
            "reproduce_images --size tiny-imagenet-small",
            "tiny_imagenet",
            arms=("plain", "acrt-inf", "multi_step_risk-1"),
        ),
        "full": Study("ResNet-34 of the same, at 64 pixels, 200 epochs", "reproduce_images --size tiny-imagenet", ""),
    },
    "parser": {
        "small": Study("paper 1's parser, on 2,000 sentences", "reproduce_parser", "parser"),
        "full": Study(
            "paper 1's parser, on all of English EWT",
            "reproduce_parser --train-sentences 12544 --dev-sentences 2001",
            "",
        ),
    },
    "detection": {
        "small": Study(
            "paper 2's detector with a small backbone, on 205 images of blood cells",
            "reproduce_detection",
            "detection",
        ),
        "full": Study("paper 2's detector, with a ResNet-50 at 640 pixels", "reproduce_detection --size full", ""),
    },
    "language-model": {
        "small": Study("paper 1's language model, a smaller one", "reproduce_language_model", "language_model"),
        "full": Study("paper 1's language model, at its size", "reproduce_language_model --size full", ""),
    },
    "quantization-while-training": {
        "small": Study(
            "a decoder quantized at every checkpoint, and which one to take",
            "quantization_while_training",
            "quantization_while_training",
        ),
    },
    **{
        f"usual-{case}": {
            "small": Study(
                f"with which radius to begin: {says}",
                f"usual_cases --case {case}",
                f"usual_cases/{case}",
                model="--model" if case == "lora" else "",
            )
        }
        for case, says in {
            "vit": "a ViT, fine-tuned",
            "lora": "LoRA adapters",
            "causal-lm": "a decoder from scratch",
            "causal-lm-tuned": "a decoder, fine-tuned",
            "seq2seq-tuned": "a translation model, fine-tuned",
        }.items()
    },
    "translation": {
        "small": Study(
            "paper 2's Table 6 and Figure 3, on Multi30k",
            "reproduce_translation --study multi30k --tables 6 figure-3 --test-sentences 500",
            "translation/multi30k",
            side_by_side=False,
        ),
        "full": Study("paper 2's tables, at its size", "reproduce_translation --study de-en", "", side_by_side=False),
    },
    "translation-start": {
        "small": Study(
            "an earlier start of the defense, on Multi30k",
            "reproduce_translation --study multi30k --tables starts --test-sentences 500",
            "translation/starts",
            seeds=(1, 2, 3),
            side_by_side=False,
        ),
    },
    "translation-short": {
        "small": Study(
            "the same on Tatoeba, one seed",
            "reproduce_translation --study tatoeba --tables 6 figure-3 --test-sentences 500",
            "translation/tatoeba",
            seeds=(1,),
            side_by_side=False,
        ),
    },
    "large-decoders": {
        "small": Study(
            "what the commands take on a decoder of 1.1 B weights, on a CPU",
            "large_decoders --rows 2",
            "large_decoders",
            seeds=(),
            side_by_side=False,
        ),
    },
    "theory": {
        "small": Study(
            "random corruptions against Theorem 1",
            "random_corruption_theory --width 32 --steps 100 --rows 16 --changes 20 --probes 8",
            "random_corruption",
            seeds=(),
            side_by_side=False,
        ),
    },
}


def seconds_of(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return how long a run of each arm took, on average over seeds; with its evaluation where that was kept, too."""
    found: dict[str, list[float]] = {}
    for name, run in runs.items():
        taken = run.get("seconds") or run["train_seconds"]
        if taken is not None:  # some runs shared their machine, and were not timed
            found.setdefault(name.rpartition("-seed")[0], []).append(taken)
    return {arm: fmean(values) for arm, values in found.items()}


def seconds_of_arms(seconds: Mapping[str, float], arms: Sequence[str]) -> dict[str, float]:
    """Return how long each of these arms took with one seed, from every start that its runs were trained from.

    Args:
        seconds: What a run took, by its name: an arm's, behind the start's where there are several.
        arms: All that the campaign has; the longest name counts where several fit, and runs of others do not.
    """
    found: dict[str, float] = {}
    for name, taken in seconds.items():
        fitting = [arm for arm in arms if f"-{name}".endswith(f"-{arm}")]
        if fitting:
            arm = max(fitting, key=len)
            found[arm] = found.get(arm, 0.0) + taken
    return found


def plan(
    seconds: Mapping[str, float], arms: Sequence[str], seeds: int, jobs: int, hours: float
) -> tuple[list[str], dict[str, str]]:
    """Return the arms that fit into some hours, in their order, and why each of the others does not.

    Runs are taken to share the machine evenly, as they did when they were timed.

    Args:
        seconds: What a run of each arm takes.
        arms: Those that are wanted.
        seeds: How many.
        jobs: Runs side by side.
        hours: How many there are.

    Examples:
        >>> plan({"plain": 600.0, "defended": 1200.0}, ["plain", "defended", "new"], seeds=3, jobs=1, hours=0.6)
        (['plain'], {'defended': 'takes 1.00 h, 0.10 h are left', 'new': 'never timed'})
    """
    left, fitting, others = 3600 * hours * jobs, [], {}
    for arm in arms:
        if arm not in seconds:
            others[arm] = "never timed"
        elif seeds * seconds[arm] > left:
            others[arm] = f"takes {seeds * seconds[arm] / 3600 / jobs:.2f} h, {left / 3600 / jobs:.2f} h are left"
        else:
            fitting.append(arm)
            left -= seeds * seconds[arm]
    return fitting, others


def runs_of(study: Study) -> dict[str, dict[str, Any]]:
    """Return what the kept runs of a study took; nothing where none are kept."""
    path = RESULTS / study.records / "runs.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if study.records and path.exists() else {}
    return found


def arms_of(module: ModuleType) -> list[str]:
    """Return the arms of a campaign; none where it does not list them."""
    return list(getattr(module, "ARMS", ()))


def listing() -> str:
    """Return all studies, what they show, and what the kept runs took."""
    lines = []
    for name, sizes in STUDIES.items():
        for size, study in sizes.items():
            runs = runs_of(study)
            minutes = [seconds / 60 for seconds in seconds_of(runs).values()]
            took = f"{len(runs)} runs" + (f" of {min(minutes):.0f} to {max(minutes):.0f} min" if minutes else "")
            kept = f"scripts/results/{study.records}" if study.records else "no records kept"
            lines += [f"{name} --size {size}", f"    {study.says}", f"    {kept}{f', {took}' if runs else ''}"]
    return "\n".join(lines)


def main() -> None:
    """Run one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=STUDIES)
    parser.add_argument("--list", action="store_true", help="show all studies, and run none")
    parser.add_argument("--size", choices=("small", "full"), default="small", help="default: %(default)s")
    parser.add_argument(
        "--model",
        help="a folder or a name on the Hub; for images, and images-trained, the trained weights",
    )
    parser.add_argument("--data", type=Path, help="the folder that the campaign's own --help names")
    parser.add_argument("--output", type=Path, help="the folder for records; default: runs/STUDY-SIZE")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the records")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; default: %(default)s")
    parser.add_argument("--hours", type=float, help="start only the arms that fit into so many")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and run nothing")
    options = parser.parse_args()
    if options.list:
        print(listing())
        return
    if options.study is None:
        parser.error("expected a study, got none; --list shows them")
    sizes = STUDIES[options.study]
    if options.size not in sizes:
        parser.error(f"--size: {options.study} has {' and '.join(sizes)}, got {options.size}")
    study = sizes[options.size]
    if options.data is None or (study.model and options.model is None):
        missing = [flag for flag, value in (("--data", options.data), ("--model", options.model)) if value is None]
        parser.error(f"expected {' and '.join(missing)} for this study, got none; it runs {study.line()}")
    sys.exit(run(parser, study, options))


def run(parser: argparse.ArgumentParser, study: Study, options: argparse.Namespace) -> int:
    """Run a study as a program of its own, and return its exit status."""
    output = options.output or Path("runs") / f"{options.study}-{options.size}"
    seeds, arms = options.seeds or list(study.seeds), list(study.arms)
    if options.hours is not None:
        timed = runs_of(study)
        if not seconds_of(timed) or not study.side_by_side:
            parser.error("--hours: expected a study whose runs were timed, arm by arm, got one without; leave it out")
        known = arms_of(import_module(study.words()[1]))
        wanted = arms or known or list(seconds_of(timed))
        seconds = seconds_of_arms(seconds_of(timed), [*wanted, *known])
        arms, others = plan(seconds, wanted, len(seeds), options.jobs, options.hours)
        machines = ", ".join(sorted({one["machine"] for one in timed.values()}))
        print(f"By what runs took on {machines}, {options.jobs} side by side:")
        print(
            *(f"  fits: {arm}" for arm in arms),
            *(f"  left out: {arm} ({why})" for arm, why in others.items()),
            sep="\n",
        )
        if not arms:
            parser.error(f"--hours: expected more, got {options.hours:g}: nothing fits")
    words = [*study.call(options.model, str(options.data), arms, seeds), "--output", str(output)]
    words += ["--jobs", str(options.jobs)] if study.side_by_side else []
    print(f"python {' '.join(words)}", flush=True)
    if options.dry_run:
        return 0
    started = time.monotonic()
    status = subprocess.run([sys.executable, *words], check=False).returncode
    print(f"Took {time.monotonic() - started:.0f} s. Records and table: {output}")
    if study.records:
        print(f"To compare with: scripts/results/{study.records}")
    return status


if __name__ == "__main__":
    main()
