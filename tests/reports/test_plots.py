"""What stands on the axes is what stands in the records."""

import itertools
import math
import sys
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
from for_each import for_each
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from hf_parcor import (
    BitFlips,
    CorruptionConstraint,
    CorruptionRecord,
    EvaluationRecord,
    FloatQuantization,
    GaussianNoise,
    GradientCorruption,
    MetricInfo,
    MultiStepCorruption,
    Quantization,
    RandomCorruption,
    SweepRecord,
    UniformNoise,
    WorstBitFlips,
)
from hf_parcor.corruptions import CORRUPTIONS
from hf_parcor.reports.plots import plot_comparison, plot_directions, plot_heat_map, shows_curves

NAMES = {kind: name for name, kind in CORRUPTIONS.items()}
EVERY_KIND = [
    *(RandomCorruption(CorruptionConstraint(epsilon=epsilon)) for epsilon in (20.0, 40.0)),
    *(GradientCorruption(CorruptionConstraint(epsilon=epsilon)) for epsilon in (0.1, 0.2, 0.5)),
    *(MultiStepCorruption(CorruptionConstraint(p=math.inf, epsilon=epsilon)) for epsilon in (2e-4, 5e-4)),
    *(GaussianNoise(std) for std in (0.01, 0.02, 0.03)),
    *(UniformNoise(bound) for bound in (0.02, 0.04)),
    *(Quantization(bits) for bits in (8, 6, 5, 4, 3, 2)),
    *(BitFlips(rate=rate) for rate in (1e-8, 1e-7, 1e-6)),
    *(WorstBitFlips(count) for count in (1, 3, 10)),
]
TITLES = [
    "random, L2",
    "gradient-based, L2",
    "multi-step, L∞",
    "Gaussian noise",
    "uniform noise",
    "quantization",
    "bit flips, any bits",
    "worst bit flips",
]


def record_of(corruptions, start=0.9, drop=0.02):
    """Return a record in which the accuracy falls from row to row, with three trials for what is stochastic."""
    rows = []
    for index, corruption in enumerate(corruptions):
        trials = 3 if corruption.stochastic else 1
        values = tuple(start - drop * (index + trial / 5) for trial in range(trials))
        name = NAMES.get(type(corruption), type(corruption).__name__)
        metrics = {"accuracy": values, "loss": tuple(10 * value for value in values)}
        rows.append(CorruptionRecord(name, str(corruption), corruption.settings(), tuple(range(trials)), metrics))
    clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (start,), "loss": (10 * start,)})
    return EvaluationRecord("m", {}, 1, clean, tuple(rows))


RECORDS = {"plain": record_of(EVERY_KIND), "defended": record_of(EVERY_KIND, 0.95, 0.01)}


def rendered(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def title_of(axis):
    return axis.get_title().replace("\N{NO-BREAK SPACE}", " ")


def axis_of(figure, title):
    return next(axis for axis in figure.axes if title_of(axis) == title)


def heights_of_bars(container):
    [bars] = container.lines[2]
    segments = [segment for segment in bars.get_segments() if len(segment)]
    return [(high - low) / 2 for (_, low), (_, high) in segments]


def visible_ticks(axis):
    return sorted((tick.get_position()[0], tick.get_text()) for tick in axis.get_xticklabels() if tick.get_text())


class TestData:
    @pytest.mark.slow
    @pytest.mark.parametrize("metric", ["accuracy", "loss"])
    def test_every_point_bar_and_line_is_in_the_records(self, metric):
        figure = plot_comparison(RECORDS, metric)
        strengths = {"epsilon", "std", "bound", "rate"}
        for title, name in zip(TITLES, dict.fromkeys(NAMES[type(one)] for one in EVERY_KIND), strict=True):
            axis = axis_of(figure, title)
            assert len(axis.containers) == len(RECORDS)
            for container, record in zip(axis.containers, RECORDS.values(), strict=True):
                rows = [row for row in record.corruptions if row.corruption == name]
                key = {"quantization": "bits", "worst_bit_flips": "count"}.get(name)
                key = key or next(iter(strengths & set(rows[0].settings)))
                points = {(row.settings[key], row.mean(metric)) for row in rows}
                assert set(zip(*container.lines[0].get_data(), strict=True)) == points
                deviations = [row.deviation(metric) for row in rows if len(row.seeds) > 1]
                assert heights_of_bars(container) == pytest.approx(deviations)
            dashed = [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--"]
            assert dashed == [record.clean.mean(metric) for record in RECORDS.values()]
        assert {axis.get_ylabel() for axis in figure.axes} == {{"accuracy": "accuracy (%)"}.get(metric, metric), ""}
        if metric == "accuracy":
            rendered(figure)
            ticks = [tick for tick in figure.axes[0].get_yticklabels() if tick.get_text()]
            assert ticks
            assert all(
                float(tick.get_text()) == pytest.approx(100 * tick.get_position()[1], rel=1e-5) for tick in ticks
            )

    def test_lines_rise_with_the_strength_whatever_the_order(self):
        figure = plot_comparison({"plain": record_of([GaussianNoise(std) for std in (0.3, 0.1, 0.2)])})
        assert figure.axes[0].containers[0].lines[0].get_xdata().tolist() == [0.1, 0.2, 0.3]

    def test_a_strength_of_zero(self):
        figure = plot_comparison({"plain": record_of([GaussianNoise(0.3), GaussianNoise(0.0), GaussianNoise(0.001)])})
        [axis] = figure.axes
        assert axis.containers[0].lines[0].get_xdata().tolist() == [0.0, 0.001, 0.3]
        assert axis.get_xscale() == "linear"

    def test_records_of_different_corruptions_are_drawn_where_they_belong(self):
        records = {"a": record_of([GaussianNoise(0.1), Quantization(4), Quantization(3)])}
        records["b"] = record_of([GaussianNoise(0.2)])
        noise, quantization = plot_comparison(records).axes
        assert [line.lines[0].get_xdata().tolist() for line in noise.containers] == [[0.1], [0.2]]
        assert [line.lines[0].get_xdata().tolist() for line in quantization.containers] == [[3.0, 4.0], []]

    def test_values_that_are_not_finite_are_left_out(self):
        record = record_of([GaussianNoise(0.1), GaussianNoise(0.2), GaussianNoise(0.3)])
        rows = [
            CorruptionRecord(row.corruption, row.label, row.settings, (0,), {"accuracy": (value,)})
            for row, value in zip(record.corruptions, (0.5, math.nan, math.inf), strict=True)
        ]
        figure = plot_comparison({"x": EvaluationRecord("m", {}, 1, record.clean, tuple(rows))})
        rendered(figure)
        assert 0.4 < figure.axes[0].get_ylim()[0] < figure.axes[0].get_ylim()[1] < 1

    def test_heights_are_those_of_the_values(self):
        """Also where they end at 0; a bar that is far longer than they lie apart ends in an arrow, inside."""
        for metric, length, arrows in (("accuracy", 0.05, 0), ("accuracy", 50, 2), ("loss", 50, 4)):
            record = record_of([GaussianNoise(0.1), GaussianNoise(0.2)], start=0.4, drop=0.0)
            rows = [
                replace(row, seeds=(0, 1), metrics={metric: (value - length, value + length)})
                for row, value in zip(record.corruptions, (0.2, 0.0), strict=True)
            ]
            clean = replace(record.clean, metrics={metric: (0.4,)})
            info = {"accuracy": MetricInfo(True, "share"), "loss": MetricInfo(False)}  # no share is below 0
            record = replace(record, clean=clean, corruptions=tuple(rows), metric_info=info)
            [axis] = plot_comparison({"x": record}, metric).axes
            low, high = axis.get_ylim()
            assert -0.5 < low < 0 < 0.4 < high < 1.1
            assert axis.get_yscale() == "linear"
            [bars] = axis.containers[0].lines[2]
            ends = [end for segment in bars.get_segments() for _, end in segment]
            assert len(ends) == 4
            assert low < min(ends) < max(ends) < high
            assert sum(len(line.get_xdata()) for line in axis.lines if line.get_marker() in ("^", "v")) == arrows

    @for_each(
        ("loss", "scale"), [((1.0, 20.0, 400.0), "log"), ((1.0, 20.0, 39.0), "linear"), ((0.0, 20.0, 40.0), "linear")]
    )
    def test_a_metric_over_decades_has_equal_steps_for_equal_ratios(self, loss, scale):
        noise = [GaussianNoise(0.1), GaussianNoise(0.2)]
        record = record_of(noise)
        rows = [
            replace(row, seeds=(0,), metrics={"loss": (value,)})
            for row, value in zip(record.corruptions, loss[1:], strict=True)
        ]
        clean = replace(record.clean, metrics={"loss": loss[:1]})
        figure = plot_comparison({"x": replace(record, clean=clean, corruptions=tuple(rows))}, "loss")
        [axis] = figure.axes
        rendered(figure)
        assert axis.get_yscale() == scale
        places = axis.transAxes.inverted().transform(axis.transData.transform([(0.1, value) for value in loss]))[:, 1]
        assert places[2] - places[1] == pytest.approx(places[1] - places[0], rel=0.1)
        assert 0 < places[0] < places[2] < 1

    def test_chance(self):
        axis, *others = plot_comparison(RECORDS, chance=0.25).axes
        assert {other.get_ylim() for other in others} == {axis.get_ylim()}
        assert [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == ":"] == [0.25]
        assert axis.get_ylim()[0] < 0.25
        assert not [line for line in plot_comparison(RECORDS).axes[0].lines if line.get_linestyle() == ":"]

    @for_each(("cleans", "grey"), [((0.9,), False), ((0.9, 0.9), True), ((0.9, 0.8), False)])
    def test_a_dashed_line_has_the_colour_of_what_it_is_of(self, cleans, grey):
        """Where all records have it, it is of none."""
        noise = [GaussianNoise(0.1), GaussianNoise(0.2)]
        [axis] = plot_comparison({f"{at}": record_of(noise, start=clean) for at, clean in enumerate(cleans)}).axes
        dashed = [line.get_color() for line in axis.lines if line.get_linestyle() == "--"]
        assert dashed == (["grey"] if grey else [line.lines[0].get_color() for line in axis.containers])


class TestPanels:
    def test_a_panel_for_each_kind_with_a_title_to_read(self):
        assert [title_of(axis) for axis in plot_comparison(RECORDS).axes] == TITLES

    def test_a_panel_that_shows_no_curve_is_left_out(self):
        """One strength, or nothing that changes: tables say it; where there is nothing else, all is drawn."""
        falls, single, flat = (
            record_of([GaussianNoise(0.1), GaussianNoise(0.2)]),
            record_of([Quantization(4)]),
            record_of([BitFlips(rate=1e-8), BitFlips(rate=1e-7)], drop=1e-6),  # no digit that is written changes
        )

        def titles(*records):
            rows = tuple(row for record in records for row in record.corruptions)
            joined = EvaluationRecord("m", {}, 1, falls.clean, rows)
            assert shows_curves(joined, "accuracy") == (falls in records)
            return [title_of(axis) for axis in plot_comparison({"x": joined}).axes]

        assert titles(single, flat, falls) == ["Gaussian noise"]
        assert titles(single, flat) == ["quantization", "bit flips, any bits"]
        moved = {"flat": flat, "moves": record_of([BitFlips(rate=1e-8), BitFlips(rate=1e-7)])}
        assert len(plot_comparison(moved).axes) == 1, "one record changes"

    @pytest.mark.slow
    @pytest.mark.parametrize("panels", range(1, 13))
    def test_no_empty_panels(self, panels):
        corruptions = [GradientCorruption(CorruptionConstraint(p=1 + i / 8, epsilon=0.1)) for i in range(panels)]
        figure = plot_comparison({"plain": record_of(corruptions)})
        assert len(figure.axes) == panels
        assert all(axis.containers for axis in figure.axes)
        columns = {round(axis.get_subplotspec().get_position(figure).x0, 3) for axis in figure.axes}
        assert len(columns) <= 4
        rows = {round(axis.get_subplotspec().get_position(figure).y0, 3) for axis in figure.axes}
        fewest = 0 if panels < 3 else min(-panels % 3, -panels % 4)
        assert len(rows) * len(columns) - panels == fewest, "few places stay empty"

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("corruption", "title", "unit", "strength"),
        [
            (GradientCorruption(CorruptionConstraint(p=1.5, epsilon=0.1)), "gradient-based, L1.5", "radius ε", 0.1),
            (RandomCorruption(CorruptionConstraint(epsilon=0.1, top_n=9)), "random, L2, n = 9", "radius ε", 0.1),
            (
                MultiStepCorruption(CorruptionConstraint(epsilon=0.1, top_n=1000), steps=10, step_size=0.01),
                "multi-step, L2, n = 1000,\nK = 10, α = 0.01",
                "radius ε",
                0.1,
            ),
            (GaussianNoise(0.1), "Gaussian noise", "standard deviation σ", 0.1),
            (UniformNoise(0.1), "uniform noise", "bound b", 0.1),
            (Quantization(4), "quantization", "bits per weight", 4),
            (BitFlips(rate=1e-7, bits="sign"), "bit flips, sign bits", "flip rate per bit", 1e-7),
            (BitFlips(count=5), "bit flips, any bits", "flipped bits", 5),
        ],
        ids=str,
    )
    def test_a_panel_with_a_single_strength(self, corruption, title, unit, strength):
        figure = plot_comparison({"plain": record_of([corruption])})
        [axis] = figure.axes
        rendered(figure)
        assert title_of(axis) == title
        assert axis.get_xlabel() == unit
        assert [float(text) for _, text in visible_ticks(axis)] == [strength]
        low, high = sorted(axis.get_xlim())
        assert low < strength < high

    def test_rates_and_counts_of_bit_flips_do_not_share_a_panel(self):
        corruptions = [BitFlips(rate=1e-7), BitFlips(rate=1e-6), BitFlips(count=3), BitFlips(count=30)]
        rates, counts = plot_comparison({"plain": record_of(corruptions)}).axes
        assert (rates.get_xlabel(), counts.get_xlabel()) == ("flip rate per bit", "flipped bits")
        assert counts.containers[0].lines[0].get_xdata().tolist() == [3, 30]

    def test_quantizers_of_different_blocks_do_not_share_a_panel(self):
        quantizers = [{}, {"per": "channel"}, {"per": 32}, {"per": 32, "symmetric": False}, {"code_range": "full"}]
        corruptions = [Quantization(bits, **settings) for settings in quantizers for bits in (4, 3)]
        corruptions += [GaussianNoise(std, to) for to in (None, "channel") for std in (0.1, 0.2)]
        axes = plot_comparison({"plain": record_of(corruptions)}).axes
        assert [title_of(axis).replace("\n", " ") for axis in axes] == [
            "quantization",
            "quantization, per channel",
            "quantization, per group of 32",
            "quantization, per group of 32, asymmetric",
            "quantization, code range = full",
            "Gaussian noise",
            "Gaussian noise, relative to channel",
        ]
        assert all(len(axis.containers[0].lines[0].get_xdata()) == 2 for axis in axes)

    def test_float_formats_are_points_of_one_panel_that_no_line_joins(self):
        formats = [FloatQuantization("fp8_e4m3"), FloatQuantization("fp8_e4m3", "channel"), FloatQuantization("nf4")]
        (axis,) = plot_comparison({"plain": record_of(formats)}).axes
        assert title_of(axis) == "float quantization"
        assert [tick.get_text() for tick in axis.get_xticklabels()] == [str(one) for one in formats]
        assert axis.containers[0].lines[0].get_linestyle() == "None"

    def test_a_corruption_outside_the_catalogue_stands_by_its_labels(self):
        rows = [
            CorruptionRecord("Prune", f"prune {share}$%", {"share": share}, (0,), {"x": (0.5,)}) for share in (9, 5)
        ]
        figure = plot_comparison({"plain": EvaluationRecord("m", {}, 1, rows[0], tuple(rows))}, "x")
        rendered(figure)
        [axis] = figure.axes
        assert axis.get_title() == "Prune"
        assert visible_ticks(axis) == [(0, "prune 9$%"), (1, "prune 5$%")]


class TestAxes:
    def test_stronger_is_to_the_right(self):
        for axis in plot_comparison(RECORDS).axes:
            assert axis.xaxis_inverted() == (title_of(axis) == "quantization")

    def test_integer_ticks_for_bits(self):
        figure = plot_comparison(RECORDS)
        assert visible_ticks(axis_of(figure, "quantization")) == [(bits, str(bits)) for bits in (2, 3, 4, 5, 6, 8)]

    @pytest.mark.parametrize(
        ("corruptions", "scale"),
        [
            ([BitFlips(rate=1e-8), BitFlips(rate=1e-7)], "log"),
            ([BitFlips(rate=0.0), BitFlips(rate=1e-7)], "linear"),
            ([GaussianNoise(std) for std in (0.1, 0.2, 0.3)], "linear"),
            ([GaussianNoise(std) for std in (0.1, 0.2, 0.4)], "log"),
            ([GaussianNoise(std) for std in (0.001, 0.002, 0.1)], "log"),
            ([GaussianNoise(std) for std in (0.01, 0.02)], "linear"),
            ([Quantization(bits) for bits in (2, 4, 8)], "linear"),
        ],
    )
    def test_a_logarithmic_axis_where_it_spreads_the_strengths_better(self, corruptions, scale):
        assert plot_comparison({"plain": record_of(corruptions)}).axes[0].get_xscale() == scale

    @pytest.mark.slow
    def test_no_labels_overlap(self):
        crowded = [
            *EVERY_KIND,
            *(GaussianNoise(std) for std in (0.001, 0.0015, 0.002, 0.0025, 0.1, 0.101)),
            *(UniformNoise(i / 1000) for i in range(1, 20)),
            MultiStepCorruption(CorruptionConstraint(epsilon=0.1, top_n=1000), steps=10, step_size=0.01),
        ]
        figure = plot_comparison({"plain": record_of(crowded)}, title="Robustness of a small BERT", chance=0.5)
        renderer = rendered(figure)
        texts = [figure._suptitle, *figure.legends[0].get_texts()]
        for axis in figure.axes:
            texts += [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.get_xticklabels()]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
        overlaps = [(a, b) for (a, first), (b, second) in itertools.combinations(boxes, 2) if first.overlaps(second)]
        assert overlaps == []
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 for _, box in boxes)


class TestNames:
    def test_legend(self):
        [legend] = plot_comparison(RECORDS, chance=0.5).legends
        assert [text.get_text() for text in legend.get_texts()] == ["plain", "defended", "no corruption", "chance"]
        [legend] = plot_comparison(RECORDS).legends
        assert len(legend.get_texts()) == 3

    def test_many_records_look_different(self):
        records = {str(index): RECORDS["plain"] for index in range(12)}
        lines = [container.lines[0] for container in plot_comparison(records).axes[0].containers]
        assert len({(to_hex(line.get_color()), line.get_marker()) for line in lines}) == 12

    @pytest.mark.slow
    def test_names_are_shown_as_they_are(self):
        no_mathematics = r"$\frac$"
        figure = plot_comparison({"_hidden": RECORDS["plain"], no_mathematics: RECORDS["plain"]}, title=no_mathematics)
        rendered(figure)
        assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["_hidden", no_mathematics]
        assert figure._suptitle.get_text() == no_mathematics


@pytest.mark.slow
def test_a_file_and_no_global_state(tmp_path):
    before = plt.get_fignums()
    path = tmp_path / "robustness.png"
    plot_comparison(RECORDS).savefig(path, dpi=20)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == before == []


class TestErrors:
    @pytest.mark.parametrize("records", [{}, {"plain": record_of([])}])
    def test_nothing_to_draw(self, records):
        with pytest.raises(
            ValueError, match=f"expected at least one with a corruption, got {len(records)} without any"
        ):
            plot_comparison(records)

    def test_an_unknown_metric(self):
        with pytest.raises(ValueError, match="expected one of accuracy, loss, got 'f1'"):
            plot_comparison(RECORDS, "f1")

    def test_records_of_two_tasks(self):
        records = {task: replace(record_of([GaussianNoise(0.1)]), task=task) for task in ("translation", "ner")}
        with pytest.raises(ValueError, match="task"):
            plot_comparison(records)

    def test_without_matplotlib(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(
            ImportError, match=r"plots need matplotlib; install it with: pip install 'hf-parcor\[plots\]'"
        ):
            plot_comparison(RECORDS)


def test_the_metric_is_the_usual_one_where_none_is_named():
    of_loss = {
        "m": replace(
            RECORDS["plain"],
            clean=replace(RECORDS["plain"].clean, metrics={"loss": (9.0,)}),
            corruptions=tuple(
                replace(row, metrics={"loss": row.metrics["loss"]}) for row in RECORDS["plain"].corruptions
            ),
        )
    }
    sweep = {"m": SweepRecord(of_loss, "", 2, 0)}
    for figure in (plot_comparison(of_loss), plot_directions(of_loss)):
        assert "loss" in {axis.get_ylabel() for axis in figure.axes}
    assert "loss" in plot_heat_map(sweep).axes[-1].get_ylabel()
