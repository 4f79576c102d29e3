"""A recipe as files for the tools that quantize.

| file | read by |
|:--|:--|
| `recipe.json` | `RecipeRecord.load` |
| `torchao.json` | `transformers.TorchAoConfig.from_dict`; its `quant_type.default` by torchao's `config_from_dict`, for `quantize_(model, config, filter_fn=None)` |
| `bitsandbytes.yaml` | `transformers.BitsAndBytesConfig(**settings)` |
| `llm_compressor.yaml` | llm-compressor's `oneshot(recipe=...)` |
| `defense.yaml` | `hf-parcor train --config`: the modules to defend, so that they need not be spared |

A tool that lacks a format gets no file, and what is missing is said.
"""  # noqa: E501

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hf_parcor.corruptions import FloatQuantization
from hf_parcor.recipes.measured import format_of
from hf_parcor.records.recipe import RecipeRecord
from hf_parcor.strict_json import replace_text


class Exports(NamedTuple):
    """What `export_recipe` wrote.

    Attributes:
        files: Their paths.
        missing: Sentences on the tools that lack something.
    """

    files: tuple[Path, ...]
    missing: tuple[str, ...]


class NoSuchFormatError(ValueError):
    """A tool cannot hold a format."""


def export_recipe(record: RecipeRecord, folder: str | Path) -> Exports:
    """Write a recipe for every tool that can hold it, with the folder, and say which cannot.

    Raises:
        OSError: A file cannot be written.

    Examples:
        >>> import tempfile
        >>> from hf_parcor.records import Choice, RecipeRecord, WeightGroup
        >>> nf4 = {"NF4": {"corruption": "float_quantization", "settings": {"format": "nf4", "per": 64}}}
        >>> record = RecipeRecord("m", {"fc": WeightGroup({"fc.weight": 64}, 16.0)}, nf4, {"fc": Choice("NF4", 4.5)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = export_recipe(record, folder)
        >>> [path.name for path in found.files], len(found.missing)
        (['recipe.json', 'bitsandbytes.yaml'], 3)
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files, missing = [record.save(folder / "recipe.json")], []
    for name, make in _EXPORTS.items():
        try:
            content = make(record)
        except NoSuchFormatError as error:
            missing.append(f"{name}: {error}")
            continue
        path = folder / name
        shown = (
            json.dumps(content, indent=2) + "\n"
            if path.suffix == ".json"
            else yaml.safe_dump(content, sort_keys=False)
        )
        replace_text(path, shown)
        files.append(path)
    return Exports(tuple(files), tuple(missing))


def torchao_settings(record: RecipeRecord) -> dict[str, Any]:
    """Return `quantization_config` of a Transformers model: torchao's `FqnToConfig`, one entry a module.

    Raises:
        NoSuchFormatError: torchao rounds none as a format does; see `hf_parcor.corruptions.quantization`. A
            `ValueError`.
    """
    by_module: dict[str, Any] = {}
    for group, one in record.choice.items():
        if one.format is not None:
            config = _torchao(one.format, record.formats[one.format])
            by_module |= dict.fromkeys(record.groups[group].modules, config)
    if not by_module:
        raise NoSuchFormatError("expected a part that is quantized, got none; lower the budget")
    return {
        "quant_method": "torchao",
        "quant_type": {"default": _ao("FqnToConfig", 1, fqn_to_config=by_module)},
    }


def _torchao(label: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return one of torchao's configurations as its `config_to_dict` writes it; what is left out has its default."""
    one = format_of(settings)
    per = one.per
    if isinstance(one, FloatQuantization):
        if one.format == "nvfp4":
            return _ao("NVFP4WeightOnlyConfig", 1)
        float8 = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}.get(one.format)
        if float8 is not None:
            return _ao(
                "Float8WeightOnlyConfig",
                2,
                weight_dtype=_dtype(float8),
                granularity=_granularity(per, "PerRow"),
                set_inductor_config=False,
            )
    elif one.zero_point == "integer" and one.bits <= 8:
        mapping = (
            {"full": "SYMMETRIC", "unclipped": "SYMMETRIC_NO_CLIPPING_ERR"}.get(one.code_range)
            if one.symmetric
            else "ASYMMETRIC"
        )
        if (one.bits, one.arithmetic, mapping) == (8, "float32", "SYMMETRIC"):
            return _ao("Int8WeightOnlyConfig", 2, granularity=_granularity(per, "PerRow"), set_inductor_config=False)
        if one.arithmetic == "weight" and mapping is not None and per != "tensor":
            return _ao(
                "IntxWeightOnlyConfig",
                2,
                weight_dtype=_dtype(f"int{one.bits}"),
                granularity=_granularity(per, "PerAxis"),
                mapping_type={"_type": "MappingType", "_data": mapping},
            )
    raise NoSuchFormatError(
        f"expected a format that torchao has, got {label}; score one of them, such as 8 bits per channel, or 4 bits "
        "per group of 32, with full codes and the weights' arithmetic"
    )


def _ao(kind: str, version: int, **data: Any) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": data}


def _dtype(name: str) -> dict[str, Any]:
    return {"_type": "torch.dtype", "_data": name}


def _granularity(per: str | int, of_channels: str) -> dict[str, Any]:
    if isinstance(per, int):
        return _ao("PerGroup", 1, group_size=per)
    if per == "tensor":
        return _ao("PerTensor", 1)
    return _ao("PerAxis", 1, axis=0) if of_channels == "PerAxis" else _ao("PerRow", 1, dim=-1)


def bitsandbytes_settings(record: RecipeRecord) -> dict[str, Any]:
    """Return the settings of `BitsAndBytesConfig`: NF4 for all that the recipe gives 4 bits or fewer, others skipped.

    bitsandbytes has one format a model, so that what the recipe gives 8 bits is skipped as well, and what is in no
    group.
    """
    skipped = list(record.outside)
    quantized: list[str] = []
    for group, one in record.choice.items():
        small = one.format is not None and _code_bits(record.formats[one.format]) <= 4
        (quantized if small else skipped).extend(record.groups[group].modules)
    if not quantized:
        raise NoSuchFormatError("expected a part with 4 bits or fewer, got none; lower the budget")
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": [_exactly(name, quantized) for name in skipped],
    }


def _code_bits(settings: Mapping[str, Any]) -> int:
    """Return how many bits a code has, without scales."""
    one = format_of(settings)
    if isinstance(one, FloatQuantization):
        return 8 if one.format.startswith("fp8") else 4
    return int(one.bits)


def _exactly(name: str, others: list[str]) -> str:
    """Return a module's name as Transformers matches it: a beginning, an end, or an expression where that is more."""
    more = any(other.startswith(f"{name}.") or other.endswith(name) for other in others)
    return f"{re.escape(name)}$" if more else name


def llm_compressor_settings(record: RecipeRecord) -> dict[str, Any]:
    """Return a recipe of llm-compressor: a group of modules for each format, and what is ignored.

    Raises:
        NoSuchFormatError: llm-compressor has no such format. A `ValueError`.
    """
    targets: dict[str, list[str]] = {}
    ignored = list(record.outside)
    for group, one in record.choice.items():
        (ignored if one.format is None else targets.setdefault(one.format, [])).extend(record.groups[group].modules)
    if not targets:
        raise NoSuchFormatError("expected a part that is quantized, got none; lower the budget")
    modifier = {
        "ignore": ignored,
        "config_groups": {
            f"group_{place}": {"targets": modules, "weights": _compressed(label, record.formats[label])}
            for place, (label, modules) in enumerate(targets.items())
        },
    }
    return {"quant_stage": {"quant_modifiers": {"QuantizationModifier": modifier}}}


def _compressed(label: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that compressed-tensors calls `QuantizationArgs`."""
    one = format_of(settings)
    is_float = isinstance(one, FloatQuantization)
    if one.format == "fp8_e4m3" if is_float else one.zero_point == "integer" and one.bits <= 8:
        blocks = {"strategy": "group", "group_size": one.per} if isinstance(one.per, int) else {"strategy": one.per}
        return {
            "num_bits": 8 if is_float else one.bits,
            "type": "float" if is_float else "int",
            "symmetric": is_float or one.symmetric,
            "dynamic": False,
            **blocks,
        }
    if is_float and one.format == "nvfp4":
        blocks = {"strategy": "tensor_group", "group_size": 16}
        return {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False, **blocks}
    raise NoSuchFormatError(f"expected a format that llm-compressor has, got {label}; try integers or fp8_e4m3")


def defense_settings(record: RecipeRecord) -> dict[str, Any]:
    """Return the flags that train what the recipe spares to survive the format of the others.

    Raises:
        NoSuchFormatError: Nothing is spared.
    """
    modules = [module for group in record.spared for module in record.groups[group].modules]
    if not modules:
        raise NoSuchFormatError("expected parts that the recipe spares, got none: there is nothing to defend")
    assert record.base is not None, "something is spared from it"
    return {
        "defense": "corruption",
        "defense_corruption": [_word(record.formats[record.base])],
        "defense_target_modules": modules,
    }


def _word(settings: Mapping[str, Any]) -> str:
    """Return a format as command lines write it."""
    one = dict(settings["settings"])
    strength = one.pop("bits") if "bits" in one else one.pop("format")
    plain = {name: str(value).lower() if isinstance(value, bool) else value for name, value in one.items()}
    details = ",".join(f"{name.replace('_', '-')}={value}" for name, value in plain.items() if value is not None)
    return f"{settings['corruption'].replace('_', '-')}={strength}" + (f":{details}" if details else "")


_EXPORTS: Mapping[str, Callable[[RecipeRecord], dict[str, Any]]] = {
    "torchao.json": torchao_settings,
    "bitsandbytes.yaml": bitsandbytes_settings,
    "llm_compressor.yaml": llm_compressor_settings,
    "defense.yaml": defense_settings,
}
