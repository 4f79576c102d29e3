"""`hf-parcor evaluate`: how far do a model's metrics fall?"""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout

from hf_parcor.cli.command import Command
from hf_parcor.cli.errors import going_on, refused
from hf_parcor.cli.options import add_corruptions, add_running, add_subject, add_target
from hf_parcor.cli.parser import Parser


class Evaluate(Command):
    """Corrupts a model, or the modules that are named."""

    summary = "corrupt a model, or modules: how far do its metrics fall?"
    usage = "MODEL --dataset DATA [flags]"
    example = (
        "\\\n      distilbert/distilbert-base-uncased-finetuned-sst-2-english \\\n"
        "      --dataset stanfordnlp/sst2 --output robustness \\\n"
        "      --corruption gradient=0.1,0.2 quantization=4"
    )

    def add_arguments(self, parser: Parser) -> None:
        """Add what `--help` shows."""
        add_subject(parser)
        group = parser.add_argument_group("modules")
        add_target(group, "only these (default: all that are trained)")
        group.add_argument("--exclude", nargs="+", metavar="NAME", help="but not these, named in the same way")
        add_corruptions(parser, "those of paper 2, Table 1")
        add_running(parser)

    def run(self, arguments: argparse.Namespace) -> None:
        """Measure, and show the record."""
        from hf_parcor.cli.corruptions import asked_for
        from hf_parcor.cli.records import ROBUSTNESS
        from hf_parcor.cli.results import how_to_go_on, output_folder, show
        from hf_parcor.cli.subject import load_subject
        from hf_parcor.corruptions import corruptions_of_table_1
        from hf_parcor.evaluation import CheckpointError, CorruptionEvaluator
        from hf_parcor.report import RobustnessReport
        from hf_parcor.tables import comparison_table

        by_default = arguments.corruption is None and arguments.epsilons is None
        corruptions = corruptions_of_table_1() if by_default else asked_for(arguments)
        folder = output_folder(arguments)
        checkpoint = None if folder is None else folder / "robustness.jsonl"
        with redirect_stdout(sys.stderr), going_on(how_to_go_on(checkpoint)):
            subject = load_subject(arguments)
            with refused(ValueError, TypeError):
                evaluator = CorruptionEvaluator(
                    subject.model,
                    subject.metric,
                    subject.batches,
                    target_modules=arguments.target,
                    exclude_modules=arguments.exclude,
                    progress=not arguments.quiet,
                    evaluated_on=subject.data,
                    task=subject.task,
                )
            with refused(CheckpointError):
                record = evaluator.evaluate(corruptions, arguments.trials, arguments.seed, checkpoint=checkpoint)
        metric = subject.shown(record.clean.metrics)
        record = record.stating(metric, greater_is_better=arguments.greater_is_better, unit=arguments.unit)
        with refused(ImportError):
            report = RobustnessReport(record, metric)
            table = comparison_table({record.model: record}, metric)
        show(arguments, record, report, table, ROBUSTNESS)
