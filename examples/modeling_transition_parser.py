"""A dependency parser after Chen and Manning (2014): arc-standard transitions, chosen by a small network.

`Configurations` is the transition system, for a batch of sentences at once; `oracle_rows` turns trees into what the
network learns from; `TransitionParser` is the network, and `parse` reads sentences with it. A saved model carries this
file, and loads by `AutoModel.from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

NOTHING, UNKNOWN, ROOT = range(3)
"""What words, tags and relations are before those of the vocabulary: no word there, one not known, the root."""
UNATTACHED = -1
"""The head of a word that has none."""
NO_TRANSITION, SHIFT = -1, 0
"""What a sentence takes that is done, and the first transition; LEFT-ARC and RIGHT-ARC with each relation follow."""
WORD_FEATURES, RELATION_FEATURES = 18, 12


class TransitionParserConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The vocabulary and the sizes of a `TransitionParser`.

    Args:
        words: Known words, in lower case.
        tags: Known parts of speech.
        relations: Known dependency relations.
        embedding_size: Width of the embeddings of words, tags and relations. Default 50.
        hidden_size: Width of the hidden layer. Default 200.
        dropout: Of the hidden layer. Default 0.5, as in the paper.
        **kwargs: For `PretrainedConfig`.
    """

    model_type = "transition-parser"

    def __init__(
        self,
        words: Sequence[str] = (),
        tags: Sequence[str] = (),
        relations: Sequence[str] = (),
        embedding_size: int = 50,
        hidden_size: int = 200,
        dropout: float = 0.5,
        **kwargs: Any,
    ) -> None:
        self.words, self.tags, self.relations = list(words), list(tags), list(relations)
        self.embedding_size, self.hidden_size, self.dropout = embedding_size, hidden_size, dropout
        super().__init__(**kwargs)

    @property
    def relation_count(self) -> int:
        """How many relations an arc can have; they are 1 to this number, the unknown one among them."""
        return UNKNOWN + len(self.relations)


class Configurations:
    """Stack, buffer and arcs of a batch of sentences, which take one transition each at a time.

    A sentence of n words begins with the root on the stack and all words in the buffer, and ends after exactly 2n
    transitions with the root alone:

    - SHIFT (0) moves the first word of the buffer to the stack;
    - LEFT-ARC (1 to R) makes the second word of the stack a dependent of the first, and takes it away;
    - RIGHT-ARC (R + 1 to 2R) makes the first a dependent of the second, and takes it away.

    The root gets one dependent, the last of all. Place 0 is the root, 1 to n are words, n + 1 is where nothing is.

    Args:
        words: (B, N), integers; `NOTHING` fills up shorter sentences.
        tags: (B, N), likewise.
        relation_count: R.

    Examples:
        >>> one = Configurations(torch.tensor([[5, 6]]), torch.tensor([[3, 4]]), 2)
        >>> for transition in (0, 0, 1, 4):
        ...     one.take(torch.tensor([transition]))
        >>> one.heads, one.relations, one.done()
        (tensor([[2, 0]]), tensor([[1, 2]]), tensor([True]))
    """

    def __init__(self, words: Tensor, tags: Tensor, relation_count: int) -> None:
        count, longest = words.shape
        self._relation_count = relation_count
        self._lengths = (words != NOTHING).sum(1)
        self._nowhere = longest + 1
        self._words, self._tags = (
            nn.functional.pad(nn.functional.pad(values, (1, 0), value=ROOT), (0, 1), value=NOTHING)
            for values in (words, tags)
        )

        def places(width: int, value: int) -> Tensor:
            return words.new_full((count, width), value, dtype=torch.long)

        self._heads = places(longest + 2, UNATTACHED)
        self._relations = places(longest + 2, NOTHING)
        # The outermost dependents on each side, and those next to them.
        self._left, self._left_inner, self._right, self._right_inner = (
            places(longest + 2, self._nowhere) for _ in range(4)
        )
        self._stack = places(
            longest + 3, self._nowhere
        )  # upon two places with nothing, so that a third is always there
        self._stack[:, 2] = 0
        self._depth = self._lengths.new_ones(count)
        self._next = self._lengths.new_ones(count)

    @property
    def heads(self) -> Tensor:
        """The head of each word so far, (B, N); `UNATTACHED` for none."""
        return self._heads[:, 1:-1]

    @property
    def relations(self) -> Tensor:
        """The relation of each word to its head so far, (B, N); `NOTHING` for none."""
        return self._relations[:, 1:-1]

    def done(self) -> Tensor:
        """Return which sentences have only the root left, (B,)."""
        return (self._depth == 1) & ~self._buffered()

    def legal(self) -> Tensor:
        """Return whether each sentence may SHIFT, LEFT-ARC, RIGHT-ARC, (B, 3): none of them once it is done."""
        buffered, two_words = self._buffered(), self._depth >= 3
        return torch.stack([buffered, two_words, two_words | ((self._depth == 2) & ~buffered)], 1)

    def legal_transitions(self) -> Tensor:
        """Return which transitions are legal, (B, 1 + 2R)."""
        shift, *arcs = self.legal()[:, :, None].unbind(1)
        return torch.cat([shift, *(arc.expand(-1, self._relation_count) for arc in arcs)], 1)

    def take(self, transitions: Tensor) -> None:
        """Take one transition in each sentence, (B,), which must be legal; or `NO_TRANSITION`."""
        first, second = self._on_stack(0), self._on_stack(1)
        shift, right = transitions == SHIFT, transitions > self._relation_count
        left = (transitions > SHIFT) & ~right
        arc, nowhere = left | right, self._nowhere
        head, dependent = torch.where(left, first, second), torch.where(left, second, first)
        dependent = dependent.where(arc, nowhere)
        _write(self._heads, dependent, head)
        _write(self._relations, dependent, (transitions - right * self._relation_count).where(arc, NOTHING))
        for outer, inner, side in (
            (self._left, self._left_inner, left),
            (self._right, self._right_inner, right),
        ):
            at = head.where(side, nowhere)
            _write(inner, at, _read(outer, at))
            _write(outer, at, dependent.where(side, nowhere))
        self._depth = self._depth + shift.long() - arc.long()
        _write(self._stack, self._depth + 1, torch.where(shift, self._next, torch.where(right, second, first)))
        self._next = self._next + shift.long()

    def oracle(self, heads: Tensor, relations: Tensor) -> Tensor:
        """Return the transition that leads to these trees, (B,): arcs as soon as they can be made (arc-standard).

        `NO_TRANSITION` where there is none: for a sentence that is done, and at some point where arcs cross.

        Args:
            heads: (B, N), 0 for the root, `UNATTACHED` beyond the sentence.
            relations: (B, N), from 1 on.
        """
        heads, relations = nn.functional.pad(heads, (1, 1), value=UNATTACHED), nn.functional.pad(relations, (1, 1))
        first, second = self._on_stack(0), self._on_stack(1)
        may_shift, may_left, may_right = self.legal().unbind(1)
        waiting = ((heads == first[:, None]) & (self._heads == UNATTACHED)).any(1)
        left = may_left & (_read(heads, second) == first)
        right = may_right & (_read(heads, first) == second) & ~waiting
        shift = torch.where(may_shift, SHIFT, NO_TRANSITION)
        return torch.where(
            left,
            _read(relations, second),
            torch.where(right, _read(relations, first) + self._relation_count, shift),
        )

    def features(self) -> Tensor:
        """Return words, tags and relations around stack and buffer, (B, 18 + 18 + 12).

        The first three words of stack and buffer; for each of the first two of the stack the leftmost and rightmost
        two dependents, the leftmost of the leftmost and the rightmost of the rightmost. Relations are those of the
        dependents.
        """
        places = [self._on_stack(index) for index in range(3)]
        for index in range(3):
            place = self._next + index
            places.append(place.where(place <= self._lengths, self._nowhere))
        for word in places[:2]:
            left, right = _read(self._left, word), _read(self._right, word)
            inner = [_read(self._left_inner, word), _read(self._right_inner, word)]
            places += [left, right, *inner, _read(self._left, left), _read(self._right, right)]
        at = torch.stack(places, 1)
        words, tags = self._words.gather(1, at), self._tags.gather(1, at)
        return torch.cat([words, tags, self._relations.gather(1, at[:, -RELATION_FEATURES:])], 1)

    def _buffered(self) -> Tensor:
        return self._next <= self._lengths

    def _on_stack(self, index: int) -> Tensor:
        return _read(self._stack, self._depth + 1 - index)


def _read(table: Tensor, at: Tensor) -> Tensor:
    return table.gather(1, at[:, None]).squeeze(1)


def _write(table: Tensor, at: Tensor, values: Tensor) -> None:
    table.scatter_(1, at[:, None], values[:, None])


def steps_of(words: Tensor) -> range:
    """Return as many steps as the longest sentence takes: two for each word."""
    return range(2 * int((words != NOTHING).sum(1).max()) if words.numel() else 0)


def oracle_rows(
    words: Tensor, tags: Tensor, heads: Tensor, relations: Tensor, relation_count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return configurations on the way to trees, (C, 48), the next transition in each, (C,), and of which trees, (B,).

    A tree that no transitions lead to is left out: arc-standard makes projective trees alone.
    """
    configurations = Configurations(words, tags, relation_count)
    features, transitions = [], []
    for _ in steps_of(words):
        features.append(configurations.features().int())
        transitions.append(configurations.oracle(heads, relations))
        configurations.take(transitions[-1])
    projective = configurations.done()
    labels = torch.stack(transitions, 1)
    kept = (labels != NO_TRANSITION) & projective[:, None]
    return torch.stack(features, 1)[kept], labels[kept], projective


class TransitionParser(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The network: embeddings of words, tags and relations, a hidden layer with cubes, a score for each transition."""

    config_class = TransitionParserConfig
    base_model_prefix = ""
    main_input_name = "features"

    def __init__(self, config: TransitionParserConfig) -> None:
        super().__init__(config)
        size = config.embedding_size
        self.word_embeddings = nn.Embedding(1 + ROOT + len(config.words), size)
        self.tag_embeddings = nn.Embedding(1 + ROOT + len(config.tags), size)
        self.relation_embeddings = nn.Embedding(1 + config.relation_count, size)
        self.hidden = nn.Linear((2 * WORD_FEATURES + RELATION_FEATURES) * size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.transitions = nn.Linear(config.hidden_size, 1 + 2 * config.relation_count, bias=False)
        self._word_ids = {word: index for index, word in enumerate(config.words, ROOT + 1)}
        self._tag_ids = {tag: index for index, tag in enumerate(config.tags, ROOT + 1)}
        self._relation_ids = {relation: index for index, relation in enumerate(config.relations, UNKNOWN + 1)}
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)  # cubes of what is much smaller have no gradient to speak of
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Return a score for each transition, (B, 1 + 2R), and with labels, (B,), the mean cross-entropy."""
        words, tags, relations = features.tensor_split([WORD_FEATURES, 2 * WORD_FEATURES], 1)
        embedded = torch.cat(
            [self.word_embeddings(words), self.tag_embeddings(tags), self.relation_embeddings(relations)], 1
        )
        logits = self.transitions(self.dropout(self.hidden(embedded.flatten(1)) ** 3))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels.long())
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def encode(self, words: Sequence[Sequence[str]], tags: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Return words and tags of sentences as integers, (B, N) each; words in any case."""
        known = ((self._word_ids.get(word.lower(), UNKNOWN) for word in sentence) for sentence in words)
        return _padded(known, NOTHING), _padded(
            ((self._tag_ids.get(tag, UNKNOWN) for tag in sentence) for sentence in tags), NOTHING
        )

    def encode_trees(
        self, heads: Sequence[Sequence[int]], relations: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor]:
        """Return heads and relations of sentences as integers, (B, N) each."""
        known = ((self._relation_ids.get(relation, UNKNOWN) for relation in sentence) for sentence in relations)
        return _padded(heads, UNATTACHED), _padded(known, NOTHING)

    @torch.no_grad()
    def parse(self, words: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
        """Return head and relation of each word, (B, N) each, by the likeliest legal transition at each step.

        Where the scores are not finite, the network has no answer: from there on no word gets a head.
        """
        configurations = Configurations(words, tags, self.config.relation_count)
        answered = torch.ones(len(words), dtype=torch.bool, device=words.device)
        heads, relations = configurations.heads.clone(), configurations.relations.clone()
        for _ in steps_of(words):
            going = ~configurations.done()  # the network has nothing to say about shorter sentences any more
            legal = configurations.legal_transitions()[going]
            logits = self(features=configurations.features()[going]).logits
            best, likeliest = logits.masked_fill(~legal, -torch.inf).max(1)  # NaN if there is one
            answered[going] &= best.isfinite()
            chosen = torch.full_like(configurations.heads[:, 0], NO_TRANSITION)
            chosen[going] = torch.where(best.isfinite(), likeliest, legal.int().argmax(1))
            configurations.take(chosen)
            heads = torch.where(answered[:, None], configurations.heads, heads)
            relations = torch.where(answered[:, None], configurations.relations, relations)
        return heads, relations


def _padded(rows: Iterator[Any] | Sequence[Any], value: int) -> Tensor:
    tensors = [torch.tensor(list(row), dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)


AutoConfig.register(TransitionParserConfig.model_type, TransitionParserConfig, exist_ok=True)
AutoModel.register(TransitionParserConfig, TransitionParser, exist_ok=True)
TransitionParserConfig.register_for_auto_class()  # type: ignore[no-untyped-call]
TransitionParser.register_for_auto_class("AutoModel")  # type: ignore[no-untyped-call]
