"""A Trainer whose model card says how robust the model is, and loses nothing that a person wrote."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

from hf_parcor.evaluation import EvaluationRecord
from hf_parcor.evaluation.data import EvaluationData, named_on_hub
from hf_parcor.evaluation.fingerprint import fingerprint_of_weights
from hf_parcor.model_card.card import read_card, updated_card, with_metadata
from hf_parcor.model_card.facts import ModelFacts
from hf_parcor.model_card.folder import CARD, card_of, files_beside, read_text, write_files
from hf_parcor.model_card.front_matter import values_of
from hf_parcor.model_card.gathering import facts_of
from hf_parcor.model_card.metadata import unmeasured_metadata
from hf_parcor.model_card.section import unmeasured_section
from hf_parcor.monitoring import RobustnessMixin
from hf_parcor.sharding import drop_gathered
from hf_parcor.training.measured import MeasuredWeights
from hf_parcor.training.overriding import overriding

logger = logging.get_logger(__name__)

_TRAINING = re.compile(r"^## Training (?:procedure|Details)$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


class CardMixin(RobustnessMixin):
    """Gives any Trainer a card with the last robustness evaluation; put it before the Trainer's class.

    `create_model_card` is that of the Trainer, and then:

    - Where there is no card, the Trainer's own is written, with our section at its end. As long as nobody touches it,
      the Trainer writes it anew each time.
    - A card that is there, a person's, PEFT's, or that of the Hub, is kept byte for byte. Our section gets the part on
      training that the Trainer would have written; its metadata are added where they are missing.
    - What `evaluate_robustness` or a `RobustnessCallback` measured is said only of the weights that it measured, also
      of those that `load_best_model_at_end` brought back; after more training the card says that it is not known.
      What `evaluate_robustness` measured of the same weights goes before.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._measured = MeasuredWeights()
        super().__init__(*args, **kwargs)

    @property
    def _defense_values(self) -> Mapping[str, Any] | None:
        """The defense as the card shows it; None for none."""
        return None

    def evaluate_robustness(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `RobustnessMixin.evaluate_robustness`; the card remembers of which weights this was."""
        metrics = super().evaluate_robustness(*args, **kwargs)
        self._keep(self.robustness_records, instead=True)
        return metrics

    def robustness_was_measured(self, prefix: str, record: EvaluationRecord) -> None:
        """Remember for the card what a `RobustnessCallback` measured."""
        self._keep({prefix: record}, instead=False)

    def _keep(self, measured: Mapping[str, EvaluationRecord], *, instead: bool) -> None:
        if self.is_world_process_zero() and self.model is not None:
            self._measured.keep(self.state, _weights_here(self.model), measured, instead=instead)

    def robustness_facts(self, model_name: str = "", dataset: str = "") -> ModelFacts | None:
        """Return what the card says of the weights as they are; None if they were not measured.

        Args:
            model_name: Name of the model; "" for that of the output folder.
            dataset: Name on the Hub of the evaluation data; "" for what the data set says of itself.
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
        """Write the Trainer's card, or update the one that is there, with the last robustness evaluation.

        Raises:
            ValueError: The card that is there cannot be updated; see `updated_card`. Nothing was written.
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

    def _write_card(self, text: str, facts: ModelFacts | None, *, training: str = "", generated: bool = False) -> None:
        """Write a card into the Trainer's folder, with what lies beside it, in place of what lay there of ours."""
        folder = folder_of(self.args)
        if facts is None:
            section = unmeasured_section(self._defense_values, training=training)
            metadata = unmeasured_metadata(self._defense_values)
            write_files(folder, updated_card(text, section, metadata, generated=generated), {})
        else:
            files = files_beside(facts)
            write_files(folder, card_of(facts, files, text, training=training, generated=generated), files)


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
