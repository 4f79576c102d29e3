"""Adapters of PEFT, from a folder and from the Hub: the model that was saved, and what was trained of it."""

from __future__ import annotations

import huggingface_hub
import pytest
import tiny
import torch
import transformers
from for_each import for_each
from local_hub import local_hub
from local_models import SAVED, save_llama, save_tokenizer

from hf_parcor.errors import InputError
from hf_parcor.tasks import TASKS, architectures_of

peft = pytest.importorskip("peft", reason="an optional dependency, the extra peft")

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:peft",
    "ignore:`past_key_values` is deprecated:FutureWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)
QUERY = {"target_modules": ["query"]}
ATTENTION = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
HIDDEN = {"target_modules": ["c_fc"], "fan_in_fan_out": True}
# Task, kind of adapter, what PEFT calls the task, settings. The first ones are inside of layers, the others are not.
KINDS = {
    "head": ("text-classification", peft.LoraConfig, "SEQ_CLS", QUERY),
    "head and biases": ("text-classification", peft.LoraConfig, "SEQ_CLS", {**QUERY, "bias": "lora_only"}),
    "no task named": ("text-classification", peft.LoraConfig, None, QUERY),
    "words": ("token-classification", peft.LoraConfig, "TOKEN_CLS", QUERY),
    "questions": ("question-answering", peft.LoraConfig, "QUESTION_ANS", QUERY),
    "text": ("text-generation", peft.LoraConfig, "CAUSAL_LM", ATTENTION),
    "text, all biases": ("text-generation", peft.LoraConfig, "CAUSAL_LM", {**ATTENTION, "bias": "all"}),
    "text and a norm": ("text-generation", peft.LoraConfig, "CAUSAL_LM", {**HIDDEN, "modules_to_save": ["ln_f"]}),
    "scales": ("text-generation", peft.IA3Config, "CAUSAL_LM", {**HIDDEN, "feedforward_modules": ["c_fc"]}),
    "prompt": ("text-generation", peft.PromptTuningConfig, "CAUSAL_LM", {"num_virtual_tokens": 3}),
    "prompt of a classifier": ("text-classification", peft.PromptTuningConfig, "SEQ_CLS", {"num_virtual_tokens": 3}),
    "keys and values": ("text-generation", peft.PrefixTuningConfig, "CAUSAL_LM", {"num_virtual_tokens": 3}),
    "between layers": (
        "text-generation",
        peft.AdaptionPromptConfig,
        "CAUSAL_LM",
        {"adapter_len": 3, "adapter_layers": 2},
    ),
}


def adapted(model, config):
    """Return a model with an adapter that changes what it computes."""
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight))
    return model.eval()


def logits_of(model):
    torch.manual_seed(1)
    output = model.eval()(input_ids=torch.randint(3, 8, (2, 5)))
    return output.start_logits if hasattr(output, "start_logits") else output.logits


@for_each("kind", KINDS)
def test_it_is_the_model_that_was_saved_and_what_was_trained_is_trainable(kind, tmp_path):
    """Transformers loads it frozen, but for the modules that were saved with it; and what is trained is corrupted."""
    name, config, named, settings = KINDS[kind]
    task = TASKS[name]
    base = save_llama(tmp_path) if kind == "between" else SAVED[name][0](tmp_path / "base")
    model = adapted(task.load_model(base), config(task_type=named, **settings))
    trained = {name: weight.shape for name, weight in model.named_parameters() if weight.requires_grad}
    model.save_pretrained(tmp_path / "adapter")
    loaded = task.load_model(str(tmp_path / "adapter"))
    found = {name: weight.shape for name, weight in loaded.named_parameters() if weight.requires_grad}
    within = "" if isinstance(loaded, transformers.PreTrainedModel) else "base_model.model."
    assert found == {name if within else name.removeprefix("base_model.model."): one for name, one in trained.items()}
    torch.testing.assert_close(logits_of(loaded), logits_of(model))
    assert task.has_head(architectures_of(str(tmp_path / "adapter")))


@for_each(("named", "classes"), [("SEQ_CLS", 2), ("SEQ_CLS", 4), (None, 4)])
def test_a_head_that_the_model_has_not(named, classes, tmp_path):
    """Its classes are counted in what was saved: the configuration is that of a model without them."""
    task = TASKS["text-classification"]
    transformers.BertForPreTraining(transformers.BertConfig(**tiny.encoder())).save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=classes)
    model = adapted(model, peft.LoraConfig(task_type=named, modules_to_save=["classifier"], **QUERY))
    model.save_pretrained(tmp_path / "adapter")
    assert task.has_head(architectures_of(str(tmp_path / "adapter")))
    loaded = task.load_model(str(tmp_path / "adapter"))
    assert loaded.config.num_labels == classes
    torch.testing.assert_close(logits_of(loaded), logits_of(model))


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """Serve a model, and an adapter of it with another on a branch; return what each of the two computes."""
    task, base = TASKS["text-generation"], SAVED["text-generation"][0](tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    branches, logits = {}, {}
    for branch in ("main", "later"):
        model = adapted(task.load_model(base), peft.LoraConfig(task_type="CAUSAL_LM", **ATTENTION))
        model.save_pretrained(tmp_path / branch)
        settings = tmp_path / branch / "adapter_config.json"
        settings.write_text(settings.read_text().replace(base, "me/base"))
        branches[branch], logits[branch] = files_of(tmp_path / branch), logits_of(model)
    repositories = {"models/me/base": {"main": files_of(tmp_path / "base")}, "models/me/adapter": branches}
    with local_hub(repositories, monkeypatch, tmp_path / "cache"):
        yield logits


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@for_each("branch", ["main", "later"])
def test_one_that_lies_on_the_hub(branch, on_the_hub, monkeypatch):
    """Its model is found there too, at a branch of its own, and its tokenizer is the model's; offline as well."""
    task = TASKS["text-generation"]
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        assert task.has_head(architectures_of("me/adapter", revision=branch))
        torch.testing.assert_close(logits_of(task.load_model("me/adapter", revision=branch)), on_the_hub[branch])
        assert task.load_processor("me/adapter", revision=branch)("a b")["input_ids"]


def test_a_name_that_is_nothing_on_the_hub(on_the_hub):
    with pytest.raises(InputError, match=r"expected a name on the Hub or a local folder.*'me/nothing'"):
        TASKS["text-generation"].load_model("me/nothing")


@for_each(
    ("content", "said"),
    [
        ("{", "expected an adapter, got .* save the adapter again"),
        ("{}", "expected a name on the Hub or a local folder"),
    ],
)
def test_settings_that_say_nothing(content, said, tmp_path):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(InputError, match=said):
        TASKS["text-generation"].load_model(str(tmp_path))
