"""Text embeddings made elsewhere: a matrix whose rows are in the order of a list of classes."""

from pathlib import Path

import numpy as np

from lpovod.artifacts import read_json
from lpovod.exceptions import LpovodError, existing


def read_rows(file: Path, classes: Path) -> dict[str, np.ndarray]:
    """Unit vectors by class name.

    Args:
        file: (n, D) floats, of any length: ``.npy``, or a ``.pth`` that holds one tensor.
        classes: json of the n names in the rows' order: a list of names, or COCO's json, whose
            categories are then taken in the order of their ids.

    Returns:
        {name: (D,) float64, of unit length}.

    Raises:
        LpovodError: if the matrix is damaged or holds anything else, if rows and names differ in
            number, if a name stands there twice, or if a row has no direction.
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
    """Refuse rows that are not those of their names: of another CLIP, or in another order.

    Args:
        file: for the message.
        rows: as `read_rows` returns them, n of them.
        embedded: (n, D) of the bare names, by the CLIP that the rows are said to come from.

    Raises:
        LpovodError: if the dimension differs, or most rows are more similar to another name.
    """
    given = np.stack(list(rows.values()))
    if given.shape != embedded.shape:
        raise LpovodError(
            f"{file} has {given.shape[1]} columns, the configured CLIP {embedded.shape[1]}"
        )
    cosine = given @ (embedded / np.linalg.norm(embedded, axis=1, keepdims=True)).T
    own = int((cosine.argmax(axis=1) == np.arange(len(rows))).sum())
    # Prompts differ, and so a few rows may be closer to a kindred name.
    if own <= len(rows) / 2:
        raise LpovodError(
            f"{file}: only {own} of {len(rows)} rows are most similar to what CLIP says of their "
            "own name. Is text_embeddings.classes in the order of the rows, and are they of the "
            "configured CLIP?"
        )


def _read_names(path: Path) -> list[str]:
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("categories"), list):
        content = [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise LpovodError(f"{path} is neither a list of class names nor COCO's json")
    if len(set(content)) < len(content):
        twice = next(name for name in content if content.count(name) > 1)
        raise LpovodError(f"{path} lists {twice!r} twice")
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
            f"{path} holds no matrix of numbers alone ({str(error).splitlines()[0]}); nothing of "
            "it was run"
        ) from None
