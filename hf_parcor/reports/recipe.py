"""What the page of a recipe says: the answer in a sentence, the front of metric against bits, and what it is from."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from hf_parcor.records.curves import short
from hf_parcor.records.data import same_data
from hf_parcor.records.evaluation import CorruptionRecord, EvaluationRecord
from hf_parcor.records.recipe import RecipeRecord
from hf_parcor.records.sensitivity import DIVERGENCE, SensitivityRecord
from hf_parcor.reports.command_line import flag_words
from hf_parcor.reports.content import answer_as_markdown, largest_drop, share_of_largest, tables_as_markdown
from hf_parcor.reports.numbers import Numbers
from hf_parcor.reports.panels import Line, Panel, Point
from hf_parcor.reports.tables import Table, short_names
from hf_parcor.reports.verdict import Finding, rows_counted
from hf_parcor.statistics import exact_sum

RECIPE = "recipe"
"""The row of a measured record that is the recipe itself."""
_NAMED = 3  # so many parts a sentence names
_INTERACTS = 0.1  # parts that cost so much of their sum more or less together interact
_AS_IT_IS = "as it is"
_ONE_FORMAT = "one format for all"
# By the names of the files that `export_recipe` writes for tools that quantize.
_READERS = {
    "torchao.json": "from_pretrained(model, quantization_config=TorchAoConfig.from_dict(json.load(open("
    "'torchao.json')))) of Transformers has torchao round so",
    "llm_compressor.yaml": "oneshot(model, recipe='llm_compressor.yaml') of llm-compressor rounds so",
    "bitsandbytes.yaml": "BitsAndBytesConfig(**yaml.safe_load(open('bitsandbytes.yaml'))) of Transformers has NF4 in "
    "place of what gets 4 bits or fewer, and the rest as it is, which is another model than was measured",
}


class RecipeContent(NamedTuple):
    """The parts of the page, in the order of reading."""

    title: str
    metric: str
    numbers: Numbers
    findings: list[Finding]
    notes: list[str]
    front: Table | None
    panels: list[Panel]
    no_curves: str
    heat_map: Table
    strongest: str
    choice: Table
    pairs: Table | None
    scores: Table
    settings: Table


def short_formats(formats: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """Return formats as a sentence says them, by their labels: "4 bits" where no other has as many.

    Examples:
        >>> four = {"corruption": "quantization", "settings": {"bits": 4}}
        >>> short_formats({"4-bit quantization": four, "NF4": {"corruption": "float_quantization", "settings": {}}})
        {'4-bit quantization': '4 bits', 'NF4': 'NF4'}
    """
    bits = {label: _bits_of(one) for label, one in formats.items()}
    return {
        label: f"{count} bits" if count and list(bits.values()).count(count) == 1 else label
        for label, count in bits.items()
    }


def _bits_of(one: Mapping[str, object]) -> int | None:
    settings = one.get("settings")
    found = settings.get("bits") if isinstance(settings, Mapping) else None
    return found if isinstance(found, int) else None


class _Told:
    """A recipe, what its scores are, and what was measured of it as a whole, if anything was.

    Args:
        scores: What `sensitivity` found.
        recipe: What was chosen from it.
        measured: The record of `measure_recipes`, in which one row is called "recipe"; None for none.
        metric: The metric to look at, one of the measured record's if there is one; None for the scores' own.
    """

    def __init__(
        self,
        scores: SensitivityRecord,
        recipe: RecipeRecord,
        measured: EvaluationRecord | None,
        metric: str | None = None,
    ) -> None:
        self.scores, self.recipe = scores, recipe
        self.rows = {} if measured is None else {row.label: row for row in measured.corruptions}
        self.metric = scores.metric if metric is None else metric
        source = scores if measured is None or self.metric in scores.clean else measured
        self.info = info = source.info(self.metric)
        self.greater = info.greater_is_better
        self.numbers = Numbers(info.unit)
        # What was measured as a whole is compared with its own start: it may be on other rows than the scores are.
        self.clean = scores.clean[self.metric] if measured is None else measured.clean.mean(self.metric)
        # One part alone changes an accuracy by a few rows, which is chance: what it was chosen by tells more.
        by_divergence = recipe.by == DIVERGENCE and DIVERGENCE in scores.clean
        self.of_parts = DIVERGENCE if by_divergence else self.metric if self.metric in scores.clean else scores.metric
        self.formats = short_formats(recipe.formats)
        self.names = short_names(recipe.choice)

    def change(self, value: float) -> str:
        """Return the change of the metric, with its sign and unit."""
        return self.numbers.difference(value - self.clean, sign=True)

    def lost(self, drop: float) -> str:
        """Return a drop as the change that it is."""
        return self.numbers.difference(-drop if self.greater else drop, sign=True)

    def cost(self, metric: str, drop: float) -> str:
        """Return what parts cost, without its unit."""
        if metric == DIVERGENCE and math.isfinite(drop):
            rounded = f"{float(f'{1000 * abs(drop):.2g}'):g}"  # two digits that count, and no exponent above 1
            return f"−{rounded}" if drop < 0 else rounded
        return Numbers(self.scores.info(metric).unit).plain_difference(drop)

    def caption(self, metric: str) -> str:
        """Return what `cost` says, with its unit."""
        info = self.scores.info(metric)
        word, unit = "drop" if info.greater_is_better else "rise", self.unit_of_cost(metric)
        return f"{word} of {metric}" + (f" in {unit}" if unit else "")

    def unit_of_cost(self, metric: str) -> str:
        """Return the unit of `cost`; "" for none."""
        if metric == DIVERGENCE:
            return "thousandths of a nat"
        return Numbers(self.scores.info(metric).unit).unit_of_differences

    def bits_of_base(self, group: str) -> float:
        """Return how many bits a part has in the format of most weights; if it does not fit, the average of all."""
        cell = self.scores.by_place.get((group, self.recipe.base or ""))
        return self.recipe.bits if cell is None else cell.bits

    def of_base(self) -> float | None:
        """Return the sum of what each part costs in the format of most weights; None where one was not measured."""
        cells = [self.scores.by_place.get((group, self.recipe.base or "")) for group in self.recipe.groups]
        drops = [None if cell is None else self.scores.drop(cell, self.metric) for cell in cells]
        known = [drop for drop in drops if drop is not None]
        return exact_sum(known) if known and len(known) == len(drops) else None


def _answer(told: _Told) -> str:
    """Return the recipe in one sentence: what to quantize, what to spare, and what either way costs."""
    recipe = told.recipe
    if recipe.base is None:
        return "Quantize nothing: within this budget every part stays as it is."
    exceptions, base = recipe.exceptions, told.formats[recipe.base]
    if len(exceptions) > _NAMED:
        sentence, with_all = f"Quantize everything to {base}, but {_kinds_of_exceptions(told)}", f"{base} for all"
    else:
        spared = f" but {_parts(told, exceptions)}" if exceptions else ""
        sentence, with_all = f"Quantize everything{spared} to {base}", "it" if len(exceptions) == 1 else "them"
    sentence += f": {told.metric} {_outcome(told)}"
    row = told.rows.get(recipe.base)
    expected = told.of_base()
    if exceptions and row is not None:
        sentence += f"; with {with_all} {told.change(row.mean(told.metric))}"
    elif exceptions and expected is not None and not told.rows:
        sentence += f"; with {with_all} {told.lost(expected)}"
    return f"{sentence}."


def _kinds_of_exceptions(told: _Told) -> str:
    """Return how many parts get more bits, fewer, or stay, and names: of those that most weights' format costs most.

    Names of those with fewer bits, which are the ones that save most, come where there are not enough others.
    """
    recipe = told.recipe
    costs = told.scores.costs(recipe.by) if recipe.by in (*told.scores.clean, *told.scores.scores) else {}

    def rank(group: str) -> tuple[bool, float]:
        saved = told.bits_of_base(group) - recipe.choice[group].bits
        if recipe.choice[group].format is not None and saved > 0:
            return True, -saved * recipe.groups[group].parameters
        cost = costs.get((group, recipe.base or ""), 0.0)
        return False, -math.inf if math.isnan(cost) else -cost  # NaN is of a model that is destroyed

    first = sorted(recipe.exceptions, key=rank)
    kinds: dict[str, list[str]] = {"to more bits": [], "to another format": [], "to fewer bits": [], "not at all": []}
    for group in first:
        kinds[_kind(told, group)].append(group)
    said: list[str] = []
    for kind, groups in kinds.items():
        if groups:
            of = "" if said else f" of {len(recipe.choice)} parts"
            shown = [told.names[group] for group in groups if group in first[:_NAMED]]
            others = len(groups) - len(shown)
            if others and shown:
                shown.append(f"{others} other{'s' if others > 1 else ''}")
            said.append(f"{len(groups)}{of} {kind}" + (f" ({_listed(shown)})" if shown else ""))
    return _listed(said)


def _kind(told: _Told, group: str) -> str:
    one, base = told.recipe.choice[group], told.bits_of_base(group)
    if one.format is None:
        return "not at all"
    return "to another format" if one.bits == base else "to more bits" if one.bits > base else "to fewer bits"


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _outcome(told: _Told) -> str:
    row = told.rows.get(RECIPE)
    if row is not None:
        return told.change(row.mean(told.metric))
    if told.metric in told.recipe.expected:
        return f"{told.lost(told.recipe.expected[told.metric])} are expected"
    return "was not measured"


def _parts(told: _Told, names: list[str]) -> str:
    """Return the parts that get another format, and which."""
    return _listed([f"{name} ({_format(told, told.recipe.choice[name].format)})" for name in names])


def _format(told: _Told, label: str | None) -> str:
    return _AS_IT_IS if label is None else told.formats[label]


def content_of_recipe(
    scores: SensitivityRecord,
    recipe: RecipeRecord,
    measured: EvaluationRecord | None,
    title: str | None,
    metric: str | None = None,
    files: Collection[str] | None = None,
) -> RecipeContent:
    """Return what is to be said about a recipe."""
    told = _Told(scores, recipe, measured, metric)
    panel = _front(told)
    largest = largest_drop(_drops(told).values())
    return RecipeContent(
        title=title or f"Which parts of {scores.model} take which bits? {told.metric} against bits a weight",
        metric=told.metric,
        numbers=told.numbers,
        findings=[Finding(_answer(told)), *_findings(told)],
        notes=_notes(told, measured, files),
        front=None if panel is None else _front_table(told, panel),
        panels=[] if panel is None else [panel],
        no_curves="",
        heat_map=_heat_map(told, largest),
        strongest=_strongest(told, largest),
        choice=_choice(told),
        pairs=_pairs(told),
        scores=_scores(told),
        settings=_settings(told, measured),
    )


def recipe_in_short(
    scores: SensitivityRecord, recipe: RecipeRecord, measured: EvaluationRecord, metric: str
) -> tuple[str, str]:
    """Return what the page says first: what to quantize to what and what that costs, and how many bits it takes."""
    told = _Told(scores, recipe, measured, metric)
    return _answer(told), _size(told)


def _size(told: _Told) -> str:
    """Return how many bits the recipe takes, of how many weights, and whether costs add up."""
    recipe, row = told.recipe, told.rows.get(RECIPE)
    budget = ", ".join(f"{name} {short(value)}" for name, value in recipe.budget.items())
    asked = f" (asked for: {budget})" if budget else ""
    within = sum(group.parameters for group in told.scores.groups.values())
    share = f" of {told.scores.parameters:,}" if told.scores.parameters else ""
    size = (
        f"It takes {recipe.bits:.2f} bits a weight, scales included{asked}, in {within:,}{share} weights: all others "
        "stay as they are, and are not counted."
    )
    together = ""
    if told.metric in recipe.expected and recipe.base is not None:
        guessed = f", {recipe.estimated} of {len(recipe.choice)} estimated," if recipe.estimated else ""
        together = f" Its parts by themselves add up{guessed} to {told.lost(recipe.expected[told.metric])}"
        together += "." if row is None else f"; together they have {told.change(row.mean(told.metric))}."
    return size + together


def _findings(told: _Told) -> Iterable[Finding]:
    recipe, row = told.recipe, told.rows.get(RECIPE)
    yield Finding("", _size(told))
    fitting = [
        one for label, one in told.rows.items() if label in recipe.formats and _bits(one) <= recipe.bits * (1 + 1e-9)
    ]
    if fitting and row is not None:
        best = max(fitting, key=_bits)
        value, of_recipe = best.mean(told.metric), row.mean(told.metric)
        better = of_recipe > value if told.greater else of_recipe < value
        yield Finding(
            "",
            f"One format for all within as many bits is {told.formats[best.label]} ({_bits(best):.2f} bits a weight): "
            f"{told.metric} {told.change(value)}{'' if better else ', so that nothing is gained by the recipe'}.",
        )
    for note in recipe.notes:
        yield Finding("", note)
    if recipe.pairs:
        yield Finding("", _interaction(told))
    correlations = {name: value for name, value in told.scores.correlations(_ranked(told)).items() if value == value}
    if correlations:
        best_score = max(correlations, key=lambda name: correlations[name])
        listed = ", ".join(f"{name} {_rank(value)}" for name, value in correlations.items())
        yield Finding(
            "",
            f"Of the cheap scores {best_score} orders parts and formats most as the measured change of "
            f"{_ranked(told)} does (Spearman's rank correlation: {listed}).",
        )


def _ranked(told: _Told) -> str:
    """Return the metric that scores are compared with: one that is no count of items, where there is one."""
    return next((name for name in (DIVERGENCE, "loss", "eval_loss") if name in told.scores.clean), told.of_parts)


def _bits(row: CorruptionRecord) -> float:
    return float(row.settings["bits"])


def _notes(told: _Told, measured: EvaluationRecord | None, files: Collection[str] | None) -> list[str]:
    scores = told.scores
    count = sum(bool(cell.measured) for cell in scores.cells)
    said = [
        f"{count} of {len(scores.cells)} parts in a format were measured"
        + ("." if count == len(scores.cells) else ", those with the largest Fisher scores; the others are estimated."),
    ]
    rows = rows_counted([scores], told.metric, told.numbers)
    if rows:
        said.append(
            f"Measured on {rows:,} rows, of which one is {told.numbers.difference(1 / rows)}: a few rows, "
            "and gains, are chance."
        )
    if measured is None:
        said.append("The recipe was not measured as a whole: that costs add up is an assumption.")
    elif (same := same_data(scores.data, measured.data)) is not None:
        said.append(
            "Chosen and measured on the same rows: what was lucky there was chosen, so it is a little too good."
            if same
            else "Chosen on some rows, and measured as a whole on others: these numbers owe nothing to the choice."
        )
    if told.recipe.base is not None:
        said.append(_how_to_apply(files, told.recipe.loaded_part))
    return [*said, *scores.notes, *told.info.guesses(told.metric)]


def _how_to_apply(files: Collection[str] | None, part: str) -> str:
    """Return which tool reads which of the files that were written.

    Args:
        files: Their names; None if none was written.
        part: The name of the part of the model that they are for; "" for all of it.
    """
    if files is None:
        return (
            "To apply it: export_recipe(recipe, folder) writes a file for each tool that quantizes and has these "
            "formats for these parts."
        )
    readers = [reader for name, reader in _READERS.items() if name in files]
    if not readers:
        return "export_recipe wrote no file for a tool that quantizes: none has these formats for these parts."
    of_part = (
        f" They name the modules of {part} alone: SentenceTransformer(model, model_kwargs={{'quantization_config': "
        f"...}}) passes such a configuration on, and llm-compressor takes model.get_submodule('{part}')."
    )
    return f"To apply it: {'; '.join(readers)}.{of_part if part else ''}"


def _front(told: _Told) -> Panel | None:
    """Return the metric against bits: recipes, one format for all, and recipes by the other scores."""
    lines: dict[str, list[Point]] = {}
    for label, row in told.rows.items():
        by = str(row.settings["by"])
        name = _ONE_FORMAT if label in told.recipe.formats else f"recipes by {by}"
        bits = round(_bits(row), 2)
        lines.setdefault(name, []).append(Point(bits, short(bits), row.mean(told.metric)))
    if not lines:
        return None
    drawn = {name: Line(told.clean, tuple(points)) for name, points in lines.items()}
    return Panel(f"{told.metric} against bits a weight", "bits a weight, scales included", "bits", drawn)


def _front_table(told: _Told, panel: Panel) -> Table:
    rows = [
        (name, point.label, told.numbers.value(point.value))
        for name, line in panel.lines.items()
        if name != _ONE_FORMAT
        for point in sorted(line.points, key=lambda point: -point.strength)
    ]
    uniform = sorted(
        (row for label, row in told.rows.items() if label in told.recipe.formats), key=lambda r: -_bits(r)
    )
    rows += [
        (
            f"{_ONE_FORMAT}: {told.formats[row.label]}",
            short(round(_bits(row), 2)),
            told.numbers.value(row.mean(told.metric)),
        )
        for row in uniform
    ]
    rows.insert(0, (_AS_IT_IS, "–", told.numbers.value(told.clean)))
    header = ("chosen", "bits a weight", told.numbers.head(told.metric))
    return Table("Every point of the front, measured as a whole", header, tuple(rows))


def _drops(told: _Told) -> dict[tuple[str, str], float]:
    return {
        place: drop
        for place, cell in told.scores.by_place.items()
        if (drop := told.scores.drop(cell, told.of_parts)) is not None
    }


def _heat_map(told: _Told, largest: float) -> Table:
    """Return how much worse each part makes the metric in each format; what was chosen has a mark."""
    labels, drops = list(told.recipe.formats), _drops(told)
    rows, shares = [], []
    for group, one in told.recipe.choice.items():
        cells, of_row = [], []
        for label in labels:
            drop = drops.get((group, label))
            mark = " ✓" if label == one.format else ""
            cells.append(("–" if drop is None else told.cost(told.of_parts, drop)) + mark)
            of_row.append(share_of_largest(drop, largest))
        rows.append((told.names[group], *cells))
        shares.append(tuple(of_row))
    return Table(
        f"{told.caption(told.of_parts)}, one part in one format; ✓ is the recipe",
        ("part", *(told.formats[label] for label in labels)),
        tuple(rows),
        tuple(shares),
    )


def _strongest(told: _Told, largest: float) -> str:
    if largest == 0:
        return "No cell has a colour, since none that was measured is worse than without quantization."
    shown = f"{told.cost(told.of_parts, largest)} {told.unit_of_cost(told.of_parts)}".rstrip()
    return f"The stronger the colour, the worse it is; the strongest is {shown}."


def _choice(told: _Told) -> Table:
    rows = [
        (told.names[group], f"{told.recipe.groups[group].parameters:,}", _format(told, one.format), f"{one.bits:.2f}")
        for group, one in told.recipe.choice.items()
    ]
    return Table("The recipe", ("part", "weights", "format", "bits a weight"), tuple(rows))


def _interaction(told: _Told) -> str:
    """Return how many pairs interact, and the one that does most."""
    pairs = told.recipe.pairs
    measured = (
        f"Of the {len(pairs)} pairs that were measured" if len(pairs) > 1 else "Of the one pair that was measured"
    )
    count = sum(abs(pair.interaction) > _INTERACTS * abs(pair.apart) for pair in pairs)
    said = f"{measured} {count or 'none'} cost{'' if count > 1 else 's'} over a tenth more or less together than apart"
    if not count:
        return f"Parts hardly interact. {said}."
    most = max(pairs, key=lambda pair: abs(pair.interaction))
    together, apart = (told.cost(most.metric, one) for one in (most.together, most.apart))
    return (
        f"Parts interact. {said}: {told.names[most.first]} and {told.names[most.second]} most, {together} together "
        f"and {apart} apart ({told.caption(most.metric)})."
    )


def _pairs(told: _Told) -> Table | None:
    """Return what two parts cost together, and apart; None where no pair was measured."""
    if not told.recipe.pairs:
        return None
    rows = [
        (
            f"{told.names[pair.first]} + {told.names[pair.second]}",
            *(told.cost(pair.metric, one) for one in (pair.apart, pair.together, pair.interaction)),
        )
        for pair in told.recipe.pairs
    ]
    caption = f"{told.caption(told.recipe.pairs[0].metric)}, two parts in the formats of the recipe"
    return Table(caption, ("two parts", "apart", "together", "difference"), tuple(rows))


def _scores(told: _Told) -> Table:
    """Return how each score orders the cells, and what its own recipe gives at the same budget."""
    names = list(dict.fromkeys([_ranked(told), *({told.metric} & set(told.scores.clean))]))
    correlations = {name: told.scores.correlations(name) for name in names}
    rows = []
    for score in told.scores.scores:
        row = next((one for one in told.rows.values() if one.settings["by"] == score), None)
        of_recipe = "–" if row is None else told.numbers.value(row.mean(told.metric))
        ranks = [_rank(correlations[name][score]) for name in names]
        rows.append((score, *ranks, of_recipe))
    header = ("score", *(f"rank correlation with {name}" for name in names), f"{told.metric} of its recipe")
    return Table("Scores from one backward pass, against what was measured", header, tuple(rows))


def _rank(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}".replace("-", "−")


def _settings(told: _Told, measured: EvaluationRecord | None) -> Table:
    scores = told.scores
    rows = [
        ("model", scores.model),
        ("task", scores.task or "not said"),
        ("metrics on", "not said" if scores.evaluated_on is None else str(scores.evaluated_on)),
        ("data (SHA-256)", scores.data or "not given"),
        ("weights (SHA-256)", scores.weights or "not said"),
        ("chosen by", told.recipe.by),
        ("budget", ", ".join(f"{name} = {short(value)}" for name, value in told.recipe.budget.items()) or "none"),
        ("formats", "; ".join(scores.formats)),
        ("versions", "; ".join(f"{library} {version}" for library, version in scores.versions.items())),
    ]
    rows += [("flags", shlex.join(flag_words(scores.flags)))] if scores.flags else []
    rows += [] if measured is None else [("measured as a whole", "; ".join(told.rows))]
    return Table("Settings to reproduce", ("setting", "value"), tuple(rows))


def recipe_markdown(content: RecipeContent) -> str:
    """Return the page as GitHub's Markdown, each name escaped."""
    parts = answer_as_markdown(content.title, content.findings, content.notes)
    tables = {
        "Front": content.front,
        "Heat map": content.heat_map,
        "What each part gets": content.choice,
        "Parts that interact": content.pairs,
        "Which cheap score tells": content.scores,
        "Settings to reproduce": content.settings,
    }
    for title, table in tables.items():
        if table is not None:
            parts += [f"## {title}", *tables_as_markdown([table])]
    return "\n\n".join(parts) + "\n"
