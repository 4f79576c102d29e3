"""Finds the rows of a batch in what a prefix hands on, as a defended step does, for a model and a batch of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from hf_parcor.batches import count_first, first_examples, repeat_first_examples
from hf_parcor.prefix import PrefixReuse, find_rows


def find_rows_of(prefix: PrefixReuse, model: nn.Module, batch: Mapping[str, Tensor], share: float) -> None:
    """Find them by passes over the batch, and over a share of it.

    Raises:
        PrefixError: Passes over a part cannot reuse the prefix.
    """

    def run_on(part: Mapping[str, Tensor]) -> Callable[[Callable[[Any], Tensor]], Any]:
        def run_pass(objective: Callable[[Any], Tensor]) -> Any:
            result = model(**part)
            objective(result).backward()
            return result

        return run_pass

    runs = [run_on(part) for part in (batch, first_examples(batch, share), repeat_first_examples(batch, share))]
    find_rows(prefix, model, *count_first(batch, share), *runs)
