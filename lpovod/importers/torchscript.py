"""The tensors of a TorchScript archive, without TorchScript.

``torch.jit.load`` compiles the program inside an archive, and may run parts of it. This reader
ignores the program: an archive is a zip with a pickle of the module tree and a file for each
storage, and the pickle is read by an unpickler that admits only modules and tensors.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpovod.exceptions import LpovodError

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}


class _Module:
    """Replaces every class of an archive: only attributes are read."""


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    return torch.as_strided(storage, size, stride, offset).clone()


def _list(items: Any) -> list:
    return list(items)


class _ModulesAndTensors(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return _list
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: tuple) -> Tensor:
        _, dtype, number, _, _ = pid
        content = bytearray(self._archive.read(f"{self._root}/data/{number}"))
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip with a program in it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Any]:
    """Tensors and numbers of an archive by their dotted name, as in a state dict.

    Raises:
        LpovodError: if the archive is damaged, or its pickle names anything but modules and
            tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0]
            module = _ModulesAndTensors(archive, root).load()
            return dict(_walk(module, ""))
    except Exception as error:  # a damaged archive can raise nearly anything
        raise LpovodError(
            f"{path} is not a TorchScript archive of only modules and tensors ({error}); none of "
            "its code was run. If it is incomplete, download it again"
        ) from None


def _walk(module: _Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, _Module):
            yield from _walk(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{name}", value
