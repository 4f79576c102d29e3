"""Front matter merged as text, so that what is not ours keeps its bytes, and its comments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from hf_parcor.model_card.metadata import MARK, to_yaml

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
