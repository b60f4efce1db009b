"""Artifacts appear whole or not at all, and each one records its inputs.

An *identity* is a small dictionary stored inside the artifact::

    {"stage": "region_embeddings", "version": "0.1.0", "settings": {...},
     "inputs": {"proposals": "sha256 of that file", "clip_weights": "..."}}

A reader that combines two artifacts calls `check_made_from`, so that files from different runs are
never mixed silently.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from lpovod import __version__
from lpovod.exceptions import DISK_FULL, LpovodError, disk_full, existing

Identity = dict[str, Any]
LITTLE_ROOM = 1 << 16  # bytes; a disk with less free space counts as full


def sha256(path: Path) -> str:
    """Digest of a file's bytes, as a hexadecimal string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(stage: str, settings: Any = None, **inputs: Path | str) -> Identity:
    """Stage, version, settings and inputs of an artifact; an input is a file or its digest."""
    if hasattr(settings, "model_dump"):
        settings = settings.model_dump(mode="json")
    return {
        "stage": stage,
        "version": __version__,
        "settings": settings if settings is not None else {},
        "inputs": {k: sha256(v) if isinstance(v, Path) else v for k, v in sorted(inputs.items())},
    }


def fingerprint(ident: Identity) -> str:
    """Digest of an identity: artifacts with equal fingerprints have the same origin."""
    return hashlib.sha256(json.dumps(ident, sort_keys=True).encode()).hexdigest()


def check_made_from(path: Path, ident: Identity, name: str, expected: Path | str) -> None:
    """Refuse an artifact that was made from a different input than the one used with it.

    Args:
        path: the artifact, for the message.
        ident: its stored identity.
        name: of the input, as in ``ident["inputs"]``.
        expected: the file (or digest) that the artifact must have been made from.

    Raises:
        LpovodError: naming the artifact, both digests and the remedy.
    """
    digest = sha256(expected) if isinstance(expected, Path) else expected
    recorded = ident["inputs"].get(name)
    if recorded != digest:
        raise LpovodError(
            f"{path} was made from other {name} than it is used with: it records "
            f"{str(recorded)[:12]}, {expected if isinstance(expected, Path) else name} is "
            f"{digest[:12]}. Make it again: snakemake --forcerun {path}"
        )


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: moved to `path` on success, removed on error.

    The temporary name is the same in every attempt, so a killed attempt leaves at most one file,
    which the next attempt overwrites.

    Raises:
        LpovodError: if the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        if partial.is_file():  # it may be a link to a folder
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        need_room(path, LITTLE_ROOM)
        # HDF5 and torch report a full disk or an exhausted quota in the message only.
        for number in DISK_FULL:
            if os.strerror(number) in str(error):
                raise disk_full(path, number) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def need_room(path: Path, size: int) -> None:
    """Refuse to write a file for which the disk has no room.

    Args:
        path: the file to write; its folder exists.
        size: bytes that must be free.

    Raises:
        LpovodError: if fewer bytes are free.
    """
    if shutil.disk_usage(path.parent).free < size:
        raise disk_full(path)


def write_json(path: Path, content: Any) -> None:
    """Write json with sorted keys, so that equal content gives equal bytes."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n")


def read_json(path: Path) -> Any:
    """Read json.

    Raises:
        LpovodError: if the file is missing or is not json.
    """
    try:
        return json.loads(existing(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LpovodError(f"{path} is not valid json ({error}). Is the file complete?") from None


def write_tensors(path: Path, tensors: dict[str, np.ndarray], ident: Identity) -> None:
    """Write named arrays with their identity as a safetensors file, which needs no pickle."""
    # A single metadata entry: the format does not fix the order of several, and bytes must repeat.
    # np.ascontiguousarray would turn a scalar into a vector.
    contiguous = {name: np.array(array, order="C") for name, array in tensors.items()}
    with atomic(path) as partial:
        partial.write_bytes(save(contiguous, {"identity": json.dumps(ident, sort_keys=True)}))


def read_identity(path: Path) -> Identity:
    """The identity stored by `write_tensors`."""
    return _open_tensors(path)[1]


def read_tensors(path: Path, stage: str) -> tuple[dict[str, np.ndarray], Identity]:
    """Read a file that `write_tensors` wrote.

    Args:
        path: the file.
        stage: the stage that must have written it.

    Raises:
        LpovodError: if the file is damaged, has no identity, or another stage wrote it.
    """
    file, ident = _open_tensors(path)
    if ident["stage"] != stage:
        raise LpovodError(f"{path} was written by stage {ident['stage']}, expected {stage}")
    return {name: file.get_tensor(name) for name in file.keys()}, ident  # noqa: SIM118


def _open_tensors(path: Path) -> tuple[Any, Identity]:
    try:
        file = safe_open(existing(path), framework="numpy")
        return file, json.loads((file.metadata() or {})["identity"])
    except LpovodError:
        raise
    except KeyError:
        raise LpovodError(f"{path} has no identity: it was not written by lpovod") from None
    except Exception as error:
        raise LpovodError(f"{path} is not a whole safetensors file ({error})") from None
