"""The metadata that the Hub reads, merged into a card's front matter as text: what is not ours keeps its bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_parcor.cards.facts import CorruptionFacts, ModelFacts
from hf_parcor.defense_file import has_run
from hf_parcor.records.curves import plain_name
from hf_parcor.reports.markup import printable
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
        "tags": [*["parameter-corruption"] * facts.disturbed, *_tags(facts.defense)],
        "model-index": model_index(facts),
    }
    return {name: _printable(value) for name, value in found.items() if value}


def unmeasured_metadata(defense: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the front matter for a model whose robustness nobody has measured: old results of ours give way."""
    return {"library_name": "transformers", "tags": _tags(defense), "model-index": []}


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
    """Return the settings of a corruption and of its number, without mappings: a recipe's is as long as a model."""
    entry = row.metrics[facts.metric]
    found = {
        MARK: row.corruption,
        **{name: value for name, value in row.settings.items() if not isinstance(value, Mapping)},
        "n": entry.n,
        "repetitions": facts.repetitions,
        "standard_deviation": entry.deviation if entry.n > 1 else None,
    }
    plain = to_plain(found, otherwise=str)
    return {name: value for name, value in plain.items() if value is not None}


_UNITED = ("tags", "metrics", "datasets")
_NOTHING = re.compile(r"[ \t]*(#.*)?")


def merged_front_matter(block: str, ours: Mapping[str, Any], newline: str = "\n") -> str:
    r"""Return a front matter that says ours too; the text between the two lines `---`.

    Lists (`tags`, `metrics`, `datasets`) are united. `model-index` keeps the results of others, and our old ones give
    way. All else is only written where it is missing: what stands there already was chosen by someone.

    The text of keys that do not change stays byte for byte, comments and all, and so do comments between keys. A key
    that changes is written anew: comments inside of its value are lost. Where the text cannot be cut at its keys
    (one mapping in braces, an anchor in what is replaced), all of it is written anew: values stay, comments are lost.

    Args:
        block: The text that is there.
        ours: What to say.
        newline: The line ending of new lines.

    Raises:
        ValueError: The text is no YAML mapping.

    Examples:
        >>> print(merged_front_matter("license: mit # mine\ntags: [bert]", {"license": "other", "tags": ["robust"]}))
        license: mit # mine
        tags:
        - bert
        - robust
    """
    theirs = values_of(block)
    changes = {name: _merged(name, theirs.get(name), value) for name, value in ours.items()}
    changes = {name: value for name, value in changes.items() if (theirs[name] != value if name in theirs else value)}
    if not changes:
        return block
    whole = {**theirs, **changes}
    spliced = _spliced(block, changes, newline)
    try:
        if repr(values_of(spliced)) == repr(whole):  # NaN equals NaN
            return spliced
    except ValueError:  # what was cut belongs together
        pass
    return _lines(whole, newline)


def values_of(block: str) -> dict[str, Any]:
    """Return what a front matter says.

    Raises:
        ValueError: The text is no YAML mapping.
    """
    try:
        found = yaml.safe_load(block)
    except yaml.YAMLError as error:
        raise ValueError(f"front matter: expected YAML, got {' '.join(str(error).split())}; mend the card") from error
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"front matter: expected names with values, got {type(found).__name__}; mend the card")
    return found or {}


def beside_earlier_results(earlier: Any, ours: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return our results with those of ours that a model index has already, of other corruptions or other data.

    Args:
        earlier: The model index of a card.
        ours: Our results, as `model_index` returns them.
    """
    found = []
    said = {(repr(result["dataset"]), metric["name"]) for result in ours[0]["results"] for metric in result["metrics"]}
    for model in earlier if isinstance(earlier, list) else []:
        for result in model.get("results") or [] if _has_results(model) else []:
            metrics = result.get("metrics") if isinstance(result, dict) else None
            kept = [
                metric
                for metric in metrics or []
                if _is_ours(metric) and (repr(result.get("dataset")), metric.get("name")) not in said
            ]
            if kept:
                found.append({**result, "metrics": kept})
    return [{**ours[0], "results": [*found, *ours[0]["results"]]}]


def _merged(name: str, theirs: Any, ours: Any) -> Any:
    if theirs is None:
        return ours
    if name in _UNITED:
        listed = theirs if isinstance(theirs, list) else [theirs]
        missing = [entry for entry in ours if entry not in listed]
        return [*listed, *missing] if missing else theirs
    return _with_results(theirs, ours) if name == "model-index" else theirs


def _with_results(theirs: Any, ours: Any) -> Any:
    """Return a model index with the results of others, and with ours in place of those that we wrote before."""
    models = list(theirs) if isinstance(theirs, list) else []
    places = [place for place, model in enumerate(models) if _has_results(model)]
    for place in places:
        results = [_without_ours(result) for result in models[place].get("results") or []]
        models[place] = {**models[place], "results": [result for result in results if result is not None]}
    if not places:
        return [*models, *ours]
    models[places[0]]["results"] += [result for model in ours for result in model["results"]]
    return models


def _has_results(model: Any) -> bool:
    return isinstance(model, dict) and isinstance(model.get("results") or [], list)


def _without_ours(result: Any) -> Any:
    """Return a result without our metrics; None if it has no others."""
    if not isinstance(result, dict) or not isinstance(result.get("metrics"), list):
        return result
    others = [metric for metric in result["metrics"] if not _is_ours(metric)]
    if len(others) == len(result["metrics"]):
        return result
    return {**result, "metrics": others} if others else None


def _is_ours(metric: Any) -> bool:
    return isinstance(metric, dict) and isinstance(metric.get("args"), dict) and MARK in metric["args"]


def _spliced(block: str, changes: Mapping[str, Any], newline: str) -> str:
    """Return the text with the lines of changed keys replaced, and new keys at the end."""
    root = yaml.compose(block, Loader=yaml.SafeLoader)
    lines = block.splitlines(keepends=True)
    places = {} if root is None else {key.value: key.start_mark.line for key, _ in root.value}
    starts = [*sorted(places.values()), len(lines)]
    remaining = dict(changes)
    for name in sorted(places, key=lambda name: -places[name]):  # from the end, so that places stay
        if name in remaining:
            start = places[name]
            end = starts[starts.index(start) + 1]
            while end > start + 1 and _NOTHING.fullmatch(lines[end - 1].rstrip("\r\n")):
                end -= 1  # comments after a value belong to what follows
            after = newline if end < len(lines) else ""
            lines[start:end] = [_lines({name: remaining.pop(name)}, newline) + after]
    text = "".join(lines)
    new = {name: value for name, value in changes.items() if name in remaining}
    separator = newline if text and not text.endswith(("\n", "\r")) else ""
    return text + separator + _lines(new, newline) if new else text


def _lines(values: Mapping[str, Any], newline: str) -> str:
    return to_yaml(dict(values)).rstrip("\n").replace("\n", newline)
