"""Records of any content, and names that try to break out of their place, in the card and in the HTML report."""

from __future__ import annotations

import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hf_parcor import CorruptionRecord, EvaluationRecord, RobustnessReport, SweepRecord
from hf_parcor.cards import EvaluationData, ModelFacts, facts_of, with_probe
from hf_parcor.cards.folder import card_of
from hf_parcor.cards.front_matter import eval_result_file
from hf_parcor.cards.text import HEAT_MAP, read_card
from hf_parcor.reports.markup import printable

SPECIAL = [
    "a: b", "- x", "# h", "'", '"', "{a}", "[a](b)", "&a", "*a", "!t", "|", ">", "%", "@", "`", "---", "...", "null",
    "true", "1e3", "0x1F", "1:30", "~", "", " ", "\t", "a\nb", "a\r\nb", "\x07", "\x85", "\u2028", "\u202e", "🙂",
    "名前", "<b>", "</table>", "<!-- hf_parcor:end -->", "```", "$x$", "\\(x\\)", "2020-01-01", "=", "<<", "? a",
    "a #b",
]  # fmt: skip
words = st.sampled_from(SPECIAL)
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12), words, st.tuples(words, words).map("".join)
)
names = texts.filter(lambda text: text != "")
numbers = st.one_of(st.floats(), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e-320, 0.1 + 0.2]))
plain = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), numbers, texts)


@st.composite
def rows(draw, metrics, label):
    n = draw(st.integers(1, 3))
    values = {metric: tuple(draw(st.lists(numbers, min_size=n, max_size=n))) for metric in metrics}
    return CorruptionRecord(
        draw(st.sampled_from(["gaussian", "gradient", "of somebody"])),
        label,
        draw(st.dictionaries(names, plain, max_size=2)),
        tuple(range(n)),
        values,
        notes=tuple(draw(st.lists(texts, max_size=1))),
    )


@st.composite
def facts(draw):
    metrics = draw(st.lists(names, min_size=1, max_size=2, unique=True))
    labels = draw(st.lists(names, max_size=4, unique=True))
    if draw(st.integers(0, 99)) == 0:
        labels += [f"corruption {number}" for number in range(100)]
    record = EvaluationRecord(
        draw(names),
        {"target_modules": draw(texts)},
        draw(st.integers(1, 10**12)),
        draw(rows(metrics, draw(texts))),
        tuple(draw(rows(metrics, label)) for label in labels),
        draw(texts),
        draw(st.dictionaries(names, texts, max_size=2)),
        tuple(draw(st.lists(texts, max_size=2))),
    )
    return facts_of(
        record,
        name=draw(texts),
        base_model=draw(texts),
        datasets=draw(st.lists(texts, max_size=2)),
        task=draw(texts),
        evaluated_on=EvaluationData(*(draw(texts) for _ in range(5))),
        metric=metrics[0],
        defense=draw(
            st.one_of(st.none(), st.fixed_dictionaries({"defense": texts, "settings": st.just({"a|b": "c"})}))
        ),
        command=draw(texts),
        benchmark_task=draw(texts),
    )


def headings(text):
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [
        (token.tag, tokens[place + 1].content) for place, token in enumerate(tokens) if token.type == "heading_open"
    ]


def kinds(text):
    """Return the kinds of all blocks and of what is inside, in Markdown without our front matter."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        found += [token.type, *(child.type for child in token.children or [])]
    return found


SECTIONS = [
    ("h2", "Robustness to parameter corruption"),
    ("h3", "Defense"),
    ("h3", "How to reproduce"),
    ("h3", "Limits"),
    ("h3", "Citation"),
]


class TestAnyRecord:
    @pytest.mark.slow
    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(facts(), st.sampled_from(["", "# Mine\n", "---\nlicense: mit\n---\nWords."]))
    def test_makes_valid_yaml_and_markdown(self, given_facts, theirs):
        card = card_of(given_facts, {}, theirs)
        card.encode("utf-8")
        assert card_of(given_facts, {}, card) == card, "an update changes nothing"
        values = yaml.safe_load(read_card(card).front_matter)
        assert values["model-index"][0]["name"] == printable(given_facts.name)
        parsed = ModelCard(card)
        again = yaml.safe_load(parsed.data.to_yaml())
        assert again == values, "metadata survive a round trip"
        metrics = [metric for result in values["model-index"][0]["results"] for metric in result["metrics"]]
        assert [metric["name"] for metric in metrics] == [
            printable(f"{given_facts.metric}, {row.label}") for row in given_facts.rows()
        ]
        for metric, row in zip(metrics, given_facts.rows(), strict=True):
            mean = row.metrics[given_facts.metric].mean
            assert repr(float(metric["value"])) == repr(mean)
        assert headings(read_card(card).section) == SECTIONS
        tables = kinds(read_card(card).section).count("table_open")
        assert tables == 1 + (given_facts.defense is not None)
        rows = sum(line.startswith("| ") for line in read_card(card).section.split("\n### ")[0].splitlines())
        assert rows == 2 + len(given_facts.rows())

    @pytest.mark.slow
    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
    @given(facts())
    def test_facts_and_result_files_are_read_as_written(self, given_facts):
        assert ModelFacts.from_json(given_facts.to_json()).to_json() == given_facts.to_json()
        data = replace(given_facts.evaluated_on, id="org/reviews")
        for path, text in eval_result_file(replace(given_facts, evaluated_on=data)).items():
            (entry,) = yaml.safe_load(text)
            assert math.isfinite(entry["value"])
            assert entry["dataset"]["id"] == data.id
            assert entry["dataset"]["task_id"] == printable(given_facts.benchmark_task)
            assert path.count("/") == 1


HOSTILE = {
    "a heading": "x\n# Heading\n",
    "a link": "[click](https://evil.example)",
    "an image": "![x](https://evil.example/x.png)",
    "a script": "<script>alert(1)</script>",
    "an image that fails": '"><img src=x onerror=alert(1)>',
    "the end of a table": "x | y |\n\n| z",
    "the end of a code span": "`` ` ``` x",
    "a fence": "```\n# Heading\n",
    "the end of our section": "<!-- hf_parcor:end -->\n# Heading",
    "a comment": "--> <b>bold</b> <!--",
    "metadata": "x\n---\nlicense: mit\n---\n",
    "a key": "x: y\nlicense: mit",
    "a tag of YAML": "!!python/object/apply:os.system [ls]",
    "an anchor": "&a *a",
    "a comment of YAML": "x # y",
    "a template": "{{ 7 * 7 }} {% raw %}",
    "bold and struck": "**b** ~~s~~ _i_",
    "an entity": "&lt;b&gt; &#60;",
    "a rule": "***",
    "another direction": "\u202etxt.exe",
}
FIELDS = (
    *("name", "base_model", "datasets", "task", "data", "metric", "label", "setting", "note", "command", "version"),
    "group",
)


def hostile_facts(field, text):
    """Return facts with a text in one field, and harmless words in all others."""
    value = {one: text if one == field else f"word{number}" for number, one in enumerate(FIELDS)}
    clean = CorruptionRecord("none", "no corruption", {}, (0,), {value["metric"]: (0.9,)})
    row = CorruptionRecord(
        "own", value["label"], {"a": value["setting"]}, (0,), {value["metric"]: (0.5,)}, notes=(value["note"],)
    )
    record = EvaluationRecord("m", {}, 5, clean, (row,), "", {"torch": value["version"]}, weights=value["data"])
    part = CorruptionRecord("gradient", "g", {"p": 2.0, "epsilon": 1.0, "top_n": None}, (0,), row.metrics)
    weak = replace(part, metrics={value["metric"]: (0.1,)}, notes=row.notes)
    groups = {"a": part, "b": part, value["group"]: weak}
    records = {name: replace(record, corruptions=(one,)) for name, one in groups.items()}
    facts = facts_of(
        record,
        name=value["name"],
        base_model=value["base_model"],
        datasets=[value["datasets"]],
        task=value["task"],
        evaluated_on=EvaluationData(value["data"], split=value["data"]),
        command=value["command"],
        defense={"defense": value["setting"], "settings": {value["setting"]: value["setting"]}},
    )
    return with_probe(facts, SweepRecord(records, record.weights, trials=1, seed=0))


class TestNamesStayInTheirPlace:
    @pytest.mark.slow
    @pytest.mark.parametrize("field", FIELDS)
    @pytest.mark.parametrize("name", HOSTILE)
    def test_of_the_card(self, field, name):
        harmless, hostile = (card_of(hostile_facts(field, text), {HEAT_MAP}) for text in ("words", HOSTILE[name]))
        ours, theirs = read_card(harmless), read_card(hostile)
        assert kinds(theirs.section).count("html_inline") == 0
        structure = [kind for kind in kinds(ours.section) if kind not in ("text", "softbreak", "text_special")]
        links = {"link_open", "link_close"}  # a name that is one on the Hub is a link there, another is not
        found = [kind for kind in kinds(theirs.section) if kind not in ("text", "softbreak", "text_special")]
        assert [kind for kind in found if kind not in links] == [kind for kind in structure if kind not in links]
        assert found.count("link_open") <= structure.count("link_open")
        assert list(yaml.safe_load(theirs.front_matter)) == [
            key for key in yaml.safe_load(ours.front_matter) if key in yaml.safe_load(theirs.front_matter)
        ]
        assert theirs.after == "\n", "our section ends where it ends"

    @pytest.mark.slow
    @pytest.mark.parametrize("name", HOSTILE)
    def test_of_the_report(self, name, tmp_path):
        text = HOSTILE[name]
        metric = f"{text} accuracy"
        clean = CorruptionRecord("none", "no corruption", {}, (0,), {metric: (0.9,)}, notes=(text,))

        def report(corruption, label):
            rows = tuple(
                CorruptionRecord(corruption, f"{label}{value}", {"p": 2.0, "epsilon": value}, (0,), {metric: (value,)})
                for value in (0.1, 0.5)
            )
            record = EvaluationRecord(text, {"target_modules": [text]}, 5, clean, rows, "", {"torch": text})
            return RobustnessReport({text: record}, metric, title=text)

        for corruption in ("gradient", text):
            path = report(corruption, text).to_html(tmp_path / "report.html")
            page = _Tags()
            page.feed(path.read_text(encoding="utf-8"))
            assert page.tags <= _KNOWN
            assert not any(name.startswith("on") for name in page.attributes)
            assert "use" in page.tags, "there is a curve"
            assert all(address.startswith("#") for address in page.addresses)


_KNOWN = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "section", "p", "code", "ul", "li"),
    *("div", "table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary", "figure", "figcaption"),
    *("svg", "g", "path", "line", "circle", "rect", "text", "polyline", "polygon", "span", "strong", "tspan", "desc"),
    *("defs", "use", "clippath", "wbr"),
}


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.addresses = set(), set(), set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses |= {value for name, value in attrs if name in ("href", "src")}
