"""The defense and its targets as a file beside the model, in the manner of Transformers' configurations."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from hf_parcor.corruptions import CORRUPTIONS, Corruption
from hf_parcor.corruptions.catalogue import catalogue_name
from hf_parcor.defense_file import COUNTS, DEFENSE_CONFIG_NAME, VERSION, installed_version
from hf_parcor.defenses import DEFENSES, Defense, check_defense
from hf_parcor.strict_json import (
    OwnClassError,
    Reader,
    checked,
    from_plain,
    read_strict_json,
    replace_text,
    to_plain,
    to_strict_json,
)


def _corruption_from_plain(value: Any, name: str) -> Corruption:
    expected = f"an object with one of {', '.join(CORRUPTIONS)} and its settings"
    checked(isinstance(value, dict) and len(value) == 1, value, name, expected)
    ((kind, settings),) = value.items()
    if "." in kind:
        raise OwnClassError(f"{name}: expected {expected}, got {kind!r}, a class of your own")
    checked(kind in CORRUPTIONS, value, name, expected)
    found: Corruption = from_plain(CORRUPTIONS[kind], settings, f"{name}.{kind}", _READERS)
    return found


_READERS: dict[Any, Reader] = {Corruption: _corruption_from_plain}


def _settings_of(defense: Defense) -> dict[str, Any]:
    """Return the settings of a defense as plain values: a corruption under its name, as it is built from it again."""
    return {setting.name: _named(getattr(defense, setting.name)) for setting in fields(defense) if setting.init}


def _named(value: Any) -> Any:
    if isinstance(value, Corruption):
        return {catalogue_name(value) or _import_path(type(value)): to_plain(value, otherwise=repr)}
    if isinstance(value, (list, tuple)):
        return [_named(entry) for entry in value]
    return to_plain(value, otherwise=repr)


def _import_path(kind: type) -> str:
    """Return where a class is imported from."""
    return f"{kind.__module__}.{kind.__qualname__}"


_TARGETS: dict[str, Any] = {
    "target_modules": str | tuple[str, ...] | None,
    "exclude_modules": str | tuple[str, ...] | None,
    "layers": int | tuple[int, ...] | None,
}
_KEYS = ("defense", "settings", *_TARGETS, VERSION)


@dataclass(frozen=True)
class DefenseConfig:
    """What a model was trained to withstand: the defense with all its settings, and which parameters it corrupted.

    `ParameterDefenseTrainer` writes it as `defense_config.json` beside every checkpoint and every saved model.

    Args:
        defense: The defense.
        target_modules: As in `select_parameters`; None for all trainable parameters. A set is stored in sorted order.
        exclude_modules: As in `select_parameters`.
        layers: As in `select_parameters`.
        defended_steps: Number of optimizer steps in which this defense trained the weights beside the file; 0 if it
            never ran, None if unknown. Comparisons ignore it.
        trained_steps: Number of all optimizer steps of these weights; None if unknown. Comparisons ignore it.

    Raises:
        TypeError: `defense` is not a `Defense`.
        ValueError: A target is of another type, a number of steps is not a whole number ≥ 0, or `defended_steps` is
            larger than `trained_steps`.

    Examples:
        >>> import tempfile
        >>> from hf_parcor import SAM, CorruptionConstraint
        >>> config = DefenseConfig(SAM(CorruptionConstraint(epsilon=0.1)), target_modules=["attention"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = config.save_pretrained(folder)
        ...     DefenseConfig.from_pretrained(folder) == config
        True
    """

    defense: Defense
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    layers: int | Collection[int] | None = None
    defended_steps: int | None = field(default=None, compare=False)
    trained_steps: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_defense(self.defense)
        for name, kind in _TARGETS.items():
            value = getattr(self, name)
            if isinstance(value, Collection) and not isinstance(value, str):
                value = tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
            object.__setattr__(self, name, from_plain(kind, to_plain(value), name))  # as the file will be read
        for name in COUNTS:
            count = getattr(self, name)
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
                raise ValueError(f"{name}: expected a whole number >= 0, got {count!r}")
        if (self.defended_steps or 0) > (math.inf if self.trained_steps is None else self.trained_steps):
            raise ValueError(
                f"defended_steps: expected at most the {self.trained_steps} steps, got {self.defended_steps}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values, with the version of hf_parcor.

        A defense of the catalogue is named as there, any other class by its import path.
        """
        kind = type(self.defense)
        return {
            "defense": next((name for name, entry in DEFENSES.items() if entry is kind), _import_path(kind)),
            "settings": _settings_of(self.defense),
            **{name: to_plain(getattr(self, name)) for name in _TARGETS},
            **{name: count for name in COUNTS if (count := getattr(self, name)) is not None},
            VERSION: installed_version(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DefenseConfig:
        """Read what `to_dict` returned. Only the numbers of steps may be missing.

        Raises:
            ValueError: A value is missing, unknown or of the wrong type; a setting is out of its range; or the defense
                is not in the catalogue.
            TypeError: The defense does not take a setting of this type.
            NotImplementedError: The defense does not support this combination of settings.
        """
        if not isinstance(values, Mapping) or set(values) - set(COUNTS) != set(_KEYS):
            got = list(values) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"expected an object with exactly {', '.join(_KEYS)}, got {got}")
        from_plain(str, values[VERSION], VERSION)
        name = from_plain(str, values["defense"], "defense")
        if name not in DEFENSES:
            told = f"defense: expected one of {', '.join(DEFENSES)}, got {name!r}"
            raise OwnClassError(f"{told}, a class of your own") if "." in name else ValueError(told)
        return cls(
            from_plain(DEFENSES[name], values["settings"], "settings", _READERS),
            **{target: from_plain(kind, values[target], target) for target, kind in _TARGETS.items()},
            **{name: from_plain(int, values[name], name) for name in COUNTS if name in values},
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write `defense_config.json` into a folder, which is created if necessary, and return the file's path."""
        return replace_text(Path(folder) / DEFENSE_CONFIG_NAME, to_strict_json(self.to_dict()))

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        subfolder: str = "",
    ) -> DefenseConfig:
        """Read the `defense_config.json` of a folder, or of a model on the Hub.

        Args:
            folder_or_repo_id: The folder of a model or a checkpoint, or a model's name on the Hub.
            revision: Branch, tag or commit on the Hub; None for main.
            token: For private models; None for the token that `hf auth login` stored.
            cache_dir: Where downloads are kept.
            force_download: Download the file even if it is in the cache.
            local_files_only: Only look into the cache.
            subfolder: The folder of the file inside the folder or repository.

        Raises:
            OSError: There is no such file, or the Hub cannot be reached.
            ValueError: The file is not one that `save_pretrained` writes, or it names a class of your own as defense
                or corruption: such classes are not imported.
        """
        try:
            path = cached_file(
                os.fspath(folder_or_repo_id),
                DEFENSE_CONFIG_NAME,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                subfolder=subfolder,
            )
        except OSError as error:
            raise OSError(
                f"expected {DEFENSE_CONFIG_NAME} in {folder_or_repo_id}, got none: {error} Only a "
                "ParameterDefenseTrainer writes it: name the folder or repository of one of its models"
            ) from error
        try:
            return cls.from_dict(read_strict_json(str(path)))
        except OwnClassError as error:
            raise ValueError(
                f"{path}: {error}. Classes are not imported from a file: import it, and build the defense from the "
                "settings in this one"
            ) from error
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: {error}. The file is damaged or of another version of hf_parcor than "
                f"{installed_version()}: install that version, or save the model again"
            ) from error
