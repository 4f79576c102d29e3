"""What the mixin is to other people's Trainers: a few methods that call theirs, and one attribute."""

from __future__ import annotations

import ast
import inspect
import textwrap

import pytest
import transformers as tf

from hf_parcor import ParameterDefenseMixin, ParameterDefenseTrainer, ParameterDefenseTrainingArguments

OVERRIDDEN = {
    *("__init__", "training_step", "floating_point_ops", "log", "save_model"),
    *("_push_from_checkpoint", "_load_from_checkpoint", "_load_best_model", "_inner_training_loop"),
}


def test_it_overrides_what_it_says_and_nothing_else():
    own = {
        name for name, value in vars(ParameterDefenseMixin).items() if callable(value) or isinstance(value, property)
    }
    assert own & set(dir(tf.Trainer)) == OVERRIDDEN
    for name in OVERRIDDEN - {"__init__"}:
        assert f"`{name}`" in ParameterDefenseMixin.__doc__


@pytest.mark.parametrize("name", sorted(OVERRIDDEN))
def test_each_calls_the_method_that_it_overrides(name):
    tree = ast.parse(textwrap.dedent(inspect.getsource(vars(ParameterDefenseMixin)[name])))
    assert any(
        isinstance(node, ast.Attribute) and node.attr == name and ast.unparse(node.value) == "super()"
        for node in ast.walk(tree)
    )


def test_it_is_a_base_of_nothing_that_measures_or_publishes():
    assert ParameterDefenseMixin.__bases__ == (object,)
    assert not hasattr(ParameterDefenseMixin, "evaluate_robustness")
    assert not hasattr(ParameterDefenseMixin, "create_model_card")
    assert hasattr(ParameterDefenseTrainer, "evaluate_robustness")


@pytest.mark.parametrize("kind", [tf.Trainer, tf.Seq2SeqTrainer])
def test_behind_the_trainer_it_would_do_nothing_and_is_refused(kind):
    with pytest.raises(TypeError, match=r"Wrong: expected .* before the Trainer .*Wrong\(ParameterDefenseMixin"):
        type("Wrong", (kind, ParameterDefenseMixin), {})


def test_a_trainer_gets_one_attribute(tiny_bert, arguments):
    class Defended(ParameterDefenseMixin, tf.Trainer):
        pass

    stock = tf.Trainer(model=tiny_bert(), args=arguments(tf.TrainingArguments))
    defended = Defended(model=tiny_bert(), args=arguments(ParameterDefenseTrainingArguments))
    assert set(vars(defended)) - set(vars(stock)) == {"_parameter_defense"}
