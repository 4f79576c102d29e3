"""Metrics of tasks against loops over single tokens, on every kind of model."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from accelerate.data_loader import prepare_data_loader
from for_each import for_each
from local_models import word_tokenizer
from torch.utils.data import DataLoader
from transformers import (
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_parcor import CorruptionEvaluator, GaussianNoise
from hf_parcor.evaluation import (
    BatchMetric,
    ClassificationMetric,
    GenerationMetric,
    LanguageModelMetric,
    PredictionMetric,
    SacrebleuScore,
)

WORDS = ["<pad>", "</s>", "<unk>", *(f"w{index}" for index in range(3, 24))]
SHARED = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
GPT2 = GPT2Config(vocab_size=24, n_embd=8, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5, **SHARED)
LLAMA = LlamaConfig(**{**tiny.decoder(24, inner=8), **SHARED}, initializer_range=0.5)
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "experts_implementation": "eager"}
MIXTRAL = MixtralConfig(**{**tiny.decoder(24, inner=8), **SHARED}, **ROUTED, num_local_experts=2)
T5 = T5Config(**tiny.t5(24, 16), eos_token_id=1)


@pytest.fixture
def tokens():
    """Return batches of different sizes, with labels that do not count."""
    made = []
    for size in (3, 2):
        inputs = torch.randint(3, 24, (size, 6))
        labels = inputs.clone()
        labels[0, 4:] = -100
        made.append({"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": labels})
    return made


@pytest.fixture
def tokenizer():
    return word_tokenizer(WORDS, "<unk>", pad_token="<pad>", eos_token="</s>")


def token_by_token(model, batches, shift):
    """Return mean loss and accuracy by a loop over single tokens."""
    losses, right = [], []
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch).logits.double()
        for row, labels in zip(logits, batch["labels"].tolist(), strict=True):
            for place, label in enumerate(labels):
                if label != -100 and place >= shift:
                    losses.append(-row[place - shift].log_softmax(-1)[label].item())
                    right.append(float(row[place - shift].argmax() == label))
    return sum(losses) / len(losses), sum(right) / len(right)


def adapted(model):
    peft = pytest.importorskip("peft", reason="an optional dependency, the extra peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


class TestLanguageModels:
    @pytest.mark.parametrize(
        ("build", "shift"),
        [
            (lambda tiny_bert: GPT2LMHeadModel(GPT2), 1),
            (lambda tiny_bert: LlamaForCausalLM(LLAMA), 1),
            (lambda tiny_bert: tiny_bert(BertForMaskedLM, vocab_size=24, initializer_range=0.5), 0),
            (lambda tiny_bert: T5ForConditionalGeneration(T5), 0),
            (lambda tiny_bert: MixtralForCausalLM(MIXTRAL), 1),
            (lambda tiny_bert: adapted(MixtralForCausalLM(MIXTRAL)), 1),
        ],
        ids=["gpt2", "llama", "masked bert", "t5", "mixtral", "adapted mixtral"],
    )
    def test_token_by_token(self, tiny_bert, tokens, build, shift):
        model = build(tiny_bert).eval()
        with torch.no_grad():  # let some predictions be right
            best = model(**tokens[0]).logits.argmax(-1)
        tokens[0]["labels"][1:, shift:4] = best[1:, : 4 - shift]
        loss, accuracy = token_by_token(model, tokens, shift)
        found = LanguageModelMetric(tokens)(model)
        assert found == pytest.approx({"loss": loss, "perplexity": math.exp(loss), "accuracy": accuracy}, rel=1e-5)
        assert 0 < accuracy < 1

    @for_each(
        ("count", "length", "stride", "batch_size"),
        [
            *((37, 8, stride, 3) for stride in (1, 3, 7, 8, None)),
            *((count, 8, 3, 2) for count in (2, 7, 8, 9, 11, 12)),  # a last window that is full, or has one new token
            (17, 8, None, 4),  # and one that has one token alone
        ],
    )
    def test_perplexity_of_sliding_windows_is_that_of_the_longhand_loop(self, count, length, stride, batch_size):
        text, model = torch.randint(3, 24, (1, count)), LlamaForCausalLM(LLAMA).eval()
        metric = LanguageModelMetric.of_text(
            "text",
            lambda *_, **__: {"input_ids": text[0].tolist()},
            length=length,
            stride=stride,
            batch_size=batch_size,
        )
        losses, before = 0.0, 0
        counted = 0
        for start in range(0, count, stride or length):
            end = min(start + length, count)
            new, window = end - before, text[:, start:end]
            logits = model(window).logits[0].double().log_softmax(-1)
            for place in range(window.shape[1] - new, window.shape[1]):
                if place > 0:  # what is before it
                    losses -= logits[place - 1, window[0, place]].item()
                    counted += 1
            before = end
            if end == count:
                break
        assert counted == count - (-(-count // length) if stride in (None, length) else 1)
        found = metric(model)
        assert found["loss"] == pytest.approx(losses / counted, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(losses / counted), rel=1e-5)

    @for_each(
        ("settings", "message"),
        [
            ({"length": 4, "stride": 5}, "stride: expected at most 4"),
            ({"length": 4, "stride": 0}, "stride"),
            ({"length": 1}, "length: expected a whole number >= 2"),
            ({"length": 4, "batch_size": 0}, "batch_size"),
            ({"length": 4, "count": 1}, "two tokens"),
        ],
    )
    def test_windows_that_are_none(self, settings, message):
        settings = {"count": 9, **settings}
        tokens = [3] * settings.pop("count")
        with pytest.raises(ValueError, match=message):
            LanguageModelMetric.of_text("text", lambda *_, **__: {"input_ids": tokens}, **settings)

    def test_errors_and_extremes(self, tokens):
        metric = LanguageModelMetric(tokens)
        assert metric.combine([{"correct": 0, "loss": 1e6, "labels": 1, "not_finite": 0}])["perplexity"] == math.inf
        first_only = [{**tokens[0], "labels": torch.full((3, 6), -100).index_fill(1, torch.tensor([0]), 5)}]
        with pytest.raises(ValueError, match="expected labels other than -100"):
            LanguageModelMetric(first_only)(GPT2LMHeadModel(GPT2).eval())
        with pytest.raises(ValueError, match="expected labels in each, got input_ids"):
            LanguageModelMetric([{"input_ids": tokens[0]["input_ids"]}])(GPT2LMHeadModel(GPT2).eval())


class TestPredictions:
    @pytest.fixture
    def images(self):
        return [{"pixel_values": torch.randn(size, 3, 8, 8), "labels": torch.randint(3, (size,))} for size in (3, 2)]

    def test_images(self, images):
        settings = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        config = ViTConfig(image_size=8, patch_size=4, num_labels=3, initializer_range=0.5, **settings)
        model = ViTForImageClassification(config).eval()
        losses, right = [], []
        for batch in images:
            for image, label in zip(batch["pixel_values"], batch["labels"].tolist(), strict=True):
                logits = model(image[None]).logits[0].detach().double()
                losses.append(-logits.log_softmax(-1)[label].item())
                right.append(float(logits.argmax() == label))
        expected = {"accuracy": sum(right) / 5, "loss": sum(losses) / 5}
        assert ClassificationMetric(images)(model) == pytest.approx(expected, rel=1e-5)
        score = PredictionMetric(images, _share)
        assert score(model) == {"score": pytest.approx(expected["accuracy"])}

    def test_tokens_with_the_label_that_does_not_count(self, tiny_bert, tokens):
        from transformers import BertForTokenClassification

        model = tiny_bert(BertForTokenClassification, vocab_size=24, num_labels=3, initializer_range=0.5).eval()
        for batch in tokens:
            batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["labels"] % 3)
        metric = PredictionMetric(tokens, _share)
        expected = token_by_token(model, tokens, 0)[1]
        assert metric(model) == {"score": pytest.approx(expected)}
        assert ClassificationMetric(tokens)(model)["accuracy"] == pytest.approx(expected)


def stops(tokens, scores, **more):
    """Stop a text behind one of some tokens, none of which ends it."""
    return torch.isin(tokens[:, -1], torch.tensor([12, 13, 14, 15, 16]))


def _share(predictions, references):
    return sum(pair[0] == pair[1] for pair in zip(predictions, references, strict=True)) / len(references)


class TestGeneration:
    @pytest.fixture
    def translator(self):
        model = T5ForConditionalGeneration(T5).eval()
        for weight in model.parameters():
            weight.data *= 3
        return model

    def expected_texts(self, model, tokenizer, batches, skip):
        texts = []
        for batch in batches:
            for row in batch["input_ids"]:
                generated = model.generate(row[None], max_new_tokens=5, do_sample=False)[0]
                texts.append(tokenizer.decode(generated[skip:], skip_special_tokens=True))
        return texts

    @pytest.mark.parametrize("family", ["t5", "gpt2"])
    def test_texts_one_by_one(self, translator, tokenizer, tokens, family):
        model, skip = (translator, 0) if family == "t5" else (GPT2LMHeadModel(GPT2).eval(), 6)
        if family == "t5":
            for batch in tokens:  # as a collator leaves them for the loss
                batch["decoder_input_ids"] = batch["decoder_attention_mask"] = torch.ones_like(batch["labels"])
        for batch in tokens:
            batch["labels"][0, 3] = tokenizer.eos_token_id  # ends a reference, and is no part of its text
        seen = []

        def score(predictions, references):
            seen.append((predictions, references))
            return {"pairs": len(predictions)}

        found = GenerationMetric(tokenizer, tokens, score, max_new_tokens=5)(model)
        assert found.keys() <= {"pairs", "predictions_cut"}
        assert found["pairs"] == 5.0
        ((predictions, references),) = seen
        assert predictions == self.expected_texts(model, tokenizer, tokens, skip)
        assert references == [
            " ".join(WORDS[label] for label in row if label not in (-100, tokenizer.eos_token_id))
            for batch in tokens
            for row in batch["labels"].tolist()
        ]
        assert any(predictions)

    @pytest.mark.parametrize("settings", [{"max_new_tokens": 4}, {"max_length": 7}])
    def test_a_prompt_of_the_decoder_is_gone_on_with(self, translator, tokenizer, tokens, settings):
        """In a batch, where what is made of labels has their shape, or among the settings; it counts in the length."""
        translator.generation_config.eos_token_id = None
        seen, expected = [], []
        batch = {name: rows[:2] for name, rows in tokens[0].items()}
        prompt = torch.tensor([[0, 5, 6], [0, 7, 8]])
        for row, begin in zip(batch["input_ids"], prompt, strict=True):
            text = translator.generate(row[None], decoder_input_ids=begin[None], do_sample=False, **settings)[0]
            expected.append(tokenizer.decode(text[3:], skip_special_tokens=True))

        def score(predictions, references):
            seen.append(predictions)
            return 1.0

        of_batch = GenerationMetric(tokenizer, [{**batch, "decoder_input_ids": prompt}], score, **settings)
        of_settings = GenerationMetric(tokenizer, [batch], score, decoder_input_ids=prompt, **settings)
        assert of_batch(translator) == of_settings(translator) == {"score": 1.0, "predictions_cut": 1.0}
        assert seen == [expected, expected]

    @pytest.mark.parametrize("ends", [{"pad_token": "<pad>", "eos_token": "</s>"}, {"eos_token": "<unk>"}])
    def test_what_the_vocabulary_lacks_is_not_right(self, translator, ends):
        """Where the unknown token ends texts too, as that of GPT-2 does, it is none of a text."""
        seen = []
        batch = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 2, 7, 1, -100]])}
        tokenizer = word_tokenizer(WORDS, "<unk>", **ends)
        GenerationMetric(tokenizer, [batch], lambda **texts: seen.append(texts) or 1.0, max_new_tokens=2)(translator)
        expected = "w5 \ufffc w7" if len(ends) == 2 else "w5 w7 </s>"
        assert seen[0]["references"] == [expected]

    def test_what_generates_without_what_it_began_with(self, tokenizer):
        """Whisper returns the tokens that are new; what another encoder-decoder returns begins with its start."""
        sizes = {**tiny.seq2seq(24), "init_std": 1.0, "num_mel_bins": 8, "max_source_positions": 30}
        config = WhisperConfig(**sizes, max_target_positions=40, suppress_tokens=None, begin_suppress_tokens=None)
        model = WhisperForConditionalGeneration(config).eval()
        sounds, seen = torch.randn(2, 8, 60), []

        def score(predictions, references):
            seen.append(predictions)
            return 1.0

        batch = {"input_features": sounds, "labels": torch.randint(3, 24, (2, 5))}
        GenerationMetric(tokenizer, [batch], score, max_new_tokens=6)(model)
        expected = model.generate(sounds, max_new_tokens=6, do_sample=False)
        assert seen == [[tokenizer.decode(row, skip_special_tokens=True) for row in expected]]
        assert all(len(text.split()) > 4 for text in seen[0])

    def test_samples_and_rules_tokens_out_only_as_it_is_asked_to(self, translator, tokenizer, tokens):
        class Always(LogitsProcessor):
            def __call__(self, input_ids, scores):
                return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

        translator.generation_config.do_sample = True
        texts = []

        def score(predictions, references):
            texts.append(predictions)
            return 1.0

        for settings in ({}, {}, {"do_sample": True}, {"logits_processor": [Always()]}):
            GenerationMetric(tokenizer, tokens, score, max_new_tokens=5, **settings)(translator)
        assert texts[0] == texts[1] != texts[2]
        assert set(texts[3]) == {"w7 w7 w7 w7 w7"}

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["bleu", "chrf", "ter"])
    def test_sacrebleu_and_its_signature_in_the_record(self, translator, tokenizer, tokens, kind):
        sacrebleu = pytest.importorskip("sacrebleu")
        predictions = self.expected_texts(translator, tokenizer, tokens, 0)
        references = [tokenizer.decode(row[row != -100]) for batch in tokens for row in batch["labels"]]
        metric = GenerationMetric(tokenizer, tokens, SacrebleuScore(kind), max_new_tokens=5)
        evaluator = CorruptionEvaluator(translator, metric, target_modules="last-decoder-layer", progress=False)
        record = evaluator.evaluate([GaussianNoise(0.5)], trials=2)
        score = getattr(sacrebleu, f"corpus_{kind}")(predictions, [references]).score
        assert record.clean.mean(kind) == pytest.approx(score)
        (note,) = record.notes
        assert note.startswith(f"sacrebleu signature of {kind}: nrefs:1|")
        assert note.endswith(f"version:{sacrebleu.__version__}")

    @pytest.mark.slow
    @pytest.mark.parametrize("family", ["t5", "gpt2", "forced"])
    @pytest.mark.parametrize(
        "settings",
        [{}, {"num_beams": 2}, {"max_length": 9}, {"stopping_criteria": [stops]}],
        ids=lambda settings: "".join(settings),
    )
    def test_texts_that_do_not_end_within_the_length_are_counted(
        self, translator, tokenizer, tokens, family, settings
    ):
        model, start = (GPT2LMHeadModel(GPT2).eval(), 6) if family == "gpt2" else (translator, 1)
        if family == "forced":
            model.generation_config.forced_eos_token_id = 1
        length = settings.get("max_length", start + 5) - start
        ends = [1] if family == "gpt2" else [1, *range(4, 12)]  # so that some texts end by themselves
        chosen = {"do_sample": False, "eos_token_id": ends, "max_length": start + length, **settings}
        cut = []
        for batch in tokens:
            for row in batch["input_ids"]:
                text = model.generate(row[None], **chosen)[0, start:].tolist()
                own = text[: length - (family == "forced")]
                cut.append(len(text) == length and not set(own) & set(ends))
        found = GenerationMetric(tokenizer, tokens, lambda **texts: 1.0, **{**chosen, "max_length": start + length})
        assert found(model).get("predictions_cut", 0.0) == pytest.approx(sum(cut) / 5)

    def test_the_length_is_that_of_the_data_unless_one_is_set(self, translator, tokenizer, tokens):
        translator.generation_config.eos_token_id = None
        widths = []
        generate = translator.generate
        translator.generate = lambda **settings: (widths.append(found := generate(**settings)), found)[1]
        references = max((batch["labels"] != -100).sum(-1).max().item() for batch in tokens)
        GenerationMetric(tokenizer, tokens, lambda **texts: 1.0)(translator)
        assert {found.shape[1] for found in widths} == {1 + references + references // 5 + 10}
        translator.generation_config.max_length = 4
        GenerationMetric(tokenizer, tokens, lambda **texts: 1.0)(translator)
        assert widths[-1].shape[1] == 4

    def test_the_length_is_the_same_in_all_processes(self, translator, tokenizer, tokens):
        for number, labels in enumerate(tokens[0]["labels"]):
            labels[1 + number :] = -100  # the longest reference is in the share of one process
        rows = [{name: values[row] for name, values in tokens[0].items()} for row in range(2)]
        loader = DataLoader(rows, batch_size=1)
        widths = []
        translator.generation_config.eos_token_id = None
        generate = translator.generate
        translator.generate = lambda **settings: (widths.append(found := generate(**settings)), found)[1]
        for index in range(2):
            share = prepare_data_loader(loader, num_processes=2, process_index=index, put_on_device=False)
            GenerationMetric(tokenizer, share, lambda **texts: 1.0).of_batch(translator, tokens[0])
        assert widths[0].shape == widths[1].shape

    def test_the_record_says_which_texts_were_cut(self, translator, tokenizer, tokens):
        metric = GenerationMetric(tokenizer, tokens, lambda **texts: 1.0, max_new_tokens=2, eos_token_id=23)
        evaluator = CorruptionEvaluator(translator, metric, target_modules="last-decoder-layer", progress=False)
        record = evaluator.evaluate([GaussianNoise(0.5)], trials=2)
        share = metric(translator)["predictions_cut"]
        assert [f"{100 * share:.3g} %" in note for note in record.clean.notes] == [True]
        assert list(record.clean.metrics) == ["score"]
        assert record.corruptions[0].notes == ()

    def test_the_encoder_runs_once_a_batch(self, translator, tokenizer, tokens):
        calls = []
        forward = translator.encoder.forward
        translator.encoder.forward = lambda *inputs, **settings: (calls.append(1), forward(*inputs, **settings))[1]
        metric = GenerationMetric(tokenizer, tokens, _share, max_new_tokens=5)
        assert isinstance(metric, BatchMetric)
        CorruptionEvaluator(translator, metric, target_modules="last-decoder-layer", progress=False).evaluate(
            [GaussianNoise(std) for std in (0.1, 0.2, 0.3)], trials=3
        )
        tried, clean, corrupted = 5, 2, 2  # watched, run again, twice at other weights, recorded
        assert len(calls) == tried + clean + corrupted

    @pytest.mark.parametrize("found", [None, {}, {"of_each": [1.0]}, "good"], ids=str)
    def test_a_score_without_numbers(self, translator, tokenizer, tokens, found):
        metric = GenerationMetric(tokenizer, tokens, lambda predictions, references: found, max_new_tokens=2)
        with pytest.raises(ValueError, match="score: expected a number"):
            metric(translator)

    def test_unknown_score(self):
        with pytest.raises(ValueError, match="kind: expected one of bleu, chrf, ter, got 'rouge'"):
            SacrebleuScore("rouge")

    def test_sacrebleu_is_missing(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
        with pytest.raises(ImportError, match=r"hf-parcor\[translation\]"):
            SacrebleuScore("bleu")
