"""Boxes that a detector predicts, compared with those that are there: average precision as COCO computes it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from hf_parcor.evaluation.metrics.over_batches import OverBatches, sum_of
from hf_parcor.evaluation.outputs import Output, called, own_batch, share_not_finite
from hf_parcor.records.metric_info import SHARE, MetricInfo

Boxes = Mapping[str, Tensor]
"""What one image shows: `boxes` (n, 4) as (xmin, ymin, xmax, ymax), `labels` (n,), of predictions `scores` (n,)."""

PostProcess = Callable[[Any, list[tuple[int, int]]], Sequence[Boxes]]
"""From a model's output and the images' sizes, (height, width), to what is found on each."""

# Where COCOeval keeps them: over all classes, sizes and up to 100 detections an image.
_STATISTICS = MappingProxyType({"map": 0, "map_50": 1, "map_75": 2, "mar_100": 8})

_BACKENDS = (
    (("pycocotools.coco", "COCO"), ("pycocotools.cocoeval", "COCOeval")),
    (("faster_coco_eval", "COCO"), ("faster_coco_eval", "COCOeval_faster")),
)


def most_likely_boxes(output: Any, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    r"""Return the box of each query with its likeliest class, as DETR and YOLOS are read.

    The score is `\max_{c < C} softmax(z)_c`, where the last of the C + 1 logits says that there is no object.

    Args:
        output: With `logits` (B, Q, C + 1) and `pred_boxes` (B, Q, 4): center and size, as shares of the image's.
        sizes: Height and width of each image.

    Examples:
        >>> from types import SimpleNamespace
        >>> output = SimpleNamespace(
        ...     logits=torch.tensor([[[2.0, 0.0, 0.0]]]), pred_boxes=torch.tensor([[[0.5, 0.5, 0.2, 0.4]]])
        ... )
        >>> (found,) = most_likely_boxes(output, [(100, 200)])
        >>> found["boxes"].round(), found["labels"]
        (tensor([[ 80.,  30., 120.,  70.]]), tensor([0]))
    """
    scores, labels = output.logits.float().softmax(-1)[..., :-1].max(-1)
    boxes = [_corners(of_image.float(), size) for of_image, size in zip(output.pred_boxes, sizes, strict=True)]
    rows = zip(boxes, scores, labels, strict=True)
    return [{"boxes": box, "scores": score, "labels": label} for box, score, label in rows]


def _corners(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return boxes (n, 4) as corners in pixels, given as shares of the image's size with their center."""
    center, extent = boxes[:, :2], boxes[:, 2:]
    height, width = size
    scale = boxes.new_tensor([width, height, width, height])
    return torch.cat([center - extent / 2, center + extent / 2], -1) * scale


def average_precision(found: Sequence[Boxes], there: Sequence[Boxes]) -> dict[str, float]:
    """Return COCO's average precision and recall of boxes, by pycocotools or else faster-coco-eval.

    - `map`: the mean over classes and over overlaps (IoU) 0.50, 0.55, ..., 0.95 of the average precision, which is the
      mean precision at 101 recalls; `map_50` and `map_75` at one overlap. `map_50` is also called AP50 or, after the
      VOC challenge, simply mAP.
    - `mar_100`: the mean over classes and overlaps of the largest recall.

    Of each class only the 100 boxes of an image with the largest scores count. A class that no image shows is ignored,
    whatever is predicted. Boxes with `iscrowd` neither help nor harm.

    Args:
        found: The predicted boxes of each image.
        there: The true boxes of each image; an image may have none.

    Raises:
        ValueError: There is no box on any image, but for those with `iscrowd`.
        ImportError: Neither library is installed.

    Examples:
        >>> there = {"boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0]]), "labels": torch.tensor([1])}
        >>> found = {**there, "boxes": torch.tensor([[0.0, 0.0, 10.0, 7.0]]), "scores": torch.tensor([0.9])}
        >>> {name: round(value, 3) for name, value in average_precision([found], [there]).items()}
        {'map': 0.5, 'map_50': 1.0, 'map_75': 0.0, 'mar_100': 0.5}
    """
    data_set, evaluation = _coco()
    if not any((_crowd(image) == 0).any() for image in there):
        raise ValueError(
            "labels: expected boxes on one image at least, got none; without any, no detection can be right: choose "
            "data with boxes"
        )
    classes = np.unique(np.concatenate([_array(image["labels"]) for image in [*there, *found]]).astype(int)).tolist()
    # It prints how long it took.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluating = evaluation(_as_coco(data_set, there, classes), _as_coco(data_set, found, classes), "bbox")
        evaluating.evaluate()
        evaluating.accumulate()
        evaluating.summarize()
    return {name: float(evaluating.stats[place]) for name, place in _STATISTICS.items()}


def _coco() -> tuple[Any, Any]:
    """Return the classes COCO and COCOeval."""
    for (module, data_set), (other, evaluation) in _BACKENDS:
        with contextlib.suppress(ImportError):
            return getattr(import_module(module), data_set), getattr(import_module(other), evaluation)
    raise ImportError(
        "average precision: expected pycocotools or faster-coco-eval to be installed, found neither; install one "
        "with: pip install 'hf-parcor[detection]'"
    )


def _as_coco(data_set: Any, images: Sequence[Boxes], classes: Sequence[int]) -> Any:
    """Return boxes as a data set of COCO."""
    annotations: list[dict[str, Any]] = []
    for index, image in enumerate(images):
        corners, labels = _array(image["boxes"]).reshape(-1, 4), _array(image["labels"])
        scores = _array(image["scores"]) if "scores" in image else None
        crowd = _crowd(image)
        for place, (xmin, ymin, xmax, ymax) in enumerate(corners.astype(float).tolist()):
            annotation = {
                "id": len(annotations) + 1,  # 0 stands for no match
                "image_id": index,
                "category_id": int(labels[place]),
                "bbox": [xmin, ymin, xmax - xmin, ymax - ymin],
                "area": (xmax - xmin) * (ymax - ymin),
                "iscrowd": int(crowd[place]),
            }
            if scores is not None:
                annotation["score"] = float(scores[place])
            annotations.append(annotation)
    coco = data_set()
    coco.dataset = {
        "images": [{"id": index} for index in range(len(images))],
        "categories": [{"id": number} for number in classes],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _crowd(image: Boxes) -> Any:
    return _array(image["iscrowd"]) if "iscrowd" in image else np.zeros(len(image["labels"]))


def _array(values: Any) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


class DetectionMetric(OverBatches):
    """Average precision of a detector's boxes, and its mean loss over images.

    `map`, `map_50`, `map_75` and `mar_100` are COCO's (see `average_precision`), and `loss` is the model's own, in
    evaluation mode, or NaN where that refuses boxes that are NaN. A box is dropped if it or its score is not
    finite, or if its score is 0. If the output has `pred_boxes`, the share of queries whose box or logits are not
    finite is `predictions_not_finite`, if there are any; a logit of −∞ is allowed, because it rules a class out.

    Args:
        batches: Mappings with `pixel_values` and `labels`, as image processors of DETR make them: for each image a
            mapping with `class_labels` (n,) and `boxes` (n, 4), center and size as shares of the image's size;
            `orig_size` and `iscrowd` are used if present, and so are `crowd_boxes` and `crowd_labels`, boxes around
            crowds that are kept from the model.
        post_process: A function from the output and the sizes of the images to the boxes of each image, in pixels:
            `scores`, `labels` and `boxes` with corners. Most image processors have it as
            `post_process_object_detection`. Default `most_likely_boxes`, for DETR and YOLOS.

    Raises:
        ValueError: There are no batches, they can be walked through only once, there are no boxes, or the model
            returns no loss.
        ImportError: Neither pycocotools nor faster-coco-eval is installed.
    """

    _named: ClassVar[bool] = True
    _infos: ClassVar[Mapping[str, MetricInfo]] = {
        **{name: MetricInfo(True, SHARE) for name in _STATISTICS},
        "loss": MetricInfo(False),
    }

    def __init__(self, batches: Iterable[Mapping[str, Any]], post_process: PostProcess = most_likely_boxes) -> None:
        _coco()  # before anything is run for it
        super().__init__(batches)
        self._post_process = post_process

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Return the predicted and the true boxes of one batch's images, and the sum of the loss over the images.

        Raises:
            ValueError: There are no labels, they are not a list of mappings with `class_labels` and `boxes`, or the
                model returns no loss.
        """
        labels = targets_of(batch)
        sizes = [_size(target, batch["pixel_values"], index) for index, target in enumerate(labels)]
        output = called(model, own_batch(batch, model))
        return {
            "found": [_finite(image) for image in self._post_process(output, sizes)],
            "there": [_there(target, size) for target, size in zip(labels, sizes, strict=True)],
            "loss": Output.read(output).own_loss() * len(labels),
            "images": len(labels),
            **_queries(output),
        }

    def combine(self, parts: Sequence[Any]) -> dict[str, float]:
        """Return the metrics over all images.

        Raises:
            ValueError: No image has a box, but for crowds.
        """
        found, there = ([image for part in parts for image in part[name]] for name in ("found", "there"))
        return {
            **average_precision(found, there),
            "loss": sum_of(parts, "loss") / sum_of(parts, "images"),
            **share_not_finite(sum_of(parts, "not_finite"), sum_of(parts, "queries")),
        }


def targets_of(batch: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the labels of a batch of images, one mapping for each.

    Raises:
        ValueError: There are none, or they are something else.
    """
    labels = batch.get("labels")
    if not isinstance(labels, (list, tuple)) or not all(
        isinstance(target, Mapping) and {"class_labels", "boxes"} <= set(target) for target in labels
    ):
        raise ValueError(
            f"labels: expected a list with a mapping of class_labels and boxes for each image, got "
            f"{type(labels).__name__}; let the model's image processor make them of annotations"
        )
    return labels


def _size(target: Mapping[str, Any], images: Any, index: int) -> tuple[int, int]:
    height, width = target["orig_size"] if "orig_size" in target else images[index].shape[-2:]
    return int(height), int(width)


def _there(target: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    boxes, labels = [target["boxes"]], [target["class_labels"]]
    crowds = [target["iscrowd"] if "iscrowd" in target else np.zeros(len(labels[0]))]
    if "crowd_boxes" in target:
        boxes.append(target["crowd_boxes"])
        labels.append(target["crowd_labels"])
        crowds.append(np.ones(len(labels[1])))
    corners = [_array(_corners(torch.as_tensor(part).float().reshape(-1, 4), size)) for part in boxes]
    return {
        "boxes": np.concatenate(corners),
        "labels": np.concatenate([_array(part) for part in labels]),
        "iscrowd": np.concatenate([_array(part) for part in crowds]),
    }


def _finite(image: Boxes) -> dict[str, Any]:
    """Return the boxes of an image that are any, in memory that other processes can be sent."""
    boxes = image["boxes"].isfinite().all(-1) & image["scores"].isfinite() & (image["scores"] > 0)
    return {name: _array(image[name][boxes]) for name in ("boxes", "scores", "labels")}


def _queries(output: Any) -> dict[str, int]:
    boxes, logits = getattr(output, "pred_boxes", None), getattr(output, "logits", None)
    if not isinstance(boxes, Tensor) or not isinstance(logits, Tensor):
        return {"not_finite": 0, "queries": 1}
    finite = boxes.isfinite().all(-1) & ~(logits.isnan() | logits.isposinf()).any(-1)
    return {"not_finite": int((~finite).sum()), "queries": finite.numel()}
