"""The defense as flags of training arguments, and where a Trainer's defense comes from: its own arguments or these."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar, get_args, get_type_hints

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.utils import logging

from hf_parcor.arguments import check_flag
from hf_parcor.constraints import CorruptionConstraint
from hf_parcor.defenses import DEFENSES, Defense, MultiStepRisk
from hf_parcor.training.config import DefenseConfig

logger = logging.get_logger(__name__)

DEFAULT_DEFENSE = MultiStepRisk(CorruptionConstraint(epsilon=0.1))
"""What a Trainer defends with if it is told nothing, by argument or flag; it was measured to help."""

NO_DEFENSE = "none"
_PREFIX = "defense_"
_OF_THE_TARGETS = ("defense_target_modules", "defense_exclude_modules", "defense_layers")
_NOT_OF_THE_DEFENSE = (*_OF_THE_TARGETS, "defense_reuse_prefix")


def _settings_of(kind: type[Defense]) -> Iterator[tuple[Any, Field[Any]]]:
    """Yield types and settings of a defense, those of its constraint in the place of the constraint."""
    hints = get_type_hints(kind)
    for setting in sorted(fields(kind), key=lambda setting: bool(setting.kw_only)):  # what all have comes last
        if hints[setting.name] is CorruptionConstraint:
            constraint = get_type_hints(CorruptionConstraint)
            yield from ((constraint[part.name], part) for part in fields(CorruptionConstraint))
        else:
            yield setting.metadata.get("flag_type", hints[setting.name]), setting


def _flag_of(setting: Field[Any]) -> str:
    return _PREFIX + str(setting.metadata.get("flag", setting.name))


_Kind = TypeVar("_Kind")


def _with_a_flag_for_each_setting(kind: type[_Kind]) -> type[_Kind]:
    """Add flags for the settings of all defenses in the catalogue, after the first field of a class."""
    first, *others = kind.__annotations__.items()
    flags: dict[str, Any] = dict([first])
    known: dict[str, tuple[Any, Field[Any], list[str]]] = {}
    for defense, one in DEFENSES.items():
        for hint, setting in _settings_of(one):
            known.setdefault(_flag_of(setting), (hint, setting, []))[2].append(defense)
    for flag, (hint, setting, defenses) in known.items():
        default = setting.default
        if default is MISSING:  # of ε that of the default defense; of what is read from words none
            default = None if "from_flag" in setting.metadata else DEFAULT_DEFENSE.constraint.epsilon
        words = setting.metadata["help"]
        of_whom = "" if len(defenses) == len(DEFENSES) else f" ({', '.join(defenses)})"
        flags[flag] = hint
        setattr(kind, flag, field(default=default, metadata={"help": f"{words[0].upper()}{words[1:]}{of_whom}."}))
    kind.__annotations__ = {**flags, **dict(others)}
    return kind


@dataclass
@_with_a_flag_for_each_setting
class DefenseArguments:
    """The defense as flags, mixed into the arguments classes of both Trainers.

    In addition to the fields below there is a flag `--defense_X` for each setting X of each defense in the catalogue,
    with the default of that setting. The flag for p of the constraint is `--defense_norm`.
    """

    defense: str = field(
        default=next(name for name, kind in DEFENSES.items() if kind is type(DEFAULT_DEFENSE)),
        metadata={"help": f"Which defense: {', '.join(DEFENSES)}, or {NO_DEFENSE!r} for the stock training step."},
    )
    defense_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to defend: words such as last-decoder-layer, attention, layer-norm, all-linear, names of "
            "modules or their last parts, or regular expressions for the full name; not set for all trainable "
            "parameters."
        },
    )
    defense_exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "What to leave out of these, named in the same way."}
    )
    defense_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Defend only these layers of each encoder and decoder; negative counts from the last."},
    )
    defense_reuse_prefix: bool = field(
        default=True,
        metadata={"help": "Run what is computed before the first defended module once for all passes of a step."},
    )

    def __post_init__(self) -> None:
        """Make whole numbers floats where a flag is one: a search casts its trials to the type that a flag has."""
        for flag in fields(DefenseArguments):
            if float in (flag.type, *get_args(flag.type)) and type(value := getattr(self, flag.name)) is int:
                setattr(self, flag.name, float(value))
        if beside := getattr(super(), "__post_init__", None):
            beside()


@dataclass
class ParameterDefenseTrainingArguments(DefenseArguments, TrainingArguments):
    """`transformers.TrainingArguments` with a flag `--defense_X` for each setting X of a defense.

    Examples:
        >>> arguments = ParameterDefenseTrainingArguments("out", defense="sam", defense_epsilon=0.05)
        >>> arguments.defense, arguments.defense_epsilon, arguments.defense_norm
        ('sam', 0.05, 2.0)
    """


@dataclass
class Seq2SeqParameterDefenseTrainingArguments(DefenseArguments, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with the flags of `ParameterDefenseTrainingArguments`.

    Examples:
        >>> arguments = Seq2SeqParameterDefenseTrainingArguments(
        ...     "out", predict_with_generate=True, defense_target_modules=["last-decoder-layer"]
        ... )
        >>> arguments.defense, arguments.defense_target_modules
        ('multi_step_risk', ['last-decoder-layer'])
    """


def build_defense(arguments: DefenseArguments, *, strict: bool = True) -> Defense | None:
    """Return the defense that the flags describe, None for the stock training step.

    Each setting of the chosen defense has the value of its flag, or what is read from it.

    Args:
        arguments: With the flags.
        strict: Whether a flag that the chosen defense does not know is an error. False warns, as of no defense.

    Raises:
        ValueError: An unknown defense, a setting out of range, or a flag that the chosen defense does not know.
        TypeError: A setting of another type, as a file may have it: "1e-3" in quotes is no number, "false" no flag.
        NotImplementedError: The defense does not support this combination of settings.
    """
    name = arguments.defense
    if name not in (*DEFENSES, NO_DEFENSE):
        known = ", ".join([*DEFENSES, NO_DEFENSE])
        raise ValueError(f"defense: expected one of {known}, got {name!r}; choose one of these")
    chosen = DEFENSES.get(name)
    flags = {} if chosen is None else {setting.name: _flag_of(setting) for _, setting in _settings_of(chosen)}
    unread = _unread(arguments, flags.values())
    if unread and strict and chosen is not None:
        raise ValueError(
            f"--{unread[0]}: expected a setting of {name}, got {getattr(arguments, unread[0])!r} for one that it "
            "does not have; leave the flag out"
        )
    if unread:  # no error: what a file sets for a defense is often run once without
        told = ", ".join(f"--{flag}" for flag in unread)
        what = "; nothing is defended" if chosen is None else ""
        logger.warning(f"--defense {name}: there is nothing that {told} would set{what}.")
    if chosen is None:
        return None
    values = {setting: getattr(arguments, flag) for setting, flag in flags.items()}
    for setting in fields(chosen):
        if "from_flag" in setting.metadata:
            if values[setting.name] is None:
                raise ValueError(
                    f"--{_flag_of(setting)}: expected it with --defense {arguments.defense}, got none; "
                    f"{setting.metadata['help']}"
                )
            words = values[setting.name]  # of a file, one may stand alone
            values[setting.name] = setting.metadata["from_flag"]([words] if isinstance(words, str) else words)
    if "constraint" in (setting.name for setting in fields(chosen)):
        parts = {part.name: values.pop(part.name) for part in fields(CorruptionConstraint)}
        values["constraint"] = CorruptionConstraint(**parts)
    return chosen(**values)


def _unread(arguments: DefenseArguments, known: Collection[str]) -> list[str]:
    """Return the flags that are set to something else than their default, of none of the settings that are known."""
    read = {"defense", *_NOT_OF_THE_DEFENSE, *known}
    others = (flag for flag in fields(DefenseArguments) if flag.name not in read)
    return [flag.name for flag in others if getattr(arguments, flag.name) != flag.default]


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
        TypeError: `reuse_prefix` is neither True nor False.
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
        self.reuses_prefix(arguments)  # raises if it is no flag
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

    def defense(self, arguments: TrainingArguments, *, strict: bool = True) -> Defense | None:
        """Return the defense, None for the stock training step; `strict` as for `build_defense`."""
        if "defense" in self._passed:
            given: Defense = self._passed["defense"]
            return given
        return build_defense(arguments, strict=strict) if isinstance(arguments, DefenseArguments) else DEFAULT_DEFENSE

    def selection(self, arguments: TrainingArguments) -> dict[str, Any]:
        """Return the targets, as keyword arguments for `select_trainable`."""
        targets = {name.removeprefix("defense_"): getattr(arguments, name, None) for name in _OF_THE_TARGETS}
        return {name: self._passed.get(name, value) for name, value in targets.items()}

    def reuses_prefix(self, arguments: TrainingArguments) -> bool:
        """Say whether the passes of a step may share the unperturbed prefix.

        Raises:
            TypeError: It is neither True nor False.
        """
        asked = self._passed.get("reuse_prefix", getattr(arguments, "defense_reuse_prefix", True))
        return check_flag("reuse_prefix", asked)

    def changed(self, arguments: TrainingArguments) -> set[str]:
        """Return the arguments of the Trainer whose flags changed since the settings were last accepted.

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
        return {_argument_of(name) for name in names}

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
    return flag.removeprefix("defense_") if flag in _NOT_OF_THE_DEFENSE else "defense"


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
