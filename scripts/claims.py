"""What both papers and this repository claim, one row each: confirmed or not, by the records that are kept.

    python -m scripts.claims

writes `scripts/results/README.md`, with the commands that made the records, and prints it; nothing is trained. Where
two ways to train were repeated over seeds, a claim is tested once: each seed gives one number, the mean of the metric
over the corruptions that the claim is about; Student's one-sided t-test with pooled variance compares the two samples,
as in paper 2, Appendix C, and Holm's method corrects its p for all tests on the runs of one campaign: what one shows
does not change when another is added to the page. What correcting for the whole page says stands beside.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from hf_parcor.defenses import ConstrainedDefense
from hf_parcor.records import CorruptionRecord, EvaluationRecord, FlipRecord, StoredRecord, SweepRecord
from hf_parcor.reports.tables import markdown_table
from hf_parcor.statistics import TTest, holm_correction, student_t_test
from scripts.campaigns import mean_and_deviation
from scripts.reproduce import RESULTS, STUDIES, Study
from scripts.reproduce_language_model import RADII
from scripts.reproduce_paper_1 import below, lower_is_weaker, means, smaller_by_gradient, weakest, worse_by_gradient
from scripts.usual_cases import CASES

PAGE = RESULTS / "README.md"
README = Path(__file__).parents[1] / "README.md"
FIRST_TABLE = ("<!-- the first table: python -m scripts.claims -->\n", "<!-- end of the first table -->\n")
LEVEL = 0.05
TESTED_THEN = 51  # when families were chosen
_Record = TypeVar("_Record", bound=StoredRecord)
CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE = "confirmed", "not confirmed", "not testable here"
ALONE, NOT_OF_ALL = "\u00a0†", "\u00a0‡"


Rows = Callable[[CorruptionRecord], bool]


def of(*corruptions: str, but: tuple[str, ...] = ()) -> Rows:
    """Return whether a row is one of these kinds of corruption, and has none of these labels."""
    return lambda row: row.corruption in corruptions and row.label not in but


def labelled(*labels: str) -> Rows:
    """Return whether a row has one of these labels."""
    return lambda row: row.label in labels


def along_l2(radii: Iterable[float], kind: str = "gradient-based") -> Rows:
    """Return whether a row is the corruption along the gradient, or another kind, with one of these radii in L2."""
    return labelled(*(f"{kind} L2 ε={radius:g}" for radius in radii))


CLEAN = of("none")
WORST = of("gradient", "multi_step")
NOISE = of("gaussian", "uniform")
FEW_BITS = labelled("6-bit quantization", "5-bit quantization", "4-bit quantization")
PER_TENSOR_4, PER_CHANNEL_4 = labelled("4-bit quantization"), labelled("4-bit quantization per channel")
PER_CHANNEL_2 = labelled("2-bit quantization per channel (full)")
PRUNED, TWO_OF_FOUR = of("pruning"), labelled("pruning s=0.5 per group of 4")
FLIPS_3 = labelled("3 worst flips (int8, 5 candidates)")


@dataclass(frozen=True)
class Runs:
    """The runs of one way to train, one for each seed.

    Args:
        folder: Of the records, in `scripts/results`.
        arm: What their names start with.
        rows: The corruptions that count.
        metric: What was measured: a share, BLEU, or the loss.
        ending: What follows the seed in their names.
        group: The part of the model, where the records are probes.
    """

    folder: str
    arm: str
    rows: Rows
    metric: str = "accuracy"
    ending: str = ""
    group: str = ""

    def values(self) -> list[float]:
        """Return one number for each seed, a share in per cent."""
        return self._values

    @cached_property
    def _values(self) -> list[float]:
        return [fmean(self._value(row) for row in record.rows() if self.rows(row)) for record in self._records()]

    def _records(self) -> Iterator[EvaluationRecord]:
        name = re.compile(rf"{re.escape(self.arm)}-seed\d+{re.escape(self.ending)}\.json")
        paths = sorted(path for path in (RESULTS / self.folder).glob("*.json") if name.fullmatch(path.name))
        for path in paths:
            yield SweepRecord.load(path).records[self.group] if self.group else EvaluationRecord.load(path)

    def _value(self, row: CorruptionRecord) -> float:
        return row.mean(self.metric) * (100 if self.unit == "points" else 1)

    @property
    def unit(self) -> str:
        """What the numbers count."""
        return "nats" if self.metric == "loss" else "BLEU" if self.metric.endswith("bleu") else "points"


@dataclass(frozen=True)
class Higher:
    """Whether one way to train has a higher metric than another, or one that is lower by less than a margin."""

    first: Runs
    second: Runs
    margin: float = 0.0

    def test(self) -> TTest:
        """Return Student's t-test of first > second − margin."""
        return student_t_test([value + self.margin for value in self.first.values()], self.second.values())


@dataclass(frozen=True)
class Seen:
    """What was computed or counted once, so that there is no test over seeds: whether it holds, and what was seen."""

    how: Callable[[], tuple[bool, str]]


@dataclass(frozen=True)
class Claim:
    """A claim, who makes it, and what is to be said of it: a comparison, something seen, or why it is not tested."""

    by: str
    says: str
    evidence: Higher | Seen | str
    folder: str = ""

    @property
    def campaign(self) -> str:
        """The folder of the records that it rests on; "" for none."""
        return self.evidence.first.folder if isinstance(self.evidence, Higher) else self.folder


def arms(folder: str, first: str, second: str, rows: Rows, *, margin: float = 0.0, **more: str) -> Higher:
    """Return the comparison of two arms of one campaign."""
    return Higher(Runs(folder, first, rows, **more), Runs(folder, second, rows, **more), margin)


def within(folder: str, arm: str, first: Rows, second: Rows, **more: str) -> Higher:
    """Return the comparison of two kinds of corruptions of the same models."""
    return Higher(Runs(folder, arm, first, **more), Runs(folder, arm, second, **more))


def layer_of(stack: str, layer: int) -> Runs:
    """Return the plain translation models with one layer corrupted."""
    group = f"model.{stack}.layers.{layer}"
    return Runs("translation/multi30k", "plain", WORST, "bleu", ending="-layers", group=group)


def kept(kind: type[_Record], folder: str, pattern: str) -> dict[str, _Record]:
    """Return records of one kind by the names of their files."""
    return {path.stem: kind.load(path) for path in sorted((RESULTS / folder).glob(pattern))}


def resnets() -> dict[str, EvaluationRecord]:
    """Return what was measured of the trained ResNets on test images."""
    return kept(EvaluationRecord, "paper_1", "*-test.json")


def probes(pattern: str, folder: str = "paper_1") -> dict[str, SweepRecord]:
    """Return the probes of some models, the trained ResNets unless told."""
    return kept(SweepRecord, folder, pattern)


def layer_norm_is_weakest() -> tuple[bool, str]:
    """Whether layer-norm is the weakest kind of a BERT along the gradient."""
    (sweep,) = probes("plain-seed1-kinds.json", "probes").values()
    gradient = {group: replace(record, corruptions=along(record)) for group, record in sweep.records.items()}
    found = means(replace(sweep, records=gradient))
    order = sorted(found, key=lambda group: found[group])
    return order[0] == "layer-norm", f"from the weakest: {', '.join(order)}"


def along(record: EvaluationRecord) -> tuple[CorruptionRecord, ...]:
    """Return the corruptions along the gradient."""
    return tuple(row for row in record.corruptions if row.corruption == "gradient")


def chance_does_little() -> tuple[bool, str]:
    """Whether random corruptions to first order are distributed as Theorem 1 says, and none comes near the worst."""
    found = json.loads((RESULTS / "random_corruption" / "record.json").read_text())["first_order"]
    ratio = found["standard_deviation"] / found["theoretical_standard_deviation"]
    inside = [one["low"] <= one["theoretical"] <= one["high"] for one in found["quantiles"]]
    largest = max(one["high"] for one in found["quantiles"]) / found["largest_first_order"]
    holds = abs(ratio - 1) < 0.05 and largest < 1 / 100
    return holds, (
        f"deviation {ratio:.2f} of theory's, {sum(inside)} of {len(inside)} quantiles within their interval; "
        f"99.5 % of {found['draws']:,} reach less than 1/{1 / largest:.0f} of the gradient's"
    )


def costs_its_passes() -> tuple[bool, str]:
    """Whether a defended step takes as many operations as its passes have."""
    rows = json.loads((RESULTS / "benchmark.json").read_text())["rows"]
    found = {row["arm"]: row for row in rows}
    steps = {f"whole model, K = {steps}": steps + 1 for steps in (1, 2, 3)}
    seen = "; ".join(
        f"K = {passes - 1}: {found[arm]['operations_ratio']:.2f} times the operations, "
        f"{found[arm]['time_ratio_median']:.2f} the time on a CPU"
        for arm, passes in steps.items()
    )
    return all(abs(found[arm]["operations_ratio"] - passes) < 0.01 for arm, passes in steps.items()), seen


def costs_two_passes_on_a_gpu() -> tuple[bool, str]:
    """Whether K = 1 costs at most two stock steps on a GPU, at each shape that was timed."""
    checks = json.loads((RESULTS / "gpu" / "checks.json").read_text())["checks"]
    found = {
        row["what"].removesuffix(", whole model, K = 1: ratio to stock, median"): row["value"]
        for name in ("bert_base", "decoder")
        for row in checks[name]["rows"]
        if row["what"].endswith(", whole model, K = 1: ratio to stock, median")
    }
    return max(found.values()) <= 2, "; ".join(f"{shape}: {ratio:.2f}" for shape, ratio in found.items())


def worst_flips_are_harmless() -> tuple[bool, str]:
    """Whether the models of a defense, all of them, survive as many flips of int8 codes as were tried."""
    broken: dict[str, list[int | None]] = {}
    for name, record in kept(FlipRecord, "worst_bit_flips", "*-seed?-int8.json").items():
        broken.setdefault(name.partition("-seed")[0], []).append(record.flips)
    defended = {arm: counts for arm, counts in broken.items() if arm != "plain"}
    seen = "; ".join(
        f"{arm}: {', '.join('none' if count is None else str(count) for count in counts)}"
        for arm, counts in broken.items()
    )
    holds = any(set(counts) == {None} for counts in defended.values())
    return holds, f"int8 flips that break it, one number a seed: {seen}"


# What is trained, and what may be lost without corruption.
USUAL: dict[str, tuple[str, float, str]] = {
    "vit": ("a small ViT, fine-tuned", 2.0, "two points"),
    "lora": ("LoRA adapters of a small BERT, SST-2", 2.0, "two points"),
    "causal-lm": ("a small Llama from scratch, from a third on", 0.05, "0.05 nats"),
    "causal-lm-tuned": ("a small Llama, fine-tuned", 0.05, "0.05 nats"),
    "seq2seq-tuned": ("a small translation model, fine-tuned, BLEU", 2.0, "two points of BLEU"),
}


def usual(case: str, arm: str, rows: Rows, margin: float = 0.0) -> Higher:
    """Return whether an arm of a usual case is better than the plain one, or worse by less than a margin."""
    metric = CASES[case].metric
    pair = ("plain", arm) if metric == "loss" else (arm, "plain")
    return arms(f"usual_cases/{case}", *pair, rows, margin=margin, metric=metric)


def of_last(arm: str, rows: Rows, margin: float = 0.0) -> Higher:
    """Return whether the last checkpoint of a decoder from scratch loses less than the plain one, or little more."""
    folder = "quantization_while_training"
    return arms(folder, "linear", arm, rows, margin=margin, metric="loss", ending="-last")


def radius_of(case: str, arm: str) -> float:
    """Return the radius of an arm of a usual case."""
    defense = CASES[case].arms[arm].defense
    assert isinstance(defense, ConstrainedDefense)
    return defense.constraint.epsilon


PAPER_1, PAPER_2, OURS = "paper 1", "paper 2", "this repository"
LSTM = "language_model"
FIRST, FULL, SMALL = "sst2_first", "sst2_full", "sst2"
K1, BOTH = "multi_step_risk-1", "worst-and-4-bits"
CLAIMS = [
    Claim(
        PAPER_1,
        "A corruption along the gradient harms more than a random one (Table 1): parser, UAS, 20 constraints",
        within(
            "parser",
            "plain",
            of("random"),
            of("gradient", but=tuple(f"gradient-based L2 ε={epsilon}" for epsilon in (0.05, 0.2, 0.5))),
            metric="uas",
        ),
    ),
    Claim(
        PAPER_1,
        "The same: language model, log perplexity, L2, six radii",
        within(LSTM, "plain", along_l2(RADII), along_l2(RADII, "random"), metric="loss"),
    ),
    Claim(PAPER_1, "The same: trained ResNets on CIFAR-10", Seen(lambda: worse_by_gradient(resnets())), "paper_1"),
    Claim(
        PAPER_1,
        "It needs a far smaller corruption (Figure 3): ResNets",
        Seen(lambda: smaller_by_gradient(resnets())),
        "paper_1",
    ),
    Claim(
        PAPER_1,
        "The same: BERT on SST-2, 0.1 along the gradient against 20 at random, L2",
        within(FULL, "plain", labelled("random L2 ε=20"), labelled("gradient-based L2 ε=0.1")),
    ),
    Claim(
        PAPER_1,
        "A random corruption hardly ever comes near the worst one (Theorem 1, Table 3)",
        Seen(chance_does_little),
        "random_corruption",
    ),
    Claim(
        PAPER_1,
        "Normalisation is the weakest kind (Figure 4): ResNets",
        Seen(lambda: weakest(probes("*-kinds.json"), "other normalization")),
        "paper_1",
    ),
    Claim(PAPER_1, "The same: BERT on SST-2, along the gradient", Seen(layer_norm_is_weakest), "probes"),
    Claim(
        PAPER_1,
        "Convolutions are weaker than fully connected layers (Figure 4): ResNets",
        Seen(lambda: below(probes("*-kinds.json"), "convolution", "linear")),
        "paper_1",
    ),
    Claim(
        PAPER_1,
        "Lower layers are weaker (text of Figure 4): ResNets",
        Seen(lambda: lower_is_weaker(probes("*-stages.json"))),
        "paper_1",
    ),
    Claim(
        PAPER_1,
        "Corruption-resistant training makes it harder to break (Table 2): parser, along the gradient, four radii",
        arms(
            "parser",
            K1,
            "plain",
            along_l2((0.05, 0.1, 0.2, 0.5)),
            metric="uas",
        ),
    ),
    Claim(
        PAPER_1, "It improves the model without corruption: parser", arms("parser", K1, "plain", CLEAN, metric="uas")
    ),
    *(
        Claim(PAPER_1, f"{what}: language model, log perplexity, plain against {words}", evidence)
        for name, words in (("acrt", "ACRT in L∞, as there"), (K1, "K = 1 in L2"))
        for what, evidence in {
            "It is harder to break (Table 2), three radii": arms(
                LSTM, "plain", name, along_l2(RADII[-3:]), metric="loss"
            ),
            "It is better without corruption": arms(LSTM, "plain", name, CLEAN, metric="loss"),
        }.items()
    ),
    Claim(
        PAPER_1,
        "Without corruption the metric rises with a small ε, 0.02: SST-2, 2,048 sentences",
        arms("radius", "epsilon-0.02", "plain", CLEAN),
    ),
    Claim(
        PAPER_1,
        "… and falls with a large one, 0.5: SST-2, 2,048 sentences",
        arms("radius", "plain", "epsilon-0.5", CLEAN),
    ),
    Claim(PAPER_1, "The same on ImageNet", "Neither the data nor a model trained on it is at hand."),
    Claim(
        PAPER_2,
        "A defended model is harder to break in the worst direction (Table 1): SST-2, all sentences, 7 corruptions",
        arms(FIRST, K1, "plain", WORST),
    ),
    Claim(PAPER_2, "The same: SST-2, 2,048 sentences", arms(SMALL, K1, "plain", WORST)),
    Claim(
        PAPER_2,
        "The same: translation, Multi30k, BLEU",
        arms("translation/multi30k", "defended", "plain", WORST, ending="-table6-whole", metric="bleu"),
    ),
    Claim(
        PAPER_2,
        "… and under random noise (Table 1): SST-2, all sentences, four kinds",
        arms(FIRST, K1, "plain", NOISE),
    ),
    Claim(
        PAPER_2,
        "… and under quantization (Table 1): SST-2, all sentences, 6, 5, 4 bits",
        arms(FIRST, K1, "plain", FEW_BITS),
    ),
    Claim(PAPER_2, "It is better without corruption: SST-2, all sentences", arms(FIRST, K1, "plain", CLEAN)),
    Claim(
        PAPER_2,
        "The same: translation, Multi30k, BLEU",
        arms("translation/multi30k", "defended", "plain", CLEAN, ending="-table6-whole", metric="bleu"),
    ),
    Claim(
        PAPER_2,
        "More steps defend better: SST-2, 2,048 sentences, K = 3 against K = 1",
        arms(SMALL, "multi_step_risk-3", K1, WORST),
    ),
    Claim(
        PAPER_2,
        "It defends better than SAM: SST-2, all sentences, SAM with half the radius",
        arms(FIRST, K1, "sam-half", WORST),
    ),
    Claim(
        PAPER_2,
        "… and than AWP: SST-2, 2,048 sentences, AWP with half the radius, from the middle on",
        arms(SMALL, K1, "awp-late", WORST),
    ),
    Claim(
        PAPER_2,
        "… and than ACRT",
        "With α = ½ ACRT is K = 1, the same update; with α = 1 it is SAM.",
    ),
    Claim(
        PAPER_2,
        "With the same radius SAM does not converge on SST-2: 2,048 sentences, plain against SAM",
        arms(SMALL, "plain", "sam", CLEAN),
    ),
    Claim(
        PAPER_2,
        "A layer defended alone is harder to break there than with all defended (Table 6): Multi30k, last layer, BLEU",
        arms("translation/multi30k", "last-layer", "defended", WORST, ending="-table6-last", metric="bleu"),
    ),
    *(
        Claim(
            PAPER_2,
            f"Upper layers are weaker (Figure 3): Multi30k, {stack}, first against last layer, BLEU",
            Higher(layer_of(stack, 0), layer_of(stack, 1)),
        )
        for stack in ("encoder", "decoder")
    ),
    *(
        Claim(
            by,
            f"{what}: a ResNet-20 on CIFAR-10, {words}, {arm}, a short training",
            arms("images", f"{start}-{name}", f"{start}-plain", which),
        )
        for start, words in (("tuned", "fine-tuned"), ("scratch", "from scratch"))
        for by, arm, name in ((PAPER_1, "ACRT", "acrt"), (PAPER_1, "penalty", "penalty"), (PAPER_2, "K = 1", K1))
        for what, which in (("Harder to break along the gradient", WORST), ("Better without corruption", CLEAN))
    ),
    *(
        Claim(
            by,
            f"{what}: a ResNet-20 on 20 classes of Tiny-ImageNet, from scratch, {arm}, a short training",
            arms("tiny_imagenet", f"scratch-{name}", "scratch-plain", which),
        )
        for by, arm, name in ((PAPER_1, "ACRT in L∞, as there", "acrt-inf"), (PAPER_2, "K = 1", K1))
        for what, which in (("Harder to break along the gradient", WORST), ("Better without corruption", CLEAN))
    ),
    *(
        Claim(
            PAPER_2,
            f"{what}: Faster R-CNN on blood cells, AP50, a short training",
            arms("detection", K1, "plain", which, metric="map_50"),
        )
        for what, which in (
            ("Harder to break in the worst direction (Table 1)", WORST),
            ("… and under random noise", NOISE),
            ("… and under quantization", FEW_BITS),
            ("Better without corruption", CLEAN),
        )
    ),
    Claim(
        OURS,
        "K = 1 costs less than half a point without corruption: SST-2, all sentences",
        arms(FIRST, K1, "plain", CLEAN, margin=0.5),
    ),
    Claim(
        OURS,
        "SAM with half the radius, two passes as K = 1, is as good a defense within two points: SST-2, all sentences",
        arms(FIRST, "sam-half", K1, WORST, margin=2.0),
    ),
    Claim(
        OURS,
        "Half of the loss at 4 bits holds more at 4 bits, one scale a tensor: SST-2, all sentences",
        arms(FULL, "half-4-bits", "plain", PER_TENSOR_4),
    ),
    Claim(
        OURS,
        "The same with a scale a channel: SST-2, all sentences",
        arms(FULL, "half-4-bits-channel", "plain", PER_CHANNEL_4),
    ),
    *(
        Claim(OURS, f"Worst direction and 4 bits in one step: {what}: SST-2, all sentences", evidence)
        for what, evidence in {
            "less than half a point is lost without corruption": arms(FULL, BOTH, "plain", CLEAN, margin=0.5),
            "harder to break in the worst direction": arms(FULL, BOTH, "plain", WORST),
            "holds more at 4 bits, one scale a tensor": arms(FULL, BOTH, "plain", PER_TENSOR_4),
            "… and under random noise": arms(FULL, BOTH, "plain", NOISE),
            "… and after the three worst flips of int8": arms(FULL, BOTH, "plain", FLIPS_3),
        }.items()
    ),
    Claim(
        OURS,
        "Half of the loss at 4 bits a channel keeps more without corruption than torchao's QAT: SST-2, all sentences",
        arms(FULL, "half-4-bits-channel", "torchao", CLEAN),
    ),
    Claim(
        OURS,
        "… and is as good at 4 bits a channel, within half a point",
        arms(FULL, "half-4-bits-channel", "torchao", PER_CHANNEL_4, margin=0.5),
    ),
    Claim(
        OURS,
        "SAM with half the radius on an eighth of the batch gains in the worst direction: SST-2, 2,048 sentences",
        arms("less", "sam-half-eighth", "plain", WORST),
    ),
    *(
        Claim(
            OURS,
            f"A defense of all layers that starts {when} of six epochs {what}: Multi30k, BLEU",
            arms("translation/starts", *pair, rows, ending="-table6-whole", metric="tokenized_bleu"),
        )
        for when, what, pair, rows in (
            ("with the third", "makes a translation model harder to break", ("start-2", "plain"), WORST),
            ("with the fifth", "makes it harder to break", ("defended", "plain"), WORST),
            ("with the third", "defends better than from the fifth on", ("start-2", "defended"), WORST),
            ("with the first", "costs BLEU without corruption", ("plain", "start-0"), CLEAN),
        )
    ),
    *(
        Claim(OURS, f"{what}: {case}, ε = {radius_of(name, arm):g}", usual(name, arm, rows, lost))
        for name, (case, margin, unit) in USUAL.items()
        for what, arm, rows, lost in (
            ("Harder to break along the gradient", "radius-2", WORST, 0.0),
            ("Harder to break along the gradient", "radius-3", WORST, 0.0),
            (f"… and costs less than {unit} without corruption", "radius-3", CLEAN, margin),
        )
    ),
    Claim(
        OURS,
        "Half of the loss at 4 bits of what they are merged into holds more at 4 bits: LoRA adapters, SST-2",
        arms("usual_cases/lora", "base-4-bits", "plain", PER_TENSOR_4),
    ),
    Claim(
        OURS,
        "From nothing on, the defense costs more without corruption than from a third on: a small Llama from scratch",
        arms("usual_cases/causal-lm", "from-0", "radius-2", CLEAN, metric="loss"),
    ),
    *(
        Claim(
            OURS,
            f"Half of the loss at {bits} bits loses less at {bits} bits: a small Llama from scratch, last checkpoint",
            of_last(f"linear-{bits}-bits", labelled(f"{bits}-bit quantization")),
        )
        for bits in (4, 3)
    ),
    Claim(
        OURS,
        "Half of the loss at 3 bits costs less than 0.05 nats without corruption: the same",
        of_last("linear-3-bits", CLEAN, margin=0.05),
    ),
    *(
        Claim(OURS, f"{says}: SST-2, 2,048 sentences", arms("sst2_deployed", arm, "plain", rows, margin=margin))
        for says, arm, rows, margin in (
            ("Half of the loss at 4 bits holds more at 4 bits, one scale a tensor", "half-4-bits", PER_TENSOR_4, 0.0),
            ("Half of the loss at 4 bits a channel holds more there", "half-4-bits-channel", PER_CHANNEL_4, 0.0),
            ("… and costs less than half a point without corruption", "half-4-bits-channel", CLEAN, 0.5),
        )
    ),
    *(
        Claim(OURS, f"{says}: SST-2, 2,048 sentences", arms("sst2_pruned", arm, "plain", rows, margin=margin))
        for says, arm, rows, margin in (
            ("Half of the loss at 60 % pruned holds more when pruned, six ways", "half-pruned", PRUNED, 0.0),
            ("… and costs less than half a point without corruption", "half-pruned", CLEAN, 0.5),
            ("Half of the loss at 2:4 holds more there", "half-2-of-4", TWO_OF_FOUR, 0.0),
            ("Trained in the worst direction, it holds more when pruned, six ways", K1, PRUNED, 0.0),
        )
    ),
    *(
        Claim(
            OURS,
            f"{says}: all-MiniLM-L6-v2, nDCG@10",
            arms("embeddings", arm, "plain", rows, margin=margin, metric="cosine_ndcg@10"),
        )
        for says, arm, rows, margin in (
            ("Half of the loss at 2 bits a channel finds more there", "quantization-2", PER_CHANNEL_2, 0.0),
            ("… and costs less than half a point without corruption", "quantization-2", CLEAN, 0.5),
            ("A defended embedding model is harder to break along the gradient", K1, WORST, 0.0),
        )
    ),
    *(
        Claim(
            OURS,
            f"{says}: Moonshine tiny, words that are wrong",
            arms("speech", "plain", arm, rows, margin=margin, metric="wer", ending="-test"),
        )
        for says, arm, rows, margin in (
            ("Half of the loss at 4 bits a channel hears more there", "half-4-bits", PER_CHANNEL_4, 0.0),
            ("… and costs less than a point without corruption", "half-4-bits", CLEAN, 1.0),
            ("Trained in the worst direction, it hears more at 4 bits a channel", K1, PER_CHANNEL_4, 0.0),
        )
    ),
    Claim(OURS, "A defense makes the worst bit flips harmless", Seen(worst_flips_are_harmless), "worst_bit_flips"),
    Claim(OURS, "A defended step costs its K + 1 passes: counted", Seen(costs_its_passes), ""),
    Claim(OURS, "K = 1 costs at most two stock steps on a GPU: one H100", Seen(costs_two_passes_on_a_gpu), "gpu"),
]


def study_of(folder: str) -> tuple[str, Study] | None:
    """Return the study whose records lie in a folder, and how `scripts.reproduce` calls it."""
    for name, sizes in STUDIES.items():
        for size, study in sizes.items():
            if study.records == folder:
                return f"{name} --size {size}", study
    return None


@dataclass(frozen=True)
class Row:
    """A line of the page."""

    claim: Claim
    verdict: str
    seen: str
    p: tuple[str, str, str] = ("", "", "")

    def cells(self) -> list[str]:
        """Return what the line says."""
        return [self.claim.says, self.verdict, self.seen, self.claim.campaign or "–", *self.p]


def rows() -> list[Row]:
    """Return a line for each claim."""
    tests = {place: one.evidence.test() for place, one in enumerate(CLAIMS) if isinstance(one.evidence, Higher)}
    of_page = corrected(tests)
    of_campaign: dict[int, float] = {}
    for campaign in {CLAIMS[place].campaign for place in tests}:
        of_campaign |= corrected({place: test for place, test in tests.items() if CLAIMS[place].campaign == campaign})
    found = []
    for place, one in enumerate(CLAIMS):
        match one.evidence:
            case Higher():
                test, p, of_all = tests[place], of_campaign[place], of_page[place]
                verdict = CONFIRMED if p < LEVEL else NOT_CONFIRMED
                mark = ALONE if test.p_value < LEVEL <= p else NOT_OF_ALL if p < LEVEL <= of_all else ""
                p_values = probability(test.p_value), probability(p), probability(of_all)
                found.append(Row(one, verdict + mark, seen(one.evidence, test), p_values))
            case Seen():
                holds, words = one.evidence.how()
                found.append(Row(one, CONFIRMED if holds else NOT_CONFIRMED, words.rstrip(".")))
            case str():
                found.append(Row(one, NOT_TESTABLE, one.evidence))
    return found


def corrected(tests: Mapping[int, TTest]) -> dict[int, float]:
    """Return the p-values of tests, corrected for all of them."""
    return dict(zip(tests, holm_correction([test.p_value for test in tests.values()]), strict=True))


def seen(higher: Higher, test: TTest) -> str:
    """Return both means, their difference with its interval, and how many runs there were."""
    first, second = higher.first.values(), higher.second.values()
    middle = test.mean_difference - higher.margin
    half = test.critical_value((1 - 0.95) / 2) * test.standard_error
    unit = higher.first.unit
    digits = 2 if unit == "nats" else 1
    low, difference, high = (f"{middle + end:+.{digits}f}" for end in (-half, 0, half))
    return (
        f"{fmean(first):.{digits}f} against {fmean(second):.{digits}f}: {difference} {unit} [{low}, {high}], "
        f"n = {len(first)} + {len(second)}"
    )


def probability(p: float) -> str:
    """Return a p-value with the digits that count.

    Examples:
        >>> probability(0.0421), probability(0.00042), probability(1e-9)
        ('0.042', '0.0004', '< 0.0001')
    """
    if p < 1e-4:
        return "< 0.0001"
    return f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


ABOVE = """# What is claimed, and what the records say

`python -m scripts.claims` writes this page from the records in the folders beside it, and a test compares.
{claims} claims: {counts}.

How to read a row:

- Each seed gives one number, the mean of the metric over the corruptions that the claim names; n is the number of runs
  on each side. The brackets are the 95 % interval of the difference of the means.
- p is that of Student's one-sided t-test with pooled variance, as in paper 2, Appendix C. The next columns correct it
  by Holm's method: for all tests on the records of the same campaign, and for all {tested} tests of this page.
- **Confirmed** means p below {level:g} after the correction for its campaign. With ‡ it is not below {level:g} after
  the correction for the whole page. † marks p < {level:g} before any correction: a hint, no more.
- Not confirmed is not refuted: with three seeds only large effects show. Where a claim allows a loss ("less than half
  a point"), the test is about that margin. What was computed or counted once has no p.

Campaigns were chosen as the families when the page had {chosen} tests, and all of them had been seen. If the whole
page were the family, what one campaign shows would fade as other campaigns are added."""


def page() -> str:
    """Return the page of claims."""
    found = rows()
    tested = sum(isinstance(one.evidence, Higher) for one in CLAIMS)
    verdicts = [row.verdict.removesuffix(ALONE).removesuffix(NOT_OF_ALL) for row in found]
    counts = ", ".join(f"{verdicts.count(one)} {one}" for one in (CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE))
    header = ["claim", "here", "what is seen", "records", "p", "of its campaign", "of the page"]
    counts = counts.replace(",", f" ({sum(row.verdict.endswith(NOT_OF_ALL) for row in found)} of them ‡),", 1)
    parts = [ABOVE.format(claims=len(found), counts=counts, tested=tested, level=LEVEL, chosen=TESTED_THEN)]
    for by in (PAPER_1, PAPER_2, OURS):
        lines = [row.cells() for row in found if row.claim.by == by]
        parts += [f"## Of {by}", markdown_table(header, lines, texts=4)]
    return "\n\n".join([*parts, "## How the records were made", "\n".join(commands())]) + "\n"


def commands() -> Iterator[str]:
    """Return a line for each folder of records, and each by itself: the command that makes it, or where to look."""
    paths = (path.relative_to(RESULTS) for path in RESULTS.rglob("*.json"))
    for folder in sorted({str(path if len(path.parts) == 1 else path.parent) for path in paths}):
        known = study_of(folder)
        if known is None:
            yield f"- [{folder}]({folder}): see [the table of experiments](../README.md)"
        else:
            name, study = known
            yield f"- [{folder}]({folder}): `python -m scripts.reproduce {name}`, which runs `{study.line()}`"


def first_table() -> str:
    """Return the first table of the README: plain, defended, and defended for 4 bits too, at full size."""
    columns = {"plain": (FIRST, "plain"), "defended": (FIRST, K1), "defended, for 4 bits too": (FULL, BOTH)}
    said = {
        "as it is": CLEAN,
        "worst direction, ε = 0.1": labelled("gradient-based L2 ε=0.1"),
        "worst direction, ε = 0.2": labelled("gradient-based L2 ε=0.2"),
        "Gaussian noise, σ = 0.02": labelled("Gaussian σ=0.02"),
        "4 bits, one scale a tensor": PER_TENSOR_4,
    }
    body = [
        [words, *(mean_and_deviation(Runs(*place, which).values(), 1) for place in columns.values())]
        for words, which in said.items()
    ]
    body.append(["passes a training step", "1", "2", "3"])
    return markdown_table(["accuracy (%) with these weights", *columns], body) + "\n"


def with_first_table(text: str) -> str:
    """Return the README with the first table written anew between its marks.

    Raises:
        ValueError: The marks are not there.
    """
    start, end = FIRST_TABLE
    if start not in text or end not in text:
        raise ValueError(f"README.md: expected {start.strip()} and {end.strip()}, got none; put them back")
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}{first_table()}{end}{after}"


def main() -> None:
    """Write the page and the first table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(with_first_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(page())


if __name__ == "__main__":
    main()
