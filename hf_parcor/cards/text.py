"""A card as text and pictures: our section between two marks, without arithmetic, and all else as it was."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_parcor.cards.facts import ModelFacts
from hf_parcor.cards.front_matter import is_on_the_hub, merged_front_matter
from hf_parcor.defense_file import COUNTS, has_run
from hf_parcor.records.comparable import few_words
from hf_parcor.records.data import EvaluationData
from hf_parcor.reports.markup import code_of, printable, text_of
from hf_parcor.reports.numbers import Numbers
from hf_parcor.reports.plots import plot_comparison, plot_heat_map, shows_curves
from hf_parcor.reports.tables import markdown_table
from hf_parcor.strict_json import to_plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BYTE_ORDER_MARK = "\ufeff"
_LINE = r"(?:\A|(?<=[\r\n]))"
_BEGIN = re.compile(_LINE + r"<!-- hf_parcor:begin(?: (generated|around):([0-9a-f]{64}))? -->")
_END = re.compile(_LINE + r"<!-- hf_parcor:end -->")


class Card(NamedTuple):
    """A card in its parts.

    Attributes:
        opening: All before the front matter: the line `---`.
        front_matter: The text between the lines `---`; "" where there is none.
        closing: The line `---` after it, and the line ending before that.
        before: The text before our section.
        section: Our section with its marks; "" where there is none.
        after: The text after it.
        newline: Its line ending.
        author: Of the text around our section when we last wrote it: "generated" by a Trainer, or "around" for others.
        digest: SHA-256 of that text; "" if unknown.
    """

    opening: str
    front_matter: str
    closing: str
    before: str
    section: str
    after: str
    newline: str
    author: str = ""
    digest: str = ""

    @property
    def is_untouched(self) -> bool:
        """Whether nobody has changed the text around our section since we last wrote it."""
        return self.digest == _digest(self.author, self.front_matter, self.before, self.after)

    @property
    def is_generated(self) -> bool:
        """Whether a Trainer wrote all text but ours, and nobody touched it, so that a Trainer may write it anew."""
        return self.author == "generated" and self.is_untouched


def read_card(text: str) -> Card:
    r"""Return the parts of a card.

    Raises:
        ValueError: Our marks do not come as one pair.

    Examples:
        >>> read_card("---\nlicense: mit\n---\n# Mine\n").before
        '# Mine\n'
    """
    newline = "\r\n" if "\r" in text else "\n"  # the Hub does not find the end of metadata where \r stands alone
    mark = _BYTE_ORDER_MARK if text.startswith(_BYTE_ORDER_MARK) else ""
    match = REGEX_YAML_BLOCK.search(text[len(mark) :])
    if match is None:
        head, body = (f"{mark}---{newline}", "", f"{newline}---{newline}"), text[len(mark) :]
    else:
        closing = match.group(3) if match.group(4) else match.group(3) + newline
        head, body = (mark + match.group(1), match.group(2), closing), text[len(mark) + match.end() :]
    begins, ends = list(_BEGIN.finditer(body)), list(_END.finditer(body))
    if not begins and not ends:
        return Card(*head, body, "", "", newline, "")
    if len(begins) != 1 or len(ends) != 1 or ends[0].start() < begins[0].end():
        raise ValueError(
            f"card: expected one line <!-- hf_parcor:begin --> and one <!-- hf_parcor:end --> after it, got "
            f"{len(begins)} and {len(ends)}; remove what is between them, and the lines themselves"
        )
    start, end = begins[0].start(), ends[0].end()
    author, digest = (group or "" for group in begins[0].groups())
    return Card(*head, body[:start], body[start:end], body[end:], newline, author, digest)


def updated_card(text: str, section: str, metadata: Mapping[str, Any], *, generated: bool = False) -> str:
    r"""Return a card that has our section and metadata; what others wrote is kept byte for byte.

    Our section replaces our old one, or comes last. Metadata are merged as in `merged_front_matter`.

    Args:
        text: The current card; "" for none.
        section: Our section.
        metadata: Our front matter.
        generated: Whether a Trainer wrote the rest of the text, and may write it again.

    Raises:
        ValueError: The front matter is not a YAML mapping, or our marks are not one pair.

    Examples:
        >>> card = read_card(updated_card("# Mine, no newline", "## Ours", {"tags": ["robust"]}))
        >>> card.before, card.front_matter, card.is_untouched
        ('# Mine, no newline\n\n', 'tags:\n- robust', True)
    """
    card = read_card(text)
    newline, before, after = card.newline, card.before, card.after
    if not card.section:
        before += newline * (0 if not before or before.endswith(2 * newline) else 2 - before.endswith(newline))
        after = newline
    front_matter = merged_front_matter(card.front_matter, metadata, newline)
    author = "generated" if generated else "around"
    mark = f"<!-- hf_parcor:begin {author}:{_digest(author, front_matter, before, after)} -->"
    ours = "\n".join([mark, section, "<!-- hf_parcor:end -->"]).replace("\n", newline)
    return card.opening + front_matter + card.closing + before + ours + after


def with_metadata(text: str, metadata: Mapping[str, Any]) -> str:
    r"""Return a card with our metadata merged into its own, and nothing else changed.

    Raises:
        ValueError: As in `updated_card`.

    Examples:
        >>> print(with_metadata("# Mine", {"tags": ["robust"]}))
        ---
        tags:
        - robust
        ---
        # Mine
    """
    card = read_card(text)
    front_matter = merged_front_matter(card.front_matter, metadata, card.newline)
    return card.opening + front_matter + card.closing + card.before + card.section + card.after


def _digest(author: str, front_matter: str, before: str, after: str) -> str:
    """Return the digest of what a person may touch; of a kept card its body alone, since libraries rewrite the rest.

    PEFT writes the front matter anew whenever it saves, and the body with other line endings.
    """
    body = "\n".join((before + "\0" + after).splitlines())
    kept = f"{front_matter}\0{before}\0{after}" if author == "generated" else body.strip()
    return hashlib.sha256(kept.encode()).hexdigest()


CURVES = "robustness.png"
HEAT_MAP = "robustness_heat_map.png"
_LONGEST_NAME = 40  # as many letters as have room below the smallest picture


def pictures_of(facts: ModelFacts) -> dict[str, bytes]:
    """Return the pictures as PNG, by path: the same bytes for the same facts and version of Matplotlib.

    Where no corruption of several strengths changes the metric there are no curves, and where nothing was probed no
    heat map.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    pictures = {}
    record = facts.as_record()
    if shows_curves(record, facts.metric):
        name = facts.name if len(facts.name) <= _LONGEST_NAME else f"{facts.name[:_LONGEST_NAME]}…"
        pictures[CURVES] = _png(plot_comparison({name: record}, facts.metric))
    if facts.probe is not None:
        sweeps, info = {"": facts.probe.record}, facts.info
        heat_map = plot_heat_map(sweeps, facts.metric, greater_is_better=info.greater_is_better, unit=info.unit)
        pictures[HEAT_MAP] = _png(heat_map)
    return pictures


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80, metadata={"Software": None})
    return buffer.getvalue()


_LIMITS = (
    "The numbers hold for this data, these weights and these corruptions. A corruption along the gradient or by "
    "several steps bounds the worst case from one side only: a stronger one may exist.",
    "A radius ε bounds one vector of all corrupted weights, so it cannot be compared between models, norms or "
    "selections of weights.",
    "Robustness to corrupted weights says nothing about robustness to unusual inputs.",
)
_HEADING = "## Robustness to parameter corruption"
_UNMEASURED = "How far its metrics get worse when its weights are disturbed has not been measured for these weights."
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
        *_shown(CURVES, f"{facts.metric} of {facts.name} against the strength of corruption", pictures),
        *map(text_of, facts.info.guesses(facts.metric)),
        *_noticed(facts.notes),
        *_weak_part(facts, pictures),
        *_bits(facts),
        *_training(facts.defense, training),
        "### How to reproduce",
        *_reproduction(facts),
        "### Limits",
        _bullets(_LIMITS),
        _CITATION,
    ]
    return "\n\n".join(parts)


def unmeasured_section(defense: Mapping[str, Any] | None, *, training: str = "") -> str:
    """Return the section of a model whose robustness nobody has measured yet.

    Args:
        defense: As in `ModelFacts`.
        training: As in `section_of`.
    """
    return "\n\n".join([_HEADING, _UNMEASURED, *_training(defense, training), _CITATION])


def _introduction(facts: ModelFacts) -> Iterator[str]:
    moves = "fall" if facts.info.greater_is_better else "rise"
    metric, name = code_of(facts.metric), text_of(facts.name)
    if facts.disturbed:
        yield (
            f"How far does {metric} of {name} {moves} when its weights are disturbed? It was measured with hf_parcor "
            f"on {_data(facts.evaluated_on)}{_selected(facts)}."
        )
    else:
        yield f"{_UNMEASURED} What {metric} of {name} is without that was, on {_data(facts.evaluated_on)}."
    origin = [f"The model was made from {_linked(facts.base_model)}."] if facts.base_model else []
    if facts.datasets:
        origin.append(f"It was trained on {', '.join(_linked(one, 'datasets/') for one in facts.datasets)}.")
    if origin:
        yield " ".join(origin)


def _selected(facts: ModelFacts) -> str:
    if not facts.corruptions:
        return ""
    target = {"target_modules": "all that are trained", **facts.target}
    words = [code_of(few_words(to_plain(target.pop("target_modules"), otherwise=str)))]
    words += [f"{name} {code_of(few_words(to_plain(value, otherwise=str)))}" for name, value in target.items()]
    return f", with {facts.parameters:,} weights open to corruption ({', '.join(words)})"


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


def _bits(facts: ModelFacts) -> Iterator[str]:
    if facts.recipe is None:
        return
    recipe = facts.recipe.record
    yield "### Which parts take which bits?"
    yield text_of(facts.recipe.verdict)
    yield text_of(facts.recipe.size)
    rows = []
    for label in (*recipe.formats, None):
        within = [name for name, one in recipe.choice.items() if one.format == label]
        if within:
            weights = sum(recipe.groups[name].parameters for name in within)
            rows.append((label or "as it is", str(len(within)), f"{weights:,}"))
    yield markdown_table(("format", "parts", "weights"), rows)


def _shown(picture: str, description: str, pictures: Collection[str]) -> Iterator[str]:
    if picture in pictures:
        yield f"![{text_of(description)}]({picture})"


def _training(defense: Mapping[str, Any] | None, training: str) -> Iterator[str]:
    yield "### Defense"
    if not has_run(defense):
        yield f"The weights were not defended in training, {_none_of(defense or {})}."
    else:
        name = code_of(str(defense.get("defense")))
        yield f"The weights were defended in training by {name} of hf_parcor{_how_often(defense)}:"
        others = {name: value for name, value in defense.items() if name not in ("defense", "settings", *COUNTS)}
        yield markdown_table(("setting", "value"), [*_flat(defense.get("settings") or {}), *_flat(others)])
    if training:
        yield training


def _none_of(defense: Mapping[str, Any]) -> str:
    steps = defense.get("trained_steps")
    return f"in none of {_number(steps)} steps" if steps else "as far as is known"


def _how_often(defense: Mapping[str, Any]) -> str:
    defended, steps = (defense.get(name) for name in COUNTS)
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
    yield _bullets(f"{name}: {value}" for name, value in rows)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield settings by their dotted names; those that are not set are left out."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            for entry in value:
                yield from _flat(entry, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", _plain(value)


def _plain(value: Any) -> str:
    return ", ".join(map(_plain, value)) if isinstance(value, (list, tuple)) else str(to_plain(value, otherwise=str))


def _data(data: EvaluationData) -> str:
    where = f" ({_linked(data.id, 'datasets/')})" if data.id else ""
    parts = [text_of(part) for part in (data.config, data.split, data.size) if part]
    return f"{text_of(data.name)}{where}" + (f", {', '.join(parts)}" if parts else "")


def _linked(name: str, folder: str = "") -> str:
    if is_on_the_hub(name):
        return f"[{text_of(name)}](https://huggingface.co/{folder}{name})"
    return text_of(name)


def _noticed(notes: Sequence[str]) -> Iterator[str]:
    if notes:
        yield "Noticed while measuring:"
        yield _bullets(notes)


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {text_of(sentence)}" for sentence in sentences)
