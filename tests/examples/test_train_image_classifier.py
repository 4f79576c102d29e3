"""The example of images: small ResNets, their pixels and statistics, and a program that trains and measures them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from example_program import TRAINS_AND_MEASURES, run_with
from for_each import for_each
from PIL import Image
from safetensors.torch import load_file, save_file
from trainings import QUIET
from transformers import Trainer, TrainingArguments

from hf_parcor import (
    ACRT,
    AWP,
    SAM,
    CorruptionConstraint,
    CorruptionRisk,
    EvaluationRecord,
    GaussianNoise,
    MultiStepRisk,
    ParameterDefenseTrainer,
    by_kind,
    by_layer,
)
from hf_parcor.evaluation import ClassificationMetric
from hf_parcor.tasks import ImageClassification, LabelledImages, load_rows, read_images

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "train_image_classifier.py"
SHARED = Path(__file__).parents[3] / "shared" / "data"
NAMES = ["black", "white"]

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture
def modeling():
    """The module of the model, imported as the examples do."""
    import modeling_small_resnet

    return modeling_small_resnet


@pytest.fixture
def tiny(modeling):
    """Return what builds a ResNet of 8 layers with two classes."""

    def build(**settings):
        torch.manual_seed(0)
        config = modeling.SmallResNetConfig(depth=8, num_labels=2, **settings)
        return modeling.SmallResNetForImageClassification(config)

    return build


def batch_of(count=6, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return {"pixel_values": pixels, "labels": torch.arange(count) % 2}


class TestModel:
    def test_bytes_and_floats_that_are_normalised_are_one_picture(self, tiny):
        model = tiny(image_mean=[0.5, 0.4, 0.3], image_std=[0.1, 0.2, 0.3]).eval()
        batch = batch_of()
        mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3]))
        floats = torch.tensor((batch["pixel_values"].numpy() / 255 - mean) / std, dtype=torch.float32)
        with torch.no_grad():
            by_bytes, by_floats = (model(pixels).logits for pixels in (batch["pixel_values"], floats))
        torch.testing.assert_close(by_bytes, by_floats)

    @pytest.mark.slow
    def test_a_folder_carries_its_code(self, tiny, tmp_path):
        """Another process, which cannot import the file, measures the same."""
        model = tiny(image_mean=[0.5, 0.4, 0.3]).eval()
        model.save_pretrained(tmp_path)
        program = (
            "import sys, torch; from transformers import AutoModelForImageClassification as Auto;"
            "model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True).eval();"
            "pixels = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8);"
            "print(model(pixels).logits.tolist())"
        )
        done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
        expected = model(torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)).logits
        torch.testing.assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected.detach())

    def test_adversarial_inputs_are_pixels(self, tiny, tmp_path):
        """AWP with its weights held is a step on images, each of which was moved by 1 along its own gradient."""
        adversarial = train(tiny(), tmp_path, AWP(NEAR, input_epsilon=1.0), max_grad_norm=0.0)
        model, batch = tiny(), {name: values[:6] for name, values in batch_of(12).items()}
        pixels = model.normalization(batch["pixel_values"]).requires_grad_()
        model(pixels, labels=batch["labels"]).loss.backward()
        norms = torch.linalg.vector_norm(pixels.grad.flatten(1), dim=1).view(-1, 1, 1, 1)
        model.zero_grad()
        model((pixels + pixels.grad / norms).detach(), labels=batch["labels"]).loss.backward()
        for name, weight in model.named_parameters():
            torch.testing.assert_close(adversarial.get_parameter(name), weight - 0.1 * weight.grad, msg=name)

    @for_each(
        ("depth", "layers"),
        [(20, 20), (56, 56), (18, 18), (34, 34), (101, 101)],
    )
    def test_as_many_layers_as_its_name_says(self, modeling, depth, layers):
        """Convolutions and the head count, shortcuts do not."""
        with torch.device("meta"):
            model = modeling.SmallResNetForImageClassification(modeling.SmallResNetConfig(depth=depth))
        counted = [
            name
            for name, module in model.named_modules()
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and "shortcut" not in name
        ]
        assert len(counted) == layers
        assert len(by_layer(model)) == (layers - 2) // (3 if depth == 101 else 2)
        assert {"convolution", "other normalization"} < set(by_kind(model))

    @for_each(
        ("settings", "says"),
        [({"depth": 21}, r"6n \+ 2"), ({"depth": 2}, "depth"), ({"image_mean": [0.5]}, "image_mean: expected 3")],
    )
    def test_shapes_that_there_are_not(self, modeling, settings, says):
        with pytest.raises(ValueError, match=says):
            modeling.SmallResNetConfig(**settings)

    def test_a_tuple_is_what_the_metric_reads(self, tiny):
        batch = batch_of()
        model = tiny().eval()
        expected = ClassificationMetric([batch])(model)
        assert ClassificationMetric([{**batch, "return_dict": False}])(model) == expected


def train(model, folder, defense=None, steps=1, **options):
    """Train on the same batches, as stock or defended, and return the model."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        **QUIET,
        per_device_train_batch_size=6,
        max_steps=steps,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        train_sampling_strategy="sequential",
        **options,
    )
    whole = batch_of(12)
    rows = [{name: values[index] for name, values in whole.items()} for index in range(12)]
    if defense is None:
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    else:
        trainer = ParameterDefenseTrainer(model=model, args=arguments, train_dataset=rows, defense=defense)
    trainer.train()
    return model


FAR, NEAR = (CorruptionConstraint(epsilon=epsilon) for epsilon in (1.0, 1e-9))
DEFENSES = {
    "K = 1": lambda radius: MultiStepRisk(radius, steps=1),
    "K = 2, half of the batch": lambda radius: MultiStepRisk(radius, steps=2, batch_share=0.5),
    "ACRT": lambda radius: ACRT(radius, alpha=0.5),
    "SAM, half of the batch": lambda radius: SAM(radius, batch_share=0.5),
}


@pytest.mark.slow
class TestBatchNorm:
    @for_each("name", DEFENSES)
    def test_statistics_are_those_of_the_clean_pass(self, tiny, tmp_path, name):
        """Bit for bit those of a stock step, however far the weights went between."""
        stock, defended = train(tiny(), tmp_path), train(tiny(), tmp_path, DEFENSES[name](FAR))
        expected = dict(stock.named_buffers())
        for buffer, values in defended.named_buffers():
            assert torch.equal(values, expected[buffer]), buffer
        moved = [not torch.equal(values, dict(tiny().named_buffers())[one]) for one, values in expected.items()]
        assert any(moved)

    def test_statistics_under_the_risk_of_noise(self, tiny, tmp_path):
        stock = train(tiny(), tmp_path)
        defended = train(tiny(), tmp_path, CorruptionRisk(GaussianNoise(0.5), clean_weight=0.5))
        for (name, values), (_, expected) in zip(defended.named_buffers(), stock.named_buffers(), strict=True):
            assert torch.equal(values, expected), name

    def test_a_tiny_radius_is_the_stock_trainer(self, tiny, tmp_path):
        """On whole batches, over several steps: all weights and all statistics."""
        stock = train(tiny(), tmp_path, steps=4)
        for name in ("K = 1", "ACRT"):
            defended = train(tiny(), tmp_path, DEFENSES[name](NEAR), steps=4)
            for key, values in stock.state_dict().items():
                torch.testing.assert_close(
                    defended.state_dict()[key], values, rtol=1e-4, atol=1e-6, msg=f"{name} {key}"
                )


@pytest.fixture
def files(tmp_path):
    """Packs of dark and of bright images."""
    generator = np.random.default_rng(0)
    labels = np.arange(24) % 2
    pixels = (generator.integers(0, 100, (24, 8, 8, 3)) + 150 * labels[:, None, None, None]).astype(np.uint8)
    contents = []
    for image in pixels:
        Image.fromarray(image).save(tmp_path / "one.png")
        contents.append((tmp_path / "one.png").read_bytes())
    (tmp_path / "one.png").unlink()
    np.savez(
        tmp_path / "a.npz",
        jpeg=np.frombuffer(b"".join(contents), np.uint8),
        offsets=np.cumsum([0, *map(len, contents)]),
        labels=labels,
        names=np.array(NAMES),
    )
    return tmp_path


def settings(folder: Path) -> dict[str, object]:
    return {
        **TRAINS_AND_MEASURES,
        "resnet_depth": 8,
        "train_file": str(folder / "a.npz"),
        "validation_file": str(folder / "a.npz"),
        "output_dir": str(folder / "out"),
        "max_train_samples": 16,
        "crop_padding": 1,
        "num_train_epochs": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.05,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "corruptions": ["gradient=0.1", "quantization=4"],
    }


def run(folder: Path, monkeypatch, **given) -> Path:
    return run_with(SCRIPT, {**settings(folder), **given}, monkeypatch)


@pytest.mark.slow
def test_it_learns_and_the_command_line_measures_the_same(files, monkeypatch, capsys):
    out = run(files, monkeypatch)
    assert json.loads((out / "train_results.json").read_text())["train_samples"] == 16
    found = json.loads((out / "eval_results.json").read_text())
    assert found["eval_samples"] == 24
    record = EvaluationRecord.load(out / "robustness.json")
    assert record.clean.mean("accuracy") == found["eval_accuracy"] > 0.9
    from hf_parcor.cli.main import main

    capsys.readouterr()
    flags = ["--dataset", str(files / "a.npz"), "--corruptions", "quantization=4", "--json", "--device", "cpu"]
    assert main(["evaluate", str(out), "--trust-remote-code", *flags]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["clean"]["metrics"]["accuracy"] == [found["eval_accuracy"]]


@pytest.mark.slow
def test_a_file_of_weights_becomes_a_folder(files, monkeypatch, tiny):
    trained = tiny()
    save_file(
        {k: v.contiguous() for k, v in trained.state_dict().items() if "tracked" not in k}, files / "w.safetensors"
    )
    out = run(files, monkeypatch, resnet_weights=str(files / "w.safetensors"), do_train=None, do_eval=None)
    saved = load_file(out / "model.safetensors")
    assert all(torch.equal(saved[name], values) for name, values in trained.state_dict().items())
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "black", "1": "white"}
    assert not (out / "train_results.json").exists()
    with pytest.raises(ValueError, match=r"20 layers, got \d+ too few"):
        run(files, monkeypatch, resnet_weights=str(files / "w.safetensors"), resnet_depth=20, do_train=None)


@pytest.mark.slow
def test_what_is_resumed_sees_the_same_images(files, monkeypatch):
    """Stopped in the middle of the second epoch, with images shifted and mirrored: the same weights at the end."""
    steps = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None, "do_eval": None}
    whole = run(files, monkeypatch, **steps, output_dir=str(files / "whole"))
    resumed = run(
        files,
        monkeypatch,
        **steps,
        output_dir=str(files / "resumed"),
        resume_from_checkpoint=str(whole / "checkpoint-3"),
    )
    expected = load_file(whole / "model.safetensors")
    for name, values in load_file(resumed / "model.safetensors").items():
        assert torch.equal(values, expected[name]), name


class TestBatches:
    @pytest.fixture
    def batches(self):
        """The class of the example's data set."""
        import train_image_classifier

        return train_image_classifier.ImageBatches

    images = LabelledImages(np.random.default_rng(0).integers(1, 256, (9, 4, 5, 3), np.uint8), np.arange(9))

    def test_without_variation_they_are_the_images(self, batches):
        (batch,) = batches(self.images).__getitems__([3, 0])
        assert np.array_equal(batch["pixel_values"].permute(0, 2, 3, 1), self.images.pixels[[3, 0]])
        assert batch["labels"].tolist() == [3, 0]
        (scaled,) = batches(self.images, ([0.5] * 3, [0.25] * 3)).__getitems__([1])
        assert np.allclose(scaled["pixel_values"][0].permute(1, 2, 0), (self.images.pixels[1] / 255 - 0.5) / 0.25)

    def test_each_is_a_shifted_or_mirrored_copy_by_its_place_and_epoch(self, batches):
        """Every picture is found among all that may be cut out; each shift occurs."""
        varied = batches(self.images, crop_padding=1, flip=True, seed=3)
        padded = np.pad(self.images.pixels, ((0, 0), (1, 1), (1, 1), (0, 0)))
        seen = set()
        for epoch in range(30):
            varied.set_epoch(epoch)
            (batch,) = varied.__getitems__(list(range(9)))
            for index, found in enumerate(batch["pixel_values"].permute(0, 2, 3, 1).numpy()):
                cut = {
                    (row, column, step): padded[index, row : row + 4, column : column + 5][:, ::step]
                    for row in range(3)
                    for column in range(3)
                    for step in (1, -1)
                }
                places = [place for place, one in cut.items() if np.array_equal(one, found)]
                assert len(places) == 1
                seen.add(places[0])
            (again,) = varied.__getitems__([8, 2])  # in another batch, at another place
            assert torch.equal(again["pixel_values"], batch["pixel_values"][[8, 2]])
        assert len(seen) == 18


@for_each(
    ("given", "says"),
    [
        ({"resnet_depth": None}, "--resnet_depth or --model_name_or_path"),
        ({"train_file": None}, "--train_file or --dataset_name"),
        ({"resnet_depth": 9}, "depth: expected"),
        (
            {"resnet_depth": None, "model_name_or_path": "vit", "do_train": None, "do_eval": None},
            "expected --do_train, --do_eval or both, got none",
        ),
        (
            {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
            "dataloader_persistent_workers: expected workers that begin anew",
        ),
    ],
)
def test_bad_input(files, monkeypatch, given, says):
    with pytest.raises(ValueError, match=says):
        run(files, monkeypatch, **given)
    assert not (files / "out" / "train_results.json").exists()


# INDEX.md: on clean images 91.8 to 93.6 %, on the JPEG copy 81.0 to 83.2 %; the lossless ones are of the training set.
@pytest.mark.slow
@for_each(
    ("file", "count", "least", "most"),
    [("cifar10_lossless*.png", 200, 0.97, 1.0), ("cifar10_test_jpeg.npz", 400, 0.76, 0.88)],
)
def test_trained_weights_give_their_accuracies(modeling, file, count, least, most):
    if not (SHARED / "resnet_cifar10_weights").is_dir():
        pytest.skip("the trained ResNets are not beside the project: shared/data/resnet_cifar10_weights")
    model = modeling.SmallResNetForImageClassification(modeling.SmallResNetConfig(depth=20, num_labels=10)).eval()
    weights = SHARED / "resnet_cifar10_weights" / "resnet20.safetensors"
    model.load_state_dict(load_file(weights))
    images = read_images(SHARED / "cifar10" / file).select(range(count))
    batch = {
        "pixel_values": torch.from_numpy(images.pixels).permute(0, 3, 1, 2),
        "labels": torch.from_numpy(images.labels),
    }
    assert least <= ClassificationMetric([batch])(model)["accuracy"] <= most


def test_the_classes_of_tiny_imagenet():
    """Grey pictures are among the first ones; every class has its words, and as many pictures as all others."""
    path = SHARED / "tiny_imagenet20" / "tiny_imagenet20_val.npz"
    if not path.is_file():
        pytest.skip("the pack is not beside the project: shared/data/tiny_imagenet20")
    images = read_images(path)
    assert images.pixels.shape == (1000, 64, 64, 3)
    grey = (images.pixels == images.pixels[..., :1]).all((1, 2, 3))
    assert 0 < grey.sum() < 100
    assert np.bincount(images.labels).tolist() == [50] * 20
    rows = load_rows(str(path))
    names = ImageClassification().head_settings([(rows, {"image": "image", "label": "label"})])["id2label"]
    assert (len(names), names[0]) == (20, "goldfish, Carassius auratus")
