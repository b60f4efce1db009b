"""Backbones and feature pyramid, shared by the proposal network and the detector.

Parameter names of `resnet50` and of the pyramid are those of OpenMMLab's checkpoints, so that their
files load key by key.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lpovod.config import TIMM, BackboneSettings
from lpovod.distributed import BatchNorm2d
from lpovod.views import Normalisation

STRIDES = (4, 8, 16, 32, 64)
"""Of the pyramid's levels P2 ... P6."""


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1; the stride is on the first (caffe style)."""

    expansion = 4
    stride_on_first = True

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        first, second = (stride, 1) if self.stride_on_first else (1, stride)
        self.conv1 = nn.Conv2d(inputs, width, 1, first, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, second, 1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = BatchNorm2d(4 * width)
        self.downsample = _shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        return functional.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class TorchvisionBottleneck(Bottleneck):
    """The same with the stride on the 3 x 3 convolution, as torchvision's weights need it."""

    stride_on_first = False


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), BatchNorm2d(outputs))


class ResNet(nn.Module):
    """Feature maps C2 ... C5 at strides 4 ... 32.

    Attributes:
        outputs: channels of C2 ... C5.
        normalisation: of the images.
    """

    normalisation = Normalisation()

    def __init__(self, architecture: str):
        super().__init__()
        if architecture.startswith("resnet50"):
            block = Bottleneck if architecture == "resnet50" else TorchvisionBottleneck
            stem, widths, depths = 64, (64, 128, 256, 512), (3, 4, 6, 3)
            self.conv1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
            self.pool, first_stride = nn.MaxPool2d(3, 2, 1), 1
        else:
            block, stem, widths, depths = BasicBlock, 32, (48, 96, 160, 224), (1, 1, 1, 1)
            self.conv1 = nn.Conv2d(3, stem, 3, 2, 1, bias=False)
            self.pool, first_stride = nn.Identity(), 2
        self.bn1 = BatchNorm2d(stem)
        self.outputs = [block.expansion * width for width in widths]
        inputs = stem
        for number, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
            stride = first_stride if number == 1 else 2
            blocks = []
            for _ in range(depth):
                blocks.append(block(inputs, width, stride))
                inputs, stride = block.expansion * width, 1
            self.add_module(f"layer{number}", nn.Sequential(*blocks))

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.pool(functional.relu(self.bn1(self.conv1(images))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


class ConvNorm(nn.Module):
    """Convolution without bias and batch norm, named as in OpenMMLab's ConvModule."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class FeaturePyramid(nn.Module):
    """P2 ... P6 from C2 ... C5: norms on lateral and output convolutions, no activation."""

    def __init__(self, inputs: list[int], channels: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvNorm(i, channels, 1) for i in inputs)
        self.fpn_convs = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in inputs)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        merged = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for level in (2, 1, 0):
            size = merged[level].shape[-2:]
            merged[level] = merged[level] + functional.interpolate(merged[level + 1], size=size)
        pyramid = [conv(x) for conv, x in zip(self.fpn_convs, merged, strict=True)]
        return [*pyramid, functional.max_pool2d(pyramid[-1], 1, stride=2)]


def build_backbone(settings: BackboneSettings) -> tuple[nn.Module, FeaturePyramid]:
    """The two halves, freshly initialised; the first has `outputs` and `normalisation`.

    Raises:
        LpovodError: if timm has no such backbone.
    """
    if settings.architecture.startswith(TIMM):
        # timm is imported where it is needed; its models are initialised as it sees fit.
        from lpovod.networks.timm_backbone import TimmBackbone

        backbone: nn.Module = TimmBackbone(settings.architecture)
        drawn = []
    else:
        backbone = ResNet(settings.architecture)
        drawn = list(backbone.modules())
    pyramid = FeaturePyramid(backbone.outputs, settings.channels)
    for module in (*drawn, *pyramid.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone, pyramid


def freeze_statistics(module: nn.Module) -> None:
    """Batch norms use their running statistics in training too; their affine part stays trained."""
    for norm in module.modules():
        if isinstance(norm, BatchNorm2d):
            norm.eval()


def level_of(boxes: Tensor, finest_scale: float, levels: int = 4) -> Tensor:
    """Pyramid level (0 is P2) that a box is pooled from, by its size.

    Args:
        boxes: (n, 4) xyxy in pixels of the network's input.
        finest_scale: boxes with sides below twice this are pooled from P2.
    """
    size = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
    return torch.floor(torch.log2(size / finest_scale + 1e-6)).clamp(0, levels - 1).long()
