"""A model as ONNX graphs, which run without torch and without this library (docs/onnx.md).

* ``image.onnx``: the regions of an image: boxes, objectness, features, embeddings;
* ``vocabulary.onnx``: their scores for classes, whose rows (``vocabulary.npz``) are inputs;
* ``detections.onnx``: a threshold, NMS within each class, the best of an image;
* ``card.json``: preprocessing, settings, classes and origin.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import nms

from lpovod.artifacts import atomic, write_json
from lpovod.boxes import decode
from lpovod.config import BackboneSettings, ProposalsSettings
from lpovod.exceptions import LpovodError, existing
from lpovod.formats.model import ModelFile, read_model
from lpovod.model import Vocabulary, build_networks
from lpovod.networks.detector import Detector
from lpovod.networks.proposal_network import ProposalNetwork
from lpovod.progress import log
from lpovod.views import PAD_TO, Normalisation

try:
    import onnx
    from onnx import ModelProto, compose, inliner
    from onnxscript import opset18 as op

    from lpovod.apps import onnx_scripts
except ImportError:
    raise LpovodError('ONNX is not installed: pip install -e ".[onnx]"') from None

GRAPHS = ("image.onnx", "vocabulary.onnx", "detections.onnx")
CARD, VOCABULARY = "card.json", "vocabulary.npz"
OPSET = 18
OUTPUTS = {
    "proposals": ("regions", 4),
    "boxes": ("regions", 4),
    "objectness": ("regions",),
    "feature": ("regions", "dimension"),
    "embedding": ("regions", "clip_dimension"),
}
"""Of ``image.onnx``, with their axes."""


def export_onnx(model_path: Path, folder: Path) -> None:
    """Write a model's graphs, the rows of its vocabulary, and a card.

    Args:
        model_path: the model file.
        folder: where to write; files of an earlier export are replaced.

    Raises:
        LpovodError: if the model cannot be read, or torch cannot export its backbone.
    """
    content = read_model(existing(model_path))
    networks = ImageNetworks(*build_networks(content, model_path), content.config.proposals)
    card = describe_model(content, networks.normalisation)
    graphs = (
        image_graph(networks, content.config.backbone),
        onnx_scripts.score_classes.to_model_proto(),
        onnx_scripts.best_detections.to_model_proto(),
    )
    for name, graph in zip(GRAPHS, graphs, strict=True):
        write_graph(folder / name, graph, card)
    inputs: dict[str, Any] = vocabulary_inputs(content)
    with atomic(folder / VOCABULARY) as partial, open(partial, "wb") as file:
        np.savez(file, **inputs)
    write_json(folder / CARD, card)
    megabytes = sum((folder / name).stat().st_size for name in GRAPHS) / 1e6
    log.info(f"{folder}: {', '.join(GRAPHS)} ({megabytes:.1f} MB), {VOCABULARY}, {CARD}")


def vocabulary_inputs(content: ModelFile) -> dict[str, np.ndarray]:
    """Inputs of the small graphs: a row for each class, and the run's settings; names and ids."""
    settings = content.config.evaluation
    words = Vocabulary(content, {})
    return {
        "names": np.array(words.names),
        "category_ids": np.array(words.ids, np.int64),
        "weights": words.weights.weights.numpy(),
        "text": words.weights.text.numpy(),
        "probe_weights": np.array(words.probe_weights, np.float32),
        "temperature": np.array(content.temperature, np.float32),
        "score_threshold": np.array(settings.score_threshold, np.float32),
        "nms": np.array(settings.nms, np.float32),
        "per_image": np.array(settings.per_image, np.int64),
    }


def describe_model(content: ModelFile, normalisation: Normalisation) -> dict[str, Any]:
    """The card: what a user of the graphs must know, as json."""
    config = content.config
    return {
        "run": config.name,
        "identity": content.identity,
        "preprocessing": {
            "image": "uint8 (height, width, 3) RGB, turned as EXIF says; the graph does the rest",
            "short_side": config.backbone.short_side,
            "long_side": config.backbone.long_side,
            "resize": "bilinear, as OpenCV resizes bytes",
            "mean": list(normalisation.mean),
            "std": list(normalisation.std),
            "pad_to": PAD_TO,
        },
        "boxes": "xyxy in pixels of the image",
        "proposals": config.proposals.model_dump(include={"per_level", "nms", "per_image"}),
        "evaluation": config.evaluation.model_dump(
            include={"alpha", "beta", "score_threshold", "nms", "per_image"}
        ),
        "temperature": content.temperature,
        "classes": [
            {
                "name": c.name,
                "split": c.split,
                "category_id": c.category_id,
                "prompt": c.prompt,
            }
            for c in content.classes
        ],
    }


class ImageNetworks(nn.Module):
    """Both networks, one after the other as in `Model.describe`, for one image.

    Args:
        network: in evaluation mode.
        detector: in evaluation mode.
        settings: numbers of boxes and NMS.
    """

    def __init__(
        self, network: ProposalNetwork, detector: Detector, settings: ProposalsSettings
    ) -> None:
        super().__init__()
        self.network, self.detector, self.settings = network, detector, settings
        self.eval()

    @property
    def normalisation(self) -> Normalisation:
        """Of the images."""
        return self.network.backbone.normalisation

    def forward(
        self, zero_padded: Tensor, black_padded: Tensor, scale: Tensor, size: Tensor, shown: Tensor
    ) -> tuple[Tensor, ...]:
        """What ``image.onnx`` gives.

        Args:
            zero_padded: (1, 3, H, W) as the proposal network sees the image.
            black_padded: (1, 3, H, W) as the detector sees it.
            scale: (2,) resized width and height over the image's.
            size: (2,) width and height of the image.
            shown: (2,) resized width and height, without padding.
        """
        scale = scale.repeat(2)
        boxes, objectness = self.propose(zero_padded, scale, size)
        resized = clip_boxes(boxes * scale, shown)
        pooled = self.detector.pool(self.detector.pyramid(black_padded), [resized])
        outputs = self.detector.extract(pooled)
        refined = clip_boxes(decode(resized, outputs.deltas) / scale, size)
        return boxes, refined, objectness, outputs.feature.half(), outputs.embedding.half()

    def propose(self, images: Tensor, scale: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """`proposal_inference.find_proposals`, where no number is taken out of a tensor."""
        boxes, logits = [], []
        for _, of_level, level_logits in self.network(images):
            count = torch.sym_min(self.settings.per_level, level_logits.shape[1])
            top = level_logits[0].topk(count).indices
            boxes.append(of_level[0, top])
            logits.append(level_logits[0, top])
        box, score = clip_boxes(torch.cat(boxes) / scale, size), torch.cat(logits).sigmoid()
        solid = ((box[:, 2:] - box[:, :2]) >= 1).all(dim=1).nonzero().flatten()
        box, score = box[solid], score[solid]
        best = nms(box, score, self.settings.nms)[: self.settings.per_image]
        return box[best], score[best]


def clip_boxes(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes (n, 4), cut to a width and height (2,) that are not known when a graph is made."""
    return torch.minimum(boxes.clamp(min=0), size.repeat(2))


def image_graph(networks: ImageNetworks, backbone: BackboneSettings) -> ModelProto:
    """The graph from an image to its regions.

    Raises:
        LpovodError: if torch cannot export the backbone.
    """
    before = onnx_scripts.preparation(backbone, networks.normalisation)
    before = inliner.inline_local_functions(before)
    after = _export_networks(networks, backbone.architecture)
    after = compose.add_prefix(after, "networks/", rename_outputs=False)
    before.ir_version = after.ir_version
    joints = [(name, f"networks/{name}") for name in onnx_scripts.PREPARED]
    merged = compose.merge_models(before, after, io_map=joints)
    del merged.graph.value_info[:]  # some of no type, and the library computes all of them itself
    return merged


def _export_networks(networks: ImageNetworks, architecture: str) -> ModelProto:
    # A side of its own for each axis, and a tensor of its own for each input: torch takes equal
    # sides, or one tensor given twice, for the same thing.
    images = [torch.zeros(1, 3, 3 * PAD_TO, 5 * PAD_TO) for _ in range(2)]
    vectors = [torch.ones(2) for _ in range(3)]
    height, width = (torch.export.Dim(side, min=1, max=1024) for side in ("tall", "wide"))
    sides = {2: PAD_TO * height, 3: PAD_TO * width}
    try:
        with torch.no_grad(), _quiet():
            # Strict, because Python's len() of a tensor is a constant otherwise.
            exported = torch.export.export(
                networks,
                (*images, *vectors),
                dynamic_shapes=(sides, sides, None, None, None),
                strict=True,
            )
            program = torch.onnx.export(
                exported,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(onnx_scripts.PREPARED),
                output_names=list(OUTPUTS),
                custom_translation_table={
                    torch.ops.aten.embedding_bag.padding_idx: weighted_sums,
                },
            )
    except Exception as error:  # each of torch's steps has its own way to refuse
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LpovodError(
            f"torch cannot export a model with the backbone {architecture} to ONNX: {reason}"
        ) from error
    assert program is not None
    graph = program.model_proto
    _forget_source(graph)
    return graph


def weighted_sums(
    table: Any, rows: Any, starts: Any, scale: bool, mode: int, sparse: bool, weights: Any, *_: Any
) -> Any:
    """`embedding_bag` of four rows each, as pooling uses it; torch's translation is a slow loop."""
    weighted = op.Mul(op.Gather(table, rows, axis=0), op.Unsqueeze(weights, integers(1)))
    shape = op.Concat(integers(-1, 4), op.Shape(table, start=1), axis=0)
    sums = op.ReduceSum(op.Reshape(weighted, shape), integers(1), keepdims=0)
    return sums, starts, starts, starts


def integers(*values: int) -> Any:
    """A constant vector of int64."""
    return op.Constant(value_ints=values)


def write_graph(path: Path, graph: ModelProto, card: dict[str, Any]) -> None:
    """Check a graph and write it, with the card in its metadata."""
    graph.producer_name, graph.producer_version = "lpovod", card["identity"]["version"]
    onnx.helper.set_model_props(graph, {"card": json.dumps(card, sort_keys=True)})
    onnx.checker.check_model(graph, full_check=True)
    with atomic(path) as partial:
        partial.write_bytes(graph.SerializeToString(deterministic=True))


def _forget_source(model: ModelProto) -> None:
    """Remove where each node was traced, with folders of this computer, and name the axes."""
    graph = model.graph
    del graph.value_info[:], graph.metadata_props[:], model.metadata_props[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    for output in graph.output:
        for axis, size in zip(output.type.tensor_type.shape.dim, OUTPUTS[output.name], strict=True):
            if axis.dim_param:
                axis.dim_param = str(size)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress and the warnings of torch's exporter."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "torch")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
