"""Arguments from a command line and a YAML file, and the flags that several sub-commands have."""

from __future__ import annotations

import argparse
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

from hf_parcor.errors import InputError, nearest
from hf_parcor.records.metric_info import LM_EVAL


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are an `InputError` that names what is nearest to an unknown word.

    Args:
        **settings: As for `argparse.ArgumentParser`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            **{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **settings}
        )

    _other_names: Mapping[str, str] = MappingProxyType({})

    def error(self, message: str) -> NoReturn:
        """Refuse a command line."""
        raise InputError(f"{message}; see: {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the arguments; a flag that is not known is refused here, where those that it resembles are known."""
        found, unknown = super().parse_known_args(args, namespace)
        self._refuse_other_names(unknown)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"expected known flags, got {unknown[0]}{nearest(unknown[0].partition('=')[0], flags)}")
        return found, unknown

    def _refuse_other_names(self, unknown: Sequence[str]) -> None:
        """Refuse a flag that users of other libraries look for, and say what it is here."""
        for word in unknown:
            name = word.partition("=")[0].removeprefix("--").replace("_", "-")
            if word.startswith("--") and name in self._other_names:
                self.error(f"expected known flags, got {word} ({self._other_names[name]})")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"expected one of {', '.join(known)}, got {value!r}{nearest(str(value), known)}"
            )


class CommandParser(Parser):
    """The parser of a sub-command: also takes flags from a file, and may have flags that take long to load.

    Of the spellings of these, help and errors show those in kebab-case alone.

    Args:
        command: Whose arguments they are; None for one without a name.
        checking: Whether what the first flags say is checked before those that take long are loaded.
        **settings: As for `argparse.ArgumentParser`.
    """

    def __init__(self, *, command: Command | None = None, checking: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self._command, self._checking = command, checking
        self._late = None if command is None else command.late_flags
        self._other_names = {} if command is None else command.other_names

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the arguments: those of the command line, then those of `--config`, then the defaults.

        Among them, `flags` says how messages of the library are to be spelled here, and `told` what a record has to
        say of them.

        Raises:
            InputError: An unknown flag, a value that is none, or a file that cannot be used.
        """
        if self._late is None:
            found, unknown = super().parse_known_args(args, self._from_file(args, namespace))
            found.flags = self._flags()
            found.told = self._told(found)
            return found, unknown
        found, others = argparse.ArgumentParser.parse_known_args(self, args)  # --help and mistakes here wait for none
        self._refuse_other_names(others)
        if self._command is not None and self._checking:
            self._command.check(found)
        return self._whole(self._late()).parse_known_args(args, namespace)

    def _flags(self) -> dict[str, str]:
        """Return the flag of each argument of the library that has one: of the defense's too, whose flags say so."""
        flags = {}
        for action in self._actions:
            long = [
                flag for flag in action.option_strings if flag.startswith("--") and flag[:5] not in ("--no-", "--no_")
            ]
            if long:
                flags[action.dest] = long[0]
        of_defense = {name.removeprefix("defense_"): flag for name, flag in flags.items() if name[:8] == "defense_"}
        return {**of_defense, **flags, **({} if self._command is None else self._command.spellings)}

    def _told(self, found: argparse.Namespace) -> dict[str, Any]:
        """Return how model and data are loaded, where that is not by default; of a folder the end of its path."""
        given = {action.dest: action.default for action in self._actions if action.dest in _TOLD}
        told = {name: value for name in given if (value := getattr(found, name)) != given[name]}
        return {name: Path(value).name if name == "offload_folder" else value for name, value in told.items()}

    def _whole(self, late: argparse.ArgumentParser) -> CommandParser:
        whole = CommandParser(
            command=self._command,
            prog=self.prog,
            usage=self.usage,
            description=self.description,
            epilog=self.epilog,
            parents=[self, late],
            add_help=False,
            conflict_handler="resolve",
        )
        whole._late = None
        for action in late._actions:
            kebab = [flag for flag in action.option_strings if "_" not in flag]
            action.option_strings = kebab or action.option_strings
        return whole

    def _from_file(self, words: Sequence[str], namespace: Any) -> Any:
        """Return what the file says that `--config` names, where the command line may write over it."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config", nargs="?")
        path = first.parse_known_args(words)[0].config
        if path is None:
            return namespace
        found: list[str] = []
        try:
            for name, value in _settings_in(path).items():
                flag, action = self._flag(name)
                if value is not None and action.option_strings:
                    found += self._words(flag, action, value)
                elif value is not None:  # an argument that is missing on the command line writes its default
                    self.set_defaults(**{action.dest: _entries(value) if action.nargs == "*" else str(value)})
            return super().parse_known_args(found, namespace)[0]
        except InputError as error:
            raise InputError(f"--config: {path}: {error}") from error

    def _flag(self, name: Any) -> tuple[str, argparse.Action]:
        """Return the flag of a name, or the argument."""
        words = (
            (flag, action) for action in self._actions for flag in (action.option_strings or [f"--{action.dest}"])
        )
        flags = {flag.replace("_", "-"): action for flag, action in words}
        for unfit in ("-h", "--help", "--help-all", "--config"):
            flags.pop(unfit, None)
        flag = "--" + str(name).removeprefix("--").replace("_", "-")
        if flag not in flags:
            known = [other.removeprefix("--") for other in flags]
            self.error(f"expected the names of flags, got {name!r}{nearest(flag.removeprefix('--'), known)}")
        return flag, flags[flag]

    def _words(self, flag: str, action: argparse.Action, value: Any) -> list[str]:
        """Return the words of a command line that give a flag a value."""
        repeated = isinstance(action, argparse._AppendAction)
        several = repeated or action.nargs in ("*", "+")
        if isinstance(value, Mapping):
            value = [f"{key}={entry}" for key, entry in value.items()] if several else json.dumps(value)
        if action.nargs == 0:
            if not isinstance(value, bool):
                self.error(f"expected true or false for {action.dest}, got {value!r}")
            no = flag.replace("--", "--no-", 1)
            return [flag] if value else [no] if no in action.option_strings else []
        if several:
            return [f"{flag}={entry}" for entry in _entries(value)] if repeated else [flag, *_entries(value)]
        if isinstance(value, list) or (isinstance(value, bool) and action.type in (None, str)):
            self.error(f"expected one value for {action.dest}, got {value!r}; write words such as no in quotes")
        return [f"{flag}={value}"]


def _entries(value: Any) -> list[str]:
    return list(map(str, value if isinstance(value, list) else [value]))


def _settings_in(path: str) -> Mapping[Any, Any]:
    """Return what a YAML file holds by name.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        found, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"expected a YAML file that can be read, got {error.strerror}; check its name") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise InputError(f"expected YAML, got {problem}; mend the file") from error
    if not isinstance(found, Mapping):
        raise InputError(f"expected flags by name, got {found!r}; write 'seed: 1', say")
    names = [name.value for name, _ in node.value]
    for name in names:
        if names.count(name) > 1:  # of which PyYAML takes the last
            raise InputError(f"expected {name} once, got it {names.count(name)} times; keep one of them")
    return found


class Command(ABC):
    """A sub-command. Its module imports PyTorch in functions only: `run`, and what `run` calls.

    Attributes:
        summary: What it does, in a line.
        usage: What follows its name.
        example: A command line without the program's name; a test runs it.
        late_flags: Returns a parser with flags that take long to load; None for none.
        spellings: What the library calls some things in messages, and what a command line calls them, where that is
            not the flag of the same name.
        other_names: Flags that users of other libraries look for, and what to give here.
    """

    summary: ClassVar[str]
    usage: ClassVar[str]
    example: ClassVar[str]
    late_flags: Callable[[], argparse.ArgumentParser] | None = None
    spellings: ClassVar[Mapping[str, str]] = MappingProxyType({})
    other_names: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @abstractmethod
    def add_arguments(self, parser: Parser) -> None:
        """Add what `--help` shows."""

    def check(self, arguments: argparse.Namespace) -> None:  # noqa: B027 (most check where they run)
        """Refuse what can be seen before `late_flags` are loaded.

        Raises:
            InputError: A user's mistake.
        """

    @abstractmethod
    def run(self, arguments: argparse.Namespace) -> None:
        """Do it.

        Raises:
            InputError: A user's mistake.
            Interrupted: Ctrl-C, where the work can go on.
        """


_ARGUMENT = re.compile(
    r"""(?<![\w.'"/:=,{-])(?P<name>[a-z]\w*)
    (?: =(?P<value> \.\.\. | \[[^]]*\] | '[^']*' | "[^"]*" | [\w+-]+(?:\.\w+)* )? | (?P<colon>:) )?""",
    re.VERBOSE,
)


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """Return a message of the library where arguments are spelled as flags.

    Args:
        message: It names arguments as Python does: at its beginning, as `name=value`, or as words_with_underscores.
        flags: The flag of each argument that has one.

    Examples:
        >>> flags = {"metric": "--metric", "target_modules": "--target-modules"}
        >>> in_flags("metric: expected accuracy, got 'f1'; pass metric=", flags)
        "--metric: expected accuracy, got 'f1'; pass --metric"
        >>> in_flags("expected a metric; name target_modules=['query', 'key'], or keep=True", flags)
        'expected a metric; name --target-modules query key, or keep=True'
    """

    def spelled(found: re.Match[str]) -> str:
        name, value, colon = found["name"], found["value"], found["colon"]
        assigned = "=" in found.group()[len(name) : len(name) + 1]
        if name not in flags or not (assigned or "_" in name or (colon and found.start() == 0)):
            return found.group()
        words = re.sub(r"['\"\[\],]", "", value) if value else ""
        return f"{flags[name]} {words}" if words else f"{flags[name]}{colon or ''}"

    return _ARGUMENT.sub(spelled, message.replace('float("inf")', "inf"))


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
    "text-generation",
    "summarization",
    "translation",
    "image-classification",
    "object-detection",
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


# What a record says nothing of, but for its flags: another value would give other numbers, or none.
_TOLD = (
    *("revision", "trust_remote_code", "column", "max_length", "prefix", "source_lang", "target_lang", "box_format"),
    *("stride", "between_rows", "dtype", "device_map", "offload_folder", "greater_is_better", "unit"),
)


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
        help="what a column is for, if its name is not well known: text, second_text, words, image, boxes, label, "
        "source, target",
    )
    group.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N rows")
    group.add_argument("--max-length", type=at_least(2), metavar="N", help="cut texts to N tokens, generated ones too")
    group.add_argument("--prefix", default="", metavar="TEXT", help='before each text, as "summarize: " for T5')
    group.add_argument("--source-lang", metavar="NAME", help="of models of many languages, as they call it: de_DE")
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
        "of gaussian, bound of uniform, seconds of drift, bits of quantization, rate of bit-flips, count of "
        "worst-bit-flips",
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
