"""Imports text embeddings: a matrix whose rows have the order of a list of classes."""

from pathlib import Path

import numpy as np

from lpovod.artifacts import read_json
from lpovod.exceptions import LpovodError, existing


def read_rows(file: Path, classes: Path) -> dict[str, np.ndarray]:
    """Unit vectors by class name.

    Args:
        file: (n, D) floats, rows of any length: ``.npy``, or a ``.pth`` with a single tensor.
        classes: json of the n names in the order of the rows: a list of names, or COCO's json,
            whose categories are sorted by id.

    Returns:
        {name: (D,) float64, of unit length}.

    Raises:
        LpovodError: if the file is damaged or holds anything but a matrix, if the numbers of rows
            and names differ, if a name appears twice, or if a row is zero or not finite.
    """
    names, rows = _read_names(classes), _read_matrix(file)
    if rows.ndim != 2 or len(rows) != len(names):
        raise LpovodError(
            f"{file} has shape {rows.shape} and {classes} lists {len(names)} classes: expected "
            f"({len(names)}, dimension)"
        )
    lengths = np.linalg.norm(rows, axis=1)
    for name, length in zip(names, lengths, strict=True):
        if not np.isfinite(length) or length == 0:
            raise LpovodError(f"{file}: the row of {name!r} has length {length}")
    return dict(zip(names, rows / lengths[:, None], strict=True))


def check_rows(file: Path, rows: dict[str, np.ndarray], embedded: np.ndarray) -> None:
    """Refuse rows that do not match their names: made with another CLIP, or in another order.

    Args:
        file: for the message.
        rows: the n rows that `read_rows` returned.
        embedded: (n, D) embeddings of the bare names by the CLIP that supposedly made the rows.

    Raises:
        LpovodError: if the dimension differs, or half of the rows or more are most similar to
            another name.
    """
    vectors = np.stack(list(rows.values()))
    if vectors.shape != embedded.shape:
        raise LpovodError(
            f"{file} has {vectors.shape[1]} columns, the configured CLIP {embedded.shape[1]}"
        )
    cosine = vectors @ (embedded / np.linalg.norm(embedded, axis=1, keepdims=True)).T
    matching = int((cosine.argmax(axis=1) == np.arange(len(rows))).sum())
    # Prompts differ, so a few rows may be closer to a related name.
    if matching <= len(rows) / 2:
        raise LpovodError(
            f"{file}: only {matching} of {len(rows)} rows are most similar to CLIP's embedding of "
            "their own name. Does text_embeddings.classes have the order of the rows, and did the "
            "configured CLIP make them?"
        )


def _read_names(path: Path) -> list[str]:
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("categories"), list):
        content = [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise LpovodError(f"{path} is neither a list of class names nor COCO's json")
    if len(set(content)) < len(content):
        repeated = next(name for name in content if content.count(name) > 1)
        raise LpovodError(f"{path} lists {repeated!r} twice")
    return content


def _read_matrix(path: Path) -> np.ndarray:
    existing(path)
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False).astype(np.float64)
        import torch

        return torch.load(path, map_location="cpu", weights_only=True).double().numpy()
    except Exception as error:  # a damaged file can raise nearly anything
        raise LpovodError(
            f"{path} does not hold a single numeric matrix ({str(error).splitlines()[0]}); none of "
            "its code was run"
        ) from None
