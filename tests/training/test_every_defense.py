"""Every defense inside the real Trainer."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch.nn.utils import parameters_to_vector
from trainings import logs_of
from transformers import BartConfig, BartForConditionalGeneration, Trainer

from hf_parcor import CorruptionConstraint, GaussianNoise, ParameterDefenseTrainer
from hf_parcor.defenses import DEFENSES

WHOLE_PASSES = {"awp", "gradient_penalty"}  # the inputs differ from pass to pass; there is one pass


def share_of_the_last_layer_and_what_follows(model):
    """The lower layer runs once for all passes; embeddings count for nothing in Transformers' estimate."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if "_embeddings." not in name}
    reused = sum(size for name, size in sizes.items() if "layer.0." in name or "embeddings.LayerNorm" in name)
    return 1 - reused / sum(sizes.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFENSES)
@pytest.mark.parametrize("target", ["all", "last-encoder-layer"])
def test_trains_and_logs(tiny_bert, train, defense_of, name, target):
    defense = defense_of(name)
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 6}
    stock = train(Trainer, tiny_bert(dropout=0.0), options)
    ours = train(ParameterDefenseTrainer, tiny_bert(dropout=0.0), options, defense=defense, target_modules=target)
    plain, logs = logs_of(stock), logs_of(ours)
    assert len(logs) == len(plain) == ours.state.global_step
    # Before the first update both see the same weights, and the log of the clean loss must agree.
    assert logs[0]["loss_clean"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert logs[0]["loss"] > plain[0]["loss"]
    assert logs[-1]["loss_clean"] < logs[0]["loss_clean"]
    share = 1.0 if target == "all" or name in WHOLE_PASSES else share_of_the_last_layer_and_what_follows(ours.model)
    cost = 1 + (defense.cost - 1) * share
    assert ours.state.total_flos == pytest.approx(cost * stock.state.total_flos)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFENSES)
def test_stock_before_the_start_epoch(tiny_bert, train, defense_of, name):
    stock = train(Trainer, tiny_bert())
    ours = train(ParameterDefenseTrainer, tiny_bert(), defense=defense_of(name, start_epoch=5.0))
    for first, second in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(first, second)


# What each setting is set to in place of its default; of several processes, and of adapters, others tell.
OTHER = {
    "constraint": CorruptionConstraint(epsilon=0.3),
    "start_epoch": 0.5,
    "interval": 2,
    "batch_share": 0.5,
    "steps": 3,
    "step_size": 0.01,
    "alpha": 0.2,
    "per_tensor": True,
    "random_start": True,
    "input_steps": 2,
    "input_epsilon": 0.5,
    "p": 3.0,
    "weight": 0.5,
    "corruption": [GaussianNoise(0.3)],
    "clean_weight": 0.9,
    "draw_one": True,
    "ramp_epochs": 0.5,
}
ELSEWHERE = {"sync_perturbation", "merge_adapters"}
REFUSED = {("awp", "batch_share")}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFENSES)
def test_every_setting_reaches_the_step(tiny_bert, train, defense_of, name):
    """A run with another value of it ends with other weights, and one with the same values with the same."""
    default = defense_of(name)

    def trained(defense):
        options = {"max_steps": 3, "optim": "sgd"}
        trainer = train(ParameterDefenseTrainer, tiny_bert(dropout=0.0), options, defense=defense)
        return parameters_to_vector(trainer.model.parameters())

    settings = [field.name for field in fields(default) if field.name not in ELSEWHERE]
    told = [setting for setting in settings if (name, setting) not in REFUSED]
    weights = trained(default)
    assert torch.equal(weights, trained(defense_of(name)))
    others = {setting: trained(replace(default, **{setting: OTHER[setting]})) for setting in told}
    assert not [setting for setting, other in others.items() if torch.equal(weights, other)]


@pytest.mark.parametrize("name", DEFENSES)
def test_layers_that_take_no_part_are_not_corrupted(train, defense_of, name):
    """LayerDrop may skip all that is selected: then there is no gradient to climb along, and none to penalise."""
    layers = {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 8, "decoder_layerdrop": 1.0}
    heads = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 8}
    model = BartForConditionalGeneration(BartConfig(vocab_size=30, d_model=8, **heads, **layers))
    rows = [{"input_ids": torch.randint(3, 30, (6,)), "labels": torch.randint(3, 30, (5,))} for _ in range(4)]
    trainer = train(
        ParameterDefenseTrainer, model, rows=rows, defense=defense_of(name), target_modules="last-decoder-layer"
    )
    (entry,) = logs_of(trainer)
    if name != "corruption":  # which needs no gradient to round weights that nothing reads
        assert entry["corruption_norm"] == 0
    assert entry["loss"] == pytest.approx(entry["loss_clean"], rel=0.1)
    assert entry["grad_norm"] > 0
