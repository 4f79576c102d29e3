"""The section of a card in Markdown: what stands in the facts, in words; no arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hf_parcor.model_card.facts import ModelFacts
from hf_parcor.model_card.metadata import is_on_the_hub
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


def section_of(facts: ModelFacts, *, picture: str = "", training: str = "") -> str:
    """Return the section, every name escaped.

    Args:
        facts: What to say.
        picture: Path of an image beside the card; "" for none.
        training: How the model was trained, as Markdown that a Trainer wrote; "" where the card has it elsewhere.
    """
    parts = [
        _HEADING,
        *_introduction(facts),
        _results(facts),
        *([f"![{text_of(_caption(facts))}]({picture})"] if picture else []),
        *([_bullets("Noticed while measuring:", facts.notes)] if facts.notes else []),
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
    unknown = "How far its metrics fall when its weights are disturbed has not been measured for these weights."
    return "\n\n".join([_HEADING, unknown, *_training(defense, training), _CITATION])


def _introduction(facts: ModelFacts) -> Iterator[str]:
    yield (
        f"How far does {code_of(facts.metric)} of {_linked(facts.name, link=False)} fall when its weights are "
        f"disturbed? It was measured with hf\\_parcor on {_data(facts)}, with {facts.parameters:,} weights open to "
        f"corruption ({code_of(_plain(facts.target.get('target_modules', 'all that are trained')))})."
    )
    origin = [f"The model was made from {_linked(facts.base_model)}."] if facts.base_model else []
    if facts.datasets:
        origin.append(f"It was trained on {', '.join(_linked(one, 'datasets/') for one in facts.datasets)}.")
    if origin:
        yield " ".join(origin)


def _results(facts: ModelFacts) -> str:
    numbers = Numbers(facts.percent)
    header = (facts.metric + (" (%)" if facts.percent else ""), "mean", "± sd", "n", "change")
    rows = []
    for row in facts.rows():
        entry = row.metrics[facts.metric]
        deviation = "–" if math.isnan(entry.deviation) else numbers.value(entry.deviation)
        change = "" if row is facts.clean else numbers.difference(entry.change, sign=True).removesuffix(" points")
        rows.append((row.label, numbers.value(entry.mean), deviation, str(entry.n), change))
    several = any(row.metrics[facts.metric].n > 1 for row in facts.rows())
    meaning = _REPETITIONS[facts.repetitions] if several else "Everything was measured once: the spread is not known."
    return f"{markdown_table(header, rows)}\n\n*± sd* is the sample standard deviation over n repetitions. {meaning}"


def _caption(facts: ModelFacts) -> str:
    return f"{facts.metric} of {facts.name} against the strength of each corruption"


def _training(defense: Mapping[str, Any] | None, training: str) -> Iterator[str]:
    yield "### Defense"
    if defense is None:
        yield "The weights were not defended in training, as far as is known."
    else:
        yield f"The weights were defended in training by {code_of(str(defense.get('defense')))} of hf\\_parcor:"
        others = {name: value for name, value in defense.items() if name not in ("defense", "settings")}
        yield markdown_table(("setting", "value"), [*_flat(defense.get("settings") or {}), *_flat(others)])
    if training:
        yield training


def _reproduction(facts: ModelFacts) -> Iterator[str]:
    if facts.command:
        yield "    " + printable(facts.command)  # an indented block: no text inside can end it
    rows = [
        ("data of the gradients (SHA-256)", facts.data or "not given"),
        *(("corrupted: " + name, _plain(value)) for name, value in facts.target.items()),
        *facts.versions.items(),
    ]
    yield markdown_table(("what", "value"), rows)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield settings by their dotted names; those that are not set are left out."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", _plain(value)


def _plain(value: Any) -> str:
    return ", ".join(map(_plain, value)) if isinstance(value, (list, tuple)) else str(to_plain(value, otherwise=str))


def _data(facts: ModelFacts) -> str:
    data = facts.evaluated_on
    where = f" ({_linked(data.id, 'datasets/')})" if data.id else ""
    parts = [text_of(part) for part in (data.config, data.split) if part]
    return f"{text_of(data.name)}{where}" + (f", {', '.join(parts)}" if parts else "")


def _linked(name: str, folder: str = "", *, link: bool = True) -> str:
    if link and is_on_the_hub(name):
        return f"[{text_of(name)}](https://huggingface.co/{folder}{name})"
    return text_of(name)


def _bullets(head: str, sentences: Iterable[str]) -> str:
    lines = "\n".join(f"- {text_of(sentence)}" for sentence in sentences)
    return f"{head}\n\n{lines}" if head else lines
