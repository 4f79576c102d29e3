"""The LSTM language model of Merity, Keskar and Socher (2017), which paper 1 corrupts, as a model of Transformers.

Tied embedding and softmax, any number of LSTM layers, and three kinds of dropout: of whole words (embedding dropout),
of the same entries at every place of a text (variational or "locked" dropout), and of entries of the hidden-to-hidden
matrices (weight drop).

*The weight* of weight drop is the parameter `weight_hh` before its mask: it is what is trained, saved, corrupted and
restored, and each forward pass makes the dropped matrix from it anew. So a corruption reaches every pass, and with a
mask m and keep rate q its gradient is that of the dropped matrix times m/q. Masks are drawn in each forward pass, also
in each pass of a defended step.

Sequence state is carried from batch to batch where the batch says so, see `AwdLstmForCausalLM.forward`.

On a GPU the layers are cuDNN's, which cannot be differentiated twice: for `GradientPenalty` there set
`torch.backends.cudnn.enabled = False`.
"""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, initialization
from transformers.modeling_outputs import CausalLMOutput

# cuDNN copies weights that do not lie side by side, in each pass: dropped ones never do, for they are made in it.
_COPIED = "RNN module weights are not part of single contiguous chunk"


class AwdLstmConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Sizes and rates; the defaults are the source's for the Penn Treebank.

    Args:
        vocab_size: Words. Default 10,000.
        embedding_size: Width of the embedding, and of the last layer, since the softmax is tied to it. Default 400.
        hidden_size: Width of the layers before the last one. Default 1150.
        num_hidden_layers: LSTM layers, at least 1. Default 3.
        embedding_dropout: Rate at which words are dropped: all places of a batch where one stands. Default 0.1.
        input_dropout: Locked dropout of what goes into the first layer. Default 0.4.
        hidden_dropout: Locked dropout between layers. Default 0.25.
        output_dropout: Locked dropout of what goes into the softmax. Default 0.4.
        weight_drop: Dropout of entries of the hidden-to-hidden matrices. Default 0.5.
        activation_regularization: Factor of the mean square of what goes into the softmax, after dropout, added to
            the loss in training. Default 2.
        temporal_regularization: Factor of the mean square of how the last layer's output changes from one place to
            the next, before dropout, added to the loss in training. Default 1.
        initializer_range: The embedding begins uniform in ± this. Default 0.1.
        **kwargs: For `PretrainedConfig`.

    Raises:
        ValueError: A size is not positive, or a rate not in [0, 1).
    """

    model_type = "awd-lstm"
    keys_to_ignore_at_inference = ["state"]  # noqa: RUF012 - a Trainer adds a list to it

    def __init__(
        self,
        vocab_size: int = 10_000,
        embedding_size: int = 400,
        hidden_size: int = 1150,
        num_hidden_layers: int = 3,
        embedding_dropout: float = 0.1,
        input_dropout: float = 0.4,
        hidden_dropout: float = 0.25,
        output_dropout: float = 0.4,
        weight_drop: float = 0.5,
        activation_regularization: float = 2.0,
        temporal_regularization: float = 1.0,
        initializer_range: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.embedding_size = vocab_size, embedding_size
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.embedding_dropout, self.input_dropout = embedding_dropout, input_dropout
        self.hidden_dropout, self.output_dropout, self.weight_drop = hidden_dropout, output_dropout, weight_drop
        self.activation_regularization = activation_regularization
        self.temporal_regularization = temporal_regularization
        self.initializer_range = initializer_range
        for name in ("vocab_size", "embedding_size", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}; give a positive size")
        for name in ("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a rate in [0, 1), got {getattr(self, name)}; 0 drops nothing")
        super().__init__(**{"tie_word_embeddings": True, **kwargs})

    @property
    def widths(self) -> list[int]:
        """The width of each layer."""
        return [self.hidden_size] * (self.num_hidden_layers - 1) + [self.embedding_size]


def locked_dropout(inputs: Tensor, rate: float, training: bool) -> Tensor:
    """Drop entries of vectors `[texts, places, width]`, the same at all places of a text."""
    if not training or not rate:
        return inputs
    return inputs * functional.dropout(inputs.new_ones(len(inputs), 1, inputs.shape[-1]), rate)


class WeightDropLSTM(nn.Module):
    """One LSTM layer with dropout of its hidden-to-hidden matrix, one mask for all places of a batch.

    Plain parameters, unlike those of `nn.LSTM`: that moves its weights into one piece of memory on a GPU, and keeps a
    list of them beside, which a dropped matrix has to be smuggled into.

    Args:
        input_size: Width of the inputs.
        size: Width of the outputs.
        weight_drop: The rate.
    """

    def __init__(self, input_size: int, size: int, weight_drop: float) -> None:
        super().__init__()
        self.size, self.weight_drop = size, weight_drop
        self.weight_ih = nn.Parameter(torch.empty(4 * size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * size, size))
        self.bias_ih = nn.Parameter(torch.empty(4 * size))
        self.bias_hh = nn.Parameter(torch.empty(4 * size))

    def forward(self, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return outputs `[texts, places, size]`, and hidden and cell state `[texts, size]` after the last place."""
        weight_hh = functional.dropout(self.weight_hh, self.weight_drop, self.training)
        weights = [self.weight_ih, weight_hh, self.bias_ih, self.bias_hh]
        before = [hidden.unsqueeze(0).contiguous(), cell.unsqueeze(0).contiguous()]
        # cuDNN passes gradients back only where it runs as in training; there is no dropout of its own here.
        train = self.training or torch.is_grad_enabled()
        with warnings.catch_warnings(), ExitStack() as stack:
            if inputs.is_cuda:
                warnings.filterwarnings("ignore", _COPIED)
            elif inputs.device.type == "cpu":  # few have an LSTM in bfloat16
                stack.enter_context(torch.autocast("cpu", enabled=False))
                inputs, *before = (part.to(weight_hh.dtype) for part in (inputs, *before))
            outputs, hidden, cell = torch.lstm(inputs, before, weights, True, 1, 0.0, train, False, True)
        return outputs, hidden.squeeze(0), cell.squeeze(0)


@dataclass
class AwdLstmOutput(CausalLMOutput):
    """As `CausalLMOutput`, with the `state` `[texts, 2 · sum of widths]` after the last place, without a graph."""

    state: Tensor | None = None


class AwdLstmForCausalLM(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The language model; `forward` says how state is carried."""

    config_class = AwdLstmConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _tied_weights_keys = {"decoder.weight": "embedding.weight"}  # noqa: RUF012 - as Transformers declares it
    # DDP would send the first process's state, of other texts, to all of them before each pass.
    _ddp_params_and_buffers_to_ignore = ("training_state", "evaluation_state")

    def __init__(self, config: AwdLstmConfig) -> None:
        super().__init__(config)
        inputs = [config.embedding_size, *config.widths[:-1]]
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.layers = nn.ModuleList(
            WeightDropLSTM(size, width, config.weight_drop) for size, width in zip(inputs, config.widths, strict=True)
        )
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)
        # Buffers, since these move in a defended step as in a stock one: all passes start from the same state, and
        # the clean pass alone leaves one. Two of them, so that evaluating in the middle of an epoch costs nothing.
        for name in self._ddp_params_and_buffers_to_ignore:
            self.register_buffer(name, torch.zeros(0, 2 * sum(config.widths)), persistent=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forget_state(self) -> None:
        """Keep no longer where texts ended: copies on several processes, which read other texts, are alike then."""
        for name in self._ddp_params_and_buffers_to_ignore:
            setattr(self, name, getattr(self, name)[:0].clone())

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """Return the softmax's matrix."""
        return self.decoder

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, WeightDropLSTM):
            bound = 1 / math.sqrt(module.size)
            for parameter in module.parameters():
                initialization.uniform_(parameter, -bound, bound)
        elif isinstance(module, nn.Embedding):
            initialization.uniform_(module.weight, -self.config.initializer_range, self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            initialization.uniform_(module.weight, -self.config.initializer_range, self.config.initializer_range)
            initialization.zeros_(module.bias)
        elif module is self:
            for name in self._ddp_params_and_buffers_to_ignore:
                initialization.zeros_(getattr(self, name))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        continues: Tensor | None = None,
        state: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> AwdLstmOutput:
        """Predict the next word at each place.

        A batch begins with a state of zeros, unless it says otherwise: with `continues` each text in which it is
        true goes on from where the text in its place of the last such batch ended, and the model keeps where this
        one ends; in training and in evaluation apart. With `state` it begins there, and nothing is kept. Gradients
        never go back beyond a batch.

        Args:
            input_ids: Words, `[texts, places]`.
            labels: Words, of which the next one is predicted at each place; −100 for none. Or:
            shift_labels: What is to be predicted at each place, the last one too.
            continues: Which texts go on, `[texts]`.
            state: The state to begin with, `[texts, 2 · sum of widths]`: hidden and cell state of each layer.
            num_items_in_batch: How many predictions the loss is divided by. None for those of this batch.
            **kwargs: Ignored, such as an attention mask: padding may stand at the end alone.

        Returns:
            The mean loss in nats if there are labels (in training with both regularisations), logits and state.

        Raises:
            ValueError: Both `continues` and `state`; or texts go on, and the last batch had another number of them.
        """
        begin = self._begin(len(input_ids), continues, state)
        embedded = self.embedding(input_ids)
        if self.training and self.config.embedding_dropout:
            words = embedded.new_ones(self.config.vocab_size, 1)
            embedded = embedded * functional.embedding(
                input_ids, functional.dropout(words, self.config.embedding_dropout)
            )
        outputs = locked_dropout(embedded, self.config.input_dropout, self.training)
        parts = torch.split(begin.to(outputs.dtype), [width for width in self.config.widths for _ in range(2)], dim=1)
        ends = []
        for index, layer in enumerate(self.layers):
            if index:
                outputs = locked_dropout(outputs, self.config.hidden_dropout, self.training)
            outputs, hidden, cell = layer(outputs, parts[2 * index], parts[2 * index + 1])
            ends += [hidden, cell]
        end = torch.cat(ends, dim=1).detach()
        if continues is not None:
            self._keep(end)
        dropped = locked_dropout(outputs, self.config.output_dropout, self.training)
        logits = self.decoder(dropped)
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
            if self.training:
                targets = cast(Tensor, labels)[..., 1:] if shift_labels is None else shift_labels
                # The mean over a step's micro-batches, as the loss is, each with the weight of its words.
                share = 1.0 if num_items_in_batch is None else targets.ne(-100).sum() / num_items_in_batch
                loss = loss + share * self._regularization(outputs, dropped)
        return AwdLstmOutput(loss=loss, logits=logits, state=end)

    def _begin(self, texts: int, continues: Tensor | None, state: Tensor | None) -> Tensor:
        if continues is not None and state is not None:
            raise ValueError("state: expected continues or state, got both; state alone begins where it says")
        if state is not None:
            return state
        kept: Tensor = getattr(self, self._state_name)
        if continues is not None and len(kept) == texts:
            # Not a product: what is not finite must not reach a new text.
            return torch.where(continues.bool().unsqueeze(1), kept, torch.zeros_like(kept))
        if continues is not None and bool(continues.any()):
            raise ValueError(
                f"continues: expected {texts} texts in the batch before, got {len(kept)}; let all batches have the "
                "same number of texts, and the first say that none goes on"
            )
        return kept.new_zeros(texts, kept.shape[1])

    @property
    def _state_name(self) -> str:
        return "training_state" if self.training else "evaluation_state"

    def _keep(self, end: Tensor) -> None:
        # A new tensor, not a write: the other passes of the step still want the one that this pass began with.
        setattr(self, self._state_name, end)

    def _regularization(self, outputs: Tensor, dropped: Tensor) -> Tensor:
        total: Tensor = self.config.activation_regularization * dropped.float().square().mean()
        if outputs.shape[1] > 1 and self.config.temporal_regularization:
            change = outputs[:, 1:].float() - outputs[:, :-1].float()
            total = total + self.config.temporal_regularization * change.square().mean()
        return total


AutoConfig.register(AwdLstmConfig.model_type, AwdLstmConfig, exist_ok=True)
AutoModelForCausalLM.register(AwdLstmConfig, AwdLstmForCausalLM, exist_ok=True)
AwdLstmConfig.register_for_auto_class()  # type: ignore[no-untyped-call]
AwdLstmForCausalLM.register_for_auto_class("AutoModelForCausalLM")  # type: ignore[no-untyped-call]
