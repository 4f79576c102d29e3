"""From rows to a metric, for each task: equal to a loop over single rows, written out."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import unicodedata
import wave
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import transformers
from for_each import for_each
from local_models import (
    BERT,
    LABELS,
    LETTERS,
    MANY_LANGUAGES,
    NAMED,
    SAVED,
    SENTENCES,
    WORDS,
    save_bert,
    save_t5,
    save_tokenizer,
    word_tokenizer,
    write_summaries,
)
from transformers.trainer_pt_utils import LabelSmoother

from hf_parcor import (
    BitFlips,
    CorruptionConstraint,
    CorruptionEvaluator,
    GaussianNoise,
    GradientCorruption,
    WorstBitFlips,
)
from hf_parcor.errors import InputError
from hf_parcor.evaluation import LanguageModelMetric
from hf_parcor.evaluation.embeddings import embedding_loss
from hf_parcor.evaluation.identity.fingerprint import fingerprint
from hf_parcor.evaluation.metrics.detection import average_precision
from hf_parcor.evaluation.outputs import ForMetrics
from hf_parcor.tasks import (
    TASKS,
    Encoding,
    Processed,
    Rows,
    check_head,
    load_rows,
    task_named,
    task_of,
)
from hf_parcor.tasks.fill_mask import hide

torch.manual_seed(0)


def of_sequences(model, tokenizer, rows):
    right, losses = [], []
    for row in rows:
        output = model(**tokenizer(row["sentence"], return_tensors="pt"))
        right.append(int(output.logits.argmax()) == row["label"])
        losses.append(torch.nn.functional.cross_entropy(output.logits, torch.tensor([row["label"]])).item())
    return {"accuracy": sum(right) / len(right), "loss": sum(losses) / len(losses)}


def of_words(model, tokenizer, rows):
    losses, right = [], []
    for row in rows:
        (logits,) = model(**tokenizer(" ".join(row["tokens"]), return_tensors="pt")).logits  # a token is a word here
        right += (logits.argmax(-1) == torch.tensor(row["ner_tags"])).tolist()
        losses += (-logits.log_softmax(-1)[range(len(logits)), row["ner_tags"]]).tolist()
    return {"accuracy": sum(right) / len(right), "loss": sum(losses) / len(losses)}


def of_questions(model, tokenizer, rows):
    """Windows of 16 tokens, all pairs of tokens in each; a token is a word, the first one says that there is none."""
    exact, f1, losses = [], [], []
    for row in rows:
        asked, words = row["question"].split(), row["context"].split()
        begins = [len(" ".join([*words[:place], ""])) for place in range(len(words))]
        answers = list(zip(row["answers.text"], row["answers.answer_start"], strict=True))
        room = 16 - len(asked)
        found, of_none = [], []
        for start in range(0, max(1, len(words) - room // 2), room - room // 2):
            part = words[start : start + room]
            tokens = torch.tensor([tokenizer.convert_tokens_to_ids([*asked, *part])])
            first = last = 0
            for text, begin in answers[:1]:
                place, count = begins.index(begin) - start, len(text.split())
                if place >= 0 and place + count <= len(part):
                    first, last = len(asked) + place, len(asked) + place + count - 1
            output = model(tokens, start_positions=torch.tensor([first]), end_positions=torch.tensor([last]))
            losses.append(output.loss.item())
            one, other = output.start_logits[0], output.end_logits[0]
            of_none.append((one[0] + other[0]).item())
            for i in range(len(part)):
                for j in range(i, len(part)):
                    score = (one[len(asked) + i] + other[len(asked) + j]).item()
                    found.append((score, " ".join(part[i : j + 1])))
        score, best = max(found)
        best = best if score >= min(of_none) else ""
        one, *others = (
            [word for word in text.split() if word not in ("a", "the")] for text in [best, *row["answers.text"]]
        )
        exact.append(float(one in (others or [[]])))
        f1.append(max(f1_of(one, other) for other in others or [[]]))
    mean = [sum(values) / len(values) for values in (f1, exact, losses)]
    return dict(zip(("f1", "exact_match", "loss"), mean, strict=True))


def f1_of(found, right):
    common = sum(min(found.count(word), right.count(word)) for word in set(found))
    if not found or not right:
        return float(found == right)
    precision, recall = common / len(found), common / len(right)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def of_masks(model, tokenizer, rows):
    """What is hidden is drawn for each row alone, see `test_fill_mask.py`; a token is a word, and none is around."""
    losses, right = [], []
    for row in rows:
        hidden = hide(tokenizer.convert_tokens_to_ids(row["text"].split()), tokenizer)
        logits, labels = model(torch.tensor([hidden["input_ids"]])).logits[0].log_softmax(-1), hidden["labels"]
        places = [place for place, label in enumerate(labels) if label != -100]
        losses += [-logits[place, labels[place]].item() for place in places]
        right += [int(logits[place].argmax()) == labels[place] for place in places]
    loss = sum(losses) / len(losses)
    return {"loss": loss, "perplexity": math.exp(loss), "accuracy": sum(right) / len(right)}


def of_text(model, tokenizer, rows):
    tokens = [token for row in rows for token in [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]]
    losses, right = [], []
    for start in range(0, len(tokens), 16):  # what the model can take
        block = torch.tensor([tokens[start : start + 16]])
        logits = model(block).logits[0, :-1]
        right += (logits.argmax(-1) == block[0, 1:]).tolist()
        losses += (-logits.log_softmax(-1)[range(len(logits)), block[0, 1:]]).tolist()
    loss = sum(losses) / len(losses)
    return {"loss": loss, "perplexity": math.exp(loss), "accuracy": sum(right) / len(right)}


def generated(model, tokenizer, texts):
    found, cut = [], []
    for text in texts:
        tokens = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5, do_sample=False)
        found.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
        cut.append(tokenizer.eos_token_id not in tokens[0])
    return found, {"predictions_cut": sum(cut) / len(cut)}


def of_translations(model, tokenizer, rows):
    from sacrebleu import corpus_bleu

    found, cut = generated(model, tokenizer, [row["en"] for row in rows])
    return {**cut, "bleu": corpus_bleu(found, [[row["de"] for row in rows]]).score}


def of_summaries(model, tokenizer, rows):
    from sacrebleu import corpus_chrf

    found, cut = generated(model, tokenizer, [row["document"] for row in rows])
    return {**cut, "chrf": corpus_chrf(found, [[row["summary"] for row in rows]]).score}


def of_images(model, processor, rows, folder):
    from PIL import Image

    right, losses = [], []
    for row in rows:
        label = LABELS[row["label"].upper()]
        logits = model(**processor(Image.open(folder / row["image"]), return_tensors="pt")).logits
        right.append(int(logits.argmax()) == label)
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([label])).item())
    return {"accuracy": sum(right) / len(right), "loss": sum(losses) / len(losses)}


def of_objects(model, processor, rows, folder):
    from PIL import Image

    images = [Image.open(folder / row["image"]).convert("RGB") for row in rows]
    batch = processor(images=images, return_tensors="pt")
    sizes, there, targets = torch.tensor([[12.0, 10.0, 12.0, 10.0]]), [], []
    for row in rows:
        boxes = torch.tensor(row["objects.bbox"], dtype=torch.float).reshape(-1, 4)
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], -1).clamp(min=0).minimum(sizes)
        labels = torch.tensor([LABELS[name.upper()] for name in row["objects.category"]], dtype=torch.long)
        there.append({"boxes": corners, "labels": labels})
        center, extent = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        targets.append({"class_labels": labels, "boxes": torch.cat([center, extent], -1) / sizes})
    output = model(batch["pixel_values"], labels=targets)
    found = processor.post_process_object_detection(output, threshold=0, target_sizes=[(10, 12)] * len(rows))
    return {**average_precision(found, there), "loss": output.loss.item()}


def samples_of(file):
    with wave.open(str(file)) as opened:
        assert (opened.getframerate(), opened.getnchannels()) == (16_000, 1)
        return np.frombuffer(opened.readframes(opened.getnframes()), "<i2") / np.float32(32768)


def normed(samples):
    """As Wav2Vec 2.0 has them."""
    return torch.from_numpy((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7))[None]


def edits(said, heard):
    """The least number of insertions, deletions and substitutions, by the table of Wagner and Fischer."""
    row = list(range(len(heard) + 1))
    for place, one in enumerate(said, start=1):
        above, row = row, [place]
        for index, other in enumerate(heard, start=1):
            row.append(min(above[index] + 1, row[-1] + 1, above[index - 1] + (one != other)))
    return row[-1]


def of_speech(model, _, rows, folder):
    pairs = []
    for row in rows:
        (frames,) = model(normed(samples_of(folder / row["audio"]))).logits.argmax(-1).tolist()
        heard = [LETTERS[token] for token, _ in itertools.groupby(frames) if token]
        pairs.append((row["text"], "".join(heard).replace("|", " ")))
    return error_rates(pairs)


def error_rates(pairs):
    def spoken(text):
        return " ".join("".join(one for one in text.lower() if unicodedata.category(one)[0] != "P").split())

    kept = [[spoken(text) for text in pair] for pair in pairs]
    words, letters = ([(split(one), split(other)) for one, other in kept] for split in (str.split, list))
    return {
        name: sum(edits(*pair) for pair in of_texts) / sum(len(said) for said, _ in of_texts)
        for name, of_texts in (("wer", words), ("cer", letters))
    }


def of_sounds(model, _, rows, folder):
    right, losses = [], []
    for row in rows:
        label = LABELS[row["label"].upper()]
        logits = model(normed(samples_of(folder / row["audio"]))).logits
        right.append(int(logits.argmax()) == label)
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([label])).item())
    return {"accuracy": sum(right) / len(right), "loss": sum(losses) / len(losses)}


def of_searches(model, _, rows):
    texts = [row[name] for name in ("anchor", "positive") for row in rows]
    unit = torch.nn.functional.normalize(model.encode(texts, convert_to_tensor=True), dim=-1)
    embeddings = dict(zip(texts, unit, strict=True))
    right = {row["anchor"]: set() for row in rows}
    for row in rows:
        right[row["anchor"]].add(row["positive"])
    gains, first, reciprocals, losses = [], [], [], []
    for query, wanted in right.items():
        documents = {row["positive"] for row in rows}
        ranked = sorted(documents, key=lambda text: -float(embeddings[query] @ embeddings[text]))
        places = [place for place, text in enumerate(ranked) if text in wanted]
        best = sum(1 / math.log2(place + 2) for place in range(len(wanted)))
        gains.append(sum(1 / math.log2(place + 2) for place in places) / best)
        first.append(float(places[0] == 0))
        reciprocals.append(1 / (places[0] + 1))
    for row in rows:  # all four share a batch
        wrong = [other["positive"] for other in rows if other["positive"] not in right[row["anchor"]]]
        among = torch.stack([embeddings[text] for text in (row["positive"], *wrong)])
        losses.append(-(20 * among @ embeddings[row["anchor"]]).log_softmax(-1)[0].item())
    means = [sum(values) / len(values) for values in (gains, first, reciprocals, losses)]
    return dict(zip(("ndcg@10", "accuracy@1", "mrr@10", "loss"), means, strict=True))


BY_HAND = {
    "text-classification": of_sequences,
    "token-classification": of_words,
    "question-answering": of_questions,
    "fill-mask": of_masks,
    "text-generation": of_text,
    "summarization": of_summaries,
    "translation": of_translations,
    "image-classification": of_images,
    "object-detection": of_objects,
    "automatic-speech-recognition": of_speech,
    "audio-classification": of_sounds,
    "sentence-similarity": of_searches,
}


# What is seen or heard has none, or one of its own, and so has a model of sentence-transformers.
OF_FILES = [name for name, task in TASKS.items() if {"image", "audio"} & set(task.roles)]
WITH_TOKENIZER = [name for name in TASKS if name not in (*OF_FILES, "sentence-similarity")]


def test_every_task_has_a_row():
    assert list(BY_HAND) == list(SAVED) == list(TASKS), "a new task needs a row here and in local_models"
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "padding"),
    [*((name, None) for name in TASKS), *((name, "left") for name in WITH_TOKENIZER)],
)
def test_the_metric_is_that_of_a_loop_over_rows(name, padding, tmp_path):
    """Also with a tokenizer that was saved to pad at the left, as for generation, where positions begin."""
    pytest.importorskip("sacrebleu")
    pytest.importorskip("PIL")
    save_model, write_data, file = SAVED[name]
    folder, data = save_model(tmp_path / "model"), write_data(tmp_path / file)
    rows = load_rows(data)
    task = task_of(folder, rows, {})
    assert task.name == name
    check_head(task, folder)
    columns = task.find_columns(rows, {})
    model = task.load_model(folder).eval()
    is_generated = name in ("translation", "summarization")
    processed = Processed(model, task.load_processor(folder), Encoding(max_length=5 if is_generated else None))
    if padding is not None:
        processed.processor.padding_side = padding
    task.prepare(processed)
    size = 1 if name == "question-answering" else 4  # in whose loss Transformers counts padding
    batches = task.batches(task.examples(rows, columns, processed), processed, size)
    with torch.no_grad():
        found = task.metric(task.metrics[0], processed, batches)(model)
        more = (tmp_path,) if name in OF_FILES else ()
        expected = BY_HAND[name](model, processed.processor, rows.entries, *more)
    assert found == pytest.approx(expected, rel=1e-5)
    assert task.shown(task.metrics[0], found) == task.metrics[0]


def beside_images(kind, config, **settings):
    """Return a decoder that takes images too, and reads texts of 16 tokens."""
    text = {**tiny.decoder(len(WORDS)), "head_dim": 4, "max_position_embeddings": 16, "initializer_range": 0.5}
    vision = {**tiny.images(), "intermediate_size": 16, "num_attention_heads": 2}
    return kind(config(text_config={**text, **settings}, vision_config=vision, image_token_index=len(WORDS) - 1))


BESIDE_IMAGES = {
    "Gemma 3": (transformers.Gemma3ForConditionalGeneration, transformers.Gemma3Config),
    "LLaVA": (transformers.LlavaForConditionalGeneration, transformers.LlavaConfig),
    "Mistral 3": (transformers.Mistral3ForConditionalGeneration, transformers.Mistral3Config),
}


@for_each("name", BESIDE_IMAGES)
def test_a_decoder_that_takes_images_too_is_measured_on_texts(name, tmp_path):
    """Its class is named as one that reads texts with an encoder, and Transformers loads it by another one."""
    task, save_data = TASKS["text-generation"], SAVED["text-generation"][1]
    rows = load_rows(save_data(tmp_path / SAVED["text-generation"][2]))
    beside_images(*BESIDE_IMAGES[name]).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    folder = str(tmp_path / "model")
    assert task_of(folder, rows, {}) is task
    check_head(task, folder)
    with pytest.raises(InputError, match="a head for summarization"):
        check_head(TASKS["summarization"], folder)
    model = task.load_model(folder).eval()
    assert isinstance(model, BESIDE_IMAGES[name][0])
    processed = Processed(model, task.load_processor(folder), Encoding())
    batches = task.batches(task.examples(rows, task.find_columns(rows, {}), processed), processed, 2)
    found = task.metric("perplexity", processed, batches)(model)
    assert found == pytest.approx(of_text(model, processed.processor, rows.entries), rel=1e-5)


def test_chats_are_what_the_template_of_the_tokenizer_makes_of_them(tmp_path):
    """It says where a chat ends: no token comes behind that."""
    task, folder = TASKS["text-generation"], SAVED["text-generation"][0](tmp_path / "model")
    said = [[("user", first), ("assistant", second)] for first, second in itertools.pairwise(SENTENCES)]
    chats = [[{"role": role, "content": text} for role, text in chat] for chat in said]
    rows = Rows("chats.jsonl", [{"messages": chat} for chat in chats], ("messages",))
    processed = Processed(task.load_model(folder), task.load_processor(folder), Encoding())
    columns = task.find_columns(rows, {})
    with pytest.raises(InputError, match=r"expected one with a template for the chats in column 'messages', got none"):
        task.examples(rows, columns, processed)
    refusing = "{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    processed.processor.chat_template = (
        f"{{% for m in messages %}}{refusing}{{{{ m['content'] }}}} {{{{ eos_token }}}} {{% endfor %}}"
    )
    expected = [one for chat in chats for one in processed.processor.apply_chat_template(chat)["input_ids"]]
    windows = task.examples(rows, columns, processed)
    assert [token for window in windows for token in window["input_ids"]] == expected
    broken = replace(rows, entries=[*rows.entries, {"messages": [{"role": "system", "content": "good"}]}])
    with pytest.raises(InputError, match=rf"got one in row {len(chats) + 1} that it cannot \(.*no system here\)"):
        task.examples(broken, columns, processed)


def test_what_reads_images_with_an_encoder_is_no_decoder(tmp_path):
    sizes = {**tiny.t5(len(WORDS)), "hidden_size": 8, "num_hidden_layers": 1}
    transformers.Pix2StructConfig(
        text_config=sizes, architectures=["Pix2StructForConditionalGeneration"]
    ).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"expected a decoder.* with a Pix2StructConfig"):
        TASKS["text-generation"].load_model(str(tmp_path))


@for_each("name", ["text-classification", "token-classification", "summarization", "translation"])
def test_long_texts_are_cut_to_what_the_model_takes(name, tmp_path_factory, caplog):
    folder = tmp_path_factory.mktemp("long")
    task, length = TASKS[name], 2
    save_model, write_data, file = SAVED[name]
    rows, model_folder = load_rows(write_data(folder / file)), save_model(folder / "model")
    processed = Processed(
        task.load_model(model_folder), task.load_processor(model_folder), Encoding(max_length=length)
    )
    columns = task.find_columns(rows, {})
    whole = task.examples(rows, columns, replace(processed, encoding=Encoding()))
    assert not caplog.records
    cut = task.examples(rows, columns, processed)
    said = caplog.text
    for role in columns.keys() - {"label"}:
        count = sum(len(one["labels" if role == "target" else "input_ids"]) > length for one in whole)
        told = f"{count} of {len(whole)} texts of column {columns[role]!r} have more than {length} tokens and are cut"
        assert (told in said) == (count > 0), said
    for one, other in zip(cut, whole, strict=True):
        for key in one.keys() & {"input_ids", "labels"}:
            if isinstance(other[key], list):
                assert len(one[key]) == min(length, len(other[key]))
    assert any(len(one["input_ids"]) > length for one in whole)


@for_each(("stride", "between"), [(None, None), (3, None), (None, "\n"), (5, "\n"), (16, "\n\n")])
def test_windows_over_a_text_file(tmp_path_factory, stride, between):
    folder = tmp_path_factory.mktemp("windows")
    data = folder / "text.txt"
    data.write_text("\n".join(SENTENCES * 3) + "\n")
    task, rows = TASKS["text-generation"], load_rows(str(data))
    name = SAVED["text-generation"][0](folder / "model")
    model, tokenizer = task.load_model(name).eval(), task.load_processor(name)
    encoding = Encoding(stride=stride, between_rows=between)
    processed = Processed(model, tokenizer, encoding)
    task.prepare(processed)
    batches = task.batches(task.examples(rows, {"text": "text"}, processed), processed, 4)
    # The tokenizer knows words between spaces alone: the end of a row is written as one.
    text = (" </s> ".join(SENTENCES * 3) + " </s>") if between is None else between.join(SENTENCES * 3)
    by_hand = LanguageModelMetric.of_text(text, tokenizer, length=16, stride=stride)
    assert task.metric("perplexity", processed, batches)(model) == pytest.approx(by_hand(model), rel=1e-5)


@for_each(("between", "begins"), [(None, ""), (" ", "Ende ")])
def test_what_begins_a_text_does_not_begin_every_row(tmp_path_factory, between, begins):
    """Of a tokenizer that puts a token before each text, as that of Llama does: here it is `Ende`."""
    from tokenizers import processors

    task, folder = TASKS["text-generation"], tmp_path_factory.mktemp("model")
    model = task.load_model(SAVED["text-generation"][0](folder))
    tokenizer = task.load_processor(str(folder))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="Ende $A", special_tokens=[("Ende", WORDS.index("Ende"))]
    )
    rows = Rows("rows", [{"text": text} for text in SENTENCES], ("text",))
    windows = task.examples(rows, {"text": "text"}, Processed(model, tokenizer, Encoding(between_rows=between)))
    text = begins + (" </s> ".join(SENTENCES) + " </s>" if between is None else between.join(SENTENCES))
    found = [WORDS[token] for window in windows for token in window["input_ids"]]
    assert found == [word if word in WORDS else "[UNK]" for word in text.split()]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_TOKENIZER)
def test_a_tokenizer_that_returns_more_than_the_model_takes(name, tmp_path):
    """As that of a BERT with a BART or a T5, which many Chinese ones have; BERT itself does take all of it."""
    task, (save, write, file) = TASKS[name], SAVED[name]
    rows, folder = load_rows(write(tmp_path / file)), save(tmp_path / "model")
    found = []
    for more in ([], ["token_type_ids"]):
        model, tokenizer = task.load_model(folder).eval(), task.load_processor(folder)
        tokenizer.model_input_names = [*tokenizer.model_input_names, *more]
        processed = Processed(model, tokenizer, Encoding())
        task.prepare(processed)
        examples = task.examples(rows, task.find_columns(rows, {}), processed)
        taken = {*inspect.signature(model.forward).parameters}
        given = {key for row in examples for key, value in row.items() if not isinstance(value, ForMetrics)}
        assert given <= taken
        assert ("token_type_ids" in given) == bool(more and name.endswith(("classification", "answering")))
        found.append(task.metric(task.metrics[0], processed, task.batches(examples, processed, 4))(model))
    if "question" not in task.roles:  # beside which the text is of another type
        assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_model_in_half_precision(name, tmp_path):
    """It gets its inputs so: the metric is computed, and along the gradient; what cannot be is refused."""
    pytest.importorskip("PIL")
    task, (save, write, file) = TASKS[name], SAVED[name]
    rows, folder = load_rows(write(tmp_path / file)), save(tmp_path / "model")
    processed = Processed(task.load_model(folder, dtype=torch.bfloat16).eval(), task.load_processor(folder))
    if name == "object-detection":
        with pytest.raises(InputError, match=r"dtype: expected float32 for object-detection, .* got bfloat16"):
            task.prepare(processed)
        return
    task.prepare(processed)
    batches = task.batches(task.examples(rows, task.find_columns(rows, {}), processed), processed, 2)
    metric = task.metric(task.metrics[0], processed, batches)
    loss = {"loss": embedding_loss} if name == "sentence-similarity" else {}
    evaluator = CorruptionEvaluator(processed.model, metric, batches, **loss, progress=False)
    record = evaluator.evaluate([GradientCorruption(CorruptionConstraint(epsilon=1.0))])
    assert record.corruptions[0].changed > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_model_that_is_destroyed(name, tmp_path):
    """Its NaN is measured, and said: losses and searches of Transformers that refuse it do not end a sweep."""
    pytest.importorskip("PIL")
    task, (save, write, file) = TASKS[name], SAVED[name]
    rows, folder = load_rows(write(tmp_path / file)), save(tmp_path / "model")
    processed = Processed(task.load_model(folder).eval(), task.load_processor(folder))
    task.prepare(processed)
    batches = task.batches(task.examples(rows, task.find_columns(rows, {}), processed), processed, 2)
    metric = task.metric(task.metrics[0], processed, batches)
    loss = {"loss": embedding_loss} if name == "sentence-similarity" else {}
    evaluator = CorruptionEvaluator(processed.model, metric, batches, **loss, progress=False)
    record = evaluator.evaluate([BitFlips(rate=0.3), WorstBitFlips(count=2), GaussianNoise(0.0)])
    destroyed, _, as_it_was = record.corruptions
    assert any(destroyed.not_finite) or math.isnan(destroyed.mean("loss"))
    assert {metric: values[-1] for metric, values in as_it_was.metrics.items()} == {
        metric: values[0] for metric, values in record.clean.metrics.items()
    }


ASKED = {
    **{"max_length": 4, "prefix": "a ", "source_language": "de", "target_language": "en", "box_format": "voc"},
    **{"stride": 4, "between_rows": "\n"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_what_a_task_does_not_read_is_refused(name, tmp_path):
    """Nothing that is asked for does nothing."""
    read = set()

    class Watched(Encoding):
        def __getattribute__(self, field):
            read.update({field} & set(ASKED))
            return super().__getattribute__(field)

    task, (save, write, file) = TASKS[name], SAVED[name]
    rows, folder = load_rows(write(tmp_path / file)), save(tmp_path / "model")
    columns = task.find_columns(rows, {})
    processed = Processed(task.load_model(folder), task.load_processor(folder), Watched())
    examples = task.examples(rows, columns, processed)
    task.metric(task.metrics[0], processed, task.batches(examples, processed, 2))
    if name == "automatic-speech-recognition":
        read.add("source_language")  # which others of its models are told
    if name in ("summarization", "translation"):
        read |= {"source_language", "target_language"}  # which tokenizer and model are told, see TestLanguages
    assert set(ASKED) == {field.name for field in fields(Encoding)}
    for field in set(ASKED) - read:
        with pytest.raises(InputError, match=f"{field}: expected none for {name}, .*got"):
            task.prepare(replace(processed, encoding=Encoding(**{field: ASKED[field]})))
    for field in read - {"source_language", "target_language"}:
        task.prepare(replace(processed, encoding=Encoding(**{field: ASKED[field]})))


NO_TEXT = [["a", "b"], {"de": "a"}, True, math.nan]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TASKS if name not in OF_FILES])
def test_what_is_no_text_or_has_no_token(name, tmp_path):
    """Lists are not measured as Python writes them, and no model gets a row without tokens, or padding alone."""
    task, (save, write, file) = TASKS[name], SAVED[name]
    rows, folder = load_rows(write(tmp_path / file)), save(tmp_path / "model")
    columns = task.find_columns(rows, {})
    processed = Processed(task.load_model(folder), task.load_processor(folder))

    def with_second(role, value):
        column, (first, second, *rest) = columns[role], rows.entries
        value = [value, *second[column][1:]] if role == "words" else value
        return replace(rows, entries=[first, {**second, column: value}, *rest])

    for role in set(columns) - {"label", "answer", "start"}:
        for value in NO_TEXT:
            with pytest.raises(InputError, match=rf"{columns[role]!r}.*got \w+ in row 2; name"):
                task.examples(with_second(role, value), columns, processed)
        as_number, as_text = (task.examples(with_second(role, value), columns, processed) for value in (7, "7"))
        assert fingerprint(as_number) == fingerprint(as_text)
    if name not in ("text-generation", "fill-mask"):  # whose rows are one text, or left out
        role = next(iter(columns))
        empty = with_second(role, "")
        if role == "words":
            empty.entries[1].update({columns[role]: [], columns["label"]: []})
        with pytest.raises(InputError, match=rf"a token .*{columns[role]!r}.*got none in row 2; leave"):
            task.examples(empty, columns, processed)


def test_images_whose_files_are_named_by_numbers(tmp_path):
    pytest.importorskip("PIL")
    save_model, write_data, file = SAVED["image-classification"]
    folder, data = save_model(tmp_path / "model"), Path(write_data(tmp_path / file))
    for image in tmp_path.glob("*.png"):
        image.rename(image.with_suffix(""))
    (tmp_path / "numbers.csv").write_text(data.read_text().replace(".png", ""))
    task, rows = TASKS["image-classification"], load_rows(str(tmp_path / "numbers.csv"))
    processed = Processed(task.load_model(folder), task.load_processor(folder))
    examples = task.examples(rows, task.find_columns(rows, {}), processed)
    assert [tuple(example["pixel_values"].shape) for example in examples] == [(3, 8, 8)] * len(rows.entries)


class TestColumns:
    def rows(self, *columns):
        return Rows("rows.tsv", [dict.fromkeys(columns, "good")], columns)

    @for_each(
        ("task", "columns", "given", "found"),
        [
            ("text-classification", ("idx", "Text", "Label"), {}, {"text": "Text", "label": "Label"}),
            (
                "text-classification",
                ("premise", "hypothesis", "label"),
                {},
                {"text": "premise", "second_text": "hypothesis", "label": "label"},
            ),
            ("text-classification", ("a", "sentence", "label"), {"text": "a"}, {"text": "a", "label": "label"}),
            (
                "text-classification",
                ("context", "answer", "label"),
                {"text": "answer"},
                {"text": "answer", "label": "label"},
            ),
            (
                "object-detection",
                ("image", "objects"),
                {"boxes": "objects"},
                {"image": "image", "boxes": "objects", "label": "objects"},
            ),
            ("object-detection", ("file_name", "objects"), {}, {"image": 0, "boxes": 1, "label": 1}),
            ("object-detection", ("image", "file_name", "objects"), {}, {"image": 0, "boxes": 2, "label": 2}),
            ("image-classification", ("file_name", "label"), {}, {"image": 0, "label": 1}),
            ("translation", ("translation.de", "translation.en", "id"), {}, {"source": 0, "target": 1}),
            ("translation", ("de", "en"), {"source": "en", "target": "de"}, {"source": "en", "target": "de"}),
            ("translation", ("target", "source"), {}, {"source": "source", "target": "target"}),
            ("summarization", ("highlights", "article"), {}, {"source": "article", "target": "highlights"}),
        ],
    )
    def test_names_that_are_well_known_or_given(self, task, columns, given, found):
        expected = {role: columns[name] if isinstance(name, int) else name for role, name in found.items()}
        assert TASKS[task].find_columns(self.rows(*columns), given) == expected

    @for_each(
        ("given", "says"),
        [
            ({}, r"expected a column with the label .* got the columns sentence, stars; .* --column label=NAME"),
            ({"labl": "stars"}, r"expected one of the roles .* got 'labl' \(did you mean label\?\)"),
            ({"label": "star"}, r"expected one of the columns sentence, stars, got 'star' .*did you mean stars"),
        ],
    )
    def test_names_that_are_not(self, given, says):
        with pytest.raises(InputError, match=says):
            TASKS["text-classification"].find_columns(self.rows("sentence", "stars"), given)

    def test_all_that_are_missing_are_named_at_once(self):
        says = "expected columns with the source and the target .* --column source=NAME --column target=NAME"
        with pytest.raises(InputError, match=says):
            TASKS["translation"].find_columns(self.rows("first", "second", "id"), {})

    def test_two_columns_that_differ_in_case(self):
        rows = self.rows("sentence", "Label", "label")
        task = TASKS["text-classification"]
        with pytest.raises(InputError, match=r"one column for label, got Label, label"):
            task.find_columns(rows, {})
        assert task.find_columns(rows, {"label": "label"}) == {"text": "sentence", "label": "label"}


class TestGuess:
    def test_a_model_for_two_tasks_is_for_the_data(self, tmp_path):
        model = SAVED["summarization"][0](tmp_path / "model")
        rows = load_rows(write_summaries(tmp_path / "rows.csv"))
        assert task_of(model, rows, {}).name == "summarization"

    @pytest.mark.parametrize(
        ("kind", "columns", "given", "task"),
        [
            ("T5ForConditionalGeneration", ("document", "summary"), {}, "summarization"),
            ("T5ForConditionalGeneration", ("de", "en"), {}, "translation"),
            ("T5ForConditionalGeneration", ("source", "target"), {}, "translation"),
            ("T5ForConditionalGeneration", ("translation.de", "translation.en"), {}, "translation"),
            ("T5ForConditionalGeneration", ("a", "summary"), {"source": "a"}, "summarization"),
            ("T5ForConditionalGeneration", ("a", "b", "c"), {"source": "a", "target": "b"}, ""),
            ("T5ForConditionalGeneration", ("text", "summary", "source", "target"), {}, ""),
            ("T5ForConditionalGeneration", ("a", "b", "c"), {}, ""),
            ("EncoderDecoderModel", ("document", "summary"), {}, "summarization"),
            ("EncoderDecoderModel", ("de", "en"), {}, "translation"),
            ("BertForSequenceClassification", ("a", "b", "c"), {}, "text-classification"),
            ("MarianMTModel", ("de", "en"), {"source": "de", "target": "en"}, "translation"),
            ("MarianMTModel", ("document", "summary"), {}, "translation"),
            ("MarianMTModel", ("text", "summary"), {"source": "text", "target": "summary"}, "translation"),
        ],
    )
    def test_of_several_tasks_the_columns_tell_or_it_is_asked_for(self, tmp_path, kind, columns, given, task):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": [kind]}))
        rows = Rows("rows.tsv", [dict.fromkeys(columns, "good")], columns)
        if task:
            assert task_of(str(tmp_path), rows, given).name == task
        else:
            with pytest.raises(InputError, match=r"got summarization and translation"):
                task_of(str(tmp_path), rows, given)

    def test_a_translation_model_does_not_summarize(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "marian", "architectures": ["MarianMTModel"]}))
        check_head(TASKS["translation"], str(tmp_path))
        with pytest.raises(InputError, match="a head for summarization"):
            check_head(TASKS["summarization"], str(tmp_path))

    def test_a_model_that_sees_does_not_translate(self):
        assert not TASKS["translation"].has_head(["VisionEncoderDecoderModel"])

    def test_a_model_without_a_head(self, tmp_path):
        model = save_bert(tmp_path / "model", transformers.BertModel)
        rows = Rows("rows", [{"sentence": "good", "label": 1}], ("sentence", "label"))
        with pytest.raises(InputError, match=r"expected one with a head for .* got .* with BertModel"):
            task_of(model, rows, {})
        with pytest.raises(InputError, match=r"head for text-classification \(…ForSequenceClassification\)"):
            check_head(TASKS["text-classification"], model)

    def test_an_unknown_name(self):
        with pytest.raises(InputError, match=r"got 'translate' \(did you mean translation\?\)"):
            task_named("translate")


class TestPairsAndPrefixes:
    def test_two_texts_are_encoded_as_a_pair(self, tmp_path):
        task = TASKS["text-classification"]
        folder = save_bert(tmp_path / "model")
        rows = Rows("rows", [{"premise": "good", "hypothesis": "bad", "label": 1}], ("premise", "hypothesis", "label"))
        processed = Processed(task.load_model(folder), task.load_processor(folder))
        (example,) = task.examples(rows, task.find_columns(rows, {}), processed)
        assert example["input_ids"] == processed.processor("good", "bad")["input_ids"] == [3, 4]

    def test_a_prefix_and_a_length(self, tmp_path):
        task = TASKS["text-classification"]
        folder = save_bert(tmp_path / "model")
        rows = Rows("rows", [{"sentence": "bad film", "label": 0}], ("sentence", "label"))
        processed = Processed(task.load_model(folder), task.load_processor(folder), Encoding(2, "good "))
        (example,) = task.examples(rows, task.find_columns(rows, {}), processed)
        assert example["input_ids"] == [3, 4]

    def test_a_model_with_a_vocabulary_for_targets_is_not_measured_with_that_for_sources(self):
        config = transformers.MarianConfig(**tiny.seq2seq(9), decoder_vocab_size=7)
        for shared in (True, False):
            config.share_encoder_decoder_embeddings = shared
            processed = Processed(transformers.MarianMTModel(config), word_tokenizer(WORDS, pad_token="[PAD]"))
            if shared:
                TASKS["translation"].prepare(processed)
            else:
                with pytest.raises(InputError, match="tokenizer: expected one with a vocabulary for sources and one"):
                    TASKS["translation"].prepare(processed)

    @pytest.mark.parametrize("of_targets", [9, 7])
    def test_nor_is_one_of_two_models(self, of_targets):
        first, second = (transformers.BertConfig(**tiny.encoder(words)) for words in (9, of_targets))
        config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(first, second)
        processed = Processed(transformers.EncoderDecoderModel(config), word_tokenizer(WORDS, pad_token="[PAD]"))
        if of_targets == 9:
            TASKS["translation"].prepare(processed)
        else:
            with pytest.raises(InputError, match="tokenizer: expected one with a vocabulary for sources and one"):
                TASKS["translation"].prepare(processed)

    def test_a_tokenizer_that_cannot_pad(self, tmp_path):
        folder = save_bert(tmp_path / "model")
        path = tmp_path / "model" / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in settings.items() if name != "pad_token"}))
        with pytest.raises(InputError, match="expected one with a padding token"):
            TASKS["text-classification"].load_processor(folder)
        TASKS["text-generation"].load_processor(folder)


class TestLengths:
    def test_a_text_of_roberta_is_cut_to_the_positions_that_there_are(self, tmp_path):
        """Of 16 rows two are for no token; the tokenizer would let 16 pass."""
        torch.manual_seed(0)
        config = transformers.RobertaConfig(**{**BERT, "pad_token_id": 1})
        transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
        save_tokenizer(tmp_path)
        task, rows = TASKS["text-classification"], Rows("rows", [{"text": "bad " * 40, "label": 0}], ("text", "label"))
        processed = Processed(task.load_model(str(tmp_path)), task.load_processor(str(tmp_path)))
        (example,) = task.examples(rows, task.find_columns(rows, {}), processed)
        assert len(example["input_ids"]) == 14
        processed.model(torch.tensor([example["input_ids"]]))
        asked = Processed(processed.model, processed.processor, Encoding(15))
        with pytest.raises(InputError, match="at most 14 tokens"):
            task.examples(rows, task.find_columns(rows, {}), asked)

    def test_a_tokenizer_that_takes_less_than_the_model(self, tmp_path):
        folder = SAVED["translation"][0](tmp_path / "model")  # T5 has no bound, its tokenizer 16
        rows = Rows("rows", [{"de": "gut " * 40, "en": "good " * 40}], ("de", "en"))
        task = TASKS["translation"]
        processed = Processed(task.load_model(folder), task.load_processor(folder))
        (example,) = task.examples(rows, task.find_columns(rows, {}), processed)
        assert (len(example["input_ids"]), len(example["labels"])) == (16, 16)

    def test_encoder_and_decoder_that_take_texts_of_different_length(self, tmp_path):
        torch.manual_seed(0)
        config = transformers.LEDConfig(**LED)
        save_tokenizer(tmp_path)
        task = TASKS["summarization"]
        processed = Processed(transformers.LEDForConditionalGeneration(config), task.load_processor(str(tmp_path)))
        processed.processor.model_max_length = 1000
        rows = Rows("rows", [{"text": "bad " * 40, "summary": "good " * 40}], ("text", "summary"))
        (example,) = task.examples(rows, task.find_columns(rows, {}), processed)
        assert (len(example["input_ids"]), len(example["labels"])) == (12, 8)
        processed.model(**{name: torch.tensor([value]) for name, value in example.items()})


LED = {
    **{"vocab_size": len(WORDS), "d_model": 8, "max_encoder_position_embeddings": 12, "attention_window": 4},
    **{"max_decoder_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2},
    **{f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")},
    "decoder_start_token_id": 2,
}


class TestLanguages:
    @pytest.mark.parametrize("name", ["translation", "summarization"])
    def test_of_models_that_have_many(self, name, tmp_path):
        task, folder = TASKS[name], MANY_LANGUAGES["mbart50"](tmp_path)
        bare = Processed(task.load_model(folder), task.load_processor(folder))
        with pytest.raises(InputError, match="expected those of source and target"):
            task.prepare(bare)
        named = Processed(bare.model, bare.processor, Encoding(None, "", "de_DE", "en_XX"))
        task.prepare(named)
        columns = [role.names[0] for role in task.roles.values()]
        rows = Rows("rows", [dict(zip(columns, ("gut", "good"), strict=True))], tuple(columns))
        (example,) = task.examples(rows, task.find_columns(rows, {}), named)
        texts = [bare.processor.convert_ids_to_tokens(example[side]) for side in ("input_ids", "labels")]
        assert [text[0] for text in texts] == ["de_DE", "en_XX"]


ENCODER_DECODERS = {"t5": save_t5, **MANY_LANGUAGES}


class TestSmoothing:
    @pytest.mark.parametrize("adapted", [False, True])
    @pytest.mark.parametrize("name", ENCODER_DECODERS)
    def test_a_decoder_reads_what_the_model_makes_of_labels(self, name, adapted, tmp_path):
        """So that nothing changes where labels are not smoothed; where they are, the model sees none."""
        task, folder = TASKS["translation"], ENCODER_DECODERS[name](tmp_path)
        model, tokenizer = task.load_model(folder), task.load_processor(folder)
        codes = {"mbart": ("de_DE", "en_XX"), "mbart50": ("de_DE", "en_XX"), "nllb": ("deu_Latn", "eng_Latn")}
        processed = Processed(model, tokenizer, Encoding(None, "", *codes.get(name, (None, None))))
        task.prepare(processed)
        if adapted:
            peft = pytest.importorskip("peft", reason="an optional dependency, the extra peft")
            config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
            processed = replace(processed, model=peft.get_peft_model(model, config))
        rows = Rows("rows", [{"de": "gut", "en": "good film"}, {"de": "gut Film", "en": "good"}], ("de", "en"))
        examples = task.examples(rows, task.find_columns(rows, {}), processed)
        read, losses = [], []
        model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True
        )
        for collator in (task.collator(processed), task.training_collator(processed)):
            batch = collator(examples)
            losses.append(processed.model.eval()(**batch).loss)
        torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)
        assert read[0].equal(read[1])
        labels = batch.pop("labels")
        smoothed = LabelSmoother(0.1)(processed.model(**batch), labels)
        logits = processed.model(**task.collator(processed)(examples)).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        torch.testing.assert_close(smoothed, expected)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.trained_by])
    def test_where_it_can_be_done(self, name, tmp_path):
        """As a Trainer computes it, from a batch without its labels."""
        task, (save_model, write_data, file) = TASKS[name], SAVED[name]
        folder, rows = save_model(tmp_path / "model"), load_rows(write_data(tmp_path / file))
        processed = Processed(task.load_model(folder), task.load_processor(folder))
        task.prepare(processed)
        without = ("object-detection", "question-answering", "automatic-speech-recognition")
        assert task.smooths_labels(processed) == (name not in without)
        examples = task.examples(rows, task.find_columns(rows, {}), processed)
        batch = dict(task.training_collator(processed)([examples[index] for index in range(2)]))
        if task.smooths_labels(processed):
            labels = batch.pop("labels")
            assert LabelSmoother(0.1)(processed.model(**batch), labels) > 0
        if name == "text-classification":
            for problem in ("regression", "multi_label_classification"):
                processed.model.config.problem_type = problem
                assert not task.smooths_labels(processed)

    def test_not_of_a_decoder_that_is_none_to_the_trainer(self):
        """It knows by the name of the class that labels are of the next token."""
        decoder = beside_images(*BESIDE_IMAGES["LLaVA"])
        assert not TASKS["text-generation"].smooths_labels(Processed(decoder, None))

    def test_not_where_nobody_says_what_a_decoder_reads(self):
        task, processed = TASKS["translation"], Processed(torch.nn.Identity(), None)
        assert not task.smooths_labels(processed)
        assert task.training_collator(processed).model is None


class TestFirstTokens:
    def test_the_first_of_several_tokens_counts(self, tmp_path):
        """A tokenizer of characters: the first of each word has its label."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        task = TASKS["token-classification"]
        folder = save_bert(tmp_path / "model", transformers.BertForTokenClassification)
        letters = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "b": 2}, unk_token="[PAD]"))
        letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="[PAD]")
        rows = Rows("rows", [{"tokens": ["ab", "b"], "tags": ["POSITIVE", "negative"]}], ("tokens", "tags"))
        (example,) = task.examples(rows, task.find_columns(rows, {}), Processed(task.load_model(folder), tokenizer))
        assert example["input_ids"] == [1, 2, 2]
        assert example["labels"] == [1, -100, 0]

    @for_each("kind", ["bytes", "bytes, numbers apart", "bytes after a space", "subwords", "letters"])
    def test_words_have_the_tokens_that_they_have_in_their_text(self, kind, tmp_path):
        """Byte-level tokenizers, such as RoBERTa's, tell words from parts of words by the space before.

        To Llama's, the space before a number is a token by itself, which is of no word.
        """
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        numbers = pre_tokenizers.Split(Regex(r" ?[^\s\d]+|\d{1,3}|\s+"), "isolated")

        raw = Tokenizer(models.BPE(unk_token="[UNK]"))
        raw.pre_tokenizer, raw.decoder = {
            "bytes": (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
            "bytes, numbers apart": (
                pre_tokenizers.Sequence([numbers, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
                decoders.ByteLevel(),
            ),
            "bytes after a space": (pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()),
            "subwords": (pre_tokenizers.Metaspace(), decoders.Metaspace()),
            "letters": (pre_tokenizers.Whitespace(), decoders.BPEDecoder()),
        }[kind]
        special, texts = ["[PAD]", "[UNK]"], [*SENTENCES, "a 1 film 12", "the 1 plot 1"]
        raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=60, special_tokens=special))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")
        task = TASKS["token-classification"]
        folder = save_bert(tmp_path, transformers.BertForTokenClassification, vocab_size=len(tokenizer))
        rows = Rows(
            "rows",
            [{"tokens": text.split(), "tags": [0] * len(text.split())} for text in texts],
            ("tokens", "tags"),
        )
        found = task.examples(rows, task.find_columns(rows, {}), Processed(task.load_model(folder), tokenizer))
        for text, example in zip(texts, found, strict=True):
            of_text = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
            assert tokenizer.convert_ids_to_tokens(example["input_ids"]) == [
                token for token in of_text if token != "Ġ"
            ]
            assert example["labels"].count(0) == len(text.split())

    @pytest.mark.parametrize("words", [["good"], "good bad"])
    def test_words_without_labels(self, words, tmp_path):
        task = TASKS["token-classification"]
        folder = save_bert(tmp_path / "model", transformers.BertForTokenClassification)
        rows = Rows("rows", [{"tokens": words, "tags": [0, 1]}], ("tokens", "tags"))
        processed = Processed(task.load_model(folder), task.load_processor(folder))
        with pytest.raises(InputError, match="list of words and one of as many labels in each row"):
            task.examples(rows, task.find_columns(rows, {}), processed)


class TestMetricsOfTheLibrary:
    def test_from_a_local_folder(self, tmp_path):
        pytest.importorskip("evaluate")
        (tmp_path / "wrong").mkdir()
        (tmp_path / "wrong" / "wrong.py").write_text(METRIC)
        folder, data = save_bert(tmp_path / "model"), SAVED["text-classification"][1](tmp_path / "rows.tsv")
        task, rows = TASKS["text-classification"], load_rows(data)
        processed = Processed(task.load_model(folder).eval(), task.load_processor(folder))
        batches = task.batches(task.examples(rows, task.find_columns(rows, {}), processed), processed, 4)
        found = task.metric(str(tmp_path / "wrong"), processed, batches)(processed.model)
        accuracy = task.metric("accuracy", processed, batches)(processed.model)["accuracy"]
        assert found == {"wrong": round((1 - accuracy) * len(SENTENCES))}
        assert task.shown(str(tmp_path / "wrong"), found) == "wrong"

    @pytest.mark.slow
    @pytest.mark.parametrize(("task", "name"), [("text-classification", "acuracy"), ("text-generation", "f1")])
    def test_an_unknown_one(self, task, name, tmp_path):
        model = SimpleNamespace(config=SimpleNamespace(label2id=None, id2label={0: "no", 1: "yes"}))
        with pytest.raises(InputError, match=rf"expected one of {', '.join(TASKS[task].metrics)}.* got '{name}'"):
            TASKS[task].metric(name, Processed(model, None), [{"labels": torch.zeros(1)}])


@for_each("padding", [None, 0, 5])
def test_a_decoder_that_names_another_padding_than_its_tokenizer(padding, tmp_path):
    """It looks for the last token that is none; of what others have saved, configurations often name none."""
    rows = load_rows(SAVED["text-classification"][1](tmp_path / "rows.tsv"))
    config = transformers.GPT2Config(**{**tiny.gpt2(len(WORDS)), "initializer_range": 0.5}, **NAMED)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    config.pad_token_id = padding
    save_tokenizer(tmp_path)
    task = TASKS["text-classification"]
    processed = Processed(model, task.load_processor(str(tmp_path)))
    task.prepare(processed)
    examples = task.examples(rows, task.find_columns(rows, {}), processed)
    found = task.metric("accuracy", processed, task.batches(examples, processed, len(examples)))(model)
    with torch.no_grad():
        assert found == pytest.approx(of_sequences(model, processed.processor, rows.entries), rel=1e-5)


@for_each("task", ["text-classification", "image-classification"])
@for_each("second", [[0, 1], []])
def test_a_row_with_other_than_one_label(task, second, tmp_path):
    """As many labels as classes would be taken for a 0 or 1 for each of them."""
    pytest.importorskip("PIL")
    save, write, file = SAVED[task]
    rows, folder = load_rows(write(tmp_path / file)), save(tmp_path / "model")
    columns = TASKS[task].find_columns(rows, {})
    processed = Processed(TASKS[task].load_model(folder), TASKS[task].load_processor(folder))
    first, other, *_ = rows.entries
    rows = replace(rows, entries=[{**first, "label": [1]}, {**other, "label": second}])
    with pytest.raises(InputError, match=f"expected one label in each row, got {len(second)} in .*'label', row 2;"):
        TASKS[task].examples(rows, columns, processed)
    (example,) = TASKS[task].examples(rows.first(1), columns, processed)
    assert example["labels"] == [1]


@for_each(
    ("task", "metric", "found", "shown"),
    [
        ("summarization", "rouge", {"rouge1": 0.5, "rougeL": 0.4}, "rougeL"),
        ("summarization", "rouge", {"rouge1": 0.5}, "rouge1"),
        ("summarization", "mine", {"rougeL": 0.4, "mine": 0.1}, "mine"),
        ("translation", "chrf", {"predictions_cut": 0.0, "chrf": 30.0}, "chrf"),
        ("translation", "my/folder", {"mine": 0.1, "predictions_cut": 0.0}, "mine"),
    ],
)
def test_which_number_of_a_metric_is_shown(task, metric, found, shown):
    assert TASKS[task].shown(metric, found) == shown


METRIC = """
import datasets
import evaluate


class Wrong(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"wrong": sum(p != r for p, r in zip(predictions, references))}
"""
