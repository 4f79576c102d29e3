"""`hf-parcor probe`: which part of a model is fragile?"""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout

from hf_parcor.cli.parsing import Command, Parser, add_corruptions, add_running, add_subject, add_target, one_of
from hf_parcor.cli.terminal import going_on, refused

GROUPS = ("layers", "kinds", "modules", "adapters")
_EPSILONS = (0.1, 0.2, 0.5)


class Probe(Command):
    """Corrupts one part of a model after the other."""

    summary = "corrupt one part after the other: which one is fragile?"
    usage = "MODEL --dataset DATA [flags]"
    example = (
        "distilbert/distilbert-base-uncased-finetuned-sst-2-english \\\n"
        "      --dataset stanfordnlp/sst2 --split validation \\\n"
        "      --group layers --epsilons 0.1 0.2 0.5"
    )

    def add_arguments(self, parser: Parser) -> None:
        """Add what `--help` shows."""
        add_subject(parser)
        group = parser.add_argument_group("parts")
        group.add_argument(
            "--group", type=one_of(GROUPS), metavar="GROUP", help=f"{', '.join(GROUPS)}; default: layers"
        )
        add_target(group, "parts of your own, each probed by itself")
        add_corruptions(parser, f"gradient, at {' '.join(map(str, _EPSILONS))}")
        add_running(parser)

    def run(self, arguments: argparse.Namespace) -> None:
        """Measure, and show the record."""
        from hf_parcor import targets
        from hf_parcor.cli.evaluate import asked_for
        from hf_parcor.cli.report import PROBE
        from hf_parcor.cli.subject import load_subject
        from hf_parcor.cli.terminal import how_to_go_on, output_folder, show
        from hf_parcor.evaluation import CheckpointError, LayerProbe
        from hf_parcor.reports import RobustnessReport
        from hf_parcor.reports.terminal_tables import group_table

        groupings = {
            "layers": targets.by_layer,
            "kinds": targets.by_kind,
            "modules": targets.by_module,
            "adapters": targets.by_adapter,
        }
        corruptions = asked_for(arguments, _EPSILONS)
        folder = output_folder(arguments)
        checkpoint = None if folder is None else folder / "probe.jsonl"
        with redirect_stdout(sys.stderr), going_on(how_to_go_on(checkpoint)):
            subject = load_subject(arguments)
            with refused(ValueError, TypeError):
                chosen = arguments.group or (None if arguments.target else "layers")
                parts: targets.Groups = groupings[chosen](subject.model) if chosen else {}
                parts |= {name: [name] for name in arguments.target or ()}
                probe = LayerProbe(
                    subject.model,
                    subject.metric,
                    subject.batches,
                    targets=parts,
                    progress=not arguments.quiet,
                    evaluated_on=subject.data,
                    task=subject.task,
                )
            with refused(CheckpointError):
                sweep = probe.evaluate(corruptions, arguments.trials, arguments.seed, checkpoint=checkpoint)
        metric = subject.shown(sweep.clean.metrics)
        sweep = sweep.stating(metric, greater_is_better=arguments.greater_is_better, unit=arguments.unit)
        with refused(ImportError):
            report = RobustnessReport(sweep.records, metric)
            table = group_table(sweep.records, metric)
        show(arguments, sweep, report, table, PROBE)
