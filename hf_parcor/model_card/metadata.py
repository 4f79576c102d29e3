"""The metadata that the Hub reads: the front matter of a card, and the files of `.eval_results`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_parcor.model_card.facts import CorruptionFacts, ModelFacts
from hf_parcor.monitoring.names import plain_name
from hf_parcor.report.markup import printable
from hf_parcor.strict_json import to_plain

MARK = "parameter_corruption"  # the argument by which our results are known among others
RESULTS_FOLDER = ".eval_results"
RESULTS_PREFIX = "hf_parcor-"
_UNKNOWN = "unknown"
_ON_THE_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def is_on_the_hub(name: str) -> bool:
    """Say whether a name could be one on the Hub; others are not links, and no metadata.

    Examples:
        >>> is_on_the_hub("stanfordnlp/sst2"), is_on_the_hub("my own [data](x)")
        (True, False)
    """
    return len(name) <= 96 and _ON_THE_HUB.fullmatch(name) is not None


def metadata_of(facts: ModelFacts) -> dict[str, Any]:
    """Return the front matter of a card, as plain values that YAML can hold."""
    found = {
        "library_name": "transformers",
        "base_model": facts.base_model if is_on_the_hub(facts.base_model) else "",
        "datasets": [name for name in facts.datasets if is_on_the_hub(name)],
        "metrics": [facts.metric],
        "pipeline_tag": facts.task,
        "tags": ["parameter-corruption", *_tags(facts.defense)],
        "model-index": model_index(facts),
    }
    return {name: _printable(value) for name, value in found.items() if value}


def unmeasured_metadata(defense: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the front matter for a model whose robustness nobody has measured: old results of ours give way."""
    return {"library_name": "transformers", "tags": _tags(defense), "model-index": []}


def has_run(defense: Mapping[str, Any] | None) -> bool:
    """Say whether a defense is known to have run: a file from before steps were counted is taken at its word.

    Examples:
        >>> has_run(None), has_run({"defense": "sam", "defended_steps": 0}), has_run({"defense": "sam"})
        (False, False, True)
    """
    return defense is not None and defense.get("defended_steps") != 0


def _tags(defense: Mapping[str, Any] | None) -> list[str]:
    return [*(["adversarial-parameter-defense"] if has_run(defense) else []), "hf_parcor"]


def model_index(facts: ModelFacts) -> Any:
    """Return one result for each corruption, with its settings, in the form of `huggingface_hub`'s `EvalResult`.

    The value is the mean itself, not rounded; NaN and infinities are words, since JSON has no number for them.
    """
    data = facts.evaluated_on
    results = [
        EvalResult(
            task_type=facts.task or _UNKNOWN,
            dataset_type=data.id if is_on_the_hub(data.id) else _UNKNOWN,
            dataset_name=data.name,
            dataset_config=data.config or None,
            dataset_split=data.split or None,
            dataset_revision=data.revision or None,
            metric_type=facts.metric,
            metric_value=to_plain(row.metrics[facts.metric].mean),
            metric_name=f"{facts.metric}, {row.label}",
            metric_args=_arguments(facts, row),
        )
        for row in facts.rows()
    ]
    return _printable(eval_results_to_model_index(facts.name, results))


def eval_result_file(facts: ModelFacts) -> dict[str, str]:
    """Return the file for `.eval_results` by its path: the result without corruption, for a registered benchmark.

    The Hub puts whatever stands there on the leaderboard of the data set, beside other models. An entry has a data
    set, a task of its `eval.yaml` and a value; what else was done to the model, only free text would say. So results
    of damaged weights stay in the front matter, where their settings are. There is no file where nobody named the
    task of a benchmark, for a part of a split, for a mean over several models, and for what is not finite.
    """
    data, clean = facts.evaluated_on, facts.clean.metrics[facts.metric]
    whole = "[" not in data.split and "held out" not in data.split
    of_one_model = facts.repetitions == "trials" or clean.n == 1
    if not (facts.benchmark_task and is_on_the_hub(data.id) and whole and of_one_model and math.isfinite(clean.mean)):
        return {}
    result = EvalResultEntry(
        dataset_id=data.id,
        task_id=facts.benchmark_task,
        value=clean.mean,
        dataset_revision=data.revision or None,
    )
    path = f"{RESULTS_FOLDER}/{RESULTS_PREFIX}{plain_name(data.id)}.yaml"
    return {path: to_yaml(_printable(eval_result_entries_to_yaml([result])))}


def to_yaml(value: Any) -> str:
    """Return plain values as YAML, keys in their order."""
    return str(yaml.safe_dump(value, allow_unicode=True, sort_keys=False))


def _printable(value: Any) -> Any:
    """Return plain values whose texts are one line of letters: what else there is, YAML libraries read differently."""
    if isinstance(value, dict):
        return {printable(str(name)): _printable(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_printable(entry) for entry in value]
    return printable(value) if isinstance(value, str) else value


def _arguments(facts: ModelFacts, row: CorruptionFacts) -> dict[str, Any]:
    entry = row.metrics[facts.metric]
    found = {
        MARK: row.corruption,
        **row.settings,
        "n": entry.n,
        "repetitions": facts.repetitions,
        "standard_deviation": entry.deviation if entry.n > 1 else None,
    }
    plain = to_plain(found, otherwise=str)
    return {name: value for name, value in plain.items() if value is not None}
