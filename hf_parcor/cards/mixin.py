"""A Trainer whose model card says how robust the model is, and loses nothing that a person wrote."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeAlias

from huggingface_hub import CommitOperationDelete, HfApi
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from hf_parcor.cards.facts import ModelFacts, facts_of
from hf_parcor.cards.folder import CARD, card_of, files_beside, is_ours, read_text, write_files
from hf_parcor.cards.front_matter import unmeasured_metadata, values_of
from hf_parcor.cards.hub import HTTP_ERROR, card_on_hub, paths_in
from hf_parcor.cards.text import Card, read_card, unmeasured_section, updated_card, with_metadata
from hf_parcor.distributed.fsdp import drop_gathered
from hf_parcor.evaluation import RobustnessMixin
from hf_parcor.evaluation.identity.fingerprint import fingerprint_of_weights
from hf_parcor.overriding import overriding
from hf_parcor.records import EvaluationRecord
from hf_parcor.records.data import EvaluationData, named_on_hub
from hf_parcor.strict_json import replace_text

Results: TypeAlias = Mapping[str, EvaluationRecord]


class _Measured(NamedTuple):
    weights: str
    results: Results


class MeasuredWeights:
    """The results of the last measured step, and of the best step, which `load_best_model_at_end` returns to.

    All others are dropped, so that a long training keeps two. Results belong to weights, not to steps: those of a step
    count only if the weights are the same.
    """

    def __init__(self) -> None:
        self._by_step: dict[int, _Measured] = {}

    def keep(self, state: TrainerState, weights: str, results: Results, *, instead: bool) -> None:
        """Keep results.

        Args:
            state: The Trainer's state, with the current step and the best one so far.
            weights: Fingerprint of the weights.
            results: Records by the prefix of their metrics.
            instead: Whether they replace the known results of the same weights; otherwise they are added.
        """
        last = self._by_step.pop(state.global_step, None)
        known = {} if instead or last is None or last.weights != weights else last.results
        self._by_step = {step: one for step, one in self._by_step.items() if step == state.best_global_step}
        self._by_step[state.global_step] = _Measured(weights, {**known, **results, **known})

    def of(self, weights: str) -> Results:
        """Return the last results kept for these weights; empty if they were not measured."""
        found = [one.results for one in self._by_step.values() if one.weights == weights]
        return found[-1] if found else {}


logger = logging.get_logger(__name__)

_TRAINING = re.compile(r"^## Training (?:procedure|Details)$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


class PublishingMixin(RobustnessMixin):
    """Gives any Trainer a card with the last robustness evaluation, here and on the Hub; put it before its class.

    `create_model_card` extends that of the Trainer:

    - If there is no card, the Trainer's own is written, with our section at its end. As long as nobody edits it, it is
      written anew each time.
    - An existing card (a person's, PEFT's, or that of the Hub) is kept byte for byte. Our section gets the part on
      training that the Trainer would have written; missing metadata are added.
    - Results of `evaluate_robustness` or a `RobustnessCallback` are shown only for the measured weights, also if
      `load_best_model_at_end` restored them. After further training the card says that robustness is unknown. For the
      same weights, results of `evaluate_robustness` take precedence, and those that `show_on_card` was given.

    Before each push, including those that `hub_strategy` makes during training, a card that a person changed on the
    Hub is copied here. If a person changed the local card too, the local card is pushed, and a warning says where to
    find the other one. As with the Trainer, a push during training creates no card; an existing card is updated with
    what is known about the pushed weights.

    The mixin includes `evaluate_robustness`, and is one of the bases of `ParameterDefenseTrainer`.

    Examples:
        >>> from transformers import Trainer
        >>> from hf_parcor import ParameterDefenseMixin
        >>> class PublishingTrainer(ParameterDefenseMixin, PublishingMixin, Trainer):
        ...     pass
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._measured = MeasuredWeights()
        super().__init__(*args, **kwargs)

    @property
    def _defense_values(self) -> Mapping[str, Any] | None:
        """The defense as the card shows it; None for none."""
        return None

    def evaluate_robustness(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as `RobustnessMixin.evaluate_robustness` does, and keep the results for the card."""
        metrics = super().evaluate_robustness(*args, **kwargs)
        self.show_on_card(self.robustness_records)
        return metrics

    def show_on_card(self, records: Mapping[str, EvaluationRecord]) -> None:
        """Let the card say what was measured of the current weights, say by an evaluator that is not the Trainer's.

        Args:
            records: What was measured, by the prefix of its metrics; in place of what is known of these weights.
        """
        self._keep(records, instead=True)

    def robustness_was_measured(self, prefix: str, record: EvaluationRecord) -> None:
        """Keep the record of a `RobustnessCallback` for the card."""
        super().robustness_was_measured(prefix, record)
        self._keep({prefix: record}, instead=False)

    def _keep(self, measured: Mapping[str, EvaluationRecord], *, instead: bool) -> None:
        if self.is_world_process_zero() and self.model is not None:
            self._measured.keep(self.state, _weights_here(self.model), measured, instead=instead)

    def robustness_facts(self, model_name: str = "", dataset: str = "") -> ModelFacts | None:
        """Return what the card says about the current weights; None if they were not measured.

        Args:
            model_name: Name of the model. By default, the name of the output folder.
            dataset: Name on the Hub of the evaluation data. By default, the name that the data set states.
        """
        if self.model is None:
            return None
        results = self._measured.of(_weights_here(self.model))
        if not results:
            return None
        if len(results) > 1:
            logger.warning(f"The card shows the robustness of {next(iter(results))} alone, not of all {len(results)}.")
        record = next(iter(results.values()))
        data = record.evaluated_on or EvaluationData()
        return facts_of(
            record,
            name=model_name or folder_of(self.args).name,
            base_model=base_model_of(self.model),
            evaluated_on=named_on_hub(data, dataset) if dataset else data,
            defense=self._defense_values,
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's card, or update the existing one, with the last robustness evaluation.

        Raises:
            ValueError: The existing card cannot be updated; see `updated_card`. Nothing was written.
        """
        if not self.is_world_process_zero():
            return
        folder = folder_of(self.args)
        theirs = read_text(folder / CARD)
        card = read_card(theirs)
        with TemporaryDirectory() as temporary:
            # Elsewhere, since the Trainer overwrites what is there.
            place = Path(temporary) / folder.name
            place.mkdir()
            with overriding(self.args, output_dir=str(place)):
                super().create_model_card(*args, **kwargs)
            written = read_text(place / CARD)
            (place / CARD).unlink(missing_ok=True)
            shutil.copytree(place, folder, dirs_exist_ok=True)  # the pictures of other people's cards
        generated = not theirs or card.is_generated
        training = "" if generated else _training_part(written)
        text = written if generated else _with_metadata_of(written, theirs)
        names = {name: kwargs.get(name) for name in ("model_name", "dataset_tags")}
        facts = self.robustness_facts(*(value if isinstance(value, str) else "" for value in names.values()))
        self._write_card(text, facts, training=training, generated=generated)

    def _write_card(self, text: str, facts: ModelFacts | None, *, training: str = "", generated: bool) -> None:
        """Write a card into the Trainer's folder, with what lies beside it, in place of what lay there of ours."""
        folder = folder_of(self.args)
        if facts is None:
            section = unmeasured_section(self._defense_values, training=training)
            metadata = unmeasured_metadata(self._defense_values)
            write_files(folder, updated_card(text, section, metadata, generated=generated), {})
        else:
            files = files_beside(facts)
            write_files(folder, card_of(facts, files, text, training=training, generated=generated), files)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push as the Trainer does, but first copy here a card that a person changed on the Hub."""
        there: list[str] = []
        given = {} if private is None else {"private": private}  # Transformers knows it since 5.23
        if self.is_world_process_zero():
            token = token if token is not None else self.args.hub_token
            if getattr(self, "hub_model_id", None) is None:
                self.init_hf_repo(token=token, **given)
            self._finish_current_push()
            there = self._take_card_of_hub(HfApi(token=token), revision or self.args.hub_revision)
        pushed = super().push_to_hub(commit_message, blocking, token, revision, **given, **kwargs)
        self._remove_old_results(HfApi(token=token), revision or self.args.hub_revision, there)
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push as the Trainer does while it trains, unless the card on the Hub cannot be kept."""
        last: Any = self.push_in_progress
        busy = last is not None and not last.is_done()
        asked = self.args.hub_strategy != HubStrategy.END and (self.args.hub_always_push or not busy)
        if not asked or not self.is_world_process_zero() or self._card_is_ready():
            super()._push_from_checkpoint(checkpoint_folder)

    def _card_is_ready(self) -> bool:
        """Let the card be that of the Hub, with what is known of the weights of now; say whether that went well."""
        api, revision = HfApi(token=self.args.hub_token), self.args.hub_revision
        path = folder_of(self.args) / CARD
        try:
            there = self._take_card_of_hub(api, revision)
            if path.exists():
                text = read_text(path)
                facts = self.robustness_facts(str(self.hub_model_id).rpartition("/")[2])
                self._write_card(text, facts, generated=read_card(text).is_generated)
                self._remove_old_results(api, revision, there)
        except (OSError, ValueError, HTTP_ERROR) as error:  # no reason to end a training
            logger.warning(
                f"{self.hub_model_id}: expected to keep its card, got {type(error).__name__}: {error}. Nothing is "
                "pushed at this step, so that nothing is overwritten."
            )
            return False
        return True

    def _remove_old_results(self, api: HfApi, revision: str | None, there: Iterable[str]) -> None:
        """Remove from the Hub what lies beside the card there, and no more here: it is of other weights."""
        old = [name for name in there if is_ours(name) and not (folder_of(self.args) / name).exists()]
        if old:
            operations = [CommitOperationDelete(name) for name in old]
            message = "Results of other weights"
            api.create_commit(str(self.hub_model_id), operations, commit_message=message, revision=revision)

    def _take_card_of_hub(self, api: HfApi, revision: str | None) -> list[str]:
        """Let the card here be that of the Hub, unless a person changed this one, and return the files there."""
        path = folder_of(self.args) / CARD
        repo_id = str(self.hub_model_id)
        there, info = card_on_hub(api, repo_id, revision)
        here = read_text(path)
        if not there or there == here:
            return paths_in(info)
        if not here or read_card(here).is_untouched:
            replace_text(path, there)
        elif _around(read_card(there)) != _around(read_card(here)) and not read_card(there).is_untouched:
            logger.warning(
                f"{path} and the card of {repo_id} were both changed by hand. The first is pushed; the other stays in "
                f"the history of the repository, at {info.sha}."
            )
        return paths_in(info)


def _weights_here(model: nn.Module) -> str:
    """Return a fingerprint of what this process holds: the one that writes cards must not wait for others."""
    drop_gathered(model)
    return fingerprint_of_weights(model, gather=False)


def base_model_of(model: nn.Module) -> str:
    """Return the name on the Hub of the model that this one was made from; "" for a folder, or where none is said."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return "" if not name or Path(name).is_absolute() or Path(name).is_dir() else name


def folder_of(arguments: TrainingArguments) -> Path:
    """Return the folder of a Trainer's card."""
    return Path(arguments.output_dir or ".").absolute()


def _with_metadata_of(written: str, theirs: str) -> str:
    """Return their card, with what the Trainer would have said in the front matter, but for its results."""
    values = values_of(read_card(written).front_matter)
    values.pop("model-index", None)  # ours are in our section; those of earlier runs would pile up
    return with_metadata(theirs, values)


def _training_part(written: str) -> str:
    """Return how the model was trained, of a Trainer's card, its headings below ours."""
    found = _TRAINING.search(written.replace("\r\n", "\n"))
    return re.sub(r"^##", "###", found.group().strip(), flags=re.MULTILINE) if found else ""


def _around(card: Card) -> tuple[str, str]:
    return card.before.strip(), card.after.strip()
