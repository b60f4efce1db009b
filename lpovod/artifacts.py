"""What every artefact shares: it appears whole or not at all, and it says what it was made from.

An *identity* is a small dictionary stored inside the artefact::

    {"stage": "region_embeddings", "version": "0.1.0", "settings": {...},
     "inputs": {"proposals": "sha256 of that file", "clip_weights": "..."}}

A reader that combines two artefacts calls `check_made_from`, so that files of different runs are
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
LITTLE_ROOM = 1 << 16  # bytes free on a disk that is as good as full


def sha256(path: Path) -> str:
    """Digest of a file's bytes, as a hexadecimal string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(stage: str, settings: Any = None, **inputs: Path | str) -> Identity:
    """What an artefact is made from. An input is a file, to be digested, or a digest."""
    if hasattr(settings, "model_dump"):
        settings = settings.model_dump(mode="json")
    return {
        "stage": stage,
        "version": __version__,
        "settings": settings if settings is not None else {},
        "inputs": {k: sha256(v) if isinstance(v, Path) else v for k, v in sorted(inputs.items())},
    }


def fingerprint(ident: Identity) -> str:
    """One digest of an identity: two artefacts with the same one were made from the same."""
    return hashlib.sha256(json.dumps(ident, sort_keys=True).encode()).hexdigest()


def check_made_from(path: Path, ident: Identity, name: str, expected: Path | str) -> None:
    """Refuse an artefact that was made from another input than the one given with it.

    Args:
        path: the artefact, for the message.
        ident: its stored identity.
        name: the input in question, as in ``ident["inputs"]``.
        expected: the file (or digest) the artefact must have been made from.

    Raises:
        LpovodError: naming the artefact, both digests and the remedy.
    """
    digest = sha256(expected) if isinstance(expected, Path) else expected
    found = ident["inputs"].get(name)
    if found != digest:
        raise LpovodError(
            f"{path} was made from other {name} than the ones given with it: it states "
            f"{str(found)[:12]}, {expected if isinstance(expected, Path) else name} is "
            f"{digest[:12]}. Make it again: snakemake --forcerun {ident['stage']}"
        )


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; on success it is moved to `path`, on error it is removed.

    The temporary name is the same in every attempt, so that a killed one leaves at most one file,
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
        # HDF5 and torch report a full disk or an exhausted quota in words only.
        for number in DISK_FULL:
            if os.strerror(number) in str(error):
                raise disk_full(path, number) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def need_room(path: Path, size: int) -> None:
    """Refuse to write where less is free.

    Args:
        path: what is to be written; its folder exists.
        size: in bytes.

    Raises:
        LpovodError: if the disk is full.
    """
    if shutil.disk_usage(path.parent).free < size:
        raise disk_full(path)


def write_json(path: Path, content: Any) -> None:
    """Write json with sorted keys (same content, same bytes)."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n")


def read_json(path: Path) -> Any:
    """Read json.

    Raises:
        LpovodError: if the file is missing or is no json.
    """
    try:
        return json.loads(existing(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LpovodError(f"{path} is not valid json ({error}). Is the file whole?") from None


def write_tensors(path: Path, tensors: dict[str, np.ndarray], ident: Identity) -> None:
    """Write named arrays with their identity as a safetensors file (nothing is ever unpickled)."""
    # One metadata entry alone: the format keeps several in no fixed order, and bytes must repeat.
    # np.ascontiguousarray would turn a scalar into a vector.
    whole = {name: np.array(array, order="C") for name, array in tensors.items()}
    with atomic(path) as partial:
        partial.write_bytes(save(whole, {"identity": json.dumps(ident, sort_keys=True)}))


def read_identity(path: Path) -> Identity:
    """The identity stored by `write_tensors`."""
    return _open_tensors(path)[1]


def read_tensors(path: Path, stage: str) -> tuple[dict[str, np.ndarray], Identity]:
    """Read a file of `write_tensors`.

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
        raise LpovodError(f"{path} carries no identity: it was not written by lpovod") from None
    except Exception as error:
        raise LpovodError(f"{path} is not a whole safetensors file ({error})") from None
