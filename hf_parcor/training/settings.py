"""Where a Trainer's defense comes from: its own arguments, or the flags, which may change between runs."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from hf_parcor.defenses import Defense
from hf_parcor.training.arguments import DEFAULT_DEFENSE, DefenseArguments, build_defense
from hf_parcor.training.defense_config import DefenseConfig

_OF_THE_TARGETS = ("defense_target_modules", "defense_exclude_modules", "defense_layers")


class DefenseSettings:
    """The defense and its targets as they were passed to the Trainer, or else as the `--defense_*` flags say.

    A hyperparameter search sets flags on the arguments after the Trainer was built; `changed` notices. A flag that
    says something else than the Trainer's argument beside it is an error.

    Args:
        arguments: The Trainer's arguments, with flags or without.
        defense: What was passed as `defense=`. A `DefenseConfig` says all of the targets too, also
            that there are none.
        targets: What was passed as `target_modules=`, `exclude_modules=` and `layers=`; None for what was not.
        reuse_prefix: What was passed as `reuse_prefix=`.

    Raises:
        ValueError: A flag is set, and says something else than the argument; or targets beside a `DefenseConfig` do.
    """

    def __init__(
        self,
        arguments: TrainingArguments,
        defense: Defense | DefenseConfig | None,
        targets: Mapping[str, Any],
        reuse_prefix: bool | None,
    ) -> None:
        passed = {"defense": defense, **targets, "reuse_prefix": reuse_prefix}
        self._passed = {name: value for name, value in passed.items() if value is not None}
        if isinstance(defense, DefenseConfig):
            said = {name: getattr(defense, name) for name in targets}
            for name, value in targets.items():
                if value is not None and _plain(value) != _plain(said[name]):
                    raise ValueError(
                        f"{name}: expected it in one place, got {name}={value!r} and beside it a DefenseConfig with "
                        f"{name}={said[name]!r}; leave it out, or pass the defense alone: defense=config.defense"
                    )
            self._passed |= {"defense": defense.defense, **said}
        self._seen = _flags(arguments)
        if isinstance(arguments, DefenseArguments):
            self._refuse_conflicts(arguments)

    def _refuse_conflicts(self, arguments: DefenseArguments) -> None:
        defaults = {flag.name: flag.default for flag in fields(DefenseArguments)}
        for argument, passed in self._passed.items():
            set_here = {
                name: value
                for name, value in self._seen.items()
                if _argument_of(name) == argument and value != defaults[name]
            }
            if not set_here:
                continue
            said = _defense_of(arguments) if argument == "defense" else next(iter(set_here.values()))
            if _plain(said) != _plain(passed):
                flags = ", ".join(f"--{name} {value!r}" for name, value in set_here.items())
                raise ValueError(
                    f"{argument}: expected it in one place, got {argument}={passed!r} and beside it the flag {flags}; "
                    "leave one of the two out"
                )

    def defense(self, arguments: TrainingArguments) -> Defense | None:
        """Return the defense, None for the stock training step."""
        if "defense" in self._passed:
            given: Defense = self._passed["defense"]
            return given
        return build_defense(arguments) if isinstance(arguments, DefenseArguments) else DEFAULT_DEFENSE

    def selection(self, arguments: TrainingArguments) -> dict[str, Any]:
        """Return the targets, as keyword arguments for `select_trainable`."""
        targets = {name.removeprefix("defense_"): getattr(arguments, name, None) for name in _OF_THE_TARGETS}
        return {name: self._passed.get(name, value) for name, value in targets.items()}

    def reuses_prefix(self, arguments: TrainingArguments) -> bool:
        """Say whether the passes of a step may share the unperturbed prefix."""
        return bool(self._passed.get("reuse_prefix", getattr(arguments, "defense_reuse_prefix", True)))

    def changed(self, arguments: TrainingArguments) -> bool:
        """Say whether a flag changed since the settings were last accepted.

        Raises:
            ValueError: One did that is not read, because the Trainer was given the argument that it stands for.
        """
        now = _flags(arguments)
        names = [name for name in now if now[name] != self._seen.get(name)]
        for name in names:
            argument = _argument_of(name)
            if argument in self._passed:
                raise ValueError(
                    f"{name}: expected the flag unchanged, since the Trainer was given {argument}=, got {now[name]!r} "
                    f"after {self._seen.get(name)!r}; build the Trainer without {argument}=, then the flag counts"
                )
        return bool(names)

    def accept(self, arguments: TrainingArguments) -> None:
        """Remember the flags, after what they say was found to work."""
        self._seen = _flags(arguments)


def _defense_of(arguments: DefenseArguments) -> Defense | None:
    try:
        return build_defense(arguments)
    except (NotImplementedError, ValueError):  # flags that make no defense are no defense that was passed
        return None


def _argument_of(flag: str) -> str:
    """Return the Trainer's argument that stands for a flag."""
    return flag.removeprefix("defense_") if flag in (*_OF_THE_TARGETS, "defense_reuse_prefix") else "defense"


def _plain(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]  # one layer, which a flag gives as a list
    if isinstance(value, Collection) and not isinstance(value, str):
        return sorted(value)
    return value


def _flags(arguments: TrainingArguments) -> dict[str, Any]:
    if not isinstance(arguments, DefenseArguments):
        return {}
    return {flag.name: copy.copy(getattr(arguments, flag.name)) for flag in fields(DefenseArguments)}
