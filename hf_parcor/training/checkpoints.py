"""The checkpoint that a run goes on from, the defense beside saved models, and what is said where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_parcor.strict_json import read_strict_json, to_strict_json
from hf_parcor.training.defense_config import COUNTS, DEFENSE_CONFIG_NAME, VERSION, DefenseConfig

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
    """Return the last checkpoint in a folder, None if it has none or does not exist yet."""
    return get_last_checkpoint(str(folder)) if Path(folder).is_dir() else None  # type: ignore[no-untyped-call]


def save_defense(folder: str | Path, config: DefenseConfig | None, origin: Mapping[str, Any] | None = None) -> None:
    """Write the defense into the folder of a saved model; for the stock step nothing, and remove an old file there.

    Args:
        folder: The folder.
        config: What to write, None for the stock training step.
        origin: What the file says that lay beside these very weights before: it is written instead.
    """
    path = Path(folder) / DEFENSE_CONFIG_NAME
    if origin is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_strict_json(origin), encoding="utf-8")
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
    path = Path(checkpoint) / DEFENSE_CONFIG_NAME
    old: Any = {"defense": None}
    if path.is_file():
        try:
            old = read_strict_json(path)
        except (OSError, ValueError) as error:
            old = error
        if not isinstance(old, Mapping):
            logger.warning_once(f"{path} cannot be compared with the defense of this run: {old}. {_GOES_ON}")
            return
    elif config is not None:
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


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return "name: old -> new" for every setting that differs; the version that wrote a file is none, nor are steps.

    Examples:
        >>> differences({"settings": {"alpha": 0.5}, "layers": None}, {"settings": {"alpha": 0.3}, "layers": None})
        ['settings.alpha: 0.5 -> 0.3']
    """
    before, after = _flat(old), _flat(new)
    names = [name for name in {**before, **after} if name not in (VERSION, *COUNTS)]
    absent = object()
    return [
        f"{name}: {before.get(name, 'not set')!r} -> {after.get(name, 'not set')!r}"
        for name in names
        if before.get(name, absent) != after.get(name, absent)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
