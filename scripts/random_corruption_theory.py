"""Paper 1, Table 3, on a small language model: how much do random corruptions change the loss, and does theory say so?

    python -m scripts.random_corruption_theory --data FOLDER --output OUT

FOLDER holds `ptb.train.txt` and `ptb.valid.txt` (or `.gz`), a sentence a line. A GPT-2 of two layers learns it word by
word; over fixed validation text the gradient g of the mean loss is taken in float64, with G = ‖g‖₂. Then

- `--draws` random directions r ~ N(0, I), drawn in float32: the first-order loss change aᵀg of a = ε r/‖r‖₂, which is
  ε G cos(r, g), against Theorem 1: quantiles with 95 % intervals from order statistics, probabilities, and
  a Kolmogorov–Smirnov test;
- for each ε, `--changes` random corruptions and the change of the loss that forward passes find, in float64 and in
  float32, beside Hutchinson's estimate of the mean.

The output folder gets `record.json` and `table.md`.
"""

from __future__ import annotations

import argparse
import gzip
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_parcor import CorruptionConstraint, GradientCorruption
from hf_parcor.evaluation.identity.provenance import library_versions
from hf_parcor.functional import vector_norm
from hf_parcor.indicators import LossOverData, hessian_trace, random_loss_changes
from hf_parcor.reports.tables import markdown_table
from hf_parcor.strict_json import replace_text, to_strict_json
from hf_parcor.theory import RandomCorruptionRatio, second_order_average_loss_change

END = "<eos>"


def words_of(folder: Path, part: str) -> list[str]:
    """Return the words of `ptb.<part>.txt` or of its `.gz`, each line ended by a word of its own."""
    plain = folder / f"ptb.{part}.txt"
    packed = plain.with_name(f"{plain.name}.gz")
    if not plain.is_file() and not packed.is_file():
        raise SystemExit(f"--data: expected {plain.name} or {packed.name} in {folder}, got neither; name their folder")
    text = plain.read_text(encoding="utf-8") if plain.is_file() else gzip.decompress(packed.read_bytes()).decode()
    return [word for line in text.splitlines() for word in [*line.split(), END]]


def rows_of(words: Sequence[str], vocabulary: dict[str, int], length: int) -> Tensor:
    """Return the words' numbers in rows of one length; what is left over is dropped."""
    unknown = vocabulary.get("<unk>", 0)
    numbers = torch.tensor([vocabulary.get(word, unknown) for word in words])
    return numbers[: len(numbers) // length * length].view(-1, length)


def trained_model(rows: Tensor, vocabulary: int, options: argparse.Namespace) -> GPT2LMHeadModel:
    """Train a GPT-2 from scratch on rows that are drawn at random."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_embd=options.width,
            n_layer=options.layers,
            n_head=2,
            n_positions=options.length,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=options.steps + 1)
    model.train()
    for _ in tqdm(range(options.steps), desc="training", disable=options.quiet):
        batch = rows[torch.randint(len(rows), (options.batch,))]
        torch.autograd.backward(exact_loss(model, batch))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def exact_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean loss of the next word, in the precision of the model: its own rounds logits to float32."""
    logits = model(input_ids=rows).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def loss_of(model: GPT2LMHeadModel, rows: Tensor, batch: int) -> LossOverData:
    """Return the loss over rows as a function of all weights; the tied embeddings count once."""
    return LossOverData(model, dict(model.named_parameters()), torch.split(rows, batch), exact_loss)


PROBABILITIES = (0.9, 0.95, 0.995)  # those of the paper
THRESHOLDS = (1.0, 2.0, 3.0)  # in standard deviations
BLOCK = 16  # directions that are drawn at a time


def measure(model: GPT2LMHeadModel, rows: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Return what the record holds of a trained model: first order, then real changes in float64 and float32."""
    model.double()
    precise = loss_of(model, rows, options.batch)
    gradient = torch.cat([part.reshape(-1) for part in precise.gradient().values()])
    alone = [float(vector_norm([*loss_of(model, row, 1).gradient().values()])) for row in torch.split(rows[:8], 1)]
    trace = hessian_trace(precise, options.probes, options.seed)
    record = {
        "parameters": len(gradient),
        "loss": precise.value(),
        "gradient_norm": float(gradient.norm()),
        "gradient_norm_of_single_rows": alone,
        "hessian_trace": {"mean": trace.mean, "standard_error": trace.standard_error, "probes": options.probes},
        "first_order": first_order(gradient, options),
    }
    runs = [(dtype, epsilon) for dtype in (torch.float64, torch.float32) for epsilon in options.epsilons]
    found = []
    for dtype, epsilon in tqdm(runs, desc="loss changes", disable=options.quiet):
        nn.Module.to(model, dtype)
        found.append(real_changes(loss_of(model, rows, options.batch), epsilon, trace.mean, options))
    return {**record, "real_changes": found}


def first_order(gradient: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the first-order loss changes of many random corruptions with Theorem 1."""
    ratio = RandomCorruptionRatio(len(gradient))
    root = math.sqrt(len(gradient))
    scale = options.epsilons[0] * float(gradient.norm())
    blocks = math.ceil(options.draws / BLOCK)
    walk = tqdm(cosines(gradient, options.draws, options.seed), total=blocks, disable=options.quiet)
    found = torch.cat(list(walk))
    test = stats.kstest(found.numpy(), ratio.signed_cdf)
    return {
        "epsilon": options.epsilons[0],
        "draws": options.draws,
        "largest_first_order": scale,
        "mean": scale * float(found.mean()),
        "standard_deviation": scale * float(found.std()),
        "theoretical_standard_deviation": scale / root,
        "quantiles": quantiles(scale * found.abs(), scale, ratio),
        "probabilities": [
            {
                "threshold": scale * times / root,
                "empirical": float((found.abs() > times / root).double().mean()),
                "theoretical": ratio.survival(times / root),
            }
            for times in THRESHOLDS
        ],
        "largest_share_of_worst_case": float(found.abs().max()),
        "log_probability_of_half_the_worst_case": ratio.log_survival(0.5),
        "kolmogorov_smirnov": {"statistic": float(test.statistic), "p_value": float(test.pvalue)},
    }


def cosines(gradient: Tensor, draws: int, seed: int, *, block: int = BLOCK) -> Iterator[Tensor]:
    """Yield the cosines between random directions and the gradient, block by block."""
    generator = torch.Generator().manual_seed(seed)
    direction = (gradient / gradient.norm()).float()
    for first in range(0, draws, block):
        drawn = torch.empty(min(block, draws - first), len(direction)).normal_(generator=generator)
        yield (drawn @ direction / torch.linalg.vector_norm(drawn, dim=1)).double()


def real_changes(loss: LossOverData, epsilon: float, trace: float, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the loss changes that forward passes find with the theory of both indicators."""
    constraint = CorruptionConstraint(epsilon=epsilon)
    drawn = random_loss_changes(loss, constraint, options.changes, options.seed)
    gradient = loss.gradient()
    k = sum(part.numel() for part in gradient.values())
    largest = epsilon * float(vector_norm(list(gradient.values())))
    ratio = RandomCorruptionRatio(k)
    found = torch.tensor(drawn.changes.values, dtype=torch.float64)
    return {
        "epsilon": epsilon,
        "dtype": str(next(iter(loss.parameters.values())).dtype).removeprefix("torch."),
        "first_order_maximum": largest,
        "gradient_based": loss.change(GradientCorruption(constraint)(loss.parameters, loss.gradients)),
        "standard_deviation": drawn.changes.standard_deviation,
        "theoretical_standard_deviation": largest / math.sqrt(k),
        "beyond_first_order": {
            "mean": drawn.beyond_first_order.mean,
            "standard_error": drawn.beyond_first_order.standard_error,
            "standard_deviation": drawn.beyond_first_order.standard_deviation,
            "hutchinson": second_order_average_loss_change(epsilon, trace, k),
        },
        "quantiles": quantiles(found.abs(), largest, ratio),
        "p_value": float(stats.kstest(found.numpy() / largest, ratio.signed_cdf).pvalue),
        "changes": drawn.changes.values,
    }


def quantiles(magnitudes: Tensor, largest: float, ratio: RandomCorruptionRatio) -> list[dict[str, float]]:
    """Return α(p) with P(|ΔL| < α) = p as found, with a 95 % interval, and as theory has it.

    Args:
        magnitudes: The loss changes that were found.
        largest: εG, the largest of first order.
        ratio: What share of it random corruptions reach.
    """
    found = magnitudes.tolist()
    rows = []
    for p in PROBABILITIES:
        value = float(np.quantile(found, p))
        ends = stats.quantile_test(found, q=value, p=p).confidence_interval(0.95)
        # With too few values an end is the sample's own, and the level is not reached.
        low, high = np.where(np.isnan(ends), (min(found), max(found)), ends).tolist()
        theory = largest * ratio.quantile(p)
        rows.append({"p": p, "empirical": value, "low": low, "high": high, "theoretical": theory})
    return rows


TITLE = "# Random corruptions of a language model against Theorem 1 (paper 1, Table 3)"


def in_digits(digits: int, header: list[str], rows: list[list[Any]]) -> str:
    """Return a Markdown table whose numbers have so many significant digits."""
    return markdown_table(header, [[c if isinstance(c, str) else f"{c:.{digits}g}" for c in row] for row in rows])


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
        in_digits(4, header, rows),
        "",
        f"εG = {first['largest_first_order']:.4g}; no corruption reached more than "
        f"{first['largest_share_of_worst_case']:.2g} of it, and the probability to reach half is "
        f"10^{first['log_probability_of_half_the_worst_case'] / math.log(10):.0f}. "
        f"Kolmogorov-Smirnov: D = {test['statistic']:.4f}, p = {test['p_value']:.2f}.",
        "",
        f"## {record['settings']['changes']} random corruptions by forward passes",
        "",
        in_digits(3, titles, real),
        "",
        f"{record['seconds']['training']:.0f} s of training, {record['seconds']['measuring']:.0f} s of measuring: "
        f"`{record['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, str]:
    """Return the options, and the command that has them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with ptb.train.txt and ptb.valid.txt, or .gz of them")
    add("--output", type=Path, required=True, help="folder for what is found")
    add("--words", type=int, default=10_000, help="size of the vocabulary")
    add("--layers", type=int, default=2, help="layers of the model")
    add("--width", type=int, default=64, help="its hidden size")
    add("--length", type=int, default=64, help="words a row")
    add("--batch", type=int, default=16, help="rows a batch")
    add("--steps", type=int, default=300, help="steps of training")
    add("--learning-rate", type=float, default=3e-3, help="its largest")
    add("--rows", type=int, default=32, help="rows of validation text that the loss is over")
    add("--draws", type=int, default=10_000, help="random corruptions to first order")
    add("--changes", type=int, default=100, help="random corruptions by forward passes, for each ε and precision")
    add("--epsilons", type=float, nargs="+", default=[5e-4, 5e-2, 5.0], help="radii, the first for the first order")
    add("--probes", type=int, default=16, help="Hessian-vector products for the trace")
    add("--seed", type=int, default=0)
    add("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    command = "python -m scripts.random_corruption_theory --data FOLDER --output OUT"
    for name, value in vars(options).items():
        if name not in ("data", "output", "quiet") and value != parser.get_default(name):
            values = value if isinstance(value, list) else [value]
            command += f" --{name.replace('_', '-')} {' '.join(map(str, values))}"
    return options, command


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, draw, measure, write."""
    options, command = parse(arguments)
    set_seed(options.seed)
    texts = {part: words_of(options.data, part) for part in ("train", "valid")}
    vocabulary = {word: number for number, (word, _) in enumerate(Counter(texts["train"]).most_common(options.words))}
    rows = rows_of(texts["valid"], vocabulary, options.length)[: options.rows]
    started = time.monotonic()
    model = trained_model(rows_of(texts["train"], vocabulary, options.length), len(vocabulary), options)
    trained = time.monotonic()
    found = measure(model, rows, options)
    settings = {name: value for name, value in vars(options).items() if name not in ("data", "output", "quiet")}
    record = {
        "command": command,
        "settings": settings,
        "tokens": len(rows) * (options.length - 1),
        "seconds": {"training": trained - started, "measuring": time.monotonic() - trained},
        **found,
        "versions": library_versions(),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    replace_text(options.output / "record.json", to_strict_json(record))
    text = table(record)
    replace_text(options.output / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
