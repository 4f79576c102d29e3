"""A recipe as files for the tools that quantize.

| file | read by |
|:--|:--|
| `recipe.json` | `RecipeRecord.load` |
| `torchao.json` | `transformers.TorchAoConfig.from_dict`; its `quant_type.default` by torchao's `config_from_dict`, for `quantize_(model, config, filter_fn=None)` |
| `bitsandbytes.yaml` | `transformers.BitsAndBytesConfig(**settings)` |
| `llm_compressor.yaml` | llm-compressor's `oneshot(recipe=...)` |
| `defense.yaml` | `hf-parcor train --config`: the modules to defend, so that they need not be spared |

If a tool lacks a format, or cannot quantize a module that holds a weight, its file is not written, and the reason is
returned.
"""  # noqa: E501

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_parcor.corruptions import FloatQuantization
from hf_parcor.recipes.measured import format_of
from hf_parcor.records.evaluation import corruption_words
from hf_parcor.records.recipe import RecipeRecord
from hf_parcor.records.sensitivity import targets_of
from hf_parcor.strict_json import replace_text

_NAMED = 3  # so many names a sentence has
_FLOAT32 = 32
_ADAPTED = re.compile(r"^base_model\.model\.|\.base_layer$")
_NVFP4 = str(FloatQuantization("nvfp4"))
# Modules beside each other, with these names, that llm-compressor gives one scale of the tensor: what vLLM fuses.
_FUSED = (
    ("gate_proj", "up_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("w1", "w3"),
)


class Exports(NamedTuple):
    """What `export_recipe` wrote.

    Attributes:
        files: The paths of the files.
        missing: A sentence on each file that was not written.
        notes: Sentences on where a tool deviates from the recipe.
    """

    files: tuple[Path, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...] = ()


class NoSuchFormatError(ValueError):
    """A tool cannot hold a format, or not where a recipe wants it."""


def export_recipe(record: RecipeRecord, folder: str | Path) -> Exports:
    """Write a recipe into a folder, as a file for each tool that supports it, and say which tools do not.

    The folder is created if it does not exist.

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
    files, missing, notes = [record.save(folder / "recipe.json")], [], []
    for name, make in _EXPORTS.items():
        try:
            content = make(record)
        except NoSuchFormatError as error:
            missing.append(f"{name}: {error}")
            (folder / name).unlink(missing_ok=True)  # that of an earlier recipe
            continue
        path = folder / name
        shown = (
            json.dumps(content, indent=2) + "\n"
            if path.suffix == ".json"
            else yaml.safe_dump(content, sort_keys=False)
        )
        replace_text(path, shown)
        files.append(path)
        notes += [f"{name}: {sentence}" for sentence in _NOTES.get(name, _nothing)(record)]
    return Exports(tuple(files), tuple(missing), tuple(notes))


class _Held(NamedTuple):
    """A weight and what holds it.

    Attributes:
        format: What it gets; None where it stays as it is.
        bits: How many one of its group takes as it is.
        holders: The classes of the modules that hold it, by their names; "" where nobody said.
    """

    format: str | None
    bits: float
    holders: Mapping[str, str]


def _held(record: RecipeRecord) -> Iterator[_Held]:
    """Yield all weights.

    Raises:
        NoSuchFormatError: PEFT has given one another name than the model has when it is loaded; or it is not in the
            part that is loaded by itself.
    """
    for name, one in record.choice.items():
        group = record.groups[name]
        for weight in group.weights:
            holders = _as_loaded(record, group.holders.get(weight) or {weight.removesuffix(".weight"): ""})
            if not holders and one.format is None:
                continue
            if not holders:
                raise NoSuchFormatError(
                    f"expected modules of {record.loaded_part}, which from_pretrained loads, got {weight}; leave it "
                    "out of the groups, or write what MixedQuantization.of(recipe) gives into the model"
                )
            adapted = next(filter(_ADAPTED.search, holders), None)
            if adapted is not None:
                raise NoSuchFormatError(
                    f"expected modules of a model as from_pretrained loads it, got {adapted} under an adapter; merge "
                    "the adapter (merge_and_unload), and score again"
                )
            yield _Held(one.format, group.bits, holders)


def _as_loaded(record: RecipeRecord, modules: Mapping[str, str]) -> dict[str, str]:
    """Return modules by the names that they have when their part is loaded by itself, without those of other parts."""
    before = f"{record.loaded_part}." if record.loaded_part else ""
    return {name.removeprefix(before): kind for name, kind in modules.items() if name.startswith(before)}


def _outside(record: RecipeRecord) -> list[str]:
    return [*_as_loaded(record, dict.fromkeys(record.outside, ""))]


def _quantized(record: RecipeRecord, tool: str, *, derived: bool) -> dict[str, str]:
    """Return the format of each module that is quantized, by all names of tied ones.

    Args:
        record: The recipe.
        tool: What the files are for.
        derived: Whether it quantizes what is derived from a linear layer or an embedding, too.

    Raises:
        NoSuchFormatError: There are none; or one is no linear layer and no embedding, which the tool quantizes.
    """
    found: dict[str, str] = {}
    others: dict[str, list[str]] = {}
    for held in _held(record):
        if held.format is not None:
            for module, kind in held.holders.items():
                found[module] = held.format
                base = kind.rpartition("(")[2].rstrip(")") if derived else kind
                if base not in ("", "Linear", "Embedding"):
                    others.setdefault(kind, []).append(module)
    if others:
        listed = " and ".join(f"{kind} ({_some(modules)})" for kind, modules in others.items())
        raise NoSuchFormatError(
            f"expected formats for linear layers and embeddings, of which {tool} quantizes the weights, got some for "
            f"{listed}; leave these out of the groups, or write what MixedQuantization.of(recipe) gives into the model"
        )
    if not found:
        raise NoSuchFormatError("expected a part that is quantized, got none; lower the budget")
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= _NAMED else f"{names[0]} and {len(names) - 1} others"


def _nothing(record: RecipeRecord) -> Iterable[str]:
    return ()


def torchao_settings(record: RecipeRecord) -> dict[str, Any]:
    """Return `quantization_config` of a Transformers model: torchao's `FqnToConfig`, one entry a module.

    Raises:
        NoSuchFormatError: torchao rounds none as a format does, see `hf_parcor.corruptions.quantization`; or what
            holds a weight is nothing that it quantizes. A `ValueError`.
    """
    # Transformers would not initialize what else a derived class holds, such as the scale of Gemma's embeddings.
    modules = _quantized(record, "torchao", derived=False)
    configs = {label: _torchao(label, record.formats[label]) for label in dict.fromkeys(modules.values())}
    by_module = {module: configs[label] for module, label in modules.items()}
    return {
        "quant_method": "torchao",
        "quant_type": {"default": _ao("FqnToConfig", 1, fqn_to_config=by_module)},
        # Of parameters: else Transformers leaves out heads and tied weights, and takes biases, whatever has an entry.
        # And what is no module's, as the `final_logits_bias` of BART and Marian: there it looks for a dot.
        "modules_to_not_convert": [".bias", "[^.]*$"],
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


def _notes_on_torchao(record: RecipeRecord) -> Iterator[str]:
    if any(held.format == _NVFP4 for held in _held(record)):
        yield (
            "refuses NVFP4 of weights in float16, and of those whose rows are no multiple of 16, as of a small head: "
            "leave these out"
        )
    kept = [name for name in _quantized(record, "torchao", derived=False) if _is_kept(record, f"{name}.weight")]
    if kept:
        yield f"leaves in float what Transformers keeps so where from_pretrained quantizes: {_some(kept)}"


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

    Raises:
        NoSuchFormatError: Nothing has 4 bits or fewer that bitsandbytes quantizes. A `ValueError`.
    """
    skipped = _outside(record)
    quantized: list[str] = []
    for held in _held(record):
        (quantized if _in_nf4(record, held) else skipped).extend(held.holders)
    if not quantized:
        left = _left_in_float(record)
        if left:
            raise NoSuchFormatError(
                f"expected a linear layer that shares its weight with no other module in 4 bits or fewer, which "
                f"bitsandbytes quantizes, got {_some(left)}"
            )
        raise NoSuchFormatError("expected a part with 4 bits or fewer, got none; lower the budget")
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": [_exactly(name, quantized) for name in skipped],
    }


def _in_nf4(record: RecipeRecord, held: _Held) -> bool:
    """Say whether bitsandbytes quantizes a weight: exactly these classes, and no forward pass survives it if tied."""
    return (
        _is_small(record, held)
        and len(held.holders) == 1
        and {*held.holders.values()} <= {"", "Linear", "Conv1D"}
        and not any(_is_kept(record, name) for name in held.holders)
    )


def _is_kept(record: RecipeRecord, name: str) -> bool:
    """Say whether Transformers leaves a module or weight of the loaded part as it is, whatever a tool is told."""
    return not should_convert_module(name, list(record.kept_in_float))


def _is_small(record: RecipeRecord, held: _Held) -> bool:
    return held.format is not None and format_of(record.formats[held.format]).bits <= 4


def _left_in_float(record: RecipeRecord) -> list[str]:
    """Return the modules that bitsandbytes leaves as they are, though they get 4 bits or fewer, with their classes."""
    left = [held for held in _held(record) if _is_small(record, held) and not _in_nf4(record, held)]
    return [f"{' = '.join(held.holders)} ({', '.join(held.holders.values())})" for held in left]


def _notes_on_bitsandbytes(record: RecipeRecord) -> Iterator[str]:
    left = _left_in_float(record)
    if left:
        yield f"leaves in float what the recipe gives 4 bits or fewer: {'; '.join(left)}"
    turned = [
        name
        for held in _held(record)
        if _in_nf4(record, held) and held.format == str(FloatQuantization("nf4"))
        for name, kind in held.holders.items()
        if kind == "Conv1D"
    ]
    if turned:
        yield f"takes the blocks of {_some(turned)} along the other dimension than the recipe: measure again"


def _exactly(name: str, others: list[str]) -> str:
    """Return a module's name as Transformers matches it: a beginning, an end, or an expression where that is more."""
    more = any(other.startswith(f"{name}.") or other.endswith(name) for other in others)
    return f"{re.escape(name)}$" if more else name


def llm_compressor_settings(record: RecipeRecord) -> dict[str, Any]:
    """Return a recipe of llm-compressor: a group of modules for each format, and what is ignored.

    Raises:
        NoSuchFormatError: llm-compressor has no such format, or not for what holds a weight, or not for one alone of
            the modules that it fuses. A `ValueError`.
    """
    modules = _quantized(record, "llm-compressor", derived=True)
    for fused in _fused(record, modules):
        formats = dict.fromkeys(modules.get(module) or "none" for module in fused)
        if len(formats) > 1:
            raise NoSuchFormatError(
                f"expected NVFP4 for all of {', '.join(fused)}, which llm-compressor fuses, or for none, got "
                f"{', '.join(formats)}; put them into one group"
            )
    targets: dict[str, list[str]] = {}
    for module, label in modules.items():
        targets.setdefault(label, []).append(module)
    as_they_are = [module for held in _held(record) if held.format is None for module in held.holders]
    modifier = {
        "ignore": [*_outside(record), *as_they_are],
        "config_groups": {
            f"group_{place}": {"targets": names, "weights": _compressed(label, record.formats[label])}
            for place, (label, names) in enumerate(targets.items())
        },
    }
    return {"quant_stage": {"quant_modifiers": {"QuantizationModifier": modifier}}}


def _fused(record: RecipeRecord, modules: Mapping[str, str]) -> Iterator[list[str]]:
    """Yield the modules of which one has NVFP4 and that llm-compressor gives one scale of the tensor together."""
    every = {*_outside(record), *(module for held in _held(record) for module in held.holders)}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in modules):
        for names in _FUSED:
            fused = [f"{parent}.{name}" if parent else name for name in names]
            if every.issuperset(fused) and any(modules.get(name) == _NVFP4 for name in fused):
                yield fused


def _notes_on_llm_compressor(record: RecipeRecord) -> Iterator[str]:
    fused = [*_fused(record, _quantized(record, "llm-compressor", derived=True))]
    if fused:
        yield (
            f"has one scale of the whole tensor for {_some([', '.join(names) for names in fused])} together, where "
            "the recipe has one for each: measure again"
        )
    if any(held.format is not None and held.bits < _FLOAT32 for held in _held(record)):
        yield (
            "computes in the dtype of the weights: below float32 some codes are the next ones to those of the recipe"
        )


def _compressed(label: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that compressed-tensors calls `QuantizationArgs`."""
    one = format_of(settings)
    blocks: dict[str, Any] = {"strategy": one.per}
    if isinstance(one.per, int):
        blocks = {"strategy": "group", "group_size": one.per}
    if isinstance(one, FloatQuantization):
        if one.format == "fp8_e4m3":
            return {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **blocks}
        if one.format == "nvfp4":
            blocks = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
            return {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False, **blocks}
    elif one.zero_point == "integer" and one.bits <= 8 and (one.code_range == "full" or not one.symmetric):
        return {"num_bits": one.bits, "type": "int", "symmetric": one.symmetric, "dynamic": False, **blocks}
    raise NoSuchFormatError(
        f"expected a format that llm-compressor has, got {label}; score one of them, such as integers with full "
        "codes, or FP8 E4M3"
    )


def defense_settings(record: RecipeRecord) -> dict[str, Any]:
    """Return the flags that train what the recipe spares to survive the format of the others.

    Raises:
        NoSuchFormatError: Nothing is spared.
    """
    modules = [module for group in record.spared for module in record.groups[group].modules]
    if not modules:
        raise NoSuchFormatError("expected parts that the recipe spares, got none: there is nothing to defend")
    assert record.base is not None, "something is spared from it"
    base = record.formats[record.base]
    return {
        "defense": "corruption",
        "defense_corruption": corruption_words([(base["corruption"], base["settings"])]),
        "defense_target_modules": targets_of(modules, record.groups, record.outside),
    }


_EXPORTS: Mapping[str, Callable[[RecipeRecord], dict[str, Any]]] = {
    "torchao.json": torchao_settings,
    "bitsandbytes.yaml": bitsandbytes_settings,
    "llm_compressor.yaml": llm_compressor_settings,
    "defense.yaml": defense_settings,
}

_NOTES: Mapping[str, Callable[[RecipeRecord], Iterable[str]]] = {
    "torchao.json": _notes_on_torchao,
    "bitsandbytes.yaml": _notes_on_bitsandbytes,
    "llm_compressor.yaml": _notes_on_llm_compressor,
}
