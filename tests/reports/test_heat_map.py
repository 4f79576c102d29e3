"""What stands in the cells of a heat map is what stands in the records, and the darker cell has lost more."""

import math
from dataclasses import replace

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from hf_parcor import CorruptionRecord, EvaluationRecord, FloatQuantization, MetricInfo, SweepRecord
from hf_parcor.reports.plots import plot_directions, plot_heat_map

LAYERS = ("bert.encoder.layer.0", "bert.encoder.layer.1", "bert.encoder.layer.10")


def row(corruption, settings, value, metric="accuracy"):
    label = f"{corruption} {settings}"
    return CorruptionRecord(corruption, label, settings, (0, 1), {metric: (value - 0.01, value + 0.01)})


def record(values, metric="accuracy", corruption="gradient", clean=0.9, norm=2.0):
    rows = [row(corruption, {"p": norm, "epsilon": e, "top_n": None}, value, metric) for e, value in values.items()]
    first = CorruptionRecord("none", "no corruption", {}, (0,), {metric: (clean,)})
    return EvaluationRecord("m", {}, 1, first, tuple(rows))


def sweep(values, **options):
    return SweepRecord({group: record(of_group, **options) for group, of_group in values.items()}, "", 2, 0)


PLAIN = sweep({group: {1.0: 0.8 - 0.1 * at, 0.1: 0.85, 10.0: 0.4} for at, group in enumerate(LAYERS)})
DEFENDED = sweep({group: {0.1: 0.9, 1.0: 0.85} for group in LAYERS})


def cells_of(axis):
    return {(round(text.get_position()[0]), round(text.get_position()[1])): text for text in axis.texts}


class TestHeatMap:
    def test_every_cell_is_in_the_records(self):
        figure = plot_heat_map({"plain": PLAIN, "defended": DEFENDED})
        plain, defended = figure.axes[:2]
        assert [plain.get_title(), defended.get_title()] == [
            "gradient-based, L2: plain",
            "gradient-based, L2: defended",
        ]
        assert [tick.get_text() for tick in plain.get_xticklabels()] == ["0.1", "1", "10"]
        assert [tick.get_text() for tick in plain.get_yticklabels()] == ["layer.0", "layer.1", "layer.10"]
        shown = {place: text.get_text() for place, text in cells_of(plain).items()}
        assert shown == {
            **{(0, at): "85.0" for at in range(3)},
            **{(1, at): f"{80 - 10 * at:.1f}" for at in range(3)},
            **{(2, at): "40.0" for at in range(3)},
        }
        assert {text.get_text() for place, text in cells_of(defended).items() if place[0] == 2} == {"–"}
        assert {to_rgb(text.get_color()) for text in defended.texts} == {(0, 0, 0)}, "where no colour is, too"
        assert plain.images[0].get_clim() == defended.images[0].get_clim() == pytest.approx((0, 50))
        assert figure.axes[-1].get_ylabel() == "drop of the accuracy (points)"

    @pytest.mark.parametrize("greater_is_better", [True, False])
    def test_the_darker_the_more_is_lost(self, greater_is_better):
        values = (0.8, 0.6, 0.2) if greater_is_better else (1.0, 1.4, 9.0)
        probe = sweep({"a": dict(zip((0.1, 1.0, 2.0), values, strict=True))}, metric="x")
        figure = plot_heat_map({"": probe}, "x", greater_is_better=greater_is_better)
        [image] = figure.axes[0].images
        colors = image.cmap(image.norm(image.get_array()))[0]
        brightness = [sum(color[:3]) for color in colors]
        assert brightness == sorted(brightness, reverse=True)
        for place, text in cells_of(figure.axes[0]).items():
            assert abs(sum(to_rgb(text.get_color())) - brightness[place[0]]) > 0.9, "text can be read"
        assert [text.get_text() for text in figure.axes[0].texts] == [f"{value:.3g}" for value in values]

    @pytest.mark.parametrize(
        ("info", "scale", "cell"),
        [
            (MetricInfo(True, "share"), "drop of the x (points)", "90.2"),
            (MetricInfo(True, "points"), "drop of the x (points)", "0.90"),
            (MetricInfo(False, "nats"), "rise of the x (nats)", "0.902"),
            (MetricInfo(False), "rise of the x", "0.902"),
        ],
    )
    def test_direction_and_unit_are_those_of_the_record(self, info, scale, cell):
        probe = sweep({"a": {1.0: 0.902}}, metric="x")
        stated = replace(probe, records={"a": replace(probe.records["a"], metric_info={"x": info})})
        given = {"greater_is_better": info.greater_is_better, "unit": info.unit}
        for figure in (plot_heat_map({"": stated}, "x"), plot_heat_map({"": probe}, "x", **given)):
            assert figure.axes[-1].get_ylabel() == scale
            assert [text.get_text() for text in figure.axes[0].texts] == [cell]

    def test_kinds_of_corruption_have_a_row_each(self):
        bits = [row("quantization", {"bits": bits}, 0.5 + bits / 100) for bits in (2, 8, 4)]
        own = [row("mine", {}, 0.7)]
        first = record({0.1: 0.8})
        probe = SweepRecord(
            {"a": EvaluationRecord("m", {}, 1, first.clean, (*first.corruptions, *bits, *own))}, "", 2, 0
        )
        figure = plot_heat_map({"": probe}, title="Of all kinds")
        titles = [axis.get_title() for axis in figure.axes[:3]]
        assert titles == ["gradient-based, L2", "quantization", "mine"]
        assert [tick.get_text() for tick in figure.axes[1].get_xticklabels()] == ["8", "4", "2"]
        assert figure._suptitle.get_text() == "Of all kinds"

    def test_names_of_formats_do_not_run_into_each_other(self):
        formats = [(FloatQuantization("nf4", 64), 0.8), (FloatQuantization("fp8_e4m3", "channel"), 0.7)]
        rows = tuple(
            replace(row("float_quantization", one.settings(), value), label=str(one)) for one, value in formats
        )
        probe = SweepRecord({"a": EvaluationRecord("m", {}, 1, record({}).clean, rows)}, "", 2, 0)
        figure = plot_heat_map({"": probe})
        FigureCanvasAgg(figure).draw()
        labels = figure.axes[0].get_xticklabels()
        assert [label.get_text() for label in labels] == [str(one) for one, _ in formats]
        assert all(label.get_rotation() and label.get_ha() == "right" for label in labels)

    def test_a_kind_under_which_nothing_changes_has_no_panels(self):
        first = record({0.1: 0.8})
        flat = tuple(row("random", {"p": 2.0, "epsilon": e, "top_n": None}, 0.9) for e in (0.1, 1.0))

        def probe(*corruptions):
            return {"": SweepRecord({"a": EvaluationRecord("m", {}, 1, first.clean, corruptions)}, "", 2, 0)}

        assert [axis.get_title() for axis in plot_heat_map(probe(*flat, *first.corruptions)).axes[:-1]] == [
            "gradient-based, L2"
        ]
        assert [axis.get_title() for axis in plot_heat_map(probe(*flat)).axes[:-1]] == ["random, L2"], "nothing else"

    def test_broken_values_and_names_are_drawn(self):
        probe = sweep({"$a$": {0.1: math.nan, 1.0: -math.inf}, "_b": {0.1: 0.9, 1.0: 0.95}})
        figure = plot_heat_map({"$m$": probe})
        FigureCanvasAgg(figure).draw()
        assert [text.get_text() for text in figure.axes[0].texts] == ["nan", "−∞", "90.0", "95.0"]
        cells = figure.axes[0].images[0].get_array()
        assert float(cells[0, 1]) == float(cells.max()), "an infinite drop is as dark as the largest"
        assert cells.mask.tolist() == [[True, False], [False, False]]

    def test_nothing_to_draw(self):
        for sweeps in ({}, {"a": sweep({"b": {}})}):
            with pytest.raises(ValueError, match=r"sweeps: expected at least one with a corruption, got"):
                plot_heat_map(sweeps)
        with pytest.raises(ValueError, match="metric: expected one of accuracy, got 'f1'"):
            plot_heat_map({"a": PLAIN}, "f1")


class TestDirections:
    def test_every_point_is_in_the_records(self):
        of_random = record({20.0: 0.9, 2.0: 0.85}, corruption="random")
        first = record({1.0: 0.6, 0.1: 0.8})
        both = EvaluationRecord("m", {}, 1, first.clean, first.corruptions + of_random.corruptions)
        figure = plot_directions({"both": both, "one": of_random})
        panel, other = figure.axes
        assert panel.get_title() == "both"
        points = [tuple(zip(*bar.lines[0].get_data(), strict=True)) for bar in panel.containers]
        assert points == [((0.1, 0.8), (1.0, 0.6)), ((2.0, 0.85), (20.0, 0.9))]
        [legend] = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["gradient-based, L2", "random, L2"]
        colors = [bar.lines[0].get_color() for bar in (*panel.containers, *other.containers)]
        assert colors[0] != colors[1] == colors[2]
        assert [line.get_ydata()[0] for line in panel.lines if line.get_linestyle() == "--"] == [0.9]

    @pytest.mark.parametrize("records", [{}, {"a": record({})}, {"a": record({0.0: 0.9})}])
    def test_nothing_to_draw(self, records):
        with pytest.raises(ValueError, match="records: expected corruptions with a radius ε in each, got none in"):
            plot_directions(records)
