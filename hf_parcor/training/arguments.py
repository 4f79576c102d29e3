"""The defense as flags of training arguments, and where a Trainer's defense comes from: its own arguments or these."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_parcor.constraints import CorruptionConstraint
from hf_parcor.defenses import ACRT, AWP, DEFENSES, Defense, GradientPenalty, MultiStepRisk
from hf_parcor.training.config import DefenseConfig

DEFAULT_DEFENSE = MultiStepRisk(CorruptionConstraint(epsilon=0.1))
"""What a Trainer defends with if it is told nothing, by argument or flag; it was measured to help."""

NO_DEFENSE = "none"
_PREFIX = "defense_"
_NOT_OF_THE_DEFENSE = ("defense", "target_modules", "exclude_modules", "layers", "reuse_prefix")


@dataclass
class DefenseArguments:
    """The defense as flags, `--defense_*`; mixed into the arguments classes of both Trainers."""

    defense: str = field(
        default=next(name for name, kind in DEFENSES.items() if kind is type(DEFAULT_DEFENSE)),
        metadata={"help": f"Which defense: {', '.join(DEFENSES)}, or {NO_DEFENSE!r} for the stock training step."},
    )
    defense_norm: float = field(
        default=DEFAULT_DEFENSE.constraint.p,
        metadata={"help": "Order p of the corruption constraint's norm: 2, or inf."},
    )
    defense_epsilon: float = field(
        default=DEFAULT_DEFENSE.constraint.epsilon,
        metadata={"help": "Radius of the corruption constraint, in units of the weights (SAM: rho). 0 for none."},
    )
    defense_top_n: int | None = field(
        default=DEFAULT_DEFENSE.constraint.top_n,
        metadata={"help": "The largest number of corrupted entries; not set for no limit."},
    )
    defense_steps: int = field(
        default=DEFAULT_DEFENSE.steps, metadata={"help": "Corruption steps K; a training step takes K + 1 passes."}
    )
    defense_step_size: float | None = field(
        default=DEFAULT_DEFENSE.step_size,
        metadata={"help": "Size of one corruption step; not set for 1.5 epsilon / K."},
    )
    defense_random_start: bool = field(
        default=DEFAULT_DEFENSE.random_start,
        metadata={"help": "Start the corruption from a random point of norm epsilon instead of zero."},
    )
    defense_per_tensor: bool = field(
        default=AWP.per_tensor,
        metadata={"help": "A radius epsilon * |w_l| for each tensor by itself, for the defense awp."},
    )
    defense_input_epsilon: float = field(
        default=AWP.input_epsilon,
        metadata={"help": "Radius of the adversarial inputs, in units of the embedding, for the defense awp."},
    )
    defense_input_steps: int = field(
        default=AWP.input_steps,
        metadata={"help": "Steps that find the adversarial inputs, for the defense awp; 0 for none."},
    )
    defense_alpha: float = field(
        default=ACRT.alpha, metadata={"help": "Weight of the corrupted loss, for the defense acrt."}
    )
    defense_weight: float = field(
        default=GradientPenalty.weight,
        metadata={"help": "Weight of the gradient's norm, for the defense gradient_penalty."},
    )
    defense_start_epoch: float = field(
        default=Defense.start_epoch,
        metadata={"help": "Train without the defense until this epoch; a fraction is fine."},
    )
    defense_interval: int = field(
        default=Defense.interval,
        metadata={"help": "Defend every so many optimizer steps; an approximation that costs less."},
    )
    defense_batch_share: float = field(
        default=DEFAULT_DEFENSE.batch_share,
        metadata={
            "help": "Share of the batch that the passes see which a stock step does not have; an approximation that "
            "costs less."
        },
    )
    defense_sync_perturbation: bool = field(
        default=DEFAULT_DEFENSE.sync_perturbation,
        metadata={
            "help": "On several processes, find one corruption on the batches of all of them instead of one each."
        },
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


@dataclass
class ParameterDefenseTrainingArguments(DefenseArguments, TrainingArguments):
    """`transformers.TrainingArguments` and the defense as flags."""


@dataclass
class Seq2SeqParameterDefenseTrainingArguments(DefenseArguments, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` and the defense as flags."""


def build_defense(arguments: DefenseArguments) -> Defense | None:
    """Return the defense that the flags describe, None for the stock training step.

    Every flag `--defense_X` whose X is a setting of the chosen defense is handed to it.

    Raises:
        ValueError: An unknown defense, a setting out of range, or a flag that the chosen defense does not know.
    """
    if arguments.defense == NO_DEFENSE:
        return None
    if arguments.defense not in DEFENSES:
        known = ", ".join([*DEFENSES, NO_DEFENSE])
        raise ValueError(f"defense: expected one of {known}, got {arguments.defense!r}; choose one of these")
    chosen = DEFENSES[arguments.defense]
    accepted = {setting.name for setting in fields(chosen)}
    settings: dict[str, Any] = {}
    handled = set(_NOT_OF_THE_DEFENSE)
    if "constraint" in accepted:
        settings["constraint"] = CorruptionConstraint(
            p=arguments.defense_norm, epsilon=arguments.defense_epsilon, top_n=arguments.defense_top_n
        )
        handled |= {"norm", "epsilon", "top_n"}
    elif "p" in accepted:
        settings["p"] = arguments.defense_norm
        handled.add("norm")
    for flag in fields(DefenseArguments):
        name, value = flag.name.removeprefix(_PREFIX), getattr(arguments, flag.name)
        if name in accepted:
            settings[name] = value
        elif name not in handled and value != flag.default:
            raise ValueError(
                f"--{flag.name}: expected a setting of {arguments.defense}, got {value!r} for one that it does not "
                "have; leave the flag out"
            )
    return chosen(**settings)


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
