"""The file beside a model that says how it was defended, for readers that need no PyTorch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from hf_parcor.errors import InputError
from hf_parcor.strict_json import flattened, read_strict_json

DEFENSE_CONFIG_NAME = "defense_config.json"
VERSION = "hf_parcor_version"
COUNTS = ("defended_steps", "trained_steps")


def installed_version(library: str = "hf-parcor") -> str:
    """Return the version of a library; of hf_parcor by default, which is `hf_parcor.__version__`, too."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # run from a folder of source code
        return "not installed as a package"


def defense_beside(folder: Path) -> dict[str, Any] | None:
    """Return what stands beside a model, also a defense of the user's own class; None where it was not defended.

    Raises:
        InputError: It is no JSON, or no object.
        OSError: It cannot be read.
    """
    path = folder / DEFENSE_CONFIG_NAME
    if not path.is_file():
        return None
    try:
        found = read_strict_json(path)
    except ValueError as error:
        raise InputError(f"{path}: {error}; save the model again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected settings by name, got {type(found).__name__}; save the model again")
    return found


def has_run(defense: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """Say whether a defense is known to have run: a file from before steps were counted is taken at its word.

    Examples:
        >>> has_run(None), has_run({"defense": "sam", "defended_steps": 0}), has_run({"defense": "sam"})
        (False, False, True)
    """
    return defense is not None and defense.get("defended_steps") != 0


def settings_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says of the defense itself: neither the version that wrote it nor how often it ran."""
    return {name: value for name, value in values.items() if name not in (VERSION, *COUNTS)}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return "name: old -> new" for each setting of two defenses that differs.

    Examples:
        >>> differences({"settings": {"alpha": 0.5}, "layers": None}, {"settings": {"alpha": 0.3}, "layers": None})
        ['settings.alpha: 0.5 -> 0.3']
    """
    before, after = flattened(settings_in(old)), flattened(settings_in(new))
    absent = object()
    return [
        f"{name}: {before.get(name, 'not set')!r} -> {after.get(name, 'not set')!r}"
        for name in {**before, **after}
        if before.get(name, absent) != after.get(name, absent)
    ]
