"""`hf-parcor probe --quick`: the weakest part, from one backward pass and six measurements."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from hf_parcor.cli.evaluate import asked_for
from hf_parcor.cli.parsing import Parser
from hf_parcor.cli.recipe import scored
from hf_parcor.cli.sources import check_sources, read_data
from hf_parcor.cli.terminal import (
    checkpoint_in,
    going_on,
    how_to_go_on,
    keep,
    output_folder,
    refused,
    show_answer,
    speaks,
)
from hf_parcor.errors import InputError

QUICK = "quick.json"
MEASURED = 5  # parts, the weakest by their scores


def add_quick(parser: Parser) -> None:
    """Add what asks for a first look."""
    group = parser.add_argument_group("first look")
    group.add_argument(
        "--quick",
        action="store_true",
        help=f"score all parts in one format by one backward pass over the data, then measure the {MEASURED} weakest; "
        "--corruptions is the format then; default: quantization=4:per=channel,code-range=full",
    )


def first_look(arguments: argparse.Namespace, groups_of: Callable[[Any], Any]) -> None:
    """Score all parts, measure the weakest, and say which it is.

    Args:
        arguments: Those of `Probe`.
        groups_of: Returns the parts of a model by name.

    Raises:
        InputError: A user's mistake, such as two formats.
    """
    check_sources(arguments)
    data = read_data(arguments)
    folder = output_folder(arguments.output_dir)
    from hf_parcor.corruptions import Quantization
    from hf_parcor.reports import FirstLookReport

    usual = [Quantization(4, "channel", code_range="full")]
    formats: Any = usual if arguments.corruptions is None else asked_for(arguments)
    if len(formats) != 1:
        raise InputError(
            f"--corruptions: expected one format with --quick, got {len(formats)}; name one, or ask for a --recipe"
        )
    checkpoint = checkpoint_in(folder, QUICK)
    with redirect_stdout(sys.stderr), going_on(how_to_go_on(checkpoint)):
        budget = MEASURED if arguments.cells is None else max(1, arguments.cells)
        _, _, scores = scored(arguments, data, groups_of, formats, budget, checkpoint)
    if not speaks():
        return
    if not scores.cells:
        raise InputError(
            f"--corruptions: expected a format that fits a part, got {formats[0]}, whose blocks divide no row; name "
            "quantization=4:per=channel"
        )
    with refused(ValueError, ImportError):
        report = FirstLookReport(scores)
    if folder is not None:
        keep(scores, report, folder / QUICK)
    show_answer(scores, report, as_json=arguments.json)
