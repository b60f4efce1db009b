"""Text embeddings of classes: a unit vector for each class name, keyed by the name."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lpovod.artifacts import read_tensors
from lpovod.config import ClipSettings, EvaluationSettings
from lpovod.exceptions import LpovodError

STAGE = "text_embeddings"


@dataclass(frozen=True)
class ClassEmbeddings:
    """Text embeddings of several classes, made with one CLIP model and one set of templates.

    Attributes:
        names: of the n classes.
        vectors: (n, D) float32, unit rows.
        logit_scale: CLIP's trained factor: its softmax is over logit_scale * cosine; None for rows
            imported without a CLIP.
        clip_weights: digest of the CLIP weights, or "none".
        clip_architecture: name of the CLIP architecture, or the digest of its json file.
    """

    names: list[str]
    vectors: np.ndarray
    logit_scale: float | None
    clip_weights: str
    clip_architecture: str


def clip_architecture(settings: ClipSettings) -> Path | str:
    """The architecture as an input of an identity: a json file, or open_clip's name."""
    architecture = settings.architecture
    return Path(architecture) if architecture.endswith(".json") else architecture


def read_text_embeddings(paths: Path | Iterable[Path]) -> ClassEmbeddings:
    """Read one file or merge several.

    Raises:
        LpovodError: naming the file, if two files were made with different CLIP weights or
            templates, if both have the same class, or if a vector does not have unit length.
    """
    paths = [Path(paths)] if isinstance(paths, str | Path) else [Path(p) for p in paths]
    if not paths:
        raise LpovodError("no file of text embeddings was given")
    vectors: dict[str, np.ndarray] = {}
    source: dict[str, Path] = {}
    idents = []
    for path in paths:
        tensors, ident = read_tensors(path, STAGE)
        idents.append(ident)
        _check_same_model(path, ident, paths[0], idents[0])
        for name, vector in sorted(tensors.items()):
            if name in source:
                raise LpovodError(f"class {name!r} is both in {source[name]} and in {path}")
            _check_unit(path, name, vector)
            vectors[name], source[name] = vector, path
    inputs = idents[0]["inputs"]
    return ClassEmbeddings(
        names=list(vectors),
        vectors=np.stack(list(vectors.values())),
        logit_scale=idents[0]["logit_scale"],
        clip_weights=inputs["clip_weights"],
        clip_architecture=inputs["clip_architecture"],
    )


def temperature_of(text: ClassEmbeddings, path: Path, settings: EvaluationSettings) -> float:
    """Temperature of the softmax over cosines: the configured one, or CLIP's.

    Args:
        text: the embeddings.
        path: their file, for the message.
        settings: of stage `evaluation`.

    Raises:
        LpovodError: if there is neither.
    """
    if settings.temperature is not None:
        return settings.temperature
    if text.logit_scale is None:
        raise LpovodError(
            f"{path} has no logit scale: its rows were read from a file. Set evaluation.temperature"
        )
    return 1 / text.logit_scale


def _check_same_model(path: Path, ident: dict, other: Path, expected: dict) -> None:
    for key in ("inputs", "settings"):
        for name in sorted({*ident[key], *expected[key]}):
            value, other_value = ident[key].get(name), expected[key].get(name)
            if value != other_value:
                raise LpovodError(
                    f"{path} and {other} were made with different {name}: {value} and "
                    f"{other_value}. Make them again: snakemake --forcerun {STAGE}"
                )


def _check_unit(path: Path, name: str, vector: np.ndarray) -> None:
    length = np.linalg.norm(vector.astype(np.float64))
    if vector.ndim != 1 or not abs(length - 1) < 1e-3:
        raise LpovodError(
            f"{path}: the embedding of {name!r} has shape {vector.shape} and length {length:.4g}, "
            f"expected a unit vector. Make it again: snakemake --forcerun {STAGE}"
        )
