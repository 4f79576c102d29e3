"""`hf-parcor probe --recipe`: which parts take which bits?"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_parcor.cli.evaluate import asked_for, check_constraint_flags
from hf_parcor.cli.flags import at_least, number
from hf_parcor.cli.parsing import Parser
from hf_parcor.cli.sources import check_sources, read_data
from hf_parcor.cli.terminal import (
    checkpoint_in,
    going_on,
    how_to_go_on,
    output_folder,
    refused,
    show_answer,
    speaks,
    tell,
    writing,
)
from hf_parcor.errors import InputError, nearest

if TYPE_CHECKING:
    from hf_parcor.cli.subject import Subject
    from hf_parcor.records import SensitivityRecord
    from hf_parcor.tasks import Rows

BUDGETS = ("bits", "loss", "drop")
SENSITIVITY, RECIPE, MEASURED = "sensitivity.json", "recipe.json", "recipe_measured.json"
PAGE = "recipe.html"
_PAIRS = 10
SCORES = ("first_order", "fisher", "fit", "second_order")  # those of `sensitivity`, which would load PyTorch
PAIRS = "recipe_pairs.json"  # of its measurement that goes on; the record is the recipe's


def add_recipe(parser: Parser) -> None:
    """Add what asks for a recipe."""
    group = parser.add_argument_group(
        "recipe", "Formats for the parts within a budget, as files for tools that quantize."
    )
    group.add_argument(
        "--recipe",
        type=budget,
        metavar="BUDGET",
        help="bits=4.5 for average bits a weight, scales included; loss=0.02 or drop=0.01 for what the loss or the "
        "metric may lose, with as few bits as it takes. --corruptions are the formats then; default: 8 bits and FP8 "
        "per channel; 6, 4 and 3 bits per group of 32",
    )
    group.add_argument(
        "--cells",
        type=at_least(0),
        metavar="N",
        help="measure N cells (a part in a format), those most at risk by the scores; default: all, with --quick 5",
    )
    group.add_argument(
        "--pairs",
        type=at_least(0),
        metavar="N",
        help="measure N pairs of parts together in the formats chosen, those that can interact most; "
        f"default: {_PAIRS}",
    )
    group.add_argument(
        "--probes",
        type=at_least(0),
        metavar="N",
        help="estimate the second order too, with N Hessian-vector products; default: 0",
    )
    group.add_argument(
        "--choose-by",
        metavar="NAME",
        help=f"a metric, {', '.join(SCORES[:-1])} or {SCORES[-1]}; default: for bits the divergence of the answers, "
        "for loss the loss, for drop the metric",
    )


def budget(word: str) -> dict[str, float]:
    """Return what a word such as `bits=4.5` says.

    Examples:
        >>> budget("bits=4.5")
        {'bits': 4.5}
    """
    name, _, value = word.partition("=")
    if name not in BUDGETS or not value:
        raise argparse.ArgumentTypeError(
            f"expected {', '.join(f'{one}=N' for one in BUDGETS)}, got {word!r}{nearest(name, BUDGETS)}"
        )
    limit = number(value)
    if name == "bits" and not 0 < limit < math.inf:
        raise argparse.ArgumentTypeError(f"expected bits above 0, got {word!r}; write bits=4.5, say")
    if not 0 <= limit < math.inf:
        raise argparse.ArgumentTypeError(
            f"expected {name} from 0 on, got {word!r}: parts that would cost anything stay as they are at 0"
        )
    return {name: limit}


def check_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that say nothing beside the others.

    Raises:
        InputError: There is such a flag.
    """
    flags = {"--quick": arguments.quick, "--recipe": arguments.recipe is not None}
    asked = [flag for flag, given in flags.items() if given]
    if len(asked) > 1:
        raise InputError("--quick: expected it alone, got --recipe too; leave one of them out")
    needed = {"pairs": ["--recipe"], "choose_by": ["--recipe"], "cells": list(flags), "probes": list(flags)}
    for name, of in needed.items():
        value = getattr(arguments, name)
        if value is not None and not set(of) & set(asked):
            raise InputError(
                f"--{name.replace('_', '-')}: expected it with {' or '.join(of)}, got {value} without; add "
                f"{'one of them' if len(of) > 1 else 'that'}, or leave it out"
            )
    if not asked:
        return
    if arguments.recipe is not None:
        _check_costs(arguments)
    for name in ("towards", "shares"):
        words = getattr(arguments, name)
        if words:
            raise InputError(
                f"--{name}: expected formats alone with {asked[0]}, got {' '.join(map(str, words))}; leave one of "
                "them out"
            )
    if arguments.trials is not None:
        raise InputError(
            f"--trials: expected none with {asked[0]}, whose formats draw nothing at random, got {arguments.trials}; "
            "leave it out"
        )
    if arguments.strengths is not None and arguments.corruptions is None:
        of_strengths = ",".join(f"{one:g}" for one in arguments.strengths) or "4"
        raise InputError(
            f"--strengths: expected --corruptions with it where {asked[0]} is, got none; name formats, such as "
            f"--corruptions quantization={of_strengths}"
        )
    if arguments.corruptions is None:
        check_constraint_flags(arguments, [])


def _check_costs(arguments: argparse.Namespace) -> None:
    """Refuse a recipe by costs that will not be known.

    Raises:
        InputError: It is such a one.
    """
    by, drop = arguments.choose_by, "drop" in arguments.recipe
    if drop and by in SCORES:
        raise InputError(
            f"--choose-by: expected a metric with --recipe drop=N, got the score {by!r}; name a metric, or give loss=N"
        )
    if by == "second_order" and not arguments.probes:
        raise InputError(
            "--choose-by: expected --probes with second_order, which they estimate, got none; add --probes 1, say"
        )
    if arguments.cells == 0 and (drop or by not in (None, *SCORES)):
        asked = "--recipe drop=N" if by is None else f"--choose-by {by}"
        raise InputError(
            f"--cells: expected 1 or more with {asked}, which is of what was measured, got 0; measure some, or choose "
            f"by one of {', '.join(SCORES[:-1])}, with bits=N or loss=N"
        )


def _check_name(by: str | None, subject: Subject) -> None:
    """Refuse to choose by a metric that is not found on the first batch, before all of them are walked through.

    Raises:
        InputError: There is no such metric.
    """
    import torch

    from hf_parcor.evaluation import BatchMetric
    from hf_parcor.records.sensitivity import DIVERGENCE

    metric = subject.metric
    if by in (None, DIVERGENCE, *SCORES) or not isinstance(metric, BatchMetric):
        return
    with torch.random.fork_rng(devices=[]):
        part = metric.of_batch(subject.model, next(iter(metric.batches)))
    try:
        found = metric.combine([part])
    except (ValueError, ArithmeticError):  # of a score that has to see more than this batch
        return
    if by not in found:
        known = [*found, DIVERGENCE, *SCORES]
        raise InputError(
            f"--choose-by: expected one of {', '.join(known)}, got {by!r}{nearest(by, known)}; name a metric that is "
            "measured, or a score"
        )


def choose(arguments: argparse.Namespace, groups_of: Callable[[Any], Any]) -> None:
    """Score, measure, choose, measure what was chosen, and write it all down.

    Args:
        arguments: Those of `Probe`.
        groups_of: Returns the parts of a model by name; None for the default.

    Raises:
        InputError: A user's mistake, such as a budget that cannot be met.
    """
    check_sources(arguments)
    rows, given = read_data(arguments)
    folder = output_folder(arguments.output_dir)
    from hf_parcor.evaluation import CheckpointError, NotEnoughMemoryError
    from hf_parcor.indicators import FORMATS
    from hf_parcor.recipes import check_bits, export_recipe, front, measure_pairs, measure_recipes, recipe
    from hf_parcor.reports import RecipeReport

    formats: Any = FORMATS if arguments.corruptions is None else asked_for(arguments)

    def in_reach(subject: Subject, known: SensitivityRecord) -> None:
        if "bits" in arguments.recipe:
            with refused(ValueError):
                check_bits(known, arguments.recipe["bits"])
        _check_name(arguments.choose_by, subject)

    checkpoints = [checkpoint_in(folder, name) for name in (SENSITIVITY, MEASURED, PAIRS)]
    with redirect_stdout(sys.stderr), going_on(how_to_go_on(checkpoints[0])):
        subject, how, scores = scored(
            arguments, (rows, given), groups_of, formats, arguments.cells, checkpoints[0], in_reach
        )
        stated = {"greater_is_better": arguments.greater_is_better, "unit": arguments.unit}
        with refused(ValueError, ImportError):
            chosen = recipe(scores, by=arguments.choose_by, **arguments.recipe)
            beside = front(scores, chosen)
        with refused(CheckpointError, NotEnoughMemoryError):
            measured = measure_recipes(subject.model, subject.metric, beside, checkpoint=checkpoints[1], **how)
            chosen = measure_pairs(
                subject.model,
                subject.metric,
                scores,
                chosen,
                pairs=_PAIRS if arguments.pairs is None else arguments.pairs,
                checkpoint=checkpoints[2],
                **how,
            )
        measured = measured.stating(scores.metric, **stated).told(scores.flags)
    if not speaks():
        return
    with refused(ImportError):
        report = RecipeReport(scores, chosen, measured)
    if folder is not None:
        with writing():
            scores.save(folder / SENSITIVITY)
            measured.save(folder / MEASURED)
            exports = export_recipe(chosen, folder)
            report = RecipeReport(scores, chosen, measured, files=[path.name for path in exports.files])
            report.to_html(folder / PAGE)
            report.to_markdown((folder / PAGE).with_suffix(".md"))
        tell(
            f"the page is {folder / PAGE}; the recipe is in {', '.join(path.name for path in exports.files)} beside it"
        )
        for sentence in exports.missing:
            tell(f"not written: {sentence}")
        for sentence in exports.notes:
            tell(sentence)
    show_answer(chosen, report, as_json=arguments.json)


def scored(
    arguments: argparse.Namespace,
    data: tuple[Rows, dict[str, str]],
    groups_of: Callable[[Any], Any],
    formats: Any,
    budget: int | None,
    checkpoint: Path | None,
    check: Callable[[Subject, SensitivityRecord], None] | None = None,
) -> tuple[Subject, dict[str, Any], SensitivityRecord]:
    """Return what the flags name, how it is measured, and what each format costs each part.

    Args:
        arguments: Those of `Probe`.
        data: Rows and columns, as `read_data` returns them.
        groups_of: Returns the parts of a model by name; None for the default.
        formats: As in `sensitivity`.
        budget: As in `sensitivity`.
        checkpoint: As in `sensitivity`.
        check: Called with what the flags name and what is going to be scored, before that is done; None for nothing.

    Raises:
        InputError: A user's mistake.
    """
    from hf_parcor.cli.subject import find_device, load_subject
    from hf_parcor.evaluation import CheckpointError, NotEnoughMemoryError, NotFiniteError
    from hf_parcor.indicators import sensitivity, unscored
    from hf_parcor.targets import TargetError

    saved_on = None if arguments.saved_on is None else find_device(arguments.saved_on, "--saved-on")
    subject = load_subject(arguments, *data)
    how = subject.settings(progress=not arguments.quiet, saved_on=saved_on)
    with refused(ValueError, TypeError):
        groups = groups_of(subject.model)
    if check is not None:
        with refused(TargetError, TypeError):
            known = unscored(subject.model, formats, groups)
        check(subject, known)
    with refused(CheckpointError, NotEnoughMemoryError, NotFiniteError, TargetError, TypeError):
        scores = sensitivity(
            subject.model,
            subject.metric,
            formats,
            groups,
            budget=budget,
            probes=arguments.probes or 0,
            seed=arguments.seed,
            checkpoint=checkpoint,
            **how,
        )
    metric = subject.shown(scores.clean)
    scores = scores.stating(metric, greater_is_better=arguments.greater_is_better, unit=arguments.unit)
    return subject, how, replace(scores, flags=subject.told)
