"""What a Trainer's model and data say of themselves, for its card."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers.modelcard import TASK_MAPPING

from hf_parcor.model_card.facts import EvaluationData

_SOURCE = re.compile(r"hf://datasets/([^@/]+/[^@/]+)@([0-9a-f]{40})/")
_LOADERS = ("csv", "json", "pandas", "parquet", "text", "generator", "arrow")


def base_model_of(model: nn.Module) -> str:
    """Return the name on the Hub of the model that this one was made from; "" for a folder, or where none is said."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return "" if not name or Path(name).is_absolute() or Path(name).is_dir() else name


def task_of(model: nn.Module) -> str:
    """Return the Hub's name of the task that the model's class is for, also under an adapter; "" if unknown.

    Examples:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(hidden_size=2, num_hidden_layers=1, num_attention_heads=1, intermediate_size=2, vocab_size=2)
        >>> task_of(BertForSequenceClassification(BertConfig(**sizes)))
        'text-classification'
    """
    unwrapped: Any = getattr(model, "get_base_model", None)
    name = type(model if unwrapped is None else unwrapped()).__name__
    classes: Any
    for task, classes in TASK_MAPPING.items():
        for known in classes.values():
            if name in ((known,) if isinstance(known, str) else known):
                return str(task)
    return ""


def evaluation_data_of(dataset: Any) -> EvaluationData:
    """Return what a data set of the library `datasets` says of itself: name, configuration, split, revision.

    Args:
        dataset: The data set; any other object says nothing.
    """
    info = getattr(dataset, "info", None)
    sources = map(_SOURCE.match, getattr(info, "download_checksums", None) or ())
    source = next((match for match in sources if match is not None), None)
    found, revision = source.groups() if source else ("", "")
    loaded = str(getattr(info, "dataset_name", "") or "")
    name = found or ("" if loaded in _LOADERS else loaded)
    config = str(getattr(dataset, "config_name", "") or "")
    return EvaluationData(
        name.rpartition("/")[2] or "the evaluation data",
        id=found,
        config="" if config == "default" or loaded in _LOADERS else config,
        split=str(getattr(dataset, "split", "") or ""),
        revision=revision,
    )


def named_on_hub(data: EvaluationData, name: str) -> EvaluationData:
    """Return the data by their name on the Hub, where the caller knows it.

    Examples:
        >>> named_on_hub(EvaluationData("the evaluation data", split="test"), "org/reviews")
        EvaluationData(name='reviews', id='org/reviews', config='', split='test', revision='')
    """
    revision = data.revision if name == data.id else ""
    return replace(data, name=name.rpartition("/")[2], id=name, revision=revision)
