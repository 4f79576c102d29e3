"""Adapters of PEFT, in a folder or on the Hub: what model they belong to, which head that has, and their loading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from hf_parcor.errors import InputError
from hf_parcor.evaluation.outputs import inside_adapters

# What PEFT calls the tasks of its adapters, and how the names of their models end.
_HEADS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
}
# Of the files with which tokenizers and image processors are saved, one is always there.
_OF_PROCESSORS = ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json")


def file_of(name: str, file: str, revision: str | None = None) -> str | None:
    """Return where a file of a model or an adapter lies, downloaded if need be; None if none is within reach.

    Args:
        name: A name on the Hub, or a local folder.
        file: The file.
        revision: A branch, tag or commit on the Hub.
    """
    none = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found: str | None = cached_file(name, file, revision=revision, **none)
    return found


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was saved, without its weights.

    Attributes:
        name: A name on the Hub, or a local folder.
        revision: Its branch, tag or commit on the Hub.
        settings: The content of its `adapter_config.json`.
    """

    name: str
    revision: str | None
    settings: Mapping[str, Any]

    @classmethod
    def found(cls, name: str, revision: str | None = None) -> Adapter | None:
        """Return the adapter of this name; None where there is none, such as a whole model.

        Raises:
            InputError: Its settings cannot be read.
        """
        try:
            path = find_adapter_config_file(name, revision=revision)
        except OSError:  # nothing of that name: who loads it says so
            path = None
        if path is None:
            return None
        try:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"model: expected an adapter, got {name!r} with {error}; save the adapter again"
            ) from error
        return cls(name, revision, settings if isinstance(settings, dict) else {})

    @property
    def base(self) -> tuple[str | None, str | None]:
        """The name and the revision of the model that it belongs to; no name if it was saved without."""
        return self.settings.get("base_model_name_or_path"), self.settings.get("revision")

    @property
    def head(self) -> str | None:
        """What the class of that model ends in; None if the adapter does not say it."""
        by_task = _HEADS.get(self.settings.get("task_type") or "")
        return by_task or (self.settings.get("auto_mapping") or {}).get("base_model_class")

    @property
    def has_processor(self) -> bool:
        """Whether a tokenizer or an image processor was saved beside it."""
        return any(file_of(self.name, file, self.revision) is not None for file in _OF_PROCESSORS)

    def head_settings(self, loader: Any, **settings: Any) -> dict[str, int]:
        """Return `num_labels` if a head was saved with the adapter that has more or fewer classes than the model's.

        The model itself may well have no head: its configuration then says 2.

        Args:
            loader: The class of Transformers for the model.
            **settings: For `from_pretrained` of the model.
        """
        saved_too, file = self.settings.get("modules_to_save"), "adapter_model.safetensors"
        weights = file_of(self.name, file, self.revision) if saved_too else None
        name, revision = self.base
        if weights is None or name is None:
            return {}
        told = {"trust_remote_code": settings.get("trust_remote_code")}
        config = AutoConfig.from_pretrained(name, revision=revision, **told)
        with torch.device("meta"):
            shapes = {key: list(one.shape) for key, one in loader.from_config(config, **told).named_parameters()}
        with safe_open(weights, "pt") as saved:
            for key in saved.keys():  # noqa: SIM118  # it is no mapping
                count, *others = saved.get_slice(key).get_shape()
                shape = shapes.get(key.removeprefix("base_model.model."))
                if shape == [config.num_labels, *others] != [count, *others]:
                    return {"num_labels": count}
        return {}

    def described(self) -> Any:
        """Return the settings as PEFT reads them."""
        from peft import PeftConfig

        return PeftConfig.from_pretrained(self.name, revision=self.revision)


class LoaderOfAdapter:
    """Loads a model with an adapter that can be trained on, as a class of Transformers loads a model.

    Args:
        loader: The class of Transformers for the model.
        adapter: The adapter.
        around: Whether PEFT puts it around the model, which then can save it; Transformers, which puts it into the
            model, saves those of some versions of PEFT alone. It is so where Transformers cannot load the adapter.
    """

    def __init__(self, loader: Any, adapter: Adapter, *, around: bool = False) -> None:
        self._loader, self._adapter, self.__name__ = loader, adapter, loader.__name__
        self._is_around = around

    def from_pretrained(self, name: str, **settings: Any) -> Any:
        """Return the model; the settings are for it, but for the revision of the adapter."""
        adapter, settings = self._adapter, {**settings, "revision": self._adapter.base[1]}
        settings = {**adapter.head_settings(self._loader, **settings), **settings}
        kind = adapter.described()
        # Of those that stand before texts or between layers, Transformers loads none.
        if self._is_around or kind.is_prompt_learning or kind.is_adaption_prompt or self._loads_others(**settings):
            model = self._around(kind, **settings)
        else:
            model = self._loader.from_pretrained(name, **settings, adapter_kwargs={"revision": adapter.revision})
        _unfreeze(model)
        return model

    def _around(self, kind: Any, **settings: Any) -> Any:
        from peft import PeftModel

        adapter = self._adapter
        model = self._loader.from_pretrained(adapter.base[0], **settings)
        if model.main_input_name != "input_ids":
            kind.task_type = None  # what PEFT puts around models of a task hands on texts
        # Prompts stay trainable, and PEFT refuses to be asked for it.
        trained = not kind.is_prompt_learning
        return PeftModel.from_pretrained(
            model, adapter.name, config=kind, revision=adapter.revision, is_trainable=trained
        )

    def _loads_others(self, **settings: Any) -> bool:
        """Return whether the model's class loads adapters of another kind, as that of Wav2Vec 2.0 does."""
        base = self._adapter.base[0]
        if base is None:
            return False
        told = {name: settings[name] for name in ("revision", "trust_remote_code") if name in settings}
        config = AutoConfig.from_pretrained(base, **told)
        kind = getattr(self._loader, "_model_mapping", {}).get(type(config), self._loader)
        return hasattr(kind, "load_adapter") and kind.load_adapter is not PeftAdapterMixin.load_adapter


def _unfreeze(model: Any) -> None:
    """Let what was trained of adapters be trained on: inside of layers, and of a head, it is loaded frozen."""
    with_biases = {name for name, config in model.peft_config.items() if getattr(config, "bias", "none") != "none"}
    inner: Any = inside_adapters(model)
    for module in inner.modules():
        active = getattr(module, "active_adapters", None)
        if not isinstance(active, list):  # of a layer
            continue
        module.set_adapter(active)
        bias = getattr(getattr(module, "base_layer", None), "bias", None)
        if bias is not None and not with_biases.isdisjoint(active):
            bias.requires_grad_(True)
