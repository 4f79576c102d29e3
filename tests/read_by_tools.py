"""Programs that a test runs by themselves: a tool reads our file, and what it makes of a model is kept.

    python read_by_tools.py CASES

CASES is a JSON list of `{"tool", "model", "file", "kept"}`. What a tool makes is saved in `kept`: all weights as the
tool reads them back, which of them are quantized, and the logits. What it raises is saved as "error".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor, nn

TOKENS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 3, 5, 7]])


def loaded(folder: str, **settings: Any) -> nn.Module:
    (kind,) = transformers.AutoConfig.from_pretrained(folder).architectures
    return getattr(transformers, kind).from_pretrained(folder, **settings).eval()


def answers(model: nn.Module) -> Tensor:
    both = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(TOKENS, **both).logits


def torchao_quantize(case: dict[str, str]) -> nn.Module:
    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_

    model = loaded(case["model"])
    settings = json.loads(Path(case["file"]).read_text())
    quantize_(model, config_from_dict(settings["quant_type"]["default"]), filter_fn=None)
    return model


def torchao_from_pretrained(case: dict[str, str]) -> nn.Module:
    settings = json.loads(Path(case["file"]).read_text())
    return loaded(case["model"], quantization_config=transformers.TorchAoConfig.from_dict(settings))


def bitsandbytes(case: dict[str, str]) -> nn.Module:
    config = transformers.BitsAndBytesConfig(**yaml.safe_load(Path(case["file"]).read_text()))
    return loaded(case["model"], quantization_config=config, device_map="cpu")


def llm_compressor(case: dict[str, str]) -> nn.Module:
    from llmcompressor import oneshot

    model = loaded(case["model"])
    oneshot(model=model, recipe=case["file"])
    return model


def read_back(module: nn.Module, weight: Tensor) -> tuple[Tensor, bool]:
    """Return a weight as numbers, and whether the tool has quantized it."""
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        plain = dequantize_4bit(weight.data, weight.quant_state)
        # Conv1D keeps its matrix the other way round.
        return (plain.T if getattr(module, "source_cls", nn.Linear) is not nn.Linear else plain), True
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None and weight is module.weight:
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize

        of_tensor = getattr(module, "weight_global_scale", None)
        zero = getattr(module, "weight_zero_point", None)
        return fake_quantize(weight.data, module.weight_scale, zero, scheme.weights, global_scale=of_tensor), True
    quantized = type(weight) is not nn.Parameter
    return (weight.dequantize() if quantized else weight.detach()), quantized


def made(case: dict[str, str]) -> dict[str, Any]:
    model = TOOLS[case["tool"]](case)
    weights, quantized = {}, []
    for prefix, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if name.startswith("weight_"):
                continue  # scales
            place = f"{prefix}.{name}"
            weights[place], of_tool = read_back(module, weight)
            weights[place] = weights[place].clone()
            quantized += [place] if of_tool else []
    return {"weights": weights, "quantized": quantized, "logits": answers(model)}


TOOLS = {
    "torchao": torchao_quantize,
    "torchao, from_pretrained": torchao_from_pretrained,
    "bitsandbytes": bitsandbytes,
    "llm-compressor": llm_compressor,
}

if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        try:
            found = made(one)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        torch.save(found, one["kept"])
