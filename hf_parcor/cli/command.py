"""What a sub-command is."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from typing import ClassVar

from hf_parcor.cli.parser import Parser


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
