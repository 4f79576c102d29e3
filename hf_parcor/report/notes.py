"""What a reader must know before relying on the numbers."""

from __future__ import annotations

from itertools import combinations

from hf_parcor.evaluation.comparable import data_may_differ
from hf_parcor.report.study import Study

_QUOTED = 8  # as many notes of records a report repeats


def notes(study: Study) -> list[str]:
    """Return sentences on what the records were made of: repetitions, data, sizes, and what was noticed on the way."""
    found = [_repetitions(study), *study.info.guesses(study.metric)]
    if len(study.models) > 1:
        found.append(
            "Differences are judged by Welch's t-test, two-sided, at 5 %, p-values corrected by Holm's method: in the "
            "verdict for all models, groups and kinds of corruption, in the table for all of its rows."
        )
    elif len(study.groups) > 1:
        found.append(
            f"Fragility is the mean {study.loss} over the strengths that all groups have, over the median of that of "
            "the other groups. It is judged by Welch's t-test, one-sided, at 5 %, p-values corrected by Holm's method "
            "for the number of groups, for each kind of corruption by itself."
        )
    sizes = {records[0].parameters for groups in study.models.values() for records in groups.values()}
    if len(sizes) > 1:
        found.append(
            f"Every group was corrupted with the same strengths, though their sizes differ: {min(sizes):,} to "
            f"{max(sizes):,} weights. A radius bounds a group as one vector, so it is more for a group whose weights "
            "have a small norm."
        )
    found += [*data_caveat(study)]
    noticed = [
        note
        for record in study.records
        for note in (*record.notes, *(f"{row.label}: {note}" for row in record.rows() for note in row.notes))
    ]
    distinct = list(dict.fromkeys(noticed))
    found += [f"Noticed while measuring: {note}" for note in distinct[:_QUOTED]]
    if len(distinct) > _QUOTED:
        found.append(f"Noticed while measuring: {len(distinct) - _QUOTED} more notes, in the records.")
    return found


def data_caveat(study: Study) -> list[str]:
    """Return a sentence where the records may be of different data, as far as they say."""
    distinct = {(record.data, record.evaluated_on): record for record in study.records}
    if any(data_may_differ(*pair) for pair in combinations(distinct.values(), 2)):
        return [
            "The records have different data fingerprints, and do not all say what they were measured on: they may be "
            "of different data, and their differences may come from that."
        ]
    if len({record.data for record in study.records if record.data}) > 1:
        return [
            "The records have different data fingerprints, though the data have one name and as many rows: "
            "tokenizers, lengths or batches differ, or the contents do."
        ]
    return []


def _repetitions(study: Study) -> str:
    counts = {len(records) for groups in study.models.values() for records in groups.values()}
    if max(counts) > 1:
        shown = str(*counts) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
        return (
            f"Repetitions are {shown} records, taken for trainings of one model with different seeds"
            f"{_of_models(study)}; trials within a record count as their mean."
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
