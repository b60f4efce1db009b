"""Pickles of numpy arrays, read by an unpickler that admits nothing else.

A pickle names the functions to call. Few functions rebuild arrays; any other name stops the reading
before the function is called.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct
from numpy._core.numeric import _frombuffer  # type: ignore[attr-defined]  # not in the stubs

from lpovod.exceptions import LpovodError, existing


def _encode(text: str, encoding: str) -> bytes:
    """Decodes bytes of protocol 2, which writes them as latin1 characters."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Decodes empty bytes of protocol 2: those of an array without rows."""
    return b""


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
}
for _numpy in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _ADMITTED[f"{_numpy}.multiarray", "_reconstruct"] = _reconstruct
    _ADMITTED[f"{_numpy}.numeric", "_frombuffer"] = _frombuffer
_ADMITTED |= {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ADMITTED[module, name]


def read_pickled_arrays(path: Path) -> Any:
    """The content of a pickle of plain containers with numbers, strings and numpy arrays.

    Raises:
        LpovodError: if the file is missing, is damaged, or names anything else.
    """
    existing(path)
    try:
        with open(path, "rb") as file:
            return _ArraysOnly(file).load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise LpovodError(
            f"{path} is not a pickle of only numpy arrays ({error}); none of its code was run"
        ) from None
