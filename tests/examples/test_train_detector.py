"""The example script, with a tiny detector of Transformers; Faster R-CNN where torchvision can be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from example_program import TRAINS_AND_MEASURES, run_with, steps_logged
from local_models import save_yolos, write_objects
from trainings import QUIET
from transformers import TrainingArguments

from hf_parcor.records import EvaluationRecord
from hf_parcor.tasks import Processed, load_rows

pytest.importorskip("PIL", reason="the examples need the extra 'examples'")
pytest.importorskip("pycocotools", reason="average precision needs the extra 'detection'")
SCRIPT = Path(__file__).parents[2] / "examples" / "train_detector.py"
TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 4,
    "num_detection_tokens": 6,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the example on four images; returns its folder."""
    data = write_objects(tmp_path / "rows.jsonl")

    def of(**given):
        settings = {
            **TRAINS_AND_MEASURES,
            "train_file": data,
            "validation_file": data,
            "model_type": "yolos",
            "config_overrides": json.dumps(TINY),
            "image_size": 12,
            "output_dir": str(tmp_path / "out"),
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "corruptions": ["gradient=0.1", "quantization=4"],
            **given,
        }
        return run_with(SCRIPT, settings, monkeypatch)

    return of


def test_a_detector_is_trained_defended_measured_and_resumed(run, capsys):
    chosen = {"metric_for_best_model": "eval_robustness_4_bit_quantization_loss", "load_best_model_at_end": True}
    out = run(watched_corruptions=["quantization=4"], greater_is_better=False, **chosen)
    log = steps_logged(out)
    assert len(log) == 4
    assert all("loss_corrupted" in entry for entry in log)
    found = json.loads((out / "eval_results.json").read_text())
    record = EvaluationRecord.load(out / "robustness.json")
    assert record.clean.mean("map_50") == found["eval_map_50"]
    assert record.clean.mean("loss") == pytest.approx(found["eval_loss"])
    assert [row.label for row in record.corruptions] == ["gradient-based L2 ε=0.1", "4-bit quantization"]
    best = json.loads((out / "trainer_state.json").read_text())["best_metric"]
    assert best == pytest.approx(record.corruptions[1].mean("loss")), "what was watched is what is measured at the end"
    assert "| gradient-based L2 ε=0.1" in capsys.readouterr().out
    again = run(num_train_epochs=3)
    assert json.loads((again / "trainer_state.json").read_text())["global_step"] == 6
    # A saved model keeps its classes when it is only measured.
    kept = {"model_name_or_path": str(out), "do_train": False, "output_dir": str(out / "measured")}
    assert (run(**kept, skip_corruptions=True) / "eval_results.json").exists()


def test_mirrored_images_have_mirrored_boxes():
    from PIL import Image
    from train_detector import Flipped

    image = Image.new("RGB", (12, 10))
    image.paste((255, 0, 0), (1, 2, 4, 6))
    given = {"image": image, "annotations": [{"bbox": [1, 2, 3, 4], "category_id": 0}], "image_id": 0}
    seen = set()
    flipped = Flipped([given], seed=0)
    for epoch in range(20):
        flipped.set_epoch(epoch)
        example = flipped[0]
        x, y, width, height = example["annotations"][0]["bbox"]
        seen.add(x)
        inside = example["image"].crop((x, y, x + width, y + height))
        assert set(inside.getdata()) == {(255, 0, 0)}
        assert example["image"].getcolors()[0][0] == 12
    assert seen == {1, 8}


def test_a_run_that_is_resumed_within_an_epoch_mirrors_the_same_images(run, tmp_path, monkeypatch):
    import train_detector

    seen = []
    original = train_detector.Flipped.__getitem__

    def noted(self, index):
        example = original(self, index)
        seen.append((index, example["annotations"] != self._examples[index]["annotations"]))
        return example

    monkeypatch.setattr(train_detector.Flipped, "__getitem__", noted)
    given = {"per_device_train_batch_size": 1, "do_eval": False, "eval_strategy": "no", "defense": "none"}
    run(**given, save_strategy="steps", save_steps=2)
    whole = list(seen)
    assert [index for index, _ in whole[:4]] != [index for index, _ in whole[4:]]
    seen.clear()
    resumed = {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2"), "save_strategy": "no"}
    run(**given, **resumed)
    assert seen[-6:] == whole[2:]
    assert {mirrored for _, mirrored in whole} == {False, True}


def test_a_run_that_would_do_nothing_is_refused(run):
    with pytest.raises(ValueError, match="expected --do_train, --do_eval or both, got none"):
        run(do_train=False, do_eval=False, eval_strategy="no")


def test_workers_that_live_on_are_refused(run):
    with pytest.raises(ValueError, match="dataloader_persistent_workers: expected workers that begin anew"):
        run(dataloader_num_workers=1, dataloader_persistent_workers=True)


def test_gradients_too_are_of_batches_of_images_of_one_size(tmp_path):
    """Their loss would have other true boxes than what is evaluated."""
    from PIL import Image
    from train_detector import TASK, DetectionTrainer

    rows, folder = load_rows(write_objects(tmp_path / "rows.jsonl")), save_yolos(tmp_path / "model")
    Image.open(tmp_path / "0.png").transpose(Image.Transpose.ROTATE_90).save(tmp_path / "0.png")
    model, processor = TASK.load_model(folder), TASK.load_processor(folder)
    processed = Processed(model, processor)
    trainer = DetectionTrainer(
        model=model,
        args=TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, remove_unused_columns=False, **QUIET),
        eval_dataset=TASK.examples(rows, TASK.find_columns(rows, {}), processed),
        processing_class=processor,
        data_collator=TASK.collator(processed),
    )
    batches = [
        {tuple(one["orig_size"].tolist()) for one in batch["labels"]} for batch in trainer.get_eval_dataloader()
    ]
    assert batches == [{(12, 10)}, {(10, 12)}]
    assert trainer.evaluate()["eval_map"] >= 0


def test_faster_r_cnn_without_torchvision(run):
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        with pytest.raises(ImportError, match=r"expected torchvision to be installed, got .*pip install torchvision"):
            run(model_type="faster_rcnn", config_overrides="{}")


class TestFasterRCNN:
    @pytest.fixture(autouse=True)
    def torchvision(self):
        pytest.importorskip("torchvision", reason="Faster R-CNN needs torchvision", exc_type=Exception)

    @pytest.fixture
    def model(self):
        from modeling_faster_rcnn import FasterRCNNConfig, FasterRCNNForObjectDetection

        torch.manual_seed(0)
        config = FasterRCNNConfig(
            backbone="resnet18",
            fpn_channels=8,
            representation_size=8,
            num_labels=3,
            anchor_sizes=[8, 16, 32, 64, 128],
            proposals=50,
            sampled_proposals=16,
            score_threshold=0.0,
        )
        return FasterRCNNForObjectDetection(config)

    labels = (
        {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.3], [0.2, 0.3, 0.2, 0.2]])},
        {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
    )

    def test_the_loss_in_evaluation_moves_nothing(self, model):
        images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
        model.train()(images, labels=self.labels)  # statistics of some data
        model.eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        state = torch.get_rng_state()
        first, second = (model(images, labels=self.labels) for _ in range(2))
        assert torch.equal(first.loss, second.loss)
        assert torch.equal(state, torch.get_rng_state())
        assert modes == [module.training for module in model.modules()]
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        found = torch.autograd.grad(first.loss, list(model.parameters()), allow_unused=True)
        assert all(gradient is not None for gradient in found)

    def test_images_in_a_list_are_those_of_a_batch(self, model):
        model.eval()
        images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
        whole, listed = model(images, labels=self.labels), model(list(images), labels=self.labels)
        torch.testing.assert_close(whole.loss, listed.loss)
        torch.testing.assert_close(whole.pred_boxes, listed.pred_boxes)
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (model.config.image_mean, model.config.image_std)
        )
        torch.testing.assert_close(model((images / 255 - mean) / std).logits, whole.logits)

    def test_the_predictions_are_those_of_torchvision(self, model):
        from hf_parcor.evaluation.metrics.detection import most_likely_boxes

        model.eval()
        image = torch.rand(1, 3, 64, 96)
        output = model(image)
        (found,) = most_likely_boxes(output, [(64, 96)])
        images, _ = model._prepared(image, None)
        features = model.backbone(images.tensors)
        (expected,), _ = model.roi_heads(features, model.rpn(images, features)[0], images.image_sizes)
        count = len(expected["scores"])
        assert count > 0
        torch.testing.assert_close(found["scores"][:count], expected["scores"])
        torch.testing.assert_close(found["boxes"][:count], expected["boxes"], rtol=1e-4, atol=1e-4)
        assert torch.equal(found["labels"][:count] + 1, expected["labels"])
        assert not found["scores"][count:].any()

    def test_boxes_without_area_and_missing_labels(self, model):
        images = torch.rand(1, 3, 64, 64)
        flat = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.0, 0.3]])}]
        with pytest.raises(ValueError, match="width and height > 0"):
            model.train()(images, labels=flat)
        with pytest.raises(ValueError, match="in training, got none"):
            model(images)
        with pytest.raises(ValueError, match="one mapping for each of 1 images, got 2"):
            model(images, labels=self.labels)

    def test_a_saved_folder_carries_its_code(self, model, tmp_path):
        model.save_pretrained(tmp_path / "saved")
        program = (
            "import sys, torch; from transformers import AutoModelForObjectDetection as Auto;"
            "model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True).eval();"
            "torch.save(model(torch.ones(1, 3, 64, 64)).logits, sys.argv[2])"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "saved"), str(tmp_path / "logits")]
        subprocess.run(command, check=True, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")})
        expected = model.eval()(torch.ones(1, 3, 64, 64)).logits
        torch.testing.assert_close(torch.load(tmp_path / "logits"), expected)

    def test_the_command_line_takes_a_saved_folder(self, run, tmp_path, capsys):
        """Evaluated as the example has done it; probed in the blocks of its backbone; its card knows the task."""
        from hf_parcor.cli import main

        sizes = {"fpn_channels": 8, "representation_size": 8, "anchor_sizes": [4, 8, 16, 32, 64], "proposals": 20}
        overrides = json.dumps({"backbone": "resnet18", "score_threshold": 0.0, **sizes})
        out = run(model_type="faster_rcnn", config_overrides=overrides, image_size=64, learning_rate=1e-3)
        data = ["--trust-remote-code", "--dataset", str(tmp_path / "rows.jsonl"), "--device", "cpu", "--quiet"]

        def told(command, *more):
            capsys.readouterr()
            assert main([command, str(out), *data, *more, "--json"]) == 0
            return json.loads(capsys.readouterr().out)

        clean = told("evaluate", "--corruptions", "quantization=4")["clean"]["metrics"]
        found = json.loads((out / "eval_results.json").read_text())
        assert clean["map_50"] == [pytest.approx(found["eval_map_50"])]
        assert clean["loss"] == [pytest.approx(found["eval_loss"], rel=1e-4)]
        blocks = {f"backbone.body.layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)}
        assert set(told("probe", "--corruptions", "quantization=4")["records"]) == blocks
        assert set(told("probe", "--quick")["groups"]) == blocks
        assert main(["card", str(out)]) == 0
        card = (out / "README.md").read_text(encoding="utf-8")
        assert "pipeline_tag: object-detection" in card
        assert "4-bit quantization" in card
