"""Stage `text_embeddings`: a unit vector for each class name, keyed by the name.

Imported while other stages read text embeddings: CLIP (and torch) is loaded only to make them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lpovod import config
from lpovod.artifacts import LpovodError, identity, read_tensors, sha256, write_tensors
from lpovod.importers.text_rows import check_rows, read_rows
from lpovod.progress import say

STAGE = "text_embeddings"


@dataclass(frozen=True)
class ClassEmbeddings:
    """Text embeddings of several classes, all of one CLIP model and one set of templates.

    Attributes:
        names: of the classes, n of them.
        vectors: (n, D) float32, unit rows.
        logit_scale: the factor CLIP was trained with: its softmax is over logit_scale * cosine;
            None for rows that were read from a file without their CLIP.
        clip_weights: digest of the CLIP weights, or "none".
        clip_architecture: name of the CLIP architecture, or the digest of its json file.
    """

    names: list[str]
    vectors: np.ndarray
    logit_scale: float | None
    clip_weights: str
    clip_architecture: str


def clip_architecture(settings: config.Clip) -> Path | str:
    """The architecture as an input of an identity: a json file, or open_clip's name."""
    architecture = settings.architecture
    return Path(architecture) if architecture.endswith(".json") else architecture


def embed_classes(
    names: list[str], clip: config.Clip, settings: config.TextEmbeddings, output: Path
) -> None:
    """Embed class names and write ``{name: (D,) float32}`` with its identity.

    The vectors are CLIP's of the names, or the names' rows of `settings.file`.

    Raises:
        LpovodError: if the CLIP model cannot be loaded, or the file's rows are not of the classes.
    """
    inputs: dict[str, Path | str] = {}
    if settings.file is None:
        classes, source = embed_texts(names, clip, settings), f"{len(settings.templates)} prompts"
    else:
        classes, source = _embeddings_of_file(names, clip, settings), str(settings.file)
        inputs |= {"file": settings.file, "classes": settings.classes}
    inputs |= {
        "clip_weights": classes.clip_weights,
        "clip_architecture": classes.clip_architecture,
    }
    if clip.weights is not None and clip.vocabulary is not None:
        inputs["vocabulary"] = clip.vocabulary
    ident = identity(STAGE, settings, **inputs) | {"logit_scale": classes.logit_scale}
    write_tensors(output, dict(zip(names, classes.vectors, strict=True)), ident)
    say(f"{len(names)} classes, {source}: {output}")


def embed_texts(
    names: list[str], clip: config.Clip, settings: config.TextEmbeddings
) -> ClassEmbeddings:
    """Embed names: the mean over the templates of the unit vectors, brought to unit length.

    Raises:
        LpovodError: if the CLIP model cannot be loaded.
    """
    from lpovod.clip import load_clip

    model = load_clip(clip, "cpu")
    prompts = [template.format(name) for name in names for template in settings.templates]
    vectors = _unit(model.encode_texts(prompts).double().numpy())
    vectors = _unit(vectors.reshape(len(names), len(settings.templates), -1).mean(axis=1))
    return _described(names, vectors, model, clip)


def _embeddings_of_file(
    names: list[str], clip: config.Clip, settings: config.TextEmbeddings
) -> ClassEmbeddings:
    """The names' rows of a file, held against what CLIP says of them if there is a CLIP."""
    listed, model = read_rows(settings.file, settings.classes), None
    if clip.weights is not None:
        from lpovod.clip import load_clip

        model = load_clip(clip, "cpu")
        check_rows(settings.file, listed, model.encode_texts(list(listed)).double().numpy())
    if absent := [name for name in names if name not in listed]:
        raise LpovodError(f"{settings.classes} does not list the class {absent[0]!r}")
    return _described(names, np.stack([listed[name] for name in names]), model, clip)


def _described(names, vectors: np.ndarray, model, clip: config.Clip) -> ClassEmbeddings:
    architecture = clip_architecture(clip) if model else "none"
    return ClassEmbeddings(
        names=names,
        vectors=vectors.astype(np.float32),
        logit_scale=float(model.logit_scale) if model else None,
        clip_weights=model.weights_digest if model else "none",
        clip_architecture=sha256(architecture) if isinstance(architecture, Path) else architecture,
    )


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def read_text_embeddings(paths: Path | Iterable[Path]) -> ClassEmbeddings:
    """Read one file or merge several.

    Raises:
        LpovodError: naming the file, if two were made with other CLIP weights or templates, if a
            class is in two of them, or if a vector is not of unit length.
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


def _check_same_model(path: Path, ident: dict, other: Path, expected: dict) -> None:
    for key in ("inputs", "settings"):
        for name in sorted({*ident[key], *expected[key]}):
            mine, theirs = ident[key].get(name), expected[key].get(name)
            if mine != theirs:
                raise LpovodError(
                    f"{path} and {other} were made with different {name}: {mine} and {theirs}. "
                    f"Make them again: snakemake --forcerun {STAGE}"
                )


def _check_unit(path: Path, name: str, vector: np.ndarray) -> None:
    length = np.linalg.norm(vector.astype(np.float64))
    if vector.ndim != 1 or not abs(length - 1) < 1e-3:
        raise LpovodError(
            f"{path}: the embedding of {name!r} has shape {vector.shape} and length {length:.4g}, "
            f"expected a unit vector. Make it again: snakemake --forcerun {STAGE}"
        )
