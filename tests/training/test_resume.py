"""A run that is interrupted and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as tf
from for_each import for_each
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_parcor import SAM, CorruptionConstraint, MultiStepRisk, ParameterDefenseTrainer
from hf_parcor.defenses import DEFENSES
from hf_parcor.training import checkpoint_to_resume

LOGGED = ("loss", "loss_clean", "loss_corrupted", "sharpness", "corruption_norm", "corruption_norm_asked", "grad_norm")
TWO_EPOCHS = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
STEPS = 6  # 12 rows in batches of 2, accumulated by 2: 3 steps an epoch
SIX_SHORT_STEPS = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}


K1 = MultiStepRisk(CorruptionConstraint(epsilon=0.2), steps=1)


class Interrupt(TrainerCallback):
    """Raises KeyboardInterrupt in the step after so many steps."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            raise KeyboardInterrupt


@pytest.fixture
def run(labelled_rows, arguments, tiny_bert, tmp_path):
    """Train in a folder of its own; returns the trainer."""

    def train(
        folder,
        options,
        trainer_class=ParameterDefenseTrainer,
        kind=TrainingArguments,
        resume=None,
        interrupt=None,
        rows=12,
        **extra,
    ) -> Trainer:
        args = arguments(kind, output_dir=str(tmp_path / folder), **{**TWO_EPOCHS, **options})
        trainer = trainer_class(model=tiny_bert(), args=args, train_dataset=labelled_rows[:rows], **extra)
        if interrupt is None:
            trainer.train(resume_from_checkpoint=resume)
        else:
            trainer.add_callback(Interrupt(interrupt))
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        return trainer

    return train


@pytest.fixture
def interrupted(run, tmp_path):
    """Train until a step in the folder "interrupted"; returns its last checkpoint."""

    def train(at, options, save_steps=None, **extra) -> str:
        save_steps = save_steps or at
        saving = {**options, "save_strategy": "steps", "save_steps": save_steps}
        run("interrupted", saving, interrupt=at, **extra)
        torch.manual_seed(12345)  # the next process knows nothing of this one
        checkpoint = tmp_path / "interrupted" / f"checkpoint-{at - at % save_steps}"
        assert get_last_checkpoint(str(tmp_path / "interrupted")) == str(checkpoint)
        return str(checkpoint)

    return train


def entries(trainer):
    """Return the log entries of training, without what depends on the clock."""
    logged = [{k: entry[k] for k in ("step", *LOGGED) if k in entry} for entry in trainer.state.log_history]
    return [entry for entry in logged if "loss" in entry]


def assert_same_run(first, second):
    """Compare everything that a run leaves behind, to the last bit."""
    states = [
        {
            "weights": dict(trainer.model.state_dict()),
            "optimizer": trainer.optimizer.state_dict()["state"],
            "scheduler": trainer.lr_scheduler.state_dict(),
            "logs": entries(trainer),
            "operations": trainer.state.total_flos,
            "step": trainer.state.global_step,
        }
        for trainer in (first, second)
    ]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer_class", "at"), [(Trainer, 4), *((ParameterDefenseTrainer, at) for at in range(1, STEPS))]
)
def test_interrupted_at_any_step(run, interrupted, trainer_class, at):
    """With dropout, accumulation, at the end of an epoch and in its middle; the stock Trainer keeps this promise."""
    whole = run("whole", {}, trainer_class)
    again = run("again", {}, trainer_class, resume=interrupted(at, {}, trainer_class=trainer_class))
    assert len(entries(whole)) == STEPS
    assert_same_run(again, whole)
    assert ("loss_clean" in entries(again)[-1]) == (trainer_class is ParameterDefenseTrainer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "at"),
    [
        *((name, {}, 2) for name in DEFENSES),
        ("multi_step_risk", {"random_start": True, "steps": 1}, 4),
        ("multi_step_risk", {"start_epoch": 1.0}, 2),
        ("multi_step_risk", {"start_epoch": 1.0}, 3),
        ("sam", {"start_epoch": 1 / 3}, 4),
    ],
)
def test_every_defense(run, interrupted, defense_of, name, settings, at):
    """Also with a start that is drawn from the global generator, before and after the start epoch."""
    defense = defense_of(name, **settings)
    options = {**SIX_SHORT_STEPS, "max_steps": 5}
    whole = run("whole", options, defense=defense)
    again = run("again", options, resume=interrupted(at, options, defense=defense), defense=defense)
    assert_same_run(again, whole)
    first = int(3 * defense.start_epoch)
    assert ["loss_corrupted" in entry for entry in entries(again)] == [step >= first for step in range(5)]


WINDOWS = {"logging_steps": 3, "save_strategy": "steps", "save_steps": 2, **SIX_SHORT_STEPS}


@for_each("at", [1, 2])
def test_a_first_batch_that_is_its_own_part(run, interrupted, at):
    """Of 9 rows the third batch has one, which shows no rows of the shared prefix: a later one does."""
    settings = {"defense": SAM(CorruptionConstraint(epsilon=0.1), batch_share=0.5), "rows": 9}
    settings["target_modules"] = "last-encoder-layer"
    options = {"max_steps": 5, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}
    whole = run("whole", options, **settings)
    again = run("again", options, resume=interrupted(at, options, **settings), **settings)
    assert again.shared_prefix.rows
    assert_same_run(again, whole)


VISION = {**tiny.encoder(30, 8, inner=16), "image_size": 8, "patch_size": 4, "num_labels": 2}
del VISION["vocab_size"]
RENAMED = {
    "ViT": lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION)),
    "DINOv2": lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**VISION)),
    "BERT": lambda: tf.BertForSequenceClassification(tf.BertConfig(**tiny.encoder(30, 8, inner=16))),
}


@pytest.mark.slow
@for_each("name", RENAMED)
def test_weights_that_are_saved_under_other_names(name, arguments, tmp_path, caplog):
    """As those of ViT, of which the stock Trainer loads the head alone; both ways to load have all of them."""
    caplog.clear()
    torch.manual_seed(1)
    images = [{"pixel_values": torch.randn(3, 8, 8), "labels": index % 2} for index in range(8)]
    texts = [{"input_ids": torch.randint(30, (6,)), "labels": index % 2} for index in range(8)]
    rows = texts if name == "BERT" else images

    def train(folder, resume=None, **options):
        tf.set_seed(0)
        args = arguments(output_dir=str(tmp_path / folder), num_train_epochs=2, **options)
        trainer = ParameterDefenseTrainer(RENAMED[name](), args, train_dataset=rows, eval_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict(), trainer.state

    whole, _ = train("whole", save_strategy="steps", save_steps=1)
    again, _ = train("again", str(tmp_path / "whole" / "checkpoint-2"), save_strategy="no")
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    steps = {**dict.fromkeys(("save_strategy", "eval_strategy"), "steps"), "save_steps": 1, "eval_steps": 1}
    last, state = train(
        "best", **steps, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True
    )
    best = type(RENAMED[name]()).from_pretrained(state.best_model_checkpoint)
    assert state.best_global_step < state.global_step
    torch.testing.assert_close(last, best.state_dict(), rtol=0, atol=0)
    assert "missing keys" not in caplog.text


def test_stock_trainer_forgets_the_loss_of_steps_before_the_checkpoint(run):
    """What ours is held to: after a resume at step 2, the entry of step 3 is the loss of step 3 alone."""
    run("interrupted", WINDOWS, Trainer, interrupt=2)
    resumed = entries(run("interrupted", WINDOWS, Trainer, resume=True))
    assert [entry["step"] for entry in resumed] == [3, 6]
    assert resumed[0]["loss"] == entries(run("single", SIX_SHORT_STEPS, Trainer))[2]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("same_trainer", [False, True])
def test_checkpoint_in_the_middle_of_a_logging_window(run, same_trainer):
    """All that is logged beside the loss is of the same steps as the loss.

    Also where the trainer that was interrupted, and holds the sums of its last steps, is itself resumed.
    """
    trainer = run("interrupted", WINDOWS, defense=K1, interrupt=2)
    assert entries(trainer) == []
    if same_trainer:
        trainer.remove_callback(Interrupt)
        trainer.train(resume_from_checkpoint=True)
    else:
        trainer = run("interrupted", WINDOWS, resume=True, defense=K1)
    first, second = entries(trainer)
    single = entries(run("single", SIX_SHORT_STEPS, defense=K1))
    assert (first["step"], second["step"]) == (3, 6)
    assert first == single[2]
    for name in set(LOGGED) - {"grad_norm"}:
        assert second[name] == pytest.approx(sum(entry[name] for entry in single[3:]) / 3, rel=1e-5), name


@pytest.mark.parametrize(
    ("flags", "folders", "expected"),
    [
        ([], ["checkpoint-3"], None),
        (["--resume_from_checkpoint", "elsewhere/checkpoint-1"], ["checkpoint-3"], "elsewhere/checkpoint-1"),
        (["--resume_from_checkpoint", "true"], ["checkpoint-3", "checkpoint-12", "other"], "out/checkpoint-12"),
        (["--resume_from_checkpoint", "True"], ["checkpoint-3"], "out/checkpoint-3"),
        (["--resume_from_checkpoint", "true"], ["other"], None),
        (["--resume_from_checkpoint", "true"], [], None),  # the first start: there is no output folder yet
        (["--resume_from_checkpoint", "false"], ["checkpoint-3"], None),
    ],
)
def test_the_checkpoint_that_a_flag_asks_for(flags, folders, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in folders:
        (tmp_path / "out" / folder).mkdir(parents=True)
        (tmp_path / "out" / folder / "trainer_state.json").write_text("{}")
    if folders:  # killed while it wrote the next one
        (tmp_path / "out" / "checkpoint-99").mkdir()
        (tmp_path / "out" / "checkpoint-99" / "model.safetensors").write_bytes(b"")
    parser = HfArgumentParser(TrainingArguments)
    (arguments,) = parser.parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu", "true", *flags])
    assert checkpoint_to_resume(arguments) == expected
