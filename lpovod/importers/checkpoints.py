"""Imports the original's detector and novel weights, and exports ours in its format.

The RPN's tensors are carried along unchanged, so an exported import is bit-identical.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpovod import __version__
from lpovod.artifacts import atomic, check_made_from, identity, read_tensors, sha256, write_tensors
from lpovod.config import BackboneSettings, BaseDetectorSettings, LinearProbeSettings
from lpovod.exceptions import LpovodError, some
from lpovod.formats.coco import CocoDataset, read_dataset
from lpovod.importers.openmmlab import CARRIED, NOVEL, original_name, read_checkpoint
from lpovod.networks.detector import Detector
from lpovod.progress import log


def import_base_detector(
    dataset: Path,
    checkpoint: Path,
    base: list[str],
    backbone: BackboneSettings,
    settings: BaseDetectorSettings,
    detector: Path,
    history: Path,
) -> None:
    """Write the original's detector as the artifact of stage `base_detector`.

    Args:
        dataset: json with all categories; orders the classes if the checkpoint does not list them.
        checkpoint: a base or a fine-tuned model; its novel weights are ignored.
        base: the base classes.
        backbone: size of the backbone.
        settings: size of the heads.
        detector: output, the weights.
        history: output, an empty file, because nothing was trained.

    Raises:
        LpovodError: naming every missing, unknown or misshapen tensor; if the classes do not fit.
    """
    state, meta = read_checkpoint(checkpoint)
    rows = _shape(state, "roi_head.prototype", checkpoint)[0]
    width = _shape(state, "roi_head.projection_for_image.weight", checkpoint)[0]
    with torch.device("meta"):
        model = Detector(backbone, settings, rows, width)
    expected = {original_name(name): tensor for name, tensor in model.state_dict().items()}
    carried = {k for k in state if k.startswith(CARRIED)}
    _check_fits(checkpoint, {k: v for k, v in state.items() if k != NOVEL}, expected, carried)
    classes = class_order(meta, read_dataset(dataset), base, rows, "base", checkpoint)
    tensors = {name: state[original_name(name)].numpy() for name in model.state_dict()}
    tensors |= {k: state[k].numpy() for k in carried}
    ident = identity("base_detector", settings, checkpoint=checkpoint)
    ident |= {"backbone": backbone.model_dump(mode="json"), "classes": classes}
    with atomic(history) as partial:
        partial.write_text("")
    write_tensors(detector, tensors, ident)
    log.info(f"{len(tensors)} tensors and {rows} base classes from {checkpoint}")


def import_linear_probe(
    dataset: Path,
    checkpoint: Path,
    detector: Path,
    novel: list[str],
    settings: LinearProbeSettings,
    output: Path,
) -> None:
    """Write a fine-tuned checkpoint's novel weights as the artifact of stage `linear_probe`.

    Args:
        dataset: json with all categories; orders the classes if the checkpoint does not list them.
        checkpoint: the fine-tuned model.
        detector: the base detector; the checkpoint must hold the same tensors.
        novel: the novel classes.
        settings: only recorded in the artifact's identity.
        output: {class name: (dimension,) float32}.

    Raises:
        LpovodError: if the checkpoint has no novel weights, they belong to another detector, or
            the classes do not fit.
    """
    state, meta = read_checkpoint(checkpoint)
    rows = _shape(state, NOVEL, checkpoint)[0]
    trained, _ = read_tensors(detector, "base_detector")
    for name, tensor in trained.items():
        imported = state.get(original_name(name))
        # Fine-tuning increments this counter, and nothing reads it.
        if name.endswith("num_batches_tracked"):
            continue
        if imported is None or not np.array_equal(tensor, imported.numpy()):
            raise LpovodError(
                f"the novel weights of {checkpoint} belong to another detector than {detector}: "
                f"{original_name(name)} differs. Import the detector from the same file "
                "(base_detector.checkpoint)"
            )
    classes = class_order(meta, read_dataset(dataset), novel, rows, "novel", checkpoint)
    weights = dict(zip(classes, state[NOVEL].numpy(), strict=True))
    write_tensors(output, weights, identity("linear_probe", settings, detector=sha256(detector)))
    log.info(f"{rows} novel classes from {checkpoint}")


def export_checkpoint(
    dataset: Path, detector: Path, output: Path, linear_probe: Path | None = None
) -> None:
    """Write detector and, if given, novel weights as a checkpoint that the original reads.

    Args:
        dataset: json with all categories; class rows are written in the order of their ids.
        detector: of stage `base_detector`.
        output: ``.pth`` with ``meta`` (CLASSES) and ``state_dict``.
        linear_probe: of stage `linear_probe`.

    Raises:
        LpovodError: if the probe belongs to another detector, or a class is not in `dataset`.
    """
    tensors, ident = read_tensors(detector, "base_detector")
    data = read_dataset(dataset)
    names = [data.categories[c]["name"] for c in sorted(data.categories)]
    data.category_ids(ident["classes"])
    rows = dict(zip(ident["classes"], tensors["prototypes"], strict=True))
    tensors["prototypes"] = np.stack([rows[n] for n in names if n in rows])
    state = OrderedDict((original_name(k), torch.from_numpy(v)) for k, v in tensors.items())
    if linear_probe is not None:
        novel, probe_ident = read_tensors(linear_probe, "linear_probe")
        check_made_from(linear_probe, probe_ident, "detector", detector)
        data.category_ids(list(novel))
        state[NOVEL] = torch.from_numpy(np.stack([novel[n] for n in names if n in novel]))
    meta = {"CLASSES": tuple(names), "lpovod_version": __version__}
    with atomic(output) as partial:
        torch.save({"meta": meta, "state_dict": state}, partial)
    log.info(f"{len(state)} tensors to {output}")


def class_order(
    meta: dict[str, Any],
    data: CocoDataset,
    names: list[str],
    rows: int,
    split: str,
    checkpoint: Path,
) -> list[str]:
    """The classes of a split in the order of their rows, which the original sorts by COCO id.

    Args:
        meta: of the checkpoint; its ``CLASSES`` are all names in that order.
        data: its categories are used if the checkpoint does not list the classes.
        names: the configured classes of the split.
        rows: number of rows in the checkpoint.
        split: base or novel, for the message.
        checkpoint: for the message.

    Raises:
        LpovodError: if a configured class is unknown, or their number is not that of the rows.
    """
    listed = list(
        meta.get("CLASSES") or [data.categories[c]["name"] for c in sorted(data.categories)]
    )
    unknown = [n for n in names if n not in listed]
    if unknown or len(names) != rows:
        fault = f"{unknown[0]!r} is none of its classes" if unknown else f"{len(names)} are listed"
        raise LpovodError(
            f"{checkpoint} has {rows} {split} classes and classes.{split} does not fit: {fault}. "
            "List the classes that it was trained with"
        )
    return [n for n in listed if n in set(names)]


def _shape(state: dict[str, Tensor], name: str, checkpoint: Path) -> tuple[int, ...]:
    if name not in state:
        raise LpovodError(f"{checkpoint} has no {name}: it is not a checkpoint of LP-OVOD")
    if state[name].ndim != 2:
        raise LpovodError(f"{checkpoint}: {name} is {tuple(state[name].shape)}, expected a matrix")
    return tuple(state[name].shape)


def _check_fits(
    checkpoint: Path, state: dict[str, Tensor], expected: dict[str, Tensor], carried: set[str]
) -> None:
    """Refuse missing tensors, unknown tensors, and tensors of another shape or dtype."""
    wrong = [
        f"{k} is {_shape_and_dtype(state[k])}, expected {_shape_and_dtype(expected[k])}"
        for k in expected.keys() & state.keys()
        if (state[k].shape, state[k].dtype) != (expected[k].shape, expected[k].dtype)
    ]
    problems = [
        f"{fault}: {some(sorted(names))}"
        for fault, names in (
            ("missing", expected.keys() - state.keys()),
            ("unknown", state.keys() - expected.keys() - carried),
            ("of another shape", wrong),
        )
        if names
    ]
    if problems:
        raise LpovodError(
            f"{checkpoint} does not fit the settings of backbone and base_detector; "
            + "; ".join(problems)
        )


def _shape_and_dtype(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
