"""Arguments from a command line and a YAML file, and the flags that several sub-commands have."""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from hf_parcor.errors import InputError, nearest


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `InputError`, and that takes settings from a file.

    Args:
        prog: What the command is called.
        **settings: As for `argparse.ArgumentParser`.
    """

    def __init__(self, prog: str, **settings: Any) -> None:
        settings = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **settings}
        super().__init__(prog, **settings)

    def error(self, message: str) -> NoReturn:
        """Refuse a command line."""
        raise InputError(f"{message}; see: {self.prog} --help")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Return the arguments: those of the command line, then those of `--config`, then the defaults.

        Raises:
            InputError: An unknown flag, a value that is none, or a file that cannot be used.
        """
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        first.add_argument("--config", nargs="?", const="")
        config = first.parse_known_args(words)[0].config
        if config is not None:
            self.set_defaults(**self._from_file(config))
        found, unknown = self.parse_known_args(words)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"expected known flags, got {unknown[0]}{nearest(unknown[0].partition('=')[0], flags)}")
        return found

    def _from_file(self, path: str) -> dict[str, Any]:
        import yaml

        try:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"--config: expected a YAML file, got {path!r} ({error.strerror}); check its name"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            problem = " ".join(str(error).split())
            raise InputError(f"--config: expected YAML in {path}, got {problem}; mend the file") from error
        if not isinstance(found, Mapping):
            raise InputError(f"--config: expected flags by name in {path}, got {found!r}; write 'seed: 1', say")
        return {
            self._action(path, name).dest: self._value(self._action(path, name), value)
            for name, value in found.items()
        }

    def _action(self, path: str, name: Any) -> argparse.Action:
        actions = {action.dest: action for action in self._actions if action.dest not in ("help", "config", "version")}
        key = str(name).removeprefix("--").replace("-", "_")
        if key not in actions:
            known = [dest.replace("_", "-") for dest in actions]
            raise InputError(
                f"--config: expected the names of flags in {path}, got {name!r}"
                f"{nearest(str(name).replace('_', '-'), known)}; see: {self.prog} --help"
            )
        return actions[key]

    def _value(self, action: argparse.Action, value: Any) -> Any:
        several = action.nargs in ("*", "+") or isinstance(action, argparse._AppendAction)
        if isinstance(value, Mapping):
            value = [f"{key}={entry}" for key, entry in value.items()] if several else json.dumps(value)
        if value is None or (several and isinstance(value, list)):
            return value if value is None else [self._single(action, entry) for entry in value]
        single = self._single(action, value)
        return [single] if several else single

    def _single(self, action: argparse.Action, value: Any) -> Any:
        name = action.dest
        if action.nargs == 0 or isinstance(action.const, bool):
            if not isinstance(value, bool):
                self.error(f"--config: expected true or false for {name}, got {value!r}")
            return value
        if isinstance(value, (bool, list)):
            self.error(f"--config: expected one value for {name}, got {value!r}")
        convert: Any = action.type or str
        try:
            converted = convert(str(value))
        except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
            raise InputError(f"--config: {name}: {error}; see: {self.prog} --help") from error
        if action.choices is not None and converted not in action.choices:
            self.error(f"--config: expected one of {', '.join(map(str, action.choices))} for {name}, got {value!r}")
        return converted


class Command(ABC):
    """A sub-command. Its module imports PyTorch in no other place than `run` and `add_all_arguments`.

    Attributes:
        summary: What it does, in a line.
        usage: What follows its name.
        example: A command line without the program's name; a test runs it.
    """

    summary: ClassVar[str]
    usage: ClassVar[str]
    example: ClassVar[str]

    @abstractmethod
    def add_arguments(self, parser: Parser) -> None:
        """Add what `--help` shows."""

    def add_all_arguments(self, parser: Parser) -> Parser:
        """Return a parser that also knows what takes long to load; by default there is no such thing."""
        return parser

    @abstractmethod
    def run(self, arguments: argparse.Namespace) -> None:
        """Do it.

        Raises:
            InputError: A user's mistake.
            Interrupted: Ctrl-C, where the work can go on.
        """


def number(word: str) -> float:
    """Return a number, `inf` among them.

    Examples:
        >>> number("1e-3"), number("inf")
        (0.001, inf)
    """
    try:
        return float(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, got {word!r}") from error


def at_least(smallest: int) -> Callable[[str], int]:
    """Return what reads whole numbers from the smallest on.

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


def one_of(known: Sequence[str]) -> Callable[[str], str]:
    """Return what reads one of some words.

    Examples:
        >>> one_of(["layers", "kinds"])("kinds")
        'kinds'
    """

    def word_of(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, got {word!r}{nearest(word, known)}")
        return word

    return word_of


def pairs(words: Iterable[str], flag: str) -> dict[str, str]:
    """Return what words such as `text=review` say.

    Raises:
        InputError: A word has no name or no value.

    Examples:
        >>> pairs(["text=review"], "--column")
        {'text': 'review'}
    """
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        if not name or not value:
            raise InputError(f"{flag}: expected NAME=VALUE, got {word!r}; write both, with = between them")
        found[name] = value
    return found


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
