"""Average precision: equal to one written out, and to torchmetrics where that can be imported; what is odd, said."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from for_each import for_each
from torch import nn

from hf_parcor import BitFlips, CorruptionConstraint, CorruptionEvaluator, GradientCorruption, RobustnessCallback
from hf_parcor.evaluation import DetectionMetric
from hf_parcor.evaluation.metrics import detection
from hf_parcor.evaluation.metrics.detection import average_precision, most_likely_boxes
from hf_parcor.injection import corrupted

CLASSES, SIDE = 3, 100.0


pytest.importorskip("pycocotools", reason="average precision needs the extra 'detection'")


def boxes_of(count):
    corner, size = torch.rand(count, 2) * 60, 10 + torch.rand(count, 2) * 30
    return torch.cat([corner, corner + size], -1)


def image(count, missed=0.3, extra=3):
    """Return what is on an image, and what somebody finds who is right in general."""
    boxes, labels = boxes_of(count), torch.randint(CLASSES, (count,))
    seen = torch.rand(count) > missed
    found = torch.cat([(boxes + torch.randn(count, 4) * 3)[seen], boxes_of(extra)])
    guessed = torch.cat([labels[seen], torch.randint(CLASSES, (extra,))])
    return {"boxes": found, "labels": guessed, "scores": torch.rand(len(found))}, {"boxes": boxes, "labels": labels}


def overlap(one, other):
    sides = [min(one[2 + axis], other[2 + axis]) - max(one[axis], other[axis]) for axis in (0, 1)]
    inside = max(sides[0], 0) * max(sides[1], 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return inside / (sum(areas) - inside)


def by_hand(found, there, at_least):
    """Of each class, go through the predictions from the surest on; each takes the free box that it overlaps most."""
    of_classes = []
    for label in range(CLASSES):
        boxes = [of_image["boxes"][of_image["labels"] == label].tolist() for of_image in there]
        total = sum(map(len, boxes))
        if not total:
            continue
        predictions = [
            (-score, index, box)
            for index, of_image in enumerate(found)
            for box, name, score in zip(
                *(of_image[part].tolist() for part in ("boxes", "labels", "scores")), strict=True
            )
            if name == label
        ]
        right, points = 0, []
        for rank, (_, index, box) in enumerate(sorted(predictions), start=1):
            overlaps = [overlap(box, other) for other in boxes[index]]
            if overlaps and max(overlaps) >= at_least:
                boxes[index].pop(int(np.argmax(overlaps)))
                right += 1
            points.append((right / total, right / rank))
        recalls = np.linspace(0, 1, 101)
        best = [max((precision for recall, precision in points if recall >= least), default=0) for least in recalls]
        of_classes.append((np.mean(best), right / total))
    return np.mean(of_classes, axis=0)


@for_each("counts", [[5, 3, 0, 7], [1], [0, 0, 2], [12] * 6])
def test_average_precision_is_that_written_out(counts):
    found, there = zip(*map(image, counts), strict=True)
    measured = average_precision(found, there)
    thresholds = np.linspace(0.5, 0.95, 10)
    expected = np.array([by_hand(found, there, threshold) for threshold in thresholds])
    assert measured["map"] == pytest.approx(expected[:, 0].mean())
    assert measured["map_50"] == pytest.approx(expected[0, 0])
    assert measured["map_75"] == pytest.approx(expected[5, 0])
    assert measured["mar_100"] == pytest.approx(expected[:, 1].mean())


def test_average_precision_is_that_of_torchmetrics():
    pytest.importorskip("torchvision", reason="torchmetrics needs it", exc_type=Exception)
    theirs = pytest.importorskip("torchmetrics.detection").MeanAveragePrecision()
    found, there = zip(*map(image, [5, 3, 0, 7]), strict=True)
    theirs.update(list(found), list(there))
    expected, measured = theirs.compute(), average_precision(found, there)
    assert measured == pytest.approx({name: float(expected[name]) for name in measured}, abs=1e-6)


NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}


class TestWhatIsOdd:
    def test_nothing_is_found(self):
        _, there = image(4)
        assert set(average_precision([NOTHING], [there]).values()) == {0.0}

    def test_nothing_is_there(self):
        found, there = image(6)
        crowds = {**there, "iscrowd": torch.ones(6)}
        for nothing in (NOTHING, crowds):
            with pytest.raises(ValueError, match="expected boxes on one image at least, got none"):
                average_precision([found], [nothing])

    def test_of_each_class_only_the_hundred_likeliest_boxes_count(self):
        corners = torch.tensor([[10.0 * place, 0.0, 10.0 * place + 8, 8.0] for place in range(150)])
        for classes, recall in ((1, 100 / 150), (2, 1.0)):
            there = {"boxes": corners, "labels": torch.arange(150) % classes}
            found = {**there, "scores": torch.linspace(1.0, 0.5, 150)}
            assert average_precision([found], [there])["mar_100"] == pytest.approx(recall, abs=0.01)

    def test_a_class_that_never_occurs_does_not_count(self):
        found, there = image(6)
        there["labels"] = there["labels"].clamp(max=1)
        more = {**found, "labels": found["labels"].clamp(max=1)}
        extra = {"boxes": boxes_of(3), "labels": torch.full((3,), 2), "scores": torch.ones(3)}
        both = {name: torch.cat([more[name], extra[name]]) for name in more}
        assert average_precision([both], [there]) == average_precision([more], [there])

    def test_a_crowd_neither_helps_nor_harms(self):
        found, there = image(6)
        crowd = {"boxes": torch.tensor([[0.0, 0.0, 9.0, 9.0]]), "labels": torch.tensor([0])}
        more = {name: torch.cat([there[name], crowd[name]]) for name in there}
        hit = {**{name: torch.cat([found[name], crowd[name]]) for name in crowd}}
        hit["scores"] = torch.cat([found["scores"], torch.tensor([0.99])])
        more["iscrowd"] = torch.tensor([0] * 6 + [1])
        assert average_precision([hit], [more]) == average_precision([found], [there])

    def test_no_library(self, monkeypatch):
        monkeypatch.setattr(detection, "_BACKENDS", ())
        with pytest.raises(ImportError, match=r"hf-parcor\[detection\]"):
            DetectionMetric([{}])


class Finds(nn.Module):
    """A detector that is what its one parameter says."""

    def __init__(self, logits, boxes):
        super().__init__()
        self.logits, self.boxes = nn.Parameter(logits), boxes

    def forward(self, pixel_values, labels):
        count = len(pixel_values)
        logits, boxes = self.logits[:count], self.boxes[:count]
        loss = logits.square().sum(-1).sum(-1).mean()
        return SimpleNamespace(loss=loss, logits=logits, pred_boxes=boxes)


def centered(boxes):
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], -1) / SIDE


def detector_and_batches(counts=(4, 2, 0), queries=6):
    there = [{"boxes": boxes_of(count), "labels": torch.randint(CLASSES, (count,))} for count in counts]
    logits = torch.randn(len(counts), queries, CLASSES + 1) * 0.1
    boxes = torch.rand(len(counts), queries, 4) * 0.3 + 0.2
    for place, of_image in enumerate(there):
        count = len(of_image["labels"])
        boxes[place, :count] = centered(of_image["boxes"])
        logits[place, range(count), of_image["labels"]] += 3
    targets = [{"class_labels": one["labels"], "boxes": centered(one["boxes"])} for one in there]
    batch = {"pixel_values": torch.zeros(len(counts), 3, 100, 100), "labels": targets}
    return Finds(logits, boxes), batch, there


class TestMetric:
    def test_the_numbers_of_a_detector(self):
        model, batch, there = detector_and_batches()
        found = DetectionMetric([batch])(model)
        scores, labels = model.logits.softmax(-1)[..., :-1].max(-1)
        by_image = [
            {"boxes": box, "labels": label, "scores": score}
            for box, label, score in zip(model.boxes, labels, scores.detach(), strict=True)
        ]
        for one in by_image:
            center, half = one["boxes"][:, :2] * SIDE, one["boxes"][:, 2:] * SIDE / 2
            one["boxes"] = torch.cat([center - half, center + half], -1)
        assert found == {
            **average_precision(by_image, there),
            "loss": pytest.approx(float(model.logits.detach().square().sum()) / 3),
        }
        assert found["map_50"] > 0.9

    def test_batches_of_other_sizes_make_no_difference(self):
        model, batch, _ = detector_and_batches((4, 2, 3, 1))
        post_process = lambda output, sizes: most_likely_boxes(output, sizes)  # noqa: E731
        whole = DetectionMetric([batch], post_process)(model)
        parts = []
        metric = DetectionMetric([batch])
        for place in range(4):
            alone = Finds(model.logits[place : place + 1].detach(), model.boxes[place : place + 1])
            parts.append(
                metric.of_batch(
                    alone, {"pixel_values": batch["pixel_values"][:1], "labels": batch["labels"][place:][:1]}
                )
            )
        assert metric.combine(parts) == pytest.approx(whole)

    @for_each("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_no_box(self, value):
        model, batch, _ = detector_and_batches()
        clean = DetectionMetric([batch])(model)
        with torch.no_grad():
            model.logits[0, 0, 1] = value
        found = DetectionMetric([batch])(model)
        assert found["predictions_not_finite"] == pytest.approx(1 / 18)
        assert found["mar_100"] < clean["mar_100"]

    @for_each(
        ("labels", "said"),
        [
            (None, "expected a list with a mapping"),
            (torch.zeros(3), "got Tensor"),
            ([{"boxes": torch.zeros(0, 4)}] * 3, "class_labels and boxes"),
        ],
    )
    def test_labels_of_other_tasks(self, labels, said):
        model, batch, _ = detector_and_batches()
        with pytest.raises(ValueError, match=said):
            DetectionMetric([{**batch, "labels": labels}])(model)

    def test_a_corruption_along_the_gradient(self):
        model, batch, _ = detector_and_batches()
        record = CorruptionEvaluator(model, DetectionMetric([batch]), progress=False).evaluate(
            [GradientCorruption(CorruptionConstraint(epsilon=30.0))]
        )
        (gradient,) = torch.autograd.grad(model(**batch).loss, [model.logits])
        step = {"logits": 30.0 * gradient / gradient.norm()}
        with corrupted(dict(model.named_parameters()), step):
            expected = DetectionMetric([batch])(model)
        measured = {name: values[0] for name, values in record.rows()[1].metrics.items()}
        assert measured == pytest.approx(expected, rel=1e-5)


def yolos():
    config = transformers.YolosConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=[16, 16],
        patch_size=8,
        num_detection_tokens=5,
        num_labels=CLASSES,
    )
    return transformers.YolosForObjectDetection(config).eval()


@pytest.mark.slow
def test_training_goes_on_where_a_corruption_destroys_the_detector(tmp_path):
    """Its loss refuses boxes that are NaN."""
    target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}
    rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": target} for _ in range(4)]

    def collate(batch):
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in batch]),
            "labels": [row["labels"] for row in batch],
        }

    arguments = transformers.TrainingArguments(
        str(tmp_path),
        **{"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2},
        **{"remove_unused_columns": False, "eval_do_concat_batches": False, "disable_tqdm": True, "report_to": "none"},
        use_cpu=True,
    )
    trainer = transformers.Trainer(yolos(), arguments, collate, train_dataset=rows, eval_dataset=rows)
    trainer.add_callback(RobustnessCallback(trainer, {"flips": BitFlips(rate=0.3)}, trials=1))
    trainer.train()
    assert trainer.state.global_step == 2
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"])
    assert np.isnan(metrics["eval_robustness_flips_loss"])


@pytest.mark.slow
def test_a_detector_of_transformers_is_read_as_its_image_processor_does():
    pytest.importorskip("PIL")
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    model = yolos()
    output = model(torch.randn(2, 3, 16, 16))
    sizes = [(30, 40), (20, 10)]
    theirs = DetrImageProcessorPil().post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
    for one, other in zip(most_likely_boxes(output, sizes), theirs, strict=True):
        for name, value in other.items():
            torch.testing.assert_close(one[name], value)
