"""Where a record comes from: what it calls the model, its task, its weights, and the libraries that measured it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_parcor.defense_file import installed_version
from hf_parcor.devices import in_float64
from hf_parcor.distributed.dtensors import has_shards
from hf_parcor.distributed.fsdp import class_of
from hf_parcor.evaluation.outputs import inside_adapters
from hf_parcor.functional.norms import vector_norm
from hf_parcor.functional.vectors import chunks

_LIBRARIES = ("hf-parcor", "torch", "transformers", "accelerate")


def model_name(model: nn.Module) -> str:
    """Return a model's name on the Hub, its local folder as `folder_name` has it, or the name of its class.

    Examples:
        >>> model_name(nn.Linear(1, 1))
        'Linear'
    """
    return folder_name(getattr(getattr(model, "config", None), "_name_or_path", "") or class_of(model).__name__)


def folder_name(folder: str) -> str:
    """Return what records call a model's folder: the last two parts of an absolute path, anything else as it is.

    Records are published: where a folder lies on a machine stays out.

    Examples:
        >>> folder_name("/data/runs/defended"), folder_name("runs/defended")
        ('runs/defended', 'runs/defended')
    """
    return "/".join(Path(folder).parts[-2:]) if Path(folder).is_absolute() else folder


def task_of(model: nn.Module) -> str:
    """Return the Hub's name of the task that the model's class is for, also under an adapter; "" if unknown.

    Examples:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(hidden_size=2, num_hidden_layers=1, num_attention_heads=1, intermediate_size=2, vocab_size=2)
        >>> task_of(BertForSequenceClassification(BertConfig(**sizes)))
        'text-classification'
    """
    return task_of_class(class_of(inside_adapters(model)).__name__)


def task_of_class(name: str) -> str:
    """Return the Hub's name of the task that a class of Transformers is for; "" if unknown.

    One that generates texts from texts is for several tasks, unless it is a translation model: the Hub calls that
    "text2text-generation". So it does a BART, which can also fill masks.

    Args:
        name: Of the class, or what it ends with, such as "ForTokenClassification". A class that Transformers does not
            have, since a model brings it, is for what its name ends with.

    Examples:
        >>> task_of_class("MarianMTModel"), task_of_class("BartForConditionalGeneration"), task_of_class("ForCausalLM")
        ('translation', 'text2text-generation', 'text-generation')
        >>> task_of_class("FasterRCNNForObjectDetection")
        'object-detection'
    """
    from transformers.modelcard import TASK_MAPPING

    if name.endswith("MTModel"):
        return "translation"
    if name == "SentenceTransformer":
        return "sentence-similarity"
    mapping: Mapping[str, Any] = TASK_MAPPING
    known = {
        task: [one for entry in classes.values() for one in ((entry,) if isinstance(entry, str) else entry)]
        for task, classes in mapping.items()
    }
    found = [task for task, names in known.items() if name in names]
    head = name[name.rfind("For") :] if "For" in name else ""
    if not found and head:
        found = [task for task, names in known.items() if any(one.endswith(head) for one in names)]
    return "text2text-generation" if "text2text-generation" in found else next(iter(found), "")


def norm_of(weights: Iterable[Tensor]) -> float:
    """Return the L2 norm of all weights as one vector, to six digits: the same however many processes summed it.

    Examples:
        >>> norm_of([Tensor([3.0]), Tensor([[4.0]])])
        5.0
    """
    norms = [vector_norm([in_float64(part)]).item() for weight in weights for part in _parts(weight.detach())]
    return float(f"{math.hypot(*norms):.6g}")


def _parts(weight: Tensor) -> Iterable[Tensor]:
    """Return chunks of a weight; all of one whose parts lie on several processes, or far apart."""
    return [weight] if has_shards([weight]) or not weight.is_contiguous() else chunks([weight])


def described(value: Any) -> Any:
    """Return an argument as plain values: classes by their names, collections as lists, sets in order.

    Of arguments by name, those that are None are left out.

    Examples:
        >>> described((nn.Linear, "LayerNorm"))
        ['Linear', 'LayerNorm']
        >>> described({"target_modules": "all", "exclude_modules": None})
        {'target_modules': 'all'}
    """
    if isinstance(value, Mapping):
        return {key: described(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, (str, int)):
        return value
    entries = [described(entry) for entry in value]
    return sorted(entries) if isinstance(value, (set, frozenset)) else entries


def library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that numbers depend on."""
    return {library: installed_version(library) for library in _LIBRARIES}
