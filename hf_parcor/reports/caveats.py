"""What to know of the records before relying on a verdict: repetitions, data, sizes, and what was noticed."""

from __future__ import annotations

from itertools import combinations

from hf_parcor.records.comparable import data_may_differ
from hf_parcor.records.data import OF_ROWS, same_data
from hf_parcor.records.evaluation import all_notes
from hf_parcor.reports.comparison import differences
from hf_parcor.reports.study import Study
from hf_parcor.reports.verdict import are_repeated

_QUOTED = 8  # as many notes of records a report repeats


def notes(study: Study) -> list[str]:
    """Return sentences on what the records were made of: repetitions, data, sizes, and what was noticed on the way."""
    found = [_repetitions(study), *study.info.guesses(study.metric)]
    if len(study.models) > 1 and any(one.p_value is not None for one in differences(study, by_strength=True)):
        found.append(
            "Differences are judged by Welch's t-test, two-sided, at 5 %, p-values corrected by Holm's method: in the "
            "verdict for all models, groups and kinds of corruption, in the table for all of its rows."
        )
    if len(study.models) == 1 and len(study.groups) > 1:
        judged = (
            " It is judged by Welch's t-test, one-sided, at 5 %, p-values corrected by Holm's method for the number "
            "of groups, for each kind of corruption by itself."
        )
        repeated = any(are_repeated(curves.values()) for curves in study.curves.values())
        found.append(
            f"Fragility is the mean {study.loss} over the strengths that all groups have, over the median of that of "
            f"the other groups, if these lose more than 1 %.{judged * repeated}"
        )
    sizes = {records[0].parameters for groups in study.models.values() for records in groups.values()}
    if len(sizes) > 1:
        strengths: dict[tuple[str, str], list[str]] = {}
        for series, curves in study.curves.items():
            for key, curve in curves.items():
                strengths.setdefault(key, []).extend(f"{series.name}, {point.name}" for point in curve.points)
        alike = len(set(map(frozenset, strengths.values()))) == 1
        begin = "Every group was corrupted with the same strengths, though their" if alike else "The groups'"
        found.append(
            f"{begin} sizes differ: {min(sizes):,} to {max(sizes):,} weights. A radius bounds a group as one "
            "vector, so it is more for a group whose weights have a small norm."
        )
    found += data_caveat(study)
    for model, labels in study.left_out.items():
        named = f" of {model}" * bool(model)
        found.append(f"Left out, since not all records{named} have it: {'; '.join(labels)}.")
    distinct = list(dict.fromkeys(note for record in study.records for note in all_notes(record)))
    found += [f"Noticed while measuring: {note}" for note in distinct[:_QUOTED]]
    if len(distinct) > _QUOTED:
        found.append(f"Noticed while measuring: {len(distinct) - _QUOTED} more notes, in the records.")
    return found


def data_caveat(study: Study) -> list[str]:
    """Return a sentence where the records may be of different data, as far as they say."""
    distinct = {(record.data, record.evaluated_on): record for record in study.records}
    named = {record.evaluated_on for record in distinct.values() if record.data}
    pairs = list(combinations(distinct.values(), 2))
    if any(data_may_differ(*pair) for pair in pairs):
        known = all(one is not None and one.is_known for one in named)
        told = "do not name one and the same" if known else "do not all say what they were measured on"
        return [
            f"The records have different data fingerprints, and {told}: they may be of different data, and "
            "their differences may come from that."
        ]
    different = [pair for pair in pairs if same_data(*(record.data for record in pair)) is False]
    if different:
        rows = " and as many rows" if all(one is not None and one.rows is not None for one in named) else ""
        divided = "their order" if all(one.data.startswith(OF_ROWS) for one, _ in different) else "batches"
        return [
            f"The records have different data fingerprints, though the data have one name{rows}: "
            f"tokenizers, lengths or {divided} differ, or the contents do."
        ]
    return []


def _repetitions(study: Study) -> str:
    counts = {len(records) for groups in study.models.values() for records in groups.values()}
    if max(counts) > 1:
        shown = str(*counts) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
        single = ", and those of a single one are repetitions themselves, one by one" if study.mixes_trials else ""
        return (
            f"Repetitions are {shown} records, taken for trainings of one model with different seeds"
            f"{_of_models(study)}; trials within a record count as their mean{single}."
        )
    if any(len(row.seeds) > 1 for record in study.records for row in record.rows()):
        return (
            "Repetitions are the trials of random corruptions of the same trained weights: the spread says nothing "
            "about training again with another seed."
        )
    return "Everything was measured once, so nothing is known of the spread."


def _of_models(study: Study) -> str:
    """Return what such models are called, where they have several names: the reader can tell whether they are one."""
    of_groups = [records for groups in study.models.values() for records in groups.values()]
    names = list(dict.fromkeys(record.model for records in of_groups for record in records))
    if all(len({record.model for record in records}) == 1 for records in of_groups):
        return ""
    return f": {', '.join(names[:_QUOTED])}{' and others' * (len(names) > _QUOTED)}"
