"""Which records may be set side by side, and which are repetitions of one another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TypeAlias

from hf_parcor.records.data import EvaluationData, same_data
from hf_parcor.records.evaluation import CorruptionRecord, EvaluationRecord

SEVERAL_TASKS = ("", "text2text-generation")  # what says nothing, or is said of translation and summarization alike
_FIELDS = ("config", "split", "revision", "rows")
_FEW = 4  # names that have room in a sentence


def check_comparable(records: Mapping[str, EvaluationRecord]) -> None:
    """Refuse records of different tasks, or of data that are known to be different: that would look like robustness.

    Data with the same fingerprint and as many rows are the same, whatever they are called. (The fingerprint is that of
    the data of gradients; the metric may be of other rows.) What a record does not say is no difference.

    Args:
        records: By the names that the message shall have.

    Raises:
        ValueError: Two records differ in task, data set, configuration, split, revision or number of rows.

    Examples:
        >>> from hf_parcor import CorruptionRecord
        >>> clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,)})
        >>> def record(rows):
        ...     return EvaluationRecord("bert", {}, 1, clean, (), evaluated_on=EvaluationData("dev.tsv", rows=rows))
        >>> check_comparable({"a": record(120), "b": record(120)})
        >>> check_comparable({"a": record(120), "b": record(256)})
        Traceback (most recent call last):
            ...
        ValueError: records: expected all measured on the same data, got dev.tsv, 120 rows for 'a' and dev.tsv, 256
        rows for 'b'; measure them on the same data, or report each by itself
    """
    # A sweep has hundreds of records that say the same.
    distinct: dict[object, str] = {}
    for name, record in records.items():
        distinct.setdefault((record.task, record.data, record.evaluated_on), name)
    for name, other in combinations(distinct.values(), 2):
        first, second = records[name], records[other]
        if first.task != second.task and first.task not in SEVERAL_TASKS and second.task not in SEVERAL_TASKS:
            raise ValueError(
                f"records: expected all of one task, got {first.task} for {name!r} and {second.task} for {other!r}; "
                "report each by itself"
            )
        if data_differ(first, second):
            raise ValueError(
                f"records: expected all measured on the same data, got {first.evaluated_on} for {name!r} and "
                f"{second.evaluated_on} for {other!r}; measure them on the same data, or report each by itself"
            )


Identity: TypeAlias = tuple[str, str, int]


def by_identity(rows: Iterable[CorruptionRecord]) -> dict[Identity, CorruptionRecord]:
    """Return rows by what makes them rows of one corruption in two records: its name, its label, which of these it is.

    Examples:
        >>> rows = [CorruptionRecord("quantization", f"{bits}-bit quantization", {}, (0,), {}) for bits in (4, 3, 4)]
        >>> list(by_identity(rows))[1:]
        [('quantization', '3-bit quantization', 0), ('quantization', '4-bit quantization', 1)]
    """
    found: dict[Identity, CorruptionRecord] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for row in rows:
        name = row.corruption, row.label
        found[*name, seen[name]] = row
        seen[name] += 1
    return found


def in_one_alone(models: Mapping[str, Iterable[CorruptionRecord]]) -> dict[str, list[str]]:
    """Return the labels of the corruptions that no other model was measured under, by the name of the model.

    Args:
        models: Corrupted rows, by the name of the model.

    Raises:
        ValueError: There are two models or more, and no two have a corruption in common.
    """
    found = {name: by_identity(rows) for name, rows in models.items()}
    counts = Counter(key for keys in found.values() for key in keys)
    if len(found) > 1 and counts and max(counts.values()) == 1:
        told = "; ".join(
            f"{name!r}: {', '.join(label for _, label, _ in keys) or 'none'}" for name, keys in found.items()
        )
        raise ValueError(
            "records: expected corruptions that two of them have, got nothing in common but the clean model "
            f"({told}); evaluate them under the same"
        )
    return {name: [row.label for key, row in rows.items() if counts[key] == 1] for name, rows in found.items()}


def check_repetitions(groups: Mapping[str, Sequence[EvaluationRecord]], model: str = "") -> None:
    """Refuse records that are no repetitions of each other: of one model, trained alike with different seeds.

    Args:
        groups: What is taken for repetitions, by what was corrupted: the first of each are of one training.
        model: What messages call the model.

    Raises:
        ValueError: Two are of the same weights, or the same record, so that n would count one of them twice; or they
            differ in target, in the number of weights, or as in `check_comparable`.
    """
    for first, other in combinations(zip(*groups.values(), strict=False), 2):
        if all(map(_is_same_model, first, other)):
            raise ValueError(
                f"{_records_of(model)}: expected models that were trained with different seeds, got one twice, "
                f"{first[0].model}; give each record once, and measure with more trials instead"
            )
    for group, records in groups.items():
        check_comparable({f"{record.model}, seed {place}": record for place, record in enumerate(records, start=1)})
        for one, two in combinations(records, 2):
            of_one, of_two = ((record.parameters, asked_for(record)) for record in (one, two))
            if of_one != of_two:
                raise ValueError(
                    f"{_records_of(model, group)}: expected repetitions of one model with the same targets, got "
                    f"{of_one[0]:,} weights of {one.model} ({of_one[1]}) and {of_two[0]:,} of {two.model} "
                    f"({of_two[1]}); compare them as models, each under its name"
                )


def _records_of(*names: str) -> str:
    named = ", ".join(filter(None, names))
    return f"records of {named}" if named else "records"


def _is_same_model(first: EvaluationRecord, other: EvaluationRecord) -> bool:
    """Return whether two records are of the same weights; of those that do not say, whether they are one record."""
    if first.weights and other.weights:
        return first.weights == other.weights
    return first.to_json() == other.to_json()


def asked_for(record: EvaluationRecord, *, in_short: bool = False) -> str:
    """Return the targets of a record, in words: all of them, not given and "all" being the same.

    Args:
        record: The record.
        in_short: Whether the first stands for all where there are many, as the weights of a recipe are.
    """
    words = few_words if in_short else _words
    shown = [words(record.target.get("target_modules", "all"))]
    shown += [
        f"{name} {words(value)}" for name, value in record.target.items() if name != "target_modules" and value != []
    ]
    return ", ".join(shown)


def few_words(value: object) -> str:
    """Return a target in words; of many names the first, and how many others there are.

    Examples:
        >>> few_words("all"), few_words(["key", "query"]), few_words([f"layer.{index}" for index in range(12)])
        ('all', 'key, query', 'layer.0 and 11 others')
    """
    if isinstance(value, list) and len(value) > _FEW:
        return f"{value[0]} and {len(value) - 1} others"
    return _words(value)


def data_differ(first: EvaluationRecord, other: EvaluationRecord) -> bool:
    """Return whether two records are known to be of different data."""
    one, two = first.evaluated_on, other.evaluated_on
    if one is None or two is None:
        return False
    if same_data(first.data, other.data) and (one.rows == two.rows or None in (one.rows, two.rows)):
        return False
    named = _both_or_neither(one, two) and (one.id or one.name) != (two.id or two.name)
    pairs = [(getattr(one, name), getattr(two, name)) for name in _FIELDS]
    return named or any(left != right and left not in ("", None) and right not in ("", None) for left, right in pairs)


def data_may_differ(first: EvaluationRecord, other: EvaluationRecord) -> bool:
    """Return whether the fingerprints of two records differ, and neither says that the data are the same."""
    named = [record.evaluated_on for record in (first, other)]
    told = named[0] == named[1] and named[0] is not None and named[0].is_known
    return same_data(first.data, other.data) is False and not told


def _both_or_neither(one: EvaluationData, two: EvaluationData) -> bool:
    """Return whether names can be compared: a file may be a copy of what the Hub has."""
    unnamed = EvaluationData().name
    return bool(one.id) == bool(two.id) and unnamed not in (one.id or one.name, two.id or two.name)


def _words(value: object) -> str:
    return value if isinstance(value, str) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
