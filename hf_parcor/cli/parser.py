"""Arguments from a command line and a YAML file; mistakes are errors in one line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hf_parcor.input_error import InputError, nearest


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
