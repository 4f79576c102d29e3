"""Where records come from: fingerprints of data, names of models."""

import torch
import transformers
from for_each import for_each
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hf_parcor.evaluation.identity.fingerprint import fingerprint
from hf_parcor.evaluation.identity.provenance import described, model_name


class TestFingerprint:
    def test_a_list_and_a_loader_of_the_same_data(self):
        inputs, labels = torch.randn(5, 3), torch.arange(5)
        loader = DataLoader(TensorDataset(inputs, labels), batch_size=2)
        assert fingerprint(loader) == fingerprint([(inputs[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)])

    @for_each(
        "other",
        [
            {"x": torch.tensor([1.0, 3.0])},
            {"y": torch.tensor([1.0, 2.0])},
            {"x": torch.tensor([1.0, 2.0], dtype=torch.float64)},
            {"x": torch.tensor([[1.0, 2.0]])},
            {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor(0)},
        ],
    )
    def test_values_names_types_and_shapes_count(self, other):
        assert fingerprint([{"x": torch.tensor([1.0, 2.0])}]) != fingerprint([other])

    @for_each("dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float64])
    def test_every_dtype_empty_tensors_and_views(self, dtype):
        values = torch.tensor([[0, 1], [1, 0]], dtype=dtype)
        assert fingerprint([{"x": values.T}]) == fingerprint([{"x": values.T.contiguous()}])
        assert fingerprint([{"x": values[:0]}]) != fingerprint([])


class TestModelName:
    def test_a_name_on_the_hub(self, tiny_bert):
        model = tiny_bert()
        model.config._name_or_path = "google-bert/bert-base-uncased"
        assert model_name(model) == "google-bert/bert-base-uncased"

    def test_where_a_folder_lies_is_nobodys_business(self, tiny_bert, tmp_path):
        tiny_bert().save_pretrained(tmp_path / "runs" / "defended")
        model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "runs" / "defended")
        assert model_name(model) == "runs/defended"

    def test_a_model_without_a_name(self, tiny_bert):
        assert model_name(tiny_bert()) == "BertForSequenceClassification"
        assert model_name(nn.Linear(1, 1)) == "Linear"


@for_each(
    ("value", "plain"),
    [
        ("all", "all"),
        (3, 3),
        (nn.Linear, "Linear"),
        ({"b", "a"}, ["a", "b"]),
        (range(2), [0, 1]),
        ((nn.Linear, "Norm"), ["Linear", "Norm"]),
    ],
)
def test_described(value, plain):
    assert described(value) == plain
