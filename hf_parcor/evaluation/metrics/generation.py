"""What a model generates, compared with reference texts by any library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from hf_parcor.batches import IGNORED_LABEL
from hf_parcor.evaluation.identity.repeated_batches import unseen
from hf_parcor.evaluation.metrics.over_batches import NO_TEXT, OverPairs, Pairs
from hf_parcor.evaluation.metrics.scores import Score
from hf_parcor.evaluation.outputs import NOT_FINITE, inside_adapters, own_batch
from hf_parcor.evaluation.placement.replicas import all_batches
from hf_parcor.languages import check_target_language
from hf_parcor.sequence_length import asked_length, generated_length, generation_settings, unfinished

_PROMPT = "decoder_input_ids"

_NOT_IN_VOCABULARY = "\ufffc"  # not the token, which sacrebleu would split into several

CUT = "predictions_cut"
"""The share of texts that did not end within the length; a metric returns it if there were any."""


class GenerationMetric(OverPairs):
    r"""A score of generated texts, such as translations, summaries or answers, over all batches together.

    The texts are generated batch by batch, so that the encoder runs once a batch for all corruptions of the decoder.
    For a model without an encoder, only what follows the input counts (pad inputs on the left).

    If the scores of a token are not finite (one is NaN or +∞, or all are −∞), the text is replaced by the character
    "\ufffd", which is never right. The share of these texts is `predictions_not_finite`. In a reference, what the
    vocabulary of the tokenizer lacks is the character "\ufffc", which no text has.

    `max_new_tokens` or `max_length`, among the settings or in the model's generation configuration, limits the length.
    If neither is set, the limit is the longest reference plus a fifth and ten tokens. The share of texts that did not
    end within the limit is `predictions_cut`.

    Args:
        tokenizer: Decodes the generated texts and the labels.
        batches: Mappings of tensors that `generate` takes, with the reference as `labels`, −100 for padding. What the
            decoder reads (`decoder_input_ids`) is a prompt if its shape is not that of the labels, as for a Trainer.
        score: Called as `score(predictions=..., references=...)` with lists of texts; returns a number or numbers by
            name. For example `SacrebleuScore("bleu")`, `evaluate.load("rouge").compute`, or your own function.
        **settings: Arguments of `generate`. There is no sampling unless `do_sample=True` is given.

    Raises:
        ValueError: There are no batches, they can be walked through only once, or the score returns no number; or,
            when called, a multilingual model is not told which language to generate (`set_languages`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        batches: Iterable[Mapping[str, Any]],
        score: Score,
        **settings: Any,
    ) -> None:
        super().__init__(batches, score)
        self._tokenizer = tokenizer
        self._settings = {"do_sample": False, **settings}
        self._longest = self._longest_reference() if asked_length(None, self._settings) is None else 0

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Pairs:
        """Return the generated texts of one batch, its references, and how many texts were not finite or cut.

        Raises:
            ValueError: There are no labels, not as many texts as references, or no target language.
        """
        labels = self._labels(batch)
        inputs = _without_labels(batch, labels)
        generating: Any = model
        settings = dict(self._settings)
        check_target_language(generating, self._tokenizer, settings, labels)
        start = 1 if generating.config.is_encoder_decoder else batch["input_ids"].shape[1]
        length = asked_length(generating, settings, start)
        if length is None:
            length = settings["max_new_tokens"] = generated_length(generating, self._longest, start)
        seen = _NotFinite(generating, settings)
        if seen.watches:
            settings["logits_processor"] = LogitsProcessorList([*(settings.get("logits_processor") or ()), seen])
        tokens = generating.generate(**own_batch(inputs, model), **settings)
        tokens = getattr(tokens, "sequences", tokens)  # return_dict_in_generate
        if len(tokens) != len(labels):
            raise ValueError(
                f"settings: expected one generated text for each of {len(labels)} references, got {len(tokens)}; "
                "leave out num_return_sequences"
            )
        if _PROMPT in {**inputs, **settings}:  # it counts in `max_length`
            length = asked_length(generating, settings, seen.width(start)) or length
        tokens = tokens[:, seen.begun_with(tokens, start) :]
        lost = seen.rows(len(labels))
        texts = [NO_TEXT if gone else text for text, gone in zip(self._texts(tokens), lost, strict=True)]
        cut = sum(
            at_end and not gone
            for at_end, gone in zip(unfinished(tokens, length, generating, settings), lost, strict=True)
        )
        references = [reference_text(self._tokenizer, row[row != IGNORED_LABEL].tolist()) for row in labels]
        return texts, references, {NOT_FINITE: sum(lost), CUT: cut}

    def _longest_reference(self) -> int:
        """Return how many tokens the longest reference of all processes has."""
        with unseen(self._batches):
            labels = [torch.as_tensor(batch["labels"]) for batch in all_batches(self._batches) if "labels" in batch]
        return max((int((rows != IGNORED_LABEL).sum(-1).max()) for rows in labels), default=0)

    def _texts(self, rows: Iterable[Tensor]) -> list[str]:
        return [str(self._tokenizer.decode(row.tolist(), skip_special_tokens=True)).strip() for row in rows]


def _without_labels(batch: Mapping[str, Any], labels: Tensor) -> dict[str, Any]:
    """Return what `generate` takes of a batch: what a decoder reads only if it is a prompt, and not made of labels."""
    read = batch.get(_PROMPT)
    of_labels = read is None or torch.as_tensor(read).shape == labels.shape
    left_out = ("labels", *((_PROMPT, "decoder_attention_mask") if of_labels else ()))
    return {name: value for name, value in batch.items() if name not in left_out}


def reference_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    r"""Return the text of a reference, without special tokens, but with what the vocabulary lacks as "\ufffc".

    Args:
        tokenizer: What made the tokens.
        tokens: Those of a text, without padding by −100.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown not in tokens or unknown in (tokenizer.eos_token_id, tokenizer.pad_token_id):  # as of GPT-2
        return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    left_out = {*tokenizer.all_special_ids} - {unknown}
    text = str(tokenizer.decode([token for token in tokens if token not in left_out]))
    return text.replace(tokenizer.unk_token, _NOT_IN_VOCABULARY).strip()


class _NotFinite(LogitsProcessor):
    """Notes what texts begin with, and which have had scores from which no token can be chosen; these go on.

    Sampling would raise there, and the likeliest token would be that of the first NaN.

    Args:
        model: What generates.
        settings: Those of the generation.
    """

    def __init__(self, model: Any, settings: Mapping[str, Any]) -> None:
        self.watches = isinstance(inside_adapters(model), GenerationMixin)
        ends = next(iter(generation_settings(model, settings, "eos_token_id")), None)
        self._ends = [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()
        self._begin: Tensor | None = None
        self._lost: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, all alike in rows where no token can be chosen."""
        if self._begin is None:
            self._begin = input_ids.clone()
        finite = torch.isfinite(scores.amax(-1))
        # What follows the end of a text is not read.
        ended = torch.isin(input_ids[:, self._begin.shape[1] :], input_ids.new_tensor(self._ends)).any(-1)
        lost = ~finite & ~ended
        if self._lost is not None:  # where rows have left, it is not known whose the others are
            lost |= self._lost if len(self._lost) == len(lost) else self._lost.any()
        self._lost = lost
        return torch.where(finite[:, None], scores, torch.zeros_like(scores))

    def width(self, usual: int) -> int:
        """Return how many tokens each text began with."""
        return usual if self._begin is None else self._begin.shape[1]

    def begun_with(self, tokens: Tensor, usual: int) -> int:
        """Return how many tokens of each text are what it began with: none where they are left out, as by Whisper."""
        if self._begin is None or len(self._begin) % len(tokens):
            return usual
        count, beams = self._begin.shape[1], len(self._begin) // len(tokens)
        return count if torch.equal(tokens[:, :count], self._begin[::beams].to(tokens.device)) else 0

    def rows(self, count: int) -> list[bool]:
        """Return for each of so many texts whether it was lost, in one of its beams at least."""
        if self._lost is None:
            return [False] * count
        if len(self._lost) % count:
            return [bool(self._lost.any())] * count
        return [bool(row) for row in self._lost.view(count, -1).any(-1).tolist()]
