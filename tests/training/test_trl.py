"""TRL's Trainers behind the mixin."""

from __future__ import annotations

import functools
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers as tf
from local_models import word_tokenizer
from longhand import longhand
from torch import nn
from trainings import UNMOVED, KeepGradients, logs_of

from hf_parcor import (
    SAM,
    CorruptionConstraint,
    GradientCorruption,
    GradientPenalty,
    MultiStepRisk,
    ParameterDefenseMixin,
    PublishingMixin,
    Quantization,
)

REASON = "an optional dependency of the tests, in the extra dev"
datasets = pytest.importorskip("datasets", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)
trl = pytest.importorskip("trl", reason=REASON)

# TRL sets the flag under its old name, and asks Transformers for the old attribute
EPSILON, STEPS = 0.3, 2
L2 = CorruptionConstraint(epsilon=EPSILON)
DEFENSE = MultiStepRisk(L2, steps=STEPS)
EXACT_TO_FLOAT32 = 2e-5  # TRL's fused head sums in float32


class DefendedSFTTrainer(ParameterDefenseMixin, trl.SFTTrainer):
    pass


class DefendedGRPOTrainer(ParameterDefenseMixin, trl.GRPOTrainer):
    pass


class DefendedDPOTrainer(ParameterDefenseMixin, trl.DPOTrainer):
    pass


class DefendedKTOTrainer(ParameterDefenseMixin, trl.KTOTrainer):
    pass


class DefendedRewardTrainer(ParameterDefenseMixin, trl.RewardTrainer):
    pass


SFT_ROWS = {"text": ["a b c d", "e f g h i j", "k l m", "n o p q r s t", "a z", "c d e"]}
DPO_ROWS = {
    "prompt": ["a b", "c d e", "f", "g h", "i j", "k"],
    "chosen": ["x y", "z", "a b c", "d e", "f g", "h"],
    "rejected": ["q r s", "t u", "v", "w", "x y z", "a"],
}
KTO_ROWS = {
    "prompt": DPO_ROWS["prompt"],
    "completion": DPO_ROWS["chosen"],
    "label": [True, False, True, False, True, False],
}
TRAINERS = {
    "sft": (trl.SFTTrainer, DefendedSFTTrainer, trl.SFTConfig, SFT_ROWS, ["entropy", "mean_token_accuracy"]),
    "dpo": (trl.DPOTrainer, DefendedDPOTrainer, trl.DPOConfig, DPO_ROWS, ["rewards/margins", "logps/chosen"]),
    "kto": (trl.KTOTrainer, DefendedKTOTrainer, trl.KTOConfig, KTO_ROWS, ["logps/chosen", "logps/rejected"]),
    "reward": (
        trl.RewardTrainer,
        DefendedRewardTrainer,
        trl.RewardConfig,
        {name: DPO_ROWS[name] for name in ("chosen", "rejected")},
        ["margin", "mean_reward"],
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[PAD]", "[UNK]", "[EOS]", *"abcdefghijklmnopqrstuvwxyz"]
    return word_tokenizer(words, pad_token="[PAD]", eos_token="[EOS]")


def tiny_llama(dtype=torch.float32, seed=0, kind=tf.LlamaForCausalLM, **settings):
    tf.set_seed(seed)
    sizes = {**tiny.decoder(30, 16, inner=24), "bos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 2048}
    return kind(tf.LlamaConfig(**sizes, initializer_range=0.3, **settings)).to(dtype)


@pytest.fixture
def fine_tune(arguments, tokenizer):
    def run(trainer_class, config, rows, model=None, options=None, **extra):
        if issubclass(trainer_class, (trl.DPOTrainer, trl.KTOTrainer)):
            extra["ref_model"] = tiny_llama(seed=1)
        if model is None and issubclass(trainer_class, trl.RewardTrainer):
            model = tiny_llama(kind=tf.LlamaForSequenceClassification, num_labels=1)
        trainer = trainer_class(
            model=tiny_llama() if model is None else model,
            args=arguments(config, **{"bf16": False, **(options or {})}),
            train_dataset=datasets.Dataset.from_dict(rows),
            processing_class=tokenizer,
            **extra,
        )
        trainer.train()
        return trainer

    return run


@pytest.mark.parametrize("name", TRAINERS)
def test_without_steps_it_is_the_stock_trainer_bit_for_bit(name, fine_tune):
    stock_class, defended_class, config, rows, _ = TRAINERS[name]
    stock = fine_tune(stock_class, config, rows)
    ours = fine_tune(defended_class, config, rows, defense=MultiStepRisk(L2, steps=0))
    assert logs_of(ours) == logs_of(stock) != []
    for (key, weight), other in zip(stock.model.named_parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(weight, other), key


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("defense", [DEFENSE, SAM(L2)], ids=lambda defense: type(defense).__name__)
def test_its_own_metrics_are_those_of_the_first_pass(name, defense, fine_tune):
    """At the first step both see the same weights; tokens are counted once, not once a pass."""
    stock_class, defended_class, config, rows, metrics = TRAINERS[name]
    options = {"learning_rate": 0.0}
    plain = logs_of(fine_tune(stock_class, config, rows, options=options))
    logs = logs_of(fine_tune(defended_class, config, rows, options=options, defense=defense))
    assert len(logs) == len(plain) > 1
    for ours, stock in zip(logs, plain, strict=True):
        assert {key: ours[key] for key in ("num_tokens", *metrics)} == {k: stock[k] for k in ("num_tokens", *metrics)}
        assert ours["loss_clean"] == pytest.approx(stock["loss"], rel=1e-6)
        assert ours["loss_corrupted"] > ours["loss_clean"]


class Passes(KeepGradients):
    """Keeps the batch of every forward that trains, beside the gradients."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module, args, kwargs):
        if module.training and torch.is_grad_enabled():
            self.batches.append(dict(kwargs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss_type", "adapters", "checkpointing"),
    [("nll", False, True), ("nll", True, True), ("nll", True, False), ("dft", False, False)],
    ids=["recomputed", "LoRA, recomputed", "LoRA, stored", "DFT, stored"],
)
def test_gradient_of_fine_tuning_is_that_of_the_risk(fine_tune, loss_type, adapters, checkpointing):
    """Activations are recomputed in backward by TRL's default: at the corrupted weights, or the gradient is wrong."""
    keep, model = Passes(), tiny_llama(torch.float64)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False) if adapters else None
    options = {
        "loss_type": loss_type,
        "gradient_checkpointing": checkpointing,
        "max_steps": 1,
        **UNMOVED,
    }
    trainer = fine_tune(
        DefendedSFTTrainer,
        trl.SFTConfig,
        SFT_ROWS,
        model,
        options,
        peft_config=config,
        callbacks=[keep],
        defense=DEFENSE,
    )
    reference = tiny_llama(torch.float64)
    if adapters:
        reference = peft.get_peft_model(reference, config)
        reference.load_state_dict(trainer.model.state_dict())
        assert all("lora_" in name for name in trainer.defended_parameters())
    assert adapters or len(keep.batches) == STEPS + 1  # what is below the adapters is tried out, and run apart
    inputs = {key: keep.batches[0][key] for key in ("input_ids", "attention_mask")}
    labels = keep.batches[0]["labels"][:, 1:]

    def loss_of(call):
        logits = call(**inputs).logits[:, :-1]
        each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        each = each * (-each).exp().detach() if loss_type == "dft" else each
        return each.sum() / (labels != -100).sum()

    expected = longhand(reference, loss_of, [1 / (STEPS + 1)] * (STEPS + 1), EPSILON)
    assert keep.kept[0].keys() == expected.keys() == trainer.defended_parameters().keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, gradient in keep.kept[0].items():
        torch.testing.assert_close(gradient, expected[name], rtol=EXACT_TO_FLOAT32, atol=EXACT_TO_FLOAT32 * scale)


OPTIONS = {
    "packed": {"packing": True, "max_length": 8, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "cut and packed": {"packing": True, "max_length": 8, "packing_strategy": "wrapped"},
    "smoothed": {"label_smoothing_factor": 0.1, "padding_free": True, "max_length": None},
    "selective": {"gradient_checkpointing_kwargs": {"selective": True}, "loss_type": "dft"},
    "offloaded": {"activation_offloading": True},
}


@pytest.fixture
def offloading(monkeypatch):
    """Let TRL offload activations from the CPU to the CPU: its bookkeeping is what can go wrong."""
    module = sys.modules[trl.SFTTrainer.__module__]
    whole = {"use_streams": False, "use_pin_memory": False, "min_offload_size": 0}
    offload = functools.partial(module.get_act_offloading_ctx_manager, **whole)
    monkeypatch.setattr(module, "get_act_offloading_ctx_manager", offload)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args, **kwargs: torch.device("cpu"))
    device = SimpleNamespace(
        synchronize=lambda: None, empty_cache=lambda: None, current_stream=lambda: None, stream=lambda _: nullcontext()
    )
    monkeypatch.setattr(torch, "get_device_module", lambda kind: device)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor`:FutureWarning")
@pytest.mark.parametrize("name", OPTIONS)
def test_laws_of_a_step_under_its_options(name, fine_tune, offloading, caplog):
    """ε to 0 is the stock step; a shared prefix changes nothing; no weight is another after a step that moves none."""
    options = {"max_steps": 1, **UNMOVED}

    def gradient_of(trainer_class, **extra):
        keep, model = Passes(), tiny_llama()
        trainer = fine_tune(
            trainer_class, trl.SFTConfig, SFT_ROWS, model, {**options, **OPTIONS[name]}, callbacks=[keep], **extra
        )
        for (key, weight), before in zip(model.named_parameters(), tiny_llama().parameters(), strict=True):
            assert torch.equal(weight, before), key
        return keep.kept[0], trainer.shared_prefix is not None if extra else False

    stock, _ = gradient_of(trl.SFTTrainer)
    small, _ = gradient_of(DefendedSFTTrainer, defense=MultiStepRisk(CorruptionConstraint(epsilon=1e-9), steps=1))
    last = {"defense": MultiStepRisk(L2, steps=1), "target_modules": "last-decoder-layer"}
    shared, is_shared = gradient_of(DefendedSFTTrainer, **last)
    whole, _ = gradient_of(DefendedSFTTrainer, **last, reuse_prefix=False)
    scale = max(float(value.abs().max()) for value in stock.values())
    for key, value in stock.items():
        torch.testing.assert_close(small[key], value, rtol=1e-6, atol=1e-6 * scale)
        torch.testing.assert_close(shared[key], whole[key], rtol=1e-5, atol=1e-5 * scale)
    assert max(float((whole[key] - value).abs().max()) for key, value in stock.items()) > 0.1 * scale
    offloads = "activation_offloading" in OPTIONS[name]  # what the prefix keeps is dropped with the pass that made it
    assert is_shared is not offloads
    assert ("Every pass runs all of the model" in caplog.text) is offloads


def test_adapters_train_and_the_model_under_them_stays_bit_for_bit(fine_tune):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    trainer = fine_tune(DefendedSFTTrainer, trl.SFTConfig, SFT_ROWS, peft_config=config, defense=DEFENSE)
    merged = {name.replace(".base_layer", ""): p for name, p in trainer.model.base_model.model.named_parameters()}
    for name, weight in tiny_llama().named_parameters():
        assert torch.equal(merged[name], weight), name
    assert any(parameter.any() for name, parameter in merged.items() if "lora_B" in name)


class MeasuredSFTTrainer(ParameterDefenseMixin, PublishingMixin, trl.SFTTrainer):
    """Notes, beside each of its evaluations, how many tokens are right at the weights as they are then."""

    def evaluate(self, *args, **kwargs):
        shares = []
        for batch in self.get_eval_dataloader():
            with torch.no_grad():
                logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"][:, 1:]
            right = (logits[:, :-1].argmax(-1) == labels)[labels != -100]
            shares.append(float(right.float().mean()))
        self.by_hand.append(sum(shares) / len(shares))
        return super().evaluate(*args, **kwargs)


def test_what_is_measured_is_what_its_own_evaluation_finds(fine_tune, bits_of):
    """Its averages are those of the corrupted evaluation alone, not of the passes that found the corruption too."""
    rows = datasets.Dataset.from_dict(SFT_ROWS)
    options = {"per_device_eval_batch_size": 4, "learning_rate": 0.1}
    trainer = fine_tune(
        MeasuredSFTTrainer, trl.SFTConfig, SFT_ROWS, options=options, eval_dataset=rows, defense=DEFENSE
    )
    before, trainer.by_hand = bits_of(trainer.model), []
    trainer.evaluate_robustness([GradientCorruption(CorruptionConstraint(epsilon=5.0)), Quantization(3)])
    (record,) = trainer.robustness_records.values()
    assert bits_of(trainer.model) == before
    assert set(record.clean.metrics) == {"loss", "entropy", "mean_token_accuracy"}, "tokens are those of the training"
    found = [row.mean("mean_token_accuracy") for row in record.rows()]
    assert found == pytest.approx(trainer.by_hand)
    assert len(set(found)) > 1


def letters(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


def test_all_passes_see_the_completions_that_were_generated_once(arguments, tokenizer):
    """The loss of GRPO is a surrogate whose value says nothing, nor does its sharpness; its gradient does."""
    runs = []
    for trainer_class, extra in ((trl.GRPOTrainer, {}), (DefendedGRPOTrainer, {"defense": DEFENSE})):
        model, passes = tiny_llama(), Passes()
        options = {"num_generations": 4, "max_completion_length": 6, "gradient_accumulation_steps": 2, "max_steps": 2}
        trainer = trainer_class(
            model=model,
            reward_funcs=letters,
            args=arguments(trl.GRPOConfig, bf16=False, learning_rate=0.0, **options),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["a b", "c d", "e f", "g h"]}),
            processing_class=tokenizer,
            callbacks=[passes],
            **extra,
        )
        trainer.train()
        runs.append((trainer, [batch["input_ids"] for batch in passes.batches]))
    (stock, once), (ours, repeated) = runs
    assert len(once) == 2 * 2
    assert len(repeated) == (STEPS + 1) * len(once)
    for index, ids in enumerate(repeated):
        assert torch.equal(ids, once[index // (STEPS + 1)])
    for defended, plain in zip(logs_of(ours), logs_of(stock), strict=True):
        for key in ("num_tokens", "reward", "completions/mean_length", "entropy"):
            assert defended[key] == plain[key]


def test_a_part_of_what_is_no_list_of_examples_is_refused(fine_tune, arguments, tokenizer):
    """Pairs lie apart in their batch, and the loss of GRPO is divided by what all completions have."""
    defense = MultiStepRisk(L2, steps=1, batch_share=0.5)
    for name in ("dpo", "reward"):
        _, defended_class, config, rows, _ = TRAINERS[name]
        with pytest.raises(ValueError, match="batch_share: expected 1 with TRL's DataCollatorForPreference"):
            fine_tune(defended_class, config, rows, defense=defense)
    trainer = DefendedGRPOTrainer(
        model=tiny_llama(),
        reward_funcs=letters,
        args=arguments(trl.GRPOConfig, bf16=False, num_generations=4, max_completion_length=6, max_steps=1),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a b", "c d", "e f", "g h"]}),
        processing_class=tokenizer,
        defense=defense,
    )
    with pytest.raises(ValueError, match="batch_share: expected a batch that leaves it to the Trainer"):
        trainer.train()
    for weight, before in zip(trainer.model.parameters(), tiny_llama().parameters(), strict=True):
        assert torch.equal(weight, before)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputed", "stored"])
def test_fused_head_has_no_second_derivative(fine_tune, checkpointing):
    """The gradient penalty needs one: it stops at the first step, and leaves the weights as they were."""
    model = tiny_llama()
    with pytest.raises(RuntimeError, match=r"don't support automatic differentiation|create_graph=True"):
        fine_tune(
            DefendedSFTTrainer,
            trl.SFTConfig,
            SFT_ROWS,
            model,
            {"gradient_checkpointing": checkpointing},
            defense=GradientPenalty(weight=0.1),
        )
    for weight, before in zip(model.parameters(), tiny_llama().parameters(), strict=True):
        assert torch.equal(weight, before)
