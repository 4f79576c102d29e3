"""Models of many languages: which ones their tokenizers know, and from which into which they translate.

mBART, mBART-50, NLLB, M2M100 and PLBART read the source's language from a token beside its text, and generate the
language that their first token names. Where nobody names them, they translate English into English.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_parcor.errors import InputError, nearest
from hf_parcor.sequence_length import generation_settings


def languages_of(tokenizer: Any) -> dict[str, int]:
    """Return the tokens of the languages that a tokenizer puts beside text, by their names; {} if it has none."""
    kind = type(tokenizer)
    if not (hasattr(kind, "src_lang") and hasattr(kind, "set_tgt_lang_special_tokens")):
        return {}
    numbers = getattr(tokenizer, "lang_code_to_id", None)
    if numbers:
        return dict(numbers)
    named = {str(token) for token in tokenizer.special_tokens_map.values()}
    codes = [str(token) for token in tokenizer.all_special_tokens if str(token) not in named]
    return {code: int(tokenizer.convert_tokens_to_ids(code)) for code in codes}


def set_languages(model: Any, tokenizer: Any, source: str | None = None, target: str | None = None) -> None:
    """Let a tokenizer encode, and a model generate, a pair of languages; one without languages stays as it is.

    What is not named is what tokenizer and model were saved with: `src_lang`, `tgt_lang`, or the language that the
    generation configuration begins with. They are saved with both again.

    Args:
        model: A model with encoder and decoder.
        tokenizer: Its tokenizer.
        source: The language of the sources, as the model calls it (`de_DE`, `deu_Latn`), or the part before `_` if no
            other language begins so.
        target: That of the targets.

    Raises:
        InputError: A language is named that the model does not know, or is not named; nothing was changed.
    """
    known = languages_of(tokenizer)
    if not known:
        if source is not None or target is not None:
            raise InputError(
                f"languages: expected a tokenizer that has some, got {type(tokenizer).__name__} and "
                f"{source or target!r}; name none, and give what the model was trained with, if anything, as prefix: "
                "'translate English to German: ' (T5), '>>deu<< ' (Marian)"
            )
        return
    given = {"source": source, "target": target}
    named = {side: _named(known, side, name) for side, name in given.items() if name is not None}
    pair = {**_saved(model, tokenizer, known), **named}
    if len(pair) < 2 or (len(named) < 2 and pair["source"] == pair["target"]):
        raise InputError(
            f"languages: expected those of source and target, which {type(tokenizer).__name__} puts beside text, got "
            f"{', '.join(f'{code} as {side}' for side, code in pair.items()) or 'none'}; name both, such as "
            f"{_some(known)}, with --source-lang and --target-lang, or call set_languages"
        )
    tokenizer.src_lang, tokenizer.tgt_lang = pair["source"], pair["target"]
    _start_with(model, tokenizer, known[pair["target"]])


def check_target_language(model: Any, tokenizer: Any, settings: Mapping[str, Any], labels: torch.Tensor) -> None:
    """Refuse to generate where no language is named, or another one than that of the references.

    Args:
        model: What generates.
        tokenizer: Its tokenizer; one without languages is never refused.
        settings: Those of the generation.
        labels: The token numbers of the references.

    Raises:
        InputError: The first tokens name no language, or not the one in the labels.
    """
    known = languages_of(tokenizer)
    if not known:
        return
    names = {number: code for code, number in known.items()}
    begun = _starts(model, settings) & set(names)
    of_labels = set(labels.flatten().tolist()) & set(names)
    if not begun or (of_labels and begun.isdisjoint(of_labels)):
        raise InputError(
            "forced_bos_token_id: expected the token of the language to translate into"
            f"{''.join(f', {names[number]} in the labels' for number in sorted(of_labels))}, got "
            f"{', '.join(names[number] for number in sorted(begun)) or 'none'}; call "
            "hf_parcor.languages.set_languages(model, tokenizer, source, target) before texts are encoded"
        )


def _saved(model: Any, tokenizer: Any, known: Mapping[str, int]) -> dict[str, str]:
    """Return the languages that model and tokenizer were saved with, as far as they were ever named.

    A tokenizer that was never told takes English for the source, encodes targets in the source's language, and writes
    both into its files.
    """
    source, target = getattr(tokenizer, "init_kwargs", {}).get("src_lang"), getattr(tokenizer, "tgt_lang", None)
    if target is None or target == tokenizer.src_lang:
        starts = _starts(model, {})
        target = next((code for code, number in known.items() if number in starts), None)
    return {side: str(code) for side, code in (("source", source), ("target", target)) if code in known}


def _named(known: Mapping[str, int], side: str, name: str) -> str:
    """Return the language that a name means.

    Raises:
        InputError: There is none, or there are several.
    """
    for code in (name, f"__{name}__"):
        if code in known:
            return code
    longer = [code for code in known if code.startswith(f"{name}_")]
    if len(longer) == 1:
        return longer[0]
    raise InputError(
        f"{side} language: expected one of the model's {len(known)}, such as {_some(longer or known)}, got {name!r}"
        f"{'' if longer else nearest(name, known)}; name one of them"
    )


def _some(codes: Any) -> str:
    shown = list(codes)
    return ", ".join(shown[:6]) + ("…" if len(shown) > 6 else "")


def _starts(model: Any, settings: Mapping[str, Any]) -> set[int]:
    """Return the tokens that a generation begins with, as far as they are set."""
    names = ("forced_bos_token_id", "decoder_start_token_id")
    values = [next(iter(generation_settings(model, settings, name)), None) for name in names]
    return {value for value in values if isinstance(value, int)}


def _start_with(model: Any, tokenizer: Any, language: int) -> None:
    """Let generation begin as the decoder's inputs do in training: with the language (mBART), or the end and it."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)  # M2M100 has none, and begins with the end
    labels = torch.tensor([tokenizer(text_target="a")["input_ids"]])
    if shift is not None and int(shift(labels)[0, 0]) == language:
        model.generation_config.decoder_start_token_id = language
        model.generation_config.forced_bos_token_id = None
    else:
        model.generation_config.forced_bos_token_id = language
