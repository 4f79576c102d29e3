"""Ways to train that campaigns compare, as flags of the examples, and one of them trained with one seed."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import HfArgumentParser

from hf_parcor.defenses import Defense
from hf_parcor.training import DefenseArguments, build_defense


@dataclass(frozen=True)
class Arm:
    """One way to train: what tables call it, and its flags."""

    label: str
    flags: list[str]

    @property
    def arguments(self) -> DefenseArguments:
        """The flags as arguments."""
        parser = HfArgumentParser(DefenseArguments)  # type: ignore[arg-type]
        (arguments,) = parser.parse_args_into_dataclasses(self.flags)
        return arguments

    @property
    def defense(self) -> Defense | None:
        """The defense, None for the plain arm."""
        return build_defense(self.arguments)


def l2(defense: str, epsilon: float, *more: str) -> list[str]:
    """Return the flags of a defense in the L2 norm."""
    return ["--defense", defense, "--defense_norm", "2", "--defense_epsilon", str(epsilon), *more]


PLAIN = Arm("plain", ["--defense", "none"])
ONE_STEP = l2("multi_step_risk", 0.1, "--defense_steps", "1")


@dataclass(frozen=True)
class Run:
    """One arm trained with one seed."""

    name: str
    arm: Arm
    seed: int

    @property
    def file_name(self) -> str:
        """The name of its files."""
        return f"{self.name}-seed{self.seed}"
