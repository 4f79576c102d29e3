"""`hf-parcor probe`: which part of a model is fragile?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from hf_parcor.cli.evaluate import asked_for, measure
from hf_parcor.cli.flags import (
    OF_SUBJECT,
    STRENGTH_ELSEWHERE,
    TRIALS,
    add_corruptions,
    add_loading,
    add_running,
    add_subject,
    add_target_modules,
    add_windows,
)
from hf_parcor.cli.parsing import Command, Parser
from hf_parcor.cli.quick import add_quick, first_look
from hf_parcor.cli.recipe import add_recipe, check_flags, choose
from hf_parcor.cli.terminal import PROBE

if TYPE_CHECKING:
    from hf_parcor.cli.subject import Subject
    from hf_parcor.evaluation import LayerProbe

GROUPS = ("layers", "kinds", "modules", "adapters")  # those of `hf_parcor.targets`, which would load PyTorch
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

    spellings: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            **OF_SUBJECT,
            **{f"by_{one.removesuffix('s')}": f"--group {one}" for one in GROUPS},
            **{"bits": "--recipe", "by": "--choose-by", "formats": "--corruptions", "budget": "--cells"},
        }
    )

    other_names = STRENGTH_ELSEWHERE

    def add_arguments(self, parser: Parser) -> None:
        """Add what `--help` shows."""
        add_subject(parser)
        add_windows(parser)
        add_loading(parser)
        group = parser.add_argument_group("parts")
        group.add_argument(
            "--group",
            choices=GROUPS,
            metavar="GROUP",
            help=f"{', '.join(GROUPS)}; default: layers (embeddings and heads are in none), and with --recipe each "
            "linear module",
        )
        add_target_modules(group, "parts of your own, each probed by itself")
        add_corruptions(parser, f"gradient, at {' '.join(map(str, _STRENGTHS))}")
        add_quick(parser)
        add_recipe(parser)
        add_running(parser)
        parser.set_defaults(trials=None)  # so that one that was given is told from none

    def run(self, arguments: argparse.Namespace) -> None:
        """Measure, and show the record."""
        check_flags(arguments)
        if arguments.trials is None:
            arguments.trials = TRIALS
        own = {name: [name] for name in arguments.target_modules or ()}
        group = arguments.group or (None if own else "layers")
        if arguments.quick:
            first_look(arguments, lambda model: _parts(model, group, own))
        elif arguments.recipe is None:
            self._probe(arguments, group, own)
        else:
            choose(arguments, lambda model: _parts(model, arguments.group, own) or None)

    def _probe(self, arguments: argparse.Namespace, group: str | None, own: Mapping[str, list[str]]) -> None:
        def build(subject: Subject, how: dict[str, Any]) -> LayerProbe:
            from hf_parcor.evaluation import LayerProbe

            return LayerProbe(subject.model, subject.metric, targets=_parts(subject.model, group, own), **how)

        measure(arguments, lambda: asked_for(arguments, _STRENGTHS), PROBE, build)


def _parts(model: Any, group: str | None, own: Mapping[str, list[str]]) -> Mapping[str, Any] | str:
    """Return the name of a grouping; or one's own parts of a model by name, with those of a grouping, if any."""
    if group is None or not own:
        return group or own
    from hf_parcor.targets import GROUPINGS

    return {**GROUPINGS[group](model), **own}
