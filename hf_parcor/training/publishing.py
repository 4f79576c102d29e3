"""A Trainer whose model card says how robust the model is, and loses nothing that a person wrote."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from torch import nn
from transformers.utils import logging

from hf_parcor.evaluation.fingerprint import fingerprint_of_weights
from hf_parcor.model_card.card import Card, read_card, updated_card, with_metadata
from hf_parcor.model_card.commit import card_on_hub
from hf_parcor.model_card.facts import ModelFacts
from hf_parcor.model_card.folder import CARD, card_of, files_beside, read_text, write_files
from hf_parcor.model_card.front_matter import values_of
from hf_parcor.model_card.gathering import facts_of
from hf_parcor.model_card.metadata import unmeasured_metadata
from hf_parcor.model_card.section import unmeasured_section
from hf_parcor.monitoring import RobustnessMixin
from hf_parcor.sharding import drop_gathered
from hf_parcor.stored_record import replace_text
from hf_parcor.training.card_description import base_model_of, evaluation_data_of, task_of
from hf_parcor.training.overriding import overriding

logger = logging.get_logger(__name__)

_TRAINING = re.compile(r"^## Training (?:procedure|Details)$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


class PublishingMixin(RobustnessMixin):
    """Gives any Trainer a card with the last robustness evaluation; put it before the Trainer's class.

    `create_model_card` and `push_to_hub` are those of the Trainer, and then:

    - Where there is no card, the Trainer's own is written, with our section at its end. As long as nobody touches it,
      the Trainer writes it anew each time.
    - A card that is there, a person's, PEFT's, or that of the Hub, is kept byte for byte. Our section gets the part on
      training that the Trainer would have written; its metadata are added where they are missing.
    - What `evaluate_robustness` measured is said only of the weights that it measured: after more training the card
      says that it is not known.
    """

    _measured_weights: str | None = None

    @property
    def _defense_values(self) -> Mapping[str, Any] | None:
        """The defense as the card shows it; None for none."""
        return None

    def evaluate_robustness(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `RobustnessMixin.evaluate_robustness`; the card remembers of which weights this was."""
        metrics = super().evaluate_robustness(*args, **kwargs)
        if self.is_world_process_zero() and self.model is not None:
            self._measured_weights = _weights_here(self.model)
        return metrics

    def robustness_facts(self, model_name: str = "", dataset: str = "") -> ModelFacts | None:
        """Return what the card says of the weights as they are; None if they were not measured.

        Args:
            model_name: Name of the model; "" for that of the output folder.
            dataset: Name on the Hub of the evaluation data; "" for what the data set says of itself.
        """
        records = getattr(self, "robustness_records", {})
        if not records or self.model is None or self._measured_weights != _weights_here(self.model):
            return None
        if len(records) > 1:
            logger.warning(f"The card shows the robustness of {next(iter(records))} alone, not of all {len(records)}.")
        data = self.eval_dataset
        one = next(iter(data.values())) if isinstance(data, dict) else data
        return facts_of(
            next(iter(records.values())),
            name=model_name or _folder(self.args.output_dir).name,
            base_model=base_model_of(self.model),
            task=task_of(self.model),
            evaluated_on=evaluation_data_of(one, dataset),
            defense=self._defense_values,
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's card, or update the one that is there, with the last robustness evaluation.

        Raises:
            ValueError: The card that is there cannot be updated; see `updated_card`. Nothing was written.
        """
        if not self.is_world_process_zero():
            return
        folder = _folder(self.args.output_dir)
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
        """Push as the Trainer does; a card that a person changed on the Hub is taken over first.

        Where a person changed the card here, too, that one is pushed, and a warning says where the other one is.
        """
        if self.is_world_process_zero():
            token = token if token is not None else self.args.hub_token
            if getattr(self, "hub_model_id", None) is None:
                self.init_hf_repo(token=token, private=private)
            self._take_card_of_hub(HfApi(token=token), revision or self.args.hub_revision)
        return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)

    def _take_card_of_hub(self, api: HfApi, revision: str | None) -> None:
        path = _folder(self.args.output_dir) / CARD
        repo_id = str(self.hub_model_id)
        there, info = card_on_hub(api, repo_id, revision)
        here = read_text(path)
        if not there or there == here:
            return
        if not here or read_card(here).is_untouched:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, there)
        elif _around(read_card(there)) != _around(read_card(here)) and not read_card(there).is_untouched:
            logger.warning(
                f"{path} and the card of {repo_id} were both changed by hand. The first is pushed; the other stays in "
                f"the history of the repository, at {info.sha}."
            )


def _weights_here(model: nn.Module) -> str:
    """Return a fingerprint of what this process holds: the one that writes cards must not wait for others."""
    drop_gathered(model)
    return fingerprint_of_weights(model, gather=False)


def _folder(output_dir: str | None) -> Path:
    return Path(output_dir or ".").absolute()


def _around(card: Card) -> tuple[str, str]:
    return card.before.strip(), card.after.strip()


def _with_metadata_of(written: str, theirs: str) -> str:
    """Return their card, with what the Trainer would have said in the front matter, but for its results."""
    values = values_of(read_card(written).front_matter)
    values.pop("model-index", None)  # ours are in our section; those of earlier runs would pile up
    return with_metadata(theirs, values)


def _training_part(written: str) -> str:
    """Return how the model was trained, of a Trainer's card, its headings below ours."""
    found = _TRAINING.search(written.replace("\r\n", "\n"))
    return re.sub(r"^##", "###", found.group().strip(), flags=re.MULTILINE) if found else ""
