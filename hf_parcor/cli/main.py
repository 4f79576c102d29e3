"""The command line: find the sub-command, read its arguments, run it, and end with a code that scripts can rely on."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from hf_parcor.cli.card import Card
from hf_parcor.cli.evaluate import Evaluate
from hf_parcor.cli.parsing import Command, CommandParser, Parser, in_flags
from hf_parcor.cli.probe import Probe
from hf_parcor.cli.report import Compare, Report
from hf_parcor.cli.terminal import Interrupted
from hf_parcor.cli.train import Train
from hf_parcor.defense_file import installed_version
from hf_parcor.errors import InputError

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


def build_parser(*, checking: bool = False) -> Parser:
    """Return the parser of the program, with one for each sub-command; `run` of what it finds does what was asked.

    Args:
        checking: Whether a sub-command looks at what its first flags name before it loads those that take long.
    """
    parser = Parser(
        prog="hf-parcor",
        description="How fragile are a model's weights, and can you train one whose weights are not?",
        epilog="hf-parcor COMMAND --help says more. Exit codes: 0 all is well, 1 a bug of ours\n"
        "(with a traceback), 2 a mistake in what was asked for, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {installed_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=CommandParser)
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.summary,
            usage=f"hf-parcor {name} {command.usage}",
            description=command.summary,
            epilog=f"example:\n  hf-parcor {name} {command.example}",
            command=command,
            checking=checking,
        )
        added.add_argument("--config", metavar="FILE", help="a YAML file with flags by name; the command line wins")
        added.set_defaults(run=command.run)
        command.add_arguments(added)
    return parser


def _run(words: Sequence[str]) -> None:
    try:
        arguments = build_parser(checking=True).parse_args(words or ["--help"])
    except SystemExit:  # of --help and --version: mistakes are an InputError
        return
    try:
        arguments.run(arguments)
    except InputError as error:
        # That of a process which makes batches comes with its traceback around the message.
        message = str(error).rpartition(f"{InputError.__module__}.{InputError.__name__}: ")[-1].strip()
        raise InputError(in_flags(message, arguments.flags)) from error
