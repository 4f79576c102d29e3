"""Flags that several sub-commands have."""

from __future__ import annotations

import argparse
from typing import Any

from hf_parcor.cli.parser import Parser
from hf_parcor.cli.words import at_least, number, one_of

# Written here too, since --help must not wait for PyTorch; tests compare them with the catalogues.
TASKS = (
    "text-classification",
    "token-classification",
    "text-generation",
    "summarization",
    "translation",
    "image-classification",
)
TRIALS = 3
CORRUPTIONS = ("random", "gradient", "multi-step", "gaussian", "uniform", "quantization", "bit-flips")


def add_subject(parser: Parser) -> None:
    """Add what says which model is measured, on which data."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model on the Hub, or a local folder")
    group = parser.add_argument_group("model and data")
    group.add_argument("--revision", default="main", metavar="NAME", help="branch, tag or commit of the model")
    group.add_argument("--task", type=one_of(TASKS), metavar="TASK", help=f"{', '.join(TASKS)}; default: by the head")
    group.add_argument(
        "--dataset",
        metavar="DATA",
        help="a data set on the Hub, a folder, or a file: .csv, .tsv, .json, .jsonl, .txt, also .gz",
    )
    group.add_argument("--dataset-config", metavar="NAME", help="the data set's configuration")
    group.add_argument("--split", default="validation", metavar="NAME", help="default: %(default)s; a file has none")
    group.add_argument(
        "--column",
        action="append",
        metavar="ROLE=NAME",
        help="what a column is for, if its name is not well known: text, second_text, words, image, label, source, "
        "target",
    )
    group.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N rows")
    group.add_argument("--max-length", type=at_least(2), metavar="N", help="cut texts to N tokens, generated ones too")
    group.add_argument("--prefix", default="", metavar="TEXT", help='before each text, as "summarize: " for T5')
    group.add_argument("--source-lang", metavar="NAME", help="of models of many languages, as they call it: de_DE")
    group.add_argument("--target-lang", metavar="NAME", help="the language to generate; needed by mBART, NLLB, M2M100")
    group.add_argument(
        "--metric", metavar="NAME", help="default: the task's; a name, or a folder, for the library evaluate"
    )
    add_meaning(group)


def add_meaning(group: Any) -> None:
    """Add what says what the numbers of a metric mean, to a parser or a group of it."""
    group.add_argument(
        "--greater-is-better",
        action=argparse.BooleanOptionalAction,
        help="whether a large metric is good; default: what the metric says, or else a guess that is called one",
    )
    group.add_argument(
        "--unit",
        metavar="UNIT",
        help="its unit: share (of 1, shown in percent), points (of 100), nats, ...; default: as the metric says",
    )


def add_target(group: argparse._ArgumentGroup, meaning: str) -> None:
    """Add `--target`, whose words are the entries of a list of target modules, as they are for every such flag."""
    group.add_argument(
        "--target",
        nargs="+",
        metavar="NAME",
        help=f"{meaning}: last-encoder-layer, attention, layer-norm, ..., names of modules or their last parts, or "
        "regular expressions for the full name",
    )


def add_corruptions(parser: Parser, default: str) -> None:
    """Add what says how weights are corrupted."""
    group = parser.add_argument_group("corruptions")
    group.add_argument(
        "--corruption",
        nargs="*",
        metavar="NAME",
        help=f"{', '.join(CORRUPTIONS)}; strengths of its own: gradient=0.1,0.2. Default: {default}",
    )
    group.add_argument(
        "--epsilons",
        nargs="*",
        type=number,
        metavar="E",
        help="strengths: radius of random, gradient and multi-step, standard deviation of gaussian, bound of uniform, "
        "bits of quantization, rate of bit-flips",
    )
    group.add_argument("--norm", type=number, default=2.0, metavar="P", help="order of the radius's norm: 2, inf")
    group.add_argument("--top-n", type=at_least(1), metavar="N", help="corrupt at most N weights")
    group.add_argument(
        "--trials", type=at_least(1), default=TRIALS, metavar="N", help="of random ones; default: %(default)s"
    )
    group.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of the first trial; default: 0")


def add_running(parser: Parser) -> None:
    """Add what says how a measurement runs, and where its results go."""
    group = parser.add_argument_group("run and results")
    group.add_argument("--batch-size", type=at_least(1), default=32, metavar="N", help="default: %(default)s")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, ...; default: cuda where there is one")
    group.add_argument("--output", metavar="DIR", help="keep record, report.html, report.md, and go on after a stop")
    group.add_argument("--json", action="store_true", help="print the record as JSON, and nothing else")
    group.add_argument("--quiet", action="store_true", help="show no progress")
