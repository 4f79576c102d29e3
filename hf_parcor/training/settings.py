"""Where a Trainer's defense comes from: its own arguments, or the flags, which may change between runs."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from hf_parcor.defenses import Defense
from hf_parcor.training.arguments import DefenseArguments, build_defense

_OF_THE_TARGETS = ("defense_target_modules", "defense_exclude_modules", "defense_layers")


class DefenseSettings:
    """The defense and its targets as they were passed to the Trainer, or else as the `--defense_*` flags say.

    A hyperparameter search sets flags on the arguments after the Trainer was built; `changed` notices.

    Args:
        arguments: The Trainer's arguments, with flags or without.
        defense: What was passed as `defense=`.
        target_modules: What was passed as `target_modules=`.
        default: The defense where nothing says otherwise.
    """

    def __init__(
        self,
        arguments: TrainingArguments,
        defense: Defense | None,
        target_modules: str | Collection[str] | None,
        default: Defense,
    ) -> None:
        self._given, self._targets, self._default = defense, target_modules, default
        self._seen = _flags(arguments)

    def defense(self, arguments: TrainingArguments) -> Defense | None:
        """Return the defense, None for the stock training step."""
        if self._given is not None:
            return self._given
        return build_defense(arguments) if isinstance(arguments, DefenseArguments) else self._default

    def selection(self, arguments: TrainingArguments) -> dict[str, Any]:
        """Return the targets, as keyword arguments for `select_trainable`."""
        targets = {name.removeprefix("defense_"): getattr(arguments, name, None) for name in _OF_THE_TARGETS}
        return targets if self._targets is None else {**targets, "target_modules": self._targets}

    def changed(self, arguments: TrainingArguments) -> bool:
        """Say whether a flag changed since the settings were last accepted.

        Raises:
            ValueError: One did that is not read, because the Trainer was given `defense=` or `target_modules=`.
        """
        now = _flags(arguments)
        names = [name for name in now if now[name] != self._seen.get(name)]
        for name in names:
            argument = "target_modules" if name == "defense_target_modules" else "defense"
            given = self._targets if argument == "target_modules" else self._given
            if given is not None and name not in _OF_THE_TARGETS[1:]:
                raise ValueError(
                    f"{name}: expected the flag unchanged, since the Trainer was given {argument}=, got {now[name]!r} "
                    f"after {self._seen.get(name)!r}; build the Trainer without {argument}=, then the flag counts"
                )
        return bool(names)

    def accept(self, arguments: TrainingArguments) -> None:
        """Remember the flags, after what they say was found to work."""
        self._seen = _flags(arguments)


def _flags(arguments: TrainingArguments) -> dict[str, Any]:
    if not isinstance(arguments, DefenseArguments):
        return {}
    return {flag.name: copy.copy(getattr(arguments, flag.name)) for flag in fields(DefenseArguments)}
