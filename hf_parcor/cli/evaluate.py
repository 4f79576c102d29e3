"""`hf-parcor evaluate`: how far do a model's metrics fall? And corruptions from words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from hf_parcor.cli.flags import (
    NORM,
    OF_SUBJECT,
    STRENGTH_ELSEWHERE,
    add_corruptions,
    add_loading,
    add_running,
    add_subject,
    add_target_modules,
    add_windows,
)
from hf_parcor.cli.parsing import Command, Parser
from hf_parcor.cli.sources import check_sources, read_data
from hf_parcor.cli.terminal import ROBUSTNESS, checkpoint_in, going_on, how_to_go_on, output_folder, refused, show
from hf_parcor.errors import InputError

if TYPE_CHECKING:
    from hf_parcor.cli.subject import Subject
    from hf_parcor.corruptions import Corruption
    from hf_parcor.evaluation import CorruptionEvaluator, LayerProbe


class Evaluate(Command):
    """Corrupts a model, or the modules that are named."""

    summary = "corrupt a model, or modules: how far do its metrics fall?"
    usage = "MODEL --dataset DATA [flags]"
    example = (
        "\\\n      distilbert/distilbert-base-uncased-finetuned-sst-2-english \\\n"
        "      --dataset stanfordnlp/sst2 --output-dir robustness \\\n"
        "      --corruptions gradient=0.1,0.2 quantization=4"
    )

    spellings = OF_SUBJECT
    other_names = STRENGTH_ELSEWHERE

    def add_arguments(self, parser: Parser) -> None:
        """Add what `--help` shows."""
        add_subject(parser)
        add_windows(parser)
        add_loading(parser)
        group = parser.add_argument_group("modules")
        add_target_modules(group, "only these (by default those that are trained, of a PEFT model its adapters)")
        group.add_argument("--exclude-modules", nargs="+", metavar="NAME", help="but not these, named in the same way")
        add_corruptions(parser, "the kinds of paper 2, Table 1, and bit flips")
        add_running(parser)

    def run(self, arguments: argparse.Namespace) -> None:
        """Measure, and show the record."""
        targets = {name: getattr(arguments, name) for name in ("target_modules", "exclude_modules")}

        def corruptions() -> list[Corruption]:
            from hf_parcor.corruptions import corruptions_of_table_1

            if arguments.corruptions is not None or arguments.strengths is not None:
                return asked_for(arguments)
            check_constraint_flags(arguments, [])
            return corruptions_of_table_1()

        def build(subject: Subject, how: dict[str, Any]) -> CorruptionEvaluator:
            from hf_parcor.evaluation import CorruptionEvaluator

            return CorruptionEvaluator(subject.model, subject.metric, **targets, **how)

        measure(arguments, corruptions, ROBUSTNESS, build)


def measure(
    arguments: argparse.Namespace,
    corruptions: Callable[[], Sequence[Corruption]],
    name: str,
    build: Callable[[Subject, dict[str, Any]], CorruptionEvaluator | LayerProbe],
) -> None:
    """Measure what the flags name, keep the record and its pages, and show them.

    Args:
        arguments: Those of `add_subject`, `add_corruptions` and `add_running`.
        corruptions: Returns what is applied.
        name: Of the record's file; checkpoint and pages differ from it in the suffix.
        build: Returns what measures a subject, with the settings that it is to pass on.
    """
    check_sources(arguments)
    rows, given = read_data(arguments)
    folder = output_folder(arguments.output_dir)
    checkpoint = checkpoint_in(folder, name)
    others_alone = bool(arguments.towards) and arguments.corruptions is None and arguments.strengths is None
    applied = [] if others_alone else list(corruptions())
    check_other_models(arguments, alone=others_alone)
    from hf_parcor.cli.subject import find_device, load_subject, other_models
    from hf_parcor.evaluation import CheckpointError, NotEnoughMemoryError

    with redirect_stdout(sys.stderr), going_on(how_to_go_on(checkpoint)):
        saved_on = None if arguments.saved_on is None else find_device(arguments.saved_on, "--saved-on")
        subject = load_subject(arguments, rows, given)
        applied += other_models(arguments, subject)
        with refused(ValueError, TypeError, NotImplementedError):
            evaluator = build(subject, subject.settings(progress=not arguments.quiet, saved_on=saved_on))
            evaluator.check(applied)
        with refused(CheckpointError, NotEnoughMemoryError):
            record = evaluator.evaluate(applied, arguments.trials, arguments.seed, checkpoint=checkpoint)
    metric = subject.shown(record.clean.metrics)
    record = record.stating(metric, greater_is_better=arguments.greater_is_better, unit=arguments.unit)
    record = record.told(subject.told)
    show(record, metric, folder and folder / name, as_json=arguments.json)


def asked_for(arguments: argparse.Namespace, strengths: Sequence[float] = ()) -> list[Corruption]:
    """Return the corruptions that the command line asks for.

    Args:
        arguments: Those of `add_corruptions`; without `--corruptions` the corruption is gradient-based.
        strengths: Without `--strengths`.

    Raises:
        InputError: As `read_corruptions`, and as `check_constraint_flags`.
    """
    from hf_parcor.corruptions.catalogue import read_corruptions

    words = ["gradient"] if arguments.corruptions is None else arguments.corruptions
    given = strengths if arguments.strengths is None else arguments.strengths
    found = read_corruptions(words, given, arguments.norm, arguments.top_n)
    if arguments.strengths and all("=" in word.partition(":")[0] for word in words):
        raise InputError(
            f"--strengths: expected one of --corruptions without strengths of its own, got {' '.join(words)!r} beside "
            f"{' '.join(f'{one:g}' for one in arguments.strengths)}; leave one of them out"
        )
    check_constraint_flags(arguments, found)
    return found


def check_other_models(arguments: argparse.Namespace, *, alone: bool) -> None:
    """Refuse flags that say nothing with `--towards`, or without it.

    Args:
        arguments: Those of `add_corruptions`.
        alone: Whether nothing else is applied.

    Raises:
        InputError: There is such a flag.
    """
    if arguments.shares and not arguments.towards:
        given = " ".join(f"{one:g}" for one in arguments.shares)
        raise InputError(f"--shares: expected --towards with it, got {given} alone; name the other model")
    for flag, words in {"--towards": arguments.towards, "--shares": arguments.shares}.items():
        twice = next((one for one in words or () if words.count(one) > 1), None)
        if twice is not None:
            raise InputError(f"{flag}: expected each once, got {twice} twice; leave one out")
    if alone:
        check_constraint_flags(arguments, [])


def check_constraint_flags(arguments: argparse.Namespace, applied: Sequence[Corruption]) -> None:
    """Refuse `--norm` and `--top-n` where no corruption that is asked for has a constraint.

    Raises:
        InputError: There is such a flag.
    """
    if any(hasattr(corruption, "constraint") for corruption in applied):
        return
    given = {"--norm": None if arguments.norm == NORM else f"{arguments.norm:g}", "--top-n": arguments.top_n}
    for flag, value in given.items():
        if value is not None:
            beside = ", ".join(map(str, applied)) or "the default corruptions, which have their own"
            raise InputError(
                f"{flag}: expected --corruptions of a given radius with it, such as gradient=0.1, got {value} beside "
                f"{beside}; name one, or leave it out"
            )
