"""The LSTM language model: against longhand, its state from batch to batch, and what a defended step does to both."""

from __future__ import annotations

import math

import pytest
import torch
from for_each import for_each
from modeling_awd_lstm import AwdLstmConfig, AwdLstmForCausalLM
from torch.nn import functional
from trainings import IN_ORDER, QUIET
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

from hf_parcor import (
    ACRT,
    AWP,
    SAM,
    CorruptionConstraint,
    CorruptionRisk,
    GradientCorruption,
    GradientPenalty,
    MultiStepRisk,
    ParameterDefenseTrainer,
    Quantization,
    corrupted,
)

WORDS, TEXTS, PLACES = 13, 3, 5
SIZES = {"vocab_size": WORDS, "embedding_size": 4, "hidden_size": 6, "num_hidden_layers": 3}
NO_DROPOUT = dict.fromkeys(
    ("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_drop"), 0.0
)
RATES = {
    "embedding_dropout": 0.1,
    "input_dropout": 0.2,
    "hidden_dropout": 0.3,
    "output_dropout": 0.4,
    "weight_drop": 0.5,
}
STRONG = {"initializer_range": 1.0}


def model_of(**settings):
    torch.manual_seed(0)
    model = AwdLstmForCausalLM(AwdLstmConfig(**{**SIZES, **STRONG, **settings})).double()
    torch.nn.init.normal_(model.decoder.bias)
    return model


def words(*shape):
    return torch.randint(WORDS, shape, generator=torch.Generator().manual_seed(1))


def longhand(model, ids, masks=None, state=None):
    """Return log-probabilities after each place, cell by cell and gate by gate, and what the last layer returned."""
    keep = masks or {}
    vectors = model.embedding.weight[ids]
    if masks:
        vectors = vectors * keep["words"][ids] * keep["input"]
    states = [] if state is None else list(state.split([w for w in model.config.widths for _ in range(2)], 1))
    for number, layer in enumerate(model.layers):
        h, c = states[2 * number : 2 * number + 2] or (vectors.new_zeros(len(ids), layer.size) for _ in range(2))
        weight = layer.weight_hh * keep["weights"][number] if masks else layer.weight_hh
        if number and masks:
            vectors = vectors * keep["hidden"][number - 1]
        outputs = []
        for place in range(ids.shape[1]):
            gates = vectors[:, place] @ layer.weight_ih.T + layer.bias_ih + h @ weight.T + layer.bias_hh
            i, f, g, o = gates.chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        vectors = torch.stack(outputs, dim=1)
    dropped = vectors * keep["output"] if masks else vectors
    return (dropped @ model.embedding.weight.T + model.decoder.bias).log_softmax(-1), vectors, dropped


@pytest.fixture
def drawn(monkeypatch):
    """Record what each call of dropout gets and returns."""
    calls = []
    dropout = functional.dropout

    def recorded(inputs, p=0.5, training=True, inplace=False):
        outputs = dropout(inputs, p, training, inplace)
        calls.append((inputs.detach().clone(), outputs.detach().clone(), p))
        return outputs

    monkeypatch.setattr(functional, "dropout", recorded)
    return calls


def test_without_dropout_it_is_the_longhand():
    model, ids = model_of(**NO_DROPOUT).eval(), words(TEXTS, PLACES)
    expected, _, _ = longhand(model, ids)
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.logits.log_softmax(-1), expected)
    likelihood = expected[:, :-1].gather(-1, ids[:, 1:, None])
    torch.testing.assert_close(output.loss, -likelihood.mean(), check_dtype=False)


def test_masks_are_locked_and_the_loss_in_training_is_the_longhand(drawn):
    settings = {"activation_regularization": 2.0, "temporal_regularization": 1.0}
    model, ids = model_of(**RATES, **settings).train(), words(TEXTS, PLACES)
    output = model(ids, labels=ids)
    kept = [after / before for before, after, _ in drawn]
    assert [rate for _, _, rate in drawn] == [0.1, 0.2, 0.5, 0.3, 0.5, 0.3, 0.5, 0.4]
    locked = [kept[place] for place in (1, 3, 5, 7)]
    assert [mask.shape for mask in locked] == [(TEXTS, 1, width) for width in (4, 6, 6, 4)]
    for mask, (_, _, rate) in zip(kept, drawn, strict=True):
        torch.testing.assert_close(mask[mask != 0], torch.full_like(mask[mask != 0], 1 / (1 - rate)))
    for layer, place in zip(model.layers, (2, 4, 6), strict=True):
        assert torch.equal(drawn[place][0], layer.weight_hh)  # the raw weight
        assert 0 < (kept[place] == 0).double().mean() < 1
    masks = {"words": kept[0], "input": kept[1], "output": kept[7], "weights": kept[2:7:2], "hidden": kept[3:6:2]}
    expected, last, dropped = longhand(model, ids, masks)
    torch.testing.assert_close(output.logits.log_softmax(-1), expected)
    loss = -expected[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    loss = loss + 2 * (dropped**2).mean() + ((last[:, 1:] - last[:, :-1]) ** 2).mean()
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-5, atol=1e-5)  # Transformers computes in float32


def test_the_raw_weight_is_trained_and_corrupted(drawn):
    model, ids = model_of(**{**NO_DROPOUT, "weight_drop": 0.5}).train(), words(TEXTS, PLACES)
    weight = model.layers[0].weight_hh
    assert all(parameter.is_leaf for parameter in model.parameters())
    model(ids, labels=ids).loss.backward()
    gone = drawn[0][1] == 0
    assert torch.equal(weight.grad == 0, gone)
    before = weight.detach().clone()
    with corrupted({"w": weight}, {"w": torch.ones_like(weight)}):
        drawn.clear()
        model(ids)
        assert torch.equal(drawn[0][0], before + 1)
        by_corruption = model.eval()(ids).logits
    assert torch.equal(weight, before)
    with torch.no_grad():
        weight += 1
    assert torch.equal(model(ids).logits, by_corruption)


@for_each("cuts", [(2,), (1, 4), (1, 2, 3, 4)])
def test_pieces_of_a_text_are_the_whole_text(cuts):
    model, ids = model_of(**NO_DROPOUT).eval(), words(TEXTS, PLACES)
    whole = model(ids)
    by_flag, by_state, state = [], [], None
    for number, piece in enumerate(ids.tensor_split(cuts, dim=1)):
        by_flag.append(model(piece, continues=torch.full((TEXTS,), number > 0)))
        by_state.append(model(piece, state=whole.state.new_zeros(whole.state.shape) if state is None else state))
        state = by_state[-1].state
    for outputs in (by_flag, by_state):
        torch.testing.assert_close(torch.cat([one.logits for one in outputs], dim=1), whole.logits)
        torch.testing.assert_close(outputs[-1].state, whole.state)


def test_only_texts_that_go_on_do():
    model, (first, second) = model_of(**NO_DROPOUT).eval(), words(2, TEXTS, PLACES)
    model(first, continues=torch.zeros(TEXTS))
    goes_on = torch.tensor([True, False, True])
    mixed = model(second, continues=goes_on).logits
    torch.testing.assert_close(mixed[1], model(second).logits[1])
    torch.testing.assert_close(mixed[goes_on], model(torch.cat([first, second], 1)).logits[goes_on, PLACES:])


def test_what_is_not_finite_does_not_reach_a_new_text():
    model, ids = model_of(**NO_DROPOUT).eval(), words(TEXTS, PLACES)
    clean = model(ids).logits
    model.evaluation_state = torch.full((TEXTS, 32), math.nan)
    assert torch.equal(model(ids, continues=torch.zeros(TEXTS)).logits, clean)


def test_evaluation_does_not_move_the_state_of_training():
    model, (first, second) = model_of(**NO_DROPOUT), words(2, TEXTS, PLACES)
    model.train()(first, continues=torch.zeros(TEXTS))
    kept = model.training_state.clone()
    model.eval()(second[:2], continues=torch.zeros(2))
    model(second)
    assert torch.equal(model.training_state, kept)
    assert not any("state" in name for name in model.state_dict())


def test_gradients_end_with_the_batch():
    model, (first, second) = model_of(**NO_DROPOUT).train(), words(2, TEXTS, PLACES)
    state = model(first, continues=torch.zeros(TEXTS)).state
    model(second, labels=second, continues=torch.ones(TEXTS)).loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(second, labels=second, state=state.clone()).loss.backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in model.parameters()])


@for_each("shifted", [False, True])
def test_micro_batches_add_up_to_their_batch(shifted):
    """Both regularisations too, where each is divided by the predictions of all."""
    model, ids = model_of(**NO_DROPOUT).train(), words(4, PLACES)

    def loss_of(rows, **total):
        labels = {"shift_labels": rows.roll(-1, 1)} if shifted else {"labels": rows}
        return model(rows, **labels, **total).loss

    total = torch.tensor(4 * (PLACES if shifted else PLACES - 1))
    parts = [loss_of(rows, num_items_in_batch=total) for rows in ids.split([1, 3])]
    torch.testing.assert_close(sum(parts), loss_of(ids), rtol=1e-5, atol=1e-5)


def test_under_autocast_state_goes_on():
    model, ids = model_of(**NO_DROPOUT).float().eval(), words(TEXTS, PLACES)
    whole = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        model(ids[:, :2], continues=torch.zeros(TEXTS))
        second = model(ids[:, 2:], labels=ids[:, 2:], continues=torch.ones(TEXTS))
    torch.testing.assert_close(second.logits.float(), whole[:, 2:], rtol=0.1, atol=0.1)
    assert second.loss.isfinite()


@for_each(
    "settings, says",
    [({"weight_drop": 1.0}, "weight_drop"), ({"hidden_size": 0}, "hidden_size"), ({"input_dropout": -1}, "in")],
)
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(ValueError, match=f"{says}.*: expected .*, got"):
        AwdLstmConfig(**settings)


def test_another_number_of_texts_cannot_go_on():
    model = model_of().eval()
    model(words(TEXTS, PLACES), continues=torch.zeros(TEXTS))
    with pytest.raises(ValueError, match="expected 2 texts in the batch before, got 3"):
        model(words(2, PLACES), continues=torch.ones(2))
    with pytest.raises(ValueError, match="continues or state"):
        model(words(2, PLACES), continues=torch.ones(2), state=torch.zeros(2, 32))


STEPS = 4


def alike(*_):
    """Let every forward pass draw the same masks."""
    torch.manual_seed(7)


def steps_of(tmp_path, model, trainer_class=Trainer, learning_rate=0.1, **options):
    """Train on a text that goes on, one batch a step, each forward pass with the same masks; return the Trainer."""
    model.register_forward_pre_hook(alike)
    ids = words(STEPS, TEXTS, PLACES)
    rows = [
        {"input_ids": row, "labels": row, "continues": torch.tensor(step > 0)}
        for step, batch in enumerate(ids)
        for row in batch
    ]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=TEXTS,
        num_train_epochs=1,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        optim="sgd",
        **IN_ORDER,
        logging_steps=1,
        **QUIET,
    )
    set_seed(0)
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator, **options
    )
    trainer.train()
    return trainer


def radius(epsilon):
    return CorruptionConstraint(p=2, epsilon=epsilon)


@pytest.mark.slow
@for_each("rates", [NO_DROPOUT, RATES])
def test_a_defense_too_small_to_matter_is_the_stock_run(tmp_path, rates):
    stock = steps_of(tmp_path, model_of(**rates))
    ours = steps_of(tmp_path, model_of(**rates), ParameterDefenseTrainer, defense=MultiStepRisk(radius(1e-9), steps=2))
    assert "loss_corrupted" in ours.state.log_history[0]
    torch.testing.assert_close(dict(ours.model.state_dict()), dict(stock.model.state_dict()), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.model.training_state, stock.model.training_state, rtol=1e-6, atol=1e-7)


K1 = MultiStepRisk(radius(2.0), steps=1)


@pytest.mark.slow
@for_each(
    "defense, target_modules",
    [
        (K1, "all"),
        (K1, r"layers\.1"),  # what comes before runs once for all passes
        (K1, r"layers\.2|decoder"),
        (MultiStepRisk(radius(2.0), steps=3), "all"),
        (MultiStepRisk(radius(2.0), steps=1, random_start=True), "all"),
        (ACRT(radius(2.0)), "all"),
        (SAM(radius(2.0)), "all"),
        (AWP(radius(2.0)), "all"),
        (CorruptionRisk([Quantization(2), GradientCorruption(radius(2.0))]), "all"),
        (GradientPenalty(weight=0.1), "all"),
    ],
)
def test_state_is_that_of_the_clean_passes(tmp_path, stock_state, defense, target_modules):
    """With weights that never move, the state after all steps is that of the stock run, whatever the passes were."""
    model = model_of(**NO_DROPOUT)
    settings = {"learning_rate": 0.0, "defense": defense, "target_modules": target_modules}
    ours = steps_of(tmp_path, model, ParameterDefenseTrainer, **settings)
    assert ours.defense_config.defended_steps == STEPS
    assert torch.equal(model.training_state, stock_state)


@pytest.fixture
def stock_state(tmp_path):
    state = steps_of(tmp_path, model_of(**NO_DROPOUT), learning_rate=0.0).model.training_state
    assert state.abs().min() > 0
    return state
