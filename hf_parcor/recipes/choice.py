"""The best formats under a budget: an integer program with one choice a group, solved exactly."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from hf_parcor.arguments import check_finite, check_positive
from hf_parcor.records.recipe import Choice, RecipeRecord
from hf_parcor.records.sensitivity import DIVERGENCE, FISHER, FormatScore, SensitivityRecord
from hf_parcor.statistics import exact_sum, scipy_module

if TYPE_CHECKING:
    import numpy as np

_FLOAT32 = 32.0  # bits a weight
_LARGEST = 1e4  # what numbers are scaled to, for the solver
_SEEN = 100  # so many times a solution the largest number may be, and the solver sees a 10^-8 of the solution


class BudgetError(ValueError):
    """No choice of formats meets a budget; `nearest` is the nearest budget that can be met."""

    def __init__(self, message: str, nearest: float) -> None:
        super().__init__(message)
        self.nearest = nearest


def recipe(
    scores: SensitivityRecord,
    *,
    bits: float | None = None,
    loss: float | None = None,
    drop: float | None = None,
    by: str | None = None,
    formats: Collection[str] | None = None,
    keep: bool = True,
) -> RecipeRecord:
    """Choose a format for every group under a budget, so that the sum of their costs is smallest.

    ::

        min Σ_g c(g, f_g)    such that    Σ_g n_g b(g, f_g) <= bits Σ_g n_g

    where c is the cost of a group by itself (`SensitivityRecord.costs`; a gain is chance and counts as no cost), n its
    number of weights, and b its bits a weight, scales included. Of several choices that cost equally little, such as
    several gains, the one with the smallest sum of Fisher scores is taken. With `loss` or `drop`, the recipe with the
    fewest bits whose costs add up to at most that is chosen, and among equally small ones the cheapest. That costs add
    up is an assumption: measure the chosen recipe as a whole (`measure_recipes`). If only its scales keep a format out
    of a budget of bits, the record's notes say so, and what to do. The program is solved exactly, by SciPy's `milp`.

    Args:
        scores: What `sensitivity` found.
        bits: The most bits a weight, on average over all groups.
        loss: How much the mean loss may rise, in its own units.
        drop: How much worse the metric `by`, or the record's own, may be, in its own units: 0.01 of an accuracy is one
            point.
        by: The metric or score, by its name, that costs are measured in. By default, the divergence of the answers,
            which chance does not lower, if it was measured; else the loss, else the record's metric, else the Fisher
            score. With `loss`, the loss, else the Fisher score. With `drop`, the record's metric.
        formats: Labels of the formats to choose from, or a single label. By default, all.
        keep: Whether a group may stay as it is, with its current bits.

    Raises:
        BudgetError: No choice meets the budget; the message gives the nearest budget that can be met. A `ValueError`.
        ValueError: Not exactly one of `bits`, `loss` and `drop` is given; something is unknown or was not measured; or
            a group can neither be quantized nor stay as it is.
        ImportError: SciPy is not installed.

    Examples:
        >>> from hf_parcor.records import FormatScore, WeightGroup
        >>> groups = {"a": WeightGroup({"a.weight": 100}, 32.0), "b": WeightGroup({"b.weight": 100}, 32.0)}
        >>> fisher = {("a", "8 bits"): 0.1, ("a", "4 bits"): 3.0, ("b", "8 bits"): 0.2, ("b", "4 bits"): 0.5}
        >>> cells = tuple(FormatScore(g, f, float(f[0]), {"fisher": s}) for (g, f), s in fisher.items())
        >>> scores = SensitivityRecord("m", groups, {"8 bits": {}, "4 bits": {}}, cells, {"loss": 1.0}, "loss")
        >>> chosen = recipe(scores, bits=6.0)
        >>> {name: one.format for name, one in chosen.choice.items()}, chosen.bits, chosen.expected["fisher"]
        ({'a': '8 bits', 'b': '4 bits'}, 6.0, 0.6)
        >>> recipe(scores, bits=3.0)
        Traceback (most recent call last):
        hf_parcor.recipes.choice.BudgetError: bits: expected 4 or more, the fewest that these formats take, got 3; ...
    """
    given = {name: value for name, value in (("bits", bits), ("loss", loss), ("drop", drop)) if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"bits, loss, drop: expected one of them, got {' and '.join(given) or 'none'}; write recipe(scores, "
            "bits=4.5), say"
        )
    ((name, limit),) = given.items()
    limit = check_positive(name, limit) if name == "bits" else check_finite(name, limit)
    formats = _labels(formats)
    by = _costing(scores, name, by)
    choices = _choices(scores, scores.costs(by), formats, keep)
    problem = _Problem(choices, [scores.groups[group].parameters for group in choices], _risks(scores, choices))
    notes = _of_scales(scores, formats, limit) if name == "bits" else ()
    notes += tuple(_of_broken(scores, formats))
    if scores.unused:
        notes += (scores.said_of_unused,)
    with _saying(notes if name == "bits" or not keep else ()):
        chosen = problem.cheapest(limit) if name == "bits" else problem.smallest(limit, name, keep=keep)
    choice = {group: one for group, (one, _) in zip(choices, chosen, strict=True)}
    return replace(_record(scores, by, {name: limit}, choice), notes=notes)


def check_bits(scores: SensitivityRecord, bits: float, *, keep: bool = True) -> None:
    """Check that a budget of bits can be met, whatever the formats cost.

    Args:
        scores: A record, for example from `unscored`; only groups and bits are used.
        bits: As in `recipe`.
        keep: As in `recipe`.

    Raises:
        BudgetError: As in `recipe`. A `ValueError`.
        ValueError: As in `recipe`.
    """
    limit = check_positive("bits", bits)
    choices = _choices(scores, dict.fromkeys(scores.by_place, 0.0), None, keep)
    with _saying(_of_scales(scores, None, limit)):
        _Problem(choices, [scores.groups[group].parameters for group in choices]).check_bits(limit)


@contextmanager
def _saying(notes: Collection[str]) -> Iterator[None]:
    """Let a budget that cannot be met say more."""
    try:
        yield
    except BudgetError as error:
        if not notes:
            raise
        raise BudgetError(". ".join([str(error), *notes]).removesuffix("."), error.nearest) from error


def _labels(formats: Collection[str] | None) -> Collection[str] | None:
    """Return the labels that are meant; one alone is no collection of letters."""
    return [formats] if isinstance(formats, str) else formats


def _of_scales(scores: SensitivityRecord, formats: Collection[str] | None, bits: float) -> tuple[str, ...]:
    """Return a sentence on the format of most bits that would be within a budget, if it were not for its scales."""
    by_scales: dict[int, list[tuple[float, str, dict[str, FormatScore]]]] = {}
    for label, described in scores.formats.items():
        codes = described.get("settings", {}).get("bits")
        cells = {group: cell for (group, other), cell in scores.by_place.items() if other == label}
        if codes is None or not cells or (formats is not None and label not in formats):
            continue
        sizes = {group: scores.groups[group].parameters for group in cells}
        stored = math.fsum(cell.bits * sizes[group] for group, cell in cells.items()) / sum(sizes.values())
        by_scales.setdefault(codes, []).append((stored, label, cells))
    within = [codes for codes in by_scales if codes <= _at_most(bits)]
    if not within:
        return ()
    codes = max(within)
    stored, label, cells = min(by_scales[codes], key=lambda one: one[0])
    if stored <= _at_most(bits):
        return ()
    settings = scores.formats[label]["settings"]
    ways = []
    if all(scores.groups[group].bits == _FLOAT32 for group in cells):
        halved = f" ({codes + (stored - codes) / 2:.3g} bits)" if settings.get("symmetric", True) else ""
        ways.append(f"load the model in bfloat16, whose scales take half{halved}: dtype=, or --dtype bfloat16")
    if isinstance(settings.get("per"), int):
        ways.append(
            f"score {codes} bits with a scale a channel: Quantization({codes}, 'channel', code_range='full', "
            "arithmetic='weight'), or "
            f"--corruptions quantization={codes}:per=channel,code-range=full,arithmetic=weight"
        )
    ways.append(f"ask for bits={math.ceil(100 * stored - 1e-9) / 100:g}")
    return (
        f"{label} takes {stored:.3g} bits a weight here, {stored - codes:.2g} of them for scales in the dtype of the "
        f"weights, so it is not within {bits:g} for all parts; if it should be, {'; or '.join(ways)}.",
    )


def _of_broken(scores: SensitivityRecord, formats: Collection[str] | None) -> Iterator[str]:
    """Yield a sentence on each format that breaks the model in some parts."""
    for label in scores.formats:
        broken = {
            cell.group: names
            for cell in scores.cells
            if cell.format == label and (formats is None or label in formats) and (names := scores.breaks(cell))
        }
        if broken:
            first = next(iter(broken))
            parts = first if len(broken) == 1 else f"each of {len(broken)} parts such as {first}"
            yield (
                f"{label} breaks the model in {parts}, where {' and '.join(broken[first])} came out as "
                f"{scores.by_place[first, label].measured[broken[first][0]]:g}: it is never chosen there."
            )


def front(
    scores: SensitivityRecord,
    chosen: RecipeRecord,
    *,
    points: int = 6,
    formats: Collection[str] | None = None,
    keep: bool = True,
) -> dict[str, RecipeRecord]:
    """Return a recipe and those to compare it with, by name.

    These are the recipe itself; one format for all groups, for each format; the recipes chosen in the same way at
    other budgets, evenly spaced from the smallest format to the largest; and those chosen at the same bits by each
    score.

    Args:
        scores: The record that the recipe was chosen from.
        chosen: The recipe.
        points: The number of other budgets.
        formats: As in `recipe`.
        keep: As in `recipe`.
    """
    formats = _labels(formats)
    labels = [label for label in scores.formats if formats is None or label in formats]
    found = {"recipe": chosen}
    for label in labels:
        if any((group, label) in scores.by_place for group in scores.groups):
            found[label] = uniform_recipe(scores, label)
    ends = [one.bits for name, one in found.items() if name != "recipe"]
    for place in range(points if ends else 0):
        budget = min(ends) + (max(ends) - min(ends)) * place / max(points - 1, 1)
        try:
            one = recipe(scores, bits=budget, by=chosen.by, formats=formats, keep=keep)
        except BudgetError:  # a format that does not fit all groups, or breaks some
            continue
        if all(one.choice != other.choice for other in found.values() if other.budget):
            found[f"{budget:.3g} bits"] = one
    for score in scores.scores:
        if score != chosen.by:
            with suppress(ValueError):  # a score that is not finite leaves too little to choose from
                found[f"by {score}"] = recipe(scores, bits=chosen.bits, by=score, formats=formats, keep=keep)
    return found


def uniform_recipe(scores: SensitivityRecord, label: str) -> RecipeRecord:
    """Return the recipe with one format for all groups that it fits; the others stay as they are.

    Raises:
        ValueError: There is no such format, or it fits no group.

    Examples:
        >>> from hf_parcor.records import FormatScore, WeightGroup
        >>> groups = {"a": WeightGroup({"a.weight": 100}, 32.0), "b": WeightGroup({"b.weight": 300}, 32.0)}
        >>> cells = (FormatScore("a", "4 bits", 4.0, {"fisher": 0.1}),)
        >>> uniform_recipe(SensitivityRecord("m", groups, {"4 bits": {}}, cells, {"loss": 1.0}, "loss"), "4 bits").bits
        25.0
    """
    fits = {group: scores.by_place.get((group, label)) for group in scores.groups}
    if not any(fits.values()):
        raise ValueError(f"format: expected one of {', '.join(scores.formats)} that fits a group, got {label!r}")
    chosen = {
        group: Choice(None, scores.groups[group].bits) if cell is None else Choice(label, cell.bits)
        for group, cell in fits.items()
    }
    return _record(scores, _costing(scores, "bits", None), {}, chosen)


def measured_metrics(scores: SensitivityRecord) -> list[str]:
    """Return the metrics that at least one cell has, and that are finite for the unchanged model."""
    found = dict.fromkeys(name for cell in scores.cells for name in cell.measured)
    return [name for name in found if math.isfinite(scores.clean.get(name, math.nan))]


def _costing(scores: SensitivityRecord, budget: str, by: str | None) -> str:
    measured = measured_metrics(scores)
    if by is None and budget == "drop":
        by = scores.metric
    if by is None:
        known = (DIVERGENCE,) * (budget == "bits") + ("loss", "eval_loss")
        by = next((name for name in known if name in measured), None)
    if by is None:
        by = scores.metric if budget == "bits" and scores.metric in measured else FISHER
    if budget == "drop" and by in scores.scores:
        raise ValueError(f"by: expected a metric for drop=, got the score {by!r}; give a budget of loss= by scores")
    return by


def _choices(
    scores: SensitivityRecord,
    costs: Mapping[tuple[str, str], float],
    formats: Collection[str] | None,
    keep: bool,
) -> dict[str, list[tuple[Choice, float]]]:
    """Return what each group may get, and its cost; what breaks the model is no choice, whatever the costs are."""
    unknown = [label for label in formats or () if label not in scores.formats]
    if unknown:
        raise ValueError(
            f"formats: expected some of {', '.join(scores.formats)}, got {', '.join(unknown)}; name labels of the "
            "record"
        )
    found: dict[str, list[tuple[Choice, float]]] = {}
    for group, weights in scores.groups.items():
        found[group] = [
            (Choice(label, scores.by_place[group, label].bits), max(0.0, costs[group, label]))
            for label in scores.formats
            if (formats is None or label in formats)
            and math.isfinite(costs.get((group, label), math.nan))
            and not scores.breaks(scores.by_place[group, label])
        ]
        if keep:
            found[group].append((Choice(None, weights.bits), 0.0))
        if not found[group]:
            raise ValueError(
                f"formats: expected one that fits {group!r} and does not break the model, got none; pass keep=True, "
                "or another format"
            )
    return found


def _risks(scores: SensitivityRecord, choices: Mapping[str, Sequence[tuple[Choice, float]]]) -> list[float]:
    """Return the Fisher score of each choice, 0 of a group that stays as it is; nothing if one is not finite."""
    found = [
        0.0 if one.format is None else scores.by_place[group, one.format].scores.get(FISHER, 0.0)
        for group, of_group in choices.items()
        for one, _ in of_group
    ]
    return found if all(map(math.isfinite, found)) else []


class _Problem:
    """One choice a group: bits and costs of each, and the program over them.

    Args:
        choices: What each group may get, and its cost.
        parameters: How many weights each group has.
        risks: What decides between choices that cost the same, a number for each of all choices; empty for nothing.
    """

    def __init__(
        self,
        choices: Mapping[str, Sequence[tuple[Choice, float]]],
        parameters: Sequence[int],
        risks: Sequence[float] = (),
    ) -> None:
        self._groups = list(choices.values())
        self._total = sum(parameters)
        self._flat = [(place, one) for place, group in enumerate(self._groups) for one in group]
        self._places = [place for place, _ in self._flat]
        self._bits = [one.bits * parameters[place] for place, (one, _) in self._flat]
        self._costs = [cost for _, (_, cost) in self._flat]
        self._risks = risks

    def check_bits(self, bits: float) -> None:
        """Refuse average bits a weight that no choice takes."""
        fewest = sum(min(self._of(place, self._bits)) for place in range(len(self._groups)))
        if fewest > _at_most(bits * self._total):
            nearest = fewest / self._total
            raise BudgetError(
                f"bits: expected {_from_above(nearest)} or more, the fewest that these formats take, got {bits:g}; "
                "raise it, or score smaller formats too (formats=)",
                nearest,
            )

    def cheapest(self, bits: float) -> list[tuple[Choice, float]]:
        """Return what costs least within average bits a weight, and of that what risks least."""
        self.check_bits(bits)
        room = (self._bits, bits * self._total)
        found = self._solved(self._costs, room)
        if not self._risks or self._risks == self._costs:
            return found
        return self._solved(self._risks, room, (self._costs, math.fsum(cost for _, cost in found)))

    def smallest(self, cost: float, name: str, *, keep: bool) -> list[tuple[Choice, float]]:
        """Return what takes the fewest bits within a cost, and of these what costs least."""
        least = sum(min(self._of(place, self._costs)) for place in range(len(self._groups)))
        if least > _at_most(cost):
            raise BudgetError(
                f"{name}: expected {_from_above(least)} or more, the least that these formats cost, got {cost:g}; "
                "raise it" + ("" if keep else ", or pass keep=True"),
                least,
            )
        within = (self._costs, cost)
        found = self._solved(self._bits, within)
        fewest = sum(self._bits[index] for index in self._indices(found))
        return self._solved(self._costs, (self._bits, fewest), within)

    def _of(self, group: int, numbers: Sequence[float]) -> list[float]:
        return [number for number, (place, _) in zip(numbers, self._flat, strict=True) if place == group]

    def _indices(self, chosen: Sequence[tuple[Choice, float]]) -> list[int]:
        return [self._flat.index((place, one)) for place, one in enumerate(chosen)]

    def _solved(
        self, objective: Sequence[float], *limits: tuple[Sequence[float], float]
    ) -> list[tuple[Choice, float]]:
        """Return the choice of the least objective that takes no more than each limit.

        The solver's tolerances are absolute, about 1e-6: numbers are scaled to a largest of 10,000, and a solution
        that the exact sums refuse is cut off. What can be in no solution is left out, so that a part that costs far
        more than all others does not make their differences too small to see.
        """
        import numpy as np

        aims, _ = self._above_least(objective)
        rooms = []
        for taken, limit in limits:
            sizes, least = self._above_least(taken)
            rooms.append((sizes, _at_most(limit) - least))
        refused: list[list[int]] = []
        possible = np.flatnonzero(np.all([sizes <= room for sizes, room in rooms], axis=0))
        while True:
            chosen = self._solution(possible, aims, rooms, refused)
            if any(math.fsum(taken[one] for one in chosen) > _at_most(limit) for taken, limit in limits):
                refused.append(chosen)
                continue
            found = math.fsum(aims[chosen])
            if not found or aims[possible].max() <= _SEEN * found:
                return [self._flat[one][1] for one in chosen]
            possible = possible[aims[possible] <= found]  # any other aims at more by itself

    def _above_least(self, numbers: Sequence[float]) -> tuple[np.ndarray, float]:
        """Return how much larger each number is than the least one of its group, and the sum of the least ones."""
        import numpy as np

        least = np.full(len(self._groups), np.inf)
        np.minimum.at(least, self._places, numbers)
        return np.asarray(numbers, float) - least[self._places], math.fsum(least)

    def _solution(
        self,
        possible: np.ndarray,
        aims: np.ndarray,
        rooms: Sequence[tuple[np.ndarray, float]],
        refused: Sequence[Sequence[int]],
    ) -> list[int]:
        """Return the places of what the solver chooses of those that are possible, one a group."""
        import numpy as np

        optimize = scipy_module("optimize", "choosing formats")
        places = np.asarray(self._places)[possible]
        one_each = (places[None, :] == np.arange(len(self._groups))[:, None]).astype(float)
        units = [(sizes[possible].max() or 1.0) / _LARGEST for sizes, _ in rooms]
        rows = [
            optimize.LinearConstraint(one_each, 1, 1),
            *(
                optimize.LinearConstraint(sizes[None, possible] / unit, -np.inf, room / unit)
                for (sizes, room), unit in zip(rooms, units, strict=True)
            ),
            *(
                optimize.LinearConstraint(np.isin(possible, one)[None, :].astype(float), -np.inf, len(one) - 1)
                for one in refused
            ),
        ]
        with _unheard():
            result = optimize.milp(
                _LARGEST * aims[possible] / (aims[possible].max() or 1.0),
                integrality=np.ones(len(possible)),
                bounds=optimize.Bounds(0, 1),
                constraints=rows,
                options={"mip_rel_gap": 0.0},
            )
        if result.x is None:
            raise RuntimeError(f"milp: expected a solution, got none: {result.message}")
        return [int(one) for one in possible[result.x > 0.5]]


@contextmanager
def _unheard() -> Iterator[None]:
    """Lose what compiled code prints: HiGHS at times has a line for the standard output, which may be for JSON."""
    try:
        printed, kept = ctypes.CDLL(None), os.dup(1)
    except (OSError, TypeError):  # there is no such output, or, on Windows, no such library
        yield
        return
    try:
        printed.fflush(None)
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        printed.fflush(None)  # what is printed is in a buffer of C's own
        os.dup2(kept, 1)
        os.close(kept)


def _at_most(limit: float) -> float:
    """Return a limit with room for the rounding of sums."""
    return limit + 1e-9 * abs(limit)


def _from_above(number: float) -> str:
    """Return a number with six digits that count, none below it, so that a budget of what is said is met.

    Examples:
        >>> _from_above(4.0), _from_above(128 / 17)
        ('4', '7.52942')
        >>> _from_above(4.2)
        '4.2'
    """
    if not number:
        return "0"
    exact = Decimal(number - 1e-10 * abs(number))  # budgets have more room than that
    return f"{float(exact.quantize(Decimal(1).scaleb(exact.adjusted() - 5), ROUND_CEILING)):g}"


def _record(
    scores: SensitivityRecord, by: str, budget: Mapping[str, float], choice: Mapping[str, Choice]
) -> RecipeRecord:
    cells = [scores.by_place[group, one.format] for group, one in choice.items() if one.format is not None]
    sums = {}
    for name in dict.fromkeys([by, *measured_metrics(scores)]):
        costs = scores.costs(name)
        sums[name] = exact_sum([costs[cell.group, cell.format] for cell in cells])
    reference = by if by in scores.clean else scores.metric
    record = RecipeRecord(
        model=scores.model,
        groups=scores.groups,
        formats=scores.formats,
        choice=choice,
        budget=dict(budget),
        by=by,
        expected=sums,
        estimated=sum(reference not in cell.measured for cell in cells),
        outside=scores.outside,
        loaded_part=scores.loaded_part,
        kept_in_float=scores.kept_in_float,
    )
    of_base = {cell.group: cell.bits for cell in scores.cells if cell.format == record.base}
    return replace(record, bits_of_base=of_base)
