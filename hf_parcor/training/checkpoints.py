"""The checkpoint that a run goes on from, the defense beside saved models, and how many steps it defended."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from hf_parcor.defense_file import DEFENSE_CONFIG_NAME, defense_beside, differences, settings_in
from hf_parcor.distributed.fsdp import is_sharded
from hf_parcor.overriding import overriding
from hf_parcor.strict_json import replace_text, to_strict_json
from hf_parcor.training.config import DefenseConfig

logger = logging.get_logger(__name__)

_GOES_ON = "The run goes on with the new settings."


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """Return the checkpoint that `--resume_from_checkpoint` asks for, for `Trainer.train`.

    The word `true` means the last one in the output folder, and a new start where there is none: so the same command
    starts a run, and goes on with it after it was killed.

    Args:
        arguments: Any Trainer's.

    Returns:
        A folder, or None to start anew.
    """
    asked = arguments.resume_from_checkpoint
    word = str(asked).lower()
    if word == "true":
        return last_checkpoint(str(arguments.output_dir))
    return None if word in ("none", "false") else asked


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the last checkpoint in a folder, None if it has none or does not exist yet.

    One without the Trainer's state, which is written last, was being written when the run was killed, and is none.
    """
    whole = [path.parent for path in Path(folder).glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    found = {int(step): str(path) for path in whole if (step := path.name.removeprefix("checkpoint-")).isdecimal()}
    return found[max(found)] if found else None


@contextmanager
def loading_all(trainer: Trainer, model: nn.Module | None, folder: str | Path) -> Iterator[None]:
    """Let a block in which a Trainer loads a checkpoint load all of it.

    Transformers saves some models, such as ViT and Mixtral, with other names than their weights have, and its Trainer
    loads by name: what is called otherwise stays as it was, with a warning. Here it is read as `from_pretrained` does.

    Args:
        trainer: The Trainer.
        model: What the weights are loaded into.
        folder: The checkpoint.
    """
    if not isinstance(model, PreTrainedModel) or is_sharded(model) or _names_in(folder) <= model.state_dict().keys():
        yield
        return
    with overriding(trainer, _issue_warnings_after_load=lambda result: None):
        yield
    model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


def _names_in(folder: str | Path) -> set[str]:
    """Return what a checkpoint calls its weights; none where they are not in the format of safetensors."""
    index, file = (Path(folder) / name for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME))
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not file.is_file():
        return set()
    with safe_open(file, "pt") as weights:
        return set(weights.keys())


def save_defense(folder: str | Path, config: DefenseConfig | None, origin: Mapping[str, Any] | None = None) -> None:
    """Write the defense into the folder of a saved model; for the stock step nothing, and remove an old file there.

    Args:
        folder: The folder.
        config: What to write, None for the stock training step.
        origin: What the file says that lay beside these very weights before: it is written instead.
    """
    path = Path(folder) / DEFENSE_CONFIG_NAME
    if origin is not None:
        replace_text(path, to_strict_json(origin))
    elif config is not None:
        config.save_pretrained(folder)
    elif path.exists():
        path.unlink()
        logger.warning_once(
            f"{path} described the model that was saved there before. It is removed, since the one that takes its "
            "place was trained without a defense."
        )


def warn_of_another_defense(checkpoint: str, config: DefenseConfig | None) -> None:
    """Compare a checkpoint's `defense_config.json` with the settings of now; warn of each that differs.

    Any file that holds an object can be compared, one of a user's own defense or of another version too.

    Args:
        checkpoint: The checkpoint's folder.
        config: The settings of now, None for the stock training step.
    """
    try:
        old = defense_beside(Path(checkpoint))
    except (OSError, ValueError) as error:
        logger.warning_once(
            f"The {DEFENSE_CONFIG_NAME} of {checkpoint} cannot be compared with the defense of this run: {error}. "
            f"{_GOES_ON}"
        )
        return
    if old is None:
        if config is not None:
            logger.warning_once(
                f"{checkpoint} has no {DEFENSE_CONFIG_NAME}: it was trained without a defense, and now goes on with "
                f"{config.defense!r}."
            )
        return
    if config is None:
        changes = differences({"defense": old.get("defense")}, {"defense": None})
    else:
        changes = differences(old, config.to_dict())
    if changes:
        logger.warning_once(f"{checkpoint} was trained with another defense: {'; '.join(changes)}. {_GOES_ON}")


class DefendedSteps:
    """Counts optimizer steps, also those of the run before: `defense_config.json` beside the weights keeps them.

    Counts belong to weights. They go on in a second `train` of the same model, begin anew with another model, and are
    read where weights are: from the checkpoint that a run goes on from or goes back to, and from the folder that
    the model was loaded from. They belong to settings, too: a step that another defense defended is not counted for
    this one.

    A file of a version that did not count says that its defense ran, and not how often; so does all that follows it.
    """

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        # A Trainer is pickled for Ray's hyperparameter search; a weak reference cannot be, and its model is another.
        return {**vars(self), "_model": None}

    def _forget(self) -> None:
        self._origin: Mapping[str, Any] | None = None
        self._trained: int | None = 0
        self._defended: dict[str, int | None] = {}
        self._last: tuple[DefenseConfig, str] | None = None

    def add(self, model: nn.Module, config: DefenseConfig | None) -> None:
        """Count one optimizer step.

        Args:
            model: The model.
            config: What the step was defended with, None for a stock step.
        """
        self._follow(model)
        self._origin = None  # the weights are no longer those that it was written for
        self._trained = None if self._trained is None else self._trained + 1
        if config is not None:
            settings = self._key_of(config)
            before = self._defended.get(settings, 0)
            self._defended[settings] = None if before is None else before + 1

    def counted(self, model: nn.Module | None, config: DefenseConfig) -> DefenseConfig:
        """Return a defense with what is known of a model's weights."""
        if model is not None:
            self._follow(model)
        return replace(config, defended_steps=self._defended.get(self._key_of(config), 0), trained_steps=self._trained)

    def origin(self, model: nn.Module | None) -> Mapping[str, Any] | None:
        """Return what the `defense_config.json` of a model's weights says, until they are trained further."""
        if model is not None:
            self._follow(model)
        return self._origin

    def take_from(self, folder: str | Path, model: nn.Module) -> None:
        """Go on from the weights of a folder: a checkpoint's, or those that the model was loaded from."""
        self._model = weakref.ref(model)
        self._forget()
        state = _object_in(Path(folder) / TRAINER_STATE_NAME)
        self._trained = _count(state.get("global_step", 0))
        values = _object_in(Path(folder) / DEFENSE_CONFIG_NAME)
        if values:
            self._origin = values
            self._trained = _count(values.get("trained_steps", self._trained or None))
            defended = _count(values.get("defended_steps"))
            if None not in (defended, self._trained) and defended > self._trained:  # type: ignore[operator]
                defended = self._trained = None  # somebody wrote into it
            self._defended = {_key_in(values): defended}

    def _follow(self, model: nn.Module) -> None:
        if self._model is not None and self._model() is model:
            return
        self._model = weakref.ref(model)
        self._forget()
        folder = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
        # What the base of adapters was trained with says nothing of the adapters.
        if folder and Path(folder).is_dir() and not hasattr(model, "peft_config"):
            self.take_from(folder, model)

    def _key_of(self, config: DefenseConfig) -> str:
        # Kept, since a step must not pay for writing settings down.
        last = self._last
        if last is None or last[0].defense is not config.defense or last[0] != config:
            last = self._last = (config, _key_in(config.to_dict()))
        return last[1]


def _key_in(values: Mapping[str, Any]) -> str:
    """Return the settings of a defense as one string, by which its steps are counted."""
    return to_strict_json(dict(sorted(settings_in(values).items())))


def _object_in(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))  # not strictly: a Trainer's log may hold NaN
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
