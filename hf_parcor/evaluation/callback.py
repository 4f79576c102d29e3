"""Robustness beside every evaluation, so that the most robust checkpoint can be the best one."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from typing import Any

from accelerate.data_loader import IterableDatasetShard
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_parcor.arguments import check_count
from hf_parcor.evaluation.mixin import (
    Corruptions,
    RobustnessMixin,
    by_name,
    measure_robustness,
    robustness_metrics,
)
from hf_parcor.evaluation.trials import DEFAULT_TRIALS
from hf_parcor.records.metric_info import MetricInfo, checked_infos


class RobustnessCallback(TrainerCallback):
    """Measures robustness after each evaluation of a Trainer, and adds `eval_robustness_*` to its metrics.

    `metric_for_best_model="eval_robustness_accuracy"`, `load_best_model_at_end`, `EarlyStoppingCallback` and a
    hyperparameter search can then use these metrics. Their names are those of `RobustnessMixin.evaluate_robustness`.
    `eval_strategy` and `eval_steps` decide when the Trainer evaluates. The training is bit for bit the one without the
    callback.

    It works with any Trainer that tells its callbacks what it evaluates, as the stock `evaluation_loop` does. The card
    of a `ParameterDefenseTrainer` shows what was measured on its weights. When training begins, the callback moves to
    the first place among the callbacks, because others read what it adds.

    Args:
        trainer: The Trainer that the callback is added to: `trainer.add_callback(RobustnessCallback(trainer, ...))`.
        corruptions: What to measure: one, a sequence, or a mapping from names of your own.
        trials: Trials of each stochastic corruption. Default 3. One trial costs less, but its curve is noisier.
        seed: First seed, the same at each evaluation.
        every_n_steps: If given, measure at multiples of this number of steps only, and let the Trainer evaluate there
            even if `eval_strategy` does not ask for it. By default, measure at every evaluation.
        gradient_dataset: As in `RobustnessMixin.evaluate_robustness`.
        target_modules: Which modules are corrupted, as in `CorruptionEvaluator`.
        metric_info: As in `RobustnessMixin.evaluate_robustness`.

    Raises:
        ValueError: There is no corruption, two have the same name, or a number is too small.
        TypeError: Something is not a `Corruption`, or not a `MetricInfo`.

    Examples:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hf_parcor import GaussianNoise
        >>> config = BertConfig(
        ...     vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
        ... )
        >>> rows = [{"input_ids": [1, 2, 3], "labels": 0}, {"input_ids": [4, 5, 6], "labels": 1}]
        >>> arguments = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, disable_tqdm=True, report_to="none")
        >>> trainer = Trainer(BertForSequenceClassification(config), arguments, eval_dataset=rows)
        >>> trainer.add_callback(RobustnessCallback(trainer, {"noise": GaussianNoise(0.02)}))
        >>> metrics = trainer.evaluate()
        {...}
        >>> "eval_loss" in metrics, "eval_robustness_noise_loss" in metrics
        (True, True)
    """

    def __init__(
        self,
        trainer: Trainer,
        corruptions: Corruptions,
        *,
        trials: int = DEFAULT_TRIALS,
        seed: int = 0,
        every_n_steps: int | None = None,
        gradient_dataset: Any = None,
        target_modules: str | Collection[str] | None = None,
        metric_info: Mapping[str, MetricInfo] | None = None,
    ) -> None:
        check_count("trials", trials)
        check_count("seed", seed, minimum=0)
        if every_n_steps is not None:
            check_count("every_n_steps", every_n_steps)
        # It keeps its callbacks: strongly, the cycle would hold the model until the next garbage collection.
        self._trainer_reference = weakref.ref(trainer)
        self._corruptions = by_name(corruptions)
        self._trials, self._seed, self._every = trials, seed, every_n_steps
        self._gradient_dataset = gradient_dataset
        self._target, self._infos = target_modules, checked_infos(metric_info)

    @property
    def _trainer(self) -> Trainer:
        trainer = self._trainer_reference()
        if trainer is None:
            raise ReferenceError("trainer: expected the one that this callback was made for, got none; keep it")
        return trainer

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_trainer_reference": self._trainer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_trainer_reference": weakref.ref(state["_trainer_reference"])}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move to the front of the callbacks, because others read metrics."""
        callbacks = self._trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
            callbacks.insert(0, self)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for an evaluation if one is due."""
        if self._every is not None and state.global_step % self._every == 0:
            control.should_evaluate = True
        return control

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Measure on the data that the Trainer just evaluated, log the results, and add them to its metrics.

        Raises:
            ValueError: The Trainer does not say what it evaluated, or for how long, which tells the prefix of metrics.
        """
        if metrics is None or (self._every is not None and state.global_step % self._every != 0):
            return
        if eval_dataloader is None:
            raise ValueError(
                "eval_dataloader: expected what was evaluated, got None; where a Trainer has an evaluation_loop of "
                "its own, begin that with self.callback_handler.eval_dataloader = dataloader, as the stock one does"
            )
        prefixes = [name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")]
        if not prefixes:
            raise ValueError(
                f"metrics: expected a time such as eval_runtime, which names their prefix, got {', '.join(metrics)}; "
                "where a Trainer has an evaluate of its own, let it add speed_metrics, as the stock one does"
            )
        prefix = prefixes[-1]
        record = measure_robustness(
            self._trainer,
            list(self._corruptions.values()),
            trials=self._trials,
            seed=self._seed,
            eval_dataset=_all_data(eval_dataloader.dataset),
            gradient_dataset=self._gradient_dataset,
            metric_key_prefix=prefix,
            target_modules=self._target,
            metric_info=self._infos,
        )
        if isinstance(self._trainer, RobustnessMixin):
            self._trainer.robustness_was_measured(prefix, record)
        found = robustness_metrics(record, list(self._corruptions), prefix)
        self._trainer.log(dict(found))
        metrics.update(found)


def _all_data(dataset: Any) -> Any:
    """Return the data set of all processes, where Accelerate has made a share of one."""
    return dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset
