"""A model that was measured or trained is freed with its last name: on a GPU the next may have no room beside it."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from for_each import for_each
from trainings import QUIET, defense_named

import hf_parcor
from hf_parcor import (
    CorruptionConstraint,
    CorruptionEvaluator,
    DefendedBackward,
    GaussianNoise,
    LayerProbe,
    MultiStepRisk,
    ParameterDefenseTrainer,
    RobustnessCallback,
    measure_flips_to_break,
    measure_indicators,
    recipe,
    sensitivity,
)
from hf_parcor.defenses import DEFENSES
from hf_parcor.evaluation import ClassificationMetric

L2 = CorruptionConstraint(epsilon=0.5)
SILENT = {"progress": False}
Use = Callable[..., object]


def evaluate(model: Any, batches: Any, corruptions: Any, **options: Any) -> None:
    CorruptionEvaluator(model, ClassificationMetric(batches), batches, **SILENT, **options).evaluate(corruptions, 2)


def break_off(model: Any, batches: Any, corruptions: Any) -> None:
    calls = []

    def metric(network: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return {"x": float(network(**batches[0]).loss.detach())}

    with pytest.raises(KeyboardInterrupt):
        CorruptionEvaluator(model, metric, batches, **SILENT).evaluate(corruptions)


def score(model: Any, batches: Any) -> None:
    found = sensitivity(model, ClassificationMetric(batches), batches=batches, probes=1, budget=2, **SILENT)
    recipe(found, bits=12)


def loop(model: Any, batches: Any) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    backward = DefendedBackward(accelerator, MultiStepRisk(L2, steps=2), prepared)
    for batch in batches:
        backward(lambda batch: prepared(**batch).loss, batch, epoch=0)
        optimizer.step()


MEASURED: dict[str, Use] = {
    "evaluator": lambda model, batches, every: evaluate(model, batches, every),
    "a part": lambda model, batches, every: evaluate(model, batches, every, target_modules="last-encoder-layer"),
    "names": lambda model, batches, every: evaluate(model, batches, every, target_modules=["query"]),
    "broken off": break_off,
    "probe": lambda model, batches, every: LayerProbe(
        model, ClassificationMetric(batches), batches, **SILENT
    ).evaluate(every[:4], 2),
    "indicators": lambda model, batches, _: measure_indicators(model, batches, [L2], steps=2, **SILENT),
    "flips": lambda model, batches, _: measure_flips_to_break(
        model, ClassificationMetric(batches), batches, most=2, **SILENT
    ),
    "scores": lambda model, batches, _: score(model, batches),
    "loop": lambda model, batches, _: loop(model, batches),
}


TRAINED = {
    **{name: {} for name in DEFENSES},
    "multi_step_risk of a part": {"target_modules": "last-encoder-layer"},
    "awp of a part": {"target_modules": ["classifier"]},
}


@pytest.mark.slow
@for_each("name", list(MEASURED))
def test_a_model_that_was_measured(name, freed, tiny_bert, batches, one_of_each):
    assert freed(tiny_bert, lambda model: MEASURED[name](model, batches, list(one_of_each.values())))


def trainer_of(model: Any, rows: Any, folder: Any, kind: Any = ParameterDefenseTrainer, **settings: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, eval_strategy="steps", eval_steps=1, logging_steps=1, **QUIET
    )
    return kind(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4], **settings)


@pytest.mark.slow
def test_a_model_that_the_stock_trainer_trained(freed, tiny_bert, labelled_rows, tmp_path):
    """What the next test asks of ours is what people have without it."""
    assert freed(
        lambda: tiny_bert(num_labels=3, vocab_size=30),
        lambda model: trainer_of(model, labelled_rows, tmp_path, transformers.Trainer).train(),
    )


@pytest.mark.slow
@for_each("name", list(TRAINED))
def test_a_model_that_was_trained(name, freed, tiny_bert, labelled_rows, tmp_path):
    def use(model: Any) -> None:
        given = {"defense": defense_named(name.partition(" ")[0], L2), **TRAINED[name]}
        trainer = trainer_of(model, labelled_rows, tmp_path, **given)
        trainer.add_callback(RobustnessCallback(trainer, [GaussianNoise(0.1)], trials=1))
        trainer.train()
        trainer.evaluate_robustness([GaussianNoise(0.1)], trials=1)
        trainer.save_model()
        trainer.create_model_card()

    assert freed(lambda: tiny_bert(num_labels=3, vocab_size=30), use)


def caught_in_the_middle(source: str) -> list[int]:
    """Return the lines where a `@contextmanager` catches what its block raised, raises no more of it, and keeps it."""
    return [
        handler.lineno
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef)
        if any("contextmanager" in ast.unparse(one) for one in function.decorator_list)
        for block in ast.walk(function)
        if isinstance(block, ast.Try) and any(isinstance(part, ast.Yield) for part in ast.walk(block))
        for handler in block.handlers
        if ast.unparse(handler.body[-1]) != "raise" and "traceback" not in ast.unparse(handler)
    ]


HOLDS_NO_MODEL = {"cli", "tasks", "recipes"}


def test_no_exception_ends_where_it_is_held():
    """From Python 3.12 on it would be kept, with the model in its frames; 3.11 would not show it."""
    folder = Path(hf_parcor.__file__).parent
    found = [
        f"{path.relative_to(folder)}:{line}"
        for path in sorted(folder.rglob("*.py"))
        if path.relative_to(folder).parts[0] not in HOLDS_NO_MODEL
        for line in caught_in_the_middle(path.read_text())
    ]
    assert not found
    example = "@contextmanager\ndef swallowing():\n    try:\n        yield\n    except ValueError:\n        pass\n"
    assert caught_in_the_middle(example) == [5]


def test_a_trainer_is_copied_with_its_defense(tiny_bert, labelled_rows, tmp_path):
    """Ray's hyperparameter search sends it to other processes, after whatever was asked of it."""
    trainer = trainer_of(tiny_bert(num_labels=3, vocab_size=30), labelled_rows, tmp_path, defense=MultiStepRisk(L2))
    trainer.add_callback(RobustnessCallback(trainer, [GaussianNoise(0.1)], trials=1))
    config = trainer.defense_config
    trainer.accelerator = None  # which other Trainers of this process have given weak references of their own
    trainer.gather_function = None
    again = pickle.loads(pickle.dumps(trainer))
    assert again.defense_config == config
    assert again.callback_handler.callbacks[-1]._trainer is again
