"""The command lines that measure again what a report shows."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from itertools import product
from typing import Any

from hf_parcor.records.curves import Series
from hf_parcor.records.evaluation import EvaluationRecord, corruption_words, strength_of
from hf_parcor.reports.study import Study


def commands(study: Study) -> list[str]:
    """Return the command lines that measure the same, one a record; none where a record was made in another way.

    Models and data are named as the records name them, which of a local one is the end of its path alone.
    """
    found = []
    for model, groups in study.models.items():
        measured = [len(records) for records in groups.values()]
        for place in range(max(measured)):
            of_seed = {group: records[place] for group, records in groups.items() if place < len(records)}
            found.append(_command(study, of_seed, study.groupings[model]) if len(of_seed) == len(groups) else "")
    return [] if "" in found else list(dict.fromkeys(found))


def _command(study: Study, groups: Mapping[str, EvaluationRecord], grouping: str) -> str:
    """Return the command line that measures a model's groups, which a grouping may have made; "" if there is none."""
    first = next(iter(groups.values()))
    applied = _applied(first)
    data = {} if first.evaluated_on is None else first.evaluated_on.flags
    targets = [dict(record.target) for record in groups.values()]
    probed = len(groups) > 1 or bool(grouping)
    own = [target == {"target_modules": [group]} for group, target in zip(groups, targets, strict=True)]
    if not (data or "dataset" in first.flags) or not applied or (probed and not grouping and not all(own)):
        return ""
    if not probed and not set(targets[0]) <= {"target_modules", "exclude_modules"}:
        return ""
    named: Mapping[str, Any] = {"target_modules": list(groups)} if probed else targets[0]
    seeds = [seed for row in first.corruptions for seed in row.seeds]
    flags: dict[str, Any] = {**({} if "dataset" in first.flags else data), "task": first.task}
    flags |= {"group": grouping} if grouping else named
    flags |= {**applied, "trials": max(len(row.seeds) for row in first.corruptions), "seed": min(seeds)}
    flags |= {"metric": study.metric, **first.flags}
    return shlex.join(["hf-parcor", "probe" if probed else "evaluate", first.model, *flag_words(flags)])


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Return flags by name as words of a command line, without those that are empty.

    Examples:
        >>> flag_words({"dtype": "bfloat16", "device_map": {"lm_head": "cpu"}, "greater_is_better": False})
        ['--dtype', 'bfloat16', '--device-map', '{"lm_head": "cpu"}', '--no-greater-is-better']
        >>> flag_words({"target_modules": ["key", "query"], "column": ["text=review", "label=stars"], "task": ""})
        ['--target-modules', 'key', 'query', '--column', 'text=review', '--column', 'label=stars']
    """
    words: list[str] = []
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, Mapping):
            words += [flag, json.dumps(value)]
        elif name in _REPEATED:
            words += [word for entry in value for word in (flag, entry)]
        elif value not in (None, "", []):
            words += [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


_REPEATED = ("column",)
_INTERPOLATION = "Interpolation"


def _applied(record: EvaluationRecord) -> dict[str, Any]:
    """Return the flags that say the corruptions of a record; none where flags cannot say one of them."""
    others = [row for row in record.corruptions if row.corruption == _INTERPOLATION]
    rows = [row for row in record.corruptions if row not in others]
    for row in rows:
        strength = strength_of(row.settings)
        if row.kind is None or strength is None or Series.of(row).strength not in (None, strength):
            return {}
        if row.settings.get("batches", 1) is None:  # a search on all of them, which no word says
            return {}
    ways = [(row.settings["towards"], row.settings["share"]) for row in others]
    models, shares = (list(dict.fromkeys(column)) for column in zip(*ways, strict=True)) if ways else ([], [])
    if [*rows, *others] != list(record.corruptions) or ways != list(product(models, shares)):
        return {}
    words = corruption_words((row.corruption, row.settings) for row in rows)
    found = {"corruptions": words, "towards": models, "shares": [] if shares == [1] else shares}
    return found if rows or others else {}
