"""The record as text."""

from __future__ import annotations

import math
from typing import Any

from tabulate import tabulate

TITLE = "# Random corruptions of a language model against Theorem 1 (paper 1, Table 3)"


def table(record: dict[str, Any]) -> str:
    """Return the record as text: what was found beside what theory says."""
    first, trace = record["first_order"], record["hessian_trace"]
    rows = [
        ["mean", first["mean"], "", 0.0],
        ["standard deviation", first["standard_deviation"], "", first["theoretical_standard_deviation"]],
    ]
    rows += [
        [f"α({row['p']})", row["empirical"], f"{row['low']:.3g} to {row['high']:.3g}", row["theoretical"]]
        for row in first["quantiles"]
    ]
    rows += [
        [f"P(over {row['threshold']:.3g})", row["empirical"], "", row["theoretical"]] for row in first["probabilities"]
    ]
    header = ["first-order loss change", "found", "95 % interval", "theory"]
    real = [
        [
            f"{row['epsilon']:g}",
            row["dtype"],
            row["standard_deviation"],
            row["standard_deviation"] / row["theoretical_standard_deviation"],
            f"{row['p_value']:.2g}",
            f"{row['beyond_first_order']['mean']:.3g} ± {row['beyond_first_order']['standard_error']:.2g}",
            row["beyond_first_order"]["hutchinson"],
            row["gradient_based"],
            row["first_order_maximum"],
        ]
        for row in record["real_changes"]
    ]
    titles = ["ε", "", "sd of random", "sd / theory", "KS p", "Δ_ave found", "tr(H)ε²/2k", "gradient-based", "εG"]
    test, alone = first["kolmogorov_smirnov"], record["gradient_norm_of_single_rows"]
    lines = [
        TITLE,
        "",
        f"k = {record['parameters']:,} weights, loss {record['loss']:.3f} (perplexity {math.exp(record['loss']):.0f}) "
        f"on {record['tokens']:,} words of validation text, G = {record['gradient_norm']:.3f} (of single rows "
        f"{min(alone):.2f} to {max(alone):.2f}), tr(H) = {trace['mean']:.4g} ± {trace['standard_error']:.2g}.",
        "",
        f"## {first['draws']:,} random corruptions to first order, ε = {first['epsilon']:g}",
        "",
        tabulate(rows, header, tablefmt="pipe", floatfmt=".4g"),
        "",
        f"εG = {first['largest_first_order']:.4g}; no corruption reached more than "
        f"{first['largest_share_of_worst_case']:.2g} of it, and the probability to reach half is "
        f"10^{first['log_probability_of_half_the_worst_case'] / math.log(10):.0f}. "
        f"Kolmogorov-Smirnov: D = {test['statistic']:.4f}, p = {test['p_value']:.2f}.",
        "",
        f"## {record['settings']['changes']} random corruptions by forward passes",
        "",
        tabulate(real, titles, tablefmt="pipe", floatfmt=".3g"),
        "",
        f"{record['seconds']['training']:.0f} s of training, {record['seconds']['measuring']:.0f} s of measuring: "
        f"`{record['command']}`.",
    ]
    return "\n".join(lines) + "\n"
