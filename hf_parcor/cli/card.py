"""`hf-parcor card`: a model card from the record of a run, here and on the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hf_parcor.cli.command import Command
from hf_parcor.cli.errors import refused
from hf_parcor.cli.options import add_meaning
from hf_parcor.cli.parser import Parser
from hf_parcor.input_error import InputError

if TYPE_CHECKING:
    from hf_parcor.model_card import ModelFacts


class Card(Command):
    """Writes robustness on a model card."""

    summary = "write robustness on the model card of a run; push it to the Hub"
    usage = "RUN_DIR [flags]"
    example = "robustness --base-model bert-base-cased --dry-run"

    def add_arguments(self, parser: Parser) -> None:
        """Add what `--help` shows."""
        parser.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="the folder of a model, with its records")
        group = parser.add_argument_group("what the record does not say; default: what the last card said")
        group.add_argument("--seeds", nargs="*", default=[], metavar="DIR", help="runs of the same with other seeds")
        group.add_argument("--name", metavar="NAME", help="of the model; default: that of the folder")
        group.add_argument("--base-model", metavar="NAME", help="the model on the Hub that it was made from")
        group.add_argument("--datasets", nargs="*", metavar="NAME", help="data on the Hub that it was trained on")
        group.add_argument("--evaluated-on", metavar="NAME", help="data on the Hub of the metrics")
        group.add_argument("--dataset-config", metavar="NAME", help="their configuration")
        group.add_argument("--split", metavar="NAME", help="their split")
        group.add_argument("--task", metavar="TASK", help="such as text-classification; default: by the head")
        group.add_argument(
            "--benchmark-task",
            metavar="ID",
            help="the data set is a registered benchmark, and the clean result is for this task of its eval.yaml",
        )
        group.add_argument("--metric", metavar="NAME", help="what the card shows; default: accuracy, or the first")
        add_meaning(group)
        group.add_argument("--command", metavar="TEXT", help="what made the numbers; it is published")
        group = parser.add_argument_group("the Hub; the token is that of `hf auth login`, or HF_TOKEN")
        group.add_argument("--push", metavar="REPO_ID", help="also update the card of this model on the Hub")
        group.add_argument("--results-only", action="store_true", help="there, add results to the metadata alone")
        group.add_argument("--only", nargs="*", metavar="LABEL", help="with --results-only, of these corruptions")
        group.add_argument("--create-pr", action="store_true", help="there, open a pull request instead")
        group.add_argument("--revision", metavar="NAME", help="there, the branch")
        parser.add_argument("--dry-run", action="store_true", help="change nothing, and print the difference")

    def run(self, arguments: argparse.Namespace) -> None:
        """Write the card, or show what would change."""
        from hf_parcor.cli.card_facts import facts_of_run

        folder = _folder(arguments)
        _check_flags(arguments)
        with refused(OSError, ValueError, ImportError):
            facts = facts_of_run(arguments, folder)
        with refused(OSError, ValueError):
            if arguments.push is None or not (arguments.dry_run or arguments.results_only):
                _write(facts, folder, dry_run=arguments.dry_run)
            if arguments.push is not None:
                _push(facts, arguments)


def _check_flags(arguments: argparse.Namespace) -> None:
    if arguments.push is None and (arguments.create_pr or arguments.results_only or arguments.revision):
        raise InputError("--push: expected a model on the Hub, got none beside flags for it; add --push REPO_ID")
    if arguments.only is not None and not arguments.results_only:
        raise InputError("--only: expected --results-only beside it, got none; add it, or leave --only out")


def _write(facts: ModelFacts, folder: Path, *, dry_run: bool) -> None:
    """Write the card and print its path, or print what would change."""
    from hf_parcor.model_card import write_card
    from hf_parcor.model_card.commit import difference
    from hf_parcor.model_card.folder import CARD, card_of, files_beside, read_text

    if dry_run:
        before = read_text(folder / CARD)
        print(difference(before, card_of(facts, files_beside(facts), before)), end="")
    else:
        print(write_card(folder, facts))


def _push(facts: ModelFacts, arguments: argparse.Namespace) -> None:
    """Push the card, or results alone, and print where it is, or what would change."""
    from hf_parcor.model_card import Destination, push_card, push_results

    push = push_results if arguments.results_only else push_card
    options = {name: getattr(arguments, name) for name in ("revision", "create_pr", "dry_run")}
    published = push(facts, Destination(arguments.push, **options))
    print(published.difference if arguments.dry_run else published.url or "nothing has changed")


def _folder(arguments: argparse.Namespace) -> Path:
    if arguments.run_dir is None:
        raise InputError("RUN_DIR: expected the folder of a run, got none; name one")
    folder = Path(arguments.run_dir)
    if not folder.is_dir():
        raise InputError(f"RUN_DIR: expected a folder, got {folder}; name the folder that holds the records")
    return folder
