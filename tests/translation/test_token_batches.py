"""Batches of tokens: the bound, every sentence once, the same order again, and as many for each process."""

from __future__ import annotations

import pytest
from accelerate.data_loader import BatchSamplerShard
from for_each import for_each
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_parcor.translation import TokenBatchSampler

CASES = st.lists(st.integers(1, 50), min_size=4, max_size=80)


@settings(max_examples=60)
@given(lengths=CASES, slack=st.integers(0, 200), seed=st.integers(0, 2**31), processes=st.integers(1, 4))
def test_every_sentence_once_and_never_above_the_bound(lengths, slack, seed, processes):
    bound = max(lengths) + slack
    try:
        sampler = TokenBatchSampler(lengths, bound, seed=seed, processes=processes)
    except ValueError:
        fewest = len(TokenBatchSampler(lengths, bound, seed=seed))
        assert all(count % processes for count in range(fewest, len(lengths) + 1)), "it could be done"
        return
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        assert all(batch and len(batch) * max(lengths[index] for index in batch) <= bound for batch in batches)
        assert len(batches) == len(sampler)
        assert len(batches) % processes == 0


@settings(max_examples=30)
@given(lengths=CASES, processes=st.integers(1, 4))
def test_accelerate_deals_them_out(lengths, processes):
    sampler = TokenBatchSampler(lengths, 2_600, seed=0, processes=processes)
    dealt = [list(BatchSamplerShard(sampler, processes, rank, even_batches=False)) for rank in range(processes)]
    assert {len(of_rank) for of_rank in dealt} == {len(sampler) // processes}
    seen = [index for of_rank in dealt for batch in of_rank for index in batch]
    assert sorted(seen) == list(range(len(lengths)))


def test_batches_are_full():
    """64 sentences of 8 tokens fill 512 tokens exactly; one more opens a new batch."""
    assert [len(batch) for batch in TokenBatchSampler([8] * 64, 512, seed=0)] == [64]
    assert sorted(len(batch) for batch in TokenBatchSampler([8] * 65, 512, seed=0)) == [1, 64]


def test_sentences_of_like_length_share_a_batch():
    lengths = [2, 30] * 20
    batches = TokenBatchSampler(lengths, 60, seed=0)
    assert all(len({lengths[index] for index in batch}) == 1 for batch in batches)


def test_order():
    def epoch(seed, number):
        sampler = TokenBatchSampler([1 + index % 7 for index in range(90)], 30, seed=seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(1, 0) == epoch(1, 0)
    assert epoch(1, 0) != epoch(1, 1)
    assert sorted(epoch(1, 0)) == sorted(epoch(1, 1)), "the same batches"
    assert sorted(epoch(1, 0)) != sorted(epoch(2, 0)), "other neighbours"


@for_each(
    ("lengths", "processes", "says"),
    [
        ([3, 9], 1, "max_tokens: expected room for each sentence, got 8 for sentence 1 of 9 tokens"),
        ([], 1, "lengths: expected a sentence for each of 1 processes, got 0"),
        ([3], 2, "lengths: expected a sentence for each of 2 processes, got 1"),
        ([7, 7, 7], 2, "so that each of 2 processes gets as many batches, got 3 batches of one"),
    ],
)
def test_refused(lengths, processes, says):
    with pytest.raises(ValueError, match=says):
        TokenBatchSampler(lengths, 8, seed=0, processes=processes)
