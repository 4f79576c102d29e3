"""The command line: find the sub-command, read its arguments, run it, and end with a code that scripts can rely on."""

from __future__ import annotations

import importlib.metadata
import io
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from hf_parcor.cli.card import Card
from hf_parcor.cli.evaluate import Evaluate
from hf_parcor.cli.parsing import Command, Parser
from hf_parcor.cli.probe import Probe
from hf_parcor.cli.report import Compare, Report
from hf_parcor.cli.terminal import Interrupted
from hf_parcor.cli.train import Train
from hf_parcor.errors import InputError, nearest

# A new sub-command is a module with a `Command`, and a line here.
COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "train": Train(),
        "evaluate": Evaluate(),
        "probe": Probe(),
        "report": Report(),
        "compare": Compare(),
        "card": Card(),
    }
)
MISTAKE, INTERRUPTED, NO_READER = 2, 130, 141  # the last two as shells have them: 128 + SIGINT, 128 + SIGPIPE


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code.

    Args:
        words: The command line; None, the default, for that of the process.

    Returns:
        0 if all is well, 2 for a user's mistake, 130 after Ctrl-C, 141 where nobody reads the output any more. A
        failure of ours is an exception, for which Python prints the traceback and ends with 1.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know no ε
    try:
        _run(sys.argv[1:] if words is None else list(words))
        sys.stdout.flush()
    except InputError as error:
        print("hf-parcor: error:", " ".join(str(error).split()), file=sys.stderr)
        return MISTAKE
    except Interrupted as how:
        print(f"hf-parcor: interrupted; {how}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("hf-parcor: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return NO_READER
    return 0


def command_parser(name: str) -> Parser:
    """Return the parser of a sub-command, with what `--help` shows."""
    command = COMMANDS[name]
    parser = Parser(
        f"hf-parcor {name}",
        usage=f"hf-parcor {name} {command.usage}",
        description=command.summary,
        epilog=f"example:\n  hf-parcor {name} {command.example}",
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file with flags by name; the command line wins")
    command.add_arguments(parser)
    return parser


def _run(words: Sequence[str]) -> None:
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"hf-parcor {importlib.metadata.version('hf-parcor')}")
    elif name not in COMMANDS:
        raise InputError(
            f"expected one of the commands {', '.join(COMMANDS)}, got {name!r}{nearest(name, COMMANDS)}; "
            "see: hf-parcor --help"
        )
    else:
        parser = command_parser(name)
        if {"-h", "--help"}.intersection(rest):
            parser.print_help()
            return
        arguments = COMMANDS[name].add_all_arguments(parser).read(rest)
        COMMANDS[name].run(arguments)


def _help() -> str:
    lines = [f"  {name:10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hf-parcor COMMAND ...",
            "",
            "How fragile are a model's weights, and can you train one whose weights are not?",
            "",
            "commands:",
            *lines,
            "",
            "hf-parcor COMMAND --help says more; hf-parcor --version. Exit codes: 0 all is",
            "well, 1 a bug of ours (with a traceback), 2 a mistake in what was asked for,",
            "130 interrupted.",
        ]
    )
