"""Faster R-CNN with a feature pyramid on a ResNet (torchvision's), as a model of Transformers.

    config = FasterRCNNConfig(backbone="resnet50", num_labels=3)
    model = FasterRCNNForObjectDetection(config)

Images and targets are those of DETR: `pixel_values`, and for each image a mapping of `class_labels` (n,) and `boxes`
(n, 4), center and size as shares of the image's. So image processors of DETR prepare its inputs and read its outputs.
A saved folder carries this file, and loads with `trust_remote_code=True`. It needs torchvision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForObjectDetection, PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

try:
    from torchvision.models import resnet
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.image_list import ImageList
except (ImportError, RuntimeError) as error:  # RuntimeError where it was built for another version of PyTorch
    _MISSING: Exception | None = error
else:
    _MISSING = None

_SEED_OF_EVALUATION = 0
_NORMS = {"batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, 32)}


class FasterRCNNConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """What a Faster R-CNN is made of.

    Args:
        backbone: A ResNet of torchvision: "resnet18", "resnet50", "resnet101", "resnext50_32x4d", ...
        norm: Of the backbone: "batch", or "group" for groups of 32 channels, where a batch is a few images.
        fpn_channels: Channels of the feature pyramid.
        representation_size: Width of the two layers that see a proposal.
        anchor_sizes: Side of the anchors in pixels, one for each of the five levels of the pyramid.
        aspect_ratios: Their height over width.
        proposals: How many proposals of an image are classified.
        sampled_proposals: How many of them the loss is over, in training.
        detections: How many boxes are predicted at most.
        score_threshold: Boxes with a lower score are none.
        nms_threshold: Of two boxes of one class that overlap more, the one with the lower score is none.
        image_mean: Subtracted from images that come as bytes, divided by 255.
        image_std: And what they are divided by then.
        **kwargs: As of every configuration: `num_labels`, `id2label`, ...
    """

    model_type = "faster_rcnn"

    def __init__(
        self,
        backbone: str = "resnet50",
        norm: str = "batch",
        fpn_channels: int = 256,
        representation_size: int = 1024,
        anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        proposals: int = 1000,
        sampled_proposals: int = 512,
        detections: int = 100,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        **kwargs: Any,
    ) -> None:
        self.backbone, self.norm, self.fpn_channels = backbone, norm, fpn_channels
        self.representation_size = representation_size
        self.anchor_sizes, self.aspect_ratios = list(anchor_sizes), list(aspect_ratios)
        self.proposals, self.sampled_proposals, self.detections = proposals, sampled_proposals, detections
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        super().__init__(**kwargs)


@dataclass
class FasterRCNNOutput(ModelOutput):
    """What the model returns.

    Attributes:
        loss: The sum of the losses; None without labels.
        loss_dict: The four losses by name: of anchors (`loss_objectness`, `loss_rpn_box_reg`) and of proposals
            (`loss_classifier`, `loss_box_reg`).
        logits: (B, detections, C + 1), in evaluation mode: logarithms of the score s of the predicted class and of
            1 − s, "no object", the last one; −∞ for all other classes. So `softmax` gives the scores, as for DETR.
        pred_boxes: (B, detections, 4), in evaluation mode: center and size as shares of the image's.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None


class FasterRCNNForObjectDetection(PreTrainedModel):
    """Faster R-CNN: a network proposes boxes, and a second one says what they show and where exactly.

    In training mode it returns the loss. In evaluation mode it returns predictions, and the loss as well where there
    are labels, since corruptions along the gradient of an evaluated model need one. torchvision has losses in training
    mode alone; here only the proposer and the heads are told to compute theirs, on the features of a backbone that
    stays in evaluation mode: BatchNorm, which the heads have none of, uses its running statistics and leaves them.

    The loss is over a sample of anchors and proposals. In training mode it is drawn from PyTorch's generator; in
    evaluation mode from a fixed seed, so that equal weights have equal losses, and the generator is left as it was.
    """

    config_class = FasterRCNNConfig
    main_input_name = "pixel_values"

    def __init__(self, config: FasterRCNNConfig) -> None:
        if _MISSING is not None:
            raise ImportError(
                f"FasterRCNNForObjectDetection: expected torchvision to be installed, got {_MISSING!r}; install the "
                "version that belongs to your PyTorch: pip install torchvision, or train a detector of Transformers"
            ) from _MISSING
        super().__init__(config)
        build = getattr(resnet, config.backbone, None)
        if build is None or config.norm not in _NORMS:
            known = [name for name in resnet.__all__ if name.islower()]
            raise ValueError(
                f"config: expected a backbone of {', '.join(known)} and a norm of {', '.join(_NORMS)}, got "
                f"{config.backbone!r} and {config.norm!r}; name one of each"
            )
        body = build(weights=None, norm_layer=_NORMS[config.norm])
        widths = [body.inplanes // 8 * 2**level for level in range(4)]
        levels = {f"layer{level + 1}": str(level) for level in range(4)}
        classes = len(config.id2label or ()) + 1  # 0 is the background
        detector = FasterRCNN(
            BackboneWithFPN(body, levels, widths, config.fpn_channels),
            rpn_anchor_generator=AnchorGenerator(
                tuple((size,) for size in config.anchor_sizes), (tuple(config.aspect_ratios),) * 5
            ),
            rpn_post_nms_top_n_train=config.proposals,
            rpn_post_nms_top_n_test=config.proposals,
            box_head=TwoMLPHead(config.fpn_channels * 7**2, config.representation_size),
            box_predictor=FastRCNNPredictor(config.representation_size, classes),
            box_batch_size_per_image=config.sampled_proposals,
            box_detections_per_img=config.detections,
            box_score_thresh=config.score_threshold,
            box_nms_thresh=config.nms_threshold,
        )
        # Without its resizing of images: that is the image processor's.
        self.backbone, self.rpn, self.roi_heads = detector.backbone, detector.rpn, detector.roi_heads
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Begin as torchvision does; Transformers would begin with its own, which is for Transformers."""
        if isinstance(module, nn.Conv2d):
            if module.bias is None:  # of the ResNet
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                return
            if any(module is layer for layer in self.rpn.modules()):
                nn.init.normal_(module.weight, std=0.01)
            else:  # of the pyramid
                nn.init.kaiming_uniform_(module.weight, a=1)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.BatchNorm2d, nn.GroupNorm)):
            module.reset_parameters()

    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        pixel_mask: Tensor | None = None,
        labels: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> FasterRCNNOutput:
        """Return the loss in training mode, predictions, and the loss if there are labels, in evaluation mode.

        Args:
            pixel_values: (B, 3, H, W), or a list of images of different sizes; bytes, or numbers that are normalised
                already.
            pixel_mask: (B, H, W), 1 where a padded batch has an image. Default: everywhere.
            labels: `class_labels` and `boxes` of each image. Boxes are shares of the size of the image, with a padded
                batch of H and W: as image processors make them.

        Raises:
            ValueError: There are no labels in training mode, not one for each image, or a box has no area.
        """
        images, frames = self._prepared(pixel_values, pixel_mask)
        targets = None if labels is None else self._targets(labels, frames)
        features = self.backbone(images.tensors)
        if self.training:
            if targets is None:
                raise ValueError("labels: expected class_labels and boxes of each image in training, got none")
            losses = self._losses(images, features, targets)
            return FasterRCNNOutput(sum(losses.values()), losses)  # type: ignore[arg-type]
        proposals, _ = self.rpn(images, features)
        detections, _ = self.roi_heads(features, proposals, images.image_sizes)
        logits, boxes = self._as_detr(detections, frames)
        if targets is None:
            return FasterRCNNOutput(logits=logits, pred_boxes=boxes)
        with _computing_losses(self.rpn, self.roi_heads), _fixed_seed(images.tensors.device):
            losses = self._losses(images, features, targets)
        return FasterRCNNOutput(sum(losses.values()), losses, logits, boxes)  # type: ignore[arg-type]

    def _losses(self, images: Any, features: Any, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        proposals, of_anchors = self.rpn(images, features, targets)
        _, of_proposals = self.roi_heads(features, proposals, images.image_sizes, targets)
        return {**of_anchors, **of_proposals}

    def _prepared(
        self, pixel_values: Tensor | Sequence[Tensor], pixel_mask: Tensor | None
    ) -> tuple[Any, list[tuple[int, int]]]:
        """Return images as torchvision takes them, and height and width of what boxes are shares of."""
        if isinstance(pixel_values, Tensor):
            tensors, frames = self._normalised(pixel_values), [_size(pixel_values)] * len(pixel_values)
            sizes = frames
            if pixel_mask is not None:
                heights, widths = pixel_mask.any(2).sum(1).tolist(), pixel_mask.any(1).sum(1).tolist()
                sizes = list(zip(heights, widths, strict=True))
            return ImageList(tensors, sizes), frames
        images = [self._normalised(image) for image in pixel_values]
        frames = [_size(image) for image in images]
        height, width = (-(-max(sides) // 32) * 32 for sides in zip(*frames, strict=True))
        tensors = images[0].new_zeros(len(images), 3, height, width)
        for place, image in enumerate(images):
            tensors[place, :, : image.shape[-2], : image.shape[-1]] = image
        return ImageList(tensors, frames), frames

    def _normalised(self, images: Tensor) -> Tensor:
        if images.is_floating_point():
            return images.to(self.dtype)
        mean, std = (
            torch.tensor(values, dtype=self.dtype, device=images.device)[:, None, None]
            for values in (self.config.image_mean, self.config.image_std)
        )
        return (images.to(self.dtype) / 255 - mean) / std

    def _targets(
        self, labels: Sequence[Mapping[str, Tensor]], frames: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Return targets as torchvision takes them: corners in pixels, and classes from 1 on."""
        if len(labels) != len(frames):
            raise ValueError(f"labels: expected one mapping for each of {len(frames)} images, got {len(labels)}")
        targets = []
        for index, (target, (height, width)) in enumerate(zip(labels, frames, strict=True)):
            boxes = target["boxes"].to(self.device, torch.float32).reshape(-1, 4)
            if bool((~(boxes[:, 2:] > 0)).any()):
                raise ValueError(
                    f"labels: expected boxes (center x, center y, width, height) with width and height > 0, got "
                    f"{boxes.tolist()} for image {index}; leave out boxes without area"
                )
            scale = boxes.new_tensor([width, height, width, height])
            center, half = boxes[:, :2], boxes[:, 2:] / 2
            corners = torch.cat([center - half, center + half], -1) * scale
            targets.append({"boxes": corners, "labels": target["class_labels"].to(self.device) + 1})
        return targets

    def _as_detr(
        self, detections: Sequence[Mapping[str, Tensor]], frames: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Return detections as `logits` and `pred_boxes`."""
        classes, most = len(self.config.id2label or ()), self.config.detections
        first = detections[0]["boxes"]
        logits = first.new_full((len(detections), most, classes + 1), -torch.inf)
        logits[..., -1] = 0
        boxes = first.new_zeros(len(detections), most, 4)
        for place, (found, (height, width)) in enumerate(zip(detections, frames, strict=True)):
            scores, corners = found["scores"], found["boxes"] / first.new_tensor([width, height, width, height])
            queries = torch.arange(len(scores), device=scores.device)
            logits[place, queries, -1] = torch.log1p(-scores)
            logits[place, queries, found["labels"] - 1] = scores.log()
            boxes[place, queries] = torch.cat(
                [(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], -1
            )
        return logits, boxes


def _size(image: Tensor) -> tuple[int, int]:
    height, width = image.shape[-2:]
    return height, width


@contextmanager
def _computing_losses(*modules: nn.Module) -> Iterator[None]:
    """Tell these modules, and none inside of them, that they are trained."""
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = False


@contextmanager
def _fixed_seed(device: torch.device) -> Iterator[None]:
    """Draw from generators with a fixed seed, and put them back."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(_SEED_OF_EVALUATION)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(_SEED_OF_EVALUATION)
        yield


AutoConfig.register(FasterRCNNConfig.model_type, FasterRCNNConfig, exist_ok=True)
AutoModelForObjectDetection.register(FasterRCNNConfig, FasterRCNNForObjectDetection, exist_ok=True)
FasterRCNNConfig.register_for_auto_class()  # type: ignore[no-untyped-call]
FasterRCNNForObjectDetection.register_for_auto_class("AutoModelForObjectDetection")  # type: ignore[no-untyped-call]
