"""The pages: their structure, their numbers, and names that try to break out."""

import html
import html.parser
import math
import re
import shlex
import sys
from dataclasses import replace

import markdown_it
import matplotlib as mpl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_parcor import BitFlips, CorruptionRecord, EvaluationRecord, RobustnessReport, SweepRecord, WorstBitFlips
from hf_parcor.cards import facts_of
from hf_parcor.cli.main import build_parser
from hf_parcor.corruptions import CORRUPTIONS, corruptions_of_table_1
from hf_parcor.corruptions.catalogue import read_corruptions
from hf_parcor.recipes import MixedQuantization
from hf_parcor.records import EvaluationData, MetricInfo
from hf_parcor.records.evaluation import CorruptionKind
from hf_parcor.reports import html as page_of_html
from hf_parcor.reports.markup import code_of, printable
from hf_parcor.reports.plots import plot_comparison

VOID = {"meta", "br", "img", "input", "link", "hr", "wbr"}
TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "pre",
        "section",
        "div",
        "h1",
        "h2",
        "p",
        "code",
        "ul",
        "li",
    ),
    *(
        "figure",
        "figcaption",
        "strong",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "details",
        "summary",
        "span",
        "wbr",
    ),
    *("pre", "svg", "g", "path", "text", "desc", "defs", "use", "clippath", "rect", "wbr"),
}
NASTY = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a|b\n# c\n---",
    "`x` [l](u) <!-- \\",
    "</style>",
]
names = st.one_of(st.sampled_from(NASTY), st.text(max_size=12)).filter(lambda name: name.strip())


class Page(html.parser.HTMLParser):
    """Reads a page and holds that every tag is closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        raise AssertionError(data)


def write(report, folder):
    page = report.to_html(folder / "very" / "deep" / "report.html").read_text(encoding="utf-8")
    return page, report.to_markdown(folder / "report.md").read_text(encoding="utf-8")


def tables_of(markdown):
    """Return the tables as rows of cells; a cell ends at a bar that is not escaped."""
    tables, last = [], False
    for line in markdown.splitlines():
        is_row = line.startswith("|")
        if is_row and not last:
            tables.append([])
        if is_row:
            tables[-1].append(re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1])
        last = is_row
    return tables


@pytest.fixture
def comparison(record_of):
    def runs(value):
        return {
            group: [record_of({0.1: value + shift, 0.5: value / 2}, 0.9 + shift) for shift in (-0.01, 0.0, 0.02)]
            for group in ("layer.0", "layer.1")
        }

    return RobustnessReport.compare({"plain": runs(0.6), "defended": runs(0.8)})


def test_structure(comparison, tmp_path):
    text, markdown = write(comparison, tmp_path)
    page = Page(text)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert set(page.tags) <= TAGS
    assert [tag for tag in page.tags if tag in ("h1", "h2")] == ["h1", "h2", "h2", "h2", "h2"]
    order = [
        text.index(part) for part in ('class="verdict"', "Heat map<", "Curves<", "Table<", "Settings to reproduce<")
    ]
    assert order == sorted(order)
    assert page.tags.count("th") == sum(name == "scope" for name, _ in page.attributes)
    assert text.count('role="img"') == 2  # a panel a group
    assert all(
        re.match(r"<svg[^>]*><title>[^<]+</title><desc>[^<]+</desc>", part)
        for part in re.findall(r'<svg[^>]*role="img".*?</desc>', text)
    )
    assert {("name", "viewport"), ("charset", "utf-8")} <= set(page.attributes)
    assert not re.search(r"https?:|url\((?!#)|@import|src=|href=\"(?!#)", text)
    assert len(text) < 1_000_000
    said = "".join(page.texts)  # a name may go on in the next line, but what is copied is all of it
    for part in ("2.13.0", "prefers-color-scheme", "layer.0: defended", "90.3 [86.5, 94.1]"):
        assert part in said
    assert [
        part for part in comparison.verdict if part.split(" (")[0].split(". ")[0] not in markdown.replace("\\", "")
    ] == []


def test_the_title_names_each_model_once(record_of, tmp_path):
    runs = [record_of({0.1: 0.5}), record_of({0.1: 0.4})]
    reports = {
        "bert": RobustnessReport(runs),
        "plain and defended": RobustnessReport.compare({"plain": runs[0], "defended": runs[1]}),
        "Mine": RobustnessReport(runs, title="Mine"),
    }
    for named, report in reports.items():
        text, markdown = write(report, tmp_path)
        assert markdown.splitlines()[0].count(named) == text.partition("</title>")[0].count(named) == 1
        assert ("How robust" in markdown.splitlines()[0]) == (named != "Mine")


def test_numbers_in_the_heat_map(record_of, tmp_path):
    probe = {"a": record_of({0.1: 0.8, 0.5: math.nan}), "b": record_of({0.1: 0.7, 1.0: 0.1})}
    text, markdown = write(RobustnessReport(probe), tmp_path)
    [heat] = re.findall(r'<table[^>]*class="heat".*?</table>', text)
    assert re.findall(r"<td[^>]*>(.*?)</td>", heat) == ["90.0", "80.0", "nan", "–", "90.0", "70.0", "–", "10.0"]
    assert re.findall(r'style="--share:([^"]*)">([^<]*)', heat) == [
        *[("0", "90.0"), ("0.125", "80.0")],  # what is broken or missing has no colour
        *[("0", "90.0"), ("0.25", "70.0"), ("1", "10.0")],
    ]
    table = [[cell.strip() for cell in row] for row in tables_of(markdown)[0]]
    assert table[0] == ["group", "clean", "0.1", "0.5", "1"]
    assert table[2:] == [["a", "90.0", "80.0", "nan", "–"], ["b", "90.0", "70.0", "–", "10.0"]]


def test_the_summary_has_the_measures(record_of, tmp_path):
    probe = {"a": record_of({1.0: 0.8, 2.0: 0.4}, 0.8), "b": record_of({1.0: 0.8, 2.0: 0.7}, 0.8)}
    _, markdown = write(RobustnessReport(probe), tmp_path)
    table = [[cell.strip() for cell in row] for row in tables_of(markdown)[1]]
    assert table[0] == ["group", "weights", "mean drop", "fragility", "mean from 0 on", "radius ε at half"]
    assert table[2:] == [
        ["a", "10", "20.0 points", "4", "70.0", "2"],
        ["b", "10", "5.0 points", "0.25", "77.5", "\\> 2"],
    ]


@pytest.mark.parametrize(
    ("task", "names", "shown"),
    [
        ("", ["perplexity"], "perplexity"),
        ("", ["loss", "accuracy"], "accuracy"),
        ("text-generation", ["loss", "perplexity", "accuracy"], "perplexity"),
        ("translation", ["loss", "bleu"], "bleu"),
        ("", ["distance", "loss"], "distance"),
    ],
)
def test_without_a_name_card_and_report_show_the_same_metric(record_of, task, names, shown):
    """A score of one's own needs no name, and of a text it is perplexity, as `evaluate` shows."""
    values = dict.fromkeys(names, (0.5,))
    record = replace(record_of({1.0: 0.5}), task=task, metric_info={"distance": MetricInfo(greater_is_better=False)})
    rows = tuple(replace(row, metrics=values) for row in record.corruptions)
    record = replace(record, clean=replace(record.clean, metrics=values), corruptions=rows)
    assert RobustnessReport(record).to_json() == RobustnessReport(record, shown).to_json()
    models = {"a": record, "b": replace(record, model="b")}
    assert RobustnessReport.compare(models).to_json() == RobustnessReport.compare(models, shown).to_json()
    assert facts_of(record, name="a").metric == shown


def test_norms_of_weights_stand_beside_their_number(record_of, tmp_path):
    probe = {
        name: replace(record_of({1.0: 0.8}), weights_norm=norm)
        for name, norm in (("a", 2.5), ("b", 40.0), ("c", None))
    }
    _, markdown = write(RobustnessReport({name: probe[name] for name in "ab"}), tmp_path)
    rows = [[cell.strip() for cell in row[:3]] for row in tables_of(markdown)[1]]
    assert [rows[0], *rows[2:]] == [["group", "weights", "their norm"], ["a", "10", "2.5"], ["b", "10", "40"]]
    _, markdown = write(RobustnessReport(probe), tmp_path)
    assert "their norm" not in markdown, "older records do not know it"


def test_a_broken_group_has_no_fragility_and_spoils_no_other(record_of, tmp_path):
    probe = {name: record_of({1.0: value}) for name, value in (("a", 0.8), ("b", math.nan), ("c", 0.5))}
    _, markdown = write(RobustnessReport(probe), tmp_path)
    assert [row[3].strip() for row in tables_of(markdown)[1][2:]] == ["0.25", "–", "4"]


def test_a_group_that_gains_has_no_fragility_and_none_is_measured_against_next_to_nothing(record_of, tmp_path):
    """The verdict gives no ratio there either: −0.5 points over 0.1 are not a fragility of −5."""

    def column(**values):
        probe = {name: record_of({1.0: value}, 0.9) for name, value in values.items()}
        return [row[3].strip() for row in tables_of(write(RobustnessReport(probe), tmp_path)[1])[1][2:]]

    assert column(a=0.5, b=0.899, c=0.899, d=0.905) == ["–"] * 4
    assert column(a=0.5, b=0.7, c=0.7, d=0.91) == ["2", "1", "1", "–"]


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@example(*["a|b\n# c\n---"] * 4, [0.5, math.nan])
@example(*['"><script>alert(1)</script><!--'] * 4, [1e308, -1e308])
@example("\x1b0.A", "a", "a", "a", [0.0, 0.0])
@given(names, names, names, names, st.lists(st.floats(), min_size=2, max_size=2))
def test_nothing_breaks_out(tmp_path_factory, record_of, group, model, metric, kind, values):
    folder = tmp_path_factory.mktemp("nasty")
    one = record_of(
        dict(zip((0.1, 1.0), values, strict=True)),
        metric=metric,
        target=[group],
        model=model,
        notes=(group,),
        data=model,
    )
    other = record_of({0.1: 0.5, 1.0: 0.1}, metric=metric, target=[kind], corruption=kind)
    probe = {group: one, group + "!": other}
    for report in (
        RobustnessReport(probe, metric),
        RobustnessReport.compare({model: probe, model + "!": {group: other, group + "!": one}}, metric, title=kind),
    ):
        text, markdown = write(report, folder)
        page = Page(text)
        assert set(page.tags) <= TAGS
        assert not any(name.startswith("on") or name == "src" for name, _ in page.attributes)
        assert all(value.startswith("#") for name, value in page.attributes if name == "href")
        shown = "".join(printable(part) for part in page.texts)  # in parts where a line may break inside of it
        assert "".join(printable(group).split()) in "".join(shown.split())
        for table in tables_of(markdown):
            assert len({len(row) for row in table}) == 1, table
        assert all(
            not line.startswith(("#", "    ", "```", "<")) or re.match("##? ", line) for line in markdown.splitlines()
        )
        assert sum(line.startswith("#") for line in markdown.splitlines()) == 5
        assert ("srcdoc", text) in Page(report._repr_html_()).attributes, "what a notebook shows is the page"
        assert "".join(str(report).split()) == "".join("".join(report.verdict).split())


@pytest.mark.parametrize("text", [*NASTY, r"$\frac$", "a\0b\ud800"])
def test_what_a_record_calls_its_axis_stays_text(record_of, tmp_path, text):
    """A corruption of one's own says its title and unit itself, in the record."""
    record = record_of({0.1: 0.8, 0.5: 0.4}, corruption="mine")
    rows = tuple(replace(row, kind=CorruptionKind(text, "epsilon", text, "ε={}")) for row in record.corruptions)
    page = Page(write(RobustnessReport(replace(record, corruptions=rows)), tmp_path)[0])
    assert set(page.tags) <= TAGS
    assert page.tags.count("use") > 0, "drawn"
    assert printable(text) in page.texts


def test_markdown_renders_as_text(record_of, tmp_path):
    probe = {name: record_of({0.1: 0.5 - 0.1 * place}, target=[name]) for place, name in enumerate(NASTY)}
    _, markdown = write(RobustnessReport(probe, title=NASTY[0]), tmp_path)
    rendered = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).disable("linkify").render(markdown)
    tags = set(re.findall(r"</?([a-z0-9!-]+)", rendered))
    assert tags <= {"h1", "h2", "p", "strong", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "code"}


@example("`a")
@example("a`")
@given(st.text(st.one_of(st.sampled_from("`a "), st.characters())).filter(printable))
def test_code_spans_show_what_they_are_of(code):
    shown = markdown_it.MarkdownIt().render(code_of(code))
    assert html.unescape(shown) == f"<p><code>{printable(code)}</code></p>\n"


def test_a_remedy_is_given_once(record_of, tmp_path):
    def of(group, value):
        kinds = {"gradient": value, "random": value - 0.01}
        records = [record_of({0.1: moved}, target=[group], corruption=kind) for kind, moved in kinds.items()]
        return replace(records[0], corruptions=tuple(row for record in records for row in record.corruptions))

    probe = {group: of(group, value) for group, value in (("a", 0.85), ("b", 0.8), ("c", 0.2))}
    for page in write(RobustnessReport(probe), tmp_path):
        assert page.count("times as fragile") == 2
        assert page.count("ParameterDefenseTrainer(") == 1


def luminance(channels):
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (channel / 255 for channel in channels)
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("share", [place / 20 for place in range(21)])
def test_cells_can_be_read(share, scheme):
    """As a browser mixes the colours of the style sheet."""
    light, dark = page_of_html.STYLE.split("prefers-color-scheme: dark")
    of_scheme = light if scheme == "light" else dark
    ink, paper = (re.search(rf"--{name}: #(\w+);", of_scheme).group(1) for name in ("ink", "paper"))
    ink, paper = (bytes.fromhex("".join(2 * digit for digit in one) if len(one) == 3 else one) for one in (ink, paper))
    *color, most = map(int, re.search(r"\.heat td .*rgb\((\d+) (\d+) (\d+) .*\* (\d+)%", page_of_html.STYLE).groups())
    alpha = share * most / 100
    cell = [alpha * over + (1 - alpha) * under for over, under in zip(color, paper, strict=True)]
    darker, lighter = sorted((luminance(cell), luminance(ink)))
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5  # WCAG AA


def test_needs_no_optional_library(record_of, tmp_path, monkeypatch):
    probe = {"a": record_of({0.1: 0.5, 0.2: 0.4}), "b": record_of({0.1: 0.8, 0.2: 0.7})}
    for library in ("matplotlib", "matplotlib.figure", "pandas", "scipy", "tabulate", "jinja2"):
        monkeypatch.setitem(sys.modules, library, None)
    text, _ = write(RobustnessReport(probe), tmp_path)
    assert "svg" not in Page(text).tags
    assert "pip install 'hf-parcor[plots]'" in text, "the page says what is missing"
    with pytest.raises(ImportError, match=r"pip install 'hf-parcor\[statistics\]'"):
        RobustnessReport([record_of({0.1: 0.5}), record_of({0.1: 0.8})])


class TestPictures:
    """What Matplotlib draws becomes a part of the page."""

    def page(self, record_of, tmp_path, probe=None):
        probe = probe or {"a": record_of({0.1: 0.8, 0.5: 0.4}), "<b>": record_of({0.1: 0.7, 0.5: 0.1})}
        return write(RobustnessReport(probe), tmp_path)[0]

    def test_every_value_has_its_place(self, record_of, tmp_path):
        text = self.page(record_of, tmp_path, {"a": record_of({0.1: 0.8, 0.2: 0.5, 0.5: 0.2})})
        [path] = re.findall(r'd="(M [^"]*)"[^>]*style="fill: none; stroke: #d55e00; stroke-width: 1.5', text)
        x, y = zip(*[map(float, place.split()) for place in re.split(" ?[ML] ", path) if place], strict=True)
        assert y[1] - y[0] == pytest.approx(y[2] - y[1], abs=0.01), "equal steps of accuracy"
        assert y[0] < y[1], "less is below"
        widths = [math.log(0.2 / 0.1), math.log(0.5 / 0.2)]
        assert (x[1] - x[0]) / (x[2] - x[1]) == pytest.approx(widths[0] / widths[1], abs=0.01)

    def test_a_page_is_the_same_each_time_and_whatever_a_person_set(self, record_of, tmp_path):
        first = self.page(record_of, tmp_path)
        with mpl.rc_context({"axes.edgecolor": "white", "font.size": 30, "svg.fonttype": "path"}):
            assert self.page(record_of, tmp_path) == first
            assert mpl.rcParams["font.size"] == 30, "nothing is left changed"

    def test_ink_is_that_of_the_page(self, record_of, tmp_path):
        text = self.page(record_of, tmp_path)
        drawn = re.findall(r"<svg.*?</svg>", text)
        assert drawn
        colors = set(re.findall(r"(?:stroke|fill): (#\w+)", "".join(drawn)))
        assert colors == {"#d55e00", "#0072b2", "#b0b0b0", "#808080"}, "lines and greys; all else follows the text"
        assert "font-family" not in "".join(drawn)

    def test_names_inside_belong_to_one_picture(self, comparison, tmp_path):
        page = Page(write(comparison, tmp_path)[0])
        ids = [value for name, value in page.attributes if name == "id"]
        used = {value[1:] for name, value in page.attributes if name == "href"}
        used |= {value[5:-1] for name, value in page.attributes if name == "clip-path"}
        assert len(ids) == len(set(ids))
        assert used == set(ids) != set()
        assert page.tags.count("style") == 1, "no picture styles the page"

    def test_the_legend_has_the_colour_of_the_line(self, record_of, tmp_path):
        text = self.page(record_of, tmp_path)
        lines = re.findall(r'd="(M [^"]*)"[^>]*style="fill: none; stroke: (#\w+); stroke-width: 1.5', text)
        ends = {color: float(path.split()[-1]) for path, color in lines}
        legend = {name: color for color, name in re.findall(r'color:(#\w+)"[^>]*>[^<]*</span><span>([^<]*)<', text)}
        assert ends[legend["a"].lower()] < ends[legend["&lt;b&gt;"].lower()], "b loses more, and is below"

    def test_what_shows_nothing_has_no_curve_and_is_named(self, record_of, tmp_path):
        flat = record_of({0.1: 0.9, 0.5: 0.9}, corruption="random")
        single = record_of({0.1: 0.2}, corruption="multi_step")
        falls = record_of({0.1: 0.8, 0.5: 0.4})
        record = replace(falls, corruptions=falls.corruptions + flat.corruptions + single.corruptions)
        text = self.page(record_of, tmp_path, record)
        assert text.count('role="img"') == 1
        [said] = re.findall(r"<p[^>]*>No curve([^<]*)", text)
        assert "random" in said
        assert "multi-step" in said
        assert "gradient" not in said
        assert "multi-step, L2" in text.split("Settings to reproduce")[0].split("Table<")[1], "the tables have it"


@pytest.mark.parametrize(
    "values",
    [
        (1e308, -1e308),
        (5e-324, 0.0),
        (1.0, 1.0 + 2**-52),
        (0.0, 0.0),
        (math.inf, math.nan),
        (1e-300, 1e3),
        (1e-5, 1e9),
    ],
)
def test_extreme_values_are_drawn(record_of, tmp_path, values):
    record = record_of(dict(zip((0.1, 0.2), values, strict=True)), clean=0.5)
    text, _ = write(RobustnessReport(record, greater_is_better=False), tmp_path)
    assert Page(text).tags.count("desc") == 1
    places = re.findall(r'(?:\bd|x|y|transform)="([^"]*)"', text)
    assert [place for place in places if re.search("nan|inf", place)] == []


def test_many_groups_stay_small(record_of, tmp_path):
    probe = {f"layer.{place}": record_of({e / 10: 0.9 - place * e / 1000 for e in range(1, 9)}) for place in range(48)}
    text, _ = write(RobustnessReport(probe), tmp_path)
    assert len(text) < 300_000
    assert "the 6 of 48 groups with the largest mean drop" in text


CORRUPTIONS_OF_WORDS = [
    *corruptions_of_table_1(),
    *read_corruptions(["quantization=4,3:per=channel,symmetric=false", "float-quantization=mxfp4", "drift=3600"]),
    *read_corruptions(["gaussian=0.1:relative-to=channel", "gradient=0.1:norm=inf,top-n=9", "multi-step=1:steps=3"]),
    *read_corruptions(["bit-flips=1e-7:bits=sign", "worst-bit-flips=1,5:of=int8", "uniform=0.25"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "grouping"),
    [
        ({"all": "all"}, ""),
        ({"bert.encoder.layer.0": "bert.encoder.layer.0", "bert.encoder.layer.1": "bert.encoder.layer.1"}, ""),
        ({"embedding": "bert.embeddings.word_embeddings", "attention": r".*self\.(query|key)"}, "kinds"),
        ({"default": "lora.default"}, "adapters"),
    ],
)
def test_the_command_measures_the_same(targets, grouping, tmp_path):
    """What the command line reads from it is what the record says; and of what it cannot name there is none."""
    names = {kind: name for name, kind in CORRUPTIONS.items()}
    rows = []
    for one in CORRUPTIONS_OF_WORDS:
        seeds = (7, 8)[: 1 + one.stochastic]
        kind = CorruptionKind(**type(one).kind(one.settings()))
        metrics = {"f1": (0.5,) * len(seeds)}
        rows.append(CorruptionRecord(names[type(one)], str(one), one.settings(), seeds, metrics, kind=kind))
    clean = CorruptionRecord("none", "no corruption", {}, (7,), {"f1": (0.9,)})
    data = EvaluationData("dev set.tsv", split="[:40]", rows=40)
    told = {"column": ["text=a b", "label=c"], "trust_remote_code": True, "dtype": "bfloat16", "device_map": {"": 0}}
    said = {"evaluated_on": data, "task": "text-classification", "flags": told}
    probe = {
        group: EvaluationRecord("a/model", {"target_modules": [target]}, 1, clean, tuple(rows), **said)
        for group, target in targets.items()
    }
    measured = SweepRecord(probe, "", 2, 7, grouping) if grouping else probe
    text, markdown = write(RobustnessReport(measured, "f1"), tmp_path)
    [command] = [html.unescape(line) for line in re.findall("<pre><code>(.*?)</code></pre>", text)]
    assert command in markdown
    assert text.count(str(CORRUPTIONS_OF_WORDS[-1])) == markdown.count(str(CORRUPTIONS_OF_WORDS[-1])) == 0, "said once"
    assert "dev set.tsv" in text[text.index("</h1>") : text.index("<h2")], "the data are named first"
    program, *words = shlex.split(command)
    found = build_parser().parse_args(words)
    assert (program, words[0]) == ("hf-parcor", "probe" if len(targets) > 1 or grouping else "evaluate")
    assert (found.model, found.dataset, found.limit, found.task) == ("a/model", data.name, 40, said["task"])
    assert (found.trials, found.seed, found.metric) == (2, 7, "f1")
    assert found.told == told
    assert found.target_modules == (None if grouping else list(targets))
    assert getattr(found, "group", None) == (grouping or None)
    assert sorted(map(str, read_corruptions(found.corruptions))) == sorted(map(str, CORRUPTIONS_OF_WORDS))
    held_out = replace(data, split="held out: 4 of 40 rows")
    beyond_words = [
        replace(
            rows[0],
            corruption=names[type(one)],
            settings=one.settings(),
            kind=CorruptionKind(**type(one).kind(one.settings())),
        )
        for one in (BitFlips(count=3), WorstBitFlips(3, batches=None))
    ]
    unnamed_ones = (
        {"evaluated_on": None},
        {"target": {"layers": [1]}},
        {"evaluated_on": held_out},
        *({"corruptions": (row,)} for row in beyond_words),
    )
    for unnamed in unnamed_ones:
        other = {group: replace(record, **unnamed) for group, record in probe.items()}
        assert "<pre>" not in write(RobustnessReport(other, "f1"), tmp_path)[0]


def test_the_strongest_column_is_last_and_names_are_short(record_of, tmp_path):
    """So that a phone shows it; what was cut from the names is said above."""
    layers = [f"bert.encoder.layer.{place}" for place in range(3)]
    probe = {layer: record_of({5.0: 0.1, 0.5: 0.7, 0.1: 0.8, 1.0: 0.6}, target=[layer]) for layer in layers}
    text, markdown = write(RobustnessReport(probe), tmp_path)
    heat = [[cell.strip() for cell in row] for row in tables_of(markdown)[0]]
    assert heat[0] == ["group", "clean", "0.1", "0.5", "1", "5"]
    assert [row[0] for row in heat[2:]] == ["layer.0", "layer.1", "layer.2"]
    assert "radius ε; each group is in bert.encoder" in text
    assert "scroll sideways" not in text[: text.index("Curves<")]
    many = {layer: record_of({0.01 * place: 0.5 for place in range(1, 13)}, target=[layer]) for layer in layers}
    text, _ = write(RobustnessReport(many), tmp_path)
    assert "scroll sideways" in text[: text.index("Curves<")]


WEIGHTS = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in range(32) for kind in "qkvo"]
# By the name of a recipe its bits, what it was chosen by, and the accuracy.
RECIPES = {
    "recipe": (4.5078125, "divergence", 0.8),
    "8-bit quantization per channel": (8.0078125, "", 0.88),
    "4-bit quantization per channel": (4.0078125, "", 0.5),
    "4.51 bits": (4.51, "divergence", 0.79),
    "by fisher": (4.5078125, "fisher", 0.7),
    "8-bit quantization": (8.0078125, "", 0.89),
}


def record_of_recipes(recipes, weights=WEIGHTS):
    rows = []
    for name, (bits, by, accuracy) in recipes.items():
        settings = {"name": name, "bits": bits, "by": by, "formats": dict.fromkeys(weights, "4-bit quantization")}
        kind = CorruptionKind(**MixedQuantization.kind(settings))
        rows.append(CorruptionRecord("MixedQuantization", name, settings, (0,), {"accuracy": (accuracy,)}, kind=kind))
    clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,)})
    return EvaluationRecord("org/model", {"target_modules": list(weights)}, 10, clean, tuple(rows))


@pytest.mark.slow
def test_recipes_are_one_curve_over_bits_that_names_no_weight_but_the_first(tmp_path):
    """The settings of a recipe, and what it is applied to, have an entry for each weight of a model."""
    record = record_of_recipes(RECIPES)
    report = RobustnessReport(record)
    text, markdown = write(report, tmp_path)
    assert "50.0 % at 4-bit quantization per channel (4.01 bits)." in " ".join(str(report).split())
    assert Page(text).tags.count("svg") == 1
    told = markdown[: markdown.index("## Settings")]
    assert f"{WEIGHTS[0]} and 127 others" in told
    assert [name for name in WEIGHTS[1:] if name in told or name in str(report)] == []
    heat, summary, every = (
        [[cell.strip() for cell in row] for row in table[2:]] for table in tables_of(markdown.replace("\\_", "_"))[:3]
    )
    assert [cell for row in heat for cell in row[2:]] == ["88.0", "89.0", "80.0", "79.0", "70.0", "50.0"]
    assert len(summary) == 1
    assert [row[1].removeprefix("mixed quantization, ") for row in every[1:]] == [
        "8-bit quantization per channel (8.01 bits)",
        "8-bit quantization (8.01 bits)",
        "recipe (4.51 bits)",
        "4.51 bits",
        "by fisher (4.51 bits)",
        "4-bit quantization per channel (4.01 bits)",
    ]
    [panel] = plot_comparison({"": record}).axes
    assert [*panel.containers[0].lines[0].get_xdata()] == sorted(round(bits, 2) for bits, _, _ in RECIPES.values())


def test_recipes_of_two_models_are_compared_whatever_their_weights_are_called():
    others = {name: (bits, by, accuracy - 0.1) for name, (bits, by, accuracy) in RECIPES.items()}
    models = {"one": record_of_recipes(RECIPES), "two": record_of_recipes(others)}
    said = str(RobustnessReport.compare(models))
    assert "10.0 points" in " ".join(said.split())
    assert "self_attn.k_proj" not in said


@pytest.mark.parametrize(("count", "said"), [(1, "a.0"), (4, "a.0, a.1, a.2, a.3"), (5, "a.0 and 4 others")])
def test_many_targets_are_the_first_and_their_number(record_of, count, said):
    record = record_of({0.1: 0.5}, target=[f"a.{place}" for place in range(count)])
    assert f"with {said} corrupted" in " ".join(str(RobustnessReport(record)).split())
