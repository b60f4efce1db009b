"""The trained detector on images: loading it, and its boxes in pixels of the original image."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lpovod.artifacts import Identity, read_tensors
from lpovod.boxes import decode
from lpovod.config import BackboneSettings, BaseDetectorSettings
from lpovod.exceptions import LpovodError
from lpovod.networks.detector import Detector
from lpovod.precision import computing_in
from lpovod.torchvision_ops import clip_boxes_to_image
from lpovod.transfers import fetch, send, send_all
from lpovod.views import HeightWidth, LoadedView, batch


def refine(boxes: Tensor, deltas: Tensor, scale: Tensor, size: HeightWidth) -> Tensor:
    """Refined boxes in pixels of the original image.

    Args:
        boxes: (n, 4) in pixels of the network's input.
        deltas: (n, 4).
        scale: (2,) resized over original width and height.
        size: height and width of the original image.
    """
    return clip_boxes_to_image(decode(boxes, deltas) / send(scale, boxes.device).repeat(2), size)


@torch.inference_mode()
def describe_regions(
    model: Detector,
    views: list[LoadedView],
    regions: list[tuple[np.ndarray, np.ndarray]],
    sizes: list[HeightWidth],
    batch_size: int,
    device: str,
    precision: str = "float32",
) -> list[dict[str, np.ndarray]]:
    """What the frozen detector says of regions of images whose padded views have one size.

    Args:
        model: the detector, on the device.
        views: of the images, at most `batch_size`.
        regions: of each image: boxes (n, 4) xyxy in its own pixels, and objectness (n,).
        sizes: height and width of each original image.
        batch_size: images per pass of the backbone.
        device: where the model is.
        precision: of backbone and heads (`lpovod.precision`); pooling and boxes are float32.

    Returns:
        For each image the arrays of `lpovod.formats.image_features`.
    """
    # The bits of a convolution or a matrix product depend on its size. So that an image's features
    # do not depend on the images beside it, batches are full, and heads see one image at a time.
    normalisation = model.backbone.normalisation
    images = batch(views, device, normalisation, pad_with_black=True, at_least=batch_size)
    counts = [len(box) for box, _ in regions]
    pairs = zip(views, regions, strict=True)
    boxes = [view.to_view(of_image) for view, (of_image, _) in pairs]
    with computing_in(precision, device):
        pyramid = model.pyramid(images)
    pooled = model.pool(pyramid, boxes).split(counts)
    with computing_in(precision, device):
        outputs = [model.extract(of_image) for of_image in pooled]
    refined = [
        refine(of_image, of_heads.deltas, view.scale, size)
        for of_image, of_heads, view, size in zip(
            send_all(boxes, device), outputs, views, sizes, strict=True
        )
    ]
    features = [of_heads.feature.half() for of_heads in outputs]
    embeddings = [of_heads.embedding.half() for of_heads in outputs]
    # The host waits for the device here, once all images are on their way.
    fetched = iter(part.numpy() for part in fetch([*refined, *features, *embeddings]))
    described = [{"box": box, "objectness": objectness} for box, objectness in regions]
    for name in ("refined", "feature", "embedding"):
        for of_image in described:
            of_image[name] = next(fetched)
    return described


def load_detector(
    path: Path, backbone: BackboneSettings, settings: BaseDetectorSettings
) -> tuple[Detector, Identity]:
    """The trained base detector, in evaluation mode, and its identity (with its ``classes``).

    Raises:
        LpovodError: if the file does not fit the settings.
    """
    tensors, ident = read_tensors(path, "base_detector")
    return build_detector(tensors, ident["classes"], backbone, settings, path), ident


def build_detector(
    tensors: dict[str, np.ndarray],
    classes: list[str],
    backbone: BackboneSettings,
    settings: BaseDetectorSettings,
    path: Path,
) -> Detector:
    """A detector with trained weights, in evaluation mode.

    Args:
        tensors: the weights by name.
        classes: the base classes.
        backbone: as the detector was trained with.
        settings: as the detector was trained with.
        path: of the file that holds the weights, for the message.

    Raises:
        LpovodError: if the weights do not fit the settings.
    """
    embedding = tensors["clip_projection.weight"].shape[0]
    model = Detector(backbone, settings, len(classes), embedding)
    own = model.state_dict().keys()
    # An imported detector carries its RPN along, which nothing here needs.
    kept = {k: v for k, v in tensors.items() if k in own or not k.startswith("rpn_head.")}
    try:
        model.load_state_dict({k: torch.from_numpy(v) for k, v in kept.items()})
    except RuntimeError as error:
        raise LpovodError(
            f"{path} does not fit the settings of backbone and base_detector: {error}"
        ) from None
    # Saves a fifth of the time on a CPU.
    return model.eval().to(memory_format=torch.channels_last)
