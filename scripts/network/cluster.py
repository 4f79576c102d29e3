"""A model on paper: how long an optimizer step takes on many GPUs, from what it computes and sends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Collectives with what each rank sends of the whole tensor, on a ring of n ranks.
RING: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0 if n > 1 else 0.0,
}


@dataclass(frozen=True)
class Cluster:
    """GPUs in machines, and what stands between them.

    Args:
        gigabits_inside: What a GPU sends a second inside its machine.
        gigabits_across: The same between machines.
        gpus_of_machine: GPUs in one machine.
        microseconds: What a call waits for each level of a tree over the ranks.
        teraflops: The peak of a GPU, in 10¹² operations a second.
        share: Which part of the peak is reached.
    """

    gigabits_inside: float = 3600.0
    gigabits_across: float = 400.0
    gpus_of_machine: int = 8
    microseconds: float = 5.0
    teraflops: float = 989.0
    share: float = 0.5

    def bytes_a_second(self, ranks: int) -> float:
        """Return what a rank sends a second: a ring is as fast as its slowest link.

        Examples:
            >>> Cluster().bytes_a_second(8), Cluster().bytes_a_second(9)
            (450000000000.0, 50000000000.0)
        """
        gigabits = self.gigabits_inside if ranks <= self.gpus_of_machine else self.gigabits_across
        return gigabits * 1e9 / 8


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step's parts."""

    compute: float
    communicate: float

    @property
    def one_after_the_other(self) -> float:
        """Without overlap."""
        return self.compute + self.communicate

    @property
    def overlapped(self) -> float:
        """With full overlap, which no program beats."""
        return max(self.compute, self.communicate)


def bytes_on_the_wire(collective: str, size: float, ranks: int) -> float:
    """Return what one rank sends for a collective over a whole tensor of `size` bytes.

    Raises:
        ValueError: An unknown collective, or no rank.

    Examples:
        >>> bytes_on_the_wire("all_reduce", 100, 4), bytes_on_the_wire("all_gather", 100, 4)
        (150.0, 75.0)
    """
    if collective not in RING:
        raise ValueError(f"collective: expected one of {', '.join(RING)}, got {collective!r}; choose one of these")
    if ranks < 1:
        raise ValueError(f"ranks: expected at least 1, got {ranks}; pass how many there are")
    return size * RING[collective](ranks)


def step_time(
    collectives: Mapping[str, Mapping[str, int]], operations: float, ranks: int, cluster: Cluster
) -> StepTime:
    """Return the seconds of one step: bytes over bandwidth and a wait for each call; operations over their rate.

    Args:
        collectives: For each, its `calls` and its `bytes`, those of whole tensors.
        operations: Floating-point operations of one rank.
        ranks: How many GPUs there are.
        cluster: How fast they are.
    """
    sent = sum(bytes_on_the_wire(name, counted["bytes"], ranks) for name, counted in collectives.items())
    calls = sum(counted["calls"] for counted in collectives.values())
    wait = cluster.microseconds * 1e-6 * math.ceil(math.log2(ranks))
    return StepTime(
        compute=operations / (cluster.teraflops * 1e12 * cluster.share),
        communicate=sent / cluster.bytes_a_second(ranks) + calls * wait,
    )


def steps_on_paper(
    counted: Mapping[str, Mapping[str, Any]], sequences: float, gpus: Iterable[int], cluster: Cluster
) -> list[dict[str, Any]]:
    """Return what a step of each arm takes on clusters: milliseconds, and the ratio to the engine's stock step.

    Args:
        counted: What was counted of one sequence, by engine and arm.
        sequences: How many a GPU has.
        gpus: Sizes of clusters.
        cluster: How fast they are.
    """
    rows = []
    for engine, arms in counted.items():
        for label, arm in arms.items():
            for ranks in gpus:
                ours, stock = (
                    step_time(of["collectives"], of["operations"] * sequences, ranks, cluster)
                    for of in (arm, arms["stock"])
                )
                row: dict[str, Any] = {"engine": engine, "arm": label, "gpus": ranks}
                for overlap in ("one_after_the_other", "overlapped"):
                    here, there = getattr(ours, overlap), getattr(stock, overlap)
                    row[overlap] = {"milliseconds": round(here * 1e3, 3), "ratio": round(here / there, 3)}
                rows.append(row)
    return rows


def assumptions(tokens: int, cluster: Cluster) -> str:
    """Return what the model takes for granted."""
    return (
        f"Assumed: {tokens:,} tokens a GPU and step, no accumulation; operations as counted, at "
        f"{cluster.share:.0%} of {cluster.teraflops:g} TFLOP/s;\n"
        f"ring collectives, {cluster.gigabits_inside:g} Gbit/s a GPU in machines of {cluster.gpus_of_machine} and "
        f"{cluster.gigabits_across:g} Gbit/s across; a call waits\n"
        f"{cluster.microseconds:g} µs × log₂ n; float32 is sent, as counted; no optimizer, loader or stragglers. "
        "Stock steps in milliseconds,\nthe others as multiples of them: nothing overlaps, then (∥) all that is sent "
        "overlaps with all that is computed.\n'Global' waits for its corruption, so its ∥ is out of reach."
    )
