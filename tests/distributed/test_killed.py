"""A process that dies in the middle of a defended step ends the job, and the run goes on from its checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import distributed

import hf_parcor
from hf_parcor import CorruptionConstraint, MultiStepRisk, ParameterDefenseTrainer

pytestmark = pytest.mark.slow  # ranks are processes of their own

STEPS, SAVED, KILLED = 6, 2, 4  # steps of a run, steps between checkpoints, the step that is not finished
IN_TIME = 600.0  # seconds, on a busy machine; gloo alone would wait for half an hour


def train(folder, kill=False, resume=False):
    """Train with dropout; the weights at the end. With `kill`, process 1 dies in a corrupted pass."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = tf.BertForSequenceClassification(tf.BertConfig(**size, vocab_size=30, max_position_embeddings=16))
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator}
    rows = [{"input_ids": torch.randint(30, (8,), **draw), "labels": i % 2} for i in range(24)]
    arguments = tf.TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="steps",
        save_steps=SAVED,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
    )
    defense = MultiStepRisk(CorruptionConstraint(epsilon=0.1), steps=2)
    trainer = ParameterDefenseTrainer(
        model, arguments, train_dataset=rows, defense=defense, target_modules="last-encoder-layer"
    )
    passes = []

    def die(*args):
        if trainer.state.global_step == KILLED - 1:
            passes.append(1)
            if len(passes) == 2 and distributed.get_rank() == 1:
                (Path(folder) / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)

    if kill:
        model.classifier.register_forward_hook(die)
    trainer.train(resume_from_checkpoint=resume)
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def whole_and_resumed(folder):
    with tempfile.TemporaryDirectory() as other:
        whole = train(other)
    distributed.barrier()
    return whole, train(folder, resume=True)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_which_goes_on_from_its_checkpoint(run_on_ranks, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = str(Path(hf_parcor.__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [*torchrun, __file__, str(tmp_path)]
    job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=IN_TIME, check=False)
    assert job.returncode != 0
    assert "Signal 9 (SIGKILL)" in job.stderr
    assert (tmp_path / "killed").exists()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{SAVED}"]

    for whole, resumed in run_on_ranks(whole_and_resumed, 2, str(tmp_path)):
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.slow
def test_the_others_end_by_themselves(run_on_ranks, tmp_path):
    """Without torchrun, which would end them: the connection is gone."""
    with pytest.raises(AssertionError, match="rank 0 ended with 1 and"):
        run_on_ranks(train, 2, str(tmp_path), True)
    assert (tmp_path / "killed").exists()


if __name__ == "__main__":
    train(sys.argv[1], kill=True)
