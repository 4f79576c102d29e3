"""A real speech recognizer from a package registry, as Transformers has it, and the recording that comes with it.

    pip download --no-deps --dest wheels moonshine-voice==0.1.0
    python -m scripts.moonshine wheels/moonshine_voice-0.1.0-*.whl runs/moonshine-tiny

The wheel holds Moonshine tiny for English, 27 million weights, in the format of ONNX Runtime: linear layers and the
table of tokens as 8-bit integers with one scale a tensor, all else as float32. The folder gets the model with these
weights as float32, tokenizer and feature extractor, and in `human` the wheel's recording of the first sentence of "A
Tale of Two Cities", cut at its silences, with `human.tsv`: ten parts with their texts, 41 seconds, 119 words.
"""

from __future__ import annotations

import argparse
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from hf_parcor.strict_json import replace_text
from hf_parcor.tasks.audio import read_audio

LIBRARY: Any = transformers
Array: TypeAlias = NDArray[Any]
ASSETS = "moonshine_voice/assets/"
UNKNOWN, START, END = 0, 1, 2
LINE_SEPARATOR = 31353  # the one token that the wheel's list has lost
TYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 9: "?"}
RATE = 16_000
SENTENCES = (
    (1.0, 4.8, "It was the best of times, it was the worst of times."),
    (4.8, 8.5, "It was the age of wisdom, it was the age of foolishness."),
    (8.5, 13.1, "It was the epoch of belief, it was the epoch of incredulity."),
    (13.1, 17.1, "It was the season of Light, it was the season of Darkness."),
    (17.1, 20.85, "It was the spring of hope, it was the winter of despair."),
    (20.85, 24.3, "We had everything before us, we had nothing before us."),
    (24.3, 28.7, "We were all going direct to Heaven, we were all going direct the other way."),
    (28.7, 32.5, "In short, the period was so far like the present period."),
    (32.5, 36.75, "That some of its noisiest authorities insisted on its being received."),
    (36.75, 42.3, "For good or for evil, in the superlative degree of comparison only."),
)


class Table:
    """A table of a flatbuffer; its fields have the numbers of ONNX Runtime's schema.

    Args:
        data: The whole buffer.
        place: Where the table is.
    """

    def __init__(self, data: bytes, place: int) -> None:
        self._data, self._place = data, place

    def number(self, field: int) -> int:
        """Return a whole number that is there."""
        return self._unpack("<i", self._field(field))

    def array(self, field: int, kind: str) -> Array:
        """Return a vector of numbers, empty if it is not there."""
        place = self._target(field)
        return self._vector(place, kind) if place else np.zeros(0, kind)

    def text(self, field: int) -> str:
        """Return a text."""
        return self.array(field, "u1").tobytes().decode()

    def texts(self, field: int) -> list[str]:
        """Return a vector of texts."""
        return [self._vector(table._place, "u1").tobytes().decode() for table in self.tables(field)]

    def table(self, field: int) -> Table | None:
        """Return a table, None if it is not there."""
        place = self._target(field)
        return Table(self._data, place) if place else None

    def tables(self, field: int) -> list[Table]:
        """Return a vector of tables."""
        start, offsets = self._target(field) + 4, self.array(field, "<u4").tolist()
        return [Table(self._data, start + 4 * index + offset) for index, offset in enumerate(offsets)]

    def _unpack(self, kind: str, place: int) -> int:
        found: int = struct.unpack_from(kind, self._data, place)[0]
        return found

    def _vector(self, place: int, kind: str) -> Array:
        return np.frombuffer(self._data, kind, self._unpack("<I", place), place + 4)

    def _field(self, field: int) -> int:
        fields, slot = self._place - self._unpack("<i", self._place), 4 + 2 * field
        offset = self._unpack("<H", fields + slot) if slot < self._unpack("<H", fields) else 0
        return self._place + offset if offset else 0

    def _target(self, field: int) -> int:
        place = self._field(field)
        return place + self._unpack("<I", place) if place else 0


def graphs_of(graph: Table) -> Iterator[Table]:
    """Yield a graph and those inside its nodes, such as the branches of a condition."""
    yield graph
    for node in graph.tables(2):
        for attribute in node.tables(10):
            inner = attribute.table(7)
            if inner is not None:
                yield from graphs_of(inner)


def read_graphs(data: bytes) -> tuple[dict[str, Array], dict[str, list[str]]]:
    """Return the tensors of a file of ONNX Runtime by name, and the inputs of its nodes.

    Raises:
        ValueError: It is no such file.
    """
    model = Table(data, struct.unpack_from("<I", data)[0]).table(1) if data[4:8] == b"ORTM" else None
    outer = None if model is None else model.table(7)
    if outer is None:
        raise ValueError("expected a file of ONNX Runtime, which begins with ORTM, got another; take the named wheel")
    tensors: dict[str, Array] = {}
    inputs: dict[str, list[str]] = {}
    for graph in graphs_of(outer):
        for tensor in graph.tables(0):
            values = tensor.array(4, "u1").view(TYPES[tensor.number(3)])
            tensors[tensor.text(0)] = values.reshape(tensor.array(2, "<i8"))
        inputs |= {node.text(0): node.texts(8) for node in graph.tables(2)}
    return tensors, inputs


def weights_of(data: bytes, prefix: str) -> dict[str, Array]:
    """Return the weights of a file as float32, by the names that Transformers gives them.

    A linear layer's are named after the node that uses them, (inputs, outputs); others have names of their own.
    """
    tensors, inputs = read_graphs(data)

    def as_float(name: str) -> Array:
        scale, zero = (tensors[f"{name}_{part}"].astype(np.float32) for part in ("scale", "zero_point"))
        return (tensors[f"{name}_quantized"].astype(np.float32) - zero) * scale

    weights = {}
    for name, values in tensors.items():
        plain = name.removesuffix("_quantized")
        own = re.sub(r"(_merged_\d+|_add_tensor)$", "", plain)
        weights[prefix + own] = values if plain == name else as_float(plain)
    for name, of_node in inputs.items():
        module = (prefix + name.strip("/").replace("/", ".")).rpartition(".")[0]
        if name.endswith("/MatMul_quant"):
            weights[f"{module}.weight"] = as_float(of_node[1].removesuffix("_quantized")).T
        elif name in ("/groupnorm/Mul", "/groupnorm/Add"):
            weights[f"{module}.{'weight' if name.endswith('Mul') else 'bias'}"] = tensors[of_node[1]].ravel()
    return weights


def build_model(encoder: bytes, decoder: bytes) -> Any:
    """Return the model with the weights of both files."""
    ends = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": UNKNOWN, "decoder_start_token_id": START}
    model: Any = LIBRARY.MoonshineForConditionalGeneration(LIBRARY.MoonshineConfig(**ends))
    model.generation_config = LIBRARY.GenerationConfig(**ends)
    found = weights_of(encoder, "model.encoder.") | weights_of(decoder, "")
    model.load_state_dict({name: torch.tensor(np.ascontiguousarray(found[name])) for name in model.state_dict()})
    return model.eval()


def tokens_of(data: bytes) -> list[str]:
    """Return the tokens of the wheel's list: a length, in two parts of 7 bits from 128 on, and as many bytes."""
    tokens: list[str] = []
    place = 0
    while place < len(data):
        length, place = data[place], place + 1
        if length >= 128:
            length, place = length - 128 + 128 * data[place], place + 1
        raw, place = data[place : place + length], place + length
        tokens.append(f"<0x{raw[0]:02X}>" if 3 <= len(tokens) < 259 else raw.decode())
    tokens[LINE_SEPARATOR] = tokens[LINE_SEPARATOR] or "\u2028"
    return tokens


def build_tokenizer(data: bytes) -> Any:
    """Return the tokenizer, byte pairs as Llama has them; which are merged first, the order of the tokens says.

    Raises:
        ValueError: Two tokens are one.
    """
    tokens = tokens_of(data)
    numbers = {token: number for number, token in enumerate(tokens)}
    if len(numbers) != len(tokens):
        raise ValueError(f"expected {len(tokens):,} tokens that differ, got {len(numbers):,}; take the named wheel")
    words = numbers["<<ST_0>>"]
    ranks = {}
    for rank, token in enumerate(tokens[:words]):
        for left, right in ((token[:cut], token[cut:]) for cut in range(1, len(token))):
            if left in numbers and right in numbers:  # runs of spaces come last
                ranks[left, right] = (rank if token.strip("▁") else words, numbers[left], numbers[right])
    merges = sorted(ranks, key=ranks.__getitem__)
    raw: Any = Tokenizer(models.BPE(numbers, merges, unk_token=tokens[UNKNOWN], fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(back)
    raw.post_processor = processors.TemplateProcessing("$A </s>", "$A $B </s>", [("</s>", END)])
    raw.add_special_tokens([AddedToken(token, normalized=False) for token in (*tokens[:3], *tokens[words:])])
    named = {"bos_token": tokens[START], "eos_token": tokens[END]}
    unknown = dict.fromkeys(("unk_token", "pad_token"), tokens[UNKNOWN])  # what is unknown is written in bytes
    return LIBRARY.PreTrainedTokenizerFast(tokenizer_object=raw, **named, **unknown)


def write_speech(recording: bytes, folder: Path) -> None:
    """Write the parts of the recording, and the table of their texts beside the folder."""
    import soundfile

    samples = read_audio(recording, RATE)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["audio\ttext"]
    for number, (start, end, text) in enumerate(SENTENCES):
        part = samples[round(start * RATE) : round(end * RATE)]
        soundfile.write(folder / f"{number}.wav", part, RATE, subtype="PCM_16")
        lines.append(f"{folder.name}/{number}.wav\t{text}")
    replace_text(folder.with_suffix(".tsv"), "\n".join(lines) + "\n")


def main() -> None:
    """Write the model and the recording."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    with zipfile.ZipFile(options.wheel) as wheel:
        parts = ("encoder_model.ort", "decoder_model_merged.ort", "tokenizer.bin")
        encoder, decoder, tokens = (wheel.read(f"{ASSETS}tiny-en/{name}") for name in parts)
        recording = wheel.read(f"{ASSETS}two_cities.wav")
    build_model(encoder, decoder).save_pretrained(options.output)
    extractor = LIBRARY.Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=False)
    LIBRARY.Wav2Vec2Processor(extractor, build_tokenizer(tokens)).save_pretrained(options.output)
    write_speech(recording, options.output / "human")


if __name__ == "__main__":
    main()
