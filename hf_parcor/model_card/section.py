"""The section of a card in Markdown: what stands in the facts, in words; no arithmetic."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from hf_parcor.evaluation.data import EvaluationData
from hf_parcor.model_card.facts import ModelFacts
from hf_parcor.model_card.metadata import has_run, is_on_the_hub
from hf_parcor.model_card.pictures import CURVES, HEAT_MAP
from hf_parcor.report.markup import code_of, markdown_table, printable, text_of
from hf_parcor.report.numbers import Numbers
from hf_parcor.strict_json import to_plain

_LIMITS = (
    "The numbers hold for this data, these weights and these corruptions. A corruption along the gradient or by "
    "several steps bounds the worst case from one side only: a stronger one may exist.",
    "A radius ε bounds one vector of all corrupted weights, so it cannot be compared between models, norms or "
    "selections of weights.",
    "Robustness to corrupted weights says nothing about robustness to unusual inputs.",
)
_COUNTS = ("defended_steps", "trained_steps")
_HEADING = "## Robustness to parameter corruption"
_CITATION = """### Citation

```bibtex
@inproceedings{sun2021parameter,
  title = {Exploring the Vulnerability of Deep Neural Networks: A Study of Parameter Corruption},
  author = {Sun, Xu and Zhang, Zhiyuan and Ren, Xuancheng and Luo, Ruixuan and Li, Liangyou},
  booktitle = {AAAI},
  year = {2021}
}

@article{zhang2023adversarial,
  title = {Adversarial Parameter Defense by Multi-Step Risk Minimization},
  author = {Zhang, Zhiyuan and Luo, Ruixuan and Ren, Xuancheng and Su, Qi and Li, Liangyou and Sun, Xu},
  year = {2021}
}
```"""
_REPETITIONS = {
    "trials": "n counts random trials of a corruption on the same weights: the spread says nothing about training "
    "again with another seed.",
    "trainings": "n counts models that were trained alike with different seeds.",
}


def section_of(facts: ModelFacts, *, pictures: Collection[str] = (), training: str = "") -> str:
    """Return the section, every name escaped.

    Args:
        facts: What to say.
        pictures: What lies beside the card; the pictures of `pictures_of` that are among it are shown.
        training: How the model was trained, as Markdown that a Trainer wrote; "" where the card has it elsewhere.
    """
    parts = [
        _HEADING,
        *_introduction(facts),
        _results(facts),
        *_shown(CURVES, f"{facts.metric} of {facts.name} against the strength of each corruption", pictures),
        *map(text_of, facts.info.guesses(facts.metric)),
        *_noticed(facts.notes),
        *_weak_part(facts, pictures),
        *_training(facts.defense, training),
        "### How to reproduce",
        *_reproduction(facts),
        "### Limits",
        _bullets("", _LIMITS),
        _CITATION,
    ]
    return "\n\n".join(parts)


def unmeasured_section(defense: Mapping[str, Any] | None, *, training: str = "") -> str:
    """Return the section of a model whose robustness nobody has measured yet.

    Args:
        defense: As in `ModelFacts`.
        training: As in `section_of`.
    """
    unknown = "How far its metrics get worse when its weights are disturbed has not been measured for these weights."
    return "\n\n".join([_HEADING, unknown, *_training(defense, training), _CITATION])


def _introduction(facts: ModelFacts) -> Iterator[str]:
    moves = "fall" if facts.info.greater_is_better else "rise"
    yield (
        f"How far does {code_of(facts.metric)} of {_linked(facts.name, link=False)} {moves} when its weights are "
        f"disturbed? It was measured with hf\\_parcor on {_data(facts.evaluated_on)}{_selected(facts)}."
    )
    origin = [f"The model was made from {_linked(facts.base_model)}."] if facts.base_model else []
    if facts.datasets:
        origin.append(f"It was trained on {', '.join(_linked(one, 'datasets/') for one in facts.datasets)}.")
    if origin:
        yield " ".join(origin)


def _selected(facts: ModelFacts) -> str:
    if not facts.corruptions:
        return ""
    modules = code_of(_plain(facts.target.get("target_modules", "all that are trained")))
    return f", with {facts.parameters:,} weights open to corruption ({modules})"


def _results(facts: ModelFacts) -> str:
    numbers = Numbers(facts.info.unit)
    header = (numbers.head(facts.metric), "mean", "± sd", "n", "change")
    rows = []
    for row in facts.rows():
        entry = row.metrics[facts.metric]
        deviation = "–" if math.isnan(entry.deviation) else numbers.value(entry.deviation)
        change = "" if row is facts.clean else numbers.plain_difference(entry.change, sign=True)
        rows.append((row.label, numbers.value(entry.mean), deviation, str(entry.n), change))
    several = any(row.metrics[facts.metric].n > 1 for row in facts.rows())
    meaning = _REPETITIONS[facts.repetitions] if several else "Everything was measured once: the spread is not known."
    return f"{markdown_table(header, rows)}\n\n*± sd* is the sample standard deviation over n repetitions. {meaning}"


def _weak_part(facts: ModelFacts, pictures: Collection[str]) -> Iterator[str]:
    if facts.probe is None:
        return
    yield "### Which part is weak?"
    clean = Numbers(facts.info.unit).with_unit(facts.probe.clean)
    data = facts.probe.record.evaluated_on
    where = "" if data in (None, facts.evaluated_on) else f" on {_data(data)}"
    metric = code_of(facts.metric)
    yield f"Each group of weights was corrupted by itself{where}; without corruption {metric} was {clean}."
    yield text_of(facts.probe.verdict)
    yield from _shown(HEAT_MAP, f"{facts.metric} of {facts.name} with each group of weights corrupted", pictures)
    yield from _noticed(facts.probe.notes)


def _shown(picture: str, description: str, pictures: Collection[str]) -> Iterator[str]:
    if picture in pictures:
        yield f"![{text_of(description)}]({picture})"


def _training(defense: Mapping[str, Any] | None, training: str) -> Iterator[str]:
    yield "### Defense"
    if defense is None or not has_run(defense):
        yield f"The weights were not defended in training, {_none_of(defense or {})}."
    else:
        name = code_of(str(defense.get("defense")))
        yield f"The weights were defended in training by {name} of hf\\_parcor{_how_often(defense)}:"
        others = {name: value for name, value in defense.items() if name not in ("defense", "settings", *_COUNTS)}
        yield markdown_table(("setting", "value"), [*_flat(defense.get("settings") or {}), *_flat(others)])
    if training:
        yield training


def _none_of(defense: Mapping[str, Any]) -> str:
    steps = defense.get("trained_steps")
    return f"in none of {_number(steps)} steps" if steps else "as far as is known"


def _how_often(defense: Mapping[str, Any]) -> str:
    defended, steps = (defense.get(name) for name in _COUNTS)
    if defended is None:
        return ""
    if defended == steps:
        return f", in all of its {_number(steps)} steps"
    return f", in {_number(defended)} of {'an unknown number of' if steps is None else _number(steps)} steps"


def _number(steps: Any) -> str:
    return f"{steps:,}" if isinstance(steps, int) else text_of(str(steps))


def _reproduction(facts: ModelFacts) -> Iterator[str]:
    if facts.command:
        yield "    " + printable(facts.command)  # an indented block: no text inside can end it
    rows = [
        ("data of the gradients (SHA-256)", facts.data or "not given"),
        *(("weights (SHA-256)", weights or "not known") for weights in facts.weights),
        *(("corrupted: " + name, _plain(value)) for name, value in facts.target.items()),
        *facts.versions.items(),
    ]
    yield _bullets("", (f"{name}: {value}" for name, value in rows))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield settings by their dotted names; those that are not set are left out."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", _plain(value)


def _plain(value: Any) -> str:
    return ", ".join(map(_plain, value)) if isinstance(value, (list, tuple)) else str(to_plain(value, otherwise=str))


def _data(data: EvaluationData) -> str:
    where = f" ({_linked(data.id, 'datasets/')})" if data.id else ""
    parts = [text_of(part) for part in (data.config, data.split, data.size) if part]
    return f"{text_of(data.name)}{where}" + (f", {', '.join(parts)}" if parts else "")


def _linked(name: str, folder: str = "", *, link: bool = True) -> str:
    if link and is_on_the_hub(name):
        return f"[{text_of(name)}](https://huggingface.co/{folder}{name})"
    return text_of(name)


def _noticed(notes: Sequence[str]) -> Iterator[str]:
    if notes:
        yield _bullets("Noticed while measuring:", notes)


def _bullets(head: str, sentences: Iterable[str]) -> str:
    lines = "\n".join(f"- {text_of(sentence)}" for sentence in sentences)
    return f"{head}\n\n{lines}" if head else lines
