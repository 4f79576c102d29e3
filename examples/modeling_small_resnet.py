"""ResNets for small images, after He et al. (2016), as models of Transformers.

The CIFAR shape of 6n + 2 layers (20, 32, 44, 56, 110): three stages of n basic blocks, 16, 32 and 64 channels wide,
with shortcuts that have no weights (option A). And 18, 34 and 101 layers as for ImageNet, in the shape that papers use
for CIFAR: a stem of 3 x 3 with stride 1 and no pooling, four stages, shortcuts that are projected.

    from modeling_small_resnet import SmallResNetConfig, SmallResNetForImageClassification
    model = SmallResNetForImageClassification(SmallResNetConfig(depth=20))

A model that was saved holds this file, and loads by `AutoModelForImageClassification.from_pretrained(folder,
trust_remote_code=True)`.

Pixels may come in two forms. As `uint8` from 0 to 255 they are normalised inside of the model, by mean and standard
deviation of its configuration: batches are a quarter of the size, and no program that feeds the model can forget it.
As floats they are what an image processor made of them, normalised already, which is what Transformers understands by
`pixel_values`. Both give the same numbers, so a folder with an image processor beside the model is measured alike by
this project's examples and by programs that know nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

IMAGENET_STAGES = {18: ("basic", (2, 2, 2, 2)), 34: ("basic", (3, 4, 6, 3)), 101: ("bottleneck", (3, 4, 23, 3))}


class SmallResNetConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """The shape of a ResNet for small images.

    Args:
        depth: How many layers: 18, 34, 101, or 6n + 2.
        num_channels: Of an image.
        image_mean: What is subtracted from pixels in [0, 1], a number a channel.
        image_std: What they are divided by then.
        **settings: As for any configuration, `num_labels` or `id2label` among them.

    Raises:
        ValueError: There is no such depth, or mean or deviation do not fit the channels.
    """

    model_type = "small_resnet"

    def __init__(
        self,
        depth: int = 20,
        num_channels: int = 3,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        **settings: Any,
    ) -> None:
        if depth not in IMAGENET_STAGES and (depth < 8 or depth % 6 != 2):
            known = ", ".join(map(str, IMAGENET_STAGES))
            raise ValueError(f"depth: expected {known}, or 6n + 2 such as 20 and 56, got {depth}; choose one of these")
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            if len(values) != num_channels:
                raise ValueError(
                    f"{name}: expected {num_channels} numbers, one a channel, got {len(values)}; give as many"
                )
        self.depth = depth
        self.num_channels = num_channels
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        super().__init__(**settings)

    @property
    def block(self) -> str:
        """The kind of blocks: "plain" without weights in shortcuts, "basic" or "bottleneck"."""
        return IMAGENET_STAGES[self.depth][0] if self.depth in IMAGENET_STAGES else "plain"

    @property
    def stages(self) -> tuple[int, ...]:
        """How many blocks each stage has."""
        return IMAGENET_STAGES[self.depth][1] if self.depth in IMAGENET_STAGES else ((self.depth - 2) // 6,) * 3

    @property
    def width(self) -> int:
        """How many channels the stem gives, and the first stage works on; each stage doubles it."""
        return 16 if self.block == "plain" else 64


class Normalization(nn.Module):
    """(x / 255 - mean) / std of pixels that are whole numbers; floats are normalised already, and stay."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: SmallResNetConfig) -> None:
        super().__init__()
        self.mean_values, self.std_values = config.image_mean, config.image_std
        # Constants of the configuration: not saved, so that weights trained elsewhere load as they are.
        for name, values in self.constants().items():
            self.register_buffer(name, values, persistent=False)

    def constants(self) -> dict[str, Tensor]:
        """Return mean and deviation in the shape that spreads over a batch."""
        numbers = {"mean": self.mean_values, "std": self.std_values}
        return {name: torch.tensor(values).view(1, -1, 1, 1) for name, values in numbers.items()}

    def forward(self, pixels: Tensor) -> Tensor:
        """Return pixels normalised."""
        if pixels.is_floating_point():
            return pixels
        return (pixels.float() / 255 - self.mean) / self.std


class BasicBlock(nn.Module):
    """Two convolutions of 3 x 3 beside a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = self.make_shortcut(inputs, width, stride)

    def make_shortcut(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        """Return what brings the block's input to the shape of its output."""
        if stride == 1 and inputs == outputs:
            return nn.Identity()
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what the next block gets."""
        inner = torch.relu(self.bn1(self.conv1(hidden)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.shortcut(hidden))


class PlainBlock(BasicBlock):
    """A basic block whose shortcut has no weights: every second pixel, and channels of zeros on both sides."""

    def make_shortcut(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        """Return what brings the block's input to the shape of its output."""
        return nn.Identity() if stride == 1 and inputs == outputs else ZeroPadding(outputs - inputs, stride)


class ZeroPadding(nn.Module):
    """Every `stride`-th pixel, with channels of zeros on both sides (option A)."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what is added to a wider block's output."""
        before = self.channels // 2
        chosen = hidden[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(chosen, (0, 0, 0, 0, before, self.channels - before))


class BottleneckBlock(nn.Module):
    """A convolution of 3 x 3 between two of 1 x 1, the last of which is four times as wide."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what the next block gets."""
        inner = torch.relu(self.bn1(self.conv1(hidden)))
        inner = torch.relu(self.bn2(self.conv2(inner)))
        return torch.relu(self.bn3(self.conv3(inner)) + self.shortcut(hidden))


BLOCKS: dict[str, type[BasicBlock | BottleneckBlock]] = {
    "plain": PlainBlock,
    "basic": BasicBlock,
    "bottleneck": BottleneckBlock,
}


class SmallResNetForImageClassification(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A ResNet for small images with a linear head: `layer1`, `layer2`, ... are its stages, `linear` is the head."""

    config_class = SmallResNetConfig
    base_model_prefix = "resnet"
    main_input_name = "pixel_values"

    def __init__(self, config: SmallResNetConfig) -> None:
        super().__init__(config)
        block, channels = BLOCKS[config.block], config.width
        self.normalization = Normalization(config)
        self.conv1 = nn.Conv2d(config.num_channels, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stage_names = []
        for stage, count in enumerate(config.stages):
            width = config.width * 2**stage
            blocks = []
            for index in range(count):
                blocks.append(block(channels, width, 2 if stage and not index else 1))
                channels = width * block.expansion
            self.stage_names.append(f"layer{stage + 1}")
            self.add_module(self.stage_names[-1], nn.Sequential(*blocks))
        self.linear = nn.Linear(channels, int(config.num_labels or 0))
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Return what gives the first floats, normalised pixels: there adversarial inputs are found."""
        return self.normalization

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Normalization):  # buffers that no file has
            for name, values in module.constants().items():
                getattr(module, name).copy_(values)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Return logits, of shape (images, classes), and with labels the mean cross-entropy as `loss`.

        Args:
            pixel_values: Of shape (images, channels, height, width): `uint8` from 0 to 255, or normalised floats.
            labels: A class for each image.
            return_dict: False for a tuple.
        """
        hidden = self.normalization(pixel_values).to(self.conv1.weight.dtype)
        hidden = torch.relu(self.bn1(self.conv1(hidden)))
        for name in self.stage_names:
            hidden = self.get_submodule(name)(hidden)
        logits = self.linear(hidden.mean((2, 3)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(SmallResNetConfig.model_type, SmallResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(SmallResNetConfig, SmallResNetForImageClassification, exist_ok=True)
SmallResNetConfig.register_for_auto_class()  # type: ignore[no-untyped-call]
SmallResNetForImageClassification.register_for_auto_class(  # type: ignore[no-untyped-call]
    "AutoModelForImageClassification"
)
