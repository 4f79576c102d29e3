"""What a step costs the host, counted in function calls: on a GPU small batches wait for it, whatever they compute."""

from __future__ import annotations

import pytest
import tiny
import transformers as tf

from hf_parcor import SAM, CorruptionConstraint, MultiStepRisk, ParameterDefenseTrainer
from scripts.counting import calls_of
from scripts.training_steps import step_of

L2 = CorruptionConstraint(epsilon=0.01)
ENCODER = {"vocab_size": 20, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
ARMS = {  # how many stock steps they may cost: 2 or 3 passes, and norms, which a CPU alone finds tensor by tensor
    "K = 1": (MultiStepRisk(L2, steps=1), None, 2.65),
    "K = 2": (MultiStepRisk(L2, steps=2), None, 4.0),
    "SAM": (SAM(L2), None, 2.65),
    "last layer": (MultiStepRisk(L2, steps=1), "last-encoder-layer", 2.9),
}


@pytest.fixture
def model():
    return tf.BertForSequenceClassification(tf.BertConfig(**ENCODER, num_hidden_layers=12, **tiny.STILL))


@pytest.mark.slow
@pytest.mark.parametrize(("defense", "target", "limit"), ARMS.values(), ids=ARMS)
def test_a_defended_step_calls_little_more_than_its_passes(defense, target, limit, model, arguments, batches):
    counts = []
    for kind, options in ((tf.Trainer, {}), (ParameterDefenseTrainer, {"defense": defense, "target_modules": target})):
        step = step_of(kind(model=model, args=arguments(logging_strategy="no"), **options), model, batches[0])
        for _ in range(2):  # the first may look around
            step()
        model.zero_grad()
        counts.append(calls_of(step))
    assert counts[1] < limit * counts[0], counts
