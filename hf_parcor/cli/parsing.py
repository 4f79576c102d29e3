"""Arguments from a command line and a YAML file, for sub-commands; and messages of the library in their words."""

from __future__ import annotations

import argparse
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

from hf_parcor.errors import InputError, nearest


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


# What a record says nothing of, but for its flags: another value would give other numbers, or none.
_TOLD = (
    *("revision", "trust_remote_code", "column", "max_length", "prefix", "source_lang", "target_lang", "box_format"),
    *("stride", "between_rows", "dtype", "device_map", "offload_folder", "greater_is_better", "unit"),
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
# A flag as Transformers spells it.
_FLAG = re.compile(r"(?<![\w-])--(?P<name>[a-z]\w*)(?![\w-])")


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """Return a message of the library where arguments are spelled as flags.

    Args:
        message: It names arguments as Python does: at its beginning, as `name=value`, or as words_with_underscores;
            or flags as Transformers does, `--with_underscores`.
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

    message = _FLAG.sub(lambda found: flags.get(found["name"], found.group()), message)
    return _ARGUMENT.sub(spelled, message.replace('float("inf")', "inf"))
