"""`hf-parcor probe`: which part of a model is fragile?"""

from __future__ import annotations

import argparse

from hf_parcor.cli.evaluate import asked_for, measure
from hf_parcor.cli.parsing import Command, Parser, add_corruptions, add_running, add_subject, add_target_modules
from hf_parcor.cli.terminal import PROBE

GROUPS = ("layers", "kinds", "modules", "adapters")
_STRENGTHS = (0.1, 0.2, 0.5)


class Probe(Command):
    """Corrupts one part of a model after the other."""

    summary = "corrupt one part after the other: which one is fragile?"
    usage = "MODEL --dataset DATA [flags]"
    example = (
        "distilbert/distilbert-base-uncased-finetuned-sst-2-english \\\n"
        "      --dataset stanfordnlp/sst2 --split validation \\\n"
        "      --group layers --strengths 0.1 0.2 0.5"
    )

    def add_arguments(self, parser: Parser) -> None:
        """Add what `--help` shows."""
        add_subject(parser)
        group = parser.add_argument_group("parts")
        group.add_argument("--group", choices=GROUPS, metavar="GROUP", help=f"{', '.join(GROUPS)}; default: layers")
        add_target_modules(group, "parts of your own, each probed by itself")
        add_corruptions(parser, f"gradient, at {' '.join(map(str, _STRENGTHS))}")
        add_running(parser)

    def run(self, arguments: argparse.Namespace) -> None:
        """Measure, and show the record."""
        from hf_parcor import targets
        from hf_parcor.evaluation import LayerProbe

        groupings = {
            "layers": targets.by_layer,
            "kinds": targets.by_kind,
            "modules": targets.by_module,
            "adapters": targets.by_adapter,
        }
        own = {name: [name] for name in arguments.target_modules or ()}
        group = arguments.group or (None if own else "layers")
        measure(
            arguments,
            asked_for(arguments, _STRENGTHS),
            PROBE,
            lambda subject, how: LayerProbe(
                subject.model,
                subject.metric,
                targets={**(groupings[group](subject.model) if group else {}), **own},
                **how,
            ),
        )
