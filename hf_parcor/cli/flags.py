"""Flags that several sub-commands have, and how their words are read."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hf_parcor.cli.parsing import Parser
from hf_parcor.errors import InputError, nearest
from hf_parcor.records.metric_info import LM_EVAL


def number(word: str) -> float:
    """Return a number, `inf` among them.

    Examples:
        >>> number("1e-3"), number("inf")
        (0.001, inf)
    """
    try:
        return float(word)
    except ValueError as error:
        apart = f"; write several apart: {' '.join(word.split(','))}" if "," in word else ""
        raise argparse.ArgumentTypeError(f"expected a number, got {word!r}{apart}") from error


LARGEST_SEED = 2**32 - 1  # that NumPy takes


def at_least(smallest: int, largest: int | None = None) -> Callable[[str], int]:
    """Return what reads whole numbers from the smallest on, up to the largest if there is one.

    Examples:
        >>> at_least(1)("12")
        12
    """

    def whole(word: str) -> int:
        try:
            value = int(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {word!r}") from error
        if value < smallest:
            raise argparse.ArgumentTypeError(f"expected a whole number from {smallest} on, got {word}")
        if largest is not None and value > largest:
            raise argparse.ArgumentTypeError(f"expected a whole number up to {largest}, got {word}")
        return value

    return whole


def share(word: str) -> float:
    """Return a number between 0 and 1, both excluded.

    Examples:
        >>> share("0.1")
        0.1
    """
    value = number(word)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, got {word}")
    return value


def pairs(words: Iterable[str], flag: str) -> dict[str, str]:
    """Return what words such as `text=review` say.

    Raises:
        InputError: A word has no name or no value, or a name has two values.

    Examples:
        >>> pairs(["text=review"], "--column")
        {'text': 'review'}
    """
    found: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not name or not value:
            raise InputError(f"{flag}: expected NAME=VALUE, got {word!r}; write both, with = between them")
        if found.setdefault(name, value) != value:
            raise InputError(f"{flag}: expected one value of {name}, got {found[name]!r} and {value!r}; leave one out")
    return found


# Written here too, since --help must not wait for PyTorch; tests compare them with the catalogues.
TASKS = (
    "text-classification",
    "token-classification",
    "question-answering",
    "fill-mask",
    "text-generation",
    "summarization",
    "translation",
    "image-classification",
    "object-detection",
    "automatic-speech-recognition",
    "audio-classification",
    "sentence-similarity",
)
ROLES = (
    *("text", "second_text", "words", "question", "context", "answer", "start", "source", "target", "negative"),
    *("image", "boxes", "crowd", "audio", "label", "score"),
)
TRIALS = 3
USUAL_METRIC = "default: perplexity of a text, accuracy, or the first whose large values are good"
NORM = 2.0
SPLIT, TRAIN_SPLIT = "validation", "train"
CORRUPTIONS = (
    "random",
    "gradient",
    "multi-step",
    "gaussian",
    "uniform",
    "drift",
    "quantization",
    "float-quantization",
    "pruning",
    "bit-flips",
    "worst-bit-flips",
)


def corruption(word: str) -> str:
    """Return a word of `--corruptions` whose name is known; what follows the name is read where it is used.

    Examples:
        >>> corruption("quantization=4:per=channel")
        'quantization=4:per=channel'
    """
    name = re.split("[=:]", word, maxsplit=1)[0].replace("_", "-")
    if name not in CORRUPTIONS:
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(CORRUPTIONS)}, got {word!r}{nearest(name, CORRUPTIONS)}"
        )
    return word


# For Command.spellings of those that have these flags.
OF_SUBJECT: Mapping[str, str] = MappingProxyType(
    {"source_language": "--source-lang", "target_language": "--target-lang"}
)


def add_subject(parser: Parser) -> None:
    """Add what says which model is measured, on which data."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model on the Hub, or a local folder")
    group = parser.add_argument_group("model and data")
    group.add_argument("--revision", default="main", metavar="NAME", help="branch, tag or commit of the model")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that the model's folder brings")
    group.add_argument("--task", choices=TASKS, metavar="TASK", help=f"{', '.join(TASKS)}; default: by the head")
    group.add_argument(
        "--dataset",
        metavar="DATA",
        help="a data set on the Hub, a folder, or a file: .csv, .tsv, .json, .jsonl, .txt, also .gz; of images .npz, "
        ".png",
    )
    group.add_argument("--dataset-config", metavar="NAME", help="the data set's configuration")
    group.add_argument("--split", default=SPLIT, metavar="NAME", help="default: %(default)s; a file has none")
    group.add_argument(
        "--column",
        action="append",
        metavar="ROLE=NAME",
        help=f"what a column is for, if its name is not well known: {', '.join(ROLES)}",
    )
    group.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N rows")
    group.add_argument("--max-length", type=at_least(2), metavar="N", help="cut texts to N tokens, generated ones too")
    group.add_argument("--prefix", default="", metavar="TEXT", help='before each text, as "summarize: " for T5')
    group.add_argument(
        "--source-lang",
        metavar="NAME",
        help="of models of many languages, as they call it: de_DE; of Whisper, what is spoken: de",
    )
    group.add_argument("--target-lang", metavar="NAME", help="the language to generate; needed by mBART, NLLB, M2M100")
    group.add_argument(
        "--box-format",
        choices=("coco", "voc"),
        help="of a detector's data: (x, y, width, height), or (xmin, ymin, xmax, ymax); default: coco, or voc for a "
        "column *_xyxy",
    )
    group.add_argument(
        "--metric",
        metavar="NAME",
        help="default: the task's; a name, or a folder, for the library evaluate; of causal language models also "
        f"{LM_EVAL}arc_easy,piqa:limit=100,num-fewshot=5, tasks of lm-eval (gradients are of the loss on --dataset)",
    )
    add_meaning(group)


WINDOWED = "text-generation"  # the task whose text windows slide over
BETWEEN_ROWS: Mapping[str, str | None] = MappingProxyType({"end-of-text": None, "newline": "\n", "blank-line": "\n\n"})


def add_loading(parser: Parser) -> None:
    """Add what says in which precision, and onto which devices, a model is loaded that is not trained."""
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights, which are corrupted in it; default: %(default)s, the one that the model's configuration "
        "names, or else its files",
    )
    group.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, mps, ...; default: the accelerator where there is one"
    )
    group.add_argument(
        "--device-map",
        type=device_map,
        metavar="MAP",
        help=f"instead of --device: {', '.join(DEVICE_MAPS)}; or devices (0, cuda:1, cpu, disk) by module, as a JSON "
        "object or a file of it. What it offloads is not corrupted: on the disk, or by gradients",
    )
    group.add_argument(
        "--offload-folder",
        metavar="DIR",
        help="for weights on the disk that cannot be read from the model's own files: those that are not safetensors",
    )


DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential", "cpu")


def device_map(word: str) -> str | dict[str, str | int]:
    """Return where the modules of a model go: a word of Accelerate's, or devices by module, in JSON or a file of it.

    Examples:
        >>> device_map("auto"), device_map('{"model": 0, "lm_head": "disk"}')
        ('auto', {'model': 0, 'lm_head': 'disk'})
    """
    if word in DEVICE_MAPS:
        return word
    try:
        found: Any = json.loads(
            word if word.lstrip().startswith(("{", "[")) else Path(word).read_text(encoding="utf-8")
        )
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"expected {', '.join(DEVICE_MAPS)}, a JSON object, or a file of one, got {word!r}"
            f"{nearest(word, DEVICE_MAPS)}"
        ) from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected JSON, got {word!r} ({error})") from error
    devices = list(found.values()) if isinstance(found, dict) else []
    if not devices or not all(isinstance(one, str) or type(one) is int for one in devices):
        raise argparse.ArgumentTypeError(
            f'expected devices by module such as {{"model.layers.0": 0, "lm_head": "disk"}}, got {found!r}'
        )
    return dict(found)


def add_windows(parser: Parser) -> None:
    """Add what says how a causal language model reads a running text."""
    group = parser.add_argument_group(
        "perplexity", "Of text-generation: windows of --max-length tokens slide over the text."
    )
    group.add_argument(
        "--stride",
        type=at_least(1),
        metavar="N",
        help="a window begins every N tokens; the tokens that no earlier window had count, the others are their "
        "context; default: --max-length, no overlap",
    )
    group.add_argument(
        "--between-rows",
        choices=list(BETWEEN_ROWS),
        default="end-of-text",
        help="the rows of a .txt are its lines; newline makes them one text again, blank-line is usual for WikiText; "
        "default: %(default)s, a token",
    )


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


def add_target_modules(group: argparse._ArgumentGroup, meaning: str) -> None:
    """Add `--target-modules`, whose words are the entries of the list of that name everywhere in the library."""
    group.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help=f"{meaning}: all, last-encoder-layer, attention, layer-norm, ..., names of modules or their last parts, "
        "or regular expressions for the full name",
    )


# For Command.other_names of those that measure: what a radius is called elsewhere.
STRENGTH_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("rho", "epsilon", "eps", "radius", "bits"), "that is a strength: --strengths S ...")
)


def add_corruptions(parser: Parser, default: str) -> None:
    """Add what says how weights are corrupted."""
    group = parser.add_argument_group("corruptions")
    group.add_argument(
        "--corruptions",
        nargs="*",
        type=corruption,
        metavar="NAME",
        help=f"{', '.join(CORRUPTIONS)}; strengths of its own: gradient=0.1,0.2; other settings: "
        "quantization:per=channel, quantization=4,3:per=32, gaussian=0.03:relative-to=channel; formats: "
        f"float-quantization=mxfp4,nf4. Default: {default}",
    )
    group.add_argument(
        "--strengths",
        nargs="*",
        type=number,
        metavar="S",
        help="of those without strengths of their own: radius of random, gradient and multi-step, standard deviation "
        "of gaussian, bound of uniform, seconds of drift, bits of quantization, sparsity of pruning, rate of "
        "bit-flips, count of worst-bit-flips",
    )
    group.add_argument(
        "--towards",
        nargs="+",
        metavar="MODEL",
        help="replace the weights by those of other models of the same architecture (NAME@REVISION for a revision on "
        "the Hub), or of GGUF files: what a quantizer or a merge made of it, or an earlier version; nothing else "
        "unless --corruptions or --strengths are given, too",
    )
    group.add_argument(
        "--shares", nargs="+", type=number, metavar="S", help="how much of the way --towards them; default: 1"
    )
    group.add_argument("--norm", type=number, default=NORM, metavar="P", help="order of the radius's norm: 2, inf")
    group.add_argument("--top-n", type=at_least(1), metavar="N", help="corrupt at most N weights")
    group.add_argument(
        "--trials", type=at_least(1), default=TRIALS, metavar="N", help=f"of random ones; default: {TRIALS}"
    )
    group.add_argument(
        "--seed", type=at_least(0, LARGEST_SEED), default=0, metavar="N", help="of the first trial; default: 0"
    )


def add_running(parser: Parser) -> None:
    """Add what says how a measurement runs, and where its results go."""
    group = parser.add_argument_group("run and results")
    group.add_argument("--batch-size", type=at_least(1), default=32, metavar="N", help="default: %(default)s")
    group.add_argument("--saved-on", metavar="NAME", help="where weights are kept while corrupted; default: with them")
    group.add_argument("--output-dir", metavar="DIR", help="keep the record and its pages there; go on after a stop")
    group.add_argument("--json", action="store_true", help="print the record as JSON, and nothing else")
    group.add_argument("--quiet", action="store_true", help="show no progress")
